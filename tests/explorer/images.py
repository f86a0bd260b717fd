"""What a power failure can leave: choices among the unsynced changes, and the images they make.

Owns two things. `choices` says what may become of the unsynced changes: all subsets of up to six,
one of them torn at each 512-byte cut, some with two torn; with more than six a sample. A `Scene` is
one instant of the simulated disk; it builds the image of a choice, with a hash of all bytes and
sizes, at the cost of the pages that the choice touches. Pages are immutable and shared.
"""

from __future__ import annotations

import errno
import itertools
import os
import random
from collections.abc import Iterator
from typing import NamedTuple

import xxhash
from simdisk import PAGE, Change, Host, Pages, PartlyDone, SimBacking, SimFile, Snapshot

#: Up to so many unsynced changes every subset is tried.
ALL_SUBSETS = 6
#: With more, so many by dice, besides none, all, each alone and all but each.
BY_DICE = 24
#: A change with more sectors that say something new is torn at so many of them.
MANY_CUTS = 20
FILES = ("replica", "area", "state")

Overlay = dict[str, tuple[dict[int, bytes], int]]
_ZEROS = bytes(PAGE)
_hashes: dict[tuple[int, bytes], int] = {}


class Choice(NamedTuple):
    """kept: bit i for change i. torn: a change of which only the bytes start … end - 1 are kept.

    second: another one that is torn, in the middle.
    """

    kept: int
    torn: int = -1
    start: int = 0
    end: int = 0
    second: int = -1


def _hash_of(place: int, page: bytes) -> int:
    known = _hashes.get((place, page))
    if known is None:
        if len(_hashes) > 20_000:
            _hashes.clear()
        known = 0 if page == _ZEROS else xxhash.xxh3_64_intdigest(page, place)
        _hashes[place, page] = known
    return known


def _size_hash(place: int, size: int) -> int:
    return xxhash.xxh3_64_intdigest(size.to_bytes(8, "little"), place + PAGE)


