"""The engine against a plain model: any sequence of operations, crashes and power failures.

The model is a bytearray for the replica, a dictionary for the recovery points, and for each
512-byte sector what a power failure may leave there (see tests/unsynced.py). After every step all
points and the whole replica are compared and the engine checks itself. What a search finds is kept
in test_kept_finds.py.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import random
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
import trio
from damage import by_number
from hypothesis import Phase, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from powercuts import by_dice, everything_kept, nothing_kept
from rig import (
    BLOCK,
    SMALLEST,
    Rig,
    acknowledged,
    attempt,
    flush,
    pattern,
    raw_replica,
    read_points,
    read_replica,
    slow_growth,
    small_steps,
    write,
)
from simdisk import FOREVER, PowerLoss
from volume_model import InFlight, Model

from vsnapfs.errors import FaultCode, VsnapError
from vsnapfs.volume import Volume

MAX_POINTS_HERE = 9
SIZES = (12 * BLOCK + 1000, 20 * BLOCK, 9 * BLOCK + 1, 17 * BLOCK - 512, 3)

fractions = st.integers(0, (1 << 16) - 1)
lengths = st.one_of(
    st.sampled_from([1, 511, 512, 513, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 3 * BLOCK + 7]),
    st.integers(1, 6 * BLOCK),
)


class VolumeMachine(RuleBasedStateMachine):
    """See the module's note."""

    policy = "offline"
    buffer = 0
    #: The diff area fails, on purpose.
    failing = False
    #: Nothing can be read of the area either.
    unreadable = False

    def __init__(self) -> None:
        super().__init__()
        self.stack = contextlib.ExitStack()
        self.stack.enter_context(small_steps())
        self.rig: Rig
        self.counter = 0
        self.flight = InFlight()

    def teardown(self) -> None:
        self.stack.close()

    @initialize(
        size=st.sampled_from(SIZES),
        extra=st.sampled_from([0, 1, 9, 40, 200]),
        tight=st.sampled_from([None, None, 0, 12, 30]),
        device=st.booleans(),
        stall=st.sampled_from([0, 0, 30]),
        seed=st.integers(0, 1 << 20),
    )
    def make(
        self, size: int, extra: int, tight: int | None, device: bool, stall: int, seed: int
    ) -> None:
        self.stack.enter_context(slow_growth(stall))
        self.rig = Rig(
            size=size,
            maximum=SMALLEST + extra * BLOCK,
            on_full=self.policy,
            buffer=self.buffer,
            area_is_device=device,
            seed=seed * 1000,
            # A stall is counted in steps of others, not in seconds.
            grow_timeout=600.0,
        )
        self.rig.host.cached = seed % 3 == 0
        self.model = Model(size)
        if seed % 4:  # Seldom all holes.
            self.write_everything()
        self.tight = tight is not None
        if tight is not None:
            # The host is (nearly) full: growing fails, and so may writes into holes.
            host = self.rig.host
            host.capacity = host.capacity - host.free() + tight * BLOCK

    # -- helpers ----------------------------------------------------------------------------------

    def fresh(self, length: int) -> bytes:
        self.counter += 1
        return pattern(self.counter, length)

    def place(self, at: int, length: int) -> tuple[int, int]:
        """An offset and a length within the replica, often at its end."""
        size = len(self.model.content)
        offset = min(size - 1, at * (size + BLOCK) // (1 << 16))
        return offset, max(1, min(length, size - offset))

    def point(self, which: int) -> int:
        numbers = sorted(self.model.points)
        return numbers[which * len(numbers) >> 16]

    def after(self, volume: Volume) -> None:
        """What the volume says of itself becomes the model's state; faults must be plausible."""
        protection = volume.protection
        if not protection.is_online and not self.model.offline:
            fault = protection.fault
            assert fault is not None
            allowed = {FaultCode.DIFF_AREA_FULL}
            if self.tight or self.failing:
                allowed.add(FaultCode.GROW_FAILED)
            if self.failing:
                allowed |= {FaultCode.COW_WRITE_FAILURE, FaultCode.IO_FAILURE}
            if self.unreadable:  # What cannot be read is bad, for now at least.
                allowed.add(FaultCode.META_DATA_CORRUPTION)
            assert fault.code in allowed, fault
            assert self.policy == "offline"
            assert fault.used is not None
            assert fault.used <= fault.allocated <= fault.maximum
            self.model.offline, self.model.fault = True, int(fault.code)

    def lost(self, volume: Volume) -> None:
        """Policy evict: points may have gone, the oldest first, and the log says which."""
        live = [point.number for point in volume.points]
        gone = [number for number in self.model.points if number not in live]
        if gone:
            assert self.policy == "evict"
            assert not live or max(gone) < min(live)
            logged = {
                lost
                for _, number, params in self.rig.log.events
                if number in (14, 33, 35)
                for lost in params.get("points", [params.get("point")])
            }
            assert set(gone) <= logged
            assert not live or max(gone) < min(live)
            for number in gone:
                del self.model.points[number]

    # -- data -------------------------------------------------------------------------------------

    async def do_write(
        self, volume: Volume, offset: int, data: bytes, durably: bool = False
    ) -> None:
        """One write, and what it may legally answer. durably: with O_DSYNC."""
        self.flight.writes.append((offset, data))
        self.model.about_to_write(offset, data)
        error = await attempt(write(volume, offset, data, durably=durably))
        if error is None:
            assert not self.model.offline
            self.model.written(offset, data, durably=durably)
        elif error.errno == errno.ENOSPC:
            assert self.tight
        else:
            assert error.errno == errno.ENODEV
            assert not volume.protection.is_online
            if durably and acknowledged(self.rig, volume)[offset : offset + len(data)] == data:
                self.model.written(offset, data)  # It was there, and then its flush was refused.
        self.flight.writes.remove((offset, data))

    @rule(at=fractions, length=lengths, durably=st.booleans())
    def write_one(self, at: int, length: int, durably: bool) -> None:
        offset, length = self.place(at, length)
        self.perform(self.do_write, offset, self.fresh(length), durably)

    @precondition(lambda self: self.planned is None and not self.model.offline)
    @rule(
        at=fractions,
        length=lengths,
        operation=st.sampled_from(["write", "sync", "allocate", None]),
        nth=st.integers(1, 6),
        times=st.sampled_from([1, FOREVER]),
    )
    def write_while_the_area_fails(
        self, at: int, length: int, operation: str | None, nth: int, times: int
    ) -> None:
        """The policy decides: offline, or all points are given up and nothing else is lost."""
        offset, length = self.place(at, length)

        async def write_and_wait(volume: Volume) -> None:
            await self.do_write(volume, offset, self.fresh(length))
            if volume.protection.is_online:
                await attempt(flush(volume))  # So that what is buffered meets it, too.
                # A flush that succeeds, or that fails, may have brought anything to the disk.

        failure = self.rig.host.fail("area", operation, errno.EIO, nth=nth, times=times)
        self.failing, self.unreadable = True, operation is None
        self.perform(write_and_wait)
        self.rig.run(self.noticed)
        self.rig.host.failures.remove(failure)
        self.failing = self.unreadable = False

    async def noticed(self, volume: Volume) -> None:
        """While it still fails: what it did is the model's state."""
        self.after(volume)
        self.lost(volume)
        if self.policy == "evict":
            assert volume.protection.is_online, volume.protection.fault

    @rule(at=fractions, length=st.sampled_from([BLOCK, 5 * BLOCK, 1 << 20]))
    def wipe(self, at: int, length: int) -> None:
        """Zeros, which are preserved without data when they are overwritten."""
        offset, length = self.place(at if length < 1 << 20 else 0, length)
        self.perform(self.do_write, offset, bytes(length))

    @rule()
    def write_everything(self) -> None:
        self.perform(self.do_write, 0, self.fresh(len(self.model.content)))

    @precondition(lambda self: len(self.model.points) < MAX_POINTS_HERE)
    @rule(at=fractions, length=st.sampled_from([1, BLOCK, 5 * BLOCK, 1 << 20]))
    def create_and_write(self, at: int, length: int) -> None:
        """What fills the area: a point, and then writes that must be preserved for it."""
        if self.planned is None:
            self.perform(self.do_create)
        offset, length = self.place(at if length < BLOCK else 0, length)
        self.perform(self.do_write, offset, self.fresh(length))

    @rule(
        cuts=st.lists(fractions, min_size=3, max_size=6, unique=True),
        gaps=st.integers(0, 63),
        durably=st.one_of(st.just(0), st.integers(0, 63)),
    )
    def write_several_at_once(self, cuts: list[int], gaps: int, durably: int) -> None:
        """Neighbouring writes, several of them in one block, all in flight together, some of them
        with O_DSYNC.
        """
        size = len(self.model.content)
        bounds = sorted({cut * size >> 16 for cut in cuts} | {size})
        jobs = [
            (start, self.fresh(end - start), bool(durably >> number & 1))
            for number, (start, end) in enumerate(itertools.pairwise(bounds))
            if not gaps >> number & 1
        ]

        async def all_of_them(volume: Volume) -> None:
            async with trio.open_nursery() as nursery:
                for job in jobs:
                    nursery.start_soon(self.do_write, volume, *job)

        self.perform(all_of_them)

    @rule(at=fractions, length=lengths)
    def read_part(self, at: int, length: int) -> None:
        offset, length = self.place(at, length)

        async def read(volume: Volume) -> None:
            if not self.model.offline:
                handle = volume.open_replica()
                found = bytes(await handle.read(offset, length + 5))
                assert found == self.model.content[offset : offset + length + 5]
                handle.close()
            for number, content in self.model.points.items():
                point = volume.open_point(number)
                found = bytes(await point.read(offset, length + 5))
                assert found == content[offset : offset + length + 5]
                point.close()

        self.perform(read)

    @rule()
    def flush(self) -> None:
        async def do(volume: Volume) -> None:
            error = await attempt(flush(volume))
            assert (error is not None) == self.model.offline
            if error is None:
                self.model.synced()
            else:
                assert error.errno == errno.ENODEV

        self.perform(do)

    # -- administration ---------------------------------------------------------------------------

    @staticmethod
    def given_up(volume: Volume) -> int:
        """A number that a failure has used up is not used again."""
        return volume.protection.saved.given_up

    async def do_create(self, volume: Volume) -> None:
        self.flight.created = True
        error = await attempt(volume.create_point())
        assert (error is not None) == self.model.offline
        if error is None:
            newest = volume.points[-1].number
            assert newest == max(self.model.newest, self.given_up(volume)) + 1
            self.model.newest = newest
            self.model.points[newest] = bytes(self.model.content)
            self.model.synced()
        else:
            assert isinstance(error, VsnapError)
            assert error.code == "offline"
        self.flight.created = False

    @precondition(lambda self: len(self.model.points) < MAX_POINTS_HERE)
    @rule()
    def create(self) -> None:
        self.perform(self.do_create)

    async def do_delete(self, volume: Volume, number: int) -> None:
        self.flight.deleted = {number}
        await volume.delete_point(number)
        self.model.points.pop(number)
        self.flight.deleted = set()

    @precondition(lambda self: self.model.points)
    @rule(which=fractions)
    def delete(self, which: int) -> None:
        self.perform(self.do_delete, self.point(which))

    async def do_restore(self, volume: Volume, number: int) -> None:
        self.flight.restoring = number
        error = await attempt(volume.restore(number))
        self.flight.restoring = None
        if error is not None:
            # Refused before anything has changed: offline, or no room for what it overwrites.
            assert self.model.offline or error.errno == errno.ENOSPC
        else:
            assert not self.model.offline
            self.model.content = bytearray(self.model.points[number])
            self.model.synced()

    @precondition(lambda self: self.model.points and not self.model.offline)
    @rule(which=fractions)
    def restore(self, which: int) -> None:
        self.perform(self.do_restore, self.point(which))

    async def do_resize(self, volume: Volume, slots: int) -> None:
        area = volume.core.need_area()
        before, total = area.maximum, SMALLEST + slots * BLOCK
        error = await attempt(volume.resize(total))
        if error is None:
            assert area.maximum == total
            assert area.allocated <= total
        else:
            assert area.maximum == before
            too_small = area.layout.slots_in(total) < area.slots.in_use
            backing = area.backing
            waiting = volume.buffer.stuck is not None  # For `online`: what they need may lie there.
            assert too_small or waiting or (backing.is_device and total > backing.size())

    @rule(slots=st.sampled_from([0, 1, 5, 20, 70, 300]))
    def resize(self, slots: int) -> None:
        self.perform(self.do_resize, slots)

    @rule()
    def resize_to_what_is_used(self) -> None:
        """The smallest total that resize itself names is possible."""

        async def do(volume: Volume) -> None:
            area = volume.core.need_area()
            least = area.minimum_for_used
            error = await attempt(volume.resize(least))
            if error is not None and volume.buffer.stuck is None:
                raise error
            assert error is not None or area.allocated <= area.maximum == least

        self.perform(do)

    @precondition(lambda self: not self.model.offline)
    @rule(rarely=st.integers(0, 3))
    def go_offline(self, rarely: int) -> None:
        """Not often: most operations are refused then."""
        if rarely:
            return

        async def do(volume: Volume) -> None:
            await volume.go_offline()
            self.model.offline = True

        self.flight.switches = True
        self.perform(do)

    @precondition(lambda self: self.model.offline)
    @rule()
    def online(self) -> None:
        async def do(volume: Volume) -> None:
            await volume.online()
            self.model.offline, self.model.fault = False, None

        self.flight.switches = True
        self.perform(do)

    # -- the end of a process or of the machine ---------------------------------------------------

    @rule()
    def close_and_open(self) -> None:
        if self.rig.volume is None:
            return  # The end came before it was opened again.
        self.rig.close()
        if not self.model.offline:
            # A file that is cut off later is no harm: the superblock says how much counts.
            pending = self.rig.host.snapshot().pending()
            unsynced = {name for name, _, change in pending if change.data is not None}
            # An area that has failed, and cost all points, need not be closed cleanly.
            given_up = self.policy == "evict" and not self.model.points
            assert unsynced <= ({"area"} if given_up else set())
            self.model.synced()

    @rule()
    def killed(self) -> None:
        self.kill()

    def kill(self) -> None:
        self.rig.killed()
        if self.buffer:
            self.model.issued_again()

    @rule(how=st.sampled_from(["lost", "kept", "dice"]), seed=st.integers(0, 1 << 30))
    def power_failure(self, how: str, seed: int) -> None:
        self.crash(how, seed)

    @rule(
        after=st.one_of(st.integers(0, 20), st.integers(0, 60)),
        how=st.sampled_from(["kill", "damaged", "lost", "kept", "dice", "dice", "dice"]),
        seed=st.integers(0, 1 << 30),
    )
    def the_end_comes_during_the_next(self, after: int, how: str, seed: int) -> None:
        """The next operation ends after so many operations of the disk."""
        self.planned = after, how, seed

    planned: tuple[int, str, int] | None = None

    def crash(self, how: str, seed: int) -> None:
        dice = random.Random(seed)
        choose = {"lost": nothing_kept, "kept": everything_kept, "dice": by_dice(dice.choice)}[how]
        self.rig.crashed(choose)
        self.model.accept(raw_replica(self.rig))

    @precondition(lambda self: self.planned is None)
    @rule(number=st.integers(0, 1 << 20), close=st.booleans())
    def damaged_for_a_while(self, number: int, close: bool) -> None:
        """Part of the area cannot be seen in one opening, and is there again in the next."""
        if self.rig.volume is None:
            return
        if close:
            self.rig.close()
            if not self.model.offline:
                self.model.synced()
        else:
            self.kill()
        self.damaged(number)

    @precondition(lambda self: self.planned is None and len(self.model.points) < MAX_POINTS_HERE)
    @rule(
        places=st.lists(fractions, min_size=1, max_size=5),
        after=st.integers(0, 14),
        number=st.integers(0, 1 << 20),
    )
    def damaged_after_a_kill(self, places: list[int], after: int, number: int) -> None:
        """Killed while writes are carried out, of which some have overwritten their blocks."""
        self.perform(self.do_create)  # So that there is something to preserve.

        async def write_and_die(volume: Volume) -> None:
            for at in places:
                await self.do_write(volume, *self.some(at))
            self.rig.host.stop_at = self.rig.host.operations + after
            with contextlib.suppress(OSError):
                await volume.buffer.drain()
            self.after(volume)

        with contextlib.suppress(PowerLoss):
            self.rig.run(write_and_die)
        self.kill()
        self.damaged(number)

    def some(self, at: int) -> tuple[int, bytes]:
        offset, length = self.place(at, BLOCK)
        return offset, self.fresh(length)

    def damaged(self, number: int) -> None:
        """Of a volume that nobody has open: meanwhile nothing is carried out by anybody, and a
        point shows what it holds or EIO; afterwards all is as it was.
        """
        rig = self.rig
        undo = by_number(rig, number)
        before = raw_replica(rig), {k: bytes(v) for k, v in rig.host.memory.items()}

        async def look(volume: Volume) -> bool:
            assert not volume.protection.is_online
            for point in volume.points:
                wanted = self.model.points.get(point.number)
                handle = volume.open_point(point.number)
                for at in range(0, volume.size, BLOCK):
                    with contextlib.suppress(OSError):
                        found = bytes(await handle.read(at, BLOCK))
                        assert wanted is None or wanted[at : at + BLOCK] == found, "newer bytes"
                handle.close()
            error = await attempt(volume.online())
            assert isinstance(error, VsnapError)
            assert error.code == "no-way-online"
            fault = volume.protection.fault
            by_now = fault is not None and fault.code is FaultCode.META_DATA_CORRUPTION
            return by_now and self.model.fault is None

        by_damage = rig.run(look)
        assert (raw_replica(rig), {k: bytes(v) for k, v in rig.host.memory.items()}) == before
        self.kill()
        undo()

        async def back(volume: Volume) -> None:
            await volume.online()
            if self.model.offline:  # By hand, which fault 3 had taken the place of.
                await volume.go_offline()

        if by_damage:
            rig.run(back)

    # -- how every rule runs ----------------------------------------------------------------------

    def perform(self, work: Callable[..., Any], *args: Any) -> None:
        if self.planned is None:
            self.rig.run(work, *args)
            self.flight = InFlight()
            return
        after, how, seed = self.planned
        self.planned = None

        async def nothing(_volume: Volume) -> None:
            return None

        self.rig.run(nothing)  # Opened before: the end comes during the operation.
        self.compare()
        self.rig.host.stop_at = self.rig.host.operations + after
        with contextlib.suppress(PowerLoss):
            self.rig.run(work, *args)
        if how in ("kill", "damaged"):
            self.kill()
            if how == "damaged":
                self.damaged(seed)
            found = self.rig.run(self.seen)
            for offset, data in self.flight.writes:
                if found[offset : offset + len(data)] == data:
                    self.model.written(offset, data)
            if self.flight.restoring is None:
                assert found == self.model.content
        elif self.flight.restoring is None:
            self.crash(how, seed)
        else:
            dice = random.Random(seed)
            self.rig.crashed(by_dice(dice.choice) if how == "dice" else everything_kept)
        self.settle(how)

    async def seen(self, volume: Volume) -> bytes:
        return acknowledged(self.rig, volume)

    def settle(self, how: str) -> None:
        """After an interrupted operation: what it may have done, it has done wholly or not."""
        flight, self.flight = self.flight, InFlight()

        async def look(volume: Volume) -> None:
            model, protection = self.model, volume.protection
            live = [point.number for point in volume.points]
            number = max(model.newest, self.given_up(volume)) + 1
            if flight.created and number in live:
                model.newest = number
                model.points[number] = bytes(model.content)
            if flight.created:
                model.newest = volume.core.need_area().superblock.epoch
            for number in flight.deleted - set(live):
                del model.points[number]
            if self.policy == "evict" and flight.writes:
                gone = [number for number in model.points if number not in live]
                assert not live or not gone or max(gone) < min(live)
                for number in gone:
                    del model.points[number]
            if flight.switches:
                model.offline = not protection.is_online
                model.fault = int(protection.fault.code) if protection.fault else None
            elif flight.writes:
                self.after(volume)  # The write may have tripped a fault that nobody was told of.
            if flight.restoring is not None:
                actual = raw_replica(self.rig)
                if actual == model.points[flight.restoring] and actual != model.content:
                    model.content = bytearray(actual)
                    model.synced()
                elif how not in ("kill", "damaged"):
                    model.accept(actual)
                # Killed before it began: what was not synced is so still.

        self.rig.run(look)

    @invariant()
    def compare(self) -> None:
        if not hasattr(self, "rig") or self.planned is not None:
            return

        async def all_of_it(volume: Volume) -> None:
            model = self.model
            self.after(volume)
            self.lost(volume)
            volume.check_invariants()
            assert volume.protection.is_online == (not model.offline)
            assert (volume.protection.fault is not None) == (model.fault is not None)
            found = await read_points(volume)
            assert sorted(found) == sorted(model.points)
            for number, content in model.points.items():
                assert found[number] == content, f"point {number} differs"
            if model.offline:
                with pytest.raises(OSError) as caught:
                    await read_replica(volume)
                assert caught.value.errno == errno.ENODEV
            else:
                assert await read_replica(volume) == model.content
            assert acknowledged(self.rig, volume) == model.content
            area = volume.status()["diff_area"]
            assert area["used"] <= area["allocated"] <= area["maximum"]

        self.rig.run(all_of_it)


class EvictingMachine(VolumeMachine):
    policy = "evict"


class BufferedMachine(VolumeMachine):
    buffer = 64 * 1024


class EvictingBufferedMachine(VolumeMachine):
    policy = "evict"
    buffer = 64 * 1024


def _run(machine: type[VolumeMachine], steps: int) -> None:
    phases = [phase for phase in Phase if phase.name != "explain"]
    run_state_machine_as_test(machine, settings=settings(stateful_step_count=steps, phases=phases))


@pytest.mark.time_limit(900)
def test_any_sequence_agrees_with_the_model_when_writes_are_buffered() -> None:
    """With a write buffer nothing acknowledged is lost by a kill, and no point changes a bit."""
    _run(BufferedMachine, 40)


@pytest.mark.time_limit(900)
def test_any_sequence_agrees_with_the_model_when_buffered_and_evicted() -> None:
    """With a write buffer and policy evict, writes go on and the points that stay are exact."""
    _run(EvictingBufferedMachine, 30)


@pytest.mark.time_limit(900)
def test_any_sequence_of_operations_and_crashes_agrees_with_the_model() -> None:
    """Policy offline: whatever is done and whenever it ends, no recovery point changes a bit."""
    _run(VolumeMachine, 40)


@pytest.mark.time_limit(900)
def test_any_sequence_agrees_with_the_model_when_old_points_are_evicted() -> None:
    """Policy evict: writes go on, the oldest points go, and those that stay are exact."""
    _run(EvictingMachine, 40)
