"""Volumes with many preserved blocks, made in seconds instead of hours.

Owns the writing of diff areas that are real in everything that opening reads (superblocks, both
copies of every descriptor table, all checksums) and synthetic in one thing: the preserved blocks
are holes of a sparse file. A hole reads as zeros, and the descriptors carry the checksum of a block
of zeros, so `read` and `verify` find every copy in order. The replica is a hole, too.

Blocks lie in the replica in no order: neighbours in the diff area are far apart in the volume,
the worst case for sorting.
"""

from __future__ import annotations

import math
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import xxhash

from vsnapfs.backing import FileBacking
from vsnapfs.config import VolumePaths, load
from vsnapfs.diffarea.area import DiffArea
from vsnapfs.diffarea.descriptors import IN_USE, SECTOR_DTYPE
from vsnapfs.diffarea.layout import (
    SECTOR_SIZE,
    SECTORS_PER_GROUP,
    SLOTS_PER_GROUP,
    SLOTS_PER_SECTOR,
    Layout,
)
from vsnapfs.diffarea.recovery import read_superblock
from vsnapfs.diffarea.superblock import RecoveryPoint
from vsnapfs.volume.create import create_volume
from vsnapfs.volume.statefile import StateFile

#: Sectors that share a barrier number, as a busy volume's do.
_SECTORS_PER_BARRIER = 4
_STARTED_NS = 1_700_000_000 * 10**9


def make_volume(
    directory: Path,
    *,
    preserved: int,
    points: int,
    replica_size: int,
    block_size: int,
    room: int = 0,
) -> None:
    """A volume in `directory` with `preserved` copies, cleanly closed.

    points: how many live recovery points; the copies are spread over their epochs evenly.
    room: slots that stay free. ValueError if the replica has fewer blocks than are preserved.
    """
    layout = Layout(block_size)
    blocks = replica_size // block_size
    if preserved > blocks:
        raise ValueError(f"{replica_size} bytes have no {preserved} blocks")
    create_volume(
        directory, size=replica_size, diff_area_size=layout.minimum_size, block_size=block_size
    )
    paths = VolumePaths(directory, load(directory))
    backing, replica = FileBacking.open(paths.diff_area), FileBacking.open(paths.replica)
    state = FileBacking.open(paths.state)
    try:
        slots = layout.valid_slots(max(preserved + room, 1))
        size = layout.size_of(slots)
        backing.truncate(size)
        superblock, _ = read_superblock(backing)
        area = DiffArea(backing, superblock)
        step = _scattering(blocks)
        content = xxhash.xxh3_64_intdigest(bytes(block_size))
        for group in range(layout.groups_of(slots)):
            table = _table(area.area_id, group, preserved, points, blocks, step, content)
            for offset in layout.table_offsets(group):
                backing.write(offset, table)
        groups = layout.groups_of(slots)
        area.barrier_number = groups * SECTORS_PER_GROUP // _SECTORS_PER_BARRIER + 1
        area.commit(
            allocated=size,
            maximum=size,
            epoch=points,
            points=tuple(
                RecoveryPoint(number, _STARTED_NS + number * 10**9)
                for number in range(1, points + 1)
            ),
        )
        file = StateFile(state, superblock.volume_id)
        file.save(replace(file.load(), generation=area.superblock.generation, epoch=points))
        area.commit(clean=True, replica=replica.identity())
    finally:
        for opened in (backing, replica, state):
            opened.close()


def mark_unclean(directory: Path) -> None:
    """Leave the volume as a server that was killed leaves it."""
    backing = FileBacking.open(VolumePaths(directory, load(directory)).diff_area)
    try:
        superblock, _ = read_superblock(backing)
        DiffArea(backing, superblock).commit(clean=False)
    finally:
        backing.close()


def forget_cache(directory: Path) -> None:
    """Drop the volume's own files from the page cache; nobody else's."""
    for path in directory.iterdir():
        if path.is_file():
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(fd)
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(fd)


def _scattering(blocks: int) -> int:
    """A step that visits every one of `blocks` blocks once, far from the last one each time."""
    step = max(1, int(blocks * 0.6180339887))
    while math.gcd(step, blocks) != 1:
        step += 1
    return step


def _table(
    area_id: int, group: int, preserved: int, points: int, blocks: int, step: int, content: int
) -> bytes:
    """One copy of a group's descriptor table."""
    table = np.zeros(SECTORS_PER_GROUP, dtype=SECTOR_DTYPE)
    sectors = np.arange(SECTORS_PER_GROUP, dtype=np.uint64) + np.uint64(group * SECTORS_PER_GROUP)
    table["area"] = area_id
    table["sector"] = sectors
    first = group * SLOTS_PER_GROUP
    slots = np.arange(first, first + SLOTS_PER_GROUP, dtype=np.uint64).reshape(-1, SLOTS_PER_SECTOR)
    used = slots < np.uint64(preserved)
    barriers = sectors // np.uint64(_SECTORS_PER_BARRIER) + np.uint64(1)
    table["barrier"] = np.where(used.any(axis=1), barriers, 0)
    entries = table["entries"]
    # Python's integers would not overflow, but numpy's might: step and slot stay below 2^32.
    entries["block"] = np.where(used, slots * np.uint64(step) % np.uint64(blocks) + IN_USE, 0)
    # The copies are made in the order of the epochs, as they are in life.
    epochs = slots * np.uint64(max(points, 1)) // np.uint64(max(preserved, 1)) + np.uint64(1)
    entries["epoch"] = np.where(used, epochs, 0)
    entries["hash"] = np.where(used, np.uint64(content), np.uint64(0))
    table["fresh"] = used @ (1 << np.arange(SLOTS_PER_SECTOR, dtype=np.uint64))
    data = bytearray(table.tobytes())
    view = memoryview(data)
    for at in range(0, len(data), SECTOR_SIZE):
        check = xxhash.xxh3_64_intdigest(view[at + 8 : at + SECTOR_SIZE])
        data[at : at + 8] = check.to_bytes(8, "little")
    return bytes(data)
