"""The request handlers: from a FUSE request to one call of the volume, and back.

Owns open handles and attributes. Promises: reads below the end of the volume return exactly what
was asked, or EIO (the kernel would fill a short answer with zeros); nothing can be truncated,
created, renamed or removed through the mount; closing never fails; fsync answers 0, ENODEV or EIO.

read and write carry the load: a dictionary look-up, one await, no logging, nothing allocated. All
other handlers put clarity first. Permissions are the kernel's business (default_permissions).

Cached by the kernel: names under recovery-points and by-time for no time at all, so that a point
appears and disappears at once; a point's attributes and pages for ever, since a point never
changes; sizes of the live files not at all. A handle on a point that is deleted by force fails at
its next request that reaches us; what the kernel has cached it may still show, and that is right.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, cast

import pyfuse3
import trio
from pyfuse3 import EntryAttributes, FileInfo, FUSEError, StatvfsData

from vsnapfs.fuse import tree
from vsnapfs.fuse.live import EventsFile, StatusFile
from vsnapfs.fuse.translate import Translator, translated
from vsnapfs.fuse.tree import Tree

if TYPE_CHECKING:
    from vsnapfs.volume import ReplicaHandle, Volume

_FOR_EVER = 86400.0
_WRITE_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_TRUNC | os.O_APPEND
# fcntl(2) cannot set or clear these later. RWF_SYNC and RWF_DSYNC, which a single pwritev2(2) can
# ask for, reach libfuse with the write; pyfuse3 does not hand them on.
_SYNC_FLAGS = os.O_SYNC | os.O_DSYNC


class _Handle(Protocol):
    """What every open file can do. The replica's can write as well."""

    async def read(self, offset: int, length: int) -> bytes | bytearray | memoryview: ...
    def close(self) -> None: ...


