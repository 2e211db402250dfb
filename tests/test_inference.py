"""A finished run is loaded, evaluated and used for predictions with two calls."""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from fedddp import (
    CohortConfig,
    ConfigError,
    DataConfig,
    Federation,
    LocalConfig,
    TrackingConfig,
    evaluate,
    load_config,
    load_model,
)
from fedddp.config.loader import digest
from fedddp.data.datasets import Images, load
from fedddp.federation import Result
from fedddp.inference import TrainedModel
from fedddp.tasks import Classification

QUIET = TrackingConfig(trackers=[], progress=False)


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory: pytest.TempPathFactory) -> Result:
    """A short run of the recipe `digits`."""
    flags = ["--rounds", "3", "--model.norm", "batch", "--model.name", "cnn", "--data.examples", "600"]
    config = load_config("digits", [*flags, "--output", str(tmp_path_factory.mktemp("digits"))])
    result: Result = Federation(config, tracking=QUIET).run()
    return result


@pytest.fixture(scope="module")
def digits_test() -> Images:
    config = load_config("digits", ["--data.examples", "600"])
    return load(config.data)[1]


class Stripes(nn.Module):
    """A linear model of 6x4 pixels in colour."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3 * 6 * 4, 3)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.layer(images.flatten(1))
        return logits


def other_stripes() -> nn.Module:
    """Return a module of another architecture for the same images."""
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 6 * 4, 3))


def stripes(examples: int) -> TensorDataset:
    """Return pictures of 6x4 pixels, one channel of which is bright: their class."""
    labels = torch.arange(examples) % 3
    images = torch.randint(0, 90, (examples, 3, 6, 4), generator=torch.Generator().manual_seed(examples))
    images[torch.arange(examples), labels] += 100
    return TensorDataset(images.to(torch.uint8), labels)


@pytest.fixture(scope="module")
def stripes_run(tmp_path_factory: pytest.TempPathFactory) -> Result:
    """A run with a module and datasets of its own."""
    torch.manual_seed(0)
    result: Result = Federation(
        module=Stripes(),
        train=stripes(90),
        test=stripes(30),
        data=DataConfig(clients=3),
        cohort=CohortConfig(size=2),
        local=LocalConfig(lr=0.05, batch_size=8),
        tracking=QUIET,
        output=str(tmp_path_factory.mktemp("stripes")),
        rounds=2,
    ).run()
    return result


def pixels_of(images: Images) -> Tensor:
    """Return the pixels as the dataset has them: uint8, (n, C, H, W)."""
    assert images.pixels is not None
    return images.pixels


# ---- evaluate ----


def same_metrics(one: dict[str, Any], two: dict[str, Any]) -> None:
    """Compare metrics, some of which are lists, to 1e-6."""
    assert one.keys() == two.keys()
    for name, value in one.items():
        np.testing.assert_allclose(value, two[name], atol=1e-6, rtol=0, err_msg=name)


def last_evaluation(result: Result) -> dict[str, Any]:
    """Return the metrics of the last round that was evaluated."""
    row = result.history[-1]
    found = {name.removeprefix("eval/"): value for name, value in row.items() if name.startswith("eval/")}
    assert {"accuracy", "loss", "recall"} <= found.keys()
    return found


def test_evaluating_a_loaded_model_gives_the_metrics_of_the_last_round(
    digits_run: Result, digits_test: Images
) -> None:
    dataset = TensorDataset(pixels_of(digits_test), torch.from_numpy(digits_test.labels))
    for batch_size in (500, 7):
        metrics = evaluate(load_model(digits_run.folder), dataset, batch_size=batch_size)
        same_metrics(metrics, last_evaluation(digits_run))


def test_evaluating_a_loaded_module_of_ones_own_gives_the_metrics_of_the_last_round(
    stripes_run: Result,
) -> None:
    model = load_model(stripes_run.folder, module=Stripes())
    same_metrics(evaluate(model, stripes(30)), last_evaluation(stripes_run))
    assert isinstance(model.module, Stripes)
    for name, value in stripes_run.model.state_dict().items():
        assert torch.equal(value, model.module.state_dict()[name])


def test_evaluate_refuses_labels_and_images_that_do_not_fit(stripes_run: Result) -> None:
    model = load_model(stripes_run.folder, module=Stripes())
    images, labels = stripes(6).tensors
    with pytest.raises(ValueError, match=r"label.*3"):
        evaluate(model, TensorDataset(images, labels + 1))
    with pytest.raises(ValueError, match=r"\(3, 6, 4\)"):
        evaluate(model, TensorDataset(images[:, :2], labels))


# ---- predict ----


def test_probabilities_sum_to_one_and_the_largest_agrees_with_the_accuracy(
    digits_run: Result, digits_test: Images
) -> None:
    model = load_model(digits_run.folder)
    probabilities = model.predict(pixels_of(digits_test))
    assert probabilities.shape == (len(digits_test), 10)
    assert probabilities.dtype == torch.float32
    assert not probabilities.requires_grad
    torch.testing.assert_close(probabilities.sum(1), torch.ones(len(digits_test)))
    correct = probabilities.argmax(1).numpy() == digits_test.labels
    assert correct.mean() == pytest.approx(digits_run.history[-1]["eval/accuracy"], abs=1e-6)
    torch.testing.assert_close(model.predict(pixels_of(digits_test), batch_size=7), probabilities)
    assert not model.module.training


FORMS: dict[str, Callable[[Tensor], Any]] = {
    "tensor (C, H, W)": lambda image: image,
    "tensor (H, W)": lambda image: image[0],
    "array (H, W, C)": lambda image: image.permute(1, 2, 0).numpy(),
    "array (H, W)": lambda image: image[0].numpy(),
    "floats 0..1": lambda image: image.float() / 255,
    "float64 array": lambda image: (image.double() / 255).numpy(),
    "PIL": lambda image: Image.fromarray(image[0].numpy()),
    "PIL in colour": lambda image: Image.fromarray(image[0].numpy()).convert("RGB").convert("L"),
}


@pytest.mark.parametrize("form", FORMS)
def test_one_image_and_a_list_of_them_may_have_any_usual_form(
    form: str, digits_run: Result, digits_test: Images
) -> None:
    model, images = load_model(digits_run.folder), pixels_of(digits_test)[:3]
    expected = model.predict(images)
    several = model.predict([FORMS[form](image) for image in images])
    torch.testing.assert_close(several, expected)
    one = model.predict(FORMS[form](images[0]))
    assert one.shape == (1, 10)
    torch.testing.assert_close(one[0], expected[0])
    torch.testing.assert_close(model.predict(tuple(FORMS[form](image) for image in images)), expected)


def test_an_image_may_be_a_path(digits_run: Result, digits_test: Images, tmp_path: Path) -> None:
    model, images = load_model(digits_run.folder), pixels_of(digits_test)[:3]
    paths = [tmp_path / f"{index}.png" for index in range(3)]
    for path, image in zip(paths, images, strict=True):
        Image.fromarray(image[0].numpy()).save(path)
    expected = model.predict(images)
    torch.testing.assert_close(model.predict(paths), expected)
    torch.testing.assert_close(model.predict([str(path) for path in paths]), expected)
    for one in (paths[1], str(paths[1])):
        torch.testing.assert_close(model.predict(one), expected[1:2])
        torch.testing.assert_close(model.preprocess(one), model.preprocess(images[1]))


def test_what_is_no_image_is_named_in_one_line(digits_run: Result, tmp_path: Path) -> None:
    model = load_model(digits_run.folder)
    (tmp_path / "x.png").write_bytes(b"no image")
    for bad, words in (
        (tmp_path / "x.png", f"{tmp_path}/x.png cannot be read as an image"),
        (str(tmp_path / "nowhere.png"), f"{tmp_path}/nowhere.png cannot be read as an image"),
        (tmp_path, f"{tmp_path} cannot be read as an image"),
        (7, "the image is int; give the path of an image file, a PIL image, or an array"),
        (b"x.png", "the image is bytes; give the path"),
        ([None], "the image is NoneType; give the path"),
    ):
        with pytest.raises(ValueError, match=re.escape(words)) as error:
            model.predict(bad)
        assert "\n" not in str(error.value)


def test_a_batch_may_be_an_array(digits_run: Result, digits_test: Images) -> None:
    model, images = load_model(digits_run.folder), pixels_of(digits_test)[:5]
    torch.testing.assert_close(model.predict(images.numpy()), model.predict(images))


def test_larger_images_are_resized_as_in_training(digits_run: Result, digits_test: Images) -> None:
    model, image = load_model(digits_run.folder), pixels_of(digits_test)[0]
    doubled = image.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2)
    found = model.predict(Image.fromarray(doubled[0].numpy()))
    torch.testing.assert_close(found, model.predict(image), atol=0.05, rtol=0)


def test_predict_refuses_images_of_other_channels_and_shapes(stripes_run: Result) -> None:
    model = load_model(stripes_run.folder, module=Stripes())
    for bad in (torch.zeros(2, 6, 4, dtype=torch.uint8), torch.zeros(3, 6, 5, dtype=torch.uint8)):
        with pytest.raises(ValueError, match=r"the image has .*\(3, 6, 4\)") as error:
            model.predict(bad)
        assert "\n" not in str(error.value)
    assert model.predict(torch.zeros(6, 4, dtype=torch.uint8)).shape == (1, 3), "grey counts as colour"


def test_preprocess_gives_what_the_module_takes(digits_run: Result, digits_test: Images) -> None:
    model, pixels = load_model(digits_run.folder), pixels_of(digits_test)[:6]
    mean, std = torch.tensor(model.mean), torch.tensor(model.std)
    prepared = model.preprocess(pixels)
    torch.testing.assert_close(prepared, (pixels / 255 - mean.view(-1, 1, 1)) / std.view(-1, 1, 1))
    with torch.no_grad():
        torch.testing.assert_close(model.module(prepared).softmax(1), model.predict(pixels))
    assert model.preprocess([]).shape == (0, 1, 8, 8)
    assert model.predict([]).shape == (0, 10)


def test_a_colour_image_becomes_grey_as_pil_makes_it_for_a_grey_model(digits_run: Result) -> None:
    model = load_model(digits_run.folder)
    values = np.random.default_rng(0).integers(0, 256, (8, 8, 3)).astype(np.uint8)
    picture = Image.fromarray(values)
    grey = np.array(picture.convert("L"))
    for colour in (picture, values, torch.from_numpy(values).permute(2, 0, 1)):
        assert np.array_equal(model.pixels(colour)[0].numpy(), grey)
    torch.testing.assert_close(model.predict(picture), model.predict(grey))
    transparent = picture.convert("RGBA")
    transparent.putalpha(128)
    black = Image.new("RGBA", (8, 8), "black")
    black.alpha_composite(transparent)
    expected = np.array(black.convert("RGB").convert("L"))
    assert np.array_equal(model.pixels(transparent)[0].numpy(), expected)


def test_a_model_is_moved_with_its_preprocessing(digits_run: Result, digits_test: Images) -> None:
    """On the device that every machine has beside the CPU, which computes nothing."""
    model = load_model(digits_run.folder)
    assert model.device == torch.device("cpu")
    assert model.to("meta") is model
    assert {tensor.device.type for tensor in model.module.state_dict().values()} == {"meta"}
    prepared = model.preprocess(pixels_of(digits_test)[:3])
    assert prepared.device == model.device == torch.device("meta")
    assert model.module(prepared).shape == (3, 10)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_model_on_a_gpu_predicts_and_evaluates_as_on_the_cpu(
    digits_run: Result, digits_test: Images
) -> None:
    images, labels = pixels_of(digits_test), torch.from_numpy(digits_test.labels)
    model = load_model(digits_run.folder)
    there = load_model(digits_run.folder).to("cuda")
    found = there.predict(images)
    assert found.device.type == "cpu"
    torch.testing.assert_close(found, model.predict(images), atol=1e-3, rtol=0)
    metrics = evaluate(there, TensorDataset(images, labels))
    assert metrics["accuracy"] == pytest.approx(
        evaluate(model, TensorDataset(images, labels))["accuracy"], abs=0.01
    )


def test_a_task_without_predictions_evaluates_and_refuses_to_predict(
    digits_run: Result, digits_test: Images
) -> None:
    class Plain(Classification):
        def predict(self, outputs: Tensor) -> Tensor | None:  # type: ignore[override]
            return None

    model = dataclasses.replace(load_model(digits_run.folder), task=Plain())
    images = pixels_of(digits_test)
    with pytest.raises(ConfigError, match="task=Plain has no predictions"):
        model.predict(images[:2])
    same_metrics(
        evaluate(model, TensorDataset(images, torch.from_numpy(digits_test.labels))),
        last_evaluation(digits_run),
    )


# ---- what is stored ----


def test_the_header_of_the_model_file_has_preprocessing_classes_and_versions(digits_run: Result) -> None:
    with safe_open(digits_run.folder / "model.safetensors", framework="pt") as opened:
        metadata = opened.metadata()
    config = load_config(str(digits_run.folder / "config.yaml"))
    preprocessing = json.loads(metadata["preprocessing"])
    train, _ = load(config.data)
    assert preprocessing == {
        "size": [8, 8],
        "channels": 1,
        "mean": pytest.approx(list(train.mean)),
        "std": pytest.approx(list(train.std)),
        "resize": "crop",
    }
    assert json.loads(metadata["classes"]) == [str(digit) for digit in range(10)]
    assert metadata["task"] == "Classification"
    assert metadata["config_digest"] == digest(config)
    assert (metadata["fedddp"], metadata["torch"]) == (version("fedddp"), torch.__version__)


def test_a_loaded_model_has_classes_shape_and_normalisation(stripes_run: Result) -> None:
    model = load_model(str(stripes_run.folder), module=Stripes())
    assert isinstance(model, TrainedModel)
    assert (model.classes, model.shape, model.task) == (("0", "1", "2"), (3, 6, 4), Classification())
    pixels = stripes(90).tensors[0].double() / 255
    assert model.mean == pytest.approx(pixels.mean((0, 2, 3)).tolist(), abs=1e-5)
    assert model.std == pytest.approx(pixels.std((0, 2, 3), unbiased=False).tolist(), abs=1e-3)


def test_names_of_classes_are_stored(tmp_path: Path) -> None:
    folders = {"cat": 10, "dog": 200}
    for part in ("train", "val"):
        for name, brightness in folders.items():
            (tmp_path / "images" / part / name).mkdir(parents=True)
            for number in range(6):
                pixels = np.full((8, 8, 3), brightness, dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "images" / part / name / f"{number}.png")
    flags = "--data.dataset image_folder --data.root images --data.clients 2 --cohort.size 1 --rounds 2"
    result = Federation(load_config("digits", flags.split()), tracking=QUIET).run()
    model = load_model(result.folder)
    assert model.classes == ("cat", "dog")
    with Image.open(tmp_path / "images" / "val" / "dog" / "0.png") as picture:
        (probabilities,) = model.predict(picture)
    assert model.classes[int(probabilities.argmax())] == "dog"


# ---- errors ----


def refusal(*arguments: Any, **options: Any) -> str:
    with pytest.raises(ConfigError) as error:
        load_model(*arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_folder_without_a_finished_run_is_refused(tmp_path: Path, digits_run: Result) -> None:
    line = f"{tmp_path} has no model.safetensors; give the directory of a finished run"
    assert refusal(tmp_path) == line
    assert "nowhere has no model.safetensors" in refusal("nowhere")
    (tmp_path / "config.yaml").write_bytes((digits_run.folder / "config.yaml").read_bytes())
    (tmp_path / "history.jsonl").touch()
    assert f"{tmp_path} has no model.safetensors: the run is stopped; finish it with `fedddp" in refusal(
        tmp_path
    )
    (tmp_path / "config.yaml").unlink()
    (tmp_path / "model.safetensors").write_bytes((digits_run.folder / "model.safetensors").read_bytes())
    assert "config.yaml" in refusal(tmp_path)


def test_a_module_may_be_named_by_its_dotted_path(stripes_run: Result) -> None:
    named = load_model(stripes_run.folder, module=f"{__name__}.Stripes")
    passed = load_model(stripes_run.folder, module=Stripes())
    image = stripes(1).tensors[0]
    assert torch.equal(named.predict(image), passed.predict(image))
    assert "no.Net" in refusal(stripes_run.folder, module="no.Net")
    assert "of another model" in refusal(stripes_run.folder, module=f"{__name__}.other_stripes")


def test_the_best_model_is_loaded_before_the_run_ends(digits_run: Result, tmp_path: Path) -> None:
    assert "has no best.safetensors; leave out best" in refusal(digits_run.folder, best=True)
    for name in ("config.yaml", "history.jsonl"):
        (tmp_path / name).write_bytes((digits_run.folder / name).read_bytes())
    (tmp_path / "best.safetensors").write_bytes((digits_run.folder / "model.safetensors").read_bytes())
    best, final = load_model(tmp_path, best=True), load_model(digits_run.folder)
    for name, tensor in final.module.state_dict().items():
        assert torch.equal(tensor, best.module.state_dict()[name])
    text = refusal(tmp_path)
    assert f"the run is stopped; finish it with `fedddp run {tmp_path}/config.yaml --output" in text


def test_a_run_of_ones_own_module_needs_one(stripes_run: Result) -> None:
    text = refusal(stripes_run.folder)
    for words in (str(stripes_run.folder), f"--module {__name__}.Stripes)", "pass one as module="):
        assert words in text
    with pytest.raises(ValueError, match="of another model: the model misses 1.weight"):
        load_model(stripes_run.folder, module=nn.Sequential(nn.Flatten(), nn.Linear(72, 3)))


def edited(run: Result, folder: Path, **changes: str) -> Path:
    """Return a copy of a run's model with another configuration."""
    folder.mkdir()
    (folder / "model.safetensors").write_bytes((run.folder / "model.safetensors").read_bytes())
    text = (run.folder / "config.yaml").read_text()
    for before, after in changes.items():
        assert before in text
        text = text.replace(before, after)
    (folder / "config.yaml").write_text(text)
    return folder


