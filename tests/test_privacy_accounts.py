"""What rounds cost: ε and noise multipliers against published and closed-form values; noise and clipping."""

from __future__ import annotations

import importlib.util
import math
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
import torch
from launching import try_without

from fedddp import CohortConfig, ConfigError
from fedddp.privacy import (
    Account,
    CentralDP,
    LocalDP,
    Release,
    delta_of,
    epsilon,
    epsilon_of,
    mu_of,
    renyi_epsilon,
    without_replacement_epsilon,
)
from fedddp.privacy import accountant as accountant_module
from fedddp.privacy.accountant import require_library, step_of
from fedddp.privacy.clipping import adapted, factor_of, joint_norm, sensitivity
from fedddp.privacy.local import Participations, composed_epsilon, local_terms
from fedddp.privacy.noise import UNIT, grid_noise, secret_dither, secret_normal
from fedddp.testing import run_world


def phi(x: float) -> float:
    """Return Φ(x), exact in its tails too."""
    return 0.5 * math.erfc(-x / math.sqrt(2))


def account(sampling: Any = "poisson", population: int = 100, cohort: int = 10, **other: Any) -> Account:
    given = {"delta": 1e-5, "rounds": 100} | other
    return Account(sampling=sampling, population=population, cohort=cohort, **given)


# ---- ε of rounds ----


@pytest.mark.parametrize(
    ("rate", "noise", "rounds", "delta", "expected"),
    [
        (0.01, 1.0, 1000, 1e-5, 1.828244),
        (0.01, 4.0, 10_000, 1e-5, 0.946999),
        (256 / 60000, 1.1, 14063, 1e-5, 2.381779),
        (0.1, 1.0, 100, 1e-5, 7.046603),
        (1.0, 5.0, 30, 1e-5, 4.866083),
        (1.0, 1.0, 1, 1e-5, 4.377178),
        (5000 / 763430, 1.0, 5000, 1e-9, 3.898826),
    ],
)
def test_epsilon_of_poisson_cohorts(
    rate: float, noise: float, rounds: int, delta: float, expected: float
) -> None:
    found = epsilon([Release(rate, noise, rounds)], delta)
    assert expected - 2e-6 < found < expected + 1e-4


def test_epsilon_of_rounds_that_differ() -> None:
    found = epsilon([Release(0.1, 1.0, 50), Release(0.05, 2.0, 50)], 1e-5)
    assert found == pytest.approx(5.213956, abs=1e-4)


def test_epsilon_for_one_client_in_the_place_of_another() -> None:
    found = epsilon([Release(0.01, 1.0, 1000)], 1e-5, "replace")
    assert found == pytest.approx(2.843446, abs=1e-4)


@pytest.mark.parametrize(
    ("rate", "noise", "rounds", "delta", "expected"),
    [
        (0.01, 1.0, 1000, 1e-5, 2.101367),
        (256 / 60000, 1.1, 14063, 1e-5, 2.596656),
        (1.0, 5.0, 30, 1e-5, 5.252401),
        (1.0, 1.0, 1, 1e-5, 4.728507),
    ],
)
def test_epsilon_by_renyi_divergences(
    rate: float, noise: float, rounds: int, delta: float, expected: float
) -> None:
    assert renyi_epsilon([Release(rate, noise, rounds)], delta) == pytest.approx(expected, abs=1e-4)


def test_epsilon_without_replacement_counts_a_sensitivity_of_twice_the_clip() -> None:
    assert without_replacement_epsilon(1000, 10, 1.0, 1000, 1e-5) == pytest.approx(20.987, abs=1e-3)
    fixed = account("without_replacement", 1000, 10, rounds=1000)
    assert fixed.epsilon(1.0, 1000) == pytest.approx(20.987, abs=1e-3)


