"""A simulated host: files in memory, a page cache, power failures, and I/O that fails on demand.

Owns what a test knows about a disk that a real one does not tell. A `Host` holds files and a
capacity that they share; `SimBacking` is an open file and takes the place of `FileBacking`.

* Reads see unsynced writes. What is not synced lies in a journal, write by write; a power failure
  keeps any subset of it, cut at 512 bytes (`power_failure`); a killed process loses nothing
  (`kill`). Changes of the file's size reach the disk in their order, as a journaling file system
  sees to it, but as late as it likes.
* A sync that fails loses what it should have written, as Linux does: readers still see it until
  `forget_cache`, no later sync writes it. Pages that the disk never had are lost to later writes,
  too, until then, as ext4 does in space that was reserved: `SimFile.stuck`.
* `fail` lets chosen operations fail, `stop_at` ends the machine before an operation, and `hooks`
  are called before an operation (to make it slow, or to look at what is going on meanwhile).

Everything is counted and decided by the test: nothing here is random or depends on time.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from vsnapfs.backing import Buffer, Bytes, FileId, Identity, Removed
from vsnapfs.diffarea.superblock import RingName
from vsnapfs.errors import BusyError, FormatError
from vsnapfs.volume.ring import Ring, read_head
from vsnapfs.volume.shm import Unusable

PAGE = 4096
SECTOR = 512
#: What can fail on a real disk.
FAILING = ("open", "read", "write", "sync", "allocate", "truncate", "has_hole")
#: What only looks at an open file or its name (fstat, stat). Fails on some hosts only (XFS that has
#: shut down, network and FUSE file systems), so only where a `Failure` names it.
LOOKS = ("size", "check_present", "check_linked", "identity")
FOREVER = 1 << 60


class PowerLoss(BaseException):
    """The machine is gone. No Exception: nothing in the engine may catch it."""


class PartlyDone(OSError):
    """An injected failure of a write that has moved the first half of its bytes."""


class Pages:
    """Bytes of a sparse file. Pages are immutable, so a copy costs one dictionary."""

    def __init__(self, pages: dict[int, bytes] | None = None, size: int = 0) -> None:
        self.pages = {} if pages is None else pages
        self.size = size

    def copy(self) -> Pages:
        return Pages(dict(self.pages), self.size)

    def read(self, offset: int, length: int) -> bytes:
        """`length` bytes, zeros where there is nothing."""
        first, last = offset // PAGE, (offset + length - 1) // PAGE
        zeros = bytes(PAGE)
        whole = b"".join(self.pages.get(page, zeros) for page in range(first, last + 1))
        return whole[offset - first * PAGE : offset - first * PAGE + length]

    def write(self, offset: int, data: bytes) -> None:
        """Extends the file if it is shorter."""
        self.size = max(self.size, offset + len(data))
        done = 0
        while done < len(data):
            page, start = divmod(offset + done, PAGE)
            part = data[done : done + PAGE - start]
            if len(part) < PAGE:
                old = self.pages.get(page, bytes(PAGE))
                part = old[:start] + part + old[start + len(part) :]
                done += min(PAGE - start, len(data) - done)
            else:
                done += PAGE
            self.pages[page] = part

    def resize(self, size: int) -> None:
        if size < self.size:
            keep, rest = divmod(size, PAGE)
            self.pages = {n: page for n, page in self.pages.items() if n * PAGE < size}
            if rest and keep in self.pages:
                self.pages[keep] = self.pages[keep][:rest].ljust(PAGE, b"\0")
        self.size = size


class Change(NamedTuple):
    """An unsynced write, or (data None) an unsynced change of the size to `offset`."""

    offset: int
    data: bytes | None

    def apply(self, pages: Pages, keep: Callable[[int, int], bool] | None = None) -> None:
        """Put it on the disk; `keep(first, sector)` chooses among its sectors, counted from 0."""
        if self.data is None:
            pages.resize(self.offset)
            return
        if keep is None:
            parts = [(0, len(self.data))]
        else:
            bounds = self.cuts()
            parts = [
                (start, end)
                for number, (start, end) in enumerate(itertools.pairwise(bounds))
                if keep(number, len(bounds) - 1)
            ]
        for start, end in parts:
            # What lies beyond the end of the file was never reachable.
            data = self.data[start : min(end, pages.size - self.offset)]
            if data and self.offset + start < pages.size:
                pages.write(self.offset + start, data)

    def cuts(self) -> list[int]:
        """Where a power failure can tear it: its sector boundaries, both ends included."""
        assert self.data is not None
        first = -self.offset % SECTOR
        length = len(self.data)
        return sorted({0, *range(first, length, SECTOR), length})


@dataclass
class SimFile:
    """One inode."""

    inode: int
    cache: Pages = field(default_factory=Pages)
    disk: Pages = field(default_factory=Pages)
    journal: list[Change] = field(default_factory=list)
    #: 4 KiB units that have space on the host, and those of them that were ever written.
    space: set[int] = field(default_factory=set)
    written: set[int] = field(default_factory=set)
    #: Pages that no write reaches the disk from before `forget_cache`.
    stuck: set[int] = field(default_factory=set)
    #: Those of them that have been written since, and not been synced: they stay in the cache.
    stuck_dirty: set[int] = field(default_factory=set)
    ctime: int = 0
    locked: bool = False
    is_device: bool = False

    def after_power_failure(self, disk: Pages) -> SimFile:
        count = -(-disk.size // PAGE)
        return SimFile(
            self.inode,
            cache=disk.copy(),
            disk=disk,
            space={unit for unit in self.space if unit < count},
            written={unit for unit in self.written if unit < count},
            ctime=self.ctime,
            is_device=self.is_device,
        )


@dataclass
class Failure:
    """Let the operations numbered nth … nth + times - 1 (from 1) of some kind fail."""

    name: str | None
    operation: str | None
    error: int
    nth: int = 1
    times: int = 1
    partly: bool = False
    seen: int = 0
    fired: int = 0

    def hits(self, name: str, operation: str) -> bool:
        if self.name not in (None, name):
            return False
        if operation not in (FAILING if self.operation is None else (self.operation,)):
            return False
        if self.error == errno.ENOSPC and operation not in ("write", "allocate"):
            return False
        self.seen += 1
        hit = self.nth <= self.seen < self.nth + self.times
        self.fired += hit
        return hit


Hook = Callable[["SimBacking", str, int, int], None]


class Host:
    """Files by name, and everything a test may do to them."""

    def __init__(self, capacity: int = 1 << 50) -> None:
        self.files: dict[str, SimFile] = {}
        self.capacity = capacity
        self.failures: list[Failure] = []
        self.hooks: list[Hook] = []
        self.counts: Counter[tuple[str, str]] = Counter()
        self.operations = 0
        self.stop_at: int | None = None
        self.dead = False
        #: Called after each operation that changed what a power failure could leave, with the
        #: place of the new change (file, number in its journal), or None after a sync.
        self.observer: Callable[[tuple[str, int] | None], None] | None = None
        #: Shared memory by ring: it outlives a process, not the machine. `boot` counts its lives.
        self.memory: dict[bytes, bytearray] = {}
        self.locked_rings: set[bytes] = set()
        #: The device number of the tmpfs that is mounted where rings are looked for, and what
        #: keeps an opening from using the one it has found.
        self.tmpfs = 7
        self.ring_problem: Exception | None = None
        #: The device that the files lie on.
        self.device = 1
        #: The generation of all inodes: a file system gives a number once more.
        self.born = 0
        self.system = 0
        self.boot = 1
        #: What openings take for the boot id if something lies over the kernel's.
        self.masked_boot = 0
        #: Whether reads that must not wait find what they want.
        self.cached = False
        self._inodes = 0
        self._copies = 0
        self._time = 0

    # -- files ----------------------------------------------------------------------------------

    def create(self, name: str, size: int = 0, *, is_device: bool = False) -> SimFile:
        """A new file that is all hole, durable at once (or a device, which has its space)."""
        self._inodes += 1
        file = SimFile(self._inodes, Pages(size=size), Pages(size=size), is_device=is_device)
        self.files[name] = file
        return file

    def open(self, name: str) -> SimBacking:
        """FileNotFoundError, BusyError, or an injected failure of operation "open"."""
        self._step_names(name, "open")
        if name not in self.files:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
        file = self.files[name]
        if file.locked:
            raise BusyError(f"{name} is in use by another process")
        file.locked = True
        return SimBacking(self, name, file)

    def remove(self, name: str) -> SimFile:
        """Unlink it; who has it open keeps it."""
        return self.files.pop(name)

    def free(self) -> int:
        """Bytes that the host can still give."""
        return self.capacity - PAGE * sum(
            len(file.space) for file in self.files.values() if not file.is_device
        )

    # -- failing --------------------------------------------------------------------------------

    def fail(
        self,
        name: str | None,
        operation: str | None,
        error: int,
        *,
        nth: int = 1,
        times: int = 1,
        partly: bool = False,
    ) -> Failure:
        """Inject a failure (times=FOREVER: for good). None: any file, any one of `FAILING`.

        partly: a write that fails has moved the first half of its bytes.
        """
        failure = Failure(name, operation, error, nth, times, partly)
        self.failures.append(failure)
        return failure

    def step(self, backing: SimBacking, operation: str, offset: int = 0, length: int = 0) -> None:
        """Called before each operation."""
        for hook in self.hooks:
            hook(backing, operation, offset, length)
        self._step_names(backing.name, operation)

    def _step_names(self, name: str, operation: str) -> None:
        if self.dead:
            raise PowerLoss
        if self.stop_at is not None and self.operations >= self.stop_at:
            self.dead = True
            raise PowerLoss
        self.operations += 1
        self.counts[name, operation] += 1
        for failure in self.failures:
            if failure.hits(name, operation):
                kind = PartlyDone if failure.partly else OSError
                raise kind(failure.error, os.strerror(failure.error), name)

    def now(self) -> int:
        self._time += 1
        return self._time

    def changed(self, name: str | None = None) -> None:
        if self.observer is not None:
            last = (name, len(self.files[name].journal) - 1) if name in self.files else None
            self.observer(last)

    # -- the end of a process, the end of a machine ---------------------------------------------

    def _next(self, files: dict[str, SimFile]) -> Host:
        host = Host(self.capacity)
        host.files = files
        host._inodes, host._time = self._inodes, self._time
        host._copies = self._copies
        host.cached = self.cached
        host.tmpfs, host.device, host.born = self.tmpfs, self.device, self.born
        host.system = self.system
        host.boot = self.boot + 1
        return host

    def kill(self) -> Host:
        """The host after SIGKILL of our process: locks are gone, the page cache survives."""
        self.dead = True
        host = self._next({name: replace(f, locked=False) for name, f in self.files.items()})
        host.memory, host.boot = self.memory, self.boot
        return host

    def copied(self) -> Host:
        """`cp -a` of all files at this instant: other inodes, the same shared memory."""
        host = Host()
        self._copies += 1
        host.files = {
            name: replace(
                file,
                inode=file.inode + 1000 * self._copies,
                cache=file.cache.copy(),
                disk=file.cache.copy(),
                journal=[],
                space=set(file.space),
                written=set(file.written),
                stuck=set(),
                stuck_dirty=set(),
                locked=False,
            )
            for name, file in self.files.items()
        }
        host.memory, host.locked_rings = self.memory, self.locked_rings
        host.boot, host.tmpfs, host.device = self.boot, self.tmpfs, self.device
        # Names of rings are random; here they are counted.
        host._inodes = self._inodes + 1000 * self._copies
        return host

    def snapshot(self) -> Snapshot:
        """What a power failure now could leave, kept for later."""
        return Snapshot(
            self,
            {
                name: (
                    replace(file, space=set(file.space), written=set(file.written)),
                    file.disk.copy(),
                    tuple(file.journal),
                )
                for name, file in self.files.items()
            },
        )

    def power_failure(self, choose: Callable[[str, int, Change], object] | None = None) -> Host:
        """The host after a power failure now. See `Snapshot.power_failure`."""
        self.dead = True
        return self.snapshot().power_failure(choose)


class Snapshot:
    """The durable content of all files and their journals at one instant."""

    def __init__(
        self, host: Host, files: dict[str, tuple[SimFile, Pages, tuple[Change, ...]]]
    ) -> None:
        self._host = host
        self._files = files
        #: The rings, for whoever asks what a killed process would leave instead.
        self.memory = {ring: bytes(memory) for ring, memory in host.memory.items()}

    def pending(self) -> list[tuple[str, int, Change]]:
        """All unsynced changes: (file, number in its journal, change)."""
        return [
            (name, number, change)
            for name, (_, _, journal) in self._files.items()
            for number, change in enumerate(journal)
        ]

    def change(self, key: tuple[str, int]) -> Change:
        """One of them."""
        return self._files[key[0]][2][key[1]]

    def power_failure(self, choose: Callable[[str, int, Change], object] | None = None) -> Host:
        """A new host with what is left.

        choose(file, number, change) decides about an unsynced write: False, lost (so all are when
        there is no `choose`); True, kept; or a function (sector, sectors) → kept, which tears it.
        About a change of the size it is asked, too; after the first that is lost, all later ones
        of that file are.
        """
        files = {}
        for name, (file, disk, journal) in self._files.items():
            left, sizes_kept = disk.copy(), True
            for number, change in enumerate(journal):
                what = choose(name, number, change) if choose is not None else False
                if change.data is None:
                    sizes_kept = sizes_kept and bool(what)
                    if sizes_kept:
                        change.apply(left)
                elif callable(what):
                    change.apply(left, what)
                elif what:
                    change.apply(left, lambda _sector, _count: True)
            files[name] = file.after_power_failure(left)
        return self._host._next(files)


class SimStore:
    """The shared memory of a `Host`. See `ring.RingStore`. room: bytes there are for rings."""

    def __init__(self, host: Host, room: int = 1 << 30) -> None:
        self.host = host
        self.room = room
        self.masked = host.masked_boot != 0
        self.boot = (host.masked_boot or host.boot).to_bytes(16, "big")

    def make(self, size: int, volume_id: bytes, replica: FileId) -> Ring:
        if self.masked:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        if size > self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.host._inodes += 1
        ring_id = self.host._inodes.to_bytes(16, "big")
        memory = self.host.memory[ring_id] = bytearray(size)
        name = RingName(ring_id, replica.device, replica.inode, self.host.tmpfs)
        return self._locked(Ring.make(memory, name, volume_id, -1, *replica[3:]))

    def _locked(self, ring: Ring) -> Ring:
        """Until it is closed, or its process has ended."""
        locked, close = self.host.locked_rings, ring.close
        locked.add(ring.name.ring_id)

        def unlock() -> None:
            locked.discard(ring.name.ring_id)
            close()

        ring.close = unlock  # type: ignore[method-assign]
        return ring

    def find(self, name: RingName, volume_id: bytes, replica: FileId) -> Ring:
        if name.memory != self.host.tmpfs:
            raise Unusable("it lies in another tmpfs")
        if name.ring_id not in self.host.memory:
            raise FileNotFoundError(errno.ENOENT, "it is gone")
        if name.ring_id in self.host.locked_rings:
            raise Unusable("it is in use by another process")
        if self.host.ring_problem is not None:
            raise self.host.ring_problem
        return self._locked(Ring.found(self.host.memory[name.ring_id], name, volume_id))

    def _unlocked(self, volume_id: bytes, replica: FileId) -> Iterator[Ring]:
        for ring_id, memory in list(self.host.memory.items()):
            with contextlib.suppress(FormatError):
                head = read_head(memory)
                if (
                    (head.volume_id, head.name.ring_id) == (volume_id, ring_id)
                    and (head.name.device, head.name.inode) == replica[:2]
                    and ring_id not in self.host.locked_rings
                ):
                    yield Ring.found(memory, head.name, volume_id)

    def is_there(self, ring: Ring) -> bool:
        return ring.name.ring_id in self.host.memory

    def remove(self, ring: Ring) -> None:
        self.host.memory.pop(ring.name.ring_id, None)

    def tidy(self, volume_id: bytes, replica: FileId) -> None:
        for ring in self._unlocked(volume_id, replica):
            if not list(ring.records()):
                del self.host.memory[ring.name.ring_id]

    def doubt(self) -> str:
        return ""


class SimBacking:
    """An open file of a `Host`. See `backing.Backing`."""

    def __init__(self, host: Host, name: str, file: SimFile) -> None:
        self.host = host
        self.name = name
        self.path = Path("/sim") / name
        self.file = file
        self.is_device = file.is_device
        self.is_concurrent = False
        self.tells_cached = True

    def size(self) -> int:
        self.host.step(self, "size")
        return self.file.cache.size

    def read(self, offset: int, length: int) -> Bytes:
        self.host.step(self, "read", offset, length)
        if offset + length > self.file.cache.size:
            raise OSError(errno.EIO, f"{self.name} ends before byte {offset + length}")
        return self.file.cache.read(offset, length)

    def read_cached(self, offset: int, length: int) -> Bytes | None:
        buffer = bytearray(length)
        return buffer if self.read_into_cached(offset, buffer) else None

    def read_into(self, offset: int, buffer: memoryview) -> None:
        buffer[:] = self.read(offset, len(buffer))

    def read_into_cached(self, offset: int, buffer: Buffer) -> bool:
        if not self.host.cached:
            return False
        try:
            buffer[:] = self.read(offset, len(buffer))
        except OSError:
            return False
        return True

    def prefetch(self, offset: int, length: int) -> None:
        return

    def begin_sync(self, offset: int, length: int) -> None:
        return

    def write(self, offset: int, data: Bytes) -> None:
        content = bytes(data)
        try:
            self.host.step(self, "write", offset, len(content))
        except PartlyDone:
            self._put(offset, content[: len(content) // 2])
            raise
        self._put(offset, content)

    def _put(self, offset: int, content: bytes) -> None:
        file = self.file
        if self.is_device and offset + len(content) > file.cache.size:
            raise OSError(errno.ENOSPC, f"{self.name} is full")
        self._take_space(offset, len(content))
        if offset + len(content) > file.cache.size:
            file.journal.append(Change(offset + len(content), None))
        file.cache.write(offset, content)
        # The disk gets whole sectors, as they are in the cache now.
        start, end = offset - offset % SECTOR, offset + len(content)
        end = min(end + -end % SECTOR, file.cache.size)
        for begin, stop in self._reachable(start, end):
            file.journal.append(Change(begin, file.cache.read(begin, stop - begin)))
        file.written.update(range(offset // PAGE, -(-(offset + len(content)) // PAGE)))
        file.ctime = self.host.now()
        self.host.changed(self.name)

    def _reachable(self, start: int, end: int) -> list[tuple[int, int]]:
        stuck = self.file.stuck
        if not stuck:
            return [(start, end)]
        touched = range(start // PAGE, -(-end // PAGE))
        self.file.stuck_dirty.update(stuck.intersection(touched))
        pages = [page for page in touched if page not in stuck]
        return [(max(start, page * PAGE), min(end, page * PAGE + PAGE)) for page in pages]

    def _take_space(self, offset: int, length: int) -> None:
        if self.is_device:
            return
        wanted = range(offset // PAGE, -(-(offset + length) // PAGE))
        missing = [unit for unit in wanted if unit not in self.file.space]
        if missing and len(missing) * PAGE > self.host.free():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self.name)
        self.file.space.update(missing)

    def sync(self) -> None:
        file = self.file
        try:
            self.host.step(self, "sync")
        except OSError:
            # The pages are marked clean all the same: no later sync writes them.
            if not self.is_device:
                for start, data in file.journal:
                    pages = range(start // PAGE, -(-(start + len(data or b"")) // PAGE))
                    file.stuck.update(page for page in pages if page not in file.disk.pages)
            file.journal = [change for change in file.journal if change.data is None]
            file.stuck_dirty.clear()
            self.host.changed()
            raise
        for change in file.journal:
            change.apply(file.disk)
        file.journal = []
        file.stuck_dirty.clear()
        self.host.changed()

    def allocate(self, offset: int, length: int) -> None:
        self.host.step(self, "allocate", offset, length)
        file = self.file
        if self.is_device:
            if offset + length > file.cache.size:
                raise OSError(errno.ENOSPC, f"{self.name} has only {file.cache.size} bytes")
            return
        if length <= 0:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        self._take_space(offset, length)
        if offset + length > file.cache.size:
            file.cache.resize(offset + length)
            file.journal.append(Change(offset + length, None))
        file.ctime = self.host.now()
        self.host.changed(self.name)

    def truncate(self, size: int) -> None:
        self.host.step(self, "truncate", size)
        file, count = self.file, -(-size // PAGE)
        if size < file.cache.size:
            file.space = {unit for unit in file.space if unit < count}
            file.written = {unit for unit in file.written if unit < count}
            file.stuck = {page for page in file.stuck if page < count}
            file.stuck_dirty &= file.stuck
        file.cache.resize(size)
        file.journal.append(Change(size, None))
        file.ctime = self.host.now()
        self.host.changed(self.name)

    def has_hole(self, offset: int, length: int) -> bool:
        self.host.step(self, "has_hole", offset, length)
        if self.is_device:
            return False
        wanted = range(offset // PAGE, -(-(offset + length) // PAGE))
        return any(unit not in self.file.written for unit in wanted)

    def check_present(self) -> None:
        self.host.step(self, "check_present")
        if self.host.files.get(self.name) is not self.file:
            raise Removed(errno.ENOENT, f"{self.path} is gone")

    def fileno(self) -> int:
        return -1  # There is none.

    def check_linked(self) -> None:
        self.host.step(self, "check_linked")
        if not any(file is self.file for file in self.host.files.values()):
            raise Removed(errno.EIO, f"{self.path} has been deleted")

    def identity(self, *, durable: bool = True) -> Identity:
        self.host.step(self, "identity")
        file = self.file
        return Identity(self.host.device, file.inode, file.cache.size, file.ctime)

    def file_id(self) -> FileId:
        host, inode = self.host, 0 if self.is_device else self.file.inode
        return FileId(host.device, inode, 0, host.born, host.system)

    def forget_cache(self) -> None:
        """Clean pages are read from the disk again: what a failed sync lost shows now."""
        cache = self.file.disk.copy()
        for change in self.file.journal:
            change.apply(cache)
        for page in self.file.stuck_dirty:
            cache.pages[page] = self.file.cache.pages[page]
        self.file.cache = cache
        self.file.stuck &= self.file.stuck_dirty

    def reopen(self) -> None:
        self.check_present()
        self.host._step_names(self.name, "open")

    def close(self) -> None:
        self.file.locked = False
