"""Short reads that wait for the disk together: each gets its own data or its own error.

R2 while they wait, and with the look at the index taken away: `t1_model/test_races.py`.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest
import trio
import trio.testing
from rig import BLOCK, Rig, pattern, small_steps, write
from schedules import Doing, Pause, all_stand_still

from vsnapfs.backing import FileBacking
from vsnapfs.volume import Volume
from vsnapfs.volume.coldreads import PLACES, ColdReads

SIZE = 12 * BLOCK
OLD, NEW = pattern(1, SIZE), pattern(2, SIZE)


class Disk:
    """Reads of numbered blocks: what has arrived can be had at once, the rest when let go."""

    def __init__(self) -> None:
        self.cold = ColdReads()
        self.arrived: set[int] = set()
        self.bad: set[int] = set()
        self.waited_for: list[int] = []
        self._go: dict[int, trio.Event] = {}

    def at_once(self, block: int) -> bytes | None:
        if block in self.bad:
            raise OSError(errno.EIO, f"block {block}")
        return bytes([block]) if block in self.arrived else None

    async def from_disk(self, block: int) -> bytes:
        self.waited_for.append(block)
        self._go[block] = trio.Event()
        await self._go[block].wait()
        if block in self.bad:
            raise OSError(errno.EIO, f"block {block}")
        return bytes([block])

    def read(self, nursery: trio.Nursery, block: int) -> Doing:
        own = partial(self.at_once, block), partial(self.from_disk, block)
        return Doing(nursery, self.cold.read(*own))

    async def go(self, block: int) -> None:
        self._go[block].set()
        await trio.testing.wait_all_tasks_blocked()

    @property
    def is_idle(self) -> bool:
        return not self.cold._queue and not self.cold._under_way


def trio_test(test: Callable[[Disk, trio.Nursery], object]) -> Callable[[], None]:
    def run() -> None:
        async def main() -> None:
            disk = Disk()
            async with trio.open_nursery() as nursery:
                with trio.fail_after(60):
                    await test(disk, nursery)  # type: ignore[misc]
            assert disk.is_idle

        trio.run(main)

    run.__doc__ = test.__doc__
    return run


async def _start(disk: Disk, nursery: trio.Nursery, count: int) -> list[Doing]:
    doing = []
    for block in range(count):
        doing.append(disk.read(nursery, block))
        await trio.testing.wait_all_tasks_blocked()
    assert disk.waited_for == list(range(min(count, PLACES)))
    return doing


@trio_test
async def test_what_has_arrived_is_answered_and_the_next_takes_the_place(
    disk: Disk, nursery: trio.Nursery
) -> None:
    """One way through a thread answers many; the first that has not arrived goes it next."""
    doing = await _start(disk, nursery, PLACES + 5)
    a, b, c = PLACES, PLACES + 1, PLACES + 2
    disk.arrived = {a, b, c + 1}
    await disk.go(0)
    assert [one.answered for one in doing[PLACES:]] == [True, True, False, False, False]
    assert disk.waited_for[PLACES:] == [c]
    disk.arrived.add(c + 2)
    await disk.go(c)
    for block in range(1, PLACES):
        await disk.go(block)
    for block, one in enumerate(doing):
        assert await one.ended() == bytes([block])
    assert disk.waited_for[PLACES:] == [c]


@trio_test
async def test_an_error_is_its_own_requests(disk: Disk, nursery: trio.Nursery) -> None:
    """Whether it shows at once or on the disk; all others get their data."""
    doing = await _start(disk, nursery, PLACES + 4)
    disk.arrived = {PLACES, PLACES + 2, PLACES + 3}
    disk.bad = {0, PLACES + 1}
    for block in (*range(PLACES), PLACES + 1):
        await disk.go(block)
    for block, one in enumerate(doing):
        if block in disk.bad:
            with pytest.raises(OSError, match=f"block {block}$"):
                await one.ended()
        else:
            assert await one.ended() == bytes([block])


@trio_test
async def test_one_that_goes_away_leaves_the_queue(disk: Disk, nursery: trio.Nursery) -> None:
    """Cancelled while it waits, or while it has a place: the others go on."""
    async with trio.open_nursery() as first:
        doing = [disk.read(first, block) for block in range(PLACES)]
        await trio.testing.wait_all_tasks_blocked()
        async with trio.open_nursery() as waiting:
            disk.read(waiting, 20)
            await trio.testing.wait_all_tasks_blocked()
            rest = [disk.read(nursery, block) for block in (21, 22)]
            await trio.testing.wait_all_tasks_blocked()
            waiting.cancel_scope.cancel()
        assert len(disk.cold._queue) == 2
        disk.arrived = {21, 22}
        first.cancel_scope.cancel()
    assert [await one.ended() for one in rest] == [bytes([21]), bytes([22])]
    assert not any(isinstance(one.result, bytes) for one in doing)
    assert 20 not in disk.waited_for


# --- in a volume ---------------------------------------------------------------------------------


@pytest.fixture
def rig() -> Iterator[Rig]:
    """Point 1 has copies of blocks 0 to 5."""
    with small_steps():
        rig = Rig(size=SIZE)
        rig.threads = True
        rig.run(_begin)
        yield rig


async def _begin(volume: Volume) -> None:
    await write(volume, 0, OLD)
    await volume.create_point()
    await write(volume, 0, NEW[: 6 * BLOCK])


def _slot_offset(volume: Volume, block: int) -> int:
    area = volume.core.need_area()
    found = area.index.lookup(1, block)
    assert found is not None
    return area.layout.slot_offset(found[1])


def _flip(rig: Rig, offset: int) -> None:
    pages = rig.host.files["area"].cache
    (byte,) = pages.read(offset, 1)
    pages.write(offset, bytes([byte ^ 1]))


@pytest.mark.parametrize("arrives", [True, False])
def test_a_damaged_copy_is_an_error_of_its_range_only(rig: Rig, arrives: bool) -> None:
    """R1: reads of all blocks wait together; the one of the damaged copy is EIO."""

    async def main(volume: Volume) -> None:
        _flip(rig, _slot_offset(volume, 3) + 99)
        held = _slot_offset(volume, 0)
        point = volume.open_point(1)
        async with trio.open_nursery() as nursery:
            with Pause(rig, "area", "read", at=(held, held + 1)) as reading:
                doing = [Doing(nursery, point.read(b * BLOCK + 7, 50)) for b in range(12)]
                await reading.reached()
                rig.host.cached = arrives
                reading.go()
                for block, one in enumerate(doing):
                    if block == 3:
                        with pytest.raises(OSError) as caught:
                            await one.ended()
                        assert caught.value.errno == errno.EIO
                    else:
                        start = block * BLOCK + 7
                        assert bytes(await one.ended()) == OLD[start : start + 50]
        point.close()

    rig.run(main)
    assert rig.log.ids("vsnapfs").count(1040) == 1


def test_the_end_comes_while_reads_wait(rig: Rig) -> None:
    """Reads that are cancelled end; those at the disk to their end; then the volume closes."""

    async def main(volume: Volume) -> None:
        point = volume.open_point(1)
        async with trio.open_nursery() as nursery:
            with ExitStack() as stack:
                for block in range(6, 6 + PLACES):
                    place = block * BLOCK, block * BLOCK + 1
                    reading = stack.enter_context(Pause(rig, "replica", "read", at=place))
                    Doing(nursery, point.read(block * BLOCK, 50))
                    await reading.reached()
                waiting = [Doing(nursery, point.read(b * BLOCK, 50)) for b in range(6)]
                await all_stand_still()
                nursery.cancel_scope.cancel()
                with trio.CancelScope(shield=True):
                    await all_stand_still()
                assert all(one.answered for one in waiting)
        cold = volume.reader._cold
        assert not cold._queue
        assert not cold._under_way
        point.close()
        await volume.close()

    rig.run(main)


def test_a_descriptor_that_is_known_need_not_be_read(rig: Rig) -> None:
    """R1: verified once, it serves from memory; the block is checked each time all the same."""

    async def main(volume: Volume) -> None:
        rig.host.cached = True
        area, point = volume.core.need_area(), volume.open_point(1)
        assert bytes(await point.read(5, 10)) == OLD[5:15]
        found = area.index.lookup(1, 0)
        assert found is not None
        for offset in area.layout.sector_offsets(found[1] // 20):
            _flip(rig, offset + 40)
        assert bytes(await point.read(5, 10)) == OLD[5:15]
        assert bytes(await point.read(0, 2 * BLOCK)) == OLD[: 2 * BLOCK]
        assert area.read_copies([(0, *found)]) == [None], "verifying trusts what is in memory"
        _flip(rig, _slot_offset(volume, 0) + 99)
        with pytest.raises(OSError):
            await point.read(5, 10)
        point.close()

    rig.run(main)


def test_a_slot_that_is_used_anew_is_read_by_its_new_descriptor(rig: Rig) -> None:
    """What memory knows of a slot's sector is older than what the slot holds."""

    async def main(volume: Volume) -> None:
        rig.host.cached = True
        point = volume.open_point(1)
        for block in range(6):
            await point.read(block * BLOCK, 10)
        point.close()
        await volume.delete_point(1)
        number = (await volume.create_point()).number
        await write(volume, 6 * BLOCK, NEW[6 * BLOCK :])
        point = volume.open_point(number)
        for block in range(6, 12):
            start = block * BLOCK
            assert bytes(await point.read(start + 1, 10)) == OLD[start + 1 : start + 11]
        point.close()

    rig.run(main)


