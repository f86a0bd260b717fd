"""Operations on one volume at the same time, each stopped anywhere, against a model that looks on.

Owns the search that `t1_model/test_pairs.py` runs. A `Trial` is made from its seed alone: a scene
(a volume with a past), two to four operations, where each of them but the last is stopped, what
fails, how the volume's process ends. An operation is stopped at its nth call of a worker thread,
before or after the work itself, as a slow disk does it; what it has started (a growth, the carrying
out of the write buffer) counts as its own. The next one then runs as far as it can; then all go on.

The model is the history of what was asked, and what was answered when. `explained` looks for an
order of it, no answer before its question, that leads to what is there: the replica's content and
every point. A point that is missing must have been deleted or told lost. Afterwards the volume is
opened anew, shows the same, comes online, and works.
"""

from __future__ import annotations

import contextlib
import errno
import random
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import trio
import trio._core._run as trio_run
import trio.testing
from powercuts import by_dice, everything_kept, nothing_kept
from rig import (
    BLOCK,
    SMALLEST,
    MemoryLog,
    Rig,
    acknowledged,
    attempt,
    flush,
    pattern,
    read_point,
    read_points,
    read_replica,
    small_steps,
    write,
)
from simdisk import FOREVER, Host, PowerLoss, SimBacking

from vsnapfs.errors import FaultCode, FaultError, VsnapError
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
        with mock.patch.object(trio.to_thread, "run_sync", self.threads.run_sync):
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


# --- operations: each may be refused, and may find nothing to do ---------------------------------

Operation = Callable[[World, Volume], Awaitable[None]]


async def _write(
    w: World,
    volume: Volume,
    offset: int,
    length: int,
    *,
    durably: bool = False,
    zeros: bool = False,
) -> None:
    length = min(length, SIZE - offset)
    data = bytes(length) if zeros else w.fresh(length)
    kind = "write durably" if durably else "write"
    await w.ask(write(volume, offset, data, durably=durably), kind, offset, data)


def _writing(block: int, length: int, **options: bool) -> Operation:
    return lambda w, volume: _write(w, volume, block * BLOCK + 7, length, **options)


async def _several_writes(w: World, volume: Volume) -> None:
    async with trio.open_nursery() as nursery:
        for block in (1, 4, 5, 8, 11):
            nursery.start_soon(_write, w, volume, block * BLOCK + 3, BLOCK)


async def _create(w: World, volume: Volume) -> None:
    await w.ask(volume.create_point(), "create")


def _deleting(which: slice) -> Operation:
    async def delete(w: World, volume: Volume) -> None:
        for point in volume.points[which]:
            work = volume.delete_point(point.number, force=True)
            await w.ask(work, "delete", point.number)

    return delete


def _restoring(which: slice) -> Operation:
    async def restore(w: World, volume: Volume) -> None:
        for point in volume.points[which]:
            await w.ask(volume.restore(point.number, force=True), "restore", point.number)

    return restore


async def _grow(w: World, volume: Volume) -> None:
    await w.ask(volume.resize(SMALLEST + 64 * BLOCK), "resize")


async def _shrink(w: World, volume: Volume) -> None:
    if volume.core.area is not None:
        await w.ask(volume.resize(max(SMALLEST, volume.core.area.minimum_for_used)), "resize")


async def _offline(w: World, volume: Volume) -> None:
    await w.ask(volume.go_offline(), "offline")


async def _online(w: World, volume: Volume) -> None:
    half = volume.core.area is not None and volume.core.area.superblock.restoring
    await w.ask(volume.online(), *(("finish", w.half_restored) if half else ("online",)))


async def _give_up(w: World, volume: Volume) -> None:
    await w.ask(volume.online(give_up_recovery_points=True), "give up")


async def _read(w: World, volume: Volume) -> None:
    for point in volume.points:
        with contextlib.suppress(OSError):
            w.read.append((point.number, await read_point(volume, point.number, 3 * BLOCK)))


async def _close(w: World, volume: Volume) -> None:
    w.closed = True
    await w.ask(volume.close(), "close")


def _failing(file: str, operation: str | None, then: Operation, *, nth: int = 1) -> Operation:
    async def fail(w: World, volume: Volume) -> None:
        w.failing = True
        w.rig.host.fail(file, operation, errno.EIO, nth=nth)
        await then(w, volume)

    return fail


