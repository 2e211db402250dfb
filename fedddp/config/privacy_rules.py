"""Which settings cannot be combined with `privacy`, and why; docs/privacy.md has them as a table."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from fedddp.aggregation import Mean
from fedddp.algorithms import Algorithm, AsynchronousAlgorithm
from fedddp.privacy.config import CentralDP, ExampleDP, LocalDP, Privacy

if TYPE_CHECKING:
    from fedddp.config.schema import Config


class Rule(NamedTuple):
    """A setting that is refused with `privacy`."""

    title: str
    """The feature, for the table of the documentation."""
    kinds: tuple[type[Privacy], ...]
    """The classes of `privacy` that it is refused with."""
    strict: bool
    """Whether it is refused under `privacy.strict` only."""
    setting: Callable[[Config], str | None]
    """Returns the setting that is refused, with its value; None where it is not."""
    reason: str
    """Words that follow the setting, with the fix."""


def _named(given: bool, text: str) -> str | None:
    return text if given else None


def _name(choice: object) -> str:
    return type(choice).__name__


OF_CLIENTS = (CentralDP, LocalDP)
"""Which protect all of a client's data together; what clients send or keep shows how much data they have."""

RULES = (
    Rule(
        "asynchronous algorithms",
        (Privacy,),
        False,
        lambda c: _named(isinstance(c.algorithm, AsynchronousAlgorithm), f"algorithm={_name(c.algorithm)}"),
        "absorbs updates as they arrive, and no account knows how often a client does; use a synchronous one",
    ),
    Rule(
        "algorithms that need every client's loss",
        (Privacy,),
        False,
        lambda c: _named(c.algorithm.needs_initial_loss, f"algorithm={_name(c.algorithm)}"),
        "shows every client's loss to all others; use another algorithm",
    ),
    Rule(
        "robust aggregation",
        (CentralDP,),
        False,
        lambda c: _named(not isinstance(c.aggregation, Mean), f"aggregation={_name(c.aggregation)}"),
        "has no bound on what one client changes; use Mean, or LocalDP",
    ),
    Rule(
        "`aggregation.sums=float32`",
        (CentralDP,),
        False,
        lambda c: _named(getattr(c.aggregation, "sums", "") == "float32", "aggregation.sums=float32"),
        "rounds differently from cohort to cohort, which noise on a grid cannot hide; use exact",
    ),
    Rule(
        "`aggregation.clip_norm`",
        OF_CLIENTS,
        False,
        lambda c: _named(
            c.aggregation.clip_norm is not None, f"aggregation.clip_norm={c.aggregation.clip_norm}"
        ),
        "clips one vector of an update once more; leave it out, privacy.clip is over all of them",
    ),
    Rule(
        "`aggregation.on_invalid_update=clip`",
        OF_CLIENTS,
        False,
        lambda c: _named(c.aggregation.on_invalid_update == "clip", "aggregation.on_invalid_update=clip"),
        "would repair an update that has no norm to clip it to; use skip",
    ),
    Rule(
        "`cohort.extra`",
        (CentralDP,),
        False,
        lambda c: _named(c.cohort.extra > 0, f"cohort.extra={c.cohort.extra}"),
        "lets the amount of data decide who is in a cohort; leave it out",
    ),
    Rule(
        "`clock.deadline_s`",
        (CentralDP,),
        False,
        lambda c: _named(
            getattr(c.clock, "deadline_s", None) is not None,
            f"clock.deadline_s={getattr(c.clock, 'deadline_s', None)}",
        ),
        "lets the amount of data decide who is in a cohort; leave it out",
    ),
    Rule(
        "`transport.up`",
        (CentralDP,),
        False,
        lambda c: _named(c.transport.up is not None, f"transport.up={_name(c.transport.up)}"),
        "decodes to vectors of another norm: clipped before, they would exceed C, and clipped after, C would "
        "cut the codec's error more than the update; leave it out, or use LocalDP",
    ),
    Rule(
        "`secure_aggregation` with amplification by sampling",
        (CentralDP,),
        False,
        lambda c: _named(
            c.secure_aggregation is not None
            and isinstance(c.privacy, CentralDP)
            and c.privacy.sampling(c.cohort.sampling) != "none",
            f"secure_aggregation={_name(c.secure_aggregation)} with amplification by sampling",
        ),
        "abandons a round of too few clients, which reveals a cohort that the account takes for secret; set "
        "privacy.amplification=none",
    ),
    Rule(
        "algorithms with a penalty on batches",
        (ExampleDP,),
        False,
        lambda c: _named(
            type(c.algorithm).penalty is not Algorithm.penalty, f"algorithm={_name(c.algorithm)}"
        ),
        "adds to the loss what is computed from a batch, without a bound on what one example changes; use "
        "FedProx or SCAFFOLD",
    ),
    Rule(
        "`model.norm=batch` and `sync`",
        (ExampleDP,),
        False,
        lambda c: _named(c.model.norm in ("batch", "sync"), f"model.norm={c.model.norm}"),
        "normalises an example by statistics of others; use group",
    ),
    Rule(
        "codecs with error feedback",
        OF_CLIENTS,
        True,
        lambda c: _named(c.transport.stateful, f"transport.up={_name(c.transport.up)}"),
        "keeps its error per client in checkpoints, which show who took part; use QSGD, or another that "
        "keeps none",
    ),
    Rule(
        "`transport.down`",
        OF_CLIENTS,
        True,
        lambda c: _named(c.transport.down is not None, f"transport.down={_name(c.transport.down)}"),
        "keeps in checkpoints which client was sent which model; leave it out",
    ),
    Rule(
        "`evaluation.clients`",
        (Privacy,),
        True,
        lambda c: _named(c.evaluation.clients > 0, f"evaluation.clients={c.evaluation.clients}"),
        "records numbers of single clients; leave it out",
    ),
    Rule(
        "client state (`SCAFFOLD`, `MOON`, `FedBN`, `FedPer`, `Ditto`, `local.optimizer_state=keep`)",
        OF_CLIENTS,
        True,
        lambda c: _named(
            c.algorithm.stateful or c.local.optimizer_state == "keep",
            f"algorithm={_name(c.algorithm)}, local.optimizer_state={c.local.optimizer_state}",
        ),
        "keeps what clients computed from their data in checkpoints; use FedAvg, or another that keeps none",
    ),
    Rule(
        "`aggregation.on_invalid_update=stop`",
        OF_CLIENTS,
        True,
        lambda c: _named(c.aggregation.on_invalid_update == "stop", "aggregation.on_invalid_update=stop"),
        "ends the run with the name of a client; use skip",
    ),
)


