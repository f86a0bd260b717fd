"""One trial: operations at the same time, and what must hold afterwards."""

from __future__ import annotations

import errno
import random
from pathlib import Path
from typing import Any
from unittest import mock

import trio
import trio.testing
from powercuts import by_dice, everything_kept, nothing_kept
from rig import (
    BLOCK,
    SMALLEST,
    MemoryLog,
    acknowledged,
    attempt,
    flush,
    pattern,
    read_point,
    read_points,
    read_replica,
    small_steps,
    write,
)
from simdisk import FOREVER, Host, SimBacking

from vsnapfs.errors import FaultCode
from vsnapfs.volume import Volume

from .history import Seen, applied, explained
from .operations import OPERATIONS, SCENES
from .world import SIZE, Content, Ended, Points, Stop, World


class _Files:
    """Where giving up looks for the diff area."""

    def __init__(self, w: World) -> None:
        self.w = w

    def open(self, _path: Path, *, follow: bool) -> SimBacking:
        del follow
        return self.w.rig.host.open("area")


class Trial:
    """See the module's note. Whatever is not given is chosen by the seed."""

    def __init__(self, seed: int, **given: Any) -> None:
        self.seed = seed
        dice = self.dice = random.Random(seed)
        pick: dict[str, Any] = {
            "policy": dice.choice(["offline", "evict"]),
            "buffer": dice.choice([0, 64 << 10]),
            "scene": dice.choice(list(SCENES)),
            "operations": dice.choices(list(OPERATIONS), k=dice.choice([2, 2, 2, 3, 3, 4])),
            "stops": [(dice.randint(1, dice.choice([7, 20])), dice.random() < 0.5) for _ in "123"],
            "backwards": dice.random() < 0.5,
            "seconds": dice.choice([0, 0, 0, 0, 11, 35, 700]),
            "reopen": dice.random() < 0.25,
            "end": dice.choice(["close", "kill", "power", "kill at once", "power at once"]),
            "kept": dice.choice(["nothing", "everything", "dice"]),
            "failure": None,
        }
        if dice.random() < 0.35:
            file = dice.choice(["area", "area", "state", "replica"])
            operation = dice.choice(["write", "sync", "read", "allocate", None])
            number = dice.choice([errno.EIO, errno.EIO, errno.ENOSPC])
            when = dice.randint(1, 5), dice.choice([1, 1, FOREVER])
            pick["failure"] = (dice.randrange(2), file, operation, number, *when)
        self.chosen = pick | given
        self.w = World(dice, self.chosen["policy"], self.chosen["buffer"])

    def __repr__(self) -> str:
        return f"Trial({self.seed}, **{self.chosen})"

    def run(self) -> None:
        """AssertionError, or what else goes wrong, with all that was chosen in a note."""
        try:
            with (
                small_steps(),
                mock.patch("vsnapfs.volume.giveup.FileBacking", _Files(self.w)),
            ):
                self._run()
        except BaseException as error:
            while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
                error = error.exceptions[0]
            error.add_note(f"{self!r}\n{self.w.history}")
            raise error from None

    def _run(self) -> None:
        w, rig = self.w, self.w.rig
        base = self._set_up()
        seen = ended = None
        try:
            seen = w.run(lambda: self._together(base))
        except BaseException:
            if not rig.host.dead:
                raise
            ended = self._next
        if ended is not None:
            rig.host, rig.volume = ended, None
        elif w.closed:
            rig.killed()  # What a growth's thread has left open, the end of the process closes.
        elif self.chosen["end"].startswith("power"):
            rig.crashed(self._choose())
        elif self.chosen["end"].startswith("kill"):
            rig.killed()
        else:
            w.run(self._close)
            rig.volume = None
        rig.host.failures.clear()
        w.run(lambda: self._again(base, seen))

    def _set_up(self) -> tuple[Content, Points]:
        """Returns the replica's content, and the points."""
        w = self.w

        async def scene() -> None:
            async with w.opened() as volume:
                await SCENES[self.chosen["scene"]](w, volume)
                await _settle()

        w.run(scene)
        w.rig.host.failures.clear()
        if self.chosen["reopen"]:
            w.run(self._close)
            w.rig.volume = None
        content: Content = bytes(SIZE)
        points: Points = {}
        for asked in w.history:
            if asked.ok:
                content, points = applied(asked, content, points, dict(points))
        lost = w.lost()
        w.history.clear()
        kept = {number: known for number, known in points.items() if number not in lost}
        return None if w.half_restored else content, kept

    async def _close(self) -> None:
        async with self.w.opened() as volume:
            await volume.close()

    def _choose(self) -> Any:
        by = {"nothing": nothing_kept, "everything": everything_kept}
        return by.get(self.chosen["kept"]) or by_dice(self.dice.choice)

    async def _together(self, base: tuple[Content, Points]) -> Seen | None:
        w, chosen = self.w, self.chosen
        names, host = chosen["operations"], w.rig.host
        ended = [trio.Event() for _ in names]

        async def one(name: str, done: trio.Event) -> None:
            if not w.closed:
                await OPERATIONS[name](w, volume)
            done.set()

        async with w.opened() as volume:
            async with trio.open_nursery() as nursery:
                for place, name in enumerate(names):
                    if chosen["failure"] and chosen["failure"][0] == place:
                        w.failing = True
                        _, file, operation, number, nth, times = chosen["failure"]
                        host.fail(file, operation, number, nth=nth, times=times)
                    if place + 1 < len(names):
                        w.threads.stops.append(Stop(*chosen["stops"][place]))
                    nursery.start_soon(one, name, ended[place])
                    await _settle()
                    if chosen["seconds"] and place == len(names) - 1:
                        w.clock.jump(chosen["seconds"])
                        await _settle()
                stops = w.threads.stops
                if chosen["end"].endswith("at once"):
                    self._end_now()
                for stop in reversed(stops) if chosen["backwards"] else stops:
                    w.threads.go(stop)
                    await _settle()
                for _ in range(12):
                    if all(done.is_set() for done in ended):
                        break
                    w.clock.jump(61)
                    await _settle()
                hanging = [
                    name for name, done in zip(names, ended, strict=True) if not done.is_set()
                ]
                assert not hanging, "never answered"
            host_lost = any(
                failure.fired and failure.name == "replica" for failure in host.failures
            )
            host.failures.clear()
            if w.closed:
                return None
            await _settle()
            self._is_at_rest(volume)
            seen = await self._look(volume, base)
            if host_lost or volume.core.replica_failed:
                seen.content = None
            explained(w, base, seen)
            return seen

    def _end_now(self) -> None:
        """What is written to shared memory from here on is written by nobody."""
        host, memory = self.w.rig.host, self.w.rig.host.memory
        kill = self.chosen["end"].startswith("kill")
        self._next: Host = host.kill() if kill else host.power_failure(self._choose())
        if kill:
            self._next.memory = {name: bytearray(ring) for name, ring in memory.items()}
        for stop in self.w.threads.stops:
            self.w.threads.go(stop)
        raise Ended

    def _is_at_rest(self, volume: Volume) -> None:
        core, protection = volume.core, volume.protection
        volume.check_invariants()
        assert not core.gate.closed
        assert not core.area_lock.locked()
        assert not core.grow_lock.locked()
        assert not core.shape_lock.locked()
        assert not protection.restoring
        if protection.is_online and not volume.buffer.pending:
            assert not volume.room.promised, "slots that nobody uses"
        switched = any(one.kind in ("offline", "give up") for one in self.w.history)
        known = self.w.failing or self.chosen["seconds"] or switched
        if not known and self.chosen["scene"] not in (
            "offline",
            "offline by a fault",
            "half restored",
        ):
            fault = protection.fault
            full = fault is not None and fault.code is FaultCode.DIFF_AREA_FULL
            assert protection.is_online or (full and self.w.policy == "offline"), fault

    async def _look(self, volume: Volume, base: tuple[Content, Points]) -> Seen:
        w, points = self.w, {}
        volume.status()
        for point in volume.points:
            try:
                points[point.number] = await read_point(volume, point.number)
            except OSError:  # A new area had been begun in its place.
                assert w.failing
                assert any(one.kind == "give up" for one in w.history)
        area, fault = volume.core.area, volume.protection.fault
        mixture = area is None or area.superblock.restoring or base[0] is None
        content = None if mixture else acknowledged(w.rig, volume)
        code = fault.code if fault is not None else None
        return Seen(content, points, volume.protection.is_online, code)

    async def _again(self, base: tuple[Content, Points], before: Seen | None) -> None:
        """Opened once more: what there was, and it works."""
        w = self.w
        power = self.chosen["end"].startswith("power")
        asked = {one.kind for one in w.history}
        lost = w.lost()
        async with w.opened() as volume:
            await _settle()
            volume.check_invariants()
            seen = await self._look(volume, base)
            if power or w.failing:
                seen.content = None
            if before is None:
                explained(w, base, seen, killed=True)
            elif not w.failing:
                assert seen.points == before.points
                assert (seen.online, seen.fault) == (before.online, before.fault)
                if None not in (seen.content, before.content):
                    assert seen.content == before.content
            else:
                for number, content in before.points.items():
                    if number not in seen.points:  # What failed may have happened all the same.
                        told = w.lost() if not before.online else lost
                        assert number in told or asked & {"delete", "give up"}, f"{number} is lost"
                    else:
                        assert seen.points[number] == content
            w.rig.log = MemoryLog()
            await self._works(volume, seen.points, must="give up" not in asked and not w.failing)

    async def _works(self, volume: Volume, points: dict[int, bytes], *, must: bool) -> None:
        w, used = self.w, max(self.w.created, default=0)
        error = await attempt(volume.online())
        if error is not None:
            assert not must, error
            await volume.online(give_up_recovery_points=True)
            points = {}
        await volume.resize(SMALLEST + 200 * BLOCK)
        for turn in range(3):
            number = (await volume.create_point()).number
            assert number > used, "a number is used twice"
            points[number] = bytes(await read_replica(volume))
            await write(volume, 0, pattern(9000 + turn, SIZE))
            await flush(volume)
        await _settle()
        volume.check_invariants()
        assert await read_points(volume) == points
        found = [one["message"] for one in (await volume.verify())["problems"]]
        assert all("healed when" in message for message in found), found
        assert w.rig.volume is volume
        await volume.close()


async def _settle() -> None:
    for _ in range(3):
        await trio.testing.wait_all_tasks_blocked()
