"""Training under `privacy`: against float64 references, over groups, resumes and budgets; an attack."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import references as ref
import rig
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fedddp import CohortConfig, Config, ConfigError, Federation, TopologyConfig, privacy
from fedddp.aggregation import Mean
from fedddp.algorithms import (
    SCAFFOLD,
    Algorithm,
    ClientContext,
    ClientUpdate,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedBN,
    FedNova,
    FedPer,
    ServerState,
)
from fedddp.distributed.launch import connect
from fedddp.privacy.central import CentralProtection, PrivateSums
from fedddp.privacy.protection import Terms
from fedddp.rng import stream
from fedddp.simulation.attacks import ModelReplacement
from fedddp.training.protect import LEDGER
from fedddp.training.session import Stopped
from fedddp.training.synchronous import run_rounds

DELTA = 1e-3
CENTRAL = privacy.CentralDP(noise_multiplier=0.8, delta=DELTA, clip=0.4)
NOVA = dataclasses.replace(
    CENTRAL, clip=3.0, noise_multiplier=0.1
)  # a_k, the number of steps, is clipped too
ADAPTIVE = dataclasses.replace(CENTRAL, adaptive=True, count_noise=1.0, clip=0.3, quantile=0.4)
LOCAL_DP = privacy.LocalDP(epsilon=8.0, delta=DELTA, clip=0.3)
POISSON = CohortConfig(size=ref.COHORT, sampling="poisson")


# ---- the references: float64, with the same noise ----

Vectors = dict[str, Tensor]


def clipped(vectors: Vectors, clip: float) -> tuple[Vectors, bool]:
    length = math.sqrt(sum(float(v.square().sum()) for v in vectors.values()))
    factor = min(1.0, clip / length) if length else 1.0
    return {name: factor * vector for name, vector in vectors.items()}, length > clip


def noise(config: Config, round_index: int, vectors: Vectors, sigma: float) -> Vectors:
    draw = {
        name: stream("privacy noise", config.seed, round_index, name).standard_normal(len(vector))
        for name, vector in vectors.items()
    }
    return {name: sigma * torch.from_numpy(normal) for name, normal in draw.items()}


def noisy_mean(config: Config, round_index: int, sent: list[Vectors], clip: float, z: float) -> Vectors:
    parts = [clipped(vectors, clip)[0] for vectors in sent]
    drawn = noise(config, round_index, parts[0], z * clip)
    return {n: (torch.stack([p[n] for p in parts]).sum(0) + drawn[n]) / ref.COHORT for n in drawn}


def central(
    r: ref.Reference, step: Callable[[Tensor, Vectors], Tensor], z: float = 0.8, clip: float = 0.4
) -> Tensor:
    """FedAvg's updates, clipped and with noise; the server's step is given."""
    x = r.w0
    for t, cohort in enumerate(r.cohorts()):
        sent = [{"update": r.train(x, k)[0] - x} for k in cohort]
        x = step(x, noisy_mean(r.config, t, sent, clip, z))
    return x


def adam(r: ref.Reference) -> Tensor:
    m, v = torch.zeros_like(r.w0), torch.full_like(r.w0, 0.02**2)

    def step(x: Tensor, mean: Vectors) -> Tensor:
        m.mul_(0.9).add_(0.1 * mean["update"])
        v.mul_(0.99).add_(0.01 * mean["update"] ** 2)
        return x + 0.1 * m / (v.sqrt() + 0.02)

    return central(r, step)


def scaffold(r: ref.Reference) -> Tensor:
    x, c = r.w0, torch.zeros_like(r.w0)
    own: dict[int, Tensor] = {}
    for t, cohort in enumerate(r.cohorts()):
        sent = []
        for k in cohort:
            c_k = own.get(k, torch.zeros_like(x))
            y, steps = r.train(x, k, ref.pull(0.0, x, c - c_k))
            own[k] = c_k - c + (x - y) / (steps * r.lr)
            sent.append({"update": y - x, "control": own[k] - c_k})
        mean = noisy_mean(r.config, t, sent, 0.4, 0.8)
        x, c = x + mean["update"], c + ref.COHORT / ref.CLIENTS * mean["control"]
    return x


def fednova(r: ref.Reference) -> Tensor:
    x = r.w0
    for t, cohort in enumerate(r.cohorts()):
        sent = []
        for k in cohort:
            y, steps = r.train(x, k)
            a = torch.full((1,), float(steps), dtype=torch.float64)
            sent.append({"update": (y - x) / steps, "a": a})
        mean = noisy_mean(r.config, t, sent, 3.0, 0.1)
        x = x + mean["a"] * mean["update"]
    return x


def adaptive(r: ref.Reference) -> Tensor:
    x, clip, z = r.w0, 0.3, 0.8
    z_update = (z**-2 - (2 * 1.0) ** -2) ** -0.5
    for t, cohort in enumerate(r.cohorts()):
        sent = [{"update": r.train(x, k)[0] - x} for k in cohort]
        unclipped = sum(0.5 - clipped(vectors, clip)[1] for vectors in sent)
        x = x + noisy_mean(r.config, t, sent, clip, z_update)["update"]
        drawn = float(stream("privacy count", r.config.seed, t).standard_normal(1)[0])
        share = 0.5 + (unclipped + 1.0 * drawn) / ref.COHORT
        clip *= math.exp(-0.2 * (share - 0.4))
    return x


def local(r: ref.Reference) -> Tensor:
    x, sigma = r.w0, 2 * 0.3 / privacy.mu_of(8.0, DELTA)
    for t, cohort in enumerate(r.cohorts()):
        updates = []
        for k in cohort:
            update = clipped({"update": r.train(x, k)[0] - x}, 0.3)[0]["update"]
            normal = stream("local noise", r.config.seed, t, k, "update").standard_normal(len(update))
            updates.append(update + sigma * torch.from_numpy(normal))
        x = x + ref.mean(updates)
    return x


def fedper(r: ref.Reference) -> Tensor:
    """The head's elements stay as they were, and are not sent: without noise too."""
    x, own = r.w0, dict[int, Tensor]()
    sends = torch.ones(len(x), dtype=torch.bool)
    sends[ref.HEAD] = False
    for t, cohort in enumerate(r.cohorts()):
        sent = []
        for k in cohort:
            start = x.clone()
            start[ref.HEAD] = own.get(k, x[ref.HEAD])
            y = r.train(start, k)[0]
            own[k] = y[ref.HEAD].clone()
            sent.append({"update": (y - x)[sends]})
        mean = torch.zeros_like(x)
        mean[sends] = noisy_mean(r.config, t, sent, 0.4, 0.8)["update"]
        x = x + mean
    return x


