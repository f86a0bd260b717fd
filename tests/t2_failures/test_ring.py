"""The rules of the write buffer's ring: which one counts, and what if it cannot be used."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import trio
import trio.testing
from damage import cut, cut_tables, rot
from filefuzz import poke
from rig import (
    BLOCK,
    SMALLEST,
    Rig,
    acknowledged,
    attempt,
    flush,
    pattern,
    raw_replica,
    read_points,
    small_steps,
)
from rig import write as write_at
from schedules import Doing, Pause, all_stand_still
from simdisk import FOREVER, PowerLoss, SimBacking, SimFile

from vsnapfs.backing import FileId
from vsnapfs.diffarea.layout import Layout
from vsnapfs.diffarea.superblock import RingName
from vsnapfs.errors import FaultError, FormatError, VsnapError
from vsnapfs.volume import Volume
from vsnapfs.volume.ring import CURSORS, RECORDS, Ring

SIZE = 8 * BLOCK
OLD, NEW = pattern(1, SIZE), pattern(2, BLOCK)
NAME = RingName(b"r" * 16, 1, 2, 3)


@pytest.fixture(autouse=True)
def _small() -> Iterator[None]:
    with small_steps():
        yield


def made(**options: object) -> Rig:
    """A volume of which all is written, with one recovery point."""
    rig = Rig(**{"size": SIZE, "buffer": 64 * 1024, **options})  # type: ignore[arg-type]

    async def begin(volume: Volume) -> None:
        await write_at(volume, 0, OLD)
        await volume.create_point()

    rig.run(begin)
    return rig


async def write_new(volume: Volume) -> None:
    """Acknowledged; the caller ends before it is carried out."""
    await write_at(volume, 0, NEW)
    assert volume.buffer.pending


async def look(volume: Volume) -> None:
    assert (await read_points(volume))[1] == OLD
    volume.check_invariants()


def die_with_a_write(rig: Rig) -> None:
    """The process dies with an acknowledged write in its ring."""

    async def write_and_die(volume: Volume) -> None:
        await volume.buffer.start()
        await write_at(volume, 0, NEW)
        rig.host.stop_at = rig.host.operations

    with pytest.raises(PowerLoss):
        rig.run(write_and_die)
    rig.killed()
    assert len(rig.host.memory) == 1


def left_by_a_kill(**options: object) -> Rig:
    """A volume whose process died with an acknowledged write in the ring."""
    rig = made(**options)
    die_with_a_write(rig)
    rig.log.events.clear()
    return rig


def content(rig: Rig) -> bytes:
    async def read(volume: Volume) -> bytes:
        return acknowledged(rig, volume)

    return rig.run(read)


def lost(rig: Rig) -> int:
    """How often the log says that acknowledged writes are lost."""
    return rig.log.ids("vsnapfs").count(1043)


# -- which ring counts ----------------------------------------------------------------------------


def test_an_opening_carries_out_what_was_acknowledged() -> None:
    """After a kill the write is there, and the point still holds what was there before."""
    rig = left_by_a_kill()
    assert content(rig) == NEW + OLD[BLOCK:]
    rig.run(look)
    rig.close()
    assert not rig.host.memory
    assert lost(rig) == 0


def test_a_ring_of_another_boot_is_not_used() -> None:
    """After a power failure nothing of it may be applied, and nobody is alarmed."""
    rig = left_by_a_kill()
    memory = rig.host.memory
    rig.crashed()
    rig.host.memory = memory  # A tmpfs that was saved and put back, say.
    assert content(rig) == OLD
    assert lost(rig) == 0


def all_files(rig: Rig) -> dict[str, SimFile]:
    """Replica, diff area and state as they are now."""
    return {
        name: replace(file, cache=file.cache.copy(), disk=file.disk.copy(), journal=[])
        for name, file in rig.host.files.items()
    }


@pytest.mark.parametrize("more", [False, True])
def test_a_ring_that_a_later_opening_had_is_not_taken_for_that_of_an_older_copy(more: bool) -> None:
    """All files copied after a kill, put back over the same inodes after the next one: what the
    ring held then has been carried out elsewhere, and what it holds now came later. It is lost,
    and told.
    """
    rig = left_by_a_kill()
    kept = all_files(rig)
    assert content(rig) == NEW + OLD[BLOCK:]

    async def write_and_die(volume: Volume) -> None:
        if more:
            await write_at(volume, 4 * BLOCK, NEW)
        rig.host.stop_at = rig.host.operations

    with contextlib.suppress(PowerLoss):
        rig.run(write_and_die)
    rig.killed()
    rig.host.files.update(kept)
    for file in kept.values():
        file.locked = False
    assert content(rig) == OLD
    assert lost(rig) == 1
    rig.run(look)


def test_a_copy_of_the_area_from_before_an_opening_that_was_killed_is_an_old_one() -> None:
    """However far that opening came: the state file knew of it before it carried out the ring."""
    rig = left_by_a_kill()
    kept = all_files(rig)["area"]

    def at_the_overwriting(backing: SimBacking, operation: str, _at: int, _length: int) -> None:
        if (backing.name, operation) == ("replica", "write"):
            rig.host.stop_at = rig.host.operations + 1

    rig.host.hooks.append(at_the_overwriting)
    with pytest.raises(PowerLoss):
        rig.run(look)
    rig.killed()
    right = rig.host.files["area"]
    rig.host.files["area"] = replace(kept, locked=False)

    async def fault(volume: Volume) -> int:
        assert volume.protection.fault is not None
        return int(volume.protection.fault.code)

    assert rig.run(fault) == 15
    rig.killed()
    rig.host.files["area"] = replace(right, locked=False)

    async def back(volume: Volume) -> None:
        await volume.online()

    rig.run(back)
    rig.run(look)
    assert content(rig) == NEW + OLD[BLOCK:]


SINCE = ["a write", "a write beside the ring", "a point", "a deletion", "a growth", "a shrink"]


@pytest.mark.parametrize("policy", ["offline", "evict"])
@pytest.mark.parametrize("since", SINCE)
def test_a_copy_of_the_area_made_while_it_was_served_is_an_old_one(policy: str, since: str) -> None:
    """Preserving changes no generation, and the state file is not told of each commit, but the ring
    knows of both: the copy, put back after that server was killed, is fault 15, nothing is written
    to it, nothing newer shows in a point, and with the right one all is there.
    """
    rig = made(on_full=policy, maximum=SMALLEST + 40 * BLOCK)
    copies = []

    async def change(volume: Volume) -> None:
        if since == "a point":
            await volume.create_point()
        elif since == "a deletion":
            await volume.delete_point(2)
        elif since == "a growth":
            await volume.room.make(volume.core.need_area().slots.free + 1)
        elif since == "a shrink":
            await volume.resize(SMALLEST)
        else:
            if since == "a write beside the ring":
                volume.buffer.reason = "not now"
            await write_at(volume, 4 * BLOCK, NEW)
            await flush(volume)

    async def serve(volume: Volume) -> None:
        await volume.create_point()
        await volume.buffer.start()
        await write_at(volume, 0, NEW)
        await flush(volume)
        copies.append(all_files(rig)["area"])
        volume.core.note_generation = None
        await change(volume)
        rig.host.stop_at = rig.host.operations

    with contextlib.suppress(PowerLoss):
        rig.run(serve)
    rig.killed()
    memory = {name: bytes(ring) for name, ring in rig.host.memory.items()}
    assert memory
    right = rig.host.files["area"]
    rig.host.files["area"] = replace(copies[0], locked=False)
    poke(rig, "area", Layout(BLOCK).sector_offsets(0)[1] + 40, b"\xa5")  # Nothing is healed there.
    before = rig.host.files["area"].cache.copy()

    async def old(volume: Volume) -> None:
        assert volume.protection.fault is not None
        assert volume.protection.fault.code == 15
        newest = volume.points[-1].number
        point = volume.open_point(newest)
        assert bytes(await point.read(0, BLOCK)) == OLD[:BLOCK]
        with pytest.raises(OSError, match="Input/output"):
            await point.read(4 * BLOCK, BLOCK)
        with pytest.raises(VsnapError, match="somebody else has written"):
            await volume.online()

    for _ in range(2):
        rig.run(old)
        rig.close()
    assert {name: bytes(ring) for name, ring in rig.host.memory.items()} == memory
    area = rig.host.files["area"].cache
    assert area.read(0, area.size) == before.read(0, before.size)
    rig.host.files["area"] = replace(right, locked=False)

    async def back(volume: Volume) -> None:
        await volume.online()
        await look(volume)

    rig.run(back)
    written = since.startswith("a write")
    middle = NEW if written else OLD[4 * BLOCK : 5 * BLOCK]
    assert content(rig) == NEW + OLD[BLOCK : 4 * BLOCK] + middle + OLD[5 * BLOCK :]
    assert lost(rig) == 0


@pytest.mark.parametrize("damage", [rot, cut_tables])
def test_a_damaged_newest_barrier_is_no_old_area(damage: Callable[[Rig], object]) -> None:
    """The newest descriptors are lost: fault 3, as without a ring."""
    rig = made()

    async def serve(volume: Volume) -> None:
        await volume.buffer.start()
        await write_at(volume, 0, NEW)
        await flush(volume)
        rig.host.stop_at = rig.host.operations

    with contextlib.suppress(PowerLoss):
        rig.run(serve)
    rig.killed()
    damage(rig)

    async def damaged(volume: Volume) -> None:
        assert volume.protection.fault is not None
        assert volume.protection.fault.code == 3

    rig.run(damaged)


def test_a_missing_ring_is_an_error_event() -> None:
    """Gone in the same boot: what was acknowledged is lost, and the log says so; points are not."""
    rig = left_by_a_kill()
    rig.host.memory.clear()
    assert content(rig) == OLD
    assert lost(rig) == 1
    rig.run(look)
    rig.close()
    rig.run(look)
    assert lost(rig) == 1


@pytest.mark.parametrize("place", [0, 8, 40, 56])
def test_a_ring_with_a_bad_head_is_an_error_event(place: int) -> None:
    """A flipped bit in what says whose ring it is."""
    rig = left_by_a_kill()
    (memory,) = rig.host.memory.values()
    memory[place] ^= 1
    assert content(rig) == OLD
    assert lost(rig) == 1


@pytest.mark.parametrize("place", [RECORDS, RECORDS + 30, RECORDS + 64, RECORDS + 64 + BLOCK - 1])
def test_a_torn_record_is_not_applied(place: int) -> None:
    """A record whose head or data is not whole was never acknowledged."""
    rig = left_by_a_kill()
    (memory,) = rig.host.memory.values()
    memory[place] ^= 1
    assert content(rig) == OLD
    rig.run(look)


def test_the_ring_of_another_volume_is_not_used() -> None:
    """One that has been given our ring's name."""
    rig = left_by_a_kill()
    ((name, memory),) = rig.host.memory.items()
    memory[:] = bytes(len(memory))
    other = Ring.make(memory, RingName(name, 1, 1, rig.host.tmpfs), b"another volume!!")
    other.append(0, b"x" * 100)
    assert content(rig) == OLD
    assert lost(rig) == 1


