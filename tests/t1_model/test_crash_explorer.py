"""Power fails at every step of very many workloads; the explorer finds every engine that is wrong.

See tests/explorer. Here: enough states for every day, each mutant, and the creation of a volume,
which the simulated disk does not cover, stopped for real between its steps.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from explorer.judge import Violation
from explorer.mutants import MUTANTS, WHILE_LOOKING, broken_engine
from explorer.search import Explorer, in_one_process
from explorer.workloads import Workload, parse

TESTS = Path(__file__).resolve().parent.parent
STATES = int(os.environ.get("VSNAPFS_CRASH_STATES", "20000"))


def explore(workload: str | Workload, explorer: Explorer | None = None) -> Explorer:
    made = explorer or Explorer()
    wanted = parse(workload) if isinstance(workload, str) else workload
    in_one_process(lambda one: one.explore(wanted), made)
    return made


@pytest.mark.slow
@pytest.mark.time_limit(600)
def test_power_failures_lose_nothing() -> None:
    """W1-W4, R1, C1, P1 hold in every state that short and random workloads can leave."""
    arguments = ["--states", str(STATES), "--minutes", "8", "--jobs", "2", "--seed", "7"]
    environment = os.environ | {"PYTHONPATH": f"{TESTS}:{TESTS.parent}"}
    run = subprocess.run(
        [sys.executable, "-m", "explorer", *arguments],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
        timeout=550,
    )
    print(run.stdout)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    last = run.stdout.splitlines()[-1]
    images = re.search(r"(\d+) distinct images", last)
    assert images is not None, last
    assert int(images[1]) >= STATES, last
    assert last.endswith(": 0 violations")


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_the_explorer_finds_an_engine_that_is_wrong(mutant: Callable[..., None]) -> None:
    """Each rule of the order, broken on purpose, is found in the workload that needs it."""
    broken = partial(broken_engine, mutant)
    explorer = Explorer()
    if mutant in WHILE_LOOKING:
        explorer.while_looking, explorer.again = broken, 1
    else:
        explorer.while_running = broken
    with pytest.raises(Violation) as caught:
        explore(MUTANTS[mutant], explorer)
    print(caught.value)


@pytest.mark.parametrize("workload", sorted(set(MUTANTS.values())))
def test_the_engine_as_it_is_passes_where_the_mutants_fail(workload: str) -> None:
    """What finds the mutants finds nothing in the engine itself."""
    assert explore(workload).states > 10


def test_the_same_seed_finds_the_same_images() -> None:
    """A seed decides everything: a violation can be reproduced."""
    first, second = (explore("fresh: create at-once create-while-writing") for _ in range(2))
    assert first.seen == second.seen
    assert first.states == second.states
