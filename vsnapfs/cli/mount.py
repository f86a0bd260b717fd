"""`vsnapfs mount` and `umount`: start and end the process that serves a volume."""

from __future__ import annotations

import os
from pathlib import Path

import click

from vsnapfs.cli.base import Command
from vsnapfs.cli.output import confirm, note, warn
from vsnapfs.cli.params import FileType, SizeType, VolumeNameType, lang_option, volume_argument
from vsnapfs.cli.volumes import find_mount, find_volume, mounted_elsewhere, moved_to
from vsnapfs.config import DURABILITIES, Durability, check_write_buffer, shown
from vsnapfs.errors import BusyError, UsageError, VsnapError


@click.command(
    cls=Command,
    examples="$ vsnapfs mount vol1 /mnt/vol1",
)
@volume_argument
@click.argument("mountpoint", type=FileType())
@click.option("--foreground", is_flag=True, help="Stay in the foreground; Ctrl-C unmounts.")
@click.option(
    "-o",
    "options",
    multiple=True,
    metavar="OPTION,...",
    help="Mount options: allow_other lets other users look in; also noatime, noexec.",
)
@click.option(
    "--accept-changed-replica",
    is_flag=True,
    help="Mount although something wrote to the replica beside vsnapfs. What it overwrote is "
    "missing from the recovery points.",
)
@click.option(
    "--durability",
    type=click.Choice(DURABILITIES),
    help="What recovery points survive this time: power failures, or only the end of the process "
    "(faster; a power failure can then spoil every recovery point). [default: as created]",
)
@click.option(
    "--write-buffer",
    type=SizeType(zero=True),
    default="64MiB",
    show_default=True,
    help="Shared memory in which writes are acknowledged before they are carried out: 4MiB or "
    "more, 0 for none.",
)
@click.option(
    "--give-up-write-buffer",
    is_flag=True,
    help="Mount without the acknowledged writes of a write buffer that is lost for good and keeps "
    "the volume closed. The event log says so. One that can be used is carried out all the same.",
)
@click.option("--yes", is_flag=True, help="Do not ask before a write buffer is given up.")
@lang_option("MOUNTPOINT/events.log")
def mount(
    volume: Path,
    mountpoint: Path,
    foreground: bool,
    options: tuple[str, ...],
    accept_changed_replica: bool,
    durability: Durability | None,
    write_buffer: int,
    give_up_write_buffer: bool,
    yes: bool,
    lang: str,
) -> None:
    """Mount a volume on an existing, empty directory.

    There appear replica.img (the live volume), recovery-points/, status.json and events.log. A
    volume that is offline can be mounted too: its recovery points are readable.
    """
    place = Path(os.path.abspath(mountpoint))
    check_write_buffer(write_buffer)
    if give_up_write_buffer and not yes:
        confirm(
            f"Acknowledged writes of {shown(volume)} that cannot be carried out now will be lost "
            "for ever. Go on?",
            option="--yes",
        )
    from vsnapfs.daemon import client, process, server

    accept = accept_changed_replica
    if foreground:
        process.log_to_stderr()
        server.serve(
            volume,
            place,
            options=options,
            accept_changed_replica=accept,
            durability=durability,
            write_buffer=write_buffer,
            give_up_write_buffer=give_up_write_buffer,
            lang=lang,
            warn=warn,
            ready=lambda: note(
                f"{shown(volume)} is mounted on {shown(place)}; Ctrl-C unmounts it."
            ),
        )
        return
    pid = server.spawn(
        volume,
        place,
        options=options,
        accept_changed_replica=accept,
        durability=durability,
        write_buffer=write_buffer,
        give_up_write_buffer=give_up_write_buffer,
        lang=lang,
        warn=warn,
    )
    note(f"{shown(volume)} is mounted on {shown(place)} (process {pid}).")
    try:
        state = client.call(volume, "status")
    except VsnapError:
        return  # it is mounted, and that is what was asked for
    if state.get("state") == "offline":
        fault = state.get("fault")
        why = f" by fault {fault['code']} {fault['name']}" if fault else ""
        warn(
            f"{shown(volume)} is offline{why}: recovery points can be read, the replica cannot. "
            f"`vsnapfs status {shown(volume)}` shows the way out."
        )


@click.command(
    cls=Command,
    examples="$ vsnapfs umount vol1\n$ vsnapfs umount /mnt/vol1",
)
@click.argument("volume", metavar="VOLUME|MOUNTPOINT", type=VolumeNameType())
def umount(volume: str) -> None:
    """Unmount a volume and close it cleanly.

    Refused while something uses it: a loop device, an open file, a shell standing in it. A mount
    whose server has died is cleaned up.
    """
    from vsnapfs.daemon import mounts

    if not volume:
        raise UsageError("the name of the volume is empty")
    found = find_mount(Path(os.path.abspath(volume)))
    if found is None:
        directory = find_volume(volume)  # says so if it is not even a volume
        raise mounted_elsewhere(directory) or VsnapError(
            f"{shown(directory)} is not mounted",
            hint="`vsnapfs status` lists the mounted volumes.",
            code="not-mounted",
        )
    devices = mounts.loop_devices(found.mountpoint)
    if devices:
        raise BusyError(
            f"{shown(found.volume)} is attached as {', '.join(devices)}",
            hint=f"Unmount what is on it, then: vsnapfs detach {shown(found.volume)}",
        )
    # The mount table has the name under which it was mounted; it may have been moved since.
    moved = moved_to(volume, found)
    closed = mounts.unmount(found, note, moved)
    note(f"{shown(found.volume)} is unmounted.")
    if not closed:
        warn(
            "its server had died and did not close it: acknowledged writes may wait in memory "
            "until it is opened. Before this machine restarts: "
            f"vsnapfs status {shown(found.volume)}"
        )
