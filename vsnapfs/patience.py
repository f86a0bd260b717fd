"""Waiting for so long, counted in the time in which this process runs.

Stopped (SIGSTOP, a debugger, a frozen container) a process finds every time limit over when it goes
on, and what it has waited for may have happened long ago, or had no time to. That must not look
like a host, or a user, that takes long.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress

import trio

#: However late a wait of at most this many seconds ends: no more than so many count.
_TURN = 1.0
#: Seconds too few to be told apart from none on a clock that has run for years: rounding's rest.
_NONE = 1e-6


class Patience:
    """So many seconds, for one wait or several."""

    __slots__ = ("left",)

    def __init__(self, seconds: float) -> None:
        self.left = seconds

    async def wait(self, event: trio.Event) -> bool:
        """Wait for `event`. False: the patience is at its end."""
        while not event.is_set():
            if self.left < _NONE:
                return False
            began = trio.current_time()
            with trio.move_on_after(min(self.left, _TURN)):
                await event.wait()
            self.left -= min(trio.current_time() - began, _TURN)
        return True


@contextmanager
def patient_for(seconds: float) -> Iterator[None]:
    """As `trio.fail_after`, but counted so: TooSlowError once the patience is at its end."""
    ended = trio.Event()

    async def watch() -> None:
        # What it lacks memory for is the end of the wait, not of the server.
        with suppress(MemoryError):
            if await Patience(seconds).wait(ended):
                return
        scope.cancel()

    with trio.CancelScope() as scope:
        trio.lowlevel.spawn_system_task(watch)
        try:
            yield
        finally:
            ended.set()
    if scope.cancelled_caught:
        raise trio.TooSlowError
