"""The section `transport`: which codecs a run uses, and what they cannot be combined with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from fedddp.algorithms.algorithm import Algorithm, AsynchronousAlgorithm
from fedddp.section import ConfigError, Section
from fedddp.transport.codecs import Codec


@dataclass(frozen=True, kw_only=True)
class TransportConfig(Section):
    """Compression of what clients and the coordinator send each other."""

    key: ClassVar[str] = "transport"

    up: Codec | None = None
    """Codec of what clients send; none: float32."""

    down: Codec | None = None
    """Codec of the change of the model that a round's clients are sent; none: the model in float32."""

    group: Literal["bf16", "fp16", "powersgd"] | None = None
    """Compression of gradients inside a client group of several ranks, by torch's DDP hooks; none: exact.
    With it a client's update depends on the number of ranks that train it."""

    @property
    def stateful(self) -> bool:
        """Whether clients keep what their codec left out, between rounds."""
        return self.up is not None and self.up.error_feedback

    def check(self, algorithm: Algorithm, ranks_per_client: int) -> None:
        """Refuse what has no meaning with `algorithm` or with groups of so many ranks.

        Raises:
            ConfigError: the settings, the reason, and the fix.
        """
        name = type(algorithm).__name__
        asynchronous = isinstance(algorithm, AsynchronousAlgorithm)
        if self.up is not None and "update" not in algorithm.lengths(1):
            raise ConfigError(
                f"transport.up={type(self.up).__name__} compresses updates, but algorithm={name} sends "
                "models; use algorithm=FedBuff, or leave it out"
            )
        if self.stateful and asynchronous:
            raise ConfigError(
                f"transport.up={type(self.up).__name__} keeps an error per client, but algorithm={name} "
                "keeps no client state; use Cast, Int8, QSGD or EDEN"
            )
        if self.down is not None and asynchronous:
            raise ConfigError(
                f"transport.down={type(self.down).__name__} compresses the change of the model in a round, "
                f"but algorithm={name} sends models between rounds; leave it out"
            )
        if self.group is not None and ranks_per_client == 1:
            raise ConfigError(
                f"transport.group={self.group} compresses gradients inside a client group, but "
                "topology.ranks_per_client=1; raise it, or leave transport.group out"
            )
