"""Hostile files: volumes with a history, and the ways to change their files. See `filefuzz`.

Owns the bases (volumes in several conditions, with what each recovery point holds and with older
generations of their files) and the `Mutator`, which changes the files of one of them by dice.
"""

from __future__ import annotations

import itertools
import json
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import ring_mutations
import xxhash
from rig import (
    BLOCK,
    SMALLEST,
    Rig,
    attempt,
    flush,
    pattern,
    raw_replica,
    read_points,
    small_steps,
    write,
)
from simdisk import PAGE, Host, Pages, PowerLoss, SimBacking, SimFile

from vsnapfs.diffarea.descriptors import ENTRY, HEAD, IN_USE, SectorImage
from vsnapfs.diffarea.layout import (
    HEADER_SIZE,
    SECTOR_SIZE,
    SECTORS_PER_GROUP,
    SLOTS_PER_SECTOR,
    SUPERBLOCK_OFFSETS,
    SUPERBLOCK_SIZE,
    TABLE_SIZE,
    Layout,
)
from vsnapfs.volume import Volume
from vsnapfs.volume.statefile import COPY_SIZE

LAYOUT = Layout(BLOCK)
NASTY = (
    *(0, 1, 2, 3, 19, 20, 31, 32, 127, 128, 2559, 2560, 4095, 4096, 65535, 65536, 131071, 131072),
    *(2**30 - 1, 2**30, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**34, 2**46, 2**46 + 1, 2**48 - 1),
    *(2**62, 2**63 - 1, 2**63, 2**64 - 1),
)


# --- bases ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Old:
    """The files as they were at an earlier time. closed: by a clean close since then."""

    area: Pages
    state: Pages


@dataclass
class Base:
    """A volume at rest. contents: of every point there ever was. restoring: a restore goes on."""

    name: str
    rig: Rig
    files: dict[str, SimFile]
    contents: dict[int, bytes]
    old: list[Old] = field(default_factory=list)
    clean: bool = True
    restoring: bool = False
    live_slots: list[int] = field(default_factory=list)
    memory: dict[bytes, bytes] = field(default_factory=dict)

    def host(self) -> Host:
        """A host of its own with these files."""
        host = Host()
        host.files = {
            name: replace(
                file,
                cache=file.cache.copy(),
                disk=file.cache.copy(),
                journal=[],
                space=set(file.space),
                written=set(file.written),
                locked=False,
            )
            for name, file in self.files.items()
        }
        host._inodes, host._time = 100, 10**6
        host.memory, host.boot = ring_mutations.Memory(self.memory), self.rig.host.boot
        return host


def _old(rig: Rig) -> Old:
    files = rig.host.files
    return Old(files["area"].cache.copy(), files["state"].cache.copy())


def _build(
    name: str,
    *,
    end: str = "clean",
    points: int = 4,
    rounds: int = 5,
    **options: Any,
) -> Base:
    rig = Rig(seed=7, **options)
    contents: dict[int, bytes] = {}
    old: list[Old] = []
    counter = 0

    async def act(volume: Volume) -> None:
        nonlocal counter
        for number in range(points):
            point = await volume.create_point(f"label-{counter}-{number}" if number % 2 else None)
            contents[point.number] = raw_replica(rig)
            for _ in range(rounds):
                counter += 1
                offset = (counter * 7919 * 512) % (volume.size - 3 * BLOCK)
                await write(volume, offset, pattern(counter, 700 + counter % 3 * BLOCK))
            await flush(volume)
        if len(volume.points) > 2:
            await volume.delete_point(volume.points[1].number)

    with small_steps():
        for _ in range(2):
            old.append(_old(rig))
            rig.run(act)
            rig.close()

        old.append(_old(rig))
        if end != "clean":
            _end(rig, end, contents)
    base = Base(name, rig, rig.host.files, contents, old, end == "clean", end == "restoring")
    base.memory = {ring: bytes(memory) for ring, memory in rig.host.memory.items()}
    probe = rig.on(base.host())

    async def look(volume: Volume) -> None:
        area = volume.core.need_area()
        assert volume.account.restoring or not base.restoring
        base.live_slots = area.index.live_slots([p.number for p in volume.points]).tolist()
        assert not volume.core.area_is_stale
        for number, content in (await read_points(volume)).items():
            assert content == contents[number]

    probe.run(look)
    assert base.live_slots, name
    assert all((old_one.area.size > 0) for old_one in old)
    return base


