"""What befalls a volume between two lives: rot, old copies put back, a place without its ring.

All of it happens to the files of a host on which nobody serves the volume.
"""

from __future__ import annotations

import contextlib
import copy
from dataclasses import dataclass, replace
from typing import Any

import trio
from damage import LAYOUT
from filefuzz import poke
from rig import MemoryLog, attempt, read_point
from simdisk import Change, Host, SimFile, SimStore

from vsnapfs.diffarea.layout import SECTOR_SIZE, SUPERBLOCK_OFFSETS
from vsnapfs.errors import VsnapError
from vsnapfs.volume import Volume
from vsnapfs.volume.adoption import CLOSED
from vsnapfs.volume.opening import open_core
from vsnapfs.volume.overlay import Overlay
from vsnapfs.volume.statefile import COPY_SIZE, STATE_SIZE

from .account import Account
from .clients import Clients

_ROT = b"rot!rot!" * 10


def rot(clients: Clients, *, powerless: bool) -> None:
    """Overwrite one copy of something.

    powerless: the power has failed. Then a copy of a state or superblock may be torn already, and
    this would be the second one; the descriptors' sectors are written whole or not at all.
    """
    dice, rig = clients.dice, clients.rig
    name, offset = "area", dice.choice(LAYOUT.sector_offsets(dice.randrange(4)))
    if not powerless and dice.random() < 0.5:
        name = dice.choice(["state", "area"])
        offset = dice.choice((0, COPY_SIZE) if name == "state" else SUPERBLOCK_OFFSETS)
    offset += SECTOR_SIZE // 4
    file = rig.host.files[name]

    def elsewhere(change: Change) -> bool:
        ends = change.offset + len(change.data or b"")
        return change.data is None or ends <= offset or offset + len(_ROT) <= change.offset

    file.journal = [change for change in file.journal if elsewhere(change)]
    poke(rig, name, offset, _ROT)
    clients.damaged = True
    clients.say("rot", name, offset)


# --- old copies ----------------------------------------------------------------------------------


@dataclass
class Copies:
    """All files at one instant, and what was known of them then."""

    files: dict[str, SimFile]
    account: Account
    events: list[tuple[str, int, dict[str, Any]]]
    boot: int
    had_ring: bool


def copied(clients: Clients, *, powerless: bool) -> Copies:
    """`cp -a`, into a backup."""
    host, account = clients.rig.host, copy.deepcopy(clients.account)
    account.lossy = account.lossy or powerless or bool(host.memory)
    # As new files; written back over the old ones, they have their inodes again.
    files = {
        name: replace(file, inode=host.files[name].inode)
        for name, file in host.copied().files.items()
    }
    return Copies(files, account, list(clients.rig.log.events), host.boot, bool(host.memory))


def _written(file: SimFile) -> SimFile:
    return replace(
        file,
        cache=file.cache.copy(),
        disk=file.disk.copy(),
        journal=[],
        space=set(file.space),
        written=set(file.written),
    )


def put_back_all(clients: Clients, copies: Copies) -> None:
    """The volume is what it was then; of what lay in its ring then, nothing is known."""
    host = clients.rig.host
    host.files = {name: _written(file) for name, file in copies.files.items()}
    clients.account = copy.deepcopy(copies.account)
    clients.account.may_be_spoilt = clients.account.may_be_spoilt or copies.boot != host.boot
    clients.rig.log.events[:] = copies.events
    clients.say("all files put back", copies.boot == host.boot, copies.had_ring)


def put_back_state(clients: Clients, copies: Copies) -> None:
    """An older word on whether the volume is offline; the superblock's counts as well."""
    old = copies.files["state"].cache.read(0, STATE_SIZE)
    poke(clients.rig, "state", 0, old)
    clients.rig.host.files["state"].journal = []
    clients.account.offline = False
    clients.say("state file put back")


