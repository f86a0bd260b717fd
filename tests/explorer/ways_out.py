"""A process was killed, and something is wrong besides when the volume is opened again.

Owns what an administrator meets then, and the ways out: descriptor sectors that rotted, a diff area
that is gone (`online --give-up-recovery-points`), a write buffer that cannot be used now (`mount
--give-up-write-buffer`), a copy of the volume's files on the same machine. Whatever it is: nothing
is touched unasked, no byte of a point is wrong, and no acknowledged write is lost with the points,
however often the way out is interrupted. `search` asks this of some of the images that a kill left.
"""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import trio
from damage import rot
from rig import BLOCK, Rig, acknowledged, attempt, flush, read_replica, write
from simdisk import Host, SimBacking, Snapshot
from unsynced import SECTOR, Sectors

from vsnapfs.errors import VsnapError
from vsnapfs.volume import Volume
from vsnapfs.volume.adoption import CLOSED
from vsnapfs.volume.shm import Unusable

from .expected import Expected, carried_out_again
from .images import Choice, Scene

_NEWER = bytes(range(255, -1, -1)) * 4096
_PASSES = 20


class _Files:
    """The host's directory, as giving up points uses it. See `FileBacking`."""

    def __init__(self, host: Host) -> None:
        self._host = host

    def open(self, _path: Path, *, follow: bool) -> SimBacking:
        return self._host.open("area")

    def create(self, _path: Path) -> SimBacking:
        self._host.create("area")
        return self._host.open("area")


@asynccontextmanager
async def _opened(rig: Rig, **options: Any) -> AsyncIterator[Volume]:
    with (
        mock.patch("vsnapfs.volume.giveup.FileBacking", _Files(rig.host)),
        mock.patch("vsnapfs.volume.giveup.sync_directory"),
    ):
        volume = await rig.open(**options)
        async with trio.open_nursery() as nursery:
            await nursery.start(volume.run)
            yield volume
            nursery.cancel_scope.cancel()
    # It is not closed: its process is gone.
    rig.host.locked_rings.clear()
    for file in rig.host.files.values():
        file.locked = False


def _bytes(rig: Rig) -> dict[str | bytes, bytes]:
    """The replica and all rings, as another process sees them."""
    replica = rig.host.files["replica"].cache
    rings = {ring: bytes(memory) for ring, memory in rig.host.memory.items()}
    return {"replica": replica.read(0, replica.size), **rings}


def _check(content: bytes, allowed: Sectors, promise: str) -> None:
    for number, contents in enumerate(allowed):
        found = content[number * SECTOR : (number + 1) * SECTOR]
        assert found in contents, f"{promise}: sector {number} of the replica"


async def _check_points(volume: Volume, expected: Expected) -> None:
    """Each block of each point is exact or EIO (and that only where the area is damaged)."""
    known = {**expected.may, **expected.must}
    for point in volume.points:
        assert point.number in known, f"point {point.number} should not be there"
        handle = volume.open_point(point.number)
        try:
            for at in range(0, volume.size, BLOCK):
                right = known[point.number][at : at + BLOCK]
                try:
                    found = bytes(await handle.read(at, BLOCK))
                except OSError as error:
                    if error.errno != errno.EIO or not volume.core.need_area().damaged_sectors:
                        raise
                    continue
                assert found == right, f"W2: point {point.number} has changed at {at}"
        finally:
            handle.close()


# --- the diff area is damaged, or gone -----------------------------------------------------------


async def _without_its_area(rig: Rig, expected: Expected) -> None:
    """Nothing is touched until the points are given up; then nothing acknowledged is lost."""
    before, host = _bytes(rig), rig.host
    async with _opened(rig) as volume:
        assert not volume.protection.is_online, "P1: it is online without its diff area"
        if volume.core.area is not None and volume.core.area.superblock.restoring:
            return
        await _check_points(volume, expected)
        for work in (volume.online, volume.create_point, volume.buffer.drain):
            if work != volume.buffer.drain or volume.buffer.pending:
                assert await attempt(work()) is not None, "something passed over a damaged area"
            for _ in range(_PASSES):
                await trio.lowlevel.checkpoint()
        await _check_points(volume, expected)
        assert _bytes(rig) == before, "W5: something was carried out over a damaged area"
        steps: list[Snapshot] = []
        host.observer = lambda _last: steps.append(host.snapshot())
        await _give_up(volume, expected, expected.exact)
        host.observer = None
    for snapshot in steps:
        scene = Scene(snapshot)
        for choice, killed in (
            (scene.everything(), True),
            (scene.everything(), False),
            (Choice(0), False),
        ):
            left = rig.on(scene.host(scene.build(choice)[1], light=True, killed=killed))
            allowed = expected.exact if killed else expected.sectors
            async with _opened(left) as volume:
                await _check_points(volume, expected)
                await _give_up(volume, expected, allowed)


