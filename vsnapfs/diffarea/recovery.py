"""Opening a diff area: from what is on disk to a usable `DiffArea`, after any kind of stop.

Owns the scan. Promises:

* after a clean close nothing is written, unless a structure must be healed from its twin. Both
  copies of each table are read all the same: a disk that lost a write, or an old table put back,
  shows a sector that is valid but older than its twin;
* after an unclean stop the descriptors of the newest barrier, and only those, are checked
  against their blocks; one that fails is dropped only if that is provably harmless (the same
  copy lies in another slot, or the replica still holds the content the descriptor names, so the
  block was never overwritten). Otherwise it is kept and reads of it are EIO;
* a damaged sector is healed from its twin; if both are bad it is reported, never guessed;
* time and memory are bounded by the size of the file, whatever the superblock claims.

Leaves the decision what a damaged area means for the volume to `volume`.
"""

from __future__ import annotations

import errno
import heapq
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from ..backing import Backing
from ..errors import FaultCode, FaultError, FormatError, VsnapError
from .area import DiffArea
from .descriptors import (
    BLOCK_MASK,
    IN_USE,
    SECTOR_DTYPE,
    SectorImage,
    sector_is_valid,
)
from .index import Index, Slots, make_run
from .layout import (
    HEADER_SIZE,
    SECTOR_SIZE,
    SECTORS_PER_GROUP,
    SLOTS_PER_GROUP,
    SLOTS_PER_SECTOR,
    SUPERBLOCK_OFFSETS,
    SUPERBLOCK_SIZE,
    Layout,
)
from .superblock import Superblock, decode

#: With more bad sectors (8 MiB of descriptors, twice) it is not opened: nothing much is left.
_MOST_DAMAGED = 1 << 14
_MOST_PROBLEMS = 1000


@dataclass
class Report:
    """What opening found. Counts of copies (kept, dropped, damaged) concern the newest barrier.

    healed: what was brought back from its twin, in words; rot: each structure among it that was
    bad (not just older), as `verify` describes problems; differing: how many descriptor sectors
    had two valid copies, one of them older. unclean: no clean close before. suspect: so many
    recovery points may be wrong after a power failure (durability "process").
    """

    unclean: bool = False
    barrier: int = 0
    kept: int = 0
    dropped: int = 0
    damaged: int = 0
    healed: list[str] = field(default_factory=list)
    rot: list[dict[str, Any]] = field(default_factory=list)
    differing: int = 0
    suspect: int = 0
    problems: list[str] = field(default_factory=list)


def read_superblock(backing: Backing) -> tuple[Superblock, list[str]]:
    """The newest valid superblock, and what was wrong with the other copy, if anything.

    FormatError as `read_superblocks`.
    """
    found, notes, _ = read_superblocks(backing)
    return found[0], notes


def read_superblocks(
    backing: Backing,
) -> tuple[list[Superblock], list[str], list[dict[str, Any]]]:
    """The one or two valid superblocks, newest first, and what was wrong with a copy, if anything.

    That first in words, then, if it was bad and not just older, as `verify` describes it.

    FormatError if there is none; its `code` tells a foreign file ("not-a-diff-area",
    "foreign-version", "truncated") from a rotted one ("checksum", "inconsistent"). OSError if
    there is none and a copy could not be read.
    """
    if backing.size() < HEADER_SIZE:
        raise FormatError(
            f"{backing.path} is no diff area: it has only {backing.size()} bytes", code="truncated"
        )
    found: list[Superblock] = []
    errors: list[FormatError] = []
    unreadable: OSError | None = None
    rot: list[dict[str, Any]] = []
    for copy, offset in enumerate(SUPERBLOCK_OFFSETS):
        where = {"what": "superblock", "copy": copy, "offset": offset}
        try:
            found.append(decode(backing.read(offset, SUPERBLOCK_SIZE)))
        except FormatError as error:
            errors.append(error)
            rot.append(where | {"message": error.message})
        except OSError as error:
            unreadable = error
            rot.append(where | {"message": f"it could not be read ({error.strerror})"})
    if not found and unreadable is not None:
        raise unreadable
    if not found:
        # The most telling error: a rotted superblock says more than one that is not there.
        order = ("foreign-version", "checksum", "inconsistent", "format", "not-a-diff-area")
        worst = min(errors, key=lambda error: order.index(error.code))
        raise FormatError(f"{backing.path}: {worst.message}", hint=worst.hint, code=worst.code)
    found.sort(key=lambda superblock: superblock.generation, reverse=True)
    notes = [f"superblock copy: {error.message}" for error in errors]
    if unreadable is not None:
        notes.append(f"superblock copy: it could not be read ({unreadable.strerror})")
    if len(found) == 2 and found[0].generation != found[1].generation:
        notes.append("superblock copy: one generation behind")
    return found, notes, rot


