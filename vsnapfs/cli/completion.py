"""`vsnapfs completion`: the shell script that makes Tab complete commands, volumes and points.

Owns the answers to what that script asks, too, instead of click: click encodes them as UTF-8, and a
name on a disk need not be that.
"""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from vsnapfs.cli import streams
from vsnapfs.cli.base import Command
from vsnapfs.cli.output import echo

VARIABLE = "_VSNAPFS_COMPLETE"


@click.command(
    cls=Command,
    examples=(
        """$ echo 'eval "$(vsnapfs completion bash)"' >> ~/.bashrc\n"""
        "$ vsnapfs completion fish > ~/.config/fish/completions/vsnapfs.fish"
    ),
)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print the script for Tab completion."""
    kind = get_completion_class(shell)
    assert kind is not None, f"click knows no {shell}"  # the choice above lists what click has
    script = kind(ctx.find_root().command, {}, "vsnapfs", VARIABLE)
    echo(script.source())


def answer(root: click.Command, asked: str) -> int:
    """Answer a shell that asks, by `VARIABLE`, for "bash_complete" and the like. The exit code."""
    shell, _, what = asked.partition("_")
    kind = get_completion_class(shell)
    if kind is None or what != "complete":
        return 1
    streams.write_names(kind(root, {}, "vsnapfs", VARIABLE).complete() + "\n")
    return 0
