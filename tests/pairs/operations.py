"""What can be asked of a volume, and the pasts that a volume may have had before."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Awaitable, Callable

import trio
import trio.testing
from rig import (
    BLOCK,
    SMALLEST,
    flush,
    read_point,
    write,
)

from vsnapfs.volume import Volume

from .world import SIZE, World

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
