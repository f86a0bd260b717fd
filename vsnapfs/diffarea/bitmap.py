"""A set of block numbers that stays small: two bytes a block when sparse, a bit when dense.

Owns nothing but memory: 65536 blocks to a page, pages only where something is set. A page with few
blocks is a sorted array of 16-bit numbers, one with many is a bitmap of 8 KiB (the containers of a
Roaring bitmap, Chambi and others 2016).
"""

from __future__ import annotations

import sys
from array import array
from bisect import bisect_left

import numpy as np
import numpy.typing as npt

_SHIFT = 16
_MASK = (1 << _SHIFT) - 1
_BITMAP = (1 << _SHIFT) // 8
#: The most numbers in an array: with more of them the bitmap is smaller.
_SPARSE = _BITMAP // 2


class BlockSet:
    """Which blocks have some property (preserved in this epoch, space reserved, …)."""

    __slots__ = ("_pages",)

    def __init__(self) -> None:
        self._pages: dict[int, bytearray | array[int]] = {}

    def __contains__(self, block: int) -> bool:
        page = self._pages.get(block >> _SHIFT)
        if page is None:
            return False
        low = block & _MASK
        if type(page) is bytearray:
            return bool(page[low >> 3] & (1 << (low & 7)))
        at = bisect_left(page, low)
        return at < len(page) and page[at] == low

    def add(self, block: int) -> None:
        """Put `block` in."""
        page = self._pages.get(block >> _SHIFT)
        low = block & _MASK
        if page is None:
            self._pages[block >> _SHIFT] = array("H", (low,))
        elif type(page) is bytearray:
            page[low >> 3] |= 1 << (low & 7)
        else:
            at = bisect_left(page, low)
            if at < len(page) and page[at] == low:
                return
            page.insert(at, low)
            if len(page) > _SPARSE:
                self._pages[block >> _SHIFT] = _bitmap(np.frombuffer(page, dtype=np.uint16))

    def missing(self, first: int, last: int) -> list[int]:
        """The blocks from `first` to `last` (inclusive) that are not in the set, ascending."""
        return [block for block in range(first, last + 1) if block not in self]

    def update(self, blocks: npt.NDArray[np.uint64]) -> None:
        """Put in many blocks (any order, any length)."""
        if not len(blocks):
            return
        if not (blocks[1:] > blocks[:-1]).all():
            blocks = np.unique(blocks)
        pages = blocks >> np.uint64(_SHIFT)
        starts = np.flatnonzero(pages[1:] != pages[:-1]) + 1
        for part in np.split(blocks, starts):
            number = int(part[0]) >> _SHIFT
            lows = (part & np.uint64(_MASK)).astype(np.uint16)
            old = self._pages.get(number)
            if type(old) is bytearray:
                merged = np.frombuffer(old, dtype=np.uint8)
                merged |= np.frombuffer(_bitmap(lows), dtype=np.uint8)
                continue
            if old is not None:
                lows = np.union1d(lows, np.frombuffer(old, dtype=np.uint16))
            few = len(lows) <= _SPARSE
            self._pages[number] = array("H", lows.tobytes()) if few else _bitmap(lows)

    def clear(self) -> None:
        """Empty the set."""
        self._pages = {}

    @property
    def nbytes(self) -> int:
        """Bytes of memory it takes."""
        return sys.getsizeof(self._pages) + sum(map(sys.getsizeof, self._pages.values()))

    def __len__(self) -> int:
        """How many blocks are in the set."""
        return sum(
            int.from_bytes(page, "little").bit_count() if type(page) is bytearray else len(page)
            for page in self._pages.values()
        )


def _bitmap(lows: npt.NDArray[np.uint16]) -> bytearray:
    flags = np.zeros(1 << _SHIFT, dtype=np.uint8)
    flags[lows] = 1
    return bytearray(np.packbits(flags, bitorder="little").data)