def _end(rig: Rig, end: str, contents: dict[int, bytes]) -> None:
    """Let the volume end otherwise than by a clean close."""
    if end == "ring":
        ring_mutations.fill(rig, contents)
        return

    async def more(volume: Volume) -> None:
        if end == "fault":
            rig.host.fail("area", "write", 5, times=1 << 40)
        error = await attempt(write(volume, 3 * BLOCK + 10, b"the last words" * 300))
        assert (error is not None) == (end == "fault")
        if end == "restoring":
            # The process dies when the replica is half written.
            written = itertools.count()

            def hook(backing: SimBacking, operation: str, _offset: int, _length: int) -> None:
                if (backing.name, operation) == ("replica", "write") and next(written) == 3:
                    rig.host.stop_at = 0

            rig.host.hooks.append(hook)
            await volume.restore(volume.points[0].number)

    try:
        rig.run(more)
        assert end != "restoring"
    except PowerLoss:
        assert end == "restoring"
    rig.host.failures.clear()
    rig.killed()


def bases() -> list[Base]:
    """All of them; a few seconds' work."""
    two_groups = LAYOUT.size_of(2560 + 40)
    return [
        _build("closed"),
        _build("killed", end="killed"),
        _build("faulted", end="fault"),
        _build("restoring", end="restoring"),
        _build("one point", points=1, rounds=9),
        _build("smallest", maximum=SMALLEST, size=5 * BLOCK + 1, rounds=1),
        _build("acknowledged", end="ring", buffer=ring_mutations.SIZE),
        _build("two groups", maximum=two_groups, area_is_device=True),
    ]


