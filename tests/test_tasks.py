"""Loss and metrics as sums and counts: whatever the batches, the same totals."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fedddp.tasks.classification import Classification


def logits(examples: int, classes: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(examples)
    outputs = torch.randn(examples, classes, generator=generator)
    return outputs, torch.randint(0, classes, (examples,), generator=generator)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_loss_is_cross_entropy_summed(smoothing: float) -> None:
    outputs, targets = logits(7, 4)
    log_p = outputs.log_softmax(1)
    hard = -log_p[torch.arange(7), targets].sum()
    expected = (1 - smoothing) * hard - smoothing * log_p.mean(1).sum()
    task = Classification(label_smoothing=smoothing)
    torch.testing.assert_close(task.loss(outputs, targets), expected)


def test_metrics_of_parts_add_up_to_those_of_the_whole() -> None:
    task = Classification(label_smoothing=0.1)
    outputs, targets = logits(50, 8)
    whole = task.measure(outputs, targets)
    parts = [task.measure(outputs[part], targets[part]) for part in torch.arange(50).split([1, 30, 19])]
    assert whole.keys() == {"loss", "accuracy", "accuracy_top5", "recall"}
    for name, total in whole.items():
        torch.testing.assert_close(torch.stack([part[name] for part in parts]).sum(0), total)

    summary = task.summarise(whole)
    predicted = outputs.argmax(1)
    assert summary["accuracy"] == pytest.approx(float((predicted == targets).double().mean()))
    assert summary["loss"] == pytest.approx(float(F.cross_entropy(outputs, targets)), rel=1e-5)
    top5 = [bool((row > row[t]).sum() < 5) for row, t in zip(outputs, targets, strict=True)]
    assert summary["accuracy_top5"] == pytest.approx(sum(top5) / 50)
    recall = [float((predicted[targets == k] == k).double().mean()) for k in range(8)]
    assert summary["recall"] == pytest.approx(recall)


def test_a_class_without_examples_has_no_recall() -> None:
    outputs = torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.0, 3.0]])
    task = Classification()
    summary = task.summarise(task.measure(outputs, torch.tensor([0, 1])))
    assert summary["recall"] == [1.0, 0.0, None]
    assert "accuracy_top5" not in summary


def test_nothing_measured_is_none() -> None:
    task = Classification()
    summary = task.summarise(task.measure(torch.empty(0, 3), torch.empty(0, dtype=torch.int64)))
    assert summary["loss"] is None
    assert summary["accuracy"] is None


def test_smoothing_is_checked() -> None:
    with pytest.raises(ValueError, match=r"label_smoothing must be in \[0, 1\), got 1"):
        Classification(label_smoothing=1)
