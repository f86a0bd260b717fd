"""Revert chains: restore in place, write, restore an older one, a newer one, again and again.

Another system's in-place restore, newest point first and then an older one, destroyed the points in
between. Here every point must be bit-exact after every step, in every order, also when the machine
stops in the middle of a restore and goes on with it.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from contextlib import suppress

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from powercuts import by_dice, everything_kept, nothing_kept
from rig import (
    BLOCK,
    SMALLEST,
    Rig,
    flush,
    pattern,
    raw_replica,
    read_points,
    read_replica,
    small_steps,
    write,
)
from schedules import edited
from simdisk import PowerLoss

from vsnapfs.errors import VsnapError
from vsnapfs.volume import Volume
from vsnapfs.volume.restore import Restore

SIZES = (5 * BLOCK + 100, 4 * BLOCK, 3 * BLOCK + 1, 2 * BLOCK - 1, 1, BLOCK)


class Chain:
    """A volume whose points all differ, from each other and from the replica."""

    def __init__(self, size: int, points: int, seed: int = 0) -> None:
        self.size = size
        self.dice = random.Random(seed)
        self.rig = Rig(size=size, maximum=SMALLEST + 200 * BLOCK, seed=seed * 1000)
        self.content = bytearray(size)
        self.points: dict[int, bytes] = {}
        self.written = 0
        self.write(0, size)
        for turn in range(points):
            self.create()
            # Each point in its own way: a part, nothing, the short last block, everything.
            if turn % 4 == 0:
                self.write(size // 3, max(1, size // 2))
            elif turn % 4 == 2:
                self.write(max(0, size - 5), min(5, size))
            elif turn % 4 == 3:
                self.write(0, size)

    def write(self, offset: int, length: int) -> None:
        """Fresh bytes, as far as the replica goes."""
        self.written += 1
        data = pattern(self.written, min(length, self.size - offset))
        self.rig.run(write, offset, data)
        self.content[offset : offset + len(data)] = data

    def write_somewhere(self) -> None:
        """One write at a place that the seed chooses."""
        offset = self.dice.randrange(self.size)
        self.write(offset, self.dice.randrange(1, self.size + 1))

    def create(self) -> None:
        """A point of now."""

        async def do(volume: Volume) -> int:
            return (await volume.create_point()).number

        self.points[self.rig.run(do)] = bytes(self.content)

    def delete(self, number: int) -> None:
        """One point less."""

        async def do(volume: Volume) -> None:
            await volume.delete_point(number)

        self.rig.run(do)
        del self.points[number]

    def restore(self, number: int) -> None:
        """The replica becomes what the point holds."""

        async def do(volume: Volume) -> None:
            await volume.restore(number)

        self.rig.run(do)
        self.content = bytearray(self.points[number])

    def interrupted_restore(self, number: int, after: int, how: str, seed: int = 0) -> str:
        """A restore that ends after so many operations of the disk, by a kill or by power loss.

        The next opening goes on with it. "finished" (before the end came), "continued", "nothing".
        """

        async def do(volume: Volume) -> None:
            await volume.restore(number)

        async def nothing(_volume: Volume) -> None:
            return None

        # Opened before, and what was written is durable: the end comes during the restore.
        self.rig.run(flush)
        before, target = bytes(self.content), self.points[number]
        self.rig.host.stop_at = self.rig.host.operations + after
        finished = False
        with suppress(PowerLoss):
            self.rig.run(do)
            finished = True
        if how == "kill":
            self.rig.killed()
        else:
            dice = by_dice(random.Random(seed).choice)
            self.rig.crashed({"lost": nothing_kept, "kept": everything_kept}.get(how, dice))
        mixture = raw_replica(self.rig)
        for at in range(0, self.size, 512):
            part = slice(at, at + 512)
            assert mixture[part] in (before[part], target[part]), f"sector {at // 512}"
        self.rig.run(nothing)
        actual = raw_replica(self.rig)
        # Never a mixture: it was not begun, or it has been finished.
        assert actual in (before, target)
        assert not finished or actual == target
        self.content = bytearray(actual)
        if finished:
            return "finished"
        return "continued" if actual == target != before else "nothing"

    def exact(self) -> None:
        """Every point, the replica, and the engine's own account."""

        async def look(volume: Volume) -> None:
            volume.check_invariants()
            found = await read_points(volume)
            assert sorted(found) == sorted(self.points)
            for number, content in self.points.items():
                assert found[number] == content, f"point {number} has changed"
            assert await read_replica(volume) == self.content
            assert not volume.status()["restoring"]

        self.rig.run(look)

    def verified(self) -> None:
        """And after a clean close and a check of everything."""

        async def check(volume: Volume) -> None:
            result = await volume.verify()
            assert result["ok"], result["problems"]

        self.rig.close()
        self.rig.run(check)
        self.exact()


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("size", SIZES)
def test_every_order(size: int, count: int) -> None:
    """All points are restored, in every order, with a write after each: all exact at each step."""
    with small_steps():
        for order in itertools.permutations(range(1, count + 1)):
            chain = Chain(size, count)
            for number in order:
                chain.restore(number)
                chain.exact()
                chain.write(size // 2, size // 3 + 1)
                chain.exact()
            # And back to the first one, without a write in between.
            chain.restore(order[0])
            chain.restore(order[-1])
            chain.exact()
            chain.verified()


@pytest.mark.parametrize("size", SIZES)
def test_points_taken_on_the_way_are_exact_too(size: int) -> None:
    """Restore the newest, write, take a point, restore an older one, a newer one, the new one."""
    with small_steps():
        chain = Chain(size, 4)
        for number in (4, 2, 3, 1, 4):
            chain.restore(number)
            chain.write_somewhere()
            chain.create()
            chain.exact()
        for number in sorted(chain.points, reverse=True):
            chain.restore(number)
            chain.exact()
        for number in sorted(chain.points):
            chain.restore(number)
            chain.exact()
        chain.verified()


steps = st.one_of(
    st.tuples(st.just("restore"), st.integers(0, 7)),
    st.tuples(st.just("restore"), st.integers(0, 7)),
    st.tuples(st.just("write"), st.just(0)),
    st.tuples(st.just("create"), st.just(0)),
    st.tuples(st.just("delete"), st.integers(0, 7)),
    st.tuples(st.just("reopen"), st.just(0)),
    st.tuples(
        st.just("interrupted"),
        st.integers(0, 7),
        st.integers(0, 45),
        st.sampled_from(["kill", "lost", "kept", "dice"]),
    ),
)


@pytest.mark.time_limit(600)
@given(
    size=st.sampled_from(SIZES),
    seed=st.integers(0, 1 << 16),
    todo=st.lists(steps, min_size=5, max_size=16),
)
def test_any_chain(size: int, seed: int, todo: list[tuple[object, ...]]) -> None:
    """Whatever is restored after whatever, with stops in the middle: every point is exact."""
    with small_steps():
        chain = Chain(size, 3, seed)
        for what, *rest in todo:
            numbers = sorted(chain.points)
            which = numbers[int(str(rest[0])) % len(numbers)] if numbers else 0
            if what == "write":
                chain.write_somewhere()
            elif what == "create":
                if len(numbers) < 6:
                    chain.create()
            elif what == "reopen":
                chain.rig.close()
            elif not which:
                continue
            elif what == "restore":
                chain.restore(which)
            elif what == "delete":
                chain.delete(which)
            else:
                chain.interrupted_restore(which, int(str(rest[1])), str(rest[2]), seed)
            chain.exact()
        chain.verified()


class _EndsDuring(trio.abc.Instrument):
    """The server ends, and has waited for long enough, at the first step once a restore writes."""

    def __init__(self, volume: Volume) -> None:
        self._volume = volume
        self.scope = trio.CancelScope()

    def after_task_step(self, _task: trio.lowlevel.Task) -> None:
        """Called by trio."""
        if self._volume.core.need_area().superblock.restoring:
            self._volume.ends_now()
            self.scope.cancel()


def test_a_server_that_ends_during_a_restore_leaves_it_to_the_next() -> None:
    """Cancelled because the process ends, it is no fault: nobody gets at the mixture, and the next
    opening goes on with it by itself.
    """

    async def ended(volume: Volume) -> None:
        instrument = _EndsDuring(volume)
        trio.lowlevel.add_instrument(instrument)
        with instrument.scope:
            await volume.restore(1)
        trio.lowlevel.remove_instrument(instrument)
        assert instrument.scope.cancelled_caught
        assert volume.status()["restoring"]
        assert volume.status()["fault"] is None
        with pytest.raises(OSError, match="busy"):
            volume.open_replica()
        with pytest.raises(VsnapError, match="is being restored"):
            await volume.create_point()

    async def online(volume: Volume) -> None:
        assert volume.status()["state"] == "online"

    chain = Chain(5 * BLOCK + 100, 4, 1)
    chain.rig.run(ended)
    chain.rig.close()
    chain.content = bytearray(chain.points[1])
    chain.rig.run(online)
    chain.exact()


@pytest.mark.parametrize("how", ["kill", "lost", "kept", "dice"])
def test_a_restore_is_interrupted_at_every_instant(how: str) -> None:
    """Stopped before each operation of the disk, then continued; then an older and a newer one."""
    ends: Counter[str] = Counter()
    with small_steps():
        for after in itertools.count():
            chain = Chain(5 * BLOCK + 100, 4, after)
            end = chain.interrupted_restore(2, after, how, after)
            ends[end] += 1
            chain.exact()
            for number in (1, 3):
                chain.write_somewhere()
                chain.restore(number)
                chain.exact()
            if end == "finished":
                break
    print(f"{how}: {dict(ends)}")
    assert ends["nothing"] > 5, "never before it was begun"
    assert ends["continued"] > 5, "never in the middle"


def test_a_restore_that_copies_nothing_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The known defect, made on purpose: overwriting without preserving destroys newer points."""
    edited(monkeypatch, Restore, "_write", "if new:", "if False:")
    with small_steps(), pytest.raises(AssertionError, match="has changed"):
        chain = Chain(5 * BLOCK + 100, 4)
        chain.create()  # Falls through to the replica everywhere.
        for number in (4, 1, 3):
            chain.restore(number)
            chain.exact()
