"""Images of other sizes than the model's: cropped, padded, stretched; their masks, boxes and statistics."""

from __future__ import annotations

import importlib
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fedddp.data.datasets import DataConfig, from_dataset, load
from fedddp.data.loader import ClientLoader
from fedddp.data.resizing import Placement, Resizing, Way, cropping, not_padding
from fedddp.data.targets import Boxes, Target
from fedddp.tasks import Segmentation

v2: Any = importlib.import_module("torchvision.transforms.v2.functional")
tv_tensors: Any = importlib.import_module("torchvision.tv_tensors")

SIDE = 24
SIZES = [(40, 60), (61, 33), (24, 24), (7, 90), (25, 24), (12, 12)]
WAYS: tuple[Way, ...] = ("crop", "pad", "stretch")


def by_torchvision(planes: Any, how: Way) -> Any:
    """Return an image, a mask or boxes as torchvision's own transforms put them together."""
    height, width = planes.shape[-2:] if not hasattr(planes, "canvas_size") else planes.canvas_size
    if how == "stretch":
        return v2.resize(planes, [SIDE, SIDE])
    if how == "crop":
        return v2.center_crop(v2.resize(planes, [SIDE]), [SIDE, SIDE])
    scaled = v2.resize(planes, None, max_size=SIDE)
    high, wide = scaled.shape[-2:] if not hasattr(scaled, "canvas_size") else scaled.canvas_size
    assert max(high, wide) == SIDE
    assert (high < wide) == (height < width)
    top, left = (SIDE - high) // 2, (SIDE - wide) // 2
    return v2.pad(scaled, [left, top, SIDE - wide - left, SIDE - high - top], fill=0)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("how", WAYS)
def test_images_and_boxes_are_resized_as_by_torchvision(size: tuple[int, int], how: Way) -> None:
    rng = np.random.default_rng(5)
    image = torch.from_numpy(rng.integers(0, 256, (3, *size)).astype(np.uint8))
    found = Resizing(SIDE, how).image(image)
    assert torch.equal(found, by_torchvision(image, how))
    assert found.shape == (3, SIDE, SIDE)
    low, high = np.sort(rng.random((2, 30, 2)), axis=0)
    corners = torch.from_numpy(np.concatenate([low, high], 1)).float() * torch.tensor([*size[::-1]] * 2)
    expected = by_torchvision(tv_tensors.BoundingBoxes(corners, format="XYXY", canvas_size=size), how)
    expected = expected.as_subclass(Tensor)
    kept = (expected[:, 2:] - expected[:, :2] >= 1).all(1) | (size == (SIDE, SIDE))
    boxes, labels = Resizing(SIDE, how).boxes(Boxes.join([(corners, torch.arange(30))]), size).of(0)
    assert labels.tolist() == torch.arange(30)[kept].tolist()
    torch.testing.assert_close(boxes, expected[kept], atol=1e-4, rtol=0)


@pytest.mark.parametrize("how", WAYS)
def test_a_mask_lies_on_its_image_and_its_margins_do_not_count(how: Way) -> None:
    image = torch.zeros(1, 40, 80, dtype=torch.uint8)
    image[:, 8:28, 32:60] = 255
    seen = Resizing(20, how).image(image)
    mask = Resizing(20, how).mask((image > 0).to(torch.uint8) * 7)
    margins = torch.zeros(1, 20, 20, dtype=torch.bool)
    if how == "pad":
        margins[:, :5] = margins[:, 15:] = True
    assert torch.equal(mask == 255, margins)
    assert torch.equal(mask == 7, seen > 127)
    assert torch.equal(~not_padding(np.array([[40, 80]]), Resizing(20, how)), margins)


