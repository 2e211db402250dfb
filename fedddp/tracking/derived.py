"""What trackers get of a round besides its row: totals so far, numbers per class, the machine's state."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from fedddp.storage.history import direction, judged_by, plain, working_seconds
from fedddp.tracking.memory import gpu_bytes, resident_bytes

Row = dict[str, Any]

MOST_CLASSES = 20
"""Entries of a list, such as the recall of every class, that become a number each; longer lists do not."""


class DerivedMetrics:
    """Sums and best values over the rows of a run, those of earlier launches included."""

    def __init__(self, earlier: Iterable[Row] = (), best: str | None = None) -> None:
        """Add up the rows of `earlier` launches of the run, whose first `checkpoint.best` is `best`."""
        self._totals: dict[str, int | float] = {"total/bytes": 0, "total/time": 0.0}
        self._judged_by = best
        self.best: dict[str, float] = {}
        """`best/NAME` for each number `eval/NAME`, and the round of it as `best/NAME_round`; of a run that
        is judged by the mean over clients for that too, as `best/clients/NAME_mean`."""
        for row in earlier:
            self._add(plain(row))

    def numbers(self, row: Row) -> dict[str, int | float]:
        """Add a row; return its numbers, and those that are derived from it, without "round".

        Lists below `eval/` become `NAME/0`, `NAME/1`, ...; what is no finite number is left out.
        """
        row = plain(row)
        self._add(row)
        found: dict[str, int | float] = {
            key: value for key, value in row.items() if isinstance(value, int | float) and key != "round"
        }
        for key, values in row.items():
            if key.startswith("eval/") and isinstance(values, list) and len(values) <= MOST_CLASSES:
                found |= {f"{key}/{i}": v for i, v in enumerate(values) if isinstance(v, int | float)}
        return {**found, **self._totals, **machine(row)}

    def _add(self, row: Row) -> None:
        if row.get("train/examples") is not None:  # privacy.strict does not record them
            self._totals["total/examples"] = self._totals.get("total/examples", 0) + row["train/examples"]
        self._totals["total/bytes"] += (row.get("bytes/up") or 0) + (row.get("bytes/down") or 0)
        self._totals["total/time"] += working_seconds(row)
        if row.get("time/virtual") is not None:
            self._totals["total/virtual"] = self._totals.get("total/virtual", 0.0) + row["time/virtual"]
        judged = judged_by([row], self._judged_by)
        alone = judged.key if judged is not None and judged.of_clients else None
        for key, value in row.items():
            if (key.startswith("eval/") or key == alone) and isinstance(value, int | float):
                name = f"best/{key.removeprefix('eval/')}"
                sign = direction(key)
                if name not in self.best or sign * value > sign * self.best[name]:
                    self.best |= {name: value, f"{name}_round": row["round"]}


def machine(row: Row) -> dict[str, int | float]:
    """Return what the round of `row` made of the machine: `system/...` of the coordinator's process."""
    found: dict[str, int | float] = {"system/memory": resident_bytes()}
    gpu = gpu_bytes()
    if gpu is not None:
        found["system/gpu_memory"] = gpu
    idle, seconds = row.get("time/idle") or [], working_seconds(row)
    if idle and seconds > 0:
        found["system/idle"] = min(sum(idle) / len(idle) / seconds, 1.0)
    if row.get("train/examples") and row.get("time/train"):
        found["system/examples_per_s"] = row["train/examples"] / row["time/train"]
    return found
