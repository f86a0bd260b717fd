"""Names and inode numbers of the mounted tree; plain Python, no pyfuse3.

Owns the layout:

    /                           1
    ├─ replica.img              2   the live volume
    ├─ status.json              3   live
    ├─ events.log               4   live
    └─ recovery-points/         5
       ├─ by-time/              6
       │  └─ 2026-11-22T07-20-00Z -> ../0001.img        LINK_BASE + number
       ├─ latest -> 0001.img    7   (absent while there is no point)
       └─ 0001.img                                      POINT_BASE + number

Promises: the inode number of a point is made from its number, which a volume never uses twice,
so the kernel's caches of a deleted point can never be taken for a later one's. A name under
by-time keeps its meaning for as long as the mount lives, whatever else is deleted meanwhile.

Leaves attributes, handles and errnos to `operations`.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from vsnapfs.volume import RecoveryPoint, Volume

ROOT = 1
REPLICA = 2
STATUS = 3
EVENTS = 4
POINTS = 5
BY_TIME = 6
LATEST = 7
# Room for more fixed names below, and for 2^48 points before the links begin.
POINT_BASE = 1 << 16
LINK_BASE = 1 << 48

DIRECTORIES = frozenset((ROOT, POINTS, BY_TIME))

_ROOT_NAMES = {  # in the order of their numbers, which are readdir's cookies
    b"replica.img": REPLICA,
    b"status.json": STATUS,
    b"events.log": EVENTS,
    b"recovery-points": POINTS,
}
_PARENT = {ROOT: ROOT, POINTS: ROOT, BY_TIME: POINTS}
_POINT_NAME = re.compile(rb"([0-9]{4,20})\.img")


class Entry(NamedTuple):
    """One name in a directory. `cookie`: where readdir goes on after it, robust to deletions."""

    name: bytes
    inode: int
    cookie: int


def point_name(number: int) -> bytes:
    """File name of a point: at least four digits, more when the number needs them."""
    return b"%04d.img" % number


def time_name(created_ns: int) -> bytes:
    """Name under by-time, before any suffix: UTC, to the second, without colons (for Windows)."""
    moment = time.gmtime(created_ns // 1_000_000_000)
    return time.strftime("%Y-%m-%dT%H-%M-%SZ", moment).encode("ascii")


class Tree:
    """The names that exist right now.

    Compares `volume.points` with what it saw last at every question, so it needs no notice of
    changes to be right; a volume has at most a few hundred points.
    """

    def __init__(self, volume: Volume) -> None:
        self._volume = volume
        self._seen: tuple[RecoveryPoint, ...] = ()
        self._points: dict[int, RecoveryPoint] = {}
        # Names under by-time are given once and never taken back while mounted: both directions.
        self._time_name: dict[int, bytes] = {}
        self._time_number: dict[bytes, int] = {}

    def points(self) -> dict[int, RecoveryPoint]:
        """The points by number, oldest first."""
        now = tuple(self._volume.points)
        if now != self._seen:
            self._seen = now
            self._points = {point.number: point for point in now}
            for point in now:
                if point.number not in self._time_name:
                    self._name_by_time(point)
        return self._points

    def _name_by_time(self, point: RecoveryPoint) -> None:
        plain = name = time_name(point.created_ns)
        suffix = 1
        while name in self._time_number:
            suffix += 1
            name = b"%s-%d" % (plain, suffix)
        self._time_name[point.number] = name
        self._time_number[name] = point.number

    def point(self, inode: int) -> RecoveryPoint | None:
        """The point whose image or by-time link `inode` is; None if it is neither, or deleted."""
        base = LINK_BASE if inode >= LINK_BASE else POINT_BASE
        return self.points().get(inode - base) if inode >= POINT_BASE else None

    def lookup(self, directory: int, name: bytes) -> int | None:
        """Inode number of `name` in `directory`, or None."""
        if name == b".":
            return directory
        if name == b"..":
            return _PARENT.get(directory)
        if directory == ROOT:
            return _ROOT_NAMES.get(name)
        points = self.points()
        if directory == POINTS:
            if name == b"by-time":
                return BY_TIME
            if name == b"latest":
                return LATEST if points else None
            match = _POINT_NAME.fullmatch(name)
            if match is None:
                return None
            number = int(match[1])
            # 00001.img is not another name of 0001.img.
            exists = number in points and point_name(number) == name
            return POINT_BASE + number if exists else None
        if directory == BY_TIME:
            named = self._time_number.get(name)
            return LINK_BASE + named if named is not None and named in points else None
        return None

    def list(self, directory: int, after: int) -> Iterator[Entry]:
        """The entries of `directory` whose cookie is above `after`, in cookie order."""
        for entry in self._entries(directory):
            if entry.cookie > after:
                yield entry

    def _entries(self, directory: int) -> Iterator[Entry]:
        if directory == ROOT:
            for name, inode in _ROOT_NAMES.items():
                yield Entry(name, inode, inode)
            return
        points = self.points()
        if directory == POINTS:
            yield Entry(b"by-time", BY_TIME, BY_TIME)
            if points:
                yield Entry(b"latest", LATEST, LATEST)
            for number in sorted(points):
                yield Entry(point_name(number), POINT_BASE + number, POINT_BASE + number)
        elif directory == BY_TIME:
            for number in sorted(points):
                yield Entry(self._time_name[number], LINK_BASE + number, LINK_BASE + number)

    def target(self, inode: int) -> bytes | None:
        """What a symbolic link points at; None if `inode` is no link, or dangling by deletion."""
        points = self.points()
        if inode == LATEST:
            return point_name(max(points)) if points else None
        if inode >= LINK_BASE and inode - LINK_BASE in points:
            return b"../" + point_name(inode - LINK_BASE)
        return None
