"""Which slot holds the copy of a block that a recovery point reads.

Owns the map (block, epoch) → slot in memory: sorted arrays of 12 bytes a copy ("runs"), plus a
small table of recent copies that is folded into a run now and then. Runs are merged so that
their sizes fall by a factor of four, so a lookup is a handful of binary searches whatever the
number of recovery points: point k at block b is the first key ≥ (b, k).

Entries may be stale (their point was deleted, their slot perhaps reused). A lookup for a *live*
point never meets one: a copy of epoch e belongs to the newest live point ≤ e, of two copies for
one point the lower epoch wins, and the lower epoch is what a lookup finds first.
`docs/durability.md` has the argument; `compact` drops the stale ones and tells their slots.

A slot with the bit `ZEROS` set means that the block was all zeros: nothing but a descriptor of
zeros lies in that slot, which serves up to 64 neighbours.

Plain synchronous Python. One thread changes it at a time; lookups may run in another, since
every change replaces `_state` as a whole or adds to `recent` only.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from mmap import MAP_ANONYMOUS, MAP_PRIVATE, mmap
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

EPOCH_BITS = 30
#: In a slot of the index: no data there, the block was all zeros.
ZEROS = 1 << 31
SLOT_MASK = ZEROS - 1
_EPOCH_MASK = (1 << EPOCH_BITS) - 1
_FOLD_AT = 8192
_MERGE_RATIO = 4
#: Entries that a walk over a run looks at in one go, so that its temporary arrays stay small.
_PIECE = 1 << 16

_PRIVATE = MAP_PRIVATE | MAP_ANONYMOUS

Keys = npt.NDArray[np.uint64]
Slots = npt.NDArray[np.uint32]


class Run(NamedTuple):
    """Copies sorted by key = block << 30 | epoch."""

    keys: Keys
    slots: Slots

    def epochs_of(self, block: int) -> npt.NDArray[np.uint64]:
        """The epochs of the copies of `block`, ascending."""
        ends = np.array([block << EPOCH_BITS, block << EPOCH_BITS | _EPOCH_MASK], dtype=np.uint64)
        first = self.keys.searchsorted(ends[0])
        last = self.keys.searchsorted(ends[1], side="right")
        return self.keys[first:last] & np.uint64(_EPOCH_MASK)

    def position(self, block: int, epoch: int, slot: int) -> int:
        """Where a copy that is in the run stands in it."""
        position = int(self.keys.searchsorted(np.uint64(block << EPOCH_BITS | epoch)))
        while self.slots[position] != slot:
            position += 1
        return position


_EMPTY = Run(np.empty(0, dtype=np.uint64), np.empty(0, dtype=np.uint32))


class RunBuilder:
    """Sorts descriptors into a run as a scan finds them.

    Millions of them: it takes 16 bytes a copy at its peak, where sorting rows by an index array
    would take 32. Block and slot are packed into one number and sorted in place, which leaves the
    copies of one block in the order of their slots; the epochs, kept by slot, then put right what
    little is out of order.
    """

    def __init__(self, blocks: int, slots: int) -> None:
        """blocks, slots: how many there are."""
        bits = max(slots - 1, 1).bit_length()
        self._bits = np.uint64(bits)
        # Beyond 64 bits, with more than 4 TiB of 4 KiB blocks preserved, the plain way must do.
        self._fits = bits + max(blocks - 1, 1).bit_length() <= 64
        self._packed = _Pile(np.uint64)
        self._epochs = _Pile(np.uint32)
        self._slots = 0

    def add(
        self, where: npt.NDArray[np.intp], blocks: Keys, epochs: npt.NDArray[np.uint32]
    ) -> None:
        """What the next `len(epochs)` slots hold: `blocks[i]` in the slot `where[i]` of these.

        epochs: of each slot, with the bit `ZEROS` set where blocks of zeros are described.
        """
        slots = where.astype(np.uint64) + np.uint64(self._slots)
        self._slots += len(epochs)
        if self._fits:
            self._packed.add((blocks << self._bits) | slots)
            self._epochs.add(epochs)
        else:
            part = epochs[where]
            self._packed.add((blocks << np.uint64(EPOCH_BITS)) | (part & np.uint32(_EPOCH_MASK)))
            self._epochs.add(slots.astype(np.uint32) | (part & np.uint32(ZEROS)))

    def finish(self) -> Run:
        """The run; of two copies of one block and epoch the lower slot comes first."""
        keys, epochs = self._packed.take(), self._epochs.take()
        if not self._fits:
            order = keys.argsort(kind="stable")
            return Run(keys[order], epochs[order])
        keys.sort()
        slots = np.empty(len(keys), dtype=np.uint32)
        mask = np.uint64((1 << int(self._bits)) - 1)
        for piece in _pieces(len(keys)):
            part, where = keys[piece], keys[piece] & mask
            found = epochs[where.astype(np.int64)]
            slots[piece] = where.astype(np.uint32) | (found & np.uint32(ZEROS))
            part >>= self._bits
            part <<= np.uint64(EPOCH_BITS)
            part |= found & np.uint32(_EPOCH_MASK)
        del epochs
        start = 0
        while start < len(keys):
            end = min(start + _PIECE, len(keys))
            if end < len(keys):  # A block's copies stay together.
                last = int(keys[end]) | _EPOCH_MASK
                end = int(keys.searchsorted(np.uint64(last), side="right"))
            part = keys[start:end]
            if (part[1:] < part[:-1]).any():
                order = part.argsort(kind="stable")
                keys[start:end] = part[order]
                slots[start:end] = slots[start:end][order]
            start = end
        return Run(keys, slots)


class _Pile:
    """A growing array in pages of its own: growing moves pages, not bytes, and what is given up
    goes back to the system (malloc keeps up to 64 MiB of what was freed once).
    """

    def __init__(self, dtype: type[np.uint64 | np.uint32]) -> None:
        self._dtype = np.dtype(dtype)
        self._pages: mmap | None = None
        self._length = 0
        self._parts: list[npt.NDArray[Any]] = []
        self._waiting = 0

    def add(self, part: npt.NDArray[Any]) -> None:
        self._parts.append(np.ascontiguousarray(part))
        self._waiting += len(part)
        if self._waiting >= 4 * _PIECE:
            self._move()

    def _move(self) -> None:
        start, size = self._length, self._dtype.itemsize
        self._length += self._waiting
        try:
            if self._pages is None:
                self._pages = mmap(-1, self._length * size, flags=_PRIVATE)
            else:
                self._pages.resize(self._length * size)
        except OSError as error:
            raise MemoryError("no memory for the index") from error
        place = np.frombuffer(self._pages, self._dtype, self._waiting, start * size)
        np.concatenate(self._parts, out=place)
        self._parts, self._waiting = [], 0

    def take(self) -> npt.NDArray[Any]:
        """All of it. Nothing is left here."""
        if self._waiting:
            self._move()
        pages, self._pages = self._pages, None
        return np.empty(0, self._dtype) if pages is None else np.frombuffer(pages, self._dtype)


class Index:
    """The map. Epochs only ever grow from one `add` to the next."""

    def __init__(self, run: Run = _EMPTY) -> None:
        runs = (run,) if len(run.keys) else ()
        # recent: block → [epoch << 32 | slot, …] ascending
        self._state: tuple[tuple[Run, ...], dict[int, list[int]]] = (runs, {})
        self._recent_count = 0
        #: The last `compact`: for which points, and the state it left.
        self._compacted: tuple[list[int], object] = [], None

    def __len__(self) -> int:
        """How many copies are recorded, stale ones included."""
        return sum(len(run.keys) for run in self._state[0]) + self._recent_count

    @property
    def nbytes(self) -> int:
        """Bytes of memory its runs take; the recent copies, at most a few thousand, not counted."""
        return sum(run.keys.nbytes + run.slots.nbytes for run in self._state[0])

    # -- lookups ----------------------------------------------------------------------------------

    def lookup(self, point: int, block: int) -> tuple[int, int] | None:
        """(epoch, slot) of the copy that `point` reads at `block`; None: the replica serves it.

        Here and elsewhere a slot may have the bit `ZEROS`.
        """
        runs, recent = self._state
        low = (block << EPOCH_BITS) | point
        for run in runs:
            # Older runs hold older epochs of a block, so the first hit is the lowest epoch.
            position = int(run.keys.searchsorted(np.uint64(low)))
            if position < len(run.keys):
                key = int(run.keys[position])
                if key >> EPOCH_BITS == block:
                    return key & _EPOCH_MASK, int(run.slots[position])
        for packed in recent.get(block, ()):
            if packed >> 32 >= point:
                return packed >> 32, packed & 0xFFFFFFFF
        return None

    def lookup_range(self, point: int, first: int, count: int) -> list[tuple[int, int] | None]:
        """`lookup` for `count` blocks from `first` on."""
        if count == 1:
            return [self.lookup(point, first)]
        runs, recent = self._state
        found: list[tuple[int, int] | None] = [None] * count
        blocks = np.arange(first, first + count, dtype=np.uint64)
        low = (blocks << np.uint64(EPOCH_BITS)) | np.uint64(point)
        for run in runs:
            positions = run.keys.searchsorted(low)
            inside = positions < len(run.keys)
            hits = np.zeros(count, dtype=bool)
            keys = run.keys[positions[inside]]
            hits[inside] = (keys >> np.uint64(EPOCH_BITS)) == blocks[inside]
            for where in np.flatnonzero(hits).tolist():
                if found[where] is None:
                    position = positions[where]
                    epoch = int(run.keys[position]) & _EPOCH_MASK
                    found[where] = epoch, int(run.slots[position])
        if recent:
            for where in range(count):
                if found[where] is None:
                    for packed in recent.get(first + where, ()):
                        if packed >> 32 >= point:
                            found[where] = packed >> 32, packed & 0xFFFFFFFF
                            break
        return found

    def blocks_since(self, epoch: int) -> Keys:
        """The blocks with a copy in `epoch` or later: sorted, unique, dtype uint64."""
        return np.concatenate([_EMPTY.keys, *self.parts_since(epoch)])

    def parts_since(self, epoch: int) -> Iterator[Keys]:
        """`blocks_since` in parts, one after the other: together they can take much memory."""
        keys, _ = self._everything()
        last = -1
        for piece in _pieces(len(keys)):
            part = keys[piece]
            blocks = part[(part & np.uint64(_EPOCH_MASK)) >= np.uint64(epoch)]
            blocks >>= np.uint64(EPOCH_BITS)
            first = np.ones(len(blocks), dtype=bool)
            first[1:] = blocks[1:] != blocks[:-1]
            if len(blocks):
                first[0] = int(blocks[0]) != last
                last = int(blocks[-1])
            yield blocks[first]

    # -- changes ----------------------------------------------------------------------------------

    def add(self, block: int, epoch: int, slot: int) -> None:
        """Record a copy made just now: `epoch` is the current one, the highest of this block."""
        recent = self._state[1]
        entry = (epoch << 32) | slot
        known = recent.get(block)
        if known is None:
            recent[block] = [entry]
        else:
            known.append(entry)
        self._recent_count += 1

    def wants_folding(self) -> bool:
        """True when `fold` is worth a call."""
        return self._recent_count >= _FOLD_AT

    def fold(self) -> None:
        """Turn the recent copies into a run and merge runs. No `add` may happen meanwhile."""
        runs, recent = self._state
        if not recent:
            return
        merged = [*runs, _run_of(recent)]
        while len(merged) > 1 and len(merged[-2].keys) < _MERGE_RATIO * len(merged[-1].keys):
            newer, older = merged.pop(), merged.pop()
            merged.append(_merge(older, newer))
        self._state = (tuple(merged), {})
        self._recent_count = 0
        self._compacted = [], None

    def move(self, moves: Sequence[tuple[int, int, int]]) -> None:
        """Copies moved: (block, epoch, new slot) each. No `add` may happen meanwhile."""
        self.fold()
        runs = self._state[0]
        wanted = np.array([(b << EPOCH_BITS) | e for b, e, _ in moves], dtype=np.uint64)
        slots = np.array([slot for _, _, slot in moves], dtype=np.uint32)
        replaced = []
        for run in runs:
            positions = run.keys.searchsorted(wanted)
            inside = positions < len(run.keys)
            inside[inside] = run.keys[positions[inside]] == wanted[inside]
            fresh = run.slots.copy()
            fresh[positions[inside]] = slots[inside]
            replaced.append(Run(run.keys, fresh))
        self._state = (tuple(replaced), {})
        self._compacted = [], None

    def compact(self, points: Sequence[int]) -> None:
        """Keep only what the live `points` (ascending) can read. No `add` may happen meanwhile."""
        keys, slots = self._everything()
        kept = live_copies(keys, points)
        run = Run(keys, slots) if kept.all() else Run(keys[kept], slots[kept])
        self._state = ((run,) if len(run.keys) else (), {})
        self._recent_count = 0
        self._compacted = list(points), self._state

    # -- whole views ------------------------------------------------------------------------------

    def everything(self) -> tuple[Keys, npt.NDArray[np.uint64], Slots]:
        """(blocks, epochs, slots) of all recorded copies, sorted by block and epoch."""
        keys, slots = self._everything()
        return keys >> np.uint64(EPOCH_BITS), keys & np.uint64(_EPOCH_MASK), slots

    def living(self, points: Sequence[int]) -> tuple[Keys, npt.NDArray[np.uint64], Slots]:
        """`everything`, but only the copies that the live `points` (ascending) can read."""
        keys, slots = self._everything()
        kept = live_copies(keys, points)
        keys = keys[kept]
        return keys >> np.uint64(EPOCH_BITS), keys & np.uint64(_EPOCH_MASK), slots[kept]

    def live_slots(self, points: Sequence[int]) -> Slots:
        """The slots that the live `points` (ascending) can read, without `ZEROS`."""
        keys, slots = self._everything()
        known, state = self._compacted
        if state is not self._state or self._recent_count or known != list(points):
            slots = slots[live_copies(keys, points)]
        return slots & np.uint32(SLOT_MASK)

    def _everything(self) -> tuple[Keys, Slots]:
        runs, recent = self._state
        parts = [*runs, _run_of(recent)] if recent else list(runs)
        whole = _EMPTY
        for part in parts:
            whole = _merge(whole, part)
        return whole.keys, whole.slots


def live_copies(keys: Keys, points: Sequence[int]) -> npt.NDArray[np.bool_]:
    """Which of the sorted `keys` some live point reads.

    A copy of epoch e belongs to the newest live point ≤ e (none: stale); of several copies of a
    block for one point only the first, with the lowest epoch, is read.
    """
    if not len(keys) or not points:
        return np.zeros(len(keys), dtype=bool)
    numbers = np.array(points, dtype=np.uint64)
    result = np.empty(len(keys), dtype=bool)
    for piece in _pieces(len(keys)):
        begin = max(piece.start - 1, 0)  # the one before decides whether the first is a first
        part = keys[begin : piece.stop]
        epochs = part & np.uint64(_EPOCH_MASK)
        owners = numbers.searchsorted(epochs, side="right")  # 0: older than every live point
        blocks = part >> np.uint64(EPOCH_BITS)
        first = np.ones(len(part), dtype=bool)
        first[1:] = (blocks[1:] != blocks[:-1]) | (owners[1:] != owners[:-1])
        result[piece] = (first & (owners > 0))[piece.start - begin :]
    return result


def _pieces(count: int) -> Iterator[slice]:
    for start in range(0, count, _PIECE):
        yield slice(start, min(start + _PIECE, count))


def _run_of(recent: dict[int, list[int]]) -> Run:
    pairs: Iterable[tuple[int, int]] = (
        ((block << EPOCH_BITS) | (packed >> 32), packed & 0xFFFFFFFF)
        for block, entries in recent.items()
        for packed in entries
    )
    ordered = sorted(pairs)
    keys = np.fromiter((key for key, _ in ordered), dtype=np.uint64, count=len(ordered))
    slots = np.fromiter((slot for _, slot in ordered), dtype=np.uint32, count=len(ordered))
    return Run(keys, slots)


def _merge(older: Run, newer: Run) -> Run:
    if not len(older.keys):
        return newer
    if not len(newer.keys):
        return older
    # Where the newer ones go; among equal keys the older one stays first.
    places = older.keys.searchsorted(newer.keys, side="right")
    places += np.arange(len(places))
    rest = np.ones(len(older.keys) + len(newer.keys), dtype=bool)
    rest[places] = False
    keys, slots = np.empty(len(rest), dtype=np.uint64), np.empty(len(rest), dtype=np.uint32)
    keys[places], keys[rest] = newer.keys, older.keys
    slots[places], slots[rest] = newer.slots, older.slots
    return Run(keys, slots)
