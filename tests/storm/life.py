"""A storm: one volume, several lives of the process that serves it, all from one seed."""

from __future__ import annotations

import contextlib
import errno
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar
from unittest import mock

import trio
import trio.testing
from powercuts import by_dice, everything_kept, nothing_kept
from rig import BLOCK, SMALLEST, Rig, acknowledged, slow_growth, small_steps
from simdisk import FOREVER, PowerLoss

from vsnapfs.errors import VsnapError
from vsnapfs.volume import Volume

from . import between
from .account import Account
from .between import Copies
from .clients import PATIENCE, Clients

T = TypeVar("T")
ENDS = ("kill", "kill", "power", "power", "close", "close at work", "goes on")
#: Events that say which points are no more.
_LOST = (14, 33, 35, 58)
_NO_CONSEQUENCE = ("superblock", "state file", "descriptor sector")


@dataclass
class Ended:
    """How a life has ended. durably: all that is there then is on the disk.

    seen: the points, if somebody has looked while the volume was closed.
    """

    powerless: bool
    durably: bool
    goes_on: bool
    seen: dict[int, bytes] | None = None


class Storm:
    """See the package's note. Whatever is not given is chosen by the seed."""

    def __init__(self, seed: int, *, lives: int = 8, **given: Any) -> None:
        self.seed = seed
        self.lives = lives
        dice = self.dice = random.Random(seed)
        pick: dict[str, Any] = {
            "on_full": dice.choice(["offline", "evict"]),
            "size": dice.choice([n * BLOCK + rest for n, rest in _SIZES]),
            "buffer": dice.choice([0, 24_097, 28_096, 65_536, 70_001, 99_999]),
            "extra": dice.choice([0, 1, 9, 40, 200]),
            "device": dice.random() < 0.25,
            "zero_blocks": dice.choice(["flag", "flag", "copy"]),
            "cached": dice.random() < 0.4,
            "tight": dice.random() < 0.3,
            "growth": dice.choice([0, 0, 30]),
            "disk": dice.choice([0, 0, 2, 8]),
            "ends": ENDS,
            "failures": dice.random() < 0.4,
            "rot": dice.random() < 0.3,
            "copies": dice.random() < 0.3,
            # By dice of its own: a seed from before it was thought of is still the same storm.
            "process": random.Random(f"process {seed}").random() < 0.25,
        }
        assert set(given) <= set(pick), given
        chosen = self.chosen = pick | given
        self.given = given
        self.rig = Rig(
            size=chosen["size"],
            maximum=SMALLEST + chosen["extra"] * BLOCK,
            on_full=chosen["on_full"],
            buffer=chosen["buffer"],
            area_is_device=chosen["device"],
            zero_blocks=chosen["zero_blocks"],
            grow_timeout=600.0,
            durability="process" if chosen["process"] else "power",
            seed=seed * 1000,
        )
        self.rig.clock = partial(trio.testing.MockClock, autojump_threshold=0)
        host = self.rig.host
        host.cached = chosen["cached"]
        if chosen["tight"]:
            host.capacity += dice.choice([10, 40]) * BLOCK - host.free()
        self.clients = Clients(self.rig, Account(chosen["size"], dice), dice)
        self.clients.tight = chosen["tight"]
        self.copies: list[Copies] = []
        self.copied_in_use: Copies | None = None

    def __repr__(self) -> str:
        given = "".join(f", {name}={value!r}" for name, value in self.given.items())
        return f"Storm({self.seed}, lives={self.lives}{given})"

    @property
    def account(self) -> Account:
        return self.clients.account

    def run(self) -> None:
        """AssertionError, or what else goes wrong, with what happened before in a note."""
        steps = self.chosen["growth"]
        try:
            with (
                small_steps(),
                slow_growth(steps) if steps else contextlib.nullcontext(),
                mock.patch("rig._inline", self._in_thread),
            ):
                for _ in range(self.lives):
                    self._live()
        except BaseException as error:
            while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
                error = error.exceptions[0]
            lines = [f"{self!r}, {self.chosen}", *map(repr, self.clients.trace[-60:])]
            lines += [f"event {event}" for event in self.rig.log.events[-15:]]
            error.add_note("\n".join(lines))
            raise error from None

    async def _in_thread(self, function: Callable[..., T], *args: Any, **_options: Any) -> T:
        """As `rig._inline`, and others may take as many steps meanwhile as the disk is slow."""
        slow = self.chosen["disk"]
        await trio.lowlevel.checkpoint()
        with trio.CancelScope(shield=True):
            try:
                for _ in range(self.dice.randrange(slow) if slow else 0):
                    await trio.lowlevel.checkpoint()
                return function(*args)
            finally:
                for _ in range(1 + (self.dice.randrange(slow) if slow else 0)):
                    await trio.lowlevel.checkpoint()

    # -- one life -------------------------------------------------------------------------------

    def _live(self) -> None:
        dice, clients, rig = self.dice, self.clients, self.rig
        end = dice.choice(self.chosen["ends"])
        if end in ("kill", "power"):
            rig.run(_nothing)  # Ending while it opens is for other tests.
            rig.host.stop_at = rig.host.operations + dice.randrange(1, dice.choice([30, 200, 600]))
        clients.injected, clients.lost_syncs = [], 0
        if self.chosen["failures"] and dice.random() < 0.6:
            self._inject()
        clients.say("life", end)
        clients.closing = stopped = False
        self.copied_in_use = None
        try:
            rig.run(self._work, end)
        except PowerLoss:
            stopped = True
        except trio.TooSlowError:
            raise AssertionError("something hangs") from None
        except (VsnapError, OSError) as error:
            if rig.volume is not None or not clients.failing:
                raise
            clients.say("not opened", error)
        rig.host.stop_at = None
        self._end(end, stopped=stopped)

    def _inject(self) -> None:
        dice = self.dice
        file = dice.choice(["area", "area", "replica", "state"])
        operation = dice.choice(["write", "sync", "allocate", "truncate", "read", None])
        if self.chosen["process"] and dice.random() < 0.5:
            file, operation = "area", "sync"  # What this durability lives by.
        full = operation == "allocate" and dice.random() < 0.5
        failure = self.rig.host.fail(
            file,
            operation,
            errno.ENOSPC if full else errno.EIO,
            nth=dice.randrange(1, dice.choice([6, 40])),
            times=dice.choice([1, 1, 3, FOREVER]),
            # The area's sectors are written whole or not at all.
            partly=file == "replica" and operation == "write" and dice.random() < 0.5,
        )
        self.clients.injected = [failure]
        self.clients.say("failure", file, operation, failure.nth, failure.times)

    async def _work(self, volume: Volume, end: str) -> None:
        dice, clients = self.dice, self.clients
        with trio.fail_after(PATIENCE):
            async with trio.open_nursery() as nursery:
                for _ in range(dice.choice([1, 3, 5])):
                    nursery.start_soon(clients.writer, volume, dice.choice([2, 6, 12]))
                for _ in range(dice.choice([0, 1, 3])):
                    nursery.start_soon(clients.reader, volume, dice.choice([2, 6]))
                for _ in range(dice.choice([1, 1, 2])):
                    nursery.start_soon(clients.administrator, volume, dice.choice([2, 5, 9]))
                if end == "kill" and self.chosen["copies"]:
                    nursery.start_soon(self._copy, volume)
                if end == "close at work":
                    await self._close(volume)
                    nursery.cancel_scope.cancel()

    async def _copy(self, volume: Volume) -> None:
        """Of what is in use: no backup, but a ring that is there knows it for what it is."""
        for _ in range(self.dice.randrange(200)):
            await trio.lowlevel.checkpoint()
        if volume.buffer.ring is not None:
            self.copied_in_use = between.copied(self.clients, powerless=False)

    async def _close(self, volume: Volume) -> None:
        for _ in range(self.dice.randrange(400)):
            await trio.lowlevel.checkpoint()
        self.clients.closing = True
        await volume.close()

    def _end(self, end: str, *, stopped: bool) -> None:
        """stopped: the host had to stop before an operation."""
        rig, clients = self.rig, self.clients
        clients.notice_lost()
        volume, interrupted = rig.volume, True
        powerless = end == "power"
        if volume is not None and volume.core.replica_failed:
            self.account.lossy = True
        if powerless:
            self.account.may_be_spoilt = True
            rig.crashed(
                self.dice.choice([nothing_kept, everything_kept, by_dice(self.dice.choice)])
            )
        elif end == "kill" or stopped:
            rig.killed()
        elif end == "close at work" and volume is not None and volume._closed:
            rig.volume = None
        elif end == "close" and volume is not None:
            rig.host.failures.clear()
            rig.close()
            interrupted = False
        elif end != "goes on" or volume is None:
            rig.killed()
        else:
            interrupted = False
        clients.mend()
        clients.counts[end] += 1
        clients.counts["failed"] += sum(failure.fired for failure in clients.injected)
        clients.was_failing = clients.failing or (clients.was_failing and rig.volume is not None)
        if interrupted:
            clients.say("ended", end)
            self.account.interrupted()
        how = Ended(
            powerless=powerless,
            durably=powerless or (end == "close" and not clients.failing),
            goes_on=rig.volume is not None,
        )
        if rig.volume is None:
            self._between(how)
        clients.injected = []
        if not rig.run(self._look, how):
            # The area could not be read, for as long as it failed: nothing can be told.
            rig.close()
            how.goes_on = False
            assert rig.run(self._look, how), "the diff area stays away"
        self._come_online()
        clients.damaged = False

    def _between(self, how: Ended) -> None:
        dice, clients = self.dice, self.clients
        sound = not clients.failing and not clients.was_failing
        if self.chosen["copies"] and sound:
            # With durability "process" one that was made since the last commit is not noticed.
            copies = None if self.chosen["process"] else self.copied_in_use
            if copies and clients.rig.host.memory and not self.account.ring_removed:
                clients.say("copy of what was in use")
                between.look_at_old_area(clients, copies)
            elif self.copies and dice.random() < 0.4:
                self._put_back(how)
            if dice.random() < 0.5:
                self.copies.append(between.copied(clients, powerless=how.powerless))
        if self.chosen["rot"] and sound and dice.random() < 0.6:
            between.rot(clients, powerless=how.powerless)
        if self.chosen["buffer"] and dice.random() < 0.3:
            how.seen = between.look_while_closed(clients)

    def _put_back(self, how: Ended) -> None:
        self.clients.counts["old copy"] += 1
        number = self.dice.choice([len(self.copies) - 1, self.dice.randrange(len(self.copies))])
        what = self.dice.random()
        if what < 0.5:
            between.put_back_all(self.clients, self.copies[number])
            del self.copies[number + 1 :]  # They are of a time that has not been.
            how.powerless = how.durably = False
        elif what < 0.75:
            between.look_at_old_area(self.clients, self.copies[number])
        elif self.chosen["on_full"] == "offline" and not how.powerless:
            # With `evict` it is the only one that may know of points that were given up.
            between.put_back_state(self.clients, self.copies[number])

    # -- afterwards -----------------------------------------------------------------------------

    async def _look(self, volume: Volume, how: Ended) -> bool:
        """Compare all, and bring it online; False if it was opened without its diff area."""
        account, clients, core = self.account, self.clients, volume.core
        area = core.area
        if area is None or area.is_unread:
            return False
        assert not (account.offline and volume.protection.is_online), "online, and nobody asked"
        self._look_at_suspects(volume)
        doubtful, account.doubtful = account.doubtful, None
        if doubtful is not None and area.superblock.restoring == doubtful.number:
            account.restoring = account.restoring or doubtful
        content = acknowledged(self.rig, volume)
        spoilt = account.restoring is not None and account.restoring.number <= account.suspect
        if not (how.goes_on and core.replica_failed) and not spoilt:
            account.check(content, "afterwards", durable=how.powerless)
        await self._look_at_points(volume, how.seen)
        if not how.goes_on and not area.superblock.restoring:
            account.restoring = None  # Ended by this opening, or never begun.
        if account.restoring is None and not core.replica_failed:
            account.adopt(content, durably=how.durably)
            account.lossy = False
            account.ring_removed &= how.goes_on  # Its place is taken with the next write, if ever.
        volume.check_invariants()
        sizes = volume.status()["diff_area"]
        assert sizes["used"] <= sizes["allocated"] <= sizes["maximum"], sizes
        for _ in range(4):
            if volume.protection.is_online:
                break
            await clients.bring_online(volume)
            if not volume.protection.is_online and volume.points:
                await clients.delete(volume, volume.points[0].number)
        ignored = _NO_CONSEQUENCE if self.clients.was_failing else ()
        found = clients.problems((await volume.verify())["problems"], ignored)
        assert not found, found
        return True

    def _look_at_suspects(self, volume: Volume) -> None:
        """More points are suspect only for a reason, and not without a word."""
        account, area = self.account, volume.core.need_area()
        suspect = max(volume.suspect, area.spoilt)
        assert suspect >= account.suspect, "points are suspect no more"
        if suspect > account.suspect:
            assert self.chosen["process"]
            assert account.may_be_spoilt, f"points up to {suspect} are suspect, and why?"
            told = any(event == 1045 for _, event, _ in self.rig.log.events)
            hit = any(point.number <= suspect for point in volume.points)
            assert told or not hit, f"points up to {suspect} are suspect without a word"
            self.clients.say("suspect", suspect)
        account.suspect, account.may_be_spoilt = suspect, False

    async def _look_at_points(self, volume: Volume, seen: dict[int, bytes] | None) -> None:
        account = self.account
        live = [point.number for point in volume.points]
        gone = set(+account.deleting) | {
            number
            for _, event, params in self.rig.log.events
            if event in _LOST
            for number in params.get("points") or [params.get("point")]
        }
        self.rig.log.events.clear()
        for number in [one for one in account.points if one not in live]:
            assert number in gone, f"point {number} is lost without a word"
            del account.points[number]
        for number in live:
            content = await self._content(volume, number)
            if number in account.points:
                account.judge(number, account.points[number], content)
            else:
                account.appeared(number, content)
            if seen is not None and number > account.suspect:
                assert seen.get(number) == content, f"point {number} was another while closed"
        account.forget_requests()

    async def _content(self, volume: Volume, number: int) -> bytes:
        handle = volume.open_point(number)
        try:
            return bytes(await handle.read(0, self.account.size))
        except OSError:
            if number > self.account.suspect:
                raise
            return b""
        finally:
            handle.close()

    def _come_online(self) -> None:
        """What could not be brought online can be once it is opened anew."""
        rig, clients = self.rig, self.clients
        if rig.volume is None or rig.volume.protection.is_online:
            return
        clients.say("opened anew")
        rig.close()

        async def again(volume: Volume) -> None:
            if not volume.protection.is_online:
                await clients.bring_online(volume)
            protection = volume.protection
            assert protection.is_online, f"never online again: {protection.fault}"
            self.account.restoring = None
            self.account.adopt(acknowledged(rig, volume))

        rig.run(again)


_SIZES = ((9, 16), (12, 1008), (16, BLOCK - 512), (20, 0), (33, 0))


async def _nothing(_volume: Volume) -> None:
    return
