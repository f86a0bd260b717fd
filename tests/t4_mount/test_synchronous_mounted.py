"""O_SYNC and O_DSYNC on a real mount: the server's system calls say what was on the disk when."""

from __future__ import annotations

import errno
import os

import pytest
from mounted_rig import MIB, Machine, errno_of
from strace import Call, traced

pytestmark = [pytest.mark.needs_fuse, pytest.mark.needs_strace]
CALLS = "trace=read,write,writev,fdatasync,pwrite64"


def durable_at(calls: list[Call], image: str) -> list[str]:
    """What happened to the replica between a write's arrival and its answer, in order."""
    names = [call.name for call in calls if call.file == image and call.result >= 0]
    return [name for name in names if name in ("pwrite64", "fdatasync")]


@pytest.mark.parametrize("points", [0, 1])
def test_a_synchronous_write_is_answered_after_the_replica_s_sync(
    machine: Machine, points: int
) -> None:
    """W4: with O_DSYNC or O_SYNC the write reaches the replica, the replica is synced, and then the
    kernel gets its answer; without either no sync is waited for.
    """
    rig = machine.rig()
    pid = rig.mount()
    rig.write(0, b"x" * MIB)
    for _ in range(points):
        rig.create_point()
    flags = [0, os.O_DSYNC, os.O_SYNC, 0, os.O_DSYNC | os.O_DIRECT]
    with traced(pid, machine.base / "calls", "-e", CALLS) as trace:
        for number, flag in enumerate(flags):
            with rig.opened(os.O_RDWR | (flag & ~os.O_DIRECT)) as fd:
                assert os.pwrite(fd, b"y" * 4096, number * 65536) == 4096
    writes = trace.writes()
    assert len(writes) == len(flags)
    for flag, calls in zip(flags, writes, strict=True):
        done = durable_at(calls, str(rig.image))
        if flag:
            assert "pwrite64" in done
            assert "fdatasync" in done[done.index("pwrite64") :]
        else:
            assert "fdatasync" not in done
    rig.unmount()


def test_a_synchronous_write_learns_that_the_disk_refused_the_sync(machine: Machine) -> None:
    """A failing fdatasync of the replica is the writer's EIO, fault 13 and the NTFS 140 event; a
    write that asked for no sync goes through.
    """
    rig = machine.rig()
    pid = rig.mount()
    rig.write(0, b"x" * MIB)
    rig.create_point()
    failing = ("-P", str(rig.image), "-e", "trace=fdatasync", "-e", "inject=fdatasync:error=EIO")
    with traced(pid, machine.base / "calls", *failing) as trace:
        with rig.opened() as fd:
            assert os.pwrite(fd, b"y", 0) == 1
        with rig.opened(os.O_RDWR | os.O_DSYNC) as fd:
            assert errno_of(os.pwrite, fd, b"z", 1) == errno.EIO
            assert errno_of(os.pwrite, fd, b"z", 1) == errno.ENODEV
    assert [call.result for call in trace.calls if call.name == "fdatasync"] == [-1]
    assert rig.fault() == 13
    assert {92, 140, 1060} <= set(rig.event_ids())
    rig.call("online")
    with rig.opened(os.O_RDWR | os.O_DSYNC) as fd:
        assert os.pwrite(fd, b"z", 1) == 1
    rig.unmount()
