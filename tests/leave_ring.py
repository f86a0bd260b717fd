"""A process that dies with acknowledged writes in its write buffer: `leave_ring.py VOLUME COUNT`.

It opens the volume (no mount), writes all of it, takes a recovery point, acknowledges COUNT blocks
of "x" and ends by SIGKILL before one of them is carried out. Whose user it is, and in which mount
namespace, is up to whoever starts it.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from unittest import mock

import trio

from vsnapfs.volume import Volume
from vsnapfs.volume.buffer import WriteBuffer


async def main(directory: Path, count: int) -> None:
    # Given to another user, it counts as changed.
    volume = await Volume.open(directory, write_buffer=8 << 20, accept_changed_replica=True)
    block = volume.block_size
    async with trio.open_nursery() as nursery:
        await nursery.start(volume.run)
        handle = volume.open_replica()
        for offset in range(0, volume.size, block):
            await handle.write(offset, b"o" * min(block, volume.size - offset))
        await volume.create_point("before")
        with mock.patch.object(WriteBuffer, "_preserve", trio.lowlevel.checkpoint_if_cancelled):
            # So nothing of it is carried out, however the threads run.
            await volume.buffer.start()
            for number in range(count):
                await handle.write(number * block, b"x" * block)
            assert len(volume.buffer.pending) == count
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    trio.run(main, Path(sys.argv[1]), int(sys.argv[2]))
