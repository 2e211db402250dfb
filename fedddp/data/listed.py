"""What a dataset lists of its items without reading them: their labels, their owners, the classes."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Subset, TensorDataset

from fedddp.data.items import as_pair, read_item


def labels(dataset: Any, name: str) -> NDArray[np.int64]:
    """Return the class of every example, (examples,), from the dataset's own list if it has one.

    Raises:
        ValueError: a label is not an integer.
    """
    listed = None if getattr(dataset, "target_transform", None) else _listed_labels(dataset)
    if listed is not None:
        return listed
    found = np.empty(len(dataset), dtype=np.int64)
    for index in range(len(dataset)):
        where = f"{name}: example {index}"
        found[index] = label_of(as_pair(read_item(dataset, index, where), where)[1], where)
    return found


def label_of(value: Any, where: str) -> int:
    """Return a label as an integer: an integer, a truth value, a whole float, or an array of one of these.

    Raises:
        ValueError: it is none of these.
    """
    array = np.asarray(value)
    if array.size == 1 and array.dtype.kind in "iubf" and np.isfinite(array).all():
        number = int(array.reshape(()))
        if number == array.reshape(()) and -(2**63) <= number < 2**63:
            return number
    raise ValueError(f"{where} has the label {value!r}; give integers 0, 1, ... per class")


def _listed_labels(dataset: Any) -> NDArray[np.int64] | None:
    if isinstance(dataset, Subset):
        parent = _listed_labels(dataset.dataset)
        return None if parent is None else parent[np.asarray(dataset.indices)]
    if isinstance(dataset, TensorDataset):
        return _integers(dataset.tensors[1], len(dataset))
    for name in ("targets", "labels", "_labels"):
        found = _integers(getattr(dataset, name, None), len(dataset))
        if found is not None:
            return found
    for name in ("samples", "_samples"):
        pairs = getattr(dataset, name, None)
        if isinstance(pairs, list) and all(isinstance(p, tuple) and len(p) == 2 for p in pairs):
            return _integers([label for _, label in pairs], len(dataset))
    return None


def _integers(values: Any, count: int) -> NDArray[np.int64] | None:
    """Return `values` as integers (count,) if that is what they are, else None."""
    if values is None or callable(values):
        return None
    try:
        array = np.asarray(values)
    except ValueError:  # a list of lists of different lengths
        return None
    if array.shape == (count, 1):
        array = array[:, 0]
    if array.shape != (count,) or array.dtype.kind not in "iub":
        return None
    return array.astype(np.int64)


def class_names(dataset: Any) -> tuple[str, ...]:
    """Return the names of the classes, of the dataset's list `classes`; empty where it has none."""
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    named = getattr(dataset, "classes", None)
    return tuple(map(str, named)) if isinstance(named, list | tuple) else ()


def ids(dataset: Any, name: str) -> NDArray[Any] | None:
    """Return the natural owner of every example, a number or a name, if the dataset has `ids`."""
    if isinstance(dataset, Subset):
        parent = ids(dataset.dataset, name)
        return None if parent is None else parent[np.asarray(dataset.indices)]
    found = getattr(dataset, "ids", None)
    if found is None:
        return None
    owners = np.asarray(found)
    if owners.shape != (len(dataset),):
        raise ValueError(
            f"{name}: ids have shape {owners.shape}; give one for each of {len(dataset)} examples"
        )
    return owners
