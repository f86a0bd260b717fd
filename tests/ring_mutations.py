"""Hostile rings: a volume killed with acknowledged writes in its ring, and ways to change that.

Owns the base, the changes (of the ring, and of what superblock and state file say of it), and what
must hold for the ring afterwards. See `filefuzz`, which has the rest.

* Whatever else is changed, the replica and what still lies in the ring are together all that was
  acknowledged; of a ring that rotted itself, each acknowledged write is there or lost.
* No ring is removed with a record in it, unless the log says that it is lost.
* An opening that is refused has changed nothing but what it could heal in the diff area.
"""

from __future__ import annotations

import json
import random
import struct
from typing import TYPE_CHECKING, Any

import xxhash
from rig import BLOCK, Rig, pattern, raw_replica, write
from simdisk import Host
from unsynced import SECTOR, Sectors, overwritten, sectors_of

from vsnapfs.errors import FormatError
from vsnapfs.volume import Volume
from vsnapfs.volume.ring import CURSORS, RECORDS, Ring, read_head
from vsnapfs.volume.statefile import COPY_SIZE

if TYPE_CHECKING:
    from mutations import Mutator

#: An odd size; any write of the judge fits.
SIZE = RECORDS + 16 * (BLOCK + 64) + 33
#: (offset, length) in the ring: head, which file the replica is, what it was told, the cursors.
_HEAD, _BORN, _TOLD = (0, 96), (256, 48), (320, 152)
_CURSORS = [(at, 24) for pair in CURSORS for at in pair]


def fill(rig: Rig, contents: dict[int, bytes]) -> None:
    """Leave acknowledged writes in the ring, some of them carried out, and be killed."""

    async def go_on(volume: Volume) -> None:
        point = await volume.create_point("before the kill")
        contents[point.number] = raw_replica(rig)
        await volume.buffer.start()
        for number in range(6):
            await write(volume, number * 2000, pattern(900 + number, 700 + number % 3 * 1500))
        assert volume.buffer.pending

    rig.run(go_on)
    rig.killed()


class Memory(dict[bytes, bytearray]):
    """The shared memory of a host. `unread`: rings that were removed with records in them."""

    def __init__(self, rings: dict[bytes, bytes]) -> None:
        super().__init__({name: bytearray(memory) for name, memory in rings.items()})
        self.unread: list[str] = []

    def __delitem__(self, ring: bytes) -> None:
        self._look(ring)
        super().__delitem__(ring)

    def pop(self, ring: bytes, *default: Any) -> Any:
        self._look(ring)
        return super().pop(ring, *default)

    def _look(self, ring: bytes) -> None:
        if ring in self and records_of(self[ring]) != []:
            self.unread.append(ring.hex())


def records_of(memory: bytearray) -> list[tuple[int, bytes]] | None:
    """(offset, data) of what a ring holds, oldest first; None if it cannot be read."""
    copy = bytearray(memory)
    try:
        head = read_head(copy)
        ring = Ring.found(copy, head.name, head.volume_id)
        return [(record.offset, bytes(ring.data(record))) for record in ring.records()]
    except FormatError:
        return None


