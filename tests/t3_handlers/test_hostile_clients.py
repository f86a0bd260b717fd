"""Hostile clients of the control socket, and impostors behind it; the volume is a real one."""

from __future__ import annotations

import json
import os
import socket
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from served import Served, make

from vsnapfs.daemon import client
from vsnapfs.daemon.control import MAX_REQUEST
from vsnapfs.daemon.operations import OPERATIONS
from vsnapfs.errors import VsnapError

AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")


@pytest.fixture
def vol(tmp_path: Path) -> Path:
    return make(tmp_path / "vol")


# --- the control socket, in front of a real volume -----------------------------------------------


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    served = Served(make(tmp_path_factory.mktemp("served") / "vol"))
    try:
        yield served
    finally:
        served.stop()


def unexpected(served: Served) -> list[Any]:
    return [event for event in served.volume.log.events() if event.event_id == 1090]


NONSENSE = {
    "nothing": b"",
    "empty lines": b"\n\n\n",
    "noise": bytes(range(256)) * 8 + b"\n",
    "no JSON": b"status\n",
    "a list": b"[]\n",
    "nested": b"[" * 60_000 + b"\n",
    "nested in params": b'{"op": "rp_create", "params": {"label": ' + b"[" * 5000 + b"\n",
    "op a number": b'{"op": 5}\n',
    "op too long": b'{"op": "' + b"x" * 60_000 + b'"}\n',
    "unknown": b'{"op": "format_disk"}\n',
    "private": b'{"op": "__class__"}\n',
    "params a list": b'{"op": "status", "params": []}\n',
    "unknown param": b'{"op": "status", "params": {"self": 1}}\n',
    "a number of digits": b'{"op": "resize", "params": {"total": ' + b"9" * 60_000 + b"}}\n",
    "infinite": b'{"op": "resize", "params": {"total": 1e999}}\n',
    "negative": b'{"op": "resize", "params": {"total": -1}}\n',
    "too large": b'{"op": "resize", "params": {"total": 9223372036854775807}}\n',
    "huge point": b'{"op": "rp_delete", "params": {"point": ' + b"9" * 4000 + b"}}\n",
    "negative point": b'{"op": "rp_delete", "params": {"point": -1}}\n',
    "lone surrogate": b'{"op": "rp_create", "params": {"label": "\\ud800"}}\n',
    "escapes": b'{"op": "rp_create", "params": {"label": "\\u001b[2J"}}\n',
    "a path": b'{"op": "rp_create", "params": {"label": "../../etc"}}\n',
    "point a path": b'{"op": "rp_resolve", "params": {"point": "../0001"}}\n',
    "no utf-8": b'{"op": "status\xff\xfe"}\n',
    "NaN": b'{"op": "repair", "params": {"dry_run": NaN}}\n',
    "dry run 1": b'{"op": "repair", "params": {"dry_run": 1}}\n',
    "too long": b"x" * (MAX_REQUEST + 1),
    "a megabyte": b'{"op": "' + b"y" * (1 << 20),
}


@pytest.mark.parametrize("name", NONSENSE)
def test_nonsense_neither_blocks_nor_crashes_the_volume(served: Served, name: str) -> None:
    """Each nonsense gets an error or nothing, none is a defect, and the volume serves on."""
    for half_close in (True, False):
        if half_close or b"\n" in NONSENSE[name]:
            raw = NONSENSE[name] + (b"" if half_close else b'{"op": "' + b"z" * MAX_REQUEST)
            for answer in served.send(raw, half_close=half_close):
                assert "result" not in answer
                assert answer.get("error", {}).get("code") != "unexpected", answer
    assert served.use() < 5
    assert not unexpected(served)


