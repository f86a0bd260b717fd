"""Schedules that a test decides: work stopped in the middle, and engines with one lock removed.

A `Pause` stops the worker thread that is about to do a chosen operation on a file of the simulated
host, and holds it there until told to go on. `edited` makes a copy of a function of the engine with
one line of it changed; a test that passes with that proves nothing about that line.
"""

from __future__ import annotations

import inspect
import sys
import textwrap
import threading
from types import TracebackType
from typing import Any, Self

import pytest
import trio
import trio.testing
from rig import Rig
from simdisk import SimBacking

#: Nothing that is going on takes this long. A pause that does is a test that has gone wrong.
SECONDS = 60


class _Standing:
    """How many threads stand in a `Pause`."""

    def __init__(self) -> None:
        self.count = 0
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        with self._lock:
            self.count += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self.count -= 1


_standing = _Standing()


class Pause:
    """Stops before the nth `operation` on file `name` from now on, in its worker thread.

    error: raised there when it goes on, instead of the operation. Leaving the context lets it go.
    """

    def __init__(
        self,
        rig: Rig,
        name: str,
        operation: str,
        *,
        nth: int = 1,
        at: tuple[int, int] | None = None,
        error: OSError | None = None,
    ) -> None:
        """at: only operations whose offset lies from the one (included) to the other."""
        self._host = rig.host
        self._what = name, operation
        self._at = at
        self._nth = nth
        self._seen = 0
        self._error = error
        self._reached = threading.Event()
        self._go = threading.Event()

    def __enter__(self) -> Self:
        self._host.hooks.append(self._hook)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._go.set()
        self._host.hooks.remove(self._hook)

    def _hook(self, backing: SimBacking, operation: str, offset: int, _length: int) -> None:
        if (backing.name, operation) != self._what:
            return
        if self._at is not None and not self._at[0] <= offset < self._at[1]:
            return
        self._seen += 1
        if self._seen != self._nth:
            return
        assert threading.current_thread() is not threading.main_thread(), "the loop would stop"
        self._reached.set()
        with _standing:
            assert self._go.wait(SECONDS), "never told to go on"
        if self._error is not None:
            raise self._error

    async def reached(self) -> None:
        """Return when a thread stands there."""
        with trio.fail_after(SECONDS):
            while not self._reached.is_set():  # noqa: ASYNC110 - set by another thread
                await trio.sleep(0.001)

    @property
    def was_reached(self) -> bool:
        """Whether a thread stands there or has."""
        return self._reached.is_set()

    def go(self) -> None:
        """Let it go on."""
        self._go.set()


class Doing:
    """Something under way in a nursery: its result, or its error, once it is done."""

    def __init__(self, nursery: trio.Nursery, work: Any) -> None:
        self.done = trio.Event()
        self.error: BaseException | None = None
        self.result: Any = None
        nursery.start_soon(self._run, work)

    async def _run(self, work: Any) -> None:
        try:
            self.result = await work
        except Exception as error:  # noqa: BLE001 - `ended` raises it
            self.error = error
        finally:
            self.done.set()

    @property
    def answered(self) -> bool:
        """Whether whoever asked has been told anything."""
        return self.done.is_set()

    async def ended(self) -> Any:
        """Wait for it; its result, or its error raised."""
        with trio.fail_after(SECONDS):
            await self.done.wait()
        if self.error is not None:
            raise self.error
        return self.result


async def all_stand_still() -> None:
    """Return when everything waits for something: what could have happened by now, has.

    Whoever waits for a thread counts as waiting, so wait for all threads that no `Pause` holds; but
    not for ever, since one may wait for another that is held.
    """
    threads, end = trio.to_thread.current_default_thread_limiter(), trio.current_time() + 1
    for _ in range(5):
        await trio.sleep(0.01)
        await trio.testing.wait_all_tasks_blocked(0.01)
        # ASYNC110: what happens in threads sets no event of ours.
        while threads.borrowed_tokens > _standing.count and trio.current_time() < end:  # noqa: ASYNC110
            await trio.sleep(0.001)


def edited(engine: pytest.MonkeyPatch, owner: type, name: str, old: str, new: str) -> None:
    """Replace `owner.name` by itself with `old`, which it must contain once, changed to `new`."""
    function = inspect.unwrap(getattr(owner, name))
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(old) == 1, f"{owner.__name__}.{name} has {source.count(old)} times {old!r}"
    namespace: dict[str, Any] = {}
    code = compile(source.replace(old, new), f"<{owner.__name__}.{name}, edited>", "exec")
    exec(code, vars(sys.modules[owner.__module__]), namespace)
    engine.setattr(owner, name, namespace[name])
