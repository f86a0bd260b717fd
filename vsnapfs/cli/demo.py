"""`vsnapfs demo`: the whole story, told by doing it (`vsnapfs.demo` does the telling)."""

from __future__ import annotations

import click

from vsnapfs.cli.base import Command
from vsnapfs.cli.output import readable
from vsnapfs.cli.params import lang_option


@click.command(
    cls=Command,
    examples="$ vsnapfs demo --fast",
)
@lang_option("the story")
@click.option("--fast", is_flag=True, help="Smaller sizes and no pauses: under a minute.")
@click.pass_context
def demo(ctx: click.Context, lang: str, fast: bool) -> None:
    """Fill a diff area and lose no recovery point.

    Works in a temporary directory and removes it. As root with loop devices: with a real ext4 on a
    real loop device; otherwise the same story on the FUSE file.
    """
    from vsnapfs.demo import run_demo

    ctx.exit(run_demo(readable(lang), fast))
