"""Events with all params, with none and with hostile ones, for tests of what events say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from vsnapfs.events import CATALOG, LANGUAGES, Entry, Event

WHEN = 1_795_332_000_123_456_789  # 2026-11-22T07:20:00.123456789Z

FULL: dict[str, Any] = {
    "volume": "/srv/vol1",
    "diff_area": "/disk2/diff-area",
    "device": "/dev/loop0",
    "mountpoint": "/mnt/vol1",
    "used": 67_000_000,
    "allocated": 67_108_864,
    "maximum": 67_108_864,
    "size": 10**9,
    "old": 67_108_864,
    "new": 134_217_728,
    "block": 12,
    "needed": 2,
    "offset": 196_608,
    "length": 4096,
    "errno": 28,
    "reason": "the copy could not be made.",
    "fault": 8,
    "fault_name": "DIFF_AREA_FULL",
    "point": 7,
    "label": "夜間",
    "points": [1, 2, 3],
    "dropped": 3,
    "count": 3,
    "kept": 2,
    "seconds": 12.5,
    "repeats": 5,
    "what": "a write",
    "text": "something to know",
}

NASTY = (
    "\x1b[31mred\x07</Message></Event>]]><!--&amp;&'\"{volume}[a|b]{nope}]|[\n\r\t\0\x7f\x9b2J"
    "\u202egnp.exe\u2028\ufffe\uffff\udcff\ud800\ufeff 😀 夜間"
)
HOSTILE: list[dict[str, Any]] = [
    dict.fromkeys(FULL, NASTY),
    dict.fromkeys(FULL, -(2**70)),
    dict.fromkeys(FULL, 0),
    dict.fromkeys(FULL, 1),
    dict.fromkeys(FULL, ""),
    dict.fromkeys(FULL, True),
    dict.fromkeys(FULL, 1.5),
    dict.fromkeys(FULL, float("nan")),
    {name: [NASTY, {"a": [1, None]}] for name in FULL},
    {name: [] for name in FULL},
    {name: {NASTY: NASTY} for name in FULL},
    dict.fromkeys(FULL, Path("/a b")),
    {**FULL, NASTY: NASTY, "": 1},
]

entries = pytest.mark.parametrize(
    "entry", CATALOG.values(), ids=lambda e: f"{e.source}-{e.event_id}"
)
languages = pytest.mark.parametrize("lang", LANGUAGES)


def event(entry: Entry, params: dict[str, Any]) -> Event:
    return Event(WHEN, str(entry.source), entry.event_id, entry.level, params)
