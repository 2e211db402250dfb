"""`Federation`: one run, from its configuration to its result; the entry from Python."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import gc
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Unpack

from torch import nn
from torch.utils.data import Dataset

from fedddp.algorithms import AsynchronousAlgorithm
from fedddp.callbacks import Callback, callbacks_of
from fedddp.config.schema import Config, ConfigFields
from fedddp.data.datasets import Images
from fedddp.data.description import describe
from fedddp.data.loader import ClientLoader
from fedddp.data.stream import naming_ended_workers
from fedddp.distributed.launch import joined
from fedddp.evaluation import Metrics
from fedddp.examination import examine
from fedddp.section import ConfigError
from fedddp.storage import run_record
from fedddp.storage.checkpoint import save_model, save_tensors, write_text
from fedddp.storage.history import GONE, HISTORY, plain, read_rows
from fedddp.tracking.summary import run_score
from fedddp.training.assembly import EXAMINED, assemble, load_images, set_model_aside
from fedddp.training.asynchronous.coordinator import run_asynchronous
from fedddp.training.objects import Objects, made
from fedddp.training.profiling import profiled
from fedddp.training.protect import check_library
from fedddp.training.run_directory import check_before_data, check_replay, run_directory, write_record
from fedddp.training.session import Session, Stopped
from fedddp.training.synchronous import run_rounds

logger = logging.getLogger(__name__)

SHARES = 100
"""Clients of which `split.json` holds what they hold: the first and the last."""


@dataclass(frozen=True, repr=False)
class Result:
    """The result of a run, the same on every rank but for the history (the coordinator's)."""

    model: nn.Module
    """The server's model, in evaluation mode. Without a global model (FedBN, FedPer, `baseline=local`) what
    stays at the clients has its initial values in it: `load_model(folder, client=...)` is a client's own."""
    history: list[Metrics]
    """One row per round, as in `history.jsonl`, rounds before a resume included; empty on the other ranks."""
    folder: Path
    """The run directory."""
    finished: bool
    """False when the run was asked to stop; `resume="auto"` resumes it."""

    def __repr__(self) -> str:
        """Return one line: folder, rounds, score."""
        return f"Result({', '.join(f'{label} {text}' for label, text in self._described())})"

    def _repr_html_(self) -> str:
        """Return a small table, for notebooks."""
        rows = (f"<tr><th>{label}</th><td>{escape(text)}</td></tr>" for label, text in self._described())
        return f"<table>{''.join(rows)}</table>"

    def _described(self) -> list[tuple[str, str]]:
        rounds = f"{self.history[-1]['round'] if self.history else 0}"
        parts = [("folder", str(self.folder)), ("rounds", rounds)]
        score = run_score(self.history, self.folder)
        if score is not None:
            parts.append((score.name, score.text))
        return [*parts, ("state", "finished" if self.finished else "stopped")]


class Federation:
    """One federated run, under any launcher or none (then it is a world of one rank, as in a notebook).

    Example:
        >>> result = Federation(module=net, train=images, test=test_images, rounds=5).run()
    """

    def __init__(
        self,
        config: Config | None = None,
        *,
        module: nn.Module | Callable[[], nn.Module] | None = None,
        train: Dataset[Any] | None = None,
        test: Dataset[Any] | None = None,
        callbacks: Sequence[Callback | str] = (),
        default_name: str = "run",
        **fields: Unpack[ConfigFields],
    ) -> None:
        """Describe the run; nothing is started.

        Args:
            config: the configuration; `Config()` by default.
            module: your own model instead of `config.model.name`; it is copied, not changed. A function that
                makes it, such as its class, draws the initial weights by `seed`.
            train: your own map-style dataset of (image, label) instead of `config.data.dataset`.
            test: the examples of central evaluation; with `train`, none means no central evaluation.
            callbacks: called while the run lasts, after those of `config.callbacks`.
            default_name: the run directory's name when `config.name` is none; numbered when it is taken.
            fields: fields of `Config` to change, e.g. `rounds=5, algorithm=algorithms.FedProx(mu=0.1)`.

        Raises:
            ConfigError: the configuration cannot run.
        """
        given = fields.get("model")
        if isinstance(given, nn.Module):
            raise ConfigError(
                f"model must be a ModelConfig, got {type(given).__name__}; pass a module as module="
            )
        self.config: Config = dataclasses.replace(config or Config(), **fields)
        self.objects = Objects(made(module, self.config.seed), train, test)
        self.callbacks = callbacks_of([*self.config.callbacks, *callbacks], self.config.callback_errors)
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
                check_library(self.config)
                self._check_before_data()
                train, test = load_images(self.objects, self.config, world)
                record = self.objects.record(self.config, train, test)
                check_replay(self.config, record)
            with (
                run_directory(self.config, self.default_name, world, record) as (directory, config),
                run_record.log_file(directory) as write_log,
            ):
                logger.debug("%s", world, extra={"directory": directory})
                with _rejecting():
                    s = assemble(config, world, directory, self.objects.module, train, test, record)
                loop = run_asynchronous if isinstance(config.algorithm, AsynchronousAlgorithm) else run_rounds
                finished = True
                with _recording_failure(s):
                    if world.is_coordinator:
                        write_record(directory, record)
                        if not (s.complete and run_record.state_of(directory) == "finished"):
                            write_log()
                            _begin(s, train)
                        s.callbacks = self.callbacks("on_run_start", config, directory)
                    try:
                        with _garbage_frozen(), profiled(s), naming_ended_workers():
                            s.start_clock()
                            loop(s)
                    except Stopped:
                        finished = False
                    result = _result(s, finished=finished)
                    interrupted = not finished and any(world.gather(world.interrupted))
        if interrupted:
            raise Interrupted(result)
        return result

    def _check_before_data(self) -> None:
        """Refuse what needs no data, which may take minutes to read.

        Raises:
            ConfigError: the directory holds another run, or that to resume or replay has other settings.
        """
        own_data = self.objects.train is not None or self.objects.test is not None
        record = None if own_data else self.objects.record(self.config, None, None)
        check_before_data(self.config, self.default_name, record)
        if record is not None:
            check_replay(self.config, record)


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


def _begin(s: Session, train: Images) -> None:
    """Record this launch, and what the clients hold, in the run directory; on the coordinator."""
    world = s.world
    launch = run_record.launch_record(
        world.device,
        ranks=world.size,
        groups=world.groups,
        ranks_per_client=world.ranks_per_client,
        from_round=s.rounds_done,
    )
    run_record.begin(s.directory, launch)
    set_model_aside(s)
    if s.protection.strict:  # no numbers of single clients
        return
    about: dict[str, Any] = {"limit": SHARES, "names": s.clients.names, "target": train.target}
    split = dataclasses.asdict(describe(s.clients.split, train.labels, train.classes, **about))
    names = train.class_names or list(map(str, range(train.classes)))
    about_tests = {"client_names": s.clients.names, "own_tests": s.clients.tests is not None}
    write_text(s.directory / run_record.SPLIT, json.dumps({**split, "class_names": names, **about_tests}))


def _result(s: Session, *, finished: bool) -> Result:
    """Collective. Write the final model, end the tracker, and return the result on every rank."""
    s.checkpoints.finish()
    s.send()
    s.load_global_model()
    history = read_rows(s.directory / HISTORY) if s.world.is_coordinator else []
    model_file = s.directory / run_record.MODEL if finished else None
    if s.world.is_coordinator and model_file:
        save_model(s.flat.module, model_file, s.model_metadata())
    if finished and s.central is not None:
        _examine(s, s.central)
    s.world.barrier()
    last = {n: v for n, v in (history[-1] if history else {}).items() if n != "cohort"}
    result = Result(s.flat.module.eval(), history, s.directory, finished)
    if s.world.is_coordinator:
        s.protection.write(s.directory, s.rounds_done)
        s.callbacks("on_run_end", result)
        run_record.end(s.directory, "finished" if finished else "stopped")
        _report(s)
    s.tracker.finish(model_file, last)
    return result


def _report(s: Session) -> None:
    """Write the report page, if `tracking.report` asks for it; the run is complete without it."""
    if s.config.tracking.report:
        from fedddp.reporting.report import write_report

        try:
            write_report([s.directory])
        except Exception as error:  # drawing may fail in many ways
            logger.warning("report: %s; the run has no report page", error)


def _examine(s: Session, test: ClientLoader) -> None:
    """Collective. Write what the final model does on the test set: evaluation.json, wrong.safetensors."""
    found = examine(s.world, s.flat.module, s.config.task, test, s.config.evaluation.batch_size)
    if s.world.is_coordinator:
        confusion = None if found.confusion is None else found.confusion.tolist()
        content = {
            "round": s.rounds_done,
            "target": found.target,
            "examples": len(test.images),
            "metrics": plain(found.metrics),
            "constant": plain(found.constant),
            "confusion": confusion,
            "wrong": plain(found.worst),
        }
        evaluation, wrong = (s.directory / name for name in EXAMINED)
        try:
            save_tensors(found.tensors, wrong)
            write_text(evaluation, json.dumps(content))
        except OSError as error:  # the run is complete without them
            logger.warning("%s: %s; the run has no %s", evaluation, error.strerror, evaluation.name)


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
def _recording_failure(s: Session) -> Iterator[None]:
    """Record that the run failed when the block raises; trackers may take long, so ranks are warned first."""
    try:
        yield
    except BaseException as error:
        first = s.world.report_failure(_one_line(error))
        if s.world.is_coordinator:
            unwritten = s.checkpoints.wait()
            if unwritten is not None:
                error.add_note(unwritten)
            # Another rank's error ends this one by one of a connection, which would hide it.
            other = "" if first else s.world.first_error()
            run_record.end(s.directory, "failed", other or _one_line(error))
        s.tracker.finish(failed=True)
        if isinstance(error, OSError) and not s.directory.is_dir():  # whichever file was missed first
            raise FileNotFoundError(errno.ENOENT, GONE, str(s.directory)) from error
        raise


def _one_line(error: BaseException) -> str:
    """Return an error with its notes as one line."""
    lines = [f"{error}" or type(error).__name__, *getattr(error, "__notes__", [])]
    return " ".join("; ".join(lines).split())


@contextlib.contextmanager
def _rejecting() -> Iterator[None]:
    """Make a ValueError of the block, in which nothing is trained yet, a rejected configuration."""
    try:
        yield
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from error
