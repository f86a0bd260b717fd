"""From an open volume to a clean close: the one order in which things begin and end.

Owns the nurseries of the serving process:

    outer   signals · control socket (answers until after the volume is closed)
    inner   the volume's background tasks · the FUSE loop

and what ends the mount. Promises: however it ends (umount by anybody, the `stop` operation, a
signal, a defect), requests in progress are answered, then the session is closed, operations that
change something finish, and `Volume.close` is reached, which ends the background tasks; in this
order.

What ends it:

* umount(8), fusermount3 -u: the kernel ends the FUSE loop; busy mounts it refuses itself.
* the operation `stop` (vsnapfs umount): unmounts; EBUSY is reported with what holds it, and the
  mount goes on. Answers when the volume is closed and its lock is free.
* SIGTERM, SIGINT, SIGHUP: as `stop`. If the mount is busy, it is taken away all the same, since
  whoever sends a signal (systemd, a shutdown) kills next: everything that stands on our loop
  devices is synced (`above`; at most 10 s), event 1091 names the users, requests in progress are
  answered, and the volume is closed. To what still has it open, that is a disk that was pulled,
  after a sync.
  A second signal skips the waiting.
"""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any

import trio

from vsnapfs.beginning import begin
from vsnapfs.config import DEFAULT_WRITE_BUFFER, Durability, shown
from vsnapfs.daemon import client, mounts
from vsnapfs.daemon.above import Syncing
from vsnapfs.daemon.accepting import Reserve
from vsnapfs.daemon.control import CLOSE_SECONDS, ControlServer
from vsnapfs.daemon.operations import OPERATIONS, Operation, Param, Progress
from vsnapfs.daemon.preflight import Plan
from vsnapfs.daemon.process import leading
from vsnapfs.errors import BusyError, VsnapError
from vsnapfs.fuse import Session, VolumeOperations, mount_options
from vsnapfs.patience import Patience

if TYPE_CHECKING:
    from vsnapfs.volume import Volume

_logger = logging.getLogger("vsnapfs.daemon")

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# A server that is just closing the volume, or a command without one, gets this long.
_LOCK_SECONDS = 5.0
_SYNC_SECONDS = 10.0
# How long requests in progress may take once the loop is told to end (a stuck disk, for example).
_LAST_REQUESTS_SECONDS = 30.0
# An unmounted file system whose loop has not ended by then is in use where we cannot see it.
_LOOP_END_SECONDS = 5.0


class Interrupted(VsnapError):
    """A signal arrived before the volume was mounted."""


async def open_volume(plan: Plan, **options: Any) -> Volume:
    """Open the volume for serving, with `options` of `Volume.open`. BusyError names who has it."""
    from vsnapfs.volume import Volume

    give_up = trio.current_time() + _LOCK_SECONDS
    while True:
        try:
            return await Volume.open(
                plan.directory,
                mountpoint=str(plan.mountpoint),
                **options,
            )
        except VsnapError as error:
            if error.code != "busy":
                raise
            pid = await trio.to_thread.run_sync(client.server_pid, plan.directory)
            mount = mounts.mount_of(plan.directory)
            # Without a mount it is most likely just closing the volume.
            if pid is not None and (mount or trio.current_time() > give_up):
                where = f", mounted on {shown(mount.mountpoint)}" if mount else ""
                raise BusyError(
                    f"{shown(plan.directory)} is served by process {pid} already{where}",
                    hint=""
                    if mount
                    else "It is closing the volume, or a file of it is still open after umount -l. "
                    "SIGTERM to that process closes it.",
                ) from error
            if trio.current_time() > give_up:
                raise client.with_holder(error, plan.directory) from None
        await trio.sleep(0.1)


