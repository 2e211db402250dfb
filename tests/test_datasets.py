"""Names, folders and objects to images; and errors when they are missing or corrupt."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import inspect
import math
import os
import pickle
import random
import socket
import struct
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
import torchvision.transforms.v2
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, Subset, TensorDataset
from torchvision import transforms

from fedddp.config.schema import Config
from fedddp.data import catalog, datasets
from fedddp.data.catalog import NAMES, TORCHVISION
from fedddp.data.datasets import DataConfig, Images, from_dataset, load
from fedddp.data.synthetic import CAMERAS
from fedddp.distributed.launch import connect
from fedddp.distributed.topology import TopologyConfig
from fedddp.section import ConfigError
from fedddp.testing import run_world
from fedddp.training.assembly import load_images
from fedddp.training.objects import Objects

v2: Any = transforms.v2  # its functions are not typed as exported
RNG = np.random.default_rng(0)


class Pairs(Dataset[Any]):
    """A user's dataset: any list of (image, label)."""

    def __init__(self, pairs: list[Any], **attributes: Any) -> None:
        self.pairs = pairs
        self.__dict__.update(attributes)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Any:
        return self.pairs[index]


def gray(count: int, size: int = 6) -> list[Any]:
    pixels = RNG.integers(0, 256, (count, size, size), dtype=np.uint8)
    return [(Image.fromarray(image), index % 3) for index, image in enumerate(pixels)]


def users_dataset(root: str, train: bool) -> Dataset[Any]:
    """Return a dataset, as a callable that `data.dataset` names by dotted path does."""
    return Pairs(gray(12 if train else 6), ids=[f"{root}-{i % 4}" for i in range(12 if train else 6)])


def write_idx(file: Path, values: NDArray[Any]) -> None:
    code = {np.dtype(np.uint8): 8, np.dtype(np.int32): 12}[values.dtype]
    file.parent.mkdir(parents=True, exist_ok=True)
    header = struct.pack(f">i{values.ndim}i", code * 256 + values.ndim, *values.shape)
    file.write_bytes(header + values.astype(values.dtype.newbyteorder(">")).tobytes())


def write_folder(root: Path, size: tuple[int, int] = (12, 10)) -> None:
    for part, count in (("train", 4), ("val", 2)):
        for label, name in enumerate(("cat", "dog")):
            (root / part / name).mkdir(parents=True)
            for index in range(count):
                pixels = RNG.integers(0, 100, (size[1], size[0], 3), dtype=np.uint8)
                pixels[..., label] += 150
                Image.fromarray(pixels).save(root / part / name / f"{index}.png")


def same(one: Images, two: Images) -> None:
    assert one.pixels is not None
    assert two.pixels is not None
    assert torch.equal(one.pixels, two.pixels)
    np.testing.assert_array_equal(one.labels, two.labels)


def test_digits_equal_those_of_scikit_learn() -> None:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    rows = [[*pixels, label] for pixels, label in zip(np.rint(images * (255 / 16)), labels, strict=True)]
    ours = []
    for part in load(DataConfig(dataset="digits")):
        assert part.pixels is not None
        ours.append(np.column_stack([part.pixels.flatten(1), part.labels]))
    assert sorted(np.concatenate(ours).tolist()) == sorted(np.array(rows).tolist())


def test_digits_are_split_by_class_the_same_way_every_time() -> None:
    train, test = load(DataConfig(dataset="digits"))
    assert (len(train), len(test)) == (1437, 360)
    assert train.shape == test.shape == (1, 8, 8)
    assert train.classes == test.classes == 10
    assert np.ptp(np.bincount(test.labels)) <= 2
    assert train.pixels is not None
    assert train.pixels.max() == 255
    values = train.pixels.double() / 255
    assert train.mean[0] == pytest.approx(values.mean().item())
    assert train.std[0] == pytest.approx(values.std(correction=0).item())
    assert (test.mean, test.std) == (train.mean, train.std)
    same(train, load(DataConfig(dataset="Digits"))[0])


def test_shapes_have_the_number_and_size_asked_for() -> None:
    train, test = load(DataConfig(dataset="shapes", examples=300, image_size=20))
    assert (len(train), len(test), train.shape, train.classes) == (300, 60, (3, 20, 20), 10)
    np.testing.assert_array_equal(np.bincount(train.labels), 30)
    assert train.ids is not None
    assert train.ids.max() < CAMERAS
    assert train.pixels is not None
    # The mean images of the classes differ in contrast, so they are not all the same shape.
    flat = train.pixels.double().mean(1).flatten(1)
    spread = [flat[torch.from_numpy(train.labels == label)].mean(0).std() for label in range(10)]
    assert max(spread) > 1.5 * min(spread)
    same(train, load(DataConfig(dataset="shapes", examples=300, image_size=20))[0])
    train, test = load(DataConfig(dataset="shapes", examples=4))
    assert (len(train), len(test), train.shape) == (4, 1, (3, 32, 32))
    train, test = load(DataConfig(dataset="shapes", image_size=1))
    assert (len(train), len(test), train.shape) == (10_000, 2_000, (3, 1, 1))


