"""What the parts of an open volume share: its files, its locks, its memory of what is preserved.

Owns no behaviour of its own beyond the locks. The order in which they are taken, always outermost
first, is: `admin_lock`, `shape_lock`, `grow_lock`, the write gate, `area_lock`.

* `admin_lock`: one administrative operation at a time (create, delete, restore, resize, …); taken
  through `admin.turn`, which knows who waits, and `admin.begin`, before the first change.
* `shape_lock`: what a verification walks over does not move or shrink under its feet.
* `grow_lock`: growing and shrinking exclude each other.
* `gate`: writes pass it; creating a point and restoring hold it and wait for those in flight.
* `area_lock`: one caller at a time changes the diff area, its index or its slot map.

Everything here is touched by the trio thread only, except where a function runs in a worker
thread under one of these locks.
"""

from __future__ import annotations

import errno
import inspect
import os
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager, asynccontextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import trio

from ..backing import Backing
from ..config import Durability, VolumeConfig
from ..diffarea.area import DiffArea
from ..diffarea.bitmap import BlockSet
from ..diffarea.superblock import RecoveryPoint
from ..errors import FaultError, VsnapError
from ..patience import Patience
from .administration import Administration
from .statefile import StateFile

T = TypeVar("T")
# trio 0.23 gave the option another name.
_NAMES = inspect.signature(trio.to_thread.run_sync).parameters
_LEAVE: dict[str, Any] = {
    "abandon_on_cancel" if "abandon_on_cancel" in _NAMES else "cancellable": True
}
Progress = Callable[[str, int, int], None]


class Log(Protocol):
    """The part of `events.EventLog` that the engine uses."""

    def log(self, source: str, event_id: int, /, **params: Any) -> Any:
        """Record an event."""
        ...

    def log_flush_failure(self, **params: Any) -> Any:
        """Record a failed flush of the file system above, once a fault."""
        ...

    def reset_flush_failures(self) -> Any:
        """The volume is online again: the next failed flush is a new story."""
        ...


async def in_thread(function: Callable[..., T], *args: Any) -> T:
    """Run blocking I/O in a worker thread, to its end: a cancellation waits until it is done.

    Where there is no memory for another thread it is done here and now: slow, but a fault can
    still be written down and no write is left half way.
    """
    started = False

    def work() -> T:
        nonlocal started
        started = True
        return function(*args)

    result: T
    with trio.CancelScope(shield=True):
        try:
            result = await trio.to_thread.run_sync(work)
        except (RuntimeError, MemoryError):
            if started:
                raise
            result = work()
    return result


async def leave_in_thread(function: Callable[..., T], *args: Any) -> T:
    """The same, but a cancellation leaves the thread to itself. Only where it does no harm then."""
    started = False

    def work() -> T:
        nonlocal started
        started = True
        return function(*args)

    try:
        return await trio.to_thread.run_sync(work, **_LEAVE)
    except (RuntimeError, MemoryError):
        if started:
            raise
        return work()


class WriteGate:
    """Writes count themselves in and out; a holder closes the gate and waits until none is in."""

    def __init__(self) -> None:
        self.closed = False
        self.inside = 0
        self._open = trio.Event()
        self._open.set()
        self._empty = trio.Event()
        #: Told what is waited for; the volume's, once there is one.
        self.waits_for: Callable[[str], AbstractContextManager[None]] = lambda _what: nullcontext()

    async def wait_open(self) -> None:
        """Return when the gate is open. The caller must look again: it may close at once."""
        await self._open.wait()

    def leave(self) -> None:
        """A write that had counted itself in is over."""
        self.inside -= 1
        if self.closed and self.inside == 0:
            self._empty.set()

    @asynccontextmanager
    async def held(self, seconds: float) -> AsyncIterator[None]:
        """Hold all writes. trio.TooSlowError if those in flight are not done in time."""
        while self.closed:
            await self._open.wait()
        self.closed = True
        self._open = trio.Event()
        self._empty = trio.Event()
        try:
            if self.inside:
                with self.waits_for("writes in flight"):
                    if not await Patience(seconds).wait(self._empty):
                        raise trio.TooSlowError
            yield
        finally:
            self.closed = False
            self._open.set()


class _Round:
    """One sync that is going to begin, and those who wait for it. errno: why it failed."""

    __slots__ = ("done", "errno")

    def __init__(self) -> None:
        self.done = trio.Event()
        self.errno: int | None = None


