"""From single results to what is told: medians, spreads, ratios within one round, aims.

A ratio is formed within each round, where both systems were measured minutes apart, and the median
of these is told with the least and the greatest: that is steadier than the ratio of two medians on
a machine whose speed drifts.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]


@dataclass(frozen=True)
class Spread:
    """The median of some values with the least and the greatest, and how many there were."""

    median: float
    least: float
    greatest: float
    count: int


def spread(values: Iterable[float | None]) -> Spread | None:
    """The spread of the values that are there; None if none is."""
    there = [value for value in values if value is not None]
    if not there:
        return None
    return Spread(statistics.median(there), min(there), max(there), len(there))


class Figures:
    """The results of a run, by cell and system."""

    def __init__(self, results: Sequence[Row]) -> None:
        self._rows: dict[tuple[str, str], dict[int, Row]] = {}
        for row in results:
            key = row["cell"], row["system"]
            self._rows.setdefault(key, {})[row["round"]] = row

    def of(self, cell: str, system: str, key: str) -> Spread | None:
        """The spread of one figure over the rounds that succeeded."""
        rows = self._rows.get((cell, system), {})
        return spread(row.get(key) for row in rows.values())

    def errors(self, cell: str, system: str) -> list[str]:
        """What the rounds that failed said, each once."""
        rows = self._rows.get((cell, system), {})
        return list(dict.fromkeys(row["error"] for row in rows.values() if "error" in row))

    def stopped_early(self, cell: str, system: str) -> bool:
        """Whether some round did not get through all its blocks in fio's time limit."""
        rows = self._rows.get((cell, system), {})
        return any(row.get("covered", 1.0) < 1.0 for row in rows.values())

    def ratio(self, cell: str, system: str, against: str, *, share: float = 1.0) -> Spread | None:
        """`system`'s rate over `share` of `against`'s rate, in each round that has both."""
        ours = self._rows.get((cell, system), {})
        theirs = self._rows.get((cell, against), {})
        return spread(
            ours[number]["bytes_per_second"] / (theirs[number]["bytes_per_second"] * share)
            for number in sorted(ours.keys() & theirs.keys())
            if "error" not in ours[number] and "error" not in theirs[number]
        )


@dataclass(frozen=True)
class Aim:
    """A goal: `system`'s rate is at least `least` times `share` of `against`'s, in each cell."""

    row: str
    cells: tuple[str, ...]
    system: str
    against: str
    least: float
    share: float = 1.0

    @property
    def against_what(self) -> str:
        """The reference in words."""
        return self.against if self.share == 1.0 else f"half of {self.against}"


_QD1 = ("copied-randwrite-4k-qd1-warm", "copied-randread-4k-qd1-warm")
_QD32 = ("copied-randwrite-4k-qd32-warm", "copied-randread-4k-qd32-warm")
_FIRST_QD1 = ("first-randwrite-4k-qd1-cold", "first-randwrite-16k-qd1-cold")
_FIRST_QD32 = ("first-randwrite-16k-qd32-cold", "first-randwrite-64k-qd32-cold")
_FIRST_1M = ("first-write-1m-qd4-cold",)
_POINT = (
    "point-randread-4k-qd32-cold",
    "point-randread-4k-qd32-warm",
    "point-read-1m-qd4-cold",
    "point100-randread-4k-qd32-cold",
    "point100-randread-4k-qd32-warm",
    "point100-read-1m-qd4-cold",
)
_CACHED = ("cached-randread-4k-qd1", "cached-read-1m-qd1")
_EXT4 = ("ext4-randrw-16k-qd8-cold",)

AIMS: tuple[Aim, ...] = (
    Aim("all copied, 4k, qd1", _QD1, "vsnapfs", "passthrough", 1.0),
    Aim("all copied, 4k, qd1", _QD1, "vsnapfs", "qemu", 1.0),
    Aim("all copied, 4k, qd32", _QD32, "vsnapfs", "passthrough", 1.2),
    Aim("all copied, 4k, qd32", _QD32, "vsnapfs", "qemu", 1.15),
    Aim("first touch, qd1", _FIRST_QD1, "vsnapfs", "qemu", 1.4),
    Aim("first touch, qd32, no barrier", _FIRST_QD32, "vsnapfs-process", "qemu", 1.1),
    Aim("first touch, qd32", _FIRST_QD32, "vsnapfs", "qemu", 0.8),
    Aim("first touch, 1 MiB sequential", _FIRST_1M, "vsnapfs", "disk", 0.8, share=0.5),
    Aim("first touch, 1 MiB sequential", _FIRST_1M, "vsnapfs", "qemu", 0.8),
    Aim("reading a recovery point", _POINT, "vsnapfs", "qemu", 1.3),
    Aim("cached re-read of a recovery point", _CACHED, "vsnapfs", "raw", 0.9),
    Aim("ext4 on a loop device, first touch", _EXT4, "vsnapfs", "passthrough", 0.5),
)
"""What is aimed at. Cells and systems are names of cells.NAMED and of systems."""


@dataclass(frozen=True)
class Reached:
    """One aim in one cell. ratio: None when one of the two could not be measured."""

    aim: Aim
    cell: str
    ratio: Spread | None

    @property
    def verdict(self) -> str:
        """In one word: reached, missed, or not measured. The median decides."""
        if self.ratio is None:
            return "not measured"
        return "reached" if self.ratio.median >= self.aim.least else "missed"


def reached(figures: Figures, cells: Iterable[str], systems: Iterable[str]) -> list[Reached]:
    """Every aim in each of its cells that is among `cells`, if both its systems were asked for."""
    measured, asked = set(cells), set(systems)
    return [
        Reached(aim, cell, figures.ratio(cell, aim.system, aim.against, share=aim.share))
        for aim in AIMS
        for cell in aim.cells
        if cell in measured and {aim.system, aim.against} <= asked
    ]
