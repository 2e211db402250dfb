"""The round loop: the same bits for any number of groups, exact weights and metrics, few calls."""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import fedddp
from fedddp import (
    CohortConfig,
    Config,
    DataConfig,
    EvaluationConfig,
    FeatureShift,
    Federation,
    LocalConfig,
    ModelConfig,
    TopologyConfig,
    TrackingConfig,
)
from fedddp.aggregation import Mean
from fedddp.algorithms import SCAFFOLD, ClientContext, FedAvg
from fedddp.data.datasets import load
from fedddp.data.partition import Dirichlet, PowerLaw
from fedddp.storage.history import read_rows
from fedddp.tasks import Classification
from fedddp.testing import run_world
from fedddp.training import synchronous
from fedddp.training.client_trainer import ClientJob
from fedddp.training.session import Session

Shape = tuple[int, int, Literal["colocated", "dedicated"]]
"""Client groups, ranks of each, and where the coordinator is."""

QUIET = TrackingConfig(trackers=[], progress=False)
BASE = Config(
    data=DataConfig(
        dataset="shapes",
        clients=9,
        partition=Dirichlet(alpha=0.5),
        augment="crop",
        holdout=0.2,
        image_size=12,
        examples=240,
    ),
    model=ModelConfig(name="resnet8-gn", norm="batch"),
    local=LocalConfig(epochs=1, batch_size=20, lr=0.05),
    cohort=CohortConfig(size=4),
    evaluation=EvaluationConfig(every=2, clients=5),
    tracking=QUIET,
    rounds=2,
)


def small(**changes: Any) -> Config:
    return dataclasses.replace(BASE, **changes)


def train(config: Config, output: str) -> dict[str, Any]:
    """Train, and return what must not depend on the machine."""
    result = Federation(config, output=output).run()
    rows = [{k: v for k, v in row.items() if not k.startswith("time/")} for row in result.history]
    return {
        "weights": {name: t.numpy() for name, t in result.model.state_dict().items()},
        "history": rows,
        "clients": read_rows(result.folder / "clients.jsonl"),
    }


def worlds(config: Config, tmp_path: Path, *shapes: Shape) -> list[dict[str, Any]]:
    """Train in a world of each of `shapes`; return the coordinators' results."""
    results = []
    for groups, ranks, coordinator in shapes:
        topology = TopologyConfig(ranks_per_client=ranks, coordinator=coordinator, device="cpu")
        size = groups * ranks + (coordinator == "dedicated")
        output = str(tmp_path / f"{groups}x{ranks}-{coordinator}")
        by_rank = run_world(train, dataclasses.replace(config, topology=topology), output, size=size)
        for result in by_rank[1:]:
            assert_same_weights(result["weights"], by_rank[0]["weights"])
        results.append(by_rank[0])
    return results


def assert_same_weights(ours: dict[str, Any], expected: dict[str, Any]) -> None:
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        assert np.array_equal(ours[name], value), name


def assert_same_history(ours: dict[str, Any], expected: dict[str, Any]) -> None:
    """Compare all but the last digits of losses: forward passes of other sizes round otherwise."""
    for kind in ("history", "clients"):
        assert len(ours[kind]) == len(expected[kind])
        for row, other in zip(ours[kind], expected[kind], strict=True):
            assert row == {
                k: pytest.approx(v, rel=1e-6) if "loss" in k and v else v for k, v in other.items()
            }


