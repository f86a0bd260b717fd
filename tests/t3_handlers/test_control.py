"""The control socket with a real socket and a fake volume: protocol, bad clients, the end."""

from __future__ import annotations

import errno
import json
import os
import select
import socket
import stat
import threading
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from fake_volume import FakeVolume

from vsnapfs.daemon import control
from vsnapfs.daemon.control import ControlServer
from vsnapfs.daemon.operations import OPERATIONS
from vsnapfs.errors import VsnapError


class Running:
    """A control server in a thread of its own, over a fake volume."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.volume = FakeVolume(directory)
        self._ready = threading.Event()
        self._thread = threading.Thread(target=trio.run, args=(self._main,))

    async def _main(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        self._stop = trio.Event()
        self.volume.slow = None
        self.server = ControlServer(self.directory, self.volume, OPERATIONS)  # type: ignore[arg-type]
        self.server.listen()
        async with trio.open_nursery() as nursery:
            await nursery.start(self.server.serve)
            self._ready.set()
            await self._stop.wait()
            self.server.unlink()
            nursery.cancel_scope.cancel()

    def start(self) -> None:
        self._thread.start()
        assert self._ready.wait(60)

    def stop(self) -> None:
        self._token.run_sync_soon(self._stop.set)
        self._thread.join(10)
        assert not self._thread.is_alive()

    def do(self, function: Any, *args: Any) -> Any:
        """Run an async function in the server's loop."""
        return trio.from_thread.run(function, *args, trio_token=self._token)

    def clients(self) -> int:
        """How many connections the server knows of."""
        return len(self.server._clients._all)

    def connect(self) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.settimeout(10)
        folder = os.open(self.directory, os.O_PATH)
        try:
            connection.connect(f"/proc/self/fd/{folder}/control.sock")
        finally:
            os.close(folder)
        return connection


@contextmanager
def running(directory: Path) -> Iterator[Running]:
    server = Running(directory)
    server.start()
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Running]:
    with running(tmp_path) as server:
        yield server


def lines(connection: socket.socket) -> Generator[dict[str, Any]]:
    with connection.makefile("rb") as file:
        for line in file:
            yield json.loads(line)


def ask(server: Running, request: Any) -> list[dict[str, Any]]:
    """All answers to one request; bytes are sent as they are."""
    raw = request if isinstance(request, bytes) else json.dumps(request).encode() + b"\n"
    with server.connect() as connection:
        connection.sendall(raw)
        connection.shutdown(socket.SHUT_WR)
        answers = []
        try:
            for answer in lines(connection):
                answers.append(answer)  # noqa: PERF402 - keeps what came before a reset
        except ConnectionResetError:
            assert answers  # closed by a server that did not want to hear the rest
        return answers


def result(server: Running, op: str, **params: Any) -> Any:
    return ask(server, {"op": op, "params": params})[-1]["result"]


def error(server: Running, request: Any) -> dict[str, Any]:
    answer = ask(server, request)[-1]
    assert "error" in answer, answer
    return dict(answer["error"])


def test_an_operation_is_accepted_carried_out_and_answered(server: Running) -> None:
    """A request gets an acceptance and one result; a second client sees what the first did."""
    answers = ask(server, {"op": "rp_create", "params": {"label": "before"}})
    assert answers[:2] == [{"accepted": "rp_create", "begins": True}, {"begun": True}]
    assert answers[-1]["result"]["number"] == 1
    assert answers[-1]["result"]["label"] == "before"
    listed = result(server, "rp_list")
    assert [point["number"] for point in listed] == [1]
    assert listed[0]["created"] == "2026-11-22T07:20:01.000000Z"


def test_every_operation_of_the_table_reaches_the_volume(server: Running) -> None:
    """Each operation calls what its name says, with its parameters."""
    volume = server.volume
    assert result(server, "status")["state"] == "online"
    assert result(server, "rp_create")["label"] is None
    assert result(server, "rp_create", label="two")["number"] == 2
    assert result(server, "rp_resolve", point="latest")["number"] == 2
    volume.data[0:1] = b"x"
    assert result(server, "rp_restore", point="oldest")["number"] == 1
    assert volume.data[0] == 0
    assert result(server, "rp_delete", point=1, force=True)["number"] == 1
    assert result(server, "resize", total=12345)["diff_area"]["maximum"] == 12345
    assert result(server, "offline") is None
    assert not volume.online_state
    assert result(server, "online") == ["it may fault again"]
    assert result(server, "online", give_up_recovery_points=True) == []
    assert result(server, "verify")["ok"] is True


def test_several_requests_on_one_connection(server: Running) -> None:
    """A connection may ask again, also without waiting for the answer."""
    with server.connect() as connection:
        connection.sendall(b'{"op": "rp_create"}\n{"op": "rp_list"}\n')
        connection.shutdown(socket.SHUT_WR)
        results = [answer["result"] for answer in lines(connection) if "result" in answer]
    assert results[0]["number"] == 1
    assert len(results[1]) == 1


