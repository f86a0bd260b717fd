"""What may stand on the command line: sizes, volumes, points, labels, and how Tab completes them.

Owns the click types. Promises that bad input is refused before anything is opened, naming the
option, and that completion changes nothing: it reads directories and the mount table, and asks only
volumes that are being served.
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.shell_completion import CompletionItem

from vsnapfs.cli.volumes import find_volume, live_mount, mounted
from vsnapfs.config import CONFIG_NAME
from vsnapfs.errors import UsageError, VsnapError
from vsnapfs.units import parse_size

RESERVED_LABELS = ("latest", "oldest")
MAX_LABEL = 96  # bytes of UTF-8, as the diff area's catalog holds it

if TYPE_CHECKING:
    _ParamType = click.ParamType[Any]  # generic for type checkers, since click 8.4 at runtime too
else:
    _ParamType = click.ParamType

_F = TypeVar("_F", bound=Callable[..., Any])


class SizeType(_ParamType):
    """10GiB, 64K, 1.5 TiB, 4096: a size of at least one byte (or 0: `zero`). Converts to int."""

    name = "size"

    def __init__(self, *, zero: bool = False) -> None:
        self._zero = zero

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The number of bytes; usage error when it is no size, or zero."""
        if isinstance(value, int):
            return value
        try:
            size = parse_size(str(value))
        except UsageError as error:
            self.fail(f"{error.message} {error.hint}".strip(), param, ctx)
        if size == 0 and not self._zero:
            self.fail("A size of zero is of no use.", param, ctx)
        return size


class FileType(_ParamType):
    """The name of a file or directory, which need not exist. Not "", which would mean "here"."""

    name = "file"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """The name as a Path; usage error when it is empty."""
        if isinstance(value, Path):
            return value
        if not value:
            self.fail("The name is empty.", param, ctx)
        return Path(str(value))

    def shell_complete(
        self, _ctx: click.Context, _param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """What Tab offers."""
        return [CompletionItem(incomplete, type="file")]


class VolumeType(_ParamType):
    """A volume's directory, or the place where it is mounted. Converts to the directory."""

    name = "volume"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """The volume's directory; VsnapError, code "no-volume", when there is none."""
        del param, ctx  # the error names the volume, that is enough
        return value if isinstance(value, Path) else find_volume(str(value))

    def shell_complete(
        self, _ctx: click.Context, _param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """What Tab offers."""
        return complete_volume(incomplete)


class VolumeNameType(_ParamType):
    """As VolumeType, but looked up later: one bad name must not hide the other volumes."""

    name = "volume"

    def shell_complete(
        self, _ctx: click.Context, _param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """What Tab offers."""
        return complete_volume(incomplete)


class PointType(_ParamType):
    """A recovery point: number, latest, oldest or label. What exists only the volume knows."""

    name = "point"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The name as it is; usage error when it is blank."""
        if not str(value).strip():
            self.fail("The name of the recovery point is empty.", param, ctx)
        return str(value)

    def shell_complete(
        self, _ctx: click.Context, _param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """What Tab offers."""
        return [CompletionItem(n) for n in _points(_ctx) if n.startswith(incomplete)]


class LabelType(_ParamType):
    """A name for a recovery point that can be told from a number and from latest and oldest."""

    name = "text"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The label as it is; usage error with the reason when it cannot be one."""
        label = str(value)
        problem = label_problem(label)
        if problem:
            self.fail(problem, param, ctx)
        return label


def label_problem(label: str) -> str:
    """Why `label` cannot name a recovery point; "" when it can."""
    if not label.strip():
        return "A label must not be empty."
    if label != label.strip():
        return f"The label {label!r} begins or ends with a space."
    if label.isdigit():
        return f"The label {label!r} is all digits: it would look like a point's number."
    if label.lower() in RESERVED_LABELS:
        return f"The label {label!r} already means the {label.lower()} recovery point."
    if "/" in label:
        return f"The label {label!r} contains a '/'."
    # C…: control and format characters, bytes that are no UTF-8. Zl, Zp: separators of lines.
    categories = {unicodedata.category(c) for c in label}
    if any(category[0] == "C" or category in ("Zl", "Zp") for category in categories):
        return "A label must be UTF-8 text of one line, without control characters."
    size = len(label.encode())
    if size > MAX_LABEL:
        return f"The label is {size} bytes long in UTF-8; {MAX_LABEL} are allowed."
    return ""


def volume_argument(function: _F) -> _F:
    """The VOLUME argument of nearly every command."""
    return click.argument("volume", type=VolumeType())(function)


def json_option(what: str) -> Callable[[_F], _F]:
    """The --json flag of a report."""
    return click.option("--json", "as_json", is_flag=True, help=f"{what} as JSON, for programs.")


def lang_option(what: str) -> Callable[[_F], _F]:
    """The --lang option; VSNAPFS_LANG chooses for a whole session."""
    return click.option(
        "--lang",
        type=click.Choice(["en", "ja"]),
        default="en",
        envvar="VSNAPFS_LANG",
        show_default=True,
        show_envvar=True,
        help=f"Language of {what}.",
    )


def complete_volume(incomplete: str) -> list[CompletionItem]:
    """Volumes that begin with `incomplete`; if there are none, let the shell list directories."""
    found = {
        str(path)
        for mount in mounted()
        for path in (mount.volume, mount.mountpoint)
        if str(path).startswith(incomplete)
    }
    found.update(_volumes_beside(incomplete))
    if not incomplete.startswith("/"):
        found = {name for name in found if not name.startswith("/")} or found
    if not found:
        return [CompletionItem(incomplete, type="dir")]
    return [CompletionItem(name) for name in sorted(found)]


def _volumes_beside(incomplete: str) -> Iterator[str]:
    """Directories with a volume.toml whose name, as it is being typed, begins with `incomplete`."""
    folder, start = os.path.split(incomplete)
    try:
        with os.scandir(folder or ".") as entries:
            for entry in entries:
                if entry.name.startswith(start) and os.path.lexists(
                    os.path.join(entry.path, CONFIG_NAME)
                ):
                    yield os.path.join(folder, entry.name)
    except OSError:
        return  # not a directory that can be read: nothing to offer


def _points(ctx: click.Context) -> list[str]:
    """Names of the points of the volume on the command line: words, numbers, labels."""
    names = ["latest", "oldest"]
    volume = ctx.params.get("volume")
    if not isinstance(volume, Path) or live_mount(volume) is None:
        return names  # opening an unmounted volume may repair it, which Tab must not do
    from vsnapfs.daemon import client

    try:
        points = client.call(volume, "rp_list")
    except (VsnapError, OSError, LookupError, TypeError, ValueError):
        return names  # no reason to disturb somebody who pressed Tab
    names += [str(point["number"]) for point in points]
    names += [point["label"] for point in points if point.get("label")]
    return names
