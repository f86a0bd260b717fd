"""volume.toml and the names of a volume's files: what is a volume, and where its parts lie.

Owns `volume.toml`, the one file of a volume that people read: where the replica and the diff area
are, and what was chosen. Promises:

* what `save` wrote, `load` gives back, bit for bit; a crash leaves the old file or the new one;
* `load` never guesses: an unknown key, a wrong type or a foreign version is an error that names the
  file and the key, because a misspelt policy that is silently the default costs recovery points;
* `volume.toml` itself is never followed as a symbolic link and never waited for as a pipe;
* a path that leads out of the volume directory is believed only where nobody but the caller and
  root can have written it (docs/security.md says why);
* neither touches the replica or the diff area.

Leaves sizes to the diff area (the authority for them), locking to `volume`, the existence and
identity of replica and diff area to whoever opens them.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import secrets
import stat
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast, get_args

from vsnapfs.errors import FormatError, UsageError, VsnapError
from vsnapfs.units import format_size

CONFIG_NAME = "volume.toml"
STATE_NAME = "state"
EVENTS_NAME = "events.jsonl"
SOCKET_NAME = "control.sock"
DEFAULT_REPLICA = "replica.img"
DEFAULT_DIFF_AREA = "diff-area"

FORMAT = 1
"""The version of volume.toml that this code reads and writes."""

DEFAULT_GROW_TIMEOUT = 30.0
"""Seconds a write waits for a growth of the diff area. A slow host must not end a night's job."""

SLOW_GROWTH_SECONDS = 3.0
"""A growth of the diff area that takes longer is told, by event 1047 and by `status`."""

DEFAULT_WRITE_BUFFER = 64 << 20
"""Bytes of shared memory for acknowledged writes, while a volume is mounted."""

LEAST_WRITE_BUFFER = 4 << 20
"""Less cannot hold two of the longest writes (1 MiB) wherever they begin."""

OnFull = Literal["offline", "evict"]
POLICIES: tuple[OnFull, ...] = get_args(OnFull)
Durability = Literal["power", "process"]
DURABILITIES: tuple[Durability, ...] = get_args(Durability)
ZeroBlocks = Literal["flag", "copy"]
WAYS_WITH_ZEROS: tuple[ZeroBlocks, ...] = get_args(ZeroBlocks)

# A hand-edited file of six keys is about 1 KiB; two paths of 4 KiB, every byte escaped, are 48 KiB.
_MAX_FILE = 64 * 1024
_MAX_PATH = 4095  # PATH_MAX without its NUL
_MAX_QUOTE = 300
MAX_TIMEOUT = 3600.0
"""The longest `grow-timeout` and `hold-timeout`, in seconds."""
_MOST_WRITE_BUFFER = 1 << 40

_KEYS = {  # key in the file → field of VolumeConfig
    "volume-id": "volume_id",
    "replica": "replica",
    "diff-area": "diff_area",
    "on-full": "on_full",
    "grow-timeout": "grow_timeout",
    "hold-timeout": "hold_timeout",
    "durability": "durability",
    "zero-blocks": "zero_blocks",
}
_REQUIRED = ("volume-id", "replica", "diff-area", "on-full")


@dataclass(frozen=True)
class VolumeConfig:
    """What was chosen for one volume. An instance is always valid: bad values raise `UsageError`.

    volume_id: 32 lower-case hexadecimal digits, also stored in the diff area.
    replica, diff_area: absolute, or relative to the volume directory. Not empty, no NUL, UTF-8.
    on_full: what happens when a block cannot be preserved.
    grow_timeout: seconds a write waits for a growth of the diff area under way. After that it is
    fault 9 (policy `offline`), or it goes on waiting (`evict`).
    hold_timeout: seconds that creating a recovery point may hold writes (event 8 after).
    durability: what recovery points survive: "power" failures, or only the end of the "process".
    zero_blocks: a block of nothing but zeros is preserved as a "flag" for up to 64 neighbours, or
    as a "copy" like any other.
    """

    volume_id: str
    replica: str = DEFAULT_REPLICA
    diff_area: str = DEFAULT_DIFF_AREA
    on_full: OnFull = "offline"
    grow_timeout: float = DEFAULT_GROW_TIMEOUT
    hold_timeout: float = 10.0
    durability: Durability = "power"
    zero_blocks: ZeroBlocks = "flag"

    def __post_init__(self) -> None:
        _check_id(self.volume_id)
        _check_path("replica", self.replica)
        _check_path("diff-area", self.diff_area)
        if self.on_full not in POLICIES:
            raise UsageError(
                f"on-full is {self.on_full!r}, but must be {' or '.join(POLICIES)}", code="config"
            )
        if self.durability not in DURABILITIES:
            raise UsageError(
                f"durability is {self.durability!r}, but must be {' or '.join(DURABILITIES)}",
                code="config",
            )
        if self.zero_blocks not in WAYS_WITH_ZEROS:
            raise UsageError(
                f"zero-blocks is {self.zero_blocks!r}, but must be {' or '.join(WAYS_WITH_ZEROS)}",
                code="config",
            )
        # Integers are welcome ("grow-timeout = 5"), but every reader then sees a float.
        object.__setattr__(
            self, "grow_timeout", _checked_seconds("grow-timeout", self.grow_timeout, zero=True)
        )
        object.__setattr__(
            self, "hold_timeout", _checked_seconds("hold-timeout", self.hold_timeout, zero=False)
        )