def plain(x: Tensor, mean: Vectors) -> Tensor:
    return x + mean["update"]


CASES: dict[str, tuple[Algorithm, privacy.Privacy, Callable[[ref.Reference], Tensor]]] = {
    "FedAvg": (FedAvg(), CENTRAL, lambda r: central(r, plain)),
    "FedAdam": (FedAdam(tau=0.02), CENTRAL, adam),
    "SCAFFOLD": (SCAFFOLD(), CENTRAL, scaffold),
    "FedNova": (FedNova(), NOVA, fednova),
    "FedPer": (FedPer(), CENTRAL, fedper),
    "adaptive": (FedAvg(), ADAPTIVE, adaptive),
    "LocalDP": (FedAvg(), LOCAL_DP, local),
}
CONFIGS = {
    name: rig.config_of(algorithm, rig.LOCAL, privacy=protected)
    for name, (algorithm, protected, _) in CASES.items()
}
CONFIGS["poisson"] = dataclasses.replace(CONFIGS["FedAvg"], cohort=POISSON)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, rig.Trained]]:
    """Return what trains all cases in a world, once for each."""

    @functools.cache
    def train(groups: int, ranks: int, stop: bool = False) -> dict[str, rig.Trained]:
        folder = tmp_path_factory.mktemp(f"{groups}-{ranks}-{stop}")
        configs = {n: c for n, c in CONFIGS.items() if not (stop and n == "poisson")}
        return rig.train_in_world(configs, groups, ranks, str(folder), stop)

    return train


