"""Administrative operations: one at a time, in the order they came; and what a volume waits for.

Owns `admin_lock`'s queue (who has it and since when, who waits) and the list of what is being
waited for on the host. Promises: `turn` may be cancelled without a trace until `begin`; what
`status` shows of all this is read from memory, so a host that hangs can be told of.

    asked ── turn ──▶ running ── begin ──▶ begun ──▶ over
      └── its client goes: dropped ──┘       its client goes: it runs to its end
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any

import trio

from .. import beginning

#: What has been waited for so many seconds is worth a word; until then it is everyday work.
WORTH_SAYING = 2.0
# As many of those that wait as `status` names.
_NAMED = 100


def iso(time_ns: int) -> str:
    """A UTC time as `status` and the lists show it, e.g. 2026-11-22T07:20:00.123456Z."""
    seconds, rest = divmod(time_ns, 1_000_000_000)
    moment = datetime.fromtimestamp(seconds, UTC)
    return f"{moment:%Y-%m-%dT%H:%M:%S}.{rest // 1000:06d}Z"


class _Since:
    """Something that goes on, in words, and since when."""

    __slots__ = ("begun", "since", "started", "what")

    def __init__(self, what: str) -> None:
        self.what = what
        self.since = time.time_ns()
        self.started = time.monotonic()
        self.begun = False

    @property
    def seconds(self) -> float:
        """How long it has been going on; not affected by somebody who sets the clock."""
        return time.monotonic() - self.started

    def to_json(self) -> dict[str, Any]:
        return {"what": self.what, "since": iso(self.since), "seconds": round(self.seconds, 3)}


_mine: ContextVar[_Since | None] = ContextVar("mine", default=None)


class Administration:
    """The queue of the administrative operations of one open volume."""

    def __init__(self) -> None:
        self._admin_lock = trio.Lock()
        self._running: _Since | None = None
        # dicts as ordered sets; `_waits` is changed by worker threads, one step at a time.
        self._queue: dict[_Since, None] = {}
        self._waits: dict[_Since, None] = {}

    @asynccontextmanager
    async def turn(self, what: str) -> AsyncIterator[None]:
        """Wait until no other administrative operation is under way, then be the one.

        what: as a gerund, "restoring recovery point 3". A cancellation while waiting is clean.
        """
        operation = _Since(what)
        self._queue[operation] = None
        try:
            await self._admin_lock.acquire()
        except BaseException:
            # It may be ours: trio takes it, then gives way, and memory can run out there.
            with suppress(RuntimeError):
                self._admin_lock.release()
            raise
        finally:
            del self._queue[operation]
        try:
            token = _mine.set(operation)
            self._running = operation
            try:
                yield
            finally:
                _mine.reset(token)
        finally:
            self._running = None
            self._admin_lock.release()

    @staticmethod
    def begin() -> None:
        """The operation whose turn it is changes something from here on. beginning.Abandoned.

        To be called when nothing is left to wait for before the first change. Once is enough, more
        does no harm; nothing happens where no operation is asked for (an eviction by a write).
        """
        operation = _mine.get()
        if operation is not None and not operation.begun:
            beginning.begin()
            operation.begun = True

    @contextmanager
    def waits_for(self, what: str) -> Iterator[None]:
        """In the block something of the host is waited for; in any thread."""
        wait = _Since(what)
        self._waits[wait] = None
        try:
            yield
        finally:
            del self._waits[wait]

    def to_json(self) -> dict[str, Any]:
        """running: what is under way or null; waiting: in their order; waits_for: of the host."""
        running = self._running
        return {
            "running": running and running.to_json() | {"begun": running.begun},
            "waiting": [operation.to_json() for operation in list(self._queue)[:_NAMED]],
            "waits_for": [wait.to_json() for wait in list(self._waits)],
        }

    def in_words(self, *, host_only: bool = False) -> str:
        """What somebody who waits for this volume waits for, "" if for nothing worth saying.

        host_only: the operation under way is the asker's own.
        """
        waits = dict.fromkeys(_timed(wait) for wait in self._lasting())
        running = self._running
        if running is None or host_only:
            return " and ".join(waits)
        which = f", which waits for {' and '.join(waits)}" if waits else ""
        return f"{_timed(running)}{which}"

    def _lasting(self) -> list[_Since]:
        return [wait for wait in list(self._waits) if wait.seconds >= WORTH_SAYING]


def _timed(something: _Since) -> str:
    return f"{something.what} (since {iso(something.since)[11:19]}Z)"
