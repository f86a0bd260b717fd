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
from collections import Counter, deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future
from contextlib import closing, suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from ..backing import Backing
from ..errors import FaultCode, FaultError, FormatError, VsnapError
from ..threads import started
from .area import DiffArea
from .descriptors import (
    BLOCK_MASK,
    IN_USE,
    SECTOR_DTYPE,
    Descriptor,
    SectorImage,
    valid_sectors,
    zero_blocks,
)
from .descriptors import ZEROS as DESCRIBES_ZEROS
from .index import ZEROS, Index, Run, RunBuilder, live_copies
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
from .superblock import RecoveryPoint, Superblock, decode

#: With more bad sectors (8 MiB of descriptors, twice) it is not opened: nothing much is left.
_MOST_DAMAGED = 1 << 14
_MOST_PROBLEMS = 1000
#: Threads that fetch tables, and how many groups (128 KiB each) one of them takes at a time.
_READERS, _GROUPS_AT_ONCE = 4, 4

_Tables = list[tuple[int, bytearray, bytearray]]


@dataclass
class Report:
    """What opening found. Counts of copies (kept, dropped, damaged) concern the newest barrier.

    healed: what was brought back from its twin, in words; rot: each structure among it that was
    bad (not just older), as `verify` describes problems; differing: how many descriptor sectors
    had two valid copies, one of them older. unclean: no clean close before. suspect: so many
    recovery points may be wrong after a power failure (durability "process"). replica_error: a
    sync of the replica failed, which Linux tells once only. to_heal: sectors that are to be written
    (`DiffArea.heal`) before anything else is, if it is opened at all. given_up: points in the
    catalog that do not count, because their loss had been recorded elsewhere.
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
    replica_error: OSError | None = None
    to_heal: dict[int, SectorImage] = field(default_factory=dict)
    given_up: list[RecoveryPoint] = field(default_factory=list)


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
    FaultError 2: an I/O error while reading. Without memory for the index only the superblock
    counts (`DiffArea.is_unread`); MemoryError: not even for that. Damaged descriptors do not raise:
    they are in `DiffArea.damaged_sectors` and in the report's `problems`.
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
        incomplete = None
        if notes or not superblock.clean:
            # What a killed server left in the host's cache must be durable before it is trusted,
            # and must be read back from the disk, not from the cache, to be checked. The superblock
            # as well: a failed sync leaves one that no disk has ever had.
            # What is read afterwards is what the disk has, also if that fails.
            try:
                backing.sync()
            except OSError as error:
                text = f"the diff area could not be synced: {error.strerror}"
                number = error.errno or errno.EIO
                incomplete = FaultError(FaultCode.IO_FAILURE_DURING_ONLINE, text, errno=number)
            backing.forget_cache()
            found, notes, rot = read_superblocks(backing)
            superblock = found[0]
        scan = _Scan(backing, replica, superblock, notes)
        scan.area.incomplete = incomplete
        scan.area.is_old = superblock.generation < known
        scan.report.rot = rot
        # A stop between the two copies of a commit leaves the older one: ours too, no fault 15.
        scan.area.know_generations(copy.generation for copy in found)
        with suppress(MemoryError):
            return scan.run()
        return scan.give_up()
    except OSError as error:
        if error.errno == errno.ENOMEM:
            raise MemoryError from error
        raise FaultError(
            FaultCode.IO_FAILURE_DURING_ONLINE,
            f"the diff area could not be read: {error}",
            errno=error.errno or errno.EIO,
        ) from error


def no_memory() -> FaultError:
    """The fault of an opening that ran out of memory."""
    return FaultError(
        FaultCode.MEMORY_ALLOCATION_FAILURE,
        "there was not enough memory to read the diff area",
        errno=errno.ENOMEM,
    )


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
        self._replica_synced = False
        #: The sectors of the newest barrier seen so far that mark something as fresh.
        self.newest: dict[int, SectorImage] = {}

    def run(self) -> tuple[DiffArea, Report]:
        area, report = self.area, self.report
        if report.unclean:
            # What a failed sync of the replica lost, its cache may still show. A point that fell
            # through to that would change with the next power failure. Synced before, since a dirty
            # page would stay, and ext4 may take it for written (`AreaStore.rollback`).
            self._sync_replica()
            self.replica.forget_cache()
        if self.end < self.superblock.allocated:
            report.problems.append(
                f"the file has {self.end} bytes, "
                f"{self.superblock.allocated} are allocated: it has been truncated"
            )
        run = self._scan_tables()
        area.slots.resize(self.present)
        area.barrier_number = max(self.superblock.barrier, report.barrier)
        if report.unclean:
            run = self._check_newest(run)
        if self.is_cut:  # The first of those that are gone stands for all of them.
            self.damaged.append(-(-self.present // SLOTS_PER_SECTOR))
        area.damaged_sectors = tuple(self.damaged)
        report.problems += [
            f"descriptor sector {s}: both copies are bad" for s in self.damaged[:_MOST_PROBLEMS]
        ]
        # Of two copies of one block and epoch (a shrink was interrupted) the lower slot stays.
        area.index = Index(run)
        del run
        points = [point.number for point in self.superblock.points]
        area.index.compact(points)
        area.slots.take(area.index.live_slots(points))
        self._keep_slots_of_damage()
        if self.heal and not area.is_old and area.incomplete is None:
            report.healed.append(f"{len(self.heal)} descriptor sectors from their twins")
            report.to_heal = self.heal
        return area, report

    def give_up(self) -> tuple[DiffArea, Report]:
        """There is no memory for it: an area of which nothing but the superblock is known."""
        area = DiffArea(self.backing, self.superblock, 0)
        area.is_unread, area.incomplete = True, no_memory()
        area.is_old = self.area.is_old
        area.know_generations(self.area.known_generations)
        return area, Report(unclean=not self.superblock.clean)

    # -- reading the tables -----------------------------------------------------------------------

    def _scan_tables(self) -> Run:
        """All descriptors in use, sorted; the rest of what the tables tell in `self`."""
        count = -(-self.superblock.replica_size // self.superblock.block_size)
        builder = RunBuilder(count, self.present)
        # Closed in any case: no thread may still read when the file is closed.
        with closing(self._tables()) as tables:
            for group, first, twin in tables:
                table = np.frombuffer(self._choose(group, first, twin), dtype=SECTOR_DTYPE)
                self._note_newest(group, table)
                there = self.present - group * SLOTS_PER_GROUP  # at its end the area may be cut
                entries = table["entries"].reshape(-1)[:there]
                words, epochs = entries["block"], entries["epoch"].copy()
                # A descriptor of an epoch or block that cannot be is no copy of anything.
                possible = (
                    (words >= np.uint64(IN_USE)) & (epochs <= self.superblock.epoch) & (epochs > 0)
                )
                zeros = (words & np.uint64(DESCRIBES_ZEROS)) != 0
                where = np.flatnonzero(possible & ~zeros)
                blocks = words[where] & np.uint64(BLOCK_MASK)
                zeros &= possible
                if zeros.any():
                    epochs[zeros] |= np.uint32(ZEROS)
                    also, more = zero_blocks(entries, np.flatnonzero(zeros))
                    where, blocks = np.concatenate([where, also]), np.concatenate([blocks, more])
                there_is = blocks < count
                builder.add(where[there_is], blocks[there_is], epochs)
        return builder.finish()

    def _tables(self) -> Generator[tuple[int, bytearray, bytearray], None, None]:
        """(group, first copy, twin) of each group, in order.

        Of a large area they are fetched ahead by a few threads: they lie far apart, and a disk
        takes its time for each of them.
        """
        groups = range(self.area.layout.groups_of(self.present))
        parts = [groups[at : at + _GROUPS_AT_ONCE] for at in groups[::_GROUPS_AT_ONCE]]
        pool = started(_READERS, "vsnapfs-scan") if len(parts) > 1 else None
        if pool is None:
            for part in parts:
                yield from self._read_groups(part)
            return
        try:
            ahead: deque[Future[_Tables]] = deque()
            for part in parts:
                ahead.append(pool.submit(self._read_groups, part))
                if len(ahead) > _READERS:
                    yield from ahead.popleft().result()
            for future in ahead:
                yield from future.result()
        finally:
            pool.shutdown(cancel_futures=True)

    def _read_groups(self, groups: range) -> _Tables:
        offsets = self.area.layout.table_offsets
        read = self.area.read_table
        return [(group, read(offsets(group)[0]), read(offsets(group)[1])) for group in groups]

    def _choose(self, group: int, first: bytearray, twin: bytearray) -> bytearray:
        """The newest valid copy of each sector of a group."""
        same, start = first == twin, group * SECTORS_PER_GROUP
        good = valid_sectors(first, self.area.area_id, start)
        if same and good.all():
            return first
        twin_good = good if same else valid_sectors(twin, self.area.area_id, start)
        view, other = memoryview(first), memoryview(twin)
        for index in range(SECTORS_PER_GROUP):
            sector = start + index
            part = slice(index * SECTOR_SIZE, (index + 1) * SECTOR_SIZE)
            if not good[index] and not twin_good[index]:
                self._lost(sector, view[part])
            elif first[part] != twin[part]:
                if good[index] and twin_good[index]:
                    self.report.differing += 1
                else:
                    self._note_rot(sector, int(good[index]))
                newer = SectorImage(twin[part]).barrier > SectorImage(first[part]).barrier
                if twin_good[index] and (not good[index] or newer):
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

    def _note_newest(self, group: int, table: npt.NDArray[np.void]) -> None:
        """Remember what the check of the newest barrier will need."""
        barriers = table["barrier"]
        newest = int(barriers.max())
        if newest > self.report.barrier:
            self.report.barrier = newest
            self.newest.clear()
        if newest == self.report.barrier:
            chosen = (barriers == np.uint64(newest)) & (table["fresh"] != 0)
            for index in np.flatnonzero(chosen).tolist():
                image = SectorImage(bytearray(table[index].tobytes()))
                self.newest[group * SECTORS_PER_GROUP + index] = image

    # -- after an unclean stop --------------------------------------------------------------------

    def _check_newest(self, run: Run) -> Run:
        """Check the copies of the newest barrier. Returns the run of all that survive it."""
        failing: list[tuple[int, Descriptor]] = []
        for slot, descriptor in self._fresh():
            if self._hash_of_slot(slot) == descriptor.hash:
                self.report.kept += 1
            else:
                failing.append((slot, descriptor))
        others = _Kept(run, {descriptor.block for _, descriptor in failing})
        dropped: list[int] = []
        kept: list[tuple[int, int, int]] = []
        for slot, (wanted, block, epoch, _) in failing:
            # With a copy in a later epoch (this one was being moved) a reader would not fall
            # through to the replica, whatever that holds. One may lie where nothing can be read.
            last = others.newest(block) == epoch and not self.damaged and not self.is_cut
            if others.count(block, epoch) > 1 or (
                last and self._hash_of_replica(block) == wanted and self._sync_replica()
            ):
                dropped.append(run.position(block, epoch, slot))
                others.remove(block, epoch)
                self.report.dropped += 1
                self._clear(slot)
            else:
                kept.append((block, epoch, slot))
        if dropped:
            run = Run(np.delete(run.keys, dropped), np.delete(run.slots, dropped))
        if kept:
            self._count_damaged(run, kept)
        return run

    def _count_damaged(self, run: Run, failing: list[tuple[int, int, int]]) -> None:
        """Those of (block, epoch, slot) that some point reads. The slot of a copy that none needs
        any more is free: what did not fit there may be half of a newer one.
        """
        live = live_copies(run.keys, [point.number for point in self.superblock.points])
        for block, epoch, slot in failing:
            if not live[run.position(block, epoch, slot)]:
                continue
            self.report.damaged += 1
            if len(self.report.problems) < _MOST_PROBLEMS:
                text = f"block {block} of epoch {epoch}: its copy is damaged"
                self.report.problems.append(text)

    def _fresh(self) -> Iterator[tuple[int, Descriptor]]:
        """(slot, descriptor) of the copies with data that the newest barrier made, slots ascending.

        What it says of zeros is true whether it was finished or not.
        """
        superblock = self.superblock
        for sector, image in self.newest.items():
            for place in range(SLOTS_PER_SECTOR):
                slot, descriptor = sector * SLOTS_PER_SECTOR + place, image.get(place)
                if (
                    image.fresh >> place & 1
                    and descriptor is not None
                    and not descriptor.zeros
                    and slot < self.present
                    and 0 < descriptor.epoch <= superblock.epoch
                    and descriptor.block * superblock.block_size < superblock.replica_size
                ):
                    yield slot, descriptor

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

    def _sync_replica(self) -> bool:
        """Whether what the replica holds is durable. A copy that rotted after its block was
        overwritten may have been needed, and what was written since may be the same by chance.
        """
        if not self._replica_synced and self.report.replica_error is None:
            try:
                self.replica.sync()
                self._replica_synced = True
            except OSError as error:
                self.report.replica_error = error
        return self._replica_synced

    def _clear(self, slot: int) -> None:
        sector, place = divmod(slot, SLOTS_PER_SECTOR)
        image = self.heal.get(sector) or self.newest[sector]
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

    def __init__(self, run: Run, blocks: Iterable[int]) -> None:
        self._counts: dict[int, Counter[int]] = {}
        self._newest: dict[int, list[int]] = {}  # heaps of negative epochs
        for block in blocks:
            counts = self._counts[block] = Counter(run.epochs_of(block).tolist())
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
