"""fio's own verification on real mounts, and recovery points taken under its load."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from mounted_rig import (
    MIB,
    Fio,
    Machine,
    Rig,
    fio_must_succeed,
    read_direct,
    report,
    sha256,
    until,
)
from stamps import Stamper, nasty_extents

pytestmark = [pytest.mark.needs_fuse, pytest.mark.needs_fio]

# Every block verified by checksum, position and pattern; the first error ends it.
VERIFY = {
    "ioengine": "libaio",
    "direct": 1,
    "iodepth": 32,
    "rw": "randwrite",
    "verify": "xxhash",
    "verify_fatal": 1,
    "end_fsync": 1,
}


def verified_with_points_meanwhile(
    machine: Machine, rig: Rig, seed: int, **job: object
) -> tuple[int, dict[int, str]]:
    """Run fio's verification, and create points as long as it runs.

    Twice, and again until four points were answered while fio was running: which of the two is the
    faster is up to the machine. Returns the bytes verified, and of each point number → sha256 right
    after creation, read directly.
    """
    total, meanwhile, taken = 0, 0, {}
    for turn in range(8):
        fio = Fio(machine.base, f"turn{turn}", randseed=seed + turn, **job, **VERIFY)
        machine.later(fio.kill)
        # Not more: the area must hold what all of them keep.
        for _ in range(4):
            if not fio.running:
                break
            number = rig.create_point()
            meanwhile += fio.running
            taken[number] = sha256(rig.point(number), direct=True)
            time.sleep(0.2)
        total += fio_must_succeed(fio.end(), 90 * MIB)
        if turn >= 1 and meanwhile >= 4:
            break
    assert meanwhile >= 4
    return total, taken


def must_be_unchanged(rig: Rig, taken: dict[int, str]) -> None:
    """Each point still has the checksum it had; past the page cache and through it."""
    for number, checksum in taken.items():
        assert sha256(rig.point(number), direct=True) == checksum, f"point {number} has changed"
        assert sha256(rig.point(number)) == checksum, f"point {number}, through the page cache"


def test_random_writes_on_the_file_verify_with_points_meanwhile(
    machine: Machine, record_property: Callable[[str, object], None]
) -> None:
    """Unaligned writes of 512 B to 256 KiB at depth 32 read back; points keep their checksum."""
    size = 96 * MIB + 4096 + 513
    rig = machine.rig(size=size, area=2048 * MIB)
    rig.mount()
    total, taken = verified_with_points_meanwhile(
        machine, rig, 1, filename=rig.replica, size=size, bsrange="512-256k", bs_unaligned=1
    )
    must_be_unchanged(rig, taken)
    assert rig.call("verify")["ok"]
    report(record_property, "bytes verified by fio on the file", total)
    rig.unmount()
    rig.mount()
    must_be_unchanged(rig, taken)


@pytest.mark.needs_loop
def test_random_writes_on_the_loop_device_verify_with_points_meanwhile(
    machine: Machine, record_property: Callable[[str, object], None]
) -> None:
    """The same over a loop device in multiples of its sector: no error, points keep theirs."""
    rig = machine.rig(size=96 * MIB, area=2048 * MIB)
    rig.mount()
    device = rig.attach()
    total, taken = verified_with_points_meanwhile(
        machine, rig, 11, filename=device, bsrange="512-256k"
    )
    must_be_unchanged(rig, taken)
    assert rig.call("verify")["ok"]
    report(record_property, "bytes verified by fio on the loop device", total)
    rig.detach()


def test_a_point_taken_while_fio_is_paused_is_a_copy_of_the_replica(machine: Machine) -> None:
    """With nothing under way a point's sha256 is that of a plain copy, also at the end of it."""
    rig = machine.rig(size=48 * MIB + 777, area=1024 * MIB)
    rig.mount()
    job = Fio(
        machine.base,
        filename=rig.replica,
        size=48 * MIB,
        bsrange="512-128k",
        bs_unaligned=1,
        rw="randwrite",
        ioengine="libaio",
        direct=1,
        iodepth=32,
        time_based=1,
        runtime=60,
    )
    machine.later(job.kill)
    copies: dict[int, Path] = {}
    until(lambda: rig.image.stat().st_blocks > 0)
    for turn in range(4):
        before = rig.status()["diff_area"]["used"]
        # Something has been overwritten since the last point, if there was one.
        until(lambda before=before: not copies or rig.status()["diff_area"]["used"] > before)
        with job.paused():
            number = rig.create_point()
            copies[number] = machine.base / f"copy{turn}"
            shutil.copyfile(rig.replica, copies[number])
    assert job.running
    job.kill()
    checksums = {number: sha256(copy) for number, copy in copies.items()}
    assert len(set(checksums.values())) == 4, "fio wrote nothing in between"
    must_be_unchanged(rig, checksums)


