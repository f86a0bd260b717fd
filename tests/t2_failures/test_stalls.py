"""A host that takes long to give the diff area its space: who waits for it, and who does not.

A growth is held in its worker thread, at the host's allocation, until the test lets it go. Nothing
here depends on how long anything takes.
"""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import trio
import trio.testing
from rig import (
    BLOCK,
    SMALLEST,
    Rig,
    attempt,
    flush,
    pattern,
    read_point,
    read_replica,
    small_steps,
    write,
)
from scene import BLOCKS, SIZE, Scene
from schedules import Doing, Pause, all_stand_still
from simdisk import FOREVER

from vsnapfs.diffarea.layout import SLOTS_PER_GROUP, SUPERBLOCK_OFFSETS, Layout
from vsnapfs.errors import VsnapError
from vsnapfs.patience import Patience
from vsnapfs.volume import Volume
from vsnapfs.volume import room as room_module
from vsnapfs.volume.room import Rate

NEW = pattern(90, 2 * BLOCK)
BUFFERS = pytest.mark.parametrize("buffer", [0, 64 * 1024], ids=["direct", "buffered"])


@pytest.fixture(autouse=True)
def _small() -> Iterator[None]:
    with small_steps():
        yield


def used_up(policy: str, **options: Any) -> Scene:
    """No slot is free, the maximum is far, and nothing grows ahead."""
    scene = Scene(on_full=policy, maximum=SMALLEST + 100 * BLOCK, **options)
    refused = scene.rig.host.fail("area", "allocate", errno.ENOSPC, times=FOREVER)
    scene.run(scene.fill, 0)
    scene.rig.host.failures.remove(refused)
    scene.rig.log.events.clear()
    scene.rig.threads = True
    return scene


Schedule = Callable[[Volume, Doing, Pause], Awaitable[None]]


def while_it_stalls(scene: Scene, schedule: Schedule, **options: Any) -> None:
    """Run `schedule` while a write of two blocks waits for a growth that is held."""

    async def main(volume: Volume) -> None:
        async with trio.open_nursery() as nursery:
            with Pause(scene.rig, "area", "allocate", **options) as growing:
                writing = Doing(nursery, write(volume, 0, NEW))
                await growing.reached()
                await all_stand_still()
                await schedule(volume, writing, growing)

    scene.run(main)


@BUFFERS
@pytest.mark.parametrize("policy", ["offline", "evict"])
def test_everything_else_is_answered_while_a_write_waits(policy: str, buffer: int) -> None:
    """Status, reads, flushes, new points, deletions, verify; then the write goes through, and all
    points are exact.
    """
    # However short: with evict nobody looks at it.
    timeout = {"evict": 0.0, "offline": 600.0}[policy]
    scene = used_up(policy, buffer=buffer, grow_timeout=timeout)

    async def schedule(volume: Volume, writing: Doing, growing: Pause) -> None:
        told = volume.status()["diff_area"]["growth"]
        assert told["waiting"] == 1
        assert told["seconds"] >= 0
        content = bytes(await read_replica(volume))
        assert content[: len(NEW)] != NEW
        assert await read_point(volume, 1) == scene.points[1]
        await flush(volume)
        await scene.create(volume)
        assert scene.points[max(scene.points)] == content
        await volume.delete_point(2)
        del scene.points[2]
        assert (await volume.verify())["ok"]
        assert not writing.answered
        growing.go()
        await writing.ended()
        assert bytes(await read_replica(volume)) == NEW + content[len(NEW) :]
        told = volume.status()["diff_area"]["growth"]
        assert (told["waiting"], told["seconds"]) == (0, None)
        assert told["last_seconds"] >= 0

    while_it_stalls(scene, schedule)
    assert scene.ids() == []
    assert scene.fault is None
    scene.exact()
    scene.rig.close()
    scene.exact()


