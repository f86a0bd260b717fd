"""The order of a run: rounds of cells of systems, and what it keeps of them.

Systems alternate within each cell, and each round starts with another one, so that a machine that
is slow for a minute is slow for all. A system that is missing, that a cell means nothing to, or
that fails is kept as such.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmark.cells import Cell
from benchmark.machine import BenchError
from benchmark.measure import Images, measure
from benchmark.systems import System

Report = Callable[[str, int, int], None]
"""report(what is measured now, measurements done, measurements in all)."""


@dataclass(frozen=True)
class Plan:
    """What to measure. minutes: no round is begun that would probably end later than that."""

    cells: Sequence[Cell]
    systems: Sequence[System]
    rounds: int
    minutes: float


def carry_out(plan: Plan, work: Path, report: Report) -> dict[str, Any]:
    """Measure in `work`, an empty directory. Returns results, absences and the course, for JSON."""
    absent = {system.name: why for system in plan.systems if (why := system.missing())}
    present = [system for system in plan.systems if system.name not in absent]
    not_for = [
        {"cell": cell.name, "system": system.name, "reason": why}
        for cell in plan.cells
        for system in plan.systems
        if (why := system.not_for(cell))
    ]
    jobs = [
        [(cell, system) for system in present if not system.not_for(cell)] for cell in plan.cells
    ]
    total = sum(map(len, jobs)) * plan.rounds
    images = Images(work / "images")
    results: list[dict[str, Any]] = []
    started = time.monotonic()
    rounds = 0
    for number in range(plan.rounds):
        spent = time.monotonic() - started
        if number and spent * (number + 1) / number > plan.minutes * 60:
            break
        for candidates in jobs:
            for cell, system in _rotated(candidates, number):
                report(f"round {number + 1}: {cell.name} on {system.name}", len(results), total)
                results.append(_one(cell, system, images, work, number))
        rounds += 1
    report("done", len(results), len(results))
    return {
        "rounds": rounds,
        "rounds_wanted": plan.rounds,
        "seconds": round(time.monotonic() - started, 1),
        "missing": absent,
        "not_for": not_for,
        "results": results,
    }


def _rotated(jobs: list[tuple[Cell, System]], number: int) -> list[tuple[Cell, System]]:
    start = number % len(jobs) if jobs else 0
    return jobs[start:] + jobs[:start]


def _one(cell: Cell, system: System, images: Images, work: Path, number: int) -> dict[str, Any]:
    place = work / f"{system.name}-{time.monotonic_ns()}"
    place.mkdir()
    row: dict[str, Any] = {"cell": cell.name, "system": system.name, "round": number}
    try:
        measured = measure(cell, system, images, place, seed=number + 1)
    except BenchError as error:
        row["error"] = str(error)
    except OSError as error:
        row["error"] = f"{error.strerror or error} ({error.filename or 'unnamed'})"
    else:
        row |= asdict(measured.fio)
        row["cpu_seconds_per_gib"] = measured.cpu_seconds_per_gib
        row["peak_bytes"] = measured.peak_bytes
        row["caches"] = measured.caches
    shutil.rmtree(place, ignore_errors=True)
    return row
