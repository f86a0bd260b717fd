"""In the guest of vm/flakey: a diff area on a disk that drops, damages or refuses (dm-flakey).

Each case makes a volume with its diff area on /dev/mapper/flaky and its replica elsewhere, makes
points, lets the disk misbehave, and reads every point again: each block must be exactly right or
EIO, in the running volume and after opening it anew, and `verify` must say so. A case prints how
many blocks were right, refused, and wrong.
"""

from __future__ import annotations

import os
import struct
import sys
import traceback
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Self

import trio
from engine import BLOCK, Wrong, blocks, opened, read_point, read_replica, sectors, sh

from vsnapfs.errors import VsnapError
from vsnapfs.volume.create import create_volume
from vsnapfs.volume.volume import Volume

DISK, FLAKY, NAME = "/dev/vm/data", Path("/dev/mapper/flaky"), "flaky"
PLACE = Path("/dev/shm")  # noqa: S108 - the guest's own
SIZE = 4 << 20
# Up for 0 s, down for a long time: always down. The features say what down means.
# In a bio, the byte that is damaged; and where the first slots begin (diffarea/layout.py).
BYTE = 1000
SLOTS_BEGIN, SLOTS = (128 + 64) << 10, 32


def linear(start: int, length: int) -> str:
    """A stretch of the disk that works."""
    return f"{start} {length} linear {DISK} {start}"


def table(kind: str) -> str:
    """The device-mapper table for a whole disk that is `kind`."""
    size = sectors(DISK)
    slots = SLOTS_BEGIN // 512
    flakey = f"flakey {DISK} {{start}} 0 100000"
    features = {
        "corrupt-writes": f"5 corrupt_bio_byte {BYTE} w 165 0",
        "drop-all": "1 drop_writes",
        "drop-copies": "1 drop_writes",
        "error-writes": "1 error_writes",
    }
    if kind == "good":
        return linear(0, size)
    if kind == "drop-copies":
        # Superblocks and the first table are written; the first 32 slots and the rest are not.
        bad = flakey.format(start=slots)
        middle = SLOTS * BLOCK // 512
        rest = slots + middle
        return "\n".join(
            (
                linear(0, slots),
                f"{slots} {middle} {bad} {features[kind]}",
                linear(rest, size - rest),
            )
        )
    return f"0 {size} {flakey.format(start=0)} {features[kind]}"


def set_disk(kind: str) -> None:
    """Change how the disk behaves, under whoever has it open."""
    sh("dmsetup", "suspend", NAME)
    sh("dmsetup", "load", NAME, given=table(kind))
    sh("dmsetup", "resume", NAME)


def rot() -> None:
    """Flip a bit in every eighth slot of the first 32, beneath everybody; twice is never."""
    fd = os.open(DISK, os.O_RDWR)
    try:
        for at in range(SLOTS_BEGIN + BYTE, SLOTS_BEGIN + SLOTS * BLOCK, 8 * BLOCK):
            (byte,) = os.pread(fd, 1, at)
            os.pwrite(fd, bytes((byte ^ 1,)), at)
        os.fsync(fd)
    finally:
        os.close(fd)


