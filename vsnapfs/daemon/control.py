"""The control socket, server side.

Protocol: a stream socket `control.sock` in the volume directory; every message is one line of JSON.

    →  {"op": "rp_create", "params": {"label": "before-upgrade"}}
    ←  {"accepted": "rp_create"}             from here on the operation has begun
    ←  {"progress": ["restore", 1048576, 10485760]}      any number of times, bytes
    ←  {"alive": true}                       at least every 5 s, so silence means trouble
    ←  {"result": …}   or   {"error": {"message", "hint", "code", "exit_code", "errno"}}

A connection may ask again after an answer. Unknown keys of an answer are to be ignored.

Promises: only root and the server's own user are answered; a request is at most 64 KiB; nothing a
client does or fails to do (silence, nonsense, half a line, not reading, going away) disturbs
another client or the mount. An operation that changes something runs to its end even if its client
has left; one that only looks is ended.

Leaves the operations to `operations`, and what stopping means to `lifecycle`.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trio

from vsnapfs.config import SOCKET_NAME
from vsnapfs.daemon.operations import Operation
from vsnapfs.daemon.process import leading
from vsnapfs.errors import UsageError, VsnapError

if TYPE_CHECKING:
    from vsnapfs.volume import Volume

_logger = logging.getLogger("vsnapfs.daemon")

MAX_REQUEST = 64 * 1024
MAX_CONNECTIONS = 64
IDLE_SECONDS = 30.0  # from an answer (or the connection) to the next complete request
SEND_SECONDS = 10.0  # for a client to take one message
ALIVE_SECONDS = 5.0
PROGRESS_SECONDS = 0.1
# How long operations that change something may go on once the mount has ended.
FINISH_SECONDS = 60.0


def open_directory(directory: Path) -> int:
    """A descriptor through which the socket is named: sun_path holds only 107 bytes."""
    return os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)


def socket_address(folder: int) -> str:
    """The address of the socket in an open directory, short whatever the directory's name."""
    return f"/proc/self/fd/{folder}/{SOCKET_NAME}"


def encode(message: Mapping[str, Any]) -> bytes:
    """One message on the wire. ASCII, so names that are no UTF-8 survive as lone surrogates."""
    return json.dumps(message, ensure_ascii=True).encode("ascii") + b"\n"


class _Job:
    """An operation under way: what the connection needs to know of it."""

    def __init__(self, operation: Operation) -> None:
        self.operation = operation
        self.scope = trio.CancelScope()
        self.done = trio.Event()
        self.answer: dict[str, Any] = {}
        self.latest: tuple[str, int, int] | None = None

    def report(self, phase: str, done: int, total: int) -> None:
        """The progress callback; one assignment, so any thread may call it."""
        self.latest = (phase, done, total)


