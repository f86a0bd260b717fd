"""W5: which ring an opening takes over, and what it leaves exactly as it is.

Two processes, two users, two tmpfs, two copies of one volume: on the simulated host, where each can
be put in the way of the other. The real ones are in t4 `test_two_of_everything`.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from functools import partial
from typing import Any
from unittest import mock

import pytest
import trio
from rig import (
    BLOCK,
    Rig,
    acknowledged,
    attempt,
    flush,
    pattern,
    read_points,
    small_steps,
)
from rig import write as write_at
from simdisk import FOREVER, PowerLoss

from vsnapfs.diffarea.layout import TABLE_SIZE, Layout
from vsnapfs.diffarea.store import AreaStore
from vsnapfs.errors import VsnapError
from vsnapfs.volume import Volume
from vsnapfs.volume.adoption import CLOSED
from vsnapfs.volume.ring import Ring
from vsnapfs.volume.shm import Unusable

SIZE = 8 * BLOCK
OLD, NEW, NEWER = pattern(1, SIZE), pattern(2, BLOCK), pattern(3, BLOCK)


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


def left_by_a_kill(*, system: int = 0, **options: object) -> Rig:
    """A volume whose process died with an acknowledged write (NEW, block 0) in the ring."""
    rig = made(**options)
    rig.host.system = system

    async def write_and_die(volume: Volume) -> None:
        await volume.buffer.start()
        await write_at(volume, 0, NEW)
        rig.host.stop_at = rig.host.operations

    with pytest.raises(PowerLoss):
        rig.run(write_and_die)
    rig.killed()
    rig.log.events.clear()
    return rig


def content(rig: Rig) -> bytes:
    async def read(volume: Volume) -> bytes:
        assert (await read_points(volume)).get(1, OLD) == OLD
        volume.check_invariants()
        return acknowledged(rig, volume)

    return rig.run(read)


def everything(rig: Rig) -> dict[str, bytes]:
    """All bytes of all files and rings."""
    files = {name: file.cache.read(0, file.cache.size) for name, file in rig.host.files.items()}
    return files | {name.hex(): bytes(memory) for name, memory in rig.host.memory.items()}


def closed(rig: Rig, **options: object) -> VsnapError:
    """The error of an opening that is refused because of the ring, and that changed nothing."""
    before = everything(rig)

    async def look(volume: Volume) -> None:
        raise AssertionError("it was opened")

    with pytest.raises(VsnapError) as caught:
        rig.run(look, **options)
    assert caught.value.code == CLOSED
    assert everything(rig) == before
    assert 1043 not in rig.log.ids("vsnapfs")
    assert not rig.host.locked_rings
    return caught.value


def ids(rig: Rig, event: int) -> int:
    return rig.log.ids("vsnapfs").count(event)


# -- not now, not by this user --------------------------------------------------------------------


@pytest.mark.parametrize(
    "problem",
    [
        Unusable("it belongs to another user (uid 1000)", "Let uid 1000 do it."),
        OSError(errno.EMFILE, "Too many open files"),
        OSError(errno.EACCES, "Permission denied"),
    ],
    ids=lambda problem: type(problem).__name__ + str(getattr(problem, "errno", "")),
)
def test_what_another_opening_could_use_keeps_the_volume_closed(problem: Exception) -> None:
    """Nothing is written, the error says why; once it can be used, nothing has been lost."""
    rig = left_by_a_kill()
    rig.host.ring_problem = problem
    error = closed(rig)
    assert (problem.strerror if isinstance(problem, OSError) else str(problem)) in error.message
    assert "--give-up-write-buffer" in error.hint
    rig.host.ring_problem = None
    assert content(rig) == NEW + OLD[BLOCK:]
    rig.close()
    assert not rig.host.memory


def with_one_bad_copy() -> Rig:
    """As `left_by_a_kill`, and one copy of a descriptor sector has rotted."""
    rig = left_by_a_kill()
    area = rig.host.files["area"]
    first, twin = tables(rig)
    assert first == twin
    for pages in (area.cache, area.disk):
        pages.write(Layout(BLOCK).sector_offsets(0)[1], b"rot" * 100)
    return rig


def tables(rig: Rig) -> list[bytes]:
    """Both copies of the first descriptor table."""
    cache = rig.host.files["area"].cache
    return [cache.read(at, TABLE_SIZE) for at in Layout(BLOCK).table_offsets(0)]


def test_a_volume_that_stays_closed_is_not_healed_either() -> None:
    """A descriptor sector with one bad copy is left as it is, too; the opening that goes on writes
    it anew.
    """
    rig = with_one_bad_copy()
    rig.host.ring_problem = Unusable("it belongs to another user (uid 1000)")
    closed(rig)
    rig.host.ring_problem = None
    assert content(rig) == NEW + OLD[BLOCK:]
    first, twin = tables(rig)
    assert first == twin


def test_what_there_was_no_memory_to_heal_is_not_said_to_be_healed() -> None:
    """Neither in the log nor by `verify`; the next opening heals it, and says so."""
    rig = with_one_bad_copy()

    async def look(volume: Volume) -> dict[str, Any]:
        return await volume.verify()

    with mock.patch.object(AreaStore, "heal", side_effect=MemoryError):
        assert "healed" not in str(rig.run(look)["problems"])
        rig.close()
    assert ids(rig, 1041) == 0
    first, twin = tables(rig)
    assert first != twin
    assert "healed" in str(rig.run(look)["problems"])
    assert ids(rig, 1041) == 1
    assert content(rig) == NEW + OLD[BLOCK:]


@pytest.mark.parametrize("where", ["file", "mapping", "records"])
def test_without_memory_for_a_ring_nothing_of_it_is_lost(where: str) -> None:
    """Offline by fault 4 for as long as that lasts; nothing of it is written down."""
    rig = left_by_a_kill()
    before = everything(rig)

    async def look(volume: Volume) -> None:
        assert volume.protection.fault is not None
        assert int(volume.protection.fault.code) == 4
        assert (await read_points(volume)) == {1: OLD}

    enter = "vsnapfs.volume.buffer.WriteBuffer._enter"
    with mock.patch(enter, side_effect=MemoryError) if where == "records" else nullcontext():
        if where != "records":
            no_memory = OSError(errno.ENOMEM, "Cannot allocate memory")
            rig.host.ring_problem = MemoryError() if where == "mapping" else no_memory
        rig.run(look)
        rig.close()
        rig.host.ring_problem = None
    assert everything(rig) == before
    assert content(rig) == NEW + OLD[BLOCK:]
    assert ids(rig, 1043) == 0


def test_in_a_container_with_a_boot_id_of_its_own_the_volume_stays_closed() -> None:
    """It cannot be told from there whether the machine was down; outside nothing is lost."""
    rig = left_by_a_kill()
    rig.host.masked_boot = 99
    assert "on the machine itself" in (closed(rig).hint or "")
    rig.host.masked_boot = 0
    assert content(rig) == NEW + OLD[BLOCK:]


def test_in_a_container_with_a_boot_id_of_its_own_nothing_is_acknowledged_ahead() -> None:
    """No ring is made there: an opening outside would take it for one of another life."""
    rig = made()
    rig.close()
    rig.host.masked_boot = 99

    async def write_and_die(volume: Volume) -> None:
        await volume.buffer.start()
        await write_at(volume, 0, NEW)
        rig.host.stop_at = rig.host.operations
        await flush(volume)

    with pytest.raises(PowerLoss):
        rig.run(write_and_die)
    rig.killed()
    assert not rig.host.memory
    rig.host.masked_boot = 0
    assert content(rig) == NEW + OLD[BLOCK:]


def test_a_ring_in_another_tmpfs_keeps_the_volume_closed() -> None:
    """What is not in this one is not gone: a container's /dev/shm, seen from outside."""
    rig = left_by_a_kill()
    rig.host.tmpfs = 8
    closed(rig)
    rig.host.tmpfs = 7
    assert content(rig) == NEW + OLD[BLOCK:]
    assert ids(rig, 1043) == 0


