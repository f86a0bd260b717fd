"""Protection faults of a host that fails: a file system that has shut down, a limit, no memory.

ext4 can be told to shut down at once (EXT4_IOC_SHUTDOWN), as it does by itself when its disk goes
away: from then on everything on it is EIO, until it has been unmounted and mounted again.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import resource
import struct
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from mounted_rig import MIB, Machine, Rig, errno_of, quiet, read_direct, sh, sha256, until, vsnapfs
from test_faults_real import (
    SIZE,
    all_is_refused,
    must_be_exact,
    with_points,
    works_again,
    write_until_refused,
)

from vsnapfs.errors import VsnapError

pytestmark = [pytest.mark.needs_fuse, pytest.mark.needs_loop]

EXT4_IOC_SHUTDOWN = 0x8004587D


class Host:
    """A small ext4 that can die and be mounted again."""

    def __init__(self, machine: Machine, size: int) -> None:
        self.place = machine.host(size)
        self.device = sh("findmnt", "--noheadings", "--output", "SOURCE", self.place).strip()

    def die(self) -> None:
        """From now on all I/O on it is EIO; what had been written before is safe."""
        fd = os.open(self.place, os.O_RDONLY)
        try:
            fcntl.ioctl(fd, EXT4_IOC_SHUTDOWN, struct.pack("I", 0))
        finally:
            os.close(fd)

    def mend(self, rig: Rig) -> None:
        """The way back: everything that stands on it is unmounted first."""
        try:
            rig.unmount()
        except VsnapError as error:
            assert error.code == "not-durable"  # noqa: PT017 - with most faults it does not happen
        sh("umount", self.place)
        # As an administrator would; 1 says that it mended something.
        subprocess.run(["e2fsck", "-fy", self.device], check=False, capture_output=True, timeout=60)
        sh("mount", self.device, self.place)
        rig.mount()


def never_wrong(rig: Rig, checksums: dict[int, str], content: dict[int, bytes]) -> None:
    """Each part of each point is exact or EIO, as long as its copies cannot be read."""
    assert rig.points() == sorted(checksums)
    for number, image in content.items():
        fd = os.open(rig.point(number), os.O_RDONLY)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            for offset in range(0, SIZE, MIB):
                try:
                    found = os.pread(fd, MIB, offset)
                except OSError as error:
                    assert error.errno == errno.EIO  # noqa: PT017
                else:
                    # The page cache answers with what comes before the first EIO.
                    assert found
                    assert found == image[offset : offset + len(found)]
        finally:
            os.close(fd)


def contents(rig: Rig) -> dict[int, bytes]:
    """The whole of each point."""
    return {number: read_direct(rig.point(number)) for number in rig.points()}


def test_copies_cannot_be_written(machine: Machine) -> None:
    """Fault 7: the diff area's host dies, the next copy is EIO; mounted again, all points exact."""
    host = Host(machine, 64 * MIB)
    rig = machine.rig(size=SIZE, area=32 * MIB, diff_area=host.place / "area")
    rig.mount()
    checksums = with_points(rig)
    images = contents(rig)
    with rig.opened() as fd:
        assert os.pwrite(fd, b"preserved", 5 * MIB) == 9
        host.die()
        # Needs no copy, so it trips nothing (P2).
        assert os.pwrite(fd, b"again", 5 * MIB) == 5
        before = rig.image.read_bytes()
        code, _ = write_until_refused(fd, SIZE)
        assert code == errno.ENODEV
        all_is_refused(rig, fd)
    assert rig.image.read_bytes() == before
    assert rig.fault() == 7
    event = rig.event(86)
    assert event["errno"] == errno.EIO
    assert event["diff_area"] == str(host.place / "area")
    assert event["used"] <= event["allocated"] <= event["maximum"] == 32 * MIB
    never_wrong(rig, checksums, images)
    assert "stays offline" in vsnapfs("online", rig.directory, code=3)
    host.mend(rig)
    assert rig.fault() == 7, "only fault 1 clears itself"
    must_be_exact(rig, checksums, machine.base)
    vsnapfs("online", rig.directory)
    works_again(rig, checksums)
    rig.unmount()


def test_the_superblock_cannot_be_written(machine: Machine) -> None:
    """Fault 13: the host dies, `create` fails and takes the volume down; no point is lost."""
    host = Host(machine, 64 * MIB)
    rig = machine.rig(size=SIZE, area=32 * MIB, diff_area=host.place / "area")
    rig.mount()
    checksums = with_points(rig)
    with rig.opened() as fd:
        host.die()
        assert rig.status()["state"] == "online"
        said = vsnapfs("rp", "create", rig.directory, code=3)
        assert "superblock" in said
        all_is_refused(rig, fd)
    assert rig.fault() == 13
    assert rig.event(92)["errno"] == errno.EIO
    assert "stays offline" in vsnapfs("online", rig.directory, code=3)
    host.mend(rig)
    assert rig.fault() == 13
    must_be_exact(rig, checksums, machine.base)
    vsnapfs("online", rig.directory)
    works_again(rig, checksums)
    rig.unmount()