def _one_by_one(*operations: Operation) -> Operation:
    async def run(w: World, volume: Volume) -> None:
        for operation in operations:
            if not w.closed:
                await operation(w, volume)

    return run


async def _check(w: World, volume: Volume) -> None:
    await w.ask(volume.verify(), "verify")


async def _repair(w: World, volume: Volume) -> None:
    await w.ask(volume.repair(), "repair")


async def _flush(w: World, volume: Volume) -> None:
    await w.ask(flush(volume), "flush")


OPERATIONS: dict[str, Operation] = {
    "create": _create,
    "create twice": _one_by_one(_create, _create),
    "create, write": _one_by_one(_create, _writing(7, BLOCK)),
    "fill": _one_by_one(*(_create, _writing(0, SIZE)) * 3),
    "delete oldest": _deleting(slice(1)),
    "delete newest": _deleting(slice(-1, None)),
    "delete all": _deleting(slice(None)),
    "restore oldest": _restoring(slice(1)),
    "restore newest": _restoring(slice(-1, None)),
    "grow": _grow,
    "shrink": _shrink,
    "offline": _offline,
    "online": _online,
    "offline, online": _one_by_one(_offline, _online),
    "give up": _give_up,
    "offline, give up": _one_by_one(_offline, _give_up),
    "repair": _repair,
    "verify": _check,
    "read points": _read,
    "flush": _flush,
    "write durably": _writing(6, BLOCK, durably=True),
    "write where preserved": _writing(0, 500),
    "write where not": _writing(7, BLOCK),
    "write much": _writing(5, 5 * BLOCK),
    "write everything": _writing(0, SIZE),
    "write zeros": _writing(4, 4 * BLOCK, zeros=True),
    "several writes": _several_writes,
    "a copy fails": _failing("area", "write", _writing(8, BLOCK)),
    "a barrier fails": _failing("area", "sync", _writing(8, BLOCK)),
    "a commit fails": _failing("area", "write", _create, nth=2),
    "close": _close,
}


# --- scenes --------------------------------------------------------------------------------------

_plain = _one_by_one(
    *(_writing(0, SIZE), _create, _writing(4, 2 * BLOCK), _create, _writing(0, 4 * BLOCK), _flush)
)


async def _filled(w: World, volume: Volume, *, growable: bool, leave: int = 5) -> None:
    area = volume.core.need_area()

    def left() -> int:
        return area.slots.free + (0 if growable else area.growable_slots)

    await _plain(w, volume)
    while left() > leave + 1:
        await _create(w, volume)
        await _write(w, volume, 0, min(12, left() - leave) * BLOCK)
    await _create(w, volume)


async def _stuck(w: World, volume: Volume) -> None:
    await _plain(w, volume)
    if w.policy == "offline":
        w.rig.host.fail("area", "sync", errno.EIO)
    await _writing(7, BLOCK)(w, volume)
    await _flush(w, volume)


async def _half_restored(w: World, volume: Volume) -> None:
    await _plain(w, volume)
    w.half_restored = 1
    w.rig.host.fail("replica", "write", errno.EIO, nth=2)
    await _restoring(slice(1))(w, volume)


_shrinkable = _one_by_one(
    _plain,
    *(_create, _writing(0, SIZE)) * 2,
    *(_deleting(slice(1)),) * 3,
    _create,
)

SCENES: dict[str, Operation] = {
    "plain": _plain,
    "nearly full": lambda w, volume: _filled(w, volume, growable=False),
    "about to grow": lambda w, volume: _filled(w, volume, growable=True),
    "no point": _writing(0, SIZE),
    "offline": _one_by_one(_plain, _offline),
    "offline by a fault": _stuck,
    "half restored": _half_restored,
    "high copies": _shrinkable,
}


# --- the model -----------------------------------------------------------------------------------


def _applied(
    asked: Asked, content: Content, points: Points, ever: Points
) -> tuple[Content, Points]:
    """What an operation does. ever: all points there have been."""
    kind, *what = asked.effect
    if kind in ("write", "write durably") and content is not None:
        offset, data = what
        content = content[:offset] + data + content[offset + len(data) :]
    elif kind == "create":
        number = what[0] if what else 1 + max(ever, default=0)
        ever[number] = content
        points = points | {number: content}
    elif kind == "delete":
        points = {number: kept for number, kept in points.items() if number != what[0]}
    elif kind == "restore" or (kind == "finish" and what[0] in points):
        # One that was interrupted ends with `online`, or never: the point can be deleted by force.
        content = None if asked.ok is False else ever.get(what[0])
    elif kind == "give up":
        points = {}
    return content, points


