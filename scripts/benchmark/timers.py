"""Time by part of a round: functions of the package, wrapped at run time.

A part's time is its own: what a wrapped function spends in another wrapped one counts there alone, so that
the parts add up to the round.
"""

from __future__ import annotations

import functools
import pkgutil
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from types import GeneratorType
from typing import Any

PARTS = (
    # part, name that is wrapped; in the order of a round
    ("sample, assign", "fedddp.training.synchronous.sample"),
    ("sample, assign", "fedddp.simulation.cohort.Assigner.assign"),
    ("send", "fedddp.training.session.Session.send"),
    ("around the steps", "fedddp.training.client_trainer.ClientTrainer.train"),
    ("batches", "fedddp.data.loader.ClientLoader.batches"),
    ("forward, loss", "fedddp.training.client_trainer.ClientTrainer._gradient"),
    ("forward, loss", "fedddp.models.traced.TracedModel.forward"),
    ("forward, loss", "fedddp.tasks.task.Task.loss_and_gradient"),
    ("forward, loss", "fedddp.tasks.classification.Classification.loss_and_gradient"),
    ("backward", "torch.Tensor.backward"),
    ("backward", "fedddp.models.traced.TracedModel.backward"),
    ("optimizer step", "fedddp.training.client_trainer.ClientTrainer.step"),
    ("admission check", "fedddp.aggregation.aggregation.Aggregation.admit"),
    ("sums", "fedddp.aggregation.mean.Sums.add"),
    ("aggregate", "fedddp.aggregation.mean.Sums.reduce"),
    ("server step", "fedddp.training.synchronous.step"),
    ("evaluation", "fedddp.training.session.Session.evaluate"),
    ("record", "fedddp.training.session.Session.record"),
)
"""A name that the package no longer has is an error. Where a module imports a function by name, its own name
is wrapped, since that one is called. The traced engine takes steps of plain SGD in the backward pass."""

OPAQUE = "evaluation"
"""What it calls counts as its own, batches for example."""

REST = "rest"
"""All that is in no part."""


def parts() -> list[str]:
    """Return the parts in their order."""
    return [*dict.fromkeys(part for part, _ in PARTS), REST]


def holder(path: str) -> tuple[Any, str]:
    """Return the class or module that holds the dotted name `path`, and the name within it.

    It exits with one line if there is no such name.
    """
    place, _, name = path.rpartition(".")
    try:
        owner = pkgutil.resolve_name(place)
        getattr(owner, name)
    except (ImportError, AttributeError, ValueError):
        sys.exit(f"error: fedddp has no {path} any more; correct the name in scripts/benchmark")
    return owner, name


class Timers:
    """A clock that is in one part at any time; parts are left and entered as functions are called."""

    def __init__(self) -> None:
        """Wrap the names of `PARTS`."""
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.calls: Counter[str] = Counter()
        self._within = [REST]
        self._since = time.perf_counter()
        self._thread = threading.get_ident()
        for part, path in PARTS:
            owner, name = holder(path)
            setattr(owner, name, self._timed(getattr(owner, name), part))

    def take(self) -> dict[str, Any]:
        """Return seconds and calls by part since the last time, and start from zero."""
        self._switch()
        taken = {"seconds": dict(self.seconds), "calls": dict(self.calls)}
        self.seconds.clear()
        self.calls.clear()
        return taken

    def _switch(self) -> None:
        """Give the time since the last switch to the part that the clock is in."""
        now = time.perf_counter()
        self.seconds[self._within[-1]] += now - self._since
        self._since = now

    def _run(self, part: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call `function` within `part`."""
        self._switch()
        self._within.append(part)
        try:
            return function(*args, **kwargs)
        finally:
            self._switch()
            self._within.pop()

    def _timed(self, function: Callable[..., Any], part: str) -> Callable[..., Any]:
        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            # Another thread's time passes beside the round.
            if threading.get_ident() != self._thread or self._within[-1] == OPAQUE:
                return function(*args, **kwargs)
            self.calls[part] += 1
            result = self._run(part, function, *args, **kwargs)
            return self._each(result, part) if isinstance(result, GeneratorType) else result

        return timed

    def _each(self, items: Iterator[Any], part: str) -> Iterator[Any]:
        """Yield `items`; making each is time of `part`, what is done with it is not."""
        ended = object()
        while (item := self._run(part, next, items, ended)) is not ended:
            yield item
