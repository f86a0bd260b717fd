"""Short reads of points that the host's cache can answer take no thread, and check as much."""

from __future__ import annotations

import errno
from collections.abc import Iterator

import pytest
from rig import BLOCK, Rig, pattern, small_steps, write

from vsnapfs.volume import Volume

SIZE = 5 * BLOCK + 700
OLD = pattern(1, SIZE)


@pytest.fixture
def rig() -> Iterator[Rig]:
    """Point 1 has copies of blocks 0, 1 and the short last one."""
    with small_steps():
        rig = Rig(size=SIZE)
        rig.host.cached = True
        rig.run(_begin)
        yield rig


async def _begin(volume: Volume) -> None:
    await write(volume, 0, OLD)
    await volume.create_point()
    await write(volume, 0, pattern(2, 2 * BLOCK))
    await write(volume, SIZE - 5, b"12345")


async def read(volume: Volume, offset: int, length: int) -> bytes:
    handle = volume.open_point(1)
    try:
        return bytes(await handle.read(offset, length))
    finally:
        handle.close()


RANGES = [(0, 1), (100, 600), (BLOCK - 1, 1), (BLOCK, BLOCK), (3 * BLOCK + 7, 512), (SIZE - 9, 9)]


@pytest.mark.parametrize(("offset", "length"), RANGES)
@pytest.mark.parametrize("cached", [True, False])
def test_part_of_a_block_is_what_it_was(rig: Rig, offset: int, length: int, cached: bool) -> None:
    """From a copy and from the replica, with the cache and without."""
    rig.host.cached = cached
    assert rig.run(read, offset, length) == OLD[offset : offset + length]


def _slot_of(rig: Rig, block: int) -> int:
    assert rig.volume is not None
    found = rig.volume.core.need_area().index.lookup(1, block)
    assert found is not None
    return found[1]


def _flip(rig: Rig, offset: int) -> None:
    pages = rig.host.files["area"].cache
    (byte,) = pages.read(offset, 1)
    pages.write(offset, bytes([byte ^ 1]))


@pytest.mark.parametrize("cached", [True, False])
def test_a_rotted_copy_is_an_error_not_a_wrong_byte(rig: Rig, cached: bool) -> None:
    """R1: EIO for the block, also where the bytes asked for are all right; others still read."""
    rig.host.cached = cached
    assert rig.volume is not None
    layout = rig.volume.core.need_area().layout
    _flip(rig, layout.slot_offset(_slot_of(rig, 1)) + 4000)
    with pytest.raises(OSError) as caught:
        rig.run(read, BLOCK + 5, 10)
    assert caught.value.errno == errno.EIO
    assert rig.log.ids("vsnapfs").count(1040) == 1
    assert rig.run(read, 5, 10) == OLD[5:15]


@pytest.mark.parametrize("cached", [True, False])
def test_a_rotted_descriptor_is_read_from_its_twin(rig: Rig, cached: bool) -> None:
    """One copy of the sector is bad: the answer is right all the same."""
    rig.host.cached = cached
    assert rig.volume is not None
    layout = rig.volume.core.need_area().layout
    first, _ = layout.sector_offsets(_slot_of(rig, 0) // 20)
    _flip(rig, first + 40)
    assert rig.run(read, 5, 10) == OLD[5:15]
