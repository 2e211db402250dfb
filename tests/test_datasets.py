"""Names, folders and objects to images; and what is said when they are not there."""

from __future__ import annotations

import inspect
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Subset, TensorDataset
from torchvision.transforms import v2

from fedddp.data.catalog import NAMES, TORCHVISION
from fedddp.data.datasets import Data, Images, from_dataset, load
from fedddp.data.synthetic import CAMERAS

RANDOM = np.random.default_rng(0)


class Pairs(Dataset[Any]):
    """A user's dataset: any list of (image, label)."""

    def __init__(self, pairs: list[Any], **facts: Any) -> None:
        self.pairs = pairs
        self.__dict__.update(facts)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Any:
        return self.pairs[index]


def gray(count: int, size: int = 6) -> list[Any]:
    pixels = RANDOM.integers(0, 256, (count, size, size), dtype=np.uint8)
    return [(Image.fromarray(image), index % 3) for index, image in enumerate(pixels)]


def users_dataset(root: str, train: bool) -> Dataset[Any]:
    """What `data.dataset` may name by dotted path."""
    return Pairs(gray(12 if train else 6), ids=[f"{root}-{i % 4}" for i in range(12 if train else 6)])


def write_idx(file: Path, values: np.ndarray) -> None:
    code = {np.dtype(np.uint8): 8, np.dtype(np.int32): 12}[values.dtype]
    file.parent.mkdir(parents=True, exist_ok=True)
    header = struct.pack(f">i{values.ndim}i", code * 256 + values.ndim, *values.shape)
    file.write_bytes(header + values.astype(values.dtype.newbyteorder(">")).tobytes())


def write_folder(root: Path, size: tuple[int, int] = (12, 10)) -> None:
    for part, count in (("train", 4), ("val", 2)):
        for label, name in enumerate(("cat", "dog")):
            (root / part / name).mkdir(parents=True)
            for index in range(count):
                pixels = RANDOM.integers(0, 100, (size[1], size[0], 3), dtype=np.uint8)
                pixels[..., label] += 150
                Image.fromarray(pixels).save(root / part / name / f"{index}.png")


def same(one: Images, two: Images) -> None:
    assert one.pixels is not None
    assert two.pixels is not None
    assert torch.equal(one.pixels, two.pixels)
    np.testing.assert_array_equal(one.labels, two.labels)


def test_digits_are_scikit_learns() -> None:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    rows = [[*pixels, label] for pixels, label in zip(np.rint(images * (255 / 16)), labels, strict=True)]
    ours = [np.column_stack([part.pixels.flatten(1), part.labels]) for part in load(Data(dataset="digits"))]
    assert sorted(np.concatenate(ours).tolist()) == sorted(np.array(rows).tolist())


def test_digits_are_split_by_class_always_the_same_way() -> None:
    train, test = load(Data(dataset="digits"))
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
    same(train, load(Data(dataset="Digits"))[0])


def test_shapes_are_drawn_to_measure() -> None:
    train, test = load(Data(dataset="shapes", examples=300, image_size=20))
    assert (len(train), len(test), train.shape, train.classes) == (300, 60, (3, 20, 20), 10)
    np.testing.assert_array_equal(np.bincount(train.labels), 30)
    assert train.ids is not None
    assert train.ids.max() < CAMERAS
    assert train.pixels is not None
    # Classes can be told apart: a linear look at the mean picture of a class is above chance.
    flat = train.pixels.double().mean(1).flatten(1)
    spread = [flat[torch.from_numpy(train.labels == label)].mean(0).std() for label in range(10)]
    assert max(spread) > 1.5 * min(spread)
    same(train, load(Data(dataset="shapes", examples=300, image_size=20))[0])


def test_every_torchvision_name_fits_its_constructor() -> None:
    for name, (class_name, parts) in TORCHVISION.items():
        arguments = inspect.signature(getattr(torchvision.datasets, class_name))
        for part in parts:
            arguments.bind(root="data", **part)
        assert Data(dataset=name.upper().replace("-", "_")).dataset
    assert {"mnist", "kmnist", "emnist-balanced", "cifar10", "cifar100", "svhn", "stl10"} <= {*NAMES}


def test_mnist_files_are_read() -> None:
    pixels = RANDOM.integers(0, 256, (30, 28, 28), dtype=np.uint8)
    labels = (np.arange(30) % 10).astype(np.uint8)
    for part in ("train", "t10k"):
        write_idx(Path(f"data/MNIST/raw/{part}-images-idx3-ubyte"), pixels)
        write_idx(Path(f"data/MNIST/raw/{part}-labels-idx1-ubyte"), labels)
    train, _ = load(Data(dataset="mnist"))
    assert train.pixels is not None
    np.testing.assert_array_equal(train.pixels[:, 0].numpy(), pixels)
    np.testing.assert_array_equal(train.labels, labels)
    resized, _ = load(Data(dataset="mnist", image_size=14))
    assert resized.pixels is not None
    expected = v2.functional.resize(torch.from_numpy(pixels[:1]), [14], antialias=True)
    assert torch.equal(resized.pixels[0], expected)

    Path("data/MNIST/raw/train-images-idx3-ubyte").write_bytes(b"\0\0\x08\x03\0\0\0\x1e")
    with pytest.raises(ValueError, match="data.root=data has no intact MNIST"):
        load(Data(dataset="mnist"))