@BUFFERS
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EOPNOTSUPP])
def test_a_growth_that_fails_after_all_costs_the_oldest_point(buffer: int, code: int) -> None:
    """With evict: 35 for one point, whatever the reason, and the write goes through."""
    scene = used_up("evict", buffer=buffer, grow_timeout=0.0)
    refused = scene.rig.host.fail("area", "allocate", code, times=FOREVER)

    async def schedule(volume: Volume, writing: Doing, growing: Pause) -> None:
        assert scene.ids() == []
        growing.go()
        await writing.ended()
        await flush(volume)

    while_it_stalls(scene, schedule, error=OSError(code, "not after all"))
    assert scene.ids() == [35]
    scene.rig.host.failures.remove(refused)
    assert scene.replica()[: len(NEW)] == NEW
    scene.exact(only=set(scene.points) - {1})


@BUFFERS
@pytest.mark.parametrize("policy", ["offline", "evict"])
def test_a_write_that_waits_is_refused_when_the_volume_goes_offline(
    policy: str, buffer: int
) -> None:
    """At once, not when the host answers; and it has moved no byte."""
    scene = used_up(policy, buffer=buffer, grow_timeout=600.0)
    before = scene.replica()

    async def schedule(volume: Volume, writing: Doing, _growing: Pause) -> None:
        await volume.go_offline()
        with pytest.raises(OSError) as caught:
            await writing.ended()
        assert caught.value.errno == errno.ENODEV

    while_it_stalls(scene, schedule)
    assert scene.replica() == before
    scene.exact()


def test_a_request_that_is_given_up_does_not_wait_any_longer() -> None:
    """A cancelled write leaves nothing behind: points, writes and a clean close go on."""
    scene = used_up("evict")

    async def main(volume: Volume) -> None:
        with Pause(scene.rig, "area", "allocate") as growing:
            async with trio.open_nursery() as nursery:
                Doing(nursery, write(volume, 0, NEW))
                await growing.reached()
                nursery.cancel_scope.cancel()
            assert volume.core.gate.inside == 0
            await scene.create(volume)
        await write(volume, 0, NEW)

    scene.run(main)
    scene.exact()


# --- closing -------------------------------------------------------------------------------------


@BUFFERS
@pytest.mark.parametrize("policy", ["offline", "evict"])
def test_closing_does_not_wait_for_a_host_that_does_not_answer(policy: str, buffer: int) -> None:
    """It ends, says so, and is what a kill is: nothing acknowledged is lost, no point changes, no
    fault. The diff area is not let go as long as something may still be done to it.
    """
    scene = used_up(policy, buffer=buffer, grow_timeout=600.0)

    def patience(seconds: float) -> None:
        object.__setattr__(scene.rig.config, "grow_timeout", seconds)

    async def schedule(volume: Volume, writing: Doing, growing: Pause) -> None:
        patience(0.01)
        await volume.close()
        patience(600.0)
        with pytest.raises(OSError) as caught:
            await writing.ended()
        assert caught.value.errno == errno.ENODEV
        assert scene.rig.host.files["area"].locked
        assert not scene.rig.host.files["replica"].locked
        growing.go()
        await all_stand_still()

    before = scene.replica()
    while_it_stalls(scene, schedule)
    assert scene.rig.log.ids("vsnapfs") == [1091]
    assert scene.ids() == []
    scene.rig.killed()
    scene.rig.threads = False
    assert scene.fault is None
    assert scene.replica() == before
    scene.exact()
    assert scene.write(0, SIZE) is None


@pytest.mark.parametrize("when", ["ahead", "now"])
@pytest.mark.parametrize("policy", ["offline", "evict"])
def test_a_growth_whose_sync_failed_is_no_reason_to_refuse_the_next(policy: str, when: str) -> None:
    """Nothing relied on it, and the host is well again: no fault, and no point is given up."""
    scene = used_up(policy)
    failure = scene.rig.host.fail(
        "area", "sync", errno.EIO, times=FOREVER if when == "ahead" else 1
    )

    async def ahead(volume: Volume) -> None:
        volume.room.reset()
        volume.room.look_ahead()
        await all_stand_still()
        assert volume.core.need_area().slots.free == 0

    if when == "ahead":
        scene.run(ahead)
        scene.rig.host.failures.remove(failure)
    assert scene.write(0, 2 * BLOCK) is None
    assert failure.fired
    assert scene.fault is None
    scene.exact()
    scene.works()


