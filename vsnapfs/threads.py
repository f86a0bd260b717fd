"""Threads that help, where there is memory for them.

`Thread.start` waits until the new thread runs; one that lacks memory for its first steps never says
so, and its maker waits for ever. So there must be memory to spare before any is made, and all are
made at once: later, one that cannot be started would leave its work behind, to be done when nobody
expects it any more.
"""

from __future__ import annotations

import mmap
import threading
from concurrent.futures import ThreadPoolExecutor

#: For the stack of a thread (8 MiB by default) and what it needs to begin with.
_EACH = 16 << 20


def started(count: int, name: str) -> ThreadPoolExecutor | None:
    """A pool whose `count` threads run; None where there is no memory for them."""
    try:
        mmap.mmap(-1, count * _EACH, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS).close()
    except (OSError, MemoryError):
        return None
    pool = ThreadPoolExecutor(count, name)
    running = threading.Barrier(count + 1)
    try:
        for _ in range(count):
            pool.submit(running.wait)
        running.wait()
    except (RuntimeError, MemoryError):
        running.abort()
        pool.shutdown(cancel_futures=True)
        return None
    return pool
