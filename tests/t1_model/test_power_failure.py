"""Power fails at every instant of short workloads, with every subset of the unsynced writes.

The second half breaks the engine on purpose, one ordering at a time: a search that does not find
these would find nothing.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any
from unittest import mock

import pytest
import trio
from powercuts import TEARS, Story, Violation, subset
from rig import BLOCK, SMALLEST, Rig, small_steps

from vsnapfs.diffarea.area import DiffArea
from vsnapfs.diffarea.layout import SUPERBLOCK_OFFSETS
from vsnapfs.diffarea.recovery import _Scan
from vsnapfs.volume.copying import Preserved
from vsnapfs.volume.handles import ReplicaHandle, SynchronousHandle
from vsnapfs.volume.points import Points
from vsnapfs.volume.writer import Batch, Writer

Workload = Callable[[Story], Awaitable[None]]
SIZE = 3 * BLOCK + 700


# --- the workloads -------------------------------------------------------------------------------


async def overwriting(story: Story) -> None:
    """Points, overwrites of whole and part blocks, a slot that is used again."""
    await story.write_block(0, 4)
    await story.create()
    await story.write(BLOCK - 100, 300)
    await story.flush()
    await story.write_block(2)
    await story.create()
    await story.write_block(0, 2)
    await story.delete(1)
    await story.write_block(3)
    await story.create()
    await story.write(10, 20)


async def at_once(story: Story) -> None:
    """Several writers in one batch and in the next, two of them in one block."""
    await story.write_block(0, 4)
    await story.create()
    async with trio.open_nursery() as nursery:
        for block in range(3):
            nursery.start_soon(story.write, block * BLOCK, 1000)
            nursery.start_soon(story.write, block * BLOCK + 2048, 600)
    await story.create()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(story.write, 0, BLOCK + 5)
        nursery.start_soon(story.write, BLOCK + 512, 3)


async def deleting(story: Story) -> None:
    """Oldest, middle and newest points go; what they leave is used again."""
    await story.write_block(0, 4)
    for _ in range(3):
        await story.create()
        await story.write_block(0, 2)
    await story.delete(2)
    await story.write_block(0)
    await story.delete(1)
    await story.create()
    await story.write_block(0, 3)
    await story.delete(4)
    await story.write_block(1, 2)
    await story.delete(3)


async def restoring(story: Story) -> None:
    """Back to the newest point, a write, back to an older one (the defect DPM has)."""
    await story.write_block(0, 4)
    await story.create()
    await story.write_block(0, 2)
    await story.create()
    await story.write_block(1)
    await story.restore(2)
    await story.write_block(3)
    await story.restore(1)


async def resizing(story: Story) -> None:
    """The area grows in the middle of writing and shrinks with copies above the cut."""
    await story.write_block(0, 4)
    for _ in range(10):
        await story.create()
        await story.write_block(0, 4)
    for number in range(1, 6):
        await story.delete(number)
    await story.resize(SMALLEST)
    await story.write_block(0, 4)
    await story.create()
    await story.resize(SMALLEST + 20 * BLOCK)
    await story.write_block(0, 3)


async def filling(story: Story) -> None:
    """The area fills up, the volume goes offline, space is made, it comes back."""
    await story.write_block(0, 4)
    for _ in range(9):
        await story.create()
        await story.write_block(0, 4)
    await story.delete(3)
    await story.online()
    await story.write_block(0, 4)
    await story.offline()
    await story.online()


async def durably(story: Story) -> None:
    """Writes through handles with O_DSYNC, beside others and in one block with them."""
    await story.write(0, 700, durably=True)
    await story.write_block(0, 4)
    await story.create()
    await story.write(100, BLOCK, durably=True)
    async with trio.open_nursery() as nursery:
        for block in range(3):
            nursery.start_soon(partial(story.write, block * BLOCK, 900, durably=True))
            nursery.start_soon(story.write, block * BLOCK + 1000, 600)
    await story.write(0, 512, durably=True)
    await story.write(2 * BLOCK + 5, 100)


WORKLOADS: dict[Workload, dict[str, Any]] = {
    overwriting: {},
    at_once: {},
    deleting: {},
    restoring: {},
    resizing: {"maximum": SMALLEST + 64 * BLOCK},
    filling: {"maximum": SMALLEST},
    durably: {"buffer": 64 << 10},
}


#: Those that are short enough for every run.
FIRST = (overwriting, durably)


def tell(workload: Workload, **options: Any) -> Story:
    return Story(Rig(size=SIZE, **{**WORKLOADS[workload], **options})).run(workload)


@pytest.mark.time_limit(600)
@pytest.mark.parametrize(
    "workload",
    [
        pytest.param(workload, marks=() if workload in FIRST else pytest.mark.slow)
        for workload in WORKLOADS
    ],
    ids=[workload.__name__ for workload in WORKLOADS],
)
def test_no_power_failure_changes_a_recovery_point(workload: Workload) -> None:
    """W2, W4: at every instant, with any of the unsynced writes lost, kept or torn, all points
    are exact afterwards, and so is everything flushed.
    """
    with small_steps():
        tried = tell(workload).explore(again_every=50)
    print(f"{workload.__name__}: {tried} states")
    assert tried > 200


def test_a_second_power_failure_while_the_first_is_repaired_leaves_a_superblock() -> None:
    """A commit never writes over the only good copy of the superblock."""
    rig = Rig()

    async def prepare(story: Story) -> None:
        await story.write_block(0)
        await story.create()

    story = Story(rig).run(prepare)
    torn_second = [
        (snapshot, expected, last)
        for snapshot, expected, last in story.states
        if last is not None
        and last[0] == "area"
        and snapshot.change(last).offset == SUPERBLOCK_OFFSETS[1]
    ]
    assert torn_second
    for snapshot, expected, last in torn_second:
        once = snapshot.power_failure(subset([], {last: TEARS[1]}))
        story._fail_again(once, expected)


# --- the search must find an engine that is wrong ------------------------------------------------


def _no_sync_in_barrier(engine: pytest.MonkeyPatch) -> None:
    """Copies and descriptors are written, not made durable, before the block is overwritten."""
    barrier = DiffArea.barrier

    def broken(self: DiffArea, changes: Any) -> None:
        with mock.patch.object(self.backing, "sync"):
            barrier(self, changes)

    engine.setattr(DiffArea, "barrier", broken)


def _overwrite_before_the_barrier(engine: pytest.MonkeyPatch) -> None:
    """The barrier of a copy comes only with the next one, after the overwrite."""
    barrier, late = DiffArea.barrier, {}

    def broken(self: DiffArea, changes: Any) -> None:
        if self in late:
            barrier(self, late.pop(self))
        late[self] = dict(changes)

    engine.setattr(DiffArea, "barrier", broken)
    engine.setattr(Writer, "_record", _record_on_trust)


def _record_on_trust(self: Writer, area: DiffArea, batch: Batch, preserved: Preserved) -> None:
    for block, slot in preserved.places.items():
        area.index.add(block, area.superblock.epoch, slot)
        self._core.preserved.add(block)


def _newest_barrier_not_checked(engine: pytest.MonkeyPatch) -> None:
    """After an unclean stop the newest descriptors are believed without reading the data."""

    def broken(_self: _Scan, run: Any) -> Any:
        return run

    engine.setattr(_Scan, "_check_newest", broken)


def _superblocks_written_together(engine: pytest.MonkeyPatch) -> None:
    """Both copies of the superblock are written, then synced once."""
    sync, commit = DiffArea._sync, DiffArea.commit

    def broken(self: DiffArea, **changes: Any) -> None:
        calls: list[int] = []

        def second_only() -> None:
            calls.append(1)
            if len(calls) % 2 == 0:
                sync(self)

        with mock.patch.object(self, "_sync", second_only):
            commit(self, **changes)

    engine.setattr(DiffArea, "commit", broken)


def _slots_freed_before_the_commit_is_durable(engine: pytest.MonkeyPatch) -> None:
    """A deletion is answered, and its slots used again, before any superblock is synced."""
    commit = DiffArea.commit

    def broken(self: DiffArea, **changes: Any) -> None:
        if len(changes.get("points", ())) < len(self.superblock.points) and "points" in changes:
            with mock.patch.object(self.backing, "sync"):
                commit(self, **changes)
        else:
            commit(self, **changes)

    engine.setattr(DiffArea, "commit", broken)


def _point_without_sync_of_the_replica(engine: pytest.MonkeyPatch) -> None:
    """A point is taken while the replica it falls through to is not durable."""

    async def broken(_self: Points) -> None:
        await trio.lowlevel.checkpoint()

    engine.setattr(Points, "_sync_replica", broken)


def _second_writer_does_not_wait(engine: pytest.MonkeyPatch) -> None:
    """A block whose copy is on its way counts as preserved for whoever comes second."""
    join = Writer._join

    async def broken(self: Writer, blocks: Any, *rest: Any) -> Batch:
        for block in blocks:
            self._core.preserved.add(block)
        return await join(self, blocks, *rest)

    engine.setattr(Writer, "_join", broken)
    engine.setattr(Writer, "_record", _record_on_trust)


def _o_dsync_is_ignored(engine: pytest.MonkeyPatch) -> None:
    """A write through a handle with O_DSYNC is answered as soon as any other."""
    engine.setattr(SynchronousHandle, "write", ReplicaHandle.write)


MUTANTS: dict[Callable[[pytest.MonkeyPatch], None], Workload] = {
    _no_sync_in_barrier: overwriting,
    _overwrite_before_the_barrier: overwriting,
    _newest_barrier_not_checked: at_once,
    _superblocks_written_together: overwriting,
    _slots_freed_before_the_commit_is_durable: deleting,
    _point_without_sync_of_the_replica: overwriting,
    _second_writer_does_not_wait: at_once,
    _o_dsync_is_ignored: durably,
}


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__.strip("_"))
def test_the_search_finds_an_engine_that_is_wrong(
    mutant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each ordering that W2 and W4 rest on, undone, shows as a recovery point that changed, or as
    a write that is gone.
    """
    mutant(monkeypatch)
    with small_steps(), pytest.raises(Violation) as caught:
        tell(MUTANTS[mutant]).explore()
    print(caught.value)
