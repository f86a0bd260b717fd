"""The search in several processes, with a budget, a progress line and a verdict.

Owns the command line of `scripts/crash-explore`. Each process takes every n-th workload of the same
plan; the images they report are counted here, once each, whoever found them. A violation ends the
run: it is printed with its workload (a random one reduced to what is needed), the step, and what
became of each unsynced change, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import queue
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from house import limit_memory

from .judge import Violation
from .search import Explorer, in_one_process
from .workloads import (
    ALPHABET,
    BEGINNINGS,
    CORE,
    OPERATIONS,
    Workload,
    at_random,
    of_length,
    parse,
)

#: One random workload after so many short ones.
RANDOM_AFTER = 40
#: Of each state of a random workload so many choices are tried.
RANDOM_LIMIT = 4
_TESTS = Path(__file__).resolve().parent.parent


def short_ones(length: int) -> Iterator[tuple[str, Workload]]:
    """All short workloads, shortest first: (what they belong to, workload)."""
    for count in range(1, min(length, 2) + 1):
        for name in BEGINNINGS:
            yield from _named(f"all of {count} from {name}", of_length(name, count))
    if length >= 3:
        for name in BEGINNINGS:
            yield from _named(f"core of 3 from {name}", of_length(name, 3, CORE))
    if length >= 4:
        yield from _named("core of 4 from fresh", of_length("fresh", 4, CORE))
    if length >= 3:
        for name in BEGINNINGS:
            yield from _named(f"all of 3 from {name}", of_length(name, 3))
    if length >= 4:
        for name in BEGINNINGS:
            yield from _named(f"core of 4 from {name}", of_length(name, 4, CORE))


def _named(name: str, workloads: Iterator[Workload]) -> Iterator[tuple[str, Workload]]:
    return ((name, workload) for workload in workloads)


def plan(seed: int, length: int, share: int, shares: int) -> Iterator[tuple[str, Workload]]:
    """The share of one process: the short ones in order, random ones in between and after them."""
    dice = random.Random(f"{seed} {share}")
    done: set[str] = set()
    mine = itertools.islice(short_ones(length), share, None, shares)
    for number, (name, workload) in enumerate(mine):
        text = str(workload)
        if text not in done:  # A sequence of the core is one of the whole alphabet, too.
            done.add(text)
            yield name, workload
        if number % RANDOM_AFTER == RANDOM_AFTER - 1:
            yield "random", at_random(dice)
    while True:
        yield "random", at_random(dice)


# --- one process -----------------------------------------------------------------------------


def work(seed: int, length: int, share: int, shares: int) -> None:
    """Explore, and report on standard output, a JSON object a line, until it is closed."""

    def report(**what: Any) -> None:
        sys.stdout.write(json.dumps(what) + "\n")
        sys.stdout.flush()

    async def search(explorer: Explorer) -> None:
        where = ""

        def tell() -> None:
            report(
                images=explorer.new,
                states=explorer.states,
                workloads=explorer.workloads,
                part=where,
            )
            explorer.new.clear()

        explorer.report = tell
        for where, workload in plan(seed, length, share, shares):
            explorer.limit = RANDOM_LIMIT if where == "random" else None
            try:
                await explorer.explore(workload)
            except Violation as violation:
                tell()
                report(violation=str(await reduced(explorer, workload, violation)))
                return
            if explorer.workloads % 100 == 0:
                tell()

    limit_memory()
    # Much is kept for long, little of it in cycles: look for these less often.
    gc.freeze()
    gc.set_threshold(50_000)
    try:
        in_one_process(search, Explorer(seed=seed))
    except BrokenPipeError:
        os._exit(0)  # The parent has what it wants.


async def reduced(explorer: Explorer, workload: Workload, violation: Violation) -> Violation:
    """The violation of the shortest workload that comes of leaving out operations one by one."""
    operations = list(workload.operations)
    position = 0
    while position < len(operations) and len(operations) > 1:
        fewer = (*operations[:position], *operations[position + 1 :])
        try:
            await explorer.explore(Workload(workload.beginning, fewer, len(fewer)))
            position += 1
        except Violation as found:
            violation, operations = found, list(fewer)
    return violation


# --- all of them -----------------------------------------------------------------------------


class Run:
    """The processes and what they have found."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.images: set[int] = set()
        self.states: dict[int, int] = {}
        self.workloads: dict[int, int] = {}
        self.violations: list[str] = []
        self.parts: dict[int, str] = {}
        self._reports: queue.Queue[tuple[int, dict[str, Any] | None]] = queue.Queue()
        self._began = time.monotonic()

    @property
    def seconds(self) -> float:
        """Since the beginning."""
        return time.monotonic() - self._began

    def start(self, share: int) -> subprocess.Popen[bytes]:
        """One process."""
        options = self.options
        arguments = [options.seed, options.length, share, options.jobs]
        environment = os.environ | {
            "PYTHONPATH": f"{_TESTS}:{_TESTS.parent}",
            "OPENBLAS_NUM_THREADS": "1",
        }
        worker = subprocess.Popen(
            [sys.executable, "-m", "explorer", "--worker", *map(str, arguments)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            env=environment,
        )
        threading.Thread(target=self._listen, args=(share, worker), daemon=True).start()
        return worker

    def _listen(self, share: int, worker: subprocess.Popen[bytes]) -> None:
        assert worker.stdout is not None
        for line in worker.stdout:
            self._reports.put((share, json.loads(line)))
        self._reports.put((share, None))

    def go(self) -> int:
        """Run until the budget is used up. The exit code."""
        options = self.options
        workers = [self.start(share) for share in range(options.jobs)]
        living, shown = len(workers), 0.0
        try:
            while living and not self.violations:
                left = options.minutes * 60 - self.seconds
                if left <= 0 or len(self.images) >= options.states:
                    break
                try:
                    share, report = self._reports.get(timeout=min(left, 1))
                except queue.Empty:
                    continue
                if report is None:
                    living -= 1
                    self.violations.append(f"process {share} ended by itself; see above")
                    break
                self._take(share, report)
                if self.seconds - shown >= options.every:
                    shown = self.seconds
                    self._show_progress()
        except KeyboardInterrupt:
            print("interrupted", flush=True)
        finally:
            for worker in workers:
                worker.terminate()
                worker.wait()
        for violation in self.violations:
            print(f"\nVIOLATION: {violation}\n", flush=True)
        print(self.verdict(), flush=True)
        return 1 if self.violations else 0

    def _take(self, share: int, report: dict[str, Any]) -> None:
        if "violation" in report:
            self.violations.append(report["violation"])
            return
        self.images.update(report["images"])
        self.states[share] = report["states"]
        self.workloads[share] = report["workloads"]
        if report["part"] != "random":
            self.parts[share] = report["part"]

    def _show_progress(self) -> None:
        count, rate = len(self.images), len(self.images) / self.seconds
        left = max(0, self.options.states - count) / max(rate, 1e-9)
        print(
            f"{self.seconds / 60:.1f} min: {count} distinct images, {rate:.0f}/s, "
            f"{self.options.states} in {left / 60:.0f} min more; now: "
            f"{', '.join(sorted(set(self.parts.values())))}",
            flush=True,
        )

    def verdict(self) -> str:
        """The last line."""
        return (
            f"{sum(self.states.values())} states judged, {len(self.images)} distinct images of "
            f"{sum(self.workloads.values())} workloads, seed {self.options.seed}, "
            f"{self.seconds / 60:.1f} minutes, {self.options.jobs} processes: "
            f"{len(self.violations)} violations"
        )


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="crash-explore",
        description="Let the power fail at every step of very many workloads on a simulated disk, "
        "and see whether anything is lost.",
    )
    parser.add_argument("--states", type=int, default=20_000, help="distinct images to judge")
    parser.add_argument("--minutes", type=float, default=60, help="at most so long")
    parser.add_argument("--seed", type=int, help="chooses what is sampled (random)")
    parser.add_argument("--length", type=int, default=4, help="of the exhaustive sequences")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--every", type=float, default=20, help="seconds between two lines")
    parser.add_argument(
        "--workload",
        metavar="'BEGINNING: OPERATION ...'",
        help=f"only this one. Beginnings: {', '.join(BEGINNINGS)}. "
        f"Operations: {', '.join(OPERATIONS)}",
    )
    parser.add_argument("--worker", type=int, nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.seed is None:
        options.seed = 0 if options.workload else random.SystemRandom().randrange(1 << 32)
    if options.worker:
        work(*options.worker)
        return 0
    if options.workload:
        return _one(parser, options)
    print(
        f"seed {options.seed}; all sequences of up to {min(options.length, 3)} of "
        f"{len(ALPHABET)} operations from {len(BEGINNINGS)} beginnings, of up to "
        f"{options.length} of {len(CORE)} of them, and random ones of 20 to 60",
        flush=True,
    )
    return Run(options).go()


def _one(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    try:
        workload = parse(options.workload)
    except ValueError as error:
        parser.error(str(error))
    explorer = Explorer(seed=options.seed, again=8)
    found = 0
    try:
        in_one_process(lambda one: one.explore(workload), explorer)
    except Violation as violation:
        print(f"\nVIOLATION: {violation}\n")
        found = 1
    print(
        f"{explorer.states} states judged, {len(explorer.seen)} distinct images of 1 workload, "
        f"seed {options.seed}: {found} violations"
    )
    return found
