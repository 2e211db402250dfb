"""Image folders: which files are taken, which are skipped and logged, and folders that are not split."""

from __future__ import annotations

import logging
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from fedddp.data.catalog import open_dataset
from fedddp.data.datasets import DataConfig, Images, load
from fedddp.data.image_folder import ImageFolder

ROOT = Path("images")


def write(name: str, value: int = 100, size: int = 4) -> Path:
    """Write a grey image below the data root; a pixel of it has the value."""
    path = ROOT / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (size, size), (value, value, value)).save(path)
    return path


def write_parts(*names: str) -> None:
    for part in ("train", "val"):
        for name in names:
            write(f"{part}/{name}/0.png")


def data(**fields: Any) -> DataConfig:
    return DataConfig(dataset="image_folder", root=str(ROOT), **fields)


def values(images: Images) -> list[int]:
    """Return the value of the first pixel of every image."""
    assert images.pixels is not None
    return images.pixels[:, 0, 0, 0].tolist()


# ---- what is taken ----


def test_hidden_folders_and_files_are_no_classes_and_no_images() -> None:
    write_parts("cat", "dog")
    write("train/.ipynb_checkpoints/0-checkpoint.png")
    (ROOT / "train/cat/._0.png").write_bytes(b"what macOS leaves beside a file")
    train, _ = load(data())
    assert train.class_names == ("cat", "dog")
    assert train.labels.tolist() == [0, 1]


def test_hidden_folders_below_a_class_are_skipped() -> None:
    write_parts("cat", "dog")
    write("train/cat/.ipynb_checkpoints/0-checkpoint.png")
    assert load(data())[0].labels.tolist() == [0, 1]


@pytest.mark.parametrize("ending", ["gif", "jfif", "jp2", "PNG", "tiff", "bmp", "webp"])
def test_every_ending_that_pillow_reads_is_an_image(ending: str) -> None:
    write_parts("cat", "dog")
    write(f"train/cat/1.{ending}", 200)
    train, _ = load(data())
    assert train.labels.tolist() == [0, 0, 1]
    assert values(train)[1] == pytest.approx(200, abs=2)


def test_sixteen_bit_and_transparent_files_keep_their_values() -> None:
    write_parts("cat", "dog")
    Image.fromarray(np.full((4, 4), 151 * 257, np.uint16)).save(ROOT / "train/cat/1.png")
    Image.new("RGBA", (4, 4), (200, 200, 200, 0)).save(ROOT / "train/cat/2.png")
    train, _ = load(data())
    assert train.shape == (3, 4, 4)
    assert values(train) == [100, 151, 0, 100]


def test_skipped_files_are_logged_with_their_endings_and_counts(caplog: pytest.LogCaptureFixture) -> None:
    write_parts("cat", "dog")
    for name in ("cat/b.txt", "dog/a.TXT", "dog/c.txt", "a.xyz", "dog/b.xyz", "dog/README", "cat/.hidden"):
        (ROOT / "train" / name).write_text("no image")
    load(data())
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage() == (
        "images/train: 2 images; skipped 6 files that are no images by their endings "
        "(3 × .txt, 2 × .xyz, 1 × no ending)"
    )


def test_nothing_is_logged_where_every_file_is_an_image(caplog: pytest.LogCaptureFixture) -> None:
    write_parts("cat", "dog")
    load(data())
    load(data())  # the folder of decoded pixels is hidden
    assert not caplog.records


# ---- classes of the test set ----


def test_a_class_missing_in_the_test_folder_is_logged_and_labels_go_by_name(
    caplog: pytest.LogCaptureFixture,
) -> None:
    write_parts("ant", "bee", "cow")
    (ROOT / "val/bee/0.png").unlink()
    (ROOT / "val/bee").rmdir()
    train, test = load(data())
    assert test.labels.tolist() == [0, 2]
    assert test.classes == train.classes == 3
    (record,) = caplog.records
    assert record.getMessage() == "images/val has no folder for the class bee: it is not tested"


