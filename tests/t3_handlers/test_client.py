"""`client.call`: through the socket or directly, with what can go wrong between the two."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fake_volume import FakeVolume
from test_control import running

import vsnapfs.volume
from vsnapfs.daemon import client
from vsnapfs.errors import BusyError, VsnapError


class Openings:
    """Takes the place of `Volume`: hands out fake volumes and remembers them."""

    def __init__(self) -> None:
        self.volumes: list[FakeVolume] = []
        self.locked_until = 0.0
        self.failure: Exception | None = None
        self.prepare: Callable[[FakeVolume], None] = lambda volume: None

    async def open(self, directory: Path, **_: Any) -> FakeVolume:
        if time.monotonic() < self.locked_until:
            raise BusyError(f"{directory} is in use by another process")
        if self.failure is not None:
            raise self.failure
        self.volumes.append(FakeVolume(Path(directory)))
        self.prepare(self.volumes[-1])
        return self.volumes[-1]


@pytest.fixture
def openings(monkeypatch: pytest.MonkeyPatch) -> Openings:
    openings = Openings()
    monkeypatch.setattr(vsnapfs.volume, "Volume", openings)
    return openings


def test_a_served_volume_is_asked_through_its_socket(tmp_path: Path, openings: Openings) -> None:
    """With a server, the operation runs there and the volume is not opened here."""
    with running(tmp_path) as server:
        assert client.call(tmp_path, "rp_create", label="x")["number"] == 1
        assert len(server.volume.points) == 1
        assert client.is_served(tmp_path)
        assert client.server_pid(tmp_path) == os.getpid()
    assert openings.volumes == []
    assert not client.is_served(tmp_path)
    assert client.server_pid(tmp_path) is None


def test_without_a_server_the_volume_is_opened_here(tmp_path: Path, openings: Openings) -> None:
    """The same operation runs directly, with the volume's background tasks, and closes cleanly."""
    told: list[tuple[Any, ...]] = []
    result = client.call(tmp_path, "verify", progress=lambda *args: told.append(args))
    assert result["ok"] is True
    assert told[-1] == ("blocks", 3, 3)
    (volume,) = openings.volumes
    assert volume.running.is_set()
    assert volume.ended == ["verify", "close", "run"]


def test_status_of_an_unserved_volume_names_no_process(tmp_path: Path, openings: Openings) -> None:
    """The command's own pid is not the pid of a server."""
    status = client.call(tmp_path, "status")
    assert status["pid"] is None
    assert status["mountpoint"] is None


@pytest.mark.parametrize(
    "failure",
    [VsnapError("plain", code="x"), ExceptionGroup("in a group", [VsnapError("inner", code="x")])],
    ids=["plain", "group"],
)
def test_errors_come_out_as_themselves_and_the_volume_is_closed(
    tmp_path: Path, openings: Openings, failure: Exception
) -> None:
    """An operation that fails raises its VsnapError, never a group, after a clean close."""
    openings.prepare = lambda volume: volume.fails.update(status=failure)
    with pytest.raises(VsnapError) as caught:
        client.call(tmp_path, "status")
    assert caught.value.code == "x"
    assert openings.volumes[0].ended == ["close", "run"]


def test_an_error_at_opening_comes_out(tmp_path: Path, openings: Openings) -> None:
    """What keeps the volume from opening is the error, without delay."""
    openings.failure = VsnapError("no such volume", code="no-volume")
    started = time.monotonic()
    with pytest.raises(VsnapError, match="no such volume"):
        client.call(tmp_path, "status")
    assert time.monotonic() - started < client._LOCK_SECONDS / 2


def test_a_failing_close_is_told(tmp_path: Path, openings: Openings) -> None:
    """If the volume cannot be closed, the command fails although its operation succeeded."""
    openings.prepare = lambda v: v.fails.update(close=OSError(5, "Input/output error"))
    with pytest.raises(OSError, match="Input/output error"):
        client.call(tmp_path, "rp_create")


