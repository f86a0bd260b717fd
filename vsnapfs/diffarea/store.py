"""What makes a diff area durable: barriers, commits of the superblock, syncs.

Owns every write to descriptors and superblocks and the order of those writes. Promises:

* `barrier` returns only when the blocks written before it and their descriptors are durable (W2);
* `commit` returns only when both superblock copies are durable, one after the other;
* a sync that failed is never taken back: what it should have covered counts as unwritten until
  `rollback` has rewritten it, because Linux reports lost pages once and then forgets them;
* before each barrier and commit the path is compared with the open file (fault 14), before each
  commit the generation on disk with ours (fault 15);
* while something that the area held cannot be seen (`require_sound`), no copy is written and no
  descriptor, by nobody: a block would be preserved a second time, from what overwrote it.

Leaves to `area` what the slots hold and how many there are. Plain synchronous Python.
"""

from __future__ import annotations

import errno
import functools
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ParamSpec

from ..backing import Backing, Removed
from ..errors import FaultCode, FaultError, FormatError, unexpected
from .descriptors import (
    Descriptor,
    SectorImage,
    area_id_of,
    empty_table,
    sector_is_valid,
)
from .layout import (
    MAX_COUNTER,
    SECTOR_SIZE,
    SECTORS_PER_GROUP,
    SLOTS_PER_SECTOR,
    SUPERBLOCK_OFFSETS,
    SUPERBLOCK_SIZE,
    TABLE_SIZE,
    Layout,
)
from .superblock import Superblock, check, decode

_CACHED_SECTORS = 256
_EARLY = 1 << 20


_P = ParamSpec("_P")


def _faults_only(method: Callable[_P, None]) -> Callable[_P, None]:
    """What nobody planned for (no memory) is a fault, too: the disk may hold half of what was
    begun, and every caller knows what to do about a FaultError.
    """

    @functools.wraps(method)
    def careful(*args: _P.args, **options: _P.kwargs) -> None:
        try:
            method(*args, **options)
        except FaultError:
            raise
        except Exception as error:
            raise unexpected(error, None) from error

    return careful


def _cannot_look(error: OSError) -> FaultError:
    """Even fstat(2) of an open file fails: XFS that has shut down, a network file system."""
    text = f"the diff area's host does not answer: {error}"
    return FaultError(FaultCode.IO_FAILURE, text, errno=error.errno or errno.EIO)


