"""Heartbeats: one error ends all ranks, and names the ranks that did not answer."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time

from fedddp.distributed.world import ERRORS, World

HEARTBEAT_S = 1.0
FOLLOW_S = 5.0
"""Seconds a rank has to notice by itself that another one failed; naming the silent ranks takes three."""


class Heartbeat:
    """The heartbeat of this rank, in the store that all ranks share.

    Its thread also ends this process when another rank reported an error and this one, in a long local
    training or waiting for a third, has not noticed by itself.
    """

    def __init__(self, world: World) -> None:
        """Start the thread."""
        self.world, self.store = world, world.store
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="fedddp-heartbeat", daemon=True)
        if world.size > 1:
            self._thread.start()

    def _beat(self) -> None:
        rank, failed_since, launcher = self.world.rank, None, os.getppid()
        while not self._end.wait(HEARTBEAT_S):
            if os.getppid() != launcher:
                if self.world.local_rank == 0:
                    print(
                        "error: the launcher of this rank is gone; resume with --resume auto", file=sys.stderr
                    )
                os._exit(1)
            with contextlib.suppress(RuntimeError):  # a slow store: the next beat counts
                # Before the beat, so that it is known of every rank whose beat is seen.
                self.store.set(f"fedddp/waits/{rank}", str(self.world.waiting))
                self.store.add(f"fedddp/heart/{rank}", 1)
                if self.world.first_to_fail is None and self.store.add(ERRORS, 0):
                    failed_since = failed_since or time.monotonic()
            if failed_since and time.monotonic() - failed_since > FOLLOW_S:
                os._exit(1)

    def name_absent(self, error: Exception) -> None:
        """Add a note to an `error` of communication that names the silent ranks; takes three heartbeats."""
        if not isinstance(error, RuntimeError) or self.world.size == 1:
            return
        with contextlib.suppress(RuntimeError):
            others = [rank for rank in range(self.world.size) if rank != self.world.rank]
            before = {rank: self.store.add(f"fedddp/heart/{rank}", 0) for rank in others}
            time.sleep(3 * HEARTBEAT_S)
            # Ranks that stopped waiting at the same moment as this one have left by now.
            there = [rank for rank in others if not self.store.check([f"fedddp/left/{rank}"])]
            absent = [rank for rank in there if self.store.add(f"fedddp/heart/{rank}", 0) == before[rank]]
            state = "no heartbeat (killed, stopped or hung)"
            if not absent and self.world.waiting:
                absent = [rank for rank in there if self.store.get(f"fedddp/waits/{rank}") == b"False"]
                state = "still in local training, data loading or file access"
            if absent:
                error.add_note(
                    f"rank {', '.join(map(str, absent))}: {state}; others waited for up to "
                    f"topology.timeout_s={self.world.timeout_s:g} s"
                )

    def stop(self) -> None:
        """Stop the thread."""
        self._end.set()
        if self._thread.is_alive():
            # A thread that is inside the store when the interpreter ends would abort the process.
            self._thread.join(timeout=2 * HEARTBEAT_S)
