"""One run of the protocol over the clients of a cohort, which live on the ranks that train them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import Tensor

from fedddp.distributed.world import World
from fedddp.secure.client import SecureClient
from fedddp.secure.coordinator import Inbox, connected, recoverable, unmask
from fedddp.secure.messages import KEY_BYTES, NUMBER_BYTES, SEALED_BYTES, SHARE_BYTES
from fedddp.secure.settings import FEWEST, Drop, SecureAggregation


class SecureSum:
    """Adds up int64 vectors of the clients of a cohort, so that the coordinator learns their sum only.

    The rounds are those of Bonawitz et al., 2017 (arXiv:1611.04482): `open` exchanges keys and shares,
    `deliver` sends masked vectors, `close` unmasks their sum. The clients and the coordinator are in one
    trust domain here; what the coordinator's role receives is what its `Inbox` receives.
    """

    def __init__(
        self,
        world: World,
        settings: SecureAggregation,
        neighbours: Mapping[int, Collection[int]],
        *,
        hosted: Iterable[int],
        drops: Mapping[int, Drop],
        context: str,
        length: int,
    ) -> None:
        """Create the clients of this rank.

        Args:
            world: the ranks.
            settings: the threshold.
            neighbours: of every client of the cohort, by client; the same on all ranks.
            hosted: the clients on this rank; every client is on exactly one.
            drops: the clients that drop out, and where; the same on all ranks.
            context: run and round; the keys of pairs depend on it.
            length: elements L of a vector.
        """
        self.world, self.settings, self.drops, self.context = world, settings, drops, context
        self.neighbours = {client: [*others] for client, others in neighbours.items()}
        self.holders = {client: [*others, client] for client, others in self.neighbours.items()}
        self.thresholds = {client: settings.needed(len(those)) for client, those in self.holders.items()}
        self.clients = {k: SecureClient(k, context, self.thresholds[k]) for k in hosted}
        self.inbox = Inbox(length)
        self.shared: set[int] = set()
        """The clients that sent shares: all who take part from round 2 on."""
        self.problem = ""
        """Why the sum cannot be recovered; empty while it can. The same on all ranks."""
        self.bytes_up = self.bytes_down = 0
        """Bytes that clients sent and received so far, over all ranks; masked vectors count in `close`."""

    def open(self) -> None:
        """Collective. Rounds 0 and 1: publish keys; send shares to the neighbours, and open theirs."""
        for client, keys in self._gathered({k: c.keys() for k, c in self.clients.items()}):
            self.inbox.receive_keys(client, keys)
            self.bytes_up += 2 * KEY_BYTES
            self.bytes_down += len(self.neighbours[client]) * (2 * KEY_BYTES + NUMBER_BYTES)
        remaining = {k: c for k, c in self.clients.items() if self.drops.get(k) != Drop.SHARES}
        shares = {
            k: one.share({other: self.inbox.keys[other] for other in self.neighbours[k]})
            for k, one in remaining.items()
        }
        for client, sealed in self._gathered(shares):
            self.inbox.receive_shares(client, sealed)
            self.bytes_up += sum(map(len, sealed.values()))
        self.shared = {*self.inbox.sealed}
        self._check(self.shared, "sent shares")
        if not self.problem:
            self.bytes_down += sum(
                (SEALED_BYTES + NUMBER_BYTES) * len(self._partners(client)) for client in self.shared
            )
            for k, one in remaining.items():
                one.receive({other: self.inbox.sealed[other][k] for other in self._partners(k)})

    def _gathered(self, messages: Mapping[int, Any]) -> list[tuple[int, Any]]:
        """Collective. Return the messages of the clients of all ranks, ordered by client."""
        return sorted(item for part in self.world.gather(dict(messages)) for item in part.items())

    def _partners(self, client: int) -> list[int]:
        """Return the neighbours of a client that sent shares."""
        return [other for other in self.neighbours[client] if other in self.shared]

    def _check(self, remaining: Collection[int], what: str) -> None:
        """Set `problem` if too few clients are `remaining` to recover the secrets of those that take part."""
        holders = {client: self.holders[client] for client in self.shared}
        if len(remaining) < FEWEST:
            self.problem = f"{len(remaining)} of {len(self.neighbours)} clients {what}, fewer than {FEWEST}"
        elif not recoverable(holders, remaining, self.settings.needed):
            needed = max(self.thresholds.values())
            self.problem = (
                f"{len(remaining)} of {len(self.neighbours)} clients {what}, too few for the {needed} shares "
                "that recover a secret"
            )

    def deliver(self, client: int, vector: Tensor) -> None:
        """Mask a client's vector and send it (round 2); on the client's rank.

        Args:
            client: one of this rank's, which does not drop out before.
            vector: (L,) int64 on the CPU; it is changed in place.
        """
        self.inbox.receive_masked(client, self.clients[client].mask(vector))

    def close(self) -> Tensor | None:
        """Collective. Add up the ranks' sums, and remove the masks (round 3).

        Returns:
            The sum of the vectors that were delivered, on the coordinator; None on the others, and where too
            few clients remain (`problem`).
        """
        inbox = self.inbox
        if self.problem:
            return None
        inbox.arrived = {k for part in self.world.gather(sorted(inbox.arrived)) for k in part}
        self.bytes_up += 8 * inbox.total.numel() * len(inbox.arrived)
        answering = {k for k in inbox.arrived if self.drops.get(k) != Drop.UNMASKING}
        self._check(answering, "remained to unmask the sum")
        if not self.problem and not connected(inbox.arrived, self.neighbours):
            self.problem = (
                f"no masks connect all of the {len(inbox.arrived)} clients that sent an update, so sums of a "
                "few of them would be revealed"
            )
        if self.problem:
            return None
        self.world.sum(inbox.total)
        answers = {k: self._answer(client) for k, client in self.clients.items() if k in answering}
        for client, shares in self._gathered(answers):
            inbox.receive_revealed(client, shares)
            self.bytes_up += (NUMBER_BYTES + SHARE_BYTES) * len(shares)
            self.bytes_down += NUMBER_BYTES * len(shares)
        if not self.world.is_coordinator:
            return None
        partners = {client: self._partners(client) for client in sorted(self.shared)}
        return unmask(inbox, self.context, partners, self.thresholds)

    def _answer(self, client: SecureClient) -> dict[int, int]:
        """Return what a client reveals when asked for its neighbours and itself."""
        asked = {*self._partners(client.number), client.number}
        return client.reveal(asked & self.inbox.arrived, asked - self.inbox.arrived)
