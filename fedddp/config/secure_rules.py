"""Which settings cannot be combined with `secure_aggregation`, and why; a table is in docs/privacy.md."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedddp.aggregation import Mean
from fedddp.algorithms import Algorithm, AsynchronousAlgorithm, FedBuff
from fedddp.section import ConfigError
from fedddp.secure.settings import FEWEST

if TYPE_CHECKING:
    from fedddp.config.schema import Config


def _name(choice: object) -> str:
    return type(choice).__name__


def _why_not(algorithm: Algorithm) -> str:
    """Return why an asynchronous `algorithm` is refused."""
    if isinstance(algorithm, FedBuff):
        return (
            "receives an update as soon as it is trained, so that its group can train the next, and not when "
            "the clients of its buffer are known and could share keys"
        )
    return "steps by each update alone, which no sum hides"


def check_secure(c: Config) -> None:
    """Reject what needs single updates, where the coordinator receives their sum only."""
    if c.secure_aggregation is None:
        return
    rule = _name(c.aggregation)
    name = f"secure_aggregation={_name(c.secure_aggregation)}"
    refusals = {
        f"algorithm={_name(c.algorithm)} {_why_not(c.algorithm)}; use a synchronous algorithm": isinstance(
            c.algorithm, AsynchronousAlgorithm
        ),
        f"aggregation={rule} must see the updates apart; use aggregation=Mean": not isinstance(
            c.aggregation, Mean
        ),
        "aggregation.sums=float32 rounds sums, from which masks do not cancel; use sums=exact": getattr(
            c.aggregation, "sums", "exact"
        )
        != "exact",
        f"aggregation.clip_norm={c.aggregation.clip_norm} clips single updates at the coordinator; leave it "
        "out, or set local.clip_norm": c.aggregation.clip_norm is not None,
        "aggregation.on_invalid_update=clip changes single updates at the coordinator; use skip, by which "
        "an invalid update is not sent": c.aggregation.on_invalid_update == "clip",
        f"evaluation.clients={c.evaluation.clients} records the metrics of single clients by their number; "
        "use evaluation.clients=0": c.evaluation.clients > 0,
        f"transport.up={_name(c.transport.up)} would lose precision and save nothing: a masked vector has 8 "
        "bytes per element, whatever is below the mask; leave it out": c.transport.up is not None,
        f"cohort.size={c.cohort.size} is fewer than the {FEWEST} clients of which none can subtract "
        "another's update from the sum; raise cohort.size": c.cohort.size < FEWEST,
    }
    for reason, refused in refusals.items():
        if refused:
            raise ConfigError(f"{name} cannot be combined: {reason}")
