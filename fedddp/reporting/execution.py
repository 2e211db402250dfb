"""Sections of a report on how a run was executed: time, bytes, staleness, warnings, configuration."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedddp.config.loader import build, to_dict
from fedddp.config.schema import Config
from fedddp.reporting.classes import thin
from fedddp.reporting.curves import added, lists_of, numbers, series
from fedddp.reporting.figures import COLOURS, GRID, MUTED, SIZE, Chart, Line, chart, curves, size_of, stairs
from fedddp.reporting.page import PageSection, html_table
from fedddp.reporting.runs import RunFiles
from fedddp.reporting.sections import metric_lines
from fedddp.section import ConfigError
from fedddp.storage.history import Row, flat
from fedddp.storage.run_record import LaunchRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PHASES = ("train", "send", "aggregate", "step", "evaluate", "checkpoint", "other")
"""What the time of a round is spent on; `other` is what is not measured."""

MOST_BARS = 60
"""Bars of a figure over rounds; of a longer run consecutive rounds are added."""

MOST_SPANS = 600
"""Rounds times groups of a timeline."""

MOST_WARNINGS = 200

Floats = NDArray[np.float64]


def time(runs: Sequence[RunFiles], names: Sequence[str]) -> PageSection:
    """Return the time of each round by phase, and a timeline of the groups."""
    blocks: list[Chart | str] = []
    lines = metric_lines(runs, names, "time/round", "rounds", 1)
    if len(runs) > 1 and lines:
        blocks.append(chart("time/round", "Time per round", lambda a: curves(a, lines, "rounds", "seconds")))
    for index, run in enumerate(runs):
        blocks += _phases(index, run)
    return PageSection("Time", blocks, "" if blocks else "time per round: older runs did not record it")


def _phases(index: int, run: RunFiles) -> list[Chart]:
    phases = phase_seconds(run.rows)
    if not phases:
        return []
    per_bar = -(-len(run.rows) // MOST_BARS)
    draw = partial(_stack, bars={p: _sums(s, per_bar) for p, s in phases.items()}, per_bar=per_bar)
    found = [chart(f"phases {index}", "Time by phase", draw, run=index)]
    idle = lists_of(run.rows, "time/idle")
    if len(idle) == len(run.rows) and all(idle):
        groups = max(map(len, idle))  # a resumed run may have others
        waits = np.zeros((len(idle), groups))
        for number, seconds in enumerate(idle):
            waits[number, : len(seconds)] = seconds
        width = -(-len(run.rows) // max(10, min(MOST_BARS, MOST_SPANS // groups)))
        draw = partial(
            _timeline,
            bars={phase: _sums(seconds, width) for phase, seconds in phases.items()},
            idle=np.stack([_sums(waits[:, group], width) for group in range(groups)], axis=1),
        )
        size = (SIZE[0], min(max(1.9, 0.28 * groups + 1.2), 6.0))
        found.append(chart(f"groups {index}", "Client groups over time", draw, size, run=index))
    return found


def phase_seconds(rows: Sequence[Row]) -> dict[str, Floats]:
    """Return the seconds of every round by phase, (rounds,) each; empty where they were not recorded."""
    whole = numbers(rows, "time/round")
    if not np.isfinite(whole).any():
        return {}
    phases = {phase: np.nan_to_num(numbers(rows, f"time/{phase}")) for phase in PHASES[:-1]}
    rest = np.nan_to_num(whole) - np.sum(list(phases.values()), axis=0)
    return {phase: s for phase, s in {**phases, "other": np.maximum(rest, 0.0)}.items() if s.any()}


def _sums(values: Floats, width: int) -> Floats:
    """Return the sums of `width` consecutive values each."""
    return np.array([values[i : i + width].sum() for i in range(0, len(values), width)])


def _colour(phase: str) -> str:
    return {"other": GRID, "evaluate": MUTED}.get(phase) or COLOURS[PHASES.index(phase) % 6]


def _stack(axes: Axes, bars: dict[str, Floats], per_bar: int) -> None:
    places = 1 + per_bar * np.arange(len(next(iter(bars.values())))) + (per_bar - 1) / 2
    bottom = np.zeros(len(places))
    for phase, seconds in bars.items():
        some = seconds > 0
        about: dict[str, Any] = {"color": _colour(phase), "label": phase, "bottom": bottom[some]}
        axes.bar(places[some], seconds[some], per_bar * 0.9, **about)
        bottom += seconds
    axes.set(xlabel="round" if per_bar == 1 else f"round ({per_bar} per bar)", ylabel="seconds")
    axes.legend(loc="lower left", bbox_to_anchor=(-0.1, 1), ncols=4, borderaxespad=0)
    axes.grid(visible=False, axis="x")


def _timeline(axes: Axes, bars: dict[str, Floats], idle: Floats) -> None:
    """Draw when each group trained, waited, and when all evaluated or saved; `idle` is (bars, groups)."""
    pause = sum((bars[p] for p in ("evaluate", "checkpoint") if p in bars), np.zeros(len(idle)))
    whole = np.sum(list(bars.values()), axis=0)
    active = whole - pause - bars.get("other", 0.0)
    starts = np.concatenate([[0.0], np.cumsum(whole)[:-1]])
    for group in range(idle.shape[1]):
        busy = np.clip(active - idle[:, group], 0.0, None)
        waits = active - busy
        rows = (("trains", COLOURS[0], starts, busy), ("idle", COLOURS[4], starts + busy, waits))
        for label, colour, begins, lasts in (*rows, ("evaluates, saves", MUTED, starts + active, pause)):
            some = lasts > 0
            spans = list(zip(begins[some].tolist(), lasts[some].tolist(), strict=True))
            axes.broken_barh(
                spans, (group - 0.38, 0.76), color=colour, linewidth=0, label="" if group else label
            )
    axes.set(xlabel="seconds of the rounds", ylabel="client group", ylim=(idle.shape[1] - 0.5, -0.5))
    axes.set_yticks(range(0, idle.shape[1], -(-idle.shape[1] // 16)))
    axes.legend(loc="lower left", bbox_to_anchor=(-0.1, 1), ncols=3, borderaxespad=0)
    axes.grid(visible=False, axis="y")


def traffic(runs: Sequence[RunFiles], names: Sequence[str]) -> PageSection:
    """Return the bytes that were moved, up and down."""
    from matplotlib.ticker import FuncFormatter

    blocks: list[Chart | str] = []
    titles = {"up": "Bytes from the clients", "down": "Bytes to the clients"}
    for direction, title in titles.items():
        lines = []
        for line in metric_lines(runs, names, "train/examples", "rounds", 1):
            moved = np.cumsum(np.nan_to_num(numbers(runs[line.run].rows, f"bytes/{direction}")))
            measured, _ = series(runs[line.run].rows, "train/examples")
            lines.append(Line(line.run, line.name, line.x, moved[measured][thin(len(measured))]))

        def draw(axes: Axes, lines: list[Line] = lines) -> None:
            curves(axes, lines, "rounds", "bytes so far")
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: size_of(value)))

        blocks += [chart(f"bytes {direction}", title, draw)] if any(line.y.any() for line in lines) else []
    return PageSection("Bytes", blocks, "" if blocks else "bytes: older runs did not record them")


def staleness(runs: Sequence[RunFiles], names: Sequence[str]) -> PageSection:
    """Return how stale the updates of asynchronous runs were."""
    lines = metric_lines(runs, names, "staleness/mean", "rounds", 1)
    if not lines:
        return PageSection("Staleness", missing="staleness: an asynchronous algorithm, such as FedBuff")
    counts = [
        (
            line.run,
            line.name,
            added(lists_of(runs[line.run].rows, "staleness/histogram")).astype(np.int64),
        )
        for line in lines
    ]
    return PageSection(
        "Staleness",
        [
            chart("staleness", "Mean staleness", lambda a: curves(a, lines, "rounds", "server versions")),
            chart("staleness histogram", "Arrivals by staleness", lambda axes: stairs(axes, counts)),
        ],
    )


def warnings(runs: Sequence[RunFiles], names: Sequence[str]) -> PageSection:
    """Return the warnings and errors that were logged."""
    blocks: list[Chart | str] = []
    for index, (run, name) in enumerate(zip(runs, names, strict=True)):
        if run.warnings:
            lines = "".join(f"<li>{escape(line)}</li>" for line in run.warnings[:MOST_WARNINGS])
            more = len(run.warnings) - MOST_WARNINGS
            lines += f"<li>and {more:,} more in run.log</li>" if more > 0 else ""
            heading = f"<h3>{escape(name)}</h3>" if len(runs) > 1 else ""
            blocks.append(f'<div class="run-{index}">{heading}<ul class="log">{lines}</ul></div>')
    recorded = any(run.record is not None for run in runs)
    return PageSection("Warnings", blocks or (["<p>None was logged.</p>"] if recorded else []))


def configuration(runs: Sequence[RunFiles], names: Sequence[str]) -> PageSection:
    """Return the settings that differ from the defaults or between the runs, all settings, the launches."""
    plain = [_settings(run.sections) for run in runs]
    defaults = [default_settings(run.sections) for run in runs]
    keys = list(dict.fromkeys(key for settings in plain for key in settings))
    header = ["setting", "default", *names]
    changed, full = [header], [header]
    for key in keys:
        values = [settings.get(key) for settings in plain]
        usual = next((default[key] for default in defaults if key in default), None)
        row = [key, setting_text(usual), *(setting_text(settings.get(key, "–")) for settings in plain)]
        full.append(row)
        differs = values.count(values[0]) < len(values)
        if key not in ("name", "output") and (differs or values[0] != defaults[0].get(key)):
            changed.append([f"{key} *" if differs else key, *row[1:]])
    star = "<p>* differs between the runs.</p>" if len(runs) > 1 else ""
    blocks: list[Chart | str] = [
        f"<h3>Settings that are not the defaults</h3>{star}{html_table(changed)}"
        f"<details><summary>All settings</summary>{html_table(full)}</details>",
        *(_launches(index, run, names) for index, run in enumerate(runs)),
    ]
    missing = "" if any(r.record for r in runs) else "command, versions and device: older runs lack run.json"
    return PageSection("Configuration", blocks, missing)


def _settings(sections: Row) -> Row:
    """Return settings with dotted keys; the class of the user's own module or dataset stands for its name."""
    own = {key: value for key, value in flat(sections).items() if key.startswith("objects.")}
    named = dict(sections)
    for section, name, made in (("model", "name", "module"), ("data", "dataset", "train")):
        before, kind = named.get(section), own.get(f"objects.{made}.class")
        if kind is not None and isinstance(before, dict | None):
            named[section] = {name: kind} | (before or {}) | {name: kind}
    return {key.removesuffix(".name"): value for key, value in flat(named).items() if key not in own}


