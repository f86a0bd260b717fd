"""Protection faults by their real causes while a volume is served: full, out of space, gone."""

from __future__ import annotations

import errno
import os
import random
import time
from pathlib import Path

import pytest
from mounted_rig import (
    KIB,
    MIB,
    Fio,
    Machine,
    Rig,
    errno_of,
    fill,
    quiet,
    read_direct,
    sh,
    sha256,
    until,
    vsnapfs,
)

from vsnapfs.errors import VsnapError

pytestmark = pytest.mark.needs_fuse

SIZE = 16 * MIB + 100


def with_points(rig: Rig, count: int = 2) -> dict[int, str]:
    """Fill a mounted volume with noise and take points of it; number → sha256."""
    rng = random.Random(4)
    size = rig.status()["replica"]["size"]
    rig.write(0, rng.randbytes(size))
    checksums = {}
    for turn in range(count):
        if turn:
            rig.write(rng.randrange(size - 300_000), rng.randbytes(200_000))
        number = rig.create_point()
        checksums[number] = sha256(rig.point(number), direct=True)
    return checksums


def must_be_exact(rig: Rig, checksums: dict[int, str], work: Path) -> None:
    """Each point reads bit-exact through the mount, and exports so."""
    assert rig.points() == sorted(checksums), (rig.status(), rig.events()[-6:])
    for number, checksum in checksums.items():
        assert sha256(rig.point(number), direct=True) == checksum
    number = min(checksums)
    vsnapfs("rp", "export", rig.directory, str(number), work / "export.img", "--force")
    assert sha256(work / "export.img") == checksums[number]


def write_until_refused(fd: int, size: int, step: int = 100_000) -> tuple[int, int]:
    """Overwrite from the start on until it fails: (errno, offset).

    The write buffer may acknowledge as much as it holds before the first copy has failed; so from
    the end it begins again, for a minute.
    """
    end = time.monotonic() + 60
    while time.monotonic() < end:
        for offset in range(0, size - step, step):
            code = errno_of(os.pwrite, fd, os.urandom(step), offset)
            if code:
                return code, offset
    raise AssertionError("nothing was refused")


def all_is_refused(rig: Rig, fd: int) -> None:
    """Every kind of I/O on the replica, by the old handle and a new one: ENODEV."""
    for _ in range(2):
        assert errno_of(os.pread, fd, 100, 0) == errno.ENODEV
        assert errno_of(os.pread, fd, 100, 5 * MIB) == errno.ENODEV
        assert errno_of(os.pwrite, fd, b"x", 0) == errno.ENODEV
        assert errno_of(os.fsync, fd) == errno.ENODEV
        assert errno_of(os.open, rig.replica, os.O_RDONLY) == errno.ENODEV
        assert errno_of(os.open, rig.replica, os.O_RDWR) == errno.ENODEV


def works_again(rig: Rig, checksums: dict[int, str]) -> None:
    """Online, a new handle writes and reads, and new points can be taken."""
    assert rig.status()["state"] == "online"
    rig.write(3 * MIB, b"works again" * 10_000)
    number = rig.create_point()
    rig.write(3 * MIB, b"and goes on" * 10_000)
    assert read_direct(rig.point(number), 3 * MIB, 11) == b"works again"
    for number, checksum in checksums.items():
        assert sha256(rig.point(number), direct=True) == checksum
    assert rig.call("verify")["ok"]


# ---- fault 8, event 87 --------------------------------------------------------------------------


