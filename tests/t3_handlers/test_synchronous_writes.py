"""O_SYNC and O_DSYNC through the handlers, with the real engine on the simulated disk (W4)."""

from __future__ import annotations

import errno
import os
from typing import Any
from unittest import mock

import pyfuse3
import pytest
import trio
from powercuts import nothing_kept
from rig import BLOCK, Rig, pattern, raw_replica, small_steps
from simdisk import Host

from vsnapfs.fuse import VolumeOperations, tree
from vsnapfs.volume import Volume

SIZE = 12 * BLOCK + 1000
OLD, NEW = pattern(1, SIZE), pattern(2, SIZE)
SYNCHRONOUS = (os.O_DSYNC, os.O_SYNC, os.O_DSYNC | os.O_APPEND)
RING = 64 << 10


class Mounted:
    """A volume that holds `OLD`, durably, and its handlers."""

    def __init__(self, *, buffer: int = 0, points: int = 1, **config: Any) -> None:
        self.rig = Rig(size=SIZE, buffer=buffer, **config)
        self._points = points

    def run(self, test: Any) -> None:
        """Run `test(mounted)`."""

        async def main(volume: Volume) -> None:
            self.volume = volume
            with mock.patch("vsnapfs.fuse.operations.EventsFile"):  # The rig's log is no file.
                self.handlers = VolumeOperations(volume)
            await self.write(await self.open(os.O_DSYNC), 0, OLD)
            for _ in range(self._points):
                await volume.create_point()
            await test(self)

        with small_steps():
            self.rig.run(main)

    async def open(self, flags: int) -> int:
        context: Any = None
        return int((await self.handlers.open(tree.REPLICA, os.O_RDWR | flags, context)).fh)

    async def write(self, fh: int, offset: int, data: bytes) -> None:
        assert await self.handlers.write(fh, offset, data) == len(data)

    async def refused(self, fh: int, offset: int, data: bytes) -> int:
        """The errno that a write is answered with."""
        with pytest.raises(pyfuse3.FUSEError) as caught:
            await self.handlers.write(fh, offset, data)
        return int(caught.value.errno)

    @property
    def syncs(self) -> int:
        return self.rig.host.counts["replica", "sync"]

    def after_power_failure(self) -> bytes:
        """The replica as a power failure now would leave it at worst."""
        host: Host = self.rig.host.snapshot().power_failure(nothing_kept)
        return raw_replica(self.rig.on(host))


