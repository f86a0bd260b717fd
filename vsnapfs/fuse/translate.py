"""The one place where an exception becomes the errno a process sees.

Promises: no exception but FUSEError leaves a handler, since pyfuse3 would never answer
that request and would end its loop; ENOTCONN (FUSE's own word for a dead server) and ENOSYS and
EINVAL from fsync (the kernel stops sending it, loop turns it into success) never leave at all.
trio.Cancelled is no Exception and passes untouched.

Leaves the choice of errno to whoever raises: an `OSError` keeps its errno when it is one that a
file system may answer with. Anything else is a defect: EIO, an event 1090, and a traceback in the
server's log, at most once in ten seconds for each kind, so that a defect in the write path cannot
fill the disk.
"""

from __future__ import annotations

import errno
import functools
import logging
import time
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, Protocol, TypeVar

import pyfuse3

from vsnapfs.errors import VsnapError

if TYPE_CHECKING:
    from vsnapfs.events import EventLog

P = ParamSpec("P")
T = TypeVar("T")

_logger = logging.getLogger("vsnapfs.fuse")

# What an OSError may say to a process. All else (EBADF of a closed descriptor, EINVAL, ENOTCONN …)
# would be our defect and is answered with EIO.
_ANSWERS = frozenset(
    {
        errno.EPERM, errno.ENOENT, errno.EIO, errno.ENXIO, errno.ENOMEM, errno.EACCES, errno.EBUSY,
        errno.EEXIST, errno.ENODEV, errno.ENOTDIR, errno.EISDIR, errno.EFBIG, errno.ENOSPC,
        errno.EROFS, errno.ENAMETOOLONG, errno.ENODATA, errno.ESTALE, errno.EDQUOT, errno.ETIMEDOUT,
        errno.EREMOTEIO, errno.EOPNOTSUPP, errno.EUCLEAN,
    }
)  # fmt: skip
# fsync says that the volume is offline, or that data may be lost. Nothing in between.
_FSYNC_ANSWERS = frozenset((errno.ENODEV, errno.EIO))

_QUIET_SECONDS = 10.0


class Translator:
    """Turns exceptions into FUSEError and logs those nobody planned for."""

    def __init__(self, log: EventLog) -> None:
        self._log = log
        # kind of defect -> [when it was logged last, how many were left out since]
        self._logged: dict[tuple[str, str], list[float]] = {}

    def __call__(self, exc: BaseException, what: str) -> pyfuse3.FUSEError:
        """The FUSEError that answers the request `what` after `exc`."""
        if isinstance(exc, pyfuse3.FUSEError):
            return exc
        if isinstance(exc, BaseExceptionGroup):
            return self(self._tell_tale(exc), what)
        if isinstance(exc, OSError | VsnapError):
            code = exc.errno
            if code in _ANSWERS:
                if what == "fsync" and code not in _FSYNC_ANSWERS:
                    code = errno.EIO
                return pyfuse3.FUSEError(code)
        self._unexpected(exc, what)
        return pyfuse3.FUSEError(errno.EIO)

    @staticmethod
    def _tell_tale(group: BaseExceptionGroup[BaseException]) -> BaseException:
        """The leaf of a nursery's group that tells most: one with an errno, else the first."""
        leaves: list[BaseException] = []
        pending: list[BaseException] = [group]
        while pending:
            exc = pending.pop(0)
            if isinstance(exc, BaseExceptionGroup):
                pending.extend(exc.exceptions)
            else:
                leaves.append(exc)
        for leaf in leaves:
            if isinstance(leaf, OSError | VsnapError):
                return leaf
        return leaves[0]

    def _unexpected(self, exc: BaseException, what: str) -> None:
        reason = f"{type(exc).__name__}: {exc}"
        now = time.monotonic()
        seen = self._logged.get((what, reason))
        if seen is not None and now - seen[0] < _QUIET_SECONDS:
            seen[1] += 1
            return
        repeats = int(seen[1]) if seen else 0
        if len(self._logged) > 100:  # reasons that differ each time must not grow without end
            self._logged.clear()
        self._logged[what, reason] = [now, 0]
        _logger.error("unexpected error in %s", what, exc_info=exc)
        try:
            params: dict[str, Any] = {"what": what, "reason": reason}
            if repeats:
                params["repeats"] = repeats
            self._log.log("vsnapfs", 1090, **params)
        except Exception:  # the log itself may be what is broken; the request must be answered
            _logger.exception("cannot log event 1090")


class _HasRefusal(Protocol):
    refusal: Translator


S = TypeVar("S", bound=_HasRefusal)


def translated(
    handler: Callable[Concatenate[S, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[S, P], Coroutine[Any, Any, T]]:
    """Wrap a handler so that only FUSEError (and cancellation) can leave it.

    For all handlers but read and write, which say the same in place to save a coroutine.
    """

    @functools.wraps(handler)
    async def wrapper(self: S, /, *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return await handler(self, *args, **kwargs)
        except Exception as exc:  # noqa: BLE001 - this is the one place
            raise self.refusal(exc, handler.__name__) from None

    return wrapper