class VolumePaths:
    """The absolute names of a volume's files.

    The directory is resolved (symbolic links included), so that two names of one volume compare
    equal and match what the mount table shows. The replica and the diff area are joined to it but
    not resolved further: `/dev/disk/by-id/…` must be looked up at each opening, and a link that
    points elsewhere than at opening is how a removed diff area shows.

    config: saves reading volume.toml again; without it the first use of `replica` or `diff_area`
    reads it (and may raise `VsnapError` as `load` does). The other names need no file at all.
    """

    def __init__(
        self, directory: str | os.PathLike[str], config: VolumeConfig | None = None
    ) -> None:
        self.directory = Path(os.path.realpath(directory))
        self.config = self.directory / CONFIG_NAME
        self.state = self.directory / STATE_NAME
        self.events = self.directory / EVENTS_NAME
        self.socket = self.directory / SOCKET_NAME
        self._given = config

    @cached_property
    def _chosen(self) -> VolumeConfig:
        return self._given if self._given is not None else load(self.directory)

    @property
    def replica(self) -> Path:
        """The live image, or the block device that holds it."""
        return self.directory / self._chosen.replica

    @property
    def diff_area(self) -> Path:
        """The file or block device with the preserved blocks."""
        return self.directory / self._chosen.diff_area


def load(directory: str | os.PathLike[str]) -> VolumeConfig:
    """Read `directory`/volume.toml.

    VsnapError: code "no-volume" when the directory is none or holds no volume.toml, code "config"
    when the file cannot be read or does not say what it must (errno then tells them apart), code
    "not-private" when it leads out of a directory that others could have changed.
    """
    raw, owners = _read(directory)
    name = shown(os.path.join(os.fspath(directory), CONFIG_NAME))
    try:
        table = tomllib.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise _bad(name, f"is not UTF-8 text (byte {error.start})") from error
    except RecursionError as error:
        raise _bad(name, "nests too deeply") from error
    except ValueError as error:  # TOMLDecodeError, and int() refusing thousands of digits
        raise _bad(name, f"is not valid TOML: {_one_line(str(error))}") from error
    version = table.pop("format", None)
    if type(version) is not int or version != FORMAT:
        raise _bad(
            name,
            f"has format {_one_line(repr(version))}, this program knows only {FORMAT}",
            hint="A newer vsnapfs may have made it." if type(version) is int else "",
        )
    unknown = sorted(set(table) - set(_KEYS))
    if unknown:
        raise _bad(
            name,
            f"has unknown keys: {', '.join(_one_line(repr(key)) for key in unknown[:5])}",
            hint=f"Known are: format, {', '.join(_KEYS)}.",
        )
    missing = [key for key in _REQUIRED if key not in table]
    if missing:
        raise _bad(name, f"lacks {', '.join(missing)}")
    try:
        config = VolumeConfig(**{_KEYS[key]: cast(Any, value) for key, value in table.items()})
        _check_apart(directory, config)
    except UsageError as error:
        raise _bad(name, f"is wrong: {error.message}") from error
    for key, value in (("replica", config.replica), ("diff-area", config.diff_area)):
        if leads_out(value):
            _demand_private(name, key, value, owners)
    return config


def leads_out(path: str) -> bool:
    """Whether a configured path may lead out of the volume directory: it is no plain name.

    A plain name is opened without following links; anything else is believed as it stands.
    """
    return os.sep in path


def check_private(directory: str | os.PathLike[str]) -> None:
    """VsnapError ("not-private") unless paths out of the existing `directory` can be believed."""
    name = shown(directory)
    _demand_private(name, "replica or diff-area", "elsewhere", {name: os.stat(directory)})


