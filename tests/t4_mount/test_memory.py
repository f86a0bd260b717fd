"""Little memory: a file system on the loop device over a userspace server must not hang."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import trio
from mounted_rig import MIB, Fio, Machine, fio_must_succeed, read_direct, report, sh, sha256, until

from vsnapfs.volume import Volume
from vsnapfs.volume.create import create_volume

pytestmark = [pytest.mark.needs_fuse, pytest.mark.needs_loop]

# Bits of the flags in /proc/PID/stat (include/linux/sched.h): reclaim of memory starts no I/O for
# this thread, and it is throttled only by the device it writes to.
PF_MEMALLOC_NOIO = 0x0008_0000
PF_LOCAL_THROTTLE = 0x0010_0000

LIMIT = 48 * MIB


@pytest.fixture
def small_room() -> Iterator[Path]:
    """A memory cgroup of 48 MiB, version 1 or 2; gone after the test."""
    name = f"vsnapfs-test-{os.getpid()}"
    choices = (
        (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"),
        (Path("/sys/fs/cgroup"), "memory.max"),
        (Path("/sys/fs/cgroup/unified"), "memory.max"),
    )
    for root, limit in choices:
        room = root / name
        try:
            room.mkdir()
        except OSError:
            continue
        try:
            (room / limit).write_text(str(LIMIT))
        except OSError:
            room.rmdir()
            continue
        try:
            yield room
        finally:
            for pid in (room / "cgroup.procs").read_text().split():
                with suppress(OSError):
                    os.kill(int(pid), 9)
            until(lambda room=room: _removed(room))
        return
    pytest.skip("no memory cgroup can be made here")


def _removed(room: Path) -> bool:
    try:
        room.rmdir()
    except OSError:
        return False
    return True


@pytest.mark.needs_fio
def test_buffered_writes_larger_than_memory_over_ext4_on_the_loop_device(
    machine: Machine, small_room: Path, record_property: Callable[[str, object], None]
) -> None:
    """With 48 MiB of memory, fio writes 192 MiB through the page cache, and all of it verifies."""
    rig = machine.rig(size=320 * MIB, area=1024 * MIB)
    rig.mount()
    files = machine.base / "files"
    files.mkdir()
    device = rig.attach()
    sh("mkfs.ext4", "-q", device)
    sh("mount", device, files)
    rig.create_point()
    checksum = sha256(rig.point(1), direct=True)
    started = time.monotonic()
    job = Fio(
        machine.base,
        "buffered",
        within=small_room,
        filename=files / "data",
        size="192M",
        rw="randwrite",
        bsrange="4k-64k",
        ioengine="psync",
        direct=0,
        end_fsync=1,
        verify="xxhash",
        verify_fatal=1,
    )
    machine.later(job.kill)
    # Meanwhile the volume answers, and points can be taken.
    answers = []
    while job.running:
        asked = time.monotonic()
        rig.status()
        if len(answers) % 20 == 10 and len(rig.points()) < 5:
            rig.create_point()
        answers.append(time.monotonic() - asked)
        time.sleep(0.1)
    verified = fio_must_succeed(job.end(150), 190 * MIB)
    report(record_property, "bytes verified with 48 MiB of memory", verified)
    report(record_property, "seconds", f"{time.monotonic() - started:.1f}")
    report(record_property, "slowest answer of the server, s", f"{max(answers):.2f}")
    limited = small_room / "memory.failcnt"
    if limited.exists():
        assert int(limited.read_text()) > 0, "the memory was never short"
    assert sha256(rig.point(1), direct=True) == checksum
    sh("umount", files)
    sh("fsck.ext4", "-f", "-n", device)
    rig.detach()
    assert rig.fault() is None


def has_sys_resource() -> bool:
    """Whether this process, and so the server, may use PR_SET_IO_FLUSHER. Not every root may."""
    found = re.search(r"^CapEff:\s+(\w+)$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return bool(int(found[1], 16) >> 24 & 1)


@pytest.mark.skipif(not has_sys_resource(), reason="needs CAP_SYS_RESOURCE")
def test_the_server_tells_the_kernel_not_to_reclaim_through_it(machine: Machine) -> None:
    """Every thread has PR_SET_IO_FLUSHER's two flags; and it is not the first to be killed."""
    rig = machine.rig(size=4 * MIB)
    pid = rig.mount()
    rig.write(0, os.urandom(MIB))
    rig.create_point()  # worker threads have started
    rig.write(0, os.urandom(MIB))
    read_direct(rig.point(1))
    threads = list(Path(f"/proc/{pid}/task").iterdir())
    assert len(threads) > 1
    for thread in threads:
        flags = int((thread / "stat").read_text().rpartition(")")[2].split()[6])
        assert flags & PF_MEMALLOC_NOIO
        assert flags & PF_LOCAL_THROTTLE
    assert int(Path(f"/proc/{pid}/oom_score_adj").read_text()) < 0
    # That the test can fail: an ordinary process has neither.
    flags = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[6])
    assert not flags & (PF_MEMALLOC_NOIO | PF_LOCAL_THROTTLE)


