"""The kernel's end of the connection: its limits, raised where that is allowed.

Owns two kinds of files in /sys. In /sys/fs/fuse/connections/N (fusectl; N is the minor number of
the mount's device): how many requests for asynchronous I/O and read-ahead may be under way,
`max_background` (12 by default), and from how many on the kernel reads no more ahead,
`congestion_threshold`. In /sys/class/bdi/MAJOR:MINOR: `read_ahead_kb` (128 by default), which is
what limits a sequential reader of a recovery point.

Promises that nothing here can fail, or keep a volume from being served: what may not be written
stays as it is, what may not be read is None.
"""

from __future__ import annotations

from pathlib import Path

MAX_BACKGROUND = 64
"""Fewer than the loop has tasks, so that asynchronous writes that wait for the disk (or for room in
the diff area) leave some for everything else."""
_CONGESTION = MAX_BACKGROUND * 3 // 4
_READ_AHEAD_KIB = 1024

_CONNECTIONS = Path("/sys/fs/fuse/connections")
_BDI = Path("/sys/class/bdi")


class KernelLimits:
    """The limits of one mount. device: of the mount, "MAJOR:MINOR" as in mountinfo."""

    def __init__(self, device: str) -> None:
        connection = _CONNECTIONS / (device.partition(":")[2] or "none")
        self._max_background = connection / "max_background"
        self._congestion = connection / "congestion_threshold"
        self._read_ahead = _BDI / (device or "none") / "read_ahead_kb"

    def raise_them(self) -> None:
        """Raise what may be raised. Once the kernel has had the answer to INIT, not before."""
        _raise(self._max_background, MAX_BACKGROUND)
        _raise(self._congestion, _CONGESTION)
        _raise(self._read_ahead, _READ_AHEAD_KIB)

    def as_they_are(self) -> dict[str, int | None]:
        """The limits at this moment; read_ahead in bytes. None: not to be had."""
        read_ahead = _number(self._read_ahead)
        return {
            "max_background": _number(self._max_background),
            "congestion_threshold": _number(self._congestion),
            "read_ahead": None if read_ahead is None else read_ahead << 10,
        }


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _raise(path: Path, value: int) -> None:
    found = _number(path)
    # More than ours was somebody's choice (a rule of udev, for example).
    if found is not None and found < value:
        try:
            path.write_text(f"{value}\n")
        except OSError:
            pass  # not allowed to this user; status shows what it is
