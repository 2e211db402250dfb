"""Personalisation: parameters or models that stay with the client."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Set
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedddp.algorithms.algorithm import ClientContext, ClientUpdate
from fedddp.algorithms.fedavg import FedAvg
from fedddp.algorithms.local import LocalConfig
from fedddp.models.flat import FlatModel
from fedddp.models.norms import norm_parameters
from fedddp.models.weights import heads_of
from fedddp.section import NonNegativeFloat

MOST_NAMES = 3
"""Names of parameters in a message, at most."""


@dataclass(frozen=True, kw_only=True)
class LocalLayers(FedAvg):
    """FedAvg over all parameters but some, which never leave their client.

    The server's values of the local layers keep their initial values; a client begins with them. So there is
    no global model: a client's own is the server's parameters with the client's local layers.
    """

    stateful = True
    reads_grad = False
    has_global_model = False

    @abstractmethod
    def local_names(self, module: nn.Module) -> Set[str]:
        """Return the names of the parameters that stay local."""

    def check_model(self, flat: FlatModel) -> None:
        """Raise ValueError unless some trainable parameters are local, and some are not."""
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

    def silent(self, flat: FlatModel) -> Tensor | None:
        """Return the elements that stay local."""
        return self.mask(flat)

    def staying(self, flat: FlatModel) -> str:
        """Return which parameters stay local, as words: how many, and the first names."""
        names = [name for name in flat.slices if name in self.local_names(flat.module)]
        more = ", ..." if len(names) > MOST_NAMES else ""
        statistics = ", and all running statistics" if self.local_buffers and len(flat.buffers) else ""
        return (
            f"{int(self.mask(flat).sum()):,} of {len(flat.params):,} parameters stay at each client "
            f"({', '.join(names[:MOST_NAMES])}{more}){statistics}"
        )

    def doubt(self, module: nn.Module) -> str:
        """Return a warning where the model is not one that the paper is about; empty where it is."""
        return ""

    def begin(self, context: ClientContext) -> None:
        """Put the client's own layers into the dispatched model."""
        self.personalize(context.flat, context.state)

    def finish(self, context: ClientContext) -> ClientUpdate:
        """Keep the local layers; send the update of the others."""
        local, flat = self.mask(context.flat), context.flat
        context.store("layers", context.params[local])
        if self.local_buffers:
            context.store("buffers", flat.buffers)
            context.store("integer_buffers", flat.integer_buffers)
            flat.load_buffers(context.start_buffers, context.start_integer_buffers)
        return ClientUpdate({"update": context.update.masked_fill(local, 0.0)}, self.weight(context))

    def personalize(self, flat: FlatModel, state: Mapping[str, Tensor]) -> None:
        """Put the client's own layers, if it was ever trained, into the global model."""
        if "layers" in state:
            flat.params[self.mask(flat)] = state["layers"].to(flat.params.device)
        if self.local_buffers and "buffers" in state:
            flat.load_buffers(state["buffers"], state["integer_buffers"])


@dataclass(frozen=True, kw_only=True)
class FedBN(LocalLayers):
    """Norm layers, with their statistics, stay local (Li et al., 2021, arXiv:2102.07623).

    The paper is about batch norm (`model.norm=batch`). Layer and group norms stay local too, but have no
    statistics: only their scales and shifts differ between clients, and a warning is logged.
    """

    local_buffers = True

    def local_names(self, module: nn.Module) -> Set[str]:
        """Return the scales and shifts of norm layers of any kind."""
        return norm_parameters(module)

    def doubt(self, module: nn.Module) -> str:
        """Return that there is no batch norm."""
        if any(isinstance(layer, _BatchNorm) for layer in module.modules()):
            return ""
        layers = (module.get_submodule(name.rpartition(".")[0]) for name in norm_parameters(module))
        kinds = sorted({type(layer).__name__ for layer in layers})
        return (
            f"algorithm=FedBN is about batch norm, but the model has {', '.join(kinds)} alone: no statistics "
            "stay local, only scales and shifts; set model.norm=batch, which replaces group norms"
        )


@dataclass(frozen=True, kw_only=True)
class FedPer(LocalLayers):
    """The head, the last linear layer, stays local (Arivazhagan et al., 2019, arXiv:1912.00818).

    In a network for masks, such as `unet`, that is the last convolution; in a RetinaNet the last convolutions
    of both branches, for boxes and for classes (`models.weights.heads_of`).
    """

    def local_names(self, module: nn.Module) -> Set[str]:
        """Return the parameters of the head, or of all heads."""
        heads = heads_of(module).items()
        return {
            f"{name}.{own}" if name else own for name, head in heads for own, _ in head.named_parameters()
        }


@dataclass(frozen=True, kw_only=True)
class Ditto(FedAvg):
    """FedAvg, and a model v_k of each client's own (Li et al., 2021, arXiv:2012.04221).

    In each round v_k trains first, as long as the global model does, with steps g(v_k) + λ(v_k − x). It
    starts as x in the client's first round. It never leaves the client, which is evaluated on it.
    """

    lam: NonNegativeFloat = 0.1
    """Strength λ of the pull of v_k to the global model, >= 0; 0 is local training alone."""

    stateful = True
    passes = 2
    because = "trains two models per client, which cannot share an optimizer's state"

    def requires(self, local: LocalConfig) -> dict[str, object]:
        """Require an optimizer that starts from scratch for each of the two."""
        return {"optimizer_state": "reset"}

    def begin(self, context: ClientContext) -> None:
        """Train v_k in the first pass, then the global model as FedAvg does."""
        if context.pass_index == 0:
            self.personalize(context.flat, context.state)
            return
        keep_model(context)
        context.restart()

    def correct(self, context: ClientContext) -> None:
        """g ← g + λ(v_k − x), of the client's own model only."""
        if context.pass_index == 0:
            context.grad.add_(context.params - context.start, alpha=self.lam)

    def personalize(self, flat: FlatModel, state: Mapping[str, Tensor]) -> None:
        """Replace the global model by v_k, if the client was ever trained."""
        load_model(flat, state)


@dataclass(frozen=True, kw_only=True)
class LocalOnly(FedAvg):
    """Each client trains a model v_k of its own; nothing is sent, and the global model stays as it is.

    v_k ← SGD(v_k) on the client's data, from the initial model on. `Config.baseline` "local" trains it; it is
    no setting of `algorithm`.
    """

    chosen_by_name = False
    stateful = True
    reads_grad = False
    has_global_model = False

    def begin(self, context: ClientContext) -> None:
        """Continue with v_k."""
        self.personalize(context.flat, context.state)

    def finish(self, context: ClientContext) -> ClientUpdate:
        """Keep v_k with its buffers; the update is 0, or NaN where v_k is not finite, to be noticed."""
        keep_model(context)
        update = context.update * 0.0
        context.flat.load_buffers(context.start_buffers, context.start_integer_buffers)
        return ClientUpdate({"update": update}, self.weight(context))

    def personalize(self, flat: FlatModel, state: Mapping[str, Tensor]) -> None:
        """Replace the model by v_k, if the client was ever trained."""
        load_model(flat, state)


def keep_model(context: ClientContext) -> None:
    """Store the model that trains, with its buffers, as the client's own."""
    context.store("params", context.params)
    context.store("buffers", context.flat.buffers)
    context.store("integer_buffers", context.flat.integer_buffers)


def load_model(flat: FlatModel, state: Mapping[str, Tensor]) -> None:
    """Put the model that `keep_model` stored into `flat`, if there is one."""
    if "params" in state:
        flat.params.copy_(state["params"])
        flat.load_buffers(state["buffers"], state["integer_buffers"])
