"""Blocks of nothing but zeros: preserved in a flag that 64 neighbours share, and never mistaken."""

from __future__ import annotations

import errno
import random
import time
from contextlib import suppress
from unittest import mock

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from powercuts import by_dice, everything_kept, nothing_kept
from rig import BLOCK, SMALLEST, Rig, attempt, flush, pattern, read_points, small_steps, write
from simdisk import PowerLoss, SimBacking

from vsnapfs.diffarea.area import DiffArea
from vsnapfs.diffarea.descriptors import ZERO_SPAN
from vsnapfs.diffarea.index import SLOT_MASK, ZEROS
from vsnapfs.diffarea.layout import SLOTS_PER_SECTOR, Layout
from vsnapfs.volume import Volume

LAYOUT = Layout(BLOCK)
SPANS = 3
#: Begins and ends in the middle of things: a short last block, in a span that is not whole.
SIZE = (SPANS * ZERO_SPAN - 5) * BLOCK - 700
BLOCKS = -(-SIZE // BLOCK)


def in_use(volume: Volume) -> int:
    return volume.core.need_area().slots.in_use


def places(volume: Volume, point: int) -> list[int]:
    """The slots, as the index has them, of all blocks that `point` has a copy of."""
    index = volume.core.need_area().index
    return [found[1] for block in range(BLOCKS) if (found := index.lookup(point, block))]


def rig(**options: object) -> Rig:
    return Rig(**{"size": SIZE, "maximum": SMALLEST + 300 * BLOCK, **options})  # type: ignore[arg-type]


@pytest.mark.parametrize("buffer", [0, 64 * 1024])
def test_a_first_write_over_a_hole_costs_a_slot_for_64_blocks(buffer: int) -> None:
    """All of an empty replica overwritten: three flags, and no byte of data in the diff area."""
    rig_ = rig(buffer=buffer)

    async def overwrite(volume: Volume) -> None:
        point = await volume.create_point()
        # One after the other: each in a barrier of its own.
        for block in (*range(7, BLOCKS - 1, 3), *range(BLOCKS)):
            length = min(BLOCK, SIZE - block * BLOCK)
            await write(volume, block * BLOCK, pattern(block, length))
        await flush(volume)
        assert in_use(volume) == SPANS
        assert all(slot & ZEROS for slot in places(volume, point.number))
        area = volume.core.need_area()
        for slot in {slot & SLOT_MASK for slot in places(volume, point.number)}:
            assert not any(area.backing.read(LAYOUT.slot_offset(slot), BLOCK))
        volume.check_invariants()

    async def look(volume: Volume) -> None:
        assert in_use(volume) == SPANS
        assert (await read_points(volume))[1] == bytes(SIZE)
        assert (await volume.verify())["ok"]
        volume.check_invariants()

    rig_.run(overwrite)
    rig_.run(look)
    rig_.close()
    rig_.run(look)
    rig_.killed()
    rig_.run(look)


def test_zeros_that_were_written_count_as_zeros() -> None:
    """What is recognised is the content, hole or not; one byte that differs makes it data."""
    rig_ = rig()

    async def go(volume: Volume) -> None:
        await write(volume, 0, pattern(1, 4 * BLOCK))
        await write(volume, 0, bytes(4 * BLOCK))
        await write(volume, 2 * BLOCK - 1, b"x")
        await volume.create_point()
        await write(volume, 0, pattern(2, 4 * BLOCK))
        assert in_use(volume) == 2  # a flag for three blocks, and block 1
        wanted = bytearray(SIZE)
        wanted[2 * BLOCK - 1] = ord("x")
        assert (await read_points(volume))[1] == wanted

    rig_.run(go)


def test_copied_like_any_other_if_that_was_chosen() -> None:
    """`zero-blocks = "copy"`: each first write costs a block."""
    rig_ = rig(zero_blocks="copy")

    async def go(volume: Volume) -> None:
        await volume.create_point()
        await write(volume, 0, pattern(2, 10 * BLOCK))
        assert in_use(volume) == 10
        assert not any(slot & ZEROS for slot in places(volume, 1))

    rig_.run(go)


def test_each_epoch_has_flags_of_its_own() -> None:
    """Points, wiped in between, deleted in the middle: all are exact, and slots become free."""
    rig_ = rig()

    async def go(volume: Volume) -> None:
        contents = {}
        for turn in range(4):
            point = await volume.create_point()
            contents[point.number] = bytes(await volume.open_replica().read(0, SIZE))
            await write(volume, 0, pattern(turn, 70 * BLOCK) if turn % 2 == 0 else bytes(SIZE))
        assert await read_points(volume) == contents
        used = in_use(volume)
        await volume.delete_point(2)
        del contents[2]
        assert in_use(volume) < used
        assert await read_points(volume) == contents
        for number in (1, 3, 4):
            await volume.delete_point(number)
        assert in_use(volume) == 0
        volume.check_invariants()

    rig_.run(go)


def test_a_flag_whose_slot_was_freed_is_not_added_to() -> None:
    """The newest point goes and with it a flag of this epoch: the next zeros get another one."""
    rig_ = rig()

    async def go(volume: Volume) -> None:
        await volume.create_point()
        await write(volume, 0, pattern(1, BLOCK))
        await volume.create_point()
        await write(volume, BLOCK, pattern(2, BLOCK))
        await volume.delete_point(2)
        await volume.delete_point(1)
        assert in_use(volume) == 0
        await write(volume, 2 * BLOCK, pattern(3, BLOCK))
        assert in_use(volume) == 0
        await volume.create_point()
        await write(volume, 0, pattern(4, 5 * BLOCK))
        volume.check_invariants()
        wanted = b"".join(pattern(n, BLOCK) for n in (1, 2, 3)).ljust(SIZE, b"\0")
        assert (await read_points(volume))[3] == wanted

    rig_.run(go)
    rig_.killed()
    rig_.run(Volume.verify)


@pytest.mark.parametrize("buffer", [0, 64 * 1024])
def test_a_full_area_takes_zeros_as_long_as_there_is_one_slot(buffer: int) -> None:
    """Slots reserved for what turns out to be zeros come back, and writes wait for them."""
    rig_ = rig(maximum=SMALLEST, buffer=buffer)  # 32 slots

    async def go(volume: Volume) -> None:
        await write(volume, 0, pattern(1, 20 * BLOCK))
        await volume.create_point()
        before = bytes(await volume.open_replica().read(0, SIZE))
        async with trio.open_nursery() as nursery:
            for start in range(0, BLOCKS, 4):
                length = min(4 * BLOCK, SIZE - start * BLOCK)
                nursery.start_soon(write, volume, start * BLOCK, pattern(start, length))
        await flush(volume)
        assert volume.protection.is_online
        assert in_use(volume) == 20 + SPANS
        assert (await read_points(volume))[1] == before
        volume.check_invariants()
        # A new point, and everything is data now: that does not fit.
        await volume.create_point()
        error = await attempt(write(volume, 0, pattern(5, 10 * BLOCK)))
        assert error is not None
        assert error.errno == errno.ENODEV
        assert rig_.log.ids() == [38, 87]

    rig_.run(go)


def test_a_long_write_that_waited_for_slots_leaves_to_the_buffer_what_it_took() -> None:
    """W2: it looks again; what is being overwritten meanwhile must not be copied once more."""
    rig_ = rig(maximum=SMALLEST, buffer=64 * 1024)  # 32 slots
    rig_.threads = True
    before: dict[int, bytes] = {}

    def slow_disk(backing: SimBacking, operation: str, _offset: int, _length: int) -> None:
        time.sleep(
            {("area", "sync"): 0.05, ("replica", "read"): 0.01}.get((backing.name, operation), 0)
        )

    async def go(volume: Volume) -> None:
        await write(volume, 0, pattern(1, 22 * BLOCK))
        await volume.create_point()
        before.update(await read_points(volume))
        await write(volume, 100 * BLOCK, b"x")
        await flush(volume)
        rig_.host.hooks.append(slow_disk)
        async with trio.open_nursery() as nursery:
            for block, count in ((64, 13), (80, 13), (0, 14), (0, 1)):
                nursery.start_soon(write, volume, block * BLOCK, pattern(2, count * BLOCK))
                await trio.sleep(0.01)
        await flush(volume)
        assert volume.protection.is_online

    async def look(volume: Volume) -> None:
        assert await read_points(volume) == before

    with mock.patch("vsnapfs.volume.writer.LONGEST", 13 * BLOCK):
        rig_.run(go)
        rig_.run(look)
        rig_.killed()
        rig_.run(look)


def test_a_shrink_takes_flags_along() -> None:
    """A flag high up is moved with all its blocks; points read the same before and after."""
    rig_ = rig(maximum=SMALLEST + 200 * BLOCK)

    async def go(volume: Volume) -> None:
        await write(volume, 0, pattern(1, 60 * BLOCK))
        await volume.create_point()
        await write(volume, 0, pattern(2, 60 * BLOCK))
        await volume.create_point()
        for block in range(BLOCKS):
            await write(volume, block * BLOCK, pattern(3, min(BLOCK, SIZE - block * BLOCK)))
        before = await read_points(volume)
        await volume.delete_point(1)
        del before[1]
        high = max(slot & SLOT_MASK for slot in places(volume, 2) if slot & ZEROS)
        await volume.resize(volume.core.need_area().minimum_for_used)
        assert max(slot & SLOT_MASK for slot in places(volume, 2)) < high
        assert await read_points(volume) == before
        assert (await volume.verify())["ok"]
        volume.check_invariants()
        # What is written now goes into none of the old places.
        await write(volume, 0, pattern(4, 60 * BLOCK))
        assert await read_points(volume) == before

    async def look(volume: Volume) -> None:
        assert len(await read_points(volume)) == 1
        assert (await volume.verify())["ok"]

    with small_steps():
        rig_.run(go)
        rig_.killed()
        rig_.run(look)


def test_a_flag_that_a_shrink_is_about_to_move_takes_no_more_blocks() -> None:
    """R1: zeros preserved while a shrink looks for what lies high up are found after it."""
    rig_ = rig(maximum=SMALLEST + 200 * BLOCK)
    before: dict[int, bytes] = {}

    async def go(volume: Volume) -> None:
        await volume.create_point()
        before.update(await read_points(volume))
        slots = volume.core.need_area().slots
        low = slots.reserve(40)
        assert low is not None
        await write(volume, 0, pattern(1, BLOCK))
        await flush(volume)
        slots.release(low)
        assert min(slots.taken_from(0)) >= LAYOUT.slots_in(SMALLEST)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(volume.resize, SMALLEST)
            for block in range(1, 40):
                await trio.lowlevel.checkpoint()
                nursery.start_soon(write, volume, block * BLOCK, pattern(1, BLOCK))
        await flush(volume)
        volume.check_invariants()
        assert await read_points(volume) == before

    async def look(volume: Volume) -> None:
        assert await read_points(volume) == before

    rig_.run(go)
    rig_.killed()
    rig_.run(look)


def test_what_could_not_be_recorded_stays_described() -> None:
    """No memory after a barrier: blocks described by it are not forgotten by the next one."""
    rig_ = rig()
    before: dict[int, bytes] = {}

    async def go(volume: Volume) -> None:
        await volume.create_point()
        before.update(await read_points(volume))
        await write(volume, 0, pattern(1, BLOCK))
        with mock.patch.object(DiffArea, "remember_zeros", side_effect=MemoryError):
            assert await attempt(write(volume, BLOCK, pattern(1, BLOCK))) is not None
        await volume.online()
        for block in (2, 1):
            await write(volume, block * BLOCK, pattern(1, BLOCK))
        assert await read_points(volume) == before

    async def look(volume: Volume) -> None:
        assert await read_points(volume) == before

    rig_.run(go)
    rig_.killed()
    rig_.run(look)


def flip(rig_: Rig, offset: int) -> None:
    old = rig_.host.files["area"].cache.read(offset, 1)[0]
    for pages in (rig_.host.files["area"].cache, rig_.host.files["area"].disk):
        pages.write(offset, bytes([old ^ 1]))


def test_a_lost_flag_is_an_error_not_what_was_written_since() -> None:
    """R1: with one copy of its sector rotted the other serves, with both it is EIO and told."""
    rig_ = rig()

    async def make(volume: Volume) -> None:
        await volume.create_point()
        await write(volume, 0, pattern(1, 3 * BLOCK))
        await flush(volume)

    async def look(volume: Volume) -> None:
        area = volume.core.need_area()
        slot = places(volume, 1)[0] & SLOT_MASK
        first, twin = LAYOUT.sector_offsets(slot // SLOTS_PER_SECTOR)
        for offset in (first, twin):
            area._sectors.clear()
            area._known.clear()
            flip(rig_, offset + 40)
            assert (await read_points(volume))[1] == bytes(SIZE)
            flip(rig_, offset + 40)
        flip(rig_, first + 40)
        flip(rig_, twin + 40)
        area._known.clear()  # What it knows by heart is as good as what it reads.
        handle = volume.open_point(1)
        with pytest.raises(OSError) as caught:
            await handle.read(2 * BLOCK, 10)
        assert caught.value.errno == errno.EIO
        assert bytes(await handle.read(3 * BLOCK, 10)) == bytes(10)
        handle.close()
        report = await volume.verify()
        hit = [problem for problem in report["problems"] if problem["what"] == "preserved block"]
        assert [problem["block"] for problem in hit] == [0, 1, 2]
        assert all(problem["points"] == [1] for problem in hit)
        # Memory still knows all there was: nothing is lost.
        area._sectors.clear()
        told = await volume.repair()
        assert told["ok"], told
        assert (await read_points(volume))[1] == bytes(SIZE)
        assert (await volume.verify())["ok"]

    rig_.run(make)
    rig_.run(look)


@given(
    seed=st.integers(0, 1 << 16),
    stop=st.integers(1, 120),
    kind=st.sampled_from(["kill", "kept", "nothing", "dice"]),
    buffer=st.sampled_from([0, 64 * 1024]),
)
def test_a_stop_at_any_disk_operation_loses_no_zeros(
    seed: int, stop: int, kind: str, buffer: int
) -> None:
    """W2 and W3 over data and zeros mixed: the points of before are exact after any stop."""
    rig_ = rig(seed=seed * 1000, buffer=buffer, maximum=SMALLEST + 100 * BLOCK)
    before: dict[int, bytes] = {}

    async def begin(volume: Volume) -> None:
        await write(volume, 2 * BLOCK, pattern(1, 3 * BLOCK))
        await write(volume, 64 * BLOCK, pattern(2, BLOCK))
        await volume.create_point()
        await write(volume, 3 * BLOCK, bytes(BLOCK))
        await volume.create_point()
        before.update(await read_points(volume))

    async def go(volume: Volume) -> None:
        rig_.host.stop_at = rig_.host.operations + stop
        for turn in range(3):
            async with trio.open_nursery() as nursery:
                for start in (0, 3, 60, 64):
                    offset = (start + turn) * BLOCK
                    nursery.start_soon(write, volume, offset, pattern(start + turn, 2 * BLOCK))
            await flush(volume)

    async def look(volume: Volume) -> None:
        assert await read_points(volume) == before
        assert (await volume.verify())["ok"]
        volume.check_invariants()
        await write(volume, 0, pattern(9, 70 * BLOCK))
        assert await read_points(volume) == before

    with small_steps():
        rig_.run(begin)
        with suppress(PowerLoss):
            rig_.run(go)
        if kind == "kill":
            rig_.killed()
        else:
            dice = by_dice(random.Random(seed).choice)
            choices = {"kept": everything_kept, "nothing": nothing_kept, "dice": dice}
            rig_.crashed(choices[kind])
        rig_.run(look)
