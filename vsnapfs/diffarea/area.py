"""An open diff area: its sizes, the preserved blocks in it, growing and shrinking.

Owns what lies on top of `store`, which makes things durable: which slots there are and how many
are in use (C1), reading copies back with their checksums verified (R1), moving copies down before
a shrink. Leaves to others: which blocks to preserve and when (`volume`), finding the state after
a stop (`recovery`), checking everything (`verify`). Plain synchronous Python, called from worker
threads by one caller at a time; only `read_copies`, `read_into` and `prepare_growth` may run beside
another call.
"""

from __future__ import annotations

import errno
from collections.abc import Container, Iterable, Mapping, Sequence

import xxhash

from ..backing import Backing, Bytes
from ..errors import FaultCode, FaultError, UsageError
from ..units import format_size
from .descriptors import (
    Descriptor,
    SectorImage,
    sector_is_valid,
)
from .index import SLOT_MASK, ZEROS, Index
from .layout import (
    HEADER_SIZE,
    MAX_AREA_SIZE,
    SECTOR_SIZE,
    SECTORS_PER_GROUP,
    SLOTS_PER_SECTOR,
    SUPERBLOCK_OFFSETS,
    Layout,
)
from .mending import MendableStore
from .slots import SlotMap
from .superblock import NO_RING, RingName, Superblock, unfinished

Copy = tuple[int, int, int]
"""Block, epoch and slot of a preserved block, the slot as the index has it."""

#: Descriptor sectors kept for reading, 600 bytes each: they describe 1.2 GiB of 16 KiB blocks.
_KNOWN_SECTORS = 4096
_KNOWN_SPANS = 1 << 16
_MIN_STEP, _MAX_STEP = 1 << 20, 1 << 30


