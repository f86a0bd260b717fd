"""What this machine can do, and where the demo works.

Owns the temporary directory and the mounts' being out of everybody's way (`namespace`). Promises
that whatever ends the demo (the last chapter, an error, Ctrl-C, SIGTERM), all of it is removed
(`clearing`), and that what could not be removed is named on stderr.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from vsnapfs.cli.output import clean
from vsnapfs.daemon import mounts
from vsnapfs.demo.clearing import WITH_SBIN, Left, quiet, remove_all
from vsnapfs.demo.namespace import own_namespace
from vsnapfs.demo.narrator import Narrator
from vsnapfs.errors import VsnapError
from vsnapfs.units import format_size

# Program → the Debian package that has it.
_ALWAYS = {"sh": "dash", "fio": "fio", "sha256sum": "coreutils", "dd": "coreutils"}
_AS_ROOT = {
    "mkfs.ext4": "e2fsprogs",
    "e2fsck": "e2fsprogs",
    "losetup": "mount",
    "mount": "mount",
    "umount": "mount",
    "fsfreeze": "util-linux",
}
# File systems that are no disk: what is shown there would say nothing about durability.
_MEMORY = ("tmpfs", "ramfs")
_SPACE = {True: 400 << 20, False: 900 << 20}  # bytes that --fast, and the whole story, may take


@dataclass(frozen=True)
class Machine:
    """full: with ext4 on a loop device. why_not: what stands in the way of that, else "".

    why_shared: what stands in the way of a mount namespace of our own, "" when we are in one.
    """

    full: bool
    why_not: str
    why_shared: str


def look_around(text: Mapping[str, str]) -> Machine:
    """What can be shown here. VsnapError, with what to install, if a program is missing.

    From then on we are in a mount namespace of our own, if there can be one.
    """
    root = os.geteuid() == 0
    wanted = _ALWAYS | (_AS_ROOT if root else {})
    missing = {tool: package for tool, package in wanted.items() if not _which(tool)}
    if missing:
        raise VsnapError(
            text["missing_tools"].format(tools=", ".join(missing)),
            hint=f"apt-get install {' '.join(sorted(set(missing.values())))}",
            code="missing-tools",
        )
    why_shared = own_namespace(_place())
    why_not = ""
    if not root:
        why_not = text["why_no_root"]
    elif problem := _loop_problem():
        why_not = text["why_no_loop"].format(reason=problem)
    return Machine(full=not why_not, why_not=why_not, why_shared=why_shared)


def _which(tool: str) -> str | None:
    return shutil.which(tool, path=WITH_SBIN)


def _loop_problem() -> str:
    """Why no loop device can be had, or "". Tries it: containers only look as if they could."""
    with tempfile.TemporaryDirectory(prefix="vsnapfs-demo-", dir=_place()) as name:
        image = Path(name).resolve() / "image"
        image.touch(0o600)
        os.truncate(image, 1 << 20)
        try:
            code, output = quiet("losetup", "--find", "--show", str(image))
        finally:  # Ctrl-C may come between its work and its answer.
            for device in mounts.loop_devices(image.parent):
                quiet("losetup", "--detach", device)
    return (" ".join(output.split()) or f"losetup: {code}") if code else ""


def _place() -> Path:
    """A directory on a disk, if there is one. TMPDIR decides when it is set."""
    chosen = os.environ.get("TMPDIR")
    places = [Path(chosen)] if chosen else [Path("/var/tmp"), Path.cwd(), Path("/tmp")]  # noqa: S108 - mkdtemp makes the names
    usable = [place for place in places if os.access(place, os.W_OK | os.X_OK)]
    if not usable:
        raise VsnapError(f"cannot write to {' or '.join(map(str, places))}", code="no-place")
    on_disk = [place for place in usable if _filesystem(place) not in _MEMORY]
    return (on_disk or usable)[0]


def _filesystem(place: Path) -> str:
    """The type of the file system that holds `place`, as the mount table has it."""
    real = place.resolve()
    found = [m for m in mounts.all_mounts() if real == m.mountpoint or m.mountpoint in real.parents]
    if not found:
        return ""  # In a chroot that is no mount of its own, the table does not say.
    # The longest mountpoint; of several mounts on one, the newest.
    return max(enumerate(found), key=lambda pair: (len(str(pair[1].mountpoint)), pair[0]))[1].fstype


class Workplace:
    """A context: the directory in which everything happens. `left`: what could not be removed."""

    def __init__(self, narrator: Narrator, *, fast: bool, own_mounts: bool) -> None:
        self._narrator = narrator
        self._fast = fast
        self._own_mounts = own_mounts
        self.left: list[Left] = []
        self.directory = Path()

    def __enter__(self) -> Self:
        """Make the directory. VsnapError without room."""
        place = _place()
        free = shutil.disk_usage(place).free
        if free < _SPACE[self._fast]:
            raise VsnapError(
                self._narrator.text(
                    "no_space",
                    place=place,
                    free=format_size(free),
                    needed=format_size(_SPACE[self._fast]),
                ),
                hint=self._narrator.text("no_space_hint"),
                code="no-space",
            )
        ends = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        before = signal.pthread_sigmask(signal.SIG_BLOCK, ends)
        try:
            self.directory = Path(tempfile.mkdtemp(prefix="vsnapfs-demo-", dir=place)).resolve()
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        except BaseException:  # Nobody calls `__exit__` yet.
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            if self.directory != Path():
                self.directory.rmdir()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Remove everything, or say what is left. A second Ctrl-C does not stop this."""
        signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        before = {number: signal.signal(number, signal.SIG_IGN) for number in signals}
        try:
            if kind is not None:
                # Nobody may be reading any more (a closed pipe), which is no reason to stop.
                with contextlib.suppress(OSError):
                    self._narrator.note(self._narrator.text("cleaning"))
            self.left = remove_all(self.directory, own_mounts=self._own_mounts)
            if self.left:
                what = "\n".join(f"  {clean(str(thing))}" for thing in self.left)
                with contextlib.suppress(OSError):
                    print(self._narrator.text("left", what=what), file=sys.stderr)  # noqa: T201 - last words
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