def test_a_full_diff_area(machine: Machine) -> None:
    """The write that cannot be preserved and all I/O after it: ENODEV; points exact; a way out."""
    rig = machine.rig(size=SIZE, area=4 * MIB)
    rig.mount()
    checksums = with_points(rig)
    with rig.opened() as old:
        code, offset = write_until_refused(old, SIZE)
        assert code == errno.ENODEV
        rig.carried_out()
        host = rig.image.read_bytes()
        assert errno_of(os.pwrite, old, b"x" * 100_000, offset) == errno.ENODEV
        all_is_refused(rig, old)
        assert rig.image.read_bytes() == host, "a refused write has moved bytes"
        fault, area = rig.status()["fault"], rig.status()["diff_area"]
        assert (fault["code"], fault["name"], fault["event_id"]) == (8, "DIFF_AREA_FULL", 87)
        assert (fault["offset"], fault["length"]) == (offset, 100_000)
        assert offset // 16384 <= fault["block"] <= (offset + 100_000) // 16384
        event = rig.event(87)
        for key in ("used", "allocated", "maximum"):
            assert event[key] == fault[key] == area[key]
        assert event["maximum"] == 4 * MIB
        assert event["used"] > 4 * MIB - 256 * KIB
        assert event["diff_area"] == str(rig.area)
        assert rig.area.stat().st_size == area["allocated"]
        assert "DIFF_AREA_FULL" in vsnapfs("status", rig.directory, code=3)
        assert "87" in vsnapfs("events", rig.directory, "--json")
        must_be_exact(rig, checksums, machine.base)
        assert "is offline" in vsnapfs("rp", "create", rig.directory, code=3)
        assert "is offline" in vsnapfs("rp", "restore", rig.directory, "1", code=3)
        assert rig.call("verify")["ok"]

        # Online alone enlarges nothing: it says so, and the next copy faults again.
        assert "would still not fit" in vsnapfs("online", rig.directory)
        with rig.opened() as new:
            assert errno_of(os.pwrite, new, b"x" * 100_000, offset) == errno.ENODEV
        assert rig.event_ids().count(87) == 2

        assert "still offline" in vsnapfs("resize", rig.directory, "--diff-area-size", "64MiB")
        assert "would still not" not in vsnapfs("online", rig.directory)
        with rig.opened() as new:
            assert os.pwrite(new, b"x" * 100_000, offset) == 100_000
        # Who missed a write stays out: a file system must be mounted afresh.
        assert errno_of(os.pread, old, 100, 0) == errno.ENODEV
        assert errno_of(os.pwrite, old, b"x", 0) == errno.ENODEV
        assert errno_of(os.fsync, old) == errno.ENODEV
    works_again(rig, checksums)


def test_deleting_a_point_is_a_way_out_of_a_full_area(machine: Machine) -> None:
    """On a full area a point can be deleted; then online, and the write that faulted fits."""
    rig = machine.rig(size=SIZE, area=4 * MIB)
    rig.mount()
    checksums = with_points(rig)
    rig.write(0, os.urandom(1_500_000))
    rig.call("rp_delete", point=2)
    del checksums[2]
    number = rig.create_point()
    checksums[number] = sha256(rig.point(number), direct=True)
    with rig.opened() as fd:
        code, offset = write_until_refused(fd, SIZE)
    assert code == errno.ENODEV
    used = rig.status()["diff_area"]["used"]
    vsnapfs("rp", "delete", rig.directory, "oldest")
    del checksums[1]
    assert rig.status()["diff_area"]["used"] < used
    assert "would still not" not in vsnapfs("online", rig.directory)
    rig.write(offset, b"x" * 100_000)
    must_be_exact(rig, checksums, machine.base)


def test_a_fault_outlasts_unmount_and_kill(machine: Machine) -> None:
    """Offline is offline after unmounting and after SIGKILL; points are read, nothing else."""
    rig = machine.rig(size=SIZE, area=4 * MIB)
    rig.mount()
    checksums = with_points(rig)
    with rig.opened() as fd:
        write_until_refused(fd, SIZE)
        rig.kill()  # at once after the answer: the fault was durable before it
    for turn in range(3):
        rig.mount()
        status = rig.status()
        assert (status["state"], status["fault"]["code"]) == ("offline", 8)
        assert errno_of(os.open, rig.replica, os.O_RDONLY) == errno.ENODEV
        assert rig.replica.stat().st_size == SIZE
        must_be_exact(rig, checksums, machine.base)
        rig.kill() if turn == 1 else rig.unmount()
        if turn != 1:
            assert "DIFF_AREA_FULL" in vsnapfs("status", rig.directory, code=3)
    assert rig.event_ids().count(87) == 1
    rig.call("resize", total=64 * MIB)
    rig.call("online")
    rig.mount()
    works_again(rig, checksums)


