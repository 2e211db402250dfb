"""Algorithms that their settings make equal, and what algorithms find on two quadratics."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
import references as ref
import rig
import torch
from torch import nn

from fedddp import (
    CohortConfig,
    Config,
    ConfigError,
    DataConfig,
    Federation,
    LocalConfig,
    TrackingConfig,
    load_config,
)
from fedddp.algorithms import (
    MOON,
    SCAFFOLD,
    Algorithm,
    ClientContext,
    Ditto,
    FedAsync,
    FedAvg,
    FedAvgM,
    FedBN,
    FedBuff,
    FedDyn,
    FedNova,
    FedPer,
    FedProx,
    LocalSGD,
    QFedAvg,
    ServerOptimizer,
    SyncSGD,
)
from fedddp.simulation.clock import SameSpeed, Virtual

ONE_STEP = LocalConfig(steps=1, batch_size=36, lr=0.3)  # one full-batch step
EQUAL_STEPS = LocalConfig(steps=3, batch_size=4, lr=0.2)


class WrongSign(SCAFFOLD):
    """SCAFFOLD as some implementations have it."""

    def correct(self, context: ClientContext) -> None:
        context.grad.sub_(context.server_vectors["c"]).add_(context.scratch["c_k"])


QUADRATICS = {
    f"{name}, on quadratics": Config(
        data=DataConfig(clients=2),
        task=ref.Quadratic(),
        local=LocalConfig(steps=20, batch_size=1, lr=0.05),
        cohort=CohortConfig(size=2),
        algorithm=algorithm,
        rounds=rounds,
        tracking=TrackingConfig(trackers=[], progress=False),
    )
    for name, algorithm, rounds in (
        ("FedAvg", FedAvg(), 5),
        ("SCAFFOLD", SCAFFOLD(), 12),
        ("FedDyn", FedDyn(alpha=2.0), 12),
        ("SCAFFOLD with a wrong sign", WrongSign(), 8),
    )
}
TWO_STEPS = dataclasses.replace(ONE_STEP, steps=2)
ALL_CLIENTS = CohortConfig(size=ref.CLIENTS)
TOGETHER = Virtual(speed=SameSpeed(example_s=0.0))  # all arrive at the same time
ALONE: dict[str, Any] = {"data": DataConfig(clients=1), "cohort": CohortConfig(size=1)}
CONFIGS: dict[str, Config] = {
    **QUADRATICS,
    "FedAvg": rig.config_of(FedAvg(), rig.LOCAL),
    "FedProx, mu 0": rig.config_of(FedProx(mu=0.0), rig.LOCAL),
    "FedAvgM, beta 0": rig.config_of(FedAvgM(momentum=0.0), rig.LOCAL),
    "MOON, mu 0": rig.config_of(MOON(mu=0.0), rig.LOCAL),
    "Ditto": rig.config_of(Ditto(lam=0.3), rig.LOCAL),
    "FedProx": rig.config_of(FedProx(mu=0.9), rig.LOCAL),
    "FedProx in fp16": rig.config_of(FedProx(mu=0.9), dataclasses.replace(rig.LOCAL, precision="fp16")),
    "Ditto with dropout": rig.config_of(Ditto(lam=0.3), rig.LOCAL),
    "FedAvg with dropout": rig.config_of(FedAvg(), rig.LOCAL),
    "torch's SGD": rig.config_of(ServerOptimizer(optimizer="SGD", lr=1.0), rig.LOCAL),
    "uniform FedAvg": rig.config_of(LocalSGD(), rig.LOCAL),
    "QFedAvg, q 0": rig.config_of(QFedAvg(q=0.0), rig.LOCAL),
    "uniform FedAvg, one round": rig.config_of(LocalSGD(), rig.LOCAL, rounds=1),
    "SCAFFOLD, one round": rig.config_of(SCAFFOLD(), rig.LOCAL, rounds=1),
    "FedAvg, equal steps": rig.config_of(FedAvg(), EQUAL_STEPS),
    "FedNova, equal steps": rig.config_of(FedNova(), EQUAL_STEPS),
    "SyncSGD": rig.config_of(SyncSGD(), ONE_STEP),
    "FedAvg, one step": rig.config_of(FedAvg(), ONE_STEP),
    "SyncSGD, everyone": rig.config_of(SyncSGD(momentum=0.9), ONE_STEP, cohort=ALL_CLIENTS),
    "one client": rig.config_of(
        FedAvg(), LocalConfig(epochs=ref.ROUNDS, batch_size=36, lr=0.3, momentum=0.9), rounds=1, **ALONE
    ),
    "one client, batches": rig.config_of(FedAvg(), rig.MOMENTUM, **ALONE),
    "FedBuff, all at once": rig.config_of(
        FedBuff(buffer_size=ref.CLIENTS), TWO_STEPS, cohort=ALL_CLIENTS, clock=TOGETHER
    ),
    "uniform FedAvg, everyone": rig.config_of(LocalSGD(), TWO_STEPS, cohort=ALL_CLIENTS),
    "FedAsync, a lone client's": rig.config_of(FedAsync(alpha=1.0, rho=0.0), ONE_STEP, **ALONE),
    "FedAvg, a lone client's": rig.config_of(FedAvg(), ONE_STEP, **ALONE),
}
EQUAL = [
    ("FedProx, mu 0", "FedAvg"),
    ("FedAvgM, beta 0", "FedAvg"),
    ("MOON, mu 0", "FedAvg"),
    ("Ditto", "FedAvg"),
    ("Ditto with dropout", "FedAvg with dropout"),
    ("torch's SGD", "FedAvg"),
    ("QFedAvg, q 0", "uniform FedAvg"),
    ("SCAFFOLD, one round", "uniform FedAvg, one round"),
    ("FedNova, equal steps", "FedAvg, equal steps"),
    ("FedAvg, one step", "SyncSGD"),
    ("FedBuff, all at once", "uniform FedAvg, everyone"),
    ("FedAsync, a lone client's", "FedAvg, a lone client's"),
    ("SyncSGD, everyone", "one client"),  # the coordinator's steps are those of DDP on R ranks
]


# Groups of two ranks: tests/test_algorithms.py finds the bits of one group there.
WORLDS = [(1, 1), (1, 2), (2, 1)]


@functools.cache
def trained(groups: int, ranks: int, folder: str) -> dict[str, rig.Trained]:
    # Clients of the quadratics have one example: a second rank would hold padding examples only.
    configs = CONFIGS if ranks == 1 else {n: config for n, config in CONFIGS.items() if n not in QUADRATICS}
    return rig.train_in_world(configs, groups, ranks, f"{folder}/{groups}x{ranks}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("runs"))


@pytest.mark.parametrize(("left", "right"), EQUAL)
@pytest.mark.parametrize(("groups", "ranks"), WORLDS)
def test_algorithms_made_equal_by_their_settings_train_the_same_model(
    left: str, right: str, groups: int, ranks: int, folder: str
) -> None:
    results = trained(groups, ranks, folder)
    torch.testing.assert_close(results[left][0], results[right][0], rtol=0, atol=2e-6)
    start = torch.cat([weights.detach().flatten() for weights in ref.net().parameters()])
    assert (results[left][0] - start).norm() > 0.05  # training moved the model


@pytest.mark.parametrize(("groups", "ranks"), WORLDS)
def test_corrections_are_added_to_unscaled_gradients(groups: int, ranks: int, folder: str) -> None:
    results = trained(groups, ranks, folder)
    right, half, without = (results[name][0] for name in ("FedProx", "FedProx in fp16", "FedAvg"))
    assert (half - right).norm() < 0.05 * (without - right).norm()


@pytest.mark.parametrize(("groups", "ranks"), WORLDS)
def test_fedavg_of_one_client_is_plain_sgd(groups: int, ranks: int, folder: str) -> None:
    config = CONFIGS["one client, batches"]
    reference = ref.Reference(config, clients=1)
    weights = reference.w0
    for reference.round in range(config.rounds):
        weights, _ = reference.train(weights, 0)
    model, _ = trained(groups, ranks, folder)["one client, batches"]
    torch.testing.assert_close(model.double(), weights, rtol=0, atol=1e-5)


@pytest.mark.parametrize("groups", [1, 2])
def test_scaffold_and_feddyn_reach_the_minimum_of_two_quadratics_and_fedavg_does_not(
    groups: int, folder: str
) -> None:
    """f_1 = (w − 1)²/2, f_2 = 10 (w + 1)²/2; their mean is smallest at −9/11; a client has one example."""
    results = trained(groups, 1, folder)
    found = {name: round(float(results[name][0]), 3) for name in QUADRATICS}
    assert abs(found.pop("SCAFFOLD with a wrong sign, on quadratics")) > 5
    assert list(found.values()) == [-0.218, -0.818, -0.818], found


# ---- combinations that cannot work ----


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--algorithm SCAFFOLD --local.momentum 0.9", "plain sgd .*momentum=0.9; set local.momentum=0.0"),
        ("--algorithm SCAFFOLD --local.optimizer adam", "plain sgd .*=adam; set local.optimizer=sgd"),
        ("--algorithm SCAFFOLD --local.clip_norm 1", "plain sgd .* local.clip_norm=1.0; leave it out"),
        ("--algorithm SCAFFOLD --aggregation.clip_norm 1", "aggregation.clip_norm=1.0 .* SCAFFOLD"),
        ("--algorithm FedDyn --aggregation.clip_norm 1", "aggregation.clip_norm=1.0 .* FedDyn"),
        *[
            (f"--algorithm {name} --aggregation.on_invalid_update clip", f"clip .* {name}, .*; leave it out")
            for name in ("SCAFFOLD", "FedDyn", "FedNova", "QFedAvg")
        ],
        ("--algorithm FedNova --local.optimizer adamw", "coefficients .*adamw; set local.optimizer=sgd"),
        (
            "--algorithm FedNova --local.momentum 0.5 --local.optimizer_state keep",
            "gradients of one local training, .*=keep; set local.optimizer_state=reset",
        ),
        ("--algorithm FedNova --algorithm.mu 0.1 --local.clip_norm 1", "clip_norm=1.0; leave it out"),
        ("--algorithm QFedAvg --local.optimizer adam", "L = 1/η, .*; set local.optimizer=sgd"),
        ("--algorithm Ditto --local.optimizer_state keep", "two models per client.*set .*=reset"),
        ("--algorithm DiLoCo --local.optimizer_state keep", "optimizer=sgd; set local.optimizer=adamw"),
        ("--algorithm DiLoCo --local.optimizer adamw", "optimizer_state=reset; set .*=keep"),
        ("--algorithm SyncSGD", "one plain step per client, .* local.steps=None; set local.steps=1"),
        ("--algorithm SyncSGD --local.steps 1 --local.momentum 0.5", "; set local.momentum=0.0"),
        ("--algorithm ServerOptimizer --algorithm.optimizer Adamm", "optimizer=Adamm is not a class"),
        ("--algorithm ServerOptimizer --algorithm.optimizer LBFGS", "LBFGS cannot step a flat vector"),
        ("--algorithm FedAdam --algorithm.tau 0", "tau must be > 0"),
        ("--algorithm FedYogi --algorithm.beta2 1", "beta2 must be in .*, got 1"),
        ("--algorithm FedProx --algorithm.mu -1", "mu must be >= 0"),
        ("--algorithm QFedAvg --algorithm.q -1", "q must be >= 0"),
        ("--algorithm MOON --algorithm.temperature 0", "temperature must be > 0"),
        ("--algorithm FedDyn --algorithm.alpha 0", "alpha must be >= 1e-08"),
    ],
)
def test_settings_that_an_algorithm_cannot_work_with_are_refused_in_one_line(flags: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as refused:
        load_config("digits", flags.split())
    assert str(refused.value).startswith(("algorithm", "aggregation"))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("algorithm", "module", "words"),
    [
        (FedBN(), ref.net(), "FedBN: none of the model's trainable parameters"),
        (FedPer(), nn.Sequential(nn.Flatten(), nn.Linear(9, 3)), "FedPer: all of the model's"),
        (MOON(), ref.Point(), "Point has no linear layer"),
        (FedPer(), ref.Point(), "Point has no linear layer"),
    ],
)
def test_models_that_an_algorithm_cannot_train_are_refused_before_the_first_round(
    algorithm: Algorithm, module: nn.Module, words: str
) -> None:
    config = rig.config_of(algorithm, rig.LOCAL, data=DataConfig(clients=2), cohort=CohortConfig(size=1))
    images = ref.TwoExamples() if isinstance(module, ref.Point) else ref.Pixels()
    with pytest.raises(ConfigError, match=words):  # an error while training is of another type
        Federation(config, module=module, train=images).run()
