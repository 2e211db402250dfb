"""The cross-site matrix: what each client's own model does on the data of every other client."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import nn

from fedddp.config.baselines import in_effect, trained_by
from fedddp.config.schema import Config
from fedddp.data.datasets import Images
from fedddp.data.loader import ClientLoader
from fedddp.evaluation import Metrics, measure
from fedddp.inference.loading import read_run
from fedddp.inference.model import TrainedModel
from fedddp.inference.other_data import own_data
from fedddp.inference.own_models import PersonalModel, States, has_own_models
from fedddp.rng import stream
from fedddp.section import ConfigError, local_path
from fedddp.storage.checkpoint import write_text
from fedddp.storage.history import main_metric, plain
from fedddp.storage.run_record import CROSS_SITE
from fedddp.training.clients import Clients, clients_of

logger = logging.getLogger(__name__)


MOST = 50
"""Clients of a matrix, at most: it takes the square of their number of evaluations."""


Matrices = tuple[NDArray[np.float64], NDArray[np.float64] | None]
"""A metric of the model of each client on the data of each, (C, C), and of the global one, (C,)."""


@dataclass(frozen=True)
class CrossSite:
    """What the model of each client does on the data of each client."""

    clients: list[int]
    """The C clients, rising: those that were trained and have data to evaluate on."""
    names: list[str]
    """The name of each, its natural owner's or its number."""
    examples: NDArray[np.int64]
    """(C,) of each client."""
    round: int
    """The round of the models."""
    measured: dict[str, Matrices]
    """Of every number that the task measures, by its name."""
    judged: str
    """The one that the run is judged by, such as "accuracy" or "iou"."""
    metric: str
    """The one that is shown."""

    @property
    def matrix(self) -> NDArray[np.float64]:
        """(C, C): the model of client i (row) on the data of client j (column); NaN where it is not known."""
        return self.measured[self.metric][0]

    @property
    def global_row(self) -> NDArray[np.float64] | None:
        """(C,) the global model on the data of each client; None where there is none."""
        return self.measured[self.metric][1]


