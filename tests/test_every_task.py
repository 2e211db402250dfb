"""Every algorithm trains on masks, labels and boxes; personalised ones keep what is theirs."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import rig
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from fedddp import (
    CohortConfig,
    Config,
    ConfigError,
    DataConfig,
    EvaluationConfig,
    FeatureShift,
    LocalConfig,
    ModelConfig,
    TopologyConfig,
    load_config,
)
from fedddp.algorithms import (
    Algorithm,
    AsynchronousAlgorithm,
    Ditto,
    FedAvg,
    FedBN,
    FedPer,
)
from fedddp.data.targets import Target
from fedddp.distributed.launch import connect
from fedddp.models.zoo import SMALL_MODELS
from fedddp.section import choices
from fedddp.simulation.attacks import GaussianNoise, SignFlip
from fedddp.storage.history import read_rows
from fedddp.tasks import Detection, MultiLabel, Segmentation, Task
from fedddp.testing import run_world
from fedddp.training.asynchronous.coordinator import run_asynchronous
from fedddp.training.objects import Objects
from fedddp.training.synchronous import run_rounds

SIZE = {"multilabel": 12, "mask": 12, "boxes": 32}
MODELS = {"multilabel": "resnet8-gn", "mask": "unet", "boxes": "retinanet-tiny"}
TASKS: dict[Target, type[Task]] = {"multilabel": MultiLabel, "mask": Segmentation, "boxes": Detection}


class Labelled(Dataset[Any]):
    """Ten noisy images with targets of a kind, of two classes; images of clients differ in brightness."""

    classes = ("dark", "bright")

    def __init__(self, target: Target) -> None:
        draw = torch.Generator().manual_seed(7)
        size = SIZE[target]
        self.target = target
        self.images = torch.randint(256, (10, 3, size, size), dtype=torch.uint8, generator=draw)
        self.sides = torch.randint(size // 4, size // 2, (10, 2), generator=draw).tolist()
        self.targets = torch.randint(2, (10, 2), generator=draw).tolist()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        image, (width, height) = self.images[index], self.sides[index]
        if self.target == "multilabel":
            return image, self.targets[index]
        if self.target == "mask":
            mask = torch.zeros(image.shape[1:], dtype=torch.uint8)
            mask[1:height, 1:width] = 1
            return image, mask
        boxes = torch.tensor([[1.0, 2.0, 1.0 + width, 2.0 + height]])
        return image, {"boxes": boxes, "labels": torch.tensor([index % 2])}


class Small(nn.Module):
    """A few layers for a target: with batch norm, and with heads that an algorithm can find."""

    def __init__(self, target: Target) -> None:
        super().__init__()
        self.target = target
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.classes: nn.Module = nn.Linear(4, 2) if target == "multilabel" else nn.Conv2d(4, 2, 1)
        if target == "boxes":
            self.boxes = nn.Conv2d(4, 4, 1)
            self.head_layers = ("boxes", "classes")
        corners = torch.arange(0.0, SIZE[target], 8)
        left, top = (grid.flatten() for grid in torch.meshgrid(corners, corners, indexing="xy"))
        self.register_buffer("anchors", torch.stack([left, top, left + 12, top + 12], 1), persistent=False)

    def forward(self, images: Tensor) -> Any:
        maps = self.body(images)
        if self.target == "multilabel":
            return self.classes(maps.mean((2, 3)))
        if self.target == "mask":
            return self.classes(maps)
        maps = F.avg_pool2d(maps, 8)
        outputs = (head(maps).flatten(2).transpose(1, 2) for head in (self.classes, self.boxes))
        return {**dict(zip(("cls_logits", "bbox_regression"), outputs, strict=True)), "anchors": self.anchors}


@functools.cache
def data_of(target: Target) -> Labelled:
    return Labelled(target)


def config_of(target: Target, algorithm: Algorithm, **changes: Any) -> Config:
    """Return two rounds of three clients, with a model that has batch norm."""
    required = algorithm.requires(LocalConfig())
    local = LocalConfig(**{"batch_size": 2, "lr": 0.02, **required})  # type: ignore[arg-type]
    asynchronous = isinstance(algorithm, AsynchronousAlgorithm)
    config = Config(
        data=DataConfig(clients=3, holdout=0.3),
        model=ModelConfig(name=MODELS[target], norm="batch"),
        task=TASKS[target](),
        local=local,
        cohort=CohortConfig(size=2 if asynchronous else 3),
        algorithm=algorithm,
        evaluation=EvaluationConfig(clients=3, every=2),
        rounds=2,
        tracking=rig.config_of(FedAvg(), rig.LOCAL).tracking,
    )
    return dataclasses.replace(config, **changes)


class Trained(NamedTuple):
    """What a run trained."""

    start: Tensor
    """The server's vectors before the first round."""
    server: Tensor
    """And after the last."""
    kept: dict[int, dict[str, Tensor]]
    """What clients keep."""
    row: dict[str, Any]
    """The metrics of the last evaluation."""


def train(configs: Mapping[str, Config], folder: str, small: bool = False) -> dict[str, Trained]:
    """Train every configuration on this world; `small`: a small network instead of the configuration's."""
    results: dict[str, Trained] = {}
    with contextlib.closing(connect(TopologyConfig(device="cpu"))) as world:
        for name, config in configs.items():
            data = data_of(config.task.target)
            objects = Objects(Small(config.task.target) if small else None, data, data)
            session = rig.session_of(config, world, Path(folder) / name, objects)
            start = torch.cat([session.server.params, session.server.buffers])
            loop = run_asynchronous if isinstance(config.algorithm, AsynchronousAlgorithm) else run_rounds
            loop(session)
            row = session.evaluate(config.rounds)
            rows = read_rows(Path(folder) / name / "clients.jsonl") if world.is_coordinator else []
            row["losses"] = [client["loss"] for client in rows]
            session.tracker.finish()
            kept = {k: v for part in world.gather(session.states.kept) for k, v in part.items()}
            server = torch.cat([session.server.params, session.server.buffers])
            results[name] = Trained(start, server, kept, row)
    return results