def test_a_ring_that_somebody_has_locked_keeps_the_volume_closed() -> None:
    """Whoever serves holds it."""
    rig = left_by_a_kill()
    (ring_id,) = rig.host.memory
    rig.host.locked_rings.add(ring_id)
    with pytest.raises(VsnapError) as caught:
        rig.run(_nothing)
    assert caught.value.code == CLOSED
    rig.host.locked_rings.clear()
    assert content(rig) == NEW + OLD[BLOCK:]


async def _nothing(_volume: Volume) -> None:
    pass


def test_a_ring_of_another_version_keeps_the_volume_closed() -> None:
    """The program that wrote it can still carry it out."""
    rig = left_by_a_kill()
    (memory,) = rig.host.memory.values()
    version = memory[16]
    memory[16] = 1
    closed(rig)
    memory[16] = version
    assert content(rig) == NEW + OLD[BLOCK:]


@pytest.mark.parametrize("written_since", [False, True])
def test_giving_up_a_write_buffer_is_logged_and_final(*, written_since: bool) -> None:
    """The volume opens without it; the ring stays, and nothing ever carries it out: not even the
    loss of the diff area, after which the state file is all that names one.
    """
    rig = left_by_a_kill()
    rig.host.ring_problem = Unusable("it belongs to another user")
    rig.run(_nothing, give_up_write_buffer=True)
    assert ids(rig, 1054) == 1
    rig.host.ring_problem = None
    rig.killed()
    if written_since:
        rig.run(_write_newer)
        rig.killed()
    assert len(rig.host.memory) == 1 + written_since
    rig.host.remove("area")

    async def give_up(volume: Volume) -> None:
        await volume.online(give_up_recovery_points=True)
        newer = NEWER if written_since else OLD[BLOCK : 2 * BLOCK]
        assert acknowledged(rig, volume) == OLD[:BLOCK] + newer + OLD[2 * BLOCK :]

    _without_points(rig, give_up)