class SharedSync:
    """One sync for all who ask for one before it begins.

    A sync covers what was written before it began, and nothing else. So whoever asks while one is
    under way waits for the next, with all others who do: many writers with O_DSYNC, or many
    flushes, cost one sync at a time and not one each. There is never more than one under way: Linux
    tells one caller only that pages were lost, so that a second sync running beside a failing one
    would answer that all is well.
    """

    def __init__(self, sync: Callable[[], None]) -> None:
        self._sync = sync
        self._one_at_a_time = trio.Lock()
        self._next: _Round | None = None

    async def __call__(self) -> None:
        """Return when a sync that began after this call has succeeded. OSError if it failed.

        The error itself reaches the one who led, so that it is told once; the others get another
        with its errno.
        """
        if self._next is not None:
            joined = self._next
            await joined.done.wait()
            if joined.errno is not None:
                raise OSError(joined.errno, os.strerror(joined.errno))
            return
        # Shielded: a request that is given up must not leave those who joined without a leader.
        with trio.CancelScope(shield=True):
            led = self._next = _Round()
            try:
                async with self._one_at_a_time:
                    self._next = None  # From here on it covers nobody else.
                    await in_thread(self._sync)
            except BaseException as error:
                led.errno = getattr(error, "errno", None) or errno.EIO
                raise
            finally:
                led.done.set()