class Server:
    """One volume, served once. `run` returns after a clean end and raises what ended it else."""

    def __init__(
        self,
        plan: Plan,
        *,
        accept_changed_replica: bool,
        durability: Durability | None = None,
        write_buffer: int = DEFAULT_WRITE_BUFFER,
        give_up_write_buffer: bool = False,
        lang: str,
        ready: Callable[[list[str]], None],
    ) -> None:
        self._plan = plan
        self._opening: dict[str, Any] = {
            "accept_changed_replica": accept_changed_replica,
            "durability": durability,
            "write_buffer": write_buffer,
            "give_up_write_buffer": give_up_write_buffer,
        }
        self._lang = lang
        self._ready = ready
        self._handlers: VolumeOperations | None = None
        self._session: Session | None = None
        self._loop_scope: trio.CancelScope | None = None
        self._loop_ended = trio.Event()
        self._unmounting = trio.Lock()
        self._closed = trio.Event()
        self._close_failure: BaseException | None = None
        self._device = ""
        self._volume: Volume | None = None
        self._interrupted = False
        self._reserve = Reserve()

    async def run(self) -> None:
        """Open, mount, serve, close."""
        with trio.open_signal_receiver(*_SIGNALS) as signals:
            async with trio.open_nursery() as outer:
                outer.start_soon(self._obey, signals, outer)
                volume = await open_volume(self._plan, **self._opening)
                self._volume = volume
                control = ControlServer(
                    self._plan.directory, volume, self._operations(), self._reserve
                )
                try:
                    async with trio.open_nursery() as inner:
                        await inner.start(volume.run)
                        try:
                            await self._serve(volume, control, outer)
                        finally:
                            with trio.CancelScope(shield=True):
                                # While the background tasks run: what is under way needs them.
                                await control.finish_operations()
                                await self._close(volume, control)
                        inner.cancel_scope.cancel()
                finally:
                    with trio.CancelScope(shield=True):
                        await self._close(volume, control)
                        await control.deliver()
                outer.cancel_scope.cancel()
        if self._interrupted:
            raise Interrupted("interrupted before the volume was mounted", code="interrupted")

    # ---- serving -------------------------------------------------------------------------------

    async def _serve(self, volume: Volume, control: ControlServer, outer: trio.Nursery) -> None:
        """From the mount to its end."""
        handlers = VolumeOperations(volume, shared=self._plan.shared, lang=self._lang)
        self._handlers = handlers
        control.status = handlers.status
        options = mount_options(self._plan.directory, self._plan.options)
        session = Session(handlers, self._plan.mountpoint, options)
        control.listen()
        session.mount()
        try:
            mount = mounts.top_mount(self._plan.mountpoint)
            self._device = mount.device if mount else ""
            await outer.start(control.serve)
            self._session = session
            self._ready([*volume.warnings, *volume.onlookers.warnings()])
            with trio.CancelScope() as self._loop_scope:
                await session.run(self._device)
        finally:
            self._loop_ended.set()
            session.close()

    async def _close(self, volume: Volume, control: ControlServer) -> None:
        """Close the volume, once, whatever has happened."""
        if self._closed.is_set():
            return
        try:
            with self._reserve.lent():
                # Can be asked as long as it lasts. Gone before the lock is: the next one makes
                # its own.
                await volume.close(before_unlocking=control.unlink)
        except BaseException as exc:
            self._close_failure = leading(exc)
            raise
        finally:
            control.unlink()
            self._closed.set()

    # ---- stopping ------------------------------------------------------------------------------

    def _operations(self) -> dict[str, Operation]:
        stop = Operation("stop", self._stop, {"mountpoint": Param((str,), default=None)})
        status = Operation("status", self._status, interruptible=True)
        return OPERATIONS | {"stop": stop, "status": status}

    async def _status(self, volume: Volume, _progress: Progress) -> dict[str, Any]:
        """The operation `status`, with what the mounted tree knows besides."""
        await volume.news()
        return volume.status() if self._handlers is None else self._handlers.status()

    async def _stop(
        self, _volume: Volume, _progress: Progress, *, mountpoint: str | None
    ) -> dict[str, Any]:
        """The operation `stop`: unmount, close; answer when the volume is free again.

        mountpoint: if given, it must be the one we serve (a guard against a stale mount table).
        """
        ours = str(self._plan.mountpoint)
        if mountpoint not in (None, ours):
            raise VsnapError(
                f"the process that serves this volume has it mounted on {shown(ours)}",
                code="mounted-there",
            )
        await self._unmount()
        if not await Patience(CLOSE_SECONDS).wait(self._closed):
            raise BusyError(
                f"{shown(ours)} is unmounted, but the volume is not closed yet{self._waits()}",
                hint=f"Process {os.getpid()} closes it as soon as that is over; until then "
                f"'vsnapfs status {shown(self._plan.directory)}' shows it.",
                code="not-closed",
            )
        if self._close_failure is not None:
            raise self._close_failure
        if self._volume is not None and self._volume.left_behind:
            raise VsnapError(
                f"{shown(ours)} is unmounted and its volume closed, but not all acknowledged "
                f"writes are on the disk: {self._volume.left_behind}",
                hint=f"'vsnapfs events {shown(self._plan.directory)}' says more. What waits in the "
                "write buffer is carried out by the next mount, unless the machine restarts.",
                code="not-durable",
            )
        return {"mountpoint": ours}

    def _waits(self) -> str:
        words = self._volume.waits_for() if self._volume is not None else ""
        return f": it waits for {words}" if words else ""

    async def _unmount(self) -> None:
        """Unmount, with nothing forced; returns when the FUSE loop has ended. BusyError if used."""
        async with self._unmounting:
            with self._reserve.lent():
                await self._unmount_alone()

    async def _unmount_alone(self) -> None:
        if self._loop_ended.is_set():
            return
        top = mounts.top_mount(self._plan.mountpoint)
        if top is None or top.device != self._device:
            what = f"{top.fstype} is mounted over it" if top else "it was unmounted lazily"
            raise BusyError(f"{shown(self._plan.mountpoint)} cannot be unmounted: {what}")
        begin()  # unless whoever asked for it has gone
        # In a thread: the kernel may ask this process before it answers.
        await trio.to_thread.run_sync(mounts.unmount_now, self._plan.mountpoint)
        if not await Patience(_LOOP_END_SECONDS).wait(self._loop_ended):
            waits = self._waits()
            raise BusyError(
                f"unmounted here, but requests are still under way{waits}"
                if waits
                else "unmounted here, but the file system is in use elsewhere",
                hint="The server closes the volume as soon as that is over."
                if waits
                else "It is mounted in another place or mount namespace; "
                "the server ends when that does.",
            )

    async def _obey(self, signals: AsyncIterator[int], outer: trio.Nursery) -> None:
        """The first signal unmounts, or pulls the disk if that cannot be; the second pulls."""
        asked = False
        async for _ in signals:
            if self._session is None or self._loop_scope is None:
                self._interrupted = True
                outer.cancel_scope.cancel()  # not serving yet; run() still closes what is open
            elif not asked:
                asked = True
                outer.start_soon(self._unmount_or_pull)
            else:
                self._pull()

    async def _unmount_or_pull(self) -> None:
        try:
            await self._unmount()
            return
        except VsnapError as error:
            remark = f"a signal ended the server while the mount was in use: {error.message}"
        remark += await self._sync_above()
        _logger.warning("%s", remark)
        if self._volume is not None:
            self._volume.log.log("vsnapfs", 1091, volume=str(self._plan.directory), text=remark)
        self._pull()

    def _pull(self) -> None:
        """End the loop after the requests in progress; `Session.close` then unmounts lazily."""
        if self._session is not None and self._loop_scope is not None:
            self._session.terminate()
            deadline = trio.current_time() + _LAST_REQUESTS_SECONDS
            self._loop_scope.deadline = min(self._loop_scope.deadline, deadline)

    async def _sync_above(self) -> str:
        """Let all that stands on our loop devices write what it holds back; what it could not."""
        syncing = Syncing(self._plan.mountpoint, self._device, _SYNC_SECONDS)
        while not syncing.is_over:  # noqa: ASYNC110 - plain threads set no event of ours
            await trio.sleep(0.05)
        late = ", ".join(map(shown, syncing.late))
        return f"; not synced within {_SYNC_SECONDS:.0f} s: {late}" if late else ""