_EITHER = ("write durably", "restore", "delete", "give up")


def _chosen(asked: Asked) -> tuple[bool, ...]:
    if asked.ok is not None and asked.kind not in _EITHER:
        return (asked.ok,)
    return (True,) if asked.ok else (True, False)


def _ends(base: tuple[Content, Points], history: list[Asked]) -> Iterator[tuple[Any, ...]]:
    """What all orders of it lead to: the replica's content, the points, all points there were.

    Where two orders meet they go on as one, or a handful of writes at a time would be too many.
    """
    content, points = base[0], frozenset(base[1].items())
    states = {(frozenset(history), content, points, points)}
    for _ in history:
        after = set()
        for left, content, points, ever in states:
            for asked in left:
                if any(one.end is not None and one.end < asked.start for one in left):
                    continue  # That one was answered before this one was asked for.
                for done in _chosen(asked):
                    known, then = dict(ever), (content, dict(points))
                    if done:
                        then = _applied(asked, content, dict(points), known)
                    kept = frozenset(then[1].items()), frozenset(known.items())
                    after.add((left - {asked}, then[0], *kept))
        states = after
    return ((content, dict(points), dict(ever)) for _, content, points, ever in states)


@dataclass
class Seen:
    """What a volume shows. content: None if it need not be what was acknowledged."""

    content: Content
    points: dict[int, bytes]
    online: bool
    fault: FaultCode | None

    def differs(self, points: Points, ever: Points, quietly: Callable[[int], bool]) -> str:
        for number, found in self.points.items():
            wanted = ever.get(number)
            if wanted is not None and wanted != found:
                return f"point {number} differs"
        for number in points:
            if number not in self.points and not quietly(number):
                return f"point {number} is lost without a word"
        return ""


def explained(w: World, base: tuple[Content, Points], seen: Seen, *, killed: bool = False) -> None:
    """AssertionError unless some order of all that was asked leads to what is seen."""
    effective = [one for one in w.history if one.kind in ("write", "create", "finish", *_EITHER)]
    lost, unknown = w.lost(), 1 + max([*w.created, *base[1], 0])
    given_up = w.failing and any(one.kind == "give up" for one in effective)

    def quietly(number: int) -> bool:
        return number in lost or given_up or (killed and number == unknown)

    wrong: Counter[str] = Counter()
    for content, points, ever in _ends(base, effective):
        differs = seen.differs(points, ever, quietly)
        if seen.content is not None and content is not None and seen.content != content:
            differs = "the replica differs"
        for number, found in w.read:
            if ever.get(number, found) not in (None, found):
                differs = f"point {number} was read wrong"
        if not differs:
            return
        wrong[differs] += 1
    raise AssertionError(f"{dict(wrong)} in {w.history}, lost: {lost}")


# --- a trial -------------------------------------------------------------------------------------


class _Files:
    """Where giving up looks for the diff area."""

    def __init__(self, w: World) -> None:
        self.w = w

    def open(self, _path: Path, *, follow: bool) -> SimBacking:
        del follow
        return self.w.rig.host.open("area")


