"""Taking over a ring: what an opening does with what another process has acknowledged (W3, W5).

Owns the one decision which ring an opening may carry out. The superblock names it (and the state
file, for when the diff area is lost), with the replica it belongs to and the tmpfs it lies in.
Promises:

* exactly that ring is carried out, under its own lock, or the volume does not open;
* it is declared lost (event 1043) only if it is surely gone or surely bad. Whatever another user,
  another tmpfs, another moment could change keeps the volume closed: nothing is written, and its
  points can be listed and exported;
* a copy of a volume (its replica is another inode) leaves the original's ring alone and opens as
  after a power failure (event 1049); the same inode on another device is no copy: closed.

    superblock names    found                                      then
    ------------------  -----------------------------------------  -------------------------------
    none, another boot  -                                          nothing was promised
    another boot        a boot id that is a container's own        closed
    our replica         the ring                                   carried out
    our replica         gone from that tmpfs, or rotted            lost: 1043
    our replica         taken over with a later superblock         lost: 1043
    our replica         told of more than the area shows           offline by fault 15, it stays
    our replica         the same, durability "process": barriers   points suspect: 1045
    our replica         another user's, locked, no descriptor, …   closed
    our replica         no memory to map it                        offline by fault 4, not for good
    our replica         that tmpfs is not here                     closed
    the same inode,     -                                          closed
    another device or
    another subvolume
    another inode, or   -                                          1049, as after a power failure
    of another birth
"""

from __future__ import annotations

import errno
import os
from dataclasses import replace

from ..backing import FileId
from ..diffarea.area import DiffArea
from ..diffarea.superblock import NO_RING, RingName
from ..errors import FaultCode, FaultError, FormatError, VsnapError
from .core import Core
from .ring import Ring
from .shm import RingStore, Unusable

#: What `VsnapError.code` says of a volume that stays closed because of its write buffer.
CLOSED = "write-buffer"


def adopt(
    core: Core,
    store: RingStore,
    name: RingName,
    boot: bytes,
    known: int | None = None,
    *,
    give_up: bool = False,
) -> Ring | None:
    """In a worker thread: the ring called `name` in the life `boot` of the machine, to be carried
    out; None if there is nothing to carry out.

    known: the generation of the superblock that names it, if one does.
    give_up: the administrator gives up what a ring holds that keeps the volume closed (event 1054).
    VsnapError (code `CLOSED`) if the volume must not be opened. FaultError 15: the diff area is an
    old copy, `is_old` from now on; the ring waits for the right one. MemoryError.
    """
    if name == NO_RING or (boot != store.boot and not store.masked):
        # In another life of the machine nothing but what was flushed was promised.
        return None
    here, ring_id = core.replica.file_id(), name.ring_id.hex()
    if name.inode != here.inode and name.device:
        core.log.log("vsnapfs", 1049, volume=core.name, what=ring_id)
        return None
    try:
        if boot != store.boot:
            raise Unusable(
                "whether the machine has been restarted since cannot be told here, in a container "
                "with a boot id of its own",
                "Open the volume on the machine itself.",
            )
        _refuse_elsewhere(name, here)
        ring = store.find(name, core.volume_id, here)
        if here.system and ring.system not in (0, here.system):
            ring.close()
            raise Unusable(
                "it belongs to a replica on another file system, or in another subvolume, which "
                "had the device number that this one has now",
                "If this is a snapshot or a copy, open the volume itself. If not, mount the file "
                "system as it was then.",
            )
        if not here.born or ring.born in (0, here.born):
            if known is None:
                return ring
            if ring.taken <= known:
                _refuse_old(core, ring)
                return ring
            # A copy of all files, put back: what it held then has been carried out elsewhere, and
            # what it holds now came later. It stays, for who knows of it.
            ring.close()
            raise FormatError("a later opening has had it: an old copy of the volume was put back")
        # The original is gone, and this copy of it, put back, has got the same inode.
        ring.close()
        core.log.log("vsnapfs", 1049, volume=core.name, what=ring_id)
        return None
    except FileNotFoundError:
        event, reason, hint = 1043, "it is gone", ""
    except FormatError as error:
        foreign = error.code == "foreign-version"
        event, reason, hint = 0 if foreign else 1043, error.message, error.hint
    except Unusable as error:
        event, reason, hint = 0, error.reason, error.hint
    except OSError as error:
        if error.errno == errno.ENOMEM:
            raise MemoryError from error  # Any opening without memory is the same: fault 4.
        event, reason, hint = 0, error.strerror or str(error), ""
    if event or give_up:
        core.log.log("vsnapfs", event or 1054, volume=core.name, what=ring_id, reason=reason)
        return None
    raise VsnapError(
        f"volume {core.name} stays closed: acknowledged writes lie in a write buffer that cannot "
        f"be used now: {reason}",
        hint=f"{hint} Its recovery points can be listed and exported meanwhile. If the write "
        "buffer is lost for good: 'vsnapfs mount --give-up-write-buffer' goes on without what it "
        "holds.".strip(),
        errno=errno.EBUSY,
        code=CLOSED,
    )


def _refuse_old(core: Core, ring: Ring) -> None:
    """FaultError 15, and the ring is let go, if the area is behind what the ring was told of it;
    with durability "process" only the points are suspect then.

    A copy that was made while it was served looks like the right one in all other ways: preserving
    changes no generation, and the state file is not told of each.
    """
    area = core.need_area()
    generation, barrier = ring.area
    if area.superblock.generation < generation:
        behind = f"generation {area.superblock.generation}, {generation}"
    # Of an area that is damaged the newest sectors may be gone; nothing is preserved in it anyway.
    elif area.barrier_number < barrier and area.is_sound:
        behind = f"barrier {area.barrier_number}, {barrier}"
        if area.superblock.process:
            _suspect(core, area, barrier)
            return
    else:
        return
    area.is_old = True
    ring.close()
    raise FaultError(
        FaultCode.EXTERNAL_WRITER_TO_DIFF_AREA,
        f"the diff area ends with {behind} was written before: an old copy of it has been put back",
    )


def _suspect(core: Core, area: DiffArea, barrier: int) -> None:
    """With durability "process" no barrier is synced. The machine has not been down, but the disk
    of the area may have been, or a sync has failed: copies of all its points may be lost with it.
    """
    superblock = area.superblock
    if superblock.suspect >= superblock.epoch:  # Told already.
        return
    area.superblock, area.spoilt = replace(superblock, suspect=superblock.epoch), superblock.epoch
    reason = f"it ends with barrier {area.barrier_number}, and {barrier} had been written"
    core.tell_suspect(area, reason)


def _refuse_elsewhere(name: RingName, here: FileId) -> None:
    if name.device and name.device != here.device:
        then, now = (f"{os.major(d)}:{os.minor(d)}" for d in (name.device, here.device))
        raise Unusable(
            f"it belongs to a replica on device {then}, and this one is on device {now}",
            "Mount the file system or attach the disk as it was then, if it is the same.",
        )
