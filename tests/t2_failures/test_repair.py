"""`repair`: what has a second copy comes back and is told; what has none is told, too."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mutations
import pytest
import trio
from click.testing import CliRunner
from filefuzz import flip, fresh, listing, opened, poke, small_volume
from mutations import LAYOUT
from rig import BLOCK, Rig, raw_replica, write

from vsnapfs.cli.app import app
from vsnapfs.diffarea.layout import SECTOR_SIZE, SUPERBLOCK_SIZE, TABLE_SIZE
from vsnapfs.errors import FaultCode
from vsnapfs.volume import Volume
from vsnapfs.volume.create import create_volume
from vsnapfs.volume.statefile import COPY_SIZE


@pytest.fixture
def small() -> Rig:
    return small_volume()


@pytest.fixture
def vol(tmp_path: Path) -> Path:
    directory = tmp_path / "vol"
    create_volume(directory, size=40_000, diff_area_size=384 << 10, block_size=BLOCK)
    return directory


Damage = Callable[[Rig], None]


def _cut_tail(rig: Rig) -> None:
    for pages in (rig.host.files["area"].cache, rig.host.files["area"].disk):
        pages.resize(pages.size - 1000)


def _longer(rig: Rig) -> None:
    for pages in (rig.host.files["area"].cache, rig.host.files["area"].disk):
        pages.resize(pages.size + 10 * BLOCK + 1)


def _no_state(rig: Rig) -> None:
    for pages in (rig.host.files["state"].cache, rig.host.files["state"].disk):
        pages.resize(0)


DAMAGES: dict[str, tuple[Damage, str]] = {
    "superblock 0": (lambda rig: poke(rig, "area", 0, bytes(SUPERBLOCK_SIZE)), "superblock"),
    "superblock 1": (lambda rig: flip(rig, "area", 65536 + 4100, 2), "superblock"),
    "table": (lambda rig: poke(rig, "area", 131072, bytes(TABLE_SIZE)), "descriptor sector"),
    "twin": (
        lambda rig: poke(rig, "area", LAYOUT.table_offsets(0)[1], b"\xff" * 900),
        "descriptor sector",
    ),
    "state copy": (lambda rig: flip(rig, "state", COPY_SIZE + 60, 0), "state file"),
    "state file": (_no_state, "state file"),
    "too long": (_longer, "diff area"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_repair_brings_back_and_tells(small: Rig, name: str) -> None:
    """Each thing with a second copy is brought back, told once with what was done, and stays."""
    damage, what = DAMAGES[name]
    rig = fresh(small)
    damage(rig)

    async def repair(volume: Volume) -> None:
        report = await volume.repair()
        assert report["ok"], report
        assert not report["beyond_repair"]
        assert {finding["what"] for finding in report["found"]} == {what}
        assert all(finding["done"] and finding["action"] for finding in report["found"])

    rig.run(repair)
    rig.close()
    rig = fresh(rig)

    async def nothing(volume: Volume) -> None:
        assert (await volume.verify())["ok"]
        assert not (await volume.repair())["found"]
        assert volume.status()["state"] == "online"
        assert len(volume.points) == 3

    rig.run(nothing)


@pytest.mark.parametrize("name", DAMAGES)
def test_repair_works_while_the_volume_is_open(small: Rig, name: str) -> None:
    """The same damage done under an open volume: found now, mended now; a dry run only tells."""
    damage, what = DAMAGES[name]
    rig = fresh(small)

    async def repair(volume: Volume) -> None:
        volume.account = type(volume.account)(volume.account.opened)
        damage(rig)
        before = {n: f.cache.read(0, f.cache.size) for n, f in rig.host.files.items()}
        dry = await volume.repair(dry_run=True)
        assert {finding["what"] for finding in dry["found"]} == {what}
        assert not any(finding["done"] for finding in dry["found"])
        assert before == {n: f.cache.read(0, f.cache.size) for n, f in rig.host.files.items()}
        report = await volume.repair()
        assert report["ok"], report
        assert {finding["what"] for finding in report["found"]} == {what}
        assert all(finding["done"] for finding in report["found"])
        assert (await volume.verify())["ok"]
        assert not (await volume.repair())["found"]

    rig.run(repair)


def test_a_copy_comes_back_from_a_replica_that_has_not_changed(small: Rig) -> None:
    """A rotted copy of what the replica still holds is copied once more; others are told."""
    rig = fresh(small)

    async def act(volume: Volume) -> None:
        point = await volume.create_point("last")
        old = raw_replica(rig)[:BLOCK]
        await write(volume, 0, old)  # preserved, and the same once more
        await write(volume, BLOCK, b"changed")
        area = volume.core.need_area()
        for block in (0, 1):
            found = area.index.lookup(point.number, block)
            assert found is not None
            flip(rig, "area", LAYOUT.slot_offset(found[1]) + 9, 3)
        report = await volume.repair()
        (mended,) = report["found"]
        assert mended["block"] == 0
        assert "replica" in mended["action"]
        (lost,) = report["beyond_repair"]
        assert (lost["points"], lost["ranges"]) == ([3, point.number], [[BLOCK, BLOCK]])
        handle = volume.open_point(point.number)
        assert bytes(await handle.read(0, BLOCK)) == old
        handle.close()

    rig.run(act)


def test_a_sector_lost_while_open_comes_back_from_memory(small: Rig) -> None:
    """Both copies of a sector rot under an open volume: memory says which blocks have copies."""
    rig = fresh(small)

    async def act(volume: Volume) -> None:
        area = volume.core.need_area()
        await write(volume, 0, b"x")
        for sector in (0, 5):
            area._sectors.pop(sector, None)
            for offset in LAYOUT.sector_offsets(sector):
                poke(rig, "area", offset, b"\xff" * SECTOR_SIZE)
        report = await volume.repair()
        assert [f["sector"] for f in report["found"]] == [0, 5]
        # Sector 0 described copies whose checksums only it knew; sector 5 described nothing.
        assert {problem["what"] for problem in report["beyond_repair"]} == {"preserved block"}

    rig.run(act)
    rig.close()

    async def look(volume: Volume) -> None:
        assert volume.status()["fault"] is None
        handle = volume.open_point(3)
        # Never copied since point 3: reads from the replica as before.
        assert bytes(await handle.read(5 * BLOCK, 100)) == raw_replica(rig)[5 * BLOCK :]
        with pytest.raises(OSError):
            await handle.read(4 * BLOCK, BLOCK)
        handle.close()

    fresh(rig).run(look)


def test_leftovers_of_a_shrink_are_cleared(small: Rig) -> None:
    """A copy described twice, and one described beyond the end, come to no life after a growth."""
    rig = fresh(small)

    async def act(volume: Volume) -> None:
        area = volume.core.need_area()
        first = area.descriptor_of(0)
        count = len(area.slots)
        await trio.lowlevel.checkpoint()
        area.barrier({count - 1: first, count + 3: first})
        report = await volume.repair()
        assert report["ok"]
        assert [finding["what"] for finding in report["found"]] == ["descriptors"] * 2
        assert area.descriptor_of(count - 1) is None
        assert area.descriptor_of(count + 3) is None
        assert area.descriptor_of(0) == first
        assert not (await volume.repair())["found"]

    rig.run(act)


def test_a_torn_tail_is_reserved_again(small: Rig) -> None:
    """A file cut short within its last slots: fault 3, the space comes back, then `online` does."""
    rig = fresh(small)
    _cut_tail(rig)

    async def repair(volume: Volume) -> None:
        assert volume.status()["fault"]["code"] == FaultCode.META_DATA_CORRUPTION
        report = await volume.repair()
        assert report["ok"]
        assert report["state"] == "offline"
        assert "reserved again" in report["found"][0]["action"]
        await volume.online()
        assert (await volume.verify())["ok"]

    rig.run(repair)


def test_an_interrupted_restore_is_continued_and_told() -> None:
    """Opening for a repair goes on with a restore; a dry run says so and leaves all as it was."""
    base = mutations._build("restoring", end="restoring")
    rig = base.rig.on(base.host())
    report = rig.run(Volume.repair)
    (told,) = [finding for finding in report["found"] if finding["what"] == "restore"]
    assert told["done"]
    assert "continued" in told["action"]
    assert raw_replica(rig) == base.contents[min(base.contents)]


def test_a_dry_run_leaves_no_trace(vol: Path) -> None:
    """Damage, also such as opening alone would heal: a dry run tells of it and writes nothing."""
    area = bytearray((vol / "diff-area").read_bytes())
    area[100] ^= 1
    area[131072 + 600] ^= 1
    (vol / "diff-area").write_bytes(bytes(area) + b"tail")
    (vol / "state").unlink()
    before = listing(vol)

    async def dry(volume: Volume) -> dict[str, Any]:
        return await volume.repair(dry_run=True)

    report = trio.run(lambda: opened(vol, dry, dry_run=True))
    assert listing(vol) == before
    assert report["ok"]
    assert report["dry_run"]
    kinds = {"superblock", "descriptor sector", "diff area", "state file"}
    assert {finding["what"] for finding in report["found"]} == kinds
    assert not any(finding["done"] for finding in report["found"])
    report = trio.run(lambda: opened(vol, Volume.repair))
    assert report["ok"]
    assert all(finding["done"] for finding in report["found"])
    assert (vol / "diff-area").stat().st_size == 384 << 10
    assert (vol / "state").stat().st_mode & 0o777 == 0o600


def command(*args: object) -> Any:
    return CliRunner().invoke(app, [str(arg) for arg in args])


def test_the_command_tells_and_exits_by_what_is_left(vol: Path) -> None:
    """`repair`: 0 and nothing, 0 and what was done, 5 and whom it hits, 1 when it cannot run."""
    assert command("repair", vol).output == f"{vol}: nothing to repair\n"

    async def fill(volume: Volume) -> None:
        await write(volume, 0, b"content" * 2000)
        await volume.create_point("one")
        await write(volume, 0, b"changed" * 2000)

    trio.run(lambda: opened(vol, fill))
    raw = bytearray((vol / "diff-area").read_bytes())
    raw[65536 + 9] ^= 1
    (vol / "diff-area").write_bytes(raw)
    before = listing(vol)
    dry = command("repair", "--dry-run", vol)
    assert (dry.exit_code, listing(vol)) == (0, before)
    assert "1 thing to repair (nothing was written)" in dry.output
    result = command("repair", vol)
    assert result.exit_code == 0
    assert "repaired  written anew from the other copy" in result.output
    assert command("verify", vol).exit_code == 0

    raw = bytearray((vol / "diff-area").read_bytes())
    raw[LAYOUT.slot_offset(0) + 3] ^= 1
    (vol / "diff-area").write_bytes(raw)
    result = command("repair", vol)
    assert result.exit_code == 5
    assert "beyond repair" in result.output
    assert "points" in result.output
    assert "0 to 4095" in result.output
    told = json.loads(command("repair", vol, "--json").output)
    assert not told["ok"]
    (problem,) = told["beyond_repair"]
    assert (problem["points"], problem["ranges"]) == ([1], [[0, BLOCK]])

    (vol / "volume.toml").write_bytes(b"rotted")
    assert command("repair", vol).exit_code == 1