def save(directory: str | os.PathLike[str], config: VolumeConfig) -> None:
    """Write `directory`/volume.toml: mode 0600, durable, all or nothing.

    UsageError (code "config") when replica and diff area are the same or one of the volume's own
    files. VsnapError (code "config", errno set) when the host refuses; the old file is then intact.
    The caller holds the volume's lock: two savers do no damage, but the last one wins.
    """
    _check_apart(directory, config)
    content = _text(config).encode("utf-8")
    temporary = f".{CONFIG_NAME}.{secrets.token_hex(8)}"
    try:
        folder = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise _no_directory(directory, error) from error
    try:
        try:
            _write_new(folder, temporary, content)
            os.rename(temporary, CONFIG_NAME, src_dir_fd=folder, dst_dir_fd=folder)
        except BaseException:
            _unlink_quietly(folder, temporary)
            raise
        os.fsync(folder)
    except OSError as error:
        name = shown(os.path.join(os.fspath(directory), CONFIG_NAME))
        raise VsnapError(
            f"cannot write {name}: {error.strerror}", errno=error.errno or errno.EIO, code="config"
        ) from error
    finally:
        os.close(folder)


def check_write_buffer(size: int) -> None:
    """UsageError unless a write buffer can have `size` bytes, or 0 for none."""
    if size and not LEAST_WRITE_BUFFER <= size <= _MOST_WRITE_BUFFER:
        raise UsageError(
            f"a write buffer has at least {format_size(LEAST_WRITE_BUFFER)} and at most "
            f"{format_size(_MOST_WRITE_BUFFER)}, not {size} bytes",
            hint="0 is for none.",
        )


def shown(path: str | os.PathLike[str]) -> str:
    """A path as it can be printed anywhere: one line, no terminal escapes, no stray surrogates."""
    return _escaped(os.fsencode(path).decode("utf-8", "backslashreplace"))


# --- reading -----------------------------------------------------------------------------------


def _demand_private(name: str, key: str, value: str, owners: Mapping[str, os.stat_result]) -> None:
    for what, found in owners.items():
        reason = ""
        if found.st_uid not in (0, os.geteuid()):
            reason = f"belongs to another user (uid {found.st_uid})"
        elif found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            reason = f"can be written by others (mode {stat.S_IMODE(found.st_mode):04o})"
        if reason:
            raise VsnapError(
                f"{name}: {key} ({shown(value)}) is a path out of the volume directory, and "
                f"{what} {reason}: it is not followed",
                hint="Who else can change it could make you overwrite any file of yours. If you "
                f"trust it as it is: chown it to you or root, and chmod go-w {what}.",
                errno=errno.EPERM,
                code="not-private",
            )


def _read(directory: str | os.PathLike[str]) -> tuple[bytes, dict[str, os.stat_result]]:
    """The bytes of volume.toml, a regular file of at most 64 KiB; whose it and its directory are.

    Both are looked at through what is open, so nobody can exchange them in between.
    """
    try:
        folder = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise _no_directory(directory, error) from error
    name = shown(os.path.join(os.fspath(directory), CONFIG_NAME))
    try:
        # O_NONBLOCK: a pipe put there would otherwise make every command hang.
        owners = {shown(directory): os.fstat(folder)}
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        fd = os.open(CONFIG_NAME, flags, dir_fd=folder)
    except FileNotFoundError as error:
        raise VsnapError(
            f"{shown(directory)} is not a volume: it holds no {CONFIG_NAME}",
            hint="`vsnapfs create` makes one.",
            errno=errno.ENOENT,
            code="no-volume",
        ) from error
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise _bad(name, "is a symbolic link, which is not followed") from error
        raise _bad(name, f"cannot be opened: {error.strerror}", number=error.errno) from error
    finally:
        os.close(folder)
    try:
        owners[name] = os.fstat(fd)
        if not stat.S_ISREG(owners[name].st_mode):
            raise _bad(name, "is not a regular file")
        raw = b""
        while len(raw) <= _MAX_FILE and (part := os.read(fd, _MAX_FILE + 1 - len(raw))):
            raw += part
    except OSError as error:
        raise _bad(name, f"cannot be read: {error.strerror}", number=error.errno) from error
    finally:
        os.close(fd)
    if len(raw) > _MAX_FILE:
        raise _bad(name, f"is larger than {_MAX_FILE} bytes")
    return raw, owners


def _no_directory(directory: str | os.PathLike[str], error: OSError) -> VsnapError:
    """Make the error for a directory that cannot be opened."""
    return VsnapError(
        f"{shown(directory)} is not a volume: {error.strerror}",
        errno=error.errno or errno.EIO,
        code="no-volume",
    )


def _bad(name: str, what: str, *, hint: str = "", number: int | None = None) -> VsnapError:
    """Make the error for a volume.toml that is there but of no use."""
    error = FormatError(f"{name} {what}", hint=hint, code="config")
    if number is not None:
        error.errno = number
    return error


# --- checking ----------------------------------------------------------------------------------


