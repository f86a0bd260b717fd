"""vsnapfs in its variants, the bare pass-through, the plain file: how each one serves an image.

A system takes an image of full, random content and serves it for the time of one measurement, with
a recovery point (or what it has in its place) taken at the start. peers.py has the other programs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmark.cells import Cell
from benchmark.machine import BenchError, mounted, run, started
from vsnapfs.daemon import client
from vsnapfs.errors import VsnapError

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent


@dataclass(frozen=True)
class Served:
    """An image in service. file: the live one; point: its content at the start, if readable.

    pids: the processes that do the work. another_point: takes one more recovery point; does nothing
    where there can be one only. keeps_files: the files it keeps on disk, for dropping their pages.
    """

    file: Path
    pids: tuple[int, ...] = ()
    point: Path | None = None
    another_point: Callable[[], None] = lambda: None
    keeps_files: tuple[Path, ...] = ()


@dataclass(frozen=True)
class System:
    """One column. serve(image, work): `work` is an empty directory of its own.

    says: one line for the report. direct: whether fio opens the live file with O_DIRECT.
    missing(): why it cannot be used on this machine, or None. not_for(cell): why this cell means
    nothing here, or None. synced: every cell's time includes a final fsync.
    """

    name: str
    says: str
    serve: Callable[[Path, Path], AbstractContextManager[Served]]
    missing: Callable[[], str | None] = lambda: None
    not_for: Callable[[Cell], str | None] = lambda _cell: None
    direct: bool = True
    synced: bool = False


# --- vsnapfs -----------------------------------------------------------------------------------


def _vsnapfs(*words: str | Path) -> list[str]:
    return [sys.executable, "-m", "vsnapfs", *map(str, words)]


def _has_durability() -> str | None:
    """Asks the command itself: an older vsnapfs has no such choice."""
    try:
        text = run(*_vsnapfs("create", "--help"))
    except BenchError as error:
        return str(error)
    return None if "--durability" in text else "this vsnapfs has no --durability"


def _serve_vsnapfs(*options: str) -> Callable[[Path, Path], AbstractContextManager[Served]]:
    @contextmanager
    def serve(image: Path, work: Path) -> Iterator[Served]:
        volume, mountpoint = work / "volume", work / "mnt"
        # Room for every block, twice its descriptors and the growth ahead of need.
        area = image.stat().st_size * 5 // 4 + (64 << 20)
        run(
            *_vsnapfs("create", volume, "--replica", image, "--diff-area-size", str(area)),
            *options,
        )
        mountpoint.mkdir()

        def point() -> None:
            try:
                client.call(volume, "rp_create")
            except VsnapError as error:
                raise BenchError(f"no recovery point: {error.message}") from error

        command = _vsnapfs("mount", "--foreground", volume, mountpoint)
        with started(work, *command) as process, mounted(process, mountpoint):
            point()
            yield Served(
                mountpoint / "replica.img",
                (process.pid,),
                mountpoint / "recovery-points" / "0001.img",
                point,
                (image, volume / "diff-area"),
            )

    return serve


# --- what has no recovery points ---------------------------------------------------------------


@contextmanager
def _serve_passthrough(image: Path, work: Path) -> Iterator[Served]:
    mountpoint = work / "mnt"
    mountpoint.mkdir()
    command = (sys.executable, HERE / "passthrough.py", image, mountpoint)
    with started(work, *command) as process, mounted(process, mountpoint):
        yield Served(mountpoint / "replica.img", (process.pid,), keeps_files=(image,))


@contextmanager
def _serve_plain(image: Path, _work: Path) -> Iterator[Served]:
    yield Served(image, keeps_files=(image,))


def _disk_not_for(cell: Cell) -> str | None:
    if cell.on_ext4:
        return "is the raw file's own file system already"
    if cell.writes or not cell.warm:
        return None
    return "a disk has no warm reads"


OURS = (
    System(
        "vsnapfs",
        "16 KiB blocks, durability as by default: a block is overwritten after its copy is durable",
        _serve_vsnapfs(),
    ),
    System(
        "vsnapfs-process",
        "the same with `--durability process`: no barrier, as in QEMU",
        _serve_vsnapfs("--durability", "process"),
        missing=_has_durability,
    ),
    System(
        "vsnapfs-64k",
        "the same as vsnapfs with 64 KiB blocks",
        _serve_vsnapfs("--block-size=64KiB"),
    ),
)

FLOOR = (
    System(
        "passthrough",
        "bare pyfuse3: one pread or pwrite per request, no copies; of a recovery point's cells it "
        "reads the image",
        _serve_passthrough,
    ),
    System(
        "raw",
        "the image itself, through the page cache (which the servers above have behind them, too)",
        _serve_plain,
        direct=False,
    ),
    System(
        "disk",
        "the ceiling: the image itself with O_DIRECT, and a final fsync within the time",
        _serve_plain,
        not_for=_disk_not_for,
        synced=True,
    ),
)
