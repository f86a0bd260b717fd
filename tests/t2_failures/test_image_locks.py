"""Locks on real files: who else may open a replica or diff area that we have, and the reverse.

With QEMU's own tools, and with plain descriptors that say what a QEMU would say.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from house import run

from vsnapfs import locks
from vsnapfs.backing import FileBacking
from vsnapfs.errors import BusyError

SIZE = 1 << 20
_FLOCK = struct.Struct("hhqqi0q")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "replica.img"
    path.write_bytes(b"old!" * (SIZE // 4))
    return path


@contextmanager
def opened(path: Path) -> Iterator[FileBacking]:
    backing = FileBacking.open(path)
    try:
        yield backing
    finally:
        backing.close()


@contextmanager
def said(path: Path, *where: int, kind: int = fcntl.F_RDLCK) -> Iterator[None]:
    """Somebody else has these bytes locked, as QEMU would."""
    fd = os.open(path, os.O_RDWR)
    try:
        for byte in where:
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, byte, 1, 0))
        yield
    finally:
        os.close(fd)


def locked(path: Path) -> list[int]:
    """The bytes below 300 on which anybody has a lock of this kind."""
    fd = os.open(path, os.O_RDWR)
    try:
        return [
            byte
            for byte in range(300)
            if _FLOCK.unpack(
                fcntl.fcntl(
                    fd, fcntl.F_OFD_GETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
                )
            )[0]
            != fcntl.F_UNLCK
        ]
    finally:
        os.close(fd)


def write_by_qemu(path: Path) -> str:
    """What qemu-io says when it is told to write there; "" if it has written."""
    done = run("qemu-io", "-f", "raw", "-c", "write -P 0x5a 0 64k", str(path))
    return done.stderr if done.returncode else ""


# --- we have it --------------------------------------------------------------------------------


@pytest.mark.needs_qemu
def test_qemu_may_look_but_not_write(image: Path, tmp_path: Path) -> None:
    """While it is open here, qemu-io and qemu-img convert do not write; qemu-img info works."""
    other = tmp_path / "other.img"
    other.write_bytes(bytes(SIZE))
    convert = ("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", str(other), str(image))
    with opened(image):
        assert 'Failed to get "write" lock' in write_by_qemu(image)
        assert 'Failed to get "write" lock' in run(*convert).stderr
        assert 'Failed to get "write" lock' in run(*convert[:2], *convert[3:]).stderr
        assert "1 MiB" in run("qemu-img", "info", "-f", "raw", str(image)).stdout
        assert image.read_bytes() == b"old!" * (SIZE // 4)
    assert write_by_qemu(image) == ""
    assert image.read_bytes()[:2] == b"\x5a\x5a"


@pytest.mark.needs_qemu
def test_a_new_file_and_one_opened_anew_are_locked_as_well(tmp_path: Path) -> None:
    """A file that `create` makes is locked from the start; opening it anew keeps the locks."""
    path = tmp_path / "diff-area"
    backing = FileBacking.create(path)
    try:
        backing.truncate(SIZE)
        assert "lock" in write_by_qemu(path)
        for _ in range(3):
            backing.reopen()
            assert "lock" in write_by_qemu(path)
            with pytest.raises(BusyError):
                FileBacking.open(path)
    finally:
        backing.close()
    assert write_by_qemu(path) == ""


@pytest.mark.needs_qemu
@pytest.mark.needs_loop
def test_a_block_device_is_locked_as_well(image: Path) -> None:
    """QEMU looks at the same bytes of a block device's node."""
    device = run("losetup", "--find", "--show", str(image)).stdout.strip()
    try:
        with opened(Path(device)) as backing:
            assert 'Failed to get "write" lock' in write_by_qemu(Path(device))
            backing.reopen()
            assert 'Failed to get "write" lock' in write_by_qemu(Path(device))
            with pytest.raises(BusyError):
                FileBacking.open(Path(device))
        assert write_by_qemu(Path(device)) == ""
    finally:
        run("losetup", "--detach", device)


def test_what_is_said(image: Path) -> None:
    """Exactly the bytes that mean: we read and write, others do not write and do not resize."""
    with opened(image):
        assert locked(image) == [100, 101, 201, 202, 203]
    assert locked(image) == []


def test_the_locks_are_the_opening_s_own(image: Path) -> None:
    """Another descriptor of the same file, in this process, is refused, and may be closed."""
    with opened(image) as backing:
        with pytest.raises(BusyError):
            FileBacking.open(image)
        os.close(os.open(image, os.O_RDWR))
        backing.reopen()
        assert locked(image) == [100, 101, 201, 202, 203]
        with pytest.raises(BusyError):
            FileBacking.open(image)


def test_a_child_has_no_descriptor_of_ours(image: Path) -> None:
    """A program started meanwhile neither holds the locks nor can write, before or after."""
    with opened(image) as backing:
        backing.reopen()
        child = subprocess.Popen(["sleep", "60"])
    try:
        with opened(image):
            links = [os.readlink(entry) for entry in Path(f"/proc/{child.pid}/fd").iterdir()]
            assert str(image) not in links
    finally:
        child.kill()
        child.wait()


