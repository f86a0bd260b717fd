"""The last way out: start an empty diff area when the old one is truly lost.

Owns `online --give-up-recovery-points`. Never implicit. The loss is recorded in the state file
before the new area is made, so that the old one, should it turn up again, cannot bring back
points whose blocks have been overwritten. Numbers of points are not used again, and generations
only rise: the old area, put back, is an old one. Acknowledged writes in the ring that the lost area
named are carried out all the same.
"""

from __future__ import annotations

import errno
from contextlib import suppress
from typing import TYPE_CHECKING

from ..backing import Backing, FileBacking, Removed, sync_directory
from ..belonging import give_to_owner
from ..config import VolumePaths, leads_out
from ..diffarea.area import DiffArea
from ..diffarea.bitmap import BlockSet
from ..diffarea.layout import SUPERBLOCK_SIZE
from ..diffarea.recovery import read_superblock
from ..diffarea.superblock import unfinished
from ..errors import FaultError, FormatError, VsnapError
from .core import in_thread

if TYPE_CHECKING:
    from .volume import Volume

#: Far more commits than can have been made since the state file was last written.
_BEYOND = 1 << 20


async def give_up_recovery_points(volume: Volume) -> list[str]:
    """Replace the diff area by an empty one of the same maximum and come online.

    It is the caller's turn. VsnapError when the volume is online (nothing to give up), the
    old size is not known, or something that is not this volume's diff area is in the way.
    """
    core, protection = volume.core, volume.protection
    if protection.is_online:
        raise VsnapError(
            f"volume {core.name} is online: there is nothing to give up",
            hint="Single points go with 'vsnapfs recovery-point delete'.",
        )
    await protection.recorded()  # Or the fault would be written down after it has been cleared.
    old = core.area
    maximum = old.maximum if old else protection.saved.maximum
    if not maximum:
        raise VsnapError(
            f"volume {core.name}: the size of its lost diff area is not known",
            hint="Create a new volume around the replica: 'vsnapfs create --replica'.",
        )
    # The area that named a ring of ours may be gone: what it holds must outlive this, too.
    await volume.buffer.rescue()
    points = [point.number for point in core.points]
    restoring = old.superblock.restoring if old else 0
    epoch = max(protection.saved.epoch, old.superblock.epoch if old else 0)
    try:
        # A growth that was too slow (fault 9) ends first: it would write into the new area.
        async with volume.room.standing_still():
            core.admin.begin()
            backing = await in_thread(_find_place, volume, old)
            try:
                async with core.area_lock:
                    await protection.record_given_up(epoch)
                    if backing is None:  # After the record, which tells the next opening of it.
                        backing = await in_thread(_make, volume)
                    # Over the old one: whoever reads a point of it meets what is none of its own.
                    core.area_is_wiped = old is not None and backing is old.backing
                    area = await in_thread(_format, volume, backing, maximum, epoch)
                    volume.points_service.gone.update(points)
                    core.area, core.preserved, core.area_is_stale = area, BlockSet(), False
                    if old is not None and backing is not old.backing:
                        old.backing.close()
                    volume.buffer.forget_slots()
                    volume.buffer.is_taken()  # With what the lost area said it does not count now.
                    volume.room.promised.clear()
                    core.watch_over(area)
            except BaseException:
                if backing is not None and (old is None or backing is not old.backing):
                    backing.close()  # So that the next try can lock it.
                raise
            finally:
                core.area_is_wiped = False
        if core.replica_failed:
            await in_thread(volume.reopen_replica)
        await volume.buffer.try_again()
        await protection.come_online()
        await protection.look_at_replica()
    except (FaultError, OSError) as error:
        raise VsnapError(
            f"volume {core.name} stays offline, no new diff area could be made: {error}",
            errno=error.errno or errno.EIO,
            exit_code=3,
            code="still-faulted",
        ) from error
    volume.policy.reset()
    volume.room.reset()
    core.log.log(
        "vsnapfs",
        1022,
        volume=core.name,
        points=points,
        count=len(points),
        diff_area=str(backing.path),
        maximum=maximum,
    )
    warnings = [f"all recovery points up to number {epoch} are given up"] if epoch else []
    if restoring:
        warnings.append(
            f"a restore of recovery point {restoring} had not finished: "
            "the replica is a mixture of two states"
        )
    return warnings


def _find_place(volume: Volume, old: DiffArea | None) -> Backing | None:
    """In a worker thread: where the new area goes, None: nothing is there. VsnapError, OSError."""
    if old is not None:
        # A removed one stays open: should this be refused, its points can still be read.
        with suppress(Removed):
            old.backing.check_present()
            return old.backing
    configured = volume.config.diff_area
    path = VolumePaths(volume.directory, volume.config).diff_area
    try:
        backing = FileBacking.open(path, follow=leads_out(configured))
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise VsnapError(
            f"{path} is a symbolic link, which is not followed", hint="Move it away first."
        ) from error
    try:
        if not _is_ours(volume, backing):
            raise VsnapError(
                f"{path} is not the diff area of volume {volume.core.name}; it is not overwritten",
                hint="Move it away first.",
            )
    except BaseException:
        backing.close()  # So that the next try can lock it.
        raise
    return backing


def _make(volume: Volume) -> Backing:
    path = VolumePaths(volume.directory, volume.config).diff_area
    made = FileBacking.create(path)
    try:
        give_to_owner(made.fileno(), path)
        sync_directory(path.parent)
    except BaseException:
        made.close()
        raise
    return made


def _is_ours(volume: Volume, backing: Backing) -> bool:
    try:
        superblock, _ = read_superblock(backing)
    except FormatError as error:
        if error.code == "truncated":
            # What a stop has left of an area that was only begun; other short files are not ours.
            start = bytes(backing.read(0, min(backing.size(), SUPERBLOCK_SIZE)))
            return start in (bytes(len(start)), unfinished()[: len(start)])
        # A rotted superblock of ours is what this command is for; anything else is not ours.
        return error.code in ("checksum", "inconsistent")
    return superblock.volume_id == volume.core.volume_id


def _generation(volume: Volume) -> int:
    """One that no copy of the lost area can have reached: put back, it must look old (fault 15)."""
    area = volume.core.area
    known = area.newest_generation if area is not None else 0
    return max(known, volume.protection.saved.generation) + _BEYOND


def _format(volume: Volume, backing: Backing, maximum: int, epoch: int) -> DiffArea:
    core = volume.core
    return DiffArea.format(
        backing,
        volume_id=core.volume_id,
        block_size=core.area.layout.block_size
        if core.area
        else volume.protection.saved.block_size or core.block_size,
        replica_size=core.size,
        maximum=maximum,
        epoch=epoch,
        generation=_generation(volume),
        barrier=volume.buffer.barrier,
        # What was acknowledged and is still to be carried out belongs to the new area from its
        # first moment on.
        ring=volume.buffer.name,
        boot=volume.buffer.boot,
    )
