"""SIGTERM and SIGHUP as exceptions, for commands that have something to clean up.

Promises that inside `unwinding()` a polite request to end runs `finally` blocks (a half-made volume
or file is removed), and that the exit code is 128 + signal number as for any killed program.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def unwinding() -> Iterator[None]:
    """Within the block, SIGTERM and SIGHUP raise SystemExit. Elsewhere they end the process."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signal handlers can only be set there; a caller in a thread has its own
        return
    old = {
        number: signal.signal(number, _raise)
        for number in (signal.SIGTERM, signal.SIGHUP)
        if signal.getsignal(number) is not signal.SIG_IGN  # nohup stays in force
    }
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def _raise(number: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + number)
