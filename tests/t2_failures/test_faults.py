"""Each fault by its cause, on the simulated disk: refused, told, kept, and the way back."""

from __future__ import annotations

import errno
import time
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
from damage import cut
from failing import nothing_kept
from filefuzz import poke
from rig import (
    BLOCK,
    SMALLEST,
    Rig,
    attempt,
    flush,
    pattern,
    read_points,
    read_replica,
    small_steps,
    write,
)
from scene import SIZE, Scene
from simdisk import FOREVER, PAGE, SimBacking

from vsnapfs.diffarea.layout import SUPERBLOCK_OFFSETS, Layout
from vsnapfs.errors import FaultError, VsnapError
from vsnapfs.volume import Volume

LAST = 12 * BLOCK
"""Offset of the short last block, which has no copy yet."""


# --- faults of the copy path ---------------------------------------------------------------------


@pytest.mark.parametrize("code", [errno.EIO, errno.ENODATA])
def test_old_content_that_cannot_be_read_is_fault_6(code: int) -> None:
    """COW_READ_FAILURE names the block and the errno; once the disk reads again, all works."""
    scene = Scene()
    scene.rig.host.fail("replica", "read", code, times=FOREVER)
    before = scene.replica()
    error = scene.write(7 * BLOCK + 5, 2 * BLOCK)
    assert error is not None
    assert error.errno == errno.ENODEV
    assert scene.replica() == before
    params = scene.rig.log.params(85)
    assert (params["block"], params["errno"]) == (7, code)
    scene.rig.host.failures.clear()
    scene.is_down(6)
    scene.works()


@pytest.mark.parametrize(
    ("operation", "nth"), [("write", 1), ("write", 2), ("write", 3), ("sync", 1)]
)
@pytest.mark.parametrize("times", [1, FOREVER])
def test_a_copy_that_cannot_be_written_or_synced_is_fault_7(
    operation: str, nth: int, times: int
) -> None:
    """COW_WRITE_FAILURE for the block, for either copy of its descriptor, and for the sync."""
    scene = Scene()
    scene.rig.host.fail("area", operation, errno.EIO, nth=nth, times=times)
    scene.write(6 * BLOCK, 10)
    scene.rig.host.failures.clear()
    assert scene.rig.log.params(86)["block"] == 6
    scene.is_down(7)
    scene.works()


def test_a_maximum_that_is_reached_is_fault_8_and_deleting_is_a_way_out() -> None:
    """DIFF_AREA_FULL: a write over many blocks is refused whole; room brings it back (C2)."""
    scene = Scene(maximum=SMALLEST)
    with small_steps():
        scene.run(scene.fill, 0)
        params = scene.tripped(8, 0, SIZE)
        assert params["allocated"] == params["maximum"] == SMALLEST
        assert params["needed"] == 13

        async def warn(volume: Volume) -> None:
            (warning,) = await volume.online()
            assert "would still not fit" in warning
            await volume.go_offline()

        scene.run(warn)

        async def delete(volume: Volume) -> None:
            for number in (1, 2, 3, 4):
                await volume.delete_point(number)
                del scene.points[number]

        scene.run(delete)
        scene.works()


def test_a_full_area_grows_by_resize_while_it_is_offline() -> None:
    """C2: resize works in the fault, online does not warn then, and the write fits."""
    scene = Scene(maximum=SMALLEST)
    with small_steps():
        scene.run(scene.fill, 5)
        scene.tripped(8, 0, SIZE)

        async def resize(volume: Volume) -> None:
            await volume.resize(SMALLEST + 100 * BLOCK)
            assert await volume.online() == []

        scene.run(resize)
        assert scene.write(0, SIZE) is None
        scene.exact()


def test_growth_that_takes_too_long_is_fault_9() -> None:
    """GROW_TOO_SLOW: the write waits for grow-timeout and not longer; the growth is not lost."""
    with small_steps():
        scene = Scene(maximum=SMALLEST + 100 * BLOCK, grow_timeout=0.05)
        scene.rig.threads = True

        def slow(_backing: SimBacking, operation: str, _offset: int, _length: int) -> None:
            end = time.monotonic() + 20
            while operation == "allocate" and time.monotonic() < end:
                if any(event_id == 88 for _, event_id, _ in scene.rig.log.events):
                    break  # The write has been refused.
                time.sleep(0.01)

        scene.run(scene.fill, 6)
        scene.rig.host.hooks.append(slow)
        params = scene.tripped(9, 0, SIZE)
        scene.rig.host.hooks.clear()
        assert params["errno"] == errno.ETIMEDOUT
        assert params["allocated"] < params["maximum"]
        scene.works()


