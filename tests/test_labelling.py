"""Masks, boxes and several labels per image: what a dataset may give, and what is refused."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Subset, TensorDataset

from fedddp.data.datasets import DataConfig, Images, from_dataset
from fedddp.data.labelling import boxes_of, mask_of
from fedddp.data.targets import Boxes, select

MASK = np.array([[0, 1, 255], [2, 2, 0]], dtype=np.uint8)


class Pairs(Dataset[Any]):
    """Items that are given one by one."""

    def __init__(self, items: list[Any], **attributes: Any) -> None:
        self.items = items
        for name, value in attributes.items():
            setattr(self, name, value)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index]


def grey(value: int = 7, size: tuple[int, int] = (2, 3)) -> Tensor:
    return torch.full((1, *size), value, dtype=torch.uint8)


def palette(mask: np.ndarray[Any, Any]) -> Image.Image:
    picture = Image.fromarray(mask, mode="L").convert("P")
    picture.putdata(mask.flatten().tolist())
    picture.putpalette([*range(256)] * 3)
    return picture


# ---- masks ----


@pytest.mark.parametrize(
    "given",
    [
        MASK,
        MASK.astype(np.int32),
        torch.from_numpy(MASK),
        torch.from_numpy(MASK).long()[None],
        Image.fromarray(MASK),
        palette(MASK),
        Image.fromarray(MASK.astype(np.uint16)),
        Image.fromarray(MASK.astype(np.int32)),
    ],
    ids=["uint8", "int32", "tensor", "one channel", "L", "P", "I;16", "I"],
)
def test_a_mask_of_any_form_keeps_its_numbers(given: Any) -> None:
    assert torch.equal(mask_of(given, (2, 3), "x"), torch.from_numpy(MASK)[None])


def test_a_mask_of_truth_values_is_one_of_two_classes() -> None:
    given = MASK == 2
    assert mask_of(given, (2, 3), "x").tolist() == [given.astype(int).tolist()]
    assert mask_of(Image.fromarray(given), (2, 3), "x").tolist() == [given.astype(int).tolist()]


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (
            Image.new("RGB", (3, 2)),
            "^a.png has a mask of colours .mode RGB.; give one whose pixels",
        ),
        (
            MASK.astype(np.float32),
            "^a.png has a mask of float32 values of shape .2, 3.; give",
        ),
        (np.zeros((2, 3, 3), int), "^a.png has a mask of int64 values of shape .2, 3, 3.; give integers"),
        (MASK.T, "^a.png is 2x3 pixels, but its mask 3x2; give both one size"),
        (MASK.astype(int) - 1, "^a.png has the value -1 in its mask; classes are 0 to 254, and 255 marks"),
        (MASK.astype(int) * 2, "^a.png has the value 510 in its mask"),
    ],
)
def test_what_is_no_mask_is_refused_with_the_name_of_its_image(given: Any, line: str) -> None:
    with pytest.raises(ValueError, match=line):
        mask_of(given, (2, 3), "a.png")


def masked(count: int = 3, **data: Any) -> Images:
    items = [(grey(40 * i), np.full((2, 3), i % 3)) for i in range(count)]
    return from_dataset(Pairs(items), DataConfig(**data), "mask")


@pytest.mark.parametrize("memory", ["device", "stream"])
def test_a_mask_lies_behind_the_channels_of_its_image(memory: str) -> None:
    images = masked(memory=memory)
    assert images.shape == (1, 2, 3)
    assert (images.classes, images.class_names) == (3, ("0", "1", "2"))
    assert images.labels.tolist() == [0, 1, 2]
    planes = (
        images.pixels if images.source is None else torch.stack([images.source.read(i) for i in range(3)])
    )
    assert planes is not None
    assert planes[:, 0, 0, 0].tolist() == [0, 40, 80]
    assert planes[:, 1, 0, 0].tolist() == [0, 1, 2]
    # Mean and deviation are those of the image alone.
    assert images.mean == pytest.approx([40 / 255])
    assert images.std == pytest.approx([np.std([0, 40, 80]) / 255])


def test_images_of_mixed_colours_become_rgb_and_masks_stay_masks() -> None:
    colour = np.zeros((2, 3, 3), np.uint8)
    images = from_dataset(Pairs([(colour, MASK % 3), (grey(9), MASK % 3)]), target="mask")
    assert images.pixels is not None
    assert set(images.pixels[1, :3].flatten().tolist()) == {9}
    assert torch.equal(images.pixels[1, 3], torch.from_numpy(MASK % 3))


def test_partitions_split_masks_by_the_class_with_most_pixels_but_the_first() -> None:
    masks = torch.tensor([[[0, 0, 0, 0, 2, 1, 2]], [[0, 0, 0, 0, 0, 0, 0]], [[255, 255, 255, 0, 0, 3, 255]]])
    images = from_dataset(TensorDataset(torch.zeros(3, 1, 1, 7, dtype=torch.uint8), masks), target="mask")
    assert images.labels.tolist() == [2, 0, 3]
    assert images.classes == 4


def test_a_class_beyond_the_list_of_classes_is_refused_and_255_is_none() -> None:
    items = [(grey(), np.array([[0, 1, 255], [1, 1, 1]])), (grey(), np.array([[0, 2, 0], [0, 0, 0]]))]
    with pytest.raises(ValueError, match="^Pairs: label of example 1 is 2, but must be between 0 and 1"):
        from_dataset(Pairs(items, classes=["background", "cat"]), target="mask")
    assert from_dataset(Pairs(items[:1], classes=["background", "cat"]), target="mask").classes == 2


def test_a_test_set_of_masks_has_the_classes_of_the_training_set() -> None:
    train = masked()
    test = from_dataset(Pairs([(grey(), np.zeros((2, 3), int))]), target="mask", like=train)
    assert (test.classes, test.mean) == (3, train.mean)
    with pytest.raises(ValueError, match="^Pairs: label of example 0 is 3, but must be between 0 and 2"):
        from_dataset(Pairs([(grey(), np.full((2, 3), 3))]), target="mask", like=train)


def test_a_test_set_with_another_list_of_classes_is_refused() -> None:
    train = from_dataset(Pairs([(grey(), 0), (grey(), 2)], classes=["ant", "bee", "cat"]))
    with pytest.raises(ValueError, match="^Pairs has the classes ant, cat, but the training set"):
        from_dataset(Pairs([(grey(), 1)], classes=["ant", "cat"]), like=train)


# ---- boxes ----


def boxed(*of_images: tuple[list[list[float]], list[int]]) -> Boxes:
    pairs = ((torch.tensor(boxes).reshape(-1, 4), torch.tensor(labels).long()) for boxes, labels in of_images)
    return Boxes.join(pairs)


THREE: tuple[tuple[list[list[float]], list[int]], ...] = (
    ([[0.0, 0, 1, 1], [1, 1, 3, 3]], [4, 1]),
    ([], []),
    ([[0.0, 1, 2, 2]], [2]),
)


def test_boxes_of_images_are_taken_apart_as_they_were_joined() -> None:
    boxes = boxed(*THREE)
    assert len(boxes) == 3
    for image, (corners, labels) in enumerate(THREE):
        assert boxes.of(image)[0].tolist() == corners
        assert boxes.of(image)[1].tolist() == labels
    assert [boxes[1:].of(i)[1].tolist() for i in range(2)] == [[], [2]]
    assert len(boxes[1:1]) == 0
    chosen = select(boxes, torch.tensor([2, 0, 0, 1]))
    assert isinstance(chosen, Boxes)
    assert [chosen.of(i)[1].tolist() for i in range(4)] == [[2], [4, 1], [4, 1], []]
    assert chosen.of(2)[0].tolist() == THREE[0][0]


@pytest.mark.parametrize(
    ("label", "line"),
    [
        (3, "^b.png has int for boxes; give .*boxes"),
        ({"boxes": [[0, 0, 1, 1]]}, "^b.png has a dict with boxes for boxes"),
        (
            {"boxes": [[0, 0, 1, 1]], "labels": []},
            "^b.png has 1 boxes and 0 labels; give an integer",
        ),
        ({"boxes": [[0, 0, 1, 1]], "labels": [0.5]}, "give an integer for each"),
        (
            {"boxes": [[0, 0, 1, 1], [5, 5, 2, 9]], "labels": [0, 1]},
            r"^b.png has the box .5.0, 5.0, 2.0",
        ),
        ({"boxes": [[0, 0, float("nan"), 1]], "labels": [0]}, "^b.png has the box"),
    ],
)
def test_what_are_no_boxes_is_refused(label: Any, line: str) -> None:
    with pytest.raises(ValueError, match=line):
        boxes_of(label, "b.png")


@pytest.mark.parametrize("memory", ["device", "stream"])
def test_boxes_of_a_dataset_are_held_with_a_class_to_split_by(memory: Literal["device", "stream"]) -> None:
    labels = [
        {"boxes": [[0, 0, 1, 1], [0, 0, 3, 2]], "labels": [2, 1]},
        {"boxes": np.zeros((0, 4)), "labels": np.zeros(0, int)},
    ]
    images = from_dataset(Pairs([(grey(), one) for one in labels]), DataConfig(memory=memory), "boxes")
    assert images.boxes is not None
    assert images.boxes.of(0)[1].tolist() == [2, 1]
    assert images.boxes.offsets.tolist() == [0, 2, 2]
    assert images.labels.tolist() == [1, 0]
    assert images.classes == 3


def test_a_negative_or_unknown_class_of_a_box_is_refused() -> None:
    for label, shown in ((-1, -1), (2, 2)):
        items = [(grey(), {"boxes": [[0, 0, 3, 2], [0, 0, 1, 1]], "labels": [1, label]})]
        with pytest.raises(ValueError, match=f"^Pairs: label of example 0 is {shown}, but must be"):
            from_dataset(Pairs(items, classes=["cat", "dog"]), target="boxes")


# ---- several labels ----


def test_labels_are_taken_from_a_table_or_read_item_by_item() -> None:
    table = np.array([[0, 1, 1], [0, 0, 0], [1, 0, 0]])
    items = [(grey(), row) for row in table]
    for dataset in (
        Pairs(items),
        Pairs([(grey(), None)] * 3, targets=table),
        TensorDataset(torch.zeros(3, 1, 2, 3, dtype=torch.uint8), torch.from_numpy(table)),
        Subset(Pairs(items * 2), [3, 4, 5]),
    ):
        images = from_dataset(dataset, target="multilabel")
        assert images.multilabels is not None
        assert images.multilabels.dtype == torch.float32
        assert images.multilabels.tolist() == table.tolist()
        assert images.labels.tolist() == [1, 0, 0]
        assert images.classes == 3


@pytest.mark.parametrize(
    ("rows", "line"),
    [
        ([[0, 1], [0, 2]], "^Pairs: example 1 has 2 for label 1; give 0 or 1 for each label"),
        ([[0, 1], [0, 1, 1]], "^Pairs: example 1 has labels of shape .3,., the first .2,."),
        ([0, 1], "^Pairs: example 0 has labels of shape"),
    ],
)
def test_what_are_no_labels_is_refused(rows: Any, line: str) -> None:
    with pytest.raises(ValueError, match=line):
        from_dataset(Pairs([(grey(), row) for row in rows]), target="multilabel")


def test_labels_without_a_name_for_each_are_refused() -> None:
    with pytest.raises(ValueError, match="^Pairs has 2 labels per image, but 3 classes; correct"):
        from_dataset(Pairs([(grey(), [0, 1])], classes=["a", "b", "c"]), target="multilabel")


# ---- natural owners ----


def test_a_test_set_has_the_owners_numbers_of_the_training_set() -> None:
    train = from_dataset(Pairs([(grey(), 0)] * 4, ids=["rome", "bonn", "rome", "oslo"]))
    assert train.owners == ("bonn", "oslo", "rome")
    assert train.ids is not None
    assert train.ids.tolist() == [2, 0, 2, 1]
    test = from_dataset(Pairs([(grey(), 0)] * 3, ids=["rome", "kiel", "oslo"]), like=train)
    assert test.ids is not None
    assert test.ids.tolist() == [2, 3, 1]
    assert test.owners == ("bonn", "oslo", "rome", "kiel")


# ---- what ranks compare at the start ----


def test_the_digest_covers_masks_boxes_and_labels() -> None:
    def digests(target: Any, labels: list[Any]) -> set[str]:
        return {from_dataset(Pairs([(grey(), one)]), target=target).digest() for one in labels}

    assert len(digests("mask", [MASK % 3, (MASK + 1) % 3])) == 2
    corners = [[[0, 0, 1, 1]], [[0, 0, 2, 1]]]
    assert len(digests("boxes", [{"boxes": one, "labels": [0]} for one in corners])) == 2
    assert len(digests("multilabel", [[1, 0, 0], [1, 0, 1]])) == 2
