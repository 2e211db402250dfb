"""A run that is stopped or killed anywhere and resumed equals an uninterrupted one, for every algorithm.

A run is asked to stop at a random one of the points where ranks check for a stop request: before a client
trains, or at the end of a round. It resumes and is killed at a random one of these points, or while it
writes a checkpoint. Then it resumes in a world of two client groups.
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

from fedddp import (
    CheckpointConfig,
    CohortConfig,
    Config,
    ConfigError,
    DataConfig,
    EvaluationConfig,
    Federation,
    LocalConfig,
    Result,
    TopologyConfig,
    TrackingConfig,
)
from fedddp.algorithms import SCAFFOLD, Algorithm, AsynchronousAlgorithm, FedAvg
from fedddp.data.partition import Dirichlet
from fedddp.distributed.world import World
from fedddp.section import choices
from fedddp.storage.history import read_rows
from fedddp.testing import run_world
from fedddp.training import assembly
from fedddp.training.engine import channels_last

LOCALS = (
    LocalConfig(batch_size=20, lr=0.1, epochs=2),
    LocalConfig(batch_size=20, lr=0.1, steps=1),
    LocalConfig(batch_size=20, lr=0.01, steps=3, optimizer="adamw", optimizer_state="keep"),
)
"""Settings of local training; an algorithm is tested with the first that it accepts."""

BASE = Config(
    data=DataConfig(clients=6, partition=Dirichlet(alpha=1.0), holdout=0.2),
    cohort=CohortConfig(size=3),
    evaluation=EvaluationConfig(every=2, clients=3),
    checkpoint=CheckpointConfig(every=2),
    tracking=TrackingConfig(trackers=[], progress=False),
    rounds=5,
)


DRAW = torch.Generator().manual_seed(1)
TRAIN, TEST = (
    TensorDataset(torch.rand(n, 1, 8, 8, generator=DRAW), torch.randint(10, (n,), generator=DRAW))
    for n in (300, 50)
)


class Net(nn.Module):
    """Buffers, dropout and a head: parts that algorithms keep, draw at random, or leave out."""

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
    """Ends a run as `kill -9` does: nothing more is written."""


@dataclass
class Checks:
    """The points of a run at which it may be stopped or killed."""

    stop: int = 0
    """Times that it checked for a stop request."""
    all: int = 0
    """These, and the times that a file was forced to the disk."""


@contextmanager
def interrupted(stop_at: int | None = None, kill_at: int | None = None) -> Iterator[Checks]:
    """Request a stop, as a signal does, at the `stop_at`-th check for one; kill at check `kill_at`."""
    checks, stop_requested, fsync = Checks(), World.stop_requested, os.fsync

    def count() -> None:
        checks.all += 1
        if checks.all == kill_at:
            raise Killed

    def counted_stop_requested(world: World) -> bool:
        checks.stop += 1
        count()
        if checks.stop == stop_at:
            world.request_stop()
        return stop_requested(world)

    def counted_fsync(descriptor: int) -> None:
        count()
        fsync(descriptor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(World, "stop_requested", counted_stop_requested)
        patch.setattr(os, "fsync", counted_fsync)
        yield checks


def run(config: Config) -> Result:
    """Train in this rank's world."""
    return Federation(config, module=net(), train=TRAIN, test=TEST).run()


def train(config: Config, stop_at: int | None = None) -> tuple[bool, Checks]:
    """Train in this rank's world; return whether the run finished, and its checks."""
    with interrupted(stop_at) as checks:
        result = run(config)
    return result.finished, checks


def kill(config: Config, at: int) -> None:
    """Train, and end as a killed process does, unless the run finishes before."""
    with interrupted(kill_at=at), suppress(Killed):
        run(config)


def train_all(configs: list[Config]) -> None:
    """Train in this rank's world, one run after another."""
    for config in configs:
        assert train(config)[0], config.output


