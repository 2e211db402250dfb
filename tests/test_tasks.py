"""Loss and metrics as sums and counts, which are the same for any batches."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fedddp.tasks import Classification


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
    assert summary["loss"] == pytest.approx(float(F.cross_entropy(outputs, targets)), rel=1e-5)
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
