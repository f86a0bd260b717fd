"""The plain model that t1's state machine compares the engine with."""

from __future__ import annotations

from unsynced import Sector, tear


class Model:
    """What must be there."""

    def __init__(self, size: int) -> None:
        self.content = bytearray(size)
        self.points: dict[int, bytes] = {}
        self.newest = 0
        self.offline = False
        self.fault: int | None = None
        #: sector → what a power failure may leave there besides the present content.
        self.unsynced: dict[int, Sector] = {}

    def sector(self, number: int) -> bytes:
        return bytes(self.content[number * 512 : (number + 1) * 512])

    def about_to_write(self, offset: int, data: bytes) -> None:
        """From now on a power failure may leave the old or the new content in each sector."""
        for number, start, part in tear(offset, data):
            now, known = self.sector(number), self.unsynced.get(number)
            if known is None:
                known = Sector.exactly(now)
            elif known.newest != now:
                # A write before this one was refused or is still under way: without it, too.
                known = known.overwritten(0, now)
            self.unsynced[number] = known.overwritten(start, part)

    def written(self, offset: int, data: bytes, *, durably: bool = False) -> None:
        """It was answered. durably: through a handle with O_DSYNC, so it cannot be lost."""
        self.content[offset : offset + len(data)] = data
        for number, start, part in tear(offset, data) if durably else ():
            # Gone from here if somebody has flushed meanwhile.
            if number in self.unsynced:
                self.unsynced[number] = self.unsynced[number].kept(start, part)

    def issued_again(self) -> None:
        """The process was killed: the next opening carries out once more what may have been
        carried out before. A power failure then may leave an older write over a newer one.
        """
        self.unsynced = {n: sector.issued_again() for n, sector in self.unsynced.items()}

    def synced(self) -> None:
        self.unsynced = {}

    def accept(self, actual: bytes) -> None:
        """After a power failure: every sector is one of those that may be there."""
        assert len(actual) == len(self.content)
        for number in range(-(-len(actual) // 512)):
            found = actual[number * 512 : (number + 1) * 512]
            if found != self.sector(number):
                assert number in self.unsynced, f"sector {number} was never written"
                assert found in self.unsynced[number], f"sector {number}: {found[:32]!r}"
        self.content = bytearray(actual)
        self.synced()


class InFlight:
    """What an operation that was interrupted may have done."""

    def __init__(self) -> None:
        self.writes: list[tuple[int, bytes]] = []
        self.created = False
        self.deleted: set[int] = set()
        self.restoring: int | None = None
        self.switches = False