def refusal(c: Config) -> str | None:
    """Return why the settings of `c` cannot be combined, in one line; None where they can."""
    privacy = c.privacy
    if privacy is None:
        return None
    if c.algorithm.not_private and isinstance(privacy, OF_CLIENTS):
        return (
            f"algorithm={_name(c.algorithm)} cannot be combined with privacy={_name(privacy)}: it "
            f"{c.algorithm.not_private}; use another algorithm"
        )
    for rule in RULES:
        applies = isinstance(privacy, rule.kinds) and (privacy.strict or not rule.strict)
        setting = rule.setting(c) if applies else None
        if setting is not None:
            given = f"privacy={_name(privacy)}{' with privacy.strict' if rule.strict else ''}"
            return f"{setting} cannot be combined with {given}: it {rule.reason}"
    if isinstance(privacy, ExampleDP):
        return _training_refusal(c)
    return _population_refusal(c, privacy)


ADDS_UP = "adds up gradients of a batch that must be clipped before; leave it out"


def _training_refusal(c: Config) -> str | None:
    """Return which way of training has no exact sum of clipped gradients, and why."""
    reasons = {
        "local.precision=fp16": "skips a step where the gradient of one example overflows; use bf16",
        **{f"local.engine={name}": ADDS_UP for name in ("traced", "graph")},
        f"transport.group={c.transport.group}": (
            "rounds the sum of each rank, but the noise is for one exact sum of the group; leave it out"
        ),
    }
    given = {f"local.precision={c.local.precision}", f"local.engine={c.local.engine}"}
    given |= {f"transport.group={c.transport.group}"} - {"transport.group=None"}
    found = next((setting for setting in reasons if setting in given), None)
    if found is None:
        return None
    return f"{found} cannot be combined with privacy=ExampleDP: it {reasons[found]}"


def _population_refusal(c: Config, privacy: Privacy) -> str | None:
    """Return what is wrong with δ for so many clients, or with the account of their cohorts."""
    if privacy.delta >= 1 / c.data.clients:
        return (
            f"privacy.delta={privacy.delta:g} must be below 1 / data.clients = {1 / c.data.clients:.3g}: a "
            "larger δ allows to publish a client as it is; lower privacy.delta"
        )
    if not isinstance(privacy, CentralDP):
        return None
    if privacy.amplification == "without_replacement" and c.cohort.sampling != "fixed":
        return (
            f"privacy.amplification=without_replacement is of cohorts of fixed size, but cohort.sampling="
            f"{c.cohort.sampling}; use cohort.sampling=fixed, or privacy.amplification=auto"
        )
    return None
