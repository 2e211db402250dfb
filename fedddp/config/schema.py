"""The configuration of a run: its sections, and the rules that hold between them."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from typing import Annotated, Literal, TypedDict, get_args

from annotated_types import Ge, Le

from fedddp.aggregation import Aggregation, Mean
from fedddp.algorithms import MOON, Algorithm, AsynchronousAlgorithm, FedAvg
from fedddp.algorithms.local import LocalConfig
from fedddp.callbacks import OnError
from fedddp.config.baselines import Baseline, check_baseline
from fedddp.config.privacy_rules import refusal
from fedddp.config.secure_rules import check_secure
from fedddp.data.datasets import DataConfig
from fedddp.data.partition import Natural
from fedddp.distributed.topology import TopologyConfig
from fedddp.evaluation import EvaluationConfig
from fedddp.models.registry import ModelConfig
from fedddp.privacy.config import Privacy
from fedddp.section import ConfigError, PositiveInt, Section, complete, field_hints, key_of, section_in
from fedddp.secure import SecureAggregation
from fedddp.simulation.attacks import Attack, NoAttack
from fedddp.simulation.clock import Clock, Virtual
from fedddp.simulation.cohort import CohortConfig
from fedddp.storage.checkpoint import CheckpointConfig
from fedddp.tasks import Classification, Task
from fedddp.tracking.tracker import TrackingConfig
from fedddp.transport.config import TransportConfig

Role = Literal["experiment", "common", "seed", "replay", "budget", "bookkeeping"]
"""What a field of `Config` is for.

`experiment`: which algorithm is trained on what; `common`: likewise, and the same in all runs of a
comparison; `seed`: as common, but runs that differ in it alone are repetitions; `replay`: another run's
arrivals; `budget`: how long; `bookkeeping`: what is evaluated, saved, shown. Settings inside a section that
decide no number are marked there (`section.EXECUTION`).
"""


PLURALS = {"class": "classes", "multilabel": "several labels", "mask": "masks", "boxes": "boxes"}
"""What a task learns, by its target."""

EXPERIMENT, COMMON, SEED, REPLAY, BUDGET, BOOKKEEPING = ({"role": role} for role in get_args(Role))


@dataclass(frozen=True, kw_only=True)
class Config(Section):
    """The configuration of a run."""

    data: DataConfig = field(default_factory=DataConfig, metadata=COMMON)
    """Images and their partition over clients."""

    model: ModelConfig = field(default_factory=ModelConfig, metadata=EXPERIMENT)
    """The network."""

    task: Task = field(default_factory=Classification, metadata=EXPERIMENT)
    """Loss and metrics."""

    local: LocalConfig = field(default_factory=LocalConfig, metadata=EXPERIMENT)
    """Local training of a client."""

    cohort: CohortConfig = field(default_factory=CohortConfig, metadata=EXPERIMENT)
    """Clients of a round."""

    algorithm: Algorithm = field(default_factory=FedAvg, metadata=EXPERIMENT)
    """The federated algorithm."""

    baseline: Baseline = field(default="none", metadata=EXPERIMENT)
    """Instead of the algorithm, train without a federation: `local`, a model for each client by itself, or
    `pooled`, one model on the data of all. Either takes `rounds` times `local.epochs` passes over the data of
    every client; `cohort` and `clock` have no effect."""

    aggregation: Aggregation = field(default_factory=Mean, metadata=EXPERIMENT)
    """How client updates become one."""

    privacy: Privacy | None = field(default=None, metadata=EXPERIMENT)
    """How the clients' data are protected, by CentralDP, LocalDP or ExampleDP; none: not at all."""
    secure_aggregation: SecureAggregation | None = field(default=None, metadata=EXPERIMENT)
    """How the coordinator receives the sum of the updates and no single one; none: it receives them all."""

    attacks: Attack = field(default_factory=NoAttack, metadata=EXPERIMENT)
    """What malicious clients do."""

    transport: TransportConfig = field(default_factory=TransportConfig, metadata=EXPERIMENT)
    """Compression of what is sent."""

    clock: Clock = field(default_factory=Virtual, metadata=COMMON)
    """How long clients take: stragglers in rounds, the order of arrivals in asynchronous training."""

    topology: TopologyConfig = field(default_factory=TopologyConfig, metadata=EXPERIMENT)
    """Ranks, client groups, coordinator."""

    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig, metadata=BOOKKEEPING)
    """When and on what the model is evaluated."""

    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig, metadata=BOOKKEEPING)
    """When the run is saved."""

    tracking: TrackingConfig = field(default_factory=TrackingConfig, metadata=BOOKKEEPING)
    """Where progress is shown."""

    rounds: PositiveInt = field(default=10, metadata=BUDGET)
    """Rounds to train, >= 1."""

    seed: Annotated[int, Ge(0), Le(2**63 - 1)] = field(default=0, metadata=SEED)
    """Seed of everything random, >= 0."""

    output: str = field(default="runs", metadata=BOOKKEEPING)
    """Folder that holds run directories."""

    name: str | None = field(default=None, metadata=BOOKKEEPING)
    """Name of the run directory in `output`; by default the recipe's, numbered when it is taken."""

    replay: str | None = field(default=None, metadata=REPLAY)
    """Directory of an asynchronous run whose order of arrivals is repeated, bit for bit."""

    callbacks: list[str] = field(default_factory=list, metadata=BOOKKEEPING)
    """Callbacks to call while the run lasts: dotted paths of subclasses of `fedddp.Callback`."""

    callback_errors: OnError = field(default="stop", metadata=BOOKKEEPING)
    """When a callback raises: `stop` ends the run with its error, `drop` trains on without that callback."""

    resume: Literal["never", "auto"] = field(default="never", metadata=BOOKKEEPING)
    """`auto`: resume from the newest checkpoint of the run directory, if there is one."""

    def __post_init__(self) -> None:
        if self.name is not None and not re.fullmatch(r"(?=.*[^.])[\w.+=-]+", self.name):
            raise ConfigError(
                f"name must be letters, digits and . _ + = -, got {self.name!r}; "
                "choose the folder around it with output"
            )
        if self.resume == "never":
            self.model.check_weights()
        checks = (
            *(check_baseline, _check_population, _check_privacy, _check_evaluation, _check_task),
            *(_check_aggregation, _check_local, _check_clock, check_secure),
        )
        for check in checks:
            check(self)
        self.transport.check(self.algorithm, self.topology.ranks_per_client)
        if isinstance(self.algorithm, AsynchronousAlgorithm):
            _check_asynchronous(self)


