"""The process that serves: its limits, its memory, its log, and exceptions that come in groups.

Promises that nothing here can keep a volume from being served: what the machine does not allow is
left out. Leaves the order of things to `lifecycle`.
"""

from __future__ import annotations

import ctypes
import errno
import io
import logging
import os
import resource
import stat
import sys
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

import trio

from vsnapfs.belonging import open_or_make
from vsnapfs.errors import VsnapError

T = TypeVar("T")

LOG_NAME = "server.log"
_PR_SET_IO_FLUSHER = 57
# Far enough down that others are killed first, not so far that nothing could free a machine on
# which this process itself is what eats the memory.
_OOM_SCORE = -500
# trio hears of what a thread says in the second.
_TURNS = 100

_logger = logging.getLogger("vsnapfs.daemon")


def prepare() -> None:
    """Make this process fit to serve. Before any thread starts: they inherit what is set here."""
    os.umask(0o077)
    _outlive_what_is_mounted()
    raise_file_limit()
    _become_io_flusher()
    try:
        Path("/proc/self/oom_score_adj").write_text(f"{_OOM_SCORE}\n")
    except OSError:
        pass  # needs CAP_SYS_RESOURCE


def _outlive_what_is_mounted() -> None:
    """Have a kill close our mount before the kernel takes down our mount namespace.

    The last process of a namespace (of a container, a service) unmounts what is mounted there as a
    part of its own end, and lets go of its files after that. A file system on our own loop device
    would wait for /dev/fuse to be answered or closed: for ever, with the volume locked. With a
    descriptor that holds the namespace it is one of these files, and what closing it leaves to do
    is done when all of them, /dev/fuse too, have been let go of.
    """
    try:
        os.open("/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        pass  # a /proc that does not show us


def raise_file_limit() -> None:
    """As many descriptors as this process may have."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (OSError, ValueError):
        pass  # some systems report a hard limit that cannot be reached; the soft one stays


def _become_io_flusher() -> bool:
    """Tell the kernel that reclaiming memory must not wait for this process.

    Without it, a loop device over this server can hang the machine when memory is short: we need
    memory to write, and the kernel would want to write through us to get it. Needs
    CAP_SYS_RESOURCE, which whoever may set up a loop device has.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    zero = ctypes.c_ulong(0)
    return bool(libc.prctl(_PR_SET_IO_FLUSHER, ctypes.c_ulong(1), zero, zero, zero) == 0)


def open_log(directory: Path) -> int:
    """Open the volume's server.log for appending (0600, no symbolic link); a file descriptor."""
    try:
        flags = os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        # O_NONBLOCK: a pipe put there must not keep us waiting.
        fd = open_or_make(directory / LOG_NAME, flags | os.O_NONBLOCK)
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise OSError(errno.EINVAL, "it is not a regular file")
        return fd
    except OSError as error:
        raise VsnapError(
            f"cannot open {directory}/{LOG_NAME}: {error.strerror}", errno=error.errno or 5
        ) from error


def log_to_stderr() -> None:
    """What modules say through `logging`, warnings and worse, with the time. In UTF-8, whatever
    the locale: stderr is server.log, which is read back as that.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s", "%Y-%m-%dT%H:%M:%S%z")
    )
    logging.getLogger().addHandler(handler)
    logging.getLogger().setLevel(logging.WARNING)


def run_trio(function: Callable[[], Awaitable[T]]) -> T:
    """trio.run, but a failure leaves it as itself, never wrapped in the groups of nurseries.

    Strict groups on every trio version, so that both the oldest and the newest we support behave
    the same here. MemoryError, too, if it was trio itself that found no memory: it calls anything
    that hits its own tasks an error of its own. If that was the one that hears of threads,
    or a thread had no memory to begin, the process ends at once, as by a kill: what waits for a
    thread would wait for ever.
    """
    is_over = False

    async def main() -> T:
        nonlocal is_over
        trio.lowlevel.spawn_system_task(_end_without_threads, lambda: is_over)
        try:
            return await function()
        finally:
            is_over = True

    hook = sys.unraisablehook
    sys.unraisablehook = partial(_end_without_a_thread, hook)
    try:
        result: T = trio.run(main, strict_exception_groups=True)
    except BaseExceptionGroup as group:
        raise leading(group) from group
    except trio.TrioInternalError as error:
        if error.__cause__ is not None and any(
            isinstance(leaf, MemoryError) for leaf in _leaves(error.__cause__)
        ):
            raise MemoryError from error
        raise
    finally:
        sys.unraisablehook = hook
    return result


def _end_without_a_thread(
    otherwise: Callable[[sys.UnraisableHookArgs], object], what: sys.UnraisableHookArgs
) -> None:
    """sys.unraisablehook: end this process if what failed is the beginning of a thread."""
    try:
        otherwise(what)
    finally:
        # What the thread's own function raises does not come here.
        if (what.err_msg or "").startswith("Exception ignored in thread started by"):
            os._exit(1)


async def _end_without_threads(is_over: Callable[[], bool]) -> None:
    """End this process if trio is ending, `is_over` is not, and threads are not heard any more."""
    try:
        await trio.sleep_forever()
    except trio.Cancelled:
        if not is_over() and not await _threads_are_heard():
            _logger.critical("trio has failed, most likely for lack of memory: ending as if killed")
            os._exit(1)
        raise


async def _threads_are_heard() -> bool:
    heard: list[None] = []
    trio.lowlevel.current_trio_token().run_sync_soon(heard.append, None)
    with trio.CancelScope(shield=True):
        # In turns, not seconds: the host may have held up the loop for any time.
        for _ in range(_TURNS):
            await trio.lowlevel.checkpoint()
    return bool(heard)


def leading(exc: BaseException) -> BaseException:
    """The exception in nested groups that tells most.

    An interruption before all, then a VsnapError, then the first.
    """
    leaves = _leaves(exc)
    for kind in (KeyboardInterrupt, VsnapError):
        for leaf in leaves:
            if isinstance(leaf, kind):
                return leaf
    return leaves[0]


def _leaves(exc: BaseException) -> list[BaseException]:
    """The exceptions in nested groups, outer ones first."""
    leaves: list[BaseException] = []
    pending = [exc]
    while pending:
        one = pending.pop(0)
        if isinstance(one, BaseExceptionGroup):
            pending.extend(one.exceptions)
        else:
            leaves.append(one)
    return leaves
