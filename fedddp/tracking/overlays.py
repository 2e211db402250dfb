"""Masks and boxes drawn on images: the colours of classes, and the pictures."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedddp.storage.examined import IGNORED

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageFont import FreeTypeFont

    from fedddp.storage.examined import BoxesOfImage, Examined

COLOURS = (
    *("#ff6e3a", "#008df9", "#800033", "#99ffff", "#331ab3", "#e6ff1a"),
    *("#cc3366", "#00cccc", "#0033ff", "#99e699", "#4d66b3", "#0099b3"),
)
"""Any two differ by 0.11 in Oklab, also as seen without red or green cones (Machado et al., 2009)."""

UNKNOWN = (128, 128, 128)
"""Colour of `IGNORED`."""

OPACITY = 0.45
"""Of a class's colour on an image; its edge is opaque."""

Pixels = NDArray[np.uint8]


def class_colour(label: int, *, background: bool) -> tuple[int, int, int]:
    """Return the colour of a class as RGB; with a `background`, class 0 is black, and class 1 the first."""
    if label == IGNORED:
        return UNKNOWN
    if background and label == 0:
        return 0, 0, 0
    turn, place = divmod(label - background, len(COLOURS))
    strength = 0.62 ** (turn % 4)  # of more than twelve classes some are darker
    red, green, blue = (round(strength * int(COLOURS[place][i : i + 2], 16)) for i in (1, 3, 5))
    return red, green, blue


def palette(*, background: bool) -> list[int]:
    """Return the colours of the classes 0 to 255 as PIL's mode P has them: 768 numbers."""
    return [part for label in range(256) for part in class_colour(label, background=background)]


def hexadecimal(colour: tuple[int, int, int]) -> str:
    """Return a colour as "#ff6e3a"."""
    return "#{:02x}{:02x}{:02x}".format(*colour)


def mask_picture(mask: Pixels, *, background: bool) -> Image:
    """Return a mask (H, W) as a picture of mode P: its pixels are the classes, its palette their colours."""
    from PIL import Image

    picture = Image.fromarray(np.ascontiguousarray(mask))
    picture.putpalette(palette(background=background))
    return picture


def picture_of(image: Pixels) -> Image:
    """Return an image (C, H, W) as an RGB picture; of other than 3 channels the first, as grey."""
    from PIL import Image

    pixels = np.moveaxis(image, 0, -1)
    return Image.fromarray(np.ascontiguousarray(pixels if pixels.shape[-1] == 3 else pixels[..., 0])).convert(
        "RGB"
    )


