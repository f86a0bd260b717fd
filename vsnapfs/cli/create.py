"""`vsnapfs create`: parse what was chosen and hand it to `volume.create`."""

from __future__ import annotations

import os
from pathlib import Path

import click

from vsnapfs.cli.base import Command
from vsnapfs.cli.output import note, progress, warn
from vsnapfs.cli.params import FileType, SizeType
from vsnapfs.cli.signals import unwinding
from vsnapfs.config import (
    DEFAULT_GROW_TIMEOUT,
    DURABILITIES,
    MAX_TIMEOUT,
    POLICIES,
    WAYS_WITH_ZEROS,
    Durability,
    OnFull,
    ZeroBlocks,
    shown,
)
from vsnapfs.units import format_exact


@click.command(
    cls=Command,
    examples=(
        "$ vsnapfs create vol1 --size 10GiB --diff-area-size 2GiB\n"
        "$ vsnapfs create vol2 --from disk.img --diff-area-size 2GiB \\\n"
        "      --diff-area /mnt/other-disk/vol2.diff"
    ),
)
@click.argument("volume", type=FileType())
@click.option(
    "--size",
    type=SizeType(),
    help="Size of the volume. Not needed with --from or an existing replica: theirs counts.",
)
@click.option(
    "--diff-area-size",
    type=SizeType(),
    required=True,
    help="The most that the diff area may ever take, its own bookkeeping included.",
)
@click.option(
    "--diff-area",
    type=FileType(),
    help="File or block device for preserved blocks. [default: VOLUME/diff-area]",
)
@click.option(
    "--replica",
    type=FileType(),
    help="File or block device of the live image; an existing one is adopted unchanged. "
    "[default: VOLUME/replica.img]",
)
@click.option(
    "--from", "from_image", type=FileType(), metavar="IMAGE", help="Copy this image first."
)
@click.option(
    "--block-size",
    type=SizeType(),
    default="16KiB",
    show_default=True,
    help="Unit of copy-on-write: a power of two, 4KiB to 1MiB.",
)
@click.option(
    "--on-full",
    type=click.Choice(POLICIES),
    default="offline",
    show_default=True,
    help="When a block cannot be preserved: go offline and keep every recovery point, "
    "or delete the oldest recovery points.",
)
@click.option(
    "--grow-timeout",
    type=click.FloatRange(0, MAX_TIMEOUT),
    metavar="SECONDS",
    default=DEFAULT_GROW_TIMEOUT,
    show_default=True,
    help="How long a write waits for the diff area to grow before that is a fault. With "
    "--on-full evict it waits until growing has succeeded or failed.",
)
@click.option(
    "--durability",
    type=click.Choice(DURABILITIES),
    default="power",
    show_default=True,
    help="What recovery points survive: power failures, or only the end of the process (faster; "
    "a power failure can then spoil every recovery point).",
)
@click.option(
    "--zero-blocks",
    type=click.Choice(WAYS_WITH_ZEROS),
    default="flag",
    show_default=True,
    help="How a block of nothing but zeros is preserved: in a flag that 64 neighbours share, "
    "or as a copy like any other, so that each first write costs a block.",
)
@click.option(
    "--force",
    is_flag=True,
    help="Overwrite an existing diff area, replica (with --from) or device with a signature.",
)
def create(
    volume: Path,
    size: int | None,
    diff_area_size: int,
    diff_area: Path | None,
    replica: Path | None,
    from_image: Path | None,
    block_size: int,
    on_full: OnFull,
    grow_timeout: float,
    durability: Durability,
    zero_blocks: ZeroBlocks,
    force: bool,
) -> None:
    """Create a volume: a directory with replica and diff area.

    SIZE is written like 10GiB, 512M or 10737418240. Nothing is mounted yet. When creating fails,
    whatever it had made is removed again.
    """
    directory = _absolute(volume)
    from vsnapfs.volume.create import create_volume

    with unwinding(), progress("create") as report:
        warnings = create_volume(
            directory,
            size=size,
            diff_area_size=diff_area_size,
            replica=None if replica is None else _absolute(replica),
            diff_area=None if diff_area is None else _absolute(diff_area),
            from_image=None if from_image is None else _absolute(from_image),
            block_size=block_size,
            on_full=on_full,
            grow_timeout=grow_timeout,
            durability=durability,
            zero_blocks=zero_blocks,
            force=force,
            progress=report,
        )
    for warning in warnings:
        warn(warning)
    note(
        f"Created {shown(directory)} with a diff area of at most {format_exact(diff_area_size)}.\n"
        f"Next: vsnapfs mount {shown(volume)} MOUNTPOINT"
    )


def _absolute(path: Path) -> Path:
    """Relative names are relative to where the user is, not to the volume."""
    return Path(os.path.abspath(path))