async def _write_newer(volume: Volume) -> None:
    await write_at(volume, BLOCK, NEWER)


def _without_points(rig: Rig, give_up: object) -> None:
    """Give up the points of a rig whose diff area is gone: the new one is made on its host."""
    made_anew = lambda _volume: rig.host.create("area") and rig.host.open("area")  # noqa: E731
    with (
        mock.patch("vsnapfs.volume.giveup._find_place", return_value=None),
        mock.patch("vsnapfs.volume.giveup._make", made_anew),
    ):
        rig.run(give_up)  # type: ignore[arg-type]


@pytest.mark.parametrize("nth", [1, 2], ids=["first copy", "second copy"])
def test_a_write_buffer_that_was_given_up_stays_so_when_the_commit_of_that_fails(nth: int) -> None:
    """Its records are not carried out over newer writes by an opening that could use it again."""
    rig = left_by_a_kill()
    rig.host.ring_problem = Unusable("it belongs to another user")
    rig.host.fail("area", "write", errno.EIO, nth=nth, times=FOREVER)

    async def go_on(volume: Volume) -> None:
        assert not volume.protection.is_online
        rig.host.failures.clear()
        await volume.online()
        await volume.delete_point(1)
        await write_at(volume, 0, NEWER)  # Needs no copy, so it needs no ring either.
        await flush(volume)

    rig.run(go_on, give_up_write_buffer=True)
    rig.killed()
    rig.host.ring_problem = None
    assert content(rig) == NEWER + OLD[BLOCK:]


# -- copies ---------------------------------------------------------------------------------------


def copied(rig: Rig) -> Rig:
    """`cp -a` of the volume's directory, on the same host."""
    return rig.on(rig.host.copied())


def test_a_copy_of_a_live_volume_leaves_its_ring_alone() -> None:
    """Served beside it, looked at beside it: each writes to its own replica only, and a kill of
    the original loses nothing.
    """
    rig = made()
    copies: list[Rig] = []

    async def serve(volume: Volume) -> None:
        await volume.buffer.start()
        await write_at(volume, 0, NEW)
        await volume.buffer.drain()
        copies.append(copied(rig))
        await write_at(volume, BLOCK, NEW)
        rig.host.stop_at = rig.host.operations

    with pytest.raises(PowerLoss):
        rig.run(serve)
    (copy,) = copies
    (original,) = rig.host.memory
    before = bytes(rig.host.memory[original])

    copy.run(_write_newer)
    assert ids(copy, 1049) == 1
    assert copy.log.params(1049)["what"] == original.hex()
    copy.close()
    assert bytes(rig.host.memory[original]) == before
    assert content(copy) == NEW + NEWER + OLD[2 * BLOCK :]
    copy.close()
    assert ids(copy, 1049) == 1  # Only once: it names no ring any more.

    rig.host.locked_rings.clear()
    rig.killed()
    assert content(rig) == NEW + NEW + OLD[2 * BLOCK :]
    assert ids(rig, 1043) == 0


