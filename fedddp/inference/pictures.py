"""Predict the classes of image files, and show them on a contact sheet."""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from fedddp.data.image_files import is_image
from fedddp.data.items import naming
from fedddp.data.mask_folder import mask_folders
from fedddp.inference.model import TrainedModel
from fedddp.section import ConfigError
from fedddp.tracking.overlays import label_font, picture_of

logger = logging.getLogger(__name__)

PREDICTIONS = "predictions.json"
"""File in a folder that `fedddp predict` wrote."""

BATCH = 250
"""Images that are in memory together."""

MOST_FOLDERS = 3
"""Folders that a message names."""

MOST_ON_SHEET = 200
"""Images on a contact sheet, the first of them."""

TILE, MARGIN, LINE = 320, 28, 34
"""Of a contact sheet, in pixels: a picture, the space around it, a line of text."""

INK, MUTED, PAPER, FRAME = "#1a1d21", "#6b7280", "#ffffff", "#e5e7eb"
SURE, UNSURE = "#2f7d4f", "#b45309"
"""Colours of a probability of half and more, and of less."""
SHARE = "#0072b2"
"""Colour of a share of the pixels."""


@dataclass(frozen=True)
class Prediction:
    """The most probable classes of one image file."""

    file: Path
    classes: tuple[str, ...]
    """The most probable first."""
    probabilities: tuple[float, ...]
    """Of `classes`."""
    shares: bool = False
    """Whether they are shares of the image's pixels instead."""


def find_images(paths: Sequence[str]) -> list[Path]:
    """Return the files that `paths` name: files as they are given, and the images below folders, sorted.

    Below a folder, masks that lie beside images/ are left out, and so is what `fedddp predict` wrote; a line
    is logged of each. A file that is named twice is returned once.

    Raises:
        ConfigError: a path does not exist, or there is no image.
    """
    found: list[Path] = []
    for text in paths:
        path = Path(text).expanduser()
        if path.is_dir():
            inside = sorted(_images_below(path), key=_natural)
            if not inside:
                raise ConfigError(f"{path} has no images; give image files, or folders of them")
            found += inside
        elif path.exists():
            found.append(path)
        else:
            raise ConfigError(f"{path} does not exist; give image files, or folders of them")
    return list({os.path.abspath(file): file for file in reversed(found)}.values())[::-1]


def _images_below(path: Path) -> list[Path]:
    """Return the images below a folder that are not hidden; log the folders that are left out."""
    found: list[Path] = []
    masks: list[Path] = []
    written: list[Path] = []
    for text, folders, names in os.walk(path):
        place = Path(text)
        if PREDICTIONS in names:
            written.append(place)
            folders.clear()
            continue
        here = mask_folders(place)
        masks += here
        folders[:] = [name for name in folders if not name.startswith(".") and place / name not in here]
        files = (place / name for name in names if not name.startswith("."))
        found += [file for file in files if is_image(file) and file.is_file()]
    for left, what in ((masks, "masks"), (written, "earlier predictions")):
        if left:
            more = ", ..." if len(left) > MOST_FOLDERS else ""
            listed = ", ".join(map(str, sorted(left)[:MOST_FOLDERS]))
            logger.info("%s: %s are left out (%s%s)", path, what, listed, more)
    return found


