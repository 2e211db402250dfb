"""Asynchronous training against a single-process event simulation, and what it promises."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from fedddp import (
    IID,
    AsyncSGD,
    Checkpoint,
    Cohort,
    Constant,
    Data,
    Dirichlet,
    FedAsync,
    FedAvg,
    FedBuff,
    Federation,
    Hinge,
    Inverse,
    Local,
    Mean,
    Model,
    Run,
    SpeedTable,
    Topology,
    Track,
    Virtual,
    Wall,
)
from fedddp.config import ConfigError
from fedddp.data.datasets import Images, load
from fedddp.data.partition import Split
from fedddp.events import Coordinator
from fedddp.history import read_rows
from fedddp.method import Method
from fedddp.rng import stream
from fedddp.testing import run_world

SPEED = SpeedTable(factors=[1.0, 3.0, 1.5, 6.0, 1.0, 2.2], visit_s=0.1, example_s=0.01, dropout=0.1)
BASE = Run(
    data=Data(dataset="digits", clients=6, partition=Dirichlet(alpha=1)),
    model=Model(norm="sync"),
    local=Local(steps=3, batch_size=24, lr=0.1),
    cohort=Cohort(size=4),
    clock=Virtual(speed=SPEED, deadline_s=2.6),
    track=Track(with_=[], progress=False),
    rounds=3,
    seed=1,
)
METHODS: dict[str, dict[str, Any]] = {
    "FedBuff": {"algorithm": FedBuff(buffer_size=3, lr=0.8)},
    "FedAsync": {"algorithm": FedAsync(rho=0.3, staleness=Hinge(a=2.0, b=1))},
    "AsyncSGD": {
        "algorithm": AsyncSGD(staleness=Inverse()),
        "local": Local(steps=1, batch_size=24, lr=0.1, weight_decay=0.01),
    },
}


def make_net() -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 10))


def state_of(module: nn.Module) -> tuple[Tensor, Tensor, int]:
    buffers = torch.cat([b.double().flatten() for b in module.buffers() if b.is_floating_point()])
    tracked = next(b for name, b in module.named_buffers() if name.endswith("tracked"))
    return parameters_to_vector(module.parameters()).detach().double(), buffers, int(tracked)


def train(run: Run, output: str) -> dict[str, Any]:
    """Train on this world's ranks; return the final state, the history and the folder."""
    outcome = Federation(run, model=make_net(), output=output).run()
    params, buffers, tracked = state_of(outcome.model)
    return {
        "params": params.float(),
        "buffers": buffers.float(),
        "tracked": tracked,
        "history": outcome.history,
        "folder": outcome.folder,
        "finished": outcome.finished,
    }


@functools.cache
def digits() -> tuple[Images, Split]:
    images, _ = load(BASE.data)
    return images, BASE.data.partition.split(images.labels, BASE.data.clients, BASE.seed, images.ids)


