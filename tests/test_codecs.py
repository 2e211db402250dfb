"""Codecs: the bits of plain Python references, sizes, unbiasedness, errors, and the vectors at the edges."""

from __future__ import annotations

import math
import time

import codec_references as ref
import numpy as np
import pytest
import torch
from torch import Tensor

from fedddp.section import choices
from fedddp.transport import bits
from fedddp.transport.codec import HEADER
from fedddp.transport.codecs import EDEN, QSGD, Cast, Codec, Int8, Sign, TopK
from fedddp.transport.eden import LEVELS, hadamard_

CODECS = [
    *(Cast(), Cast(dtype="fp16"), Int8()),
    *(QSGD(), QSGD(levels=1), QSGD(levels=255), QSGD(levels=7, bucket=100)),
    *(TopK(), TopK(fraction=0.5), TopK(fraction=1.0), TopK(k=3), Sign()),
    *(EDEN(bits=count) for count in (1, 2, 3, 4)),
]
each_codec = pytest.mark.parametrize("codec", CODECS, ids=str)


def lognormal(length: int, seed: int = 1) -> Tensor:
    """Return a vector of few large and many small elements, of random signs."""
    rng = np.random.default_rng(seed)
    magnitudes = np.exp(rng.standard_normal(length))
    return torch.from_numpy((magnitudes * rng.choice([-1.0, 1.0], length)).astype(np.float32))


def through(codec: Codec, vector: Tensor, seed: int = 0) -> Tensor:
    return codec.decode(codec.encode(vector, np.random.default_rng(seed)))


def relative_error(codec: Codec, vector: Tensor, draws: int) -> float:
    """Return the mean of ‖C(v) − v‖²/‖v‖² over that many draws."""
    rng, exact = np.random.default_rng(7), vector.double()
    errors = [
        float((codec.decode(codec.encode(vector, rng)).double() - exact).square().sum()) for _ in range(draws)
    ]
    return sum(errors) / draws / float(exact.square().sum())


# ---- bits ----


