"""A volume in memory with the interface that `fuse` and `daemon` use, and faults on request.

Copies the whole replica for each point: what matters here is who is asked for what, and what
becomes of the answer. The tests of t4_mount run the same paths with the real one.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio

from vsnapfs.beginning import begin
from vsnapfs.errors import BusyError, VsnapError
from vsnapfs.events import EventLog

NOON = 1_795_332_000_000_000_000  # 2026-11-22T07:20:00Z
Progress = Callable[[str, int, int], None]


def oserror(code: int) -> OSError:
    return OSError(code, os.strerror(code))


@dataclass(frozen=True)
class FakePoint:
    number: int
    created_ns: int
    label: str = ""


class FakeHandle:
    """An open replica or point. `fails`: what the next calls raise, by name of the call."""

    def __init__(self, volume: FakeVolume, data: bytearray, number: int | None) -> None:
        self.volume = volume
        self.data = data
        self.number = number
        self.closed = 0
        self.flushed = 0
        self.synchronous = False

    def _check(self, call: str) -> None:
        if call in self.volume.fails:
            raise self.volume.fails[call]
        if self.number is not None and self.number not in self.volume.images:
            raise oserror(errno.ESTALE)

    async def read(self, offset: int, length: int) -> bytes | memoryview:
        await trio.lowlevel.checkpoint()
        self._check("read")
        end = offset + length - self.volume.short_by
        return memoryview(bytes(self.data[offset : max(offset, end)]))

    async def write(self, offset: int, data: bytes) -> None:
        await trio.lowlevel.checkpoint()
        self._check("write")
        if offset + len(data) > len(self.data):
            raise oserror(errno.EFBIG)
        self.data[offset : offset + len(data)] = data

    async def flush(self) -> None:
        await trio.lowlevel.checkpoint()
        self._check("flush")
        self.flushed += 1

    def close(self) -> None:
        self.closed += 1


class FakePointHandle:
    """Only what a point handle promises: no write, no flush."""

    def __init__(self, handle: FakeHandle) -> None:
        self.read = handle.read
        self.close = handle.close


class FakeVolume:
    """See the module. `size` is nasty on purpose: not a multiple of the block size."""

    def __init__(self, directory: Path, *, size: int = 100_001) -> None:
        self.directory = directory
        self.size = size
        self.block_size = 16384
        self.log = EventLog(directory / "events.jsonl")
        self.data = bytearray(size)
        self.points: tuple[FakePoint, ...] = ()
        self.suspect = 0
        self.images: dict[int, bytearray] = {}
        self.fails: dict[str, BaseException] = {}
        self.short_by = 0
        self.online_state = True
        self.maximum = 1 << 20
        self.used = 40_000
        self.handles: list[FakeHandle] = []
        self.callbacks: list[Callable[[], None]] = []
        self.closed = 0
        self.running = trio.Event()
        self.slow: trio.Event | None = None
        #: While it is set to an event, operations wait for that before they begin.
        self.queue: trio.Event | None = None
        self.in_queue = 0
        self.waits = ""
        self.ended: list[str] = []
        self.warnings: list[str] = []
        self._stop = trio.Event()

    async def run(self, *, task_status: Any = trio.TASK_STATUS_IGNORED) -> None:
        task_status.started()
        self.running.set()
        await self._stop.wait()
        self.ended.append("run")

    def ends_now(self) -> None:
        self.ended.append("ends now")

    async def _turn(self) -> None:
        if self.queue is not None:
            self.in_queue += 1
            try:
                await self.queue.wait()
            finally:
                self.in_queue -= 1
        begin()

    def waits_for(self, *, host_only: bool = False) -> str:
        return "" if host_only else self.waits

    async def close(self, before_unlocking: Callable[[], None] = lambda: None) -> None:
        before_unlocking()
        if self.closed == 0:
            await trio.lowlevel.checkpoint()
            self.ended.append("close")
            self._stop.set()
            self.log.close()
        self.closed += 1
        if "close" in self.fails:
            raise self.fails["close"]

    def subscribe(self, callback: Callable[[], None]) -> None:
        self.callbacks.append(callback)

    def changed(self) -> None:
        for callback in self.callbacks:
            callback()

    def open_replica(self, *, synchronous: bool = False) -> FakeHandle:
        if not self.online_state:
            raise oserror(errno.ENODEV)
        self.handles.append(FakeHandle(self, self.data, None))
        self.handles[-1].synchronous = synchronous
        return self.handles[-1]

    def open_point(self, number: int) -> FakePointHandle:
        if number not in self.images:
            raise oserror(errno.ESTALE)
        self.handles.append(FakeHandle(self, self.images[number], number))
        return FakePointHandle(self.handles[-1])

    def list_points(self) -> tuple[FakePoint, ...]:
        return self.points

    def resolve(self, spec: str | int) -> FakePoint:
        for point in self.points:
            if str(spec) == str(point.number) or (point.label and spec == point.label):
                return point
        if self.points and spec in ("latest", "oldest"):
            return self.points[-1 if spec == "latest" else 0]
        raise VsnapError(f"no recovery point {spec}", code="no-such-point")

    def add_point(self, number: int, created_ns: int = NOON, label: str = "") -> None:
        self.points = (*self.points, FakePoint(number, created_ns, label))
        self.images[number] = bytearray(self.data)
        self.changed()

    async def create_point(self, label: str | None = None) -> FakePoint:
        await self._turn()
        number = max((p.number for p in self.points), default=0) + 1
        self.add_point(number, NOON + number * 10**9, label or "")
        return self.points[-1]

    async def delete_point(self, number: int, *, force: bool = False) -> None:
        if not force and any(h.number == number and not h.closed for h in self.handles):
            raise BusyError(f"recovery point {number} is open")
        await self._turn()
        self.points = tuple(p for p in self.points if p.number != number)
        del self.images[number]
        self.changed()

    async def restore(
        self, number: int, *, force: bool = False, progress: Progress | None = None
    ) -> None:
        try:
            await self._turn()
            if progress is not None:
                progress("restore", 1, 2)
            if self.slow is not None:
                await self.slow.wait()
            self.data[:] = self.images[number]
        finally:
            self.ended.append("restore")

    async def resize(self, total: int, *, progress: Progress | None = None) -> None:
        await self._turn()
        self.maximum = total

    async def go_offline(self) -> None:
        await self._turn()
        self.online_state = False
        self.changed()

    async def online(self, *, give_up_recovery_points: bool = False) -> list[str]:
        await self._turn()
        self.online_state = True
        return ["it may fault again"] if not give_up_recovery_points else []

    async def verify(self, progress: Progress | None = None) -> dict[str, Any]:
        try:
            for done in range(1, 4):
                if progress is not None:
                    progress("blocks", done, 3)
                await trio.sleep(0.15)
            if self.slow is not None:
                await self.slow.wait()
            return {"ok": True, "checked": {"blocks": 3}, "problems": []}
        finally:
            self.ended.append("verify")

    async def news(self) -> None:
        await trio.lowlevel.checkpoint()

    def status(self) -> dict[str, Any]:
        if "status" in self.fails:
            raise self.fails["status"]
        return {
            "volume": str(self.directory),
            "state": "online" if self.online_state else "offline",
            "pid": os.getpid(),
            "mountpoint": None,
            "recovery_points": len(self.points),
            "replica": {"path": str(self.directory / "replica.img"), "size": self.size},
            "diff_area": {
                "path": "diff-area", "used": self.used, "allocated": self.used,
                "maximum": self.maximum,
            },
        }  # fmt: skip
