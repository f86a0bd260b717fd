"""Hostile files: mutated, cut, forged, old; what reads, what `verify` and `repair` say."""

from __future__ import annotations

import errno
import json
import os
import struct
import tomllib
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest import mock

import chance
import filefuzz
import mutations
import numpy as np
import pytest
import trio
from filefuzz import flip, fresh, opened, poke, small_volume
from hypothesis import given
from hypothesis import strategies as st
from mutations import LAYOUT, Base
from rig import BLOCK, Rig, pattern, raw_replica, read_point, write

from vsnapfs import config
from vsnapfs.diffarea import area as area_module
from vsnapfs.diffarea import recovery, verify
from vsnapfs.diffarea.index import ZEROS
from vsnapfs.diffarea.inspect import inspect_file
from vsnapfs.diffarea.layout import (
    MAX_SLOTS,
    SECTOR_SIZE,
    SECTORS_PER_GROUP,
    SUPERBLOCK_OFFSETS,
    SUPERBLOCK_SIZE,
    TABLE_SIZE,
)
from vsnapfs.errors import FaultCode, VsnapError
from vsnapfs.volume import Volume
from vsnapfs.volume.buffer import WriteBuffer
from vsnapfs.volume.core import Core
from vsnapfs.volume.create import create_volume
from vsnapfs.volume.opening import check_replica
from vsnapfs.volume.statefile import COPY_SIZE, STATE_SIZE

SEED = chance.seed(3)
CASES = 500  # for each of four tests


@pytest.fixture(scope="module")
def bases() -> list[Base]:
    return mutations.bases()


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
def test_mutations_end_in_an_error_or_a_right_answer(bases: list[Base], part: int) -> None:
    """Whatever changes in diff area and state file: no crash, no hang, no wrong byte, all told."""
    for number in range(part * CASES, (part + 1) * CASES):
        outcome = filefuzz.case(bases, SEED, number)
        assert not outcome.violation, (
            f"case {number}: {'; '.join(outcome.said)}\n{outcome.violation}\n"
            f"again: scripts/fuzz-files --seed {SEED} --first {number} --count 1"
        )


