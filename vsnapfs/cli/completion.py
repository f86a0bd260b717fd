"""`vsnapfs completion`: the shell script that makes Tab complete commands, volumes and points."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from vsnapfs.cli.base import Command


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
    script = kind(ctx.find_root().command, {}, "vsnapfs", "_VSNAPFS_COMPLETE")
    click.echo(script.source())