@pytest.mark.parametrize("name", CASES)
def test_the_noisy_mean_equals_the_reference(name: str, trained: Any) -> None:
    expected = CASES[name][2](ref.Reference(CONFIGS[name]))
    torch.testing.assert_close(trained(1, 1)[name][0].double(), expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_two_groups_train_the_same_bits(name: str, trained: Any) -> None:
    rig.assert_same_bits(trained(2, 1)[name], trained(1, 1)[name])


@pytest.mark.parametrize("name", CASES)
def test_a_run_that_was_stopped_within_a_round_resumes_to_the_same_bits(name: str, trained: Any) -> None:
    rig.assert_same_bits(trained(1, 1, True)[name], trained(1, 1)[name])


# ---- runs ----


def run(folder: Path, config: Config, module: nn.Module | None = None, **changes: Any) -> Any:
    config = dataclasses.replace(config, output=str(folder), **changes)
    return Federation(config, module=module or ref.net(), train=ref.Pixels()).run()


def weights(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def test_an_empty_cohort_releases_noise_and_is_counted(tmp_path: Path) -> None:
    cohort = CohortConfig(size=1, sampling="poisson")
    config = dataclasses.replace(CONFIGS["FedAvg"], cohort=cohort, rounds=12)
    sizes = [len(cohort.sample(ref.CLIENTS, config.seed, t)) for t in range(12)]
    assert 0 in sizes
    first = sizes.index(0)
    before = weights(ref.net()) if not first else weights(run(tmp_path / "1", config, rounds=first).model)
    result = run(tmp_path / "2", config, rounds=first + 1)
    drawn = noise(config, first, {"update": before}, 0.8 * 0.4)["update"]
    torch.testing.assert_close((weights(result.model) - before).double(), drawn, rtol=1e-4, atol=1e-6)
    epsilons = [row["privacy/epsilon"] for row in result.history]
    assert epsilons == sorted(set(epsilons))
    assert result.history[-1]["clients/aggregated"] == 0


def test_epsilon_is_in_every_row_and_that_of_the_account(tmp_path: Path) -> None:
    result = run(tmp_path, CONFIGS["poisson"])
    account = CENTRAL.account(POISSON, ref.CLIENTS, 3)
    expected = [account.epsilon(0.8, rounds) for rounds in (1, 2, 3)]
    assert [row["privacy/epsilon"] for row in result.history] == expected
    assert {row["privacy/simulated"] for row in result.history} == {1}


def test_a_target_is_met_by_the_last_round_and_more_rounds_keep_the_noise(tmp_path: Path) -> None:
    target = privacy.CentralDP(target_epsilon=6.0, delta=DELTA, clip=0.4)
    config = dataclasses.replace(CONFIGS["FedAvg"], privacy=target, name="x")
    history = run(tmp_path, config).history
    assert 5.999 < history[-1]["privacy/epsilon"] <= 6
    noise = json.loads((tmp_path / "x/checkpoints/round-00003/state.json").read_text())["metadata"]["privacy"]
    assert noise["noise_multiplier"] == pytest.approx(math.sqrt(3) / privacy.mu_of(6.0, DELTA), rel=1e-6)
    # The budget is spent: a resume with more rounds trains none.
    assert len(run(tmp_path, config, rounds=5, resume="auto").history) == 3


def test_the_budget_ends_the_run_across_a_resume(tmp_path: Path) -> None:
    account = CENTRAL.account(CONFIGS["FedAvg"].cohort, ref.CLIENTS, 9)
    budget = dataclasses.replace(CENTRAL, stop_at_epsilon=account.epsilon(0.8, 5) + 1e-3)
    config = dataclasses.replace(CONFIGS["FedAvg"], privacy=budget, name="x")
    assert len(run(tmp_path, config, rounds=3).history) == 3
    resumed = run(tmp_path, config, rounds=9, resume="auto")
    assert len(resumed.history) == 5
    assert resumed.finished
    assert resumed.history[-1]["privacy/epsilon"] <= budget.budget
    alone = run(tmp_path, config, rounds=9, name="y")
    assert torch.equal(weights(resumed.model), weights(alone.model))
    small = dataclasses.replace(CENTRAL, stop_at_epsilon=1.0)
    with pytest.raises(
        ConfigError, match=r"privacy.stop_at_epsilon=1 is less than the first round costs \(ε = "
    ):
        run(tmp_path, config, privacy=small, name="z")


# ---- secret noise ----

SECRET = dataclasses.replace(CENTRAL, noise="secret")


def test_secret_noise_is_drawn_afresh_and_kept_nowhere(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIGS["FedAvg"], privacy=SECRET)
    one, two = (run(tmp_path, config, name=name) for name in "xy")
    assert not torch.equal(weights(one.model), weights(two.model))
    assert {row["privacy/simulated"] for row in one.history} == {0}
    state = one.folder / "checkpoints/round-00003/state.json"
    kept = json.loads(state.read_text())["metadata"]["privacy"]
    assert kept == {"noise_multiplier": 0.8, "repeated": 0}
    assert json.loads((one.folder / LEDGER).read_text()) == kept


def test_noise_is_that_of_the_rounds_that_were_lost_before_a_checkpoint(tmp_path: Path) -> None:
    """More rounds would need more noise for the target, but the lost one was released with less."""
    target = privacy.CentralDP(target_epsilon=6.0, delta=DELTA, clip=0.4, noise="secret")
    config = dataclasses.replace(CONFIGS["FedAvg"], privacy=target, name="x")
    lost = run(tmp_path, config, rounds=4)
    shutil.rmtree(lost.folder / "checkpoints")
    (lost.folder / "history.jsonl").write_text(json.dumps(lost.history[0]) + "\n")
    resumed = run(tmp_path, config, rounds=8, resume="auto")
    noise, rounds = json.loads((lost.folder / LEDGER).read_text())["noise_multiplier"], len(resumed.history)
    assert noise == pytest.approx(math.sqrt(4) / privacy.mu_of(6.0, DELTA), rel=1e-6)
    assert rounds == 3
    assert resumed.history[-1]["privacy/epsilon"] == pytest.approx(6.0, rel=1e-4)


def test_released_rounds_that_are_repeated_are_charged_again(tmp_path: Path) -> None:
    """The process dies after round 3, the checkpoint is of round 2; and again before the next checkpoint."""
    config = dataclasses.replace(CONFIGS["FedAvg"], privacy=SECRET, name="x")
    account = SECRET.account(config.cohort, ref.CLIENTS, 6)
    first = run(tmp_path, config, rounds=2)
    history = first.folder / "history.jsonl"
    lines = history.read_text()

    def lose(number: int, torn: str = "") -> None:
        row = json.loads(lines.splitlines()[-1]) | {"round": number}
        with history.open("a") as file:
            file.write(json.dumps(row) + "\n" + torn)

    lose(3, torn='{"round": 4, "eval')
    resumed = run(tmp_path, config, rounds=3, resume="auto")
    assert resumed.history[-1]["privacy/repeated"] == 2
    assert resumed.history[-1]["privacy/epsilon"] == account.epsilon(0.8, 3 + 2)
    lose(4)
    (resumed.folder / "checkpoints/round-00003/state.json").write_text("{}")  # corrupt: round 3 is lost too
    again = run(tmp_path, config, rounds=4, resume="auto")
    assert again.history[-1]["privacy/epsilon"] == account.epsilon(0.8, 4 + 4)
    assert json.loads((again.folder / LEDGER).read_text()) == {"noise_multiplier": 0.8, "repeated": 4}
    # Nothing was lost since: nothing more is charged.
    more = run(tmp_path, config, rounds=5, resume="auto")
    assert more.history[-1]["privacy/epsilon"] == account.epsilon(0.8, 5 + 4)


def test_seeded_rounds_that_are_repeated_are_the_same_and_cost_nothing(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIGS["FedAvg"], name="x")
    first = run(tmp_path, config, rounds=2)
    with (first.folder / "history.jsonl").open("a") as file:
        file.write('{"round": 3}\n')
    resumed = run(tmp_path, config, rounds=3, resume="auto")
    assert resumed.history[-1]["privacy/repeated"] == 0
    assert not (first.folder / LEDGER).exists()


# ---- strict ----


def test_strict_runs_record_nothing_of_single_clients(tmp_path: Path, caplog: Any) -> None:
    strict = dataclasses.replace(CENTRAL, strict=True)
    config = dataclasses.replace(
        CONFIGS["poisson"], privacy=strict, aggregation=Mean(on_invalid_update="skip"), name="x"
    )
    with caplog.at_level("DEBUG", "fedddp"):
        result = run(tmp_path, config)
    for row in result.history:
        assert set(row) <= {
            *("round", "privacy/epsilon", "privacy/simulated", "privacy/repeated", "bytes/up", "bytes/down"),
            *("time/round", "time/evaluate", "time/checkpoint"),
        }
        assert row["bytes/up"] == ref.COHORT * 55 * 4  # of the expected cohort
    assert not (result.folder / "split.json").exists()
    assert not any(re.search(r"client \d", record.getMessage()) for record in caplog.records)
    seen = run(tmp_path, config, privacy=CENTRAL, name="y")
    assert torch.equal(weights(result.model), weights(seen.model))


def stop_after(clients: int, config: Config, directory: Path) -> None:
    """Train until the run is asked to stop, by the update of the client with that number."""
    add = PrivateSums.add
    with contextlib.closing(connect(TopologyConfig(device="cpu"))) as world:
        session = rig.session_of(config, world, directory, rig.objects_of("FedAvg", config))
        stops = rig.StopsAfter(world, clients)

        def stopping(*arguments: Any) -> bool:
            stops()
            return add(*arguments)

        with mock.patch.object(PrivateSums, "add", stopping), pytest.raises(Stopped):
            run_rounds(session)
        session.checkpoints.finish()
        session.tracker.finish()


def test_a_strict_round_that_is_stopped_keeps_no_sums(tmp_path: Path) -> None:
    strict = dataclasses.replace(CENTRAL, strict=True)
    config = dataclasses.replace(
        CONFIGS["FedAvg"], privacy=strict, aggregation=Mean(on_invalid_update="skip"), name="x"
    )
    expected = run(tmp_path / "1", config)
    stop_after(4, config, tmp_path / "2" / "x")
    (checkpoint,) = (tmp_path / "2/x/checkpoints").iterdir()
    assert checkpoint.name == "round-00001"
    assert not (checkpoint / "state.safetensors").exists()
    resumed = run(tmp_path / "2", config, resume="auto")
    assert torch.equal(weights(resumed.model), weights(expected.model))


# ---- models and clients ----


class Counts(nn.Module):
    """A layer with a float buffer and an integer one that training changes."""

    def __init__(self, floats: bool) -> None:
        super().__init__()
        self.floats = floats
        self.register_buffer("seen", torch.zeros(1))
        self.register_buffer("batches", torch.zeros(1, dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.get_buffer("batches").add_(1)
            if self.floats:
                self.get_buffer("seen").add_(1)
        return x


def test_running_statistics_are_refused_unless_they_stay_local(tmp_path: Path) -> None:
    norm = dataclasses.replace(CONFIGS["FedAvg"], local=rig.NORM)
    with pytest.raises(ConfigError, match=r"running statistics of the batch norm '2' .* model.norm=group"):
        run(tmp_path, norm, ref.net(norm=True))
    result = run(tmp_path, norm, ref.net(norm=True), algorithm=FedBN())
    found, initial = result.model.state_dict(), ref.net(norm=True).state_dict()
    changed = {name for name in initial if not torch.equal(found[name], initial[name])}
    assert changed == {"1.weight", "1.bias", "4.weight", "4.bias"}


def test_other_buffers_are_constants_or_refused_and_integers_stay_the_coordinators(tmp_path: Path) -> None:
    result = run(tmp_path, CONFIGS["FedAvg"], nn.Sequential(*ref.net(), Counts(floats=False)))
    assert int(result.model[-1].batches) == 0
    with pytest.raises(ValueError, match="a float buffer of the model changes in training"):
        run(tmp_path, CONFIGS["FedAvg"], nn.Sequential(*ref.net(), Counts(floats=True)))


class Broken(FedAvg):
    """FedAvg whose client 2 sends NaN, and whose client 1 sends a huge update."""

    def finish(self, context: ClientContext) -> ClientUpdate:
        if context.client == 2:
            context.params[3] = math.nan
        if context.client == 1:
            context.params.fill_(1e30)
        return super().finish(context)


@pytest.mark.parametrize("protected", [CENTRAL, LOCAL_DP])
def test_huge_updates_are_clipped_and_invalid_ones_left_out(tmp_path: Path, protected: Any) -> None:
    config = dataclasses.replace(
        CONFIGS["FedAvg"],
        privacy=protected,
        algorithm=Broken(),
        cohort=CohortConfig(size=5),
        aggregation=Mean(on_invalid_update="skip"),
        rounds=1,
    )
    result = run(tmp_path, config)
    assert (result.history[0]["clients/aggregated"], result.history[0]["clients/invalid"]) == (4, 1)
    moved = weights(result.model) - weights(ref.net())
    assert torch.isfinite(moved).all()
    assert float(moved.norm()) < 8


def test_malicious_clients_are_clipped_to_the_same_norm(tmp_path: Path) -> None:
    attack = ModelReplacement(fraction=0.4)
    config = dataclasses.replace(
        CONFIGS["FedAvg"], attacks=attack, privacy=dataclasses.replace(CENTRAL, noise_multiplier=1e-9)
    )
    moved = weights(run(tmp_path, config, rounds=1).model) - weights(ref.net())
    assert float(moved.norm()) <= 0.4 * (1 + 1e-6)


@pytest.mark.parametrize("algorithm", [FedAvgM(), FedAvg(lr=2.0)])
def test_server_optimizers_act_on_the_noisy_mean(tmp_path: Path, algorithm: FedAvg) -> None:
    first = weights(run(tmp_path, CONFIGS["FedAvg"], rounds=1).model) - weights(ref.net())
    moved = weights(run(tmp_path, CONFIGS["FedAvg"], rounds=1, algorithm=algorithm).model) - weights(
        ref.net()
    )
    torch.testing.assert_close(moved, algorithm.lr * first)


def test_the_adapted_clip_is_recorded_and_kept_in_checkpoints(tmp_path: Path) -> None:
    result = run(tmp_path, CONFIGS["adaptive"])
    clips = [row["privacy/clip"] for row in result.history]
    assert clips[0] == 0.3
    assert len(set(clips)) == 3
    kept = load_file(result.folder / "checkpoints/round-00003/state.safetensors")
    assert kept["server.privacy.clip"].dtype == torch.float64
    assert kept["server.privacy.clip"].item() not in clips


# ---- the release of a round, and an attack on it ----


def sums(
    z: float, claimed: float, cohort: int, elements: int = 3, seed: int = 0, integers: Sequence[int] = ()
) -> PrivateSums:
    """Return empty sums whose account claims z = `claimed`, of a server with `integers` as buffers."""
    state = ServerState(torch.zeros(elements), torch.empty(0), torch.tensor(integers).long(), 10)
    settings = privacy.CentralDP(noise_multiplier=claimed, delta=DELTA, clip=1.0)
    account = settings.account(CohortConfig(size=cohort), 10, 1)
    protection = CentralProtection(settings, account, Terms(z, 1, 0), state, seed=seed)
    return PrivateSums(Mean(), {"update": elements, "buffers": 0}, 10, state, protection)


def add(to: PrivateSums, *update: float) -> None:
    vectors = {"update": torch.tensor(update)}
    to.add(0, ClientUpdate(vectors, 0.123), torch.empty(0), 0.5, torch.empty(0, dtype=torch.int64))


def test_clipped_updates_are_summed_with_weight_one_over_the_expected_cohort() -> None:
    quiet = sums(1e-12, 1.0, cohort=4)
    add(quiet, 3.0, 4.0, 0.0)
    add(quiet, 0.0, 0.0, 0.5)
    assert quiet.counts.tolist() == [2, 0, 1]
    aggregated = quiet.result()
    torch.testing.assert_close(aggregated["update"], torch.tensor([0.15, 0.2, 0.125]))
    assert aggregated.clients == 4
    quiet.reset(3)
    add(quiet, 0.0, 0.0, 0.5)
    torch.testing.assert_close(quiet.result()["update"], torch.tensor([0.0, 0.0, 0.125]))


def test_integer_buffers_stay_the_servers_without_a_client_too() -> None:
    empty = sums(1.0, 1.0, cohort=4, integers=[5, -7])
    empty.result()
    assert empty.integer_buffers.tolist() == [5, -7]


def test_every_output_is_a_multiple_of_the_unit() -> None:
    noisy = sums(1.0, 1.0, cohort=1, elements=100)
    noisy.like = torch.zeros(100, dtype=torch.float64)
    add(noisy, *torch.linspace(-1, 1, 100).tolist())
    units = noisy.result()["update"] * 2.0**40
    assert torch.equal(units, units.round())
    assert 25 < int((units % 2 != 0).sum()) < 75


def test_noise_beyond_exact_sums_is_refused_before_the_first_round(tmp_path: Path) -> None:
    for noisy in (
        dataclasses.replace(CENTRAL, noise_multiplier=1e6),
        privacy.LocalDP(epsilon=8.0, delta=DELTA, clip=1e6),
    ):
        with pytest.raises(ConfigError, match="does not fit into exact sums, which hold 262144; lower"):
            run(tmp_path, CONFIGS["FedAvg"], privacy=noisy)
    state = ServerState(torch.zeros(3), torch.empty(0), torch.empty(0), 6)
    adaptive = dataclasses.replace(ADAPTIVE, noise_multiplier=1.5, count_noise=9.0)
    account = adaptive.account(CohortConfig(size=3), 6, 1)
    protection = CentralProtection(adaptive, account, Terms(1.5, 1, 0), state, seed=0)
    state.vectors["privacy.clip"].fill_(protection.largest_clip)
    assert protection.largest_clip < 2**20 / 6
    protection.noise_for("update", 3, 3, state)  # C may grow until here, and its noise still fits


def test_a_clip_beyond_exact_sums_is_refused() -> None:
    state = ServerState(torch.zeros(3), torch.empty(0), torch.empty(0), 10**6)
    settings = privacy.CentralDP(noise_multiplier=1.0, delta=1e-9, clip=2.0)
    account = settings.account(CohortConfig(size=10), 10**6, 1)
    with pytest.raises(ValueError, match=r"privacy.clip=2 is more than the 1.049 with which exact sums hold"):
        CentralProtection(settings, account, Terms(1.0, 1, 0), state, seed=0)


SEEDS = 2500


def scores(z: float, rate: float, rounds: int, present: bool) -> Any:
    """Return the log-likelihood ratios of runs with, or without, a client that sends (1, 0, 0)."""
    releases, rng = sums(z, z, cohort=1, seed=int(present)), np.random.default_rng(present)
    seen = np.empty((SEEDS, rounds))
    for index in np.ndindex(SEEDS, rounds):
        releases.reset(2)
        releases.server.version = index[0] * rounds + index[1]
        if present and rng.random() < rate:
            add(releases, 1.0, 0.0, 0.0)
        seen[index] = float(releases.result()["update"][0])
    return np.log(1 - rate + rate * np.exp((seen - 0.5) / z**2)).sum(1)


def bound(hits: int, upper: bool) -> float:
    """Return a bound on a probability after `hits` of `SEEDS`, wrong once in 10,000 (Clopper and Pearson)."""
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        # The probability of so many hits, or fewer: by a normal approximation of the logarithm it would be
        # too rough in the tails, so it is summed.
        counts = np.arange(hits + 1 if upper else hits)
        logs = [
            math.lgamma(SEEDS + 1)
            - math.lgamma(k + 1)
            - math.lgamma(SEEDS - k + 1)
            + k * math.log(middle)
            + (SEEDS - k) * math.log1p(-middle)
            for k in counts
        ]
        below = float(np.exp(logs).sum())
        keep = below > 1e-4 if upper else 1 - below < 1e-4
        low, high = (middle, high) if keep else (low, middle)
    return high if upper else low


def attacked_epsilon(z: float, rate: float, rounds: int, delta: float) -> float:
    """Return the ε that an attack by likelihood ratios proves to be exceeded, with great confidence."""
    absent, present = (scores(z, rate, rounds, here) for here in (False, True))
    best = 0.0
    for threshold in np.quantile(absent, [0.5, 0.7, 0.8, 0.9, 0.95]):
        false, true = int((absent > threshold).sum()), int((present > threshold).sum())
        gained = bound(true, upper=False) - delta
        if gained > 0:
            best = max(best, math.log(gained / bound(false, upper=True)))
    return best


@pytest.mark.parametrize(("rate", "z", "rounds", "delta"), [(1.0, 2.0, 1, 0.05), (0.5, 1.0, 2, 0.05)])
def test_an_attack_never_beats_the_account_but_does_with_half_the_noise(
    rate: float, z: float, rounds: int, delta: float
) -> None:
    accounted = privacy.epsilon([privacy.Release(rate, z, rounds)], delta)
    assert 0.1 < attacked_epsilon(z, rate, rounds, delta) < accounted
    assert attacked_epsilon(z / 2, rate, rounds, delta) > accounted