def test_who_finds_it_locked_has_not_opened_it_for_writing(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An attempt at a locked file opens it for reading only: nobody takes it for a writer."""
    accesses = []
    real = os.open

    def watch(path: Any, flags: int, *arguments: Any, **named: Any) -> int:
        accesses.append(flags & os.O_ACCMODE)
        return real(path, flags, *arguments, **named)

    with opened(image):
        monkeypatch.setattr(os, "open", watch)
        with pytest.raises(BusyError):
            FileBacking.open(image)
        with pytest.raises(FileExistsError):
            FileBacking.create(image)
    assert accesses[0] == os.O_RDONLY
    assert len(accesses) == 2


# --- another has it ----------------------------------------------------------------------------


@pytest.mark.needs_qemu
def test_what_qemu_has_open_for_writing_is_busy(image: Path) -> None:
    """The error says that it is QEMU, and ends with it."""
    command = ["qemu-io", "-f", "raw", str(image)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as qemu:
        assert qemu.stdin is not None
        assert qemu.stdout is not None
        qemu.stdin.write(b"read 0 512\n")
        qemu.stdin.flush()
        assert qemu.stdout.readline()  # It has opened the image when it answers.
        with pytest.raises(BusyError, match=r"QEMU .* has it open for writing"):
            FileBacking.open(image)
        qemu.communicate()
    FileBacking.open(image).close()


@pytest.mark.parametrize("byte", [101, 102, 103])
def test_a_writer_that_others_are_told_of_is_busy(image: Path, byte: int) -> None:
    """Whoever has said that he writes or resizes keeps us out."""
    with said(image, byte), pytest.raises(BusyError, match="for writing"):
        FileBacking.open(image)
    FileBacking.open(image).close()


@pytest.mark.parametrize("byte", [200, 201])
def test_a_reader_who_wants_no_writer_is_busy(image: Path, byte: int) -> None:
    """Whoever has said that nobody may write meanwhile (qemu-img convert) keeps us out."""
    with said(image, 100, byte), pytest.raises(BusyError, match="lets nobody write"):
        FileBacking.open(image)


@pytest.mark.parametrize("bytes_", [(100,), (203,), (104, 204, 99, 199, 205)])
def test_what_contradicts_nothing_is_let_in(image: Path, bytes_: tuple[int, ...]) -> None:
    """A reader who shares, and bytes that say nothing about us, disturb nobody."""
    with said(image, *bytes_), opened(image):
        assert {100, 101, 201, 202, 203} <= set(locked(image))


def test_a_file_that_is_locked_otherwise_is_busy(image: Path) -> None:
    """A program that has locked all of it for itself (fcntl) is told from a host without locks."""
    with said(image, 201, kind=fcntl.F_WRLCK), pytest.raises(BusyError, match="locked by another"):
        FileBacking.open(image)
    FileBacking.open(image).close()


# --- hosts that are different --------------------------------------------------------------------


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS])
def test_without_these_locks_it_opens_all_the_same(
    image: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """A host that has no locks on bytes costs nothing but them; flock still keeps others out."""

    def refuse(*_args: Any) -> bytes:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(locks.fcntl, "fcntl", refuse)
    with opened(image) as backing:
        backing.reopen()
        with pytest.raises(BusyError):
            FileBacking.open(image)


def test_a_host_that_locks_only_what_is_open_for_writing(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NFS locks for itself only what is open for writing: it is opened for both then."""
    real = fcntl.flock

    def picky(fd: int, how: int) -> None:
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        real(fd, how)

    monkeypatch.setattr(locks.fcntl, "flock", picky)
    with opened(image) as backing:
        backing.write(0, b"new!")
        with pytest.raises(BusyError):
            FileBacking.open(image)
    assert image.read_bytes()[:4] == b"new!"


def test_a_file_replaced_between_locking_and_opening_is_not_used(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is read and written is the very file that is locked, or nothing is."""
    real = locks.open_file

    def replace(path: Path, access: int, *, follow: bool) -> int:
        if access & os.O_ACCMODE == os.O_RDWR:
            os.rename(image, f"{image}.old")
            image.write_bytes(b"another")
        return real(path, access, follow=follow)

    monkeypatch.setattr(locks, "open_file", replace)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(BusyError, match="replaced"):
        FileBacking.open(image)
    assert len(os.listdir("/proc/self/fd")) == before
    assert locked(Path(f"{image}.old")) == []


def test_a_close_that_the_host_refuses_leaves_no_lock(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """close(2) of a network or FUSE file system may fail; the file is not held for ever then."""
    backing, close = FileBacking.open(image), os.close

    def refusing(fd: int) -> None:
        close(fd)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "close", refusing)
        backing.close()
    with opened(image):
        pass
