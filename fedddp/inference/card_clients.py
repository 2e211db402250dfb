"""What a model card reports of the clients of a run: their names, and their data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedddp.storage.client_rows import MOST_CLIENTS


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
