"""The report of one or several runs: one page that needs no other file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from html import escape
from pathlib import Path

import numpy as np

from fedddp.privacy.statement import statement
from fedddp.reporting import execution, sections
from fedddp.reporting.cross_site import cross_site
from fedddp.reporting.curves import AXES, series, steps
from fedddp.reporting.figures import size_of
from fedddp.reporting.page import PageSection, html_table, page
from fedddp.reporting.runs import RunFiles, judged_runs, read_run, run_folders, unique_names
from fedddp.reporting.tables import UNKNOWN, Cells, seconds
from fedddp.section import ConfigError
from fedddp.storage.checkpoint import write_text
from fedddp.storage.client_rows import constant_of, last_round
from fedddp.storage.examined import constant_line
from fedddp.storage.history import Metric
from fedddp.storage.judged import algorithm_of
from fedddp.storage.run_record import REPORT


def find_runs(targets: Sequence[str | Path]) -> list[Path]:
    """Return the run directories of `targets`: each one itself, or all runs in it; each once.

    Raises:
        ConfigError: a target holds no runs.
    """
    found = [folder for target in targets for folder in run_folders(Path(target))]
    return list({folder.resolve(): folder for folder in found}.values())


def write_report(folders: Sequence[str | Path], output: str | Path | None = None) -> Path:
    """Write the report of the runs in `folders`, and return its path.

    Equal run directories make equal files. What a run does not hold is left out of its report.

    Args:
        folders: run directories, or folders of them.
        output: the .html file; by default report.html in the run directory, or in the folder that holds all.

    Raises:
        ConfigError: a folder holds no runs.
        ValueError: a run has no rounds yet, or a file of it is corrupt.
        OSError: the file cannot be written.
    """
    found = find_runs(folders)
    path = default_folder(found) / REPORT if output is None else Path(output)
    names = unique_names(found)
    runs = [replace(read_run(folder), name=name) for folder, name in zip(found, names, strict=True)]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, report(runs))
    return path


def default_folder(folders: Sequence[Path]) -> Path:
    """Return the folder of a report: the run directory, or the nearest folder that holds all."""
    if len(folders) == 1:
        return folders[0]
    common = Path(os.path.commonpath([folder.resolve() for folder in folders]))
    if common == common.parent:
        raise ConfigError("the runs have no folder in common; give --output FILE.html")
    inside = common.is_relative_to(Path.cwd().resolve())
    return Path(os.path.relpath(common)) if inside else common


def report(runs: Sequence[RunFiles]) -> str:
    """Return the page of `runs`."""
    names = [run.name for run in runs]
    title = f"Report: {names[0]}" if len(runs) == 1 else f"Report: {len(runs)} runs"
    recorded = [axis for axis in AXES if any(np.isfinite(steps(run.rows)[axis]).all() for run in runs)]
    parts = [
        PageSection("Summary", [html_table(summary(runs), numbers=True), *constants(runs), *protected(runs)]),
        sections.learning(runs, names),
        sections.clients(runs, names),
        cross_site(runs),
        sections.data(runs),
        sections.participation(runs),
        sections.mistakes(runs),
        execution.time(runs, names),
        execution.traffic(runs, names),
        execution.staleness(runs, names),
        execution.warnings(runs, names),
        execution.configuration(runs, names),
    ]
    return page(title, names, parts, recorded)


def protected(runs: Sequence[RunFiles]) -> list[str]:
    """Return a line for each run that protects its clients: what it may claim."""
    lines = []
    for index, run in enumerate(runs):
        claim = statement(run.sections, run.rows)
        if claim is not None:
            lines.append(f'<p class="run-{index}">{escape(run.name)}: {escape(claim)}.</p>')
    return lines


def constants(runs: Sequence[RunFiles]) -> list[str]:
    """Return what a constant prediction scores by the metric that each run is judged by; equal lines once."""
    lines: dict[str, None] = {}
    for run, judged in zip(runs, judged_runs(runs), strict=True):
        central = {} if run.examined is None else run.examined.constant
        value = None if judged is None else constant_of(judged, last_round(run.clients), central)
        target = "class" if run.split is None else run.split.target
        line = None if judged is None else constant_line(target, {judged.bare: value}, judged)
        lines |= {} if line is None else {line: None}
    return [f"<p>{escape(line)}</p>" for line in lines]


def summary(runs: Sequence[RunFiles]) -> Cells:
    """Return the table of the runs: its header, and a row for each."""
    judged = judged_runs(runs)
    one = len(set(judged)) == 1
    first = ("accuracy" if judged[0] is None else judged[0].label) if one else "score"
    rows = [["run", "algorithm", "state", "rounds", first, "best (round)", "worst 10 %", "test loss"]]
    rows[0] += ["examples", "bytes", "virtual s", "wall s"]
    for run, metric in zip(runs, judged, strict=True):
        last, best, worst = _scores(run, metric)
        last = last if one or metric is None else f"{metric.label} {last}"
        loss = series(run.rows, "eval/loss")[1]
        totals = {axis: float(step.sum()) for axis, step in steps(run.rows).items()}
        wanted = run.settings.get("rounds")
        done = run.rows[-1]["round"]
        rows.append(
            [
                run.name,
                algorithm_of(run.settings) or UNKNOWN,
                run.state,
                f"{done} of {wanted}" if isinstance(wanted, int) and wanted != done else str(done),
                last,
                best,
                worst,
                f"{loss[-1]:.4f}" if len(loss) else UNKNOWN,
                f"{totals['examples']:,.0f}" if np.isfinite(totals["examples"]) else UNKNOWN,
                size_of(totals["bytes"]) if np.isfinite(totals["bytes"]) else UNKNOWN,
                *(seconds(totals[axis]) if np.isfinite(totals[axis]) else UNKNOWN for axis in AXES[3:]),
            ]
        )
    return rows


def _scores(run: RunFiles, metric: Metric | None) -> tuple[str, str, str]:
    """Return as text the last and the best value of what a run is judged by, and its worst clients'."""
    if metric is None:
        return UNKNOWN, UNKNOWN, UNKNOWN
    measured, values = series(run.rows, metric.key)
    at = int((metric.sign * values).argmax())
    best = f"{metric.text(values[at])} ({run.rows[measured[at]]['round']})"
    worst = series(run.rows, metric.on_clients("worst10"))[1]
    return metric.text(values[-1]), best, metric.text(worst[-1]) if len(worst) else UNKNOWN
