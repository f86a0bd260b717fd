"""What a sector may hold after the power has failed, while writes to it are not synced.

Owns that question for every model of the tests. A `Sector` is the content it had when it was last
synced, and the writes since then in the order in which they were issued. Any of them may be lost,
the newest with the older ones kept, too: it may hold what any subset of them leaves, laid over
each other in their order. n writes have up to 2**n such contents, so these are never made. A
`Sector` has one entry a write, shared with the `Sector` before that write, and finds out about one
content when it is asked.

How it finds out loses nothing: it accepts exactly the contents of the subsets. From the newest
write to the oldest, a write whose bytes are all found where no newer kept one lies can be taken as
kept: that lays down bytes which are right, and asks less of what is older. A write with a wrong
byte there cannot be kept; if it is one that must be (it was synced by itself, O_DSYNC), the content
is none of these. What no kept write covers must be what was synced.

What it cannot tell apart no list of the subsets could: which of two equal contents it is, and
whether writes that nobody let overlap in time reached the disk in another order than was issued.
"""

from __future__ import annotations

from collections.abc import Iterator

SECTOR = 512


class Sector:
    """The contents that one sector may have; `content in sector` asks. Never changes."""

    __slots__ = ("before", "is_kept", "newest", "part", "start")

    def __init__(
        self,
        before: Sector | None,
        start: int,
        part: bytes,
        newest: bytes,
        *,
        is_kept: bool = False,
    ) -> None:
        """newest: the content if nothing is lost. Use `exactly`, `overwritten` and `kept`."""
        self.before = before
        self.is_kept = is_kept
        self.start = start
        self.part = part
        self.newest = newest

    @classmethod
    def exactly(cls, content: bytes) -> Sector:
        """Synced: this and nothing else."""
        return cls(None, 0, content, content)

    def overwritten(self, start: int, part: bytes) -> Sector:
        """The same after a write to it that is not synced."""
        end = start + len(part)
        assert end <= len(self.newest)
        return Sector(self, start, part, self.newest[:start] + part + self.newest[end:])

    def kept(self, start: int, part: bytes) -> Sector:
        """The same once that write cannot be lost any more. Of the others nothing is known.

        Of several equal ones that may still be lost it is taken for the oldest: should it have been
        another, this accepts more than there can be, and never less.
        """
        entries = list(self.entries())
        equal = [n for n, e in enumerate(entries) if (e.start, e.part) == (start, part)]
        place = max((n for n in equal if not entries[n].is_kept), default=equal[0])
        found = entries[-1]
        for number in range(len(entries) - 2, -1, -1):
            one = entries[number]
            is_kept = one.is_kept or number == place
            found = Sector(found, one.start, one.part, one.newest, is_kept=is_kept)
        return found

    def issued_again(self) -> Sector:
        """The same after its writes have been issued a second time, in their order.

        Not those that were made durable by themselves, nor what is older: nobody has them any more.
        """
        again: dict[tuple[int, bytes], None] = {}
        for entry in self.entries():
            if entry.before is None or entry.is_kept:
                break
            again.setdefault((entry.start, entry.part))
        found = self
        for start, part in reversed(again):
            found = found.overwritten(start, part)
        assert found.newest == self.newest
        return found

    def entries(self) -> Iterator[Sector]:
        """Its writes, the newest first, and at last what was synced."""
        entry: Sector | None = self
        while entry is not None:
            yield entry
            entry = entry.before

    def __contains__(self, content: bytes) -> bool:
        if content == self.newest:
            return True
        if len(content) != len(self.newest):
            return False
        found = int.from_bytes(content, "little")
        open_bits = (1 << 8 * len(content)) - 1  # of the bytes that no kept write has laid down
        for entry in self.entries():
            bits = (1 << 8 * len(entry.part)) - 1 << 8 * entry.start
            part = int.from_bytes(entry.part, "little") << 8 * entry.start
            if not (found ^ part) & bits & open_bits:
                open_bits &= ~bits
                if not open_bits:
                    return True
            elif entry.is_kept:
                return False
        return False


Sectors = tuple[Sector, ...]


def sectors_of(content: bytes) -> Sectors:
    """Each sector exactly as it is."""
    return tuple(Sector.exactly(content[at : at + SECTOR]) for at in range(0, len(content), SECTOR))


def tear(offset: int, data: bytes) -> Iterator[tuple[int, int, bytes]]:
    """(sector, where in it, its part of the data) of a write."""
    position = 0
    while position < len(data):
        number, start = divmod(offset + position, SECTOR)
        part = data[position : position + SECTOR - start]
        yield number, start, part
        position += len(part)


def overwritten(sectors: Sectors, offset: int, data: bytes) -> Sectors:
    """After a write that is not synced: each sector that it touches may hold the old or the new."""
    found = list(sectors)
    for number, start, part in tear(offset, data):
        found[number] = found[number].overwritten(start, part)
    return tuple(found)


def made_durable(sectors: Sectors, offset: int, data: bytes) -> Sectors:
    """After that write, which came before, has been made durable by itself."""
    found = list(sectors)
    for number, start, part in tear(offset, data):
        found[number] = found[number].kept(start, part)
    return tuple(found)
