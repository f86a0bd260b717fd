"""Running operations on a volume while keeping account of what must be there.

Owns the model. A `Play` opens a volume on the simulated disk and offers operations (`write`,
`create`, …). Each says what it has been answered, and from that, afterwards, what a power failure
*during* it may have left: of a refused write nothing, of a write under way any of its sectors, of
a point being created all of it or nothing. The states of the disk recorded during an operation
share one `Span`, filled in when the operation has been answered.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import replace

import trio
from rig import BLOCK, Rig, acknowledged, attempt, flush, pattern, raw_replica, read_point, write
from simdisk import FOREVER, PowerLoss
from unsynced import SECTOR, overwritten, sectors_of

from vsnapfs.volume import Volume

from .expected import Expected, Span, State, kept, without


class Play:
    """A workload being run. `label` numbers its writes, so that no two write the same bytes."""

    def __init__(self, rig: Rig, nursery: trio.Nursery) -> None:
        self.rig = rig
        self.volume: Volume
        self._nursery = nursery
        self.content = bytearray(raw_replica(rig))
        self.points: dict[int, bytes] = {}
        self.counter = 0
        self.states: list[State] = []
        self.expected = Expected()
        self.span = Span()
        self._is_lossy = False

    # -- opening, closing ---------------------------------------------------------------------

    async def start(self) -> None:
        """Open the volume. What is expected must have been set."""
        self.volume = await self.rig.open()
        await self._nursery.start(self._run, self.volume)

    @staticmethod
    async def _run(volume: Volume, *, task_status: trio.TaskStatus[None]) -> None:
        try:
            await volume.run(task_status=task_status)
        except* PowerLoss:
            pass  # It was killed.

    async def begin(self, before: Play | None = None) -> None:
        """Open a volume that was closed cleanly, or left as `before` says."""
        content = bytes(self.content)
        if before is None:
            await self.start()
            self.expected = Expected(
                sectors=sectors_of(content),
                exact=sectors_of(content),
                maxima=frozenset([self.volume.core.need_area().maximum]),
            )
        else:
            self.points, self.counter = dict(before.points), before.counter
            self.content = bytearray(before.content)
            self.expected = before.expected
            await self.start()

    def record(self) -> None:
        """Remember every state of the disk from now on."""
        self.rig.host.observer = self._observe

    def _observe(self, last: tuple[str, int] | None) -> None:
        self.states.append((self.rig.host.snapshot(), self.span, last))

    async def _during(self, work: Callable[[], Awaitable[None]]) -> BaseException | None:
        """Run one operation in a span of its own; its error if it is one the engine may raise."""
        # Nothing has changed on the disk yet, and nothing less is expected than before: what is
        # there now has been looked at.
        self.span = Span()
        return await attempt(work())

    def _answered(self, during: Expected, after: Expected, spans: Sequence[Span] = ()) -> None:
        """The operation has been answered: `during` holds for all its states, `after` from now.

        spans: of instants during it, of which what is expected but for the points is known.
        """
        volume = self.volume
        gone = self._given_up()
        if gone:
            for span in spans:
                span.expected = without(span.expected, gone)
            during = without(during, gone)
        area = volume.core.need_area()
        fault = volume.protection.fault
        offline = not volume.protection.is_online
        number = int(fault.code) if fault and offline else None
        after = replace(
            after,
            must=dict(self.points),
            may={},
            offline=offline,
            fault=number,
            maxima=frozenset([area.maximum]),
        )
        if area.in_doubt:
            # Nothing has settled it since: what was being done may have been done, or not.
            after = replace(after, maxima=after.maxima | during.maxima)
            # Points that were given up are, even if a commit failed half way meanwhile.
            if not gone:
                after = replace(after, must=during.must, may=during.may)
        if offline != self.expected.offline or number != self.expected.fault:
            during = replace(during, offline=None, fault=None)
        self.span.expected = replace(during, maxima=during.maxima | after.maxima)
        self.expected = after
        self.span = Span()
        self.span.expected = after
        if self.rig.host.observer is not None:
            self._observe(None)

    def _same(self) -> Expected:
        """What is expected if nothing happens."""
        if self.volume.core.need_area().in_doubt:
            return self.expected
        return replace(self.expected, must=dict(self.points), may={})

    # -- data ---------------------------------------------------------------------------------

    async def write(
        self, *ranges: tuple[int, int], durably: bool = False
    ) -> list[BaseException | None]:
        """Write to (offset, length) ranges that do not overlap, all at once. durably: through
        handles with O_DSYNC, so each is there from the instant of its own answer on.
        """
        before = self._same()
        jobs = []
        for offset, length in ranges:
            self.counter += 1
            jobs.append((offset, pattern(self.counter, length)))
        errors: list[BaseException | None] = [None] * len(jobs)
        answered: list[tuple[int, bytes]] = []
        spans: list[tuple[Span, int]] = []

        async def one(which: int) -> None:
            for _ in range(which if durably else 0):  # One after the other: syncs are shared.
                await trio.lowlevel.checkpoint()
            errors[which] = await attempt(write(self.volume, *jobs[which], durably=durably))
            if durably and errors[which] is None:
                answered.append(jobs[which])
                span = Span()
                spans.append((span, len(answered)))
                if self.rig.host.observer is not None:
                    self.states.append((self.rig.host.snapshot(), span, None))

        async def work() -> None:
            if len(jobs) == 1:
                await one(0)
                return
            async with trio.open_nursery() as nursery:
                for which in range(len(jobs)):
                    nursery.start_soon(one, which)

        assert await self._during(work) is None
        during = before
        for (offset, data), error in zip(jobs, errors, strict=True):
            if error is not None:
                assert error.errno == errno.ENODEV, error  # type: ignore[attr-defined]
                # Of a write that was refused no byte may have reached the disk (W1), but if only
                # its flush was (O_DSYNC), it may be there.
                there = acknowledged(self.rig, self.volume)[offset : offset + len(data)]
                if not durably or there != data:
                    continue
            during = replace(
                during,
                sectors=overwritten(during.sectors, offset, data),
                exact=overwritten(during.exact, offset, data),
            )
            self.content[offset : offset + len(data)] = data
        after = replace(during, exact=before.exact)
        for span, count in spans:
            after = replace(after, sectors=kept(during.sectors, answered[:count]))
            span.expected = replace(during, sectors=after.sectors, offline=None, fault=None)
        if not self._is_lossy:
            after = replace(after, exact=sectors_of(bytes(self.content)))
        self._answered(during, after, spans=[span for span, _ in spans])
        return errors

    async def carry_out(self) -> None:
        """What was acknowledged is carried out: nothing that anybody sees changes by that. (If it
        cannot be, the volume is offline.)
        """
        before = self._same()
        error = await self._during(self.volume.buffer.drain)
        assert error is None or not self.is_online, error
        self._answered(before, before)

    async def flush(self) -> BaseException | None:
        """Flush through a handle."""
        before = self._same()
        was_online = self.is_online
        error = await self._during(lambda: flush(self.volume))
        after = before if error else replace(before, sectors=sectors_of(bytes(self.content)))
        if error is not None and was_online:
            # The host has forgotten what it could not write; nobody knows what that was.
            self._is_lossy = True
            before = after = replace(before, exact=before.sectors)
        self._answered(before, after)
        return error

    def _read_again(self, before: Expected) -> Expected:
        """After a failed flush, what the disk turns out to hold is what there is from now on."""
        if not self._is_lossy:
            return before
        self._is_lossy = False
        self.content = bytearray(raw_replica(self.rig))
        found = sectors_of(bytes(self.content))
        for place, sector in enumerate(found):
            is_known = sector.newest in before.sectors[place]
            assert is_known, f"W4: sector {place} after a failed flush"
        return replace(before, sectors=found, exact=found)

    # -- administration -----------------------------------------------------------------------

    async def create(self) -> BaseException | None:
        """Take a recovery point."""
        before = self._same()
        number = self.volume.points_service._next_number()
        assert number > before.newest
        content = bytes(self.content)

        async def work() -> None:
            assert (await self.volume.create_point()).number == number

        error = await self._during(work)
        after = before
        if error is None:
            self.points[number] = content
            after = replace(before, sectors=sectors_of(content), newest=number)
        self._answered(replace(before, may={number: content}), after)
        return error

    def _given_up(self) -> dict[int, bytes]:
        """Points that policy evict has given up meanwhile, taken out of the account."""
        live = {point.number for point in self.volume.points}
        gone = {n: content for n, content in self.points.items() if n not in live}
        assert not gone or self.rig.config.on_full == "evict", f"points {set(gone)} are gone"
        assert not gone or not live or max(gone) < min(live), "a younger point was evicted first"
        for number in gone:
            del self.points[number]
        assert set(self.points) == live
        return gone

    async def delete(self, number: int) -> BaseException | None:
        """Delete a recovery point."""
        before = self._same()
        must = dict(before.must)
        content = must.pop(number, self.points[number])
        error = await self._during(lambda: self.volume.delete_point(number))
        if error is None:
            del self.points[number]
        self._answered(replace(before, must=must, may={number: content}), before)
        return error

    async def restore(self, number: int) -> BaseException | None:
        """Bring the replica back to a point."""
        before = self._same()
        content = self.points[number]

        async def work() -> None:
            await self.volume.restore(number)

        error = await self._during(work)
        after = before
        if error is None:
            self.content = bytearray(content)
            after = replace(
                before, sectors=sectors_of(content), exact=sectors_of(content), restored=None
            )
        elif self.volume.core.need_area().superblock.restoring:
            after = replace(before, restored=content)
        during = replace(before, restored=content)
        self._answered(during, after)
        return error

    async def resize(self, total: int) -> BaseException | None:
        """Set the diff area's maximum."""
        before = self._same()
        error = await self._during(lambda: self.volume.resize(total))
        self._answered(replace(before, maxima=before.maxima | {total}), before)
        return error

    async def offline(self) -> None:
        """Take the volume offline by hand."""
        before = self._same()
        assert await self._during(self.volume.go_offline) is None
        assert not self.volume.protection.is_online
        self._answered(before, before)

    async def online(self) -> BaseException | None:
        """Bring the volume online; a restore that was interrupted goes on."""
        before = self._same()
        restoring = self.volume.core.need_area().superblock.restoring

        async def work() -> None:
            await self.volume.online()

        error = await self._during(work)
        after = before
        if error is None and restoring:
            content = self.points[restoring]
            self.content = bytearray(content)
            after = replace(
                before, sectors=sectors_of(content), exact=sectors_of(content), restored=None
            )
        if error is None:
            after = self._read_again(after)
        self._answered(before, after)
        return error

    async def create_while_writing(self, *ranges: tuple[int, int, int]) -> None:
        """Take a recovery point while writes are in flight: each of them is in it, or is not.

        ranges: (offset, length, after so many passes of the scheduler).
        """
        before = self._same()
        number = self.volume.core.need_area().superblock.epoch + 1
        jobs = []
        for offset, length, passes in ranges:
            self.counter += 1
            jobs.append((offset, pattern(self.counter, length), passes))
        errors: list[BaseException | None] = []

        async def one(offset: int, data: bytes, passes: int) -> None:
            for _ in range(passes):
                await trio.lowlevel.checkpoint()
            errors.append(await attempt(write(self.volume, offset, data)))

        async def create() -> None:
            await self.volume.create_point()

        async def work() -> None:
            async with trio.open_nursery() as nursery:
                for job in jobs:
                    nursery.start_soon(one, *job)
                errors.append(await attempt(create()))

        assert await self._during(work) is None
        assert errors == [None] * (len(jobs) + 1), errors
        during = before
        for offset, data, _ in jobs:
            during = replace(
                during,
                sectors=overwritten(during.sectors, offset, data),
                exact=overwritten(during.exact, offset, data),
            )
            self.content[offset : offset + len(data)] = data
        found = await read_point(self.volume, number)
        for place, allowed in enumerate(during.exact):
            assert found[place * SECTOR : (place + 1) * SECTOR] in allowed, f"sector {place}"
        self.points[number] = found
        after = replace(during, exact=sectors_of(bytes(self.content)), newest=number)
        self._answered(replace(during, may={**during.may, number: found}), after)

    @contextlib.contextmanager
    def failing_syncs(self, name: str, *, nth: int = 1, for_good: bool = False) -> Iterator[None]:
        """The nth sync of a file fails (for good: all from then on), having done half of it."""
        times = FOREVER if for_good else 1
        failures = self.rig.host.failures
        self.rig.host.fail(name, "sync", errno.EIO, nth=nth, times=times, partly=True)
        try:
            yield
        finally:
            failures.clear()

    # -- ends ---------------------------------------------------------------------------------

    async def reopen(self) -> None:
        """Close cleanly and open again."""
        before = self._same()
        assert await self._during(self.volume.close) is None
        flushed = self.volume.core.need_area().superblock.clean
        after = replace(before, sectors=sectors_of(bytes(self.content))) if flushed else before
        self._answered(before, after)
        await self._go_on()

    async def kill(self) -> None:
        """SIGKILL between two operations, and a new start."""
        observer = self.rig.host.observer
        self.rig.host = self.rig.host.kill()
        self.rig.host.observer = observer
        # Should the old process do one step more, it changes nothing that the new one sees.
        memory = self.rig.host.memory
        self.rig.host.memory = {ring: bytearray(memory[ring]) for ring in memory}
        await self._go_on()

    async def _go_on(self) -> None:
        """A new process on the host that is left. Nothing is answered by it, so nothing changes."""
        before = self.expected
        self.span = Span()
        await self.start()
        after = before
        if before.restored is not None and not self.volume.core.need_area().superblock.restoring:
            self.content = bytearray(before.restored)
            exactly = sectors_of(before.restored)
            after = replace(before, sectors=exactly, exact=exactly, restored=None)
        self._answered(before, self._read_again(after))
        self.check()

    def check(self) -> None:
        """What the volume says of itself is what is known."""
        self.volume.check_invariants()
        live = {point.number for point in self.volume.points}
        assert live == set(self.points), f"points {live}, not {set(self.points)}"

    # -- for workloads ------------------------------------------------------------------------

    @property
    def is_online(self) -> bool:
        """Whether writes can pass."""
        return self.volume.protection.is_online

    def length_of(self, first: int, count: int) -> int:
        """Bytes of blocks `first` … `first + count - 1`, a short last one included."""
        return min(count * BLOCK, len(self.content) - first * BLOCK)