def test_a_server_without_memory_for_a_copy_keeps_the_points(
    machine: Machine, record_property: Callable[[str, object], None]
) -> None:
    """RLIMIT_AS below what a copy needs: offline by fault 4 or 5, or it is written; never lost."""
    rig = machine.rig(size=16 * MIB, area=64 * MIB, block_size=MIB)
    pid = rig.mount()
    content = os.urandom(16 * MIB)
    rig.write(0, content)
    rig.create_point()
    mapped = int(
        next(
            line.split()[1]
            for line in Path(f"/proc/{pid}/status").read_text().splitlines()
            if line.startswith("VmSize")
        )
    )
    # Another process may lower the limit of this one: as root, and only for what is mapped anew.
    code = (
        "import resource, sys; pid, size = map(int, sys.argv[1:]);"
        "resource.prlimit(pid, resource.RLIMIT_AS, (size, resource.RLIM_INFINITY))"
    )

    def limit(size: int) -> None:
        subprocess.run([sys.executable, "-c", code, str(pid), str(size)], check=True, timeout=20)

    limit((mapped << 10) + 2 * MIB)
    try:
        fd = os.open(rig.replica, os.O_RDWR)
        try:
            for offset in range(0, 8 * MIB, 100_000):
                os.pwrite(fd, bytes(50_000), offset)
        except OSError:
            pass
        finally:
            os.close(fd)
    finally:
        limit(1 << 46)
    status = rig.status()
    report(record_property, "state with 2 MiB of memory left", status["fault"] or "online")
    if status["state"] == "offline":
        assert status["fault"]["code"] in (4, 5)
        assert rig.event(79 + status["fault"]["code"])
        rig.call("online")
    assert read_direct(rig.point(1)) == content
    rig.write(0, bytes(16 * MIB))
    assert read_direct(rig.point(1)) == content
    assert rig.call("verify")["ok"]


def test_no_memory_for_another_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no thread can be started the work is done all the same: points exact, nothing lost."""
    content, other = os.urandom(4 * MIB), os.urandom(4 * MIB)
    asked = []

    async def refuse(*_args: object, **_kwargs: object) -> None:
        asked.append(1)
        raise RuntimeError("can't start new thread")

    async def story(nursery: trio.Nursery, volume: Volume) -> None:
        await nursery.start(volume.run)
        handle = volume.open_replica()
        await handle.write(0, content)
        await volume.create_point("before")
        monkeypatch.setattr(trio.to_thread, "run_sync", refuse)
        for offset in range(0, 4 * MIB, MIB):
            await handle.write(offset, other[offset : offset + MIB])
        await handle.flush()
        number = (await volume.create_point()).number
        await handle.write(0, bytes(MIB))
        for point, image in ((1, content), (number, other)):
            reader = volume.open_point(point)
            assert bytes(await reader.read(0, 4 * MIB)) == image
            reader.close()
        handle.close()
        assert volume.status()["state"] == "online"
        volume.check_invariants()

    async def main() -> None:
        volume = await Volume.open(tmp_path / "vol")
        async with trio.open_nursery() as nursery:
            try:
                await story(nursery, volume)
            finally:
                await volume.close()
                nursery.cancel_scope.cancel()

    create_volume(tmp_path / "vol", size=4 * MIB, diff_area_size=32 * MIB)
    trio.run(main)
    assert len(asked) > 10
