"""What was begun and not ended, cut, or put in another's place, and what opening makes of it.

Giving up recovery points stopped at every operation; files that were cut; old diff areas; another
volume's replica; shrinking after a write that ended in nobody knows what; dry runs over all of it.
"""

from __future__ import annotations

import errno
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import trio
from filefuzz import fresh, opened, poke, small_volume
from mutations import LAYOUT
from rig import BLOCK, SMALLEST, Rig, attempt, pattern, raw_replica, read_points, write
from scene import Scene
from schedules import Doing, Pause, all_stand_still
from simdisk import FOREVER, Change, Host, PowerLoss, SimBacking

from vsnapfs.backing import Backing, Bytes, FileBacking
from vsnapfs.diffarea.area import DiffArea
from vsnapfs.diffarea.layout import SECTOR_SIZE, SUPERBLOCK_OFFSETS
from vsnapfs.diffarea.recovery import read_superblocks
from vsnapfs.errors import FaultCode, VsnapError
from vsnapfs.volume import Volume
from vsnapfs.volume.create import create_volume
from vsnapfs.volume.overlay import Overlay


@pytest.fixture
def small() -> Rig:
    return small_volume()


@contextmanager
def on_the_host(rig: Rig) -> Iterator[None]:
    """`online --give-up-recovery-points` opens its files on the simulated host."""

    def create(_path: Path) -> SimBacking:
        rig.host.create("area")
        return rig.host.open("area")

    files = mock.Mock(open=lambda _path, follow: rig.host.open("area"), create=create)
    with (
        mock.patch("vsnapfs.volume.giveup.FileBacking", files),
        mock.patch("vsnapfs.volume.giveup.sync_directory"),
    ):
        yield


# --- making --------------------------------------------------------------------------------------


@pytest.mark.parametrize("refused", [(1,), (2,), (1, 2)])
def test_a_new_area_that_was_refused_once_is_on_the_disk_at_last(refused: tuple[int]) -> None:
    """ext4 takes a page of reserved space that could not be written for written as long as it stays
    in the cache: superblocks that are written there in the next attempt reach the disk.
    """
    host = Host()
    host.create("area")
    backing = host.open("area")
    backing.allocate(0, LAYOUT.minimum_size)
    make = partial(
        DiffArea.format,
        backing,
        volume_id=bytes(16),
        block_size=LAYOUT.block_size,
        replica_size=BLOCK,
        maximum=LAYOUT.minimum_size,
    )
    for nth in refused:
        host.fail("area", "sync", errno.EIO, nth=nth)
        with pytest.raises(OSError):
            make()
    made = make()
    found, notes, _ = read_superblocks(host.power_failure().open("area"))
    assert found == [made.superblock] * 2
    assert notes == []


def test_what_an_attempt_to_create_has_left_in_the_cache_is_not_trusted(tmp_path: Path) -> None:
    """The same for a replica and an area that are there already: their cached pages go first."""
    names = ["replica.img", "diff-area"]
    (tmp_path / names[0]).write_bytes(bytes(40_000))
    (tmp_path / names[1]).touch()
    forgotten: list[str] = []

    def note(what: str) -> Callable[..., None]:
        method = getattr(FileBacking, what)

        def noting(self: FileBacking, *args: Any) -> None:
            forgotten.append(f"{self.path.name} {what}")
            method(self, *args)

        return noting

    with (
        mock.patch.object(FileBacking, "forget_cache", note("forget_cache")),
        mock.patch.object(FileBacking, "write", note("write")),
    ):
        (tmp_path / "image").write_bytes(pattern(1, 40_000))
        create_volume(
            tmp_path / "vol",
            size=40_000,
            diff_area_size=384 << 10,
            block_size=BLOCK,
            replica=tmp_path / names[0],
            diff_area=tmp_path / names[1],
            from_image=tmp_path / "image",
            force=True,
        )
    for name in names:
        assert forgotten.index(f"{name} forget_cache") < forgotten.index(f"{name} write")


