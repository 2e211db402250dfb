"""The cross-site matrix as tables for a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from rich.table import Table

    from fedddp.reporting.cross_site_file import CrossSite

WIDTH = 80
"""Columns of the terminal that a matrix has to fit; of a larger one, each client has a row of means."""

GLOBAL = "global"


def cross_site_tables(found: CrossSite) -> list[Any]:
    """Return what `fedddp eval RUN --cross-site` prints: what is measured, and the matrix or its means."""
    from rich.console import Console
    from rich.text import Text

    metric = found.metric
    measured = f"{metric.label.removeprefix('test ')}{' in %' * metric.in_percent}"
    opening = f"{measured}, after round {found.round}; model of the row, data of the column"
    numbers = list(map(str, range(len(found.names))))
    both = [f"{number} {name}" for number, name in zip(numbers, found.names, strict=True)]
    for rows, columns in ((found.names, found.names), (both, numbers)):
        table = _matrix(found, list(rows), list(columns))
        if Console(width=1000).measure(table).maximum <= WIDTH:
            return [Text(opening), table]
    return [Text(f"{measured}, after round {found.round}; the file has all of it"), _means(found)]


def _table(*columns: str) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, header_style="bold")
    for number, column in enumerate(columns):
        table.add_column(Text(column), justify="right" if number else "left", overflow="fold")
    return table


def _add(table: Table, name: str, values: Any, found: CrossSite, own: int | None = None) -> None:
    """Add a row of numbers; that of a client on its `own` data is bold."""
    from rich.text import Text

    cells = [_text(value, found) for value in np.asarray(values, dtype=float).tolist()]
    styled = (Text(cell, "bold" if place == own else "") for place, cell in enumerate(cells))
    table.add_row(Text(name), *styled)


def _text(value: float, found: CrossSite) -> str:
    if not np.isfinite(value):
        return "–"
    return f"{found.metric.factor * value:.{1 if found.metric.in_percent else 3}f}"


def _matrix(found: CrossSite, rows: list[str], columns: list[str]) -> Table:
    table = _table("model \\ data", *columns)
    for place, name in enumerate(rows):
        _add(table, name, found.matrix[place], found, place)
    if found.global_row is not None:
        _add(table, GLOBAL, found.global_row, found)
    return table


def _means(found: CrossSite) -> Table:
    """Return a row for each client: its model on its own data, its model elsewhere, others' on its data."""
    columns = ["client", "own on own", "own elsewhere", "others on own"]
    if found.global_row is not None:
        columns.append("global on own")
    table = _table(*columns)
    others = np.where(np.eye(len(found.names), dtype=bool), np.nan, found.matrix)
    for place, name in enumerate(found.names):
        values = [found.matrix[place, place], _mean(others[place]), _mean(others[:, place])]
        values += [] if found.global_row is None else [found.global_row[place]]
        _add(table, name, values, found)
    return table


def _mean(values: Any) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else float("nan")