@pytest.mark.parametrize(
    ("code", "fault"),
    [(errno.ENOSPC, 10), (errno.EDQUOT, 10), (errno.EIO, 10), (errno.EOPNOTSUPP, 12)],
)
def test_growth_that_the_host_refuses_is_fault_10_or_12(code: int, fault: int) -> None:
    """GROW_FAILED where the host has no space, FILE_SYSTEM_FAILURE where it cannot reserve any."""
    with small_steps():
        scene = Scene(maximum=SMALLEST + 100 * BLOCK)
        scene.rig.host.fail("area", "allocate", code, times=FOREVER)
        scene.run(scene.fill, 2)
        assert scene.ids() == [24], "points are at risk: said once, before anything is refused"
        assert scene.tripped(fault, 0, SIZE)["errno"] == code
        scene.rig.host.failures.clear()
        scene.works()


def test_a_host_without_space_is_fault_10_and_space_brings_it_back() -> None:
    """A full host shows when growing (C1), never in the middle of a copy."""
    with small_steps():
        scene = Scene(maximum=SMALLEST + 100 * BLOCK)
        host = scene.rig.host
        host.capacity -= host.free()
        scene.run(scene.fill, 2)
        assert scene.ids() == [24]
        scene.tripped(10, 0, SIZE)
        scene.rig.host.capacity += 1 << 20
        scene.works()


def test_a_mapping_that_is_refused_is_fault_5() -> None:
    """MAPPED_MEMORY_FAILURE when the copy buffer cannot be mapped."""
    scene = Scene()
    scene.rig.close()  # The next process has no buffer yet.
    with mock.patch("vsnapfs.volume.copying.mmap.mmap", side_effect=OSError(errno.ENOMEM, "no")):
        params = scene.tripped(5, 6 * BLOCK, 10)
    assert params["errno"] == errno.ENOMEM
    scene.works()


def test_an_index_there_is_no_memory_for_is_fault_4() -> None:
    """MEMORY_ALLOCATION_FAILURE when its pages are refused; with memory all is well again."""
    scene = Scene()
    scene.rig.close()
    with mock.patch("vsnapfs.diffarea.index.mmap", side_effect=OSError(errno.ENOMEM, "no")):
        assert scene.fault == 4
    scene.rig.close()  # The next process has the memory.
    scene.works()


# --- the area itself -----------------------------------------------------------------------------


@pytest.mark.parametrize("operation", ["read", "write", "sync"])
def test_a_superblock_that_cannot_be_committed_is_fault_13(operation: str) -> None:
    """IO_FAILURE while a point is created: the command is refused, the point is not there."""
    scene = Scene()
    scene.rig.host.fail("area", operation, errno.EIO, times=2)

    async def create(volume: Volume) -> None:
        with pytest.raises(VsnapError) as caught:
            await volume.create_point()
        assert caught.value.exit_code == 3
        assert [point.number for point in volume.points] == [1, 2]

    scene.run(create)
    scene.rig.host.failures.clear()
    scene.is_down(13)
    scene.works()


def test_an_area_that_is_taken_away_is_fault_14_and_its_points_stay() -> None:
    """DIFF_AREA_REMOVED at the next copy; the open file keeps all points readable (rule 8)."""
    scene = Scene()
    gone = scene.rig.host.remove("area")
    before = scene.replica()
    error = scene.write(6 * BLOCK, 10)
    assert error is not None
    assert error.errno == errno.ENODEV
    assert scene.replica() == before
    assert scene.fault == 14
    assert scene.ids().count(93) == 1
    scene.exact()
    assert isinstance(scene.online(), VsnapError), "it is still gone"
    scene.rig.host.files["area"] = gone
    scene.works()


def test_an_area_that_is_replaced_is_fault_14() -> None:
    """Another file under the same name is not ours, whatever it holds."""
    scene = Scene()
    host = scene.rig.host
    ours = host.remove("area")
    host.files["area"] = other = host.create("copy")
    other.cache, other.disk = ours.cache.copy(), ours.disk.copy()
    untouched = other.cache.copy()
    assert scene.write(6 * BLOCK, 10) is not None
    assert scene.fault == 14
    scene.exact()
    assert other.cache.pages == untouched.pages, "somebody else's file was written to"


