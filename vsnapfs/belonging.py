"""Whose the files are that root makes in another user's volume.

Root may serve, mend and look at a volume of another user. What it makes there belongs to that user
from the start: a diff area, a state file or a log of root's (0600) would keep the owner out.
Promises that nothing else is given away: only a file that lies, by its only name, in a directory
of the user who gets it. Whoever calls has just made it.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


def give_to_owner(fd: int, path: Path) -> None:
    """Root only: `fd`, just made at `path`, becomes the file of the owner of its directory."""
    if os.geteuid() != 0:
        return
    # A host may refuse it (root is nobody on a network's disk): then it is as it was made.
    with suppress(OSError):
        folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            owner, made = os.fstat(folder), os.fstat(fd)
            # The path may lead elsewhere by now. A file with one name that is found under it
            # in this directory lies nowhere else.
            named = os.stat(path.name, dir_fd=folder, follow_symlinks=False)
            if owner.st_uid and made.st_nlink == 1 and os.path.samestat(made, named):
                os.fchown(fd, owner.st_uid, owner.st_gid)
        finally:
            os.close(folder)


def open_or_make(path: Path, flags: int) -> int:
    """Open a file for a log; if there is none make it (0600), for the owner of the directory."""
    try:
        fd = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return os.open(path, flags)
    give_to_owner(fd, path)
    return fd
