"""Chance in the tests: none, unless it is asked for.

Owns every seed. In an ordinary run each choice is the same every time: a change is not refused for
a defect that was there before it, and a failure can be repeated. `scripts/test --random[=SEED]`
(of pytest: --hypothesis-seed=SEED) searches where nobody has looked: all that a test leaves to
chance then follows from that one seed, which is printed. What such a search finds is mended and
kept as a fixed example that every run replays: `@example` above the test, or for a state machine a
few lines in tests/t1_model/test_kept_finds.py.

What no seed decides: threads, processes and the instants of real mounts; and bytes that are only
content, which may come from os.urandom. The long runs (scripts/search, kill-loop, fuzz-files,
crash-explore) take another seed each time, and print it.
"""

from __future__ import annotations

import os
import random

import hypothesis
import pytest
import trio._core._run as trio_run

#: None: the same in every run.
SEED: str | None = None
#: Hash seeds of the processes that tests start, where nobody has chosen one. Our own is chosen
#: before Python starts; scripts/test does that.
HASH_SEED = "PYTHONHASHSEED"


def configure(config: pytest.Config) -> None:
    """Before any test module is imported."""
    global SEED  # noqa: PLW0603 - one run, one seed
    SEED = config.getoption("--hypothesis-seed", default=None)
    # No deadline and no complaint about examples that are slow to make: a busy machine is no bug.
    # Nor are ones that come out too large, as happens by chance when few are asked for.
    # VSNAPFS_EXAMPLES=2000 looks harder.
    hypothesis.settings.register_profile(
        "vsnapfs",
        deadline=None,
        suppress_health_check=(
            hypothesis.HealthCheck.too_slow,
            hypothesis.HealthCheck.data_too_large,
        ),
        derandomize=SEED is None,
        print_blob=True,
        max_examples=int(os.environ.get("VSNAPFS_EXAMPLES", "100")),
    )
    hypothesis.settings.load_profile("vsnapfs")


def begin(test: str) -> None:
    """Before each test: whatever draws from a generator that all share starts anew."""
    for generator in (random, trio_run._r):
        generator.seed(f"{SEED} {test}")


def seed(usual: int) -> int:
    """A seed for a test that draws its own choices: `usual`, unless a search was asked for."""
    return usual if SEED is None else random.Random(f"{SEED} {usual}").randrange(1 << 32)


def words() -> str:
    """For the head of the run's report."""
    if SEED is None:
        how = "the same in every run (scripts/test --random searches)"
    else:
        how = f"random search, again with scripts/test --random={SEED}"
    hashes = os.environ.get(HASH_SEED, "another one in every run (scripts/test sets it)")
    return f"choices: {how}; hash seed: {hashes}"