def _rewrite(scene: Scene, **changes: Any) -> None:
    """Somebody else commits a superblock, two generations on."""
    from dataclasses import replace

    from vsnapfs.diffarea.superblock import decode

    area = scene.rig.host.files["area"]
    for offset in SUPERBLOCK_OFFSETS:
        found = decode(area.cache.read(offset, 65536))
        data = replace(found, generation=found.generation + 2, **changes).encode()
        for pages in (area.cache, area.disk):
            pages.write(offset, data)


def test_a_commit_by_somebody_else_is_fault_15_and_is_not_overwritten() -> None:
    """EXTERNAL_WRITER (S1): the generation is read again before each superblock write."""
    scene = Scene()
    _rewrite(scene)
    theirs = scene.rig.host.files["area"].cache.read(0, 131072)

    async def create(volume: Volume) -> None:
        with pytest.raises(VsnapError):
            await volume.create_point()

    scene.run(create)
    assert scene.fault == 15
    assert scene.ids().count(94) == 1
    assert scene.rig.host.files["area"].cache.read(0, 131072) == theirs
    assert isinstance(scene.online(), VsnapError), "what we know of the area is stale"
    scene.exact()


def test_an_old_copy_of_the_area_put_back_is_fault_15() -> None:
    """At open: a diff area that is behind what the state file has seen is never served (S1)."""
    scene = Scene()
    scene.rig.close()
    area = scene.rig.host.files["area"]
    old = area.cache.copy(), area.disk.copy()

    async def more(volume: Volume) -> None:
        await scene.create(volume)
        await write(volume, 0, pattern(8, BLOCK))

    scene.run(more)
    scene.rig.close()
    area.cache, area.disk = old

    async def look(volume: Volume) -> None:
        assert not volume.protection.is_online
        assert volume.protection.fault is not None
        assert volume.protection.fault.code == 15

    scene.run(look)


@pytest.mark.parametrize("buffer", [0, 64 << 10])
def test_a_copy_of_the_area_from_between_two_kills_is_an_old_one(buffer: int) -> None:
    """S1: what was preserved since is not in it, so it is not served as the right one."""
    scene = Scene(buffer=buffer)
    scene.rig.killed()
    area = scene.rig.host.files["area"]
    old = area.cache.copy(), area.disk.copy()
    assert scene.write(6 * BLOCK, BLOCK) is None
    scene.exact()
    scene.rig.killed()
    scene.finds_an_old_area(old)


@pytest.mark.parametrize("first", ["write", "delete", "resize"])
def test_a_copy_of_a_closed_area_is_an_old_one_without_a_ring(first: str) -> None:
    """S1: the first change after a clean opening makes it so, whatever it is."""
    scene = Scene()
    scene.rig.close()
    area = scene.rig.host.files["area"]
    old = area.cache.copy(), area.disk.copy()

    async def change(volume: Volume) -> None:
        if first == "delete":
            await volume.delete_point(1)
            del scene.points[1]
        elif first == "resize":
            await volume.resize(SMALLEST + 60 * BLOCK)
        await write(volume, 6 * BLOCK, pattern(9, BLOCK))

    scene.run(change)
    scene.rig.killed()
    scene.finds_an_old_area(old)


@pytest.mark.parametrize("first", ["a fault was found", "the state file failed"])
def test_a_copy_of_the_area_from_before_an_opening_is_an_old_one(first: str) -> None:
    """S1: also if that opening was offline, or could not tell the state file at once."""
    scene = Scene()
    if first == "a fault was found":
        scene.rig.killed()
    else:
        scene.rig.close()
    area = scene.rig.host.files["area"]
    old = area.cache.copy(), area.disk.copy()
    if first == "a fault was found":
        cut(scene.rig, area.cache.size - BLOCK)

    async def change(volume: Volume) -> None:
        if first == "the state file failed":
            scene.rig.host.fail("state", "write", errno.EIO)
            await volume.resize(SMALLEST + 60 * BLOCK)
        await volume.delete_point(1)
        del scene.points[1]

    scene.run(change)
    scene.rig.killed()
    area = scene.rig.host.files["area"]
    area.cache, area.disk = old
    assert scene.fault == (3 if first == "a fault was found" else 15)
    scene.run(_is_old)


