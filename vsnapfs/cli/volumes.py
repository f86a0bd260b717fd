"""Which volume is meant: a directory, a mountpoint, and what the mount table says.

Owns the translation of what was typed into a volume's directory, and the calls of `daemon.mounts`
that commands share. Changes nothing, opens no replica and no diff area.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import TYPE_CHECKING

from vsnapfs import config
from vsnapfs.config import shown
from vsnapfs.errors import UsageError, VsnapError

if TYPE_CHECKING:
    from vsnapfs.daemon.mounts import Mount


def find_volume(text: str) -> Path:
    """The directory of the volume that `text` names, itself or by its mountpoint.

    UsageError for an empty text; VsnapError, code "no-volume", when there is none.
    """
    if not text:
        raise UsageError("the name of the volume is empty")
    absolute = os.path.abspath(text)  # also drops trailing slashes; looks at nothing
    if os.path.lexists(os.path.join(absolute, config.CONFIG_NAME)):
        return Path(os.path.realpath(absolute))
    mount = find_mount(Path(absolute))
    if mount is not None:
        return mount.volume
    if os.path.isfile(absolute):
        hint = "Name the volume's directory. (`vsnapfs inspect` prints a single file.)"
    elif os.path.isdir(absolute):
        hint = "Name the directory that `vsnapfs create` made, or where its volume is mounted."
    else:
        hint = "`vsnapfs status` lists the mounted volumes, `vsnapfs create` makes a new one."
    try:
        config.load(absolute)
    except VsnapError as error:
        denied = error.errno in (errno.EACCES, errno.EPERM)
        error.hint = "Try as root, or as the user who owns it." if denied else hint
        raise
    return Path(os.path.realpath(absolute))  # it has appeared just now


def mounted() -> list[Mount]:
    """Every vsnapfs mount of this machine, dead ones included."""
    from vsnapfs.daemon import mounts

    return mounts.find_mounts()


def find_mount(path: Path) -> Mount | None:
    """The mount that `path` means: its mountpoint, or the volume's directory. The newest wins."""
    # A dead mountpoint cannot be looked at, but its name can still be compared.
    real = Path(os.path.realpath(path))
    for mount in reversed(mounted()):
        if real in (mount.mountpoint, mount.volume):
            return mount
    return _mount_by_its_server(real)


def _mount_by_its_server(volume: Path) -> Mount | None:
    """The mount of a volume that the table knows by another name: it was moved, or bind-mounted."""
    from vsnapfs.daemon import client

    if not os.path.lexists(volume / config.SOCKET_NAME) or not client.is_served(volume):
        return None
    try:
        place = Path(client.call(volume, "status")["mountpoint"])
    except (VsnapError, TypeError):  # It has ended just now.
        return None
    return next((mount for mount in reversed(mounted()) if mount.mountpoint == place), None)


def moved_to(text: str, mount: Mount) -> Path | None:
    """The directory `text`, if the volume of `mount` listens there under another name."""
    real = Path(os.path.realpath(text))
    if real in (mount.mountpoint, mount.volume):  # The former, looked into, could hang.
        return None
    return real if os.path.lexists(real / config.SOCKET_NAME) else None


def live_mount(volume: Path) -> Mount | None:
    """Where the volume is mounted and served, None when it is not (or its server has died)."""
    mount = find_mount(volume)
    return None if mount is None or mount.stale else mount


def mounted_elsewhere(volume: Path) -> VsnapError | None:
    """What to say of a volume that is mounted where this process cannot see it; else None."""
    from vsnapfs.daemon import client

    pid = client.server_pid(volume)
    if not pid:
        return None
    if not _in_another_namespace(pid):
        return VsnapError(
            f"{shown(volume)} is served by process {pid}, but is mounted nowhere any more",
            hint="If it does not end by itself, a file of it is still open (umount -l does not "
            "wait for that). SIGTERM to that process closes the volume.",
            code="mounted-elsewhere",
        )
    return VsnapError(
        f"{shown(volume)} is mounted in another mount namespace (process {pid})",
        hint=f"Go there: nsenter --mount --target {pid}. SIGTERM to that process unmounts it.",
        code="mounted-elsewhere",
    )


def _in_another_namespace(pid: int) -> bool:
    try:
        return os.readlink(f"/proc/{pid}/ns/mnt") != os.readlink("/proc/self/ns/mnt")
    except OSError:
        return False  # It has ended, or is another user's.