def test_a_module_of_a_program_is_named_by_its_file(stripes_run: Result, tmp_path: Path) -> None:
    folder = edited(stripes_run, tmp_path / "run", **{f"{__name__}.Stripes": "__main__.Stripes"})
    assert "(on the command line: --module PROGRAM.Stripes, where PROGRAM.py is what" in refusal(folder)


def test_a_model_by_its_dotted_path_is_found_in_its_folder_or_by_another_path(
    digits_run: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = edited(digits_run, tmp_path / "run", **{"name: cnn": "name: a_lab_net.Net"})
    (tmp_path / "lab").mkdir()
    (tmp_path / "lab/a_lab_net.py").write_text(
        "from fedddp.models.registry import ModelConfig\n"
        "def Net(num_classes, in_channels, image_size):\n"
        "    shape = (in_channels, *image_size)\n"
        "    return ModelConfig(name='cnn', norm='batch').build(classes=num_classes, shape=shape, seed=0)\n"
    )
    text = refusal(folder)
    assert text.startswith("model.name: cannot import 'a_lab_net.Net': No module named 'a_lab_net'; start in")
    assert "pass another path of it as module= (on the command line: --module" in text
    image, expected = torch.rand(1, 8, 8), load_model(digits_run.folder)
    monkeypatch.syspath_prepend(tmp_path / "lab")
    net = load_model(folder)
    torch.testing.assert_close(net.predict(image), expected.predict(image))
    (tmp_path / "lab/a_lab_net.py").rename(tmp_path / "lab/moved_lab_net.py")
    del sys.modules["a_lab_net"]
    importlib.invalidate_caches()
    assert "cannot import" in refusal(folder)
    for module in ("moved_lab_net.Net", expected.module):
        found = load_model(folder, module=module)
        torch.testing.assert_close(found.predict(image), expected.predict(image))


def test_a_file_without_metadata_is_refused(tmp_path: Path, digits_run: Result) -> None:
    (tmp_path / "config.yaml").write_bytes((digits_run.folder / "config.yaml").read_bytes())
    file = tmp_path / "model.safetensors"
    save_file(load_file(digits_run.folder / "model.safetensors"), file)
    text = refusal(tmp_path)
    assert str(file) in text
    assert "train the run again" in text
    file.write_bytes(b"garbage")
    assert str(file) in refusal(tmp_path)
    file.write_bytes((digits_run.folder / "model.safetensors").read_bytes()[:-100])
    assert str(file) in refusal(tmp_path)


def test_a_run_written_before_0_1_0_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("seed: 0\ntrack: {with: [wandb]}\n")
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    assert "0.1.0" in refusal(tmp_path)
