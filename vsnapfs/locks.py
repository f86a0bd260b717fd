"""Opening and locking: what keeps everybody else from writing to replica, diff area and state file.

Owns flock(2), which keeps a second vsnapfs away (promise S1), and the image locks that QEMU looks
at, which keep QEMU, qemu-img, qemu-io and qemu-nbd away. Hands out descriptors; whoever has one
keeps it open for as long as the locks are to hold, and gives all of them up by closing it. All
belong to the *open file description*, never to the process: two openings in one process exclude
each other, what a child inherits keeps them, and closing another descriptor of the same file does
not drop them (as it would with the other kind of fcntl locks).

QEMU's image locks (block/file-posix.c, raw_apply_lock_bytes and raw_check_lock_bytes; compared
with 7.2) are *shared* locks on single bytes, each of which says something:

    byte 100 + n   I use permission n
    byte 200 + n   I do not share permission n with others

    n = 0  consistent read   1  write   2  write what is there already   3  resize

First somebody locks what he says, then he looks whether anybody else has said what contradicts it:
200 + n for each n that he uses, 100 + n for each n that he does not share. Since what is said is
said before it is looked for, of two that come at once at least one sees the other.

Where a file system knows no such locks (and then QEMU cannot use them either) we do without.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
from pathlib import Path

from .errors import BusyError, VsnapError

# struct flock of fcntl(2) with 64-bit offsets: type, whence, start, length, pid (0 for these).
_FLOCK = struct.Struct("hhqqi0q")

_USES, _KEEPS = 100, 200
_READ, _WRITE, _REWRITE, _RESIZE = range(4)

#: What we say: we read and write; nobody else may write, and nobody may change the size.
SAID = (_USES + _READ, _USES + _WRITE, _KEEPS + _WRITE, _KEEPS + _REWRITE, _KEEPS + _RESIZE)
#: What contradicts it when another has said it.
_WRITERS = (_USES + _WRITE, _USES + _REWRITE, _USES + _RESIZE)
_READERS = (_KEEPS + _READ, _KEEPS + _WRITE)


def open_file(path: Path, access: int, *, follow: bool) -> int:
    """Open what must be a file or a block device. OSError; VsnapError if it is neither."""
    mode = os.stat(path, follow_symlinks=follow).st_mode
    # Looked at before it is opened, too: opening a tape or a watchdog does something.
    if not (stat.S_ISBLK(mode) or stat.S_ISREG(mode) or stat.S_ISLNK(mode)):
        raise _neither(path)
    # O_NONBLOCK: a pipe in a file's place must not hang us; files and devices ignore it.
    flags = access | os.O_CLOEXEC | os.O_NONBLOCK | (0 if follow else os.O_NOFOLLOW)
    fd = os.open(path, flags)
    mode = os.fstat(fd).st_mode
    if not (stat.S_ISBLK(mode) or stat.S_ISREG(mode)):
        os.close(fd)
        raise _neither(path)
    return fd


def _neither(path: Path) -> VsnapError:
    return VsnapError(
        f"{path} is neither a file nor a block device",
        hint="Move it away, and bring back what was there.",
    )


def open_locked(path: Path, *, follow: bool) -> int:
    """A descriptor that holds the locks.

    Opened for reading only: who finds a file locked must not have opened it for writing, if only
    for a moment. Whoever serves it would be right to take that for a stranger.
    """
    try:
        return _opened_and_locked(path, os.O_RDONLY, follow=follow)
    except OSError as error:
        if error.errno != errno.EBADF:
            raise
        # NFS locks only what is open for writing.
        return _opened_and_locked(path, os.O_RDWR, follow=follow)


def _opened_and_locked(path: Path, access: int, *, follow: bool) -> int:
    fd = open_file(path, access, follow=follow)
    try:
        take(path, fd)
    except BaseException:
        os.close(fd)
        raise
    return fd


def take(path: Path, fd: int) -> None:
    """Lock an open file or device. BusyError if another has it, vsnapfs or QEMU; OSError."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise BusyError(
            f"{path} is in use by another process",
            hint="A volume has one server: look for it with 'vsnapfs status'.",
        ) from None
    if not _say(path, fd):
        return
    if any(_is_locked(fd, byte) for byte in _WRITERS):
        raise _in_qemu(path, "for writing")
    if any(_is_locked(fd, byte) for byte in _READERS):
        # It could be let in; but what it reads (a backup by qemu-img convert, say) would be a
        # mixture, and it has asked that nobody writes meanwhile.
        raise _in_qemu(path, "and lets nobody write to it meanwhile")


def _in_qemu(path: Path, how: str) -> BusyError:
    return BusyError(
        f"{path} is in use: QEMU (or qemu-img, qemu-nbd, …) has it open {how}, by its image locks",
        hint="End that first. What is to use the volume, opens MOUNTPOINT/replica.img.",
    )


def _say(path: Path, fd: int) -> bool:
    """Lock the bytes of `SAID`. False if this file system has no such locks."""
    for byte in SAID:
        try:
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _flock(fcntl.F_RDLCK, byte))
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES) and _is_locked(fd, byte):
                # No QEMU does that: somebody has locked the whole file in the other way.
                raise BusyError(f"{path} is locked by another process") from None
            return False
    return True


def _is_locked(fd: int, byte: int) -> bool:
    """Whether anybody else has a lock on the byte, shared or not."""
    try:
        found = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _flock(fcntl.F_WRLCK, byte))
    except OSError:
        return False
    return bool(_FLOCK.unpack(found)[0] != fcntl.F_UNLCK)


def _flock(kind: int, byte: int) -> bytes:
    return _FLOCK.pack(kind, os.SEEK_SET, byte, 1, 0)
