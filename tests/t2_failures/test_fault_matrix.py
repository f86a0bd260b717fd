"""The fault matrix is complete, true to its tests, and what docs/faults.md says.

And the rows that no mounted test has: causes that the kernel does not give on demand are injected
into the simulated disk, under the same demands as for all others. Whatever the cause: the right
fault and event, the write refused with ENODEV and nothing moved, every point exact, offline also
after a power failure, and the way out of the table works.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Callable
from typing import Any

import fault_matrix
import pytest
from fault_matrix import FAULTS, OTHERS, Row
from powercuts import nothing_kept
from rig import (
    BLOCK,
    Rig,
    attempt,
    flush,
    pattern,
    raw_replica,
    read_points,
    read_replica,
    write,
)
from simdisk import FOREVER, SimBacking

from vsnapfs.diffarea.layout import Layout
from vsnapfs.errors import FaultCode, VsnapError
from vsnapfs.volume import Volume

SIZE = 9 * BLOCK + 700
ROWS = [pytest.param(row, id=row.test.rpartition("::")[2]) for row in (*FAULTS, *OTHERS)]


# --- the table -----------------------------------------------------------------------------------


def test_every_fault_has_its_rows_and_events() -> None:
    """Faults 1 to 15, in order, each with the event 79 more, and no row twice."""
    assert sorted({row.fault for row in FAULTS}) == list(range(1, 16))
    assert [row.fault for row in FAULTS] == sorted(row.fault for row in FAULTS)
    assert all(row.event == FaultCode(row.fault).event_id for row in FAULTS)
    tests = [row.test for row in (*FAULTS, *OTHERS)]
    assert len(set(tests)) == len(tests), "one test a row"
    assert all(row.injected == (row.test.startswith(fault_matrix.HERE)) for row in FAULTS[5:])


@pytest.mark.parametrize("row", ROWS)
def test_each_row_is_a_test_that_speaks_of_it(row: Row) -> None:
    """The test named exists, says what it shows, and looks for that fault and its event."""
    source = fault_matrix.source_of(row.test)
    assert re.search(r'\n    """.+', source), "no docstring"
    if row.fault:
        ways = ("is_offline_by(rig, {})", "fault() == {}", "went_down({})")
        said = "|".join(re.escape(way.format(row.fault)) for way in ways)
        said += rf"|\b{row.event}\b"
    else:
        said = rf"\b{row.event}\b"
    if row.event != 1042:  # Every remount there goes through a helper that looks for it.
        assert re.search(said, source), f"nothing in {row.test} speaks of event {row.event}"


def test_the_page_is_the_table() -> None:
    """docs/faults.md holds the tables as they are now (python tests/fault_matrix.py writes it)."""
    page = fault_matrix.PAGE.read_text(encoding="utf-8")
    assert page == fault_matrix.with_tables(page)
    for row in (*FAULTS, *OTHERS):
        assert page.count(row.cause) >= 1


def test_a_row_without_its_test_is_found() -> None:
    """That the checks above can fail: no such test, no such parameter, another page."""
    for test in ("::test_nothing", "::test_an_exception_in_the_copy_path[no such]"):
        with pytest.raises(KeyError):
            fault_matrix.source_of(fault_matrix.HERE.rstrip(":") + test)
    page = fault_matrix.PAGE.read_text(encoding="utf-8").replace("| 87 |", "| 88 |")
    assert page != fault_matrix.with_tables(page)


# --- rows of their own ---------------------------------------------------------------------------


