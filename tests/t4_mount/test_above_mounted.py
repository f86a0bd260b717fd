"""SIGTERM while something stands on a device that stands on ours: all of it is synced first.

Everything is mounted in a namespace of its own, so that other programs on the machine which make
namespaces cannot keep it busy.
"""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from mounted_rig import MIB, Machine, Rig, alive, quiet, sh, until
from namespace import Namespace

pytestmark = [pytest.mark.needs_fuse, pytest.mark.needs_loop]

DATA = random.Random(13).randbytes(3 * MIB)
#: ext4 that sends no flush by itself, as file systems without a journal do.
NO_FLUSH = ("-o", "nobarrier")


class Stack:
    """A mounted volume with a loop device, and what a test builds on it; twice, before and after.

    A builder mounts things, each directory being made by it, and returns where the data is kept.
    """

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.rig: Rig = machine.rig(size=128 * MIB, area=16 * MIB)
        self.is_new = True
        self._mounts = 0
        self.namespace: Namespace
        self.device = ""

    def raise_up(self) -> None:
        """Mount the volume and attach it, in a new namespace."""
        here = self.namespace = Namespace(self.machine)
        here.serve(self.rig.directory, self.rig.place)
        self.device = here.loop(self.rig.replica, "--direct-io=on")

    def ext4(self, device: str, *options: str, where: Namespace | None = None) -> Path:
        """An ext4 on a device, made the first time; where it is mounted."""
        if self.is_new:
            sh("mkfs.ext4", "-q", "-F", device)
        self._mounts += 1
        place = self.machine.base / f"mounted-{self._mounts}"
        place.mkdir()
        (where or self.namespace).mount(*options, device, place)
        return place

    def pull(self, *others: Namespace) -> None:
        """SIGTERM to the server, and everything taken away behind it. others: in use above it."""
        pid = self.namespace.status(self.rig.directory)["pid"]
        os.kill(pid, signal.SIGTERM)
        until(lambda: not alive(pid))
        assert self.rig.event_ids()[-2:] == [1091, 1002]
        assert "not synced" not in str(self.rig.events()[-2])
        for namespace in (*others, self.namespace):
            namespace.end()
        self.is_new = False
        self.rig.expected_log = ("a signal ended the server",)


def on_an_offset(stack: Stack) -> Path:
    """A loop device over a part of the loop device."""
    return stack.ext4(stack.namespace.loop(stack.device, "--offset", str(MIB)))


def three_high(stack: Stack) -> Path:
    """Loop devices over loop devices, and a file system that leaves it at writing to its own."""
    first = stack.namespace.loop(stack.device, "--offset", str(MIB))
    second = stack.namespace.loop(first, "--offset", str(MIB))
    return stack.ext4(stack.namespace.loop(second, "--offset", str(MIB)), *NO_FLUSH)


def in_a_file(stack: Stack) -> Path:
    """A loop device over a file in a file system on the loop device; the latter must come last."""
    below = stack.ext4(stack.device, *NO_FLUSH)
    image = below / "image"
    if stack.is_new:
        stack.namespace.run("truncate", "--size=64M", image)
    return stack.ext4(stack.namespace.loop(image), *NO_FLUSH)


def on_a_partition(stack: Stack) -> Path:
    """A partition of the loop device."""
    whole = stack.namespace.loop(stack.device, "--partscan")
    added = quiet("addpart", whole, "1", "2048", str(64 * MIB // 512))
    assert added.returncode == 0, added.stderr
    return stack.ext4(f"{whole}p1")


def over_mounted(stack: Stack) -> Path:
    """Its mountpoint has something else mounted over it; another leads there."""
    place = stack.ext4(stack.device)
    other = stack.machine.base / f"also-{place.name}"
    other.mkdir()
    stack.namespace.mount("--bind", place, other)
    stack.namespace.mount("-t", "tmpfs", "vsnapfs-test", place)
    return other


BUILDERS = (on_an_offset, three_high, in_a_file, on_a_partition, over_mounted)


@pytest.mark.parametrize("build", BUILDERS, ids=lambda build: build.__name__)
def test_a_signal_syncs_whatever_stands_on_the_device(
    machine: Machine, build: Callable[[Stack], Path]
) -> None:
    """Nothing that a file system above held back is lost, however many devices lie in between."""
    stack = Stack(machine)
    stack.raise_up()
    stack.namespace.write(build(stack) / "unsynced", DATA)
    stack.pull()
    stack.raise_up()
    assert stack.namespace.read(build(stack) / "unsynced") == DATA


def test_a_signal_syncs_file_systems_in_other_namespaces(machine: Machine) -> None:
    """A file system that only another mount namespace knows, as in a container, is synced, too."""
    stack = Stack(machine)
    stack.raise_up()
    other = Namespace(machine)
    other.write(stack.ext4(stack.device, where=other) / "unsynced", DATA)
    stack.pull(other)
    stack.raise_up()
    assert stack.namespace.read(stack.ext4(stack.device) / "unsynced") == DATA


def test_a_signal_syncs_a_file_system_that_is_in_no_mount_table(machine: Machine) -> None:
    """One that was unmounted lazily and is still in use is reached by its device."""
    stack = Stack(machine)
    stack.raise_up()
    place = stack.ext4(stack.device)
    user = stack.namespace.start("sh", "-c", f"exec 3>{place}/unsynced; echo; cat >&3; echo; cat")
    machine.later(user.kill)
    assert user.stdin is not None
    assert user.stdout is not None
    assert user.stdout.readline() == b"\n"
    stack.namespace.run("umount", "--lazy", place)
    os.write(user.stdin.fileno(), DATA[:4096])
    until(lambda: Path(f"/proc/{user.pid}/fdinfo/3").read_text().startswith("pos:\t4096\n"))
    stack.pull()
    user.communicate()
    stack.raise_up()
    assert stack.namespace.read(stack.ext4(stack.device) / "unsynced") == DATA[:4096]


def test_a_killed_server_that_is_the_last_in_its_namespace_ends(machine: Machine) -> None:
    """With a container all of its processes are killed, under a file system on its own device."""
    stack = Stack(machine)
    stack.raise_up()
    stack.namespace.write(stack.ext4(stack.device) / "unsynced", DATA)
    pid = stack.namespace.status(stack.rig.directory)["pid"]
    mount = stack.namespace.root / stack.rig.place.relative_to("/")
    abort = Path(f"/sys/fs/fuse/connections/{os.minor(mount.stat().st_dev)}/abort")
    stack.namespace.leave()
    os.kill(pid, signal.SIGKILL)
    try:
        until(lambda: not alive(pid))
    finally:
        if alive(pid):  # It would stay until the machine restarts.
            abort.write_text("1")
            until(lambda: not alive(pid))
        quiet("losetup", "--detach", stack.device)
