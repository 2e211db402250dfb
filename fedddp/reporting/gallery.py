"""The worst examples of a run's final model, as pictures on its page."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING

import numpy as np

from fedddp.reporting.classes import class_name
from fedddp.reporting.figures import Chart
from fedddp.reporting.runs import RunFiles
from fedddp.storage.examined import IGNORED, Examined
from fedddp.tracking import overlays

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGE_SIDE, MASK_SIDE, BOXES_SIDE = 112, 192, 320
"""Pixels of a picture: of a class, with a mask on it, with boxes on it. Larger images are reduced."""

MOST_SHOWN = 12
"""Pictures with masks or boxes; of classes and labels all that are recorded."""


def gallery(index: int, run: RunFiles, examined: Examined) -> Chart:
    """Return the worst examples: of classes wrong ones with the highest probability, else of highest loss."""
    draw = {"class": _classes, "multilabel": _labels, "mask": _masks, "boxes": _boxes}[examined.target]
    title, content = draw(run, examined)
    return Chart(f"wrong {index}", title, content, run=index, wide=True)


def has_background(run: RunFiles) -> bool:
    """Return whether class 0 of the masks is background: `task.background`, by default true."""
    return run.settings.get("task.background") is not False


def _classes(run: RunFiles, examined: Examined) -> tuple[str, str]:
    items = []
    for number, one in enumerate(examined.wrong):
        true, predicted = (escape(class_name(run, one[key])) for key in ("label", "predicted"))
        words = f"{true} → <b>{predicted}</b><br>{100 * one['probability']:.0f} %"
        items.append((_small(examined, number, f"{true} as {predicted}"), words))
    return "Wrong with the highest probability: true class → predicted class", _list(items)


def _labels(run: RunFiles, examined: Examined) -> tuple[str, str]:
    items = []
    for number, one in enumerate(examined.wrong):
        true, predicted = (sorted(one[key]) for key in ("labels", "predicted"))
        words = [f"true: {_names(run, true)}"]
        for what, labels in (
            ("missed", [label for label in true if label not in predicted]),
            ("extra", [label for label in predicted if label not in true]),
        ):
            words += [f"<b>{what}: {_names(run, labels)}</b>"] if labels else []
        picture = _small(examined, number, f"true: {_names(run, true)}; predicted: {_names(run, predicted)}")
        items.append((picture, "<br>".join([*words, f"loss {one['loss']:.3f}"])))
    title = "Highest loss: true labels, and those that were missed or predicted beside them"
    return title, _list(items, "gallery labels")


def _names(run: RunFiles, labels: Sequence[int]) -> str:
    return escape(", ".join(class_name(run, label) for label in labels)) or "none"


def _masks(run: RunFiles, examined: Examined) -> tuple[str, str]:
    background, shown = has_background(run), examined.wrong[:MOST_SHOWN]
    if examined.images is None or examined.masks is None:
        return _without_pictures(examined)
    items = []
    for number, one in enumerate(shown):
        image = examined.images[number]
        true, predicted = (side[number] for side in examined.masks)
        sides = ((None, "image"), (true, "true mask of image"), (predicted, "predicted mask of image"))
        pictures = "".join(
            _tag(overlays.on_image(image, mask, MASK_SIDE, background=background), f"{what} {one['index']}")
            for mask, what in sides
        )
        items.append((f'<div class="trio">{pictures}</div>', _example(one)))
    present = np.unique(np.concatenate([np.unique(side[: len(shown)]) for side in examined.masks])).tolist()
    legend = _legend(run, [label for label in present if not (background and label == 0)], background)
    title = "Highest loss: image, true mask, predicted mask"
    return title, legend + _list(items, "gallery broad drawn")


def _boxes(run: RunFiles, examined: Examined) -> tuple[str, str]:
    if examined.images is None:
        return _without_pictures(examined)
    items, present = [], set[int]()
    for number, one in enumerate(examined.wrong[:MOST_SHOWN]):
        true, kept = examined.boxes[number][0], overlays.likely(examined.boxes[number][1])
        picture = overlays.with_boxes(examined, number, run.class_names, BOXES_SIDE)
        present |= {*true.labels.tolist(), *kept.labels.tolist()}
        words = f"{_example(one)}<br>{len(true.labels)} true, {len(kept.labels)} predicted"
        items.append((_tag(picture, f"image {one['index']} with true and predicted boxes"), words))
    score = f"{overlays.SCORE:g}"
    title = f"Highest loss: true boxes (solid) and predicted ones (dashed, with a score of {score} or more)"
    return title, _legend(run, sorted(present), background=False) + _list(items, "gallery medium drawn")


def _without_pictures(examined: Examined) -> tuple[str, str]:
    return "Highest loss", _list(("", _example(one)) for one in examined.wrong)


def _example(one: dict[str, float]) -> str:
    return f"test example {one['index']:,}, loss {one['loss']:.3f}"


def _legend(run: RunFiles, labels: Sequence[int], background: bool) -> str:
    """Return the colours of classes with their names."""
    keys = []
    for label in labels:
        name = "not counted" if label == IGNORED else escape(class_name(run, label))
        colour = overlays.hexadecimal(overlays.class_colour(label, background=background))
        keys.append(f'<li><i style="background: {colour}"></i>{name}</li>')
    return f'<ul class="legend">{"".join(keys)}</ul>'


def _list(items: Iterable[tuple[str, str]], kind: str = "gallery") -> str:
    """Return pictures and their words side by side."""
    lines = "".join(f"<li>{picture}<span>{words}</span></li>" for picture, words in items)
    return f'<ul class="{kind}">{lines}</ul>'


def _small(examined: Examined, number: int, alternative: str) -> str:
    """Return the picture of an example, reduced; nothing where there is none. `alternative` is HTML."""
    from PIL import Image

    if examined.images is None:
        return ""
    pixels = np.moveaxis(examined.images[number], 0, -1)
    picture = Image.fromarray(np.ascontiguousarray(pixels if pixels.shape[-1] == 3 else pixels[..., 0]))
    picture.thumbnail((IMAGE_SIDE, IMAGE_SIDE))
    return _tag(picture, alternative)


def _tag(picture: Image, alternative: str) -> str:
    file = io.BytesIO()
    picture.save(file, format="PNG")
    source = base64.b64encode(file.getvalue()).decode()
    return f'<img alt="{alternative}" src="data:image/png;base64,{source}">'
