"""What this machine can do, where the demo works, and removing all of it again.

Owns the temporary directory. Promises that whatever ends the demo (the last chapter, an error,
Ctrl-C, SIGTERM), nothing stays: everything mounted below that directory, every loop device over a
file in it and the process that serves the volume are ours by their place, and only those are
touched.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from vsnapfs.cli.output import clean
from vsnapfs.daemon import mounts
from vsnapfs.demo.narrator import Narrator
from vsnapfs.errors import VsnapError
from vsnapfs.units import format_size

_SBIN = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"))
# Program → the Debian package that has it.
_ALWAYS = {"sh": "dash", "fio": "fio", "sha256sum": "coreutils", "dd": "coreutils"}
_AS_ROOT = {
    "mkfs.ext4": "e2fsprogs",
    "e2fsck": "e2fsprogs",
    "losetup": "mount",
    "mount": "mount",
    "umount": "mount",
    "fsfreeze": "util-linux",
}
# File systems that are no disk: what is shown there would say nothing about durability.
_MEMORY = ("tmpfs", "ramfs")
_SPACE = {True: 400 << 20, False: 900 << 20}  # bytes that --fast, and the whole story, may take
_PATIENCE = 30.0
# Set for every command of the demo, and so for whatever they start.
PLACE_VARIABLE = "VSNAPFS_DEMO_PLACE"


@dataclass(frozen=True)
class Machine:
    """full: with ext4 on a loop device. why_not: what stands in the way of that, else ""."""

    full: bool
    why_not: str


def look_around(text: Mapping[str, str]) -> Machine:
    """What can be shown here. VsnapError, with what to install, if a program is missing."""
    root = os.geteuid() == 0
    wanted = _ALWAYS | (_AS_ROOT if root else {})
    missing = {tool: package for tool, package in wanted.items() if not _which(tool)}
    if missing:
        raise VsnapError(
            text["missing_tools"].format(tools=", ".join(missing)),
            hint=f"apt-get install {' '.join(sorted(set(missing.values())))}",
            code="missing-tools",
        )
    if not root:
        return Machine(full=False, why_not=text["why_no_root"])
    problem = _loop_problem()
    if problem:
        return Machine(full=False, why_not=text["why_no_loop"].format(reason=problem))
    return Machine(full=True, why_not="")


def _which(tool: str) -> str | None:
    return shutil.which(tool, path=_SBIN)


def _loop_problem() -> str:
    """Why no loop device can be had, or "". Tries it: containers only look as if they could."""
    with tempfile.NamedTemporaryFile(prefix="vsnapfs-demo-", dir=_place()) as file:
        file.truncate(1 << 20)
        code, output = _quiet("losetup", "--find", "--show", file.name)
        if code:
            return " ".join(output.split()) or f"losetup: {code}"
        _quiet("losetup", "--detach", output.strip())
    return ""


def _quiet(*command: str, timeout: float = _PATIENCE) -> tuple[int, str]:
    """Run a helper unseen, out of reach of Ctrl-C; exit code (-1: did not end) and output."""
    program = _which(command[0])
    if program is None:
        return 127, f"{command[0]} is not installed"
    try:
        done = subprocess.run(
            [program, *command[1:]], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, errors="replace", timeout=timeout, check=False,
            start_new_session=True,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return -1, f"{command[0]} did not end"
    return done.returncode, done.stdout


def _place() -> Path:
    """A directory on a disk, if there is one. TMPDIR decides when it is set."""
    chosen = os.environ.get("TMPDIR")
    places = [Path(chosen)] if chosen else [Path("/var/tmp"), Path.cwd(), Path("/tmp")]  # noqa: S108 - mkdtemp makes the names
    usable = [place for place in places if os.access(place, os.W_OK | os.X_OK)]
    if not usable:
        raise VsnapError(f"cannot write to {' or '.join(map(str, places))}", code="no-place")
    on_disk = [place for place in usable if _filesystem(place) not in _MEMORY]
    return (on_disk or usable)[0]


def _filesystem(place: Path) -> str:
    """The type of the file system that holds `place`, as the mount table has it."""
    real = place.resolve()
    found = [m for m in mounts.all_mounts() if real == m.mountpoint or m.mountpoint in real.parents]
    if not found:
        return ""  # In a chroot that is no mount of its own, the table does not say.
    # The longest mountpoint; of several mounts on one, the newest.
    return max(enumerate(found), key=lambda pair: (len(str(pair[1].mountpoint)), pair[0]))[1].fstype


class Workplace:
    """A context: the directory in which everything happens. `left`: what could not be removed."""

    def __init__(self, narrator: Narrator, *, fast: bool) -> None:
        self._narrator = narrator
        self._fast = fast
        self.left: list[str] = []
        self.directory = Path()

    def __enter__(self) -> Self:
        """Make the directory. VsnapError without room."""
        place = _place()
        free = shutil.disk_usage(place).free
        if free < _SPACE[self._fast]:
            raise VsnapError(
                self._narrator.text(
                    "no_space",
                    place=place,
                    free=format_size(free),
                    needed=format_size(_SPACE[self._fast]),
                ),
                hint=self._narrator.text("no_space_hint"),
                code="no-space",
            )
        self.directory = Path(tempfile.mkdtemp(prefix="vsnapfs-demo-", dir=place)).resolve()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Remove everything. A second Ctrl-C does not stop this."""
        signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        before = {number: signal.signal(number, signal.SIG_IGN) for number in signals}
        try:
            if kind is not None:
                # Nobody may be reading any more (a closed pipe), which is no reason to stop.
                with contextlib.suppress(OSError):
                    self._narrator.note(self._narrator.text("cleaning"))
            self.left = remove_all(self.directory)
            if self.left and kind is not None:
                print(*map(clean, self.left), sep="\n", file=sys.stderr)  # noqa: T201 - last words
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


