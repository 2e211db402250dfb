"""Asynchronous training against a single-process event simulation, and what it promises."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from simulation import BASE, run_of, taus_of, train
from torch import nn

from fedddp import (
    IID,
    AsyncSGD,
    Checkpoint,
    Cohort,
    Constant,
    Data,
    FedAsync,
    FedAvg,
    FedBuff,
    Federation,
    GaussianNoise,
    Local,
    Mean,
    Model,
    ModelReplacement,
    Run,
    SameSpeed,
    Topology,
    Virtual,
    Wall,
)
from fedddp.algorithms.algorithm import Contribution, Method, Visit
from fedddp.config.schema import ConfigError
from fedddp.storage.history import read_rows
from fedddp.testing import run_world
from fedddp.training.asynchronous.coordinator import Coordinator


def test_a_row_says_what_happened(tmp_path: Path) -> None:
    result = train(run_of("FedBuff"), str(tmp_path))
    taus = taus_of(result)
    for number, row in enumerate(result["history"]):
        own = taus[4 * number : 4 * number + 4]
        assert row["round"] == number + 1
        assert row["staleness/mean"] == np.mean(own)
        assert row["staleness/max"] == max(own)
        assert row["staleness/histogram"] == np.bincount(own).tolist()
        assert row["clients/contributed"] == 4
        assert len(row["time/idle"]) == 1
        assert row["time/virtual"] > 0
    assert result["history"][-1]["server/version"] == 4  # 12 arrivals in threes
    model = (64 * 12 + 12 + 24 + 130 + 24) * 4 + 8
    assert sum(row["bytes/up"] for row in result["history"]) == 12 * model


class Sleeper(FedBuff):
    """FedBuff with visits of a twentieth of a second at least."""

    def begin(self, visit: Visit) -> None:
        time.sleep(0.05)


@pytest.mark.parametrize(("size", "coordinator"), [(1, "colocated"), (3, "dedicated")])
def test_rows_say_how_long_the_groups_did_not_train(size: int, coordinator: Any, tmp_path: Path) -> None:
    run = dataclasses.replace(BASE, algorithm=Sleeper(), topology=Topology(coordinator=coordinator))
    rows = run_world(train, run, str(tmp_path), size=size)[0]["history"]
    spent = sum(row.get(f"time/{phase}", 0) for row in rows for phase in ("train", "step"))
    idle = np.array([row["time/idle"] for row in rows])
    assert idle.shape == (3, max(1, size - 1))
    assert idle.min() >= 0
    assert idle.sum() <= idle.shape[1] * spent - 12 * 0.05


def test_fedbuff_with_a_buffer_for_all_and_no_staleness_is_uniform_fedavg(tmp_path: Path) -> None:
    # Whole-batch steps, so that the order of examples, which has another name here, does not matter.
    data = Data(dataset="shapes", clients=4, examples=80, image_size=8, partition=IID())
    run = dataclasses.replace(
        BASE,
        data=data,
        local=Local(steps=2, batch_size=80, lr=0.1),
        clock=Virtual(),
        model=Model(norm="sync"),
    )
    results = []
    for algorithm in (FedBuff(buffer_size=4), FedAvg()):
        torch.manual_seed(3)
        net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 10), nn.BatchNorm1d(10))
        federation = Federation(run, model=net, algorithm=algorithm, output=str(tmp_path))
        results.append(federation.run())
    ours, theirs = (dict(result.model.state_dict()) for result in results)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-6)
    for row, other in zip(results[0].history, results[1].history, strict=True):
        assert row["staleness/max"] == 0
        assert row["time/virtual"] == pytest.approx(other["time/virtual"])
        assert row["eval/accuracy"] == other["eval/accuracy"]


def test_fedasync_that_takes_a_lone_clients_model_as_it_is_trains_that_client(tmp_path: Path) -> None:
    data = Data(dataset="digits", clients=1)
    run = dataclasses.replace(BASE, data=data, cohort=Cohort(size=1), clock=Virtual(), rounds=4)
    alone = dataclasses.replace(run, algorithm=FedAsync(alpha=1.0, rho=0.0, staleness=Constant()))
    ours, theirs = train(alone, str(tmp_path)), train(run, str(tmp_path))
    torch.testing.assert_close(ours["params"], theirs["params"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours["buffers"], theirs["buffers"], rtol=1e-5, atol=1e-6)
    assert ours["tracked"] == theirs["tracked"]
    assert taus_of(ours) == [0] * 4


def stop_after(run: Run, output: str, arrivals: int) -> dict[str, Any]:
    """Train, but ask the last rank to stop once `arrivals` contributions were absorbed."""
    absorb, count = Coordinator._absorb, [0]

    def counted(self: Coordinator, *arguments: Any) -> None:
        absorb(self, *arguments)
        count[0] += 1
        self.world.stopping = count[0] == arrivals

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Coordinator, "_absorb", counted)
        return train(run, output)


@pytest.mark.parametrize(("method", "arrivals"), [("FedBuff", 6), ("FedAsync", 4), ("AsyncSGD", 9)])
def test_a_stopped_run_goes_on_to_the_same_bits_also_with_another_world(
    method: str, arrivals: int, tmp_path: Path
) -> None:
    run = run_of(method, checkpoint=Checkpoint(every=2))
    whole = run_world(train, run, str(tmp_path), size=1)[0]
    run = dataclasses.replace(run, name="stopped", topology=Topology(coordinator="dedicated"))
    first = run_world(stop_after, run, str(tmp_path), arrivals, size=3)
    assert [result["finished"] for result in first] == [False] * 3
    again = dataclasses.replace(run, resume="auto", topology=Topology())
    result = run_world(train, again, str(tmp_path), size=2)[0]
    assert torch.equal(result["params"], whole["params"])
    assert torch.equal(result["buffers"], whole["buffers"])
    assert taus_of(result) == taus_of(whole)
    timed = ("time/", "eval/loss")  # the one float sum whose terms depend on the world
    measured = [
        [{k: v for k, v in row.items() if not k.startswith(timed)} for row in r["history"]]
        for r in (whole, {"history": read_rows(result["folder"] / "history.jsonl")})
    ]
    assert measured[0] == measured[1]


def test_a_finished_run_can_be_given_more_rounds(tmp_path: Path) -> None:
    run = run_of("FedAsync", name="grown")
    train(dataclasses.replace(run, rounds=1), str(tmp_path))
    grown = train(dataclasses.replace(run, resume="auto"), str(tmp_path))
    whole = train(dataclasses.replace(run, name="whole"), str(tmp_path))
    assert torch.equal(grown["params"], whole["params"])


@pytest.mark.parametrize(
    ("size", "ranks", "method"), [(3, 1, "FedBuff"), (3, 1, "AsyncSGD"), (5, 2, "FedAsync")]
)
def test_arrivals_of_the_wall_clock_are_recorded_and_replayed_to_the_bit(
    size: int, ranks: int, method: str, tmp_path: Path
) -> None:
    topology = Topology(ranks_per_client=ranks, coordinator="dedicated")
    run = run_of(method, topology=topology)
    wall = run_world(train, dataclasses.replace(run, clock=Wall()), str(tmp_path), size=size)[0]
    rows = read_rows(wall["folder"] / "arrivals.jsonl")
    assert len(rows) == 12
    assert {row["group"] for row in rows} == {0, 1}
    assert "time/virtual" not in wall["history"][-1]
    assert len(wall["history"][-1]["time/idle"]) == 2
    repeat = dataclasses.replace(
        run, clock=Wall(), topology=Topology(ranks_per_client=ranks), replay=str(wall["folder"])
    )
    replayed = run_world(train, repeat, str(tmp_path), size=ranks)[0]
    assert torch.equal(replayed["params"], wall["params"])
    assert torch.equal(replayed["buffers"], wall["buffers"])
    facts = [
        [(r["client"], r["version"]) for r in read_rows(x["folder"] / "arrivals.jsonl")]
        for x in (wall, replayed)
    ]
    assert facts[0] == facts[1]


def test_a_run_on_the_wall_clock_goes_on_and_its_whole_record_can_be_replayed(tmp_path: Path) -> None:
    run = run_of("FedBuff", name="wall", clock=Wall(), topology=Topology(coordinator="dedicated"))
    run_world(stop_after, run, str(tmp_path), 5, size=3)
    wall = run_world(train, dataclasses.replace(run, resume="auto"), str(tmp_path), size=3)[0]
    assert wall["finished"]
    again = dataclasses.replace(run, name="again", topology=Topology(), replay=str(wall["folder"]))
    replayed = run_world(train, again, str(tmp_path), size=1)[0]
    assert torch.equal(replayed["params"], wall["params"])


def fail_in_training(run: Run, output: str) -> None:
    finish = FedBuff.finish

    def failing(self: Method, visit: Any) -> Any:
        if visit.round == 7:
            raise RuntimeError("this visit fails")
        return finish(self, visit)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FedBuff, "finish", failing)
        train(run, output)


def test_a_group_that_fails_ends_the_job_and_is_named(tmp_path: Path) -> None:
    run = run_of("FedBuff", clock=Wall(), topology=Topology(coordinator="dedicated", timeout_s=25))
    with pytest.raises(AssertionError, match=r"this visit fails\n.*in visit 8|no word from rank [12]"):
        run_world(fail_in_training, run, str(tmp_path), size=3, timeout_s=20)


def test_clients_that_are_all_lost_are_an_error_not_a_hang(tmp_path: Path) -> None:
    late = run_of("FedBuff", clock=Virtual(deadline_s=0.01))
    with pytest.raises(
        ConfigError, match=r"deadline_s=0.01 is met by 0 of 6 clients .* raise clock.deadline_s"
    ):
        train(late, str(tmp_path))
    lost = run_of("FedBuff", clock=Virtual(speed=SameSpeed(dropout=0.99999)))
    with pytest.raises(ValueError, match=r"lost with .*speed.dropout=0.99999; .* lower clock.speed.dropout"):
        train(lost, str(tmp_path))


NOISE: list[float] = []


class NotedNoise(GaussianNoise):
    def corrupt(self, contribution: Contribution, random: np.random.Generator) -> Contribution:
        NOISE.append(float(random.standard_normal()))
        return super().corrupt(contribution, random)


def test_a_client_lies_anew_each_time_that_it_arrives(tmp_path: Path) -> None:
    data = Data(dataset="digits", clients=2, partition=IID())
    run = run_of("FedBuff", data=data, attacks=NotedNoise(fraction=0.5), cohort=Cohort(size=2), rounds=4)
    NOISE.clear()
    train(dataclasses.replace(run, clock=Virtual(in_flight=1)), str(tmp_path))
    assert len(NOISE) > 3
    assert len({*NOISE}) == len(NOISE)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"algorithm": FedBuff(), "clock": Wall()}, "algorithm=FedBuff needs one that takes arrivals"),
        ({"algorithm": AsyncSGD()}, "local.steps=3; set local.steps=1"),
        (
            {"algorithm": AsyncSGD(), "local": Local(steps=1, momentum=0.9)},
            "momentum=0.9; set local.momentum=0.0",
        ),
        ({"algorithm": FedAsync(), "aggregation": Mean(clip_norm=1.0)}, "clip_norm=1.0"),
        ({"algorithm": FedBuff(), "local": Local(optimizer_state="keep")}, "optimizer_state=reset"),
        ({"algorithm": FedBuff(), "cohort": Cohort(size=2, sampling="poisson")}, "sampling=fixed"),
        ({"algorithm": FedBuff(), "cohort": Cohort(size=2, extra=1)}, "cohort.extra=1"),
        ({"algorithm": FedBuff(), "clock": Virtual(in_flight=7)}, "clock.in_flight=7 is larger"),
        ({"algorithm": FedAsync(), "attacks": ModelReplacement(scale=2.0)}, "use attacks=LabelFlip"),
        ({"algorithm": FedBuff(), "attacks": ModelReplacement()}, "set attacks.scale"),
        ({"replay": "runs/x"}, "is for asynchronous methods"),
        ({"clock": Wall(), "cohort": Cohort(size=2, extra=1)}, "cohort.extra=1"),
        ({"cohort": Cohort(size=4, extra=3)}, "cohort.extra=3 and cohort.size=4"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as error:
        dataclasses.replace(BASE, **changes)
    assert "\n" not in str(error.value)


def test_a_replay_of_another_run_is_refused(tmp_path: Path) -> None:
    done = train(run_of("FedBuff", rounds=1), str(tmp_path))
    run = run_of("FedBuff", replay=str(done["folder"]))
    with pytest.raises(ValueError, match="has 4 arrivals, but this run has 12"):
        train(run, str(tmp_path))
    with pytest.raises(ConfigError, match="seed: is 2"):
        train(dataclasses.replace(run, seed=2), str(tmp_path))
    with pytest.raises(ConfigError, match="is no run directory"):
        train(dataclasses.replace(run, replay=str(tmp_path / "nowhere")), str(tmp_path))
