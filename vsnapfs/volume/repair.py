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
    a preserved block                        the replica, if it still holds what was copied
    state file missing, a copy bad or old    the other copy, else the superblock
    file longer than allocated               cut off: a growth or shrink that did not end
    file shorter, all descriptors there      the space is reserved again, lost copies are EIO
    descriptors of no copy                   cleared, so that no growth brings them to life
    restore interrupted                      opening goes on with it

Leaves the check itself to `diffarea.verify` and each single write to `diffarea`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import xxhash

from ..diffarea.area import DiffArea
from ..diffarea.descriptors import (
    BLOCK_MASK,
    IN_USE,
    SECTOR_DTYPE,
    Descriptor,
    sector_is_valid,
)
from ..diffarea.index import EPOCH_BITS
from ..diffarea.layout import SECTOR_SIZE, SECTORS_PER_GROUP, SLOTS_PER_SECTOR, TABLE_SIZE
from ..diffarea.verify import Problem, Verification
from ..errors import FaultError
from .core import Progress, in_thread

if TYPE_CHECKING:
    from .opening import Opened
    from .volume import Volume

#: In this order: what the later ones rest on comes first.
_ORDER = ("diff area", "superblock", "descriptor sector", "preserved block", "recovery point")
_EVENTS = 20


def state_problem(offset: int, message: str) -> Problem:
    """A copy in the state file, as `verify` describes problems."""
    where = {"what": "state file", "copy": int(offset > 0), "offset": offset}
    return where | {"message": message, "points": [], "ranges": []}


@dataclass
class Account:
    """What opening a volume found and brought back."""

    opened: Opened
    superblock_healed: bool = False
    state: list[Problem] = field(default_factory=list)
    restoring: int = 0
    beyond_end: int = 0

    def __post_init__(self) -> None:
        area = self.opened.core.area
        if area is not None:
            self.restoring = area.superblock.restoring
            if not area.backing.is_device:
                self.beyond_end = max(0, area.backing.size() - area.allocated)

    def superblock_is_healed(self) -> None:
        """Both copies of the superblock have been written."""
        self.superblock_healed = True

    def state_is_healed(self, wrong: list[tuple[int, str]]) -> list[str]:
        """The state file has been written anew. Returns what was really bad, for the log."""
        lost = self.opened.state_problem
        if lost:
            self.state.append(state_problem(0, lost))
        else:
            self.state += [state_problem(offset, f"this copy {text}") for offset, text in wrong]
        return [f"{problem['what']}: {problem['message']}" for problem in self._state_rot()]

    def _state_rot(self) -> list[Problem]:
        return [problem for problem in self.state if "older" not in problem["message"]]

    def rot(self) -> list[Problem]:
        """What was bad (not merely older) and has been healed, as `verify` describes problems."""
        found = self._state_rot()
        for where in self.opened.report.rot if self.opened.report else ():
            if where["what"] != "superblock" or self.superblock_healed:
                found.append(where | {"points": [], "ranges": []})
        return [
            problem | {"message": f"{problem['message']} (healed when the volume was opened)"}
            for problem in found
        ]

    def findings(self) -> list[Problem]:
        """Everything that opening did, for `repair`."""
        listed = [problem | {"action": "written anew"} for problem in self.state]
        report, area = self.opened.report, self.opened.core.area
        if report is None or area is None:
            return listed
        if self.beyond_end and area.backing.size() <= area.allocated:
            message = f"the file had {self.beyond_end} bytes more than are allocated"
            listed.append({"what": "diff area", "message": message, "action": "cut off"})
        listed += [
            where | {"action": "written anew from the other copy"}
            for where in report.rot
            if where["what"] != "superblock" or self.superblock_healed
        ]
        listed += [
            {"what": "superblock", "message": text, "action": "written anew"}
            for text in report.healed
            if text.endswith("behind") and self.superblock_healed
        ]
        differing = report.differing
        if differing:
            message = f"{differing} descriptor sectors whose two copies differed"
            action = "the newer one counts"
            listed.append({"what": "descriptor sectors", "message": message, "action": action})
        if report.unclean:
            message = "the volume was not closed cleanly"
            action = (
                f"the copies of the last barrier were checked: {report.kept} kept, "
                f"{report.dropped} dropped (their blocks had not been overwritten), "
                f"{report.damaged} damaged"
            )
            listed.append({"what": "recovery", "message": message, "action": action})
        return listed


