"""Where things lie in a diff area. Pure arithmetic; `docs/format.md` states it byte by byte.

    0          superblock, first copy      64 KiB
    64 KiB     superblock, second copy     64 KiB
    128 KiB    group 0, group 1, …         one after the other, the last may end early

    a group:   descriptor table, first copy    64 KiB (128 sectors, 20 descriptors each)
               slots 0 … 31                    32 blocks
               descriptor table, twin          64 KiB
               slots 32 … 2559                 up to 2528 blocks

A *slot* holds one preserved block and is described by one descriptor. The twin lies 32 blocks
after the first copy, so no small damage hits both. A group can end after any slot from the 32nd
on; its tables are always whole. Nothing ever moves when the area grows.
"""

from __future__ import annotations

from dataclasses import dataclass

KIB = 1024
SUPERBLOCK_SIZE = 64 * KIB
SUPERBLOCK_OFFSETS = (0, SUPERBLOCK_SIZE)
HEADER_SIZE = 2 * SUPERBLOCK_SIZE

SECTOR_SIZE = 512
SLOTS_PER_SECTOR = 20
SECTORS_PER_GROUP = 128
SLOTS_PER_GROUP = SLOTS_PER_SECTOR * SECTORS_PER_GROUP
TABLE_SIZE = SECTORS_PER_GROUP * SECTOR_SIZE
SLOTS_BEFORE_TWIN = 32

MIN_BLOCK_SIZE = 4 * KIB
MAX_BLOCK_SIZE = 1024 * KIB
DEFAULT_BLOCK_SIZE = 16 * KIB
MAX_POINTS = 512
#: Slots are numbered in 31 bits: the index has a use for the 32nd.
MAX_SLOTS = 2**31 - 1
MAX_REPLICA_SIZE = 64 * KIB**4
MAX_AREA_SIZE = 64 * KIB**4
#: Generations and barriers count up from 0; what is beyond it was never counted, but forged.
MAX_COUNTER = 2**63 - 1
#: Where nothing else stops a counter at its end: one that is found here or below can be counted on.
MAX_FOUND_COUNTER = 2**62 - 1


@dataclass(frozen=True)
class Layout:
    """The arithmetic for one block size (bytes)."""

    block_size: int

    @property
    def group_size(self) -> int:
        """Bytes of a whole group."""
        return 2 * TABLE_SIZE + SLOTS_PER_GROUP * self.block_size

    @property
    def minimum_size(self) -> int:
        """The smallest diff area: both superblocks and one group of 32 slots."""
        return HEADER_SIZE + 2 * TABLE_SIZE + SLOTS_BEFORE_TWIN * self.block_size

    def slots_in(self, size: int) -> int:
        """How many slots an area of `size` bytes can have (0 if it is too small)."""
        groups, rest = divmod(max(0, size - HEADER_SIZE), self.group_size)
        extra = (rest - 2 * TABLE_SIZE) // self.block_size
        if extra < SLOTS_BEFORE_TWIN:
            extra = 0
        return min(groups * SLOTS_PER_GROUP + extra, MAX_SLOTS)

    def size_of(self, slots: int) -> int:
        """Bytes of an area with exactly `slots` slots, `slots` as `slots_in` returns them."""
        groups, extra = divmod(slots, SLOTS_PER_GROUP)
        size = HEADER_SIZE + groups * self.group_size
        return size + (2 * TABLE_SIZE + extra * self.block_size if extra else 0)

    def valid_slots(self, at_least: int) -> int:
        """The smallest number of slots an area can end at that is not below `at_least`."""
        groups, extra = divmod(max(1, at_least), SLOTS_PER_GROUP)
        return groups * SLOTS_PER_GROUP + (max(extra, SLOTS_BEFORE_TWIN) if extra else 0)

    def groups_of(self, slots: int) -> int:
        """How many groups (the last perhaps short) hold `slots` slots."""
        return -(-slots // SLOTS_PER_GROUP)

    def group_end(self, slots: int) -> int:
        """The end of the group that a cut after `slots` slots leaves incomplete (or `slots`)."""
        return self.groups_of(slots) * SLOTS_PER_GROUP

    def metadata_size(self, slots: int) -> int:
        """Bytes of an area with `slots` slots that are not slots."""
        return HEADER_SIZE + self.groups_of(slots) * 2 * TABLE_SIZE

    def group_start(self, group: int) -> int:
        """Offset of a group's first table."""
        return HEADER_SIZE + group * self.group_size

    def table_offsets(self, group: int) -> tuple[int, int]:
        """Offsets of the two copies of a group's descriptor table."""
        start = self.group_start(group)
        return start, start + TABLE_SIZE + SLOTS_BEFORE_TWIN * self.block_size

    def sector_offsets(self, sector: int) -> tuple[int, int]:
        """Offsets of the two copies of a descriptor sector (numbered through all groups)."""
        group, within = divmod(sector, SECTORS_PER_GROUP)
        first, twin = self.table_offsets(group)
        return first + within * SECTOR_SIZE, twin + within * SECTOR_SIZE

    def slot_offset(self, slot: int) -> int:
        """Offset of a slot's block."""
        group, within = divmod(slot, SLOTS_PER_GROUP)
        tables = TABLE_SIZE if within < SLOTS_BEFORE_TWIN else 2 * TABLE_SIZE
        return self.group_start(group) + tables + within * self.block_size


def is_block_size(value: int) -> bool:
    """A power of two from 4 KiB to 1 MiB."""
    return MIN_BLOCK_SIZE <= value <= MAX_BLOCK_SIZE and value & (value - 1) == 0
