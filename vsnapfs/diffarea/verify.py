"""Checking a diff area: every structure, every preserved block. Repairs nothing.

Owns the list of problems and the words for them. A problem says what is wrong, where, which
recovery points it touches and which ranges of them; ranges that are not named read correctly.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from ..errors import FormatError
from .area import DiffArea
from .descriptors import sector_is_valid
from .index import SLOT_MASK, ZEROS
from .layout import (
    SECTOR_SIZE,
    SECTORS_PER_GROUP,
    SUPERBLOCK_OFFSETS,
    SUPERBLOCK_SIZE,
    TABLE_SIZE,
)
from .superblock import decode

_STEP = 4 << 20
_FAILS = "fails its checksum"
Problem = dict[str, Any]


class Verification:
    """One run over a whole area. `steps` yields callables; each does a bounded piece of work.

    The caller runs each step where no barrier is under way, and may stop between steps. `done`
    and `total` are bytes, `problems` grows as they are found.
    """

    def __init__(self, area: DiffArea, live_points: Callable[[], list[int]]) -> None:
        self._area = area
        self._live_points = live_points
        self.problems: list[Problem] = []
        self.checked = {"superblocks": 0, "descriptor_sectors": 0, "preserved_blocks": 0}
        self.done = 0
        layout = area.layout
        self._lost = frozenset(area.damaged_sectors)
        self._groups = layout.groups_of(len(area.slots))
        blocks, epochs, slots = area.index.living(live_points())
        # In the order of the disk: one pass from front to back. Arrays: writes wait meanwhile.
        order = np.argsort(slots & np.uint32(SLOT_MASK), kind="stable")
        self._copies = blocks[order], epochs[order], slots[order]
        self.total = layout.metadata_size(len(area.slots)) + len(order) * layout.block_size

    def steps(self) -> Iterator[Callable[[], None]]:
        """The work, piece by piece."""
        yield self._check_superblocks
        for group in range(self._groups):
            yield lambda group=group: self._check_tables(group)  # type: ignore[misc]
        yield self._check_hidden
        count = max(1, _STEP // self._area.layout.block_size)
        for start in range(0, len(self._copies[0]), count):
            columns = [column[start : start + count].tolist() for column in self._copies]
            part = list(zip(*columns, strict=True))
            yield lambda part=part: self._check_copies(part)  # type: ignore[misc]

    def _check_superblocks(self) -> None:
        for copy, offset in enumerate(SUPERBLOCK_OFFSETS):
            where = {"what": "superblock", "copy": copy, "offset": offset}
            try:
                found = decode(self._area.backing.read(offset, SUPERBLOCK_SIZE))
                if found.generation != self._area.superblock.generation:
                    self._problem(where, f"is at generation {found.generation}")
            except (FormatError, OSError) as error:
                self._problem(where, str(error))
            self.checked["superblocks"] += 1
            self.done += SUPERBLOCK_SIZE

    def _check_tables(self, group: int) -> None:
        area = self._area
        tables = [area.read_table(offset) for offset in area.layout.table_offsets(group)]
        self.done += 2 * TABLE_SIZE
        for index in range(SECTORS_PER_GROUP):
            sector = group * SECTORS_PER_GROUP + index
            part = slice(index * SECTOR_SIZE, (index + 1) * SECTOR_SIZE)
            good = [
                sector_is_valid(memoryview(table)[part], area.area_id, sector) for table in tables
            ]
            self.checked["descriptor_sectors"] += 2
            offsets = area.layout.sector_offsets(sector)
            if not any(good):
                self._both_bad(sector, offsets[0])
                continue
            for copy in (0, 1):
                if not good[copy]:
                    self._problem(
                        {"what": "descriptor sector", "sector": sector, "offset": offsets[copy]},
                        "one of its two copies is bad; the other one serves",
                    )
            if all(good) and tables[0][part] != tables[1][part]:
                self._problem(
                    {"what": "descriptor sector", "sector": sector, "offset": offsets[1]},
                    "its two copies differ",
                )

    def _both_bad(self, sector: int, offset: int) -> None:
        """Report a lost sector; neighbours share a line, a lost stretch of disk has thousands."""
        last = self.problems[-1] if self.problems else {}
        lost = sector in self._lost
        follows = "sectors" in last and last["sector"] + last["sectors"] == sector
        if follows and lost == (last["sector"] in self._lost):
            last["sectors"] += 1
            return
        where = {"what": "descriptor sector", "sector": sector, "sectors": 1, "offset": offset}
        self._problem(where, "both copies are bad")

    def _check_hidden(self) -> None:
        """What cannot be read because a descriptor that nobody can read may say otherwise."""
        area = self._area
        size = area.backing.size()
        if size < area.allocated:
            message = f"the file has {size} of {area.allocated} bytes: it has been truncated"
            self._problem({"what": "diff area", "offset": size}, message)
        if area.is_old:
            self._problem({"what": "diff area", "offset": 0}, "it is an old copy of the diff area")
        for point in self._live_points():
            ranges = hidden_ranges(area, point)
            if ranges:
                message = "what has no copy of its own here may have one that is lost"
                where = {"what": "recovery point", "point": point, "offset": 0}
                self._problem(where, message, [point], ranges)

    def _check_copies(self, part: list[tuple[int, int, int]]) -> None:
        area = self._area
        for (block, epoch, slot), data in zip(part, area.read_copies(part), strict=True):
            self.checked["preserved_blocks"] += 1
            if data is not None:
                continue
            points = [
                number
                for number in self._live_points()
                if number <= epoch and area.index.lookup(number, block) == (epoch, slot)
            ]
            if not points:
                continue  # Deleted or evicted since this run began.
            start = block * area.layout.block_size
            length = min(area.layout.block_size, area.superblock.replica_size - start)
            where = {
                "what": "preserved block",
                "block": block,
                "epoch": epoch,
                "offset": area.place_of(slot),
            }
            message = "no descriptor says that it is zeros" if slot & ZEROS else _FAILS
            self._problem(where, message, points, [[start, length]])
        self.done += len(part) * area.layout.block_size

    def _problem(
        self,
        where: Problem,
        message: str,
        points: list[int] | None = None,
        ranges: list[list[int]] | None = None,
    ) -> None:
        self.problems.append(
            where | {"message": message, "points": points or [], "ranges": ranges or []}
        )


def hidden_ranges(area: DiffArea, point: int) -> list[list[int]]:
    """[offset, length] of what `point` cannot be trusted with, ascending; [] in a sound area.

    See `DiffArea.may_trust`: with descriptors lost, only copies of the point's own epoch count.
    """
    if not area.damaged_sectors and not area.is_old:
        return []
    size, total = area.layout.block_size, area.superblock.replica_size
    blocks, epochs, _ = area.index.everything()
    edges = [-1, *np.unique(blocks[epochs == point]).tolist(), -(-total // size)]
    return [
        [(before + 1) * size, min(after * size, total) - (before + 1) * size]
        for before, after in itertools.pairwise(edges)
        if after > before + 1
    ]
