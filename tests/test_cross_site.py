"""The cross-site matrix against plain loops over the states in the checkpoint."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import Dataset

from fedddp import (
    CohortConfig,
    Config,
    ConfigError,
    DataConfig,
    EvaluationConfig,
    Federation,
    LocalConfig,
    ModelConfig,
    Result,
    TrackingConfig,
)
from fedddp.algorithms import Ditto, FedBN, FedPer
from fedddp.data.datasets import from_dataset
from fedddp.data.partition import Natural
from fedddp.inference import cross_site as module
from fedddp.inference.cross_site import cross_site, write_cross_site
from fedddp.inference.loading import server_model
from fedddp.tasks import Segmentation


class Sites(Dataset[tuple[Tensor, Any]]):
    """Images of three sites, of which the test set lacks one; brighter from site to site."""

    def __init__(self, train: bool, masks: bool = False) -> None:
        draw = torch.Generator().manual_seed(int(train))
        self.ids = ["a", "b", "c"] * 6 if train else ["c", "a", "c", "a", "c"]
        self.targets = torch.randint(3, (len(self.ids),), generator=draw).tolist()
        self.images = torch.randint(100, (len(self.ids), 1, 8, 8), generator=draw, dtype=torch.uint8)
        self.masks = torch.randint(3, (len(self.ids), 8, 8), generator=draw, dtype=torch.uint8)
        self.classes, self.with_masks = ["x", "y", "z"], masks

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        image = self.images[index] + 50 * "abc".index(self.ids[index])
        return image, self.masks[index] if self.with_masks else self.targets[index]

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)


def labelled(root: str, train: bool) -> Dataset[Any]:
    return Sites(train)


def masked(root: str, train: bool) -> Dataset[Any]:
    sites = Sites(train, masks=True)
    del sites.targets
    return sites


BASE = Config(
    data=DataConfig(dataset="test_cross_site.labelled", clients=3, partition=Natural()),
    model=ModelConfig(name="2nn"),
    local=LocalConfig(epochs=2, batch_size=4, lr=0.2),
    cohort=CohortConfig(size=3),
    evaluation=EvaluationConfig(clients=3),
    tracking=TrackingConfig(trackers=[], progress=False),
    rounds=2,
)


def run(output: Path, **changes: Any) -> Result:
    return Federation(dataclasses.replace(BASE, output=str(output), **changes)).run()


def states_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "checkpoints" / "round-00002" / "clients-00000.safetensors")


def inputs(test: bool) -> Tensor:
    """Return the normalised images of a set, (n, 1, 8, 8)."""
    train = from_dataset(Sites(True))
    data = Sites(not test)
    pixels = torch.stack([data[index][0] for index in range(len(data))])
    return (pixels.float() / 255 - train.mean[0]) / train.std[0]


@pytest.mark.parametrize(
    ("changes", "rewrites"),
    [
        ({"baseline": "local"}, "params"),
        ({"algorithm": Ditto()}, "params"),
        ({"algorithm": FedPer()}, "layers"),
    ],
    ids=["local", "Ditto", "FedPer"],
)
def test_a_row_is_a_client_s_own_model_on_the_data_of_each_client(
    tmp_path: Path, changes: dict[str, Any], rewrites: str
) -> None:
    result = run(tmp_path, **changes)
    found = cross_site(result.folder, server_model(result.folder))
    assert (found.clients, found.names, found.metric, found.round) == ([0, 2], ["a", "c"], "accuracy", 2)
    assert found.examples.tolist() == [2, 3]
    data, states, x = Sites(False), states_of(result.folder), inputs(test=True)
    for i, client in enumerate(found.clients):
        net = server_model(result.folder).module.eval()
        last = list(net.parameters()) if rewrites == "params" else list(net.parameters())[-2:]
        flat, start = states[f"{client}.{rewrites}"], 0
        for parameter in last:
            parameter.data.copy_(flat[start : start + parameter.numel()].view_as(parameter))
            start += parameter.numel()
        assert start == len(flat)
        for j, site in enumerate(found.names):
            mine = [index for index, owner in enumerate(data.ids) if owner == site]
            right = sum(int(net(x[index][None]).argmax()) == data.targets[index] for index in mine)
            assert found.matrix[i, j] == right / len(mine)
    assert len(np.unique(found.matrix)) > 1
    if rewrites == "layers" or "baseline" in changes:
        assert found.global_row is None
    else:
        net = server_model(result.folder).module.eval()
        mine = [index for index, owner in enumerate(data.ids) if owner == "c"]
        right = sum(int(net(x[index][None]).argmax()) == data.targets[index] for index in mine)
        assert found.global_row is not None
        assert found.global_row[1] == right / len(mine)


def test_the_diagonal_is_what_the_run_measured(tmp_path: Path) -> None:
    result = run(tmp_path, algorithm=FedBN(), model=ModelConfig(name="resnet8-gn", norm="batch"))
    found = cross_site(result.folder, server_model(result.folder), metric="loss")
    rows = [json.loads(line) for line in (result.folder / "clients.jsonl").read_text().splitlines()][-2:]
    assert found.clients == [row["client"] for row in rows]
    np.testing.assert_allclose(found.matrix.diagonal(), [row["loss"] for row in rows], rtol=1e-5)


def test_masks_have_a_matrix_of_their_own_metric(tmp_path: Path) -> None:
    result = run(
        tmp_path,
        data=dataclasses.replace(BASE.data, dataset="test_cross_site.masked"),
        model=ModelConfig(name="unet", norm="batch"),
        task=Segmentation(),
        algorithm=FedBN(),
    )
    found = cross_site(result.folder, server_model(result.folder))
    assert found.metric == "iou"
    rows = [json.loads(line) for line in (result.folder / "clients.jsonl").read_text().splitlines()][-2:]
    np.testing.assert_allclose(found.matrix.diagonal(), [row["iou"] for row in rows], rtol=1e-6)


def test_the_file_has_all_of_it(tmp_path: Path) -> None:
    result = run(tmp_path, algorithm=Ditto())
    steps: list[tuple[int, int]] = []
    found = cross_site(result.folder, server_model(result.folder), progress=lambda *s: steps.append(s))
    assert steps == [(1, 2), (2, 2)]
    gap = found.matrix.copy()
    gap[0, 1] = np.nan
    measured = {**found.measured, "accuracy": (gap, found.global_row)}
    other = dataclasses.replace(found, measured=measured, metric="loss")  # what is shown changes no file
    file = write_cross_site(result.folder, other)
    content = json.loads(file.read_text())
    assert file.name == "cross-site.json"
    assert content["matrix"] == [[found.matrix[0, 0], None], found.matrix[1].tolist()]
    assert content["global"] == (None if found.global_row is None else found.global_row.tolist())
    assert content["others"].keys() == {"loss"}
    assert content["others"]["loss"]["matrix"] == other.matrix.tolist()
    assert [content[key] for key in ("metric", "clients", "names", "examples", "round")] == [
        *("accuracy", [0, 2], ["a", "c"], [2, 3], 2)
    ]


def test_of_many_clients_some_are_drawn_by_the_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    data = DataConfig(dataset="digits", clients=12, holdout=0.2, examples=240)
    result = run(tmp_path, data=data, baseline="local", rounds=2)
    monkeypatch.setattr(module, "MOST", 4)
    with caplog.at_level(logging.INFO, "fedddp"):
        found = cross_site(result.folder, server_model(result.folder))
    assert "4 of 12 clients are evaluated, drawn by the seed of the run" in caplog.text
    assert found.clients == sorted(set(found.clients))
    assert found.matrix.shape == (4, 4)
    assert found.names == list(map(str, found.clients))
    assert cross_site(result.folder, server_model(result.folder)).clients == found.clients


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "with algorithm=FedAvg clients have no models of their own"),
        ({"baseline": "pooled"}, "with baseline=pooled clients have no models"),
        (
            {
                "algorithm": Ditto(),
                "data": DataConfig(dataset="digits", clients=3, examples=60),
                "evaluation": EvaluationConfig(),
            },
            "have no data to evaluate on; train one with data.holdout",
        ),
    ],
)
def test_runs_without_models_or_data_of_clients_are_refused(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    result = run(tmp_path, **changes)
    with pytest.raises(ConfigError, match=words) as refused:
        cross_site(result.folder, server_model(result.folder))
    assert "\n" not in str(refused.value)


def test_clients_that_were_never_trained_are_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cohort = CohortConfig(size=1)
    for wanted in ({0}, {1}):
        seed = next(s for s in range(99) if {int(cohort.sample(3, s, i)[0]) for i in range(2)} == wanted)
        result = run(tmp_path / str(seed), algorithm=Ditto(), cohort=cohort, seed=seed)
        assert {int(name.split(".")[0]) for name in states_of(result.folder)} == wanted
        if wanted == {1}:  # which has nothing to evaluate on
            with pytest.raises(ConfigError, match="no client with data to evaluate on was trained"):
                cross_site(result.folder, server_model(result.folder))
            continue
        with caplog.at_level(logging.INFO, "fedddp"):
            assert cross_site(result.folder, server_model(result.folder)).clients == [0]
        assert "1 of 2 clients were never trained, and are left out" in caplog.text


def test_other_metrics_and_other_data_are_refused(tmp_path: Path) -> None:
    result = run(tmp_path, algorithm=Ditto())
    with pytest.raises(ConfigError, match="metric=dice is not measured; give one of loss, accuracy"):
        cross_site(result.folder, server_model(result.folder), metric="dice")
    with pytest.raises(ConfigError, match="these are not the data"):
        cross_site(result.folder, server_model(result.folder), ["--data.dataset", "digits"])
