"""call(): carry out one operation on a volume, mounted or not.

Owns the decision which way to go. If a process serves the volume, it is asked through its control
socket; if none does, the volume is opened here under the same lock and the same operation runs in
this process. Both can change between two looks, so the way is looked for anew until one holds.

Promises: an operation is begun at most once; a server that stops answering is an error after 30 s,
not a hang; what leaves `call` is the operation's VsnapError, whichever way it came. Whoever gives
up (Ctrl-C, those 30 s) is told whether the operation had begun: if not, it is never carried out.
"""

from __future__ import annotations

import errno
import math
import os
import socket
import stat
import struct
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trio

from vsnapfs import openers
from vsnapfs.beginning import Abandoned, asked_by
from vsnapfs.config import SOCKET_NAME, VolumePaths, shown
from vsnapfs.daemon.control import CLOSE_SECONDS
from vsnapfs.daemon.interruption import CtrlC, interrupted
from vsnapfs.daemon.listening import open_directory
from vsnapfs.daemon.operations import OPERATIONS, Operation, Progress
from vsnapfs.daemon.process import run_trio
from vsnapfs.daemon.talk import NOT_BEGUN, Talk, numbered
from vsnapfs.errors import VsnapError

if TYPE_CHECKING:
    from vsnapfs.volume import Volume

# Six times the server's sign of life.
_SILENCE_SECONDS = 30.0
# How long a lock may be held by somebody who does not answer: a server that is opening or closing
# the volume, or a command that runs without one.
_LOCK_SECONDS = 5.0
# What needs nothing but the recovery points, which a volume that must stay closed still has.
_LOOKING = ("status", "rp_list", "rp_resolve", "verify")


async def _only_a_server(_volume: Volume, _progress: Progress) -> None:
    raise NotImplementedError


_SERVER_ONLY = {"stop": Operation("stop", _only_a_server, gerund="unmounting the volume")}
# No answer comes near: verify's with a million problems has some 200 MB.
_LONGEST_ANSWER = 1 << 30
_LONGEST_WORDS = 1000

Say = Callable[[str], None]
"""say(sentence): what the user may want to know while he waits."""


@dataclass(eq=False)
class _NotServed(Exception):
    """Nobody answers, or the server ended before it began the operation.

    was_there: it said something before it hung up. closing: it is about to close the volume.
    denied: what to say if somebody does serve it: of a socket that is another user's the kernel
    does not tell whether anybody listens.
    """

    was_there: bool = False
    closing: bool = False
    denied: VsnapError | None = None


class _Locked(Exception):
    """The volume could not be opened here: another process has it. reason: as `open` said it."""

    def __init__(self, reason: VsnapError) -> None:
        super().__init__(reason.message)
        self.reason = reason


def call(
    directory: str | os.PathLike[str],
    op: str,
    *,
    progress: Progress | None = None,
    say: Say | None = None,
    **params: Any,
) -> Any:
    """Carry out `op` on the volume in `directory` and return its result (plain JSON).

    progress(phase, done, total): called now and then by long operations, bytes. say(sentence):
    what the operation waits for, if it does for long.
    VsnapError: the operation's own; code "not-mounted" for `stop` when nobody serves; "busy" when
    another process holds the volume without serving it; "no-answer", "server-gone"; "interrupted"
    after Ctrl-C, KeyboardInterrupt for what only looks.
    """
    folder = Path(os.path.realpath(directory))
    give_up = time.monotonic() + _LOCK_SECONDS
    closed_by = math.inf
    request = _Request(_SERVER_ONLY.get(op) or OPERATIONS[op], params, progress, say or _silent)
    with CtrlC() as ctrl_c:
        while True:
            try:
                return _ask(folder, request, ctrl_c)
            except _NotServed as nobody:
                denied = nobody.denied
                if nobody.was_there:
                    # It may have waited for long, for a host that hung: now it is asked anew.
                    give_up = time.monotonic() + _LOCK_SECONDS
                if nobody.closing:
                    # Its last operation may take long. It answers until the lock is free.
                    if closed_by == math.inf:
                        closed_by = time.monotonic() + CLOSE_SECONDS
                        request.say("Waiting for: the volume to be unmounted")
                    give_up = min(time.monotonic() + _LOCK_SECONDS, closed_by)
            if ctrl_c.count:
                raise interrupted(request.operation, NOT_BEGUN)
            if op in _SERVER_ONLY:
                if denied is not None:
                    raise denied
                raise VsnapError(f"{shown(folder)} is not mounted", code="not-mounted")
            try:
                return _do(folder, request, ctrl_c)
            except _Locked as locked:
                if denied is not None:
                    raise denied from None
                if time.monotonic() > give_up:
                    raise with_holder(locked.reason, folder) from None
            time.sleep(0.1)


@dataclass(frozen=True)
class _Request:
    """What is asked for, and who wants to know how it goes."""

    operation: Operation
    params: Mapping[str, Any]
    progress: Progress | None
    say: Say


