"""Every algorithm against the float64 references, for one and two groups of one and two ranks."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import references as ref
import rig
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from fedddp import CohortConfig, Config, ConfigError, DataConfig, Federation, LocalConfig, load_config
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
from fedddp.config.files import read_yaml
from fedddp.config.loader import build, to_yaml
from fedddp.data.partition import IID, Partition, Split
from fedddp.section import NonNegativeFloat
from fedddp.tasks import Classification

PIECES = dataclasses.replace(rig.LOCAL, accumulate=3)
DECAY = dataclasses.replace(rig.LOCAL, schedule="step", decay=0.5, decay_every=1)
COSINE = dataclasses.replace(rig.LOCAL, schedule="cosine")
CLIPPED = dataclasses.replace(rig.LOCAL, clip_norm=0.2)
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
    "FedAvg with a step schedule": (FedAvg(), DECAY, ref.fedavg),
    "FedAvg with a cosine schedule": (FedAvg(), COSINE, ref.fedavg),
    "FedAvgM": (FedAvgM(momentum=0.6, lr=0.8), rig.LOCAL, lambda r: ref.fedavg(r, lr=0.8, beta=0.6)),
    "FedProx": (FedProx(mu=0.9), rig.LOCAL, lambda r: ref.fedavg(r, mu=0.9)),
    "FedProx with local momentum": (FedProx(mu=0.9), rig.MOMENTUM, lambda r: ref.fedavg(r, mu=0.9)),
    "FedProx with clipped steps": (FedProx(mu=0.9), CLIPPED, lambda r: ref.fedavg(r, mu=0.9)),
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
    "FedNova with prox and momentum": (FedNova(mu=2.0), rig.MOMENTUM, lambda r: ref.fednova(r, 2.0)),
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
    "QFedAvg with batch norm": (QFedAvg(q=0.8), rig.NORM, lambda r: ref.qfedavg(r, 0.8)),
    "MOON with batch norm": (MOON(temperature=0.4), rig.NORM, lambda r: ref.moon(r, 1.0, 0.4)),
    "FedBN": (FedBN(), rig.NORM, lambda r: ref.local_layers(r, ref.NORM, buffers=True)),
}
CONFIGS = {
    name: rig.config_of(algorithm, local, rig.has_norm(name)) for name, (algorithm, local, _) in CASES.items()
}


ONE_EACH = {type(algorithm): name for name, (algorithm, _, _) in CASES.items()}.values()
"""A case of each algorithm, the last: that with batch norm, where there is one."""

PAIRED = [*ONE_EACH, "FedProx with clipped steps", "FedProx in micro-batches", "FedNova with prox"]
"""What a client on two ranks computes in another way."""


def cases_in(groups: int, ranks: int) -> Iterable[str]:
    """Return the cases for a world; where other local settings would show nothing new, there are fewer."""
    return CASES if ranks == 1 else PAIRED if groups == 1 else ONE_EACH


@functools.cache
def trained(groups: int, ranks: int, folder: str) -> dict[str, rig.Trained]:
    configs = {name: CONFIGS[name] for name in cases_in(groups, ranks)}
    return rig.train_in_world(configs, groups, ranks, f"{folder}/{groups}x{ranks}")


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


@pytest.mark.parametrize(
    ("groups", "ranks", "name"), [(*world, name) for world in rig.WORLDS for name in cases_in(*world)]
)
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
    for ranks in (1, 2) if name in ONE_EACH else (1,):
        rig.assert_same_bits(*(trained(groups, ranks, folder)[name] for groups in (1, 2)))


# ---- local training ----


def test_a_step_schedule_decays_after_its_rounds_and_a_cosine_starts_at_the_full_rate() -> None:
    step = LocalConfig(lr=0.4, schedule="step", decay=0.5, decay_every=3)
    assert [step.lr_at(index, 7) for index in range(7)] == [0.4] * 3 + [0.2] * 3 + [0.1]
    cosine = LocalConfig(lr=0.4, schedule="cosine")
    rates = [cosine.lr_at(index, 6) for index in range(6)]  # cos 0°, 30°, ... 150°
    half = math.sqrt(3) / 2
    assert rates == pytest.approx([0.4, 0.2 * (1 + half), 0.3, 0.2, 0.1, 0.2 * (1 - half)])
    assert LocalConfig(lr=0.4).lr_at(5, 6) == 0.4


def test_the_training_loss_of_a_round_is_the_mean_over_examples_not_over_clients() -> None:
    config = rig.config_of(FedAvg(), rig.LOCAL)
    reference = ref.Reference(config)
    ref.fedavg(reference)
    rows = Federation(config, module=ref.net(), train=ref.Pixels()).run().history
    for row, losses in zip(rows, reference.losses, strict=True):
        summed, count = (sum(column) for column in zip(*losses, strict=True))
        assert row["train/loss"] == pytest.approx(summed / count, rel=1e-5)
        assert row["train/examples"] == count
        assert row["train/steps"] == len(losses)


MASKS: list[tuple[float, ...]] = []
"""What `Noisy` let through, by step."""


class Noisy(nn.Module):
    """Dropout of ones before a linear layer; keeps each mask."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(9, 3)

    def forward(self, images: Tensor) -> Tensor:
        ones = torch.ones(1, 9)
        masked = nn.functional.dropout(ones, 0.5, self.training)
        if self.training:
            MASKS.append(tuple(masked[0].tolist()))
        return self.head(images.flatten(1) * masked)  # type: ignore[no-any-return]


