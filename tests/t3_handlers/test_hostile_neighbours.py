"""Hostile neighbours: who shares machine, directory or socket with a volume and means ill."""

from __future__ import annotations

import errno
import json
import os
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vsnapfs import config
from vsnapfs.daemon import client, process
from vsnapfs.daemon.control import MAX_REQUEST, ControlServer
from vsnapfs.daemon.operations import OPERATIONS
from vsnapfs.errors import VsnapError
from vsnapfs.volume import Volume
from vsnapfs.volume.create import create_volume

BLOCK = 4096
SIZE = 40_000
NAMES = ("state", "events.jsonl", "replica.img", "diff-area", "control.sock", "server.log")
VICTIM = b"somebody else's precious file\n" * 500
AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")


@pytest.fixture
def vol(tmp_path: Path) -> Path:
    return make(tmp_path / "vol")


def make(directory: Path, **options: Any) -> Path:
    create_volume(directory, size=SIZE, diff_area_size=384 << 10, block_size=BLOCK, **options)
    return directory


# --- the control socket, in front of a real volume -----------------------------------------------


class Served:
    """A real volume behind a real control socket, in a thread of its own."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._ready = threading.Event()
        self._thread = threading.Thread(target=trio.run, args=(self._main,))
        self._thread.start()
        assert self._ready.wait(10)

    async def _main(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        self._stop = trio.Event()
        self.volume = await Volume.open(self.directory, mountpoint="/nowhere")
        server = ControlServer(self.directory, self.volume, OPERATIONS)
        server.listen()
        async with trio.open_nursery() as nursery:
            await nursery.start(self.volume.run)
            await nursery.start(server.serve)
            self._ready.set()
            await self._stop.wait()
            server.unlink()
            await self.volume.close()
            nursery.cancel_scope.cancel()

    def stop(self) -> None:
        self._token.run_sync_soon(self._stop.set)
        self._thread.join(20)
        assert not self._thread.is_alive()

    def connect(self) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.settimeout(20)
        connection.connect(str(self.directory / "control.sock"))
        return connection

    def send(self, raw: bytes, *, half_close: bool = True) -> list[dict[str, Any]]:
        """What is answered to these bytes until the server closes."""
        with self.connect() as connection:
            with suppress(BrokenPipeError, ConnectionResetError):
                connection.sendall(raw)
            if half_close:
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_WR)
            answers = []
            with suppress(ConnectionResetError):
                for line in connection.makefile("rb"):
                    answers.append(json.loads(line))  # noqa: PERF401 - keeps those before a reset
            return answers

    def use(self) -> float:
        """Write and read through the engine and ask for the status; the seconds it took."""

        async def work() -> None:
            handle = self.volume.open_replica()
            try:
                await handle.write(100, b"still here")
                assert bytes(await handle.read(100, 10)) == b"still here"
            finally:
                handle.close()

        started = time.monotonic()
        trio.from_thread.run(work, trio_token=self._token)
        assert client.call(self.directory, "status")["state"] == "online"
        return time.monotonic() - started


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


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
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


# --- links in the volume directory ---------------------------------------------------------------


def everything(directory: Path) -> list[Exception]:
    """Use the volume in each way that opens its files; the errors."""
    errors: list[Exception] = []

    def serve() -> None:
        log = process.open_log(directory)
        os.write(log, b"a line of the server's log\n")
        os.close(log)

        async def open_and_listen() -> None:
            volume = await Volume.open(directory, mountpoint="/nowhere")
            try:
                server = ControlServer(directory, volume, OPERATIONS)
                server.listen()
                server.unlink()
                assert server._socket is not None
                server._socket.close()
                async with trio.open_nursery() as nursery:
                    await nursery.start(volume.run)
                    with suppress(VsnapError, OSError):
                        await volume.create_point("x")
                    with suppress(VsnapError, OSError):
                        handle = volume.open_replica()
                        await handle.write(0, b"overwritten" * 100)
                        await handle.flush()
                        handle.close()
                    nursery.cancel_scope.cancel()
            finally:
                await volume.close()

        trio.run(open_and_listen)

    steps: list[Callable[[], Any]] = [
        lambda: client.call(directory, "status"),
        lambda: client.call(directory, "verify"),
        lambda: client.call(directory, "repair"),
        lambda: client.call(directory, "repair", dry_run=True),
        serve,
        lambda: client.call(directory, "online", give_up_recovery_points=True),
        lambda: config.save(directory, config.load(directory)),
    ]
    for step in steps:
        try:
            step()
        except (VsnapError, OSError) as error:
            errors.append(error)
    return errors


@pytest.mark.expects_log
@pytest.mark.parametrize("kind", ["file", "nothing", "other volume", "fifo", "directory"])
@pytest.mark.parametrize("name", [*NAMES, "volume.toml"])
def test_links_do_not_lead_out(vol: Path, tmp_path: Path, name: str, kind: str) -> None:
    """A link in each file's place: its target is neither changed nor made nor waited for."""
    outside = tmp_path / "outside"
    outside.mkdir(mode=0o700)
    victim = outside / "victim"
    if kind == "file":
        victim.write_bytes(VICTIM)
    elif kind == "other volume":
        # What would be accepted if only it were not outside: the volume's own file.
        if (vol / name).exists():
            victim.write_bytes((vol / name).read_bytes())
        else:
            victim.write_bytes(b"")
    elif kind == "fifo":
        os.mkfifo(victim)
    elif kind == "directory":
        victim.mkdir()
    before = victim.read_bytes() if victim.is_file() else b""
    info = victim.stat() if victim.exists() else None
    with suppress(FileNotFoundError):
        (vol / name).unlink()
    (vol / name).symlink_to(victim)
    errors = everything(vol)
    if info is None:
        assert not victim.exists()
    else:
        after = victim.stat()
        assert (after.st_mtime_ns, after.st_size, after.st_mode) == (
            *(info.st_mtime_ns, info.st_size, info.st_mode),
        )
        assert (victim.read_bytes() if victim.is_file() else b"") == before
    assert list(outside.iterdir()) == ([victim] if info else [])
    if name in ("state", "replica.img", "volume.toml"):
        assert any("symbolic link" in str(error) for error in errors)
    assert not [error for error in errors if "unexpected" in str(error)]