def test_qmnist_knows_its_writers() -> None:
    facts = np.zeros((6, 8), np.int32)
    facts[:, 0], facts[:, 2] = [3, 1, 4, 1, 5, 9], [70, 70, 20, 20, 70, 90]
    for part in ("train", "test"):
        folder = Path("data/QMNIST/raw")
        write_idx(folder / f"qmnist-{part}-images-idx3-ubyte", np.zeros((6, 28, 28), np.uint8))
        write_idx(folder / f"qmnist-{part}-labels-idx2-int", facts)
    train, _ = load(Data(dataset="qmnist"))
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
    train, _ = load(Data(dataset="emnist-letters"))
    assert train.classes == 26
    np.testing.assert_array_equal(train.labels, np.arange(26))


class Trap:
    """A pickle that leaves a file behind when it is read."""

    def __reduce__(self) -> Any:
        return open, ("sprung", "w")


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
        load(Data(dataset=name))
    assert not Path("sprung").exists()


def test_image_folder_is_decoded_streamed_and_mapped_alike() -> None:
    write_folder(Path("images"))
    data = Data(dataset="image_folder", root="images")
    train, test = load(data)
    assert (len(train), len(test), train.shape, train.classes) == (8, 4, (3, 10, 12), 2)
    assert train.pixels is not None
    with Image.open("images/train/dog/1.png") as image:
        expected = np.asarray(image).transpose(2, 0, 1)
    np.testing.assert_array_equal(train.pixels[5].numpy(), expected)

    streamed, _ = load(Data(dataset="image_folder", root="images", memory="stream"))
    assert streamed.pixels is None
    assert streamed.source is not None
    assert torch.equal(torch.stack([streamed.source[i][0] for i in range(8)]), train.pixels)
    assert [streamed.source[i][1] for i in range(8)] == train.labels.tolist()
    assert streamed.mean == train.mean

    kept = sorted(Path("images/.fedddp").iterdir())
    assert len(kept) == 2
    same(train, load(data)[0])
    assert sorted(Path("images/.fedddp").iterdir()) == kept
    Image.fromarray(np.zeros((10, 12, 3), np.uint8)).save("images/train/cat/0.png")
    changed, _ = load(data)
    assert changed.pixels is not None
    assert changed.pixels[0].max() == 0


def test_what_is_kept_is_mapped_and_what_cannot_be_kept_is_not() -> None:
    write_folder(Path("images"))
    data = Data(dataset="image_folder", root="images")
    mapped, _ = load(data)
    assert mapped.pixels is not None
    maps = Path("/proc/self/maps").read_text()
    assert str(Path("images/.fedddp").resolve()) in maps
    for file in Path("images/.fedddp").iterdir():
        file.unlink()
    Path("images/.fedddp").rmdir()
    Path("images/.fedddp").write_text("a file where the folder should be")
    same(load(data)[0], mapped)


def test_image_folder_resizes_and_crops() -> None:
    write_folder(Path("images"))
    train, _ = load(Data(dataset="image_folder", root="images", image_size=5))
    assert train.shape == (3, 5, 5)


def test_a_corrupt_image_is_named() -> None:
    write_folder(Path("images"))
    damaged = Path("images/train/dog/2.png")
    damaged.write_bytes(damaged.read_bytes()[:60])
    with pytest.raises(ValueError, match=r"dog/2.png cannot be read as an image .*; replace or del"):
        load(Data(dataset="image_folder", root="images"))
    assert not [*Path("images/.fedddp").glob("*")]
    damaged.write_text("not an image")
    with pytest.raises(ValueError, match="dog/2.png cannot be read as an image"):
        load(Data(dataset="image_folder", root="images"))


def test_images_of_different_sizes_need_a_size() -> None:
    write_folder(Path("images"))
    Image.fromarray(np.zeros((7, 7, 3), np.uint8)).save("images/train/dog/9.png")
    with pytest.raises(ValueError, match=r"9.png has shape \(3, 7, 7\).*set data.image_size"):
        load(Data(dataset="image_folder", root="images"))
    train, _ = load(Data(dataset="image_folder", root="images", image_size=8))
    assert len(train) == 9