def masks(seed: int) -> list[tuple[float, ...]]:
    """Return the masks of three rounds of two clients, one step each."""
    MASKS.clear()
    config = rig.config_of(
        FedAvg(),
        LocalConfig(steps=1, batch_size=8),
        data=DataConfig(clients=2, partition=IID()),
        cohort=CohortConfig(size=2),
        seed=seed,
    )
    Federation(config, module=Noisy(), train=ref.Pixels()).run()
    return MASKS[-6:]  # the first is that of a trial, when the model is checked


def test_dropout_draws_new_masks_for_each_client_and_round_and_the_same_ones_again_for_the_seed() -> None:
    first = masks(seed=0)
    assert len({*first}) == len(first) == 6
    assert masks(seed=0) == first
    assert not {*masks(seed=1)} & {*first}


# ---- clients without examples ----


class TwoLearners(Partition):
    """Client 1 holds ten examples, client 3 the others; 0, 2, and 4 hold none."""

    def min_examples_for(self, clients: int) -> int:
        return 0

    def assign(self, labels: Any, clients: int, rng: Any, ids: Any) -> Split:
        return Split.from_owners(np.where(np.arange(len(labels)) < 10, 1, 3), clients)


AMONG_EMPTY: dict[str, tuple[Algorithm, Reference]] = {
    "FedAvg": (FedAvg(), ref.fedavg),
    "SCAFFOLD": (SCAFFOLD(), lambda r: ref.scaffold(r, 1.0)),
    "FedDyn": (FedDyn(alpha=0.3), lambda r: ref.feddyn(r, 0.3)),
    "FedNova": (FedNova(), ref.fednova),
    "QFedAvg": (QFedAvg(q=2.0), lambda r: ref.qfedavg(r, 2.0)),
    "LocalSGD": (LocalSGD(), lambda r: ref.local_sgd(r, 1.0, 0.0)),
    "Ditto": (Ditto(lam=0.7), lambda r: ref.ditto(r, 0.7)),
}


@pytest.mark.parametrize("name", AMONG_EMPTY)
def test_clients_without_examples_send_no_change(name: str) -> None:
    algorithm, equations = AMONG_EMPTY[name]
    config = rig.config_of(
        algorithm,
        rig.LOCAL,
        data=DataConfig(clients=ref.CLIENTS, partition=TwoLearners()),
        cohort=CohortConfig(size=4),
    )
    model = Federation(config, module=ref.net(), train=ref.Pixels()).run().model
    result = equations(ref.Reference(config))
    want = result[0] if isinstance(result, tuple) else result
    found = nn.utils.parameters_to_vector(model.parameters()).detach().double()
    torch.testing.assert_close(found, want, rtol=0, atol=1e-5)


# ---- scales ----


def coefficients(steps: int, lr: float, rho: float, mu: float) -> float:
    """Return FedNova's a_k after `steps` steps."""
    context = SimpleNamespace(steps=steps, lr=lr, local=LocalConfig(lr=lr, momentum=rho))
    return FedNova(mu=mu).coefficients(cast(ClientContext, context))


