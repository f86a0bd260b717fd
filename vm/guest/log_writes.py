"""In the guest of vm/log-writes: every state that a disk went through at a flush is a good volume.

dm-log-writes lies under an ext4 that holds replica, diff area and all else of a volume, and logs
each write in the order in which the disk got it, with the flushes. A workload runs on the volume
and marks in that log what it was promised, and when. Then the log is replayed onto a second disk,
and at each flush (and FUA write) the volume there is opened as after a power failure: the points
that must be there are, exactly; each block of the replica is no older than its newest flushed
write; `verify` finds nothing. What it checks is thrown away again (dm-snapshot).
"""

from __future__ import annotations

import json
import os
import random
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio
from engine import BLOCK, Wrong, blocks, opened, read_point, read_replica, sectors, sh

from vsnapfs.volume.create import create_volume

LOGGED, LOG, REPLAY = "/dev/vm/data", "/dev/vm/log", "/dev/vm/replay"
PLACE = Path("/data")
SIZE = 2 << 20
AREAS = (3 << 20, 5 << 20)
SECTOR = 512
FLUSH, FUA, DISCARD, MARK = 1, 2, 4, 8
_SUPER = struct.Struct("<QQQI")
_ENTRY = struct.Struct("<QQQQ")
MAGIC = 0x6A736677736872


@dataclass
class Expected:
    """What a power failure must leave from a mark on."""

    points: dict[int, list[bytes | None]] = field(default_factory=dict)
    # A point that is being deleted (may be there) or created (exact if it is there).
    deleting: set[int] = field(default_factory=set)
    creating: list[bytes | None] | None = None
    # Of each block the contents it may have: the flushed one and those written since.
    may: list[list[bytes | None]] = field(default_factory=list)

    def copy(self) -> Expected:
        """As it is now."""
        lists = [list(contents) for contents in self.may]
        return Expected(dict(self.points), set(self.deleting), self.creating, lists)


class Marks:
    """Marks in the log, and what was expected at each."""

    def __init__(self) -> None:
        self.expected: list[Expected] = []

    def set(self, now: Expected) -> None:
        """From here on the log's states must be as `now`; both what was and what comes may be."""
        sh("dmsetup", "message", "logged", "0", f"mark m{len(self.expected)}")
        self.expected.append(now.copy())


