"""The protection state machine: online or offline, the fault, who is refused.

Owns the transitions and their persistence. Promises P1 (after a fault everything on the replica
is refused until `online`, across restarts) and P3 (handles from before stay dead).

    state        replica read/write   flush         points: read, export   create point   restore
    ---------    ------------------   -----------   --------------------   ------------   -------
    online       yes                  yes           yes                    yes            yes
    restoring    EBUSY at open        -             yes                    EBUSY          EBUSY
    offline      ENODEV               ENODEV + 140  yes                    refused        refused
    faulted      ENODEV               ENODEV + 140  yes                    refused        refused

    delete, resize, verify, status, events: in every state.

    online   --fault-->   faulted       mark: at once, in memory; persist: before anyone is told
    online   --offline--> offline
    offline, faulted --online--> online (refused while the cause makes copies impossible to trust)
    faulted by 1, at an open that finds the diff area again: online

A fault is written where it can be: first to the state file, then to the superblock if that works.
The volume is offline if either says so.
"""

from __future__ import annotations

import errno
import os
import threading
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

import trio

from ..errors import Fault, FaultCode, FaultError, VsnapError
from ..units import format_size
from .core import Core, in_thread, now_ns
from .statefile import SavedState

if TYPE_CHECKING:
    from .core import Log


