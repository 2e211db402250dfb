"""What is done to images, pixel by pixel: the feature shift's rotation, gains and noise; flips and crops."""

from __future__ import annotations

import importlib
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedddp.data.resizing import Resizing
from fedddp.data.targets import Boxes
from fedddp.data.transforms import (
    FeatureShift,
    ImageShift,
    augment,
    augment_boxes,
    jitter,
)

v2: Any = importlib.import_module("torchvision.transforms.v2")
tv_tensors: Any = importlib.import_module("torchvision.tv_tensors")
PLAIN = (1.0, 1.0, 1.0)


def draws_of(column: int, values: Tensor) -> Tensor:
    """Return the draws (b, 3) of an augmentation with `values` in one column, 0.75 in the others."""
    draws = torch.full((len(values), 3), 0.75)
    draws[:, column] = values
    return draws


def test_half_of_all_draws_mirror_an_image() -> None:
    images = torch.arange(4.0).expand(100, 1, 1, 4)
    mirrored = augment(images, draws_of(0, torch.arange(100) / 100), "flip")[:, 0, 0].tolist()
    assert mirrored == [[3, 2, 1, 0]] * 50 + [[0, 1, 2, 3]] * 50


@pytest.mark.parametrize(
    ("height", "width", "down", "across"), [(16, 16, 2, 2), (8, 24, 1, 3), (6, 7, 1, 1), (4, 4, 1, 1)]
)
def test_a_crop_moves_an_image_by_up_to_an_eighth_and_every_offset_is_equally_likely(
    height: int, width: int, down: int, across: int
) -> None:
    row, column = height // 2, width // 2
    images = torch.zeros(210, 1, height, width)
    images[:, :, row, column] = 1
    values = (torch.arange(210) + 0.5) / 210
    for column_of_draws, most in ((1, across), (2, down)):
        where = augment(images, draws_of(column_of_draws, values), "crop").flatten(1).argmax(1)
        found = where % width - column if column_of_draws == 1 else where // width - row
        assert Counter(found.tolist()) == dict.fromkeys(range(-most, most + 1), 210 // (2 * most + 1))
    corner = augment(torch.ones(1, 2, height, width), torch.zeros(1, 3), "crop")
    assert (
        corner[0].sum((1, 2)).tolist() == [(height - down) * (width - across)] * 2
    )  # the rest comes in as 0


def test_each_image_is_augmented_by_its_own_draws_and_none_changes_nothing() -> None:
    rng = np.random.default_rng(0)
    images, draws = torch.from_numpy(rng.random((6, 3, 8, 8))), torch.from_numpy(rng.random((6, 3)))
    together = augment(images, draws, "crop-flip")
    apart = [augment(images[i : i + 1], draws[i : i + 1], "crop-flip") for i in range(6)]
    assert torch.equal(together, torch.cat(apart))
    assert torch.equal(augment(images, draws, "none"), images)


@pytest.mark.parametrize(("angle", "row", "column"), [(90, 0, 2), (-90, 4, 2), (180, 2, 0)])
def test_a_positive_angle_turns_counter_clockwise(angle: float, row: int, column: int) -> None:
    right = torch.zeros(1, 1, 5, 5)
    right[:, :, 2, 4] = 1
    turned = ImageShift(angle, PLAIN, 0.0).apply(right, np.arange(1), 0)[0, 0]
    assert divmod(int(turned.argmax()), 5) == (row, column)
    assert float(turned.sum()) == pytest.approx(1)


def test_gains_multiply_the_channels_and_values_stay_in_range() -> None:
    images = torch.tensor([0.25, 0.5, 0.9])[:, None, None].expand(1, 3, 2, 2)
    shifted = ImageShift(0.0, (0.8, 1.0, 1.2), 0.0).apply(images, np.arange(1), 0)
    torch.testing.assert_close(shifted[0, :, 1, 1], torch.tensor([0.2, 0.5, 1.0]))
    grey = ImageShift(0.0, (0.8, 1.0, 1.2), 0.0).apply(images[:, 1:2], np.arange(1), 0)
    torch.testing.assert_close(grey[0, :, 0, 0], torch.tensor([0.4]))


def test_noise_has_its_standard_deviation_and_belongs_to_the_example_and_the_seed() -> None:
    shift, examples = ImageShift(0.0, PLAIN, 0.05), np.arange(40)
    images = torch.full((40, 3, 16, 16), 0.5)
    noise = shift.apply(images, examples, 7) - images
    assert float(noise.std()) == pytest.approx(0.05, rel=0.02)
    assert float(noise.mean()) == pytest.approx(0, abs=0.002)
    assert torch.equal(shift.apply(images[:3], examples[[5, 0, 9]], 7) - images[:3], noise[[5, 0, 9]])
    assert not torch.equal(shift.apply(images, examples, 8) - images, noise)
    assert not torch.equal(noise[0], noise[1])


def test_a_feature_shift_of_zero_changes_nothing() -> None:
    images = torch.rand(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    shift = FeatureShift().of_client(3, seed=0)
    assert shift == ImageShift(0.0, PLAIN, 0.0)
    assert torch.equal(shift.apply(images, np.arange(2), 0), images)


@pytest.mark.parametrize("leading", [(), (5,)])
def test_resizing_scales_the_shorter_side_and_keeps_the_centre(leading: tuple[int, ...]) -> None:
    wide = torch.arange(8, dtype=torch.uint8).expand(*leading, 3, 4, 8)
    assert torch.equal(Resizing(4).image(wide), wide[..., 2:6])
    assert torch.equal(Resizing(4).image(wide.mT), wide.mT[..., 2:6, :])
    assert Resizing(2).image(wide).shape == (*leading, 3, 2, 2)
    assert torch.equal(Resizing(None).image(wide), wide)
    assert torch.equal(Resizing(4).image(wide[..., :4]), wide[..., :4])


# ---- masks and boxes ----


@pytest.mark.parametrize("size", [(40, 60), (61, 33), (24, 24), (7, 90)])
def test_boxes_lie_where_torchvision_puts_them_after_the_same_resize_and_crop(size: tuple[int, int]) -> None:
    rng = np.random.default_rng(3)
    low, high = np.sort(rng.random((2, 30, 2)), axis=0)
    corners = torch.from_numpy(np.concatenate([low, high], 1)).float() * torch.tensor([*size[::-1]] * 2)
    boxes = tv_tensors.BoundingBoxes(corners, format="XYXY", canvas_size=size)
    resized = v2.functional.center_crop(v2.functional.resize(boxes, [24], antialias=True), [24, 24])
    kept = (resized[:, 2:] - resized[:, :2] >= 1).all(1)
    found, labels = Resizing(24).boxes(Boxes.join([(corners, torch.arange(30))]), size).of(0)
    if size == (24, 24):  # nothing is resized, so nothing is left out
        kept = torch.ones(30, dtype=torch.bool)
    assert labels.tolist() == torch.arange(30)[kept].tolist()
    torch.testing.assert_close(found, resized[kept].as_subclass(Tensor), atol=1e-4, rtol=0)


def test_a_mask_is_resized_without_new_classes_and_stays_on_its_image() -> None:
    image = torch.zeros(1, 40, 60, dtype=torch.uint8)
    image[:, 10:30, 20:50] = 255
    mask = (image > 0).to(torch.uint8) * 7
    small, classes = Resizing(20).image(image), Resizing(20).mask(mask)
    assert sorted(set(classes.flatten().tolist())) == [0, 7]
    assert classes.shape == small.shape == (1, 20, 20)
    assert ((classes == 7) == (small > 127)).float().mean() == 1


def painted(boxes: Boxes, image: int, height: int, width: int) -> Tensor:
    """Return an image (1, 1, H, W) of 1 within the boxes of whole pixels."""
    canvas = torch.zeros(1, 1, height, width)
    for left, top, right, bottom in boxes.of(image)[0].long().tolist():
        canvas[..., top:bottom, left:right] = 1
    return canvas


@pytest.mark.parametrize("kind", ["flip", "crop", "crop-flip"])
def test_boxes_and_masks_move_with_their_images(kind: str) -> None:
    rng = np.random.default_rng(1)
    height, width, count = 16, 24, 40
    draws = torch.from_numpy(rng.random((count, 3), np.float32))
    left, top = rng.integers(0, width - 6, count), rng.integers(0, height - 6, count)
    corners = np.stack([left, top, left + rng.integers(3, 7, count), top + rng.integers(3, 7, count)], 1)
    boxes = Boxes.join(
        (torch.from_numpy(corners[i : i + 1]).float(), torch.tensor([i])) for i in range(count)
    )
    images = torch.cat([painted(boxes, i, height, width) for i in range(count)])
    moved = augment_boxes(boxes, draws, kind, height, width)  # type: ignore[arg-type]
    pictures = augment(images, draws, kind)  # type: ignore[arg-type]
    masks = augment(images.to(torch.uint8), draws, kind, fill=255)  # type: ignore[arg-type]
    for i in range(count):
        assert torch.equal(painted(moved, i, height, width), pictures[i : i + 1])
        assert torch.equal(masks[i] == 1, pictures[i] == 1)
        assert moved.of(i)[1].tolist() == ([i] if pictures[i].any() else [])
    outside = masks == 255
    assert bool(outside.any()) == ("crop" in kind)
    assert not pictures[outside].any()


def test_a_mask_turns_with_its_image_and_what_comes_in_does_not_count() -> None:
    image = torch.zeros(1, 1, 21, 21)
    image[..., 5:9, 8:16] = 1
    shift = ImageShift(30.0, PLAIN, 0.0)
    turned = shift.apply(image, np.zeros(1, np.int64), 0)
    masks = shift.turn(image.to(torch.uint8))
    assert ((masks == 1) == (turned > 0.5)).float().mean() > 0.98
    white = shift.apply(torch.ones(1, 1, 21, 21), np.zeros(1, np.int64), 0)
    assert ((masks == 255) == (white < 0.5)).float().mean() > 0.97
    assert (masks == 255).any()
    assert ImageShift(0.0, PLAIN, 0.0).turn(masks) is masks


def test_colours_change_as_torchvision_changes_them() -> None:
    images = torch.from_numpy(np.random.default_rng(2).random((4, 3, 9, 11), np.float32))
    draws = torch.tensor([[0.0, 0, 0, 0.0, 0.5, 1.0], [0, 0, 0, 1, 0, 0.25], [0, 0, 0, 0.5, 0.5, 0.5]])
    draws = torch.cat([draws, torch.tensor([[0.0, 0, 0, 0.9, 0.1, 0.7]])])
    expected = []
    for image, (brightness, contrast, saturation) in zip(images, 0.6 + 0.8 * draws[:, 3:], strict=True):
        one = v2.functional.adjust_brightness(image, float(brightness))
        one = v2.functional.adjust_contrast(one, float(contrast))
        expected.append(v2.functional.adjust_saturation(one, float(saturation)))
    torch.testing.assert_close(jitter(images, draws), torch.stack(expected), atol=1e-5, rtol=0)
    torch.testing.assert_close(jitter(images[2:3], draws[2:3]), images[2:3])
    grey = jitter(images[:1, :1], draws[:1])
    assert torch.equal(grey, (images[:1, :1] * 0.6).clamp(0, 1))