MUTANTS: dict[str, tuple[Any, str, Any]] = {
    "lost descriptors hide nothing": (area_module.DiffArea, "may_trust", lambda *_: True),
    "copies are not checked": (area_module.DiffArea, "_is_copy", lambda *_: True),
    "sectors are not checked": (
        recovery,
        "valid_sectors",
        lambda *_: np.ones(SECTORS_PER_GROUP, dtype=bool),
    ),
    "the ring is not read": (WriteBuffer, "_take_over", lambda *_: None),
    "verify keeps quiet": (verify, "hidden_ranges", lambda *_: []),
    "the twin is not asked": (
        recovery._Scan,
        "_choose",
        lambda original: lambda scan, group, table, _: original(scan, group, table, table[:]),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTANTS)
def test_the_judge_sees_it_when_a_check_is_missing(bases: list[Base], name: str) -> None:
    """The mutations reach each check: without it, one of a few hundred cases goes wrong."""
    where, attribute, change = MUTANTS[name]
    if name == "the twin is not asked":
        change = change(recovery._Scan._choose)
    with mock.patch.object(where, attribute, change):
        assert any(filefuzz.case(bases, 5, number).violation for number in range(600))


# --- verify finds every bit ----------------------------------------------------------------------


@pytest.fixture
def small() -> Rig:
    return small_volume()


async def healthy(volume: Volume) -> list[int]:
    assert (await volume.verify())["ok"]
    area = volume.core.need_area()
    _, _, slots = area.index.living([p.number for p in volume.points])
    return [slot for slot in slots.tolist() if not slot & ZEROS]


def places(rig: Rig, step: int) -> list[tuple[str, int]]:
    """(file, offset) of what `verify` answers for: all bytes where something is, else some."""
    slots = fresh(rig).run(healthy)
    found: list[tuple[str, int]] = []
    for start in SUPERBLOCK_OFFSETS:
        found += [("area", start + at) for at in (*range(132), *range(0, 65536, 331), 65535)]
    for start in LAYOUT.table_offsets(0):
        found += [
            ("area", start + at) for at in (*range(2 * SECTOR_SIZE), *range(0, TABLE_SIZE, 333))
        ]
    for slot in slots:
        start = LAYOUT.slot_offset(slot)
        found += [("area", start + at) for at in (0, *range(step, BLOCK, 61), BLOCK - 1)]
    found += [("state", at) for at in (*range(0, STATE_SIZE, 7), COPY_SIZE - 1, STATE_SIZE - 1)]
    return found


@pytest.mark.slow
def test_verify_finds_every_bit_flipped_while_the_volume_is_open(small: Rig) -> None:
    """A flipped bit in superblocks, tables, live copies or state file is found where it is."""

    async def look(volume: Volume) -> None:
        for number, (name, offset) in enumerate(listed):
            flip(rig, name, offset, number % 8)
            problems = (await volume.verify())["problems"]
            assert len(problems) == 1, (name, offset, problems)
            start = problems[0]["offset"]
            sizes = {
                "superblock": SUPERBLOCK_SIZE,
                "descriptor sector": SECTOR_SIZE,
                "preserved block": BLOCK,
                "state file": COPY_SIZE,
            }
            assert start <= offset < start + sizes[problems[0]["what"]]
            assert (name == "state") == (problems[0]["what"] == "state file")
            flip(rig, name, offset, number % 8)
        assert (await volume.verify())["ok"]

    listed = places(small, 5)
    rig = fresh(small)
    rig.run(look)


def test_verify_finds_what_opening_would_have_hidden(small: Rig) -> None:
    """Bits flipped while nobody had it open: opening heals most, and is told to have done so."""
    for number, (name, offset) in enumerate(places(small, 11)[::97]):
        rig = fresh(small)
        flip(rig, name, offset, number % 8)
        first = rig.run(Volume.verify)
        rig.close()
        assert not first["ok"], (name, offset)
        second = fresh(rig).run(Volume.verify)
        lost = [problem["what"] for problem in second["problems"]]
        assert lost in ([], ["preserved block"]), (name, offset)


def test_a_damaged_copy_takes_one_range_of_one_point(small: Rig) -> None:
    """Of a rotted copy `verify` names point and range; everything else still reads."""
    contents: dict[int, bytes] = {}

    async def remember(volume: Volume) -> None:
        for point in volume.points:
            contents[point.number] = await read_point(volume, point.number)
        found = volume.core.need_area().index.lookup(2, 3)
        assert found is not None
        slots.append(found[1])

    slots: list[int] = []
    fresh(small).run(remember)
    rig = fresh(small)
    flip(rig, "area", LAYOUT.slot_offset(slots[0]) + 77, 1)

    async def look(volume: Volume) -> None:
        (problem,) = (await volume.verify())["problems"]
        assert (problem["points"], problem["ranges"]) == ([2], [[3 * BLOCK, BLOCK]])
        for point in volume.points:
            handle = volume.open_point(point.number)
            for block in range(6):
                right = contents[point.number][block * BLOCK : (block + 1) * BLOCK]
                if (point.number, block) == (2, 3):
                    with pytest.raises(OSError) as raised:
                        await handle.read(block * BLOCK, BLOCK)
                    assert raised.value.errno == errno.EIO
                else:
                    assert bytes(await handle.read(block * BLOCK, BLOCK)) == right
            handle.close()

    rig.run(look)


def test_a_lost_descriptor_is_told_from_one_never_written(small: Rig) -> None:
    """Both copies of a sector rotted: fault 3, what may be hidden is EIO and told, no more."""
    rig = fresh(small)
    for offset in LAYOUT.sector_offsets(0):
        poke(rig, "area", offset, bytes(SECTOR_SIZE))

    async def look(volume: Volume) -> None:
        status = volume.status()
        assert status["fault"]["code"] == FaultCode.META_DATA_CORRUPTION
        problems = (await volume.verify())["problems"]
        assert problems[0]["what"] == "descriptor sector"
        told = {p["points"][0]: p["ranges"] for p in problems[1:]}
        assert told == {1: [[0, volume.size]], 2: [[0, volume.size]], 3: [[0, volume.size]]}

    rig.run(look)


# --- old things put back -------------------------------------------------------------------------


def test_an_old_diff_area_is_noticed_and_never_read_through(small: Rig) -> None:
    """Yesterday's diff area under today's replica: fault 15, and nothing wrong is read."""
    old = small.host.files["area"].cache.copy()
    contents: dict[int, bytes] = {}

    async def go_on(volume: Volume) -> None:
        for point in volume.points:
            contents[point.number] = await read_point(volume, point.number)
        for block in range(5):
            await write(volume, block * BLOCK, pattern(99 + block, BLOCK))

    rig = fresh(small)
    rig.run(go_on)
    rig.close()
    rig.host.files["area"].cache, rig.host.files["area"].disk = old.copy(), old.copy()
    rig = fresh(rig)

    async def look(volume: Volume) -> None:
        fault = volume.status()["fault"]
        assert fault["code"] == FaultCode.EXTERNAL_WRITER_TO_DIFF_AREA
        handle = volume.open_point(3)
        with pytest.raises(OSError) as raised:
            await handle.read(0, volume.size)
        assert raised.value.errno == errno.EIO
        handle.close()
        report = await volume.repair()
        assert not report["ok"]
        assert not [finding for finding in report["found"] if finding["when"] == "now"]
        # Nothing makes it look new: neither repair nor any other command writes to it.
        with pytest.raises((VsnapError, OSError)):
            await volume.delete_point(1)

    rig.run(look)
    rig.close()
    rig = fresh(rig)
    rig.run(look)


@pytest.mark.parametrize("copy", [0, 1])
def test_a_table_that_missed_all_later_writes_is_noticed(copy: int) -> None:
    """A valid but old table, in either place, after a clean close: its twin is newer and counts."""
    rig = Rig()

    async def act(volume: Volume) -> None:
        await volume.create_point()
        contents.append(raw_replica(rig))
        for block in range(8):
            await write(volume, block * BLOCK, b"new " * 100)

    contents: list[bytes] = []
    where = LAYOUT.table_offsets(0)[copy]
    old = rig.host.files["area"].cache.read(where, TABLE_SIZE)
    rig.run(act)
    rig.close()
    poke(rig, "area", where, old)

    async def look(volume: Volume) -> None:
        assert await read_point(volume, 1) == contents[0]
        report = await volume.repair()
        assert report["ok"]
        assert "differed" in json.dumps(report["found"])
        assert (await volume.verify())["ok"]

    fresh(rig).run(look)


def test_an_old_table_under_an_open_volume_is_not_built_upon() -> None:
    """A table that lost its writes while the volume is open: reads and barriers use its twin."""
    rig = Rig()

    async def act(volume: Volume) -> None:
        await volume.create_point()
        content = raw_replica(rig)
        for block in range(8):
            await write(volume, block * BLOCK, b"new " * 100)
        area = volume.core.need_area()
        poke(rig, "area", LAYOUT.table_offsets(0)[0], old)
        area._sectors.clear()
        assert await read_point(volume, 1) == content
        await write(volume, 9 * BLOCK, b"a barrier builds on the sector")
        area._sectors.clear()
        assert await read_point(volume, 1) == content

    old = rig.host.files["area"].cache.read(LAYOUT.table_offsets(0)[0], TABLE_SIZE)
    rig.run(act)


# --- real files ----------------------------------------------------------------------------------


@pytest.fixture
def vol(tmp_path: Path) -> Path:
    directory = tmp_path / "vol"
    create_volume(directory, size=40_000, diff_area_size=384 << 10, block_size=BLOCK)
    return directory


TOML_WORDS = (
    *('"', "'", "\n", "\\", "=", "[", "]", "[[", "{", "}", "#", '"""', "\x00", "\x7f", "\ufeff"),
    *("inf", "-nan", "1e999", "9" * 5000, "0x", "a.b.c.d", "format = 2", "format = 1.0", "true"),
    *("/dev/null", "/dev/zero", "/", "..", "../..", "state", "volume.toml", "./state", "a/../b"),
    *("volume-id", "replica", "diff-area", "on-full", "hold-timeout", "grow-timeout", "[" * 400),
)


@given(data=st.data())
def test_mutated_volume_toml_is_an_error_or_the_same_volume(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Cut, doubled, garbled volume.toml: a clear error, or exactly what it says."""
    directory = tmp_path_factory.getbasetemp() / "toml-fuzz"
    directory.mkdir(mode=0o700, exist_ok=True)
    config.save(directory, config.VolumeConfig(volume_id="0123456789abcdef" * 2))
    raw = (directory / "volume.toml").read_bytes()
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(raw)))
        end = data.draw(st.integers(at, min(len(raw), at + 300)))
        new = data.draw(
            st.one_of(
                st.binary(max_size=20),
                st.sampled_from(TOML_WORDS).map(str.encode),
                st.just(raw[at:end] * 2),
            )
        )
        raw = raw[:at] + new + raw[end:]
    (directory / "volume.toml").write_bytes(raw)
    found: config.VolumeConfig | VsnapError
    try:
        found = config.load(directory)
    except VsnapError as error:
        found = error
    if isinstance(found, VsnapError):
        assert "\n" not in str(found)
        assert found.code in ("config", "not-private")
    else:
        told = tomllib.loads(raw.decode())
        assert (found.replica, found.diff_area) == (told["replica"], told["diff-area"])
        assert (found.on_full, found.volume_id) == (told["on-full"], told["volume-id"])


@pytest.mark.parametrize("seed", range(60))
def test_mutated_real_files(vol: Path, seed: int) -> None:
    """The same on a real file system, `inspect` included: an error or an answer."""
    import random

    dice = random.Random(seed)
    for name in ("diff-area", "state"):
        raw = bytearray((vol / name).read_bytes())
        for _ in range(dice.randrange(3)):
            at = dice.choice((dice.randrange(len(raw)), dice.randrange(1024)))
            raw[at : at + dice.randrange(600)] = dice.randbytes(dice.randrange(600))
        (vol / name).write_bytes(raw[: dice.choice((len(raw), dice.randrange(len(raw))))])

    async def look(volume: Volume) -> None:
        json.dumps([volume.status(), await volume.repair()])

    for work in (
        lambda: inspect_file(vol / "diff-area"),
        lambda: trio.run(lambda: opened(vol, look, dry_run=True)),
        lambda: trio.run(lambda: opened(vol, look)),
        lambda: trio.run(lambda: opened(vol, look)),
    ):
        with suppress(VsnapError, OSError):
            work()


def test_a_claim_of_terabytes_costs_nothing(vol: Path) -> None:
    """A superblock that claims 64 TiB, over a short file and over a sparse one of 1 TiB."""
    import xxhash

    raw = bytearray((vol / "diff-area").read_bytes())
    size = LAYOUT.size_of(MAX_SLOTS)
    for start in SUPERBLOCK_OFFSETS:
        struct.pack_into("<QQ", raw, start + 64, 2**46, size)
        end = start + SUPERBLOCK_SIZE - 8
        raw[end : end + 8] = xxhash.xxh3_64_intdigest(bytes(raw[start:end])).to_bytes(8, "little")
    for length in (len(raw), 1 << 40):
        (vol / "diff-area").write_bytes(raw)
        os.truncate(vol / "diff-area", length)
        with filefuzz.limits():
            status = trio.run(lambda: opened(vol, _status))
        assert status["fault"]["code"] == FaultCode.META_DATA_CORRUPTION
    os.truncate(vol / "diff-area", len(raw))
    with filefuzz.limits():
        assert len(inspect_file(vol / "diff-area")["groups"]) == 1


async def _status(volume: Volume) -> dict[str, Any]:
    await trio.lowlevel.checkpoint()
    return volume.status()


@pytest.mark.parametrize("why", ["replica-changed", "foreign-area"])
def test_an_opening_that_is_refused_leaves_no_empty_state_file(tmp_path: Path, why: str) -> None:
    """Nothing has changed then: a state file that was moved away is still missing."""
    volume = tmp_path / "vol"
    create_volume(volume, size=1 << 20, diff_area_size=8 << 20)
    if why == "replica-changed":
        os.utime(volume / "replica.img", (1, 1))
    else:
        (volume / "diff-area").write_bytes(b"somebody else's" * 100_000)
    (volume / "state").unlink()
    before = {path.name for path in volume.iterdir()}

    async def open_it() -> None:
        with pytest.raises(VsnapError):
            await Volume.open(volume)

    trio.run(open_it)
    assert {path.name for path in volume.iterdir()} - {"events.jsonl"} == before - {"events.jsonl"}


@pytest.mark.parametrize("call", ["fsync", "fstat"])
def test_an_opening_only_looks_at_the_replica(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """A replica that cannot be synced opens, for a flush to tell of it; one that the host says
    nothing of is refused with words.
    """
    volume = tmp_path / "vol"
    create_volume(volume, size=1 << 20, diff_area_size=8 << 20)
    real, inode = getattr(os, call), os.stat(volume / "replica.img").st_ino
    armed = False

    def fails(fd: int) -> Any:
        if armed and os.stat(f"/proc/self/fd/{fd}").st_ino == inode:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(fd)

    def judge(core: Core, accept: bool) -> str | None:
        nonlocal armed
        armed = True
        try:
            return check_replica(core, accept)
        finally:
            armed = False

    monkeypatch.setattr(os, call, fails)
    monkeypatch.setattr("vsnapfs.volume.volume.check_replica", judge)

    async def open_it() -> None:
        opened = await Volume.open(volume)
        assert opened.status()["state"] == "online"
        await opened.close()

    if call == "fsync":
        trio.run(open_it)
    else:
        with pytest.raises(VsnapError, match="cannot be looked at: Input/output error") as caught:
            trio.run(open_it)
        assert caught.value.errno == errno.EIO
