"""`python -m explorer.creation DIRECTORY`: volumes whose creation was killed before each step.

Owns the killing: DIRECTORY/1, DIRECTORY/2, … are left as SIGKILL before the first, second, … step
left them, the last one is whole. In a process of its own, because it forks.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from vsnapfs.backing import FileBacking
from vsnapfs.volume import create

SIZE, AREA = 70_001, 1 << 20
#: Everything that changes a file or a directory.
STEPS: tuple[tuple[Any, str], ...] = (
    (FileBacking, "create"),
    (FileBacking, "write"),
    (FileBacking, "sync"),
    (FileBacking, "allocate"),
    (FileBacking, "truncate"),
    (create, "sync_directory"),
    (Path, "mkdir"),
    (os, "rename"),
    (os, "fsync"),
    (os, "write"),
)


@contextmanager
def before_each_step(call: Callable[[str, tuple[Any, ...]], None]) -> Iterator[None]:
    """Call `call(name of the step, its arguments)` before each."""

    def watched(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def step(*args: Any, **options: Any) -> Any:
            call(name, args)
            return function(*args, **options)

        return step

    patches = []
    for owner, name in STEPS:
        function = watched(name, getattr(owner, name))
        bound = staticmethod(function) if name == "create" else function
        patches.append(mock.patch.object(owner, name, bound))
    try:
        for patch in patches:
            patch.start()
        yield
    finally:
        for patch in reversed(patches):
            patch.stop()


def make(directory: Path) -> None:
    """The volume that is created."""
    create.create_volume(directory, size=SIZE, diff_area_size=AREA, block_size=4096)


def _killed_before(directory: Path, step: int) -> bool:
    """Whether the creation got so far."""
    left = step

    def count(_name: str, _args: tuple[Any, ...]) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        with before_each_step(count):
            make(directory)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    return os.WIFSIGNALED(status)


if __name__ == "__main__":
    base, number = Path(sys.argv[1]), 1
    while _killed_before(base / str(number), number):
        number += 1
    print(number)
