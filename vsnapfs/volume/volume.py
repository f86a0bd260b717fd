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
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import trio

from ..config import DEFAULT_WRITE_BUFFER, Durability, VolumeConfig, check_write_buffer
from ..diffarea.area import DiffArea
from ..diffarea.recovery import Report, no_memory
from ..diffarea.superblock import NO_RING, RecoveryPoint
from ..diffarea.verify import Verification
from ..errors import FaultCode, FaultError, VsnapError
from ..events import EventLog
from . import giveup, invariants, repair
from .account import Account, state_problem
from .adoption import CLOSED
from .buffer import WriteBuffer
from .core import Progress, in_thread
from .handles import PointHandle, ReplicaHandle, SynchronousHandle
from .onlookers import Onlookers
from .opening import READ_ONLY_HOST, Opened, check_replica, close_files, open_files
from .overlay import NoLog
from .points import Points
from .policy import Policy
from .protection import Protection, log_fault
from .reader import Reader
from .resize import Resize
from .restore import Restore, as_fault, no_progress
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
        self.onlookers = opened.onlookers or Onlookers(core)
        self.onlookers.protection = self.protection
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
        #: After `close`: why acknowledged writes are not on the disk, "" if they are.
        self.left_behind = ""
        #: It was opened without enough memory, and stays offline until it is opened anew.
        self._lacks_memory = False
        #: What recovery has decided is durable (or there was nothing to decide), see `_settle`.
        self._is_settled = False
        #: What recovery has found and nobody has been told of: the opening found a fault.
        self._untold: Report | None = None
        self._accepted_replica = False

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
        """Points up to this number lived through a power failure, or a failed sync, with durability
        "process".
        """
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
        give_up_write_buffer: bool = False,
        look_only: bool = False,
    ) -> Volume:
        """Open and lock the volume in `directory`.

        dry_run: nothing reaches the disk, whatever is done with it, and no restore is continued.
        durability: other than volume.toml says. write_buffer: bytes of shared memory, 0 for none.
        give_up_write_buffer: acknowledged writes that cannot be carried out now are given up.
        look_only: a volume that must stay closed, or whose host is read-only, is opened for its
        points, as if with dry_run.
        mountpoint: where it is going to be served, None for a single command. Opens offline when
        something is wrong with the diff area (see `opening`). VsnapError, BusyError ("busy"),
        FormatError; nothing has changed then.
        """
        check_write_buffer(write_buffer)

        async def attempt(*, dry_run: bool, closed: VsnapError | None = None) -> Volume:
            make_log: Any = NoLog if dry_run else EventLog
            open_them = partial(open_files, Path(directory), make_log, dry_run=dry_run)
            opened = await in_thread(open_them)
            opened.core.dry_run = dry_run
            opened.buffer_size = write_buffer
            opened.core.durability = durability or opened.core.config.durability
            opened.onlookers = Onlookers(opened.core, serving=mountpoint is not None)
            try:
                opened.onlookers.start()
                return await cls.from_opened(
                    opened,
                    accept_changed_replica,
                    mountpoint,
                    give_up_write_buffer=give_up_write_buffer,
                    closed=closed,
                )
            except BaseException:
                opened.onlookers.stop()
                opened.leave_no_empty_state()
                close_files(opened.core)
                opened.core.log.close()  # type: ignore[attr-defined]
                raise

        try:
            volume = await attempt(dry_run=dry_run)
            problem = volume.account.opened.fault
            if not look_only or volume.core.area is not None or problem is None:
                return volume
            if problem.errno not in (errno.EROFS, errno.EPERM, errno.EACCES):
                return volume
            # Only the diff area takes no writes. That is recorded now; its points can be read.
            await volume.close()
            trouble = volume.protection.trouble
            volume = await attempt(dry_run=True)
            volume.protection.trouble = volume.protection.trouble or trouble
            return volume
        except VsnapError as error:
            if error.code not in (CLOSED, READ_ONLY_HOST) or not look_only:
                raise
            return await attempt(dry_run=True, closed=error)

    @classmethod
    async def from_opened(
        cls,
        opened: Opened,
        accept_changed_replica: bool = False,
        mountpoint: str | None = None,
        *,
        give_up_write_buffer: bool = False,
        closed: VsnapError | None = None,
    ) -> Volume:
        """The second half of `open`: judge what was found. Tests start here.

        closed: why it must stay closed; it is only looked at.
        """
        if closed is not None:
            opened.store = None
        volume = cls(opened, mountpoint)
        try:
            await volume._take_in(opened, accept_changed_replica, give_up_write_buffer)
        except BaseException:
            volume.buffer.close()
            raise
        if closed is not None:
            volume.protection.stay_closed(closed)
        return volume

    async def _take_in(
        self, opened: Opened, accept_changed_replica: bool, give_up_write_buffer: bool
    ) -> None:
        # With a fault found at open (an old diff area put back, say) what the superblock says of
        # the replica is no reason to doubt the replica, and the volume is offline anyway.
        changed = None if opened.fault else check_replica(opened.core, accept_changed_replica)
        if changed:
            self.warnings.append(changed)
            self._accepted_replica = True
        try:
            await self.buffer.adopt(give_up=give_up_write_buffer)
        except FaultError as error:  # The ring knows better than the area; that one comes first.
            opened.fault = error
        except MemoryError:  # All of it stays as it is, for an opening that has the memory.
            opened.fault = opened.fault or no_memory()
            self._stays_offline(no_memory())  # Whatever else is wrong, and mended first.
        # Not before: a volume that must stay closed is left as it is.
        await self._heal_area(opened)
        if opened.fault is not None:
            self.buffer.hold(opened.fault)
        try:
            await self._judge(opened)
            await self._heal_state()
        except MemoryError:
            await self._offline_at_open(no_memory())
        self.core.note_generation = self.protection.save
        if self.mountpoint is not None:
            self.log.log("vsnapfs", 1001, volume=self.core.name, what=self.mountpoint)
            doubt = self.buffer.doubt()
            if doubt:
                self.warnings.append(doubt)
                self.log.log("vsnapfs", 1055, volume=self.core.name, reason=doubt)

    async def _heal_area(self, opened: Opened) -> None:
        """Write what recovery has decided on. If that fails, the points can be read, no more."""
        area, report = opened.core.area, opened.report
        if area is None or area.is_old or report is None or not report.to_heal:
            return
        try:
            await in_thread(area.heal, report.to_heal)
        except MemoryError:
            # Nothing is healed, and what is there is not what we know of it.
            opened.fault, opened.report = opened.fault or no_memory(), None
            self._stays_offline(no_memory())
        except FaultError as error:
            opened.fault, opened.report, area.incomplete = error, None, error
        self.account = Account(opened)

    async def _judge(self, opened: Opened) -> None:
        """Decide whether the volume is online, and make what was recovered durable."""
        protection, area = self.protection, opened.core.area
        if area is not None:
            self.core.note_spoilt = lambda number: protection.save(spoilt=number)
            self.core.watch_over(area)
            if opened.spoilt is not None:
                await in_thread(area.tell_spoilt, opened.spoilt)
        if area is not None and opened.fault is None:
            self._remember_preserved(area)
            recorded = area.superblock.fault
            if recorded is not None and (protection.is_online or protection.clears_itself):
                # The state file was lost or is older: offline if either says so.
                protection.fault, protection.is_online = recorded, False
            try:
                await self._finish_recovery(opened)
                if protection.clears_itself:
                    await self.buffer.try_again()
                    await protection.come_online()
                elif protection.is_online:
                    await self.buffer.try_again()
            except FaultError as error:
                self.buffer.hold(error)
                await self._offline_at_open(error)
            except OSError:
                # Acknowledged writes could not be carried out: that has been a fault already.
                await protection.recorded()
        elif opened.fault is not None:
            if area is not None:
                self._remember_preserved(area)
            self._untold = opened.report
            if opened.report is not None:
                self._log_healed(text for text in opened.report.healed if "superblock" not in text)
            await self._offline_at_open(opened.fault)

    def _remember_preserved(self, area: DiffArea) -> None:
        points = area.superblock.points
        if points:
            for blocks in area.index.parts_since(points[-1].number):
                self.core.preserved.update(blocks)

    async def _finish_recovery(self, opened: Opened) -> None:
        report = opened.report
        assert report is not None
        await self._tell_recovery(report, report.healed)
        if report.unclean or report.healed:
            await self._settle()
            # A ring that is given up must not come back with the next loss of the area, and a copy
            # of the area from before this commit, put back, must look old to the next opening (15),
            # however this one ends. Before anything is carried out.
            await self._heal_state()
        self._is_settled = True

    async def _tell_recovery(self, report: Report, healed: Iterable[str]) -> None:
        """Before the commit that makes it durable. FaultError as `_tell_given_up`."""
        core = self.core
        if report.suspect:
            core.log.log("vsnapfs", 1045, volume=core.name, count=report.suspect)
        self._log_healed(healed)
        if report.unclean:
            core.log.log(
                "vsnapfs",
                1042,
                volume=core.name,
                kept=report.kept,
                dropped=report.dropped,
                count=report.damaged or None,
            )
        if report.given_up:
            await self._tell_given_up(report.given_up)

    async def _settle(self) -> None:
        """Both copies of the superblock agree again, and all that recovery decided is durable
        before anything relies on it. FaultError.
        """
        core = self.core
        async with core.area_lock:
            await core.commit(ring=self.buffer.name)
            self.buffer.is_taken()
            await in_thread(core.need_area().trim)
        self.account.superblock_is_healed()

    async def _tell_given_up(self, points: list[RecoveryPoint]) -> None:
        """Tell of points that the next commit is going to drop: they have been told of, unless the
        end came between the record of it and the word. FaultError if nothing can be committed.
        """
        core, kept = self.core, self.core.points
        numbers = [point.number for point in points]
        tell = partial(self.policy.tell_lost, numbers, "they had been given up before this opening")
        try:
            # One that keeps them comes first: as long as the area takes no writes, there is no
            # reason to say it at each opening. The first of them says it all the same.
            async with core.area_lock:
                await core.commit(points=(*points, *kept), ring=self.buffer.name)
        except FaultError:
            if self.protection.is_online:
                tell()
            raise
        area = core.need_area()
        area.superblock = replace(area.superblock, points=kept)
        tell()

    def _log_healed(self, healed: Iterable[str]) -> None:
        for what in healed:
            self.log.log("vsnapfs", 1041, volume=self.core.name, what=what)

    async def _heal_state(self) -> None:
        """Write a state file anew of which a copy was missing, bad or older than the other."""
        protection = self.protection
        if self._lacks_memory:
            return  # What is in memory is not what the file should say.
        with suppress(OSError, MemoryError):
            wrong = await in_thread(protection.check_state)
            if not wrong:
                if protection.is_behind:
                    await in_thread(protection.save)
                return
            await in_thread(protection.save_as_it_is)
            if self.core.state_file.incomplete is not None:
                return
            self._log_healed(self.account.state_is_healed(wrong))

    async def _offline_at_open(self, error: FaultError) -> None:
        """Go offline by a fault found at open. One that is already recorded is not logged again;
        another one beside it does not replace it, but is told.
        """
        protection = self.protection
        lacked = error.code is FaultCode.MEMORY_ALLOCATION_FAILURE
        if lacked:
            self._stays_offline(error)
        known = protection.fault
        missing = error.code is FaultCode.DIFF_AREA_MISSING
        replaced = protection.clears_itself and not missing
        if not protection.is_online and (known is not None or missing) and not replaced:
            # Fault 1 clears itself, so it must not replace what does not: not even a plain
            # `offline` of the administrator. Nor must it stand for another one that is found.
            if known is None or known.code is not error.code:
                protection.trouble = error.message
                self.log.log("vsnapfs", 1091, volume=self.core.name, reason=error.message)
            if error.code is FaultCode.EXTERNAL_WRITER_TO_DIFF_AREA:
                self.core.area_is_stale = True
            return
        protection.is_online = True  # So that `mark` records the fault over a plain offline.
        protection.mark(error)
        if lacked and self.mountpoint is None:
            # This command lacks it, not the volume: the next process need not find it offline.
            protection.settled()
            return
        try:
            await in_thread(self._save_fault)
        finally:
            protection.settled()

    def _stays_offline(self, error: FaultError) -> None:
        """Something of the opening could not be done for lack of memory, whatever it was: no copy
        may be made before it is opened anew.
        """
        self._lacks_memory = True
        self.buffer.hold(error)
        if self.core.area is not None:
            self.core.area.incomplete = error

    def _save_fault(self) -> None:
        protection = self.protection
        if protection.fault is not None:
            with suppress(MemoryError):
                log_fault(self.core.log, self.core.name, protection.fault)
        with suppress(OSError, MemoryError):
            protection.save(offline=True, fault=protection.fault)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Run the background work (growth, an interrupted restore) until `close`."""
        self._stopped = trio.Event()
        try:
            async with trio.open_nursery() as nursery:
                self.core.nursery = nursery
                async with self.core.admin.turn("going on with a restore"):
                    await self._continue_restore()
                buffering = trio.CancelScope()
                await nursery.start(self._buffer_writes, buffering)
                looking = trio.CancelScope()
                nursery.start_soon(self._look_out, looking)
                task_status.started()
                await self._stop.wait()
                buffering.cancel()
                looking.cancel()
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

    async def _look_out(self, scope: trio.CancelScope) -> None:
        with scope:
            await self.onlookers.run()

    async def _continue_restore(self) -> None:
        """Go on with an in-place restore that was interrupted. It is the caller's turn."""
        if not self._is_half_restored or not self.protection.is_online or self.core.dry_run:
            return
        try:
            await self._restore.go_on()
            self.account.restore_is_finished()
        except Exception as error:  # noqa: BLE001 - whatever it was, the replica is a mixture
            await self.protection.trip(as_fault(error))

    @property
    def _is_half_restored(self) -> bool:
        area = self.core.area
        return area is not None and bool(area.superblock.restoring)

    def ends_now(self) -> None:
        """What is under way is going to be cancelled, for `close` cannot wait for it any longer."""
        self.core.ending = True

    async def close(self, before_unlocking: Callable[[], None] = lambda: None) -> None:
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
                self.left_behind = "writes in flight took too long"
                await self._end_growth()
            self._stop.set()
            await self._stopped.wait()
            await self.onlookers.finish()
            await self.buffer.end()
            # Not while copies are still on their way to an area that others could then open.
            async with core.area_lock:
                await in_thread(self.writer.copier.close)
                before_unlocking()
                await in_thread(close_files, core)
        is_clean = core.area is None or core.area.superblock.clean
        if self.mountpoint is not None and is_clean and not core.area_is_busy:
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
            self.left_behind = "there was no time to write them"
            with trio.move_on_after(core.config.hold_timeout):
                await self._all_is_durable()
            return
        if not await self._all_is_durable() or area is None:
            return
        # A replica that was accepted as it is is known from now on, whether it was written or not.
        if area.superblock.clean and not self._accepted_replica:
            return
        await core.record_spoilt()
        try:
            if core.area_is_stale or area.needs_rollback:
                return
            if area.superblock.restoring or not area.is_sound:
                return
            async with core.area_lock:
                self.buffer.is_over()
                await core.commit(clean=True, replica=core.replica.identity(), ring=NO_RING)
            await in_thread(self.buffer.remove)
            await in_thread(self.protection.save)
        except Exception as error:  # noqa: BLE001 - then it is closed as it is
            self._could_not(error)
            await core.record_spoilt()

    async def _all_is_durable(self) -> bool:
        """Carry out what is in the write buffer and sync the replica, also where policy `evict` has
        gone on without the diff area. False: `left_behind` says why not.
        """
        core, why = self.core, ""
        if not await self.buffer.finish():
            why = f"they could not be carried out: {self.buffer.stuck}"
        elif self.buffer.leaves_ring:
            why = "some may wait in a write buffer for the diff area that belongs to it"
        elif core.replica_failed:
            why = f"a sync of the replica has failed: {core.replica_error}"
        elif self._may_be_unsynced:
            try:
                await core.flush_replica()
            except Exception as error:  # noqa: BLE001 - it is closed all the same
                why = f"the replica could not be synced: {error}"
                self._could_not(error)
        self.left_behind = why
        return not why

    @property
    def _may_be_unsynced(self) -> bool:
        """Whether something acknowledged, by a killed process perhaps, may be in no sync yet."""
        area = self.core.area
        if area is not None and not area.is_old:
            return not area.superblock.clean
        return self.mountpoint is not None  # It cannot tell. Who unmounts is told that all is done.

    def _could_not(self, error: Exception) -> None:
        text = f"the volume could not be closed: {error!r}"
        self.log.log("vsnapfs", 1091, volume=self.core.name, reason=text)

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

    # -- handles --------------------------------------------------------------------------------

    def open_replica(self, *, synchronous: bool = False) -> ReplicaHandle:
        """A handle on the live replica. OSError ENODEV (offline, closed), EBUSY (being restored).

        synchronous: as with O_SYNC or O_DSYNC, each write is durable before it is answered.
        """
        if not self.protection.is_online or self._closed:
            raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))
        area = self.core.area
        if self.protection.restoring or (area is not None and area.superblock.restoring):
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        return SynchronousHandle(self) if synchronous else ReplicaHandle(self)

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

    def list_points(self) -> list[RecoveryPoint]:
        """`points`, or VsnapError if the diff area is not open: that is not the same as none."""
        self.core.need_area()
        return self.points

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
        async with self.core.admin.turn("taking the volume offline"):
            if self.protection.restoring:
                self.protection.require_online("taking it offline")
            if self._lacks_memory:
                raise self.core.out_of_memory("that is all that keeps it offline")
            self.core.admin.begin()
            await self.protection.take_offline()

    async def online(self, *, give_up_recovery_points: bool = False) -> list[str]:
        """Bring the volume online. Returns warnings to show. VsnapError if it must stay offline.

        Handles from before stay dead. give_up_recovery_points: start an empty diff area, all
        recovery points are lost; the only way out when it is truly gone.
        """
        what = "giving up the recovery points" if give_up_recovery_points else "coming online"
        async with self.core.admin.turn(what):
            warnings = []
            if give_up_recovery_points:
                if self._lacks_memory:
                    raise self.core.out_of_memory("there is no reason to give anything up")
                async with self.core.shape_lock:
                    warnings = await giveup.give_up_recovery_points(self)
                self._is_settled, self._untold = True, None
            elif not self.protection.is_online:
                warnings = await self._bring_back()
            elif not self._is_half_restored:
                return [f"volume {self.core.name} is already online"]
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
        core.admin.begin()
        try:
            if core.replica_failed:
                await in_thread(self.reopen_replica)
            warning = protection.would_fit()
            if not self._is_settled:
                # The opening found a fault and wrote nothing. Old copies must look old all the same
                # before anything is carried out.
                if self._untold is not None:
                    await self._tell_recovery(self._untold, ())
                    self._untold = None
                await self._settle()
                await in_thread(protection.save)
                self._is_settled = True
            await self.buffer.try_again()
            await protection.come_online()
            await protection.look_at_replica()
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
        # What was written beside that sync. Dirty pages stay in the cache, and ext4 may have taken
        # them for written (`AreaStore.rollback`).
        with suppress(OSError):
            core.replica.sync()
        with self.onlookers.reopening(core.replica):
            core.replica.reopen()
        # The host may still show what a failed sync has lost. Only what is on the disk counts.
        core.replica.forget_cache()
        core.replica_failed, core.replica_error = False, None

    def _refuse_if_hopeless(self) -> None:
        core, area = self.core, self.core.area
        give_up = "'vsnapfs online --give-up-recovery-points' starts an empty one, without points"
        reason = hint = ""
        if self._lacks_memory:
            raise core.out_of_memory("it cannot come online")
        if area is None:
            reason = self.protection.trouble or "its diff area could not be opened"
            hint = f"Bring the diff area back and mount the volume again. If it is lost, {give_up}."
        elif any(point.number <= self.protection.saved.given_up for point in core.points):
            # The next opening would drop them, whatever is answered now.
            reason = "giving up its recovery points has begun, and did not end"
            hint = "Mend what it met, then repeat 'vsnapfs online --give-up-recovery-points'."
        elif area.incomplete is not None:
            reason = "its diff area could not be written when it was opened"
            hint = f"Mend its disk, then unmount the volume and mount it again. If not, {give_up}."
        elif area.damaged_sectors:
            reason = "its diff area is damaged beyond repair, new copies could hide old ones"
            # Sectors that could not be read count as bad, too, until the next opening.
            hint = (
                "Unmount the volume and mount it again, in case its disk did not answer. If that "
                f"does not help, export the points you need ('vsnapfs verify'); then {give_up}."
            )
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

    def waits_for(self, *, host_only: bool = False) -> str:
        """What whoever waits for this volume waits for, in words; see `Administration`."""
        return self.core.admin.in_words(host_only=host_only)

    async def news(self) -> None:
        """Look for what `status` cannot know without looking. Takes a second at most."""
        await self.onlookers.news()

    def status(self) -> dict[str, Any]:
        """Everything about the volume, JSON-ready; sizes in bytes."""
        return status_of(self)

    async def verify(self, progress: Progress | None = None) -> dict[str, Any]:
        """Check every structure and every copy. Repairs nothing. See `diffarea.verify`."""
        report = progress or no_progress
        async with self.core.shape_lock:
            area = self.core.need_index()
            async with self.core.area_lock:  # It walks the index, to which writes add.
                run = await in_thread(
                    Verification, area, lambda: [point.number for point in self.core.points]
                )
            for step in run.steps():
                async with self.core.area_lock:
                    with self.core.admin.waits_for("a check of the diff area"):
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
        if self._lacks_memory:
            raise self.core.out_of_memory("what there is to mend is not known")
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
