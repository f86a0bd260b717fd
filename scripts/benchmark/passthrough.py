"""A file served by pyfuse3 and nothing else: the floor of whatever is built on pyfuse3.

    python passthrough.py IMAGE MOUNTPOINT

Reads and writes are one pread and one pwrite in the handler, the loop is pyfuse3's own with its
defaults. Runs until it is unmounted. Uses nothing of vsnapfs.
"""

from __future__ import annotations

import errno
import os
import stat
import sys
from typing import Any

import pyfuse3
import trio

NAME = b"replica.img"
INODE = 2


class PassThrough(pyfuse3.Operations):
    """A root directory with one file in it."""

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self._descriptor = descriptor
        self._size = os.fstat(descriptor).st_size

    def _attributes(self, inode: int) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = inode
        entry.entry_timeout = entry.attr_timeout = 300
        entry.st_uid, entry.st_gid = os.getuid(), os.getgid()
        if inode == pyfuse3.ROOT_INODE:
            entry.st_mode = stat.S_IFDIR | 0o700
        else:
            entry.st_mode = stat.S_IFREG | 0o600
            entry.st_size = self._size
        return entry

    async def getattr(self, inode: int, ctx: Any = None) -> pyfuse3.EntryAttributes:
        return self._attributes(inode)

    async def lookup(
        self, parent_inode: int, name: bytes, ctx: Any = None
    ) -> pyfuse3.EntryAttributes:
        if name != NAME:
            raise pyfuse3.FUSEError(errno.ENOENT)
        return self._attributes(INODE)

    async def open(self, inode: int, flags: int, ctx: Any) -> pyfuse3.FileInfo:
        return pyfuse3.FileInfo(fh=1, direct_io=True)

    async def read(self, fh: int, off: int, size: int) -> bytes:
        return os.pread(self._descriptor, size, off)

    async def write(self, fh: int, off: int, buf: bytes) -> int:
        return os.pwrite(self._descriptor, buf, off)

    async def fsync(self, fh: int, datasync: bool) -> None:
        os.fdatasync(self._descriptor)

    async def flush(self, fh: int) -> None:
        pass

    async def release(self, fh: int) -> None:
        pass


def main() -> None:
    """Serve until unmounted."""
    image, mountpoint = sys.argv[1:]
    descriptor = os.open(image, os.O_RDWR)
    options = {*pyfuse3.default_options, "fsname=passthrough", "subtype=passthrough"}
    pyfuse3.init(PassThrough(descriptor), mountpoint, options)
    try:
        trio.run(pyfuse3.main)
    finally:
        pyfuse3.close(unmount=True)


if __name__ == "__main__":
    main()