async def _is_old(volume: Volume) -> None:
    assert volume.core.need_area().is_old


def test_a_missing_area_is_fault_1_and_comes_back_by_itself() -> None:
    """DIFF_AREA_MISSING at open clears itself at the next open that finds the area again."""
    scene = Scene()
    scene.rig.close()
    kept = scene.rig.host.remove("area")
    assert scene.fault == 1
    assert scene.ids().count(80) == 1
    assert scene.write(0, 1) is not None
    scene.rig.close()
    assert scene.fault == 1
    assert scene.ids().count(80) == 1, "told once"
    scene.rig.close()
    scene.rig.host.files["area"] = kept
    assert scene.fault is None
    assert scene.write(0, SIZE) is None
    scene.exact()


def test_offline_by_hand_outlives_a_missing_area() -> None:
    """P1: the administrator's word stands, also beside a fault that clears itself."""
    scene = Scene()
    scene.rig.close()
    kept = scene.rig.host.remove("area")

    async def offline(volume: Volume) -> None:
        await volume.go_offline()
        assert "No such file" in volume.status()["trouble"]

    scene.run(offline)
    scene.rig.close()
    scene.rig.host.files["area"] = kept

    async def still(volume: Volume) -> None:
        assert not volume.protection.is_online
        assert volume.protection.fault is None

    scene.run(still)
    scene.works()


def test_a_missing_area_does_not_hide_the_fault_that_only_its_superblock_has() -> None:
    """P1: offline if either says so, also when the area is back after an opening without it."""
    scene = Scene()
    scene.rig.host.fail("state", "write", errno.EIO, times=FOREVER)
    scene.rig.host.fail("replica", "read", errno.EIO, times=FOREVER)
    assert scene.write(7 * BLOCK, BLOCK) is not None
    scene.rig.host.failures.clear()
    scene.rig.killed()
    kept = scene.rig.host.remove("area")
    assert scene.fault == 1
    scene.rig.close()
    scene.rig.host.files["area"] = kept
    for _ in range(2):
        assert scene.fault == 6
        assert scene.write(0, 1) is not None
        scene.rig.killed()
    scene.works()


def test_an_area_found_after_it_was_missing_can_have_another_fault() -> None:
    """P1: an old copy of it in its place is fault 15 until `online`, as if it had not been gone."""
    scene = Scene()
    scene.rig.close()
    old = replace(scene.rig.host.files["area"], inode=99)
    old.cache, old.disk = old.cache.copy(), old.disk.copy()
    scene.run(scene.create)
    scene.rig.close()
    right = scene.rig.host.remove("area")
    assert scene.fault == 1
    scene.rig.close()
    scene.rig.host.files["area"] = old
    assert scene.fault == 15
    assert scene.ids().count(94) == 1
    scene.rig.close()
    scene.rig.host.files["area"] = right
    assert scene.fault == 15
    scene.works()


@pytest.mark.parametrize("what", ["sync", "healing"])
@pytest.mark.parametrize("buffer", [0, 64 << 10])
def test_an_area_that_takes_no_writes_at_open_still_shows_its_points(
    what: str, buffer: int
) -> None:
    """Fault 2, and no copy is made before it has been opened anew, but all points can be read."""
    scene = Scene(buffer=buffer)
    assert scene.write(6 * BLOCK, BLOCK) is None
    scene.rig.killed()
    host = scene.rig.host
    if what == "sync":
        host.fail("area", "sync", errno.EIO, times=FOREVER)
    else:
        poke(scene.rig, "area", Layout(BLOCK).sector_offsets(0)[1] + 40, b"\xa5")
        host.fail("area", "write", errno.EIO, times=FOREVER)

    async def look(volume: Volume) -> None:
        assert volume.protection.fault is not None
        assert volume.protection.fault.code == 2
        assert await read_points(volume) == scene.points
        with pytest.raises(FaultError) as refused:
            volume.core.need_area().require_sound()
        assert refused.value.code == 2, "it names its own reason, not a lack of memory"
        assert isinstance(await attempt(volume.online()), VsnapError)
        host.failures.clear()  # What was not written at the opening is not there all the same.
        assert isinstance(await attempt(volume.online()), VsnapError)

    scene.run(look)
    scene.rig.close()
    assert scene.online() is None
    assert scene.write(0, SIZE, seed=77) is None
    scene.exact()


