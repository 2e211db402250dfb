"""Evaluation: of the test set over ranks, of clients with their own models, and when memory runs out."""

from __future__ import annotations

import contextlib
import statistics
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedddp import evaluation
from fedddp.data.datasets import DataConfig, Images
from fedddp.data.loader import ClientLoader
from fedddp.distributed.launch import connect
from fedddp.distributed.topology import TopologyConfig
from fedddp.evaluation import (
    EvaluationConfig,
    NoMemoryError,
    evaluate,
    evaluate_clients,
    is_out_of_memory,
    measure,
    spread,
)
from fedddp.examination import examine
from fedddp.tasks import Classification
from fedddp.testing import run_world

LABELS = np.arange(10) % 4


class Constant(nn.Module):
    """A model that gives every image the same class."""

    def __init__(self) -> None:
        super().__init__()
        self.choice = 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        assert not self.training
        return torch.eye(4)[[self.choice] * len(images)] * 9


def loader_of(labels: np.ndarray[Any, Any], device: torch.device) -> ClientLoader:
    pixels = torch.zeros(len(labels), 1, 2, 2, dtype=torch.uint8)
    images = Images(labels, 4, (1, 2, 2), pixels, None, None, (0.5,), (0.5,))
    return ClientLoader(images, DataConfig(), device, seed=0)


@pytest.mark.parametrize(("clients", "tenth"), [(1, 1), (4, 1), (10, 1), (13, 1), (16, 2), (19, 2), (20, 2)])
def test_the_worst_and_best_tenth_of_clients_are_to_the_nearest_client_and_at_least_one(
    clients: int, tenth: int
) -> None:
    values = [(7 * k % clients) ** 2 / 400 for k in range(clients)]  # every k² once, in no order
    found = spread([{"client": k, "accuracy": value} for k, value in enumerate(values)])
    ordered = [k**2 / 400 for k in range(clients)]
    assert found["clients/accuracy_worst10"] == pytest.approx(sum(ordered[:tenth]) / tenth)
    assert found["clients/accuracy_best10"] == pytest.approx(sum(ordered[-tenth:]) / tenth)
    assert found["clients/accuracy_mean"] == pytest.approx(statistics.fmean(ordered))
    assert found["clients/accuracy_std"] == pytest.approx(statistics.pstdev(ordered))


def test_a_model_is_evaluated_every_so_many_rounds_and_after_the_last() -> None:
    due = EvaluationConfig(every=3)
    assert [number for number in range(1, 9) if due.due(number, rounds=8)] == [3, 6, 8]


def test_clients_to_evaluate_are_drawn_without_repetition() -> None:
    assert EvaluationConfig(clients=9).sample(9, seed=0).tolist() == list(range(9))
    assert EvaluationConfig(clients=99).sample(9, seed=0).tolist() == list(range(9))
    some = EvaluationConfig(clients=30).sample(100, seed=0).tolist()
    assert some == sorted(set(some))
    assert len(some) == 30
    assert some != EvaluationConfig(clients=30).sample(100, seed=1).tolist()


def clients_of_a_world() -> list[dict[str, Any]]:
    with contextlib.closing(connect(TopologyConfig(device="cpu"))) as world:
        model = Constant().train()

        def personalise(client: int) -> None:
            model.choice = client % 4

        mine = {5: np.array([1, 2, 5]), 8: np.array([], dtype=np.int64), 2: np.array([0])}
        others = {3: np.array([3, 7, 9, 0])}
        held_out = mine if world.rank == 0 else others
        loader = loader_of(LABELS, world.device)
        return evaluate_clients(world, model, Classification(), loader, held_out, 2, personalise)


def test_each_client_is_measured_with_its_own_model_and_examples() -> None:
    first, second = run_world(clients_of_a_world, size=2)
    assert first == second
    assert [(row["client"], row["examples"], row["accuracy"]) for row in first] == [
        (2, 1, 0.0),  # class 2; its only example is of class 0
        (3, 4, 0.5),  # class 3 of 3, 3, 1, 0
        (5, 3, pytest.approx(2 / 3)),  # class 1 of 1, 2, 1
    ]
    best = {2: 1.0, 3: 0.5, 5: 2 / 3}  # one class for all of a client's examples
    assert {row["client"]: row["constant"] for row in first} == pytest.approx(best)
    right, wrong = np.log1p(3 * np.exp(-9)), 9 + np.log1p(3 * np.exp(-9))
    expected = {2: wrong, 3: (right + wrong) / 2, 5: (2 * right + wrong) / 3}
    assert {row["client"]: row["loss"] for row in first} == pytest.approx(expected, rel=1e-4)


