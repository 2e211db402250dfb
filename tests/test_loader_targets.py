"""Batches of masks, boxes and labels: they belong to their images, however these are read and moved."""

from __future__ import annotations

import importlib
import sys
import types
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

from fedddp.data.datasets import DataConfig, from_dataset
from fedddp.data.loader import Batch, ClientLoader
from fedddp.data.targets import Boxes, Target
from fedddp.data.transforms import FeatureShift
from fedddp.rng import stream

v2: Any = importlib.import_module("torchvision.transforms.v2")
tv_tensors: Any = importlib.import_module("torchvision.tv_tensors")
CPU, COUNT, SIDE = torch.device("cpu"), 11, 16
TARGETS: tuple[Target, ...] = ("mask", "boxes", "multilabel")


class Squares(Dataset[Any]):
    """Image i has a square of its own brightness, of class i % 3 + 1, at a place of its own."""

    classes = ("background", "a", "b", "c")

    def __init__(self, target: Target) -> None:
        self.target = target
        rng = np.random.default_rng(5)
        self.places = rng.integers(1, SIDE - 8, (COUNT, 2)).tolist()

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        (row, column), label = self.places[index], index % 3 + 1
        image = torch.zeros(1, SIDE, SIDE, dtype=torch.uint8)
        image[:, row : row + 5, column : column + 6] = 100 + 10 * index
        if self.target == "mask":
            return image, (image[0] > 0).to(torch.uint8) * label
        if self.target == "boxes":
            return image, {"boxes": [[column, row, column + 6, row + 5]], "labels": [label]}
        return image, np.eye(4, dtype=int)[label]


def loader(target: Target, *, seed: int = 0, **data: Any) -> ClientLoader:
    config = DataConfig(workers=0, **data)
    return ClientLoader(from_dataset(Squares(target), config, target), config, CPU, seed=seed)


def batches(source: ClientLoader, **options: Any) -> list[Batch]:
    given: dict[str, Any] = {"rng": stream("pass", 0), "train": True, **options}
    return list(source.batches(np.arange(COUNT), 4, **given))


def tensor(targets: Any) -> Tensor:
    assert isinstance(targets, Tensor)
    return targets


def bright(source: ClientLoader, image: Tensor) -> Tensor:
    """Return where the square of a normalised image is, (H, W)."""
    return source.normalize.pixels(image[None])[0, 0] >= 50


def check(source: ClientLoader, target: Target, batch: Batch) -> None:
    """Check the targets of a batch against its images."""
    for row, image in enumerate(batch.images):
        square = bright(source, image)
        brightest = int(source.normalize.pixels(image[None]).max())
        label = round((brightest - 100) / 10) % 3 + 1
        if target == "mask":
            assert isinstance(batch.targets, Tensor)
            assert batch.targets.dtype == torch.int64
            mask = batch.targets[row]
            assert torch.equal(mask == label, square)
            assert set(mask.flatten().tolist()) <= {0, label, 255}
        elif target == "boxes":
            assert isinstance(batch.targets, Boxes)
            corners, labels = batch.targets.of(row)
            assert labels.tolist() == [label]
            left, top, right, bottom = corners[0].long().tolist()
            expected = torch.zeros_like(square)
            expected[top:bottom, left:right] = True
            assert torch.equal(expected, square)
        else:
            assert isinstance(batch.targets, Tensor)
            assert batch.targets[row].tolist() == np.eye(4)[label].tolist()


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("memory", ["device", "stream"])
@pytest.mark.parametrize("augment", ["none", "crop-flip"])
def test_targets_belong_to_their_images(target: Target, memory: str, augment: str) -> None:
    source = loader(target, memory=memory, augment=augment)
    some = batches(source)
    assert sum(batch.count for batch in some) == COUNT
    if target == "mask":  # what a crop moves in does not count
        assert any((tensor(batch.targets) == 255).any() for batch in some) == (augment == "crop-flip")
    for batch in some:
        check(source, target, batch)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("memory", ["device", "stream"])
def test_ranks_share_targets_as_they_share_images(target: Target, memory: str) -> None:
    source = loader(target, memory=memory, augment="crop-flip")
    together = batches(source)
    apart = [batches(source, shard=(rank, 2)) for rank in range(2)]
    for number, batch in enumerate(together):
        for rank in range(2):
            part = apart[rank][number]
            chosen = torch.arange(rank, batch.count, 2)
            assert torch.equal(part.images, batch.images[chosen])
            if isinstance(batch.targets, Boxes) and isinstance(part.targets, Boxes):
                assert torch.equal(part.targets.boxes, batch.targets.index_select(chosen).boxes)
            else:
                assert isinstance(part.targets, Tensor)
                assert isinstance(batch.targets, Tensor)
                assert torch.equal(part.targets, batch.targets[chosen])


def test_streamed_and_held_batches_are_the_same() -> None:
    for target in TARGETS:
        held, streamed = (batches(loader(target, memory=m, augment="flip")) for m in ("device", "stream"))
        for one, other in zip(held, streamed, strict=True):
            assert torch.equal(one.images, other.images)
            if isinstance(one.targets, Boxes) and isinstance(other.targets, Boxes):
                assert torch.equal(one.targets.boxes, other.targets.boxes)
                assert torch.equal(one.targets.offsets, other.targets.offsets)
            else:
                assert isinstance(one.targets, Tensor)
                assert isinstance(other.targets, Tensor)
                assert torch.equal(one.targets, other.targets)


