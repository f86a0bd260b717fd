"""The files and block devices underneath: replica, diff area, state file.

Owns every file descriptor of a volume's data: opening with a lock, whole reads and writes,
syncs, reserving space, noticing that the file has been taken away. Promises:

* a read returns exactly what was asked or raises OSError (a short read is EIO);
* a write writes everything or raises OSError;
* `sync` that failed once has failed: the caller must never take a later success as covering it;
* two processes never hold the same file or device at the same time (promise S1).

Leaves all meaning of the bytes to others. Plain synchronous Python; knows no trio and no FUSE.
Tests put a simulated disk in the place of `FileBacking`; `Backing` says what it must offer.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import stat
import struct
import sys
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, Protocol

from . import locks
from .errors import BusyError

_BLKGETSIZE64 = 0x80081272
_FS_IOC_GETFLAGS = 0x80086601
_FS_IOC_SETFLAGS = 0x40086602
_FS_NOCOW_FL = 0x00800000
_CANNOT_TELL = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)
#: What stat(2) says of a path that leads to no file of ours. All else is a host that fails.
_LEADS_NOWHERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EACCES, errno.ESTALE)

#: Of two short reads lately that were not in the host's cache, both in the same so many bytes, the
#: second has all of them fetched. Lately: among the last so many. With more, reads at random places
#: of a large file would fetch what nobody wants.
_WINDOW = 64 << 10
_MISSES = 1024

Bytes = bytes | bytearray | memoryview
Buffer = bytearray | memoryview


class Identity(NamedTuple):
    """What tells one state of a file from another: a change means somebody wrote to it."""

    device: int
    inode: int
    size: int
    ctime_ns: int


#: _IOR('v', 1, long), though the kernel fills in an int.
_FS_IOC_GETVERSION = 0x80007601 | struct.calcsize("l") << 16


class FileId(NamedTuple):
    """Which file it is, whatever its name: a copy of it is another one. owner: its user's number.

    A block device is known by its own number, and has no inode: 0. born, 0 where it is not known:
    the inode's generation, which tells a file from a later one that got the same inode. system,
    likewise: the file system's own number (f_fsid). On btrfs it tells a subvolume from a
    snapshot of it, which has the same inodes; each mount gives them device numbers anew.
    """

    device: int
    inode: int
    owner: int
    born: int = 0
    system: int = 0


class Removed(OSError):
    """The path no longer leads to the open file (unlinked, replaced, unmounted)."""


class Backing(Protocol):
    """A randomly accessible store of bytes. All offsets and lengths are in bytes."""

    path: Path
    is_device: bool
    #: Whether several threads may read at a time.
    is_concurrent: bool
    #: Whether the host tells what it has in its cache. If not, nothing is ever read at once.
    tells_cached: bool

    def size(self) -> int:
        """Bytes it holds now."""
        ...

    def read(self, offset: int, length: int) -> Bytes:
        """Exactly `length` bytes. OSError otherwise, EIO when the file is too short."""
        ...

    def read_cached(self, offset: int, length: int) -> Bytes | None:
        """Like `read`, but None if it would have to wait for the disk. See `read_into_cached`."""
        ...

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer`, or OSError."""
        ...

    def read_into_cached(self, offset: int, buffer: Buffer) -> bool:
        """Like `read_into`, but False if it would have to wait for the disk, or fails.

        `buffer` may hold anything then. The disk begins to read what is missing, if the host can
        be asked for that; `read_into` waits for it and tells why it failed.
        """
        ...

    def prefetch(self, offset: int, length: int) -> None:
        """The range is going to be read soon. A hint; may take as long as asking the disk does."""
        ...

    def begin_sync(self, offset: int, length: int) -> None:
        """The range is going to be synced soon. A hint: promises nothing, and does not wait."""
        ...

    def write(self, offset: int, data: Bytes) -> None:
        """Write all of `data`, or OSError (then any part may have been written)."""
        ...

    def sync(self) -> None:
        """Everything written so far survives power loss, or OSError."""
        ...

    def allocate(self, offset: int, length: int) -> None:
        """Reserve real space and extend the file to `offset + length` if it is shorter."""
        ...

    def truncate(self, size: int) -> None:
        """Set the size. Not for devices."""
        ...

    def has_hole(self, offset: int, length: int) -> bool:
        """True if writing in the range could still need space from the host."""
        ...

    def check_present(self) -> None:
        """Raise `Removed` if the path does not lead to this open file any more, another OSError
        if the host does not tell.
        """
        ...

    def check_linked(self) -> None:
        """Raise `Removed` if the open file has no name any more, so that it ends with us."""
        ...

    def identity(self, *, durable: bool = True) -> Identity:
        """The file as it is now. See `Identity`. durable: as a power loss would leave it, too."""
        ...

    def file_id(self) -> FileId:
        """Which file this is. See `FileId`."""
        ...

    def forget_cache(self) -> None:
        """Ask the host to read from the disk again (a hint)."""
        ...

    def reopen(self) -> None:
        """Open the path anew: what an earlier failed sync dropped is not reported again."""
        ...

    def close(self) -> None:
        """Give up the lock. Syncs nothing."""
        ...


