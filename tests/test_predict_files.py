"""Prediction from files equals that from the dataset; other data are read as their settings have it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from test_predict_tasks import Channels, Found
from torch import Tensor, nn

from fedddp.data.datasets import DataConfig, load
from fedddp.data.loader import ClientLoader
from fedddp.data.resizing import RESIZE, Placement, Way
from fedddp.inference import TrainedModel
from fedddp.inference.drawn import NOT_SEEN, find_boxes, find_masks
from fedddp.inference.metrics import evaluate_run
from fedddp.inference.other_data import other_data
from fedddp.inference.pictures import find_images, predict_files
from fedddp.section import ConfigError
from fedddp.tasks import Classification, MultiLabel, Segmentation, Task

SIDE = 8
Kind = tuple[str, Callable[[Path, np.ndarray[Any, Any]], None], int, list[float] | None]


def _picture(path: Path, values: np.ndarray[Any, Any]) -> None:
    Image.fromarray((values >> 4).astype(np.uint8)).save(path)


def _deep(path: Path, values: np.ndarray[Any, Any]) -> None:
    Image.fromarray(values[..., 0]).save(path)


def _bands(path: Path, values: np.ndarray[Any, Any]) -> None:
    tifffile.imwrite(path, np.moveaxis(values, -1, 0), photometric="minisblack", planarconfig="separate")


KINDS: list[Kind] = [  # ending, what writes 12-bit values (h, w, bands), bands, value range
    (".png", _picture, 3, None),
    (".png", _deep, 1, [0, 4095]),
    (".npy", np.save, 2, [100, 3000]),
    (".tif", _bands, 5, [0, 4095]),
]


def write(root: Path, kind: Kind, sizes: list[tuple[int, int]]) -> None:
    """Write a folder of images with masks."""
    rng = np.random.default_rng(2)
    for part in ("train", "val"):
        for folder in ("images", "masks"):
            (root / part / folder).mkdir(parents=True)
        for number, size in enumerate(sizes):
            kind[1](
                root / part / "images" / f"{number}{kind[0]}",
                rng.integers(0, 4096, (*size, kind[2])).astype(np.uint16),
            )
            values = rng.integers(0, 3, size).astype(np.uint8)
            Image.fromarray(values).save(root / part / "masks" / f"{number}.png")
    (root / "classes.txt").write_text("a\nb\nc\n")


class Pixelwise(nn.Module):
    """Gives logits of three classes from the bands of each pixel."""

    def __init__(self, bands: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-2, 2, 3 * bands).reshape(3, bands).sin())

    def forward(self, images: Tensor) -> Tensor:
        return torch.einsum("kc,nchw->nkhw", self.weight, images)


@pytest.mark.parametrize("how", ["crop", "pad", "stretch"])
@pytest.mark.parametrize("kind", KINDS, ids=["8 bits", "16 bits", "npy", "five bands"])
def test_predictions_of_files_are_those_of_the_dataset(kind: Kind, how: Way, tmp_path: Path) -> None:
    sizes = [(12, 20), (20, 13), (8, 8)]
    write(tmp_path, kind, sizes)
    data = DataConfig(
        dataset="mask_folder", root=str(tmp_path), image_size=SIDE, value_range=kind[3], resize=how
    )
    images, _ = load(data, "mask")
    (batch,) = ClientLoader(images, data, torch.device("cpu"), seed=0).batches(np.arange(3), 3)
    limits = None if kind[3] is None else (kind[3][0], kind[3][1])
    bands = images.shape[0]
    made = TrainedModel(
        *(Pixelwise(bands), ("a", "b", "c"), images.shape, images.mean, images.std, Segmentation(), {}),
        *(limits, how),
    )
    files = find_images([str(tmp_path / "train" / "images")])
    assert [file.name for file in files] == [f"{number}{kind[0]}" for number in range(3)]
    assert torch.equal(made.preprocess(files), batch.images)
    expected = made.module(batch.images).argmax(1).to(torch.uint8)
    assert torch.equal(made.predict(files), expected)
    found = list(find_masks(made, files))
    for one, size, classes in zip(found, sizes, expected, strict=True):
        assert one.picture.size == size[::-1]
        place = Placement.of(size, (SIDE, SIDE), how)
        assert np.array_equal(one.mask, place.mask(classes).numpy())
        assert (one.outside > 0) == (how == "crop" and size != (8, 8))
        assert sum(one.shares.probabilities) == pytest.approx(1)
        assert (NOT_SEEN in one.shares.classes) == (one.outside > 0)


def test_classes_of_arrays_are_predicted_and_shown(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.full((5, 9, 12), 0.5))
    (tmp_path / "b.npy").write_text("no array")
    made = TrainedModel(
        *(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), tuple("abcde"), (5, SIDE, SIDE)),
        *((0.0,) * 5, (1.0,) * 5, Classification()),
    )
    ((found, picture),) = predict_files(made, find_images([str(tmp_path)]), 2)
    assert found.file.name == "a.npy"
    assert found.probabilities == pytest.approx((0.2, 0.2))
    assert picture.mode == "RGB"


def test_what_a_model_does_not_see_is_hatched(tmp_path: Path) -> None:
    """200 x 100 pixels become 100 x 50, of which columns 25 to 75 are seen: 50 to 150 of the file."""
    Image.fromarray(np.full((100, 200, 3), 250, np.uint8)).save(tmp_path / "a.png")
    for how in ("crop", "pad", "stretch"):
        base = (("red", "green", "blue"), (3, 50, 50), (0.0,) * 3, (1.0,) * 3)
        tasks: tuple[Task, ...] = (Found(), Segmentation())
        boxes, masks = (TrainedModel(Channels(), *base, task, {}, None, how) for task in tasks)
        (one,) = find_boxes(boxes, [tmp_path / "a.png"], 0.5)
        (other,) = find_masks(masks, [tmp_path / "a.png"])
        corners = {"crop": [50, 0, 70, 40], "pad": [0, 0, 40, 32], "stretch": [0, 0, 40, 40]}
        assert one.found.boxes.tolist() == [corners[how]], "of 0, 0, 10, 20"
        assert one.cut == (how == "crop")
        assert one.seen == ((50, 0, 150, 100) if how == "crop" else (0, 0, 200, 100))
        for picture, factor in ((one.picture, 2), (other.picture, 1)):
            grey = (np.asarray(picture) == 128).all(2)
            columns = np.flatnonzero(grey.any(0)) / factor
            assert len(columns) == (100 if how == "crop" else 0) * factor
            if how == "crop":
                assert set(columns.round(1)) == {
                    *np.arange(0, 50, 1 / factor),
                    *np.arange(150, 200, 1 / factor),
                }
                assert 0.08 < grey.mean() < 0.2, "some of the half that is not seen"


def test_a_box_in_the_margin_of_a_padded_image_is_left_out(tmp_path: Path) -> None:
    """250 x 50 pixels lie in rows 20 to 30 of 50; one of the boxes ends at row 20."""
    Image.new("RGB", (250, 50)).save(tmp_path / "a.png")
    base = (("red", "green", "blue"), (3, 50, 50), (0.0,) * 3, (1.0,) * 3)
    (one,) = find_boxes(TrainedModel(Channels(), *base, Found(), {}, None, "pad"), [tmp_path / "a.png"], 0.1)
    assert one.names == ["red"]
    assert one.found.boxes.tolist() == [[25, 0, 250, 50]]


def test_an_exported_file_and_its_card_state_how_images_are_resized(tmp_path: Path) -> None:
    from safetensors import safe_open

    for how, text in RESIZE.items():
        made = TrainedModel(
            *(Pixelwise(3), ("a", "b", "c"), (3, 8, 8), (0.0,) * 3, (1.0,) * 3, Segmentation(), {}),
            *(None, how),
        )
        made.export(tmp_path / "x.safetensors")
        with safe_open(tmp_path / "x.safetensors", framework="pt") as opened:
            assert json.loads(opened.metadata()["preprocessing"])["resize"] == text


# ---- other data ----


def deep_images(root: Path, layout: str) -> None:
    """Write 12-bit images of 4095, that without `value_range` are nearly black, in some layout."""
    white = np.full((SIDE, 2 * SIDE), 4095, np.uint16)
    if layout == "coco":
        (root / "val").mkdir(parents=True)
        for part in ("train", "val"):
            Image.fromarray(white).save(root / "val" / f"{part}.png")
            outline = [[0, 0, 16, 0, 16, 8, 0, 8]]
            box = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 16, 8], "segmentation": outline}
            (root / f"{part}.json").write_text(
                json.dumps(
                    {
                        "images": [{"id": 1, "file_name": f"val/{part}.png", "height": 8, "width": 16}],
                        "categories": [{"id": 1, "name": "b"}],
                        "annotations": [box],
                    }
                )
            )
        return
    names = ("images", "masks") if layout == "mask_folder" else ("b", "c")
    for part in ("train", "val"):
        for name in names:
            (root / part / name).mkdir(parents=True)
        Image.fromarray(white).save(root / part / names[0] / "1.png")
        if layout == "mask_folder":
            Image.fromarray(np.ones((SIDE, 2 * SIDE), np.uint8)).save(root / part / "masks" / "1.png")
        else:
            np.save(root / part / "c" / "2.npy", white)
    (root / "classes.txt").write_text("background\nb\n")


def own(root: str, train: bool) -> Any:
    """Return 16-bit arrays with labels, a user's own dataset."""
    del root, train
    return [(np.full((SIDE, 2 * SIDE), 4095, np.uint16), [0, 1])] * 2


