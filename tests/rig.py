"""A volume on a simulated host: makes it, opens it, runs things on it, compares all of it.

Owns the harness of the tests of the engine (t1, t2). A `Rig` stands for the machine with the
volume on it; `crashed` and `killed` put the rig on the host that is left. I/O runs in the trio
thread unless a test asks for real threads, so that a seed decides the order of everything.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import trio
import trio._core._run as trio_run
from simdisk import Host, PowerLoss, SimStore

from vsnapfs.config import VolumeConfig
from vsnapfs.diffarea.area import DiffArea
from vsnapfs.errors import VsnapError
from vsnapfs.events import CATALOG
from vsnapfs.volume import Volume
from vsnapfs.volume.buffer import lay_over
from vsnapfs.volume.core import leave_in_thread
from vsnapfs.volume.opening import _why_not_open, close_files, open_core
from vsnapfs.volume.statefile import STATE_SIZE, SavedState, StateFile

T = TypeVar("T")
BLOCK = 4096
VOLUME_ID = bytes(range(1, 17))
#: The smallest diff area with 4 KiB blocks: 32 slots.
SMALLEST = 128 * 1024 + 128 * 1024 + 32 * BLOCK


class MemoryLog:
    """The event log, kept in memory. An event that is not in the catalog is an error."""

    def __init__(self) -> None:
        self.events: list[tuple[str, int, dict[str, Any]]] = []
        self.flush_failures = 0

    def log(self, source: str, event_id: int, /, **params: Any) -> None:
        assert (source, event_id) in CATALOG, (source, event_id)
        self.events.append((source, event_id, params))

    def log_flush_failure(self, **params: Any) -> None:
        self.flush_failures += 1
        if self.flush_failures == 1:
            self.log("Microsoft-Windows-Ntfs", 140, **params)

    def reset_flush_failures(self) -> None:
        self.flush_failures = 0

    def ids(self, source: str = "volsnap") -> list[int]:
        """The ids of one source, in order."""
        return [number for name, number, _ in self.events if name == source]

    def params(self, event_id: int) -> dict[str, Any]:
        """The params of the only event with this id."""
        (found,) = [params for _, number, params in self.events if number == event_id]
        return found


async def _inline(function: Callable[..., T], *args: Any, **_options: Any) -> T:
    """Stands in for `trio.to_thread.run_sync`: others run before and after, but not meanwhile."""
    await trio.lowlevel.checkpoint()
    result = function(*args)
    await trio.lowlevel.checkpoint()
    return result


@contextlib.contextmanager
def small_steps() -> Iterator[None]:
    """Make rare things common: growth, folding and batches take few blocks."""
    with (
        mock.patch("vsnapfs.diffarea.area._MIN_STEP", 16 * BLOCK),
        mock.patch("vsnapfs.diffarea.index._FOLD_AT", 5),
        mock.patch("vsnapfs.diffarea.descriptors.ZERO_SPAN", 4),
        mock.patch("vsnapfs.volume.copying.ZERO_SPAN", 4),
        mock.patch("vsnapfs.volume.invariants.ZERO_SPAN", 4),
        mock.patch("vsnapfs.volume.room._LOW_WATER", 4),
        mock.patch("vsnapfs.volume.resize._AT_ONCE", 3),
        mock.patch("vsnapfs.volume.restore._AT_ONCE", 3),
        mock.patch("vsnapfs.volume.copying._STAGING", 4 * BLOCK),
        mock.patch("vsnapfs.volume.writer.LONGEST", 2 * BLOCK),
        mock.patch("vsnapfs.volume.buffer._BATCH", 3 * BLOCK),
    ):
        yield


@contextlib.contextmanager
def slow_growth(steps: int) -> Iterator[None]:
    """A host that is slow to allocate: others may take so many steps before it does."""

    async def slowly(function: Callable[..., T], *args: Any) -> T:
        for _ in range(steps):
            await trio.lowlevel.checkpoint()
        return await leave_in_thread(function, *args)

    with mock.patch("vsnapfs.volume.room.leave_in_thread", slowly):
        yield


class Rig:
    """A host with the files "replica", "area" and "state", and the volume when it is open."""

    def __init__(
        self,
        *,
        size: int = 12 * BLOCK + 1000,
        maximum: int = SMALLEST + 64 * BLOCK,
        block_size: int = BLOCK,
        capacity: int = 1 << 50,
        area_is_device: bool = False,
        seed: int = 0,
        buffer: int = 0,
        **config: Any,
    ) -> None:
        self.host = Host(capacity)
        #: Bytes of the write buffer, 0 for none.
        self.buffer = buffer
        self.config = VolumeConfig(volume_id=VOLUME_ID.hex(), **config)
        self.log = MemoryLog()
        self.volume: Volume | None = None
        self.threads = False
        #: Makes the clock of each run, if time is to be simulated.
        self.clock: Callable[[], trio.abc.Clock] | None = None
        self.seed = seed
        host = self.host
        host.create("replica", size)
        host.create("area", maximum if area_is_device else 0, is_device=area_is_device)
        host.create("state")
        replica, area, state = (host.open(name) for name in ("replica", "area", "state"))
        made = DiffArea.format(
            area,
            volume_id=VOLUME_ID,
            block_size=block_size,
            replica_size=size,
            maximum=maximum,
        )
        made.commit(clean=True, replica=replica.identity())
        state.allocate(0, STATE_SIZE)
        StateFile(state, VOLUME_ID).save(
            SavedState(
                maximum=maximum, block_size=block_size, generation=made.superblock.generation
            )
        )
        for backing in (replica, area, state):
            backing.close()

    # -- running --------------------------------------------------------------------------------

    def run(self, function: Callable[..., Awaitable[T]], *args: Any, **options: Any) -> T:
        """Run `function(volume, …)` with the volume open (opened now, with `options`, if not).

        PowerLoss when the host ended meanwhile; everything else comes out as it was raised.
        """

        async def main() -> T:
            if self.volume is None:
                self.volume = await self.open(**options)
            async with trio.open_nursery() as nursery:
                await nursery.start(self.volume.run)
                result = await function(self.volume, *args)
                nursery.cancel_scope.cancel()
            return result

        return self.trio_run(main)

    def trio_run(self, main: Callable[[], Awaitable[T]]) -> T:
        """`trio.run`, with everything in this thread and in an order that the seed decides."""
        self.seed += 1
        trio_run._ALLOW_DETERMINISTIC_SCHEDULING = True
        trio_run._r.seed(self.seed)
        replaced = (
            contextlib.nullcontext()
            if self.threads
            else mock.patch.object(trio.to_thread, "run_sync", _inline)
        )
        try:
            with replaced:
                return trio.run(main, clock=self.clock() if self.clock else None)
        except BaseException as error:
            if self.host.dead:
                raise PowerLoss from None
            while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
                error = error.exceptions[0]
            raise error from None

    async def open(self, **options: Any) -> Volume:
        """What `Volume.open` does, with the files of the host."""
        host, problem, area = self.host, None, None
        opened: list[Any] = []
        try:
            opened += [host.open("replica")]
            opened += [host.open("state")]
            try:
                area = host.open("area")
                opened.append(area)
            except OSError as error:
                problem = _why_not_open(Path("/sim/area"), error)
            needs_boot = self.config.durability == "process"
            store = SimStore(host) if self.buffer or needs_boot else None
            core = open_core(
                "/sim", self.config, opened[0], area, opened[1], self.log, problem, False, store
            )
            core.buffer_size = self.buffer
            core.core.durability = self.config.durability
            try:
                return await Volume.from_opened(core, **options)
            except BaseException:
                close_files(core.core)
                raise
        except BaseException:
            for backing in opened:
                backing.close()
            raise

    def close(self) -> None:
        """Close the volume cleanly."""

        async def close(volume: Volume) -> None:
            await volume.close()

        if self.volume is not None:
            self.run(close)
            self.volume = None

    def killed(self) -> None:
        """SIGKILL of the process."""
        self.host = self.host.kill()
        self.volume = None

    def crashed(self, choose: Any = None) -> None:
        """A power failure; see `Snapshot.power_failure`."""
        self.host = self.host.power_failure(choose)
        self.volume = None

    def on(self, host: Host) -> Rig:
        """A rig like this one, closed, on another host."""
        other = object.__new__(Rig)
        other.__dict__.update(self.__dict__)
        other.host, other.volume, other.log = host, None, MemoryLog()
        return other


# --- whole contents ------------------------------------------------------------------------------


async def attempt(work: Awaitable[Any]) -> VsnapError | OSError | None:
    """The error that `work` ends with, if it is one of the two that may leave the engine."""
    try:
        await work
    except (VsnapError, OSError) as error:
        return error
    return None


async def read_point(volume: Volume, number: int, step: int = 1 << 20) -> bytes:
    """All of a recovery point."""
    handle = volume.open_point(number)
    try:
        parts = [bytes(await handle.read(at, step)) for at in range(0, volume.size, step)]
        return b"".join(parts)
    finally:
        handle.close()


async def read_points(volume: Volume) -> dict[int, bytes]:
    """All of all recovery points."""
    return {point.number: await read_point(volume, point.number) for point in volume.points}


async def read_replica(volume: Volume) -> bytes:
    """All of the replica. OSError ENODEV when offline."""
    handle = volume.open_replica()
    try:
        return bytes(await handle.read(0, volume.size))
    finally:
        handle.close()


async def write(volume: Volume, offset: int, data: bytes, *, durably: bool = False) -> None:
    """One write through a handle of its own. durably: it was opened with O_DSYNC."""
    handle = volume.open_replica(synchronous=durably)
    try:
        await handle.write(offset, data)
    finally:
        handle.close()


async def flush(volume: Volume) -> None:
    """One flush through a handle of its own."""
    handle = volume.open_replica()
    try:
        await handle.flush()
    finally:
        handle.close()


def raw_replica(rig: Rig) -> bytes:
    """The replica as any process on the host sees it."""
    cache = rig.host.files["replica"].cache
    return cache.read(0, cache.size)


def acknowledged(rig: Rig, volume: Volume) -> bytes:
    """The replica with all that has been acknowledged, online or not."""
    parts = volume.buffer.capture(0, volume.size)
    return bytes(lay_over(raw_replica(rig), parts))


@functools.lru_cache(1000)  # A trial writes what the one before it wrote.
def pattern(seed: int, length: int) -> bytes:
    """Bytes that differ from one seed to the next and from one 512-byte sector to the next."""
    words = [f"<{seed:08x}.{word:06x}>".encode() for word in range(-(-length // 16) + 1)]
    return b"".join(words)[:length]
