"""Lets clients in at the control socket, without a free descriptor, too.

Owns descriptors that are kept in reserve for that. Promises: as long as the process may have as
many as it has, a newcomer gets in: the soft limit is raised as far as it goes, else one of the
reserve is given up for it. When half of it is gone, newcomers are told to be `short`: they take the
place of somebody who asks nothing, or ask only for what is always answered. What is given up is
taken back as soon as descriptors are free again. Unmounting and closing have the whole reserve as
long as they last: they look for the mount, perhaps start fusermount3, and record how the files are.

A reserve helps only below the limit: if somebody lowers the hard limit of the running process to
fewer descriptors than it has open, nobody gets in until it is raised.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from collections.abc import Awaitable, Callable, Iterator

import trio

from vsnapfs.daemon.process import raise_file_limit

_logger = logging.getLogger("vsnapfs.daemon")

RESERVE = 16  # fusermount3 and its pipes need 7 for a moment
SHORTAGE_SECONDS = 0.1  # between two attempts that found nothing to give up
_TOLD_SECONDS = 60.0  # so often at most server.log says so
_SHORTAGE = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS)


class Reserve:
    """Descriptors that stand for nothing, and can be given up. None before it is filled."""

    def __init__(self, size: int = RESERVE) -> None:
        self._size = size
        self._spare: list[int] = []
        self._most = 0
        self._lent = 0

    def fill(self) -> None:
        """Take back what was given up, as far as there is any."""
        with contextlib.suppress(OSError):
            while len(self._spare) < self._size and not self._lent:
                self._spare.append(os.eventfd(0, os.EFD_CLOEXEC))
                self._most = max(self._most, len(self._spare))

    def is_low(self) -> bool:
        """Whether less than half is left of what there ever was."""
        return 2 * len(self._spare) < self._most

    def give_up_one(self) -> bool:
        """Whether there was one."""
        if self._spare:
            os.close(self._spare.pop())
            return True
        return False

    @contextlib.contextmanager
    def lent(self) -> Iterator[None]:
        """All of it is given up for as long as this lasts."""
        self._lent += 1
        try:
            while self.give_up_one():
                pass
            yield
        finally:
            self._lent -= 1
            self.fill()

    def close(self) -> None:
        """Give it up for good."""
        self._lent += 1
        while self.give_up_one():
            pass


async def let_in(
    listener: trio.SocketListener,
    reserve: Reserve,
    serve: Callable[[trio.SocketStream, bool], Awaitable[None]],
) -> None:
    """Accept until cancelled; `serve` each with whether it is short. It closes the stream, we
    the listener.
    """
    told = trio.current_time() - _TOLD_SECONDS
    reserve.fill()
    async with listener, trio.open_nursery() as nursery:
        while True:
            short = False
            try:
                stream = await listener.accept()
                reserve.fill()
            except OSError as error:
                if error.errno not in _SHORTAGE:
                    raise
                if trio.current_time() - told >= _TOLD_SECONDS:
                    told = trio.current_time()
                    _logger.warning("clients are let in with difficulty: %s", error.strerror)
                raise_file_limit()
                reserve.give_up_one()
                found = await _newcomer(listener)
                if found is None:
                    await trio.sleep(SHORTAGE_SECONDS)
                    continue
                stream, short = found, reserve.is_low()
            nursery.start_soon(serve, stream, short)


async def _newcomer(listener: trio.SocketListener) -> trio.SocketStream | None:
    """Whoever knocks, unless it has gone or there still is no descriptor."""
    with trio.move_on_after(SHORTAGE_SECONDS):
        try:
            return await listener.accept()
        except OSError as error:
            if error.errno not in _SHORTAGE:
                raise
    return None