# --- fallocate(2) itself: libc's posix_fallocate would emulate it by writing -------------------

_libc = ctypes.CDLL(None, use_errno=True)
_fallocate = getattr(_libc, "fallocate64", None) or _libc.fallocate
_fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
_fallocate.restype = ctypes.c_int
_sync_file_range = getattr(_libc, "sync_file_range", None)
if _sync_file_range is not None:
    _sync_file_range.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
_SYNC_FILE_RANGE_WRITE = 2


def fallocate(fd: int, offset: int, length: int) -> None:
    """fallocate(2), mode 0. OSError with its errno (EOPNOTSUPP where the host cannot)."""
    while _fallocate(fd, 0, offset, length) != 0:
        code = ctypes.get_errno()
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))


def device_size(fd: int) -> int:
    """Bytes on a block device."""
    buffer = bytearray(8)
    fcntl.ioctl(fd, _BLKGETSIZE64, buffer)
    return int(struct.unpack("=Q", buffer)[0])


def file_system_type(path: Path) -> str:
    """The type of the file system that holds `path`, e.g. "ext4"; "" if unknown.

    Source: /proc/self/mountinfo, matched by device number.
    """
    try:
        device = os.stat(path).st_dev
        # Bytes: somebody's mountpoint may have a name that is no text in any encoding.
        lines = Path("/proc/self/mountinfo").read_bytes().split(b"\n")
    except OSError:
        return ""
    wanted = f"{os.major(device)}:{os.minor(device)}".encode()
    best = b""
    for line in lines:
        fields = line.split(b" ")
        if len(fields) > 2 and fields[2] == wanted:
            best = fields[fields.index(b"-") + 1]
    return os.fsdecode(best)


def set_nocow(fd: int) -> bool:
    """Ask btrfs not to copy this (still empty) file on write. False if that is not to be had."""
    flags = bytearray(8)
    try:
        fcntl.ioctl(fd, _FS_IOC_GETFLAGS, flags)
        value = struct.unpack("=Q", flags)[0] | _FS_NOCOW_FL
        fcntl.ioctl(fd, _FS_IOC_SETFLAGS, struct.pack("=Q", value))
    except OSError:
        return False
    return True


