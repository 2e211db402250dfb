"""Every algorithm against the float64 references, for one and two groups of one and two ranks."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import pytest
import references as ref
import rig
import torch
from torch import Tensor

from fedddp import Config, ConfigError, LocalConfig, load_config
from fedddp.algorithms import (
    MOON,
    SCAFFOLD,
    Algorithm,
    ClientContext,
    DiLoCo,
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
    LocalSGD,
    QFedAvg,
    ServerOptimizer,
    SyncSGD,
)
from fedddp.config.loader import build, read_yaml, to_yaml
from fedddp.section import NonNegativeFloat

pytestmark = pytest.mark.timeout(2 * rig.TIMEOUT_S)

PIECES = dataclasses.replace(rig.LOCAL, accumulate=3)
DECAY = dataclasses.replace(rig.LOCAL, schedule="step", decay=0.5, decay_every=1)
KEPT = LocalConfig(steps=3, batch_size=4, lr=0.05, optimizer="adamw", optimizer_state="keep")


class Pull(FedAvg):
    """FedAvg with FedProx's pull; an algorithm of one's own, without the dataclass decorator."""

    force: NonNegativeFloat = 0.1

    def correct(self, context: ClientContext) -> None:
        context.grad.add_(context.params - context.start, alpha=self.force)


Reference = Callable[[ref.Reference], Tensor | tuple[Tensor, dict[int, Tensor]]]
"""The expected model, and the parameters (and buffers) that each client keeps for itself."""

CASES: dict[str, tuple[Algorithm, LocalConfig, Reference]] = {
    "FedAvg": (FedAvg(lr=0.7), rig.LOCAL, lambda r: ref.fedavg(r, lr=0.7)),
    "FedAvg with local momentum": (FedAvg(), rig.MOMENTUM, ref.fedavg),
    "FedAvgM": (FedAvgM(momentum=0.6, lr=0.8), rig.LOCAL, lambda r: ref.fedavg(r, lr=0.8, beta=0.6)),
    "FedProx": (FedProx(mu=0.9), rig.LOCAL, lambda r: ref.fedavg(r, mu=0.9)),
    "FedProx with local momentum": (FedProx(mu=0.9), rig.MOMENTUM, lambda r: ref.fedavg(r, mu=0.9)),
    "FedProx in micro-batches": (FedProx(mu=0.9), PIECES, lambda r: ref.fedavg(r, mu=0.9)),
    "an own algorithm": (Pull(force=0.9), rig.LOCAL, lambda r: ref.fedavg(r, mu=0.9)),
    "FedAdam": (FedAdam(tau=0.02), rig.LOCAL, lambda r: ref.adaptive(r, "adam", 0.1, 0.9, 0.02)),
    "FedYogi": (FedYogi(tau=0.02, lr=0.3), rig.LOCAL, lambda r: ref.adaptive(r, "yogi", 0.3, 0.9, 0.02)),
    "FedAdagrad": (FedAdagrad(tau=0.02), rig.LOCAL, lambda r: ref.adaptive(r, "adagrad", 0.1, 0.0, 0.02)),
    "ServerOptimizer": (
        ServerOptimizer(optimizer="Adam", lr=0.05, options={"betas": [0.8, 0.9]}),
        rig.LOCAL,
        lambda r: ref.server_adam(r, 0.05, (0.8, 0.9)),
    ),
    "SCAFFOLD": (SCAFFOLD(lr=0.9), rig.LOCAL, lambda r: ref.scaffold(r, 0.9)),
    "SCAFFOLD with a schedule": (SCAFFOLD(), DECAY, lambda r: ref.scaffold(r, 1.0)),
    "FedDyn": (FedDyn(alpha=0.3), rig.LOCAL, lambda r: ref.feddyn(r, 0.3)),
    "FedNova": (FedNova(), rig.LOCAL, ref.fednova),
    "FedNova with momentum": (FedNova(), rig.MOMENTUM, ref.fednova),
    "FedNova with prox": (FedNova(mu=0.7), rig.LOCAL, lambda r: ref.fednova(r, 0.7)),
    "QFedAvg": (QFedAvg(q=0.8), rig.LOCAL, lambda r: ref.qfedavg(r, 0.8)),
    "QFedAvg, very fair": (QFedAvg(q=5.0), rig.LOCAL, lambda r: ref.qfedavg(r, 5.0)),
    "QFedAvg with a schedule": (QFedAvg(q=0.8), DECAY, lambda r: ref.qfedavg(r, 0.8)),
    "LocalSGD": (LocalSGD(), rig.LOCAL, lambda r: ref.local_sgd(r, 1.0, 0.0)),
    "DiLoCo": (DiLoCo(), KEPT, lambda r: ref.local_sgd(r, 0.7, 0.9, adamw=True)),
    "SyncSGD": (SyncSGD(), LocalConfig(steps=1, batch_size=6, lr=0.3), ref.sync_sgd),
    "MOON": (MOON(temperature=0.4), rig.LOCAL, lambda r: ref.moon(r, 1.0, 0.4)),
    "FedPer with batch norm": (FedPer(), rig.NORM, lambda r: ref.local_layers(r, ref.HEAD, buffers=False)),
    "Ditto": (Ditto(lam=0.7), rig.LOCAL, lambda r: ref.ditto(r, 0.7)),
    "FedAvgM with batch norm": (FedAvgM(momentum=0.6), rig.NORM, lambda r: ref.fedavg(r, beta=0.6)),
    "FedProx with batch norm": (FedProx(mu=0.9), rig.NORM, lambda r: ref.fedavg(r, mu=0.9)),
    "FedNova with batch norm": (FedNova(), rig.NORM, ref.fednova),
    "MOON with batch norm": (MOON(temperature=0.4), rig.NORM, lambda r: ref.moon(r, 1.0, 0.4)),
    "FedBN": (FedBN(), rig.NORM, lambda r: ref.local_layers(r, ref.NORM, buffers=True)),
}
CONFIGS = {
    name: rig.config_of(algorithm, local, rig.has_norm(name)) for name, (algorithm, local, _) in CASES.items()
}


@functools.cache
def trained(groups: int, ranks: int, folder: str) -> dict[str, rig.Trained]:
    return rig.train_in_world(CONFIGS, groups, ranks, f"{folder}/{groups}x{ranks}")


@functools.cache
def resumed(folder: str) -> dict[str, rig.Trained]:
    return rig.train_in_world(CONFIGS, 1, 1, f"{folder}/resumed", stop=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("runs"))


@functools.cache
def expected(name: str) -> tuple[Tensor, dict[int, Tensor]]:
    result = CASES[name][2](ref.Reference(CONFIGS[name], rig.has_norm(name)))
    return result if isinstance(result, tuple) else (result, {})


def personal(state: dict[str, Tensor]) -> Tensor:
    """Return the parameters, and the buffers if any, that a client keeps for itself."""
    names = [n for n in ("layers", "params") if n in state] + (["buffers"] if "layers" in state else [])
    return torch.cat([state[n] for n in names if n in state])


def test_cohorts_sizes_and_steps_of_the_runs_are_uneven() -> None:
    reference = ref.Reference(rig.config_of(FedAvg(), rig.LOCAL))
    cohorts = list(reference.cohorts())
    assert len({tuple(cohort) for cohort in cohorts}) > 1
    assert all(len({reference.n(k) for k in cohort}) > 1 for cohort in cohorts)
    assert any(len({len(list(reference.batches(k))) for k in cohort}) > 1 for cohort in cohorts)
    rounds = [sum(k in cohort for cohort in cohorts) for k in range(ref.CLIENTS)]
    assert sorted(rounds)[:2] == [0, 2]  # one client is never sampled
    assert max(rounds) == 3


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("groups", "ranks"), rig.WORLDS)
def test_three_rounds_equal_the_papers_equations(name: str, groups: int, ranks: int, folder: str) -> None:
    model, kept = trained(groups, ranks, folder)[name]
    want, personalized = expected(name)
    torch.testing.assert_close(model.double(), want, rtol=0, atol=1e-5)
    reference = ref.Reference(CONFIGS[name], rig.has_norm(name))
    assert (want[: len(reference.w0)] - reference.w0).norm() > 0.05  # training moved the model
    sampled = {client for cohort in reference.cohorts() for client in cohort}
    stateful = CASES[name][0].stateful or CASES[name][1].optimizer_state == "keep"
    assert set(kept) == (sampled if stateful else set())
    for client, vector in personalized.items():
        torch.testing.assert_close(personal(kept[client]).double(), vector, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_a_run_stopped_within_a_round_resumes_to_the_same_bits(name: str, folder: str) -> None:
    rig.assert_same_bits(resumed(folder)[name], trained(2, 1, folder)[name])


@pytest.mark.parametrize("name", CASES)
def test_bits_do_not_depend_on_the_number_of_groups(name: str, folder: str) -> None:
    for ranks in (1, 2):
        rig.assert_same_bits(*(trained(groups, ranks, folder)[name] for groups in (1, 2)))


# ---- an algorithm of one's own ----


def test_the_fields_of_an_own_algorithm_without_decorator_are_its_settings() -> None:
    assert (Pull().force, Pull(force=1).force, Pull(force=0.3, lr=0.5).lr) == (0.1, 1.0, 0.5)
    assert Pull(force=0.3) == Pull(force=0.3) != Pull(force=0.4)
    name = f"{__name__}.Pull"
    config = build({"algorithm": {"name": name, "force": 0.3}})
    assert config == Config(algorithm=Pull(force=0.3))
    assert load_config(flags=["--algorithm.force", "0.3", "--algorithm", name]) == config
    assert build(read_yaml(to_yaml(config))) == config


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"forse": 0.1}, r"unknown key 'algorithm.forse'. Did you mean 'algorithm.force'\?"),
        ({"force": "much"}, "algorithm.force must be a number, got much"),
        ({"force": True}, "algorithm.force must be a number, got True"),
        ({"force": -1.0}, "algorithm.force must be >= 0, got -1.0"),
        ({"momentum": 1.0}, r"algorithm.momentum must be in \[0, 1\), got 1.0"),
    ],
)
def test_wrong_settings_of_an_own_algorithm_are_refused_in_one_line(
    settings: dict[str, object], words: str
) -> None:
    makers: list[Callable[[], object]] = [
        lambda: Pull(**settings),  # type: ignore[arg-type]
        lambda: build({"algorithm": {"name": f"{__name__}.Pull", **settings}}),
    ]
    for make in makers:
        with pytest.raises(ConfigError, match=words) as refused:
            make()
        assert "\n" not in str(refused.value)


def test_positional_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"Pull takes keywords only, got 0.1; write Pull\(...=...\)"):
        Pull(0.1)  # type: ignore[call-arg]