class Story:
    """A volume with two points, both of which have copies, and what they hold."""

    def __init__(self, **how: Any) -> None:
        self.rig = Rig(size=SIZE, **how)
        self.points: dict[int, bytes] = {}
        self.rig.run(self._begin)

    async def _begin(self, volume: Volume) -> None:
        await write(volume, 0, pattern(1, SIZE))
        for turn in (2, 3):
            number = (await volume.create_point()).number
            self.points[number] = await read_replica(volume)
            await write(volume, turn * BLOCK + 5, pattern(turn, BLOCK))
        await flush(volume)

    def refused(self, code: int = errno.ENODEV) -> None:
        """A write over several blocks is refused, and not one byte has moved (W1)."""
        before = raw_replica(self.rig)

        async def refuse(volume: Volume) -> None:
            error = await attempt(write(volume, BLOCK // 2, pattern(9, 6 * BLOCK)))
            assert error is not None
            assert error.errno == code

        self.rig.run(refuse)
        assert raw_replica(self.rig) == before

    def went_down(self, fault: int) -> dict[str, Any]:
        """Offline by this fault, now and after a power failure; its event's parameters."""
        for _ in range(2):

            async def look(volume: Volume) -> None:
                volume.check_invariants()
                found = volume.protection.fault
                assert found is not None
                assert found.code == fault
                for work in (read_replica(volume), flush(volume), write(volume, 0, b"x")):
                    error = await attempt(work)
                    assert error is not None
                    assert error.errno == errno.ENODEV
                with pytest.raises(VsnapError, match="offline"):
                    await volume.create_point()

            self.rig.run(look)
            self.rig.host.failures.clear()
            self.rig.host.hooks.clear()
            self.rig.crashed(nothing_kept)
        params = self.rig.log.params(79 + fault)
        assert params["fault"] == fault
        assert params["fault_name"] == FaultCode(fault).name
        return params

    def exact(self) -> None:
        """Every point, bit by bit."""

        async def look(volume: Volume) -> None:
            assert await read_points(volume) == self.points
            assert (await volume.verify())["ok"]

        self.rig.run(look)

    def comes_back(self) -> None:
        """`online`; writes, a new point, and all points exact over both."""

        async def back(volume: Volume) -> None:
            await volume.online()
            content = await read_replica(volume)
            self.points[(await volume.create_point()).number] = content
            await write(volume, 0, pattern(77, SIZE))
            assert await read_replica(volume) == pattern(77, SIZE)

        self.rig.run(back)
        self.exact()
        self.rig.close()
        self.exact()

    def when(self, name: str, operation: str, error: Callable[[], BaseException]) -> None:
        """From now on `operation` on a file raises, until `went_down` or the end."""

        def hook(backing: SimBacking, what: str, _offset: int, _length: int) -> None:
            if (backing.name, what) == (name, operation):
                raise error()

        self.rig.host.hooks.append(hook)


@pytest.mark.parametrize(
    ("what", "fault"),
    [("no memory", 4), ("unplanned", 11)],
    ids=["no memory", "unplanned"],
)
def test_an_exception_in_the_copy_path(what: str, fault: int) -> None:
    """MemoryError is fault 4 (event 83), anything unplanned fault 11 (90): no point pays for it."""
    story = Story()
    error = MemoryError() if what == "no memory" else ZeroDivisionError("nobody planned for it")
    story.when("area", "write", lambda: error)
    story.refused()
    params = story.went_down(fault)
    assert params["errno"] == (errno.ENOMEM if fault == 4 else errno.EIO)
    assert params["used"] <= params["allocated"] <= params["maximum"]
    assert (params["offset"], params["length"]) == (BLOCK // 2, 6 * BLOCK)
    story.exact()
    story.comes_back()


def test_a_fault_is_written_down_without_memory_for_the_state_file() -> None:
    """P1: MemoryError on the way to the state file: refused all the same, the superblock has it."""
    story = Story()
    story.rig.host.fail("area", "write", errno.EIO)
    story.when("state", "write", MemoryError)
    story.refused()
    story.went_down(7)
    story.exact()
    story.comes_back()


def test_no_memory_for_the_index() -> None:
    """MemoryError when the area is opened is fault 4 (event 83); with memory, online works."""
    story = Story()
    story.rig.close()
    story.when("area", "read", MemoryError)
    story.rig.volume = story.rig.trio_run(lambda: story.rig.open(mountpoint="/mnt"))
    story.refused()
    assert story.rig.log.params(83)["errno"] == errno.ENOMEM
    story.went_down(4)
    story.exact()
    story.comes_back()


def test_the_barrier_s_sync_fails() -> None:
    """Fault 7 (event 86): copies that are not durable do not count; no byte is overwritten."""
    story = Story()
    story.rig.host.fail("area", "sync", errno.EIO, times=FOREVER)
    story.refused()
    params = story.went_down(7)
    assert params["errno"] == errno.EIO
    story.exact()
    story.comes_back()


def test_a_restore_is_interrupted() -> None:
    """Fault 13 (event 92): a mixture is never served; `online` goes on with the restore (65)."""
    story = Story()
    story.rig.host.fail("replica", "write", errno.EIO, nth=2)

    async def restore(volume: Volume) -> None:
        with pytest.raises(VsnapError, match="interrupted") as caught:
            await volume.restore(1)
        assert caught.value.exit_code == 3

    story.rig.run(restore)
    story.went_down(13)
    story.exact()

    async def goes_on(volume: Volume) -> None:
        await volume.online()
        assert await read_replica(volume) == story.points[1]
        assert [number for number in story.rig.log.ids() if number in (64, 65, 66)] == [64, 65, 66]
        await volume.go_offline()

    story.rig.run(goes_on)
    story.comes_back()


def test_both_copies_of_a_descriptor_sector_are_bad() -> None:
    """Fault 3 (event 82): what could depend on the sector is EIO, never wrong; giving up helps."""
    story = Story()
    story.rig.close()
    area = story.rig.host.files["area"]
    for offset in Layout(BLOCK).sector_offsets(0):
        for pages in (area.cache, area.disk):
            byte = pages.read(offset + 40, 1)[0]
            pages.write(offset + 40, bytes((byte ^ 0xFF,)))
    story.refused()
    story.went_down(3)
    _exact_or_eio(story, must_fail=True)

    async def no_way(volume: Volume) -> None:
        with pytest.raises(VsnapError, match="damaged beyond repair"):
            await volume.online()
        # The replica itself is whole.
        assert raw_replica(story.rig)[: 2 * BLOCK] == pattern(1, SIZE)[: 2 * BLOCK]

    story.rig.run(no_way)


def test_descriptor_sectors_that_could_not_be_read_for_a_while() -> None:
    """Fault 3 as well. They are there once it is opened anew, which comes before giving up."""
    story = Story()
    story.rig.close()
    table = Layout(BLOCK).sector_offsets(0)[0]

    def lost(backing: SimBacking, operation: str, offset: int, _length: int) -> None:
        if backing.name == "area" and operation == "read" and offset >= table:
            raise OSError(errno.EIO, "the disk does not answer")

    async def answers_again(volume: Volume) -> None:
        assert volume.protection.fault is not None
        assert volume.protection.fault.code == 3
        story.rig.host.hooks.clear()
        with pytest.raises(VsnapError) as caught:
            await volume.online()
        assert caught.value.hint.startswith("Unmount the volume and mount it again")

    async def online(volume: Volume) -> None:
        await volume.online()
        assert await read_points(volume) == story.points

    story.rig.host.hooks.append(lost)
    story.rig.run(answers_again)
    story.rig.close()
    story.rig.run(online)


def test_a_diff_area_that_was_cut_off() -> None:
    """Fault 3 (event 82) by truncation: what was cut off is EIO, the rest of the points exact."""
    story = Story()
    story.rig.close()
    area = story.rig.host.files["area"]
    end = Layout(BLOCK).slot_offset(1)  # The first slot stays.
    for pages in (area.cache, area.disk):
        pages.resize(end)
    story.refused()
    story.went_down(3)
    _exact_or_eio(story, must_fail=True)


def _exact_or_eio(story: Story, *, must_fail: bool) -> None:
    """Each block of each point is exact or EIO."""
    failed: list[tuple[int, int]] = []

    async def look(volume: Volume) -> None:
        for number, content in story.points.items():
            handle = volume.open_point(number)
            for offset in range(0, SIZE, BLOCK):
                try:
                    found = bytes(await handle.read(offset, BLOCK))
                except OSError as error:
                    assert error.errno == errno.EIO  # noqa: PT017
                    failed.append((number, offset))
                else:
                    assert found == content[offset : offset + BLOCK]
            handle.close()

    story.rig.run(look)
    assert bool(failed) == must_fail


def test_taken_offline_by_hand() -> None:
    """No fault (event 1020), but refused like after one, by all handles and after a power cut."""
    story = Story()

    async def by_hand(volume: Volume) -> None:
        handle = volume.open_replica()
        await volume.go_offline()
        assert volume.protection.fault is None
        for work in (handle.read(0, 1), handle.write(0, b"x"), handle.flush()):
            error = await attempt(work)
            assert error is not None
            assert error.errno == errno.ENODEV
        handle.close()

    story.rig.run(by_hand)
    assert story.rig.log.ids("vsnapfs")[-1] == 1020
    story.exact()
    story.rig.crashed(nothing_kept)
    story.refused()
    story.exact()
    story.comes_back()
