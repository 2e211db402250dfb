"""Model-contrastive learning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from fedddp.algorithms.algorithm import Contribution, Visit
from fedddp.algorithms.fedavg import FedAvg
from fedddp.models.flat import FlatModel
from fedddp.models.weights import head_of

if TYPE_CHECKING:
    from fedddp.data.loader import Batch


@dataclass(frozen=True, kw_only=True)
class MOON(FedAvg):
    """Local loss + μ CE([cos(z, z_glob), cos(z, z_prev)]/T, 0) (Li et al., 2021, arXiv:2103.16049).

    z, (b, features), is what enters the model's head; z_glob and z_prev are those of the dispatched model
    and of the client's own at the end of its last visit, both in evaluation mode and without gradient. At
    a client's first visit the term is 0. T is the paper's, μ among those it tries. Clients keep their last
    model.
    """

    mu: float = 1.0
    """Weight of the contrastive term μ, >= 0; 0 is FedAvg."""

    temperature: float = 0.5
    """T, > 0."""

    stateful = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.mu >= 0:
            raise ValueError(f"mu must be >= 0, got {self.mu}; 0 is FedAvg")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be > 0, got {self.temperature}; the paper's is 0.5")

    def check_model(self, flat: FlatModel) -> None:
        """The model needs a head."""
        head_of(flat.module)

    def run(self, visit: Visit) -> None:
        """Train, with an ear at the head's input."""
        if "params" in visit.state:
            for name in ("params", "buffers"):
                visit.scratch[name] = visit.state[name].to(visit.params.device)
        _, head = head_of(visit.flat.module)

        def listen(_: object, inputs: tuple[Tensor, ...]) -> None:
            visit.scratch["z"] = inputs[0].flatten(1).float()

        with head.register_forward_pre_hook(listen):
            visit.train(self.correct)

    def penalty(self, visit: Visit, batch: Batch, outputs: Tensor) -> Tensor | None:
        """μ CE([cos(z, z_glob), cos(z, z_prev)]/T, 0), summed over the batch."""
        if "params" not in visit.scratch:
            return None
        z = visit.scratch["z"]
        z_glob = self._features(visit, batch, visit.start, visit.start_buffers)
        z_prev = self._features(visit, batch, visit.scratch["params"], visit.scratch["buffers"])
        cosines = torch.stack([F.cosine_similarity(z, z_glob), F.cosine_similarity(z, z_prev)], 1)
        positive = cosines.new_zeros(len(cosines), dtype=torch.int64)
        return self.mu * F.cross_entropy(cosines / self.temperature, positive, reduction="sum")

    @torch.no_grad()
    def _features(self, visit: Visit, batch: Batch, params: Tensor, buffers: Tensor) -> Tensor:
        module = visit.flat.module.eval()
        torch.func.functional_call(module, visit.flat.named(params, buffers), (batch.images,))
        module.train()
        return visit.scratch["z"]

    def finish(self, visit: Visit) -> Contribution:
        """Keep y_k for the next visit."""
        visit.remember("params", visit.params)
        visit.remember("buffers", visit.flat.buffers)
        return super().finish(visit)
