"""Who has a file open for writing: processes, by /proc, and loop devices, by /sys.

Owns the reading of both. Looks only at what the kernel tells by itself and at files on the same
file system as the one that is asked about: it never waits for another one, which may be stuck, or
be served by this very process. Sees what this process may see: without root only the processes of
its own user.
"""

from __future__ import annotations

import fcntl
import os
import stat
import struct
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

_PROC = Path("/proc")
_SYS_BLOCK = Path("/sys/block")
_DELETED = " (deleted)"
_LOOP_GET_STATUS64 = 0x4C05
# struct loop_info64: device and inode of the backing file come first.
_LOOP_INFO_SIZE = 232
# How long a loop device may take to say what it is on, if its path does not tell.
_PATIENCE = 1.0
#: Loop devices that have been asked and have not answered yet.
_asking: set[str] = set()
#: Processes whose memory is being looked at; who stays in it is stuck.
_reading: set[int] = set()
_Mounts = dict[str, tuple[str, str]]


class Writer(NamedTuple):
    """A process that has a file open for writing. started: in the kernel's ticks since boot.

    The numbers of processes are used again; together with `started` they are not.
    """

    pid: int
    started: int
    command: str

    def __str__(self) -> str:
        return f"{self.command} (pid {self.pid})"


class Loop(NamedTuple):
    """A loop device over a file. mounts: where what is on it is mounted, as this process sees."""

    device: str
    read_only: bool
    mounts: tuple[str, ...]

    def __str__(self) -> str:
        return self.device


class File:
    """A file to ask about: known by what it is, not by a descriptor that may be closed by then."""

    def __init__(self, fd: int, path: Path) -> None:
        """The file that is open as `fd` and was opened as `path`. OSError."""
        info = os.fstat(fd)
        self.is_regular = stat.S_ISREG(info.st_mode)
        self.device, self.inode = info.st_dev, info.st_ino
        told = _fdinfo(os.getpid(), str(fd)) or {}
        self.file_system = _file_system(os.getpid(), told.get("mnt_id", ""))
        self.names = {str(path), os.path.realpath(path)}

    @classmethod
    def at(cls, path: Path) -> File:
        """The file at `path`, without opening it for anything. OSError."""
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        try:
            return cls(fd, path)
        finally:
            os.close(fd)

    def is_at(self, path: str) -> bool:
        """Whether it is what lies at `path`, which must be on its own file system."""
        try:
            info = os.stat(path)
        except OSError:
            return False
        return (info.st_dev, info.st_ino) == (self.device, self.inode)


# --- processes -----------------------------------------------------------------------------------


def writers(files: list[File]) -> list[dict[Writer, int]]:
    """Who but us has each of the files open for writing: with how many descriptors, and whether
    mapped (one more).

    Not counted are this process and its descendants: what they have, they have from us.
    """
    found: list[dict[Writer, int]] = [{} for _ in files]
    inodes = {file.inode for file in files}
    for pid in _pids():
        for name, inode, mount in _open_for_writing(pid, inodes):
            for file, those in zip(files, found, strict=True):
                if file.inode == inode and _is_it(file, pid, name, mount):
                    _count(those, pid)
    # After the descriptors: who maps a file has it open until then.
    mapped: set[tuple[int, int]] = set()
    for pid, place, inode, where, path in _mapped_for_writing(inodes):
        for number, file in enumerate(files):
            if (file.inode, file.file_system) != (inode, place):
                continue
            # The second takes root, and tells one from the other where a number is there twice.
            if (number, pid) not in mapped and (path in file.names or file.is_at(where)):
                mapped.add((number, pid))
                _count(found[number], pid)
    return found


def _count(those: dict[Writer, int], pid: int) -> None:
    if not _descends(pid) and (writer := _writer(pid)) is not None:
        those[writer] = those.get(writer, 0) + 1


def _is_it(file: File, pid: int, name: str, mount: str) -> bool:
    """Whether a descriptor of the process is this file; the inode's number is the same.

    First the file system, by what the kernel knows: asking the file could wait for ever on another
    one. Then the file, since one file system may have a number twice (btrfs).
    """
    place = _file_system(pid, mount)
    return bool(place) and place == file.file_system and file.is_at(f"{_PROC}/{pid}/fd/{name}")


def _pids() -> list[int]:
    try:
        return [int(name) for name in os.listdir(_PROC) if name.isdigit()]
    except OSError:
        return []