class Protection:
    """On- or offline, and why. `session` counts: a handle from an earlier one is dead."""

    def __init__(self, core: Core, saved: SavedState) -> None:
        self._core = core
        self.saved = saved
        self.fault: Fault | None = saved.fault
        self.is_online = not saved.offline
        self.restoring = False
        self.session = 1
        self._persisted = trio.Event()
        self._persisted.set()
        self._persisting = False
        self.trouble: str | None = None
        self._closed = False
        self._saving = threading.Lock()

    @property
    def state(self) -> str:
        """What `status` shows: "online", "offline", or "closed" (see `stay_closed`)."""
        if self._closed:
            return "closed"
        return "online" if self.is_online else "offline"

    @property
    def clears_itself(self) -> bool:
        """Offline by fault 1 and nothing else: an opening that finds the area again is online."""
        return self.fault is not None and self.fault.code is FaultCode.DIFF_AREA_MISSING

    @property
    def is_behind(self) -> bool:
        """Whether the diff area has been committed since the state file was last told."""
        area = self._core.area
        return area is not None and area.superblock.generation > self.saved.generation

    # -- refusing -------------------------------------------------------------------------------

    async def refuse(self) -> OSError:
        """The error for I/O while offline or with an old handle, once the fault is durable."""
        await self._persisted.wait()
        return OSError(errno.ENODEV, os.strerror(errno.ENODEV))

    def require_online(self, what: str) -> None:
        """VsnapError unless the volume is online and not being restored."""
        if not self.is_online:
            raise VsnapError(
                f"volume {self._core.name} is offline: {what} is not possible",
                hint=(f"Fault {int(self.fault.code)}: {self.fault.message}. " if self.fault else "")
                + "'vsnapfs status' says why; 'vsnapfs online' brings it back.",
                errno=errno.ENODEV,
                exit_code=3 if self.fault else 1,
                code="offline",
            )
        area = self._core.area
        # Also between two attempts: until it is done the replica is a mixture of two states.
        if self.restoring or (area is not None and area.superblock.restoring):
            raise VsnapError(
                f"volume {self._core.name} is being restored: {what} is not possible",
                hint="" if self.restoring else "'vsnapfs online' goes on with the restore.",
                errno=errno.EBUSY,
                code="restoring",
            )

    # -- going down -----------------------------------------------------------------------------

    def mark(
        self,
        error: FaultError,
        *,
        offset: int | None = None,
        length: int | None = None,
        needed: int | None = None,
    ) -> None:
        """Go offline in memory, now. `persist` must follow before anybody is answered.

        offset, length: the write that tripped it (bytes); needed: blocks it had to preserve.
        """
        if error.code is FaultCode.EXTERNAL_WRITER_TO_DIFF_AREA:
            self._core.area_is_stale = True
        if not self.is_online:
            return
        # First of all: whatever fails below for lack of memory, it is offline.
        self._go_down()
        area = self._core.area
        try:
            self.fault = Fault(
                code=error.code,
                errno=error.errno,
                message=error.message,
                time=now_ns(),
                block=error.block,
                offset=offset,
                length=length,
                needed=needed,
                used=area.used if area and not area.is_unread else None,
                allocated=area.allocated if area else None,
                maximum=area.maximum if area else self.saved.maximum or None,
                diff_area=str(area.backing.path) if area else None,
            )
        except MemoryError:  # Offline all the same, and whoever is refused is answered.
            self.fault, self.trouble = None, error.message

    def _go_down(self) -> None:
        # All in one step of the trio thread: no write that looked before can look again and pass.
        self.is_online = False
        self.session += 1
        self._persisted = trio.Event()

    async def persist(self) -> None:
        """Make the offline state durable, log it, and let the refused ones go."""
        done = self._persisted
        if done.is_set() or self._persisting:
            await done.wait()
            return
        self._persisting = True
        try:
            with trio.CancelScope(shield=True):
                try:
                    await in_thread(self._write_down, self._core.log, self.fault)
                except MemoryError:
                    self.trouble = "there was no memory to write the fault down"
                if self._core.area is not None and not self._core.area_is_stale:
                    async with self._core.area_lock:
                        try:
                            await self._core.commit(fault=self.fault)
                        except FaultError as error:
                            self.trouble = error.message  # The state file has it; that is enough.
                        except Exception as error:  # noqa: BLE001
                            # Most likely what tripped the fault in the first place (no memory).
                            # Whoever is refused gets the refusal, not this.
                            self.trouble = f"unexpected: {error!r}"
        finally:
            # Whatever happened: everybody who was refused waits for this.
            self._persisting = False
            done.set()
        self._core.changed()

    def _write_down(self, log: Log, fault: Fault | None) -> None:
        if fault is not None:
            with suppress(MemoryError):
                log_fault(log, self._core.name, fault)
        try:
            self.save(offline=True, fault=fault)
        except (OSError, MemoryError) as error:
            # Still offline in memory, and the superblock is tried next.
            self.trouble = f"the state file could not be written: {error}"
            log.log("vsnapfs", 1091, volume=self._core.name, reason=self.trouble)

    def stay_closed(self, why: VsnapError) -> None:
        """It must not be opened, and is looked at all the same: only its points can be read."""
        self._closed, self.is_online = True, False
        self.trouble = f"{why.message}. {why.hint}".strip()

    async def recorded(self) -> None:
        """Return when a fault that is being written down has been: `online` must come after it."""
        await self._persisted.wait()

    def settled(self) -> None:
        """What `mark` began is durable (used where no loop is needed: at open)."""
        self._persisted.set()

    async def trip(
        self,
        error: FaultError,
        *,
        offset: int | None = None,
        length: int | None = None,
        needed: int | None = None,
    ) -> None:
        """`mark` and `persist`. Not to be called while holding `area_lock`."""
        self.mark(error, offset=offset, length=length, needed=needed)
        await self.persist()

    async def replica_sync_failed(self, error: OSError) -> None:
        """A flush of the replica failed: fault 13, until the replica has been opened anew.

        Linux reports the loss once and drops the pages. What was acknowledged may be gone, so
        nothing above may go on as if it were there.
        """
        core = self._core
        core.replica_failed = True
        reason = error.strerror or str(error)
        if error is core.replica_error:  # Others that waited for the same sync fail like it.
            core.log.log(
                "vsnapfs",
                1060,
                volume=core.name,
                device=str(core.replica.path),
                errno=error.errno,
                reason=reason,
            )
        await self.trip(
            FaultError(
                FaultCode.IO_FAILURE,
                f"the replica could not be synced: {reason}",
                errno=error.errno or errno.EIO,
            )
        )

    async def reserve_number(self, number: int) -> None:
        """Make durable that point `number` may exist, before it does. VsnapError if that fails.

        Should the diff area be lost, nothing else would know: the number would be used twice, and
        an old area that turns up again could bring back points that have been given up.
        """
        try:
            await in_thread(lambda: self.save(epoch=max(number, self.saved.epoch)))
        except OSError as error:
            raise VsnapError(
                f"volume {self._core.name}: no recovery point was taken, the state file cannot be "
                f"written: {error.strerror or error}",
                errno=error.errno or errno.EIO,
            ) from error

    async def record_given_up(self, number: int) -> None:
        """Make durable that points up to `number` no longer count. FaultError 13 if that fails."""
        try:
            await in_thread(lambda: self.save(given_up=max(number, self.saved.given_up)))
        except OSError as error:
            raise FaultError(
                FaultCode.IO_FAILURE,
                f"the loss of the recovery points could not be recorded: {error}",
                errno=error.errno or errno.EIO,
            ) from error

    async def take_offline(self) -> None:
        """The administrator's `offline`: no fault, same refusal. Nothing if it is offline already
        by what does not clear itself.

        VsnapError if only this process knows: a superblock records faults, not this.
        """
        if not self.is_online:
            await self.recorded()  # Offline by a fault is an answer once the disk knows of it.
        if self.is_online or self.clears_itself:
            if self.fault is not None:
                # His word would end with it. Why the points cannot be read stays in `trouble`.
                self.trouble = self.trouble or self.fault.message
            self.fault = None
            self._go_down()
            await self.persist()
            self._core.log.log("vsnapfs", 1020, volume=self._core.name)
        area = self._core.area
        saved = self.saved.offline and self.saved.fault == self.fault
        known = saved or (area is not None and area.superblock.fault is not None)
        if not known and not self._closed:
            raise VsnapError(
                f"volume {self._core.name} is offline, but only until it is opened anew: "
                f"{self.trouble or 'that could not be written down'}",
                hint="Mend the disk or the file system that holds the state file, then try "
                "'vsnapfs online' and 'vsnapfs offline' again.",
                errno=errno.EIO,
                code="not-recorded",
            )

    # -- coming back ----------------------------------------------------------------------------

    async def come_online(self) -> None:
        """Clear the fault, superblock first: as long as either copy says offline, it is.

        FaultError if the superblock cannot be committed, OSError for the state file.
        """
        core = self._core
        async with core.area_lock:
            await core.commit(fault=None)
            await in_thread(self.save_online)
        self.fault = None
        self.trouble = None
        self.is_online = True
        core.log.log("vsnapfs", 1021, volume=core.name)
        core.log.reset_flush_failures()
        core.changed()

    async def look_at_replica(self) -> None:
        """Right after `come_online`: a flush from before may have failed since the replica was
        opened anew. That was no fault then, and is one now.
        """
        if self._core.replica_failed:
            text = "the replica could not be synced: a flush failed while the volume came online"
            await self.trip(FaultError(FaultCode.IO_FAILURE, text, errno=errno.EIO))

    def save_online(self) -> None:
        """Write "online" to the state file. OSError."""
        self.save(offline=False, fault=None)

    def save_as_it_is(self) -> None:
        """Write the state file once more, because a copy of it is bad. OSError."""
        with self._saving:
            # Asked for under the lock: a fault written down meanwhile must not be taken back.
            self._save(offline=not self.is_online, fault=self.fault)

    def check_state(self) -> list[tuple[int, str]]:
        """(offset, what is wrong) of each copy in the state file that is not as it should be."""
        with self._saving:
            return self._core.state_file.check()

    def save(self, **changes: object) -> None:
        """Write the state file with `changes` and what is now known of the diff area. OSError."""
        with self._saving:
            self._save(**changes)

    def _save(self, **changes: object) -> None:
        area = self._core.area
        state = replace(self.saved, **changes)  # type: ignore[arg-type]
        # What an old copy says must not replace what is known: it would look new from then on.
        if area is not None and not self._core.area_is_stale and not area.is_old:
            state = replace(
                state,
                maximum=area.maximum,
                block_size=area.layout.block_size,
                epoch=max(state.epoch, area.superblock.epoch),
                generation=area.superblock.generation,
                ring=area.superblock.ring,
                boot=area.superblock.boot,
                # Also what an earlier write of it, which failed, should have said.
                spoilt=max(state.spoilt, area.spoilt)
                if area.spoilt or state.spoilt > area.superblock.suspect
                else 0,
            )
        with self._core.admin.waits_for("a write to the state file"):
            file = self._core.state_file
            known = file.incomplete
            file.save(state)
        self.saved = state
        if file.incomplete is not None and known is None:
            with suppress(MemoryError):
                text = f"one of the two copies in the state file is bad: {file.incomplete}"
                self._core.log.log("vsnapfs", 1091, volume=self._core.name, reason=text)

    def would_fit(self) -> str | None:
        """A warning if the write that faulted would still not fit, else None."""
        fault, area = self.fault, self._core.area
        if fault is None or area is None or not fault.needed:
            return None
        room = area.slots.free + area.growable_slots
        if room >= fault.needed:
            return None
        missing = (fault.needed - room) * area.layout.block_size
        return (
            f"the write that tripped fault {int(fault.code)} ({fault.name}) would still not fit: "
            f"it must preserve {fault.needed} blocks, there is room for {room}. Enlarge the diff "
            f"area by at least {format_size(missing)} ('vsnapfs resize', now "
            f"{format_size(area.maximum)}) or delete a recovery point."
        )


def log_fault(log: Log, name: str, fault: Fault) -> None:
    """The volsnap event of a fault, with everything it knows."""
    log.log(
        "volsnap",
        fault.event_id,
        volume=name,
        fault=int(fault.code),
        fault_name=fault.name,
        errno=fault.errno,
        reason=fault.message,
        block=fault.block,
        offset=fault.offset,
        length=fault.length,
        needed=fault.needed,
        used=fault.used,
        allocated=fault.allocated,
        maximum=fault.maximum,
        diff_area=fault.diff_area,
    )
