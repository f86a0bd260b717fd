"""Short reads that wait for the disk: many of them share one way through a worker thread.

Owns the queue of reads whose data the host has not in its cache. A way through a thread costs more
than all the rest of a short read, so only a few go it at a time; the others wait, while the disk
has been asked for all of them. Whoever comes back answers what has arrived meanwhile, in order,
and its place goes to the first that has not. Promises:

* each read gets its own data or its own error: answering is the same look and read, in the trio
  thread, as when the data had been in the cache from the start;
* the first in the queue always moves on, whatever becomes of the others, and each comes first in
  its turn; one that is cancelled is taken out of the queue.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress

import trio

from ..backing import Bytes

#: Reads on their way through a thread. One is as fast; with two, a bad place on the disk, which can
#: take seconds, does not hold up everybody.
PLACES = 2


class _Waiting:
    """A read in the queue."""

    __slots__ = ("at_once", "data", "task")

    def __init__(self, at_once: Callable[[], Bytes | None]) -> None:
        self.at_once = at_once
        self.task = trio.lowlevel.current_task()
        self.data: Bytes | None = None


class ColdReads:
    """The queue of one volume."""

    def __init__(self) -> None:
        self._queue: deque[_Waiting] = deque()
        self._under_way = 0

    async def read(
        self, at_once: Callable[[], Bytes | None], from_disk: Callable[[], Awaitable[Bytes]]
    ) -> Bytes:
        """What `at_once` returns as soon as that is not None, or what `from_disk` does.

        Call it when `at_once` has just been None. The errors are those of `from_disk`.
        """
        if self._under_way < PLACES:
            self._under_way += 1
        else:
            waiting = _Waiting(at_once)
            self._queue.append(waiting)

            def abort(_: object) -> trio.lowlevel.Abort:
                # trio aborts no task that it is about to run: it has not been given a place.
                self._queue.remove(waiting)
                return trio.lowlevel.Abort.SUCCEEDED

            await trio.lowlevel.wait_task_rescheduled(abort)
            if waiting.data is not None:
                return waiting.data
        try:
            return await from_disk()
        finally:
            self._hand_on()

    def _hand_on(self) -> None:
        """Answer what has arrived, and let the first that has not take our place."""
        queue = self._queue
        while queue:
            first = queue[0]
            # Its own error, if there is one, it meets on its own way.
            with suppress(Exception):
                first.data = first.at_once()
            queue.popleft()
            trio.lowlevel.reschedule(first.task)
            if first.data is None:
                return
        self._under_way -= 1
