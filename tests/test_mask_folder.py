"""Folders of images and masks: layouts, centres, classes, binary masks, and files that do not fit."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from fedddp.data.catalog import open_dataset
from fedddp.data.datasets import DataConfig, load

ROOT = Path("pairs")


def write(image: str, mask: str | None = None, values: Any = ((0, 1), (2, 255)), grey: int = 100) -> None:
    """Write an RGB image and its mask below the data root."""
    values = np.array(values, np.uint8)
    for name, picture in (
        (image, Image.new("RGB", values.shape[::-1], (grey, grey, grey))),
        (mask or image.replace("images", "masks"), Image.fromarray(values)),
    ):
        (ROOT / name).parent.mkdir(parents=True, exist_ok=True)
        picture.save(ROOT / name)


def opened(**options: Any) -> tuple[Any, Any]:
    return open_dataset("mask_folder", str(ROOT), target="mask", **options)


def greys(dataset: Any) -> list[int]:
    """Return the first value of every image."""
    return [int(dataset[i][0][0, 0, 0]) for i in range(len(dataset))]


def split(*folders: str) -> None:
    for number, folder in enumerate(folders):
        write(str(Path(folder, "images", "0.png")), grey=number)


# ---- layouts ----


def test_items_are_an_image_and_its_mask() -> None:
    split("train", "val")
    train, test = opened()
    image, mask = train[0]
    assert (image.dtype, image.tolist()) == (torch.uint8, [[[0, 0], [0, 0]]] * 3)
    assert (mask.dtype, mask.tolist()) == (torch.uint8, [[0, 1], [2, 255]])
    assert train.classes == test.classes == ["background", "1", "2"]
    assert (greys(test), train.ids, train.centres) == ([1], None, [])
    assert (train.images, train.masks) == (["pairs/train/images/0.png"], ["pairs/train/masks/0.png"])


@pytest.mark.parametrize("name", ["masks", "labels", "annotations", "segmentations"])
@pytest.mark.parametrize("ending", ["", "_mask", "_seg"])
def test_masks_have_the_name_of_their_image(name: str, ending: str) -> None:
    for number in range(4):
        write(f"images/{number}.jpg", f"{name}/{number}{ending}.png", [[number % 2, 1]], grey=10 * number)
    train, test = opened(test_fraction=0.5)
    assert sorted(greys(train) + greys(test)) == [0, 10, 20, 30]
    for dataset in (train, test):
        for i, grey in enumerate(greys(dataset)):
            assert dataset[i][1].tolist() == [[grey // 10 % 2, 1]]


def test_masks_of_folders_in_folders_have_the_same_path() -> None:
    write("images/a/1.png", values=[[0, 1]], grey=1)
    write("images/b/1.png", values=[[1, 1]], grey=2)
    write("images/.hidden/1.png")
    train, test = opened(test_fraction=0.5)
    assert (len(train), len(test)) == (1, 1)
    for part in (train, test):
        assert part[0][1].tolist() == {1: [[0, 1]], 2: [[1, 1]]}[greys(part)[0]]


def test_centres_that_are_split_are_natural_clients() -> None:
    split("b/train", "b/test", "a/train", "a/val")
    write("b/train/images/1.png", grey=9)
    train, test = opened()
    assert (train.ids.tolist(), test.ids.tolist()) == (["a", "b", "b"], ["a", "b"])
    assert (greys(train), greys(test)) == ([2, 0, 9], [3, 1])
    assert train.centres == test.centres == ["a", "b"]


def test_centres_that_are_not_split_are_split_each() -> None:
    for centre, count in (("a", 10), ("b", 5), ("c", 20)):
        for number in range(count):
            write(f"{centre}/images/{number}.png")
    train, test = opened(test_fraction=0.2)
    owners = train.dataset.ids
    assert [owners[test.indices].tolist().count(centre) for centre in "abc"] == [2, 1, 4]
    assert sorted(train.indices + test.indices) == list(range(35))
    again = opened(test_fraction=0.2)
    assert again[1].indices == test.indices


def test_a_folder_is_loaded_with_masks_and_owners() -> None:
    split("a/train", "a/val", "b/train", "b/val")
    train, test = load(DataConfig(dataset="mask_folder", root=str(ROOT)), target="mask")
    assert train.pixels is not None
    assert train.pixels.shape == (2, 4, 2, 2)
    assert train.pixels[:, 3].tolist() == [[[0, 1], [2, 255]]] * 2
    assert test.ids is not None
    assert test.ids.tolist() == [0, 1]
    assert train.owners == ("a", "b")


def test_images_of_several_bands_and_16_bits_are_scaled_by_the_range() -> None:
    bands = np.arange(5 * 16 * 20).reshape(5, 16, 20) % 251
    for part in ("train", "val"):
        for name in ("images", "masks"):
            (ROOT / part / name).mkdir(parents=True)
        tifffile.imwrite(ROOT / part / "images/0.tif", (bands * 10).astype(np.uint16))
        np.save(ROOT / part / "masks/0.npy", bands[0] % 3)
    image, mask = opened(value_range=(0, 2550))[0][0]
    np.testing.assert_array_equal(image.numpy(), bands)
    np.testing.assert_array_equal(mask.numpy(), bands[0] % 3)
    with pytest.raises(ValueError, match="^pairs/train/images/0.tif has 16-bit values up to 2500"):
        opened()[0][0]


def test_folders_may_be_written_in_capitals() -> None:
    write("a/Images/0.png", "a/MASKS/0.png")
    write("b/images/0.png", "b/Labels/0_seg.png", grey=7)
    train, test = opened(test_fraction=0.4)
    assert train.dataset.centres == ["a", "b"]
    assert sorted(greys(train) + greys(test)) == [7, 100]
    (ROOT / "a/images").mkdir()
    with pytest.raises(
        ValueError, match="^data.root: pairs/a has Images/ and images/; give one; mask_folder"
    ):
        opened()


def test_a_folder_that_is_no_centre_is_named(caplog: pytest.LogCaptureFixture) -> None:
    for name in ("a/images/0.png", "b/images/0.png", "c/pictures/0.png"):
        write(name, "b/masks/0.png" if name.startswith("c") else None)
    (ROOT / "notes").mkdir()
    with caplog.at_level(logging.INFO, "fedddp"):
        opened()
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("INFO", "pairs: 2 centres, a, b"),
        ("WARNING", "pairs: not read as centres, for lack of a folder images/: c"),
    ]


def test_val_is_tested_where_there_is_test_too(caplog: pytest.LogCaptureFixture) -> None:
    split("train", "val", "test")
    with caplog.at_level(logging.INFO, "fedddp"):
        assert greys(opened()[1]) == [1]
    assert [r.getMessage() for r in caplog.records] == ["pairs: tests on val/; test/ is not read"]
    caplog.clear()
    (ROOT / "x").mkdir()
    for part in ("train", "val", "test"):
        (ROOT / part).rename(ROOT / "x" / part)
    with caplog.at_level(logging.INFO, "fedddp"):
        assert greys(opened()[1]) == [1]
    assert caplog.records[1].getMessage() == "pairs: tests on val/ of x; test/ is not read"


def test_the_only_image_of_a_centre_is_not_tested() -> None:
    for centre in "abcdefgh":
        write(f"{centre}/images/0.png", values=[[0, 1]])
    for number in range(5):
        write(f"i/images/{number}.png", values=[[0, 1]])
    train, test = opened(test_fraction=0.2)
    assert test.dataset.ids[test.indices].tolist() == ["i"]
    assert sorted(train.indices + test.indices) == list(range(13))


# ---- classes ----


def test_classes_are_those_of_all_masks() -> None:
    write("train/images/0.png", values=[[0, 1]])
    write("val/images/0.png", values=[[0, 3]])
    assert opened()[0].classes == ["background", "1", "2", "3"]


def test_classes_have_the_names_in_a_file() -> None:
    split("train", "val")
    (ROOT / "classes.txt").write_text("road\ncar \nsky\nunused\n\n")
    assert opened()[1].classes == ["road", "car", "sky", "unused"]


@pytest.mark.parametrize("names", [None, "nothing\nlesion\n"])
def test_masks_of_0_and_255_are_of_two_classes(names: str | None, caplog: pytest.LogCaptureFixture) -> None:
    write("train/images/0.png", values=[[0, 255]])
    write("val/images/0.png", values=[[0, 0]])
    if names:
        (ROOT / "classes.txt").write_text(names)
    with caplog.at_level(logging.INFO, "fedddp"):
        train, test = opened()
    assert (train[0][1].tolist(), test[0][1].tolist()) == ([[0, 1]], [[0, 0]])
    assert train.classes == (["nothing", "lesion"] if names else ["background", "1"])
    (record,) = caplog.records
    assert record.getMessage() == "pairs: masks of 0 and 255 only: 255 is class 1"


def test_255_is_ignored_where_a_mask_has_it_beside_another_class() -> None:
    write("train/images/0.png", values=[[0, 1, 255]])
    write("train/images/1.png", values=[[0, 1, 1]])
    write("val/images/0.png", values=[[0, 255, 255]])
    train, test = opened()
    assert (train[0][1].tolist(), test[0][1].tolist()) == ([[0, 1, 255]], [[0, 255, 255]])
    assert train.classes == ["background", "1"]


def test_255_is_ignored_where_there_are_more_classes_than_two() -> None:
    write("train/images/0.png", values=[[0, 255]])
    write("train/images/1.png", values=[[1, 2]])
    write("val/images/0.png", values=[[0, 0]])
    assert opened()[0][0][1].tolist() == [[0, 255]]


def test_a_centre_of_0_and_255_beside_centres_of_0_and_1_has_two_classes(
    caplog: pytest.LogCaptureFixture,
) -> None:
    for centre, high in (("a", 1), ("b", 255), ("c", 0)):
        for number in range(2):
            write(f"{centre}/images/{number}.png", values=[[0, high * number]])
    with caplog.at_level(logging.INFO, "fedddp"):
        train, test = load(DataConfig(dataset="mask_folder", root=str(ROOT), test_fraction=0.5), "mask")
    for part, pixels in ((train, train.pixels), (test, test.pixels)):
        assert part.class_names == ("background", "1")
        assert pixels is not None
        assert int(pixels[:, -1].max()) <= 1
    assert train.pixels is not None
    assert test.pixels is not None
    foreground = [int(pixels[:, -1].sum()) for pixels in (train.pixels, test.pixels)]
    assert sum(foreground) == 2  # one pixel in a and one in b
    assert [record.getMessage() for record in caplog.records] == [
        "pairs: 3 centres, a, b, c",
        "pairs/b/masks: masks of 0 and 255 only, beside others of 0 and 1: 255 is class 1",
    ]


def test_a_part_of_0_and_255_beside_one_of_0_and_1_has_two_classes() -> None:
    write("train/images/0.png", values=[[0, 255]])
    write("val/images/0.png", values=[[0, 1]])
    train, test = opened()
    assert (train[0][1].tolist(), test[0][1].tolist()) == ([[0, 1]], [[0, 1]])
    assert (train.binary, test.binary) == ({""}, frozenset())


@pytest.mark.parametrize(
    ("masks", "files"),
    [
        # In one folder: is 255 the 1 of other masks, or does it not count?
        ({"a/images/0.png": [[0, 1]], "a/images/1.png": [[0, 255]]}, ("a/masks/1.png", "a/masks/0.png")),
        # Another centre has 255 for what does not count, or more classes.
        (
            {"a/images/0.png": [[0, 255]], "b/images/0.png": [[1, 255]]},
            ("a/masks/0.png", "b/masks/0.png"),
        ),
        ({"a/images/0.png": [[0, 255]], "b/images/0.png": [[0, 2]]}, ("a/masks/0.png", "b/masks/0.png")),
    ],
)
def test_255_that_could_be_a_class_or_not_is_refused(masks: dict[str, Any], files: tuple[str, str]) -> None:
    for name, values in masks.items():
        write(name, values=values)
    pattern = f"^data.root=pairs: pairs/{files[0]} has 0 and 255 only, but pairs/{files[1]} has other classes"
    with pytest.raises(ValueError, match=pattern) as caught:
        opened(test_fraction=0.5)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("memory", ["device", "stream"])
def test_decoded_masks_follow_masks_that_are_written_again(memory: Any) -> None:
    def foreground() -> int:
        images, _ = load(DataConfig(dataset="mask_folder", root=str(ROOT), memory=memory), "mask")
        if images.pixels is not None:
            return int((images.pixels[:, -1] == 1).sum())
        assert images.source is not None
        return sum(int((mask == 1).sum()) for mask in images.source.read_masks())

    write("train/images/0.png", values=[[0, 255]])
    write("val/images/0.png", values=[[1, 255]])  # so 255 does not count
    assert foreground() == 0
    write("val/images/0.png", values=[[0, 255]])  # the files of train/ stay as they are
    assert foreground() == 1
    Image.fromarray(np.array([[255, 255]], np.uint8)).save(ROOT / "train/masks/0.png")  # one mask alone
    assert foreground() == 2


def test_values_with_gaps_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    write("train/images/0.png", values=[[0, 3]])
    write("val/images/0.png", values=[[0, 0]])
    assert len(opened()[0].classes) == 4
    (record,) = caplog.records
    assert record.getMessage().startswith(
        "pairs: masks have the values 0, 3, so that there are 4 classes, of which 2 have no pixel; number"
    )


def test_values_with_more_gaps_than_values_are_refused() -> None:
    write("train/images/0.png", values=[[0, 127]])
    write("val/images/0.png", values=[[0, 0]])
    with pytest.raises(
        ValueError,
        match="^data.root=pairs: masks have the values 0, 127, which would be 128 classes, of which 126 have "
        "no pixel; number them 0, 1, 2, ..., or name all classes in classes.txt$",
    ):
        opened()
    (ROOT / "classes.txt").write_text("x\n" * 128)
    assert len(opened()[0].classes) == 128


def test_255_classes_are_the_most() -> None:
    split("train", "val")
    (ROOT / "classes.txt").write_text("x\n" * 255)
    write("train/images/0.png", values=[[0, 254]])
    assert opened()[0][0][1].tolist() == [[0, 254]]


# ---- what does not fit ----


def spoil_name(name: str) -> None:
    (ROOT / name).rename(ROOT / name.replace("0.png", "other.png"))


def spoil_size() -> None:
    Image.new("L", (3, 2)).save(ROOT / "train/masks/0.png")


def spoil_mode() -> None:
    Image.new("RGB", (2, 2)).save(ROOT / "train/masks/0.png")


def spoil_content() -> None:
    (ROOT / "val/masks/0.png").write_bytes(b"no picture")


def same_name() -> None:
    Image.new("RGB", (2, 2)).save(ROOT / "train/images/0.bmp")


def two_masks() -> None:
    Image.new("L", (2, 2)).save(ROOT / "train/masks/0_seg.png")


def value(number: int) -> None:
    Image.fromarray(np.full((2, 2), number, np.int32)).save(ROOT / "train/masks/0.tif")
    (ROOT / "train/masks/0.png").unlink()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda: spoil_name("train/masks/0.png"),
            "pairs/train/images/0.png has no mask in pairs/train/masks; give",
        ),
        (lambda: spoil_name("train/images/0.png"), "pairs/train/images/other.png has no mask in"),
        (
            lambda: write("train/masks/1.png"),
            "pairs/train/masks/1.png has no image in pairs/train/images; add it",
        ),
        (
            spoil_size,
            "pairs/train/masks/0.png is 2x3 pixels, but its image pairs/train/images/0.png 2x2; give both",
        ),
        (spoil_mode, r"pairs/train/masks/0.png is a mask of colours \(mode RGB\)"),
        (spoil_content, "pairs/val/masks/0.png cannot be read as an image"),
        (same_name, "pairs/train/images/0.bmp and pairs/train/images/0.png have one name; keep one"),
        (two_masks, "pairs/train/images/0.png has 2 masks, 0 and 0_seg, in pairs/train/masks; give one"),
        (lambda: value(256), "pairs/train/masks/0.tif has the value 256; classes are 0 to 254, and 255"),
        (lambda: value(-1), "pairs/train/masks/0.tif has the value -1; classes are"),
        (
            lambda: (ROOT / "val/masks").rename(ROOT / "val/other"),
            "data.root: pairs/val has no folder masks beside",
        ),
        (
            lambda: Path(ROOT, "val", "labels").mkdir(),
            "data.root: pairs/val has masks/ and labels/ beside images/; give",
        ),
        (
            lambda: (ROOT / "val/images").rename(ROOT / "val/x"),
            "data.root: pairs/val has no folder images; mask_",
        ),
        (
            lambda: (ROOT / "val").rename(ROOT / "x"),
            "data.root=pairs has no folder val or test; mask_folder reads",
        ),
        (
            lambda: (ROOT / "classes.txt").write_text("a\nb\n"),
            "pairs/classes.txt has 2 names, but masks have the v",
        ),
        (
            lambda: (ROOT / "classes.txt").write_text("a\n" * 256),
            "pairs/classes.txt has 256 names; masks have at m",
        ),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(spoil: Any, message: str) -> None:
    split("train", "val")
    spoil()
    with pytest.raises(ValueError, match=f"^{message}") as caught:
        opened()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("folders", "fraction", "message"),
    [
        (("",), 0.0, "data.root=pairs is not split into train and test; set data.test_fraction"),
        (
            ("", "a"),
            0.2,
            "data.root=pairs has images/, and the folder a/ with images/ of its own; mask_folder",
        ),
        (
            ("a", "b/train", "b/val"),
            0.2,
            "data.root=pairs: the centre a has no folder train, which others have",
        ),
        (("a/train",), 0.2, "data.root=pairs/a has no folder val or test; split all centres"),
        (
            ("a/b/c",),
            0.2,
            "data.root=pairs has no folder images; mask_folder reads images/NAME and masks/NAME",
        ),
    ],
)
def test_other_layouts_are_refused(folders: tuple[str, ...], fraction: float, message: str) -> None:
    split(*folders)
    with pytest.raises(ValueError, match=f"^{message}"):
        opened(test_fraction=fraction)


def test_folders_without_images_are_refused() -> None:
    for name in ("images", "masks"):
        (ROOT / name).mkdir(parents=True)
    with pytest.raises(ValueError, match="^data.root: pairs/images has no images"):
        opened()
    with pytest.raises(ValueError, match="^data.root=nowhere is not a folder"):
        open_dataset("mask_folder", "nowhere", target="mask")


def test_masks_of_the_background_only_are_refused() -> None:
    write("images/0.png", values=[[0, 0]])
    with pytest.raises(ValueError, match="^data.root=pairs: all masks have the value 0 only; give masks"):
        opened()


def test_a_mask_that_changes_later_is_refused_when_it_is_read() -> None:
    split("train", "val")
    train, _ = opened()
    Image.fromarray(np.array([[0, 7], [0, 0]], np.uint8)).save(ROOT / "train/masks/0.png")
    with pytest.raises(
        ValueError, match="^pairs/train/masks/0.png has the value 7, but .* 3 classes; correct"
    ):
        train[0]
    spoil_size()
    with pytest.raises(ValueError, match="^pairs/train/masks/0.png is 2x3 pixels, but its image"):
        train[0]
