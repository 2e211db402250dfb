"""The words between a method and the loops that run it: visit, contribution, server, total."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from fedddp.algorithms.local import Local
from fedddp.models.flat import FlatModel

if TYPE_CHECKING:
    from fedddp.data.loader import Batch


@dataclass(kw_only=True)
class Visit:
    """One client's local training in one round, as a method's hooks see it.

    The same on all ranks of the group. Vectors have shape (P,) and are views of live state:
    change `params`, `grad` and `buffers` in place.
    """

    client: int
    """The client, in range(population)."""
    round: int
    """Index of the round, from 0; in asynchronous training the number of the dispatch, from 0."""
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
    start_counters: Tensor
    """The dispatched integer buffers; (I,) int64; read only."""
    sent: Mapping[str, Tensor]
    """The server's vectors that the method sends along (`Method.sends`); read only."""
    state: dict[str, Tensor]
    """What this client keeps between its visits, by name, on the CPU; empty at its first visit."""
    local: Local
    """The run's local training."""
    lr: float
    """η, the local learning rate of this round."""
    train: Callable[[Callable[[Visit], None]], None]
    """Run the local training from the current params with this correction (`Method.correct`)."""
    mean_loss: Callable[[], float]
    """Collective over the group. Mean loss of the current params over the client's training data."""
    steps: int = 0
    """K_k, the optimizer steps of the group so far in this `train`."""
    lr_sum: float = 0.0
    """Sum of η over those steps."""
    scratch: dict[str, Tensor] = field(default_factory=dict)
    """The method's own tensors during this visit, by name."""

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
        """Put parameters and buffers back to what was dispatched, for methods that train twice."""
        self.flat.params.copy_(self.start)
        self.flat.buffers.copy_(self.start_buffers)
        self.flat.counters.copy_(self.start_counters)

    def remembered(self, name: str) -> Tensor:
        """Return the client's vector `name` on the model's device; zeros (P,) before its first visit."""
        kept = self.state.get(name)
        return torch.zeros_like(self.params) if kept is None else kept.to(self.params.device)

    def remember(self, name: str, vector: Tensor) -> None:
        """Keep a copy of `vector` under `name` until the client's next visit."""
        self.state[name] = vector.detach().to("cpu", copy=True)


@dataclass
class Contribution:
    """What a client sends: vectors that are added over the cohort after multiplication by `weight`."""

    vectors: dict[str, Tensor]
    weight: float


@dataclass
class Total:
    """The contributions of a cohort, combined: weighted means over the clients that sent one."""

    vectors: dict[str, Tensor]
    clients: int
    """m, how many contributions were combined."""

    def __getitem__(self, name: str) -> Tensor:
        return self.vectors[name]


@dataclass
class Server:
    """The coordinator's state; the other ranks hold what was last sent to them."""

    params: Tensor
    """x, the global parameters; (P,)."""
    buffers: Tensor
    """Global float buffers; (B,)."""
    counters: Tensor
    """Global integer buffers; (I,) int64."""
    population: int
    """N, the number of clients."""
    vectors: dict[str, Tensor] = field(default_factory=dict)
    """The method's own vectors, by name."""
    version: int = 0
    """Server steps so far."""


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """What a client does and what the coordinator does; a method is one small subclass.

    The fields of the subclass are its configuration. Hooks run on all ranks of a client's group
    with the same values, except `step`, which runs on the coordinator.
    """

    sends: ClassVar[tuple[str, ...]] = ()
    """Names of the server's vectors that go to the clients with the model."""
    uniform: ClassVar[bool] = False
    """Whether clients count equally (weight 1/m) instead of by examples (weight p_k)."""
    stateful: ClassVar[bool] = False
    """Whether clients keep state between visits."""
    asynchronous: ClassVar[bool] = False
    """Whether contributions are absorbed one by one as they arrive."""
    mean_only: ClassVar[bool] = False
    """Whether contributions mean something only as a plain mean: no robust rule, no clipped updates."""
    because: ClassVar[str] = ""
    """Why the method needs what it `needs`: words that follow its name."""

    def needs(self, local: Local) -> dict[str, object]:
        """Return the fields of `local` that must have a certain value (None: be left out), with that value.

        A run whose local training is another is refused in one line, which says why (`because`).
        """
        return {}

    def check_model(self, flat: FlatModel) -> None:
        """Raise ValueError when the method cannot train this model."""

    def lengths(self, size: int) -> dict[str, int]:
        """Return the length of each vector of a contribution, for a model of P = `size`."""
        return {"update": size}

    def dispatch(self, server: Server) -> list[Tensor]:
        """Return what a client is sent, in the order in which it travels."""
        along = [server.vectors[name] for name in self.sends]
        return [server.params, server.buffers, server.counters, *along]

    def traffic(self, server: Server) -> tuple[int, int]:
        """Return the bytes of what one client sends, and of what it is sent."""
        vectors = sum(self.lengths(server.params.numel()).values()) * server.params.itemsize
        down = sum(tensor.nbytes for tensor in self.dispatch(server))
        return vectors + server.buffers.nbytes + server.counters.nbytes, down

    def start(self, server: Server) -> None:
        """Put the method's vectors into `server.vectors` before the first round."""

    def begin(self, visit: Visit) -> None:
        """Before the first local step."""

    def penalty(self, visit: Visit, batch: Batch, outputs: Tensor) -> Tensor | None:
        """Return a scalar to add to the summed loss of this rank's part of a batch, or None."""
        return None

    def correct(self, visit: Visit) -> None:
        """After the group's gradient all-reduce, before the optimizer step; change `grad` in place."""

    def run(self, visit: Visit) -> None:
        """Train the client; methods that train twice override this."""
        visit.train(self.correct)

    def finish(self, visit: Visit) -> Contribution:
        """Return what the client sends after its last step."""
        return Contribution({"update": visit.update}, self.weight(visit))

    def weight(self, visit: Visit) -> float:
        """Return the client's weight in the sums over the cohort."""
        return visit.share if self.uniform else visit.weight

    @abstractmethod
    def step(self, server: Server, total: Total) -> None:
        """Change `server` by the combined contributions of a round, in place."""

    def personal(self, flat: FlatModel, state: Mapping[str, Tensor]) -> None:
        """Turn the global model in `flat` into the client's own for its local evaluation, in place."""
