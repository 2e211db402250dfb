"""Evaluate a trained model: on any labelled dataset, and on the data and the clients of its run."""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from torch import Tensor
from torch.utils.data import Dataset

from fedddp.algorithms import Algorithm
from fedddp.config.schema import Config
from fedddp.data import decode
from fedddp.data.catalog import open_dataset
from fedddp.data.datasets import DataConfig, Images, from_dataset, load
from fedddp.data.loader import Batch, ClientLoader
from fedddp.data.partition import holdout
from fedddp.evaluation import ConfusionMatrix, EvaluationConfig, Metrics, measure, spread
from fedddp.inference.loading import read_run
from fedddp.inference.model import TrainedModel
from fedddp.models.flat import FlatModel
from fedddp.section import ConfigError, local_path, nearest
from fedddp.storage.checkpoint import newest_intact
from fedddp.storage.run_record import read_record
from fedddp.training.engine import channels_last

logger = logging.getLogger(__name__)

SAME = 1e-6
"""Largest difference of mean and deviation between training images and those that a run was trained on."""


def evaluate(model: TrainedModel, dataset: Dataset[Any], batch_size: int = 500) -> Metrics:
    """Return the metrics of a model on a labelled dataset, as the run's history has them below `eval/`.

    Args:
        model: from `load_model`.
        dataset: map-style, of (image, label); images as for `predict`, labels by `model.classes`.
        batch_size: examples per forward pass, >= 1.

    Raises:
        ValueError: an image or a label does not fit the model.
    """
    size = model.shape[1] if model.shape[1] == model.shape[2] else None
    images = from_dataset(dataset, like=_trained_on(model), image_size=size, memory="device")
    return _central(model, ClientLoader(images, DataConfig(), model.device, seed=0), batch_size)[0]


@dataclass(frozen=True)
class ClientMetrics:
    """What a model does for each client of its run."""

    rows: list[Metrics]
    """Of every client with examples: "client", "examples", and the task's metrics that are a number."""
    held_out: bool
    """Whether these examples were held out (`data.holdout`); else the client's own training examples."""
    personalized: bool
    """Whether each client was evaluated on its own model, as the algorithm makes it."""
    states_round: int | None
    """The round of the clients' own layers or models; None where there are none."""

    @property
    def spread(self) -> Metrics:
        """Mean, worst 10 %, best 10 % and deviation of the accuracy over clients; empty without accuracy."""
        if not self.rows or "accuracy" not in self.rows[0]:
            return {}
        return {n.removeprefix("clients/accuracy_"): v for n, v in spread(self.rows).items()}


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
    """Examples by true class (row) and predicted class (column); int64, (K, K). None: no classes, or more
    than 1,000."""
    clients: ClientMetrics | None
    """None: the data are not the run's, clients were not asked for, or they were left out."""
    left_out: str | None = None
    """Why the clients were left out."""