def local_training(
    run: Run, net: nn.Sequential, start: tuple[Tensor, Tensor, int], client: int, ticket: int
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Return a client's last gradient, parameters, running statistics and their count, in float64."""
    images, split = digits()
    chosen, local, norm = split.indices(client), run.local, net[2]
    assert images.pixels is not None
    vector_to_parameters(start[0].clone(), net.parameters())
    norm.running_mean.copy_(start[1][:12])
    norm.running_var.copy_(start[1][12:])
    norm.num_batches_tracked.fill_(start[2])
    batches: list[np.ndarray] = []
    for epoch in range(local.steps or 0):
        order = stream("batches", run.seed, ticket, client, epoch).permutation(chosen)
        batches += np.split(order, range(local.batch_size, len(order), local.batch_size))
    for rows in batches[: local.steps]:
        pixels = (images.pixels[torch.from_numpy(rows)].double() / 255 - images.mean[0]) / images.std[0]
        loss = F.cross_entropy(net.train()(pixels), torch.from_numpy(images.labels[rows]))
        grad = parameters_to_vector(torch.autograd.grad(loss, list(net.parameters())))
        here = parameters_to_vector(net.parameters()).detach()
        grad += getattr(run.algorithm, "rho", 0.0) * (here - start[0]) + local.weight_decay * here
        vector_to_parameters(here - local.lr * grad, net.parameters())
    return grad, *state_of(net)


def simulate(run: Run) -> tuple[Tensor, Tensor, int, list[int]]:
    """The events of the papers one after another: parameters, statistics, their count, stalenesses."""
    method, clock = run.algorithm, run.clock
    assert isinstance(clock, Virtual)
    assert isinstance(clock.speed, SpeedTable)
    assert clock.deadline_s is not None
    net = run.model.adapt(make_net(), classes=10, shape=(1, 8, 8), sync=lambda tensor: tensor).double()
    x, statistics, count = state_of(net)
    version, ticket, now, flights, taus, buffer, largest = 0, 0, 0.0, [], [], [], 0
    while len(taus) < run.rounds * run.cohort.size:
        while all(flight[0] > now for flight in flights) and len(flights) < run.cohort.size:  # dispatch
            random, busy = stream("dispatch", run.seed, ticket), [flight[2] for flight in flights]
            client = int(random.choice(np.arange(6)))
            while client in busy:
                client = int(random.choice(np.arange(6)))
            work = min(len(digits()[1].indices(client)), run.local.batch_size) * (run.local.steps or 0)
            seconds = clock.speed.factors[client] * (0.1 + 0.01 * work)
            lost = stream("dropout", run.seed, ticket, client).random() < 0.1 or seconds > clock.deadline_s
            end = now + (clock.deadline_s if lost else seconds)
            flights.append((end, ticket, client, version, (x, statistics, count), lost))
            ticket += 1
        now, number, client, sent_version, sent, lost = flights.pop(flights.index(min(flights)))  # arrive
        if lost:
            continue
        grad, y, new_statistics, steps = local_training(run, net, sent, client, number)
        tau, largest = version - sent_version, max(largest, steps)
        taus.append(tau)
        if isinstance(method, FedBuff):  # absorb
            buffer.append((y - sent[0], tau, new_statistics))
            if len(buffer) < 3:
                continue
            x = x + 0.8 / 3 * sum(delta / np.sqrt(1 + t) for delta, t, _ in buffer)
            statistics, buffer = sum(s for _, _, s in buffer) / 3, []
        elif isinstance(method, FedAsync):
            alpha = 0.6 * (1 if tau <= 1 else 1 / (2 * (tau - 1) + 1))
            x, statistics = (1 - alpha) * x + alpha * y, (1 - alpha) * statistics + alpha * new_statistics
        else:
            x = x - run.local.lr * (1 / tau if tau else 1) * grad
            statistics = (tau * statistics + new_statistics) / (1 + tau)
        count, version = largest, version + 1
    return x, statistics, count, taus


def taus_of(result: dict[str, Any]) -> list[int]:
    rows = read_rows(result["folder"] / "arrivals.jsonl")
    return [row["staleness"] for row in rows]


@pytest.mark.parametrize(
    ("method", "worlds"),
    [
        ("FedBuff", [(1, 1, ""), (3, 1, "dedicated"), (2, 2, ""), (4, 2, "")]),
        ("FedAsync", [(2, 1, ""), (3, 2, "dedicated")]),
        ("AsyncSGD", [(3, 1, "dedicated"), (2, 2, "")]),
    ],
)
def test_a_run_is_the_simulation_of_its_events_for_any_world(
    method: str, worlds: list[tuple[int, int, str]], tmp_path: Path
) -> None:
    run = dataclasses.replace(BASE, **METHODS[method])
    params, statistics, count, taus = simulate(run)
    assert max(taus) >= 1
    by_ranks: dict[int, Tensor] = {}
    for size, ranks, coordinator in worlds:
        topology = Topology(ranks_per_client=ranks, coordinator=coordinator or "colocated")  # type: ignore[arg-type]
        result = run_world(train, dataclasses.replace(run, topology=topology), str(tmp_path), size=size)[0]
        assert taus_of(result) == taus
        torch.testing.assert_close(result["params"], params.float(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(result["buffers"], statistics.float(), rtol=1e-4, atol=1e-5)
        assert result["tracked"] == count
        assert torch.equal(by_ranks.setdefault(ranks, result["params"]), result["params"]), (size, ranks)


def test_a_row_says_what_happened(tmp_path: Path) -> None:
    result = train(dataclasses.replace(BASE, **METHODS["FedBuff"]), str(tmp_path))
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
    model = (64 * 12 + 12 + 24 + 130 + 24) * 4
    assert sum(row["bytes/up"] for row in result["history"]) == 12 * model


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
    run = dataclasses.replace(BASE, **METHODS[method], checkpoint=Checkpoint(every=2))
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
    run = dataclasses.replace(BASE, **METHODS["FedAsync"], name="grown")
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
    run = dataclasses.replace(BASE, **METHODS[method], topology=topology)
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
    run = dataclasses.replace(
        BASE, **METHODS["FedBuff"], name="wall", clock=Wall(), topology=Topology(coordinator="dedicated")
    )
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
    run = dataclasses.replace(
        BASE, **METHODS["FedBuff"], clock=Wall(), topology=Topology(coordinator="dedicated", timeout_s=25)
    )
    with pytest.raises(AssertionError, match=r"this visit fails|while waiting for rank [12]"):
        run_world(fail_in_training, run, str(tmp_path), size=3, timeout_s=20)


def test_clients_that_all_miss_the_deadline_are_an_error_not_a_hang(tmp_path: Path) -> None:
    run = dataclasses.replace(BASE, **METHODS["FedBuff"], clock=Virtual(deadline_s=0.01))
    with pytest.raises(ValueError, match=r"lost with deadline_s=0.01 .* raise clock.deadline_s"):
        train(run, str(tmp_path))


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
    done = train(dataclasses.replace(BASE, **METHODS["FedBuff"], rounds=1), str(tmp_path))
    run = dataclasses.replace(BASE, **METHODS["FedBuff"], replay=str(done["folder"]))
    with pytest.raises(ValueError, match="has 4 arrivals, but this run has 12"):
        train(run, str(tmp_path))
    with pytest.raises(ConfigError, match="seed: is 2"):
        train(dataclasses.replace(run, seed=2), str(tmp_path))
    with pytest.raises(ConfigError, match="is no run directory"):
        train(dataclasses.replace(run, replay=str(tmp_path / "nowhere")), str(tmp_path))


def test_stragglers_in_rounds_are_not_waited_for(tmp_path: Path) -> None:
    clock = Virtual(speed=SpeedTable(factors=[50.0, 1.0, 1.0, 1.0, 1.0, 1.0]))
    run = dataclasses.replace(BASE, clock=clock, cohort=Cohort(size=5, extra=1), rounds=2)
    rows = [run_world(train, run, str(tmp_path), size=size)[0] for size in (1, 2)]
    assert torch.equal(rows[0]["params"], rows[1]["params"])
    for row in rows[0]["history"]:
        assert row["cohort"] == [1, 2, 3, 4, 5]
        assert row["time/virtual"] < 1
        assert row["clients/missing"] == 0
        assert row["bytes/down"] * 5 == row["bytes/up"] * 6 + 6 * 5 * 4  # integer buffers go down only
    late = dataclasses.replace(run, clock=dataclasses.replace(clock, deadline_s=1.0), cohort=Cohort(size=6))
    row = train(late, str(tmp_path))["history"][-1]
    assert (row["cohort"], row["time/virtual"], row["clients/missing"]) == ([1, 2, 3, 4, 5], 1.0, 1)
