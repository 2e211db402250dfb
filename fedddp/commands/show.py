"""The command that shows one run: `show`."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedddp.commands.console import fail, is_coordinator, say, show
from fedddp.commands.run_info import RunInfo, ago, read_run_info
from fedddp.storage.history import HISTORY, Metric, is_client_score, read_json
from fedddp.storage.judged import averages_note
from fedddp.storage.run_record import SPLIT, LaunchRecord, read_warnings
from fedddp.tracking.status import label_of, size_text
from fedddp.tracking.summary import clients_shown, next_commands, phases_text, score_of

if TYPE_CHECKING:
    from rich.table import Table

NOT_SETTINGS = ("name", "output", "resume")
WARNINGS = 10
"""Warnings shown; RUN/run.log has all."""

CLIENTS = 20
"""Clients that are named."""

METRICS = 12
"""Metrics shown; history.jsonl has all."""

HELP = """\
usage: fedddp show RUN

Show one run: command, versions, progress, metrics, settings that are not the defaults, warnings, files.
"""


def show_run(rest: list[str]) -> None:
    """Print what is known of one run."""
    from fedddp.section import local_path

    if {"-h", "--help"} & {*rest}:
        if is_coordinator():
            say(HELP, end="")
        return
    if len(rest) != 1 or rest[0].startswith("-"):
        fail("give one run directory, e.g. `fedddp show runs/digits`; `fedddp runs` lists them")
    try:
        folder = local_path(rest[0], "RUN")
    except ValueError as error:
        fail(str(error))
    if not any((folder / name).exists() for name in (HISTORY, "config.yaml", "run.json")):
        fail(f"{folder} is no run directory; `fedddp runs` lists the runs of a folder")
    show(describe(read_run_info(folder)))


def describe(run: RunInfo) -> Table:
    """Return a table of what is known of a run."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for part in (_state, _launches, _scores, _settings, _problems, _files):
        for label, text in part(run):
            table.add_row(Text(label), Text(text) if isinstance(text, str) else text)
    for index, line in enumerate(_next(run)):
        table.add_row(Text("" if index else "next"), Text(line))
    return table


Lines = Iterator[tuple[str, Any]]
"""Labels, and texts or tables."""


def _state(run: RunInfo) -> Lines:
    yield "run", str(run.folder)
    yield "state", f"{run.state}, {ago(run.age_s)}"
    if run.problem:
        yield "error", run.problem
    if run.record and run.record.error:
        yield "error", run.record.error
    if run.state == "failed" and run.record and run.record.state == "running":
        yield "error", "the process is gone and left no word: it was killed, or its machine went down"
    names = _clients(run)
    if names:
        yield "clients", names
    of = f" of {run.rounds}" if run.rounds else ""
    early = " (ended early)" if run.state == "finished" and run.rounds and run.done < run.rounds else ""
    yield "rounds", f"{run.done}{of}{early}"


def _clients(run: RunInfo) -> str:
    """Return the clients by name, with their examples; empty where they have no names."""
    try:
        split = read_json(run.folder / SPLIT)
    except (OSError, ValueError):
        return ""
    shares = [share for share in split.get("shares") or [] if share.get("name") is not None]
    listed = ", ".join(f"{share['name']} ({share['size']:,})" for share in shares[:CLIENTS])
    return listed + (", ..." if listed and split.get("clients", 0) > CLIENTS else "")


def _launches(run: RunInfo) -> Lines:
    sessions = run.record.sessions if run.record else ()
    if not sessions:
        return
    last = sessions[-1]
    for index, launch in enumerate(sessions):
        start = f"{launch.started.replace('T', ' ').partition('+')[0]} UTC"
        resumed = f", resumed after round {launch.from_round}" if launch.from_round else ""
        yield "" if index else "started", f"{start}{resumed}"
    yield "command", last.command
    yield (
        "versions",
        f"fedddp {last.fedddp}, torch {last.torch}, torchvision {last.torchvision}, Python {last.python}",
    )
    commit = last.git_commit
    if commit:
        yield "git commit", commit.rstrip("+") + (" with changes" if commit.endswith("+") else "")
    yield "machine", last.platform
    yield "device", f"{last.device}; {_world(last)}"


def _world(launch: LaunchRecord) -> str:
    def count(number: int, noun: str) -> str:
        return f"{number} {noun}{'' if number == 1 else 's'}"

    return (
        f"{count(launch.ranks, 'rank')} in {count(launch.groups, 'client group')} of "
        f"{launch.ranks_per_client}, {count(launch.threads, 'thread')} per rank"
    )


def _scores(run: RunInfo) -> Lines:
    if not run.rows:
        return
    main = run.score
    numbers = [
        key
        for key in dict.fromkeys(key for row in run.rows for key in row)
        if (key.startswith(("eval/", "train/loss")) or is_client_score(key)) and score_of(run.rows, key)
    ]
    by_client = clients_shown(run.folder, Metric(main.name)) if main else None
    hidden = ("_std", "_worst10", "_best10") if by_client else ("_std",)  # a tenth of few is one client
    numbers = [k for k in numbers if isinstance(_last(run, k), int | float) and not k.endswith(hidden)]
    if main:
        numbers = [main.name, *(key for key in numbers if key != main.name)]
    for key in numbers[:METRICS]:
        score = score_of(run.rows, key)
        assert score is not None
        yield label_of(key), score.text
    note = averages_note({Metric(key).bare for key in numbers[:METRICS]}, run.sections)
    if note:
        yield "", note
    if by_client:
        yield "by client", by_client
    yield "time", phases_text(run.rows)


def _last(run: RunInfo, key: str) -> Any:
    return next((row[key] for row in reversed(run.rows) if row.get(key) is not None), None)


def _settings(run: RunInfo) -> Lines:
    """Yield the settings that are not the defaults."""
    if not run.sections:
        return
    from fedddp.reporting.execution import default_settings, setting_text

    usual = default_settings(run.sections)
    changed = [
        (key, value)
        for key, value in run.settings.items()
        if key not in NOT_SETTINGS and (key not in usual or value != usual[key])
    ]
    for index, (key, value) in enumerate(changed):
        was = f" (default: {setting_text(usual[key])})" if key in usual else ""
        yield "" if index else "settings", f"{key}: {setting_text(value)}{was}"


def _problems(run: RunInfo) -> Lines:
    lines = read_warnings(run.folder)
    if len(lines) > WARNINGS:
        lines = [f"{len(lines) - WARNINGS} earlier ones are in {run.folder}/run.log", *lines[-WARNINGS:]]
    for index, line in enumerate(lines):
        yield "" if index else "warnings", line


def _files(run: RunInfo) -> Lines:
    paths = sorted(path for path in run.folder.iterdir() if not path.name.startswith("."))
    yield "files", ", ".join(map(_file, paths))


def _file(path: Path) -> str:
    return f"{path.name}/" if path.is_dir() else f"{path.name} ({size_text(path.stat().st_size)})"


def _next(run: RunInfo) -> list[str]:
    """Return the commands that come next."""
    path = shlex.quote(str(run.folder))
    if run.state == "running":
        return [f"fedddp watch {path}"]
    if run.state == "finished":
        return next_commands(run.folder)
    lines = [f"fedddp report {path}"] if run.rows else []
    if (run.folder / "checkpoints").is_dir() and "objects" not in run.sections:
        output, name = run.folder.parent, run.folder.name
        config = shlex.quote(str(run.folder / "config.yaml"))
        flags = f"--output {shlex.quote(str(output))} --name {shlex.quote(name)} --resume auto"
        lines.insert(0, f"fedddp run {config} {flags}, with the same launcher")
    return lines