@pytest.mark.parametrize(("noise", "rounds", "delta"), [(5.0, 30, 1e-5), (1.0, 1, 1e-5), (0.7, 12, 1e-3)])
def test_epsilon_without_amplification_is_the_closed_form(noise: float, rounds: int, delta: float) -> None:
    """Both ways round: δ of the ε by plain arithmetic, and the ε of the library's general accountant."""
    found = account("none", delta=delta).epsilon(noise, rounds)
    mu = math.sqrt(rounds) / noise
    back = phi(-found / mu + mu / 2) - math.exp(found) * phi(-found / mu - mu / 2)
    assert back == pytest.approx(delta, rel=1e-6)
    assert epsilon([Release(1.0, noise, rounds)], delta) == pytest.approx(found, abs=1e-4)
    everybody = account("poisson", 10, 10, delta=delta)
    assert everybody.epsilon(noise, rounds) == found


def test_epsilon_grows_with_rounds_and_is_zero_before_the_first() -> None:
    sampled = account(rounds=30)
    values = [sampled.epsilon(1.5, rounds) for rounds in (0, 1, 10, 30)]
    assert values[0] == 0
    assert values == sorted(values)


def test_noise_multiplier_for_an_epsilon() -> None:
    sampled = account(delta=1e-4, rounds=200)
    noise = sampled.noise_multiplier(8.0, 200)
    assert noise == pytest.approx(1.04002, abs=1e-5)
    assert 8 - 1e-4 < sampled.epsilon(noise, 200) <= 8


@pytest.mark.parametrize("sampling", ["none", "without_replacement"])
def test_noise_multiplier_inverts_epsilon(sampling: str) -> None:
    fixed = account(sampling, rounds=20)
    noise = fixed.noise_multiplier(fixed.epsilon(3.0, 20), 20)
    assert noise == pytest.approx(3.0, rel=1e-5)


def test_most_rounds_of_a_budget() -> None:
    plain = account("none")
    budget = plain.epsilon(2.0, 7)
    assert plain.most_rounds(2.0, budget, 100) == 7
    assert plain.most_rounds(2.0, budget * 0.999, 100) == 6
    assert plain.most_rounds(2.0, budget, 5) == 5
    assert plain.most_rounds(2.0, plain.epsilon(2.0, 1) * 0.9, 5) == 0


def test_an_unreachable_epsilon_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accountant_module, "renyi_epsilon", lambda *arguments: 1.0)
    with pytest.raises(ConfigError, match="no noise reaches ε = 0.5"):
        account().noise_multiplier(0.5, 10)


def test_losses_are_kept_at_finer_steps_for_more_rounds() -> None:
    steps = [step_of(rounds) for rounds in (0, 1, 100, 1000, 10_000)]
    assert steps == sorted(steps, reverse=True)
    assert (steps[0], steps[-1]) == (1e-3, 1e-4)


def test_the_library_is_imported_by_the_first_query_only() -> None:
    """That needs it: those without amplification have a closed form."""
    assert run_world(try_without, "dp_accounting", "scipy", size=1) == [[]]


def test_a_missing_library_is_one_line_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'pip install "fedddp\[privacy\]"') as refused:
        require_library()
    assert "\n" not in str(refused.value)


# ---- the Gaussian mechanism ----


@pytest.mark.parametrize(
    ("target", "delta", "sigma"),
    [(1.0, 1e-5, 3.730632), (8.0, 1e-3, 0.48001), (0.1, 1e-6, None), (50.0, 1e-9, None)],
)
def test_the_analytic_gaussian_mechanism(target: float, delta: float, sigma: float | None) -> None:
    mu = mu_of(target, delta)
    assert sigma is None or 1 / mu == pytest.approx(sigma, abs=1e-5)
    assert delta_of(target, mu) <= delta < delta_of(target, mu * (1 + 1e-6))
    assert epsilon_of(mu, delta) == pytest.approx(target, rel=1e-6)


def test_no_noise_is_needed_where_delta_allows_it() -> None:
    assert epsilon_of(0.0, 1e-5) == 0
    assert epsilon_of(1e-7, 1e-5) == 0


