"""Ctrl-C while a command waits for its operation: what it is told, exactly.

Owns the signal meanwhile. An exception out of the signal handler could fall between reading a
message and remembering it; so the first Ctrl-C is only noted here and told to whoever can end the
waiting in an orderly way (shut the socket down, cancel the operation). Promises: the words of
`interrupted` are true; a second Ctrl-C is told as well.

Only in the main thread, and only where Ctrl-C means what it does by default: elsewhere signals
belong to somebody else.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Self

from vsnapfs.daemon.operations import Operation
from vsnapfs.errors import VsnapError

EXIT_INTERRUPTED = 130


class CtrlC:
    """Within the block Ctrl-C is counted (`count`) and told to whoever is `reacting`."""

    def __init__(self) -> None:
        self.count = 0
        self._react: Callable[[], None] = _nothing
        self._ours = False

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if self._ours:
            signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        if self._ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _note(self, _number: int, _frame: FrameType | None) -> None:
        self.count += 1
        self._react()

    @contextmanager
    def reacting(self, react: Callable[[], None]) -> Iterator[None]:
        """In the block `react` is called for each Ctrl-C, at once for one that came before.

        It runs in the signal handler, in the main thread, between any two steps.
        """
        self._react = react
        if self.count:
            react()
        try:
            yield
        finally:
            self._react = _nothing


def _nothing() -> None:
    """Nobody is there to react: `count` is looked at later."""


def interrupted(operation: Operation, fate: str, hint: str = "") -> BaseException:
    """What leaves a command that was interrupted. fate: what has become of the operation.

    For one that only looks it is KeyboardInterrupt: there is nothing to say.
    """
    if operation.interruptible:
        return KeyboardInterrupt()
    return VsnapError(
        f"interrupted: {operation.gerund} {fate}",
        hint=hint,
        errno=4,
        exit_code=EXIT_INTERRUPTED,
        code="interrupted",
    )
