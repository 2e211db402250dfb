"""From a client's update to the coordinator's sums: noise, attacks, codecs and masks; and how many bytes.

A client protects its update (`LocalDP`), packs it (`transport.up`), and masks it (`secure_aggregation`), in
this order. `CentralDP` clips when the update is added to the sums, and adds its noise to them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from fedddp.aggregation import Accumulator
from fedddp.algorithms import ClientUpdate, ServerState
from fedddp.rng import stream
from fedddp.secure.messages import NUMBER_BYTES, traffic, vector_length
from fedddp.training.secure_round import masked_sums
from fedddp.transport.links import Links

if TYPE_CHECKING:
    from fedddp.config.schema import Config
    from fedddp.training.session import Session


def accumulator(s: Session, clients: int) -> Accumulator:
    """Return an empty accumulator for `clients` clients, in the memory of the round before."""
    if s.updates is not None:
        s.updates.reset(clients)
        return s.updates
    server, lengths = s.server, s.links.lengths(s.server)
    if s.config.secure_aggregation is None:
        if not s.world.holds_sums:
            lengths = dict.fromkeys(lengths, 0)
        s.updates = s.protection.accumulator(s.config.aggregation, lengths, clients, server)
    else:
        s.updates = masked_sums(s, lengths, clients)
    return s.updates


def received(
    s: Session, client: int, number: int, update: ClientUpdate, state: dict[str, Tensor]
) -> tuple[ClientUpdate, int]:
    """Return `update` as it is received from `client`, and the bytes sent, buffers included.

    Args:
        s: the session.
        client: the client; a malicious one sends what it likes, without noise.
        number: the round's index or the dispatch id, which names the random streams.
        update: what the client computed, in its full length; what stays at the client is left out.
        state: the client's own, changed in place.
    """
    update = s.protection.sent(client, number, s.links.shared.packed(update))
    if client in s.malicious:
        update = s.config.attacks.corrupt(update, stream("attack", s.config.seed, number, client))
    update, sent = s.links.received(update, state, client=client, number=number)
    return update, sent + s.links.buffer_bytes(s.server) if s.config.baseline == "none" else 0


def sent_down(s: Session, clients: list[int]) -> int:
    """Return the bytes that `clients` are sent to train from the server's model; once per round."""
    return s.links.bytes_down(s.server, clients) if s.config.baseline == "none" else 0


def round_bytes(config: Config, links: Links, server: ServerState, clients: int) -> tuple[int, int]:
    """Return the bytes that `clients` clients send, and are sent at most, in a round without drop-outs.

    They are known before the round: no length depends on values.
    """
    if config.baseline != "none":
        return 0, 0
    down = clients * links.model_bytes(server)
    if config.secure_aggregation is None:
        return clients * (links.update_bytes(server) + links.buffer_bytes(server)), down
    degree = config.secure_aggregation.degree(clients)
    length = vector_length(links.lengths(server), 0, server.integer_buffers.numel())
    # Weighed by examples, clients first add up their numbers of them, by another run of the protocol, and
    # are sent the sum.
    up, more = traffic(length, degree)
    if config.privacy is None or not config.privacy.weighs_equally:
        first = traffic(1, degree)
        up, more = up + first[0], more + first[1] + NUMBER_BYTES
    return clients * up, down + clients * more
