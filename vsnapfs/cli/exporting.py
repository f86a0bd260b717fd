"""Copying a recovery point into a file: `vsnapfs recovery-point export`.

Owns the target file. Promises:

* FILE appears under its name complete, synced and read back, or not at all; an existing FILE stays
  untouched until then. A killed export leaves nothing (the file has no name while it is written; on
  file systems that cannot do that, a hidden `.FILE.….part`).
* What is written was read through the checks of the volume (R1): a preserved block that fails its
  checksum ends the export, naming where.
* Zero blocks become holes: the file takes no more room than the data.
* Files of this volume, and of every mounted one, are never replaced, with or without --force.

A mounted volume is read through its mountpoint, because the server holds the lock; an unmounted one
in this process. Both are the same loop below.
"""

from __future__ import annotations

import errno
import mmap
import os
import secrets
import stat
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vsnapfs.cli.output import ProgressFn
from vsnapfs.cli.signals import TERMINATING
from vsnapfs.cli.volumes import live_mount, mounted
from vsnapfs.config import CONFIG_NAME, VolumePaths, shown
from vsnapfs.errors import UsageError, VsnapError

if TYPE_CHECKING:
    import trio

    from vsnapfs.daemon.mounts import Mount

CHUNK = 1 << 20  # bytes a read; also the largest FUSE request
HOLE = 4096  # bytes; runs of zeros shorter than this are written
_ZEROS = bytes(CHUNK)

ReadFn = Callable[[int, int], Awaitable[bytes | memoryview]]


@dataclass(frozen=True)
class Exported:
    """What has become of it. size, data: bytes of the file, and how many of them are not holes."""

    number: int
    size: int
    data: int


@dataclass(frozen=True)
class _Source:
    """An open recovery point. size: bytes."""

    number: int
    size: int
    read: ReadFn


def export_point(
    volume: Path, point: str, file: Path, *, force: bool, progress: ProgressFn
) -> Exported:
    """Copy recovery point `point` of the volume into `file` (see the module's promises).

    VsnapError when the target is refused, the point does not exist or cannot be read, or the host
    has no room.
    """
    import trio

    from vsnapfs.daemon import client
    from vsnapfs.daemon.process import run_trio

    target = check_target(volume, file, force=force)
    mount = live_mount(volume)
    # Asked here, since without a server that answers it is looked up in a trio of its own.
    number = int(client.call(volume, "rp_resolve", point=point)["number"]) if mount else 0

    async def main() -> Exported:
        ended: list[int] = []
        result = None
        async with trio.open_nursery() as nursery:
            ended = await nursery.start(_wait_for_signal, nursery.cancel_scope)
            source = _open_mounted(mount, volume, number) if mount else _open_here(volume, point)
            result = await _export(source, target, force, progress)
            nursery.cancel_scope.cancel()
        if result is None:
            raise SystemExit(128 + ended[0])  # as a shell reports whoever died of a signal
        return result

    return run_trio(main)


async def _wait_for_signal(
    scope: trio.CancelScope, *, task_status: trio.TaskStatus[list[int]]
) -> None:
    """Cancel `scope` on SIGTERM or SIGHUP, so that the part is removed. Hands out which it was."""
    import trio

    ended: list[int] = []
    with trio.open_signal_receiver(*TERMINATING) as signals:
        task_status.started(ended)
        async for number in signals:
            ended.append(number)
            scope.cancel()


async def _export(
    opened: AbstractAsyncContextManager[_Source], target: Path, force: bool, progress: ProgressFn
) -> Exported:
    async with opened as source:
        with _new_file(target, force=force) as new:
            data, digest = await _copy(source, new.fd, target, progress)
            await _check(source, new.fd, target, digest, progress)
            new.publish()
        return Exported(source.number, source.size, data)


# --- the source --------------------------------------------------------------------------------


@asynccontextmanager
async def _open_mounted(mount: Mount, volume: Path, number: int) -> AsyncIterator[_Source]:
    """The point as a file under the mountpoint.

    Past the page cache: that asks the server for 1 MiB at a time instead of 128 KiB, nearly four
    times as fast, and does not push everything else out of memory.
    """
    path = mount.mountpoint / "recovery-points" / f"{number:04d}.img"
    try:
        fd = _open_direct(path)
        try:
            size = os.fstat(fd).st_size
        except BaseException:
            os.close(fd)
            raise
    except OSError as error:
        raise VsnapError(
            f"recovery point {number} of {shown(volume)} cannot be opened: {error.strerror}",
            hint=_hint(error),
            errno=error.errno or errno.EIO,
        ) from error

    buffer = mmap.mmap(-1, CHUNK)  # O_DIRECT wants whole pages

    async def read(offset: int, length: int) -> bytes | memoryview:
        got = min(os.preadv(fd, [buffer], offset), length)
        view = memoryview(buffer)[:got]
        return view if got == length else bytes(view)  # a part must outlive the next read

    try:
        yield _Source(number, size, read)
    finally:
        os.close(fd)


