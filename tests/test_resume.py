"""Stop or kill anywhere, resume, and nothing tells the run from one that was left in peace: for every method.

A run is asked to stop at a random one of the moments at which ranks look whether they were: before a visit,
or at the end of a round. It goes on, and is killed at a random one of these or while it writes a checkpoint.
Then it goes on in a world of two client groups.
"""

from __future__ import annotations

import dataclasses
import os
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from fedddp import Cohort, Data, Dirichlet, Evaluation, FedAvg, Federation, Local, Run, Topology, Track
from fedddp.algorithms.algorithm import Method
from fedddp.config.loader import choices
from fedddp.distributed.world import World
from fedddp.storage.checkpoint import Checkpoint
from fedddp.storage.history import read_rows
from fedddp.testing import run_world

LOCALS = (
    Local(batch_size=20, lr=0.1, epochs=2),
    Local(batch_size=20, lr=0.1, steps=1),
    Local(batch_size=20, lr=0.01, steps=3, optimizer="adamw", optimizer_state="keep"),
)
"""Local trainings; a method is tried with the first that it can be combined with."""

BASE = Run(
    data=Data(clients=6, partition=Dirichlet(alpha=1.0), holdout=0.2),
    cohort=Cohort(size=3),
    evaluation=Evaluation(every=2, clients=3),
    checkpoint=Checkpoint(every=2),
    track=Track(with_=[], progress=False),
    rounds=5,
)


DRAW = torch.Generator().manual_seed(1)
TRAIN, TEST = (
    TensorDataset(torch.rand(n, 1, 8, 8, generator=DRAW), torch.randint(10, (n,), generator=DRAW))
    for n in (300, 50)
)


class Net(nn.Module):
    """Statistics, dropout, and a head: something for every method to keep, to draw, or to leave alone."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Dropout(0.2)
        )
        self.head = nn.Linear(24, 10)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(images))
        return logits


def net() -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return Net()


class Killed(BaseException):
    """Ends a run as a kill does: nothing more is written."""


@dataclass
class Moments:
    """The moments of a run at which it may be stopped or killed."""

    looks: int = 0
    """Times it looked whether it shall stop."""
    all: int = 0
    """Looks, and files that were forced to the disk."""


@contextmanager
def disturbed(stop_at: int | None = None, kill_at: int | None = None) -> Iterator[Moments]:
    """Ask this process to stop, as a signal would, the `stop_at`-th time it looks; kill it at `kill_at`."""
    moments, look, fsync = Moments(), World.stop_requested, os.fsync

    def pass_one() -> None:
        moments.all += 1
        if moments.all == kill_at:
            raise Killed

    def stop_requested(world: World) -> bool:
        moments.looks += 1
        pass_one()
        world.stopping = world.stopping or moments.looks == stop_at
        return look(world)

    def forced(descriptor: int) -> None:
        pass_one()
        fsync(descriptor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(World, "stop_requested", stop_requested)
        patch.setattr(os, "fsync", forced)
        yield moments


def train(run: Run, stop_at: int | None = None) -> tuple[bool, Moments]:
    """Train in this rank's world; return whether the run finished, and its moments."""
    with disturbed(stop_at) as moments:
        outcome = Federation(run, model=net(), train=TRAIN, test=TEST).run()
    return outcome.finished, moments


def kill(run: Run, at: int) -> None:
    """Train, and end as a killed process does; the run may be done before."""
    with disturbed(kill_at=at), suppress(Killed):
        Federation(run, model=net(), train=TRAIN, test=TEST).run()


def train_all(runs: list[Run]) -> None:
    """Train in this rank's world, one after another."""
    for run in runs:
        assert train(run)[0], run.output


def train_in(size: int, run: Run, stop_at: int | None = None) -> tuple[bool, int]:
    """Return whether the run finished in a world of its own, and how often the ranks looked at least."""
    finished, moments = zip(*run_world(train, run, stop_at, size=size), strict=True)
    assert len(set(finished)) == 1
    return finished[0], min(one.looks for one in moments)


