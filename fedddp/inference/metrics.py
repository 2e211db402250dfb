"""Evaluate a trained model: on any labelled dataset, and on the data and the clients of its run."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from fedddp.config.baselines import in_effect
from fedddp.config.schema import Config
from fedddp.data.datasets import DataConfig, Images, from_dataset
from fedddp.data.loader import Batch, ClientLoader
from fedddp.evaluation import ConfusionMatrix, EvaluationConfig, Metrics, measure, spread
from fedddp.inference.loading import client_names, read_run
from fedddp.inference.model import BATCH_SIZES, TrainedModel
from fedddp.inference.other_data import other_data, own_data, trained_on, without_place
from fedddp.inference.own_models import PersonalModel, States, has_own_models, number_of
from fedddp.section import ConfigError, local_path
from fedddp.storage.run_record import ALONE, CLIENT
from fedddp.training.clients import clients_of

logger = logging.getLogger(__name__)


def evaluate(model: TrainedModel, dataset: Dataset[Any], batch_size: int | None = None) -> Metrics:
    """Return the metrics of a model on a labelled dataset, as the run's history has them below `eval/`.

    Args:
        model: from `load_model`.
        dataset: map-style, of (image, label); images as for `predict`. Classes are numbers in
            `model.classes`. A label is a class; labels (K,) of 0 and 1; a mask (H, W) of classes; or a dict
            of "boxes" (n, 4) in pixels and "labels" (n,), by the model's task.
        batch_size: examples per forward pass, >= 1; by default 500, of masks and boxes 16.

    Raises:
        ValueError: an image or a label does not fit the model.
    """
    size = model.shape[1] if model.shape[1] == model.shape[2] else None
    limits = None if model.value_range is None else list(model.value_range)
    data = DataConfig(image_size=size, resize=model.resize, memory="device", value_range=limits)
    images = from_dataset(dataset, data, model.task.target, like=trained_on(model))
    loader = ClientLoader(images, DataConfig(), model.device, seed=0)
    return _central(model, loader, batch_size or BATCH_SIZES[model.task.target])[0]


@dataclass(frozen=True)
class ClientMetrics:
    """What a model does for each client of its run."""

    rows: list[Metrics]
    """Of every client with examples: "client", its "name" where it has one, "examples", and the task's
    metrics that are a number."""
    held_out: bool
    """Whether these examples were held out (`data.holdout`); else the client's own training examples."""
    personalized: bool
    """Whether each client was evaluated on its own model, as the algorithm makes it; else all on one."""
    states_round: int | None
    """The round of the clients' own layers or models; None where there are none."""
    tested: bool = False
    """Whether the examples held out are each client's own part of the test set."""

    @property
    def spread(self) -> Metrics:
        """Mean, worst 10 %, best 10 % and deviation over clients of what they are judged by."""
        return {name.rpartition("_")[2]: value for name, value in spread(self.rows).items()}

    @property
    def judged(self) -> str | None:
        """The metric that the clients are judged by, such as "accuracy"; None without one."""
        first = next(iter(spread(self.rows)), None)
        return None if first is None else first.removeprefix("clients/").rpartition("_")[0]


@dataclass(frozen=True)
class RunMetrics:
    """What a model does on a dataset, and for the clients of its run."""

    dataset: str
    root: str
    examples: int
    own: bool
    """Whether it is the test data of the run."""
    metrics: Metrics
    """Of the task, as the history has them below `eval/`."""
    confusion: Tensor | None
    """Examples, or pixels of masks, by true class (row) and predicted class (column); int64, (K, K). None:
    boxes and several labels per image, or more than 1,000 classes."""
    clients: ClientMetrics | None
    """None: the data are not the run's, clients were not asked for, or they were left out."""
    left_out: str | None = None
    """Why the clients were left out."""
    of_client: ClientMetrics | None = None
    """Of a client's own model: on the examples that this client has to be evaluated on, a row, or none where
    it has no such examples. None: of another model, or clients have only training examples."""


