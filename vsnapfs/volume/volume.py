"""A volume: one protected device, opened.

Owns opening, closing and the services that the layers above use; each method here is a short walk
to the part that does the work (`writer`, `reader`, `points`, `restore`, `resize`, `protection`).
All methods are to be called in the trio thread. Between `open` and `close`, `run` must be running
in a nursery: growth happens there.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import trio

from ..config import DEFAULT_WRITE_BUFFER, Durability, VolumeConfig
from ..diffarea.area import DiffArea
from ..diffarea.superblock import RecoveryPoint
from ..diffarea.verify import Verification
from ..errors import FaultCode, FaultError, VsnapError
from ..events import EventLog
from . import giveup, invariants, repair
from .account import Account, state_problem
from .buffer import WriteBuffer
from .core import Progress, in_thread
from .handles import PointHandle, ReplicaHandle
from .opening import Opened, check_replica, close_files, open_files
from .overlay import NoLog
from .points import Points
from .policy import Policy
from .protection import Protection, log_fault
from .reader import Reader
from .resize import Resize
from .restore import Restore, as_fault, no_progress
from .ring import NO_ID
from .room import Room
from .status import status_of
from .writer import Writer

#: How long closing waits for a growth of the diff area, at most.
_LAST_GROWTH_SECONDS = 30.0


class Volume:
    """See the module's note. `directory` is the volume's, `size` the replica's in bytes."""

    def __init__(self, opened: Opened, mountpoint: str | None) -> None:
        core = opened.core
        self.core = core
        self.mountpoint = mountpoint
        self.warnings = list(opened.warnings)
        #: What opening has brought back or found, as `repair` tells it.
        self.account = Account(opened)
        self.protection = Protection(core, opened.saved)
        self.policy = Policy(core, self.protection)
        self.room = Room(core, self.policy)
        self.buffer = WriteBuffer(core, self.protection, opened.store, opened.buffer_size)
        self.points_service = Points(core, self.protection, self.policy, self.room, self.buffer)
        self.writer = Writer(core, self.protection, self.policy, self.room, self.buffer)
        self.reader = Reader(core, self.buffer)
        self._restore = Restore(
            core, self.protection, self.policy, self.room, self.writer, self.points_service
        )
        self._resize = Resize(core, self.protection, self.room, self.buffer)
        self._stop = trio.Event()
        self._stopped = trio.Event()
        self._stopped.set()
        self._closed = False

    @property
    def directory(self) -> Path:
        """The volume's directory, absolute."""
        return Path(self.core.name)

    @property
    def config(self) -> VolumeConfig:
        """What was chosen in volume.toml."""
        return self.core.config

    @property
    def log(self) -> EventLog:
        """The event log."""
        return self.core.log  # type: ignore[return-value]

    @property
    def size(self) -> int:
        """Bytes of the replica and of every recovery point."""
        return self.core.size

    @property
    def block_size(self) -> int:
        """Bytes of a block."""
        return self.core.block_size

    @property
    def points(self) -> list[RecoveryPoint]:
        """The live recovery points, oldest first."""
        return list(self.core.points)

    @property
    def suspect(self) -> int:
        """Points up to this number lived through a power failure with durability "process"."""
        return self.core.area.superblock.suspect if self.core.area else 0

    # -- opening and closing --------------------------------------------------------------------

    @classmethod
    async def open(
        cls,
        directory: Path | str,
        *,
        accept_changed_replica: bool = False,
        mountpoint: str | None = None,
        dry_run: bool = False,
        durability: Durability | None = None,
        write_buffer: int = DEFAULT_WRITE_BUFFER,
    ) -> Volume:
        """Open and lock the volume in `directory`.

        dry_run: nothing reaches the disk, whatever is done with it, and no restore is continued.
        durability: other than volume.toml says. write_buffer: bytes of shared memory, 0 for none.
        mountpoint: where it is going to be served, None for a single command. Opens offline when
        something is wrong with the diff area (see `opening`). VsnapError, BusyError ("busy"),
        FormatError; nothing has changed then.
        """
        make_log: Any = NoLog if dry_run else EventLog
        opened = await in_thread(partial(open_files, Path(directory), make_log, dry_run=dry_run))
        opened.core.dry_run = dry_run
        opened.buffer_size = write_buffer
        opened.core.durability = durability or opened.core.config.durability
        try:
            return await cls.from_opened(opened, accept_changed_replica, mountpoint)
        except BaseException:
            close_files(opened.core)
            opened.core.log.close()  # type: ignore[attr-defined]
            raise

    @classmethod
    async def from_opened(
        cls, opened: Opened, accept_changed_replica: bool = False, mountpoint: str | None = None
    ) -> Volume:
        """The second half of `open`: judge what was found. Tests start here."""
        volume = cls(opened, mountpoint)
        # With a fault found at open (an old diff area put back, say) what the superblock says of
        # the replica is no reason to doubt the replica, and the volume is offline anyway.
        changed = None if opened.fault else check_replica(opened.core, accept_changed_replica)
        if changed:
            volume.warnings.append(changed)
        await volume.buffer.adopt()
        await volume._judge(opened)
        await volume._heal_state()
        if mountpoint is not None:
            volume.log.log("vsnapfs", 1001, volume=volume.core.name, what=mountpoint)
        return volume

    async def _judge(self, opened: Opened) -> None:
        """Decide whether the volume is online, and make what was recovered durable."""
        protection, area = self.protection, opened.core.area
        if area is not None:
            area.relaxed = self.core.durability == "process"
        if area is not None and opened.fault is None:
            self._remember_preserved(area)
            recorded = area.superblock.fault
            if recorded is not None and protection.is_online:
                # The state file was lost or is older: offline if either says so.
                protection.fault, protection.is_online = recorded, False
            try:
                await self._finish_recovery(opened)
                if protection.fault and protection.fault.code is FaultCode.DIFF_AREA_MISSING:
                    await self.buffer.try_again()
                    await protection.come_online()
                elif protection.is_online:
                    await self.buffer.try_again()
            except FaultError as error:
                await self._offline_at_open(error)
            except OSError:
                # Acknowledged writes could not be carried out: that has been a fault already.
                await protection.recorded()
        elif opened.fault is not None:
            if area is not None:
                self._remember_preserved(area)
            if opened.report is not None:
                self._log_healed(text for text in opened.report.healed if "superblock" not in text)
            await self._offline_at_open(opened.fault)

    def _remember_preserved(self, area: DiffArea) -> None:
        points = area.superblock.points
        if points:
            for blocks in area.index.parts_since(points[-1].number):
                self.core.preserved.update(blocks)

    async def _finish_recovery(self, opened: Opened) -> None:
        core, report = self.core, opened.report
        assert report is not None
        if report.suspect:
            core.log.log("vsnapfs", 1045, volume=core.name, count=report.suspect)
        self._log_healed(report.healed)
        if report.unclean:
            core.log.log(
                "vsnapfs",
                1042,
                volume=core.name,
                kept=report.kept,
                dropped=report.dropped,
                count=report.damaged or None,
            )
        if report.unclean or report.healed:
            # Both copies of the superblock agree again, and all that recovery decided is durable
            # before anything relies on it.
            ring = self.buffer.ring
            async with core.area_lock:
                await core.commit(ring=ring.ring_id if ring else NO_ID)
                await in_thread(core.need_area().trim)
            self.account.superblock_is_healed()

    def _log_healed(self, healed: Iterable[str]) -> None:
        for what in healed:
            self.log.log("vsnapfs", 1041, volume=self.core.name, what=what)

    async def _heal_state(self) -> None:
        """Write a state file anew of which a copy was missing, bad or older than the other."""
        protection = self.protection
        with suppress(OSError):
            wrong = await in_thread(protection.check_state)
            if not wrong:
                return
            await in_thread(protection.save_as_it_is)
            self._log_healed(self.account.state_is_healed(wrong))

    async def _offline_at_open(self, error: FaultError) -> None:
        """Go offline by a fault found at open. One that is already recorded is not logged again;
        another one beside it does not replace it, but is told.
        """
        protection = self.protection
        known = protection.fault
        missing = error.code is FaultCode.DIFF_AREA_MISSING
        if not protection.is_online and (known is not None or missing):
            # Fault 1 clears itself, so it must not replace what does not: not even a plain
            # `offline` of the administrator.
            if known is None or known.code is not error.code:
                protection.trouble = error.message
                self.log.log("vsnapfs", 1091, volume=self.core.name, reason=error.message)
            if error.code is FaultCode.EXTERNAL_WRITER_TO_DIFF_AREA:
                self.core.area_is_stale = True
            return
        protection.is_online = True  # So that `mark` records the fault over a plain offline.
        protection.mark(error)
        await in_thread(self._save_fault)

    def _save_fault(self) -> None:
        protection = self.protection
        assert protection.fault is not None
        log_fault(self.core.log, self.core.name, protection.fault)
        with suppress(OSError):
            protection.save(offline=True, fault=protection.fault)
        protection.settled()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Run the background work (growth, an interrupted restore) until `close`."""
        self._stopped = trio.Event()
        try:
            async with trio.open_nursery() as nursery:
                self.core.nursery = nursery
                async with self.core.admin_lock:
                    await self._continue_restore()
                buffering = trio.CancelScope()
                await nursery.start(self._buffer_writes, buffering)
                task_status.started()
                await self._stop.wait()
                buffering.cancel()
                # A growth under way has been finished or given up by now.
        finally:
            self.core.nursery = None
            self._stopped.set()

    async def _buffer_writes(
        self,
        scope: trio.CancelScope,
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        with scope:
            await self.buffer.run(task_status=task_status)

    async def _continue_restore(self) -> None:
        """Go on with an in-place restore that was interrupted. The caller holds `admin_lock`."""
        area = self.core.area
        if area is None or not self.protection.is_online or not area.superblock.restoring:
            return
        if self.core.dry_run:
            return
        try:
            await self._restore.go_on()
            self.account.restore_is_finished()
        except (FaultError, OSError, VsnapError) as error:
            await self.protection.trip(as_fault(error))
        except trio.TooSlowError:
            await self.protection.trip(
                as_fault(VsnapError("writes in flight took too long", errno=errno.ETIMEDOUT))
            )

    async def close(self) -> None:
        """Close cleanly: wait for writes, flush, record the replica's identity, unlock."""
        if self._closed:
            return
        self._closed = True
        core = self.core
        with trio.CancelScope(shield=True):
            try:
                async with core.gate.held(core.config.hold_timeout):
                    self.protection.session += 1
                    await self._leave()
            except trio.TooSlowError:
                self.protection.session += 1
                await self._end_growth()
            self._stop.set()
            await self._stopped.wait()
            self.buffer.close()
            await in_thread(self.writer.copier.close)
            await in_thread(close_files, core)
        if self.mountpoint is not None and not core.area_is_busy:
            self.log.log("vsnapfs", 1002, volume=core.name)
        close_log = getattr(core.log, "close", None)
        if close_log is not None:
            close_log()

    async def _leave(self) -> None:
        """The clean end: everything durable, then the superblock says so. Failing is allowed:
        the next open then treats it as an unclean stop.
        """
        core, area = self.core, self.core.area
        # First of all: a growth that is committed later would take the mark of a clean end away.
        if not await self._end_growth():
            with trio.move_on_after(core.config.hold_timeout):
                await self.buffer.finish()
            with suppress(OSError):
                await in_thread(core.sync_replica)
            return
        if not await self.buffer.finish():
            return
        if area is None or area.superblock.clean or core.replica_failed:
            return
        try:
            # Also where policy `evict` has gone on without the diff area.
            await in_thread(core.sync_replica)
            if core.area_is_stale or area.needs_rollback:
                return
            if area.damaged_sectors or area.superblock.restoring:
                return
            async with core.area_lock:
                await core.commit(clean=True, replica=core.replica.identity(), ring=NO_ID)
            await in_thread(self.buffer.remove)
            await in_thread(self._note_generation)
        except (FaultError, OSError) as error:
            core.log.log(
                "vsnapfs", 1091, volume=core.name, reason=f"the volume could not be closed: {error}"
            )

    async def _end_growth(self) -> bool:
        """False if a growth goes on all the same: what it works on is left as after a kill."""
        limit = min(self.core.config.grow_timeout, _LAST_GROWTH_SECONDS)
        if await self.room.close(limit):
            return True
        text = (
            "it was closed while its diff area was still growing: the host has not answered yet. "
            "The next opening looks after it as after a kill; until this process has ended, the "
            "diff area is in use"
        )
        self.log.log("vsnapfs", 1091, volume=self.core.name, reason=text)
        return False

    def _note_generation(self) -> None:
        self.protection.save()

    # -- handles --------------------------------------------------------------------------------

    def open_replica(self) -> ReplicaHandle:
        """A handle on the live replica. OSError ENODEV (offline) or EBUSY (being restored)."""
        if not self.protection.is_online:
            raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))
        area = self.core.area
        if self.protection.restoring or (area is not None and area.superblock.restoring):
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        return ReplicaHandle(self)

    def open_point(self, number: int) -> PointHandle:
        """A handle on recovery point `number`. OSError ENOENT."""
        if not any(point.number == number for point in self.core.points):
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
        return PointHandle(self, number)

    def log_flush_failure(self, error: OSError) -> None:
        """The file system above could not flush: the NTFS 140 equivalent."""
        self.core.log.log_flush_failure(
            volume=self.core.name,
            device=str(self.mountpoint or self.core.replica.path),
            reason=os.strerror(error.errno or errno.EIO),
        )

    # -- operations -----------------------------------------------------------------------------

    def resolve(self, spec: str | int) -> RecoveryPoint:
        """The point that a number, a label, "latest" or "oldest" names. VsnapError."""
        return self.points_service.resolve(spec)

    async def create_point(self, label: str | None = None) -> RecoveryPoint:
        """Take a recovery point of this instant. VsnapError."""
        return await self.points_service.create(label)

    async def delete_point(self, number: int, *, force: bool = False) -> None:
        """Delete a recovery point. BusyError if open, unless `force`. VsnapError."""
        await self.points_service.delete(number, force=force)

    async def restore(
        self, number: int, *, force: bool = False, progress: Progress | None = None
    ) -> int:
        """Make the replica what point `number` holds. Bytes written. VsnapError."""
        return await self._restore.run(number, force=force, progress=progress)

    async def resize(self, total: int, *, progress: Progress | None = None) -> None:
        """Set the diff area's maximum to `total` bytes. UsageError, VsnapError."""
        await self._resize.run(total, progress)

    async def go_offline(self) -> None:
        """Take the volume offline by hand."""
        async with self.core.admin_lock:
            if self.protection.restoring:
                self.protection.require_online("taking it offline")
            await self.protection.take_offline()

    async def online(self, *, give_up_recovery_points: bool = False) -> list[str]:
        """Bring the volume online. Returns warnings to show. VsnapError if it must stay offline.

        Handles from before stay dead. give_up_recovery_points: start an empty diff area, all
        recovery points are lost; the only way out when it is truly gone.
        """
        async with self.core.admin_lock:
            if give_up_recovery_points:
                async with self.core.shape_lock:
                    return await giveup.give_up_recovery_points(self)
            if self.protection.is_online:
                return [f"volume {self.core.name} is already online"]
            warnings = await self._bring_back()
            await self._continue_restore()
            if self.protection.state == "offline":
                fault = self.protection.fault
                raise VsnapError(
                    f"volume {self.core.name} is offline again: "
                    f"{fault.message if fault else 'its restore could not go on'}",
                    hint="Mend the cause, then try again.",
                    exit_code=3,
                    code="still-faulted",
                )
            return warnings

    async def _bring_back(self) -> list[str]:
        core, protection = self.core, self.protection
        self._refuse_if_hopeless()
        await protection.recorded()
        try:
            if core.replica_failed:
                await in_thread(self.reopen_replica)
            warning = protection.would_fit()
            await self.buffer.try_again()
            await protection.come_online()
        except (FaultError, OSError, VsnapError) as error:
            raise VsnapError(
                f"volume {core.name} stays offline: {error}",
                hint="Mend the cause, then try again.",
                exit_code=3,
                code="still-faulted",
            ) from error
        self.policy.reset()
        self.room.reset()
        return [warning] if warning else []

    def reopen_replica(self) -> None:
        """After a failed sync: open it anew and forget what was lost. OSError, BusyError."""
        core = self.core
        core.replica.reopen()
        # The host may still show what a failed sync has lost. Only what is on the disk counts.
        core.replica.forget_cache()
        core.replica_failed, core.replica_error = False, None

    def _refuse_if_hopeless(self) -> None:
        core, area = self.core, self.core.area
        give_up = "'vsnapfs online --give-up-recovery-points' starts an empty one, without points"
        reason = hint = ""
        if area is None:
            reason = self.protection.trouble or "its diff area could not be opened"
            hint = f"Bring the diff area back and mount the volume again. If it is lost, {give_up}."
        elif area.damaged_sectors:
            reason = "its diff area is damaged beyond repair, new copies could hide old ones"
            hint = f"Export the recovery points you need ('vsnapfs verify'); then {give_up}."
        elif core.area_is_stale:
            reason = "somebody else has written to its diff area"
            hint = f"Unmount and mount it again to read it anew, verify. If it is lost, {give_up}."
        elif area.backing.size() < area.superblock.allocated:
            reason = "the file of its diff area has been cut short"
            hint = "'vsnapfs repair' reserves the space again; only copies that lay there are lost."
        if reason:
            raise VsnapError(
                f"volume {core.name} cannot come online: {reason}",
                hint=hint,
                errno=errno.ENODEV,
                exit_code=3,
                code="no-way-online",
            )

    def status(self) -> dict[str, Any]:
        """Everything about the volume, JSON-ready; sizes in bytes."""
        return status_of(self)

    async def verify(self, progress: Progress | None = None) -> dict[str, Any]:
        """Check every structure and every copy. Repairs nothing. See `diffarea.verify`."""
        report = progress or no_progress
        async with self.core.shape_lock:
            area = self.core.need_area()
            async with self.core.area_lock:  # It walks the index, to which writes add.
                run = await in_thread(
                    Verification, area, lambda: [point.number for point in self.core.points]
                )
            for step in run.steps():
                async with self.core.area_lock:
                    await in_thread(step)
                report("verify", min(run.done, run.total), run.total)
        problems = await self._state_problems() + run.problems
        if self.mountpoint is None:
            # A command that opened it only for this: what opening healed was found, too.
            problems = self.account.rot() + problems
        checked = run.checked | {"state_copies": 2}
        return {"ok": not problems, "checked": checked, "problems": problems}

    async def _state_problems(self) -> list[dict[str, Any]]:
        wrong = await in_thread(self.protection.check_state)
        return [state_problem(offset, text) for offset, text in wrong]

    async def repair(
        self, *, dry_run: bool = False, progress: Progress | None = None
    ) -> dict[str, Any]:
        """Bring back what can be brought back, and say what cannot. See `repair`. VsnapError."""
        return await repair.Repair(self, dry_run=dry_run).run(progress or no_progress)

    def subscribe(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Call `callback` when points or state change. Returns a function that ends it."""
        self.core.listeners.append(callback)

        def unsubscribe() -> None:
            with suppress(ValueError):
                self.core.listeners.remove(callback)

        return unsubscribe

    # -- for tests ------------------------------------------------------------------------------

    def check_invariants(self) -> None:
        """AssertionError if index, slots, preserved blocks and sizes contradict each other."""
        invariants.check(self)
