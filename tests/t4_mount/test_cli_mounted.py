"""The command line on a volume that is really mounted, as processes of their own."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from mounted_rig import Machine
from namespace import Namespace

pytestmark = pytest.mark.needs_fuse
MIB = 1 << 20


def vsnapfs(*args: str | Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run a command; it must exit with `code`."""
    result = subprocess.run(
        [sys.executable, "-m", "vsnapfs", *map(str, args)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert result.returncode == code, result.stdout + result.stderr
    return result


def status(name: Path, code: int = 0) -> dict[str, Any]:
    (report,) = json.loads(vsnapfs("status", name, "--json", code=code).stdout)
    assert isinstance(report, dict)
    return report


@pytest.fixture
def vol(tmp_path: Path) -> Iterator[Path]:
    """A volume of 8 MiB mounted on tmp_path/mnt."""
    directory, place = tmp_path / "vol", tmp_path / "mnt"
    place.mkdir()
    vsnapfs("create", directory, "--size", "8MiB", "--diff-area-size", "2MiB")
    vsnapfs("mount", directory, place)
    yield directory
    if os.path.ismount(place):
        vsnapfs("umount", directory)


def write(place: Path, offset: int, data: bytes) -> None:
    fd = os.open(place / "replica.img", os.O_WRONLY)
    try:
        assert os.pwrite(fd, data, offset) == len(data)
        os.fsync(fd)
    finally:
        os.close(fd)


def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)


def test_a_mounted_volume_answers_by_both_names(vol: Path, tmp_path: Path) -> None:
    """Status by volume and by mountpoint is the same, tells place and process, and lists it."""
    report = status(vol)
    assert report["mountpoint"] == str(tmp_path / "mnt")
    assert Path(f"/proc/{report['pid']}/cmdline").read_bytes().count(b"vsnapfs") >= 1
    assert status(tmp_path / "mnt") == report
    everything = json.loads(subprocess.run(
        [sys.executable, "-m", "vsnapfs", "status", "--json"],
        capture_output=True, text=True, check=False, timeout=60,
    ).stdout)  # fmt: skip
    assert str(vol) in [entry["volume"] for entry in everything]


def test_export_of_a_mounted_volume_also_after_a_fault(vol: Path, tmp_path: Path) -> None:
    """A point exports exactly while the replica changes, and again after the area ran full."""
    place = tmp_path / "mnt"
    content = random.Random(1).randbytes(MIB)
    write(place, 3 * MIB + 5, content)
    assert vsnapfs("rp", "create", vol, "--label", "keep").stdout == "1\n"
    image = bytearray(8 * MIB)
    image[3 * MIB + 5 : 4 * MIB + 5] = content
    write(place, 3 * MIB, bytes(MIB))
    vsnapfs("rp", "export", vol, "keep", tmp_path / "1.img")
    assert (tmp_path / "1.img").read_bytes() == image
    assert (tmp_path / "1.img").stat().st_blocks * 512 < 2 * MIB
    with pytest.raises(OSError, match="No such device"):
        write(place, 0, b"f" * (8 * MIB))
    assert status(vol, code=3)["fault"]["code"] == 8
    vsnapfs("rp", "export", place, "latest", tmp_path / "2.img")
    assert (tmp_path / "2.img").read_bytes() == image
    inside = vsnapfs("rp", "export", vol, "1", place / "x.img", code=2)
    assert "inside the mounted volume" in inside.stderr
    vsnapfs("resize", vol, "--diff-area-size", "16MiB")
    vsnapfs("online", vol)
    write(place, 0, b"f" * (8 * MIB))
    vsnapfs("rp", "restore", vol, "keep")
    assert (place / "replica.img").read_bytes() == image


def test_umount_names_who_is_in_the_way(vol: Path, tmp_path: Path) -> None:
    """An open file keeps the volume mounted, and the error names its process."""
    with (tmp_path / "mnt" / "replica.img").open("rb"):
        error = vsnapfs("umount", tmp_path / "mnt", code=1).stderr
        assert f"process {os.getpid()}" in error
        assert "hint: " in error
    vsnapfs("umount", tmp_path / "mnt")
    assert not os.path.ismount(tmp_path / "mnt")
    assert status(vol)["pid"] is None
    assert "is not mounted" in vsnapfs("umount", vol, code=1).stderr


def test_a_second_mount_is_refused(vol: Path, tmp_path: Path) -> None:
    """Neither the volume nor the mountpoint can be mounted twice, and the first mount goes on."""
    (tmp_path / "other").mkdir()
    assert "mounted already" in vsnapfs("mount", vol, tmp_path / "other", code=1).stderr
    vsnapfs("create", tmp_path / "vol2", "--size", "1MiB", "--diff-area-size", "1MiB")
    assert (
        "mountpoint already" in vsnapfs("mount", tmp_path / "vol2", tmp_path / "mnt", code=1).stderr
    )
    assert (tmp_path / "mnt" / "replica.img").exists()


def test_a_killed_server_leaves_a_mount_that_is_named_and_cleaned(
    vol: Path, tmp_path: Path
) -> None:
    """Status names it, umount takes it away and says what that leaves, and mount works again."""
    place = tmp_path / "mnt"
    pid = status(vol)["pid"]
    os.kill(pid, signal.SIGKILL)
    until(lambda: status(vol)["mountpoint"] is None)
    assert status(vol)["dead_mount"] == str(place)
    assert "its process has died" in vsnapfs("status", place).stdout
    said = vsnapfs("umount", place).stderr
    assert "did not close it" in said  # Exit 0 alone would mean: everything is on the disk.
    assert "vsnapfs status" in said
    assert "dead_mount" not in status(vol)
    vsnapfs("mount", vol, place)
    assert status(vol)["mountpoint"] == str(place)


@pytest.mark.needs_loop
def test_attach_fault_detach_and_attach_anew(vol: Path, tmp_path: Path) -> None:
    """The loop device dies with the fault; detach, online, attach anew, and it works again."""
    device = vsnapfs("attach", vol).stdout.strip()
    try:
        assert "attached already" in vsnapfs("attach", vol, code=1).stderr
        assert "vsnapfs detach" in vsnapfs("umount", vol, code=1).stderr
        fill = ("dd", "if=/dev/urandom", f"of={device}", "bs=1M", "count=8", "oflag=direct")
        subprocess.run(fill, capture_output=True, check=True, timeout=60)
        vsnapfs("rp", "create", vol)
        failed = subprocess.run(fill, capture_output=True, text=True, check=False, timeout=60)
        assert failed.returncode == 1
        vsnapfs("resize", vol, "--diff-area-size", "16MiB")
        assert "offline by fault 8" in vsnapfs("attach", vol, code=3).stderr
        vsnapfs("online", vol)
    finally:
        vsnapfs("detach", vol)
    device = vsnapfs("attach", vol).stdout.strip()
    try:
        fill = ("dd", "if=/dev/zero", f"of={device}", "bs=1M", "count=8", "oflag=direct")
        subprocess.run(fill, capture_output=True, check=True, timeout=60)
    finally:
        vsnapfs("detach", vol)


def test_a_mount_in_the_foreground_ends_with_ctrl_c(tmp_path: Path) -> None:
    """--foreground says when it is ready, serves, and unmounts cleanly on SIGINT."""
    place = tmp_path / "mnt"
    place.mkdir()
    vsnapfs("create", tmp_path / "v", "--size", "1MiB", "--diff-area-size", "1MiB")
    process = subprocess.Popen(
        [sys.executable, "-m", "vsnapfs", "mount", str(tmp_path / "v"), str(place), "--foreground"],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    assert "is mounted on" in process.stderr.readline()
    assert (place / "replica.img").stat().st_size == MIB
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 0, errors
    assert errors == ""
    assert not os.path.ismount(place)


@pytest.mark.skipif(os.geteuid() != 0, reason="takes root: a namespace")
def test_a_volume_mounted_in_another_mount_namespace(machine: Machine) -> None:
    """A container's, or that of a demo that was killed: what cannot work here says where it can."""
    directory, place = machine.base / "vol", machine.base / "mnt"
    place.mkdir()
    vsnapfs("create", directory, "--size", "8MiB", "--diff-area-size", "2MiB")
    there = Namespace(machine)
    there.serve(directory, place)
    pid = status(directory)["pid"]
    for command in ("umount", "attach", "detach"):
        said = vsnapfs(command, directory, code=1).stderr
        assert f"{directory} is mounted in another mount namespace (process {pid})" in said
        assert f"nsenter --mount --target {pid}" in said
    there.end()
    assert "is not mounted" in vsnapfs("umount", directory, code=1).stderr