@dataclass(eq=False)
class Core:
    """See the module's note. Sizes in bytes; `size` is the replica's."""

    name: str
    config: VolumeConfig
    replica: Backing
    area: DiffArea | None
    state_file: StateFile
    log: Log
    size: int
    block_size: int
    volume_id: bytes
    gate: WriteGate = field(default_factory=WriteGate)
    admin: Administration = field(default_factory=Administration)
    shape_lock: trio.Lock = field(default_factory=trio.Lock)
    grow_lock: trio.Lock = field(default_factory=trio.Lock)
    area_lock: trio.Lock = field(default_factory=trio.Lock)
    #: Blocks that need no copy now: they have one in the newest live point's epoch or later.
    preserved: BlockSet = field(default_factory=BlockSet)
    #: Blocks of the replica that are known to be no holes.
    no_holes: BlockSet = field(default_factory=BlockSet)
    #: Open replica handles, and open handles by recovery point.
    open_replicas: int = 0
    open_points: dict[int, int] = field(default_factory=dict)
    #: The diff area on disk has moved on without us (fault 15): what we know of it is stale.
    area_is_stale: bool = False
    #: Its points are being given up, and an empty one is written over it: what fails is not damage.
    area_is_wiped: bool = False
    #: A growth is being prepared in a thread, or was when the volume had to be closed all the same:
    #: then the file stays open, so that the thread never meets another one under its number.
    area_is_busy: bool = False
    #: A sync of the replica failed: it must be opened anew before it can be trusted.
    replica_failed: bool = False
    replica_error: OSError | None = None
    #: "power": a copy is durable before its block is overwritten; "process": written before.
    durability: Durability = "power"
    #: The files are overlays: what is written is forgotten.
    dry_run: bool = False
    #: The process is about to end, and cancels what would take too long.
    ending: bool = False
    nursery: trio.Nursery | None = None
    listeners: list[Callable[[], None]] = field(default_factory=list)
    #: Writes the diff area's generation to the state file, in a worker thread (`Protection.save`);
    #: None as soon as it is there, once an opening.
    note_generation: Callable[[], None] | None = None
    #: Writes to the state file up to which point copies may be lost, in a worker thread.
    note_spoilt: Callable[[int], None] = lambda _number: None
    #: Tells the ring how far the diff area has come (`WriteBuffer.note_area`). No I/O.
    note_area: Callable[[], None] = lambda: None

    def __post_init__(self) -> None:
        #: The one way to sync the replica.
        self.flush_replica = SharedSync(lambda: self.sync_replica())  # noqa: PLW0108 - tests patch it
        self.gate.waits_for = self.admin.waits_for

    @property
    def points(self) -> tuple[RecoveryPoint, ...]:
        """The live recovery points, oldest first."""
        return self.area.superblock.points if self.area else ()

    @property
    def serving(self) -> bool:
        """Whether the volume has been opened and its background tasks run."""
        return self.nursery is not None

    @property
    def block_count(self) -> int:
        """How many blocks the replica has, a short last one included."""
        return -(-self.size // self.block_size)

    def need_area(self) -> DiffArea:
        """The diff area, or VsnapError if it could not be opened."""
        if self.area is None:
            raise VsnapError(
                f"volume {self.name}: the diff area is not open",
                hint="'vsnapfs status' says why.",
                code="no-diff-area",
            )
        return self.area

    def log_area(self, event_id: int, *, reason: str | None = None, **params: Any) -> None:
        """A volsnap event about the diff area, with its sizes."""
        area = self.need_area()
        self.log.log(
            "volsnap",
            event_id,
            volume=self.name,
            diff_area=str(area.backing.path),
            used=area.used,
            allocated=area.allocated,
            maximum=area.maximum,
            reason=reason,
            **params,
        )

    def need_index(self) -> DiffArea:
        """`need_area`, and VsnapError if there was no memory to read it."""
        area = self.need_area()
        if area.is_unread:
            raise self.out_of_memory("its diff area could not be read")
        return area

    def out_of_memory(self, what: str) -> VsnapError:
        """The error of an operation that an opening without enough memory has made impossible."""
        return VsnapError(
            f"volume {self.name} was opened without enough memory: {what}",
            hint="Free some memory, or raise the limit this process runs under; then unmount the "
            "volume, if it is mounted, and try again.",
            errno=errno.ENOMEM,
            exit_code=3,
            code="no-memory",
        )

    def sync_replica(self) -> None:
        """Make the replica durable; in a worker thread. OSError, then for every later call, too.

        Only for `flush_replica`, which sees to it that there is one at a time.
        """
        with self.admin.waits_for("a sync of the replica"):
            if self.replica_failed:
                raise OSError(errno.EIO, "an earlier sync of the replica failed")
            try:
                self.replica.sync()
                # Of a file without a name nothing survives, whatever the sync says.
                self.replica.check_linked()
            except BaseException as error:
                self.replica_failed = True
                if isinstance(error, OSError):
                    self.replica_error = error
                raise

    async def commit(self, **changes: Any) -> None:
        """Commit the superblock. The caller holds `area_lock`. FaultError 7, 13, 14, 15."""
        area = self.need_area()

        def work() -> None:
            if area.needs_rollback:
                area.rollback()
            area.commit(**changes)
            if self.note_generation is not None:
                # A copy of the area from before, put back, must look old to the next opening (15).
                with suppress(OSError, MemoryError):
                    self.note_generation()
                    self.note_generation = None

        with self.admin.waits_for("a write to the diff area's superblock"):
            await in_thread(work)
        with suppress(MemoryError):  # It counts. The next one tells the ring of it, too.
            self.note_area()

    def watch_over(self, area: DiffArea) -> None:
        """As the chosen durability has it; and what a failed sync may have lost is told."""
        area.relaxed = self.durability == "process"

        def tell(error: OSError | None) -> None:
            reason = error.strerror or str(error) if error is not None else "unexpected"
            self.tell_suspect(area, reason)
            with suppress(OSError, MemoryError):  # Should no commit pass, nothing else would know.
                self.note_spoilt(area.spoilt)

        area.tell_spoilt = tell

    def tell_suspect(self, area: DiffArea, reason: str) -> None:
        """Copies of all points of `area` may be lost: event 1045, if there are any."""
        count = len(area.superblock.points)
        if count and not self.dry_run:
            self.log.log("vsnapfs", 1045, volume=self.name, count=count, reason=reason)

    async def record_spoilt(self) -> None:
        """An operation on the diff area has failed that is no fault. If copies may be lost with it,
        their points are marked, as far as the area can be written. Not under `area_lock`.
        """
        if self.area is not None and self.area.spoilt:
            with suppress(FaultError, MemoryError):
                async with self.area_lock:
                    await self.commit()

    async def after_a_failed_sync(self) -> None:
        """Before anything in the diff area is made durable beside the barriers, which see to it
        themselves: no sync counts after one that failed. FaultError 7. Not under `area_lock`.
        """
        area = self.need_area()
        if area.needs_rollback:
            async with self.area_lock:
                await in_thread(area.rollback)

    async def mark_in_use(self) -> None:
        """Before the first change after a clean opening: a crash from here on is an unclean stop.

        FaultError 13, 14, 15.
        """
        async with self.area_lock:
            if self.area is not None and self.area.superblock.clean:
                await self.commit()

    def changed(self) -> None:
        """Tell the listeners that points or state are not what they were."""
        for listener in list(self.listeners):
            listener()


def now_ns() -> int:
    """The time, in nanoseconds since the epoch, UTC."""
    return time.time_ns()