class Watch:
    """What is known of the ring of one case, before anything is changed."""

    def __init__(self, rig: Rig) -> None:
        self._rig = rig
        self._ring_changed = False
        (memory,) = rig.host.memory.values()
        records = records_of(memory)
        assert records
        self._content = raw_replica(rig)
        self._allowed: Sectors = sectors_of(self._content)
        for offset, data in records:
            self._allowed = overwritten(self._allowed, offset, data)
            self._content = self._content[:offset] + data + self._content[offset + len(data) :]

    # -- changing -----------------------------------------------------------------------------

    def change(self, mutator: Mutator, dice: random.Random, *, forged: bool) -> None:
        """One to three changes of the ring or of what names it."""
        (memory,) = self._rig.host.memory.values()
        for _ in range(dice.choice((1, 1, 2, 3))):
            if not forged:
                self._ring_changed = True
                self._rot(memory, mutator, dice)
            else:
                ways = [self._head, self._cursor, self._record, self._length]
                ways += [self._superblock, self._state]
                dice.choice(ways)(memory, mutator, dice)
        mutator.settle()

    @staticmethod
    def _place(memory: bytearray, dice: random.Random) -> int:
        start, length = dice.choice(
            (_HEAD, _BORN, _TOLD, *_CURSORS, (RECORDS, 200), (0, len(memory)))
        )
        return min(start + dice.randrange(length), len(memory) - 1)

    def _rot(self, memory: bytearray, mutator: Mutator, dice: random.Random) -> None:
        at = self._place(memory, dice)
        what = dice.choice(("flip", "run", "cut"))
        if what == "flip":
            memory[at] ^= 1 << dice.randrange(8)
        elif what == "run":
            data = dice.choice((bytes, dice.randbytes))(int(2 ** dice.uniform(0, 12)))
            memory[at : at + len(data)] = data[: len(memory) - at]
        else:
            del memory[max(1, dice.choice((at, len(memory) - 1 - at % 5000))) :]
        mutator.said.append(f"{what} in the ring at {at}")

    @staticmethod
    def _seal(memory: bytearray, check_at: int, start: int, end: int) -> None:
        check = xxhash.xxh3_64_intdigest(bytes(memory[start:end]))
        memory[check_at : check_at + 8] = check.to_bytes(8, "little")

    def _number(self, memory: bytearray, at: int, code: str, mutator: Mutator, *few: int) -> None:
        (old,) = struct.unpack_from(f"<{code}", memory, at)
        value = mutator.dice.choice((*few, mutator._number(8 * struct.calcsize(code), old)))
        struct.pack_into(f"<{code}", memory, at, value % 2 ** (8 * struct.calcsize(code)))
        mutator.said.append(f"ring {at}: {old} → {value}")

    def _head(self, memory: bytearray, mutator: Mutator, dice: random.Random) -> None:
        if len(memory) < RECORDS:
            return
        at, code = dice.choice(
            ((16, "I"), (24, "Q"), (32, "Q"), (48, "Q"), (64, "Q"), (72, "Q"), (80, "Q"))
        )
        self._number(memory, at, code, mutator)
        self._seal(memory, 0, 8, 88)
        if dice.randrange(3) == 0:
            self._number(memory, 264, "Q", mutator)
            self._seal(memory, 256, 264, 272)

    def _length(self, memory: bytearray, mutator: Mutator, dice: random.Random) -> None:
        """Another size, and the head says so: odd, or next to nothing."""
        size = dice.choice((RECORDS + 1, RECORDS + 63, RECORDS + 64, RECORDS + 5000, SIZE - 1))
        size = dice.choice((size, SIZE + 31, RECORDS + dice.randrange(1, 3 * BLOCK)))
        del memory[size:]
        memory.extend(bytes(size - len(memory)))
        struct.pack_into("<Q", memory, 24, size)
        self._seal(memory, 0, 8, 88)
        mutator.said.append(f"the ring has {size} bytes")

    def _cursor(self, memory: bytearray, mutator: Mutator, dice: random.Random) -> None:
        for at in dice.choice((*CURSORS, sum(CURSORS, ()), *((at,) for at, _ in _CURSORS))):
            if len(memory) >= RECORDS:
                few = (1, 63, 64, len(memory) - RECORDS, 2**64 - 64, 2**63)
                self._number(memory, at + dice.choice((8, 16)), "Q", mutator, *few)
                self._seal(memory, at, at + 8, at + 24)

    def _record(self, memory: bytearray, mutator: Mutator, dice: random.Random) -> None:
        salts = [at for at in range(RECORDS, len(memory) - 64, 64) if any(memory[at : at + 44])]
        if not salts:
            return
        at = dice.choice(salts)
        where, code = dice.choice(((16, "Q"), (24, "Q"), (32, "Q"), (40, "I")))
        self._number(memory, at + where, code, mutator, 0, 1, self._rig.host.files["replica"].inode)
        if dice.randrange(2):
            (length,) = struct.unpack_from("<I", memory, at + 40)
            data = bytes(memory[at + 64 : at + 64 + min(length, len(memory))])
            struct.pack_into("<Q", memory, at + 32, xxhash.xxh3_64_intdigest(data))
        self._seal(memory, at, at + 8, at + 44)

    def _superblock(self, _memory: bytearray, mutator: Mutator, dice: random.Random) -> None:
        def change(data: bytearray) -> None:
            at, code = dice.choice(
                ((256, "Q"), (272, "Q"), (288, "I"), (296, "Q"), (304, "Q"), (312, "Q"))
            )
            self._number(data, at, code, mutator, 0, 1, 2)

        mutator._superblocks(change)

    def _state(self, _memory: bytearray, mutator: Mutator, dice: random.Random) -> None:
        data = bytearray(mutator._pages("state").read(0, COPY_SIZE))
        (length,) = struct.unpack_from("<I", data, 12)
        try:
            fields = json.loads(bytes(data[40 : 40 + length]))
            ring = fields["ring"]
        except (ValueError, KeyError, TypeError):
            return
        which = dice.randrange(5)
        if which < 4:
            strange = ("00" * 16, "", None, -1, 1.5, [], 2**64, mutator._number(64))
            ring[which : which + 1] = dice.choice(([dice.choice(strange)], [], [1, 2]))
        else:
            fields["boot"] = dice.choice(("00" * 16, "zz", 5, None))
        text = json.dumps(fields).encode()[:4048]
        data[40:4088] = text.ljust(4048, b"\0")
        struct.pack_into("<IxxxxxxxxxxxxxxxxQ", data, 12, len(text), 2**40)
        self._seal(data, len(data) - 8, 0, len(data) - 8)
        for copy in dice.choice(((0, 1), (0,), (1,))):
            mutator._put("state", copy * COPY_SIZE, bytes(data))
        mutator.said.append(f"state ring {ring}, boot {fields['boot']}")

    # -- judging ------------------------------------------------------------------------------

    def problem(self, rig: Rig, *, forged: bool) -> str:
        """What is wrong with rings and replica after it all, "" if nothing is."""
        memory = rig.host.memory
        assert isinstance(memory, Memory)
        if memory.unread and not {1043, 1054} & set(rig.log.ids("vsnapfs")):
            return f"rings {memory.unread} were removed unread"
        if forged:
            return ""
        content = raw_replica(rig)
        if not self._ring_changed:
            for left in memory.values():
                for offset, data in records_of(left) or ():
                    content = content[:offset] + data + content[offset + len(data) :]
            return "" if content == self._content else "acknowledged writes are lost"
        for number, allowed in enumerate(self._allowed):
            if content[number * SECTOR : (number + 1) * SECTOR] not in allowed:
                return f"sector {number} of the replica holds what was never written there"
        return ""


def untouched(host: Host) -> list[object]:
    """What an opening that is refused leaves as it is: all but the diff area, which it may heal."""
    files = [file.cache for name, file in host.files.items() if name != "area"]
    return [
        *((pages.size, dict(pages.pages)) for pages in files),
        *(bytes(memory) for memory in host.memory.values()),
    ]