class VolumeOperations(pyfuse3.Operations):
    """The tree that `Tree` lays out, over one open volume.

    shared: other users may look into the mount (allow_other), so its root is 0755, not 0700.
    lang: language of events.log.
    """

    supports_dot_lookup = True
    enable_writeback_cache = False

    def __init__(self, volume: Volume, *, shared: bool = False, lang: str = "en") -> None:
        super().__init__()
        self.refusal = Translator(volume.log)
        self.tree = Tree(volume)
        self._volume = volume
        self._size = volume.size
        self._status = StatusFile(self.status)
        self._events = EventsFile(volume, lang)
        self._root_mode = 0o755 if shared else 0o700
        self._uid = os.geteuid()
        self._gid = os.getegid()
        self._started_ns = time.time_ns()
        self._written_ns = self._last_written()
        self.answered_init = trio.Event()
        # Set by the session, which knows how requests come in.
        self.session_figures: Callable[[], dict[str, Any]] = dict
        self._handles: dict[int, _Handle] = {}
        # File handle numbers are never used twice, so a late request cannot meet another's file.
        self._next_fh = 1
        # Handles whose length is the volume's, i.e. whose short reads would be a defect.
        self._images: set[int] = set()

    def init(self) -> None:
        """The kernel says hello. The answer is on its way before any other task runs."""
        self.answered_init.set()

    def status(self) -> dict[str, Any]:
        """What status.json and `vsnapfs status` say: the volume's status and, as "fuse", ours."""
        return self._volume.status() | {"fuse": self.session_figures()}

    def _last_written(self) -> int:
        """When the replica was written last before this mount, as far as its file tells."""
        try:
            return os.stat(self._volume.status()["replica"]["path"]).st_mtime_ns
        except OSError:
            return self._started_ns

    # ---- the two that carry the load -------------------------------------------------------

    async def read(self, fh: int, off: int, size: int) -> bytes:
        try:
            data = await self._handles[fh].read(off, size)
            if len(data) != size:
                self._check_short(fh, off, size, len(data))
            return cast(bytes, data)  # pyfuse3 takes any buffer
        except Exception as exc:  # noqa: BLE001 - as in `translated`
            raise self.refusal(exc, "read") from None

    async def write(self, fh: int, off: int, buf: bytes) -> int:
        try:
            await cast("ReplicaHandle", self._handles[fh]).write(off, buf)
        except Exception as exc:  # noqa: BLE001 - as in `translated`
            raise self.refusal(exc, "write") from None
        self._written_ns = time.time_ns()
        return len(buf)

    def _check_short(self, fh: int, off: int, size: int, got: int) -> None:
        if fh in self._images and got != max(0, min(size, self._size - off)):
            raise OSError(errno.EIO, f"short read: {got} of {size} bytes at {off}")

    # ---- the rest of a file's life ---------------------------------------------------------

    @translated
    async def open(self, inode: int, flags: int, ctx: pyfuse3.RequestContext) -> FileInfo:
        if inode == tree.REPLICA:
            if flags & os.O_TRUNC:
                raise FUSEError(errno.EPERM)  # a volume keeps its size
            handle = self._volume.open_replica(synchronous=bool(flags & _SYNC_FLAGS))
            fh = self._add(handle, image=True)
            return FileInfo(fh=fh, direct_io=True, keep_cache=False)
        if flags & _WRITE_FLAGS:
            raise FUSEError(errno.EROFS)
        if inode == tree.STATUS:
            return FileInfo(fh=self._add(self._status.open()), direct_io=True, keep_cache=False)
        if inode == tree.EVENTS:
            return FileInfo(fh=self._add(self._events), direct_io=True, keep_cache=False)
        point = self.tree.point(inode)
        if point is None:
            raise FUSEError(errno.ESTALE)
        fh = self._add(self._volume.open_point(point.number), image=True)
        return FileInfo(fh=fh, direct_io=False, keep_cache=True)

    def _add(self, handle: _Handle, *, image: bool = False) -> int:
        fh = self._next_fh
        self._next_fh += 1
        self._handles[fh] = handle
        if image:
            self._images.add(fh)
        return fh

    @translated
    async def flush(self, fh: int) -> None:
        """close(2) of one descriptor. Never fails: fsync is where errors belong."""

    @translated
    async def release(self, fh: int) -> None:
        self._images.discard(fh)
        handle = self._handles.pop(fh, None)
        if handle is not None:
            handle.close()

    @translated
    async def fsync(self, fh: int, datasync: bool) -> None:
        # A point has nothing to flush and its handle need not know the word.
        flush = getattr(self._handles[fh], "flush", None)
        if flush is not None:
            await flush()

    def open_files(self) -> int:
        """How many handles are open."""
        return len(self._handles)

    # ---- names -----------------------------------------------------------------------------

    @translated
    async def lookup(
        self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext
    ) -> EntryAttributes:
        inode = self.tree.lookup(parent_inode, name)
        if inode is None:
            # Raised, not answered with inode 0: the kernel must not remember that it is missing.
            raise FUSEError(errno.ENOENT)
        return self._attributes(inode)

    @translated
    async def opendir(self, inode: int, ctx: pyfuse3.RequestContext) -> int:
        if inode not in tree.DIRECTORIES:
            raise FUSEError(errno.ENOTDIR)
        return inode

    @translated
    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        for name, attributes, cookie in self.entries(fh, start_id):
            if not pyfuse3.readdir_reply(token, name, attributes, cookie):
                return

    def entries(self, inode: int, after: int) -> Iterator[tuple[bytes, EntryAttributes, int]]:
        """Name, attributes and cookie of each entry of a directory after the cookie `after`."""
        for entry in self.tree.list(inode, after):
            yield entry.name, self._attributes(entry.inode), entry.cookie

    @translated
    async def releasedir(self, fh: int) -> None:
        """Directories keep nothing open."""

    @translated
    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        """What a directory shows is durable before it shows it."""

    @translated
    async def readlink(self, inode: int, ctx: pyfuse3.RequestContext) -> bytes:
        target = self.tree.target(inode)
        if target is None:
            raise FUSEError(errno.ENOENT)
        return target

    # ---- attributes ------------------------------------------------------------------------

    @translated
    async def getattr(self, inode: int, ctx: pyfuse3.RequestContext) -> EntryAttributes:
        return self._attributes(inode)

    def _attributes(self, inode: int) -> EntryAttributes:
        attr = EntryAttributes()
        attr.st_ino = inode
        attr.generation = 0  # inode numbers are never reused
        attr.st_uid = self._uid
        attr.st_gid = self._gid
        attr.st_nlink = 1
        attr.st_rdev = 0
        attr.st_blksize = self._volume.block_size
        attr.attr_timeout = 0.0
        attr.entry_timeout = _FOR_EVER if inode < tree.LATEST else 0.0
        size = 0
        moment = self._started_ns
        if inode == tree.REPLICA:
            attr.st_mode = stat.S_IFREG | 0o600
            size = self._size
            moment = self._written_ns
        elif inode in tree.DIRECTORIES:
            attr.st_mode = stat.S_IFDIR | (self._root_mode if inode == tree.ROOT else 0o755)
            attr.st_nlink = 2 if inode == tree.BY_TIME else 3
            size = attr.st_blksize
            if inode != tree.ROOT:
                newest = max((p.created_ns for p in self.tree.points().values()), default=0)
                moment = max(moment, newest)
        elif inode == tree.STATUS:
            attr.st_mode = stat.S_IFREG | 0o444
            size = len(self._status.render())
            moment = time.time_ns()
        elif inode == tree.EVENTS:
            attr.st_mode = stat.S_IFREG | 0o444
            size = self._events.size()
            moment = self._events.changed_ns
        else:
            size, moment = self._attributes_of_point(inode, attr)
        attr.st_size = size
        attr.st_blocks = (size + 511) // 512
        attr.st_atime_ns = attr.st_mtime_ns = attr.st_ctime_ns = moment
        return attr

    def _attributes_of_point(self, inode: int, attr: EntryAttributes) -> tuple[int, int]:
        """Fill in mode and timeout of a point's image or a link; return size and mtime."""
        target = self.tree.target(inode)
        if target is not None:
            attr.st_mode = stat.S_IFLNK | 0o777
            points = self.tree.points()
            point = points[max(points)] if inode == tree.LATEST else self.tree.point(inode)
            assert point is not None
            return len(target), point.created_ns
        point = self.tree.point(inode)
        if point is None:
            raise FUSEError(errno.ESTALE)  # the kernel remembers an inode that is gone
        attr.st_mode = stat.S_IFREG | 0o444
        attr.attr_timeout = _FOR_EVER
        return self._size, point.created_ns

    @translated
    async def setattr(
        self,
        inode: int,
        attr: EntryAttributes,
        fields: pyfuse3.SetattrFields,
        fh: int | None,
        ctx: pyfuse3.RequestContext,
    ) -> EntryAttributes:
        now = self._attributes(inode)
        if fields.update_size and attr.st_size != now.st_size:
            raise FUSEError(errno.EPERM)
        if fields.update_mode or fields.update_uid or fields.update_gid:
            raise FUSEError(errno.EPERM)
        if inode != tree.REPLICA and (fields.update_mtime or fields.update_atime):
            raise FUSEError(errno.EPERM)
        # Times of the replica are accepted and not kept: touch, losetup and mkfs expect no less.
        return now

    @translated
    async def statfs(self, ctx: pyfuse3.RequestContext) -> StatvfsData:
        """Space as df shows it: replica and diff area together; free is left in the diff area."""
        unit = self._volume.block_size
        area = self._volume.status()["diff_area"]
        # An area that is missing has no sizes.
        maximum, used = int(area["maximum"] or 0), int(area["used"] or 0)
        data = StatvfsData()
        data.f_bsize = data.f_frsize = unit
        data.f_blocks = -(-self._size // unit) + maximum // unit
        data.f_bfree = data.f_bavail = max(0, maximum - used) // unit
        data.f_files = 7 + 2 * len(self.tree.points())
        data.f_ffree = data.f_favail = 0
        data.f_namemax = 255
        return data

    @translated
    async def access(self, inode: int, mode: int, ctx: pyfuse3.RequestContext) -> bool:
        return True  # default_permissions: the kernel has looked already

    # Extended attributes: pyfuse3's own answer is ENOSYS, after which the kernel asks no more.

    # ---- what a volume's tree does not allow -----------------------------------------------

    async def _refused(self, *_args: Any, **_kwargs: Any) -> NoReturn:
        raise FUSEError(errno.EPERM)

    mknod = mkdir = create = symlink = link = rename = unlink = rmdir = _refused