def test_a_clients_shift_turns_masks_and_leaves_their_numbers() -> None:
    source = loader("mask", feature_shift=FeatureShift(rotation=90, color=0.2))
    (batch, *_) = batches(source, client=3)
    agreement = []
    for image, mask in zip(batch.images, tensor(batch.targets), strict=True):
        (label,) = set(mask[(mask != 255) & (mask != 0)].tolist())
        square = bright(source, image)
        agreement.append(((mask == label) == square).float().mean())
        assert set(mask.flatten().tolist()) <= {0, label, 255}
    assert min(agreement) > 0.94
    assert (tensor(batch.targets) == 255).any()


def test_colours_change_images_and_leave_targets() -> None:
    plain, changed = (batches(loader("mask", augment=kind)) for kind in ("none", "color"))
    assert not torch.equal(plain[0].images, changed[0].images)
    # The permutation of the pass is drawn first, so that the images are the same ones.
    assert torch.equal(tensor(plain[0].targets), tensor(changed[0].targets))


# ---- the user's own transform ----


def _flipped(image: Any, label: Any) -> Any:
    """Mirror half of the images, as v2.RandomHorizontalFlip does."""
    return v2.RandomHorizontalFlip(0.5)(image, label)


def _wrong(image: Any, label: Any) -> Any:
    return image


@pytest.fixture
def lab(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    module = types.ModuleType("lab_of_the_user")
    module.flipped, module.wrong = _flipped, _wrong  # type: ignore[attr-defined]
    module.pipeline = v2.Compose(  # type: ignore[attr-defined]
        [v2.RandomHorizontalFlip(0.5), v2.RandomCrop(SIDE, padding=2), v2.SanitizeBoundingBoxes()]
    )
    monkeypatch.setitem(sys.modules, "lab_of_the_user", module)
    return module


def test_a_transform_of_the_users_gets_tv_tensors_and_is_the_same_on_any_rank(lab: types.ModuleType) -> None:
    for target, name in (("mask", "flipped"), ("boxes", "flipped"), ("boxes", "pipeline")):
        source = loader(target, transform=f"lab_of_the_user.{name}")  # type: ignore[arg-type]
        assert source.images.pixels is None
        first, again = batches(source), batches(source)
        apart = [batches(source, shard=(rank, 2)) for rank in range(2)]
        for number, batch in enumerate(first):
            if name == "flipped":
                check(source, target, batch)  # type: ignore[arg-type]
            assert torch.equal(batch.images, again[number].images)
            for rank in range(2):
                assert torch.equal(apart[rank][number].images, batch.images[rank::2])
        other = batches(source, rng=stream("pass", 1))
        assert not all(torch.equal(a.images, b.images) for a, b in zip(first, other, strict=True))


def test_a_transform_is_for_training_only(lab: types.ModuleType) -> None:
    plain, transformed = loader("mask"), loader("mask", transform="lab_of_the_user.flipped")
    for options in ({"rng": None, "train": False}, {"rng": None, "train": False, "client": 1}):
        for one, other in zip(batches(plain, **options), batches(transformed, **options), strict=True):
            assert torch.equal(one.images, other.images)
    data = DataConfig(transform="lab_of_the_user.flipped", workers=0)
    train = from_dataset(Squares("mask"), data, "mask")
    assert from_dataset(Squares("mask"), data, "mask", like=train).pixels is not None


def test_what_a_transform_gets_are_tv_tensors(lab: types.ModuleType) -> None:
    seen: list[Any] = []

    def keep(image: Any, label: Any) -> Any:
        seen.append((image, label))
        return image, label

    lab.keep = keep  # type: ignore[attr-defined]
    for target in TARGETS:
        batches(loader(target, transform="lab_of_the_user.keep"))
        image, label = seen[-1]
        assert isinstance(image, tv_tensors.Image)
        if target == "mask":
            assert isinstance(label, tv_tensors.Mask)
        if target == "boxes":
            assert isinstance(label["boxes"], tv_tensors.BoundingBoxes)
            assert label["boxes"].canvas_size == (SIDE, SIDE)


@pytest.mark.parametrize(
    ("name", "line"),
    [
        (
            "lab_of_the_user.nothing",
            "transform=lab_of_the_user.nothing: .*; give the dotted path",
        ),
        ("flip", "transform must be none, got flip; or give the dotted path of your own f.image, label."),
    ],
)
def test_a_transform_that_is_none_is_refused(lab: types.ModuleType, name: str, line: str) -> None:
    with pytest.raises(ValueError, match=line):
        DataConfig(transform=name)


def test_a_transform_needs_streamed_images_and_pairs(lab: types.ModuleType) -> None:
    with pytest.raises(ValueError, match="transform=lab_of_the_user.flipped is applied to images as"):
        DataConfig(transform="lab_of_the_user.flipped", memory="device")
    with pytest.raises(ValueError, match="example .* after data.transform is Image; .* must return"):
        batches(loader("mask", transform="lab_of_the_user.wrong"))