@pytest.mark.parametrize("policy", ["offline", "evict"])
def test_a_repair_whose_sync_fails_is_no_reason_to_refuse_a_growth(policy: str) -> None:
    """The growth waits for `area_lock` meanwhile: no fault, and no point is given up."""
    scene = used_up(policy)
    where = SUPERBLOCK_OFFSETS[1]
    file = scene.rig.host.files["area"]
    for side in file.cache, file.disk:
        side.write(where + 100, bytes(byte ^ 1 for byte in side.read(where + 100, 1)))

    async def main(volume: Volume) -> None:
        async with trio.open_nursery() as nursery:
            with Pause(scene.rig, "area", "write", at=(where, where + 1)) as mending:
                repairing = Doing(nursery, volume.repair())
                await mending.reached()
                writing = Doing(nursery, write(volume, 0, NEW))
                await all_stand_still()
                failure = scene.rig.host.fail("area", "sync", errno.EIO)
                mending.go()
                assert not (await repairing.ended())["ok"]
                assert failure.fired
                await writing.ended()

    scene.run(main)
    assert scene.fault is None
    scene.exact()
    scene.works()


@pytest.mark.parametrize("policy", ["offline", "evict"])
def test_a_shrink_gives_way_to_a_write_that_waits_already(policy: str) -> None:
    """Its growth would wait for the shrink: the write would meet a full area, or a time limit."""

    async def main(volume: Volume) -> None:
        area = volume.core.need_area()
        await write(volume, 0, old)
        await volume.create_point()
        await write(volume, 0, pattern(2, 30 * BLOCK))
        while volume.room.status()["seconds"] is not None:  # noqa: ASYNC110 - growing ahead
            await trio.sleep(0.001)
        total = area.layout.size_of(len(area.slots))
        await volume.resize(SMALLEST + 64 * BLOCK)
        lacking = area.slots.free + 1
        async with trio.open_nursery() as nursery:
            with Pause(rig, "area", "sync") as syncing:
                first = Doing(nursery, write(volume, 40 * BLOCK, pattern(3, BLOCK)))
                await syncing.reached()
                shrinking = Doing(nursery, volume.resize(total - 4 * BLOCK))
                await all_stand_still()
                waiting = Doing(nursery, write(volume, 41 * BLOCK, pattern(4, lacking * BLOCK)))
                await all_stand_still()
                syncing.go()
                await first.ended()
                with pytest.raises(VsnapError) as caught:
                    await shrinking.ended()
                await waiting.ended()
        assert caught.value.code == "gave-up"
        assert await read_point(volume, 1) == old

    old = pattern(1, 64 * BLOCK)
    maximum = SMALLEST + 16 * BLOCK
    rig = Rig(size=64 * BLOCK, maximum=maximum, on_full=policy, zero_blocks="copy")
    rig.threads = True
    rig.run(main)