def test_local_privacy_composes_over_the_trainings_of_a_client() -> None:
    privacy = LocalDP(epsilon=1.0, delta=1e-5, clip=1.0)
    assert composed_epsilon(privacy, 0) == 0
    assert composed_epsilon(privacy, 1) == pytest.approx(1.0, rel=1e-6)
    mu = 2 / 3.730632
    assert composed_epsilon(privacy, 4) == pytest.approx(epsilon_of(mu, 1e-5), rel=1e-5)
    cohorts = [[0, 1], [1], [1, 2], [0]]
    counted = Participations(3, lambda index: np.array(cohorts[index]))
    assert [counted.most(rounds) for rounds in (0, 1, 2, 3, 4)] == [0, 1, 2, 3, 3]


def test_local_privacy_ends_before_a_client_exceeds_the_budget() -> None:
    privacy = LocalDP(epsilon=1.0, delta=1e-5, clip=1.0, stop_at_epsilon=2.0)
    trainings = max(k for k in range(1, 20) if composed_epsilon(privacy, k) <= 2)
    assert trainings > 1
    terms = [
        local_terms(privacy, Participations(2, lambda index: np.array([index % 2])), 50, repeated)
        for repeated in (0, 1)
    ]
    assert [t.last_round for t in terms] == [2 * trainings, 2 * trainings - 2]
    with pytest.raises(ValueError, match="less than privacy.epsilon=1 of one local training"):
        local_terms(
            LocalDP(epsilon=1.0, delta=1e-5, clip=1.0, stop_at_epsilon=0.5),
            Participations(2, lambda index: np.array([0])),
            3,
            0,
        )


# ---- clipping ----


def test_the_norm_is_over_all_vectors() -> None:
    vectors = {"update": torch.tensor([3.0, 0.0]), "control": torch.tensor([0.0, -4.0]), "a": torch.empty(0)}
    assert joint_norm(vectors) == 5
    assert joint_norm({"a": torch.zeros(2)}) == 0
    assert joint_norm({}) == 0
    assert math.isnan(joint_norm({"a": torch.tensor([1.0]), "b": torch.tensor([math.inf])}))
    assert joint_norm({"a": torch.full((4,), 1e30)}) == pytest.approx(2e30)


def test_the_factor_of_a_clipped_vector() -> None:
    assert [factor_of(length, 2.0) for length in (0.0, 1.0, 2.0, 8.0)] == [1, 1, 1, 0.25]
    assert sensitivity(1.0, 4) == 1 + 2.0**-40
    assert sensitivity(1.0, 12_000_000) - 1 == pytest.approx(1.6e-9, rel=0.05)


def test_the_clip_falls_where_too_many_clients_are_unclipped() -> None:
    given: dict[str, float] = {"quantile": 0.5, "lr": 0.2, "largest": 100.0}
    assert adapted(1.0, 0.5, **given) == 1
    assert adapted(1.0, 1.0, **given) == pytest.approx(math.exp(-0.1))
    assert adapted(1.0, 0.0, **given) == pytest.approx(math.exp(0.1))
    assert adapted(99.0, -1e9, **given) == 100
    assert adapted(1e-300, 1e9, **given) == UNIT


def test_adaptive_clipping_finds_the_quantile_of_the_norms() -> None:
    norms = np.random.default_rng(0).lognormal(1.0, 1.0, 1000)
    clip = 0.1
    for _ in range(300):
        clip = adapted(clip, float((norms <= clip).mean()), quantile=0.7, lr=0.2, largest=1e6)
    assert clip == pytest.approx(float(np.quantile(norms, 0.7)), rel=0.05)


def test_the_count_takes_its_part_of_the_noise() -> None:
    privacy = CentralDP(noise_multiplier=1.0, delta=1e-5, adaptive=True)
    assert privacy.noise_of_count(100) == 5
    noise = privacy.noise_of_update(1.0, 100)
    assert noise == pytest.approx(1.005038, abs=1e-6)
    # Both releases together are one of noise multiplier 1: their μ add up in squares.
    assert noise**-2 + (0.5 / 5) ** 2 == pytest.approx(1.0)
    with pytest.raises(ValueError, match=r"privacy.count_noise=0.5 is too little"):
        privacy.noise_of_update(1.0, 10)
    plain = CentralDP(noise_multiplier=1.0, delta=1e-5, clip=1.0)
    assert plain.noise_of_update(1.3, 10) == 1.3