def look_at_old_area(clients: Clients, copies: Copies) -> None:
    """Open the volume with its diff area as it was: nothing wrong is shown, nothing goes on.

    Then the right one is put back. Where there was no difference that counts, the old one stays.
    """
    rig, account = clients.rig, clients.account
    account.may_be_spoilt = account.may_be_spoilt or copies.boot != rig.host.boot
    right, log = rig.host.files["area"], rig.log
    rig.host.files["area"] = _written(copies.files["area"])
    rig.log = MemoryLog()
    took_it = False

    async def look(volume: Volume) -> None:
        nonlocal took_it
        area = volume.core.area
        if area is None or not area.is_old:
            took_it = True
            return
        clients.say("old area refused")
        assert volume.protection.fault is not None
        assert not volume.protection.is_online
        assert await attempt(volume.online()) is not None, "online beside an old diff area"
        for point in volume.points:
            known = account.points.get(point.number)
            with contextlib.suppress(OSError):
                content = await read_point(volume, point.number)
                if point.number <= volume.suspect:
                    continue
                if known is not None and known.content is not None:
                    account.judge(point.number, known, content)
        with contextlib.suppress(OSError):
            volume.open_replica()
            raise AssertionError("the replica can be opened beside an old diff area")

    try:
        rig.run(look)
    except VsnapError as error:
        clients.say("old area not opened", error)
    if took_it:
        clients.say("old area taken")
        rig.killed()
    else:
        rig.killed()
        right.locked = False
        rig.host.files["area"] = right
    rig.log = log


# --- closed --------------------------------------------------------------------------------------


def _everything(host: Host) -> list[bytes]:
    found = []
    for file in host.files.values():
        durable = file.disk.copy()
        for change in file.journal:  # A sync writes nothing that was not written before.
            change.apply(durable)
        found.append(durable.read(0, durable.size))
    return [*found, *(bytes(memory) for memory in host.memory.values())]


def look_while_closed(clients: Clients) -> dict[int, bytes] | None:
    """The points, as seen where the ring cannot be; None if the volume needs none.

    There it does not open, nothing is written, and the points can be read all the same.
    """
    rig, log = clients.rig, clients.rig.log
    host, rig.log = rig.host, MemoryLog()
    host.tmpfs += 1
    before = _everything(host)

    async def nothing(_volume: Volume) -> None:
        return

    try:
        rig.run(nothing)
    except VsnapError as error:
        if error.code != CLOSED:
            raise
        reason = error
    else:
        # It is served there from now on.
        host.tmpfs -= 1
        rig.log.events[:0] = log.events
        clients.say("needs no ring")
        return None
    assert _everything(host) == before, "written to while closed"
    seen: dict[int, bytes] = {}

    async def look() -> None:
        overlays = [Overlay(one.path, one) for one in map(host.open, ("replica", "area", "state"))]
        opened = open_core("/sim", rig.config, *overlays, rig.log, None, False, SimStore(host))
        opened.core.dry_run, opened.buffer_size = True, rig.buffer
        volume = await Volume.from_opened(opened, closed=reason)
        async with trio.open_nursery() as nursery:
            await nursery.start(volume.run)
            assert volume.protection.state == "closed"
            for point in volume.points:
                if point.number > volume.suspect:
                    seen[point.number] = await read_point(volume, point.number)
            found = clients.problems((await volume.verify())["problems"])
            assert not found or clients.damaged or clients.failing, found
            await volume.repair(dry_run=True)
            volume.status()
            with contextlib.suppress(OSError):
                volume.open_replica()
                raise AssertionError("the replica can be opened while the volume is closed")
            await volume.close()
            nursery.cancel_scope.cancel()

    rig.trio_run(look)
    assert _everything(host) == before, "looking while closed has written"
    for number, content in seen.items():
        point = clients.account.points.get(number)
        if point is not None and point.content is not None:
            clients.account.judge(number, point, content)
    host.tmpfs -= 1
    rig.log = log
    clients.say("looked at while closed", len(seen))
    return seen
