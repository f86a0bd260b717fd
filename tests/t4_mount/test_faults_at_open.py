"""Protection faults found when a volume is opened, by their real causes; files that are refused."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from mounted_rig import (
    MIB,
    Machine,
    Rig,
    alive,
    errno_of,
    quiet,
    read_direct,
    sh,
    sha256,
    until,
    vsnapfs,
    write_all,
)

from vsnapfs.daemon import mounts
from vsnapfs.diffarea.layout import SUPERBLOCK_OFFSETS, SUPERBLOCK_SIZE
from vsnapfs.diffarea.superblock import decode

pytestmark = pytest.mark.needs_fuse

SIZE = 8 * MIB + 100
CLI = (sys.executable, "-m", "vsnapfs")


def prepared(machine: Machine, name: str = "vol", **how: object) -> tuple[Rig, dict[int, str]]:
    """An unmounted volume with two points; number → sha256."""
    rig = machine.rig(name, size=SIZE, area=16 * MIB, **how)
    rig.mount()
    rng = random.Random(name)
    rig.write(0, rng.randbytes(SIZE))
    checksums = {}
    for _ in range(2):
        number = rig.create_point()
        checksums[number] = sha256(rig.point(number), direct=True)
        rig.write(rng.randrange(SIZE - 500_000), rng.randbytes(400_000))
    rig.unmount()
    return rig, checksums


def is_offline_by(rig: Rig, code: int) -> str:
    """Mounted and offline by this fault, its event logged once; what `status` says."""
    status = rig.status()
    assert status["state"] == "offline"
    assert status["fault"]["code"] == code
    assert status["fault"]["event_id"] == 79 + code
    assert errno_of(os.open, rig.replica, os.O_RDONLY) == errno.ENODEV
    assert rig.event(79 + code)["fault"] == code
    return vsnapfs("status", rig.directory, code=3)


def must_be_exact(rig: Rig, checksums: dict[int, str]) -> None:
    """Each point reads bit-exact through the mount."""
    assert rig.points() == sorted(checksums)
    for number, checksum in checksums.items():
        assert sha256(rig.point(number), direct=True) == checksum


def works(rig: Rig, checksums: dict[int, str]) -> None:
    """Online, points exact, and both stay so over a write."""
    assert rig.status()["state"] == "online"
    must_be_exact(rig, checksums)
    rig.write(0, os.urandom(MIB))
    must_be_exact(rig, checksums)
    assert rig.call("verify")["ok"]


def can_be_looked_at(machine: Machine, rig: Rig, checksums: dict[int, str]) -> None:
    """Not mounted, it lists, verifies and exports each point bit-exact, and changes nothing."""
    before = tree(rig.directory) | {"area": sha256(rig.area)}
    out = machine.base / "out.img"
    listed = json.loads(quiet(*CLI, "rp", "list", "--json", rig.directory).stdout)
    assert [point["number"] for point in listed] == sorted(checksums)
    vsnapfs("verify", rig.directory)
    for number, checksum in checksums.items():
        vsnapfs("rp", "export", "--force", rig.directory, str(number), out)
        assert sha256(out) == checksum
    assert tree(rig.directory) | {"area": sha256(rig.area)} == before


def tree(path: Path) -> dict[str, object]:
    """Names, sizes and contents of a directory, to see that nothing has changed."""
    return {
        str(file): sha256(file) for file in sorted(path.rglob("*")) if file.is_file()
    }  # fmt: skip


# ---- fault 1, event 80 --------------------------------------------------------------------------


def test_a_missing_diff_area(machine: Machine) -> None:
    """Moved away: mounted offline by fault 1 with its path; back again: online by itself."""
    rig, checksums = prepared(machine)
    aside = rig.directory / "aside"
    rig.area.rename(aside)
    said = vsnapfs("mount", rig.directory, rig.place)
    assert "is mounted on" in said
    assert "is offline by fault 1 DIFF_AREA_MISSING" in said
    assert str(rig.area) in is_offline_by(rig, 1)
    assert "diff area is not open" in vsnapfs("rp", "list", rig.directory, code=1)
    assert os.listdir(rig.place / "recovery-points") == ["by-time"]
    assert "cannot come online" in vsnapfs("online", rig.directory, code=3)
    assert "is offline" in vsnapfs("rp", "create", rig.directory, code=3)
    rig.unmount()
    # Still away: the fault is not logged again.
    rig.mount()
    is_offline_by(rig, 1)
    rig.unmount()
    aside.rename(rig.area)
    rig.mount()
    assert rig.event_ids()[-2:] == [1021, 1001]
    works(rig, checksums)
    rig.unmount()


def test_the_state_file_and_the_superblock_must_both_say_online(machine: Machine) -> None:
    """A fault survives the loss of the state file: the superblock knows it, too."""
    rig, checksums = prepared(machine)
    rig.mount()
    with rig.opened() as fd:
        rig.area.rename(rig.directory / "aside")
        assert errno_of(write_all, fd, os.urandom(SIZE)) == errno.ENODEV
    (rig.directory / "aside").rename(rig.area)
    assert rig.fault() == 14
    rig.unmount()
    (rig.directory / "state").unlink()
    told: list[str] = []
    rig.mount(warn=told.append)
    if rig.status()["state"] == "offline":  # the superblock could be written after all
        rig.call("online")
    assert any("state file" in warning for warning in told)
    must_be_exact(rig, checksums)


# ---- fault 3, event 82 --------------------------------------------------------------------------


def flip(path: Path, *offsets: int) -> None:
    """Turn one byte over at each offset."""
    with path.open("r+b") as file:
        for offset in offsets:
            file.seek(offset)
            (byte,) = file.read(1)
            file.seek(offset)
            file.write(bytes((byte ^ 0xFF,)))


def test_one_rotted_superblock_is_healed(machine: Machine) -> None:
    """A flipped byte in one copy: event 1041, everything works, both copies are good again."""
    rig, checksums = prepared(machine)
    for copy in SUPERBLOCK_OFFSETS:
        flip(rig.area, copy + 5000)
        rig.mount()
        assert rig.event_ids()[-2:] == [1041, 1001]
        works(rig, checksums)
        rig.unmount()


def test_both_superblocks_rotted(machine: Machine) -> None:
    """Flipped bytes in both: mounted offline by fault 3; giving up the points is the way out."""
    rig, checksums = prepared(machine)
    good = machine.base / "good"
    shutil.copyfile(rig.area, good)
    live = rig.image.read_bytes()
    flip(rig.area, *(copy + 5000 for copy in SUPERBLOCK_OFFSETS))
    rig.mount()
    assert "checksum" in is_offline_by(rig, 3)
    assert "cannot come online" in vsnapfs("online", rig.directory, code=3)
    rig.unmount()
    # A good copy of the very same state put back: the points are there, online is allowed.
    rotted = rig.area.read_bytes()
    shutil.copyfile(good, rig.area)
    rig.mount()
    assert rig.fault() == 3
    must_be_exact(rig, checksums)
    rig.unmount()
    rig.area.write_bytes(rotted)
    rig.mount()
    vsnapfs("online", rig.directory, "--give-up-recovery-points", "--yes")
    assert read_direct(rig.replica) == live
    assert rig.create_point() == 3
    works(rig, {3: sha256(rig.point(3), direct=True)})


def test_rot_in_one_preserved_block_harms_only_that(machine: Machine) -> None:
    """A flipped byte in a copy: EIO for its block in the points it serves, event 1040, no more."""
    rig, checksums = prepared(machine)
    rig.mount()
    images = {number: read_direct(rig.point(number)) for number in checksums}
    rig.unmount()
    content = rig.area.read_bytes()
    block = next(b for b in range(SIZE // 16384) if images[1][b * 16384 :][:16384] in content)
    where = content.index(images[1][block * 16384 :][:16384])
    flip(rig.area, where + 77)
    rig.mount()
    fd = os.open(rig.point(1), os.O_RDONLY)
    try:
        assert errno_of(os.pread, fd, 100, block * 16384) == errno.EIO
        assert os.pread(fd, 16384, (block + 200) * 16384)
    finally:
        os.close(fd)
    assert rig.event(1040)["block"] == block
    assert rig.status()["state"] == "online"
    good = [b for b in range(SIZE // 16384) if b != block]
    for number in checksums:
        for other in good:
            part = read_direct(rig.point(number), other * 16384, 16384)
            assert part == images[number][other * 16384 : (other + 1) * 16384]
    said = vsnapfs("verify", rig.directory, code=5)
    assert str(block) in said
    failed = vsnapfs("rp", "restore", rig.directory, "1", code=1)
    assert "damaged" in failed


def test_a_truncated_diff_area(machine: Machine) -> None:
    """Cut off inside its blocks: fault 3, `repair`. Inside the superblocks: refused as no area,
    with a way out that works.
    """
    rig, _ = prepared(machine)
    os.truncate(rig.area, rig.area.stat().st_size - MIB)
    rig.mount()
    assert "truncated" in is_offline_by(rig, 3)
    assert "vsnapfs repair" in vsnapfs("online", rig.directory, code=3)
    assert "reserved again" in rig.call("repair")["found"][0]["action"]
    vsnapfs("online", rig.directory)
    assert rig.status()["state"] == "online"
    rig.unmount()
    os.truncate(rig.area, 100_000)
    said = vsnapfs("mount", rig.directory, rig.place, code=1)
    assert "is no diff area: it has only 100000 bytes" in said
    assert "move away what lies there and mount" in said
    rig.area.rename(rig.area.with_name("was-cut"))
    rig.mount()
    vsnapfs("online", rig.directory, "--give-up-recovery-points", "--yes")
    assert rig.status()["state"] == "online"


# ---- fault 12, event 91 -------------------------------------------------------------------------


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a file immutable")
def test_an_immutable_diff_area(machine: Machine) -> None:
    """`chattr +i`: it cannot be opened for writing, fault 12; without it, online works."""
    rig, checksums = prepared(machine)
    if quiet("chattr", "+i", rig.area).returncode != 0:
        pytest.skip("this file system knows no immutable files")
    machine.later(quiet, "chattr", "-i", rig.area)
    rig.mount()
    assert "FILE_SYSTEM_FAILURE" in is_offline_by(rig, 12)
    assert rig.event(91)["errno"] in (errno.EPERM, errno.EACCES)
    assert "cannot come online" in vsnapfs("online", rig.directory, code=3)
    rig.unmount()
    can_be_looked_at(machine, rig, checksums)
    sh("chattr", "-i", rig.area)
    rig.mount()
    assert rig.fault() == 12, "only fault 1 clears itself"
    must_be_exact(rig, checksums)
    vsnapfs("online", rig.directory)
    works(rig, checksums)


@pytest.mark.needs_loop
def test_a_read_only_host_of_the_diff_area(machine: Machine) -> None:
    """Its file system remounted read-only: fault 12 at mount; read-write again, online works."""
    host = machine.host(48 * MIB)
    rig, checksums = prepared(machine, diff_area=host / "area")
    sh("mount", "-o", "remount,ro", host)
    rig.mount()
    is_offline_by(rig, 12)
    assert rig.event(91)["errno"] == errno.EROFS
    rig.unmount()
    can_be_looked_at(machine, rig, checksums)
    sh("mount", "-o", "remount,rw", host)
    rig.mount()
    vsnapfs("online", rig.directory)
    works(rig, checksums)
    rig.unmount()


@pytest.mark.needs_loop
def test_a_host_that_makes_itself_read_only(machine: Machine) -> None:
    """ext4 does that after an error: of a volume whose server was killed the points can be listed,
    verified and exported, nothing else is done; writable again, it is mounted with nothing lost.
    """
    host = machine.host(64 * MIB)
    device = sh("findmnt", "--noheadings", "--output", "SOURCE", host).strip()
    sh("mount", "-o", "remount,errors=remount-ro", host)
    rig = Rig(host, size=SIZE, area=16 * MIB)
    machine.rigs.append(rig)
    machine.later(rig.clean_up)
    rig.mount()
    rig.write(0, random.Random(1).randbytes(SIZE))
    checksums = {rig.create_point(): sha256(rig.point(1), direct=True)}
    with rig.opened(os.O_RDWR | os.O_DSYNC) as fd:
        write_all(fd, b"acknowledged" * 10000, MIB)
    rig.kill()
    broken = Path(f"/sys/fs/ext4/{Path(device).name}/trigger_fs_error")
    broken.write_text("1")
    can_be_looked_at(machine, rig, checksums)
    assert "is read-only now" in vsnapfs("recovery-point", "create", rig.directory, code=1)
    (status,) = json.loads(quiet(*CLI, "status", "--json", rig.directory).stdout)
    assert status["state"] == "closed"
    assert "is read-only now" in status["trouble"]
    rig.clean_up()  # the dead mount
    sh("umount", host)
    quiet("e2fsck", "-fy", device)
    sh("mount", "-o", "errors=remount-ro", device, host)
    rig.mount()
    with rig.opened() as fd:
        assert os.pread(fd, 120000, MIB) == b"acknowledged" * 10000
    works(rig, checksums)
    rig.unmount()  # cleanly closed, it cannot even be synced then
    broken.write_text("1")
    can_be_looked_at(machine, rig, checksums)


@pytest.mark.slow
@pytest.mark.needs_loop
def test_a_read_only_host_of_the_directory(machine: Machine) -> None:
    """Replica and diff area elsewhere: the points can be looked at, without a state file, too."""
    host = machine.host(48 * MIB)
    rig = Rig(
        host, size=SIZE, area=16 * MIB, replica=machine.base / "r", diff_area=machine.base / "a"
    )
    machine.rigs.append(rig)
    machine.later(rig.clean_up)
    rig.mount()
    rig.write(0, random.Random(1).randbytes(SIZE))
    checksums = {rig.create_point(): sha256(rig.point(1), direct=True)}
    rig.write(0, bytes(MIB))
    rig.unmount()
    until(lambda: not alive(rig.pid))  # it has its log there
    sh("mount", "-o", "remount,ro", host)
    can_be_looked_at(machine, rig, checksums)
    assert "is read-only now" in vsnapfs("recovery-point", "create", rig.directory, code=1)
    sh("mount", "-o", "remount,rw", host)
    (rig.directory / "state").unlink()
    sh("mount", "-o", "remount,ro", host)
    vsnapfs("rp", "export", rig.directory, "1", machine.base / "again.img")
    assert sha256(machine.base / "again.img") == checksums[1]
    assert "is read-only now" in vsnapfs("recovery-point", "create", rig.directory, code=1)
    sh("mount", "-o", "remount,rw", host)
    told: list[str] = []
    rig.mount(warn=told.append)
    assert len(told) == 1
    works(rig, checksums)
    rig.unmount()


@pytest.mark.needs_loop
def test_a_host_without_fallocate(machine: Machine) -> None:
    """Refused by create, in words; a diff area moved there meets fault 12 when it must grow."""
    host = machine.host(64 * MIB, "host", "-O", "^extents,^64bit")
    said = vsnapfs(
        "create", host / "vol", "--size", "8MiB", "--diff-area-size", "8MiB", code=1
    )  # fmt: skip
    assert "no fallocate" in said
    assert os.listdir(host) == ["lost+found"]
    rig, checksums = prepared(machine)
    shutil.copyfile(rig.area, host / "area")
    rig.area.unlink()
    rig.configure(diff_area=str(host / "area"))
    rig.call("rp_delete", point=2)  # so that there is more to copy than has room
    del checksums[2]
    rig.mount()
    with rig.opened() as fd:
        codes = {errno_of(os.pwrite, fd, os.urandom(MIB), i * MIB) for i in range(8)}
    assert codes == {0, errno.ENODEV}
    assert rig.event(91)["errno"] == errno.EOPNOTSUPP
    assert rig.fault() == 12
    must_be_exact(rig, checksums)
    rig.unmount()


# ---- fault 15, event 94 -------------------------------------------------------------------------


def test_a_diff_area_changed_behind_our_back(machine: Machine) -> None:
    """A valid superblock of another generation while serving: fault 15, nothing overwritten."""
    rig, checksums = prepared(machine)
    rig.mount()
    rig.write(0, b"in use")
    with rig.area.open("r+b") as area:
        ours = decode(area.read(SUPERBLOCK_SIZE))
        theirs = replace(ours, generation=ours.generation + 5).encode()
        for offset in SUPERBLOCK_OFFSETS:
            area.seek(offset)
            area.write(theirs)
    assert "generation" in vsnapfs("rp", "create", rig.directory, code=3)
    is_offline_by(rig, 15)
    assert rig.event(94)["errno"]
    with rig.area.open("rb") as area:
        assert area.read(SUPERBLOCK_SIZE) == theirs, "what the other one wrote was overwritten"
    assert "somebody else" in vsnapfs("online", rig.directory, code=3)
    rig.unmount()
    rig.mount()
    assert rig.fault() == 15
    must_be_exact(rig, checksums)
    vsnapfs("online", rig.directory)
    works(rig, checksums)


def test_an_old_copy_of_the_diff_area_put_back(machine: Machine) -> None:
    """A copy from before the newest changes is fault 15 at open: its points would be wrong."""
    rig, _ = prepared(machine)
    old = machine.base / "old"
    shutil.copyfile(rig.area, old)
    rig.mount()
    rig.write(0, os.urandom(MIB))
    rig.create_point()
    rig.unmount()
    with rig.area.open("r+b") as area:
        area.write(old.read_bytes())
    rig.mount()
    assert "an old copy" in is_offline_by(rig, 15)
    vsnapfs("online", rig.directory, code=3)


# ---- files that are none of ours ----------------------------------------------------------------


@pytest.mark.parametrize("what", ["another volume's", "foreign", "empty", "other version", "pipe"])
def test_what_is_not_this_volume_s_diff_area(machine: Machine, what: str) -> None:
    """Refused with the reason, exit code 1, and not one byte of anything is changed."""
    rig, checksums = prepared(machine)
    aside = machine.base / "aside"
    rig.area.rename(aside)
    if what == "another volume's":
        other, _ = prepared(machine, "other")
        shutil.copyfile(other.area, rig.area)
        reason = "of another volume"
    elif what == "foreign":
        rig.area.write_bytes(random.Random(1).randbytes(MIB))
        reason = "no vsnapfs diff area"
    elif what == "empty":
        rig.area.write_bytes(b"")
        reason = "has only 0 bytes"
    elif what == "other version":
        content = bytearray(aside.read_bytes())
        for offset in SUPERBLOCK_OFFSETS:
            content[offset + 8] = 99
        rig.area.write_bytes(content)
        reason = "format version 99"
    else:
        os.mkfifo(rig.area)
        reason = "neither a file nor a block device"
    before = tree(rig.directory)
    if what == "pipe":
        rig.mount()
        assert reason in is_offline_by(rig, 12)
        rig.unmount()
        rig.area.unlink()
    else:
        assert reason in vsnapfs("mount", rig.directory, rig.place, code=1)
        after = tree(rig.directory)
        after.pop(str(rig.directory / "server.log"), None)
        before.pop(str(rig.directory / "server.log"), None)
        assert after == before
        assert mounts.mount_of(rig.directory) is None
        assert reason in vsnapfs("rp", "list", rig.directory, code=1)
        assert tree(rig.directory) | before == tree(rig.directory)
    aside.rename(rig.area)
    rig.mount()
    if what == "pipe":
        rig.call("online")
    works(rig, checksums)


# ---- S1: one writer -----------------------------------------------------------------------------


def test_two_directories_with_one_diff_area(machine: Machine) -> None:
    """Another volume's directory that names a diff area in use is refused, in use or not."""
    rig, checksums = prepared(machine)
    other, _ = prepared(machine, "other")
    own = other.area
    other.configure(diff_area=str(rig.area))
    rig.mount()
    assert "is in use by another process" in vsnapfs("mount", other.directory, other.place, code=1)
    works(rig, checksums)
    rig.unmount()
    assert "of another volume" in vsnapfs("mount", other.directory, other.place, code=1)
    other.configure(diff_area=str(own))
    other.mount()
    assert other.status()["state"] == "online"


