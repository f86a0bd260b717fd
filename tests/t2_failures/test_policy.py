"""A failed operation on the diff area means the same wherever it is met: the on-full policies.

Each situation is one in which the engine needs the diff area; in each of them it fails in each way.
With policy `offline` that is a fault and no point is lost. With `evict` all points are given up,
the write goes through and the volume stays online.
"""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest
import trio
from rig import BLOCK, SMALLEST, attempt, flush, pattern, read_replica, small_steps, write
from scene import SIZE, Scene
from schedules import Doing, Pause, all_stand_still
from simdisk import FOREVER, Host, PowerLoss, SimFile

from vsnapfs.diffarea.layout import SUPERBLOCK_OFFSETS, SUPERBLOCK_SIZE
from vsnapfs.diffarea.superblock import decode
from vsnapfs.errors import VsnapError
from vsnapfs.volume import Volume

NEW = pattern(70, SIZE)


def overtake(host: Host) -> None:
    """Another process commits to the area."""
    file = host.files["area"]
    for offset in SUPERBLOCK_OFFSETS:
        found = decode(file.cache.read(offset, SUPERBLOCK_SIZE))
        theirs = replace(found, generation=found.generation + 7)
        for pages in (file.cache, file.disk):
            pages.write(offset, theirs.encode())


class Broken:
    """A scene, a situation, and the way in which the area fails; it can be taken back."""

    def __init__(self, policy: str, situation: str, failure: str) -> None:
        self.buffer, self._prepare, self._act = SITUATIONS[situation]
        maximum = SMALLEST if "evicted" in situation else SMALLEST + 100 * BLOCK
        self.scene = Scene(on_full=policy, maximum=maximum, buffer=self.buffer)
        self.host = self.scene.rig.host
        self._kept: SimFile | None = None
        self._prepare(self.scene)
        self.points = sorted(self.scene.points)
        self.scene.rig.log.events.clear()
        FAILURES[failure](self)

    def gone(self) -> None:
        self._kept = self.host.remove("area")

    def not_written(self) -> None:
        self.host.fail("area", "write", errno.EIO, times=FOREVER)

    def not_synced(self) -> None:
        self.host.fail("area", "sync", errno.EIO, times=FOREVER)

    def overtaken(self) -> None:
        overtake(self.host)

    def mended(self) -> None:
        self.host.failures.clear()
        if self._kept is not None:
            self.host.files["area"] = self._kept

    def act(self) -> BaseException | None:
        """What meets the failure. The error it is answered with."""

        async def do(volume: Volume) -> BaseException | None:
            return await attempt(self._act(self.scene, volume))

        error: BaseException | None = self.scene.run(do)
        return error


FAILURES: dict[str, Callable[[Broken], None]] = {
    "gone": Broken.gone,
    "not written": Broken.not_written,
    "not synced": Broken.not_synced,
    "overtaken": Broken.overtaken,
}


# --- situations ----------------------------------------------------------------------------------


def _nothing(_scene: Scene) -> None:
    return


def _no_ring(scene: Scene) -> None:
    """Closed and opened: the ring is made by the first write that has a block to preserve."""
    scene.rig.close()

    async def in_use(volume: Volume) -> None:
        await volume.core.mark_in_use()
        assert volume.buffer.ring is None

    scene.run(in_use)


def _closed(scene: Scene) -> None:
    scene.rig.close()

    async def still_clean(volume: Volume) -> None:
        assert volume.core.need_area().superblock.clean

    scene.run(still_clean)


def _used_up(scene: Scene) -> None:
    """No slot is free, and growing ahead has been refused."""
    refused = scene.rig.host.fail("area", "allocate", errno.ENOSPC, times=FOREVER)
    scene.run(scene.fill, 0)
    scene.rig.host.failures.remove(refused)


def _full(scene: Scene) -> None:
    scene.run(scene.fill, 0)


async def _write(_scene: Scene, volume: Volume) -> None:
    for at in range(0, SIZE, 2 * BLOCK):  # Longer ones do not go through the buffer.
        await write(volume, at, NEW[at : at + 2 * BLOCK])
    await flush(volume)


async def _create(_scene: Scene, volume: Volume) -> None:
    await volume.create_point()


async def _delete(_scene: Scene, volume: Volume) -> None:
    await volume.delete_point(1)


async def _restore(_scene: Scene, volume: Volume) -> None:
    await volume.restore(1)


