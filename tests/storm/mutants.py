"""Engines broken on purpose: rules that a storm must find broken, and within how many seeds.

Most are the explorer's. Those made here are rules that only a reader beside a writer, rot, or an
old copy can show.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from explorer.mutants import (
    fault_answered_before_it_is_written,
    flush_without_sync,
    no_sync_in_barrier,
    point_without_draining,
)
from explorer.ring_mutants import (
    Patch,
    a_failed_copy_holds_up_nothing,
    what_a_kill_left_is_not_carried_out,
)

from vsnapfs.backing import Bytes
from vsnapfs.diffarea.area import DiffArea
from vsnapfs.diffarea.store import AreaStore
from vsnapfs.volume import buffer, opening
from vsnapfs.volume.adoption import adopt
from vsnapfs.volume.core import in_thread
from vsnapfs.volume.reader import Reader


def readers_look_once(patch: Patch) -> None:
    """Whoever finds no copy shows what the replica holds by the time it is read."""
    one = Reader._one

    async def broken(self: Reader, point: int, block: int, offset: int, length: int) -> Bytes:
        core = self._core
        if core.need_area().index.lookup(point, block) is None:
            return await in_thread(core.replica.read, offset, length)
        return await one(self, point, block, offset, length)

    patch(Reader, "_one", broken)


def sectors_are_not_healed(patch: Patch) -> None:
    """A descriptor sector whose twin is good stays bad."""
    patch(DiffArea, "heal", lambda _self, _sectors: None)


def an_old_area_is_as_good(patch: Patch) -> None:
    """Nobody compares the diff area's generation with the one that is known."""
    open_it = opening.open_area

    def broken(backing: Any, replica: Any, volume_id: bytes, _known: int = 0) -> Any:
        return open_it(backing, replica, volume_id)

    patch(opening, "open_area", broken)


def the_ring_of_another_time(patch: Patch) -> None:
    """A ring is carried out whoever has had it since."""

    def broken(*args: Any, **options: Any) -> Any:
        return adopt(*args[:4], **options)

    patch(buffer, "adopt", broken)


def a_power_failure_spoils_nothing(patch: Patch) -> None:
    """With durability "process" copies lost with the power are believed."""
    patch(opening, "_look_at_boot", lambda _area, _report, _boot: None)


def a_failed_sync_spoils_nothing(patch: Patch) -> None:
    """With durability "process" copies lost by a failed sync are believed."""
    sync = AreaStore._sync

    def broken(self: AreaStore) -> None:
        relaxed, self.relaxed = self.relaxed, False
        try:
            sync(self)
        finally:
            self.relaxed = relaxed

    patch(AreaStore, "_sync", broken)


#: In how many seeds, from 0 on, a storm must find each.
WITHIN = 150
PLAIN: dict[str, Any] = {"failures": False, "rot": False, "copies": False, "process": False}
#: What a storm is given for it.
MUTANTS: dict[Callable[[Patch], None], dict[str, Any]] = {
    no_sync_in_barrier: PLAIN,
    flush_without_sync: PLAIN,
    what_a_kill_left_is_not_carried_out: PLAIN,
    point_without_draining: PLAIN,
    fault_answered_before_it_is_written: PLAIN,
    readers_look_once: PLAIN | {"disk": 20, "cached": False, "buffer": 0},
    a_failed_copy_holds_up_nothing: PLAIN | {"failures": True, "buffer": 65536},
    sectors_are_not_healed: PLAIN | {"rot": True},
    an_old_area_is_as_good: PLAIN | {"copies": True},
    a_power_failure_spoils_nothing: PLAIN | {"process": True},
    a_failed_sync_spoils_nothing: PLAIN
    | {"process": True, "failures": True, "ends": ("kill",), "on_full": "offline"}
    | {"extra": 40, "buffer": 0},
    the_ring_of_another_time: PLAIN | {"copies": True, "buffer": 65536, "ends": ("kill",)},
}