def test_every_torchvision_name_fits_its_constructor() -> None:
    for name, (class_name, parts) in TORCHVISION.items():
        arguments = inspect.signature(getattr(torchvision.datasets, class_name))
        for part in parts:
            arguments.bind(root="data", **part)
        assert DataConfig(dataset=name.upper().replace("-", "_")).dataset
    assert {"mnist", "kmnist", "emnist-balanced", "cifar10", "cifar100", "svhn", "stl10"} <= {*NAMES}


def test_mnist_files_are_read() -> None:
    pixels = RNG.integers(0, 256, (30, 28, 28), dtype=np.uint8)
    labels = (np.arange(30) % 10).astype(np.uint8)
    for part in ("train", "t10k"):
        write_idx(Path(f"data/MNIST/raw/{part}-images-idx3-ubyte"), pixels)
        write_idx(Path(f"data/MNIST/raw/{part}-labels-idx1-ubyte"), labels)
    train, _ = load(DataConfig(dataset="mnist"))
    assert train.pixels is not None
    np.testing.assert_array_equal(train.pixels[:, 0].numpy(), pixels)
    np.testing.assert_array_equal(train.labels, labels)
    resized, _ = load(DataConfig(dataset="mnist", image_size=14))
    assert resized.pixels is not None
    expected = v2.functional.resize(torch.from_numpy(pixels[:1]), [14], antialias=True)
    assert torch.equal(resized.pixels[0], expected)

    Path("data/MNIST/raw/train-images-idx3-ubyte").write_bytes(b"\0\0\x08\x03\0\0\0\x1e")
    with pytest.raises(ValueError, match="data.root=data has no intact MNIST"):
        load(DataConfig(dataset="mnist"))


def test_the_owners_of_qmnists_examples_are_its_writers() -> None:
    columns = np.zeros((6, 8), np.int32)
    columns[:, 0], columns[:, 2] = [3, 1, 4, 1, 5, 9], [70, 70, 20, 20, 70, 90]
    for part in ("train", "test"):
        folder = Path("data/QMNIST/raw")
        write_idx(folder / f"qmnist-{part}-images-idx3-ubyte", np.zeros((6, 28, 28), np.uint8))
        write_idx(folder / f"qmnist-{part}-labels-idx2-int", columns)
    train, _ = load(DataConfig(dataset="qmnist"))
    assert train.labels.tolist() == [3, 1, 4, 1, 5, 9]
    assert train.ids is not None
    assert train.ids.tolist() == [1, 1, 0, 0, 1, 2]


def test_emnist_letters_count_from_zero() -> None:
    for part in ("train", "test"):
        folder = Path("data/EMNIST/raw")
        images = np.zeros((26, 28, 28), np.uint8)
        write_idx(folder / f"emnist-letters-{part}-images-idx3-ubyte", images)
        labels = np.arange(1, 27).astype(np.uint8)
        write_idx(folder / f"emnist-letters-{part}-labels-idx1-ubyte", labels)
    train, _ = load(DataConfig(dataset="emnist-letters"))
    assert train.classes == 26
    np.testing.assert_array_equal(train.labels, np.arange(26))


class Trap:
    """A pickle that leaves a file behind when it is read."""

    def __reduce__(self) -> Any:
        return open, ("unpickled", "w")


@pytest.mark.parametrize(
    ("name", "folder", "files"),
    [
        ("cifar10", "cifar-10-batches-py", ["data_batch_1", "test_batch", "batches.meta"]),
        ("cifar100", "cifar-100-python", ["train", "test", "meta"]),
    ],
)
def test_a_forged_cifar_file_is_not_unpickled(name: str, folder: str, files: list[str]) -> None:
    for file in files:
        path = Path("data") / folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(pickle.dumps(Trap()))
    with pytest.raises(ValueError, match="data.root=data has no intact CIFAR"):
        load(DataConfig(dataset=name))
    assert not Path("unpickled").exists()


def test_an_image_folder_is_the_same_decoded_streamed_and_cached() -> None:
    write_folder(Path("images"))
    data = DataConfig(dataset="image_folder", root="images")
    train, test = load(data)
    assert (len(train), len(test), train.shape, train.classes) == (8, 4, (3, 10, 12), 2)
    assert train.pixels is not None
    with Image.open("images/train/dog/1.png") as image:
        expected = np.asarray(image).transpose(2, 0, 1)
    np.testing.assert_array_equal(train.pixels[5].numpy(), expected)

    streamed, _ = load(DataConfig(dataset="image_folder", root="images", memory="stream"))
    assert streamed.pixels is None
    assert streamed.source is not None
    assert torch.equal(torch.stack([streamed.source.read(i) for i in range(8)]), train.pixels)
    assert streamed.mean == train.mean

    cached = sorted(Path("images/.fedddp").iterdir())
    assert len(cached) == 2
    same(train, load(data)[0])
    assert sorted(Path("images/.fedddp").iterdir()) == cached
    Image.fromarray(np.zeros((10, 12, 3), np.uint8)).save("images/train/cat/0.png")
    changed, _ = load(data)
    assert changed.pixels is not None
    assert changed.pixels[0].max() == 0


