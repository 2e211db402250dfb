"""What a running federation does for the privacy of its clients; without a section `privacy` nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from fedddp.aggregation import Accumulator, Aggregation
from fedddp.algorithms import Algorithm, ClientUpdate, ServerState
from fedddp.models.flat import FlatModel
from fedddp.privacy.config import CalibratedDP, ExampleDP, Privacy
from fedddp.section import LARGEST

KEPT = ("round", "privacy/", "eval/", "bytes/", "time/round", "time/evaluate", "time/checkpoint")
"""What `privacy.strict` leaves of a round's line: beginnings of keys."""


class Terms(NamedTuple):
    """What a run is held to, which the coordinator computes before the first round."""

    noise_multiplier: float
    """z, of local differential privacy μ."""
    last_round: int
    """The round after which the budget ends the run; the run's rounds where it does not."""
    repeated: int
    """Rounds that were released, lost with a process, and released again with other noise."""


class RunAccount(Protocol):
    """What the rounds of a run cost."""

    def epsilon(self, noise_multiplier: float, rounds: int) -> float:
        """Return ε after so many `rounds` with that noise."""

    def noise_multiplier(self, epsilon: float, rounds: int) -> float:
        """Return the smallest noise multiplier with which `rounds` rounds cost `epsilon`."""

    def most_rounds(self, noise_multiplier: float, budget: float, limit: int) -> int:
        """Return how many rounds, at most `limit`, cost no more than ε = `budget`."""


def calibrated_terms(
    privacy: CalibratedDP, account: RunAccount, rounds: int, kept: float | None, repeated: int
) -> Terms:
    """Return what a run of `rounds` rounds is held to; a query of the account takes up to a second.

    Args:
        privacy: the settings.
        account: how it is accounted.
        rounds: rounds of the run.
        kept: z of a run that is resumed: more rounds must not change it.
        repeated: rounds that are charged again.

    Raises:
        ValueError: the budget does not allow a first round.
    """
    noise = kept or privacy.noise_multiplier
    if noise is None:
        assert privacy.target_epsilon is not None
        noise = account.noise_multiplier(privacy.target_epsilon, rounds)
    last = rounds
    if privacy.budget < math.inf:
        last = account.most_rounds(noise, privacy.budget, rounds + repeated) - repeated
        if last + repeated < 1:
            raise ValueError(
                f"privacy.stop_at_epsilon={privacy.budget:g} is less than the first round costs "
                f"(ε = {account.epsilon(noise, 1):.4g} with noise multiplier {noise:.4g}); raise one of them"
            )
    return Terms(noise, last, repeated)


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

    def write(self, directory: Path, rounds: int) -> None:
        """Write what a run of `rounds` rounds has on single clients, at its end; on the coordinator."""

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


def check_model(flat: FlatModel, algorithm: Algorithm, privacy: Privacy) -> None:
    """Refuse running statistics, which would leave the clients unprotected.

    Raises:
        ValueError: the model has some, and the algorithm does not keep them local; or, with ExampleDP, the
            model mixes the examples of a batch.
    """
    if isinstance(privacy, ExampleDP):
        _check_examples_apart(flat)
        return
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


def _check_examples_apart(flat: FlatModel) -> None:
    """Refuse a model that mixes the examples of a batch, or keeps statistics of them.

    Raises:
        ValueError: it has batch norm, or instance norm with running statistics.
    """
    for name, layer in flat.module.named_modules():
        mixes = isinstance(layer, nn.modules.batchnorm._BatchNorm)
        kept = isinstance(layer, nn.modules.batchnorm._NormBase) and layer.running_mean is not None
        if mixes or kept:
            raise ValueError(
                f"privacy: {name!r} normalises by statistics of other examples, but ExampleDP bounds what a "
                "single one changes; set model.norm=group"
            )
