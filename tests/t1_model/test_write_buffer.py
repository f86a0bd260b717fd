"""The write buffer against a model: whatever was acknowledged is there, whenever the end comes.

One volume, one process, many small writes in flight, and an end (SIGKILL or power failure) before
any operation of the disk. What a reader sees in between is compared, too.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable
from typing import Any
from unittest import mock

import chance
import hypothesis.strategies as st
import pytest
import trio
from hypothesis import Phase, example, given, seed, settings
from powercuts import by_dice, everything_kept, nothing_kept
from rig import BLOCK, Rig, acknowledged, pattern, read_points, read_replica, small_steps
from simdisk import PowerLoss
from volume_model import Model

from vsnapfs.volume import Volume
from vsnapfs.volume.buffer import WriteBuffer
from vsnapfs.volume.ring import Ring
from vsnapfs.volume.writer import Writer

SIZE = 14 * BLOCK + 700
RING = 64 * 1024

places = st.integers(0, SIZE - 1)
lengths = st.sampled_from([1, 300, 512, 1000, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 5 * BLOCK])
writes = st.tuples(st.just("write"), places, lengths)
steps = st.one_of(
    writes,
    writes,
    writes,
    st.tuples(st.just("wait"), st.integers(0, 12), st.just(0)),
    st.tuples(st.just("flush"), st.just(0), st.just(0)),
    st.tuples(st.just("create"), st.just(0), st.just(0)),
    st.tuples(st.just("read"), places, lengths),
    st.tuples(st.just("delete"), st.integers(0, 5), st.just(0)),
    st.tuples(st.just("restore"), st.integers(0, 5), st.just(0)),
)
Step = tuple[str, int, int]


def same(found: bytes, wanted: bytes | bytearray) -> bool:
    """Compared here, not by pytest: where it says all it knows, it takes minutes to tell them."""
    return found == wanted


class Run:
    """One life of a volume: `steps` one after the other, writes without waiting for the disk."""

    def __init__(self, number: int) -> None:
        self.rig = Rig(size=SIZE, maximum=1 << 20, buffer=RING, seed=number * 1000)
        self.rig.host.cached = number % 3 == 0
        self.model = Model(SIZE)
        self.flight: list[tuple[int, bytes]] = []
        #: What a point that is being created holds.
        self.creating: bytes | None = None
        self.restoring: int | None = None
        self.deleting: int | None = None
        self.counter = 0

    async def begin(self, volume: Volume) -> None:
        """All written, one point."""
        await self.write(volume, 0, SIZE)
        await self.create(volume)

    async def steps(self, volume: Volume, todo: list[Step]) -> None:
        handle = volume.open_replica()
        for what, first, second in todo:
            if what == "write":
                await self.write(volume, first, min(second, SIZE - first))
            elif what == "wait":
                for _ in range(first):
                    await trio.lowlevel.checkpoint()
            elif what == "flush":
                # A handle of its own: a restore ends those that are open.
                flushing = volume.open_replica()
                await flushing.flush()
                flushing.close()
                self.model.synced()
            elif what == "create":
                await self.create(volume)
            elif what == "read":
                await self.read(volume, first, second)
            elif self.model.points:
                number = sorted(self.model.points)[first % len(self.model.points)]
                if what == "delete":
                    self.deleting = number
                    await volume.delete_point(number)
                    del self.model.points[number]
                    self.deleting = None
                else:
                    self.restoring = number
                    await volume.restore(number, force=True)
                    self.model.content[:] = self.model.points[number]
                    self.model.synced()
                    self.restoring = None
            volume.check_invariants()
        handle.close()

    async def write(self, volume: Volume, offset: int, length: int) -> None:
        self.counter += 1
        data = pattern(self.counter, length)
        self.flight.append((offset, data))
        self.model.about_to_write(offset, data)
        handle = volume.open_replica()
        await handle.write(offset, data)
        handle.close()
        self.model.written(offset, data)
        self.flight.clear()

    async def create(self, volume: Volume) -> None:
        self.creating = bytes(self.model.content)
        point = await volume.create_point()
        self.model.points[point.number] = self.creating
        self.model.synced()
        self.creating = None

    async def read(self, volume: Volume, offset: int, length: int) -> None:
        handle = volume.open_replica()
        found = bytes(await handle.read(offset, length))
        assert same(found, self.model.content[offset : offset + length])
        handle.close()

    async def compare(self, volume: Volume) -> None:
        assert volume.protection.is_online
        found = await read_points(volume)
        assert sorted(found) == sorted(self.model.points)
        for number, content in found.items():
            assert same(content, self.model.points[number])
        assert same(await read_replica(volume), self.model.content)
        assert same(acknowledged(self.rig, volume), self.model.content)


def play(number: int, todo: list[Step], after: int | None, how: str) -> None:
    """Run `todo`; after so many operations of the disk the end comes (None: when all is done)."""
    run = Run(number)
    rig = run.rig
    rig.run(run.begin)
    if after is not None:
        rig.host.stop_at = rig.host.operations + after
    with contextlib.suppress(PowerLoss):
        rig.run(run.steps, todo)
    if how == "kill":
        rig.killed()
        rig.run(lambda volume: learn(run, volume))
    else:
        dice = random.Random(number)
        choose = {"lost": nothing_kept, "kept": everything_kept, "dice": by_dice(dice.choice)}
        rig.crashed(choose[how])
        rig.run(lambda volume: learn(run, volume))
    # What was there once stays: also in a second life, with a clean end.
    rig.run(run.compare)
    rig.run(run.steps, todo[:6])
    rig.run(run.compare)
    rig.close()
    assert not rig.host.memory
    rig.run(run.compare)
    rig.close()
    assert not [params for _, event, params in rig.log.events if event in (1043, 1044)]


async def learn(run: Run, volume: Volume) -> None:
    """After the end: what was under way may have been done, everything else is exact."""
    model, found = run.model, bytearray(acknowledged(run.rig, volume))
    live = [point.number for point in volume.points]
    if run.creating is not None and live and live[-1] not in model.points:
        model.points[live[-1]] = run.creating
    if run.deleting is not None and run.deleting not in live:
        del model.points[run.deleting]
    run.creating = run.deleting = None
    if run.restoring is not None:
        if found == model.points[run.restoring]:
            model.content, model.unsynced = found, {}
            run.restoring = None
            return
        run.restoring = None
    if run.rig.host.boot > 1:
        model.accept(bytes(found))
    else:
        # Killed: sector by sector, what was acknowledged or, of a write under way, that.
        allowed = Model(len(found))
        allowed.content = bytearray(model.content)
        for offset, data in run.flight:
            allowed.about_to_write(offset, data)
        allowed.accept(bytes(found))
        model.content = found
    run.flight.clear()


SETTINGS = settings(phases=[Phase.explicit, Phase.reuse, Phase.generate, Phase.target])


def explored(play: Callable[..., None], examples: int, start: int = 7) -> None:
    """Hypothesis over `play`, from the seed `start`."""

    @seed(start)
    @settings(SETTINGS, max_examples=examples, database=None)
    # A model that listed what a power failure may leave grew to 24 GB over writes like these.
    @example(
        number=0,
        todo=[("write", 512 + 37 * n % 500, 1) for n in range(40)],
        after=None,
        how="dice",
    )
    @given(
        number=st.integers(0, 1 << 20),
        todo=st.lists(steps, min_size=8, max_size=30),
        after=st.one_of(st.none(), st.integers(0, 60), st.integers(0, 400)),
        how=st.sampled_from(["kill", "kill", "lost", "kept", "dice"]),
    )
    def test(number: int, todo: list[Step], after: int | None, how: str) -> None:
        with small_steps():
            play(number, todo, after, how)

    test()


@pytest.mark.time_limit(600)
def test_what_was_acknowledged_is_there_whenever_the_end_comes() -> None:
    """W2, W3, W4 with buffered writes: kills and power failures before any disk operation."""
    explored(play, 4 * settings.default.max_examples, chance.seed(7))


async def _nothing(*_args: Any, **_options: Any) -> None:
    return None


def _release_without_cursor(self: Ring, record: Any) -> None:
    self._start = record.end


async def _preserve_nothing(*_args: Any) -> None:
    return None


def _head_first(self: Ring, offset: int, data: Any) -> Any:
    record = _append(self, offset, bytes(len(data)))
    if record is not None:
        self.memory[record.where : record.where + record.length] = data
    return record


_append = Ring.append

MUTANTS: dict[str, Callable[[], Any]] = {
    "an opening does not look for a ring": lambda: mock.patch.object(
        WriteBuffer, "adopt", _nothing
    ),
    "readers do not look into the ring": lambda: mock.patch.object(
        WriteBuffer, "capture", return_value=[]
    ),
    "nobody waits until the ring is empty": lambda: mock.patch.object(
        WriteBuffer, "drain", _nothing
    ),
    "what was carried out is found again": lambda: mock.patch.object(
        Ring, "release", _release_without_cursor
    ),
    "a newer write does not wait for an older one": lambda: mock.patch.object(
        WriteBuffer, "touches", return_value=False
    ),
    "blocks are overwritten without a copy": lambda: mock.patch.object(
        Writer, "preserve_acknowledged", _preserve_nothing
    ),
    "a head is written before its data": lambda: mock.patch.object(Ring, "append", _head_first),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTANTS)
def test_a_buffer_that_breaks_a_rule_is_found(name: str) -> None:
    """Each rule of the ring, broken on purpose.

    Worker threads take part, and on a busy machine one search can miss what the next one finds.
    """
    with MUTANTS[name](), pytest.raises(BaseException) as caught:
        for start in range(7, 12):
            explored(play, 400, start)
    assert not isinstance(caught.value, KeyboardInterrupt)
