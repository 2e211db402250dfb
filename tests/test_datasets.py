"""Names, folders and objects to images; and errors when they are missing or corrupt."""

from __future__ import annotations

import inspect
import os
import pickle
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Subset, TensorDataset
from torchvision import transforms

from fedddp.data.catalog import NAMES, TORCHVISION
from fedddp.data.datasets import DataConfig, Images, from_dataset, load
from fedddp.data.synthetic import CAMERAS

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
    assert torch.equal(torch.stack([streamed.source[i][0] for i in range(8)]), train.pixels)
    assert [streamed.source[i][1] for i in range(8)] == train.labels.tolist()
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
    expected = torch.stack([uncached.source[i][0] for i in range(8)])
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
        ({"augment": "rotate"}, "^data.augment must be none, flip, crop or crop-flip, got rotate"),
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