def _natural(path: Path) -> list[tuple[int, str]]:
    """Return a key by which 2.png comes before 10.png."""
    return [
        (int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", str(path)) if part
    ]


def distinct_folders(files: Sequence[Path]) -> list[tuple[str, ...]]:
    """Return, of the path of each file, the folders that distinguish it from files of the same name.

    Folders that all paths have are left out, and of the others those are taken that are nearest to the file,
    as many as are needed; none where all files have different names.
    """
    paths = [Path(os.path.abspath(file)) for file in files]
    names = [path.name for path in paths]
    folders = [path.parts[:-1] for path in paths]
    if len(set(names)) == len(names):
        return [()] * len(names)
    shared = set(folders[0]).intersection(*folders)
    different = [tuple(part for part in parts if part not in shared) for parts in folders]
    for kept in (different, folders):  # a/b/1.png and b/a/1.png have the same folders
        for depth in range(1, max(map(len, kept), default=0) + 1):
            short = [parts[-depth:] for parts in kept]
            if len(set(zip(short, names, strict=True))) == len(names):
                return short
    return folders


def predict_files(
    model: TrainedModel, files: Sequence[Path], top: int
) -> Iterator[tuple[Prediction, Image.Image]]:
    """Yield the prediction and a small picture of every file; one that is no image is logged and left out.

    Args:
        model: from `load_model`.
        files: image files of any mode and size.
        top: classes per image, >= 1; at most those that there are.
    """
    for start in range(0, len(files), BATCH):
        some, pictures, pixels = [], [], []
        for file in files[start : start + BATCH]:
            try:
                picture, prepared = _read(model, file)
            except ValueError as error:
                logger.warning("%s", error)
                continue
            some.append(file)
            pictures.append(picture)
            pixels.append(prepared)
        probabilities = model.predict(pixels)
        best = probabilities.topk(min(top, len(model.classes)), dim=1)
        for number, (file, picture) in enumerate(zip(some, pictures, strict=True)):
            names = tuple(model.classes[index] for index in best.indices[number].tolist())
            yield Prediction(file, names, tuple(best.values[number].tolist())), picture


def _read(model: TrainedModel, file: Path) -> tuple[Image.Image, torch.Tensor]:
    """Return a small picture of an image file, and its pixels as the model takes them.

    Raises:
        ValueError: it is no image, or has other channels than the model.
    """
    image = model.read(file)
    with naming(str(file)):
        # Of a colour model a grey picture becomes grey pixels of three channels, as in training.
        pixels = model.resized(model.channels(image))
    return fitted(picture_of(image.numpy())), pixels


def fitted(picture: Image.Image) -> Image.Image:
    """Return `picture` as RGB that fills a tile in one direction; few pixels stay visible as such."""
    factor = TILE / max(picture.size)
    size = tuple(max(1, round(side * factor)) for side in picture.size)
    small = max(picture.size) <= TILE // 4
    filtered = Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS
    return picture.convert("RGB").resize((size[0], size[1]), filtered)


# ---- the contact sheet ----


def check_sheet(path: Path) -> None:
    """Raise ConfigError unless PIL can write a picture with the ending of `path`."""
    ending = path.suffix.lower()
    if Image.registered_extensions().get(ending) not in Image.SAVE:
        raise ConfigError(f"--save {path}: {ending or 'no ending'} is no format of pictures; use sheet.png")


def contact_sheet(title: str, shown: Sequence[tuple[Prediction, Image.Image]]) -> Image.Image:
    """Return a sheet of pictures with their most probable class, its probability, and their file's name.

    Args:
        title: the line above them.
        shown: from `predict_files`; the first `MOST_ON_SHEET` are drawn.
    """
    shown = shown[:MOST_ON_SHEET]
    columns = min(max(1, len(shown)), max(2, min(8, math.ceil(math.sqrt(1.6 * len(shown))))))
    rows = math.ceil(len(shown) / columns)
    cell = TILE + MARGIN, TILE + 3 * LINE + MARGIN
    top = MARGIN + 2 * LINE
    wide = max(MARGIN + columns * cell[0], 2 * MARGIN + round(label_font(26, bold=True).getlength(title)))
    folders = distinct_folders([prediction.file for prediction, _ in shown])
    sheet = Image.new("RGB", (wide, top + rows * cell[1]), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, MARGIN), title, INK, label_font(26, bold=True))
    for number, (prediction, picture) in enumerate(shown):
        left, upper = MARGIN + number % columns * cell[0], top + number // columns * cell[1]
        draw.rectangle((left - 1, upper - 1, left + TILE, upper + TILE), "#f8f9fa", FRAME)
        sheet.paste(picture, (left + (TILE - picture.width) // 2, upper + (TILE - picture.height) // 2))
        name = "/".join((*folders[number], prediction.file.name))
        _caption(draw, prediction, name, left, upper + TILE)
    return sheet


def _caption(draw: ImageDraw.ImageDraw, prediction: Prediction, name: str, left: int, upper: int) -> None:
    probability = prediction.probabilities[0]
    colour = SHARE if prediction.shares else SURE if probability >= 0.5 else UNSURE
    draw.rectangle((left - 1, upper + 6, left + TILE, upper + 13), FRAME)
    draw.rectangle((left - 1, upper + 6, left - 1 + round((TILE + 1) * probability), upper + 13), colour)
    percent, small, bold = f"{100 * probability:.1f} %", label_font(19), label_font(24, bold=True)
    space = TILE - bold.getlength(percent) - 12
    baseline = upper + 16 + LINE
    draw.text((left, baseline), _shortened(prediction.classes[0], bold, space), INK, bold, anchor="ls")
    draw.text((left + TILE, baseline), percent, colour, bold, anchor="rs")
    draw.text((left, baseline + LINE - 4), _shortened(name, small, TILE), MUTED, small, anchor="ls")


def _shortened(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    """Return `text`, with an ellipsis in its middle where it is longer than `width` pixels."""
    text = " ".join(text.split())
    if font.getlength(text) <= width:
        return text
    for kept in range(len(text) - 1, 0, -1):
        shorter = f"{text[: (kept + 1) // 2]}…{text[len(text) - kept // 2 :]}"
        if font.getlength(shorter) <= width:
            return shorter
    return "…"
