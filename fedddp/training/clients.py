"""The clients' own data: what each trains on and is evaluated on; and all of it in one place."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedddp.config.baselines import pooled_steps
from fedddp.config.schema import Config
from fedddp.data.datasets import DataConfig, Images
from fedddp.data.loader import ClientLoader
from fedddp.data.partition import Natural, Split, holdout, holdout_sizes
from fedddp.data.targets import Boxes, Targets, select
from fedddp.data.transforms import ImageShift
from fedddp.section import ConfigError

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Clients:
    """Which examples each client of the population trains on, and which it is evaluated on."""

    split: Split
    """The training set over the clients, held-out examples included."""
    fraction: float
    """`data.holdout`."""
    seed: int
    """The seed of the run."""
    tests: Split | None = None
    """The test set over the clients, but for examples of other owners; None: clients own no part of it."""
    names: tuple[str, ...] = ()
    """The name of every client, its natural owner's; empty where they have none."""

    def __len__(self) -> int:
        """Return the population."""
        return len(self.split)

    def training(self, client: int) -> Indices:
        """Return the training examples of `client`, without those held out; (n_k,)."""
        return self._parts(client)[0]

    def evaluated(self, client: int) -> Indices:
        """Return the examples that `client` is evaluated on: of the test set where there are `tests`."""
        return self._parts(client)[1] if self.tests is None else self.tests.indices(client)

    def evaluated_sizes(self) -> Indices:
        """Return how many examples every client is evaluated on, (clients,)."""
        return holdout_sizes(self.split.sizes, self.fraction) if self.tests is None else self.tests.sizes

    def label(self, client: int) -> dict[str, str]:
        """Return the client's name as a column of its row; empty where it has none."""
        return {"name": self.names[client]} if self.names else {}

    def _parts(self, client: int) -> tuple[Indices, Indices]:
        if not self.fraction:
            return self.split.indices(client), np.empty(0, dtype=np.int64)
        return holdout(self.split.indices(client), self.fraction, client, self.seed)


def clients_of(config: Config, train: Images, test: Images | None) -> Clients:
    """Return the clients that `config` splits the training set over, with their parts of the test set.

    Where clients are natural owners and the test set names its owners, a client is evaluated on its own test
    examples. They come before held-out ones: no training data need be given up for them.

    Args:
        config: the configuration.
        train: the training images.
        test: the images of central evaluation; None for none.

    Raises:
        ValueError: the images cannot be split as configured, or clients are to be evaluated on nothing.
    """
    split, _ = config.data.split(train, config.seed)
    clients = Clients(split, config.data.holdout, config.seed)
    if isinstance(config.data.partition, Natural) and train.ids is not None:
        owners = np.unique(train.ids)
        tests = None if test is None or test.ids is None else _of_owners(test.ids, owners)
        clients = dataclasses.replace(clients, tests=tests, names=client_names(config.data, train))
    chosen = config.baseline == "local" or config.algorithm.has_global_model  # else by `in_effect`
    if config.evaluation.clients and chosen and not clients.evaluated_sizes().any():
        raise ConfigError(
            f"evaluation.clients={config.evaluation.clients} needs local data to evaluate on, but "
            f"data.holdout={config.data.holdout:g} and no example of the test set is known to be a client's "
            "(its attribute `ids`); set data.holdout, e.g. 0.1"
        )
    return clients


def client_names(data: DataConfig, train: Images) -> tuple[str, ...]:
    """Return the name of every client, its natural owner's; empty where they have none."""
    if not isinstance(data.partition, Natural) or train.ids is None or not train.owners:
        return ()
    return tuple(train.owners[owner] for owner in np.unique(train.ids).tolist())


def _of_owners(ids: Indices, owners: Indices) -> Split | None:
    """Return the examples with `ids` (n,) over the rising `owners` (clients,); None if these own none."""
    position = np.minimum(np.searchsorted(owners, ids), len(owners) - 1)
    examples = np.flatnonzero(owners[position] == ids)
    by_owner = examples[np.argsort(position[examples], kind="stable")]
    sizes = np.bincount(position[examples], minlength=len(owners))
    return Split.from_sizes(by_owner, sizes) if len(examples) else None


# ---- all data in one place ----


def pooled(config: Config, clients: Clients) -> tuple[Config, Split]:
    """Return what `baseline=pooled` trains: `config` with its steps, and one client with the data of all.

    Its examples are the training examples of client after client; what is held out stays held out.
    """
    parts = [clients.training(client) for client in range(len(clients))]
    sizes = np.array([len(part) for part in parts])
    local = pooled_steps(config.local, sizes)
    return dataclasses.replace(config, local=local), Split.from_sizes(
        np.concatenate(parts), sizes.sum()[None]
    )


class PooledLoader(ClientLoader):
    """The training images of all clients together, each with the feature shift of the client it is from."""

    def __init__(
        self, images: Images, data: DataConfig, device: torch.device, *, seed: int, split: Split
    ) -> None:
        """Take the arguments of `ClientLoader`, and the `split` of the images over the clients."""
        super().__init__(images, data, device, seed=seed)
        self._owners = np.empty(len(images), dtype=np.int64)
        self._owners[split.permutation] = np.repeat(np.arange(len(split)), split.sizes)
        self._shift = cache(self._shift_of)

    def _shift_of(self, client: int) -> ImageShift | None:
        shifts = self.data.feature_shift
        return None if shifts is None else shifts.of_client(client, self.seed)

    def _prepare(
        self,
        planes: Tensor,
        boxes: Boxes | None,
        examples: Indices,
        draws: Tensor | None,
        shift: ImageShift | None,
        client: int,
    ) -> tuple[Tensor, Targets]:
        """Return the images and the targets of `examples`, prepared owner by owner."""
        if shift is None:
            return super()._prepare(planes, boxes, examples, draws, shift, client)
        images: list[Tensor] = []
        targets: list[Targets] = []
        rows: list[Indices] = []
        owners = self._owners[examples]
        for owner in np.unique(owners).tolist():
            own = np.flatnonzero(owners == owner)
            index = torch.from_numpy(own)
            on_device = index.to(planes.device)
            prepared = super()._prepare(
                planes[on_device],
                None if boxes is None else boxes.index_select(index),
                examples[own],
                None if draws is None else draws[on_device],
                self._shift(owner),
                owner,
            )
            images.append(prepared[0])
            targets.append(prepared[1])
            rows.append(own)
        back = torch.from_numpy(np.argsort(np.concatenate(rows)))
        return torch.cat(images)[back.to(planes.device)], select(_joined(targets), back)


def _joined(parts: list[Targets]) -> Targets:
    """Return the targets of several groups of images, one group after the other."""
    tensors = [part for part in parts if isinstance(part, Tensor)]
    if tensors:
        return torch.cat(tensors)
    return Boxes.cat(part for part in parts if isinstance(part, Boxes))
