"""Hostile files: mutations of real diff areas and state files, and what must hold for each.

Owns the judge; `mutations` has the volumes and the ways to change their files, `ring_mutations` the
same for a ring with acknowledged writes, and for the names that superblock and state file have for
it. Two kinds of case exist:

* *rot*: bytes change as a disk, a careless copy or an old backup changes them, and no checksum is
  made to fit. Then every block of every recovery point reads exactly right or is EIO; `verify`
  names all that does not read; `repair` loses nothing that read before, and says "ok" only if
  everything reads.
* *forged*: values change and the checksums are computed anew, as only somebody does who means it.
  He could as well write other content (docs/security.md), so what is demanded is that nothing but
  an error comes of it: no crash, no hang, no memory blow-up, whatever is asked of the volume.

A case is a seed and a number, nothing else is random: `case(base_of…, seed, number)` again gives
the same one. Used by tests/t2_failures/test_hostile_files.py and `scripts/fuzz-files`.
"""

from __future__ import annotations

import json
import random
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

import ring_mutations
import trio
from mutations import Base, Mutator
from rig import BLOCK, SMALLEST, Rig, attempt, pattern, raw_replica, write

from vsnapfs.errors import VsnapError
from vsnapfs.volume import Volume

CPU_SECONDS = 10.0
MEMORY = 96 << 20


class Violation(AssertionError):
    """A mutation that the engine did not survive as it must."""


class _Hang(BaseException):
    """The time is up. No Exception: nothing may catch it."""


def _split(content: bytes) -> list[bytes]:
    return [content[at : at + BLOCK] for at in range(0, len(content), BLOCK)]


async def _read(volume: Volume, number: int) -> list[bytes | None]:
    """The blocks of a point; None where it is EIO."""
    handle = volume.open_point(number)
    try:
        blocks: list[bytes | None] = []
        # All at once first: most of the time it works.
        if volume.size <= 1 << 20:
            try:
                return [*_split(bytes(await handle.read(0, volume.size)))]
            except OSError:
                pass
        for at in range(0, min(volume.size, 64 * volume.block_size), volume.block_size):
            try:
                blocks.append(bytes(await handle.read(at, volume.block_size)))
            except OSError as error:
                if error.errno != 5:
                    raise
                blocks.append(None)
        return blocks
    finally:
        handle.close()


