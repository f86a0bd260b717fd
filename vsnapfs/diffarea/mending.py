"""Mending what rotted in a diff area: each structure from a copy of it that is known to be right.

Owns the single writes of a repair. Promises that nothing is guessed (a structure is written only
from memory, from its valid twin, or with content that its descriptor names) and that a file which
was cut is not made to look whole. What can be mended and in which order is `volume.repair`'s.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping

from ..backing import Bytes
from ..errors import FaultCode, FaultError, FormatError
from .descriptors import Descriptor, SectorImage, sector_is_valid
from .layout import SECTOR_SIZE, SLOTS_PER_SECTOR, SUPERBLOCK_OFFSETS, SUPERBLOCK_SIZE
from .store import AreaStore
from .superblock import decode


class MendableStore(AreaStore):
    """An `AreaStore` of which single structures can be written anew."""

    def mend_superblock(self, offset: int) -> None:
        """Write the copy at `offset` once more as the other one is, durably. FaultError 13, 14, 15.

        Unlike a commit it changes nothing, so a closed volume stays one that was closed cleanly.
        """
        self.check_present()
        self._refuse_if_old()
        self._check_not_overtaken()
        (other,) = set(SUPERBLOCK_OFFSETS) - {offset}
        try:
            data = self.backing.read(other, SUPERBLOCK_SIZE)
            if decode(data) != self.superblock:
                raise FaultError(FaultCode.IO_FAILURE, "the other copy is not the current one")
            self.backing.write(offset, data)
            self._sync()
        except (FormatError, OSError) as error:
            raise FaultError(
                FaultCode.IO_FAILURE, f"the superblock copy could not be mended: {error}"
            ) from error

    def known_sector(self, sector: int) -> SectorImage | None:
        """A sector as memory has it, else its newer valid copy, None if there is neither."""
        try:
            return self._sector(sector)
        except FaultError:
            return None

    def has_rotted(self, sector: int) -> bool:
        """Whether both copies can be read and are bad, so that neither will come back by itself."""
        try:
            for offset in self.layout.sector_offsets(sector):
                data = self.backing.read(offset, SECTOR_SIZE)
                if sector_is_valid(memoryview(data), self.area_id, sector):
                    return False
        except OSError:
            return False
        return True

    def mend_sector(self, sector: int) -> None:
        """Make both copies of a sector what is known in memory or the newer valid one, durably.

        FaultError 2, 3 (both are bad and it is not in memory), 14, 15.
        """
        self.check_present()
        self._refuse_if_old()
        self.heal({sector: self._sector(sector)})

    def rebuild_sector(self, sector: int, copies: Mapping[int, Descriptor]) -> None:
        """Write a sector of which nothing is left from what slots are known to hold, durably.

        FaultError 2, 14, 15.
        """
        self.check_present()
        self._refuse_if_old()
        image = SectorImage.empty()
        for slot, descriptor in copies.items():
            image.put(slot - sector * SLOTS_PER_SECTOR, descriptor)
        image.seal(self.area_id, self.barrier_number, sector, 0)
        self.heal({sector: image})
        self._remember({sector: image})

    def rewrite_copy(self, slot: int, block: Bytes) -> None:
        """Write the content that a slot's descriptor names once more, durably.

        FaultError 3 (the file is cut), 7, 14, 15.
        """
        self.check_present()
        self._refuse_if_old()
        self.require_whole()
        try:
            self.backing.write(self.layout.slot_offset(slot), block)
            self._sync()
        except OSError as error:
            raise FaultError(
                FaultCode.COW_WRITE_FAILURE,
                f"the copy could not be written again: {error}",
                errno=error.errno or errno.EIO,
            ) from error

    def regain_space(self) -> None:
        """Reserve what a truncated file has lost, up to `allocated`. FaultError 10, 14."""
        self.check_present()
        self._refuse_if_old()
        try:
            size = self.backing.size()
            self.backing.allocate(size, max(0, self.superblock.allocated - size))
            self._sync()
        except OSError as error:
            raise FaultError(
                FaultCode.GROW_FAILED,
                f"the lost space could not be reserved again: {error}",
                errno=error.errno or errno.EIO,
            ) from error