class _Mending(NamedTuple):
    """How a problem can be mended: in words, and the work (in a worker thread)."""

    action: str
    work: Callable[[], None]


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

    async def run(self, progress: Progress) -> dict[str, Any]:
        """Everything, under the locks of an administrative operation. JSON-ready.

        ok: nothing is beyond repair. found: what was wrong and can be or has been mended: what,
        message, action, when ("opening" or "now"), done. beyond_repair: as `verify`'s problems.
        """
        core = self._core
        async with core.admin_lock, core.shape_lock, core.grow_lock:
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
        """What became of an in-place restore that had been interrupted."""
        number, area = self._volume.account.restoring, self._core.area
        if not number or area is None:
            return
        message = f"the restore of recovery point {number} was interrupted"
        when, action = "opening", "continued and finished"
        if area.superblock.restoring:
            when = "now"
            action = "the next opening continues it"
            if not self._volume.protection.is_online:
                action = "`vsnapfs online` continues it"
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
        problems.sort(key=lambda problem: _ORDER.index(problem["what"]))
        mended = False
        for problem in [*self._lengths(area), *problems]:
            # There may be very many of these: no lock is taken for what is known to be hopeless.
            if problem["what"] == "recovery point" or problem.get("sector") in self._lost:
                self._cannot(problem)
            else:
                mended |= await self._mend(area, problem)
        for leftover in await self._leftovers(area):
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
            slots: list[int] = problem["slots"]
            return _Mending("cleared", lambda: area.clear_descriptors(slots))
        if what == "diff area" and problem["offset"] > area.allocated:
            return _Mending("cut off", area.trim)
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
        unknown = {one: self._copies_in(area, one) for one in lost if not area.knows_sector(one)}
        action = "written anew from memory"
        if any(unknown.values()):
            count = sum(map(len, unknown.values()))
            action += f" ({count} copies whose checksum only it knew are lost)"

        def work() -> None:
            for one in lost:
                if one in unknown:
                    area.rebuild_sector(one, unknown[one])
                else:
                    area.mend_sector(one)

        return _Mending(action, work)

    def _copies_in(self, area: DiffArea, sector: int) -> dict[int, Descriptor]:
        """What the slots of a sector hold, by the index. Their checksums are lost: any block must
        fail the one that stands there now, because nothing proves it.
        """
        points = [point.number for point in self._core.points]
        blocks, epochs, slots = area.index.living(points)
        first = sector * SLOTS_PER_SECTOR
        chosen = np.flatnonzero((slots >= first) & (slots < first + SLOTS_PER_SECTOR))
        copies = {}
        for row in chosen.tolist():
            slot = int(slots[row])
            try:
                data = area.backing.read(area.layout.slot_offset(slot), area.layout.block_size)
                unlike = xxhash.xxh3_64_intdigest(data) ^ 1
            except OSError:
                unlike = 0
            copies[slot] = Descriptor(unlike, int(blocks[row]), int(epochs[row]))
        return copies

    def _plan_copy(self, area: DiffArea, problem: Problem) -> _Mending | None:
        """The replica may still hold what was copied: then it can be copied once more."""
        core = self._core
        block: int = problem["block"]
        found = area.index.lookup(problem["points"][0], block)
        if found is None:
            return None
        slot = found[1]
        offset = block * core.block_size
        try:
            data = core.replica.read(offset, min(core.block_size, core.size - offset))
        except OSError:
            return None
        content = bytes(data).ljust(core.block_size, b"\0")
        if area.descriptor_of(slot) != Descriptor(
            xxhash.xxh3_64_intdigest(content), block, problem["epoch"]
        ):
            return None
        action = "copied once more from the replica, which has not changed there"
        return _Mending(action, lambda: area.rewrite_copy(slot, content))

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
        for group in range(area.layout.groups_of(len(area.slots))):
            async with self._core.area_lock:
                await in_thread(self._look_for_leftovers, area, group, kinds)
        return [
            {"what": "descriptors", "message": f"{len(slots)} {kind}", "slots": slots}
            for kind, slots in kinds.items()
        ]

    def _look_for_leftovers(self, area: DiffArea, group: int, kinds: dict[str, list[int]]) -> None:
        try:
            table = bytes(area.backing.read(area.layout.table_offsets(group)[0], TABLE_SIZE))
        except OSError:
            return
        sectors = np.frombuffer(table, dtype=SECTOR_DTYPE)
        first = group * SECTORS_PER_GROUP
        valid = [
            sector_is_valid(memoryview(table)[at : at + SECTOR_SIZE], area.area_id, first + number)
            for number, at in enumerate(range(0, TABLE_SIZE, SECTOR_SIZE))
        ]
        entries = sectors["entries"].reshape(-1)
        used = (entries["block"] & np.uint64(IN_USE)) != 0
        places = np.flatnonzero(used & np.repeat(np.array(valid), SLOTS_PER_SECTOR))
        slots = places + first * SLOTS_PER_SECTOR
        blocks = entries["block"][places] & np.uint64(BLOCK_MASK)
        epochs = entries["epoch"][places].astype(np.uint64)

        beyond = slots >= len(area.slots)
        superblock = area.superblock
        impossible = ~beyond & (
            (epochs == 0)
            | (epochs > superblock.epoch)
            | (blocks >= np.uint64(self._core.block_count))
        )
        possible = ~beyond & ~impossible
        live_blocks, live_epochs, live_slots = area.index.living(
            [point.number for point in self._core.points]
        )
        live = (live_blocks << np.uint64(EPOCH_BITS)) | live_epochs
        keys = (blocks << np.uint64(EPOCH_BITS)) | epochs
        at = np.minimum(live.searchsorted(keys), max(0, len(live) - 1))
        doubled = np.zeros(len(slots), dtype=bool)
        if len(live):
            doubled = possible & (live[at] == keys) & (live_slots[at] != slots)
        for kind, chosen in (
            ("descriptors of slots beyond the end", beyond),
            ("descriptors of blocks or epochs that cannot be", impossible),
            ("descriptors left by a shrink that did not end", doubled),
        ):
            if chosen.any():
                kinds.setdefault(kind, []).extend(slots[chosen].tolist())


def _mend_superblock(area: DiffArea, offset: int) -> None:
    try:
        area.mend_superblock(offset)
    except FaultError:
        # The other copy is not what is in memory (points were given up while it could not be
        # written): a commit writes both.
        area.commit()


def _key(problem: Problem) -> tuple[Any, ...]:
    return tuple(problem.get(name) for name in ("what", "offset", "sector", "block", "point"))