def test_many_bad_clients_at_once_do_not_slow_it_down(served: Served) -> None:
    """Silent, half-closed, trickling and never reading clients beside one that works."""
    bad = []
    try:
        for number in range(40):
            connection = served.connect()
            bad.append(connection)
            if number % 4 == 1:
                connection.sendall(b'{"op": "stat')
            elif number % 4 == 2:
                connection.shutdown(socket.SHUT_WR)
            elif number % 4 == 3:
                connection.setblocking(False)
                with suppress(BlockingIOError):
                    for _ in range(300):
                        connection.send(b'{"op": "status"}\n' * 50)
        for _ in range(20):
            assert served.use() < 5
    finally:
        for connection in bad:
            connection.close()
    assert not unexpected(served)


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=200),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=6,
)
PARAMS = sorted({name for operation in OPERATIONS.values() for name in operation.params})


@settings(
    suppress_health_check=[
        *settings.default.suppress_health_check,
        HealthCheck.function_scoped_fixture,
    ]
)
@given(
    op=st.sampled_from(sorted(OPERATIONS)),
    params=st.dictionaries(st.sampled_from(PARAMS) | st.text(max_size=9), JUNK, max_size=3),
)
def test_any_parameters_get_an_answer(served: Served, op: str, params: dict[str, Any]) -> None:
    """Whatever an operation is given, the answer is a result or an error that was foreseen."""
    refusal: VsnapError | None = None
    request = {"op": op, "params": params}
    answers = served.send(json.dumps(request).encode() + b"\n")
    if "error" in answers[-1]:
        refusal = VsnapError.from_json(answers[-1]["error"])
    assert refusal is None or refusal.code != "unexpected", refusal
    assert refusal is None or "\n" not in refusal.message
    if client.call(served.directory, "status")["state"] == "offline":
        client.call(served.directory, "online")
    points = client.call(served.directory, "rp_list")
    for point in points[:-3]:
        client.call(served.directory, "rp_delete", point=point["number"])
    assert not unexpected(served)


@AS_ROOT
@pytest.mark.parametrize("uid", [1, 1000, 65534])
def test_another_uid_changes_nothing(served: Served, uid: int) -> None:
    """A real process of another uid that reaches the socket is refused, for looking as well."""
    points = client.call(served.directory, "rp_list")
    path = served.directory / "control.sock"
    folder = os.open(served.directory, os.O_PATH)
    closed = [place for place in path.parents if stat.S_IMODE(place.stat().st_mode) & 0o1 == 0]
    modes = {place: stat.S_IMODE(place.stat().st_mode) for place in [*closed, path]}
    try:
        for place, mode in modes.items():
            place.chmod(0o666 if place == path else mode | 0o011)
        for op in ("status", "offline", "rp_create", "stop"):
            pid = os.fork()
            if pid == 0:  # the child becomes somebody else and exits with what it found
                code = 9
                try:
                    os.setresgid(uid, uid, uid)
                    os.setresuid(uid, uid, uid)
                    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                    connection.settimeout(10)
                    connection.connect(f"/proc/self/fd/{folder}/control.sock")
                    try:
                        connection.sendall(json.dumps({"op": op}).encode() + b"\n")
                        got = json.loads(connection.makefile("rb").readline())
                        code = 0 if got["error"]["code"] == "not-allowed" else 1
                    except (BrokenPipeError, ConnectionResetError):
                        code = 0  # refused before it was heard
                finally:
                    os._exit(code)
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, op
    finally:
        for place, mode in modes.items():
            place.chmod(mode)
        os.close(folder)
    assert served.use() < 5
    assert client.call(served.directory, "rp_list") == points


# --- what answers on the socket may be somebody else's -------------------------------------------


@contextmanager
def impostor(directory: Path, answer: Callable[[socket.socket], None]) -> Iterator[list[bytes]]:
    """Something that listens where the server should. Yields what it was sent."""
    heard: list[bytes] = []
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(directory / "control.sock"))
    listener.listen()

    def serve() -> None:
        with suppress(OSError):
            while True:
                connection, _ = listener.accept()
                with connection, suppress(OSError):
                    connection.settimeout(10)
                    heard.append(connection.recv(65536))
                    answer(connection)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield heard
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(10)


