"""Batches: the same on any number of ranks, held or streamed; feature shift and augmentation."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import multiprocessing
import os
import random
import signal
import tempfile
import time
from collections.abc import Iterator
from multiprocessing import reduction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from fedddp import CohortConfig, Federation, TrackingConfig
from fedddp.algorithms import AggregatedUpdate, FedAvg, ServerState
from fedddp.data import stream as stream_of_data
from fedddp.data.datasets import DataConfig, Images
from fedddp.data.decode import Decoded, Reading
from fedddp.data.loader import Batch, ClientLoader
from fedddp.data.stream import _check_socket_folder
from fedddp.data.transforms import FeatureShift
from fedddp.rng import stream
from fedddp.section import ConfigError

CPU = torch.device("cpu")
COUNT, SHAPE = 23, (3, 8, 10)


def pixels() -> Tensor:
    rng = np.random.default_rng(0)
    return torch.from_numpy(rng.integers(0, 256, (COUNT, *SHAPE), dtype=np.uint8))


def images(*, streamed: bool = False) -> Images:
    """Return images whose label is their own index."""
    labels = np.arange(COUNT, dtype=np.int64)
    source = Decoded(TensorDataset(pixels(), torch.from_numpy(labels)), labels, "ours", Reading())
    held = None if streamed else pixels()
    return Images(
        labels, COUNT, SHAPE, held, source if streamed else None, None, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    )


def labels_of(batch: Batch) -> Tensor:
    assert isinstance(batch.targets, Tensor)
    return batch.targets


def loader(*, streamed: bool = False, workers: int = 0, seed: int = 0, **data: Any) -> ClientLoader:
    return ClientLoader(images(streamed=streamed), DataConfig(workers=workers, **data), CPU, seed=seed)


def passes(source: ClientLoader, indices: Any, size: int, **options: Any) -> list[Batch]:
    return list(source.batches(np.asarray(indices, dtype=np.int64), size, **options))


def test_images_are_normalised_and_come_in_the_order_of_their_indices() -> None:
    batches = passes(loader(), [5, 2, 9], 2)
    assert [labels_of(batch).tolist() for batch in batches] == [[5, 2], [9]]
    assert [(batch.count, batch.total) for batch in batches] == [(2, 2), (1, 1)]
    mean, std = torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1), torch.tensor([0.2, 0.3, 0.4]).view(3, 1, 1)
    expected = (pixels()[[5, 2]].float() / 255 - mean) / std
    torch.testing.assert_close(batches[0].images, expected)


def test_no_examples_give_no_batches() -> None:
    assert passes(loader(), [], 4) == []


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("streamed", [False, True])
def test_ranks_share_every_batch_without_dropping_or_repeating_examples(ranks: int, streamed: bool) -> None:
    permuted = stream("x", 1).permutation(np.arange(COUNT)).tolist()
    wanted = [permuted[start : start + 4] for start in range(0, COUNT, 4)]
    source = loader(streamed=streamed)
    shares = [
        passes(source, np.arange(COUNT), 4, rng=stream("x", 1), shard=(rank, ranks)) for rank in range(ranks)
    ]
    assert {len(share) for share in shares} == {len(wanted)}
    for number, batch in enumerate(wanted):
        parts = [share[number] for share in shares]
        real = [labels_of(part)[: part.count].tolist() for part in parts]
        assert sorted(label for part in real for label in part) == sorted(batch)
        assert all(part.total == len(batch) for part in parts)
        assert all(len(labels_of(part)) >= 1 for part in parts), (
            "a rank without an example needs a padding example"
        )
        assert labels_of(parts[0]).tolist() == batch[::ranks]


def test_streamed_images_are_the_held_ones() -> None:
    options: dict[str, Any] = {"train": True, "client": 4, "shard": (1, 2)}
    shift = FeatureShift(rotation=20, color=0.3, noise=0.1)
    held = loader(feature_shift=shift, augment="crop-flip")
    streamed = loader(streamed=True, workers=2, feature_shift=shift, augment="crop-flip")
    for _ in range(2):  # the workers are kept from pass to pass
        pairs = zip(
            passes(held, np.arange(COUNT), 5, **{**options, "rng": stream("o")}),
            passes(streamed, np.arange(COUNT), 5, **{**options, "rng": stream("o")}),
            strict=True,
        )
        for ours, theirs in pairs:
            assert torch.equal(labels_of(ours), labels_of(theirs))
            torch.testing.assert_close(ours.images, theirs.images)


def one_pass(source: ClientLoader, **options: Any) -> dict[int, Tensor]:
    """Return the images of one pass in one batch, by label."""
    return dict(by_label(passes(source, np.arange(COUNT), COUNT, **options)))


def by_label(batches: list[Batch]) -> Iterator[tuple[int, Tensor]]:
    for batch in batches:
        yield from zip(labels_of(batch)[: batch.count].tolist(), batch.images, strict=False)


@pytest.mark.parametrize("ranks", [1, 3])
def test_augmentation_depends_on_the_generator_of_the_pass_only(ranks: int) -> None:
    torch.manual_seed(ranks)  # torch's global generator does not affect results
    source = loader(augment="crop-flip")
    together = dict(by_label(passes(source, np.arange(COUNT), 6, rng=stream("o"), train=True)))
    shared: dict[int, Tensor] = {}
    for rank in range(ranks):
        shared |= by_label(
            passes(source, np.arange(COUNT), 6, rng=stream("o"), train=True, shard=(rank, ranks))
        )
    assert shared.keys() == together.keys()
    assert all(torch.equal(shared[label], together[label]) for label in together)


def test_flip_mirrors_about_half_and_crop_moves_by_up_to_an_eighth() -> None:
    plain = one_pass(loader())
    flipped = dict(
        by_label(passes(loader(augment="flip"), np.arange(COUNT), COUNT, rng=stream("f"), train=True))
    )
    mirrored = [label for label in plain if torch.equal(flipped[label], plain[label].flip(-1))]
    untouched = [label for label in plain if torch.equal(flipped[label], plain[label])]
    assert len(mirrored) + len(untouched) == COUNT
    assert 5 <= len(mirrored) <= 18
    moved = dict(
        by_label(passes(loader(augment="crop"), np.arange(COUNT), COUNT, rng=stream("c"), train=True))
    )
    offsets = set()
    for label, image in plain.items():
        # A border of black pixels, before normalisation, of an eighth of each side.
        black = (0 - torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)) / torch.tensor([0.2, 0.3, 0.4]).view(
            3, 1, 1
        )
        padded = black.expand(3, 10, 12).clone()
        padded[:, 1:9, 1:11] = image
        found = [
            (y, x)
            for y in range(3)
            for x in range(3)
            if torch.allclose(moved[label], padded[:, y : y + 8, x : x + 10])
        ]
        assert len(found) == 1
        offsets.add(found[0])
    assert len(offsets) > 4


def test_only_training_is_augmented() -> None:
    source = loader(augment="crop-flip")
    plain = passes(loader(), np.arange(COUNT), COUNT)[0].images
    assert torch.equal(passes(source, np.arange(COUNT), COUNT)[0].images, plain)


def test_the_feature_shift_differs_between_clients_and_seeds() -> None:
    feature_shift = FeatureShift(rotation=45, color=0.5, noise=0.2)

    def shifted(client: int | None, seed: int) -> Tensor:
        return passes(loader(feature_shift=feature_shift, seed=seed), np.arange(COUNT), COUNT, client=client)[
            0
        ].images

    plain = passes(loader(), np.arange(COUNT), COUNT)[0].images
    assert torch.equal(shifted(3, 0), shifted(3, 0))
    assert not torch.equal(shifted(3, 0), shifted(4, 0))
    assert not torch.equal(shifted(3, 0), shifted(3, 1))
    assert torch.equal(shifted(None, 0), plain)


def test_a_tint_multiplies_the_channels_by_the_clients_gains() -> None:
    tinted = FeatureShift(color=0.5)
    gains = torch.tensor(tinted.of_client(2, 0).gains).view(3, 1, 1)
    got = passes(loader(feature_shift=tinted), [7], 1, client=2)[0].images[0]
    mean, std = torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1), torch.tensor([0.2, 0.3, 0.4]).view(3, 1, 1)
    torch.testing.assert_close(got, ((pixels()[7].float() / 255 * gains).clamp(0, 1) - mean) / std)


def test_noise_is_a_function_of_the_example_not_of_the_batch() -> None:
    noisy = FeatureShift(noise=0.3)
    one = dict(by_label(passes(loader(feature_shift=noisy), [4, 9, 1], 2, client=1)))
    other = dict(by_label(passes(loader(feature_shift=noisy), [1, 4], 1, client=1)))
    assert torch.equal(one[4], other[4])
    assert torch.equal(one[1], other[1])
    plain = dict(by_label(passes(loader(), [4], 1)))
    assert not torch.equal(one[4], plain[4])


# ---- datasets that draw at random, and workers that fail ----


class Drawing(Dataset[Any]):
    """A user's dataset whose images are drawn by the three global generators."""

    def __init__(self, fault: str = "") -> None:
        self.fault = fault

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> Any:
        if index == 7 and self.fault == "error":
            raise KeyError("image")
        if index == 7 and self.fault == "death" and torch.utils.data.get_worker_info():
            os.kill(os.getpid(), signal.SIGKILL)
        drawn = [random.random(), np.random.random(), float(torch.rand(()))]
        image = np.broadcast_to(np.array(drawn)[:, None, None], SHAPE)
        return torch.from_numpy(image.copy()), index


