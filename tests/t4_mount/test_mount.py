"""A real volume, really mounted: the tree, its files, and every way a server begins and ends."""

from __future__ import annotations

import errno
import json
import mmap
import os
import random
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from vsnapfs.daemon import client, mounts, server
from vsnapfs.errors import BusyError, UsageError, VsnapError
from vsnapfs.volume.create import create_volume

pytestmark = pytest.mark.needs_fuse

MIB = 1 << 20
SIZE = 8 * MIB + 12345  # no multiple of anything


def wait_for(condition: Callable[[], Any], seconds: float = 10) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


def alive(pid: int) -> bool:
    """Whether the process still runs; one that only waits to be collected does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


class Box:
    """One volume and its mountpoint."""

    def __init__(self, base: Path, name: str = "vol", size: int = SIZE) -> None:
        self.volume = base / name
        self.place = base / f"mnt {name}"
        self.place.mkdir()
        create_volume(self.volume, size=size, diff_area_size=64 * MIB)
        self.pid = 0

    def mount(self, **options: Any) -> int:
        self.pid = server.spawn(self.volume, self.place, **options)
        return self.pid

    def call(self, op: str, **params: Any) -> Any:
        return client.call(self.volume, op, **params)

    def unmount(self) -> None:
        mount = mounts.mount_of(self.volume)
        assert mount is not None
        mounts.unmount(mount)

    @property
    def replica(self) -> Path:
        return self.place / "replica.img"

    @property
    def points(self) -> Path:
        return self.place / "recovery-points"

    def write(self, offset: int, data: bytes) -> None:
        fd = os.open(self.replica, os.O_RDWR)
        try:
            assert os.pwrite(fd, data, offset) == len(data)
        finally:
            os.close(fd)

    def log(self) -> str:
        return (self.volume / "server.log").read_text()

    def events(self) -> list[int]:
        lines = (self.volume / "events.jsonl").read_text().splitlines()
        return [json.loads(line)["event_id"] for line in lines]

    def clean_up(self) -> None:
        mount = mounts.mount_of(self.volume)
        if mount is not None:
            with suppress(VsnapError):
                mounts.unmount(mount)
            mount = mounts.mount_of(self.volume)
            if mount is not None:
                mounts.unmount_now(mount.mountpoint, lazy=True)


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


def refused(code: int, call: Callable[..., Any], *args: Any) -> None:
    with pytest.raises(OSError) as caught:
        call(*args)
    assert caught.value.errno == code, caught.value


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
    command = ["tail", "-n", "0", "-s", "0.1", "-f", str(mounted.place / "events.log")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as tail:
        try:
            time.sleep(0.5)
            mounted.call("rp_create", label="watched")
            assert tail.stdout is not None
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
        for size in (0, SIZE - 1, SIZE + 1):
            refused(errno.EPERM, os.truncate, path, size)
        refused(errno.EPERM, os.chmod, path, 0o777)
        refused(errno.EPERM, os.chown, path, 1, 1)
        refused(errno.EPERM, os.unlink, path)
        refused(errno.EPERM, os.rename, path, mounted.place / "x")
        refused(errno.EPERM, os.link, path, mounted.place / "x")
    refused(errno.EPERM, os.open, mounted.replica, os.O_WRONLY | os.O_TRUNC)
    for path in (point, mounted.place / "status.json", mounted.place / "events.log"):
        refused(errno.EROFS, os.open, path, os.O_RDWR)
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
        mounted.unmount_refused = True  # type: ignore[attr-defined]
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


# ---- mounting -----------------------------------------------------------------------------------


def test_mounting_twice_is_refused(mounted: Box, tmp_path: Path) -> None:
    """The second mount names the first, and the first goes on undisturbed."""
    other = tmp_path / "other"
    other.mkdir()
    with pytest.raises(BusyError) as caught:
        server.spawn(mounted.volume, other)
    assert f"mounted already, on {mounted.place}" in caught.value.message
    assert f"process {mounted.pid}" in caught.value.message
    with pytest.raises(BusyError):
        mounted.mount()
    assert mounted.replica.stat().st_size == SIZE
    assert os.listdir(other) == []


def test_two_mounts_at_one_time_give_one_server(box: Box, tmp_path: Path) -> None:
    """Of two servers started at the same moment one wins; the other says who has the volume."""
    other = tmp_path / "other"
    other.mkdir()
    outcomes: list[Any] = []

    def start(place: Path) -> None:
        try:
            outcomes.append(server.spawn(box.volume, place))
        except VsnapError as error:
            outcomes.append(error)

    threads = [threading.Thread(target=start, args=(place,)) for place in (box.place, other)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    pids = [outcome for outcome in outcomes if isinstance(outcome, int)]
    (error,) = (outcome for outcome in outcomes if isinstance(outcome, VsnapError))
    assert len(pids) == 1
    assert error.code in ("busy", "mounted")
    assert str(pids[0]) in error.message


def test_a_mountpoint_that_holds_something_is_refused(box: Box) -> None:
    """A file in the mountpoint would be hidden: refused, and the file is untouched."""
    (box.place / "precious").write_text("x")
    with pytest.raises(UsageError, match="is not empty"):
        box.mount()
    assert os.listdir(box.place) == ["precious"]


def test_a_volume_opened_by_a_command_is_busy(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    """While another process holds the volume's lock, mounting fails with that reason."""
    code = (
        "import sys, trio; from vsnapfs.volume import Volume\n"
        "async def main():\n"
        "    volume = await Volume.open(sys.argv[1])\n"
        "    print('open', flush=True); sys.stdin.read()\n"
        "    await volume.close()\n"
        "trio.run(main)"
    )
    command = [sys.executable, "-c", code, str(box.volume)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"open\n"
        with pytest.raises(VsnapError) as caught:
            box.mount()
        assert caught.value.code == "busy"
        assert holder.stdin is not None
        holder.stdin.close()
        box.mount()  # waits for the lock if need be


@pytest.mark.parametrize("name", ["a,b", "a b", "back\\slash", "tab\tnew\nline", "機械", "x" * 200])
def test_any_name_of_a_volume(tmp_path: Path, name: str) -> None:
    """A volume of any name is mounted, found in the mount table, answered for and unmounted."""
    box = Box(tmp_path, name)
    box.mount()
    try:
        mount = mounts.mount_of(box.volume)
        assert mount is not None
        assert mount.volume == box.volume
        assert mount.mountpoint == box.place
        assert box.call("status")["volume"] == str(box.volume)
    finally:
        box.unmount()
    assert mounts.mount_of(box.volume) is None
    assert box.log() == ""


@pytest.mark.skipif(os.geteuid() != 0, reason="users may not be allowed to share")
def test_a_shared_mount(box: Box) -> None:
    """With allow_other the kernel lets others in; without it, nobody else, not even a look."""
    box.mount(options=["allow_other"])
    assert stat.S_IMODE(box.place.stat().st_mode) == 0o755
    line = next(
        text
        for text in Path("/proc/self/mountinfo").read_text().splitlines()
        if str(box.volume) in text and "fuse.vsnapfs" in text
    )
    assert "allow_other" in line
    assert "default_permissions" in line


def test_errors_of_the_server_reach_whoever_starts_it(box: Box) -> None:
    """What goes wrong in the background process is told in its words, and nothing stays behind."""
    (box.volume / "replica.img").rename(box.volume / "elsewhere")
    with pytest.raises(VsnapError) as caught:
        box.mount()
    assert caught.value.code == "no-replica"
    assert mounts.mount_of(box.volume) is None
    assert not client.is_served(box.volume)


def test_a_changed_replica_is_mounted_only_if_accepted(box: Box) -> None:
    """A replica written beside us is refused, unless the administrator accepts; then he is told."""
    box.mount()
    box.call("rp_create")
    box.unmount()
    with open(box.volume / "replica.img", "r+b") as file:
        file.write(b"beside")
    with pytest.raises(VsnapError) as caught:
        box.mount()
    assert caught.value.code == "replica-changed"
    told: list[str] = []
    box.mount(accept_changed_replica=True, warn=told.append)
    assert len(told) == 1
    assert box.replica.read_bytes()[:6] == b"beside"
    box.unmount()
    assert box.log() == ""


def test_the_server_is_cut_loose(mounted: Box) -> None:
    """It stands in /, in a session of its own, with its stdio on server.log, and 0600 files."""
    process = Path(f"/proc/{mounted.pid}")
    assert os.readlink(process / "cwd") == "/"
    assert os.getsid(mounted.pid) == mounted.pid
    assert os.readlink(process / "fd" / "0") == "/dev/null"
    for number in ("1", "2"):
        assert os.readlink(process / "fd" / number) == str(mounted.volume / "server.log")
    for name in ("server.log", "control.sock"):
        assert stat.S_IMODE((mounted.volume / name).stat().st_mode) == 0o600
    limits = (process / "limits").read_text()
    soft, hard = next(line for line in limits.splitlines() if "open files" in line).split()[3:5]
    assert soft == hard


# ---- the end ------------------------------------------------------------------------------------


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_unmount(box: Box, sent: signal.Signals) -> None:
    """A polite signal unmounts, closes cleanly, and ends the process without a word."""
    pid = box.mount()
    box.write(0, b"before the signal")
    os.kill(pid, sent)
    assert wait_for(lambda: not alive(pid))
    assert mounts.mount_of(box.volume) is None
    assert not (box.volume / "control.sock").exists()
    assert box.log() == ""
    assert box.events()[-1] == 1002
    box.mount()
    assert 1042 not in box.events()
    assert box.replica.read_bytes()[:17] == b"before the signal"


def test_a_signal_ends_a_busy_mount_after_closing_the_volume(box: Box) -> None:
    """A file that is open does not keep a SIGTERM from closing the volume; the log says who."""
    pid = box.mount()
    fd = os.open(box.replica, os.O_RDWR)
    try:
        os.pwrite(fd, b"acknowledged", 0)
        os.kill(pid, signal.SIGTERM)
        assert wait_for(lambda: not alive(pid))
        with pytest.raises(OSError) as caught:
            os.pread(fd, 10, 0)
        assert caught.value.errno in (errno.ENOTCONN, errno.ECONNABORTED)
    finally:
        with suppress(OSError):
            os.close(fd)
    assert mounts.mount_of(box.volume) is None
    assert box.events()[-2:] == [1091, 1002]
    assert f"process {os.getpid()}" in box.log()
    box.mount()
    assert box.replica.read_bytes()[:12] == b"acknowledged"
    assert 1042 not in box.events()


def test_stop_is_refused_while_the_mount_is_in_use(mounted: Box) -> None:
    """`vsnapfs umount` of a busy volume names the user and changes nothing."""
    with open(mounted.replica, "r+b", buffering=0) as file:
        with pytest.raises(VsnapError) as caught:
            mounted.unmount()
        assert caught.value.errno == errno.EBUSY
        assert f"process {os.getpid()}" in caught.value.message
        file.write(b"still here")
    assert mounted.replica.read_bytes()[:10] == b"still here"


def test_stop_answers_when_the_volume_is_free(box: Box) -> None:
    """Right after `stop` the volume can be opened by anybody: no waiting, no retry."""
    for _ in range(5):
        pid = box.mount()
        box.write(0, os.urandom(100_000))
        box.unmount()
        lock = client._LOCK_SECONDS
        client._LOCK_SECONDS = 0  # would raise at the first busy lock
        try:
            box.call("rp_list")
        finally:
            client._LOCK_SECONDS = lock
        assert wait_for(lambda pid=pid: not alive(pid))


def test_a_wrong_mountpoint_is_not_stopped(mounted: Box) -> None:
    """Stopping what the mount table said a while ago does not hit what is mounted now."""
    with pytest.raises(VsnapError) as caught:
        mounted.call("stop", mountpoint="/somewhere/else")
    assert caught.value.code == "not-mounted"
    assert mounted.replica.exists()


@pytest.mark.parametrize("way", ["umount", "fusermount3"])
def test_an_unmount_from_outside_closes_the_volume(box: Box, way: str) -> None:
    """umount(8) ends the server cleanly, and a mount right after it works."""
    if way == "umount" and os.geteuid() != 0:
        pytest.skip("only root may umount")
    pid = box.mount()
    box.write(0, b"kept")
    command = ["umount", box.place] if way == "umount" else ["fusermount3", "-u", box.place]
    subprocess.run(command, check=True)
    box.mount()
    assert not alive(pid)
    assert box.replica.read_bytes()[:4] == b"kept"
    assert 1042 not in box.events()
    assert box.log() == ""


def test_a_lazy_unmount_serves_its_last_user(box: Box) -> None:
    """After `umount -l` an open file works to its end; then the volume is closed."""
    pid = box.mount()
    with open(box.replica, "r+b", buffering=0) as file:
        mounts.unmount_now(box.place, lazy=True)
        assert os.listdir(box.place) == []
        file.write(b"late")
        os.fsync(file.fileno())
        with pytest.raises(VsnapError) as caught:
            box.call("stop")
        assert caught.value.errno == errno.EBUSY
        assert alive(pid)
    assert wait_for(lambda: not alive(pid))
    box.mount()
    assert box.replica.read_bytes()[:4] == b"late"
    assert 1042 not in box.events()


def test_a_killed_server_s_mount_is_recognised_and_cleaned(box: Box) -> None:
    """After SIGKILL the mount is dead; mounting again cleans it and finds all that was written."""
    pid = box.mount()
    box.write(4096, b"acknowledged")
    box.call("rp_create")
    box.write(4096, b"overwritten!")
    os.kill(pid, signal.SIGKILL)
    assert wait_for(lambda: not alive(pid))
    mount = mounts.mount_of(box.volume)
    assert mount is not None
    assert mount.stale
    refused(errno.ENOTCONN, os.stat, box.place)
    assert (box.volume / "control.sock").exists()
    assert not client.is_served(box.volume)
    assert box.call("status")["recovery_points"] == 1  # directly, beside the dead mount
    box.mount()
    found = [m for m in mounts.find_mounts() if m.volume == box.volume]
    assert len(found) == 1
    assert box.replica.read_bytes()[4096:4108] == b"overwritten!"
    assert (box.points / "0001.img").read_bytes()[4096:4108] == b"acknowledged"
    assert 1042 in box.events()


def test_a_killed_server_s_mount_can_be_unmounted(box: Box, tmp_path: Path) -> None:
    """`umount` of a dead mount cleans it; so does mounting the volume somewhere else."""
    os.kill(box.mount(), signal.SIGKILL)
    assert wait_for(lambda: mounts.mount_of(box.volume).stale)  # type: ignore[union-attr]
    box.unmount()
    assert mounts.mount_of(box.volume) is None
    os.kill(box.mount(), signal.SIGKILL)
    assert wait_for(lambda: mounts.mount_of(box.volume).stale)  # type: ignore[union-attr]
    other = tmp_path / "other"
    other.mkdir()
    server.spawn(box.volume, other)
    assert [m.mountpoint for m in mounts.find_mounts() if m.volume == box.volume] == [other]


@pytest.mark.time_limit(300)
def test_kill_and_remount_ten_times(box: Box) -> None:
    """SIGKILL in the middle of writing, ten times: every acknowledged write and point is there."""
    rng = random.Random(11)
    model = bytearray(SIZE)
    kept: dict[int, bytes] = {}
    for turn in range(10):
        pid = box.mount()
        assert box.replica.read_bytes() == model
        for number, image in kept.items():
            assert (box.points / f"{number:04d}.img").read_bytes() == image
        if len(kept) == 3:
            oldest = min(kept)
            box.call("rp_delete", point=oldest)
            del kept[oldest]
        kept[box.call("rp_create")["number"]] = bytes(model)
        killer = threading.Timer(rng.uniform(0.02, 0.2), os.kill, (pid, signal.SIGKILL))
        killer.start()
        fd = os.open(box.replica, os.O_RDWR)
        pending: tuple[int, bytes] | None = None
        try:
            for _ in range(100_000):
                data = rng.randbytes(rng.choice((512, 4096, 20_000)))
                # A small part of the replica, so that the diff area does not run full.
                pending = (rng.randrange(0, MIB - len(data)), data)
                os.pwrite(fd, data, pending[0])
                model[pending[0] : pending[0] + len(data)] = data
                pending = None
        except OSError:
            pass  # it has been killed
        finally:
            with suppress(OSError):
                os.close(fd)
        killer.join()
        assert wait_for(lambda pid=pid: not alive(pid))
        assert pending is not None, f"turn {turn}: never interrupted"
        # The write in flight may have got through, in whole or in part.
        offset, data = pending
        now = (box.volume / "replica.img").read_bytes()[offset : offset + len(data)]
        before = model[offset : offset + len(data)]
        assert all(
            byte in pair for byte, pair in zip(now, zip(before, data, strict=True), strict=True)
        )
        model[offset : offset + len(data)] = now


def test_foreground(box: Box) -> None:
    """In the foreground the process that was started serves, and Ctrl-C ends it well."""
    code = (
        "import sys; from pathlib import Path; from vsnapfs.daemon import server\n"
        "server.serve(Path(sys.argv[1]), Path(sys.argv[2]),"
        " ready=lambda: print('ready', flush=True))\n"
        "print('ended', flush=True)"
    )
    command = [sys.executable, "-c", code, str(box.volume), str(box.place)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        assert box.call("status")["pid"] == process.pid
        box.write(0, b"x")
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
    assert (out, err, process.returncode) == ("ended\n", "", 0)


def test_the_control_socket_answers_under_load(mounted: Box) -> None:
    """While several writers keep the server busy, a status takes well under a second."""
    over = threading.Event()

    def work(seed: int) -> None:
        rng = random.Random(seed)
        fd = os.open(mounted.replica, os.O_RDWR)
        try:
            while not over.is_set():
                os.pwrite(fd, rng.randbytes(65536), rng.randrange(0, 2 * MIB))
                os.pread(fd, MIB, rng.randrange(0, SIZE - MIB))
        finally:
            os.close(fd)

    mounted.call("rp_create")
    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for worker in workers:
        worker.start()
    try:
        took = []
        for _ in range(20):
            started = time.monotonic()
            assert mounted.call("status")["state"] == "online"
            took.append(time.monotonic() - started)
            time.sleep(0.02)
    finally:
        over.set()
        for worker in workers:
            worker.join()
    assert sorted(took)[len(took) // 2] < 0.5
    assert max(took) < 3


def test_a_stuck_server_is_not_taken_for_dead(mounted: Box, monkeypatch: Any) -> None:
    """A server that is stopped for a while is neither cleaned away nor waited for without end."""
    monkeypatch.setattr(client, "_SILENCE_SECONDS", 0.5)
    monkeypatch.setattr(mounts, "_PATIENCE", 0.5)
    os.kill(mounted.pid, signal.SIGSTOP)
    try:
        mount = mounts.mount_of(mounted.volume)
        assert mount is not None
        assert not mount.stale
        with pytest.raises(VsnapError) as caught:
            mounted.call("status")
        assert caught.value.code == "no-answer"
    finally:
        os.kill(mounted.pid, signal.SIGCONT)
    assert wait_for(lambda: mounted.replica.stat().st_size == SIZE)
