"""Clients of the control socket that give up, that only hold a connection, and a host that hangs.

The volume is a fake one whose operations queue until the test lets them begin (`queue`), and go on
after that until it lets them end (`slow`).
"""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trio
import trio.testing
from fake_volume import FakeVolume
from test_client import Openings, played
from test_control import Running, ask, error, lines, result, running, take_until_result, wait_for

import vsnapfs.volume
from vsnapfs.beginning import begin
from vsnapfs.daemon import client, clients, control, lifecycle, standby
from vsnapfs.daemon.preflight import Plan
from vsnapfs.errors import BusyError, VsnapError

pytestmark = pytest.mark.skipif(
    threading.current_thread() is not threading.main_thread(), reason="Ctrl-C needs the main thread"
)

OPERATIONS: dict[str, dict[str, Any]] = {
    "rp_create": {"label": "late"},
    "rp_delete": {"point": 1},
    "rp_restore": {"point": 1},
    "resize": {"total": 2 << 20},
    "offline": {},
    "online": {},
}


def request(op: str, **params: Any) -> bytes:
    return json.dumps({"op": op, "params": params}).encode() + b"\n"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Running]:
    with running(tmp_path) as server:
        prepare(server.volume)
        yield server


def prepare(volume: FakeVolume) -> None:
    volume.add_point(1)
    volume.data[0:1] = b"x"


def everything(volume: FakeVolume) -> tuple[Any, ...]:
    return volume.points, bytes(volume.data), volume.maximum, volume.online_state


@contextmanager
def held_up(server: Running, what: str = "queue") -> Iterator[Callable[[], None]]:
    """Operations wait in the queue (or, once begun, `slow`) until what this yields is called."""

    async def hold() -> None:
        setattr(server.volume, what, trio.Event())

    async def let_go() -> None:
        event = getattr(server.volume, what)
        setattr(server.volume, what, None)
        if event is not None:
            event.set()

    server.do(hold)
    try:
        yield lambda: server.do(let_go)
    finally:
        server.do(let_go)


def queued(server: Running, count: int = 1) -> bool:
    return wait_for(lambda: server.volume.in_queue == count)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Openings:
    openings = Openings()
    monkeypatch.setattr(vsnapfs.volume, "Volume", openings)
    return openings


# --- before it begins ----------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["closed", "shut down", "killed"])
@pytest.mark.parametrize("op", OPERATIONS)
def test_who_goes_before_it_begins_takes_it_along(server: Running, op: str, how: str) -> None:
    """Not begun when its client goes: dropped at once, never carried out, whatever comes later."""
    before = everything(server.volume)
    with held_up(server) as let_go:
        raw = request(op, **OPERATIONS[op])
        if how == "killed":
            script = (
                "import os, socket, sys\n"
                "folder = os.open(sys.argv[1], os.O_PATH)\n"
                "s = socket.socket(socket.AF_UNIX)\n"
                "s.connect(f'/proc/self/fd/{folder}/control.sock')\n"
                "s.sendall(sys.argv[2].encode())\n"
                "print(s.recv(100), flush=True)\n"
                "s.recv(100)\n"
                "input()\n"
            )
            command = [sys.executable, "-c", script, str(server.directory), raw.decode()]
            with subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE
            ) as process:
                assert queued(server)
                process.kill()
        else:
            with server.connect() as connection:
                connection.sendall(raw)
                assert queued(server)
                if how == "shut down":
                    connection.shutdown(socket.SHUT_RDWR)
                    assert wait_for(lambda: server.clients() == 0)
        assert queued(server, 0)
        let_go()
    assert result(server, "rp_list")  # whatever was to come has come
    assert everything(server.volume) == before


def test_who_only_says_no_more_still_waits(server: Running) -> None:
    """A half-closed connection (`printf … | socat`) waits for its answer, and gets it."""
    with held_up(server) as let_go, server.connect() as connection:
        connection.sendall(request("rp_create", label="piped").rstrip(b"\n"))
        connection.shutdown(socket.SHUT_WR)
        assert queued(server)
        assert result(server, "rp_list")  # the server has had every chance to take it for gone
        assert server.volume.in_queue == 1
        let_go()
        assert list(take_until_result(lines(connection)))[-1]["result"]["label"] == "piped"


