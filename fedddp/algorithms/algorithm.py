"""The interface between an algorithm and the loops that run it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from fedddp.algorithms.local import LocalConfig
from fedddp.models.flat import FlatModel
from fedddp.section import Section

if TYPE_CHECKING:
    from fedddp.data.loader import Batch


@dataclass(kw_only=True)
class ClientContext:
    """One client's local training in one round, as an algorithm's hooks see it.

    The same on all ranks of the client group. Vectors have shape (P,) and are views of live state: change
    `params`, `grad` and the buffers of `flat` in place.
    """

    client: int
    """The client, in range(population)."""
    round: int
    """Index of the round, from 0; in asynchronous training the dispatch id, from 0."""
    examples: int
    """n_k, the client's training examples (unique, not padded)."""
    weight: float
    """p_k = n_k / sum of n over the cohort; 1 in asynchronous training."""
    share: float
    """1 / m, m the cohort's size; 1 in asynchronous training."""
    flat: FlatModel
    """The model that trains."""
    start: Tensor
    """x, the dispatched parameters; (P,); read only."""
    start_buffers: Tensor
    """The dispatched float buffers; (B,); read only."""
    start_integer_buffers: Tensor
    """The dispatched integer buffers; (I,) int64; read only."""
    server_vectors: Mapping[str, Tensor]
    """The server's vectors that are sent with the model (`Algorithm.sends`); read only."""
    state: dict[str, Tensor]
    """The client's own state, kept between rounds on the CPU, by name; empty at first."""
    local: LocalConfig
    """The run's local training."""
    lr: float
    """η, the local learning rate of this round."""
    on_exit: ExitStack
    """Context managers entered here are left when the client is trained, such as a hook on a layer."""
    initial_loss: float
    """F_k(x), the mean loss of the dispatched model; NaN unless `Algorithm.needs_initial_loss`."""
    largest_initial_loss: float
    """The largest F_k(x) of the cohort; likewise."""
    pass_index: int = 0
    """Which of the `Algorithm.passes` of local training this is, from 0."""
    steps: int = 0
    """K_k, the optimizer steps of the group so far in this pass."""
    lr_sum: float = 0.0
    """Sum of η over those steps."""
    scratch: dict[str, Tensor] = field(default_factory=dict)
    """The algorithm's own tensors during this local training, by name."""

    @property
    def params(self) -> Tensor:
        """w, the client's parameters; (P,)."""
        return self.flat.params

    @property
    def grad(self) -> Tensor:
        """The gradient of the batch's mean loss, reduced over the group; (P,)."""
        return self.flat.grad

    @property
    def update(self) -> Tensor:
        """Δ_k = w − x; a new (P,) tensor."""
        return self.flat.params - self.start

    def restart(self) -> None:
        """Reset parameters and buffers to the dispatched model."""
        self.flat.load(self.start, self.start_buffers, self.start_integer_buffers)

    def load(self, name: str) -> Tensor:
        """Return the client's vector `name` on the model's device; zeros (P,) before it was stored."""
        kept = self.state.get(name)
        return torch.zeros_like(self.params) if kept is None else kept.to(self.params.device)

    def store(self, name: str, vector: Tensor) -> None:
        """Keep a copy of `vector` under `name` until the client is trained again."""
        self.state[name] = vector.detach().to("cpu", copy=True)


@dataclass
class ClientUpdate:
    """What a client sends: vectors that are summed over the cohort after multiplication by `weight`."""

    vectors: dict[str, Tensor]
    weight: float


@dataclass
class AggregatedUpdate:
    """The aggregated updates of a cohort: weighted means over the clients that sent one."""

    vectors: dict[str, Tensor]
    clients: int
    """m, how many updates were aggregated."""

    def __getitem__(self, name: str) -> Tensor:
        return self.vectors[name]


@dataclass
class ServerState:
    """The coordinator's state; the other ranks hold the last broadcast."""

    params: Tensor
    """x, the global parameters; (P,)."""
    buffers: Tensor
    """Global float buffers; (B,)."""
    integer_buffers: Tensor
    """Global integer buffers; (I,) int64."""
    population: int
    """N, the number of clients."""
    vectors: dict[str, Tensor] = field(default_factory=dict)
    """The algorithm's own vectors, by name."""
    version: int = 0
    """Server steps so far."""

    @classmethod
    def of(cls, flat: FlatModel, population: int) -> ServerState:
        """Return the state of a server that starts from the model in `flat`."""
        return cls(flat.params.clone(), flat.buffers.clone(), flat.integer_buffers.clone(), population)


