"""What a model card reports of a model by its task."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fedddp.storage.history import Metric
from fedddp.storage.run_record import ALONE

PIPELINES = {
    "Classification": "image-classification",
    "MultiLabel": "image-classification",
    "Segmentation": "image-segmentation",
    "Detection": "object-detection",
}
"""What Hugging Face calls the tasks."""

PURPOSES = {
    "class": "A {network} for {classes} classes",
    "multilabel": "A {network} for {classes} labels, of which an image has any number",
    "mask": "A {network} that gives every pixel one of {classes} classes",
    "boxes": "A {network} that finds objects of {classes} classes",
}

KNOWS = {
    "class": "It knows {classes} classes and gives every image one of them.",
    "multilabel": "It knows {classes} labels; whatever else is in an image has none.",
    "mask": "It knows {classes} classes and gives every pixel one of them.",
    "boxes": "It knows {classes} classes and finds no other objects.",
}

_CROPPED = {
    "class": "others are resized and cropped.",
    "multilabel": "others are resized and cropped.",
    "mask": "of others it sees the centre, resized; pixels outside have no class.",
    "boxes": "of others it sees the centre, resized; objects outside are not found.",
}


def sees(target: str, preprocessing: Mapping[str, Any]) -> str:
    """Return at which size a model sees images, and what of those of other sizes."""
    height, width = preprocessing["size"]
    how = preprocessing.get("resize", "crop")  # older models cropped
    others = {
        "crop": _CROPPED[target],
        "pad": "others fit in, between black margins.",
        "stretch": "others are stretched to that.",
    }[how]
    if height != width:
        others = "it takes no others."
    return f"It sees images at {height} × {width} pixels; {others}"


PREDICTS = {
    "class": (
        'probabilities = model.predict("image.png")',
        "print(model.classes[int(probabilities.argmax())])",
    ),
    "multilabel": (
        'probabilities = model.predict("image.png")[0]',
        "print([name for name, p in zip(model.classes, probabilities) if p >= 0.5])",
    ),
    "mask": (
        'mask = model.predict("image.png")[0]  # the class of every pixel, uint8 (H, W)',
        "print(model.classes[int(mask.flatten().mode().values)])  # the most frequent",
    ),
    "boxes": (
        'found = model.predict("image.png")',
        "boxes, labels = found.boxes.of(0)  # left, top, right, bottom in pixels of what the model sees",
        "print([(model.classes[label], float(score)) for label, score in zip(labels, found.scores)])",
    ),
}
"""Programs of a card, by what a task predicts."""


def class_text(metric: Metric, value: float | None) -> str:
    """Return the value of one class as text: accuracies and recall in percent."""
    if value is None:
        return "not tested"
    return f"{100 * value:.2f} %" if metric.bare == "recall" else metric.text(value)


def lowest(metric: Metric, values: list[tuple[str, float | None]]) -> Iterator[str]:
    """Yield which class has the lowest value of a metric, by the names of the classes, as Markdown."""
    known = [(value, name) for name, value in values if value is not None]
    if known:
        value, name = min(known)
        yield f"The class with the lowest {metric.label} is {name}: {class_text(metric, value)}."


def personal(header: Mapping[str, str], algorithm: str) -> Iterator[str]:
    """Yield whose the model in the file is, where clients have models of their own, as Markdown."""
    if ALONE in header:
        yield (
            f"With {header[ALONE]} there is no global model: each client has its own. What stays at the "
            "clients has its initial values in the file; that of each client is in the checkpoint."
        )
    elif algorithm == "Ditto" and "baseline" not in header:
        yield (
            "With Ditto each client has its own model. The file has the global one; metrics per client are "
            "of the clients' own."
        )
