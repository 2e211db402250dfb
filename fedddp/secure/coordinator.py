"""The coordinator's part of secure aggregation: all that it receives, and how it unmasks the sum."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor

from fedddp.secure.client import PublicKeys, pair_key
from fedddp.secure.messages import KEY_BYTES
from fedddp.secure.primitives import add_mask, public_key
from fedddp.secure.shamir import recover


class Inbox:
    """All that the coordinator's role receives from the clients in one run of the protocol.

    Every rank has one, which receives what clients on that rank send. The small messages are gathered on all
    ranks; masked vectors are added up where they arrive, so a rank holds one vector. The protocol has no
    other way to the coordinator: a test that records the calls sees what the coordinator could see.
    """

    def __init__(self, length: int) -> None:
        """Start empty, for vectors of `length` elements."""
        self.keys: dict[int, PublicKeys] = {}
        """Public keys, by client."""
        self.sealed: dict[int, dict[int, bytes]] = {}
        """Sealed shares, by sender and receiver, to be forwarded."""
        self.total = torch.zeros(length, dtype=torch.int64)
        """Sum of the masked vectors, modulo 2^64; (L,) on the CPU."""
        self.arrived: set[int] = set()
        """The clients whose masked vectors are in `total`."""
        self.revealed: dict[int, dict[int, int]] = {}
        """Revealed shares, by the client whose secret they recover, and by the point x of the polynomial."""

    def receive_keys(self, client: int, keys: PublicKeys) -> None:
        """Receive a client's public keys (round 0)."""
        self.keys[client] = keys

    def receive_shares(self, client: int, sealed: Mapping[int, bytes]) -> None:
        """Receive the shares that a client sends to others through the coordinator, by receiver (round 1)."""
        self.sealed[client] = dict(sealed)

    def receive_masked(self, client: int, vector: Tensor) -> None:
        """Receive a client's masked vector y_u; (L,) int64 on the CPU (round 2)."""
        self.total.add_(vector)  # modulo 2^64: int64 wraps around
        self.arrived.add(client)

    def receive_revealed(self, client: int, shares: Mapping[int, int]) -> None:
        """Receive the shares that a client reveals, one for each client in its answer (round 3)."""
        for owner, share in shares.items():
            self.revealed.setdefault(owner, {})[client + 1] = share


def recoverable(
    holders: Mapping[int, Collection[int]], answering: Collection[int], needed: Callable[[int], int]
) -> bool:
    """Return whether enough of the clients that hold shares are `answering`, for every client.

    Args:
        holders: who was sent shares of a client's secrets, itself included, by client.
        answering: the clients that answer.
        needed: t of a number of holders.
    """
    remaining = {*answering}
    return all(len(remaining.intersection(those)) >= needed(len(those)) for those in holders.values())


def connected(clients: Collection[int], neighbours: Mapping[int, Collection[int]]) -> bool:
    """Return whether masks between neighbours connect all `clients`.

    Parts without a mask between them are unmasked one by one with what reveals the sum of all: the
    coordinator would learn the sum of each part, and a part may be two clients.
    """
    left = {*clients}
    frontier = {left.pop()} if left else set()
    while frontier:
        frontier = {other for client in frontier for other in neighbours[client]} & left
        left -= frontier
    return not left


def unmask(
    inbox: Inbox, context: str, neighbours: Mapping[int, Collection[int]], thresholds: Mapping[int, int]
) -> Tensor:
    """Return the sum of the vectors that arrived: `inbox.total` without the masks, in place.

    Args:
        inbox: the coordinator's; `total` is the sum over all ranks.
        context: run and round, as the clients have it.
        neighbours: of each client that sent shares, those that did so too, by client.
        thresholds: t of each client's secrets.

    Raises:
        ValueError: too few shares of a secret, or shares that do not recover the key that was published.
    """
    for client, others in neighbours.items():
        shares = dict(sorted(inbox.revealed.get(client, {}).items())[: thresholds[client]])
        if len(shares) < thresholds[client]:
            raise ValueError(f"{len(shares)} of {thresholds[client]} shares of a secret of client {client}")
        recovered = recover(shares)
        if recovered >= 2 ** (8 * KEY_BYTES):
            raise ValueError(f"the shares of client {client} recover no secret")
        secret = recovered.to_bytes(KEY_BYTES, "big")
        if client in inbox.arrived:
            add_mask(inbox.total, secret, -1)
            continue
        if public_key(secret) != inbox.keys[client].masking:
            raise ValueError(f"the shares of client {client} recover another key than it published")
        for other in inbox.arrived.intersection(others):
            # The mask that `other` added for this pair: positive if its partner's number is larger.
            key = pair_key(secret, inbox.keys[other].masking, context, client, other)
            add_mask(inbox.total, key, -1 if client > other else 1)
    return inbox.total