async def _give_up(volume: Volume, expected: Expected, allowed: Sectors) -> None:
    if not volume.protection.is_online:
        await volume.online(give_up_recovery_points=True)
    assert volume.protection.is_online
    assert not volume.points
    _check(await read_replica(volume), allowed, "W3, W4")
    assert volume.points_service._next_number() > expected.newest, "a number is given out again"


def _lose(rig: Rig) -> None:
    rig.host.remove("area")


# --- the write buffer cannot be used now ---------------------------------------------------------


async def _without_its_ring(rig: Rig, expected: Expected) -> None:
    """Closed and untouched, or nothing of it was needed; given up, it stays so."""
    before, host = _bytes(rig), rig.host
    host.ring_problem = Unusable("it belongs to another user")
    try:
        async with _opened(rig) as volume:
            await _check_points(volume, expected)
            _check(acknowledged(rig, volume), expected.exact, "W5, W3")
            return
    except VsnapError as error:
        if error.code != CLOSED:
            raise
    assert _bytes(rig) == before, "W5: an opening that was refused has changed something"
    steps: list[Snapshot] = []
    host.observer = lambda _last: steps.append(host.snapshot())
    async with _opened(rig, give_up_write_buffer=True) as volume:
        host.observer = None
        await _check_points(volume, expected)
        _check(acknowledged(rig, volume), expected.sectors, "W4")
        online = volume.protection.is_online
        if online:
            await attempt(write(volume, 0, _NEWER[: volume.size]))
            online = await attempt(flush(volume)) is None
    if online:
        left = rig.on(host.kill())
        async with _opened(left) as volume:
            found = acknowledged(left, volume)
            assert found == _NEWER[: volume.size], "a write buffer that was given up came back"
    for snapshot in steps:
        scene = Scene(snapshot)
        choice = scene.everything()
        left = rig.on(scene.host(scene.build(choice)[1], light=True, killed=True))
        async with _opened(left) as volume:
            await _check_points(volume, expected)
            _check(acknowledged(left, volume), expected.sectors, "W4")


# --- a copy --------------------------------------------------------------------------------------


async def _copied(rig: Rig, expected: Expected, *, served: bool) -> None:
    """`cp -a` of all files, used beside the original: no ring of that is touched.

    served: the original has not been killed, it holds the lock on its ring.
    """
    rings = {ring: bytes(memory) for ring, memory in rig.host.memory.items()}
    rig.host.locked_rings = set(rings) if served else set()
    copy = rig.on(rig.host.copied())
    volume = await copy.open(accept_changed_replica=True)
    async with trio.open_nursery() as nursery:
        await nursery.start(volume.run)
        await _check_points(volume, expected)
        _check(acknowledged(copy, volume), expected.sectors, "W4")
        if volume.protection.is_online:
            await attempt(write(volume, 0, _NEWER[: volume.size]))
        await _check_points(volume, expected)
        await volume.close()
    left = {ring: bytes(memory) for ring, memory in rig.host.memory.items() if ring in rings}
    assert left == rings, "W5: a copy has touched the ring of its original"


# --- one of them ---------------------------------------------------------------------------------

_WAYS: tuple[tuple[str, Callable[[Rig], object] | None, Callable[[Rig, Expected], Any]], ...] = (
    ("descriptors rotted", rot, _without_its_area),
    ("the diff area is gone", _lose, _without_its_area),
    ("the ring cannot be used", None, _without_its_ring),
    ("a copy of a killed volume", None, partial(_copied, served=False)),
    ("a copy of a served volume", None, partial(_copied, served=True)),
)
COUNT = len(_WAYS)


async def try_one(rig: Rig, make: Callable[[], Host], expected: Expected, which: int) -> str | None:
    """What is wrong, None if nothing. make: the host that a kill has left. which: chooses."""
    if expected.restored is not None:
        return None
    name, happens, way = _WAYS[which % COUNT]
    here = rig.on(make())
    memory = {ring: bytes(data) for ring, data in here.host.memory.items()}
    sectors = carried_out_again(expected.sectors, memory)
    if sectors == expected.sectors:
        return None  # Nothing lies in the ring.
    expected = replace(expected, sectors=sectors)
    try:
        if happens is not None:
            happens(here)
        await way(here, expected)
    except Exception as error:  # noqa: BLE001 - whatever it was, it must not be
        found: BaseException = error
        while isinstance(found, BaseExceptionGroup) and len(found.exceptions) == 1:
            found = found.exceptions[0]
        return f"{name}: {type(found).__name__}: {found}"
    return None
