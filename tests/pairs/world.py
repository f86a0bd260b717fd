"""A volume, what has been asked of it, and worker threads that can be stopped in the middle."""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar
from unittest import mock

import trio
import trio._core._run as trio_run
import trio.testing
from rig import (
    BLOCK,
    SMALLEST,
    Rig,
    pattern,
)
from simdisk import PowerLoss

from vsnapfs import patience
from vsnapfs.errors import FaultError, VsnapError
from vsnapfs.volume import Volume

T = TypeVar("T")
SIZE = 12 * BLOCK + 1000
#: Events that say which points are no more.
_LOST = (14, 33, 35, 58, 1011, 1022)
_LEAVE = ("abandon_on_cancel", "cancellable")


class Ended(BaseException):
    """The process is killed, or the machine has no power."""


@dataclass(eq=False)
class Stop:
    """At the nth call of a worker thread from now on (counted down), before or after its work."""

    nth: int
    before: bool
    go: trio.Event = field(default_factory=trio.Event)


class Threads:
    """Stands in for `trio.to_thread`: all in this thread, and stopped where a `Stop` says."""

    def __init__(self) -> None:
        self.stops: list[Stop] = []
        self._left: list[tuple[Stop, Callable[[], Any]]] = []

    async def run_sync(self, function: Callable[..., T], *args: Any, **options: Any) -> T:
        await trio.lowlevel.checkpoint()
        stop = None
        for one in self.stops:
            one.nth -= 1
            if one.nth == 0:
                stop = stop or one
        if stop is not None and stop.before:
            leave = any(options.get(name) for name in _LEAVE)
            try:
                with trio.CancelScope(shield=not leave):
                    await stop.go.wait()
            except trio.Cancelled:
                self._left.append((stop, lambda: function(*args)))
                raise
        try:
            return function(*args)
        finally:
            with trio.CancelScope(shield=True):
                if stop is not None and not stop.before:
                    await stop.go.wait()
                await trio.lowlevel.checkpoint()

    def go(self, stop: Stop) -> None:
        """Let it go on; a thread that nobody waits for any more ends its work now."""
        stop.go.set()
        for which, work in self._left:
            if which is stop:
                with contextlib.suppress(OSError, FaultError, PowerLoss):
                    work()


@dataclass(eq=False)
class Asked:
    """An operation that was asked for. ok: None as long as it has not been answered."""

    effect: tuple[Any, ...]
    start: int
    end: int | None = None
    ok: bool | None = None

    @property
    def kind(self) -> str:
        return str(self.effect[0])

    def __repr__(self) -> str:
        short = tuple(len(part) if isinstance(part, bytes) else part for part in self.effect)
        return f"{short} {self.start}-{self.end} {self.ok}"


Content = bytes | None  # None: a mixture of two states
Points = dict[int, Content]


class World:
    """A volume, and what has been asked of it."""

    def __init__(self, dice: random.Random, policy: str, buffer: int) -> None:
        self.dice = dice
        self.policy = policy
        self.rig = Rig(
            size=SIZE,
            maximum=SMALLEST + 12 * BLOCK,
            on_full=policy,
            buffer=buffer,
            grow_timeout=dice.choice([30.0, 600.0]),
        )
        self.history: list[Asked] = []
        self.created: set[int] = set()
        self.read: list[tuple[int, bytes]] = []
        self.threads = Threads()
        self.clock = trio.testing.MockClock()
        self.closed = False
        self.failing = False
        self.half_restored = 0
        self._time = self._written = 0

    def tick(self) -> int:
        self._time += 1
        return self._time

    def fresh(self, length: int) -> bytes:
        self._written += 1
        return pattern(self._written, length)

    def run(self, main: Callable[[], Awaitable[T]]) -> T:
        """One life of the process, or part of it."""
        trio_run._ALLOW_DETERMINISTIC_SCHEDULING = True
        trio_run._r.seed(self.dice.randrange(1 << 30))
        self.threads, self.clock = Threads(), trio.testing.MockClock()
        with (
            mock.patch.object(trio.to_thread, "run_sync", self.threads.run_sync),
            # A jump of the clock is time that the host takes, not one for which we are stopped.
            mock.patch.object(patience, "_TURN", math.inf),
        ):
            return trio.run(main, clock=self.clock)

    @contextlib.asynccontextmanager
    async def opened(self) -> AsyncIterator[Volume]:
        if self.rig.volume is None:
            self.rig.volume = await self.rig.open()
        volume = self.rig.volume
        async with trio.open_nursery() as nursery:
            await nursery.start(volume.run)
            yield volume
            nursery.cancel_scope.cancel()

    async def ask(self, work: Awaitable[Any], *effect: Any) -> None:
        """Wait for it; an answer that comes after the end of the process was given to nobody."""
        asked = Asked(effect, self.tick())
        self.history.append(asked)
        result, ok = None, True
        try:
            result = await work
        except (VsnapError, OSError):
            ok = False
        if self.rig.host.dead:
            return
        asked.ok, asked.end = ok, self.tick()
        if ok and asked.kind == "create":
            number = result.number
            assert number not in self.created, "a number is used twice"
            self.created.add(number)
            asked.effect = ("create", number)

    def lost(self) -> set[int]:
        """The points that the log says are gone."""
        return {
            number
            for _, event, params in self.rig.log.events
            if event in _LOST
            for number in params.get("points") or [params.get("point")]
        }
