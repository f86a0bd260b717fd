"""The ring: acknowledged writes in shared memory, which a killed process leaves behind.

Owns the layout of that memory. Promises:

* a record that `append` returned for is found by `records` of a later opening, whole and in its
  order, however the process ended (W3); one that was being written is not found at all, one that
  rotted is counted, and those after it are found;
* a record released before is never found again, so that nothing newer is overwritten by it;
* memory that is another ring's, another volume's, rotted or of the wrong size is an error, and
  never read as records;
* a write that `append` fails for, whatever the reason, has left no record.

After a power loss there is no ring, which is what W4 leaves open. Where rings lie is `shm`'s
business, who may use which `adoption`'s, and when it is emptied `buffer`'s.

    0      head: xxh3-64 over it, magic, version, size, ring id, volume id, device and inode of the
           replica, device of the tmpfs
    256    xxh3-64 of the next eight bytes, generation of the replica's inode (0: not known)
    288    the same, number of its file system (0: not known)
    320    the same, generation of the superblock that named it when it was last taken over; again
           at 352, so that being killed between two bytes of one leaves the other
    384    xxh3-64 of the rest, newest generation and newest barrier of the diff area (zeros: not
           told yet); again at 448
    512    first cursor    the oldest record not released: its sequence number and position
    1024   second cursor   (written in turn; the valid one with the higher number counts)
    1536   twin of the first, written after it: were the newer cursor lost, the older would bring
    2048   back what has been overwritten since. Twin of the second
    4096   records                 64-byte head, data, padded to 64 bytes; the space is used in turn

A record's head: xxh3-64 of the rest of it, eight bytes of the ring id, sequence number, offset in
the replica, length, xxh3-64 of the data. A length of 2^32-1 says "go on at the start".
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterator
from typing import NamedTuple

import xxhash

from ..backing import Bytes
from ..diffarea.layout import MAX_FOUND_COUNTER
from ..diffarea.superblock import RingName
from ..errors import FormatError

MAGIC = b"VSNRING\x00"
VERSION = 2
RECORDS = 4096
ALIGN = 64

_HEAD = struct.Struct("<8sIIQ16s16s3Q")
_BORN_AT, _SYSTEM_AT, _TAKEN_AT, _AREA_AT = (256,), (288,), (320, 352), (384, 448)
CURSORS = ((512, 1536), (1024, 2048))
_CURSOR = struct.Struct("<QQQ")  # checksum, sequence number, position
_RECORD = struct.Struct("<QQQQQI")  # checksum, ring, sequence number, offset, data's hash, length
_TURN = 2**32 - 1
#: What a head may plausibly say: a flipped bit in the number is rot, not another version's ring.
_LAST_VERSION = 99

_hash = xxhash.xxh3_64_intdigest


class Record(NamedTuple):
    """One write. offset, length: in the replica. where: of the data in the ring's memory.

    sequence, position, end: its number, and where it begins and ends in the endless ring.
    """

    offset: int
    length: int
    where: int
    sequence: int
    position: int
    end: int


Memory = mmap.mmap | bytearray


class Head(NamedTuple):
    """What a ring says of itself. size: bytes of the whole."""

    size: int
    name: RingName
    volume_id: bytes


def head_of(size: int, name: RingName, volume_id: bytes) -> bytes:
    """The first bytes of a ring."""
    ring_id, *place = name
    body = _HEAD.pack(MAGIC, VERSION, 0, size, ring_id, volume_id, *place)
    return struct.pack("<Q", _hash(body)) + body


def read_head(memory: Bytes | mmap.mmap) -> Head:
    """What stands at the start of `memory`. FormatError, "foreign-version" if it was another's."""
    if len(memory) < 8 + _HEAD.size:
        raise FormatError("the write buffer has an impossible size")
    (check,) = struct.unpack_from("<Q", memory)
    magic, version, _, size, ring_id, volume_id, *place = _HEAD.unpack_from(memory, 8)
    if magic == MAGIC and 0 < version <= _LAST_VERSION and version != VERSION:
        raise FormatError(
            f"it is of format version {version}, this program knows {VERSION}",
            hint="Use the vsnapfs release that wrote it.",
            code="foreign-version",
        )
    if check != _hash(memoryview(memory)[8 : 8 + _HEAD.size]):
        raise FormatError("the head of the write buffer fails its checksum")
    return Head(size, RingName(ring_id, *place), volume_id)


