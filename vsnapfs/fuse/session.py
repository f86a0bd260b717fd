"""pyfuse3's session: mounting, the loop, and the end. There is one in a process.

Owns the calls of pyfuse3's module functions and their order, which matters: `mount`, then `run`
until somebody unmounts or `terminate` is called, then `close`, each once. Promises that a failing
mount is a VsnapError with libfuse's own words in it (libfuse prints them to stderr and returns
only "failed").

The kernel is never notified of anything (pyfuse3.invalidate_*): such a notice waits, not
interruptibly, for locks held by requests that this process must answer, so a SIGKILL at that moment
would leave a mount that only `umount -f` can end. Names that come and go are not cached instead,
and the pages of a deleted point are never wrong, since its inode number is never used again.

Leaves who may mount what where, and what happens when the mount is busy, to the daemon.
"""

from __future__ import annotations

import os
import string
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyfuse3
import trio

from vsnapfs.errors import VsnapError
from vsnapfs.fuse.kernel import KernelLimits
from vsnapfs.fuse.loop import Loop
from vsnapfs.fuse.operations import VolumeOperations

_SUBTYPE = "vsnapfs"
_HARMLESS = frozenset((string.ascii_letters + string.digits + "/._-+@:=~").encode())
# Requests in progress at one time, more than the kernel sends in the background (`kernel`), so that
# some are left for those that somebody waits for. Tasks cost their memory only when there are any.
_MAX_TASKS = 99
# Tasks that have nothing to do are kept for the next burst: at depth 32 on first touch, ending and
# starting them cost a sixth of the time. What each keeps is the buffer of its largest request.
_MIN_TASKS = 32


def mount_options(source: Path, extra: Iterable[str] = ()) -> set[str]:
    """The options pyfuse3.init takes: the mount's source is the volume's directory.

    extra: options already known to be harmless, such as allow_other.
    """
    return {f"fsname={_escaped(source)}", f"subtype={_SUBTYPE}", "default_permissions", *extra}


def _escaped(path: Path) -> str:
    r"""`path` as the value of one -o option of libfuse.

    libfuse splits at commas and undoes backslashes and \ooo; pyfuse3 takes only ASCII. So every
    byte that is not plainly harmless becomes \ooo, whatever encoding the name is in.
    """
    return "".join(
        chr(byte) if byte in _HARMLESS else f"\\{byte:03o}" for byte in os.fsencode(path)
    )


class Session:
    """The mount of one volume in this process."""

    def __init__(self, operations: VolumeOperations, mountpoint: Path, options: set[str]) -> None:
        self._operations = operations
        self._mountpoint = mountpoint
        self._options = options
        self._open = False
        self._running = False
        self._loop = Loop()
        self._limits = KernelLimits("")
        operations.session_figures = self.figures

    def figures(self) -> dict[str, Any]:
        """How requests come in, for `status`: the loop, and the kernel's limits as they are."""
        kind = "polling" if self._loop.polling else "plain"
        return {"loop": kind, "note": self._loop.note or None} | self._limits.as_they_are()

    def mount(self) -> None:
        """Mount. Requests wait in the kernel until `run`. VsnapError when it is refused."""
        said: list[str] = []
        self._loop.install()
        try:
            with _stderr_into(said):
                pyfuse3.init(self._operations, str(self._mountpoint), self._options)
                self._open = True
        except Exception as exc:
            # Memory or the like can run out after it was mounted: nobody would answer there.
            self.close()
            self._loop.remove()
            reason = " ".join(" ".join(said).split()) or str(exc)
            raise VsnapError(
                f"cannot mount on {self._mountpoint}: {reason}", code="mount-failed"
            ) from exc

    async def run(self, device: str) -> None:
        """Answer requests until the mount is gone or `terminate` is called.

        device: of the mount, "MAJOR:MINOR"; "" if it is not known. Requests in progress at the end
        are answered first. OSError when the kernel's end breaks.
        """
        self._limits = KernelLimits(device)
        self._running = True
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._raise_limits)
                await pyfuse3.main(min_tasks=_MIN_TASKS, max_tasks=_MAX_TASKS)
                nursery.cancel_scope.cancel()
        finally:
            self._running = False

    async def _raise_limits(self) -> None:
        # With the answer to its hello the kernel sets them, too.
        await self._operations.answered_init.wait()
        self._limits.raise_them()

    def terminate(self) -> None:
        """Let `run` return once the requests in progress are answered. Harmless at any time."""
        if self._running:
            pyfuse3.terminate()

    def close(self) -> None:
        """End the session; unmounts (lazily) unless somebody has. Harmless when not mounted."""
        if self._open:
            self._open = False
            pyfuse3.close(unmount=True)
            self._loop.remove()


@contextmanager
def _stderr_into(lines: list[str]) -> Iterator[None]:
    """Collect what C code writes to file descriptor 2 meanwhile."""
    catcher = os.memfd_create("vsnapfs-stderr", os.MFD_CLOEXEC)
    saved = os.dup(2)
    try:
        os.dup2(catcher, 2)
        try:
            yield
        finally:
            os.dup2(saved, 2)
            text = os.pread(catcher, 4096, 0).decode("utf-8", "replace")
            lines.extend(line for line in text.splitlines() if line.strip())
    finally:
        os.close(saved)
        os.close(catcher)