def _is_same(one: os.stat_result, other: os.stat_result) -> bool:
    return (one.st_dev, one.st_ino) == (other.st_dev, other.st_ino)


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class FileBacking:
    """A real file or block device, locked for this process from open to close."""

    def __init__(
        self, path: Path, lock: int, *, follow: bool = True, read_only: bool = False
    ) -> None:
        """Take over a descriptor that holds the locks. Use `open` or `create`."""
        self.path = path
        self.is_device = stat.S_ISBLK(os.fstat(lock).st_mode)
        self.is_concurrent = True
        #: Holds the locks from open to close; nothing is read or written through it.
        self._lock = lock
        self._follow = follow
        self._access = os.O_RDONLY if read_only else os.O_RDWR
        self.tells_cached = hasattr(os, "RWF_NOWAIT")
        #: The windows of the last short reads that were not in the host's cache.
        self._misses = [-1] * _MISSES
        try:
            self._fd = self._open_data()
        except BaseException:
            os.close(lock)
            raise

    # -- opening ------------------------------------------------------------------------------

    @classmethod
    def open(cls, path: Path, *, follow: bool = True, read_only: bool = False) -> FileBacking:
        """Open an existing file or device read-write and lock it.

        follow: whether a symbolic link is followed (never for names in the volume directory).
        read_only: it is not going to be written to, and may lie where nothing can be.
        Raises FileNotFoundError and other OSErrors as they are, BusyError if another process
        (or another volume in this one) holds it.
        """
        lock = locks.open_locked(path, follow=follow)
        return cls(path, lock, follow=follow, read_only=read_only)

    @classmethod
    def create(cls, path: Path) -> FileBacking:
        """Make a new, empty file (0600) and lock it. FileExistsError if there is one."""
        flags = os.O_RDWR | os.O_CLOEXEC | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        lock = os.open(path, flags, 0o600)
        try:
            locks.take(path, lock)
        except BaseException:
            os.close(lock)
            raise
        return cls(path, lock, follow=False)

    def _open_data(self) -> int:
        """A descriptor of the locked file for the data. OSError, BusyError."""
        # O_EXCL on a block device: the kernel refuses while it is mounted or held elsewhere.
        access = self._access | (os.O_EXCL if self.is_device else 0)
        try:
            fd = locks.open_file(self.path, access, follow=self._follow)
        except OSError as error:
            if error.errno == errno.EBUSY:
                raise BusyError(
                    f"{self.path} is in use (mounted, or held by another process)"
                ) from None
            raise
        if not _is_same(os.fstat(fd), os.fstat(self._lock)):
            os.close(fd)
            raise BusyError(f"{self.path} was replaced while it was being opened")
        return fd

    def fileno(self) -> int:
        """Of the descriptor that holds the locks: to look at the file, for nothing else."""
        return self._lock

    # -- reading and writing --------------------------------------------------------------------

    def size(self) -> int:
        """Bytes it holds now."""
        return device_size(self._fd) if self.is_device else os.fstat(self._fd).st_size

    def read(self, offset: int, length: int) -> Bytes:
        """See `Backing.read`."""
        data = os.pread(self._fd, length, offset)
        if len(data) == length:
            return data
        buffer = bytearray(length)
        buffer[: len(data)] = data
        self.read_into(offset + len(data), memoryview(buffer)[len(data) :])
        return buffer

    def read_cached(self, offset: int, length: int) -> Bytes | None:
        """See `Backing.read_cached`."""
        buffer = bytearray(length)
        return buffer if self.read_into_cached(offset, buffer) else None

    def read_into_cached(self, offset: int, buffer: Buffer) -> bool:
        """See `Backing.read_into_cached`. Linux begins to read what it has not got."""
        if not self.tells_cached:
            return False
        try:
            return os.preadv(self._fd, (buffer,), offset, os.RWF_NOWAIT) == len(buffer)
        except BlockingIOError:
            if len(buffer) < _WINDOW:
                self._missed(offset // _WINDOW)
            return False
        except OSError as error:
            if error.errno in _CANNOT_TELL:
                self.tells_cached = False
            return False

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """See `Backing.read_into`."""
        while len(buffer):
            count = os.preadv(self._fd, [buffer], offset)
            if count == 0:
                raise OSError(errno.EIO, f"{self.path} ends before byte {offset}")
            buffer = buffer[count:]
            offset += count

    def _missed(self, window: int) -> None:
        """A short read was not in the cache; of the second one in a window all of it is wanted."""
        place = window % len(self._misses)
        if self._misses[place] == window:
            self.prefetch(window * _WINDOW, _WINDOW)
        self._misses[place] = window

    def prefetch(self, offset: int, length: int) -> None:
        """See `Backing.prefetch`."""
        with suppress(OSError):
            os.posix_fadvise(self._fd, offset, length, os.POSIX_FADV_WILLNEED)

    def write(self, offset: int, data: Bytes) -> None:
        """See `Backing.write`."""
        count = os.pwrite(self._fd, data, offset)
        if count == len(data):
            return
        rest = memoryview(data)[count:]
        while len(rest):
            offset += count
            count = os.pwrite(self._fd, rest, offset)
            if count == 0:
                raise OSError(errno.EIO, f"{self.path}: nothing could be written at {offset}")
            rest = rest[count:]

    def begin_sync(self, offset: int, length: int) -> None:
        """See `Backing.begin_sync`."""
        if _sync_file_range is not None:
            _sync_file_range(self._fd, offset, length, _SYNC_FILE_RANGE_WRITE)

    def sync(self) -> None:
        """See `Backing.sync`."""
        os.fdatasync(self._fd)

    # -- space ----------------------------------------------------------------------------------

    def allocate(self, offset: int, length: int) -> None:
        """See `Backing.allocate`. A device has its space: only the end is checked."""
        if self.is_device:
            if offset + length > self.size():
                raise OSError(errno.ENOSPC, f"{self.path} has only {self.size()} bytes")
            return
        fallocate(self._fd, offset, length)

    def truncate(self, size: int) -> None:
        """See `Backing.truncate`."""
        os.ftruncate(self._fd, size)

    def has_hole(self, offset: int, length: int) -> bool:
        """See `Backing.has_hole`. Space reserved but never written counts as a hole, too."""
        if self.is_device:
            return False
        try:
            return os.lseek(self._fd, offset, os.SEEK_HOLE) < offset + length
        except OSError as error:
            if error.errno == errno.ENXIO or error.errno in _CANNOT_TELL:
                return True
            raise

    def no_copy_on_write(self) -> bool:
        """Turn off the host's own copy-on-write for this empty file (btrfs). False if refused."""
        return set_nocow(self._fd)

    # -- being there ----------------------------------------------------------------------------

    def check_present(self) -> None:
        """See `Backing.check_present`. Compares the path with the open file."""
        try:
            there = os.stat(self.path, follow_symlinks=self._follow)
        except OSError as error:
            if error.errno not in _LEADS_NOWHERE:
                raise
            raise Removed(error.errno, f"{self.path} is gone") from None
        here = os.fstat(self._fd)
        if here.st_nlink == 0 or not _is_same(there, here):
            raise Removed(errno.ENOENT, f"{self.path} is not the file that was opened")
        if self.is_device:
            # A device that was unplugged keeps its node until udev acts, but has no size.
            try:
                size = device_size(self._fd)
            except OSError as error:
                raise Removed(error.errno or errno.ENXIO, f"{self.path} is gone") from None
            if size == 0:
                raise Removed(errno.ENXIO, f"{self.path} has been removed")

    def check_linked(self) -> None:
        """See `Backing.check_linked`."""
        if not self.is_device and os.fstat(self._fd).st_nlink == 0:
            saved = f"cp /proc/{os.getpid()}/fd/{self._fd} saves it"
            text = f"{self.path} has been deleted: what it holds ends with this process ({saved})"
            raise Removed(errno.EIO, text)

    def identity(self, *, durable: bool = True) -> Identity:
        """See `Backing.identity`. A device has no ctime of its content: 0."""
        if durable and not self.is_device and self._access != os.O_RDONLY:
            # fdatasync leaves the ctime behind: after a power loss it would seem to have changed.
            # Who only reads has nothing to sync, and a host that has failed refuses even that.
            os.fsync(self._fd)
        info = os.fstat(self._fd)
        if self.is_device:
            return Identity(info.st_rdev, 0, self.size(), 0)
        return Identity(info.st_dev, info.st_ino, info.st_size, info.st_ctime_ns)

    def file_id(self) -> FileId:
        """See `Backing.file_id`."""
        info = os.fstat(self._fd)
        if self.is_device:
            return FileId(info.st_rdev, 0, info.st_uid)
        born = bytearray(8)
        with suppress(OSError):
            fcntl.ioctl(self._fd, _FS_IOC_GETVERSION, born)
        number, system = int.from_bytes(born[:4], sys.byteorder), 0
        with suppress(OSError):
            system = os.fstatvfs(self._fd).f_fsid
        return FileId(info.st_dev, info.st_ino, info.st_uid, number, system)

    def forget_cache(self) -> None:
        """See `Backing.forget_cache`."""
        os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def reopen(self) -> None:
        """See `Backing.reopen`. OSError, BusyError or Removed leave the old one in place.

        The descriptor keeps its number: a read under way in another thread must not find somebody
        else's file behind it. A device that cannot be opened again can only be closed. The locks
        stay: they are another descriptor's.
        """
        self.check_present()
        if self.is_device:
            # O_EXCL holders exclude each other, ourselves included: drop the claim first.
            nothing = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
            os.dup2(nothing, self._fd, inheritable=False)
            os.close(nothing)
        fd = self._open_data()
        os.dup2(fd, self._fd, inheritable=False)
        os.close(fd)

    def close(self) -> None:
        """See `Backing.close`. May be called twice."""
        # First of all it counts as closed: whoever watches the file is told of the end of our
        # opening for writing, and must not take it for somebody else's.
        fd, lock, self._fd, self._lock = self._fd, self._lock, -1, -1
        if fd >= 0:
            # The locks last: who gets them next finds it open for writing by nobody. What a network
            # or FUSE file system may say of earlier writes comes too late, and has been synced; the
            # descriptor is gone all the same.
            for descriptor in (fd, lock):
                with suppress(OSError):
                    os.close(descriptor)