class Ring:
    """A ring over `memory`. Make one with `Ring.make` or, over what another left, `Ring.found`.

    fd: the file that holds it, locked for as long as this object lives; -1 if there is none.
    is_copy: `memory` is only a copy of the file: it can be carried out, and must not be added to.
    """

    def __init__(
        self, memory: Memory, name: RingName, fd: int = -1, *, is_copy: bool = False
    ) -> None:
        self.name = name
        self.memory = memory
        self.view = memoryview(memory)
        self.capacity = (len(memory) - RECORDS) & -ALIGN
        self.fd = fd
        self.is_copy = is_copy
        self._salt = int.from_bytes(name.ring_id[:8], "little")
        self._sequence = 1  # of the next record
        self._tail = 0  # where it begins
        self._start = 0  # where the oldest one that is not released begins
        self._turn = 0  # which copy of the cursor is written next
        self._taking = 0  # the generation that `take` was told and that is not in `memory` yet
        #: How many records `records` went past because they are rotted.
        self.rotted = 0

    @classmethod
    def make(
        cls,
        memory: Memory,
        name: RingName,
        volume_id: bytes,
        fd: int = -1,
        born: int = 0,
        system: int = 0,
    ) -> Ring:
        """Lay out an empty ring. `memory` is all zeros, but for the head perhaps. born, system: as
        in `backing.FileId`, of the replica.
        """
        head = head_of(len(memory), name, volume_id)
        memory[: len(head)] = head
        ring = cls(memory, name, fd)
        ring._put_numbers(_BORN_AT, born)
        ring._put_numbers(_SYSTEM_AT, system)
        ring._write_cursor(1, 0)
        return ring

    @classmethod
    def found(
        cls,
        memory: Memory,
        name: RingName,
        volume_id: bytes,
        fd: int = -1,
        *,
        is_copy: bool = False,
    ) -> Ring:
        """The ring that a process left in `memory`. FormatError if it is not the one named: code
        "foreign-version" if only another version of this program can tell.
        """
        found = read_head(memory)
        if len(memory) < RECORDS + ALIGN:
            raise FormatError("the write buffer has an impossible size")
        if found != Head(len(memory), name, volume_id):
            raise FormatError("it is the write buffer of another volume, or of a copy of this one")
        ring = cls(memory, name, fd, is_copy=is_copy)
        try:
            ring._find_cursor()
        except BaseException:
            ring.view.release()  # Or the caller could not unmap it.
            raise
        return ring

    @property
    def born(self) -> int:
        """Of the replica it was made for, as in `backing.FileId`; 0 if that is not known."""
        return self._numbers(_BORN_AT, 1)[0]

    @property
    def system(self) -> int:
        """Likewise: what tells the file system, or subvolume, of that replica."""
        return self._numbers(_SYSTEM_AT, 1)[0]

    @property
    def taken(self) -> int:
        """The generation of the superblock with which an opening last took it over and changed it;
        0: none did.
        """
        return self._numbers(_TAKEN_AT, 1)[0]

    @property
    def area(self) -> tuple[int, int]:
        """(generation, barrier) that `note_area` was last told, zeros: nothing."""
        generation, barrier = self._numbers(_AREA_AT, 2)
        return generation, barrier

    def note_area(self, generation: int, barrier: int) -> None:
        """The diff area has come so far: one that is behind is an old copy of it."""
        if not self.is_copy:  # One that takes its place is named by a newer superblock anyway.
            self._note_taking()
            self._put_numbers(_AREA_AT, generation, barrier)

    def take(self, generation: int) -> None:
        """Before its next change: it is not what an older superblock left it as any more."""
        self._taking = generation

    def _note_taking(self) -> None:
        if self._taking:
            self._put_numbers(_TAKEN_AT, self._taking)
            self._taking = 0

    def _numbers(self, places: tuple[int, ...], count: int) -> tuple[int, ...]:
        """What `_put_numbers` left there: the highest whole copy, zeros if there is none."""
        found = [(0,) * count]
        for at in places:
            check, *numbers = struct.unpack_from(f"<{1 + count}Q", self.memory, at)
            if check == _hash(struct.pack(f"<{count}Q", *numbers)):
                found.append(tuple(numbers))
        return max(found)

    def _put_numbers(self, places: tuple[int, ...], *numbers: int) -> None:
        body = struct.pack(f"<{len(numbers)}Q", *numbers)
        for at in places:
            self._put(at, struct.pack("<Q", _hash(body)) + body)

    def _put(self, at: int, data: bytes) -> None:
        self.memory[at : at + len(data)] = data
        if self.is_copy:
            os.pwrite(self.fd, data, at)

    @property
    def is_unused(self) -> bool:
        """Whether it was never finished: whoever made it died before anything could name it."""
        return not any(any(self.view[at : at + _CURSOR.size]) for pair in CURSORS for at in pair)

    def _find_cursor(self) -> None:
        found = []
        for turn, pair in enumerate(CURSORS):
            whole = [cursor for at in pair if (cursor := self._cursor_at(at))]
            if not whole and all(any(self.view[at : at + _CURSOR.size]) for at in pair):
                # It may be the newer one. (A kill leaves one of the two whole, or never written.)
                raise FormatError("a cursor of the write buffer and its twin fail their checksum")
            found += [(*cursor, turn) for cursor in whole]
        if not found:
            raise FormatError("the write buffer has no cursor")
        self._sequence, self._start, turn = max(found)
        self._tail, self._turn = self._start, 1 - turn

    def _cursor_at(self, offset: int) -> tuple[int, int] | None:
        """Sequence number, position; None if it is not whole, or none that a ring can have."""
        check, sequence, position = _CURSOR.unpack_from(self.memory, offset)
        if check != _hash(self.view[offset + 8 : offset + _CURSOR.size]):
            return None
        is_possible = 0 < sequence <= MAX_FOUND_COUNTER and position <= MAX_FOUND_COUNTER
        return (sequence, position) if is_possible and position % ALIGN == 0 else None

    def _write_cursor(self, sequence: int, position: int) -> None:
        body = struct.pack("<QQ", sequence, position)
        whole = struct.pack("<Q", _hash(body)) + body
        # One that an earlier kill has left half written comes first: the other is still needed.
        for offset in sorted(CURSORS[self._turn], key=lambda at: self._cursor_at(at) is not None):
            self._put(offset, whole)
        self._turn = 1 - self._turn

    # -- appending ------------------------------------------------------------------------------

    @property
    def used(self) -> int:
        """Bytes taken by records that are not released."""
        return self._tail - self._start

    def append(self, offset: int, data: Bytes) -> Record | None:
        """Keep `data` for `offset`; None if there is no room now (there is, once all is released,
        for any data up to half of `capacity`).

        Whatever it raises, there is no record then.
        """
        length = len(data)
        need = (ALIGN + length + ALIGN - 1) & -ALIGN
        place = self._tail % self.capacity
        rest = self.capacity - place
        if need > rest:
            if self._tail - self._start + rest + need > self.capacity:
                return None
            self._put_head(place, 0, 0, _TURN)
            self._tail += rest
            place = 0
        elif self._tail - self._start + need > self.capacity:
            return None
        where = RECORDS + place + ALIGN
        self._note_taking()
        # The data first: a record counts from the moment its head is there.
        self.memory[where : where + length] = data
        record = Record(offset, length, where, self._sequence, self._tail, self._tail + need)
        self._put_head(place, offset, _hash(data), length)
        self._tail += need
        return record

    def _put_head(self, place: int, offset: int, check: int, length: int) -> None:
        body = _RECORD.pack(0, self._salt, self._sequence, offset, check, length)
        at = RECORDS + place
        self.memory[at : at + _RECORD.size] = _hash(body[8:]).to_bytes(8, "little") + body[8:]
        self._sequence += 1

    def take_back(self, record: Record) -> None:
        """The newest record was not acknowledged after all: a later opening must not find it."""
        at = RECORDS + record.position % self.capacity
        self.memory[at : at + _RECORD.size] = bytes(_RECORD.size)
        self._sequence, self._tail = record.sequence, record.position

    def data(self, record: Record) -> memoryview:
        """The data of a record that is not released."""
        return self.view[record.where : record.where + record.length]

    def release(self, record: Record) -> None:
        """All up to this record have been carried out and are never to be found again."""
        self._note_taking()
        self._write_cursor(record.sequence + 1, record.end)
        self._start = record.end

    # -- after a process has died -----------------------------------------------------------------

    def records(self) -> Iterator[Record]:
        """What was left, oldest first. To be exhausted before anything is appended.

        `rotted` counts what it went past. The newest record is not missed if its head is rotted:
        it looks like one that was being written.
        """
        # However it looks, it is not gone round twice.
        end = self._start + self.capacity
        while self._tail < end:
            place = self._tail % self.capacity
            sequence, offset, content, length = self._head_at(place)
            if sequence != self._sequence:
                if not self._skip_to_next_head(end):
                    return
                continue
            if length == _TURN:
                self._tail += self.capacity - place
                self._sequence += 1
                continue
            need = (ALIGN + length + ALIGN - 1) & -ALIGN
            if need > self.capacity - place:
                return
            where = RECORDS + place + ALIGN
            record = Record(offset, length, where, sequence, self._tail, self._tail + need)
            self._tail += need
            self._sequence += 1
            # The data was there before the head.
            if _hash(self.view[where : where + length]) == content:
                yield record
            else:
                self.rotted += 1

    def _head_at(self, place: int) -> tuple[int, int, int, int]:
        """Sequence number, offset, data's hash, length; zeros if no head of this ring is there."""
        head = self.view[RECORDS + place : RECORDS + place + _RECORD.size]
        check, salt, *fields = _RECORD.unpack(head)
        if salt != self._salt or check != _hash(head[8:]):
            return 0, 0, 0, 0
        sequence, offset, content, length = fields
        return sequence, offset, content, length

    def _skip_to_next_head(self, end: int) -> bool:
        """Go on after a head that is none, at a later record. False if there is none before `end`:
        it was being written, or nothing was.
        """
        place = self._tail % self.capacity
        salt = self.name.ring_id[:8]
        for first, last, turn in ((place, self.capacity, 0), (0, place, self.capacity)):
            at = first - 1
            # To the salt of the last head, no further: looking for bytes CPython reads one too far,
            # and behind the last page of a mapping there may be nothing.
            end_of_salts = RECORDS + last - ALIGN + 16
            while (at := self.memory.find(salt, RECORDS + at + 9, end_of_salts) - RECORDS - 8) >= 0:
                if at % ALIGN:
                    continue
                position = self._tail - place + turn + at
                skipped = self._head_at(at)[0] - self._sequence
                # What was released has lower numbers, and each record takes some room.
                if 0 < skipped <= (position - self._tail) // ALIGN and position < end:
                    self._tail, self._sequence = position, self._sequence + skipped
                    self.rotted += skipped
                    return True
        return False

    def close(self) -> None:
        """Give memory and lock back. The file, if there is one, stays. May be called twice."""
        self.view.release()
        if isinstance(self.memory, mmap.mmap):
            self.memory.close()
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
