"""What `repair` must not do: lose what may come back, hold up a write, or tell what is not so.

`test_repair` has what it brings back.
"""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import mutations
import pytest
import trio
from filefuzz import flip, fresh, poke, small_volume
from mutations import LAYOUT
from rig import (
    BLOCK,
    SMALLEST,
    Rig,
    attempt,
    pattern,
    raw_replica,
    read_points,
    small_steps,
    write,
)
from simdisk import FOREVER, SimBacking

from vsnapfs.diffarea.index import ZEROS
from vsnapfs.diffarea.layout import SECTOR_SIZE, SUPERBLOCK_OFFSETS
from vsnapfs.errors import Fault, FaultCode, FaultError
from vsnapfs.volume import Volume
from vsnapfs.volume.repair import Repair


@pytest.fixture
def small() -> Rig:
    return small_volume()


@contextmanager
def unreadable(rig: Rig, *offsets: int) -> Iterator[None]:
    """Reads of the diff area that touch the sectors at `offsets` are EIO, for a while."""

    def hook(backing: SimBacking, operation: str, offset: int, length: int) -> None:
        if (backing.name, operation) == ("area", "read") and any(
            offset < start + SECTOR_SIZE and start < offset + length for start in offsets
        ):
            raise OSError(errno.EIO, "a bad sector")

    rig.host.hooks.append(hook)
    try:
        yield
    finally:
        rig.host.hooks.remove(hook)


@contextmanager
def before_each(name: str, what: Callable[[], Awaitable[None]]) -> Iterator[None]:
    """Something else that goes on in the server, just before a step of a repair."""
    step: Callable[..., Awaitable[Any]] = getattr(Repair, name)

    async def both(self: Repair, *args: Any) -> Any:
        await what()
        return await step(self, *args)

    with mock.patch.object(Repair, name, both):
        yield


def test_one_unreadable_sector_in_each_table_costs_nothing(small: Rig) -> None:
    """Two tables, each with another sector that cannot be read: all others have a good copy."""
    rig = fresh(small)

    async def act(volume: Volume) -> None:
        before = await read_points(volume)
        first, twin = LAYOUT.sector_offsets(100)[0], LAYOUT.sector_offsets(110)[1]
        with unreadable(rig, first, twin):
            report = await volume.repair()
        assert {f["sector"] for f in report["found"]} <= {100, 110}
        assert await read_points(volume) == before

    rig.run(act)


def test_what_cannot_be_read_for_a_while_is_not_written_over(small: Rig) -> None:
    """Both copies of a sector are EIO: told, left as they are, and right when they are back."""
    rig = fresh(small)

    async def act(volume: Volume) -> None:
        before = await read_points(volume)
        with unreadable(rig, *LAYOUT.sector_offsets(0)):
            report = await volume.repair()
        assert not report["ok"]
        assert "cannot be read" in report["beyond_repair"][0]["message"]
        assert await read_points(volume) == before
        assert (await volume.verify())["ok"]

    rig.run(act)


def test_a_slot_that_a_write_takes_meanwhile_is_not_cleared(small: Rig) -> None:
    """Descriptors of no copy are found; a write then preserves into those slots: they stay."""
    rig = fresh(small)

    async def act(volume: Volume) -> None:
        area = volume.core.need_area()
        first = area.descriptor_of(0)
        free = [slot for slot in range(len(area.slots)) if not area.slots.is_taken(slot)]
        await trio.lowlevel.checkpoint()
        area.barrier(dict.fromkeys(free[:4], first))
        point = await volume.create_point("x")
        old = raw_replica(rig)
        clear: Callable[..., Any] = volume.core.mark_in_use

        async def meanwhile() -> None:
            await write(volume, 0, pattern(99, 2 * BLOCK))
            await clear()

        with mock.patch.object(volume.core, "mark_in_use", meanwhile):
            report = await volume.repair()
        assert [finding["what"] for finding in report["found"]] == ["descriptors"]
        assert report["ok"], report
        assert (await read_points(volume))[point.number] == old
        assert not (await volume.repair())["found"]

    rig.run(act)


@pytest.mark.parametrize("policy", ["offline", "evict"])
def test_a_write_need_not_wait_for_a_repair_to_grow_the_area(policy: str) -> None:
    """The area grows while a repair checks it: no fault 9, and under `evict` no point is lost."""
    with small_steps():
        size = 90 * BLOCK
        rig = Rig(size=size, maximum=SMALLEST + 200 * BLOCK, grow_timeout=5.0, on_full=policy)

        async def act(volume: Volume) -> None:
            await volume.create_point("x")

            async def overwrite_all() -> None:
                for block in range(90):
                    await write(volume, block * BLOCK, pattern(block, BLOCK))

            with before_each("_check", overwrite_all):
                assert (await volume.repair())["ok"]
            assert volume.status()["state"] == "online"
            assert await read_points(volume) == {1: bytes(size)}

        rig.run(act)


def test_copies_whose_sector_memory_knows_are_not_given_up(small: Rig) -> None:
    """Both copies of a sector rot, memory has it: its copies are fine, a dry run says so too."""
    rig = fresh(small)

    async def act(volume: Volume) -> None:
        await volume.create_point("x")
        await write(volume, 0, pattern(77, 3 * BLOCK))
        before = await read_points(volume)
        (known,) = volume.core.need_area()._sectors
        for offset in LAYOUT.sector_offsets(known):
            poke(rig, "area", offset, b"\xff" * SECTOR_SIZE)
        dry = await volume.repair(dry_run=True)
        report = await volume.repair()
        assert dry["ok"]
        assert report["ok"], report
        for told in (dry, report):
            assert [finding["what"] for finding in told["found"]] == ["descriptor sector"]
        assert (await volume.verify())["ok"]
        assert await read_points(volume) == before

    rig.run(act)


