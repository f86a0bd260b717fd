"""What this machine can do and what is mounted on it: for conftest and for tests that look."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FUSE_DEVICE = "/dev/fuse"


def run(*command: str) -> subprocess.CompletedProcess[str]:
    """Run a command of the system, its output as text; never raises for its exit code."""
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)


@functools.cache
def missing_for_fuse() -> str | None:
    """Why nothing can be mounted through FUSE here, or None."""
    try:
        status = os.stat(FUSE_DEVICE)
        if not stat.S_ISCHR(status.st_mode) or status.st_rdev != os.makedev(10, 229):
            return f"{FUSE_DEVICE} is not the FUSE device"
        os.close(os.open(FUSE_DEVICE, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return f"{FUSE_DEVICE}: {error.strerror}"
    if os.geteuid() != 0 and shutil.which("fusermount3") is None:
        return "fusermount3 is not installed"
    return None


@functools.cache
def missing_for_loop() -> str | None:
    """Why no loop device can be set up here, or None. Tries it: containers only look as if."""
    if os.geteuid() != 0:
        return "loop devices need root"
    for tool in ("losetup", "mkfs.ext4", "mount", "umount"):
        if shutil.which(tool) is None:
            return f"{tool} is not installed"
    with tempfile.NamedTemporaryFile(prefix="vsnapfs-probe-") as file:
        file.truncate(1 << 20)
        found = run("losetup", "--find", "--show", file.name)
        if found.returncode != 0:
            return f"losetup: {found.stderr.strip()}"
        run("losetup", "--detach", found.stdout.strip())
    return None


@functools.cache
def missing_for_fio() -> str | None:
    """Why fio cannot be run here, or None."""
    return None if shutil.which("fio") else "fio is not installed"


@functools.cache
def missing_for_gcc() -> str | None:
    """Why no C can be compiled here, or None."""
    if shutil.which("gcc") is None:
        return "gcc is not installed"
    text = "#include <stdlib.h>"
    done = subprocess.run(
        ["gcc", "-E", "-"], input=text, text=True, capture_output=True, check=False
    )
    return "the C library's headers are not installed" if done.returncode else None


def mounts() -> dict[str, tuple[str, str, str]]:
    """Mount id → (mountpoint, file system type, source) from /proc/self/mountinfo."""
    found = {}
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            left, _, right = line.partition(" - ")
            unescaped = [_unescape(word) for word in (left.split()[4], *right.split()[:2])]
            found[left.split()[0]] = (unescaped[0], unescaped[1], unescaped[2])
    return found


def _unescape(word: str) -> str:
    r"""Undo the \040 of mountinfo."""
    for octal in ("\\040", "\\011", "\\012", "\\134"):
        word = word.replace(octal, chr(int(octal[1:], 8)))
    return word


def loop_devices() -> dict[str, str]:
    """Loop device → backing file."""
    found = {}
    for path in Path("/sys/block").glob("loop*/loop/backing_file"):
        with contextlib.suppress(OSError):  # detached at this moment
            found[f"/dev/{path.parts[3]}"] = path.read_text(errors="surrogateescape").strip()
    return found
