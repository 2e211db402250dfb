"""Asynchronous training: metrics, identities, resume, replay, errors, and settings that cannot work."""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from simulation import BASE, config_of, taus_of, train
from torch import nn

from fedddp import (
    CheckpointConfig,
    CohortConfig,
    Config,
    ConfigError,
    DataConfig,
    Federation,
    LocalConfig,
    ModelConfig,
    TopologyConfig,
)
from fedddp.aggregation import Mean
from fedddp.algorithms import (
    Algorithm,
    AsynchronousAlgorithm,
    AsyncSGD,
    ClientContext,
    ClientUpdate,
    Constant,
    FedAsync,
    FedAvg,
    FedBuff,
    ServerState,
)
from fedddp.data.partition import IID
from fedddp.simulation.attacks import GaussianNoise, ModelReplacement
from fedddp.simulation.clock import SameSpeed, Virtual, Wall
from fedddp.storage.history import read_rows
from fedddp.testing import run_world


def test_a_row_has_the_metrics_of_its_arrivals(tmp_path: Path) -> None:
    result = train(config_of("FedBuff"), str(tmp_path))
    taus = taus_of(result)
    for number, row in enumerate(result["history"]):
        own = taus[4 * number : 4 * number + 4]
        assert row["round"] == number + 1
        assert row["staleness/mean"] == np.mean(own)
        assert row["staleness/max"] == max(own)
        assert row["staleness/histogram"] == np.bincount(own).tolist()
        assert row["clients/aggregated"] == 4
        assert len(row["time/idle"]) == 1
        assert row["time/virtual"] > 0
    assert result["history"][-1]["server/version"] == 4  # 12 arrivals, three to a step
    model = (64 * 12 + 12 + 24 + 130 + 24) * 4 + 8
    assert sum(row["bytes/up"] for row in result["history"]) == 12 * model


class Sleeper(FedBuff):
    """FedBuff whose local trainings take a twentieth of a second at least."""

    def begin(self, context: ClientContext) -> None:
        time.sleep(0.05)


@pytest.mark.parametrize(("size", "coordinator"), [(1, "colocated"), (3, "dedicated")])
def test_time_idle_is_the_time_that_a_group_did_not_train(
    size: int, coordinator: Literal["colocated", "dedicated"], tmp_path: Path
) -> None:
    config = dataclasses.replace(BASE, algorithm=Sleeper(), topology=TopologyConfig(coordinator=coordinator))
    rows = run_world(train, config, str(tmp_path), size=size)[0]["history"]
    spent = sum(row.get(f"time/{phase}", 0) for row in rows for phase in ("train", "step"))
    idle = np.array([row["time/idle"] for row in rows])
    assert idle.shape == (3, max(1, size - 1))
    assert idle.min() >= 0
    assert idle.sum() <= idle.shape[1] * spent - 12 * 0.05


def test_fedbuff_whose_buffer_holds_the_cohort_is_uniform_fedavg(tmp_path: Path) -> None:
    # Full-batch steps, because the random stream of the permutation has another name here.
    data = DataConfig(dataset="shapes", clients=4, examples=80, image_size=8, partition=IID())
    config = dataclasses.replace(
        BASE,
        data=data,
        local=LocalConfig(steps=2, batch_size=80, lr=0.1),
        clock=Virtual(),
        model=ModelConfig(norm="sync"),
    )
    results = []
    for algorithm in (FedBuff(buffer_size=4), FedAvg()):
        torch.manual_seed(3)
        net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 10), nn.BatchNorm1d(10))
        federation = Federation(config, module=net, algorithm=algorithm, output=str(tmp_path))
        results.append(federation.run())
    ours, theirs = (dict(result.model.state_dict()) for result in results)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-6)
    for row, other in zip(results[0].history, results[1].history, strict=True):
        assert row["staleness/max"] == 0
        assert row["time/virtual"] == pytest.approx(other["time/virtual"])
        assert row["eval/accuracy"] == other["eval/accuracy"]


def test_fedasync_that_replaces_the_model_by_its_only_clients_equals_fedavg(tmp_path: Path) -> None:
    data = DataConfig(dataset="digits", clients=1)
    config = dataclasses.replace(BASE, data=data, cohort=CohortConfig(size=1), clock=Virtual(), rounds=4)
    replacing = FedAsync(alpha=1.0, rho=0.0, staleness=Constant())
    ours = train(dataclasses.replace(config, algorithm=replacing), str(tmp_path))
    theirs = train(config, str(tmp_path))
    torch.testing.assert_close(ours["params"], theirs["params"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours["buffers"], theirs["buffers"], rtol=1e-5, atol=1e-6)
    assert ours["tracked"] == theirs["tracked"]
    assert taus_of(ours) == [0] * 4


def stop_after(config: Config, output: str, arrivals: int) -> dict[str, Any]:
    """Train, but send the coordinator SIGTERM when so many updates are absorbed."""
    algorithm, count = config.algorithm, [0]
    assert isinstance(algorithm, AsynchronousAlgorithm)
    absorb = type(algorithm).absorb

    def counted(self: Any, server: ServerState, update: ClientUpdate, staleness: int) -> bool:
        count[0] += 1
        if count[0] == arrivals:
            os.kill(os.getpid(), signal.SIGTERM)
        return absorb(self, server, update, staleness)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(algorithm), "absorb", counted)
        return train(config, output)