def test_a_copy_comes_back_from_where_a_shrink_left_it(small: Rig) -> None:
    """A moved copy rots, the one it was moved from is still there: used before it is cleared."""
    rig = fresh(small)

    async def act(volume: Volume) -> None:
        before = await read_points(volume)
        area = volume.core.need_area()
        high = len(area.slots) - 1
        await trio.lowlevel.checkpoint()
        found = [area.index.lookup(2, block) for block in range(5)]
        low = next(copy[1] for copy in found if copy and not copy[1] & ZEROS)
        content = bytes(area.backing.read(LAYOUT.slot_offset(low), BLOCK))
        area.write_copies([high], memoryview(content))
        area.barrier({high: area.descriptor_of(low)})
        flip(rig, "area", LAYOUT.slot_offset(low) + 9, 3)
        dry = await volume.repair(dry_run=True)
        report = await volume.repair()
        for told in (dry, report):
            assert told["ok"], told
            assert [f["what"] for f in told["found"]] == ["preserved block", "descriptors"]
        assert "shrink" in report["found"][0]["action"]
        assert await read_points(volume) == before
        assert not (await volume.repair())["found"]

    rig.run(act)


def test_a_file_that_cannot_be_cut_is_not_said_to_be(small: Rig) -> None:
    """The host refuses to cut off what is too long: beyond repair, not done."""
    rig = fresh(small)

    async def act(volume: Volume) -> None:
        for pages in (rig.host.files["area"].cache, rig.host.files["area"].disk):
            pages.resize(pages.size + BLOCK)
        failure = rig.host.fail("area", "truncate", errno.EIO, times=FOREVER)
        report = await volume.repair()
        assert failure.fired
        assert not report["found"]
        assert "could not be cut" in report["beyond_repair"][0]["message"]
        rig.host.failures.clear()
        assert (await volume.repair())["found"][0]["action"] == "cut off"

    rig.run(act)


def test_a_superblock_of_somebody_else_is_left_to_be_fault_15(small: Rig) -> None:
    """A newer superblock than ours in one copy: nothing is written over it."""
    rig = fresh(small)

    async def act(volume: Volume) -> None:
        await volume.create_point("x")
        ours = volume.core.need_area().superblock
        theirs = replace(ours, generation=ours.generation + 1, points=()).encode()
        poke(rig, "area", SUPERBLOCK_OFFSETS[0], theirs)
        report = await volume.repair()
        assert not report["ok"]
        area = rig.host.files["area"].cache
        assert area.read(SUPERBLOCK_OFFSETS[0], len(theirs)) == theirs
        assert await attempt(volume.create_point("y")) is not None
        assert volume.status()["fault"]["code"] == FaultCode.EXTERNAL_WRITER_TO_DIFF_AREA

    rig.run(act)


def test_a_fault_written_down_meanwhile_is_not_taken_back(small: Rig) -> None:
    """A copy of the state file is written anew while a fault strikes: it stays offline (P1)."""
    rig = fresh(small)

    async def act(volume: Volume) -> None:
        protection = volume.protection
        await trio.lowlevel.checkpoint()
        lock = protection._saving
        fault = Fault(FaultCode.DIFF_AREA_FULL, errno.ENOSPC, "struck", 1)

        class Slow:
            """The lock; whoever asks for it comes second."""

            def __enter__(self) -> None:
                protection._saving = lock
                protection.mark(FaultError(fault.code, fault.message))
                protection.save(offline=True, fault=fault)
                lock.acquire()

            def __exit__(self, *_: object) -> None:
                lock.release()

        protection._saving = Slow()  # type: ignore[assignment]
        protection.save_as_it_is()
        assert protection.saved.offline
        assert volume.core.state_file.load().offline
        protection.settled()

    rig.run(act)


def restoring() -> tuple[Rig, dict[int, bytes]]:
    base = mutations._build("restoring", end="restoring")
    return base.rig.on(base.host()), base.contents


def test_a_restore_that_was_given_up_is_not_told_as_finished() -> None:
    """Its point is deleted while it cannot go on: the replica is a mixture, and repair says so."""
    rig, _ = restoring()
    rig.host.fail("replica", "write", errno.EIO, times=FOREVER)

    async def act(volume: Volume) -> None:
        assert volume.status()["state"] == "offline"
        number = volume.core.need_area().superblock.restoring
        told = (await volume.repair())["found"][-1]
        assert (told["what"], told["done"]) == ("restore", False)
        assert "online" in told["action"]
        await volume.delete_point(number, force=True)
        told = (await volume.repair())["found"][-1]
        assert (told["what"], told["done"]) == ("restore", False)
        assert "mixture" in told["action"]

    rig.run(act)


def test_a_restore_interrupted_while_serving_is_told() -> None:
    """Not only one that opening found: the replica fails in the middle; what is next is said."""
    rig, contents = restoring()

    async def act(volume: Volume) -> None:
        number = volume.points[-1].number
        rig.host.fail("replica", "write", errno.EIO, times=FOREVER)
        assert await attempt(volume.restore(number)) is not None
        (told,) = [f for f in (await volume.repair())["found"] if f["what"] == "restore"]
        assert str(number) in told["message"]
        assert not told["done"]
        rig.host.failures.clear()
        await volume.online()
        assert raw_replica(rig) == contents[number]

    rig.run(act)
