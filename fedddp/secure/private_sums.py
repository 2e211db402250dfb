"""Central differential privacy under secure aggregation: clients clip and mask, noise is added to the sum."""

from __future__ import annotations

import torch
from torch import Tensor

from fedddp.algorithms import ClientUpdate
from fedddp.privacy.central import PrivateSums
from fedddp.secure.masked_sums import MaskedSums


class PrivateMaskedSums(PrivateSums, MaskedSums):
    """Masked sums of clipped updates; once they are unmasked, they have the bits of `PrivateSums`.

    The coordinator adds the noise to the unmasked sum. It learns that sum without noise, as it does without
    masks, and no single update.
    """

    def min_clients(self) -> int:
        """Return 0, as without masks; in a round whose sum stays masked 1, by which it is abandoned."""
        return int(bool(self.problem))

    def add(
        self,
        client: int,
        update: ClientUpdate,
        buffers: Tensor,
        example_weight: float,
        integer_buffers: Tensor,
        loss: float = 0.0,
        trained: tuple[float, int] = (0.0, 0),
        *,
        clipped: bool = False,
    ) -> bool:
        """Clip, mask and send a client's vector; zeros for an invalid update.

        A client that dropped out instead could turn a round that is released into one that is abandoned:
        its data would decide more than the sum.
        """
        valid = super().add(client, update, buffers, example_weight, integer_buffers, loss, trained)
        if not valid:
            assert self.secure is not None
            self.secure.deliver(client, torch.zeros(self.length, dtype=torch.int64))
        return valid