async def work(seed: int, steps: int, marks: Marks) -> None:
    """A workload on one volume, with a mark before and after each promise."""
    rng = random.Random(seed)  # noqa: S311 - nothing secret
    async with opened(PLACE / "vol") as volume:
        now = Expected(may=[[content] for content in blocks(await read_replica(volume))])
        handle = volume.open_replica()
        marks.set(now)
        for step in range(steps):
            kind = rng.choices(
                ("write", "flush", "create", "delete", "resize"), (50, 20, 15, 10, 5)
            )[0]
            if kind == "write":
                first, count = rng.randrange(len(now.may) - 4), rng.randint(1, 4)
                data = struct.pack("<QQ", seed, step) * (count * BLOCK // 16)
                for number, content in enumerate(blocks(data), start=first):
                    now.may[number].append(content)
                marks.set(now)
                await handle.write(first * BLOCK, data)
            elif kind == "flush":
                await handle.flush()
                now.may = [contents[-1:] for contents in now.may]
                marks.set(now)
            elif kind == "create" and len(now.points) < 6:
                now.creating = [contents[-1] for contents in now.may]
                marks.set(now)
                point = await volume.create_point()
                now.points[point.number], now.creating = now.creating, None
                # A point flushes what was written before it.
                now.may = [contents[-1:] for contents in now.may]
                marks.set(now)
            elif kind == "delete" and now.points:
                number = rng.choice(sorted(now.points))
                now.deleting.add(number)
                marks.set(now)
                await volume.delete_point(number)
                del now.points[number]
                now.deleting.clear()
                marks.set(now)
            elif kind == "resize":
                least = volume.status()["diff_area"]["minimum"]
                await volume.resize(max(least, rng.choice(AREAS)))
        handle.close()


# --- the log -----------------------------------------------------------------------------------


def entries() -> Iterator[tuple[int, int, int, int]]:
    """Yield (sector, sectors, flags, offset of the data or the mark in the log) of each entry."""
    with open(LOG, "rb") as log:
        magic, version, count, sector_size = _SUPER.unpack(log.read(_SUPER.size))
        if (magic, version, sector_size) != (MAGIC, 1, SECTOR):
            raise Wrong(f"not a log of dm-log-writes: {magic:x}, {version}, {sector_size}")
        at = SECTOR
        for _ in range(count):
            log.seek(at)
            sector, length, flags, _ = _ENTRY.unpack(log.read(_ENTRY.size))
            data = at + (_ENTRY.size if flags & MARK else SECTOR)
            yield sector, length, flags, data
            at += SECTOR + (0 if flags & (DISCARD | MARK) else length * SECTOR)


def mark_at(log: int, offset: int) -> int | None:
    """The number of one of our marks."""
    text = os.pread(log, 32, offset).split(b"\0")[0]
    return int(text[1:]) if text[:1] == b"m" and text[1:].isdigit() else None


def replay(marks: Marks, stride: int) -> dict[str, Any]:
    """Rebuild the disk write by write and judge it at every `stride`th flush."""
    found = {"entries": 0, "flushes": 0, "checked": 0, "points": 0}
    mark = -1
    log = os.open(LOG, os.O_RDONLY)
    target = os.open(REPLAY, os.O_RDWR)
    last = None
    for sector, length, flags, data in entries():
        found["entries"] += 1
        if flags & MARK:
            number = mark_at(log, data)
            mark = mark if number is None else number
            continue
        if flags & DISCARD:
            raise Wrong("a discard, which this replay does not know")
        if length:
            os.pwrite(target, os.pread(log, length * SECTOR, data), sector * SECTOR)
        if mark >= 0 and flags & (FLUSH | FUA):
            found["flushes"] += 1
            last = mark
            if found["flushes"] % stride == 0:
                os.fsync(target)
                found["points"] += judge(marks.expected[mark], mark, found["entries"])
                found["checked"] += 1
                last = None
    if last is not None:
        os.fsync(target)
        found["points"] += judge(marks.expected[last], last, found["entries"])
        found["checked"] += 1
    return found


def judge(expected: Expected, mark: int, entry: int) -> int:
    """Open what is on the replayed disk; returns how many points were compared."""
    size = sectors(REPLAY)
    table = f"0 {size} snapshot {REPLAY} /dev/ram0 N 8"
    sh("dmsetup", "create", "judged", "--table", table)
    try:
        sh("mount", "-t", "ext4", "/dev/mapper/judged", PLACE)
        try:
            return trio.run(_judge, expected)
        except Exception as error:
            keep = PLACE / "vol"
            listing = sh("ls", "-la", keep) if keep.exists() else "no volume"
            raise Wrong(
                f"at entry {entry} (mark {mark}): {type(error).__name__}: {error}\n{listing}"
            ) from error
        finally:
            sh("umount", PLACE)
    finally:
        sh("dmsetup", "remove", "judged")


async def _judge(expected: Expected) -> int:
    # The device has another number than the one it was written on: that is no neighbour's write.
    async with opened(PLACE / "vol", accept_changed_replica=True) as volume:
        there = {point.number for point in volume.points}
        if missing := set(expected.points) - there - expected.deleting:
            raise Wrong(f"points are lost: {sorted(missing)}")
        extra = there - set(expected.points)
        if len(extra) > (expected.creating is not None):
            raise Wrong(f"points are there that should not be: {sorted(extra)}")
        for number in sorted(there):
            wanted = expected.points.get(number, expected.creating)
            assert wanted is not None
            pairs = zip(await read_point(volume, number), wanted, strict=True)
            if bad := [at for at, (one, other) in enumerate(pairs) if one != other]:
                raise Wrong(f"point {number} differs in blocks {bad}")
        for at, content in enumerate(blocks(await read_replica(volume))):
            if not possible(content, expected.may[at]):
                raise Wrong(f"block {at} of the replica is none that it may be")
        verified = await volume.verify()
        if not verified["ok"]:
            raise Wrong(f"verify: {verified['problems']}")
    return len(there)


def possible(content: bytes | None, may: list[bytes | None]) -> bool:
    """Whether each sector of a block is from one of its possible contents: unflushed ones tear."""
    if content in may:
        return True
    assert content is not None
    return all(
        any(one is not None and content[at : at + SECTOR] == one[at : at + SECTOR] for one in may)
        for at in range(0, BLOCK, SECTOR)
    )


def main() -> int:
    """Log, work, replay; prints one line."""
    seed, steps, stride = map(int, sys.argv[1:4])
    sh("modprobe", "-a", "dm_log_writes", "dm_snapshot")
    sh("modprobe", "brd", "rd_nr=1", f"rd_size={64 << 10}")
    size = sectors(LOGGED)
    sh("dmsetup", "create", "logged", "--table", f"0 {size} log-writes {LOGGED} {LOG}")
    options = "nodiscard,lazy_itable_init=0,lazy_journal_init=0"
    sh("mkfs.ext4", "-q", "-E", options, "/dev/mapper/logged")
    sh("mount", "-t", "ext4", "/dev/mapper/logged", PLACE)
    create_volume(
        PLACE / "vol",
        size=SIZE,
        diff_area_size=AREAS[0],
        replica=None,
        diff_area=None,
        from_image=None,
    )
    sh("sync")
    marks = Marks()
    trio.run(work, seed, steps, marks)
    sh("umount", PLACE)
    sh("dmsetup", "message", "logged", "0", "mark end")
    sh("dmsetup", "remove", "logged")
    print(f"worked: {len(marks.expected)} marks", flush=True)
    found = replay(marks, stride)
    print(json.dumps(found), flush=True)
    return 0


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except (Wrong, subprocess.TimeoutExpired) as wrong:
        print(f"WRONG: {wrong}", flush=True)
        raise SystemExit(1) from None