@pytest.mark.parametrize(
    ("first", "end", "fault"),
    [(0, 1 << 40, 2), (0, 2 << 16, 2), (2 << 16, 1 << 40, 3)],
    ids=["everything", "superblocks", "descriptors"],
)
def test_an_area_that_cannot_be_read_at_open_is_offline_until_it_can(
    first: int, end: int, fault: int
) -> None:
    """Fault 2, or 3 where the descriptors are what is missing; read again, it is all there."""
    scene = Scene()
    scene.rig.close()

    def fails(backing: SimBacking, operation: str, offset: int, _length: int) -> None:
        if backing.name == "area" and operation == "read" and first <= offset < end:
            raise OSError(errno.EIO, "the disk is broken")

    scene.rig.host.hooks.append(fails)
    assert scene.fault == fault
    assert scene.write(0, 1) is not None
    assert isinstance(scene.online(), VsnapError)
    scene.rig.close()
    scene.rig.host.hooks.clear()
    assert scene.fault == fault, "P1"
    scene.works()


@pytest.mark.parametrize("copy", [0, 1])
def test_one_unreadable_copy_of_everything_is_no_fault(copy: int) -> None:
    """Superblocks and descriptors are there twice: either half of them can be unreadable."""
    scene = Scene()
    scene.rig.killed()
    layout = Layout(BLOCK)
    bad = range(SUPERBLOCK_OFFSETS[copy], SUPERBLOCK_OFFSETS[copy] + 65536)
    table = range(layout.table_offsets(0)[copy], layout.table_offsets(0)[copy] + 65536)

    def fails(backing: SimBacking, operation: str, offset: int, _length: int) -> None:
        if backing.name == "area" and operation == "read" and (offset in bad or offset in table):
            raise OSError(errno.EIO, "an unreadable sector")

    scene.rig.host.hooks.append(fails)
    assert scene.fault is None
    assert scene.write(0, SIZE) is None
    scene.exact()


# --- what must not trip anything -----------------------------------------------------------------


def test_reads_and_preserved_writes_never_trip(monkeypatch: pytest.MonkeyPatch) -> None:
    """P2: with a diff area that fails all I/O, they go on; only a write that needs a copy trips."""
    scene = Scene()
    scene.rig.host.fail("area", None, errno.EIO, times=FOREVER)

    async def use(volume: Volume) -> None:
        for block in range(4):
            await write(volume, block * BLOCK + 100, pattern(20 + block, 50))
        handle = volume.open_replica()
        assert len(await handle.read(0, SIZE)) == SIZE
        handle.close()
        await flush(volume)
        assert isinstance(await attempt(read_points(volume)), OSError)
        assert volume.protection.is_online

    scene.run(use)
    assert scene.ids() == []
    scene.write(11 * BLOCK, 1)
    assert scene.fault == 7


