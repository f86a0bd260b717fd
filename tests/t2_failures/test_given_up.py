"""Operations that whoever asked for them gives up before they begin: nothing has happened, then.

Each operation that changes something, from the table that the control socket serves, on a volume
whose next writes need copies: refused at the moment it begins, and cancelled at each step before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest import mock

import pytest
import trio
import trio.testing
from rig import BLOCK, SMALLEST, pattern, read_points, read_replica, write
from scene import Scene
from test_half_done import on_the_host

from vsnapfs.beginning import Abandoned, asked_by
from vsnapfs.daemon.operations import OPERATIONS
from vsnapfs.volume import Volume, points
from vsnapfs.volume.invariants import check

MAXIMUM = SMALLEST + 64 * BLOCK


@dataclass(frozen=True)
class Case:
    """An operation on a scene. offline: it is taken offline by hand before."""

    op: str
    params: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    offline: bool = False
    most_points: int = 100


CASES = {
    "create": Case("rp_create", {"label": "new"}),
    "create, the oldest gives way": Case("rp_create", options={"on_full": "evict"}, most_points=2),
    "delete": Case("rp_delete", {"point": 1}),
    "delete the newest": Case("rp_delete", {"point": "latest"}),
    "restore": Case("rp_restore", {"point": 1}),
    "restore by force": Case("rp_restore", {"point": 1, "force": True}),
    "grow": Case("resize", {"total": MAXIMUM + 16 * BLOCK}),
    "shrink": Case("resize", {"total": SMALLEST}),
    "offline": Case("offline"),
    "online": Case("online", offline=True),
    "give up points": Case("online", {"give_up_recovery_points": True}, offline=True),
    "repair": Case("repair"),
}


def test_every_operation_that_changes_something_is_tried() -> None:
    """A new operation needs a case here."""
    changing = {name for name, one in OPERATIONS.items() if not one.interruptible}
    assert {case.op for case in CASES.values()} == changing


async def everything(volume: Volume) -> dict[str, Any]:
    """All that an operation could have changed, as whoever uses the volume sees it."""
    area = volume.core.need_area()
    found: dict[str, Any] = {
        "state": volume.protection.state,
        "points": volume.points,
        "contents": await read_points(volume),
        "maximum": area.maximum,
        "restoring": volume.protection.restoring or area.superblock.restoring,
        "session": volume.protection.session,
        "held": volume.core.gate.closed,
        "limit": area.slots.limit,
        "running": volume.status()["operations"]["running"],
    }
    if volume.protection.is_online:
        found["replica"] = bytes(await read_replica(volume))
    return found


@contextmanager
def scene_of(case: Case, buffer: int) -> Iterator[Scene]:
    """Two points, and a write after them that needs a copy and, with a buffer, lies in it."""
    scene = Scene(buffer=buffer, maximum=MAXIMUM, **case.options)

    async def prepare(volume: Volume) -> None:
        if case.offline:
            await volume.go_offline()
        else:
            await write(volume, 6 * BLOCK + 5, pattern(4, BLOCK))

    with on_the_host(scene.rig), mock.patch.object(points, "MAX_POINTS", case.most_points):
        scene.run(prepare)
        yield scene


async def carry_out(volume: Volume, case: Case, may_begin: Callable[[], bool]) -> Any:
    with asked_by(may_begin):
        return await OPERATIONS[case.op](volume, case.params)


async def still_works(volume: Volume, case: Case) -> None:
    """The same operation, wanted this time, begins once and is carried out."""
    asked: list[bool] = []

    def may_begin() -> bool:
        asked.append(True)
        return True

    with trio.fail_after(60):
        await carry_out(volume, case, may_begin)
        assert asked == [True]
        check(volume)
        if volume.protection.is_online:
            await write(volume, 9 * BLOCK, pattern(5, BLOCK))


@pytest.mark.parametrize("buffer", [0, 1 << 20], ids=["direct", "buffered"])
@pytest.mark.parametrize("name", CASES)
def test_refused_when_it_would_begin_it_changes_nothing(name: str, buffer: int) -> None:
    """Nobody wants it any more when it would begin: nothing has changed, and it works later."""
    case = CASES[name]

    async def refused(volume: Volume) -> None:
        before = await everything(volume)
        with pytest.raises(Abandoned):
            await carry_out(volume, case, lambda: False)
        assert await everything(volume) == before
        check(volume)
        await still_works(volume, case)

    with scene_of(case, buffer) as scene:
        scene.run(refused)


class CancelAt(trio.abc.Instrument):
    """Cancels a task's scope at its n-th step, unless what it does has begun by then."""

    def __init__(self, step: int) -> None:
        self.left = step
        self.scope = trio.CancelScope()
        self.begun = False
        self.task: trio.lowlevel.Task | None = None

    def may_begin(self) -> bool:
        """As the control socket: who has been given up does not begin."""
        self.begun = not self.scope.cancel_called
        return self.begun

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        if task is self.task and not self.begun:
            self.left -= 1
            if self.left == 0:
                self.scope.cancel()

    async def run(self, volume: Volume, case: Case) -> None:
        trio.lowlevel.add_instrument(self)
        self.task = trio.lowlevel.current_task()
        try:
            with self.scope:
                await carry_out(volume, case, self.may_begin)
        except Abandoned:
            pass
        finally:
            trio.lowlevel.remove_instrument(self)


