"""Stop anywhere, resume, and nothing tells the run from one that was never stopped: for every method.

A run is asked to stop at a random one of the moments at which ranks look whether they were: before
a visit, or at the end of a round. It goes on in another world, of one or of two client groups.
"""

from __future__ import annotations

import dataclasses
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fedddp import Cohort, Data, Dirichlet, Evaluation, FedAvg, Federation, Local, Run, Topology, Track
from fedddp.checkpoint import Checkpoint
from fedddp.history import read_rows
from fedddp.method import Method
from fedddp.settings import choices
from fedddp.testing import run_world
from fedddp.topology import World

LOCALS = (
    Local(batch_size=40, lr=0.1, epochs=2),
    Local(batch_size=40, lr=0.1, steps=1),
    Local(batch_size=40, lr=0.01, steps=3, optimizer="adamw", optimizer_state="keep"),
)
"""Local trainings; a method is tried with the first that it can be combined with."""

BASE = Run(
    data=Data(dataset="digits", clients=6, partition=Dirichlet(alpha=1.0), holdout=0.2),
    cohort=Cohort(size=3),
    evaluation=Evaluation(every=2, clients=3),
    checkpoint=Checkpoint(every=2),
    track=Track(with_=[], progress=False),
    rounds=5,
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


@contextmanager
def asked_to_stop(at: int | None) -> Iterator[list[int]]:
    """Ask this process to stop as a signal would, the `at`-th time it looks; yields how often it did."""
    looked, look = [0], World.stop_requested

    def stop_requested(world: World) -> bool:
        looked[0] += 1
        world.stopping = world.stopping or looked[0] == at
        return look(world)

    World.stop_requested = stop_requested  # type: ignore[method-assign]
    try:
        yield looked
    finally:
        World.stop_requested = look  # type: ignore[method-assign]


def train(run: Run, stop_at: int | None = None) -> tuple[bool, int]:
    """Train in this rank's world; return whether the run finished, and how often it looked."""
    with asked_to_stop(stop_at) as looked:
        outcome = Federation(run, model=net()).run()
    return outcome.finished, looked[0]


def train_in(size: int, run: Run, stop_at: int | None = None) -> tuple[bool, int]:
    if size == 1:
        return train(run, stop_at)
    finished, looked = zip(*run_world(train, run, stop_at, size=size), strict=True)
    assert len(set(finished)) == 1
    return finished[0], min(looked)


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


def check(run: Run, where: Path, seed: str, worlds: tuple[int, int, int] = (1, 1, 2)) -> None:
    """Train in `worlds[0]`; then stop in `worlds[1]`, and again after a while, and go on in `worlds[2]`."""
    whole = dataclasses.replace(run, output=str(where), name="whole")
    finished, looks = train_in(worlds[0], whole)
    assert finished
    parted = dataclasses.replace(whole, name="parted", resume="auto")
    draw = random.Random(seed)
    first = draw.randint(1, max(1, looks - 1))
    finished, _ = train_in(worlds[1], parted, first)
    assert not finished, (first, looks)
    second = draw.randint(1, 4)  # so that a resumed run is resumed, too; it may be done by then
    train_in(worlds[1], parted, second)
    finished, _ = train_in(worlds[2], parted)
    assert finished
    assert_same(where / "parted", where / "whole", run.rounds)


def local_for(method: Method) -> Local:
    return next(
        local
        for local in LOCALS
        if all(getattr(local, name) == wanted for name, wanted in method.needs(local).items())
    )


METHODS = {name: method for name, method in choices(Method).items() if "." not in name}


@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_stopped_run_of_any_method_goes_on_as_if_nothing_had_happened(tmp_path: Path, name: str) -> None:
    method = METHODS[name]()
    run = dataclasses.replace(BASE, algorithm=method, local=local_for(method))
    check(run, tmp_path, name)


VARIANTS: dict[str, dict[str, Any]] = {
    "momentum kept": {"local": Local(batch_size=40, momentum=0.9, optimizer_state="keep")},
    "adam kept": {"local": Local(batch_size=40, lr=0.01, optimizer="adam", optimizer_state="keep")},
    "cosine": {"local": Local(batch_size=40, schedule="cosine")},
    "step": {"local": Local(batch_size=40, schedule="step", decay=0.5, decay_every=2)},
    "server momentum": {"algorithm": FedAvg(momentum=0.9), "local": LOCALS[0]},
    "poisson": {"cohort": Cohort(size=2, sampling="poisson"), "local": LOCALS[0], "seed": 3},
    "augmented": {"data": dataclasses.replace(BASE.data, augment="crop"), "local": LOCALS[0]},
    "every round saved": {"checkpoint": Checkpoint(every=1, keep=1), "local": LOCALS[0]},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_stopped_run_goes_on_with_whatever_it_keeps_or_draws(tmp_path: Path, name: str) -> None:
    check(dataclasses.replace(BASE, **VARIANTS[name]), tmp_path, name)


SHAPES: dict[str, tuple[Topology, tuple[int, int, int]]] = {
    "two groups to one": (Topology(), (2, 2, 1)),
    "pairs of ranks": (Topology(ranks_per_client=2), (4, 4, 2)),
    "a dedicated coordinator": (Topology(coordinator="dedicated"), (3, 3, 2)),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_stopped_run_goes_on_with_another_number_of_groups(tmp_path: Path, shape: str) -> None:
    topology, worlds = SHAPES[shape]
    local = Local(batch_size=40, momentum=0.9, optimizer_state="keep")
    check(dataclasses.replace(BASE, topology=topology, local=local), tmp_path, shape, worlds)


def test_a_stop_before_the_first_visit_and_two_in_a_row_lose_nothing(tmp_path: Path) -> None:
    whole = dataclasses.replace(BASE, local=LOCALS[0], output=str(tmp_path), name="whole")
    train(whole)
    parted = dataclasses.replace(whole, name="parted", resume="auto")
    for _ in range(3):  # each time before any visit: the same point, the same checkpoint
        assert train(parted, 1) == (False, 1)
    assert [p.name for p in (tmp_path / "parted" / "checkpoints").iterdir()] == ["round-00000-00000"]
    assert train(parted)[0]
    assert_same(tmp_path / "parted", tmp_path / "whole", BASE.rounds)


def test_a_finished_run_is_left_as_it_is(tmp_path: Path) -> None:
    run = dataclasses.replace(BASE, local=LOCALS[0], output=str(tmp_path), name="whole", resume="auto")
    train(run)
    before = {path: path.read_bytes() for path in (tmp_path / "whole").rglob("*") if path.is_file()}
    assert train(run) == (True, 0)
    after = {path: path.read_bytes() for path in (tmp_path / "whole").rglob("*") if path.is_file()}
    assert after == before


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