def evaluate_run(
    run: str | Path, model: TrainedModel, flags: Sequence[str] = (), clients: int | None = None
) -> RunMetrics:
    """Evaluate a model on the test data of its run and per client, or on other data of the same classes.

    Args:
        run: the run directory.
        model: the run's, from `load_model`.
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
    if "train" in objects and not any(flag.partition("=")[0] == "--data.dataset" for flag in flags):
        raise ConfigError(
            f"{run} was trained on a dataset of its program ({objects['train']['class']}); name the data "
            "with --data.dataset and --data.root, or call fedddp.evaluate(model, dataset) in Python"
        )
    found = None
    if "train" in objects or _without_place(config.data) == _without_place(before.data):
        found = _own_data(model, config.data, moved=config.data != before.data or "train" in objects)
    own = found is not None
    train, test = found or (None, _other_data(model, config.data))
    batch_size, device = config.evaluation.batch_size, model.device
    loader = ClientLoader(test, config.data, device, seed=config.seed)
    metrics, confusion = _central(model, loader, batch_size)
    per_client = left_out = None
    if train is not None and clients != 0:
        states = None
        if type(config.algorithm).personalize is not Algorithm.personalize:
            states = _States(local_path(str(run), "run"))
            left_out = _of_another_round(model, states, type(config.algorithm).__name__)
        if left_out is None:
            per_client = _evaluate_clients(states, model, config, train, clients)
    data = config.data
    return RunMetrics(data.dataset, data.root, len(test), own, metrics, confusion, per_client, left_out)


def _check_flags(flags: Sequence[str]) -> None:
    for flag in flags:
        name = flag.partition("=")[0]
        if name.startswith("--") and not name.startswith("--data") and name != "--evaluation.batch_size":
            raise ConfigError(f"{name} cannot be changed for an evaluation; give settings of data only")


# ---- the data ----


def _trained_on(model: TrainedModel) -> Images:
    """Return no images, of the shape, the classes and the normalisation that `model` was trained with."""
    return Images(
        labels=np.empty(0, dtype=np.int64),
        classes=len(model.classes),
        shape=model.shape,
        pixels=None,
        source=None,
        ids=None,
        mean=model.mean,
        std=model.std,
        class_names=model.classes,
    )


def _without_place(data: DataConfig) -> DataConfig:
    """Return the settings that decide which examples there are."""
    plain = DataConfig()
    return dataclasses.replace(
        data, root=plain.root, download=plain.download, memory=plain.memory, workers=plain.workers
    )


def _own_data(model: TrainedModel, data: DataConfig, *, moved: bool) -> tuple[Images, Images] | None:
    """Return the training and the test images of the model's run; None if `data` names others.

    They are the same if the training images have the mean and the deviation that the model's file has.
    """
    try:
        train, test = load(data)
    except ValueError:
        if moved:
            return None
        raise
    names = train.class_names or tuple(map(str, range(train.classes)))
    same = train.shape == model.shape and names == model.classes
    if same and np.allclose([train.mean, train.std], [model.mean, model.std], rtol=0, atol=SAME):
        return train, test
    if not moved:
        logger.warning(
            "data.root=%s: the training images are not those of the run any more; its test set is evaluated, "
            "and no client",
            data.root,
        )
    return None


def _other_data(model: TrainedModel, data: DataConfig) -> Images:
    """Return other images of the model's classes: the test set; all of a folder of images without one."""
    dataset: Any = None
    if data.dataset == "image_folder":
        from fedddp.data.image_folder import image_folder  # here: torchvision takes seconds to import

        found = image_folder(local_path(data.root, "data.root"), data.test_fraction or 0.5)
        dataset = found[1] if isinstance(found, tuple) else found
    else:
        options: dict[str, Any] = {"download": data.download, "test_fraction": data.test_fraction}
        size = model.shape[1]
        dataset = open_dataset(data.dataset, data.root, image_size=size, examples=data.examples, **options)[1]
    decode.check_map_style(dataset, data.dataset)
    prepared = _Prepared(dataset, model, data)
    return from_dataset(prepared, like=_trained_on(model), memory=data.memory)


