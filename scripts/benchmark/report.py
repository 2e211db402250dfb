"""Tables on the screen, and as Markdown between marks of a file: shared by the benchmarks.

`<!-- speed -->` and `<!-- /speed -->` in the file of `--table` enclose what is replaced.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import TypeVar

from rich.console import Console
from rich.progress import track
from rich.table import Table as Grid

T = TypeVar("T")


@dataclass(frozen=True)
class Table:
    """One table: a title, columns of which the first holds names, and notes below."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = field(default_factory=tuple)

    def markdown(self) -> str:
        """Return the table as Markdown."""
        rule = "|".join(["---", *["--:"] * (len(self.columns) - 1)])
        lines = [f"### {self.title}", "", f"| {' | '.join(self.columns)} |", f"|{rule}|"]
        lines += [f"| {' | '.join(row)} |" for row in self.rows]
        for note in self.notes:
            lines += ["", note]
        return "\n".join([*lines, ""])

    def grid(self) -> Grid:
        """Return the table for a terminal."""
        grid = Grid(title=self.title, title_justify="left", caption="\n".join(self.notes) or None)
        for number, column in enumerate(self.columns):
            grid.add_column(column, justify="right" if number else "left")
        for row in self.rows:
            grid.add_row(*row)
        return grid


def parser_of(description: str | None, marks: Sequence[str]) -> argparse.ArgumentParser:
    """Return a parser with the option `--table`, for a script whose tables go between `marks`."""
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=plain)
    listed = ", ".join(f"<!-- {mark} -->" for mark in marks)
    parser.add_argument(
        "--table",
        type=Path,
        metavar="FILE",
        help=f"Markdown file in which the part after {listed} is replaced",
    )
    return parser


def words(text: str) -> list[str]:
    """Return the words of an option such as clients,ranks."""
    return [word for word in text.split(",") if word]


def numbers(text: str) -> list[int]:
    """Return the whole numbers of an option such as 100,1e6."""
    return [int(float(number)) for number in words(text)]


def check_marks(file: Path | None, marks: Sequence[str]) -> None:
    """Exit, before anything is measured, if `file` lacks one of the marks."""
    if file is None:
        return
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    for mark in marks:
        begin, end = text.find(f"<!-- {mark} -->\n"), text.find(f"<!-- /{mark} -->")
        if not 0 <= begin < end:
            sys.exit(f"error: --table {file} has no lines <!-- {mark} --> and <!-- /{mark} -->; add them")


def publish(tables: Sequence[Table], file: Path | None, mark: str, *, machine: str = "") -> None:
    """Print the tables with machine and date, and put them between the marks of `file`, if there is one.

    `machine` names what this module does not know of the machine, a GPU for example.
    """
    when = measured(machine)
    text = "\n".join([f"{when}\n", *(table.markdown() for table in tables)])
    console = Console()
    if console.is_terminal:
        console.print(when, *(table.grid() for table in tables), sep="\n")
    else:
        print(text)
    if file is not None:
        begin, end = f"<!-- {mark} -->\n", f"<!-- /{mark} -->"
        before, _, rest = file.read_text(encoding="utf-8").partition(begin)
        file.write_text(f"{before}{begin}{text}{end}{rest.partition(end)[2]}", encoding="utf-8")


def progress(work: Sequence[T], what: str) -> Iterable[T]:
    """Yield the items of `work`, with a bar where the screen is a terminal."""
    console = Console(stderr=True)
    return track(work, description=what, console=console, disable=not console.is_terminal)


def measured(machine: str = "") -> str:
    """Return when and on which machine the tables are measured."""
    parts = [machine] if machine else []
    parts += [f"{cores()} cores ({platform.machine()})", f"torch {version('torch')}"]
    return f"Measured {time.strftime('%Y-%m-%d')} on {', '.join(parts)}."


def cores() -> int:
    """Return the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# ---- cells ----


def seconds(values: Sequence[float], digits: int = 3) -> list[str]:
    """Return the cells of a time: median, and range from the least to the largest."""
    return [f"{median(values):.{digits}f}", f"{min(values):.{digits}f}–{max(values):.{digits}f}"]


def milliseconds(values: Sequence[float], digits: int = 2) -> list[str]:
    """Return the cells of a time in seconds as milliseconds: median and range."""
    return seconds([1000 * value for value in values], digits)