def open_area(
    backing: Backing, replica: Backing, volume_id: bytes, known: int = 0
) -> tuple[DiffArea, Report]:
    """Scan the diff area in `backing`; `replica` is read for the check after an unclean stop.

    known: a generation that has been written; below it the area is an old copy (`is_old`), to which
    nothing is written. FormatError: not a diff area, of another volume, another version, rotted
    superblocks. VsnapError "other-replica": `replica` is not the one it belongs to.
    FaultError 2: an I/O error while reading. Damaged descriptors do not raise: they are in
    `DiffArea.damaged_sectors` and in the report's `problems`.
    """
    try:
        found, notes, rot = read_superblocks(backing)
        superblock = found[0]
        if superblock.volume_id != volume_id:
            raise FormatError(
                f"{backing.path} is the diff area of another volume",
                hint="Check 'diff_area' in volume.toml.",
                code="other-volume",
            )
        size, wanted = replica.size(), superblock.replica_size
        if size < wanted or (size != wanted and not replica.is_device):
            # Before anything is compared with it, let alone dropped.
            raise VsnapError(
                f"the replica {replica.path} has {size} bytes, its diff area says {wanted}",
                hint="It is not the replica this diff area was made for, or it has been resized.",
                code="other-replica",
            )
        scan = _Scan(backing, replica, superblock, notes)
        scan.area.is_old = superblock.generation < known
        scan.report.rot = rot
        # A stop between the two copies of a commit leaves the older one: ours too, no fault 15.
        scan.area.know_generations(copy.generation for copy in found)
        return scan.run()
    except OSError as error:
        raise FaultError(
            FaultCode.IO_FAILURE_DURING_ONLINE,
            f"the diff area could not be read: {error}",
            errno=error.errno or errno.EIO,
        ) from error