def test_a_copy_that_got_the_inode_of_its_dead_original_is_a_copy() -> None:
    """A backup put back after the original was deleted: what was acknowledged since the backup does
    not come back in pieces.
    """
    rig = made()
    rig.host.born = 5
    backup: list[Rig] = []

    async def serve(volume: Volume) -> None:
        await volume.buffer.start()
        await write_at(volume, 0, NEW)
        await volume.buffer.drain()
        backup.append(copied(rig))
        await write_at(volume, 0, NEWER)
        await volume.buffer.drain()
        await write_at(volume, BLOCK, NEW)
        rig.host.stop_at = rig.host.operations

    with pytest.raises(PowerLoss):
        rig.run(serve)
    rig.killed()
    original, (copy,) = rig.host.files["replica"].inode, backup
    rings = {name: bytes(memory) for name, memory in rig.host.memory.items()}
    copy.host.files["replica"].inode = original
    copy.host.born = 6
    copy.host.locked_rings.clear()
    assert content(copy) == NEW + OLD[BLOCK:]
    assert ids(copy, 1049) == 1
    copy.close()
    assert {name: bytes(memory) for name, memory in copy.host.memory.items()} == rings


def test_two_copies_of_a_closed_volume_have_a_ring_each() -> None:
    """Closing the one removes nothing of the other's."""
    rig = made()
    rig.close()
    copy = copied(rig)
    rig.run(_write_new)
    copy.run(_write_newer, accept_changed_replica=True)
    assert len(rig.host.memory) == 2
    copy.close()
    assert len(rig.host.memory) == 1
    rig.killed()
    assert content(rig) == NEW + OLD[BLOCK:]
    assert content(copy) == OLD[:BLOCK] + NEWER + OLD[2 * BLOCK :]
    assert ids(rig, 1043) == ids(copy, 1043) == 0


async def _write_new(volume: Volume) -> None:
    await volume.buffer.start()
    await write_at(volume, 0, NEW)


def test_the_same_inode_on_another_device_is_no_copy() -> None:
    """A file system that got another number: closed, until it is told apart or put back."""
    rig = left_by_a_kill()
    rig.host.device = 2
    error = closed(rig)
    assert "device" in error.message
    rig.host.device = 1
    assert content(rig) == NEW + OLD[BLOCK:]


def test_a_snapshot_that_got_its_originals_device_number_has_not_its_ring() -> None:
    """Subvolumes of btrfs have the same inodes, and each mount numbers them anew: closed, as under
    another number.
    """
    rig = left_by_a_kill(system=6)
    rig.host.system = 7
    assert "subvolume" in closed(rig).message
    rig.host.system = 6
    assert content(rig) == NEW + OLD[BLOCK:]


@pytest.mark.parametrize(("then", "now"), [(6, 0), (0, 6)])
def test_a_host_that_does_not_tell_its_file_systems_apart_is_believed(then: int, now: int) -> None:
    """Not known is not different: the ring is carried out."""
    rig = left_by_a_kill(system=then)
    rig.host.system = now
    assert content(rig) == NEW + OLD[BLOCK:]


def test_a_block_device_is_known_by_its_own_number() -> None:
    """Another node for it (another inode in /dev) is the same replica."""
    rig = left_by_a_kill()
    assert rig.host.files["replica"].inode
    # As a device the file has no inode to compare: SimBacking says so like FileBacking.
    rig = made()
    rig.close()
    rig.host.files["replica"].is_device = True
    rig.run(_write_and_die_on(rig), accept_changed_replica=True)
    rig.killed()
    rig.host.files["replica"].inode += 1
    assert content(rig) == NEW + OLD[BLOCK:]
    rig.close()
    rig.run(_write_and_die_on(rig))
    rig.killed()
    rig.host.device = 3
    closed(rig)


