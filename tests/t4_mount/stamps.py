"""A writer that proves which of its writes an image holds.

Several threads write *stamps* through the mount, each to extents of its own: the whole extent is
filled with (thread, extent, how manieth write of the thread). A clock that only counts notes when
each write was issued and when it was acknowledged. From an image alone can then be told how far
each thread had come, and the image is right if and only if

* each extent holds exactly one stamp, untorn, and none that its thread overwrote before the last
  of its writes that the image holds (so nothing in between is missing);
* every write acknowledged before a given tick is there, and none issued after a later tick is;
* no write is missing that was acknowledged before one that is there was issued.
"""

from __future__ import annotations

import itertools
import mmap
import os
import random
import struct
import threading
from dataclasses import dataclass, field
from pathlib import Path

_STAMP = struct.Struct("<8sIIQQ")
_MAGIC = b"a stamp\0"


@dataclass(frozen=True)
class Extent:
    """Where one kind of stamp goes, in bytes."""

    number: int
    offset: int
    length: int


@dataclass
class _Write:
    extent: int
    issued: int
    acknowledged: int | None = None


@dataclass
class _Log:
    """What one thread did, in order, since `baseline`."""

    extents: list[Extent]
    writes: list[_Write] = field(default_factory=list)
    failed: OSError | None = None


def nasty_extents(
    start: int, end: int, rng: random.Random, largest: int, unit: int = 1
) -> list[Extent]:
    """Extents that fill `start` to `end` with lengths and offsets of every kind.

    unit: offsets and lengths are multiples of it (a device's sector), as `start` and `end` are.
    """
    found: list[Extent] = []
    while end - start >= 512:
        kind = rng.choice((512, 4096, 16384, largest, rng.randrange(512, largest)))
        length = min(kind - kind % unit, end - start)
        found.append(Extent(len(found), start, length))
        gap = rng.choice((0, 0, 1, 511, 512))
        start += length + gap - gap % unit
    return found


