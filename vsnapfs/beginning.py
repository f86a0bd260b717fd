"""The moment at which an operation begins, and whether anybody still wants it then.

Whoever asks for an operation may give it up while it waits for its turn: Ctrl-C, a time limit, a
kill. Such an operation must never be carried out later. So the engine calls `begin` right before
the first thing that could be noticed afterwards, and whoever carries requests out answers through
`asked_by`. Promises: before `begin` an operation has changed nothing and may be cancelled at any
await; after it the operation is no longer given up, whoever leaves.

A leaf: the engine asks, `daemon` answers, and neither knows the other. The answer travels with the
task (a context variable), so that a write, for which nobody asked, passes `begin` unasked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

MayBegin = Callable[[], bool]
"""Asked once, in the trio thread, and at once: no await lies between the answer and the change."""

_may_begin: ContextVar[MayBegin | None] = ContextVar("may_begin", default=None)


class Abandoned(Exception):
    """Nobody wants the operation any more. Nothing has been changed.

    Neither a VsnapError nor an OSError: no layer on the way may take it for a failure.
    """


@contextmanager
def asked_by(may_begin: MayBegin) -> Iterator[None]:
    """What this task does in the block begins only if `may_begin` still says yes by then."""
    token = _may_begin.set(may_begin)
    try:
        yield
    finally:
        _may_begin.reset(token)


def begin() -> None:
    """From here on the operation runs to its end. Abandoned if nobody wants it any more."""
    may_begin = _may_begin.get()
    if may_begin is not None and not may_begin():
        raise Abandoned