def test_a_dead_host_found_at_mount(machine: Machine) -> None:
    """Fault 2: the diff area cannot be read when the volume is opened; mended, online works."""
    host = Host(machine, 64 * MIB)
    rig = machine.rig(size=SIZE, area=32 * MIB, diff_area=host.place / "area")
    rig.mount()
    checksums = with_points(rig)
    rig.unmount()
    host.die()
    rig.mount()
    assert rig.fault() == 2
    assert rig.event(81)["errno"] == errno.EIO
    assert errno_of(os.open, rig.replica, os.O_RDONLY) == errno.ENODEV
    assert "DURING_ONLINE" in vsnapfs("status", rig.directory, code=3)
    assert "cannot come online" in vsnapfs("online", rig.directory, code=3)
    host.mend(rig)
    assert rig.fault() == 2, "only fault 1 clears itself"
    must_be_exact(rig, checksums, machine.base)
    vsnapfs("online", rig.directory)
    works_again(rig, checksums)
    rig.unmount()


def test_the_old_content_cannot_be_read(machine: Machine) -> None:
    """Fault 6: the replica's host dies, the first write that needs a copy takes the volume down;
    what the write buffer had acknowledged before is there when it is online again.
    """
    host = Host(machine, 64 * MIB)
    rig = machine.rig(size=SIZE, area=32 * MIB, replica=host.place / "replica")
    rig.mount()
    checksums = with_points(rig)
    with rig.opened() as fd:
        os.fsync(fd)
        host.die()
        acknowledged, code = b"", 0
        while not code:
            if len(acknowledged) == 10_000_000:
                until(lambda: rig.fault() is not None)  # or the volume's end might come first
            data = os.urandom(100_000)
            code = errno_of(os.pwrite, fd, data, len(acknowledged))
            acknowledged += b"" if code else data
        assert code == errno.ENODEV
        all_is_refused(rig, fd)
    assert rig.fault() == 6
    event = rig.event(85)
    assert (event["errno"], event["block"]) == (errno.EIO, 0)
    host.mend(rig)
    assert rig.fault() == 6
    vsnapfs("online", rig.directory)
    with rig.opened() as fd:
        assert os.pread(fd, len(acknowledged) + 1, 0)[:-1] == acknowledged
    must_be_exact(rig, checksums, machine.base)
    works_again(rig, checksums)
    rig.unmount()


def test_a_flush_of_the_replica_fails(machine: Machine) -> None:
    """Fault 13 and NTFS 140: fsync is EIO and never again a success before `online`."""
    host = Host(machine, 64 * MIB)
    rig = machine.rig(size=SIZE, area=32 * MIB, replica=host.place / "replica")
    rig.mount()
    checksums = with_points(rig)
    with rig.opened() as fd:
        os.fsync(fd)
        host.die()
        assert errno_of(os.fsync, fd) == errno.EIO
        assert errno_of(os.fsync, fd) == errno.ENODEV
        all_is_refused(rig, fd)
    assert rig.fault() == 13
    assert rig.event(92)["errno"] == errno.EIO
    assert rig.event(1060)["device"] == str(host.place / "replica")
    ids = rig.event_ids()
    assert ids.index(92) < ids.index(140)
    assert ids.count(140) == 1
    assert "stays offline" in vsnapfs("online", rig.directory, code=3)
    host.mend(rig)
    assert rig.fault() == 13
    vsnapfs("online", rig.directory)
    must_be_exact(rig, checksums, machine.base)
    works_again(rig, checksums)
    rig.unmount()


def test_a_replica_that_was_deleted(machine: Machine) -> None:
    """No flush of a file without a name is a success: fault 13, which says how to save it; put
    back in its place, nothing is lost.
    """
    rig = machine.rig(size=SIZE, area=32 * MIB)
    pid = rig.mount()
    checksums = with_points(rig)
    with rig.opened() as fd:
        os.fsync(fd)
        rig.image.unlink()
        os.pwrite(fd, b"acknowledged", 4 * MIB)
        assert errno_of(os.fsync, fd) == errno.EIO
        all_is_refused(rig, fd)
    assert rig.fault() == 13
    said = vsnapfs("status", rig.directory, code=3)
    (saving,) = re.findall(r"cp (/proc/\d+/fd/\d+) saves it", " ".join(said.split()))
    assert saving.startswith(f"/proc/{pid}/")
    assert "stays offline" in vsnapfs("online", rig.directory, code=3)
    sh("cp", "--sparse=always", saving, rig.image)
    assert "has been deleted" in vsnapfs("umount", rig.directory, code=1)
    rig.mount(accept_changed_replica=True)
    vsnapfs("online", rig.directory)
    must_be_exact(rig, checksums, machine.base)
    with rig.opened() as fd:
        assert os.pread(fd, 12, 4 * MIB) == b"acknowledged"
    works_again(rig, checksums)
    rig.unmount()


