"""Recovery points: create, delete, find, and the rules for labels.

Owns the catalog as it changes. Creating keeps one order: flush without holding writes,
hold them, wait for those in flight, sync the replica (the point falls through to it), commit,
release, answer. Deleting is one commit of the superblock; slots are free only after it.
Promise C2: deleting needs no room and works in every state.
"""

from __future__ import annotations

import errno
import unicodedata
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

import trio

from ..diffarea.area import DiffArea
from ..diffarea.bitmap import BlockSet
from ..diffarea.layout import MAX_POINTS
from ..diffarea.superblock import MAX_LABEL, MAX_POINT_NUMBER, RecoveryPoint
from ..errors import BusyError, FaultError, UsageError, VsnapError
from ..patience import patient_for
from .buffer import WriteBuffer
from .core import Core, T, in_thread, now_ns
from .policy import Policy
from .protection import Protection
from .room import Room

_WORDS = ("latest", "oldest")


def check_label(label: str) -> None:
    """UsageError unless `label` can name a point and never be taken for a number or a word."""
    reason = ""
    if not label or label != label.strip():
        reason = "it must not be empty or begin or end with a space"
    elif label.isdigit() or label in _WORDS:
        reason = "it must not be a number, 'latest' or 'oldest'"
    elif "/" in label or any(_is_control(character) for character in label):
        reason = "it must not contain '/' or control characters"
    elif len(label.encode(errors="surrogatepass")) > MAX_LABEL:
        reason = f"it must not be longer than {MAX_LABEL} bytes"
    if reason:
        raise UsageError(f"{label!r} cannot be a label: {reason}")


def _is_control(character: str) -> bool:
    category = unicodedata.category(character)
    return category[0] == "C" or category in ("Zl", "Zp")


