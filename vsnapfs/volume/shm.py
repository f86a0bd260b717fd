"""Where rings live: files on tmpfs, which outlive a process and not the machine.

Owns these files: making, finding, locking, removing them. Promises:

* a ring is private (O_EXCL, 0600, no link followed, one name), and locked by whoever has it open;
* all of its memory is reserved when it is made: a full tmpfs is an error then, no SIGBUS later;
* "not here" (FileNotFoundError) is said only of a ring that is surely gone; one that another user,
  another tmpfs or another moment could still use is `Unusable`, and stays exactly as it is (W5);
* a ring of another replica, or one that somebody has locked, is neither used nor removed, and one
  that still holds a record is never removed by `tidy`.

Leaves to `adoption` what a volume does with what is found here.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from ..backing import FileId, fallocate, file_system_type
from ..config import LEAST_WRITE_BUFFER
from ..diffarea.superblock import RingName
from ..errors import FormatError, VsnapError
from .ring import Memory, Ring, head_of, read_head

ID_SIZE = 16
#: Where memory outlives a process but not the machine. The first that can be used is.
DIRECTORIES = (Path("/dev/shm"), Path("/run"))  # noqa: S108 - O_EXCL, 0600, no link followed
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_IN_MEMORY = ("tmpfs", "ramfs")
#: No more than this is copied of a ring that belongs to somebody else.
_MOST_COPIED = 4 << 30
#: /proc/self/ns/pid of the machine itself, as every kernel numbers it.
_FIRST_PID_NAMESPACE = 0xEFFFFFFC
_SHORT_OF_MEMORY = (errno.ENOSPC, errno.EFBIG, errno.ENOMEM)


class Unusable(Exception):
    """A ring is there, or may be, and cannot be used now. `hint`: what would change that."""

    def __init__(self, reason: str, hint: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.hint = hint


class RingStore(Protocol):
    """Where rings live. `boot` (16 bytes) tells one life of the machine from another; if it is
    `masked`, a container's own, it tells nothing of the kind.
    """

    boot: bytes
    masked: bool

    def make(self, size: int, volume_id: bytes, replica: FileId) -> Ring:
        """A new, empty ring of about `size` bytes. OSError (ENOSPC, ENOENT …): no place for it."""
        ...

    def find(self, name: RingName, volume_id: bytes, replica: FileId) -> Ring:
        """The ring of this name, locked. FileNotFoundError: it is gone for good. FormatError: what
        is there is no ring. `Unusable`, other OSErrors: not now, or not by this user.
        """
        ...

    def is_there(self, ring: Ring) -> bool:
        """Whether a process that starts now would find it."""
        ...

    def remove(self, ring: Ring) -> None:
        """Remove a ring that is empty, or whose content is given up."""
        ...

    def tidy(self, volume_id: bytes, replica: FileId) -> None:
        """Remove the empty rings of this replica that nobody has locked: no superblock will ever
        name them.
        """
        ...

    def doubt(self) -> str:
        """Why rings made here may not outlive this process, "" if nothing speaks against it."""
        ...


def discard(volume_id: bytes) -> None:
    """Remove whatever a volume that is itself being removed has left in memory. OSError."""
    for directory in DIRECTORIES:
        for path in directory.glob(f"vsnapfs-{volume_id.hex()}-*"):
            path.unlink()


def boot_id() -> bytes:
    """What the kernel calls this life of the machine. VsnapError where it cannot be asked."""
    try:
        text = _BOOT_ID.read_text(errors="replace").strip()
        number = bytes.fromhex(text.replace("-", "")) if text.isascii() else b""
        if len(number) != ID_SIZE:
            # /dev/null, or an empty file, laid over it is how a sandbox hides a file.
            raise ValueError
    except (OSError, ValueError) as error:
        reason = "this is no boot id"
        if isinstance(error, OSError):
            reason = error.strerror or str(error)
        raise VsnapError(
            f"whether the machine has been restarted since cannot be told: {_BOOT_ID}: {reason}",
            hint="Nothing was changed. A service or container that sees only part of /proc "
            "(ProcSubset=pid, a masked path) must be given all of it.",
            errno=getattr(error, "errno", 0) or errno.EIO,
        ) from error
    return number


def boot_is_masked() -> bool:
    """Whether something lies over the kernel's boot id: systemd-nspawn gives each of its containers
    one of its own, which changes while the machine stays up. OSError.
    """
    # What the kernel makes up when it is read has no size; a random number is another each time.
    return os.stat(_BOOT_ID).st_size != 0 or boot_id() != boot_id()


class SharedMemory:
    """Rings as files on tmpfs, 0600, each with a name of its own that nobody can guess."""

    def __init__(self, directories: tuple[Path, ...] = DIRECTORIES) -> None:
        self.boot = boot_id()
        self.masked = boot_is_masked()
        self._directories = directories

    # -- making ---------------------------------------------------------------------------------

    def make(self, size: int, volume_id: bytes, replica: FileId) -> Ring:
        """See `RingStore.make`. Where there is less room it is smaller, down to 4 MiB."""
        if self.masked:
            # Whoever finds it, here or outside, could not tell whether the machine was down since.
            raise OSError(errno.EOPNOTSUPP, f"{_BOOT_ID} is not the machine's own")
        problem = OSError(errno.ENOENT, "there is no tmpfs")
        for directory in self._directories:
            if file_system_type(directory) not in _IN_MEMORY:
                continue
            memory = directory.stat().st_dev
            name = RingName(secrets.token_bytes(ID_SIZE), replica.device, replica.inode, memory)
            wanted = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
            while wanted >= min(size, LEAST_WRITE_BUFFER):
                try:
                    path = _path(directory, name, volume_id)
                    return _make(path, wanted, name, volume_id, replica)
                except OSError as error:
                    problem = error
                    # A container's share can be small: less is better than none.
                    short = error.errno in _SHORT_OF_MEMORY
                    wanted = wanted // 2 & -mmap.PAGESIZE if short else 0
        raise problem

    # -- finding --------------------------------------------------------------------------------

    def find(self, name: RingName, volume_id: bytes, replica: FileId) -> Ring:
        """See `RingStore.find`."""
        whole: list[Path] = []
        seen = False
        for directory in self._directories:
            with suppress(OSError):
                if directory.stat().st_dev == name.memory:
                    seen = True
                    whole += _all_of(directory)
            path = _path(directory, name, volume_id)
            try:
                fd = _open(path)
            except (FileNotFoundError, NotADirectoryError):
                continue
            try:
                if name.memory in (0, os.fstat(fd).st_dev):
                    return _use(fd, path, name, volume_id, replica)
            except BaseException:
                os.close(fd)
                raise
            os.close(fd)  # A copy of it (an overlay makes one): the ring itself would come back.
        hint = "Open the volume where it was served, with the same /dev/shm."
        for top in whole:
            if deeper := _may_hold(top, path.name, name.memory):
                # What a sandbox had over its /dev/shm may be a subdirectory of this one.
                raise Unusable(f"it lies in {deeper}, or may: it was not made in {top}", hint)
        if whole or not name.memory:
            raise FileNotFoundError(errno.ENOENT, "it is gone")
        device = f"{os.major(name.memory)}:{os.minor(name.memory)}"
        raise Unusable(
            f"it may lie in a part of its tmpfs (device {device}) that cannot be seen from here"
            if seen
            else f"it lies in another tmpfs (device {device}), "
            "the /dev/shm of a container or a service",
            hint,
        )

    # -- being there, being removed -------------------------------------------------------------

    def is_there(self, ring: Ring) -> bool:
        """See `RingStore.is_there`."""
        return os.fstat(ring.fd).st_nlink > 0

    def remove(self, ring: Ring) -> None:
        """See `RingStore.remove`. What has taken its name meanwhile stays."""
        for directory in self._directories:
            with suppress(OSError):
                volume_id = read_head(ring.memory).volume_id
                _unlink(_path(directory, ring.name, volume_id), ring.fd)

    def tidy(self, volume_id: bytes, replica: FileId) -> None:
        """See `RingStore.tidy`."""
        for path, ring in self._unlocked(volume_id, replica):
            try:
                if ring.is_unused or not any(True for _ in ring.records()):
                    with suppress(OSError):  # Whoever was faster, or holds the directory.
                        _unlink(path, ring.fd)
            finally:
                ring.close()

    def _unlocked(self, volume_id: bytes, replica: FileId) -> Iterator[tuple[Path, Ring]]:
        """The rings of this replica that can be used and are locked by nobody; locked now."""
        for directory in self._directories:
            for path in sorted(directory.glob(f"vsnapfs-{volume_id.hex()}-*")):
                fd = -1
                try:
                    fd = _open(path)
                    head = read_head(os.pread(fd, mmap.PAGESIZE + 1, 0))
                    name, whose = head.name, head.volume_id
                    of_it = (name.device, name.inode) == (replica.device, replica.inode)
                    if not of_it or whose != volume_id or path != _path(directory, name, whose):
                        raise FormatError("it is another's")
                    yield path, _use(fd, path, name, volume_id, replica, unfinished=True)
                except (OSError, FormatError, Unusable, MemoryError):
                    # Not ours to judge: it stays.
                    if fd >= 0:
                        with suppress(OSError):
                            os.close(fd)

    # -- outliving ------------------------------------------------------------------------------

    def doubt(self) -> str:
        """See `RingStore.doubt`: whether /dev/shm is the machine's own or a container's."""
        if self.masked:
            return ""  # None are made here.
        directory = self._directories[0]
        try:
            ours = directory.stat().st_dev
            if os.stat("/proc/self/ns/pid").st_ino != _FIRST_PID_NAMESPACE:
                return (
                    f"this is a container, and its {directory} may end with it: what is in the "
                    "write buffer then is lost"
                )
            lines = os.fsdecode(Path("/proc/1/mountinfo").read_bytes()).split("\n")
        except OSError:
            return ""  # It cannot be told.
        wanted = f"{os.major(ours)}:{os.minor(ours)}"
        if any(fields[2:3] == [wanted] for fields in _fields(lines)):
            return ""
        return (
            f"{directory} is not the machine's own, and may end with this service or container: "
            "what is in the write buffer then is lost"
        )


def _path(directory: Path, name: RingName, volume_id: bytes) -> Path:
    return directory / f"vsnapfs-{volume_id.hex()}-{name.ring_id.hex()}"


def _all_of(directory: Path) -> list[Path]:
    """The top of the file system that holds the directory, if all of that can be seen below it.

    A sandbox may have only a subdirectory of the machine's /dev/shm there, under the same device
    number, or something mounted over one; or it is itself no more than a directory of a tmpfs that
    is mounted higher up. OSError.
    """
    fd = os.open(directory, os.O_PATH | os.O_CLOEXEC)
    try:
        lines = Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines()
        device = os.fstat(fd).st_dev
    finally:
        os.close(fd)
    mount = next((line.split()[1] for line in lines if line.startswith("mnt_id:")), "")
    mounts = _fields(os.fsdecode(Path("/proc/self/mountinfo").read_bytes()).split("\n"))
    tops = [Path(fields[4]) for fields in mounts if fields[:1] == [mount] and fields[3] == "/"]
    hidden = any(fields[1:2] == [mount] for fields in mounts)
    return [top for top in tops if not hidden and top.stat().st_dev == device]


def _may_hold(top: Path, wanted: str, device: int) -> str:
    """The directory of that tmpfs, below `top`, that holds a file of this name, else one that
    cannot be looked into; "" if there is none.
    """
    unseen = ""

    def failed(error: OSError) -> None:
        nonlocal unseen
        if error.errno != errno.ENOENT:
            unseen = str(error.filename)

    for folder, inside, names in os.walk(top, onerror=failed):
        if wanted in names:
            return folder
        for name in tuple(inside):
            try:
                if os.lstat(os.path.join(folder, name)).st_dev != device:
                    inside.remove(name)  # Another file system.
            except OSError as error:
                failed(error)
    return unseen


def _fields(mountinfo: list[str]) -> list[list[str]]:
    # No other kind of blank ends a line or a field: whoever mounts may have it in a name.
    return [line.split(" ") for line in mountinfo]


def _make(path: Path, size: int, name: RingName, volume_id: bytes, replica: FileId) -> Ring:
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(path, flags, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # First of all: one that is never finished says whose it was, and is tidied away.
        os.pwrite(fd, head_of(size, name, volume_id), 0)
        fallocate(fd, 0, size)
        # Touched now, not by the writes: the first round would cost a page fault each 4 KiB.
        memory = mmap.mmap(fd, size, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
        return Ring.make(memory, name, volume_id, fd, replica.born, replica.system)
    except BaseException as error:
        os.unlink(path)
        os.close(fd)
        if isinstance(error, (ValueError, OverflowError)):
            raise OSError(errno.ENOMEM, f"it cannot be mapped: {error}") from error
        raise


def _open(path: Path) -> int:
    """OSError, `Unusable` if another user's permissions are in the way."""
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        return os.open(path, flags)
    except PermissionError as error:
        with suppress(OSError):
            owner = path.lstat().st_uid
            raise Unusable(
                f"{path} belongs to another user (uid {owner})",
                f"Let uid {owner} or root do it.",
            ) from error
        raise