def test_a_stale_ring_of_the_same_volume_and_boot_is_not_used() -> None:
    """Put back after the volume was closed: what it holds was carried out long ago."""
    rig = left_by_a_kill()
    kept = {name: bytearray(memory) for name, memory in rig.host.memory.items()}
    rig.run(look)

    async def write_newer(volume: Volume) -> None:
        await write_at(volume, 0, OLD[:BLOCK])

    rig.run(write_newer)
    rig.close()
    rig.host.memory.update(kept)
    assert content(rig) == OLD

    async def start(volume: Volume) -> None:
        await volume.buffer.start()

    rig.run(start)
    rig.close()
    # One that nobody has read is nobody's to remove.
    assert rig.host.memory == kept


async def _by_repair(rig: Rig, volume: Volume) -> None:
    assert (await volume.repair())["ok"]
    await volume.online()


async def _by_online(rig: Rig, volume: Volume) -> None:
    rig.host.failures.clear()
    await volume.online()


async def _by_giving_up(rig: Rig, volume: Volume) -> None:
    await volume.online(give_up_recovery_points=True)


def test_giving_up_beside_a_close_leaves_no_ring_without_a_name() -> None:
    """The host is slow, and the volume is closed before the new diff area names the ring: the next
    opening carries out what it holds all the same.
    """
    rig = made(hold_timeout=0.05)
    rig.threads = True

    async def go(volume: Volume) -> None:
        await volume.buffer.start()
        rig.host.fail("area", "sync", errno.EIO)
        await write_at(volume, 0, NEW)
        await all_stand_still()
        assert volume.buffer.stuck
        async with trio.open_nursery() as nursery:
            with Pause(rig, "state", "sync") as recording:
                giving_up = Doing(nursery, attempt(volume.online(give_up_recovery_points=True)))
                await recording.reached()
                closing = Doing(nursery, volume.close())
                while volume.buffer.ring is not None:  # noqa: ASYNC110 - it has no event for that
                    await trio.sleep(0.001)
                recording.go()
                await closing.ended()
                await giving_up.ended()

    rig.run(go)
    rig.killed()
    rig.threads = False
    assert content(rig) == NEW + OLD[BLOCK:]
    assert lost(rig) == 0


def test_giving_up_beside_a_close_does_not_name_the_ring_that_is_removed() -> None:
    """It was empty: the next opening misses nothing."""
    rig = made()
    rig.threads = True

    async def go(volume: Volume) -> None:
        await volume.buffer.start()
        await volume.go_offline()
        async with trio.open_nursery() as nursery:
            with Pause(rig, "area", "sync") as committing:
                closing = Doing(nursery, volume.close())
                await committing.reached()
                giving_up = Doing(nursery, attempt(volume.online(give_up_recovery_points=True)))
                with trio.fail_after(60):
                    lock = volume.core.area_lock
                    while not lock.statistics().tasks_waiting:  # noqa: ASYNC110 - no event for it
                        await trio.sleep(0.001)
                committing.go()
                await closing.ended()
                await giving_up.ended()

    rig.run(go)
    rig.killed()
    rig.threads = False
    assert content(rig) == OLD
    assert lost(rig) == 0