# --- giving up -----------------------------------------------------------------------------------


def _rot_both(rig: Rig) -> None:
    for offset in SUPERBLOCK_OFFSETS:
        poke(rig, "area", offset + 100, b"\xff" * 40)


def _rot_a_sector(rig: Rig) -> None:
    for offset in LAYOUT.sector_offsets(0):
        poke(rig, "area", offset, b"\xff" * SECTOR_SIZE)


def _lose_it(rig: Rig) -> None:
    rig.host.remove("area")


def _some(_name: str, number: int, _change: Change) -> Callable[[int, int], bool]:
    return lambda sector, _count: (number + sector) % 3 == 0


@pytest.mark.parametrize("kept", [False, True, _some], ids=["lost", "kept", "torn"])
@pytest.mark.parametrize("loss", [_rot_both, _rot_a_sector, _lose_it])
def test_giving_up_can_be_repeated_after_any_stop(
    small: Rig, loss: Callable[[Rig], None], kept: Any
) -> None:
    """Power fails at each operation of it: the volume opens, and the command ends what it began."""
    steps = 0
    while True:
        rig = fresh(small)
        loss(rig)

        async def begin(volume: Volume, rig: Rig = rig, steps: int = steps) -> None:
            assert volume.status()["state"] == "offline"
            rig.host.stop_at = rig.host.operations + steps
            await volume.online(give_up_recovery_points=True)
            assert not volume.points

        async def end(volume: Volume, rig: Rig = rig) -> None:
            if volume.status()["state"] == "offline":
                await volume.online(give_up_recovery_points=True)
            assert not volume.points
            problems = (await volume.verify())["problems"]
            assert all("healed when the volume was opened" in p["message"] for p in problems)
            point = await volume.create_point()
            assert point.number == 4
            old = raw_replica(rig)
            await write(volume, 0, pattern(5, 2 * BLOCK))
            assert await read_points(volume) == {4: old}

        with on_the_host(rig):
            try:
                rig.run(begin)
                break
            except PowerLoss:
                rig.crashed(kept if callable(kept) else lambda *_, kept=kept: kept)
            rig.run(end)
        steps += 1
    assert steps > 20


def test_giving_up_keeps_no_lock_on_what_it_cannot_read(small: Rig) -> None:
    """The superblocks cannot be read: refused, and the next try finds the file free."""
    rig = fresh(small)
    rig.host.fail("area", "read", errno.EIO, times=FOREVER)

    async def act(volume: Volume) -> None:
        assert volume.status()["fault"]["code"] == FaultCode.IO_FAILURE_DURING_ONLINE
        for _ in range(2):
            error = await attempt(volume.online(give_up_recovery_points=True))
            assert isinstance(error, VsnapError)
            assert error.code == "still-faulted"
            assert not rig.host.files["area"].locked

    with on_the_host(rig):
        rig.run(act)


def test_giving_up_writes_over_nothing_that_is_not_ours(small: Rig) -> None:
    """A short file with something in it is in the way: refused, not touched."""
    rig = fresh(small)
    rig.host.remove("area")

    async def act(volume: Volume) -> None:
        rig.host.create("area", 5000)
        poke(rig, "area", 4000, b"letters")
        with pytest.raises(VsnapError, match="not overwritten"):
            await volume.online(give_up_recovery_points=True)
        assert rig.host.files["area"].cache.read(4000, 7) == b"letters"

    with on_the_host(rig):
        rig.run(act)


# --- opening -------------------------------------------------------------------------------------