def device_is_dead(device: str) -> bool:
    """Whether reads say "no such device", after an EIO if there are pages that were not written."""
    said = [errno_of(read_direct, Path(device), 50 * MIB, 4096) for _ in range(3)]
    return 0 not in said and said[-1] == errno.ENODEV


@pytest.mark.needs_loop
@pytest.mark.needs_fio
def test_the_whole_way_with_ext4_on_the_loop_device(machine: Machine) -> None:
    """The area is filled by fio on ext4: 87, then NTFS 140 once; extend, online, attach anew."""
    rig = machine.rig(size=64 * MIB, area=12 * MIB)
    rig.mount()
    files = machine.base / "files"
    files.mkdir()
    old = rig.attach()
    sh("mkfs.ext4", "-q", "-E", "lazy_itable_init=0,lazy_journal_init=0,nodiscard", old)
    # commit=60: should ext4 write its journal between the refused write and fio's next flush, it
    # gives up before that, and no flush reaches the device.
    sh("mount", "-o", "commit=60", old, files)
    (files / "letter").write_text("kept by the point")
    data = {"filename": files / "data", "size": "32M"}
    laid_out = Fio(machine.base, rw="write", bs="1M", end_fsync=1, **data)
    assert laid_out.end()["error"] == 0
    sh("sync", "-f", files)
    checksums = {rig.create_point(): ""}
    checksums[1] = sha256(rig.point(1), direct=True)
    # Goes on after refused writes, as a file system does, and flushes now and then.
    job = Fio(
        machine.base, "overwrite", rw="randwrite", bs="16k", direct=1, ioengine="libaio",
        iodepth=16, fdatasync=64, ignore_error=",ENODEV", **data,
    )  # fmt: skip
    machine.later(job.kill)
    assert job.end()["error"] != 0
    assert rig.fault() == 8
    until(lambda: 140 in rig.event_ids())
    ids = rig.event_ids()
    assert ids.index(87) < ids.index(140)
    assert rig.event(140)["device"]
    assert rig.event(87)["maximum"] == 12 * MIB
    before = rig.status()["flush_failures"]
    fd = os.open(old, os.O_RDWR | os.O_DIRECT)
    try:
        assert device_is_dead(old)
        for _ in range(2):  # the first one may only tell of a page that could not be written
            assert errno_of(os.fsync, fd) in (errno.ENODEV, errno.EIO)
        # ext4 gives up: no file can be changed any more.
        failed = quiet("sh", "-c", f"echo x > {files}/new && sync -f {files}")
        assert failed.returncode != 0
        assert rig.status()["flush_failures"] > before
        assert rig.event_ids().count(140) == 1
        must_be_exact(rig, checksums, machine.base)
        vsnapfs("resize", rig.directory, "--diff-area-size", "256MiB")
        vsnapfs("online", rig.directory)
        # Online, but not for the device that missed a write, nor for what is mounted on it.
        assert device_is_dead(old)
        assert quiet("sh", "-c", f"echo x > {files}/new && sync -f {files}").returncode != 0
        assert "attached already" in vsnapfs("attach", rig.directory, code=1)
    finally:
        os.close(fd)
    sh("umount", files)
    vsnapfs("detach", rig.directory)
    device = vsnapfs("attach", rig.directory).strip()
    sh("mount", device, files)
    assert (files / "letter").read_text() == "kept by the point"
    (files / "new").write_text("works again")
    sh("umount", files)
    assert quiet("fsck.ext4", "-f", "-y", device).returncode in (0, 1)
    vsnapfs("detach", rig.directory)
    must_be_exact(rig, checksums, machine.base)