class Points:
    """The recovery points of an open volume."""

    def __init__(
        self,
        core: Core,
        protection: Protection,
        policy: Policy,
        room: Room,
        buffer: WriteBuffer,
    ) -> None:
        self._core = core
        self._protection = protection
        self._policy = policy
        self._room = room
        self._buffer = buffer
        policy.remove_points = self.remove
        policy.forget_all_points = self.forget_all
        #: Points deleted while open: handles on them get ESTALE.
        self.gone: set[int] = set()

    def resolve(self, spec: str | int) -> RecoveryPoint:
        """The point that a number, a label, "latest" or "oldest" names. VsnapError if none."""
        self._core.need_area()  # Or it might say that there is none.
        points = self._core.points
        text = str(spec)
        if points and text in _WORDS:
            return points[-1] if text == "latest" else points[0]
        if text.isascii() and text.isdigit():
            number = int(text) if len(text) < 20 else -1
            found = [point for point in points if point.number == number]
        else:
            found = [point for point in points if point.label == text]
        if not found:
            existing = (
                f"It has points {points[0].number} to {points[-1].number}."
                if points
                else "It has none."
            )
            raise VsnapError(
                f"volume {self._core.name} has no recovery point {text!r}",
                hint=f"{existing} See 'vsnapfs recovery-point list'.",
                errno=errno.ENOENT,
                code="no-such-point",
            )
        return found[0]

    async def create(self, label: str | None) -> RecoveryPoint:
        """Take a recovery point of this instant. VsnapError when refused, with nothing changed."""
        core, protection = self._core, self._protection
        if label is not None:
            check_label(label)
        async with core.admin.turn("creating a recovery point"):
            protection.require_online("creating a recovery point")
            core.need_area()
            if label is not None and any(point.label == label for point in core.points):
                raise UsageError(f"volume {core.name} already has a recovery point {label!r}")
            number, before = self._next_number(), core.points
            if number > MAX_POINT_NUMBER:
                raise VsnapError(f"volume {core.name} has used up all point numbers")
            self._require_place()
            await self._sync_replica()
            await protection.reserve_number(number)
            try:
                async with core.gate.held(core.config.hold_timeout):
                    with patient_for(core.config.hold_timeout):
                        await self.drained("creating a recovery point")
                    point = await self._take(number, label or "")
            except trio.TooSlowError:
                core.log.log(
                    "volsnap", 8, volume=core.name, reason="writes in flight took too long"
                )
                raise VsnapError(
                    f"volume {core.name}: no recovery point was taken, the writes in flight were "
                    f"not done within {core.config.hold_timeout:g} s",
                    hint="Try again when the disk is less busy.",
                    errno=errno.ETIMEDOUT,
                    code="timeout",
                ) from None
            if any(point.number in self.gone for point in before):
                # Writes need not wait for this; a shrink or restore does, which wants their slots.
                # It is taken, so whoever ends meanwhile says so all the same.
                with trio.CancelScope(shield=True), suppress(MemoryError):
                    async with core.area_lock:
                        await self._tidy(core.need_area())
        # An area from before this point, put back, must look old to the next opening (15). What
        # was saved before the commit cannot say that.
        with suppress(OSError, MemoryError):
            await in_thread(protection.save)
        self._policy.reset()
        core.log.log("vsnapfs", 1010, volume=core.name, point=point.number, label=label)
        core.changed()
        return point

    def _next_number(self) -> int:
        """A number that no point had, nor one whose commit failed and which was then given up."""
        epoch = self._core.need_area().superblock.epoch
        return max(epoch, self._protection.saved.given_up) + 1

    def _require_place(self) -> None:
        """VsnapError if the catalog is full, unless the oldest point is to give way."""
        core = self._core
        if len(core.points) >= MAX_POINTS and core.config.on_full != "evict":
            raise VsnapError(
                f"volume {core.name} already has {MAX_POINTS} recovery points",
                hint="Delete one first: 'vsnapfs recovery-point delete VOLUME oldest'.",
                errno=errno.ENOSPC,
                code="too-many-points",
            )

    async def _take(self, number: int, label: str) -> RecoveryPoint:
        """With writes held and none in flight."""
        core = self._core
        self._protection.require_online("creating a recovery point")
        await self._sync_replica()

        async def commit() -> RecoveryPoint:
            async with core.area_lock:
                self._protection.require_online("creating a recovery point")
                core.need_area().require_sound()  # Or its first copy would be the next failure.
                core.admin.begin()
                point = RecoveryPoint(await self._still_free(number), now_ns(), label)
                # The oldest gives way to this one with the same commit: not for one that never is.
                gone = core.points[:1] if len(core.points) >= MAX_POINTS else ()
                for oldest in gone:
                    known_as = oldest.label or None
                    core.log.log(
                        "volsnap", 58, volume=core.name, point=oldest.number, label=known_as
                    )
                points = (*core.points[len(gone) :], point)
                nothing = BlockSet()
                try:
                    await self._commit_without([p.number for p in gone], points, epoch=point.number)
                finally:
                    # Whatever that ended with, once it counts. Writes are still held: the first one
                    # of the new epoch must find nothing preserved.
                    if core.need_area().superblock.epoch == point.number:
                        core.preserved = nothing
                return point

        return await self._committed(commit(), "no recovery point was taken")

    async def _commit_without(
        self, numbers: list[int], points: tuple[RecoveryPoint, ...], **changes: Any
    ) -> None:
        """Commit a catalog of `points`; who reads one of `numbers` gets ESTALE from then on. The
        caller holds `area_lock`. FaultError.
        """
        core, gone = self._core, self.gone.union(numbers)
        try:
            await core.commit(points=points, **changes)
        finally:
            # Whatever that ended with: without memory a commit may count and fail all the same.
            if core.need_area().superblock.points == points:
                self.gone = gone

    async def _still_free(self, number: int) -> int:
        """`number`, or another one: if all points were given up since it was reserved, it was given
        up with them, and the next opening would drop the point. The caller holds `area_lock`.
        """
        if number <= self._protection.saved.given_up:
            number = self._next_number()
            await self._protection.reserve_number(number)
        return number

    async def drained(self, what: str) -> None:
        """Return when all acknowledged writes are in the replica. VsnapError if they cannot be."""
        try:
            await self._buffer.drain()
        except OSError:
            await self._protection.recorded()
            self._protection.require_online(what)
            raise

    async def _sync_replica(self) -> None:
        await self.drained("creating a recovery point")
        try:
            await self._core.flush_replica()
        except OSError as error:
            await self._protection.replica_sync_failed(error)
            self._protection.require_online("creating a recovery point")

    async def _committed(self, work: Awaitable[T], refusal: str) -> T:
        """Run a commit. VsnapError when it fails, after what the policy makes of that."""
        core = self._core
        try:
            return await work
        except FaultError as error:
            await self._policy.failed(error)
            if not self._protection.is_online:
                raise VsnapError(
                    f"volume {core.name}: {error.message}",
                    hint="'vsnapfs status' shows the fault.",
                    errno=error.errno,
                    exit_code=3,
                    code="fault",
                ) from error
            raise VsnapError(
                f"volume {core.name}: {refusal}: {error.message}",
                hint="It goes on without recovery points. Mend the cause and try again. If the "
                "diff area is lost: 'vsnapfs offline', then 'vsnapfs online "
                "--give-up-recovery-points' starts an empty one.",
                errno=error.errno,
                code="diff-area-failed",
            ) from error

    async def delete(self, number: int, *, force: bool) -> None:
        """Delete a point. BusyError if it is open (unless `force`) or being restored."""
        core, protection = self._core, self._protection
        async with core.admin.turn(f"deleting recovery point {number}"):
            point = self.resolve(number)
            unfinished = core.need_area().superblock.restoring == number
            if unfinished and (protection.restoring or not force):
                raise BusyError(
                    f"recovery point {number} is being restored",
                    hint="'vsnapfs online' goes on with it. With --force it is deleted and the "
                    "replica stays a mixture of two states.",
                )

            def is_free() -> bool:
                if core.open_points.get(number) and not force:
                    raise BusyError(
                        f"recovery point {number} of volume {core.name} is open",
                        hint="Close what reads it, or use --force (its readers then get ESTALE).",
                    )
                return True

            is_free()  # And once more when it is to go.
            work = self.remove([number], wanted=is_free)
            await self._committed(work, f"recovery point {number} could not be deleted")
        core.log.log("vsnapfs", 1011, volume=core.name, point=number, label=point.label or None)
        if unfinished:
            reason = (
                f"the restore of recovery point {number} was given up: the replica is a mixture"
            )
            core.log.log("vsnapfs", 1091, volume=core.name, reason=reason)

    async def remove(
        self,
        numbers: list[int],
        tell: Callable[[], None] | None = None,
        wanted: Callable[[], bool] = lambda: True,
    ) -> None:
        """Delete points durably, then free what only they needed. FaultError 7, 13, 14, 15.

        Asks nobody: eviction comes here from within a write. Nothing if they were gone already.
        wanted: asked once nothing is left to wait for; they stay if it says no, or raises.
        tell: says so, where nobody has asked for it. Called before: a kill in between, or a commit
        that fails, and it is said twice, or too early; it never happens without a word.
        """
        core = self._core
        area = core.need_area()
        async with core.area_lock:
            remaining = tuple(point for point in core.points if point.number not in numbers)
            if len(remaining) == len(core.points) or not wanted():
                return
            restoring = area.superblock.restoring
            core.admin.begin()
            if tell is not None:
                tell()
            restoring = 0 if restoring in numbers else restoring
            await self._commit_without(numbers, remaining, restoring=restoring)
            await self._tidy(area)
        core.changed()

    async def _tidy(self, area: DiffArea) -> None:
        """Forget what only deleted points needed, free its slots. The caller holds `area_lock`.

        Without memory they are gone all the same, and what is kept of them does no harm: blocks are
        preserved that need not be. The next deletion or opening gives the space back.
        """
        live = [point.number for point in self._core.points]

        def work() -> BlockSet:
            area.index.compact(live)
            preserved = BlockSet()
            if live:
                preserved.update(area.index.blocks_since(live[-1]))
            return preserved

        area.zero_spans.clear()  # Some of their slots will be free.
        if area.is_unread:
            return
        with suppress(MemoryError):
            self._core.preserved = await in_thread(work)
            kept = area.index.live_slots(live)
            area.slots.keep_only(kept, also=(*self._room.promised, *area.unknown_slots))

    async def forget_all(
        self, tell: Callable[[list[int]], None], look: Callable[[], None]
    ) -> FaultError | None:
        """Give up every point even if the diff area cannot be written any more. FaultError 13.

        The state file records the loss first: a superblock that could not be changed must not
        bring the points back, their blocks are going to be overwritten without a copy. Nor may one
        copy of it that a failed commit has left behind. Returns why it could not be changed.
        tell: says which points are lost, if there are any, before they are anywhere but recorded
        so: the next opening says it for those that it drops. look: called once nothing is left to
        wait for; raises a FaultError if they are to stay after all.
        """
        core, protection = self._core, self._protection
        area = core.need_area()
        failure: FaultError | None = None
        async with core.area_lock:
            look()
            numbers = [point.number for point in core.points]
            number = max(area.superblock.epoch, protection.saved.epoch)
            if number > protection.saved.given_up:
                await protection.record_given_up(number)
            if numbers:
                tell(numbers)
            try:
                await core.commit(points=(), restoring=0, epoch=number)
            except FaultError as error:
                failure = error
                if area.superblock.clean:
                    # It goes on saying so. A number beyond its epoch tells the next opening that
                    # the replica has been written to all the same.
                    number = area.superblock.epoch + 1
                    if number > protection.saved.given_up:
                        await protection.record_given_up(number)
                # Nothing may be written there any more; without points nothing needs to be, and
                # the first write after a clean opening does not try again.
                area.superblock = replace(
                    area.superblock, points=(), restoring=0, epoch=number, clean=False
                )
            self.gone.update(numbers)
            area.index.compact([])
            core.preserved = BlockSet()
            also = (*self._room.promised, *area.unknown_slots)
            area.zero_spans.clear()
            area.slots.keep_only(area.index.live_slots([]), also=also)
        core.changed()
        return failure
