"""The event log when the host is full, the file cannot be written or is no file at all."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

import vsnapfs.events.log as log_module
from vsnapfs.events import Event, EventLog, read_events

MIB = 1024 * 1024


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "events.jsonl"


@pytest.fixture
def log(path: Path) -> Iterator[EventLog]:
    log = EventLog(path)
    yield log
    log.close()


def ids(events: list[Event]) -> list[int]:
    return [event.event_id for event in events]


def counts(events: list[Event]) -> list[Any]:
    return [event.params["count"] for event in events]


# --- allocated ahead, and a full host ----------------------------------------------------------


def allocated(path: Path) -> int:
    return path.stat().st_blocks * 512


def test_a_mebibyte_is_allocated_ahead_of_the_end(path: Path) -> None:
    """From the start and after every event; the file's size shows only what was written."""
    log = EventLog(path)
    if log_module._fallocate_keep_size(log._fd, 0, 4096) == errno.EOPNOTSUPP:
        pytest.skip("the file system of the temporary directory cannot allocate ahead")
    assert path.stat().st_size == 0
    assert allocated(path) >= MIB
    for _ in range(1500):
        log.log("vsnapfs", 1091, text="x" * 1000)
        assert allocated(path) - path.stat().st_size >= MIB
    assert len(log.events()) == 1500
    path.write_bytes(b"")
    log.log("vsnapfs", 1091)
    assert allocated(path) - path.stat().st_size >= MIB, "emptied by somebody else"
    log.close()
    assert allocated(path) - path.stat().st_size >= MIB, "kept for the next process"


def test_allocation_takes_64_bit_offsets(path: Path) -> None:
    """Beyond 4 GiB the space is allocated where it was asked for."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        os.ftruncate(fd, 6 << 30)
        refused = log_module._fallocate_keep_size(fd, 6 << 30, 1 << 20)
        if refused == errno.EOPNOTSUPP:
            pytest.skip("the file system of the temporary directory cannot allocate ahead")
        assert refused == 0
        assert allocated(path) >= 1 << 20
        assert os.fstat(fd).st_size == 6 << 30
        os.ftruncate(fd, 3 << 30)  # an offset cut to 32 bits would have allocated at 2 GiB
        assert allocated(path) == 0
    finally:
        os.close(fd)


@pytest.mark.parametrize("refusal", [errno.EOPNOTSUPP, errno.ENOSPC, errno.EPERM, None])
def test_a_host_that_cannot_allocate_is_no_failure(
    path: Path, refusal: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without fallocate(2), or refused, everything is logged all the same, silently."""
    if refusal is None:
        monkeypatch.setattr(log_module, "_libc_fallocate", None)
    else:
        monkeypatch.setattr(log_module, "_fallocate_keep_size", lambda *_: refusal)
    log = EventLog(path)
    log.log("volsnap", 87)
    log.close()
    assert log.failed is None
    assert ids(read_events(path)) == [87]