WAYS = {
    "through the write buffer": {"buffer": RING},
    "with a group commit": {},
    "without a point": {"points": 0},
    "with durability process": {"buffer": RING, "durability": "process"},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("flags", [0, *SYNCHRONOUS])
def test_a_synchronous_write_outlives_a_power_failure_right_after_its_answer(
    way: str, flags: int
) -> None:
    """W4: with O_SYNC or O_DSYNC what was answered is on the disk; without, nothing need be."""

    async def test(mounted: Mounted) -> None:
        fh, expected = await mounted.open(flags), bytearray(OLD)
        for offset, length in ((3 * BLOCK + 100, 9000), (0, 1), (SIZE - 700, 700)):
            data = NEW[offset : offset + length]
            await mounted.write(fh, offset, data)
            if flags:
                expected[offset : offset + length] = data
            assert mounted.after_power_failure() == expected

    Mounted(**WAYS[way]).run(test)  # type: ignore[arg-type]


def test_only_the_handle_that_was_opened_so_is_synchronous() -> None:
    """Another handle on the same file writes as fast as ever, and its flush still works."""

    async def test(mounted: Mounted) -> None:
        synchronous, plain = await mounted.open(os.O_DSYNC), await mounted.open(0)
        before = mounted.syncs
        await mounted.write(plain, 0, NEW[:100])
        assert mounted.syncs == before
        await mounted.write(synchronous, BLOCK, NEW[:100])
        assert mounted.syncs == before + 1
        await mounted.handlers.fsync(plain, True)
        assert mounted.syncs == before + 2

    Mounted(points=0).run(test)


def test_a_write_of_nothing_is_not_synced() -> None:
    """A write of no bytes has nothing to make durable."""

    async def test(mounted: Mounted) -> None:
        fh = await mounted.open(os.O_SYNC)
        before = mounted.syncs
        await mounted.write(fh, SIZE, b"")
        await mounted.write(fh, 5, b"")
        assert mounted.syncs == before

    Mounted().run(test)


def test_a_write_beyond_the_end_is_not_synced() -> None:
    """It is refused as on any handle, and the volume stays online."""

    async def test(mounted: Mounted) -> None:
        fh = await mounted.open(os.O_DSYNC)
        before = mounted.syncs
        assert await mounted.refused(fh, SIZE - 1, b"xy") == errno.EFBIG
        assert mounted.syncs == before
        await mounted.write(fh, SIZE - 1, b"x")

    Mounted().run(test)


@pytest.mark.parametrize("way", ["through the write buffer", "with a group commit"])
@pytest.mark.parametrize("code", [errno.EIO, errno.EDQUOT])
def test_a_synchronous_write_whose_sync_fails_is_answered_with_eio(way: str, code: int) -> None:
    """As a flush that fails: fault 13, the NTFS 140 event, everything else is refused; EIO, never
    the ENOSPC which would say that nothing was written.
    """

    async def test(mounted: Mounted) -> None:
        fh, log = await mounted.open(os.O_DSYNC), mounted.rig.log
        mounted.rig.host.fail("replica", "sync", code)
        assert await mounted.refused(fh, 0, NEW[:100]) == errno.EIO
        fault = mounted.volume.protection.fault
        assert fault is not None
        assert fault.code == 13
        assert log.ids("vsnapfs").count(1060) == 1
        assert log.flush_failures == 1
        assert await mounted.refused(fh, 0, NEW[:100]) == errno.ENODEV
        with pytest.raises(pyfuse3.FUSEError) as caught:
            await mounted.open(os.O_DSYNC)
        assert caught.value.errno == errno.ENODEV
        assert log.ids("vsnapfs").count(1090) == 0

    Mounted(**WAYS[way]).run(test)  # type: ignore[arg-type]


def test_all_who_shared_a_sync_that_fails_are_told() -> None:
    """None of many synchronous writes is taken for durable; the failure is logged once."""

    async def test(mounted: Mounted) -> None:
        fh, answers = await mounted.open(os.O_DSYNC), []

        async def one(block: int) -> None:
            answers.append(await mounted.refused(fh, block * BLOCK, NEW[:100]))

        mounted.rig.host.fail("replica", "sync", errno.EIO)
        async with trio.open_nursery() as nursery:
            for block in range(12):
                nursery.start_soon(one, block)
        assert set(answers) <= {errno.EIO, errno.ENODEV}
        assert len(answers) == 12
        assert mounted.rig.log.ids("vsnapfs").count(1060) == 1
        assert mounted.rig.log.ids("volsnap").count(92) == 1

    Mounted(points=0).run(test)


def test_a_synchronous_write_that_cannot_be_carried_out_is_refused() -> None:
    """It lies in the write buffer when its block cannot be preserved: ENODEV and a 140, as for a
    flush; `online` carries it out.
    """

    async def test(mounted: Mounted) -> None:
        fh = await mounted.open(os.O_DSYNC)
        await mounted.write(fh, 11 * BLOCK, NEW[:10])  # Now there is a ring.
        mounted.rig.host.fail("area", "write", errno.EIO)
        assert await mounted.refused(fh, 0, NEW[:100]) == errno.ENODEV
        fault = mounted.volume.protection.fault
        assert fault is not None
        assert fault.code == 7
        assert mounted.rig.log.flush_failures == 1
        await mounted.volume.online()
        assert raw_replica(mounted.rig)[:100] == NEW[:100]
        assert await mounted.refused(fh, 0, NEW[:100]) == errno.ENODEV  # P3: an old handle.
        await mounted.write(await mounted.open(os.O_DSYNC), 0, NEW[100:200])
        assert mounted.after_power_failure()[:100] == NEW[100:200]

    Mounted(buffer=RING).run(test)


def test_a_synchronous_write_waits_for_no_later_ones() -> None:
    """With writes arriving all the time it is answered when itself has been carried out."""

    async def test(mounted: Mounted) -> None:
        plain, synchronous = await mounted.open(0), await mounted.open(os.O_DSYNC)
        await mounted.write(plain, 11 * BLOCK, NEW[:10])
        await mounted.volume.buffer.drain()
        answered = trio.Event()

        async def keep_writing() -> None:
            number = 0
            while not answered.is_set():
                number += 1
                await mounted.write(plain, (number % 9 + 1) * BLOCK, NEW[:64])
                if number % 7 == 0:
                    await trio.lowlevel.checkpoint()
                assert number < 20_000, "never answered"

        async def one() -> None:
            await mounted.write(synchronous, 0, NEW[:64])
            answered.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(one)
            nursery.start_soon(keep_writing)
        assert mounted.after_power_failure()[:64] == NEW[:64]

    Mounted(buffer=RING).run(test)
