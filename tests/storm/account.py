"""The model: what may lie in each cell of the replica, and what each recovery point must be.

A cell is a range of bytes that one client at a time writes to, wholly. Whoever asks and whoever is
answered moves the clock on, so that "before" is a comparison of two numbers. Nothing here knows the
engine: an `Account` can be copied, and put back together with a copy of the files.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

#: The content of each is its writer's; cells are made of whole ones.
WORD = 16
#: Where a write that fails half way may end.
_PIECE = WORD // 2
Fate = Literal["asked", "done", "refused", "torn"]


@dataclass(eq=False, slots=True)
class Entry:
    """Content that somebody has put into a cell, or has tried to.

    asked: not answered yet. torn: it may be there, or not, or some words of it.
    """

    number: int
    data: bytes
    start: int
    end: int | None = None
    fate: Fate = "asked"


@dataclass(eq=False, slots=True)
class Cell:
    """Bytes start … end - 1."""

    start: int
    end: int
    #: What reading the replica may show; what a power failure may leave.
    now: list[Entry] = field(default_factory=list)
    disk: list[Entry] = field(default_factory=list)
    #: All since the volume was last compared with this.
    log: list[Entry] = field(default_factory=list)
    busy: bool = False

    def of(self, content: bytes) -> bytes:
        return content[self.start : self.end]

    def begin(self, entry: Entry) -> None:
        for entries in (self.now, self.disk, self.log):
            entries.append(entry)

    def refused(self, entry: Entry) -> None:
        for entries in (self.now, self.disk):
            if entry in entries:
                entries.remove(entry)

    def settled(self, entry: Entry, *, durably: bool, afresh: bool) -> None:
        """It is what lies there, with nothing under way. afresh: nobody asks what was before."""
        self.now = [entry]
        self.log = [entry] if afresh else [*self.log, entry]
        self.disk = [entry] if durably else [*self.disk, entry]

    def instants(self, data: bytes, first: int, last: int) -> set[int]:
        """When from `first` to `last` the cell may have held exactly `data`."""
        found: set[int] = set()
        for entry in self.log:
            if entry.fate == "refused" or entry.data != data:
                continue
            end = last
            if entry.end is not None:
                after = (e.end for e in self.log if e.fate == "done" and e.start > entry.end)
                end = min([last, *(one for one in after if one is not None)])
            found.update(range(max(first, entry.start), end + 1))
        return found


def fits(data: bytes, entries: Iterable[Entry]) -> bool:
    """Whether it is one of them, or each word of it is of one of them."""
    return wrong_word(data, entries) is None


def wrong_word(data: bytes, entries: Iterable[Entry]) -> int | None:
    """Where the first piece of a word begins that is of none of them."""
    known = [entry.data for entry in entries if entry.fate != "refused"]
    if data in known:
        return None
    for at in range(0, len(data), _PIECE):
        if all(data[at : at + _PIECE] != one[at : at + _PIECE] for one in known):
            return at
    return None


@dataclass(eq=False)
class Point:
    """A recovery point: asked for at `start`, answered at `end`, and its content once known."""

    start: int
    end: int | None = None
    content: bytes | None = None
    #: What a failed sync had lost may have been in it.
    loosely: bool = False


@dataclass(eq=False)
class Restoring:
    """A restore in place that has begun and has not been seen to have ended."""

    number: int
    entries: list[Entry]


#: When it was asked for, what could be read then, and whether that was all.
Flush = tuple[int, list[list[Entry]], bool]


class Account:
    """Everything that is known of one volume."""

    def __init__(self, size: int, dice: random.Random) -> None:
        self.size = size
        cuts = {WORD * dice.randrange(1, size // WORD) for _ in range(dice.choice([8, 20, 40]))}
        self.cells = [Cell(a, b) for a, b in pairwise(sorted({0, size} | cuts))]
        self.time = 0
        self.points: dict[int, Point] = {}
        #: Creations and deletions without an answer, and those that failed.
        self.creating: list[Point] = []
        self.deleting: Counter[int] = Counter()
        #: Deleted in this life.
        self.deleted: set[int] = set()
        self.restoring: Restoring | None = None
        #: One whose beginning could not be recorded for sure: the next opening may find it begun.
        self.doubtful: Restoring | None = None
        #: A sync has failed (or the files are a backup): what a power failure may leave may show
        #: now. Nothing that was answered before is made durable by what comes now.
        self.lossy = False
        #: A ring was removed: after a kill the same may show.
        self.ring_removed = False
        #: Somebody was told that the volume is offline, and nobody has asked for `online` since.
        self.offline = False
        #: With durability "process": points up to this number may be anything; and whether
        #: something has happened since the last look for which more of them may be.
        self.suspect = 0
        self.may_be_spoilt = False
        self._onlines = self._numbers = 0
        self.adopt(bytes(size), durably=True)

    def tick(self) -> int:
        self.time += 1
        return self.time

    def number(self) -> int:
        self._numbers += 1
        return self._numbers

    # -- the replica ----------------------------------------------------------------------------

    def begin(self, cells: list[Cell], contents: list[bytes]) -> list[Entry]:
        number, start = self.number(), self.tick()
        entries = [Entry(number, data, start) for data in contents]
        for cell, entry in zip(cells, entries, strict=True):
            cell.begin(entry)
        return entries

    def end(
        self, cells: list[Cell], entries: list[Entry], fate: Fate, *, durably: bool = False
    ) -> None:
        """A write was answered."""
        now = self.tick()
        for cell, entry in zip(cells, entries, strict=True):
            entry.end, entry.fate = now, fate
            if fate == "refused":
                cell.refused(entry)
            if fate != "done" or entry not in cell.now:
                continue
            at = cell.now.index(entry)
            cell.now = [e for e in cell.now[:at] if e.fate == "asked"] + cell.now[at:]
            if durably:
                at = cell.disk.index(entry)
                kept = [e for e in cell.disk[:at] if e.fate in ("asked", "torn")]
                cell.disk = kept + cell.disk[at:]

    def ask_flush(self) -> Flush:
        return self.tick(), [list(cell.now) for cell in self.cells], self.lossy

    def flushed(self, flush: Flush) -> None:
        """What had been answered when it was asked for is durable."""
        asked, then, lossy = flush
        if lossy:
            return
        for cell, now in zip(self.cells, then, strict=True):
            cell.disk = [
                e for e in cell.disk if e in now or e.start > asked or e.fate in ("asked", "torn")
            ] or list(now)

    def may_show(self, cell: Cell) -> list[Entry]:
        return cell.now + cell.disk if self.lossy or self.ring_removed else cell.now

    def check(self, content: bytes, what: str, *, durable: bool = False) -> None:
        """durable: the power has failed."""
        for cell in self.cells:
            known = cell.disk if durable else self.may_show(cell)
            self.check_cell(cell, content, known, what)

    def check_cell(self, cell: Cell, content: bytes, known: list[Entry], what: str) -> None:
        found = cell.of(content)
        at = wrong_word(found, known)
        if at is not None:
            raise AssertionError(
                f"{what}: bytes {cell.start} to {cell.end}, {at} in: {found[at : at + WORD]!r} "
                f"is of none of {[(e.number, e.fate) for e in known]}"
            )

    def adopt(self, content: bytes, *, durably: bool = False, afresh: bool = True) -> None:
        """That is what lies there, in all cells that nobody is writing to."""
        number, now = self.number(), self.tick()
        for cell in self.cells:
            if not cell.busy:
                entry = Entry(number, cell.of(content), now, now, "done")
                cell.settled(entry, durably=durably, afresh=afresh)

    def interrupted(self) -> None:
        """The process has ended: nothing under way will be answered."""
        for cell in self.cells:
            cell.busy = False
            for entry in cell.log:
                if entry.fate == "asked":
                    entry.fate = "torn"
        now = self.tick()
        for point in self.creating:
            point.end = point.end or now

    # -- points ---------------------------------------------------------------------------------

    def judge(self, number: int, point: Point, content: bytes) -> None:
        """The same as ever; or, read for the first time, what the cells were at one instant."""
        if number <= self.suspect:
            return
        if point.content is not None:
            if point.content != content:
                at = next(at for at, byte in enumerate(content) if byte != point.content[at])
                raise AssertionError(
                    f"point {number} has changed at byte {at}: {content[at : at + WORD]!r} "
                    f"instead of {point.content[at : at + WORD]!r}"
                )
            return
        end = point.end or self.time
        instants = set(range(point.start, end + 1))
        for cell in self.cells:
            data = cell.of(content)
            found = cell.instants(data, point.start, end)
            if found:
                instants &= found
                continue
            known = [e for e in cell.log if e.start <= end and e.fate != "refused"]
            torn = any(entry.fate == "torn" for entry in known)
            possible = (torn or point.loosely) and fits(data, known + cell.disk)
            assert possible, (
                f"point {number}: bytes {cell.start} to {cell.end} begin with {data[:32]!r}, asked "
                f"for at {point.start}, answered at {end}; they were "
                f"{[(e.number, e.start, e.end, e.fate) for e in known]}"
            )
        assert instants or point.loosely, f"point {number} is of no instant"
        point.content = content

    def appeared(self, number: int, content: bytes) -> None:
        """A point that nobody was told of: one of those that were asked for."""
        wrong: list[AssertionError] = []
        for point in self.creating:
            try:
                self.judge(number, point, content)
            except AssertionError as error:
                wrong.append(error)
                continue
            self.creating.remove(point)
            self.points[number] = point
            return
        raise AssertionError(f"point {number} is from nowhere: {wrong}")

    # -- restores -------------------------------------------------------------------------------

    def begin_restore(self, number: int, content: bytes) -> Restoring:
        entries = self.begin(self.cells, [cell.of(content) for cell in self.cells])
        self.restoring = Restoring(number, entries)
        return self.restoring

    def end_restore(self, one: Restoring, fate: Fate, *, again: bool) -> None:
        """again: it goes on by and by."""
        now = self.tick()
        for cell, entry in zip(self.cells, one.entries, strict=True):
            entry.end, entry.fate = now, fate
            if fate == "done" and entry in cell.now:
                cell.now = [e for e in cell.now if e is entry or e.start > entry.start]
                if not self.lossy:
                    cell.disk = [e for e in cell.disk if e is entry or e.start > entry.start]
            elif fate == "refused":
                cell.refused(entry)
        if not again and self.restoring is one:
            self.restoring = None

    # -- offline --------------------------------------------------------------------------------

    def told_offline(self) -> None:
        if not self._onlines:
            self.offline = True

    def ask_online(self) -> None:
        self._onlines += 1
        self.offline = False

    def end_online(self) -> None:
        self._onlines -= 1

    def forget_requests(self) -> None:
        """A new life: nothing is under way."""
        self.creating, self.deleted, self._onlines = [], set(), 0
        self.deleting.clear()