def evaluate_run(
    run: str | Path, model: TrainedModel, flags: Sequence[str] = (), clients: int | None = None
) -> RunMetrics:
    """Evaluate a model on the test data of its run and per client, or on other data of the same classes.

    Args:
        run: the run directory.
        model: the run's, from `server_model`, or a client's from `load_model`.
        flags: settings of `data`, and `evaluation.batch_size`, as on the command line. Data that only
            moved are still the run's; other data are evaluated as a whole, and without clients.
        clients: how many clients to evaluate, drawn by the run's seed; None: all.

    Raises:
        ConfigError: there is no such run, a flag is wrong, or the classes of the data do not fit.
        ValueError: the data cannot be read.
    """
    _check_flags(flags)
    config, objects = read_run(run, flags)
    before, _ = read_run(run)
    config = in_effect(config)
    if "train" in objects and not any(flag.partition("=")[0] == "--data.dataset" for flag in flags):
        raise ConfigError(
            f"{run} was trained on a dataset of its program ({objects['train']['class']}); name the data "
            "with --data.dataset and --data.root, or call fedddp.evaluate(model, dataset) in Python"
        )
    found = None
    if "train" in objects or without_place(config.data) == without_place(before.data):
        found = own_data(model, config.data, moved=config.data != before.data or "train" in objects)
    own = found is not None
    train, test = found or (None, other_data(model, config.data))
    metrics: Metrics = {}
    confusion = per_client = left_out = of_client = None
    alone, whose = model.metadata.get(ALONE), model.metadata.get(CLIENT)
    if alone is None or whose is not None:
        loader = ClientLoader(test, config.data, model.device, seed=config.seed)
        metrics, confusion = _central(model, loader, config.evaluation.batch_size)
    elif train is None or clients == 0:
        raise ConfigError(
            f"{run}: with {alone} there is no global model, each client has its own; evaluate them on their "
            "own data, or one of them (--client)"
        )
    if train is not None and clients != 0:
        states = None
        if whose is None and has_own_models(config):
            states = States(local_path(str(run), "run"), model)
            left_out = None if states.problem is None else f"left out: {states.problem}"
        if left_out is None:
            per_client = _evaluate_clients(states, model, config, (train, test), clients)
    if train is not None and whose is not None:
        number = number_of(whose, client_names(local_path(str(run), "run")), config.data.clients)
        of_client = _evaluate_clients(None, model, config, (train, test), [number])
        of_client = of_client if of_client.held_out else None
    data = config.data
    return RunMetrics(
        *(data.dataset, data.root, len(test), own, metrics, confusion, per_client, left_out, of_client)
    )


def _check_flags(flags: Sequence[str]) -> None:
    for flag in flags:
        name = flag.partition("=")[0]
        if name.startswith("--") and not name.startswith("--data") and name != "--evaluation.batch_size":
            raise ConfigError(f"{name} cannot be changed for an evaluation; give settings of data only")
        if name == "--data.resize":
            raise ConfigError("--data.resize: images are resized as those of the model were; leave it out")


# ---- the numbers ----


def _central(model: TrainedModel, loader: ClientLoader, batch_size: int) -> tuple[Metrics, Tensor | None]:
    """Return the metrics over all examples of `loader`, and the confusion matrix."""
    confusion, task = ConfusionMatrix(len(model.classes)), model.task

    def observe(batch: Batch, outputs: Any) -> None:
        predicted = task.predict(outputs) if task.target in ("class", "mask") else None
        if predicted is not None and isinstance(batch.targets, Tensor):
            predicted = predicted.argmax(1) if task.target == "class" else predicted
            confusion.add(batch.targets.cpu(), predicted.cpu())

    everything = np.arange(len(loader.images))
    totals = measure(model.module, task, loader, everything, batch_size, observe=observe)
    return totals.summarize(task), confusion.result()


def _evaluate_clients(
    states: States | None,
    model: TrainedModel,
    config: Config,
    data: tuple[Images, Images],
    wanted: int | Sequence[int] | None,
) -> ClientMetrics:
    """Evaluate each client: on its own model with its `states`, or else on `model`.

    Of `data`, training and test images, on its own part of the test set, on what it held out, or else on
    what it was trained on. A client that was never trained has the initial values of what stays local.
    `wanted`: how many clients, which of them, or all.
    """
    clients = clients_of(config, *data)
    tested = clients.tests is not None
    held_out = tested or bool(config.data.holdout)
    chosen = np.arange(len(clients))
    if wanted is not None and not isinstance(wanted, int):
        chosen = np.array(wanted)
    elif wanted is not None:
        chosen = EvaluationConfig(clients=wanted).sample(len(clients), config.seed)
    own = None if states is None else PersonalModel(model, config, states)
    loader = ClientLoader(data[tested], config.data, model.device, seed=config.seed)
    rows: list[Metrics] = []
    for client in chosen.tolist():
        indices = clients.evaluated(client) if held_out else clients.training(client)
        if not len(indices):
            continue
        module = model.module
        if own is not None and states is not None:
            own.load(states.of_client(client))
            module = own.flat.module
        totals = measure(module, model.task, loader, indices, config.evaluation.batch_size, client)
        numbers = totals.numbers(model.task)
        rows.append({"client": client, **clients.label(client), "examples": len(indices), **numbers})
    states_round = states.round if states is not None else None
    return ClientMetrics(rows, held_out, states is not None, states_round, tested)
