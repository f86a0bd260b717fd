"""A real volume, really mounted: the tree, its files, and what is refused."""

from __future__ import annotations

import errno
import json
import mmap
import os
import random
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from box import MIB, SIZE, Box, refused

from vsnapfs.daemon import mounts
from vsnapfs.errors import VsnapError

pytestmark = pytest.mark.needs_fuse


@pytest.fixture
def box(tmp_path: Path) -> Iterator[Box]:
    box = Box(tmp_path)
    yield box
    box.clean_up()


@pytest.fixture
def mounted(box: Box) -> Iterator[Box]:
    """A mounted volume; at the end it must be closed cleanly, with nothing in the server's log."""
    box.mount()
    yield box
    box.unmount()
    assert box.log() == ""
    assert box.events()[-1] == 1002


# ---- the tree -----------------------------------------------------------------------------------


def test_the_tree_of_a_fresh_mount(mounted: Box) -> None:
    """Names, modes, sizes and the mount table are what the design says."""
    assert sorted(os.listdir(mounted.place)) == [
        "events.log", "recovery-points", "replica.img", "status.json",
    ]  # fmt: skip
    assert os.listdir(mounted.points) == ["by-time"]
    assert os.listdir(mounted.points / "by-time") == []
    assert stat.filemode(mounted.place.stat().st_mode) == "drwx------"
    found = mounted.replica.stat()
    assert stat.filemode(found.st_mode) == "-rw-------"
    assert found.st_size == SIZE
    assert (found.st_uid, found.st_gid) == (os.geteuid(), os.getegid())
    mount = mounts.mount_of(mounted.volume)
    assert mount is not None
    assert (mount.mountpoint, mount.fstype) == (mounted.place, "fuse.vsnapfs")
    assert not mount.stale
    space = os.statvfs(mounted.place)
    assert space.f_frsize == 16384
    assert 0 < space.f_bavail < space.f_blocks


def test_status_and_events_are_live(mounted: Box) -> None:
    """status.json names the server; events.log grows by the event of a new point."""
    status = json.loads((mounted.place / "status.json").read_text())
    assert status["pid"] == mounted.pid
    assert status["mountpoint"] == str(mounted.place)
    assert status["recovery_points"] == 0
    before = (mounted.place / "events.log").read_text()
    mounted.call("rp_create")
    after = (mounted.place / "events.log").read_text()
    assert after.startswith(before)
    assert after.count("\n") == before.count("\n") + 1
    assert len(after.encode()) == (mounted.place / "events.log").stat().st_size
    assert json.loads((mounted.place / "status.json").read_text())["recovery_points"] == 1


