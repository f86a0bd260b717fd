"""Volumes in the guest's own process, without a mount, for scripts that lose or damage writes."""

from __future__ import annotations

import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from vsnapfs.volume.volume import Volume

BLOCK = 16 << 10


class Wrong(Exception):
    """A promise does not hold."""


def sh(*command: str | Path, given: str | None = None) -> str:
    """Run a command, with something to read, and return what it printed; Wrong if it fails."""
    done = subprocess.run(
        command, input=given, capture_output=True, text=True, check=False, timeout=120
    )
    if done.returncode != 0:
        raise Wrong(f"{' '.join(map(str, command))}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def sectors(device: str | Path) -> int:
    """Size of a block device in sectors of 512 bytes."""
    return int(sh("blockdev", "--getsz", device))


@asynccontextmanager
async def opened(directory: Path, *, accept_changed_replica: bool = False) -> AsyncIterator[Volume]:
    """A running volume; closed at the end, which may raise."""
    volume = await Volume.open(directory, accept_changed_replica=accept_changed_replica)
    try:
        async with trio.open_nursery() as nursery:
            await nursery.start(volume.run)
            try:
                yield volume
            finally:
                # While it still runs: closing finishes what it does.
                await volume.close()
                nursery.cancel_scope.cancel()
    finally:
        await volume.close()


async def read_replica(volume: Volume) -> bytes:
    """All of the live replica."""
    handle = volume.open_replica()
    try:
        return b"".join(
            [bytes(await handle.read(at, 1 << 20)) for at in range(0, volume.size, 1 << 20)]
        )
    finally:
        handle.close()


async def read_point(volume: Volume, number: int) -> list[bytes | None]:
    """Every block of a point; None where reading it is EIO."""
    handle = volume.open_point(number)
    found: list[bytes | None] = []
    try:
        for at in range(0, volume.size, BLOCK):
            try:
                found.append(bytes(await handle.read(at, BLOCK)))
            except OSError as error:
                if error.errno != 5:  # EIO
                    raise
                found.append(None)
    finally:
        handle.close()
    return found


def blocks(image: bytes) -> list[bytes | None]:
    """An image, cut as `read_point` does."""
    return [image[at : at + BLOCK] for at in range(0, len(image), BLOCK)]
