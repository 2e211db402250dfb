"""Every method against the float64 references, for one and two groups of one and two ranks."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from pathlib import Path
from typing import Any

import pytest
import references as ref
import torch
from torch import Tensor

from fedddp import (
    MOON,
    SCAFFOLD,
    Cohort,
    Data,
    DiLoCo,
    Dirichlet,
    Ditto,
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedBN,
    FedDyn,
    FedNova,
    FedPer,
    FedProx,
    FedYogi,
    Local,
    LocalSGD,
    Method,
    Model,
    QFedAvg,
    Run,
    ServerOptimizer,
    SyncSGD,
    Track,
)
from fedddp.distributed.launch import connect
from fedddp.distributed.topology import Topology
from fedddp.distributed.world import World
from fedddp.federation import Federation
from fedddp.testing import run_world
from fedddp.tracking.tracker import NullTracker
from fedddp.training.asynchronous.coordinator import run_events
from fedddp.training.session import Stopped
from fedddp.training.synchronous import run_rounds

PATIENCE_S = 150.0
"""A world of this file trains all the runs: seconds on a quiet machine, a minute on one that is not."""
pytestmark = pytest.mark.timeout(2 * PATIENCE_S)

LOCAL = Local(epochs=2, batch_size=4, lr=0.2)
NORM = Local(epochs=2, batch_size=7, lr=0.2)  # leaves no batch of one, which batch norm refuses in float64
MOMENTUM = Local(epochs=2, batch_size=4, lr=0.1, momentum=0.8)
PIECES = dataclasses.replace(LOCAL, accumulate=3)
DECAY = dataclasses.replace(LOCAL, schedule="step", decay=0.5, decay_every=1)
KEPT = Local(steps=3, batch_size=4, lr=0.05, optimizer="adamw", optimizer_state="keep")

CASES: dict[str, tuple[Method, Local, Any]] = {
    "FedAvg": (FedAvg(lr=0.7), LOCAL, lambda r: ref.fedavg(r, lr=0.7)),
    "FedAvg with local momentum": (FedAvg(), MOMENTUM, ref.fedavg),
    "FedAvgM": (FedAvgM(momentum=0.6, lr=0.8), LOCAL, lambda r: ref.fedavg(r, lr=0.8, beta=0.6)),
    "FedProx": (FedProx(mu=0.9), LOCAL, lambda r: ref.fedavg(r, mu=0.9)),
    "FedProx with local momentum": (FedProx(mu=0.9), MOMENTUM, lambda r: ref.fedavg(r, mu=0.9)),
    "FedProx in micro-batches": (FedProx(mu=0.9), PIECES, lambda r: ref.fedavg(r, mu=0.9)),
    "FedAdam": (FedAdam(tau=0.02), LOCAL, lambda r: ref.adaptive(r, "adam", 0.1, 0.9, 0.02)),
    "FedYogi": (FedYogi(tau=0.02, lr=0.3), LOCAL, lambda r: ref.adaptive(r, "yogi", 0.3, 0.9, 0.02)),
    "FedAdagrad": (FedAdagrad(tau=0.02), LOCAL, lambda r: ref.adaptive(r, "adagrad", 0.1, 0.0, 0.02)),
    "ServerOptimizer": (
        ServerOptimizer(optimizer="Adam", lr=0.05, options={"betas": [0.8, 0.9]}),
        LOCAL,
        lambda r: ref.server_adam(r, 0.05, (0.8, 0.9)),
    ),
    "SCAFFOLD": (SCAFFOLD(lr=0.9), LOCAL, lambda r: ref.scaffold(r, 0.9)),
    "SCAFFOLD with a schedule": (SCAFFOLD(), DECAY, lambda r: ref.scaffold(r, 1.0)),
    "FedDyn": (FedDyn(alpha=0.3), LOCAL, lambda r: ref.feddyn(r, 0.3)),
    "FedNova": (FedNova(), LOCAL, ref.fednova),
    "FedNova with momentum": (FedNova(), MOMENTUM, ref.fednova),
    "FedNova with prox": (FedNova(mu=0.7), LOCAL, lambda r: ref.fednova(r, 0.7)),
    "QFedAvg": (QFedAvg(q=0.8), LOCAL, lambda r: ref.qfedavg(r, 0.8)),
    "QFedAvg, very fair": (QFedAvg(q=5.0), LOCAL, lambda r: ref.qfedavg(r, 5.0)),
    "QFedAvg with a schedule": (QFedAvg(q=0.8), DECAY, lambda r: ref.qfedavg(r, 0.8)),
    "LocalSGD": (LocalSGD(), LOCAL, lambda r: ref.local_sgd(r, 1.0, 0.0)),
    "DiLoCo": (DiLoCo(), KEPT, lambda r: ref.local_sgd(r, 0.7, 0.9, adamw=True)),
    "SyncSGD": (SyncSGD(), Local(steps=1, batch_size=6, lr=0.3), ref.sync_sgd),
    "MOON": (MOON(temperature=0.4), LOCAL, lambda r: ref.moon(r, 1.0, 0.4)),
    "FedPer with batch norm": (FedPer(), NORM, lambda r: ref.local_layers(r, ref.HEAD, False)),
    "Ditto": (Ditto(lam=0.7), LOCAL, lambda r: ref.ditto(r, 0.7)),
    "FedAvgM with batch norm": (FedAvgM(momentum=0.6), NORM, lambda r: ref.fedavg(r, beta=0.6)),
    "FedProx with batch norm": (FedProx(mu=0.9), NORM, lambda r: ref.fedavg(r, mu=0.9)),
    "FedNova with batch norm": (FedNova(), NORM, ref.fednova),
    "MOON with batch norm": (MOON(temperature=0.4), NORM, lambda r: ref.moon(r, 1.0, 0.4)),
    "FedBN": (FedBN(), NORM, lambda r: ref.local_layers(r, ref.NORM, True)),
}
WORLDS = list(itertools.product((1, 2), (1, 2)))


def has_norm(name: str) -> bool:
    return "BN" in name or "norm" in name


def run_of(method: Method, local: Local, norm: bool = False, **changes: Any) -> Run:
    run = Run(
        data=Data(clients=ref.CLIENTS, partition=Dirichlet(alpha=0.5, min_examples=3)),
        cohort=Cohort(size=ref.COHORT),
        model=Model(norm="sync" if norm else "keep"),
        local=local,
        algorithm=method,
        rounds=ref.ROUNDS,
        seed=4,
        track=Track(with_=[], progress=False),
    )
    return dataclasses.replace(run, **changes)


def parts(name: str, run: Run) -> dict[str, Any]:
    if isinstance(run.task, ref.Quadratic):
        return {"model": ref.Point(), "train": ref.TwoExamples()}
    dropout = 0.5 if "dropout" in name else 0.0
    return {"model": ref.net(has_norm(name), dropout), "train": ref.Pixels()}


def train(runs: dict[str, Run], ranks: int, folder: str, stop: bool = False) -> dict[str, Any]:
    """Run each of `runs` on this world; return the server's model, and what clients keep.

    With `stop` (a world of one), each is stopped after its fourth visit, within a round, and resumed.
    """
    world, results = connect(Topology(ranks_per_client=ranks, device="cpu")), {}
    for number, (name, run) in enumerate(runs.items()):
        where = Path(folder) / str(number)
        where.mkdir(parents=True, exist_ok=True)
        federation = Federation(run, **parts(name, run))
        session = federation._session(world, where, run)
        if stop:
            session.tracker = StopsRun(world)
            with pytest.raises(Stopped):
                run_rounds(session)
            assert list(where.glob("checkpoints/round-0000?-0*"))
            world.store.delete_key("fedddp/stop")
            world.stopping = world._announced = False
            session = federation._session(world, where, dataclasses.replace(run, resume="auto"))
        (run_events if run.algorithm.asynchronous else run_rounds)(session)
        kept = {k: v for part in world.gather(session.states.kept) for k, v in part.items()}
        results[name] = (torch.cat([session.server.params, session.server.buffers]), kept)
    world.close()
    return results


class StopsRun(NullTracker):
    """Asks the run to stop after some visits."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self.world, self.visits = world, 0

    def visit_done(self, groups: int) -> None:
        self.visits += 1
        self.world.stopping = self.world.stopping or self.visits == 4


