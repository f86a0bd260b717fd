"""Engines broken on purpose, one ordering rule each. The explorer must find every one of them.

A mutant takes a `patch(owner, name, replacement)` and breaks one rule of the order in which things
become durable (docs/durability.md, and the rules of the format). `MUTANTS` names with each a
workload that needs the rule; nothing else about the workload is known to the search.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import trio

from vsnapfs.diffarea.area import DiffArea
from vsnapfs.diffarea.recovery import _Scan
from vsnapfs.errors import FaultError
from vsnapfs.volume.copying import Preserved
from vsnapfs.volume.core import Core, WriteGate
from vsnapfs.volume.points import Points
from vsnapfs.volume.protection import Protection
from vsnapfs.volume.statefile import StateFile
from vsnapfs.volume.volume import Volume
from vsnapfs.volume.writer import Batch, Writer

from .ring_mutants import AFTER_A_KILL, RING_MUTANTS, Patch


@contextmanager
def _without_syncs(area: DiffArea) -> Iterator[None]:
    with mock.patch.object(area.backing, "sync"):
        yield


def no_sync_in_barrier(patch: Patch) -> None:
    """Copies and descriptors are written, not made durable, before the block is overwritten."""
    barrier = DiffArea.barrier

    def broken(self: DiffArea, changes: Any) -> None:
        with _without_syncs(self):
            barrier(self, changes)

    patch(DiffArea, "barrier", broken)


def _record_on_trust(self: Writer, area: DiffArea, batch: Batch, preserved: Preserved) -> None:
    for block, slot in preserved.places.items():
        area.index.add(block, area.superblock.epoch, slot)
        self._core.preserved.add(block)


def barrier_comes_late(patch: Patch) -> None:
    """The barrier of a copy comes only with the next one, after the overwrite."""
    barrier, late = DiffArea.barrier, {}

    def broken(self: DiffArea, changes: Any) -> None:
        if self in late:
            barrier(self, late.pop(self))
        late[self] = dict(changes)

    patch(DiffArea, "barrier", broken)
    patch(Writer, "_record", _record_on_trust)


def descriptors_before_their_blocks(patch: Patch) -> None:
    """The newest barrier is believed without reading the blocks it describes."""

    def broken(_self: _Scan, run: Any) -> Any:
        return run

    patch(_Scan, "_check_newest", broken)


def nothing_is_fresh(patch: Patch) -> None:
    """A sector does not say which of its descriptors the newest barrier wrote."""
    from vsnapfs.diffarea.descriptors import SectorImage

    seal = SectorImage.seal

    def broken(self: SectorImage, area_id: int, barrier: int, sector: int, _fresh: int) -> None:
        seal(self, area_id, barrier, sector, 0)

    patch(SectorImage, "seal", broken)


def superblocks_written_together(patch: Patch) -> None:
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

    patch(DiffArea, "commit", broken)


def second_superblock_not_synced(patch: Patch) -> None:
    """A commit answers when the second copy of the superblock is written, not durable."""
    sync, commit = DiffArea._sync, DiffArea.commit

    def broken(self: DiffArea, **changes: Any) -> None:
        calls: list[int] = []

        def first_only() -> None:
            calls.append(1)
            if len(calls) == 1:
                sync(self)

        with mock.patch.object(self, "_sync", first_only):
            commit(self, **changes)

    patch(DiffArea, "commit", broken)


def _is_deletion(area: DiffArea, changes: dict[str, Any]) -> bool:
    return "points" in changes and len(changes["points"]) < len(area.superblock.points)


def deletion_answered_before_it_is_durable(patch: Patch) -> None:
    """A deletion is answered, and its slots used again, before any superblock is synced."""
    commit = DiffArea.commit

    def broken(self: DiffArea, **changes: Any) -> None:
        if _is_deletion(self, changes):
            with _without_syncs(self):
                commit(self, **changes)
        else:
            commit(self, **changes)

    patch(DiffArea, "commit", broken)


def deletion_answered_after_one_copy(patch: Patch) -> None:
    """A deletion is answered after the first copy; the second is written, but not yet durable."""
    commit, sync = DiffArea.commit, DiffArea._sync

    def broken(self: DiffArea, **changes: Any) -> None:
        if not _is_deletion(self, changes):
            commit(self, **changes)
            return
        calls: list[int] = []

        def first_only() -> None:
            calls.append(1)
            if len(calls) == 1:
                sync(self)

        with mock.patch.object(self, "_sync", first_only):
            commit(self, **changes)

    patch(DiffArea, "commit", broken)


def commit_over_the_only_good_copy(patch: Patch) -> None:
    """A commit always begins with the first copy, even if the second one is bad."""
    check = DiffArea._check_not_overtaken

    def broken(self: DiffArea) -> list[int]:
        return sorted(check(self))

    patch(DiffArea, "_check_not_overtaken", broken)


def point_without_sync_of_the_replica(patch: Patch) -> None:
    """A point is taken while the replica it falls through to is not durable."""

    async def broken(_self: Points) -> None:
        await trio.lowlevel.checkpoint()

    patch(Points, "_sync_replica", broken)


def point_without_draining(patch: Patch) -> None:
    """A point is taken while writes are in flight."""

    class Open:
        async def __aenter__(self) -> None:
            return

        async def __aexit__(self, *_: object) -> None:
            return

    patch(WriteGate, "held", lambda _self, _seconds: Open())


def second_writer_does_not_wait(patch: Patch) -> None:
    """A block whose copy is on its way counts as preserved for whoever comes second."""
    join = Writer._join

    async def broken(self: Writer, blocks: Any, *rest: Any) -> Batch:
        for block in blocks:
            self._core.preserved.add(block)
        return await join(self, blocks, *rest)

    patch(Writer, "_join", broken)
    patch(Writer, "_record", _record_on_trust)


def flush_without_sync(patch: Patch) -> None:
    """A flush is answered although the replica was not synced."""
    patch(Core, "sync_replica", lambda _self: None)


def failed_sync_is_retried(patch: Patch) -> None:
    """A sync of the diff area that fails is tried again, until it "works"."""

    def broken(self: DiffArea) -> None:
        try:
            self.backing.sync()
        except OSError:
            self.backing.sync()

    patch(DiffArea, "_sync", broken)


def failed_flush_is_retried(patch: Patch) -> None:
    """A sync of the replica that fails is tried again, until it "works"."""

    def broken(self: Core) -> None:
        try:
            self.replica.sync()
        except OSError:
            self.replica.sync()

    patch(Core, "sync_replica", broken)


def failed_flush_forgets_nothing(patch: Patch) -> None:
    """After a failed flush the volume comes back with what the host's cache still shows."""

    def broken(self: Any) -> None:
        self.core.replica_failed, self.core.replica_error = False, None

    patch(Volume, "reopen_replica", broken)