@each_codec
@pytest.mark.parametrize("length", [1, 2, 5, 64, 300])
def test_a_codec_has_the_bits_of_plain_python(codec: Codec, length: int) -> None:
    vector = lognormal(length, seed=length)
    vector[length // 2] = 0.0
    payload = codec.encode(vector, np.random.default_rng(length))
    assert payload.dtype == torch.uint8
    expected, decoded = ref.coded(codec, list(vector.numpy()), np.random.default_rng(length))
    ours = codec.decode(payload)
    assert ours.dtype == torch.float32
    assert bytes(payload.numpy()) == expected
    assert torch.equal(ours, torch.tensor(np.array(decoded)))


@pytest.mark.parametrize("width", range(1, 25))
def test_packed_numbers_come_back(width: int) -> None:
    for count in (1, 7, 8, 9, 1000):
        values = torch.from_numpy(np.random.default_rng(count).integers(0, 2**width, count))
        packed = bits.pack(values, width)
        assert len(packed) == math.ceil(count * width / 8) == bits.packed_bytes(count, width)
        assert torch.equal(bits.unpack(packed, width, count).long(), values)
        assert bytes(packed.numpy()) == ref.bits_of(values.tolist(), width)


def filled_up(length: int) -> int:
    """Return the elements that EDEN codes of a vector of `length`."""
    rest = length % 4096
    return length - rest + (max(128, 1 << (rest - 1).bit_length()) if rest else 0)


@pytest.mark.parametrize("d", [1, 255, 256, 257, 4096, 5000, 9999])
def test_payloads_have_the_bytes_that_the_documentation_counts(d: int) -> None:
    def size(codec: Codec) -> int:
        return len(codec.encode(lognormal(d), np.random.default_rng(0))) - HEADER

    assert size(Cast()) == size(Cast(dtype="fp16")) == 2 * d
    assert size(Int8()) == d + 4 * math.ceil(d / 256)
    for levels in (1, 4, 16, 255):
        assert size(QSGD(levels=levels)) == 4 + math.ceil(d * math.ceil(math.log2(2 * levels + 1)) / 8)
    assert size(QSGD(levels=7, bucket=512)) == 4 * math.ceil(d / 512) + math.ceil(d * 4 / 8)
    k, width = max(1, round(0.01 * d)), math.ceil(math.log2(d))
    places = min(math.ceil(k * width / 8), math.ceil(d / 8)) if k < d else 0
    assert size(TopK()) == 4 * k + places
    assert size(TopK(fraction=1.0)) == 4 * d
    assert size(Sign()) == 4 + math.ceil(d / 8)
    for count in LEVELS:
        assert size(EDEN(bits=count)) == 8 + 4 * math.ceil(d / 4096) + math.ceil(filled_up(d) * count / 8)


@each_codec
def test_the_length_of_a_payload_does_not_depend_on_the_values(codec: Codec) -> None:
    sizes = {len(codec.encode(v, np.random.default_rng(0))) for v in (lognormal(777), torch.zeros(777))}
    assert len(sizes) == 1


# ---- errors ----


@pytest.mark.parametrize(
    "codec",
    [Int8(), QSGD(), QSGD(levels=1), QSGD(levels=7, bucket=16), *(EDEN(bits=count) for count in LEVELS)],
    ids=str,
)
def test_the_mean_of_many_draws_is_the_vector(codec: Codec) -> None:
    """N·‖mean − x‖²/mean‖error‖² is near 1 where errors have mean zero, and grows with N where not."""
    vector, draws, rng = lognormal(64), 400, np.random.default_rng(5)
    errors = torch.stack([codec.decode(codec.encode(vector, rng)) for _ in range(draws)]).double() - vector
    statistic = draws * errors.mean(0).square().sum() / errors.square().sum(1).mean()
    assert 0.7 <= float(statistic) <= 1.16


def test_the_last_elements_of_eden_have_no_bias() -> None:
    """Rotated alone, two elements would always decode to the same two, far from them."""
    vector, draws, rng = torch.tensor([1.0, 0.1]), 400, np.random.default_rng(5)
    errors = torch.stack([through(EDEN(bits=1), vector, int(rng.integers(2**63))) for _ in range(draws)])
    errors = errors.double() - vector
    assert 0.2 <= float(draws * errors.mean(0).square().sum() / errors.square().sum(1).mean()) <= 5


def test_the_test_of_unbiasedness_finds_a_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedddp.transport.eden.ROTATIONS", 1)
    vector, draws, rng = lognormal(64), 400, np.random.default_rng(5)
    codec = EDEN(bits=1)
    errors = torch.stack([codec.decode(codec.encode(vector, rng)) for _ in range(draws)]).double() - vector
    assert float(draws * errors.mean(0).square().sum() / errors.square().sum(1).mean()) > 2


@pytest.mark.parametrize(("levels", "expected"), [(1, 17.4), (4, 3.68), (16, 0.554), (255, 0.00258)])
def test_qsgd_has_the_error_of_its_levels(levels: int, expected: float) -> None:
    vector = lognormal(1024, seed=1)
    codec = QSGD(levels=levels)
    assert relative_error(codec, vector, 200) == pytest.approx(expected, rel=0.1)
    ratios = vector.abs().double() * levels / vector.double().norm()
    part = ratios - ratios.floor()
    exact = float((part * (1 - part)).sum()) / levels**2
    assert exact <= min(1024 / levels**2, math.sqrt(1024) / levels)
    assert relative_error(codec, vector, 200) == pytest.approx(exact, rel=0.05)


@pytest.mark.parametrize(("count", "expected"), [(1, 0.5708), (2, 0.1331), (3, 0.03578), (4, 0.00959)])
def test_eden_has_the_error_of_its_bits_whatever_the_vector(count: int, expected: float) -> None:
    for vector in (lognormal(8192), torch.randn(8192, generator=torch.Generator().manual_seed(1))):
        assert relative_error(EDEN(bits=count), vector, 20) == pytest.approx(expected, rel=0.02)


def test_the_hadamard_transform_is_its_own_inverse_and_keeps_norms() -> None:
    rows = torch.randn(3, 256, generator=torch.Generator().manual_seed(2))
    transformed = hadamard_(rows.clone())
    torch.testing.assert_close(transformed.norm(dim=1), rows.norm(dim=1))
    torch.testing.assert_close(hadamard_(transformed), rows)


def test_many_levels_and_all_elements_are_the_vector() -> None:
    vector = lognormal(1000)
    assert torch.equal(through(TopK(fraction=1.0), vector), vector)
    assert torch.equal(through(TopK(k=5000), vector), vector)
    torch.testing.assert_close(
        through(QSGD(levels=32767), vector), vector, rtol=0, atol=float(vector.norm()) / 32767
    )


# ---- vectors at the edges ----


@each_codec
@pytest.mark.parametrize("length", [1, 2, 3, 255, 257, 4097])
def test_zeros_stay_zero(codec: Codec, length: int) -> None:
    assert torch.equal(through(codec, torch.zeros(length)), torch.zeros(length))


@each_codec
@pytest.mark.parametrize("length", [1, 3, 300])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_arrives_as_not_finite(codec: Codec, length: int, bad: float) -> None:
    vector = lognormal(length)
    vector[length // 2] = bad
    assert not torch.isfinite(through(codec, vector)).all()


@each_codec
def test_a_vector_is_not_changed_and_may_be_of_any_layout_and_type(codec: Codec) -> None:
    vector = lognormal(512)
    before = vector.clone()
    payload = codec.encode(vector, np.random.default_rng(0))
    assert torch.equal(vector, before)
    strided = torch.stack([vector, vector], 1)[:, 0].double()
    assert torch.equal(codec.encode(strided, np.random.default_rng(0)), payload)


def test_every_codec_is_tested() -> None:
    ours = {name for name in choices(Codec) if "." not in name}
    assert {type(codec).__name__ for codec in CODECS} == ours


@each_codec
def test_a_million_elements_take_about_a_second(codec: Codec) -> None:
    vector = torch.randn(1_000_000, generator=torch.Generator().manual_seed(0))
    started = time.process_time()
    through(codec, vector)
    assert time.process_time() - started < 2, "0.05 to 0.4 s on an idle machine"
