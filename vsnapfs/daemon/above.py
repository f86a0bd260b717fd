"""What stands on the volume: block devices and file systems over it, and syncing them from the top.

Owns the search through /sys and every mount table, and the order of syncs. From the loop devices
on our mount upwards: their partitions, the devices that hold them (device mapper, md), loop devices
over one of those or over a file in a file system on one of those, and so on. Promises:

* a file system is known by the number of its device, not by the name it was mounted from, and is
  found in whatever mount namespace it is; one that was unmounted lazily is reached by its device;
* what lies on top is synced first, with its device after it, and then what is below: so what the
  uppermost one held back has come through all of them when the loop devices on our mount are done;
* one that hangs takes half of the time that is left, at most, from what is below it;
* a server that is killed meanwhile ends: no thread in here keeps its mount alive.

All of it blocks, and may have to ask the very process that serves the volume: so call `Syncing`,
which does it in threads of its own. Plain ones: who hangs is left to end with the mount.

Leaves swap and whoever reads and writes a device without a file system alone: nothing of theirs is
held back that a flush of their own would not have written. Not found: what a process makes of an
open replica.img (nbd, another FUSE), and pools (ZFS).
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import stat
import struct
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from vsnapfs.daemon.mounts import Mount, mounts_in

_SYS = Path("/sys")
_PROC = Path("/proc")
_LOOP_GET_STATUS64 = 0x4C05
_LOOP_INFO = struct.Struct("=QQQ")  # device and inode of the file, device if it is a device's node
_LOOP_INFO_SIZE = 232
_BLKFLSBUF = 0x1261
_CLOSE_RANGE_UNSHARE = 2
# How long a question may take that is answered at once, unless somebody hangs.
_PATIENCE = 1.0
# No machine has so many on top of each other; a loop in what /sys says would never end.
_MOST_LAYERS = 64


@dataclass(frozen=True)
class FileSystem:
    """A file system on a device of its layer. places: where it can be reached, best first."""

    device: str
    fstype: str
    places: tuple[str, ...]


@dataclass
class Layer:
    """Block devices that are equally far from the volume: "MAJOR:MINOR" → name, as below /dev."""

    devices: dict[str, str] = field(default_factory=dict)
    file_systems: list[FileSystem] = field(default_factory=list)


@dataclass(frozen=True)
class _Loop:
    """A loop device. on: device of the file system that holds its file; over: device it is over.

    Both as numbers, "" if that is not known or not so.
    """

    number: str
    name: str
    file: str
    on: str
    over: str


def layers(mountpoint: Path, device: str) -> list[Layer]:
    """What stands on the mount of number `device` at `mountpoint`, the lowest layer first.

    Whatever cannot be looked at is left out. A device that can be reached in two ways is in the
    upper one of its layers only.
    """
    loops, mounts = _loops(), list(_all_mounts())
    inside = f"{mountpoint}/"
    names = {
        loop.number: loop.name
        for loop in loops
        if (device and loop.on == device) or loop.file.startswith(inside)
    }
    found: list[Layer] = []
    while names and len(found) < _MOST_LAYERS:
        for layer in found:
            for number in names:
                layer.devices.pop(number, None)
                layer.file_systems = [fs for fs in layer.file_systems if fs.device != number]
        layer = Layer(names, list(_file_systems_on(names, mounts)))
        found.append(layer)
        names = dict(_right_above(layer, loops))
    return found


def _right_above(layer: Layer, loops: list[_Loop]) -> Iterator[tuple[str, str]]:
    """(number, name) of the devices that stand on a layer."""
    for number, name in layer.devices.items():
        directory = _SYS / "dev/block" / number
        for entry in _entries(directory):
            if (directory / entry / "partition").exists():
                yield from _device(directory / entry)
        for entry in _entries(directory / "holders"):
            yield from _device(_SYS / "class/block" / entry)
        for loop in loops:
            if loop.number != number and (loop.over == number or loop.file == f"/dev/{name}"):
                yield loop.number, loop.name
    on = {file_system.device for file_system in layer.file_systems}
    inside = tuple(f"{place}/" for fs in layer.file_systems for place in fs.places)
    for loop in loops:
        # By its path, too: btrfs has other numbers for its files than in the mount table.
        if loop.on in on or loop.file.startswith(inside):
            yield loop.number, loop.name


def _device(directory: Path) -> Iterator[tuple[str, str]]:
    number = _text(directory / "dev")
    if number:
        yield number, _name(directory)


def _name(directory: Path) -> str:
    """Where below /dev the device has its node."""
    for line in _text(directory / "uevent").splitlines():
        if line.startswith("DEVNAME="):
            return line.removeprefix("DEVNAME=")
    return directory.name


def _loops() -> list[_Loop]:
    found: dict[str, _Loop] = {}

    def ask(loop: _Loop) -> None:
        info = bytearray(_LOOP_INFO_SIZE)
        try:
            with _node(loop.number, loop.name) as fd:
                fcntl.ioctl(fd, _LOOP_GET_STATUS64, info)
        except OSError:
            return  # not root, a node that is missing, detached at this moment
        on, _, over = _LOOP_INFO.unpack_from(info)
        found[loop.number] = replace(loop, on=_number(on), over=_number(over) if over else "")

    asking = []
    for entry in sorted(_entries(_SYS / "block")):
        directory = _SYS / "block" / entry
        file = _text(directory / "loop" / "backing_file")
        for number, name in _device(directory) if file else ():
            found[number] = _Loop(number, name, file, "", "")
            # The kernel asks the file for that. One on a dead server keeps the question for ever.
            asking.append(_started(partial(ask, found[number])))
    _joined(asking, time.monotonic() + _PATIENCE)
    return list(found.values())


@contextmanager
def _node(number: str, name: str) -> Iterator[int]:
    """The node of a device, opened for reading. OSError, also if it is another device's."""
    fd = os.open(f"/dev/{name}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        found = os.fstat(fd)
        if not stat.S_ISBLK(found.st_mode) or _number(found.st_rdev) != number:
            raise OSError(f"/dev/{name} is not {number}")
        yield fd
    finally:
        os.close(fd)


def _number(device: int) -> str:
    return f"{os.major(device)}:{os.minor(device)}"


def _entries(directory: Path) -> list[str]:
    try:
        return os.listdir(directory)
    except OSError:
        return []


def _text(path: Path) -> str:
    try:
        return os.fsdecode(path.read_bytes().removesuffix(b"\n"))
    except OSError:
        return ""


# ---- file systems -------------------------------------------------------------------------------


def _all_mounts() -> Iterator[tuple[str, Mount]]:
    """(prefix of its path, mount) of every mount in every namespace, ours first."""
    seen = set()
    others = sorted(int(entry) for entry in _entries(_PROC) if entry.isdigit())
    for process in ("self", *map(str, others)):
        directory = _PROC / process
        try:
            # A process may see only a part of its namespace, below a root of its own.
            view = os.readlink(directory / "ns/mnt"), os.readlink(directory / "root")
            if view in seen:
                continue
            table = mounts_in(directory / "mountinfo")
        except OSError:
            continue  # ended, or not ours to look at
        seen.add(view)
        prefix = "" if process == "self" else f"{directory}/root"
        for mount in table:
            yield prefix, mount


def _file_systems_on(
    devices: dict[str, str], mounts: list[tuple[str, Mount]]
) -> Iterator[FileSystem]:
    names = set(devices.values())
    for directory in (_SYS / "fs/btrfs").glob("*/devices"):
        # The mount table names one of several devices, and no number of any.
        members = _entries(directory)
        if names.intersection(members):
            names.update(members)
    numbers = set(devices)
    for name in names:
        numbers.update(number for number, _ in _device(_SYS / "class/block" / name))
    places: dict[tuple[str, str], list[str]] = {}
    for prefix, mount in mounts:
        if mount.device in devices or _source(mount.source) in numbers:
            place = f"{prefix}{mount.mountpoint}"
            places.setdefault((mount.device, mount.fstype), []).append(place)
    for (device, fstype), where in places.items():
        yield FileSystem(device, fstype, tuple(where))


def _source(source: str) -> str:
    """Number of the device that a mount was made from, "" if that is no device."""
    # Whoever mounts may write here what he likes, and some paths hang.
    if not source.startswith("/dev/") or os.path.normpath(source) != source:
        return ""
    try:
        found = os.stat(source)
    except OSError:
        return ""
    return _number(found.st_rdev) if stat.S_ISBLK(found.st_mode) else ""


# ---- syncing ------------------------------------------------------------------------------------


def sync_file_system(file_system: FileSystem) -> None:
    """syncfs(2) of a file system, wherever it can be reached. Returns when it has been written."""
    for place in file_system.places:
        try:
            fd = _opened(place)
        except OSError:
            continue
        try:
            # Something else may be mounted over it, and lies in the way.
            here = _number(os.fstat(fd).st_dev)
            if here == file_system.device or file_system.fstype == "btrfs":
                # Not pyfuse3's, which keeps the GIL and so the very loop that must answer.
                ctypes.CDLL(None).syncfs(fd)
                return
        finally:
            os.close(fd)


def _opened(place: str) -> int:
    """A mountpoint, opened, if it is a directory or file. OSError."""
    path = os.open(place, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        mode = os.fstat(path).st_mode
        if not (stat.S_ISDIR(mode) or stat.S_ISREG(mode)):
            raise OSError(f"{place} is a device or pipe, and opening it may do something")
        # Not /proc/self, which shows the descriptors of the first thread (see `_started`).
        return os.open(f"/proc/thread-self/fd/{path}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    finally:
        os.close(path)


def flush_device(number: str, name: str) -> None:
    """Have a device write what it holds back, and pass a flush on to what it lies on."""
    with suppress(OSError), _node(number, name) as fd:
        with suppress(OSError):
            # Also a file system on it that no mount table knows any more (unmounted lazily).
            fcntl.ioctl(fd, _BLKFLSBUF, 0)
        os.fsync(fd)


class Syncing:
    """Lets everything above the mount of number `device` write what it holds back, for a while.

    Begun at once, in threads of its own; it goes on whether or not anybody waits.
    """

    def __init__(self, mountpoint: Path, device: str, seconds: float) -> None:
        self._end = time.monotonic() + seconds
        self._late = ["what lies on its loop devices"]
        self._thread = _started(partial(self._run, mountpoint, device))

    @property
    def is_over(self) -> bool:
        """Whether there is nothing left to wait for."""
        return not self._thread.is_alive() or time.monotonic() > self._end + _PATIENCE

    @property
    def late(self) -> list[str]:
        """What was not synced in time: mountpoints and devices. To be asked when it is over."""
        return self._late

    def _run(self, mountpoint: Path, device: str) -> None:
        found = layers(mountpoint, device)
        while True:
            under_way = self._all(found)
            _joined(under_way.values(), self._end)
            self._late = [name for name, thread in under_way.items() if thread.is_alive()]
            if not under_way or self._late:
                return
            # Those were slow; what is below them was flushed too early, so all of it once more.

    def _all(self, found: list[Layer]) -> dict[str, threading.Thread]:
        """From the top down. Returns what was passed over, being still under way."""
        under_way: dict[str, threading.Thread] = {}
        for layer in reversed(found):
            systems = {fs.places[0]: partial(sync_file_system, fs) for fs in layer.file_systems}
            devices = {
                f"/dev/{name}": partial(flush_device, number, name)
                for number, name in layer.devices.items()
            }
            for work in (systems, devices):
                threads = {name: _started(function) for name, function in work.items()}
                now = time.monotonic()
                _joined(threads.values(), now + max(0.0, self._end - now) / 2)
                under_way |= {name: thread for name, thread in threads.items() if thread.is_alive()}
        return under_way


def _started(function: Callable[[], None]) -> threading.Thread:
    def run() -> None:
        _let_go_of_the_mount()
        function()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


def _let_go_of_the_mount() -> None:
    """Leave the descriptors of the process to its other threads, this one needs none of them.

    A thread that waits for our own mount cannot be killed. Were it to hold /dev/fuse when all
    others are, the mount would never end, and nor would what it waits for.
    """
    close_range = getattr(ctypes.CDLL(None), "close_range", None)  # glibc has it from 2.34 on
    if close_range is not None:
        # Where the kernel cannot or a sandbox forbids it they stay shared, and open. Nothing is
        # closed by this: the table of this thread begins without them.
        close_range(ctypes.c_uint(3), ctypes.c_uint(2**32 - 1), ctypes.c_uint(_CLOSE_RANGE_UNSHARE))


def _joined(threads: Iterable[threading.Thread], end: float) -> None:
    """Wait for threads, at most until `end`."""
    for thread in threads:
        thread.join(max(0.0, end - time.monotonic()))
