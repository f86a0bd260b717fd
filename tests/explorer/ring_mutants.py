"""Engines broken on purpose, continued: the write buffer, writes with O_DSYNC. See `mutants`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

from vsnapfs.backing import FileId
from vsnapfs.diffarea.area import DiffArea
from vsnapfs.diffarea.store import AreaStore
from vsnapfs.diffarea.superblock import NO_RING, RingName
from vsnapfs.volume import buffer, core
from vsnapfs.volume.adoption import adopt
from vsnapfs.volume.buffer import WriteBuffer
from vsnapfs.volume.core import SharedSync
from vsnapfs.volume.handles import ReplicaHandle, SynchronousHandle
from vsnapfs.volume.points import Points
from vsnapfs.volume.protection import Protection
from vsnapfs.volume.ring import RECORDS, Record, Ring
from vsnapfs.volume.writer import Writer

Patch = Callable[[Any, str, Any], None]


def acknowledged_is_overwritten_at_once(patch: Patch) -> None:
    """What lies in the write buffer goes to the replica without a copy of what was there."""

    async def broken(self: Writer, *_: Any) -> None:
        return None

    patch(Writer, "preserve_acknowledged", broken)


def flush_forgets_the_buffer(patch: Patch) -> None:
    """A flush syncs the replica, not what was acknowledged and is not there yet."""

    async def broken(self: WriteBuffer, wanted: int | None = None) -> None:
        return None

    patch(WriteBuffer, "drain", broken)


def o_dsync_without_its_flush(patch: Patch) -> None:
    """A write through a handle with O_DSYNC is answered as any other."""
    patch(SynchronousHandle, "write", ReplicaHandle.write)


def o_dsync_does_not_wait_for_the_buffer(patch: Patch) -> None:
    """It syncs the replica while the write itself still lies in the write buffer."""

    async def broken(self: ReplicaHandle, _wanted: int | None) -> None:
        await self._volume.core.flush_replica()

    patch(SynchronousHandle, "_make_durable", broken)


def a_sync_covers_who_comes_during_it(patch: Patch) -> None:
    """Who needs a sync of the replica while one is under way is answered with that one."""

    async def broken(self: SharedSync) -> None:
        led = self._next
        if led is not None:
            await led.done.wait()
            return
        led = self._next = core._Round()
        await core.in_thread(self._sync)
        self._next = None
        led.done.set()

    patch(SharedSync, "__call__", broken)


def what_a_kill_left_is_not_carried_out(patch: Patch) -> None:
    """An opening takes over no ring."""
    patch(buffer, "adopt", lambda *_args, **_options: None)


def records_are_released_before_they_are_there(patch: Patch) -> None:
    """The ring forgets a batch before it has reached the replica."""
    write = WriteBuffer._write

    def broken(self: WriteBuffer, records: list[Record]) -> None:
        assert self.ring is not None
        self.ring.release(records[-1])
        write(self, records)

    patch(WriteBuffer, "_write", broken)


def records_are_never_released(patch: Patch) -> None:
    """The ring keeps what has been carried out: the next opening does it once more."""

    def broken(self: Ring, record: Record) -> None:
        self._start = record.end

    patch(Ring, "release", broken)


def capacity_that_is_not_rounded(patch: Patch) -> None:
    """A ring ends wherever its memory does."""
    make = Ring.__init__

    def broken(self: Ring, memory: Any, *args: Any, **options: Any) -> None:
        make(self, memory, *args, **options)
        self.capacity = len(memory) - RECORDS

    patch(Ring, "__init__", broken)


def a_failed_copy_holds_up_nothing(patch: Patch) -> None:
    """What was acknowledged overwrites its blocks, whatever became of their copies."""
    preserve = Writer.preserve_acknowledged

    async def broken(self: Writer, *args: Any) -> None:
        await preserve(self, *args)

    patch(Writer, "preserve_acknowledged", broken)


def given_up_in_memory_only(patch: Patch) -> None:
    """Points that acknowledged writes cost are gone for this process, and not on the disk."""
    forget = Points.forget_all

    async def commit(self: core.Core, **changes: Any) -> None:
        area = self.need_area()
        area.superblock = replace(area.superblock, **changes)

    async def broken(self: Points, *args: Any) -> Any:
        with (
            mock.patch.object(core.Core, "commit", commit),
            mock.patch.object(Protection, "record_given_up"),
        ):
            return await forget(self, *args)

    patch(Points, "forget_all", broken)


def carried_out_over_damage(patch: Patch) -> None:
    """An opening that cannot see all descriptors makes copies all the same."""
    patch(WriteBuffer, "hold", lambda _self, _error: None)
    patch(AreaStore, "require_sound", lambda _self: None)


def the_ring_is_lost_with_the_area(patch: Patch) -> None:
    """Giving up the points of a lost area does not ask the state file for the ring."""

    async def broken(_self: WriteBuffer) -> None:
        return

    patch(WriteBuffer, "rescue", broken)


def the_new_area_names_no_ring(patch: Patch) -> None:
    """A diff area made in the place of a lost one forgets what is still to be carried out."""
    format_it = DiffArea.format

    def broken(*args: Any, **options: Any) -> DiffArea:
        return format_it(*args, **options | {"ring": NO_RING})

    patch(DiffArea, "format", broken)


def what_cannot_be_used_is_lost(patch: Patch) -> None:
    """A ring that another user could carry out is given up by this one, unasked."""

    def broken(*args: Any, **_options: Any) -> Ring | None:
        return adopt(*args, give_up=True)

    patch(buffer, "adopt", broken)


def given_up_and_named_again(patch: Patch) -> None:
    """The superblock goes on naming a ring that was given up."""
    adopt_it = WriteBuffer.adopt

    async def broken(self: WriteBuffer, **options: Any) -> None:
        area = self._core.area
        before = area.superblock.ring if area is not None else NO_RING
        await adopt_it(self, **options)
        if area is not None and self.ring is None:
            commit = area.commit

            def named(**changes: Any) -> None:
                commit(**changes | ({"ring": before} if "clean" not in changes else {}))

            area.commit = named  # type: ignore[method-assign]

    patch(WriteBuffer, "adopt", broken)


def a_copy_takes_the_ring_for_its_own(patch: Patch) -> None:
    """Whose ring it is, nobody asks."""

    def broken(own: core.Core, store: Any, name: RingName, boot: bytes, **options: Any) -> Any:
        here = FileId(name.device, name.inode, 0, 0)
        with mock.patch.object(own.replica, "file_id", return_value=here):
            return adopt(own, store, name, boot, **options)

    patch(buffer, "adopt", broken)


RING_MUTANTS: dict[Callable[[Patch], None], str] = {
    acknowledged_is_overwritten_at_once: "buffered: A carry-out",
    flush_forgets_the_buffer: "buffered: A flush",
    what_a_kill_left_is_not_carried_out: "buffered: A",
    records_are_released_before_they_are_there: "buffered: at-once flush",
    records_are_never_released: "buffered: A carry-out A",
    capacity_that_is_not_rounded: "buffered: A create A create A create A create A",
    a_failed_copy_holds_up_nothing: "buffered: A carry-out-fails",
    given_up_in_memory_only: "buffered-evict: A carry-out-fails",
    carried_out_over_damage: "buffered: A flush",
    the_ring_is_lost_with_the_area: "buffered: A",
    the_new_area_names_no_ring: "buffered: A",
    what_cannot_be_used_is_lost: "buffered: A",
    given_up_and_named_again: "buffered: A",
    a_copy_takes_the_ring_for_its_own: "buffered: A",
    o_dsync_without_its_flush: "fresh: AB-durably",
    o_dsync_does_not_wait_for_the_buffer: "buffered: A AB-durably",
    a_sync_covers_who_comes_during_it: "fresh: at-once-durably",
}
#: Rules of the opening after a kill.
AFTER_A_KILL = (
    what_a_kill_left_is_not_carried_out,
    carried_out_over_damage,
    the_ring_is_lost_with_the_area,
    the_new_area_names_no_ring,
    what_cannot_be_used_is_lost,
    given_up_and_named_again,
    a_copy_takes_the_ring_for_its_own,
)
