"""Personalisation: what stays with the client."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from fedddp.algorithms.algorithm import Contribution, Visit
from fedddp.algorithms.fedavg import FedAvg
from fedddp.algorithms.local import Local
from fedddp.models.flat import FlatModel
from fedddp.models.norms import norm_parameters
from fedddp.models.weights import head_of


@dataclass(frozen=True, kw_only=True)
class LocalLayers(FedAvg):
    """FedAvg over all parameters but some, which never leave their client.

    The server's values of the local layers stay as they were at the start; a client begins with them.
    """

    stateful = True
    local_buffers: ClassVar[bool] = False
    """Whether float and integer buffers stay local too."""

    @abstractmethod
    def local_names(self, module: nn.Module) -> Set[str]:
        """Return the names of the parameters that stay local."""

    def check_model(self, flat: FlatModel) -> None:
        """Some trainable parameters must be local, and some not."""
        names = self.local_names(flat.module) & flat.slices.keys()
        if not names or names == flat.slices.keys():
            which = "none" if not names else "all"
            raise ValueError(
                f"{type(self).__name__}: {which} of the model's trainable parameters would stay local; "
                "choose another model or algorithm"
            )

    def mask(self, flat: FlatModel) -> Tensor:
        """Return which elements of `params` are local; (P,) bool."""
        return flat.mask(self.local_names(flat.module) & flat.slices.keys())

    def begin(self, visit: Visit) -> None:
        """Put the client's own layers into the dispatched model."""
        self.personal(visit.flat, visit.state)

    def finish(self, visit: Visit) -> Contribution:
        """Keep the local layers; send the update of the others."""
        local = self.mask(visit.flat)
        visit.remember("layers", visit.params[local])
        if self.local_buffers:
            visit.remember("buffers", visit.flat.buffers)
            visit.remember("counters", visit.flat.counters)
            visit.flat.buffers.copy_(visit.start_buffers)
            visit.flat.counters.copy_(visit.start_counters)
        return Contribution({"update": visit.update.masked_fill(local, 0.0)}, self.weight(visit))

    def personal(self, flat: FlatModel, state: Mapping[str, Tensor]) -> None:
        """Put the client's own layers, if it was ever visited, into the global model."""
        if "layers" in state:
            flat.params[self.mask(flat)] = state["layers"].to(flat.params.device)
        if self.local_buffers and "buffers" in state:
            flat.buffers.copy_(state["buffers"])
            flat.counters.copy_(state["counters"])


@dataclass(frozen=True, kw_only=True)
class FedBN(LocalLayers):
    """Norm layers, with their statistics, stay local (Li et al., 2021, arXiv:2102.07623)."""

    local_buffers = True

    def local_names(self, module: nn.Module) -> Set[str]:
        """Return the scales and shifts of norm layers of any kind."""
        return norm_parameters(module)


@dataclass(frozen=True, kw_only=True)
class FedPer(LocalLayers):
    """The head, the last linear layer, stays local (Arivazhagan et al., 2019, arXiv:1912.00818)."""

    def local_names(self, module: nn.Module) -> Set[str]:
        """Return the parameters of the head."""
        name, head = head_of(module)
        return {f"{name}.{own}" if name else own for own, _ in head.named_parameters()}


@dataclass(frozen=True, kw_only=True)
class Ditto(FedAvg):
    """FedAvg, and a model v_k of each client's own (Li et al., 2021, arXiv:2012.04221).

    At each visit v_k trains too, as long as the global model does, with steps g(v_k) + λ(v_k − x). It
    starts as x at the client's first visit. It never leaves the client, which is evaluated on it.
    """

    lam: float = 0.1
    """Strength λ of the pull of v_k to the global model, >= 0; 0 is local training alone."""

    stateful = True
    because = "trains two models a visit, which cannot share an optimizer's state"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.lam >= 0:
            raise ValueError(f"lam must be >= 0, got {self.lam}; the paper's are 0.05 to 2")

    def needs(self, local: Local) -> dict[str, object]:
        """An optimizer that starts anew for each of the two."""
        return {"optimizer_state": "reset"}

    def run(self, visit: Visit) -> None:
        """Train v_k first, then the global model as FedAvg does."""
        self.personal(visit.flat, visit.state)
        visit.train(self._pull)
        visit.remember("params", visit.params)
        visit.remember("buffers", visit.flat.buffers)
        visit.remember("counters", visit.flat.counters)
        visit.restart()
        visit.train(self.correct)

    def _pull(self, visit: Visit) -> None:
        """G ← g + λ(v_k − x)."""
        visit.grad.add_(visit.params - visit.start, alpha=self.lam)

    def personal(self, flat: FlatModel, state: Mapping[str, Tensor]) -> None:
        """Put v_k, if the client was ever visited, in place of the global model."""
        if "params" in state:
            flat.params.copy_(state["params"])
            flat.buffers.copy_(state["buffers"])
            flat.counters.copy_(state["counters"])