def test_a_last_line_needs_no_newline(server: Running) -> None:
    """`printf '{"op":"status"}' | socat - UNIX-CONNECT:control.sock` is answered."""
    assert "result" in ask(server, b'{"op": "status"}')[-1]


@pytest.mark.parametrize(
    "request_",
    [
        b"\n", b"nonsense\n", b"{\n", b"[]\n", b"null\n", b'"status"\n', b'{"op": 1}\n', b"{}\n",
        b'{"op": "status", "params": 3}\n', b"\xff\xfe\n", b"[" * 60000 + b"\n",
        b'{"op": "no such"}\n', b'{"op": "stop"}\n', b'{"op": "__class__"}\n',
    ],
    ids=lambda raw: repr(raw[:20]),
)  # fmt: skip
def test_nonsense_gets_an_error_and_harms_nobody(server: Running, request_: bytes) -> None:
    """What is no request is answered with an error, and the next request is served."""
    assert error(server, request_)["exit_code"] == 2
    assert result(server, "rp_list") == []


@pytest.mark.parametrize(
    ("op", "params"),
    [
        ("rp_create", {"label": 7}),
        ("rp_create", {"lable": "x"}),
        ("rp_resolve", {}),
        ("rp_delete", {"point": None}),
        ("rp_delete", {"point": 1.0}),
        ("rp_delete", {"point": True}),
        ("rp_delete", {"point": 1, "force": 1}),
        ("rp_restore", {"point": [1]}),
        ("resize", {"total": "1GiB"}),
        ("resize", {"total": True}),
        ("resize", {"total": 0}),
        ("resize", {"total": -1}),
        ("resize", {"total": 2**63}),
        ("online", {"give_up_recovery_points": "yes"}),
    ],
)
def test_wrong_parameters_are_refused_before_the_volume_sees_them(
    server: Running, op: str, params: dict[str, Any]
) -> None:
    """Missing, unknown, ill-typed and absurd parameters change nothing."""
    server.volume.add_point(1)
    assert error(server, {"op": op, "params": params})["code"] == "usage"
    assert [p.number for p in server.volume.points] == [1]
    assert server.volume.maximum == 1 << 20


def test_errors_of_the_volume_travel_whole(server: Running) -> None:
    """Message, hint, code, errno and exit code of a VsnapError reach the client."""

    async def fail(**_: Any) -> list[str]:
        raise VsnapError("no", hint="do this", errno=28, exit_code=3, code="still-faulted")

    server.volume.online = fail  # type: ignore[method-assign]
    assert error(server, {"op": "online"}) == {
        "message": "no", "hint": "do this", "errno": 28, "exit_code": 3, "code": "still-faulted",
    }  # fmt: skip


def test_an_oserror_is_told_with_its_errno(server: Running) -> None:
    """A plain failure of the host is an error with that errno, not a defect."""
    server.volume.fails = {"status": PermissionError(13, "Permission denied", "/area")}
    got = error(server, {"op": "status"})
    assert (got["errno"], got["message"]) == (13, "Permission denied (/area)")


@pytest.mark.expects_log
def test_a_defect_in_an_operation_is_an_event_and_the_server_lives(server: Running) -> None:
    """An exception nobody planned for is told to the client, logged, and harms nobody else."""
    server.volume.fails = {"status": ZeroDivisionError("defect")}
    assert error(server, {"op": "status"})["code"] == "unexpected"
    assert [e.event_id for e in server.volume.log.events()] == [1090]
    server.volume.fails = {"status": ExceptionGroup("group", [VsnapError("inner", code="x")])}
    assert error(server, {"op": "status"})["code"] == "x"
    assert result(server, "rp_list") == []


@pytest.mark.expects_log
def test_a_result_that_is_no_json_is_an_error(server: Running) -> None:
    """What cannot be told ends as an error, not as a connection that breaks off."""
    server.volume.status = lambda: {"path": Path("/x")}  # type: ignore[method-assign]
    assert error(server, {"op": "status"})["code"] == "unexpected"


@pytest.mark.parametrize("size", [control.MAX_REQUEST - 60, control.MAX_REQUEST + 1, 1 << 20])
def test_the_size_of_a_request_is_limited(server: Running, size: int) -> None:
    """64 KiB are taken, more is refused with an error and without keeping it in memory."""
    request = json.dumps({"op": "rp_create", "params": {"label": "x" * size}}).encode() + b"\n"
    with server.connect() as connection:
        try:
            connection.sendall(request)
        except (BrokenPipeError, ConnectionResetError):
            assert size > control.MAX_REQUEST
        try:
            answers = [next(lines(connection))]
        except (ConnectionResetError, StopIteration):
            answers = []
    if size < control.MAX_REQUEST:
        assert answers == [{"accepted": "rp_create", "begins": True}]
    else:
        assert not answers or answers[0]["error"]["code"] == "protocol"
        assert server.volume.points == ()