class DiffArea(MendableStore):
    """One open diff area. `recovery.open_area` makes one from disk, `format` a new one."""

    def __init__(self, backing: Backing, superblock: Superblock, slots: int | None = None) -> None:
        """slots: how many there are, if not as many as `superblock` says (a truncated file)."""
        super().__init__(backing, superblock)
        count = self.layout.slots_in(superblock.allocated) if slots is None else slots
        self.slots = SlotMap(count)
        self.index = Index()
        #: There was no memory for its index: no copy can be read, only the superblock is known.
        self.is_unread = False
        #: Slots described by damaged sectors: perhaps in use, never to be given out.
        self.unknown_slots: tuple[int, ...] = ()
        #: Where blocks of zeros of the current epoch are described: span (block // 64) → (slot,
        #: descriptor). Only some of them are known: what is not gets a slot of its own.
        self.zero_spans: dict[int, tuple[int, Descriptor]] = {}
        self._known: dict[int, SectorImage] = {}
        self._zeros = memoryview(bytes(superblock.block_size))
        self._buffer = memoryview(bytearray(superblock.block_size))

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
        generation: int = 0,
        barrier: int = 0,
        ring: RingName = NO_RING,
        boot: bytes = bytes(16),
    ) -> DiffArea:
        """Make an empty diff area of at most `maximum` bytes in `backing`.

        epoch: numbers up to it were used by an earlier area of this volume; generation, barrier:
        so were these. ring, boot: the write buffer in use, as in `Superblock`. UsageError if the
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
            slots = min(slots, _first_slots(layout, maximum))
        allocated = layout.size_of(slots)
        superblock = Superblock(
            volume_id=volume_id,
            block_size=block_size,
            replica_size=replica_size,
            maximum=maximum,
            allocated=allocated,
            generation=generation,
            barrier=barrier,
            epoch=epoch,
            ring=ring,
            boot=boot,
        )
        # Of an attempt that failed, `rollback` says why.
        backing.forget_cache()
        # An old superblock must not be found while the tables below are only half written, and a
        # file in which there is none must show, after a stop, that it is ours to make anew.
        for offset in SUPERBLOCK_OFFSETS:
            backing.write(offset, unfinished())
            backing.sync()
        if not backing.is_device:
            backing.truncate(HEADER_SIZE)
        backing.allocate(0, allocated)
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

    def remember_zeros(
        self, spans: Mapping[int, tuple[int, Descriptor]], used: Container[int]
    ) -> None:
        """What a barrier has just recorded of zeros. used: the slots that are in use now, of new
        ones.
        """
        known = self.zero_spans
        if len(known) + len(spans) > _KNOWN_SPANS:
            known.clear()
        for span, (slot, descriptor) in spans.items():
            if slot in used or (span in known and known[span][0] == slot):
                known[span] = slot, descriptor

    # -- reading copies -------------------------------------------------------------------------

    def may_trust(self, point: int, epoch: int | None) -> bool:
        """Whether a lookup of `point` that found a copy of `epoch` (None: none) is proven.

        With a descriptor sector lost, or in an old copy of the area, a copy in the point's own
        epoch is still the right one; anything else could be overruled by one we cannot see.
        """
        return epoch == point or not (self.damaged_sectors or self.is_old or self.is_unread)

    def read_copies(self, wanted: Sequence[Copy]) -> list[Bytes | None]:
        """The blocks of (block, epoch, slot) each, checked; None where the check fails (R1).

        Nothing that was read earlier counts: their descriptors are read from the disk, too.
        """
        size, count = self.layout.block_size, len(wanted)
        whole = memoryview(bytearray(count * size))
        good = self.read_into(wanted, whole, range(count), {})
        return [whole[i * size : (i + 1) * size] if good[i] else None for i in range(count)]

    def read_into(
        self,
        wanted: Sequence[Copy],
        whole: memoryview,
        places: Sequence[int],
        known: dict[int, SectorImage] | None = None,
    ) -> list[bool]:
        """Read (block, epoch, slot) each to its place in `whole`, counted in blocks.

        False where the check fails (R1); what lies there then is not to be used. known: descriptor
        sectors that need not be read again, if not those that earlier reads found to be valid.
        """
        known = self._known_sectors() if known is None else known
        size, backing, layout = self.layout.block_size, self.backing, self.layout
        runs: list[list[int]] = []  # first, end: neighbours on the disk and in `whole`
        offsets = [layout.slot_offset(slot) for _, _, slot in wanted]
        for i, (offset, place) in enumerate(zip(offsets, places, strict=True)):
            if wanted[i][2] & ZEROS:
                whole[place * size : (place + 1) * size] = self._zeros
                continue
            follows = bool(runs) and runs[-1][1] == i and offset == offsets[i - 1] + size
            if follows and place == places[i - 1] + 1:
                runs[-1][1] = i + 1
            else:
                runs.append([i, i + 1])
        views = [whole[places[i] * size : (places[end - 1] + 1) * size] for i, end in runs]
        # The disk is asked for all of it before anything is waited for.
        cold = [
            (run, view)
            for run, view in zip(runs, views, strict=True)
            if not backing.read_into_cached(offsets[run[0]], view)
        ]
        for sector in {(slot & SLOT_MASK) // SLOTS_PER_SECTOR for _, _, slot in wanted}:
            if sector not in known:
                backing.read_cached(layout.sector_offsets(sector)[0], SECTOR_SIZE)
        good = [True] * len(wanted)
        for (i, end), view in cold:
            good[i:end] = self._read_run(offsets[i], view)
        for i, (copy, place) in enumerate(zip(wanted, places, strict=True)):
            if good[i]:
                good[i] = self._is_copy(copy, whole[place * size : (place + 1) * size], known)
        return good

    def _read_run(self, offset: int, view: memoryview) -> list[bool]:
        """Read neighbouring blocks into `view`; one that is bad does not take the others along."""
        size = self.layout.block_size
        count = len(view) // size
        try:
            self.backing.read_into(offset, view)
        except OSError:
            if count == 1:
                return [False]
            parts = range(0, len(view), size)
            return [self._read_run(offset + at, view[at : at + size])[0] for at in parts]
        return [True] * count

    def _is_copy(self, copy: Copy, data: memoryview, known: dict[int, SectorImage]) -> bool:
        """Whether `data` is what a valid descriptor says of this copy. Its sector is `known` then.

        An old sector in memory can refuse what is right, and then the disk is asked. It accepts
        nothing wrong: there is never a second content of one block in one epoch.
        """
        block, epoch, slot = copy
        sector, place = divmod(slot & SLOT_MASK, SLOTS_PER_SECTOR)
        # Of zeros the descriptor says all there is.
        wanted = None if slot & ZEROS else Descriptor(xxhash.xxh3_64_intdigest(data), block, epoch)

        def fits(image: SectorImage | None) -> bool:
            found = None if image is None else image.get(place)
            if found is None or wanted is not None:
                return found is not None and found == wanted
            return found.tells_zeros(block, epoch)

        if fits(known.get(sector)):
            return True
        # The first copy of the sector nearly always serves; the twin lies far away.
        for twin in (0, 1):
            image = self._sector_copy(sector, twin)
            if image is not None and fits(image):
                known[sector] = image
                return True
        return False

    def _known_sectors(self) -> dict[int, SectorImage]:
        """Valid sectors that earlier reads have met. Several threads may add to it."""
        if len(self._known) > _KNOWN_SECTORS:
            self._known = {}
        return self._known

    def read_copy_cached(self, block: int, epoch: int, slot: int) -> memoryview | None:
        """One block, checked, if the host has it in its cache and we know its descriptor, or the
        host has that, too. Else None, and both are on their way from the disk.

        In the trio thread only. The next call overwrites what it returns.
        """
        backing, layout, buffer = self.backing, self.layout, self._buffer
        sector, place = divmod(slot & SLOT_MASK, SLOTS_PER_SECTOR)
        known = self._known.get(sector)
        if known is None:
            raw = backing.read_cached(layout.sector_offsets(sector)[0], SECTOR_SIZE)
            if raw is not None and sector_is_valid(memoryview(raw), self.area_id, sector):
                known = self._known_sectors()[sector] = SectorImage(bytearray(raw))
        if slot & ZEROS:
            found = known.get(place) if known is not None else None
            if found is not None and found.tells_zeros(block, epoch):
                return self._zeros
        elif not backing.read_into_cached(layout.slot_offset(slot), buffer) or known is None:
            return None
        elif known.get(place) == Descriptor(xxhash.xxh3_64_intdigest(buffer), block, epoch):
            return buffer
        self._known.pop(sector, None)
        return None

    def place_of(self, slot: int) -> int:
        """The offset of what `slot` (as the index has it) holds: its data, or its descriptor."""
        if slot & ZEROS:
            return self.layout.sector_offsets((slot & SLOT_MASK) // SLOTS_PER_SECTOR)[0]
        return self.layout.slot_offset(slot)

    def descriptor_of(self, slot: int) -> Descriptor | None:
        """What is recorded of a slot, None if nothing is or it cannot be read."""
        sector, place = divmod(slot, SLOTS_PER_SECTOR)
        image = self.known_sector(sector)
        return image.get(place) if image else None

    # -- growing and shrinking ------------------------------------------------------------------

    def prepare_growth(self, slots: int) -> None:
        """Reserve space for `slots` slots in all and write the new groups' empty tables.

        Touches nothing that is in use and may run beside barriers. A commit of `allocated` makes it
        count. FaultError 10 (the host gives no space), 12 (the host cannot reserve space), 3 or 15
        (`require_sound`).
        """
        self.require_sound()
        size, failed_syncs = self.layout.size_of(slots), self._failed_syncs
        try:
            if size > self.allocated:  # Else a growth was committed that then lacked memory.
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
                if self.backing.size() > self.allocated:  # A file that was cut is never extended.
                    self.backing.truncate(self.allocated)
            except OSError:
                return

    def move_copies(self, moves: Sequence[tuple[int, int, int, int]]) -> None:
        """Duplicate copies into lower slots, durably: (block, epoch, old slot, new slot) each.

        Slots with the bit `ZEROS` have no data, and come once for each block described there. The
        old ones stay valid. A copy that fails its check is moved as it is, with its descriptor, so
        that it goes on failing.
        """
        size = self.layout.block_size
        changes: dict[int, Descriptor | None] = {}
        for block, epoch, old, new in moves:
            descriptor = self.descriptor_of(old & SLOT_MASK)
            if descriptor is None:
                raise FaultError(
                    FaultCode.META_DATA_CORRUPTION, f"slot {old} has no descriptor", block=block
                )
            if descriptor.zeros:
                changes[new & SLOT_MASK] = descriptor
                continue
            data = memoryview(bytearray(size))
            if not self._read_run(self.layout.slot_offset(old), data)[0]:
                raise FaultError(
                    FaultCode.COW_WRITE_FAILURE, f"slot {old} cannot be read", block=block
                )
            self.write_copies([new], data)
            changes[new] = Descriptor(descriptor.hash, block, epoch)
        self.barrier(changes)

    def clear_descriptors(self, slots: Iterable[int]) -> None:
        """Mark slots unused on disk, durably, so that a later growth cannot revive them."""
        self.barrier(dict.fromkeys(slots))

    def cut(self, slots: int, maximum: int) -> None:
        """Shrink to `slots` slots and to a new maximum.

        None of the slots cut off is in use, or given out meanwhile.
        """
        # Sectors of groups that are gone must not be written from memory again.
        last = self.layout.groups_of(slots) * SECTORS_PER_GROUP
        kept = {s: image for s, image in self._sectors.items() if s < last}
        self.commit(allocated=self.layout.size_of(slots), maximum=maximum)
        # Nothing that could fail comes between: no slot beyond the end may be given out again.
        self.slots.resize(slots)
        self._sectors = kept
        self.trim()


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