@pytest.mark.parametrize("kind", [os.mkfifo, Path.mkdir], ids=["fifo", "directory"])
@pytest.mark.parametrize("name", ["state", "replica.img", "diff-area", "server.log"])
def test_other_things_in_their_place_are_not_waited_for(
    vol: Path, name: str, kind: Callable[[Path], None]
) -> None:
    """A pipe or a directory in a file's place is an error at once."""
    with suppress(FileNotFoundError):
        (vol / name).unlink()
    kind(vol / name)
    started = time.monotonic()
    assert everything(vol)
    assert time.monotonic() - started < 20


def test_what_is_made_is_private(tmp_path: Path) -> None:
    """Every file is 0600 and the directory 0700, whatever the umask allows."""
    umask = os.umask(0)
    try:
        directory = make(tmp_path / "vol")
        (directory / "state").unlink()  # made anew at opening
        (directory / "events.jsonl").unlink()
        assert everything(directory)[:0] == []
        seen: dict[str, int] = {}
        served = Served(directory)
        try:
            for path in directory.iterdir():
                seen[path.name] = stat.S_IMODE(path.lstat().st_mode)
        finally:
            served.stop()
    finally:
        os.umask(umask)
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert set(seen) == {*NAMES, "volume.toml"}
    assert set(seen.values()) == {0o600}, seen


# --- paths out of the volume directory -----------------------------------------------------------