class AreaStore:
    """The durable half of a `DiffArea`."""

    def __init__(self, backing: Backing, superblock: Superblock) -> None:
        self.backing = backing
        self.superblock = superblock
        self.layout = Layout(superblock.block_size)
        self.area_id = area_id_of(superblock.volume_id)
        #: An old copy of the area has been put in its place (fault 15 at open): blocks may have
        #: been overwritten since, copies that it knows nothing of may exist. Nothing is written.
        self.is_old = False
        #: Sectors of which both copies are bad. While there are any, a read that could depend
        #: on them is EIO (`DiffArea.may_trust`), and the volume is offline by fault 3.
        self.damaged_sectors: tuple[int, ...] = ()
        #: Why nothing may be preserved here before it is opened anew: the opening lacked memory
        #: (4), so that not all it holds may be known, or could not make durable what it found (2).
        self.incomplete: FaultError | None = None
        self.barrier_number = superblock.barrier
        self._generations = {superblock.generation}
        self._on_disk = b""  # what the last commit wrote: comparing is faster than decoding
        self._sectors: dict[int, SectorImage] = {}
        self._suspects: dict[int, SectorImage] = {}
        self._sync_lock = threading.Lock()
        self._sync_failed = False
        self._failed_syncs = 0
        #: A commit failed half way: one copy on disk may say what `superblock` does not.
        self.in_doubt = False
        #: The copy (its offset) that a commit could not finish.
        self._doubtful: int | None = None
        self._formatting = False
        #: Durability "process": copies are not synced before their blocks are overwritten.
        self.relaxed = False
        #: A sync has failed meanwhile, and with it copies may be lost whose blocks have been
        #: overwritten. The next commit makes points up to this number suspect (0: none);
        #: `tell_spoilt` says and records it before.
        self.spoilt = 0
        self.tell_spoilt: Callable[[OSError | None], None] = lambda _error: None
        #: This life of the machine, for the superblock.
        self.boot = superblock.boot

    @property
    def needs_rollback(self) -> bool:
        """True after a failed barrier or sync: nothing can be made durable before `rollback`."""
        return bool(self._suspects) or self._sync_failed

    @property
    def newest_generation(self) -> int:
        """The highest generation that the disk may hold."""
        return max(self._generations)

    # -- the superblock -------------------------------------------------------------------------

    @_faults_only
    def commit(self, **changes: Any) -> None:
        """Write the superblock with `changes`: both copies, one after the other, each synced.

        Unless `clean` is among the changes, it then says that the area is in use.
        FaultError 13 (I/O), 14 (gone), 15 (somebody else wrote to it), 4 or 11 (what nobody planned
        for). On an error `superblock` stays as it was, though the disk may already hold the new
        state in one copy: whatever happens, it is a FaultError, so that nobody goes on as before.
        """
        self.check_present()
        self._refuse_if_old()
        offsets = self._check_not_overtaken()
        changes.setdefault("clean", False)
        # Whoever opens it next must know what a power failure may have spoilt.
        changes.setdefault("process", self.relaxed and not changes["clean"])
        changes.setdefault("boot", self.boot)
        if changes["clean"] and self.relaxed:
            self._sync_for_commit()
        spoilt_by = self._failed_syncs
        if self.spoilt:
            changes.setdefault("suspect", max(self.spoilt, self.superblock.suspect))
        wanted = replace(
            self.superblock,
            **changes,
            generation=max(self._generations) + 1,
            barrier=self.barrier_number,
        )
        try:
            check(wanted)
        except FormatError as error:
            # Better no commit than one that no opening accepts.
            raise FaultError(FaultCode.DESTROY_ALL_SNAPSHOTS, f"unexpected: {error}") from error
        data = wanted.encode()
        self._generations.add(wanted.generation)
        self.in_doubt = True
        try:
            for offset in offsets:
                self._doubtful = offset
                self.backing.write(offset, data)
                self._sync()
            self._doubtful = None
        except OSError as error:
            raise FaultError(
                FaultCode.IO_FAILURE,
                f"the superblock could not be written: {error}",
                errno=error.errno or errno.EIO,
            ) from error
        self._generations = {wanted.generation}
        self._on_disk = data
        self.in_doubt = False
        self.superblock = wanted
        if self._failed_syncs == spoilt_by:  # Not one of a growth beside this.
            self.spoilt = 0

    def _sync_for_commit(self) -> None:
        try:
            self._sync()
        except OSError as error:
            raise FaultError(
                FaultCode.COW_WRITE_FAILURE,
                f"copies could not be made durable: {error}",
                errno=error.errno or errno.EIO,
            ) from error

    def know_generations(self, generations: Iterable[int]) -> None:
        """Generations found on disk at open, in either copy: finding them again is no surprise."""
        self._generations.update(generations)

    @property
    def known_generations(self) -> frozenset[int]:
        """The generations that are no surprise on the disk."""
        return frozenset(self._generations)

    def check_present(self) -> None:
        """FaultError 14 if the path no longer leads to this area, 13 if the host does not tell."""
        try:
            self.backing.check_present()
        except Removed as error:
            raise FaultError(
                FaultCode.DIFF_AREA_REMOVED, str(error.strerror), errno=error.errno or errno.ENOENT
            ) from error
        except OSError as error:
            raise _cannot_look(error) from error

    def _refuse_if_old(self) -> None:
        # A commit would give it a generation that looks new at the next opening.
        if self.is_old:
            raise FaultError(
                FaultCode.EXTERNAL_WRITER_TO_DIFF_AREA, "it is an old copy of the diff area"
            )

    def require_sound(self) -> None:
        """FaultError 2, 3, 4 or 15 unless all ever recorded here is known, with its space.

        Otherwise a block may have a copy that we do not know of, and may have been overwritten:
        what is there now would be recorded as its content in the same epoch.
        """
        self._refuse_if_old()
        if self.damaged_sectors:
            raise FaultError(
                FaultCode.META_DATA_CORRUPTION,
                "descriptors are lost: what has a copy already is not known",
            )
        if self.incomplete is not None:
            why = self.incomplete
            text = f"when it was opened, {why.message}: what has a copy already is not certain"
            raise FaultError(why.code, text, errno=why.errno)
        self.require_whole()

    @property
    def is_sound(self) -> bool:
        """Whether `require_sound` would pass."""
        try:
            self.require_sound()
        except (FaultError, OSError):
            return False
        return True

    def require_whole(self) -> None:
        """FaultError 3 if the file is shorter than allocated: what is written there would make
        it look whole, with holes where copies were. 13 if the host does not tell.
        """
        try:
            size = self.backing.size()
        except OSError as error:
            raise _cannot_look(error) from error
        if size < self.superblock.allocated:
            raise FaultError(
                FaultCode.META_DATA_CORRUPTION,
                f"the file has {size} bytes, {self.superblock.allocated} are allocated: "
                "it has been cut short",
            )

    def _check_not_overtaken(self) -> list[int]:
        """Where the two copies are to be written, in this order: never over the only good one,
        or a power failure in the middle of that would leave none.
        """
        seen, ours = [], False
        problem: OSError | None = None
        newest = dict.fromkeys(SUPERBLOCK_OFFSETS, -1)
        for offset in SUPERBLOCK_OFFSETS:
            try:
                data = self.backing.read(offset, SUPERBLOCK_SIZE)
                if data == self._on_disk:
                    ours, newest[offset] = True, self.superblock.generation
                else:
                    seen.append(decode(data))
                    newest[offset] = seen[-1].generation
            except OSError as error:
                problem = error
            except FormatError:
                continue  # One bad copy: the write to come heals it.
        if self._doubtful is not None:
            newest[self._doubtful] = -1  # What was read may be in the host's cache only.
        order = sorted(SUPERBLOCK_OFFSETS, key=lambda offset: newest[offset])
        if self._formatting:
            return order
        for found in seen:
            if (
                found.volume_id != self.superblock.volume_id
                or found.generation not in self._generations
            ):
                raise FaultError(
                    FaultCode.EXTERNAL_WRITER_TO_DIFF_AREA,
                    f"the diff area is at generation {found.generation}, "
                    f"this server wrote {max(self._generations)}",
                )
        if not seen and not ours and problem is not None:
            raise FaultError(
                FaultCode.IO_FAILURE,
                f"the superblock could not be read: {problem}",
                errno=problem.errno or errno.EIO,
            ) from problem
        if not seen and not ours:
            raise FaultError(
                FaultCode.EXTERNAL_WRITER_TO_DIFF_AREA, "both superblocks have been overwritten"
            )
        return order

    def _sync(self) -> None:
        # One sync at a time, and a failure marks all: Linux reports a lost page to one caller
        # only, so a second sync running beside it would wrongly succeed.
        with self._sync_lock:
            if self._sync_failed:
                raise OSError(errno.EIO, "an earlier sync of the diff area failed")
            try:
                self.backing.sync()
            except BaseException as error:
                self._sync_failed = True
                self._failed_syncs += 1
                if self.relaxed and self.superblock.epoch > self.spoilt:
                    self.spoilt = self.superblock.epoch
                    self.tell_spoilt(error if isinstance(error, OSError) else None)
                raise

    # -- preserving -----------------------------------------------------------------------------

    def write_copies(self, slots: Sequence[int], blocks: memoryview) -> None:
        """Write `len(slots)` blocks, lying one after the other in `blocks`, into their slots.

        Durable only after the next `barrier`. FaultError 7, 3 or 15 (`require_sound`).
        """
        self.require_sound()
        size, layout = self.layout.block_size, self.layout
        start = 0
        while start < len(slots):
            offset, end = layout.slot_offset(slots[start]), start + 1
            while end < len(slots) and layout.slot_offset(slots[end]) == offset + size * (
                end - start
            ):
                end += 1
            try:
                self.backing.write(offset, blocks[start * size : end * size])
                if not self.relaxed and (end - start) * size >= _EARLY:
                    # The disk writes it while the next ones are being copied.
                    self.backing.begin_sync(offset, (end - start) * size)
            except OSError as error:
                raise FaultError(
                    FaultCode.COW_WRITE_FAILURE,
                    f"a copy could not be written: {error}",
                    errno=error.errno or errno.EIO,
                ) from error
            start = end

    @_faults_only
    def barrier(self, changes: Mapping[int, Descriptor | None]) -> None:
        """Record what slots hold (None: nothing any more) and make all of it durable.

        changes: slot → descriptor; the blocks were written with `write_copies`. FaultError 7
        (write or sync failed: nothing of it counts), 14, 4 or 11 (as in `commit`), 3 (a sector
        cannot be read, or as in `require_sound`), 13 or 15 (an earlier commit failed, and this one
        too).
        """
        self.check_present()
        self.require_sound()
        if self._suspects:
            raise FaultError(FaultCode.COW_WRITE_FAILURE, "an earlier barrier has failed")
        if self.in_doubt or self.spoilt:
            # The copy that may have reached the disk could leave out what is recorded here
            # (a smaller area, a deleted point). What is lost is on record before more is written.
            self.commit()
        number = self.barrier_number + 1
        if number > MAX_COUNTER:
            raise FaultError(FaultCode.META_DATA_CORRUPTION, "its barrier number is impossible")
        grouped: dict[int, list[tuple[int, Descriptor | None]]] = {}
        for slot, descriptor in changes.items():
            sector, place = divmod(slot, SLOTS_PER_SECTOR)
            grouped.setdefault(sector, []).append((place, descriptor))
        before = {sector: self._sector(sector) for sector in grouped}
        after: dict[int, SectorImage] = {}
        for sector, items in grouped.items():
            image, fresh = before[sector].copy(), 0
            for place, descriptor in items:
                image.put(place, descriptor)
                fresh |= (descriptor is not None) << place
            image.seal(self.area_id, number, sector, fresh)
            after[sector] = image
        try:
            self._write_sectors(after)
            if not self.relaxed:
                self._sync()
            self._remember(after)
        except BaseException as error:
            # Whatever it was: what is on the disk is not what the caller will believe.
            self._suspects = before
            if not isinstance(error, OSError):
                raise
            raise FaultError(
                FaultCode.COW_WRITE_FAILURE,
                f"copies could not be made durable: {error}",
                errno=error.errno or errno.EIO,
            ) from error
        self.barrier_number = number

    @_faults_only
    def rollback(self) -> None:
        """After a failed barrier: put its sectors back as they were, durably. FaultError 7.

        They keep the failed barrier's number. A higher one would make that barrier look like an
        older, complete one to a recovery that finds only some of the sectors put back.
        """
        self._sync_failed = False
        # ext4 takes a page whose first write into reserved space has failed for one that was
        # written: the next write of it would be synced and yet be zeros once the cache is dropped.
        # Read anew, it is what it is. (So are copies that only the cache has; all are suspect.)
        self.backing.forget_cache()
        suspects = self._suspects
        if suspects:
            number = self.barrier_number + 1
            images = {sector: image.copy() for sector, image in suspects.items()}
            for sector, image in images.items():
                image.seal(self.area_id, number, sector, 0)
            try:
                self._write_sectors(images, end=self.backing.size())
                self._sync()
            except OSError as error:
                raise FaultError(
                    FaultCode.COW_WRITE_FAILURE,
                    f"the diff area still cannot be written: {error}",
                    errno=error.errno or errno.EIO,
                ) from error
            self.barrier_number = number
            self._suspects = {}
            self._remember(images)

    def _write_sectors(self, images: Mapping[int, SectorImage], end: int | None = None) -> None:
        # A copy beyond `end`, that of a file that has been cut, is left out: writing it would make
        # the file look whole again, with a hole where space was reserved.
        for copy in (0, 1):
            for sector in sorted(images):
                offset = self.layout.sector_offsets(sector)[copy]
                if end is None or offset + SECTOR_SIZE <= end:
                    self.backing.write(offset, images[sector].data)

    def _remember(self, images: Mapping[int, SectorImage]) -> None:
        self._sectors.update(images)
        while len(self._sectors) > _CACHED_SECTORS:
            del self._sectors[next(iter(self._sectors))]

    def _sector(self, sector: int) -> SectorImage:
        known = self._sectors.get(sector)
        return known if known is not None else self._load_sector(sector)

    def _load_sector(self, sector: int) -> SectorImage:
        # Both: what is written next builds on it, and a copy that missed a write is valid, too.
        copies = [self._sector_copy(sector, copy) for copy in (0, 1)]
        valid = [image for image in copies if image is not None]
        if not valid:
            raise FaultError(
                FaultCode.META_DATA_CORRUPTION,
                f"both copies of descriptor sector {sector} are bad or cannot be read",
            )
        return max(valid, key=lambda image: image.barrier)

    def _sector_copy(self, sector: int, copy: int) -> SectorImage | None:
        """One copy of a sector from the disk, None if it is not valid or cannot be read."""
        try:
            data = self.backing.read(self.layout.sector_offsets(sector)[copy], SECTOR_SIZE)
        except OSError:
            return None
        good = sector_is_valid(memoryview(data), self.area_id, sector)
        return SectorImage(bytearray(data)) if good else None

    def read_table(self, offset: int) -> bytearray:
        """One copy of a group's table. A sector that cannot be read is all zeros, never valid."""
        try:
            return bytearray(self.backing.read(offset, TABLE_SIZE))
        except OSError:
            table = bytearray(TABLE_SIZE)
        for start in range(0, TABLE_SIZE, SECTOR_SIZE):
            try:
                part = self.backing.read(offset + start, SECTOR_SIZE)
            except OSError:
                continue
            table[start : start + SECTOR_SIZE] = part
        return table

    def _write_tables(self, first_group: int, end_group: int) -> None:
        for group in range(first_group, end_group):
            first_sector = group * SECTORS_PER_GROUP
            table = empty_table(self.area_id, self.barrier_number, first_sector, SECTORS_PER_GROUP)
            for offset in self.layout.table_offsets(group):
                self.backing.write(offset, table)

    def heal(self, sectors: Mapping[int, SectorImage]) -> None:
        """Write both copies of sectors exactly as they are (already sealed), durably."""
        try:
            self._write_sectors(sectors, end=self.backing.size())
            self._sync()
        except OSError as error:
            raise FaultError(
                FaultCode.IO_FAILURE_DURING_ONLINE,
                f"descriptors could not be repaired: {error}",
                errno=error.errno or errno.EIO,
            ) from error
