"""Power fails at every step of very many workloads; the explorer finds every engine that is wrong.

See tests/explorer. Here: enough states for every day, each mutant, and the creation of a volume,
which the simulated disk does not cover, stopped for real between its steps.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import chance
import pytest
import trio
from explorer.creation import SIZE, before_each_step, make
from explorer.judge import Violation
from explorer.mutants import MUTANTS, WHILE_LOOKING, broken_engine, flush_without_sync
from explorer.processes import reduced
from explorer.ring_mutants import AFTER_A_KILL
from explorer.search import Explorer, in_one_process
from explorer.workloads import Workload, parse

from vsnapfs.config import load
from vsnapfs.errors import VsnapError
from vsnapfs.volume import Volume

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
    seed = str(chance.seed(7))
    arguments = ["--states", str(STATES), "--minutes", "8", "--jobs", "2", "--seed", seed]
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


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_the_explorer_finds_an_engine_that_is_wrong(mutant: Callable[..., None]) -> None:
    """Each rule of the order, broken on purpose, is found in the workload that needs it."""
    broken = partial(broken_engine, mutant)
    explorer = Explorer()
    if mutant in WHILE_LOOKING:
        explorer.while_looking = broken
        explorer.again, explorer.again_killed = 1, 1
        explorer.powercuts = mutant not in AFTER_A_KILL
    else:
        explorer.while_running = broken
    with pytest.raises(Violation) as caught:
        explore(MUTANTS[mutant], explorer)
    print(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("workload", sorted(set(MUTANTS.values())))
def test_the_engine_as_it_is_passes_where_the_mutants_fail(workload: str) -> None:
    """What finds the mutants finds nothing in the engine itself."""
    assert explore(workload).states > 10


def test_the_same_seed_finds_the_same_images() -> None:
    """A seed decides everything: a violation can be reproduced."""
    first, second = (explore("fresh: create at-once create-while-writing") for _ in range(2))
    assert first.seen == second.seen
    assert first.states == second.states


@pytest.mark.slow
def test_a_violation_is_reduced_to_the_operations_it_needs() -> None:
    """Whoever reads it is shown no operation that could be left out."""
    workload = parse("fresh: create A BC offline online AB flush delete-oldest A reopen")
    explorer = Explorer(limit=None)
    explorer.while_running = partial(broken_engine, flush_without_sync)
    with pytest.raises(Violation) as caught:
        explore(workload, explorer)
    explorer = Explorer()
    explorer.while_running = partial(broken_engine, flush_without_sync)
    found = in_one_process(lambda one: reduced(one, workload, caught.value), explorer)
    operations = str(found).splitlines()[0].partition(": ")[2].split()
    assert len(operations) <= 2, found
    assert "step" in str(found)


# --- what the simulated disk does not cover ------------------------------------------------------


def test_a_creation_that_is_killed_leaves_a_volume_or_none(tmp_path: Path) -> None:
    """Killed before any of its steps, a creation leaves no volume.toml, or all that belongs to it;
    what was killed is no volume, and once it is removed the name is free.
    """
    run = subprocess.run(
        [sys.executable, "-m", "explorer.creation", str(tmp_path)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": f"{TESTS}:{TESTS.parent}"},
        check=False,
        timeout=100,
    )
    assert run.returncode == 0, run.stderr
    last = int(run.stdout)
    assert last > 15
    whole = 0
    for step in range(1, last + 1):
        directory = tmp_path / str(step)
        if (directory / "volume.toml").exists():
            whole += 1
            trio.run(_is_whole, directory)
        else:
            with pytest.raises(VsnapError):
                load(directory)
            shutil.rmtree(directory, ignore_errors=True)
            if step % 5 == 0:
                make(directory)
                trio.run(_is_whole, directory)
    # The last step but one is the sync of the directory, after volume.toml has got its name.
    assert 1 < whole < 4


async def _is_whole(directory: Path) -> None:
    volume = await Volume.open(directory)
    async with trio.open_nursery() as nursery:
        await nursery.start(volume.run)
        assert volume.protection.is_online
        point = await volume.create_point()
        assert (await volume.verify())["ok"]
        handle = volume.open_point(point.number)
        assert await handle.read(0, volume.size) == bytes(SIZE)
        handle.close()
        await volume.close()


def test_a_volume_gets_its_name_after_everything_else_is_durable(tmp_path: Path) -> None:
    """Before volume.toml is renamed into place each file written was synced after its last write,
    and each directory after the last file was made in it; afterwards the directory is synced.
    """
    steps: list[tuple[str, str]] = []

    def note(name: str, args: tuple[Any, ...]) -> None:
        steps.append((name, str(getattr(args[0], "path", args[0]))))

    with before_each_step(note):
        make(tmp_path / "volume")
    names = [name for name, _ in steps]
    rename = names.index("rename")
    before, after = steps[:rename], steps[rename + 1 :]
    for path in {path for name, path in before if name in ("write", "allocate", "truncate")}:
        if not Path(path).is_absolute():
            continue  # a descriptor: volume.toml's, below
        kinds = [name for name, other in before if other == path]
        assert kinds[-1] == "sync", (path, kinds)
    made = [number for number, (name, _) in enumerate(before) if name == "create"]
    synced = {
        path: number for number, (name, path) in enumerate(before) if name == "sync_directory"
    }
    assert synced[str(tmp_path / "volume")] > made[-1]
    assert synced[str(tmp_path)] > names.index("mkdir")
    # volume.toml: its content before its name, its name before the answer.
    assert names[rename - 1] == "fsync"
    assert [name for name, _ in after] == ["fsync"]
