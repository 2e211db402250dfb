"""The last evaluation of the clients of a run: a table, and what a constant prediction scores."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedddp.storage.history import CLIENTS, Metric, Row, check_file, judged_by, number, parse_json

MOST_CLIENTS = 20
"""Rows of the table of clients, the worst; and names in a list of them."""

NOT_METRICS = ("round", "client", "name", "examples", "constant")
"""Keys of a row of clients.jsonl that are no metrics."""

TAIL = 8 << 20
"""Bytes at the end of clients.jsonl that are read for the last evaluation: about 30,000 clients."""


def last_evaluation(folder: Path) -> list[Row]:
    """Return the rows of the last evaluation of clients in a run directory; empty where there is none.

    Raises:
        OSError: the file cannot be read.
        ValueError: its end is corrupt.
    """
    path = folder / CLIENTS
    if not path.exists():
        return []
    check_file(path)
    with path.open("rb") as file:
        before = max(0, path.stat().st_size - TAIL)
        file.seek(before)
        lines = file.read().split(b"\n")
    complete = lines[1 if before else 0 : -1]  # the last is empty, or still being written
    return last_round([row for row in map(parse_json, complete) if isinstance(row, dict)])


def last_round(rows: Sequence[Row]) -> list[Row]:
    """Return those of the rows that are of the last round among them."""
    last = max((row["round"] for row in rows if type(row.get("round")) is int), default=0)
    return [row for row in rows if row.get("round") == last]


def named(rows: Sequence[Row], metric: Metric) -> bool:
    """Return whether `rows` are a few clients with names and scores; a tenth of few is one client.

    Numbers, as cameras have them, are no names.
    """
    scored = all(row.get("name") is not None and number(row, metric.bare) is not None for row in rows)
    words = not all(str(row.get("name")).isdecimal() for row in rows)
    return scored and words and 1 < len(rows) <= MOST_CLIENTS


def constants_of(rows: Sequence[Row], metric: Metric) -> list[float | None]:
    """Return what a constant prediction scores in `metric` on each client; None where that is not recorded.

    Rows have it of one metric: that which clients are judged by without `checkpoint.best`.
    """
    measured = [
        {f"eval/{key}": value for key, value in row.items() if key not in NOT_METRICS} for row in rows
    ]
    main = judged_by(measured)
    recorded = main is not None and main.bare == metric.bare
    return [number(row, "constant") if recorded else None for row in rows]


def constant_of(metric: Metric, rows: Sequence[Row], central: Mapping[str, Any]) -> float | None:
    """Return what the best constant prediction scores in `metric`; None where that is not recorded.

    Args:
        metric: what a run is judged by.
        rows: of its clients, of one evaluation.
        central: the scores of a constant prediction on its test data, by the names of metrics.
    """
    if not metric.of_clients:
        return number(central, metric.bare)
    known = [value for value in constants_of(rows, metric) if value is not None]
    is_mean = metric.key == metric.on_clients("mean")
    return sum(known) / len(known) if known and is_mean else None


def client_table(rows: Sequence[Row], metric: Metric) -> Iterator[tuple[str, ...]]:
    """Yield titles, and for each client its name, examples and score; of many the worst `MOST_CLIENTS`.

    With `constant` in the rows there is a column for what a constant prediction scores.

    Args:
        rows: of clients.jsonl, of one round.
        metric: what the clients are judged by: of a test, or over clients.
    """
    one = Metric(f"eval/{metric.bare}")

    def score(row: Row) -> float:
        value = number(row, one.bare)
        return float("inf") if value is None else one.sign * value

    title, shown = "client", list(rows)
    if len(rows) > MOST_CLIENTS:
        title = f"client ({MOST_CLIENTS} worst of {len(rows):,})"
        shown = sorted(rows, key=score)[:MOST_CLIENTS]
    constants = constants_of(shown, one)
    recorded = any(constant is not None for constant in constants)
    yield title, "examples", one.label.removeprefix("test "), *(["constant prediction"] if recorded else [])
    for row, constant in zip(shown, constants, strict=True):
        values = [number(row, one.bare), *([constant] if recorded else [])]
        cells = ("–" if value is None else one.text(value) for value in values)
        yield str(row.get("name", row.get("client"))), f"{row.get('examples', 0):,}", *cells