def test_a_copied_directory_with_the_same_replica_and_diff_area(machine: Machine) -> None:
    """A second directory naming the very same files is refused while the first is served."""
    rig, checksums = prepared(machine)
    twin = machine.base / "twin"
    twin.mkdir()
    for name in ("volume.toml", "state", "events.jsonl"):
        shutil.copy(rig.directory / name, twin / name)
    toml = (twin / "volume.toml").read_text()
    for name in ("replica.img", "diff-area"):
        assert f'"{name}"' in toml
        toml = toml.replace(f'"{name}"', f'"{rig.directory / name}"')
    (twin / "volume.toml").write_text(toml)
    place = machine.base / "twin-mnt"
    place.mkdir()
    rig.mount()
    for path in (rig.image, rig.area):
        link = machine.base / f"link to {path.name}"
        os.link(path, link)  # another name for the same file helps no more
        toml = toml.replace(str(path), str(link))
    (twin / "volume.toml").write_text(toml)
    assert "in use" in vsnapfs("mount", twin, place, code=1)
    works(rig, checksums)


# ---- block devices ------------------------------------------------------------------------------


@pytest.mark.needs_loop
def test_block_devices_as_replica_and_diff_area(machine: Machine) -> None:
    """Both on devices: create, write, points, full, delete, kill, remount; all of it exact."""
    replica, area = machine.device(8 * MIB, "r"), machine.device(4 * MIB, "a")
    rig = machine.rig(size=None, area=4 * MIB, replica=Path(replica), diff_area=Path(area))
    sizes = rig.status()["diff_area"]
    assert sizes["allocated"] <= sizes["maximum"] == 4 * MIB
    rig.mount()
    rng = random.Random(3)
    rig.write(0, rng.randbytes(8 * MIB))
    checksums = {}
    for _ in range(2):
        number = rig.create_point()
        checksums[number] = sha256(rig.point(number), direct=True)
        rig.write(rng.randrange(4 * MIB), rng.randbytes(300_000))
    with rig.opened() as fd:
        # Held by the kernel as well: nobody else may mount or claim the devices.
        for device in (replica, area):
            assert errno_of(os.open, device, os.O_RDWR | os.O_EXCL) == errno.EBUSY
        assert errno_of(write_all, fd, rng.randbytes(8 * MIB)) == errno.ENODEV
    assert rig.fault() == 8
    must_be_exact(rig, checksums)
    assert "holds only" in vsnapfs("resize", rig.directory, "--diff-area-size", "8MiB", code=2)
    rig.kill()
    rig.mount()
    assert rig.fault() == 8
    must_be_exact(rig, checksums)
    rig.call("rp_delete", point=1)
    del checksums[1]
    rig.call("online")
    rig.write(0, rng.randbytes(MIB))
    must_be_exact(rig, checksums)
    rig.call("rp_restore", point=2)
    assert sha256(rig.replica) == checksums[2]
    assert rig.call("verify")["ok"]
    rig.unmount()


@pytest.mark.needs_loop
def test_a_device_that_holds_something_or_is_in_use(machine: Machine) -> None:
    """A file system on the device needs --force; one that is mounted is refused even with it."""
    device = machine.device(16 * MIB, "d")
    sh("mkfs.ext4", "-q", device)
    command = (
        "create", machine.base / "v", "--size", "1MiB", "--diff-area-size", "8MiB",
        "--diff-area", device,
    )  # fmt: skip
    before = sha256(Path(device))
    assert "ext4" in vsnapfs(*command, code=2)
    place = machine.base / "there"
    place.mkdir()
    sh("mount", "-o", "ro,noload", device, place)
    machine.later(quiet, "umount", "-l", place)
    assert "in use" in vsnapfs(*command, "--force", code=1)
    assert sha256(Path(device)) == before
    assert not (machine.base / "v").exists()
    sh("umount", place)
    vsnapfs(*command, "--force")
    assert "online" in vsnapfs("status", machine.base / "v")
