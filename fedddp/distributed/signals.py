"""Signals: a request to stop, for as long as a run lasts."""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedddp.distributed.world import World

SECOND_SIGINT_S = 2.0
"""A terminal and torchrun both forward one Ctrl-C: within these seconds it is the same one."""


_HELD: set[int] = set()  # the signals that came before a run listened to them


@contextlib.contextmanager
def stop_signals_held() -> Iterator[None]:
    """Keep SIGUSR1, SIGTERM and SIGHUP for the runs of the block: one that starts stops at a safe point.

    Without a handler they would end Python while it imports torch, or be lost where they are ignored.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    watched = _heeded(signal.SIGUSR1, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, lambda number, _: _HELD.add(number)) for number in watched}
    try:
        yield
    finally:
        _restore(before)
        _HELD.clear()


def _restore(handlers: dict[signal.Signals, Any]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)


def _heeded(*numbers: signal.Signals) -> list[signal.Signals]:
    """Return the signals but for SIGHUP where it is ignored, as under nohup."""
    return [n for n in numbers if n != signal.SIGHUP or signal.getsignal(n) is not signal.SIG_IGN]


@contextlib.contextmanager
def stop_on_signals(world: World) -> Iterator[None]:
    """Turn SIGUSR1, SIGTERM, SIGHUP and SIGINT into a request to stop at the next safe point.

    A second SIGINT, two seconds after the first, interrupts at once. A signal that is ignored, as SIGHUP
    under nohup, stays ignored. Does nothing outside the main thread (notebooks' workers).
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    first = [math.inf]

    def on_signal(number: int, _: object) -> None:
        if number == signal.SIGINT:
            first[0] = min(first[0], time.monotonic())
            if time.monotonic() - first[0] > SECOND_SIGINT_S:
                raise KeyboardInterrupt
            world.interrupted = True
        world.request_stop()

    watched = _heeded(signal.SIGUSR1, signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
    before = {number: signal.signal(number, on_signal) for number in watched}
    if _HELD:
        world.request_stop()
    try:
        yield
    finally:
        _restore(before)
