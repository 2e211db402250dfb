"""Partitions: every example has one owner, equal arguments give equal splits, shapes are the papers'."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from fedddp.data.partition import (
    IID,
    ClientDirichlet,
    Dirichlet,
    LabelQuantity,
    LogNormal,
    Natural,
    Partition,
    PowerLaw,
    QuantityDirichlet,
    Shards,
    Split,
    holdout,
    holdout_sizes,
)
from fedddp.data.transforms import FeatureShift

Indices = NDArray[np.int64]

LABELS = np.random.default_rng(0).integers(0, 10, 2003)
IDS = np.random.default_rng(1).permutation(np.arange(2003) % 20)
ALL = [
    IID(),
    Dirichlet(),
    Dirichlet(alpha=0.01, min_examples=7),
    Dirichlet(alpha=0.01, min_examples=0),
    ClientDirichlet(),
    ClientDirichlet(alpha=0.01),
    QuantityDirichlet(),
    QuantityDirichlet(alpha=0.001),
    Shards(),
    Shards(per_client=3),
    LogNormal(),
    LogNormal(sigma=3.0),
    PowerLaw(),
    LabelQuantity(),
    LabelQuantity(classes=3),
    LabelQuantity(classes=10),
    Natural(),
]


def histograms(split: Split, labels: Indices, classes: int = 10) -> Indices:
    rows = [np.bincount(labels[split.indices(c)], minlength=classes) for c in range(len(split))]
    return np.array(rows)


@pytest.mark.parametrize("partition", ALL, ids=repr)
def test_every_example_has_one_owner_and_equal_arguments_give_equal_splits(
    partition: Partition,
) -> None:
    split = partition.split(LABELS, 20, seed=3, ids=IDS)
    again = partition.split(LABELS.copy(), 20, seed=3, ids=IDS)
    assert len(split) == 20
    assert split.sizes.sum() == len(LABELS)
    np.testing.assert_array_equal(np.sort(split.permutation), np.arange(len(LABELS)))
    np.testing.assert_array_equal(split.permutation, again.permutation)
    np.testing.assert_array_equal(split.offsets, again.offsets)
    joined = np.concatenate([split.indices(client) for client in range(20)])
    np.testing.assert_array_equal(joined, split.permutation)


@pytest.mark.parametrize("partition", ALL[:-1], ids=repr)
def test_another_seed_gives_another_split(partition: Partition) -> None:
    one, two = (partition.split(LABELS, 20, seed=seed) for seed in (0, 1))
    assert not np.array_equal(one.permutation, two.permutation)


def test_iid_sizes_differ_by_at_most_one() -> None:
    assert set(IID().split(LABELS, 20, 0).sizes) == {100, 101}


@pytest.mark.parametrize("alpha", [0.3, 5.0])
def test_dirichlet_shares_have_the_variance_of_the_dirichlet_distribution(alpha: float) -> None:
    clients, classes, per_class = 10, 500, 400
    labels = np.repeat(np.arange(classes), per_class)
    split = Dirichlet(alpha=alpha, min_examples=0).split(labels, clients, 0)
    shares = histograms(split, labels, classes) / per_class
    expected = (clients - 1) / clients**2 / (clients * alpha + 1)
    assert shares.var() == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("alpha", [0.1, 0.3, 1.0])
def test_client_dirichlet_draws_each_clients_class_proportions_and_makes_equal_sizes(alpha: float) -> None:
    """A count of n draws with Dirichlet(αp) proportions has the variance n p (1 − p) (n + α)/(1 + α)."""
    clients, size, prior = 200, 50, np.array([0.4, 0.3, 0.2, 0.1])
    labels = np.repeat(np.arange(4), (clients * size * prior).round().astype(int))
    shares = []
    for seed in range(3):
        split = ClientDirichlet(alpha=alpha).split(labels, clients, seed)
        np.testing.assert_array_equal(split.sizes, size)
        shares.append(histograms(split, labels, 4) / size)
    variance = np.square(np.array(shares) - prior).mean((0, 1))
    expected = prior * (1 - prior) * (size + alpha) / (1 + alpha) / size
    np.testing.assert_allclose(variance, expected, rtol=0.12)  # the last clients take what is left


def test_client_dirichlet_of_a_large_alpha_is_the_datasets_mix_and_of_a_small_one_a_class_per_client() -> (
    None
):
    labels = np.repeat(np.arange(2), [3000, 1000])
    even = histograms(ClientDirichlet(alpha=1e6).split(labels, 10, 0), labels, 2) / 400
    assert np.sort(np.abs(even[:, 0] - 0.75))[-2] < 0.06  # the last client takes what is left
    pure = histograms(ClientDirichlet(alpha=1e-3).split(labels, 40, 0), labels, 2)
    assert (pure.max(1) == 100).sum() >= 38  # where a class runs out, a client takes another
    sizes = ClientDirichlet().split(labels, 7, 0).sizes
    assert sorted(sizes) == [571] * 4 + [572] * 3


@pytest.mark.parametrize("alpha", [0.3, 2.0])
def test_quantity_dirichlet_draws_the_sizes_of_random_samples(alpha: float) -> None:
    clients, labels = 20, np.repeat(np.arange(2), [60_000, 20_000])
    splits = [QuantityDirichlet(alpha=alpha).split(labels, clients, seed) for seed in range(100)]
    shares = np.array([split.sizes for split in splits]) / len(labels)
    expected = (clients - 1) / clients**2 / (clients * alpha + 1)
    assert shares.var() == pytest.approx(expected, rel=0.1)
    assert shares.min() > 0
    held = histograms(splits[0], labels, 2)
    large = held[held.sum(1) > 1000]
    np.testing.assert_allclose(large[:, 0] / large.sum(1), 0.75, atol=0.06)


def test_dirichlet_moves_examples_from_the_largest_clients_to_those_below_the_minimum() -> None:
    before = Dirichlet(alpha=0.05, min_examples=0).split(LABELS, 50, 0).sizes
    after = Dirichlet(alpha=0.05, min_examples=12).split(LABELS, 50, 0).sizes
    assert before.min() == 0
    assert after.min() == 12
    np.testing.assert_array_equal(after[before < 12], 12)
    gave = before > after
    assert before[gave].min() >= before[~gave].max()


def test_the_minimum_of_dirichlet_may_take_all_examples() -> None:
    split = Dirichlet(alpha=0.1, min_examples=5).split(LABELS[:1000], 200, 0)
    np.testing.assert_array_equal(split.sizes, 5)


def test_shards_of_mnists_size_are_those_of_mcmahan_et_al() -> None:
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 600))
    split = Shards(per_client=2).split(labels, 100, 0)
    held = histograms(split, labels)
    np.testing.assert_array_equal(split.sizes, 60)
    assert set(held[held > 0]) == {30, 60}
    assert len(np.unique(held, axis=0)) > 20


def test_sizes_are_log_normal() -> None:
    sizes = LogNormal(sigma=0.7).split(np.zeros(2_000_000, int), 2000, 0).sizes
    assert np.log(sizes).std() == pytest.approx(0.7, rel=0.05)
    assert LogNormal(sigma=5.0).split(LABELS, 500, 0).sizes.min() == 1
    assert np.ptp(LogNormal(sigma=0.0).split(LABELS, 20, 0).sizes) <= 1


def test_sizes_follow_the_power_law_in_random_order() -> None:
    sizes = np.sort(PowerLaw(exponent=1.5).split(np.zeros(1_000_000, int), 50, 0).sizes)[::-1]
    np.testing.assert_allclose(sizes / sizes[0], np.arange(1, 51) ** -1.5, rtol=0.01)
    in_order = PowerLaw().split(LABELS, 50, 0).sizes
    assert not np.array_equal(in_order, np.sort(in_order)[::-1])


def test_shares_are_rounded_to_the_nearest_example_from_the_first_client_on() -> None:
    """Each of the clients has one example; thirds of four more end at 1.33, 2.67 and 4, so at 1, 3 and 4."""
    assert PowerLaw(exponent=0).split(np.zeros(7, int), 3, 0).sizes.tolist() == [2, 3, 2]
    # Fifths of seven more end at 1.4, 2.8, 4.2, 5.6 and 7.
    assert PowerLaw(exponent=0).split(np.zeros(12, int), 5, 0).sizes.tolist() == [2, 3, 2, 3, 2]


@pytest.mark.parametrize("classes", [1, 2, 3, 10])
def test_label_quantity_gives_each_client_its_classes_and_shares_each_equally(classes: int) -> None:
    held = histograms(LabelQuantity(classes=classes).split(LABELS, 20, 0), LABELS)
    np.testing.assert_array_equal((held > 0).sum(1), classes)
    for column in held.T:
        assert np.ptp(column[column > 0]) <= 1


def test_natural_clients_are_the_owners_ordered_by_id() -> None:
    writers = np.array(["b", "a", "c", "a"])
    split = Natural().split(np.zeros(4, int), 3, 0, writers)
    assert [split.indices(client).tolist() for client in range(3)] == [[1, 3], [0], [2]]


@pytest.mark.parametrize(
    "partition", [IID(), LogNormal(), QuantityDirichlet(), Dirichlet(), Shards()], ids=repr
)
def test_a_million_clients_take_two_arrays_and_no_work_per_client_in_python(partition: Partition) -> None:
    clients, calls = 1_000_000, 0
    labels = np.random.default_rng(0).integers(0, 10, 2 * clients)

    def count(frame: object, event: str, argument: object) -> None:
        nonlocal calls
        calls += 1

    sys.setprofile(count)
    try:
        split = partition.split(labels, clients, 0)
    finally:
        sys.setprofile(None)
    assert calls < 10_000
    assert len(split) == clients
    assert split.sizes.min() >= 1
    assert split.permutation.nbytes + split.offsets.nbytes <= 8 * (3 * clients + 1)


def test_holdout_is_a_split_of_the_clients_examples() -> None:
    own = np.arange(100, 200)
    train, held = holdout(own, 0.25, client=4, seed=0)
    assert len(held) == 25
    np.testing.assert_array_equal(np.sort(np.concatenate([train, held])), own)
    np.testing.assert_array_equal(holdout(own, 0.25, client=4, seed=0)[1], held)
    assert not np.array_equal(holdout(own, 0.25, client=5, seed=0)[1], held)
    assert not np.array_equal(holdout(own, 0.25, client=4, seed=1)[1], held)


def test_holdout_leaves_an_example_to_train_on() -> None:
    sizes = np.arange(6)
    np.testing.assert_array_equal(holdout_sizes(sizes, 0.9), [0, 0, 1, 2, 3, 4])
    np.testing.assert_array_equal(holdout_sizes(sizes, 0.5), [0, 0, 1, 2, 2, 3])
    np.testing.assert_array_equal(holdout_sizes(sizes, 0.0), 0)
    for size in sizes:
        assert len(holdout(np.arange(size), 0.9, 0, 0)[1]) == holdout_sizes(sizes, 0.9)[size]


def test_feature_shifts_are_uniform_and_a_function_of_client_and_seed() -> None:
    feature_shift = FeatureShift(rotation=30, color=0.2, noise=0.1)
    shifts = [feature_shift.of_client(client, seed=0) for client in range(200)]
    assert shifts == [feature_shift.of_client(client, seed=0) for client in range(200)]
    assert shifts != [feature_shift.of_client(client, seed=1) for client in range(200)]
    angles = np.array([shift.angle for shift in shifts])
    gains = np.array([shift.gains for shift in shifts])
    noise = np.array([shift.noise for shift in shifts])
    for values, low, high in ((angles, -30, 30), (gains, 0.8, 1.2), (noise, 0, 0.1)):
        assert low <= values.min() <= values.max() <= high
        assert np.ptp(values) > 0.9 * (high - low)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Dirichlet(alpha=-1), "alpha must be in .0, 1000000., got -1; 0.1 is strong skew"),
        (lambda: Dirichlet(alpha=float("nan")), "alpha must be in .0, 1000000., got nan"),
        (lambda: ClientDirichlet(alpha=0), "alpha must be in .0, 1000000., got 0; 0.1 is strong skew"),
        (lambda: QuantityDirichlet(alpha=1e308), "alpha must be in .0, 1000000., got 1e.308"),
        (lambda: Dirichlet(min_examples=-1), "min_examples must be >= 0, got -1"),
        (lambda: Shards(per_client=0), "per_client must be >= 1, got 0"),
        (lambda: LogNormal(sigma=-1), "sigma must be in .0, 20., got -1"),
        (lambda: PowerLaw(exponent=-1), "exponent must be in .0, 20., got -1"),
        (lambda: LabelQuantity(classes=0), "classes must be >= 1, got 0"),
        (lambda: FeatureShift(rotation=181), r"rotation must be in \[0, 180\], got 181"),
        (lambda: FeatureShift(noise=-1), r"noise must be in \[0, 1\], got -1"),
        (
            lambda: IID().split(LABELS, 3000, 0),
            "data.clients=3000 is larger than the 2003 training",
        ),
        (lambda: IID().split(LABELS[:0], 1, 0), "data.dataset has no training examples"),
        (
            lambda: Dirichlet(min_examples=500).split(LABELS, 20, 0),
            "min_examples=500 needs 10000 training examples for 20 clients, but there are 2003",
        ),
        (
            lambda: Shards(per_client=200).split(LABELS, 20, 0),
            "per_client=200 needs 4000 shards for 20 clients, but there are 2003",
        ),
        (lambda: LabelQuantity(classes=11).split(LABELS, 20, 0), "the 10 classes.*; lower it"),
        (lambda: LabelQuantity(classes=2).split(LABELS, 3, 0), "the 10 classes.*; raise it"),
        (lambda: Natural().split(LABELS, 20, 0), "Natural needs every example's owner"),
        (
            lambda: Natural().split(LABELS, 7, 0, IDS),
            "has 20 natural clients; pass --data.clients 20",
        ),
    ],
)
def test_errors_name_the_field_the_value_and_the_fix(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_partitions_need_only_numpy() -> None:
    code = "import sys, fedddp.data.partition; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
