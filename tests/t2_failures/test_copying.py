"""Old blocks are read by several threads: in their places, whole, and also without memory."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from rig import Rig, flush, pattern, read_points, small_steps, write

from vsnapfs.backing import FileBacking
from vsnapfs.diffarea.index import Index
from vsnapfs.errors import FaultCode, FaultError
from vsnapfs.volume import Volume
from vsnapfs.volume.copying import Copier

BLOCK, COUNT = 4096, 200


@pytest.fixture
def replica(tmp_path: Path) -> Iterator[FileBacking]:
    (tmp_path / "replica").write_bytes(os.urandom(BLOCK * COUNT - 100))
    opened = FileBacking.open(tmp_path / "replica")
    yield opened
    opened.close()


@pytest.fixture
def copier(replica: FileBacking) -> Iterator[Copier]:
    config = SimpleNamespace(zero_blocks="flag")
    size = BLOCK * COUNT - 100
    core: Any = SimpleNamespace(replica=replica, block_size=BLOCK, size=size, config=config)
    copier = Copier(core)
    yield copier
    copier.close()


def wanted(replica: FileBacking, blocks: list[int]) -> bytes:
    whole = replica.path.read_bytes().ljust(BLOCK * COUNT, b"\0")
    return b"".join(whole[block * BLOCK : (block + 1) * BLOCK] for block in blocks)


BLOCKS = [0, 1, 2, *range(7, 160, 3), 180, 181, COUNT - 2, COUNT - 1]


def test_many_blocks_are_each_in_their_place(copier: Copier, replica: FileBacking) -> None:
    """Ascending blocks with gaps, the short last one padded with zeros; prefetched or not."""
    for _ in range(5):
        copier.prefetch(BLOCKS)
        view = bytearray(b"x" * (BLOCK * len(BLOCKS)))
        copier._read_old(BLOCKS, memoryview(view))
        assert view == wanted(replica, BLOCKS)


def test_a_block_that_cannot_be_read_is_fault_6_with_its_number(
    copier: Copier, replica: FileBacking
) -> None:
    """Whichever thread meets it; and no thread writes into the buffer any more afterwards."""
    reading = replica.read_into

    def bad(offset: int, buffer: memoryview) -> None:
        if offset == 100 * BLOCK:
            raise OSError(errno.EIO, "bad")
        reading(offset, buffer)

    view = bytearray(BLOCK * len(BLOCKS))
    with mock.patch.object(replica, "read_into", bad), pytest.raises(FaultError) as caught:
        copier._read_old(BLOCKS, memoryview(view))
    assert caught.value.code is FaultCode.COW_READ_FAILURE
    assert caught.value.block == 100
    before = bytes(view)
    copier._read_old(BLOCKS, memoryview(bytearray(BLOCK * len(BLOCKS))))
    assert bytes(view) == before


@pytest.mark.parametrize("started", [0, 3])
def test_without_memory_for_threads_one_reads_alone(
    copier: Copier, replica: FileBacking, started: int
) -> None:
    """No thread can be started, or only some: nothing is left behind, everything is read."""
    start, count = threading.Thread.start, 0

    def cannot(thread: threading.Thread) -> None:
        nonlocal count
        count += 1
        if count > started:
            raise RuntimeError("can't start new thread")
        start(thread)

    with mock.patch.object(threading.Thread, "start", cannot):
        copier.prefetch(BLOCKS)
        view = bytearray(BLOCK * len(BLOCKS))
        copier._read_old(BLOCKS, memoryview(view))
    assert view == wanted(replica, BLOCKS)
    assert not [t for t in threading.enumerate() if t.name.startswith("vsnapfs-reader")]


@pytest.mark.parametrize("buffer", [0, 64 * 1024])
def test_without_memory_to_fold_the_index_copies_count_all_the_same(buffer: int) -> None:
    """W2 and P2: no write is refused for it, and no slot with a copy is given out again."""
    rig = Rig(size=20 * BLOCK, buffer=buffer)

    async def go(volume: Volume) -> None:
        await write(volume, 0, pattern(1, 20 * BLOCK))
        await volume.create_point()
        before = await read_points(volume)
        with mock.patch.object(Index, "fold", side_effect=MemoryError):
            for block in range(8):
                await write(volume, block * BLOCK, pattern(2, BLOCK))
            await flush(volume)
        assert volume.protection.is_online
        volume.check_invariants()
        await write(volume, 0, pattern(3, 20 * BLOCK))
        await flush(volume)
        assert await read_points(volume) == before

    with small_steps():
        rig.run(go)
