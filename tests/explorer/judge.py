"""Opening an image after the power failed, and saying whether that is right.

Owns the verdict. `look` opens the image with the real engine and reports all there is to see: the
points, the replica, online or not, the sizes. It then goes on with it: online, everything
overwritten, another point, a clean close, opened again; all points must still be what they were
when it was opened. (Once for each different state that the engine is in after it has recovered.)
What it reports depends on the image alone, so it is asked once per image; `compare` then holds it
against what is expected at each instant that can leave this image.
"""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any, NamedTuple

import trio
import xxhash
from rig import Rig, acknowledged, attempt, flush, read_points, write
from simdisk import Host
from unsynced import SECTOR

from vsnapfs.diffarea.layout import SUPERBLOCK_OFFSETS, TABLE_SIZE
from vsnapfs.errors import FaultCode
from vsnapfs.volume import Volume
from vsnapfs.volume.statefile import STATE_SIZE

from .expected import Expected

_NEW = bytes(range(256)) * 4096


class Violation(AssertionError):
    """A power failure that breaks a promise."""


class Outcome(NamedTuple):
    """What an image turned out to hold. problem: what is wrong with it, whatever is expected."""

    points: dict[int, bytes]
    replica: bytes
    offline: bool
    fault: int | None
    maximum: int
    epoch: int
    #: The point that a restore under way brings back (0: none), and the replica once it has.
    restoring: int
    restored: bytes | None
    problem: str | None


class Judge:
    """Looks at images. `beginning` tells volumes apart that were not made alike."""

    def __init__(self) -> None:
        self.beginning = ""
        self._gone_on: set[tuple[object, ...]] = set()

    async def look(self, rig: Rig, host: Host) -> Outcome:
        """Open, look, go on. Nothing that goes wrong is raised: it is the outcome's problem."""
        seen: dict[str, Any] = dict.fromkeys(Outcome._fields)
        seen["points"], seen["replica"] = {}, b""
        try:
            await self._open_and_go_on(rig.on(host), seen)
        except Exception as error:  # noqa: BLE001 - whatever it was, opening must not end like that
            while isinstance(error, ExceptionGroup) and len(error.exceptions) == 1:
                error = error.exceptions[0]
            seen["problem"] = f"{type(error).__name__}: {error}"
        return Outcome(**seen)

    async def _open_and_go_on(self, rig: Rig, seen: dict[str, Any]) -> None:
        volume = await rig.open()
        area = volume.core.need_area()
        if area.superblock.restoring:
            async with _running(volume):
                points = await _see(rig, volume, seen)
                await _go_on(rig, volume, points, seen)
            return
        # Nothing would be done in the background: it need not be started only to look.
        points = await _see(rig, volume, seen)
        known = self._fingerprint(rig, volume)
        if known in self._gone_on:
            return
        if len(self._gone_on) > 200_000:
            self._gone_on.clear()
        self._gone_on.add(known)
        async with _running(volume):
            await _go_on(rig, volume, points, seen)

    def _fingerprint(self, rig: Rig, volume: Volume) -> tuple[object, ...]:
        """All that going on depends on: what the engine knows, and all structures on the disk.

        Not the content of replica and slots, at which it does not look unless it restores.
        """
        core = volume.core
        area, host = core.need_area(), rig.host
        structures = xxhash.xxh3_128()
        cache = host.files["area"].cache
        places = list(SUPERBLOCK_OFFSETS)
        for group in range(area.layout.groups_of(len(area.slots))):
            places += area.layout.table_offsets(group)
        for offset in places:
            structures.update(cache.read(offset, TABLE_SIZE))
        structures.update(host.files["state"].cache.read(0, STATE_SIZE))
        blocks, epochs, slots = area.index.everything()
        for column in (blocks, epochs, slots):
            structures.update(column.tobytes())
        return (
            self.beginning,
            structures.intdigest(),
            tuple(area.slots.taken_from(0)),
            len(area.slots),
            tuple(block for block in range(core.block_count) if block in core.preserved),
            area.superblock,
            area.barrier_number,
            area.in_doubt,
            tuple(sorted(area._generations)),
            area.unknown_slots,
            volume.protection.is_online,
            cache.size,
            volume.protection.saved,
            # What lies in the write buffer is the replica's content: only where it is matters.
            volume.buffer.ring is None,
            tuple((block, len(r)) for block, r in sorted(volume.buffer.pending.items())),
        )


