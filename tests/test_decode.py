"""Examples to labels and pixels, at the edges of what a dataset may look like."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Subset, TensorDataset

from fedddp.data.datasets import from_dataset
from fedddp.data.decode import Arrays, _array, _files
from fedddp.data.listed import class_names, label_of, labels

GREY = torch.arange(5 * 4 * 3, dtype=torch.uint8).reshape(5, 4, 3)
COLOUR = torch.arange(5 * 3 * 2 * 2, dtype=torch.uint8).reshape(5, 3, 2, 2)
LABELS = torch.tensor([0, 1, 2, 1, 0])


class Users(Dataset[Any]):
    """A user's dataset with these attributes, and items that count how often they are read."""

    def __init__(self, items: list[Any], **attributes: Any) -> None:
        self.items, self.reads = items, 0
        self.__dict__.update(attributes)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        self.reads += 1
        return self.items[index]


# ---- images that lie in one array ----


@pytest.mark.parametrize(
    ("dataset", "expected"),
    [
        (TensorDataset(COLOUR, LABELS), COLOUR),
        (TensorDataset(COLOUR / 255, LABELS), COLOUR),
        (TensorDataset(GREY, LABELS), GREY[:, None]),
        (Arrays(COLOUR, LABELS, ["a", "b", "c"]), COLOUR),
        (Arrays(GREY, LABELS, ["a", "b", "c"]), GREY[:, None]),
        (Subset(Arrays(GREY, LABELS, []), [3, 1]), GREY[[3, 1], None]),
        (Subset(Subset(TensorDataset(COLOUR, LABELS), [4, 3, 1]), [2, 0]), COLOUR[[1, 4]]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_images_in_one_array_are_taken_as_it_is_without_reading_items(
    dataset: Dataset[Any], expected: Tensor
) -> None:
    taken = _array(dataset)
    assert taken is not None
    assert torch.equal(taken, expected)


@pytest.mark.parametrize(
    "dataset",
    [
        TensorDataset(torch.zeros(5, 4), LABELS),  # no images
        TensorDataset(torch.zeros(5, 1, 3, 2, 2), LABELS),  # of three dimensions each
        Arrays(COLOUR / 255, LABELS, []),  # values whose range is not known
        Arrays(COLOUR[:4], LABELS, []),  # another number of images
        Users([], data=COLOUR),  # a class of one's own may do more than return them
        Subset(Users([(COLOUR[0], 0)], data=COLOUR), [0]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_other_images_are_read_item_by_item(dataset: Dataset[Any]) -> None:
    assert _array(dataset) is None


def test_some_of_a_users_images_are_read_by_their_index() -> None:
    users = Users([(image, index % 2) for index, image in enumerate(COLOUR)])
    images = from_dataset(Subset(users, [4, 0, 3]))
    assert images.pixels is not None
    assert torch.equal(images.pixels, COLOUR[[4, 0, 3]])
    assert images.labels.tolist() == [0, 0, 1]


def test_grey_images_among_colours_have_their_value_in_each_channel() -> None:
    colour, grey = np.full((3, 2, 3), 7, np.uint8), np.arange(6, dtype=np.uint8).reshape(3, 2)
    thin = np.full((1, 2, 3), 9, np.uint8)
    images = from_dataset(Users([(Image.fromarray(colour), 0), (Image.fromarray(grey), 0)]))
    assert images.shape == (3, 3, 2)
    assert images.pixels is not None
    assert images.pixels[0].eq(7).all()
    assert images.pixels[1].tolist() == [grey.tolist()] * 3
    with pytest.raises(ValueError, match=r"example 1 has shape \(3, 1, 2\), but the first image \(3, 3, 2\)"):
        from_dataset(Users([(Image.fromarray(colour), 0), (Image.fromarray(thin), 0)]))


def test_the_statistics_of_many_images_are_those_of_4096_evenly_spaced_ones() -> None:
    tones = np.arange(8191) % 2 * 200  # of these the even ones: 0, 2, 4, ... by rounding down
    tones[-1] = 255
    pixels = torch.from_numpy(tones.astype(np.uint8))[:, None, None, None].expand(-1, 1, 2, 2)
    images = from_dataset(TensorDataset(pixels, torch.zeros(8191, dtype=torch.int64)))
    chosen = tones[[i * 8191 // 4096 for i in range(4096)]] / 255
    assert images.mean[0] == pytest.approx(chosen.mean())
    assert images.std[0] == pytest.approx(chosen.std())
    assert chosen.mean() != pytest.approx(tones.mean() / 255, rel=1e-3)


@pytest.mark.parametrize(("tones", "std"), [([0, 0, 1, 1], 0.5 / 255), ([9, 9, 9, 9], 1.0)])
def test_a_channel_without_contrast_is_centred_and_not_blown_up(tones: list[int], std: float) -> None:
    pixels = torch.tensor(tones, dtype=torch.uint8)[:, None, None, None].expand(-1, 1, 2, 2)
    images = from_dataset(TensorDataset(pixels, torch.zeros(4, dtype=torch.int64)))
    assert images.std[0] == pytest.approx(std)
    assert images.mean[0] == pytest.approx(np.mean(tones) / 255)


# ---- files ----


@pytest.mark.parametrize("name", ["samples", "_samples", "_image_files", "_images"])
def test_the_files_of_a_dataset_are_those_of_its_lists_one_per_example(name: str) -> None:
    files = [Path("a.png"), Path("b.png")]
    for entries in (files, list(map(str, files)), [(file, 0) for file in files], [[f, 0] for f in files]):
        users = Users([0, 0], **{name: entries})
        assert _files(users) == ["a.png", "b.png"]
        assert _files(Subset(users, [1])) == ["b.png"]
    for other in ([Path("a.png")], [], "ab", [1, 2], [(1, 0), (2, 0)]):
        users = Users([0, 0], **{name: other})
        assert _files(users) == []
        assert _files(Subset(users, [1])) == []


# ---- labels and classes ----


@pytest.mark.parametrize("label", [0, 1, 126, 127, 200, 1000, 2**62, 2**63 - 1, -1, -(2**63), True, 5.0])
def test_a_label_is_any_whole_number_that_64_bits_hold(label: Any) -> None:
    for value in (label, np.array(label), np.array([label]), torch.tensor([[label]])):
        assert label_of(value, "example 3") == int(label)


@pytest.mark.parametrize("label", [2**63, 1e30, -1e19, -1e30, 0.5, np.nan, np.inf, "3", None, [0, 1], []])
def test_other_labels_are_refused_by_name(label: Any) -> None:
    with pytest.raises(ValueError, match="^example 3 has the label .*; give integers 0, 1, ... per class$"):
        label_of(label, "example 3")


@pytest.mark.parametrize("name", ["targets", "labels", "_labels"])
@pytest.mark.parametrize(
    "values", [[2, 0, 1], np.array([[2], [0], [1]]), torch.tensor([2, 0, 1]), (2, 0, 1)], ids=repr
)
def test_labels_are_taken_from_a_list_without_reading_items(name: str, values: Any) -> None:
    users = Users([None] * 3, **{name: values})
    assert labels(users, "ours").tolist() == [2, 0, 1]
    assert labels(Subset(users, [2, 0]), "ours").tolist() == [1, 2]
    assert users.reads == 0


@pytest.mark.parametrize("name", ["samples", "_samples"])
def test_labels_are_taken_from_pairs_of_file_and_label(name: str) -> None:
    users = Users([None] * 2, **{name: [("a.png", 1), ("b.png", 0)]})
    assert labels(users, "ours").tolist() == [1, 0]
    assert users.reads == 0


@pytest.mark.parametrize(
    "attributes",
    [
        {},
        {"targets": [0, 0, 0], "target_transform": lambda label: 2 - label},
        {"targets": [0]},  # of another length
        {"targets": [0.5, 1.5, 2.5]},
        {"targets": [[0], [1, 2], [3]]},
        {"targets": [[0, 0, 0], [1, 1, 1], [2, 2, 2]]},
        {"targets": None},
        {"labels": lambda: [0, 0, 0]},
        {"samples": [("a.png", 0, 1)] * 3},
        {"samples": ["a.png"] * 3},
    ],
)
def test_labels_without_a_list_of_integers_are_read_from_the_items(attributes: dict[str, Any]) -> None:
    users = Users([(None, 2), (None, 1), (None, 0)], **attributes)
    assert labels(users, "ours").tolist() == [2, 1, 0]
    assert users.reads == 3


@pytest.mark.parametrize(
    ("classes", "names"),
    [
        (["cat", "dog", "owl"], ("cat", "dog", "owl")),
        (("cat", 1), ("cat", "1")),
        ([], ()),
        (None, ()),
        ({"cat": 0}, ()),
        ("cats", ()),
    ],
)
def test_names_of_classes_are_those_of_the_list_classes(classes: Any, names: tuple[str, ...]) -> None:
    users = Users([None], classes=classes)
    assert class_names(users) == names
    assert class_names(Subset(Subset(users, [0]), [0])) == names
    assert class_names(Users([None])) == ()


def test_classes_without_names_are_numbered_up_to_the_highest_label() -> None:
    pixels = torch.zeros(3, 1, 2, 2, dtype=torch.uint8)
    assert from_dataset(TensorDataset(pixels, torch.tensor([0, 3, 1]))).class_names == ("0", "1", "2", "3")