# ---- fault 10, event 89; fault 9, event 88 ------------------------------------------------------


@pytest.mark.needs_loop
def test_a_host_without_space_for_the_diff_area(machine: Machine) -> None:
    """The diff area's host runs full by something else: fault 10; free space, online, goes on."""
    host = machine.host(96 * MIB)
    rig = machine.rig(size=64 * MIB, area=256 * MIB, diff_area=host / "area")
    rig.mount()
    rig.write(0, os.urandom(64 * MIB))
    checksums = {rig.create_point(): ""}
    checksums[1] = sha256(rig.point(1), direct=True)
    assert fill(host / "something else") > MIB
    with rig.opened() as fd:
        code, _ = write_until_refused(fd, 64 * MIB)
        assert code == errno.ENODEV
        all_is_refused(rig, fd)
    event = rig.event(89)
    assert event["errno"] == errno.ENOSPC
    assert event["used"] <= event["allocated"] < event["maximum"] == 256 * MIB
    assert event["diff_area"] == str(host / "area")
    assert rig.fault() == 10
    must_be_exact(rig, checksums, machine.base)
    # Whoever comes online without having made room meets the fault again.
    rig.call("online")
    with rig.opened() as fd:
        write_until_refused(fd, 64 * MIB)
    assert rig.event_ids().count(89) == 2
    (host / "something else").unlink()
    rig.call("online")
    with rig.opened() as fd:
        for offset in range(0, 64 * MIB, MIB):
            os.pwrite(fd, bytes(MIB), offset)
    sizes = rig.status()["diff_area"]
    assert (host / "area").stat().st_blocks * 512 >= sizes["allocated"] > event["allocated"]
    works_again(rig, checksums)


@pytest.mark.needs_loop
@pytest.mark.needs_fio
def test_growing_that_takes_too_long(machine: Machine) -> None:
    """A host that stalls while the area must grow: after grow-timeout fault 9, points exact."""
    host = machine.host(128 * MIB)
    rig = machine.rig(size=SIZE, area=64 * MIB, diff_area=host / "area")
    rig.configure(grow_timeout=0.3, zero_blocks="copy")
    rig.mount()
    checksums = with_points(rig, 1)
    # The first write that needs a copy makes the write buffer and has the superblock name it.
    rig.write(0, b"x")
    rig.carried_out()
    sh("fsfreeze", "--freeze", host)
    machine.later(quiet, "fsfreeze", "--unfreeze", host)
    # Many at one time: one write takes the last free slots, the next one waits for growth.
    job = Fio(
        machine.base, filename=rig.replica, size=16 * MIB, rw="write", bs="1M", direct=1,
        ioengine="libaio", iodepth=16,
    )  # fmt: skip
    machine.later(job.kill)
    until(lambda: 88 in rig.event_ids())
    sh("fsfreeze", "--unfreeze", host)
    assert job.end()["error"] == errno.ENODEV
    assert rig.fault() == 9
    assert "0.3 s" in rig.event(88)["reason"]
    must_be_exact(rig, checksums, machine.base)
    rig.call("online")
    works_again(rig, checksums)


