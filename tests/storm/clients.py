"""Who works with the volume: writers, readers and administrators, all at the same time."""

from __future__ import annotations

import contextlib
import errno
import random
from collections import Counter
from collections.abc import Awaitable
from typing import Any

import trio
from rig import BLOCK, SMALLEST, Rig, acknowledged, attempt
from simdisk import Failure, PowerLoss

from vsnapfs.errors import BusyError, FaultCode, VsnapError
from vsnapfs.volume import Volume
from vsnapfs.volume.handles import ReplicaHandle

from .account import WORD, Account, Cell, Point

#: Seconds of simulated time after which something hangs: more than anything may take.
PATIENCE = 7200


def real_problems(found: list[dict[str, Any]], ignored: tuple[str, ...] = ()) -> list[Any]:
    """What `verify` says beyond what an opening has just mended."""
    return [
        one for one in found if "healed when" not in one["message"] and one["what"] not in ignored
    ]


class Clients:
    """What they do, and what the account is told of it."""

    def __init__(self, rig: Rig, account: Account, dice: random.Random) -> None:
        self.rig = rig
        self.account = account
        self.dice = dice
        #: What happened, for whoever looks for the cause; and how often.
        self.trace: list[tuple[Any, ...]] = []
        self.counts: Counter[str] = Counter()
        self.injected: list[Failure] = []
        self.lost_syncs = 0
        self.closing = False
        #: The host's space is short; nothing that rotted has been mended yet.
        self.tight = self.damaged = False
        #: A failure may have left a copy of something bad, and nothing was opened anew since.
        self.was_failing = False

    def problems(self, found: list[dict[str, Any]], ignored: tuple[str, ...] = ()) -> list[Any]:
        """`real_problems`, but for those that only hit points of which nothing is promised."""
        suspect = self.account.suspect
        return [
            one
            for one in real_problems(found, ignored)
            if not one["points"] or max(one["points"]) > suspect
        ]

    def say(self, what: str, *more: object) -> None:
        self.trace.append((self.account.time, what, *more))
        self.counts[what] += 1

    @property
    def failing(self) -> bool:
        """Whether something has failed, or may, in this life."""
        return bool(self.injected)

    def notice(self) -> None:
        """After each answer. PowerLoss if the process is dead already: nobody hears it then."""
        if self.rig.host.dead:
            raise PowerLoss
        self.notice_lost()

    def notice_lost(self) -> None:
        """A failed sync of the replica loses what it should have written."""
        fired = sum(
            failure.fired
            for failure in self.injected
            if failure.name == "replica" and failure.operation in ("sync", None)
        )
        if fired > self.lost_syncs:
            self.account.lossy, self.lost_syncs = True, fired
        if any(one.fired and one.name == "area" for one in self.injected):
            self.account.may_be_spoilt = True

    async def _asked(self, work: Awaitable[Any]) -> VsnapError | OSError | None:
        error = await attempt(work)
        self.notice()
        return error

    # -- writers --------------------------------------------------------------------------------

    async def writer(self, volume: Volume, times: int) -> None:
        for _ in range(times):
            durably = self.dice.random() < 0.25
            if self.closing:
                return
            try:
                handle = volume.open_replica(synchronous=durably)
            except OSError:
                await trio.lowlevel.checkpoint()
                continue
            try:
                await self._with(volume, handle, durably=durably)
            finally:
                handle.close()

    async def _with(self, volume: Volume, handle: ReplicaHandle, *, durably: bool) -> None:
        protection = volume.protection
        for _ in range(self.dice.choice([1, 3, 6])):
            what, session = self.dice.random(), protection.session
            if what < 0.75:
                error = await self._write(handle, durably=durably)
            elif what < 0.9:
                error = await self._flush(handle)
            else:
                error = await self._read(handle)
            if error is not None and error.errno == errno.ENODEV:
                # Refused for that, and not because a restore had ended the handle before.
                alive = handle._session == session == protection.session - 1
                if alive and not protection.is_online:
                    self.account.told_offline()
                return

    def _cells(self) -> list[Cell]:
        cells = self.account.cells
        first = self.dice.randrange(len(cells))
        run = cells[first : first + self.dice.choice([1, 1, 2, 3, len(cells)])]
        busy = [at for at, cell in enumerate(run) if cell.busy]
        return run[: busy[0]] if busy else run

    async def _write(self, handle: ReplicaHandle, *, durably: bool) -> OSError | None:
        cells = self._cells()
        if not cells:
            await trio.lowlevel.checkpoint()
            return None
        zeros = self.dice.random() < 0.15
        contents = [
            bytes(cell.end - cell.start) if zeros else self._fresh(cell.start, cell.end)
            for cell in cells
        ]
        for cell in cells:
            cell.busy = True
        entries = self.account.begin(cells, contents)
        self.say("write", entries[0].number, cells[0].start, cells[-1].end, durably)
        error = await self._asked(handle.write(cells[0].start, b"".join(contents)))
        assert error is None or isinstance(error, OSError)
        for cell in cells:
            cell.busy = False
        if error is None:
            self.account.end(cells, entries, "done", durably=durably)
            return None
        assert error.errno in (errno.ENODEV, errno.ENOSPC, errno.EIO), error
        assert error.errno != errno.ENOSPC or self.tight or self.failing, error
        assert error.errno != errno.EIO or self.failing, error
        # A refusal leaves everything as it was; what fails behind the write does not.
        refused = error.errno == errno.ENOSPC or (error.errno == errno.ENODEV and not durably)
        self.account.end(cells, entries, "refused" if refused else "torn")
        self.say("write failed", entries[0].number, error.errno)
        return error

    def _fresh(self, start: int, end: int) -> bytes:
        number = (self.account._numbers + 1).to_bytes(8, "little")
        words = range(start // WORD, end // WORD)
        return b"".join(number + word.to_bytes(8, "little") for word in words)

    async def _flush(self, handle: ReplicaHandle) -> OSError | None:
        asked = self.account.ask_flush()
        error = await self._asked(handle.flush())
        assert error is None or isinstance(error, OSError)
        self.say("flush" if error is None else "flush failed", error and error.errno)
        if error is None:
            self.account.flushed(asked)
        return error

    async def _read(self, handle: ReplicaHandle) -> OSError | None:
        account = self.account
        asked, before = account.tick(), [list(account.may_show(cell)) for cell in account.cells]
        try:
            content = bytes(await handle.read(0, account.size))
        except OSError as error:
            return error
        finally:
            self.notice()
        for cell, known in zip(account.cells, before, strict=True):
            later = [entry for entry in cell.log if entry.start > asked]
            account.check_cell(
                cell,
                content,
                [*known, *later, *(account.may_show(cell) if account.lossy else [])],
                "a read",
            )
        return None

    # -- readers --------------------------------------------------------------------------------

    async def reader(self, volume: Volume, times: int) -> None:
        for _ in range(times):
            numbers = [point.number for point in volume.points]
            if numbers:
                await self.read_point(volume, self.dice.choice(numbers))
            else:
                await trio.lowlevel.checkpoint()

    async def read_point(self, volume: Volume, number: int) -> None:
        """Piece by piece, others work between them; judged as a whole."""
        try:
            handle = volume.open_point(number)
        except OSError:
            return
        step = self.dice.choice([BLOCK, 1000, 1 << 20, 3 * BLOCK])
        slowly, parts = self.dice.random() < 0.5, []
        try:
            for at in range(0, self.account.size, step):
                parts.append(bytes(await handle.read(at, step)))
                for _ in range(self.dice.randrange(20) if slowly else 0):
                    await trio.lowlevel.checkpoint()
        except OSError as error:
            known = self.failing or number <= self.account.suspect
            if error.errno == errno.ESTALE or (error.errno == errno.EIO and known):
                return
            raise
        finally:
            handle.close()
            self.notice()
        if number in self.account.points:
            self.account.judge(number, self.account.points[number], b"".join(parts))

    # -- administrators -------------------------------------------------------------------------

    async def administrator(self, volume: Volume, times: int) -> None:
        for _ in range(times):
            for _ in range(self.dice.choice([0, 3, 20, 60])):
                await trio.lowlevel.checkpoint()
            if self.closing:
                return
            await self._administer(volume, [point.number for point in volume.points])
            if not volume.protection.is_online and not self.closing:
                await self.bring_online(volume)

    async def _administer(self, volume: Volume, numbers: list[int]) -> None:
        what = self.dice.random()
        if what < 0.4 and len(numbers) < 8:
            await self._create(volume)
        elif what < 0.52 and numbers:
            await self.delete(volume, self.dice.choice(numbers))
        elif what < 0.62 and numbers:
            await self._restore(volume, self.dice.choice(numbers))
        elif what < 0.78:
            await self._resize(volume)
        elif what < 0.82:
            self.say("offline")
            if await self._asked(volume.go_offline()) is None and not volume.protection.is_online:
                self.account.told_offline()
        elif what < 0.86:
            await self._verify(volume)
        elif what < 0.88:
            await self._asked(volume.repair(dry_run=self.dice.random() < 0.5))
        elif what < 0.9 and volume.buffer.ring is not None:
            self.say("ring removed")
            self.rig.host.memory.pop(volume.buffer.ring.name.ring_id, None)
            self.account.ring_removed = True

    async def _create(self, volume: Volume) -> None:
        account = self.account
        point, asked = Point(account.tick(), loosely=account.lossy), account.ask_flush()
        account.creating.append(point)
        self.say("create")
        try:
            number = (await volume.create_point()).number
        except (VsnapError, OSError) as error:
            self.say("create failed", error)
            point.end = account.tick()
            if not self.failing:  # Or half of it may have happened.
                account.creating.remove(point)
            return
        finally:
            self.notice()
        point.end, point.loosely = account.tick(), point.loosely or account.lossy
        self.say("created", number)
        account.creating.remove(point)
        assert number not in account.points, f"number {number} is used twice"
        if number not in account.deleted:  # It is listed, and can be, before this is answered.
            account.points[number] = point
        account.flushed(asked)  # The replica, which it falls through to, was synced.

    async def delete(self, volume: Volume, number: int) -> None:
        self.account.deleting[number] += 1
        self.say("delete", number)
        error = await self._asked(volume.delete_point(number, force=self.dice.random() < 0.7))
        if error is None:
            self.account.points.pop(number, None)
            self.account.deleted.add(number)
        if error is None or isinstance(error, BusyError):
            self.account.deleting[number] -= 1  # Another failure may have happened half.

    async def _restore(self, volume: Volume, number: int) -> None:
        account = self.account
        if number in account.points and account.points[number].content is None:
            await self.read_point(volume, number)
        point = account.points.get(number)
        if point is None or point.content is None or account.restoring is not None:
            return
        if number <= account.suspect:
            return  # With what?
        one = account.begin_restore(number, point.content)
        self.say("restore", number)
        error = await self._asked(volume.restore(number, force=self.dice.random() < 0.8))
        area = volume.core.area
        if error is None:
            account.end_restore(one, "done", again=False)
        elif area is not None and area.superblock.restoring == number:
            account.end_restore(one, "torn", again=True)
        elif isinstance(error, VsnapError) and error.code != "fault":
            account.end_restore(one, "refused", again=False)
        else:
            account.end_restore(one, "torn", again=False)
            account.doubtful = one
        self.say("restored" if error is None else "restore failed", number, error)

    async def _resize(self, volume: Volume) -> None:
        area = volume.core.area
        size = SMALLEST + self.dice.choice([0, 1, 5, 20, 70, 300]) * BLOCK
        if self.dice.random() < 0.4 and area is not None:
            size = area.minimum_for_used
        self.say("resize", size)
        await self._asked(volume.resize(size))

    async def _verify(self, volume: Volume) -> None:
        with contextlib.suppress(VsnapError):
            found = self.problems((await volume.verify())["problems"])
            assert not found or self.failing or self.was_failing or self.damaged, found

    # -- the way back ---------------------------------------------------------------------------

    def mend(self) -> None:
        """The host works again."""
        self.rig.host.failures.clear()

    async def bring_online(self, volume: Volume) -> None:
        """As an administrator does who has read why it is offline."""
        account, core = self.account, volume.core
        if self.failing and self.dice.random() < 0.6:
            self.mend()
        fault = volume.protection.fault
        if fault is not None and fault.code == FaultCode.DIFF_AREA_FULL:
            numbers = [point.number for point in volume.points]
            if numbers and self.dice.random() < 0.4:
                await self.delete(volume, numbers[0])
            elif core.area is not None and self.dice.random() < 0.6:
                await self._asked(volume.resize(core.area.maximum + 40 * BLOCK))
        account.ask_online()
        error = await self._asked(volume.online())
        account.end_online()
        self.say("online" if error is None else "online failed", error)
        if error is not None:
            return
        if account.lossy:
            self.look_after_loss(volume)
        self._end_of_restore(volume)

    def look_after_loss(self, volume: Volume) -> None:
        """The replica has been opened anew: it shows what the disk has."""
        if self.account.restoring is not None:
            return  # It may have written already, or not.
        content = acknowledged(self.rig, volume)
        self.account.check(content, "after a loss")
        self.account.adopt(content, afresh=False)
        self.account.lossy = volume.core.replica_failed

    def _end_of_restore(self, volume: Volume) -> None:
        """One that was stopped in the middle goes on when the volume comes online."""
        account, area = self.account, volume.core.area
        one = account.restoring
        if one is None or area is None or area.superblock.restoring:
            return
        if not volume.protection.is_online or any(e.fate == "asked" for e in one.entries):
            return
        account.restoring = None
        if one.number not in account.points or one.number <= account.suspect:
            return  # Deleted by force: it never ends. Or nobody knows what it ends with.
        content = acknowledged(self.rig, volume)
        begun = one.entries[0].start
        for cell, entry in zip(account.cells, one.entries, strict=True):
            if not cell.busy and all(other.start <= begun for other in cell.log):
                assert cell.of(content) == entry.data, f"restore of {one.number}: {cell.start}"
                entry.fate, entry.end = "done", account.tick()
                cell.now, cell.disk = [entry], [*cell.disk, entry]
