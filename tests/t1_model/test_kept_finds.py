"""Sequences that once showed a defect, found by chance, replayed by every run.

Hypothesis keeps no examples of a state machine for good, but prints the steps of one that fails:
`state.write_one(at=0, length=1)` and so on. Those lines, without the first and the last, are the
body of a function here; its docstring says what was wrong. Everything is compared after each step,
as in a search.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from simdisk import FOREVER
from test_state_machine import (
    BufferedMachine,
    EvictingBufferedMachine,
    EvictingMachine,
    VolumeMachine,
)


class Replayed:
    """A machine whose every step is followed by its invariant."""

    def __init__(self, machine: type[VolumeMachine]) -> None:
        self._machine = machine()
        self.teardown = self._machine.teardown

    def __getattr__(self, name: str) -> Callable[..., None]:
        step = getattr(self._machine, name)

        def replay(**arguments: Any) -> None:
            step(**arguments)
            self._machine.compare()

        return replay


def many_small_writes_of_one_sector(state: Any) -> None:
    """The model listed all that could be left of them: one process grew to 24 GB."""
    state.make(device=True, extra=40, seed=1, size=81920, stall=0, tight=None)
    for at in range(0, 400, 10):  # one byte each, forty of them before any sync
        state.write_one(at=at, length=1, durably=False)
    state.power_failure(how="dice", seed=3)


def refused_writes_of_one_sector(state: Any) -> None:
    """The same with writes that are refused, each of which may yet be there or not."""
    state.make(device=True, extra=0, seed=1, size=81920, stall=0, tight=None)
    state.create()
    state.write_everything()
    for at in range(0, 300, 10):
        state.write_one(at=at, length=1, durably=False)
    state.power_failure(how="kept", seed=0)


def a_commit_that_only_the_cache_held(state: Any) -> None:
    """An opening took it for durable, told the state file, and lost it with the cache: fault 15."""
    state.make(device=False, extra=0, seed=0, size=50152, stall=0, tight=None)
    state.write_while_the_area_fails(at=0, length=1, nth=1, operation="sync", times=FOREVER)
    state.damaged_for_a_while(close=False, number=0)


def a_descriptor_that_cannot_be_read(state: Any) -> None:
    """Fault 3, whose message said only that it was bad; the model knew of none."""
    state.make(device=False, extra=0, seed=0, size=50152, stall=0, tight=None)
    state.create()
    state.damaged_after_a_kill(after=0, number=0, places=[0])
    state.create()
    state.write_while_the_area_fails(at=0, length=1, nth=2, operation=None, times=FOREVER)


def a_shrink_after_a_failed_barrier(state: Any) -> None:
    """With nothing to move it was refused: 'an earlier barrier has failed'."""
    state.make(device=True, extra=40, seed=0, size=36865, stall=0, tight=None)
    state.create()
    state.write_while_the_area_fails(at=0, length=4097, nth=1, operation="sync", times=FOREVER)
    state.resize(slots=0)


def carried_out_twice(state: Any) -> None:
    """Two writes, carried out by two processes: the first may be found over the second, which the
    model did not know. (What nobody has flushed may be there in any order.)
    """
    state.make(device=False, extra=9, seed=1 << 20, size=50152, stall=0, tight=30)
    state.damaged_after_a_kill(after=2, number=1 << 20, places=[571])
    state.damaged_after_a_kill(after=11, number=52, places=[10549, 9076, 2785])
    state.power_failure(how="dice", seed=450)


def a_device_that_grows_after_a_failed_barrier(state: Any) -> None:
    """Nobody took the barrier back first: the growth's own sync was refused, for ever."""
    state.make(size=50152, extra=1, tight=None, device=True, stall=0, seed=0)
    state.create()
    state.resize_to_what_is_used()
    state.write_while_the_area_fails(at=0, length=1, nth=1, operation="sync", times=FOREVER)
    state.resize(slots=1)


def a_creation_after_a_number_that_a_failure_used_up(state: Any) -> None:
    """The model looked for the number before, and took the point for one too many."""
    state.make(size=50152, extra=0, tight=None, device=False, stall=0, seed=0)
    state.write_while_the_area_fails(at=0, length=1, nth=1, operation="write", times=FOREVER)
    state.the_end_comes_during_the_next(after=15, how="kill", seed=0)
    state.create()


FINDS = [
    (many_small_writes_of_one_sector, VolumeMachine),
    (many_small_writes_of_one_sector, BufferedMachine),
    (refused_writes_of_one_sector, VolumeMachine),
    (refused_writes_of_one_sector, EvictingMachine),
    (a_commit_that_only_the_cache_held, EvictingMachine),
    (a_commit_that_only_the_cache_held, EvictingBufferedMachine),
    (a_descriptor_that_cannot_be_read, VolumeMachine),
    (a_shrink_after_a_failed_barrier, VolumeMachine),
    (a_device_that_grows_after_a_failed_barrier, VolumeMachine),
    (carried_out_twice, BufferedMachine),
    (a_creation_after_a_number_that_a_failure_used_up, EvictingMachine),
    (a_creation_after_a_number_that_a_failure_used_up, EvictingBufferedMachine),
]


@pytest.mark.parametrize(
    ("find", "machine"), FINDS, ids=lambda what: what.__name__ if callable(what) else what
)
def test_what_was_found_once_stays_mended(
    find: Callable[[Any], None], machine: type[VolumeMachine]
) -> None:
    """Each step, and all points and the replica after it, agree with the model."""
    state = Replayed(machine)
    try:
        find(state)
    finally:
        state.teardown()
