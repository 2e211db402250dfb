"""`Federation`: one run, from its configuration to its result; the entry from Python."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Unpack

import torch
from torch import nn
from torch.utils.data import Dataset

from fedddp.algorithms import AsynchronousAlgorithm
from fedddp.config.loader import digest
from fedddp.config.schema import Config, ConfigFields
from fedddp.data.datasets import Images
from fedddp.distributed.launch import joined
from fedddp.evaluation import Metrics
from fedddp.section import ConfigError
from fedddp.storage.checkpoint import save_model
from fedddp.storage.history import read_rows
from fedddp.training.assembly import assemble, load_images
from fedddp.training.asynchronous.coordinator import run_asynchronous
from fedddp.training.objects import Objects, check_objects
from fedddp.training.run_directory import check_replay, run_directory, write_record
from fedddp.training.session import Session, Stopped
from fedddp.training.synchronous import run_rounds


@dataclass(frozen=True)
class Result:
    """The result of a run, the same on every rank but for the history (the coordinator's)."""

    model: nn.Module
    """The global model, in evaluation mode."""
    history: list[Metrics]
    """One row per round, as in `history.jsonl`, rounds before a resume included; empty on the other ranks."""
    folder: Path
    """The run directory."""
    finished: bool
    """False when the run was asked to stop; `resume="auto"` resumes it."""


class Federation:
    """One federated run, under any launcher or none (then it is a world of one rank, as in a notebook).

    Example:
        >>> result = Federation(module=net, train=images, test=test_images, rounds=5).run()
    """

    def __init__(
        self,
        config: Config | None = None,
        *,
        module: nn.Module | None = None,
        train: Dataset[Any] | None = None,
        test: Dataset[Any] | None = None,
        default_name: str = "run",
        **fields: Unpack[ConfigFields],
    ) -> None:
        """Describe the run; nothing is started.

        Args:
            config: the configuration; `Config()` by default.
            module: your own model instead of `config.model.name`; it is copied, not changed.
            train: your own map-style dataset of (image, label) instead of `config.data.dataset`.
            test: the examples of central evaluation; with `train`, none means no central evaluation.
            default_name: the run directory's name when `config.name` is none; numbered when it is taken.
            fields: fields of `Config` to change, e.g. `rounds=5, algorithm=algorithms.FedProx(mu=0.1)`.

        Raises:
            ConfigError: the configuration cannot run.
        """
        check_objects(module, train, test)
        given = fields.get("model")
        if isinstance(given, nn.Module):
            raise ConfigError(
                f"model must be a ModelConfig, got {type(given).__name__}; pass a module as module="
            )
        self.config: Config = dataclasses.replace(config or Config(), **fields)
        self.objects = Objects(module, train, test)
        self.default_name = default_name

    def run(self) -> Result:
        """Collective. Train, and return the global model and the history.

        Raises:
            ConfigError: the configuration cannot run.
            AnotherRankFailedError: the error is another rank's, which reports it.
            Interrupted: Ctrl-C stopped the run, after it wrote a checkpoint.
        """
        with joined(self.config.topology) as world:
            with _rejecting():
                train, test = load_images(self.objects, self.config, world)
                record = self.objects.record(self.config, train, test)
                check_replay(self.config, record)
            with run_directory(self.config, self.default_name, world, record) as (directory, config):
                with _rejecting():
                    s = assemble(config, world, directory, self.objects.module, train, test)
                loop = run_asynchronous if isinstance(config.algorithm, AsynchronousAlgorithm) else run_rounds
                finished = True
                with _failing_tracker(s):
                    if world.is_coordinator:
                        write_record(directory, record)
                    try:
                        with _garbage_frozen():
                            s.start_clock()
                            loop(s)
                    except Stopped:
                        finished = False
                    result = _result(s, train, finished=finished)
                    interrupted = not finished and any(world.gather(world.interrupted))
        if interrupted:
            raise Interrupted(result)
        return result


@contextlib.contextmanager
def _garbage_frozen() -> Iterator[None]:
    """Keep the garbage collector from walking, again and again, over all that set-up has made."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


class Interrupted(KeyboardInterrupt):
    """Ctrl-C stopped a run at a checkpoint: it ends a loop over several runs, as it ends any program."""

    def __init__(self, result: Result) -> None:
        """Take the `result` of the run, which is not finished."""
        super().__init__(f"stopped by Ctrl-C; resume {result.folder} with resume='auto'")
        self.result = result


def _result(s: Session, train: Images, *, finished: bool) -> Result:
    """Collective. Write the final model, end the tracker, and return the result on every rank."""
    s.send()
    s.load_global_model()
    history = read_rows(s.directory / "history.jsonl") if s.world.is_coordinator else []
    model_file = s.directory / "model.safetensors" if finished else None
    if s.world.is_coordinator and model_file:
        save_model(s.flat.module, model_file, _model_metadata(s, train))
    s.world.barrier()
    last = {n: v for n, v in (history[-1] if history else {}).items() if n != "cohort"}
    s.tracker.finish(model_file, last)
    return Result(s.flat.module.eval(), history, s.directory, finished)


def _model_metadata(s: Session, train: Images) -> dict[str, str]:
    """Return what a user of the final model must know, for the header of its file."""
    preprocessing = {
        "size": train.shape[1:],
        "channels": train.shape[0],
        "mean": train.mean,
        "std": train.std,
    }
    return {
        "preprocessing": json.dumps(preprocessing),
        "classes": json.dumps(train.class_names or list(map(str, range(train.classes)))),
        "task": type(s.config.task).__name__,
        "config_digest": digest(s.config),
        "fedddp": version("fedddp"),
        "torch": torch.__version__,
    }


def summarize(results: Sequence[Result], metric: str = "eval/accuracy") -> dict[str, float]:
    """Return mean, standard deviation, minimum and maximum of a metric at the end of several runs.

    Args:
        results: of runs such as those of a sweep over seeds.
        metric: a key of the history; the last round that has it counts.

    Returns:
        "runs", "mean", "std" (of a sample; 0 for one run), "min" and "max".

    Raises:
        ValueError: a run never recorded the metric.
    """
    values = []
    for result in results:
        recorded = [row[metric] for row in result.history if row.get(metric) is not None]
        if not recorded:
            raise ValueError(f"{result.folder} has no {metric} in its history; its rows have other metrics")
        values.append(float(recorded[-1]))
    if not values:
        raise ValueError("results is empty; give one result or more")
    spread = stdev(values) if len(values) > 1 else 0.0
    return {"runs": len(values), "mean": fmean(values), "std": spread, "min": min(values), "max": max(values)}


# ---- what surrounds a run ----


@contextlib.contextmanager
def _failing_tracker(s: Session) -> Iterator[None]:
    """End the tracker as failed when the block raises; that may take long, so the error is counted first."""
    try:
        yield
    except BaseException:
        s.world.report_failure()
        s.tracker.finish(failed=True)
        raise


@contextlib.contextmanager
def _rejecting() -> Iterator[None]:
    """Make a ValueError of the block, in which nothing is trained yet, a rejected configuration."""
    try:
        yield
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from error