def test_the_rest_of_a_connection_goes_with_it(server: Running) -> None:
    """Of several requests on one connection none is begun after its client has gone."""
    before = everything(server.volume)
    with held_up(server) as let_go:
        with server.connect() as connection:
            connection.sendall(b"".join(request(op, **OPERATIONS[op]) for op in OPERATIONS))
            assert queued(server)
        assert queued(server, 0)
        let_go()
    assert wait_for(lambda: server.clients() == 0)
    assert everything(server.volume) == before


def test_begun_and_carried_out_or_neither(server: Running) -> None:
    """Whoever hangs up and reads what is there knows: told that it has begun, it is carried out;
    not told so, it never is. Tried at every moment there is.
    """
    chance = random.Random(0)
    told = 0
    for number in range(300):
        label = f"number {number}"
        with server.connect() as connection:
            connection.sendall(request("rp_create", label=label))
            # Sometimes before it is even read, sometimes after the end.
            for _ in range(chance.randrange(4)):
                connection.recv(1)
            connection.shutdown(socket.SHUT_RDWR)
            rest = b"".join(iter(lambda c=connection: c.recv(4096), b""))
        begun = b'"begun": true' in rest
        told += begun
        assert wait_for(lambda: server.clients() == 0)
        labels = [point["label"] for point in result(server, "rp_list")]
        assert (label in labels) == begun, rest
    server.volume.log.close()


def test_who_cannot_be_told_does_not_begin(server: Running) -> None:
    """The message that it begins does not fit into a client's socket: it is not begun."""
    before = everything(server.volume)
    with held_up(server) as let_go, server.connect() as connection:
        connection.sendall(request("rp_delete", point=1))
        assert queued(server)

        async def stuff() -> None:
            (one,) = server.server._clients._all
            with pytest.raises(BlockingIOError):
                while True:
                    os.write(one.socket, b" " * 4096)

        server.do(stuff)
        let_go()
        assert queued(server, 0)
        assert wait_for(lambda: not server.server._jobs)
    assert everything(server.volume) == before


# --- once it has begun ---------------------------------------------------------------------------


def test_what_has_begun_goes_on_and_its_end_is_logged(server: Running) -> None:
    """A restore whose client leaves after `begun` ends as ever; event 1048 says how."""
    with held_up(server, "slow") as let_go:
        with server.connect() as connection:
            connection.sendall(request("rp_restore", point=1))
            answers = lines(connection)
            assert next(answers) == {"accepted": "rp_restore", "begins": True}
            assert next(answers) == {"begun": True}
            answers.close()
        assert wait_for(lambda: server.clients() == 0)
        assert server.volume.ended == []
        let_go()
    assert wait_for(lambda: server.volume.ended == ["restore"])
    assert server.volume.data[0] == 0
    assert wait_for(lambda: [e.event_id for e in server.volume.log.events()] == [1048])


