"""What a diff area file says about itself, for `vsnapfs inspect`. Reads only, takes no lock."""

from __future__ import annotations

import os
import stat
import uuid
from pathlib import Path
from typing import Any

import numpy as np

from ..backing import device_size
from ..errors import FormatError, VsnapError
from .descriptors import IN_USE, SECTOR_DTYPE, ZEROS, area_id_of, sector_is_valid
from .layout import (
    HEADER_SIZE,
    SECTOR_SIZE,
    SECTORS_PER_GROUP,
    SLOTS_PER_GROUP,
    SUPERBLOCK_OFFSETS,
    SUPERBLOCK_SIZE,
    TABLE_SIZE,
    Layout,
)
from .superblock import FORMAT_VERSION, NO_RING, Superblock, decode


def inspect_file(path: Path) -> dict[str, Any]:
    """Superblocks, catalog and groups of the diff area in `path` (sizes and offsets in bytes).

    FormatError if neither superblock can be read; VsnapError if the file cannot.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise VsnapError(f"{path} cannot be opened: {error.strerror}") from None
    try:
        return _inspect(path, fd)
    except OSError as error:
        raise VsnapError(f"{path} cannot be read: {error.strerror}") from None
    finally:
        os.close(fd)


def _inspect(path: Path, fd: int) -> dict[str, Any]:
    mode = os.fstat(fd).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
        raise VsnapError(f"{path} is neither a file nor a block device")
    size = device_size(fd) if stat.S_ISBLK(mode) else os.fstat(fd).st_size
    if size < HEADER_SIZE:
        raise FormatError(f"{path} is no diff area: it has only {size} bytes", code="truncated")
    copies: list[dict[str, Any]] = []
    good: list[Superblock] = []
    errors: list[FormatError] = []
    for offset in SUPERBLOCK_OFFSETS:
        try:
            superblock = decode(os.pread(fd, SUPERBLOCK_SIZE, offset))
        except FormatError as error:
            errors.append(error)
            copies.append({"offset": offset, "valid": False, "problem": error.message})
        else:
            good.append(superblock)
            copies.append({"offset": offset, "valid": True, "generation": superblock.generation})
    if not good:
        raise FormatError(f"{path}: {errors[0].message}", hint=errors[0].hint, code=errors[0].code)
    newest = max(good, key=lambda superblock: superblock.generation)
    layout = Layout(newest.block_size)
    slots = layout.slots_in(newest.allocated)
    return {
        "path": str(path),
        "kind": "diff area",
        "format_version": FORMAT_VERSION,
        "file_size": size,
        "superblocks": copies,
        "volume_id": str(uuid.UUID(bytes=newest.volume_id)),
        "generation": newest.generation,
        "barrier": newest.barrier,
        "clean": newest.clean,
        "block_size": newest.block_size,
        "replica_size": newest.replica_size,
        "allocated": newest.allocated,
        "maximum": newest.maximum,
        "slots": slots,
        "metadata": layout.metadata_size(slots),
        "epoch": newest.epoch,
        "restoring": newest.restoring,
        "write_buffer": _ring(newest),
        "replica_identity": newest.replica._asdict() if newest.clean else None,
        "fault": newest.fault.to_json() if newest.fault else None,
        "recovery_points": [
            {"number": point.number, "created_ns": point.created_ns, "label": point.label}
            for point in newest.points
        ],
        "groups": [
            _group(fd, layout, group, slots, area_id_of(newest.volume_id))
            for group in range(layout.groups_of(slots))
            if layout.group_start(group) < size  # the file may be shorter than it says
        ],
    }


def _ring(superblock: Superblock) -> dict[str, Any] | None:
    """The write buffer that the next opening in the same life of the machine carries out."""
    name = superblock.ring
    if name == NO_RING:
        return None
    place = {"replica_device": name.device, "replica_inode": name.inode, "memory": name.memory}
    return {"ring_id": name.ring_id.hex(), "boot": superblock.boot.hex()} | place


def _group(fd: int, layout: Layout, group: int, slots: int, area_id: int) -> dict[str, Any]:
    first = group * SLOTS_PER_GROUP
    count = min(SLOTS_PER_GROUP, slots - first)
    offsets = layout.table_offsets(group)
    bad = []
    table = b""
    for offset in offsets:
        data = os.pread(fd, TABLE_SIZE, offset).ljust(TABLE_SIZE, b"\0")
        view = memoryview(data)
        invalid = [
            group * SECTORS_PER_GROUP + index
            for index in range(SECTORS_PER_GROUP)
            if not sector_is_valid(
                view[index * SECTOR_SIZE : (index + 1) * SECTOR_SIZE],
                area_id,
                group * SECTORS_PER_GROUP + index,
            )
        ]
        bad.append(invalid)
        if not table or (bad[0] and not invalid):
            table = data
    sectors = np.frombuffer(table, dtype=SECTOR_DTYPE)
    entries = sectors["entries"].reshape(-1)[:count]
    in_use = entries[(entries["block"] & np.uint64(IN_USE)) != 0]
    return {
        "group": group,
        "tables": list(offsets),
        "first_slot": first,
        "slots": count,
        "descriptors": len(in_use),
        "descriptors_of_zeros": int(np.count_nonzero(in_use["block"] & np.uint64(ZEROS))),
        "epochs": sorted({int(epoch) for epoch in in_use["epoch"]}),
        "newest_barrier": int(sectors["barrier"].max()),
        "bad_sectors": bad[0],
        "bad_twin_sectors": bad[1],
    }
