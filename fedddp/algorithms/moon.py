"""Model-contrastive learning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from fedddp.algorithms.algorithm import ClientContext, ClientUpdate
from fedddp.algorithms.fedavg import FedAvg
from fedddp.models.flat import FlatModel
from fedddp.models.weights import head_of
from fedddp.section import NonNegativeFloat, PositiveFloat

if TYPE_CHECKING:
    from fedddp.data.loader import Batch


@dataclass(frozen=True, kw_only=True)
class MOON(FedAvg):
    """Local loss + μ CE([cos(z, z_glob), cos(z, z_prev)]/T, 0) (Li et al., 2021, arXiv:2103.16049).

    z, (b, features), is the input of the model's head; z_glob and z_prev are those of the dispatched model
    and of the client's own model after its last round, both in evaluation mode and without gradient. In a
    client's first round the term is 0. T is the paper's, μ among those it tries. Clients keep their last
    model.
    """

    mu: NonNegativeFloat = 1.0
    """Weight of the contrastive term μ, >= 0; 0 is FedAvg."""

    temperature: PositiveFloat = 0.5
    """T, > 0."""

    stateful = True

    def check_model(self, flat: FlatModel) -> None:
        """Raise ValueError for a model without a head."""
        head_of(flat.module)

    def begin(self, context: ClientContext) -> None:
        """Load the client's last model, and record the head's input with a forward pre-hook."""
        if "params" in context.state:
            for name in ("params", "buffers"):
                context.scratch[name] = context.state[name].to(context.params.device)
        _, head = head_of(context.flat.module)

        def record(_: object, inputs: tuple[Tensor, ...]) -> None:
            context.scratch["z"] = inputs[0].flatten(1).float()

        context.on_exit.enter_context(head.register_forward_pre_hook(record))

    def penalty(self, context: ClientContext, batch: Batch, outputs: Tensor) -> Tensor | None:
        """μ CE([cos(z, z_glob), cos(z, z_prev)]/T, 0), summed over the batch."""
        if "params" not in context.scratch:
            return None
        z = context.scratch["z"]
        z_glob = self._features(context, batch, context.start, context.start_buffers)
        z_prev = self._features(context, batch, context.scratch["params"], context.scratch["buffers"])
        cosines = torch.stack([F.cosine_similarity(z, z_glob), F.cosine_similarity(z, z_prev)], 1)
        positive = cosines.new_zeros(len(cosines), dtype=torch.int64)
        return self.mu * F.cross_entropy(cosines / self.temperature, positive, reduction="sum")

    @torch.no_grad()
    def _features(self, context: ClientContext, batch: Batch, params: Tensor, buffers: Tensor) -> Tensor:
        module = context.flat.module.eval()
        torch.func.functional_call(module, context.flat.named(params, buffers), (batch.images,))
        module.train()
        return context.scratch["z"]

    def finish(self, context: ClientContext) -> ClientUpdate:
        """Keep y_k for the client's next round."""
        context.store("params", context.params)
        context.store("buffers", context.flat.buffers)
        return super().finish(context)
