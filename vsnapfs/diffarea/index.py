"""Which slot holds the copy of a block that a recovery point reads.

Owns the map (block, epoch) → slot in memory: sorted arrays of 12 bytes a copy ("runs"), plus a
small table of recent copies that is folded into a run now and then. Runs are merged so that
their sizes fall by a factor of four, so a lookup is a handful of binary searches whatever the
number of recovery points: point k at block b is the first key ≥ (b, k).

Entries may be stale (their point was deleted, their slot perhaps reused). A lookup for a *live*
point never meets one: a copy of epoch e belongs to the newest live point ≤ e, of two copies for
one point the lower epoch wins, and the lower epoch is what a lookup finds first.
`docs/durability.md` has the argument; `compact` drops the stale ones and tells their slots.

Plain synchronous Python. One thread changes it at a time; lookups may run in another, since
every change replaces `_state` as a whole or adds to `recent` only.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

EPOCH_BITS = 30
_EPOCH_MASK = (1 << EPOCH_BITS) - 1
_FOLD_AT = 8192
_MERGE_RATIO = 4

Keys = npt.NDArray[np.uint64]
Slots = npt.NDArray[np.uint32]


class Run(NamedTuple):
    """Copies sorted by key = block << 30 | epoch."""

    keys: Keys
    slots: Slots


_EMPTY = Run(np.empty(0, dtype=np.uint64), np.empty(0, dtype=np.uint32))


def make_run(blocks: Keys, epochs: npt.NDArray[np.uint64], slots: Slots) -> Run:
    """A run from three arrays of the same length, in any order."""
    keys = (blocks << np.uint64(EPOCH_BITS)) | epochs
    order = np.argsort(keys, kind="stable")
    return Run(keys[order], slots[order])


class Index:
    """The map. Epochs only ever grow from one `add` to the next."""

    def __init__(self, run: Run = _EMPTY) -> None:
        runs = (run,) if len(run.keys) else ()
        # recent: block → [epoch << 32 | slot, …] ascending
        self._state: tuple[tuple[Run, ...], dict[int, list[int]]] = (runs, {})
        self._recent_count = 0

    def __len__(self) -> int:
        """How many copies are recorded, stale ones included."""
        return sum(len(run.keys) for run in self._state[0]) + self._recent_count

    # -- lookups ----------------------------------------------------------------------------------

    def lookup(self, point: int, block: int) -> tuple[int, int] | None:
        """(epoch, slot) of the copy that `point` reads at `block`; None: the replica serves it."""
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
        keys, _ = self._everything()
        chosen = keys[(keys & np.uint64(_EPOCH_MASK)) >= np.uint64(epoch)]
        return np.unique(chosen >> np.uint64(EPOCH_BITS))

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

    def compact(self, points: Sequence[int]) -> None:
        """Keep only what the live `points` (ascending) can read. No `add` may happen meanwhile."""
        keys, slots = self._everything()
        kept = live_copies(keys, points)
        run = Run(keys[kept], slots[kept])
        self._state = ((run,) if len(run.keys) else (), {})
        self._recent_count = 0

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
        """The slots that the live `points` (ascending) can read."""
        keys, slots = self._everything()
        return slots[live_copies(keys, points)]

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
    epochs = keys & np.uint64(_EPOCH_MASK)
    numbers = np.array(points, dtype=np.uint64)
    owners = numbers.searchsorted(epochs, side="right")  # 0: older than every live point
    blocks = keys >> np.uint64(EPOCH_BITS)
    first = np.ones(len(keys), dtype=bool)
    first[1:] = (blocks[1:] != blocks[:-1]) | (owners[1:] != owners[:-1])
    result: npt.NDArray[np.bool_] = first & (owners > 0)
    return result


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
    keys = np.concatenate((older.keys, newer.keys))
    # A stable sort of two sorted halves is one merge pass.
    order = np.argsort(keys, kind="stable")
    return Run(keys[order], np.concatenate((older.slots, newer.slots))[order])
