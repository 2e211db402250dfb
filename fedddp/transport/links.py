"""Both ways between clients and the coordinator: what arrives there, and how many bytes were sent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fedddp.algorithms.algorithm import AggregatedUpdate, Algorithm, ClientUpdate, ServerState
from fedddp.models.flat import FlatModel
from fedddp.rng import stream
from fedddp.transport.codecs import Codec
from fedddp.transport.config import TransportConfig
from fedddp.transport.shared import Shared

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
    shared: Shared = field(default_factory=Shared)
    """What travels: all, or `Shared.of` the algorithm."""

    @classmethod
    def started(
        cls, config: TransportConfig, algorithm: Algorithm, seed: int, server: ServerState, flat: FlatModel
    ) -> Links:
        """Return the ways of a new run, and put what the coordinator keeps of them into `server`."""
        links = cls(config, algorithm, seed, Shared.of(algorithm, flat))
        links.start(server)
        return links

    # ---- up: a client's update ----

    def lengths(self, server: ServerState) -> dict[str, int]:
        """Return the length of each vector that a client sends, "buffers" (0: none) among them."""
        lengths = self.algorithm.lengths(server.params.numel())
        if "update" in lengths:
            lengths["update"] = self.shared.length(lengths["update"])
        return {**lengths, "buffers": server.buffers.numel() if self.shared.buffers else 0}

    def buffer_bytes(self, server: ServerState) -> int:
        """Return the bytes of the float and integer buffers, as they are sent either way."""
        return server.buffers.nbytes + server.integer_buffers.nbytes if self.shared.buffers else 0

    def unpacked(self, aggregated: AggregatedUpdate, server: ServerState) -> AggregatedUpdate:
        """Return the aggregated update in its full length: 0 for what stays at the clients."""
        vectors = dict(aggregated.vectors)
        if not self.shared.buffers:
            vectors.pop("buffers", None)
        if self.shared.pieces is not None and "update" in vectors:
            vectors["update"] = self.shared.put(vectors["update"], torch.zeros_like(server.params))
        return replace(aggregated, vectors=vectors)

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
        codec = self.config.up
        if codec is None:
            return update, sum(vector.nbytes for vector in update.vectors.values())
        vectors, sent = dict(update.vectors), 0
        size = max((len(vector) for vector in vectors.values()), default=0)
        for name, vector in update.vectors.items():
            if len(vector) < size:
                sent += vector.nbytes
                continue
            payload, vectors[name] = _through(codec, vector, state, name, (self.seed, number, client, name))
            sent += payload
        return replace(update, vectors=vectors), sent

    def update_bytes(self, server: ServerState) -> int:
        """Return the bytes of a client's vectors, but for its buffers: those of an update of zeros."""
        lengths = {name: length for name, length in self.lengths(server).items() if name != "buffers"}
        zeros = {name: server.params.new_zeros(length) for name, length in lengths.items()}
        return self.received(ClientUpdate(zeros, 1.0), {}, client=0, number=0)[1]

    # ---- down: the model's change ----

    def start(self, server: ServerState) -> None:
        """Put what the coordinator keeps into `server.vectors`: no client has had the model."""
        if self.config.down is None:
            return
        server.vectors[HAD] = torch.full((server.population,), -1)
        server.vectors[SENT] = torch.zeros(1, dtype=torch.int64)
        if self.config.down.error_feedback:
            for name, (vector, part) in self._sent_down(server).items():
                server.vectors[f"{DOWN}{ERROR}{name}"] = torch.zeros_like(part.pack(vector))

    def snapshot(self, server: ServerState) -> dict[str, Tensor]:
        """Return copies of what clients hold, before the server steps; empty without a codec."""
        if self.config.down is None:
            return {}
        return {name: part.pack(vector).clone() for name, (vector, part) in self._sent_down(server).items()}

    def send_change(self, server: ServerState, before: Mapping[str, Tensor], round_index: int) -> None:
        """Let the server's model become what clients decode: the model `before`, and its encoded change.

        The coordinator keeps the decoded model too, so that all hold the same bits. With error feedback it
        adds what the codec left out to the change of the next round.
        """
        codec = self.config.down
        if codec is None:
            return
        kept = {n.removeprefix(DOWN): v for n, v in server.vectors.items() if n.startswith(DOWN + ERROR)}
        for name, (vector, part) in self._sent_down(server).items():
            change = part.pack(vector) - before[name]
            payload, decoded = _through(codec, change, kept, name, (self.seed, round_index, "down", name))
            part.put(before[name] + decoded, vector)
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
        whole = self._bytes_of_parameters(server)
        had, sent = server.vectors[HAD], int(server.vectors[SENT])
        chosen = torch.as_tensor(clients, dtype=torch.int64, device=had.device)
        missed = torch.where(had[chosen] < 0, whole, sent - had[chosen]).clamp(max=whole)
        had[chosen] = sent
        return int(missed.sum()) + len(clients) * (self.model_bytes(server) - whole)

    def model_bytes(self, server: ServerState) -> int:
        """Return the bytes of the whole model, as a client gets it that has none."""
        return self._bytes_of_parameters(server) + self.buffer_bytes(server)

    def change_bytes(self, server: ServerState) -> int:
        """Return the bytes that a client of the round before is sent: an encoded change, and the buffers."""
        codec = self.config.down
        if codec is None:
            return self.model_bytes(server)
        sizes = (part.length(len(vector)) for vector, part in self._sent_down(server).values())
        encoded = [len(codec.encode(torch.zeros(size), stream("plan"))) for size in sizes]
        return self.buffer_bytes(server) + sum(encoded)

    def _sent_down(self, server: ServerState) -> dict[str, tuple[Tensor, Shared]]:
        """Return the vectors whose change is encoded, and what travels of each.

        They are the parameters, and what an algorithm sends along.
        """
        along = {name: (server.vectors[name], Shared()) for name in self.algorithm.sends}
        return {"params": (server.params, self.shared)} | along

    def _bytes_of_parameters(self, server: ServerState) -> int:
        """Return the bytes of the parameters, and of what an algorithm sends along, as they are."""
        sent = self._sent_down(server).values()
        return sum(part.length(len(vector)) * vector.itemsize for vector, part in sent)


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