class Judge:
    """What must hold after a mutation."""

    def __init__(self, base: Base, *, forged: bool, dry: bool) -> None:
        self.base = base
        self.forged = forged
        self.dry = dry
        self.readable: dict[int, list[bool]] = {}

    async def _points(self, volume: Volume) -> dict[int, list[bytes | None]]:
        found = {}
        for point in volume.points:
            found[point.number] = await _read(volume, point.number)
            if self.forged:
                continue
            expected = self.base.contents.get(point.number)
            if expected is None:
                raise Violation(f"recovery point {point.number} never was")
            for block, (got, right) in enumerate(
                zip(found[point.number], _split(expected), strict=True)
            ):
                if got is not None and got != right:
                    raise Violation(f"point {point.number} block {block} reads wrong")
        return found

    def _all_is_told(
        self, points: dict[int, list[bytes | None]], problems: list[dict[str, Any]], who: str
    ) -> None:
        """Every block that does not read lies in a range that is named for its point."""
        for number, blocks in points.items():
            for block, content in enumerate(blocks):
                if content is None and not any(
                    number in problem["points"]
                    and any(
                        start <= block * BLOCK < start + length
                        for start, length in problem["ranges"]
                    )
                    for problem in problems
                ):
                    raise Violation(f"{who} does not tell of point {number} block {block}")

    async def first(self, volume: Volume) -> None:
        """After opening: look at everything, then repair it."""
        json.dumps(volume.status())
        before = await self._points(volume)
        report = await _verify(volume)
        json.dumps(report)
        dry = await volume.repair(dry_run=True) if self.dry else {"found": []}
        repaired = await volume.repair()
        json.dumps([dry, repaired])
        after = await self._points(volume)
        if self.forged:
            await self._use(volume)
            return
        self._all_is_told(before, report["problems"], "verify")
        self._all_is_told(after, repaired["beyond_repair"], "repair")
        if any(finding["done"] for finding in dry["found"] if finding["when"] == "now"):
            raise Violation("a dry run did something")
        self._not_worse(before, after)
        if repaired["ok"]:
            lost = [n for n, blocks in after.items() if None in blocks]
            if lost:
                raise Violation(f"repair says ok, points {lost} do not read")
            again = await _verify(volume)
            rest = [p for p in again["problems"] if "healed when" not in p["message"]]
            if rest:
                raise Violation(f"repair says ok, verify finds {rest[:3]}")
        self.readable = {n: [b is not None for b in blocks] for n, blocks in after.items()}
        self.ok = repaired["ok"]

    def _not_worse(
        self, before: dict[int, list[bytes | None]], after: dict[int, list[bytes | None]]
    ) -> None:
        for number, blocks in before.items():
            for block, content in enumerate(blocks):
                if content is not None and after[number][block] != content:
                    raise Violation(f"point {number} block {block} read before the repair")

    async def second(self, volume: Volume) -> None:
        """After closing and opening once more: what read still reads."""
        points = await self._points(volume)
        if self.forged:
            return
        for number, blocks in self.readable.items():
            for block, readable in enumerate(blocks):
                if readable and (number not in points or points[number][block] is None):
                    raise Violation(f"point {number} block {block} reads no more when reopened")
        report = await _verify(volume)
        if self.ok and not report["ok"]:
            raise Violation(f"repaired, closed and opened: verify finds {report['problems'][:3]}")

    async def _use(self, volume: Volume) -> None:
        """Everything that can be asked of a volume; errors are answers."""
        await attempt(_as_work(volume.online))
        await attempt(_as_work(lambda: write(volume, 100, b"x" * 9000)))
        await attempt(_as_work(lambda: volume.create_point("after")))
        await attempt(_as_work(lambda: write(volume, 5000, b"y" * 9000)))
        for point in volume.points[:2]:
            await attempt(_as_work(lambda p=point: volume.restore(p.number, force=True)))
        for point in volume.points[:3]:
            await attempt(_as_work(lambda p=point: volume.delete_point(p.number, force=True)))
        await attempt(_as_work(lambda: volume.resize(SMALLEST + 20 * BLOCK)))
        await attempt(_as_work(lambda: volume.resize(SMALLEST)))
        await attempt(_as_work(lambda: write(volume, 0, b"z" * 30000)))
        volume.status()


async def _at_once(function: Callable[..., Any], *args: Any, **_options: Any) -> Any:
    """Stands in for threads; nothing else runs beside a case, so nothing has to be let in."""
    return function(*args)


async def _verify(volume: Volume) -> dict[str, Any]:
    try:
        return await volume.verify()
    except VsnapError as error:
        if error.code != "no-diff-area":
            raise
        return {"ok": False, "problems": [{"message": str(error), "points": [], "ranges": []}]}


async def _as_work(function: Callable[[], Any]) -> Any:
    """What raises before the first await raises inside."""
    return await function()


def _is_hang(error: BaseException) -> bool:
    """Also in a group, and as the cause of what an event loop makes of it in its own code."""
    if isinstance(error, BaseExceptionGroup) and any(map(_is_hang, error.exceptions)):
        return True
    return isinstance(error, _Hang) or (error.__cause__ is not None and _is_hang(error.__cause__))


