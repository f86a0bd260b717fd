"""Ends nobody asked for: defects, signals at bad moments, a disk that does not answer.

Each server runs in a process of its own, with one thing made to go wrong in it.
"""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from box import MIB, Box, wait_for
from mounted_rig import alive

from vsnapfs.daemon import client, mounts
from vsnapfs.errors import VsnapError
from vsnapfs.fuse import Session, VolumeOperations

pytestmark = pytest.mark.needs_fuse

SERVE = """
import sys, time
from pathlib import Path
import trio
from vsnapfs import beginning
from vsnapfs.daemon import lifecycle, process, server
from vsnapfs.errors import VsnapError
from vsnapfs.volume import ReplicaHandle, Volume
process.log_to_stderr()
async def told_to():
    while not Path(sys.argv[1], "go").exists():
        await trio.sleep(0.01)
{}
try:
    server.serve(Path(sys.argv[1]), Path(sys.argv[2]), ready=lambda: print("ready", flush=True))
except VsnapError as error:
    sys.exit(f"error: {{error}}")
"""


@pytest.fixture
def box(tmp_path: Path) -> Iterator[Box]:
    box = Box(tmp_path)
    yield box
    box.clean_up()


def serve(box: Box, what_goes_wrong: str, *, ready: bool = True) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SERVE.format(what_goes_wrong), str(box.volume), str(box.place)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    if ready:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n", process.communicate()[1]
    return process


def end(process: subprocess.Popen[str]) -> str:
    """What it said on stderr until it ended by itself."""
    return process.communicate(timeout=60)[1]


def check_clean(box: Box) -> None:
    """Nothing is left, the volume was closed cleanly, and it mounts again."""
    assert mounts.mount_of(box.volume) is None
    assert not (box.volume / "control.sock").exists()
    assert 1002 in box.events()
    box.mount()
    assert 1042 not in box.events()
    box.unmount()


def test_background_work_that_breaks(box: Box) -> None:
    """If the volume's background task dies of a defect, the volume is still closed cleanly."""
    process = serve(
        box,
        """
async def run(self, *, task_status):
    task_status.started()
    await told_to()
    raise ZeroDivisionError("background")
Volume.run = run
""",
    )
    box.write(0, b"before")
    (box.volume / "go").touch()
    assert "ZeroDivisionError: background" in end(process)
    assert process.returncode != 0
    check_clean(box)
    assert (box.volume / "replica.img").read_bytes()[:6] == b"before"


def test_a_loop_that_breaks(box: Box) -> None:
    """If the FUSE loop dies, the mount is taken away and the volume is closed cleanly."""
    process = serve(
        box,
        """
import pyfuse3
real = pyfuse3.main
async def main(**options):
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: real(**options))
        await told_to()
        nursery.cancel_scope.cancel()
    raise OSError(5, "fuse_session_receive_buf failed")
pyfuse3.main = main
""",
    )
    box.write(0, b"before")
    (box.volume / "go").touch()
    assert "fuse_session_receive_buf failed" in end(process)
    check_clean(box)


def test_a_close_that_fails_is_told_to_whoever_stops(box: Box) -> None:
    """`umount` fails if the volume cannot be closed, and says why; the mount is gone."""
    process = serve(
        box,
        """
real = Volume.close
async def close(self, *args, **options):
    done = self._closed
    await real(self, *args, **options)
    if not done:
        raise VsnapError("the last flush failed", code="flush")
Volume.close = close
""",
    )
    with pytest.raises(VsnapError, match="the last flush failed"):
        box.unmount()
    assert "the last flush failed" in end(process)
    assert process.returncode != 0
    assert mounts.mount_of(box.volume) is None