def test_silent_and_slow_clients_hold_nobody_up(server: Running) -> None:
    """Clients that say nothing, or half a line, or never read, do not delay another's answer."""
    idle = [server.connect() for _ in range(10)]
    for connection in idle[:5]:
        connection.sendall(b'{"op": "sta')
    for connection in idle[5:8]:
        connection.sendall(b'{"op": "verify"}\n')  # and never reads
    started = time.monotonic()
    assert result(server, "rp_list") == []
    # Long before the first of them is let go.
    assert time.monotonic() - started < control.IDLE_SECONDS / 2
    for connection in idle:
        connection.close()
    assert result(server, "rp_list") == []


def test_a_silent_client_is_let_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who has not asked within the time limit is disconnected, also if bytes trickle in."""
    monkeypatch.setattr(control, "IDLE_SECONDS", 0.3)
    with running(tmp_path) as server, server.connect() as silent, server.connect() as trickling:
        end = time.monotonic() + 30
        trickling.settimeout(0.05)
        while time.monotonic() < end:
            try:
                trickling.sendall(b"x")
                if trickling.recv(1) == b"":
                    break
            except TimeoutError:
                continue
            except (BrokenPipeError, ConnectionResetError):
                break
        else:
            pytest.fail("bytes that trickle in keep the connection")
        assert silent.recv(1) == b""


def test_a_client_that_does_not_read_is_let_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An answer larger than the socket's buffer waits for its reader only so long."""
    monkeypatch.setattr(control, "SEND_SECONDS", 0.3)
    with running(tmp_path) as server:
        server.volume.status = lambda: {"x": "y" * 10_000_000}  # type: ignore[method-assign]
        with server.connect() as connection:
            connection.sendall(b'{"op": "status"}\n')
            hung_up = select.poll()
            hung_up.register(connection, select.POLLRDHUP)
            assert hung_up.poll(30_000)
            with connection.makefile("rb") as file:
                assert len(file.read()) < 10_000_000
        assert result(server, "rp_list") == []


def test_progress_is_told_while_it_runs(server: Running) -> None:
    """A long operation reports phases and bytes, the last report before the result."""
    answers = ask(server, {"op": "verify"})
    told = [answer["progress"] for answer in answers if "progress" in answer]
    assert told[0][0] == "blocks"
    assert told[-1] == ["blocks", 3, 3]
    assert [list(told[i]) for i in range(len(told))] == sorted(told)
    assert "result" in answers[-1]


