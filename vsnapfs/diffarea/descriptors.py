"""Descriptors: which block, of which epoch, a slot holds, and the checksum of its content.

Owns the 512-byte sector that carries twenty of them. A sector names its area, its own number and
the barrier that wrote it last, marks the descriptors that this very barrier wrote (*fresh*), and
has one xxh3-64 over all of it. Every sector of the allocated area is written before the
superblock says it is there, so a sector that does not verify is damage, never "not yet used".

Blocks of nothing but zeros have no data in a slot: one descriptor stands for up to 64 neighbours,
with a bit for each. It is true from the moment it is written, whether its barrier was finished or
not: none of these blocks is overwritten before that.

Promise: a descriptor that rotted is never taken for an empty one. Source of the layout:
`docs/format.md`.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

from .layout import MAX_COUNTER, SECTOR_SIZE, SLOTS_PER_SECTOR

HEAD = struct.Struct("<QQQII")  # checksum, area id, barrier, sector number, fresh mask
ENTRY = struct.Struct("<QQII")  # content hash or mask, block | flags, epoch, reserved
IN_USE = 1 << 63
#: The descriptor stands for blocks of zeros: bit i of its first field for block + i.
ZEROS = 1 << 62
ZERO_SPAN = 64
BLOCK_MASK = (1 << 48) - 1

ENTRY_DTYPE = np.dtype([("hash", "<u8"), ("block", "<u8"), ("epoch", "<u4"), ("spare", "<u4")])
SECTOR_DTYPE = np.dtype(
    [
        ("check", "<u8"),
        ("area", "<u8"),
        ("barrier", "<u8"),
        ("sector", "<u4"),
        ("fresh", "<u4"),
        ("entries", ENTRY_DTYPE, (SLOTS_PER_SECTOR,)),
    ]
)
assert SECTOR_DTYPE.itemsize == SECTOR_SIZE


class Descriptor(NamedTuple):
    """What one slot holds: the xxh3-64 of the block's content, block number, epoch.

    zeros: the slot holds no data; bit i of `hash` says that block + i was all zeros in `epoch`.
    """

    hash: int
    block: int
    epoch: int
    zeros: bool = False

    def tells_zeros(self, block: int, epoch: int) -> bool:
        """Whether it says that `block` was all zeros in `epoch`."""
        at = block - self.block
        described = 0 <= at < ZERO_SPAN and bool(self.hash >> at & 1)
        return self.zeros and epoch == self.epoch and described


def with_zeros(known: Descriptor | None, block: int, epoch: int) -> Descriptor:
    """`known` (None: nothing yet), a descriptor of zeros of this span and epoch, with `block`."""
    first = block // ZERO_SPAN * ZERO_SPAN
    mask = known.hash if known is not None else 0
    return Descriptor(mask | 1 << block - first, first, epoch, zeros=True)


class SectorImage:
    """One sector in memory, being changed. `data` is what goes to disk after `seal`."""

    __slots__ = ("data",)

    def __init__(self, data: bytearray) -> None:
        self.data = data

    @classmethod
    def empty(cls) -> SectorImage:
        """A sector without descriptors, not sealed yet."""
        return cls(bytearray(SECTOR_SIZE))

    def copy(self) -> SectorImage:
        """An independent copy."""
        return SectorImage(bytearray(self.data))

    @property
    def barrier(self) -> int:
        """The barrier that wrote it last."""
        return int(HEAD.unpack_from(self.data)[2])

    @property
    def fresh(self) -> int:
        """Bit i: descriptor i was written by that barrier."""
        return int(HEAD.unpack_from(self.data)[4])

    def get(self, index: int) -> Descriptor | None:
        """Descriptor `index` (0 to 19), None if its slot is unused."""
        return descriptor_in(self.data, index)

    def put(self, index: int, descriptor: Descriptor | None) -> None:
        """Set descriptor `index`, or mark its slot unused."""
        offset = HEAD.size + index * ENTRY.size
        if descriptor is None:
            ENTRY.pack_into(self.data, offset, 0, 0, 0, 0)
        else:
            content, block, epoch, zeros = descriptor
            flags = IN_USE | ZEROS if zeros else IN_USE
            ENTRY.pack_into(self.data, offset, content, block | flags, epoch, 0)

    def seal(self, area_id: int, barrier: int, sector: int, fresh: int) -> None:
        """Fill in the head and the checksum."""
        HEAD.pack_into(self.data, 0, 0, area_id, barrier, sector, fresh)
        check = xxhash.xxh3_64_intdigest(memoryview(self.data)[8:])
        self.data[:8] = check.to_bytes(8, "little")


def descriptor_in(sector: bytes | bytearray | memoryview, index: int) -> Descriptor | None:
    """Descriptor `index` (0 to 19) of a valid sector, None if its slot is unused."""
    content, block, epoch, _ = ENTRY.unpack_from(sector, HEAD.size + index * ENTRY.size)
    if not block & IN_USE:
        return None
    return Descriptor(content, block & BLOCK_MASK, epoch, bool(block & ZEROS))


def sector_is_valid(data: memoryview, area_id: int, sector: int) -> bool:
    """True if `data` (512 bytes) is sector number `sector` of this area, unharmed."""
    check, area, barrier, number, _ = HEAD.unpack_from(data)
    return (
        number == sector
        and area == area_id
        and barrier <= MAX_COUNTER
        and bool(check == xxhash.xxh3_64_intdigest(data[8:SECTOR_SIZE]))
    )


def valid_sectors(table: bytearray, area_id: int, first: int) -> npt.NDArray[np.bool_]:
    """`sector_is_valid` for each sector of a whole table; `first` is the number of its first."""
    sectors = np.frombuffer(table, dtype=SECTOR_DTYPE)
    view, digest = memoryview(table), xxhash.xxh3_64_intdigest
    ends = range(SECTOR_SIZE, len(table) + 1, SECTOR_SIZE)
    checks = np.array([digest(view[end - SECTOR_SIZE + 8 : end]) for end in ends], dtype=np.uint64)
    good: npt.NDArray[np.bool_] = (
        (sectors["check"] == checks)
        & (sectors["sector"] == np.arange(first, first + len(sectors)))
        & (sectors["area"] == np.uint64(area_id))
        & (sectors["barrier"] <= np.uint64(MAX_COUNTER))
    )
    return good


def empty_table(area_id: int, barrier: int, first_sector: int, count: int) -> bytes:
    """`count` sealed sectors without descriptors: what a new group starts with."""
    parts = []
    for sector in range(first_sector, first_sector + count):
        image = SectorImage.empty()
        image.seal(area_id, barrier, sector, 0)
        parts.append(bytes(image.data))
    return b"".join(parts)


def zero_blocks(
    entries: npt.NDArray[np.void], chosen: npt.NDArray[np.intp]
) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.uint64]]:
    """The blocks that descriptors of zeros (`entries[chosen]`) stand for: (entry, block) each."""
    masks = np.ascontiguousarray(entries["hash"][chosen], dtype="<u8")
    bits = np.unpackbits(masks.view(np.uint8).reshape(-1, 8), axis=1, bitorder="little")
    rows, places = np.nonzero(bits)
    first = entries["block"][chosen][rows] & np.uint64(BLOCK_MASK)
    return chosen[rows], first + places.astype(np.uint64)


def area_id_of(volume_id: bytes) -> int:
    """The eight bytes of the volume id that every sector repeats."""
    return int.from_bytes(volume_id[:8], "little")