# ---- fault 14, event 93 -------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["unlinked", "renamed", "replaced"])
def test_a_diff_area_that_is_taken_away(machine: Machine, how: str) -> None:
    """Gone while serving: fault 14, points exact from the open file; online only if it is back."""
    rig = machine.rig(size=SIZE, area=32 * MIB)
    rig.mount()
    checksums = with_points(rig)
    path, aside = rig.area, rig.directory / "aside"
    if how == "unlinked":
        path.unlink()
    else:
        path.rename(aside)
    if how == "replaced":
        path.write_bytes(bytes(MIB))
    # A read, and a write to a block already preserved, need no copy and trip nothing.
    with rig.opened() as fd:
        assert len(os.pread(fd, MIB, 0)) == MIB
        assert rig.status()["state"] == "online"
        code, _ = write_until_refused(fd, SIZE)
        assert code == errno.ENODEV
        all_is_refused(rig, fd)
    event = rig.event(93)
    assert event["diff_area"] == str(path)
    assert event["maximum"] == 32 * MIB
    assert rig.fault() == 14
    must_be_exact(rig, checksums, machine.base)
    assert "stays offline" in vsnapfs("online", rig.directory, code=3)
    assert rig.fault() == 14
    if how == "unlinked":
        said = vsnapfs("online", rig.directory, "--give-up-recovery-points", "--yes")
        assert "given up" in said
        assert rig.points() == []
        assert rig.event(1022)["count"] == 2
        assert path.stat().st_size == rig.status()["diff_area"]["allocated"]
        rig.write(0, b"works again")
        assert rig.create_point() == 3, "numbers are never used twice"
        return
    if how == "replaced":
        said = vsnapfs("online", rig.directory, "--give-up-recovery-points", "--yes", code=1)
        assert "not the diff area of" in said
        must_be_exact(rig, checksums, machine.base)  # Nothing was given up.
        path.unlink()
    aside.rename(path)
    vsnapfs("online", rig.directory)
    works_again(rig, checksums)


@pytest.mark.needs_loop
@pytest.mark.parametrize("way_out", ["mounted again", "given up"])
def test_the_diff_area_s_file_system_is_unmounted(machine: Machine, way_out: str) -> None:
    """Unmounted lazily while serving: fault 14, points exact; mounted again, online works."""
    host = machine.host(48 * MIB)
    rig = machine.rig(size=SIZE, area=32 * MIB, diff_area=host / "area")
    rig.mount()
    checksums = with_points(rig)
    device = sh("findmnt", "--noheadings", "--output", "SOURCE", host).strip()
    sh("umount", "--lazy", host)
    with rig.opened() as fd:
        assert write_until_refused(fd, SIZE)[0] == errno.ENODEV
        all_is_refused(rig, fd)
    assert rig.event(93)["diff_area"] == str(host / "area")
    must_be_exact(rig, checksums, machine.base)
    assert "stays offline" in vsnapfs("online", rig.directory, code=3)
    if way_out == "mounted again":
        sh("mount", device, host)
        vsnapfs("online", rig.directory)
        works_again(rig, checksums)
    else:
        said = vsnapfs("online", rig.directory, "--give-up-recovery-points", code=1)
        assert "nothing was changed" in said
        assert rig.points() == [1, 2]
        vsnapfs("online", rig.directory, "--give-up-recovery-points", "--yes")
        assert rig.points() == []
        works_again(rig, {})
        assert (host / "area").exists(), "made where the path now leads"
    rig.unmount()


# ---- no protection fault ------------------------------------------------------------------------


@pytest.mark.needs_loop
def test_a_full_host_under_the_replica_is_no_protection_fault(machine: Machine) -> None:
    """A hole that the host cannot fill: ENOSPC and event 1050, nothing moved, the volume is up."""
    host = machine.host(48 * MIB)
    rig = machine.rig(size=200 * MIB, area=32 * MIB, replica=host / "replica")
    rig.mount()
    rig.write(0, b"old" * 1000)
    rig.create_point()
    fill(host / "something else")
    with rig.opened() as fd:
        assert errno_of(os.pwrite, fd, b"x" * 500_000, 100 * MIB) == errno.ENOSPC
        assert rig.event(1050)["errno"] == errno.ENOSPC
        assert rig.status()["state"] == "online"
        assert rig.fault() is None
        assert os.pread(fd, 500_000, 100 * MIB) == bytes(500_000)
        assert os.pwrite(fd, b"new" * 1000, 0) == 3000
        (host / "something else").unlink()
        assert os.pwrite(fd, b"x" * 500_000, 100 * MIB) == 500_000
        os.fsync(fd)
    assert read_direct(rig.point(1), 0, 3000) == b"old" * 1000
    assert read_direct(rig.point(1), 100 * MIB, 500_000) == bytes(500_000)
    rig.unmount()