def test_a_signal_while_opening(box: Box) -> None:
    """SIGTERM during a long opening ends it at once; nothing is mounted, nothing stays locked."""
    process = serve(
        box,
        """
real = Volume.open
async def open(*args, **options):
    print("opening", flush=True)
    await trio.sleep(300)
    return await real(*args, **options)
Volume.open = open
""",
        ready=False,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "opening\n"
    process.send_signal(signal.SIGTERM)
    assert "interrupted before the volume was mounted" in end(process)
    assert mounts.mount_of(box.volume) is None
    assert box.call("rp_list") == []


def test_a_mount_that_fails_closes_the_volume(box: Box) -> None:
    """If libfuse refuses, its own words are the error, and the volume is closed cleanly."""
    process = serve(
        box,
        """
real = lifecycle.mount_options
lifecycle.mount_options = lambda *args: real(*args) | {"no_such_option"}
""",
        ready=False,
    )
    said = end(process)
    assert "cannot mount on" in said
    assert "no_such_option" in said
    check_clean(box)


def test_a_second_signal_does_not_wait(box: Box) -> None:
    """A request that never comes back delays the first signal's end only until a second one."""
    process = serve(
        box,
        """
lifecycle._LAST_REQUESTS_SECONDS = 1.0
async def read(self, offset, length):
    print("reading", flush=True)
    await trio.sleep_forever()
ReplicaHandle.read = read
""",
    )

    def read() -> None:
        with suppress(OSError), open(box.replica, "rb", buffering=0) as file:
            file.read(4096)

    reader = threading.Thread(target=read)
    reader.start()
    assert process.stdout is not None
    assert process.stdout.readline() == "reading\n"
    process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    end(process)
    reader.join(60)
    assert not reader.is_alive()
    check_clean(box)


def test_a_signal_under_load_loses_nothing(box: Box) -> None:
    """SIGTERM while writers are busy: each write is either refused or there afterwards."""
    pid = box.mount()
    box.call("rp_create")
    written: dict[int, bytes] = {}

    def write(start: int) -> None:
        fd = os.open(box.replica, os.O_RDWR)
        try:
            for turn in range(1_000_000):
                offset = start + turn * 4096 % MIB
                data = turn.to_bytes(4, "little") * 1024
                os.pwrite(fd, data, offset)
                written[offset] = data
        except OSError as error:
            assert error.errno in (errno.ENOTCONN, errno.ECONNABORTED, errno.EIO)  # noqa: PT017
        finally:
            with suppress(OSError):
                os.close(fd)

    writers = [threading.Thread(target=write, args=(start * MIB,)) for start in range(4)]
    for writer in writers:
        writer.start()
    time.sleep(0.5)
    assert wait_for(lambda: written)
    os.kill(pid, signal.SIGTERM)
    for writer in writers:
        writer.join(60)
    assert wait_for(lambda: not alive(pid))
    assert box.events()[-1] == 1002
    content = (box.volume / "replica.img").read_bytes()
    # A later write to the same place may have been carried out and never been answered.
    lost = [
        offset
        for offset, data in written.items()
        if int.from_bytes(content[offset : offset + 4], "little")
        < int.from_bytes(data[:4], "little")
    ]
    assert lost == []
    box.mount()
    assert (box.points / "0001.img").read_bytes() == bytes(len(content))


def test_an_operation_under_way_when_unmounting(box: Box) -> None:
    """Unmounting ends a verify with a clear error and lets a change finish before closing."""
    process = serve(
        box,
        """
real = Volume.create_point
async def create_point(self, label=None):
    beginning.begin()
    print("under way", flush=True)
    await trio.sleep(1)
    return await real(self, label)
Volume.create_point = create_point
async def verify(self, progress=None):
    print("under way", flush=True)
    await trio.sleep_forever()
Volume.verify = verify
""",
    )
    outcomes: dict[str, object] = {}

    def ask(op: str) -> None:
        try:
            outcomes[op] = client.call(box.volume, op)
        except VsnapError as error:
            outcomes[op] = error

    askers = [threading.Thread(target=ask, args=(op,)) for op in ("rp_create", "verify")]
    for asker in askers:
        asker.start()
    assert process.stdout is not None
    for _ in askers:
        assert process.stdout.readline() == "under way\n"
    box.unmount()
    for asker in askers:
        asker.join(60)
    assert end(process) == ""
    created = outcomes["rp_create"]
    assert isinstance(created, dict)
    assert created["number"] == 1
    ended = outcomes["verify"]
    assert isinstance(ended, VsnapError)
    assert ended.code == "closing"
    check_clean(box)
    assert [point["number"] for point in box.call("rp_list")] == [1]


def test_libfuse_s_own_words_are_kept(tmp_path: Path) -> None:
    """What libfuse prints to stderr when it refuses becomes the error's message."""

    class Nothing(VolumeOperations):
        def __init__(self) -> None:
            pass

    session = Session(Nothing(), tmp_path, {"default_permissions", "what_is_this"})
    with pytest.raises(VsnapError, match="what_is_this") as caught:
        session.mount()
    assert caught.value.code == "mount-failed"
    session.terminate()
    session.close()


def test_a_mount_that_fails_at_the_very_end_is_taken_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If anything fails once the kernel has mounted it, nothing stays mounted."""

    class Nothing(VolumeOperations):
        def __init__(self) -> None:
            pass

    @contextmanager
    def no_memory(_lines: list[str]) -> Iterator[None]:
        yield
        assert mounts.top_mount(tmp_path) is not None
        raise MemoryError

    monkeypatch.setattr("vsnapfs.fuse.session._stderr_into", no_memory)
    session = Session(Nothing(), tmp_path, {"default_permissions"})
    try:
        with pytest.raises(VsnapError):
            session.mount()
        assert mounts.top_mount(tmp_path) is None
    finally:
        session.close()