def test_a_class_whose_test_folder_is_empty_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    write_parts("ant", "bee")
    (ROOT / "val/bee/0.png").unlink()
    load(data())
    (record,) = caplog.records
    assert "bee" in record.getMessage()


def test_a_class_that_only_the_test_folder_has_is_refused() -> None:
    write_parts("ant", "bee")
    write("val/cow/0.png")
    with pytest.raises(
        ValueError, match="^data.root=images/val: class 'cow' is not in the training set; add"
    ):
        load(data())


def test_the_test_folder_may_be_called_test() -> None:
    write_parts("ant", "bee")
    (ROOT / "val").rename(ROOT / "test")
    _, test = load(data())
    assert test.labels.tolist() == [0, 1]


# ---- folders that are not split ----


def write_unsplit(counts: tuple[int, ...] = (20, 40)) -> None:
    for label, count in enumerate(counts):
        for number in range(count):
            write(f"class{label}/{number:02}.png", 100 * label + number)


def test_a_folder_that_is_not_split_is_split_by_class() -> None:
    write_unsplit()
    train, test = load(data(test_fraction=0.25))
    assert np.bincount(test.labels).tolist() == [5, 10]
    assert sorted(values(train) + values(test)) == [*range(20), *range(100, 140)]
    assert all(value // 100 == label for value, label in zip(values(test), test.labels, strict=True))
    assert values(test) != [*range(0, 20, 4), *range(100, 140, 4)]  # drawn, not every fourth


def test_the_split_is_the_same_every_time_and_wherever_the_folder_lies() -> None:
    write_unsplit()
    first = values(load(data(test_fraction=0.25))[1])
    torch.manual_seed(1)
    np.random.seed(1)
    assert values(load(data(test_fraction=0.25, memory="device"))[1]) == first
    ROOT.rename("elsewhere")
    moved = load(DataConfig(dataset="image_folder", root="elsewhere", test_fraction=0.25))
    assert values(moved[1]) == first


@pytest.mark.parametrize("fraction", [0.1, 0.2, 0.3, 0.5])
def test_every_class_gives_the_fraction_up_to_one_image(fraction: float) -> None:
    write_unsplit((7, 11, 23))
    train, test = open_dataset("image_folder", str(ROOT), test_fraction=fraction)
    labels = [[dataset[i][1] for i in range(len(dataset))] for dataset in (train, test)]  # type: ignore[arg-type]
    tested = np.bincount(labels[1], minlength=3)
    np.testing.assert_array_equal(np.bincount(labels[0], minlength=3) + tested, [7, 11, 23])
    assert (abs(tested - fraction * np.array([7, 11, 23])) <= 1).all()


def test_a_folder_that_is_not_split_needs_a_fraction() -> None:
    write_unsplit((2, 2))
    with pytest.raises(
        ValueError, match="^data.root=images is not split into train and test; set data.test_f"
    ):
        load(data(test_fraction=0.0))


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        ([], "data.root=images has no class folders; put images in CLASS folders"),
        (["cat", "dog"], "data.root=images has no images; put them in CLASS folders, such as cat/1.png"),
        (["train/cat"], "data.root=images has no folder val or test; image_folder reads train/CLASS/IMAGE"),
        (["val/cat"], "data.root=images has no folder train; image_folder reads train/CLASS/IMAGE"),
        ([".hidden"], "data.root=images has no class folders"),
    ],
)
def test_folders_without_images_are_refused(folders: list[str], message: str) -> None:
    ROOT.mkdir()
    for name in folders:
        (ROOT / name).mkdir(parents=True)
    with pytest.raises(ValueError, match=f"^{message}"):
        load(data())


def test_classes_are_in_the_order_of_their_names() -> None:
    write_unsplit((1, 1, 1))
    (ROOT / "class0").rename(ROOT / "zebra")
    assert ImageFolder(ROOT).classes == ["class1", "class2", "zebra"]


# ---- centres ----


def both_sets(**options: Any) -> tuple[Any, Any]:
    return open_dataset("image_folder", str(ROOT), **options)