def _hint(error: OSError) -> str:
    if error.errno in (errno.ENOTCONN, errno.ECONNABORTED):
        return "The process that served the volume has died. Export again: it needs no mount."
    if error.errno == errno.EIO:
        return "`vsnapfs verify` lists every damaged place and the points it belongs to."
    return ""


def _open_direct(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC)


@asynccontextmanager
async def _open_here(volume: Path, point: str) -> AsyncIterator[_Source]:
    """The point of a volume nobody serves, opened under the same lock as a server would.

    `Volume.run` is not started: reading a point needs no growth, and no restore to go on.
    """
    from vsnapfs.volume import Volume

    opened: Any = await Volume.open(volume, look_only=True)
    try:
        number = opened.resolve(point).number
        handle = opened.open_point(number)
        try:
            yield _Source(number, opened.size, handle.read)
        finally:
            handle.close()
    finally:
        await opened.close()


async def _read(source: _Source, offset: int, length: int) -> bytes | memoryview:
    """Exactly `length` bytes, or an error that names the place."""
    parts: list[bytes | memoryview] = []
    got = 0
    while got < length:
        try:
            part = await source.read(offset + got, length - got)
        except OSError as error:
            raise VsnapError(
                f"recovery point {source.number} cannot be read at byte {offset + got}: "
                f"{error.strerror or error}",
                hint=_hint(error),
                errno=error.errno or errno.EIO,
                code="read",
            ) from error
        if not part:
            raise VsnapError(
                f"recovery point {source.number} ends at byte {offset + got} of {source.size}",
                code="read",
            )
        parts.append(part)
        got += len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


# --- the copy ----------------------------------------------------------------------------------


async def _copy(source: _Source, fd: int, target: Path, progress: ProgressFn) -> tuple[int, bytes]:
    """Write every byte that is not zero, then sync. The number of bytes written, and the digest."""
    import trio
    import xxhash

    digest = xxhash.xxh3_128()
    written = 0
    try:
        os.ftruncate(fd, source.size)
        for offset, length in _chunks(source.size):
            data = memoryview(await _read(source, offset, length))
            if data != _ZEROS[:length]:
                _digest(digest, offset, data)
                for start, end in _runs(data):
                    _pwrite(fd, data[start:end], offset + start)
                    written += end - start
            progress("copying", offset + length, source.size)
            await trio.lowlevel.checkpoint()
        os.fsync(fd)
    except OSError as error:
        raise _no_write(target, error) from error
    return written, digest.digest()


async def _check(
    source: _Source, fd: int, target: Path, expected: bytes, progress: ProgressFn
) -> None:
    """Read the file back from the disk and compare it with what was read from the point."""
    import trio
    import xxhash

    digest = xxhash.xxh3_128()
    # Without this the page cache would answer, and only prove that memory works.
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    try:
        for offset, length in _chunks(source.size):
            if not _is_hole(fd, offset, length):
                data = memoryview(os.pread(fd, length, offset))
                if len(data) != length or data != _ZEROS[:length]:
                    _digest(digest, offset, data)
            progress("checking", offset + length, source.size)
            await trio.lowlevel.checkpoint()
    except OSError as error:
        raise VsnapError(
            f"the copy for {shown(target)} cannot be read back: {error.strerror}",
            hint="Check that disk, or export to another one.",
            errno=error.errno or errno.EIO,
        ) from error
    if digest.digest() != expected:
        raise VsnapError(
            f"the copy for {shown(target)} reads back differently from what was written",
            hint="The target's disk or file system is faulty: export to another one.",
        )


def _chunks(size: int) -> Iterator[tuple[int, int]]:
    """(offset, length) of the pieces that a file of `size` bytes is handled in."""
    for offset in range(0, size, CHUNK):
        yield offset, min(CHUNK, size - offset)


def _digest(digest: Any, offset: int, data: memoryview) -> None:
    """Count a piece in. Zero pieces are left out on both sides, so holes cost nothing."""
    digest.update(offset.to_bytes(8, "little"))
    digest.update(data)


def _runs(data: memoryview) -> Iterator[tuple[int, int]]:
    """(start, end) of the stretches that are not whole zero blocks of 4 KiB."""
    start = None
    for at in range(0, len(data), HOLE):
        piece = data[at : at + HOLE]
        if piece == _ZEROS[: len(piece)]:
            if start is not None:
                yield start, at
                start = None
        elif start is None:
            start = at
    if start is not None:
        yield start, len(data)


def _pwrite(fd: int, data: memoryview, offset: int) -> None:
    while data:
        done = os.pwrite(fd, data, offset)
        data, offset = data[done:], offset + done