def _write_and_die_on(rig: Rig) -> object:
    async def go(volume: Volume) -> None:
        await volume.buffer.start()
        await write_at(volume, 0, NEW)

    return go


# -- giving up points -----------------------------------------------------------------------------


def stuck(rig: Rig) -> None:
    """An acknowledged write that could not be carried out: its copy cannot be made durable."""
    rig.host.fail("area", "sync", errno.EIO, nth=3, times=FOREVER)

    async def go(volume: Volume) -> None:
        await write_at(volume, 0, NEW)
        assert await attempt(flush(volume)) is not None

    rig.run(go)
    rig.host.failures.clear()


@pytest.mark.parametrize("stop", range(1, 60))
def test_a_kill_while_points_are_given_up_loses_no_acknowledged_write(stop: int) -> None:
    """Wherever it happens, the next opening finds the ring that the new area names, and the new
    area is never taken for an old one.
    """
    rig = made()
    for _ in range(5):
        rig.run(_create_point)  # So that its generation is far above a new area's.
    stuck(rig)

    async def give_up(volume: Volume) -> None:
        rig.host.stop_at = rig.host.operations + stop
        await volume.online(give_up_recovery_points=True)
        rig.host.stop_at = None

    try:
        rig.run(give_up)
    except PowerLoss:
        rig.killed()

    async def look(volume: Volume) -> bytes:
        assert volume.core.area is None or not volume.core.area.is_old
        if not volume.protection.is_online:
            await volume.online(give_up_recovery_points=not volume.points)
        return acknowledged(rig, volume)

    # What was only begun of the new area is there, and is ours to make anew.
    begun = lambda _volume, old: old.backing if old else rig.host.open("area")  # noqa: E731
    with mock.patch("vsnapfs.volume.giveup._find_place", begun):
        assert rig.run(look) == NEW + OLD[BLOCK:]
    assert ids(rig, 1043) == 0


def test_an_area_that_was_given_up_is_an_old_one_for_ever() -> None:
    """Put back in the place of the new one: fault 15, and the new area's points are not gone."""
    rig = made()
    for _ in range(5):
        rig.run(_create_point)  # So that its generation is far above a new area's.
    rig.close()

    async def commit(volume: Volume) -> None:
        for _ in range(5):  # Growing does that, and the state file does not know of it.
            await volume.core.commit()

    rig.run(commit)
    rig.killed()
    given_up = rig.host.remove("area")

    async def give_up(volume: Volume) -> None:
        await volume.online(give_up_recovery_points=True)
        await write_at(volume, 0, NEW)
        await volume.create_point("after")

    _without_points(rig, give_up)
    rig.close()
    right = rig.host.files["area"]
    rig.host.files["area"] = given_up

    async def fault(volume: Volume) -> int:
        assert volume.protection.fault is not None
        return int(volume.protection.fault.code)

    assert rig.run(fault, accept_changed_replica=True) == 15
    rig.close()
    rig.host.files["area"] = right

    async def points(volume: Volume) -> list[str]:
        return [point.label for point in volume.points]

    assert rig.run(points, accept_changed_replica=True) == ["after"]


async def _create_point(volume: Volume) -> None:
    await volume.create_point()


def test_the_ring_of_an_area_that_is_gone_is_carried_out_when_its_points_are_given_up() -> None:
    """The state file names it, too: losing the area loses the points, not what was acknowledged."""
    rig = left_by_a_kill()
    rig.host.remove("area")

    async def give_up(volume: Volume) -> None:
        await volume.online(give_up_recovery_points=True)
        assert acknowledged(rig, volume) == NEW + OLD[BLOCK:]
        assert not volume.points

    _without_points(rig, give_up)
    assert ids(rig, 1043) == 0
    rig.close()
    assert not rig.host.memory


