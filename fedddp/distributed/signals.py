"""Signals: a request to stop, for as long as a run lasts."""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
from collections.abc import Iterator

from fedddp.distributed.world import World

SECOND_SIGINT_S = 2.0
"""A terminal and torchrun both forward one Ctrl-C: within these seconds it is the same one."""


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

    stopping = (signal.SIGUSR1, signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
    watched = [s for s in stopping if s != signal.SIGHUP or signal.getsignal(s) is not signal.SIG_IGN]
    before = {number: signal.signal(number, on_signal) for number in watched}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