@pytest.mark.parametrize("buffer", [0, 4 * BLOCK + 4096], ids=["direct", "buffered"])
@pytest.mark.parametrize("operation", ["write", "sync"])
def test_closing_waits_for_copies_on_their_way(operation: str, buffer: int) -> None:
    """Writes in flight are given up after hold-timeout, but nobody else gets the files before the
    host has answered; who still waits for a flush is refused, and that is no fault.
    """
    scene = Scene(buffer=buffer, hold_timeout=0.05)
    scene.run(scene.create)
    scene.rig.threads = True

    async def main(volume: Volume) -> None:
        async with trio.open_nursery() as nursery:
            with Pause(scene.rig, "area", operation) as copying:
                writes = [
                    Doing(nursery, write(volume, n * BLOCK, pattern(5, BLOCK)))
                    for n in range(BLOCKS)
                ]
                await copying.reached()
                await all_stand_still()
                flushing = Doing(nursery, flush(volume))
                closing = Doing(nursery, volume.close())
                await trio.sleep(0.2)  # Longer than hold-timeout.
                await all_stand_still()
                assert any(not one.answered for one in writes)
                with pytest.raises(OSError, match="No such device"):
                    volume.open_replica()  # Its writes would wait for ever.
                assert scene.rig.host.files["area"].locked
                copying.go()
                await closing.ended()
            await all_stand_still()
            assert all(one.answered for one in writes)
            if buffer:
                with pytest.raises(OSError) as caught:
                    await flushing.ended()
                assert caught.value.errno == errno.ENODEV

    # One record a time: there is something left when closing goes on.
    with mock.patch("vsnapfs.volume.buffer._BATCH", 1):
        scene.run(main)
    assert not scene.rig.host.files["area"].locked
    assert scene.ids() == []
    scene.rig.killed()
    scene.rig.threads = False
    assert scene.fault is None
    scene.exact()


def test_a_growth_that_ends_in_time_leaves_a_clean_end() -> None:
    """What closing has waited for is part of the clean end: no recovery at the next opening."""
    scene = used_up("offline", grow_timeout=600.0)

    async def main(volume: Volume) -> None:
        with Pause(scene.rig, "area", "allocate") as growing:
            async with trio.open_nursery() as nursery:
                volume.room.reset()
                volume.room.look_ahead()
                await growing.reached()
                closing = Doing(nursery, volume.close())
                await all_stand_still()
                assert not closing.answered
                growing.go()
                await closing.ended()

    scene.run(main)
    scene.rig.volume = None
    scene.rig.threads = False
    scene.rig.log.events.clear()
    scene.exact()
    assert 1042 not in scene.rig.log.ids("vsnapfs"), "not closed cleanly"


# --- commands ------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["resize", "give up"])
def test_a_command_that_needs_the_area_at_rest_says_that_it_grows(what: str) -> None:
    """Refused after hold-timeout, not held for ever; other commands go on after it."""
    scene = used_up("evict", hold_timeout=0.05)

    async def schedule(volume: Volume, writing: Doing, growing: Pause) -> None:
        if what == "give up":
            await volume.go_offline()
            with pytest.raises(OSError):
                await writing.ended()
        work = {
            "resize": lambda: volume.resize(SMALLEST + 200 * BLOCK),
            "give up": lambda: volume.online(give_up_recovery_points=True),
        }[what]
        with pytest.raises(VsnapError, match="still growing") as caught:
            await work()
        assert caught.value.code == "growing"
        if what == "resize":
            await scene.create(volume)
            growing.go()
            await writing.ended()
            await work()

    while_it_stalls(scene, schedule)
    scene.exact()


def test_a_restore_does_not_wait_for_a_write_that_waits() -> None:
    """And the write, whose handle is from before the restore, is refused after it."""
    scene = used_up("evict")

    async def schedule(volume: Volume, writing: Doing, growing: Pause) -> None:
        newest = max(scene.points)
        restoring = Doing(volume_nursery, volume.restore(newest, force=True))
        await restoring.ended()
        assert scene.replica() == scene.points[newest]
        growing.go()
        with pytest.raises(OSError) as caught:
            await writing.ended()
        assert caught.value.errno == errno.ENODEV

    async def main(volume: Volume) -> None:
        nonlocal volume_nursery
        async with trio.open_nursery() as nursery, trio.open_nursery() as volume_nursery:
            with Pause(scene.rig, "area", "allocate") as growing:
                writing = Doing(nursery, write(volume, 0, NEW))
                await growing.reached()
                await all_stand_still()
                await schedule(volume, writing, growing)

    volume_nursery: trio.Nursery
    scene.run(main)
    scene.exact()


