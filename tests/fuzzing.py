"""Mutate diff areas and state files, and see what the engine makes of it: scripts/fuzz-files

Each case changes the files of a volume (bits, stretches, lengths, old generations; or values whose
checksums are made to fit), then opens it, reads every recovery point, asks for its status, verifies
and repairs it, closes and opens it once more. What must hold is told in tests/filefuzz.py.

Prints the count, the seed and the minutes; exit code 1 if there was a violation, each of which is
shown with the command that repeats it. Runs on a simulated disk, in memory: nothing is written.
"""

from __future__ import annotations

import argparse
import collections
import multiprocessing
import os
import random
import resource
import time
import traceback

import filefuzz
import mutations

CHUNK = 100
SHOWN = 20
ADDRESS_SPACE = 4 << 30

Found = tuple[int, list[str], str, str]  # number, what was changed, violation, traceback
_bases: list[mutations.Base] = []


def start() -> None:
    """In each process: what a runaway case may take, and the volumes to change."""
    os.nice(10)
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    _bases.extend(mutations.bases())


def run(job: tuple[int, int, int]) -> tuple[int, int, list[Found]]:
    """(cases, of them refused at opening, violations) of the cases first … last - 1."""
    seed, first, last = job
    refused = 0
    found: list[Found] = []
    for number in range(first, last):
        outcome = filefuzz.case(_bases, seed, number)
        refused += bool(outcome.refused)
        if outcome.violation:
            lines = traceback.format_exception(outcome.error) if outcome.error else []
            found.append((number, outcome.said, outcome.violation, "".join(lines)))
    return last - first, refused, found


def main() -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(prog="fuzz-files", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--count", type=int, default=2000, help="how many cases (2000)")
    parser.add_argument("--seed", type=int, help="the same seed gives the same cases (random)")
    parser.add_argument("--first", type=int, default=0, help="number of the first case (0)")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time (1)")
    options = parser.parse_args()
    seed = random.SystemRandom().randrange(2**32) if options.seed is None else options.seed
    end = options.first + options.count
    print(f"seed {seed}, cases {options.first} to {end - 1}, {options.jobs} processes", flush=True)
    jobs = [(seed, first, min(first + CHUNK, end)) for first in range(options.first, end, CHUNK)]
    started = told = time.monotonic()
    done = refused = violations = 0
    kinds: collections.Counter[str] = collections.Counter()
    with multiprocessing.get_context("spawn").Pool(options.jobs, start) as pool:
        for count, not_opened, found in pool.imap_unordered(run, jobs):
            done += count
            refused += not_opened
            for number, said, violation, trace in found:
                violations += 1
                kinds[violation[:60]] += 1
                if violations <= SHOWN or kinds[violation[:60]] == 1:
                    print(
                        f"VIOLATION {violation}\n  {'; '.join(said)}\n{trace}"
                        f"  again: scripts/fuzz-files --seed {seed} --first {number} --count 1",
                        flush=True,
                    )
            if time.monotonic() - told > 60:
                told = time.monotonic()
                print(f"{done} of {options.count}, {violations} violations", flush=True)
    minutes = (time.monotonic() - started) / 60
    print(
        f"{done} mutations, seed {seed}, {minutes:.1f} minutes: {violations} violations "
        f"({refused} could not be opened at all, with an error that says why)"
    )
    return 1 if violations or done != options.count else 0


if __name__ == "__main__":
    raise SystemExit(main())