@contextmanager
def limits() -> Iterator[None]:
    """CPU time and memory of one case. Virtual time: a busy machine is no hang."""

    def up(_signal: int, _frame: FrameType | None) -> None:
        raise _Hang

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    handler = signal.signal(signal.SIGVTALRM, up)
    signal.setitimer(signal.ITIMER_VIRTUAL, CPU_SECONDS)
    try:
        yield
    except BaseException as error:
        if _is_hang(error):
            raise Violation(f"took more than {CPU_SECONDS:g} s of CPU time") from None
        raise
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, handler)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    if grown * 1024 > MEMORY:
        raise Violation(f"took {grown >> 10} MiB of memory")


@dataclass
class Outcome:
    """What became of one case. refused: the volume could not be opened at all."""

    said: list[str]
    refused: str = ""
    violation: str = ""
    error: BaseException | None = None


def case(listed: list[Base], seed: int, number: int) -> Outcome:
    """Run case `number` of `seed`. Never raises for what the engine does."""
    dice = random.Random(f"{seed}:{number}")
    # The large base takes ten times as long.
    base = dice.choice([*listed[:-1] * 4, listed[-1]])
    forged = dice.randrange(2) == 1
    host = base.host()
    mutator = Mutator(base, host, dice)
    outcome = Outcome([f"{base.name}, {'forged' if forged else 'rot'}"])
    rig = base.rig.on(host)
    judge = Judge(base, forged=forged, dry=number % 4 == 0)
    before = raw_replica(rig)
    watch = ring_mutations.Watch(rig) if base.memory else None
    try:
        if watch is not None and dice.randrange(3):
            watch.change(mutator, dice, forged=forged)
        else:
            (mutator.forge if forged else mutator.rot)()
        outcome.said += mutator.said
        left = ring_mutations.untouched(host)
        with limits(), mock.patch("rig._inline", _at_once):
            try:
                rig.run(judge.first)
                rig.close()
            except (VsnapError, OSError) as error:
                if rig.volume is not None:  # It was open: then errors are for the judge.
                    raise
                outcome.refused = str(error)
                if watch and ring_mutations.untouched(host) != left:
                    outcome.violation = f"changed, and then refused: {error}"
                return outcome
            try:
                rig.run(judge.second)
                rig.close()
            except (VsnapError, OSError):
                if not forged or rig.volume is not None:
                    raise
        if watch is not None:
            outcome.violation = watch.problem(rig, forged=forged)
        elif not forged and not base.restoring and raw_replica(rig) != before:
            outcome.violation = "the replica has changed"
    except Exception as error:  # noqa: BLE001 - whatever it is, it is what we look for
        outcome.violation = f"{type(error).__name__}: {error}"
        outcome.error = error
    return outcome


# --- what tests of single cases use --------------------------------------------------------------


def small_volume() -> Rig:
    """Three points, copies in three epochs, cleanly closed."""
    rig = Rig(size=5 * BLOCK + 100)

    async def fill(volume: Volume) -> None:
        for number in range(3):
            await volume.create_point(f"p{number}")
            for block in range(number, 5):
                await write(volume, block * BLOCK, pattern(10 * number + block, BLOCK))

    rig.run(fill)
    rig.close()
    return rig


def fresh(rig: Rig) -> Rig:
    """The same volume on a host of its own."""
    return rig.on(rig.host.snapshot().power_failure(lambda *_: True))


def poke(rig: Rig, name: str, offset: int, data: bytes) -> None:
    """Change a file behind everybody's back."""
    for pages in (rig.host.files[name].cache, rig.host.files[name].disk):
        pages.write(offset, data)


def flip(rig: Rig, name: str, offset: int, bit: int) -> None:
    old = rig.host.files[name].cache.read(offset, 1)[0]
    poke(rig, name, offset, bytes([old ^ (1 << bit)]))


def listing(directory: Path) -> dict[str, tuple[bytes, int]]:
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in directory.iterdir()}


async def opened(directory: Path, function: Any, **options: Any) -> Any:
    volume = await Volume.open(directory, **options)
    try:
        async with trio.open_nursery() as nursery:
            await nursery.start(volume.run)
            result = await function(volume)
            nursery.cancel_scope.cancel()
        return result
    finally:
        await volume.close()