def cross_site(
    run: str | Path,
    model: TrainedModel,
    flags: Sequence[str] = (),
    metric: str | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> CrossSite:
    """Evaluate the model of every client on the data of every client, of a run with models of their own.

    Data are those of `evaluation.clients`: a client's own examples of the test set, or what it held out. Of
    more than 50 clients, 50 are drawn by the run's seed.

    Args:
        run: the run directory, of FedBN, FedPer, Ditto or `baseline=local`.
        model: the run's, from `server_model`.
        flags: where the run's data are now, and `evaluation.batch_size`, as on the command line.
        metric: a number that the task measures, for `matrix`; by default that which a run is judged by.
        progress: called with the number of models that are done, and that of all.

    Raises:
        ConfigError: the clients of the run have no models of their own, or no data to evaluate on.
        ValueError: the data cannot be read.
    """
    config, (train, test) = _run_data(run, model, flags)
    states = States(local_path(str(run), "run"), model)
    if states.problem is not None or states.round is None:
        raise ConfigError(f"{run}: {states.problem}")
    clients = clients_of(config, train, test)
    chosen = _chosen(clients, states, config.seed)
    loader = ClientLoader(
        train if clients.tests is None else test, config.data, model.device, seed=config.seed
    )

    def row(module: nn.Module) -> list[Metrics]:
        return [_measured(module, config, loader, clients.evaluated(k), k) for k in chosen]

    of_global = row(model.module) if config.algorithm.has_global_model else []
    own = PersonalModel(model, config, states)
    rows = []
    for done, client in enumerate(chosen):
        own.load(states.of_client(client))
        rows.append(row(own.flat.module))
        names, judged = _named([*of_global, *rows[0]], metric)
        progress(done + 1, len(chosen))
    return CrossSite(
        clients=chosen,
        names=[clients.names[k] if clients.names else str(k) for k in chosen],
        examples=np.array([len(clients.evaluated(k)) for k in chosen]),
        round=states.round,
        measured={name: _matrices(rows, of_global, name) for name in names},
        judged=judged,
        metric=metric or judged,
    )


def _run_data(
    run: str | Path, model: TrainedModel, flags: Sequence[str]
) -> tuple[Config, tuple[Images, Images]]:
    """Return the configuration of a run that has personal models, and its training and test images.

    Raises:
        ConfigError: it has no such models, or its data are not found.
    """
    before, _ = read_run(run)
    config, objects = read_run(run, flags)
    config = in_effect(config)
    if not has_own_models(config):
        raise ConfigError(
            f"{run}: with {trained_by(config)} clients have no models of their own to compare; train a run "
            "with algorithm=FedBN, FedPer or Ditto, or with baseline=local"
        )
    own = "train" in objects
    if own and config.data.dataset == before.data.dataset:
        raise ConfigError(
            f"{run} was trained on a dataset of its program ({objects['train']['class']}); name the data "
            "with --data.dataset and --data.root"
        )
    found = own_data(model, config.data, moved=own or config.data != before.data)
    if found is None:
        raise ConfigError(
            f"data.root={config.data.root}: these are not the data that {run} was trained on; name the "
            "folder that has them"
        )
    return config, found


def write_cross_site(directory: Path, found: CrossSite) -> Path:
    """Write the matrices of all metrics into a run directory as JSON, NaN as null; return the file.

    At its top is that of the metric which the run is judged by, and which its report shows.

    Raises:
        OSError: it cannot be written.
    """
    content = {
        "round": found.round,
        "metric": found.judged,
        "clients": found.clients,
        "names": found.names,
        "examples": found.examples,
        "matrix": found.measured[found.judged][0],
        "global": found.measured[found.judged][1],
        "others": {
            name: {"matrix": matrix, "global": row}
            for name, (matrix, row) in found.measured.items()
            if name != found.judged
        },
    }
    write_text(directory / CROSS_SITE, json.dumps(plain(content)))
    return directory / CROSS_SITE


def _chosen(clients: Clients, states: States, seed: int) -> list[int]:
    """Return the clients that have a model and data to evaluate on, `MOST` of them if there are more.

    Raises:
        ConfigError: there are none.
    """
    tested = np.flatnonzero(clients.evaluated_sizes()).tolist()
    if not tested:
        raise ConfigError(
            "the clients of this run have no data to evaluate on; train one with data.holdout, e.g. 0.2, or "
            "with natural clients and a test set that names its owners"
        )
    trained = [client for client in tested if client in states]
    if not trained:
        raise ConfigError("no client with data to evaluate on was trained; train more rounds")
    if len(trained) < len(tested):
        logger.info(
            "%d of %d clients were never trained, and are left out", len(tested) - len(trained), len(tested)
        )
    if len(trained) <= MOST:
        return trained
    logger.info("%d of %d clients are evaluated, drawn by the seed of the run", MOST, len(trained))
    drawn = stream("cross-site", seed).choice(len(trained), MOST, replace=False)
    return [trained[position] for position in np.sort(drawn)]


def _measured(
    module: nn.Module, config: Config, loader: ClientLoader, indices: NDArray[np.int64], client: int
) -> Metrics:
    """Return the numbers that the task measures on the examples of one client."""
    totals = measure(module, config.task, loader, indices, config.evaluation.batch_size, client)
    return {n: value for n, value in totals.summarize(config.task).items() if not isinstance(value, list)}


def _named(cells: Sequence[Metrics], metric: str | None) -> tuple[list[str], str]:
    """Return the names of the metrics that were measured, and that which the run is judged by.

    Raises:
        ConfigError: `metric` is none of them.
    """
    names = next((list(cell) for cell in cells if cell), [])
    if metric is not None and metric not in names:
        raise ConfigError(f"metric={metric} is not measured; give one of {', '.join(names)}")
    judged = main_metric({f"eval/{name}": 0.0 for name in names})
    if judged is None:
        raise ConfigError("the task measures no number on the data of these clients")
    return names, judged.removeprefix("eval/")


def _matrices(rows: Sequence[Sequence[Metrics]], whole: Sequence[Metrics], metric: str) -> Matrices:
    """Return a metric of the rows, and of the `whole`, the global model; without one that is empty."""
    matrix = np.array([_values(cells, metric) for cells in rows])
    return matrix, np.array(_values(whole, metric)) if whole else None


def _values(cells: Sequence[Metrics], metric: str) -> list[float]:
    return [float("nan") if cell.get(metric) is None else cell[metric] for cell in cells]