@asynccontextmanager
async def _running(volume: Volume) -> AsyncIterator[None]:
    async with trio.open_nursery() as nursery:
        await nursery.start(volume.run)
        yield
        volume._stop.set()  # What `close` does at last; cheaper than to cancel.


async def _see(rig: Rig, volume: Volume, seen: dict[str, Any]) -> dict[int, bytes]:
    volume.check_invariants()
    area, protection = volume.core.need_area(), volume.protection
    points = await read_points(volume)
    fault = protection.fault
    seen["points"] = points
    seen["replica"] = acknowledged(rig, volume)
    seen["offline"] = not protection.is_online
    seen["fault"] = int(fault.code) if fault and not protection.is_online else None
    seen["maximum"], seen["epoch"] = area.maximum, area.superblock.epoch
    seen["restoring"] = area.superblock.restoring
    assert fault is None or fault.code is not FaultCode.META_DATA_CORRUPTION, fault
    return points


async def _go_on(rig: Rig, volume: Volume, points: dict[int, bytes], seen: dict[str, Any]) -> None:
    if not volume.protection.is_online:
        await _refuses(volume)
        await volume.online()
        unfinished = volume.core.need_area().superblock.restoring
        assert not unfinished, "a restore that was interrupted did not go on"
        seen["restored"] = acknowledged(rig, volume)
    await _overwrite(volume)
    await _compare_points(volume, rig, points, "after everything was overwritten")
    error = await attempt(volume.create_point())
    if error is None:
        number = volume.points[-1].number
        points = {**points, number: acknowledged(rig, volume)}
        await attempt(write(volume, 0, _NEW[5 : 5 + SECTOR]))
        await attempt(flush(volume))
    volume.check_invariants()
    await volume.close()
    again = await rig.open()
    again.check_invariants()
    await _compare_points(again, rig, points, "after closing and opening")


async def _refuses(volume: Volume) -> None:
    with suppress(OSError):
        volume.open_replica()
        raise AssertionError("an offline volume gave out a handle on its replica")


async def _overwrite(volume: Volume) -> None:
    error = await attempt(write(volume, 0, _NEW[: volume.size]))
    assert error is None or error.errno == errno.ENODEV, error


async def _compare_points(volume: Volume, rig: Rig, before: dict[int, bytes], when: str) -> None:
    found = await read_points(volume)
    assert rig.config.on_full == "evict" or sorted(found) == sorted(before), (
        f"points {sorted(found)}, not {sorted(before)}, {when}"
    )
    for number, content in found.items():
        assert content == before.get(number), f"point {number} has changed {when}"


def compare(found: Outcome, expected: Expected, *, nothing_lost: bool) -> str | None:
    """What the outcome breaks, None if nothing. nothing_lost: as after SIGKILL."""
    if found.problem is not None:
        return found.problem
    if found.maximum not in expected.maxima:
        return f"C1: the maximum is {found.maximum}, not one of {sorted(expected.maxima)}"
    if found.epoch < expected.newest:
        return f"point number {expected.newest} would be given out again"
    return (
        _compare_points_of(found, expected)
        or _compare_state(found, expected)
        or _compare_replica(found, expected, nothing_lost)
    )


def _compare_points_of(found: Outcome, expected: Expected) -> str | None:
    for number, content in expected.must.items():
        if number not in found.points:
            return f"W2: point {number} is lost"
        if found.points[number] != content:
            return f"W2: point {number} has changed"
    for number, content in found.points.items():
        if number not in expected.must:
            if number not in expected.may:
                return f"point {number} should not be there"
            if content != expected.may[number]:
                return f"W2: point {number} is not what it was"
    return None


def _compare_state(found: Outcome, expected: Expected) -> str | None:
    if expected.offline is None:
        return None
    if found.offline != expected.offline:
        return f"P1: offline is {found.offline}, fault {found.fault}, after it was answered"
    if found.offline and found.fault != expected.fault:
        return f"P1: fault {found.fault}, {expected.fault} was answered"
    return None


def _compare_replica(found: Outcome, expected: Expected, nothing_lost: bool) -> str | None:
    if expected.restored is not None:
        if found.replica == expected.restored:
            return None
        if found.restoring:
            if found.restored != expected.restored:
                return "a restore that was interrupted brought something else"
            return None
    allowed = expected.exact if nothing_lost else expected.sectors
    actual = found.replica
    for number, contents in enumerate(allowed):
        if actual[number * SECTOR : (number + 1) * SECTOR] not in contents:
            return f"{'W3' if nothing_lost else 'W1, W4'}: sector {number} of the replica"
    return None