def test_what_it_waits_for_is_told(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who waits is told what for, once as long as it is the same; who has begun is not."""
    monkeypatch.setattr(control, "WAITING_SECONDS", 0.01)
    server.volume.waits = "restoring recovery point 7 (since 07:20:00Z)"
    with held_up(server) as let_go, server.connect() as connection:
        connection.sendall(request("rp_delete", point=1))
        answers = lines(connection)
        assert next(answers) == {"accepted": "rp_delete", "begins": True}
        assert next(answers) == {"waiting": server.volume.waits}
        server.volume.waits = "another (since 07:21:00Z)"
        assert next(answers) == {"waiting": "another (since 07:21:00Z)"}
        let_go()
        assert next(answers) == {"begun": True}
        assert "result" in next(answers)


def test_at_the_end_what_has_not_begun_is_dropped(server: Running) -> None:
    """`finish_operations` tells those in the queue that nothing was done; status still works."""
    before = everything(server.volume)
    with held_up(server), server.connect() as connection:
        connection.sendall(request("rp_delete", point=1))
        assert queued(server)

        async def finish() -> None:
            with trio.fail_after(30):
                await server.server.finish_operations()

        server.do(finish)
        last = list(take_until_result(lines(connection)))[-1]
        assert (last["error"]["code"], last["begun"]) == ("closing", False)
        assert result(server, "status")["state"] == "online"
        assert error(server, {"op": "rp_create"})["code"] == "closing"
    assert everything(server.volume) == before


# --- many connections ----------------------------------------------------------------------------


def test_held_connections_give_way(server: Running) -> None:
    """Seventy that hold a connection and ask for nothing: everybody else is served as ever."""
    with ExitStack() as stack:
        held = [stack.enter_context(server.connect()) for _ in range(70)]
        for connection in held[::2]:
            connection.sendall(b'{"op": "sta')
        for _ in range(70):
            assert result(server, "status")["state"] == "online"
            assert result(server, "rp_list")
        # The longest idle ones went, and were told why.
        assert json.loads(held[0].makefile("rb").readline())["error"]["code"] == "too-many"
        assert server.clients() <= clients.MAX_CLIENTS + clients.MAX_GUESTS


def test_whose_request_is_under_way_is_not_put_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All places taken by operations in the queue: status and stop are answered, others are told
    that there are too many, and none in the queue loses its place.
    """
    monkeypatch.setattr(clients, "MAX_CLIENTS", 3)
    monkeypatch.setattr(clients, "MAX_GUESTS", 2)
    with running(tmp_path) as server, held_up(server) as let_go, ExitStack() as stack:
        busy = [stack.enter_context(server.connect()) for _ in range(3)]
        for number, connection in enumerate(busy):
            connection.sendall(request("rp_create", label=f"busy {number}"))
        assert queued(server, 3)
        silent = [stack.enter_context(server.connect()) for _ in range(10)]
        assert result(server, "status")["state"] == "online"
        assert error(server, {"op": "rp_list"})["code"] == "too-many"
        assert error(server, {"op": "stop"})["code"] == "protocol"  # it has been heard
        assert server.clients() <= 5
        assert json.loads(silent[0].makefile("rb").readline())["error"]["code"] == "too-many"
        assert server.volume.in_queue == 3
        let_go()
        for connection in busy:
            assert "result" in list(take_until_result(lines(connection)))[-1]
        assert len(server.volume.points) == 3


def test_a_request_that_is_there_already_is_not_put_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever has asked, though nobody has read it yet, is not idle; the longest idle one goes."""
    monkeypatch.setattr(clients, "MAX_CLIENTS", 3)

    async def main() -> None:
        with ExitStack() as stack:
            everybody = clients.Clients(b"farewell")
            theirs, ours = [], []
            for _ in range(5):
                pair = socket.socketpair()
                theirs.append(stack.enter_context(pair[0]))
                theirs[-1].setblocking(False)
                stack.enter_context(pair[1])
                stream = trio.SocketStream(trio.socket.from_stdlib_socket(pair[1].dup()))
                stack.callback(stream.socket.close)
                ours.append(clients.Client(stream))
            for client_ in ours[:3]:
                assert everybody.admit(client_)
            theirs[0].sendall(b"request")
            assert everybody.admit(ours[3])
            assert theirs[1].recv(100) == b"farewell"
            assert [one.scope.cancel_called for one in ours] == [False, True, False, False, False]
            assert not ours[3].is_guest
            for other in theirs:
                other.sendall(b"request")
            assert everybody.admit(ours[4])
            assert ours[4].is_guest

    trio.run(main)


def test_only_so_many_wait_for_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One `stop` too many is answered at once, with what the volume waits for."""
    monkeypatch.setattr(control, "MAX_STOPS", 2)
    with running(tmp_path) as server, ExitStack() as stack:
        never = trio.Event()

        async def stop(_volume: Any, _progress: Any) -> None:
            await never.wait()

        table = dict(server.server._operations)
        server.server._operations = table | {"stop": control.Operation("stop", stop)}
        server.volume.waits = "something (since 07:20:00Z)"
        for _ in range(2):
            connection = stack.enter_context(server.connect())
            connection.sendall(request("stop"))
            assert "accepted" in next(lines(connection))
        refused = error(server, {"op": "stop"})
        assert refused["code"] == "busy"
        assert refused["hint"] == "It waits for something (since 07:20:00Z)."
        assert result(server, "status")["state"] == "online"


# --- the server's own thread hangs in its host ---------------------------------------------------


@pytest.fixture
def hanging(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Running]:
    """A server whose loop stands still, until its `go_on` is set."""
    monkeypatch.setattr(standby, "STUCK_SECONDS", 0.1)
    monkeypatch.setattr(standby, "PATIENCE_SECONDS", 600.0)
    with running(tmp_path) as server:
        prepare(server.volume)
        waits: list[Any] = []
        server.server.status = lambda: (
            server.volume.status()
            | {"operations": {"running": None, "waiting": [], "waits_for": list(waits)}}
        )
        go_on, stands = threading.Event(), threading.Event()
        server.go_on = go_on  # type: ignore[attr-defined]

        def stand_still() -> None:
            stands.set()
            go_on.wait()

        server._token.run_sync_soon(stand_still)
        assert stands.wait(30)
        try:
            yield server
        finally:
            go_on.set()


def test_status_is_answered_while_the_loop_stands_still(hanging: Running) -> None:
    """From memory, and it says so; clients that hold a connection do not keep it from anybody."""
    with ExitStack() as stack:
        held = [stack.enter_context(hanging.connect()) for _ in range(100)]
        answers = ask(hanging, {"op": "status"})
        assert answers[0] == {"accepted": "status"}
        told = answers[-1]["result"]
        assert told["state"] == "online"
        (wait,) = told["operations"]["waits_for"]
        assert "hangs" in wait["what"]
        assert wait["seconds"] > 0
        assert client.call(hanging.directory, "status")["state"] == "online"
        assert held


def test_who_has_to_give_way_may_say_something_just_then(hanging: Running) -> None:
    """A newcomer takes the place of one that is heard or hangs up in the same moment."""
    with ExitStack() as stack:
        held = [stack.enter_context(hanging.connect()) for _ in range(standby.MAX_CONNECTIONS)]
        assert wait_for(lambda: len(_standby()._callers) == standby.MAX_CONNECTIONS)
        # Both must be found in one look.
        look = _standby()._one_round
        looking, look_on = threading.Event(), threading.Event()

        def later() -> None:
            looking.set()
            look_on.wait()
            look()

        _standby()._one_round = later  # type: ignore[method-assign]
        assert looking.wait(30)
        held[0].close()
        stack.enter_context(hanging.connect())
        look_on.set()
        assert ask(hanging, {"op": "status"})[0] == {"accepted": "status"}


def _standby() -> standby.Standby:
    """The one that stands in for the loop."""
    (thread,) = (thread for thread in threading.enumerate() if thread.name == "standby")
    found: standby.Standby = thread._target.__self__  # type: ignore[attr-defined]
    return found


class _NoDescriptors:
    """A listening socket on which a client knocks that cannot be let in."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self.times: list[float] = []

    def fileno(self) -> int:
        return self._listener.fileno()

    def close(self) -> None:
        self._listener.close()

    def accept(self) -> None:
        self.times.append(time.monotonic())
        raise OSError(errno.EMFILE, "Too many open files")


def test_without_a_descriptor_the_stand_in_does_not_spin(hanging: Running) -> None:
    """It waits a little between two attempts, and answers once there are descriptors again."""
    stand_in = _standby()
    full = _NoDescriptors(stand_in._listener)
    with hanging.connect() as connection:
        stand_in._listener, real = full, stand_in._listener  # type: ignore[assignment]
        connection.sendall(request("status"))
        assert wait_for(lambda: len(full.times) >= 4)
        gaps = [later - earlier for earlier, later in pairwise(full.times)]
        assert min(gaps) >= 0.9 * standby.SHORTAGE_SECONDS
        stand_in._listener = real
        assert b"accepted" in connection.recv(1 << 16)


class _FewDescriptors(_NoDescriptors):
    """The same, as long as the stand-in has given up fewer descriptors than it holds clients."""

    def __init__(self, stand_in: standby.Standby) -> None:
        super().__init__(stand_in._listener)
        self._stand_in = stand_in

    def accept(self) -> Any:
        given_up = standby._SPARE - len(self._stand_in._spare._spare)
        if given_up <= len(self._stand_in._callers):
            super().accept()
        return self._listener.accept()


def test_without_a_descriptor_the_stand_in_has_some_in_reserve(
    hanging: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Status is answered when none is free, though clients that wait have all of the reserve."""
    monkeypatch.setattr(standby, "SHORTAGE_SECONDS", 0.001)
    stand_in = _standby()
    few = _FewDescriptors(stand_in)
    stand_in._listener, real = few, stand_in._listener  # type: ignore[assignment]
    with ExitStack() as stack:
        for _ in range(2 * standby._SPARE):
            stack.enter_context(hanging.connect()).sendall(request("rp_list"))
        connection = stack.enter_context(hanging.connect())
        connection.settimeout(30)
        connection.sendall(request("status"))
        assert b"accepted" in connection.recv(1 << 16)
        stand_in._listener = real
    assert few.times


def test_a_limit_below_what_is_open_does_not_end_the_stand_in(hanging: Running) -> None:
    """Lowered from outside below what is open already, it is raised again as far as it goes."""
    _, hard = before = resource.getrlimit(resource.RLIMIT_NOFILE)
    with hanging.connect() as held, hanging.connect() as connection:
        held.sendall(request("rp_list"))
        assert b"waiting" in held.recv(1 << 16)
        connection.settimeout(30)
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (1, hard))
            connection.sendall(request("status"))
            assert b"accepted" in connection.recv(1 << 16)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_the_rest_is_told_in_time_and_not_done(
    hanging: Running, here: Openings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others, `stop` included, get an error before they lose patience; it is never carried out."""
    monkeypatch.setattr(standby, "PATIENCE_SECONDS", 0.1)
    before = everything(hanging.volume)
    for raw in (request("rp_delete", point=1), request("stop"), b"nonsense\n"):
        answers = ask(hanging, raw)
        assert "hangs" in answers[0]["waiting"]
        assert answers[-1]["error"]["code"] == "host-hangs"
        assert answers[-1]["begun"] is False
    with pytest.raises(VsnapError, match="hangs in its host"):
        client.call(hanging.directory, "rp_delete", point=1)
    hanging.go_on.set()  # type: ignore[attr-defined]
    here.locked_until = float("inf")  # as the server has it
    assert len(_once_it_goes_on(hanging)) == 1
    assert everything(hanging.volume) == before


def _once_it_goes_on(running: Running) -> Any:
    """The list of points; on a busy machine the stand-in may answer for a moment longer."""
    while True:
        try:
            return client.call(running.directory, "rp_list")
        except VsnapError as error:
            if error.code != "host-hangs":
                raise


def test_who_waits_is_served_once_the_loop_goes_on(hanging: Running, here: Openings) -> None:
    """A command that came while it stood still is carried out when it moves again, once."""
    here.locked_until = float("inf")  # as the server has it
    said: list[str] = []

    def say(sentence: str) -> None:
        said.append(sentence)
        hanging.go_on.set()  # type: ignore[attr-defined]

    assert client.call(hanging.directory, "rp_create", label="after", say=say)["label"] == "after"
    assert said
    assert "hangs" in said[0]
    assert [point.label for point in hanging.volume.points] == ["", "after"]


def test_who_has_waited_for_long_is_served_as_well(
    hanging: Running, here: Openings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How long the loop stood still does not count as time that somebody else had the lock."""
    here.locked_until = float("inf")  # as the server has it
    later = 0.0

    def say(_sentence: str) -> None:
        nonlocal later
        later = 1000.0
        hanging.go_on.set()  # type: ignore[attr-defined]

    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + later, sleep=time.sleep)
    monkeypatch.setattr(client, "time", clock)
    monkeypatch.setattr(client, "_LOCK_SECONDS", 60.0)
    assert client.call(hanging.directory, "rp_create", label="after", say=say)["label"] == "after"


