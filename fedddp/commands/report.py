"""The command that writes what is known of runs into one page: `report`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fedddp.commands.console import fail, help_is_asked, is_coordinator, reporting, say

if TYPE_CHECKING:
    from fedddp.reporting.paper import PaperFiles


def report(rest: list[str]) -> None:
    """Write the report of one or several runs."""
    missing = next((w for w in rest if not w.startswith("-") and not Path(w).expanduser().exists()), None)
    if missing is not None and rest[0] == missing:  # before the seconds that torch takes
        fail(f"{missing} holds no runs; give run directories, or a folder of them")
    from fedddp.reporting.curves import read_all
    from fedddp.reporting.paper import CONFUSION, write_confusion, write_paper
    from fedddp.reporting.render import PANELS
    from fedddp.reporting.report import find_runs, write_report
    from fedddp.reporting.tables import target_of
    from fedddp.section import local_path

    options = argparse.ArgumentParser(
        prog="fedddp report",
        usage="fedddp report RUN [RUN ...] [--output FILE.html] [--figure FILE] [--panel P] [--table FILE]",
        description="Write what is known of runs into one HTML page that needs no other file.",
        epilog="A folder stands for all runs in it.",
        allow_abbrev=False,
        exit_on_error=False,
    )
    options.add_argument("runs", metavar="RUN", nargs="+", help="run directories, or folders of them")
    options.add_argument(
        "--output",
        metavar="FILE.html",
        help="the page; by default report.html in the run, or in the common folder",
    )
    add_paper_options(options, f", or the {CONFUSION} matrix of one run")
    if help_is_asked(options, rest):
        return
    if not rest or rest[0].startswith("-"):
        fail("give run directories, e.g. `fedddp report runs/digits`; `fedddp runs` lists them")
    try:
        own, unknown = options.parse_known_args(rest)
        if unknown:
            fail(f"unknown option {unknown[0]}; see fedddp report --help")
        paper = paper_files(own, (*PANELS, CONFUSION))
        targets = [local_path(target, "report") for target in own.runs]
        output = None if own.output is None else local_path(own.output, "output")
        if output is not None and output.suffix.lower() not in (".html", ".htm"):
            fail(f"--output={own.output}: must end in .html; rename it")
        folders = find_runs(targets)
    except (ValueError, argparse.ArgumentError) as error:
        fail(str(error))
    with reporting():
        if is_coordinator():
            written = []
            if paper.figure and paper.panel == CONFUSION:
                write_confusion(folders, paper.figure)
                written = [paper.figure]
            if paper.table or (paper.figure and not written):
                curves = read_all(folders)
                written = write_paper(curves, target_of(curves), paper)
            for path in (write_report(folders, output), *written):
                say(str(path))


def add_paper_options(options: argparse.ArgumentParser, more: str = "") -> None:
    """Add `--figure`, `--panel` and `--table`; `more` is help on other panels."""
    options.add_argument(
        "--figure", metavar="FILE", help="also write a figure for a paper, as .pdf, .svg or .png"
    )
    options.add_argument(
        "--panel",
        metavar="P",
        help="the figure's only panel: the score over rounds, examples, bytes, time or wall time (wall)"
        + more,
    )
    options.add_argument(
        "--table", metavar="FILE", help="also write mean ± standard deviation over seeds, as .tex or .md"
    )


def paper_files(options: argparse.Namespace, panels: Sequence[str] = ()) -> PaperFiles:
    """Return the files for a paper that the command line asks for.

    Args:
        options: with `figure`, `panel` and `table`.
        panels: what `--panel` may be; by default those of curves.

    Raises:
        ConfigError: an ending or a panel is unknown.
    """
    from fedddp.reporting.figures import KINDS, check_file
    from fedddp.reporting.paper import PaperFiles
    from fedddp.reporting.render import PANELS
    from fedddp.section import ConfigError, nearest

    panels = panels or PANELS
    if options.panel is not None and options.panel not in panels:
        raise ConfigError(
            f"--panel={options.panel}: must be one of {', '.join(panels)}{nearest(options.panel, panels)}"
        )
    if options.panel is not None and options.figure is None:
        raise ConfigError(f"--panel={options.panel} is for a figure; give --figure FILE too")
    return PaperFiles(
        figure=check_file(options.figure, KINDS, "--figure"),
        panel=options.panel,
        table=check_file(options.table, ("tex", "md"), "--table"),
    )