def test_an_interruption_closes_the_volume(tmp_path: Path, openings: Openings) -> None:
    """Ctrl-C in the middle of an operation still closes the volume, and stays an interruption."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        client.call(tmp_path, "verify", progress=interrupt)
    assert openings.volumes[0].ended[-2:] == ["close", "run"]


def test_stop_needs_a_server(tmp_path: Path, openings: Openings) -> None:
    """Nothing is opened only to be stopped."""
    with pytest.raises(VsnapError) as caught:
        client.call(tmp_path, "stop")
    assert caught.value.code == "not-mounted"
    assert openings.volumes == []


def test_a_lock_held_for_a_moment_is_waited_for(tmp_path: Path, openings: Openings) -> None:
    """While another process is just closing the volume, a command waits instead of failing."""
    openings.locked_until = time.monotonic() + 0.4
    assert client.call(tmp_path, "rp_list") == []


def test_a_lock_held_for_long_is_an_error(
    tmp_path: Path, openings: Openings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lock that nobody answers for is reported as it was found."""
    monkeypatch.setattr(client, "_LOCK_SECONDS", 0.3)
    openings.locked_until = time.monotonic() + 60
    with pytest.raises(BusyError, match="another process"):
        client.call(tmp_path, "rp_list")


def test_a_busy_operation_is_not_taken_for_a_lock(tmp_path: Path, openings: Openings) -> None:
    """BusyError of the operation itself is final, and the operation is not tried again."""

    def prepare(volume: FakeVolume) -> None:
        volume.add_point(1)
        volume.open_point(1)

    openings.prepare = prepare
    with pytest.raises(VsnapError, match="is open") as caught:
        client.call(tmp_path, "rp_delete", point=1)
    assert caught.value.code == "busy"
    assert len(openings.volumes) == 1


def test_a_server_that_appears_meanwhile_is_used(
    tmp_path: Path, openings: Openings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the lock is taken by a server that is just starting, the server is asked."""
    monkeypatch.setattr(client, "_LOCK_SECONDS", 60)
    openings.locked_until = time.monotonic() + 90
    results: list[Any] = []
    asking = threading.Thread(
        target=lambda: results.append(client.call(tmp_path, "rp_create", label="late"))
    )
    asking.start()
    time.sleep(0.3)
    with running(tmp_path) as server:
        asking.join(60)
        assert results[0]["label"] == "late"
        assert len(server.volume.points) == 1
    assert openings.volumes == []


@contextmanager
def played(directory: Path, *replies: bytes | None) -> Iterator[list[dict[str, Any]]]:
    """A server that answers its n-th connection with the n-th reply and hangs up; None: waits."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(directory / "control.sock"))
    listener.listen()
    asked: list[dict[str, Any]] = []
    over = threading.Event()

    def serve() -> None:
        for reply in replies:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                asked.append(json.loads(connection.makefile("rb").readline()))
                if reply is None:
                    over.wait(10)
                else:
                    connection.sendall(reply)
        listener.close()
        (directory / "control.sock").unlink()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield asked
    finally:
        over.set()
        listener.close()
        thread.join(10)
        (directory / "control.sock").unlink(missing_ok=True)


@pytest.mark.parametrize("reply", [b"", b'{"error": {"code": "closing"}}\n'])
def test_a_server_that_ends_before_it_began_leaves_the_work_to_us(
    tmp_path: Path, openings: Openings, reply: bytes
) -> None:
    """If the server hung up, or was closing, before it accepted, the operation runs directly."""
    with played(tmp_path, reply) as asked:
        assert client.call(tmp_path, "rp_create", label="x")["number"] == 1
    assert asked == [{"op": "rp_create", "params": {"label": "x"}}]
    assert len(openings.volumes[0].points) == 1


@pytest.mark.parametrize(("seconds", "answers", "in_time"), [(60, 21, True), (120, 32, False)])
def test_a_server_that_is_closing_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: int, answers: int, in_time: bool
) -> None:
    """What was asked of a server that ends is done here as soon as it has closed the volume, which
    may last as long as `umount` waits for it.
    """
    openings, now = Openings(), [time.monotonic()]
    monkeypatch.setattr(vsnapfs.volume, "Volume", openings)
    clock = SimpleNamespace(monotonic=lambda: now[0], sleep=lambda _: now.append(now.pop() + 3))
    monkeypatch.setattr(client, "time", clock)
    end = now[0] + seconds

    async def open_later(directory: Path, **_: Any) -> FakeVolume:
        if now[0] < end:
            raise BusyError(f"{directory} is in use by another process")
        openings.volumes.append(FakeVolume(directory))
        return openings.volumes[-1]

    monkeypatch.setattr(openings, "open", open_later)
    closing = b'{"accepted": "rp_create", "begins": true}\n'
    closing += b'{"error": {"code": "closing"}, "begun": false}\n'
    said: list[str] = []
    with played(tmp_path, *[closing] * answers):
        if in_time:
            assert client.call(tmp_path, "rp_create", label="x", say=said.append)["number"] == 1
        else:
            with pytest.raises(BusyError, match="another process"):
                client.call(tmp_path, "rp_create", say=said.append)
    assert said == ["Waiting for: the volume to be unmounted"]