# --- the client's side ---------------------------------------------------------------------------


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (b"", "had not begun, nothing was done"),
        (b'{"accepted": "rp_delete", "begins": true}\n', "had not begun, nothing was done"),
        (
            b'{"accepted": "rp_delete", "begins": true}\n{"waiting": "x"}\n{"begun": true}\n',
            f"has begun and goes on in the server (process {os.getpid()})",
        ),
        (b'{"accepted": "rp_delete"}\n', "may have begun"),
    ],
    ids=["nothing said", "accepted", "begun", "an older server"],
)
def test_ctrl_c_says_what_becomes_of_it(tmp_path: Path, reply: bytes, words: str) -> None:
    """Interrupted, the command says whether it had begun, and ends with 130; the server sees it."""
    gone = threading.Event()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(tmp_path / "control.sock"))
    listener.listen()

    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.makefile("rb").readline()
            connection.sendall(reply)
            interrupt()
            if connection.recv(1) == b"":
                gone.set()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        with pytest.raises(VsnapError) as caught:
            client.call(tmp_path, "rp_delete", point=1)
    finally:
        thread.join(30)
        listener.close()
    assert caught.value.exit_code == 130
    assert words in caught.value.message
    assert ("status" in caught.value.hint) == ("begun and" in words or "may" in words)
    assert gone.is_set()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_what_was_said_before_it_hung_up_is_heard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, here: Openings
) -> None:
    """A refusal that comes, with the end, before the request could be sent is the error."""
    monkeypatch.setattr(client, "_LOCK_SECONDS", 0.0)
    here.locked_until = float("inf")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(tmp_path / "control.sock"))
    listener.listen()
    send = client.Talk.request

    def refused_first(talk: client.Talk, op: str, params: Any) -> None:
        connection, _ = listener.accept()
        with connection:
            connection.sendall(control.encode({"error": clients.too_many().to_json()}))
        send(talk, op, params)

    monkeypatch.setattr(client.Talk, "request", refused_first)
    with listener, pytest.raises(VsnapError, match="too many clients"):
        client.call(tmp_path, "rp_delete", point=1)