def test_policy_evict_gives_up_the_oldest_points(machine: Machine) -> None:
    """No write fails; the oldest points go, event 33 each; whoever reads one gets ESTALE."""
    rig = machine.rig(size=SIZE, area=8 * MIB, on_full="evict")
    rig.mount()
    rng = random.Random(9)
    rig.write(0, rng.randbytes(SIZE))
    checksums: dict[int, str] = {}
    with rig.opened() as fd:
        for turn in range(12):
            number = rig.create_point()
            if turn == 0:
                reader = os.open(rig.point(1), os.O_RDONLY | os.O_DIRECT)
                assert len(os.read(reader, 4096)) == 4096
            checksums[number] = sha256(rig.point(number), direct=True)
            for _ in range(6):
                assert os.pwrite(fd, rng.randbytes(200_000), rng.randrange(SIZE - 200_000))
    left = rig.points()
    assert 0 < len(left) < 12
    assert left == list(range(13 - len(left), 13)), "the oldest go first"
    evicted = [event["params"] for event in rig.events() if event["event_id"] == 33]
    assert [event["point"] for event in evicted] == list(range(1, left[0]))
    assert all(event["maximum"] == 8 * MIB for event in evicted)
    try:
        assert errno_of(os.pread, reader, 4096, 0) == errno.ESTALE
    finally:
        os.close(reader)
    assert errno_of(os.open, rig.point(1), os.O_RDONLY) == errno.ENOENT
    for number in left:
        assert sha256(rig.point(number), direct=True) == checksums[number]
    assert rig.fault() is None
    assert rig.call("verify")["ok"]
    # A write that does not fit even without any point: the points go, the write goes through.
    rig.write(0, rng.randbytes(SIZE))
    assert rig.points() == []
    with pytest.raises(VsnapError):
        rig.call("rp_resolve", point="latest")


@pytest.mark.parametrize("when", ["in use", "before the first copy"])
def test_policy_evict_goes_on_without_its_diff_area(machine: Machine, when: str) -> None:
    """With evict a diff area that is taken away costs all points (event 14), but no write. A new
    point is refused, with the way to a new area, which works.
    """
    rig = machine.rig(size=SIZE, area=8 * MIB, on_full="evict")
    rig.mount()
    with_points(rig, 3)
    if when == "before the first copy":
        # Mounted anew, so that the next write makes the write buffer.
        rig.unmount()
        rig.mount()
        assert rig.create_point() == 4
        vsnapfs("recovery-point", "delete", rig.directory, "4")
    rig.area.unlink()
    rig.write(0, os.urandom(2 * MIB))
    rig.carried_out()
    assert rig.points() == []
    assert rig.event(14)["count"] == 3
    assert rig.fault() is None
    rig.write(MIB, os.urandom(SIZE - MIB))
    for _ in range(2):
        said = vsnapfs("recovery-point", "create", rig.directory, code=1)
        assert "no recovery point was taken" in said
        assert "online --give-up-recovery-points" in said
        assert rig.status()["state"] == "online"
    assert "no recovery point can be made" in vsnapfs("status", rig.directory)
    vsnapfs("offline", rig.directory)
    vsnapfs("online", rig.directory, "--give-up-recovery-points", "--yes")
    assert rig.status()["trouble"] is None
    content = os.urandom(SIZE)
    rig.write(0, content)
    number = rig.create_point()
    assert number > 3, "numbers are never used twice"
    rig.write(0, b"new")
    assert read_direct(rig.point(number)) == content
    rig.unmount()
    rig.mount()
    assert rig.points() == [number]
    assert read_direct(rig.point(number)) == content
    assert rig.fault() is None
