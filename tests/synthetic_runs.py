"""Run directories written by hand, one for each task: for tests of what is made of finished runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

Images = np.ndarray[Any, np.dtype[np.uint8]]

TASKS = {
    "class": "Classification",
    "multilabel": "MultiLabel",
    "mask": "Segmentation",
    "boxes": "Detection",
}
NAMES = {
    "class": ["cat", "dog", "fox"],
    "multilabel": ["rain", "night", "car & van"],
    "mask": ["background", "road", "sky <0>"],
    "boxes": ["car", "person", "bike"],
}
SCORES = {
    "class": {"accuracy": (0.5, 0.75), "loss": (1.0, 0.5), "recall": ([0.5, 0.5, 0.5], [0.75, 1.0, None])},
    "multilabel": {
        **{"f1": (0.4, 0.625), "map": (0.5, 0.7), "f1_macro": (0.3, 0.5), "label_accuracy": (0.8, 0.9)},
        "loss": (0.7, 0.4),
        "f1_per_class": ([0.25, 0.5, None], [0.5, 0.75, 0.125]),
        "ap_per_class": ([0.5, 0.5, None], [0.875, 0.25, None]),
    },
    "mask": {
        **{"iou": (0.3, 0.5625), "dice": (0.4, 0.6), "pixel_accuracy": (0.8, 0.9375), "loss": (0.9, 0.4)},
        "iou_per_class": ([0.9, 0.1, 0.0], [0.9375, 0.1875, None]),
        "dice_per_class": ([0.9, 0.2, 0.0], [0.96875, 0.25, None]),
    },
    "boxes": {
        **{"ap": (0.1, 0.4375), "ap50": (0.3, 0.6875), "ap75": (0.1, 0.5), "loss": (2.0, 0.8)},
        "ap_per_class": ([0.1, 0.2, None], [0.5, 0.375, None]),
    },
}


def make_run(folder: Path, target: str, *, size: int = 48, examples: int = 4) -> Path:
    """Write the files of a finished run of two rounds that `report` and trackers read; return its folder."""
    folder.mkdir(parents=True)
    name = {"Segmentation": "lraspp"}.get(TASKS[target], "cnn")
    config = {"rounds": 2, "task": {"name": TASKS[target]}, "algorithm": {"name": "FedAvg"}}
    config |= {"model": {"name": name}, "seed": 0, "data": {"dataset": "scenes", "clients": 4}}
    (folder / "config.yaml").write_text(json.dumps(config))
    rows, clients = [], []
    scores = SCORES[target]
    judged = next(iter(scores))
    for place in range(2):
        row: dict[str, Any] = {"round": place + 1, "train/loss": 1.0 / (1 + place), "train/examples": 100}
        row |= {f"eval/{key}": values[place] for key, values in scores.items()}
        row |= {f"clients/{judged}_{s}": 0.1 * n + 0.1 * place for n, s in enumerate(STATISTICS)}
        row |= {"bytes/up": 1000, "bytes/down": 1000, "time/round": 1.0, "cohort": [0, 1]}
        rows.append(row)
        clients += [
            {"round": place + 1, "client": c, "examples": 9, judged: 0.2 * c + 0.1 * place, "loss": 1.0}
            for c in range(4)
        ]
    for file, lines in (("history.jsonl", rows), ("clients.jsonl", clients)):
        (folder / file).write_text("".join(json.dumps(line) + "\n" for line in lines))
    shares = [{"client": c, "size": 9, "histogram": [4, 3, 2]} for c in range(4)]
    split = {"clients": 4, "examples": 36, "smallest": 9, "median": 9, "largest": 9, "empty": 0}
    (folder / "split.json").write_text(
        json.dumps({**split, "classes_per_client": 3.0, "shares": shares, "class_names": NAMES[target]})
    )
    examined(folder, target, size, examples)
    (folder / "model.safetensors").touch()
    return folder


STATISTICS = ("worst10", "mean", "best10", "std")


def scene(size: int, shift: int) -> tuple[Images, Images]:
    """Return an image (3, size, size) of a road under a sky, and its mask (size, size)."""
    y, x = np.mgrid[:size, :size]
    mask = np.zeros((size, size), dtype=np.uint8)
    mask[y < size // 3 + shift] = 2
    mask[(y >= size // 2) & (abs(x - size / 2) < (y - size / 3) / 1.5)] = 1
    mask[:2] = 255
    rng = np.random.default_rng(shift)
    base = np.array([[90, 120, 70], [105, 105, 110], [150, 190, 230], [0, 0, 0]])[np.minimum(mask, 3)]
    pixels = base + rng.integers(-20, 20, (size, size, 1))
    return np.moveaxis(pixels.clip(0, 255), -1, 0).astype(np.uint8), mask


def examined(folder: Path, target: str, size: int, examples: int) -> None:
    """Write evaluation.json and wrong.safetensors as a finished run has them."""
    scenes = [scene(size, shift) for shift in range(examples)]
    tensors = {"images": torch.from_numpy(np.stack([image for image, _ in scenes]))}
    worst: list[dict[str, Any]] = [{"index": 7 * n, "loss": 2.5 / (1 + n)} for n in range(examples)]
    confusion: list[list[int]] | None = None
    if target == "class":
        confusion = [[3, 1, 0], [0, 4, 0], [0, 0, 0]]
        worst = [{"index": n, "label": 0, "predicted": 1, "probability": 0.9} for n in range(examples)]
    elif target == "multilabel":
        sides: list[tuple[list[int], list[int]]] = [([0, 2], [0, 1]), ([], [1]), ([1], []), ([0], [0])]
        for one, (true, predicted) in zip(worst, sides[:examples], strict=True):
            one |= {"labels": true, "predicted": predicted}
    elif target == "mask":
        confusion = [[812345, 1200, 30], [4100, 21000, 0], [0, 0, 0]]
        truth = np.stack([mask for _, mask in scenes])
        shifted = np.roll(np.where(truth == 255, 2, truth), size // 8, axis=2)
        tensors |= {"truth": torch.from_numpy(truth), "predicted": torch.from_numpy(shifted)}
    elif target == "boxes":
        boxes = torch.tensor([[0.1, 0.2, 0.5, 0.7], [0.6, 0.5, 0.9, 0.95]]) * size
        found = torch.tensor([[0.12, 0.25, 0.55, 0.68], [0.5, 0.1, 0.7, 0.3], [0.0, 0.0, 1.0, 1.0]]) * size
        offsets = 2 * torch.arange(examples + 1)
        tensors |= {"truth.boxes": boxes.repeat(examples, 1), "truth.offsets": offsets}
        tensors |= {"truth.labels": torch.tensor([0, 1]).repeat(examples)}
        tensors |= {"predicted.boxes": found.repeat(examples, 1), "predicted.offsets": offsets * 3 // 2}
        tensors |= {"predicted.labels": torch.tensor([0, 2, 1]).repeat(examples)}
        tensors |= {"predicted.scores": torch.tensor([0.875, 0.5, 0.1]).repeat(examples)}
    content = {"round": 2, "target": target, "metrics": {}, "confusion": confusion, "wrong": worst}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "wrong.safetensors")
    (folder / "evaluation.json").write_text(json.dumps(content))