@pytest.mark.parametrize("begun", ["before", "before, and told of", "meanwhile"])
def test_giving_up_beside_a_ring_that_is_being_made_leaves_it_a_name(begun: str) -> None:
    """A write in flight makes a ring while points are given up: whatever lies in a ring later is
    carried out after a kill. Begun before, it is waited for; it is ours, and no reason to refuse.
    """
    rig = made()
    rig.threads = True

    async def go(volume: Volume) -> None:
        await volume.go_offline()
        buffer, save, rescue = volume.buffer, volume.protection.save, volume.buffer.rescue
        committed, go_on = threading.Event(), threading.Event()

        def slowly(**changes: object) -> None:
            if not changes and not committed.is_set():  # That of the ring, already in the area.
                committed.set()
                go_on.wait(60)
            save(**changes)

        async with trio.open_nursery() as nursery:

            async def make_a_ring() -> None:
                nursery.start_soon(buffer.start)
                await trio.to_thread.run_sync(committed.wait, 60)

            async def rescue_first() -> None:
                await rescue()
                await make_a_ring()

            with (
                mock.patch.object(volume.protection, "save", slowly),
                mock.patch.object(
                    buffer, "rescue", rescue_first if begun == "meanwhile" else rescue
                ),
            ):
                if begun != "meanwhile":
                    await make_a_ring()
                if begun == "before, and told of":
                    save()
                giving_up = Doing(nursery, volume.online(give_up_recovery_points=True))
                with trio.fail_after(60):
                    # ASYNC110: there is no event for it.
                    while not (giving_up.answered or buffer._starting.statistics().tasks_waiting):  # noqa: ASYNC110
                        await trio.sleep(0.001)
                go_on.set()
                await giving_up.ended()
        await volume.create_point()
        await write_at(volume, 0, NEW)
        rig.host.stop_at = rig.host.operations

    with pytest.raises(PowerLoss):
        rig.run(go)
    rig.killed()
    rig.threads = False
    assert content(rig) == NEW + OLD[BLOCK:]
    assert lost(rig) == 0


@pytest.mark.parametrize("put_back", ["all files", "area"])
@pytest.mark.parametrize("way", [_by_repair, _by_online, _by_giving_up])
def test_old_copies_look_old_however_the_opening_between_came_online(
    way: Callable[[Rig, Volume], Awaitable[None]], put_back: str
) -> None:
    """Also one that found a fault, or could commit nothing, and wrote nothing until then: copies
    from before it are old ones, of all files (the ring is lost, and told) and of the area (15 or
    no point; what a point shows is right or EIO), wherever it was killed.
    """
    for nth in range(100):
        rig = left_by_a_kill()
        kept = all_files(rig)
        if way is _by_online:
            rig.host.fail("area", "write", errno.EIO, times=FOREVER)
        else:
            cut(rig, rig.host.files["area"].cache.size - BLOCK)
        ended = False

        async def come_back(volume: Volume, rig: Rig = rig, nth: int = nth) -> None:
            nonlocal ended
            assert not volume.protection.is_online
            changes = 0

            def stop(backing: SimBacking, operation: str, _at: int, _length: int) -> None:
                nonlocal changes
                changes += operation == "sync" or (backing.name, operation) == ("replica", "write")
                if changes > nth:
                    rig.host.stop_at = rig.host.operations

            rig.host.hooks.append(stop)
            await way(rig, volume)
            await write_at(volume, 4 * BLOCK, NEW)
            ended = True
            rig.host.stop_at = rig.host.operations

        with contextlib.suppress(PowerLoss):
            rig.run(come_back)
        rig.killed()
        for name in kept if put_back == "all files" else [put_back]:
            rig.host.files[name] = replace(kept[name], locked=False)
        rig.log.events.clear()

        async def see(volume: Volume, rig: Rig = rig) -> None:
            if put_back == "all files":  # As after the first kill, but for what is told.
                assert acknowledged(rig, volume) == (OLD if lost(rig) else NEW + OLD[BLOCK:])
            for point in volume.points:
                handle = volume.open_point(point.number)
                for at in range(0, SIZE, BLOCK):
                    with contextlib.suppress(OSError):
                        assert await handle.read(at, BLOCK) == OLD[at : at + BLOCK]
                handle.close()

        rig.run(see)
        if ended:
            return
    raise AssertionError("it never ended")


@pytest.mark.parametrize("how", ["gone", "an old copy", "no memory"])
def test_closing_says_that_a_ring_waits_for_its_area(how: str) -> None:
    """Acknowledged writes are not on the disk yet: that is no clean end, and nothing is lost."""
    rig = made()
    rig.close()
    area = rig.host.files["area"]
    old = replace(area, cache=area.cache.copy(), disk=area.disk.copy(), inode=area.inode + 1000)
    die_with_a_write(rig)
    right = rig.host.files.pop("area")
    if how == "an old copy":
        rig.host.files["area"] = old
    elif how == "no memory":
        rig.host.files["area"] = right

    async def close(volume: Volume) -> str:
        await volume.close()
        return volume.left_behind

    with contextlib.ExitStack() as stack:
        if how == "no memory":
            scan = "vsnapfs.diffarea.recovery._Scan.run"
            stack.enter_context(mock.patch(scan, side_effect=MemoryError))
        assert rig.run(close) != ""
    rig.close()
    rig.host.files["area"] = right
    assert content(rig) == NEW + OLD[BLOCK:]
    assert rig.run(close) == ""
    assert lost(rig) == 0


@pytest.mark.parametrize("how", ["gone", "an old copy"])
def test_a_mount_that_cannot_tell_syncs_the_replica_before_it_ends(how: str) -> None:
    """What a killed process acknowledged is on the disk after an unmount that says so, though the
    diff area, which would say that it may not be, is not there.
    """
    rig = Rig(size=SIZE)
    rig.close()
    area = rig.host.files["area"]
    old = replace(area, cache=area.cache.copy(), disk=area.disk.copy(), inode=area.inode + 1000)

    async def close(volume: Volume) -> None:
        await volume.close()
        assert volume.left_behind == ""

    rig.run(lambda volume: write_at(volume, 0, NEW))
    rig.killed()
    right = rig.host.files.pop("area")
    if how == "an old copy":
        rig.host.files["area"] = old
    rig.run(close, mountpoint="/mnt")
    rig.crashed()
    rig.host.files["area"] = right
    assert raw_replica(rig)[: len(NEW)] == NEW


def test_closing_says_that_writes_in_flight_were_not_waited_for() -> None:
    """What was acknowledged before them is in no sync then."""
    rig = made(buffer=0, hold_timeout=0.05)
    rig.threads = True

    async def go(volume: Volume) -> None:
        async with trio.open_nursery() as nursery:
            with Pause(rig, "area", "sync") as pause:
                writing = Doing(nursery, attempt(write_at(volume, 0, NEW)))
                await pause.reached()
                closing = Doing(nursery, volume.close())
                with trio.fail_after(60):
                    while not volume.left_behind:  # noqa: ASYNC110 - it has no event for that
                        await trio.sleep(0.001)
                pause.go()
                await writing.ended()
                await closing.ended()

    rig.run(go)


