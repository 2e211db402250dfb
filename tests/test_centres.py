"""Each centre is tested on its own part of the test set; the pooled test stays as it is."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from fedddp import (
    CohortConfig,
    Config,
    ConfigError,
    DataConfig,
    EvaluationConfig,
    Federation,
    LocalConfig,
    Result,
    TrackingConfig,
    load_config,
)
from fedddp.algorithms import Ditto
from fedddp.config.baselines import Baseline
from fedddp.data.datasets import Images, from_dataset
from fedddp.data.partition import IID, Natural
from fedddp.storage.history import read_rows
from fedddp.training.clients import clients_of

TRAINED = ("north", "south", "east") * 8
TESTED = ("west", "south", "north", "south", "north", "south", "north", "west", "south")
"""The east has no test data, and the west no training data."""


class Centres(Dataset[tuple[Tensor, int]]):
    """Random images of random classes, each of a centre."""

    def __init__(self, owners: Sequence[str] | None, examples: int, seed: int) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.images = torch.randint(256, (examples, 1, 4, 4), generator=draw, dtype=torch.uint8)
        self.targets = torch.randint(3, (examples,), generator=draw).tolist()
        self.classes = ["a", "b", "c"]
        if owners is not None:
            self.ids = list(owners)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], self.targets[index]


TRAIN, TEST = Centres(TRAINED, 24, 1), Centres(TESTED, 9, 2)

BASE = Config(
    data=DataConfig(clients=3, partition=Natural()),
    local=LocalConfig(epochs=3, batch_size=4, lr=0.3),
    cohort=CohortConfig(size=3),
    evaluation=EvaluationConfig(clients=3, every=2),
    tracking=TrackingConfig(trackers=[], progress=False),
    rounds=2,
)


def net() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(16, 3))


def run(output: Path, test: Centres = TEST, **changes: Any) -> Result:
    config = dataclasses.replace(BASE, output=str(output), **changes)
    return Federation(config, module=net(), train=TRAIN, test=test).run()


def measured(module: nn.Module, centre: str) -> tuple[float, float]:
    """Return accuracy and loss on the centre's test examples, in a plain loop."""
    mean, std = (from_dataset(TRAIN).mean, from_dataset(TRAIN).std)
    right, loss, examples = 0, 0.0, 0
    for index, owner in enumerate(TESTED):
        if owner == centre:
            image = (TEST.images[index].double() / 255 - mean[0]) / std[0]
            logits = module.double()(image[None])[0].detach()
            right += int(logits.argmax()) == TEST.targets[index]
            loss -= float(logits.log_softmax(0)[TEST.targets[index]])
            examples += 1
    return right / examples, loss / examples


@pytest.mark.parametrize("baseline", ["none", "pooled"])
@pytest.mark.parametrize("held_out", [0.0, 0.3])
def test_each_centre_is_measured_on_its_own_test_examples_whatever_is_held_out(
    tmp_path: Path, baseline: Baseline, held_out: float, caplog: pytest.LogCaptureFixture
) -> None:
    data = dataclasses.replace(BASE.data, holdout=held_out)
    with caplog.at_level(logging.INFO, "fedddp"):
        result = run(tmp_path, data=data, baseline=baseline)
    rows = read_rows(result.folder / "clients.jsonl")
    assert [(row["round"], row["client"], row["name"], row["examples"]) for row in rows] == [
        (2, 1, "north", 3),
        (2, 2, "south", 4),
    ]
    for row in rows:
        accuracy, loss = measured(result.model, row["name"])
        assert row["accuracy"] == pytest.approx(accuracy)
        assert row["loss"] == pytest.approx(loss, rel=1e-5)
    mean = np.mean([row["accuracy"] for row in rows])
    assert result.history[-1]["clients/accuracy_mean"] == pytest.approx(mean)
    everyone = sum(measured(result.model, centre)[1] * TESTED.count(centre) for centre in set(TESTED))
    assert result.history[-1]["eval/loss"] == pytest.approx(everyone / len(TESTED), rel=1e-5)
    line = "1 of the 3 clients to evaluate have no examples to evaluate on, and are left out: east"
    assert caplog.text.count(line) == 1


