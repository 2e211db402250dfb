"""Loss and metrics as sums and counts, which are the same for any batches."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fedddp.tasks import Classification, MultiLabel, Segmentation


def logits(examples: int, classes: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(examples)
    outputs = torch.randn(examples, classes, generator=generator)
    return outputs, torch.randint(0, classes, (examples,), generator=generator)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_loss_is_the_summed_cross_entropy(smoothing: float) -> None:
    outputs, targets = logits(7, 4)
    log_p = outputs.log_softmax(1)
    hard = -log_p[torch.arange(7), targets].sum()
    expected = (1 - smoothing) * hard - smoothing * log_p.mean(1).sum()
    task = Classification(label_smoothing=smoothing)
    torch.testing.assert_close(task.loss(outputs, targets), expected)


def test_metrics_of_parts_add_up_to_those_of_all_examples() -> None:
    task = Classification(label_smoothing=0.1)
    outputs, targets = logits(50, 8)
    totals = task.measure(outputs, targets)
    parts = [
        task.measure(outputs[part], targets[part]) for part in torch.split(torch.arange(50), [1, 30, 19])
    ]
    assert totals.keys() == {"loss", "accuracy", "accuracy_top5", "recall"}
    for name, total in totals.items():
        torch.testing.assert_close(torch.stack([part[name] for part in parts]).sum(0), total)

    summary = task.summarize(totals, {})
    predicted = outputs.argmax(1)
    assert summary["accuracy"] == pytest.approx(float((predicted == targets).double().mean()))
    trained = F.cross_entropy(outputs, targets, label_smoothing=0.1)
    assert summary["loss"] == pytest.approx(float(trained), rel=1e-5)
    top5 = [bool((row > row[t]).sum() < 5) for row, t in zip(outputs, targets, strict=True)]
    assert summary["accuracy_top5"] == pytest.approx(sum(top5) / 50)
    recall = [float((predicted[targets == k] == k).double().mean()) for k in range(8)]
    assert summary["recall"] == pytest.approx(recall)


def test_top_five_accuracy_needs_more_than_five_classes() -> None:
    measured = [Classification().measure(*logits(9, classes)) for classes in (5, 6)]
    assert ["accuracy_top5" in metrics for metrics in measured] == [False, True]


def test_a_class_without_examples_has_no_recall() -> None:
    outputs = torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.0, 3.0]])
    task = Classification()
    summary = task.summarize(task.measure(outputs, torch.tensor([0, 1])), {})
    assert summary["recall"] == [1.0, 0.0, None]
    assert "accuracy_top5" not in summary


def test_metrics_without_examples_are_none() -> None:
    task = Classification()
    summary = task.summarize(task.measure(torch.empty(0, 3), torch.empty(0, dtype=torch.int64)), {})
    assert summary["loss"] is None
    assert summary["accuracy"] is None


def test_label_smoothing_of_one_is_refused() -> None:
    with pytest.raises(ValueError, match=r"label_smoothing must be in \[0, 1\), got 1"):
        Classification(label_smoothing=1)


class OwnLoss(Classification):
    """Overrides the loss alone, with weights in float32, as a user's class may."""

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(outputs, targets, weight=torch.arange(1.0, 4.0), reduction="sum")


class OwnLosses(OwnLoss):
    """Overrides both."""

    def losses(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return 2 * F.cross_entropy(outputs, targets, reduction="none")

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return self.losses(outputs, targets).sum()


@pytest.mark.parametrize("task", [OwnLoss(), OwnLosses()])
def test_the_loss_of_an_evaluation_is_the_one_that_is_trained(task: Classification) -> None:
    outputs, targets = logits(12, 3)
    measured = task.measure(outputs, targets)["loss"]
    assert measured.dtype == torch.float64
    assert measured.tolist() == [pytest.approx(float(task.loss(outputs, targets)), rel=1e-6), 12]


def test_the_best_constant_prediction_is_that_of_a_search_over_all() -> None:
    truth = torch.tensor([2, 0, 2, 1, 2, 0])
    totals = Classification().measure(torch.randn(6, 4), truth)
    assert Classification().constant(totals, {}) == {"accuracy": 0.5}

    masks = torch.tensor([[[0, 0, 2]], [[0, 2, 255]], [[0, 0, 0]]])
    task, found = Segmentation(), list[Any]()
    for label in range(4):  # the third class is nowhere
        same = torch.nn.functional.one_hot(torch.full_like(masks, label), 4).movedim(-1, 1).float()
        summary = task.summarize(task.measure(same, masks), {})
        found.append(summary["iou"])
    assert task.constant(task.measure(torch.randn(3, 4, 1, 3), masks), {}) == {"iou": max(found)}
    assert max(found) == pytest.approx(6 / 8 / 2)

    labels = torch.tensor([[1.0, 0, 1], [1, 0, 0], [0, 0, 1], [1, 1, 0]])
    multilabel, scores = MultiLabel(), list[Any]()
    for chosen in itertools.product((-9.0, 9.0), repeat=3):
        outputs = torch.tensor([chosen] * 4)
        totals = multilabel.measure(outputs, labels)
        scores.append(multilabel.summarize(totals, multilabel.gather(outputs, labels))["f1"])
    constant = multilabel.constant(totals, multilabel.gather(outputs, labels))
    assert constant == {"f1": pytest.approx(max(scores))}
    assert max(scores) == pytest.approx(2 * 5 / (2 * 4 + 6))  # the first and the third label


def test_there_is_no_constant_prediction_without_truth() -> None:
    nothing = torch.empty(0, dtype=torch.int64)
    assert Classification().constant(Classification().measure(torch.empty(0, 3), nothing), {}) == {}
    ignored = torch.full((1, 2, 2), 255)
    assert Segmentation().constant(Segmentation().measure(torch.zeros(1, 3, 2, 2), ignored), {}) == {}
    assert MultiLabel().constant({}, {"targets": torch.zeros(4, 3, dtype=torch.uint8)}) == {}