@pytest.mark.parametrize("operation", ["allocate", "write"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_trouble_of_the_replica_itself_is_no_fault(operation: str, code: int) -> None:
    """P2: that request gets that errno and an event 1050, the volume stays online."""
    scene = Scene()
    scene.rig.host.files["replica"].written.discard(LAST // PAGE)  # A hole, never filled.
    scene.rig.close()
    before = scene.replica()
    scene.rig.host.fail("replica", operation, code)
    error = scene.write(LAST, 100)
    assert error is not None
    assert error.errno == code
    assert scene.replica() == before
    assert scene.fault is None
    assert scene.ids() == []
    assert scene.ids("vsnapfs").count(1050) == 1
    assert scene.write(LAST, 100) is None
    scene.exact()


def test_handles_from_before_a_fault_stay_dead() -> None:
    """P3: a file system that missed a write must be mounted afresh; new handles work."""
    scene = Scene()
    scene.rig.host.fail("area", "sync", errno.EIO)

    async def use(volume: Volume) -> None:
        old = volume.open_replica()
        assert isinstance(await attempt(old.write(8 * BLOCK, b"x")), OSError)
        await volume.online()
        for work in (old.read(0, 1), old.write(0, b"x"), old.flush(), old.write(0, b"y" * SIZE)):
            error = await attempt(work)
            assert error is not None
            assert error.errno == errno.ENODEV
        new = volume.open_replica()
        await new.write(8 * BLOCK, b"x")
        assert bytes(await new.read(8 * BLOCK, 1)) == b"x"
        await new.flush()

    scene.run(use)
    scene.exact()


@pytest.mark.parametrize("buffer", [0, 1 << 16], ids=["no buffer", "buffer"])
@pytest.mark.parametrize("policy", ["offline", "evict"])
def test_copies_after_a_failed_sync_are_on_the_disk(policy: str, buffer: int) -> None:
    """W2: what is preserved in slots whose first sync has failed outlives a power failure, though
    the host takes their pages for written from then on (ext4).
    """
    scene = Scene(on_full=policy, buffer=buffer)
    scene.rig.host.fail("area", "sync", errno.EIO)
    scene.write(6 * BLOCK, 3 * BLOCK)
    scene.flush()
    if policy == "offline":
        assert scene.online() is None
    else:
        scene.points.clear()
        scene.run(scene.create)
    assert scene.write(0, SIZE) is None
    assert scene.flush() is None
    scene.rig.crashed()
    scene.exact()


def test_new_copies_after_a_failed_sync_outlive_a_clean_close() -> None:
    """Durability "process": slots of suspect points that were deleted are as good as any others."""
    scene = Scene(durability="process")

    async def use(volume: Volume) -> None:
        await write(volume, 6 * BLOCK, pattern(4, 3 * BLOCK))
        scene.rig.host.fail("area", "sync", errno.EIO)
        assert await attempt(volume.delete_point(1)) is not None
        await volume.online()
        for number in (1, 2):
            await volume.delete_point(number)
        scene.points.clear()
        await scene.create(volume)
        await write(volume, 0, pattern(5, SIZE))

    scene.run(use)
    scene.rig.close()
    scene.rig.crashed()
    scene.exact()


# --- the replica's sync --------------------------------------------------------------------------


def test_a_failed_sync_of_the_replica_is_fault_13_and_never_retried_into_success() -> None:
    """Rule 6: the flush fails, all later ones too; 140 is logged once; online opens it anew."""
    scene = Scene()
    assert scene.write(0, 100) is None
    scene.rig.host.fail("replica", "sync", errno.EIO)
    error = scene.flush()
    assert error is not None
    assert error.errno == errno.EIO
    for _ in range(3):
        error = scene.flush()
        assert error is not None
        assert error.errno == errno.ENODEV
    assert scene.fault == 13
    assert scene.ids() == [92]
    assert scene.ids("vsnapfs") == [1060]
    assert scene.ids("Microsoft-Windows-Ntfs") == [140]
    scene.exact()
    assert scene.online() is None
    assert scene.flush() is None
    scene.works()


@pytest.mark.parametrize("opened", ["online", "close", "kill", "kill, nothing recorded"])
def test_what_was_written_beside_a_failed_sync_is_not_kept_by_the_cache(opened: str) -> None:
    """W4: a page that was written once more while its first sync failed is not taken for written
    after `online` or the next opening (as ext4 would do as long as it stays in the cache).
    """
    rig = Rig(size=8 * BLOCK)
    new = pattern(5, BLOCK)

    async def use(volume: Volume) -> None:
        await write(volume, BLOCK, pattern(3, BLOCK))
        rig.host.fail("replica", "sync", errno.EIO)
        if opened == "kill, nothing recorded":
            rig.host.fail("state", "write", errno.EIO, times=FOREVER)
            rig.host.fail("area", "write", errno.EIO, times=FOREVER)
        assert isinstance(await attempt(flush(volume)), OSError)
        # The loop goes on while a thread waits for the sync: a write that came in between.
        volume.core.replica.write(BLOCK, pattern(4, BLOCK))
        if opened == "online":
            await go_on(volume)

    async def go_on(volume: Volume) -> None:
        await volume.online()
        await write(volume, BLOCK, new)
        await flush(volume)

    rig.run(use)
    if opened != "online":
        rig.close() if opened == "close" else rig.killed()
        rig.host.failures.clear()
        rig.run(go_on)
    rig.crashed()
    assert rig.run(read_replica)[BLOCK : 2 * BLOCK] == new


@pytest.mark.parametrize("points", [0, 1])
@pytest.mark.parametrize("killed", [False, True], ids=["closed", "killed"])
def test_a_failed_sync_is_not_forgotten_with_the_area(points: int, *, killed: bool) -> None:
    """W4: where policy `evict` has gone on without an area that could not be marked as in use, the
    next process drops from the cache, too, what a sync of the replica has lost.
    """
    rig = Rig(size=8 * BLOCK, on_full="evict")
    old = pattern(1, 2 * BLOCK)

    async def begin(volume: Volume) -> None:
        await write(volume, 0, old)
        await flush(volume)
        for _ in range(points):
            await volume.create_point()

    async def fail(volume: Volume) -> None:
        for operation in ("write", "sync"):
            rig.host.fail("area", operation, errno.EIO, times=FOREVER)
        await write(volume, BLOCK, pattern(3, BLOCK))
        rig.host.fail("replica", "sync", errno.EIO)
        assert isinstance(await attempt(flush(volume)), OSError)

    async def go_on(volume: Volume) -> bytes:
        await volume.online()
        await write(volume, BLOCK, pattern(5, 100))
        await flush(volume)
        return await read_replica(volume)

    rig.run(begin)
    rig.close()
    rig.run(fail)
    if killed:
        rig.killed()
    else:
        rig.close()
    rig.host.failures.clear()
    shown = rig.run(go_on)
    assert shown[BLOCK : 2 * BLOCK] == pattern(5, 100) + old[BLOCK + 100 :]
    rig.crashed()
    assert rig.run(read_replica) == shown


@pytest.mark.parametrize("reopened", [False, True], ids=["same process", "next process"])
def test_a_point_taken_after_a_failed_sync_holds_what_is_on_the_disk(reopened: bool) -> None:
    """What a failed sync lost is not in the point, though the host's cache still shows it: or the
    point would change with the next power failure.
    """
    scene = Scene()
    assert scene.write(0, 2 * BLOCK, seed=31) is None
    scene.rig.host.fail("replica", "sync", errno.EIO)
    assert scene.flush() is not None
    if reopened:
        scene.rig.close()
    assert scene.online() is None
    scene.run(scene.create)
    scene.exact()
    scene.rig.crashed(nothing_kept)
    scene.exact()


def test_giving_up_the_points_opens_a_replica_that_failed_anew() -> None:
    """Online without points after a failed sync is online: the next flush is no fault again."""
    scene = Scene()
    assert scene.write(0, 2 * BLOCK, seed=31) is None
    scene.rig.host.fail("replica", "sync", errno.EIO)
    assert scene.flush() is not None

    async def give_up(volume: Volume) -> None:
        await volume.online(give_up_recovery_points=True)

    scene.run(give_up)
    assert scene.flush() is None
    assert scene.fault is None
    scene.points.clear()
    scene.run(scene.create)
    assert scene.write(0, SIZE) is None
    scene.rig.crashed(nothing_kept)
    scene.exact()


# --- damage --------------------------------------------------------------------------------------


def _rot(scene: Scene, offset: int) -> None:
    area = scene.rig.host.files["area"]
    for pages in (area.cache, area.disk):
        byte = pages.read(offset, 1)[0]
        pages.write(offset, bytes([byte ^ 0x10]))


def _slot_of(volume: Volume, point: int, block: int) -> int:
    found = volume.core.need_area().index.lookup(point, block)
    assert found is not None
    return found[1]


def test_a_rotted_copy_is_eio_for_exactly_its_block() -> None:
    """R1: EIO for that range of the points that read it, an event, a line in verify; no more."""
    scene = Scene()

    async def rot(volume: Volume) -> int:
        return Layout(BLOCK).slot_offset(_slot_of(volume, 2, 1)) + 700

    _rot(scene, scene.run(rot))

    async def read(volume: Volume) -> None:
        for number, content in scene.points.items():
            handle = volume.open_point(number)
            for start in range(0, SIZE, 1000):
                length = min(1000, SIZE - start)
                touched = start < 2 * BLOCK and start + length > BLOCK
                error = await attempt(handle.read(start, length))
                assert (error is not None) == touched, (number, start)
                if error is None:
                    assert (
                        bytes(await handle.read(start, length)) == content[start : start + length]
                    )
                else:
                    assert error.errno == errno.EIO
            handle.close()
        report = await volume.verify()
        assert not report["ok"]
        (problem,) = report["problems"]
        assert problem["what"] == "preserved block"
        assert problem["block"] == 1
        assert problem["points"] == [1, 2]
        assert problem["ranges"] == [[BLOCK, BLOCK]]
        with pytest.raises(VsnapError) as caught:
            await volume.restore(1)
        assert caught.value.code == "damaged"
        assert volume.protection.is_online

    before = scene.replica()
    scene.run(read)
    assert scene.replica() == before
    # Once for each point, however often it is read.
    assert scene.ids("vsnapfs").count(1040) == 2
    assert 61 in scene.ids()


@pytest.mark.parametrize("copy", [0, 1])
def test_one_rotted_descriptor_copy_is_healed_from_its_twin(copy: int) -> None:
    """After an unclean stop both copies are looked at; the bad one is written anew, and told."""
    scene = Scene()
    _rot(scene, Layout(BLOCK).sector_offsets(0)[copy] + 60)
    scene.rig.killed()
    scene.exact()
    assert 1041 in scene.ids("vsnapfs")
    sectors = [
        scene.rig.host.files["area"].cache.read(offset, 512)
        for offset in Layout(BLOCK).sector_offsets(0)
    ]
    assert sectors[0] == sectors[1]
    assert scene.write(0, SIZE) is None
    scene.exact()


@pytest.mark.parametrize("copy", [0, 1])
def test_one_rotted_superblock_copy_is_healed_from_the_other(copy: int) -> None:
    """Either copy is enough; the other is written anew before anything relies on it."""
    scene = Scene()
    scene.rig.close()
    _rot(scene, SUPERBLOCK_OFFSETS[copy] + 5000)
    scene.exact()
    assert scene.fault is None
    assert 1041 in scene.ids("vsnapfs")
    assert scene.write(0, SIZE) is None
    area = scene.rig.host.files["area"].cache
    assert area.read(0, 65536) == area.read(65536, 65536)


def test_both_descriptor_copies_rotted_is_fault_3_and_only_proven_reads() -> None:
    """Rule 1: what could depend on the lost sector is EIO, never newer bytes; the rest is exact."""
    scene = Scene()
    for offset in Layout(BLOCK).sector_offsets(0):
        _rot(scene, offset + 60)
    scene.rig.killed()
    assert scene.fault == 3
    assert scene.ids().count(82) == 1

    async def read(volume: Volume) -> None:
        failed = 0
        for number, content in scene.points.items():
            handle = volume.open_point(number)
            for block in range(13):
                part = slice(block * BLOCK, min((block + 1) * BLOCK, SIZE))
                error = await attempt(handle.read(part.start, part.stop - part.start))
                if error is None:
                    found = bytes(await handle.read(part.start, part.stop - part.start))
                    assert found == content[part], "a wrong byte was returned"
                else:
                    assert error.errno == errno.EIO
                    failed += 1
            handle.close()
        assert failed
        assert not (await volume.verify())["ok"]

    scene.run(read)
    error = scene.online()
    assert isinstance(error, VsnapError)
    assert error.code == "no-way-online"
    assert scene.fault == 3


# --- the state file ------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["offline by hand", "points given up"])
def test_a_state_file_that_cannot_be_read_is_not_lost(what: str) -> None:
    """The volume is not opened: it may be offline, points may not count; nothing else knows it."""
    scene = Scene(on_full="evict")
    if what == "offline by hand":
        scene.run(Volume.go_offline)
        scene.rig.close()
    else:
        scene.rig.host.fail("area", "write", errno.EIO, times=FOREVER)
        assert scene.write(0, SIZE) is None
        assert scene.ids() == [14]
        scene.rig.killed()
    scene.rig.host.fail("state", "read", errno.EIO, times=2)
    before = scene.rig.host.files["state"].cache.read(0, PAGE)
    with pytest.raises(VsnapError) as caught:
        scene.run(read_points)
    assert caught.value.code == "no-state"
    assert scene.rig.host.files["state"].cache.read(0, PAGE) == before

    async def as_it_was(volume: Volume) -> tuple[bool, int]:
        return volume.protection.is_online, len(volume.points)

    assert scene.run(as_it_was) == ((False, 2) if what == "offline by hand" else (True, 0))
