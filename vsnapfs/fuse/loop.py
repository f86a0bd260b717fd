"""How requests are fetched: the descriptor is polled before the task that reads it parks in trio.

pyfuse3 takes a lock of trio's, parks in trio until the FUSE descriptor is readable, and only then
reads, for each request: two turns of trio's scheduler and several system calls, more than all the
rest of a small request. Yet under load the next request is nearly always there already. pyfuse3
has no hook for that, but finds trio through its module-level name `trio` (its own asyncio adapter
replaces it, too). While a session lives, that name is a `_Trio` here, with a lock and a
`wait_readable` of their own; all else in it is trio's.

Promises, as against pyfuse3 with the real trio (docs/architecture.md argues each):

* one task at a time waits for the descriptor and reads it, and while one can, one does;
* a task that waits for its turn is woken when the one that reads waits for anything else;
* every other task of the process gets its turn within `TURN_SECONDS` and one request, however
  many requests there are; so does a cancellation;
* the end (umount, `pyfuse3.terminate`) is noticed by every task that waits.

It is used only with versions of pyfuse3 whose loop was read and tried; with any other the plain
loop runs, and `note` says so. Leaves mounting, and the loop itself, to pyfuse3 and `session`.
"""

from __future__ import annotations

import os
import select
import time
from typing import TYPE_CHECKING

import pyfuse3
import trio

if TYPE_CHECKING:
    from types import TracebackType

TURN_SECONDS = 0.001
"""How long requests are fetched without a turn for other tasks.

Half of it cost a fourteenth of the throughput where workers are busy (first touch at depth 32);
twice as much won little more, and is what a cold read may have to wait beside a busy client.
"""

_OLDEST, _NEWEST = (3, 2), (3, 5)
_PLAIN = "VSNAPFS_PLAIN_LOOP"


class Loop:
    """The way one session fetches its requests. `install` before pyfuse3.init, `remove` at last."""

    def __init__(self) -> None:
        self._ours: _Trio | None = None
        self._unfit = ""

    def install(self) -> None:
        """Let pyfuse3 poll, if it is one that we know."""
        self._unfit = _unfit()
        if not self._unfit:
            self._ours = _Trio()
            # Before init: there pyfuse3 makes its lock; newer ones do at the first wait.
            _replace_trio(self._ours)

    def remove(self) -> None:
        """Give pyfuse3 its trio back."""
        if self._ours is not None:
            self._ours = None
            _replace_trio(trio)

    @property
    def polling(self) -> bool:
        """Whether requests have been fetched by polling."""
        return self._ours is not None and self._ours.lowlevel.used

    @property
    def note(self) -> str:
        """Why they are not; "" if there is nothing to say."""
        if self._unfit or self.polling:
            return self._unfit
        return "pyfuse3 does not use what was put in the place of its trio"


def _replace_trio(by: object) -> None:
    pyfuse3.trio = by  # type: ignore[attr-defined]


def _unfit() -> str:
    """Why the loop of this pyfuse3 must be left as it is, or ""."""
    if os.environ.get(_PLAIN):
        return f"{_PLAIN} is set"
    version = str(getattr(pyfuse3, "__version__", "of an unknown version"))
    try:
        major, minor = (int(part) for part in version.split(".")[:2])
    except ValueError:
        return f"pyfuse3 {version} has not been tried"
    if not _OLDEST <= (major, minor) <= _NEWEST:
        return f"pyfuse3 {version} has not been tried"
    expected = all(hasattr(pyfuse3, name) for name in ("_wait_fuse_readable", "_session_loop"))
    if not expected or getattr(pyfuse3, "trio", None) is not trio:
        return f"pyfuse3 {version} is not built as expected"
    return ""


class _Trio:
    """What pyfuse3 uses of the module `trio`, and nothing more. `Lock` is called once."""

    def __init__(self) -> None:
        self.lowlevel = _Lowlevel()
        self.Lock = self._lock
        self.open_nursery = trio.open_nursery
        self.ClosedResourceError = trio.ClosedResourceError

    def _lock(self) -> Turn:
        return self.lowlevel.turn


class _Lowlevel:
    """What pyfuse3 uses of `trio.lowlevel`."""

    def __init__(self) -> None:
        self.current_task = trio.lowlevel.current_task
        self.current_trio_token = trio.lowlevel.current_trio_token
        self.turn = Turn()
        self.used = False
        self._fd = -1
        self._poll = select.poll()
        self._closing = False

    async def wait_readable(self, fd: int) -> None:
        """Return when there is a request to read; at once, without a checkpoint, if there is one.

        The caller holds the lock, and has looked whether the session has ended, since it has last
        awaited anything. trio.ClosedResourceError after `notify_closing`.
        """
        if fd != self._fd:
            self._fd, self._poll, self.used = fd, select.poll(), True
            self._poll.register(fd, select.POLLIN)
        if self._poll.poll(0):
            return
        # Nothing is awaited between pyfuse3's look at the session and this parking, or
        # `notify_closing` could come in between and wake nobody.
        while True:
            await trio.lowlevel.wait_readable(fd)
            self.turn.taken()
            if self._closing:
                raise trio.ClosedResourceError("the session has been ended")
            # The kernel takes a request back when its caller is killed before we have read it. To
            # read then would block, and with it this whole process.
            if self._poll.poll(0):
                return

    def notify_closing(self, fd: int) -> None:
        """Wake whoever waits for `fd`: the session has ended."""
        self._closing = True
        trio.lowlevel.notify_closing(fd)


class Turn:
    """Whose turn it is to fetch a request: a lock that costs next to nothing while it is free.

    The task that has just fetched a request leaves with the lock free and one waiting task *woken*,
    that is, in trio's queue of tasks to run. It carries its request out. If it never has to wait
    for anything, it is back before trio runs, finds the lock free and fetches the next one. If it
    has to wait, trio runs the woken task, which finds the lock free and takes over.

    Invariant, between any two steps of trio: if the lock is free and tasks wait for it, another one
    is woken, and will look at the lock before it awaits anything. For a task begins to wait only
    while the lock is held, and whoever frees it wakes one unless one is woken already. (Only one:
    each that is woken for nothing costs some 3 µs.)
    """

    __slots__ = ("_held", "_next_pause", "_waiting", "_woken")

    def __init__(self) -> None:
        self._held = False
        self._woken = False
        self._waiting: list[trio.lowlevel.Task] = []
        self._next_pause = 0.0

    def taken(self) -> None:
        """All other tasks have just had their turn."""
        self._next_pause = time.monotonic() + TURN_SECONDS

    async def __aenter__(self) -> None:
        while self._held:
            await self._wait()
        self._held = True
        if time.monotonic() > self._next_pause:
            # Here, and not when parking: pyfuse3 has still to look whether the session has ended.
            # With the lock held, so that the task that is woken goes back to sleep.
            try:
                await trio.lowlevel.checkpoint()
            except BaseException:
                self._release()
                raise
            self.taken()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        self._release()

    def _release(self) -> None:
        self._held = False
        if self._waiting and not self._woken:
            self._woken = True
            # The last to come: it has the warmest buffers, and the others may stay cold.
            trio.lowlevel.reschedule(self._waiting.pop())

    async def _wait(self) -> None:
        task = trio.lowlevel.current_task()

        def abort(_: object) -> trio.lowlevel.Abort:
            # Only while it is not woken: trio aborts no task that it is about to run.
            self._waiting.remove(task)
            return trio.lowlevel.Abort.SUCCEEDED

        self._waiting.append(task)
        await trio.lowlevel.wait_task_rescheduled(abort)
        self._woken = False
        self.taken()