@pytest.mark.parametrize("over", ["file", pytest.param("loop", marks=pytest.mark.needs_loop)])
def test_a_point_holds_all_acknowledged_before_and_nothing_issued_after(
    machine: Machine, record_property: Callable[[str, object], None], over: str
) -> None:
    """Eight threads stamping: each point is a state between the call of create and its answer."""
    rng = random.Random(5)
    if over == "file":
        size, unit, largest = 24 * MIB + 1234, 1, 300_000
    else:
        # A device may divide a request that is larger than it likes.
        size, unit, largest = 24 * MIB, 512, 65536
    rig = machine.rig(size=size, area=1024 * MIB)
    rig.mount()
    path = rig.replica if over == "file" else Path(rig.attach())
    extents = nasty_extents(0, size, rng, largest, unit)
    stamper = Stamper(path, extents, 8, seed=6, direct=over == "loop")
    stamper.start(bytes(size))
    machine.later(stamper.stop)
    taken = []
    for _ in range(8):
        time.sleep(rng.uniform(0.1, 0.5))
        called = stamper.tick()
        number = rig.create_point()
        taken.append((number, called, stamper.tick()))
    time.sleep(0.3)
    stamper.stop()
    assert stamper.failures == []
    held = [
        stamper.check(read_direct(rig.point(number)), called, answered)
        for number, called, answered in taken
    ]
    assert held == sorted(held)
    assert held[0] < held[-1]
    now = stamper.tick()
    assert stamper.check(read_direct(rig.replica), now, now) == stamper.acknowledged
    report(record_property, f"writes of the stamping writer over the {over}", stamper.acknowledged)
    rig.detach()


def test_the_stamping_writer_finds_what_it_is_there_to_find(tmp_path: Path) -> None:
    """An image with a write too many, too few, torn or out of order is told from a right one."""
    file = tmp_path / "plain"
    extents = nasty_extents(0, MIB, random.Random(1), 9000)
    file.write_bytes(bytes(MIB))
    stamper = Stamper(file, extents, 2, seed=2)
    stamper.start(bytes(MIB))
    until(lambda: all(len(log.writes) > 100 for log in stamper._logs))
    stamper.stop()
    before = stamper.tick()
    good = file.read_bytes()
    assert stamper.check(good, before, before) == stamper.acknowledged > 0

    def refused(image: bytes, holds: int, lacks: int) -> str:
        with pytest.raises(AssertionError) as caught:
            stamper.check(image, holds, lacks)
        return str(caught.value)

    assert "issued after" in refused(good, 0, 5)
    assert "acknowledged writes are missing" in refused(bytes(MIB), before, before)
    last = stamper._logs[0].writes[-2].extent
    where = next(extent for extent in extents if extent.number == last)
    lost = bytearray(good)
    lost[where.offset : where.offset + where.length] = bytes(where.length)
    assert "should hold" in refused(bytes(lost), 0, before)
    torn = bytearray(good)
    torn[where.offset + where.length - 1] ^= 1
    assert "should hold" in refused(bytes(torn), 0, before)
    shown = good[where.offset : where.offset + where.length]
    assert shown.startswith(b"a stamp\0")
