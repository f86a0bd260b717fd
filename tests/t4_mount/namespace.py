"""A mount namespace of its own, in which commands are run.

What is mounted there cannot be copied by another program that makes a namespace at that moment,
and so cannot be kept busy by it. At the end all that was mounted and attached there is taken away,
the last first.
"""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from mounted_rig import Machine, quiet, sh, until


class Namespace:
    """Made with `unshare --mount`; ends with the machine's other things."""

    def __init__(self, machine: Machine) -> None:
        self._keeper = subprocess.Popen(
            ["unshare", "--mount", "--propagation", "private", "sh", "-c", "echo; exec cat"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self._loops: dict[str, str] = {}
        self._undo: list[tuple[str | Path, ...]] = []
        machine.later(self.end)
        assert self._keeper.stdout is not None
        assert self._keeper.stdout.readline() == b"\n"  # It is there now.
        self.root = Path(f"/proc/{self._keeper.pid}/root")

    def end(self) -> None:
        """Take everything away. May be called twice."""
        undo, self._undo = self._undo, []
        for command in reversed(undo):
            quiet(*self._inside, *command)
        for device, file in self._loops.items():
            with suppress(AssertionError):  # What is left, and why, is said at the end of the run.
                until(partial(_is_detached, device, file), 10)
        self._loops.clear()
        if self._keeper.returncode is None:
            self._keeper.communicate()

    def leave(self) -> None:
        """Keep it no longer: it lasts as long as the processes that are in it."""
        self._keeper.communicate()

    @property
    def _inside(self) -> tuple[str, ...]:
        return ("nsenter", f"--mount=/proc/{self._keeper.pid}/ns/mnt", "--")

    def run(self, *command: str | Path) -> str:
        """A command that must succeed; its stdout."""
        return sh(*self._inside, *command)

    def start(self, *command: str | Path) -> subprocess.Popen[bytes]:
        """A command that goes on; its stdin and stdout are pipes."""
        command = (*self._inside, *map(str, command))
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def mount(self, *arguments: str | Path) -> None:
        """mount(8); the mountpoint comes last."""
        self.run("mount", *arguments)
        self._undo.append(("umount", "--lazy", arguments[-1]))

    def serve(self, volume: Path, place: Path, **environment: str) -> None:
        """Mount a volume there."""
        self.vsnapfs("mount", volume, place, **environment)
        self._undo.append((sys.executable, "-m", "vsnapfs", "umount", volume))

    def vsnapfs(self, *arguments: str | Path, **environment: str) -> str:
        """A command of ours; its stdout."""
        settings = [f"{name}={value}" for name, value in environment.items()]
        return self.run("env", *settings, sys.executable, "-m", "vsnapfs", *arguments)

    def status(self, volume: Path) -> dict[str, Any]:
        """What `status --json` says of it."""
        (found,) = json.loads(self.vsnapfs("status", volume, "--json"))
        assert isinstance(found, dict)
        return found

    def loop(self, over: str | Path, *options: str) -> str:
        """A loop device over a device or file there; its name."""
        device = self.run("losetup", "--find", "--show", *options, over).strip()
        self._loops[device] = _file_of(device)
        self._undo.append(("losetup", "--detach", device))
        return device

    def write(self, path: Path, data: bytes) -> None:
        """Write a file there, and leave it in the page cache."""
        (self.root / path.relative_to("/")).write_bytes(data)

    def read(self, path: Path) -> bytes:
        """A file as it is there."""
        return (self.root / path.relative_to("/")).read_bytes()


def _file_of(device: str) -> str:
    try:
        file = Path(f"/sys/block/{Path(device).name}/loop/backing_file")
        return file.read_text(errors="surrogateescape")
    except OSError:
        return ""


def _is_detached(device: str, file: str) -> bool:
    """Whether it is gone, or is another's by now."""
    return _file_of(device) != file
