"""The click classes that all commands are made of: examples in the help, a meaningful order."""

from __future__ import annotations

from typing import Any

import click


class Command(click.Command):
    """A command whose help ends with examples, shown as they are written.

    examples: lines as they are typed, with their prompt; "" for none.
    """

    def __init__(self, *args: Any, examples: str = "", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.examples = examples

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The examples, then whatever else the command has to say at the end."""
        _write_examples(formatter, self.examples)
        super().format_epilog(ctx, formatter)


class Group(click.Group):
    """A group that lists its commands in the order they were added, and has examples too.

    aliases: other name → name of a command. They work everywhere and are listed nowhere.
    """

    command_class = Command

    def __init__(
        self, *args: Any, examples: str = "", aliases: dict[str, str] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.examples = examples
        self.aliases = aliases or {}

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 (click's signature)
        """In the order of a volume's life, which the alphabet does not know."""
        return list(self.commands)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """A command by its name or alias."""
        return super().get_command(ctx, self.aliases.get(cmd_name, cmd_name))

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The examples, then whatever else the group has to say at the end."""
        _write_examples(formatter, self.examples)
        super().format_epilog(ctx, formatter)


def _write_examples(formatter: click.HelpFormatter, examples: str) -> None:
    """A section that is never wrapped: a command line must stay one that can be pasted."""
    if not examples:
        return
    with formatter.section("Examples"):
        for line in examples.splitlines():
            formatter.write(f"{'':{formatter.current_indent}}{line}\n")