def _check_id(value: object) -> None:
    if (
        not isinstance(value, str)
        or len(value) != 32
        or not all(digit in "0123456789abcdef" for digit in value)
    ):
        raise UsageError("volume-id is not 32 lower-case hexadecimal digits", code="config")


def _check_path(key: str, value: object) -> None:
    if not isinstance(value, str):
        raise UsageError(f"{key} is not a text", code="config")
    if not value:
        raise UsageError(f"{key} is empty", code="config")
    if "\0" in value:
        raise UsageError(f"{key} contains a NUL character", code="config")
    try:
        encoded = value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UsageError(
            f"{key} is a path that is not UTF-8, which {CONFIG_NAME} cannot hold",
            hint="Rename it, or give another path to it.",
            code="config",
        ) from error
    if len(encoded) > _MAX_PATH:
        raise UsageError(f"{key} is longer than {_MAX_PATH} bytes", code="config")


def _checked_seconds(key: str, value: object, *, zero: bool) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UsageError(f"{key} is not a number of seconds", code="config")
    # Compare before converting: float() of a huge integer overflows.
    if not (0 <= value <= MAX_TIMEOUT) or math.isnan(value) or (value == 0 and not zero):
        least = "0" if zero else "more than 0"
        raise UsageError(f"{key} must be {least} to {MAX_TIMEOUT:.0f} seconds", code="config")
    return float(value)


def _check_apart(directory: str | os.PathLike[str], config: VolumeConfig) -> None:
    """Replica, diff area and the volume's own files must be different names.

    By name only, without touching a file: the same file under two names is found when both are
    open and locked.
    """
    root = os.path.realpath(directory)
    names = {os.path.join(root, name): name for name in _OWN_FILES}
    for key, value in (("replica", config.replica), ("diff-area", config.diff_area)):
        full = os.path.normpath(os.path.join(root, value))
        if full == root or full in names:
            other = names.get(full, "the volume directory")
            raise UsageError(f"{key} is the same as {other}: {shown(value)}", code="config")
        names[full] = f"the {key}"


_OWN_FILES = (CONFIG_NAME, STATE_NAME, EVENTS_NAME, SOCKET_NAME)


# --- writing -----------------------------------------------------------------------------------


def _text(config: VolumeConfig) -> str:
    """volume.toml for people: every key with a line that says what it does."""
    return f"""\
# A vsnapfs volume. Commands rewrite this file whole: values survive, comments of yours do not.
# Sizes are not here; the diff area itself is the authority for them (vsnapfs status, resize).

# The version of this file.
format = {FORMAT}

# Which volume this is. The diff area carries the same number.
volume-id = {_quoted(config.volume_id)}

# The live image, and where old blocks are kept: files or block devices, absolute or relative to
# this directory. Change them only while the volume is not mounted, to follow a file you moved.
replica = {_quoted(config.replica)}
diff-area = {_quoted(config.diff_area)}

# When a block cannot be preserved: "offline" refuses all I/O and keeps every recovery point,
# "evict" deletes the oldest recovery points and lets the write through.
on-full = {_quoted(config.on_full)}

# Seconds that a write waits for a growth of the diff area that is under way, before the volume
# goes offline. With on-full = "evict" it waits until the growth has succeeded or failed.
grow-timeout = {config.grow_timeout!r}

# Seconds that writes may be held while a recovery point is created.
hold-timeout = {config.hold_timeout!r}

# "power": a copy is on the disk before its block is overwritten, so that recovery points survive
# power failures. "process": it is only written before; a power failure can spoil recovery points.
durability = {_quoted(config.durability)}

# Blocks of nothing but zeros: "flag" preserves them in a flag that 64 neighbours share, "copy" as
# any others, so that each first write costs a block.
zero-blocks = {_quoted(config.zero_blocks)}
"""


def _quoted(text: str) -> str:
    """A TOML basic string. JSON's escapes are all TOML's too; only DEL is forbidden besides."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _write_new(folder: int, name: str, content: bytes) -> None:
    """Create `name` in the open directory and bring its content to the disk."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(name, flags, 0o600, dir_fd=folder)
    with open(fd, "wb") as file:
        os.fchmod(fd, 0o600)  # whatever the umask took away
        file.write(content)
        file.flush()
        os.fsync(fd)


def _unlink_quietly(folder: int, name: str) -> None:
    # Nothing better to do on failure: the error that brought us here is the one to report.
    with contextlib.suppress(OSError):
        os.unlink(name, dir_fd=folder)


def _one_line(text: str) -> str:
    """Foreign text quoted in an error: escaped, and short enough to be read."""
    return _escaped(text if len(text) <= _MAX_QUOTE else text[: _MAX_QUOTE - 3] + "...")


def _escaped(text: str) -> str:
    """`text` with line breaks, control characters and surrogates as backslash escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
