"""The promises of the synchronous loop: the same bits for any number of groups, exact weights and metrics."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fedddp import (
    Classification,
    Cohort,
    Data,
    Dirichlet,
    Evaluation,
    FeatureSkew,
    FedAvg,
    Federation,
    Local,
    Mean,
    Model,
    PowerLaw,
    Run,
    Topology,
    Track,
)
from fedddp.algorithms.algorithm import Visit
from fedddp.data.datasets import load
from fedddp.storage.history import read_rows
from fedddp.testing import run_world

QUIET = Track(with_=[], progress=False)
BASE = Run(
    data=Data(
        dataset="shapes",
        clients=9,
        partition=Dirichlet(alpha=0.5),
        augment="crop",
        holdout=0.2,
        image_size=12,
        examples=240,
    ),
    model=Model(name="resnet8-gn", norm="batch"),
    local=Local(epochs=1, batch_size=20, lr=0.05),
    cohort=Cohort(size=4),
    evaluation=Evaluation(every=2, clients=5),
    track=QUIET,
    rounds=2,
)


def small(**changes: Any) -> Run:
    return dataclasses.replace(BASE, **changes)


def train(run: Run, output: str) -> dict[str, Any]:
    """Train, and return what must not depend on the machine."""
    outcome = Federation(dataclasses.replace(run, output=output)).run()
    rows = [{k: v for k, v in row.items() if not k.startswith("time/")} for row in outcome.history]
    return {
        "weights": {name: t.numpy() for name, t in outcome.model.state_dict().items()},
        "history": rows,
        "clients": read_rows(outcome.folder / "clients.jsonl"),
    }


def worlds(run: Run, tmp_path: Path, *shapes: tuple[int, int, str]) -> list[dict[str, Any]]:
    """Train `run` on G groups of R ranks, colocated or dedicated, for each of `shapes`."""
    results = []
    for groups, ranks, coordinator in shapes:
        topology = Topology(ranks_per_client=ranks, coordinator=coordinator, device="cpu")  # type: ignore[arg-type]
        size = groups * ranks + (coordinator == "dedicated")
        output = str(tmp_path / f"{groups}x{ranks}-{coordinator}")
        everyone = run_world(train, dataclasses.replace(run, topology=topology), output, size=size)
        for rank in everyone[1:]:
            assert_same_weights(rank["weights"], everyone[0]["weights"])
        results.append(everyone[0])
    return results


def assert_same_weights(ours: dict[str, Any], expected: dict[str, Any]) -> None:
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        assert np.array_equal(ours[name], value), name


def assert_same_history(ours: dict[str, Any], expected: dict[str, Any]) -> None:
    """The same but for the last digits of losses: forward passes of other sizes round otherwise."""
    for kind in ("history", "clients"):
        assert len(ours[kind]) == len(expected[kind])
        for row, other in zip(ours[kind], expected[kind], strict=True):
            assert row == {
                k: pytest.approx(v, rel=1e-6) if "loss" in k and v else v for k, v in other.items()
            }


VARIANTS = {
    "batch norm, augmented, held out": BASE,
    "poisson, momentum, optimizers kept": small(
        cohort=Cohort(size=3, sampling="poisson"),
        algorithm=FedAvg(momentum=0.9),
        local=Local(epochs=1, batch_size=20, lr=0.01, momentum=0.5, optimizer_state="keep"),
        rounds=4,
    ),
    "clipped updates, unlike cameras": small(
        aggregation=Mean(clip_norm=0.05),
        data=dataclasses.replace(BASE.data, skew=FeatureSkew(noise=0.1)),
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_model_and_metrics_are_bit_identical_for_any_number_of_groups(variant: str, tmp_path: Path) -> None:
    alone, *others = worlds(
        VARIANTS[variant], tmp_path, (1, 1, "colocated"), (3, 1, "colocated"), (2, 1, "dedicated")
    )
    for other in others:
        assert_same_weights(other["weights"], alone["weights"])
        assert_same_history(other, alone)


def test_two_ranks_a_client_are_bit_identical_for_any_number_of_groups(tmp_path: Path) -> None:
    run = small(model=Model(name="resnet8-gn", norm="sync"))
    one, two, dedicated = worlds(run, tmp_path, (1, 2, "colocated"), (2, 2, "colocated"), (1, 2, "dedicated"))
    for other in (two, dedicated):
        assert_same_weights(other["weights"], one["weights"])
        assert_same_history(other, one)


def test_any_number_of_ranks_a_client_trains_the_same_model(tmp_path: Path) -> None:
    run = small(model=Model(name="cnn", norm="sync"), local=Local(batch_size=20, lr=0.05))
    one, two = worlds(run, tmp_path, (1, 1, "colocated"), (1, 2, "colocated"))
    for name, expected in one["weights"].items():
        assert np.abs(two["weights"][name] - expected).max() <= 1e-5 * max(1, np.abs(expected).max()), name


def test_another_seed_trains_another_model(tmp_path: Path) -> None:
    first = train(BASE, str(tmp_path / "0"))
    second = train(small(seed=1), str(tmp_path / "1"))
    assert not np.array_equal(first["weights"]["fc.weight"], second["weights"]["fc.weight"])


def test_clients_count_by_their_examples() -> None:
    """One full-batch step of all clients is one step on the weighted mean of their gradients."""
    data = Data(dataset="digits", clients=5, partition=PowerLaw(exponent=1.2))
    run = small(
        data=data,
        model=Model(name="2nn"),
        local=Local(batch_size=2000, lr=0.5),
        cohort=Cohort(size=5),
        evaluation=Evaluation(every=1),
        rounds=1,
    )
    images, _ = load(data)
    assert images.pixels is not None
    model = run.model.build(classes=images.classes, shape=images.shape, seed=run.seed)
    x = images.pixels.float() / 255
    x = (x - torch.tensor(images.mean).view(-1, 1, 1)) / torch.tensor(images.std).view(-1, 1, 1)
    F.cross_entropy(model(x), torch.from_numpy(images.labels)).backward()
    outcome = Federation(run).run()
    for (name, before), after in zip(model.named_parameters(), outcome.model.parameters(), strict=True):
        assert before.grad is not None
        torch.testing.assert_close(after, before - 0.5 * before.grad, atol=2e-6, rtol=1e-5, msg=name)


def test_evaluation_is_exact(tmp_path: Path) -> None:
    (result,) = worlds(small(rounds=1), tmp_path, (3, 1, "colocated"))
    run = small(rounds=1)
    images, test = load(run.data)
    assert test is not None
    assert test.pixels is not None
    module = run.model.build(classes=images.classes, shape=images.shape, seed=0)
    module.load_state_dict({name: torch.from_numpy(t) for name, t in result["weights"].items()})
    module.eval()
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (images.mean, images.std))
    with torch.no_grad():
        logits: Tensor = module((test.pixels.float() / 255 - mean) / std)
    labels = torch.from_numpy(test.labels)
    row = result["history"][0]
    assert row["eval/accuracy"] == float((logits.argmax(1) == labels).double().mean())
    assert row["eval/loss"] == pytest.approx(float(F.cross_entropy(logits.double(), labels)), rel=1e-5)
    top5 = (logits.topk(5).indices == labels[:, None]).any(1).double().mean()
    assert row.get("eval/accuracy_top5", float(top5)) == float(top5)


def test_history_says_what_was_moved_and_who_took_part(tmp_path: Path) -> None:
    outcome = Federation(small(output=str(tmp_path), task=Classification(label_smoothing=0.1))).run()
    size = sum(p.numel() for p in outcome.model.parameters())
    floats = sum(b.numel() for b in outcome.model.buffers() if b.is_floating_point())
    counters = sum(b.numel() for b in outcome.model.buffers() if not b.is_floating_point())
    for number, row in enumerate(outcome.history, 1):
        assert row["round"] == number
        assert len(row["cohort"]) == row["clients/contributed"] == 4
        assert row["bytes/up"] == row["bytes/down"] == 4 * (4 * size + 4 * floats + 8 * counters)
        assert row["train/steps"] >= row["train/examples"] / 20
        spent = [
            v for k, v in row.items() if k.startswith("time/") and k not in ("time/virtual", "time/idle")
        ]
        assert sum(spent) == pytest.approx(2 * row["time/round"])
        assert ("eval/accuracy" in row) == ("clients/accuracy_mean" in row) == (number == 2)


class Sleeper(FedAvg):
    """FedAvg with visits of a tenth of a second at least."""

    def begin(self, visit: Visit) -> None:
        time.sleep(0.1)


def history(run: Run) -> list[dict[str, Any]]:
    return Federation(run).run().history


@pytest.mark.parametrize(("size", "coordinator"), [(2, "colocated"), (3, "dedicated")])
def test_a_row_says_how_long_each_group_did_not_train(size: int, coordinator: Any, tmp_path: Path) -> None:
    topology = Topology(coordinator=coordinator)
    run = small(cohort=Cohort(size=1), algorithm=Sleeper(), topology=topology, output=str(tmp_path))
    for row in run_world(history, run, size=size)[0]:
        spent = sum(row.get(f"time/{phase}", 0) for phase in ("send", "train", "combine", "step"))
        busy, idle = row["time/idle"]  # the first group has the round's only client
        assert 0 <= busy <= spent - 0.1
        assert busy < idle <= spent
        assert row["time/virtual"] > 0


def test_round_without_clients_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    run = small(cohort=Cohort(size=1, sampling="poisson"), rounds=6, output=str(tmp_path))
    outcome = Federation(run).run()
    empty = [row for row in outcome.history if not row["cohort"]]
    assert empty
    assert all(row["train/loss"] is None and row["bytes/up"] == 0 for row in empty)
