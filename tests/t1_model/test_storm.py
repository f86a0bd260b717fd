"""A volume's life at random, with clients at the same time and many openings: see `storm`.

An ordinary run takes some seeds, always the same; `scripts/test --random`, VSNAPFS_EXAMPLES and
`scripts/search` look further.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import chance
import pytest
from explorer.mutants import broken_engine
from storm import Storm
from storm.mutants import MUTANTS, WITHIN

from vsnapfs.errors import VsnapError

STORMS = int(os.environ.get("VSNAPFS_EXAMPLES", "100")) // 5


def test_whatever_happens_at_the_same_time_and_in_between_nothing_is_lost() -> None:
    """With clients at work, failures, rot and old copies, ended in every way: what was acknowledged
    is there, what was flushed is durable, points are of one instant and stay, and it comes online.
    """
    first = chance.seed(3) * 1000
    for number in range(STORMS):
        Storm(first + number, lives=5).run()


def test_a_storm_can_be_repeated() -> None:
    """The same seed is the same life, step by step; what is printed of it is enough."""
    storm = Storm(5, lives=3, failures=True, rot=True, copies=True)
    storm.run()
    again = eval(repr(storm))
    again.run()
    assert again.clients.trace == storm.clients.trace
    assert again.rig.host.counts == storm.rig.host.counts


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_a_broken_rule_is_found(mutant: Callable[..., None]) -> None:
    """An engine that breaks one rule fails within so many seeds, and the right one with none."""
    given: dict[str, Any] = MUTANTS[mutant]
    for seed in range(WITHIN):
        with broken_engine(mutant):
            try:
                Storm(seed, **given).run()
            except (AssertionError, OSError, VsnapError, ExceptionGroup) as error:
                print(f"{mutant.__name__} with seed {seed}: {error!r}")
                break
    else:
        pytest.fail(f"not found in {WITHIN} seeds")
    Storm(seed, **given).run()