def _is_hole(fd: int, offset: int, length: int) -> bool:
    """True only if no byte of the range is allocated."""
    try:
        return os.lseek(fd, offset, os.SEEK_DATA) >= offset + length
    except OSError as error:
        return error.errno == errno.ENXIO  # no data up to the end; anything else: read it


# --- the target --------------------------------------------------------------------------------


def check_target(volume: Path, file: Path, *, force: bool) -> Path:
    """The absolute name to write to, links resolved. VsnapError when it is refused."""
    target = Path(os.path.realpath(file))
    for name, owner in _protected(volume, target.parent):
        if target == name or _same_file(target, name):
            raise UsageError(
                f"{shown(file)} belongs to the volume {shown(owner)} and is never replaced",
                hint="Export to another file.",
                code="own-file",
            )
    for mount in mounted():
        if mount.mountpoint in (target, *target.parents):
            raise UsageError(
                f"{shown(file)} lies inside the mounted volume {shown(mount.volume)}",
                hint="Export to a file elsewhere.",
                code="own-file",
            )
    try:
        mode = os.stat(target).st_mode
    except FileNotFoundError:
        if not target.parent.is_dir():
            raise VsnapError(
                f"there is no directory {shown(target.parent)} to export to",
                errno=errno.ENOENT,
            ) from None
        return target
    if not stat.S_ISREG(mode):
        kind = "a directory" if stat.S_ISDIR(mode) else "no regular file"
        raise UsageError(
            f"{shown(file)} is {kind}; a recovery point is exported into a file",
            hint="Name a file."
            if stat.S_ISDIR(mode)
            else "To fill a device, mount the volume and copy recovery-points/NNNN.img with dd.",
        )
    if not force:
        raise _exists(file)
    return target


def _exists(file: Path) -> VsnapError:
    return VsnapError(
        f"{shown(file)} exists", hint="--force replaces it.", errno=errno.EEXIST, code="exists"
    )


def _protected(volume: Path, folder: Path) -> Iterator[tuple[Path, Path]]:
    """(file, its volume) for the files of this volume, of the one in `folder`, of mounted ones."""
    directories = {volume, *(mount.volume for mount in mounted())}
    if os.path.lexists(folder / CONFIG_NAME):
        directories.add(folder)
    for directory in sorted(directories):
        paths = VolumePaths(directory)
        own = [paths.config, paths.state, paths.events, paths.socket]
        try:
            own += [paths.replica, paths.diff_area]
        except VsnapError:
            pass  # its volume.toml cannot be read: then at least the names that never change
        yield from ((path, directory) for path in own)


def _same_file(one: Path, other: Path) -> bool:
    """True for two names of one file, hard links included."""
    try:
        return os.path.samefile(one, other)
    except OSError:
        return False


class _NewFile:
    """A file that has no name yet (or a hidden one), until `publish`."""

    def __init__(self, target: Path, *, force: bool) -> None:
        self._target = target
        self._force = force
        self._hidden = target.with_name(f".{target.name[:200]}.{secrets.token_hex(4)}.part")
        self._named = False
        try:
            self.fd = os.open(target.parent, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT):
                raise
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            self.fd = os.open(self._hidden, flags, 0o600)
            self._named = True

    def publish(self) -> None:
        """Give the synced file its name. FileExistsError if somebody took it without --force."""
        if not self._named:
            # An absolute source ignores src_dir_fd, but only with one does Python follow the link.
            os.link(f"/proc/self/fd/{self.fd}", self._hidden, src_dir_fd=self.fd)
            self._named = True
        if self._force or not _link(self._hidden, self._target):
            os.rename(self._hidden, self._target)
            self._named = False
        folder = os.open(self._target.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def close(self) -> None:
        """Let go of the file; the hidden name goes too."""
        os.close(self.fd)
        if self._named:
            os.unlink(self._hidden)


def _link(hidden: Path, target: Path) -> bool:
    """A second name that replaces nothing. False where the file system has no hard links."""
    try:
        os.link(hidden, target)
    except FileExistsError:
        raise
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK):
            raise
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST)) from error
        return False
    return True


@contextmanager
def _new_file(target: Path, *, force: bool) -> Iterator[_NewFile]:
    try:
        new = _NewFile(target, force=force)
        try:
            yield new
        finally:
            new.close()
    except FileExistsError as error:
        raise _exists(target) from error
    except OSError as error:
        raise _no_write(target, error) from error


def _no_write(target: Path, error: OSError) -> VsnapError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return VsnapError(
        f"cannot write {shown(target)}: {error.strerror or error}; nothing was left behind",
        hint="Free space there, or export to another file system." if full else "",
        errno=error.errno or errno.EIO,
        code="target",
    )
