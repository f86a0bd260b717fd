"""One measurement in a process of its own, so that its memory is its own, too.

`python -m growth.probe KIND DIRECTORY COUNT` opens the volume in DIRECTORY with `Volume.open`, as a
server does, and prints one JSON object. KIND is `open`, `scale`, `points`, `writes` or `fold`. The
process ends without closing the volume: the next one finds what a killed server leaves behind,
unless nothing was changed. Times in seconds, memory in bytes.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import trio

from vsnapfs.diffarea.index import EPOCH_BITS, Index, Run
from vsnapfs.volume import Volume

_WRITE = 4096
Figures = dict[str, Any]


def memory(name: str) -> int:
    """VmRSS or VmHWM (the peak) of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise LookupError(name)


def percentile(values: list[float], share: float) -> float:
    """The value that `share` of the sorted values do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


async def open_(directory: Path, _count: int) -> Figures:
    """What opening costs."""
    before = memory("VmRSS")
    started, cpu = time.perf_counter(), time.process_time()
    volume = await Volume.open(directory)
    wall, cpu = time.perf_counter() - started, time.process_time() - cpu
    area = volume.core.need_area()
    if volume.protection.state != "online":
        raise RuntimeError(f"the volume is {volume.protection.state}")
    return {
        "copies": len(area.index),
        "wall": wall,
        "cpu": cpu,
        "rss": memory("VmRSS") - before,
        "peak": memory("VmHWM") - before,
        "structures": area.index.nbytes + area.slots.nbytes + volume.core.preserved.nbytes,
    }


# --- points ---------------------------------------------------------------------------------------


class Stopwatch:
    """Adds up how long parts of the engine take while it is worked."""

    def __init__(self, volume: Volume) -> None:
        self.seconds = dict.fromkeys(("replica", "commit", "state"), 0.0)
        core = volume.core
        self._around(core.replica, "sync", "replica")
        self._around(core.need_area(), "commit", "commit")
        self._around(core.state_file, "save", "state")

    def _around(self, owner: Any, method: str, name: str) -> None:
        real = getattr(owner, method)

        def timed(*args: Any, **options: Any) -> Any:
            started = time.perf_counter()
            try:
                return real(*args, **options)
            finally:
                self.seconds[name] += time.perf_counter() - started

        setattr(owner, method, timed)

    @contextmanager
    def running(self) -> Iterator[dict[str, float]]:
        """Fills in the parts and the "total" of what happens inside."""
        found: dict[str, float] = {}
        self.seconds = dict.fromkeys(self.seconds, 0.0)
        started = time.perf_counter()
        yield found
        found["total"] = time.perf_counter() - started
        found |= self.seconds
        found["beyond"] = found["total"] - found["replica"]


class BusyWriter:
    """A writer that writes all the time, one 4 KiB write after the other, over a few blocks."""

    def __init__(self, volume: Volume, blocks: int) -> None:
        self._volume = volume
        self._blocks = blocks
        self.writes: list[tuple[float, float]] = []
        self._written = trio.Event()

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
        """Write until cancelled."""
        handle = self._volume.open_replica()
        size, content = self._volume.block_size, b"\x5a" * _WRITE
        number = 0
        while True:
            # Each block of the last ones of the volume in turn, so that all of it is one round.
            offset = self._volume.size - (number % self._blocks + 1) * size
            number += 1
            started = time.perf_counter()
            await handle.write(offset, content)
            self.writes.append((started, time.perf_counter()))
            self._written.set()
            self._written = trio.Event()
            if number == self._blocks:
                task_status.started()
            await trio.lowlevel.checkpoint()

    async def one_more(self) -> None:
        """Return when the write under way is done, and one that began after it."""
        for _ in range(2):
            await self._written.wait()

    def longest_since(self, moment: float) -> float:
        """The longest write of those that ended after `moment`, and those are forgotten."""
        longest = max((end - start for start, end in self.writes if end >= moment), default=0.0)
        self.writes.clear()
        return longest


async def _with_writer(
    volume: Volume, count: int, work: Callable[[int], Awaitable[Any]], blocks: int = 32
) -> Figures:
    """`count` times `work` while a writer writes: medians, and the longest write it saw."""
    watch, writer = Stopwatch(volume), BusyWriter(volume, blocks)
    rounds, held, quiet = [], [], []
    async with trio.open_nursery() as nursery:
        await nursery.start(writer.run)
        for number in range(count):
            writer.writes.clear()
            before = time.perf_counter()
            await trio.sleep(0.1)
            quiet.append(writer.longest_since(before))
            moment = time.perf_counter()
            with watch.running() as parts:
                await work(number)
            await writer.one_more()  # The write that was held ends after the work.
            held.append(writer.longest_since(moment))
            rounds.append(parts)
        nursery.cancel_scope.cancel()
    return _medians(rounds) | {
        "longest_write": statistics.median(held),
        "longest_write_before": statistics.median(quiet),
    }


def _medians(rounds: list[dict[str, float]]) -> Figures:
    return {name: statistics.median(parts[name] for parts in rounds) for name in rounds[0]}


async def _idle(volume: Volume, count: int, work: Callable[[int], Awaitable[Any]]) -> Figures:
    watch, rounds = Stopwatch(volume), []
    for number in range(count):
        with watch.running() as parts:
            await work(number)
        rounds.append(parts)
    return _medians(rounds)


async def _lookups(volume: Volume, number: int, count: int = 2000) -> Figures:
    """Seconds for one block: its lookup alone, and a 4 KiB read of recovery point `number`."""
    index, generator = volume.core.need_area().index, random.Random(1)  # noqa: S311
    total = volume.size // volume.block_size
    blocks = [generator.randrange(total) for _ in range(count)]
    started = time.perf_counter()
    for block in blocks:
        index.lookup(number, block)
    lookup = (time.perf_counter() - started) / count
    handle = volume.open_point(number)
    started = time.perf_counter()
    for block in blocks:
        await handle.read(block * volume.block_size, _WRITE)
    read = (time.perf_counter() - started) / count
    handle.close()
    return {"lookup": lookup, "read": read}


async def _running(directory: Path, work: Callable[[Volume], Awaitable[Figures]]) -> Figures:
    volume = await Volume.open(directory)
    async with trio.open_nursery() as nursery:
        await nursery.start(volume.run)
        figures = await work(volume)
        # Not closed: the process is about to end.
        os.write(1, json.dumps(figures).encode())
        os._exit(0)


async def scale(directory: Path, count: int) -> Figures:
    """Lookup, creation and deletion in a volume with many copies, `count` rounds of each."""

    async def work(volume: Volume) -> Figures:
        found: Figures = await _lookups(volume, volume.points[0].number)
        found["create"] = await _idle(volume, count, lambda _: volume.create_point())
        found["create_busy"] = await _with_writer(volume, count, lambda _: volume.create_point())
        found["delete_busy"] = await _with_writer(
            volume, min(count, 3), lambda number: volume.delete_point(volume.points[number].number)
        )
        return found

    return await _running(directory, work)


async def points(directory: Path, most: int) -> Figures:
    """Creation, lookup and deletion at 1, 2, 4 … `most` recovery points, 64 copies in each."""

    async def work(volume: Volume) -> Figures:
        handle, generator = volume.open_replica(), random.Random(2)  # noqa: S311
        total = volume.size // volume.block_size
        watch = Stopwatch(volume)
        steps: dict[int, Figures] = {}
        recent: list[dict[str, float]] = []
        while len(volume.points) < most:
            with watch.running() as parts:
                await volume.create_point()
            recent.append(parts)
            for _ in range(64):
                offset = generator.randrange(total) * volume.block_size
                await handle.write(offset, generator.randbytes(_WRITE))
            there = len(volume.points)
            if there & (there - 1) == 0:
                oldest = await _lookups(volume, volume.points[0].number)
                steps[there] = {"create": _medians(recent[-5:]), **oldest}
        while volume.points:
            there = len(volume.points)
            # The oldest and one in the middle in turn: what programs and people delete.
            number = volume.points[0 if there % 2 else there // 2].number
            with watch.running() as parts:
                await volume.delete_point(number)
            if there & (there - 1) == 0:
                steps[there]["delete"] = parts
        return {"steps": [{"points": there} | figures for there, figures in steps.items()]}

    return await _running(directory, work)


# --- writes ---------------------------------------------------------------------------------------


async def writes(directory: Path, count: int) -> Figures:
    """`count` first writes of a block each, one after the other and then 16 at once, in 20 parts.

    Each half of the writes goes to its own half of the volume, in random order.
    """

    async def work(volume: Volume) -> Figures:
        await volume.create_point()
        handle = volume.open_replica()
        generator = random.Random(3)  # noqa: S311
        area, started = volume.core.need_area(), time.perf_counter()
        parts = []
        for depth, blocks in ((1, range(count // 4)), (16, range(count // 4, count))):
            order = list(blocks)
            generator.shuffle(order)
            size = max(1, len(order) // 10)
            for at in range(0, size * 10, size):
                allocated = area.allocated
                seconds = await _write_blocks(volume, order[at : at + size], depth)
                # What was acknowledged may lie in the write buffer: now all of it is copied.
                before = time.perf_counter()
                await handle.flush()
                parts.append(
                    {
                        "depth": depth,
                        "copies": len(area.index),
                        "flush": time.perf_counter() - before,
                        "p50": percentile(seconds, 0.5),
                        "p99": percentile(seconds, 0.99),
                        "longest": max(seconds),
                        "grown": area.allocated - allocated,
                    }
                )
        return {"parts": parts, "seconds": time.perf_counter() - started}

    return await _running(directory, work)


async def _write_blocks(volume: Volume, blocks: list[int], depth: int) -> list[float]:
    handle, content = volume.open_replica(), b"\xa5" * _WRITE
    waiting, seconds = iter(blocks), []

    async def one_writer() -> None:
        for block in waiting:
            started = time.perf_counter()
            await handle.write(block * volume.block_size, content)
            seconds.append(time.perf_counter() - started)

    async with trio.open_nursery() as nursery:
        for _ in range(depth):
            nursery.start_soon(one_writer)
    handle.close()
    return seconds


async def fold(_directory: Path, count: int) -> Figures:
    """All folds that happen while an index grows from three quarters of `count` copies to all."""
    generator = np.random.default_rng(4)
    index = Index(_random_run(generator, count * 3 // 4, 1))
    newer = _random_run(generator, count - len(index), 2)
    seconds = [0.0]
    for key, slot in zip(newer.keys.tolist(), newer.slots.tolist(), strict=True):
        index.add(key >> EPOCH_BITS, 2, slot)
        if index.wants_folding():
            started = time.perf_counter()
            index.fold()
            seconds.append(time.perf_counter() - started)
    return {"copies": len(index), "median": statistics.median(seconds), "longest": max(seconds)}


def _random_run(generator: np.random.Generator, count: int, epoch: int) -> Run:
    blocks = np.unique(generator.integers(0, 2**30, count, dtype=np.uint64))
    keys = (blocks << np.uint64(EPOCH_BITS)) | np.uint64(epoch)
    return Run(keys, np.arange(len(keys), dtype=np.uint32))


KINDS = {"open": open_, "scale": scale, "points": points, "writes": writes, "fold": fold}


def main() -> None:
    """See the module's note."""
    kind, directory, count = sys.argv[1:]
    figures = trio.run(KINDS[kind], Path(directory), int(count))
    os.write(1, json.dumps(figures).encode())
    os._exit(0)


if __name__ == "__main__":
    main()