def test_ctrl_c_while_looking_is_only_that(server: Running) -> None:
    """An operation that changes nothing has nothing to say: KeyboardInterrupt, as ever."""

    def stop(*_: Any) -> None:
        interrupt()

    with pytest.raises(KeyboardInterrupt):
        client.call(server.directory, "verify", progress=stop)
    assert wait_for(lambda: server.volume.ended == ["verify"])


def test_ctrl_c_against_a_real_server(server: Running) -> None:
    """Both halves together: nothing is carried out that was said not to have begun."""
    before = everything(server.volume)
    with held_up(server) as let_go:
        waiting = threading.Thread(target=lambda: queued(server) and interrupt())
        waiting.start()
        with pytest.raises(VsnapError, match="nothing was done"):
            client.call(server.directory, "rp_restore", point=1)
        waiting.join(30)
        assert queued(server, 0)
        let_go()
    assert everything(server.volume) == before
    with held_up(server, "slow") as let_go:
        with pytest.raises(VsnapError, match="has begun and goes on"):
            client.call(server.directory, "rp_restore", point=1, progress=lambda *_: interrupt())
        let_go()
    assert wait_for(lambda: server.volume.data[0] == 0)


@pytest.mark.parametrize("begun", [False, True])
def test_a_client_that_loses_patience_says_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begun: bool
) -> None:
    """A server that falls silent: the error says whether the operation goes on there."""
    monkeypatch.setattr(client, "_SILENCE_SECONDS", 0.3)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(tmp_path / "control.sock"))
    listener.listen()

    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.makefile("rb").readline()
            connection.sendall(b'{"accepted": "rp_delete", "begins": true}\n')
            connection.sendall(b'{"begun": true}\n' if begun else b"")
            connection.recv(1)

    thread = threading.Thread(target=serve)
    thread.start()
    with pytest.raises(VsnapError) as caught:
        client.call(tmp_path, "rp_delete", point=1)
    thread.join(30)
    listener.close()
    assert caught.value.code == "no-answer"
    assert ("goes on in the server" if begun else "nothing was done") in caught.value.hint


