"""Others who have the replica or the diff area open for writing while the volume is open.

What they write is missing from the points (replica), or spoils their copies (diff area). The locks
keep QEMU away and us from each other; nothing keeps away dd, mkfs or losetup, which ask for no
lock. So it is noticed. inotify tells of each opening, whatever it is for, and of the end of each
opening for writing; /proc and /sys then tell who that is (`openers`), if he is still there. Once
for each writer that is seen, or that has been and gone, there is event 1052, but at most one a
minute for a file; the next one counts those in between.

Does not fire for us: our descriptors are open before the watch is set, this process and its
children are not looked at, commands that find the volume locked have not opened anything for
writing (`locks`), and closing the replica to open it anew is announced here first (`reopening`).

Promises: costs nothing while nobody opens the files, and at most a twentieth of one CPU however
often somebody does; never keeps a volume from being served, whatever fails here. Does not see: who
opens and closes in the same instant as `reopening`, truncate(2) by path, other names of a block
device, other machines.

For the replica the state file remembers up to which recovery point something may be missing, so
that it is said as long as such a point exists.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import trio

from .. import inotify, openers
from ..backing import Backing, FileBacking, Removed
from .administration import iso
from .core import Core, in_thread, now_ns

if TYPE_CHECKING:
    from .protection import Protection

#: Between two events about a file, and between looks while somebody is known, seconds.
_MINUTE = 60.0
#: After something stirred, once more: losetup opens the file, and makes the device after that.
_ONCE_MORE = 2.0
#: Between two looks at least, seconds, and so many times as long as the last one took.
_PAUSE, _TIMES = 1.0, 20.0
#: How long `status` waits for news of loop devices.
_NEWS = 1.0


@dataclass(eq=False)
class _Watched:
    """One file. closings: ends of openings for writing, not ours, not yet accounted for."""

    what: str
    backing: FileBacking
    file: openers.File
    closings: int = 0
    #: One entry for each closing of our own that is still to be told.
    own: deque[None] = field(default_factory=deque)
    writers: dict[openers.Writer, int] = field(default_factory=dict)
    loops: list[openers.Loop] = field(default_factory=list)
    #: The same for `status`, perhaps newer.
    shown: list[openers.Loop] = field(default_factory=list)
    count: int = 0
    since_ns: int = 0
    last: str | None = None
    untold: int = 0
    told_at: float = -math.inf
    unsaved: bool = False

    @property
    def names(self) -> list[str]:
        """Who has it open for writing now, as far as is known."""
        devices = [str(loop) for loop in self.shown if not loop.read_only]
        return [*(str(writer) for writer in self.writers), *devices]


class Onlookers:
    """See the module's note. `start` or nothing; then `run` while there is a loop; `finish`."""

    def __init__(self, core: Core, *, serving: bool = False) -> None:
        self._core = core
        self._serving = serving
        self.protection: Protection | None = None
        self._files: list[_Watched] = []
        self._by_watch: dict[int, _Watched] = {}
        self._inotify: inotify.Inotify | None = None
        #: Why nobody is noticed, None if all is well.
        self.unwatched: str | None = None
        self._stirred = False
        self._looking = trio.Lock()
        self._wake = trio.Event()
        self._asked = trio.Event()
        self._news = trio.Event()

    # -- watching ---------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to watch, right after the files were opened. Fails softly: see `unwatched`."""
        try:
            self._inotify = inotify.Inotify()
        except OSError as error:
            self._cannot(error)
        self._follow()
        self._core.listeners.append(self._follow)

    def _cannot(self, error: OSError) -> None:
        limits = "limits: sysctl fs.inotify.max_user_watches, max_user_instances"
        self.unwatched = f"inotify: {error.strerror or error} ({limits})"

    def _follow(self) -> None:
        """Watch the files that the volume has now: a new diff area may have been started."""
        area = self._core.area
        now: dict[str, Backing | None] = {
            "replica": self._core.replica,
            "diff area": area.backing if area is not None else None,
        }
        self._files = [file for file in self._files if file.backing is now[file.what]]
        for what, backing in now.items():
            known = any(file.what == what for file in self._files)
            if known or not isinstance(backing, FileBacking) or backing.fileno() < 0:
                continue
            fd = backing.fileno()
            watched = _Watched(what, backing, openers.File(fd, backing.path))
            self._files.append(watched)
            if self._inotify is not None:
                try:
                    self._by_watch[self._inotify.add(fd)] = watched
                except OSError as error:
                    self._cannot(error)
        if any(file.names for file in self._files):
            self._wake.set()  # There may be a new point, and somebody who can take from it.

    @contextmanager
    def reopening(self, backing: Backing) -> Iterator[None]:
        """Around `backing.reopen()`: its old descriptor is closed, and that is not somebody else.

        From any thread.
        """
        own = next((file.own for file in self._files if file.backing is backing), deque[None]())
        own.append(None)
        try:
            yield
        except BaseException as error:
            # A file keeps its descriptor then, and closes none; a device has dropped it first,
            # unless it was found to be gone even before that.
            if not backing.is_device or isinstance(error, Removed):
                with suppress(IndexError):
                    own.pop()
            raise

    def _drain(self) -> bool:
        """Account for what inotify has told. False if it tells nothing any more."""
        if self._inotify is None:
            return False
        try:
            told = self._inotify.read()
        except (OSError, MemoryError) as error:
            self.unwatched = f"inotify: {type(error).__name__}: {error}"
            return False
        for watch, mask in told:
            # With its queue full it does not say which file: both, then.
            full = mask & inotify.OVERFLOW
            for file in self._files if full else [self._by_watch[watch]]:
                if file.backing.fileno() < 0:
                    continue  # an area that was given up: we have closed it
                self._stirred = True
                if full:
                    # What it would have told of our own is lost as well, and no longer waited for:
                    # the next writer would be taken for it.
                    file.own.clear()
                if mask & inotify.WRITTEN and file.own:
                    file.own.pop()
                elif full or mask & inotify.WRITTEN:
                    file.closings += 1
        return True

    # -- looking ----------------------------------------------------------------------------------

    async def run(self) -> None:
        """Look whenever something stirs, until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._tell_news)
            if self._inotify is not None:
                nursery.start_soon(self._listen, self._inotify)
            # Who was there before us opens nothing any more.
            due = trio.current_time() if self._serving else math.inf
            while True:
                with trio.move_on_at(due):
                    await self._wake.wait()
                self._wake = trio.Event()
                began = trio.current_time()
                await self._look()
                took = trio.current_time() - began
                stirred, self._stirred = self._stirred, False
                await trio.sleep(max(_PAUSE, _TIMES * took))
                due = math.inf
                if any(file.names or file.untold for file in self._files):
                    due = trio.current_time() + _MINUTE
                if stirred:
                    due = trio.current_time() + _ONCE_MORE

    async def _listen(self, source: inotify.Inotify) -> None:
        while True:
            await trio.lowlevel.wait_readable(source.fileno())
            if not self._drain():
                return
            if self._stirred:
                self._wake.set()

    async def _tell_news(self) -> None:
        while True:
            await self._asked.wait()
            self._asked = trio.Event()
            files = list(self._files)
            with suppress(Exception):  # It is only for show; what was known is shown then.
                found = await trio.to_thread.run_sync(
                    _loops, [file.file for file in files], limiter=trio.CapacityLimiter(1)
                )
                for file, loops in zip(files, found, strict=True):
                    file.shown = loops
            self._news.set()
            self._news = trio.Event()

    async def news(self) -> None:
        """Before `status`: look for loop devices. Does not wait long for it."""
        if not self._files:
            return
        self._asked.set()
        with trio.move_on_after(_NEWS):
            await self._news.wait()

    async def _look(self) -> None:
        async with self._looking:  # What one look accounts for another one does not, too.
            try:
                await self._look_at_all()
            except Exception as error:  # noqa: BLE001 - a volume is served without this, too
                self.unwatched = f"{type(error).__name__}: {error}"

    async def _look_at_all(self) -> None:
        self._drain()
        files = list(self._files)
        closings = [file.closings for file in files]
        found = await trio.to_thread.run_sync(
            _search, [file.file for file in files], limiter=trio.CapacityLimiter(1)
        )
        for file, closed, (writers, loops) in zip(files, closings, found, strict=True):
            file.closings -= closed
            self._judge(file, bool(closed), writers, loops)
        await self._remember()

    def _judge(
        self,
        file: _Watched,
        closed: bool,
        writers: dict[openers.Writer, int],
        loops: list[openers.Loop],
    ) -> None:
        """Tell of whom nobody has been told. closed: somebody's opening for writing has ended."""
        before = {loop.device for loop in file.loops if not loop.read_only}
        now = {loop.device: loop for loop in loops if not loop.read_only}
        new = [str(writer) for writer in writers if writer not in file.writers]
        new += [str(loop) for device, loop in now.items() if device not in before]
        left = any(writers.get(writer, 0) < many for writer, many in file.writers.items())
        left = left or not before <= now.keys()
        # Until he went he may have written, and there may be points from after he was found.
        file.unsaved = file.unsaved or left
        file.writers, file.loops, file.shown = writers, loops, loops
        for who in new:
            self._found(file, who)
        if closed and not new and not left:
            self._found(file, None)  # He came and went between two looks.
        if file.untold and trio.current_time() - file.told_at >= _MINUTE:
            self._tell(file)

    def _found(self, file: _Watched, who: str | None) -> None:
        file.since_ns = file.since_ns or now_ns()
        file.count += 1
        file.untold += 1
        file.unsaved = True
        file.last = who or file.last
        if trio.current_time() - file.told_at >= _MINUTE:
            self._tell(file)

    def _tell(self, file: _Watched) -> None:
        path = {"replica": "device", "diff area": "diff_area"}[file.what]
        self._core.log.log(
            "vsnapfs",
            1052,
            volume=self._core.name,
            what=file.last,
            repeats=file.untold - 1 or None,
            **{path: os.fspath(file.backing.path)},
        )
        file.untold, file.told_at, file.last = 0, trio.current_time(), None

    async def _remember(self) -> None:
        """Write down up to which point the replica's others may have made something missing."""
        protection, points = self.protection, self._core.points
        replica = [file for file in self._files if file.what == "replica"]
        if protection is None or not any(file.names or file.unsaved for file in replica):
            return
        for file in replica:
            file.unsaved = False
        if points and points[-1].number > protection.saved.others_point:
            since = protection.saved.others_at if self.suspect_points else now_ns()
            changes = {"others_at": since, "others_point": points[-1].number}
            with suppress(OSError):  # The event says it as well.
                await in_thread(partial(protection.save, **changes))

    # -- what is known ----------------------------------------------------------------------------

    @property
    def suspect_points(self) -> int:
        """How many points may miss something that somebody else wrote, now or in another run."""
        limit = self.protection.saved.others_point if self.protection else 0
        return sum(point.number <= limit for point in self._core.points)

    def warnings(self) -> list[str]:
        """What is to be said when the volume is opened again, of others that were there before."""
        count = self.suspect_points
        if not count:
            return []
        some = "1 recovery point" if count == 1 else f"{count} recovery points"
        path = self._core.replica.path
        text = f"somebody else had {path} open for writing while the volume was in use"
        return [f"{text}: whatever he overwrote is missing from {some}"]

    def status(self, what: str) -> dict[str, Any]:
        """The keys of `status` about "replica" or "diff area"."""
        file = next((file for file in self._files if file.what == what), None)
        suspect, since = 0, file.since_ns if file else 0
        if what == "replica" and self.protection is not None:
            suspect = self.suspect_points
            since = self.protection.saved.others_at if suspect else since
        others = None
        if suspect or (file is not None and file.count):
            others = {
                "since": iso(since),
                "count": file.count if file else 0,
                "writers": file.names if file else [],
                "suspect_points": suspect,
            }
        loops = file.shown if file else []
        return {"others": others, "loop_devices": [loop._asdict() for loop in loops]}

    # -- the end ----------------------------------------------------------------------------------

    async def finish(self) -> None:
        """After the replica's identity has been taken: tell of all who were there until then."""
        self._drain()
        if self._stirred or any(file.closings or file.names for file in self._files):
            await self._look()
        for file in self._files:
            if file.untold:
                self._tell(file)
        self.stop()

    def stop(self) -> None:
        """End the watches. May be called twice."""
        with suppress(ValueError):
            self._core.listeners.remove(self._follow)
        self._files, self._by_watch = [], {}
        if self._inotify is not None:
            self._inotify.close()
            self._inotify = None


def _loops(files: list[openers.File]) -> list[list[openers.Loop]]:
    """In a worker thread: the loop devices of each file."""
    return [openers.loops(file) for file in files]


def _search(
    files: list[openers.File],
) -> list[tuple[dict[openers.Writer, int], list[openers.Loop]]]:
    """In a worker thread: the writers and the loop devices of each file."""
    return [
        (writers, loops)
        for writers, loops in zip(openers.writers(files), _loops(files), strict=True)
    ]
