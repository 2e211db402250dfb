"""The options of `fedddp run` beside its settings: how much is printed, and a profile."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fedddp.commands.console import PrintHandler, fail, say
from fedddp.distributed.environment import Launch
from fedddp.storage.run_record import LogFile

QUIET, VERBOSE, PROFILE = "--quiet", "--verbose", "--profile"

PROFILED = 3
"""Rounds that `--profile` records."""

LOGS = "logs"
"""Folder of the run directory with the log of every rank."""

OPTIONS_HELP = f"""\
Options of `fedddp run`, beside the settings:
  --quiet             print errors and the last line only
  --verbose           print the log lines of every rank, with [rank N]; RUN/{LOGS}/rank-N.log has them too
  --profile [ROUNDS]  record {PROFILED} (or so many) rounds with torch.profiler, in RUN/profile
  --print_config      print the settings as YAML, and train nothing

"""


@dataclass(frozen=True)
class Options:
    """The options of one `fedddp run`."""

    quiet: bool
    verbose: bool
    words: list[str]
    """The other words of the command line."""


def split_options(rest: list[str]) -> Options:
    """Return the options in the words `rest` of a command line; `--profile` becomes its setting."""
    words: list[str] = []
    after = iter([*rest[1:], None])
    rounds: str | None = None
    skip = False
    for word in rest:
        following = next(after)
        if skip:
            skip = False
        elif word.partition("=")[0] == PROFILE:
            given = word.partition("=")[2]
            skip = not given and following is not None and following.isdigit()
            rounds = given or (following if skip else None) or str(PROFILED)
        elif word not in (QUIET, VERBOSE):
            words.append(word)
    if rounds is not None:
        if not rounds.isdigit() or int(rounds) < 1:
            fail(f"{PROFILE} must be a number of rounds >= 1, got {rounds}; leave it out for {PROFILED}")
        words += ["--tracking.profile", rounds]
    if QUIET in rest and VERBOSE in rest:
        fail(f"{QUIET} and {VERBOSE} exclude each other; leave one out")
    return Options(QUIET in rest, VERBOSE in rest, words)


@contextlib.contextmanager
def logging_as(options: Options) -> Iterator[None]:
    """Print log records in the block as the options ask for."""
    from fedddp.tracking.progress import silence

    logger = logging.getLogger("fedddp")
    printers = [handler for handler in logger.handlers if isinstance(handler, PrintHandler)]
    level = logger.level
    with contextlib.ExitStack() as on_exit:
        if options.quiet:
            on_exit.enter_context(silence())
            for printer in printers:
                printer.setLevel(logging.ERROR)
        if options.verbose:
            rank = Launch.from_environment().rank
            for printer in printers:
                printer.prefix = f"[rank {rank}] "
            file = RankLog(rank)
            logger.setLevel(logging.DEBUG)
            logger.addHandler(file)
            on_exit.callback(file.close)
            on_exit.callback(logger.removeHandler, file)
            on_exit.callback(logger.setLevel, level)
        yield


def show_profile(folder: Path) -> None:
    """Print the tables of the coordinator's profile in the run directory `folder`, if there is one."""
    profile = folder / "profile"
    try:
        text = (profile / "rank-0.txt").read_text(encoding="utf-8")
    except OSError:
        return
    say(f"\nprofile of rank 0 ({profile}/rank-0.json.gz opens in ui.perfetto.dev)\n{text}", end="")


class RankLog(logging.Handler):
    """Writes this rank's log records to a file of the run directory, once a record names the directory."""

    def __init__(self, rank: int) -> None:
        """Keep the records until then."""
        super().__init__()
        self.rank = rank
        self.waiting: list[logging.LogRecord] = []
        self.file: LogFile | None = None

    def emit(self, record: logging.LogRecord) -> None:
        """Write or keep `record`; what cannot be written is lost, and no error."""
        directory = getattr(record, "directory", None)
        if directory is not None and self.file is None:
            self._open(Path(directory))
        if self.file is None:
            self.waiting.append(record)
        else:
            self.file.emit(record)

    def _open(self, directory: Path) -> None:
        try:
            (directory / LOGS).mkdir(exist_ok=True)
        except OSError:
            return
        self.file = LogFile(directory / LOGS / f"rank-{self.rank}.log")
        for earlier in self.waiting:
            self.file.emit(earlier)
        self.waiting.clear()

    def close(self) -> None:
        """Close the file."""
        if self.file is not None:
            self.file.close()
        super().close()
