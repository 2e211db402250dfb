"""Masks: loss per image, metrics from one confusion matrix, and the outputs that models give."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fedddp.data.loader import Batch
from fedddp.models.registry import ModelConfig
from fedddp.tasks import Classification, Segmentation, Task
from fedddp.tasks.segmentation import background_warning

CLASSES = 4


def example(images: int = 5, ignored: float = 0.2) -> tuple[Tensor, Tensor]:
    """Return logits (b, 4, 5, 6) and masks, of which the second image has no valid pixel."""
    generator = torch.Generator().manual_seed(images)
    logits = 2 * torch.randn(images, CLASSES, 5, 6, generator=generator)
    masks = torch.randint(0, CLASSES, (images, 5, 6), generator=generator)
    masks[torch.rand(masks.shape, generator=generator) < ignored] = 255
    masks[1] = 255
    masks[2][masks[2] == 3] = 1  # a class that is not in every image
    return logits, masks


def by_loops(logits: Tensor, mask: Tensor, dice: float) -> float:
    """Return the loss of one image: logits (K, H, W) and mask (H, W), pixel by pixel."""
    chances = logits.double().exp() / logits.double().exp().sum(0)
    pixels = [(y, x) for y in range(mask.shape[0]) for x in range(mask.shape[1]) if mask[y, x] != 255]
    if not pixels:
        return 0.0
    entropy = -sum(math.log(chances[mask[y, x], y, x]) for y, x in pixels) / len(pixels)
    overlaps = []
    for label in sorted({int(mask[p]) for p in pixels}):
        both = sum(float(chances[label][p]) for p in pixels if mask[p] == label)
        sizes = sum(float(chances[label][p]) + (int(mask[p]) == label) for p in pixels)
        overlaps.append(2 * both / sizes)
    return entropy + dice * (1 - sum(overlaps) / len(overlaps))


@pytest.mark.parametrize("dice", [0.0, 0.7])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_loss_is_the_mean_over_the_valid_pixels_of_each_image(dice: float, layout: Any) -> None:
    logits, masks = example()
    task = Segmentation(dice=dice)
    losses = task.losses(logits.to(memory_format=layout), masks)
    expected = [by_loops(*one, dice) for one in zip(logits, masks, strict=True)]
    assert losses.tolist() == pytest.approx(expected, rel=1e-5)
    assert expected[1] == 0.0
    assert float(task.loss(logits, masks)) == pytest.approx(float(losses.sum()), rel=1e-6)
    singles = [task.loss(logits[i : i + 1], masks[i : i + 1]) for i in range(len(logits))]
    torch.testing.assert_close(torch.stack(singles), losses)


@pytest.mark.parametrize("dice", [0.0, 1.0])
def test_an_image_of_ignored_pixels_has_no_gradient_and_no_nan(dice: float) -> None:
    logits, masks = example()
    logits.requires_grad_()
    Segmentation(dice=dice).loss(logits, masks).backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert not logits.grad[1].any()
    assert not logits.grad.movedim(1, -1)[masks == 255].any()
    assert logits.grad[0].any()


def test_gradients_are_those_of_differences() -> None:
    logits, masks = example(3)
    assert torch.autograd.gradcheck(
        lambda x: Segmentation(dice=0.5).losses(x, masks), logits.double().requires_grad_()
    )


def test_metrics_are_those_of_the_pixels_one_by_one() -> None:
    logits, masks = example(6)
    logits[:, 3] = -9  # never predicted
    masks[masks == 3] = 255  # and nowhere true
    logits[:, 2] = -9
    logits[:, 2][masks == 0] = torch.where(torch.rand(int((masks == 0).sum())) < 0.5, 9.0, -9.0)
    masks[masks == 2] = 1  # predicted, and nowhere true
    task = Segmentation(dice=0.5)
    parts = [task.measure(logits[part], masks[part]) for part in torch.split(torch.arange(6), [1, 3, 2])]
    totals = {name: torch.stack([part[name] for part in parts]).sum(0) for name in parts[0]}
    assert torch.equal(totals["confusion"], task.measure(logits, masks)["confusion"])
    assert totals["confusion"].dtype == torch.int64
    summary = task.summarize(totals, {})

    predicted, valid = logits.argmax(1), masks != 255
    iou, dice = [], []
    for label in range(CLASSES):
        truth, guess = (masks == label) & valid, (predicted == label) & valid
        both, either = int((truth & guess).sum()), int((truth | guess).sum())
        iou.append(both / either if either else None)
        dice.append(2 * both / (int(truth.sum()) + int(guess.sum())) if either else None)
    assert iou[2] == 0.0
    assert iou[3] is None
    assert list(summary) == ["iou", "dice", "pixel_accuracy", "loss", "iou_per_class", "dice_per_class"]
    assert summary["iou_per_class"] == pytest.approx(iou)
    assert summary["dice_per_class"] == pytest.approx(dice)
    assert summary["iou"] == pytest.approx(np.mean([v for v in iou if v is not None]))
    assert summary["dice"] == pytest.approx(np.mean([v for v in dice[1:] if v is not None]))
    assert summary["pixel_accuracy"] == pytest.approx(float((predicted == masks)[valid].double().mean()))
    losses = [by_loops(*one, 0.5) for one in zip(logits, masks, strict=True)]
    assert summary["loss"] == pytest.approx(np.mean(losses), rel=1e-6)  # as it is trained, with Dice
    whole = Segmentation(background=False, dice=3.0).summarize(totals, {})
    assert whole["dice"] == pytest.approx(np.mean([v for v in dice if v is not None]))


def test_metrics_of_a_hand_computed_confusion_matrix() -> None:
    totals = {"confusion": torch.tensor([[6, 2], [1, 3]]), "loss": torch.tensor([3.0, 4.0])}
    summary = Segmentation().summarize(totals, {})
    assert summary["iou_per_class"] == pytest.approx([6 / 9, 3 / 6])
    assert summary["dice_per_class"] == pytest.approx([12 / 15, 6 / 9])
    assert summary["iou"] == pytest.approx((6 / 9 + 3 / 6) / 2)
    assert summary["dice"] == pytest.approx(6 / 9)
    assert summary["pixel_accuracy"] == pytest.approx(9 / 12)
    assert summary["loss"] == 0.75


def test_no_images_and_no_pixels_have_no_metrics() -> None:
    logits, masks = example(3)
    for some in (slice(0, 0), slice(1, 2)):
        summary = Segmentation().summarize(Segmentation().measure(logits[some], masks[some]), {})
        assert all(value is None or value == [None] * CLASSES for value in summary.values())


def batch(shape: tuple[int, int, int], images: int = 2) -> Batch:
    return Batch(
        torch.rand(images, *shape), torch.zeros(images, *shape[1:], dtype=torch.int64), images, images
    )


def check(task: Segmentation, classes: int, shape: tuple[int, int, int]) -> Any:
    """Return the check that a run gives to `ModelConfig.build`."""
    return lambda outputs: task.check_outputs(task.forward(lambda _: outputs, batch(shape)), classes, shape)


@pytest.mark.parametrize("name", ["unet", "lraspp_mobilenet_v3_large", "deeplabv3_mobilenet_v3_large"])
def test_models_by_name_train_on_one_image(name: str) -> None:
    """Also where a layer has one value per channel, as the pooled one of DeepLab has."""
    task, shape = Segmentation(), (1, 33, 40)
    module = ModelConfig(name=name).build(
        classes=CLASSES, shape=shape, seed=0, check=check(task, CLASSES, shape)
    )
    outputs = task.forward(module, batch(shape, 1))
    assert outputs.shape == (1, CLASSES, 33, 40)
    assert outputs.isfinite().all()
    loss = task.loss(outputs, torch.zeros(1, 33, 40, dtype=torch.int64))
    loss.backward()  # type: ignore[no-untyped-call]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())
    predicted = task.predict(outputs)
    assert predicted.shape == (1, 33, 40)
    assert predicted.dtype == torch.uint8
    assert torch.equal(predicted.long(), outputs.argmax(1))


def test_a_model_for_classes_is_refused_with_models_that_would_do() -> None:
    shape = (3, 28, 28)
    with pytest.raises(
        ValueError,
        match=r"^model lenet must return logits of shape \(batch, classes, height, width\) in evaluation "
        r"mode; for a batch of 2, 4 classes and images of 28x28 it returned \(2, 4\), but unet, .* would do$",
    ):
        ModelConfig(name="lenet").build(
            classes=4, shape=shape, seed=0, check=check(Segmentation(), CLASSES, shape)
        )


def test_more_classes_than_a_mask_can_hold_are_refused() -> None:
    Segmentation().check_outputs(torch.zeros(2, 255, 1, 1), 255, (1, 1, 1))
    with pytest.raises(ValueError, match="255 classes at most; the data have 256"):
        Segmentation().check_outputs(torch.zeros(2, 256, 1, 1), 256, (1, 1, 1))


def test_a_negative_weight_of_dice_is_refused() -> None:
    with pytest.raises(ValueError, match=r"task.dice must be >= 0, got -1"):
        Segmentation(dice=-1)


def test_autocast_does_not_change_the_loss() -> None:
    logits, masks = example()
    with torch.autocast("cpu", torch.bfloat16):
        inside = Segmentation(dice=1.0).losses(logits, masks)
    torch.testing.assert_close(inside, Segmentation(dice=1.0).losses(logits, masks))
    expected = F.cross_entropy(logits[:1], masks[:1], ignore_index=255)
    torch.testing.assert_close(Segmentation().losses(logits, masks)[0], expected)


@pytest.mark.parametrize(
    ("task", "names", "warned"),
    [
        (Segmentation(), ("road", "sky"), True),
        (Segmentation(background=False), ("road", "sky"), False),
        (Segmentation(), ("Background ", "pet"), False),
        (Segmentation(), ("__background__", "pet"), False),
        (Segmentation(), ("0", "1"), False),
        (Segmentation(), (), False),
        (Classification(), ("road", "sky"), False),
    ],
)
def test_a_class_0_that_is_no_background_is_named(task: Task, names: tuple[str, ...], warned: bool) -> None:
    line = background_warning(task, names)
    assert (line is not None) == warned
    if line is not None:
        assert line.startswith("task.background=true leaves class 0, 'road', out of the mean Dice; set task.")