class ConfigFields(TypedDict, total=False):
    """The fields of `Config`, as keywords of `Federation`."""

    data: DataConfig
    model: ModelConfig
    task: Task
    local: LocalConfig
    cohort: CohortConfig
    algorithm: Algorithm
    baseline: Baseline
    aggregation: Aggregation
    privacy: Privacy | None
    secure_aggregation: SecureAggregation | None
    attacks: Attack
    transport: TransportConfig
    clock: Clock
    topology: TopologyConfig
    evaluation: EvaluationConfig
    checkpoint: CheckpointConfig
    tracking: TrackingConfig
    rounds: int
    seed: int
    output: str
    name: str | None
    replay: str | None
    # `callbacks` is an argument of its own: objects, or their dotted paths in the configuration.
    callback_errors: OnError
    resume: Literal["never", "auto"]


def execution_settings() -> set[str]:
    """Return the keys of the settings that decide no number, such as `data.workers`."""
    keys: set[str] = set()
    for section in filter(None, map(section_in, field_hints(Config).values())):
        complete(section)
        fields = dataclasses.fields(section)
        keys |= {key_of(section, item.name) for item in fields if item.metadata.get("role") == "execution"}
    return keys


def fields_with(*roles: Role) -> tuple[str, ...]:
    """Return the fields of `Config` that have one of these roles."""
    return tuple(item.name for item in dataclasses.fields(Config) if item.metadata["role"] in roles)


def _check_population(c: Config) -> None:
    sampled, clients = c.cohort.size + c.cohort.extra, c.data.clients
    if c.cohort.size > clients:
        raise ConfigError(
            f"cohort.size={c.cohort.size} is larger than the population data.clients={clients}; "
            "lower cohort.size or raise data.clients"
        )
    if sampled > clients:
        raise ConfigError(
            f"cohort.extra={c.cohort.extra} and cohort.size={c.cohort.size} are more clients than "
            f"the population data.clients={clients}; lower one of them or raise data.clients"
        )


def _check_evaluation(c: Config) -> None:
    best = c.checkpoint.metrics
    wrong = next((metric for metric in best if not metric.startswith(("eval/", "clients/"))), None)
    if wrong is not None:
        raise ConfigError(
            f"checkpoint.best={wrong} is no metric of an evaluation; give one of the history that starts "
            "with eval/ or clients/, such as eval/accuracy"
        )
    twice = next((metric for metric in best if best.count(metric) > 1), None)
    if twice is not None:
        raise ConfigError(f"checkpoint.best names {twice} twice; name each metric once")
    # With natural clients the test set may have the examples of each: `training.clients` finds out.
    if c.evaluation.clients and not c.data.holdout and not isinstance(c.data.partition, Natural):
        raise ConfigError(
            f"evaluation.clients={c.evaluation.clients} needs held-out local data, but "
            "data.holdout=0; set data.holdout, e.g. 0.1"
        )