# -- removing -----------------------------------------------------------------------------------


def remove_all(directory: Path) -> list[str]:
    """Unmount, detach, end, remove, in this order. What is left, one line each."""
    # More than once: a server that was just starting may mount after the first look.
    for _ in range(3):
        _unmount_all(directory)
        _end_processes(directory)
        if not _mounts_below(directory) and not _processes(directory):
            break
    left = [f"mount: {mount.mountpoint}" for mount in _mounts_below(directory)]
    left += [f"loop device: {device}" for device in mounts.loop_devices(directory)]
    left += [f"process: {pid}" for pid in _processes(directory)]
    if not left:  # never through a mount
        shutil.rmtree(directory, ignore_errors=True)
    if directory.exists():
        left.append(f"directory: {directory}")
    return left


def _unmount_all(directory: Path) -> None:
    for mount in _mounts_below(directory):
        if mount.fstype != mounts.FSTYPE:
            _quiet("fsfreeze", "--unfreeze", str(mount.mountpoint))  # in case it was left so
            if _quiet("umount", str(mount.mountpoint))[0]:
                _quiet("umount", "--lazy", str(mount.mountpoint))
    for device in mounts.loop_devices(directory):
        _quiet("losetup", "--detach", device)
    for mount in _mounts_below(directory):
        _unmount_volume(mount)


def _mounts_below(directory: Path) -> list[mounts.Mount]:
    """Newest first."""
    return [mount for mount in mounts.all_mounts() if directory in mount.mountpoint.parents][::-1]


def _unmount_volume(mount: mounts.Mount) -> None:
    try:
        mounts.unmount(mount)
    except (VsnapError, OSError):
        with contextlib.suppress(VsnapError, OSError):
            mounts.unmount_now(mount.mountpoint, lazy=True)


def _processes(directory: Path) -> list[int]:
    """Living processes that the demo started, however they detached themselves since."""
    mark = os.fsencode(f"{PLACE_VARIABLE}={directory}")
    found = []
    for entry in os.scandir("/proc"):
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):  # ended at this moment, or somebody else's
                if mark in Path(entry.path, "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
    return found


def _end_processes(directory: Path) -> None:
    """A server that has just been unmounted ends by itself; what does not is told to, then made."""
    for sent in (None, signal.SIGTERM, signal.SIGKILL):
        for pid in _processes(directory):
            if sent is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, sent)
        end = time.monotonic() + (2.0 if sent is None else 10.0)
        while _processes(directory):
            if time.monotonic() > end:
                break
            time.sleep(0.05)
        else:
            return
