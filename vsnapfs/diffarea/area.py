"""An open diff area: preserved blocks, the barriers that make them durable, the superblock.

Owns every write to the diff area and the order of those writes. Promises:

* `barrier` returns only when the blocks written before it and their descriptors are durable (W2);
* `commit` returns only when both superblock copies are durable, one after the other;
* a sync that failed is never taken back: what it should have covered counts as unwritten until
  `rollback` has rewritten it (DESIGN's rule "a failed sync is never retried into success");
* before each barrier and commit the path is compared with the open file (fault 14), before each
  commit the generation on disk with ours (fault 15).

Leaves to others: which blocks to preserve and when (`volume`), finding the state after a stop
(`recovery`), checking everything (`verify`). Plain synchronous Python, called from worker threads
by one caller at a time; only `read_copies` and `prepare_growth` may run beside another call.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import xxhash

from ..backing import Backing, Bytes, Removed
from ..errors import FaultCode, FaultError, FormatError, UsageError
from ..units import format_size
from .descriptors import (
    Descriptor,
    SectorImage,
    area_id_of,
    empty_table,
    sector_is_valid,
)
from .index import Index
from .layout import (
    MAX_AREA_SIZE,
    MAX_COUNTER,
    SECTOR_SIZE,
    SECTORS_PER_GROUP,
    SLOTS_PER_SECTOR,
    SUPERBLOCK_OFFSETS,
    SUPERBLOCK_SIZE,
    Layout,
)
from .slots import SlotMap
from .superblock import Superblock, check, decode

_CACHED_SECTORS = 256
_MIN_STEP, _MAX_STEP = 1 << 20, 1 << 30


class DiffArea:
    """One open diff area. `recovery.open_area` makes one from disk, `format` a new one."""

    def __init__(self, backing: Backing, superblock: Superblock, slots: int | None = None) -> None:
        """slots: how many there are, if not as many as `superblock` says (a truncated file)."""
        self.backing = backing
        self.superblock = superblock
        self.layout = Layout(superblock.block_size)
        self.area_id = area_id_of(superblock.volume_id)
        count = self.layout.slots_in(superblock.allocated) if slots is None else slots
        self.slots = SlotMap(count)
        self.index = Index()
        #: Sectors of which both copies are bad. While there are any, a read that could depend
        #: on them is EIO (`may_trust`), and the volume is offline by fault 3.
        self.damaged_sectors: tuple[int, ...] = ()
        #: Slots described by damaged sectors: perhaps in use, never to be given out.
        self.unknown_slots: tuple[int, ...] = ()
        #: An old copy of the area has been put in its place (fault 15 at open): blocks may have
        #: been overwritten since, copies that it knows nothing of may exist. Nothing is written.
        self.is_old = False
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

    @classmethod
    def format(
        cls,
        backing: Backing,
        *,
        volume_id: bytes,
        block_size: int,
        replica_size: int,
        maximum: int,
        epoch: int = 0,
    ) -> DiffArea:
        """Make an empty diff area of at most `maximum` bytes in `backing`.

        epoch: numbers up to it were used by an earlier area of this volume. UsageError if the
        size is impossible, OSError (ENOSPC, EOPNOTSUPP, …) if the host does not give the space.
        """
        layout = Layout(block_size)
        check_maximum(layout, maximum)
        if backing.is_device and maximum > backing.size():
            raise UsageError(
                f"{backing.path} holds only {format_size(backing.size())}, "
                f"less than the {format_size(maximum)} asked for"
            )
        slots = layout.slots_in(maximum)
        if not backing.is_device:
            backing.truncate(0)
            slots = min(slots, _first_slots(layout, maximum))
        allocated = layout.size_of(slots)
        superblock = Superblock(
            volume_id=volume_id,
            block_size=block_size,
            replica_size=replica_size,
            maximum=maximum,
            allocated=allocated,
            epoch=epoch,
        )
        backing.allocate(0, allocated)
        # An old superblock must not be found while the tables below are only half written.
        for offset in SUPERBLOCK_OFFSETS:
            backing.write(offset, bytes(SUPERBLOCK_SIZE))
        backing.sync()
        area = cls(backing, superblock)
        area._write_tables(0, layout.groups_of(slots))
        area._sync()
        area._formatting = True
        area.commit()
        area._formatting = False
        return area

    # -- sizes ----------------------------------------------------------------------------------

    @property
    def used(self) -> int:
        """Bytes taken by metadata and by slots that hold or await a copy."""
        slots = self.slots
        return self.layout.metadata_size(len(slots)) + slots.in_use * self.layout.block_size

    @property
    def allocated(self) -> int:
        """Bytes reserved on the host."""
        return self.superblock.allocated

    @property
    def maximum(self) -> int:
        """Bytes it may grow to."""
        return self.superblock.maximum

    @property
    def growable_slots(self) -> int:
        """How many slots growing to the maximum would add."""
        return max(0, self.layout.slots_in(self.maximum) - len(self.slots))

    @property
    def minimum_for_used(self) -> int:
        """The smallest maximum that still holds all taken slots, in bytes."""
        return self.layout.size_of(self.layout.valid_slots(self.slots.in_use))

    def next_step(self, at_least: int) -> int:
        """To how many slots to grow next, so that `at_least` more are there (or the maximum)."""
        step = min(max(self.maximum // 16, _MIN_STEP), _MAX_STEP)
        target = self.layout.slots_in(min(self.allocated + step, self.maximum))
        needed = self.layout.valid_slots(len(self.slots) + at_least)
        return min(max(target, needed), self.layout.slots_in(self.maximum))

    @property
    def needs_rollback(self) -> bool:
        """True after a failed barrier or sync: nothing can be made durable before `rollback`."""
        return bool(self._suspects) or self._sync_failed

    # -- the superblock -------------------------------------------------------------------------

    def commit(self, **changes: Any) -> None:
        """Write the superblock with `changes`: both copies, one after the other, each synced.

        Unless `clean` is among the changes, it then says that the area is in use.
        FaultError 13 (I/O), 14 (gone), 15 (somebody else wrote to it). On an error `superblock`
        stays as it was, though the disk may already hold the new state in one copy.
        """
        self.check_present()
        self._refuse_if_old()
        offsets = self._check_not_overtaken()
        changes.setdefault("clean", False)
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

    def know_generations(self, generations: Iterable[int]) -> None:
        """Generations found on disk at open, in either copy: finding them again is no surprise."""
        self._generations.update(generations)

    def check_present(self) -> None:
        """FaultError 14 if the path no longer leads to this area."""
        try:
            self.backing.check_present()
        except Removed as error:
            raise FaultError(
                FaultCode.DIFF_AREA_REMOVED, str(error.strerror), errno=error.errno or errno.ENOENT
            ) from error

    def _refuse_if_old(self) -> None:
        # A commit would give it a generation that looks new at the next opening.
        if self.is_old:
            raise FaultError(
                FaultCode.EXTERNAL_WRITER_TO_DIFF_AREA, "it is an old copy of the diff area"
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
            except OSError:
                self._sync_failed = True
                self._failed_syncs += 1
                raise

    # -- preserving -----------------------------------------------------------------------------

    def write_copies(self, slots: Sequence[int], blocks: memoryview) -> None:
        """Write `len(slots)` blocks, lying one after the other in `blocks`, into their slots.

        Durable only after the next `barrier`. FaultError 7.
        """
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
            except OSError as error:
                raise FaultError(
                    FaultCode.COW_WRITE_FAILURE,
                    f"a copy could not be written: {error}",
                    errno=error.errno or errno.EIO,
                ) from error
            start = end

    def barrier(self, changes: Mapping[int, Descriptor | None]) -> None:
        """Record what slots hold (None: nothing any more) and make all of it durable.

        changes: slot → descriptor; the blocks were written with `write_copies`. FaultError 7
        (write or sync failed: nothing of it counts), 14, 3 (a sector cannot be read), 13 or 15
        (an earlier commit failed, and this one too).
        """
        self.check_present()
        self._refuse_if_old()
        if self._suspects:
            raise FaultError(FaultCode.COW_WRITE_FAILURE, "an earlier barrier has failed")
        if self.in_doubt:
            # The copy that may have reached the disk could leave out what is recorded here
            # (a smaller area, a deleted point).
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
            self._sync()
        except OSError as error:
            self._suspects = before
            raise FaultError(
                FaultCode.COW_WRITE_FAILURE,
                f"copies could not be made durable: {error}",
                errno=error.errno or errno.EIO,
            ) from error
        self.barrier_number = number
        self._remember(after)

    def rollback(self) -> None:
        """After a failed barrier: put its sectors back as they were, durably. FaultError 7.

        They keep the failed barrier's number. A higher one would make that barrier look like an
        older, complete one to a recovery that finds only some of the sectors put back.
        """
        self._sync_failed = False
        suspects = self._suspects
        if suspects:
            number = self.barrier_number + 1
            images = {sector: image.copy() for sector, image in suspects.items()}
            for sector, image in images.items():
                image.seal(self.area_id, number, sector, 0)
            try:
                self._write_sectors(images)
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

    def _write_sectors(self, images: Mapping[int, SectorImage]) -> None:
        for copy in (0, 1):
            for sector in sorted(images):
                self.backing.write(self.layout.sector_offsets(sector)[copy], images[sector].data)

    def _remember(self, images: Mapping[int, SectorImage]) -> None:
        self._sectors.update(images)
        while len(self._sectors) > _CACHED_SECTORS:
            del self._sectors[next(iter(self._sectors))]

    def _sector(self, sector: int) -> SectorImage:
        known = self._sectors.get(sector)
        return known if known is not None else self._load_sector(sector)

    def _load_sector(self, sector: int) -> SectorImage:
        problem: OSError | None = None
        for offset in self.layout.sector_offsets(sector):
            try:
                data = self.backing.read(offset, SECTOR_SIZE)
            except OSError as error:
                problem = error
                continue
            if sector_is_valid(memoryview(data), self.area_id, sector):
                return SectorImage(bytearray(data))
        raise FaultError(
            FaultCode.META_DATA_CORRUPTION,
            f"both copies of descriptor sector {sector} are bad"
            + (f" ({problem})" if problem else ""),
        )

    # -- reading copies -------------------------------------------------------------------------

    def may_trust(self, point: int, epoch: int | None) -> bool:
        """Whether a lookup of `point` that found a copy of `epoch` (None: none) is proven.

        With a descriptor sector lost, or in an old copy of the area, a copy in the point's own
        epoch is still the right one; anything else could be overruled by one we cannot see.
        """
        return epoch == point or not (self.damaged_sectors or self.is_old)

    def read_copies(self, wanted: Sequence[tuple[int, int, int]]) -> list[Bytes | None]:
        """The blocks of (block, epoch, slot) each, checked; None where the check fails (R1)."""
        size, layout = self.layout.block_size, self.layout
        results: list[Bytes | None] = []
        sectors: dict[int, SectorImage | None] = {}
        start = 0
        while start < len(wanted):
            offset, end = layout.slot_offset(wanted[start][2]), start + 1
            while end < len(wanted) and layout.slot_offset(wanted[end][2]) == offset + size * (
                end - start
            ):
                end += 1
            parts = self._read_blocks(offset, end - start)
            for (block, epoch, slot), data in zip(wanted[start:end], parts, strict=True):
                descriptor = self._descriptor(slot, sectors)
                good = (
                    data is not None
                    and descriptor is not None
                    and descriptor.block == block
                    and descriptor.epoch == epoch
                    and descriptor.hash == xxhash.xxh3_64_intdigest(data)
                )
                results.append(data if good else None)
            start = end
        return results

    def _read_blocks(self, offset: int, count: int) -> list[Bytes | None]:
        size = self.layout.block_size
        try:
            whole = memoryview(self.backing.read(offset, count * size))
            return [whole[i * size : (i + 1) * size] for i in range(count)]
        except OSError:
            if count == 1:
                return [None]
        # One bad block must not take its neighbours along.
        return [part for i in range(count) for part in self._read_blocks(offset + i * size, 1)]

    def _descriptor(self, slot: int, memo: dict[int, SectorImage | None]) -> Descriptor | None:
        sector, place = divmod(slot, SLOTS_PER_SECTOR)
        if sector not in memo:
            try:
                memo[sector] = self._load_sector(sector)
            except FaultError:
                memo[sector] = None
        image = memo[sector]
        return None if image is None else image.get(place)

    def descriptor_hash(self, slot: int) -> int | None:
        """The recorded xxh3-64 of a slot's block, None if its descriptor cannot be read."""
        descriptor = self._descriptor(slot, {})
        return None if descriptor is None else descriptor.hash

    # -- growing and shrinking ------------------------------------------------------------------

    def prepare_growth(self, slots: int) -> None:
        """Reserve space for `slots` slots in all and write the new groups' empty tables.

        Touches nothing that is in use and may run beside barriers. `commit_growth` makes it
        count. FaultError 10 (the host gives no space), 12 (the host cannot reserve space).
        """
        size, failed_syncs = self.layout.size_of(slots), self._failed_syncs
        try:
            self.backing.allocate(self.allocated, size - self.allocated)
            old_groups = self.layout.groups_of(len(self.slots))
            self._write_tables(old_groups, self.layout.groups_of(slots))
            self._sync()
            if self._failed_syncs != failed_syncs:
                # A barrier's sync, failed and rolled back meanwhile, may have lost the tables.
                raise OSError(errno.EIO, "another sync of the diff area failed meanwhile")
        except OSError as error:
            self.trim()
            unsupported = error.errno in (errno.EOPNOTSUPP, errno.ENOSYS)
            raise FaultError(
                FaultCode.FILE_SYSTEM_FAILURE if unsupported else FaultCode.GROW_FAILED,
                f"the diff area could not grow to {format_size(size)}: {error.strerror or error}",
                errno=error.errno or errno.EIO,
            ) from error

    def trim(self) -> None:
        """Give the host back what lies beyond `allocated` (a growth or shrink that ended early).

        A courtesy: the superblock is what counts. Not while one copy of it may say more.
        """
        if not self.backing.is_device and not self.in_doubt:
            try:
                self.backing.truncate(self.allocated)
            except OSError:
                return

    def commit_growth(self, slots: int) -> None:
        """Make a prepared growth count, durably. The caller then resizes `slots`."""
        self.commit(allocated=self.layout.size_of(slots))

    def _write_tables(self, first_group: int, end_group: int) -> None:
        for group in range(first_group, end_group):
            first_sector = group * SECTORS_PER_GROUP
            table = empty_table(self.area_id, self.barrier_number, first_sector, SECTORS_PER_GROUP)
            for offset in self.layout.table_offsets(group):
                self.backing.write(offset, table)

    def move_copies(self, moves: Sequence[tuple[int, int, int, int]]) -> None:
        """Duplicate copies into lower slots, durably: (block, epoch, old slot, new slot) each.

        The old ones stay valid. A copy that fails its check is moved as it is, with its
        descriptor, so that it goes on failing.
        """
        size = self.layout.block_size
        changes: dict[int, Descriptor | None] = {}
        for block, epoch, old, new in moves:
            descriptor = self._descriptor(old, {})
            if descriptor is None:
                raise FaultError(
                    FaultCode.META_DATA_CORRUPTION, f"slot {old} has no descriptor", block=block
                )
            data = self._read_blocks(self.layout.slot_offset(old), 1)[0]
            if data is None:
                raise FaultError(
                    FaultCode.COW_WRITE_FAILURE, f"slot {old} cannot be read", block=block
                )
            self.write_copies([new], memoryview(data)[:size])
            changes[new] = Descriptor(descriptor.hash, block, epoch)
        self.barrier(changes)

    def clear_descriptors(self, slots: Iterable[int]) -> None:
        """Mark slots unused on disk, durably, so that a later growth cannot revive them."""
        self.barrier(dict.fromkeys(slots))

    def cut(self, slots: int, maximum: int) -> None:
        """Shrink to `slots` slots and to a new maximum; then the caller resizes `slots`.

        None of the slots cut off is in use, or given out meanwhile.
        """
        self.commit(allocated=self.layout.size_of(slots), maximum=maximum)
        # Sectors of groups that are gone must not be written from memory again.
        last = self.layout.groups_of(slots) * SECTORS_PER_GROUP
        self._sectors = {s: image for s, image in self._sectors.items() if s < last}
        self.trim()

    def heal(self, sectors: Mapping[int, SectorImage]) -> None:
        """Write both copies of sectors exactly as they are (already sealed), durably."""
        try:
            self._write_sectors(sectors)
            self._sync()
        except OSError as error:
            raise FaultError(
                FaultCode.IO_FAILURE_DURING_ONLINE,
                f"descriptors could not be repaired: {error}",
                errno=error.errno or errno.EIO,
            ) from error


def check_maximum(layout: Layout, maximum: int) -> None:
    """UsageError unless `maximum` bytes is a possible size of a diff area."""
    if maximum < layout.minimum_size:
        raise UsageError(
            f"a diff area with {format_size(layout.block_size)} blocks needs at least "
            f"{format_size(layout.minimum_size)}, not {format_size(maximum)}",
            hint="Choose a larger --diff-area-size.",
        )
    if maximum > MAX_AREA_SIZE or layout.slots_in(maximum) == 0:
        raise UsageError(f"a diff area can have at most {format_size(MAX_AREA_SIZE)}")


def _first_slots(layout: Layout, maximum: int) -> int:
    step = min(max(maximum // 16, _MIN_STEP), _MAX_STEP)
    return max(layout.slots_in(layout.minimum_size), layout.slots_in(min(step, maximum)))