def listed(dataset: Any) -> list[tuple[str, str]]:
    """Return the centre and the class of every image of a set."""
    whole = getattr(dataset, "dataset", dataset)
    chosen = getattr(dataset, "indices", range(len(whole)))
    return [(str(whole.ids[i]), whole.classes[dataset[n][1]]) for n, i in enumerate(chosen)]


def test_centres_that_are_split_are_natural_clients_with_the_union_of_classes() -> None:
    for name in (
        "b/train/cow/0",
        "b/train/cow/1",
        "b/test/cow/0",
        "a/train/ant/0",
        "a/train/cow/0",
        "a/val/ant/0",
    ):
        write(f"{name}.png", 10)
    train, test = both_sets()
    assert train.classes == test.classes == ["ant", "cow"]
    assert train.centres == test.centres == ["a", "b"]
    assert listed(train) == [("a", "ant"), ("a", "cow"), ("b", "cow"), ("b", "cow")]
    assert listed(test) == [("a", "ant"), ("b", "cow")]
    images, tested = load(data())
    assert images.ids is not None
    assert tested.ids is not None
    assert (images.ids.tolist(), tested.ids.tolist()) == ([0, 0, 1, 1], [0, 1])
    assert (images.labels.tolist(), tested.labels.tolist()) == ([0, 1, 1, 1], [0, 1])


def test_centres_that_are_not_split_are_split_within_each_class_of_each() -> None:
    for centre, count in (("a", 20), ("b", 5), ("c", 40)):
        for name in ("ant", "cow"):
            for number in range(count):
                write(f"{centre}/{name}/{number}.png", number)
    train, test = both_sets(test_fraction=0.2)
    pairs = [(centre, name) for centre in "abc" for name in ("ant", "cow")]
    assert [listed(test).count(pair) for pair in pairs] == [4, 4, 1, 1, 8, 8]
    assert [listed(train).count(pair) for pair in pairs] == [16, 16, 4, 4, 32, 32]
    assert not set(train.indices) & set(test.indices)


def test_a_class_that_only_the_test_images_of_a_centre_have_is_refused() -> None:
    for name in ("a/train/ant/0", "a/test/ant/0", "b/train/ant/0", "b/test/bee/0"):
        write(f"{name}.png")
    with pytest.raises(ValueError, match="^data.root=images: class 'bee' is not in the training set"):
        both_sets()


def test_images_of_classes_and_of_centres_together_are_refused() -> None:
    write("cat/0.png")
    write("berlin/dog/0.png")
    with pytest.raises(
        ValueError, match="^data.root=images has images in cat/, and in folders of berlin/; "
    ) as e:
        both_sets()
    assert "CENTRE/CLASS/IMAGE" in str(e.value)


def test_class_folders_may_have_folders_beside_their_images() -> None:
    for name in ("cat/0", "cat/more/1", "dog/0"):
        write(f"{name}.png")
    train, test = both_sets(test_fraction=0.4)
    assert train.dataset.classes == ["cat", "dog"]
    assert train.dataset.ids is None
    assert len(train) + len(test) == 3


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("a/train/x/0", "a/test/x/0", "b/x/0"), "data.root=images: the centre b has no folder train, which"),
        (
            ("a/train/x/0", "a/test/x/0", "b/train/x/0"),
            "data.root=images/b has no folder val or test; split all",
        ),
        (
            ("a/train/x/0", "a/test/0"),
            "data.root=images/a/test has no class folders; put images in CLASS folders",
        ),
    ],
)
def test_centres_that_are_split_in_part_are_refused(names: tuple[str, ...], message: str) -> None:
    for name in names:
        write(f"{name}.png")
    with pytest.raises(ValueError, match=f"^{message}"):
        both_sets()


