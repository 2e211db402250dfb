"""A finished run is loaded, evaluated and used for predictions with two calls."""

from __future__ import annotations

import json
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
    assert refusal(tmp_path) == line, "an unfinished run"
    (tmp_path / "config.yaml").unlink()
    (tmp_path / "model.safetensors").write_bytes((digits_run.folder / "model.safetensors").read_bytes())
    assert "config.yaml" in refusal(tmp_path)


def test_a_run_of_ones_own_module_needs_one(stripes_run: Result) -> None:
    text = refusal(stripes_run.folder)
    for words in (str(stripes_run.folder), f"{__name__}.Stripes", "pass one as module="):
        assert words in text
    with pytest.raises(ValueError, match="of another model: the model misses 1.weight"):
        load_model(stripes_run.folder, module=nn.Sequential(nn.Flatten(), nn.Linear(72, 3)))


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
