"""The control socket, server side.

Protocol: a stream socket `control.sock` in the volume directory; every message is one line of JSON.

    →  {"op": "rp_create", "params": {"label": "before-upgrade"}}
    ←  {"accepted": "rp_create", "begins": true}       it is in the queue; nothing has changed yet
    ←  {"waiting": "restoring recovery point 3 (since 07:20:00Z)"}     what for; now and then
    ←  {"begun": true}                       from here on it runs to its end, whoever leaves
    ←  {"progress": ["restore", 1048576, 10485760]}      any number of times, bytes
    ←  {"alive": true}                       at least every 5 s, so silence means trouble
    ←  {"result": …}   or   {"error": {"message", "hint", "code", "exit_code", "errno"}}

A connection may ask again after an answer. Unknown keys of an answer are to be ignored. "begins"
promises that "begun" is told before anything is changed; operations that only look have neither.
Beside an error "begun": false says that nothing was done.

Promises: only root and the server's own user are answered; a request is at most 64 KiB; nothing a
client does or fails to do (silence, nonsense, half a line, not reading, going away) disturbs
another client or the mount. An operation whose client goes before it has begun is never carried
out; one that has begun runs to its end; one that only looks is ended. `status` and `stop` are
always answered, whatever number of connections is held (see `clients`), without free descriptors
(see `accepting`) and even while the host hangs so that this thread stands still (see `standby`).

Leaves the operations to `operations`, the moment they begin to `jobs`, and what stopping means to
`lifecycle`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trio

from vsnapfs.beginning import Abandoned, asked_by
from vsnapfs.daemon.accepting import Reserve, let_in
from vsnapfs.daemon.clients import ALWAYS, MAX_STOPS, Client, Clients, may_ask, too_many
from vsnapfs.daemon.jobs import Job, gone
from vsnapfs.daemon.listening import ControlSocket
from vsnapfs.daemon.operations import Operation
from vsnapfs.daemon.process import leading
from vsnapfs.daemon.standby import Standby
from vsnapfs.errors import BusyError, UsageError, VsnapError

if TYPE_CHECKING:
    from vsnapfs.volume import Volume

_logger = logging.getLogger("vsnapfs.daemon")

MAX_REQUEST = 64 * 1024
IDLE_SECONDS = 30.0  # from an answer (or the connection) to the next complete request
SEND_SECONDS = 10.0  # for a client to take one message
ALIVE_SECONDS = 5.0
WAITING_SECONDS = 1.0  # so often it is looked what an operation waits for
PROGRESS_SECONDS = 0.1
# How long operations that change something may go on once the mount has ended.
FINISH_SECONDS = 60.0
# How long whoever unmounts waits for the volume to be closed, and what was asked beside that.
CLOSE_SECONDS = FINISH_SECONDS + 30.0


def encode(message: Mapping[str, Any]) -> bytes:
    """One message on the wire. ASCII, so names that are no UTF-8 survive as lone surrogates."""
    return json.dumps(message, ensure_ascii=True).encode("ascii") + b"\n"


class ControlServer:
    """Answers on the volume's control socket.

    The caller holds the volume's lock, so a socket file found in the directory is a dead server's.
    """

    def __init__(
        self,
        directory: Path,
        volume: Volume,
        operations: Mapping[str, Operation],
        reserve: Reserve | None = None,
    ) -> None:
        self._directory = directory
        self._volume = volume
        self._operations = operations
        self._place = ControlSocket(directory)
        self._reserve = Reserve() if reserve is None else reserve
        self._jobs: set[Job] = set()
        self._busy = 0  # connections that are owed an answer
        self._clients = Clients(encode({"error": too_many().to_json()}))
        self._closing = False
        self._delivered = trio.Event()
        #: What `status` says, for when the loop cannot be asked; reads memory only, in any thread.
        self.status: Callable[[], dict[str, Any]] = volume.status

    # ---- the socket ----------------------------------------------------------------------------

    def listen(self) -> None:
        """Bind and listen; from now on clients can connect (and wait for `serve`). VsnapError."""
        self._place.listen()

    def unlink(self) -> None:
        """Take the socket's name away, if it is still ours. Open connections live on."""
        self._place.unlink()

    def _status_now(self) -> dict[str, Any]:
        return self.status()

    async def serve(self, task_status: Any = trio.TASK_STATUS_IGNORED) -> None:
        """Accept and answer until cancelled. Start it with `nursery.start`."""
        listening = self._place.take()
        listener = trio.SocketListener(trio.socket.from_stdlib_socket(listening))
        standby = Standby(listening, self._status_now)
        standby.start(trio.lowlevel.current_trio_token())
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                task_status.started()
                await let_in(listener, self._reserve, self._connection)
        finally:
            standby.stop()
            self._reserve.close()

    # ---- the end -------------------------------------------------------------------------------

    async def finish_operations(self) -> None:
        """Begin nothing more, and wait for what has begun.

        What only looks is ended; what has not begun is dropped, and its client told so.
        """
        self._closing = True
        jobs = [job for job in self._jobs if job.operation.name not in ALWAYS]
        for job in jobs:
            job.drop()
        with trio.move_on_after(FINISH_SECONDS):
            for job in jobs:
                await job.done.wait()
        self._volume.ends_now()
        for job in jobs:
            job.scope.cancel()

    async def deliver(self, seconds: float = 2.0) -> None:
        """Wait until every answer that is owed has been sent, but not longer than `seconds`."""
        with trio.move_on_after(seconds):
            while self._busy:
                self._delivered = trio.Event()
                await self._delivered.wait()

    # ---- one connection ------------------------------------------------------------------------

    async def _connection(self, stream: trio.SocketStream, short: bool = False) -> None:
        client = Client(stream)
        try:
            refusal = self._refusal(client, short)
            if refusal is not None:
                await self._send(stream, {"error": refusal.to_json()})
                return
            with client.scope:
                await self._serve(client)
        except (trio.BrokenResourceError, trio.TooSlowError):
            pass  # it went away, or does not read: its own affair
        except Exception as exc:  # noqa: BLE001 - one client's trouble must not end the others
            self._unexpected("the control socket", exc)
        finally:
            self._clients.leave(client)
            await trio.aclose_forcefully(stream)
            self._reserve.fill()

    async def _serve(self, client: Client) -> None:
        while (line := await self._request(client)) is not None:
            client.quiet_since = None
            self._busy += 1
            try:
                await self._answer(client, line)
            finally:
                self._busy -= 1
                self._delivered.set()
            if client.is_guest:
                return
            client.quiet_since = trio.current_time()

    def _refusal(self, client: Client, short: bool) -> VsnapError | None:
        """Why this client is not served, if so. One that may speak is counted in."""
        if not may_ask(client.stream.socket):
            return VsnapError("this volume belongs to another user", errno=13, code="not-allowed")
        return None if self._clients.admit(client, short=short) else too_many()

    async def _request(self, client: Client) -> bytes | None:
        """The next line; None when the client has nothing more to say, or says it too slowly."""
        stream, buffer = client.stream, client.buffer
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

    async def _answer(self, client: Client, line: bytes) -> None:
        stream = client.stream
        try:
            operation, params = self._understand(client, line)
        except VsnapError as error:
            await self._send(stream, {"error": error.to_json()})
            return
        accepted: dict[str, Any] = {"accepted": operation.name}
        if not operation.interruptible:
            accepted["begins"] = True
        await self._send(stream, accepted)
        with trio.fail_after(SEND_SECONDS):
            # What it has not read yet must not keep "begun" from it.
            await trio.lowlevel.wait_writable(client.socket)
        if self._closing and operation.name not in ALWAYS:
            await self._send(stream, {"error": _closing().to_json(), "begun": False})
            return
        job = Job(operation, client.socket)
        self._jobs.add(job)
        # Not a child of this connection: once it has begun it outlives a client that leaves.
        self._nursery.start_soon(self._perform, job, params)
        try:
            await self._follow(stream, job)
        finally:
            job.client_is_gone()  # or has its answer

    def _understand(self, client: Client, line: bytes) -> tuple[Operation, dict[str, Any]]:
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
        if operation.name not in ALWAYS:
            if self._closing:
                raise _closing()
            if client.is_guest:
                raise too_many()
        stops = sum(job.operation.name == "stop" for job in self._jobs)
        if operation.name == "stop" and stops >= MAX_STOPS:
            words = self._volume.waits_for()
            raise BusyError(
                f"{stops} clients wait already for this volume to be unmounted",
                hint=f"It waits for {words}." if words else "",
            )
        return operation, params

    async def _follow(self, stream: trio.SocketStream, job: Job) -> None:
        """Tell the client how it goes until it has its answer. BrokenResourceError if it goes."""
        left = False
        async with trio.open_nursery() as nursery:

            async def watch() -> None:
                nonlocal left
                await gone(stream.socket.fileno())
                left = True
                nursery.cancel_scope.cancel()

            nursery.start_soon(watch)
            try:
                await self._tell(stream, job)
            except (trio.BrokenResourceError, trio.TooSlowError):
                left = True  # raised below, where no nursery makes a group of it
            nursery.cancel_scope.cancel()
        if left:
            raise trio.BrokenResourceError

    async def _tell(self, stream: trio.SocketStream, job: Job) -> None:
        """Send progress, signs of life and what it waits for until the job is done; its answer."""
        told: tuple[str, int, int] | None = None
        waiting = ""
        last = looked = trio.current_time()
        while True:
            with trio.move_on_after(PROGRESS_SECONDS):
                await job.done.wait()
            now = trio.current_time()
            if job.latest != told:
                told = job.latest
                last = now
                await self._send(stream, {"progress": told})
            if job.done.is_set():
                await self._send(stream, job.answer)
                return
            if now - looked >= WAITING_SECONDS:
                looked = now
                words = self._what_it_waits_for(job)
                if words and words != waiting:
                    waiting = words
                    await self._send(stream, {"waiting": waiting})
            if now - last >= ALIVE_SECONDS:
                last = now
                await self._send(stream, {"alive": True})

    def _what_it_waits_for(self, job: Job) -> str:
        """In words, "" if for nothing worth saying."""
        is_stop = job.operation.name == "stop"
        queues = is_stop or not (job.begun or job.operation.interruptible)
        return self._volume.waits_for(host_only=not queues)

    async def _perform(self, job: Job, params: dict[str, Any]) -> None:
        answer: dict[str, Any] | None = None
        try:
            with job.scope, asked_by(job.begin):
                result = await job.operation(self._volume, params, job.report)
                encode({"result": result})  # what cannot be told fails here, in its own job
                answer = {"result": result}
        except Exception as exc:  # noqa: BLE001 - whatever it is, the client is told
            if not isinstance(leading(exc), Abandoned):
                answer = {"error": self._explain(job.operation.name, exc).to_json()}
        finally:
            if answer is None:  # dropped: there is nobody to read it, or the volume is closing
                answer = {"error": _closing().to_json()}
                if not job.operation.interruptible:
                    answer["begun"] = job.begun
            job.answer = answer
            self._jobs.discard(job)
            if job.begun and job.has_no_client and job.operation.name not in ALWAYS:
                self._nobody_was_told(job)
            job.done.set()

    def _nobody_was_told(self, job: Job) -> None:
        reason = job.answer["error"]["message"] if "error" in job.answer else None
        volume = str(self._directory)
        self._volume.log.log("vsnapfs", 1048, volume=volume, what=job.operation.name, reason=reason)

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
