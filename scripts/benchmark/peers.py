"""The peers from Debian's packages: qemu-storage-daemon, and nbdkit's cow filter with nbdfuse.

Both with their defaults, but for what `says` tells, and so the report.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmark.cells import Cell
from benchmark.machine import BenchError, mounted, run, started, wait_for
from benchmark.systems import Served, System


def _missing(*programs: str) -> Callable[[], str | None]:
    def missing() -> str | None:
        lacking = [program for program in programs if shutil.which(program) is None]
        return f"not installed: {', '.join(lacking)}" if lacking else None

    return missing


def _quoted(path: Path) -> str:
    """A path in one of QEMU's option lists, where a comma is doubled."""
    return str(path).replace(",", ",,")


def _serve_qemu(*create: str) -> Callable[[Path, Path], AbstractContextManager[Served]]:
    @contextmanager
    def serve(image: Path, work: Path) -> Iterator[Served]:
        """The live image behind a copy-before-write filter; what it saved, as snapshot-access."""
        target, live, point = work / "copies.qcow2", work / "live", work / "point"
        size = str(image.stat().st_size)
        run("qemu-img", "create", "-q", "-f", "qcow2", *create, target, size)
        for place in (live, point):
            place.touch()
        filtered = (
            "driver=copy-before-write,node-name=live,file=image,target=target,"
            "on-cbw-error=break-guest-write"
        )
        command = (
            "qemu-storage-daemon",
            *("--blockdev", f"driver=file,node-name=image,filename={_quoted(image)}"),
            *("--blockdev", f"driver=file,node-name=target-file,filename={_quoted(target)}"),
            *("--blockdev", "driver=qcow2,node-name=target,file=target-file"),
            "--blockdev",
            filtered,
            *("--blockdev", "driver=snapshot-access,node-name=point,file=live"),
            "--export",
            f"type=fuse,id=live,node-name=live,mountpoint={_quoted(live)},writable=on",
            *("--export", f"type=fuse,id=point,node-name=point,mountpoint={_quoted(point)}"),
        )
        with started(work, *command) as process:
            try:
                with mounted(process, live, point, clean=False):
                    yield Served(live, (process.pid,), point, keeps_files=(image, target))
            finally:
                process.terminate()

    return serve


@contextmanager
def _serve_nbdkit(image: Path, work: Path) -> Iterator[Served]:
    """Writes go to an overlay in TMPDIR; the image stays as it was, so it is the point."""
    file = work / "live"
    file.touch()
    # A socket's name can have 107 bytes, and the directory of the images be longer than that.
    with TemporaryDirectory(prefix="vsnapfs-") as place:
        yield from _nbdkit_on(Path(place) / "socket", image, work, file)


def _nbdkit_on(socket: Path, image: Path, work: Path, file: Path) -> Iterator[Served]:
    nbdkit = ("nbdkit", "--foreground", "--unix", socket, "--filter=cow", "file", image)
    nbdfuse = ("nbdfuse", file, "--unix", socket)
    with started(work, *nbdkit, environment={"TMPDIR": str(work)}) as server:
        try:
            if not wait_for(lambda: socket.exists() or server.poll() is not None, 10):
                raise BenchError("nbdkit did not open its socket")
            with started(work, *nbdfuse) as client, mounted(client, file):
                yield Served(file, (server.pid, client.pid), image, keeps_files=(image,))
        finally:
            server.terminate()


def _nbdkit_not_for(cell: Cell) -> str | None:
    return "its recovery point is the plain image" if cell.reads_point else None


PEERS = (
    System(
        "qemu",
        "qemu-storage-daemon, FUSE export of a copy-before-write filter over qcow2 with its 64 KiB "
        "clusters, on-cbw-error=break-guest-write; points are read through snapshot-access, always "
        "1 deep",
        _serve_qemu(),
        missing=_missing("qemu-storage-daemon", "qemu-img"),
    ),
    System(
        "qemu-16k",
        "the same with cluster_size=16k in the qcow2",
        _serve_qemu("-o", "cluster_size=16k"),
        missing=_missing("qemu-storage-daemon", "qemu-img"),
    ),
    System(
        "nbdkit",
        "nbdkit's cow filter (64 KiB blocks; writes go to a temporary overlay) through nbdfuse",
        _serve_nbdkit,
        missing=_missing("nbdkit", "nbdfuse"),
        not_for=_nbdkit_not_for,
    ),
)