def _descends(pid: int) -> bool:
    """Whether the process is this one or descends from it."""
    for _ in range(64):
        if pid == os.getpid():
            return True
        fields = _stat(pid)
        if fields is None or pid <= 1:
            return False
        pid = int(fields[1])
    return False


def _stat(pid: int) -> list[str] | None:
    """The fields of /proc/PID/stat behind the command: state, parent, …; None if it is gone."""
    try:
        return (_PROC / str(pid) / "stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None


def _writer(pid: int) -> Writer | None:
    fields = _stat(pid)
    if fields is None:
        return None
    try:
        command = (_PROC / str(pid) / "comm").read_text(errors="replace").rstrip("\n")
    except OSError:
        return None
    return Writer(pid, int(fields[19]), command)


def _open_for_writing(pid: int, inodes: set[int]) -> Iterator[tuple[str, int, str]]:
    """(descriptor, inode, mount) of each file with such an inode that it has open for writing."""
    folder = _PROC / str(pid) / "fd"
    try:
        names = os.listdir(folder)
    except OSError:
        return  # gone, or not ours to see
    for name in names:
        with suppress(OSError, ValueError):
            if not os.readlink(folder / name).startswith("/"):
                continue  # a socket, a pipe
            told = _fdinfo(pid, name)
            if (
                told is not None
                and int(told.get("ino", -1)) in inodes
                and int(told["flags"], 8) & os.O_ACCMODE != os.O_RDONLY
            ):
                yield name, int(told["ino"]), told.get("mnt_id", "")


def _mapped_for_writing(inodes: set[int]) -> list[tuple[int, str, int, str, str]]:
    """(process, file system, inode, entry in map_files, path) of each shared, writable mapping of a
    file with such an inode: it needs no descriptor any more once it is made.

    The kernel may let us wait for as long as a process is stuck while it changes its memory. Such a
    one is passed over.
    """
    found: list[tuple[int, str, int, str, str]] = []
    current = [0]

    def look() -> None:
        for pid in _pids():
            if pid in _reading:
                continue
            current[0] = pid
            _reading.add(pid)
            try:
                found.extend(_mappings(pid, inodes))
            except (OSError, ValueError, MemoryError):
                pass  # gone, or not ours to see
            finally:
                _reading.discard(pid)

    thread = threading.Thread(target=look, daemon=True)
    try:
        thread.start()
    except RuntimeError:
        return []  # As many as may be.
    while thread.is_alive():
        before = current[0]
        thread.join(_PATIENCE)
        if current[0] == before:
            break
    return list(found)


def _mappings(pid: int, inodes: set[int]) -> Iterator[tuple[int, str, int, str, str]]:
    # "7f00-7f10 rw-s 00000000 fe:00 1234    /path", the device in hexadecimal
    for line in (_PROC / str(pid) / "maps").read_bytes().split(b"\n"):
        fields = line.split(None, 5)
        if len(fields) < 6 or fields[1][1:2] != b"w" or fields[1][3:4] != b"s":
            continue
        if (inode := int(fields[4])) in inodes:
            major, minor = (int(part, 16) for part in fields[3].split(b":"))
            where = f"{_PROC}/{pid}/map_files/{os.fsdecode(fields[0])}"
            path = os.fsdecode(fields[5]).replace("\\012", "\n")
            yield pid, f"{major}:{minor}", inode, where, path


def _fdinfo(pid: int, name: str) -> dict[str, str] | None:
    """What the kernel tells of a descriptor: flags (octal), mnt_id, ino (from Linux 5.14 on)."""
    try:
        lines = (_PROC / str(pid) / "fdinfo" / name).read_text(errors="replace").splitlines()
    except OSError:
        return None
    parts = (line.partition(":") for line in lines)
    return {name: value.strip() for name, _, value in parts if name in ("flags", "mnt_id", "ino")}


def _file_system(pid: int, mount: str) -> str:
    """The file system ("major:minor") of a mount in the process's namespace, "" if unknown."""
    for fields in _mountinfo(pid):
        if fields[0] == mount:
            return fields[2]
    return ""


def _mountinfo(pid: int) -> Iterator[list[str]]:
    try:
        # As bytes: only "\n" ends a line, names may hold "\r" and the like.
        text = os.fsdecode((_PROC / str(pid) / "mountinfo").read_bytes())
    except OSError:
        return
    for line in text.split("\n"):
        fields = line.split(" ")
        if len(fields) > 5:
            yield fields


# --- loop devices --------------------------------------------------------------------------------


def attached() -> list[tuple[str, str]]:
    """(device, backing file as the kernel names it) of every loop device in use, by number."""
    found = []
    for entry in _SYS_BLOCK.glob("loop*"):
        backing = backing_file(entry.name)
        if backing is not None:
            found.append((f"/dev/{entry.name}", backing))
    return sorted(found, key=lambda pair: (len(pair[0]), pair[0]))


def backing_file(name: str) -> str | None:
    """The file behind a loop device, e.g. "loop0"; None if it is not in use."""
    try:
        raw = (_SYS_BLOCK / name / "loop" / "backing_file").read_bytes()
    except OSError:
        return None
    return os.fsdecode(raw.removesuffix(b"\n"))


def loops(file: File) -> list[Loop]:
    """The loop devices over the file.

    By its name, else by the inode the name leads to, else (a name of another mount namespace, or
    one that is gone) by asking the device itself, which takes root.
    """
    if not file.is_regular:
        return []
    found = []
    mounts = _mount_points()  # Read once: there may be thousands, and as many loop devices.
    for device, backing in attached():
        same = backing in file.names or (
            # Another file system may not answer.
            _mount_of(backing, mounts)[0] == file.file_system != "" and file.is_at(backing)
        )
        if same or (_may_be(backing, file, mounts) and _asked(device, file)):
            found.append(_described(device))
    return found


def _may_be(backing: str, file: File, mounts: _Mounts) -> bool:
    """Whether a name that leads elsewhere, or nowhere, may still mean the file.

    It may if it is gone, or if its last part is the same: the directories above can have other
    names in another mount namespace. What is on FUSE here is known to be something else.
    """
    path = backing.removesuffix(_DELETED)
    file_system, kind = _mount_of(path, mounts)
    if kind.startswith("fuse"):
        return False
    last = {os.path.basename(name) for name in file.names}
    return os.path.basename(path) in last or (backing != path and file_system == file.file_system)


def _mount_points() -> _Mounts:
    """By mountpoint, (file system as "major:minor", its type) of each mount of this namespace."""
    # Later ones hide earlier ones.
    return {
        _unescaped(fields[4]): (fields[2], fields[fields.index("-") + 1])
        for fields in _mountinfo(os.getpid())
    }


def _mount_of(path: str, mounts: _Mounts) -> tuple[str, str]:
    """What an absolute path lies on."""
    while path.startswith("/"):
        if path in mounts or path == "/":
            return mounts.get(path, ("", ""))
        path = path.rpartition("/")[0] or "/"
    return "", ""


def _unescaped(field: str) -> str:
    """The kernel writes blank, tab, newline and backslash as three octal digits."""
    for code, char in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        field = field.replace(code, char)
    return field


def _asked(device: str, file: File) -> bool:
    """Whether a loop device says that it is on that file. False if it does not say so in time."""
    if device in _asking:
        return False
    answer: list[tuple[int, int]] = []

    def ask() -> None:
        try:
            fd = os.open(device, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            try:
                info = bytearray(_LOOP_INFO_SIZE)
                fcntl.ioctl(fd, _LOOP_GET_STATUS64, info)
            finally:
                os.close(fd)
            answer.append(struct.unpack_from("=QQ", info))
        except OSError:
            pass  # not ours to ask, or detached meanwhile
        finally:
            _asking.discard(device)

    # Given up if it hangs: to answer, the kernel asks the file system underneath.
    _asking.add(device)
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_PATIENCE)
    return answer == [(_encoded(file.device), file.inode)]


def _encoded(device: int) -> int:
    """A device number as the kernel packs it into 64 bits (huge_encode_dev)."""
    major, minor = os.major(device), os.minor(device)
    return (minor & 0xFF) | (major << 8) | ((minor & ~0xFF) << 12)


def _described(device: str) -> Loop:
    name = Path(device).name
    numbers = set()
    for entry in (_SYS_BLOCK / name, *(_SYS_BLOCK / name).glob(f"{name}p*")):
        with suppress(OSError):
            numbers.add((entry / "dev").read_text().strip())
    try:
        read_only = (_SYS_BLOCK / name / "ro").read_text().strip() == "1"
    except OSError:
        read_only = False
    mounts = [_unescaped(f[4]) for f in _mountinfo(os.getpid()) if f[2] in numbers]
    return Loop(device, read_only, tuple(mounts))
