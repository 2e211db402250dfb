"""Clocks: which clients arrive when; and the weights of stale updates."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest

from fedddp.algorithms import Constant, Hinge, Inverse, Polynomial
from fedddp.algorithms.local import LocalConfig
from fedddp.simulation.clock import LogNormalSpeed, SameSpeed, SpeedTable, Virtual, Wall, examples_trained

COHORT = np.arange(4)
WORK = np.array([100, 100, 100, 100])
SLOW_FIRST = SpeedTable(factors=[10.0, 1.0, 2.0, 3.0], overhead_s=0.1, example_s=0.01)  # 11, 1.1, 2.2, 3.3 s


def test_a_round_ends_with_the_last_arrival_that_it_waits_for() -> None:
    cohort, seconds = Virtual(speed=SLOW_FIRST).arrivals(COHORT, WORK, 4, 0, 0)
    assert cohort.tolist() == [0, 1, 2, 3]
    assert seconds == pytest.approx(11)


def test_a_round_with_extra_clients_keeps_the_first_arrivals() -> None:
    cohort, seconds = Virtual(speed=SLOW_FIRST).arrivals(COHORT, WORK, 3, 0, 0)
    assert cohort.tolist() == [1, 2, 3]
    assert seconds == pytest.approx(3.3)


def test_a_deadline_ends_the_round_without_late_clients() -> None:
    cohort, seconds = Virtual(speed=SLOW_FIRST, deadline_s=3).arrivals(COHORT, WORK, 4, 0, 0)
    assert cohort.tolist() == [1, 2]
    assert seconds == 3
    cohort, seconds = Virtual(speed=SLOW_FIRST, deadline_s=3).arrivals(COHORT, WORK, 2, 0, 0)
    assert cohort.tolist() == [1, 2]
    assert seconds == pytest.approx(2.2)


def test_a_client_that_takes_exactly_the_deadline_arrives() -> None:
    clock = Virtual(speed=SpeedTable(factors=[1, 2, 3], overhead_s=1.0, example_s=0.0), deadline_s=2.0)
    assert [clock.local_training(client, 9, 0, 0) for client in range(3)] == [
        (1, True),
        (2, True),
        (2, False),
    ]
    cohort, seconds = clock.arrivals(np.arange(3), np.ones(3, dtype=np.int64), 2, 0, 0)
    assert (cohort.tolist(), seconds) == ([0, 1], 2)
    clock.check(np.ones(3, dtype=np.int64), 2, 0)
    with pytest.raises(ValueError, match="met by 2 of 3 clients with examples, but 3 must arrive"):
        clock.check(np.ones(3, dtype=np.int64), 3, 0)


def test_clients_drop_out_with_their_probability_and_the_round_waits_until_they_were_due() -> None:
    clock = Virtual(speed=SameSpeed(dropout=0.3, overhead_s=1, example_s=0))
    population = np.arange(20_000)
    cohort, seconds = clock.arrivals(population, population, len(population), 0, 5)
    assert len(cohort) / len(population) == pytest.approx(0.7, abs=0.02)
    assert seconds == 1
    again, _ = clock.arrivals(population, population, len(population), 0, 5)
    assert (again == cohort).all()
    other, _ = clock.arrivals(population[:1000], population[:1000], 1000, 0, 6)
    assert other.tolist() != cohort[cohort < 1000].tolist()


def test_slowness_is_log_normal_with_median_one_and_a_function_of_client_and_seed() -> None:
    speed = LogNormalSpeed(sigma=0.5)
    logs = np.log([speed.slowness(client, 0) for client in range(4000)])
    assert logs.mean() == pytest.approx(0, abs=0.03)
    assert logs.std() == pytest.approx(0.5, rel=0.05)
    assert speed.slowness(3, 0) == speed.slowness(3, 0) != speed.slowness(3, 1)


def test_on_the_wall_clock_all_clients_arrive() -> None:
    cohort, seconds = Wall().arrivals(COHORT, WORK, 4, 0, 0)
    assert cohort.tolist() == [0, 1, 2, 3]
    assert seconds is None


def test_examples_trained_counts_epochs_or_steps() -> None:
    sizes = np.array([0, 5, 100])
    assert examples_trained(LocalConfig(epochs=3), sizes).tolist() == [0, 15, 300]
    assert examples_trained(LocalConfig(steps=4, batch_size=10), sizes).tolist() == [0, 20, 40]


@pytest.mark.parametrize("steps", [1, 3, 4, 25])
def test_examples_trained_by_steps_are_those_of_the_batches(steps: int) -> None:
    """A pass ends with a smaller batch; the next one begins the data again."""
    sizes = np.array([0, 1, 5, 9, 10, 11, 20, 95, 100])
    expected = []
    for size in sizes.tolist():
        batches = [10] * (size // 10) + [size % 10] * (size % 10 > 0)
        expected.append(sum(batch for _, batch in zip(range(steps), itertools.cycle(batches))))
    assert examples_trained(LocalConfig(steps=steps, batch_size=10), sizes).tolist() == expected


def test_weights_by_staleness_equal_the_papers() -> None:
    assert [Constant().weight(tau) for tau in (0, 9)] == [1, 1]
    assert [Polynomial().weight(tau) for tau in (0, 3, 8)] == [1, 1 / 2, 1 / 3]
    assert [Hinge().weight(tau) for tau in (0, 4, 5, 6)] == [1, 1, 1 / 11, 1 / 21]
    assert [Inverse().weight(tau) for tau in (0, 1, 2, 4)] == [1, 1, 1 / 2, 1 / 4]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: SameSpeed(dropout=1), r"dropout must be in \[0, 1\), got 1"),
        (lambda: SameSpeed(overhead_s=0), "clock.speed.overhead_s must be > 0, got 0"),
        (lambda: SpeedTable(factors=[1, 0]), r"factors\[1\] must be > 0, got 0"),
        (lambda: SpeedTable(factors=[]), "factors must be one or more numbers > 0"),
        (lambda: LogNormalSpeed(sigma=-1), "sigma must be >= 0"),
        (lambda: Virtual(deadline_s=0), "deadline_s must be > 0"),
        (lambda: Virtual(in_flight=0), "in_flight must be >= 1"),
        (lambda: Hinge(b=-1), "algorithm.staleness.b must be >= 0, got -1"),
        (lambda: Hinge(a=-1), "algorithm.staleness.a must be >= 0, got -1"),
    ],
)
def test_impossible_clocks_are_refused(make: Callable[[], object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()