def test_what_a_dead_server_had_not_begun_is_done_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server dies, or closes, before it began: the command carries it out itself."""
    openings = Openings()
    monkeypatch.setattr(vsnapfs.volume, "Volume", openings)
    accepted = b'{"accepted": "rp_create", "begins": true}\n'
    closing = b'{"error": {"code": "closing"}, "begun": false}\n'
    for reply in (accepted, accepted + closing):
        with played(tmp_path, reply):
            assert client.call(tmp_path, "rp_create", label="x")["number"] == 1
    assert len(openings.volumes) == 2
    with played(tmp_path, accepted + b'{"begun": true}\n'), pytest.raises(VsnapError) as caught:
        client.call(tmp_path, "rp_create")
    assert caught.value.code == "server-gone"
    assert len(openings.volumes) == 2


# --- without a server ----------------------------------------------------------------------------


def test_ctrl_c_here_before_it_begins(tmp_path: Path, here: Openings) -> None:
    """Without a server: dropped, nothing done, the volume closed, 130."""

    def hold(volume: FakeVolume) -> None:
        prepare(volume)
        volume.queue = trio.Event()
        trio.lowlevel.current_trio_token().run_sync_soon(interrupt)

    here.prepare = hold
    with pytest.raises(VsnapError, match="had not begun, nothing was done") as caught:
        client.call(tmp_path, "rp_delete", point=1)
    (volume,) = here.volumes
    assert caught.value.exit_code == 130
    assert len(volume.points) == 1
    assert volume.ended[0] == "close"


def test_ctrl_c_here_at_the_last_moment(tmp_path: Path, here: Openings) -> None:
    """Without a server: Ctrl-C when nothing lies between it and the beginning any more."""

    def hold(volume: FakeVolume) -> None:
        async def turn() -> None:
            interrupt()
            begin()

        prepare(volume)
        volume._turn = turn  # type: ignore[method-assign]

    here.prepare = hold
    with pytest.raises(VsnapError, match="had not begun, nothing was done"):
        client.call(tmp_path, "rp_delete", point=1)
    assert len(here.volumes[0].points) == 1


def test_ctrl_c_here_once_it_has_begun(tmp_path: Path, here: Openings) -> None:
    """Without a server: said so, finished first, then 130."""
    said: list[str] = []

    def hold(volume: FakeVolume) -> None:
        prepare(volume)
        volume.slow = trio.Event()

    def say(sentence: str) -> None:
        said.append(sentence)
        here.volumes[0].slow.set()  # type: ignore[union-attr]

    here.prepare = hold
    with pytest.raises(VsnapError, match="had begun and was carried out") as caught:
        client.call(tmp_path, "rp_restore", point=1, progress=lambda *_: interrupt(), say=say)
    assert caught.value.exit_code == 130
    assert "has begun and is finished first" in said[0]
    assert here.volumes[0].data[0] == 0
    assert here.volumes[0].closed


def test_ctrl_c_twice_here_breaks_it_off(tmp_path: Path, here: Openings) -> None:
    """Without a server, a second Ctrl-C ends it where it can be ended; the volume is closed."""

    def hold(volume: FakeVolume) -> None:
        prepare(volume)
        volume.slow = trio.Event()

    here.prepare = hold
    with pytest.raises(VsnapError, match="was broken off") as caught:
        client.call(
            tmp_path, "rp_restore", point=1,
            progress=lambda *_: interrupt(), say=lambda _: interrupt(),
        )  # fmt: skip
    assert caught.value.exit_code == 130
    assert here.volumes[0].ended == ["restore", "close", "run"]


# --- the end of a server -------------------------------------------------------------------------


def a_server(directory: Path) -> lifecycle.Server:
    plan = Plan(directory, directory / "mnt", frozenset())
    return lifecycle.Server(plan, accept_changed_replica=False, lang="en", ready=lambda _: None)


def test_umount_is_answered_though_the_volume_cannot_be_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After its time `stop` says that the volume is not closed, and what it waits for."""
    monkeypatch.setattr(lifecycle, "CLOSE_SECONDS", 0.05)

    async def unmounted() -> None:
        """It is; only closing the volume hangs."""

    async def main() -> None:
        server = a_server(tmp_path)
        volume = FakeVolume(tmp_path)
        volume.waits = "a sync of the replica (since 07:20:00Z)"
        server._volume = volume  # type: ignore[assignment]
        monkeypatch.setattr(server, "_unmount", unmounted)
        with pytest.raises(VsnapError) as caught:
            await server._stop(volume, lambda *_: None, mountpoint=None)  # type: ignore[arg-type]
        assert caught.value.code == "not-closed"
        assert "it waits for a sync of the replica (since 07:20:00Z)" in caught.value.message
        assert str(os.getpid()) in caught.value.hint
        volume.log.close()

    trio.run(main)


