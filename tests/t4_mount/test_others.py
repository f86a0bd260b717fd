"""Somebody uses VOLUME/replica.img instead of MOUNTPOINT/replica.img: refused, or told of.

With a real server in a process of its own, and the real programs that people use.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from mounted_rig import MIB, Machine, Rig, quiet, sh, sha256, until, vsnapfs

from vsnapfs import openers
from vsnapfs.backing import FileBacking
from vsnapfs.errors import BusyError

pytestmark = pytest.mark.needs_fuse


@pytest.fixture
def rig(machine: Machine) -> Rig:
    """A mounted volume with one recovery point."""
    rig = machine.rig()
    rig.mount()
    rig.write(0, os.urandom(MIB))
    assert rig.create_point() == 1
    return rig


def others(rig: Rig, what: str = "replica") -> dict[str, Any]:
    """What `status` says about others, {} if there were none."""
    return rig.status()[what]["others"] or {}


def told(rig: Rig) -> list[dict[str, Any]]:
    return [event["params"] for event in rig.events() if event["event_id"] == 1052]


@contextmanager
def writer(path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A program that has opened the file for writing, until the end of the block."""
    code = "import os, sys; os.open(sys.argv[1], os.O_RDWR); print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            yield process
        finally:
            process.communicate(b"\n")


def is_named(rig: Rig, process: subprocess.Popen[bytes], what: str = "replica") -> bool:
    return any(f"(pid {process.pid})" in name for name in others(rig, what).get("writers", []))


@pytest.mark.needs_qemu
def test_qemu_s_tools_are_refused(rig: Rig, tmp_path: Path) -> None:
    """qemu-io and qemu-img convert change neither replica nor diff area; info and cat work."""
    before = sha256(rig.point(1), direct=True), sha256(rig.image), sha256(rig.area)
    (tmp_path / "new.img").write_bytes(b"n" * MIB)
    for file in (rig.image, rig.area):
        write = quiet("qemu-io", "-f", "raw", "-c", "write -P 0xcc 0 1M", file)
        assert 'Failed to get "write" lock' in write.stderr
        convert = ["qemu-img", "convert", "-n", "-f", "raw", "-O", "raw"]
        done = quiet(*convert, tmp_path / "new.img", file)
        assert 'Failed to get "write" lock' in done.stderr
        assert "file format: raw" in sh("qemu-img", "info", "-f", "raw", file)
    assert (sha256(rig.point(1), direct=True), sha256(rig.image), sha256(rig.area)) == before
    sh("qemu-io", "-f", "raw", "-c", "write -P 0xcc 0 1M", rig.replica)  # as it is meant to be
    assert sha256(rig.point(1), direct=True) == before[0]