def test_a_new_area_is_not_older_than_the_ring_that_it_takes_over() -> None:
    """Points given up with a ring that knows of barriers: the new area goes on counting."""
    rig = made()

    async def serve(volume: Volume) -> None:
        await volume.buffer.start()
        await write_at(volume, 0, NEW)
        await flush(volume)
        await write_at(volume, 4 * BLOCK, NEW)
        rig.host.stop_at = rig.host.operations

    with suppress(PowerLoss):
        rig.run(serve)
    rig.killed()
    rig.host.remove("area")

    async def give_up(volume: Volume) -> None:
        await volume.online(give_up_recovery_points=True)

    _without_points(rig, give_up)
    rig.killed()

    async def online(volume: Volume) -> None:
        assert volume.protection.is_online
        assert acknowledged(rig, volume) == NEW + OLD[BLOCK : 4 * BLOCK] + NEW + OLD[5 * BLOCK :]
        volume.check_invariants()

    rig.run(online)


@pytest.mark.parametrize("usable", [True, False])
def test_a_write_buffer_may_be_given_up_that_only_the_state_file_names(*, usable: bool) -> None:
    """The area that named it is gone: it is carried out if it can be, and else its loss is told."""
    rig = left_by_a_kill()
    rig.host.remove("area")
    if not usable:
        rig.host.ring_problem = Unusable("it belongs to another user")

    async def give_up(volume: Volume) -> None:
        await volume.online(give_up_recovery_points=True)
        assert acknowledged(rig, volume) == (NEW if usable else OLD[:BLOCK]) + OLD[BLOCK:]

    with mock.patch.object(rig, "run", partial(rig.run, give_up_write_buffer=True)):
        _without_points(rig, give_up)
    assert ids(rig, 1054) == (not usable)


def test_without_memory_for_a_ring_no_other_fault_that_is_mended_loses_it() -> None:
    """The file was cut, too: after `repair` the volume is not online over the ring."""
    rig = left_by_a_kill()
    area = rig.host.files["area"]
    for pages in (area.cache, area.disk):
        pages.resize(pages.size - BLOCK)
    rig.host.ring_problem = MemoryError()

    async def mend(volume: Volume) -> None:
        rig.host.ring_problem = None
        assert volume.protection.fault is not None
        assert volume.protection.fault.code == 3
        for work in (volume.repair(), volume.online()):
            error = await attempt(work)
            assert isinstance(error, VsnapError)
            assert error.code == "no-memory"

    rig.run(mend, mountpoint="/mnt/sim")
    rig.close()

    async def again(volume: Volume) -> None:
        await volume.repair()
        await volume.online()
        assert acknowledged(rig, volume) == NEW + OLD[BLOCK:]

    rig.run(again)
    rig.close()
    assert not rig.host.memory


def test_points_are_not_given_up_over_a_ring_that_cannot_be_used() -> None:
    """The area is gone and the ring another user's: both stay as they are."""
    rig = left_by_a_kill()
    rig.host.remove("area")
    rig.host.ring_problem = Unusable("it belongs to another user")

    async def give_up(volume: Volume) -> None:
        error = await attempt(volume.online(give_up_recovery_points=True))
        assert isinstance(error, VsnapError)
        assert error.code == CLOSED

    rig.run(give_up)
    assert len(rig.host.memory) == 1
    assert "area" not in rig.host.files


def test_a_ring_taken_over_for_a_new_area_that_cannot_be_made_holds_up_nothing() -> None:
    """Somebody else's file is where the new area would go: the volume can be closed, the ring stays
    for the next try.
    """
    rig = left_by_a_kill()
    rig.host.remove("area")
    in_the_way = VsnapError("it is not the diff area of this volume; it is not overwritten")

    async def try_it(volume: Volume) -> None:
        with mock.patch("vsnapfs.volume.giveup._find_place", side_effect=in_the_way):
            assert await attempt(volume.online(give_up_recovery_points=True)) is in_the_way
        assert volume.buffer.pending
        with trio.fail_after(60):
            assert not await volume.buffer.finish()

    rig.run(try_it)
    rig.close()
    assert len(rig.host.memory) == 1

    async def give_up(volume: Volume) -> None:
        await volume.online(give_up_recovery_points=True)
        assert acknowledged(rig, volume) == NEW + OLD[BLOCK:]

    _without_points(rig, give_up)


# -- what an exception leaves ---------------------------------------------------------------------