def _cut(rig: Rig, size: int) -> None:
    file = rig.host.files["area"]
    for pages in (file.cache, file.disk):
        pages.resize(size)
    units = range(-(-size // 4096))
    file.space &= set(units)
    file.written &= set(units)


def _differing_twin(rig: Rig) -> None:
    first, twin = LAYOUT.sector_offsets(0)
    assert rig.host.files["area"].cache.read(first, SECTOR_SIZE) != bytes(SECTOR_SIZE)
    poke(rig, "area", twin, bytes(SECTOR_SIZE))


def _area(host: Host) -> bytes:
    cache = host.files["area"].cache
    return cache.read(0, cache.size)


def test_healing_a_lost_twin_does_not_hide_that_the_file_was_cut() -> None:
    """The last table and half of the slots are gone: fault 3; repair reserves the space again."""
    rig = Rig(size=12 * BLOCK, maximum=SMALLEST)

    async def fill(volume: Volume) -> None:
        await write(volume, 0, pattern(1, 12 * BLOCK))
        await volume.create_point()
        await write(volume, 0, pattern(2, 12 * BLOCK))

    rig.run(fill)
    rig.close()
    _cut(rig, LAYOUT.slot_offset(5))

    async def look(volume: Volume) -> None:
        assert volume.status()["fault"]["code"] == FaultCode.META_DATA_CORRUPTION
        assert rig.host.files["area"].cache.size < SMALLEST
        report = await volume.repair()
        assert "reserved again" in report["found"][0]["action"]
        assert {f["what"] for f in report["found"]} == {"diff area", "descriptor sector"}
        assert [p["block"] for p in report["beyond_repair"]] == list(range(5, 12))
        assert rig.host.files["area"].space >= set(range(SMALLEST // 4096))
        await volume.online()
        assert not (await volume.repair())["found"]

    rig.run(look)


def test_nothing_is_written_to_an_old_diff_area(small: Rig) -> None:
    """Not even what opening heals elsewhere; `verify` and `repair` tell of it as it is."""
    rig = fresh(small)
    old = rig.host.files["area"].cache.copy()

    async def newer(volume: Volume) -> None:
        await write(volume, 0, pattern(9, BLOCK))
        await volume.create_point()

    rig.run(newer)
    rig.close()
    rig.host.files["area"].cache, rig.host.files["area"].disk = old, old.copy()
    _differing_twin(rig)
    before = _area(rig.host)

    async def look(volume: Volume) -> None:
        assert volume.status()["fault"]["code"] == FaultCode.EXTERNAL_WRITER_TO_DIFF_AREA
        report = await volume.repair()
        assert not [f for f in report["found"] if f["what"] == "descriptor sector"]
        told = {problem["what"] for problem in report["beyond_repair"]}
        assert {"diff area", "descriptor sector"} <= told

    rig.run(look)
    rig.close()
    assert _area(rig.host) == before


def test_a_wrong_replica_changes_nothing(small: Rig) -> None:
    """Refused before anything is healed, or compared with it and dropped."""
    rig = fresh(small)
    _differing_twin(rig)
    before = _area(rig.host)
    for pages in (rig.host.files["replica"].cache, rig.host.files["replica"].disk):
        pages.resize(pages.size - 1)

    async def look(_volume: Volume) -> None:
        raise AssertionError("it must not open")

    with pytest.raises(VsnapError, match="its diff area says"):
        rig.run(look)
    assert _area(rig.host) == before


def test_what_opening_heals_is_logged_with_a_fault_too(small: Rig) -> None:
    """The file is cut and a twin has rotted: fault 3 and event 1041."""
    rig = fresh(small)
    _differing_twin(rig)
    _cut(rig, rig.host.files["area"].cache.size - BLOCK)

    async def look(volume: Volume) -> None:
        await trio.lowlevel.checkpoint()
        assert volume.status()["fault"]["code"] == FaultCode.META_DATA_CORRUPTION
        assert "descriptor sectors" in rig.log.params(1041)["what"]

    rig.run(look)


@pytest.mark.parametrize("waits", [False, True])
def test_a_shrink_after_an_unexpected_end_of_a_write_is_refused(waits: bool) -> None:
    """Slots of which nobody knows what they hold lie too high: an error; reopened, it shrinks.
    (waits: the shrink comes while that write is under way.)
    """
    rig = Rig(size=12 * BLOCK, maximum=SMALLEST + 64 * BLOCK)
    rig.threads = waits

    async def act(volume: Volume) -> None:
        await volume.create_point()
        area = volume.core.need_area()
        taken = area.slots.reserve(len(area.slots) - 3)
        assert taken is not None
        with mock.patch.object(area.index, "add", side_effect=MemoryError):
            if waits:
                error = await both(volume, taken)
            else:
                assert await attempt(write(volume, 0, b"y")) is not None
                area.slots.release(taken)
                await volume.online()
                error = await attempt(volume.resize(SMALLEST))
        assert isinstance(error, VsnapError)
        assert "cannot shrink" in str(error)
        volume.check_invariants()

    async def both(volume: Volume, taken: list[int]) -> object:
        async with trio.open_nursery() as nursery:
            with Pause(rig, "area", "sync") as copying:
                writer = Doing(nursery, write(volume, 0, b"y"))
                await copying.reached()
                volume.core.need_area().slots.release(taken)
                shrinking = Doing(nursery, volume.resize(SMALLEST))
                await all_stand_still()
                copying.go()
                assert await attempt(writer.ended()) is not None
                return await attempt(shrinking.ended())

    rig.run(act)
    rig.close()

    async def again(volume: Volume) -> None:
        if waits:
            await volume.online()
        await volume.resize(SMALLEST)
        assert volume.status()["diff_area"]["allocated"] == SMALLEST
        assert await read_points(volume) == {1: bytes(12 * BLOCK)}

    rig.run(again)


# --- dry runs ------------------------------------------------------------------------------------


def _outcome(work: Callable[[], Any]) -> Any:
    try:
        found = work()
    except OSError as error:
        return error.errno
    return bytes(found) if found is not None else None


@pytest.mark.parametrize("is_device", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_an_overlay_does_what_the_file_would_do(seed: int, is_device: bool) -> None:
    """Any reads, writes, growth and cuts: the same bytes, sizes and errors; nothing underneath."""
    dice = random.Random(seed)
    host, other = Host(), Host()
    for each in (host, other):
        each.create("f", 30_000, is_device=is_device)
    below, real = host.open("f"), other.open("f")
    start = dice.randbytes(30_000)
    below.write(0, start)
    real.write(0, start)
    overlay = Overlay(Path("f"), below)
    for _ in range(60):
        offset, length = dice.randrange(40_000), dice.choice((1, 700, 4096, 9000))
        offset -= dice.choice((0, offset % 4096))
        data = dice.randbytes(length)

        def act(
            backing: Backing,
            operation: str,
            offset: int = offset,
            length: int = length,
            data: bytes = data,
        ) -> Any:
            if operation == "truncate":
                return None if is_device else backing.truncate(offset)
            if operation == "write":
                return backing.write(offset, data)
            return getattr(backing, operation)(offset, length)

        operation = dice.choice(("read", "read", "write", "allocate", "truncate"))
        told, done = (_outcome(partial(act, each, operation)) for each in (overlay, real))
        assert told == done, (operation, offset, length)
        assert overlay.size() == real.size()
    assert bytes(overlay.read(0, overlay.size())) == bytes(real.read(0, real.size()))
    assert host.files["f"].cache.read(0, 30_000) == start


def test_a_dry_run_mends_a_superblock_that_cannot_be_read(tmp_path: Path) -> None:
    """Writing it anew brings it back and needs nothing of what is unreadable: so it says."""
    create_volume(tmp_path / "vol", size=40_000, diff_area_size=384 << 10, block_size=BLOCK)
    read, start = FileBacking.read, SUPERBLOCK_OFFSETS[1]

    def bad(self: FileBacking, offset: int, length: int) -> Bytes:
        if self.path.name == "diff-area" and offset < start + SECTOR_SIZE < offset + length:
            raise OSError(errno.EIO, "a bad sector")
        return read(self, offset, length)

    async def repair(volume: Volume) -> dict[str, Any]:
        return await volume.repair(dry_run=True)

    with mock.patch.object(FileBacking, "read", bad):
        report = trio.run(lambda: opened(tmp_path / "vol", repair, dry_run=True))
    assert report["ok"], report
    assert report["state"] == "online"
    assert {finding["what"] for finding in report["found"]} == {"superblock"}


@pytest.mark.parametrize("name", ["area", "state"])
@pytest.mark.parametrize("operation", ["write", "sync", "allocate", "truncate"])
def test_no_point_is_live_after_online_and_gone_at_the_next_opening(
    name: str, operation: str
) -> None:
    """Giving up the points failed half way: `online` without it does not bring them back."""
    nth, failed = 0, True
    while failed:
        nth += 1
        scene = Scene()

        async def give_up(volume: Volume, scene: Scene = scene, nth: int = nth) -> bool:
            await volume.go_offline()
            failure = scene.rig.host.fail(name, operation, errno.EIO, nth=nth)
            error = await attempt(volume.online(give_up_recovery_points=True))
            scene.rig.host.failures.remove(failure)
            return error is not None

        failed = scene.run(give_up)
        if failed and scene.online() is None:
            live = scene.run(_live)
            scene.exact(only=live)
            scene.rig.killed()
            scene.exact(only=live)
        elif failed:

            async def repeat(volume: Volume) -> None:
                await volume.online(give_up_recovery_points=True)

            scene.run(repeat)
            scene.exact(only=set())


async def _live(volume: Volume) -> set[int]:
    return {point.number for point in volume.points}


@pytest.mark.parametrize("policy", ["offline", "evict"])
def test_a_superblock_that_only_the_host_s_cache_has_is_none(policy: str) -> None:
    """After syncs that failed for good the next opening believes the disk: no fault 15, the volume
    is as it was when the disk was last heard of.
    """
    rig = Rig(size=4 * BLOCK, on_full=policy)

    async def begin(volume: Volume) -> None:
        await write(volume, 0, pattern(1, 4 * BLOCK))
        await volume.create_point()

    async def end(volume: Volume) -> None:
        # Of the next commit the first copy gets there, of all later ones nothing does.
        rig.host.fail("area", "sync", errno.EIO, nth=2, times=FOREVER)
        assert await attempt(volume.delete_point(1)) is not None

    async def look(volume: Volume) -> None:
        assert volume.core.area is not None
        assert not volume.core.area_is_stale
        assert 94 not in rig.log.ids()  # 79 and fault 15
        if not volume.protection.is_online:
            await volume.online()
        await volume.create_point()
        await write(volume, 0, pattern(2, BLOCK))
        assert (await read_points(volume))[2] == pattern(1, 4 * BLOCK)

    rig.run(begin)
    rig.run(end)
    rig.killed()
    rig.run(look)


@pytest.mark.parametrize("ends", ["killed", "comes online"])
def test_a_restore_whose_beginning_failed_half_may_be_found_begun(ends: str) -> None:
    """Nothing could be written down any more, so that one copy says that it has begun. The error
    says so; once the volume has been online, it is none.
    """
    scene = Scene()
    before, host = scene.replica(), scene.rig.host

    async def restore(volume: Volume) -> None:
        host.fail("area", "sync", errno.EIO, nth=2, times=FOREVER)
        with pytest.raises(VsnapError, match="was not restored") as caught:
            await volume.restore(1)
        assert "found begun" in caught.value.hint

    scene.run(restore)
    host.failures.clear()
    if ends == "comes online":
        assert scene.online() is None
    scene.rig.killed()
    assert scene.replica() == before
    assert scene.online() is None
    assert scene.replica() == (before if ends == "comes online" else scene.points[1])
    scene.exact()