class Mutator:
    """Changes the files of one case. `said`: what it did, for the report."""

    def __init__(self, base: Base, host: Host, dice: random.Random) -> None:
        self.base = base
        self.dice = dice
        self.files = host.files
        self.said: list[str] = []

    def _pages(self, name: str) -> Pages:
        return self.files[name].cache

    def settle(self) -> None:
        """What has been changed is on the disk."""
        for file in self.files.values():
            file.disk = file.cache.copy()
            count = -(-file.cache.size // PAGE)
            file.space = {unit for unit in file.space if unit < count}
            file.written = {unit for unit in file.written if unit < count}

    def _put(self, name: str, offset: int, data: bytes) -> None:
        pages = self._pages(name)
        data = data[: max(0, pages.size - offset)]
        if data:
            pages.write(offset, data)

    # -- where ------------------------------------------------------------------------------------

    def _place(self, name: str) -> int:
        """An offset, mostly where something is."""
        dice, size = self.dice, self._pages(name).size
        if name == "state":
            return dice.choice((0, COPY_SIZE)) + dice.choice(
                (dice.randrange(40), dice.randrange(40, 400), dice.randrange(COPY_SIZE), 4088)
            )
        where = dice.randrange(8)
        copy = dice.choice(SUPERBLOCK_OFFSETS)
        if where == 0:
            return copy + dice.randrange(128)
        if where == 1:
            return copy + dice.choice((512, 4096, SUPERBLOCK_SIZE - 8)) + dice.randrange(8)
        if where <= 4:
            sector = self._some_sector()
            return dice.choice(LAYOUT.sector_offsets(sector)) + dice.randrange(SECTOR_SIZE)
        if where <= 6:
            slot = dice.choice(self.base.live_slots)
            return LAYOUT.slot_offset(slot) + dice.randrange(BLOCK)
        return dice.randrange(max(1, size))

    def _some_sector(self) -> int:
        """Mostly one that describes something."""
        dice = self.dice
        if dice.randrange(4):
            return dice.choice(self.base.live_slots) // SLOTS_PER_SECTOR
        groups = LAYOUT.groups_of(LAYOUT.slots_in(self.base.files["area"].cache.size))
        return dice.randrange(groups * SECTORS_PER_GROUP)

    # -- rot --------------------------------------------------------------------------------------

    def rot(self) -> None:
        """One to four changes that no checksum knows of, or one old thing put back."""
        dice = self.dice
        if dice.randrange(4) == 0:
            self._old_thing()
        else:
            for _ in range(dice.choice((1, 1, 1, 2, 3, 4))):
                dice.choice(
                    (self._flip, self._flip, self._run, self._run, self._cut, self._misplace)
                )()
        self.settle()

    def _flip(self) -> None:
        name = "state" if self.dice.randrange(6) == 0 else "area"
        offset, bit = self._place(name), self.dice.randrange(8)
        if offset < self._pages(name).size:
            old = self._pages(name).read(offset, 1)[0]
            self._put(name, offset, bytes([old ^ (1 << bit)]))
        self.said.append(f"flip {name} {offset}.{bit}")

    def _run(self) -> None:
        dice = self.dice
        name = "state" if dice.randrange(6) == 0 else "area"
        offset = self._place(name)
        length = int(2 ** dice.uniform(0, 17))
        if dice.randrange(2):
            offset -= offset % SECTOR_SIZE
            length += -length % SECTOR_SIZE
        kind = dice.choice(("zeros", "ones", "noise"))
        data = {"zeros": bytes(length), "ones": b"\xff" * length}.get(kind)
        self._put(name, offset, dice.randbytes(length) if data is None else data)
        self.said.append(f"{length} {kind} in {name} at {offset}")

    def _cut(self) -> None:
        dice = self.dice
        name = "state" if dice.randrange(4) == 0 else "area"
        file = self.files[name]
        if file.is_device:
            return self._flip()
        edge = dice.choice((self._place(name), dice.randrange(file.cache.size + 1)))
        edge = dice.choice((edge, edge - edge % SECTOR_SIZE, edge - edge % BLOCK))
        if dice.randrange(3) == 0:
            size = file.cache.size
            file.cache.resize(size + int(2 ** dice.uniform(0, 18)))
            self._put(name, size, dice.randbytes(min(5000, file.cache.size - size)))
        else:
            file.cache.resize(edge)
        self.said.append(f"{name} has {file.cache.size} bytes")
        return None

    def _misplace(self) -> None:
        """A write that went to the wrong place."""
        dice = self.dice
        length = dice.choice((SECTOR_SIZE, BLOCK, SUPERBLOCK_SIZE))
        source, target = (self._place("area") for _ in range(2))
        source, target = source - source % SECTOR_SIZE, target - target % SECTOR_SIZE
        if source // SUPERBLOCK_SIZE != target // SUPERBLOCK_SIZE:
            data = self._pages("area").read(source, length)
            self._put("area", target, data)
        self.said.append(f"{length} bytes from {source} to {target}")

    def _old_thing(self) -> None:
        """An earlier generation of something, whole and valid."""
        dice, area = self.dice, self._pages("area")
        # Without a clean close since, a whole old file cannot be told (docs/security.md).
        old = dice.choice(self.base.old)
        what = dice.choice(("file", "superblock", "table", "sector", "slot", "state"))
        if what == "file":
            self.files["area"].cache = old.area.copy()
            where: object = "whole"
        elif what == "superblock":
            where = dice.choice(SUPERBLOCK_OFFSETS)
            self._put("area", where, old.area.read(where, SUPERBLOCK_SIZE))
        elif what == "table":
            groups = LAYOUT.groups_of(LAYOUT.slots_in(area.size))
            where = LAYOUT.table_offsets(dice.randrange(groups))[dice.randrange(2)]
            if where + TABLE_SIZE <= old.area.size:
                self._put("area", where, old.area.read(where, TABLE_SIZE))
        elif what == "sector":
            where = dice.choice(LAYOUT.sector_offsets(self._some_sector()))
            if where + SECTOR_SIZE <= old.area.size:
                self._put("area", where, old.area.read(where, SECTOR_SIZE))
        elif what == "slot":
            where = LAYOUT.slot_offset(dice.choice(self.base.live_slots))
            if where + BLOCK <= old.area.size:
                self._put("area", where, old.area.read(where, BLOCK))
        else:
            where = dice.choice((0, COPY_SIZE, None))
            if where is None:
                self.files["state"].cache = old.state.copy()
            else:
                self._put("state", where, old.state.read(where, COPY_SIZE))
        self.said.append(f"old {what} {where} of generation {self.base.old.index(old)}")

    # -- forgery ----------------------------------------------------------------------------------

    def forge(self) -> None:
        """One to three changes with checksums that fit, perhaps some rot besides."""
        dice = self.dice
        for _ in range(dice.choice((1, 1, 2, 3))):
            dice.choice(
                (
                    *(self._forge_superblock, self._forge_superblock, self._forge_catalog),
                    *(self._forge_sector, self._forge_sector, self._forge_many),
                    *(self._forge_state, self._forge_size, self._forge_fault),
                )
            )()
        if dice.randrange(5) == 0:
            self._run()
        self.settle()

    def _number(self, bits: int, old: int = 0) -> int:
        dice = self.dice
        near = dice.choice((old + 1, old - 1, old * 2, old // 2, dice.getrandbits(bits)))
        return dice.choice((*NASTY, near, near)) % 2**bits

    def _superblocks(self, change: Callable[[bytearray], None]) -> None:
        """Change the newest superblock and put it in one or both places."""
        copies = [
            self._pages("area").read(offset, SUPERBLOCK_SIZE) for offset in SUPERBLOCK_OFFSETS
        ]
        data = bytearray(max(copies, key=lambda copy: struct.unpack_from("<Q", copy, 32)[0]))
        change(data)
        check = xxhash.xxh3_64_intdigest(bytes(data[:-8]))
        data[-8:] = check.to_bytes(8, "little")
        for offset in self.dice.choice((SUPERBLOCK_OFFSETS, SUPERBLOCK_OFFSETS, (0,), (65536,))):
            self._put("area", offset, bytes(data))

    def _forge_superblock(self) -> None:
        def change(data: bytearray) -> None:
            for _ in range(self.dice.choice((1, 1, 2, 4))):
                offset, code = self.dice.choice(
                    (
                        *((8, "I"), (12, "I"), (16, "Q"), (32, "Q"), (40, "Q"), (48, "I")),
                        *((52, "I"), (56, "Q"), (64, "Q"), (72, "Q"), (80, "I"), (84, "I")),
                        *((88, "I"), (92, "I"), (96, "Q"), (112, "Q"), (512, "I")),
                    )
                )
                (old,) = struct.unpack_from(f"<{code}", data, offset)
                value = self._number(32 if code == "I" else 64, old)
                struct.pack_into(f"<{code}", data, offset, value)
                self.said.append(f"superblock {offset}: {old} → {value}")

        self._superblocks(change)

    def _forge_catalog(self) -> None:
        dice = self.dice

        def change(data: bytearray) -> None:
            (count,) = struct.unpack_from("<I", data, 88)
            if dice.randrange(3) == 0:
                count = dice.choice((count + 1, max(0, count - 1), 512, 513, 2**32 - 1))
                struct.pack_into("<I", data, 88, count % 2**32)
            for _ in range(dice.randrange(1, 4)):
                at = 4096 + 112 * dice.randrange(max(1, min(count, 512)))
                number, length, created = struct.unpack_from("<IIq", data, at)
                number = dice.choice((number, self._number(32, number)))
                length = dice.choice((length, self._number(32, length), 96, 97))
                created = dice.choice((created, self._number(64) - 2**63))
                struct.pack_into("<IIq", data, at, number, length, created)
                data[at + 16 : at + 112] = dice.choice(
                    (bytes(data[at + 16 : at + 112]), dice.randbytes(96), b"\xff" * 96, b"/" * 96)
                )
                self.said.append(f"catalog {at}: {number}, {length}, {created}")

        self._superblocks(change)

    def _forge_fault(self) -> None:
        text = self._json(
            {"code": 8, "errno": 28, "message": "full", "time": 1, "diff_area": "/x", "block": 3}
        )

        def change(data: bytearray) -> None:
            part = text[:3580]
            struct.pack_into("<I", data, 512, len(part))
            data[516 : 516 + len(part)] = part

        self._superblocks(change)
        self.said.append(f"fault {text[:80]!r}")

    def _json(self, fields: dict[str, Any]) -> bytes:
        """JSON with values that nobody expects, or no JSON at all."""
        dice = self.dice
        if dice.randrange(8) == 0:
            return dice.choice(
                (b"[" * 3500, b'{"a":' * 600, b"\xff" * 50, b"null", b"[]", b"1" * 3000, b"")
            )
        values: tuple[Any, ...] = (
            *(None, True, False, "", "x", "\ud800", "\x1b[2J\n", [], {}, [[]], {"a": 1}),
            *(0, -1, 1.5, 1e308, float("nan"), float("inf"), 10**300, *NASTY),
        )
        for _ in range(dice.randrange(1, 4)):
            key = dice.choice((*fields, "unknown"))
            fields[key] = dice.choice(values)
            if dice.randrange(6) == 0:
                fields.pop(key)
        return json.dumps(fields).encode()

    def _forge_state(self) -> None:
        dice = self.dice
        data = bytearray(self._pages("state").read(0, COPY_SIZE).ljust(COPY_SIZE, b"\0"))
        (length,) = struct.unpack_from("<I", data, 12)
        try:
            fields = json.loads(bytes(data[40 : 40 + length]))
            assert isinstance(fields, dict)
        except (ValueError, AssertionError, RecursionError):
            fields = {"offline": False, "fault": None, "given_up": 0, "epoch": 1}
        if dice.randrange(3) == 0:
            fields["fault"] = json.loads(
                self._json_or({"code": 8, "errno": 28, "message": "full", "time": 1})
            )
        text = self._json(fields)[:4048]
        data[40:4088] = text.ljust(4048, b"\0")
        struct.pack_into("<I", data, 12, dice.choice((len(text), len(text), self._number(32))))
        struct.pack_into("<Q", data, 32, self._number(64, 5))
        data[-8:] = xxhash.xxh3_64_intdigest(bytes(data[:-8])).to_bytes(8, "little")
        for copy in dice.choice(((0, 1), (0,), (1,))):
            self._put("state", copy * COPY_SIZE, bytes(data))
        self.said.append(f"state {text[:200]!r}")

    def _json_or(self, fields: dict[str, Any]) -> bytes:
        text = self._json(fields)
        try:
            json.loads(text)
        except (ValueError, RecursionError):
            return b"{}"
        return text

    def _forge_size(self) -> None:
        """Sizes that fit each other and nothing else; perhaps a file that is really that long."""
        dice = self.dice
        slots = dice.choice((32, 33, 2560, 2560 + 32, 5120, 2**20, 2**32 - 1, 2**28))
        block_size = dice.choice((BLOCK, BLOCK, 65536))
        layout = Layout(block_size)
        size = layout.size_of(layout.valid_slots(slots))

        def change(data: bytearray) -> None:
            struct.pack_into("<I", data, 48, block_size)
            struct.pack_into("<QQ", data, 64, dice.choice((size, 2**46, size + 1)), size)

        self._superblocks(change)
        if dice.randrange(3) == 0 and not self.files["area"].is_device:
            self._pages("area").resize(dice.choice((size, size - 1, size // 2, 1 << 40)))
        self.said.append(f"sizes of {slots} slots of {block_size}, file {self._pages('area').size}")

    def _sector(self, sector: int, change: Callable[[bytearray], None]) -> None:
        """Change a sector and put it in one or both places, sealed."""
        offsets = LAYOUT.sector_offsets(sector)
        data = bytearray(self._pages("area").read(offsets[0], SECTOR_SIZE))
        change(data)
        data[:8] = xxhash.xxh3_64_intdigest(bytes(data[8:])).to_bytes(8, "little")
        for offset in self.dice.choice((offsets, offsets, offsets[:1], offsets[1:])):
            self._put("area", offset, bytes(data))

    def _forge_sector(self) -> None:
        dice = self.dice

        def change(data: bytearray) -> None:
            _, area, barrier, number, fresh = HEAD.unpack_from(data)
            what = dice.randrange(6)
            if what == 0:
                barrier = self._number(64, barrier)
            elif what == 1:
                number = dice.choice((number, self._number(32, number)))
                area = dice.choice((area, self._number(64)))
            if what <= 2:
                fresh = dice.choice((0, 2**20 - 1, 2**32 - 1, dice.getrandbits(32)))
                barrier = dice.choice((barrier, barrier + 1, 2**62)) % 2**64
            HEAD.pack_into(data, 0, 0, area, barrier, number, fresh)
            for _ in range(dice.randrange(5)):
                self._forge_entry(data)
            self.said.append(f"sector {number}: barrier {barrier}, fresh {fresh:x}")

        self._sector(self._some_sector(), change)

    def _forge_entry(self, data: bytearray) -> None:
        dice = self.dice
        at, other = (HEAD.size + ENTRY.size * dice.randrange(SLOTS_PER_SECTOR) for _ in range(2))
        content, block, epoch, spare = ENTRY.unpack_from(data, other)
        what = dice.randrange(4)
        if what == 0:  # the same copy in two slots
            data[at : at + ENTRY.size] = data[other : other + ENTRY.size]
            return
        if what == 1:
            block = (self._number(64, block) | IN_USE) % 2**64
        elif what == 2:
            epoch = self._number(32, epoch)
        else:  # the copy of a block is what another slot holds
            block = IN_USE | dice.randrange(16)
            epoch = dice.randrange(1, 12)
            slot = dice.choice(self.base.live_slots)
            held = self._pages("area").read(LAYOUT.slot_offset(slot), BLOCK)
            content = xxhash.xxh3_64_intdigest(held)
        ENTRY.pack_into(data, at, content, block, epoch, spare)

    def _forge_many(self) -> None:
        """Every sector full of fresh descriptors: of one block, of all blocks, of one epoch."""
        dice = self.dice
        area_id = HEAD.unpack_from(self._pages("area").read(HEADER_SIZE, 32))[1]
        one_block, one_epoch = dice.randrange(2), dice.randrange(2)
        barrier = dice.choice((3, 1000, 2**62))
        parts = []
        for sector in range(SECTORS_PER_GROUP):
            image = SectorImage.empty()
            for place in range(SLOTS_PER_SECTOR):
                slot = sector * SLOTS_PER_SECTOR + place
                block = IN_USE | (0 if one_block else slot % 13)
                epoch = 1 if one_epoch else 1 + slot % 8
                ENTRY.pack_into(
                    image.data,
                    HEAD.size + ENTRY.size * place,
                    dice.getrandbits(64),
                    block,
                    epoch,
                    0,
                )
            image.seal(area_id, barrier, sector, 2**20 - 1)
            parts.append(bytes(image.data))
        for offset in LAYOUT.table_offsets(0):
            self._put("area", offset, b"".join(parts))

        def unclean(data: bytearray) -> None:
            struct.pack_into("<I", data, 52, 0)

        self._superblocks(unclean)
        self.said.append(f"all descriptors, one block {one_block}, one epoch {one_epoch}")
