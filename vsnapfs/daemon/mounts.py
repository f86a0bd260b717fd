"""Mounts of volumes as the kernel lists them: finding, recognising dead ones, unmounting.

Owns the reading of /proc/self/mountinfo and every umount. Promises never to hang on a dead or
stuck server: what could wait for one is done in a thread that is given up after a few seconds.
Loop devices live in `loops` and are offered here as well, since commands need both.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from vsnapfs.config import shown
from vsnapfs.daemon.loops import attach_loop, detach_loop, loop_devices
from vsnapfs.errors import BusyError, VsnapError

__all__ = [
    "Mount",
    "all_mounts",
    "attach_loop",
    "clean_stale",
    "detach_loop",
    "find_mounts",
    "loop_devices",
    "mount_of",
    "mounts_in",
    "top_mount",
    "unmount",
    "unmount_now",
    "users_of",
]

FSTYPE = "fuse.vsnapfs"
_MOUNTINFO = "/proc/self/mountinfo"
_MNT_DETACH = 2
_UMOUNT_NOFOLLOW = 8
# How long a mount may take to answer one stat before it counts as stuck.
_PATIENCE = 5.0


@dataclass(frozen=True)
class Mount:
    """One line of the mount table. device: "major:minor" of the file system, its only identity."""

    mountpoint: Path
    fstype: str
    source: str
    device: str

    @property
    def volume(self) -> Path:
        """The directory of the volume mounted here (only for mounts of vsnapfs)."""
        return Path(self.source)

    @cached_property
    def stale(self) -> bool:
        """Whether the serving process has died. Asked once; a stuck server is not a dead one."""
        return is_dead(self.mountpoint)


def all_mounts() -> list[Mount]:
    """Every mount of this process's namespace, oldest first; later ones hide earlier ones."""
    return mounts_in(Path(_MOUNTINFO))


def mounts_in(mountinfo: Path) -> list[Mount]:
    """Every mount that a process sees, given its /proc/PID/mountinfo. OSError if it is gone."""
    mounts = []
    for line in mountinfo.read_bytes().split(b"\n"):
        head, separator, tail = line.partition(b" - ")
        fields, rest = head.split(b" "), tail.split(b" ")
        if not separator or len(fields) < 6 or len(rest) < 2:
            continue  # no kernel writes such a line
        mounts.append(
            Mount(
                mountpoint=Path(_unescaped(fields[4])),
                fstype=_unescaped(rest[0]),
                source=_unescaped(rest[1]),
                device=fields[2].decode("ascii"),
            )
        )
    return mounts


def find_mounts() -> list[Mount]:
    """Every mount of a vsnapfs volume, dead ones included, oldest first."""
    return [mount for mount in all_mounts() if mount.fstype == FSTYPE]


def mount_of(volume: Path) -> Mount | None:
    """The newest mount of the volume in this directory, dead or alive."""
    real = Path(os.path.realpath(volume))
    found = [mount for mount in find_mounts() if mount.volume == real]
    return found[-1] if found else None


def top_mount(mountpoint: Path) -> Mount | None:
    """The mount that is seen at `mountpoint`, whatever its type. The path must be resolved."""
    found = [mount for mount in all_mounts() if mount.mountpoint == mountpoint]
    return found[-1] if found else None


def _unescaped(field: bytes) -> str:
    """The kernel writes blank, tab, newline and backslash as three octal digits."""
    raw = re.sub(rb"\\([0-3][0-7]{2})", lambda match: bytes((int(match[1], 8),)), field)
    return os.fsdecode(raw)


def is_dead(mountpoint: Path) -> bool:
    """Whether the process that serves this mount has died, now."""
    return _errno_of_asking(mountpoint) in (errno.ENOTCONN, errno.ECONNABORTED)


def _errno_of_asking(path: Path) -> int:
    """The errno of statvfs(path), 0 if it succeeds, ETIMEDOUT if there is no answer.

    Not stat, whose answer the kernel may still remember from a server that is dead by now.
    """
    result = [errno.ETIMEDOUT]

    def look() -> None:
        try:
            os.statvfs(path)
            result[0] = 0
        except OSError as error:
            result[0] = error.errno or errno.EIO

    # Not joined for ever: a stuck FUSE server holds whoever looks at it.
    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    thread.join(_PATIENCE)
    return result[0]


# ---- unmounting ---------------------------------------------------------------------------------


