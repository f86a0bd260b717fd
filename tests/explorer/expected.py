"""What may be found on a disk after the power failed or the process was killed.

Owns these statements and nothing else: `account` makes them, `judge` compares with them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from simdisk import Snapshot
from unsynced import Sectors


@dataclass(frozen=True)
class Expected:
    """What may be found after the power failed.

    must, may: recovery points that are there, that may be there (number → content). sectors: what
    each sector of the replica may hold; exact: the same if nothing was lost (W3). restored: what a
    restore under way may bring instead. offline: None when it may be both; fault: its number then.
    maxima: possible maxima of the diff area. newest: the highest number that was answered.
    """

    must: dict[int, bytes] = field(default_factory=dict)
    may: dict[int, bytes] = field(default_factory=dict)
    sectors: Sectors = ()
    exact: Sectors = ()
    restored: bytes | None = None
    offline: bool | None = False
    fault: int | None = None
    maxima: frozenset[int] = frozenset()
    newest: int = 0


class Span:
    """What is expected of all states of the disk recorded in it; known when it has ended."""

    __slots__ = ("expected", "number")
    count = 0

    def __init__(self) -> None:
        Span.count += 1
        self.number = Span.count
        self.expected: Expected


State = tuple[Snapshot, Span, tuple[str, int] | None]
