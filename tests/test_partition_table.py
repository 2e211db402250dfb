"""The table of `fedddp partition`."""

from __future__ import annotations

import io

import numpy as np
import pytest
from numpy.typing import NDArray
from rich.console import Console

from fedddp.data.partition import IID, Split
from fedddp.data.description import describe
from fedddp.reporting.partition_table import table


def shown(split: Split, labels: NDArray[np.int64], classes: int) -> str:
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(table(describe(split, labels, classes)))
    return " ".join(console.export_text().split())


def test_all_of_a_few_clients_are_shown() -> None:
    labels = np.array([0, 0, 1, 2, 2, 2])
    split = Split(np.array([5, 0, 1, 2, 3, 4]), np.array([0, 3, 3, 6]))
    description = describe(split, labels, 3)
    assert [share.histogram for share in description.shares] == [(2, 0, 1), (0, 0, 0), (0, 1, 2)]
    assert (description.clients, description.examples, description.smallest, description.largest) == (
        3,
        6,
        0,
        3,
    )
    assert (description.median, description.empty, description.classes_per_client) == (3.0, 1, 4 / 3)
    assert "3 clients hold 6 examples: 0 to 3 each" in shown(split, labels, 3)


def test_of_many_classes_the_most_frequent_are_shown() -> None:
    labels = np.repeat(np.arange(20), np.arange(1, 21))
    split = Split(np.arange(len(labels)), np.array([0, len(labels)]))
    assert "19:20 18:19 17:18 16:17 15:16 14:15 and 14 more" in shown(split, labels, 20)


def test_of_a_million_clients_the_first_and_last_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    labels = np.arange(2_000_000) % 10
    split = IID().split(labels, 1_000_000, 0)
    counted: list[int] = []
    indices = Split.indices

    def count(split: Split, client: int) -> NDArray[np.int64]:
        counted.append(client)
        return indices(split, client)

    monkeypatch.setattr(Split, "indices", count)
    description = describe(split, labels, 10)
    assert len(counted) == 20, "the others' examples are not looked at"
    clients = [share.client for share in description.shares]
    assert clients == [*range(10), *range(999_990, 1_000_000)]
    text = shown(split, labels, 10)
    assert "999,999" in text
    assert "…" in text
    assert "1,000,000 clients hold 2,000,000 examples" in text


def test_an_odd_limit_shows_no_client_twice() -> None:
    split = IID().split(np.zeros(5, int), 5, 0)
    for limit in range(1, 7):
        clients = [share.client for share in describe(split, np.zeros(5, int), 1, limit).shares]
        assert len(clients) == len(set(clients)) == min(5, limit)
