"""Labels of runs: the shortest that distinguish runs of different settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedddp.storage.judged import algorithm_of


def distinguish(runs: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> list[str]:
    """Return a label for each of the runs, such as "FedAvg, momentum 0".

    Args:
        runs: the settings of each run, with dotted keys; the key of a choice stands for its name.
        keys: the settings in which the runs may differ.

    Returns:
        The algorithm, or the baseline, and as few settings as distinguish the runs, in the order of `runs`.
        Runs that agree in all `keys` get the same label.
    """
    parts = [[algorithm_of(settings) or "run"] for settings in runs]
    others = [key for key in keys if key not in ("algorithm", "baseline")]
    names = {key: _spoken(key, others) for key in others}
    choices = {key for key in others if any(k.startswith(f"{key}.") for settings in runs for k in settings)}
    groups: dict[str, list[int]] = {}
    for index, (algorithm,) in enumerate(parts):
        groups.setdefault(algorithm, []).append(index)
    pending = [(group, others) for group in groups.values()]
    while pending:  # the setting that splits a group into most parts is added to the labels of the group
        group, left = pending.pop()
        values = {key: [repr(runs[index].get(key)) for index in group] for key in left}
        key = max(left, key=lambda key, values=values: len(set(values[key])), default=None)  # type: ignore[misc]
        if key is None or len(set(values[key])) < 2:
            continue
        smaller: dict[str, list[int]] = {}
        for index, value in zip(group, values[key], strict=True):
            parts[index].append(_text(names[key], runs[index].get(key), chosen=key in choices))
            smaller.setdefault(value, []).append(index)
        pending += [(members, [other for other in left if other != key]) for members in smaller.values()]
    return [", ".join(words) for words in parts]


def _spoken(key: str, keys: Sequence[str]) -> str:
    """Return a setting as words: its last one, and the one before where another setting has the same."""
    leaf = key.rsplit(".", 1)[-1]
    unique = sum(other.rsplit(".", 1)[-1] == leaf for other in keys) == 1
    return (leaf if unique else " ".join(key.split(".")[-2:])).replace("_", " ")


def _text(name: str, value: Any, *, chosen: bool) -> str:
    """Return a setting as words: "momentum 0.5", "no clip norm", "Dirichlet"."""
    if value is None or value is False:
        return f"no {name}"
    if value is True:
        return name
    if chosen:
        return _name(value)
    return f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"


def _name(value: Any) -> str:
    """Return the class's name of a dotted path."""
    return str(value).rsplit(".", 1)[-1]
