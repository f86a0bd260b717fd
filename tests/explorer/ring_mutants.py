"""Engines broken on purpose, continued: the write buffer, writes with O_DSYNC. See `mutants`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vsnapfs.volume import core
from vsnapfs.volume.buffer import WriteBuffer
from vsnapfs.volume.core import SharedSync
from vsnapfs.volume.handles import ReplicaHandle, SynchronousHandle
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


RING_MUTANTS: dict[Callable[[Patch], None], str] = {
    acknowledged_is_overwritten_at_once: "buffered: A carry-out",
    flush_forgets_the_buffer: "buffered: A flush",
    o_dsync_without_its_flush: "fresh: AB-durably",
    o_dsync_does_not_wait_for_the_buffer: "buffered: A AB-durably",
    a_sync_covers_who_comes_during_it: "fresh: at-once-durably",
}
