"""Callbacks: a program of the user's that is called while a run lasts."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn

from fedddp.rng import generators_kept
from fedddp.section import ConfigError

logger = logging.getLogger(__name__)

OnError = Literal["stop", "drop"]


class Callback:
    """Called by the coordinator while a run lasts; subclass it and override what you need.

    What a callback draws from the global random generators, or does to the model, does not change the run.
    """

    def on_run_start(self, config: Any, folder: Path) -> None:
        """Called before the first round, and again when the run is resumed.

        Args:
            config: the `Config` of the run.
            folder: the run directory.
        """

    def on_round_end(self, round: int, metrics: dict[str, Any], model: nn.Module) -> None:
        """Called when a round is recorded.

        Args:
            round: its number, from 1.
            metrics: its row, as in `history.jsonl`.
            model: the server's model after it, in evaluation mode, on the run's device.
        """

    def on_run_end(self, result: Any) -> None:
        """Called when the run has finished or was stopped, with its `Result`; not when it failed."""


@dataclass(frozen=True)
class Callbacks:
    """The callbacks of a run, and what happens when one raises."""

    members: Sequence[Callback] = ()
    on_error: OnError = "stop"

    def __call__(self, hook: str, *arguments: object) -> Callbacks:
        """Call the method `hook` of all, and return those that are left.

        Raises:
            Exception: what a callback raised, with a note that names it, unless `on_error` is "drop".
        """
        left: list[Callback] = []
        for callback in self.members:
            method: Callable[..., object] = getattr(callback, hook)
            try:
                with generators_kept():
                    method(*arguments)
            except Exception as error:
                name = f"{type(callback).__module__}.{type(callback).__qualname__}.{hook}"
                if self.on_error == "stop":
                    error.add_note(f"raised by the callback {name}; callback_errors=drop trains without it")
                    raise
                reason = str(error).strip().partition("\n")[0]
                logger.warning(
                    "the callback %s raised %s: %s; the run continues without it",
                    *(name, type(error).__name__, reason),
                )
            else:
                left.append(callback)
        return Callbacks(left, self.on_error)


def callbacks_of(given: Sequence[object], on_error: OnError) -> Callbacks:
    """Return the callbacks `given` as objects or by their dotted paths.

    Raises:
        ConfigError: one cannot be imported or made, or is no `Callback`.
    """
    members: list[Callback] = []
    for made in [_imported(one) if isinstance(one, str) else one for one in given]:
        if not isinstance(made, Callback):
            kind = made.__name__ if isinstance(made, type) else type(made).__name__
            hint = "; pass an object of it, not the class" if isinstance(made, type) else ""
            raise ConfigError(f"callbacks: {kind} is no fedddp.Callback; subclass it{hint}")
        members.append(made)
    return Callbacks(members, on_error)


def _imported(path: str) -> object:
    module, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
        return found() if isinstance(found, type) else found
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise ConfigError(
            f"callbacks: cannot make {path!r} ({error}); give the dotted path of an object, or of a class "
            "without arguments"
        ) from None