@pytest.mark.parametrize("steps", [0, 1, 2, 30])
def test_fednovas_norms_are_the_papers_closed_forms(steps: int) -> None:
    rho, lr, mu = 0.9, 0.1, 0.5
    assert coefficients(steps, lr, 0.0, 0.0) == steps
    momentum = (steps - rho * (1 - rho**steps) / (1 - rho)) / (1 - rho)
    assert coefficients(steps, lr, rho, 0.0) == pytest.approx(momentum)
    prox = (1 - (1 - lr * mu) ** steps) / (lr * mu)
    assert coefficients(steps, lr, 0.0, mu) == pytest.approx(prox)


@pytest.mark.parametrize("lr", [0.05, 0.1, 0.5])
def test_fednovas_norm_with_momentum_and_prox_is_that_of_the_impulse_responses(lr: float) -> None:
    found = coefficients(100, lr, 0.9, 0.5)
    assert found == pytest.approx(ref.norm_of_coefficients(100, lr, 0.9, 0.5))
    w = nn.Parameter(torch.zeros(1, dtype=torch.float64))  # all gradients 1: the sum with signs
    optimizer = torch.optim.SGD([w], lr, 0.9)
    for _ in range(100):
        w.grad = 1 + 0.5 * w.detach()
        optimizer.step()
    assert found - abs(float(w.detach()) / lr) > 0.05  # some coefficients are negative


class Curves(nn.Module):
    """The one parameter w, as an output (b, classes)."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1))

    def forward(self, images: Tensor) -> Tensor:
        return self.w.expand(len(images), len(CURVATURES))


CURVATURES = [1.0, 30.0, 0.02, 0.5]
MINIMA = [1.0, 1.5, -3.0, 2.0]
RATE, STEPS = 0.02, 2


class Parabolas(Classification):
    """F_k = c_k (w − m_k)²/2."""

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        curvature, minimum = torch.tensor(CURVATURES)[targets], torch.tensor(MINIMA)[targets]
        return (0.5 * curvature * (outputs[:, 0] - minimum).square()).sum()


class OneEach(Dataset[tuple[Tensor, int]]):
    """An example of each curve."""

    def __init__(self) -> None:
        self.targets = list(range(len(CURVATURES)))

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.full((1, 2, 2), 10 * index, dtype=torch.uint8), index


class FirstClients(Partition):
    """Client k holds example k; clients beyond the examples are empty."""

    def min_examples_for(self, clients: int) -> int:
        return 0

    def assign(self, labels: Any, clients: int, rng: Any, ids: Any) -> Split:
        return Split.from_owners(np.arange(len(labels)), clients)


@pytest.mark.parametrize("q", [1.0, 5.0])
def test_qfedavg_of_a_large_q_is_exact_whatever_the_losses_of_other_rounds_and_of_empty_clients(
    q: float,
) -> None:
    config = rig.config_of(
        QFedAvg(q=q),
        LocalConfig(steps=STEPS, batch_size=1, lr=RATE),
        task=Parabolas(),
        data=DataConfig(clients=9, partition=FirstClients()),
        cohort=CohortConfig(size=2),
        rounds=40,
    )
    w, largest, seen = 0.0, math.nan, set()
    for index in range(config.rounds):
        clients = [k for k in config.cohort.sample(9, config.seed, index).tolist() if k < len(CURVATURES)]
        total = divisor = 0.0
        losses = [CURVATURES[k] * (w - MINIMA[k]) ** 2 / 2 for k in clients]
        for k, loss in zip(clients, losses, strict=True):
            y = w
            for _ in range(STEPS):
                y -= RATE * CURVATURES[k] * (y - MINIMA[k])
            step = (w - y) / RATE
            total += loss**q * step
            divisor += q * loss ** (q - 1) * step**2 + loss**q / RATE
        if not clients:
            seen.add("an empty round")
        else:
            w -= total / divisor
            if len(losses) == 2 and max(losses) > 30 * min(losses):
                seen.add("far apart")
            if max(losses) < largest / 100:
                seen.add("a hundredth")
            largest = max(losses)
    assert seen == {"an empty round", "far apart", "a hundredth"}
    result = Federation(config, module=Curves(), train=OneEach()).run()
    assert float(next(result.model.parameters()).detach()) == pytest.approx(w, rel=1e-5)


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
