"""DP-SGD inside clients (`ExampleDP`): against plain loops in float64, its account, an attack on it."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import references as ref
import rig
import torch
from test_private_rounds import bound
from torch import Tensor, nn
from torch.nn import functional as F

from fedddp import CohortConfig, Config, ConfigError, Federation, LocalConfig, TopologyConfig, privacy
from fedddp.aggregation import Mean
from fedddp.algorithms import SCAFFOLD, Algorithm, Ditto, FedAvg, FedDyn, FedNova, FedProx
from fedddp.config.loader import build
from fedddp.data.datasets import DataConfig, from_dataset
from fedddp.data.loader import Batch, ClientLoader
from fedddp.data.poisson import poisson_batches
from fedddp.distributed.launch import connect
from fedddp.models.flat import FlatModel
from fedddp.privacy.accountant import BOUND_ORDERS, Account, renyi_bounds
from fedddp.privacy.example import (
    CLIENTS,
    Cost,
    ExampleAccount,
    add_clipped,
    example_sensitivity,
    grid_exponent,
    step_noise,
)
from fedddp.privacy.local import Participations
from fedddp.privacy.noise import UNIT
from fedddp.privacy.statement import statement
from fedddp.rng import stream
from fedddp.secure import SecAgg
from fedddp.testing import run_world
from fedddp.training import synchronous
from fedddp.training.objects import Objects
from fedddp.training.private_trainer import PrivateTrainer
from fedddp.training.protect import LEDGER
from fedddp.training.session import Stopped

DELTA = 1e-3
CLIP, NOISE = 1.6, 1.0
# Of clipped gradients that are rounded to multiples of 2⁻¹⁹; the model has 55 parameters.
SIGMA = NOISE * (CLIP * (1 + 2**-12) + 2**-19 * math.sqrt(55) / 2)
EXAMPLES = privacy.ExampleDP(noise_multiplier=NOISE, delta=DELTA, clip=CLIP)


# ---- the reference: every example by itself, in float64, with the same batches and noise ----


class Reference(ref.Reference):
    """`ref.Reference`, with DP-SGD for its local training."""

    norms: list[float]

    def train(  # type: ignore[override]
        self, w: Tensor, client: int, correct: Any = lambda w: 0.0, **_: Any
    ) -> tuple[Tensor, int]:
        assert isinstance(self.config.privacy, privacy.ExampleDP)
        self.norms = self.__dict__.setdefault("norms", [])
        calls = self.__dict__.setdefault("calls", collections.Counter())
        number = calls[self.round, client] % self.config.algorithm.passes
        calls[self.round, client] += 1
        weights = nn.Parameter(w.clone())
        optimizer = torch.optim.SGD([weights], self.lr, self.local.momentum)
        steps = 0
        for chosen in self.poisson(client, number):
            self.set(weights.detach().clone())
            total = torch.zeros_like(w)
            for i in chosen.tolist():
                loss = F.cross_entropy(self.net(self.x[i : i + 1]), self.y[i : i + 1])
                g = torch.cat([p.flatten() for p in torch.autograd.grad(loss, list(self.net.parameters()))])
                self.norms.append(float(g.norm()))
                total += g * min(1.0, CLIP / float(g.norm()))
            drawn = stream("example noise", self.config.seed, self.round, client, number, steps)
            total += SIGMA * torch.from_numpy(drawn.standard_normal(len(w)))
            weights.grad = total / self.local.batch_size + correct(weights.detach())
            optimizer.step()
            steps += 1
        self.b = self.buffers()
        return weights.detach().clone(), steps

    def poisson(self, client: int, number: int) -> Iterator[Any]:
        indices, size = self.split.indices(client), self.local.batch_size
        in_epoch = math.ceil(len(indices) / size)
        left = self.local.steps or self.local.epochs * in_epoch
        for epoch in range(1000):
            rng = stream("poisson batches", self.config.seed, self.round, client, number, epoch)
            for _ in range(min(left, in_epoch)):
                yield indices[rng.random(len(indices)) < size / len(indices)]
            left -= in_epoch
            if left <= 0:
                return


def ditto(r: Reference) -> Tensor:
    """The own model trains in the first pass: its batches and noise are not those of the second."""
    x, own = r.w0, dict[int, Tensor]()
    for cohort in r.cohorts():
        updates = []
        for k in cohort:
            own[k] = r.train(own.get(k, x), k, ref.pull(0.1, x))[0]
            updates.append(r.train(x, k)[0] - x)
        x = x + ref.mean(updates, r.p(cohort))
    return x


CHUNKS = LocalConfig(epochs=2, batch_size=4, lr=0.2, accumulate=3)
SPARSE = LocalConfig(epochs=2, batch_size=1, lr=0.2)
STEPS = LocalConfig(steps=5, batch_size=4, lr=0.2)
CASES: dict[str, tuple[Algorithm, LocalConfig, Callable[[Reference], Tensor]]] = {
    "FedProx": (FedProx(mu=0.3), CHUNKS, lambda r: ref.fedavg(r, 0.3)),
    "sparse": (FedAvg(), SPARSE, ref.fedavg),
    "SCAFFOLD": (SCAFFOLD(), STEPS, lambda r: ref.scaffold(r, 1.0)),
    "FedNova": (FedNova(), rig.MOMENTUM, ref.fednova),
    "FedDyn": (FedDyn(), STEPS, lambda r: ref.feddyn(r, 0.1)),
    "Ditto": (Ditto(), STEPS, ditto),
}
CONFIGS = {n: rig.config_of(a, local, privacy=EXAMPLES) for n, (a, local, _) in CASES.items()}
ALL: dict[str, Any] = {"local": LocalConfig(epochs=2, batch_size=40, lr=0.2)}
"""Batches of all examples, whose account is a formula: for tests that do not look at ε."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, rig.Trained]]:
    """Return what trains all cases in a world, once for each."""

    @functools.cache
    def train(groups: int, ranks: int, stop: bool = False) -> dict[str, rig.Trained]:
        folder = tmp_path_factory.mktemp(f"{groups}-{ranks}-{stop}")
        return rig.train_in_world(CONFIGS, groups, ranks, str(folder), stop)

    return train