def rollback_with_a_higher_number(patch: Patch) -> None:
    """What puts a failed barrier back looks newer than that barrier."""
    rollback = DiffArea.rollback

    def broken(self: DiffArea) -> None:
        before = self.barrier_number
        if self._suspects:
            self.barrier_number += 1
        try:
            rollback(self)
        except FaultError:
            self.barrier_number = before
            raise

    patch(DiffArea, "rollback", broken)


def no_rollback(patch: Patch) -> None:
    """What a failed barrier may have left on the disk stays there."""

    def broken(self: DiffArea) -> None:
        self._sync_failed = False
        self._suspects = {}
        self.barrier_number += 1

    patch(DiffArea, "rollback", broken)


def fault_not_in_the_state_file(patch: Patch) -> None:
    """A fault is answered although only the superblock was to remember it."""
    save = Protection.save

    def broken(self: Protection, **changes: Any) -> None:
        if not changes.get("offline"):
            save(self, **changes)

    patch(Protection, "save", broken)


def state_file_not_synced(patch: Patch) -> None:
    """The state file is written before the answer, but not made durable."""
    save = StateFile.save

    def broken(self: StateFile, state: Any) -> None:
        with mock.patch.object(self.backing, "sync"):
            save(self, state)

    patch(StateFile, "save", broken)


def fault_answered_before_it_is_written(patch: Patch) -> None:
    """Whoever tripped a fault is told at once; it is written down by and by."""

    async def broken(self: Protection) -> None:
        self._persisted.set()
        await trio.lowlevel.checkpoint()

    patch(Protection, "persist", broken)


def cut_before_the_commit(patch: Patch) -> None:
    """A shrink truncates first and commits the smaller size then."""
    cut = DiffArea.cut

    def broken(self: DiffArea, slots: int, maximum: int) -> None:
        self.backing.truncate(self.layout.size_of(slots))
        cut(self, slots, maximum)

    patch(DiffArea, "cut", broken)


def moves_not_durable(patch: Patch) -> None:
    """A shrink commits the smaller size before the copies further down are durable."""
    move = DiffArea.move_copies

    def broken(self: DiffArea, moves: Any) -> None:
        with _without_syncs(self):
            move(self, moves)

    patch(DiffArea, "move_copies", broken)
    patch(DiffArea, "clear_descriptors", lambda _self, _slots: None)