@pytest.fixture
def led_out(tmp_path: Path) -> Path:
    """A volume whose diff area lies elsewhere."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    return make(tmp_path / "vol", diff_area=elsewhere / "area")


@pytest.mark.parametrize(
    ("what", "mode"),
    [(".", 0o770), (".", 0o702), (".", 0o1777), ("volume.toml", 0o620), ("volume.toml", 0o602)],
)
def test_a_path_that_others_could_have_written_is_not_followed(
    led_out: Path, what: str, mode: int
) -> None:
    """Group or others may write the directory or volume.toml: refused, with the way out."""
    assert client.call(led_out, "status")["state"] == "online"
    (led_out / what).chmod(mode)
    with pytest.raises(VsnapError) as raised:
        client.call(led_out, "status")
    assert raised.value.code == "not-private"
    assert raised.value.errno == errno.EPERM
    assert f"{mode:04o}" in raised.value.message
    assert "chmod go-w" in raised.value.hint
    (led_out / what).chmod(mode & ~0o022)
    assert client.call(led_out, "status")["state"] == "online"


def test_without_such_a_path_nobody_is_asked(vol: Path) -> None:
    """A volume that keeps to itself opens in whatever directory it is."""
    vol.chmod(0o777)
    (vol / "volume.toml").chmod(0o666)
    assert client.call(vol, "status")["state"] == "online"


@pytest.mark.parametrize("path", ["./replica.img", "sub/replica.img", "../x", "/dev/null"])
def test_every_path_that_is_no_plain_name_counts(vol: Path, path: str) -> None:
    """A directory on the way may be a link: all but plain names need trust."""
    text = (vol / "volume.toml").read_text().replace('"replica.img"', json.dumps(path))
    (vol / "volume.toml").write_text(text)
    vol.chmod(0o770)
    with pytest.raises(VsnapError) as raised:
        config.load(vol)
    assert raised.value.code == "not-private"


@AS_ROOT
@pytest.mark.parametrize("what", [".", "volume.toml"])
def test_a_path_that_another_user_wrote_is_not_followed(led_out: Path, what: str) -> None:
    """Root opens a user's volume: its plain names yes, the paths in it no."""
    os.chown(led_out / what, 1000, 1000)
    with pytest.raises(VsnapError) as raised:
        client.call(led_out, "status")
    assert raised.value.code == "not-private"
    assert "uid 1000" in raised.value.message
    with mock.patch.object(os, "geteuid", return_value=1000):
        assert config.load(led_out).diff_area.endswith("elsewhere/area")


def test_create_refuses_what_could_not_be_opened(tmp_path: Path) -> None:
    """`create` into a directory that others can write, with a path out of it: nothing is made."""
    directory, elsewhere = tmp_path / "shared", tmp_path / "elsewhere"
    directory.mkdir()
    directory.chmod(0o777)
    elsewhere.mkdir()
    with pytest.raises(VsnapError) as raised:
        make(directory, diff_area=elsewhere / "area")
    assert raised.value.code == "not-private"
    assert not list(directory.iterdir())
    assert not list(elsewhere.iterdir())
    assert make(directory).exists()


@pytest.mark.expects_log
def test_create_follows_no_link_either(tmp_path: Path) -> None:
    """Links that wait in the directory for `create`: what they point to is not touched."""
    for name in ("replica.img", "diff-area", "state", "events.jsonl", "volume.toml"):
        directory = tmp_path / f"for-{name}"
        directory.mkdir()
        victim = tmp_path / f"victim-{name}"
        victim.write_bytes(b"")
        (directory / name).symlink_to(victim)
        with suppress(VsnapError, OSError):
            make(directory, force=True)
        assert victim.read_bytes() == b"", name
        assert stat.S_IMODE(victim.stat().st_mode) & 0o600 == 0o600


def test_a_device_node_is_not_even_opened(vol: Path) -> None:
    """Opening a tape or a watchdog does something: what is no file and no disk is not opened."""
    text = (vol / "volume.toml").read_text().replace('"replica.img"', '"/dev/null"')
    (vol / "volume.toml").write_text(text)
    opened: list[str] = []
    real = os.open

    def watch(path: Any, *args: Any, **options: Any) -> int:
        opened.append(str(path))
        return real(path, *args, **options)

    with mock.patch.object(os, "open", watch), pytest.raises(VsnapError) as raised:
        client.call(vol, "status")
    assert "neither a file nor a block device" in raised.value.message
    assert "/dev/null" not in opened