@pytest.mark.parametrize("name", CASES)
def test_training_equals_the_loop_over_single_examples(name: str, trained: Any) -> None:
    reference = Reference(CONFIGS[name])
    expected = CASES[name][2](reference)
    assert any(norm < CLIP for norm in reference.norms), "else clipping is not tried both ways"
    assert any(norm > 1.2 * CLIP for norm in reference.norms)
    torch.testing.assert_close(trained(1, 1)[name][0].double(), expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_two_ranks_train_what_one_trains_with_the_same_noise(name: str, trained: Any) -> None:
    torch.testing.assert_close(trained(1, 2)[name][0], trained(1, 1)[name][0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_two_groups_and_a_resume_train_the_same_bits(name: str, trained: Any) -> None:
    rig.assert_same_bits(trained(2, 1)[name], trained(1, 1)[name])
    rig.assert_same_bits(trained(1, 1, True)[name], trained(1, 1)[name])


def test_some_batches_are_empty_and_others_larger_than_the_batch_size() -> None:
    reference = Reference(CONFIGS["sparse"])
    reference.round = 0
    sizes = [len(batch) for client in range(ref.CLIENTS) for batch in reference.poisson(client, 0)]
    assert min(sizes) == 0
    assert max(sizes) > 1


# ---- Poisson batches ----


def loader() -> ClientLoader:
    return ClientLoader(from_dataset(ref.Pixels()), DataConfig(), torch.device("cpu"), seed=0)


def drawn(images: ClientLoader, rate: float, steps: int, shard: tuple[int, int] = (0, 1)) -> list[Batch]:
    rng = stream("test", 3)
    return list(poisson_batches(images, np.arange(36), rate, steps, client=0, rng=rng, shard=shard))


def test_examples_are_in_a_batch_independently_with_the_rate() -> None:
    """Of 36 x 600 draws; bounds of five standard deviations."""
    images, rate, steps = loader(), 0.25, 600
    everything = images.normalize(torch.arange(36)[:, None, None, None].expand(36, 1, 3, 3).to(torch.uint8))
    images._pixels = torch.arange(36)[:, None, None, None].expand(36, 1, 3, 3).to(torch.uint8)
    there = np.zeros((steps, 36))
    for step, batch in enumerate(drawn(images, rate, steps)):
        assert batch.count == batch.total
        own = batch.images[: batch.count, 0, 0, 0].contiguous()
        there[step, torch.searchsorted(everything[:, 0, 0, 0].contiguous(), own).numpy()] = 1
        assert there[step].sum() == batch.count

    def close(found: float, expected: float, draws: int) -> bool:
        return abs(found - expected) < 5 * math.sqrt(expected * (1 - expected) / draws)

    assert close(there.mean(), rate, there.size)
    assert all(close(mean, rate, steps) for mean in there.mean(0))
    # Neither the next step, as in shuffled epochs, nor another example, as in batches of one size, depends.
    assert close((there[1:] * there[:-1]).mean(), rate**2, there[1:].size)
    assert there.sum(1).var() == pytest.approx(36 * rate * (1 - rate), rel=0.3)


@pytest.mark.parametrize("rate", [0.02, 0.3])
def test_the_ranks_of_a_group_share_the_batches_of_one_rank(rate: float) -> None:
    whole, parts = drawn(loader(), rate, 12), [drawn(loader(), rate, 12, (r, 3)) for r in range(3)]
    assert {batch.total for batch in whole} > {0} or rate == 0.3
    for batch, *shared in zip(whole, *parts, strict=True):
        assert [part.total for part in shared] == [batch.total] * 3
        joined = torch.full_like(batch.images[: batch.count], math.nan)
        for rank, part in enumerate(shared):
            joined[rank::3] = part.images[: part.count]
        assert torch.equal(joined, batch.images[: batch.count])
        assert len(shared[0].images), "padding"


# ---- the clipped sum ----


def test_clipped_rows_are_summed_exactly_in_any_order_and_parts() -> None:
    rng = np.random.default_rng(0)
    rows = torch.from_numpy(rng.standard_normal((37, 5000)) * 10.0 ** rng.integers(-3, 3, (37, 1))).float()
    totals = []
    for order in (np.arange(37), rng.permutation(37)):
        totals.append(total := torch.zeros(5000, dtype=torch.int64))
        for part in np.array_split(order, 4):
            add_clipped(total, rows[torch.from_numpy(part)], 0.7)
    assert torch.equal(*totals)
    norms = rows.double().norm(dim=1, keepdim=True)
    expected = (rows.double() * (0.7 / norms).clamp(max=1)).sum(0)
    torch.testing.assert_close(totals[0].double() * UNIT, expected, rtol=0, atol=37 * 2.0**-20)


@pytest.mark.parametrize("clip", [0.999, 1.0, 1e-9])
def test_no_row_exceeds_the_sensitivity_and_sums_of_the_largest_are_exact(clip: float) -> None:
    torch.manual_seed(0)
    for rows in (torch.randn(1, 100_001) * 1e4, torch.eye(1, 9) * 3e18, torch.ones(1, 4096)):
        total = torch.zeros(rows.shape[1], dtype=torch.int64)
        add_clipped(total, rows.clone(), clip)
        length = float((total.double() * UNIT).norm())
        assert length <= example_sensitivity(clip, rows.shape[1])
        assert length == pytest.approx(clip, rel=3e-4) or clip == 1e-9
    for _ in range(20):  # the sums with the most bits
        many, single = torch.zeros(2, 1, dtype=torch.int64)
        largest = (1 - torch.rand(8, 1) / 50) * clip
        add_clipped(many, largest.clone(), clip)
        for row in largest.clone():
            add_clipped(single, row[None], clip)
        assert torch.equal(many, single)


def test_rounding_to_the_grid_has_no_bias() -> None:
    """Halves of the grid's step, a little less and a little more, of either sign."""
    halves = torch.tensor([0.499, 0.501, -0.499, -0.501]) * 2.0 ** grid_exponent(1.0)
    total = torch.zeros(4, dtype=torch.int64)
    add_clipped(total, halves[None].clone(), 1.0)
    assert (total * UNIT / 2.0 ** grid_exponent(1.0)).tolist() == [0, 1, 0, -1]


def test_half_precision_gradients_are_summed_exactly() -> None:
    rows = torch.full((8, 3), 1000.0, dtype=torch.float16)
    total = torch.zeros(3, dtype=torch.int64)
    add_clipped(total, rows, 16.0)
    assert (total * UNIT).tolist() == pytest.approx([8 * 16 / 3**0.5] * 3, rel=1e-3)


def test_secret_noise_is_another_at_every_call() -> None:
    secret = dataclasses.replace(EXAMPLES, noise="secret")
    for given, same in ((EXAMPLES, True), (secret, False)):
        one, two = (step_noise(given, 1.0, 20, ("name", 1)) for _ in range(2))
        assert torch.equal(one, two) is same


def test_examples_without_a_finite_gradient_count_as_zero() -> None:
    rows = torch.tensor([[1.0, math.nan], [math.inf, 0.0], [1e30, 0.0], [0.0, 3.0], [0.0, 0.0]])
    total = torch.zeros(2, dtype=torch.int64)
    add_clipped(total, rows, 1.0)
    assert (total.double() * UNIT).tolist() == pytest.approx([0.0, 1.0], abs=1e-6)


SEEDS = 2500


def scores(z: float, rate: float, rounds: int, present: bool) -> Any:
    """Return the log-likelihood ratios of clients with, or without, an example whose gradient is (3, 0)."""
    settings = privacy.ExampleDP(noise_multiplier=z, delta=DELTA, clip=1.0)
    total = step_noise(settings, z, SEEDS * rounds, ("attack", int(present)))  # an element for each step
    if present:
        add_clipped(changed := torch.zeros(2, dtype=torch.int64), torch.tensor([[3.0, 0.0]]), 1.0)
        total += torch.from_numpy(np.random.default_rng(0).random(len(total)) < rate) * changed[0]
    seen = total.view(SEEDS, rounds).numpy() * UNIT
    return np.log(1 - rate + rate * np.exp((seen - 0.5) / z**2)).sum(1)


def test_an_attack_on_a_client_never_beats_the_account_but_does_with_half_the_noise() -> None:
    rate, z, rounds, delta = 0.5, 1.0, 2, 0.05
    local = LocalConfig(steps=rounds, batch_size=5)
    account = ExampleAccount(np.array([10]), local, 1, everybody(1), delta=delta, rounds=1)
    found = {}
    for noise in (z, z / 2):
        absent, present = (scores(noise, rate, rounds, here) for here in (False, True))
        found[noise] = 0.0
        for threshold in np.quantile(absent, [0.5, 0.8, 0.9, 0.95]):
            false, true = int((absent > threshold).sum()), int((present > threshold).sum())
            gained = bound(true, upper=False) - delta
            if gained > 0:
                found[noise] = max(found[noise], math.log(gained / bound(false, upper=True)))
    assert 0.1 < found[z] < account.epsilon(z, 1) < found[z / 2]


# ---- the account ----


def everybody(population: int) -> Participations:
    return Participations(population, lambda index: np.arange(population))


@pytest.mark.parametrize(
    ("examples", "batch", "noise", "steps", "expected"),
    [(100, 1, 1.0, 1000, 1.828244), (60_000, 256, 1.1, 14_063, 2.381779)],
)
def test_epsilon_of_a_client(examples: int, batch: int, noise: float, steps: int, expected: float) -> None:
    local = LocalConfig(steps=steps, batch_size=batch)
    account = ExampleAccount(np.array([examples]), local, 1, everybody(1), delta=1e-5, rounds=1)
    assert expected - 2e-6 < account.epsilon(noise, 1) < expected + 1e-4


def test_bounds_of_many_clients_are_those_of_the_library() -> None:
    rates, steps = np.array([0.01, 256 / 60000, 0.3, 1.0]), np.array([1000, 14063, 60, 30])
    found = renyi_bounds(rates, steps, 1.5, 1e-5)
    for q, t, bounded in zip(rates.tolist(), steps.tolist(), found.tolist(), strict=True):
        expected = privacy.renyi_epsilon([privacy.Release(q, 1.5, t)], 1e-5, BOUND_ORDERS)
        assert bounded == pytest.approx(expected, rel=1e-9)
    assert renyi_bounds(np.array([1e-4]), np.array([1]), 50.0, 0.5).tolist() == [0.0]


SIZES = np.array([40, 9, 0, 9, 25, 4, 3])
COHORTS = [[0, 2, 3], [0, 1, 2], [0, 3, 4], [0, 5, 6]]


def small_account(sizes: Any = SIZES, passes: int = 1, **other: Any) -> ExampleAccount:
    participations = Participations(len(sizes), lambda index: np.array(COHORTS[index % 4]))
    local = LocalConfig(epochs=2, batch_size=4)
    return ExampleAccount(sizes, local, passes, participations, delta=1e-3, rounds=8, **other)


def alone(examples: int, trainings: int, z: float) -> float:
    """Return ε of one client by the account of clients: what a round's cohort is there, is a batch here."""
    rate, steps = min(1.0, 4 / examples), 2 * math.ceil(examples / 4) * trainings
    if not steps:
        return 0.0
    return Account(
        sampling="poisson", population=examples, cohort=round(rate * examples), delta=1e-3, rounds=80
    ).epsilon(z, steps)


def test_epsilon_is_that_of_the_client_with_the_largest() -> None:
    account, z = small_account(), 1.3
    trained = np.array([[k in cohort for k in range(7)] for cohort in COHORTS]).cumsum(0)
    for rounds in (0, 1, 2, 4):
        counts = trained[rounds - 1] if rounds else np.zeros(7, dtype=int)
        each = [alone(n, t, z) if n else 0.0 for n, t in zip(SIZES.tolist(), counts.tolist(), strict=True)]
        assert account.epsilon(z, rounds) == pytest.approx(max(each), abs=2e-4)
        rows = account.table(z, rounds)
        assert [row["epsilon"] for row in rows] == pytest.approx(each, abs=2e-4)
        assert [row["steps"] for row in rows] == (2 * np.ceil(SIZES / 4) * counts).tolist()
    assert account.full_batches == 2
    # Ditto trains twice; repeated rounds are charged to every client.
    assert small_account(passes=2).epsilon(z, 2) == pytest.approx(account.epsilon(z, 8), rel=0.5)
    assert small_account(passes=2).table(z, 1)[0]["steps"] == 40
    assert [row["steps"] for row in small_account(repeated=2).table(z, 3)] == [60, 12, 0, 18, 28, 4, 4]


def test_many_different_clients_cost_few_queries_and_never_too_little() -> None:
    sizes = np.arange(20, 50)
    account = ExampleAccount(
        sizes, LocalConfig(steps=3, batch_size=4), 1, everybody(30), delta=1e-3, rounds=1
    )
    account.steps = account.steps + np.arange(30)  # so that none is in all respects ahead of another
    cheap = renyi_bounds(4 / sizes, account.steps, 2.0, 1e-3)
    exact = max(
        Account(sampling="poisson", population=int(n), cohort=4, delta=1e-3, rounds=32).epsilon(2.0, int(t))
        for n, t in zip(sizes[::4], account.steps[::4], strict=True)
    )
    found = account.epsilon(2.0, 1)
    assert exact <= found + 1e-4
    # Groups of the clients that are left are covered by the highest rate and the most steps in each.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedddp.privacy.example.QUERIES", 1)
        largest = max(
            account._epsilon(2.0, Cost(int(n), int(t))) for n, t in zip(sizes, account.steps, strict=True)
        )
        assert account.epsilon(2.0, 1) >= largest
        account.known.clear()
    account.epsilon(2.0, 1)
    assert found < min(1.1 * exact, float(cheap.max()))
    assert len(account.known) <= 16


def test_the_noise_for_a_target_is_the_smallest_that_is_enough_for_all_clients() -> None:
    account = small_account()
    z = account.noise_multiplier(3.0, 4)
    assert account.epsilon(z, 4) <= 3 < account.epsilon(z * 0.9999, 4)
    assert account.most_rounds(z, 3.0, 8) in (4, 5)


def test_the_noise_for_a_target_is_enough_where_the_worst_client_changes_with_it() -> None:
    """With little noise the client that samples costs most, with more the one that takes all its examples."""
    account = ExampleAccount(
        np.array([4, 40]), LocalConfig(steps=1, batch_size=4), 1, everybody(2), delta=1e-3, rounds=1
    )
    account.steps = np.array([1, 70])
    z = account.noise_multiplier(0.55, 1)
    assert account.epsilon(z, 1) <= 0.55 < account.epsilon(0.999 * z, 1)


@pytest.mark.parametrize("rounds", range(1, 60, 2))
def test_the_noise_of_the_closed_form_does_not_exceed_its_target(rounds: int) -> None:
    account = Account(sampling="none", population=9, cohort=9, delta=1e-3, rounds=rounds)
    for target in (0.55, 2.0, 8.0):
        z = account.noise_multiplier(target, rounds)
        assert account.epsilon(z, rounds) <= target < account.epsilon(z * (1 - 1e-6), rounds)
        assert account.most_rounds(z, target, 2 * rounds) == rounds


def test_a_delta_that_protects_no_example_is_refused() -> None:
    with pytest.raises(ValueError, match=r"privacy.delta=0.001 must be below 0.000999, one over the 1,001"):
        small_account(np.array([1001, 1, 1, 1, 1, 1, 1]))


# ---- runs ----


def run(folder: Path, config: Config, module: nn.Module | None = None, **changes: Any) -> Any:
    config = dataclasses.replace(config, output=str(folder), **changes)
    return Federation(config, module=module or ref.net(), train=ref.Pixels()).run()


def weights(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def test_rows_the_file_of_clients_and_the_statement_have_epsilon(tmp_path: Path) -> None:
    result = run(tmp_path, CONFIGS["FedProx"])
    epsilons = [row["privacy/epsilon"] for row in result.history]
    assert epsilons == sorted(epsilons)
    rows = [json.loads(line) for line in (result.folder / CLIENTS).read_text().splitlines()]
    assert max(row["epsilon"] for row in rows) == epsilons[-1]
    reference = Reference(CONFIGS["FedProx"])
    counts = collections.Counter(k for cohort in reference.cohorts() for k in cohort)
    for client, row in enumerate(rows):
        n = reference.n(client)
        expected = {"client": client, "examples": n, "steps": 2 * math.ceil(n / 4) * counts[client]}
        assert {key: row[key] for key in expected} == expected
    claim = statement({"privacy": {"name": "ExampleDP", "delta": DELTA}}, result.history)
    assert f"simulated ε = {epsilons[-1]:.4g} at δ = 0.001 for each example of a client, ExampleDP" in str(
        claim
    )
    assert "numbers of examples count as public; losses" in str(claim)


def test_a_target_is_met_and_the_budget_ends_a_resumed_run(tmp_path: Path) -> None:
    target = privacy.ExampleDP(target_epsilon=20.0, delta=DELTA, clip=CLIP)
    config = dataclasses.replace(CONFIGS["FedProx"], privacy=target, name="x", **ALL)
    history = run(tmp_path, config).history
    assert 19.9 < history[-1]["privacy/epsilon"] <= 20
    more = run(tmp_path, config, rounds=9, resume="auto").history
    assert 3 <= len(more) < 9
    assert more[-1]["privacy/epsilon"] <= 20


def test_strict_runs_record_no_losses_and_no_clients(tmp_path: Path) -> None:
    strict = dataclasses.replace(EXAMPLES, strict=True)
    seen = run(tmp_path / "1", CONFIGS["SCAFFOLD"], **ALL)
    result = run(tmp_path / "2", CONFIGS["SCAFFOLD"], privacy=strict, **ALL)
    kept = {"round", "privacy", "eval", "bytes", "time"}
    assert {key.partition("/")[0] for row in result.history for key in row} <= kept
    assert not (result.folder / CLIENTS).exists()
    assert torch.equal(weights(result.model), weights(seen.model))


@pytest.mark.parametrize("algorithm", [SCAFFOLD(), Ditto()], ids=lambda a: type(a).__name__)
def test_a_strict_round_that_is_stopped_is_repeated_from_the_states_at_its_start(
    algorithm: Algorithm, tmp_path: Path
) -> None:
    strict = dataclasses.replace(EXAMPLES, strict=True)
    config = rig.config_of(algorithm, rig.LOCAL, privacy=strict, rounds=2)

    def train(folder: Path, stop_after: int | None = None, **changes: Any) -> dict[str, Tensor]:
        with (
            contextlib.closing(connect(TopologyConfig(device="cpu"))) as world,
            pytest.MonkeyPatch.context() as patch,
        ):
            session = rig.session_of(
                dataclasses.replace(config, **changes), world, folder, rig.objects_of("", config)
            )
            taken, take = [], synchronous.take

            def watched(*arguments: Any) -> None:
                take(*arguments)
                taken.append(1)
                if len(taken) == stop_after:
                    world.request_stop()

            patch.setattr(synchronous, "take", watched)
            with pytest.raises(Stopped) if stop_after else contextlib.nullcontext():
                synchronous.run_rounds(session)
            session.checkpoints.finish()
            session.tracker.finish()
            states = {f"{k}.{n}": t for k, state in session.states.kept.items() for n, t in state.items()}
            return {"params": session.server.params.clone(), **states}

    expected = train(tmp_path / "a")
    train(tmp_path / "b", stop_after=5)
    resumed = train(tmp_path / "b", resume="auto")
    assert resumed.keys() == expected.keys()
    assert all(torch.equal(resumed[name], tensor) for name, tensor in expected.items())


def test_secret_noise_batches_and_repeated_rounds(tmp_path: Path) -> None:
    secret = dataclasses.replace(EXAMPLES, noise="secret")
    config = dataclasses.replace(CONFIGS["FedProx"], privacy=secret)
    one, two = (run(tmp_path, config, name=name) for name in "xy")
    assert not torch.equal(weights(one.model), weights(two.model))
    # Other batches too: the numbers of examples differ.
    trained = [[row["train/examples"] for row in result.history] for result in (one, two)]
    assert trained[0] != trained[1]
    more = run(tmp_path, config, name="x", rounds=4, resume="auto")
    assert more.history[-1]["privacy/repeated"] == 0
    # A process that was killed may have sent updates of the round after its last line.
    record = one.folder / "run.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"state": "running"}))
    (one.folder / "model.safetensors").unlink()
    again = run(tmp_path, config, name="x", rounds=5, resume="auto")
    assert again.history[-1]["privacy/repeated"] == 1
    assert json.loads((one.folder / LEDGER).read_text()) == {"repeated": 1, "noise_multiplier": 1.0}


def trained_by_a_group(config: Config, folder: str) -> Tensor:
    """Train one client on this rank of a group; return its update."""
    topology = TopologyConfig(ranks_per_client=2, device="cpu")
    with contextlib.closing(connect(topology)) as world:
        session = rig.session_of(config, world, Path(folder) / "x", rig.objects_of("", config))
        session.tracker.finish()
        job = session.job(0, number=0, lr=0.2, weight=1.0, share=1.0)
        result = session.trainer.train(session.server, job, {})
        return result.update.vectors["update"].clone()


def test_the_ranks_of_a_group_share_secret_batches_and_noise(tmp_path: Path) -> None:
    secret = dataclasses.replace(EXAMPLES, noise="secret")
    config = dataclasses.replace(CONFIGS["sparse"], privacy=secret)
    one, two = run_world(trained_by_a_group, config, str(tmp_path), size=2)
    assert torch.equal(one, two)
    assert one.any()


# ---- models and tasks ----


class Branching(nn.Module):
    """A layer that `vmap` cannot take: what it does depends on a value."""

    def forward(self, x: Tensor) -> Tensor:
        return x if float(x.detach().sum()) > -1e9 else -x


def test_what_cannot_be_mapped_is_taken_one_by_one(tmp_path: Path) -> None:
    mapped = run(tmp_path / "1", CONFIGS["FedProx"], rounds=1, **ALL)
    looped = run(tmp_path / "2", CONFIGS["FedProx"], nn.Sequential(Branching(), *ref.net()), rounds=1, **ALL)
    torch.testing.assert_close(weights(looped.model), weights(mapped.model), rtol=1e-5, atol=1e-6)


SCENES = "--data.dataset scenes --data.examples 30 --data.clients 2 --cohort.size 2 --rounds 1"
TASKS = {
    "classes, channels last": f"--model.name lenet {SCENES} --local.channels_last true",
    "labels": f"--task MultiLabel --task.pos_weight 3 {SCENES} --model.name lenet",
    "masks": f"--task Segmentation --task.dice 1 --model.name unet {SCENES}",
    "boxes": f"--task Detection --model.name retinanet-tiny {SCENES}",
}


@pytest.mark.parametrize("name", TASKS)
def test_gradients_of_single_examples_are_those_of_backward_passes(name: str, tmp_path: Path) -> None:
    flags = f"{TASKS[name]} --privacy ExampleDP --privacy.noise_multiplier 1 --privacy.delta 1e-3"
    config = build({}, f"{flags} --privacy.clip 1 --local.batch_size 40 --tracking.trackers []".split())
    with contextlib.closing(connect(TopologyConfig(device="cpu"))) as world:
        session = rig.session_of(config, world, tmp_path / "x", Objects(None, None))
        session.tracker.finish()
        trainer, flat = session.trainer, session.flat
        assert isinstance(trainer, PrivateTrainer)
        assert trainer.side_by_side == (name != "boxes")
        (batch,) = session.train.batches(np.arange(3), 3)
        losses, rows = trainer.example_gradients(batch)
        for i in range(3):
            flat.grad.zero_()
            one = Batch(batch.images[i : i + 1], batch.targets[i : i + 1], 1, 1)
            loss = config.task.loss(config.task.forward(flat.module, one), one.targets)
            ref.backward(loss)
            torch.testing.assert_close(losses[i], loss.detach(), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(
                rows[i], flat.grad, rtol=1e-3, atol=1e-4 * float(flat.grad.abs().max())
            )


def test_dropout_differs_from_example_to_example(tmp_path: Path) -> None:
    with contextlib.closing(connect(TopologyConfig(device="cpu"))) as world:
        config = CONFIGS["FedProx"]
        session = rig.session_of(config, world, tmp_path / "x", Objects(ref.net(dropout=0.5), ref.Pixels()))
        session.tracker.finish()
        assert isinstance(session.trainer, PrivateTrainer)
        session.flat.module.train()
        (batch,) = session.train.batches(np.zeros(8, dtype=np.int64), 8)
        _, rows = session.trainer.example_gradients(batch)
        assert len(torch.unique(rows, dim=0)) > 2


def test_frozen_parameters_have_no_gradient() -> None:
    module = ref.net()
    module[1].requires_grad_(False)
    flat = FlatModel(module)
    rows = flat.rows({"4.weight": torch.arange(24.0).view(2, 3, 4), "4.bias": torch.zeros(2, 3)})
    assert rows[1].tolist() == [*range(12, 24), 0, 0, 0]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            "--local.precision fp16",
            "local.precision=fp16 cannot be combined with privacy=ExampleDP: it",
        ),
        ("--local.engine traced", "local.engine=traced cannot be combined with privacy=ExampleDP: it"),
        ("--local.engine graph", "local.engine=graph cannot be combined with privacy=ExampleDP: it"),
        ("--transport.group bf16 --topology.ranks_per_client 2", "transport.group=bf16 cannot be combined"),
        ("--algorithm MOON", "algorithm=MOON cannot be combined with privacy=ExampleDP: it adds to the loss"),
        (
            "--algorithm QFedAvg",
            "algorithm=QFedAvg cannot be combined with privacy=ExampleDP: it",
        ),
        ("--algorithm FedBuff", "algorithm=FedBuff cannot be combined with privacy=ExampleDP: it"),
        ("--model.norm batch", "model.norm=batch cannot be combined with privacy=ExampleDP: it"),
    ],
)
def test_what_has_no_exact_sum_of_clipped_gradients_is_refused(flags: str, message: str) -> None:
    base = f"--privacy ExampleDP --privacy.noise_multiplier 1 --privacy.delta 1e-3 --privacy.clip 1 {flags}"
    with pytest.raises(ConfigError, match=message) as refused:
        build({}, base.split())
    assert "; " in str(refused.value)
    assert "\n" not in str(refused.value)


class Counting(nn.Module):
    """Keeps a sum of all images in a buffer that no checkpoint has."""

    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen += x.detach().sum()
        return x


def test_a_buffer_that_changes_in_training_is_refused_before_an_update_is_sent(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIGS["FedProx"], algorithm=FedAvg())
    with pytest.raises(ValueError, match=r"privacy: the buffer '0.seen' changes in training"):
        run(tmp_path, config, nn.Sequential(Counting(), *ref.net()))


def test_models_that_mix_examples_and_too_large_clips_are_refused(tmp_path: Path) -> None:
    norm = dataclasses.replace(CONFIGS["FedProx"], local=rig.NORM)
    with pytest.raises(ConfigError, match=r"'2' normalises by statistics of other .*model.norm=group"):
        run(tmp_path, norm, ref.net(norm=True))
    large = dataclasses.replace(EXAMPLES, clip=2.0**20)
    with pytest.raises(ConfigError, match=r"privacy.clip=1.04858e\+06 is more than the .* gradients of"):
        run(tmp_path, dataclasses.replace(CONFIGS["FedProx"], privacy=large))


def test_a_loss_that_is_no_number_does_not_decide_about_an_update(tmp_path: Path) -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.where(x.amax((1, 2, 3), keepdim=True) > 2, x * self.factor, x)

        factor = math.nan

    rule = Mean(on_invalid_update="skip")
    cohort = CohortConfig(size=ref.CLIENTS)
    result = run(
        tmp_path, CONFIGS["FedProx"], nn.Sequential(Odd(), *ref.net()), aggregation=rule, cohort=cohort, **ALL
    )
    assert [row["clients/invalid"] for row in result.history] == [0] * 3
    assert torch.isfinite(weights(result.model)).all()
    # One that is finite, but larger than a sum that is masked can be.
    Odd.factor = 1e18
    more: dict[str, Any] = {"aggregation": rule, "cohort": cohort, "secure_aggregation": SecAgg(), **ALL}
    result = run(tmp_path, CONFIGS["FedProx"], nn.Sequential(Odd(), *ref.net()), name="masked", **more)
    assert [row["clients/invalid"] for row in result.history] == [0] * 3
