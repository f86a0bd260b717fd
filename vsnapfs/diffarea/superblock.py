"""The superblock: what a diff area is, how far it reaches, and which recovery points live.

Owns its encoding (64 KiB, little endian, one xxh3-64 over all of it) and nothing else; where the
two copies lie is `layout`'s business, when they are written is `area`'s. Promise: bytes that are
not a superblock of this version, or that rotted, are never returned as one.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import xxhash

from ..backing import Identity
from ..errors import Fault, FormatError
from .layout import (
    HEADER_SIZE,
    MAX_AREA_SIZE,
    MAX_COUNTER,
    MAX_POINTS,
    MAX_REPLICA_SIZE,
    SLOTS_PER_GROUP,
    SUPERBLOCK_SIZE,
    Layout,
    is_block_size,
)

MAGIC = b"VSNAPFS\x00"
FORMAT_VERSION = 1
MAX_LABEL = 96
MAX_POINT_NUMBER = 2**30 - 1

_HEAD = struct.Struct("<8sII16sQQIIQQQIIII4Q")
_FAULT_OFFSET, _FAULT_MAX = 512, 3580
_CATALOG_OFFSET = 4096
_ENTRY = struct.Struct(f"<IIq{MAX_LABEL}s")
_CHECK_OFFSET = SUPERBLOCK_SIZE - 8
_BUFFER = struct.Struct("<16s16sIxxxx3Q")
_BUFFER_OFFSET = 256
_CLEAN, _PROCESS = 1, 2
_NO_ID = bytes(16)
_ZEROS = Identity(0, 0, 0, 0)


@dataclass(frozen=True)
class RecoveryPoint:
    """A recovery point. number: never used twice; created_ns: since the epoch, UTC; label or ""."""

    number: int
    created_ns: int
    label: str = ""


class RingName(NamedTuple):
    """Which write buffer is in use: its random id, the replica it belongs to, and where it lies.

    device, inode: the replica's, as in `backing.FileId`. memory: the device number of the tmpfs.
    """

    ring_id: bytes = _NO_ID
    device: int = 0
    inode: int = 0
    memory: int = 0


NO_RING = RingName()


@dataclass(frozen=True)
class Superblock:
    """One state of a diff area. Sizes in bytes.

    generation: counts the commits. barrier: no barrier after this commit has a lower number.
    epoch: the number of the newest point ever created (0: none yet), and so the epoch that
    copies are made in. restoring: the point an in-place restore is bringing back, or 0.
    replica: the replica as a clean close left it (only meaningful when `clean`).
    ring: the write buffer in use, which the next opening empties. boot: the life of the machine in
    which this was written (meaningful with `ring` and `process`).
    process: copies are not made durable before blocks are overwritten (durability "process").
    suspect: points up to this number lived through a power failure like that, or a
    failed sync.
    """

    volume_id: bytes
    block_size: int
    replica_size: int
    maximum: int
    allocated: int
    generation: int = 0
    barrier: int = 0
    epoch: int = 0
    restoring: int = 0
    clean: bool = False
    replica: Identity = _ZEROS
    fault: Fault | None = None
    points: tuple[RecoveryPoint, ...] = field(default=())
    ring: RingName = NO_RING
    boot: bytes = _NO_ID
    process: bool = False
    suspect: int = 0

    def encode(self) -> bytes:
        """The 64 KiB of one copy."""
        buffer = bytearray(SUPERBLOCK_SIZE)
        _HEAD.pack_into(
            buffer,
            0,
            MAGIC,
            FORMAT_VERSION,
            SUPERBLOCK_SIZE,
            self.volume_id,
            self.generation,
            self.barrier,
            self.block_size,
            (_CLEAN if self.clean else 0) | (_PROCESS if self.process else 0),
            self.replica_size,
            self.maximum,
            self.allocated,
            self.epoch,
            self.restoring,
            len(self.points),
            SLOTS_PER_GROUP,
            *self.replica,
        )
        ring_id, *place = self.ring
        _BUFFER.pack_into(buffer, _BUFFER_OFFSET, ring_id, self.boot, self.suspect, *place)
        text = _fault_text(self.fault)
        struct.pack_into("<I", buffer, _FAULT_OFFSET, len(text))
        buffer[_FAULT_OFFSET + 4 : _FAULT_OFFSET + 4 + len(text)] = text
        for index, point in enumerate(self.points):
            label = point.label.encode()
            offset = _CATALOG_OFFSET + index * _ENTRY.size
            _ENTRY.pack_into(buffer, offset, point.number, len(label), point.created_ns, label)
        check = xxhash.xxh3_64_intdigest(memoryview(buffer)[:_CHECK_OFFSET])
        struct.pack_into("<Q", buffer, _CHECK_OFFSET, check)
        return bytes(buffer)


def unfinished() -> bytes:
    """What stands in the place of a superblock while an area is made: it fails its checksum."""
    head = struct.pack("<8sII", MAGIC, FORMAT_VERSION, SUPERBLOCK_SIZE)
    return head.ljust(SUPERBLOCK_SIZE, b"\0")


def _fault_text(fault: Fault | None) -> bytes:
    if fault is None:
        return b""
    text = json.dumps(fault.to_json(), ensure_ascii=False).encode("utf-8", "backslashreplace")
    if len(text) > _FAULT_MAX:
        # Only the free text and the path can be long; the numbers must survive.
        short = replace(fault, message=fault.message[:100], diff_area=(fault.diff_area or "")[:200])
        text = json.dumps(short.to_json(), ensure_ascii=False).encode("utf-8", "backslashreplace")
    return text


def decode(data: bytes | bytearray | memoryview) -> Superblock:
    """Read one copy. FormatError says why it is none: foreign, other version, rotted, absurd."""
    view = memoryview(data)
    if len(view) != SUPERBLOCK_SIZE or bytes(view[:8]) != MAGIC:
        raise FormatError("this is no vsnapfs diff area (no superblock)", code="not-a-diff-area")
    head = _HEAD.unpack_from(view)
    version, size = head[1], head[2]
    if version != FORMAT_VERSION or size != SUPERBLOCK_SIZE:
        raise FormatError(
            f"this diff area has format version {version}; this program reads {FORMAT_VERSION}",
            hint="Use the vsnapfs release that wrote it.",
            code="foreign-version",
        )
    (recorded,) = struct.unpack_from("<Q", view, _CHECK_OFFSET)
    if recorded != xxhash.xxh3_64_intdigest(view[:_CHECK_OFFSET]):
        raise FormatError("the superblock fails its checksum", code="checksum")
    (_, _, _, volume_id, generation, barrier, block_size, flags, *rest) = head
    replica_size, maximum, allocated, epoch, restoring, count, slots_per_group, *identity = rest
    ring_id, boot, suspect, *place = _BUFFER.unpack_from(view, _BUFFER_OFFSET)
    _demand(slots_per_group == SLOTS_PER_GROUP, "group size")
    _demand(count <= MAX_POINTS, "number of points")
    superblock = Superblock(
        volume_id=volume_id,
        block_size=block_size,
        replica_size=replica_size,
        maximum=maximum,
        allocated=allocated,
        generation=generation,
        barrier=barrier,
        epoch=epoch,
        restoring=restoring,
        clean=bool(flags & _CLEAN),
        replica=Identity(*identity),
        fault=_decode_fault(view),
        points=tuple(_decode_point(view, index) for index in range(count)),
        ring=RingName(ring_id, *place),
        boot=boot,
        process=bool(flags & _PROCESS),
        suspect=suspect,
    )
    check(superblock)
    return superblock


def check(superblock: Superblock) -> None:
    """FormatError if its values contradict each other, so that no opening would accept it."""
    block_size, allocated = superblock.block_size, superblock.allocated
    _demand(is_block_size(block_size), "block size")
    layout = Layout(block_size)
    _demand(0 < superblock.replica_size <= MAX_REPLICA_SIZE, "replica size")
    _demand(HEADER_SIZE < allocated <= superblock.maximum <= MAX_AREA_SIZE, "sizes")
    _demand(layout.size_of(layout.slots_in(allocated)) == allocated, "allocated size")
    _demand(superblock.epoch <= MAX_POINT_NUMBER, "epoch")
    numbers = [point.number for point in superblock.points]
    _demand(len(numbers) <= MAX_POINTS, "number of points")
    _demand(numbers == sorted(set(numbers)), "order of the points")
    _demand(not numbers or 0 < numbers[0] <= numbers[-1] <= superblock.epoch, "point numbers")
    _demand(superblock.restoring in (0, *numbers), "point being restored")
    _demand(superblock.suspect <= superblock.epoch, "suspect points")
    _demand(superblock.generation <= MAX_COUNTER, "generation")
    _demand(superblock.barrier <= MAX_COUNTER, "barrier")
    _demand(all(len(point.label.encode()) <= MAX_LABEL for point in superblock.points), "label")


def _demand(condition: bool, what: str) -> None:
    if not condition:
        raise FormatError(f"the superblock is inconsistent ({what})", code="inconsistent")


def _decode_point(view: memoryview, index: int) -> RecoveryPoint:
    offset = _CATALOG_OFFSET + index * _ENTRY.size
    number, length, created_ns, label = _ENTRY.unpack_from(view, offset)
    _demand(length <= MAX_LABEL, "label")
    try:
        # Replacing what is no UTF-8 would make the label longer than the next commit has room for.
        return RecoveryPoint(number, created_ns, label[:length].decode())
    except UnicodeDecodeError:
        raise FormatError("the superblock is inconsistent (label)", code="inconsistent") from None


def _decode_fault(view: memoryview) -> Fault | None:
    (length,) = struct.unpack_from("<I", view, _FAULT_OFFSET)
    if length == 0:
        return None
    _demand(length <= _FAULT_MAX, "fault record")
    text = bytes(view[_FAULT_OFFSET + 4 : _FAULT_OFFSET + 4 + length])
    try:
        return Fault.from_json(json.loads(text))
    except (ValueError, KeyError, TypeError, RecursionError):
        raise FormatError("the superblock's fault record cannot be read") from None