@pytest.mark.parametrize("host", ["stalls", "fails"])
def test_a_restore_that_waits_for_room_is_refused_when_the_volume_goes_offline(host: str) -> None:
    """At once; it neither waits for the host nor tries again and again. Nothing was changed."""
    scene = used_up("offline")
    before = scene.replica()

    async def main(volume: Volume) -> None:
        lost = OSError(errno.EIO, "the disk has lost it")
        async with trio.open_nursery() as nursery:
            with (
                Pause(scene.rig, "area", "allocate") as growing,
                Pause(scene.rig, "replica", "sync", error=lost) as syncing,
            ):
                flushing = Doing(nursery, flush(volume))
                await syncing.reached()
                restoring = Doing(nursery, volume.restore(min(scene.points), force=True))
                await growing.reached()
                syncing.go()
                with pytest.raises(OSError):
                    await flushing.ended()
                if host == "fails":
                    scene.rig.host.fail("area", "allocate", errno.EIO, times=FOREVER)
                    growing.go()
                with pytest.raises(VsnapError) as caught:
                    await restoring.ended()
                assert caught.value.code == "offline"
                assert volume.core.area_is_busy or host == "fails"

    scene.run(main)
    assert scene.replica() == before
    assert scene.ids().count(24) <= 1
    scene.rig.host.failures.clear()
    scene.exact()


@pytest.mark.parametrize("policy", ["evict", "offline"])
def test_a_step_across_the_end_of_a_group_is_not_tried_for_ever(policy: str) -> None:
    """Half of it, rounded to where an area can end, may be all of it: then less is tried."""
    group = Layout(BLOCK).size_of(SLOTS_PER_GROUP)
    with mock.patch("vsnapfs.diffarea.area._MIN_STEP", group - 10 * BLOCK):
        scene = Scene(on_full=policy, maximum=3 * group)
        host = scene.rig.host

        async def main(volume: Volume) -> None:
            slots = volume.core.need_area().slots
            assert len(slots) == SLOTS_PER_GROUP - 10
            taken = slots.reserve(slots.free)
            assert taken is not None
            volume.room.promised.update(taken)
            host.fail("area", "allocate", errno.ENOSPC, times=100)
            error = await attempt(write(volume, 6 * BLOCK, b"new"))
            assert (error is None) == (policy == "evict")
            assert host.counts["area", "allocate"] < 30
            host.failures.clear()
            volume.room.promised.clear()
            slots.release(taken)

        scene.run(main)
    assert scene.ids() == [35 if policy == "evict" else 89]
    if policy == "offline":
        scene.works()


# --- told ----------------------------------------------------------------------------------------


def test_a_slow_growth_is_told_while_it_lasts_and_when_it_has_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """1047 (Warning): so far, with the writes that wait; then how long it took, from what to what.
    A growth that is not slow is not told.
    """
    scene = used_up("evict")
    monkeypatch.setattr(room_module, "SLOW_GROWTH_SECONDS", 0.0)

    async def schedule(volume: Volume, writing: Doing, growing: Pause) -> None:
        area = volume.core.need_area()
        old = area.allocated
        first = scene.rig.log.params(1047)
        assert (first["count"], first["diff_area"]) == (1, "/sim/area")
        assert "new" not in first
        growing.go()
        await writing.ended()
        await all_stand_still()
        found = [params for _, number, params in scene.rig.log.events if number == 1047]
        assert (found[-1]["old"], found[-1]["new"]) == (old, area.allocated)
        assert found[-1]["seconds"] >= 0

    while_it_stalls(scene, schedule)
    monkeypatch.setattr(room_module, "SLOW_GROWTH_SECONDS", 600.0)
    scene.rig.log.events.clear()
    scene.run(scene.fill, 0)
    scene.exact()
    assert 1047 not in scene.rig.log.ids("vsnapfs")


