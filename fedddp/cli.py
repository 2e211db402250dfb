"""The commands: parse, call, and print a user's error in one line without a traceback."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import itertools
import logging
import os
import shlex
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from fedddp.distributed.environment import Launch, wait_for_first_error
from fedddp.distributed.signals import stop_signals_held

if TYPE_CHECKING:
    from rich.table import Table

    from fedddp.config.schema import Config

STOPPED = 75
"""Exit code of a run that was asked to stop and can be resumed (EX_TEMPFAIL)."""

PRINT = "--print_config"
"""Prints all settings of the configuration as YAML, and trains nothing."""

USAGE = """\
fedddp: federated learning on DDP groups, in one torchrun.

  fedddp run RECIPE|FILE [--section.key value ...]    train; under torchrun on many ranks
  fedddp compare RECIPE|FILE|RUN ... [...]            train what is not trained yet; one table, one picture
  fedddp plan RECIPE|FILE [--ranks N] [...]           dry run: groups, bytes, memory
  fedddp partition RECIPE|FILE [...]                  how the data are split over the clients
  fedddp recipes                                      the configurations that ship with fedddp
  fedddp runs [OUTPUT]                                the runs in a folder (default: runs)

  fedddp run --help lists every setting, fedddp run RECIPE|FILE --print_config all their values. Examples:
    fedddp run digits
    torchrun --standalone --nproc-per-node 4 -m fedddp run digits --topology.ranks_per_client 2
