"""Digit scenes: mask, boxes, labels and class agree; digits of the test set are in test scenes only."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from fedddp.data import scenes
from fedddp.data.catalog import open_dataset
from fedddp.data.targets import Target

FEW = 60


def opened(target: Target, examples: int = FEW, size: int = 48) -> tuple[Any, Any]:
    return open_dataset("scenes", "nowhere", target=target, examples=examples, image_size=size)


@pytest.fixture(scope="module")
def drawn() -> scenes.Scenes:
    return scenes.scenes("train", FEW, 48)


def test_images_masks_boxes_and_labels_have_torchvisions_forms() -> None:
    image, label = opened("class")[0][0]
    assert (image.shape, image.dtype, type(label)) == ((3, 48, 48), torch.uint8, int)
    mask = opened("mask")[0][0][1]
    assert (mask.shape, mask.dtype) == ((48, 48), torch.uint8)
    assert opened("multilabel")[0][0][1].shape == (10,)
    boxes = opened("boxes")[0][0][1]
    assert (boxes["boxes"].dtype, boxes["labels"].dtype) == (torch.float32, torch.int64)
    digits = [str(digit) for digit in range(10)]
    assert opened("mask")[0].classes == ["background", *digits]
    assert opened("boxes")[0].classes == opened("class")[0].classes == digits


def test_all_targets_are_of_the_same_images() -> None:
    first = opened("class")[0].data
    for target in ("multilabel", "mask", "boxes"):
        assert torch.equal(opened(target)[0].data, first)


def test_boxes_are_tight_around_the_pixels_of_the_mask(drawn: scenes.Scenes) -> None:
    boxed = opened("boxes")[0]
    for scene in range(FEW):
        by_owner: dict[int, list[tuple[int, int]]] = {}
        for y in range(48):
            for x in range(48):
                owner = int(drawn.owners[scene, y, x])
                value = int(drawn.masks[scene, y, x])
                assert (owner == 0) == (value == 0)
                if owner:
                    assert value == drawn.digits[scene, owner - 1] + 1
                    by_owner.setdefault(owner, []).append((x, y))
        target = boxed[scene][1]
        expected = []
        for owner in sorted(by_owner):
            xs, ys = zip(*by_owner[owner], strict=True)
            box = [min(xs), min(ys), max(xs) + 1, max(ys) + 1]
            expected.append((box, int(drawn.digits[scene, owner - 1])))
        assert target["boxes"].tolist() == [box for box, _ in expected]
        assert target["labels"].tolist() == [digit for _, digit in expected]


def test_labels_and_class_follow_from_the_mask(drawn: scenes.Scenes) -> None:
    labelled, classed, masked = (opened(target)[0] for target in ("multilabel", "class", "mask"))
    for scene in range(FEW):
        values = masked[scene][1].flatten().tolist()
        assert labelled[scene][1].tolist() == [int(digit + 1 in values) for digit in range(10)]
        owners = drawn.owners[scene].flatten().tolist()
        most = max(range(1, 5), key=owners.count)
        assert classed[scene][1] == drawn.digits[scene, most - 1]


def test_scenes_have_one_to_four_digits_that_can_be_seen(drawn: scenes.Scenes) -> None:
    counts = [len(target["labels"]) for target in opened("boxes")[0].targets]
    assert set(counts) == {1, 2, 3, 4}
    assert counts == (drawn.digits >= 0).sum(axis=1).tolist()
    for scene, slots in enumerate(drawn.digits >= 0):
        for slot in np.flatnonzero(slots):
            assert (drawn.owners[scene] == slot + 1).sum() >= 20


def test_digits_are_the_bundled_ones_and_training_and_test_digits_differ(drawn: scenes.Scenes) -> None:
    tested = scenes.scenes("test", 400, 24)
    sources = set(drawn.sources[drawn.sources >= 0]), set(tested.sources[tested.sources >= 0])
    assert not sources[0] & sources[1]
    train, test = open_dataset("digits", "nowhere")
    assert sources[0] <= set(train.indices)  # type: ignore[attr-defined]
    assert sources[1] <= set(test.indices)  # type: ignore[attr-defined]
    labels = load_digits().target
    there = drawn.sources >= 0
    np.testing.assert_array_equal(drawn.digits[there], labels[drawn.sources[there]])


def test_a_digit_is_brighter_where_it_has_ink() -> None:
    """Against the handwritten digit itself: pixels of its box, resized by another way, correlate with it."""
    drawn = scenes.scenes("train", 20, 96)
    images = load_digits().images
    single = [i for i in range(20) if (drawn.digits[i] >= 0).sum() == 1]
    assert single
    for scene in single:
        ys, xs = np.nonzero(drawn.masks[scene])
        ink = images[drawn.sources[scene, 0]]
        rows, columns = np.flatnonzero((ink > 5).any(axis=1)), np.flatnonzero((ink > 5).any(axis=0))
        crop = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        height, width = ys.max() - ys.min() + 1, xs.max() - xs.min() + 1
        at_y = ((np.arange(height) + 0.5) * crop.shape[0] / height).astype(int)
        at_x = ((np.arange(width) + 0.5) * crop.shape[1] / width).astype(int)
        nearest = crop[at_y][:, at_x]
        seen = drawn.masks[scene, ys.min() : ys.max() + 1, xs.min() : xs.max() + 1] > 0
        assert np.corrcoef(nearest.flatten(), seen.flatten())[0, 1] > 0.6
        grey = drawn.pixels[scene].mean(axis=0)
        inside = drawn.masks[scene] > 0
        assert grey[inside].mean() > grey[~inside].mean() + 20


def test_scenes_are_the_same_every_time_whatever_the_global_generators() -> None:
    first = scenes.scenes("train", 30, 32)
    np.random.seed(1)
    torch.manual_seed(1)
    again = scenes.scenes("train", 30, 32)
    for name in ("pixels", "masks", "owners", "digits", "sources", "cameras"):
        np.testing.assert_array_equal(getattr(first, name), getattr(again, name))
    assert not np.array_equal(first.pixels, scenes.scenes("test", 30, 32).pixels)


def test_scenes_of_more_than_one_chunk_are_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scenes, "_CHUNK", 7)
    drawn = scenes.scenes("train", 20, 24)
    assert ((drawn.digits >= 0).sum(axis=1) >= 1).all()
    assert all(drawn.masks[i].any() for i in range(20))
    assert (drawn.owners <= 4).all()


def test_cameras_are_natural_clients_with_backgrounds_of_their_own() -> None:
    train, test = opened("class", 400)
    assert np.bincount(train.ids).tolist() == [20] * 20
    assert set(test.ids.tolist()) == set(range(20))
    masks = opened("mask", 400)[0].targets
    means = np.zeros((20, 3))
    spreads = np.zeros((20, 3))
    for camera in range(20):
        of = [
            train.data[i][:, masks[i] == 0].double().mean(1).numpy()
            for i in np.flatnonzero(train.ids == camera)
        ]
        means[camera], spreads[camera] = np.mean(of, axis=0), np.std(of, axis=0)
    # Colours vary between cameras far more than within one.
    assert means.std(axis=0).min() > 3 * spreads.mean()


def test_the_size_is_48_by_default_and_24_at_least() -> None:
    train, test = open_dataset("scenes", "nowhere", examples=10)
    assert train[0][0].shape == (3, 48, 48)
    assert (len(train), len(test)) == (10, 2)  # type: ignore[arg-type]
    assert scenes.scenes("train", 2, 24).pixels.shape == (2, 3, 24, 24)
    with pytest.raises(ValueError, match="^data.image_size=16 is too small .*; set 24 or more"):
        opened("class", size=16)


def test_no_scenes_are_none() -> None:
    assert scenes.scenes("train", 0, 32).pixels.shape == (0, 3, 32, 32)