@pytest.mark.needs_qemu
def test_a_volume_that_qemu_uses_is_not_opened(rig: Rig) -> None:
    """Unmounted and in use by QEMU: the error names QEMU and the process."""
    rig.unmount()
    with subprocess.Popen(
        ["qemu-io", "-f", "raw", rig.image], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as qemu:
        assert qemu.stdin is not None
        assert qemu.stdout is not None
        qemu.stdin.write(b"read 0 512\n")
        qemu.stdin.flush()
        qemu.stdout.readline()
        for command in (("mount", rig.directory, rig.place), ("rp", "list", rig.directory)):
            said = vsnapfs(*command, code=1)
            assert "QEMU" in said
            assert f"qemu-io (pid {qemu.pid})" in said
        qemu.communicate()
    rig.mount()


def test_dd_is_told_of_and_remembered(rig: Rig) -> None:
    """One event 1052; then `status`, and the next mount, as long as the point is there."""
    sh("dd", "if=/dev/zero", f"of={rig.image}", "bs=4k", "count=1", "conv=notrunc")
    until(lambda: others(rig).get("suspect_points"))
    (event,) = told(rig)
    assert event["device"] == str(rig.image)
    assert "missing from 1 recovery point" in vsnapfs("status", rig.directory)
    rig.unmount()
    assert "missing from 1 recovery point" in vsnapfs("status", rig.directory)
    said = vsnapfs("mount", rig.directory, rig.place)
    assert "missing from 1 recovery point" in said
    vsnapfs("rp", "delete", rig.directory, 1)
    assert "missing from" not in vsnapfs("status", rig.directory)


@pytest.mark.parametrize("what", ["replica", "diff_area"])
def test_who_has_it_open_is_named(rig: Rig, what: str) -> None:
    """While he is there `status` names him, the event does too, and his end is no second event."""
    file = rig.image if what == "replica" else rig.area
    with writer(file) as process:
        until(lambda: is_named(rig, process, what))
        (event,) = told(rig)
        assert event["what"].endswith(f"(pid {process.pid})")
        assert event["device" if what == "replica" else "diff_area"] == str(file)
        assert event["what"] in vsnapfs("status", rig.directory)
    until(lambda: not others(rig, what)["writers"])
    assert others(rig, what)["count"] == 1
    assert len(told(rig)) == 1


def test_who_was_there_before_the_mount_is_named(machine: Machine) -> None:
    """Whoever had the replica open when it was mounted is found, though he opens nothing then."""
    rig = machine.rig()
    with writer(rig.image) as process:
        rig.mount()
        until(lambda: is_named(rig, process))
        assert len(told(rig)) == 1


def test_neither_we_nor_readers_are_told_of(rig: Rig, machine: Machine) -> None:
    """Every command of ours beside the mount, a second server, cat, cp, sums: no event."""
    base = machine.base
    (base / "elsewhere").mkdir()
    v = rig.directory
    for command, code in {
        ("status", v): 0,
        ("status", v, "--json"): 0,
        ("rp", "list", v): 0,
        ("rp", "create", v): 0,
        ("rp", "export", v, 1, base / "exported.img"): 0,
        ("rp", "delete", v, 2): 0,
        ("verify", v): 0,
        ("repair", "--dry-run", v): 0,
        ("repair", v): 0,
        ("events", v): 0,
        ("inspect", rig.area): 0,
        ("inspect", v / "state"): 0,
        ("resize", v, "--diff-area-size", "80MiB"): 0,
        ("mount", v, base / "elsewhere"): 1,
        ("create", base / "second", "--replica", rig.image, "--adopt"): None,
        ("create", base / "third", "--diff-area", rig.area, "--size", "16MiB"): None,
        ("create", v, "--size", "16MiB", "--force"): None,
        ("offline", v): 0,
        ("online", v): 0,
        ("rp", "restore", v, 1, "--force"): 0,
    }.items():
        done = quiet(sys.executable, "-m", "vsnapfs", *command)
        assert code is None or done.returncode == code, (command, done.stdout, done.stderr)
        assert code is not None or done.returncode not in (0, 3), command
    for path in (rig.image, rig.area):
        with pytest.raises(BusyError):  # a command that comes while the server begins or ends
            FileBacking.open(path)
        sh("sh", "-c", 'cat "$1" | wc -c', "sh", path)
        sh("cp", path, base / "copy")
        sh("sha256sum", path)
    if quiet("sh", "-c", "command -v qemu-img").returncode == 0:
        sh("qemu-img", "info", "-f", "raw", rig.image)
    # They all came before this one, and so would their events: a look is at both files.
    with writer(rig.area) as process:
        until(lambda: is_named(rig, process, "diff_area"))
        assert others(rig) == {}
        (event,) = told(rig)
        assert event["what"].endswith(f"(pid {process.pid})")
        assert others(rig, "diff_area")["count"] == 1


@pytest.mark.needs_loop
@pytest.mark.parametrize("name", ["replica.img", "another name"])
def test_a_loop_device_on_the_file_itself_is_named(rig: Rig, machine: Machine, name: str) -> None:
    """With losetup VOLUME/replica.img: a line of `status` and an event; gone with the device."""
    path = rig.directory / name
    if path != rig.image:
        os.link(rig.image, path)
    device = sh("losetup", "--find", "--show", path).strip()
    machine.later(quiet, "losetup", "--detach", device)
    loop = {"device": device, "read_only": False, "mounts": []}
    assert rig.status()["replica"]["loop_devices"] == [loop]
    until(lambda: device in others(rig).get("writers", []))
    assert f"{device} is on {rig.image} itself" in vsnapfs("status", rig.directory)
    assert told(rig)
    sh("losetup", "--detach", device)
    until(lambda: not rig.status()["replica"]["loop_devices"])
    until(lambda: not others(rig)["writers"])


@pytest.mark.needs_loop
def test_what_is_mounted_from_the_file_itself_is_named(rig: Rig, machine: Machine) -> None:
    """By mount -o loop VOLUME/replica.img: where; read-only it is no writer."""
    sh("mkfs.ext4", "-q", rig.replica)
    rig.carried_out()
    place = machine.base / "wrong"
    place.mkdir()
    sh("mount", "-o", "loop,ro,noload", rig.image, place)
    machine.later(quiet, "umount", place)
    (loop,) = rig.status()["replica"]["loop_devices"]
    assert loop["read_only"] is True
    assert loop["mounts"] == [str(place)]
    assert f"read-only, mounted on {place}" in vsnapfs("status", rig.directory)
    sh("umount", place)
    until(lambda: not rig.status()["replica"]["loop_devices"])


@pytest.mark.needs_loop
def test_loop_devices_over_the_mounted_replica_are_none_of_these(rig: Rig) -> None:
    """`attach` puts its device on MOUNTPOINT/replica.img, and that is as it should be."""
    rig.attach()
    report = rig.status()
    assert report["replica"]["loop_devices"] == report["diff_area"]["loop_devices"] == []
    rig.detach()
    assert told(rig) == []


@pytest.mark.needs_loop
def test_a_loop_device_is_found_by_its_inode(machine: Machine) -> None:
    """Under a name that is gone, or one of another mount namespace, asked by device and inode."""
    file = machine.base / "replica.img"
    other = machine.base / "other.img"
    for path in (file, other):
        path.write_bytes(bytes(MIB))
    os.link(file, machine.base / "gone")
    fd = os.open(file, os.O_RDONLY)
    machine.later(os.close, fd)
    place = machine.base / "place"
    place.mkdir()
    inside = 'mount --make-rprivate / && mount --bind "$1" "$2" && losetup -f --show "$2/$3"'
    devices = []
    for name in ("replica.img", "other.img"):
        shell = ("unshare", "-m", "sh", "-ec", inside, "sh", machine.base, place, name)
        devices.append(sh(*shell).strip())
        machine.later(quiet, "losetup", "--detach", devices[-1])
    devices.append(sh("losetup", "--find", "--show", machine.base / "gone").strip())
    machine.later(quiet, "losetup", "--detach", devices[-1])
    (machine.base / "gone").unlink()
    found = {loop.device for loop in openers.loops(openers.File(fd, file))}
    assert found == {devices[0], devices[2]}


_SEE = """
import os, sys
from pathlib import Path
from vsnapfs import openers
from vsnapfs.daemon import mounts
from vsnapfs.volume import shm
place = Path(sys.argv[1])
assert mounts.top_mount(place) is not None
(place / "file").touch()
fd = os.open(place / "file", os.O_RDWR)
found = openers.File(fd, place / "file")
assert found.file_system == "{0}:{1}".format(os.major(found.device), os.minor(found.device))
table = openers._mount_points()
assert openers._mount_of(str(place / "file"), table) == (found.file_system, "tmpfs")
assert openers._mount_of("/", table)[0] != "-"
assert shm._all_of(place) == [place]
assert shm._all_of(Path("/dev/shm")) is not None
"""


def test_a_mount_may_have_any_name(tmp_path: Path) -> None:
    """What other tables end a line with may be in a mountpoint's name: every mount is seen."""
    place = tmp_path / "a\r\rb\x0b\x0b\x0c\x1cc\u0085d\u2028\u2028e"
    place.mkdir()
    command = 'mount -t tmpfs / "$1" && exec "$2" -c "$3" "$1"'
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", command, "sh", place, sys.executable, _SEE],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