def drawing(workers: int, fault: str = "") -> ClientLoader:
    labels = np.arange(COUNT, dtype=np.int64)
    streamed = dataclasses.replace(
        images(streamed=True), source=Decoded(Drawing(fault), labels, "ours", Reading())
    )
    return ClientLoader(streamed, DataConfig(workers=workers), CPU, seed=0)


def drawn_in(source: ClientLoader, *, ranks: int = 1, name: int = 0, earlier: int = 0) -> dict[int, Tensor]:
    """Return the images of a pass over all ranks, after so many `earlier` passes, by label."""
    for number in range(earlier):
        passes(source, np.arange(9), 4, rng=stream("earlier", number))
    found: dict[int, Tensor] = {}
    for rank in range(ranks):
        rng = stream("pass", name)
        found |= by_label(passes(source, np.arange(COUNT), 4, rng=rng, shard=(rank, ranks)))
    assert len(found) == COUNT
    return found


def equal(one: dict[int, Tensor], other: dict[int, Tensor]) -> list[bool]:
    return [torch.equal(one[label], other[label]) for label in range(COUNT)]


@pytest.mark.parametrize(("workers", "ranks"), [(0, 3), (1, 1), (2, 1), (2, 2)])
def test_random_transforms_do_not_depend_on_workers_ranks_or_earlier_passes(workers: int, ranks: int) -> None:
    torch.manual_seed(workers)
    random.seed(workers)
    np.random.seed(workers)
    reference = drawn_in(drawing(0))
    assert all(equal(drawn_in(drawing(workers), ranks=ranks, earlier=workers), reference))


