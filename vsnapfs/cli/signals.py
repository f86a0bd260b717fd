"""SIGTERM and SIGHUP as exceptions, for commands that have something to clean up.

For synchronous code: inside trio an exception out of nowhere would break the scheduler, so there
`trio.open_signal_receiver` takes its place. Promises that inside `unwinding()` a polite request to
end runs `finally` blocks (a half-made volume is removed), and that the exit code is 128 + signal
number as for any killed program.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

TERMINATING = (signal.SIGTERM, signal.SIGHUP)


@contextmanager
def unwinding() -> Iterator[None]:
    """Within the block, SIGTERM and SIGHUP raise SystemExit. Elsewhere they end the process."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signal handlers can only be set there; a caller in a thread has its own
        return
    old = {
        number: signal.signal(number, _raise)
        for number in TERMINATING
        if signal.getsignal(number) is not signal.SIG_IGN  # nohup stays in force
    }
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def _raise(number: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + number)
