"""Memory that runs out, or anything else that nobody planned for, in the middle of something.

Whatever a step ends with, what it left half done is never taken for good: a restore that was
interrupted is gone on with before anybody has the replica, and an opening that did not see all of
the diff area serves what it saw, and makes no copy.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import trio
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
    read_replica,
    small_steps,
    write,
)
from simdisk import FAILING, PowerLoss, SimBacking

from vsnapfs.diffarea.area import DiffArea
from vsnapfs.diffarea.bitmap import BlockSet
from vsnapfs.diffarea.descriptors import Descriptor
from vsnapfs.diffarea.index import Index, RunBuilder
from vsnapfs.diffarea.slots import SlotMap
from vsnapfs.diffarea.store import AreaStore
from vsnapfs.errors import FaultCode, FaultError, VsnapError
from vsnapfs.volume import Volume, administration
from vsnapfs.volume.buffer import WriteBuffer
from vsnapfs.volume.copying import Copier
from vsnapfs.volume.opening import Opened
from vsnapfs.volume.protection import Protection
from vsnapfs.volume.restore import Restore
from vsnapfs.volume.ring import _TAKEN_AT, Ring

SIZE = 12 * BLOCK + 700
OLD, NEW = pattern(1, SIZE), pattern(2, SIZE)


@pytest.fixture(autouse=True)
def _small() -> Iterator[None]:
    with small_steps():
        yield


def made(**options: Any) -> Rig:
    """One point, everything overwritten since."""
    rig = Rig(**{"size": SIZE, **options})

    async def begin(volume: Volume) -> None:
        await write(volume, 0, OLD)
        await volume.create_point()
        await write(volume, 0, NEW)
        await flush(volume)

    rig.run(begin)
    return rig


def at_operation(rig: Rig, number: int, act: Callable[[], None]) -> None:
    """Call `act` before the operation of the disk that has this number, counted from now."""
    seen = 0

    def hook(_backing: SimBacking, operation: str, _offset: int, _length: int) -> None:
        nonlocal seen
        if operation in FAILING:
            seen += 1
            if seen == number:
                act()

    rig.host.hooks.append(hook)


def _raise(error: BaseException) -> Callable[[], None]:
    def act() -> None:
        raise error

    return act


# --- a restore -----------------------------------------------------------------------------------


async def is_kept_from_everybody(volume: Volume) -> None:
    """Half restored: nobody gets the replica, and nothing is made of the mixture."""
    with pytest.raises(OSError, match=r"No such device|busy"):
        volume.open_replica()
    for work in (volume.create_point(), volume.restore(1), volume.restore(1, force=True)):
        error = await attempt(work)
        assert isinstance(error, VsnapError)
        assert error.code in ("offline", "restoring")
    assert volume.status()["restoring"]
    assert await read_points(volume) == {1: OLD}


ENDS: dict[str, Callable[[trio.CancelScope], None]] = {
    "no memory": lambda _: _raise(MemoryError())(),
    "a defect": lambda _: _raise(ZeroDivisionError("nobody planned for it"))(),
    "an I/O error": lambda _: _raise(OSError(errno.EIO, "bad sector"))(),
    "a cancellation": lambda scope: scope.cancel(),
}


@pytest.mark.parametrize("comes_back", ["online", "killed", "closed"])
@pytest.mark.parametrize("how", ENDS)
def test_a_restore_that_ends_anyhow_anywhere_is_gone_on_with(how: str, comes_back: str) -> None:
    """Before it began nothing has changed; after that the volume is offline until it is done."""
    step, interrupted = 0, 0
    while True:
        step += 1
        rig = made()

        async def restore(volume: Volume, rig: Rig = rig, step: int = step) -> bool:
            """True if it was interrupted."""
            await volume.core.mark_in_use()
            with trio.CancelScope() as scope:
                at_operation(rig, step, lambda: ENDS[how](scope))
                done = False
                try:
                    await volume.restore(1)
                    done = True
                except (VsnapError, OSError, MemoryError, ZeroDivisionError):
                    pass
            rig.host.hooks.clear()
            if done:
                assert volume.protection.is_online
                assert await read_replica(volume) == OLD
                return False
            if volume.core.need_area().superblock.restoring:
                assert not volume.protection.is_online
                await is_kept_from_everybody(volume)
                return True
            assert raw_replica(rig) == NEW
            if not volume.protection.is_online:
                await volume.online()
            await volume.restore(1)
            return False

        async def back(volume: Volume, rig: Rig = rig) -> None:
            if not volume.protection.is_online:
                await is_kept_from_everybody(volume)
                await volume.online()
            assert await read_replica(volume) == OLD
            assert await read_points(volume) == {1: OLD}
            assert (await volume.create_point()).number == 2
            volume.check_invariants()

        again = rig.run(restore)
        interrupted += again
        if again and comes_back == "killed":
            rig.killed()
        elif again and comes_back == "closed":
            rig.close()
        rig.run(back)
        if not again and step > 5 and interrupted:
            break
    assert interrupted > 2


def test_while_it_says_restoring_nothing_is_made_of_the_replica() -> None:
    """Even if nobody could take the volume offline; `online` goes on with it all the same."""
    rig = made()

    async def go(volume: Volume) -> None:
        with (
            mock.patch.object(Restore, "_overwrite", side_effect=MemoryError),
            mock.patch.object(Protection, "trip", side_effect=MemoryError),
        ):
            with pytest.raises(MemoryError):
                await volume.restore(1)
            assert volume.protection.is_online
            await is_kept_from_everybody(volume)
            # It fails once more, and may be tried as often as one likes.
            with pytest.raises(MemoryError):
                await volume.online()
        await is_kept_from_everybody(volume)
        await volume.online()
        assert await read_replica(volume) == OLD
        assert (await volume.create_point()).number == 2

    rig.run(go)


@pytest.mark.parametrize("error", [MemoryError(), ZeroDivisionError("a defect")])
def test_an_opening_that_cannot_go_on_with_a_restore_is_offline(error: Exception) -> None:
    """Whatever it is: the volume opens, serves its points, and `online` goes on."""
    rig = made()

    def end(*_: Any) -> None:
        rig.host.stop_at = rig.host.operations

    async def die(volume: Volume) -> None:
        with mock.patch.object(Restore, "_overwrite", end):
            await volume.restore(1)

    with pytest.raises(PowerLoss):
        rig.run(die)
    rig.killed()

    async def look(volume: Volume) -> None:
        assert not volume.protection.is_online
        await is_kept_from_everybody(volume)

    with mock.patch.object(Restore, "_plan", side_effect=error) as called:
        rig.run(look)
    assert called.called
    rig.close()

    async def back(volume: Volume) -> None:
        await is_kept_from_everybody(volume)
        await volume.online()
        assert await read_replica(volume) == OLD

    rig.run(back)


# --- an opening ----------------------------------------------------------------------------------

RING = pattern(9, BLOCK)


def left_by_a_kill(*, preserved: bool = False) -> Rig:
    """A second point, a write in the ring that nobody carried out, and an unclean stop.

    preserved: its block has its copy, so it could be overwritten without one.
    """
    rig = made(buffer=64 * 1024)

    def end(backing: SimBacking, operation: str, _offset: int, _length: int) -> None:
        if (backing.name, operation) == ("replica", "write"):
            rig.host.stop_at = rig.host.operations

    async def die(volume: Volume) -> None:
        await volume.create_point()
        await volume.buffer.start()
        await write(volume, 3 * BLOCK, RING)
        if preserved:
            rig.host.hooks.append(end)
            await volume.buffer.drain()
        rig.host.stop_at = rig.host.operations

    with pytest.raises(PowerLoss):
        rig.run(die)
    rig.killed()
    rig.log.events.clear()
    return rig


CONTENT = NEW[: 3 * BLOCK] + RING + NEW[4 * BLOCK :]


async def _as_far_as_memory_allows(volume: Volume) -> str:
    """Status and list work; a point reads exactly, or not at all; nothing is made of it."""
    status = volume.status()
    assert status["state"] == volume.protection.state
    if volume.core.area is not None:
        assert [point.number for point in volume.points] == [1, 2]
    for point in volume.points:
        handle = volume.open_point(point.number)
        wanted = {1: OLD, 2: NEW}[point.number]
        for at in range(0, volume.size, BLOCK):
            error = await attempt(handle.read(at, BLOCK))
            if error is None:
                assert bytes(await handle.read(at, BLOCK)) == wanted[at : at + BLOCK]
            else:
                assert error.errno in (errno.ENOMEM, errno.EIO)
        handle.close()
    if volume.protection.is_online:
        return "online"
    assert volume.protection.fault is not None
    assert volume.protection.fault.code is FaultCode.MEMORY_ALLOCATION_FAILURE
    for _ in range(20):
        await trio.lowlevel.checkpoint()
    area = volume.core.area
    if area is not None and area.incomplete is None:
        return "stuck"  # What the opening saw is complete; carrying out the ring has failed.
    ways = (volume.online(), volume.online(give_up_recovery_points=True), volume.go_offline())
    for work in (*ways, volume.create_point(), volume.repair()):
        error = await attempt(work)
        assert isinstance(error, VsnapError)
        assert error.code in ("no-memory", "offline")
    return "offline"


def _opens(rig: Rig, mountpoint: str | None) -> str:
    """Open it as it is; "ended" if not even that could be done. The ring is whole either way."""
    ring = _what_rings_hold(rig)

    async def look(volume: Volume) -> str:
        rig.host.hooks.clear()  # It is about the opening.
        return await _as_far_as_memory_allows(volume)

    try:
        found = rig.run(look, mountpoint=mountpoint)
    except MemoryError:
        found = "ended"
    rig.host.hooks.clear()
    if found in ("offline", "ended"):
        rig.close()
        assert _what_rings_hold(rig) == ring
        assert raw_replica(rig) == NEW
    return found


def _what_rings_hold(rig: Rig) -> dict[bytes, tuple[bytes, bytes]]:
    """All but the notes of who has had it last, between the two."""
    first, second = _TAKEN_AT
    return {
        name: (bytes(memory[:first]), bytes(memory[second + 16 :]))
        for name, memory in rig.host.memory.items()
    }


def _is_as_it_was(rig: Rig, *, offline: bool) -> None:
    async def look(volume: Volume) -> None:
        if offline:
            assert volume.protection.fault is not None
            assert volume.protection.fault.code is FaultCode.MEMORY_ALLOCATION_FAILURE
            await volume.online()
        assert volume.protection.is_online
        assert acknowledged(rig, volume) == CONTENT
        await flush(volume)
        assert await read_points(volume) == {1: OLD, 2: NEW}
        volume.check_invariants()
        assert (await volume.verify())["ok"]

    rig.run(look)
    rig.close()
    assert raw_replica(rig) == CONTENT
    assert not rig.host.memory
    assert 1043 not in rig.log.ids("vsnapfs")


@pytest.mark.parametrize("mountpoint", [None, "/mnt"])
def test_an_opening_that_runs_out_of_memory_anywhere(mountpoint: str | None) -> None:
    """At any operation of the disk: the volume opens offline by fault 4, or not at all while its
    own few KiB are read; nothing is lost, and the next opening carries out the ring. What a mere
    command lacked leaves no trace; a server stays down until `online`, like after any fault.
    """
    step, found = 0, []
    while True:
        step += 1
        rig = left_by_a_kill()
        at_operation(rig, step, _raise(MemoryError()))
        found.append(_opens(rig, mountpoint))
        served = mountpoint is not None and found[-1] == "offline"
        _is_as_it_was(rig, offline=served or found[-1] == "stuck")
        if found[-3:] == ["online"] * 3 and step > 10:
            break
    assert found.count("offline") > 5
    assert found.count("ended") <= 4


SITES: dict[str, tuple[Any, str]] = {
    "what was preserved": (BlockSet, "update"),
    "sorting": (RunBuilder, "finish"),
    "the index": (Index, "compact"),
    "which slots are taken": (SlotMap, "take"),
    "how many slots there are": (SlotMap, "resize"),
    "the records of the ring": (Ring, "records"),
    "a record": (WriteBuffer, "_enter"),
    "recovery": (Volume, "_finish_recovery"),
    "the write buffer": (WriteBuffer, "adopt"),
    "a commit": (AreaStore, "commit"),
    "what is acknowledged": (WriteBuffer, "try_again"),
}


@pytest.mark.parametrize("preserved", [False, True])
@pytest.mark.parametrize("site", SITES)
def test_an_opening_that_runs_out_of_memory_at(site: str, preserved: bool) -> None:
    """No memory for one part of it, whatever that is."""
    owner, name = SITES[site]
    rig = left_by_a_kill(preserved=preserved)
    with mock.patch.object(owner, name, side_effect=MemoryError) as called:
        found = _opens(rig, None)
    assert called.called
    assert found == "offline"
    _is_as_it_was(rig, offline=False)


def test_without_an_index_a_point_can_be_deleted() -> None:
    """C2: a commit needs no index, and fewer points need less memory the next time."""
    rig = left_by_a_kill()

    async def delete(volume: Volume) -> None:
        assert volume.core.need_area().is_unread
        for work in (volume.resize(SMALLEST), volume.verify()):
            error = await attempt(work)
            assert isinstance(error, VsnapError)
            assert error.code == "no-memory"
        await volume.delete_point(1)
        assert [point.number for point in volume.points] == [2]

    with mock.patch.object(RunBuilder, "finish", side_effect=MemoryError):
        rig.run(delete, mountpoint="/mnt")
    rig.close()

    async def look(volume: Volume) -> None:
        await volume.online()
        assert acknowledged(rig, volume) == CONTENT
        assert await read_points(volume) == {2: NEW}
        volume.check_invariants()

    rig.run(look)


def test_an_old_area_that_was_opened_without_memory_still_is_an_old_one() -> None:
    """Fault 15 for every later opening: what is known of the newer one is not forgotten."""
    rig = made()
    rig.close()
    newer = rig.host.files["area"]
    old = replace(newer, cache=newer.cache.copy(), disk=newer.disk.copy(), inode=newer.inode + 1000)

    async def go_on(volume: Volume) -> None:
        await volume.create_point()
        await write(volume, 0, OLD)

    rig.run(go_on)
    rig.close()
    rig.host.files["area"] = old

    async def is_old(volume: Volume) -> int:
        assert volume.core.need_area().is_old
        assert volume.protection.fault is not None
        return int(volume.protection.fault.code)

    with mock.patch.object(RunBuilder, "finish", side_effect=MemoryError):
        assert rig.run(is_old, mountpoint="/mnt") == 4
    rig.close()
    rig.run(is_old)
    rig.close()
    rig.host.files["area"] = newer

    async def points(volume: Volume) -> None:
        assert await read_points(volume) == {1: OLD, 2: NEW}

    rig.run(points, accept_changed_replica=True)


def test_the_volume_s_own_fault_is_kept() -> None:
    """A volume that is offline by another fault, opened without memory: that fault stays."""
    rig = made()

    async def trip(volume: Volume) -> None:
        await volume.create_point()
        rig.host.fail("area", "sync", errno.EIO)
        assert await attempt(write(volume, 0, OLD)) is not None

    async def look(volume: Volume) -> int:
        assert volume.protection.fault is not None
        return int(volume.protection.fault.code)

    rig.run(trip)
    fault = rig.run(look)
    assert fault == 7
    rig.close()
    with mock.patch.object(RunBuilder, "finish", side_effect=MemoryError):
        assert rig.run(look) == 7
        rig.close()
    assert rig.run(look) == 7


# --- the half-done elsewhere ---------------------------------------------------------------------


@pytest.mark.parametrize("error", [MemoryError(), ZeroDivisionError("a defect")])
def test_a_commit_that_ends_anyhow_is_a_fault(error: Exception) -> None:
    """One superblock copy has a point that nobody was told of: were the volume to stay online,
    blocks that the older point has already would be overwritten under the new one.
    """
    step, down = 0, 0
    while True:
        step += 1
        rig = made()
        reached = False

        def end() -> None:
            nonlocal reached
            reached = True
            raise error

        async def go(volume: Volume, rig: Rig = rig, step: int = step) -> None:
            nonlocal down
            at_operation(rig, step, end)
            with suppress(VsnapError, OSError, MemoryError, ZeroDivisionError):
                await volume.create_point()
            rig.host.hooks.clear()
            down += not volume.protection.is_online
            await attempt(write(volume, 0, OLD))
            await attempt(flush(volume))

        rig.run(go)
        rig.killed()

        async def look(volume: Volume) -> None:
            for number, content in (await read_points(volume)).items():
                assert content == {1: OLD, 2: NEW}[number]
            volume.check_invariants()

        rig.run(look)
        if not reached:
            break
    assert down > 2


def test_a_cut_that_ends_anyhow_gives_out_no_slot_beyond_the_end() -> None:
    """The shrink is committed, then memory runs out: what is copied later is found again."""
    rig = made()

    async def go(volume: Volume) -> None:
        area = volume.core.need_area()
        await volume.room.grow_to_hold(40)
        with (
            mock.patch.object(DiffArea, "trim", side_effect=MemoryError),
            pytest.raises((VsnapError, MemoryError)),
        ):
            await volume.resize(SMALLEST)
        assert len(area.slots) == area.layout.slots_in(area.allocated)
        await volume.create_point()
        await write(volume, 0, OLD)
        await flush(volume)
        volume.check_invariants()

    async def look(volume: Volume) -> None:
        assert await read_points(volume) == {1: OLD, 2: NEW}

    rig.run(go)
    rig.killed()
    rig.run(look)


async def preserved_high_up(volume: Volume) -> None:
    """One more point, whose copies a shrink must move, and may: the slots below them are free."""
    area = volume.core.need_area()
    low = area.slots.reserve(area.slots.free)
    assert low is not None
    await volume.room.grow_to_hold(14)
    await volume.create_point()
    await write(volume, 0, OLD)
    area.slots.release(low)


def test_a_move_that_ends_anyhow_frees_no_copy() -> None:
    """Copies were moved down and memory runs out before the index knows: both places stay taken."""
    rig = made()

    async def go(volume: Volume) -> None:
        await preserved_high_up(volume)
        with (
            mock.patch.object(Index, "move", side_effect=MemoryError),
            pytest.raises((VsnapError, MemoryError)),
        ):
            await volume.resize(SMALLEST)
        volume.check_invariants()
        await volume.create_point()
        await write(volume, 0, NEW)
        await flush(volume)
        assert await read_points(volume) == {1: OLD, 2: NEW, 3: OLD}

    async def look(volume: Volume) -> None:
        assert await read_points(volume) == {1: OLD, 2: NEW, 3: OLD}

    rig.run(go)
    rig.killed()
    rig.run(look)


@pytest.mark.parametrize("site", [(Index, "compact"), (BlockSet, "update"), (SlotMap, "keep_only")])
def test_a_deletion_that_runs_out_of_memory_has_deleted(site: tuple[Any, str]) -> None:
    """It is durable before that; the next deletion gives the space back."""
    rig = made()

    async def go(volume: Volume) -> None:
        await volume.create_point()
        await write(volume, 0, OLD)
        await volume.create_point()
        used = volume.core.need_area().used
        with mock.patch.object(*site, side_effect=MemoryError):
            await volume.delete_point(2)
        assert await read_points(volume) == {1: OLD, 3: OLD}
        await write(volume, 0, NEW)
        await flush(volume)
        assert await read_points(volume) == {1: OLD, 3: OLD}
        await volume.delete_point(3)
        assert volume.core.need_area().used <= used
        volume.check_invariants()
        assert await read_points(volume) == {1: OLD}

    rig.run(go)


def test_a_shrink_frees_what_a_deletion_without_memory_left_taken() -> None:
    """Slots that no copy is known in are no hindrance, and none is lost with each attempt."""
    rig = made()

    async def go(volume: Volume) -> None:
        await preserved_high_up(volume)
        await flush(volume)
        with mock.patch.object(SlotMap, "keep_only", side_effect=MemoryError):
            await volume.delete_point(2)
        await volume.resize(SMALLEST)
        volume.check_invariants()
        assert await read_points(volume) == {1: OLD}

    rig.run(go)


def test_a_growth_that_runs_out_of_memory_is_made_up_for() -> None:
    """It is committed and its slots are not there: the next one goes on, and no copy is lost."""
    rig = made()

    async def go(volume: Volume) -> None:
        area = volume.core.need_area()
        with (
            mock.patch.object(SlotMap, "resize", side_effect=MemoryError),
            pytest.raises(FaultError) as caught,
        ):
            await volume.room.grow_to_hold(area.slots.free + area.growable_slots)
        assert caught.value.code is FaultCode.MEMORY_ALLOCATION_FAILURE
        assert area.allocated == area.maximum
        assert len(area.slots) < area.layout.slots_in(area.allocated)
        volume.room.reset()
        await volume.create_point()
        await write(volume, 0, OLD)
        await volume.create_point()
        await write(volume, 0, NEW)
        while area.growable_slots:
            await volume.room.grow_to_hold(area.slots.free + area.growable_slots)
        assert len(area.slots) == area.layout.slots_in(area.allocated)
        await flush(volume)
        volume.check_invariants()
        assert await read_points(volume) == {1: OLD, 2: NEW, 3: OLD}

    async def look(volume: Volume) -> None:
        assert await read_points(volume) == {1: OLD, 2: NEW, 3: OLD}

    rig.run(go)
    rig.killed()
    rig.run(look)


@pytest.mark.parametrize(
    "site",
    [(Copier, "prefetch"), (WriteBuffer, "_write"), (WriteBuffer, "_wake"), (Ring, "release")],
)
def test_a_write_buffer_that_runs_out_of_memory_carries_out_later(site: tuple[Any, str]) -> None:
    """The server lives, the volume is offline, and `online` carries out what is left."""
    rig = made(buffer=64 * 1024)
    owner, name = site
    real, calls = getattr(owner, name), 0

    def once(self: Any, *args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise MemoryError
        return real(self, *args)

    async def go(volume: Volume) -> None:
        await volume.create_point()
        await volume.buffer.start()
        with mock.patch.object(owner, name, once):
            for block in (3, 4, 3):
                await write(volume, block * BLOCK, RING)
            await attempt(flush(volume))
        if not volume.protection.is_online:
            await volume.online()
        await flush(volume)
        assert not volume.buffer.pending
        assert acknowledged(rig, volume)[3 * BLOCK : 5 * BLOCK] == RING * 2
        assert await read_points(volume) == {1: OLD, 2: NEW}
        volume.check_invariants()

    rig.run(go)
    assert calls


def test_a_barrier_that_ends_anyhow_is_taken_back() -> None:
    """Whatever it had written of its descriptors is not there after the next one."""
    step, ended = 0, 0
    while True:
        step += 1
        rig = made()

        async def go(volume: Volume, rig: Rig = rig, step: int = step) -> bool:
            area = volume.core.need_area()
            (slot,) = area.slots.reserve(1) or [0]
            number = area.barrier_number
            at_operation(rig, step, _raise(MemoryError()))
            code = None
            try:
                area.barrier({slot: Descriptor(5, 6, 1)})
            except FaultError as error:
                code = error.code
            failed = code is FaultCode.MEMORY_ALLOCATION_FAILURE
            assert failed or code is None
            rig.host.hooks.clear()
            if failed and rig.host.files["area"].journal:
                assert area.needs_rollback
                area.rollback()
                area._sectors.clear()
                assert area.descriptor_of(slot) is None
                assert area.barrier_number == number + 1
            return failed

        if not rig.run(go):
            break
        ended += 1
    assert ended > 2


def test_a_sync_that_ends_anyhow_has_failed() -> None:
    """Nobody knows what the disk got of it: of the area what it covered is unwritten, and of the
    replica every flush fails.
    """
    rig = made()

    async def go(volume: Volume) -> None:
        core = volume.core
        for name, sync in (("area", core.need_area()._sync), ("replica", core.sync_replica)):
            at_operation(rig, 1, _raise(MemoryError()))
            with pytest.raises(MemoryError):
                sync()
            rig.host.hooks.clear()
            with pytest.raises(OSError, match=f"an earlier sync of the .*{name}"):
                sync()
        assert core.need_area().needs_rollback
        assert await attempt(flush(volume)) is not None
        assert not volume.protection.is_online

    rig.run(go)


@pytest.mark.parametrize("site", ["acquire", "set", "reset"])
def test_a_turn_that_runs_out_of_memory_is_over(site: str) -> None:
    """The next administrative operation gets its turn, and nobody is named as under way."""
    rig = made()

    async def go(volume: Volume) -> None:
        async def starved() -> None:
            raise MemoryError  # trio has the lock by then

        if site == "acquire":
            lacking = mock.patch.object(trio.lowlevel, "cancel_shielded_checkpoint", starved)
        else:
            lacking = mock.patch.object(
                administration, "_mine", mock.Mock(wraps=administration._mine)
            )
        with pytest.raises(MemoryError), lacking as mine:
            if site != "acquire":
                getattr(mine, site).side_effect = MemoryError
            async with volume.core.admin.turn("trying"):
                pass
        assert volume.core.admin.to_json()["running"] is None
        with trio.fail_after(30):
            await volume.create_point()

    rig.run(go)


def test_what_nobody_plans_for_is_still_offline() -> None:
    """Going offline itself runs out of memory: it is offline, and who waits is refused."""
    rig = made()

    async def go(volume: Volume) -> None:
        await volume.create_point()
        rig.host.fail("area", "sync", errno.EIO)
        with (
            mock.patch("vsnapfs.volume.protection.Fault", side_effect=MemoryError),
            mock.patch.object(Protection, "_write_down", side_effect=MemoryError),
        ):
            with trio.fail_after(60):
                error = await attempt(write(volume, 0, OLD))
        assert error is not None
        assert error.errno == errno.ENODEV
        assert not volume.protection.is_online
        assert await attempt(flush(volume)) is not None

    rig.run(go)


def test_an_opening_says_what_it_lacks() -> None:
    """An `Opened` whose area could not be opened at all has fault 4, not a lost area."""
    rig = left_by_a_kill()
    seen: list[Opened] = []
    real = Volume.from_opened.__func__  # type: ignore[attr-defined]

    async def remember(opened: Opened, *args: Any, **options: Any) -> Volume:
        seen.append(opened)
        volume: Volume = await real(Volume, opened, *args, **options)
        return volume

    with (
        mock.patch.object(Volume, "from_opened", remember),
        mock.patch("vsnapfs.volume.opening.open_area", side_effect=MemoryError),
    ):
        assert _opens(rig, None) == "offline"
    assert seen[0].fault is not None
    assert seen[0].fault.code is FaultCode.MEMORY_ALLOCATION_FAILURE
    _is_as_it_was(rig, offline=False)


@pytest.mark.parametrize("operation", ["create", "delete"])
@pytest.mark.parametrize("owner", [DiffArea, WriteBuffer])
def test_a_commit_that_fails_once_it_counts_is_a_commit(owner: type, operation: str) -> None:
    """Memory runs out right after the catalog has been written. The new point is exact, whatever
    was answered, and a reader of the deleted one gets ESTALE and nothing else.
    """
    rig = made(buffer=1 << 16, maximum=SMALLEST + 64 * BLOCK)

    async def main(volume: Volume) -> None:
        await volume.create_point()
        await write(volume, 0, NEW)  # All of it is preserved.
        await flush(volume)
        reader = volume.open_point(1)
        name, target = ("commit", owner) if owner is DiffArea else ("note_area", volume.core)
        real = getattr(target, name)

        def lacking(*args: Any, **changes: Any) -> None:
            real(*args, **changes)
            raise MemoryError

        with mock.patch.object(target, name, lacking), suppress(MemoryError, VsnapError):
            if operation == "create":
                await volume.create_point()
            else:
                await volume.delete_point(1, force=True)
        if not volume.protection.is_online:
            await volume.online()
        await write(volume, 0, OLD)
        found = await read_points(volume)
        assert found == dict.fromkeys((2, 3), NEW) | {1: OLD} if operation == "create" else {2: NEW}
        if operation == "delete":
            with pytest.raises(OSError) as stale:
                await reader.read(0, BLOCK)
            assert stale.value.errno == errno.ESTALE

    rig.run(main)
