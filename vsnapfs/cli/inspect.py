"""`vsnapfs inspect`: what a diff area or a state file says about itself."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from vsnapfs.cli.base import Command
from vsnapfs.cli.output import clean, echo, print_json
from vsnapfs.cli.params import FileType, json_option
from vsnapfs.config import CONFIG_NAME, DEFAULT_DIFF_AREA, shown
from vsnapfs.errors import UsageError


@click.command(
    cls=Command,
    examples="$ vsnapfs inspect vol1/diff-area",
)
@click.argument("file", type=FileType())
@json_option("Everything")
def inspect(file: Path, as_json: bool) -> None:
    """Print the structures of a diff area or state file.

    Changes nothing. docs/format.md explains each field. The file may belong to a mounted volume;
    then some of it may be a moment old.
    """
    if file.is_dir():
        inside = f"{shown(file)}/{DEFAULT_DIFF_AREA}" if (file / CONFIG_NAME).exists() else ""
        raise UsageError(
            f"{shown(file)} is a directory",
            hint=f"Try: vsnapfs inspect {inside}" if inside else "Name a diff area or state file.",
        )
    from vsnapfs.diffarea.inspect import inspect_file
    from vsnapfs.volume.statefile import inspect_state, is_state

    path = Path(os.path.abspath(file))
    found: dict[str, Any] = inspect_state(path) if is_state(path) else inspect_file(path)
    if as_json:
        print_json(found)
    else:
        for line in _lines(found, 0):
            echo(clean(line))


def _lines(value: Any, depth: int) -> Iterator[str]:
    """A nested description as indented lines: `name: value`, items of lists after a dash."""
    pad = "  " * depth
    if isinstance(value, dict):
        for key, inner in value.items():
            if isinstance(inner, dict | list) and inner:
                yield f"{pad}{key}:"
                yield from _lines(inner, depth + 1)
            else:
                yield f"{pad}{key}: {_scalar(inner)}"
    elif isinstance(value, list):
        for inner in value:
            if isinstance(inner, dict | list) and inner:
                first, *rest = _lines(inner, depth + 1)
                yield f"{pad}- {first.lstrip()}"
                yield from rest
            else:
                yield f"{pad}- {_scalar(inner)}"
    else:
        yield f"{pad}{_scalar(value)}"


def _scalar(value: Any) -> str:
    if value is None or value in ([], {}):
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)
