"""Several labels per image: the loss, F1 from counts, and average precision against scikit-learn's."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from sklearn.metrics import average_precision_score, f1_score
from torch import Tensor

from fedddp.models.registry import ModelConfig
from fedddp.tasks import MultiLabel
from fedddp.tasks.multilabel import average_precision

LABELS = 5


def example(images: int = 40) -> tuple[Tensor, Tensor]:
    """Return logits with many ties, and targets of which one label never occurs."""
    generator = torch.Generator().manual_seed(images)
    targets = (torch.rand(images, LABELS, generator=generator) < 0.3).float()
    logits = (2 * torch.randn(images, LABELS, generator=generator) + 2 * targets).round()
    targets[:, 3] = 0
    return logits, targets


@pytest.mark.parametrize("pos_weight", [None, 2.5])
def test_the_loss_is_the_mean_over_labels_summed_over_images(pos_weight: float | None) -> None:
    logits, targets = example(6)
    expected = [
        sum(
            -(pos_weight or 1) * t * math.log(1 / (1 + math.exp(-x)))
            - (1 - t) * math.log(1 / (1 + math.exp(x)))
            for x, t in zip(*(row.tolist() for row in rows), strict=True)
        )
        / LABELS
        for rows in zip(logits, targets, strict=True)
    ]
    task = MultiLabel(pos_weight=pos_weight)
    losses = task.losses(logits, targets)
    assert losses.tolist() == pytest.approx(expected, rel=1e-5)
    assert float(task.loss(logits, targets)) == pytest.approx(sum(expected), rel=1e-6)
    singles = [task.loss(logits[i : i + 1], targets[i : i + 1]) for i in range(6)]
    torch.testing.assert_close(torch.stack(singles), losses)
    library = torch.nn.BCEWithLogitsLoss(reduction="none", pos_weight=torch.tensor(pos_weight or 1.0))
    torch.testing.assert_close(losses, library(logits, targets).mean(1))


@pytest.mark.parametrize("threshold", [0.5, 0.2])
def test_metrics_of_parts_are_those_of_scikit_learn_for_all(threshold: float) -> None:
    logits, targets = example()
    task = MultiLabel(threshold=threshold, pos_weight=3.0)
    pieces = [(logits[part], targets[part]) for part in torch.split(torch.arange(40), [1, 30, 9])]
    measured = [task.measure(*piece) for piece in pieces]
    gathered = [task.gather(*piece) for piece in pieces]
    totals = {name: torch.stack([part[name] for part in measured]).sum(0) for name in measured[0]}
    rows = {name: torch.cat([part[name] for part in gathered]) for name in gathered[0]}
    assert rows["scores"].dtype == torch.float32
    assert rows["targets"].dtype == torch.uint8
    summary = task.summarize(totals, rows)
    assert list(summary) == [
        *("f1", "map", "f1_macro", "label_accuracy", "loss", "f1_per_class", "ap_per_class")
    ]
    predicted, true = (logits.sigmoid() >= threshold).int().numpy(), targets.int().numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a label without positives
        f1 = f1_score(true, predicted, average=None)
        precisions = [average_precision_score(t, s) for t, s in zip(true.T, logits.T.numpy(), strict=True)]
        assert summary["f1"] == pytest.approx(f1_score(true, predicted, average="micro"))
    assert summary["f1_per_class"] == pytest.approx(f1.tolist())
    assert summary["f1_macro"] == pytest.approx(f1.mean())
    assert summary["ap_per_class"] == [pytest.approx(p) if k != 3 else None for k, p in enumerate(precisions)]
    assert summary["map"] == pytest.approx(sum(p for k, p in enumerate(precisions) if k != 3) / 4)
    assert summary["label_accuracy"] == pytest.approx((predicted == true).mean())
    weighted = torch.nn.functional.binary_cross_entropy_with_logits(
        logits, targets, pos_weight=torch.tensor(3.0)
    )
    assert summary["loss"] == pytest.approx(float(weighted), rel=1e-6)  # as it is trained


def test_average_precision_of_a_hand_computed_ranking() -> None:
    scores = torch.tensor([0.9, 0.8, 0.8, 0.3, math.inf, -math.inf])
    targets = torch.tensor([1, 1, 0, 0, 0, 1])
    # inf: 0 of 1. 0.9: 1 of 2. 0.8: 2 of 4. -inf: 3 of 6.
    expected = 1 / 3 * 1 / 2 + 1 / 3 * 2 / 4 + 1 / 3 * 3 / 6
    assert average_precision(scores, targets) == pytest.approx(expected)
    order = torch.tensor([2, 5, 0, 1, 4, 3])
    assert average_precision(scores[order], targets[order]) == average_precision(scores, targets)
    infinite = torch.tensor([math.inf, math.inf, math.inf])
    assert average_precision(infinite, torch.tensor([1, 0, 0])) == pytest.approx(1 / 3)
    assert average_precision(scores, torch.zeros(6)) is None
    assert average_precision(scores[:0], targets[:0]) is None


def test_a_logit_that_is_no_number_is_never_right() -> None:
    logits = torch.tensor([[math.nan, 2.0], [math.nan, -2.0]])
    targets = torch.tensor([[1.0, 1.0], [0.0, 0.0]])
    task = MultiLabel()
    summary = task.summarize(task.measure(logits, targets), task.gather(logits, targets))
    assert summary["label_accuracy"] == 0.5
    assert summary["f1_per_class"] == [0.0, 1.0]
    assert summary["ap_per_class"] == [0.0, 1.0]
    assert summary["f1"] == pytest.approx(2 / 4)


def test_metrics_without_images_are_none() -> None:
    logits, targets = example()
    task = MultiLabel()
    summary = task.summarize(task.measure(logits[:0], targets[:0]), task.gather(logits[:0], targets[:0]))
    assert all(value is None or value == [None] * LABELS for value in summary.values())


def test_predictions_are_independent_probabilities() -> None:
    logits, _ = example(3)
    predicted = MultiLabel().predict(logits.bfloat16())
    assert predicted.dtype == torch.float32
    torch.testing.assert_close(predicted, 1 / (1 + (-logits).exp()))


def test_models_of_classes_serve_labels_and_others_are_refused() -> None:
    def check(outputs: object) -> None:
        MultiLabel().check_outputs(outputs, 3, (1, 8, 8))

    ModelConfig(name="lenet").build(classes=3, shape=(1, 8, 8), seed=0, check=check)
    message = r"^model unet must return logits of shape \(batch, labels\) in .*\(2, 3, 8, 8\), but lenet, .*$"
    with pytest.raises(ValueError, match=message):
        ModelConfig(name="unet").build(classes=3, shape=(1, 8, 8), seed=0, check=check)


@pytest.mark.parametrize("field", [{"threshold": 0.0}, {"threshold": 1.0}, {"pos_weight": 0.0}])
def test_settings_out_of_range_are_refused(field: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=rf"^task.{next(iter(field))} must be "):
        MultiLabel(**field)