def test_folders_that_do_not_fit_are_named() -> None:
    data = Data(dataset="image_folder", root="images")
    with pytest.raises(ValueError, match="data.root=images has no folder 'train'"):
        load(data)
    write_folder(Path("images"))
    (Path("images") / "val" / "cow").mkdir()
    with pytest.raises(ValueError, match=r"data.root=images: Found no valid file .*cow"):
        load(data)
    Image.new("RGB", (12, 10)).save("images/val/cow/0.png")
    with pytest.raises(ValueError, match="class 'cow' is only in one of train and val"):
        load(data)


def test_a_users_callable_is_found_by_its_dotted_path() -> None:
    train, test = load(Data(dataset=f"{__name__}.users_dataset", root="here"))
    assert (len(train), len(test), train.classes, train.shape) == (12, 6, 3, (1, 6, 6))
    assert train.ids is not None
    assert train.ids.tolist() == [0, 1, 2, 3] * 3


def test_a_users_images_may_be_pictures_tensors_or_arrays() -> None:
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


def test_a_users_transform_is_not_bypassed() -> None:
    for part in ("train", "t10k"):
        write_idx(Path(f"data/MNIST/raw/{part}-images-idx3-ubyte"), np.full((4, 28, 28), 9, np.uint8))
        write_idx(Path(f"data/MNIST/raw/{part}-labels-idx1-ubyte"), np.arange(4, dtype=np.uint8))
    whole = torchvision.datasets.MNIST(
        "data", transform=v2.CenterCrop(8), target_transform=lambda label: 3 - label
    )
    images = from_dataset(whole)
    assert images.shape == (1, 8, 8)
    assert images.labels.tolist() == [3, 2, 1, 0]


def test_a_test_set_takes_after_its_training_set() -> None:
    train = from_dataset(Pairs(gray(9)))
    test = from_dataset(Pairs(gray(2)), like=train)
    assert (test.classes, test.mean, test.std) == (train.classes, train.mean, train.std)
    with pytest.raises(ValueError, match=r"shape \(1, 5, 5\), the training set of \(1, 6, 6\)"):
        from_dataset(Pairs(gray(2, size=5)), like=train)


def test_a_trial_uses_some_examples() -> None:
    train, test = load(Data(dataset="digits", examples=50))
    assert (len(train), len(test)) == (50, 50)
    assert len(np.unique(train.labels)) == 10
    same(train, load(Data(dataset="digits", examples=50))[0])


def tensor(*values: float) -> Tensor:
    return torch.tensor(values).view(1, 1, -1)


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (Pairs([]), "Pairs has no examples"),
        (Pairs([(tensor(0.5), -1)]), "label of example 0 is -1, but must be between 0 and"),
        (Pairs([(tensor(0.5), 0), (tensor(0.5), 7)], classes=["a", "b"]), "example 1 is 7.*and 1;"),
        (Pairs([(tensor(0.5), "cat")]), "label of example 0 is 'cat'; give integers"),
        (Pairs([(tensor(0.5), 0)], targets=[1]), "has label 0, but its list of labels says 1"),
        (Pairs([(tensor(-1.0, 2.0), 0)]), "float32 values from -1 to 2; give uint8, or floating"),
        (Pairs([(torch.zeros(3), 0)]), r"example 0 is \(3,\); expected a PIL image or a tensor"),
        (Pairs([("x.png", 0)]), "example 0 is str; expected a PIL image"),
        (Pairs([(tensor(0.5), 0)], ids=[1, 2]), r"ids have shape \(2,\); give one for each of 1"),
        (Pairs([*gray(1), (Image.new("RGB", (6, 6)), 0)]), r"has shape \(3, 6, 6\), but the first"),
    ],
)
def test_a_users_mistakes_are_explained(dataset: Dataset[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        from_dataset(dataset)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"dataset": "fashion-mnits"},
            "^dataset 'fashion-mnits' is unknown; did you mean 'fashion-",
        ),
        ({"dataset": "zzz"}, "^dataset 'zzz' is unknown; known are digits, shapes"),
        ({"clients": 0}, "^clients must be >= 1, got 0"),
        ({"holdout": 1.0}, "^holdout must be >= 0 and < 1, got 1.0"),
        ({"examples": 0}, "^examples must be >= 1, got 0"),
        ({"image_size": -3}, "^image_size must be >= 1, got -3"),
        ({"workers": -1}, "^workers must be >= 0, got -1"),
        ({"augment": "rotate"}, "^augment must be none, flip, crop or crop-flip, got 'rotate'"),
        ({"memory": "disk"}, "^memory must be auto, device or stream, got 'disk'"),
    ],
)
def test_a_wrong_field_is_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Data(**fields)


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
def test_a_missing_dataset_is_named_with_a_way_out(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        load(Data(dataset=name, root="nowhere"))
    assert "\n" not in str(caught.value)
