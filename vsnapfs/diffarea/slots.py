"""Which slots are taken. One byte a slot, searched in C.

Owns the count behind "used". A slot is taken from the moment it is reserved for a copy until the
deletion that frees it is durable in both superblocks (promise C1, and no copy is ever overwritten
while a superblock that could still become valid needs it).
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

_PIECE = 1 << 16


class SlotMap:
    """The slots 0 … count-1 of the allocated area."""

    def __init__(self, count: int) -> None:
        self._taken = bytearray(count)
        self._cursor = 0
        self.in_use = 0
        #: While shrinking: only slots below it are given out.
        self.limit: int | None = None
        #: How often `keep_only` has freed what only deleted points needed.
        self.sweeps = 0

    def __len__(self) -> int:
        """How many slots there are."""
        return len(self._taken)

    @property
    def nbytes(self) -> int:
        """Bytes of memory it takes."""
        return len(self._taken)

    @property
    def free(self) -> int:
        """How many of them can be reserved."""
        if self.limit is not None:
            return self._taken.count(0, 0, self.limit)
        return len(self._taken) - self.in_use

    def is_taken(self, slot: int) -> bool:
        """Whether `slot` is reserved or holds a copy."""
        return bool(self._taken[slot])

    def reserve(self, count: int) -> list[int] | None:
        """Take `count` slots, all or none (None). Mostly ascending, so that writes are long."""
        end = len(self._taken) if self.limit is None else self.limit
        if count > self.free:
            return None
        first = cursor = min(self._cursor, end)
        slots: list[int] = []
        wrapped = False
        while len(slots) < count:
            slot = self._taken.find(0, cursor, end)
            if slot < 0:
                if wrapped:
                    return None
                wrapped, cursor, end = True, 0, first
                continue
            slots.append(slot)
            cursor = slot + 1
        # What memory may lack for comes before: a count that is wrong by one would promise room
        # that is never found.
        in_use = self.in_use + count
        for slot in slots:
            self._taken[slot] = 1
        self.in_use, self._cursor = in_use, cursor
        return slots

    def take(self, slots: npt.NDArray[np.uint32]) -> None:
        """Mark slots that a scan found in use."""
        view = np.frombuffer(self._taken, dtype=np.uint8)
        _mark(view, slots)
        self.in_use = int(np.count_nonzero(view))

    def release(self, slots: Iterable[int]) -> None:
        """Give slots back."""
        for slot in slots:
            self.in_use -= self._taken[slot]
            self._taken[slot] = 0
        self._cursor = 0

    def keep_only(self, slots: npt.NDArray[np.uint32], also: Iterable[int] = ()) -> int:
        """Free all but `slots` and `also`. Returns how many became free."""
        before = self.in_use
        taken = bytearray(len(self._taken))
        view = np.frombuffer(taken, dtype=np.uint8)
        _mark(view, slots)
        for slot in also:
            view[slot] = 1
        in_use = int(np.count_nonzero(view))
        self._taken, self.in_use, self._cursor = taken, in_use, 0
        self.sweeps += 1
        return before - self.in_use

    def resize(self, count: int) -> None:
        """The area has grown or shrunk to `count` slots. Slots cut off must be free."""
        if count < len(self._taken):
            if self._taken.find(1, count) >= 0:
                raise AssertionError("a slot that is cut off is still taken")
            del self._taken[count:]
        elif not self._taken:
            self._taken = bytearray(count)
        else:
            self._taken.extend(bytes(count - len(self._taken)))
        self._cursor = 0

    def taken_from(self, first: int) -> list[int]:
        """The taken slots ≥ `first`, ascending."""
        found = []
        slot = self._taken.find(1, first)
        while slot >= 0:
            found.append(slot)
            slot = self._taken.find(1, slot + 1)
        return found


def _mark(view: npt.NDArray[np.uint8], slots: npt.NDArray[np.uint32]) -> None:
    # In pieces: numpy turns an array used as an index into one of 64 bits first.
    for start in range(0, len(slots), _PIECE):
        view[slots[start : start + _PIECE]] = 1
