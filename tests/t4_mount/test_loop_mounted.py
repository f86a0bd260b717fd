"""The loop on real mounts: what status says of it, and that a hammered server still answers."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
from mounted_rig import MIB, Fio, Machine, read_direct, vsnapfs

pytestmark = pytest.mark.needs_fuse

SIZE = 24 * MIB + 4096


def number(path: str) -> int | None:
    """What a file in /sys says, None if it cannot be read (no fusectl, in many containers)."""
    try:
        return int(Path(path).read_text())
    except OSError:
        return None


def test_status_shows_the_loop_and_the_kernel_s_limits(machine: Machine) -> None:
    """The loop polls; the limits are shown as they are now, in the status command and the mount."""
    rig = machine.rig(size=SIZE)
    rig.mount()
    device = os.stat(rig.place).st_dev
    fuse = rig.status()["fuse"]  # asked first: they are raised just after the mount
    read_ahead = number(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb")
    assert fuse == {
        "loop": "polling",
        "note": None,
        "max_background": number(f"/sys/fs/fuse/connections/{device}/max_background"),
        "congestion_threshold": number(f"/sys/fs/fuse/connections/{device}/congestion_threshold"),
        "read_ahead": None if read_ahead is None else read_ahead << 10,
    }
    assert fuse["read_ahead"] == MIB  # root may raise it
    assert '"loop": "polling"' in (rig.place / "status.json").read_text()
    assert "polling loop, " in vsnapfs("status", rig.directory)
    rig.unmount()
    assert "fuse" not in rig.status()


def test_the_plain_loop_serves_as_well(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the loop may not poll, pyfuse3's own does the work, and status says why."""
    monkeypatch.setenv("VSNAPFS_PLAIN_LOOP", "1")
    rig = machine.rig(size=SIZE)
    rig.mount()
    content = random.Random(1).randbytes(3 * MIB + 17)
    rig.write(4095, content)
    assert read_direct(rig.replica, 0, 4095 + len(content)) == bytes(4095) + content
    fuse = rig.status()["fuse"]
    assert (fuse["loop"], fuse["note"]) == ("plain", "VSNAPFS_PLAIN_LOOP is set")
    assert "plain loop (VSNAPFS_PLAIN_LOOP is set), " in vsnapfs("status", rig.directory)


@pytest.mark.needs_fio
@pytest.mark.parametrize("rw", ["randread", "randwrite"])
def test_commands_are_answered_while_fio_hammers(machine: Machine, rw: str) -> None:
    """Status, new points and deletions are done while two jobs at depth 32 leave no pause."""
    rig = machine.rig(size=SIZE, area=256 * MIB)
    rig.mount()
    rig.write(0, random.Random(2).randbytes(SIZE))
    fio = Fio(
        machine.base,
        filename=rig.replica,
        size=SIZE,
        rw=rw,
        bs="4k",
        direct=1,
        ioengine="libaio",
        iodepth=32,
        numjobs=2,
        time_based=1,
        runtime=60,
    )
    try:
        for _ in range(5):
            taken = rig.create_point()
            for _ in range(5):
                assert rig.status()["recovery_points"] == 1
            rig.call("rp_delete", point=taken, force=False)
        assert fio.running, "the commands waited for fio to end"
    finally:
        fio.kill()
