"""Secure aggregation in the round loop: who takes part, where its clients live, what its metrics are."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from fedddp.aggregation import Mean
from fedddp.evaluation import Metrics
from fedddp.privacy.central import CentralProtection
from fedddp.secure.settings import Drop, SecureAggregation

if TYPE_CHECKING:
    from fedddp.secure.masked_sums import MaskedSums
    from fedddp.secure.protocol import SecureSum
    from fedddp.training.session import Indices, Session

logger = logging.getLogger(__name__)


class SecureRound:
    """A round's secure aggregation on this rank."""

    def __init__(self, s: Session, settings: SecureAggregation, cohort: Indices) -> None:
        """Find out who drops out of `cohort`; the same on every rank."""
        self.s, self.settings, self.cohort = s, settings, cohort
        self.drops = settings.drops(cohort.tolist(), s.config.seed, s.rounds_done)
        late = {client for client, point in self.drops.items() if point < Drop.UNMASKING}
        self.senders: Indices = np.array([k for k in cohort.tolist() if k not in late], dtype=np.int64)
        """The clients that train and send an update, ascending."""
        self.examples = 1
        """Σ n_k over the cohort, after `open`; at least 1."""
        self.bytes_up = self.bytes_down = 0
        """Bytes of the first run of the protocol, in which clients add up n_k."""

    def open(self, sums: MaskedSums, assignment: Sequence[Sequence[int]]) -> None:
        """Collective. Add up n_k over the cohort, then exchange the keys and shares of the round.

        n_k is a client's own, but each needs their sum for its weight p_k. So a first run of the protocol,
        with its own keys, sums vectors of length 1; drop-outs are simulated in the second. Where `privacy`
        weighs all clients equally, no sum of the n_k, which has no noise, is formed.

        Args:
            sums: the round's.
            assignment: the clients that train, by group.
        """
        from fedddp.secure.protocol import SecureSum

        s, seed, index = self.s, self.s.config.seed, self.s.rounds_done
        homes = {client: group for group, clients in enumerate(assignment) for client in clients}
        here = [
            client
            for client in self.cohort.tolist()
            if s.world.leader(homes.get(client, client % s.world.groups)) == s.world.rank
        ]
        neighbours = self.settings.neighbours(self.cohort.tolist(), seed, index)
        context = f"{s.directory.name}|{index}"
        privacy = s.config.privacy
        if privacy is None or not privacy.weighs_equally:
            first = SecureSum(
                *(s.world, self.settings, neighbours), hosted=here, drops={}, context=f"{context}|n", length=1
            )
            self._add_up_examples(first, here)
        second = SecureSum(
            *(s.world, self.settings, neighbours),
            hosted=here,
            drops=self.drops,
            context=context,
            length=sums.length,
        )
        sums.begin(second)

    def _add_up_examples(self, first: SecureSum, here: Sequence[int]) -> None:
        """Collective. Set `examples` by a run of the protocol over the clients `here` and on other ranks."""
        first.open()
        for client in [] if first.problem else here:
            first.deliver(client, torch.tensor([int(self.s.sizes[client])]))
        total = first.close()
        announced = torch.tensor([1]) if total is None else total.clamp_min(1)
        self.s.world.broadcast(announced)
        self.examples = int(announced)
        self.bytes_up, self.bytes_down = first.bytes_up, first.bytes_down + 8 * len(self.cohort)

    def finish(self, sums: MaskedSums) -> None:
        """Collective. Unmask the sum."""
        sums.finish(self.s.world)

    def metrics(self, sums: MaskedSums, bytes_down: int) -> Metrics:
        """Return what replaces the metrics of a plain round: sums over the clients, and bytes sent.

        `bytes_down` are those of the model, which clients are sent before the protocol.
        """
        secure = sums.secure
        assert secure is not None
        return {
            "train/loss": sums.loss / sums.loss_count if sums.loss_count else None,
            "train/examples": int(sums.loss_count),
            "train/steps": sums.steps,
            "clients/aggregated": int(sums.counts[0]),
            "clients/invalid": 0 if secure.problem else len(self.senders) - int(sums.counts[0]),
            "bytes/up": self.bytes_up + secure.bytes_up,
            "bytes/down": bytes_down + self.bytes_down + secure.bytes_down,
        }


def log_dropped(s: Session, sums: MaskedSums, invalid: int) -> None:
    """Log how many clients found their update invalid; which ones, the coordinator does not know."""
    if not sums.problem:
        logger.warning(
            "round %d: NaN, infinity or overflow in the update of %d client%s; %s",
            *(s.rounds_done + 1, invalid, "" if invalid == 1 else "s"),
            "zeros sent instead" if sums.min_clients() == 0 else "dropped out before masking",
        )


def masked_sums(s: Session, lengths: Mapping[str, int], clients: int) -> MaskedSums:
    """Return empty masked sums of vectors of such `lengths` for a cohort of at most `clients`."""
    from fedddp.secure.masked_sums import MaskedSums
    from fedddp.secure.private_sums import PrivateMaskedSums

    rule, server = s.config.aggregation, s.server
    assert isinstance(rule, Mean)
    if isinstance(s.protection, CentralProtection):
        return PrivateMaskedSums(rule, lengths, clients, server, s.protection)
    return MaskedSums(rule, lengths, clients, server.params, server.integer_buffers)