def scale_to(side: int, size: tuple[int, int]) -> float:
    """Return the factor that brings an image of `size` to `side` pixels: whole numbers enlarge it."""
    longest = max(size)
    return float(max(1, side // longest)) if longest <= side else side / longest


def resized(picture: Image, factor: float) -> Image:
    """Return a picture times `factor`; enlarged pixels stay visible as such, and a mask keeps its classes."""
    from PIL import Image

    if factor == 1:
        return picture
    size = max(1, round(factor * picture.width)), max(1, round(factor * picture.height))
    smooth = factor < 1 and picture.mode != "L"
    return picture.resize(size, Image.Resampling.LANCZOS if smooth else Image.Resampling.NEAREST)


def overlay(picture: Image, mask: Pixels, *, background: bool) -> Image:
    """Return an RGB picture with the classes of a mask (H, W) of its size in their colours.

    Pixels of the `background` (class 0) stay as they are; those of `IGNORED` become grey.
    """
    from PIL import Image

    pixels = np.asarray(picture.convert("RGB"), dtype=np.float64)
    colours = np.array(palette(background=background), dtype=np.float64).reshape(256, 3)[mask]
    edge = np.zeros(mask.shape, dtype=bool)  # where another class begins, and the edge of its own
    for axis in (0, 1):
        differs = np.diff(mask.astype(np.int16), axis=axis) != 0
        low, high = ([slice(None)] * 2 for _ in range(2))
        low[axis], high[axis] = slice(None, -1), slice(1, None)
        edge[tuple(low)] |= differs
        edge[tuple(high)] |= differs
    opacity = np.where(edge & (mask != IGNORED), 1.0, OPACITY)
    opacity[(mask == 0) & background] = 0.0
    blended = pixels + opacity[..., None] * (colours - pixels)
    return Image.fromarray(blended.round().astype(np.uint8))


def on_image(image: Pixels, mask: Pixels | None, side: int, *, background: bool) -> Image:
    """Return an image (C, H, W) with a mask (H, W) on it, about `side` pixels long; None: the image alone."""
    from PIL import Image

    factor = scale_to(side, (image.shape[1], image.shape[2]))
    picture = resized(picture_of(image), factor)
    if mask is None:
        return picture
    classes = np.asarray(resized(Image.fromarray(np.ascontiguousarray(mask)), factor))
    return overlay(picture, classes, background=background)


MOST_ON_SHEET, SHEET_SIDE, GAP = 8, 240, 6
"""Examples of a sheet of the worst, the pixels of each picture, and the space between two."""

SCORE = 0.3
"""Least score of a predicted box that is drawn; a detector finds many of less."""


def likely(found: BoxesOfImage) -> BoxesOfImage:
    """Return the predicted boxes with a score of `SCORE` or more."""
    assert found.scores is not None
    kept = found.scores >= SCORE
    return type(found)(found.boxes[kept], found.labels[kept], found.scores[kept])


def with_boxes(examined: Examined, number: int, names: Sequence[str], side: int) -> Image:
    """Return one of the worst images with its true boxes (solid) and the predicted ones (dashed)."""
    assert examined.images is not None
    image, (true, found) = examined.images[number], examined.boxes[number]
    factor = scale_to(side, (image.shape[1], image.shape[2]))
    picture = resized(picture_of(image), factor)
    draw_boxes(picture, true, names, factor=factor)
    draw_boxes(picture, likely(found), names, factor=factor, dashed=True)
    return picture


def sheet(examined: Examined, names: Sequence[str], *, background: bool) -> Pixels | None:
    """Return the worst examples of masks or boxes as one picture, (H, W, 3); None for other targets.

    Of masks a row has the image, the true mask and the predicted one; of boxes there are four in a row.
    """
    from PIL import Image

    if examined.images is None or examined.target not in ("mask", "boxes"):
        return None
    pictures, columns = [], 4
    for number in range(min(len(examined.images), MOST_ON_SHEET)):
        if examined.masks is None:
            pictures.append(with_boxes(examined, number, names, SHEET_SIDE))
            continue
        columns = 3
        for mask in (None, *(side[number] for side in examined.masks)):
            pictures.append(on_image(examined.images[number], mask, SHEET_SIDE, background=background))
    wide, high = pictures[0].width + GAP, pictures[0].height + GAP
    rows = -(-len(pictures) // columns)
    paper = Image.new("RGB", (columns * wide - GAP, rows * high - GAP), "white")
    for place, picture in enumerate(pictures):
        paper.paste(picture, (place % columns * wide, place // columns * high))
    return np.asarray(paper).copy()


def draw_boxes(
    picture: Image, found: BoxesOfImage, names: Sequence[str], *, factor: float = 1.0, dashed: bool = False
) -> None:
    """Draw boxes with the names of their classes, and their scores, on an RGB picture.

    Args:
        picture: is changed.
        found: the boxes.
        names: of the classes.
        factor: pixels of the picture per pixel of the boxes.
        dashed: broken lines, and the names above the boxes; else solid lines, and the names below.
    """
    from PIL import ImageDraw

    draw = ImageDraw.Draw(picture)
    width = max(2, round(max(picture.size) / 220))
    font = label_font(max(11, round(max(picture.size) / 32)))
    order = range(len(found.labels)) if found.scores is None else np.argsort(found.scores, kind="stable")
    for place in order:  # the likeliest on top
        left, top, right, bottom = (factor * float(edge) for edge in found.boxes[place])
        label = int(found.labels[place])
        colour = class_colour(label, background=False)
        corners = (left, top), (right, top), (right, bottom), (left, bottom)
        for start, end in zip(corners, (*corners[1:], corners[0]), strict=True):
            _line(draw, start, end, colour, width, dashed=dashed)
        text = names[label] if label < len(names) else str(label)
        if found.scores is not None:
            text += f" {found.scores[place]:.2f}"
        _tag(draw, picture.size, (left, top if dashed else bottom), text, colour, font, above=dashed)


def _line(draw: Any, start: Any, end: Any, colour: Any, width: int, *, dashed: bool) -> None:
    if not dashed:
        draw.line((*start, *end), colour, width)
        return
    (x, y), (dx, dy) = start, (end[0] - start[0], end[1] - start[1])
    length, dash = max(abs(dx), abs(dy)), 3.0 * width
    for begin in np.arange(0.0, length, 2 * dash):
        a, b = begin / length, min(begin + dash, length) / length
        draw.line((x + a * dx, y + a * dy, x + b * dx, y + b * dy), colour, width)


def _tag(
    draw: Any,
    size: tuple[int, int],
    at: tuple[float, float],
    text: str,
    colour: Any,
    font: Any,
    *,
    above: bool,
) -> None:
    """Write `text` on a field of `colour`, its corner at a corner of a box, inside of the picture."""
    wide, high = font.getlength(text) + 4, font.size + 3
    x = min(max(at[0], 0.0), max(size[0] - wide, 0.0))
    y = min(max(at[1] - high if above else at[1], 0.0), size[1] - high)
    draw.rectangle((x, y, x + wide, y + high), colour)
    red, green, blue = colour
    dark = 0.299 * red + 0.587 * green + 0.114 * blue < 140
    draw.text((x + 2, y + high / 2), text, "white" if dark else "black", font, anchor="lm")


@cache
def label_font(size: int, *, bold: bool = False) -> FreeTypeFont:
    """Return matplotlib's DejaVu Sans, which has the letters of most alphabets."""
    import matplotlib as mpl  # here: a model is loaded without it
    from PIL import ImageFont

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(mpl.get_data_path()) / "fonts" / "ttf" / name), size)