def default_settings(sections: Row) -> Row:
    """Return the defaults with dotted keys: the default choices, and for the choices made their settings'."""
    usual = flat(defaults_of(sections))
    found = dict(usual)
    for key in usual:
        if key.endswith(".name"):
            choice, default = key.removesuffix(".name"), flat(defaults_of(_without(sections, key.split("."))))
            found[choice] = default.get(key, default.get(choice))
            del found[key]
    return found


def _without(sections: Row, path: Sequence[str]) -> Row:
    """Return sections without the one of the choice whose name is at `path`."""
    first, *rest = path
    inner = sections.get(first)
    if len(rest) > 1 and isinstance(inner, dict):
        return {**sections, first: _without(inner, rest)}
    return {key: value for key, value in sections.items() if key != first}


def defaults_of(sections: Row) -> Row:
    """Return the default configuration with the choices of `sections`, such as its algorithm's defaults.

    The class of a choice is not imported: a user's own has no defaults here.
    """
    found = to_dict(Config())
    for name, section in sections.items():
        choices = _choices(section)
        if choices:
            try:
                found[name] = to_dict(build({name: choices}))[name]
            except ConfigError:  # of another version, or refused beside the defaults of other sections
                continue
    return dict(found)


def _choices(section: Any) -> Any:
    """Return the names in a section, and in those inside it; no dotted paths."""
    if not isinstance(section, dict):
        return {}
    name = section.get("name")
    found = {"name": name} if isinstance(name, str) and "." not in name else {}
    inner = {key: _choices(value) for key, value in section.items() if isinstance(value, dict)}
    return found | {key: value for key, value in inner.items() if value}


def setting_text(value: Any) -> str:
    """Return a value of a setting as YAML has it."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _launches(index: int, run: RunFiles, names: Sequence[str]) -> str:
    """Return the commands, versions and machines of a run as HTML."""
    if run.record is None:
        return ""
    rows = [["launch", *(str(number) for number in range(1, len(run.record.sessions) + 1))]]
    for field in dataclasses.fields(LaunchRecord):
        launches = (setting_text(getattr(session, field.name)) for session in run.record.sessions)
        rows.append([field.name.replace("_", " "), *launches])
    error = f'<p class="log">error: {escape(run.record.error)}</p>' if run.record.error else ""
    heading = f"Launches of {escape(names[index])}" if len(names) > 1 else "Launches"
    return f'<div class="run-{index}"><h3>{heading}</h3>{error}{html_table(rows)}</div>'
