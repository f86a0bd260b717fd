"""Workloads whose operations may fail, and what must hold all the same.

A `Trial` runs a list of steps with failures injected. Each step either does what it should or is
refused with an OSError or VsnapError; the trial keeps account of what may be there then. `end`
takes the failures away and demands the way back: everything that was promised is there, the volume
can be brought online, and goes on to keep its promises.
"""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import trio
from powercuts import everything_kept, nothing_kept
from rig import BLOCK, Rig, acknowledged, attempt, flush, pattern, raw_replica, read_points, write
from simdisk import FAILING

from vsnapfs.errors import VsnapError
from vsnapfs.volume import Volume

Step = tuple[Any, ...]
POINT_EVENTS = {14, 33, 35}
#: With policy `evict` no failure of the diff area takes the volume offline here.
GOES_ON = {"write", "create", "delete", "resize", "flush", "verify"}


class Trial:
    """One volume, one list of steps, some failures."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.host = rig.host
        self.content = bytearray(raw_replica(rig))
        #: Points that must be there, and those that may be (their command was refused).
        self.points: dict[int, bytes] = {}
        self.maybe: dict[int, bytes] = {}
        self.given_up: set[int] = set()
        #: Contents that an interrupted restore may still bring.
        self.restoring: bytes | None = None
        self.counter = 0
        self.refused: list[tuple[Step, BaseException]] = []
        #: What the replica held at each moment since it was last synced.
        self.history = [bytes(self.content)]
        self.sync_failed = self.write_failed = False

    @property
    def volume(self) -> Volume:
        assert self.rig.volume is not None
        return self.rig.volume

    def _seen(self) -> bytes:
        """The replica, with what has been acknowledged and waits in the write buffer."""
        volume = self.rig.volume
        if volume is None:
            return raw_replica(self.rig)
        if volume.core.area is None and self.host.memory:
            # Nobody knows which ring counts, and nobody needs to: the volume is offline.
            return bytes(self.content)
        return acknowledged(self.rig, volume)

    @property
    def evicts(self) -> bool:
        return self.rig.config.on_full == "evict"

    @property
    def _only_the_area_fails(self) -> bool:
        return all(failure.name == "area" for failure in self.host.failures)

    def run(self, steps: list[Step]) -> None:
        """Run the steps. Anything but an OSError or VsnapError comes out."""
        for step in steps:
            name, *arguments = step
            work: Callable[..., Awaitable[Any]] = getattr(self, f"_{name}")
            if name == "reopen":
                self._close()
                continue
            if self.rig.volume is None and not self._open():
                continue
            online = self.volume.protection.is_online
            error = self.rig.run(self._attempt, work, *arguments)
            if online and self.evicts and name in GOES_ON and self._only_the_area_fails:
                assert self.volume.protection.is_online, f"evict, and offline after all: {step}"
            if error is not None:
                self.refused.append((step, error))
            if error is not None or name not in ("write", "create", "flush"):
                self.rig.run(self._look)
        if self.rig.volume is not None:
            self.rig.run(self._look)

    async def _attempt(
        self, _volume: Volume, work: Callable[..., Awaitable[Any]], *arguments: Any
    ) -> BaseException | None:
        return await attempt(work(*arguments))

    async def _nothing(self, _volume: Volume) -> None:
        return None

    def _open(self) -> bool:
        try:
            self.rig.run(self._nothing)
        except (OSError, VsnapError) as error:
            self.rig.volume = None
            self.refused.append((("open",), error))
            return False
        self.rig.run(self._look)  # What a failed sync lost shows now.
        return True

    def _close(self) -> None:
        if self.rig.volume is not None:
            self.rig.close()

    # -- steps ----------------------------------------------------------------------------------

    async def _write(self, offset: int, length: int) -> None:
        self.counter += 1
        data = pattern(self.counter, length)
        before = bytes(self.content)
        torn = self._fired("replica", "write")
        error = await attempt(write(self.volume, offset, data))
        if error is None:
            self.content[offset : offset + length] = data
        elif self._fired("replica", "write") > torn:
            actual = self._seen()
            self.content[offset : offset + length] = actual[offset : offset + length]
        assert self._seen() == self.content, f"W1: {error}"
        self.history.append(bytes(self.content))
        if error is not None:
            assert self._fired("replica", "write") > torn or bytes(self.content) == before
            raise error

    def _accept(self, actual: bytes) -> None:
        """A power failure, or a failed sync, has lost some of what was written since the last."""
        self.history.append(bytes(self.content))
        # A write that failed may end in the midst of a sector, and an opening has synced that.
        unit = 1 if self.write_failed or self._fired("replica", "write") else 512
        for at in range(0, len(actual), unit):
            part = slice(at, at + unit)
            assert any(actual[part] == known[part] for known in self.history), f"byte {at}"
        self.content = bytearray(actual)

    def _synced(self) -> None:
        self.history = [bytes(self.content)]

    def _fired(self, name: str, operation: str) -> int:
        return sum(
            failure.fired
            for failure in self.host.failures
            if failure.name in (None, name) and failure.operation in (None, operation)
        )

    async def _create(self) -> None:
        area = self.volume.core.area
        if area is not None:
            given_up = self.volume.protection.saved.given_up
            self.maybe[max(area.superblock.epoch, given_up) + 1] = bytes(self.content)
        point = await self.volume.create_point()
        self.points[point.number] = self.maybe.pop(point.number)
        self._synced()

    async def _delete(self, number: int) -> None:
        if number in self.points:
            self.maybe[number] = self.points.pop(number)
        error = await attempt(self.volume.delete_point(number))
        if error is None:
            self.maybe.pop(number, None)
            return
        # Refused: in this session it must still be there.
        if number in [point.number for point in self.volume.points]:
            await self._look(self.volume)
        raise error

    async def _restore(self, number: int) -> None:
        target = {**self.maybe, **self.points}.get(number)
        error = await attempt(self.volume.restore(number))
        if error is None:
            assert target is not None
            self.content, self.restoring = bytearray(target), None
            self._synced()
            return
        refused = getattr(error, "code", "") in ("offline", "restoring", "no-room")
        if target is not None and not refused:
            # Nothing has changed, or it was interrupted: then the next start goes on.
            self.restoring = target
            self._mixture(self._seen())
        raise error

    def _mixture(self, actual: bytes) -> None:
        """A restore that was interrupted: every sector is an old one or the restored one."""
        assert self.restoring is not None
        self.history.append(self.restoring)
        self._accept(actual)

    async def _resize(self, total: int) -> None:
        await self.volume.resize(total)

    async def _flush(self) -> None:
        await flush(self.volume)
        self._synced()

    async def _offline(self) -> None:
        await self.volume.go_offline()

    async def _online(self) -> None:
        await self.volume.online()

    async def _verify(self) -> None:
        await self.volume.verify()

    async def _reopen(self) -> None: ...

    # -- what must hold ---------------------------------------------------------------------------

    async def _look(self, volume: Volume) -> None:
        """After each step: nothing lost, nothing changed, refusals are what they should be."""
        volume.check_invariants()
        protection = volume.protection
        live = {point.number for point in volume.points}
        known = {**self.maybe, **self.points}
        if volume.core.area is not None and not volume.core.area_is_stale:
            gone = set(self.points) - live
            if gone:
                assert self.evicts, f"points {gone} are lost"
                assert POINT_EVENTS & set(self.rig.log.ids()), "points lost without a word"
                for number in gone:
                    del self.points[number]
                self.given_up |= gone
        assert not live & self.given_up, "points given up are back"
        for number in sorted(live):
            error = await attempt(self._compare(volume, number, known[number]))
            # A read that fails is a read that was made to fail.
            assert error is None or (error.errno == errno.EIO and self.host.failures), error
        if not protection.is_online:
            error = await attempt(write(volume, 0, b"x"))
            assert error is not None
            assert error.errno == errno.ENODEV
            if protection.fault is not None:
                self._check_events(int(protection.fault.code))
        actual = self._seen()
        if self.restoring is not None:
            self._accept(actual)  # A mixture; `online` goes on with it.
        elif actual != self.content:
            assert self._fired("replica", "sync"), "the replica has changed"
            self._accept(actual)

    async def _compare(self, volume: Volume, number: int, content: bytes) -> None:
        handle = volume.open_point(number)
        try:
            assert bytes(await handle.read(0, volume.size)) == content, f"point {number} differs"
        finally:
            handle.close()

    def _check_events(self, code: int) -> None:
        """The fault's event is there, with the sizes; not once for each refused write."""
        found = [p for s, n, p in self.rig.log.events if (s, n) == ("volsnap", 79 + code)]
        assert found, f"fault {code} without its event"
        if self.volume.core.area is not None:
            last = found[-1]
            if last["used"] is None:
                # Found at an opening that could not read the area.
                assert code in (1, 2, 3, 4, 12)
                return
            assert last["used"] <= last["allocated"] <= last["maximum"]
            assert last["diff_area"] == "/sim/area"

    # -- the way back -----------------------------------------------------------------------------

    def end(self, how: str) -> None:
        """No more failures: `how` the process ends ("stay", "close", "kill", "power"), and then
        everything works again.
        """
        self.sync_failed = self._fired("replica", "sync") > 0
        self.write_failed = self._fired("replica", "write") > 0
        failed_state = any(
            failure.fired and failure.name in (None, "state") for failure in self.host.failures
        )
        fault = None
        if self.rig.volume is not None and self.volume.protection.fault is not None:
            fault = int(self.volume.protection.fault.code)
        self.host.failures.clear()
        if how == "close":
            self._close()
        elif how == "kill":
            self.rig.killed()
        elif how.startswith("power"):
            self.rig.crashed(everything_kept if how == "power+" else nothing_kept)
        self.host = self.rig.host
        if how != "stay" and fault not in (None, 1) and not failed_state:
            again = self.rig.run(_fault_of)
            assert again == fault, f"P1: fault {fault} before, {again} after"
        self.rig.run(self._back, how)
        self.rig.close()
        self.rig.run(self._look)

    async def _open_again(self, volume: Volume) -> None:
        await volume.close()
        volume = self.rig.volume = await self.rig.open()
        async with _running(volume):
            await self._back(volume, "again")

    async def _back(self, volume: Volume, how: str) -> None:
        if volume.core.area is None:
            # It could not be opened; now it can.
            await self._open_again(volume)
            return
        # A restore that was interrupted has been finished when the volume was opened.
        actual = self._seen()
        if actual not in (self.content, self.restoring):
            assert how.startswith("power") or self.sync_failed, "the replica has changed"
            self._accept(actual)
        self.content = bytearray(actual)
        if not volume.protection.is_online:
            if volume.core.area_is_stale:
                return
            error = await attempt(volume.online())
            if error is not None and how == "stay" and volume.core.need_area().damaged_sectors:
                # What could not be read at the opening can be read now: it must be opened anew.
                await self._open_again(volume)
                return
            assert error is None, error
        assert not volume.core.need_area().superblock.restoring
        actual = self._seen()
        if actual not in (self.content, self.restoring):
            assert self.sync_failed, "the replica has changed"
            self._accept(actual)
        self.content, self.restoring = bytearray(actual), None
        await self._look(volume)
        self.points = await read_points(volume)
        self.maybe = {}
        for block in range(volume.core.block_count):
            length = min(BLOCK, volume.size - block * BLOCK)
            error = await attempt(write(volume, block * BLOCK, pattern(0xBAC, length)))
            if error is None:
                at = block * BLOCK
                self.content[at : at + length] = pattern(0xBAC, length)
            else:
                assert volume.protection.would_fit() is not None, error
                break
        await self._look(volume)


async def _fault_of(volume: Volume) -> int | None:
    return int(volume.protection.fault.code) if volume.protection.fault else None


@asynccontextmanager
async def _running(volume: Volume) -> AsyncIterator[None]:
    async with trio.open_nursery() as nursery:
        await nursery.start(volume.run)
        yield
        nursery.cancel_scope.cancel()


def count_operations(make: Callable[[], Rig], steps: list[Step]) -> dict[str, int]:
    """How many operations the steps cost, by file."""
    trial = Trial(make())
    before = dict(trial.host.counts)
    trial.run(steps)
    assert trial.refused == []
    counts: dict[str, int] = {}
    for (name, operation), count in trial.host.counts.items():
        if operation not in FAILING:
            continue
        counts[name] = counts.get(name, 0) + count - before.get((name, operation), 0)
    return counts
