"""A run's configuration: the components' own dataclasses put together, and what of them goes together."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from fedddp import algorithms
from fedddp.aggregation import Mean
from fedddp.aggregation.robust import Robust
from fedddp.algorithms.algorithm import Method
from fedddp.algorithms.local import Local
from fedddp.data.datasets import Data
from fedddp.distributed.topology import Topology
from fedddp.evaluation import Evaluation
from fedddp.models.registry import Model
from fedddp.simulation.attacks import Attack, LabelFlip, ModelReplacement, NoAttack
from fedddp.simulation.clock import Clock, Virtual, Wall
from fedddp.simulation.cohort import Cohort
from fedddp.storage.checkpoint import Checkpoint
from fedddp.tasks.classification import Classification
from fedddp.tasks.task import Task
from fedddp.tracking.tracker import Track


class ConfigError(ValueError):
    """A configuration that cannot run: one line with the key, the value, the rule and the way out."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """The configuration of a run."""

    data: Data = field(default_factory=Data)
    """Images and their split over clients."""

    model: Model = field(default_factory=Model)
    """The network."""

    task: Task = field(default_factory=Classification)
    """Loss and metrics."""

    local: Local = field(default_factory=Local)
    """Local training of a client."""

    cohort: Cohort = field(default_factory=Cohort)
    """Clients of a round."""

    algorithm: Method = field(default_factory=algorithms.FedAvg)
    """The federated method."""

    aggregation: Mean = field(default_factory=Mean)
    """How contributions become one."""

    attacks: Attack = field(default_factory=NoAttack)
    """What malicious clients do."""

    clock: Clock = field(default_factory=Virtual)
    """How long clients take: stragglers, and who arrives when in asynchronous training."""

    topology: Topology = field(default_factory=Topology)
    """Ranks, groups, coordinator."""

    evaluation: Evaluation = field(default_factory=Evaluation)
    """When and on what the model is measured."""

    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    """When the run is saved."""

    track: Track = field(default_factory=Track)
    """Where progress is shown."""

    rounds: int = 10
    """Rounds to train, >= 1."""

    seed: int = 0
    """Seed of everything random, >= 0."""

    output: str = "runs"
    """Folder that holds run directories."""

    name: str | None = None
    """Name of the run directory in `output`; by default the recipe's, numbered when it is taken."""

    replay: str | None = None
    """Directory of an asynchronous run whose order of arrivals is repeated, bit for bit."""

    resume: Literal["never", "auto"] = "never"
    """`auto`: go on from the newest checkpoint of the run directory, if there is one."""

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ConfigError(f"rounds must be >= 1, got {self.rounds}")
        if self.seed < 0:
            raise ConfigError(f"seed must be >= 0, got {self.seed}")
        if self.name is not None and not re.fullmatch(r"[\w.+=-]+", self.name):
            raise ConfigError(
                f"name must be letters, digits and . _ + = -, got {self.name!r}; "
                "choose the folder around it with output"
            )
        if self.cohort.size + self.cohort.extra > self.data.clients and self.cohort.size <= self.data.clients:
            raise ConfigError(
                f"cohort.extra={self.cohort.extra} and cohort.size={self.cohort.size} are more clients than "
                f"the population data.clients={self.data.clients}; lower one of them or raise data.clients"
            )
        if self.cohort.size > self.data.clients:
            raise ConfigError(
                f"cohort.size={self.cohort.size} is larger than the population "
                f"data.clients={self.data.clients}; lower cohort.size or raise data.clients"
            )
        if self.evaluation.clients and not self.data.holdout:
            raise ConfigError(
                f"evaluation.clients={self.evaluation.clients} needs held-out local data, but "
                "data.holdout=0; set data.holdout, e.g. 0.1"
            )
        self._check_aggregation()
        self._check_local()
        self._check_clock()
        if self.algorithm.asynchronous:
            self._check_asynchronous()

    def _check_local(self) -> None:
        method = self.algorithm
        for name, wanted in method.needs(self.local).items():
            value = getattr(self.local, name)
            if value != wanted:
                way_out = "leave it out" if wanted is None else f"set local.{name}={wanted}"
                raise ConfigError(
                    f"algorithm={type(method).__name__} {method.because}, but local.{name}={value}; {way_out}"
                )

    def _check_aggregation(self) -> None:
        rule, least, cohort = type(self.aggregation).__name__, self.aggregation.least(), self.cohort
        if self.algorithm.mean_only and isinstance(self.aggregation, Robust):
            raise ConfigError(
                f"aggregation={rule} cannot be combined with {type(self.algorithm).__name__}, whose updates "
                "mean something only as a plain mean; use Mean, or FedAvg"
            )
        if least > cohort.size or (least > 1 and cohort.sampling == "poisson"):
            raise ConfigError(
                f"aggregation={rule} needs at least {least} clients in every round, but "
                f"cohort.size={cohort.size} with sampling={cohort.sampling}; raise cohort.size, use "
                "sampling=fixed, or lower aggregation.attackers"
            )
        for name, unlike in (("clip_norm", None), ("on_invalid_update", "clip")):
            value = getattr(self.aggregation, name)
            if self.algorithm.mean_only and (value == unlike if unlike else value is not None):
                raise ConfigError(
                    f"aggregation.{name}={value} cannot be combined with {type(self.algorithm).__name__}, "
                    "whose updates add up only uncut; leave it out"
                )

    def _check_clock(self) -> None:
        """Who is waited for needs a clock that says when they come."""
        if self.replay is not None and not self.algorithm.asynchronous:
            raise ConfigError(
                f"replay={self.replay} is for asynchronous methods, but algorithm="
                f"{type(self.algorithm).__name__} is the same in every run; leave it out"
            )
        if self.cohort.extra and (self.algorithm.asynchronous or not isinstance(self.clock, Virtual)):
            raise ConfigError(
                f"cohort.extra={self.cohort.extra} is for rounds that end with the first arrivals "
                "of the virtual clock; leave it out, or use a synchronous method"
            )

    def _check_asynchronous(self) -> None:
        """Refuse what has no meaning when contributions come one by one."""
        name, rule = type(self.algorithm).__name__, self.aggregation
        if self.replay is None and isinstance(self.clock, Wall) and self.topology.coordinator != "dedicated":
            raise ConfigError(
                f"topology.coordinator={self.topology.coordinator}, but algorithm={name} needs one "
                "that takes arrivals while others train (clock=Wall); use --topology.coordinator "
                "dedicated and one rank more, or --clock Virtual"
            )
        if type(rule) is not Mean or (rule.clip_norm and "update" not in self.algorithm.lengths(1)):
            raise ConfigError(
                f"aggregation={type(rule).__name__} with clip_norm={getattr(rule, 'clip_norm', None)} needs "
                f"updates, but algorithm={name} absorbs one by one what arrives; leave it out"
            )
        if "update" not in self.algorithm.lengths(1) and type(self.attacks) not in (NoAttack, LabelFlip):
            raise ConfigError(
                f"attacks={type(self.attacks).__name__} changes updates, but algorithm={name} sends models; "
                "use attacks=LabelFlip or algorithm=FedBuff"
            )
        if isinstance(self.attacks, ModelReplacement) and self.attacks.scale is None:
            raise ConfigError(
                "attacks.scale=None is one over a client's weight in the mean of a round, but algorithm="
                f"{name} absorbs one by one what arrives; set attacks.scale"
            )
        if self.cohort.sampling != "fixed":
            raise ConfigError(
                f"cohort.sampling={self.cohort.sampling} is for rounds, but algorithm={name} samples "
                "clients one by one; use cohort.sampling=fixed"
            )
        wanted = self.clock.in_flight if isinstance(self.clock, Virtual) else None
        if wanted is not None and wanted > self.data.clients:
            raise ConfigError(
                f"clock.in_flight={wanted} is larger than the population data.clients={self.data.clients}; "
                "lower clock.in_flight or raise data.clients"
            )
