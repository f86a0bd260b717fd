"""In-place restore: the replica becomes what a recovery point holds, through copy-on-write.

Owns the order that makes it safe. Everything that could refuse it comes first: the replica is not
open, every copy it needs verifies, every block it will overwrite has room for its own copy and no
hole under it. Then "restoring N" is committed, and only then written. Newer and older points
survive, because the writes preserve like any other. After a crash the next start goes on: the
plan is made again, and what is already restored compares equal and is skipped.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator

import numpy as np
import trio

from ..diffarea.area import DiffArea
from ..errors import BusyError, FaultCode, FaultError, VsnapError, unexpected
from ..patience import patient_for
from ..units import format_size
from .core import Core, Progress, in_thread
from .points import Points
from .policy import Policy
from .protection import Protection
from .room import Room
from .writer import Writer

_AT_ONCE = 256


def no_progress(_phase: str, _done: int, _total: int) -> None:
    """A progress callback for callers that have none."""


def as_fault(error: BaseException) -> FaultError:
    """What interrupts a restore takes the volume offline: fault 13 if it is none by itself."""
    if isinstance(error, FaultError):
        return error
    number = errno.EIO
    if isinstance(error, OSError | VsnapError):
        number = error.errno or errno.EIO
    elif isinstance(error, trio.TooSlowError):
        number = errno.ETIMEDOUT
    elif isinstance(error, Exception):
        return unexpected(error, None)
    text = f"a restore was interrupted: {str(error) or type(error).__name__}"
    return FaultError(FaultCode.IO_FAILURE, text, errno=number)


class Restore:
    """Restores an open volume in place."""

    def __init__(
        self,
        core: Core,
        protection: Protection,
        policy: Policy,
        room: Room,
        writer: Writer,
        points: Points,
    ) -> None:
        self._core = core
        self._protection = protection
        self._policy = policy
        self._room = room
        self._writer = writer
        self._points = points

    async def run(self, number: int, *, force: bool, progress: Progress | None) -> int:
        """Restore point `number`. Returns how many bytes differed and were written.

        BusyError while the replica is open, unless `force` (its handles then end as by a fault).
        VsnapError when a copy is damaged (EIO) or there is no room (ENOSPC): nothing has changed.
        """
        core, protection = self._core, self._protection
        async with core.admin.turn(f"restoring recovery point {number}"):
            protection.require_online("restoring")
            point = self._points.resolve(number)
            if core.open_replicas and not force:
                raise BusyError(
                    f"the replica of volume {core.name} is open or attached",
                    hint="Unmount what is on it and 'vsnapfs detach', or use --force "
                    "(what is open then gets ENODEV and must be opened anew).",
                )
            protection.restoring = True
            try:
                async with core.gate.held(core.config.hold_timeout):
                    with patient_for(core.config.hold_timeout):
                        await self._points.drained("restoring")
                    # The writes that were waited for may have evicted it.
                    point = self._points.resolve(point.number)
                    return await self._restore(point.number, progress or no_progress)
            except trio.TooSlowError:
                raise BusyError(f"volume {core.name}: writes in flight took too long") from None
            finally:
                protection.restoring = False
                core.changed()

    async def go_on(self) -> None:
        """Continue a restore that a crash interrupted. FaultError if it cannot be."""
        core, protection = self._core, self._protection
        number = core.need_area().superblock.restoring
        core.log.log("volsnap", 65, volume=core.name, point=number)
        protection.restoring = True
        try:
            async with core.gate.held(core.config.hold_timeout):
                todo = await in_thread(self._plan, number, no_progress)
                await self._write(number, todo, no_progress)
        finally:
            protection.restoring = False
            core.changed()

    async def _restore(self, number: int, progress: Progress) -> int:
        core = self._core
        area = core.need_area()
        todo = await in_thread(self._plan, number, progress)
        new = [block for block in todo if block not in core.preserved]
        room = area.slots.free + area.growable_slots
        if len(new) > room:
            missing = (len(new) - room) * core.block_size
            raise VsnapError(
                f"volume {core.name}: restoring recovery point {number} must preserve "
                f"{len(new)} blocks, there is room for {room}",
                hint=f"Enlarge the diff area by at least {format_size(missing)} "
                "('vsnapfs resize') or delete another point. Nothing was changed.",
                errno=errno.ENOSPC,
                code="no-room",
            )
        try:
            await self._grow_to_hold(len(new))
            await self._writer.fill_holes(todo, 0, core.size)
        except (FaultError, OSError) as error:
            raise VsnapError(
                f"volume {core.name}: there is not enough space to restore point {number}: {error}",
                hint="Make room on the host. Nothing was changed.",
                errno=error.errno or errno.ENOSPC,
                code="no-room",
            ) from error
        try:
            async with core.area_lock:
                if not self._protection.is_online:  # By a write or flush that was under way.
                    self._protection.require_online("restoring")
                core.admin.begin()
                # Nothing can refuse it any more: what was open until now is dead (forced), writes
                # wait.
                self._protection.session += 1
                await core.commit(restoring=number)
        except FaultError as error:
            await self._policy.failed(error, needed=len(new))
            raise VsnapError(
                f"volume {core.name}: point {number} was not restored: {error.message}",
                hint="'vsnapfs status' shows what became of the volume. Nothing was written."
                # One copy of the superblock says otherwise, perhaps; an opening would believe it.
                + " Should it be opened anew before it has been online, it may be found begun "
                "('restoring' in its status): 'online' goes on with it then." * area.in_doubt,
                errno=error.errno,
                exit_code=1 if self._protection.is_online else 3,
                code="fault",
            ) from error
        try:
            core.log.log("volsnap", 64, volume=core.name, point=number, count=len(todo))
            await self._write(number, todo, progress)
        except BaseException as error:
            if core.ending and isinstance(error, trio.Cancelled):
                # Nothing has failed. As after a kill the next opening goes on, and until then the
                # mark that has been committed keeps everybody out.
                raise
            # Whatever it was, a cancellation included, the replica is a mixture now: nobody may
            # have it before `online` has gone on with this.
            fault = as_fault(error)
            with trio.CancelScope(shield=True):
                await self._protection.trip(fault, needed=len(new))
            if not isinstance(error, Exception):
                raise
            raise VsnapError(
                f"volume {core.name}: restoring point {number} was interrupted: {fault.message}",
                hint="It goes on when the volume is online again ('vsnapfs online')."
                if area.superblock.restoring
                else "Nothing was changed. Bring the volume online ('vsnapfs online'), try again.",
                errno=fault.errno,
                exit_code=3,
                code="fault",
            ) from error
        return len(todo) * core.block_size

    async def _grow_to_hold(self, count: int) -> None:
        """`Room.grow_to_hold`. VsnapError if the volume goes offline before it could."""
        await self._room.grow_to_hold(count)
        if self._core.need_area().slots.free < count:
            self._protection.require_online("restoring")

    # -- planning: nothing is changed -----------------------------------------------------------

    def _plan(self, number: int, progress: Progress) -> list[int]:
        """In a worker thread: the blocks whose content differs, ascending. VsnapError (EIO)."""
        core = self._core
        area = core.need_area()
        todo: list[int] = []
        done = 0
        candidates = area.index.blocks_since(number)
        for blocks in _parts(candidates):
            wanted = _old_contents(area, number, blocks)
            for block, old in zip(blocks, wanted, strict=True):
                if old is None:
                    raise self._unreadable(number, block)
                offset = block * core.block_size
                length = min(core.block_size, core.size - offset)
                if bytes(core.replica.read(offset, length)) != old[:length]:
                    todo.append(block)
            done += len(blocks) * core.block_size
            progress("verify", done, len(candidates) * core.block_size)
        return todo

    def _unreadable(self, number: int, block: int) -> VsnapError:
        core = self._core
        core.log.log(
            "volsnap",
            61,
            volume=core.name,
            point=number,
            block=block,
            offset=block * core.block_size,
            length=core.block_size,
        )
        return VsnapError(
            f"volume {core.name}: recovery point {number} cannot be restored, its copy of block "
            f"{block} is damaged",
            hint="'vsnapfs verify' lists what is damaged, 'recovery-point export' saves the rest. "
            "Nothing was changed.",
            code="damaged",
        )

    # -- writing --------------------------------------------------------------------------------

    async def _write(self, number: int, todo: list[int], progress: Progress) -> None:
        """Overwrite `todo` with what point `number` holds, then commit the end of it."""
        core = self._core
        area = core.need_area()
        total = len(todo) * core.block_size
        for start in range(0, len(todo), _AT_ONCE):
            blocks = todo[start : start + _AT_ONCE]
            new = [block for block in blocks if block not in core.preserved]
            if new:
                await self._preserve(area, new)
            await in_thread(self._overwrite, area, number, blocks)
            progress("restore", (start + len(blocks)) * core.block_size, total)
        try:
            await core.flush_replica()
        except OSError as error:
            await self._protection.replica_sync_failed(error)
            raise VsnapError(
                f"volume {core.name}: the restored replica could not be synced: {error}",
                exit_code=3,
                code="fault",
            ) from error
        # Said before the mark is taken away: a kill in between says it twice, not never.
        core.log.log("volsnap", 66, volume=core.name, point=number, count=len(todo))
        async with core.area_lock:
            await core.commit(restoring=0)

    async def _preserve(self, area: DiffArea, blocks: list[int]) -> None:
        slots = area.slots.reserve(len(blocks))
        if slots is None:
            await self._grow_to_hold(len(blocks))
            slots = area.slots.reserve(len(blocks))
        if slots is None:
            raise self._room.full()
        self._room.promised.update(slots)
        await self._writer.preserve_now(blocks, slots)

    def _overwrite(self, area: DiffArea, number: int, blocks: list[int]) -> None:
        core = self._core
        for block, old in zip(blocks, _old_contents(area, number, blocks), strict=True):
            if old is None:
                raise self._unreadable(number, block)
            offset = block * core.block_size
            core.replica.write(offset, memoryview(old)[: min(core.block_size, core.size - offset)])


def _old_contents(area: DiffArea, number: int, blocks: list[int]) -> list[bytes | None]:
    """What point `number` holds at `blocks`, all of which have a copy for it."""
    copies = []
    for block in blocks:
        found = area.index.lookup(number, block)
        assert found is not None
        copies.append((block, *found))
    return [
        bytes(data) if data is not None and area.may_trust(number, copy[1]) else None
        for copy, data in zip(copies, area.read_copies(copies), strict=True)
    ]


def _parts(blocks: np.ndarray[tuple[int], np.dtype[np.uint64]]) -> Iterator[list[int]]:
    for start in range(0, len(blocks), _AT_ONCE):
        yield blocks[start : start + _AT_ONCE].tolist()
