"""Which events there are: source, id, level, and what Windows wraps around them.

Owns the list of events. Ids, levels and sources of volsnap and Ntfs are the real ones; those of
`vsnapfs` are ours. Promises that every entry has a sentence in every language (`sentences_en`,
`sentences_ja`; a test compares them). Leaves wording to those, form to `render`.

The params a sentence knows, each optional:

    volume, diff_area, device, mountpoint   paths; `volume` is the volume's directory, which the
                                            commands in a sentence are given
    used, allocated, maximum                bytes: the three sizes of the diff area
    size, old, new                          bytes: the replica's size; sizes before and after
    block, needed                           the block; how many blocks were still to be preserved
    offset, length                          bytes: the write that tripped it, or the range meant
    errno, reason                           why, as a number and in words
    fault, fault_name                       VSS_PROTECTION_FAULT
    point, label                            the recovery point meant
    points, dropped                         recovery points, as a count or a list of numbers
    count                                   of points; in 64, 66 of blocks to write; in 1042 of
                                            damaged copies; in 1047 of writes that wait
    seconds                                 how long something took, or has taken so far
    kept                                    in 1042, like `dropped` there: of preserved blocks
    repeats                                 how often it happened again
    what, text                              what was being done or is affected; free words
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from vsnapfs.events.event import Level


class Source(StrEnum):
    """Who reports, in Windows' words."""

    VOLSNAP = "volsnap"
    NTFS = "Ntfs"
    WINDOWS_NTFS = "Microsoft-Windows-Ntfs"
    VSNAPFS = "vsnapfs"


@dataclass(frozen=True)
class Entry:
    """What is fixed about one kind of event."""

    source: Source
    event_id: int
    level: Level

    @property
    def key(self) -> tuple[str, int]:
        """What it is looked up by: source and id."""
        return str(self.source), self.event_id


_LEVELS: dict[Source, dict[Level, tuple[int, ...]]] = {
    Source.VOLSNAP: {
        Level.ERROR: (8, 14, 25, 35, 36, *range(80, 95)),
        Level.WARNING: (24, 38, 61),
        Level.INFORMATION: (33, 58, 64, 65, 66),
    },
    Source.WINDOWS_NTFS: {
        Level.WARNING: (140,),
        Level.INFORMATION: (98,),
    },
    Source.NTFS: {
        Level.ERROR: (137,),
        Level.WARNING: (50, 57),
    },
    Source.VSNAPFS: {
        Level.ERROR: (1040, 1043, 1044, 1045, 1050, 1060, 1090),
        Level.WARNING: (1022, 1041, 1042, 1047, 1048, 1049, 1051, 1052, 1053, 1054, 1055, 1091),
        Level.INFORMATION: (1000, 1001, 1002, 1010, 1011, 1020, 1021, 1023, 1030),
    },
}

CATALOG: dict[tuple[str, int], Entry] = {
    entry.key: entry
    for source, levels in _LEVELS.items()
    for level, ids in levels.items()
    for entry in sorted((Entry(source, number, level) for number in ids), key=lambda e: e.event_id)
}
"""Every kind of event, by (source, id)."""


def lookup(source: str, event_id: int) -> Entry | None:
    """The catalog's entry, None when there is none."""
    return CATALOG.get((str(source), event_id))


def channel(source: str) -> str:
    """The Windows log that the source writes to."""
    return "Application" if source == Source.VSNAPFS else "System"
