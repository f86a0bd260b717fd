"""Two things at once, in exactly the order that hurts: the disk waits where the test wants it."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import trio
from rig import BLOCK, attempt, pattern, read_point, write
from scene import SIZE, Scene
from simdisk import SimBacking

from vsnapfs.diffarea import index
from vsnapfs.volume import Volume


class Gate:
    """Holds one operation of the disk until it is opened. For tests with real threads."""

    def __init__(self, scene: Scene, name: str, operation: str, offset: int) -> None:
        self._wanted = name, operation, offset
        self.reached, self.open, self._after = threading.Event(), threading.Event(), False
        scene.rig.threads = True
        scene.rig.host.hooks.append(self)

    def __call__(self, backing: SimBacking, operation: str, offset: int, length: int) -> None:
        name, what, where = self._wanted
        if (backing.name, operation) == (name, what) and offset <= where < offset + max(1, length):
            self.reached.set()
            assert self.open.wait(20), "nobody opened the gate"

    async def is_reached(self) -> None:
        assert await trio.to_thread.run_sync(self.reached.wait, 20)


@pytest.mark.parametrize("read_first", [True, False])
def test_a_reader_of_a_point_never_sees_a_later_write(read_first: bool) -> None:
    """R2: it falls through to the replica, is held there, meanwhile the block is overwritten."""
    scene = Scene()
    block = 7
    gate = Gate(scene, "replica", "read", block * BLOCK)

    async def race(volume: Volume) -> None:
        result: list[bytes] = []

        async def reader() -> None:
            handle = volume.open_point(2)
            result.append(bytes(await handle.read(block * BLOCK, BLOCK)))
            handle.close()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(reader)
            await gate.is_reached()
            # The writer reads the old content, too: it must not be held.
            scene.rig.host.hooks.clear()
            await write(volume, block * BLOCK, pattern(99, BLOCK))
            gate.open.set()
        assert result == [scene.points[2][block * BLOCK : (block + 1) * BLOCK]]

    if read_first:
        scene.run(race)
    else:

        async def one_block_of_many(volume: Volume) -> None:
            """The same with a read over the whole point."""
            result: list[bytes] = []

            async def reader() -> None:
                result.append(await read_point(volume, 1))

            async with trio.open_nursery() as nursery:
                nursery.start_soon(reader)
                await gate.is_reached()
                scene.rig.host.hooks.clear()
                await write(volume, 0, pattern(99, SIZE))
                gate.open.set()
            assert result == [scene.points[1]]

        scene.run(one_block_of_many)


def test_the_second_writer_waits_for_the_first_ones_copy() -> None:
    """W2: while the barrier is held, neither of two writers in one block has moved a byte."""
    scene = Scene()
    before = scene.replica()
    gate = Gate(scene, "area", "sync", 0)

    async def race(volume: Volume) -> None:
        done: list[int] = []

        async def writer(number: int) -> None:
            await write(volume, 7 * BLOCK + 100 * number, pattern(number, 100))
            done.append(number)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(writer, 1)
            await gate.is_reached()
            nursery.start_soon(writer, 2)
            # And one that needs no copy is not held up.
            await write(volume, 0, pattern(5, 10))
            await trio.sleep(0.05)
            assert done == []
            assert scene.replica()[4 * BLOCK :] == before[4 * BLOCK :]
            gate.open.set()
        assert sorted(done) == [1, 2]

    scene.run(race)
    scene.exact()


def test_overlapping_writes_end_as_one_of_their_orders() -> None:
    """Each of them is there whole, over those before it."""
    for seed in range(20):
        scene = Scene()
        scene.rig.seed = seed * 100
        jobs = [(6 * BLOCK, 3 * BLOCK), (7 * BLOCK - 50, BLOCK), (8 * BLOCK + 3, 100)]

        async def all_at_once(volume: Volume, jobs: Any = jobs) -> None:
            async with trio.open_nursery() as nursery:
                for number, (offset, length) in enumerate(jobs):
                    nursery.start_soon(write, volume, offset, pattern(40 + number, length))

        before = scene.replica()
        scene.run(all_at_once)
        possible = set()
        for order in ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)):
            content = bytearray(before)
            for number in order:
                offset, length = jobs[number]
                content[offset : offset + length] = pattern(40 + number, length)
            possible.add(bytes(content))
        assert scene.replica() in possible
        scene.exact()


def test_a_point_taken_between_writes_holds_each_of_them_whole_or_not_at_all() -> None:
    """All that were acknowledged before are in it, none issued after, those in flight either."""
    for seed in range(30):
        scene = Scene()
        scene.rig.seed = seed * 100
        scene.run(_stamp, scene)


async def _stamp(volume: Volume, scene: Scene) -> None:
    before: set[int] = set()
    issued: set[int] = set()
    acknowledged: set[int] = set()

    async def writer(block: int) -> None:
        for _ in range(seed_of(block)):
            await trio.lowlevel.checkpoint()
        issued.add(block)
        await write(volume, block * BLOCK, pattern(200 + block, BLOCK))
        acknowledged.add(block)

    async with trio.open_nursery() as nursery:
        for block in range(12):
            nursery.start_soon(writer, block)
        for _ in range(10):
            await trio.lowlevel.checkpoint()
        before |= acknowledged
        point = await volume.create_point()
        after = set(range(12)) - issued
    content = await read_point(volume, point.number)
    for block in range(12):
        part = slice(block * BLOCK, (block + 1) * BLOCK)
        new = content[part] == pattern(200 + block, BLOCK)
        assert new or content[part] == _old(scene, block)[:BLOCK]
        assert new or block not in before
        assert not new or block not in after


def seed_of(block: int) -> int:
    """How long a writer dawdles: spread, and not in the order of the blocks."""
    return (block * 7) % 12 * 6


def _old(scene: Scene, block: int) -> bytes:
    if block < 4:
        return pattern(3, 4 * BLOCK)[block * BLOCK :]
    return scene.points[2][block * BLOCK :]


def test_a_point_deleted_under_a_reader_is_estale_not_something_else() -> None:
    """Its slots may hold another block by the time the read is done."""
    scene = Scene()
    gate = Gate(scene, "replica", "read", 9 * BLOCK)

    async def race(volume: Volume) -> None:
        result: list[Any] = []

        async def reader() -> None:
            handle = volume.open_point(1)
            result.append(await attempt(handle.read(0, SIZE)))
            handle.close()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(reader)
            await gate.is_reached()
            scene.rig.host.hooks.clear()
            await volume.delete_point(1, force=True)
            gate.open.set()
        (error,) = result
        assert error is not None
        assert error.strerror == "Stale file handle"

    scene.run(race)
    scene.exact(only={2})


@pytest.mark.parametrize("work", ["verify", "shrink", "delete"])
def test_the_index_is_not_walked_while_copies_are_added(
    work: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy is recorded before or after verify, shrink or delete look at all copies, not
    meanwhile (a dictionary that grows during a walk over it would end the walk with an error).
    """
    scene = Scene(maximum=(1 << 20) + 400 * BLOCK)
    scene.rig.threads = True
    run_of, walking = index._run_of, threading.Event()

    def slow(recent: dict[int, list[int]]) -> index.Run:
        walk = iter(recent.items())
        next(walk, None)
        walking.set()
        time.sleep(0.2)
        assert sum(1 for _ in walk) < 13
        return run_of(recent)

    async def race(volume: Volume) -> None:
        assert len(volume.core.need_area().index._state[1]) > 1
        monkeypatch.setattr(index, "_run_of", slow)
        jobs = {
            "verify": volume.verify,
            "shrink": lambda: volume.resize(volume.core.need_area().minimum_for_used),
            "delete": lambda: volume.delete_point(1),
        }
        async with trio.open_nursery() as nursery:
            nursery.start_soon(jobs[work])
            assert await trio.to_thread.run_sync(walking.wait, 20)
            for block in range(6, 12):
                await write(volume, block * BLOCK, b"x")
        monkeypatch.setattr(index, "_run_of", run_of)

    scene.run(race)
    scene.exact(only={2} if work == "delete" else None)