def test_an_io_error_of_the_replica_is_no_protection_fault(machine: Machine) -> None:
    """EIO and event 1050 for writes that need no copy, EIO for reads; the volume stays online."""
    host = Host(machine, 64 * MIB)
    rig = machine.rig(size=SIZE, area=32 * MIB, replica=host.place / "replica")
    rig.mount()
    checksums = with_points(rig)
    with rig.opened() as fd:
        assert os.pwrite(fd, b"preserved", 0) == 9
        os.fsync(fd)
        host.die()
        assert errno_of(os.pwrite, fd, b"x", 0) == errno.EIO
        assert errno_of(read_direct, rig.replica, 8 * MIB, MIB) == errno.EIO
        assert rig.event(1050)["errno"] == errno.EIO
        assert rig.event(1050)["offset"] == 0
    assert rig.status()["state"] == "online"
    assert rig.fault() is None
    # Closing means a flush, which fails: that is said, and the next opening checks.
    assert "not all acknowledged writes" in vsnapfs("umount", rig.directory, code=1)
    assert 1091 in rig.event_ids()
    sh("umount", host.place)
    sh("mount", host.device, host.place)
    rig.mount()
    must_be_exact(rig, checksums, machine.base)
    works_again(rig, checksums)
    rig.unmount()


def limit(pid: int, what: int, size: int) -> None:
    """Lower (or lift) a limit of another process, from a process of its own."""
    code = (
        "import resource, sys; pid, what, size = map(int, sys.argv[1:]);"
        "resource.prlimit(pid, what, (size, resource.prlimit(pid, what)[1]))"
    )
    command = [sys.executable, "-c", code, str(pid), str(what), str(size)]
    subprocess.run(command, check=True, timeout=20)


def test_a_limit_on_the_size_of_files(machine: Machine) -> None:
    """Fault 10 by RLIMIT_FSIZE: growing is EFBIG; lifted, online works."""
    rig = machine.rig(size=3 * MIB, area=64 * MIB)
    pid = rig.mount()
    model = os.urandom(3 * MIB)
    rig.write(0, model)
    rig.create_point()
    checksums = {1: sha256(rig.point(1), direct=True)}
    limit(pid, resource.RLIMIT_FSIZE, rig.status()["diff_area"]["allocated"] + 1000)
    with rig.opened() as fd:
        code = 0
        for turn in range(200):
            code = errno_of(os.pwrite, fd, os.urandom(MIB), turn % 3 * MIB)
            if code:
                break
            if turn % 3 == 2:
                number = rig.create_point()
                checksums[number] = sha256(rig.point(number), direct=True)
        assert code == errno.ENODEV
    assert rig.fault() == 10
    event = rig.event(89)
    assert event["errno"] == errno.EFBIG
    assert event["used"] <= event["allocated"] < event["maximum"]
    must_be_exact(rig, checksums, machine.base)
    limit(pid, resource.RLIMIT_FSIZE, resource.RLIM_INFINITY)
    rig.call("online")
    rig.write(0, os.urandom(3 * MIB))
    must_be_exact(rig, checksums, machine.base)
    assert rig.call("verify")["ok"]


def test_a_tmpfs_without_space(machine: Machine) -> None:
    """Fault 10 on a tmpfs of 8 MiB; made larger, online works."""
    place = machine.base / "tmpfs"
    place.mkdir()
    sh("mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", place)
    machine.later(quiet, "umount", "-l", place)
    rig = machine.rig(size=SIZE, area=64 * MIB, diff_area=place / "area")
    rig.mount()
    checksums = with_points(rig)
    with rig.opened() as fd:
        assert write_until_refused(fd, SIZE)[0] == errno.ENODEV
        all_is_refused(rig, fd)
    assert rig.fault() == 10
    assert rig.event(89)["errno"] == errno.ENOSPC
    must_be_exact(rig, checksums, machine.base)
    sh("mount", "-o", "remount,size=80m", place)
    rig.call("online")
    works_again(rig, checksums)
    rig.unmount()


def test_the_copy_buffer_cannot_be_mapped(machine: Machine) -> None:
    """Fault 5 by RLIMIT_AS: no room for the copies' buffer; points exact, lifted, online works."""
    rig = machine.rig(size=SIZE, area=32 * MIB)
    pid = rig.mount()
    model = os.urandom(SIZE)
    rig.write(0, model)
    rig.create_point()
    # Threads are there already, or the first one would be refused instead of the buffer.
    readers = [
        threading.Thread(target=read_direct, args=(rig.point(1), at * MIB, MIB)) for at in range(8)
    ]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join(30)
    (size,) = (
        int(line.split()[1]) << 10
        for line in Path(f"/proc/{pid}/status").read_text().splitlines()
        if line.startswith("VmSize")
    )
    limit(pid, resource.RLIMIT_AS, size + 3 * MIB)
    try:
        with rig.opened() as fd:
            assert errno_of(os.pwrite, fd, b"x" * 1000, 0) == errno.ENODEV
    finally:
        limit(pid, resource.RLIMIT_AS, resource.RLIM_INFINITY)
    assert rig.fault() == 5
    assert rig.event(84)["errno"] == errno.ENOMEM
    assert read_direct(rig.point(1)) == model
    assert rig.image.read_bytes() == model
    rig.call("online")
    rig.write(0, os.urandom(SIZE))
    assert read_direct(rig.point(1)) == model
    assert rig.call("verify")["ok"]
