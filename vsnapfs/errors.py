"""What can go wrong, in one place: errors for people, faults of the protection mode.

Owns the exception classes and the list of faults. Two kinds of failure exist:

* `VsnapError`: a command cannot be carried out. Its message says what happened and to which
  volume, its hint what to do next; `exit_code` is what a script sees.
* plain `OSError` with the errno that docs/faults.md lists: a request on the data path is refused
  (ENODEV offline, ENOSPC refused, EIO bad checksum or failed read, ESTALE deleted point).

Leaves the wording of logged events to `events`, and raising faults to `volume`.
"""

from __future__ import annotations

import errno as _errno
from dataclasses import asdict, dataclass, fields
from enum import IntEnum
from typing import Any


class VsnapError(Exception):
    """A command failed. `str(error)` is one sentence; `hint` says what to do next.

    code: a word scripts can compare ("busy", "no-such-point", …).
    errno: what a file system request gets if this error reaches the FUSE layer.
    """

    def __init__(
        self,
        message: str,
        *,
        hint: str = "",
        errno: int = _errno.EIO,
        exit_code: int = 1,
        code: str = "error",
    ) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.errno = errno
        self.exit_code = exit_code
        self.code = code

    def to_json(self) -> dict[str, Any]:
        """The error as it travels over the control socket."""
        return {
            "message": self.message,
            "hint": self.hint,
            "errno": self.errno,
            "exit_code": self.exit_code,
            "code": self.code,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> VsnapError:
        """The inverse of `to_json`; unknown, missing or senseless values are tolerated."""
        return VsnapError(
            str(data.get("message", "unknown error")),
            hint=str(data.get("hint", "")),
            errno=_number(data.get("errno"), 2**31 - 1, _errno.EIO),
            exit_code=_number(data.get("exit_code"), 255, 1),
            code=str(data.get("code", "error")),
        )


def _number(value: object, largest: int, default: int) -> int:
    return value if isinstance(value, int) and 0 < value <= largest else default


class UsageError(VsnapError):
    """Bad input: nothing was changed. Exit code 2, like a wrong option."""

    def __init__(self, message: str, *, hint: str = "", code: str = "usage") -> None:
        super().__init__(message, hint=hint, errno=_errno.EINVAL, exit_code=2, code=code)


class BusyError(VsnapError):
    """Something is in use: another process, an open file, a restore under way."""

    def __init__(self, message: str, *, hint: str = "", code: str = "busy") -> None:
        super().__init__(message, hint=hint, errno=_errno.EBUSY, code=code)


class FormatError(VsnapError):
    """A structure on disk is not what it should be (foreign, truncated, other version, rotted)."""

    def __init__(self, message: str, *, hint: str = "", code: str = "format") -> None:
        super().__init__(message, hint=hint, errno=_errno.EIO, code=code)


class FaultCode(IntEnum):
    """The numbers of VSS_PROTECTION_FAULT; the volsnap event id is 79 more."""

    DIFF_AREA_MISSING = 1
    IO_FAILURE_DURING_ONLINE = 2
    META_DATA_CORRUPTION = 3
    MEMORY_ALLOCATION_FAILURE = 4
    MAPPED_MEMORY_FAILURE = 5
    COW_READ_FAILURE = 6
    COW_WRITE_FAILURE = 7
    DIFF_AREA_FULL = 8
    GROW_TOO_SLOW = 9
    GROW_FAILED = 10
    DESTROY_ALL_SNAPSHOTS = 11
    FILE_SYSTEM_FAILURE = 12
    IO_FAILURE = 13
    DIFF_AREA_REMOVED = 14
    EXTERNAL_WRITER_TO_DIFF_AREA = 15

    @property
    def event_id(self) -> int:
        """The id of the volsnap event that reports this fault."""
        return 79 + self.value


_LARGEST = (2**63 - 1, 2**31 - 1)  # any number of a fault; its errno


@dataclass(frozen=True)
class Fault:
    """Why a copy could not be made, with everything Windows' own events leave out.

    time: nanoseconds since the epoch, UTC. block, offset, length: the block and the write that
    tripped it (None when no write did, for example at open). needed: how many blocks that write
    still had to preserve. used, allocated, maximum: bytes, metadata included.
    """

    code: FaultCode
    errno: int
    message: str
    time: int
    block: int | None = None
    offset: int | None = None
    length: int | None = None
    needed: int | None = None
    used: int | None = None
    allocated: int | None = None
    maximum: int | None = None
    diff_area: str | None = None

    @property
    def name(self) -> str:
        """The fault's name without its prefix, e.g. DIFF_AREA_FULL."""
        return self.code.name

    @property
    def event_id(self) -> int:
        """The id of the volsnap event, 79 + fault number."""
        return self.code.event_id

    def to_json(self) -> dict[str, Any]:
        """All fields, plus `name` and `event_id`."""
        data = asdict(self)
        data["code"] = int(self.code)
        return data | {"name": self.name, "event_id": self.event_id}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Fault:
        """The inverse of `to_json`. ValueError, KeyError or TypeError when it is no fault.

        It comes from disk: nothing of another type or an impossible size gets any further.
        """
        if not isinstance(data, dict):
            raise TypeError("a fault is an object")
        known = {f.name for f in fields(cls)}
        kept = {key: value for key, value in data.items() if key in known}
        fault = cls(**kept | {"code": FaultCode(data["code"])})
        for name in known - {"code"}:
            value = getattr(fault, name)
            if name in ("message", "diff_area"):
                good = isinstance(value, str) or (value is None and name == "diff_area")
            elif value is None:
                good = name not in ("errno", "time")
            else:
                good = type(value) is int and 0 <= value <= _LARGEST[name == "errno"]
            if not good:
                raise ValueError(f"a fault's {name} cannot be {value!r:.40}")
        return fault


class FaultError(Exception):
    """Raised inside the engine where a copy fails; `volume` turns it into a `Fault`.

    Never leaves `volume`: the writer that tripped it gets ENODEV.
    """

    def __init__(
        self, code: FaultCode, message: str, *, errno: int = _errno.EIO, block: int | None = None
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.errno = errno
        self.block = block


def unexpected(error: Exception, block: int | None) -> FaultError:
    """The fault that stands for an error nobody planned for."""
    if isinstance(error, MemoryError):
        text = "there is not enough memory"
        code = FaultCode.MEMORY_ALLOCATION_FAILURE
        return FaultError(code, text, errno=_errno.ENOMEM, block=block)
    return FaultError(FaultCode.DESTROY_ALL_SNAPSHOTS, f"unexpected: {error!r}", block=block)
