"""`repair`: brings back what a second copy, the replica or the memory still has, and says so.

Owns the account of everything that was found: what opening had already healed, what is mended now,
what is beyond repair and which ranges of which recovery points that hits. Promises:

* nothing is mended silently, and nothing is guessed: a structure is written anew only from a copy
  of it whose checksum is right, a preserved block only with content that its descriptor names;
* what was readable before stays readable and reads the same;
* a fault stays (P1): `online` clears it, by the administrator's word.

    found                                    mended from
    one superblock copy bad or older         the other one
    one copy of a descriptor sector          its twin, the newer of two valid ones
    both copies, while the volume was open   memory (a copy whose checksum only they knew: EIO)
    a preserved block                        the replica, if it still holds what was copied, or
                                             what a shrink that did not end left behind
    state file missing, a copy bad or old    the other copy, else the superblock
    file longer than allocated               cut off: a growth or shrink that did not end
    file shorter, all descriptors there      the space is reserved again, lost copies are EIO
    descriptors of no copy                   cleared, so that no growth brings them to life
    restore interrupted                      opening goes on with it

Leaves the check itself to `diffarea.verify` and each single write to `diffarea`.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

from ..backing import Backing
from ..diffarea.area import DiffArea
from ..diffarea.descriptors import (
    BLOCK_MASK,
    IN_USE,
    SECTOR_DTYPE,
    Descriptor,
    sector_is_valid,
    with_zeros,
    zero_blocks,
)
from ..diffarea.descriptors import ZEROS as DESCRIBES_ZEROS
from ..diffarea.index import EPOCH_BITS, SLOT_MASK, ZEROS, Keys, Slots
from ..diffarea.layout import SECTOR_SIZE, SECTORS_PER_GROUP, SLOTS_PER_SECTOR, TABLE_SIZE
from ..diffarea.verify import Problem, Verification
from ..errors import FaultError
from .account import state_problem
from .core import Progress, in_thread

if TYPE_CHECKING:
    from .volume import Volume

#: In this order: what the later ones rest on comes first.
_STRUCTURES = ("superblock", "descriptor sector")
_EVENTS = 20


class _Mending(NamedTuple):
    """How a problem can be mended: in words, and the work (in a worker thread)."""

    action: str
    work: Callable[[], None]


#: What a problem was due to has been found and told already.
_NOT_NEEDED = _Mending("", lambda: None)


class Repair:
    """One run over an open volume. dry_run: nothing is mended, only said."""

    def __init__(self, volume: Volume, *, dry_run: bool) -> None:
        self._volume = volume
        self._core = volume.core
        self._dry_run = dry_run
        # A volume that was opened for a dry run forgets what is written, so all of it is tried.
        self._act = not dry_run or volume.core.dry_run
        self._lost: frozenset[int] = frozenset()  # sectors, see `DiffArea.damaged_sectors`
        self._found: list[Problem] = []
        self._beyond: list[Problem] = []
        # Slots with a copy that lies in another slot, too, by (block, epoch).
        self._doubled: dict[tuple[int, int], list[int]] = {}

    async def run(self, progress: Progress) -> dict[str, Any]:
        """Everything, under the locks of an administrative operation. JSON-ready.

        ok: nothing is beyond repair. found: what was wrong and can be or has been mended: what,
        message, action, when ("opening" or "now"), done. beyond_repair: as `verify`'s problems.
        """
        core = self._core
        # Not `grow_lock`: a write that needs the area to grow cannot wait for a whole check.
        async with core.admin.turn("repairing"), core.shape_lock:
            if not self._dry_run:
                core.admin.begin()
            for finding in self._volume.account.findings():
                self._add(finding, when="opening", done=not core.dry_run)
            self._tell_restore()
            await self._mend_state()
            if core.area is None:
                trouble = self._volume.protection.trouble
                fault = self._volume.protection.fault
                message = trouble or (fault.message if fault else "it could not be opened")
                self._cannot({"what": "diff area", "message": message, "points": [], "ranges": []})
            else:
                await self._mend_area(core.area, progress)
        core.changed()
        return {
            "ok": not self._beyond,
            "dry_run": self._dry_run,
            "state": self._volume.protection.state,
            "found": self._found,
            "beyond_repair": self._beyond,
        }

    def _add(self, finding: Problem, *, when: str, done: bool) -> None:
        kept = {k: v for k, v in finding.items() if k not in ("points", "ranges", "slots")}
        self._found.append(kept | {"when": when, "done": done})

    def _cannot(self, problem: Problem) -> None:
        self._beyond.append(problem)

    def _tell_restore(self) -> None:
        """What became of an in-place restore that was interrupted, before or since opening."""
        account, area = self._volume.account, self._core.area
        if area is None:
            return
        number = area.superblock.restoring or account.restoring
        if not number:
            return
        message = f"the restore of recovery point {number} was interrupted"
        when, action = "opening", "continued and finished"
        if area.superblock.restoring:
            when = "now"
            action = "the next opening continues it"
            if not self._volume.protection.is_online:
                action = "`vsnapfs online` continues it"
        elif not account.restored:
            when = "now"
            action = "given up with its recovery point: the replica is a mixture of two states"
        finding = {"what": "restore", "message": message, "action": action}
        self._add(finding, when=when, done=when == "opening")

    async def _mend_state(self) -> None:
        protection = self._volume.protection
        wrong = [state_problem(*each) for each in await in_thread(protection.check_state)]
        if not wrong:
            return
        done = False
        if self._act:
            try:
                await in_thread(protection.save_as_it_is)
                done = not await in_thread(protection.check_state)
            except OSError as error:
                wrong[0]["message"] += f"; it could not be written: {error.strerror}"
            if not done:
                self._beyond += wrong
                return
            self._log("the state file")
        for problem in wrong:
            self._add(problem | {"action": "written anew"}, when="now", done=self._done(done))

    def _done(self, really: bool) -> bool:
        return really and not self._dry_run

    def _log(self, what: str) -> None:
        if sum(finding["done"] for finding in self._found) <= _EVENTS:
            self._core.log.log("vsnapfs", 1041, volume=self._core.name, what=what)

    # -- the diff area --------------------------------------------------------------------------

    async def _mend_area(self, area: DiffArea, progress: Progress) -> None:
        self._lost = frozenset(area.damaged_sectors)
        problems = await self._check(area, progress)
        if area.is_old or self._core.area_is_stale:
            self._beyond += problems
            if not problems:
                message = "somebody else has written to it: nothing of it is touched"
                self._cannot({"what": "diff area", "message": message, "points": [], "ranges": []})
            return
        structures = [problem for problem in problems if problem["what"] in _STRUCTURES]
        structures.sort(key=lambda problem: _STRUCTURES.index(problem["what"]))
        mended = False
        # A growth makes the file longer before it counts.
        async with self._volume.room.standing_still():
            for problem in self._lengths(area) + [p for p in problems if p["what"] == "diff area"]:
                mended |= await self._mend(area, problem)
        for problem in structures:
            mended |= await self._mend(area, problem)
        # While descriptors are lost, nothing is described anew (`AreaStore.require_sound`).
        leftovers = [] if area.damaged_sectors else await self._leftovers(area)
        for problem in problems:
            if problem["what"] == "preserved block":
                mended |= await self._mend(area, problem)
            elif problem["what"] == "recovery point":
                self._cannot(problem)
        for leftover in leftovers:
            mended |= await self._mend(area, leftover)
        if mended:
            # Once more: what was mended may have hidden something, and is not believed unseen.
            again = await self._check(area, progress)
            told = {_key(problem) for problem in self._beyond}
            self._beyond += [problem for problem in again if _key(problem) not in told]

    async def _check(self, area: DiffArea, progress: Progress) -> list[Problem]:
        core = self._core
        async with core.area_lock:
            points = [point.number for point in core.points]
            run = await in_thread(Verification, area, lambda: points)
        for step in run.steps():
            async with core.area_lock:
                points[:] = [point.number for point in core.points]
                await in_thread(step)
            progress("verify", min(run.done, run.total), run.total)
        return run.problems

    async def _mend(self, area: DiffArea, problem: Problem) -> bool:
        """Mend one problem, or put it on the list of those that stay. True if it was mended."""
        core = self._core
        if problem.get("sector") in self._lost:  # Known to be hopeless, and perhaps one of many.
            self._cannot(problem)
            return False
        if problem["what"] == "descriptors" and self._act:
            try:
                await core.mark_in_use()
            except FaultError:
                pass  # The work itself fails then, and says why.
        try:
            async with core.area_lock:
                mending = await in_thread(self._plan, area, problem)
                if mending is None:
                    self._cannot(problem)
                    return False
                if mending is _NOT_NEEDED:
                    return False
                if self._act:
                    await in_thread(self._work, area, mending)
        except (FaultError, OSError) as error:
            self._cannot(problem | {"message": f"{problem['message']}; mending failed: {error}"})
            return False
        self._add(problem | {"action": mending.action}, when="now", done=self._done(self._act))
        if self._act:
            self._log(f"{problem['what']}: {problem['message']}")
        return self._act

    def _work(self, area: DiffArea, mending: _Mending) -> None:
        if area.needs_rollback:
            area.rollback()
        mending.work()

    def _plan(self, area: DiffArea, problem: Problem) -> _Mending | None:
        """In a worker thread: how `problem` can be mended, None if it cannot."""
        what = problem["what"]
        if what == "superblock":
            return _Mending("written anew", lambda: _mend_superblock(area, problem["offset"]))
        if what == "descriptor sector":
            return self._plan_sector(area, problem)
        if what == "preserved block":
            return self._plan_copy(area, problem)
        if what == "descriptors":
            # A write may have taken some of these slots since, and described its copies there.
            slots = [slot for slot in problem["slots"] if _is_free(area, slot)]
            return _Mending("cleared", lambda: area.clear_descriptors(slots))
        if what == "diff area" and problem["offset"] > area.allocated:
            return _Mending("cut off", lambda: _cut_off(area))
        if what == "diff area" and not area.damaged_sectors:
            action = "the lost space is reserved again (the copies in it are not back)"
            return _Mending(action, area.regain_space)
        return None

    def _plan_sector(self, area: DiffArea, problem: Problem) -> _Mending | None:
        sector: int = problem["sector"]
        if "both" not in problem["message"]:
            action = "written anew from the other copy"
            return _Mending(action, lambda: area.mend_sector(sector))
        lost = range(sector, sector + problem["sectors"])
        unknown = {one for one in lost if area.known_sector(one) is None}
        copies = self._copies_in(area, unknown)
        # A disk that does not answer now may do so later; then the checksums are back.
        waiting = [one for one in copies if not area.has_rotted(one)]
        if waiting:
            text = f"{len(waiting)} of these sectors cannot be read; nothing is written over them"
            self._cannot(problem | {"message": f"{problem['message']}; {text}"})
            if len(waiting) == len(lost):
                return _NOT_NEEDED
        action = "written anew from memory"
        count = sum(
            not descriptor.zeros
            for one in copies
            if one not in waiting
            for descriptor in copies[one].values()
        )
        if count:
            action += f" ({count} copies whose checksum only it knew are lost)"

        def work() -> None:
            for one in lost:
                if one not in unknown:
                    area.mend_sector(one)
                elif one not in waiting:
                    area.rebuild_sector(one, copies.get(one, {}))

        return _Mending(action, work)

    def _copies_in(self, area: DiffArea, sectors: set[int]) -> dict[int, dict[int, Descriptor]]:
        """What the slots of some sectors hold, by the index. The checksums of data are lost: any
        block must fail the one that is recorded now, because nothing proves it.
        """
        points = [point.number for point in self._core.points]
        blocks, epochs, slots = area.index.living(points)
        places = (slots & np.uint32(SLOT_MASK)) // SLOTS_PER_SECTOR
        chosen = np.flatnonzero(np.isin(places, sorted(sectors)))
        copies: dict[int, dict[int, Descriptor]] = {}
        for row in chosen.tolist():
            slot = int(slots[row])
            block, epoch = int(blocks[row]), int(epochs[row])
            if slot & ZEROS:
                # What the index says of zeros is all that there was to know.
                slot &= SLOT_MASK
                known = copies.setdefault(slot // SLOTS_PER_SECTOR, {})
                known[slot] = with_zeros(known.get(slot), block, epoch)
                continue
            try:
                data = area.backing.read(area.layout.slot_offset(slot), area.layout.block_size)
                unlike = xxhash.xxh3_64_intdigest(data) ^ 1
            except OSError:
                unlike = 0
            descriptor = Descriptor(unlike, block, epoch)
            copies.setdefault(slot // SLOTS_PER_SECTOR, {})[slot] = descriptor
        return copies

    def _plan_copy(self, area: DiffArea, problem: Problem) -> _Mending | None:
        """The replica, or a slot that a shrink left behind, may still hold what was copied."""
        core = self._core
        block, epoch = problem["block"], problem["epoch"]
        points = {point.number for point in core.points}
        readers = [number for number in problem["points"] if number in points]
        found = area.index.lookup(readers[0], block) if readers else None
        if found is None:
            return _NOT_NEEDED  # Its points have been evicted since.
        slot = found[1]
        wanted = area.descriptor_of(slot & SLOT_MASK)
        if slot & ZEROS:
            known = wanted is not None and wanted.tells_zeros(block, epoch)
            return _NOT_NEEDED if known else None

        def content_at(backing: Backing, offset: int, length: int) -> bytes:
            try:
                content = bytes(backing.read(offset, length)).ljust(core.block_size, b"\0")
            except OSError:
                return b""
            named = Descriptor(xxhash.xxh3_64_intdigest(content), block, epoch)
            return content if named == wanted else b""

        size, where = core.block_size, area.layout.slot_offset
        if content_at(area.backing, where(slot), size):
            return _NOT_NEEDED  # Only its descriptor was bad, and memory knows that.
        offset = block * size
        content = content_at(core.replica, offset, min(size, core.size - offset))
        action = "copied once more from the replica, which has not changed there"
        for other in self._doubled.get((block, epoch), ()):
            if not content:
                content = content_at(area.backing, where(other), size)
                action = "copied once more from where it lay before a shrink"
        return _Mending(action, lambda: area.rewrite_copy(slot, content)) if content else None

    # -- what verify has no reason to mind --------------------------------------------------------

    def _lengths(self, area: DiffArea) -> list[Problem]:
        if area.backing.is_device or area.in_doubt or area.backing.size() <= area.allocated:
            return []
        size = area.backing.size()
        message = (
            f"the file has {size} bytes, {area.allocated} are allocated: "
            "a growth or shrink did not end"
        )
        return [{"what": "diff area", "offset": size, "message": message}]

    async def _leftovers(self, area: DiffArea) -> list[Problem]:
        """Descriptors that describe no copy, by kind."""
        kinds: dict[str, list[int]] = {}
        async with self._core.area_lock:
            points = [point.number for point in self._core.points]
            # Once, it is everything there is: later copies lie in slots that are taken later.
            living = await in_thread(area.index.living, points)
        for group in range(area.layout.groups_of(len(area.slots))):
            async with self._core.area_lock:
                await in_thread(self._look_for_leftovers, area, group, living, kinds)
        return [
            {"what": "descriptors", "message": f"{len(slots)} {kind}", "slots": slots}
            for kind, slots in kinds.items()
        ]

    def _look_for_leftovers(
        self,
        area: DiffArea,
        group: int,
        living: tuple[Keys, npt.NDArray[np.uint64], Slots],
        kinds: dict[str, list[int]],
    ) -> None:
        table = area.read_table(area.layout.table_offsets(group)[0])
        first = group * SECTORS_PER_GROUP
        for number, at in enumerate(range(0, TABLE_SIZE, SECTOR_SIZE)):
            part = slice(at, at + SECTOR_SIZE)
            if not sector_is_valid(memoryview(table)[part], area.area_id, first + number):
                image = area.known_sector(first + number)
                table[part] = image.data if image else bytes(SECTOR_SIZE)
        entries = np.frombuffer(table, dtype=SECTOR_DTYPE)["entries"].reshape(-1)
        places = np.flatnonzero((entries["block"] & np.uint64(IN_USE)) != 0)
        free = [_is_free(area, first * SLOTS_PER_SECTOR + place) for place in places.tolist()]
        places = places[np.array(free, dtype=bool)]
        zeros = (entries["block"][places] & np.uint64(DESCRIBES_ZEROS)) != 0
        blocks = entries["block"][places] & np.uint64(BLOCK_MASK)
        if zeros.any():  # One row for each block, as for data.
            where, more = zero_blocks(entries, places[zeros])
            places = np.concatenate([places[~zeros], where])
            blocks = np.concatenate([blocks[~zeros], more])
        slots = places + first * SLOTS_PER_SECTOR
        epochs = entries["epoch"][places].astype(np.uint64)

        beyond = slots >= len(area.slots)
        superblock = area.superblock
        impossible = ~beyond & (
            (epochs == 0)
            | (epochs > superblock.epoch)
            | (blocks >= np.uint64(self._core.block_count))
        )
        possible = ~beyond & ~impossible
        live_blocks, live_epochs, live_slots = living
        live = (live_blocks << np.uint64(EPOCH_BITS)) | live_epochs
        keys = (blocks << np.uint64(EPOCH_BITS)) | epochs
        at = np.minimum(live.searchsorted(keys), max(0, len(live) - 1))
        doubled = np.zeros(len(slots), dtype=bool)
        if len(live):
            other = (live_slots[at] & np.uint32(SLOT_MASK)) != slots
            doubled = possible & (live[at] == keys) & other
        for place in np.flatnonzero(doubled).tolist():
            copy = int(blocks[place]), int(epochs[place])
            self._doubled.setdefault(copy, []).append(int(slots[place]))
        for kind, chosen in (
            ("descriptors of slots beyond the end", beyond),
            ("descriptors of blocks or epochs that cannot be", impossible),
            ("descriptors left by a shrink that did not end", doubled),
        ):
            if chosen.any():
                kinds.setdefault(kind, []).extend(np.unique(slots[chosen]).tolist())


def _is_free(area: DiffArea, slot: int) -> bool:
    return slot >= len(area.slots) or not area.slots.is_taken(slot)


def _cut_off(area: DiffArea) -> None:
    area.trim()
    if area.backing.size() > area.allocated:
        raise OSError(errno.EIO, "the file could not be cut")


def _mend_superblock(area: DiffArea, offset: int) -> None:
    try:
        area.mend_superblock(offset)
    except FaultError:
        # The other copy is not what is in memory (points were given up while it could not be
        # written): a commit writes both.
        area.commit()


def _key(problem: Problem) -> tuple[Any, ...]:
    return tuple(problem.get(name) for name in ("what", "offset", "sector", "block", "point"))