class _Prepared(Dataset[tuple[Tensor, int]]):
    """A dataset whose images are resized, and whose labels are matched by name, for a model."""

    def __init__(self, dataset: Any, model: TrainedModel, data: DataConfig) -> None:
        self.dataset, self.model = dataset, model
        labels = decode.labels(dataset, data.dataset)
        names = decode.class_names(dataset, labels)
        nameless = sorted(set(labels.tolist()) - set(range(len(names))))
        if nameless:
            raise ConfigError(
                f"data.dataset={data.dataset}: label {nameless[0]} has no name among its {len(names)} "
                "classes; correct the labels or the list of classes"
            )
        self.samples = getattr(dataset, "samples", None)  # the files, for errors
        self.targets = labels.tolist() if names == model.classes else self._by_name(labels, names, data)

    def _by_name(self, labels: NDArray[np.int64], names: tuple[str, ...], data: DataConfig) -> list[int]:
        """Return the model's label of every example, by the names of the classes."""
        model = self.model
        for whose, listed in (("the model", model.classes), (f"data.dataset={data.dataset}", names)):
            twice = [name for name, count in Counter(listed).items() if count > 1]
            if twice:
                raise ConfigError(
                    f"{whose} has several classes named {twice[0]!r}, so that classes cannot be matched by "
                    "name; give data with the model's list of classes"
                )
        known = {name: label for label, name in enumerate(model.classes)}
        present = {names[label] for label in set(labels.tolist())}
        unknown = sorted(present - known.keys())
        if unknown:
            near = nearest(unknown[0], model.classes)
            several = ", ".join(model.classes[:10]) + (", ..." if len(model.classes) > 10 else "")
            raise ConfigError(
                f"data.root={data.root}: class {unknown[0]!r} is not one of the model's ({several}){near}; "
                "rename or remove it"
            )
        missing = sorted(known.keys() - present)
        if missing:
            logger.warning("data.root=%s has no images of these classes: %s", data.root, ", ".join(missing))
        return [known[names[label]] for label in labels.tolist()]

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return an image of the model's shape and its label among the model's classes."""
        image, _ = decode.as_pair(self.dataset[index], f"example {index}")
        return self.model.pixels(image), self.targets[index]


# ---- the numbers ----


def _central(model: TrainedModel, loader: ClientLoader, batch_size: int) -> tuple[Metrics, Tensor | None]:
    """Return the metrics over all examples of `loader`, and the confusion matrix."""
    confusion = ConfusionMatrix(len(model.classes))

    def observe(batch: Batch, outputs: Tensor) -> None:
        probabilities = model.task.probabilities(outputs)
        if probabilities is not None:
            confusion.add(batch.targets.cpu(), probabilities.argmax(1).cpu())

    everything = np.arange(len(loader.images))
    totals = measure(model.module, model.task, loader, everything, batch_size, observe=observe)
    return model.task.summarize(totals), confusion.result()


def _of_another_round(model: TrainedModel, states: _States, algorithm: str) -> str | None:
    """Return why `states` do not go with `model`, the best of its run; None where they do."""
    of_model = model.metadata.get("round")
    if of_model is None or states.round is None or int(of_model) == states.round:
        return None
    return (
        f"left out: the model is of round {of_model}, but what the clients of {algorithm} keep is there of "
        f"round {states.round} alone; evaluate the final model for the clients"
    )


def _evaluate_clients(
    states: _States | None, model: TrainedModel, config: Config, train: Images, clients: int | None
) -> ClientMetrics:
    """Evaluate each client: on its own model with its `states`, or else on the global one."""
    split, _ = config.data.split(train, config.seed)
    chosen = np.arange(len(split))
    if clients is not None:
        chosen = EvaluationConfig(clients=clients).sample(len(split), config.seed)
    own = None if states is None else _PersonalModel(model, config, states)
    loader = ClientLoader(train, config.data, model.device, seed=config.seed)
    rows: list[Metrics] = []
    for client in chosen.tolist():
        indices: NDArray[np.int64] = split.indices(client)
        if config.data.holdout:
            indices = holdout(indices, config.data.holdout, client, config.seed)[1]
        if not len(indices):
            continue
        module = model.module
        if own is not None and states is not None:
            own.load(states.of_client(client))
            module = own.flat.module
        totals = measure(module, model.task, loader, indices, config.evaluation.batch_size, client)
        metrics = {n: v for n, v in model.task.summarize(totals).items() if isinstance(v, float)}
        rows.append({"client": client, "examples": len(indices), **metrics})
    states_round = states.round if states is not None else None
    return ClientMetrics(rows, bool(config.data.holdout), states is not None, states_round)


class _PersonalModel:
    """A copy of the global model that becomes one client's own after the other."""

    def __init__(self, model: TrainedModel, config: Config, states: _States) -> None:
        module = copy.deepcopy(model.module)
        # A client's state is a flat vector in the memory layout that the run trained with.
        last = states.channels_last
        if last is None:
            record = read_record(states.directory)
            trained_on = record.sessions[-1].device.split()[0] if record and record.sessions else "cpu"
            last = channels_last(config.local, module.cpu(), model.shape, torch.device(trained_on))
        module.to(model.device).to(memory_format=torch.channels_last if last else torch.contiguous_format)
        self.algorithm, self.flat = config.algorithm, FlatModel(module)
        self._global = (
            self.flat.params.clone(),
            self.flat.buffers.clone(),
            self.flat.integer_buffers.clone(),
        )

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Put the global model with what the client keeps into the module."""
        self.flat.load(*self._global)
        self.algorithm.personalize(self.flat, state)


class _States:
    """What clients keep, of the newest intact checkpoint; read when it is needed."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        saved = newest_intact(directory / "checkpoints")
        self.channels_last: bool | None = None if saved is None else saved.metadata.get("channels_last")
        """The memory layout that the run trained with; None where the checkpoint is older and has none."""
        self.round = None if saved is None else int(saved.metadata["round"])
        self._files: dict[int, Path] = {}
        for path in [] if saved is None else saved.files("clients-*.safetensors"):
            with safe_open(path, framework="pt") as opened:
                self._files |= {int(key.split(".", 1)[0]): path for key in opened.keys()}  # noqa: SIM118

    def of_client(self, client: int) -> dict[str, Tensor]:
        """Return the state of `client`; empty where it has none."""
        if client not in self._files:
            return {}
        with safe_open(self._files[client], framework="pt") as opened:
            names = [key for key in opened.keys() if key.split(".", 1)[0] == str(client)]  # noqa: SIM118
            return {key.split(".", 1)[1]: opened.get_tensor(key).clone() for key in names}
