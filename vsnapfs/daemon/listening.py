"""The control socket's file: its name, its mode, and whose it is.

Promises: 0600 from the first moment; a socket that a dead server has left is replaced, one that a
newer server has made is left alone; a directory's name may be longer than sun_path.
"""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path

from vsnapfs.config import SOCKET_NAME
from vsnapfs.errors import VsnapError

# Connections that are not accepted yet. The kernel allows as many as net.core.somaxconn says.
_BACKLOG = 4096
_NO_ROOM = (
    "Free space there, or inodes (df -i), and mount again. All that needs no mount works "
    "meanwhile: its recovery points can be listed, verified, exported and deleted."
)


def open_directory(directory: Path) -> int:
    """A descriptor through which the socket is named: sun_path holds only 107 bytes."""
    return os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)


def socket_address(folder: int) -> str:
    """The address of the socket in an open directory, short whatever the directory's name."""
    return f"/proc/self/fd/{folder}/{SOCKET_NAME}"


class ControlSocket:
    """The listening socket in a volume's directory.

    The caller holds the volume's lock, so a socket file found there is a dead server's.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._socket: socket.socket | None = None
        self._file: tuple[int, int] | None = None  # device, inode of our socket file

    def take(self) -> socket.socket:
        """The listening socket, once."""
        assert self._socket is not None, "listen first"
        taken, self._socket = self._socket, None
        return taken

    def listen(self) -> None:
        """Bind and listen; from now on clients can connect (and wait for `serve`)."""
        folder = open_directory(self._directory)
        try:
            address = socket_address(folder)
            try:
                os.unlink(address)
            except FileNotFoundError:
                pass
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                # On Linux the mode of an unbound socket becomes that of the file, from the start.
                os.fchmod(listener.fileno(), 0o600)
                listener.bind(address)
                listener.listen(_BACKLOG)
                found = os.stat(address)
            except OSError:
                listener.close()
                raise
            self._socket, self._file = listener, (found.st_dev, found.st_ino)
        except OSError as error:
            raise VsnapError(
                f"cannot make the control socket in {self._directory}: {error.strerror}",
                hint=_NO_ROOM if error.errno in (errno.ENOSPC, errno.EDQUOT) else "",
                errno=error.errno or 5,
                code="control-socket",
            ) from error
        finally:
            os.close(folder)

    def unlink(self) -> None:
        """Take the socket's name away, if it is still ours. Open connections live on."""
        if self._file is None:
            return
        ours, self._file = self._file, None
        try:
            folder = open_directory(self._directory)
        except OSError:
            return  # the directory itself is gone
        try:
            found = os.stat(socket_address(folder), follow_symlinks=False)
            if (found.st_dev, found.st_ino) == ours:
                os.unlink(socket_address(folder))
        except OSError:
            pass
        finally:
            os.close(folder)
