"""Labels to clients: every partition is a pure function of labels, its own fields and a seed.

A split is two arrays, whatever the population: a permutation of the examples and the offset of each client
in it. All work is on arrays too, so that a million clients are split in about a second.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
from annotated_types import Interval
from numpy.random import Generator
from numpy.typing import NDArray

from fedddp.rng import stream
from fedddp.section import NonNegativeInt, PositiveInt, Section

Indices = NDArray[np.int64]
Floats = NDArray[np.float64]
Ids = NDArray[np.generic] | None
Concentration = Annotated[float, Interval(gt=0, le=1_000_000), "0.1 is strong skew, 100 nearly none"]

__all__ = [
    "IID",
    "ClientDirichlet",
    "Dirichlet",
    "LabelQuantity",
    "LogNormal",
    "Natural",
    "Partition",
    "PowerLaw",
    "QuantityDirichlet",
    "Shards",
    "Split",
]


@dataclass(frozen=True)
class Split:
    """Which examples each client holds."""

    permutation: Indices
    """(examples,) a permutation of range(examples), client after client."""

    offsets: Indices
    """(clients + 1,) where each client begins in `permutation`; the last is the number of examples."""

    def __len__(self) -> int:
        """Return the number of clients."""
        return len(self.offsets) - 1

    @property
    def sizes(self) -> Indices:
        """The number of examples of every client, (clients,)."""
        return np.diff(self.offsets)

    def indices(self, client: int) -> Indices:
        """Return the examples of `client`, (its size,), as a view into `permutation`."""
        return self.permutation[self.offsets[client] : self.offsets[client + 1]]

    @classmethod
    def from_sizes(cls, permutation: Indices, sizes: Indices) -> Split:
        """Cut `permutation` (examples,) into pieces of `sizes` (clients,)."""
        return cls(permutation, np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64))

    @classmethod
    def from_owners(cls, owners: Indices, clients: int) -> Split:
        """Give every example to its owner, `owners` (examples,) in range(clients)."""
        by_owner = np.argsort(owners, kind="stable").astype(np.int64)
        return cls.from_sizes(by_owner, np.bincount(owners, minlength=clients))


@dataclass(frozen=True, kw_only=True)
class Partition(Section, ABC):
    """How the examples of the training set are split over the clients."""

    key: ClassVar[str] = "data.partition"
    chosen_by_name: ClassVar[bool] = True

    def split(self, labels: Indices, clients: int, seed: int, ids: Ids = None) -> Split:
        """Split all examples over `clients`; equal arguments give equal splits.

        Args:
            labels: class of every example, (examples,).
            clients: the population, >= 1.
            seed: the seed of the run.
            ids: natural owner of every example, (examples,), for `Natural`.

        Raises:
            ValueError: the examples cannot be split as asked for.
        """
        if not len(labels):
            raise ValueError("data.dataset has no training examples; there is nothing to split")
        if min(clients, self.min_examples_for(clients)) > len(labels):
            raise ValueError(
                f"data.clients={clients} is larger than the {len(labels)} training examples, and "
                f"{type(self).__name__} needs one for every client; lower data.clients"
            )
        return self.assign(labels, clients, stream("partition", seed), ids)

    def min_examples_for(self, clients: int) -> int:
        """Return the fewest examples that `clients` clients can share."""
        return clients

    @abstractmethod
    def assign(self, labels: Indices, clients: int, rng: Generator, ids: Ids) -> Split:
        """Split the examples, drawing from `rng` only; arguments as for `split`."""


@dataclass(frozen=True, kw_only=True)
class IID(Partition):
    """Every client gets a random sample of the same size (to within one example)."""

    def assign(self, labels: Indices, clients: int, rng: Generator, ids: Ids) -> Split:
        """Cut a random permutation into equal pieces."""
        sizes = np.full(clients, len(labels) // clients)
        sizes[: len(labels) % clients] += 1
        return Split.from_sizes(rng.permutation(len(labels)), sizes)


@dataclass(frozen=True, kw_only=True)
class Dirichlet(Partition):
    """Label and quantity skew: each class spreads over the clients by Dirichlet(alpha).

    The convention of Yurochkin et al., 2019 (arXiv:1905.12022) and Li et al., 2022 (arXiv:2102.02079):
    clients differ in size too. `ClientDirichlet` is that of Hsu et al.
    """

    alpha: Concentration = 0.3
    """Concentration, in (0, 1000000]; 0.1 is strong skew, 100 nearly iid."""

    min_examples: NonNegativeInt = 1
    """Fewest examples of a client, >= 0; examples move from the largest clients to those with fewer."""

    def min_examples_for(self, clients: int) -> int:
        """Return the fewest examples that `clients` clients can share."""
        return clients * self.min_examples

    def assign(self, labels: Indices, clients: int, rng: Generator, ids: Ids) -> Split:
        """Cut every class by its own proportions, then fill up clients that are too small."""
        if clients * self.min_examples > len(labels):
            raise ValueError(
                f"data.partition.min_examples={self.min_examples} needs "
                f"{clients * self.min_examples} training examples for {clients} clients, but there "
                f"are {len(labels)}; lower min_examples or data.clients"
            )
        owners = np.empty(len(labels), dtype=np.int64)
        for members in _by_class(labels, rng):
            sizes = _share_out(rng.dirichlet(np.full(clients, self.alpha)), len(members))
            owners[members] = np.repeat(np.arange(clients), sizes)
        return Split.from_owners(_fill_up(owners, clients, self.min_examples, rng), clients)


@dataclass(frozen=True, kw_only=True)
class ClientDirichlet(Partition):
    """Label skew: each client draws its class proportions from Dirichlet(alpha p), p those of the dataset.

    Hsu et al., 2019 (arXiv:1909.06335). Clients are of equal size, to within one example; the last ones take
    the classes that are left.
    """

    alpha: Concentration = 1.0
    """Concentration, in (0, 1000000]; 0.1 is strong skew, 100 nearly iid."""

    def assign(self, labels: Indices, clients: int, rng: Generator, ids: Ids) -> Split:
        """Fill client after client, in random order, with draws from its own proportions."""
        by_class = _by_class(labels, rng)
        left = np.array([len(members) for members in by_class])
        sizes = np.full(clients, len(labels) // clients)
        sizes[: len(labels) % clients] += 1
        owners = np.empty(len(labels), dtype=np.int64)
        prior = self.alpha * left / left.sum()
        for client in rng.permutation(clients).tolist():
            proportions = rng.dirichlet(prior)
            for label, taken in enumerate(_drawn(int(sizes[client]), proportions, left, rng).tolist()):
                members = by_class[label]
                owners[members[left[label] - taken : left[label]]] = client
                left[label] -= taken
        return Split.from_owners(owners, clients)


@dataclass(frozen=True, kw_only=True)
class QuantityDirichlet(Partition):
    """Quantity skew: random samples whose sizes are drawn from Dirichlet(alpha); every client has an example.

    Li et al., 2022 (arXiv:2102.02079).
    """

    alpha: Concentration = 0.5
    """Concentration, in (0, 1000000]; 0.1 is strong skew, 100 nearly equal sizes."""

    def assign(self, labels: Indices, clients: int, rng: Generator, ids: Ids) -> Split:
        """Cut a random permutation into pieces of these sizes."""
        return _random_samples(rng.dirichlet(np.full(clients, self.alpha)), len(labels), rng)


@dataclass(frozen=True, kw_only=True)
class Shards(Partition):
    """Pathological label skew: examples sorted by label, cut into shards, a few for each client.

    McMahan et al., 2017 (arXiv:1602.05629). Shards are equal to within one example.
    """

    per_client: PositiveInt = 2
    """Shards of a client, >= 1; about the number of classes it holds."""

    def assign(self, labels: Indices, clients: int, rng: Generator, ids: Ids) -> Split:
        """Deal the shards at random."""
        shards = clients * self.per_client
        if shards > len(labels):
            raise ValueError(
                f"data.partition.per_client={self.per_client} needs {shards} shards for {clients} "
                f"clients, but there are {len(labels)} training examples; lower per_client or "
                "data.clients"
            )
        by_label = np.concatenate(_by_class(labels, rng))
        shard = np.arange(len(labels)) * shards // len(labels)
        owners = np.empty(len(labels), dtype=np.int64)
        owners[by_label] = rng.permutation(np.arange(shards) // self.per_client)[shard]
        return Split.from_owners(owners, clients)


@dataclass(frozen=True, kw_only=True)
class LogNormal(Partition):
    """Quantity skew: random samples whose sizes are log-normal; every client has an example."""

    sigma: Annotated[float, Interval(ge=0, le=20)] = 1.0
    """Standard deviation of the logarithm of the sizes, in [0, 20]; 0 is equal sizes."""

    def assign(self, labels: Indices, clients: int, rng: Generator, ids: Ids) -> Split:
        """Cut a random permutation into log-normal pieces."""
        weights = rng.lognormal(0.0, self.sigma, clients)
        return _random_samples(weights, len(labels), rng)


@dataclass(frozen=True, kw_only=True)
class PowerLaw(Partition):
    """Quantity skew: the i-th largest client has a share ~ i^-exponent, at least one."""

    exponent: Annotated[float, Interval(ge=0, le=20)] = 1.0
    """Steepness, in [0, 20]; 0 is equal sizes, 1 is Zipf's law."""

    def assign(self, labels: Indices, clients: int, rng: Generator, ids: Ids) -> Split:
        """Cut a random permutation into pieces of a power law, in random order."""
        weights = np.arange(1, clients + 1, dtype=np.float64) ** -self.exponent
        return _random_samples(rng.permutation(weights), len(labels), rng)