def test_an_old_area_put_back_does_not_cost_the_ring() -> None:
    """Fault 15; when the right area is there again, so is what was acknowledged."""
    rig = made()
    rig.close()
    old = rig.host.files["area"]
    kept = replace(old, cache=old.cache.copy(), disk=old.disk.copy(), inode=old.inode + 1000)

    async def write_and_die(volume: Volume) -> None:
        await volume.create_point()
        await volume.buffer.start()
        await write_at(volume, 0, NEW)
        rig.host.stop_at = rig.host.operations

    with pytest.raises(PowerLoss):
        rig.run(write_and_die)
    rig.killed()
    right = rig.host.files["area"]
    rig.host.files["area"] = kept

    async def fault(volume: Volume) -> int:
        assert volume.protection.fault is not None
        return int(volume.protection.fault.code)

    assert rig.run(fault) == 15
    rig.close()
    rig.host.files["area"] = right
    assert content(rig) == NEW + OLD[BLOCK:]
    assert lost(rig) == 0


def test_records_released_before_are_never_found_again() -> None:
    """However often the ring has gone round, and whatever still lies in its memory."""
    memory = bytearray(RECORDS + 8192)
    ring = Ring.make(memory, NAME, b"v" * 16)
    for number in range(1, 60):
        record = ring.append(number, bytes([number]) * (number * 37 % 3000))
        assert record is not None
        if number % 3 == 0:
            again = Ring.found(memory, NAME, b"v" * 16)
            found = [(r.offset, bytes(again.data(r))) for r in again.records()]
            assert found == [(number, bytes([number]) * (number * 37 % 3000))]
            assert again.used == ring.used
        ring.release(record)
        assert list(Ring.found(memory, NAME, b"v" * 16).records()) == []


