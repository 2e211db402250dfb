"""Every task keeps fedddp's promises: R ranks train what one trains; any G, any resume, the same bits."""

from __future__ import annotations

import dataclasses
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from fedddp import (
    CohortConfig,
    Config,
    DataConfig,
    EvaluationConfig,
    Federation,
    LocalConfig,
    ModelConfig,
    TopologyConfig,
    TrackingConfig,
)
from fedddp.data.partition import Natural
from fedddp.tasks import Classification, Detection, MultiLabel, Segmentation, Task
from fedddp.testing import run_world

TASKS: dict[str, tuple[Task, str, str]] = {
    "classification": (Classification(), "resnet8-gn", "crop-flip"),
    "multilabel": (MultiLabel(), "resnet8-gn", "color-crop"),
    "segmentation": (Segmentation(dice=0.5), "unet", "color-crop-flip"),
    "detection": (Detection(), "retinanet-tiny", "crop-flip"),
}
"""Task, model and augmentation."""


def config(name: str, folder: Path, ranks: int = 1, **changes: Any) -> Config:
    task, model, augment = TASKS[name]
    return Config(
        data=DataConfig(
            dataset="scenes",
            examples=60,
            image_size=32,
            clients=20,
            partition=Natural(),
            augment=augment,  # type: ignore[arg-type]
            holdout=0.2,
        ),
        task=task,
        model=ModelConfig(name=model),
        local=LocalConfig(epochs=1, batch_size=3, lr=0.02),
        cohort=CohortConfig(size=3),
        evaluation=EvaluationConfig(every=2, batch_size=7, clients=5),
        topology=TopologyConfig(ranks_per_client=ranks, device="cpu"),
        tracking=TrackingConfig(trackers=[], progress=False, report=False),
        rounds=2,
        output=str(folder),
        name=f"{name}-{ranks}",
        **changes,
    )


Trained = tuple[dict[str, torch.Tensor], dict[str, Any]]


def train(one: Config) -> Trained:
    """Return the weights, and the last row without seconds."""
    result = Federation(one).run()
    last = result.history[-1] if result.history else {}
    state = {key: tensor.detach().clone() for key, tensor in result.model.state_dict().items()}
    return state, {key: value for key, value in last.items() if not key.startswith("time/")}


def train_all(folder: str, ranks: int) -> dict[str, Trained]:
    return {name: train(config(name, Path(folder), ranks)) for name in TASKS}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Trained]]:
    """Return the output folder and what one rank trains."""
    folder = tmp_path_factory.mktemp("alone")
    return folder, run_world(train_all, str(folder), 1, size=1)[0]


def numbers(row: dict[str, Any], prefix: str) -> list[float]:
    found: list[float] = []
    for key in sorted(row):
        value = row[key] if isinstance(row[key], list) else [row[key]]
        found += [-1.0 if v is None else float(v) for v in value] if key.startswith(prefix) else []
    return found


def test_two_groups_give_the_same_bits_and_metrics(
    alone: tuple[Path, dict[str, Trained]], tmp_path: Path
) -> None:
    found = run_world(train_all, str(tmp_path), 1, size=2)[0]
    for name, (state, row) in alone[1].items():
        assert all(torch.equal(tensor, found[name][0][key]) for key, tensor in state.items()), name
        for prefix in ("eval/", "clients/"):
            assert numbers(found[name][1], prefix) == pytest.approx(numbers(row, prefix), abs=1e-12), name
        assert numbers(row, "clients/")
        rows = [
            (path / "clients.jsonl").read_text() for path in (tmp_path / f"{name}-1", alone[0] / f"{name}-1")
        ]
        assert rows[0] == rows[1]


def test_two_ranks_train_what_one_rank_trains(alone: tuple[Path, dict[str, Trained]], tmp_path: Path) -> None:
    found = run_world(train_all, str(tmp_path), 2, size=2)[0]
    for name, (state, row) in alone[1].items():
        for key, tensor in state.items():
            torch.testing.assert_close(
                found[name][0][key], tensor, atol=1e-5, rtol=1e-5, msg=f"{name}: {key}"
            )
        assert found[name][1]["train/loss"] == pytest.approx(row["train/loss"], rel=1e-5)
        assert found[name][1]["eval/loss"] == pytest.approx(row["eval/loss"], rel=1e-4)


def test_the_page_about_metrics_lists_those_of_every_task(alone: tuple[Path, dict[str, Trained]]) -> None:
    page = (Path(__file__).parent.parent / "docs" / "metrics.md").read_text()
    table = re.findall(r"^\| `(eval/\w+)` \| (.*?) \|", page.partition("## Other tasks")[2], re.MULTILINE)
    for name, (_, row) in alone[1].items():
        if name == "classification":
            continue
        kind = type(TASKS[name][0]).__name__
        listed = [key for key, tasks in table if tasks == "all" or f"`{kind}`" in tasks]
        assert sorted(key for key in row if key.startswith("eval/")) == sorted(listed)
        score = next(key for key in listed if "per_class" not in key).removeprefix("eval/")
        spread = {key for key in row if key.startswith(f"clients/{score}_")}
        assert spread == {f"clients/{score}_{part}" for part in ("mean", "worst10", "best10", "std")}


def resume_all(folder: str) -> dict[str, Trained]:
    trained = {}
    for name in TASKS:
        one = config(name, Path(folder), resume="auto")
        trained[name] = train(dataclasses.replace(one, rounds=3))
    return trained


def straight_all(folder: str) -> dict[str, Trained]:
    return {
        name: train(dataclasses.replace(config(name, Path(folder)), rounds=3, name=f"{name}-straight"))
        for name in TASKS
    }


def resumed_and_straight(folder: str) -> tuple[dict[str, Trained], dict[str, Trained]]:
    return resume_all(folder), straight_all(folder)


def test_a_resumed_run_has_the_bits_of_one_that_was_never_stopped(
    alone: tuple[Path, dict[str, Trained]], tmp_path: Path
) -> None:
    for name in TASKS:
        shutil.copytree(alone[0] / f"{name}-1", tmp_path / f"{name}-1")
    resumed, straight = run_world(resumed_and_straight, str(tmp_path), size=1)[0]
    for name in TASKS:
        assert all(torch.equal(tensor, resumed[name][0][key]) for key, tensor in straight[name][0].items()), (
            name
        )
        assert resumed[name][1] == straight[name][1]
