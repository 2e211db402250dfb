"""The client's part of secure aggregation: its keys, shares, masked vector, and what it reveals."""

from __future__ import annotations

import secrets
from collections.abc import Collection, Mapping
from typing import NamedTuple

from torch import Tensor

from fedddp.secure.messages import KEY_BYTES, SHARE_BYTES
from fedddp.secure.primitives import add_mask, agree, derive, public_key, seal, unseal
from fedddp.secure.shamir import split


class RefusedError(Exception):
    """A client does not answer the coordinator, because the answer would reveal too much."""


class PublicKeys(NamedTuple):
    """What a client publishes; X25519 keys, 32 bytes each."""

    sharing: bytes
    """For the encryption of shares."""
    masking: bytes
    """For the masks between pairs."""


class SecureClient:
    """One client in one run of the protocol, which needs a new one: all its secrets are used once.

    The secrets come from the operating system's random source. They are in no configuration and in no
    checkpoint, and the sum does not depend on them.
    """

    def __init__(self, number: int, context: str, threshold: int) -> None:
        """Draw the secrets.

        Args:
            number: the client, in range(population).
            context: run and round, joined by "|"; the keys of pairs depend on it.
            threshold: t, how many shares recover a secret.
        """
        self.number, self.context, self.threshold = number, context, threshold
        self._sharing_key, self._masking_key, self._seed = (secrets.token_bytes(KEY_BYTES) for _ in range(3))
        self._keys: dict[int, PublicKeys] = {}
        """Of the neighbours that take part."""
        self._held: dict[int, tuple[int, int]] = {}
        """Shares of a client's masking key and of its seed, by client, its own among them."""
        self._revealed = self._masked = False

    def keys(self) -> PublicKeys:
        """Return the client's public keys (round 0)."""
        return PublicKeys(public_key(self._sharing_key), public_key(self._masking_key))

    def share(self, keys: Mapping[int, PublicKeys]) -> dict[int, bytes]:
        """Return sealed shares of the masking key and of the seed b_u, for each neighbour (round 1).

        Args:
            keys: the neighbours' public keys, by client.

        Raises:
            RefusedError: two clients have the same key, or there are fewer clients than shares are needed.
        """
        published = [key for both in (*keys.values(), self.keys()) for key in both]
        if len(set(published)) < len(published):
            raise RefusedError("two clients published the same key")
        holders = sorted({*keys, self.number})
        if len(holders) < self.threshold:
            raise RefusedError(f"{len(holders)} clients cannot hold shares of which {self.threshold} recover")
        self._keys = dict(keys)
        points = [holder + 1 for holder in holders]
        halves = [
            split(int.from_bytes(secret, "big"), self.threshold, points)
            for secret in (self._masking_key, self._seed)
        ]
        sealed = {}
        for holder in holders:
            first, second = (half[holder + 1] for half in halves)
            if holder == self.number:
                self._held[holder] = first, second
                continue
            text = first.to_bytes(SHARE_BYTES, "big") + second.to_bytes(SHARE_BYTES, "big")
            key, info = self._sealing_key(self.number, holder, holder)
            sealed[holder] = seal(key, text, info)
        return sealed

    def _sealing_key(self, sender: int, receiver: int, other: int) -> tuple[bytes, bytes]:
        """Return the key of the one message from `sender` to `receiver`, and its header."""
        info = f"{self.context}|{sender}|{receiver}".encode()
        return derive(agree(self._sharing_key, self._keys[other].sharing), info), info

    def receive(self, sealed: Mapping[int, bytes]) -> None:
        """Open the shares of the neighbours that sent some: only these take part from here on.

        Raises:
            RefusedError: too few, or one for another client or round.
            cryptography.exceptions.InvalidTag: a message was changed.
        """
        if not sealed.keys() <= self._keys.keys():
            raise RefusedError("shares of a client that is no neighbour")
        for sender, message in sealed.items():
            key, info = self._sealing_key(sender, self.number, sender)
            text = unseal(key, message, info)
            first, second = text[:SHARE_BYTES], text[SHARE_BYTES:]
            self._held[sender] = int.from_bytes(first, "big"), int.from_bytes(second, "big")
        if len(self._held) < self.threshold:
            raise RefusedError(f"{len(self._held)} of the needed {self.threshold} clients sent shares")
        self._keys = {client: self._keys[client] for client in sealed}

    def mask(self, vector: Tensor) -> Tensor:
        """Return y_u = v_u + PRG(b_u) + Σ_{w>u} PRG(s_uw) − Σ_{w<u} PRG(s_uw), modulo 2^64 (round 2).

        Args:
            vector: v_u, on the CPU; (L,) int64. It is changed in place, and returned.

        Raises:
            RefusedError: a second vector, whose difference from the first would have no mask.
        """
        if self._masked:
            raise RefusedError("masks are used once")
        self._masked = True
        add_mask(vector, self._seed)
        for other, keys in self._keys.items():
            key = pair_key(self._masking_key, keys.masking, self.context, self.number, other)
            add_mask(vector, key, 1 if other > self.number else -1)
        return vector

    def reveal(self, arrived: Collection[int], dropped: Collection[int]) -> dict[int, int]:
        """Return a share of one secret per client: b_u of `arrived`, the key of `dropped` (round 3).

        Raises:
            RefusedError: a client is in both lists, unknown, or missing; too few arrived; a second request.
        """
        both = sorted({*arrived} & {*dropped})
        if both:
            raise RefusedError(f"a request names client {both[0]} both as arrived and as dropped")
        if self._revealed:
            raise RefusedError("a second request in one round")
        if {*arrived} | {*dropped} != self._held.keys():
            raise RefusedError("a request names other clients than those that sent shares")
        if len(arrived) < self.threshold:
            raise RefusedError(f"{len(arrived)} clients arrived, but {self.threshold} are needed")
        self._revealed = True
        return {client: self._held[client][client in arrived] for client in sorted(self._held)}


def pair_key(private: bytes, public: bytes, context: str, one: int, other: int) -> bytes:
    """Return the key s_uw of the mask between two clients, which both can compute."""
    info = f"{context}|{min(one, other)}|{max(one, other)}".encode()
    return derive(agree(private, public), info)