@pytest.mark.parametrize(
    ("layout", "task"),
    [
        ("coco", Segmentation()),
        ("coco", MultiLabel()),
        ("mask_folder", Segmentation()),
        ("image_folder", Classification()),
        (f"{__name__}.own", MultiLabel()),
    ],
    ids=lambda value: value.rpartition(".")[2] if isinstance(value, str) else type(value).__name__,
)
def test_other_data_are_read_by_their_value_range(layout: str, task: Task, tmp_path: Path) -> None:
    if "." not in layout:
        deep_images(tmp_path, layout)
    classes = {"mask": ("background", "b"), "class": ("b", "c")}.get(task.target, ("b",))
    classes = ("a", "b") if "." in layout else classes
    # The range of the run is another one.
    made = TrainedModel(
        *(nn.Identity(), classes, (3, SIDE, SIDE), (0.0,) * 3, (1.0,) * 3, task, {}),
        *((0.0, 65535.0), "pad"),
    )
    data = DataConfig(dataset=layout, root=str(tmp_path), value_range=[0, 4095])
    images = other_data(made, data)
    assert images.pixels is not None
    pixels = images.pixels[:, :3]
    assert pixels.shape[1:] == (3, SIDE, SIDE)
    assert (pixels[..., 2:6, :] == 255).all(), "white"
    assert not pixels[..., :2, :].any(), "padded, as the model's own images"


def test_an_evaluation_resizes_as_the_model_does(tmp_path: Path) -> None:
    made = TrainedModel(nn.Identity(), ("a",), (3, 8, 8), (0.0,) * 3, (1.0,) * 3, Segmentation())
    with pytest.raises(ConfigError, match="--data.resize: images are resized as those of the model were"):
        evaluate_run(tmp_path, made, ["--data.resize=crop"])
