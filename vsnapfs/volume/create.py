"""Making a volume: replica, diff area, state file, event log, and volume.toml last of all.

Owns the order: everything that could refuse is checked before anything is made, volume.toml (which
makes a directory a volume) comes last and durable, and whatever was made is removed again when a
later step fails. What was there before is never removed and, without `force`, never overwritten.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import stat
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from ..backing import FileBacking, device_size, file_system_type, sync_directory
from ..config import (
    CONFIG_NAME,
    DEFAULT_DIFF_AREA,
    DEFAULT_GROW_TIMEOUT,
    DEFAULT_REPLICA,
    STATE_NAME,
    Durability,
    OnFull,
    VolumeConfig,
    VolumePaths,
    ZeroBlocks,
    check_private,
    save,
)
from ..diffarea.area import DiffArea, check_maximum
from ..diffarea.layout import DEFAULT_BLOCK_SIZE, MAX_REPLICA_SIZE, Layout, is_block_size
from ..errors import UsageError, VsnapError
from ..events import EventLog
from ..units import format_size
from .core import Progress
from .restore import no_progress
from .statefile import STATE_SIZE, SavedState, StateFile

_CHUNK = 4 << 20


@dataclass
class _Plan:
    directory: Path
    replica: Path
    diff_area: Path
    image: Path | None
    size: int
    adopt: bool
    undo: list[Callable[[], None]] = field(default_factory=list)


def create_volume(
    directory: Path,
    *,
    size: int | None,
    diff_area_size: int,
    replica: Path | None = None,
    diff_area: Path | None = None,
    from_image: Path | None = None,
    block_size: int = DEFAULT_BLOCK_SIZE,
    on_full: OnFull = "offline",
    grow_timeout: float = DEFAULT_GROW_TIMEOUT,
    durability: Durability = "power",
    zero_blocks: ZeroBlocks = "flag",
    force: bool = False,
    progress: Progress | None = None,
) -> list[str]:
    """Create the volume `directory`. Sizes in bytes. Returns warnings about the host.

    An existing replica is adopted unchanged, unless `from_image` is copied over it (`force`).
    grow_timeout: in seconds. force: also overwrite an existing diff area, or a device that bears a
    signature.
    UsageError and VsnapError leave everything as it was.
    """
    if not is_block_size(block_size):
        raise UsageError(
            f"a block of {format_size(block_size)} is not possible",
            hint="Choose a power of two from 4KiB to 1MiB.",
        )
    check_maximum(Layout(block_size), diff_area_size)
    plan = _check(directory, size, replica, diff_area, from_image, force)
    config = VolumeConfig(
        volume_id=secrets.token_hex(16),
        replica=_configured(plan.directory, plan.replica),
        diff_area=_configured(plan.directory, plan.diff_area),
        on_full=on_full,
        grow_timeout=grow_timeout,
        durability=durability,
        zero_blocks=zero_blocks,
    )
    try:
        return _make(plan, config, block_size, diff_area_size, progress or no_progress)
    except BaseException as error:
        for step in reversed(plan.undo):
            try:
                step()
            except OSError:
                continue
        if isinstance(error, OSError):
            raise _host_error(plan, error) from error
        raise


# --- checks: nothing is changed ------------------------------------------------------------------


def _check(
    directory: Path,
    size: int | None,
    replica: Path | None,
    diff_area: Path | None,
    image: Path | None,
    force: bool,
) -> _Plan:
    where = Path(os.path.realpath(directory))
    if where.exists() and not where.is_dir():
        raise UsageError(f"{directory} exists and is no directory")
    if (where / CONFIG_NAME).exists():
        raise UsageError(
            f"{directory} already holds a volume", hint="Choose another directory.", code="exists"
        )
    replica_path = _absolute(replica, where / DEFAULT_REPLICA)
    area_path = _absolute(diff_area, where / DEFAULT_DIFF_AREA)
    if os.path.realpath(replica_path) == os.path.realpath(area_path):
        raise UsageError(f"replica and diff area are both {replica_path}; they must differ")
    if os.path.lexists(state := where / STATE_NAME):
        # Whatever there is to overwrite would have been overwritten when that came to light.
        raise UsageError(
            f"{state} already exists, but no {CONFIG_NAME}",
            hint=f"If there was a volume here, bring {CONFIG_NAME} back. A 'create' that was "
            "killed leaves such a file, too: remove it, or choose another directory.",
            code="exists",
        )
    for path in (replica_path, area_path):
        if path.name in ("state", "events.jsonl", "volume.toml", "control.sock") and (
            path.parent == where
        ):
            raise UsageError(f"{path} is a name the volume needs for itself")
    exists = replica_path.exists()
    if image is not None and exists and not force:
        raise UsageError(
            f"{replica_path} already exists and would be overwritten by {image}",
            hint="Use --force if that is meant, or leave out --from to adopt it as it is.",
            code="exists",
        )
    outside = [path for path in (replica_path, area_path) if path.parent != where]
    if outside and where.exists():
        check_private(where)  # else the volume could be made, but not opened
    _check_target(area_path, "diff area", force)
    final = _size_of(size, replica_path if exists else None, image)
    return _Plan(
        directory=where,
        replica=replica_path,
        diff_area=area_path,
        image=image,
        size=final,
        adopt=exists and image is None,
    )


def _absolute(path: Path | None, default: Path) -> Path:
    return default if path is None else Path(os.path.abspath(path))


def _configured(directory: Path, path: Path) -> str:
    return path.name if path.parent == directory else str(path)


def _size_of(size: int | None, replica: Path | None, image: Path | None) -> int:
    source = image or replica
    if source is None:
        if size is None:
            raise UsageError("how large shall the volume be?", hint="Give --size, e.g. 10GiB.")
        final = size
    else:
        there = _bytes_in(source)
        if source == replica and not there and not _is_device(source):
            raise UsageError(
                f"{source} is empty: a volume must have at least one byte",
                hint="Remove it, and 'create' makes it anew: one that was killed may have left it.",
            )
        if image is not None and size is not None and size > there:
            there = size
        if size is not None and size != there:
            raise UsageError(
                f"--size is {format_size(size)}, but {source} has {format_size(there)}",
                hint="Leave out --size: the size of what exists is the size.",
            )
        final = there
        if image is not None and replica is not None and _is_device(replica):
            final = _bytes_in(replica)
            if there > final:
                raise UsageError(f"{image} does not fit onto {replica}")
    if final <= 0:
        raise UsageError("a volume must have at least one byte")
    if final > MAX_REPLICA_SIZE:
        raise UsageError(f"a volume can have at most {format_size(MAX_REPLICA_SIZE)}")
    return final


def _is_device(path: Path) -> bool:
    try:
        return stat.S_ISBLK(path.stat().st_mode)
    except OSError:
        return False


def _bytes_in(path: Path) -> int:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise UsageError(f"{path} cannot be opened: {error.strerror}") from None
    try:
        mode = os.fstat(fd).st_mode
        if stat.S_ISBLK(mode):
            return device_size(fd)
        if not stat.S_ISREG(mode):
            raise UsageError(f"{path} is neither a file nor a block device")
        return os.fstat(fd).st_size
    finally:
        os.close(fd)


def _check_target(path: Path, what: str, force: bool) -> None:
    """Refuse to overwrite what looks like somebody's data."""
    if not path.exists() or force:
        return
    if _is_device(path):
        signature = _signature(path)
        if signature:
            raise UsageError(
                f"{path} holds {signature}", hint="Use --force to overwrite it.", code="exists"
            )
    elif path.stat().st_size:
        raise UsageError(
            f"the {what} {path} already exists",
            hint="Use --force to overwrite it.",
            code="exists",
        )


