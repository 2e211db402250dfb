"""The cryptography of the protocol: thin wrappers of `cryptography`, so that test vectors pass through them.

Keys, seeds and secrets are `bytes` of length 32.
"""

from __future__ import annotations

import numpy as np
import torch
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from torch import Tensor

from fedddp.secure.messages import KEY_BYTES

ELEMENTS_AT_ONCE = 1 << 16
"""Elements of a mask that are made at a time: half a MB, which stays in a core's cache."""

_ZEROS = bytes(8 * ELEMENTS_AT_ONCE)


def public_key(private: bytes) -> bytes:
    """Return the X25519 public key of a private key (RFC 7748)."""
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def agree(private: bytes, public: bytes) -> bytes:
    """Return the X25519 shared secret of a private key and another's public key (RFC 7748).

    Raises:
        ValueError: `public` is a point of small order, for which all private keys give the secret 0.
    """
    return X25519PrivateKey.from_private_bytes(private).exchange(X25519PublicKey.from_public_bytes(public))


def derive(secret: bytes, info: bytes, *, salt: bytes | None = None, length: int = KEY_BYTES) -> bytes:
    """Return a key of `length` bytes for the purpose `info`, by HKDF-SHA256 (RFC 5869)."""
    return HKDF(SHA256(), length, salt, info).derive(secret)


def seal(key: bytes, text: bytes, header: bytes, nonce: bytes = bytes(12)) -> bytes:
    """Return `text`, encrypted and authenticated with `header` by ChaCha20-Poly1305 (RFC 8439).

    The nonce is zero: a key must seal one message only.
    """
    return ChaCha20Poly1305(key).encrypt(nonce, text, header)


def unseal(key: bytes, sealed: bytes, header: bytes, nonce: bytes = bytes(12)) -> bytes:
    """Return the text of a sealed message.

    Raises:
        cryptography.exceptions.InvalidTag: the message, its header or the key is another.
    """
    return ChaCha20Poly1305(key).decrypt(nonce, sealed, header)


def add_mask(vector: Tensor, key: bytes, sign: int = 1, *, start: bytes = bytes(16)) -> None:
    """Add `sign` times the mask PRG(key) to `vector`, in place and modulo 2^64.

    The mask is the ChaCha20 keystream (RFC 8439) as little-endian 64-bit integers. It has as many elements
    as the vector, and its first ones do not depend on how many these are.

    Args:
        vector: contiguous, on the CPU; (L,) int64.
        key: 32 bytes, which must make one mask only.
        sign: 1 or -1.
        start: the block counter, 4 bytes little-endian, and the nonce, 12 bytes.
    """
    stream = Cipher(ChaCha20(key, start), mode=None).encryptor()
    # OpenSSL's `update_into` asks for a little more than it writes.
    buffer = bytearray(8 * min(ELEMENTS_AT_ONCE, max(1, vector.numel())) + 64)
    for piece in torch.split(vector, ELEMENTS_AT_ONCE):
        size = 8 * piece.numel()
        stream.update_into(_ZEROS[:size] if size < len(_ZEROS) else _ZEROS, buffer)
        words = np.frombuffer(buffer, dtype="<i8", count=piece.numel()).astype(np.int64, copy=False)
        piece.add_(torch.from_numpy(words), alpha=sign)  # int64 wraps around
