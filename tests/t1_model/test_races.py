"""Races, each in the one order that matters, and each with the lock or second look taken away.

A schedule holds a worker thread at an exact operation of the simulated disk, lets the other side
run as far as it can, and lets go. `MUTANTS` removes what the schedule is about; the same schedule
must then fail. What passes both would prove nothing. Two openings at one time: `test_two_openings`.
"""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from functools import partial
from types import SimpleNamespace

import pytest
import trio
from powercuts import nothing_kept
from rig import (
    BLOCK,
    SMALLEST,
    Rig,
    pattern,
    raw_replica,
    read_point,
    read_points,
    small_steps,
    write,
)
from schedules import Doing, Pause, all_stand_still, edited
from simdisk import SimBacking

from vsnapfs.errors import BusyError, VsnapError
from vsnapfs.volume import Volume
from vsnapfs.volume.coldreads import PLACES
from vsnapfs.volume.core import SharedSync, WriteGate
from vsnapfs.volume.handles import PointHandle, ReplicaHandle, SynchronousHandle
from vsnapfs.volume.points import Points
from vsnapfs.volume.protection import Protection
from vsnapfs.volume.reader import Reader
from vsnapfs.volume.resize import Resize
from vsnapfs.volume.restore import Restore
from vsnapfs.volume.writer import Writer

SIZE = 12 * BLOCK + 1000
OLD, NEW, NEWER = pattern(1, SIZE), pattern(2, SIZE), pattern(3, SIZE)

Schedule = Callable[[Rig, Volume], Awaitable[None]]


def run(schedule: Schedule) -> None:
    """Run it on a new volume that holds `OLD`, with real worker threads."""

    async def main(volume: Volume) -> None:
        await write(volume, 0, OLD)
        await schedule(rig, volume)
        volume.check_invariants()

    with small_steps():
        # Growing takes as long as a schedule likes.
        rig = Rig(size=SIZE, grow_timeout=60.0, buffer=BUFFERS.get(schedule, 0))
        rig.threads = True
        rig.run(main)


# --- R2: readers of points against writers of the same blocks ------------------------------------


async def a_reader_falls_through_while_the_block_is_overwritten(rig: Rig, volume: Volume) -> None:
    """R2: a reader that is about to read the replica gets the copy made meanwhile."""
    await volume.create_point()
    async with trio.open_nursery() as nursery:
        with Pause(rig, "replica", "read") as reading:
            point = volume.open_point(1)
            reader = Doing(nursery, point.read(BLOCK, 3 * BLOCK))
            await reading.reached()
            await write(volume, BLOCK, NEW[BLOCK : 3 * BLOCK])
            reading.go()
            found = bytes(await reader.ended())
        point.close()
    assert found == OLD[BLOCK : 4 * BLOCK], "a byte that was written after the point"


async def a_short_read_falls_through_while_the_block_is_overwritten(
    rig: Rig, volume: Volume
) -> None:
    """R2: the same for part of one block."""
    await volume.create_point()
    async with trio.open_nursery() as nursery:
        with Pause(rig, "replica", "read") as reading:
            point = volume.open_point(1)
            reader = Doing(nursery, point.read(BLOCK + 5, 100))
            await reading.reached()
            await write(volume, BLOCK, NEW[BLOCK : 2 * BLOCK])
            reading.go()
            found = bytes(await reader.ended())
        point.close()
    assert found == OLD[BLOCK + 5 : BLOCK + 105], "a byte that was written after the point"


async def a_read_waits_for_others_while_its_block_is_overwritten(rig: Rig, volume: Volume) -> None:
    """R2: a short read that is answered when others come back from the disk looks again."""
    await volume.create_point()
    point = volume.open_point(1)
    async with trio.open_nursery() as nursery:
        with ExitStack() as stack:
            for block in range(5, 5 + PLACES):
                place = block * BLOCK, block * BLOCK + BLOCK
                reading = stack.enter_context(Pause(rig, "replica", "read", at=place))
                Doing(nursery, point.read(block * BLOCK, 100))
                await reading.reached()
            reader = Doing(nursery, point.read(BLOCK + 5, 100))
            await all_stand_still()
            await write(volume, BLOCK, NEW[BLOCK : 2 * BLOCK])
            assert not reader.answered
            rig.host.cached = True  # All that was asked for has arrived.
            reading.go()
            found = bytes(await reader.ended())
    point.close()
    assert found == OLD[BLOCK + 5 : BLOCK + 105], "a byte that was written after the point"


