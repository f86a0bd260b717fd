"""A real server: how a mount begins, what it refuses, how it ends, and how it is found dead."""

from __future__ import annotations

import errno
import os
import random
import resource
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from box import MIB, SIZE, Box, refused, wait_for
from mounted_rig import alive, vsnapfs

from vsnapfs.daemon import client, mounts, server
from vsnapfs.errors import BusyError, UsageError, VsnapError

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
        assert f"Process {holder.pid} has it" in caught.value.hint
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
    """A replica written beside us is refused, unless the administrator accepts; then he is told,
    and not asked again, although nothing was written meanwhile.
    """
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
    box.mount()
    box.unmount()


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
    assert caught.value.code == "mounted-there"
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
        for command in ("umount", "attach"):
            said = vsnapfs(command, box.volume, code=1)
            assert f"is served by process {pid}, but is mounted nowhere" in said
            assert "SIGTERM" in said
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


@pytest.mark.parametrize("by", ["its new name", "its mountpoint"])
def test_a_moved_volume_is_unmounted(box: Box, tmp_path: Path, by: str) -> None:
    """The mount table has the old name. What could not be closed cleanly is not said to be."""
    box.mount()
    client.call(box.volume, "rp_create")
    box.write(0, b"makes a write buffer")
    client.call(box.volume, "rp_create")
    moved = tmp_path / "moved"
    box.volume.rename(moved)
    try:
        box.write(MIB, b"acknowledged, but its block cannot be preserved")
        said = vsnapfs("umount", moved if by == "its new name" else box.place, code=1)
        known = "not all acknowledged writes are on the disk"
        assert (known if by == "its new name" else "is not known") in said
        assert by != "its new name" or wait_for(lambda: not alive(box.pid))
    finally:
        moved.rename(box.volume)
    assert mounts.mount_of(box.volume) is None
    assert wait_for(lambda: not alive(box.pid))
    assert box.events()[-1] == 1044


def test_kill_and_remount_ten_times(box: Box) -> None:
    """SIGKILL in the middle of writing, ten times: every acknowledged write and point is there."""
    rng = random.Random(11)
    model = bytearray(SIZE)
    kept: dict[int, bytes] = {}
    pending: tuple[int, bytes] | None = None
    for turn in range(10):
        pid = box.mount()
        found = box.replica.read_bytes()
        if pending is not None:
            # The write in flight may have got through, in whole or in part.
            offset, data = pending
            now, before = (image[offset : offset + len(data)] for image in (found, model))
            both = zip(before, data, strict=True)
            assert all(byte in pair for byte, pair in zip(now, both, strict=True))
            model[offset : offset + len(data)] = now
        assert found == model
        for number, image in kept.items():
            assert (box.points / f"{number:04d}.img").read_bytes() == image
        if len(kept) == 3:
            oldest = min(kept)
            box.call("rp_delete", point=oldest)
            del kept[oldest]
        kept[box.call("rp_create")["number"]] = bytes(model)
        killer = threading.Timer(rng.uniform(0.02, 0.2), os.kill, (pid, signal.SIGKILL))
        fd = os.open(box.replica, os.O_RDWR)
        killer.start()
        pending = None
        try:
            while True:
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
        out, err = process.communicate(timeout=60)
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


@pytest.mark.parametrize("limit", ["soft", "hard"])
def test_without_descriptors_status_and_stop_are_answered(box: Box, limit: str) -> None:
    """However many hold a connection, and whichever limit it is; server.log stays short."""
    box.mount()
    most = max(map(int, os.listdir(f"/proc/{box.pid}/fd"))) + 1
    assert box.pid is not None
    _, hard = resource.prlimit(box.pid, resource.RLIMIT_NOFILE)
    both = (5, hard) if limit == "soft" else (most, most)
    resource.prlimit(box.pid, resource.RLIMIT_NOFILE, both)
    client.call(box.volume, "rp_create")  # as long as few ask, anything is answered
    held = [socket.socket(socket.AF_UNIX) for _ in range(25)]
    try:
        for connection in held:
            connection.connect(str(box.volume / "control.sock"))
        for _ in range(3):
            assert client.call(box.volume, "status")["state"] == "online"
        client.call(box.volume, "stop")
    finally:
        for connection in held:
            connection.close()
    assert box.events()[-1] == 1002
    (line,) = box.log().splitlines()
    assert "with difficulty: Too many open files" in line


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
