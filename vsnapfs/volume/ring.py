"""The ring: acknowledged writes in shared memory, which a killed process leaves behind.

Owns the layout of that memory and the file on tmpfs that holds it. Promises:

* a record that `append` returned for is found by `records` of a later opening, whole and in its
  order, however the process ended (W3); one that was being written is not found at all;
* a record released before is never found again, so that nothing newer is overwritten by it;
* memory that is another ring's, another volume's, rotted or of the wrong size is an error, and
  never read as records;
* all of the memory is reserved when a ring is made: a full tmpfs is an error then, no SIGBUS later.

After a power loss there is no ring, which is what W4 leaves open. Who may use which ring, and when
it is emptied, is `buffer`'s business.

    0      head: magic, version, size, ring id, volume id, xxh3-64 over it
    512    cursor, first copy      the oldest record not released: its sequence number and position
    1024   cursor, second copy     (written in turn; the valid one with the higher number counts)
    4096   records                 64-byte head, data, padded to 64 bytes; the space is used in turn

A record's head: xxh3-64 of the rest of it, eight bytes of the ring id, sequence number, offset in
the replica, length, xxh3-64 of the data. A length of 2^32-1 says "go on at the start".
"""

from __future__ import annotations

import errno
import mmap
import os
import secrets
import stat
import struct
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, Protocol

import xxhash

from ..backing import Bytes, fallocate, file_system_type
from ..errors import FormatError

MAGIC = b"VSNRING\x00"
VERSION = 1
ID_SIZE = 16
NO_ID = bytes(ID_SIZE)
RECORDS = 4096
ALIGN = 64
#: Less than this cannot hold two of the longest writes (1 MiB).
LEAST = 4 << 20
#: Where memory outlives a process but not the machine. The first that can be used is.
DIRECTORIES = (Path("/dev/shm"), Path("/run"))  # noqa: S108 - O_EXCL, 0600, no link followed
_IN_MEMORY = ("tmpfs", "ramfs")

_HEAD = struct.Struct("<8sIIQ16s16s")
_CURSORS = (512, 1024)
_CURSOR = struct.Struct("<QQQ")  # checksum, sequence number, position
_RECORD = struct.Struct("<QQQQQI")  # checksum, ring, sequence number, offset, data's hash, length
_TURN = 2**32 - 1

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


