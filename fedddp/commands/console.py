"""What commands print, on which rank, and their exit codes."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from fedddp.distributed.environment import Launch, wait_for_first_error

if TYPE_CHECKING:
    from rich.table import Table

    from fedddp.config.schema import Config

STOPPED = 75
"""Exit code of a run that was asked to stop and can be resumed (EX_TEMPFAIL)."""

PRINT = "--print_config"
"""Prints all settings of the configuration as YAML, and trains nothing."""


class PrintHandler(logging.Handler):
    """Prints log records on standard output, as it is at that moment: a progress bar redirects it."""

    prefix = ""
    """Stands before every line; where it is set, every rank prints all its records."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print `record`, with its level if it is a warning or worse."""
        stage = getattr(record, "stage", False)
        if stage and not self.prefix and not (on_terminal() and is_coordinator()):
            return
        level = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        say(f"{self.prefix}{level}{record.getMessage()}{' ...' if stage else ''}")


def say(text: str, end: str = "\n") -> None:
    """Print on standard output; a reader that has left is no reason to fail."""
    try:
        print(text, end=end, flush=True)
    except OSError:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - until the process ends


def on_terminal() -> bool:
    """Return whether standard output is a terminal."""
    return sys.stdout.isatty()


@contextlib.contextmanager
def logging_to_console() -> Iterator[None]:
    """Print fedddp's log records in the block."""
    logger, handler = logging.getLogger("fedddp"), PrintHandler()
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def is_coordinator() -> bool:
    """Return whether this process is rank 0, which prints."""
    return Launch.from_environment().is_coordinator


def fail(message: str, code: int = 2) -> NoReturn:
    """Print one error line, on one rank, and exit; every rank finds the same error."""
    if not is_coordinator():
        wait_for_first_error()
    else:
        print(f"error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    sys.exit(code)


@contextlib.contextmanager
def reporting() -> Iterator[None]:
    """Train in the block; exit with one line if that fails."""
    from fedddp.distributed.launch import AnotherRankFailedError

    try:
        yield
    except AnotherRankFailedError:
        wait_for_first_error()
        sys.exit(1)
    except Exception as error:
        report_error(error)


def report_error(error: Exception) -> NoReturn:
    """Print the error that ended the run, and exit; on the first rank that had one."""
    from fedddp.section import ConfigError

    user_error = isinstance(error, (ValueError, OSError))
    if not user_error:
        traceback.print_exception(error.with_traceback(error.__traceback__ and error.__traceback__.tb_next))
    rank = Launch.from_environment().rank
    where = f"rank {rank}: " if rank and not user_error else ""
    notes = "; ".join(getattr(error, "__notes__", []))
    kind = "" if user_error else f"{type(error).__name__}: "
    text = " ".join(f"{where}{kind}{error}".split()).removesuffix(":") or type(error).__name__
    print(f"error: {text}{'; ' + notes if notes else ''}", file=sys.stderr, flush=True)
    sys.exit(2 if isinstance(error, ConfigError) else 1)


def stop(command: str) -> NoReturn:
    """Print the command that resumes a stopped run, and exit."""
    if is_coordinator():
        say(f"Stopped. Resume with the same launcher and: fedddp {command}")
    marker = os.environ.get("FEDDDP_STOPPED_FILE")
    if marker:  # torchrun turns any other exit code than 0 into 1, so a batch script looks for a file
        try:
            Path(marker).touch()
        except OSError as error:
            print(f"error: FEDDDP_STOPPED_FILE={marker}: {error.strerror}", file=sys.stderr, flush=True)
            sys.exit(STOPPED)
        sys.exit(0)
    sys.exit(STOPPED)


def show(table: Table) -> None:
    """Print `table`, on one rank."""
    from fedddp.tracking.progress import QuietConsole

    if is_coordinator():
        QuietConsole().print(table)


def help_is_asked(options: argparse.ArgumentParser, rest: list[str]) -> bool:
    """Return whether the words `rest` ask for the help of `options`, which is then printed."""
    asked = bool({"-h", "--help"} & {*rest})
    if asked and is_coordinator():
        say(options.format_help(), end="")
    return asked


def parse(
    options: argparse.ArgumentParser, rest: list[str], needed: Mapping[str, str] | None = None
) -> argparse.Namespace | None:
    """Return the `options` of a command that takes no others; None after printing its help.

    Args:
        options: with `exit_on_error=False`; its `prog` is the command.
        rest: the words after the command.
        needed: what to report where an argument is missing, by its name.
    """
    if help_is_asked(options, rest):
        return None
    try:
        own, others = options.parse_known_args(rest)
    except argparse.ArgumentError as error:
        fail(f"{error}; see {options.prog} --help")
    for name, message in (needed or {}).items():
        if getattr(own, name) is None:
            fail(message)
    if others:
        fail(f"unexpected argument {others[0]!r}; see {options.prog} --help")
    return own


def load_configuration(rest: list[str], ranks: int = 0) -> tuple[Config, str]:
    """Return the configuration of a command line, and the default name of its run.

    With `ranks` it is for another world than this one, whose devices are not looked at.
    """
    if "-h" in rest or "--help" in rest:
        from fedddp.config.reference import help_text

        if is_coordinator():
            say(help_text(), end="")
        sys.exit(0)
    target = rest[0] if rest and not rest[0].startswith("-") else None
    if target is None:
        fail("give a recipe or a .yaml file, e.g. `fedddp run digits`; `fedddp recipes` lists them")
    from fedddp.config.files import read_sections

    try:
        read_sections(target)  # before the seconds that torch takes
        from fedddp.config.loader import load_config, to_yaml
        from fedddp.distributed.launch import choose_device

        printed = PRINT in rest
        config = load_config(target, [word for word in rest[1:] if word != PRINT])
        if not ranks:
            choose_device(config.topology, Launch.from_environment())
    except ValueError as error:
        fail(str(error))
    if printed:
        if is_coordinator():
            say(to_yaml(config), end="")
        sys.exit(0)
    return config, Path(target).stem
