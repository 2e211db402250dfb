"""The cryptography of secure aggregation: published test vectors, masks, and Shamir's secret sharing."""

from __future__ import annotations

import itertools
import random
import secrets
from collections import Counter

import numpy as np
import pytest
import torch
from cryptography.exceptions import InvalidTag
from torch import Tensor

from fedddp.secure.primitives import ELEMENTS_AT_ONCE, add_mask, agree, derive, public_key, seal, unseal
from fedddp.secure.shamir import PRIME, evaluate, recover, split

ALICE = bytes.fromhex("77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a")
BOB = bytes.fromhex("5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb")


def mask(key: bytes, length: int, start: bytes = bytes(16)) -> Tensor:
    vector = torch.zeros(length, dtype=torch.int64)
    add_mask(vector, key, start=start)
    return vector


# ---- published vectors ----


@pytest.mark.parametrize(
    ("scalar", "point", "product"),
    [
        (
            "a546e36bf0527c9d3b16154b82465edd62144c0ac1fc5a18506a2244ba449ac4",
            "e6db6867583030db3594c1a424b15f7c726624ec26b3353b10a903a6d0ab1c4c",
            "c3da55379de9c6908e94ea4df28d084f32eccf03491c71f754b4075577a28552",
        ),
        (
            "4b66e9d4d1b4673c5ad22691957d6af5c11b6421e0ea01d42ca4169e7918ba0d",
            "e5210f12786811d3f4b7959d0538ae2c31dbe7106fc03c3efc4cd549c715a493",
            "95cbde9476e8907d7aade45cb4b873f88b595a68799fa152e6f8f7647aac7957",
        ),
    ],
)
def test_x25519_of_rfc_7748_section_5_2(scalar: str, point: str, product: str) -> None:
    assert agree(bytes.fromhex(scalar), bytes.fromhex(point)).hex() == product


def test_key_agreement_of_rfc_7748_section_6_1() -> None:
    alice, bob = public_key(ALICE), public_key(BOB)
    assert alice.hex() == "8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a"
    assert bob.hex() == "de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f"
    shared = "4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742"
    assert agree(ALICE, bob).hex() == agree(BOB, alice).hex() == shared


def test_a_public_key_of_small_order_is_refused() -> None:
    with pytest.raises(ValueError, match=r".*"):
        agree(ALICE, bytes(32))


@pytest.mark.parametrize(
    ("salt", "info", "okm"),
    [
        (
            bytes(range(13)),
            bytes(range(0xF0, 0xFA)),
            "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865",
        ),
        (
            None,
            b"",
            "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d9d201395faa4b61a96c8",
        ),
    ],
)
def test_hkdf_of_rfc_5869_appendix_a_1_and_a_3(salt: bytes | None, info: bytes, okm: str) -> None:
    assert derive(b"\x0b" * 22, info, salt=salt, length=42).hex() == okm


@pytest.mark.parametrize(
    ("key", "start", "keystream"),
    [
        (  # section 2.4.2
            bytes(range(32)),
            "01000000" + "000000000000004a00000000",
            "224f51f3401bd9e12fde276fb8631ded8c131f823d2c06e27e4fcaec9ef3cf788a3b0aa372600a92b57974cded2b9334"
            "794cba40c63e34cdea212c4cf07d41b769a6749f3f630f4122cafe28ec4dc47e26d4346d70b98c73f3e9c53ac40c5945"
            "398b6eda1a832c89c167eacd901d7e2b",
        ),
        (  # appendix A.1, test vector 1
            bytes(32),
            "00" * 16,
            "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
            "da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586",
        ),
    ],
)
def test_masks_are_the_chacha20_keystream_of_rfc_8439(key: bytes, start: str, keystream: str) -> None:
    expected = np.frombuffer(bytes.fromhex(keystream), dtype="<i8")
    assert mask(key, len(expected), bytes.fromhex(start)).tolist() == expected.tolist()


def test_sealed_messages_are_those_of_rfc_8439_section_2_8_2() -> None:
    key, nonce = bytes(range(0x80, 0xA0)), bytes.fromhex("070000004041424344454647")
    header = bytes.fromhex("50515253c0c1c2c3c4c5c6c7")
    text = (
        b"Ladies and Gentlemen of the class of '99: If I could offer you only one tip for the future, "
        b"sunscreen would be it."
    )
    sealed = (
        "d31a8d34648e60db7b86afbc53ef7ec2a4aded51296e08fea9e2b5a736ee62d63dbea45e8ca9671282fafb69da92728b"
        "1a71de0a9e060b2905d6a5b67ecd3b3692ddbd7f2d778b8c9803aee328091b58fab324e4fad675945585808b4831d7bc"
        "3ff4def08e4b7a9de576d26586cec64b6116"
        "1ae10b594f09e26a7e902ecbd0600691"
    )
    assert seal(key, text, header, nonce).hex() == sealed
    assert unseal(key, bytes.fromhex(sealed), header, nonce) == text