def _signature(path: Path) -> str:
    """What blkid finds on a device ("" if nothing); any data at its start where there is none."""
    blkid = shutil.which("blkid", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if blkid:
        found = subprocess.run(
            [blkid, "-p", "-o", "value", "-s", "TYPE", "-s", "PTTYPE", str(path)],
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
        if found.stdout.strip():
            return f"a file system or partition table ({', '.join(found.stdout.split())})"
    with path.open("rb") as device:
        return "data" if any(device.read(128 * 1024)) else ""


def _host_error(plan: _Plan, error: OSError) -> VsnapError:
    text, hint = error.strerror or str(error), ""
    if error.errno == errno.EFBIG:
        text = f"the host file system cannot hold a file of {format_size(plan.size)}"
        hint = "ext4 files end below 16 TiB; XFS and block devices can be larger."
    elif error.errno == errno.ENOSPC:
        hint = "The diff area reserves its space: make room or choose a smaller --diff-area-size."
    elif error.errno in (errno.EOPNOTSUPP, errno.ENOSYS):
        text = "the host file system cannot reserve space (no fallocate)"
        hint = "Put the diff area on another file system with --diff-area."
    name = f" ({error.filename})" if error.filename else ""
    return VsnapError(
        f"volume {plan.directory} could not be created: {text}{name}",
        hint=hint,
        errno=error.errno or errno.EIO,
    )


# --- making --------------------------------------------------------------------------------------


def _make(
    plan: _Plan, config: VolumeConfig, block_size: int, diff_area_size: int, progress: Progress
) -> list[str]:
    warnings: list[str] = []
    if not plan.directory.exists():
        plan.directory.mkdir(mode=0o700)
        plan.undo.append(plan.directory.rmdir)
    volume_id = bytes.fromhex(config.volume_id)
    paths = VolumePaths(plan.directory, config)
    replica = _open_or_create(plan, plan.replica, warnings)
    try:
        _fill_replica(plan, replica, progress)
        area = _open_or_create(plan, plan.diff_area, warnings)
        try:
            made = DiffArea.format(
                area,
                volume_id=volume_id,
                block_size=block_size,
                replica_size=plan.size,
                maximum=diff_area_size,
            )
            made.commit(clean=True, replica=replica.identity())
        finally:
            area.close()
        _make_state(plan, paths.state, made, volume_id)
    finally:
        replica.close()
    _make_log(plan, paths, made)
    for folder in {plan.replica.parent, plan.diff_area.parent, plan.directory.parent}:
        if not str(folder).startswith("/dev"):
            sync_directory(folder)
    save(plan.directory, config)
    return warnings


def _open_or_create(plan: _Plan, path: Path, warnings: list[str]) -> FileBacking:
    if path.exists():
        there = FileBacking.open(path, follow=path.parent != plan.directory)
        # What the disk has refused in an attempt before this may look written (`rollback`).
        there.forget_cache()
        return there
    backing = FileBacking.create(path)
    plan.undo.append(path.unlink)
    kind = file_system_type(path)
    if kind == "btrfs" and not backing.no_copy_on_write():
        kind = "btrfs (copy-on-write could not be turned off)"
    if kind in ("zfs", "bcachefs") or "could not" in kind:
        warnings.append(
            f"{path} is on {kind}, which cannot promise reserved space: a full host may show "
            "in the middle of a copy (the volume then goes offline, no recovery point is lost)"
        )
    return backing


def _fill_replica(plan: _Plan, replica: FileBacking, progress: Progress) -> None:
    if plan.adopt:
        return
    fresh = not replica.is_device and replica.size() == 0
    if not replica.is_device:
        replica.truncate(plan.size)
    if plan.image is not None:
        _copy_image(plan.image, replica, plan.size, fresh, progress)
    replica.sync()


def _copy_image(
    image: Path, replica: FileBacking, size: int, fresh: bool, progress: Progress
) -> None:
    """Copy by reading and writing: a reflink would share extents that a write must then unshare."""
    fd = os.open(image, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if os.fstat(fd).st_size and os.path.samefile(image, replica.path):
            raise UsageError(f"{image} is the replica itself")
        offset, end = 0, _bytes_in(image)
        while offset < size:
            data = os.pread(fd, _CHUNK, offset) if offset < end else b""
            if offset < end and not data:
                raise OSError(errno.EIO, "the image is shorter than it was", str(image))
            # Beyond the image's end, and in its holes, an existing replica must become zeros.
            data = data or bytes(min(_CHUNK, size - offset))
            if not fresh or data.strip(b"\0"):
                replica.write(offset, data)
            offset += len(data)
            if fresh and offset < end:
                offset = _next_data(fd, offset, end)
            elif fresh:
                offset = size
            progress("copy", offset, size)
    finally:
        os.close(fd)


def _next_data(fd: int, offset: int, end: int) -> int:
    try:
        return os.lseek(fd, offset, os.SEEK_DATA)
    except OSError as error:
        if error.errno == errno.ENXIO:
            return end
        return offset


def _make_state(plan: _Plan, path: Path, area: DiffArea, volume_id: bytes) -> None:
    backing = FileBacking.create(path)
    plan.undo.append(path.unlink)
    try:
        backing.allocate(0, STATE_SIZE)
        state = SavedState(
            maximum=area.maximum,
            block_size=area.layout.block_size,
            generation=area.superblock.generation,
        )
        file = StateFile(backing, volume_id)
        file.save(state)
        if file.incomplete is not None:
            raise file.incomplete
    finally:
        backing.close()


def _make_log(plan: _Plan, paths: VolumePaths, area: DiffArea) -> None:
    existed = paths.events.exists()
    log = EventLog(paths.events)
    if not existed:
        plan.undo.append(paths.events.unlink)
    log.log(
        "vsnapfs",
        1000,
        volume=str(plan.directory),
        diff_area=str(plan.diff_area),
        used=area.used,
        allocated=area.allocated,
        maximum=area.maximum,
        length=plan.size,
    )
    log.close()