class ControlServer:
    """Answers on the volume's control socket.

    The caller holds the volume's lock, so a socket file found in the directory is a dead server's.
    """

    def __init__(
        self, directory: Path, volume: Volume, operations: Mapping[str, Operation]
    ) -> None:
        self._directory = directory
        self._volume = volume
        self._operations = operations
        self._socket: socket.socket | None = None
        self._file: tuple[int, int] | None = None  # device, inode of our socket file
        self._jobs: set[_Job] = set()
        self._busy = 0  # connections that are owed an answer
        self._connections = 0
        self._closing = False
        self._delivered = trio.Event()

    # ---- the socket ----------------------------------------------------------------------------

    def listen(self) -> None:
        """Bind and listen; from now on clients can connect (and wait for `serve`)."""
        folder = open_directory(self._directory)
        try:
            address = socket_address(folder)
            try:
                os.unlink(address)
            except FileNotFoundError:
                pass
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                # On Linux the mode of an unbound socket becomes that of the file, from the start.
                os.fchmod(listener.fileno(), 0o600)
                listener.bind(address)
                listener.listen(MAX_CONNECTIONS)
                found = os.stat(address)
            except OSError:
                listener.close()
                raise
            self._socket, self._file = listener, (found.st_dev, found.st_ino)
        except OSError as error:
            raise VsnapError(
                f"cannot make the control socket in {self._directory}: {error.strerror}",
                errno=error.errno or 5,
                code="control-socket",
            ) from error
        finally:
            os.close(folder)

    def unlink(self) -> None:
        """Take the socket's name away, if it is still ours. Open connections live on."""
        if self._file is None:
            return
        ours, self._file = self._file, None
        try:
            folder = open_directory(self._directory)
        except OSError:
            return  # the directory itself is gone
        try:
            found = os.stat(socket_address(folder), follow_symlinks=False)
            if (found.st_dev, found.st_ino) == ours:
                os.unlink(socket_address(folder))
        except OSError:
            pass
        finally:
            os.close(folder)

    async def serve(self, task_status: Any = trio.TASK_STATUS_IGNORED) -> None:
        """Accept and answer until cancelled. Start it with `nursery.start`."""
        assert self._socket is not None, "listen first"
        listener = trio.SocketListener(trio.socket.from_stdlib_socket(self._socket))
        self._socket = None
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            task_status.started()
            # Accepting survives a shortage of descriptors; trio sees to that.
            await trio.serve_listeners(self._connection, [listener])

    # ---- the end -------------------------------------------------------------------------------

    async def finish_operations(self) -> None:
        """Begin nothing more; end what only looks, and wait for what changes something."""
        self._closing = True
        for job in self._jobs:
            if job.operation.interruptible:
                job.scope.cancel()
        with trio.move_on_after(FINISH_SECONDS):
            for job in list(self._jobs):
                if job.operation.name != "stop":
                    await job.done.wait()
        for job in self._jobs:
            if job.operation.name != "stop":
                job.scope.cancel()

    async def deliver(self, seconds: float = 2.0) -> None:
        """Wait until every answer that is owed has been sent, but not longer than `seconds`."""
        with trio.move_on_after(seconds):
            while self._busy:
                self._delivered = trio.Event()
                await self._delivered.wait()

    # ---- one connection ------------------------------------------------------------------------

    async def _connection(self, stream: trio.SocketStream) -> None:
        self._connections += 1
        try:
            refusal = self._refusal(stream)
            if refusal is not None:
                await self._send(stream, {"error": refusal.to_json()})
                return
            buffer = bytearray()
            while (line := await self._request(stream, buffer)) is not None:
                self._busy += 1
                try:
                    await self._answer(stream, line)
                finally:
                    self._busy -= 1
                    self._delivered.set()
        except (trio.BrokenResourceError, trio.TooSlowError):
            pass  # it went away, or does not read: its own affair
        except Exception as exc:  # noqa: BLE001 - one client's trouble must not end the others
            self._unexpected("the control socket", exc)
        finally:
            self._connections -= 1
            await trio.aclose_forcefully(stream)

    def _refusal(self, stream: trio.SocketStream) -> VsnapError | None:
        """Why this client is not served, if so."""
        raw = stream.socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        uid = struct.unpack("3i", raw)[1]
        if uid not in (0, os.geteuid()):
            return VsnapError("this volume belongs to another user", errno=13, code="not-allowed")
        if self._connections > MAX_CONNECTIONS:
            return VsnapError("too many clients at once", errno=16, code="too-many")
        return None

    async def _request(self, stream: trio.SocketStream, buffer: bytearray) -> bytes | None:
        """The next line; None when the client has nothing more to say, or says it too slowly."""
        with trio.move_on_after(IDLE_SECONDS):
            ended = False
            while b"\n" not in buffer and not ended:
                if len(buffer) > MAX_REQUEST:
                    break
                data = await stream.receive_some(MAX_REQUEST)
                ended = not data
                buffer += data
            if ended and not buffer:
                return None
            # A last line without its newline counts: `printf … | socat - UNIX:control.sock`.
            line, _, rest = bytes(buffer).partition(b"\n")
            if len(line) > MAX_REQUEST:
                error = UsageError(f"a request may be at most {MAX_REQUEST} bytes", code="protocol")
                await self._send(stream, {"error": error.to_json()})
                return None
            buffer[:] = rest
            return line
        return None

    async def _send(self, stream: trio.SocketStream, message: Mapping[str, Any]) -> None:
        with trio.fail_after(SEND_SECONDS):
            await stream.send_all(encode(message))

    async def _answer(self, stream: trio.SocketStream, line: bytes) -> None:
        try:
            operation, params = self._understand(line)
        except VsnapError as error:
            await self._send(stream, {"error": error.to_json()})
            return
        await self._send(stream, {"accepted": operation.name})
        job = _Job(operation)
        self._jobs.add(job)
        # Not a child of this connection: it outlives a client that leaves.
        self._nursery.start_soon(self._perform, job, params)
        try:
            await self._follow(stream, job)
        except (trio.BrokenResourceError, trio.TooSlowError):
            if operation.interruptible:
                job.scope.cancel()
            raise

    def _understand(self, line: bytes) -> tuple[Operation, dict[str, Any]]:
        try:
            request = json.loads(line)
        except (ValueError, RecursionError):
            raise UsageError("a request must be one line of JSON", code="protocol") from None
        if not isinstance(request, dict) or not isinstance(request.get("op"), str):
            raise UsageError('a request must be {"op": …, "params": {…}}', code="protocol")
        params = request.get("params")
        if params is None:
            params = {}
        if not isinstance(params, dict):
            raise UsageError("params must be an object", code="protocol")
        operation = self._operations.get(request["op"])
        if operation is None:
            raise UsageError(f"no operation is called {request['op'][:80]!r}", code="protocol")
        if self._closing and operation.name != "stop":
            raise _closing()
        return operation, params

    async def _follow(self, stream: trio.SocketStream, job: _Job) -> None:
        """Send progress and signs of life until the job is done, then its answer."""
        told: tuple[str, int, int] | None = None
        last = trio.current_time()
        while True:
            with trio.move_on_after(PROGRESS_SECONDS):
                await job.done.wait()
            if job.latest != told:
                told = job.latest
                last = trio.current_time()
                await self._send(stream, {"progress": told})
            if job.done.is_set():
                await self._send(stream, job.answer)
                return
            if trio.current_time() - last >= ALIVE_SECONDS:
                last = trio.current_time()
                await self._send(stream, {"alive": True})

    async def _perform(self, job: _Job, params: dict[str, Any]) -> None:
        answer: dict[str, Any] = {"error": _closing().to_json()}
        try:
            with job.scope:
                result = await job.operation(self._volume, params, job.report)
                encode({"result": result})  # what cannot be told fails here, in its own job
                answer = {"result": result}
        except Exception as exc:  # noqa: BLE001 - whatever it is, the client is told
            answer = {"error": self._explain(job.operation.name, exc).to_json()}
        finally:
            job.answer = answer
            self._jobs.discard(job)
            job.done.set()

    def _explain(self, name: str, exc: BaseException) -> VsnapError:
        exc = leading(exc)
        if isinstance(exc, VsnapError):
            return exc
        if isinstance(exc, OSError):
            where = f" ({exc.filename})" if exc.filename else ""
            return VsnapError(f"{exc.strerror or exc}{where}", errno=exc.errno or 5, code="os")
        if isinstance(exc, MemoryError):
            return no_memory(name)
        self._unexpected(name, exc)
        return VsnapError(
            f"unexpected error in {name}: {type(exc).__name__}: {exc}",
            hint="This is a defect of vsnapfs; the server's log has the details.",
            code="unexpected",
        )

    def _unexpected(self, what: str, exc: BaseException) -> None:
        _logger.error("unexpected error in %s", what, exc_info=exc)
        self._volume.log.log("vsnapfs", 1090, what=what, reason=f"{type(exc).__name__}: {exc}")


def no_memory(what: str) -> VsnapError:
    """The error of an operation that ended for lack of memory."""
    return VsnapError(
        f"there is not enough memory for {what}",
        hint="Free some memory, or raise the limit the process runs under.",
        errno=12,
        code="no-memory",
    )


def _closing() -> VsnapError:
    return VsnapError(
        "the volume is being unmounted", hint="Try again in a moment.", errno=16, code="closing"
    )