async def a_block_is_overwritten_whose_copy_can_be_found(rig: Rig, volume: Volume) -> None:
    """R2: at the instant of overwriting the copy is in the index, so a second look finds it."""
    await volume.create_point()
    area = volume.core.need_area()
    found: list[bool] = []

    def hook(backing: SimBacking, operation: str, offset: int, _length: int) -> None:
        if (backing.name, operation) == ("replica", "write"):
            found.append(area.index.lookup(1, offset // BLOCK) is not None)

    rig.host.hooks.append(hook)
    await write(volume, BLOCK, NEW[:10])
    rig.host.hooks.remove(hook)
    assert found == [True]


async def a_copy_is_read_whose_slot_a_shrink_moves(rig: Rig, volume: Volume) -> None:
    """R1: a reader whose slot is moved and used anew looks again and finds the copy's new place."""
    for turn in range(4):
        await volume.create_point()
        await write(volume, 0, pattern(10 + turn, SIZE))
    area = volume.core.need_area()
    slot = area.index.lookup(4, 0)[1]  # type: ignore[index]
    assert slot >= area.layout.slots_in(SMALLEST)
    await volume.delete_point(1)
    await volume.delete_point(2)
    where = area.layout.slot_offset(slot)
    async with trio.open_nursery() as nursery:
        with Pause(rig, "area", "read", at=(where, where + 1)) as reading:
            point = volume.open_point(4)
            reader = Doing(nursery, point.read(0, 1000))
            await reading.reached()
            await volume.resize(SMALLEST)
            reading.go()
            # The file ends before that slot now.
            assert bytes(await reader.ended()) == pattern(12, SIZE)[:1000]
        point.close()


# --- W2: two writers of one block ----------------------------------------------------------------


async def a_second_writer_comes_while_the_copy_is_on_its_way(rig: Rig, volume: Volume) -> None:
    """W2: nobody overwrites, and nobody is answered, before the barrier of the first has passed."""
    await volume.create_point()
    async with trio.open_nursery() as nursery:
        with Pause(rig, "area", "sync", nth=1) as barrier:
            first = Doing(nursery, write(volume, 0, NEW[:1000]))
            await barrier.reached()
            second = Doing(nursery, write(volume, 2000, NEWER[2000:2500]))
            await all_stand_still()
            assert not second.answered
            assert raw_replica(rig) == OLD, "overwritten before its copy was durable"
            barrier.go()
            await first.ended()
            await second.ended()
    assert await read_point(volume, 1) == OLD
    assert raw_replica(rig)[2000:2500] == NEWER[2000:2500]


# --- create against writes in flight -------------------------------------------------------------


async def a_point_is_created_while_a_write_is_in_flight(rig: Rig, volume: Volume) -> None:
    """A write whose copy is on its way belongs before the point: creating waits for it."""
    await volume.create_point()
    async with trio.open_nursery() as nursery:
        with Pause(rig, "replica", "allocate") as filling:
            # The copies are there, the block is not yet overwritten: there is a hole to be filled.
            rig.host.files["replica"].written.discard(2)
            volume.core.no_holes.clear()
            writer = Doing(nursery, write(volume, 2 * BLOCK, NEW[:BLOCK]))
            await filling.reached()
            creator = Doing(nursery, volume.create_point())
            await all_stand_still()
            seen = await read_point(volume, 2) if creator.answered else None
            filling.go()
            await writer.ended()
            await creator.ended()
    changed = OLD[: 2 * BLOCK] + NEW[:BLOCK] + OLD[3 * BLOCK :]
    assert await read_points(volume) == {1: OLD, 2: changed}
    assert seen in (None, changed), "the new point has changed"


async def a_write_comes_while_a_point_is_created(rig: Rig, volume: Volume) -> None:
    """W2: once the replica is synced for a point, writes wait; power loss changes nothing."""
    await volume.create_point()
    await write(volume, 0, NEW[:BLOCK])  # preserved now: the next write of it needs no copy
    async with trio.open_nursery() as nursery:
        with Pause(rig, "area", "sync", nth=1) as commit:
            creator = Doing(nursery, volume.create_point())
            await commit.reached()
            writer = Doing(nursery, write(volume, 0, NEWER[:BLOCK]))
            await all_stand_still()
            commit.go()
            await creator.ended()
            seen = await read_point(volume, 2)
            await writer.ended()
    rig.crashed(nothing_kept)
    reopened = rig.volume = await rig.open()
    async with trio.open_nursery() as nursery:
        await nursery.start(reopened.run)
        assert await read_point(reopened, 2) == seen, "the new point has changed"
        assert await read_point(reopened, 1) == OLD
        nursery.cancel_scope.cancel()


# --- delete against open readers, and against writers --------------------------------------------


async def a_point_is_deleted_while_it_is_read(rig: Rig, volume: Volume) -> None:
    """A reader of a deleted point gets ESTALE, never what its slots hold by now."""
    await volume.create_point()
    await write(volume, 0, NEW)
    area = volume.core.need_area()
    where = area.layout.slot_offset(area.index.lookup(1, 0)[1])  # type: ignore[index]
    point = volume.open_point(1)
    with pytest.raises(BusyError):
        await volume.delete_point(1)
    async with trio.open_nursery() as nursery:
        with Pause(rig, "area", "read", at=(where, where + 1)) as reading:
            reader = Doing(nursery, point.read(0, BLOCK))
            await reading.reached()
            await volume.delete_point(1, force=True)
            await volume.create_point()
            await write(volume, 0, NEWER)  # takes the slots that have become free
            reading.go()
            with pytest.raises(OSError) as caught:
                await reader.ended()
    assert caught.value.errno == errno.ESTALE
    point.close()
    assert await read_points(volume) == {2: NEW}


async def points_are_given_up_while_one_is_read(rig: Rig, volume: Volume) -> None:
    """Its reader gets ESTALE, while the new area is made and after; nothing is said of damage."""
    await volume.create_point()
    await write(volume, 0, NEW)
    await volume.go_offline()
    point = volume.open_point(1)
    async with trio.open_nursery() as nursery:
        with Pause(rig, "area", "allocate") as making, Pause(rig, "area", "read") as reading:
            later = Doing(nursery, point.read(0, SIZE))
            await reading.reached()
            giving_up = Doing(nursery, volume.online(give_up_recovery_points=True))
            await making.reached()
            with pytest.raises(OSError) as caught:
                await point.read(0, SIZE)
            assert caught.value.errno == errno.ESTALE
            making.go()
            await giving_up.ended()
            reading.go()
            with pytest.raises(OSError) as caught:
                await later.ended()
    assert caught.value.errno == errno.ESTALE
    assert 1040 not in rig.log.ids("vsnapfs")
    point.close()


async def a_point_is_deleted_while_writers_have_reserved_slots(rig: Rig, volume: Volume) -> None:
    """Slots promised to a writer that waits are not given to another one by a deletion."""
    for _ in range(2):
        await volume.create_point()
        await write(volume, 0, OLD[:BLOCK])
    async with trio.open_nursery() as nursery:
        with Pause(rig, "area", "sync", nth=1) as barrier:
            writers = [Doing(nursery, write(volume, 2 * BLOCK, NEW[:BLOCK]))]
            await barrier.reached()
            # Waits for the barrier's lock, and will have it before the next batch.
            deleting = Doing(nursery, volume.delete_point(1))
            await all_stand_still()
            writers.append(Doing(nursery, write(volume, 4 * BLOCK, NEW[:BLOCK])))
            await all_stand_still()
            assert not deleting.answered
            assert not writers[1].answered
            barrier.go()
            for doing in (*writers, deleting):
                await doing.ended()
    volume.check_invariants()
    for block in (5, 6, 7):
        await write(volume, block * BLOCK, NEWER[:BLOCK])
    volume.check_invariants()
    assert await read_points(volume) == {2: OLD}


# --- resize against growth -----------------------------------------------------------------------


async def the_maximum_is_lowered_while_the_area_grows(rig: Rig, volume: Volume) -> None:
    """C1: growing and shrinking exclude each other; the writer that waits for room gets it."""
    area = volume.core.need_area()
    contents = {1: OLD}
    async with trio.open_nursery() as nursery:
        with Pause(rig, "area", "allocate") as growing:
            await volume.create_point()
            for turn in range(2, 9):
                content = pattern(20 + turn, SIZE)
                writer = Doing(nursery, write(volume, 0, content))
                await all_stand_still()
                if not writer.answered:
                    break
                contents[(await volume.create_point()).number] = content
            assert growing.was_reached
            shrinking = Doing(nursery, volume.resize(area.allocated + 2 * BLOCK))
            await all_stand_still()
            assert not writer.answered
            growing.go()
            await writer.ended()
            await _answered(shrinking)
    assert volume.protection.is_online, volume.protection.fault
    await all_stand_still()
    assert area.used <= area.allocated <= area.maximum
    assert rig.host.files["area"].cache.size == area.allocated
    assert area.layout.size_of(len(area.slots)) == area.allocated
    assert await read_points(volume) == contents
    assert raw_replica(rig) == content


async def _answered(doing: Doing) -> None:
    """Wait for a resize; that it was too small or gave up is an answer, too."""
    try:
        await doing.ended()
    except VsnapError as error:
        if error.code not in ("too-small", "gave-up"):
            raise


async def a_write_takes_the_space_that_a_shrink_has_the_lock_for(rig: Rig, volume: Volume) -> None:
    """A shrink that was ended after it had been given the lock, but before it ran, cuts nothing."""
    core, area = volume.core, volume.core.need_area()
    target = area.layout.slots_in(SMALLEST)
    while len(area.slots) <= target:
        await volume.create_point()
        await write(volume, 0, pattern(31, SIZE))
        await all_stand_still()
    for point in volume.points:
        await volume.delete_point(point.number)
    await volume.create_point()
    await write(volume, 0, NEW[:BLOCK])
    low_ones = target - area.slots.in_use
    promised: list[int] = []
    waits = trio.Event()

    async def writer() -> None:
        async with core.area_lock:
            waits.set()
            await all_stand_still()
            # The shrink stands behind us. What a writer does that finds no room:
            assert area.slots.reserve(low_ones + 1) is None
        await volume.room.make(low_ones + 1)
        promised.extend(area.slots.reserve(low_ones + 1) or [])
        volume.room.promised.update(promised)

    async with trio.open_nursery() as nursery:
        with Pause(rig, "area", "sync") as clearing:  # the last step before the cut
            shrinking = Doing(nursery, volume.resize(SMALLEST))
            await clearing.reached()
            writing = Doing(nursery, writer())
            await all_stand_still()
            clearing.go()
            await writing.ended()
            with pytest.raises(VsnapError, match="given up"):
                await shrinking.ended()
    assert len(promised) == low_ones + 1
    assert max(promised) >= target
    assert max(promised) < len(area.slots), "slots that were promised have been cut off"
    assert rig.host.files["area"].cache.size == area.allocated
    area.slots.release(promised)
    volume.room.promised.clear()


# --- a fault against a flush, a write, a refusal -------------------------------------------------


async def a_fault_comes_while_a_flush_is_under_way(rig: Rig, volume: Volume) -> None:
    """P1: the flush that was under way when the volume went offline is refused, and logged."""
    handle = volume.open_replica()
    async with trio.open_nursery() as nursery:
        with Pause(rig, "replica", "sync") as syncing:
            flushing = Doing(nursery, handle.flush())
            await syncing.reached()
            await volume.go_offline()
            syncing.go()
            with pytest.raises(OSError) as caught:
                await flushing.ended()
    assert caught.value.errno == errno.ENODEV
    assert rig.log.flush_failures == 1
    handle.close()


async def a_fault_comes_while_a_copy_is_on_its_way(rig: Rig, volume: Volume) -> None:
    """W1, P1: a write whose copy was made while the volume went offline moves no byte."""
    await volume.create_point()
    async with trio.open_nursery() as nursery:
        with Pause(rig, "area", "sync", nth=1) as barrier:
            writer = Doing(nursery, write(volume, 0, NEW[:BLOCK]))
            await barrier.reached()
            offline = Doing(nursery, volume.go_offline())
            await all_stand_still()
            assert not volume.protection.is_online
            barrier.go()
            with pytest.raises(OSError) as caught:
                await writer.ended()
            await offline.ended()
    assert caught.value.errno == errno.ENODEV
    assert raw_replica(rig) == OLD
    assert await read_points(volume) == {1: OLD}


async def a_fault_comes_while_a_restore_waits_for_writes(rig: Rig, volume: Volume) -> None:
    """P1: once the volume is offline by a fault the restore is refused, and nothing is written."""
    await volume.create_point()
    await write(volume, 0, NEW[:BLOCK])
    failed = OSError(errno.EIO, "failed")
    async with trio.open_nursery() as nursery:
        with Pause(rig, "area", "sync", error=failed) as copying:
            writer = Doing(nursery, write(volume, BLOCK, NEW[:BLOCK]))
            await copying.reached()
            restoring = Doing(nursery, volume.restore(1, force=True))
            await all_stand_still()
            copying.go()
            with pytest.raises(OSError):
                await writer.ended()
            with pytest.raises(VsnapError) as caught:
                await restoring.ended()
    assert caught.value.code == "offline"
    assert raw_replica(rig) == NEW[:BLOCK] + OLD[BLOCK:]


async def a_point_is_opened_while_its_deletion_waits(rig: Rig, volume: Volume) -> None:
    """Without force whoever reads a point does not lose it, also if the deletion has to wait."""
    await volume.create_point()
    async with trio.open_nursery() as nursery:
        with Pause(rig, "area", "read", at=(0, 1)) as checking:
            verifying = Doing(nursery, volume.verify())
            await checking.reached()
            deleting = Doing(nursery, volume.delete_point(1))
            await all_stand_still()
            point = volume.open_point(1)
            checking.go()
            with pytest.raises(BusyError):
                await deleting.ended()
            await verifying.ended()
    assert bytes(await point.read(0, SIZE)) == OLD
    point.close()
    await volume.delete_point(1)


async def a_flush_fails_while_others_wait_for_a_check(rig: Rig, volume: Volume) -> None:
    """P1: a restore and a new point that still wait for `area_lock` then are refused, too."""
    await volume.create_point()
    await write(volume, 0, NEW)
    for work in (partial(volume.restore, 1, force=True), volume.create_point):
        replica = volume.open_replica()
        await replica.flush()  # What a failed one loses does not come back.
        async with trio.open_nursery() as nursery:
            with Pause(rig, "area", "read", at=(0, 1)) as checking:
                verifying = Doing(nursery, volume.verify())
                await checking.reached()
                asked = Doing(nursery, work())
                await all_stand_still()
                rig.host.fail("replica", "sync", errno.EIO)
                flushing = Doing(nursery, replica.flush())
                await all_stand_still()
                checking.go()
                with pytest.raises(OSError):
                    await flushing.ended()
                with pytest.raises(VsnapError) as caught:
                    await asked.ended()
                await verifying.ended()
        replica.close()
        assert caught.value.code == "offline"
        assert raw_replica(rig) == NEW
        assert [point.number for point in volume.points] == [1]
        await volume.online()


async def a_flush_fails_while_the_volume_comes_online(rig: Rig, volume: Volume) -> None:
    """P1, W4: it is no fault as long as the volume is offline, and one as soon as it is not."""
    replica = volume.open_replica()
    async with trio.open_nursery() as nursery:
        failed = OSError(errno.EIO, "failed")
        with Pause(rig, "replica", "sync", error=failed) as syncing:
            flushing = Doing(nursery, replica.flush())
            await syncing.reached()
            await volume.go_offline()
            with Pause(rig, "area", "write") as committing:
                coming = Doing(nursery, volume.online())
                await committing.reached()
                syncing.go()
                with pytest.raises(OSError):
                    await flushing.ended()
                committing.go()
                with pytest.raises(VsnapError) as caught:
                    await coming.ended()
    replica.close()
    assert caught.value.code == "still-faulted"
    assert volume.protection.fault is not None
    assert not await volume.online()


async def somebody_is_refused_before_the_fault_is_durable(rig: Rig, volume: Volume) -> None:
    """P1: no refusal is answered before a power failure would find the volume offline."""
    handle = volume.open_replica()
    async with trio.open_nursery() as nursery:
        with Pause(rig, "state", "sync") as saving:
            offline = Doing(nursery, volume.go_offline())
            await saving.reached()
            reader = Doing(nursery, handle.read(0, 100))
            writer = Doing(nursery, handle.write(0, b"x"))
            await all_stand_still()
            assert not offline.answered
            told = reader.answered or writer.answered
            if told:
                assert not await _online_after_power_failure(rig), "refused, and online again"
            saving.go()
            for doing in (reader, writer):
                with pytest.raises(OSError):
                    await doing.ended()
            await offline.ended()
    handle.close()
    assert not await _online_after_power_failure(rig)


async def _online_after_power_failure(rig: Rig) -> bool:
    other = rig.on(rig.host.snapshot().power_failure(nothing_kept))
    volume = await other.open()
    return volume.protection.is_online


def _slow_to_tell(rig: Rig) -> Pause:
    """The event log is slow to take a fault, which is told before it is written down."""
    log = rig.log.log

    def slow_log(source: str, event_id: int, /, **params: object) -> None:
        for hook in tuple(rig.host.hooks):
            hook(SimpleNamespace(name="log"), "write", event_id, 0)  # type: ignore[arg-type]
        log(source, event_id, **params)

    rig.log.log = slow_log  # type: ignore[method-assign]
    return Pause(rig, "log", "write", at=(80, 95))


async def points_are_given_up_before_the_fault_is_durable(rig: Rig, volume: Volume) -> None:
    """P1: whoever gives up the points waits for the fault that is being written down. It is not
    written down once it has been cleared: the next opening is online.
    """
    await volume.create_point()
    rig.host.fail("area", "sync", errno.EIO)
    async with trio.open_nursery() as nursery:
        with _slow_to_tell(rig) as telling:
            writer = Doing(nursery, write(volume, 0, NEW[:BLOCK]))
            await telling.reached()
            giving_up = Doing(nursery, volume.online(give_up_recovery_points=True))
            await all_stand_still()
            early = giving_up.answered
            telling.go()
            with pytest.raises(OSError, match="No such device"):
                await writer.ended()
            await giving_up.ended()
    assert volume.protection.is_online
    rig.killed()
    reopened = await rig.open()
    assert reopened.protection.is_online, "offline by a fault that had been cleared"
    assert not early


async def offline_is_asked_for_before_the_fault_is_durable(rig: Rig, volume: Volume) -> None:
    """P1: that it is offline already is answered when the disk knows it, too."""
    await volume.create_point()
    rig.host.fail("area", "sync", errno.EIO)
    async with trio.open_nursery() as nursery:
        with _slow_to_tell(rig) as telling:
            writer = Doing(nursery, write(volume, 0, NEW[:BLOCK]))
            await telling.reached()
            going = Doing(nursery, volume.go_offline())
            await all_stand_still()
            assert not going.answered, "a kill now, and the next opening is online"
            telling.go()
            await going.ended()
            with pytest.raises(OSError, match="No such device"):
                await writer.ended()


async def two_flushes_and_one_of_them_fails(rig: Rig, volume: Volume) -> None:
    """W4: Linux tells one caller of a lost page; a flush beside it must not be a success."""
    first, second = volume.open_replica(), volume.open_replica()
    failing = OSError(errno.EIO, "lost")
    async with trio.open_nursery() as nursery:
        with Pause(rig, "replica", "sync", error=failing) as syncing:
            one = Doing(nursery, first.flush())
            await syncing.reached()
            two = Doing(nursery, second.flush())
            await all_stand_still()
            assert not two.answered, "a flush succeeded beside one that fails"
            syncing.go()
            for doing in (one, two):
                with pytest.raises(OSError):
                    await doing.ended()
    fault = volume.protection.fault
    assert fault is not None
    assert fault.code == 13
    first.close()
    second.close()


async def a_synchronous_write_comes_while_a_sync_is_under_way(rig: Rig, volume: Volume) -> None:
    """W4: the sync under way began before the write, so it is not the write's; the next one is."""
    first, second = (volume.open_replica(synchronous=True) for _ in range(2))
    async with trio.open_nursery() as nursery:
        with Pause(rig, "replica", "sync") as one, Pause(rig, "replica", "sync", nth=2) as two:
            early = Doing(nursery, first.write(0, NEW[:BLOCK]))
            await one.reached()
            late = Doing(nursery, second.write(BLOCK, NEW[:BLOCK]))
            await all_stand_still()
            assert not early.answered
            one.go()
            await early.ended()
            await all_stand_still()
            assert not late.answered, "the sync that was under way is no answer"
            await two.reached()
            two.go()
            await late.ended()
            assert _after_power_failure(rig)[: 2 * BLOCK] == 2 * NEW[:BLOCK]
    first.close()
    second.close()


async def synchronous_writes_in_the_buffer_share_a_sync(rig: Rig, volume: Volume) -> None:
    """W4: of writes that lie in the write buffer, each is answered when it is on the disk; many
    that come while one sync is under way have the next in common.
    """
    handle = volume.open_replica(synchronous=True)
    await volume.create_point()
    await handle.write(11 * BLOCK, NEW[:100])  # Now there is a ring.
    syncs = 0

    def count(backing: SimBacking, operation: str, _offset: int, _length: int) -> None:
        nonlocal syncs
        syncs += (backing.name, operation) == ("replica", "sync")

    rig.host.hooks.append(count)
    async with trio.open_nursery() as nursery:
        with Pause(rig, "area", "sync") as copying, Pause(rig, "replica", "sync") as syncing:
            first = Doing(nursery, handle.write(0, NEW[:100]))
            await copying.reached()
            await all_stand_still()
            assert not syncing.was_reached, "it lies in the buffer still"
            assert not first.answered
            copying.go()
            await all_stand_still()
            assert syncing.was_reached
            others = [
                Doing(nursery, handle.write(block * BLOCK, NEW[:100])) for block in range(1, 11)
            ]
            await all_stand_still()
            assert not any(doing.answered for doing in (first, *others))
            syncing.go()
            for number, doing in enumerate((first, *others)):
                await doing.ended()
                assert _after_power_failure(rig)[number * BLOCK :][:100] == NEW[:100]
    rig.host.hooks.remove(count)
    assert syncs == 2
    handle.close()


def _after_power_failure(rig: Rig) -> bytes:
    """The replica as a power failure now would leave it at worst."""
    return raw_replica(rig.on(rig.host.snapshot().power_failure(nothing_kept)))


# --- the schedules, and the engines that they must refuse ----------------------------------------

SCHEDULES: tuple[Schedule, ...] = (
    a_reader_falls_through_while_the_block_is_overwritten,
    a_short_read_falls_through_while_the_block_is_overwritten,
    a_read_waits_for_others_while_its_block_is_overwritten,
    a_block_is_overwritten_whose_copy_can_be_found,
    a_copy_is_read_whose_slot_a_shrink_moves,
    a_second_writer_comes_while_the_copy_is_on_its_way,
    a_point_is_created_while_a_write_is_in_flight,
    a_write_comes_while_a_point_is_created,
    a_point_is_deleted_while_it_is_read,
    points_are_given_up_while_one_is_read,
    a_point_is_deleted_while_writers_have_reserved_slots,
    the_maximum_is_lowered_while_the_area_grows,
    a_write_takes_the_space_that_a_shrink_has_the_lock_for,
    a_fault_comes_while_a_flush_is_under_way,
    a_fault_comes_while_a_copy_is_on_its_way,
    a_fault_comes_while_a_restore_waits_for_writes,
    a_point_is_opened_while_its_deletion_waits,
    a_flush_fails_while_others_wait_for_a_check,
    a_flush_fails_while_the_volume_comes_online,
    somebody_is_refused_before_the_fault_is_durable,
    points_are_given_up_before_the_fault_is_durable,
    offline_is_asked_for_before_the_fault_is_durable,
    two_flushes_and_one_of_them_fails,
    a_synchronous_write_comes_while_a_sync_is_under_way,
    synchronous_writes_in_the_buffer_share_a_sync,
)
#: Schedules about the write buffer → its size.
BUFFERS: dict[Schedule, int] = {synchronous_writes_in_the_buffer_share_a_sync: 64 << 10}

#: What is removed, where, and which schedule must notice: (schedule, owner, function, old, new).
MUTANTS: dict[str, tuple[Schedule, type, str, str, str]] = {
    "R2, no second look at the index": (
        a_reader_falls_through_while_the_block_is_overwritten,
        Reader,
        "_blocks",
        "elif copy is None and area.index.lookup(point, first + where) is not None:",
        "elif False:",
    ),
    "R2, no second look at the index for a short read": (
        a_short_read_falls_through_while_the_block_is_overwritten,
        Reader,
        "_one",
        "if area.index.lookup(point, block) is None:",
        "if True:",
    ),
    "R2, no look at the index when the others come back": (
        a_read_waits_for_others_while_its_block_is_overwritten,
        Reader,
        "read_point",
        "partial(self._at_once, point, first, offset, length)",
        "partial(core.replica.read_cached, offset, length)",
    ),
    "R2, overwritten before the copy can be found": (
        a_block_is_overwritten_whose_copy_can_be_found,
        Writer,
        "_record",
        "area.index.add(block, epoch, slot)",
        "__import__('threading').Timer(2, area.index.add, (block, epoch, slot)).start()",
    ),
    "R1, a failed check is final at once": (
        a_copy_is_read_whose_slot_a_shrink_moves,
        Reader,
        "_one",
        "failed = copy",
        "raise self._damaged(point, block, 'once')",
    ),
    "W2, the second writer does not wait": (
        a_second_writer_comes_while_the_copy_is_on_its_way,
        Writer,
        "_take_way",
        "await self._preserve(session, missing, offset, len(data))",
        "if on_the_way: return _DIRECTLY\n    await self._preserve(session, missing, offset, 1)",
    ),
    "create does not wait for writes in flight": (
        a_point_is_created_while_a_write_is_in_flight,
        WriteGate,
        "held",
        "if self.inside:",
        "if False:",
    ),
    "writes do not wait for create": (
        a_write_comes_while_a_point_is_created,
        Writer,
        "write",
        "while gate.closed and",
        "while False and",
    ),
    "delete, no ESTALE after reading": (
        a_point_is_deleted_while_it_is_read,
        PointHandle,
        "read",
        "something else by now.\n        if self.number in volume.points_service.gone:",
        "\n        if False:",
    ),
    "what is given up meanwhile looks damaged": (
        points_are_given_up_while_one_is_read,
        Reader,
        "_damaged",
        "if core.area_is_wiped or",
        "if False and",
    ),
    "delete frees slots that are promised": (
        a_point_is_deleted_while_writers_have_reserved_slots,
        Points,
        "_tidy",
        "also=(*self._room.promised, *area.unknown_slots)",
        "also=area.unknown_slots",
    ),
    "resize without the lock against growth": (
        the_maximum_is_lowered_while_the_area_grows,
        Resize,
        "run",
        "core.shape_lock, self._room.standing_still():",
        "core.shape_lock:",
    ),
    "a shrink does not look whether it is still wanted": (
        a_write_takes_the_space_that_a_shrink_has_the_lock_for,
        Resize,
        "_check_still_wanted",
        "if area.slots.limit is None:",
        "if False:",
    ),
    "flush does not look again": (
        a_fault_comes_while_a_flush_is_under_way,
        ReplicaHandle,
        "_make_durable",
        "raise\n    await self._refuse_flush_if_dead()",
        "raise",
    ),
    "a write does not look again after its copy": (
        a_fault_comes_while_a_copy_is_on_its_way,
        Writer,
        "write",
        "cannot slip in between.\n        if session != protection.session or",
        "\n        if False and",
    ),
    "restore does not look again after the writes": (
        a_fault_comes_while_a_restore_waits_for_writes,
        Restore,
        "_restore",
        "if not self._protection.is_online:",
        "if False:",
    ),
    "a new point does not look again once it may commit": (
        a_flush_fails_while_others_wait_for_a_check,
        Points,
        "_take",
        'require_online("creating a recovery point")\n            core.need_area()',
        "restoring\n            core.need_area()",
    ),
    "what failed while coming online is not looked at": (
        a_flush_fails_while_the_volume_comes_online,
        Volume,
        "_bring_back",
        "protection.look_at_replica()",
        "protection.recorded()",
    ),
    "a deletion does not look again": (
        a_point_is_opened_while_its_deletion_waits,
        Points,
        "delete",
        "wanted=is_free",
        "wanted=lambda: True",
    ),
    "refused before the fault is durable": (
        somebody_is_refused_before_the_fault_is_durable,
        Protection,
        "refuse",
        "await self._persisted.wait()",
        "await trio.lowlevel.checkpoint()",
    ),
    "points are given up while the fault is written down": (
        points_are_given_up_before_the_fault_is_durable,
        Protection,
        "recorded",
        "await self._persisted.wait()",
        "await trio.lowlevel.checkpoint()",
    ),
    "offline is answered while the fault is written down": (
        offline_is_asked_for_before_the_fault_is_durable,
        Protection,
        "take_offline",
        "await self.recorded()",
        "pass",
    ),
    "two syncs of the replica at a time": (
        two_flushes_and_one_of_them_fails,
        SharedSync,
        "__call__",
        "async with self._one_at_a_time:",
        "if True:",
    ),
    "W4, O_DSYNC: a sync that has begun counts": (
        a_synchronous_write_comes_while_a_sync_is_under_way,
        SharedSync,
        "__call__",
        """\
                self._next = None  # From here on it covers nobody else.
                await in_thread(self._sync)""",
        """\
                await in_thread(self._sync)
                self._next = None""",
    ),
    "W4, O_DSYNC: answered without a sync": (
        synchronous_writes_in_the_buffer_share_a_sync,
        SynchronousHandle,
        "write",
        "await self._make_durable(wanted)",
        "pass",
    ),
    "W4, O_DSYNC: synced before it is in the replica": (
        synchronous_writes_in_the_buffer_share_a_sync,
        SynchronousHandle,
        "write",
        "self._make_durable(wanted)",
        "self._make_durable(0)",
    ),
}


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: schedule.__name__)
def test_the_right_one_wins(schedule: Schedule) -> None:
    """See the schedule's own words."""
    run(schedule)


@pytest.mark.parametrize("mutant", MUTANTS)
def test_without_its_lock_the_schedule_fails(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lock, or the second look, that a schedule is about, taken away: it must notice."""
    schedule, *edit = MUTANTS[mutant]
    edited(monkeypatch, *edit)
    with pytest.raises((AssertionError, pytest.fail.Exception, OSError)) as caught:
        run(schedule)
    print(f"{mutant}: {caught.value!r}")


def test_every_schedule_has_a_mutant() -> None:
    """None of them is there for nothing."""
    assert {schedule for schedule, *_ in MUTANTS.values()} == set(SCHEDULES)
