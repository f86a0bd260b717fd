"""Every operation on every file fails in turn, once and for good.

Whatever fails: nothing but an OSError or a VsnapError leaves the engine, a refused write has moved
no byte (W1), no recovery point changes (W2), a fault is logged and outlives the process (P1), and
when the disk works again there is a way back (C2).
"""

from __future__ import annotations

import errno
import itertools
from typing import Any

import pytest
from failing import Step, Trial, count_operations
from hypothesis import settings
from rig import BLOCK, SMALLEST, Rig, small_steps
from simdisk import FOREVER, LOOKS

from vsnapfs.errors import VsnapError

#: It looks for our own defects: once is enough.
pytestmark = pytest.mark.slow

SIZE = 5 * BLOCK + 100

WORKLOADS: dict[str, tuple[dict[str, Any], list[Step]]] = {
    "writing": (
        {},
        [
            ("write", 0, SIZE),
            ("create",),
            ("write", 100, 2 * BLOCK),
            ("flush",),
            ("create",),
            ("write", BLOCK, 10),
            ("write", 3 * BLOCK - 1, BLOCK),
            ("delete", 1),
            ("write", 0, SIZE),
            ("reopen",),
            ("write", 5, 6),
            ("verify",),
        ],
    ),
    "growing": (
        {"size": 11 * BLOCK + 1, "maximum": SMALLEST + 40 * BLOCK},
        [
            *([("create",), ("write", 0, 11 * BLOCK + 1)] * 3),
            ("delete", 2),
            ("resize", SMALLEST),
            ("write", 0, BLOCK),
            ("resize", SMALLEST + 80 * BLOCK),
            ("write", 0, 3 * BLOCK),
        ],
    ),
    "restoring": (
        {},
        [
            ("write", 0, SIZE),
            ("create",),
            ("write", 0, 3 * BLOCK),
            ("create",),
            ("write", 2 * BLOCK, 2 * BLOCK),
            ("reopen",),
            ("restore", 1),
            ("write", 7, 7),
            ("restore", 2),
        ],
    ),
    "switching": (
        {},
        [
            ("write", 0, SIZE),
            ("create",),
            ("offline",),
            ("online",),
            ("write", 0, 2 * BLOCK),
            ("offline",),
            ("reopen",),
            ("online",),
            ("write", 0, 3 * BLOCK),
        ],
    ),
}

ENDS = ("stay", "close", "kill", "power-", "power+")
FAILURES = (
    (errno.EIO, 1, False),
    (errno.EIO, FOREVER, False),
    (errno.EIO, 1, True),
    (errno.ENOSPC, FOREVER, False),
)
EXAMPLES = settings.default.max_examples if settings.default is not None else 100
#: Every operation fails in one way and ends in one way, taken in turn; VSNAPFS_EXAMPLES=2000 and
#: more: in every way, with every end; VSNAPFS_EXAMPLES=20: every fifth operation.
EVERYTHING = EXAMPLES >= 2000
STRIDE = max(1, 100 // EXAMPLES)


def _make(workload: str, policy: str, buffer: int = 0) -> Rig:
    return Rig(**{"size": SIZE, "on_full": policy, "buffer": buffer, **WORKLOADS[workload][0]})


@pytest.mark.time_limit(600)
@pytest.mark.parametrize("buffer", [0, 64 * 1024], ids=["direct", "buffered"])
@pytest.mark.parametrize("policy", ["offline", "evict"])
@pytest.mark.parametrize("name", ["replica", "area", "state"])
@pytest.mark.parametrize("workload", WORKLOADS)
def test_one_operation_after_the_other_fails(
    workload: str, name: str, policy: str, buffer: int
) -> None:
    """The n-th operation on a file fails, for every n until the workload runs through."""
    steps = WORKLOADS[workload][1]
    with small_steps():
        total = count_operations(lambda: _make(workload, policy, buffer), steps)[name]
        assert total > 5
        ways = itertools.cycle(itertools.product(ENDS, FAILURES))
        for nth in range(1, total + 1, STRIDE):
            for _ in range(len(ENDS) * len(FAILURES) if EVERYTHING else 1):
                end, (error, times, partly) = next(ways)
                trial = Trial(_make(workload, policy, buffer))
                failure = trial.host.fail(name, None, error, nth=nth, times=times, partly=partly)
                try:
                    trial.run(steps)
                    trial.end(end)
                except BaseException as problem:
                    problem.add_note(
                        f"{workload}, {policy}, buffer {buffer}: operation {nth} of {total} on "
                        f"{name}, {failure}, then {end}; refused: {trial.refused}; "
                        f"log: {trial.rig.log.events}"
                    )
                    raise


LOOKING: list[Step] = [
    ("create",),
    ("write", 0, 18 * BLOCK),
    ("create",),
    ("write", 0, 18 * BLOCK),
    ("delete", 1),
    ("write", 0, 40 * BLOCK),
    ("reopen",),
    ("create",),
    ("write", 0, 2 * BLOCK),
]


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("policy", ["offline", "evict"])
@pytest.mark.parametrize("name", ["replica", "area", "state"])
def test_one_look_after_the_other_fails(name: str, policy: str, look: str) -> None:
    """A host may even refuse to say how large an open file is, or whether its name still leads to
    it: that is a failed operation like any other, no defect, and does not end the server.
    """
    ways = itertools.cycle(itertools.product(ENDS, (1, FOREVER)))
    options: dict[str, Any] = {"size": 40 * BLOCK, "maximum": SMALLEST + 100 * BLOCK}
    with small_steps():
        for nth in range(1, 1000):
            end, times = next(ways)
            rig = Rig(**options, on_full=policy, buffer=64 * 1024 if nth % 2 else 0)
            trial = Trial(rig)
            failure = trial.host.fail(name, look, errno.EIO, nth=nth, times=times)
            try:
                trial.run(LOOKING)
                if not failure.fired:
                    assert trial.refused == []
                    assert rig.host.counts["area", "allocate"] > 1, "it has not grown"
                    break
                assert ("volsnap", 90) not in rig.log.events
                for step, error in trial.refused:
                    assert step[0] != "create" or isinstance(error, VsnapError)
                trial.end(end)
            except BaseException as problem:
                problem.add_note(f"{failure}, then {end}; refused: {trial.refused}")
                problem.add_note(f"log: {rig.log.events}")
                raise
