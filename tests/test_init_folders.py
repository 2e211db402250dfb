"""`fedddp init` for pairs of images and masks, and for folders of centres."""

from __future__ import annotations

import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedddp import Config, load_config, partitions
from fedddp.cli import main
from fedddp.storage.history import read_rows
from fedddp.tasks import Classification, Segmentation

TRIAL = "--tracking.trackers [] --quiet --rounds 1 --local.epochs 1"


def typed(command: str, capsys: pytest.CaptureFixture[str]) -> tuple[object, list[str]]:
    """Return the exit code and the printed lines of `fedddp COMMAND`."""
    with pytest.raises(SystemExit) as stop:
        main(shlex.split(command))
    printed = capsys.readouterr()
    return stop.value.code, (printed.err if stop.value.code else printed.out).splitlines()


def pairs(folder: Path, count: int, side: int = 16) -> None:
    """Write images whose right half is bright and of class 1."""
    rng = np.random.default_rng(count)
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    for number in range(count):
        mask = np.zeros((side, side), np.uint8)
        mask[:, side // 2 :] = 1
        pixels = 100 * mask + rng.integers(0, 100, mask.shape, np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{number}.png")
        Image.fromarray(mask).save(folder / "masks" / f"{number}.png")


def photos(folder: Path, count: int) -> None:
    """Write grey images of two classes."""
    for name, grey in (("dark", 30), ("light", 220)):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            Image.new("L", (8, 8), grey + number).save(folder / name / f"{number}.png")


def written(folder: str, capsys: pytest.CaptureFixture[str]) -> tuple[Config, str]:
    """Return the configuration that `init` writes, and all that it prints."""
    code, lines = typed(f"init {folder}", capsys)
    assert code == 0, lines
    text = Path(f"{folder}.yaml").read_text()
    assert max(map(len, text.splitlines())) <= 110
    assert {line.index(" # ") for line in text.splitlines()[1:] if " # " in line} == {27}
    return load_config(f"{folder}.yaml"), "\n".join(" ".join(line.split()) for line in lines)


def test_pairs_of_images_and_masks_are_segmented(capsys: pytest.CaptureFixture[str]) -> None:
    pairs(Path("cells"), 20)
    config, printed = written("cells", capsys)
    assert (config.data.dataset, config.data.root, config.data.image_size) == ("mask_folder", "cells", 16)
    assert (config.model.name, config.task) == ("unet", Segmentation())
    assert (config.data.clients, config.data.partition) == (2, partitions.Dirichlet(alpha=1.0))
    assert (config.checkpoint.best, config.local.batch_size) == ("eval/iou", 8)
    assert "images 20, of which 20% to test" in printed
    assert "masks one for each image" in printed
    assert typed(f"run cells.yaml {TRIAL}", capsys) == (0, ["run directory: runs/cells"])
    assert "eval/iou" in read_rows(Path("runs/cells/history.jsonl"))[-1]


@pytest.mark.parametrize("split", [True, False], ids=["split", "by a fraction"])
def test_centres_with_masks_are_the_clients(split: bool, capsys: pytest.CaptureFixture[str]) -> None:
    for centre, count in (("north", 5), ("south", 10), ("east", 6)):
        for part in ("train", "val") if split else ("",):
            pairs(Path("sites") / centre / part, count)
    config, printed = written("sites", capsys)
    assert isinstance(config.data.partition, partitions.Natural)
    assert (config.data.clients, config.cohort.size, config.evaluation.clients) == (3, 3, 3)
    assert (config.data.dataset, config.data.holdout, config.rounds) == ("mask_folder", 0.0, 40)
    assert "centres 3: east, north, south" in printed
    assert f"21{' to train, 21 to test' if split else ', of which 20% to test'}" in printed
    assert typed(f"run sites.yaml {TRIAL}", capsys) == (0, ["run directory: runs/sites"])
    rows = read_rows(Path("runs/sites/clients.jsonl"))
    assert [row["name"] for row in rows] == ["east", "north", "south"]
    tested = {"east": 6, "north": 5, "south": 10} if split else {"east": 1, "north": 1, "south": 2}
    assert all(abs(row["examples"] - tested[row["name"]]) <= (0 if split else 1) for row in rows)


def test_centres_with_class_folders_are_the_clients(capsys: pytest.CaptureFixture[str]) -> None:
    for centre in ("a", "b"):
        photos(Path("centres") / centre, 10)
    config, printed = written("centres", capsys)
    assert isinstance(config.data.partition, partitions.Natural)
    assert (config.data.dataset, config.data.clients, config.evaluation.clients) == ("image_folder", 2, 2)
    assert (config.task, config.checkpoint.best) == (Classification(), "clients/accuracy_mean")
    assert "clients the centres, 2, with about 16 images each" in printed
    assert typed(f"run centres.yaml {TRIAL}", capsys) == (0, ["run directory: runs/centres"])
    assert [row["name"] for row in read_rows(Path("runs/centres/clients.jsonl"))] == ["a", "b"]


def test_the_number_of_centres_is_not_to_be_chosen(capsys: pytest.CaptureFixture[str]) -> None:
    for centre in ("a", "b"):
        photos(Path("centres") / centre, 2)
    code, (line,) = typed("init centres --clients 5", capsys)
    assert (code, line) == (
        2,
        "error: --clients: the 2 centres of centres are the clients; leave it out",
    )


def test_an_image_with_no_mask_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    pairs(Path("cells"), 2)
    Path("cells/masks/1.png").unlink()
    code, (line,) = typed("init cells", capsys)
    assert code == 2
    assert line.startswith("error: cells/images/1.png has no mask in cells/masks")
    assert not Path("cells.yaml").exists()


def test_the_help_names_the_layouts(capsys: pytest.CaptureFixture[str]) -> None:
    code, lines = typed("init --help", capsys)
    assert code == 0
    assert "images/ and masks/ with pairs of one name" in " ".join(" ".join(lines).split())