def _check_task(c: Config) -> None:
    """Reject settings that need other targets than those of the task."""
    target, task, shift = c.task.target, _name(c.task), c.data.feature_shift
    if type(c.attacks).relabel is not Attack.relabel and target != "class":
        raise ConfigError(
            f"attacks={_name(c.attacks)} changes the class of an example, but task={task} learns "
            f"{PLURALS[target]}; use attacks=SignFlip or GaussianNoise"
        )
    if shift is not None and shift.rotation and target == "boxes":
        raise ConfigError(
            f"data.feature_shift.rotation={shift.rotation:g} turns images, but a turned box is no box any "
            f"more (task={task}); use color and noise"
        )
    if isinstance(c.algorithm, MOON) and target == "boxes":
        raise ConfigError(
            f"algorithm=MOON compares one vector of features per image, but a detector (task={task}) has "
            "some for each place and size; use FedProx or SCAFFOLD"
        )


def _check_privacy(c: Config) -> None:
    refused = refusal(c)
    if refused is not None:
        raise ConfigError(refused)


def _check_local(c: Config) -> None:
    for name, wanted in c.algorithm.requires(c.local).items():
        value = getattr(c.local, name)
        if value != wanted:
            fix = "leave it out" if wanted is None else f"set local.{name}={wanted}"
            raise ConfigError(
                f"algorithm={_name(c.algorithm)} {c.algorithm.because}, but local.{name}={value}; {fix}"
            )


def _check_aggregation(c: Config) -> None:
    rule, needed = _name(c.aggregation), c.aggregation.min_clients()
    if c.algorithm.mean_only and c.aggregation.robust:
        raise ConfigError(
            f"aggregation={rule} cannot be combined with {_name(c.algorithm)}, whose updates "
            "mean something only as a plain mean; use Mean, or FedAvg"
        )
    if needed > c.cohort.size or (needed > 1 and c.cohort.sampling == "poisson"):
        raise ConfigError(
            f"aggregation={rule} needs at least {needed} clients in every round, but "
            f"cohort.size={c.cohort.size} with sampling={c.cohort.sampling}; raise cohort.size, use "
            "sampling=fixed, or lower aggregation.attackers"
        )
    clips = {
        "clip_norm": c.aggregation.clip_norm is not None,
        "on_invalid_update": c.aggregation.on_invalid_update == "clip",
    }
    for name, clipped in clips.items():
        if c.algorithm.mean_only and clipped:
            raise ConfigError(
                f"aggregation.{name}={getattr(c.aggregation, name)} cannot be combined with "
                f"{_name(c.algorithm)}, whose updates add up only unclipped; leave it out"
            )


def _check_clock(c: Config) -> None:
    asynchronous = isinstance(c.algorithm, AsynchronousAlgorithm)
    if c.replay is not None and not asynchronous:
        raise ConfigError(
            f"replay={c.replay} is for asynchronous algorithms, but algorithm="
            f"{_name(c.algorithm)} is the same in every run; leave it out"
        )
    if c.cohort.extra and (asynchronous or not c.clock.virtual):
        raise ConfigError(
            f"cohort.extra={c.cohort.extra} is for rounds that end with the first arrivals "
            "of the virtual clock; leave it out, or use a synchronous algorithm"
        )


def _check_asynchronous(c: Config) -> None:
    """Reject settings that have no meaning when updates arrive one by one."""
    name, sends_updates = _name(c.algorithm), "update" in c.algorithm.lengths(1)
    if c.replay is None and not c.clock.virtual and c.topology.coordinator != "dedicated":
        raise ConfigError(
            f"topology.coordinator={c.topology.coordinator}, but algorithm={name} needs one "
            f"that takes arrivals while others train (clock={_name(c.clock)}); use --topology.coordinator "
            "dedicated and one rank more, or --clock Virtual"
        )
    if c.aggregation.robust or (c.aggregation.clip_norm and not sends_updates):
        raise ConfigError(
            f"aggregation={_name(c.aggregation)} with clip_norm={c.aggregation.clip_norm} needs "
            f"the updates of a round, but algorithm={name} absorbs them one by one; leave it out"
        )
    if c.attacks.changes_updates and not sends_updates:
        raise ConfigError(
            f"attacks={_name(c.attacks)} changes updates, but algorithm={name} sends models; "
            "use attacks=LabelFlip or algorithm=FedBuff"
        )
    if c.attacks.needs_cohort:
        raise ConfigError(
            "attacks.scale=None is one over a client's weight in the mean of a round, but algorithm="
            f"{name} absorbs updates one by one; set attacks.scale"
        )
    if c.cohort.sampling != "fixed":
        raise ConfigError(
            f"cohort.sampling={c.cohort.sampling} is for rounds, but algorithm={name} samples "
            "clients one by one; use cohort.sampling=fixed"
        )
    in_flight = getattr(c.clock, "in_flight", None)
    if in_flight is not None and in_flight > c.data.clients:
        raise ConfigError(
            f"clock.in_flight={in_flight} is larger than the population data.clients={c.data.clients}; "
            "lower clock.in_flight or raise data.clients"
        )


def _name(choice: Section) -> str:
    return type(choice).__name__