def test_what_a_stopped_server_has_slept_through_is_no_use_by_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long it is stopped (SIGSTOP, a frozen container) as it unmounts: it looks again."""

    async def at_once(work: Callable[..., None], *args: Any) -> None:
        work(*args)

    async def main() -> None:
        server = a_server(tmp_path)
        server._device = "0:40"
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server._unmount)
            await trio.testing.wait_all_tasks_blocked()
            clock.jump(3600)
            await trio.testing.wait_all_tasks_blocked()
            server._loop_ended.set()
        server = a_server(tmp_path)
        server._device = "0:40"
        clock.autojump_threshold = 0
        with pytest.raises(BusyError, match="in use elsewhere"):
            await server._unmount()

    clock = trio.testing.MockClock()  # It stands still.
    top = SimpleNamespace(device="0:40")
    monkeypatch.setattr(lifecycle.mounts, "top_mount", lambda _: top)
    monkeypatch.setattr(lifecycle.mounts, "unmount_now", lambda _: None)
    monkeypatch.setattr(trio.to_thread, "run_sync", at_once)
    trio.run(main, clock=clock)


def test_a_mount_waits_for_a_server_that_is_closing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that answers but has no mount any more is about to end: it is waited for."""
    tries: list[Path] = []

    class Opening:
        @staticmethod
        async def open(directory: Path, **_: Any) -> str:
            tries.append(directory)
            if len(tries) < 3:
                raise BusyError("in use")
            return "opened"

    monkeypatch.setattr(vsnapfs.volume, "Volume", Opening)
    monkeypatch.setattr(lifecycle, "_LOCK_SECONDS", 600.0)
    monkeypatch.setattr(client, "server_pid", lambda _: 4321)
    plan = Plan(tmp_path, tmp_path / "mnt", frozenset())
    assert trio.run(lifecycle.open_volume, plan) == "opened"
    monkeypatch.setattr(lifecycle, "_LOCK_SECONDS", -1.0)
    tries.clear()
    with pytest.raises(VsnapError, match="served by process 4321"):
        trio.run(lifecycle.open_volume, plan)


@pytest.mark.expects_log
def test_without_another_thread_it_serves_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Where no thread can be had for the stand-in, clients are answered, and the log says so."""
    start = threading.Thread.start

    def refuses(thread: threading.Thread) -> None:
        if thread.name == "standby":
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuses)
    with running(tmp_path) as server:
        assert result(server, "status")
    assert "nobody will stand in" in caplog.text