# ---- noise ----


def chi_square(normal: Any) -> float:
    """Return χ² of draws against N(0, 1), over 20 intervals of equal probability."""
    edges = [NormalDist().inv_cdf(share / 20) for share in range(1, 20)]
    counts = np.bincount(np.searchsorted(edges, normal), minlength=20)
    expected = len(normal) / 20
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("source", ["seeded", "secret"])
def test_noise_is_gaussian_of_the_asked_deviation(source: Any) -> None:
    """χ² with 19 degrees of freedom exceeds 60 once in 4 million; half or twice the noise is far above."""
    noise = grid_noise(20_001, 3.0, source, ("test", 1)).double().numpy() * UNIT
    assert len(noise) == 20_001
    assert chi_square(noise / 3) < 60
    assert chi_square(noise / 6) > 500
    assert chi_square(noise / 1.5) > 500
    assert abs(np.corrcoef(noise[1:], noise[:-1])[0, 1]) < 0.04
    assert (
        abs(np.corrcoef(noise[:10_000], noise[10_001:])[0, 1]) < 0.06
    )  # the halves of Box and Muller's pairs


def test_noise_is_a_function_of_its_name_or_of_nothing() -> None:
    one, same, other = (grid_noise(50, 1.0, "seeded", ("x", number)) for number in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert not np.array_equal(secret_normal(5), secret_normal(5))
    assert len(secret_normal(0)) == 0
    assert np.abs(secret_normal(100_000)).max() < 8.6


def test_noise_that_does_not_fit_the_grid_is_refused() -> None:
    assert int(grid_noise(1000, 2.0**18, "seeded", ("x",)).abs().max()) < 2**61
    for sigma in (2.0**18 * 1.01, math.inf, math.nan):
        with pytest.raises(ValueError, match="does not fit into exact sums"):
            grid_noise(1, sigma, "seeded", ("x",))


@pytest.mark.parametrize("sigma", [2.0**-30, 1.0, 2.0**18])
def test_the_last_bits_of_secret_noise_are_uniform(sigma: float) -> None:
    """As floats of 53 bits, 97 of 100 draws with σ = 2^18 would be multiples of 4."""
    noise = grid_noise(20_000, sigma, "secret", ()).numpy()
    counts = np.bincount(noise & 3, minlength=4)
    assert float(((counts - 5000) ** 2 / 5000).sum()) < 30, "χ², 3 degrees of freedom"
    assert float(noise.std() * UNIT) == pytest.approx(sigma, rel=0.05)
    assert abs(float(noise.mean() * UNIT)) < 0.05 * sigma
    dither = secret_dither(20_000, sigma)
    assert -(2.0**-21) * sigma <= dither.min() * UNIT <= dither.max() * UNIT < 2.0**-21 * sigma or sigma < 1


def test_the_account_follows_from_the_sampling_of_cohorts() -> None:
    privacy = CentralDP(noise_multiplier=1.0, delta=1e-5, clip=1.0)
    assert privacy.account(CohortConfig(size=4, sampling="poisson"), 20, 3).sampling == "poisson"
    assert privacy.account(CohortConfig(size=4), 20, 3).sampling == "none"
    careful = CentralDP(noise_multiplier=1.0, delta=1e-5, clip=1.0, amplification="none")
    assert careful.account(CohortConfig(size=4, sampling="poisson"), 20, 3).sampling == "none"
    fixed = CentralDP(noise_multiplier=1.0, delta=1e-5, clip=1.0, amplification="without_replacement")
    assert "4 of 20 clients; replace" in fixed.account(CohortConfig(size=4), 20, 3).words
