"""Policy evict: writes go on, points go oldest first or all at once, and the log says which."""

from __future__ import annotations

import errno
from functools import partial
from typing import Any
from unittest import mock

import pytest
import trio
from rig import (
    BLOCK,
    SMALLEST,
    MemoryLog,
    Rig,
    attempt,
    pattern,
    read_point,
    read_replica,
    small_steps,
    write,
)
from scene import SIZE, Scene
from schedules import Doing, Pause, all_stand_still
from simdisk import FOREVER, PowerLoss

from vsnapfs.errors import VsnapError
from vsnapfs.volume import Volume, points


def _given_up(scene: Scene, event: int) -> None:
    """All points are lost by `event`, the volume goes on, and none comes back."""
    params = scene.rig.log.params(event)
    assert params["points"] == [1, 2]
    assert params["used"] <= params["allocated"] <= params["maximum"]
    assert scene.fault is None
    scene.exact(only=set())
    assert scene.write(0, SIZE, seed=50) is None
    assert scene.replica() == pattern(50, SIZE)
    scene.rig.host.failures.clear()
    scene.rig.killed()
    scene.exact(only=set())
    assert scene.replica() == pattern(50, SIZE)
    if scene.fault is not None:
        assert scene.online() is None

    async def again(volume: Volume) -> None:
        assert volume.points == []
        await scene.create(volume)
        assert max(scene.points) == 3, "a number is never used twice"
        await write(volume, 0, pattern(51, SIZE))

    scene.run(again)
    scene.exact(only={3})
    scene.rig.close()
    scene.exact(only={3})


@pytest.mark.parametrize(
    ("name", "operation"), [("replica", "read"), ("area", "write"), ("area", "sync")]
)
@pytest.mark.parametrize("times", [1, FOREVER])
def test_a_copy_that_fails_costs_all_points_and_says_so(
    name: str, operation: str, times: int
) -> None:
    """14 (Error): points given up after an I/O failure; a stale superblock cannot revive them."""
    scene = Scene(on_full="evict")
    scene.rig.host.fail(name, operation, errno.EIO, times=times)
    assert scene.write(6 * BLOCK, 10) is None
    assert scene.ids() == [14]
    _given_up(scene, 14)


def test_an_area_that_is_gone_costs_all_points() -> None:
    """14, and the volume goes on without its diff area."""
    scene = Scene(on_full="evict")
    gone = scene.rig.host.remove("area")
    assert scene.write(6 * BLOCK, 10) is None
    assert scene.ids() == [14]
    scene.rig.host.files["area"] = gone
    _given_up(scene, 14)


def test_a_loss_that_cannot_be_recorded_is_a_fault() -> None:
    """If not even the state file can say that the points are lost, nothing is overwritten."""
    scene = Scene(on_full="evict")
    before = scene.replica()
    scene.rig.host.fail("area", "write", errno.EIO, times=FOREVER)
    scene.rig.host.fail("state", "write", errno.EIO, times=FOREVER)
    error = scene.write(6 * BLOCK, 10)
    assert error is not None
    assert error.errno == errno.ENODEV
    assert scene.replica() == before
    scene.exact()


def test_the_oldest_point_goes_when_the_maximum_is_reached() -> None:
    """33 (Information) for each point deleted to stay below the limit; the others are exact."""
    with small_steps():
        scene = Scene(on_full="evict", maximum=SMALLEST)
        scene.run(scene.fill, 4)
        newest = max(scene.points)
        assert scene.write(0, SIZE) is None
        gone = [params["point"] for _, number, params in scene.rig.log.events if number == 33]
        assert gone == list(range(1, len(gone) + 1))
        assert gone
        scene.exact(only={number for number in scene.points if number > len(gone)})
        assert newest not in gone
        scene.rig.killed()
        scene.exact(only={number for number in scene.points if number > len(gone)})


def test_points_go_when_the_host_has_no_space_to_grow() -> None:
    """35 (Error): growing failed, the oldest points were given up."""
    with small_steps():
        scene = Scene(on_full="evict", maximum=SMALLEST + 100 * BLOCK)
        scene.rig.host.fail("area", "allocate", errno.ENOSPC, times=FOREVER)
        scene.run(scene.fill, 4)
        assert scene.write(0, SIZE) is None
        gone = [params["point"] for _, number, params in scene.rig.log.events if number == 35]
        assert gone == list(range(1, len(gone) + 1))
        assert gone
        scene.exact(only={number for number in scene.points if number > len(gone)})


