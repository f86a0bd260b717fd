"""`vsnapfs resize`, `offline`, `online`: the diff area's size and the way out of a fault."""

from __future__ import annotations

from pathlib import Path

import click

from vsnapfs.cli.base import Command
from vsnapfs.cli.output import confirm, echo, note, progress, warn
from vsnapfs.cli.params import SizeType, volume_argument
from vsnapfs.cli.status_text import sizes
from vsnapfs.config import shown


@click.command(
    cls=Command,
    examples="$ vsnapfs resize vol1 --diff-area-size 4GiB",
)
@volume_argument
@click.option(
    "--diff-area-size",
    "total",
    type=SizeType(),
    required=True,
    help="The new total size, not what is to be added.",
)
def resize(volume: Path, total: int) -> None:
    """Change how much the diff area may take, to a new total.

    Works at any time: mounted or not, online or offline, also after the diff area has run full.
    It can shrink down to what is used. A volume that is offline stays so until `vsnapfs online`.
    """
    from vsnapfs.daemon import client

    with progress("resize") as report:
        client.call(volume, "resize", progress=report, say=note, total=total)
    after = client.call(volume, "status")
    echo(f"{shown(volume)}: diff area {sizes(after['diff_area'])}")
    if after.get("state") == "offline":
        note(f"{shown(volume)} is still offline. Next: vsnapfs online {shown(volume)}")


@click.command(
    cls=Command,
    examples="$ vsnapfs offline vol1",
)
@volume_argument
def offline(volume: Path) -> None:
    """Refuse all I/O on the replica until `vsnapfs online`.

    Recovery points stay readable. Programs that have the replica open get "No such device", and
    must open it anew later.
    """
    from vsnapfs.daemon import client

    client.call(volume, "offline", say=note)
    note(f"{shown(volume)} is offline. Its recovery points stay readable.")


@click.command(
    cls=Command,
    examples="$ vsnapfs online vol1\n$ vsnapfs online vol1 --give-up-recovery-points",
)
@volume_argument
@click.option(
    "--give-up-recovery-points",
    "give_up",
    is_flag=True,
    help="Start with an empty diff area: every recovery point is lost. Only for a diff area that "
    "is truly gone or damaged.",
)
@click.option("--yes", is_flag=True, help="Do not ask before recovery points are given up.")
def online(volume: Path, give_up: bool, yes: bool) -> None:
    """Clear the fault and serve the replica again.

    Nothing is enlarged by this: if the write that tripped the fault would still not fit, a warning
    says so. Open the replica (or attach a loop device) anew afterwards; handles from before the
    fault stay dead, because whoever holds them has missed a write.
    """
    if give_up and not yes:
        confirm(
            f"Every recovery point of {shown(volume)} will be lost for ever. Go on?",
            option="--yes",
        )
    from vsnapfs.daemon import client

    warnings = client.call(volume, "online", give_up_recovery_points=give_up, say=note)
    for warning in warnings or []:
        warn(warning)
    note(f"{shown(volume)} is online. What was open before it went offline must be opened anew.")