class Ring:
    """A ring over `memory`. Make one with `Ring.make` or, over what another left, `Ring.found`."""

    def __init__(self, memory: Memory, ring_id: bytes) -> None:
        self.ring_id = ring_id
        self.memory = memory
        self.view = memoryview(memory)
        self.capacity = len(memory) - RECORDS
        self._salt = int.from_bytes(ring_id[:8], "little")
        self._sequence = 1  # of the next record
        self._tail = 0  # where it begins
        self._start = 0  # where the oldest one that is not released begins
        self._turn = 0  # which copy of the cursor is written next

    @classmethod
    def make(cls, memory: Memory, ring_id: bytes, volume_id: bytes) -> Ring:
        """Lay out an empty ring. `memory` is all zeros."""
        _HEAD.pack_into(memory, 8, MAGIC, VERSION, 0, len(memory), ring_id, volume_id)
        check = _hash(memoryview(memory)[8 : 8 + _HEAD.size])
        struct.pack_into("<Q", memory, 0, check)
        ring = cls(memory, ring_id)
        ring._write_cursor(1, 0)
        return ring

    @classmethod
    def found(cls, memory: Memory, ring_id: bytes, volume_id: bytes) -> Ring:
        """The ring that a process left in `memory`. FormatError if it is not the one named."""
        if len(memory) <= RECORDS or len(memory) % ALIGN:
            raise FormatError("the write buffer has an impossible size")
        (check,) = struct.unpack_from("<Q", memory)
        head = _HEAD.unpack_from(memory, 8)
        if check != _hash(memoryview(memory)[8 : 8 + _HEAD.size]):
            raise FormatError("the head of the write buffer fails its checksum")
        if head[:2] != (MAGIC, VERSION) or head[3:] != (len(memory), ring_id, volume_id):
            raise FormatError("it is another volume's write buffer, or another version's")
        ring = cls(memory, ring_id)
        ring._find_cursor()
        return ring

    def _find_cursor(self) -> None:
        found = []
        for turn, offset in enumerate(_CURSORS):
            check, sequence, position = _CURSOR.unpack_from(self.memory, offset)
            if check == _hash(self.view[offset + 8 : offset + _CURSOR.size]) and sequence:
                found.append((sequence, position, turn))
        if not found:
            raise FormatError("both cursors of the write buffer fail their checksum")
        self._sequence, self._start, turn = max(found)
        self._tail, self._turn = self._start, 1 - turn

    def _write_cursor(self, sequence: int, position: int) -> None:
        offset = _CURSORS[self._turn]
        body = struct.pack("<QQ", sequence, position)
        self.memory[offset : offset + _CURSOR.size] = struct.pack("<Q", _hash(body)) + body
        self._turn = 1 - self._turn

    # -- appending ------------------------------------------------------------------------------

    @property
    def used(self) -> int:
        """Bytes taken by records that are not released."""
        return self._tail - self._start

    def append(self, offset: int, data: Bytes) -> Record | None:
        """Keep `data` for `offset`; None if there is no room now (there is, once all is released,
        for any data up to half of `capacity`).
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

    def data(self, record: Record) -> memoryview:
        """The data of a record that is not released."""
        return self.view[record.where : record.where + record.length]

    def release(self, record: Record) -> None:
        """All up to this record have been carried out and are never to be found again."""
        self._write_cursor(record.sequence + 1, record.end)
        self._start = record.end

    # -- after a process has died -----------------------------------------------------------------

    def records(self) -> Iterator[Record]:
        """What was left, oldest first. To be exhausted before anything is appended."""
        # However it looks, it is not gone round twice.
        end = self._start + self.capacity
        while self._tail < end:
            place = self._tail % self.capacity
            at = RECORDS + place
            head = self.view[at : at + _RECORD.size]
            check, salt, sequence, offset, content, length = _RECORD.unpack(head)
            if (salt, sequence) != (self._salt, self._sequence) or check != _hash(head[8:]):
                return
            if length == _TURN:
                self._tail += self.capacity - place
                self._sequence += 1
                continue
            need = (ALIGN + length + ALIGN - 1) & -ALIGN
            where = at + ALIGN
            if need > self.capacity - place or _hash(self.view[where : where + length]) != content:
                return
            record = Record(offset, length, where, sequence, self._tail, self._tail + need)
            self._tail += need
            self._sequence += 1
            yield record

    def close(self) -> None:
        """Give the memory back. The file, if there is one, stays."""
        self.view.release()
        if isinstance(self.memory, mmap.mmap):
            self.memory.close()


class RingStore(Protocol):
    """Where rings live. `boot` (16 bytes) tells one life of the machine from another."""

    boot: bytes

    def make(self, size: int, volume_id: bytes) -> Ring:
        """A new, empty ring of about `size` bytes. OSError (ENOSPC, ENOENT …): no place for it."""
        ...

    def find(self, ring_id: bytes, volume_id: bytes) -> Ring | None:
        """The ring of this name, None if there is none. OSError, FormatError if it is no ring."""
        ...

    def is_there(self, ring: Ring) -> bool:
        """Whether a process that starts now would find it."""
        ...

    def keep_only(self, ring_id: bytes, volume_id: bytes) -> int:
        """Remove all rings of a volume but this one: nothing will ever name them. How many."""
        ...


def boot_id() -> bytes:
    """What the kernel calls this life of the machine (/proc/sys/kernel/random/boot_id)."""
    text = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return bytes.fromhex(text.replace("-", ""))


class SharedMemory:
    """Rings as files on tmpfs, 0600, each with a name of its own that nobody can guess."""

    def __init__(self, directories: tuple[Path, ...] = DIRECTORIES) -> None:
        self.boot = boot_id()
        self._directories = directories

    def _paths(self, ring_id: bytes, volume_id: bytes) -> list[Path]:
        name = f"vsnapfs-{volume_id.hex()}-{ring_id.hex()}"
        return [directory / name for directory in self._directories]

    def make(self, size: int, volume_id: bytes) -> Ring:
        """See `RingStore.make`. Where there is less room it is smaller, down to `LEAST`."""
        ring_id = secrets.token_bytes(ID_SIZE)
        problem = OSError(errno.ENOENT, "there is no tmpfs")
        for path in self._paths(ring_id, volume_id):
            if file_system_type(path.parent) not in _IN_MEMORY:
                continue
            wanted = size
            while wanted >= min(size, LEAST):
                try:
                    return self._make(path, wanted, ring_id, volume_id)
                except OSError as error:
                    problem = error
                    # A container's share can be small: less is better than none.
                    wanted = wanted // 2 & -mmap.PAGESIZE if error.errno == errno.ENOSPC else 0
        raise problem

    def _make(self, path: Path, size: int, ring_id: bytes, volume_id: bytes) -> Ring:
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(path, flags, 0o600)
        try:
            fallocate(fd, 0, size)
            # Touched now, not by the writes: the first round would cost a page fault each 4 KiB.
            memory = mmap.mmap(fd, size, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
        except (OSError, ValueError):
            os.unlink(path)
            raise
        finally:
            os.close(fd)
        return Ring.make(memory, ring_id, volume_id)

    def find(self, ring_id: bytes, volume_id: bytes) -> Ring | None:
        """See `RingStore.find`. A file that others can write, or a second name of it, is none."""
        for path in self._paths(ring_id, volume_id):
            flags = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            try:
                fd = os.open(path, flags)
            except FileNotFoundError:
                continue
            try:
                info = os.fstat(fd)
                private = stat.S_ISREG(info.st_mode) and not info.st_mode & 0o077
                if not private or info.st_uid != os.geteuid() or info.st_nlink != 1:
                    raise FormatError(f"{path} is not a write buffer of this user")
                memory = mmap.mmap(fd, info.st_size)
            except ValueError as error:
                raise FormatError(f"{path} cannot be mapped: {error}") from error
            finally:
                os.close(fd)
            return Ring.found(memory, ring_id, volume_id)
        return None

    def _path_of(self, ring: Ring) -> list[Path]:
        volume_id = _HEAD.unpack_from(ring.memory, 8)[5]
        return self._paths(ring.ring_id, volume_id)

    def is_there(self, ring: Ring) -> bool:
        """See `RingStore.is_there`."""
        return any(path.exists() for path in self._path_of(ring))

    def keep_only(self, ring_id: bytes, volume_id: bytes) -> int:
        """See `RingStore.keep_only`. Files of other users stay."""
        kept, removed = self._paths(ring_id, volume_id), 0
        for directory in self._directories:
            for path in directory.glob(f"vsnapfs-{volume_id.hex()}-*"):
                with suppress(OSError):
                    if path not in kept and path.lstat().st_uid == os.geteuid():
                        path.unlink()
                        removed += 1
        return removed