class Stamper:
    """Writes to `path` until it is stopped or the file fails. `seed` repeats its choices.

    direct: with O_DIRECT, as a loop device needs it to see each write at once. There, unlike on
    one file of FUSE, the writes of several threads really are under way at the same time.
    """

    def __init__(
        self, path: Path, extents: list[Extent], threads: int, seed: int, *, direct: bool = False
    ) -> None:
        self._path = path
        self._flags = os.O_RDWR | (os.O_DIRECT if direct else 0)
        self._seed = seed
        self._clock = itertools.count(1)
        self._round = 0
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []
        shuffled = list(extents)
        random.Random(seed).shuffle(shuffled)
        self._extents = extents
        self._logs = [_Log(shuffled[number::threads]) for number in range(threads)]
        self._baseline: dict[int, bytes] = {}

    # -- writing

    def start(self, image: bytes) -> None:
        """Begin, on a volume that holds `image` now."""
        self._round += 1
        self._stop.clear()
        for extent in self._extents:
            self._baseline[extent.number] = image[extent.offset : extent.offset + extent.length]
        for log in self._logs:
            log.writes.clear()
            log.failed = None
        self._threads = [
            threading.Thread(target=self._write, args=(number,), daemon=True)
            for number in range(len(self._logs))
        ]
        for thread in self._threads:
            thread.start()

    def _write(self, number: int) -> None:
        log = self._logs[number]
        rng = random.Random(f"{self._seed}/{self._round}/{number}")
        try:
            fd = os.open(self._path, self._flags)
        except OSError as error:
            log.failed = error
            return
        # Memory that is aligned, which O_DIRECT asks for.
        memory = mmap.mmap(-1, max(extent.length for extent in log.extents))
        buffer = memoryview(memory)
        try:
            while not self._stop.is_set():
                extent = rng.choice(log.extents)
                data = buffer[: extent.length]
                data[:] = self._stamp(number, extent, len(log.writes) + 1)
                write = _Write(extent.number, next(self._clock))
                log.writes.append(write)
                assert os.pwrite(fd, data, extent.offset) == extent.length
                write.acknowledged = next(self._clock)
        except OSError as error:
            log.failed = error
        finally:
            try:
                os.close(fd)
            except OSError:
                pass  # the server is gone

    def _stamp(self, thread: int, extent: Extent, count: int) -> bytes:
        unit = _STAMP.pack(_MAGIC, thread, extent.number, count, self._round)
        return (unit * (extent.length // len(unit) + 1))[: extent.length]

    def tick(self) -> int:
        """A moment between the writes issued and acknowledged before it and those after it."""
        return next(self._clock)

    def stop(self, seconds: float = 30) -> None:
        """End it; returns when every thread has its last answer."""
        self._stop.set()
        for thread in self._threads:
            thread.join(seconds)
            assert not thread.is_alive(), "a write is never answered"

    @property
    def failures(self) -> list[OSError]:
        """What ended threads before they were told to stop."""
        return [log.failed for log in self._logs if log.failed is not None]

    @property
    def acknowledged(self) -> int:
        """How many writes were acknowledged since the start."""
        return sum(write.acknowledged is not None for log in self._logs for write in log.writes)

    # -- judging

    def check(
        self, image: bytes, holds_before: int, lacks_after: int, *, torn: bool = False
    ) -> int:
        """AssertionError unless `image` is a state of the volume between two ticks.

        torn: a thread's last write, if it was never acknowledged, may be there in part (the
        server was killed in the middle of it). Returns how many writes the image holds.
        """
        held: list[_Write] = []
        missing: list[_Write] = []
        for number, log in enumerate(self._logs):
            count = self._cut(number, log, image, torn=torn)
            held += log.writes[:count]
            missing += log.writes[count:]
        late = [write for write in held if write.issued > lacks_after]
        assert not late, f"{len(late)} writes that were issued after the end are there: {late[:3]}"
        lost = [
            write for write in missing if write.acknowledged and write.acknowledged < holds_before
        ]
        assert not lost, f"{len(lost)} acknowledged writes are missing: {lost[:3]}"
        last_issued = max((write.issued for write in held), default=0)
        out_of_order = [
            write for write in missing if write.acknowledged and write.acknowledged < last_issued
        ]
        assert not out_of_order, f"missing, though later writes are there: {out_of_order[:3]}"
        return len(held)

    def _cut(self, number: int, log: _Log, image: bytes, *, torn: bool) -> int:
        """How many writes of a thread the image holds; AssertionError if it is no such state."""
        found = {
            extent.number: image[extent.offset : extent.offset + extent.length]
            for extent in log.extents
        }
        unsure = None
        if torn:
            # All that was acknowledged, and of the last write perhaps a part.
            cut = sum(write.acknowledged is not None for write in log.writes)
            assert len(log.writes) - cut <= 1
            if cut < len(log.writes):
                unsure = log.writes[cut].extent
        else:
            cut = max((self._count(number, found[e.number]) for e in log.extents), default=0)
        last: dict[int, int] = {}
        for count, write in enumerate(log.writes[:cut], start=1):
            last[write.extent] = count
        for extent in log.extents:
            count, content = last.get(extent.number, 0), found[extent.number]
            wanted = self._stamp(number, extent, count) if count else self._baseline[extent.number]
            if extent.number == unsure:
                new = self._stamp(number, extent, cut + 1)
                assert all(
                    byte in pair for byte, *pair in zip(content, wanted, new, strict=True)
                ), f"{extent} of thread {number} holds neither the old nor the new"
                continue
            assert content == wanted, (
                f"{extent} of thread {number} should hold write {count} of {cut}, "
                f"holds {self._count(number, content)}"
            )
        return cut

    def _count(self, thread: int, content: bytes) -> int:
        """The number of the write that an extent's first stamp names, 0 for none of this round."""
        magic, who, _, count, turn = _STAMP.unpack_from(content)
        return count if magic == _MAGIC and who == thread and turn == self._round else 0
