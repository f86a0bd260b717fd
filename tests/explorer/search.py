"""The search: workloads run, every state of their disks cut, every image judged, once.

Owns the explorer of one process. It remembers the hashes of all images it has judged (only
distinct ones count) and, for a while, what they turned out to hold: the same image may be left at
several instants, and be right at one and wrong at another. From one image in `AGAIN` the power
fails a second time, in the middle of the recovery. Leaves sharing out the work to `processes`.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar
from unittest import mock

import trio
import trio._core._run as trio_run
from rig import Rig, small_steps
from simdisk import Host

from . import shortcuts, ways_out
from .account import Play
from .expected import Expected, Span, State, carried_out_again
from .images import Choice, Scene, choices
from .judge import Judge, Outcome, Violation, compare
from .workloads import BEGINNINGS, OPERATIONS, Workload

T = TypeVar("T")
#: From one image in so many the power fails again during the recovery …
AGAIN = 64
#: (from one in so many where the process was killed and its write buffer is carried out) …
AGAIN_KILLED = 8
#: … and so many of the states that this leaves are looked at, for each change of the disk.
AGAIN_AT_MOST = 6
#: Of a workload that is sampled so many states of the disk are looked at.
AT_MOST = 150
BATCH = 200
_REMEMBERED = 4000


class _Clock:
    """Time for the engine: it passes by one with each look, and begins anew with each workload."""

    now = 0

    def time_ns(self) -> int:
        self.now += 1
        return self.now


_clock = _Clock()


@contextlib.contextmanager
def engine_in_one_thread(seed: int) -> Iterator[None]:
    """Everything in this thread, in an order that the seed decides, at a time that it decides."""
    trio_run._ALLOW_DETERMINISTIC_SCHEDULING = True
    trio_run._r.seed(seed)
    with (
        small_steps(),
        mock.patch("vsnapfs.volume.core.time", _clock),
        shortcuts.installed(),
    ):
        yield


@dataclass
class Prepared:
    """A beginning: the closed volume, and what is known of it."""

    rig: Rig
    scene: Scene
    play: Play


@dataclass
class Explorer:
    """See the module's note. To be used inside `engine_in_one_thread` and `trio.run`.

    limit: of each state so many choices, by dice, and of each workload at most AT_MOST states
    (None: all). again: one image in so many; again_killed: of those that a kill left. powercuts:
    the power fails, too. report: called now and then when there are new images.
    while_running, while_looking: what is wrong with the engine (see `mutants`).
    """

    seed: int = 0
    limit: int | None = None
    again: int = AGAIN
    again_killed: int = AGAIN_KILLED
    powercuts: bool = True
    report: Callable[[], None] | None = None
    while_running: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext
    while_looking: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext
    seen: set[int] = field(default_factory=set)
    new: list[int] = field(default_factory=list)
    states: int = 0
    workloads: int = 0
    judge: Judge = field(default_factory=Judge)
    _outcomes: dict[tuple[int, str], Outcome] = field(default_factory=dict)
    _judged: set[tuple[int, int, bool]] = field(default_factory=set)
    _contents: dict[bytes, bytes] = field(default_factory=dict)
    _prepared: dict[str, Prepared] = field(default_factory=dict)
    _dead: set[tuple[str, tuple[str, ...]]] = field(default_factory=set)

    # -- running ------------------------------------------------------------------------------

    async def prepare(self, name: str) -> Prepared:
        """The volume that workloads with this beginning start with."""
        if name not in self._prepared:
            beginning = BEGINNINGS[name]
            rig = Rig(
                size=beginning.size,
                maximum=beginning.maximum,
                on_full=beginning.on_full,
                area_is_device=bool(beginning.device),
                buffer=beginning.buffer,
            )
            if beginning.device:
                device = rig.host.files["area"]
                device.cache.size = device.disk.size = beginning.device
            _clock.now = 0
            async with trio.open_nursery() as nursery:
                play = Play(rig, nursery)
                await play.begin()
                for operation in beginning.done:
                    assert await OPERATIONS[operation](play), (name, operation)
                await play.flush()
                assert play.is_online
                await play.volume.close()
                nursery.cancel_scope.cancel()
            snapshot = rig.host.snapshot()
            assert not snapshot.pending()
            self._prepared[name] = Prepared(rig, Scene(snapshot), play)
        return self._prepared[name]

    async def run(self, workload: Workload) -> Play:
        """Run it, recording the states of the explored operations."""
        prepared = await self.prepare(workload.beginning)
        rig = prepared.rig.on(prepared.scene.host({}, light=False))
        trio_run._r.seed(self.seed)
        self.judge.beginning = workload.beginning
        _clock.now = 1000
        first = len(workload.operations) - workload.explored
        shortcuts.steps["others run"] = True
        try:
            async with trio.open_nursery() as nursery:
                play = Play(rig, nursery)
                await play.begin(prepared.play)
                for number, name in enumerate(workload.operations):
                    if number == first:
                        play.record()
                    applied = await OPERATIONS[name](play)
                    play.check()
                    if not applied and workload.explored == 1:
                        self._dead.add((workload.beginning, workload.operations[: number + 1]))
                        play.states.clear()
                        break
                rig.host.observer = None
                nursery.cancel_scope.cancel()
            return play
        finally:
            shortcuts.steps["others run"] = False

    def is_dead(self, workload: Workload) -> bool:
        """Whether it is known that one of its operations cannot apply."""
        operations = workload.operations
        return any(
            (workload.beginning, operations[:end]) in self._dead
            for end in range(1, len(operations) + 1)
        )

    # -- cutting and judging ------------------------------------------------------------------

    async def explore(self, workload: Workload) -> None:
        """Run a workload and judge all that it can leave. Violation: what is wrong, and where."""
        if workload.explored == 1 and self.is_dead(workload):
            return
        dice = random.Random(f"{self.seed} {workload}")
        self._judged.clear()
        self.workloads += 1
        try:
            await self.prepare(workload.beginning)
            with self.while_running():
                play = await self.run(workload)
        except BaseException as error:
            while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
                error = error.exceptions[0]
            if isinstance(error, Exception):
                raise Violation(f"{workload}\n  while running: {error!r}") from error
            raise
        with self.while_looking():
            await self._judge_all(workload, play.states, dice)

    async def _judge_all(
        self, workload: Workload, states: list[State], dice: random.Random
    ) -> None:
        rig = self._prepared[workload.beginning].rig
        steps = range(len(states))
        if self.limit is not None and len(states) > AT_MOST:
            steps = sorted(dice.sample(steps, AT_MOST))
        for step in steps:
            snapshot, span, last = states[step]
            scene = Scene(snapshot)
            ends = choices(scene, last, dice, self.limit) if self.powercuts else []
            for choice in ends:
                problem = await self._judge(rig, scene, choice, span, dice)
                if problem is not None:
                    raise Violation(
                        f"{workload}\n  step {step} of {len(states)}: "
                        f"{scene.words(choice)}\n  {problem}"
                    )
            if rig.buffer:
                choice = scene.everything()
                problem = await self._judge(rig, scene, choice, span, dice, killed=True)
                if problem is not None:
                    raise Violation(
                        f"{workload}\n  step {step} of {len(states)}: killed\n  {problem}"
                    )

    async def _judge(
        self,
        rig: Rig,
        scene: Scene,
        choice: Choice,
        span: Span,
        dice: random.Random,
        *,
        killed: bool = False,
    ) -> str | None:
        image, overlay = scene.build(choice)
        # With a write buffer a power failure loses what was acknowledged and not flushed, even
        # if the disk has lost nothing; a kill (`killed`) does not.
        nothing_lost = choice == scene.everything() and (killed or not rig.buffer)
        if killed:
            image ^= scene.memory_hash()
        key = image, span.number, nothing_lost
        if key in self._judged:
            return None
        self._judged.add(key)
        self.states += 1
        is_new = image not in self.seen
        found = self._outcomes.get((image, rig.config.on_full))
        if found is None:
            found = await self._look(rig, scene.host(overlay, light=True, killed=killed), image)
        problem = compare(found, span.expected, nothing_lost=nothing_lost)
        again = self.again_killed if killed else self.again
        if problem is None and is_new and image % again == 0:
            host = scene.host(overlay, light=False, killed=killed)
            problem = await self._fail_again(rig.on(host), span.expected, dice, killed=killed)
        if problem is None and is_new and killed and image % again == again // 2:
            make = partial(scene.host, overlay, light=False, killed=True)
            which = image // again % ways_out.COUNT
            for number in (which,) if again > 1 else range(ways_out.COUNT):
                problem = problem or await ways_out.try_one(rig, make, span.expected, number)
        return problem

    async def _look(self, rig: Rig, host: Host, image: int) -> Outcome:
        _clock.now = 1_000_000
        if image not in self.seen:
            self.seen.add(image)
            self.new.append(image)
            if self.report is not None and len(self.new) >= BATCH:
                self.report()
        found = await self.judge.look(rig, host)
        if len(self._outcomes) >= _REMEMBERED:
            self._outcomes.clear()
            self._contents.clear()
        known = self._contents
        found = found._replace(
            points={n: known.setdefault(c, c) for n, c in found.points.items()},
            replica=known.setdefault(found.replica, found.replica),
        )
        self._outcomes[image, rig.config.on_full] = found
        return found

    async def _fail_again(
        self, rig: Rig, expected: Expected, dice: random.Random, *, killed: bool
    ) -> str | None:
        """The power fails again while the first failure is being repaired. killed: that was the end
        of a process, and it may be killed again.
        """
        states: list[tuple[Any, Any]] = []
        host = rig.host
        memory = {ring: bytes(data) for ring, data in host.memory.items()}
        expected = replace(expected, sectors=carried_out_again(expected.sectors, memory))
        host.observer = lambda last: states.append((host.snapshot(), last))
        async with trio.open_nursery() as nursery:
            volume = await rig.open()
            await nursery.start(volume.run)
            host.observer = None
            nursery.cancel_scope.cancel()
        for step, (snapshot, last) in enumerate(states):
            second = Scene(snapshot)
            ends = [(choice, False) for choice in choices(second, last, dice, AGAIN_AT_MOST)]
            for choice, is_kill in [*ends, *[(second.everything(), True)] * killed]:
                image, changed = second.build(choice)
                image ^= second.memory_hash() if is_kill else 0
                self.states += 1
                found = self._outcomes.get((image, rig.config.on_full))
                if found is None:
                    left = second.host(changed, light=True, killed=is_kill)
                    found = await self._look(rig, left, image)
                problem = compare(found, expected, nothing_lost=is_kill)
                if problem is not None:
                    words = "killed" if is_kill else second.words(choice)
                    return f"and again while that is repaired, step {step}: {words}\n  {problem}"
        return None


def in_one_process(work: Callable[[Explorer], Awaitable[T]], explorer: Explorer | None = None) -> T:
    """Run `work` with an explorer."""
    made = explorer or Explorer()

    async def main() -> T:
        return await work(made)

    with engine_in_one_thread(made.seed):
        try:
            return trio.run(main)
        except BaseException as error:
            while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
                error = error.exceptions[0]
            raise error from None
