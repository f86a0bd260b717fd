"""A diff area that is damaged or cut short while acknowledged writes lie in the ring.

A process was killed while it carried them out: some blocks have been overwritten, and the
descriptors of their copies may be what is damaged. Whoever preserved such a block again would
preserve newer bytes in the point's own epoch, and the point would show them.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from typing import Any

import pytest
import trio
from damage import DAMAGES, LAYOUT, cut, cut_slots, rot, unreadable
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
    read_point,
    read_points,
    small_steps,
)
from rig import write as write_at
from simdisk import PowerLoss, SimBacking

from vsnapfs.errors import FaultCode, FaultError, VsnapError
from vsnapfs.volume import Volume

BLOCKS = 8
SIZE = BLOCKS * BLOCK
OLD, NEW = pattern(1, SIZE), pattern(2, SIZE)
WRITES = (0, 1, 2, 5, 1, 7)


@pytest.fixture(autouse=True)
def _small() -> Iterator[None]:
    with small_steps():
        yield


def killed(after: int, **options: Any) -> tuple[Rig, bytes]:
    """A volume with one point, killed after so many disk operations of carrying out its ring, and
    what had been acknowledged.
    """
    rig = Rig(size=SIZE, buffer=64 * 1024, **options)
    content = bytearray(OLD)

    async def begin(volume: Volume) -> None:
        await write_at(volume, 0, OLD)
        await volume.create_point()
        await volume.buffer.start()
        await volume.room.grow_to_hold(40)

    async def go_on(volume: Volume) -> None:
        for number, block in enumerate(WRITES):
            data = pattern(100 + number, BLOCK)
            await write_at(volume, block * BLOCK, data)
            content[block * BLOCK : (block + 1) * BLOCK] = data
        rig.host.stop_at = rig.host.operations + after
        await volume.buffer.drain()
        raise PowerLoss

    rig.run(begin)
    with pytest.raises(PowerLoss):
        rig.run(go_on)
    rig.killed()
    rig.log.events.clear()
    return rig, bytes(content)


# --- what must hold meanwhile --------------------------------------------------------------------


def _ring(rig: Rig) -> dict[bytes, bytes]:
    return {name: bytes(memory) for name, memory in rig.host.memory.items()}


async def _old_or_eio(volume: Volume) -> list[int]:
    """Which blocks of the point cannot be read; all others are exact."""
    handle = volume.open_point(1)
    bad = []
    for block in range(BLOCKS):
        error = await attempt(handle.read(block * BLOCK, BLOCK))
        if error is None:
            found = bytes(await handle.read(block * BLOCK, BLOCK))
            assert found == OLD[block * BLOCK : (block + 1) * BLOCK], f"block {block} is newer"
        else:
            assert error.errno == errno.EIO
            bad.append(block)
    handle.close()
    return bad


async def _try_everything(volume: Volume) -> None:
    """All that could make a copy: by the background task, by hand, at the end."""
    for _ in range(50):
        await trio.lowlevel.checkpoint()
    area, buffer = volume.core.need_area(), volume.buffer
    maximum, pending = area.maximum, bool(buffer.pending)
    assert area.layout.slots_in(SMALLEST) < len(area.slots) or area.damaged_sectors
    refused = [volume.online, volume.create_point, lambda: volume.restore(1, force=True)]
    if area.layout.slots_in(SMALLEST) < len(area.slots):
        refused += [lambda: volume.resize(SMALLEST)]
    if pending:
        refused += [buffer.drain]
    for work in (*refused, volume.online):
        assert isinstance(await attempt(work()), VsnapError | OSError)
    assert await buffer.finish() is not pending
    assert await attempt(volume.resize(maximum + BLOCK)) is None  # A commit and no more.
    assert await attempt(volume.resize(maximum)) is None
    await attempt(volume.go_offline())
    await volume.repair(dry_run=True)


async def _is_closed_for_writing(volume: Volume) -> None:
    fault = volume.protection.fault
    assert not volume.protection.is_online
    assert fault is not None
    assert fault.code is FaultCode.META_DATA_CORRUPTION
    assert [point.number for point in volume.points] == [1]
    bad = await _old_or_eio(volume)
    await _try_everything(volume)
    assert await _old_or_eio(volume) == bad
    named = set()
    for problem in (await volume.verify())["problems"]:
        for start, length in problem["ranges"]:
            named.update(range(start // BLOCK, -(-(start + length) // BLOCK)))
    assert set(bad) == named, "verify knows as much as a reader"


def _steps() -> int:
    """How many disk operations it takes to carry the ring out, and a few more."""
    step = 0
    while True:
        rig, content = killed(step)
        if raw_replica(rig) == content:
            return step + 4
        step += 1


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["offline", "evict"])
@pytest.mark.parametrize("how", DAMAGES)
def test_no_copy_is_made_while_the_area_is_damaged(how: str, policy: str) -> None:
    """Killed at any instant of carrying out the ring, then damage: the ring, the replica and the
    point stay as they were, whatever is tried; without the damage all of it is carried out.
    """
    for step in range(_steps()):
        rig, content = killed(step, on_full=policy)
        ring, replica = _ring(rig), raw_replica(rig)
        undo = DAMAGES[how](rig)
        for end in (Rig.close, Rig.killed):
            rig.run(_is_closed_for_writing)
            assert (_ring(rig), raw_replica(rig)) == (ring, replica)
            end(rig)
            assert (_ring(rig), raw_replica(rig)) == (ring, replica)
        undo()

        async def back(volume: Volume, rig: Rig = rig, content: bytes = content) -> None:
            await volume.online()
            assert acknowledged(rig, volume) == content
            await flush(volume)
            volume.check_invariants()
            assert await read_points(volume) == {1: OLD}
            assert (await volume.verify())["ok"]

        rig.run(back)
        rig.close()
        assert raw_replica(rig) == content
        assert not rig.host.memory
        assert not {1043} & set(rig.log.ids("vsnapfs"))


def test_after_repair_and_online_the_ring_is_carried_out() -> None:
    """The file was cut inside its slots: `repair` reserves the space again, and what lay there is
    EIO; what was acknowledged is there, and nothing of the point is newer.
    """
    for step in range(_steps()):
        rig, content = killed(step)
        cut_slots(rig)

        async def mend(volume: Volume, rig: Rig = rig, content: bytes = content) -> None:
            bad = await _old_or_eio(volume)
            await volume.repair()
            # What had not been overwritten yet, the replica still holds.
            assert set(await _old_or_eio(volume)) <= set(bad)
            await volume.online()
            assert acknowledged(rig, volume) == content
            await flush(volume)
            assert not volume.buffer.pending
            assert set(await _old_or_eio(volume)) <= set(bad)
            volume.check_invariants()

        rig.run(mend)
        rig.close()
        assert raw_replica(rig) == content
        rig.run(_old_or_eio)


def test_a_dry_run_over_damage_changes_nothing() -> None:
    """`repair --dry-run` of a closed volume carries out nothing, not even for itself."""
    rig, _ = killed(_steps() // 2)
    rot(rig)
    ring, replica = _ring(rig), raw_replica(rig)

    async def look(volume: Volume) -> None:
        volume.core.dry_run = True
        await _is_closed_for_writing(volume)

    rig.run(look)
    assert (_ring(rig), raw_replica(rig)) == (ring, replica)


# --- while it is served --------------------------------------------------------------------------


def _served(**options: Any) -> Rig:
    rig = Rig(size=SIZE, **options)

    async def begin(volume: Volume) -> None:
        await write_at(volume, 0, OLD)
        await volume.create_point()
        await volume.room.grow_to_hold(40)
        await write_at(volume, 0, NEW[: 2 * BLOCK])

    rig.run(begin)
    return rig


@pytest.mark.parametrize("buffer", [0, 64 * 1024])
def test_a_file_that_is_cut_while_it_is_served_stays_cut(buffer: int) -> None:
    """The next copy is fault 3; nothing makes the file look whole again but `repair`."""
    rig = _served(buffer=buffer)
    if buffer:
        rig.run(flush)
    size = LAYOUT.slot_offset(1)
    cut(rig, size)

    async def go(volume: Volume) -> None:
        await write_at(volume, 5 * BLOCK, NEW[:BLOCK]) if buffer else None
        error = await attempt(flush(volume) if buffer else write_at(volume, 5 * BLOCK, NEW[:10]))
        assert error is not None
        assert error.errno == errno.ENODEV
        fault = volume.protection.fault
        assert fault is not None
        assert fault.code is FaultCode.META_DATA_CORRUPTION
        area = volume.core.need_area()
        for work in (volume.online(), volume.resize(SMALLEST), volume.online()):
            assert isinstance(await attempt(work), VsnapError)
        with pytest.raises(FaultError):
            area.prepare_growth(len(area.slots) + 20)
        with pytest.raises(FaultError):
            area.rewrite_copy(5, OLD[:BLOCK])
        area.trim()
        assert rig.host.files["area"].cache.size == size
        assert await _old_or_eio(volume) == [1]
        await volume.repair()
        assert rig.host.files["area"].cache.size == area.allocated
        await volume.online()
        await write_at(volume, 0, NEW)
        await flush(volume)
        assert await _old_or_eio(volume) == [1]

    rig.run(go)


@pytest.mark.parametrize("on_full", ["offline", "evict"])
@pytest.mark.parametrize("met_by", ["a write", "a new point"])
def test_no_point_is_taken_in_an_area_that_was_cut(on_full: str, met_by: str) -> None:
    """A commit would pass, a copy would not: refused, and with `evict` `status` says why."""
    rig = _served(on_full=on_full)
    cut(rig, LAYOUT.slot_offset(1))

    async def go(volume: Volume) -> None:
        if met_by == "a write":
            await attempt(write_at(volume, 5 * BLOCK, NEW[:BLOCK]))
        for _ in range(2):
            error = await attempt(volume.create_point())
            assert isinstance(error, VsnapError)
            assert error.exit_code == (3 if on_full == "offline" else 1)
            assert volume.protection.is_online == (on_full == "evict")
            assert len(volume.points) == (1 if on_full == "offline" else 0)
            if on_full == "evict":
                assert "--give-up-recovery-points" in error.hint
                assert "cut short" in volume.status()["trouble"]
                await write_at(volume, 0, NEW)

    rig.run(go)


def test_a_sector_that_rots_while_it_is_served_never_costs_a_point_a_byte() -> None:
    """Memory knows what lay in it: no block is preserved twice, and after a kill there is no
    copy made before the sector is back.
    """
    rig = _served(buffer=64 * 1024)
    rig.run(flush)
    rot(rig)

    async def go(volume: Volume) -> None:
        volume.core.need_area()._sectors.clear()
        await attempt(write_at(volume, 0, NEW))
        assert await attempt(flush(volume)) is not None
        await attempt(volume.online())
        await attempt(write_at(volume, 0, NEW))
        await _old_or_eio(volume)

    rig.run(go)
    rig.killed()
    rig.run(_is_closed_for_writing)


def test_taking_back_a_failed_barrier_does_not_extend_a_file_that_was_cut() -> None:
    """A barrier fails, then the file is cut inside its tables: what is gone stays gone."""
    rig = _served()
    failure = rig.host.fail("area", "sync", errno.EIO)

    async def go(volume: Volume) -> None:
        area = volume.core.need_area()
        assert await attempt(write_at(volume, 5 * BLOCK, NEW[:BLOCK])) is not None
        assert failure.fired
        # Of the fault's commit, which takes the barrier back, only once the file is short.
        assert not area.needs_rollback
        rig.host.fail("area", "sync", errno.EIO)
        with pytest.raises(FaultError):
            area.barrier({7: None})
        assert area.needs_rollback
        size = LAYOUT.table_offsets(0)[0]
        cut(rig, size)
        area.rollback()
        assert rig.host.files["area"].cache.size == size
        assert not area.needs_rollback

    rig.run(go)


def test_what_is_hidden_is_no_proof_that_a_copy_may_go() -> None:
    """A copy of the newest barrier fails its check, and the replica holds its content once more;
    while a later copy may lie in a sector that cannot be read, it is kept (EIO) and not dropped.
    """
    rig = Rig(size=SIZE)

    async def first(volume: Volume) -> None:
        await write_at(volume, 0, OLD)
        await volume.create_point()
        area = volume.core.need_area()
        # The copy for point 2 will lie in another sector.
        held = area.slots.reserve(20)
        assert held is not None
        await volume.create_point()
        await write_at(volume, 0, NEW[:BLOCK])
        await volume.create_point()
        area.slots.release(held)
        await write_at(volume, 0, OLD[:BLOCK])
        await flush(volume)

    rig.run(first)
    rig.killed()

    # Block 0: OLD in epoch 2 (slot 20), NEW in epoch 3 (slot 0); the replica holds OLD again.
    poke(rig, "area", LAYOUT.slot_offset(20), b"\xff" * BLOCK)
    undo = unreadable(rig, 0)

    async def hidden(volume: Volume) -> None:
        for number in (1, 2, 3):
            assert await attempt(read_point(volume, number)) is not None

    rig.run(hidden)
    rig.killed()
    undo()

    async def seen(volume: Volume) -> None:
        found = []
        for number in (1, 2):
            handle = volume.open_point(number)
            found.append(await attempt(handle.read(0, BLOCK)))
            handle.close()
        assert all(isinstance(error, OSError) for error in found), "point 1 shows what is newer"
        assert (await read_point(volume, 3))[:BLOCK] == NEW[:BLOCK]

    rig.run(seen)


def _same_again() -> Rig:
    """Block 0 was preserved and overwritten, durably; its copy, of the newest barrier, rotted; what
    was there before was written once more and never synced. Then the process was killed.
    """
    rig = Rig(size=SIZE)

    async def begin(volume: Volume) -> None:
        await write_at(volume, 0, OLD)
        await volume.create_point()
        await write_at(volume, 0, NEW[:BLOCK])
        await flush(volume)
        await write_at(volume, 0, OLD[:BLOCK])

    rig.run(begin)
    rig.killed()
    poke(rig, "area", LAYOUT.slot_offset(0), b"\xff" * BLOCK)
    return rig


@pytest.mark.parametrize("is_needed", [False, True])
def test_only_copies_that_a_point_reads_count_as_damaged(is_needed: bool) -> None:
    """A slot is free again and half of a newer copy lies in it when the process is killed: that
    says nothing of a copy that no point needs any more, and 1042 does not either.
    """
    rig = Rig(size=SIZE)

    async def begin(volume: Volume) -> None:
        await write_at(volume, 0, OLD)
        await volume.create_point()
        await write_at(volume, 0, NEW[:BLOCK])
        await flush(volume)
        if not is_needed:
            await volume.delete_point(1)
        await volume.create_point()

    async def look(volume: Volume) -> None:
        assert (await volume.verify())["ok"] is not is_needed

    rig.run(begin)
    rig.killed()
    poke(rig, "area", LAYOUT.slot_offset(0), b"\xff" * (BLOCK // 2))
    rig.run(look)
    assert rig.log.params(1042)["count"] == (1 if is_needed else None)


def test_what_proves_that_a_copy_may_go_is_durable() -> None:
    """The copy is dropped because the replica holds its content; that outlasts a power failure."""
    rig = _same_again()

    async def look(volume: Volume) -> None:
        assert await read_points(volume) == {1: OLD}

    rig.run(look)
    assert rig.log.params(1042)["dropped"] == 1
    rig.crashed()
    rig.run(look)


@pytest.mark.parametrize("points", [1, 2])
def test_what_no_point_has_any_more_is_not_called_damaged(points: int) -> None:
    """Killed with other blocks in the slots of a deleted point, before their barrier: 1042 says
    nothing of damage, for no point shows what lay there. (points: 1 or 2 of them hold the block.)
    """
    rig = Rig(size=SIZE)

    async def begin(volume: Volume) -> None:
        await write_at(volume, 0, OLD)
        await volume.create_point()
        if points == 2:
            await write_at(volume, 0, NEW[:BLOCK])
            await volume.create_point()
        await write_at(volume, 0, NEW[BLOCK : 2 * BLOCK])
        await volume.delete_point(points)
        if points == 1:
            await volume.create_point()

        def die(backing: SimBacking, operation: str, offset: int, _length: int) -> None:
            if (backing.name, operation) == ("area", "write") and offset < LAYOUT.slot_offset(0):
                rig.host.dead = True
                raise PowerLoss

        rig.host.hooks.append(die)
        await write_at(volume, 2 * BLOCK, NEW[:BLOCK])

    with pytest.raises(PowerLoss):
        rig.run(begin)
    rig.killed()

    async def look(volume: Volume) -> None:
        expected = OLD if points == 2 else NEW[BLOCK : 2 * BLOCK] + OLD[BLOCK:]
        assert list((await read_points(volume)).values()) == [expected]
        assert (await volume.verify())["ok"]

    rig.run(look)
    assert rig.log.params(1042)["count"] is None


def test_without_a_sync_of_the_replica_it_is_no_proof() -> None:
    """The sync fails: the copy stays (EIO), and the volume is offline by fault 13 until `online`
    has opened the replica anew.
    """
    rig = _same_again()
    rig.host.fail("replica", "sync", errno.EIO)

    async def look(volume: Volume) -> None:
        assert volume.protection.fault is not None
        assert volume.protection.fault.code is FaultCode.IO_FAILURE
        assert await _old_or_eio(volume) == [0]
        assert await attempt(flush(volume)) is not None
        await volume.online()
        await flush(volume)
        assert await _old_or_eio(volume) == [0]

    rig.run(look)
