"""Search where nobody has looked, for as long as there is time: scripts/search [--minutes N]

Storms (tests/storm), trials of operations beside each other (tests/pairs) and the Hypothesis state
machines (tests/t1_model) take turns, each with seeds of its own, on a simulated disk in memory. One
line a minute on stderr; each find, with the command that repeats it, and the sum as the last line
on stdout. The exit code is 1 if anything was found.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import queue
import random
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import filefuzz
from house import limit_memory
from pairs import Trial, UndecidedError
from storm import Storm

_TESTS = Path(__file__).resolve().parent
#: How many storms and trials between two searches of a state machine.
STORMS, TRIALS = 100, 200
EXAMPLES = 10
MACHINES = ("test_state_machine.py", "test_state_machine_rings.py")
#: More finds than this are one find.
MOST = 20

Figures = collections.Counter[str]


def storm(seed: int) -> Figures:
    """One; its figures."""
    one = Storm(seed)
    with filefuzz.limits():
        one.run()
    counts = one.clients.counts
    names = {
        "lives": "life",
        "writes": "write",
        "kills": "kill",
        "power failures": "power",
        "failures injected": "failed",
        "rot": "rot",
        "old copies": "old copy",
    }
    return Figures({"storms": 1} | {name: counts[told] for name, told in names.items()})


def trial(seed: int) -> Figures:
    """One; its figures."""
    one = Trial(seed)
    try:
        one.run()
    except UndecidedError:
        return Figures({"trials without a verdict": 1})
    end = one.chosen["end"]
    return Figures(
        {
            "trials": 1,
            "lives": 2,
            "writes": sum(asked.kind.startswith("write") for asked in one.w.history),
            "kills": int(end.startswith("kill")),
            "power failures": int(end.startswith("power")),
            "failures injected": int(one.w.failing),
        }
    )


def machines(seed: int) -> Figures:
    """All state machines, some examples each, in a process of their own."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"),
            *(str(_TESTS / "t1_model" / name) for name in MACHINES),
            f"--hypothesis-seed={seed}",
        ],
        cwd=_TESTS.parent,
        env=os.environ | {"VSNAPFS_EXAMPLES": str(EXAMPLES)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise AssertionError(f"{done.stdout}\n{done.stderr}")
    return Figures({"runs of the state machines": 1})


KINDS: dict[str, Callable[[int], Figures]] = {"storm": storm, "trial": trial, "machines": machines}


def plan(seed: int, share: int, only: str | None) -> Iterator[tuple[str, int]]:
    """What one of the processes does, without end."""
    dice = random.Random(f"{seed} {share}")
    while True:
        for kind, times in (("storm", STORMS), ("trial", TRIALS), ("machines", 1)):
            for _ in range(times):
                number = dice.randrange(1 << 32)
                if only in (None, kind):
                    yield kind, number


def again(kind: str, seed: int) -> str:
    """The command that repeats a find."""
    return f"scripts/search --again {kind}:{seed}"


def run(kind: str, seed: int) -> tuple[Figures, str]:
    """(figures, what was found: "" if nothing was)."""
    try:
        return KINDS[kind](seed), ""
    except Exception as error:  # noqa: BLE001 - whatever it is, it is what we look for
        return Figures(), "".join(traceback.format_exception(error))


# --- one process ---------------------------------------------------------------------------------


def work(seed: int, share: int, only: str | None) -> None:
    """Search, and report on standard output, a JSON object a line, until it is closed."""
    os.nice(10)
    limit_memory()
    for kind, number in plan(seed, share, only):
        figures, found = run(kind, number)
        report = {"kind": kind, "seed": number, "figures": figures, "found": found}
        try:
            sys.stdout.write(json.dumps(report) + "\n")
            sys.stdout.flush()
        except BrokenPipeError:
            os._exit(0)


# --- all of them ---------------------------------------------------------------------------------


class Search:
    """The processes, and what they have found."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.figures: Figures = Figures()
        self.finds: list[str] = []
        self.ended = self.done = 0
        self._reports: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._began = time.monotonic()

    @property
    def minutes(self) -> float:
        """Since the beginning."""
        return (time.monotonic() - self._began) / 60

    def _start(self, share: int) -> subprocess.Popen[str]:
        options = self.options
        only = ["--only", options.only] if options.only else []
        worker = subprocess.Popen(
            [
                *(sys.executable, "-m", "searching", "--worker", str(share)),
                *("--seed", str(options.seed), *only),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ
            | {"PYTHONPATH": f"{_TESTS}:{_TESTS.parent}", "OPENBLAS_NUM_THREADS": "1"},
            start_new_session=True,  # With what it starts.
        )
        threading.Thread(target=self._listen, args=(worker,), daemon=True).start()
        return worker

    def _listen(self, worker: subprocess.Popen[str]) -> None:
        assert worker.stdout is not None
        for line in worker.stdout:
            self._reports.put(json.loads(line))
        self._reports.put(None)

    def go(self) -> None:
        """Until the time is over, or somebody stops it."""
        workers = [self._start(share) for share in range(self.options.jobs)]
        told = 0.0
        try:
            while (left := self.options.minutes - self.minutes) > 0 and self._goes_on():
                try:
                    report = self._reports.get(timeout=min(60 * left, 1))
                except queue.Empty:
                    pass
                else:
                    self._take(report)
                    if self.ended == len(workers):
                        break
                if self.minutes - told >= 1:
                    told = self.minutes
                    print(f"{told:.0f} min: {self.text()}", file=sys.stderr, flush=True)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
        finally:
            for worker in workers:
                if worker.poll() is None:
                    os.killpg(worker.pid, signal.SIGTERM)
                worker.wait()

    def _goes_on(self) -> bool:
        most = self.options.count
        return len(self.finds) < MOST and (most is None or self.done < most)

    def _take(self, report: dict[str, Any] | None) -> None:
        if report is None:
            self.ended += 1
            self.finds.append("a process")
            print("FOUND: a process has ended by itself, see above", flush=True)
            return
        self.done += 1
        self.figures.update(report["figures"])
        if report["found"]:
            how = again(report["kind"], report["seed"])
            self.finds.append(how)
            print(f"FOUND {report['found']}\n  again: {how}", flush=True)

    def text(self) -> str:
        """What has been done so far."""
        counts = ", ".join(f"{count} {name}" for name, count in self.figures.items())
        return f"{counts or 'nothing yet'}; {len(self.finds)} found"


def _on_term(_signum: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def arguments(given: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="scripts/search",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--minutes", type=float, default=60, metavar="N", help="how long (60)")
    parser.add_argument("--count", type=int, metavar="N", help="end after so many, if before that")
    parser.add_argument("--seed", type=int, help="the same seed, the same search (random)")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes at a time (1)")
    parser.add_argument("--only", choices=KINDS, help="one kind of search, instead of all")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.add_argument("--again", metavar="KIND:SEED", help="only this, and all that it says")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(given)
    if options.jobs < 1 or options.minutes <= 0:
        parser.error("--jobs and --minutes must be more than nothing")
    if options.again:
        kind, _, seed = options.again.partition(":")
        if kind not in KINDS or not seed.isdecimal():
            parser.error(f"--again takes one of {', '.join(KINDS)}, a colon and a number")
    if options.seed is None:
        options.seed = random.SystemRandom().randrange(1 << 32)
    return options


def main(given: list[str] | None = None) -> int:
    """The exit code."""
    options = arguments(given)
    if options.worker is not None:
        work(options.seed, options.worker, options.only)
        return 0
    if options.again:
        kind, _, number = options.again.partition(":")
        figures, found = run(kind, int(number))
        print(found or f"nothing found: {dict(figures)}")
        return 1 if found else 0
    signal.signal(signal.SIGTERM, _on_term)
    print(f"seed {options.seed}, {options.jobs} processes", file=sys.stderr, flush=True)
    search = Search(options)
    search.go()
    for how in search.finds:
        print(f"found: {how}")
    print(f"{search.text()}, seed {options.seed}, {search.minutes:.1f} minutes", flush=True)
    if options.json is not None:
        figures = dict(search.figures) | {
            "found": search.finds,
            "seed": options.seed,
            "minutes": round(search.minutes, 2),
        }
        options.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 1 if search.finds else 0


if __name__ == "__main__":
    raise SystemExit(main())