@contextmanager
def small_file_system(directory: Path) -> Iterator[Path]:
    """A real ext4 of 16 MiB on a loop device, gone afterwards whatever happens."""
    image, mountpoint = directory / "small.img", directory / "small"
    with image.open("wb") as file:
        file.truncate(16 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-F", "-m", "0", image], check=True, timeout=60)
    mountpoint.mkdir()
    subprocess.run(["mount", "-o", "loop", image, mountpoint], check=True, timeout=60)
    try:
        yield mountpoint
    finally:
        # Lazily if a failed test left a file open there: it goes when the file is closed.
        if subprocess.run(["umount", mountpoint], check=False, timeout=60).returncode:
            subprocess.run(["umount", "-l", mountpoint], check=True, timeout=60)


def fill_up(directory: Path) -> None:
    """Take every free byte of a file system."""
    with (directory / "filler").open("ab", buffering=0) as file:
        for size in (1 << 20, 4096, 512):
            with pytest.raises(OSError, match="No space left"):
                while file.write(b"x" * size):
                    pass
        os.fsync(file.fileno())


@pytest.mark.needs_loop
@pytest.mark.expects_log
def test_a_full_host_can_still_be_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """On a file system filled to the brim hundreds of Errors are written, and are there after an
    unmount; when even the reserve is used up the engine goes on, and nothing is lost.
    """
    with small_file_system(tmp_path) as host:
        with closing(EventLog(host / "events.jsonl")) as log:
            log.log("vsnapfs", 1001, count=0)
            fill_up(host)
            assert os.statvfs(host).f_bavail == 0
            with pytest.raises(OSError, match="No space left"):
                (host / "control").write_bytes(b"x" * 8192)

            for n in range(1, 301):
                log.log("volsnap", 89, count=n, errno=errno.ENOSPC, text="x" * 2000)
            assert log.failed is None
            assert log.unwritten == 0
            assert caplog.text == ""

            for n in range(301, 1001):
                log.log("volsnap", 89, count=n, text="x" * 2000)
            assert isinstance(log.failed, OSError)
            assert log.failed.errno == errno.ENOSPC
            assert caplog.text.count("cannot write the event log") == 1
            assert 0 < log.unwritten < 700
            assert counts(log.events()) == list(range(1001))
            in_file = counts(read_events(log.path))
            assert in_file == list(range(1001 - log.unwritten))

            (host / "filler").unlink()
            log.log("vsnapfs", 1091, count=1001)
            assert log.unwritten == 0
        subprocess.run(["mount", "-o", "remount,ro", host], check=True, timeout=60)
        assert counts(read_events(host / "events.jsonl")) == list(range(1002))


# --- failures to write -------------------------------------------------------------------------


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """The kernel lets no file of this process grow beyond `size`: a write stops half-way."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.expects_log
@pytest.mark.parametrize("written", [0, 1, 50])
def test_a_write_that_stops_half_way_is_made_good(
    log: EventLog, written: int, caplog: pytest.LogCaptureFixture
) -> None:
    """The engine notices nothing, one warning is given, later all events are in the file."""
    log.log("vsnapfs", 1091, count=0)
    with file_size_limit(log.path.stat().st_size + written):
        for n in (1, 2, 3):
            log.log("volsnap", 87, count=n)
        assert counts(read_events(log.path)) == [0]
    assert isinstance(log.failed, OSError)
    assert log.failed.errno == errno.EFBIG
    assert log.unwritten == 3
    assert counts(log.events()) == [0, 1, 2, 3]
    assert caplog.text.count("cannot write the event log") == 1
    log.log("vsnapfs", 1091, count=4)
    assert log.unwritten == 0
    assert counts(read_events(log.path)) == [0, 1, 2, 3, 4]


@pytest.mark.expects_log
@pytest.mark.parametrize("obstacle", ["no directory", "directory", "link", "fifo"])
def test_a_log_that_cannot_be_opened_fails_nothing(
    tmp_path: Path, obstacle: str, caplog: pytest.LogCaptureFixture
) -> None:
    """No directory, or something else in its place: remembered, said once, mended later."""
    path = tmp_path / "dir" / "events.jsonl"
    target = tmp_path / "target"
    if obstacle != "no directory":
        path.parent.mkdir()
    if obstacle == "directory":
        path.mkdir()
    elif obstacle == "link":
        path.symlink_to(target)
    elif obstacle == "fifo":
        os.mkfifo(path)
    seen: list[Event] = []
    log = EventLog(path)
    log.subscribe(seen.append)
    log.log("volsnap", 87, count=0)
    log.log("volsnap", 87, count=1)
    assert isinstance(log.failed, OSError)
    assert caplog.text.count("cannot write the event log") == 1
    assert log.unwritten == len(seen) == 2
    assert not target.exists(), "no symbolic link is followed"
    if obstacle == "no directory":
        path.parent.mkdir()
    elif obstacle == "directory":
        path.rmdir()
    else:
        path.unlink()
    log.close()
    assert counts(read_events(path)) == [0, 1]


@pytest.mark.expects_log
def test_a_failing_sync_is_remembered(
    log: EventLog, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The event is in the file, but not known to be on the disk: that is a failure too."""

    def fail(fd: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fdatasync", fail)
    log.log("volsnap", 87)
    assert log.failed is not None
    assert log.failed.errno == errno.EIO
    assert ids(read_events(log.path)) == [87]
    assert caplog.text.count("cannot write") == 1


@pytest.mark.expects_log
def test_events_that_wait_are_bounded(tmp_path: Path) -> None:
    """A log that never works again costs bounded memory: the oldest go, and are counted."""
    log = EventLog(tmp_path / "missing" / "events.jsonl")
    for n in range(3000):
        log.log("vsnapfs", 1091, count=n)
    assert log.unwritten == 3000
    assert counts(log.events()) == list(range(3000 - len(log.events()), 3000))
    assert len(log.events()) == 1024


def test_a_close_that_the_host_refuses_is_no_failure(
    log: EventLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """close(2) of a network or FUSE file system may fail: neither closing nor logging does."""
    close = os.close

    def refusing(fd: int) -> None:
        close(fd)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    log.log("vsnapfs", 1091, text="before")
    with monkeypatch.context() as patch:
        patch.setattr(os, "close", refusing)
        log.close()
        log.log("vsnapfs", 1091, text="after")
    assert [event.params["text"] for event in log.events()] == ["before", "after"]
