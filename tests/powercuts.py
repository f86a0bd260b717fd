"""Ways in which a power failure can go, and a search through all of them.

Owns two things. The choosers say what becomes of the unsynced writes (`simdisk.Snapshot`). A
`Story` runs a short workload, knows at each instant what must be there and what may be there, and
remembers every state that the disk goes through; `Story.explore` then lets the power fail in each
of them, with each subset of the unsynced writes (up to six; beyond that a choice of subsets), one
of them torn, and checks what the engine makes of it.
"""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rig import BLOCK, Rig, attempt, flush, pattern, raw_replica, read_points, write
from simdisk import Change, Host, Snapshot
from unsynced import SECTOR, Sectors, made_durable, overwritten, sectors_of

from vsnapfs.errors import VsnapError
from vsnapfs.volume import Volume

Choose = Callable[[str, int, Change], object]
Key = tuple[str, int]


def nothing_kept(_name: str, _number: int, _change: Change) -> object:
    """Every unsynced write is lost."""
    return False


def everything_kept(_name: str, _number: int, _change: Change) -> object:
    """Every unsynced write made it."""
    return True


def subset(kept: Sequence[Key], torn: dict[Key, object] | None = None) -> Choose:
    """Keep the chosen writes (file, number in its journal); `torn` says how others are torn."""
    chosen = frozenset(kept)
    tears = torn or {}

    def choose(name: str, number: int, _change: Change) -> object:
        key = name, number
        return tears.get(key, key in chosen)

    return choose


def by_dice(decide: Callable[[Sequence[str]], str]) -> Choose:
    """Decide about each write with `decide(options)`, e.g. a random generator's choice."""

    def choose(_name: str, _number: int, change: Change) -> object:
        options = ["lost", "kept"]
        if change.data is not None and len(change.cuts()) > 2:
            options += ["head", "tail", "mixed"]
        what = decide(options)
        if what == "head":
            return lambda sector, count: sector < count // 2
        if what == "tail":
            return lambda sector, count: sector >= count // 2
        if what == "mixed":
            return lambda _sector, _count: decide(["lost", "kept"]) == "kept"
        return what == "kept"

    return choose


TEARS: tuple[Callable[[int, int], bool], ...] = (
    lambda sector, _count: sector == 0,
    lambda sector, count: sector < count // 2,
    lambda sector, count: sector >= count // 2,
    lambda sector, count: sector != count // 2,
)
#: How many subsets of the unsynced writes are tried when there are more than six.
MANY = int(os.environ.get("VSNAPFS_EXAMPLES", "100")) // 2


class Violation(AssertionError):
    """A power failure that breaks a promise."""


@dataclass(frozen=True)
class Expected:
    """What a power failure may leave. Contents by number of the point.

    must, may: points that are there, and that may be there; sectors: what each sector of the
    replica may hold; restored: the content that a restore under way may bring instead.
    offline: None when it may be both.
    """

    must: dict[int, bytes] = field(default_factory=dict)
    may: dict[int, bytes] = field(default_factory=dict)
    sectors: Sectors = ()
    restored: bytes | None = None
    offline: bool | None = False