def rows(folder: Path, file: str) -> list[dict[str, Any]]:
    """Return the lines of a run but for seconds."""
    return [
        {key: value for key, value in row.items() if not key.startswith("time/")}
        for row in read_rows(folder / file)
    ]


def close(row: dict[str, Any]) -> dict[str, Any]:
    """Allow for an evaluation's float sum, which depends on the ranks that share it; the rest is exact."""
    return {
        key: pytest.approx(row[key], rel=1e-6) if key in ("eval/loss", "loss") else row[key] for key in row
    }


def assert_same(resumed: Path, expected: Path, rounds: int) -> None:
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (resumed, expected))
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert [row["round"] for row in read_rows(resumed / "history.jsonl")] == list(range(1, rounds + 1))
    for file in ("history.jsonl", "clients.jsonl"):
        assert len(rows(resumed, file)) == len(rows(expected, file))
        for ours_row, their_row in zip(rows(resumed, file), rows(expected, file), strict=True):
            assert ours_row == close(their_row)
    states = [newest_states(folder) for folder in (resumed, expected)]
    assert states[0].keys() == states[1].keys()
    assert [name for name in states[0] if not torch.equal(states[0][name], states[1][name])] == []


def newest_states(folder: Path) -> dict[str, Tensor]:
    """Return what the server and the clients keep at the end of a run."""
    last = max((folder / "checkpoints").iterdir(), key=lambda path: path.name)
    found = [load_file(path) for path in last.glob("*.safetensors")]
    return {name: tensor for tensors in found for name, tensor in tensors.items()}


def local_for(method: Method) -> Local:
    return next(
        local
        for local in LOCALS
        if all(getattr(local, name) == wanted for name, wanted in method.needs(local).items())
    )


VARIANTS: dict[str, dict[str, Any]] = {
    "momentum kept": {"local": Local(batch_size=20, momentum=0.9, optimizer_state="keep")},
    "adam kept": {"local": Local(batch_size=20, lr=0.01, optimizer="adam", optimizer_state="keep")},
    "cosine": {"local": Local(batch_size=20, schedule="cosine")},
    "step": {"local": Local(batch_size=20, schedule="step", decay=0.5, decay_every=2)},
    "server momentum": {"algorithm": FedAvg(momentum=0.9), "local": LOCALS[0]},
    "poisson": {"cohort": Cohort(size=2, sampling="poisson"), "local": LOCALS[0], "seed": 3},
    "augmented": {"data": dataclasses.replace(BASE.data, augment="crop"), "local": LOCALS[0]},
    "every round saved": {"checkpoint": Checkpoint(every=1, keep=1), "local": LOCALS[0]},
}
METHODS = {name: method() for name, method in choices(Method).items() if "." not in name}
CASES = {
    name: {"algorithm": method, "local": local_for(method)} for name, method in METHODS.items()
} | VARIANTS


