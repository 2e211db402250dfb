"""The items of a dataset: what reads one, and the line that names it where it cannot be read."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch.utils.data import IterableDataset


def read_item(dataset: Any, index: int, where: str) -> Any:
    """Return an item of a dataset; errors as for `naming`."""
    with naming(where):
        return dataset[index]


@contextlib.contextmanager
def naming(where: str) -> Iterator[None]:
    """Turn any error of a decoder, or of the user's own code, in the block into one line.

    Raises:
        ValueError: an item cannot be read; the message names it.
    """
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        if isinstance(error, ValueError) and where in str(error):  # a line of ours already
            raise
        text = " ".join(str(error).split())
        problem = text if isinstance(error, OSError | SyntaxError) else f"{type(error).__name__}: {text}"
        gone = isinstance(error, OSError) and error.errno
        fix = "bring its disk back and resume with --resume auto" if gone else "replace or delete it"
        raise ValueError(f"{where} cannot be read as an image ({problem}); {fix}") from error


def as_pair(item: Any, where: str) -> tuple[Any, Any]:
    """Return the image and the label in an item of a dataset.

    Raises:
        ValueError: it is no pair.
    """
    if isinstance(item, tuple | list) and len(item) == 2:
        return item[0], item[1]
    kind = type(item).__name__
    if isinstance(item, dict):
        kind = f"a dict with {', '.join(map(str, item))}"
    elif isinstance(item, tuple | list):
        kind = f"a {kind} of {len(item)}"
    raise ValueError(f"{where} is {kind}; a dataset must return (image, label) pairs")


def check_map_style(dataset: Any, name: str) -> None:
    """Refuse a dataset without a length and items by index.

    Raises:
        ValueError: it is iterable only, or no dataset at all.
    """
    indexed = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
    if not indexed or isinstance(dataset, IterableDataset):
        raise ValueError(
            f"{name} is not a map-style dataset; it needs __len__, and __getitem__ that"
            " returns (image, label) pairs"
        )