@pytest.mark.parametrize("buffer", [0, 1 << 20], ids=["direct", "buffered"])
@pytest.mark.parametrize("name", CASES)
def test_given_up_at_any_step_before_it_begins_it_changes_nothing(name: str, buffer: int) -> None:
    """Cancelled at its first, second, … step until it has begun: nothing has changed each time."""
    case = CASES[name]

    async def given_up(volume: Volume, cancel: CancelAt) -> None:
        before = await everything(volume)
        await cancel.run(volume, case)
        if not cancel.begun:
            assert await everything(volume) == before
            check(volume)
            await still_works(volume, case)

    for step in range(1, 1000):
        cancel = CancelAt(step)
        with scene_of(case, buffer) as scene:
            scene.run(partial(given_up, cancel=cancel))
        if cancel.begun:
            break
    assert step > 1, "it had begun before anybody could give it up"


def test_a_queue_is_told_and_left_without_a_trace() -> None:
    """`status` names what runs and what waits, in order; who gives up the queue is gone from it."""

    async def queue(volume: Volume) -> None:
        core = volume.core
        async with trio.open_nursery() as nursery, core.admin.turn("holding everything up"):
            given_up = trio.CancelScope()

            async def first() -> None:
                with given_up:
                    await volume.delete_point(1)

            nursery.start_soon(first)
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(volume.delete_point, 2)
            await trio.testing.wait_all_tasks_blocked()
            told = volume.status()["operations"]
            assert told["running"]["what"] == "holding everything up"
            assert told["running"]["begun"] is False
            names = [entry["what"] for entry in told["waiting"]]
            assert names == ["deleting recovery point 1", "deleting recovery point 2"]
            assert "holding everything up" in volume.waits_for()
            assert volume.waits_for(host_only=True) == ""
            given_up.cancel()
            await trio.testing.wait_all_tasks_blocked()
            told = volume.status()["operations"]
            assert [entry["what"] for entry in told["waiting"]] == names[1:]
        assert [point.number for point in volume.points] == [1]
        assert volume.status()["operations"] == {"running": None, "waiting": [], "waits_for": []}

    Scene().run(queue)


@pytest.mark.parametrize(
    ("calls", "work", "what"),
    [
        ("sync", "flush", "a sync of the replica"),
        ("write", "delete", "a write to the diff area's superblock"),
        ("sync", "copy", "copies to be made durable in the diff area"),
    ],
)
def test_what_the_host_does_not_answer_is_told(calls: str, work: str, what: str) -> None:
    """While a call to the host hangs, `status` says what is waited for; afterwards nothing."""
    scene = Scene()
    found: list[list[str]] = []

    async def look(volume: Volume) -> None:
        backing = volume.core.replica if work == "flush" else volume.core.need_area().backing

        def hanging(original: Callable[..., Any], *args: Any) -> Any:
            # In the middle of the call: the status is what another client would get just now.
            waits = volume.status()["operations"]["waits_for"]
            found.append([entry["what"] for entry in waits])
            assert all(entry["seconds"] >= 0 for entry in waits)
            return original(*args)

        original = getattr(backing, calls)
        with mock.patch.object(backing, calls, partial(hanging, original)):
            if work == "flush":
                handle = volume.open_replica()
                await handle.flush()
                handle.close()
            elif work == "delete":
                await volume.delete_point(1)
            else:
                await write(volume, 7 * BLOCK, pattern(6, BLOCK))
        assert volume.status()["operations"]["waits_for"] == []

    scene.run(look)
    assert [what] in found