def _use(
    fd: int,
    where: Path,
    name: RingName,
    volume_id: bytes,
    replica: FileId,
    *,
    unfinished: bool = False,
) -> Ring:
    """The ring in an open file, once that is private and locked. Takes `fd` over if it returns.

    unfinished: one that was never finished will do, too. FormatError, `Unusable`, OSError.
    """
    info, here = os.fstat(fd), os.geteuid()
    # Root may carry out what the owner of the replica has acknowledged: it changes his files only.
    if info.st_uid != here and not (here == 0 and info.st_uid == replica.owner):
        raise Unusable(
            f"{where} belongs to another user (uid {info.st_uid}), "
            f"and the replica to uid {replica.owner}",
            f"Open the volume as uid {info.st_uid}, or give the replica back to that user.",
        )
    if not stat.S_ISREG(info.st_mode) or info.st_mode & 0o077 or info.st_nlink != 1:
        raise Unusable(
            f"{where} is not private: others can use it, or it has a second name",
            "Find out who did that; it must be a file with mode 0600 and one name.",
        )
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Unusable(f"{where} is in use by another process", "End that process first.") from None
    is_copy = info.st_uid != here
    try:
        memory = _copy(fd, info) if is_copy else mmap.mmap(fd, info.st_size)
    except (ValueError, OverflowError) as error:
        raise FormatError(f"it cannot be mapped: {error}") from error
    try:
        ring = Ring(memory, name, fd, is_copy=is_copy)
        if unfinished and ring.is_unused:
            return ring
        if (made := read_head(memory).size) < len(memory):
            raise Unusable(
                f"{where} has been made longer", f"'truncate -s {made} {where}' undoes that."
            )
        return Ring.found(memory, name, volume_id, fd, is_copy=is_copy)
    except BaseException:
        ring.view.release()
        if isinstance(memory, mmap.mmap):
            memory.close()
        raise


def _copy(fd: int, info: os.stat_result) -> Memory:
    """The content of another user's ring: mapped, he could end this process by cutting it short."""
    if info.st_size > _MOST_COPIED or info.st_blocks * 512 < info.st_size:
        raise Unusable(f"it has an impossible size ({info.st_size} bytes)")
    memory, done = bytearray(info.st_size), 0
    with memoryview(memory) as view:
        while done < len(view) and (count := os.preadv(fd, [view[done : done + (1 << 30)]], done)):
            done += count
    if done < len(memory):
        raise FormatError("it has been cut short")
    return memory


def _unlink(path: Path, fd: int) -> None:
    """Remove a name if it is still that of the open file. OSError."""
    there, here = path.lstat(), os.fstat(fd)
    if (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino):
        path.unlink()
