"""What this machine can do and what is mounted on it: for conftest and for tests that look."""

from __future__ import annotations

import contextlib
import functools
import os
import resource
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FUSE_DEVICE = "/dev/fuse"
#: Of a process that tests run in or start: its own memory, mappings of files not counted.
MEMORY = 4 << 30


def limit_memory() -> None:
    """Beyond `MEMORY`, this process and those that it starts get MemoryError (ENOMEM)."""
    _, most = resource.getrlimit(resource.RLIMIT_DATA)
    limit = MEMORY if most == resource.RLIM_INFINITY else min(MEMORY, most)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


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
def missing_for_qemu() -> str | None:
    """Why no image can be opened with QEMU's tools here, or None."""
    absent = [tool for tool in ("qemu-io", "qemu-img") if shutil.which(tool) is None]
    return f"{' and '.join(absent)} not installed (qemu-utils)" if absent else None


@functools.cache
def missing_for_strace() -> str | None:
    """Why a running process cannot be traced here, or None. Tries it: containers may forbid it."""
    if shutil.which("strace") is None:
        return "strace is not installed"
    with subprocess.Popen(["sleep", "60"]) as other:
        command = ["strace", "-o", os.devnull, "-p", str(other.pid)]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as tracer:
            while not (traced := is_traced(other.pid)) and tracer.poll() is None:
                time.sleep(0.01)
            other.kill()  # It ends the tracer, too.
            said = tracer.communicate()[1]
    return None if traced else f"strace: {said.strip()}"


def is_traced(pid: int) -> bool:
    """Whether every thread of a process is being traced."""
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        return all("\nTracerPid:\t0\n" not in (task / "status").read_text() for task in tasks)
    except OSError:
        return False  # a thread that ended at this moment


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


# --- ordinary users, for a run as root ----------------------------------------------------------


# By another program than Python: a process that changed its own uid hides its open files.
BECOME_A_USER = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--"]


def python_for_users() -> str | None:
    """A Python that an ordinary user can run with our packages: not one that lies below /root."""
    # Started once more by itself, as a server is: setpriv starts it with root's rights still.
    again = "import numpy, pyfuse3, trio, xxhash, vsnapfs.volume"
    probe = f"import subprocess, sys; sys.exit(subprocess.call([sys.executable, '-c', {again!r}]))"
    for python in (sys.executable, "/usr/bin/python3"):
        command = [*BECOME_A_USER, python, "-c", probe]
        if subprocess.run(command, capture_output=True, check=False).returncode == 0:
            return python
    return None
