"""Batches at their edges: how many are converted together, and which random numbers go where."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from fedddp.data.datasets import DataConfig, Images
from fedddp.data.decode import Decoded, Reading
from fedddp.data.loader import Batch, ClientLoader
from fedddp.data.transforms import FeatureShift
from fedddp.rng import stream

CPU = torch.device("cpu")
MEBIBYTE = 2**20


def loader_of(pixels: Tensor, *, streamed: bool = False, **data: Any) -> ClientLoader:
    """Return a loader of uint8 `pixels` whose label is their index, and whose normalisation is none."""
    count, *shape = pixels.shape
    labels = np.arange(count, dtype=np.int64)
    source = Decoded(TensorDataset(pixels, torch.from_numpy(labels)), labels, "ours", Reading())
    channels, height, width = shape
    images = Images(
        labels=labels,
        classes=count,
        shape=(channels, height, width),
        pixels=None if streamed else pixels,
        source=source if streamed else None,
        ids=None,
        mean=(0.0,) * channels,
        std=(1.0,) * channels,
    )
    return ClientLoader(images, DataConfig(workers=0, **data), CPU, seed=3)


def labels_of(batch: Batch) -> Tensor:
    assert isinstance(batch.targets, Tensor)
    return batch.targets


def passes(source: ClientLoader, size: int, **options: Any) -> list[Batch]:
    return list(source.batches(np.arange(len(source.images)), size, **options))


# ---- how many batches are converted together ----


def bytes_together(batches: list[Batch]) -> list[int]:
    """Return the bytes of float pixels that lie in one piece of memory, piece after piece."""
    pieces: dict[int, int] = {}
    for batch in batches:
        memory = batch.images.untyped_storage()
        pieces[memory.data_ptr()] = memory.nbytes()
    return list(pieces.values())


@pytest.mark.parametrize(
    ("size", "batch_size", "expected"),
    [
        (64, 512, [32, 32, 4]),  # a batch has 8 MiB: four at a time
        (64, 700, [21.875, 21.875, 21.875, 2.375]),  # two of 10.9 MiB: with a third, 32.8 MiB
        (64, 1400, [21.875, 21.875, 21.875, 2.375]),  # one: two have 43.75 MiB
        (80, 2000, [48.828125, 48.828125, 8.59375]),  # one, though it is larger
        (16, 4000, [4.25]),  # all
    ],
)
def test_batches_are_converted_together_up_to_32_mebibytes_of_float_pixels(
    size: int, batch_size: int, expected: list[float]
) -> None:
    """`size` is that of the images, grey and of 4 bytes per pixel; there are 4,352 of them."""
    pixels = torch.zeros(1, 1, size, size, dtype=torch.uint8).expand(4352, -1, -1, -1)
    batches = passes(loader_of(pixels), batch_size)
    assert sum(len(labels_of(batch)) for batch in batches) == 4352
    assert [piece / MEBIBYTE for piece in bytes_together(batches)] == expected
    assert len(batches) == math.ceil(4352 / batch_size)


def test_streamed_batches_are_converted_one_by_one() -> None:
    pixels = torch.zeros(10, 1, 4, 4, dtype=torch.uint8)
    assert bytes_together(passes(loader_of(pixels, streamed=True), 4)) == [256, 256, 128]


def test_colours_count_in_what_is_converted_together() -> None:
    pixels = torch.zeros(1, 3, 64, 64, dtype=torch.uint8).expand(1024, -1, -1, -1)
    pieces = bytes_together(passes(loader_of(pixels), 128))  # of 6 MiB: five at a time
    assert [piece / MEBIBYTE for piece in pieces] == [30, 18]


# ---- which random numbers go where ----


def test_a_pass_draws_its_permutation_and_then_three_numbers_per_example_in_its_order() -> None:
    """The first number mirrors; the others move across and down, by −1, 0 or 1 in images of 8 x 8."""
    pixels = torch.from_numpy(np.random.default_rng(0).integers(1, 256, (20, 1, 8, 8), dtype=np.uint8))
    batches = passes(loader_of(pixels, augment="crop-flip"), 6, rng=stream("pass"), train=True)
    rng = stream("pass")
    order = rng.permutation(np.arange(20))
    draws = rng.random((20, 3), np.float32)
    assert [label for batch in batches for label in labels_of(batch).tolist()] == order.tolist()
    for got, example, (mirror, across, down) in zip(
        (image for batch in batches for image in batch.images), order, draws, strict=True
    ):
        image = pixels[example].float() / 255
        image = image.flip(-1) if mirror < 0.5 else image
        padded = torch.zeros(1, 10, 10)
        padded[:, 1:9, 1:9] = image
        x, y = int(across * 3), int(down * 3)
        torch.testing.assert_close(got, padded[:, y : y + 8, x : x + 8])


@pytest.mark.parametrize("streamed", [False, True])
def test_without_a_generator_or_without_training_nothing_is_drawn(streamed: bool) -> None:
    pixels = torch.from_numpy(np.random.default_rng(0).integers(1, 256, (20, 1, 8, 8), dtype=np.uint8))
    source = loader_of(pixels, streamed=streamed, augment="crop-flip")
    (plain,) = passes(source, 20, train=True)
    torch.testing.assert_close(plain.images, pixels.float() / 255)
    (permuted,) = passes(source, 20, rng=stream("pass"))
    expected = stream("pass").permutation(np.arange(20))
    assert labels_of(permuted).tolist() == expected.tolist()
    torch.testing.assert_close(permuted.images, pixels[torch.from_numpy(expected)].float() / 255)


def noise_of(client: int) -> Tensor:
    """Return the noise of a client in a grey image, in units of its own standard deviation."""
    pixels = torch.full((1, 1, 40, 40), 128, dtype=torch.uint8)
    shift = FeatureShift(noise=0.05)
    (batch,) = passes(loader_of(pixels, feature_shift=shift), 1, client=client)
    noise = batch.images[0, 0] - 128 / 255
    assert 0 < float(noise.std()) < 0.1
    return noise.flatten() / noise.std()


def test_no_two_clients_have_the_same_noise_not_even_the_first_two() -> None:
    noises = torch.stack([noise_of(client) for client in range(4)])
    alike = noises @ noises.T / noises.shape[1]
    assert torch.allclose(alike, torch.eye(4), atol=0.15)
    assert torch.equal(noise_of(2), noise_of(2))
