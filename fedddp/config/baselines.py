"""Baselines: what training without a federation reaches, with the settings of a federated run."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from fedddp.aggregation import Mean
from fedddp.algorithms import AsynchronousAlgorithm, FedAvg, LocalOnly
from fedddp.data.partition import Natural
from fedddp.evaluation import EVALUATED
from fedddp.section import ConfigError
from fedddp.simulation.clock import Virtual, examples_trained
from fedddp.simulation.cohort import CohortConfig
from fedddp.storage.judged import BASELINES
from fedddp.transport.config import TransportConfig

if TYPE_CHECKING:
    from fedddp.algorithms.local import LocalConfig
    from fedddp.config.schema import Config

Baseline = Literal["none", "local", "pooled"]


def check_baseline(c: Config) -> None:
    """Refuse a baseline with settings that have no meaning without a federation.

    Raises:
        ConfigError: the setting, in one line.
    """
    if isinstance(c.algorithm, LocalOnly) and c.baseline != "local":
        raise ConfigError("algorithm=LocalOnly is what baseline=local trains; set that instead")
    if c.baseline == "none":
        return
    name, rule, attack = (type(choice).__name__ for choice in (c.algorithm, c.aggregation, c.attacks))
    clip = c.aggregation.clip_norm
    private, secure = type(c.privacy).__name__, type(c.secure_aggregation).__name__
    packed = [link for link in ("up", "down") if getattr(c.transport, link) is not None]
    wrong = {
        f"replay={c.replay} repeats arrivals": c.replay is not None,
        f"algorithm={name} is asynchronous": isinstance(c.algorithm, AsynchronousAlgorithm),
        f"attacks={attack} is of malicious clients": attack != "NoAttack",
        f"aggregation={rule} is of clients' updates": c.aggregation.robust,
        f"aggregation.clip_norm={clip} is of clients' updates": clip is not None,
        f"privacy={private} protects what clients send": c.privacy is not None,
        f"secure_aggregation={secure} masks what clients send": c.secure_aggregation is not None,
        f"transport.{'/'.join(packed)} compresses what is sent": bool(packed),
    }
    problem = next((text for text, holds in wrong.items() if holds), None)
    if problem:
        raise ConfigError(f"baseline={c.baseline} trains without a federation, but {problem}; leave it out")
    natural = isinstance(c.data.partition, Natural)
    if c.baseline == "local" and not c.data.holdout and not natural:
        raise ConfigError(
            "baseline=local trains a model for each client, which is evaluated on the client's own data, but "
            "data.holdout=0; set data.holdout, e.g. 0.2, for the federated run too"
        )


def in_effect(c: Config) -> Config:
    """Return the configuration whose rounds are trained: `c` itself, unless it has a baseline.

    Where there is no global model, clients are evaluated, also if `evaluation.clients` is 0.

    Both baselines train on every client's data in every round: `rounds` times `local.epochs` passes, as the
    federated run does where all clients take part. `local`: a round is one local training of each client,
    from the client's own model. `pooled`: a round is one local training of a single client that holds the
    training data of all. Optimizers keep their state between rounds, which mean nothing here. No client is
    late or left out: `cohort` and `clock` have no effect, nor has `algorithm`.
    """
    if c.baseline == "none":
        return c if c.algorithm.has_global_model else on_clients(c)
    local = c.baseline == "local"
    return dataclasses.replace(
        on_clients(c) if local else c,
        algorithm=LocalOnly() if local else FedAvg(),
        aggregation=c.aggregation if isinstance(c.aggregation, Mean) else Mean(),
        cohort=CohortConfig(size=c.data.clients if local else 1),
        clock=Virtual(),
        local=dataclasses.replace(c.local, optimizer_state="keep"),
    )


def on_clients(c: Config) -> Config:
    """Return `c` with an evaluation on clients, of up to `EVALUATED`, where it has none and may have one.

    It may not where clients have no data for it, or where its row would show what is to be hidden.
    """
    if c.evaluation.clients or c.privacy is not None:  # no numbers of single clients unless asked for
        return c
    clients = min(c.data.clients, EVALUATED)
    try:
        return dataclasses.replace(c, evaluation=dataclasses.replace(c.evaluation, clients=clients))
    except ConfigError:  # by `data.holdout`, `privacy.strict` or `secure_aggregation`
        return c


def compared_on_clients(configs: dict[str, Config]) -> dict[str, Config]:
    """Return `configs`, all evaluated on clients if one has no global model, and so no other metric."""
    if not any(map(without_global_model, configs.values())):
        return configs
    return {name: on_clients(config) for name, config in configs.items()}


def without_global_model(c: Config) -> str | None:
    """Return what leaves a run without a global model, as "algorithm=FedBN"; None where it has one."""
    alone = c.baseline == "local" or (c.baseline == "none" and not c.algorithm.has_global_model)
    return trained_by(c) if alone else None


def trained_by(c: Config) -> str:
    """Return the setting that a run is trained by: its baseline, or its algorithm."""
    return f"algorithm={type(c.algorithm).__name__}" if c.baseline == "none" else f"baseline={c.baseline}"


def pooled_steps(local: LocalConfig, sizes: NDArray[np.int64]) -> LocalConfig:
    """Return `local` for one client that holds the data of all, of `sizes` (clients,).

    With `local.steps` a federated client repeats its data as often as needed. The pooled one takes so many
    steps that a round trains on as many examples as all of the clients together; at least one.
    """
    if local.steps is None:
        return local
    examples = int(examples_trained(local, sizes).sum())
    return dataclasses.replace(local, steps=max(1, round(examples / local.batch_size)))


def examples_per_round(c: Config, sizes: NDArray[np.int64]) -> float:
    """Return the examples that a round of `c` trains on, passes included, on average over cohorts.

    Args:
        c: the configuration, of a baseline or not.
        sizes: training examples of every client, (clients,).
    """
    of_each = examples_trained(c.local, sizes)
    return float(of_each.sum()) if c.baseline != "none" else float(c.cohort.size * of_each.mean())


def baselines_of(c: Config) -> dict[str, Config]:
    """Return both baselines of a federated run, by a name for their directories.

    They differ from `c` in `baseline`, and in what is done to what clients send: `privacy`,
    `secure_aggregation`, and `transport` but for its `group`. `local` differs in `checkpoint.best` too: it
    has no global model, so that only metrics over clients are left.
    """
    kinds: tuple[Baseline, ...] = ("local", "pooled")
    return {BASELINES[kind].replace(" ", "-"): _baseline(c, kind) for kind in kinds}


def _baseline(c: Config, kind: Baseline) -> Config:
    checkpoint = c.checkpoint
    if kind == "local":
        kept = [metric for metric in checkpoint.metrics if not metric.startswith("eval/")]
        checkpoint = dataclasses.replace(checkpoint, best=kept or None)
    transport = TransportConfig(group=c.transport.group)
    return dataclasses.replace(
        c, baseline=kind, checkpoint=checkpoint, privacy=None, secure_aggregation=None, transport=transport
    )