def test_signs_of_life_while_nothing_moves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An operation that reports nothing still lets its client know that the server lives."""
    monkeypatch.setattr(control, "ALIVE_SECONDS", 0.2)
    with running(tmp_path) as server, server.connect() as connection:

        async def stall() -> None:
            server.volume.slow = trio.Event()

        server.do(stall)
        server.volume.add_point(1)
        connection.sendall(b'{"op": "rp_restore", "params": {"point": 1}}\n')
        answers = lines(connection)
        while next(answers) != {"alive": True}:
            pass

        async def go_on() -> None:
            assert server.volume.slow is not None
            server.volume.slow.set()

        server.do(go_on)
        assert "result" in list(take_until_result(answers))[-1]


def take_until_result(answers: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for answer in answers:
        yield answer
        if "result" in answer or "error" in answer:
            return


@pytest.mark.parametrize(("op", "ended_early"), [("rp_restore", False), ("verify", True)])
def test_when_the_client_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, op: str, ended_early: bool
) -> None:
    """An operation that changes something runs to its end; one that only looks is ended."""
    monkeypatch.setattr(control, "ALIVE_SECONDS", 0.05)
    with running(tmp_path) as server:
        volume = server.volume
        volume.add_point(1)
        volume.data[0:1] = b"x"

        async def stall() -> None:
            volume.slow = trio.Event()

        server.do(stall)
        with server.connect() as connection:
            params = {"point": 1} if op == "rp_restore" else {}
            connection.sendall(json.dumps({"op": op, "params": params}).encode() + b"\n")
            answers = lines(connection)
            assert next(answers)["accepted"] == op
            if op == "rp_restore":
                assert next(answers) == {"begun": True}
            answers.close()
        if ended_early:
            assert wait_for(lambda: volume.ended == ["verify"])
            return
        assert wait_for(lambda: server.clients() == 0)
        assert volume.ended == []

        async def go_on() -> None:
            assert volume.slow is not None
            volume.slow.set()

        server.do(go_on)
        assert wait_for(lambda: volume.ended == ["restore"])
        assert volume.data[0] == 0


def wait_for(condition: Any, seconds: float = 30) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


def test_at_the_end_looking_is_ended_and_changing_finishes(server: Running) -> None:
    """`finish_operations` cancels a verify, waits for a restore, and begins nothing new."""
    volume = server.volume
    volume.add_point(1)

    async def stall() -> None:
        volume.slow = trio.Event()

    server.do(stall)
    with server.connect() as looking, server.connect() as changing:
        looking.sendall(b'{"op": "verify"}\n')
        changing.sendall(b'{"op": "rp_restore", "params": {"point": 1}}\n')
        answers = lines(changing)
        assert next(answers)["accepted"] == "rp_restore"
        assert next(answers) == {"begun": True}
        assert next(answers) == {"progress": ["restore", 1, 2]}

        async def finish() -> None:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(server.server.finish_operations)
                with trio.fail_after(30):
                    while "verify" not in volume.ended:  # noqa: ASYNC110
                        await trio.sleep(0.01)
                assert "restore" not in volume.ended
                assert volume.slow is not None
                volume.slow.set()
            await server.server.deliver()

        server.do(finish)
        assert list(take_until_result(lines(looking)))[-1]["error"]["code"] == "closing"
        assert "result" in list(take_until_result(answers))[-1]
    assert error(server, {"op": "rp_create"})["code"] == "closing"


def test_the_socket_is_private(server: Running) -> None:
    """The socket file has mode 0600 from the start, whatever the umask."""
    found = os.stat(server.directory / "control.sock")
    assert stat.S_ISSOCK(found.st_mode)
    assert stat.S_IMODE(found.st_mode) == 0o600


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_other_users_are_not_served(server: Running) -> None:
    """A client of another uid gets an error even if it can reach the socket."""
    path = server.directory / "control.sock"
    os.chmod(path, 0o666)
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    folder = os.open(server.directory, os.O_PATH)
    pid = os.fork()
    if pid == 0:  # the child connects as nobody and exits with what it found
        code = 9
        try:
            for parent in (server.directory, *server.directory.parents):
                if os.stat(parent).st_uid == 0 and parent != Path("/"):
                    os.chmod(parent, os.stat(parent).st_mode | 0o011)
            os.setresgid(65534, 65534, 65534)
            os.setresuid(65534, 65534, 65534)
            connection.connect(f"/proc/self/fd/{folder}/control.sock")
            connection.settimeout(5)
            got = json.loads(connection.makefile("rb").readline())
            code = 0 if got["error"]["code"] == "not-allowed" else 1
        finally:
            os._exit(code)
    os.close(folder)
    connection.close()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_a_dead_server_s_socket_is_replaced(tmp_path: Path) -> None:
    """A socket file that nobody listens on is no obstacle."""
    dead = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    dead.bind(str(tmp_path / "control.sock"))
    dead.close()
    with running(tmp_path) as server:
        assert result(server, "rp_list") == []
    assert not (tmp_path / "control.sock").exists()


def test_another_server_s_socket_is_left_alone(tmp_path: Path) -> None:
    """On its way out a server takes away only the socket it made itself."""
    with running(tmp_path):
        os.unlink(tmp_path / "control.sock")
        newer = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        newer.bind(str(tmp_path / "control.sock"))
    assert (tmp_path / "control.sock").exists()
    newer.close()


def test_a_deep_directory_is_no_obstacle(tmp_path: Path) -> None:
    """sun_path's 108 bytes do not limit how deep a volume may lie."""
    deep = tmp_path
    while len(str(deep)) < 300:
        deep /= "機" * 20
    deep.mkdir(parents=True)
    with running(deep) as server:
        assert result(server, "rp_create")["number"] == 1


def test_a_directory_that_takes_no_socket_is_an_error(tmp_path: Path) -> None:
    """A failure to bind is told with its reason."""
    volume = FakeVolume(tmp_path)
    (tmp_path / "control.sock").mkdir()
    server = ControlServer(tmp_path, volume, OPERATIONS)  # type: ignore[arg-type]
    with pytest.raises(VsnapError, match="control socket") as caught:
        server.listen()
    assert caught.value.code == "control-socket"


def test_a_full_host_that_takes_no_socket_is_told_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A host without one free inode refuses the mount, and the error says what helps."""

    def bind(_self: socket.socket, _address: str) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(socket.socket, "bind", bind)
    server = ControlServer(tmp_path, FakeVolume(tmp_path), OPERATIONS)  # type: ignore[arg-type]
    with pytest.raises(VsnapError, match="No space left") as caught:
        server.listen()
    assert "df -i" in caught.value.hint


def test_names_that_are_no_utf8_survive_the_wire() -> None:
    """A path with any bytes comes back the same from JSON."""
    name = os.fsdecode(b"/srv/\xff\xfe")
    assert json.loads(control.encode({"path": name}))["path"] == name