# --- ahead ---------------------------------------------------------------------------------------


def test_the_rate_counts_the_last_minute_only() -> None:
    """In pieces of five seconds; what is older than a minute is forgotten, also after a pause."""
    rate = Rate()
    for second in range(1000, 1060):
        rate.add(80, float(second))
    assert rate.total == 4800
    assert rate.ahead == 600, "a quarter of what thirty seconds take"
    rate.add(0, 1060.0)
    assert rate.total == 4400
    rate.add(1, 1114.9)
    assert rate.total == 401, "the last five of those seconds"
    rate.add(0, 1115.0)
    assert rate.total == 1
    rate.add(2, 1e9)
    assert rate.total == 2
    assert rate.ahead == 0


def test_growing_ahead_begins_early_where_much_is_preserved(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same work in a minute and in an hour: in the first case a quarter of what thirty seconds
    take is free at its end.
    """
    clock = 5000.0
    monkeypatch.setattr(trio, "current_time", lambda: clock)
    blocks = -(-SIZE // BLOCK)

    def after(rounds: int, pause: float) -> int:
        """Slots that are free in the end."""
        scene = Scene(maximum=SMALLEST + 900 * BLOCK)

        async def main(volume: Volume) -> int:
            nonlocal clock
            for _ in range(rounds):
                clock += pause
                await volume.create_point()
                await write(volume, 0, pattern(1, SIZE))
                while volume.room.status()["seconds"] is not None:
                    await trio.lowlevel.checkpoint()
                await volume.delete_point(volume.points[0].number)
            return volume.core.need_area().slots.free

        return int(scene.run(main))

    wanted = 60 * blocks // 8 - blocks
    assert after(rounds=60, pause=60.0) < wanted <= after(rounds=60, pause=0.5)


def test_a_growth_ahead_takes_enough_not_to_begin_again_at_once() -> None:
    """However small a step is, one allocation brings all that should be free."""
    scene = Scene(maximum=SMALLEST + 400 * BLOCK)

    async def main(volume: Volume) -> None:
        area = volume.core.need_area()
        volume.room.taken(2000)
        before = scene.rig.host.counts["area", "allocate"]
        for block in (7, 8, 9):
            await write(volume, block * BLOCK, pattern(1, BLOCK))
            while volume.room.status()["seconds"] is not None:
                await trio.lowlevel.checkpoint()
        assert area.slots.free >= 2000 // 8
        assert scene.rig.host.counts["area", "allocate"] <= before + 2

    scene.run(main)


@BUFFERS
def test_the_time_for_which_the_server_was_stopped_is_not_the_host_s(buffer: int) -> None:
    """However long a process is stopped (SIGSTOP, a frozen container) while a write waits for a
    growth: that is no fault. The host's own time is, once `grow-timeout` is over.
    """
    scene = used_up("offline", buffer=buffer, grow_timeout=30.0)
    clock = trio.testing.MockClock()  # It stands still.
    scene.rig.clock = lambda: clock

    async def main(volume: Volume) -> None:
        async with trio.open_nursery() as nursery:
            with Pause(scene.rig, "area", "allocate") as growing:
                writing = Doing(nursery, write(volume, 0, NEW))
                while not growing.was_reached:
                    await trio.lowlevel.checkpoint()
                for seconds in (3600, *[1] * 28):
                    clock.jump(seconds)
                    await trio.testing.wait_all_tasks_blocked()
                assert not writing.answered
                assert volume.protection.is_online
                clock.jump(1)
                with pytest.raises(OSError):
                    await writing.ended()
                growing.go()

    scene.run(main)
    assert scene.fault == 9
    scene.exact()


@BUFFERS
def test_no_point_goes_for_a_block_that_another_write_has_a_slot_for_by_now(buffer: int) -> None:
    """A write lacks room beside a deletion that makes some, and meanwhile one of its blocks gets
    its slot from another write: what is free then is enough.
    """
    scene = Scene(on_full="evict", maximum=SMALLEST, buffer=buffer)
    scene.run(scene.fill, 2)
    scene.rig.log.events.clear()
    scene.rig.threads = True

    async def main(volume: Volume) -> None:
        spare = max(scene.points)
        await write(volume, 0, NEW[:BLOCK])  # Of this block an older point has a copy, too.
        await flush(volume)
        await scene.create(volume)
        area = volume.core.need_area()
        assert (area.slots.free, area.growable_slots) == (1, 0)
        async with trio.open_nursery() as nursery:
            with Pause(scene.rig, "area", "sync") as committing:
                deleting = Doing(nursery, volume.delete_point(spare))
                await committing.reached()
                writing = Doing(nursery, write(volume, 8 * BLOCK, NEW))
                await all_stand_still()
                other = Doing(nursery, write(volume, 8 * BLOCK, NEW[:BLOCK]))
                await all_stand_still()
                assert area.slots.free == 0
            for one in (deleting, writing, other):
                await one.ended()
        await flush(volume)
        del scene.points[spare]

    scene.run(main)
    assert scene.ids() == []
    scene.exact()


@pytest.mark.parametrize("what", ["create", "restore", "shrink", "resize"])
def test_a_command_does_not_count_the_time_for_which_the_server_was_stopped(what: str) -> None:
    """One that holds writes, or waits for a growth, is refused once the host has taken longer than
    `hold-timeout`, not because the process was stopped for so long.
    """
    scene = used_up("evict", buffer=64 * 1024, hold_timeout=10.0)
    clock = trio.testing.MockClock()  # It stands still.
    scene.rig.clock = lambda: clock
    grows = what == "resize"

    async def reached(pause: Pause) -> None:
        while not pause.was_reached:
            await trio.lowlevel.checkpoint()
        await trio.testing.wait_all_tasks_blocked()

    async def main(volume: Volume) -> None:
        command = {
            "create": volume.create_point,
            "restore": lambda: volume.restore(max(scene.points), force=True),
            "shrink": lambda: volume.resize(volume.core.need_area().allocated - BLOCK),
            "resize": lambda: volume.resize(SMALLEST + 200 * BLOCK),
        }[what]
        file, operation = ("area", "allocate") if grows else ("replica", "write")
        async with trio.open_nursery() as nursery:
            with Pause(scene.rig, "replica", "sync") as syncing:
                with Pause(scene.rig, file, operation) as slow:
                    if what == "create":  # Its first flush holds nothing, and is waited for.
                        doing = Doing(nursery, command())
                        await reached(syncing)
                    writing = Doing(nursery, write(volume, (BLOCKS - 2) * BLOCK * (not grows), NEW))
                    await reached(slow)
                    syncing.go()
                    if what != "create":
                        doing = Doing(nursery, command())
                    await trio.testing.wait_all_tasks_blocked(0.01)
                    for seconds in (3600, *[1] * 8):
                        clock.jump(seconds)
                        await trio.testing.wait_all_tasks_blocked()
                        assert not doing.answered, doing.error
                    clock.jump(1)
                    with pytest.raises(VsnapError):
                        await doing.ended()
                    slow.go()
                await writing.ended()
        assert scene.ids() == ([8] if what == "create" else [])

    scene.run(main)


@BUFFERS
@pytest.mark.parametrize("policy", ["offline", "evict"])
def test_a_write_waits_no_longer_once_points_are_deleted(policy: str, buffer: int) -> None:
    """It needs no copy then, or has room for it: whatever the host does, that is no fault (P2)."""
    scene = used_up(policy, buffer=buffer, grow_timeout=600.0)

    async def schedule(volume: Volume, writing: Doing, growing: Pause) -> None:
        for point in volume.points:
            await volume.delete_point(point.number)
        scene.points.clear()
        await writing.ended()
        assert bytes(await read_replica(volume))[: len(NEW)] == NEW
        growing.go()

    while_it_stalls(scene, schedule)
    assert scene.ids() == []
    assert scene.fault is None
    scene.exact()


@BUFFERS
def test_a_write_that_has_waited_for_the_gate_looks_whether_there_is_room_by_now(
    buffer: int,
) -> None:
    """It has waited too long for the growth, which ends while a new point holds the gate."""
    scene = used_up("offline", buffer=buffer, hold_timeout=3600.0)
    clock = trio.testing.MockClock()  # It stands still.
    scene.rig.clock = lambda: clock

    async def until(condition: Callable[[], bool]) -> None:
        while not condition():
            await trio.lowlevel.checkpoint()

    async def main(volume: Volume) -> None:
        area = volume.core.need_area()
        async with trio.open_nursery() as nursery:
            with (
                Pause(scene.rig, "area", "allocate") as growing,
                Pause(scene.rig, "replica", "sync", nth=2) as syncing,
            ):
                writing = Doing(nursery, write(volume, 0, NEW))
                await until(lambda: growing.was_reached)
                creating = Doing(nursery, volume.create_point())
                await until(lambda: syncing.was_reached)
                assert volume.core.gate.closed
                for _second in range(60):
                    clock.jump(1)
                    await trio.testing.wait_all_tasks_blocked()
                growing.go()
                await until(lambda: area.slots.free > 0)
                syncing.go()
                scene.points[(await creating.ended()).number] = before
                await writing.ended()
        assert bytes(await read_replica(volume))[: len(NEW)] == NEW

    before = scene.replica()
    scene.run(main)
    assert scene.fault is None
    scene.exact()


@BUFFERS
@pytest.mark.parametrize("policy", ["offline", "evict"])
def test_blocks_whose_copies_are_on_their_way_need_no_room(policy: str, buffer: int) -> None:
    """A write that has waited for the gate, after a growth that failed, finds that another has just
    taken the last free slots, for the same blocks.
    """
    scene = used_up(policy, buffer=buffer)
    scene.rig.host.fail("area", "allocate", errno.ENOSPC, times=FOREVER)

    async def schedule(volume: Volume, writing: Doing, growing: Pause) -> None:
        slots, gate = volume.core.need_area().slots, volume.core.gate
        wait_open = gate.wait_open

        async def last() -> None:
            await wait_open()
            while slots.free:
                await trio.lowlevel.checkpoint()

        async with trio.open_nursery() as nursery:
            async with gate.held(60):
                with mock.patch.object(gate, "wait_open", last):
                    growing.go()
                    await all_stand_still()
                again = Doing(nursery, write(volume, 0, NEW[::-1]))
                await volume.delete_point(1)
                del scene.points[1]
                others = slots.reserve(slots.free - 2)
                assert others is not None
            await writing.ended()
            await again.ended()
        slots.release(others)
        assert bytes(await read_replica(volume))[: len(NEW)] in (NEW, NEW[::-1])

    while_it_stalls(scene, schedule, error=OSError(errno.ENOSPC, "no space"))
    assert scene.ids() == []
    assert scene.fault is None
    scene.exact()


@pytest.mark.parametrize("seconds", [0.0, 0.3, 2.1, 30.7])
@pytest.mark.parametrize("began", [0.1, 12345.678])
def test_a_time_limit_ends_whatever_rounding_leaves_of_it(seconds: float, began: float) -> None:
    """Less than the clock can tell apart is none: it does not wait for that over and over."""
    turns = 0

    def counted(left: float) -> trio.CancelScope:
        nonlocal turns
        turns += 1
        assert turns < 60
        return move_on_after(left)

    async def main() -> None:
        await trio.sleep(began)
        assert not await Patience(seconds).wait(trio.Event())

    move_on_after = trio.move_on_after
    with mock.patch.object(trio, "move_on_after", counted):
        trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