def test_tail_follows_events_log(mounted: Box) -> None:
    """`tail -f` shows an event soon after it has happened."""
    command = ["tail", "-n", "+1", "-s", "0.1", "-f", str(mounted.place / "events.log")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as tail:
        try:
            assert tail.stdout is not None
            for _ in (mounted.place / "events.log").read_text().splitlines():
                assert "watched" not in tail.stdout.readline()
            mounted.call("rp_create", label="watched")
            assert "watched" in tail.stdout.readline()
        finally:
            tail.terminate()


def test_the_replica_reads_back_what_was_written(mounted: Box) -> None:
    """Random writes of nasty sizes read back, and are in the image after the mount is gone."""
    rng = random.Random(7)
    model = bytearray(SIZE)
    fd = os.open(mounted.replica, os.O_RDWR)
    try:
        for _ in range(200):
            length = rng.choice((1, 511, 512, 4096, 16383, 16385, 100_000, MIB, MIB + 1))
            offset = rng.randrange(0, SIZE - length)
            data = rng.randbytes(length)
            assert os.pwrite(fd, data, offset) == length
            model[offset : offset + length] = data
            if rng.random() < 0.05:
                os.fsync(fd)
            if rng.random() < 0.02:
                mounted.call("rp_create") if len(os.listdir(mounted.points)) < 4 else None
        os.fdatasync(fd)
        assert os.pread(fd, SIZE + 1, 0) == model
        assert os.pread(fd, 100, SIZE - 1) == model[-1:]
        assert os.pread(fd, 100, SIZE) == b""
    finally:
        os.close(fd)
    mounted.unmount()
    assert (mounted.volume / "replica.img").read_bytes() == model
    mounted.mount()


def test_writes_beyond_the_end_are_refused(mounted: Box) -> None:
    """The replica does not grow: EFBIG, and nothing is written."""
    fd = os.open(mounted.replica, os.O_RDWR)
    try:
        refused(errno.EFBIG, os.pwrite, fd, b"xy", SIZE - 1)
        refused(errno.EFBIG, os.pwrite, fd, b"x", 2**62)
        assert os.pread(fd, 10, SIZE - 1) == b"\0"
    finally:
        os.close(fd)


def test_points_are_what_the_replica_was(mounted: Box) -> None:
    """A point keeps its bytes while the replica goes on, through the page cache and past it."""
    rng = random.Random(3)
    images = {}
    for number in (1, 2, 3):
        mounted.write(rng.randrange(SIZE - MIB), rng.randbytes(MIB // 2))
        created = mounted.call("rp_create")
        assert created["number"] == number
        images[number] = mounted.replica.read_bytes()
    mounted.write(0, rng.randbytes(MIB))
    for _ in range(2):
        for number, image in images.items():
            path = mounted.points / f"{number:04d}.img"
            assert path.read_bytes() == image
            assert path.stat().st_size == SIZE
    assert (mounted.points / "latest").read_bytes() == images[3]
    direct = os.open(mounted.points / "0001.img", os.O_RDONLY | os.O_DIRECT)
    try:
        buffer = mmap.mmap(-1, 65536)
        assert os.preadv(direct, [buffer], 4096) == 65536
        assert buffer[:] == images[1][4096 : 4096 + 65536]
        buffer.close()
    finally:
        os.close(direct)


def test_new_and_deleted_points_show_at_once(mounted: Box) -> None:
    """A name asked for in vain before is there once the point is, and gone when it is deleted."""
    path = mounted.points / "0001.img"
    links = mounted.points / "by-time"
    for _ in range(3):
        assert not path.exists()
        assert not (mounted.points / "latest").exists()
    inodes = set()
    for number in range(1, 6):
        mounted.call("rp_create")
        name = f"{number:04d}.img"
        assert (mounted.points / name).exists()
        assert os.readlink(mounted.points / "latest") == name
        assert len(os.listdir(links)) == 1
        (link,) = links.iterdir()
        assert os.readlink(link) == f"../{name}"
        assert link.read_bytes() == mounted.replica.read_bytes()
        inodes.add((mounted.points / name).stat().st_ino)
        mounted.call("rp_delete", point=number)
        assert not (mounted.points / name).exists()
        assert not os.path.lexists(mounted.points / "latest")
        assert os.listdir(links) == []
    assert len(inodes) == 5


def test_many_points_are_listed_once_each(mounted: Box) -> None:
    """A directory larger than one answer of readdir is complete, with its links and times."""
    for _ in range(70):
        mounted.call("rp_create")
    names = os.listdir(mounted.points)
    assert sorted(names) == sorted(
        ["by-time", "latest", *(f"{number:04d}.img" for number in range(1, 71))]
    )
    targets = {os.readlink(link) for link in (mounted.points / "by-time").iterdir()}
    assert targets == {f"../{number:04d}.img" for number in range(1, 71)}
    listed = mounted.call("rp_list")
    for point in listed[::10]:
        found = (mounted.points / f"{point['number']:04d}.img").stat()
        assert found.st_mtime_ns == point["created_ns"]


def test_a_point_that_is_open_is_kept_unless_forced(mounted: Box) -> None:
    """Deleting an open point is refused; by force its reader gets ESTALE past the page cache."""
    mounted.write(0, b"old" * 1000)
    mounted.call("rp_create")
    mounted.write(0, b"new" * 1000)
    with open(mounted.points / "0001.img", "rb") as file:
        with pytest.raises(VsnapError) as caught:
            mounted.call("rp_delete", point=1)
        assert caught.value.errno == errno.EBUSY
        assert file.read(3000) == b"old" * 1000
        mounted.call("rp_delete", point=1, force=True)
        refused(errno.ESTALE, os.pread, file.fileno(), 4096, 4 * MIB)
    assert not (mounted.points / "0001.img").exists()


# ---- what is refused ----------------------------------------------------------------------------


def test_nothing_but_the_replica_s_content_can_be_changed(mounted: Box) -> None:
    """Truncating, creating, renaming, removing, chmod and chown are refused with a clear errno."""
    mounted.call("rp_create")
    point = mounted.points / "0001.img"
    for path in (mounted.replica, point):
        # Of a file that is not writable the kernel itself refuses it to users.
        code = errno.EPERM if os.access(path, os.W_OK) else errno.EACCES
        for size in (0, SIZE - 1, SIZE + 1):
            refused(code, os.truncate, path, size)
        refused(errno.EPERM, os.chmod, path, 0o777)
        # To ourselves: others may not exist in our user namespace.
        refused(errno.EPERM, os.chown, path, os.geteuid(), os.getegid())
        refused(errno.EPERM, os.unlink, path)
        refused(errno.EPERM, os.rename, path, mounted.place / "x")
        refused(errno.EPERM, os.link, path, mounted.place / "x")
    refused(errno.EPERM, os.open, mounted.replica, os.O_WRONLY | os.O_TRUNC)
    for path in (point, mounted.place / "status.json", mounted.place / "events.log"):
        code = errno.EROFS if os.access(path, os.W_OK) else errno.EACCES
        refused(code, os.open, path, os.O_RDWR)
    refused(errno.EPERM, os.mkdir, mounted.place / "x")
    refused(errno.EPERM, os.rmdir, mounted.points / "by-time")
    refused(errno.EPERM, os.symlink, "y", mounted.place / "x")
    refused(errno.EPERM, os.open, mounted.place / "x", os.O_CREAT | os.O_RDWR)
    refused(errno.EPERM, os.mkfifo, mounted.place / "x")
    os.truncate(mounted.replica, SIZE)
    os.utime(mounted.replica)
    assert mounted.replica.stat().st_size == SIZE
    assert mounted.replica.read_bytes() == bytes(SIZE)


def test_extended_attributes_are_not_supported(mounted: Box) -> None:
    """Asking for them is answered as by any file system without them, again and again."""
    for _ in range(2):
        refused(errno.EOPNOTSUPP, os.getxattr, mounted.replica, "user.x")
        refused(errno.EOPNOTSUPP, os.setxattr, mounted.replica, "user.x", b"y")


def test_an_offline_volume_shows_its_points(mounted: Box) -> None:
    """Offline, the replica says ENODEV, old handles stay dead after online, points are read."""
    mounted.write(0, b"kept")
    mounted.call("rp_create")
    fd = os.open(mounted.replica, os.O_RDWR)
    try:
        mounted.call("offline")
        refused(errno.ENODEV, os.open, mounted.replica, os.O_RDWR)
        for _ in range(2):
            refused(errno.ENODEV, os.pread, fd, 10, 0)
            refused(errno.ENODEV, os.pwrite, fd, b"x", 0)
            refused(errno.ENODEV, os.fsync, fd)
        assert (mounted.points / "0001.img").read_bytes()[:4] == b"kept"
        assert json.loads((mounted.place / "status.json").read_text())["state"] == "offline"
        mounted.call("online")
        refused(errno.ENODEV, os.pread, fd, 10, 0)
        assert mounted.replica.read_bytes()[:4] == b"kept"
    finally:
        os.close(fd)


def test_an_offline_volume_can_be_mounted(box: Box) -> None:
    """A volume taken offline stays so over a mount; its points are there."""
    box.call("rp_create")
    box.call("offline")
    box.mount()
    refused(errno.ENODEV, os.open, box.replica, os.O_RDONLY)
    assert len((box.points / "0001.img").read_bytes()) == SIZE
