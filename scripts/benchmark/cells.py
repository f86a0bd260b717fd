"""What is measured: the named cells, the short list, and the full cross.

A cell is one pattern of I/O on one state of the volume. Its name says all of it:
STATE-PATTERN-BLOCK-qdDEPTH[-fsync][-warm|-cold], so that a name is all that a report needs.

States (`State`):
  copied   every block was preserved already; writes overwrite, reads read the replica
  first    a fresh recovery point; each write goes where nothing was written since: one to each
           64 KiB, the largest unit in which any of the systems copies, in random order; a whole
           pass over the image if it is sequential
  once     a fresh recovery point; each of the cell's blocks is written once, in random order, so
           that of those smaller than the system's unit of copying only some are a first touch
  point    reading a recovery point, half of whose content was preserved since, 1 point deep
  point100 the same half, but preserved in 100 epochs: the oldest of 100 points is read
  cached   buffered re-read of the recovery point of `point`
  ext4     the volume holds an ext4 behind a loop device: fio on a file in it, after a fresh point
  ext4copied  the same after every block of that file was preserved

Cold: the page cache was dropped just before. Warm: dropped, then the whole span was read once with
the cell's own block size (so the folios in the cache are as small as the requests).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

KIB = 1 << 10
MIB = 1 << 20

State = Literal["copied", "first", "once", "point", "point100", "cached", "ext4", "ext4copied"]
Pattern = Literal["randwrite", "randread", "write", "read", "randrw"]

REGION = 64 * KIB  # what QEMU and nbdkit copy at once; four blocks of vsnapfs as it is created
MIXED_READS = 70  # percent of reads in randrw


@dataclass(frozen=True)
class Cell:
    """One measurement. Sizes in bytes; depth: requests in flight.

    span: bytes of the file that are used. seconds: how long, over and over; None: one pass, in
    which each block of the span, or one in each region of it (`scattered`), has its turn once.
    sync: an fsync after every write.
    """

    state: State
    pattern: Pattern
    block: int
    depth: int
    warm: bool
    span: int
    seconds: float | None = None
    sync: bool = False

    @property
    def name(self) -> str:
        """Unique among all cells; what --cells takes."""
        parts = [self.state, self.pattern, block_name(self.block), f"qd{self.depth}"]
        if self.sync:
            parts.append("fsync")
        if self.state != "cached":  # always warm
            parts.append("warm" if self.warm else "cold")
        return "-".join(parts)

    @property
    def writes(self) -> bool:
        """Whether it writes at all."""
        return self.pattern in {"randwrite", "write", "randrw"}

    @property
    def reads_point(self) -> bool:
        """Whether it reads a recovery point and not the live file."""
        return self.state in {"point", "point100", "cached"}

    @property
    def points(self) -> int:
        """How many recovery points there are when it is measured."""
        return 100 if self.state == "point100" else 1

    @property
    def scattered(self) -> bool:
        """Whether a pass is one block in each REGION of the span, and not every block."""
        return self.state == "first" and self.pattern == "randwrite" and self.block < REGION

    @property
    def requests(self) -> int:
        """How many requests one pass is."""
        return self.span // (REGION if self.scattered else self.block)

    @property
    def on_ext4(self) -> bool:
        """Whether fio runs on a file in an ext4 on a loop device."""
        return self.state in {"ext4", "ext4copied"}

    @property
    def buffered(self) -> bool:
        """Whether fio goes through the page cache (direct=0)."""
        return self.state == "cached"

    @property
    def all_synced(self) -> bool:
        """Whether the measured time ends with an fsync: where bytes per second are the point."""
        return self.pattern == "write"

    @property
    def image_size(self) -> int:
        """Bytes of the volume: the span, or an ext4 that holds a file of that size."""
        return self.span * 3 // 2 if self.on_ext4 else self.span

    def shorter(self) -> Cell:
        """The same cell for --quick: half the bytes, less time."""
        return replace(
            self,
            span=self.span // 2,
            seconds=None if self.seconds is None else max(1.0, self.seconds / 2),
        )


def block_name(block: int) -> str:
    """16384 -> "16k"."""
    return f"{block // MIB}m" if block >= MIB else f"{block // KIB}k"


def _span(state: State, block: int) -> int:
    """Enough for a second on a fast system where that is possible, not too much for a slow one."""
    if state == "first":
        return 512 * MIB
    if state in {"point", "point100", "cached", "ext4", "ext4copied"} or block > 4 * KIB:
        return 128 * MIB
    return 64 * MIB


def _cell(
    state: State, pattern: Pattern, block: int, depth: int, cache: str, *, sync: bool = False
) -> Cell:
    # First touch and cold reads are over when each block had its turn; what has no end is timed.
    endless = state in {"copied", "cached", "ext4copied"} and not (
        pattern == "write" or (cache == "cold" and pattern in {"randread", "read"})
    )
    return Cell(
        state=state,
        pattern=pattern,
        block=block,
        depth=depth,
        warm=cache == "warm",
        span=_span(state, block),
        seconds=3.0 if endless else None,
        sync=sync,
    )


NAMED: tuple[Cell, ...] = (
    _cell("copied", "randwrite", 4 * KIB, 1, "warm"),
    _cell("copied", "randread", 4 * KIB, 1, "warm"),
    _cell("copied", "randwrite", 4 * KIB, 32, "warm"),
    _cell("copied", "randread", 4 * KIB, 32, "warm"),
    _cell("copied", "randread", 4 * KIB, 32, "cold"),
    _cell("copied", "randwrite", 4 * KIB, 1, "warm", sync=True),
    _cell("first", "randwrite", 4 * KIB, 1, "cold"),
    _cell("first", "randwrite", 16 * KIB, 1, "cold"),
    _cell("first", "randwrite", 16 * KIB, 32, "cold"),
    _cell("first", "randwrite", 16 * KIB, 32, "warm"),
    _cell("first", "randwrite", 64 * KIB, 32, "cold"),
    _cell("first", "write", MIB, 4, "cold"),
    _cell("once", "randwrite", 4 * KIB, 1, "cold"),
    _cell("once", "randwrite", 16 * KIB, 32, "cold"),
    _cell("point", "randread", 4 * KIB, 32, "cold"),
    _cell("point", "randread", 4 * KIB, 32, "warm"),
    _cell("point", "read", MIB, 4, "cold"),
    _cell("point100", "randread", 4 * KIB, 32, "cold"),
    _cell("point100", "randread", 4 * KIB, 32, "warm"),
    _cell("point100", "read", MIB, 4, "cold"),
    _cell("cached", "randread", 4 * KIB, 1, "warm"),
    _cell("cached", "read", MIB, 1, "warm"),
    _cell("ext4", "randrw", 16 * KIB, 8, "cold"),
    _cell("ext4copied", "randrw", 16 * KIB, 8, "warm"),
)
"""The cells of an ordinary run: every row of the aims, and what explains it. At most 24."""

QUICK: tuple[Cell, ...] = tuple(
    cell.shorter()
    for cell in NAMED
    if cell.name
    in {
        "copied-randwrite-4k-qd1-warm",
        "copied-randread-4k-qd1-warm",
        "copied-randwrite-4k-qd32-warm",
        "copied-randread-4k-qd32-warm",
        "first-randwrite-4k-qd1-cold",
        "first-randwrite-16k-qd32-cold",
        "first-randwrite-64k-qd32-cold",
        "first-write-1m-qd4-cold",
        "point-randread-4k-qd32-cold",
        "cached-read-1m-qd1",
        "ext4-randrw-16k-qd8-cold",
    }
)
"""The cells of --quick: one for each row of the aims, or nearly."""


def full_cross() -> tuple[Cell, ...]:
    """The cells of --all: each state with each pattern, block size, depth and cache it can have."""
    found: dict[str, Cell] = {cell.name: cell for cell in NAMED}
    for cell in _cross():
        found.setdefault(cell.name, cell)
    return tuple(found.values())


def _cross() -> Iterator[Cell]:
    small = (4 * KIB, 16 * KIB, 64 * KIB)
    for block, depth, cache in itertools.product(small, (1, 8, 32), ("warm", "cold")):
        yield _cell("copied", "randwrite", block, depth, cache)
        yield _cell("first", "randwrite", block, depth, cache)
        yield _cell("once", "randwrite", block, depth, cache)
        yield _cell("copied", "randread", block, depth, cache)
        yield _cell("point", "randread", block, depth, cache)
        yield _cell("point100", "randread", block, depth, cache)
    for depth, cache in itertools.product((1, 4), ("warm", "cold")):
        yield _cell("copied", "write", MIB, depth, cache)
        yield _cell("copied", "read", MIB, depth, cache)
        yield _cell("first", "write", MIB, depth, cache)
        yield _cell("point", "read", MIB, depth, cache)
        yield _cell("point100", "read", MIB, depth, cache)
    for block, depth in itertools.product(small, (1, 32)):
        yield _cell("cached", "randread", block, depth, "warm")
        yield _cell("copied", "randwrite", block, depth, "warm", sync=True)
    for block, depth in itertools.product((4 * KIB, 16 * KIB, 64 * KIB), (1, 8, 32)):
        yield _cell("ext4", "randrw", block, depth, "cold")
        yield _cell("ext4copied", "randrw", block, depth, "warm")
