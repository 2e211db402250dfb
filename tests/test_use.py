"""`fedddp eval`, `predict` and `card`: against loops over the images, the run's own records, and PIL."""

from __future__ import annotations

import json
import runpy
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from launching import call, error, evaluated
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from fedddp import (
    Federation,
    LocalConfig,
    TrackingConfig,
    load_config,
    load_model,
)
from fedddp.data.datasets import load
from fedddp.federation import Result
from fedddp.inference.pictures import LINE, MARGIN, SURE, TILE, UNSURE, Prediction, contact_sheet
from fedddp.models.registry import ModelConfig

QUIET = TrackingConfig(trackers=[], progress=False)
FEW = ["--data.examples", "400", "--data.clients", "6", "--cohort.size", "4", "--rounds", "2"]


class Normed(nn.Module):
    """Two layers with a batch norm between them."""

    def __init__(self, num_classes: int = 10, image_size: tuple[int, int] = (8, 8)) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(image_size[0] * image_size[1], 16), nn.BatchNorm1d(16)
        self.last = nn.Linear(16, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.last(self.norm(self.first(images.flatten(1))).relu())
        return logits


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("the runs")


def train(folder: Path, name: str, flags: list[str], recipe: str = "digits", **fields: Any) -> Result:
    config = load_config(recipe, [*FEW, "--output", str(folder), "--name", name, *flags])
    result: Result = Federation(config, tracking=QUIET, **fields).run()
    return result


@pytest.fixture(scope="module")
def plain(runs: Path) -> Result:
    """A run of FedAvg, whose clients hold nothing out."""
    flags = "--checkpoint.best eval/accuracy --local.epochs 6 --local.lr 0.1 --data.partition IID"
    result = train(runs, "plain", flags.split())
    assert 0.4 < result.history[-1]["eval/accuracy"] < 0.95, "some right and some wrong"
    return result


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train/ and val/ of bright and dark pictures of odd sizes."""
    root, rng = tmp_path_factory.mktemp("pictures") / "my images", np.random.default_rng(0)
    for part, count in (("train", 24), ("val", 8)):
        for label, (name, brightness) in enumerate({"black cat": 60, "dog": 190}.items()):
            (root / part / name).mkdir(parents=True)
            for number in range(count):
                size = (8 + (number + label) % 3, 9)
                values = rng.normal(brightness, 50, (*size, 3)).clip(0, 255).astype(np.uint8)
                Image.fromarray(values).save(root / part / name / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def folder_run(runs: Path, pictures: Path) -> Result:
    data = (
        "--data.dataset image_folder --data.image_size 8 --data.clients 4 --cohort.size 2 --data.holdout 0.3"
    )
    flags = [*data.split(), "--data.root", str(pictures), "--evaluation.clients", "4", "--local.lr", "0.01"]
    return train(runs, "folder", flags)


def lenet(result: Result) -> nn.Module:
    """Return the network of a run on the digits, built and loaded by torch alone."""
    module = ModelConfig(name="lenet").build(classes=10, shape=(1, 8, 8), seed=5)
    module.load_state_dict(load_file(result.folder / "model.safetensors"))
    return module.eval()


def normalised(image: Tensor, result: Result) -> Tensor:
    """Return one image, uint8 (C, H, W), as a batch of one."""
    with safe_open(result.folder / "model.safetensors", framework="pt") as opened:
        sizes = json.loads(opened.metadata()["preprocessing"])
    mean, std = (torch.tensor(sizes[name]).view(-1, 1, 1) for name in ("mean", "std"))
    return ((image.float() / 255 - mean) / std)[None]


# ---- eval: central ----


def test_eval_finds_what_the_history_and_a_loop_over_the_images_find(
    plain: Result, capsys: pytest.CaptureFixture[str]
) -> None:
    found = evaluated(capsys, str(plain.folder))
    row = plain.history[-1]
    for name, value in found["metrics"].items():
        np.testing.assert_allclose(value, row[f"eval/{name}"], atol=1e-6, rtol=0, err_msg=name)
    _, test = load(load_config("digits", FEW).data)
    assert test.pixels is not None
    module, confusion, losses = lenet(plain), np.zeros((10, 10), dtype=int), []
    with torch.no_grad():
        for image, label in zip(test.pixels, test.labels.tolist(), strict=True):
            logits = module(normalised(image, plain))[0]
            confusion[label, int(logits.argmax())] += 1
            losses.append(-float(logits.log_softmax(0)[label]))
    assert found["confusion"] == confusion.tolist()
    assert found["metrics"]["loss"] == pytest.approx(np.mean(losses), abs=1e-5)
    for label, (name, recall) in enumerate(found["recall"].items()):
        assert (name, recall) == (str(label), pytest.approx(confusion[label, label] / confusion[label].sum()))
    confused = [(p["examples"], p["true"], p["predicted"], p["share"]) for p in found["confused"]]
    assert sum(count for count, *_ in confused) == confusion.sum() - confusion.trace()
    assert confused[0][0] == (confusion - np.diag(confusion.diagonal())).max()
    for count, true, predicted, share in confused:
        assert count == confusion[int(true), int(predicted)]
        assert share == pytest.approx(count / confusion[int(true)].sum())
    assert found["data"] == {"dataset": "digits", "root": "data", "examples": len(test), "of_the_run": True}


def test_eval_of_the_best_model_finds_the_best_value(
    plain: Result, capsys: pytest.CaptureFixture[str]
) -> None:
    found = evaluated(capsys, str(plain.folder), "--best", "--clients", "0")
    best = max(plain.history, key=lambda row: (row["eval/accuracy"], -row["round"]))
    assert found["metrics"]["accuracy"] == pytest.approx(best["eval/accuracy"], abs=1e-6)
    assert (found["round"], found["clients"]) == (best["round"], None)
    model = load_model(plain.folder, best=True)
    assert (model.metadata["metric"], int(model.metadata["round"])) == ("eval/accuracy", best["round"])


def test_eval_prints_tables(plain: Result, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    call("eval", str(plain.folder), "--json", "out/found.json")
    lines = capsys.readouterr().out
    found = json.loads(Path("out/found.json").read_text())
    assert f"accuracy {100 * plain.history[-1]['eval/accuracy']:.2f} %" in lines
    assert f"{100 * found['recall']['3']:.2f} %" in lines
    pair = found["confused"][0]
    assert any(
        line.split()[:3] == [pair["true"], pair["predicted"], str(pair["examples"])]
        for line in lines.splitlines()
    )
    assert "the training examples of each, with the global model" in " ".join(lines.split())


# ---- eval: clients ----


def test_without_a_holdout_each_client_is_evaluated_on_what_it_trained_on(
    plain: Result, capsys: pytest.CaptureFixture[str]
) -> None:
    clients = evaluated(capsys, str(plain.folder))["clients"]
    config = load_config("digits", [*FEW, "--data.partition", "IID"])
    images, _ = load(config.data)
    split, _ = config.data.split(images, config.seed)
    assert images.pixels is not None
    module, accuracies = lenet(plain), []
    for client, row in enumerate(clients["rows"]):
        correct, loss, mine = 0, 0.0, split.indices(client).tolist()
        with torch.no_grad():
            for index in mine:
                logits = module(normalised(images.pixels[index], plain))
                correct += int(logits.argmax()) == images.labels[index]
                loss += float(F.cross_entropy(logits, torch.tensor([images.labels[index]])))
        assert (row["client"], row["examples"]) == (client, len(mine))
        assert row["accuracy"] == pytest.approx(correct / len(mine))
        assert row["loss"] == pytest.approx(loss / len(mine), abs=1e-4)
        accuracies.append(correct / len(mine))
    assert len(accuracies) == 6
    assert (clients["data"], clients["personalized"], clients["states_round"]) == ("training", False, None)
    expected = {"mean": np.mean(accuracies), "worst10": min(accuracies), "best10": max(accuracies)}
    assert clients["accuracy"] == pytest.approx({**expected, "std": np.std(accuracies)})


@pytest.mark.parametrize("algorithm", ["FedPer", "Ditto", "FedBN", "SCAFFOLD"])
def test_held_out_data_with_each_clients_own_model_give_what_the_run_recorded(
    algorithm: str, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--data.holdout", "0.25", "--evaluation.clients", "6", "--algorithm", algorithm]
    own: dict[str, Any] = {}
    if algorithm == "FedBN":
        own, flags = {"module": Normed()}, [*flags, "--data.feature_shift.rotation", "40"]
    if algorithm in ("Ditto", "SCAFFOLD"):
        own = {"local": LocalConfig(epochs=2, batch_size=16, lr=0.1)}
    result = train(runs, algorithm, flags, **own)
    words = ["--module", f"{__name__}.Normed"] if algorithm == "FedBN" else []
    clients = evaluated(capsys, str(result.folder), *words)["clients"]
    lines = [json.loads(line) for line in (result.folder / "clients.jsonl").read_text().splitlines()]
    recorded = [row for row in lines if row["round"] == 2]
    assert len(recorded) == 6
    for row, expected in zip(clients["rows"], recorded, strict=True):
        assert row == pytest.approx({n: v for n, v in expected.items() if n != "round"}, abs=1e-6)
    for name, value in clients["accuracy"].items():
        assert value == pytest.approx(result.history[-1][f"clients/accuracy_{name}"], abs=1e-6)
    personal = algorithm != "SCAFFOLD"
    assert (clients["data"], clients["personalized"]) == ("held out", personal)
    assert clients["states_round"] == (2 if personal else None)


def test_a_corrupt_checkpoint_is_left_alone_and_the_one_before_is_used(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--data.holdout", "0.25", "--algorithm", "FedPer", "--checkpoint.every", "1"]
    result = train(runs, "corrupt", flags)
    file = result.folder / "checkpoints" / "round-00002" / "state.json"
    file.write_text("{}")
    clients = evaluated(capsys, str(result.folder))["clients"]
    assert clients["states_round"] == 1
    assert file.read_text() == "{}"
    shutil.rmtree(result.folder / "checkpoints")
    found = evaluated(capsys, str(result.folder))
    assert (found["clients"], found["metrics"]) == (None, {})
    assert "it has no checkpoint with the models of its clients" in found["clients_left_out"]
    assert not (result.folder / "checkpoints").exists()


def test_a_part_of_the_clients_can_be_evaluated(plain: Result, capsys: pytest.CaptureFixture[str]) -> None:
    everyone = {row["client"]: row for row in evaluated(capsys, str(plain.folder))["clients"]["rows"]}
    some = evaluated(capsys, str(plain.folder), "--clients", "3")["clients"]["rows"]
    assert len(some) == len({row["client"] for row in some}) == 3
    assert all(row == everyone[row["client"]] for row in some)


# ---- eval: other data ----


def test_data_that_moved_are_still_the_runs_own(
    folder_run: Result, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here = evaluated(capsys, str(folder_run.folder))
    shutil.copytree(pictures, tmp_path / "elsewhere")
    there = evaluated(capsys, str(folder_run.folder), "--data.root", str(tmp_path / "elsewhere"))
    assert here["data"]["of_the_run"]
    assert there["data"].pop("root") != here["data"].pop("root")
    assert there == here
    assert here["metrics"]["accuracy"] == pytest.approx(folder_run.history[-1]["eval/accuracy"], abs=1e-6)
    accuracy = folder_run.history[-1]["clients/accuracy_mean"]
    assert here["clients"]["accuracy"]["mean"] == pytest.approx(accuracy, abs=1e-6)
    # One image brighter: the same labels, and still other data.
    file = tmp_path / "elsewhere" / "train" / "dog" / "0.png"
    Image.fromarray(np.full((9, 9, 3), 255, dtype=np.uint8)).save(file)
    other = evaluated(capsys, str(folder_run.folder), "--data.root", str(tmp_path / "elsewhere"))
    assert (other["data"]["of_the_run"], other["clients"]) == (False, None)
    assert other["metrics"] == here["metrics"], "the test set, which is the same"


def digit_folders(root: Path, digits: list[int]) -> list[tuple[Path, int]]:
    """Write the first ten test images of some digits, in colour, as root/DIGIT/N.png; return them."""
    _, test = load(load_config("digits").data)
    assert test.pixels is not None
    files = []
    for digit in digits:
        (root / str(digit)).mkdir(parents=True)
        for number in np.flatnonzero(test.labels == digit)[:10].tolist():
            grey = test.pixels[number, 0].numpy()
            colour = np.stack([grey, np.minimum(grey + 9, 255), grey // 2], axis=-1).astype(np.uint8)
            files.append((root / str(digit) / f"{number}.png", digit))
            Image.fromarray(colour).save(files[-1][0])
    return files


def test_other_data_of_some_of_the_classes_are_matched_by_name(
    plain: Result, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = digit_folders(tmp_path / "my digits", [7, 3, 9])
    flags = ["--data.dataset", "image_folder", "--data.root", str(tmp_path / "my digits")]
    found = evaluated(capsys, str(plain.folder), *flags)
    call("eval", str(plain.folder), *flags)
    printed = " ".join(capsys.readouterr().out.split())
    assert "has no images of these classes: 0, 1, 2, 4, 5, 6, 8" in printed
    assert "30 examples, other data than the run's test data" in printed
    module, confusion = lenet(plain), np.zeros((10, 10), dtype=int)
    for file, label in files:
        with Image.open(file) as picture, torch.no_grad():
            grey = torch.from_numpy(np.array(picture.convert("L")))[None]
            confusion[label, int(module(normalised(grey, plain)).argmax())] += 1
    assert found["confusion"] == confusion.tolist()
    assert found["metrics"]["accuracy"] == pytest.approx(confusion.trace() / 30)
    assert (found["data"]["examples"], found["clients"]) == (30, None), "all images, not a fifth of them"
    assert [name for name, recall in found["recall"].items() if recall is not None] == ["3", "7", "9"]
    for part in ("train", "val"):
        digit_folders(tmp_path / "parts" / part, [5, 7, 3])
    flags[-1] = str(tmp_path / "parts")
    assert evaluated(capsys, str(plain.folder), *flags)["data"]["examples"] == 30, "those in val/"


def test_data_of_other_classes_or_with_a_broken_image_are_refused(
    plain: Result, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    digit_folders(tmp_path / "digits", [1])
    flags = ["--data.dataset", "image_folder", "--data.root", str(tmp_path / "digits")]
    (tmp_path / "digits" / "1" / "x y.jpg").write_bytes(b"nothing")
    line = error(capsys, "eval", str(plain.folder), *flags)
    assert "x y.jpg cannot be read as an image" in line
    (tmp_path / "digits" / "1").rename(tmp_path / "digits" / "one")
    line = error(capsys, "eval", str(plain.folder), *flags)
    assert "class 'one' is not one of the model's (0, 1, 2," in line


def test_data_that_changed_in_place_are_noticed(
    runs: Path, folder_run: Result, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(folder_run.folder, tmp_path / "run")
    shutil.copytree(pictures, tmp_path / "images")
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    config["data"]["root"] = str(tmp_path / "images")
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(config))
    assert evaluated(capsys, str(tmp_path / "run"))["data"]["of_the_run"]
    Image.fromarray(np.full((9, 9, 3), 255, dtype=np.uint8)).save(tmp_path / "images/train/dog/0.png")
    capsys.readouterr()
    call("eval", str(tmp_path / "run"))
    printed = " ".join(capsys.readouterr().out.split())
    assert "the training images are not those of the run any more" in printed
    assert "with the global model" not in printed


# ---- predict ----


def save_as_files(folder: Path, pixels: Tensor) -> dict[str, Tensor]:
    """Write images of 8 x 8 in the forms that files have; return the grey pixels that each stands for."""
    (folder / "in here" / ".hidden").mkdir(parents=True)
    grey = [Image.fromarray(image[0].numpy()) for image in pixels]
    grey[0].save(folder / "a 10.png")
    grey[1].convert("RGB").save(folder / "a 9.png")
    colours = Image.merge("RGB", (grey[2], grey[3], grey[4]))
    colours.save(folder / "in here" / "colour.bmp")
    clear = grey[5].convert("RGBA")
    clear.putalpha(grey[6])
    clear.save(folder / "in here" / "clear.png")
    deep = Image.fromarray(np.array(grey[7]).astype(np.uint16) * 257)
    deep.save(folder / "in here" / "deep.png")
    grey[8].save(folder / "in here" / ".hidden" / "no.png")
    (folder / "notes.txt").write_text("no image")
    black = Image.new("RGBA", (8, 8), "black")
    black.alpha_composite(clear)
    shown = {
        "a 9.png": grey[1],
        "a 10.png": grey[0],
        "in here/clear.png": black.convert("RGB").convert("L"),
        "in here/colour.bmp": colours.convert("L"),
        "in here/deep.png": grey[7],
    }
    return {name: torch.from_numpy(np.array(image))[None] for name, image in shown.items()}


@pytest.fixture
def test_pixels() -> Tensor:
    _, test = load(load_config("digits").data)
    assert test.pixels is not None
    return test.pixels


def test_predict_finds_the_images_below_a_folder_and_what_a_loop_over_them_finds(
    plain: Result, test_pixels: Tensor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = save_as_files(tmp_path / "my photos", test_pixels)
    capsys.readouterr()
    call("predict", str(plain.folder), "my photos", "--top", "2", "--json", "-")
    found = json.loads(capsys.readouterr().out)["predictions"]
    assert [one["image"] for one in found] == [f"my photos/{name}" for name in expected]
    module = lenet(plain)
    for one, pixels in zip(found, expected.values(), strict=True):
        with torch.no_grad():
            probabilities = module(normalised(pixels, plain))[0].softmax(0)
        best = probabilities.argsort(descending=True)[:2].tolist()
        assert [guess["class"] for guess in one["classes"]] == list(map(str, best))
        numbers = [guess["probability"] for guess in one["classes"]]
        assert numbers == pytest.approx(probabilities[best].tolist(), abs=1e-5)
    call("predict", str(plain.folder), "--top", "1", "my photos")
    table = capsys.readouterr().out.splitlines()
    for one, line in zip(found, table[2:], strict=True):
        guess = one["classes"][0]
        assert line.split()[-3:] == [guess["class"], f"{100 * guess['probability']:.1f}", "%"]


def test_larger_images_are_resized_to_their_shorter_side_and_cropped(
    folder_run: Result, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Black at the sides, which the crop takes away: a wide bright picture is a bright one."""
    values = np.zeros((40, 120, 3), dtype=np.uint8)
    values[:, 40:80] = 190
    Image.fromarray(values).save(tmp_path / "wide.jpg", quality=100)
    Image.fromarray(np.full((8, 8, 3), 190, dtype=np.uint8)).save(tmp_path / "square.png")
    capsys.readouterr()
    call("predict", str(folder_run.folder), "wide.jpg", "square.png", "--json", "-")
    wide, square = json.loads(capsys.readouterr().out)["predictions"]
    assert wide["classes"][0]["class"] == square["classes"][0]["class"]
    numbers = [[guess["probability"] for guess in one["classes"]] for one in (wide, square)]
    assert numbers[0] == pytest.approx(numbers[1], abs=0.02)
    assert {guess["class"] for guess in wide["classes"]} == {"black cat", "dog"}


def test_a_broken_image_is_named_and_the_rest_is_predicted(
    plain: Result, test_pixels: Tensor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_as_files(tmp_path / "photos", test_pixels)
    intact = (tmp_path / "photos" / "a 9.png").read_bytes()
    (tmp_path / "photos" / "half.png").write_bytes(intact[: len(intact) // 2])
    (tmp_path / "photos" / "empty.jpg").touch()
    capsys.readouterr()
    call("predict", str(plain.folder), "photos")
    lines = capsys.readouterr().out.splitlines()
    warnings = [line for line in lines if line.startswith("warning: ")]
    assert [line.split()[1] for line in warnings] == ["photos/empty.jpg", "photos/half.png"]
    assert len([line for line in lines if "photos/" in line and not line.startswith("warning")]) == 5
    call("predict", str(plain.folder), "photos", "--json", "-")
    printed = capsys.readouterr()
    assert len(json.loads(printed.out)["predictions"]) == 5
    assert "warning: photos/half.png cannot be read" in printed.err
    call("predict", str(plain.folder), "photos/half.png", code=2)
    assert capsys.readouterr().err.startswith("error: no image could be read")


def test_the_contact_sheet_shows_pictures_and_probabilities(
    plain: Result, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shades = {"1.png": 40, "2.png": 120, "3.png": 250}
    for name, shade in shades.items():
        Image.new("L", (300, 150), shade).save(tmp_path / name)
    capsys.readouterr()
    call("predict", str(plain.folder), *shades, "--save", "sheets/all.png", "--json", "found.json")
    assert capsys.readouterr().out.splitlines()[-1] == "sheets/all.png"
    with Image.open("sheets/all.png") as opened:
        sheet = np.array(opened.convert("RGB"))
    bars = []
    found = json.loads(Path("found.json").read_text())["predictions"]
    for number, (shade, one) in enumerate(zip(shades.values(), found, strict=True)):
        left = MARGIN + number * (TILE + MARGIN)
        column = sheet[:, left + TILE // 2]
        picture = np.flatnonzero((column == shade).all(1))
        assert TILE // 2 <= len(picture) <= TILE // 2 + 60, "a picture twice as wide as it is high"
        probability = one["classes"][0]["probability"]
        colour = SURE if probability >= 0.5 else UNSURE
        wanted = [int(colour[place : place + 2], 16) for place in (1, 3, 5)]
        tile = (sheet[picture[0] :, left - 1 : left + TILE + 1] == wanted).all(2)
        bars.append((tile.sum(1).max() / (TILE + 1), probability))
    for length, probability in bars:
        assert length == pytest.approx(probability, abs=0.01)


@pytest.mark.parametrize(
    ("images", "columns", "rows"), [(1, 1, 1), (2, 2, 1), (5, 3, 2), (20, 6, 4), (40, 8, 5)]
)
def test_a_contact_sheet_is_about_as_wide_as_it_is_high(images: int, columns: int, rows: int) -> None:
    prediction = Prediction(
        Path("a name that is much too long for a line of a contact sheet.png"), ("x",), (0.5,)
    )
    width, height = contact_sheet("", [(prediction, Image.new("RGB", (TILE, TILE)))] * images).size
    assert width == MARGIN + columns * (TILE + MARGIN)
    assert (height - MARGIN - 2 * LINE) / rows == TILE + 3 * LINE + MARGIN


# ---- card ----


def table_of(text: str, title: str) -> dict[str, str]:
    """Return the two columns of the first table after a title."""
    lines = text.split(title, 1)[1].splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("|"))
    cells = []
    for line in lines[first:]:
        if not line.startswith("|"):
            break
        cells.append([cell.strip().replace("\\|", "|") for cell in line.strip("|").split(" | ")])
    return {row[0]: row[1] for row in cells[2:]}


def test_the_card_has_the_numbers_of_the_run(
    folder_run: Result, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call("card", str(folder_run.folder), "--output", "cards/README.md")
    text = Path("cards/README.md").read_text()
    row = folder_run.history[-1]
    _, matter, body = text.split("---\n", 2)
    front = yaml.safe_load(matter)
    assert front["pipeline_tag"] == "image-classification"
    assert {"federated-learning", "FedAvg"} <= set(front["tags"])
    (metric,) = front["model-index"][0]["results"][0]["metrics"]
    assert metric == {"type": "accuracy", "value": row["eval/accuracy"]}
    assert table_of(body, "## Model")["images"] == "3 × 8 × 8 (RGB)"
    data = table_of(body, "## Data")
    assert (data["dataset"], data["clients"], data["held out per client"]) == ("`image_folder`", "4", "30 %")
    assert (data["training examples"], data["test examples"]) == ("48", "16")
    assert str(pictures) not in body.split("## Origin")[0]
    training = table_of(body, "## Training")
    assert training["rounds"] == "2"
    assert "momentum=" in training["algorithm"]
    up = sum(one["bytes/up"] for one in folder_run.history)
    assert training["bytes"].startswith(f"{up:,} sent by clients")
    results = table_of(body, "## Results")
    assert results["accuracy"] == f"{100 * row['eval/accuracy']:.2f} %"
    assert results["test loss"] == f"{row['eval/loss']:.4f}"
    names = [f"clients/accuracy_{name}" for name in ("mean", "worst10", "best10", "std")]
    assert "| " + " | ".join(f"{100 * row[name]:.2f} %" for name in names) + " |" in body
    lines = [json.loads(line) for line in (folder_run.folder / "clients.jsonl").read_text().splitlines()]
    evaluated_clients = len([line for line in lines if line["round"] == 2])
    assert f"On data that each of {evaluated_clients} clients held out, accuracy over clients:" in body
    recall = table_of(body, "Recall per class")
    assert list(recall.values()) == [f"{100 * value:.2f} %" for value in row["eval/recall"]]
    assert list(recall) == ["black cat", "dog"]
    worst = min(zip(row["eval/recall"], recall, strict=True))
    assert f"The class with the lowest recall is {worst[1]}: {100 * worst[0]:.2f} %." in body
    origin = table_of(body, "## Origin")
    session = json.loads((folder_run.folder / "run.json").read_text())["sessions"][0]
    assert origin["command"].strip("`") == session["command"]
    assert origin["trained"] == f"{session['started']} to {session['ended']}"
    assert session["torch"] in origin["versions"]


def test_the_program_on_the_card_runs(
    plain: Result, test_pixels: Tensor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call("card", str(plain.folder))
    text = capsys.readouterr().out
    program = text.split("```python\n")[1].split("```")[0]
    Image.fromarray(test_pixels[3, 0].numpy()).save(tmp_path / "image.png")
    (tmp_path / "program.py").write_text(program)
    runpy.run_path("program.py", run_name="__main__")
    with torch.no_grad():
        expected = int(lenet(plain)(normalised(test_pixels[3], plain)).argmax())
    assert capsys.readouterr().out == f"{expected}\n"


def test_the_card_claims_nothing_that_the_run_did_not_record(plain: Result, tmp_path: Path) -> None:
    """As a run of before, which has fewer files."""
    for name in ("config.yaml", "history.jsonl", "model.safetensors"):
        shutil.copy(plain.folder / name, tmp_path)
    call("card", str(tmp_path), "--output", "card.md")
    text = Path("card.md").read_text()
    for word in ("command", "git commit", "test examples", "held out", "malicious", "best model"):
        assert word not in text
    assert "The run recorded no metrics per client" in text
    assert table_of(text, "## Results")["accuracy"] == f"{100 * plain.history[-1]['eval/accuracy']:.2f} %"


def test_the_card_names_attacks_own_layers_and_the_best_round(runs: Path, plain: Result) -> None:
    flags = ["--algorithm", "FedPer", "--attacks", "SignFlip", "--attacks.fraction", "0.2"]
    result = train(runs, "attacked", flags)
    call("card", str(result.folder), "--output", "card.md")
    text = Path("card.md").read_text()
    assert "20 % of the clients were malicious (SignFlip)." in text
    assert "With algorithm=FedPer there is no global model: each client has its own." in text

    call("card", str(plain.folder), "--best", "--output", "best.md")
    best = max(plain.history, key=lambda row: (row["eval/accuracy"], -row["round"]))
    assert f"the best model by eval/accuracy, of round {best['round']}" in Path("best.md").read_text()
    assert "best=True" in Path("best.md").read_text()


def test_the_card_quotes_the_last_warnings(plain: Result, tmp_path: Path) -> None:
    shutil.copytree(plain.folder, tmp_path / "run")
    lines = [f"2026-01-02 03:04:05 WARNING number <{number}> of *many*" for number in range(7)]
    (tmp_path / "run" / "run.log").write_text("\n".join(["2026-01-02 03:04:05 INFO no warning", *lines, ""]))
    call("card", "run", "--output", "card.md")
    quoted = [line for line in Path("card.md").read_text().splitlines() if "Logged in training" in line]
    assert quoted == [f"- Logged in training: number \\<{n}\\> of \\*many\\*" for n in range(2, 7)]


# ---- errors ----


@pytest.mark.parametrize("command", ["eval", "predict", "export", "card"])
def test_a_run_that_is_not_finished_or_no_run_is_refused_in_one_line(
    command: str, plain: Result, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = {"predict": ["."], "export": ["--format", "pt2"]}.get(command, [])
    assert "nowhere has no model.safetensors; give the directory" in error(capsys, command, "nowhere", *more)
    assert "give the directory of a finished run" in error(capsys, command)
    shutil.copytree(plain.folder, tmp_path / "run")
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    (tmp_path / "run" / "run.json").write_text(json.dumps({**record, "state": "stopped"}))
    (tmp_path / "run" / "model.safetensors").rename(tmp_path / "aside")
    if more == ["."]:
        Image.new("L", (8, 8)).save(tmp_path / "image.png")
    line = error(capsys, command, "run", *more)
    assert (
        "the run is stopped; finish it with `fedddp run run/config.yaml --output . --name run --resume auto`"
        in line
    )
    (tmp_path / "run" / "model.safetensors").write_bytes((tmp_path / "aside").read_bytes()[:-9])
    assert "model.safetensors is corrupt or cannot be read" in error(capsys, command, "run", *more)


def test_the_command_that_finishes_a_run_does(plain: Result, tmp_path: Path) -> None:
    """It is what the error of a run that is not finished names."""
    shutil.copytree(plain.folder, tmp_path / "run")
    (tmp_path / "run" / "model.safetensors").unlink()
    call("run", "run/config.yaml", "--output", ".", "--name", "run", "--resume", "auto")
    first, second = (load_file(folder / "model.safetensors") for folder in (plain.folder, tmp_path / "run"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_options_that_cannot_be_are_refused(plain: Result, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(plain.folder)
    Image.new("L", (8, 8)).save("image.png")
    Image.new("RGBA", (8, 8)).save("clear.png")
    for words, part in (
        (["eval", run, "--rounds", "3"], "--rounds cannot be changed"),
        (["eval", run, "--data.roots", "3"], "unknown key 'data.roots'"),
        (["eval", "--data.root", "data", run], "give the run first"),
        (["eval", run, "--clients", "-1"], "--clients must be >= 0"),
        (["eval", run, "--device", "tpu"], "--device must be cpu, cuda or cuda:N, got 'tpu'"),
        (["eval", run, "--json", "/proc/no/file"], "cannot write /proc/no/file"),
        (["predict", run], "give image files"),
        (["predict", run, "no.png"], "no.png does not exist"),
        (["predict", run, "image.png", "--top", "0"], "--top must be >= 1"),
        (["predict", run, "image.png", "--save", "sheet.txt"], ".txt is no format of pictures"),
        (["predict", run, "image.png", "--save", "/proc/no/sheet.png"], "cannot write /proc/no/sheet.png"),
        (["predict", run, "image.png", "--flag", "1"], "unexpected argument '--flag'"),
        (["export", run], "give --format pt2, onnx or safetensors"),
        (["export", run, "--format", "tflite"], "invalid choice: 'tflite'"),
        (["export", run, "--output", "model.bin"], "format must be one of pt2, onnx, safetensors"),
        (["export", run, "--output", "/proc/no/model.safetensors"], "cannot write /proc/no/"),
        (["card", run, "--output", "/proc/no/card.md"], "cannot write /proc/no/card.md"),
    ):
        assert part in error(capsys, *words), words
    Path("empty").mkdir()
    assert "empty has no images" in error(capsys, "predict", run, "empty")


def test_a_run_of_ones_own_module_and_data_names_what_it_needs(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from torch.utils.data import TensorDataset

    images, labels = torch.rand(40, 1, 8, 8), torch.arange(40) % 10
    data = TensorDataset(images, labels)
    config = load_config(None, [*FEW, "--output", str(runs), "--name", "own"])
    result = Federation(config, module=Normed(), train=data, test=data, tracking=QUIET).run()
    line = error(capsys, "eval", str(result.folder))
    assert f"{__name__}.Normed" in line
    assert f"(on the command line: --module {__name__}.Normed)" in line
    own = ["--module", f"{__name__}.Normed"]
    assert "name the data with --data.dataset" in error(capsys, "eval", str(result.folder), *own)
    assert "cannot import 'no.Net'" in error(capsys, "eval", str(result.folder), "--module", "no.Net")
    found = evaluated(capsys, str(result.folder), *own, "--data.dataset", "digits")
    assert not found["data"]["of_the_run"]
    assert sum(map(sum, found["confusion"])) == found["data"]["examples"]
    call("card", str(result.folder), "--output", "card.md")
    assert f'module="{__name__}.Normed"' in Path("card.md").read_text()


def test_a_run_whose_model_moved_is_evaluated_with_its_new_path(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = train(runs, "moved", ["--model.name", f"{__name__}.Normed"])
    recorded = evaluated(capsys, str(result.folder))["metrics"]
    file = result.folder / "config.yaml"
    file.write_text(file.read_text().replace(f"{__name__}.Normed", "a_lab_that_moved.Normed"))
    line = error(capsys, "eval", str(result.folder))
    assert "cannot import 'a_lab_that_moved.Normed'" in line
    assert "start in the folder of that module, or pass another path of it as module=" in line
    assert evaluated(capsys, str(result.folder), "--module", f"{__name__}.Normed")["metrics"] == recorded


@pytest.mark.parametrize("command", ["eval", "predict", "export", "card"])
def test_help_shows_the_options(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    call(command, "--help")
    assert capsys.readouterr().out.startswith(f"usage: fedddp {command} RUN")