@functools.cache
def trained(groups: int, ranks: int, folder: str) -> dict[str, Any]:
    runs = {name: run_of(method, local, has_norm(name)) for name, (method, local, _) in CASES.items()}
    return run_world(train, runs, ranks, folder, size=groups * ranks, timeout_s=PATIENCE_S)[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("runs"))


@functools.cache
def expected(name: str) -> tuple[Tensor, dict[int, Tensor]]:
    method, local, reference = CASES[name]
    result = reference(ref.Reference(run_of(method, local), has_norm(name)))
    return result if isinstance(result, tuple) else (result, {})


def own(state: dict[str, Tensor]) -> Tensor:
    names = [n for n in ("layers", "params") if n in state] + (["buffers"] if "layers" in state else [])
    return torch.cat([state[n] for n in names if n in state])


def test_the_runs_are_uneven() -> None:
    run = run_of(FedAvg(), LOCAL)
    reference = ref.Reference(run)
    cohorts = list(reference.cohorts())
    assert len({tuple(cohort) for cohort in cohorts}) > 1
    assert all(len({reference.n(k) for k in cohort}) > 1 for cohort in cohorts)
    assert any(len({len(list(reference.batches(k))) for k in cohort}) > 1 for cohort in cohorts)
    visits = [sum(k in cohort for cohort in cohorts) for k in range(ref.CLIENTS)]
    assert sorted(visits)[:2] == [0, 2]  # somebody never comes
    assert max(visits) == 3


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("groups", "ranks"), WORLDS)
def test_three_rounds_are_the_papers(name: str, groups: int, ranks: int, folder: str) -> None:
    model, kept = trained(groups, ranks, folder + f"/{groups}x{ranks}")[name]
    want, personal = expected(name)
    torch.testing.assert_close(model.double(), want, rtol=0, atol=1e-5)
    start = ref.Reference(run_of(*CASES[name][:2]), has_norm(name)).w0
    assert (want[: len(start)] - start).norm() > 0.05  # it went somewhere
    cohorts = ref.Reference(run_of(*CASES[name][:2])).cohorts()
    visited = {client for cohort in cohorts for client in cohort}
    stateful = CASES[name][0].stateful or CASES[name][1].optimizer_state == "keep"
    assert set(kept) == (visited if stateful else set())
    for client, vector in personal.items():
        torch.testing.assert_close(own(kept[client]).double(), vector, rtol=0, atol=1e-5)


@functools.cache
def resumed(folder: str) -> dict[str, Any]:
    runs = {name: run_of(method, local, has_norm(name)) for name, (method, local, _) in CASES.items()}
    return run_world(train, runs, 1, folder, True, size=1, timeout_s=PATIENCE_S)[0]


@pytest.mark.parametrize("name", CASES)
def test_a_run_stopped_in_the_middle_of_a_round_goes_on_bit_for_bit(name: str, folder: str) -> None:
    whole = trained(2, 1, folder + "/2x1")[name]
    same(resumed(folder + "/resumed")[name], whole)


def same(one: Any, two: Any) -> None:
    assert torch.equal(one[0], two[0])
    assert one[1].keys() == two[1].keys()
    for client, state in one[1].items():
        assert state.keys() == two[1][client].keys()
        assert all(torch.equal(tensor, two[1][client][name]) for name, tensor in state.items())


@pytest.mark.parametrize("name", CASES)
def test_bits_do_not_depend_on_the_number_of_groups(name: str, folder: str) -> None:
    for ranks in (1, 2):
        same(*(trained(groups, ranks, folder + f"/{groups}x{ranks}")[name] for groups in (1, 2)))
