"""Messages from whichever rank sends first."""

from __future__ import annotations

import queue
import threading

from fedddp.distributed.world import World

POLL_S = 0.5


class Inbox:
    """A few numbers from each of the ranks that owe them, in the order in which they come.

    A thread waits for each, because gloo's own receive from any source does not notice that a rank
    died, and would keep the process from noticing signals.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self._came: queue.SimpleQueue[tuple[int, list[float] | Exception]] = queue.SimpleQueue()
        self._owed: dict[int, str] = {}  # rank -> what it is at

    def expect(self, rank: int, count: int, what: str) -> None:
        """Start to wait for `count` numbers of `rank` (`World.post`); `what` it is at is for errors."""
        self._owed[rank] = what

        def wait() -> None:
            try:
                self._came.put((rank, self.world.collect(count, rank)))
            except Exception as error:  # told by `next`, in the thread that can act on it
                self._came.put((rank, error))

        threading.Thread(target=wait, name=f"fedddp-inbox-{rank}", daemon=True).start()

    def has_come(self) -> bool:
        """Return whether `next` would not wait."""
        return not self._came.empty()

    def next(self) -> tuple[int, list[float]]:
        """Wait for the next message; return its rank and the numbers.

        Raises:
            RuntimeError: a rank that owes a message is gone.
        """
        while True:
            try:
                rank, message = self._came.get(timeout=POLL_S)  # a short sleep, so that signals are seen
            except queue.Empty:
                continue
            if isinstance(message, Exception):
                raise RuntimeError(f"no word from rank {rank}, {self._owed[rank]}") from message
            return rank, message
