"""`vsnapfs attach` and `detach`: a loop device on the live replica, for file systems and fio."""

from __future__ import annotations

from pathlib import Path

import click

from vsnapfs.cli.base import Command
from vsnapfs.cli.output import echo, note
from vsnapfs.cli.params import volume_argument
from vsnapfs.cli.volumes import find_mount, live_mount, mounted_elsewhere
from vsnapfs.config import shown
from vsnapfs.errors import VsnapError


@click.command(
    cls=Command,
    examples='# device=$(vsnapfs attach vol1)\n# mkfs.ext4 "$device" && mount "$device" /mnt/files',
)
@volume_argument
def attach(volume: Path) -> None:
    """Attach the live replica to a loop device. Needs root.

    Prints the device, alone, on stdout. It uses direct I/O: what it acknowledges, the volume holds.
    After a fault it stays dead; detach it, bring the volume online, and attach anew.
    """
    mount = live_mount(volume)
    if mount is None:
        raise mounted_elsewhere(volume) or VsnapError(
            f"{shown(volume)} is not mounted, so there is nothing to attach",
            hint=f"First: vsnapfs mount {shown(volume)} MOUNTPOINT",
            code="not-mounted",
        )
    from vsnapfs.daemon import client, mounts

    state = client.call(volume, "status")
    if state.get("state") != "online":
        fault = state.get("fault")
        why = f" by fault {fault['code']} {fault['name']}" if fault else ""
        raise VsnapError(
            f"{shown(volume)} is offline{why}",
            hint=f"`vsnapfs status {shown(volume)}` shows the way out; "
            f"then: vsnapfs online {shown(volume)}",
            exit_code=3 if fault else 1,
            code="offline",
        )
    echo(mounts.attach_loop(mount.mountpoint / "replica.img"))


@click.command(
    cls=Command,
    examples="# umount /mnt/files && vsnapfs detach vol1",
)
@volume_argument
def detach(volume: Path) -> None:
    """Detach the volume's loop devices. Needs root.

    Refused while a file system on a device is mounted.
    """
    from vsnapfs.daemon import mounts

    mount = find_mount(volume)
    devices = [] if mount is None else mounts.loop_devices(mount.mountpoint)
    if not devices:
        raise (mounted_elsewhere(volume) if mount is None else None) or VsnapError(
            f"no loop device is attached to {shown(volume)}",
            hint="`losetup --list` shows the loop devices of this machine; one whose mount is gone "
            "is detached with `losetup --detach DEVICE`.",
            code="not-attached",
        )
    for device in devices:
        mounts.detach_loop(device)
        note(f"{device} is detached from {shown(volume)}.")