def test_cached_pixels_are_mapped_into_memory_and_a_folder_that_cannot_be_written_is_no_error() -> None:
    write_folder(Path("images"))
    data = DataConfig(dataset="image_folder", root="images")
    mapped, _ = load(data)
    assert mapped.pixels is not None
    if sys.platform == "linux":
        maps = Path("/proc/self/maps").read_text()
        assert str(Path("images/.fedddp").resolve()) in maps
    for file in Path("images/.fedddp").iterdir():
        file.unlink()
    Path("images/.fedddp").rmdir()
    Path("images/.fedddp").write_text("a file where the folder should be")
    same(load(data)[0], mapped)


def test_pixels_are_cached_where_the_system_has_no_posix_fallocate(monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(Path("images"))
    uncached, _ = load(DataConfig(dataset="image_folder", root="images", memory="stream"))
    assert uncached.source is not None
    expected = torch.stack([uncached.source.read(i) for i in range(8)])
    monkeypatch.delattr(os, "posix_fallocate")  # as on macOS
    data = DataConfig(dataset="image_folder", root="images")
    first, _ = load(data)
    cached = sorted(Path("images/.fedddp").iterdir())
    assert len(cached) == 2
    again, _ = load(data)
    assert sorted(Path("images/.fedddp").iterdir()) == cached
    for images in (first, again):
        assert images.pixels is not None
        assert torch.equal(images.pixels, expected)


def test_image_folder_resizes_and_crops() -> None:
    write_folder(Path("images"))
    train, _ = load(DataConfig(dataset="image_folder", root="images", image_size=5))
    assert train.shape == (3, 5, 5)


def test_a_corrupt_image_is_named() -> None:
    write_folder(Path("images"))
    corrupt = Path("images/train/dog/2.png")
    corrupt.write_bytes(corrupt.read_bytes()[:60])
    with pytest.raises(ValueError, match=r"dog/2.png cannot be read as an image .*; replace or del"):
        load(DataConfig(dataset="image_folder", root="images"))
    assert not [*Path("images/.fedddp").glob("*")]
    corrupt.write_text("not an image")
    with pytest.raises(ValueError, match="dog/2.png cannot be read as an image"):
        load(DataConfig(dataset="image_folder", root="images"))


def test_images_of_different_sizes_need_a_size() -> None:
    write_folder(Path("images"))
    Image.fromarray(np.zeros((7, 7, 3), np.uint8)).save("images/train/dog/9.png")
    with pytest.raises(ValueError, match=r"9.png has shape \(3, 7, 7\).*set data.image_size"):
        load(DataConfig(dataset="image_folder", root="images"))
    train, _ = load(DataConfig(dataset="image_folder", root="images", image_size=8))
    assert len(train) == 9


def test_class_folders_that_are_missing_or_differ_are_named() -> None:
    data = DataConfig(dataset="image_folder", root="images")
    with pytest.raises(ValueError, match="data.root=images is not a folder; give the folder that holds"):
        load(data)
    write_folder(Path("images"))
    Path("images/train").rename("elsewhere")
    with pytest.raises(ValueError, match="data.root=images has no folder train; image_folder reads train/CL"):
        load(data)
    Path("elsewhere").rename("images/train")
    (Path("images") / "val" / "cow").mkdir()
    with pytest.raises(ValueError, match=r"data.root=images/val: class 'cow' is not in the training"):
        load(data)


def test_a_callable_is_found_by_its_dotted_path() -> None:
    train, test = load(DataConfig(dataset=f"{__name__}.users_dataset", root="here"))
    assert (len(train), len(test), train.classes, train.shape) == (12, 6, 3, (1, 6, 6))
    assert train.ids is not None
    assert train.ids.tolist() == [0, 1, 2, 3] * 3


def test_images_may_be_pil_images_tensors_or_arrays() -> None:
    pairs = gray(9)
    pictures = from_dataset(Pairs(pairs))
    assert pictures.pixels is not None
    assert pictures.classes == 3
    as_bytes = torch.stack([v2.functional.pil_to_tensor(image) for image, _ in pairs])
    labels = torch.tensor([label for _, label in pairs])
    assert torch.equal(pictures.pixels, as_bytes)
    same(from_dataset(TensorDataset(as_bytes, labels)), pictures)
    same(from_dataset(TensorDataset(as_bytes[:, 0], labels)), pictures)
    same(from_dataset(TensorDataset(as_bytes / 255, labels)), pictures)
    same(from_dataset(Pairs([(np.asarray(i), np.int64(y)) for i, y in pairs])), pictures)
    same(from_dataset(Pairs([(x / 255, y) for x, y in zip(as_bytes, labels, strict=True)])), pictures)
    some = from_dataset(Subset(Subset(Pairs(pairs, ids=[*"abcabcabc"]), [8, 1, 5]), [2, 0]))
    assert some.pixels is not None
    assert torch.equal(some.pixels, as_bytes[[5, 8]])
    assert some.labels.tolist() == [2, 2]
    colour = np.array(Image.new("RGB", (5, 4), (1, 2, 3)))
    in_colour = from_dataset(Pairs([(colour, 0), (torch.from_numpy(colour).permute(2, 0, 1), 1)]))
    assert in_colour.pixels is not None
    assert in_colour.pixels[:, :, 0, 0].tolist() == [[1, 2, 3], [1, 2, 3]]
    assert in_colour.std == (1.0, 1.0, 1.0)


def test_the_transform_of_a_dataset_is_applied() -> None:
    for part in ("train", "t10k"):
        write_idx(Path(f"data/MNIST/raw/{part}-images-idx3-ubyte"), np.full((4, 28, 28), 9, np.uint8))
        write_idx(Path(f"data/MNIST/raw/{part}-labels-idx1-ubyte"), np.arange(4, dtype=np.uint8))
    mnist = torchvision.datasets.MNIST(
        "data", transform=v2.CenterCrop(8), target_transform=lambda label: 3 - label
    )
    images = from_dataset(mnist)
    assert images.shape == (1, 8, 8)
    assert images.labels.tolist() == [3, 2, 1, 0]


def test_a_test_set_has_the_classes_and_normalisation_of_its_training_set() -> None:
    train = from_dataset(Pairs(gray(9)))
    test = from_dataset(Pairs(gray(2)), like=train)
    assert (test.classes, test.mean, test.std) == (train.classes, train.mean, train.std)
    with pytest.raises(ValueError, match=r"shape \(1, 5, 5\), the training set of \(1, 6, 6\)"):
        from_dataset(Pairs(gray(2, size=5)), like=train)


def test_data_examples_limits_the_training_and_the_test_set() -> None:
    train, test = load(DataConfig(dataset="digits", examples=50))
    assert (len(train), len(test)) == (50, 50)
    assert len(np.unique(train.labels)) == 10
    same(train, load(DataConfig(dataset="digits", examples=50))[0])


def tensor(*values: float) -> Tensor:
    return torch.tensor(values).view(1, 1, -1)


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (Pairs([]), "Pairs has no examples"),
        (Pairs([(tensor(0.5), -1)]), "label of example 0 is -1, but must be between 0 and"),
        (Pairs([(tensor(0.5), 0), (tensor(0.5), 7)], classes=["a", "b"]), "example 1 is 7.*and 1;"),
        (Pairs([(tensor(0.5), "cat")]), "example 0 has the label 'cat'; give integers"),
        (Pairs([(tensor(0.5), 0)], targets=[1]), "has label 0, but its list of labels has 1"),
        (Pairs([(tensor(-1.0, 2.0), 0)]), "float32 values from -1 to 2; give uint8, or floating"),
        (Pairs([(torch.zeros(3), 0)]), r"example 0 is \(3,\); expected a PIL image or a tensor"),
        (Pairs([("x.png", 0)]), "example 0 is str; expected a PIL image"),
        (Pairs([(tensor(0.5), 0)], ids=[1, 2]), r"ids have shape \(2,\); give one for each of 1"),
        (Pairs([*gray(1), (Image.new("RGB", (6, 6)), 0)]), r"has shape \(3, 6, 6\), but the first"),
    ],
)
def test_mistakes_in_a_dataset_are_explained_in_one_line(dataset: Dataset[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        from_dataset(dataset)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"dataset": "fashion-mnits"},
            "^data.dataset 'fashion-mnits' is unknown; did you mean 'fashion-",
        ),
        ({"dataset": "zzz"}, "^data.dataset 'zzz' is unknown; known are digits, shapes"),
        ({"clients": 0}, "^data.clients must be >= 1, got 0"),
        ({"holdout": 1.0}, r"^data.holdout must be in \[0, 1\), got 1.0; 0.2 keeps a fifth"),
        ({"examples": 0}, "^data.examples must be >= 1, got 0"),
        ({"image_size": -3}, "^data.image_size must be in .1, 16384., got -3"),
        ({"workers": -1}, "^data.workers must be >= 0, got -1"),
        ({"augment": "rotate"}, "^data.augment must be none, flip, crop, crop-flip, .*, got rotate"),
        ({"memory": "disk"}, "^data.memory must be auto, device or stream, got disk"),
    ],
)
def test_a_wrong_field_of_the_data_section_is_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig(**fields)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mnist", "no intact MNIST .*; pass --data.download true, or point data.root at"),
        ("stl10", "no intact STL10 .*; pass --data.download true"),
        ("svhn", "no intact SVHN .*; pass --data.download true"),
        ("usps", "no intact USPS .*; pass --data.download true"),
        ("imagenet", "no intact ImageNet .*; point data.root at"),
        ("no.such.thing", "data.dataset=no.such.thing: No module named 'no'; give the dotted path"),
        ("os.path.join", "data.dataset=os.path.join: .*; give the dotted path of a callable f"),
    ],
)
def test_a_missing_dataset_is_named_with_a_fix(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        load(DataConfig(dataset=name, root="nowhere"))
    assert "\n" not in str(caught.value)


# ---- the user's own datasets: settings, statistics, labels, items ----


def own(train: Dataset[Any], test: Dataset[Any], **data: Any) -> tuple[Images, Images]:
    """Return the images of a run with the user's own datasets."""
    images, tested = Objects(None, train, test).load_images(Config(data=DataConfig(**data)))
    assert tested is not None
    return images, tested


def level(count: int, value: int, spread: int, size: int = 4) -> Pairs:
    """Return grey images, half of them darker and half of them lighter than a value."""
    tones = [value + spread * (-1) ** (i % 2) for i in range(count)]
    return Pairs([(np.full((size, size), tone, np.uint8), i % 2) for i, tone in enumerate(tones)])


@pytest.mark.parametrize("memory", ["device", "stream"])
def test_an_own_test_set_is_normalised_by_the_training_sets_statistics(memory: str) -> None:
    train, test = own(level(4, 102, 51), level(6, 204, 25), memory=memory)
    assert train.mean == test.mean == pytest.approx((0.4,))
    assert train.std == test.std == pytest.approx((0.2,))
    assert test.classes == train.classes


def test_an_own_test_set_has_the_training_sets_classes_and_channels() -> None:
    train = Pairs(gray(6), classes=["a", "b", "c"])
    assert own(train, Pairs(gray(1)))[1].class_names == ("a", "b", "c")
    with pytest.raises(ValueError, match="Pairs: label of example 1 is 3, but must be between 0 and 2"):
        own(train, Pairs([(Image.new("L", (6, 6)), label) for label in (0, 3)]))
    with pytest.raises(ValueError, match=r"Pairs has images of shape \(3, 6, 6\), the training set of \(1,"):
        own(train, Pairs([(Image.new("RGB", (6, 6)), 0)]))


def test_settings_of_the_data_section_hold_for_own_datasets() -> None:
    sets = Pairs(gray(30)), Pairs(gray(20))
    train, test = own(*sets, image_size=3, examples=12)
    assert (len(train), len(test)) == (12, 12)
    assert train.shape == test.shape == (1, 3, 3)
    assert [images.pixels is None for images in own(*sets, memory="stream")] == [True, True]
    assert [images.pixels is None for images in own(*sets, memory="device")] == [False, False]
    few, _ = own(*sets, examples=12)  # the same examples every time, in their order
    assert few.labels.tolist() == own(*sets, examples=12)[0].labels.tolist()
    assert train.pixels is not None
    assert few.pixels is not None
    expected = v2.functional.resize(few.pixels, [3], antialias=True)
    assert torch.equal(train.pixels, expected)


def test_a_digest_covers_256_evenly_spaced_images_or_all_where_there_are_fewer() -> None:
    for count in (1000, 300, 256, 100, 1):
        pixels = torch.zeros(count, 1, 2, 2, dtype=torch.uint8)
        images = from_dataset(TensorDataset(pixels, torch.zeros(count, dtype=torch.int64)))
        assert images.pixels is not None
        plain, labels_only = images.digest(), images.digest(pixels=False)
        covered: list[int] = []
        for index in range(count):
            images.pixels[index, 0, 1, 0] = 255
            covered += [index] if images.digest() != plain else []
            assert images.digest(pixels=False) == labels_only
            images.pixels[index] = 0
        assert len(covered) == min(count, 256)
        assert (covered[0], covered[-1]) == (0, count - 1)
        assert max(np.diff(covered), default=1) <= math.ceil(count / 256)


def test_a_digest_is_of_labels_owners_shape_and_names_of_classes() -> None:
    images = from_dataset(Pairs(gray(6), ids=[0, 1, 2, 0, 1, 2]))
    labels = np.array([0, 1, 2, 0, 1, 1])
    others = [
        dataclasses.replace(images, labels=labels),
        dataclasses.replace(images, ids=labels),
        dataclasses.replace(images, ids=None),
        dataclasses.replace(images, shape=(1, 4, 9)),
        dataclasses.replace(images, class_names=("a", "b", "c")),
    ]
    for pixels in (True, False):
        digests = [one.digest(pixels=pixels) for one in (images, *others)]
        assert len(set(digests)) == len(digests)
        assert dataclasses.replace(images, mean=(9.0,)).digest(pixels=pixels) == digests[0]


def test_pixels_are_held_by_default_up_to_2_gibibytes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert datasets.FITS_BYTES == 2_147_483_648
    for fits, held in ((360, True), (359, False)):  # ten images of 36 bytes
        monkeypatch.setattr(datasets, "FITS_BYTES", fits)
        images = from_dataset(Pairs(gray(10)))
        assert (images.pixels is not None, images.source is None) == (held, held)
        assert from_dataset(Pairs(gray(10)), DataConfig(memory="device")).pixels is not None
        assert from_dataset(Pairs(gray(10)), DataConfig(memory="stream")).pixels is None


def test_one_process_at_a_time_downloads_into_a_folder_that_is_made(tmp_path: Path) -> None:
    root = tmp_path / "not" / "yet"
    file, at_once = root / ".fedddp.lock", fcntl.LOCK_EX | fcntl.LOCK_NB
    for _ in range(2):  # the folder is there the second time
        with catalog._one_at_a_time(root), file.open("w") as lock, pytest.raises(BlockingIOError):
            fcntl.flock(lock, at_once)
    with file.open("w") as lock:
        fcntl.flock(lock, at_once)


def test_statistics_are_those_of_the_same_images_held_and_streamed() -> None:
    # Dark first, so that a few of the first images would not do.
    tones = [*[20] * 500, *[200, 100] * 200]
    dataset = Pairs([(np.full((2, 2), tone, np.uint8), 0) for tone in tones])
    held, streamed = (from_dataset(dataset, DataConfig(memory=memory)) for memory in ("device", "stream"))
    assert (held.mean, held.std) == (streamed.mean, streamed.std)
    values = np.array(tones) / 255
    assert held.mean[0] == pytest.approx(values.mean())
    assert held.std[0] == pytest.approx(values.std())


def test_statistics_of_random_transforms_are_those_of_the_same_draws() -> None:
    held, streamed = (from_dataset(Noisy(), DataConfig(memory=memory)) for memory in ("device", "stream"))
    assert (held.mean, held.std) == (streamed.mean, streamed.std)
    assert held.std[0] > 0.1


class Noisy(Dataset[Any]):
    """Images that the three global generators draw."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> Any:
        drawn = [random.random(), np.random.random(), float(torch.rand(()))]
        return np.array(drawn).reshape(1, 1, 3), index % 2


def test_reading_an_example_leaves_the_global_generators_as_they_were() -> None:
    def draw() -> list[float]:
        return [random.random(), np.random.random(), float(torch.rand(()))]

    def seed() -> None:
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)

    seed()
    expected = draw()
    images = from_dataset(Noisy(), DataConfig(memory="stream"))
    seed()
    assert images.source is not None
    images.source.read(3, 7)
    assert draw() == expected


@pytest.mark.parametrize(
    "label",
    [
        np.int64(1),
        np.uint8(1),
        np.array(1),
        np.array([1]),
        np.float32(1.0),
        torch.tensor(1),
        torch.tensor([1]),
        torch.tensor(1.0),
        1.0,
        True,
    ],
)
@pytest.mark.parametrize("memory", ["device", "stream"])
def test_labels_may_be_scalars_of_any_kind(label: Any, memory: Any) -> None:
    image = np.zeros((2, 2), np.uint8)
    images = from_dataset(Pairs([(image, 0), (image, label)]), DataConfig(memory=memory))
    assert images.labels.tolist() == [0, 1]
    assert images.classes == 2


@pytest.mark.parametrize(
    "labels",
    [np.array([0, 1, 1]), torch.tensor([0, 1, 1]), [np.int64(0), 1, True], np.array([[0], [1], [1]])],
)
def test_lists_of_labels_may_be_arrays_of_any_kind(labels: Any) -> None:
    image = np.zeros((2, 2), np.uint8)
    pairs = [(image, label) for label in (0, 1, 1)]
    assert from_dataset(Pairs(pairs, targets=labels)).labels.tolist() == [0, 1, 1]


@pytest.mark.parametrize("label", [1.5, np.array([0, 1]), torch.tensor([0.0, 1.0]), None, [0, 1]])
def test_labels_of_other_kinds_are_refused(label: Any) -> None:
    image = np.zeros((2, 2), np.uint8)
    with pytest.raises(ValueError, match=r"^Pairs: example 1 has the label .*; give integers 0, 1, ... per"):
        from_dataset(Pairs([(image, 0), (image, label)]))


@pytest.mark.parametrize("label", [float("nan"), float("inf"), 2**63])
def test_labels_without_an_integer_are_refused(label: Any) -> None:
    image = np.zeros((2, 2), np.uint8)
    with pytest.raises(ValueError, match="^Pairs: example 1 .*label"):
        from_dataset(Pairs([(image, 0), (image, label)]))


PICTURE = Image.new("L", (2, 2))


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize(
    ("item", "kind"),
    [
        ({"image": PICTURE, "label": 0}, "a dict with image, label"),
        ((PICTURE, 0, "more"), "a tuple of 3"),
        ([PICTURE], "a list of 1"),
        (PICTURE, "Image"),
        (None, "NoneType"),
        ("ab", "str"),
    ],
)
def test_items_that_are_no_pairs_are_explained_in_one_line(item: Any, kind: str, listed: bool) -> None:
    attributes = {"targets": [0, 0]} if listed else {}
    with pytest.raises(
        ValueError, match=f"^Pairs: example 0 is {kind}; a dataset must return .image, label."
    ):
        from_dataset(Pairs([item, item], **attributes))


def generator() -> Any:
    yield from gray(2)


class Stream(IterableDataset[Any]):
    """A dataset without items by index."""

    def __len__(self) -> int:
        return 2

    def __iter__(self) -> Any:
        return iter(gray(2))


@pytest.mark.parametrize(
    "dataset", [generator(), Stream(), {1, 2}, 5], ids=["generator", "stream", "set", "int"]
)
def test_datasets_without_items_by_index_are_refused(dataset: Any) -> None:
    name = type(dataset).__name__
    with pytest.raises(
        ValueError, match=f"^{name} is not a map-style dataset; it needs __len__, and __getitem"
    ):
        from_dataset(dataset)


# ---- errors of decoders and of the user's own code ----


class Failing(Pairs):
    """A dataset whose third example raises an error."""

    def __init__(self, error: Exception, **attributes: Any) -> None:
        super().__init__(gray(4), **attributes)
        self.error = error

    def __getitem__(self, index: int) -> Any:
        if index == 2:
            raise self.error
        return super().__getitem__(index)


ERRORS: list[tuple[Exception, str]] = [
    (KeyError("image"), r"KeyError: 'image'"),
    (RuntimeError("two\nlines"), "RuntimeError: two lines"),
    (Image.DecompressionBombError("too large"), "DecompressionBombError: too large"),
    (ValueError("odd"), "ValueError: odd"),
    (OSError("truncated"), "truncated"),
]


@pytest.mark.parametrize(("error", "text"), ERRORS)
@pytest.mark.parametrize("listed", [False, True])
def test_any_error_while_reading_an_example_names_it(error: Exception, text: str, listed: bool) -> None:
    attributes = {"targets": [0, 1, 2, 0]} if listed else {}
    message = rf"^Failing: example 2 cannot be read as an image \({text}\); replace or delete it$"
    with pytest.raises(ValueError, match=message) as caught:
        from_dataset(Failing(error, **attributes))
    assert caught.value.__cause__ is error


def test_a_disk_that_is_gone_is_no_fault_of_the_image() -> None:
    error = OSError(errno.EIO, "Input/output error")
    message = r"^Failing: example 2 cannot be read .*Input/output error.; bring its disk back and resume with"
    with pytest.raises(ValueError, match=message):
        from_dataset(Failing(error))


def test_a_file_of_a_users_dataset_is_named() -> None:
    dataset = Failing(KeyError("x"), samples=[(f"{name}.png", i % 3) for i, name in enumerate("abcd")])
    with pytest.raises(ValueError, match=r"^c.png cannot be read as an image \(KeyError: 'x'\)"):
        from_dataset(dataset)


def test_running_out_of_memory_is_no_fault_of_the_image() -> None:
    with pytest.raises(MemoryError):
        from_dataset(Failing(MemoryError()))


def test_a_file_that_pillow_reads_only_when_its_pixels_are_taken_is_named() -> None:
    Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save("cut.png")
    Path("cut.png").write_bytes(Path("cut.png").read_bytes()[:2000])
    with (
        Image.open("cut.png") as picture,
        pytest.raises(ValueError, match="example 1 cannot be read as an image"),
    ):
        from_dataset(Pairs([(Image.new("RGB", (64, 64)), 0), (picture, 0)]))


# ---- ranks that hold different data ----


def data_of(rank: int, odd: str) -> Objects:
    """Return the data of a rank; those of rank 1 differ as named."""
    odd = odd if rank == 1 else "nothing"
    pixels = np.random.default_rng(3).integers(0, 256, (8, 3, 3), dtype=np.uint8)
    labels, owners = np.arange(8) % 3, np.arange(8) % 4
    if odd == "order":
        pixels, labels = pixels[::-1], labels[::-1]
    if odd == "labels":
        labels[3:5] = labels[4], labels[3]
    if odd == "owners":
        owners[3:5] = owners[4], owners[3]
    if odd == "images":
        pixels[5, 1, 1] ^= 1
    if odd == "fewer":
        pixels, labels, owners = pixels[:6], labels[:6], owners[:6]
    if odd == "size":
        pixels = pixels[:, :2]
    classes = [*"acb"] if odd == "classes" else [*"abc"]
    train = Pairs(list(zip(pixels, labels, strict=True)), ids=owners, classes=classes)
    tested = [0, 1, 2, 1 if odd == "test" else 0]
    return Objects(None, train, Pairs(list(zip(pixels[:4], tested, strict=True))))


def errors_of_loading(differences: Sequence[str]) -> list[str]:
    """Collective. Return the error of loading each rank's data, "" for none."""
    errors = []
    with contextlib.closing(connect(TopologyConfig(device="cpu"))) as world:
        for odd in differences:
            try:
                load_images(data_of(world.rank, odd), Config(), world)
            except ConfigError as error:
                errors.append(str(error))
            else:
                errors.append("")
    return errors


def test_ranks_that_hold_other_data_are_refused() -> None:
    differences = ("nothing", "order", "labels", "owners", "images", "fewer", "size", "classes", "test")
    ours, theirs = run_world(errors_of_loading, differences, size=2)
    assert ours == theirs
    assert ours[0] == ""
    for odd, error in zip(differences[1:], ours[1:], strict=True):
        which = "test" if odd == "test" else "training"
        assert error.startswith(f"rank 1 holds other {which} data than rank 0"), (odd, error)


# ---- the files of decoded pixels ----


CACHE_FOLDER = Path("images/.fedddp")
FOLDER = DataConfig(dataset="image_folder", root="images")


def cut(file: Path, length: int) -> None:
    file.write_bytes(file.read_bytes()[:length])


def garbage(file: Path, length: int) -> None:
    file.write_bytes(b"\x00" * length)


@pytest.mark.parametrize(("spoil", "length"), [(cut, -1), (cut, 300), (cut, 60), (cut, 0), (garbage, 500)])
def test_a_corrupt_file_of_decoded_pixels_is_rebuilt_with_one_warning(
    spoil: Any, length: int, caplog: pytest.LogCaptureFixture
) -> None:
    write_folder(Path("images"))
    before, _ = load(FOLDER)
    assert before.pixels is not None
    expected = before.pixels.clone()
    spoiled = next(file for file in CACHE_FOLDER.iterdir() if file.stat().st_size > 2000)  # of train/
    intact = spoiled.read_bytes()
    os.unlink(spoiled)  # what is mapped stays as it is
    spoiled.write_bytes(intact)
    spoil(spoiled, length)
    again, _ = load(FOLDER)
    assert again.pixels is not None
    assert torch.equal(again.pixels, expected)
    assert spoiled.read_bytes() == intact
    (record,) = caplog.records
    assert record.getMessage().startswith(f"decoded pixels in {spoiled} are corrupt (")
    assert record.getMessage().endswith("; decoding the images again")
    caplog.clear()
    load(FOLDER)
    assert not caplog.records


def spoiled_by(values: NDArray[Any]) -> Images:
    """Return the training images of a folder whose file of decoded pixels holds other values."""
    write_folder(Path("images"))
    load(FOLDER)
    spoiled = next(file for file in CACHE_FOLDER.iterdir() if file.stat().st_size > 2000)
    spoiled.unlink()
    with spoiled.open("wb") as file:
        np.save(file, values)
    return load(FOLDER)[0]


@pytest.mark.parametrize("shape", [(7, 3, 10, 12), (8, 3, 12, 10), (8, 1, 10, 12), (0,)])
def test_decoded_pixels_of_another_shape_are_rebuilt(shape: tuple[int, ...]) -> None:
    images = spoiled_by(np.zeros(shape, np.uint8))
    assert images.pixels is not None
    assert images.pixels.shape == (8, 3, 10, 12)
    assert images.pixels.any()


def test_decoded_pixels_of_another_shape_are_rebuilt_with_one_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    spoiled_by(np.zeros((7, 3, 10, 12), np.uint8))
    assert len(caplog.records) == 1


def test_decoded_pixels_of_another_type_are_rebuilt() -> None:
    images = spoiled_by(np.zeros((8, 3, 10, 12), np.float64))
    assert images.pixels is not None
    assert images.pixels.dtype == torch.uint8


def test_the_newest_four_files_of_decoded_pixels_are_kept() -> None:
    write_folder(Path("images"))
    kept: list[set[str]] = []
    for size in (3, 4, 5, 6):
        load(dataclasses.replace(FOLDER, image_size=size))
        kept.append({file.name for file in CACHE_FOLDER.iterdir()})
        for age, name in enumerate(kept[-1]):  # filesystems have coarse clocks: older than what follows
            then = 1_000_000 * size + age
            if name not in (kept[-2] if len(kept) > 1 else set()):
                os.utime(CACHE_FOLDER / name, (then, then))
    assert [len(names) for names in kept] == [2, 4, 4, 4]
    assert len(kept[3] & kept[2]) == 2
    assert not kept[3] & kept[1]


def test_parts_of_killed_processes_of_this_host_are_removed() -> None:
    write_folder(Path("images"))
    CACHE_FOLDER.mkdir()
    host, no_process = socket.gethostname(), 2**30
    names = {
        "dead": f"pixels-a.{host}-{no_process}.part",
        "alive": f"pixels-a.{host}-{os.getppid()}.part",
        "elsewhere": f"pixels-a.other-{no_process}.part",
        "not ours": "notes.part",
    }
    for name in names.values():
        (CACHE_FOLDER / name).write_bytes(b"")
    load(FOLDER)
    left = {file.name for file in CACHE_FOLDER.glob("*.part")}
    assert left == {names[name] for name in ("alive", "elsewhere", "not ours")}


def test_no_part_is_left_when_decoding_fails() -> None:
    write_folder(Path("images"))
    (Path("images") / "train/dog/2.png").write_bytes(b"not an image")
    with pytest.raises(ValueError, match="cannot be read"):
        load(FOLDER)
    assert not [*CACHE_FOLDER.iterdir()]
