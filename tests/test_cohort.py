"""Sampling of cohorts, and their assignment to groups."""

from __future__ import annotations

import numpy as np
import pytest

from fedddp import ConfigError
from fedddp.rng import stream
from fedddp.simulation.cohort import Assigner, CohortConfig


def test_a_cohort_is_sampled_without_replacement_and_depends_on_seed_and_round_only() -> None:
    cohort = CohortConfig(size=10)
    first = cohort.sample(100, seed=0, round_index=3)
    assert len(set(first.tolist())) == 10
    assert (np.diff(first) > 0).all()
    assert (first == cohort.sample(100, 0, 3)).all()
    assert (first != cohort.sample(100, 0, 4)).any()
    assert (first != cohort.sample(100, 1, 3)).any()


def test_every_client_is_sampled_equally_often() -> None:
    counts = np.zeros(20)
    for round_index in range(2000):
        counts[CohortConfig(size=5).sample(20, 0, round_index)] += 1
    assert abs(counts - 500).max() < 5 * np.sqrt(500 * 0.75)


def test_poisson_cohorts_have_the_mean_and_variance_of_independent_draws() -> None:
    cohort = CohortConfig(size=10, sampling="poisson")
    sizes = np.array([len(cohort.sample(100, 0, r)) for r in range(2000)])
    assert sizes.mean() == pytest.approx(10, abs=0.3)
    assert sizes.var() == pytest.approx(100 * 0.1 * 0.9, rel=0.15)


def test_a_client_joins_a_poisson_cohort_with_probability_size_over_population() -> None:
    cohort, counts = CohortConfig(size=2, sampling="poisson"), np.zeros(4)
    for round_index in range(2000):
        counts[cohort.sample(4, 0, round_index)] += 1
    np.testing.assert_allclose(counts / 2000, 2 / 4, atol=5 * np.sqrt(0.25 / 2000))
    everyone = CohortConfig(size=4, sampling="poisson")
    assert all(len(everyone.sample(4, 0, round_index)) == 4 for round_index in range(20))


def test_extra_clients_are_sampled_beyond_the_size() -> None:
    assert len(CohortConfig(size=3, extra=2).sample(9, 0, 0)) == 5


def test_a_cohort_of_a_million_clients_has_its_size_and_no_client_twice() -> None:
    assert len(set(CohortConfig(size=100).sample(1_000_000, 0, 0).tolist())) == 100


def test_clients_with_most_examples_are_assigned_first_to_the_least_loaded_group() -> None:
    clients, examples = np.array([3, 5, 7, 9, 11]), np.zeros(12, dtype=np.int64)
    examples[clients] = [5, 40, 30, 20, 15]
    assignment = Assigner(2).assign(clients, examples)
    assert assignment == [[5, 11], [7, 9, 3]]  # 40 | 30 + 20 | 40 + 15 | 50 + 5
    assert Assigner(1).assign(clients, examples) == [[5, 7, 9, 11, 3]]


def test_a_client_without_examples_costs_as_much_as_one_example() -> None:
    assert Assigner(2).assign(np.arange(6), np.array([3, 0, 0, 0, 0, 0])) == [[0, 5], [1, 2, 3, 4]]


def test_every_client_is_assigned_once_even_without_examples() -> None:
    clients = np.arange(17)
    assignment = Assigner(4).assign(clients, np.zeros(17, dtype=np.int64))
    assert sorted(client for group in assignment for client in group) == clients.tolist()
    assert {len(group) for group in assignment} == {4, 5}


# ---- groups of different pace ----

EQUAL = np.full(40, 9)
"""Examples: each client is ten units of work."""


def seconds_of(assignment: list[list[int]], pace: list[float]) -> np.ndarray:
    """Return how long groups take for clients of `EQUAL` that need 10 units of work each."""
    return np.array([10 * len(clients) * each for clients, each in zip(assignment, pace, strict=True)])


@pytest.mark.parametrize(("pace", "shares"), [([0.1, 0.3], [6, 2]), ([0.2, 0.1, 0.2], [2, 4, 2])])
def test_groups_get_clients_in_proportion_to_their_speed(pace: list[float], shares: list[int]) -> None:
    assigner, cohort, seen = Assigner(len(pace)), np.arange(8), []
    for _ in range(3):
        assignment = assigner.assign(cohort, EQUAL)
        seen.append(list(map(len, assignment)))
        assigner.learn(assignment, EQUAL, seconds_of(assignment, pace))
    equal = sorted(seen[0])
    assert equal[-1] - equal[0] <= 1
    assert seen[1] == seen[0], "the first round, which warms up, was learned from"
    assert seen[2] == shares


