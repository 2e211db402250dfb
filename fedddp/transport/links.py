"""Both ways between clients and the coordinator: what arrives there, and how many bytes were sent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedddp.algorithms.algorithm import Algorithm, ClientUpdate, ServerState
from fedddp.rng import stream
from fedddp.transport.codecs import Codec
from fedddp.transport.config import TransportConfig

ERROR = "error."
"""Prefix, in a client's state, of what its codec left out of each vector."""
DOWN = "transport."
"""Prefix of the server's vectors for what is sent to clients."""
HAD = f"{DOWN}had"
"""Bytes of all changes up to the model that a client was last sent, -1 for none; (N,) int64."""
SENT = f"{DOWN}sent"
"""Bytes of all changes so far; (1,) int64."""


@dataclass(frozen=True)
class Links:
    """The ways of one run."""

    config: TransportConfig
    algorithm: Algorithm
    seed: int

    @classmethod
    def started(cls, config: TransportConfig, algorithm: Algorithm, seed: int, server: ServerState) -> Links:
        """Return the ways of a new run, and put what the coordinator keeps of them into `server`."""
        links = cls(config, algorithm, seed)
        links.start(server)
        return links

    # ---- up: a client's update ----

    def received(
        self, update: ClientUpdate, state: dict[str, Tensor], *, client: int, number: int
    ) -> tuple[ClientUpdate, int]:
        """Return `update` as the coordinator receives it, and the bytes of its vectors.

        Vectors as long as the update are encoded and decoded. Shorter ones, such as FedNova's a_k, are sent
        as they are.

        Args:
            update: what the client sends.
            state: the client's own; it holds what the codec left out, and is changed in place.
            client: the client.
            number: the round's index or the dispatch id, which names the random stream.
        """
        codec, size = self.config.up, max((len(v) for v in update.vectors.values()), default=0)
        vectors, sent = dict(update.vectors), 0
        for name, vector in update.vectors.items():
            if codec is None or len(vector) < size:
                sent += vector.nbytes
                continue
            payload, vectors[name] = _through(codec, vector, state, name, (self.seed, number, client, name))
            sent += payload
        return replace(update, vectors=vectors), sent

    def update_bytes(self, like: Tensor) -> int:
        """Return the bytes of a client's vectors, for parameters `like` (P,): those of an update of zeros."""
        lengths = self.algorithm.lengths(len(like))
        zeros = {name: like.new_zeros(length) for name, length in lengths.items()}
        return self.received(ClientUpdate(zeros, 1.0), {}, client=0, number=0)[1]

    # ---- down: the model's change ----

    def start(self, server: ServerState) -> None:
        """Put what the coordinator keeps into `server.vectors`: no client has had the model."""
        if self.config.down is None:
            return
        server.vectors[HAD] = torch.full((server.population,), -1)
        server.vectors[SENT] = torch.zeros(1, dtype=torch.int64)
        if self.config.down.error_feedback:
            for name, vector in self._sent_down(server).items():
                server.vectors[f"{DOWN}{ERROR}{name}"] = torch.zeros_like(vector)

    def snapshot(self, server: ServerState) -> dict[str, Tensor]:
        """Return copies of what clients hold, before the server steps; empty without a codec."""
        if self.config.down is None:
            return {}
        return {name: vector.clone() for name, vector in self._sent_down(server).items()}

    def send_change(self, server: ServerState, before: Mapping[str, Tensor], round_index: int) -> None:
        """Let the server's model become what clients decode: the model `before`, and its encoded change.

        The coordinator keeps the decoded model too, so that all hold the same bits. With error feedback it
        adds what the codec left out to the change of the next round.
        """
        codec = self.config.down
        if codec is None:
            return
        kept = {n.removeprefix(DOWN): v for n, v in server.vectors.items() if n.startswith(DOWN + ERROR)}
        for name, vector in self._sent_down(server).items():
            change = vector - before[name]
            payload, decoded = _through(codec, change, kept, name, (self.seed, round_index, "down", name))
            vector.copy_(before[name] + decoded)
            server.vectors[SENT] += payload
        for name, error in kept.items():
            server.vectors[f"{DOWN}{name}"].copy_(error)

    def bytes_down(self, server: ServerState, clients: Sequence[int]) -> int:
        """Return the bytes that `clients` are sent to train from the server's model, and note that they are.

        With a codec a client gets the changes since the model that it has, or the whole model where that is
        shorter or it has none. Buffers are sent as they are. Call it once per round.
        """
        if self.config.down is None:
            return len(clients) * self.model_bytes(server)
        whole = sum(vector.nbytes for vector in self._sent_down(server).values())
        had, sent = server.vectors[HAD], int(server.vectors[SENT])
        chosen = torch.as_tensor(clients, dtype=torch.int64, device=had.device)
        missed = torch.where(had[chosen] < 0, whole, sent - had[chosen]).clamp(max=whole)
        had[chosen] = sent
        return int(missed.sum()) + len(clients) * (self.model_bytes(server) - whole)

    def model_bytes(self, server: ServerState) -> int:
        """Return the bytes of the whole model, as a client gets it that has none."""
        return self.algorithm.traffic(server)[1]

    def change_bytes(self, server: ServerState) -> int:
        """Return the bytes that a client of the round before is sent: an encoded change, and the buffers."""
        codec, down = self.config.down, self._sent_down(server)
        if codec is None:
            return self.model_bytes(server)
        encoded = [len(codec.encode(torch.zeros(len(v)), stream("plan"))) for v in down.values()]
        return self.model_bytes(server) - sum(v.nbytes for v in down.values()) + sum(encoded)

    def _sent_down(self, server: ServerState) -> dict[str, Tensor]:
        """Return the vectors whose change is encoded: the parameters, and what an algorithm sends along."""
        return {"params": server.params} | {name: server.vectors[name] for name in self.algorithm.sends}


def _through(
    codec: Codec, vector: Tensor, state: dict[str, Tensor], name: str, key: tuple[int | str, ...]
) -> tuple[int, Tensor]:
    """Return the bytes of the payload of `vector` and what it decodes to, with error feedback in `state`.

    p = v + e; C(p) is sent; e ← p − C(p).
    """
    if codec.error_feedback:
        error = state.get(ERROR + name)
        vector = vector if error is None else vector + error.to(vector)
    payload = codec.encode(vector, stream("encode", *key))
    decoded = codec.decode(payload).to(vector)
    if codec.error_feedback:
        state[ERROR + name] = (vector - decoded).cpu()
    return len(payload), decoded
