"""What a model card reports of the clients of a run: their names, and a score for each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fedddp.storage.history import Metric, Row, number

MOST_CLIENTS = 20
"""Rows of the table of clients, the worst; and names in a list of them."""


def named_clients(split: Mapping[str, Any], count: int) -> str:
    """Return the number of clients, with the names of those that have one: "3: Bonn, Oslo, Rome".

    Args:
        split: split.json, or empty.
        count: clients of the run.
    """
    shares = split.get("shares") or []
    names = [str(share["name"]) for share in shares if share.get("name") is not None][:MOST_CLIENTS]
    return f"{count:,}: {', '.join(names)}{', ...' if count > len(names) else ''}" if names else f"{count:,}"


def client_data(split: Mapping[str, Any], count: int) -> str:
    """Return which data the `count` clients were evaluated on."""
    if split.get("own_tests"):
        return f"On the part of the test data that belongs to each of {count:,} clients"
    return f"On data that each of {count:,} clients held out"


def client_table(rows: Sequence[Row], metric: Metric) -> Iterator[tuple[str, ...]]:
    """Yield titles, and for each client its name, examples and score; of many the worst `MOST_CLIENTS`.

    With `constant` in the rows there is a column for what a constant prediction scores.

    Args:
        rows: of clients.jsonl, of one round.
        metric: what the clients are judged by.
    """

    def score(row: Row) -> float:
        value = number(row, metric.bare)
        return float("inf") if value is None else metric.sign * value

    title, shown = "client", list(rows)
    if len(rows) > MOST_CLIENTS:
        title = f"client ({MOST_CLIENTS} worst of {len(rows):,})"
        shown = sorted(rows, key=score)[:MOST_CLIENTS]
    constant = any(number(row, "constant") is not None for row in shown)
    yield title, "examples", metric.label, *(["constant prediction"] if constant else [])
    for row in shown:
        values = [number(row, key) for key in (metric.bare, *(["constant"] if constant else []))]
        cells = ("–" if value is None else metric.text(value) for value in values)
        yield str(row.get("name", row.get("client"))), f"{row.get('examples', 0):,}", *cells