@pytest.mark.parametrize(("name", "arrivals"), [("FedBuff", 6), ("FedAsync", 4), ("AsyncSGD", 9)])
def test_a_stopped_run_resumes_to_the_same_bits_also_in_another_world(
    name: str, arrivals: int, tmp_path: Path
) -> None:
    config = config_of(name, checkpoint=CheckpointConfig(every=2))
    uninterrupted = run_world(train, config, str(tmp_path), size=1)[0]
    config = dataclasses.replace(config, name="stopped", topology=TopologyConfig(coordinator="dedicated"))
    first = run_world(stop_after, config, str(tmp_path), arrivals, size=3)
    assert [result["finished"] for result in first] == [False] * 3
    assert len(taus_of(first[0])) == arrivals
    again = dataclasses.replace(config, resume="auto", topology=TopologyConfig())
    result = run_world(train, again, str(tmp_path), size=2)[0]
    assert torch.equal(result["params"], uninterrupted["params"])
    assert torch.equal(result["buffers"], uninterrupted["buffers"])
    assert taus_of(result) == taus_of(uninterrupted)
    timed = ("time/", "eval/loss")  # the one float sum whose terms depend on the world
    measured = [
        [{k: v for k, v in row.items() if not k.startswith(timed)} for row in history]
        for history in (uninterrupted["history"], read_rows(result["folder"] / "history.jsonl"))
    ]
    assert measured[0] == measured[1]


def test_a_finished_run_resumes_with_more_rounds(tmp_path: Path) -> None:
    config = config_of("FedAsync", name="resumed")
    train(dataclasses.replace(config, rounds=1), str(tmp_path))
    resumed = train(dataclasses.replace(config, resume="auto"), str(tmp_path))
    uninterrupted = train(dataclasses.replace(config, name="uninterrupted"), str(tmp_path))
    assert torch.equal(resumed["params"], uninterrupted["params"])


@pytest.mark.parametrize(
    ("size", "ranks", "name"), [(3, 1, "FedBuff"), (3, 1, "AsyncSGD"), (5, 2, "FedAsync")]
)
def test_recorded_arrivals_of_the_wall_clock_replay_to_the_same_bits(
    size: int, ranks: int, name: str, tmp_path: Path
) -> None:
    topology = TopologyConfig(ranks_per_client=ranks, coordinator="dedicated")
    config = config_of(name, topology=topology)
    wall = run_world(train, dataclasses.replace(config, clock=Wall()), str(tmp_path), size=size)[0]
    rows = read_rows(wall["folder"] / "arrivals.jsonl")
    assert len(rows) == 12
    assert {row["group"] for row in rows} == {0, 1}
    assert "time/virtual" not in wall["history"][-1]
    assert len(wall["history"][-1]["time/idle"]) == 2
    repeat = dataclasses.replace(
        config, clock=Wall(), topology=TopologyConfig(ranks_per_client=ranks), replay=str(wall["folder"])
    )
    replayed = run_world(train, repeat, str(tmp_path), size=ranks)[0]
    assert torch.equal(replayed["params"], wall["params"])
    assert torch.equal(replayed["buffers"], wall["buffers"])
    arrivals = [
        [(r["client"], r["version"]) for r in read_rows(x["folder"] / "arrivals.jsonl")]
        for x in (wall, replayed)
    ]
    assert arrivals[0] == arrivals[1]


def test_a_resumed_run_on_the_wall_clock_can_be_replayed(tmp_path: Path) -> None:
    config = config_of("FedBuff", name="wall", clock=Wall(), topology=TopologyConfig(coordinator="dedicated"))
    run_world(stop_after, config, str(tmp_path), 5, size=3)
    wall = run_world(train, dataclasses.replace(config, resume="auto"), str(tmp_path), size=3)[0]
    assert wall["finished"]
    again = dataclasses.replace(config, name="again", topology=TopologyConfig(), replay=str(wall["folder"]))
    replayed = run_world(train, again, str(tmp_path), size=1)[0]
    assert torch.equal(replayed["params"], wall["params"])


