"""What always holds of an open volume, checked as a whole. For tests: it walks the whole index."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..diffarea.descriptors import ZERO_SPAN
from ..diffarea.index import SLOT_MASK, ZEROS

if TYPE_CHECKING:
    from .volume import Volume


def check(volume: Volume) -> None:
    """AssertionError if index, slots, preserved blocks and sizes contradict each other."""
    core, area = volume.core, volume.core.area
    if area is None or core.area_lock.locked():
        return
    points = [point.number for point in core.points]
    given_up = volume.protection.saved.given_up
    if volume.protection.is_online:
        assert all(point > given_up for point in points), "points that the next opening drops"
    blocks, _, slots = area.index.living(points)
    spans: dict[int, set[int]] = {}
    for block, slot in zip(blocks.tolist(), slots.tolist(), strict=True):
        spans.setdefault(slot & SLOT_MASK, set()).add(block // ZERO_SPAN if slot & ZEROS else -1)
    data = [slot for slot in slots.tolist() if not slot & ZEROS]
    assert len(set(data)) == len(data), "two copies in one slot"
    assert all(len(found) == 1 for found in spans.values()), "data and zeros in one slot"
    live = list(spans)
    taken = set(area.slots.taken_from(0))
    assert set(live) <= taken, "a live copy in a free slot"
    extra = taken - set(live) - volume.room.promised - set(area.unknown_slots)
    assert not set(volume.buffer.slots.values()) - volume.room.promised, "a slot taken twice"
    assert not extra, f"slots taken by nothing: {sorted(extra)[:5]}"
    assert area.slots.in_use == len(taken)
    assert area.used <= area.allocated <= area.maximum, "used ≤ allocated ≤ maximum"
    if points:
        newest = {int(block) for block in area.index.blocks_since(points[-1])}
        assert all(block in core.preserved for block in newest)
        assert len(core.preserved) == len(newest), "preserved blocks without a copy"
