"""Which operations, from which beginning, in which order.

Owns the alphabet of the exhaustive search, the volumes it begins with, and the long random
workloads. An operation that cannot apply (a restore without a point) says so by returning False:
the sequences that go on from there are those of a shorter one.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass

from rig import BLOCK, SMALLEST

from vsnapfs.diffarea.layout import SLOTS_BEFORE_TWIN, SLOTS_PER_GROUP, Layout
from vsnapfs.volume.ring import RECORDS

from .account import Play

Operation = Callable[[Play], Awaitable[bool]]
#: Two whole blocks and a short one.
SIZE = 2 * BLOCK + 700
#: Bytes of a write buffer: records of whole blocks wrap soon, and its end is no place for a record.
ODD_BUFFER = RECORDS + 4 * (BLOCK + 64) + 33


async def write_a(play: Play) -> bool:
    online = play.is_online
    await play.write((0, BLOCK))
    return online


async def write_ab(play: Play) -> bool:
    online = play.is_online
    await play.write((BLOCK - 700, 1200))
    return online


async def write_bc(play: Play) -> bool:
    online = play.is_online
    start = (len(play.content) // BLOCK) * BLOCK - 100
    await play.write((start, len(play.content) - start))
    return online


async def at_once(play: Play) -> bool:
    online = play.is_online
    await play.write((0, 600), (1000, 500), (BLOCK + 10, 30), (2 * BLOCK, 5))
    return online


async def write_ab_durably(play: Play) -> bool:
    """Through a handle with O_DSYNC."""
    online = play.is_online
    await play.write((BLOCK - 700, 1200), durably=True)
    return online


async def at_once_durably(play: Play) -> bool:
    """Whoever comes while a sync is under way waits for another."""
    online = play.is_online
    await play.write((0, 600), (1000, 500), (BLOCK + 10, 30), (2 * BLOCK, 5), durably=True)
    return online


async def flush(play: Play) -> bool:
    online = play.is_online
    await play.flush()
    return online


async def create(play: Play) -> bool:
    online = play.is_online
    await play.create()
    return online


async def delete_oldest(play: Play) -> bool:
    if not play.points:
        return False
    await play.delete(min(play.points))
    return True


async def delete_newest(play: Play) -> bool:
    if len(play.points) < 2:
        return False
    await play.delete(max(play.points))
    return True


async def restore_oldest(play: Play) -> bool:
    if not play.points or not play.is_online:
        return False
    await play.restore(min(play.points))
    return True


async def grow(play: Play) -> bool:
    await play.resize(play.volume.core.need_area().maximum + 24 * BLOCK)
    return True


async def shrink(play: Play) -> bool:
    area = play.volume.core.need_area()
    least = area.minimum_for_used
    if least >= area.maximum:
        return False
    await play.resize(least)
    return True


async def offline(play: Play) -> bool:
    if not play.is_online:
        return False
    await play.offline()
    return True


async def online(play: Play) -> bool:
    if play.is_online:
        return False
    await play.online()
    return True


async def reopen(play: Play) -> bool:
    await play.reopen()
    return True


async def kill(play: Play) -> bool:
    await play.kill()
    return True


async def carry_out(play: Play) -> bool:
    """What lies in the write buffer goes to the replica."""
    if not play.volume.buffer.pending:
        return False
    await play.carry_out()
    return True


async def carry_out_fails(play: Play) -> bool:
    """The next sync of the diff area fails when what lies in the write buffer is preserved."""
    if not play.volume.buffer.pending or not play.is_online:
        return False
    with play.failing_syncs("area"):
        await play.carry_out()
    return True


async def write_fails(play: Play) -> bool:
    """A write whose next sync of the diff area fails."""
    if not play.is_online:
        return False
    with play.failing_syncs("area"):
        await play.write((BLOCK - 700, 1200))
    return True


async def write_dies(play: Play) -> bool:
    """A write after which the diff area cannot be synced for a while: only the state file can."""
    if not play.is_online:
        return False
    with play.failing_syncs("area", for_good=True):
        await play.write((BLOCK - 700, 1200))
    return True


async def all_fails(play: Play) -> bool:
    """The same with every block."""
    if not play.is_online:
        return False
    with play.failing_syncs("area"):
        await play.write((0, len(play.content)))
    return True


async def create_fails(play: Play) -> bool:
    """A point whose commit fails at the second copy of the superblock."""
    if not play.is_online:
        return False
    with play.failing_syncs("area", nth=2):
        await play.create()
    return True


async def restore_fails(play: Play) -> bool:
    """A restore that is interrupted at a sync of the diff area after it has begun."""
    if not play.points or not play.is_online:
        return False
    with play.failing_syncs("area", nth=3):
        await play.restore(min(play.points))
    return True


async def flush_fails(play: Play) -> bool:
    """A flush that the disk of the replica refuses, having written half."""
    if not play.is_online:
        return False
    with play.failing_syncs("replica"):
        await play.flush()
    return True


async def create_while_writing(play: Play) -> bool:
    if not play.is_online or play.rig.config.on_full == "evict":
        return False
    # After a growth whose sync failed, the next copy is fault 7 or 13; here nothing may fail.
    if play.volume.core.need_area().needs_rollback or not has_room(play, 6):
        return False
    await play.create_while_writing(
        (0, 600, 3), (BLOCK + 10, 30, 6), (2 * BLOCK, 5, 8), (1000, 500, 9)
    )
    return True


def has_room(play: Play, count: int) -> bool:
    area = play.volume.core.need_area()
    return area.slots.free + area.growable_slots >= count


async def write_all(play: Play) -> bool:
    online = play.is_online
    await play.write((0, len(play.content)))
    return online


async def write_most(play: Play) -> bool:
    online = play.is_online
    await play.write((0, min(8 * BLOCK, len(play.content))))
    return online


async def grow_a_group(play: Play) -> bool:
    """To one group of slots more than the first."""
    layout = play.volume.core.need_area().layout
    total = layout.size_of(SLOTS_PER_GROUP + SLOTS_BEFORE_TWIN)
    if play.volume.core.need_area().maximum >= total:
        return False
    await play.resize(total)
    return True


async def fill(play: Play) -> bool:
    """Points and overwrites until a write is refused."""
    for _ in range(40):
        if not play.is_online:
            return True
        await play.create()
        await play.write((0, len(play.content)))
        if play.rig.config.on_full == "evict" and min(play.points, default=1) > 1:
            return True
    return True


def _direct(operation: Operation) -> Operation:
    """Only without a write buffer: what fails after it was acknowledged refuses nobody.

    (`t2_failures` has those failures.)
    """

    async def only_direct(play: Play) -> bool:
        return not play.rig.buffer and await operation(play)

    return only_direct


ALPHABET: dict[str, Operation] = {
    "A": write_a,
    "AB": write_ab,
    "BC": write_bc,
    "at-once": at_once,
    "AB-durably": write_ab_durably,
    "flush": flush,
    "create": create,
    "delete-oldest": delete_oldest,
    "delete-newest": delete_newest,
    "restore": restore_oldest,
    "grow": grow,
    "shrink": shrink,
    "offline": offline,
    "online": online,
    "reopen": reopen,
    "create-while-writing": create_while_writing,
    "carry-out": carry_out,
    "carry-out-fails": carry_out_fails,
    "AB-fails": write_fails,
    "AB-dies": write_dies,
    "create-fails": create_fails,
    "flush-fails": _direct(flush_fails),
}
#: Of these, sequences of four.
CORE = (
    "A",
    "AB",
    "BC",
    "create",
    "flush",
    "delete-oldest",
    "delete-newest",
    "restore",
    "reopen",
    "online",
    "carry-out",
)
#: Only in random workloads and to begin with.
MORE: dict[str, Operation] = {
    "kill": kill,
    "fill": fill,
    "all": write_all,
    "most": write_most,
    "all-fails": all_fails,
    "restore-fails": restore_fails,
    "grow-a-group": grow_a_group,
    "at-once-durably": at_once_durably,
}
OPERATIONS = ALPHABET | MORE


@dataclass(frozen=True)
class Beginning:
    """A volume that sequences start with: what was done with it before it was closed cleanly.

    device: the diff area is a block device of so many bytes. buffer: bytes of the write buffer.
    """

    done: tuple[str, ...]
    maximum: int = SMALLEST
    on_full: str = "offline"
    size: int = SIZE
    device: int = 0
    buffer: int = 0


def _rounds(count: int, *then: str) -> tuple[str, ...]:
    return "all", *(("create", "all") * count), *then


_FULL = ("all", *(("create", "all") * 2), "create", "most")
_LAYOUT = Layout(BLOCK)

BEGINNINGS: dict[str, Beginning] = {
    # Nothing but the replica's content: flushed, no point.
    "fresh": Beginning(("A", "AB", "BC", "flush")),
    # Writes are acknowledged in a write buffer, and carried out while the next operations run.
    "buffered": Beginning(("A", "AB", "BC", "create", "all", "create"), buffer=ODD_BUFFER),
    # The same, and points are given up where a copy of what was acknowledged cannot be made.
    "buffered-evict": Beginning(
        ("A", "AB", "BC", "create", "all", "create"), buffer=ODD_BUFFER, on_full="evict"
    ),
    # Three points, 30 of 32 slots taken, no way to grow: the third copy more is fault 8.
    "full": Beginning(_FULL, size=10 * BLOCK + 700),
    # The same, but points are given up instead.
    "evict": Beginning(_FULL, size=10 * BLOCK + 700, on_full="evict"),
    # Grown, and copies lie above where a shrink cuts: 14 points, of which the oldest are gone.
    "grown": Beginning(_rounds(14, *["delete-oldest"] * 12), maximum=SMALLEST + 32 * BLOCK),
    # 18 slots taken: the next three copies are described in two sectors.
    "two-sectors": Beginning(_rounds(6, "create")),
    # On a device, whose space is all there; one slot more is a new group with tables of its own.
    "device": Beginning(
        _rounds(1),
        maximum=_LAYOUT.size_of(SLOTS_PER_GROUP),
        device=_LAYOUT.size_of(SLOTS_PER_GROUP + SLOTS_BEFORE_TWIN) + BLOCK,
    ),
}


@dataclass(frozen=True)
class Workload:
    """A beginning and a sequence of operations. `explored`: the last so many are looked at."""

    beginning: str
    operations: tuple[str, ...]
    explored: int = 1

    def __str__(self) -> str:
        return f"{self.beginning}: {' '.join(self.operations)}"


def parse(text: str) -> Workload:
    """What `Workload.__str__` says. All of it is explored. ValueError."""
    beginning, _, rest = text.partition(":")
    operations = tuple(rest.split())
    if beginning not in BEGINNINGS or not operations or not set(operations) <= set(OPERATIONS):
        raise ValueError(
            f"not a workload: {text!r} (BEGINNING: OPERATION ..., of "
            f"{', '.join(BEGINNINGS)}: {', '.join(OPERATIONS)})"
        )
    return Workload(beginning, operations, len(operations))


def of_length(
    beginning: str, length: int, alphabet: Iterable[str] = ALPHABET
) -> Iterator[Workload]:
    """All sequences of exactly `length` operations of an alphabet."""
    for operations in itertools.product(alphabet, repeat=length):
        yield Workload(beginning, operations)


def at_random(dice: random.Random) -> Workload:
    """A long workload; the dice choose everything."""
    beginning = dice.choice(list(BEGINNINGS))
    weights = {"create": 4, "A": 2, "AB": 2, "BC": 2, "at-once": 3, "delete-oldest": 2, "online": 4}
    names = list(OPERATIONS)
    count = dice.randint(20, 60)
    chosen = dice.choices(names, [weights.get(name, 1) for name in names], k=count)
    return Workload(beginning, tuple(chosen), count)