def test_nothing_of_a_padded_or_stretched_image_is_lost_on_the_way_back() -> None:
    """80 x 40 pixels become 40 x 20 in rows 10 to 30 of 40, or 40 x 40."""
    mask = (torch.arange(80) // 8 + 10 * (torch.arange(40) // 8)[:, None]).to(torch.uint8)
    for how, region in (("pad", [0, 10, 40, 30]), ("stretch", [0, 0, 40, 40])):
        resizing = Resizing(40, how)  # type: ignore[arg-type]
        place = resizing.placement((40, 80))
        assert torch.equal(place.mask(resizing.mask(mask[None])[0]), mask)
        assert place.boxes(torch.tensor([region]).float()).tolist() == [[0, 0, 80, 40]]
        assert place.region == (0, 0, 80, 40)
        assert place.share_seen == 1
    assert Placement.of((40, 80), (20, 20)).region == (20, 0, 60, 40)


def test_the_line_on_cropping_counts_the_images_and_their_area() -> None:
    sizes = np.array([[8, 8], [8, 16], [10, 40], [30, 30]])  # half, and three quarters
    line = cropping(sizes, Resizing(8, "crop"))
    assert line is not None
    assert line.startswith("2 of 4 images lose on average 62.5 % of their area")
    assert cropping(sizes, Resizing(8, "pad")) is None
    assert cropping(sizes, Resizing(8, "stretch")) is None
    assert cropping(sizes[[0, 3]], Resizing(8, "crop")) is None


class Scans(torch.utils.data.Dataset[tuple[Any, Any]]):
    """A wide image of 100 and a high one of 200, with masks, boxes or a class."""

    classes = ("background", "lesion")

    def __init__(self, target: Target) -> None:
        self.target = target

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        size = ((8, 32), (16, 8))[index]
        image = torch.full((3, *size), 100 * (index + 1), dtype=torch.uint8)
        labels: dict[Target, Any] = {
            "class": index,
            "mask": torch.ones(size, dtype=torch.uint8),
            "boxes": {"boxes": [[0.0, 0, *size[::-1]]], "labels": [1]},
        }
        return image, labels[self.target]


@pytest.mark.parametrize("memory", ["device", "stream"])
@pytest.mark.parametrize("target", ["class", "mask", "boxes"])
def test_margins_count_in_no_statistic(memory: Any, target: Target) -> None:
    """At 16 pixels the images have 4 x 16 and 16 x 8 pixels: 64 of 100 and 128 of 200."""
    data = DataConfig(image_size=16, resize="pad", memory=memory, workers=0)
    images = from_dataset(Scans(target), data, target)
    mean = (64 * 100 + 128 * 200) / 192
    std = np.sqrt((64 * (100 - mean) ** 2 + 128 * (200 - mean) ** 2) / 192)
    np.testing.assert_allclose(images.mean, mean / 255, rtol=1e-12)
    np.testing.assert_allclose(images.std, std / 255, rtol=1e-12)
    loader = ClientLoader(images, data, torch.device("cpu"), seed=0)
    (batch,) = loader.batches(np.arange(2), 2)
    black = -np.array(images.mean[0]) / images.std[0]
    margin = torch.zeros(2, 16, 16, dtype=torch.bool)
    margin[0, :6] = margin[0, 10:] = margin[1, :, :4] = margin[1, :, 12:] = True
    torch.testing.assert_close(batch.images[:, 0] == float(np.float32(black)), margin)
    if target == "mask":
        assert isinstance(batch.targets, Tensor)
        assert torch.equal(batch.targets == 255, margin)
        confusion = Segmentation().measure(torch.randn(2, 2, 16, 16), batch.targets)["confusion"]
        assert confusion.sum(1).tolist() == [0, 192], "pixels of lesion, and none of the margins"
    if target == "boxes":
        assert isinstance(batch.targets, Boxes)
        assert batch.targets.boxes.tolist() == [[0, 6, 16, 10], [4, 0, 12, 16]]


def test_masks_and_boxes_are_padded_by_default_and_cropping_them_is_reported(
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert [DataConfig().resizing(t) for t in ("class", "multilabel", "mask", "boxes")] == [
        *("crop", "crop", "pad", "pad")
    ]
    with caplog.at_level(logging.WARNING):
        from_dataset(Scans("mask"), DataConfig(image_size=8), "mask")
        from_dataset(Scans("class"), DataConfig(image_size=8), "class")
        from_dataset(Scans("mask"), DataConfig(image_size=8, resize="stretch"), "mask")
    assert not caplog.records
    for target, memory in (("mask", "device"), ("boxes", "stream")):
        from_dataset(Scans(target), DataConfig(image_size=8, resize="crop", memory=memory), target)  # type: ignore[arg-type]
    line = (
        "Scans: data.resize=crop: 2 of 2 images lose on average 62.5 % of their area at their edges, with "
        "what is labelled there; data.resize=pad keeps all"
    )
    assert [record.getMessage() for record in caplog.records] == [line] * 2


def test_a_cache_of_pixels_keeps_the_sizes_of_the_images(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for part in ("train", "val"):
        for kind, value in (("images", 120), ("masks", 1)):
            (tmp_path / part / kind).mkdir(parents=True)
            for name, size in (("a", (32, 8)), ("b", (8, 8))):
                Image.new("L", size, value).save(tmp_path / part / kind / f"{name}.png")
    (tmp_path / "classes.txt").write_text("background\nlesion\n")

    def loaded(**settings: Any) -> Any:
        caplog.clear()
        data = DataConfig(dataset="mask_folder", root=str(tmp_path), image_size=8, **settings)
        images, _ = load(data, "mask")
        return images.mean, images.std, [record.getMessage() for record in caplog.records]

    first = {how: loaded(resize=how) for how in ("crop", "pad")}
    assert first["pad"][0] == pytest.approx([120 / 255] * 3), "grey everywhere, if margins do not count"
    assert first["pad"][1] == first["crop"][1] == (1.0,) * 3, "and without contrast"
    assert "1 of 2 images lose on average 75 % of their area" in first["crop"][2][0]
    with monkeypatch.context() as patch:  # no file is opened for its size
        patch.setattr("fedddp.data.decode.size_of", lambda _: pytest.fail("opened"))
        assert {how: loaded(resize=how) for how in first} == first

    def cached(kind: str) -> list[Path]:
        return list((tmp_path / ".fedddp").glob(f"{kind}-*"))

    assert (len(cached("pixels")), len(cached("sizes"))) == (4, 4)
    loaded(resize="stretch")  # nothing is cut or padded, so it needs no sizes; four files are kept
    assert (len(cached("pixels")), len(cached("sizes"))) == (4, 2)
    for file in cached("sizes"):
        file.unlink()
    assert loaded(resize="pad") == first["pad"]
