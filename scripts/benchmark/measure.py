"""One measurement: the image, the system that serves it, the state the cell asks for, fio, a check.

Promises: the same steps for every system; caches are dropped last before fio starts (a warm cell
then reads the span once more); what a measurement says of a system that keeps a recovery point is
only taken when the point, sampled afterwards, still has the content of before.
"""

from __future__ import annotations

import mmap
import os
import random
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmark import fio, machine
from benchmark.cells import REGION, Cell
from benchmark.machine import BenchError, run
from benchmark.systems import Served, System

_SAMPLES = 24
_SAMPLE_SIZE = 4096
_FILE_IN_EXT4 = "data"


@dataclass(frozen=True)
class Measured:
    """fio's result with the servers' cost: CPU seconds per GiB moved, peak memory in bytes.

    None where no server is involved. caches: "all" or "files", what could be dropped.
    """

    fio: fio.Result
    cpu_seconds_per_gib: float | None
    peak_bytes: int | None
    caches: str


class Images:
    """The images that all systems are measured on: full of random bytes, on the same extents."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        directory.mkdir()

    def get(self, cell: Cell) -> Path:
        """The image for this cell, written back. Its content is random, or a fresh ext4."""
        image = self._directory / f"{'ext4' if cell.on_ext4 else 'plain'}-{cell.image_size}.img"
        if not image.exists():
            _fill(image, cell.image_size)
        if cell.on_ext4:
            master = image.with_suffix(".master")
            if not master.exists():
                _fill(master, cell.image_size)
                _make_ext4(master, cell.span)
            _copy_into(master, image)
        machine.settle(self._directory)
        return image


def measure(cell: Cell, system: System, images: Images, work: Path, seed: int) -> Measured:
    """Measure a cell on a system in `work`, an empty directory. BenchError when it fails."""
    image = images.get(cell)
    before = _samples(image, cell.image_size)
    with ExitStack() as stack:
        served = stack.enter_context(system.serve(image, work))
        file, direct = served.file, system.direct and not cell.buffered
        if cell.reads_point:
            _preserve_half(cell, served)
            file = served.point or served.file
        elif cell.on_ext4:
            file = stack.enter_context(_file_on_loop(served.file, work)) / _FILE_IN_EXT4
            direct = True
        if cell.state in {"copied", "ext4copied"}:
            _touch(cell, served, file, "write", 1 << 20, work, direct=direct)
        caches = machine.drop_caches(work, (*served.keeps_files, file))
        if cell.warm:
            pattern = "read" if cell.block >= 1 << 20 else "randread"
            _touch(cell, served, file, pattern, cell.block, work, direct=direct)
        cpu = machine.cpu_seconds(served.pids)
        result = fio.measure(
            cell,
            file,
            direct=direct,
            seed=seed,
            end_fsync=cell.all_synced or (system.synced and cell.writes),
            work=work,
            servers=served.pids,
        )
        cpu = machine.cpu_seconds(served.pids) - cpu
        peak = machine.peak_memory(served.pids)
        if served.point is not None:
            _check_point(served.point, before)
    return Measured(
        result,
        cpu / (result.bytes_moved / (1 << 30)) if served.pids else None,
        peak if served.pids else None,
        caches,
    )


def _touch(
    cell: Cell, served: Served, file: Path, pattern: str, block: int, work: Path, *, direct: bool
) -> None:
    fio.touch_all(
        file,
        pattern=pattern,
        block=block,
        span=cell.span,
        direct=direct,
        work=work,
        servers=served.pids,
    )


# --- images ------------------------------------------------------------------------------------


def _fill(image: Path, size: int) -> None:
    with open(image, "xb") as file:
        starts = range(0, size, 8 << 20)
        file.writelines(os.urandom(min(8 << 20, size - start)) for start in starts)


def _make_ext4(image: Path, size: int) -> None:
    """An ext4 with one file of `size` random bytes."""
    run("mkfs.ext4", "-q", "-F", "-E", "nodiscard,lazy_itable_init=0,lazy_journal_init=0", image)
    place = image.with_suffix(".mnt")
    with machine.loop_device(image) as device, machine.ext4_mounted(device, place):
        _fill(place / _FILE_IN_EXT4, size)
    place.rmdir()


def _copy_into(source: Path, target: Path) -> None:
    """Copy the content without giving the target other extents."""
    with open(source, "rb") as reading, open(target, "r+b") as writing:
        shutil.copyfileobj(reading, writing, 8 << 20)


@contextmanager
def _file_on_loop(file: Path, work: Path) -> Iterator[Path]:
    """Where the ext4 in this file is mounted."""
    if os.geteuid() != 0:
        raise BenchError("loop devices need root")
    place = work / "files"
    with machine.loop_device(file) as device, machine.ext4_mounted(device, place):
        yield place


# --- recovery points ---------------------------------------------------------------------------


def _preserve_half(cell: Cell, served: Served) -> None:
    """Overwrite half of the image, spread over as many epochs as the cell has points.

    Always the same half: whole regions, chosen once at random.
    """
    if served.point is None:
        return
    regions = list(range(cell.span // REGION))
    chosen = random.Random(7)  # noqa: S311 - repeatable, not secret
    chosen.shuffle(regions)
    regions = regions[: len(regions) // 2]
    buffer = mmap.mmap(-1, REGION)  # page-aligned, as O_DIRECT wants it
    buffer.write(os.urandom(REGION))
    descriptor = os.open(served.file, os.O_WRONLY | os.O_DIRECT)
    try:
        for epoch in range(cell.points):
            if epoch:
                served.another_point()
            for region in regions[epoch :: cell.points]:
                os.pwrite(descriptor, buffer, region * REGION)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
        buffer.close()


def _samples(file: Path, size: int) -> dict[int, bytes]:
    """Offset → bytes of some places, the ends among them."""
    places = random.Random(size)  # noqa: S311 - repeatable, not secret
    offsets = {0, size - _SAMPLE_SIZE}
    while len(offsets) < _SAMPLES:
        offsets.add(places.randrange(size // _SAMPLE_SIZE) * _SAMPLE_SIZE)
    with open(file, "rb", buffering=0) as opened:
        return {at: os.pread(opened.fileno(), _SAMPLE_SIZE, at) for at in sorted(offsets)}


def _check_point(point: Path, before: dict[int, bytes]) -> None:
    """BenchError unless the recovery point has the content of before."""
    with open(point, "rb", buffering=0) as opened:
        for at, wanted in before.items():
            if os.pread(opened.fileno(), _SAMPLE_SIZE, at) != wanted:
                raise BenchError(f"its recovery point has other content than before, at {at}")
