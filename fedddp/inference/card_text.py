"""Markdown of a model card: tables, settings, names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedddp.storage.history import Row, flat, read_json


def read_part(path: Path) -> Row:
    """Return a JSON file of the run; empty where there is none, as in older runs, or it is corrupt."""
    try:
        return read_json(path)
    except (OSError, ValueError):
        return {}


def markdown_table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table; a | in a cell is escaped."""
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def choice(section: Any) -> str:
    """Return a section as `Name(setting=value, ...)`, without what is not set."""
    if not isinstance(section, Mapping):
        return f"`{section}`"
    given = {n: v for n, v in flat(dict(section)).items() if n != "name" and v is not None}
    settings = ", ".join(f"{name}={value}" for name, value in given.items())
    name = section.get("name", "")
    return f"`{name}({settings})`" if name and settings else f"`{name or settings}`"


def numbers(values: Sequence[float]) -> str:
    """Return numbers with four digits, with commas between them."""
    return ", ".join(f"{value:.4f}" for value in values)


def some_names(names: Sequence[str]) -> str:
    """Return how many names there are, and the first 20."""
    shown = ", ".join(map(escaped, names[:20]))
    return f"{len(names)}: {shown}{', ...' if len(names) > 20 else ''}"


def escaped(text: str) -> str:
    """Return `text` so that Markdown shows it as it is, on one line."""
    return "".join(f"\\{c}" if c in "\\`*_[]<>#" else c for c in " ".join(text.split()))
