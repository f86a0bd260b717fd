"""Loop devices on the replica, with a real ext4, and a user's mount without root."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from box import MIB, Box, wait_for
from house import BECOME_A_USER, python_for_users
from mounted_rig import alive

from vsnapfs.daemon import mounts
from vsnapfs.errors import BusyError, VsnapError

pytestmark = [pytest.mark.needs_fuse, pytest.mark.needs_loop]


def sh(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


class Attached(Box):
    """A mounted volume with a loop device and a place for its file system."""

    def __init__(self, base: Path) -> None:
        super().__init__(base, size=16 * MIB)
        self.files = base / "files"
        self.files.mkdir()
        self.device = ""

    def attach(self) -> None:
        self.device = mounts.attach_loop(self.replica)

    def clean_up(self) -> None:
        subprocess.run(["umount", "-l", self.files], capture_output=True, check=False)
        for device in mounts.loop_devices(self.place):
            subprocess.run(["losetup", "--detach", device], capture_output=True, check=False)
        super().clean_up()


@pytest.fixture
def box(tmp_path: Path) -> Iterator[Attached]:
    box = Attached(tmp_path)
    box.mount()
    box.attach()
    yield box
    box.clean_up()


def test_a_file_system_on_the_loop_device(box: Attached) -> None:
    """The ext4 on an attached replica keeps its files over detach, unmount and a new attach."""
    assert mounts.loop_devices(box.place) == [box.device]
    assert sh("losetup", "--noheadings", "--output", "DIO", box.device).strip() == "1"
    sh("mkfs.ext4", "-q", "-F", box.device)
    sh("mount", box.device, box.files)
    (box.files / "letter").write_text("dear reader")
    sh("umount", box.files)
    mounts.detach_loop(box.device)
    assert mounts.loop_devices(box.place) == []
    box.unmount()
    assert box.log() == ""
    box.mount()
    box.attach()
    sh("mount", "-o", "ro", box.device, box.files)
    assert (box.files / "letter").read_text() == "dear reader"
    sh("umount", box.files)
    mounts.detach_loop(box.device)


def test_in_use_is_in_use(box: Attached) -> None:
    """No second device, no detach under a mounted file system, no unmount under a device."""
    with pytest.raises(BusyError, match=box.device):
        mounts.attach_loop(box.replica)
    sh("mkfs.ext4", "-q", "-F", box.device)
    sh("mount", box.device, box.files)
    with pytest.raises(BusyError, match=str(box.files)):
        mounts.detach_loop(box.device)
    with pytest.raises(VsnapError) as caught:
        box.unmount()
    assert f"{box.device} (mounted on {box.files})" in caught.value.message
    (box.files / "still").write_text("works")
    os.sync()
    sh("umount", box.files)
    mounts.detach_loop(box.device)
    box.unmount()
    assert box.log() == ""


def test_an_offline_replica_cannot_be_attached(box: Attached) -> None:
    """Attaching an offline volume says that it is offline."""
    mounts.detach_loop(box.device)
    box.call("offline")
    with pytest.raises(VsnapError) as caught:
        box.attach()
    assert caught.value.code == "offline"


def test_a_signal_under_a_mounted_file_system(box: Attached) -> None:
    """SIGTERM syncs the file system above, closes the volume and ends; nothing is lost."""
    sh("mkfs.ext4", "-q", "-F", box.device)
    sh("mount", box.device, box.files)
    (box.files / "unsynced").write_bytes(b"page cache" * 10_000)
    os.kill(box.pid, signal.SIGTERM)
    assert wait_for(lambda: not alive(box.pid), 30)
    assert box.events()[-2:] == [1091, 1002]
    sh("umount", "-l", box.files)
    sh("losetup", "--detach", box.device)
    assert wait_for(lambda: not Path(f"/sys/block/{box.device[5:]}/loop").exists())
    box.mount()
    box.attach()
    sh("mount", box.device, box.files)
    assert (box.files / "unsynced").read_bytes() == b"page cache" * 10_000
    sh("umount", box.files)
    mounts.detach_loop(box.device)


def test_kill_under_a_mounted_file_system(box: Attached) -> None:
    """SIGKILL under ext4: what was fsynced is there after remount, and ext4 recovers by itself."""
    sh("mkfs.ext4", "-q", "-F", box.device)
    sh("mount", box.device, box.files)
    with open(box.files / "synced", "wb") as file:
        file.write(b"durable" * 10_000)
        file.flush()
        os.fsync(file.fileno())
    box.call("rp_create")
    os.kill(box.pid, signal.SIGKILL)
    assert wait_for(lambda: not alive(box.pid))
    sh("umount", "-l", box.files)
    sh("losetup", "--detach", box.device)
    assert wait_for(lambda: not Path(f"/sys/block/{box.device[5:]}/loop").exists())
    box.mount()
    box.attach()
    sh("mount", box.device, box.files)
    assert (box.files / "synced").read_bytes() == b"durable" * 10_000
    sh("umount", box.files)
    mounts.detach_loop(box.device)


AS_A_USER = """
import os, sys, time
from pathlib import Path
base = Path(sys.argv[1])
from vsnapfs.daemon import client, mounts, server
from vsnapfs.errors import VsnapError
from vsnapfs.volume.create import create_volume
volume, place = base / "vol, of a user", base / "mnt"
place.mkdir()
create_volume(volume, size=1 << 20, diff_area_size=16 << 20)
server.spawn(volume, place)
assert client.call(volume, "rp_create")["number"] == 1
assert (place / "recovery-points" / "0001.img").read_bytes() == bytes(1 << 20)
mount = mounts.mount_of(volume)
with open(place / "replica.img", "r+b") as file:
    try:
        mounts.unmount(mount)
        raise SystemExit("a busy mount was unmounted")
    except VsnapError as error:
        assert error.errno == 16, error
        assert f"process {os.getpid()}" in error.message, error.message
mounts.unmount(mount)
assert mounts.mount_of(volume) is None
try:
    server.spawn(volume, place, options=["allow_other"])
    raise SystemExit("shared without permission")
except VsnapError as error:
    assert error.code == "not-allowed", error
os.kill(server.spawn(volume, place), 9)
while not mounts.mount_of(volume).stale:
    time.sleep(0.01)
server.spawn(volume, place)  # cleans up first
try:
    mounts.attach_loop(place / "replica.img")
    raise SystemExit("attached without root")
except VsnapError as error:
    assert error.code == "not-root", error
mounts.unmount(mounts.mount_of(volume))
assert (volume / "server.log").read_text() == "", (volume / "server.log").read_text()
print("all well")
"""


def test_a_user_mounts_without_root() -> None:
    """Through fusermount3 an ordinary user mounts, is told who is in the way, and cleans up."""
    python = python_for_users()
    if python is None:
        pytest.skip("ordinary users cannot reach this Python or this checkout")
    base = Path("/tmp") / f"vsnapfs-user-{os.getpid()}"
    base.mkdir(mode=0o777)
    base.chmod(0o777)
    # In a mount namespace of its own, where /dev/fuse is open to users as on a usual machine.
    script = (
        f"mknod {base}/fuse c 10 229 && chmod 666 {base}/fuse &&"
        f' mount --bind {base}/fuse /dev/fuse && exec "$@"'
    )
    command = ["unshare", "--mount", "sh", "-c", script, "-", *BECOME_A_USER, python, "-c"]
    try:
        done = subprocess.run(
            [*command, AS_A_USER, base], capture_output=True, text=True, check=False
        )
    finally:
        subprocess.run(["rm", "-rf", base], check=True)
    assert done.stdout == "all well\n", done.stdout + done.stderr
