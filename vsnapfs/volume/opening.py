"""Opening a volume: its files, their locks, and what is wrong before anything is served.

Owns the faults that are found at open: 1 (the diff area is missing), 2 (I/O error), 3 (damage),
12 (it cannot be opened or locked), 15 (an old generation has been put in its place). With one of
them the volume opens offline. What looks like a mistake of the administrator (another volume's
diff area, no diff area at all, a foreign version) is an error instead, and nothing is changed.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from ..backing import Backing, FileBacking
from ..belonging import give_to_owner
from ..config import DEFAULT_WRITE_BUFFER, VolumeConfig, VolumePaths, leads_out, load
from ..diffarea.area import DiffArea
from ..diffarea.layout import DEFAULT_BLOCK_SIZE
from ..diffarea.recovery import Report, no_memory, open_area
from ..errors import BusyError, FaultCode, FaultError, FormatError, VsnapError
from .core import Core, Log
from .onlookers import Onlookers
from .overlay import Overlay
from .shm import RingStore, SharedMemory
from .statefile import STATE_SIZE, SavedState, StateFile

#: A damaged diff area (fault 3), as opposed to a file that is none of ours (an error).
_DAMAGE = ("checksum", "inconsistent", "format")
#: What `VsnapError.code` says of a volume whose host takes no writes: it can be looked at.
READ_ONLY_HOST = "read-only-host"


@dataclass
class Opened:
    """What `open_core` found. fault: why the volume must be offline, None if nothing is wrong.

    state_problem: what was wrong with the state file as a whole, "" if it could be used.
    """

    core: Core
    saved: SavedState
    fault: FaultError | None
    report: Report | None
    warnings: list[str]
    state_problem: str = ""
    #: Where write buffers live, None if nowhere; the size of one in bytes, 0 for none.
    store: RingStore | None = None
    buffer_size: int = DEFAULT_WRITE_BUFFER
    onlookers: Onlookers | None = None
    new_state: bool = False
    #: A failed sync, with which copies may be lost (durability "process"), to be told.
    spoilt: OSError | None = None

    def leave_no_empty_state(self) -> None:
        """The opening has come to nothing: what it began is not there for the next one."""
        _remove_if_empty(self.core.state_file.backing, self.new_state)


def open_files(
    directory: Path, make_log: Callable[[Path], Log], *, dry_run: bool = False
) -> Opened:
    """Open and lock the files of the volume in `directory`. VsnapError, OSError.

    dry_run: what is written later stays in memory, so the host need not take any writes.
    """
    config = load(directory)
    paths = VolumePaths(directory, config)
    opened: list[Backing] = []
    new_state = False
    try:
        replica: Backing = _open_replica(paths, config, dry_run=dry_run)
        opened.append(replica)
        state, new_state = _open_state(paths, dry_run=dry_run)
        opened.append(state)
        area: Backing | None = None
        problem: FaultError | None = None
        try:
            area = _open_backing(paths.diff_area, config.diff_area, read_only=dry_run)
            opened.append(area)
        except BusyError:
            raise
        except (OSError, VsnapError) as error:
            problem = _why_not_open(paths.diff_area, error)
        log = make_log(paths.events)
        if dry_run:
            replica = Overlay(replica.path, replica)
            state = Overlay(state.path, state)
            area = area and Overlay(area.path, area)
        return open_core(
            str(paths.directory),
            config,
            replica,
            area,
            state,
            log,
            problem,
            new_state,
            SharedMemory(),
        )
    except BaseException:
        for backing in opened:
            if backing.path == paths.state:
                _remove_if_empty(backing, new_state)
            backing.close()
        raise


def _remove_if_empty(state: Backing, new: bool) -> None:
    with suppress(OSError):
        if new and isinstance(state, FileBacking) and not any(state.read(0, STATE_SIZE)):
            state.path.unlink()


def _open_backing(path: Path, configured: str, *, read_only: bool) -> FileBacking:
    # A name inside the volume directory must not lead out of it; a path that an administrator
    # chose (/dev/disk/by-id/…) may be a link.
    try:
        return FileBacking.open(path, follow=leads_out(configured), read_only=read_only)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise _is_link(path) from error
        raise


def _is_link(path: Path) -> VsnapError:
    return VsnapError(
        f"{path} is a symbolic link, which is not followed",
        hint="Nothing in a volume directory may lead out of it but a path in volume.toml.",
        errno=errno.ELOOP,
        code="symlink",
    )


def _read_only_host(paths: VolumePaths, what: Path) -> VsnapError:
    return VsnapError(
        f"volume {paths.directory}: {what} lies on a file system that is read-only now",
        hint="Look for the reason (dmesg; ext4 does that to itself after an error), and make it "
        "writable again. The recovery points can be listed, verified and exported meanwhile.",
        errno=errno.EROFS,
        code=READ_ONLY_HOST,
    )


def _open_replica(paths: VolumePaths, config: VolumeConfig, *, dry_run: bool) -> FileBacking:
    try:
        return _open_backing(paths.replica, config.replica, read_only=dry_run)
    except OSError as error:
        if error.errno == errno.EROFS:
            raise _read_only_host(paths, paths.replica) from error
        raise VsnapError(
            f"volume {paths.directory}: the replica {paths.replica} cannot be opened: "
            f"{error.strerror}",
            hint="Bring it back, or correct 'replica' in volume.toml.",
            errno=error.errno or errno.EIO,
            code="no-replica",
        ) from error


def _open_state(paths: VolumePaths, *, dry_run: bool) -> tuple[Backing, bool]:
    """The state file, and whether it had to be made anew."""
    try:
        return FileBacking.open(paths.state, follow=False, read_only=dry_run), False
    except OSError as error:
        if error.errno == errno.EROFS:
            raise _read_only_host(paths, paths.state) from error
        if error.errno == errno.ELOOP:
            raise _is_link(paths.state) from error
        if error.errno != errno.ENOENT:
            raise VsnapError(
                f"{paths.state} cannot be opened: {error.strerror}",
                errno=error.errno or errno.EIO,
                code="no-state",
            ) from error
        if dry_run:
            return Overlay(paths.state, None), True
        try:
            state = FileBacking.create(paths.state)
        except OSError as problem:
            if problem.errno == errno.EROFS:
                raise _read_only_host(paths, paths.state) from problem
            raise
        give_to_owner(state.fileno(), paths.state)
        state.allocate(0, STATE_SIZE)
        state.write(0, bytes(STATE_SIZE))
        return state, True


def _why_not_open(path: Path, error: OSError | VsnapError) -> FaultError:
    number = error.errno or errno.EIO
    text = error.message if isinstance(error, VsnapError) else f"{path}: {error.strerror}"
    if number in (errno.ENOENT, errno.ENXIO, errno.ENODEV, errno.ENOTDIR, errno.ENOMEDIUM):
        code = FaultCode.DIFF_AREA_MISSING
    elif number == errno.EIO and isinstance(error, OSError):
        code = FaultCode.IO_FAILURE_DURING_ONLINE
    else:
        code = FaultCode.FILE_SYSTEM_FAILURE
    return FaultError(code, text, errno=number)


def open_core(
    name: str,
    config: VolumeConfig,
    replica: Backing,
    area_backing: Backing | None,
    state: Backing,
    log: Log,
    problem: FaultError | None = None,
    new_state: bool = False,
    store: RingStore | None = None,
) -> Opened:
    """Put an open volume together from its backings. problem: why there is no `area_backing`."""
    volume_id = bytes.fromhex(config.volume_id)
    warnings: list[str] = []
    state_file = StateFile(state, volume_id)
    saved = SavedState()
    state_problem = ""
    if not new_state:
        try:
            saved = state_file.load()
        except FormatError as error:
            state_problem = f"the state file is lost ({error})"
        except OSError as error:
            # That is not lost: it would be written anew, and what it says forgotten for good.
            raise VsnapError(
                f"volume {name}: its state file {state.path} cannot be read: "
                f"{error.strerror or error}",
                hint="It may say that the volume is offline, or which recovery points do not count "
                "any more. Mend its disk, then try again. If it is lost for good, move it away: "
                "then the diff area's superblock decides alone.",
                errno=error.errno or errno.EIO,
                code="no-state",
            ) from error
    else:
        state_problem = "the state file was missing"
    if state_problem:
        warnings.append(f"{state_problem}; the superblock decides")
    area: DiffArea | None = None
    report: Report | None = None
    spoilt: OSError | None = None
    size = replica.size()
    if area_backing is not None:
        try:
            area, report = _open_area(area_backing, replica, volume_id, saved)
            if store is not None:
                _look_at_boot(area, report, store.boot)
            spoilt = _look_at_syncs(area, saved)
        except FaultError as error:
            problem = error
            area_backing.close()
    replica_error = _read_anew(replica) if saved.offline else None
    if report is not None:
        replica_error = report.replica_error = report.replica_error or replica_error
    if area is not None:
        size = area.superblock.replica_size
        problem = problem or _problem_of(area, report, saved)
    core = Core(
        name=name,
        config=config,
        replica=replica,
        area=area,
        state_file=state_file,
        log=log,
        size=size,
        block_size=area.layout.block_size if area else saved.block_size or DEFAULT_BLOCK_SIZE,
        volume_id=volume_id,
    )
    if replica_error is not None:
        core.replica_failed, core.replica_error = True, replica_error
    return Opened(
        core,
        saved,
        problem,
        report,
        warnings,
        state_problem,
        store,
        new_state=new_state,
        spoilt=spoilt,
    )


def _read_anew(replica: Backing) -> OSError | None:
    """A sync may have failed, and the area need not say so: it may be missing, or policy `evict`
    has gone on without marking it as in use. Only what is on the disk counts (`reopen_replica`).
    """
    error = None
    try:
        replica.sync()
    except OSError as problem:
        error = problem
    replica.forget_cache()
    return error


def _look_at_boot(area: DiffArea, report: Report, boot: bytes) -> None:
    """Without barriers (durability "process") a power failure may have spoilt all points."""
    superblock = area.superblock
    if superblock.process and not superblock.clean and superblock.boot != boot:
        report.suspect = len(superblock.points)
        area.superblock = replace(superblock, suspect=superblock.epoch, process=False)
    area.boot = boot


def _look_at_syncs(area: DiffArea, saved: SavedState) -> OSError | None:
    """The same where a sync had failed, and no commit said so. Returns the error, to be told, if it
    was the first sync of this opening: what only the cache had is lost.
    """
    superblock, error = area.superblock, area.incomplete
    now = error is not None and error.code is FaultCode.IO_FAILURE_DURING_ONLINE
    now = now and superblock.process and not superblock.clean
    spoilt = superblock.epoch if now else min(saved.spoilt, superblock.epoch)
    if spoilt <= superblock.suspect:
        return None
    area.superblock, area.spoilt = replace(superblock, suspect=spoilt), spoilt
    if error is None or spoilt <= saved.spoilt:  # Told already.
        return None
    return OSError(error.errno, error.message)


#: It may be somebody else's file: nothing of ours overwrites it, not even giving up the points.
_NOT_OURS = (
    "Put the diff area back in its place. If it is lost for good, move away what lies there and "
    "mount: the volume is offline by fault 1, and 'vsnapfs online --give-up-recovery-points' "
    "starts an empty one."
)


def _open_area(
    backing: Backing, replica: Backing, volume_id: bytes, saved: SavedState
) -> tuple[DiffArea, Report]:
    try:
        area, report = open_area(backing, replica, volume_id, saved.generation)
    except FormatError as error:
        # Where points were being given up, a short file is what a stop has left of the new area.
        begun = saved.offline and saved.given_up >= saved.epoch
        if error.code not in _DAMAGE and not (begun and error.code == "truncated"):
            if not error.hint:
                error.hint = _NOT_OURS
            raise
        raise FaultError(FaultCode.META_DATA_CORRUPTION, error.message) from error
    except MemoryError as error:
        raise no_memory() from error
    given_up = saved.given_up
    behind = given_up > area.superblock.epoch
    if behind or any(point.number <= given_up for point in area.superblock.points):
        # Recorded as lost where the superblock could not be changed any more.
        points = area.superblock.points
        kept = tuple(point for point in points if point.number > given_up)
        # Perhaps an area that was thought lost: numbers given out since must not come again.
        epoch = max(area.superblock.epoch, saved.epoch, given_up)
        area.superblock = replace(
            area.superblock, points=kept, restoring=0, clean=False, epoch=epoch
        )
        report.given_up = [point for point in points if point.number <= given_up]
        numbers = [point.number for point in kept]
        if not area.is_unread:
            area.slots.keep_only(area.index.live_slots(numbers), also=area.unknown_slots)
            area.index.compact(numbers)
        report.unclean = True
    return area, report


def _problem_of(area: DiffArea, report: Report | None, saved: SavedState) -> FaultError | None:
    superblock = area.superblock
    if area.is_unread:
        return no_memory()
    if area.is_old:
        return FaultError(
            FaultCode.EXTERNAL_WRITER_TO_DIFF_AREA,
            f"the diff area is at generation {superblock.generation}, "
            f"{saved.generation} was written before: an old copy of it has been put back",
        )
    if area.incomplete is not None:
        return area.incomplete
    if report is not None and area.backing.size() < superblock.allocated:
        return FaultError(FaultCode.META_DATA_CORRUPTION, report.problems[0])
    if area.damaged_sectors:
        return FaultError(
            FaultCode.META_DATA_CORRUPTION,
            f"{len(area.damaged_sectors)} descriptor sectors are bad in both copies "
            f"(the first is number {area.damaged_sectors[0]})",
        )
    if report is not None and report.replica_error is not None:
        return FaultError(
            FaultCode.IO_FAILURE,
            f"the replica could not be synced: {report.replica_error.strerror}",
            errno=report.replica_error.errno or errno.EIO,
        )
    return None


def check_replica(core: Core, accept_changed: bool) -> str | None:
    """After a clean close: a warning if somebody wrote to the replica since, None if nobody did.

    VsnapError unless `accept_changed`.
    """
    area = core.area
    if area is None or not area.superblock.clean:
        return None
    try:
        # Only a look: an error that somebody else's write has left there is for a flush to tell.
        now = core.replica.identity(durable=False)
    except OSError as error:
        raise VsnapError(
            f"the replica of volume {core.name} cannot be looked at: {error.strerror or error}",
            hint="Nothing was changed. Look for a failing disk or file system (dmesg) below "
            f"{core.replica.path}.",
            errno=error.errno or errno.EIO,
        ) from error
    before = area.superblock.replica
    if before == now or not any(before):
        return None
    core.log.log(
        "vsnapfs",
        1051,
        volume=core.name,
        device=str(core.replica.path),
        reason=f"{before._asdict()} → {now._asdict()}",
    )
    text = f"the replica of volume {core.name} has changed since it was last closed"
    if not accept_changed:
        raise VsnapError(
            text,
            hint="Somebody wrote to it beside vsnapfs, or it was copied. Recovery points may be "
            "wrong where it was changed. 'vsnapfs mount --accept-changed-replica' goes on.",
            code="replica-changed",
        )
    return text


def close_files(core: Core) -> None:
    """Close all backings, whatever happens."""
    backings = [core.replica, core.state_file.backing]
    if core.area is not None and not core.area_is_busy:
        backings.append(core.area.backing)
    for backing in backings:
        with suppress(OSError):
            backing.close()