@pytest.mark.parametrize("where", ["key", "message", "tag", "header"])
def test_a_changed_message_is_refused(where: str) -> None:
    key, header = secrets.token_bytes(32), b"run|3|1|2"
    sealed = bytearray(seal(key, b"a share", header))
    if where in ("message", "tag"):
        sealed[0 if where == "message" else -1] ^= 1
    with pytest.raises(InvalidTag):
        unseal(
            bytes(32) if where == "key" else key, bytes(sealed), b"run|4|1|2" if where == "header" else header
        )


# ---- masks ----


@pytest.mark.parametrize(
    "length", [0, 1, 7, ELEMENTS_AT_ONCE, ELEMENTS_AT_ONCE + 1, 3 * ELEMENTS_AT_ONCE - 5]
)
def test_a_mask_is_one_keystream_whatever_the_length(length: int) -> None:
    key = secrets.token_bytes(32)
    assert torch.equal(mask(key, length), mask(key, 3 * ELEMENTS_AT_ONCE)[:length])


def test_masks_of_a_pair_cancel_bit_for_bit() -> None:
    key, vector = secrets.token_bytes(32), torch.randint(-(2**63), 2**63 - 1, (100_000,))
    masked = vector.clone()
    add_mask(masked, key, 1)
    assert int((masked == vector).sum()) == 0
    add_mask(masked, key, -1)
    assert torch.equal(masked, vector)


def test_masks_depend_on_every_bit_of_their_key() -> None:
    key = secrets.token_bytes(32)
    masks = [mask(key, 64)]
    for bit in range(256):
        other = bytearray(key)
        other[bit // 8] ^= 1 << bit % 8
        masks.append(mask(bytes(other), 64))
    for one, two in itertools.combinations(masks, 2):
        assert int((one == two).sum()) == 0


def test_no_mask_follows_from_32_bits_of_its_key() -> None:
    """A key that is folded to a seed of 32 bits could be found by trying all of them.

    With any 4 bytes kept and all others different, or with 28 kept and any 4 different, a mask is another:
    so no 4 bytes of the key decide it. Of keys with the same exclusive or of their words, 2^12 are tried too.
    """
    key = secrets.token_bytes(32)
    target = mask(key, 8).tolist()
    for start in range(29):
        kept = secrets.token_bytes(start) + key[start : start + 4] + secrets.token_bytes(28 - start)
        changed = key[:start] + secrets.token_bytes(4) + key[start + 4 :]
        assert mask(kept, 8).tolist() != target
        assert changed == key or mask(changed, 8).tolist() != target
    words = np.frombuffer(key, dtype=np.uint32)
    for _ in range(2**12):
        other = np.frombuffer(secrets.token_bytes(32), dtype=np.uint32).copy()
        other[-1] ^= np.bitwise_xor.reduce(other) ^ np.bitwise_xor.reduce(words)
        assert np.bitwise_xor.reduce(other) == np.bitwise_xor.reduce(words)
        assert mask(other.tobytes(), 8).tolist() != target
    swapped = words[::-1].tobytes()  # the same sum, and the same exclusive or
    assert mask(swapped, 8).tolist() != target


def test_keys_depend_on_the_purpose() -> None:
    secret = secrets.token_bytes(32)
    infos = [f"{run}|{number}|{u}|{w}" for run in "ab" for number in (1, 2) for u in (1, 12) for w in (3, 23)]
    assert len({derive(secret, info.encode()) for info in infos}) == len(infos)


# ---- Shamir ----


@pytest.mark.parametrize(("threshold", "holders"), [(1, 1), (2, 3), (3, 5), (5, 5), (4, 6)])
def test_any_threshold_shares_recover_the_secret(threshold: int, holders: int) -> None:
    points = random.Random(threshold).sample(range(1, 10**6), holders)
    secret = int.from_bytes(secrets.token_bytes(32), "big")
    shares = split(secret, threshold, points)
    for count in range(threshold, holders + 1):
        for some in itertools.combinations(points, count):
            assert recover({x: shares[x] for x in some}) == secret


@pytest.mark.parametrize("secret", [0, 1, PRIME - 1])
def test_extreme_secrets_are_shared(secret: int) -> None:
    shares = split(secret, 2, [1, 2, 3])
    assert recover({x: shares[x] for x in (1, 3)}) == secret


def test_fewer_shares_fit_every_secret_equally() -> None:
    """In a field of 7 elements, over all polynomials: t − 1 shares leave all 7 secrets equally likely."""
    prime, threshold, points = 7, 3, [1, 2, 4, 5]
    polynomials = list(itertools.product(range(prime), repeat=threshold))
    for some in itertools.combinations(points, threshold - 1):
        seen = Counter(
            (tuple(evaluate(polynomial, some, prime).values()), polynomial[0]) for polynomial in polynomials
        )
        views = {view for view, _ in seen}
        assert len(views) == prime ** (threshold - 1)
        assert all(seen[view, secret] == 1 for view in views for secret in range(prime))


def test_coefficients_are_drawn_again_for_every_secret() -> None:
    assert len({split(5, 2, [1, 2])[1] for _ in range(20)}) == 20


def test_shares_are_values_of_a_polynomial_of_degree_t_minus_1() -> None:
    assert evaluate([3, 2, 1], [1, 2, 10], 1000) == {1: 6, 2: 11, 10: 123}
    wrong = {**split(42, 3, [1, 2, 3]), 3: 0}
    assert recover(wrong) != 42
