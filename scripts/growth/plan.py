"""What is measured, in which order, and with which sizes; runs each measurement in its process.

Owns the temporary directory's content while it runs, and the record that becomes growth.json.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from vsnapfs.demo.clearing import remove_write_buffers
from vsnapfs.diffarea.layout import Layout
from vsnapfs.volume.create import create_volume

from .synthetic import forget_cache, make_volume, mark_unclean

GIB, TIB = 1 << 30, 1 << 40
_BLOCK = 16 << 10
_POINTS = 8
#: Slots left free in a synthetic volume, for the writer that runs during creations.
_ROOM = 20_000
#: Bytes on disk per slot of a synthetic volume: both copies of its descriptor, and some.
_DISK_PER_SLOT = 2 * 512 / 20 * 1.1
_TIME_LIMIT = 900

Figures = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """One extent of the whole measurement."""

    preserved: tuple[int, ...] = (10_000, 100_000, 1_000_000, 3_000_000, 6_500_000, 10_000_000)
    volume_sizes: tuple[int, ...] = (GIB, 16 * GIB, 256 * GIB, 4 * TIB, 15 * TIB)
    #: How many copies are in each of the volumes of different size.
    in_each: tuple[int, ...] = (60_000, 1_000_000)
    points: int = 512
    writes: int = 120_000
    folds: tuple[int, ...] = (100_000, 1_000_000, 6_500_000)
    rounds: int = 3
    creations: int = 9


FULL = Sizes()
QUICK = Sizes(
    preserved=(10_000, 100_000, 1_000_000, 6_500_000),
    volume_sizes=(GIB, 256 * GIB, 15 * TIB),
    in_each=(60_000,),
    points=64,
    writes=20_000,
    folds=(100_000, 1_000_000),
    rounds=1,
    creations=5,
)
#: For the test of this script: seconds.
TINY = Sizes(
    preserved=(3_000, 6_000),
    volume_sizes=(GIB, 2 * GIB),
    in_each=(3_000,),
    points=4,
    writes=400,
    folds=(20_000,),
    rounds=1,
    creations=2,
)


@dataclass
class Step:
    """One step: what it is, a guess at its seconds for the ETA, and the work."""

    what: str
    weight: float
    work: Callable[[], None]


@dataclass
class Measurement:
    """Carries out the steps in `directory` and collects what they find."""

    directory: Path
    sizes: Sizes
    record: dict[str, list[Figures]] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)

    def steps(self) -> list[Step]:
        """All steps, in the order in which they are to be run."""
        sizes = self.sizes
        found = [
            Step(f"{count:,} preserved blocks", 8 + count / 2.5e5, partial(self.scale, count))
            for count in sizes.preserved
        ]
        found += [
            Step(
                f"a volume of {size // GIB} GiB, {count:,} preserved blocks",
                9 + count / 3e5,
                partial(self.volume_size, count, size),
            )
            for size in sizes.volume_sizes
            for count in sizes.in_each
            if count <= size // _BLOCK
        ]
        found.append(
            Step(f"1 to {sizes.points} recovery points", sizes.points / 3 + 1, self.points)
        )
        found.append(Step("writes while the diff area grows", sizes.writes / 1200, self.writes))
        found += [
            Step(f"folding {count:,} entries", 1 + count / 5e5, partial(self.fold, count))
            for count in sizes.folds
        ]
        return found

    def scale(self, count: int) -> None:
        """Opening, lookups, creation and deletion with `count` preserved blocks."""
        replica = max(TIB, count * _BLOCK)
        with _Volume(self, count, replica) as volume:
            if volume is None:
                return
            figures: Figures = {"preserved": count, "replica": replica}
            figures |= self._opened(volume)
            figures |= _probe("scale", volume, self.sizes.creations)
            self._add("preserved", figures)

    def volume_size(self, count: int, size: int) -> None:
        """Opening and creation in a volume of `size` bytes."""
        with _Volume(self, count, size) as volume:
            if volume is None:
                return
            figures: Figures = {"preserved": count, "replica": size}
            figures |= self._opened(volume)
            figures |= _probe("scale", volume, self.sizes.creations)
            self._add("volume_size", figures)

    def _opened(self, volume: Path) -> Figures:
        found: Figures = {}
        for how in ("cold", "warm", "unclean"):
            if how == "unclean":
                mark_unclean(volume)
            runs = []
            for _ in range(self.sizes.rounds):
                if how != "warm":
                    forget_cache(volume)
                runs.append(_probe("open", volume, 0))
            found[how] = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
            found[how]["spread"] = [
                min(run["wall"] for run in runs),
                max(run["wall"] for run in runs),
            ]
        return found

    def points(self) -> None:
        """Creation, lookup and deletion against the number of recovery points."""
        volume = self._new_volume(GIB, self.sizes.points * 64 + 1000, _BLOCK)
        self._add("points", _probe("points", volume, self.sizes.points))
        _remove(volume)

    def writes(self) -> None:
        """The latency of first writes while the diff area grows, with 4 KiB blocks."""
        count = self.sizes.writes
        volume = self._new_volume(count * 4096, count + 1000, 4096)
        self._add("writes", _probe("writes", volume, count))
        _remove(volume)

    def fold(self, count: int) -> None:
        """The longest fold of the index."""
        self._add("fold", _probe("fold", self.directory, count))

    def _new_volume(self, size: int, slots: int, block_size: int) -> Path:
        """A real volume, nothing synthetic about it; its replica is written, not a hole."""
        volume, layout = self.directory / "volume", Layout(block_size)
        volume.mkdir(mode=0o700)
        replica = volume / "replica.img"
        with replica.open("wb") as file:
            for _ in range(min(size, GIB // 2) >> 20):
                file.write(os.urandom(1 << 20))
            file.truncate(size)
        create_volume(
            volume,
            size=None,
            diff_area_size=layout.size_of(layout.valid_slots(slots)),
            replica=replica,
            block_size=block_size,
        )
        forget_cache(volume)
        return volume

    def _add(self, name: str, figures: Figures) -> None:
        self.record.setdefault(name, []).append(figures)


class _Volume:
    """A synthetic volume that is gone at the end; None where the disk has no room for it."""

    def __init__(self, measurement: Measurement, count: int, replica: int) -> None:
        self._measurement, self._count, self._replica = measurement, count, replica
        self._path = measurement.directory / "volume"

    def __enter__(self) -> Path | None:
        needed = int(self._count * _DISK_PER_SLOT) + GIB // 4
        what = f"{self._count} preserved blocks in {self._replica} bytes"
        if shutil.disk_usage(self._measurement.directory).free < needed:
            self._measurement.left_out.append(f"{what}: it takes {needed >> 20} MiB of disk")
            return None
        try:
            make_volume(
                self._path,
                preserved=self._count,
                points=_POINTS,
                replica_size=self._replica,
                block_size=_BLOCK,
                room=_ROOM,
            )
        except (OSError, ValueError) as error:
            self._measurement.left_out.append(f"{what}: {error}")
            return None
        return self._path

    def __exit__(self, *_: object) -> None:
        _remove(self._path)


def _remove(volume: Path) -> None:
    """The directory, and the write buffer that a probe which never closed it has left in memory."""
    remove_write_buffers([volume / "volume.toml"])
    shutil.rmtree(volume, ignore_errors=True)


def _probe(kind: str, volume: Path, count: int) -> Figures:
    """Run one measurement in a process of its own. RuntimeError if it fails."""
    scripts = Path(__file__).resolve().parent.parent
    environment = os.environ | {"PYTHONPATH": f"{scripts}:{scripts.parent}"}
    result = subprocess.run(
        [sys.executable, "-m", "growth.probe", kind, str(volume), str(count)],
        capture_output=True,
        text=True,
        check=False,
        timeout=_TIME_LIMIT,
        env=environment,
    )
    if result.returncode or not result.stdout:
        raise RuntimeError(f"{kind} in {volume} failed:\n{result.stderr[-2000:]}")
    figures: Figures = json.loads(result.stdout)
    return figures
