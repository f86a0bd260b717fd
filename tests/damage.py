"""Damage to the diff area of a simulated host, and how it is taken back.

Owns the ways in which an area can be such that something in it cannot be seen: descriptor sectors
that are bad or unreadable in both copies, a file that ends too early.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from functools import partial

from filefuzz import poke
from rig import BLOCK, Rig
from simdisk import SimBacking

from vsnapfs.diffarea.layout import HEADER_SIZE, SECTOR_SIZE, SLOTS_PER_SECTOR, Layout
from vsnapfs.diffarea.recovery import read_superblock

LAYOUT = Layout(BLOCK)
Undo = Callable[[], None]


def written_back(rig: Rig) -> None:
    """The host has written its cache to the disk: only what lies there rots."""
    file = rig.host.files["area"]
    for change in file.journal:
        change.apply(file.disk)
    file.journal = []


def rot(rig: Rig, sector: int = 0) -> Undo:
    """Both copies of a descriptor sector are overwritten."""
    written_back(rig)
    offsets = LAYOUT.sector_offsets(sector)
    kept = [rig.host.files["area"].cache.read(offset, SECTOR_SIZE) for offset in offsets]
    for offset in offsets:
        poke(rig, "area", offset, b"\xa5" * SECTOR_SIZE)

    def undo() -> None:
        for offset, data in zip(offsets, kept, strict=True):
            poke(rig, "area", offset, data)

    return undo


def unreadable(rig: Rig, sector: int = 0) -> Undo:
    """The disk does not give out both copies of a descriptor sector, for now."""
    offsets = LAYOUT.sector_offsets(sector)
    host = rig.host

    def bad(backing: SimBacking, operation: str, start: int, length: int) -> None:
        if (backing.name, operation) == ("area", "read") and any(
            start < offset + SECTOR_SIZE and offset < start + length for offset in offsets
        ):
            raise OSError(errno.EIO, "bad sector")

    host.hooks.append(bad)
    return host.hooks.clear


def cut(rig: Rig, size: int) -> Undo:
    """The file ends earlier."""
    written_back(rig)
    file = rig.host.files["area"]
    tail = file.cache.read(size, file.cache.size - size)
    space, written = set(file.space), set(file.written)
    for pages in (file.cache, file.disk):
        pages.resize(size)

    def undo() -> None:
        poke(rig, "area", size, tail)
        rig.host.files["area"].space |= space
        rig.host.files["area"].written |= written

    return undo


def cut_slots(rig: Rig) -> Undo:
    """Behind the first slot."""
    return cut(rig, LAYOUT.slot_offset(1))


def cut_tables(rig: Rig) -> Undo:
    """In the middle of the first group's tables: nothing of the copies is left."""
    return cut(rig, LAYOUT.table_offsets(0)[0] + 3 * SECTOR_SIZE)


DAMAGES: dict[str, Callable[[Rig], Undo]] = {
    "rot": rot,
    "unreadable": unreadable,
    "rot elsewhere": partial(rot, sector=1),
    "cut in the slots": cut_slots,
    "cut in the tables": cut_tables,
}


def by_number(rig: Rig, number: int) -> Undo:
    """Some sector rots, or (a file, every fourth number) the file is cut somewhere."""
    file = rig.host.files["area"]
    backing = SimBacking(rig.host, "area", file)
    allocated = read_superblock(backing)[0].allocated
    number, cuts = divmod(number, 4)
    if cuts or file.is_device:
        sectors = -(-LAYOUT.slots_in(allocated) // SLOTS_PER_SECTOR)
        return rot(rig, number % sectors)
    return cut(rig, HEADER_SIZE + number % (allocated - HEADER_SIZE))