class Story:
    """A workload that keeps account. Its operations are those of `Volume`."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.content = bytearray(rig.host.files["replica"].cache.size)
        self.expected = Expected(sectors=sectors_of(bytes(self.content)))
        self.states: list[tuple[Snapshot, Expected, Key | None]] = []
        self.volume: Volume
        self.counter = 0
        self.tried = 0

    # -- telling it -----------------------------------------------------------------------------

    def run(self, work: Callable[[Story], Any]) -> Story:
        """Run the workload, recording every state of the disk."""

        async def main(volume: Volume) -> None:
            self.volume = volume
            self.rig.host.observer = self._record
            self._record(None)
            await work(self)

        self.rig.run(main)
        self.rig.host.observer = None
        return self

    def _record(self, last: Key | None) -> None:
        self.states.append((self.rig.host.snapshot(), self.expected, last))

    def _now(self, **changes: Any) -> None:
        # What is expected changes while the disk does not: all its states count once more.
        self.expected = replace(self.expected, **changes)
        self._record(None)

    async def write(self, offset: int, length: int, *, durably: bool = False) -> None:
        self.counter += 1
        data = pattern(self.counter, length)
        evicts = self.rig.config.on_full == "evict"
        held = {} if evicts else self.expected.must
        self._now(
            sectors=overwritten(self.expected.sectors, offset, data),
            must=held,
            may={**self.expected.may, **self.expected.must} if evicts else self.expected.may,
            offline=None
            if self.expected.offline is False and not evicts
            else self.expected.offline,
        )
        error = await attempt(write(self.volume, offset, data, durably=durably))
        if error is None:
            self.content[offset : offset + length] = data
            if durably:
                self._now(sectors=made_durable(self.expected.sectors, offset, data))
        live = {point.number for point in self.volume.points}
        known_points = {**self.expected.may, **self.expected.must}
        self._now(
            must={n: c for n, c in known_points.items() if n in live},
            may={},
            offline=not self.volume.protection.is_online,
        )

    async def write_block(self, block: int, count: int = 1) -> None:
        await self.write(block * BLOCK, min(count * BLOCK, len(self.content) - block * BLOCK))

    async def flush(self) -> None:
        await flush(self.volume)
        self._now(sectors=sectors_of(bytes(self.content)))

    async def create(self) -> None:
        number = self.volume.core.need_area().superblock.epoch + 1
        self._now(may={number: bytes(self.content)})
        point = await self.volume.create_point()
        assert point.number == number
        self._now(
            may={},
            must={**self.expected.must, number: bytes(self.content)},
            sectors=sectors_of(bytes(self.content)),
        )

    async def delete(self, number: int) -> None:
        must = dict(self.expected.must)
        content = must.pop(number)
        self._now(must=must, may={number: content})
        await self.volume.delete_point(number)
        self._now(may={})

    async def restore(self, number: int) -> None:
        content = self.expected.must[number]
        self._now(restored=content)
        await self.volume.restore(number)
        self.content = bytearray(content)
        self._now(restored=None, sectors=sectors_of(bytes(self.content)))

    async def resize(self, total: int) -> None:
        await self.volume.resize(total)

    async def offline(self) -> None:
        self._now(offline=None)
        await self.volume.go_offline()
        self._now(offline=True)

    async def online(self) -> None:
        self._now(offline=None)
        await self.volume.online()
        self._now(offline=False)

    # -- letting the power fail -------------------------------------------------------------------

    def explore(self, again_every: int = 0) -> int:
        """Check every state; returns how many. again_every: from each n-th one the power fails
        again, in the middle of the recovery. Violation tells the first that is wrong.
        """
        for at, (snapshot, expected, last) in enumerate(self.states):
            for choose, words in cuts(snapshot, last):
                self.tried += 1
                try:
                    self._check(snapshot.power_failure(choose), expected)
                    if again_every and self.tried % again_every == 0:
                        self._fail_again(snapshot.power_failure(choose), expected)
                except (AssertionError, OSError, VsnapError) as error:
                    raise Violation(f"state {at}, {words}: {error}") from error
        return self.tried

    def _check(self, host: Host, expected: Expected) -> None:
        rig = self.rig.on(host)
        points: dict[int, bytes] = {}
        rig.run(_look, rig, expected, points)
        if self.tried % 8 == 0:
            rig.close()
            rig.run(_still, rig, points)

    def _fail_again(self, host: Host, expected: Expected) -> None:
        rig = self.rig.on(host)
        before = raw_replica(rig)
        states: list[tuple[Snapshot, Key | None]] = []
        rig.host.observer = lambda last: states.append((rig.host.snapshot(), last))

        async def nothing(_volume: Volume) -> None:
            return None

        rig.run(nothing)
        for snapshot, last in states:
            for choose, _ in cuts(snapshot, last):
                self.tried += 1
                third = self.rig.on(snapshot.power_failure(choose))
                assert expected.restored is not None or raw_replica(third) == before
                third.run(_look, third, expected, {})


async def _look(volume: Volume, rig: Rig, expected: Expected, points: dict[int, bytes]) -> None:
    """Everything is there that must be, nothing is that must not be, and it stays like that when
    everything is overwritten.
    """
    volume.check_invariants()
    points.update(await read_points(volume))
    for number, content in expected.must.items():
        assert number in points, f"point {number} is lost"
        assert points[number] == content, f"point {number} has changed"
    for number in set(points) - set(expected.must):
        assert number in expected.may, f"point {number} should not be there"
        assert points[number] == expected.may[number], f"point {number} is not what it was"
    if expected.offline is not None:
        assert volume.protection.is_online == (not expected.offline), volume.protection.fault
    actual = raw_replica(rig)
    if actual != expected.restored:
        for number, allowed in enumerate(expected.sectors):
            start = number * SECTOR
            assert actual[start : start + SECTOR] in allowed, f"sector {number}"
    if not volume.protection.is_online:
        await volume.online()
    for block in range(volume.core.block_count):
        length = min(BLOCK, volume.size - block * BLOCK)
        if await attempt(write(volume, block * BLOCK, pattern(0xFFFF, length))) is not None:
            break
    await _still(volume, rig, points)


async def _still(volume: Volume, rig: Rig, points: dict[int, bytes]) -> None:
    volume.check_invariants()
    found = await read_points(volume)
    assert rig.config.on_full == "evict" or sorted(found) == sorted(points)
    for number, content in found.items():
        assert content == points[number], f"point {number} has changed after the recovery"


def cuts(snapshot: Snapshot, last: Key | None) -> Iterator[tuple[Choose, str]]:
    """The choices to try: (chooser, in words).

    last: the change that was made just now; without it everything has been tried before. None:
    try all.
    """
    changes = {(name, number): change for name, number, change in snapshot.pending()}
    for kept in _subsets(list(changes)):
        if last is not None and last not in kept:
            continue
        yield subset(kept), f"kept {kept} of {list(changes)}"
        large = [key for key in kept if len(changes[key].data or b"") > 512]
        if len(large) > 1:
            ways = itertools.cycle(TEARS[:3])
            yield subset(kept, dict(zip(large, ways, strict=False))), f"all torn: {kept}"
        for number, key in enumerate(large):
            rest = [other for other in kept if other != key]
            for how in TEARS if key == last else TEARS[number % len(TEARS) :][:1]:
                yield subset(rest, {key: how}), f"kept {rest}, torn {key}, of {list(changes)}"


def _subsets(keys: list[Key]) -> Iterator[tuple[Key, ...]]:
    if len(keys) <= 6:
        for count in range(len(keys) + 1):
            yield from itertools.combinations(keys, count)
        return
    dice = random.Random(len(keys))
    yield ()
    yield tuple(keys)
    for key in keys:
        yield (key,)
        yield tuple(other for other in keys if other != key)
    for _ in range(MANY):
        yield tuple(key for key in keys if dice.random() < 0.5)
