"""Files of images and masks: arrays, TIFF files of several bands, 16-bit colours, masks of every kind."""

from __future__ import annotations

import struct
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray
from PIL import Image

from fedddp.data.image_files import read_image, read_mask, size_of
from fedddp.data.pixels import to_uint8

RNG = np.random.default_rng(0)
BANDS = RNG.integers(0, 256, (5, 16, 20), dtype=np.uint8)


def write_png(path: str, values: NDArray[Any]) -> None:
    """Write uint16 (H, W, C) as a PNG of 16 bits per channel."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    height, width, channels = values.shape
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    Path(path).write_bytes(b"\x89PNG\r\n\x1a\n" + header + body)


# ---- images ----


def test_pictures_are_rgb() -> None:
    Image.fromarray(BANDS[0]).save("grey.png")
    Image.fromarray(np.moveaxis(BANDS[:3], 0, 2)).save("colour.tif")
    np.testing.assert_array_equal(read_image("grey.png").numpy(), BANDS[[0, 0, 0]])
    np.testing.assert_array_equal(read_image("colour.tif").numpy(), BANDS[:3])


def test_a_tiff_file_of_one_page_is_a_grey_picture() -> None:
    tifffile.imwrite("x.tif", BANDS[0])
    np.testing.assert_array_equal(read_image("x.tif").numpy(), BANDS[[0, 0, 0]])


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("bands", [1, 2, 4, 5])
def test_arrays_keep_their_bands(bands: int, last: bool) -> None:
    values = BANDS[:bands]
    np.save("x.npy", np.moveaxis(values, 0, 2) if last else values)
    np.testing.assert_array_equal(read_image("x.npy").numpy(), values)


def test_an_array_of_rows_and_columns_has_one_band() -> None:
    np.save("x.npy", BANDS[0])
    np.testing.assert_array_equal(read_image("x.npy").numpy(), BANDS[:1])


@pytest.mark.parametrize(
    ("bands", "options"),
    [
        (5, {}),  # a page for each band
        (5, {"photometric": "minisblack", "planarconfig": "separate"}),
        (5, {"photometric": "minisblack", "planarconfig": "contig"}),
        (5, {"photometric": "rgb", "planarconfig": "contig"}),  # Pillow drops the last two
        (4, {"photometric": "rgb", "planarconfig": "contig", "extrasamples": ["unspecified"]}),
        (4, {"photometric": "minisblack", "planarconfig": "separate", "bigtiff": True}),
        (4, {"photometric": "minisblack", "byteorder": ">"}),
        (2, {"photometric": "minisblack", "planarconfig": "separate"}),
    ],
)
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_tiff_files_keep_their_bands(bands: int, options: dict[str, Any], dtype: str) -> None:
    values = BANDS[:bands]
    stored = np.moveaxis(values, 0, 2) if options.get("planarconfig") == "contig" else values
    factor = 1 if dtype == "uint8" else 10
    tifffile.imwrite("x.tif", (stored * np.float32(factor)).astype(dtype), **options)
    np.testing.assert_array_equal(read_image("x.tif", (0, 2550)).numpy(), values)


@pytest.mark.parametrize("channels", [3, 4])
def test_16_bit_colours_of_tiff_files_are_scaled_and_not_cut(channels: int) -> None:
    values = np.moveaxis(BANDS[:channels], 0, 2)
    tifffile.imwrite("x.tif", values.astype(np.uint16) * 16, photometric="rgb")
    np.testing.assert_array_equal(read_image("x.tif", (0, 4080)).numpy(), BANDS[:channels])
    with pytest.raises(ValueError, match="^x.tif has 16-bit values up to 4080 of 65535"):
        read_image("x.tif")


def test_16_bit_colours_of_png_files_are_scaled_and_not_cut() -> None:
    values = np.moveaxis(BANDS[:3], 0, 2).astype(np.uint16) * 16
    write_png("x.png", values)
    np.testing.assert_array_equal(read_image("x.png", (0, 4080)).numpy(), BANDS[:3])
    with pytest.raises(ValueError, match="^x.png has 16-bit values up to 4080 of 65535"):
        read_image("x.png")
    with Image.open("x.png") as picture:  # as a user's own dataset may return it
        np.testing.assert_array_equal(to_uint8(picture, "x", (0, 4080)).numpy(), BANDS[:3])
        assert picture.load() is not None  # it can be used still


@pytest.mark.parametrize("channels", [2, 4])
def test_transparent_16_bit_pixels_are_composed_on_black(channels: int) -> None:
    values = np.full((4, 5, channels), 40_000, np.uint16)
    values[0, :, -1], values[1, :, -1], values[2:, :, -1] = 0, 32768, 65535
    write_png("x.png", values)
    # 40000 / 257 is 155.6, half of which is 77.8.
    assert read_image("x.png")[:, :, 0].tolist() == [[0, 78, 156, 156]] * 3


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (
            lambda: np.save("x.npy", np.zeros((2, 2, 2, 2))),
            r"x.npy has shape \(2, 2, 2, 2\); give \(H, W\), ",
        ),
        (lambda: np.save("x.npy", np.array(["a"])), "x.npy holds <U1 values; give real numbers"),
        (
            lambda: np.save("x.npy", np.array([{}]), allow_pickle=True),
            "Object arrays cannot be loaded when allow_",
        ),
        (
            lambda: np.save("x.npy", np.zeros((8, 8, 8))),
            r"x.npy has shape \(8, 8, 8\), whose channels could be",
        ),
        (
            lambda: np.save("x.npy", np.full((8, 8), 3.0)),
            "x.npy has float64 values from 3 to 3; .*data.value_range",
        ),
        (
            lambda: tifffile.imwrite("x.tif", np.zeros((2, 3, 8, 9), np.uint8), photometric="minisblack"),
            r"x.tif has the dimensions .* of \(2, 3, 8, 9\); give one image of several bands",
        ),
    ],
)
def test_files_of_other_content_are_refused(write: Any, message: str) -> None:
    write()
    (file,) = Path().iterdir()
    with pytest.raises(ValueError, match=f"^{message}"):
        read_image(str(file))


def test_without_tifffile_its_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    tifffile.imwrite("bands.tif", BANDS)
    Image.fromarray(BANDS[0]).save("picture.tif")
    monkeypatch.setitem(sys.modules, "tifffile", None)
    with pytest.raises(ValueError, match=r"^bands.tif has several bands, .* pip install 'fedddp\[tiff\]'"):
        read_image("bands.tif")
    assert read_image("picture.tif").shape == (3, 16, 20)


# ---- masks ----

MASK = np.array([[0, 1, 2], [255, 1, 0]], np.uint8)


@pytest.mark.parametrize("kind", ["L", "P", "I;16", "I", "npy", "tif", "npy (1, H, W)", "npy (H, W, 1)"])
def test_masks_give_a_class_per_pixel(kind: str) -> None:
    file = "x.png"
    if kind.startswith("npy"):
        file = "x.npy"
        shape = {"npy": (2, 3), "npy (1, H, W)": (1, 2, 3), "npy (H, W, 1)": (2, 3, 1)}[kind]
        np.save(file, MASK.reshape(shape).astype(np.int64))
    elif kind == "tif":
        file = "x.tif"
        tifffile.imwrite(file, MASK)
    elif kind == "P":
        picture = Image.fromarray(MASK, "P")
        picture.putpalette([10, 200, 30, 40, 50, 250] * 128)
        picture.save(file)
    else:
        dtype = {"L": np.uint8, "I;16": np.uint16, "I": np.int32}[kind]
        file = "x.tif" if kind == "I" else file
        Image.fromarray(MASK.astype(dtype)).save(file)
    np.testing.assert_array_equal(read_mask(file), MASK)


def test_a_mask_of_truth_values_has_two_classes() -> None:
    Image.fromarray(MASK == 1).save("x.png")
    assert read_mask("x.png").tolist() == [[0, 1, 0], [0, 1, 0]]


@pytest.mark.parametrize(
    ("file", "image", "message"),
    [
        (
            "x.png",
            Image.new("RGB", (3, 2)),
            r"x.png is a mask of colours \(mode RGB\); save one whose pixels are",
        ),
        ("x.png", Image.new("RGBA", (3, 2)), r"x.png is a mask of colours \(mode RGBA\)"),
        (
            "x.jpg",
            Image.new("L", (3, 2)),
            "x.jpg is a JPEG file, which does not keep the numbers of classes; save",
        ),
        ("x.npy", np.zeros((2, 3)), r"x.npy is a mask of float64 values of shape \(2, 3\); give integers"),
        ("x.npy", np.zeros((2, 3, 4), np.uint8), r"x.npy is a mask of uint8 values of shape \(2, 3, 4\)"),
    ],
)
def test_other_masks_are_refused(file: str, image: Any, message: str) -> None:
    image.save(file) if isinstance(image, Image.Image) else np.save(file, image)
    with pytest.raises(ValueError, match=f"^{message}"):
        read_mask(file)


def test_sizes_are_those_of_the_header() -> None:
    Image.new("L", (3, 2)).save("x.png")
    np.save("x.npy", MASK)
    assert (size_of("x.png"), size_of("x.npy")) == ((2, 3), None)