Situation = tuple[int, Callable[[Scene], None], Callable[[Scene, Volume], Awaitable[None]]]
SITUATIONS: dict[str, Situation] = {
    "the ring is made": (64 * 1024, _no_ring, _write),
    "the first write after a clean opening": (0, _closed, _write),
    "the same, buffered": (64 * 1024, _closed, _write),
    "a group commit": (0, _nothing, _write),
    "the write buffer is carried out": (64 * 1024, _nothing, _write),
    "it grows": (0, _used_up, _write),
    "it grows, buffered": (64 * 1024, _used_up, _write),
    "the oldest point is evicted": (0, _full, _write),
    "a point is created": (0, _nothing, _create),
    "a point is created, buffered": (64 * 1024, _nothing, _create),
    "a point is deleted": (0, _nothing, _delete),
    "a restore begins": (0, _nothing, _restore),
}
#: What another process has committed is noticed by a commit only.
BARRIERS = ("a group commit", "the write buffer is carried out", "it grows, buffered")
EVERY = [
    pytest.param(situation, failure, id=f"{situation}-{failure}")
    for situation in SITUATIONS
    for failure in FAILURES
    if failure != "overtaken" or situation not in BARRIERS
]


@pytest.mark.parametrize(("situation", "failure"), EVERY)
def test_with_evict_it_costs_all_points_and_no_write(situation: str, failure: str) -> None:
    """Event 14 once; writes go on, no point comes back, and a new one is refused with the way out,
    until the area works again.
    """
    with small_steps():
        broken = Broken("evict", situation, failure)
        scene, rig = broken.scene, broken.scene.rig
        command = not situation.startswith(("the", "it", "a group"))
        before = scene.replica()
        error = broken.act()
        assert (error is not None) == command, error
        if error is not None:
            assert isinstance(error, VsnapError)
            assert error.exit_code == 1
        assert scene.replica() == (before if command else NEW)
        scene.run(_goes_on, rig.host)
        assert scene.ids().count(14) == 1
        told = [params for _, number, params in rig.log.events if number in (14, 33, 35)]
        lost = {number for params in told for number in params.get("points", [params.get("point")])}
        assert sorted(lost) == broken.points
        rig.killed()
        broken.host = rig.host
        broken.mended()
        rig.host.files["area"].locked = False
        scene.exact(only=set())

        async def again(volume: Volume) -> None:
            if volume.protection.fault is not None:
                assert int(volume.protection.fault.code) in (1, 15)
                return
            await scene.create(volume)
            assert max(scene.points) > max(broken.points) + (situation == "a point is created")
            await write(volume, 0, pattern(72, SIZE))

        scene.run(again)
        if scene.fault is None:
            scene.exact(only={max(scene.points)})


async def _goes_on(volume: Volume, host: Host) -> None:
    """Online, without points; everything but a new point works, and no write asks the area."""
    assert volume.protection.is_online, volume.protection.fault
    assert volume.points == []
    volume.check_invariants()
    trouble = volume.status()["trouble"]
    assert trouble is not None
    for seed in (80, 81):
        error = await attempt(volume.create_point())
        assert isinstance(error, VsnapError)
        assert (error.exit_code, error.code) == (1, "diff-area-failed")
        for word in ("vsnapfs offline", "vsnapfs online --give-up-recovery-points"):
            assert word in error.hint
        assert volume.protection.is_online
        before = {key: count for key, count in host.counts.items() if key[0] == "area"}
        await write(volume, 5, pattern(seed, SIZE - 5))
        await flush(volume)
        assert before == {key: count for key, count in host.counts.items() if key[0] == "area"}
        assert bytes(await read_replica(volume))[5:] == pattern(seed, SIZE - 5)
    assert volume.status()["state"] == "online"


@pytest.mark.parametrize(("situation", "failure"), EVERY)
def test_with_offline_it_is_a_fault_and_costs_no_point(situation: str, failure: str) -> None:
    """Refused and offline, by hand or by a write; every point reads back as it was."""
    if situation == "the oldest point is evicted":
        return  # That is fault 8, whatever else is wrong.
    with small_steps():
        broken = Broken("offline", situation, failure)
        scene = broken.scene
        error = broken.act()
        assert error is not None
        assert scene.fault is not None
        if isinstance(error, VsnapError):
            assert error.exit_code == 3
        else:
            assert error.errno == errno.ENODEV
        scene.exact()
        broken.mended()
        if failure != "overtaken":
            assert scene.online() is None
            scene.exact()


