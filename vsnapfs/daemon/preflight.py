"""What must be true before a mount is tried, each with an error that says what to do.

Also cleans up after dead servers, the only thing changed here. Nothing is locked yet: the volume's
own lock decides in the end, these checks make the error readable.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from vsnapfs import config
from vsnapfs.config import shown
from vsnapfs.daemon import mounts
from vsnapfs.errors import BusyError, UsageError, VsnapError

DEVICE = "/dev/fuse"
FUSE_CONF = "/etc/fuse.conf"

# What -o may say. Those of the second group are what every mount here is anyway.
_PASSED_ON = frozenset({"allow_other", "noatime", "noexec"})
_IMPLIED = frozenset({"rw", "nosuid", "nodev", "default_permissions", "defaults"})


@dataclass(frozen=True)
class Plan:
    """A mount that may be tried. Both paths are absolute and resolved.

    options: for libfuse, beyond those every mount gets. shared: others may look in.
    """

    directory: Path
    mountpoint: Path
    options: frozenset[str]

    @property
    def shared(self) -> bool:
        """Whether other users may look into the mount."""
        return "allow_other" in self.options


def check(directory: Path, mountpoint: Path, options: Iterable[str] = ()) -> Plan:
    """Everything that can be checked beforehand. UsageError, BusyError or VsnapError."""
    chosen = parse_options(options)
    directory = Path(os.path.realpath(directory))
    config.load(directory)
    _check_fuse()
    _check_allowed(chosen)
    _check_not_mounted(directory)
    return Plan(directory, _check_mountpoint(mountpoint), chosen)


def parse_options(options: Iterable[str]) -> frozenset[str]:
    """The options to pass on, from those given with -o (each may itself be a list of commas)."""
    if isinstance(options, str):
        options = (options,)
    chosen = set()
    for option in (part.strip() for text in options for part in text.split(",")):
        if option in _PASSED_ON:
            chosen.add(option)
        elif option == "ro":
            raise UsageError(
                "the option `ro` is not supported: the live replica is what a mount is for",
                hint="Recovery points are read-only always; `vsnapfs offline` refuses all writes.",
            )
        elif option and option not in _IMPLIED:
            raise UsageError(
                f"unknown mount option `{shown(option)}`",
                hint=f"Known are: {', '.join(sorted(_PASSED_ON | _IMPLIED))}.",
            )
    return frozenset(chosen)


def _check_fuse() -> None:
    hint = "Try `modprobe fuse`; in a container, it must be given in from outside."
    try:
        os.close(os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC))
    except FileNotFoundError:
        raise VsnapError(
            f"{DEVICE} is missing, so nothing can be mounted",
            hint=hint, errno=errno.ENOENT, code="no-fuse",
        ) from None  # fmt: skip
    except OSError as error:
        raise VsnapError(
            f"{DEVICE} cannot be opened: {error.strerror}",
            hint=f"Run as root, or let your user read and write {DEVICE} (usually mode 0666).",
            errno=error.errno or errno.EIO,
            code="no-fuse",
        ) from None
    if os.geteuid() != 0 and shutil.which("fusermount3") is None:
        raise VsnapError(
            "fusermount3 is missing, which only root can mount without",
            hint="Install the package fuse3, or mount as root.",
            errno=errno.ENOENT,
            code="no-fusermount",
        )


def _check_allowed(options: frozenset[str]) -> None:
    if "allow_other" not in options or os.geteuid() == 0:
        return
    try:
        lines = Path(FUSE_CONF).read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    if "user_allow_other" not in (line.strip() for line in lines):
        raise VsnapError(
            f"the option allow_other is not allowed to users by {FUSE_CONF}",
            hint="root can add a line `user_allow_other` there.",
            errno=errno.EPERM,
            code="not-allowed",
        )


def _check_not_mounted(directory: Path) -> None:
    """One volume, one mount. Dead mounts of this volume are taken away, wherever they are."""
    for mount in mounts.find_mounts():
        if mount.volume != directory:
            continue
        if mount.stale:
            mounts.clean_stale(mount)
            continue
        from vsnapfs.daemon import client

        pid = client.server_pid(directory)
        raise BusyError(
            f"{shown(directory)} is mounted already, on {shown(mount.mountpoint)}"
            + (f" (process {pid})" if pid else ""),
            hint=f"`vsnapfs umount {shown(directory)}` ends that.",
            code="mounted",
        )


def _check_mountpoint(mountpoint: Path) -> Path:
    """The resolved path of an empty directory on which nothing is mounted."""
    real = Path(os.path.realpath(mountpoint))
    while (mount := mounts.top_mount(real)) is not None:
        if not mount.stale:
            raise BusyError(
                f"{shown(mountpoint)} is a mountpoint already"
                f" ({shown(mount.fstype)}, of {shown(mount.source)})",
                code="mountpoint",
            )
        if mount.fstype != mounts.FSTYPE:
            raise BusyError(
                f"on {shown(mountpoint)} lies a dead mount of {shown(mount.fstype)}",
                hint="It is not ours to take away: fusermount3 -u, or umount.",
                code="mountpoint",
            )
        mounts.clean_stale(mount)
    try:
        names = os.listdir(real)
    except OSError as error:
        missing = error.errno == errno.ENOENT
        raise UsageError(
            f"{shown(mountpoint)} cannot be a mountpoint: {error.strerror}",
            hint="Make it first: mkdir" if missing else "",
            code="mountpoint",
        ) from error
    if names:
        raise UsageError(
            f"{shown(mountpoint)} is not empty: it holds {shown(min(names))}"
            + (f" and {len(names) - 1} more" if len(names) > 1 else ""),
            hint="What is in it would be hidden by the mount. Choose an empty directory.",
            code="mountpoint",
        )
    return real
