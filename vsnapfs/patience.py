"""Waiting for so long, counted in the time in which this process runs.

Stopped (SIGSTOP, a debugger, a frozen container) a process finds every time limit over when it goes
on, and what it has waited for may have happened long ago, or had no time to. That must not look
like a host, or a user, that takes long.
"""

from __future__ import annotations

import trio

#: However late a wait of at most this many seconds ends: no more than so many count.
_TURN = 1.0


class Patience:
    """So many seconds, for one wait or several."""

    __slots__ = ("left",)

    def __init__(self, seconds: float) -> None:
        self.left = seconds

    async def wait(self, event: trio.Event) -> bool:
        """Wait for `event`. False: the patience is at its end."""
        while not event.is_set():
            if self.left <= 0:
                return False
            began = trio.current_time()
            with trio.move_on_after(min(self.left, _TURN)):
                await event.wait()
            self.left -= min(trio.current_time() - began, _TURN)
        return True
