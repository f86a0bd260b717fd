"""A host that takes long to reserve space for the diff area, really mounted.

The server runs with a preloaded fallocate(2) that waits, for the diff area only, as long as a file
is there. So a test decides when the host answers, and nothing depends on how long that takes.
"""

from __future__ import annotations

import errno
import os
import random
from typing import Any

import pytest
from mounted_rig import (
    MIB,
    Fio,
    Machine,
    Rig,
    alive,
    fio_must_succeed,
    read_direct,
    sh,
    sha256,
    until,
)

from vsnapfs.daemon import mounts
from vsnapfs.errors import VsnapError

pytestmark = [pytest.mark.needs_fuse, pytest.mark.needs_gcc]

SIZE = 24 * MIB
#: Fewer than the kernel sends in the background at one time (12 by default): direct reads of a
#: recovery point are among those.
WAITING = 8
SOURCE = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
static void wait_while_told(int fd) {
  const char *told = getenv("VSNAPFS_TEST_STALL");
  char link[64], path[4096];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t length = readlink(link, path, sizeof path - 1);
  if (!told || length < 0) return;
  path[length] = 0;
  const char *name = strrchr(path, '/');
  if (name && !strcmp(name, "/diff-area")) while (!access(told, F_OK)) usleep(5000);
}
#define SLOW(name, offset) int name(int fd, int mode, offset at, offset length) { \
  static int (*real)(int, int, offset, offset); if (!real) real = dlsym(RTLD_NEXT, #name); \
  wait_while_told(fd); return real(fd, mode, at, length); }
SLOW(fallocate, off_t) SLOW(fallocate64, off64_t)
"""


class Stall:
    """The host does not answer while the file is there."""

    def __init__(self, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
        base = machine.base
        source, library = base / "slow.c", base / "slow.so"
        source.write_text(SOURCE)
        sh("gcc", "-shared", "-fPIC", "-o", library, source, "-ldl")
        self._told = base / "stall"
        self._patch = monkeypatch
        self._library = library
        machine.later(self.end)

    def mount(self, rig: Rig) -> None:
        """Mount with the slow host underneath."""
        with self._patch.context() as patch:
            patch.setenv("LD_PRELOAD", str(self._library))
            patch.setenv("VSNAPFS_TEST_STALL", str(self._told))
            rig.mount()

    def begin(self) -> None:
        """From now on the host does not answer."""
        self._told.touch()

    def end(self) -> None:
        """It answers."""
        self._told.unlink(missing_ok=True)


@pytest.fixture
def stall(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> Stall:
    """The slow host."""
    return Stall(machine, monkeypatch)


def growth(rig: Rig) -> dict[str, Any]:
    """What status says of the growth."""
    found = rig.status()["diff_area"]["growth"]
    assert isinstance(found, dict)
    return found


@pytest.mark.needs_fio
@pytest.mark.parametrize("policy", ["offline", "evict"])
def test_many_writes_wait_and_everything_else_is_answered(
    machine: Machine, stall: Stall, policy: str
) -> None:
    """Status, reads, points and flushes while eight writes wait; then all go through, and slowness
    has cost neither a point nor the volume.
    """
    rig = machine.rig(size=SIZE, area=64 * MIB, on_full=policy)
    # With evict nobody looks at grow-timeout.
    timeout = {"evict": 0.0, "offline": 600.0}[policy]
    rig.configure(grow_timeout=timeout, zero_blocks="copy")
    stall.mount(rig)
    rig.write(0, random.Random(1).randbytes(SIZE))
    first = rig.create_point()
    checksums = {first: sha256(rig.point(first), direct=True)}
    stall.begin()
    job = Fio(
        machine.base, filename=rig.replica, size=SIZE, rw="write", bs="16k", direct=1,
        ioengine="libaio", iodepth=WAITING, verify="xxhash", verify_fatal=1,
    )  # fmt: skip
    machine.later(job.kill)
    until(lambda: growth(rig)["waiting"] == WAITING)
    assert len(read_direct(rig.replica, SIZE - 4096, 4096)) == 4096
    assert sha256(rig.point(first), direct=True) == checksums[first]
    assert '"waiting": ' in (rig.place / "status.json").read_text()
    with rig.opened() as fd:
        os.fsync(fd)
    second = rig.create_point()
    checksums[second] = sha256(rig.point(second), direct=True)
    rig.call("rp_delete", point=rig.create_point())
    with pytest.raises(VsnapError) as caught:
        rig.unmount()
    assert caught.value.errno == errno.EBUSY
    until(lambda: 1047 in rig.event_ids())
    assert growth(rig)["waiting"] == WAITING
    stall.end()
    fio_must_succeed(job.end(), SIZE)
    assert growth(rig)["last_seconds"] > 0
    assert rig.fault() is None
    assert not {14, 25, 33, 35, 88} & set(rig.event_ids())
    for number, checksum in checksums.items():
        assert sha256(rig.point(number), direct=True) == checksum
    rig.unmount()


def test_unmounting_ends_while_the_host_does_not_answer(machine: Machine, stall: Stall) -> None:
    """A growth ahead is under way that never ends: umount ends all the same, says so, and the next
    mount finds everything, as after a kill.
    """
    rig = machine.rig(size=SIZE, area=64 * MIB)
    rig.configure(grow_timeout=0.1, zero_blocks="copy")
    stall.mount(rig)
    content = random.Random(3).randbytes(SIZE)
    rig.write(0, content)
    number = rig.create_point()
    stall.begin()
    rig.write(0, b"new" * 10)
    content = b"new" * 10 + content[30:]
    until(lambda: growth(rig)["seconds"] is not None)
    rig.unmount()
    assert mounts.mount_of(rig.directory) is None
    said = [
        event["params"].get("reason", "") for event in rig.events() if event["event_id"] == 1091
    ]
    assert ["still growing" in text for text in said] == [True]
    assert 1002 not in rig.event_ids()
    until(lambda: not alive(rig.pid))
    stall.end()
    rig.mount()
    assert rig.fault() is None
    assert 1042 in rig.event_ids()
    assert read_direct(rig.replica) == content
    assert read_direct(rig.point(number), 0, 30) != b"new" * 10
    assert rig.call("verify")["ok"]
    rig.write(0, content)
    rig.unmount()