def test_random_transforms_differ_between_passes_and_examples() -> None:
    source = drawing(0)
    one, other = drawn_in(source, name=0), drawn_in(source, name=1)
    assert not any(equal(one, other))
    # Of the draws of each generator, no two are the same.
    for channel in range(3):
        assert len({float(image[channel, 0, 0]) for image in (*one.values(), *other.values())}) > COUNT


def test_a_pass_in_order_draws_the_same_every_time() -> None:
    """As evaluation does, which has no generator."""
    source = drawing(0)
    one, other = (dict(by_label(passes(source, np.arange(COUNT), 4))) for _ in range(2))
    assert all(equal(one, other))


@pytest.mark.parametrize("workers", [0, 2])
def test_an_example_that_cannot_be_read_is_named_by_any_worker(workers: int) -> None:
    with pytest.raises(ValueError, match=r"^ours: example 7 cannot be read as an image .KeyError: 'image'.;"):
        passes(drawing(workers, "error"), np.arange(COUNT), 4)


def test_a_worker_that_is_killed_is_one_line() -> None:
    with pytest.raises(
        ValueError, match=r"^a worker that reads images ended \(.+\); if /dev/shm .*=0$"
    ) as caught:
        passes(drawing(1, "death"), np.arange(COUNT), 4)
    assert "\n" not in str(caught.value)