def accuracy_of_a_world(examples: int) -> tuple[float, float]:
    with contextlib.closing(connect(TopologyConfig(device="cpu"))) as world:
        loader = loader_of(LABELS[:examples], world.device)
        found = examine(world, Constant(), Classification(), loader, 3)
        assert found.constant == {"accuracy": max(np.bincount(LABELS[:examples])) / examples}
        return found.metrics["accuracy"], found.metrics["loss"]


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("examples", [1, 2, 10])
def test_the_test_set_is_measured_once_over_all_ranks(examples: int, size: int) -> None:
    hits = sum(LABELS[:examples] == 0) / examples
    for accuracy, loss in run_world(accuracy_of_a_world, examples, size=size):
        assert accuracy == pytest.approx(hits)
        assert loss == pytest.approx(9 * (1 - hits) + np.log1p(3 * np.exp(-9)), rel=1e-4, abs=1e-5)


class Counting(Constant):
    """Counts the images that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.images = 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.images += len(images)
        return super().forward(images)


def images_of_a_rank(examples: int) -> int:
    with contextlib.closing(connect(TopologyConfig(device="cpu"))) as world:
        model = Counting()
        evaluate(world, model, Classification(), loader_of(LABELS[:examples], world.device), 3)
        return model.images


@pytest.mark.parametrize(("examples", "shares"), [(10, [5, 5]), (10, [3, 3, 4]), (2, [1, 1, 1])], ids=str)
def test_ranks_share_the_work_of_an_evaluation(examples: int, shares: list[int]) -> None:
    """A rank without an example has one of padding."""
    assert run_world(images_of_a_rank, examples, size=len(shares)) == shares


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
    ],
)
def test_what_torch_raises_for_want_of_memory(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected

    class Failing(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            raise error

    loader = loader_of(LABELS, torch.device("cpu"))
    message = "^out of CPU memory while evaluating with evaluation.batch_size=7; lower it$"
    with pytest.raises(NoMemoryError if expected else RuntimeError, match=message if expected else "mat1"):
        measure(Failing(), Classification(), loader, np.arange(3), 7)


def test_the_worst_of_a_loss_are_the_highest_and_what_is_not_known_is_left_out() -> None:
    found = spread([{"client": k, "examples": 1, "loss": float(k)} for k in range(20)])
    assert found["clients/loss_worst10"] == 18.5
    assert found["clients/loss_best10"] == 0.5
    rows = [{"client": k, "examples": 1, "f1": f1, "hits": 0.5} for k, f1 in enumerate((0.25, 0.75, None))]
    for given in (rows, rows[::-1]):
        assert spread(given)["clients/f1_mean"] == 0.5
    assert spread([{"client": 0, "examples": 1, "f1": None}]) == {}


def test_a_task_whose_sums_would_not_add_up_exactly_is_refused() -> None:
    class Single(Classification):
        def measure(self, outputs: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"hits": torch.tensor([1.0, 2.0])}

    with pytest.raises(TypeError, match="^Single.measure returns hits as float32; return float64 or int64"):
        evaluation.Totals().add(Single(), torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64))


def test_large_masks_are_evaluated_few_at_a_time() -> None:
    sizes = {(8, 8): 500, (512, 512): 3, (4096, 4096): 1}
    for (height, width), most in sizes.items():
        shape = (1, height, width)
        images = Images(LABELS, 21, shape, None, None, None, (0.5,), (0.5,), target="mask")
        assert min(500, evaluation._affordable(images)) == most


def test_an_examination_has_no_matrix_of_very_many_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    world = connect(TopologyConfig())
    try:
        module, loader = Constant(), loader_of(LABELS, world.device)
        found = examine(world, module, Classification(), loader, 3)
        assert found.confusion is not None
        assert found.confusion[:, 0].tolist() == [3, 3, 2, 2]
        assert found.constant == {"accuracy": 0.3}
        monkeypatch.setattr(evaluation, "CONFUSED_CLASSES", 3)
        without = examine(world, module, Classification(), loader, 3)
        assert without.confusion is None
        assert without.worst == found.worst
    finally:
        world.close()


def test_probabilities_that_are_no_numbers_are_not_the_most_certain() -> None:
    class Overflowing(Constant):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            logits = super().forward(images)
            logits[0] = float("nan")
            return logits

    world = connect(TopologyConfig())
    try:
        loader = loader_of(LABELS, world.device)
        found = examine(world, Overflowing(), Classification(), loader, 5)
        assert [one["index"] for one in found.worst] == [1, 2, 3, 6, 7, 9]
    finally:
        world.close()
