"""Pages that need no other file: sections of figures and tables, with a style sheet and a script."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import groupby
from pathlib import Path

from fedddp.reporting.figures import Chart
from fedddp.reporting.tables import Cells

COLOUR_COUNT = 8

HEAD = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{title}</title>
<style>
{style}</style></head><body>
<h1>{title}</h1>
"""


POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{}'"
"""The page loads nothing, and no other script than its own runs in it."""


@dataclass(frozen=True)
class PageSection:
    """A part of a page."""

    title: str
    blocks: list[Chart | str] = field(default_factory=list)
    """Figures, and HTML."""
    missing: str = ""
    """What is left out, and the setting that adds it, as text; empty where nothing is."""


def page(title: str, runs: Sequence[str], sections: Sequence[PageSection], axes: Sequence[str] = ()) -> str:
    """Return an HTML page; equal arguments make an equal page.

    Args:
        title: its heading.
        runs: the names of the runs; the figures' `run` is a position here.
        sections: those without blocks are left out.
        axes: what the figures with an `axis` can be switched to; the first is shown at first.
    """
    style, script = (Path(__file__).with_name(f"page.{kind}").read_text("utf-8") for kind in ("css", "js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    hiding = "".join(
        f"body.off-{run} .run-{run}, body.off-{run} th.of-{run} {{ display: none; }}\n"
        for run in range(len(runs))
    )
    shown = [section for section in sections if section.blocks]
    charts = [block for section in shown for block in section.blocks if isinstance(block, Chart)]
    data = json.dumps({chart.key: chart.data for chart in charts if chart.data}, allow_nan=False)
    body = "".join(_section(section, runs, axes) for section in shown)
    return "".join(
        [
            HEAD.format(title=escape(title), style=style + hiding, policy=POLICY.format(digest)),
            _controls(runs, axes),
            body,
            _missing(sections),
            '<div id="tip" hidden></div>\n',
            # No text inside can end the element.
            f'<script type="application/json" id="data">{data.replace("<", chr(92) + "u003c")}</script>\n',
            f"<script>{script}</script>\n</body></html>\n",
        ]
    )


def _controls(runs: Sequence[str], axes: Sequence[str]) -> str:
    """Return the bar that shows and hides runs, which is their legend too, and switches the axis."""
    keys = "".join(
        f'<label><input type="checkbox" name="run" value="{run}" checked>'
        f'<span class="key" style="--key: var(--c{run % COLOUR_COUNT})"></span>{escape(name)}</label>'
        for run, name in enumerate(runs)
    )
    choices = "".join(
        f'<label><input type="radio" name="axis" value="{escape(axis)}"{" checked" * (axis == axes[0])}>'
        f"{escape(axis)}</label>"
        for axis in axes
    )
    legend = f'<fieldset aria-label="runs">{keys}</fieldset>' if len(runs) > 1 else ""
    switch = f'<fieldset aria-label="horizontal axis"><span class="small">over</span>{choices}</fieldset>'
    return (
        f'<div class="bar">{legend}{switch if len(axes) > 1 else ""}</div>\n'
        if legend or len(axes) > 1
        else ""
    )


def _section(section: PageSection, runs: Sequence[str], axes: Sequence[str]) -> str:
    parts = [f"<section><h2>{escape(section.title)}</h2>\n"]
    for are_charts, blocks in groupby(section.blocks, lambda block: isinstance(block, Chart)):
        if not are_charts:
            parts += [f"{block}\n" for block in blocks]
            continue
        for charts in _side_by_side([block for block in blocks if isinstance(block, Chart)]):
            cards = "".join(_card(chart, runs, axes) for chart in charts)
            parts.append(f'<div class="cards">\n{cards}</div>\n')
    return "".join([*parts, "</section>\n"])


def _side_by_side(charts: Sequence[Chart]) -> Iterable[list[Chart]]:
    """Return the charts of each grid: the same panel of several runs has a grid of its own."""
    panels = [chart.key.removesuffix(f" {chart.run}") for chart in charts]
    grids: dict[str, list[Chart]] = {}
    for chart, panel in zip(charts, panels, strict=True):
        grids.setdefault(panel if panels.count(panel) > 1 else "", []).append(chart)
    return grids.values()


def _card(chart: Chart, runs: Sequence[str], axes: Sequence[str]) -> str:
    kinds = ["card", *(["wide"] if chart.wide else []), *([] if chart.run is None else [f"run-{chart.run}"])]
    about = f' data-chart="{escape(chart.key)}"' if chart.data else ""
    if chart.axis is not None:
        about += f' data-axis="{escape(chart.axis)}"' + " hidden" * (chart.axis != axes[0])
    of = (
        ""
        if chart.run is None or len(runs) == 1
        else f' <span class="small">{escape(runs[chart.run])}</span>'
    )
    return (
        f'<figure class="{" ".join(kinds)}"{about}><figcaption>{escape(chart.title)}{of}</figcaption>\n'
        f"{chart.content}</figure>\n"
    )


def _missing(sections: Sequence[PageSection]) -> str:
    """Return what the page lacks, with the settings that give it."""
    lines = "".join(f"<li>{escape(section.missing)}</li>" for section in sections if section.missing)
    return f'<section><h2>Not recorded</h2><ul class="small">{lines}</ul></section>\n' if lines else ""


def html_table(rows: Cells, *, numbers: bool = False) -> str:
    """Return `rows`, the first of them a header, as an HTML table that scrolls where it is too wide."""
    head, *body = rows
    lines = ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in body]
    header = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    kind = ' class="numbers"' if numbers else ""
    table = f"<table{kind}><tr>{header}</tr>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"
    return f'<div class="scroll">{table}</div>'