def test_an_operation_is_never_begun_twice(tmp_path: Path, openings: Openings) -> None:
    """If the server dies after accepting, nobody knows how far it came: that is the error."""
    with played(tmp_path, b'{"accepted": "rp_create"}\n'), pytest.raises(VsnapError) as caught:
        client.call(tmp_path, "rp_create")
    assert caught.value.code == "server-gone"
    assert openings.volumes == []


def test_a_server_that_says_nothing_is_an_error(
    tmp_path: Path, openings: Openings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that is stuck is named, with its pid, instead of waited for."""
    monkeypatch.setattr(client, "_SILENCE_SECONDS", 0.3)
    with played(tmp_path, None), pytest.raises(VsnapError, match=str(os.getpid())) as caught:
        client.call(tmp_path, "status")
    assert caught.value.code == "no-answer"


def test_a_silent_server_outside_this_container_has_no_number(
    tmp_path: Path, openings: Openings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel tells no pid of a process that this pid namespace does not see."""
    monkeypatch.setattr(client, "_SILENCE_SECONDS", 0.3)
    monkeypatch.setattr(client, "_peer_pid", lambda _connection: None)
    with played(tmp_path, None), pytest.raises(VsnapError, match="outside this container"):
        client.call(tmp_path, "status")


def test_a_foreign_server_is_an_error(tmp_path: Path, openings: Openings) -> None:
    """Whatever else listens there is not taken for ours."""
    with played(tmp_path, b"HTTP/1.1 400 Bad Request\r\n"), pytest.raises(VsnapError) as caught:
        client.call(tmp_path, "status")
    assert caught.value.code == "protocol"


def test_unknown_answers_are_skipped(tmp_path: Path, openings: Openings) -> None:
    """Signs of life and what a newer server may say besides do not confuse an older client."""
    reply = b'{"accepted": "x"}\n{"alive": true}\n{"news": 1}\n{"result": {"n": 1}}\n'
    with played(tmp_path, reply):
        assert client.call(tmp_path, "rp_list") == {"n": 1}


def test_a_missing_directory_is_the_volume_s_error(tmp_path: Path) -> None:
    """A directory that is not there is reported by whoever opens volumes."""
    with pytest.raises(VsnapError) as caught:
        client.call(tmp_path / "nowhere", "status")
    assert caught.value.code == "no-volume"


def test_call_works_in_any_thread(tmp_path: Path, openings: Openings) -> None:
    """A caller need not be the main thread."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(client.call(tmp_path, "rp_list")))
    thread.start()
    thread.join(10)
    assert results == [[]]


def test_an_operation_ended_by_an_unmount_is_not_begun_again(
    tmp_path: Path, openings: Openings
) -> None:
    """If the server ended an operation that it had begun, that is the answer."""
    reply = b'{"accepted": "verify"}\n{"error": {"code": "closing", "message": "unmounting"}}\n'
    with played(tmp_path, reply), pytest.raises(VsnapError, match="unmounting"):
        client.call(tmp_path, "verify")
    assert openings.volumes == []
