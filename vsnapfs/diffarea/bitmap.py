"""A set of block numbers, as bits in small pages: compact when dense, bounded when sparse.

Owns nothing but memory: 4096 blocks to a page of 512 bytes, pages only where something is set.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_SHIFT = 12
_MASK = (1 << _SHIFT) - 1
_PAGE = (1 << _SHIFT) // 8


class BlockSet:
    """Which blocks have some property (preserved in this epoch, space reserved, …)."""

    __slots__ = ("_pages",)

    def __init__(self) -> None:
        self._pages: dict[int, bytearray] = {}

    def __contains__(self, block: int) -> bool:
        page = self._pages.get(block >> _SHIFT)
        if page is None:
            return False
        bit = block & _MASK
        return bool(page[bit >> 3] & (1 << (bit & 7)))

    def add(self, block: int) -> None:
        """Put `block` in."""
        page = self._pages.get(block >> _SHIFT)
        if page is None:
            page = self._pages[block >> _SHIFT] = bytearray(_PAGE)
        bit = block & _MASK
        page[bit >> 3] |= 1 << (bit & 7)

    def missing(self, first: int, last: int) -> list[int]:
        """The blocks from `first` to `last` (inclusive) that are not in the set, ascending."""
        return [block for block in range(first, last + 1) if block not in self]

    def update(self, blocks: npt.NDArray[np.uint64]) -> None:
        """Put in many blocks (any order, any length)."""
        if not len(blocks):
            return
        ordered = np.unique(blocks)
        pages = ordered >> np.uint64(_SHIFT)
        starts = np.flatnonzero(np.diff(pages)) + 1
        for part in np.split(ordered, starts):
            number = int(part[0]) >> _SHIFT
            flags = np.zeros(1 << _SHIFT, dtype=np.uint8)
            flags[(part & np.uint64(_MASK)).astype(np.int64)] = 1
            bits = np.packbits(flags, bitorder="little")
            old = self._pages.get(number)
            if old is not None:
                bits |= np.frombuffer(old, dtype=np.uint8)
            self._pages[number] = bytearray(bits.tobytes())

    def clear(self) -> None:
        """Empty the set."""
        self._pages = {}

    def __len__(self) -> int:
        """How many blocks are in the set."""
        return sum(int.from_bytes(page, "little").bit_count() for page in self._pages.values())
