"""The command line of scripts/bench."""

from __future__ import annotations

import json
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from benchmark import cells as all_cells
from benchmark import environment, machine, report
from benchmark.cells import Cell
from benchmark.peers import PEERS
from benchmark.run import Plan, Report, carry_out
from benchmark.systems import FLOOR, OURS, ROOT, System

SYSTEMS: tuple[System, ...] = (*OURS, *PEERS, *FLOOR)
RESULTS = ROOT / "docs" / "performance"
_QUICK_SYSTEMS = ("vsnapfs", "vsnapfs-process", "qemu", "passthrough", "raw", "disk")
_PLAIN_EVERY = 10.0  # seconds between two lines where there is no terminal

console = Console(stderr=True)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--quick", is_flag=True, help="Fewer cells, systems and bytes, one round: 3 minutes.")
@click.option("--all", "everything", is_flag=True, help="The full cross of cells: many hours.")
@click.option("--cells", metavar="NAME,...", help="Only cells whose name contains one of these.")
@click.option("--systems", metavar="NAME,...", help="Only these systems.")
@click.option("--rounds", type=click.IntRange(1), help="Rounds. [default: 5; --quick 1]")
@click.option(
    "--minutes",
    type=click.FloatRange(0, min_open=True),
    help="Begin no further round that would end later. [default: 58; --all none]",
)
@click.option(
    "--directory",
    type=click.Path(file_okay=False, exists=True, path_type=Path),
    default=Path("/var/tmp"),  # noqa: S108 - on a disk, unlike /tmp often
    show_default=True,
    help="Where the images lie while it runs: the disk that is measured.",
)
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    help="Where results.json, the tables and the plots go. [default: docs/performance for a full "
    "run, nowhere for a part of one]",
)
@click.option("--list", "list_only", is_flag=True, help="Show the cells and systems, and end.")
@click.option(
    "--render",
    type=click.Path(dir_okay=False, exists=True, path_type=Path),
    help="Measure nothing: write tables and plots anew from this results.json, beside it.",
)
def main(
    quick: bool,
    everything: bool,
    cells: str | None,
    systems: str | None,
    rounds: int | None,
    minutes: float | None,
    directory: Path,
    output: Path | None,
    list_only: bool,
    render: Path | None,
) -> None:
    """Measure vsnapfs beside its peers: one run, one file system, systems alternating.

    Needs root for loop devices and for dropping the page cache; without it the ext4 cells fail and
    only the images' own pages are dropped, and the report says so. Let the machine be idle.
    """
    if render is not None:
        report.write(json.loads(render.read_text()), output or render.parent)
        return
    if quick and everything:
        raise click.UsageError("--quick and --all exclude each other")
    known = all_cells.NAMED
    if quick or everything:
        known = all_cells.QUICK if quick else all_cells.full_cross()
    chosen = _chosen_cells(known, cells)
    picked = _chosen_systems(systems, quick=quick)
    if list_only:
        _list(chosen, picked)
        return
    if output is None and not (quick or cells or systems):
        output = RESULTS
    plan = Plan(
        chosen, picked, rounds or (1 if quick else 5), minutes or (1e9 if everything else 58)
    )
    try:
        data = _measure(plan, directory.resolve())
    except KeyboardInterrupt:
        console.print("Interrupted; nothing is left behind.")
        sys.exit(130)
    data["quick"] = quick
    out = Console()
    report.show(data, out if out.is_terminal else Console(width=120))
    if output is not None:
        report.write(data, output)
        console.print(f"Written to {output}", highlight=False)
    if any("error" in row for row in data["results"]):
        sys.exit(1)


def _measure(plan: Plan, directory: Path) -> dict[str, Any]:
    for stale in machine.remove_stale(directory):
        console.print(f"Removed what a killed run had left: {stale}", highlight=False)
    facts = environment.describe(directory)
    if facts["file_system"].startswith("tmpfs"):
        console.print("[yellow]Note:[/] this is a tmpfs: syncing costs nothing there")
    sizes = {(cell.on_ext4, cell.image_size) for cell in plan.cells}
    # Two images for each ext4, and beside the largest a diff area or overlay that may outgrow it.
    needed = sum(size * (1 + ext4) for ext4, size in sizes) + 2 * max(size for _, size in sizes)
    if shutil.disk_usage(directory).free < needed:
        raise click.ClickException(f"{directory} has not the {needed >> 20} MiB that this takes")
    with (
        _terminated_like_interrupted(),
        machine.connections_mounted(),
        machine.work_directory(directory) as work,
        _bar() as told,
    ):
        outcome = carry_out(plan, work, told)
    return {
        "format": 1,
        "environment": facts,
        "cells": {
            cell.name: {"span": cell.span, "seconds": cell.seconds, "writes": cell.writes}
            for cell in plan.cells
        },
        "systems": {system.name: system.says for system in plan.systems},
        **outcome,
    }


def _chosen_cells(known: Sequence[Cell], names: str | None) -> list[Cell]:
    if names is None:
        return list(known)
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    for name in wanted:
        if not any(name in cell.name for cell in known):
            raise click.UsageError(f"no cell is called {name!r}; --list shows them")
    return [cell for cell in known if any(name in cell.name for name in wanted)]


def _chosen_systems(names: str | None, *, quick: bool) -> list[System]:
    if names is None:
        return [system for system in SYSTEMS if not quick or system.name in _QUICK_SYSTEMS]
    wanted = {name.strip() for name in names.split(",") if name.strip()}
    unknown = wanted - {system.name for system in SYSTEMS}
    if unknown:
        raise click.UsageError(f"no system is called {min(unknown)!r}; --list shows them")
    return [system for system in SYSTEMS if system.name in wanted]


def _list(cells: Sequence[Cell], systems: Sequence[System]) -> None:
    for cell in cells:
        how = "each block once" if cell.seconds is None else f"{cell.seconds:g} s"
        click.echo(f"{cell.name:34} {cell.span >> 20:4} MiB, {how}")
    click.echo()
    for system in systems:
        missing = system.missing()
        click.echo(f"{system.name:16} {f'MISSING: {missing}' if missing else system.says}")


@contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    """SIGTERM and SIGHUP unwind like Ctrl-C, so that nothing is left behind."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    both = (signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, interrupt) for number in both}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _bar() -> Iterator[Report]:
    """Progress with the time left: a bar on a terminal, a line every ten seconds elsewhere."""
    if console.is_terminal:
        with Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            # The time left is that of the whole run so far, not of the last seconds.
            speed_estimate_period=3600,
        ) as bar:
            task = bar.add_task("", total=None)
            yield lambda what, done, total: bar.update(
                task, description=what, completed=done, total=total
            )
        return
    started = told = time.monotonic()

    def plain(what: str, done: int, total: int) -> None:
        nonlocal told
        now = time.monotonic()
        if done and now - told < _PLAIN_EVERY:
            return
        told = now
        left = f", {(now - started) / done * (total - done) / 60:.1f} minutes left" if done else ""
        click.echo(f"{done} of {total}{left}; {what}", err=True)

    yield plain


if __name__ == "__main__":
    main(prog_name="scripts/bench")