def test_classes_that_may_be_taken_for_centres_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    for name in ("cat", "dog"):
        for year in ("2019", "2020"):
            for number in range(2):
                write(f"{name}/{year}/{number}.png")
    train, _ = both_sets(test_fraction=0.5)
    assert train.dataset.classes == ["2019", "2020"]
    (record,) = caplog.records
    assert (record.levelname, record.getMessage()) == (
        "WARNING",
        "images is read as CENTRE/CLASS/IMAGE: 2 centres, cat, dog; 2 classes, 2019, 2020; if the first are "
        "classes, move the images right into their folders",
    )


def test_each_centre_has_an_image_to_train_on() -> None:
    for centre in map(str, range(20)):  # two classes of an image each: by chance both would be tested
        for name in ("ant", "cow"):
            write(f"{centre}/{name}/0.png")
    train, test = both_sets(test_fraction=0.7)
    assert {centre for centre, _ in listed(train)} == set(map(str, range(20)))
    assert len(train) + len(test) == 40
    assert 15 <= len(test) <= 20


def test_val_is_tested_where_there_is_test_too(caplog: pytest.LogCaptureFixture) -> None:
    for part, value in (("train", 10), ("val", 20), ("test", 30)):
        write(f"{part}/cat/0.png", value)
    with caplog.at_level(logging.INFO, "fedddp"):
        assert both_sets()[1][0][0].unique().tolist() == [20]
    assert [r.getMessage() for r in caplog.records] == ["images: tests on val/; test/ is not read"]
    caplog.clear()
    (ROOT / "test").rename(ROOT / "other")  # not read either, as before
    both_sets()
    assert not caplog.records


def test_a_pdf_file_is_no_image(caplog: pytest.LogCaptureFixture) -> None:
    write_parts("cat", "dog")
    (ROOT / "train/cat/notes.pdf").write_text("no image")
    assert len(load(data())[0]) == 2
    assert "skipped 1 files that are no images by their endings (1 × .pdf)" in caplog.text


def test_centres_that_are_not_split_need_a_fraction() -> None:
    write("a/x/0.png")
    with pytest.raises(
        ValueError, match="^data.root=images is not split into train and test; set data.test_f"
    ):
        both_sets(test_fraction=0.0)


# ---- several bands, 16 bits ----


def test_bands_of_arrays_and_tiff_files_are_kept() -> None:
    bands = np.arange(13 * 16 * 20).reshape(13, 16, 20) % 251
    for part in ("train", "val"):
        for name in ("x", "y"):
            (ROOT / part / name).mkdir(parents=True)
            np.save(ROOT / part / name / "0.npy", (bands * 10).astype(np.uint16))
            tifffile.imwrite(ROOT / part / name / "1.tif", (bands * 10).astype(np.uint16))
    train, _ = load(data(value_range=[0, 2550]))
    assert train.shape == (13, 16, 20)
    assert train.pixels is not None
    for pixels in train.pixels:
        np.testing.assert_array_equal(pixels.numpy(), bands)
    with pytest.raises(
        ValueError, match="^images/train/x/0.npy has 16-bit values up to 2500 of 65535"
    ) as caught:
        load(data())
    assert "data.value_range, such as [0, 4095]" in str(caught.value)


# ---- files that cannot be read ----


def truncated_header(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:12])


def truncated_pixels(path: Path) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:2000])


def decompression_bomb(path: Path) -> None:
    """Write a PNG whose header promises 40,000 x 40,000 pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 40_000, 40_000, 8, 0, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b""))


def broken_chunk(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[29] ^= 255  # the checksum of the header
    path.write_bytes(content)


@pytest.mark.parametrize("memory", ["device", "stream"])
@pytest.mark.parametrize("spoil", [truncated_header, truncated_pixels, decompression_bomb, broken_chunk])
def test_a_file_that_cannot_be_decoded_is_named(spoil: Callable[[Path], None], memory: str) -> None:
    write_parts("cat", "dog")
    spoil(ROOT / "train/dog/0.png")
    with pytest.raises(
        ValueError, match=r"^images/train/dog/0.png cannot be read as an image \(.+\); repl"
    ) as e:
        load(data(memory=memory))
    assert "\n" not in str(e.value)
