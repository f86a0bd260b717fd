"""A file served by pyfuse3 and nothing else: what any system in Python with pyfuse3 has to start from.

    python passthrough.py IMAGE MOUNTPOINT

Reads and writes are one pread and one pwrite in the handler, the loop is pyfuse3's own with its
defaults. Runs until it is unmounted. Uses nothing of vsnapfs.
"""

from __future__ import annotations

import errno
import os
import stat
import sys

import pyfuse3
import trio

NAME = b"replica.img"
INODE = pyfuse3.InodeT(2)


class PassThrough(pyfuse3.Operations):
    """A root directory with one file in it."""

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self._descriptor = descriptor
        self._size = os.fstat(descriptor).st_size

    def _attributes(self, inode: int) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = pyfuse3.InodeT(inode)
        entry.entry_timeout = entry.attr_timeout = 300
        entry.st_uid, entry.st_gid = os.getuid(), os.getgid()
        if inode == pyfuse3.ROOT_INODE:
            entry.st_mode = pyfuse3.ModeT(stat.S_IFDIR | 0o700)
        else:
            entry.st_mode = pyfuse3.ModeT(stat.S_IFREG | 0o600)
            entry.st_size = self._size
        return entry

    async def getattr(self, inode, ctx=None):  # noqa: D102 - pyfuse3 says what each one is for
        return self._attributes(inode)

    async def lookup(self, parent_inode, name, ctx=None):  # noqa: D102
        if name != NAME:
            raise pyfuse3.FUSEError(errno.ENOENT)
        return self._attributes(INODE)

    async def open(self, inode, flags, ctx):  # noqa: D102
        return pyfuse3.FileInfo(fh=pyfuse3.FileHandleT(1), direct_io=True)

    async def read(self, fh, off, size):  # noqa: D102
        return os.pread(self._descriptor, size, off)

    async def write(self, fh, off, buf):  # noqa: D102
        return os.pwrite(self._descriptor, buf, off)

    async def fsync(self, fh, datasync):  # noqa: D102
        os.fdatasync(self._descriptor)

    async def flush(self, fh):  # noqa: D102
        pass

    async def release(self, fh):  # noqa: D102
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
