"""The limits on real mounts: 512 points, 15 TiB, every block size, sizes that are no multiples."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from mounted_rig import KIB, MIB, Machine, Rig, errno_of, read_direct, report, sha256, vsnapfs

from vsnapfs.errors import VsnapError

pytestmark = pytest.mark.needs_fuse

TIB = 1 << 40


def resident(pid: int) -> int:
    """Bytes of memory that a process has resident."""
    text = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"^VmRSS:\s+(\d+) kB$", text, re.MULTILINE)
    assert found is not None
    return int(found[1]) * KIB


@pytest.mark.slow
def test_512_points_on_one_volume(
    machine: Machine, record_property: Callable[[str, object], None]
) -> None:
    """All 512 are exact, the 513th is refused or, by policy evict, costs the oldest (event 58)."""
    size = MIB + 1
    rig = machine.rig(size=size, area=256 * MIB)
    rig.mount()
    rng = random.Random(12)
    model = bytearray(size)
    checksums: dict[int, str] = {}
    seconds = []
    with rig.opened() as fd:
        for _ in range(512):
            for _ in range(3):
                data = rng.randbytes(rng.choice((1, 4096, 20_000)))
                offset = rng.randrange(size - len(data))
                os.pwrite(fd, data, offset)
                model[offset : offset + len(data)] = data
            started = time.monotonic()
            number = rig.create_point()
            seconds.append(time.monotonic() - started)
            checksums[number] = hashlib.sha256(model).hexdigest()
    # The faster quarter: what else the machine does meanwhile only ever makes it slower.
    first, last = (statistics.quantiles(part)[0] for part in (seconds[:64], seconds[-64:]))
    report(record_property, "creating points 449-512 / points 1-64", f"{last / first:.2f}")
    report(record_property, "creating one of the last points, ms", f"{last * 1000:.1f}")
    with pytest.raises(VsnapError, match="already has 512 recovery points") as caught:
        rig.create_point()
    assert caught.value.code == "too-many-points"
    assert caught.value.hint
    assert "512 recovery points" in vsnapfs("rp", "create", rig.directory, code=1)
    assert rig.points() == list(range(1, 513))
    for number in (1, 2, 3, 100, 255, 256, 257, 400, 510, 511, 512):
        assert sha256(rig.point(number), direct=True) == checksums[number]
    report(record_property, "server's memory with 512 points, MiB", resident(rig.pid) // MIB)
    rig.unmount()

    rig.configure(on_full="evict")
    started = time.monotonic()
    rig.mount()
    report(record_property, "mounting with 512 points, s", f"{time.monotonic() - started:.2f}")
    for number, checksum in checksums.items():
        assert sha256(rig.point(number), direct=True) == checksum, number
    assert rig.create_point() == 513
    assert rig.points() == list(range(2, 514))
    assert rig.event(58)["point"] == 1
    assert errno_of(os.open, rig.point(1), os.O_RDONLY) == errno.ENOENT
    for number in (2, 3, 512):
        assert sha256(rig.point(number), direct=True) == checksums[number]
    assert sha256(rig.point(513), direct=True) == hashlib.sha256(model).hexdigest()
    assert rig.call("verify")["ok"]


def test_a_sparse_replica_of_15_tib(
    machine: Machine, record_property: Callable[[str, object], None]
) -> None:
    """Created, mounted, written at both ends, kept by points that read right; memory stays small.

    The host file system must hold a file of 15 TiB, or the test is skipped.
    """
    size = 15 * TIB
    with (machine.base / "probe").open("wb") as probe:
        if errno_of(probe.truncate, size):
            pytest.skip("the host file system holds no file of 15 TiB")
    (machine.base / "probe").unlink()
    rig = machine.rig(size=size, area=256 * MIB)
    pid = rig.mount()
    ends = (0, size // 2 - 7, size - MIB)
    contents = {}
    with rig.opened() as fd:
        for turn in range(3):
            contents[turn] = {end: os.urandom(MIB) for end in ends}
            for end, content in contents[turn].items():
                assert os.pwrite(fd, content, end) == MIB
            assert rig.create_point() == turn + 1
        for end in ends:
            assert os.pwrite(fd, os.urandom(MIB), end) == MIB
        assert errno_of(os.pwrite, fd, b"x", size) == errno.EFBIG
        assert os.pread(fd, 10, size) == b""
    for turn, written in contents.items():
        for end, content in written.items():
            assert read_direct(rig.point(turn + 1), end, MIB) == content
        assert read_direct(rig.point(turn + 1), size // 3, MIB) == bytes(MIB)
        assert rig.point(turn + 1).stat().st_size == size
    memory = resident(pid)
    report(record_property, "server's memory at 15 TiB, MiB", memory // MIB)
    assert memory < 300 * MIB
    assert rig.call("verify")["ok"]
    rig.call("rp_restore", point=2)
    assert read_direct(rig.replica, ends[2], MIB) == contents[1][ends[2]]
    rig.unmount()
    started = time.monotonic()
    pid = rig.mount()
    report(record_property, "mounting 15 TiB, s", f"{time.monotonic() - started:.2f}")
    assert read_direct(rig.point(1), ends[2], MIB) == contents[0][ends[2]]
    assert resident(pid) < 300 * MIB


@pytest.mark.needs_loop
def test_16_tib_on_ext4_is_refused_clearly(machine: Machine) -> None:
    """A file that ext4 cannot hold: the error says so and what to do, and nothing is left."""
    host = machine.host(64 * MIB, "host", "-b", "4096")
    said = vsnapfs("create", host / "vol", "--size", "16TiB", "--diff-area-size", "16MiB", code=1)
    assert "cannot hold a file of 16.0 TiB" in said
    assert "XFS" in said
    assert os.listdir(host) == ["lost+found"]


@pytest.mark.parametrize(
    ("size", "block"),
    [
        (1, 4 * KIB),
        (511, 64 * KIB),
        (4 * KIB, 4 * KIB),
        (3 * MIB + 1, 4 * KIB),
        (3 * MIB - 1, 4 * KIB),
        (5 * 64 * KIB + 4096, 64 * KIB),
        (5 * 64 * KIB - 512, 64 * KIB),
        (7 * MIB + 777, MIB),
        (9 * MIB - 1, MIB),
    ],
)
def test_any_size_with_any_block_size(machine: Machine, size: int, block: int) -> None:
    """Random unaligned writes, points between them: all read back exactly, also after remount."""
    rig = machine.rig(size=size, area=max(64 * block, 32 * MIB), block_size=block)
    rig.mount()
    assert rig.replica.stat().st_size == size
    rng = random.Random(size ^ block)
    model = bytearray(size)
    images: dict[int, bytes] = {}
    with rig.opened() as fd:
        for _ in range(5):
            for _ in range(12):
                length = min(size, rng.choice((1, 512, 4095, 4097, block - 1, block, block + 1)))
                offset = rng.choice((0, size - length, rng.randrange(size - length + 1)))
                data = rng.randbytes(length)
                assert os.pwrite(fd, data, offset) == length
                model[offset : offset + length] = data
            images[rig.create_point()] = bytes(model)
        data = rng.randbytes(size)
        assert os.pwrite(fd, data, 0) == size
        assert os.pread(fd, size + 10, 0) == data

    def all_is_right() -> None:
        assert rig.replica.read_bytes() == data
        for number, image in images.items():
            assert read_direct(rig.point(number)) == image
            assert rig.point(number).read_bytes() == image
        assert rig.call("verify")["ok"]

    all_is_right()
    rig.unmount()
    assert rig.image.read_bytes() == data
    rig.mount()
    all_is_right()


def test_a_kill_with_large_and_small_blocks(machine: Machine) -> None:
    """What must be checked after a kill is checked for blocks of 4 KiB and of 1 MiB as well."""
    for block in (4 * KIB, MIB):
        rig = machine.rig(f"vol{block}", size=6 * MIB + 3, area=64 * MIB, block_size=block)
        rig.mount()
        _kill_in_mid_write(rig)


def _kill_in_mid_write(rig: Rig) -> None:
    first, second = os.urandom(6 * MIB + 3), os.urandom(6 * MIB + 3)
    rig.write(0, first)
    rig.create_point()
    with rig.opened() as fd:
        for offset in range(0, 4 * MIB, 100_001):
            os.pwrite(fd, second[offset : offset + 100_001], offset)
        rig.kill()
    rig.mount()
    end = offset + 100_001
    assert rig.replica.read_bytes() == second[:end] + first[end:]
    assert read_direct(rig.point(1)) == first
    assert rig.call("verify")["ok"]
