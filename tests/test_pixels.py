"""Pictures, arrays and tensors of every kind as uint8 pixels: 16 bits, transparency, bands, truth values."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fedddp.data.pixels import channels_first, to_bytes, to_uint8

RNG = np.random.default_rng(0)


# ---- 16 bits ----

# 65535 is 257 · 255: the top of one range is the top of the other.
SIXTEEN = np.array([[0, 128, 129, 257], [12850, 32767, 32896, 65535]], np.uint16)
EIGHT = [[0, 0, 1, 1], [50, 127, 128, 255]]


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I", "array", "tensor"])
def test_sixteen_bit_values_are_scaled_from_their_full_range(mode: str) -> None:
    image: Any = SIXTEEN if mode == "array" else torch.from_numpy(SIXTEEN)
    if mode == "I":
        image = Image.fromarray(SIXTEEN.astype(np.int32))
    elif mode == "I;16":
        image = Image.fromarray(SIXTEEN)
    elif mode == "I;16B":
        image = Image.frombytes(mode, (4, 2), SIXTEEN.astype(">u2").tobytes())
    assert not isinstance(image, Image.Image) or image.mode == mode
    assert to_uint8(image, "x").tolist() == [EIGHT]


# The ends of [1000, 3550] are 0 and 255, and 10 values are one grey level.
RANGED = np.array([[0, 1000, 1004, 1006], [1010, 2270, 3550, 65535]])
OF_RANGE = [[0, 0, 0, 1], [1, 127, 255, 255]]


@pytest.mark.parametrize(
    "kind", ["I;16", "I", "F", "uint16", "int16", "int32", "uint32", "float32", ">u2", "float16"]
)
def test_a_range_of_values_is_scaled_and_clipped(kind: str) -> None:
    values = np.minimum(RANGED, 30_000)
    if kind in ("I;16", "I", "F"):
        dtype = {"I;16": np.uint16, "I": np.int32, "F": np.float32}[kind]
        image: Any = Image.fromarray(values.astype(dtype))
        assert image.mode == kind
    else:
        image = values.astype(kind)
    assert to_uint8(image, "x", (1000, 3550)).tolist() == [OF_RANGE]
    if isinstance(image, np.ndarray) and kind not in ("uint32", ">u2"):
        assert to_uint8(torch.from_numpy(image), "x", (1000, 3550)).tolist() == [OF_RANGE]


def test_a_range_may_start_below_zero() -> None:
    hounsfield = np.array([[-2000, -1000, 0, 1550, 3000]], np.int16)
    assert to_uint8(hounsfield, "x", (-1000, 1550)).tolist() == [[[0, 0, 100, 255, 255]]]


def test_8_bit_images_stay_as_they_are_whatever_the_range() -> None:
    values = RNG.integers(0, 256, (5, 4), dtype=np.uint8)
    for image in (values, torch.from_numpy(values), Image.fromarray(values)):
        assert to_uint8(image, "x", (0, 4095)).tolist() == [values.tolist()]
    assert to_uint8(np.array([[True, False]]), "x", (0, 4095)).tolist() == [[[255, 0]]]


@pytest.mark.parametrize("kind", ["I;16", "I", "uint16"])
@pytest.mark.parametrize(
    ("highest", "levels", "top"), [(4095, 16, 4095), (10_000, 39, 16383), (16_383, 64, 16383), (1, 1, 1)]
)
def test_16_bit_images_of_few_grey_levels_are_refused(kind: str, highest: int, levels: int, top: int) -> None:
    values = np.array([[0, highest]])
    image: Any = values.astype(np.uint16)
    if kind != "uint16":
        image = Image.fromarray(values.astype(np.uint16 if kind == "I;16" else np.int32))
    with pytest.raises(ValueError, match=f"^x has 16-bit values up to {highest} of 65535") as caught:
        to_uint8(image, "x")
    assert f"would leave {levels} of 256 grey levels; set data.value_range, such as [0, {top}], " in str(
        caught.value
    )
    assert "\n" not in str(caught.value)
    assert to_uint8(image, "x", (0, 65535)).tolist() == [[[0, round(highest / 257)]]]
    assert to_uint8(image, "x", (0, highest)).tolist() == [[[0, 255]]]


@pytest.mark.parametrize("highest", [0, 16_384])
def test_16_bit_images_that_are_black_or_reach_a_quarter_are_taken(highest: int) -> None:
    assert to_uint8(np.array([[0, highest]], np.uint16), "x").tolist() == [[[0, round(highest / 257)]]]


@pytest.mark.parametrize("picture", [False, True])
def test_values_that_are_not_finite_are_refused_with_a_range(picture: bool) -> None:
    values = np.array([[0, np.nan]], np.float32)
    with pytest.raises(ValueError, match="^x has values that are not finite"):
        to_uint8(Image.fromarray(values) if picture else values, "x", (0, 1))


def test_arrays_without_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="^x holds complex128 values; give real numbers"):
        to_uint8(np.zeros((2, 2), complex), "x")


@pytest.mark.parametrize("picture", [False, True])
def test_floating_values_are_scaled_from_0_to_1(picture: bool) -> None:
    values = np.array([[0.0, 0.25, 1.0]], np.float32)
    image = Image.fromarray(values) if picture else values
    assert to_uint8(image, "x").tolist() == [[[0, 64, 255]]]


def test_truth_values_are_black_and_white() -> None:
    truth = np.array([[True, False], [False, True]])
    for image in (truth, torch.from_numpy(truth), Image.fromarray(truth)):
        assert to_uint8(image, "x").tolist() == [[[255, 0], [0, 255]]]


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (
            Image.fromarray(np.array([[0, 70_000]], np.int32)),
            "^x has I values from 0 to 70000, but must be in",
        ),
        (Image.fromarray(np.array([[-1, 5]], np.int32)), "^x has I values from -1 to 5, .*65535; rescale it"),
        (
            Image.fromarray(np.array([[0, 1.5]], np.float32)),
            r"^x has F values from 0 to 1.5, .* in 0..1; resc",
        ),
        (Image.fromarray(np.array([[np.nan]], np.float32)), "^x has F values from nan to nan"),
        (np.array([[0, 300]], np.int64), "^x has int64 values from 0 to 300; give uint8, or floating"),
        (np.array([[0.0, np.nan]]), "^x has float64 values from nan to nan"),
        (np.zeros((2, 2, 2, 2), np.uint8), r"^x is \(2, 2, 2, 2\); expected a PIL image or a tensor"),
    ],
)
def test_values_out_of_range_are_refused_by_name(image: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        to_uint8(image, "x")
    assert "\n" not in str(caught.value)


# ---- transparency and palettes ----


def test_transparent_pixels_are_composed_on_black() -> None:
    values = RNG.integers(0, 256, (3, 5, 4), dtype=np.uint8)
    values[0, :2, 3] = 0, 255
    pixels = to_uint8(Image.fromarray(values), "x").numpy().astype(float)
    expected = values[..., :3] * (values[..., 3:] / 255.0)
    np.testing.assert_allclose(pixels, expected.transpose(2, 0, 1), atol=1)
    assert not pixels[:, 0, 0].any()  # what lies under a transparent pixel is never seen
    np.testing.assert_array_equal(pixels[:, 0, 1], values[0, 1, :3])


def test_grey_with_transparency_stays_one_channel() -> None:
    values = np.array([[[200, 0], [200, 255], [200, 128]]], np.uint8)
    assert to_uint8(Image.fromarray(values, "LA"), "x").tolist() == [[[0, 200, 100]]]


def test_black_and_white_with_transparency_stays_one_channel() -> None:
    image = Image.new("1", (2, 1), 1)
    image.info["transparency"] = 255
    assert to_uint8(image, "x").tolist() == [[[0, 0]]]


@pytest.mark.parametrize("mode", ["P", "L", "RGB"])
def test_a_transparent_colour_is_black(mode: str) -> None:
    image = Image.new("RGB", (2, 1), (250, 10, 20))
    image.putpixel((1, 0), (40, 80, 120))
    if mode == "P":
        image = image.quantize(2)
        first = image.getpixel((0, 0))
        image.info["transparency"] = first
        expected = [[[0, 40]], [[0, 80]], [[0, 120]]]
    elif mode == "L":
        image = image.convert("L")
        image.info["transparency"] = image.getpixel((0, 0))
        expected = [[[0, 73]]]  # 0.299 · 40 + 0.587 · 80 + 0.114 · 120, rounded
    else:
        image.info["transparency"] = (250, 10, 20)
        expected = [[[0, 40]], [[0, 80]], [[0, 120]]]
    assert to_uint8(image, "x").tolist() == expected


@pytest.mark.parametrize("mode", ["P", "CMYK", "YCbCr", "HSV"])
def test_pictures_of_other_modes_become_rgb(mode: str) -> None:
    colour = Image.new("RGB", (2, 2), (255, 0, 0))
    image = colour.quantize(2) if mode == "P" else colour.convert(mode)
    np.testing.assert_allclose(to_uint8(image, "x")[:, 0, 0], [255, 0, 0], atol=2)


# ---- channels ----


@pytest.mark.parametrize("bands", [1, 2, 3, 4, 13])
@pytest.mark.parametrize("kind", ["array", "tensor"])
def test_channels_may_be_the_first_or_the_last_dimension(bands: int, kind: str) -> None:
    values = RNG.integers(0, 256, (bands, 16, 20), dtype=np.uint8)
    for given in (values, values.transpose(1, 2, 0)):
        image = given if kind == "array" else torch.from_numpy(given)
        np.testing.assert_array_equal(to_uint8(image, "x").numpy(), values)


def test_a_stack_of_images_is_taken_as_each_of_them_is() -> None:
    values = torch.from_numpy(RNG.integers(0, 256, (5, 13, 16, 20), dtype=np.uint8))
    assert torch.equal(channels_first(values, "x"), values)
    assert torch.equal(channels_first(values.permute(0, 2, 3, 1), "x"), values)
    assert torch.equal(channels_first(values[:, 0], "x"), values[:, :1])
    assert to_bytes(values.to(torch.uint16) * 257, "x").tolist() == values.tolist()


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((3, 2, 2), (3, 2, 2)),  # more channels than rows, but one or three are always channels
        ((2, 2, 3), (3, 2, 2)),
        ((1, 1, 5), (1, 1, 5)),
        ((8, 3, 3), (3, 8, 3)),
        ((3, 3, 3), (3, 3, 3)),
    ],
)
def test_one_or_three_are_channels_in_images_of_any_size(
    shape: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    assert to_uint8(np.zeros(shape, np.uint8), "x").shape == expected


@pytest.mark.parametrize("shape", [(16, 16, 16), (16, 4, 20), (4, 4, 20), (20, 4, 4), (13, 8, 8)])
def test_ambiguous_channels_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(
        ValueError, match=r"^x has shape .*; give tensors \(C, H, W\) with fewer channels than"
    ):
        to_uint8(np.zeros(shape, np.uint8), "x")


def test_an_array_that_cannot_be_written_is_taken_as_it_is() -> None:
    values = RNG.integers(0, 256, (4, 5), dtype=np.uint8)
    values.flags.writeable = False
    np.testing.assert_array_equal(to_uint8(values, "x")[0].numpy(), values)