def test_a_client_with_a_model_of_its_own_is_measured_with_that(tmp_path: Path) -> None:
    result = run(tmp_path, baseline="local")
    rows = {row["name"]: row["loss"] for row in read_rows(result.folder / "clients.jsonl")}
    ditto = run(tmp_path / "ditto", algorithm=Ditto(lam=0.0))  # pulled by nothing: as if alone
    others = {row["name"]: row["loss"] for row in read_rows(ditto.folder / "clients.jsonl")}
    assert rows == pytest.approx(others, rel=1e-5)
    assert measured(ditto.model, "south")[1] != pytest.approx(rows["south"], rel=1e-2)


def test_without_owners_of_test_examples_clients_are_measured_on_what_is_held_out(tmp_path: Path) -> None:
    ownerless = Centres(None, 9, 2)
    data = dataclasses.replace(BASE.data, holdout=0.25)
    rows = read_rows(run(tmp_path, ownerless, data=data).folder / "clients.jsonl")
    assert [(row["client"], row["name"], row["examples"]) for row in rows] == [
        (0, "east", 2),
        (1, "north", 2),
        (2, "south", 2),
    ]


@pytest.mark.parametrize("owners", [None, ["west"] * 9])
def test_clients_that_own_no_test_data_and_hold_nothing_out_are_refused(
    tmp_path: Path, owners: Sequence[str] | None
) -> None:
    line = r"evaluation.clients=3 needs local data .*data.holdout=0 and no example of the test set"
    with pytest.raises(ConfigError, match=line) as refused:
        run(tmp_path, Centres(owners, 9, 2))
    assert "\n" not in str(refused.value)
    assert not list(tmp_path.glob("*/history.jsonl"))


def test_where_clients_are_not_natural_something_must_be_held_out() -> None:
    with pytest.raises(ConfigError, match="needs held-out local data, but data.holdout=0; set data.holdout"):
        load_config(None, ["--evaluation.clients", "3"])
    images = from_dataset(TRAIN)
    mixed = dataclasses.replace(
        BASE, data=DataConfig(clients=3, partition=IID(), holdout=0.2), evaluation=EvaluationConfig(clients=3)
    )
    clients = clients_of(mixed, images, from_dataset(TEST, like=images))
    assert clients.tests is None
    assert not clients.names


def images(ids: Sequence[int], owners: tuple[str, ...]) -> Images:
    count = len(ids)
    pixels = torch.zeros(count, 1, 2, 2, dtype=torch.uint8)
    return Images(
        *(np.arange(count) % 2, 2, (1, 2, 2), pixels, None, np.array(ids), (0.5,), (0.5,)), owners=owners
    )


def test_a_client_owns_the_test_examples_with_its_number_also_where_numbers_have_gaps() -> None:
    train = images([7, 3, 7, 11, 3], tuple(f"c{n}" for n in range(12)))
    test = images([11, 0, 3, 5, 11, 40, 3, 3], train.owners)
    clients = clients_of(BASE, train, test)
    assert [clients.evaluated(k).tolist() for k in range(3)] == [[2, 6, 7], [], [0, 4]]
    assert clients.evaluated_sizes().tolist() == [3, 0, 2]
    assert clients.names == ("c3", "c7", "c11")
    assert [clients.training(k).tolist() for k in range(3)] == [[1, 4], [0, 2], [3]]


def test_the_split_of_a_pooled_run_is_that_of_its_clients(tmp_path: Path) -> None:
    splits = [
        json.loads((run(tmp_path / kind, baseline=kind).folder / "split.json").read_text())
        for kind in ("none", "pooled")
    ]
    assert splits[0] == splits[1]
    assert splits[0]["clients"] == 3