def _silent(_sentence: str) -> None:
    """Nobody wants to know."""


def is_served(directory: str | os.PathLike[str]) -> bool:
    """Whether a process listens on the volume's control socket."""
    return server_pid(directory) is not None


def server_pid(directory: str | os.PathLike[str]) -> int | None:
    """The process that serves the volume, by the kernel's word; None if none does."""
    try:
        with _connect(Path(os.path.realpath(directory)), timeout=2.0) as connection:
            return _peer_pid(connection)
    except (_NotServed, VsnapError):
        return None


def with_holder(error: VsnapError, folder: Path) -> VsnapError:
    """The error of a lock that is taken, saying which process has it if the kernel tells."""
    try:
        wanted = os.stat(VolumePaths(folder).replica)
        lines = Path("/proc/locks").read_text().splitlines()
    except (OSError, VsnapError):
        return error
    device = f"{os.major(wanted.st_dev):02x}:{os.minor(wanted.st_dev):02x}:{wanted.st_ino}"
    for line in lines:  # "1: FLOCK  ADVISORY  WRITE 1234 08:01:5678 0 EOF"
        fields = line.split()
        if len(fields) >= 6 and fields[1] == "FLOCK" and fields[5] == device:
            error.hint = f"Process {fields[4]} has it. {error.hint}".strip()
            return error
    with suppress(OSError):
        paths = VolumePaths(folder)
        files = [openers.File.at(path) for path in (paths.replica, paths.diff_area)]
        names = ", ".join(str(writer) for those in openers.writers(files) for writer in those)
        error.hint = f"{names} has it open. {error.hint}" if names else error.hint
    return error


# ---- through the socket -------------------------------------------------------------------------


def _connect(folder: Path, timeout: float) -> socket.socket:
    try:
        fd = open_directory(folder)
    except OSError as error:
        raise _NotServed from error  # opening the volume will say what is wrong
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.settimeout(timeout)
        _connect_to(connection, fd, folder)
    except VsnapError:
        connection.close()
        raise
    except (FileNotFoundError, ConnectionRefusedError, ConnectionResetError) as error:
        connection.close()
        raise _NotServed from error
    except OSError as error:
        connection.close()
        failure = VsnapError(
            f"cannot reach the process that serves {shown(folder)}: {error.strerror or error}",
            errno=error.errno or errno.ETIMEDOUT,
            code="no-answer",
        )
        if isinstance(error, PermissionError):
            raise _NotServed(denied=failure) from error
        raise failure from error
    finally:
        os.close(fd)
    return connection


def _connect_to(connection: socket.socket, folder_fd: int, folder: Path) -> None:
    """Connect to the socket in an open directory, and to nothing else. OSError, VsnapError."""
    # Opened first and connected through what is open: nobody can put a link there in between.
    flags = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(SOCKET_NAME, flags, dir_fd=folder_fd)
    try:
        if not stat.S_ISSOCK(os.fstat(fd).st_mode):
            raise ConnectionRefusedError(errno.ECONNREFUSED, "it is no socket")
        connection.connect(f"/proc/self/fd/{fd}")
    finally:
        os.close(fd)
    # Who may write in the directory can put a socket of his own there. What he answers is worth
    # no more than he is: root, we ourselves, or whose volume it is.
    uid = _peer(connection)[1]
    if uid not in (0, os.geteuid(), os.fstat(folder_fd).st_uid):
        raise VsnapError(
            f"what answers for {shown(folder)} is a process of another user (uid {uid})",
            hint="The directory should belong to you and be writable by nobody else.",
            errno=errno.EPERM,
            code="not-allowed",
        )


def _peer(connection: socket.socket) -> tuple[int, int, int]:
    """(pid, uid, gid) of the process that listens, by the kernel's word."""
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid, uid, gid = struct.unpack("3i", raw)
    return pid, uid, gid


def _peer_pid(connection: socket.socket) -> int | None:
    return _peer(connection)[0] or None