def fail_in_training(config: Config, output: str) -> None:
    finish = FedBuff.finish

    def failing(self: Algorithm, context: ClientContext) -> ClientUpdate:
        if context.round == 7:
            raise RuntimeError("this local training fails")
        return finish(self, context)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FedBuff, "finish", failing)
        train(config, output)


def test_a_group_that_fails_ends_the_job_and_is_named(tmp_path: Path) -> None:
    topology = TopologyConfig(coordinator="dedicated", timeout_s=25)
    config = config_of("FedBuff", clock=Wall(), topology=topology)
    words = r"this local training fails\n.*in dispatch 8|no message from rank [12]"
    with pytest.raises(AssertionError, match=words):
        run_world(fail_in_training, config, str(tmp_path), size=3)


def test_clients_that_are_all_lost_are_an_error_not_a_hang(tmp_path: Path) -> None:
    late = config_of("FedBuff", clock=Virtual(deadline_s=0.01))
    with pytest.raises(
        ConfigError, match=r"deadline_s=0.01 is met by 0 of 6 clients .* raise clock.deadline_s"
    ):
        train(late, str(tmp_path))
    lost = config_of("FedBuff", clock=Virtual(speed=SameSpeed(dropout=0.99999)))
    with pytest.raises(ValueError, match=r"lost with .*speed.dropout=0.99999; .* lower clock.speed.dropout"):
        train(lost, str(tmp_path))


DRAWS: list[float] = []


class RecordedNoise(GaussianNoise):
    """GaussianNoise that records a draw of its generator."""

    def corrupt(self, update: ClientUpdate, rng: np.random.Generator) -> ClientUpdate:
        DRAWS.append(float(rng.standard_normal()))
        return super().corrupt(update, rng)


def test_an_attack_draws_other_noise_for_each_arrival_of_a_client(tmp_path: Path) -> None:
    data = DataConfig(dataset="digits", clients=2, partition=IID())
    config = config_of(
        "FedBuff", data=data, attacks=RecordedNoise(fraction=0.5), cohort=CohortConfig(size=2), rounds=4
    )
    DRAWS.clear()
    train(dataclasses.replace(config, clock=Virtual(in_flight=1)), str(tmp_path))
    assert len(DRAWS) > 3
    assert len({*DRAWS}) == len(DRAWS)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"algorithm": FedBuff(), "clock": Wall()}, "algorithm=FedBuff needs one that takes arrivals"),
        ({"algorithm": AsyncSGD()}, "local.steps=3; set local.steps=1"),
        (
            {"algorithm": AsyncSGD(), "local": LocalConfig(steps=1, momentum=0.9)},
            "momentum=0.9; set local.momentum=0.0",
        ),
        ({"algorithm": FedAsync(), "aggregation": Mean(clip_norm=1.0)}, "clip_norm=1.0"),
        ({"algorithm": FedBuff(), "local": LocalConfig(optimizer_state="keep")}, "optimizer_state=reset"),
        ({"algorithm": FedBuff(), "cohort": CohortConfig(size=2, sampling="poisson")}, "sampling=fixed"),
        ({"algorithm": FedBuff(), "cohort": CohortConfig(size=2, extra=1)}, "cohort.extra=1"),
        ({"algorithm": FedBuff(), "clock": Virtual(in_flight=7)}, "clock.in_flight=7 is larger"),
        ({"algorithm": FedAsync(), "attacks": ModelReplacement(scale=2.0)}, "use attacks=LabelFlip"),
        ({"algorithm": FedBuff(), "attacks": ModelReplacement()}, "set attacks.scale"),
        ({"replay": "runs/x"}, "is for asynchronous algorithms"),
        ({"clock": Wall(), "cohort": CohortConfig(size=2, extra=1)}, "cohort.extra=1"),
        ({"cohort": CohortConfig(size=4, extra=3)}, "cohort.extra=3 and cohort.size=4"),
    ],
)
def test_settings_that_asynchronous_training_or_the_clock_cannot_work_with_are_refused(
    changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words) as error:
        dataclasses.replace(BASE, **changes)
    assert "\n" not in str(error.value)


def test_a_replay_of_another_run_is_refused(tmp_path: Path) -> None:
    done = train(config_of("FedBuff", rounds=1), str(tmp_path))
    config = config_of("FedBuff", replay=str(done["folder"]))
    with pytest.raises(ValueError, match="has 4 arrivals, but this run has 12"):
        train(config, str(tmp_path))
    with pytest.raises(ConfigError, match="seed: is 2"):
        train(dataclasses.replace(config, seed=2), str(tmp_path))
    with pytest.raises(ConfigError, match="is no run directory"):
        train(dataclasses.replace(config, replay=str(tmp_path / "nowhere")), str(tmp_path))