"""


def main(arguments: list[str] | None = None) -> None:
    """Run the command line `arguments` (by default the process's) and exit."""
    arguments = sys.argv[1:] if arguments is None else arguments
    for stream in (sys.stdout, sys.stderr):  # a terminal without Unicode shows "?" for a Greek letter
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    commands = {
        "run": _run,
        "compare": _compare,
        "plan": _plan,
        "partition": _partition,
        "recipes": _recipes,
        "runs": _runs,
    }
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        _say(USAGE, end="")
        sys.exit(0 if arguments else 2)
    if arguments[0] == "--version":
        from fedddp import __version__

        _say(__version__)
        sys.exit(0)
    command, *rest = arguments
    if command not in commands:
        _fail(f"unknown command '{command}'; choose one of {', '.join(commands)} (see fedddp --help)")
    if command in ("recipes", "runs") and rest in (["-h"], ["--help"]):
        _say(USAGE, end="")
        sys.exit(0)
    sys.path.insert(0, os.getcwd())  # so that the dotted path of a class beside the user is found
    try:
        with _logging(), stop_signals_held() if command in ("run", "compare") else contextlib.nullcontext():
            commands[command](rest)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(0)


# ---- what is printed, by which rank, and exit codes ----


class _PrintHandler(logging.Handler):
    """Prints log records on standard output, as it is at that moment: a progress bar redirects it."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print `record`, with its level if it is a warning or worse."""
        level = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        _say(f"{level}{record.getMessage()}")


def _say(text: str, end: str = "\n") -> None:
    """Print on standard output; a reader that has left is no reason to fail."""
    try:
        print(text, end=end, flush=True)
    except OSError:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - until the process ends


@contextlib.contextmanager
def _logging() -> Iterator[None]:
    """Print fedddp's log records in the block."""
    logger, handler = logging.getLogger("fedddp"), _PrintHandler()
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def _is_coordinator() -> bool:
    return Launch.from_environment().is_coordinator


def _fail(message: str, code: int = 2) -> NoReturn:
    """Print one error line, on one rank, and exit; every rank finds the same error."""
    if not _is_coordinator():
        wait_for_first_error()
    else:
        print(f"error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    sys.exit(code)


@contextlib.contextmanager
def _reporting() -> Iterator[None]:
    """Train in the block; exit with one line if that fails."""
    from fedddp.distributed.launch import AnotherRankFailedError

    try:
        yield
    except AnotherRankFailedError:
        wait_for_first_error()
        sys.exit(1)
    except Exception as error:
        _report(error)


def _report(error: Exception) -> NoReturn:
    """Print the error that ended the run, and exit; on the first rank that had one."""
    from fedddp.section import ConfigError

    user_error = isinstance(error, (ValueError, OSError))
    if not user_error:
        traceback.print_exception(error.with_traceback(error.__traceback__ and error.__traceback__.tb_next))
    rank = Launch.from_environment().rank
    where = f"rank {rank}: " if rank and not user_error else ""
    notes = "; ".join(getattr(error, "__notes__", []))
    text = " ".join(f"{where}{error}".split()) or type(error).__name__
    print(f"error: {text}{'; ' + notes if notes else ''}", file=sys.stderr, flush=True)
    sys.exit(2 if isinstance(error, ConfigError) else 1)


def _stop(command: str) -> NoReturn:
    """Print the command that resumes a stopped run, and exit."""
    if _is_coordinator():
        _say(f"Stopped. Resume with the same launcher and: fedddp {command}")
    marker = os.environ.get("FEDDDP_STOPPED_FILE")
    if marker:  # torchrun turns any other exit code than 0 into 1, so a batch script looks for a file
        try:
            Path(marker).touch()
        except OSError as error:
            print(f"error: FEDDDP_STOPPED_FILE={marker}: {error.strerror}", file=sys.stderr, flush=True)
            sys.exit(STOPPED)
        sys.exit(0)
    sys.exit(STOPPED)


def _show(table: Table) -> None:
    """Print `table`, on one rank."""
    from fedddp.tracking.progress import QuietConsole

    if _is_coordinator():
        QuietConsole().print(table)


# ---- commands ----


def _load(rest: list[str], ranks: int = 0) -> tuple[Config, str]:
    """Return the configuration of a command line, and the default name of its run.

    With `ranks` it is for another world than this one, whose devices are not looked at.
    """
    from fedddp.config.loader import load_config, to_yaml
    from fedddp.distributed.launch import choose_device

    if "-h" in rest or "--help" in rest:
        from fedddp.config.reference import help_text

        if _is_coordinator():
            _say(help_text(), end="")
        sys.exit(0)
    target = rest[0] if rest and not rest[0].startswith("-") else None
    if target is None:
        _fail("give a recipe or a .yaml file, e.g. `fedddp run digits`; `fedddp recipes` lists them")
    try:
        printed = PRINT in rest
        config = load_config(target, [word for word in rest[1:] if word != PRINT])
        if not ranks:
            choose_device(config.topology, Launch.from_environment())
    except ValueError as error:
        _fail(str(error))
    if printed:
        if _is_coordinator():
            _say(to_yaml(config), end="")
        sys.exit(0)
    return config, Path(target).stem


def _run(rest: list[str]) -> None:
    config, name = _load(rest)
    from fedddp.federation import Federation, Interrupted

    with _reporting():
        try:
            result = Federation(config, default_name=name).run()
        except Interrupted as interruption:
            result = interruption.result
    if not result.finished:
        _stop(f"run {shlex.join(_with_flags(rest, name=result.folder.name, resume='auto'))}")
    if _is_coordinator():
        _say(f"run directory: {result.folder}")


def _with_flags(rest: list[str], **flags: str) -> list[str]:
    """Return the arguments `rest` with these flags, which replace those of the same name."""
    kept, words = [], iter(rest)
    for word in words:
        if word.startswith("--") and word[2:].partition("=")[0] in flags:
            if "=" not in word:
                next(words, None)
            continue
        kept.append(word)
    for name, value in flags.items():
        kept += [f"--{name}={value}"] if value.startswith("-") else [f"--{name}", value]
    return kept


def _compare(rest: list[str]) -> None:
    from fedddp.distributed.launch import choose_device
    from fedddp.federation import Interrupted
    from fedddp.reporting import compare
    from fedddp.tracking.progress import QuietConsole

    options = argparse.ArgumentParser(
        prog="fedddp compare",
        usage="fedddp compare RECIPE|FILE|RUN ... [--output FOLDER] [--accuracy A] [--section.key value ...]",
        description="Train what is not trained yet; compare all runs in a table, a picture, a page.",
        epilog="A folder stands for all runs in it. Settings are for all runs trained: fedddp run --help.",
        allow_abbrev=False,
        exit_on_error=False,
    )
    options.add_argument("--output", metavar="FOLDER", help="folder of the runs and the report")
    options.add_argument(
        "--accuracy", metavar="A", type=float, help="test accuracy to race for, in (0, 1]; 0.95 of the best"
    )
    if "-h" in rest or "--help" in rest:
        if _is_coordinator():
            _say(options.format_help(), end="")
        return
    targets = list(itertools.takewhile(lambda word: not word.startswith("-"), rest))
    if not targets:
        _fail("give recipes, .yaml files or run directories, e.g. `fedddp compare compare-paradigms`")
    try:
        own, flags = options.parse_known_args(rest[len(targets) :])
        comparison = compare.prepare(targets, flags, own.output, own.accuracy)
        for config in comparison.configs.values():
            choose_device(config.topology, Launch.from_environment())
    except (ValueError, argparse.ArgumentError) as error:
        _fail(str(error))
    with _reporting():
        try:
            finished = compare.train(comparison)
        except Interrupted:
            finished = False
        if finished and _is_coordinator():
            for path in compare.report(comparison, QuietConsole()):
                _say(str(path))
    if not finished:
        _stop(f"compare {shlex.join(rest)}")


def _partition(rest: list[str]) -> None:
    config, _ = _load(rest)
    from fedddp.data.datasets import load
    from fedddp.reporting.partition_table import describe, table

    try:
        train, _ = load(config.data)
        split, _ = config.data.split(train, config.seed)
    except (ValueError, OSError) as error:
        _fail(str(error))
    _show(table(describe(split, train.labels, train.classes)))


def _plan(rest: list[str]) -> None:
    rest, ranks = _ranks(rest)
    config, name = _load(rest, ranks)
    from fedddp.reporting.dry_run import dry_run

    try:
        table = dry_run(
            dataclasses.replace(config, name=config.name or name),
            ranks or Launch.from_environment().world_size,
        )
    except (ValueError, OSError) as error:
        _fail(str(error))
    _show(table)


def _ranks(rest: list[str]) -> tuple[list[str], int]:
    """Return the arguments without `--ranks N`, and N, or 0 where it is not given."""
    options = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    options.add_argument("--ranks", type=int)
    try:
        own, others = options.parse_known_args(rest)
    except argparse.ArgumentError as error:
        _fail(f"--ranks: {error.message}")
    if own.ranks is not None and own.ranks < 1:
        _fail(f"--ranks must be >= 1, got {own.ranks}; it is how many ranks the launcher will start")
    return others, own.ranks or 0


def _recipes(_: list[str]) -> None:
    from rich.table import Table

    from fedddp.recipes import recipes

    table = Table("recipe", "what it trains", box=None, header_style="bold")
    # Each dataset first with FedAvg, then with other algorithms.
    for name, description in sorted(
        recipes().items(), key=lambda item: (item[0].startswith("digits-"), item[0])
    ):
        table.add_row(name, description)
    _show(table)


def _runs(rest: list[str]) -> None:
    from rich.table import Table

    from fedddp.section import local_path
    from fedddp.storage.history import read_rows

    try:
        output = local_path(rest[0] if rest else "runs", "output")
    except ValueError as error:
        _fail(str(error))
    if not output.is_dir():
        _fail(f"{output} is not a folder; give the --output of your runs")
    table = Table("run", "rounds", "loss", "accuracy", "state", box=None, header_style="bold")
    for folder in sorted(path.parent for path in output.glob("*/history.jsonl")):
        try:
            rows = read_rows(folder / "history.jsonl")
        except (ValueError, OSError) as error:
            table.add_row(folder.name, "-", "-", "-", f"corrupt: {error}")
            continue
        last: dict[str, float] = {}
        for row in rows:
            last |= {key: value for key, value in row.items() if value is not None}
        scores = [last.get("train/loss"), last.get("eval/accuracy")]
        cells = [f"{score:.4f}" if isinstance(score, int | float) else "-" for score in scores]
        state = "finished" if (folder / "model.safetensors").exists() else "unfinished"
        table.add_row(folder.name, str(len(rows)), *cells, state)
    _show(table)
