"""call(): carry out one operation on a volume, mounted or not.

Owns the decision which way to go. If a process serves the volume, it is asked through its control
socket; if none does, the volume is opened here under the same lock and the same operation runs in
this process. Both can change between two looks, so the way is looked for anew until one holds.

Promises: an operation is begun at most once; a server that stops answering is an error after 30 s,
not a hang; what leaves `call` is the operation's VsnapError, whichever way it came.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import stat
import struct
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trio

from vsnapfs import openers
from vsnapfs.config import SOCKET_NAME, VolumePaths, shown
from vsnapfs.daemon.control import encode, open_directory
from vsnapfs.daemon.operations import OPERATIONS, Progress
from vsnapfs.daemon.process import run_trio
from vsnapfs.errors import VsnapError

if TYPE_CHECKING:
    from vsnapfs.volume import Volume

# Six times the server's sign of life.
_SILENCE_SECONDS = 30.0
# How long a lock may be held by somebody who does not answer: a server that is opening or closing
# the volume, or a command that runs without one.
_LOCK_SECONDS = 5.0
_SERVER_ONLY = ("stop",)
# What needs nothing but the recovery points, which a volume that must stay closed still has.
_LOOKING = ("status", "rp_list", "rp_resolve", "verify")
# No answer comes near: verify's with a million problems has some 200 MB.
_LONGEST_ANSWER = 1 << 30


class _NotServed(Exception):
    """Nobody answers, or the server ended before it began the operation."""


class _Locked(Exception):
    """The volume could not be opened here: another process has it. reason: as `open` said it."""

    def __init__(self, reason: VsnapError) -> None:
        super().__init__(reason.message)
        self.reason = reason


def call(
    directory: str | os.PathLike[str], op: str, *, progress: Progress | None = None, **params: Any
) -> Any:
    """Carry out `op` on the volume in `directory` and return its result (plain JSON).

    progress(phase, done, total): called now and then by long operations, bytes.
    VsnapError: the operation's own; code "not-mounted" for `stop` when nobody serves; "busy" when
    another process holds the volume without serving it; "no-answer", "server-gone".
    """
    folder = Path(os.path.realpath(directory))
    give_up = time.monotonic() + _LOCK_SECONDS
    while True:
        try:
            return _ask(folder, op, params, progress)
        except _NotServed:
            pass
        if op in _SERVER_ONLY:
            raise VsnapError(f"{shown(folder)} is not mounted", code="not-mounted")
        try:
            return _do(folder, op, params, progress)
        except _Locked as locked:
            if time.monotonic() > give_up:
                raise with_holder(locked.reason, folder) from None
        time.sleep(0.1)


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
        raise VsnapError(
            f"cannot reach the process that serves {shown(folder)}: {error.strerror or error}",
            errno=error.errno or errno.ETIMEDOUT,
            code="no-answer",
        ) from error
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


def _ask(folder: Path, op: str, params: Mapping[str, Any], progress: Progress | None) -> Any:
    with _connect(folder, timeout=_SILENCE_SECONDS) as connection:
        accepted = False
        try:
            connection.sendall(encode({"op": op, "params": params}))
            with connection.makefile("rb") as answers:
                while line := answers.readline(_LONGEST_ANSWER):
                    answer = _understand(line)
                    if "result" in answer:
                        return answer["result"]
                    if "error" in answer:
                        error = VsnapError.from_json(answer["error"])
                        if error.code == "closing" and not accepted:
                            raise _NotServed
                        raise error
                    accepted = accepted or "accepted" in answer
                    if progress is not None and answer.get("progress"):
                        progress(*answer["progress"])
        except TimeoutError:
            raise VsnapError(
                f"the process that serves {shown(folder)} ({_peer_pid(connection)}) does not"
                f" answer for {_SILENCE_SECONDS:.0f} s",
                errno=110,
                code="no-answer",
            ) from None
        except ConnectionError as error:
            if not accepted:
                raise _NotServed from error
        except ValueError as error:
            raise VsnapError(
                f"what answers for {shown(folder)} does not speak our protocol", code="protocol"
            ) from error
    if not accepted:
        raise _NotServed
    raise VsnapError(
        f"the process that serves {shown(folder)} ended during {op}",
        hint="Whether it was carried out is not known; its log is server.log there.",
        code="server-gone",
    )


def _understand(line: bytes) -> dict[str, Any]:
    """One answer. ValueError if it is none; whoever answers may be anybody's program."""
    try:
        answer = json.loads(line)
    except RecursionError:
        raise ValueError("it nests too deeply") from None
    if not isinstance(answer, dict) or not isinstance(answer.get("error", {}), dict):
        raise ValueError("an answer is an object")  # noqa: TRY004 - it is the value of a line
    told = answer.get("progress")
    if told and not (
        isinstance(told, list)
        and [type(part) for part in told] == [str, int, int]
        and all(0 <= part < 2**63 for part in told[1:])
    ):
        raise ValueError("progress is a phase and two numbers of bytes")
    return answer


# ---- directly -----------------------------------------------------------------------------------


def _do(folder: Path, op: str, params: Mapping[str, Any], progress: Progress | None) -> Any:
    operation = OPERATIONS[op]

    # Opening alone may repair something already.
    dry_run = params.get("dry_run") is True

    async def main() -> Any:
        look_only = operation.name in _LOOKING
        volume = await _open_here(folder, dry_run=dry_run, look_only=look_only)
        try:
            async with trio.open_nursery() as nursery:
                await nursery.start(volume.run)
                try:
                    return await operation(volume, params, progress)
                finally:
                    # While `run` still runs: closing finishes what it does, and ends it.
                    await _close(volume)
                    nursery.cancel_scope.cancel()
        finally:
            await _close(volume)  # once more does no harm; `run` may not have started

    result = run_trio(main)
    if op == "status":
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