class Trial:
    """See the module's note. Whatever is not given is chosen by the seed."""

    def __init__(self, seed: int, **given: Any) -> None:
        self.seed = seed
        dice = self.dice = random.Random(seed)
        pick: dict[str, Any] = {
            "policy": dice.choice(["offline", "evict"]),
            "buffer": dice.choice([0, 64 << 10]),
            "scene": dice.choice(list(SCENES)),
            "operations": dice.choices(list(OPERATIONS), k=dice.choice([2, 2, 2, 3, 3, 4])),
            "stops": [(dice.randint(1, dice.choice([7, 20])), dice.random() < 0.5) for _ in "123"],
            "backwards": dice.random() < 0.5,
            "seconds": dice.choice([0, 0, 0, 0, 11, 35, 700]),
            "reopen": dice.random() < 0.25,
            "end": dice.choice(["close", "kill", "power", "kill at once", "power at once"]),
            "kept": dice.choice(["nothing", "everything", "dice"]),
            "failure": None,
        }
        if dice.random() < 0.35:
            file = dice.choice(["area", "area", "state", "replica"])
            operation = dice.choice(["write", "sync", "read", "allocate", None])
            number = dice.choice([errno.EIO, errno.EIO, errno.ENOSPC])
            when = dice.randint(1, 5), dice.choice([1, 1, FOREVER])
            pick["failure"] = (dice.randrange(2), file, operation, number, *when)
        self.chosen = pick | given
        self.w = World(dice, self.chosen["policy"], self.chosen["buffer"])

    def __repr__(self) -> str:
        return f"Trial({self.seed}, **{self.chosen})"

    def run(self) -> None:
        """AssertionError, or what else goes wrong, with all that was chosen in a note."""
        try:
            with (
                small_steps(),
                mock.patch("vsnapfs.volume.giveup.FileBacking", _Files(self.w)),
            ):
                self._run()
        except BaseException as error:
            while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
                error = error.exceptions[0]
            error.add_note(f"{self!r}\n{self.w.history}")
            raise error from None

    def _run(self) -> None:
        w, rig = self.w, self.w.rig
        base = self._set_up()
        seen = ended = None
        try:
            seen = w.run(lambda: self._together(base))
        except BaseException:
            if not rig.host.dead:
                raise
            ended = self._next
        if ended is not None:
            rig.host, rig.volume = ended, None
        elif w.closed:
            rig.volume = None
        elif self.chosen["end"].startswith("power"):
            rig.crashed(self._choose())
        elif self.chosen["end"].startswith("kill"):
            rig.killed()
        else:
            w.run(self._close)
            rig.volume = None
        rig.host.failures.clear()
        w.run(lambda: self._again(base, seen))

    def _set_up(self) -> tuple[Content, Points]:
        """Returns the replica's content, and the points."""
        w = self.w

        async def scene() -> None:
            async with w.opened() as volume:
                await SCENES[self.chosen["scene"]](w, volume)
                await _settle()

        w.run(scene)
        w.rig.host.failures.clear()
        if self.chosen["reopen"]:
            w.run(self._close)
            w.rig.volume = None
        content: Content = bytes(SIZE)
        points: Points = {}
        for asked in w.history:
            if asked.ok:
                content, points = _applied(asked, content, points, dict(points))
        lost = w.lost()
        w.history.clear()
        kept = {number: known for number, known in points.items() if number not in lost}
        return None if w.half_restored else content, kept

    async def _close(self) -> None:
        async with self.w.opened() as volume:
            await volume.close()

    def _choose(self) -> Any:
        by = {"nothing": nothing_kept, "everything": everything_kept}
        return by.get(self.chosen["kept"]) or by_dice(self.dice.choice)

    async def _together(self, base: tuple[Content, Points]) -> Seen | None:
        w, chosen = self.w, self.chosen
        names, host = chosen["operations"], w.rig.host
        ended = [trio.Event() for _ in names]

        async def one(name: str, done: trio.Event) -> None:
            if not w.closed:
                await OPERATIONS[name](w, volume)
            done.set()

        async with w.opened() as volume:
            async with trio.open_nursery() as nursery:
                for place, name in enumerate(names):
                    if chosen["failure"] and chosen["failure"][0] == place:
                        w.failing = True
                        _, file, operation, number, nth, times = chosen["failure"]
                        host.fail(file, operation, number, nth=nth, times=times)
                    if place + 1 < len(names):
                        w.threads.stops.append(Stop(*chosen["stops"][place]))
                    nursery.start_soon(one, name, ended[place])
                    await _settle()
                    if chosen["seconds"] and place == len(names) - 1:
                        w.clock.jump(chosen["seconds"])
                        await _settle()
                stops = w.threads.stops
                if chosen["end"].endswith("at once"):
                    self._end_now()
                for stop in reversed(stops) if chosen["backwards"] else stops:
                    w.threads.go(stop)
                    await _settle()
                for _ in range(12):
                    if all(done.is_set() for done in ended):
                        break
                    w.clock.jump(61)
                    await _settle()
                hanging = [
                    name for name, done in zip(names, ended, strict=True) if not done.is_set()
                ]
                assert not hanging, "never answered"
            host_lost = any(
                failure.fired and failure.name == "replica" for failure in host.failures
            )
            host.failures.clear()
            if w.closed:
                return None
            await _settle()
            self._is_at_rest(volume)
            seen = await self._look(volume, base)
            if host_lost or volume.core.replica_failed:
                seen.content = None
            explained(w, base, seen)
            return seen

    def _end_now(self) -> None:
        """What is written to shared memory from here on is written by nobody."""
        host, memory = self.w.rig.host, self.w.rig.host.memory
        kill = self.chosen["end"].startswith("kill")
        self._next: Host = host.kill() if kill else host.power_failure(self._choose())
        if kill:
            self._next.memory = {name: bytearray(ring) for name, ring in memory.items()}
        for stop in self.w.threads.stops:
            self.w.threads.go(stop)
        raise Ended

    def _is_at_rest(self, volume: Volume) -> None:
        core, protection = volume.core, volume.protection
        volume.check_invariants()
        assert not core.gate.closed
        assert not core.area_lock.locked()
        assert not core.grow_lock.locked()
        assert not core.shape_lock.locked()
        assert not protection.restoring
        if protection.is_online and not volume.buffer.pending:
            assert not volume.room.promised, "slots that nobody uses"
        switched = any(one.kind in ("offline", "give up") for one in self.w.history)
        known = self.w.failing or self.chosen["seconds"] or switched
        if not known and self.chosen["scene"] not in (
            "offline",
            "offline by a fault",
            "half restored",
        ):
            fault = protection.fault
            full = fault is not None and fault.code is FaultCode.DIFF_AREA_FULL
            assert protection.is_online or (full and self.w.policy == "offline"), fault

    async def _look(self, volume: Volume, base: tuple[Content, Points]) -> Seen:
        w, points = self.w, {}
        volume.status()
        for point in volume.points:
            try:
                points[point.number] = await read_point(volume, point.number)
            except OSError:  # A new area had been begun in its place.
                assert w.failing
                assert any(one.kind == "give up" for one in w.history)
        area, fault = volume.core.area, volume.protection.fault
        mixture = area is None or area.superblock.restoring or base[0] is None
        content = None if mixture else acknowledged(w.rig, volume)
        code = fault.code if fault is not None else None
        return Seen(content, points, volume.protection.is_online, code)

    async def _again(self, base: tuple[Content, Points], before: Seen | None) -> None:
        """Opened once more: what there was, and it works."""
        w = self.w
        power = self.chosen["end"].startswith("power")
        asked = {one.kind for one in w.history}
        lost = w.lost()
        async with w.opened() as volume:
            await _settle()
            volume.check_invariants()
            seen = await self._look(volume, base)
            if power or w.failing:
                seen.content = None
            if before is None:
                explained(w, base, seen, killed=True)
            elif not w.failing:
                assert seen.points == before.points
                assert (seen.online, seen.fault) == (before.online, before.fault)
                if None not in (seen.content, before.content):
                    assert seen.content == before.content
            else:
                for number, content in before.points.items():
                    if number not in seen.points:  # What failed may have happened all the same.
                        told = w.lost() if not before.online else lost
                        assert number in told or asked & {"delete", "give up"}, f"{number} is lost"
                    else:
                        assert seen.points[number] == content
            w.rig.log = MemoryLog()
            await self._works(volume, seen.points, must="give up" not in asked and not w.failing)

    async def _works(self, volume: Volume, points: dict[int, bytes], *, must: bool) -> None:
        w, used = self.w, max(self.w.created, default=0)
        error = await attempt(volume.online())
        if error is not None:
            assert not must, error
            await volume.online(give_up_recovery_points=True)
            points = {}
        await volume.resize(SMALLEST + 200 * BLOCK)
        for turn in range(3):
            number = (await volume.create_point()).number
            assert number > used, "a number is used twice"
            points[number] = bytes(await read_replica(volume))
            await write(volume, 0, pattern(9000 + turn, SIZE))
            await flush(volume)
        await _settle()
        volume.check_invariants()
        assert await read_points(volume) == points
        found = [one["message"] for one in (await volume.verify())["problems"]]
        assert all("healed when" in message for message in found), found
        assert w.rig.volume is volume
        await volume.close()


async def _settle() -> None:
    for _ in range(3):
        await trio.testing.wait_all_tasks_blocked()