def train_in_world(size: int, config: Config, stop_at: int | None = None) -> tuple[bool, int]:
    """Return whether the run finished on `size` ranks, and the fewest checks for a stop of any rank."""
    finished, checks = zip(*run_world(train, config, stop_at, size=size), strict=True)
    assert len(set(finished)) == 1
    return finished[0], min(rank.stop for rank in checks)


def without_seconds(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return rows of a history without their seconds."""
    return [{key: value for key, value in row.items() if not key.startswith("time/")} for row in rows]


def rows_of(directory: Path, file: str) -> list[dict[str, Any]]:
    """Return the rows of a file of a run without their seconds."""
    return without_seconds(read_rows(directory / file))


def close(row: dict[str, Any]) -> dict[str, Any]:
    """Allow for an evaluation's float sum, which depends on the ranks that share it; the rest is exact."""
    return {
        key: pytest.approx(row[key], rel=1e-6) if key in ("eval/loss", "loss") else row[key] for key in row
    }


def assert_same(resumed: Path, expected: Path, rounds: int) -> None:
    ours, theirs = (load_file(directory / "model.safetensors") for directory in (resumed, expected))
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert [row["round"] for row in read_rows(resumed / "history.jsonl")] == list(range(1, rounds + 1))
    for file in ("history.jsonl", "clients.jsonl"):
        assert len(rows_of(resumed, file)) == len(rows_of(expected, file))
        for our_row, their_row in zip(rows_of(resumed, file), rows_of(expected, file), strict=True):
            assert our_row == close(their_row)
    states = [newest_states(directory) for directory in (resumed, expected)]
    assert states[0].keys() == states[1].keys()
    assert [name for name in states[0] if not torch.equal(states[0][name], states[1][name])] == []


def newest_states(directory: Path) -> dict[str, Tensor]:
    """Return the state of the server and of the clients at the end of a run."""
    last = max((directory / "checkpoints").iterdir(), key=lambda path: path.name)
    found = [load_file(path) for path in last.glob("*.safetensors")]
    return {name: tensor for tensors in found for name, tensor in tensors.items()}


def local_for(algorithm: Algorithm) -> LocalConfig:
    return next(
        local
        for local in LOCALS
        if all(getattr(local, name) == wanted for name, wanted in algorithm.requires(local).items())
    )


VARIANTS: dict[str, dict[str, Any]] = {
    "momentum kept": {"local": LocalConfig(batch_size=20, momentum=0.9, optimizer_state="keep")},
    "adam kept": {"local": LocalConfig(batch_size=20, lr=0.01, optimizer="adam", optimizer_state="keep")},
    "cosine, augmented, server momentum": {
        "local": LocalConfig(batch_size=20, schedule="cosine"),
        "data": dataclasses.replace(BASE.data, augment="crop"),
        "algorithm": FedAvg(momentum=0.9),
    },
    "step, poisson, every round saved": {
        "local": LocalConfig(batch_size=20, schedule="step", decay=0.5, decay_every=2),
        "cohort": CohortConfig(size=2, sampling="poisson"),
        "checkpoint": CheckpointConfig(every=1, keep=1),
        "seed": 3,
    },
}
"""Further settings whose state or draws a resumed run must have again, some together in one run."""

ALGORITHMS = {name: algorithm() for name, algorithm in choices(Algorithm).items() if "." not in name}
CASES = {
    name: {"algorithm": algorithm, "local": local_for(algorithm)} for name, algorithm in ALGORITHMS.items()
} | VARIANTS


def test_the_cases_cover_every_algorithm() -> None:
    assert sum(isinstance(algorithm, AsynchronousAlgorithm) for algorithm in ALGORITHMS.values()) == 3
    assert len(ALGORITHMS) == 21


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs `uninterrupted` and `resumed` of every case; the latter end in one world of two groups."""
    output, to_resume = tmp_path_factory.mktemp("resumed"), []
    for name, changes in CASES.items():
        draw = random.Random(name)
        config = dataclasses.replace(BASE, **changes, output=str(output / name), name="uninterrupted")
        finished, checks = train(config)
        assert finished
        stopped = dataclasses.replace(config, name="resumed", resume="auto")
        # The last checks of a run come too late: after the last client of the last round.
        assert not train(stopped, stop_at=draw.randint(1, max(1, checks.stop - 4)))[0], name
        kill(stopped, at=draw.randint(1, checks.all // 2))
        to_resume.append(stopped)
    run_world(train_all, to_resume, size=2)
    return output


@pytest.mark.parametrize("name", CASES)
def test_a_stopped_and_killed_run_ends_with_the_same_bits(resumed: Path, name: str) -> None:
    assert_same(resumed / name / "resumed", resumed / name / "uninterrupted", BASE.rounds)


SHAPES: dict[str, tuple[TopologyConfig, tuple[int, int]]] = {
    "two groups to one": (TopologyConfig(), (2, 1)),
    "pairs of ranks": (TopologyConfig(ranks_per_client=2), (4, 2)),
    "a dedicated coordinator": (TopologyConfig(coordinator="dedicated"), (3, 2)),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_stopped_run_resumes_with_another_number_of_groups(tmp_path: Path, shape: str) -> None:
    topology, (first, second) = SHAPES[shape]
    local = LocalConfig(batch_size=20, momentum=0.9, optimizer_state="keep")
    config = dataclasses.replace(
        BASE, topology=topology, local=local, output=str(tmp_path), name="uninterrupted"
    )
    finished, checks = train_in_world(first, config)
    assert finished
    resumed = dataclasses.replace(config, name="resumed", resume="auto")
    assert not train_in_world(first, resumed, random.Random(shape).randint(1, checks - 1))[0]
    assert train_in_world(second, resumed)[0]
    assert_same(tmp_path / "resumed", tmp_path / "uninterrupted", BASE.rounds)


def test_three_stops_before_the_first_client_lose_nothing(tmp_path: Path) -> None:
    config = dataclasses.replace(BASE, local=LOCALS[0], output=str(tmp_path), name="uninterrupted")
    train(config)
    resumed = dataclasses.replace(config, name="resumed", resume="auto")
    for _ in range(3):  # each time before any local training: the same point, the same checkpoint
        assert not train(resumed, 1)[0]
    assert [p.name for p in (tmp_path / "resumed" / "checkpoints").iterdir()] == ["round-00000-00000"]
    assert train(resumed)[0]
    assert_same(tmp_path / "resumed", tmp_path / "uninterrupted", BASE.rounds)


def test_resuming_a_finished_run_changes_no_file(tmp_path: Path) -> None:
    config = dataclasses.replace(BASE, local=LOCALS[0], output=str(tmp_path), name="one", resume="auto")
    train(config)
    before = {path: path.read_bytes() for path in (tmp_path / "one").rglob("*") if path.is_file()}
    finished, checks = train(config)
    assert finished
    assert checks.stop == 0
    after = {path: path.read_bytes() for path in (tmp_path / "one").rglob("*") if path.is_file()}
    assert after == before


@pytest.mark.parametrize("name", ["FedAvg", "FedBuff"])
def test_the_history_of_a_resumed_run_has_every_round(tmp_path: Path, name: str) -> None:
    config = dataclasses.replace(BASE, **CASES[name], output=str(tmp_path), name="uninterrupted")
    expected = run(config).history
    assert [row["round"] for row in expected] == list(range(1, BASE.rounds + 1))
    resumed = dataclasses.replace(config, name="resumed", resume="auto")
    with interrupted(stop_at=7):
        stopped = run(resumed)
    assert not stopped.finished
    assert 0 < len(stopped.history) < BASE.rounds
    finished = run(resumed)
    assert finished.finished
    assert without_seconds(finished.history) == without_seconds(expected)
    assert finished.history[: len(stopped.history)] == stopped.history
    again = run(resumed)  # nothing is left to train
    assert again.finished
    assert again.history == finished.history


@pytest.mark.parametrize("name", ["FedAvg", "FedBuff"])
@pytest.mark.parametrize("fate", ["deleted", "emptied", "line lost", "line twice"])
def test_missing_rows_about_clients_are_noticed_at_resume(tmp_path: Path, name: str, fate: str) -> None:
    config = dataclasses.replace(
        BASE, **CASES[name], output=str(tmp_path), name="one", resume="auto", rounds=4
    )
    file = run(config).folder / "clients.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    assert len(lines) == 6, "three clients after rounds 2 and 4"
    left = {"emptied": [], "line lost": lines[:2] + lines[3:], "line twice": [*lines[:3], *lines[2:]]}
    if fate == "deleted":
        file.unlink()
    else:
        file.write_text("".join(left[fate]))
    rows = len(left.get(fate, []))
    with pytest.raises(ConfigError, match=rf"clients.jsonl has {rows} of the 6 rows before the checkpoint"):
        run(dataclasses.replace(config, rounds=5))
    file.write_text("".join(lines) + '{"round": 9, "client": 1}\n')  # a row after the checkpoint is cut off
    assert run(dataclasses.replace(config, rounds=5)).finished
    assert len(file.read_text().splitlines()) == 9


@pytest.mark.parametrize("algorithm", [FedAvg(momentum=0.5), SCAFFOLD()], ids=["momentum", "SCAFFOLD"])
def test_a_run_resumed_on_a_device_of_another_layout_keeps_its_own(
    tmp_path: Path, algorithm: Algorithm, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataclasses.replace(BASE, algorithm=algorithm, local=LOCALS[0], output=str(tmp_path), rounds=4)
    config = dataclasses.replace(config, resume="auto", checkpoint=CheckpointConfig(every=1))

    def run_convolutions(name: str, rounds: int) -> dict[str, Tensor]:
        with torch.random.fork_rng():
            torch.manual_seed(5)
            module = nn.Sequential(
                nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.Flatten(), nn.Linear(96, 10)
            )
        changed = dataclasses.replace(config, name=name, rounds=rounds)
        result = Federation(changed, module=module, train=TRAIN, test=TEST).run()
        return load_file(result.folder / "model.safetensors")

    whole = run_convolutions("whole", 4)
    run_convolutions("resumed", 2)
    monkeypatch.setattr(assembly, "channels_last", lambda *given: not channels_last(*given))  # as on a GPU
    other = run_convolutions("other", 4)
    assert any(not torch.equal(whole[name], other[name]) for name in whole), "the layout decides the bits"
    resumed = run_convolutions("resumed", 4)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.parametrize("name", ["FedAvg", "FedBuff"])
def test_a_run_killed_after_its_last_checkpoint_only_writes_its_model(tmp_path: Path, name: str) -> None:
    config = dataclasses.replace(BASE, **CASES[name], output=str(tmp_path), name="one", resume="auto")
    assert train(config)[0]
    model = tmp_path / "one" / "model.safetensors"
    written = model.read_bytes()
    model.unlink()
    run_world(train, config, size=2)
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
def test_a_run_without_a_checkpoint_resumes_the_same_wandb_run(tmp_path: Path) -> None:
    tracking = TrackingConfig(trackers=["wandb"], progress=False)
    config = dataclasses.replace(
        BASE, tracking=tracking, output=str(tmp_path), name="one", resume="auto", rounds=2
    )
    assert not train(config, 3)[0]
    run_id = (tmp_path / "one" / ".wandb-run").read_text()
    for checkpoint in (tmp_path / "one" / "checkpoints").iterdir():
        checkpoint.rename(tmp_path / checkpoint.name)  # as if it had been killed before
    assert train(config)[0]
    sessions = [path.name for path in (tmp_path / "one" / "wandb").glob("offline-run-*")]
    assert len(sessions) == 2
    assert all(run_id in name for name in sessions)