@pytest.mark.parametrize("event", [14, 33, 35, 58])
def test_no_point_is_lost_without_a_word(event: int) -> None:
    """Killed the instant before it is said that points are lost: they are still there, or the next
    opening says it.
    """
    with small_steps(), mock.patch.object(points, "MAX_POINTS", 2 if event == 58 else 100):
        scene = Scene(on_full="evict", maximum=SMALLEST + (100 * BLOCK if event == 35 else 0))
        host, log = scene.rig.host, scene.rig.log
        if event == 35:
            host.fail("area", "allocate", errno.ENOSPC, times=FOREVER)
        if event in (33, 35):
            scene.run(scene.fill, 4)
        if event == 14:
            host.fail("area", "write", errno.EIO)

        def killed_before(source: str, number: int, /, **params: object) -> None:
            if number == event:
                host.dead = True
                raise PowerLoss
            MemoryLog.log(log, source, number, **params)

        with mock.patch.object(log, "log", killed_before), pytest.raises(PowerLoss):
            scene.run(scene.create) if event == 58 else scene.write(0, SIZE)
        scene.rig.killed()

        async def look(volume: Volume) -> None:
            there = {point.number for point in volume.points}
            told = {number for _, _, params in log.events for number in params.get("points", ())}
            assert set(scene.points) == there | told
            assert not there & told

        scene.run(look)


@pytest.mark.parametrize("what", ["busy", "state", "replica"])
def test_the_oldest_point_gives_way_only_to_one_that_is_taken(what: str) -> None:
    """No more points fit into the catalog, and the new one is refused: a write takes long, or state
    file or replica cannot be synced. Nothing is lost; the next one takes the oldest one's place.
    """
    with small_steps(), mock.patch.object(points, "MAX_POINTS", 2):
        scene = Scene(on_full="evict", hold_timeout=0.05)

        async def refused(volume: Volume) -> None:
            volume.core.gate.inside += what == "busy"
            if what != "busy":
                scene.rig.host.fail(what, "sync", errno.EIO)
            assert isinstance(await attempt(volume.create_point()), VsnapError)
            volume.core.gate.inside -= what == "busy"
            assert [point.number for point in volume.points] == [1, 2]

        async def taken(volume: Volume) -> None:
            if not volume.protection.is_online:
                await volume.online()
            oldest = volume.open_point(1)
            await scene.create(volume)
            error = await attempt(oldest.read(0, BLOCK))
            assert isinstance(error, OSError)
            assert error.errno == errno.ESTALE
            oldest.close()
            volume.check_invariants()
            kept = volume.core.need_area().index.live_slots([p.number for p in volume.points])
            assert volume.core.need_area().slots.in_use == len(kept), "its slots are free"

        scene.run(refused)
        assert 58 not in scene.rig.log.ids()
        scene.run(taken)
        assert scene.rig.log.params(58)["point"] == 1
        scene.points.pop(1)
        assert len(scene.points) == 2
        scene.exact()
        scene.rig.killed()
        scene.exact()