def test_all_methods_are_there() -> None:
    assert sum(method.asynchronous for method in METHODS.values()) == 3
    assert len(METHODS) == 21


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For every case the folders `whole` and `parted`; the latter are finished in one world of two groups."""
    where, parted = tmp_path_factory.mktemp("resumed"), []
    for name, changes in CASES.items():
        draw, output = random.Random(name), where / name
        whole = dataclasses.replace(BASE, **changes, output=str(output), name="whole")
        finished, moments = train(whole)
        assert finished
        parted.append(dataclasses.replace(whole, name="parted", resume="auto"))
        assert not train(parted[-1], stop_at=draw.randint(1, max(1, moments.looks - 1)))[0], name
        kill(parted[-1], at=draw.randint(1, moments.all // 2))
    run_world(train_all, parted, size=2, timeout_s=200)
    return where


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", CASES)
def test_a_stopped_and_killed_run_goes_on_as_if_nothing_had_happened(resumed: Path, name: str) -> None:
    assert_same(resumed / name / "parted", resumed / name / "whole", BASE.rounds)


SHAPES: dict[str, tuple[Topology, tuple[int, int]]] = {
    "two groups to one": (Topology(), (2, 1)),
    "pairs of ranks": (Topology(ranks_per_client=2), (4, 2)),
    "a dedicated coordinator": (Topology(coordinator="dedicated"), (3, 2)),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_stopped_run_goes_on_with_another_number_of_groups(tmp_path: Path, shape: str) -> None:
    topology, (first, second) = SHAPES[shape]
    local = Local(batch_size=20, momentum=0.9, optimizer_state="keep")
    whole = dataclasses.replace(BASE, topology=topology, local=local, output=str(tmp_path), name="whole")
    finished, looks = train_in(first, whole)
    assert finished
    parted = dataclasses.replace(whole, name="parted", resume="auto")
    assert not train_in(first, parted, random.Random(shape).randint(1, looks - 1))[0]
    assert train_in(second, parted)[0]
    assert_same(tmp_path / "parted", tmp_path / "whole", BASE.rounds)


def test_a_stop_before_the_first_visit_and_two_in_a_row_lose_nothing(tmp_path: Path) -> None:
    whole = dataclasses.replace(BASE, local=LOCALS[0], output=str(tmp_path), name="whole")
    train(whole)
    parted = dataclasses.replace(whole, name="parted", resume="auto")
    for _ in range(3):  # each time before any visit: the same point, the same checkpoint
        assert not train(parted, 1)[0]
    assert [p.name for p in (tmp_path / "parted" / "checkpoints").iterdir()] == ["round-00000-00000"]
    assert train(parted)[0]
    assert_same(tmp_path / "parted", tmp_path / "whole", BASE.rounds)


def test_a_finished_run_is_left_as_it_is(tmp_path: Path) -> None:
    run = dataclasses.replace(BASE, local=LOCALS[0], output=str(tmp_path), name="whole", resume="auto")
    train(run)
    before = {path: path.read_bytes() for path in (tmp_path / "whole").rglob("*") if path.is_file()}
    finished, moments = train(run)
    assert finished
    assert moments.looks == 0
    after = {path: path.read_bytes() for path in (tmp_path / "whole").rglob("*") if path.is_file()}
    assert after == before


@pytest.mark.parametrize("name", ["FedAvg", "FedBuff"])
def test_a_run_killed_after_its_last_checkpoint_only_writes_its_model(tmp_path: Path, name: str) -> None:
    run = dataclasses.replace(BASE, **CASES[name], output=str(tmp_path), name="one", resume="auto")
    assert train(run)[0]
    model = tmp_path / "one" / "model.safetensors"
    written = model.read_bytes()
    model.unlink()
    run_world(train, run, size=2, timeout_s=40)
    assert model.read_bytes() == written


@pytest.fixture
def wandb_offline(tmp_path: Path) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("DATA", "CACHE", "CONFIG"):
            patch.setenv(f"WANDB_{name}_DIR", str(tmp_path / "wandb-home"))
        patch.setenv("WANDB_MODE", "offline")
        yield
        sys.modules["wandb"].teardown()  # ends its service


@pytest.mark.usefixtures("wandb_offline")
def test_the_wandb_run_is_the_same_one_even_if_no_checkpoint_was_left(tmp_path: Path) -> None:
    track = Track(with_=["wandb"], progress=False)
    run = dataclasses.replace(BASE, track=track, output=str(tmp_path), name="one", resume="auto", rounds=2)
    assert not train(run, 3)[0]
    noted = (tmp_path / "one" / ".wandb-run").read_text()
    for checkpoint in (tmp_path / "one" / "checkpoints").iterdir():
        checkpoint.rename(tmp_path / checkpoint.name)  # as if it had been killed before
    assert train(run)[0]
    sessions = [path.name for path in (tmp_path / "one" / "wandb").glob("offline-run-*")]
    assert len(sessions) == 2
    assert all(noted in name for name in sessions)
