"""`vsnapfs recovery-point` (alias `rp`): create, list, delete, export and restore points."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from vsnapfs.cli.base import Group
from vsnapfs.cli.output import echo, note, print_json, print_table, progress, when
from vsnapfs.cli.params import FileType, LabelType, PointType, json_option, volume_argument
from vsnapfs.config import shown

point_argument = click.argument("point", type=PointType())


@click.group(
    "recovery-point",
    cls=Group,
    examples="$ vsnapfs recovery-point create vol1 --label before-upgrade\n$ vsnapfs rp list vol1",
)
def recovery_point() -> None:
    """Create, list, delete, export and restore recovery points. Alias: rp.

    A POINT is a number, `latest`, `oldest` or a label.
    """


@recovery_point.command(
    examples="$ number=$(vsnapfs recovery-point create vol1 --label before-upgrade)",
)
@volume_argument
@click.option("--label", type=LabelType(), help="A name for it, usable as POINT.")
def create(volume: Path, label: str | None) -> None:
    """Create a recovery point and print its number.

    It keeps the replica as it is now: everything acknowledged before is in it, nothing issued
    after. Of a mounted file system above, run `sync` or `fsfreeze` first: what it has not yet
    written cannot be kept.
    """
    from vsnapfs.daemon import client

    point = client.call(volume, "rp_create", label=label, say=note)
    echo(str(point["number"]))


@recovery_point.command(
    "list",
    examples="$ vsnapfs recovery-point list vol1 --json | jq -r '.[-1].number'",
)
@volume_argument
@json_option("The list")
def list_points(volume: Path, as_json: bool) -> None:
    """List the recovery points, oldest first."""
    from vsnapfs.daemon import client

    points: list[dict[str, Any]] = client.call(volume, "rp_list")
    if as_json:
        print_json([point | {"label": point.get("label") or None} for point in points])
    elif not points:
        note(f"{shown(volume)} has no recovery points.")
    else:
        rows = [
            (
                str(point["number"]),
                when(point["created_ns"]),
                (point.get("label") or "-") + (" (SUSPECT)" if point.get("suspect") else ""),
            )
            for point in points
        ]
        print_table(("number", "created", "label"), rows, right="number")
        if any(point.get("suspect") for point in points):
            note(
                "SUSPECT: lived through a power failure, or a failed sync of the diff area, with "
                "durability process; may be wrong."
            )


@recovery_point.command(
    examples="$ vsnapfs recovery-point delete vol1 oldest",
)
@volume_argument
@point_argument
@click.option("--force", is_flag=True, help="Although somebody has it open; they get an error.")
def delete(volume: Path, point: str, force: bool) -> None:
    """Delete one recovery point and free what only it needs.

    All others stay as they are. Works on a full diff area and while the volume is offline.
    """
    from vsnapfs.daemon import client

    deleted = client.call(volume, "rp_delete", point=point, force=force, say=note)
    note(f"Recovery point {deleted['number']} of {shown(volume)} is deleted.")


@recovery_point.command(
    examples="$ vsnapfs recovery-point export vol1 latest /backup/vol1.img",
)
@volume_argument
@point_argument
@click.argument("file", type=FileType())
@click.option("--force", is_flag=True, help="Replace FILE if it exists.")
def export(volume: Path, point: str, file: Path, force: bool) -> None:
    """Copy a recovery point into a sparse image file.

    FILE is a raw image that needs no vsnapfs. Every preserved block is checked against its checksum
    on the way, and FILE is read back and compared before it appears under its name (mode 0600).
    Works while the volume is offline, mounted or not.
    """
    from vsnapfs.cli.exporting import export_point
    from vsnapfs.units import format_size

    with progress("export") as report:
        result = export_point(volume, point, file, force=force, progress=report)
    note(
        f"Recovery point {result.number} of {shown(volume)} is in {shown(file)}: "
        f"{format_size(result.size)}, of which {format_size(result.data)} are not zero. "
        "Verified."
    )


@recovery_point.command(
    examples=(
        "$ vsnapfs recovery-point create vol1 --label before-restore\n"
        "$ vsnapfs recovery-point restore vol1 3"
    ),
)
@volume_argument
@point_argument
@click.option(
    "--force", is_flag=True, help="Although the replica is in use; whoever has it open gets errors."
)
def restore(volume: Path, point: str, force: bool) -> None:
    """Make the live replica equal to a recovery point.

    No recovery point is lost by this, newer ones included, but what was written after the newest
    one is: create a point first to keep it. Everything is checked and all space is reserved before
    the first byte changes.
    """
    from vsnapfs.daemon import client

    note(f"Restoring the replica of {shown(volume)} to recovery point {point}.")
    with progress("restore") as report:
        restored = client.call(
            volume, "rp_restore", progress=report, say=note, point=point, force=force
        )
    note(f"The replica of {shown(volume)} now equals recovery point {restored['number']}.")