# --- the file itself -----------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path: Path) -> Iterator[FileBacking]:
    (tmp_path / "file").write_bytes(bytes(1 << 20))
    opened = FileBacking.open(tmp_path / "file")
    yield opened
    opened.close()


def _refused(code: int) -> Callable[..., int]:
    def preadv(*_arguments: object) -> int:
        raise OSError(code, os.strerror(code))

    return preadv


def test_the_second_short_read_that_misses_fetches_what_lies_around(
    file: FileBacking, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first one nothing, nor one elsewhere, nor one that others have come between."""
    fetched: list[tuple[int, int]] = []
    monkeypatch.setattr(file, "prefetch", lambda *where: fetched.append(where))
    monkeypatch.setattr(os, "preadv", _refused(errno.EAGAIN))
    kib = 1024
    for offset in (8 * kib, 200 * kib, (64 * 1024 + 8) * kib, 12 * kib):
        assert file.read_cached(offset, 4 * kib) is None
        assert not fetched
    assert file.read_cached(192 * kib, 4 * kib) is None
    assert fetched == [(192 * kib, 64 * kib)]
    assert not file.read_into_cached(0, bytearray(64 * kib))
    assert len(fetched) == 1


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.EIO])
def test_a_host_that_does_not_tell_is_asked_once(
    file: FileBacking, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """An error is none of `read_cached`: `read` finds it."""
    monkeypatch.setattr(os, "preadv", _refused(code))
    assert file.read_cached(0, 4096) is None
    assert file.tells_cached is (code == errno.EIO)


def test_short_reads_of_a_host_that_does_not_tell_do_not_wait_for_each_other(rig: Rig) -> None:
    """Then nothing could ever be answered when others come back."""

    async def main(volume: Volume) -> None:
        volume.core.replica.tells_cached = False
        point = volume.open_point(1)
        async with trio.open_nursery() as nursery:
            with ExitStack() as stack:
                for block in range(6, 6 + PLACES + 2):
                    place = block * BLOCK, block * BLOCK + 1
                    reading = stack.enter_context(Pause(rig, "replica", "read", at=place))
                    Doing(nursery, point.read(block * BLOCK, 50))
                    await reading.reached()
        point.close()

    rig.run(main)