def restore_without_its_mark(patch: Patch) -> None:
    """A restore overwrites without having committed that it does."""
    commit = Core.commit

    async def broken(self: Core, **changes: Any) -> None:
        if changes.get("restoring"):
            changes.pop("restoring")
        await commit(self, **changes)

    patch(Core, "commit", broken)


def restore_ends_before_it_is_durable(patch: Patch) -> None:
    """A restore commits that it is done before the replica has been synced."""
    from vsnapfs.volume.restore import Restore

    write = Restore._write

    async def broken(self: Restore, *args: Any) -> None:
        with mock.patch.object(self._core, "sync_replica"):
            await write(self, *args)

    patch(Restore, "_write", broken)


def growth_before_its_tables(patch: Patch) -> None:
    """A growth is committed with its tables written, but not durable."""
    prepare = DiffArea.prepare_growth

    def broken(self: DiffArea, slots: int) -> None:
        with _without_syncs(self):
            prepare(self, slots)

    patch(DiffArea, "prepare_growth", broken)


def growth_without_tables(patch: Patch) -> None:
    """A growth is committed with tables that hold whatever was there."""
    patch(DiffArea, "_write_tables", lambda _self, _first, _end: None)


def given_up_not_recorded(patch: Patch) -> None:
    """Points are given up in memory; their blocks are overwritten without copies."""

    async def broken(_self: Protection, _number: int) -> None:
        await trio.lowlevel.checkpoint()

    patch(Protection, "record_given_up", broken)


def clean_before_the_replica_is(patch: Patch) -> None:
    """A clean close is recorded before the replica has been synced."""
    leave = Volume._leave

    async def broken(self: Volume) -> None:
        with mock.patch.object(self.core, "sync_replica"):
            await leave(self)

    patch(Volume, "_leave", broken)


def overwritten_before_it_is_refused(patch: Patch) -> None:
    """A write that spans blocks moves its first bytes before there is room for all copies."""
    preserve = Writer._preserve

    async def broken(
        self: Writer, session: int, blocks: list[int], offset: int, length: int
    ) -> None:
        for block in blocks:
            await preserve(self, session, [block], offset, length)
            start = max(offset, block * self._core.block_size)
            self._core.replica.write(start, b"!")

    patch(Writer, "_preserve", broken)


#: Rules of the order in which things are written: each with a workload that needs it.
MUTANTS: dict[Callable[[Patch], None], str] = {
    no_sync_in_barrier: "fresh: create A",
    barrier_comes_late: "fresh: create A AB",
    descriptors_before_their_blocks: "fresh: create at-once",
    nothing_is_fresh: "fresh: create A",
    superblocks_written_together: "fresh: create A",
    second_superblock_not_synced: "fresh: create create",
    deletion_answered_before_it_is_durable: "full: delete-oldest all",
    deletion_answered_after_one_copy: "full: delete-oldest create",
    commit_over_the_only_good_copy: "fresh: create",
    point_without_sync_of_the_replica: "fresh: A create",
    point_without_draining: "fresh: create create-while-writing",
    second_writer_does_not_wait: "fresh: create at-once",
    flush_without_sync: "fresh: A flush",
    rollback_with_a_higher_number: "two-sectors: create all-fails online",
    failed_sync_is_retried: "fresh: create at-once create AB-fails",
    failed_flush_is_retried: "fresh: AB A flush-fails",
    failed_flush_forgets_nothing: "fresh: AB A flush-fails online flush",
    no_rollback: "two-sectors: create all-fails online A",
    fault_not_in_the_state_file: "fresh: create AB-dies",
    state_file_not_synced: "fresh: create AB-dies",
    fault_answered_before_it_is_written: "full: create all",
    cut_before_the_commit: "grown: shrink",
    moves_not_durable: "grown: shrink",
    restore_without_its_mark: "fresh: create all restore",
    restore_ends_before_it_is_durable: "fresh: create A restore",
    growth_before_its_tables: "device: grow-a-group",
    growth_without_tables: "device: grow-a-group",
    given_up_not_recorded: "evict: AB AB-dies create AB-dies",
    clean_before_the_replica_is: "fresh: A reopen",
    overwritten_before_it_is_refused: "full: create all",
    **RING_MUTANTS,
}
#: Rules of the opening: broken where images are looked at.
WHILE_LOOKING = (
    descriptors_before_their_blocks,
    commit_over_the_only_good_copy,
    *AFTER_A_KILL,
)


@contextmanager
def broken_engine(mutant: Callable[[Patch], None]) -> Iterator[None]:
    """The engine with this one mutant in it."""
    with ExitStack() as stack:

        def patch(owner: Any, name: str, replacement: Any) -> None:
            stack.enter_context(mock.patch.object(owner, name, replacement))

        mutant(patch)
        yield