@pytest.mark.parametrize("buffer", [0, 1 << 16])
def test_writes_to_the_same_blocks_cost_one_point_if_that_makes_room(buffer: int) -> None:
    """Each of them lacks the same slots; the first takes what the oldest point has left, and that
    does for the others. (Four writes of 4 KiB to one block of 16 KiB, under way at once.)
    """
    with small_steps():
        scene = Scene(on_full="evict", maximum=SMALLEST, buffer=buffer)
        scene.run(scene.fill, 0)
        scene.rig.log.events.clear()

        async def main(volume: Volume) -> None:
            async with trio.open_nursery() as nursery:
                for part in range(4):
                    nursery.start_soon(write, volume, part * BLOCK // 2, pattern(part, BLOCK // 2))

        scene.run(main)
        assert scene.rig.log.params(33)["point"] == 1  # It had two blocks.
        scene.points.pop(1)
        scene.exact()


@pytest.mark.parametrize("buffer", [0, 1 << 16])
def test_slots_that_zeros_will_not_use_are_waited_for_before_another_point_goes(
    buffer: int,
) -> None:
    """Each write reserves a slot before anybody knows that its block was zeros, and gives it back.
    The other writes, which wait for the first one's eviction, wait for that, too.
    """
    with small_steps():
        scene = Scene(on_full="evict", maximum=SMALLEST, buffer=buffer)

        async def main(volume: Volume) -> None:
            await scene.fill(volume, 4)
            await write(volume, 0, bytes(4 * BLOCK))
            await scene.create(volume)
            assert volume.core.need_area().slots.free == 0
            scene.rig.log.events.clear()
            async with trio.open_nursery() as nursery:
                for block in range(4):
                    nursery.start_soon(write, volume, block * BLOCK, pattern(block, BLOCK // 2))

        scene.run(main)
        assert scene.rig.log.params(33)["point"] == 1  # It had two blocks.
        scene.points.pop(1)
        scene.exact()


@pytest.mark.parametrize(
    ("times", "zeros", "at_once", "late"),
    [(5, False, 3, 0), (FOREVER, True, 4, 0), (FOREVER, True, 2, 2)],
    ids=["the next growth passes", "zeros", "zeros, two come late"],
)
@pytest.mark.parametrize("buffer", [0, 1 << 16])
def test_a_growth_that_fails_for_many_writes_costs_one_point_if_that_helps(
    buffer: int, times: int, *, zeros: bool, at_once: int, late: int
) -> None:
    """What the oldest point has left is taken by some of them. The others look again: the host may
    have space by now, or slots come back that blocks of zeros have not used. So do those that come
    when the point has gone and its slots are not free yet.
    """
    with small_steps():
        scene = Scene(on_full="evict", maximum=SMALLEST + 64 * BLOCK, buffer=buffer)

        async def main(volume: Volume) -> None:
            await scene.fill(volume, 4)  # Of the first point there are two blocks.
            await write(volume, 0, bytes(4 * BLOCK) if zeros else pattern(60, 4 * BLOCK))
            await scene.create(volume)
            area = volume.core.need_area()
            area.unknown_slots += tuple(area.slots.reserve(area.slots.free) or ())
            scene.rig.host.fail("area", "allocate", errno.ENOSPC, times=times)
            async with trio.open_nursery() as nursery:
                for block in range(at_once + late):
                    while block >= at_once and volume.points[0].number == 1:
                        await trio.lowlevel.checkpoint()
                    nursery.start_soon(write, volume, block * BLOCK, pattern(block, BLOCK // 2))

        scene.run(main)
        assert scene.rig.log.params(35)["point"] == 1
        scene.points.pop(1)
        scene.exact()


@pytest.mark.parametrize("what", ["shrink", "cancel"])
def test_what_the_oldest_point_needed_is_free_before_anybody_else_s_turn(what: str) -> None:
    """Who waits for a point that takes the oldest one's place finds its slots free. And if whoever
    took it goes while they are being freed, the log says that there is a new point all the same.
    """
    with small_steps(), mock.patch.object(points, "MAX_POINTS", 3):
        scene = Scene(on_full="evict")

        async def main(volume: Volume) -> None:
            service = volume.points_service
            await volume.delete_point(1)
            for seed in (5, 6, 7):
                await write(volume, 0, pattern(seed, SIZE))  # 13 slots for each point
                if seed < 7:
                    await scene.create(volume)
            scene.rig.log.events.clear()
            tidy, tidying = service._tidy, trio.Event()

            async def late(*args: Any) -> None:
                tidying.set()
                for _ in range(200):
                    await trio.lowlevel.checkpoint()
                    if what == "cancel":
                        creating.cancel_scope.cancel()
                await tidy(*args)

            async with trio.open_nursery() as nursery, trio.open_nursery() as creating:
                with mock.patch.object(service, "_tidy", late):
                    Doing(creating, volume.create_point())
                    while volume.core.admin.to_json()["running"] is None:
                        await trio.lowlevel.checkpoint()
                    if what == "shrink":
                        await Doing(nursery, volume.resize(SMALLEST)).ended()
                    await tidying.wait()
            assert [point.number for point in volume.points] == [3, 4, 5]
            volume.check_invariants()

        scene.run(main)
        assert scene.rig.log.params(1010)["point"] == 5


def test_a_loss_is_not_recorded_in_a_state_file_that_was_deleted() -> None:
    """The next opening would not find it there, and show points whose blocks have been overwritten:
    the write is refused, and no new point is made either.
    """
    scene = Scene(on_full="evict")
    host = scene.rig.host

    async def go_on_without_it(volume: Volume) -> None:
        state = host.files.pop("state")
        assert "deleted" in str(await attempt(volume.create_point()))
        host.fail("area", "write", errno.EIO, times=FOREVER)
        error = await attempt(write(volume, 0, pattern(50, SIZE)))
        assert isinstance(error, OSError)
        assert error.errno == errno.ENODEV
        assert [point.number for point in volume.points] == list(scene.points)
        host.files["state"] = state

    scene.run(go_on_without_it)
    assert scene.ids() == [92]
    scene.rig.killed()
    scene.exact()


def test_points_that_are_lost_are_not_told_of_at_each_opening() -> None:
    """The diff area takes no writes any more: what the loss of it cost is told by the server, and
    by the first opening after it, which cannot know that, but not whenever somebody looks.
    """
    scene = Scene(on_full="evict")
    scene.rig.host.fail("area", "write", errno.EIO, times=FOREVER)
    assert scene.write(0, SIZE) is None
    assert scene.ids() == [14]
    for told in (1, 0, 0):
        scene.rig.close()
        scene.rig.log.events.clear()
        assert not scene.run(_live)
        assert scene.fault == 13
        assert scene.ids().count(14) == told
    scene.rig.killed()  # And works again.
    scene.rig.log.events.clear()
    assert not scene.run(_live)
    assert scene.ids() == [14]
    scene.rig.killed()
    assert not scene.run(_live)
    assert scene.ids() == [14]


async def _live(volume: Volume) -> list[int]:
    return [point.number for point in volume.points]


def test_no_point_goes_because_growing_takes_longer_than_grow_timeout() -> None:
    """The write waits until the growth has ended, however long."""
    with small_steps():
        scene = Scene(on_full="evict", maximum=SMALLEST + 100 * BLOCK, grow_timeout=0.0)
        scene.run(scene.fill, 6)
        assert scene.write(0, SIZE) is None
        assert scene.ids() == []
        scene.exact()


def test_a_write_larger_than_the_whole_area_takes_every_point_and_goes_through() -> None:
    """No point can be kept beside it: all go, one by one, and the write is not refused."""
    with small_steps():
        scene = Scene(on_full="evict", maximum=SMALLEST)

        async def fill(volume: Volume) -> None:
            area = volume.core.need_area()
            taken = area.slots.reserve(area.slots.free)
            assert taken
            volume.room.promised.update(taken)

        scene.run(fill)
        assert scene.write(0, SIZE) is None
        assert scene.ids().count(33) == 2
        scene.run(_no_points)


async def _no_points(volume: Volume) -> None:
    assert volume.points == []


def test_a_handle_on_an_evicted_point_gets_estale() -> None:
    """Eviction does not ask who has the point open."""
    with small_steps():
        scene = Scene(on_full="evict", maximum=SMALLEST)
        scene.run(scene.fill, 4)

        async def use(volume: Volume) -> None:
            handle = volume.open_point(1)
            newest = volume.points[-1].number
            before = await read_point(volume, newest)
            await write(volume, 0, pattern(60, SIZE))
            error = await attempt(handle.read(0, 1))
            assert error is not None
            assert error.errno == errno.ESTALE
            assert await read_point(volume, newest) == before
            handle.close()

        scene.run(use)


@pytest.mark.parametrize("buffer", [0, 1 << 20])
def test_a_point_that_is_taken_while_all_others_are_given_up_stays(buffer: int) -> None:
    """Its number was reserved before, and given up with all others: it gets a new one. It can be
    read, and is there at the next opening.
    """
    scene = Scene(on_full="evict", buffer=buffer)

    async def take(volume: Volume) -> int:
        reserve = volume.protection.reserve_number

        async def and_then_a_copy_fails(number: int) -> None:
            volume.protection.reserve_number = reserve  # type: ignore[method-assign]
            await reserve(number)
            scene.rig.host.fail("area", "write", errno.EIO)
            await write(volume, 0, pattern(50, SIZE))

        volume.protection.reserve_number = and_then_a_copy_fails  # type: ignore[method-assign]
        return (await volume.create_point()).number

    number = scene.run(take)
    assert scene.ids() == [14]
    assert scene.rig.log.params(14)["points"] == [1, 2]
    assert number == 4, "a number is never used twice"

    async def look(volume: Volume) -> None:
        assert [point.number for point in volume.points] == [number]
        await write(volume, 0, pattern(51, BLOCK))
        assert await read_point(volume, number) == pattern(50, SIZE)
        await volume.go_offline()
        await volume.online()

    scene.run(look)
    scene.rig.killed()
    scene.run(look)
    scene.rig.close()
    scene.run(look)


def test_a_point_that_goes_while_its_restore_waits_for_writes_is_not_restored() -> None:
    """The restore is refused, for there is no such point any more; all other points stay."""

    async def story(volume: Volume) -> None:
        await volume.create_point()
        await write(volume, 0, pattern(1, 8 * BLOCK))
        await volume.create_point()
        await write(volume, 0, pattern(2, BLOCK))
        many = volume.core.need_area().slots.free + 1
        async with trio.open_nursery() as nursery:
            with Pause(rig, "area", "write", at=(0, 1)) as evicting:
                writer = Doing(nursery, write(volume, 10 * BLOCK, pattern(3, many * BLOCK)))
                await evicting.reached()
                restoring = Doing(nursery, volume.restore(1, force=True))
                while not volume.core.gate.closed:  # noqa: ASYNC110 - it has no event for that
                    await trio.sleep(0.001)
                evicting.go()
                await writer.ended()
                with pytest.raises(VsnapError) as caught:
                    await restoring.ended()
        assert caught.value.code == "no-such-point"
        assert [point.number for point in volume.points] == [2]
        assert rig.log.ids() == [33, 38]
        whole = pattern(2, BLOCK) + pattern(1, 8 * BLOCK)[BLOCK:] + bytes(2 * BLOCK)
        whole += pattern(3, many * BLOCK)
        assert await read_replica(volume) == whole.ljust(volume.size, b"\0")

    with small_steps():
        rig = Rig(size=40 * BLOCK, maximum=SMALLEST, on_full="evict")
        rig.threads = True
        rig.run(story)


@pytest.mark.parametrize("meanwhile", ["resize", "delete", "offline"])
def test_no_point_goes_if_there_is_room_once_its_turn_has_come(meanwhile: str) -> None:
    """An eviction that waits looks again: room has been made, or the write is refused anyway."""

    async def story(volume: Volume) -> None:
        await write(volume, 0, pattern(1, 40 * BLOCK))
        await volume.create_point()
        await write(volume, 0, pattern(2, 8 * BLOCK))
        await volume.create_point()
        await write(volume, 0, pattern(3, volume.core.need_area().slots.free * BLOCK))
        where = {"resize": ("area", "write"), "delete": ("area", "write")}
        file, operation = where.get(meanwhile, ("area", "read"))
        busy = {
            "resize": partial(volume.resize, SMALLEST + 64 * BLOCK),
            "delete": partial(volume.delete_point, 2),
        }.get(meanwhile, volume.verify)
        async with trio.open_nursery() as nursery:
            with Pause(rig, file, operation, at=(0, 1)) as pause:
                working = Doing(nursery, busy())
                await pause.reached()
                writer = Doing(nursery, write(volume, 38 * BLOCK, pattern(4, BLOCK)))
                await all_stand_still()
                if meanwhile == "offline":
                    offline = Doing(nursery, volume.go_offline())
                    await all_stand_still()
                pause.go()
                await working.ended()
                if meanwhile == "offline":
                    await offline.ended()
                    with pytest.raises(OSError):
                        await writer.ended()
                else:
                    await writer.ended()
        assert [point.number for point in volume.points] == (
            [1] if meanwhile == "delete" else [1, 2]
        )
        assert 33 not in rig.log.ids()
        assert await read_point(volume, 1) == pattern(1, 40 * BLOCK)

    with small_steps():
        rig = Rig(size=40 * BLOCK, maximum=SMALLEST, on_full="evict")
        rig.threads = True
        rig.run(story)


def test_points_stay_if_the_volume_goes_offline_before_they_are_given_up() -> None:
    """A copy has failed, and before all points go for it `offline` refuses the write."""

    async def story(volume: Volume) -> None:
        await write(volume, 0, pattern(1, SIZE))
        await volume.create_point()
        failed = OSError(errno.EIO, "failed")
        async with trio.open_nursery() as nursery:
            with (
                Pause(rig, "area", "sync", error=failed) as copying,
                Pause(rig, "replica", "read", at=(5 * BLOCK, 6 * BLOCK)) as next_one,
            ):
                writer = Doing(nursery, write(volume, 0, pattern(2, BLOCK)))
                await copying.reached()
                another = Doing(nursery, write(volume, 5 * BLOCK, pattern(2, BLOCK)))
                await all_stand_still()
                copying.go()
                await next_one.reached()
                offline = Doing(nursery, volume.go_offline())
                await all_stand_still()
                next_one.go()
                await offline.ended()
                for one in writer, another:
                    with pytest.raises(OSError):
                        await one.ended()
        assert await read_point(volume, 1) == pattern(1, SIZE)
        await volume.online()
        await write(volume, 0, pattern(2, SIZE))
        assert await read_point(volume, 1) == pattern(1, SIZE)
        assert 14 not in rig.log.ids()

    rig = Rig(size=SIZE, on_full="evict")
    rig.threads = True
    rig.run(story)
