"""A diff area of more than one group of 2560 slots: nothing special happens at the seam."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from filefuzz import flip
from powercuts import everything_kept, nothing_kept
from rig import BLOCK, Rig, pattern, read_points, read_replica, write

from vsnapfs import threads
from vsnapfs.diffarea import recovery
from vsnapfs.diffarea.layout import SECTORS_PER_GROUP, SLOTS_PER_GROUP, Layout
from vsnapfs.errors import FaultCode
from vsnapfs.volume import Volume

BLOCKS = 1000
SIZE = BLOCKS * BLOCK + 17
LAYOUT = Layout(BLOCK)


async def _overwrite(volume: Volume, seed: int) -> None:
    for start in range(0, SIZE, 1 << 20):
        length = min(1 << 20, SIZE - start)
        await write(volume, start, pattern(seed << 16 | start >> 20, length))


async def _fill(volume: Volume, points: dict[int, bytes]) -> None:
    """Four points, 4004 copies: from the first group into the second."""
    await _overwrite(volume, 1)
    for seed in range(2, 6):
        point = await volume.create_point()
        points[point.number] = bytes(await read_replica(volume))
        await _overwrite(volume, seed)
    volume.check_invariants()


async def _exact(volume: Volume, points: dict[int, bytes]) -> None:
    volume.check_invariants()
    assert await read_points(volume) == points


def _rig(seed: int = 0) -> tuple[Rig, dict[int, bytes]]:
    rig, points = Rig(size=SIZE, maximum=LAYOUT.size_of(5120), seed=seed), {}
    rig.run(_fill, points)
    return rig, points


class _NoThreads(ThreadPoolExecutor):
    """A machine without the memory for a thread."""

    def submit(self, *_: Any, **__: Any) -> Any:
        raise RuntimeError("can't start new thread")


@pytest.mark.parametrize("pool", [None, ThreadPoolExecutor, _NoThreads])
def test_points_over_the_seam_survive_any_end(
    monkeypatch: pytest.MonkeyPatch, pool: type[ThreadPoolExecutor] | None
) -> None:
    """Copies in both groups are found after a kill and after a power failure, whoever reads."""
    if pool is not None:
        monkeypatch.setattr(threads, "ThreadPoolExecutor", pool)
        monkeypatch.setattr(recovery, "_GROUPS_AT_ONCE", 1)
    rig, points = _rig()

    async def used(volume: Volume) -> int:
        return max(volume.core.need_area().slots.taken_from(0))

    assert rig.run(used) > SLOTS_PER_GROUP + 32
    rig.run(_exact, points)
    rig.killed()
    rig.run(_exact, points)
    for choose in (nothing_kept, everything_kept):
        rig.run(_overwrite, 9)
        rig.crashed(choose)
        rig.run(_exact, points)
    rig.close()
    rig.run(_exact, points)


@pytest.mark.parametrize("slots", [SLOTS_PER_GROUP, SLOTS_PER_GROUP + 32, 2003, 2559])
def test_shrinking_over_the_seam_and_growing_again(slots: int) -> None:
    """Copies move out of the second group; what grows there again is empty, not what was there."""
    rig, points = _rig()

    async def shrink(volume: Volume) -> None:
        for number in (1, 3):
            await volume.delete_point(number)
            del points[number]
        await volume.resize(LAYOUT.size_of(slots))
        assert volume.core.need_area().allocated == LAYOUT.size_of(slots)
        await _exact(volume, points)

    rig.run(shrink)
    rig.killed()
    rig.run(_exact, points)

    async def grow(volume: Volume) -> None:
        await volume.resize(LAYOUT.size_of(5120))
        point = await volume.create_point()
        points[point.number] = bytes(await read_replica(volume))
        await _overwrite(volume, 20)
        await _exact(volume, points)
        report = await volume.verify()
        assert report["ok"], report["problems"][:3]

    rig.run(grow)
    rig.crashed(nothing_kept)
    rig.run(_exact, points)


def test_a_bad_table_that_a_thread_has_read_is_told_by_its_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One copy of a sector of the second group is healed, both bad are fault 3."""
    monkeypatch.setattr(recovery, "_GROUPS_AT_ONCE", 1)
    rig, points = _rig()
    rig.close()
    first, twin = LAYOUT.sector_offsets(SECTORS_PER_GROUP + 3)
    flip(rig, "area", first + 77, 0)

    async def healed(volume: Volume) -> None:
        found = [(where["sector"], where["copy"]) for where in volume.account.rot()]
        assert found == [(SECTORS_PER_GROUP + 3, 0)]
        await _exact(volume, points)

    rig.run(healed)
    rig.close()
    flip(rig, "area", first + 77, 0)
    flip(rig, "area", twin + 99, 0)

    async def lost(volume: Volume) -> None:
        assert volume.core.need_area().damaged_sectors == (SECTORS_PER_GROUP + 3,)
        assert volume.protection.fault is not None
        assert volume.protection.fault.code is FaultCode.META_DATA_CORRUPTION

    rig.run(lost)