VARIANTS = {
    "batch norm, augmented, held out": BASE,
    "poisson, momentum, optimizers kept": small(
        cohort=CohortConfig(size=3, sampling="poisson"),
        algorithm=FedAvg(momentum=0.9),
        local=LocalConfig(epochs=1, batch_size=20, lr=0.01, momentum=0.5, optimizer_state="keep"),
        rounds=4,
    ),
    "clipped updates, feature shift, traced": small(
        model=ModelConfig(name="resnet8-gn"),
        aggregation=Mean(clip_norm=0.05),
        data=dataclasses.replace(BASE.data, feature_shift=FeatureShift(noise=0.1)),
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_model_and_metrics_are_bit_identical_for_any_number_of_groups(variant: str, tmp_path: Path) -> None:
    alone, *others = worlds(
        VARIANTS[variant], tmp_path, (1, 1, "colocated"), (3, 1, "colocated"), (2, 1, "dedicated")
    )
    for other in others:
        assert_same_weights(other["weights"], alone["weights"])
        assert_same_history(other, alone)


def test_clients_on_two_ranks_are_bit_identical_for_any_number_of_groups(tmp_path: Path) -> None:
    config = small(model=ModelConfig(name="resnet8-gn", norm="sync"))
    one, two, dedicated = worlds(
        config, tmp_path, (1, 2, "colocated"), (2, 2, "colocated"), (1, 2, "dedicated")
    )
    for other in (two, dedicated):
        assert_same_weights(other["weights"], one["weights"])
        assert_same_history(other, one)


def test_clients_on_one_and_two_ranks_train_the_same_model(tmp_path: Path) -> None:
    config = small(model=ModelConfig(name="cnn", norm="sync"), local=LocalConfig(batch_size=20, lr=0.05))
    one, two = worlds(config, tmp_path, (1, 1, "colocated"), (1, 2, "colocated"))
    for name, expected in one["weights"].items():
        assert np.abs(two["weights"][name] - expected).max() <= 1e-5 * max(1, np.abs(expected).max()), name


def test_another_seed_trains_another_model(tmp_path: Path) -> None:
    first = train(BASE, str(tmp_path / "0"))
    second = train(small(seed=1), str(tmp_path / "1"))
    assert not np.array_equal(first["weights"]["fc.weight"], second["weights"]["fc.weight"])


def test_clients_count_by_their_examples() -> None:
    # One full-batch step of all clients is one step on the weighted mean of their gradients.
    data = DataConfig(dataset="digits", clients=5, partition=PowerLaw(exponent=1.2))
    config = small(
        data=data,
        model=ModelConfig(name="2nn"),
        local=LocalConfig(batch_size=2000, lr=0.5),
        cohort=CohortConfig(size=5),
        evaluation=EvaluationConfig(every=1),
        rounds=1,
    )
    images, _ = load(data)
    assert images.pixels is not None
    model = config.model.build(classes=images.classes, shape=images.shape, seed=config.seed)
    x = images.pixels.float() / 255
    x = (x - torch.tensor(images.mean).view(-1, 1, 1)) / torch.tensor(images.std).view(-1, 1, 1)
    F.cross_entropy(model(x), torch.from_numpy(images.labels)).backward()  # type: ignore[no-untyped-call]
    result = Federation(config).run()
    for (name, before), after in zip(model.named_parameters(), result.model.parameters(), strict=True):
        assert before.grad is not None
        torch.testing.assert_close(after, before - 0.5 * before.grad, atol=2e-6, rtol=1e-5, msg=name)


def test_evaluation_is_exact(tmp_path: Path) -> None:
    (result,) = worlds(small(rounds=1), tmp_path, (3, 1, "colocated"))
    config = small(rounds=1)
    images, test = load(config.data)
    assert test is not None
    assert test.pixels is not None
    module = config.model.build(classes=images.classes, shape=images.shape, seed=0)
    module.load_state_dict({name: torch.from_numpy(t) for name, t in result["weights"].items()})
    module.eval()
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (images.mean, images.std))
    with torch.no_grad():
        logits: Tensor = module((test.pixels.float() / 255 - mean) / std)
    labels = torch.from_numpy(test.labels)
    row = result["history"][0]
    assert row["eval/accuracy"] == float((logits.argmax(1) == labels).double().mean())
    assert row["eval/loss"] == pytest.approx(float(F.cross_entropy(logits.double(), labels)), rel=1e-5)
    top5 = (logits.topk(5).indices == labels[:, None]).any(1).double().mean()
    assert row["eval/accuracy_top5"] == float(top5)


def test_history_has_bytes_times_and_cohort_of_every_round(tmp_path: Path) -> None:
    result = Federation(small(output=str(tmp_path), task=Classification(label_smoothing=0.1))).run()
    size = sum(p.numel() for p in result.model.parameters())
    floats = sum(b.numel() for b in result.model.buffers() if b.is_floating_point())
    integer_buffers = sum(b.numel() for b in result.model.buffers() if not b.is_floating_point())
    for number, row in enumerate(result.history, 1):
        assert row["round"] == number
        assert len(row["cohort"]) == row["clients/aggregated"] == 4
        assert row["bytes/up"] == row["bytes/down"] == 4 * (4 * size + 4 * floats + 8 * integer_buffers)
        assert row["train/steps"] >= row["train/examples"] / 20
        seconds = [
            v for k, v in row.items() if k.startswith("time/") and k not in ("time/virtual", "time/idle")
        ]
        phases = sum(seconds) - row["time/round"]
        assert 0 < phases <= row["time/round"]  # what lies between the phases counts, too
        assert ("eval/accuracy" in row) == ("clients/accuracy_mean" in row) == (number == 2)


class Sleeper(FedAvg):
    """FedAvg whose local trainings take a tenth of a second at least."""

    def begin(self, context: ClientContext) -> None:
        time.sleep(0.1)


def history(config: Config) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = Federation(config).run().history
    return rows


@pytest.mark.parametrize(("size", "coordinator"), [(2, "colocated"), (3, "dedicated")])
def test_time_idle_is_the_time_that_a_group_did_not_train(
    size: int, coordinator: Literal["colocated", "dedicated"], tmp_path: Path
) -> None:
    topology = TopologyConfig(coordinator=coordinator)
    config = small(cohort=CohortConfig(size=1), algorithm=Sleeper(), topology=topology, output=str(tmp_path))
    for row in run_world(history, config, size=size)[0]:
        spent = sum(row.get(f"time/{phase}", 0) for phase in ("send", "train", "aggregate", "step"))
        first, second = row["time/idle"]  # the first group has the round's only client
        assert 0 <= first <= spent - 0.1
        assert first < second <= spent
        assert row["time/virtual"] > 0


def test_a_round_without_clients_trains_and_sends_nothing(tmp_path: Path) -> None:
    config = small(cohort=CohortConfig(size=1, sampling="poisson"), rounds=6, output=str(tmp_path))
    result = Federation(config).run()
    empty = [row for row in result.history if not row["cohort"]]
    assert empty
    assert all(row["train/loss"] is None and row["bytes/up"] == 0 for row in empty)


STACKS: list[list[str]] = []
"""The calls from `Federation.run` to the hook, outermost first, at every step."""


class RecordsStack(FedAvg):
    """FedAvg that records the Python stack at every step."""

    def correct(self, context: ClientContext) -> None:
        functions, frame = [], sys._getframe(1)
        while frame.f_code is not Federation.run.__code__:
            functions.append(frame.f_code)
            assert frame.f_back is not None, "the hook was not called from Federation.run"
            frame = frame.f_back
        package = Path(fedddp.__file__).parent
        own = [code.co_name for code in functions if Path(code.co_filename).is_relative_to(package)]
        STACKS.append(own[::-1])


def test_from_federation_run_to_the_step_there_are_at_most_five_calls(tmp_path: Path) -> None:
    STACKS.clear()
    Federation(small(algorithm=RecordsStack(), rounds=1, output=str(tmp_path))).run()
    assert STACKS
    for calls in STACKS:
        assert len(calls) <= 5, calls
        assert calls == ["run_rounds", "run_round", "train_clients", "train", "_local_sgd"]


# ---- groups of different pace ----


def train_at_own_pace(config: Config, output: str) -> tuple[dict[str, Any], list[int]]:
    """Train on a clock by which a client takes 1 s on rank 0 and 4 s on rank 1; return its clients too."""
    seconds, clients, take = 1 + 3 * int(os.environ["RANK"]), [], synchronous.take

    def counting(s: Session, current: Any, job: ClientJob, *rest: Any) -> None:
        clients.append(job.client)
        take(s, current, job, *rest)

    clock = SimpleNamespace(perf_counter=lambda: float(seconds * len(clients)))
    with mock.patch.multiple(synchronous, take=counting, time=clock):
        return train(config, output), clients


@pytest.mark.parametrize(("sums", "slow"), [("exact", 5 + 5 + 2 + 2), ("float32", 4 * 5)])
def test_a_slow_group_gets_fewer_clients_where_the_bits_stay(tmp_path: Path, sums: Any, slow: int) -> None:
    config = small(
        data=DataConfig(dataset="shapes", clients=10, image_size=12, examples=60),
        algorithm=SCAFFOLD(),
        local=LocalConfig(batch_size=3, lr=0.05),
        cohort=CohortConfig(size=10),
        aggregation=Mean(sums=sums),
        evaluation=EvaluationConfig(every=4),
        rounds=4,
    )
    (alone, _), *_ = run_world(train_at_own_pace, config, str(tmp_path / "1"), size=1)
    (fast, one), (_, other) = run_world(train_at_own_pace, config, str(tmp_path / "2"), size=2)
    assert [len(one), len(other)] == [40 - slow, slow]
    if sums == "exact":
        assert_same_weights(fast["weights"], alone["weights"])