def forget_caches() -> None:
    """So that the next read is the disk's."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3\n")


def content(name: str, seed: int, number: int) -> bytes:
    """A block that says which it is, and of which case: what a disk kept from another is wrong."""
    return struct.pack("<16sQQ", name.encode(), seed, number) * (BLOCK // 32)


class Tally:
    """What reading points gave."""

    def __init__(self) -> None:
        self.right = self.refused = self.wrong = 0
        self.unlisted: list[int] = []

    def add(self, got: list[bytes | None], wanted: list[bytes | None]) -> None:
        """Compare one point."""
        for one, other in zip(got, wanted, strict=True):
            if one is None:
                self.refused += 1
            elif one == other:
                self.right += 1
            else:
                self.wrong += 1

    def __str__(self) -> str:
        unlisted = f", points {self.unlisted} not listed" if self.unlisted else ""
        return f"{self.right} right, {self.refused} EIO, {self.wrong} WRONG{unlisted}"


class Case:
    """One volume on the flaky disk."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.directory = PLACE / name
        self.points: dict[int, list[bytes | None]] = {}
        self.volume: Volume

    async def __aenter__(self) -> Self:
        set_disk("good")
        sizes = {"size": SIZE, "diff_area_size": 16 << 20}
        create_volume(
            self.directory, **sizes, replica=None, diff_area=FLAKY, from_image=None, force=True
        )
        await self.open()
        await self.write(range(SIZE // BLOCK), 1)
        await self.point()
        return self

    async def __aexit__(self, *_: object) -> None:
        set_disk("good")
        await self.close()

    async def open(self) -> None:
        """Open the volume and let it run."""
        self._stack = AsyncExitStack()
        self.volume = await self._stack.enter_async_context(opened(self.directory))

    async def close(self) -> None:
        """Close the volume, which a disk that lied may make fail."""
        try:
            await self._stack.aclose()
        except (OSError, VsnapError, BaseExceptionGroup) as error:
            print(f"{self.name}: closing: {error}", flush=True)

    async def write(self, numbers: range, seed: int) -> None:
        """Write blocks and flush."""
        handle = self.volume.open_replica()
        try:
            for number in numbers:
                await handle.write(number * BLOCK, content(self.name, seed, number))
            await handle.flush()
        finally:
            handle.close()

    async def point(self) -> None:
        """Make a recovery point and remember it."""
        image = blocks(await read_replica(self.volume))
        self.points[(await self.volume.create_point()).number] = image

    async def read(self, when: str, *, must_refuse: bool | None) -> None:
        """Every point again; Wrong for any wrong byte, or if what must be noticed is not."""
        forget_caches()
        tally = Tally()
        listed = {point.number for point in self.volume.points}
        for number, wanted in self.points.items():
            if number in listed:
                tally.add(await read_point(self.volume, number), wanted)
            else:
                tally.unlisted.append(number)
        finds = await self.verify()
        print(f"{self.name}, {when}: {tally}; verify: {finds or 'all well'}", flush=True)
        if tally.wrong:
            raise Wrong(f"{self.name}, {when}: {tally.wrong} blocks read back wrong")
        status = self.volume.status()
        if tally.unlisted and not (status["state"] == "offline" and status["fault"]):
            raise Wrong(f"{self.name}, {when}: points {tally.unlisted} are gone without a fault")
        if must_refuse is not None and must_refuse != bool(tally.refused):
            raise Wrong(f"{self.name}, {when}: {tally.refused} blocks are EIO")
        if not finds and (tally.refused or tally.unlisted):
            raise Wrong(f"{self.name}, {when}: {tally}, and verify finds nothing")

    async def verify(self) -> list[str]:
        """What verify finds, or why it can find nothing; empty if all is well."""
        try:
            verified = await self.volume.verify()
        except VsnapError as error:
            return [f"refused: {error.message}"]
        if verified["ok"] == bool(verified["problems"]):
            raise Wrong(f"{self.name}: verify contradicts itself: {verified}")
        return sorted({problem["what"] for problem in verified["problems"]})

    async def again(self) -> None:
        """Close and open; what is refused loses nothing."""
        await self.close()
        forget_caches()
        await self.open()


async def rotted() -> None:
    """Bits flip on the disk: noticed in the blocks they hit; all is well once they flip back."""
    async with Case("rot") as case:
        await case.write(range(128), 2)
        await case.point()
        await case.write(range(64, 192), 3)
        await case.read("before", must_refuse=False)
        rot()
        await case.read("rotted", must_refuse=True)
        rot()
        await case.read("afterwards", must_refuse=False)


async def corrupt_writes() -> None:
    """Damage on the way to the disk: noticed when writing or when reading, also opened anew."""
    async with Case("corrupt-writes") as case:
        await case.write(range(64), 2)
        await case.point()
        set_disk("corrupt-writes")
        try:
            await case.write(range(32, 160), 3)
        except OSError as error:
            print(f"corrupt-writes: the writer sees {error.strerror}", flush=True)
        status = case.volume.status()
        print(f"corrupt-writes: {status['state']}, fault {status['fault']}", flush=True)
        set_disk("good")
        await case.read("in the running volume", must_refuse=None)
        await case.again()
        status = case.volume.status()
        print(f"corrupt-writes: {status['state']}, fault {status['fault']}", flush=True)
        await case.read("opened anew", must_refuse=None)


async def drop_copies() -> None:
    """A disk that says "written" and has not, for slots 0 to 31: their checksums notice."""
    async with Case("drop-copies") as case:
        set_disk("drop-copies")
        await case.write(range(64), 2)
        set_disk("good")
        await case.read("in the running volume", must_refuse=True)
        await case.again()
        await case.read("opened anew", must_refuse=None)


async def drop_all() -> None:
    """A disk that drops every write, descriptors too: the running volume notices."""
    async with Case("drop-all") as case:
        await case.write(range(32), 2)
        set_disk("drop-all")
        await case.write(range(32, 96), 3)
        set_disk("good")
        await case.read("in the running volume", must_refuse=True)


async def error_writes() -> None:
    """A disk that refuses writes: a fault, the replica untouched, every point exact."""
    async with Case("error-writes") as case:
        await case.write(range(32), 2)
        before = await read_replica(case.volume)
        set_disk("error-writes")
        try:
            await case.write(range(32, 96), 3)
        except OSError as error:
            print(f"error-writes: the writer sees {error.strerror}", flush=True)
            if error.errno != 19:
                raise Wrong(f"error-writes: errno {error.errno}, not ENODEV") from error
        else:
            raise Wrong("error-writes: the writes went through")
        status = case.volume.status()
        print(f"error-writes: {status['state']}, fault {status['fault']}", flush=True)
        await case.read("in the running volume, offline", must_refuse=False)
        set_disk("good")
        await case.volume.online()
        if await read_replica(case.volume) != before:
            raise Wrong("error-writes: the replica has changed")
        await case.read("online again", must_refuse=False)


CASES: tuple[Callable[[], Awaitable[None]], ...] = (
    rotted,
    corrupt_writes,
    drop_copies,
    drop_all,
    error_writes,
)


def main() -> int:
    """Every case (or those named); 0 if nothing was read back wrong."""
    sh("modprobe", "dm_flakey")
    sh("dmsetup", "create", NAME, given=table("good"))
    failed = []
    for case in CASES:
        name = case.__name__.replace("_", "-").replace("rotted", "rot")
        if sys.argv[1:] and name not in sys.argv[1:]:
            continue
        try:
            trio.run(case)
        except BaseException as error:  # noqa: BLE001 - the other cases are run all the same
            traceback.print_exc()
            print(f"WRONG in {name}: {type(error).__name__}: {error}", flush=True)
            failed.append(name)
    print(f"{len(failed)} cases failed{': ' if failed else ''}{', '.join(failed)}", flush=True)
    return bool(failed)


if __name__ == "__main__":
    raise SystemExit(main())