class Algorithm(Section, ABC):
    """What a client does in an algorithm; the coordinator's part is in the two subclasses.

    The fields of a subclass are its settings. Client hooks run on all ranks of a client's group with the same
    values.
    """

    key = "algorithm"
    chosen_by_name = True

    sends: ClassVar[tuple[str, ...]] = ()
    """Names of the server's vectors that are sent to the clients with the model."""
    uniform: ClassVar[bool] = False
    """Whether clients count equally (weight 1/m) instead of by examples (weight p_k)."""
    stateful: ClassVar[bool] = False
    """Whether clients keep state between rounds."""
    passes: ClassVar[int] = 1
    """How often a client trains in one round; `begin` is called before each pass."""
    needs_initial_loss: ClassVar[bool] = False
    """Whether F_k(x) is computed for the cohort before it trains (`ClientContext.initial_loss`)."""
    has_global_model: ClassVar[bool] = True
    """Whether the server trains a model that is complete, so that it can be evaluated and used.

    Without, as where layers stay at the clients, there are only the clients' own models (`personalize`).
    """
    local_buffers: ClassVar[bool] = False
    """Whether float and integer buffers stay at the clients: `finish` leaves them as they were dispatched."""
    mean_only: ClassVar[bool] = False
    """Whether updates mean something only as a plain mean: no robust rule, no clipped updates."""
    reads_grad: ClassVar[bool] = False
    """Whether a hook uses `ClientContext.grad`; else the traced engine (`local.engine`) need not compute it.

    It counts for the hooks of the class that sets it. A class that overrides `begin`, `correct` or `finish`
    and does not set it is taken to use the gradient.
    """
    because: ClassVar[str] = ""
    """Why the algorithm requires what it does of `local`: words that follow its name."""
    not_private: ClassVar[str] = ""
    """Why `CentralDP` and `LocalDP` refuse the algorithm: words that follow its name; or empty.

    It must be refused where a client's vectors depend on another client's data.
    """

    def requires(self, local: LocalConfig) -> dict[str, object]:
        """Return the fields of `local` that must have a certain value (None: be left out), with that value.

        Another local training is rejected at startup in one line, which gives the reason (`because`).
        """
        return {}

    def check_model(self, flat: FlatModel) -> None:
        """Raise ValueError when the algorithm cannot train this model."""

    def lengths(self, size: int) -> dict[str, int]:
        """Return the length of each vector of a client update, for a model of P = `size`."""
        return {"update": size}

    def silent(self, flat: FlatModel) -> Tensor | None:
        """Return which parameters stay at the clients; (P,) bool; None for none.

        Every client leaves these elements of "update" at 0. They do not travel, nor are they summed.
        """
        return None

    def dispatch(self, server: ServerState) -> list[Tensor]:
        """Return what is sent to the ranks, in the order in which it travels; see `transport.shared`."""
        along = [server.vectors[name] for name in self.sends]
        return [server.params, server.buffers, server.integer_buffers, *along]

    def start(self, server: ServerState) -> None:
        """Put the algorithm's vectors into `server.vectors` before the first round."""

    def begin(self, context: ClientContext) -> None:
        """Prepare a pass of local training, before its first step."""

    def penalty(self, context: ClientContext, batch: Batch, outputs: Tensor) -> Tensor | None:
        """Return a scalar to add to the summed loss of this rank's part of a batch, or None."""
        return None

    def correct(self, context: ClientContext) -> None:
        """Change `grad` in place: after the group's gradient all-reduce, before the optimizer step."""

    def finish(self, context: ClientContext) -> ClientUpdate:
        """Return the client's update, after the last step of the last pass."""
        return ClientUpdate({"update": context.update}, self.weight(context))

    def weight(self, context: ClientContext) -> float:
        """Return the client's weight in the sums over the cohort."""
        return context.share if self.uniform else context.weight

    def personalize(self, flat: FlatModel, state: Mapping[str, Tensor]) -> None:
        """Turn the server's model in `flat` into the client's own, in place."""

    @property
    def personalizes(self) -> bool:
        """Whether clients have models of their own."""
        return type(self).personalize is not Algorithm.personalize


class SynchronousAlgorithm(Algorithm):
    """An algorithm of rounds: the coordinator steps when the cohort's updates are aggregated."""

    @abstractmethod
    def step(self, server: ServerState, aggregated: AggregatedUpdate) -> None:
        """Change `server` by the aggregated updates of a round, in place; on the coordinator."""


class AsynchronousAlgorithm(Algorithm):
    """An algorithm whose server takes one update at a time, as it arrives."""

    because: ClassVar[str] = "keeps no client state between local trainings"

    def requires(self, local: LocalConfig) -> dict[str, object]:
        """Require optimizers that start from scratch: clients send updates only."""
        return {"optimizer_state": "reset"}

    @abstractmethod
    def absorb(self, server: ServerState, update: ClientUpdate, staleness: int) -> bool:
        """Apply one client's update; on the coordinator, which counts versions.

        Args:
            server: changed in place; the loop sets its integer buffers.
            update: the algorithm's vectors, and "buffers": the client's float buffers, (B,).
            staleness: τ, server versions since the model was sent to the client; 0 for a fresh one.

        Returns:
            Whether the global model changed, which makes a new version. Until then neither the
            parameters nor the buffers may change.
        """
