"""The file of a run with the cross-site matrix."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedddp.storage.history import Metric


@dataclass(frozen=True)
class CrossSite:
    """What each client's own model does on the data of every client."""

    round: int
    metric: Metric
    names: tuple[str, ...]
    """Of the C clients."""
    matrix: NDArray[np.float64]
    """(C, C): the model of the row on the data of the column; NaN where it is not known."""
    global_row: NDArray[np.float64] | None
    """(C,) of the global model; None where there is none."""


def of_metric(content: Mapping[str, Any], metric: str) -> dict[str, Any]:
    """Return the content of cross-site.json with another `metric` at its top, and all the others below."""
    others = dict(content["others"])
    if metric == content["metric"]:
        return dict(content)
    chosen = others.pop(metric)
    others[content["metric"]] = {"matrix": content["matrix"], "global": content["global"]}
    return {**content, "metric": metric, **chosen, "others": others}


def parse_cross_site(_: Path, content: Any) -> CrossSite:
    """Return the matrix of the content of cross-site.json.

    Raises:
        KeyError, TypeError, ValueError: it is not as `write_cross_site` writes it.
    """
    names = tuple(map(str, content["names"]))
    matrix = np.array(content["matrix"], dtype=float)
    whole = content["global"]
    row = None if whole is None else np.array(whole, dtype=float)
    if (
        not names
        or matrix.shape != (len(names), len(names))
        or (row is not None and row.shape != (len(names),))
    ):
        raise ValueError(f"its matrix {matrix.shape} is not of its {len(names)} names")
    return CrossSite(int(content["round"]), Metric(f"eval/{content['metric']}"), names, matrix, row)