class _Scan:
    def __init__(
        self, backing: Backing, replica: Backing, superblock: Superblock, notes: list[str]
    ) -> None:
        self.backing = backing
        self.replica = replica
        self.superblock = superblock
        # Of a truncated file only the groups that begin in it are looked at: the superblock may
        # claim terabytes.
        layout = Layout(superblock.block_size)
        self.end = backing.size()
        groups = -(-max(0, self.end - HEADER_SIZE) // layout.group_size)
        claimed = layout.slots_in(superblock.allocated)
        self.present = min(claimed, groups * SLOTS_PER_GROUP)
        self.is_cut = self.present < claimed
        # A sparse file may be that long, too: the map of its slots is made when its tables are
        # there.
        self.area = DiffArea(backing, superblock, 0)
        self.report = Report(unclean=not superblock.clean, healed=notes)
        self.heal: dict[int, SectorImage] = {}
        self.damaged: list[int] = []

    def run(self) -> tuple[DiffArea, Report]:
        area, report = self.area, self.report
        if report.unclean:
            # What a killed server left in the host's cache must be durable before it is trusted,
            # and must be read back from the disk, not from the cache, to be checked.
            self.backing.sync()
            self.backing.forget_cache()
            # What a failed sync of the replica lost, its cache may still show. A point that fell
            # through to that would change with the next power failure.
            self.replica.forget_cache()
        if self.end < self.superblock.allocated:
            report.problems.append(
                f"the file has {self.end} bytes, "
                f"{self.superblock.allocated} are allocated: it has been truncated"
            )
        tables = self._load_tables()
        area.slots.resize(self.present)
        blocks, epochs, slots = self._descriptors(tables)
        if report.unclean and len(tables):
            keep = self._check_newest(tables, blocks, epochs, slots)
            blocks, epochs, slots = blocks[keep], epochs[keep], slots[keep]
        if self.is_cut:  # The first of those that are gone stands for all of them.
            self.damaged.append(-(-self.present // SLOTS_PER_SECTOR))
        area.damaged_sectors = tuple(self.damaged)
        report.problems += [
            f"descriptor sector {s}: both copies are bad" for s in self.damaged[:_MOST_PROBLEMS]
        ]
        # Of two copies of one block and epoch (a shrink was interrupted) the lower slot stays:
        # `make_run` sorts stably and `slots` ascends.
        area.index = Index(make_run(blocks, epochs, slots.astype(np.uint32)))
        points = [point.number for point in self.superblock.points]
        live: Slots = area.index.live_slots(points)
        area.index.compact(points)
        area.slots.take(live)
        self._keep_slots_of_damage()
        if self.heal and not area.is_old:
            report.healed.append(f"{len(self.heal)} descriptor sectors from their twins")
            area.heal(self.heal)
        return area, report

    # -- reading the tables -----------------------------------------------------------------------

    def _load_tables(self) -> npt.NDArray[np.void]:
        """All sectors of the area in one array, damaged ones blanked."""
        layout = self.area.layout
        parts: list[npt.NDArray[np.void]] = []
        for group in range(layout.groups_of(self.present)):
            first, twin = (self.area.read_table(at) for at in layout.table_offsets(group))
            table = self._choose(group, first, twin)
            parts.append(np.frombuffer(table, dtype=SECTOR_DTYPE))
        if not parts:
            return np.empty(0, dtype=SECTOR_DTYPE)
        tables: npt.NDArray[np.void] = np.concatenate(parts)
        self.report.barrier = int(tables["barrier"].max())
        self.area.barrier_number = max(self.superblock.barrier, self.report.barrier)
        return tables

    def _choose(self, group: int, first: bytearray, twin: bytearray) -> bytearray:
        """The newest valid copy of each sector of a group."""
        area_id, same = self.area.area_id, first == twin
        view, other = memoryview(first), memoryview(twin)
        for index in range(SECTORS_PER_GROUP):
            sector = group * SECTORS_PER_GROUP + index
            part = slice(index * SECTOR_SIZE, (index + 1) * SECTOR_SIZE)
            good = sector_is_valid(view[part], area_id, sector)
            if same or first[part] == twin[part]:
                if not good:
                    self._lost(sector, view[part])
                continue
            twin_good = sector_is_valid(other[part], area_id, sector)
            if not good and not twin_good:
                self._lost(sector, view[part])
                continue
            if good and twin_good:
                self.report.differing += 1
            else:
                self._note_rot(sector, int(good))
            newer = SectorImage(twin[part]).barrier > SectorImage(first[part]).barrier
            if twin_good and (not good or newer):
                view[part] = other[part]
            self.heal[sector] = SectorImage(bytearray(view[part]))
        return first

    def _note_rot(self, sector: int, copy: int) -> None:
        where = {"what": "descriptor sector", "sector": sector, "copy": copy}
        offset = self.area.layout.sector_offsets(sector)[copy]
        if self.area.is_old or offset + SECTOR_SIZE > self.end:
            return  # Not healed now: `verify` finds it as it is.
        message = "one of its two copies is bad; the other one serves"
        self.report.rot.append(where | {"offset": offset, "message": message})

    def _lost(self, sector: int, part: memoryview) -> None:
        if sector * SLOTS_PER_SECTOR < self.present:
            self.damaged.append(sector)
            if len(self.damaged) > _MOST_DAMAGED:
                raise FaultError(
                    FaultCode.META_DATA_CORRUPTION,
                    f"more than {_MOST_DAMAGED} descriptor sectors are bad in both copies",
                )
        part[:] = bytes(SECTOR_SIZE)

    def _descriptors(
        self, tables: npt.NDArray[np.void]
    ) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
        """(blocks, epochs, slots) of all descriptors in use, slots ascending."""
        entries = tables["entries"].reshape(-1)[: self.present]
        slots = np.flatnonzero(entries["block"] & np.uint64(IN_USE)).astype(np.uint64)
        chosen = entries[slots.astype(np.int64)]
        blocks = chosen["block"] & np.uint64(BLOCK_MASK)
        epochs = chosen["epoch"].astype(np.uint64)
        # A descriptor of an epoch or block that cannot be is no copy of anything.
        count = -(-self.superblock.replica_size // self.superblock.block_size)
        possible = (epochs <= self.superblock.epoch) & (blocks < count) & (epochs > 0)
        return blocks[possible], epochs[possible], slots[possible]

    # -- after an unclean stop --------------------------------------------------------------------

    def _check_newest(
        self,
        tables: npt.NDArray[np.void],
        blocks: npt.NDArray[np.uint64],
        epochs: npt.NDArray[np.uint64],
        slots: npt.NDArray[np.uint64],
    ) -> npt.NDArray[np.bool_]:
        """Which descriptors survive the check of the newest barrier."""
        keep = np.ones(len(slots), dtype=bool)
        newest = np.flatnonzero(tables["barrier"] == self.report.barrier)
        fresh: set[int] = set()
        for sector in newest:
            mask = int(tables["fresh"][sector])
            base = int(sector) * SLOTS_PER_SECTOR
            fresh.update(base + place for place in range(SLOTS_PER_SECTOR) if mask >> place & 1)
        failing: list[tuple[int, int]] = []
        hashes = tables["entries"]["hash"]  # a view: tables can be large
        for where in np.flatnonzero(np.isin(slots, np.array(sorted(fresh), dtype=np.uint64))):
            slot = int(slots[where])
            wanted = int(hashes[divmod(slot, SLOTS_PER_SECTOR)])
            if self._hash_of_slot(slot) == wanted:
                self.report.kept += 1
            else:
                failing.append((int(where), wanted))
        others = _Kept(blocks, epochs, [row for row, _ in failing])
        for row, wanted in failing:
            slot, block, epoch = int(slots[row]), int(blocks[row]), int(epochs[row])
            # With a copy in a later epoch (this one was being moved) a reader would not fall
            # through to the replica, whatever that holds.
            last = others.newest(block) == epoch
            if others.count(block, epoch) > 1 or (last and self._hash_of_replica(block) == wanted):
                keep[row] = False
                others.remove(block, epoch)
                self.report.dropped += 1
                self._clear(slot, tables)
            else:
                self.report.damaged += 1
                if len(self.report.problems) < _MOST_PROBLEMS:
                    text = f"block {block} of epoch {epoch}: its copy is damaged"
                    self.report.problems.append(text)
        return keep

    def _hash_of_slot(self, slot: int) -> int | None:
        size = self.superblock.block_size
        try:
            data = self.backing.read(self.area.layout.slot_offset(slot), size)
        except OSError:
            return None
        return xxhash.xxh3_64_intdigest(data)

    def _hash_of_replica(self, block: int) -> int | None:
        size = self.superblock.block_size
        length = min(size, self.superblock.replica_size - block * size)
        try:
            data = bytes(self.replica.read(block * size, length))
        except OSError:
            return None
        return xxhash.xxh3_64_intdigest(data.ljust(size, b"\0"))

    def _clear(self, slot: int, tables: npt.NDArray[np.void]) -> None:
        sector, place = divmod(slot, SLOTS_PER_SECTOR)
        image = self.heal.get(sector) or SectorImage(bytearray(tables[sector].tobytes()))
        fresh = image.fresh & ~(1 << place)
        image.put(place, None)
        # The number stays: as long as this is the newest barrier on disk, a stop in the middle
        # of these repairs leaves the others to be checked again.
        image.seal(self.area.area_id, image.barrier, sector, fresh)
        self.heal[sector] = image

    def _keep_slots_of_damage(self) -> None:
        """Slots whose descriptors are lost may hold copies: nothing may be written there."""
        lost = [
            slot
            for sector in self.damaged
            for slot in range(sector * SLOTS_PER_SECTOR, (sector + 1) * SLOTS_PER_SECTOR)
            if slot < self.present
        ]
        self.area.unknown_slots = tuple(lost)
        self.area.slots.take(np.array(lost, dtype=np.uint32))


class _Kept:
    """How many copies of some blocks are kept, by epoch. Asking costs the same for any number."""

    def __init__(
        self, blocks: npt.NDArray[np.uint64], epochs: npt.NDArray[np.uint64], rows: list[int]
    ) -> None:
        self._counts: dict[int, Counter[int]] = {}
        self._newest: dict[int, list[int]] = {}  # heaps of negative epochs
        chosen = np.isin(blocks, blocks[rows])
        pairs = zip(blocks[chosen].tolist(), epochs[chosen].tolist(), strict=True)
        for block, epoch in pairs:
            self._counts.setdefault(block, Counter())[epoch] += 1
        for block, counts in self._counts.items():
            self._newest[block] = [-epoch for epoch in counts]
            heapq.heapify(self._newest[block])

    def count(self, block: int, epoch: int) -> int:
        """How many copies of `block` are kept for `epoch`."""
        return self._counts[block][epoch]

    def newest(self, block: int) -> int:
        """The latest epoch that has a copy of `block`, which has one."""
        heap, counts = self._newest[block], self._counts[block]
        while not counts[-heap[0]]:
            heapq.heappop(heap)
        return -heap[0]

    def remove(self, block: int, epoch: int) -> None:
        """A copy is not kept any more."""
        self._counts[block][epoch] -= 1
