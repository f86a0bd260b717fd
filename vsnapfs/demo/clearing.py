"""Removing what the demo has made, and naming what cannot be removed.

Owns the cleaning up. What is ours is told by its place alone: everything mounted below the demo's
directory, every loop device over a file in it, every process that was started for it, wherever it
has gone since. Nothing else is touched. Promises to come to an end (who waits for a file system
that does not answer is left behind), to raise nothing, and that whatever is left is named, with the
command that removes it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from shlex import quote

from vsnapfs.config import load
from vsnapfs.daemon import mounts
from vsnapfs.errors import VsnapError

#: root often has no sbin in its PATH.
WITH_SBIN = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"))
# Set for every command of the demo, and so for whatever they start.
PLACE_VARIABLE = "VSNAPFS_DEMO_PLACE"
_PATIENCE = 30.0
# udev looks at each device that changes, and a device goes with the last who has it open.
_DETACH_PATIENCE = 10.0


@dataclass(frozen=True)
class Left:
    """Something that could not be removed. command: what removes it."""

    what: str
    command: str

    def __str__(self) -> str:
        return f"{self.what}\n    {self.command}"


def quiet(*command: str, timeout: float = _PATIENCE) -> tuple[int, str]:
    """Run a helper unseen, out of reach of Ctrl-C; exit code (-1: did not end) and output."""
    program = shutil.which(command[0], path=WITH_SBIN)
    if program is None:
        return 127, f"{command[0]} is not installed"
    process = subprocess.Popen(
        [program, *command[1:]], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        # Not waited for: one that hangs in a file system does not even end by that.
        return -1, f"{command[0]} did not end"
    return process.returncode, output


def remove_all(directory: Path, *, own_mounts: bool = False) -> list[Left]:
    """Unmount, detach, end, remove, in this order. What is left.

    own_mounts: in a mount namespace of our own, whose mounts go with its last process.
    """
    devices: dict[str, str] = {}
    # More than once: a server that was just starting may mount after the first look, and what
    # hangs on a server that does not answer can be unmounted when that has been ended.
    for _ in range(3):
        # Their place is not to be seen any more once what they lie on has been unmounted.
        devices |= {device: _life_of(device) for device in mounts.loop_devices(directory)}
        _unmount_all(directory)
        _end_processes(directory)
        if not _mounts_below(directory) and not _processes(directory):
            break
    mounted, processes = _mounts_below(directory), _processes(directory)
    if not mounted:  # never through a mount
        remove_write_buffers(directory.glob("*/volume.toml"))
        # Takes away what is mounted on them in copies of our mounts, too.
        shutil.rmtree(directory, ignore_errors=True)
    attached = _still_attached(devices)
    left = [Left(f"process {pid}", f"kill -KILL {pid}") for pid in processes]
    if not own_mounts:
        tool = "umount --lazy" if os.geteuid() == 0 else "fusermount3 -uz"
        left += [
            Left(f"mount {mount.mountpoint}", f"{tool} {quote(str(mount.mountpoint))}")
            for mount in mounted
        ]
    elif processes:
        killing = f"kill -KILL {' '.join(map(str, processes))}"
        left += [Left(f"mount {mount.mountpoint}", killing) for mount in mounted]
    left += [
        Left(f"loop device {device}{_held_by(device)}", f"losetup --detach {device}")
        for device in attached
    ]
    if directory.exists():
        command = f"rm -rf --one-file-system {quote(str(directory))}"
        left.append(Left(f"directory {directory}", command))
    return left


# -- mounts and loop devices --------------------------------------------------------------------


def _unmount_all(directory: Path) -> None:
    for mount in _mounts_below(directory):
        if mount.fstype != mounts.FSTYPE:
            quiet("fsfreeze", "--unfreeze", str(mount.mountpoint))  # in case it was left so
            if quiet("umount", str(mount.mountpoint))[0]:
                _unmount_lazily(mount)
    for device in mounts.loop_devices(directory):
        quiet("losetup", "--detach", device)
    for mount in _mounts_below(directory):
        if not _within(_PATIENCE, partial(mounts.unmount, mount)):
            _unmount_lazily(mount)


def _mounts_below(directory: Path) -> list[mounts.Mount]:
    """Newest first."""
    return [mount for mount in mounts.all_mounts() if directory in mount.mountpoint.parents][::-1]


def _unmount_lazily(mount: mounts.Mount) -> None:
    _within(_PATIENCE, partial(mounts.unmount_now, mount.mountpoint, lazy=True))


def _within(seconds: float, work: Callable[[], object]) -> bool:
    """Whether `work` was done, in this time and without an error."""
    done = threading.Event()

    def run() -> None:
        with contextlib.suppress(VsnapError, OSError):
            work()
            done.set()

    # A daemon: one that hangs must not keep this program from ending.
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return done.is_set()


def _life_of(device: str) -> str:
    """What tells one use of a loop device from the next; "" where the kernel does not say."""
    try:
        return Path("/sys/block", Path(device).name, "diskseq").read_text(encoding="ascii")
    except OSError:
        return ""


def _still_attached(devices: dict[str, str]) -> list[str]:
    """Those that are in use as they were, after some patience."""
    end = time.monotonic() + _DETACH_PATIENCE
    while True:
        attached = [
            device
            for device, life in devices.items()
            if Path("/sys/block", Path(device).name, "loop").exists() and _life_of(device) == life
        ]
        if not attached or time.monotonic() > end:
            return attached
        time.sleep(0.05)


def _held_by(device: str) -> str:
    """In words, which processes have it open, as far as we may see them."""
    holders = []
    for pid in sorted(int(name) for name in os.listdir("/proc") if name.isdigit()):
        with contextlib.suppress(OSError):  # ended, or not ours to see
            folder = f"/proc/{pid}/fd"
            if any(os.readlink(f"{folder}/{fd}") == device for fd in os.listdir(folder)):
                holders.append(str(pid))
    return f" (open in process {', '.join(holders)})" if holders else ""


# -- processes, files ---------------------------------------------------------------------------


def _processes(directory: Path) -> list[int]:
    """Living processes that the demo started, however they detached themselves since."""
    mark = os.fsencode(f"{PLACE_VARIABLE}={directory}")
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit() and int(name) != os.getpid():
            with contextlib.suppress(OSError):  # ended at this moment, or somebody else's
                if mark in Path("/proc", name, "environ").read_bytes().split(b"\0"):
                    found.append(int(name))
    return found


def _end_processes(directory: Path) -> None:
    """A server that has just been unmounted ends by itself; what does not is told to, then made."""
    for sent in (None, signal.SIGTERM, signal.SIGKILL):
        for pid in _processes(directory):
            if sent is not None:
                with contextlib.suppress(OSError):
                    os.kill(pid, sent)
                    # One that was stopped hears only SIGKILL.
                    os.kill(pid, signal.SIGCONT)
        end = time.monotonic() + (2.0 if sent is None else 10.0)
        while _processes(directory):
            if time.monotonic() > end:
                break
            time.sleep(0.05)
        else:
            return


def remove_write_buffers(configs: Iterable[Path]) -> None:
    """What servers that were killed have left in shared memory, of the volumes with these files
    (volume.toml). One that cannot be read is passed over.
    """
    # Not at the top: it brings numpy with its threads, and `own_namespace` must come before those.
    from vsnapfs.volume.shm import discard  # noqa: PLC0415

    for config in configs:
        with contextlib.suppress(VsnapError, OSError):
            discard(bytes.fromhex(load(config.parent).volume_id))
