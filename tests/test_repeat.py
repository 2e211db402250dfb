"""The config.yaml that a run leaves repeats the run: the same model, bit for bit, and the same history."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import nn

from fedddp import (
    CohortConfig,
    Config,
    DataConfig,
    EvaluationConfig,
    FeatureShift,
    Federation,
    LocalConfig,
    ModelConfig,
    TrackingConfig,
    load_config,
)
from fedddp.aggregation import Mean, TrimmedMean
from fedddp.algorithms import SCAFFOLD, FedAdam, FedBuff, QFedAvg
from fedddp.algorithms.asynchronous import Hinge
from fedddp.cli import main
from fedddp.data.partition import IID, Dirichlet, LabelQuantity, Partition, PowerLaw
from fedddp.simulation.attacks import GaussianNoise
from fedddp.simulation.clock import LogNormalSpeed, Virtual
from fedddp.storage.history import read_rows

BASE = Config(
    data=DataConfig(clients=8, examples=300),
    local=LocalConfig(batch_size=20, lr=0.07),
    cohort=CohortConfig(size=3),
    rounds=3,
    seed=5,
    tracking=TrackingConfig(trackers=[], progress=False),
)
CASES: dict[str, dict[str, Any]] = {
    "state on clients": {
        "algorithm": SCAFFOLD(),
        "data": DataConfig(clients=8, examples=300, partition=Dirichlet(alpha=0.2), holdout=0.25),
        "evaluation": EvaluationConfig(every=2, clients=4, batch_size=64),
    },
    "state on the server": {
        "algorithm": FedAdam(lr=0.01),
        "local": LocalConfig(steps=3, batch_size=20, lr=0.05, schedule="cosine"),
        "model": ModelConfig(name="2nn"),
        "cohort": CohortConfig(size=3, sampling="poisson"),
    },
    "malicious clients and a robust rule": {
        "attacks": GaussianNoise(fraction=0.3),
        "aggregation": TrimmedMean(beta=0.34),
        "data": DataConfig(clients=8, examples=300, partition=LabelQuantity(classes=3)),
    },
    "random images and losses that weigh": {
        "algorithm": QFedAvg(q=0.7),
        "data": DataConfig(
            clients=8,
            examples=300,
            partition=PowerLaw(exponent=1.2),
            augment="crop-flip",
            feature_shift=FeatureShift(rotation=20.0, noise=0.05),
        ),
        "aggregation": Mean(on_invalid_update="skip", sums="float32"),
    },
    "asynchronous": {
        "algorithm": FedBuff(buffer_size=2, staleness=Hinge(a=0.5, b=1)),
        "clock": Virtual(speed=LogNormalSpeed(sigma=1.0)),
    },
}


def config_of(case: str) -> Config:
    return dataclasses.replace(BASE, **CASES[case])


def rows(folder: Path) -> list[dict[str, Any]]:
    """Return the history without what depends on the machine."""
    timed = "time/virtual"
    return [
        {name: value for name, value in row.items() if not name.startswith("time/") or name == timed}
        for row in read_rows(folder / "history.jsonl")
    ]


def assert_repeats(first: Path, second: Path) -> None:
    """Compare the models and the histories of two run directories."""
    model, again = (load_file(folder / "model.safetensors") for folder in (first, second))
    assert model.keys() == again.keys()
    for name, tensor in model.items():
        assert torch.equal(tensor, again[name]), name
    assert len(rows(first)) == BASE.rounds
    assert rows(first) == rows(second)


@pytest.mark.parametrize("case", CASES)
def test_federation_repeats_a_run_from_its_config_yaml(case: str) -> None:
    config = config_of(case)
    first = Federation(config, output="first").run().folder
    start = config.model.build(classes=10, shape=(1, 8, 8), seed=config.seed)
    trained = load_file(first / "model.safetensors")
    assert moved(start, trained) > 0.05, "the run trained"
    read = load_config(str(first / "config.yaml"))
    assert read == dataclasses.replace(config, output="first", name=first.name)
    second = Federation(read, output="second").run().folder
    assert second == Path("second") / first.name
    assert_repeats(first, second)
    one, two = (yaml.safe_load((folder / "config.yaml").read_text()) for folder in (first, second))
    assert {**one, "output": "second"} == two


def moved(start: nn.Module, trained: dict[str, torch.Tensor]) -> float:
    """Return how far the parameters are from those of `start`."""
    return sum(float((trained[name] - p.detach()).norm()) for name, p in start.named_parameters())


@pytest.mark.parametrize("partition", [IID(), Dirichlet(alpha=0.3)], ids=repr)
@pytest.mark.parametrize("workers", [0, 1])
def test_streamed_images_train_the_same_bits_as_held_ones(partition: Partition, workers: int) -> None:
    """Of clients of one size and of several sizes, whose passes must not take each other's images."""
    data = DataConfig(clients=8, examples=300, partition=partition, memory="device", augment="crop")
    local = LocalConfig(batch_size=9, epochs=2, lr=0.07)
    held = Federation(BASE, data=data, local=local, output="held").run().folder
    data = dataclasses.replace(data, memory="stream", workers=workers)
    streamed = Federation(BASE, data=data, local=local, output="streamed").run().folder
    assert_repeats(held, streamed)


def test_the_command_line_repeats_a_run_of_flags_from_its_config_yaml() -> None:
    flags = (
        "--rounds 3 --seed 5 --data.examples 300 --data.clients 8 --cohort.size 3 --local.lr 0.07 "
        "--data.partition Dirichlet --data.partition.alpha 0.2 --algorithm FedProx --algorithm.mu 0.3 "
        "--tracking.trackers [] --tracking.progress false"
    )
    assert exit_code(f"run digits {flags} --output first") == 0
    assert exit_code("run first/digits/config.yaml --output second") == 0
    assert_repeats(Path("first/digits"), Path("second/digits"))
    assert exit_code("run first/digits/config.yaml --output third --seed 6") == 0
    with pytest.raises(AssertionError):  # the comparison distinguishes runs
        assert_repeats(Path("first/digits"), Path("third/digits"))


def exit_code(command: str) -> object:
    """Return the exit code of `fedddp COMMAND`."""
    with pytest.raises(SystemExit) as stop:
        main(command.split())
    return stop.value.code


def test_a_run_from_the_config_yaml_of_its_own_directory_is_refused_in_one_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = Federation(BASE, output="first", rounds=1).run().folder
    model = (folder / "model.safetensors").read_bytes()
    capsys.readouterr()
    assert exit_code(f"run {folder}/config.yaml") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: name: {folder} holds a run already")
    assert (folder / "model.safetensors").read_bytes() == model