@dataclass(frozen=True, kw_only=True)
class LabelQuantity(Partition):
    """Label skew: every client holds `classes` classes, each shared equally by its holders.

    Li et al., 2022 (arXiv:2102.02079). With more clients than examples of a class, some of its
    holders get none.
    """

    classes: PositiveInt = 2
    """Classes of a client, >= 1 and at most those of the dataset."""

    def assign(self, labels: Indices, clients: int, rng: Generator, ids: Ids) -> Split:
        """Deal the classes to the clients, then every class's examples to its holders."""
        by_class = _by_class(labels, rng)
        present = len(by_class)
        if not self.classes <= present <= clients * self.classes:
            fix = "lower it" if self.classes > present else "raise it or data.clients"
            raise ValueError(
                f"data.partition.classes={self.classes} with {clients} clients does not fit the "
                f"{present} classes of the data (each client needs that many, and each class a "
                f"holder); {fix}"
            )
        holders = self._holders(clients, present, rng)
        owners = np.empty(len(labels), dtype=np.int64)
        for members, held_by in zip(by_class, holders, strict=True):
            owners[members] = held_by[np.arange(len(members)) * len(held_by) // len(members)]
        return Split.from_owners(owners, clients)

    def _holders(self, clients: int, present: int, rng: Generator) -> list[Indices]:
        """Return for every class the clients that hold it, in random order.

        Classes are dealt from shuffled decks; a deck that runs out within a client is dealt again
        from its top, so that a client's classes differ and one deck holds every class.
        """
        per_deck = -(-present // self.classes)
        decks = np.tile(np.arange(present), (-(-clients // per_deck), 1))
        decks = rng.permuted(decks, axis=1)
        dealt = decks[:, np.arange(per_deck * self.classes) % present]
        slots = dealt.ravel()[: clients * self.classes]
        shuffled = rng.permutation(clients * self.classes)
        order = shuffled[np.argsort(slots[shuffled], kind="stable")]
        bounds = np.cumsum(np.bincount(slots, minlength=present))[:-1]
        return [slot // self.classes for slot in np.split(order, bounds)]


@dataclass(frozen=True, kw_only=True)
class Natural(Partition):
    """One client per natural owner of the data: the writer, the camera, the hospital."""

    def min_examples_for(self, clients: int) -> int:
        """Return 0: clients and owners are compared instead."""
        return 0

    def assign(self, labels: Indices, clients: int, rng: Generator, ids: Ids) -> Split:
        """Give every example to its owner; clients are numbered by the order of the ids."""
        if ids is None:
            raise ValueError(
                "data.partition=Natural needs every example's owner, but the dataset has none; "
                "use qmnist, shapes or a dataset with an attribute `ids`, or another partition"
            )
        names, owners = np.unique(ids, return_inverse=True)
        if len(names) != clients:
            raise ValueError(
                f"data.clients={clients}, but the dataset has {len(names)} natural clients; pass "
                f"--data.clients {len(names)}"
            )
        return Split.from_owners(owners.astype(np.int64), clients)


def holdout_sizes(sizes: Indices, fraction: float) -> Indices:
    """Return how many examples clients of `sizes` (clients,) keep for evaluation.

    A client keeps the rounded `fraction`, but always trains on at least one example.
    """
    most = np.maximum(sizes - 1, 0)
    kept: Floats = np.floor(np.minimum(sizes * fraction + 0.5, most))
    return kept.astype(np.int64)


def holdout(indices: Indices, fraction: float, client: int, seed: int) -> tuple[Indices, Indices]:
    """Split the `indices` of `client` into those it trains on and those it is evaluated on.

    Args:
        indices: (size,) the client's examples; both parts keep their order.
        fraction: the part kept for evaluation, 0 <= fraction < 1; see `holdout_sizes`.
        client: the client that holds them.
        seed: the seed of the run.
    """
    kept = int(holdout_sizes(np.array([len(indices)]), fraction)[0])
    held = np.zeros(len(indices), dtype=np.bool_)
    held[stream("holdout", seed, client).permutation(len(indices))[:kept]] = True
    return indices[~held], indices[held]


def _by_class(labels: Indices, rng: Generator) -> list[Indices]:
    """Return the examples of every class that occurs, each in random order."""
    shuffled = rng.permutation(len(labels))
    order = shuffled[np.argsort(labels[shuffled], kind="stable")]
    return np.split(order, np.flatnonzero(np.diff(labels[order])) + 1)


def _drawn(size: int, proportions: Floats, left: Indices, rng: Generator) -> Indices:
    """Return how many examples of every class a client of `size` draws, of those that are `left`."""
    taken = np.zeros_like(left)
    while (missing := size - int(taken.sum())) > 0:
        available = np.where(taken < left, proportions, 0.0)
        if not available.sum() > 0:  # none of the client's classes is left
            available = (left - taken).astype(np.float64)
        taken = np.minimum(taken + rng.multinomial(missing, available / available.sum()), left)
    return taken


def _share_out(weights: Floats, total: int) -> Indices:
    """Return integer sizes (clients,) that sum to `total` and follow `weights` to within one."""
    ends = np.cumsum(weights)
    cuts = np.floor(ends * (total / ends[-1]) + 0.5).astype(np.int64)
    cuts[-1] = total
    sizes: Indices = np.diff(cuts, prepend=0)
    return sizes


def _random_samples(weights: Floats, examples: int, rng: Generator) -> Split:
    """Return random samples of one example each plus a share of the rest by `weights`."""
    sizes = 1 + _share_out(weights, examples - len(weights))
    return Split.from_sizes(rng.permutation(examples), sizes)


def _fill_up(owners: Indices, clients: int, fewest: int, rng: Generator) -> Indices:
    """Move random examples from the largest clients to those with fewer than `fewest`."""
    sizes = np.bincount(owners, minlength=clients)
    missing = np.maximum(fewest - sizes, 0)
    need = int(missing.sum())
    if not need:
        return owners
    # The highest size to which clients must be cut so that enough examples come free.
    low, high = fewest, int(sizes.max())
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if np.maximum(sizes - middle, 0).sum() >= need else (low, middle)
    position = np.arange(len(owners)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    by_owner = np.lexsort((rng.random(len(owners)), owners))
    free = rng.permutation(by_owner[position >= low])[:need]
    filled = owners.copy()
    filled[free] = np.repeat(np.arange(clients), missing)
    return filled
