"""What may be found on a disk after the power failed or the process was killed.

Owns these statements and nothing else: `account` makes them, `judge` compares with them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from simdisk import Snapshot
from unsynced import Sectors, made_durable, overwritten

from vsnapfs.volume.ring import Ring, read_head


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


def without(expected: Expected, gone: dict[int, bytes]) -> Expected:
    """The same where these points may be there, and need not be."""
    must = {number: held for number, held in expected.must.items() if number not in gone}
    return replace(expected, must=must, may={**expected.may, **gone})


def kept(sectors: Sectors, answered: list[tuple[int, bytes]]) -> Sectors:
    """What has been answered is kept, of the others nothing is known yet."""
    for job in answered:
        sectors = made_durable(sectors, *job)
    return sectors


def carried_out_again(sectors: Sectors, memory: Mapping[bytes, bytes]) -> Sectors:
    """The same while an opening after a kill carries out the rings in `memory`.

    Some of it may be in the replica already: for a moment an older write lies over a newer one.
    """
    for data in memory.values():
        copy = bytearray(data)
        head = read_head(copy)
        ring = Ring.found(copy, head.name, head.volume_id)
        for record in ring.records():
            sectors = overwritten(sectors, record.offset, bytes(ring.data(record)))
    return sectors
