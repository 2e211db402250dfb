"""The exact sums of a round under masks: what a client encodes, what the coordinator reads from the sum."""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch
from torch import Tensor

from fedddp.aggregation import InvalidUpdateError, Mean
from fedddp.aggregation.mean import FRACTION_BITS, Sums
from fedddp.algorithms import ClientUpdate
from fedddp.distributed.world import World
from fedddp.secure.messages import NUMBERS, vector_length
from fedddp.secure.protocol import SecureSum

LOSS_BITS = 20
"""One unit of the summed loss is 2^-20."""


class MaskedSums(Sums):
    """Sums whose summands are masked: they equal `Sums` bit for bit once the masks are removed.

    A client's vector is: the weighted vectors of its update and its float buffers in fixed point, how its
    integer buffers changed, and `NUMBERS` numbers. The client checks all of it before it is masked; an
    invalid update is not sent, and its client drops out.
    """

    def __init__(
        self, rule: Mean, lengths: Mapping[str, int], clients: int, like: Tensor, integer_buffers: Tensor
    ) -> None:
        """Start at zero; arguments as for `Aggregation.accumulator`.

        `integer_buffers` are the ones that clients start from: they stay the server's.
        """
        super().__init__(rule, lengths, clients, like, integer_buffers)
        assert self.exact
        self.start = integer_buffers
        lengths = {name: summed.numel() for name, summed in self.sums.items()}
        self.floats = sum(lengths.values())
        """Elements of the weighted vectors."""
        self.flat = torch.zeros(self.floats, dtype=torch.int64, device=like.device)
        """One client's vectors while it encodes them; at the end the unmasked sums."""
        self.sums = dict(zip(lengths, torch.split(self.flat, list(lengths.values())), strict=True))
        self.length = vector_length(lengths, 0, integer_buffers.numel())
        """Elements L of a client's vector."""
        self.secure: SecureSum | None = None
        self.loss, self.loss_count, self.steps = 0.0, 0.0, 0
        """Of the clients in the sum, after `finish`."""
        self.seconds = 0.0
        """That this rank's clients took to encode and mask, since `reset`."""

    def reset(self, clients: int) -> None:
        """Start over."""
        super().reset(clients)
        self.secure, self.seconds = None, 0.0
        self.loss, self.loss_count, self.steps = 0.0, 0.0, 0

    def begin(self, secure: SecureSum) -> None:
        """Collective. Let the clients of a round exchange keys and shares, before they train."""
        assert secure.inbox.total.numel() == self.length
        self.secure = secure
        secure.open()

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
        """Mask a client's vector and send it, if it is valid; on the client's side of the protocol.

        Raises:
            InvalidUpdateError: NaN, infinity or overflow, and `on_invalid_update` is "stop".
        """
        assert self.secure is not None
        began = time.perf_counter()
        largest_loss = 2.0 ** (FRACTION_BITS - LOSS_BITS) * self.limit
        admitted = self.rule.admit(
            client, update, buffers, example_weight=example_weight, loss=loss, limit=self.limit
        )
        change = (integer_buffers - self.start).cpu()
        largest_change = int(self.limit * 2.0**FRACTION_BITS)
        fits = (
            not change.numel() or -largest_change < int(change.amin()) <= int(change.amax()) < largest_change
        )
        valid = admitted.vectors is not None and abs(loss) < largest_loss and fits
        if not valid and self.rule.on_invalid_update == "stop":
            what = f"training loss reaches {largest_loss:.3g}" if fits else "integer buffers changed too much"
            raise InvalidUpdateError(
                f"client {client}: its {what}, beyond what sums hold; lower local.lr, or choose "
                "aggregation.on_invalid_update=skip"
            )
        if valid:
            assert admitted.vectors is not None
            self.flat.zero_()
            self.weights.zero_()
            self._take(client, admitted.vectors, update.weight, example_weight, admitted.largest)
            self._remove_shifts()
            scaled_loss = round(loss * 2.0**LOSS_BITS)
            own = (1, scaled_loss, round(trained[0]), trained[1], int(clipped))
            numbers = torch.tensor([*self.weights.tolist(), *own])
            self.secure.deliver(client, torch.cat([self.flat.cpu(), change, numbers]))
        self.seconds += time.perf_counter() - began
        return valid

    def reduce(self, world: World) -> None:
        """Nothing: a sum is unmasked when all of the cohort have trained (`finish`), or never."""

    def numbers(self) -> list[Tensor]:
        """Return nothing: the counts and weights are masked too."""
        return []

    def state(self) -> dict[str, Tensor]:
        """Return nothing: the secrets of a round that is stopped are lost, and it is repeated."""
        return {}

    def finish(self, world: World) -> None:
        """Collective. Unmask the sum at the coordinator, after the last client of the cohort has trained."""
        assert self.secure is not None
        total = self.secure.close()
        if total is None:
            return
        self.flat.copy_(total[: self.floats])
        change = total[self.floats : -NUMBERS]
        weight, example_weight, clients, loss, loss_count, steps, clipped = total[-NUMBERS:].tolist()
        self.weights.copy_(torch.tensor([weight, example_weight]))
        self.counts.copy_(torch.tensor([clients, 0, clipped]))
        self.loss, self.loss_count, self.steps = loss / 2.0**LOSS_BITS, float(loss_count), steps
        # The coordinator advances integer buffers by the mean change, rounded up; where all clients took as
        # many steps, this is the maximum that sums without masks take.
        mean = -torch.div(-change, max(clients, 1), rounding_mode="floor")
        self.integer_buffers.copy_(self.start + mean.to(self.start.device))

    @property
    def problem(self) -> str:
        """Why the round is abandoned; empty if it is not."""
        return "" if self.secure is None else self.secure.problem
