"""Every operation beside every other, each stopped anywhere: see `pairs`.

An ordinary run takes some seeds, always the same; `scripts/test --random` and VSNAPFS_EXAMPLES look
further. What a search has found is kept as a trial, with the engine in which it must fail.
"""

from __future__ import annotations

import os
from typing import Any

import chance
import pytest
from pairs import OPERATIONS, SCENES, Trial
from schedules import edited

from vsnapfs.errors import VsnapError
from vsnapfs.volume.buffer import WriteBuffer
from vsnapfs.volume.points import Points
from vsnapfs.volume.protection import Protection

TRIALS = int(os.environ.get("VSNAPFS_EXAMPLES", "100"))
_KEPT: dict[str, Any] = {
    "policy": "offline",
    "buffer": 0,
    "scene": "plain",
    "backwards": False,
    "seconds": 0,
    "reopen": False,
    "end": "kill",
    "kept": "nothing",
    "failure": None,
}
#: What went wrong → the trial, and the edit of the engine that brings it back.
KEPT: dict[str, tuple[dict[str, Any], tuple[type, str, str, str]]] = {
    "a point is taken under a number that has just been given up": (
        {"policy": "evict", "operations": ["create", "a copy fails"], "stops": [(2, False)]},
        (Points, "_still_free", "if number <= self._protection.saved.given_up:", "if False:"),
    ),
    "a fault is written down after it has been cleared": (
        {
            "scene": "nearly full",
            "operations": ["write everything", "give up"],
            "stops": [(1, True)],
        },
        (Protection, "recorded", "await self._persisted.wait()", "pass"),
    ),
    "a ring is made while the volume is closed, and stays locked": (
        {
            "buffer": 64 << 10,
            "operations": ["write where not", "close"],
            "stops": [(5, False)],
            "seconds": 700,
            "reopen": True,
        },
        (WriteBuffer, "start", "if self._ended or", "if"),
    ),
    "slots that are promised are given out": (
        {
            "scene": "high copies",
            "operations": ["write where not", "delete oldest", "several writes"],
            "stops": [(1, True), (1, True)],
        },
        (Points, "_tidy", "also=(*self._room.promised, *area.unknown_slots)", "also=()"),
    ),
}


def test_operations_at_the_same_time_agree_with_some_order_of_them() -> None:
    """Whatever is stopped where, whatever fails and however it ends: what was answered has
    happened, no point changes or is lost without a word, all end, and the next opening agrees.
    """
    first = chance.seed(7) * 1000
    for number in range(TRIALS):
        Trial(first + number).run()


@pytest.mark.parametrize("what", KEPT)
def test_what_was_found_once_is_found_in_the_engine_that_had_it(
    what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trial passes, and fails once the look that was missing is taken away again."""
    given, edit = KEPT[what]
    Trial(1, **_KEPT | given).run()
    edited(monkeypatch, *edit)
    with pytest.raises((AssertionError, VsnapError)) as caught:
        Trial(1, **_KEPT | given).run()
    print(f"{what}: {caught.value!r}")


def test_a_trial_can_be_repeated() -> None:
    """What is printed of a failing trial is enough to run it again; all names in it exist."""
    trial = Trial(5)
    again = eval(repr(trial))
    assert again.chosen == trial.chosen
    assert trial.chosen["scene"] in SCENES
    assert set(trial.chosen["operations"]) <= set(OPERATIONS)
