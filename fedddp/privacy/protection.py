"""What a running federation does for the privacy of its clients; without a section `privacy` nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from fedddp.aggregation import Accumulator, Aggregation
from fedddp.algorithms import Algorithm, ClientUpdate, ServerState
from fedddp.models.flat import FlatModel
from fedddp.section import LARGEST

KEPT = ("round", "privacy/", "eval/", "bytes/", "time/round", "time/evaluate", "time/checkpoint")
"""What `privacy.strict` leaves of a round's line: beginnings of keys."""


class Terms(NamedTuple):
    """What a run is held to, which the coordinator computes before the first round."""

    noise_multiplier: float
    """z of central, μ of local differential privacy."""
    last_round: int
    """The round after which the budget ends the run; the run's rounds where it does not."""
    repeated: int
    """Rounds that were released, lost with a process, and released again with other noise."""


class Protection:
    """The hooks of the round loop that protect clients; here they change nothing. The same on every rank."""

    strict = False
    last_round = LARGEST

    def weights(self, weight: float, clients: int) -> tuple[float, float]:
        """Return p_k and 1/m of a client, for its own `weight` by examples in a cohort of `clients`."""
        return weight, 1 / clients

    def sent(self, client: int, round_index: int, update: ClientUpdate) -> ClientUpdate:
        """Return what `client` sends for `update`; on the leader of its group."""
        return update

    def buffers(self, change: Tensor, integers: Tensor, server: ServerState) -> tuple[Tensor, Tensor]:
        """Return what leaves a client of the `change` of its float buffers, and of its integer buffers."""
        return change, integers

    def accumulator(
        self, rule: Aggregation, lengths: Mapping[str, int], clients: int, server: ServerState
    ) -> Accumulator:
        """Return an empty accumulator for a cohort of at most `clients` clients."""
        return rule.accumulator(lengths, clients, server.params, server.integer_buffers)

    def vectors(self, server: ServerState) -> list[Tensor]:
        """Return what is sent to the clients with the model."""
        return []

    def metrics(self, rounds: int) -> dict[str, Any]:
        """Return the metrics of a run that has done `rounds` rounds; on the coordinator."""
        return {}

    def metadata(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return {}

    def released(self, row: dict[str, Any]) -> dict[str, Any]:
        """Return what is recorded of a round's line."""
        return {key: value for key, value in row.items() if key.startswith(KEPT)} if self.strict else row


class ActiveProtection(Protection):
    """What both kinds of differential privacy share."""

    def __init__(self, terms: Terms, *, noise: str, strict: bool) -> None:
        """Keep what the run is held to.

        Args:
            terms: computed before the first round.
            noise: "seeded" or "secret".
            strict: whether unprotected metrics are left out.
        """
        self.terms, self.noise, self.strict = terms, noise, strict
        self.last_round = terms.last_round

    def buffers(self, change: Tensor, integers: Tensor, server: ServerState) -> tuple[Tensor, Tensor]:
        """Return no change of float buffers, and the coordinator's integer buffers.

        Raises:
            ValueError: training changed a float buffer, which would leave the client unprotected.
        """
        if bool(change.any()):
            raise ValueError(
                "privacy: a float buffer of the model changes in training, and would leave its client "
                "without protection; use a model whose buffers are constants (model.norm=group)"
            )
        return change, server.integer_buffers

    def metrics(self, rounds: int) -> dict[str, Any]:
        """Return ε so far, whether its noise can be repeated, and the rounds that were charged again."""
        return {
            "privacy/epsilon": self.epsilon(rounds),
            "privacy/simulated": int(self.noise == "seeded"),
            "privacy/repeated": self.terms.repeated,
        }

    def epsilon(self, rounds: int) -> float:
        """Return ε after `rounds` rounds."""
        raise NotImplementedError

    def metadata(self) -> dict[str, Any]:
        """Return the noise multiplier and the rounds that were charged again."""
        return {"noise_multiplier": self.terms.noise_multiplier, "repeated": self.terms.repeated}


def check_model(flat: FlatModel, algorithm: Algorithm) -> None:
    """Refuse running statistics, which would leave the clients unprotected.

    Raises:
        ValueError: the model has some, and the algorithm does not keep them local.
    """
    layers = [
        name
        for name, layer in flat.module.named_modules()
        if isinstance(layer, nn.modules.batchnorm._NormBase) and layer.running_mean is not None
    ]
    if layers and not algorithm.local_buffers:
        raise ValueError(
            f"privacy: the running statistics of the batch norm {layers[0]!r} would leave clients without "
            "protection; set model.norm=group, or keep them local by algorithm=FedBN"
        )