ALGORITHMS = {name: kind for name, kind in choices(Algorithm).items() if "." not in name}
CASES = [(target, name) for target in TASKS for name in ALGORITHMS if (target, name) != ("boxes", "MOON")]


@pytest.mark.parametrize(("target", "name"), CASES)
def test_every_algorithm_trains_on_every_task(target: Target, name: str, tmp_path: Path) -> None:
    options = {"buffer_size": 2} if name == "FedBuff" else {}
    config = config_of(target, ALGORITHMS[name](**options))
    run = train({name: config}, str(tmp_path), small=True)[name]
    assert torch.isfinite(run.server).all()
    assert not torch.equal(run.server, run.start), "the model has learned"
    assert ("eval/loss" in run.row) is config.algorithm.has_global_model
    assert any(key.startswith("clients/") for key in run.row)


PERSONAL: dict[str, dict[str, Any]] = {
    "FedAvg": {"algorithm": FedAvg()},
    "FedBN": {"algorithm": FedBN()},
    "FedPer": {"algorithm": FedPer()},
    "Ditto": {"algorithm": Ditto(lam=0.5)},
    "local": {"baseline": "local"},
    "pooled": {"baseline": "pooled"},
}


KEEPING = {"FedBN": "layers", "FedPer": "layers", "Ditto": "params", "local": "params"}
"""Where clients keep something, and a name that it has."""


@functools.cache
def personalised(target: Target, groups: int, folder: str) -> dict[str, Trained]:
    base = config_of(target, FedAvg())
    configs = {name: dataclasses.replace(base, **changes) for name, changes in PERSONAL.items()}
    return run_world(train, configs, f"{folder}/{target}{groups}", size=groups)[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("runs"))


@pytest.mark.parametrize("target", TASKS)
@pytest.mark.parametrize("name", PERSONAL)
def test_personalised_algorithms_have_the_same_bits_for_any_number_of_groups(
    target: Target, name: str, folder: str
) -> None:
    one, two = (personalised(target, groups, folder)[name] for groups in (1, 2))
    rig.assert_same_bits((one.server, one.kept), (two.server, two.kept))
    assert set(one.kept) == ({0, 1, 2} if name in KEEPING else set())


@pytest.mark.parametrize("target", TASKS)
def test_personalised_algorithms_differ_from_fedavg_where_they_should(target: Target, folder: str) -> None:
    found = personalised(target, 1, folder)
    models = {name: run.server for name, run in found.items()}
    torch.testing.assert_close(models["Ditto"], models["FedAvg"], rtol=1e-4, atol=1e-5)  # the global model
    for name in ("FedBN", "FedPer", "local", "pooled"):
        assert not torch.equal(models[name], models["FedAvg"])
    assert torch.equal(models["local"], found["local"].start)
    losses = {tuple(run.row["losses"]) for run in found.values()}
    assert len(losses) == len(PERSONAL), "each evaluates other models"
    for name, mine in KEEPING.items():
        states = found[name].kept
        assert not torch.equal(states[0][mine], states[1][mine]), "what clients keep is their own"


@pytest.mark.parametrize(
    ("target", "heads"),
    [
        ("mask", ["head"]),
        ("boxes", ["head.regression_head.bbox_reg", "head.classification_head.cls_logits"]),
    ],
)
def test_fedper_keeps_the_last_convolutions(target: Target, heads: list[str], folder: str) -> None:
    size = SIZE[target]
    module = SMALL_MODELS[MODELS[target]](2, (3, size, size))
    names = FedPer().local_names(module)
    assert names == {f"{head}.{kind}" for head in heads for kind in ("weight", "bias")}
    length = sum(p.numel() for name, p in module.named_parameters() if name in names)
    assert personalised(target, 1, folder)["FedPer"].kept[0]["layers"].numel() == length


# ---- what has no meaning ----


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--task Segmentation --attacks LabelFlip", "attacks=LabelFlip changes the class .* masks; use"),
        ("--task MultiLabel --attacks LabelFlip", "task=MultiLabel learns several labels"),
        ("--task Detection --attacks ModelReplacement", "attacks=ModelReplacement .* boxes"),
        (
            "--task Detection --data.feature_shift.rotation 20",
            "data.feature_shift.rotation=20 turns images, but a turned box is no box",
        ),
        ("--task Detection --algorithm MOON", "algorithm=MOON compares one vector of features per image"),
    ],
)
def test_settings_for_other_targets_are_refused_in_one_line(flags: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as refused:
        load_config(None, flags.split())
    assert "\n" not in str(refused.value)


def test_what_has_a_meaning_is_not_refused() -> None:
    for target in TASKS:
        config_of(target, FedAvg(), attacks=SignFlip())
        config_of(target, FedAvg(), attacks=GaussianNoise())
        shift = FeatureShift(color=0.1, noise=0.1, rotation=0.0 if target == "boxes" else 30.0)
        config_of(target, FedAvg(), data=DataConfig(clients=3, holdout=0.3, feature_shift=shift))