@pytest.mark.parametrize("failure", ["gone", "not written", "not synced"])
def test_an_area_that_is_back_takes_points_again(failure: str) -> None:
    """With evict, in the same process: the next point is exact, and nothing older comes back."""
    with small_steps():
        broken = Broken("evict", "a group commit", failure)
        scene = broken.scene
        assert broken.act() is None
        broken.mended()

        async def again(volume: Volume) -> None:
            await scene.create(volume)
            assert volume.status()["trouble"] is None
            await write(volume, 0, pattern(73, SIZE))

        scene.run(again)
        scene.exact(only={3})
        scene.rig.killed()
        scene.exact(only={3})


@pytest.mark.parametrize("buffer", [0, 64 * 1024])
@pytest.mark.parametrize("how", ["killed", "closed"])
def test_without_its_area_it_is_offline_at_the_next_opening(buffer: int, how: str) -> None:
    """With evict: what an opening finds is fault 1; nothing is given up, and it clears itself."""
    scene = Scene(on_full="evict", buffer=buffer)
    scene.rig.close() if how == "closed" else scene.rig.killed()
    gone = scene.rig.host.remove("area")
    assert scene.fault == 1
    scene.rig.close() if how == "closed" else scene.rig.killed()
    gone.locked = False
    scene.rig.host.files["area"] = gone
    assert scene.fault is None
    scene.exact()


@pytest.mark.parametrize("operation", ["write", "sync"])
def test_an_opening_that_cannot_carry_out_the_ring_gives_up_nothing(operation: str) -> None:
    """With evict: offline by fault 7; what was acknowledged and all points are there when the area
    works again.
    """
    scene = Scene(on_full="evict", buffer=64 * 1024)
    content = NEW[: 2 * BLOCK]

    async def acknowledge(volume: Volume) -> None:
        await write(volume, 6 * BLOCK, content)
        assert volume.buffer.pending
        scene.rig.host.stop_at = scene.rig.host.operations

    with pytest.raises(PowerLoss):
        scene.run(acknowledge)
    scene.rig.killed()
    host = scene.rig.host
    armed: list[bool] = []

    def after_the_commit(backing: Any, what: str, _offset: int, _length: int) -> None:
        """Fails once the superblock has been committed: that is not what this is about."""
        if backing.name == "replica" and what == "read":
            armed.append(True)
        if armed and (backing.name, what) == ("area", operation):
            raise OSError(errno.EIO, "injected")

    host.hooks.append(after_the_commit)
    assert scene.fault == 7
    assert 14 not in scene.ids()
    scene.exact()
    host.hooks.clear()
    assert scene.online() is None
    scene.exact()
    assert scene.replica()[6 * BLOCK : 8 * BLOCK] == content


def test_the_write_buffer_does_not_get_stuck_because_of_what_a_command_has_met() -> None:
    """With evict: a deletion finds that somebody else wrote to the area (15) while acknowledged
    writes wait behind it. They are carried out, the volume stays online.
    """
    with small_steps():
        scene = Scene(on_full="evict", buffer=64 * 1024)
        scene.rig.threads = True

        async def main(volume: Volume) -> None:
            async with trio.open_nursery() as nursery:
                with Pause(scene.rig, "replica", "read") as copying:
                    await write(volume, 6 * BLOCK, NEW[:BLOCK])
                    await copying.reached()
                    await write(volume, 8 * BLOCK, NEW[:BLOCK])
                    overtake(scene.rig.host)
                    deleting = Doing(nursery, volume.delete_point(1))
                    await all_stand_still()
                    copying.go()
                    with pytest.raises(VsnapError):
                        await deleting.ended()
            await flush(volume)
            assert volume.protection.is_online, volume.protection.fault
            assert volume.points == []

        scene.run(main)
        assert scene.ids() == [14]
        replica = scene.replica()
        assert replica[6 * BLOCK : 7 * BLOCK] == replica[8 * BLOCK : 9 * BLOCK] == NEW[:BLOCK]


def test_many_writes_that_meet_one_lack_of_room_cost_one_point() -> None:
    """With evict: a growth that fails costs the oldest point (35) once, not once for each write."""
    with small_steps():
        scene = Scene(on_full="evict", maximum=SMALLEST + 100 * BLOCK)
        refused = scene.rig.host.fail("area", "allocate", errno.ENOSPC, times=FOREVER)
        scene.run(scene.fill, 0)
        assert refused.fired
        scene.rig.log.events.clear()

        async def all_at_once(volume: Volume) -> None:
            async with trio.open_nursery() as nursery:
                for block in (0, 1):  # Two copies are what the oldest point alone needs.
                    nursery.start_soon(write, volume, block * BLOCK, NEW[:BLOCK])
            assert volume.protection.is_online

        scene.run(all_at_once)
        assert scene.ids() == [35]
        scene.exact(only=set(scene.points) - {1})