def kill_worker() -> None:
    (worker,) = multiprocessing.active_children()
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGKILL)


@pytest.mark.parametrize("error", [ConnectionResetError(104, "reset"), FileNotFoundError(2, "x"), EOFError()])
def test_a_worker_that_is_killed_while_it_hands_over_a_batch_is_one_line(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(connection: Any) -> int:
        kill_worker()
        raise error  # as the connection does, before the signal comes that a child ended

    monkeypatch.setattr(reduction, "recv_handle", broken)
    with pytest.raises(ValueError, match=r"^a worker that reads images ended \(.+\); if /dev/shm .*=0$"):
        passes(drawing(1), np.arange(COUNT), 4)


class Killing(FedAvg):
    """Kills the worker between two rounds, when nothing is read."""

    def step(self, server: ServerState, aggregated: AggregatedUpdate) -> None:
        kill_worker()
        while True:  # until the signal comes, which may wake another thread than this one
            time.sleep(0.01)


def test_a_worker_that_is_killed_between_batches_is_one_line(tmp_path: Path) -> None:
    data = DataConfig(dataset="shapes", examples=40, image_size=8, clients=2, memory="stream", workers=1)
    quiet = TrackingConfig(trackers=[], progress=False)
    federation = Federation(
        data=data, cohort=CohortConfig(size=2), algorithm=Killing(), tracking=quiet, output=str(tmp_path)
    )
    with pytest.raises(ValueError, match=r"^a worker that reads images ended \(.+\); if /dev/shm .*=0$"):
        federation.run()


def test_an_error_of_another_cause_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(connection: Any) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(reduction, "recv_handle", full)
    monkeypatch.setattr(stream_of_data, "SIGNAL_S", 0.01)
    with pytest.raises(OSError, match="Too many open files"):
        passes(drawing(1), np.arange(COUNT), 4)


@pytest.mark.parametrize(("length", "refused"), [(64, False), (65, True), (200, True)])
def test_a_temporary_folder_too_long_for_sockets_is_refused(
    length: int, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A socket's path has 104 bytes on macOS; multiprocessing adds /pymp-xxxxxxxx/listener-xxxxxxxx, 32 bytes.
    folder = "/" + "x" * (length - 1)
    monkeypatch.setattr(tempfile, "tempdir", folder)
    message = (
        f"^TMPDIR={folder} is too long for the sockets of data.workers; set TMPDIR=/tmp, or data.workers=0"
    )
    with pytest.raises(ConfigError, match=message) if refused else contextlib.nullcontext():
        _check_socket_folder()


def test_without_workers_the_temporary_folder_may_be_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/" + "x" * 200)
    assert len(passes(loader(streamed=True), np.arange(COUNT), COUNT)) == 1
    with pytest.raises(ConfigError, match="is too long for the sockets of data.workers"):
        passes(loader(streamed=True, workers=1), np.arange(COUNT), COUNT)