def _ask(folder: Path, request: _Request, ctrl_c: CtrlC) -> Any:
    op = request.operation.name
    with _connect(folder, timeout=_SILENCE_SECONDS) as connection:
        talk = Talk(connection, _LONGEST_ANSWER)
        pid = _peer_pid(connection)
        try:
            with ctrl_c.reacting(talk.hang_up):
                with suppress(ConnectionError):  # What it said before it hung up is still there.
                    talk.request(op, request.params)
                for answer in talk.answers():
                    if "result" in answer:
                        return answer["result"]
                    if "error" in answer:
                        raise _refused(answer, talk)
                    if answer.get("progress") and request.progress is not None:
                        request.progress(*answer["progress"])
                    if answer.get("waiting"):
                        request.say(f"Waiting for: {str(answer['waiting'])[:_LONGEST_WORDS]}")
        except TimeoutError:
            talk.hang_up()
            talk.read_out()
            raise VsnapError(
                f"the process that serves {shown(folder)} ({numbered(pid)}) does not"
                f" answer for {_SILENCE_SECONDS:.0f} s",
                hint=""
                if request.operation.interruptible
                else f"{request.operation.gerund.capitalize()} {talk.fate(pid)}.",
                errno=110,
                code="no-answer",
            ) from None
        except ConnectionError:
            pass  # as good as its end
        except ValueError as error:
            if not ctrl_c.count:  # otherwise it is our own hanging up that has cut a line short
                raise VsnapError(
                    f"what answers for {shown(folder)} does not speak our protocol", code="protocol"
                ) from error
    if ctrl_c.count:
        hint = f"'vsnapfs status {shown(folder)}' shows it." if talk.accepted else ""
        fate = talk.fate(pid)
        raise interrupted(request.operation, fate, hint if fate is not NOT_BEGUN else "")
    if not talk.accepted or (talk.tells_begin and not talk.begun):
        raise _NotServed(was_there=talk.heard)
    raise VsnapError(
        f"the process that serves {shown(folder)} ended during {op}",
        hint="Whether it was carried out is not known; its log is server.log there.",
        code="server-gone",
    )


def _refused(answer: dict[str, Any], talk: Talk) -> Exception:
    error = VsnapError.from_json(answer["error"])
    if error.code == "closing" and (not talk.accepted or answer.get("begun") is False):
        return _NotServed(closing=True)
    return error


# ---- directly -----------------------------------------------------------------------------------


class _Here:
    """One operation on a volume that is opened in this process."""

    def __init__(self, folder: Path, request: _Request, ctrl_c: CtrlC) -> None:
        self._folder = folder
        self._request = request
        self._ctrl_c = ctrl_c
        self._scope = trio.CancelScope()
        self._begun = False

    async def main(self) -> Any:
        """Open, carry out, close. Whatever is interrupted, it is closed."""
        token = trio.lowlevel.current_trio_token()
        # From the handler into the loop, where nothing else is under way just then.
        with self._ctrl_c.reacting(lambda: token.run_sync_soon(self._interrupt)):
            volume = None
            with self._until_interrupted():
                # Opening alone may repair something already.
                dry_run = self._request.params.get("dry_run") is True
                look_only = self._request.operation.name in _LOOKING
                volume = await _open_here(self._folder, dry_run=dry_run, look_only=look_only)
            if volume is None:
                raise self._interrupted()
            return await self._carry_out(volume)

    def _until_interrupted(self) -> trio.CancelScope:
        self._scope = trio.CancelScope()
        if self._ctrl_c.count:
            self._scope.cancel()
        return self._scope

    async def _carry_out(self, volume: Volume) -> Any:
        request = self._request
        try:
            async with trio.open_nursery() as nursery:
                try:
                    with self._until_interrupted():
                        await nursery.start(volume.run)
                        with asked_by(self._may_begin):
                            result = await request.operation(
                                volume, request.params, request.progress
                            )
                        if not (self._ctrl_c.count and self._begun):
                            return result
                    raise self._interrupted()
                except Abandoned:
                    raise self._interrupted() from None
                finally:
                    # While `run` still runs: closing finishes what it does, and ends it.
                    await _close(volume)
                    nursery.cancel_scope.cancel()
        finally:
            await _close(volume)  # once more does no harm; `run` may not have started

    def _may_begin(self) -> bool:
        self._begun = not self._ctrl_c.count
        return self._begun

    def _interrupt(self) -> None:
        if not self._begun or self._ctrl_c.count > 1:
            self._scope.cancel()
            return
        what = self._request.operation.gerund
        self._request.say(f"{what} has begun and is finished first. Ctrl-C again breaks it off.")

    def _interrupted(self) -> BaseException:
        operation = self._request.operation
        if not self._begun:
            return interrupted(operation, NOT_BEGUN)
        if self._ctrl_c.count == 1:
            return interrupted(operation, "had begun and was carried out")
        hint = f"'vsnapfs status {shown(self._folder)}' shows how the volume is now."
        return interrupted(operation, "was broken off", hint)


def _do(folder: Path, request: _Request, ctrl_c: CtrlC) -> Any:
    result = run_trio(_Here(folder, request, ctrl_c).main)
    if request.operation.name == "status":
        # This process is not serving anything, and is gone when the answer is read.
        result |= {"pid": None, "mountpoint": None}
    return result


async def _close(volume: Volume) -> None:
    with trio.CancelScope(shield=True):
        await volume.close()


async def _open_here(folder: Path, *, dry_run: bool, look_only: bool) -> Volume:
    from vsnapfs.volume import Volume

    try:
        return await Volume.open(folder, dry_run=dry_run, look_only=look_only)
    except VsnapError as error:
        if error.code == "busy":
            raise _Locked(error) from error
        raise