ANSWERS = {
    "no JSON": b"hello\n",
    "a list": b"[1]\n",
    "nested": b"[" * 100_000 + b"\n",
    "error a text": b'{"error": "no"}\n',
    "error of nothing": b'{"error": {"errno": [], "exit_code": "x", "code": 5, "hint": {}}}\n',
    "exit code 0": b'{"accepted": "status"}\n{"error": {"message": "m", "exit_code": 0}}\n',
    "progress a text": b'{"progress": "abc"}\n{"result": 1}\n',
    "progress too short": b'{"progress": [1]}\n{"result": 1}\n',
    "progress of texts": b'{"progress": ["a", "b", "c"]}\n{"result": 1}\n',
    "progress huge": b'{"progress": ["a", ' + b"9" * 300 + b", 1]}\n",
    "no utf-8": b'\xff\xfe{"result": 1}\n',
    "cut": b'{"accepted": "status"}\n{"resu',
}


@pytest.mark.parametrize("name", ANSWERS)
def test_a_strange_answer_is_an_error(vol: Path, name: str) -> None:
    """Whatever answers instead of our server: a clear error, no crash, never a success."""

    def answer(connection: socket.socket) -> None:
        connection.sendall(ANSWERS[name])

    with impostor(vol, answer), pytest.raises(VsnapError) as raised:
        client.call(vol, "status", progress=lambda *_: None)
    assert raised.value.code in ("protocol", "server-gone", "error", "5")
    assert 0 < raised.value.exit_code < 256


def test_an_endless_answer_ends(vol: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line that never ends is cut off, not collected until memory is gone."""
    monkeypatch.setattr(client, "_LONGEST_ANSWER", 1 << 20)
    sent = 0

    def answer(connection: socket.socket) -> None:
        nonlocal sent
        while sent < 64 << 20:
            sent += connection.send(b"[" * 65536)

    with impostor(vol, answer), pytest.raises(VsnapError) as raised:
        client.call(vol, "status")
    assert raised.value.code == "protocol"
    assert sent < 8 << 20


def test_a_socket_of_another_user_is_not_believed(vol: Path) -> None:
    """If neither root, nor we, nor the owner of the directory listens, nothing is even asked."""
    with (
        impostor(vol, lambda connection: None) as heard,
        mock.patch.object(client, "_peer", return_value=(1, 4242, 4242)),
        pytest.raises(VsnapError) as raised,
    ):
        client.call(vol, "rp_create")
    assert raised.value.code == "not-allowed"
    assert "4242" in raised.value.message
    assert not any(heard)


def test_the_owner_of_the_directory_is_believed(vol: Path) -> None:
    """Root may ask the server that a user runs for his own volume."""

    def answer(connection: socket.socket) -> None:
        connection.sendall(b'{"result": 5}\n')

    mine = os.geteuid()
    with (
        impostor(vol, answer),
        mock.patch.object(os, "geteuid", return_value=mine + 1),
    ):
        assert client.call(vol, "status") == 5


def test_a_link_to_another_socket_is_not_followed(vol: Path, tmp_path: Path) -> None:
    """control.sock is a link to another program's socket: that one hears nothing."""
    other = tmp_path / "other"
    other.mkdir()
    with impostor(other, lambda connection: None) as heard:
        (vol / "control.sock").symlink_to(other / "control.sock")
        assert client.call(vol, "status")["pid"] is None  # so it was opened here
        assert not client.is_served(vol)
    assert heard == []


def test_repair_goes_through_the_server(tmp_path: Path) -> None:
    """A mounted volume is repaired by its server; a dry run there only tells."""
    directory = make(tmp_path / "vol")
    served = Served(directory)
    try:
        area = directory / "diff-area"
        with area.open("r+b") as file:
            file.seek(65536 + 100)
            file.write(b"rot")
        rotted = area.read_bytes()
        dry = client.call(directory, "repair", dry_run=True)
        assert [finding["done"] for finding in dry["found"]] == [False]
        assert area.read_bytes() == rotted
        report = client.call(directory, "repair")
        (finding,) = report["found"]
        assert (finding["what"], finding["offset"], finding["when"]) == ("superblock", 65536, "now")
        assert finding["done"]
        assert report["ok"]
        assert client.call(directory, "verify")["ok"]
        assert client.call(directory, "repair")["found"] == []
    finally:
        served.stop()
