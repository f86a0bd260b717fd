"""Engines broken on purpose, continued: the write buffer, writes with O_DSYNC. See `mutants`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vsnapfs.volume import buffer, core
from vsnapfs.volume.buffer import WriteBuffer
from vsnapfs.volume.core import SharedSync
from vsnapfs.volume.handles import ReplicaHandle, SynchronousHandle
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


RING_MUTANTS: dict[Callable[[Patch], None], str] = {
    acknowledged_is_overwritten_at_once: "buffered: A carry-out",
    flush_forgets_the_buffer: "buffered: A flush",
    what_a_kill_left_is_not_carried_out: "buffered: A",
    records_are_released_before_they_are_there: "buffered: at-once flush",
    records_are_never_released: "buffered: A carry-out A",
    capacity_that_is_not_rounded: "buffered: A create A create A create A create A",
    o_dsync_without_its_flush: "fresh: AB-durably",
    o_dsync_does_not_wait_for_the_buffer: "buffered: A AB-durably",
    a_sync_covers_who_comes_during_it: "fresh: at-once-durably",
}
RING_WHILE_LOOKING = (what_a_kill_left_is_not_carried_out,)
