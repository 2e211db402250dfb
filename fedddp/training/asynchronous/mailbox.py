"""Messages from the ranks that send first."""

from __future__ import annotations

import queue
import threading

from fedddp.distributed.world import World

POLL_S = 0.5
"""Seconds between two checks for signals while the coordinator waits for a message."""


class Mailbox:
    """One message of numbers from each rank that owes one, in the order of arrival.

    A thread waits for each, because gloo's own receive from any source does not notice that a rank
    died, and would keep the process from noticing signals.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self._arrived: queue.SimpleQueue[tuple[int, list[float] | Exception]] = queue.SimpleQueue()
        self._expected: dict[int, str] = {}  # rank -> its work

    def expect(self, rank: int, count: int, work: str) -> None:
        """Start to wait for `count` numbers of `rank` (`World.post`); errors name its `work`."""
        self._expected[rank] = work

        def wait() -> None:
            try:
                self._arrived.put((rank, self.world.collect(count, rank)))
            except Exception as error:  # raised by `next`, in the main thread
                self._arrived.put((rank, error))

        threading.Thread(target=wait, name=f"fedddp-mailbox-{rank}", daemon=True).start()

    def has_message(self) -> bool:
        """Return whether `next` would not wait."""
        return not self._arrived.empty()

    def next(self) -> tuple[int, list[float]]:
        """Wait for the next message; return its rank and the numbers.

        Raises:
            RuntimeError: a rank that owes a message is gone.
        """
        while True:
            try:
                rank, message = self._arrived.get(timeout=POLL_S)
            except queue.Empty:
                continue
            if isinstance(message, Exception):
                raise RuntimeError(f"no message from rank {rank}, {self._expected[rank]}") from message
            return rank, message