def test_a_group_that_changes_its_speed_gets_fewer_clients_after_a_few_rounds() -> None:
    assigner, cohort = Assigner(2), np.arange(20)
    for round_index in range(30):
        assignment = assigner.assign(cohort, EQUAL)
        assigner.learn(assignment, EQUAL, seconds_of(assignment, [0.1, 0.1 if round_index < 15 else 0.4]))
    assert list(map(len, assignment)) == [16, 4]


def test_nothing_is_learned_before_each_group_has_trained_nor_where_bits_depend_on_groups() -> None:
    idle, told_not_to = Assigner(3), Assigner(2, learns=False)
    for _ in range(4):
        assignment = idle.assign(np.arange(2), EQUAL)  # the third group has none
        assert list(map(len, assignment)) == [1, 1, 0]
        idle.learn(assignment, EQUAL, np.array([1.0, 9.0, 0.0]))
        assignment = told_not_to.assign(np.arange(8), EQUAL)
        assert list(map(len, assignment)) == [4, 4]
        told_not_to.learn(assignment, EQUAL, np.array([1.0, 9.0]))


class Own:
    """Functions as a user writes them, for their dotted paths."""

    @staticmethod
    def newest(population: int, size: int, round_index: int, rng: np.random.Generator) -> list[int]:
        """The clients joined one per round, the last first; one of the first three beside them."""
        return [
            *range(population - 1 - round_index, population - 1 - round_index - size, -1),
            rng.integers(3),
        ]

    @staticmethod
    def returning(population: int, size: int, round_index: int, rng: np.random.Generator) -> object:
        return Own.returned

    returned: object = None


OWN = f"{__name__}.Own"


def test_a_sampler_of_your_own_gets_the_round_and_a_stream_of_its_seed() -> None:
    cohort = CohortConfig(size=3, sampling=f"{OWN}.newest")
    samples = [cohort.sample(20, seed, 4).tolist() for seed in range(12)]
    assert all(sample[1:] == [13, 14, 15] for sample in samples), "sorted; population − 1 − round downwards"
    assert {sample[0] for sample in samples} == {0, 1, 2}
    assert samples == [cohort.sample(20, seed, 4).tolist() for seed in range(12)]
    expected = stream("cohort", 5, 4).integers(3)
    assert samples[5][0] == expected


@pytest.mark.parametrize("returned", [[], [0], np.arange(9)[::-1]])
def test_a_sampler_of_your_own_returns_as_many_clients_as_it_likes(returned: object) -> None:
    Own.returned = returned
    assert CohortConfig(sampling=f"{OWN}.returning").sample(9, 0, 0).tolist() == sorted(returned)  # type: ignore[call-overload]


@pytest.mark.parametrize("returned", [[1, 1], [-1], [9], [0.5], [[0, 1]], 3, None, ["a"]])
def test_what_are_no_clients_is_refused(returned: object) -> None:
    Own.returned = returned
    with pytest.raises(
        ValueError, match=r"cohort.sampling=.* different whole numbers from 0 to 8, got .*in round 7"
    ):
        CohortConfig(sampling=f"{OWN}.returning").sample(9, 0, 7)


@pytest.mark.parametrize(
    ("sampling", "extra", "refusal"),
    [
        ("poison", 0, r"^cohort\.sampling must be fixed or poisson, got poison; .*Did you mean 'poisson'\?$"),
        (
            f"{OWN}.missing",
            0,
            r"^cohort\.sampling=.*missing.*; give the dotted path of a function f\(population",
        ),
        (f"{__name__}.assert_takes_three", 0, r"^cohort\.sampling=.* argument.*; give the dotted path of"),
        (f"{OWN}.newest", 1, r"^cohort\.extra=1 cannot be combined with sampling="),
    ],
)
def test_a_sampler_that_cannot_work_is_refused_before_the_run(
    sampling: str, extra: int, refusal: str
) -> None:
    with pytest.raises(ConfigError, match=refusal):
        CohortConfig(sampling=sampling, extra=extra)


def assert_takes_three(population: int, size: int, round_index: int) -> list[int]:
    raise AssertionError
