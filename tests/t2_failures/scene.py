"""A small volume with two recovery points, ready for something to go wrong."""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable
from typing import Any

from rig import BLOCK, Rig, attempt, flush, pattern, raw_replica, read_points, read_replica, write

from vsnapfs.errors import VsnapError
from vsnapfs.volume import Volume

BLOCKS = 12
SIZE = BLOCKS * BLOCK + 1000


class Scene:
    """Blocks 0 to 3 were overwritten after point 2, blocks 4 and 5 between the points."""

    def __init__(self, **options: Any) -> None:
        self.rig = Rig(size=SIZE, **options)
        self.points: dict[int, bytes] = {}
        self.rig.run(self._set_up)
        self.rig.log.events.clear()

    async def _set_up(self, volume: Volume) -> None:
        await write(volume, 0, pattern(1, SIZE))
        await self.create(volume)
        await write(volume, 4 * BLOCK, pattern(2, 2 * BLOCK))
        await self.create(volume)
        await write(volume, 0, pattern(3, 4 * BLOCK))
        await flush(volume)

    async def create(self, volume: Volume) -> None:
        content = bytes(await read_replica(volume))
        point = await volume.create_point()
        self.points[point.number] = content

    async def fill(self, volume: Volume, leave: int) -> None:
        """New points and overwrites until so many slots are free; then one more point."""
        slots = volume.core.need_area().slots
        while slots.free > leave:
            await self.create(volume)
            count = min(BLOCKS, slots.free - leave)
            await write(volume, 0, pattern(len(self.points), count * BLOCK))
        await self.create(volume)

    # -- acting -----------------------------------------------------------------------------------

    def run(self, work: Callable[..., Awaitable[Any]], *args: Any) -> Any:
        return self.rig.run(work, *args)

    def write(self, offset: int, length: int, seed: int = 9) -> OSError | VsnapError | None:
        """One write; the error it is refused with."""

        async def one(volume: Volume) -> OSError | VsnapError | None:
            return await attempt(write(volume, offset, pattern(seed, length)))

        return self.rig.run(one)

    def flush(self) -> OSError | VsnapError | None:
        async def one(volume: Volume) -> OSError | VsnapError | None:
            return await attempt(flush(volume))

        return self.rig.run(one)

    def online(self) -> OSError | VsnapError | None:
        async def one(volume: Volume) -> OSError | VsnapError | None:
            return await attempt(volume.online())

        return self.rig.run(one)

    def replica(self) -> bytes:
        return raw_replica(self.rig)

    # -- looking ----------------------------------------------------------------------------------

    @property
    def fault(self) -> int | None:
        """The number of the fault the volume is offline by."""

        async def look(volume: Volume) -> int | None:
            fault = volume.protection.fault
            assert volume.protection.is_online == (fault is None)
            return int(fault.code) if fault else None

        return self.rig.run(look)

    def ids(self, source: str = "volsnap") -> list[int]:
        return self.rig.log.ids(source)

    def exact(self, only: set[int] | None = None) -> None:
        """All points (or only these are left) read back bit by bit; the engine is consistent."""

        async def look(volume: Volume) -> None:
            volume.check_invariants()
            wanted = {n: c for n, c in self.points.items() if only is None or n in only}
            found = await read_points(volume)
            assert sorted(found) == sorted(wanted)
            assert found == wanted, "a recovery point has changed"

        self.rig.run(look)

    def tripped(self, fault: int, offset: int, length: int, **options: Any) -> dict[str, Any]:
        """A write trips `fault`: ENODEV, no byte moved, one event with all sizes, all else refused,
        points exact, offline in a new process as well. Returns the event's params.
        """
        before = self.replica()
        error = self.write(offset, length)
        assert error is not None
        assert error.errno == errno.ENODEV
        assert self.replica() == before, "W1"
        self.is_down(fault, **options)
        params = self.rig.log.params(79 + fault)
        assert params["offset"] == offset
        assert params["length"] == length
        return params

    def is_down(self, fault: int, *, hooks: bool = True) -> None:
        """Offline by this fault, logged once, now and in the next process."""
        assert self.fault == fault
        assert self.flush() is not None
        for _ in range(3):
            error = self.write(0, 10)
            assert error is not None
            assert error.errno == errno.ENODEV
        assert self.ids().count(79 + fault) == 1, self.rig.log.events
        params = self.rig.log.params(79 + fault)
        assert params["used"] <= params["allocated"] <= params["maximum"]
        assert params["errno"]
        assert params["diff_area"] == "/sim/area"
        self.exact()
        if hooks:
            self.rig.killed()
            self.rig.log.events.clear()
            again = self.fault
            assert again == fault, "P1"
            assert self.ids() == []  # It has been told already.
            self.exact()
            self.rig.log.events.append(("volsnap", 79 + fault, params))

    def finds_an_old_area(self, old: tuple[Any, Any]) -> None:
        """With `old` (cache, disk) in its place it is fault 15; with the right one all is there."""
        area = self.rig.host.files["area"]
        right = area.cache, area.disk
        area.cache, area.disk = old
        assert self.fault == 15
        self.rig.close()
        area.cache, area.disk = right
        assert self.online() is None
        self.exact()

    def works(self) -> None:
        """Online again: everything can be overwritten, and no point minds."""
        assert self.online() is None
        assert self.fault is None
        assert self.write(0, SIZE, seed=77) is None
        assert self.replica() == pattern(77, SIZE)
        self.exact()
        self.rig.close()
        self.exact()