class Scene:
    """One instant: what is durable, and the changes that are not."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot
        self.memory = snapshot.memory
        self._files: dict[str, tuple[SimFile, Pages]] = {}
        #: (file, number in its journal, change), without changes of a size to what it was.
        self.pending: list[tuple[str, int, Change]] = []
        self._hash = 0
        for name, (file, disk, journal) in snapshot._files.items():
            self._files[name] = file, disk
            sizes = {change.offset for change in journal if change.data is None}
            still = sizes <= {disk.size}
            self.pending += [
                (name, number, change)
                for number, change in enumerate(journal)
                if change.data is not None or not still
            ]
            place = FILES.index(name) << 32
            self._hash ^= _size_hash(place, disk.size)
            for number, page in disk.pages.items():
                self._hash ^= _hash_of(place + number, page)

    def position(self, key: tuple[str, int]) -> int | None:
        """Which of `pending` it is."""
        for position, (name, number, _) in enumerate(self.pending):
            if (name, number) == key:
                return position
        return None

    def cuts(self, which: int) -> list[tuple[int, int]]:
        """The (start, end) of what tearing change `which` can leave: each beginning, each end.

        Without cuts that leave the same image: only a sector that says something new matters, or
        one that another change touches too.
        """
        name, _, change = self.pending[which]
        if change.data is None:
            return []
        disk = self._files[name][1]
        bounds = change.cuts()
        others = [
            (other.offset, other.offset + len(other.data))
            for place, (where, _, other) in enumerate(self.pending)
            if where == name and place != which and other.data is not None
        ]
        there = disk.read(change.offset, len(change.data))
        telling = []
        for start, end in itertools.pairwise(bounds):
            first, last = change.offset + start, change.offset + end
            if change.data[start:end] != there[start:end] or any(
                first < other_end and other < last for other, other_end in others
            ):
                telling.append(end)
        if len(telling) > MANY_CUTS:
            # A whole table: its sectors are all alike.
            telling = telling[:: len(telling) // MANY_CUTS] + telling[-1:]
        found = []
        for end in telling[:-1]:
            found += [(0, end), (end, len(change.data))]
        return found

    def build(self, choice: Choice) -> tuple[int, Overlay]:
        """The image's hash, and the pages and sizes that differ from what is durable."""
        kept, torn, start, end, second = choice
        overlay: Overlay = {}
        lost_size: set[str] = set()
        total = self._hash
        for position, (name, _, change) in enumerate(self.pending):
            whole = kept >> position & 1
            if change.data is None and not whole:
                lost_size.add(name)
            if not whole and position not in (torn, second):
                continue
            if name not in overlay:
                overlay[name] = {}, self._files[name][1].size
            pages, size = overlay[name]
            if change.data is None:
                if name not in lost_size:
                    overlay[name] = self._resize(name, pages, size, change.offset)
            elif whole:
                self._put(name, pages, size, change.offset, change.data)
            else:
                first, last = (start, end) if position == torn else (0, self._middle(change))
                part = change.data[first:last]
                self._put(name, pages, size, change.offset + first, part)
        for name, (pages, size) in overlay.items():
            disk, place = self._files[name][1], FILES.index(name) << 32
            if size != disk.size:
                total ^= _size_hash(place, disk.size) ^ _size_hash(place, size)
            for number, page in pages.items():
                old = disk.pages.get(number, _ZEROS)
                if page is not old:
                    total ^= _hash_of(place + number, old) ^ _hash_of(place + number, page)
        return total, overlay

    @staticmethod
    def _middle(change: Change) -> int:
        bounds = change.cuts()
        return bounds[len(bounds) // 2]

    def _put(self, name: str, pages: dict[int, bytes], size: int, offset: int, data: bytes) -> None:
        # What lies beyond the end of the file was never reachable.
        length = min(len(data), size - offset)
        durable, done = self._files[name][1].pages, 0
        while done < length:
            number, start = divmod(offset + done, PAGE)
            count = min(PAGE - start, length - done)
            part = data[done : done + count]
            if count < PAGE:
                old = pages.get(number)
                if old is None:
                    old = durable.get(number, _ZEROS)
                part = old[:start] + part + old[start + count :]
            pages[number] = part
            done += count

    def _resize(
        self, name: str, pages: dict[int, bytes], old: int, size: int
    ) -> tuple[dict[int, bytes], int]:
        if size < old:
            disk = self._files[name][1]
            whole = Pages({**disk.pages, **pages}, old)
            whole.resize(size)
            for number in {*disk.pages, *pages}:
                pages[number] = whole.pages.get(number, _ZEROS)
        return pages, size

    def host(self, overlay: Overlay, *, light: bool, killed: bool = False) -> Host:
        """The host that starts with this image. light: it cannot lose power itself, but is fast.
        killed: only the process has ended, and shared memory is still there. (Of everything.)
        """
        host = LightHost() if light else PartlyHost()
        before = self._snapshot._host
        host._inodes, host._time, host.capacity = before._inodes, before._time, before.capacity
        host.boot = before.boot + (not killed)
        host.tmpfs, host.device, host.born = before.tmpfs, before.device, before.born
        if killed:
            host.memory = {ring: bytearray(memory) for ring, memory in self.memory.items()}
        for name, (file, disk) in self._files.items():
            pages, size = overlay.get(name, ({}, disk.size))
            merged = {**disk.pages, **pages}
            count = -(-size // PAGE)
            host.files[name] = SimFile(
                file.inode,
                cache=Pages(merged, size),
                disk=self._disk_of(name, merged, size, light=light, killed=killed),
                # What the process wrote is in the host's cache, and may still be lost.
                journal=list(self._snapshot._files[name][2]) if killed and not light else [],
                space=file.space if light else {unit for unit in file.space if unit < count},
                written=set(file.written)
                if size == file.cache.size
                else {unit for unit in file.written if unit < count},
                ctime=file.ctime,
                is_device=file.is_device,
            )
        return host

    def _disk_of(
        self, name: str, merged: dict[int, bytes], size: int, *, light: bool, killed: bool
    ) -> Pages:
        if killed and not light:
            return self._files[name][1].copy()
        return Pages({} if light else dict(merged), size)

    def words(self, choice: Choice) -> str:
        """A choice for people."""

        def name(position: int) -> str:
            where, number, change = self.pending[position]
            if change.data is None:
                return f"{where}#{number}(size {change.offset})"
            return f"{where}#{number}({change.offset}+{len(change.data)})"

        kept = [name(i) for i in range(len(self.pending)) if choice.kept >> i & 1]
        lost = [name(i) for i in range(len(self.pending)) if not choice.kept >> i & 1]
        torn = ""
        if choice.torn >= 0:
            lost.remove(name(choice.torn))
            torn = f", of {name(choice.torn)} only bytes {choice.start} to {choice.end}"
        if choice.second >= 0:
            lost.remove(name(choice.second))
            torn += f", of {name(choice.second)} only the first half"
        return f"kept {kept}, lost {lost}{torn}"

    def memory_hash(self) -> int:
        """Of all shared memory."""
        parts = (ring + memory for ring, memory in sorted(self.memory.items()))
        return xxhash.xxh3_64_intdigest(b"".join(parts), len(self.memory) + 1)

    def everything(self) -> Choice:
        """All of it reached the disk: also what a killed process leaves."""
        return Choice((1 << len(self.pending)) - 1)


def choices(
    scene: Scene, last: tuple[str, int] | None, dice: random.Random, limit: int | None
) -> list[Choice]:
    """What to try at this instant.

    last: the change made just now; without it all has been tried before. None: try all. limit: at
    most so many, chosen by dice (none and all of the changes are always among them).
    """
    count = len(scene.pending)
    must = 0
    if last is not None:
        position = scene.position(last)
        if position is None:
            return []
        must = 1 << position
    if limit is not None:
        return _by_dice(scene, must, dice, limit)
    found: list[Choice] = []
    torn_ones = [(which, scene.cuts(which)) for which in range(count)]
    for kept in _subsets(count, dice):
        if kept & must == must:
            found.append(Choice(kept))
        for which, cuts in torn_ones:
            if kept >> which & 1 or (kept | 1 << which) & must != must:
                continue
            found += [Choice(kept, which, start, end) for start, end in cuts]
    return found + _two_torn(torn_ones, must, count)


def _by_dice(scene: Scene, must: int, dice: random.Random, limit: int) -> list[Choice]:
    count = len(scene.pending)
    found = [scene.everything()]
    while len(found) < limit:
        kept = dice.choice((dice.getrandbits(count), 0, (1 << count) - 1)) if count else 0
        which = dice.randrange(count) if count else -1
        cuts = scene.cuts(which) if count and dice.random() < 0.5 else []
        if cuts:
            found.append(Choice(kept & ~(1 << which), which, *dice.choice(cuts)))
        else:
            found.append(Choice(kept | must))
    return found


def _two_torn(torn: list[tuple[int, list[tuple[int, int]]]], must: int, count: int) -> list[Choice]:
    """Two changes torn at once, all others lost or all others kept."""
    found = []
    able = [(which, cuts) for which, cuts in torn if cuts]
    for place, (which, cuts) in enumerate(able):
        for second, _ in able[place + 1 :]:
            both = 1 << which | 1 << second
            if must and not both & must:
                continue
            for kept in (0, ((1 << count) - 1) & ~both):
                found += [
                    Choice(kept, which, *cuts[0], second),
                    Choice(kept, which, *cuts[1], second),
                ]
    return found


def _subsets(count: int, dice: random.Random) -> Iterator[int]:
    if count <= ALL_SUBSETS:
        yield from range(1 << count)
        return
    everything = (1 << count) - 1
    yield 0
    yield everything
    for which in range(count):
        yield 1 << which
        yield everything ^ 1 << which
    for _ in range(BY_DICE):
        yield dice.randrange(1 << count)


class PartlyHost(Host):
    """A host of which a sync that fails may have written half of what it should have."""

    def open(self, name: str) -> SimBacking:
        opened = super().open(name)
        return _PartlyBacking(self, name, opened.file)


class _PartlyBacking(SimBacking):
    def sync(self) -> None:
        journal = list(self.file.journal)
        try:
            super().sync()
        except PartlyDone:
            for change in journal[len(journal) // 2 :]:
                if change.data is not None:
                    change.apply(self.file.disk)
            self.host.changed()
            raise


class LightHost(Host):
    """A host for looking at an image: nothing is journaled, nothing fails."""

    def open(self, name: str) -> SimBacking:
        if name not in self.files:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
        file = self.files[name]
        file.locked = True
        return _LightBacking(self, name, file)


class _LightBacking(SimBacking):
    def size(self) -> int:
        return self.file.cache.size

    def read(self, offset: int, length: int) -> bytes:
        cache = self.file.cache
        if offset + length > cache.size:
            raise OSError(errno.EIO, f"{self.name} ends before byte {offset + length}")
        first, last = offset // PAGE, (offset + length - 1) // PAGE
        get = cache.pages.get
        whole = b"".join([get(page, _ZEROS) for page in range(first, last + 1)])
        start = offset - first * PAGE
        return whole[start : start + length]

    def write(self, offset: int, data: object) -> None:
        file, content = self.file, bytes(data)  # type: ignore[call-overload]
        file.cache.write(offset, content)
        file.written.update(range(offset // PAGE, -(-(offset + len(content)) // PAGE)))
        file.ctime = self.host.now()

    def sync(self) -> None:
        return

    def allocate(self, offset: int, length: int) -> None:
        cache = self.file.cache
        if offset + length > cache.size:
            cache.resize(offset + length)
        self.file.ctime = self.host.now()

    def truncate(self, size: int) -> None:
        file, count = self.file, -(-size // PAGE)
        if size < file.cache.size:
            file.written = {unit for unit in file.written if unit < count}
        file.cache.resize(size)
        file.ctime = self.host.now()

    def has_hole(self, offset: int, length: int) -> bool:
        written = self.file.written
        wanted = range(offset // PAGE, -(-(offset + length) // PAGE))
        return any(unit not in written for unit in wanted)

    def check_present(self) -> None:
        return

    def check_linked(self) -> None:
        return

    def forget_cache(self) -> None:
        return