def unmount(
    mount: Mount, say: Callable[[str], None] | None = None, directory: Path | None = None
) -> bool:
    """End the mount of a volume and return when the volume is closed cleanly.

    False: a dead mount is only cleaned up, and nobody has closed the volume.
    say(sentence): what it waits for, if it does for long. directory: where the volume is now, if
    it was moved.
    BusyError, naming the users, while something uses it. VsnapError, code "not-told": it is
    unmounted, but its server cannot be asked whether the volume is closed.
    """
    from vsnapfs.daemon import client  # above this module: it serves commands, this serves both

    if mount.stale:
        clean_stale(mount)
        return False
    try:
        client.call(directory or mount.volume, "stop", mountpoint=str(mount.mountpoint), say=say)
        return True
    except VsnapError as error:
        if error.code not in ("mounted-there", "not-mounted", "no-volume", "not-volume"):
            raise
        bound = error.code == "mounted-there"
    # No server answers for the volume's directory and this mount: moved, removed, or bound here
    # under a live mount; or it is dead since we looked.
    dead = is_dead(mount.mountpoint)
    unmount_now(mount.mountpoint, lazy=dead)
    if not dead and not bound:
        raise VsnapError(
            f"{shown(mount.mountpoint)} is unmounted, but whether its volume is closed, with all "
            f"acknowledged writes on the disk, is not known: no server answers in "
            f"{shown(mount.volume)}",
            hint="Was the directory moved, or its control socket removed? The server closes the "
            "volume where it is now. "
            "'vsnapfs status' there says when that is done; what was left in the write buffer "
            "it carries out.",
            code="not-told",
        )
    return not dead


def clean_stale(mount: Mount) -> None:
    """Take away a mount whose server has died. Lazily: whoever has a file open keeps an error."""
    unmount_now(mount.mountpoint, lazy=True)


def unmount_now(mountpoint: Path, *, lazy: bool = False) -> None:
    """umount(2) as root, else through fusermount3. BusyError if in use and not `lazy`.

    Blocks until the kernel has answered; in the serving process, call it in a thread, since the
    kernel may have to ask that very process.
    """
    if os.geteuid() == 0:
        code = _umount2(mountpoint, _UMOUNT_NOFOLLOW | (_MNT_DETACH if lazy else 0))
        reason = os.strerror(code)
    else:
        code, reason = _fusermount(mountpoint, lazy)
    if code == 0:
        return
    if code == errno.EBUSY:
        raise BusyError(
            f"{shown(mountpoint)} is in use{_by(users_of(mountpoint))}",
            hint="Unmount what is on it, detach its loop device (vsnapfs detach), "
            "close its files; then try again.",
        )
    raise VsnapError(
        f"cannot unmount {shown(mountpoint)}: {reason}", errno=code, code="umount-failed"
    )


def _umount2(mountpoint: Path, flags: int) -> int:
    """umount2(2) without looking at the path first; errno or 0. Releases the GIL."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.umount2(ctypes.c_char_p(os.fsencode(mountpoint)), ctypes.c_int(flags)) == 0:
        return 0
    return ctypes.get_errno()


def _fusermount(mountpoint: Path, lazy: bool) -> tuple[int, str]:
    program = shutil.which("fusermount3")
    if program is None:
        return errno.ENOENT, "fusermount3 is not installed (package fuse3)"
    command = [program, "-u", *(["-z"] if lazy else []), "--", str(mountpoint)]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace",
        env={**os.environ, "LC_ALL": "C"}, check=False,
    )  # fmt: skip
    if done.returncode == 0:
        return 0, ""
    reason = done.stderr.strip() or f"fusermount3 ended with {done.returncode}"
    return (errno.EBUSY if "busy" in reason.lower() else errno.EIO), reason


def users_of(mountpoint: Path) -> list[str]:
    """What keeps a mount busy, in words: loop devices with what is on them, mounts, processes.

    Looks only at what the kernel tells without asking the file system itself, so it cannot hang;
    of other users' processes it sees nothing unless root.
    """
    users = []
    inside = f"{mountpoint}/"
    for device in loop_devices(mountpoint):
        on_it = [str(m.mountpoint) for m in all_mounts() if m.source == device]
        users.append(f"{device} (mounted on {', '.join(on_it)})" if on_it else device)
    users += [
        f"a mount on {mount.mountpoint}"
        for mount in all_mounts()
        if str(mount.mountpoint).startswith(inside)
    ]
    for process in sorted(_numeric("/proc"), key=int):
        if _holds(f"/proc/{process}", str(mountpoint), inside):
            name = _comm(process)
            users.append(f"process {process}{f' ({name})' if name else ''}")
    return users


def _numeric(directory: str) -> list[str]:
    try:
        return [name for name in os.listdir(directory) if name.isdigit()]
    except OSError:
        return []  # not ours to see, or gone


def _holds(process: str, mountpoint: str, inside: str) -> bool:
    links = [f"{process}/{name}" for name in ("cwd", "root", "exe")]
    links += [f"{process}/fd/{name}" for name in _numeric(f"{process}/fd")]
    for link in links:
        try:
            target = os.readlink(link)
        except OSError:
            continue
        if target == mountpoint or target.startswith(inside):
            return True
    return False


def _comm(process: str) -> str:
    try:
        return Path(f"/proc/{process}/comm").read_text(errors="replace").strip()
    except OSError:
        return ""


def _by(users: list[str]) -> str:
    if not users:
        return ""
    shown_users = [shown(user) for user in users[:5]]
    more = f" and {len(users) - 5} more" if len(users) > 5 else ""
    return f" by {', '.join(shown_users)}{more}"