@pytest.mark.parametrize("where", ["append", "enter"])
def test_an_exception_while_acknowledging_gives_everything_back(where: str) -> None:
    """The slots come back, the write is not there, not even after a kill; the next one goes in."""
    rig = made()
    target = {
        "append": "vsnapfs.volume.ring.Ring.append",
        "enter": "vsnapfs.volume.buffer.WriteBuffer._blocks",
    }[where]

    async def go(volume: Volume) -> None:
        await volume.buffer.start()
        slots = volume.core.need_area().slots
        before = slots.in_use
        with mock.patch(target, side_effect=MemoryError), pytest.raises(MemoryError):
            await write_at(volume, 0, NEW)
        assert slots.in_use == before
        assert not volume.buffer.pending
        volume.check_invariants()
        ring = volume.buffer.ring
        assert ring is not None
        memory = rig.host.memory[ring.name.ring_id]
        assert not list(Ring.found(memory, ring.name, volume.core.volume_id).records())
        await write_at(volume, BLOCK, NEWER)
        rig.host.stop_at = rig.host.operations

    with pytest.raises(PowerLoss):
        rig.run(go)
    rig.killed()
    assert content(rig) == OLD[:BLOCK] + NEWER + OLD[2 * BLOCK :]


def test_a_ring_of_another_life_is_not_named_again_in_this_one() -> None:
    """Where an opening commits nothing (the area is damaged), a deletion does: it names no ring."""
    rig = left_by_a_kill()
    memory = dict(rig.host.memory)
    rig.crashed()
    rig.host.memory = memory  # A tmpfs that was saved and put back.
    rig.host.files["area"].cache.write(128 * 1024, b"\xff" * 512)
    rig.host.files["area"].disk.write(128 * 1024, b"\xff" * 512)
    twin = 128 * 1024 + 64 * 1024 + 32 * BLOCK
    rig.host.files["area"].cache.write(twin, b"\xff" * 512)
    rig.host.files["area"].disk.write(twin, b"\xff" * 512)

    async def delete(volume: Volume) -> None:
        assert volume.core.need_area().damaged_sectors
        await volume.delete_point(1)

    rig.run(delete)
    rig.killed()

    async def look(volume: Volume) -> None:
        assert volume.buffer.ring is None
        assert acknowledged(rig, volume) == OLD

    rig.run(look)
    assert ids(rig, 1043) == 0


@pytest.mark.parametrize("where", ["the slots", "looking ahead"])
def test_a_write_is_refused_wholly_or_acknowledged_wholly(where: str) -> None:
    """No memory on either side of acknowledging: what the client is told is what happened."""
    rig = made()
    target = {
        "the slots": "vsnapfs.volume.writer.Writer._take_slots",
        "looking ahead": "vsnapfs.volume.room.Room.look_ahead",
    }[where]

    async def go(volume: Volume) -> bool:
        await volume.buffer.start()
        slots = volume.core.need_area().slots.in_use
        refused = False
        with mock.patch(target, side_effect=MemoryError):
            try:
                await write_at(volume, 0, NEW)
            except MemoryError:
                refused = True
                assert volume.core.need_area().slots.in_use == slots
        volume.check_invariants()
        return refused

    refused = rig.run(go)
    rig.killed()
    assert content(rig) == (OLD if refused else NEW + OLD[BLOCK:])


@pytest.mark.parametrize("stop", range(60))
def test_a_ring_is_known_to_the_state_file_before_anything_lies_in_it(stop: int) -> None:
    """Killed at any instant of the first writes, and the area lost as well: what was acknowledged
    is carried out when the points are given up.
    """
    rig = made()
    acknowledged_until: list[int] = []

    async def write_some(volume: Volume) -> None:
        async def one(block: int) -> None:
            await write_at(volume, block * BLOCK, NEW)
            acknowledged_until.append(block)

        rig.host.stop_at = rig.host.operations + stop
        async with trio.open_nursery() as nursery:
            for block in range(4):
                nursery.start_soon(one, block)
        rig.host.stop_at = rig.host.operations

    with suppress(PowerLoss):
        rig.run(write_some)
    rig.killed()
    rig.host.remove("area")

    async def give_up(volume: Volume) -> None:
        await volume.online(give_up_recovery_points=True)
        found = acknowledged(rig, volume)
        for block in acknowledged_until:
            assert found[block * BLOCK : (block + 1) * BLOCK] == NEW

    _without_points(rig, give_up)
