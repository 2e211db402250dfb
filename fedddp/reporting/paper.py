"""The figure and the table of a comparison for a paper."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fedddp.reporting.classes import class_name
from fedddp.reporting.curves import Curve
from fedddp.reporting.render import Panel, save_figure
from fedddp.reporting.runs import read_run
from fedddp.reporting.split_figures import save_confusion
from fedddp.reporting.tables import write_table
from fedddp.section import ConfigError

CONFUSION: Literal["confusion"] = "confusion"
"""The panel that shows the confusion matrix of one run."""


@dataclass(frozen=True)
class PaperFiles:
    """Files for a paper that a command writes beside its own; None: not wanted."""

    figure: Path | None = None
    """A .pdf, .png or .svg file."""
    panel: Panel | Literal["confusion"] | None = None
    """The only panel of the figure."""
    table: Path | None = None
    """A .tex or .md file."""


def write_paper(curves: Sequence[Curve], target: float, paper: PaperFiles) -> list[Path]:
    """Write the figure and the table of a paper that are wanted; return the paths of both.

    The panel `CONFUSION` is of a run, not of curves: `write_confusion` writes it.

    Raises:
        ValueError: no run recorded the panel.
        OSError: a file cannot be written.
    """
    if paper.figure is not None and paper.panel != CONFUSION:
        save_figure(curves, target, paper.figure, paper.panel)
    if paper.table is not None:
        write_table(curves, target, paper.table)
    return [path for path in (paper.figure, paper.table) if path is not None]


def write_confusion(folders: Sequence[Path], path: Path) -> None:
    """Write the confusion matrix of a finished run as a figure for a paper.

    Raises:
        ConfigError: there are several runs, or the run has no confusion matrix.
        ValueError: a file of the run is corrupt.
        OSError: the figure cannot be written.
    """
    if len(folders) != 1:
        raise ConfigError(f"--panel {CONFUSION} is of one run, got {len(folders)}; give one run directory")
    run = read_run(folders[0])
    counts = None if run.examined is None else run.examined.confusion
    if counts is None:
        raise ConfigError(
            f"{folders[0]} has no confusion matrix in an evaluation.json; give a finished run with test data"
        )
    save_confusion(counts, [class_name(run, label) for label in range(len(counts))], path)