@pytest.mark.parametrize("where", [0, 8, 16, 24, 40, 64], ids=lambda at: f"byte-{at}")
@pytest.mark.parametrize("which", range(6))
def test_a_rotted_record_costs_no_other(which: int, where: int) -> None:
    """Those after it are found all the same, also round the end, and it is counted."""
    memory = bytearray(RECORDS + 4096)
    ring = Ring.make(memory, NAME, b"v" * 16)
    for number in range(3):
        gone = ring.append(number, bytes([number]) * 700)
        assert gone is not None
        ring.release(gone)
    records = [ring.append(number, bytes([number]) * 500) for number in range(3, 9)]
    record = records[which]
    assert record is not None
    assert {record.position // ring.capacity for record in records if record} == {0, 1}
    memory[record.where - 64 + where] ^= 0x10
    again = Ring.found(memory, NAME, b"v" * 16)
    found = [(r.offset, bytes(again.data(r))) for r in again.records()]
    assert found == [(n, bytes([n]) * 500) for n in range(3, 9) if n != 3 + which]
    # A head that no other follows is one that was being written when the process died.
    is_seen = which < 5 or where == 64
    assert (again.rotted > 0) == is_seen
    newer = again.append(99, b"newer")
    assert newer is not None
    again.release(newer)
    assert list(Ring.found(memory, NAME, b"v" * 16).records()) == []


class _Mapping(bytearray):
    """Behind the end of a mapping there may be nothing; CPython's `find` reads one byte more."""

    def find(self, sub: Any, start: Any = 0, end: Any = None) -> int:
        assert end is not None
        assert end < len(self)
        return super().find(sub, start, end)


@pytest.mark.parametrize("size", range(RECORDS + 640, RECORDS + 640 + 64 * 4, 64))
def test_looking_for_records_ends_inside_the_memory(size: int) -> None:
    """Wherever the last one ends, round the end or not: the server ended by signal 11."""
    memory = _Mapping(size)
    ring = Ring.make(memory, NAME, b"v" * 16)
    for number in range(40):
        record = ring.append(number, bytes(100))
        assert record is not None
        assert len(list(Ring.found(memory, NAME, b"v" * 16).records())) == 1
        ring.release(record)
        assert not list(Ring.found(memory, NAME, b"v" * 16).records())


def ring_that_released(count: int) -> tuple[bytearray, Ring]:
    """Its memory, and the ring: so many records have been there, and none is."""
    memory = bytearray(RECORDS + 8192)
    ring = Ring.make(memory, NAME, b"v" * 16)
    for number in range(count):
        record = ring.append(number, b"old")
        assert record is not None
        ring.release(record)
    return memory, ring


@pytest.mark.parametrize("rot", [bytes(512), b"\xa5" * 512], ids=["zeros", "noise"])
@pytest.mark.parametrize("released", range(4))
def test_a_rotted_sector_before_the_records_brings_nothing_back(released: int, rot: bytes) -> None:
    """Whichever it is: what was released is not found again, and what was not is, or the ring is
    none.
    """
    memory, ring = ring_that_released(released)
    assert ring.append(99, b"new") is not None
    for at in range(0, RECORDS, len(rot)):
        rotted = memory[:at] + rot + memory[at + len(rot) :]
        try:
            again = Ring.found(rotted, NAME, b"v" * 16)
        except FormatError:
            assert at == 0  # The head, of which there is one.
        else:
            assert [r.offset for r in again.records()] == [99]


def test_a_cursor_and_its_twin_that_rotted_are_no_older_cursor() -> None:
    """The other pair may be from before what has been carried out: the ring is none."""
    memory, _ = ring_that_released(2)
    for pair in CURSORS:
        rotted = bytearray(memory)
        for at in pair:
            rotted[at] ^= 1
        with pytest.raises(FormatError):
            Ring.found(rotted, NAME, b"v" * 16)


def test_a_cursor_torn_by_a_kill_leaves_the_one_before() -> None:
    """Whichever byte was the last: the record that was being released, or nothing, is found."""
    memory = bytearray(RECORDS + 8192)
    ring = Ring.make(memory, NAME, b"v" * 16)
    for number in range(3):
        record = ring.append(number, b"old")
        assert record is not None
        before = bytes(memory)
        ring.release(record)
        changed = [at for at in range(RECORDS) if memory[at] != before[at]]
        assert changed
        for at in changed:
            torn = bytearray(before)
            torn[:at] = memory[:at]
            assert [r.offset for r in Ring.found(torn, NAME, b"v" * 16).records()] in ([], [number])


@pytest.mark.parametrize("place", [at for pair in CURSORS for at in pair])
def test_a_rotted_cursor_does_not_cost_a_newer_write(place: int) -> None:
    """A batch was carried out and its block written again, beside the ring: that write stays."""
    rig = made()
    newer = pattern(3, BLOCK)

    async def write_and_go(volume: Volume) -> None:
        await write_at(volume, 0, NEW)
        await flush(volume)
        await write_at(volume, 0, newer)
        assert not volume.buffer.pending

    rig.run(write_and_go)
    rig.killed()
    (memory,) = rig.host.memory.values()
    memory[place : place + 24] = b"\xa5" * 24
    assert content(rig) == newer + OLD[BLOCK:]
    assert lost(rig) == 0


def test_a_note_torn_by_a_kill_leaves_the_one_before() -> None:
    """Of the two copies one is whole at any moment, whichever byte was the last."""
    memory = bytearray(RECORDS + 4096)
    ring = Ring.make(memory, NAME, b"v" * 16)
    ring.take(5)
    ring.note_area(7, 20)
    before = bytes(memory)
    ring.take(6)
    ring.note_area(8, 21)
    changed = [at for at in range(RECORDS) if memory[at] != before[at]]
    assert changed
    for at in changed:
        torn = bytearray(before[:at] + bytes([before[at] ^ 0xFF]) + before[at + 1 :])
        torn[:at] = memory[:at]
        found = Ring.found(torn, NAME, b"v" * 16)
        assert found.taken in (5, 6)
        assert found.area in ((7, 20), (8, 21))


def test_an_opening_carries_out_what_is_left_of_a_rotted_ring() -> None:
    """The other writes are there, the log says how many are lost, and the point is right."""
    rig = made()

    async def write_and_die(volume: Volume) -> None:
        await volume.buffer.start()
        for number in range(3):
            await write_at(volume, number * BLOCK, pattern(40 + number, BLOCK))
        rig.host.stop_at = rig.host.operations

    with pytest.raises(PowerLoss):
        rig.run(write_and_die)
    rig.killed()
    (memory,) = rig.host.memory.values()
    memory[RECORDS + 200] ^= 1
    kept = OLD[:BLOCK] + pattern(41, BLOCK) + pattern(42, BLOCK) + OLD[3 * BLOCK :]
    assert content(rig) == kept
    assert lost(rig) == 1
    rig.run(look)
    rig.close()
    assert content(rig) == kept
    assert not rig.host.memory


def test_a_full_ring_refuses_and_takes_again_after_a_release() -> None:
    """No record is overwritten before it is released."""
    memory = bytearray(RECORDS + 4096)
    ring = Ring.make(memory, NAME, b"v" * 16)
    records = []
    while (record := ring.append(len(records), bytes(500))) is not None:
        records.append(record)
    assert len(records) == 4096 // 576
    assert [r.offset for r in Ring.found(memory, NAME, b"v" * 16).records()] == list(
        range(len(records))
    )
    ring.release(records[0])
    assert ring.append(99, bytes(500)) is not None


# -- where it lives -------------------------------------------------------------------------------


@pytest.mark.time_limit(30)
def test_a_ring_that_is_too_small_for_a_write_is_replaced() -> None:
    """Whoever made it knew of no writes as long as this: what it holds is carried out, and a new
    one takes its place; nobody waits for room that there will never be.
    """
    rig = made(buffer=RECORDS + 2 * (64 + 512))

    async def write_and_die(volume: Volume) -> None:
        await volume.buffer.start()
        await write_at(volume, 0, NEW[:512])
        rig.host.stop_at = rig.host.operations

    with pytest.raises(PowerLoss):
        rig.run(write_and_die)
    rig.killed()
    rig.buffer = 64 * 1024

    async def go_on(volume: Volume) -> None:
        await write_at(volume, BLOCK, NEW)
        assert volume.buffer.ring is not None
        assert volume.buffer.ring.capacity >= BLOCK

    rig.run(go_on)
    assert content(rig) == NEW[:512] + OLD[512:BLOCK] + NEW + OLD[2 * BLOCK :]
    assert len(rig.host.memory) == 1
    assert lost(rig) == 0


@pytest.mark.parametrize(
    ("sequence", "position"), [(5, 1), (5, 63), (5, 2**63 - 64), (5, 2**64 - 64), (2**63 - 1, 0)]
)
def test_a_cursor_that_no_ring_can_have_written_is_none(sequence: int, position: int) -> None:
    """Its checksum fits, its number does not, or none could follow it: an error, and nothing is
    read from there.
    """
    name, volume_id = RingName(bytes(range(16)), 1, 2, 3), bytes(16)
    memory = bytearray(RECORDS + 1024)
    ring = Ring.make(memory, name, volume_id)
    for _ in range(2):
        ring._write_cursor(sequence, position)
    with pytest.raises(FormatError):
        Ring.found(memory, name, volume_id)


@pytest.mark.parametrize("size", [RECORDS + 1, RECORDS + 63])
def test_a_ring_without_room_for_any_record_is_none(size: int) -> None:
    """Whatever its head says."""
    name, volume_id = RingName(bytes(range(16)), 1, 2, 3), bytes(16)
    memory = bytearray(size)
    Ring.make(memory, name, volume_id)
    with pytest.raises(FormatError):
        Ring.found(memory, name, volume_id)


def test_without_room_in_shared_memory_writes_wait_for_their_copies(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A full tmpfs: said in the log and the status, and the write goes through all the same."""
    rig = made()
    monkeypatch.setattr("simdisk.SimStore.make", _no_room)

    async def go(volume: Volume) -> None:
        await write_at(volume, 0, NEW)
        assert not volume.buffer.pending
        status = volume.status()["write_buffer"]
        assert status["state"] == "off"
        assert "No space left" in status["reason"]

    rig.run(go)
    assert rig.log.ids("vsnapfs").count(1091) == 1
    assert content(rig) == NEW + OLD[BLOCK:]
    rig.run(look)


def test_a_ring_whose_writer_is_given_up_before_it_is_named_is_not_kept_locked() -> None:
    """Nobody would remove it before this process has ended; the next one is made in its place."""
    rig = made()

    async def give_up(volume: Volume) -> None:
        before = set(rig.host.memory)
        async with volume.core.area_lock, trio.open_nursery() as nursery:
            nursery.start_soon(volume.buffer.start)
            while set(rig.host.memory) == before:
                await trio.lowlevel.checkpoint()
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        await volume.buffer.start()
        assert volume.buffer.ring is not None
        assert set(rig.host.memory) == before | {volume.buffer.ring.name.ring_id}

    rig.run(give_up)


def _no_room(*_args: object) -> Ring:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("idle", [False, True], ids=["in use", "idle"])
def test_a_ring_that_is_removed_is_replaced(*, idle: bool) -> None:
    """What it held is carried out, nothing more goes in, and a new one survives a kill."""
    rig = made()

    async def go(volume: Volume) -> None:
        await write_at(volume, 0, NEW)
        if idle:
            await flush(volume)
        rig.host.memory.clear()
        if not idle:
            await flush(volume)
        await write_at(volume, BLOCK, NEW)
        assert volume.buffer.pending
        assert volume.status()["write_buffer"]["state"] == "on"
        rig.host.stop_at = rig.host.operations

    with pytest.raises(PowerLoss):
        rig.run(go)
    rig.killed()
    assert rig.log.ids("vsnapfs").count(1053) == 1
    assert content(rig) == NEW + NEW + OLD[2 * BLOCK :]
    assert lost(rig) == 0


def test_a_ring_that_is_removed_as_soon_as_it_is_made_is_not_made_for_ever() -> None:
    """The volume does without, says so, and a kill has nothing to miss."""
    rig = made()

    async def go(volume: Volume) -> None:
        store = volume.buffer._store
        assert store is not None
        make, count = store.make, 0

        def removed(*args: Any) -> Ring:
            nonlocal count
            count += 1
            assert count < 10
            ring = make(*args)
            rig.host.memory.clear()
            return ring

        store.make = removed  # type: ignore[method-assign]
        await write_at(volume, 0, NEW)
        await write_at(volume, BLOCK, NEW)
        assert volume.status()["write_buffer"]["state"] == "off"

    rig.run(go)
    rig.killed()
    assert rig.log.ids("vsnapfs").count(1053) == 1
    assert rig.log.ids("vsnapfs").count(1091) == 1
    assert content(rig) == NEW + NEW + OLD[2 * BLOCK :]
    assert lost(rig) == 0


def test_a_ring_is_not_tried_for_ever_where_the_replica_s_host_has_shut_down() -> None:
    """Even fstat fails then. The volume does without, and the write is answered."""
    rig = made()
    looks = 0

    def shut_down(_backing: SimBacking) -> FileId:
        nonlocal looks
        looks += 1
        assert looks < 10
        raise OSError(errno.EIO, "shut down")

    async def go(volume: Volume) -> None:
        with mock.patch.object(SimBacking, "file_id", shut_down):
            await write_at(volume, 0, NEW)
        assert volume.status()["write_buffer"]["state"] == "off"

    rig.run(go)
    assert rig.log.ids("vsnapfs").count(1091) == 1
    assert content(rig) == NEW + OLD[BLOCK:]


def test_a_write_waits_while_a_ring_that_was_removed_is_emptied() -> None:
    """It may touch what the old one still holds: the order of the two stays."""
    rig = made()

    async def go(volume: Volume) -> None:
        await write_at(volume, 0, NEW)
        volume.buffer._look_if_there()
        assert volume.buffer.is_ready
        rig.host.memory.clear()
        volume.buffer._look_if_there()
        assert not volume.buffer.is_ready
        await write_at(volume, 100, b"newest")
        await flush(volume)

    rig.run(go)
    rig.killed()
    wanted = NEW[:100] + b"newest" + NEW[106:] + OLD[BLOCK:]
    assert content(rig) == wanted
    rig.run(look)


# -- what cannot be carried out -------------------------------------------------------------------


def stuck() -> Rig:
    """A volume that could not carry out an acknowledged write: its copy cannot be made durable."""
    rig = made()
    rig.host.fail("area", "sync", errno.EIO, nth=3, times=FOREVER)

    async def go(volume: Volume) -> None:
        await write_at(volume, 0, NEW)
        error = await attempt(flush(volume))
        assert error is not None
        assert error.errno == errno.ENODEV
        assert not volume.protection.is_online

    rig.run(go)
    assert 86 in rig.log.ids()
    assert rig.log.flush_failures == 1
    return rig


def test_online_carries_out_first_what_was_acknowledged() -> None:
    """The write stays in the ring, reads are refused, `online` applies it before anything else."""
    rig = stuck()
    assert content(rig) == NEW + OLD[BLOCK:]
    rig.host.failures.clear()

    async def back(volume: Volume) -> None:
        await volume.online()
        assert not volume.buffer.pending
        await flush(volume)
        await look(volume)

    rig.run(back)
    rig.crashed()
    assert content(rig) == NEW + OLD[BLOCK:]


def test_online_is_refused_while_it_still_cannot_be_carried_out() -> None:
    """As long as the cause is there, nothing of it is lost."""
    rig = stuck()

    async def back(volume: Volume) -> None:
        error = await attempt(volume.online())
        assert isinstance(error, VsnapError)
        assert volume.buffer.pending
        await look(volume)

    rig.run(back)
    assert content(rig) == NEW + OLD[BLOCK:]


def test_online_is_refused_where_there_is_no_room_for_what_was_acknowledged() -> None:
    """Growing is tried once, not again and again: the volume, being offline, was not waited for."""
    rig = stuck()
    rig.killed()

    async def back(volume: Volume) -> None:
        assert not volume.protection.is_online
        assert volume.buffer.pending
        rig.host.failures.clear()
        # As an opening that finds less room than there was.
        slots = volume.core.need_area().slots
        assert slots.reserve(slots.free) is not None
        rig.host.fail("area", "allocate", errno.ENOSPC, times=FOREVER)
        rig.threads = True
        with trio.fail_after(60):
            error = await attempt(volume.online())
        assert isinstance(error, VsnapError)
        assert volume.buffer.pending

    rig.run(back)
    assert rig.log.ids().count(24) <= 1
    rig.host.failures.clear()
    assert content(rig) == NEW + OLD[BLOCK:]


def test_a_stuck_write_survives_closing_and_a_kill() -> None:
    """The ring stays where it is, the log says so, and the way out still leads out."""
    rig = stuck()
    rig.close()
    assert len(rig.host.memory) == 1
    assert 1044 in rig.log.ids("vsnapfs")
    rig.host.failures.clear()
    rig.run(look)
    rig.killed()

    async def back(volume: Volume) -> None:
        assert not volume.protection.is_online
        await volume.online()
        await look(volume)

    rig.run(back)
    assert content(rig) == NEW + OLD[BLOCK:]


def test_no_point_no_restore_no_shrink_with_a_ring_that_is_not_empty() -> None:
    """All three would work on a replica that lacks an acknowledged write."""
    rig = stuck()

    async def go(volume: Volume) -> None:
        volume.protection.is_online = True  # As if the fault had come a moment later.
        for work in (volume.create_point(), volume.restore(1), volume.resize(SMALLEST)):
            error = await attempt(work)
            assert error is not None
        volume.protection.is_online = False
        await look(volume)

    rig.run(go)


def test_nothing_goes_to_an_area_that_somebody_else_writes_to() -> None:
    """Fault 15 while writes wait in the ring: they stay there."""
    rig = made()

    async def go(volume: Volume) -> None:
        await volume.buffer.start()
        await write_at(volume, 0, NEW)
        volume.core.area_is_stale = True
        written = rig.host.counts["area", "write"]
        assert (await attempt(volume.buffer.drain())) is not None
        assert rig.host.counts["area", "write"] == written
        assert volume.buffer.pending

    rig.run(go)


@pytest.mark.parametrize("name", ["preserve_acknowledged", "copy"])
def test_what_nobody_planned_for_is_a_fault_and_loses_nothing(name: str) -> None:
    """Not the end of the server: offline, the write waits, `online` carries it out."""
    rig = made()

    async def go(volume: Volume) -> None:
        owner = volume.writer if hasattr(volume.writer, name) else volume.writer.copier
        with mock.patch.object(owner, name, side_effect=RuntimeError("a defect")):
            await write_at(volume, 0, NEW)
            error = await attempt(flush(volume))
        assert error is not None
        assert error.errno == errno.ENODEV
        assert volume.protection.fault is not None
        assert int(volume.protection.fault.code) == 11
        await volume.online()
        await look(volume)

    rig.run(go)
    assert content(rig) == NEW + OLD[BLOCK:]


def test_giving_up_the_points_keeps_what_was_acknowledged() -> None:
    """The new diff area names the same ring; without points nothing needs a copy."""
    rig = stuck()
    rig.host.failures.clear()

    async def give_up(volume: Volume) -> None:
        await volume.online(give_up_recovery_points=True)
        assert not volume.points
        volume.check_invariants()

    rig.run(give_up)
    assert content(rig) == NEW + OLD[BLOCK:]


def test_a_replica_that_cannot_be_written_takes_the_volume_offline() -> None:
    """Nobody is left to refuse: fault 13; the write waits in the ring for `online`."""
    rig = made()
    rig.host.fail("replica", "write", errno.EIO, times=FOREVER)

    async def go(volume: Volume) -> None:
        await write_at(volume, 0, NEW)
        assert (await attempt(flush(volume))) is not None
        assert volume.protection.fault is not None
        assert int(volume.protection.fault.code) == 13
        rig.host.failures.clear()
        await volume.online()
        await look(volume)

    rig.run(go)
    assert content(rig) == NEW + OLD[BLOCK:]


def test_evict_gives_up_the_points_and_keeps_the_write() -> None:
    """Policy evict: a copy that fails costs the points, never an acknowledged write."""
    rig = made(on_full="evict")
    rig.host.fail("area", "sync", errno.EIO, nth=3, times=FOREVER)

    async def go(volume: Volume) -> None:
        await write_at(volume, 0, NEW)
        await flush(volume)
        assert not volume.points
        assert volume.protection.is_online
        volume.check_invariants()

    rig.run(go)
    assert 14 in rig.log.ids()
    assert content(rig) == NEW + OLD[BLOCK:]


def test_full_is_answered_to_its_own_writer() -> None:
    """W1: what does not fit is refused before it is acknowledged; what fitted is carried out."""
    rig = made(maximum=SMALLEST, size=40 * BLOCK, zero_blocks="copy")

    async def go(volume: Volume) -> None:
        refused = None
        done = 0
        while refused is None:
            refused = await attempt(write_at(volume, done * BLOCK, pattern(100 + done, BLOCK)))
            done += refused is None
        assert refused.errno == errno.ENODEV
        assert done == 32
        await volume.buffer.drain()
        found = acknowledged(rig, volume)
        assert not volume.buffer.pending
        for block in range(done):
            assert found[block * BLOCK : (block + 1) * BLOCK] == pattern(100 + block, BLOCK)
        assert found[done * BLOCK : (done + 1) * BLOCK] == bytes(BLOCK)
        await read_points(volume)

    rig.run(go)
    assert 87 in rig.log.ids()


def test_a_block_that_is_being_preserved_takes_no_second_slot() -> None:
    """With the area full to the last slot, its next write is acknowledged like any other."""
    rig = made(maximum=SMALLEST, size=32 * BLOCK)

    async def go(volume: Volume) -> None:
        area = volume.core.need_area()
        for block in range(32):
            await write_at(volume, block * BLOCK, pattern(block, 100))
            await trio.lowlevel.checkpoint()
            await write_at(volume, block * BLOCK + 200, pattern(block, 100))
            assert area.slots.in_use <= block + 1
        await flush(volume)
        await look_whole(volume)

    rig.run(go)
    assert 87 not in rig.log.ids()


async def look_whole(volume: Volume) -> None:
    assert (await read_points(volume))[1] == OLD.ljust(volume.size, b"\0")[: volume.size]


def test_readers_and_flushes_are_not_starved_by_writers() -> None:
    """Under writers that never stop, a read and a flush are answered within a few rounds."""
    rig = made()

    async def go(volume: Volume) -> None:
        answered: list[str] = []

        async def keep_writing() -> None:
            number = 0
            while len(answered) < 2:
                number += 1
                await write_at(volume, number % 8 * BLOCK, pattern(number, 600))
                await trio.lowlevel.checkpoint()
                assert number < 3000, answered

        async def read() -> None:
            handle = volume.open_replica()
            await handle.read(0, SIZE)
            answered.append("read")

        async def flushed() -> None:
            await flush(volume)
            answered.append("flush")

        async with trio.open_nursery() as nursery:
            for work in (keep_writing, keep_writing, read, flushed):
                nursery.start_soon(work)

    rig.run(go)


# -- durability "process" -------------------------------------------------------------------------


def test_durability_process_survives_a_kill() -> None:
    """Nothing is synced, and nothing needs to be: the host's cache outlives us."""
    rig = made(durability="process")
    before = rig.host.counts["area", "sync"]

    async def go(volume: Volume) -> None:
        for block in range(8):
            await write_at(volume, block * BLOCK, NEW)
        await volume.buffer.drain()
        await write_at(volume, 0, OLD[:BLOCK])

    rig.run(go)
    assert rig.host.counts["area", "sync"] - before <= 2  # The commit that names the ring.
    rig.killed()
    assert content(rig) == OLD[:BLOCK] + NEW * 7
    rig.run(look)
    assert 1045 not in rig.log.ids("vsnapfs")


def test_after_a_power_failure_with_durability_process_points_are_suspect() -> None:
    """The log and the status say so until the last of these points is gone; new ones are not."""
    rig = made(durability="process")
    rig.run(write_new)
    rig.crashed()

    async def status(volume: Volume) -> tuple[int, int]:
        found = volume.status()
        assert found["durability"] == "process"
        return found["suspect_points"], found["recovery_points"]

    async def create(volume: Volume) -> None:
        await volume.create_point()

    assert rig.run(status) == (1, 1)
    assert rig.log.ids("vsnapfs").count(1045) == 1
    rig.run(create)
    rig.close()
    assert rig.run(status) == (1, 2)
    rig.close()
    assert rig.log.ids("vsnapfs").count(1045) == 1


def test_a_clean_close_makes_all_of_it_durable() -> None:
    """After it a power failure spoils nothing, whatever the durability was."""
    rig = made(durability="process")
    rig.run(write_new)
    rig.close()
    rig.crashed()
    rig.run(look)
    assert content(rig) == NEW + OLD[BLOCK:]
    assert 1045 not in rig.log.ids("vsnapfs")


def _spoilt(how: str, *, buffer: int, durability: str = "process", then: str = "kill") -> Rig:
    """A volume of which one sync of the diff area has failed, while copies were not yet synced."""
    rig = made(buffer=buffer, durability=durability, maximum=SMALLEST + 64 * BLOCK)

    async def go(volume: Volume) -> None:
        await write_at(volume, 0, NEW * 3)
        await flush(volume)
        if how == "the whole disk":  # The state file's writes fail, too, and reach the cache only.
            rig.host.fail(None, "sync", errno.EIO, times=FOREVER)
        elif how != "opening":
            rig.host.fail("area", "sync", errno.EIO)
        if how in ("deletion", "the whole disk"):
            assert await attempt(volume.delete_point(1)) is not None
        elif how == "resize":
            assert await attempt(volume.resize(SMALLEST + 99 * BLOCK)) is not None
        elif how == "growth":
            with contextlib.suppress(FaultError):
                await volume.room.grow_to_hold(40)
        if how != "closing":
            rig.host.failures.clear()
        if not volume.protection.is_online and how != "the whole disk":
            await volume.online()
        if then == "close":
            await volume.close()

    rig.run(go)
    if how == "opening":
        rig.killed()
        rig.host.fail("area", "sync", errno.EIO)
        rig.run(_nothing)
    rig.host.failures.clear()
    rig.killed()
    return rig


async def _nothing(_volume: Volume) -> None:
    return


@pytest.mark.parametrize("buffer", [0, 64 * 1024])
@pytest.mark.parametrize(
    ("how", "then"),
    [
        ("deletion", "kill"),
        ("deletion", "close"),
        ("the whole disk", "kill"),
        ("resize", "kill"),
        ("resize", "close"),
        ("growth", "kill"),
        ("growth", "close"),
        ("closing", "close"),
        ("opening", "kill"),
    ],
)
def test_a_sync_that_failed_with_durability_process_makes_points_suspect(
    how: str, then: str, buffer: int
) -> None:
    """Copies whose blocks have been overwritten may be lost with it: the log and the status say so
    of all points there were, whatever comes then. With durability "power" none is lost.
    """
    rig = _spoilt(how, buffer=buffer, then=then)
    told = rig.log.ids("vsnapfs").count(1045)

    async def look_at_it(volume: Volume) -> tuple[int, bool]:
        found = volume.status()["suspect_points"]
        if volume.protection.is_online or await attempt(volume.online()) is None:
            await volume.create_point()
            assert volume.status()["suspect_points"] == found, "a later point is none of them"
        return found, (await read_points(volume))[1] == OLD

    assert rig.run(look_at_it)[0] == 1
    assert told == 1
    sound = _spoilt(how, buffer=buffer, then=then, durability="power")
    assert sound.run(look_at_it) == (0, True)
    assert 1045 not in sound.log.ids("vsnapfs")


def test_points_that_were_suspect_already_and_the_first_sync_of_an_opening_fails() -> None:
    """With durability "process". The opening after it does not take the area for an old copy."""
    rig = made(durability="process")
    rig.run(write_at, 7 * BLOCK, NEW)
    rig.crashed()

    async def go(volume: Volume) -> None:
        for block in (0, 1, 2):
            await write_at(volume, block * BLOCK, NEW)
            await flush(volume)

    rig.run(go)
    for _ in range(2):
        rig.killed()
        rig.host.fail("area", "sync", errno.EIO)
        rig.run(_nothing)
    rig.killed()

    async def look_at_it(volume: Volume) -> None:
        assert not volume.core.need_area().is_old
        assert volume.protection.fault is not None
        await volume.online()
        assert volume.status()["suspect_points"] == 1

    rig.run(look_at_it)
    assert rig.log.ids("vsnapfs").count(1045) == 1


@pytest.mark.parametrize("policy", ["offline", "evict"])
def test_with_durability_process_the_disk_of_the_area_is_lost_after_a_kill(policy: str) -> None:
    """It comes back without what was not synced, in the same life of the machine, and the blocks
    have been overwritten: the ring knows of more, so the points are suspect, told once; no fault.
    """
    rig = made(durability="process", on_full=policy)

    async def go(volume: Volume) -> None:
        for block in (0, 1, 2):
            await write_at(volume, block * BLOCK, NEW)
        await flush(volume)
        rig.host.stop_at = rig.host.operations

    with contextlib.suppress(PowerLoss):
        rig.run(go)
    left = rig.host.files["area"].disk.copy()
    rig.killed()
    rig.host.files["area"] = rig.host.files["area"].after_power_failure(left)

    async def look_at_it(volume: Volume) -> None:
        assert volume.protection.is_online
        assert volume.status()["suspect_points"] == 1
        await volume.create_point()
        await write_at(volume, 5 * BLOCK, NEW)
        assert volume.status()["suspect_points"] == 1

    rig.run(look_at_it)
    rig.killed()
    rig.run(look_at_it)
    assert rig.log.ids("vsnapfs").count(1045) == 1


@pytest.mark.parametrize("before", [False, True], ids=["", "after-a-power-failure"])
@pytest.mark.parametrize("policy", ["offline", "evict"])
def test_with_durability_process_no_sync_of_the_area_succeeds_any_more(
    policy: str, before: bool
) -> None:
    """What is lost with it is known all the same once the disk works again, and the ring, which was
    told of barriers that no disk has seen, does not take the area for an old copy. Not even where
    no more points became suspect, for all of them were.
    """
    rig = made(durability="process", on_full=policy)
    if before:
        rig.run(write_at, 7 * BLOCK, NEW)
        rig.crashed()

    async def go(volume: Volume) -> None:
        for block in (0, 1, 2):  # The last of these barriers is followed by no commit.
            await write_at(volume, block * BLOCK, NEW)
            await flush(volume)
        rig.host.fail("area", "sync", errno.EIO, times=FOREVER)
        assert await attempt(volume.delete_point(1)) is not None
        await attempt(write_at(volume, 4 * BLOCK, NEW))
        await volume.close()

    rig.run(go)
    rig.host.failures.clear()
    rig.killed()

    async def is_ours(volume: Volume) -> None:
        assert not volume.core.need_area().is_old

    for _ in range(2):  # Killed before the ring is told of anything new.
        rig.run(is_ours)
        rig.killed()

    async def look_at_it(volume: Volume) -> None:
        assert not volume.core.need_area().is_old
        found = volume.status()
        assert found["suspect_points"] == found["recovery_points"] == (policy == "offline")
        if policy == "offline":
            await volume.online()
        number = (await volume.create_point()).number
        await write_at(volume, 0, OLD)
        await flush(volume)
        assert volume.suspect < number

    rig.run(look_at_it)
    rig.close()
    rig.run(_nothing)
    assert rig.log.ids("vsnapfs").count(1045) == 1 + before


def test_what_recovery_found_is_told_by_online_if_the_opening_found_a_fault() -> None:
    """After a power failure with durability "process" the replica's first sync fails (13): points
    are suspect, and the log says so no later than the commit that makes that durable.
    """
    rig = made(durability="process", buffer=64 * 1024)

    async def go(volume: Volume) -> None:
        await write_at(volume, 0, NEW * 3)
        await volume.buffer.drain()

    rig.run(go)
    rig.crashed(lambda name, _number, change: name == "area" and len(change.data or b"") == 512)
    rig.host.fail("replica", "sync", errno.EIO)

    async def online(volume: Volume) -> None:
        fault = volume.protection.fault
        assert fault is not None
        assert int(fault.code) == 13
        assert volume.status()["suspect_points"] == 1
        await volume.online()

    rig.run(online)
    assert rig.log.ids("vsnapfs").count(1045) == rig.log.ids("vsnapfs").count(1042) == 1
    rig.close()
    rig.run(_nothing)
    assert rig.log.ids("vsnapfs").count(1045) == 1


class _Dying(bytearray):
    """Shared memory of a process that is killed in the midst of its nth change."""

    left = FOREVER

    def __setitem__(self, where: Any, data: Any) -> None:
        self.left -= 1
        if self.left < 0:
            data = bytes(data)[: len(data) // 2] + bytes(self[where])[len(data) // 2 :]
        super().__setitem__(where, data)
        if self.left < 0:
            raise PowerLoss


@pytest.mark.parametrize("second", [0, 1])
@pytest.mark.parametrize("between", [0, 1, 2])
@pytest.mark.parametrize("first", [0, 1])
def test_a_cursor_outlasts_being_killed_in_the_midst_of_it_twice(
    first: int, between: int, second: int
) -> None:
    """What one kill has left half written is not in the way of the next one: nothing is lost."""
    memory = _Dying(RECORDS + 4096)
    ring = Ring.make(memory, NAME, b"v" * 16)
    for number, stops_at in enumerate((first, *(between * [FOREVER]), second)):
        record = ring.append(number, NEW[:100])
        assert record is not None
        memory.left = stops_at
        with contextlib.suppress(PowerLoss):
            ring.release(record)
        memory.left = FOREVER
        ring = Ring.found(memory, NAME, b"v" * 16)
        left = [one.offset for one in ring.records()]
        assert left in ([], [number])
        for one in list(Ring.found(memory, NAME, b"v" * 16).records()):
            ring.release(one)
