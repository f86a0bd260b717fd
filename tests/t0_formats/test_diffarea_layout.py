"""Where things lie in a diff area: nothing overlaps, nothing is left over, and back again."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given

from vsnapfs.diffarea.layout import (
    HEADER_SIZE,
    MAX_AREA_SIZE,
    MAX_SLOTS,
    SECTOR_SIZE,
    SECTORS_PER_GROUP,
    SLOTS_BEFORE_TWIN,
    SLOTS_PER_GROUP,
    SLOTS_PER_SECTOR,
    SUPERBLOCK_OFFSETS,
    SUPERBLOCK_SIZE,
    TABLE_SIZE,
    Layout,
    is_block_size,
)

BLOCK_SIZES = [4096 << shift for shift in range(9)]
block_sizes = st.sampled_from(BLOCK_SIZES)
slot_numbers = st.integers(0, MAX_SLOTS - 1)
sizes = st.one_of(
    st.integers(0, MAX_AREA_SIZE),
    st.integers(0, 64 << 20),
    st.builds(
        lambda block, groups, slots, by: max(
            0, HEADER_SIZE + groups * Layout(block).group_size + slots * block + by
        ),
        block_sizes,
        st.integers(0, 4),
        st.integers(0, SLOTS_PER_GROUP),
        st.integers(-1, 1),
    ),
)


def test_only_powers_of_two_from_4_kib_to_1_mib_are_block_sizes() -> None:
    """Every other number is refused, neighbours and absurd ones included."""
    assert [size for size in range(1, (1 << 20) + 2) if is_block_size(size)] == BLOCK_SIZES
    assert not any(is_block_size(size) for size in (0, -4096, 2048, 2 << 20, 1 << 63))


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("slots", [32, 33, 2559, 2560, 2592, 2 * 2560, 2 * 2560 + 40])
def test_the_parts_of_an_area_touch_and_do_not_overlap(block_size: int, slots: int) -> None:
    """Superblocks, tables and slots, sorted, cover the area from its first byte to its last."""
    layout = Layout(block_size)
    parts = [(offset, SUPERBLOCK_SIZE) for offset in SUPERBLOCK_OFFSETS]
    for group in range(layout.groups_of(slots)):
        parts += [(offset, TABLE_SIZE) for offset in layout.table_offsets(group)]
    parts += [(layout.slot_offset(slot), block_size) for slot in range(slots)]
    end = 0
    for offset, length in sorted(parts):
        assert offset == end
        end += length
    assert end == layout.size_of(slots)


@given(block_sizes, sizes)
def test_slots_in_and_size_of_are_inverse(block_size: int, size: int) -> None:
    """As many slots as fit: their size is not above `size`, that of one more possible end is."""
    layout = Layout(block_size)
    slots = layout.slots_in(size)
    assert layout.slots_in(layout.size_of(slots)) == slots
    assert layout.valid_slots(slots) == slots or slots == 0
    if slots:
        assert layout.size_of(slots) <= size
    if slots < MAX_SLOTS:
        assert layout.size_of(layout.valid_slots(slots + 1)) > size


@given(block_sizes, sizes)
def test_size_and_slots_grow_together(block_size: int, size: int) -> None:
    """A larger area never has fewer slots."""
    layout = Layout(block_size)
    assert layout.slots_in(size) <= layout.slots_in(size + block_size)
    assert layout.slots_in(layout.minimum_size) == SLOTS_BEFORE_TWIN
    assert layout.slots_in(layout.minimum_size - 1) == 0


@given(block_sizes, st.integers(1, 1 << 20))
def test_an_area_never_ends_within_its_tables(block_size: int, wanted: int) -> None:
    """`valid_slots` is the next number of slots an area can end at; tables are always whole."""
    layout = Layout(block_size)
    slots = layout.valid_slots(wanted)
    assert slots >= wanted
    assert slots % SLOTS_PER_GROUP == 0 or slots % SLOTS_PER_GROUP >= SLOTS_BEFORE_TWIN
    assert slots - wanted < SLOTS_BEFORE_TWIN
    last_tables = layout.table_offsets(layout.groups_of(slots) - 1)
    assert last_tables[1] + TABLE_SIZE <= layout.size_of(slots)
    assert layout.metadata_size(slots) == layout.size_of(slots) - slots * block_size
    assert layout.group_end(slots) % SLOTS_PER_GROUP == 0
    assert 0 <= layout.group_end(slots) - slots < SLOTS_PER_GROUP


@given(block_sizes, slot_numbers, slot_numbers)
def test_two_slots_never_share_a_byte(block_size: int, one: int, other: int) -> None:
    """And they lie in the order of their numbers, each described by a place of its own."""
    layout = Layout(block_size)
    if one == other:
        return
    low, high = sorted((one, other))
    assert layout.slot_offset(low) + block_size <= layout.slot_offset(high)
    assert divmod(low, SLOTS_PER_SECTOR) != divmod(high, SLOTS_PER_SECTOR)


@given(block_sizes, st.integers(0, MAX_SLOTS // SLOTS_PER_SECTOR))
def test_the_two_copies_of_a_sector_are_far_apart(block_size: int, sector: int) -> None:
    """The twin lies a whole table and 32 blocks after the first copy, within its group's tables."""
    layout = Layout(block_size)
    group = sector // SECTORS_PER_GROUP
    first, twin = layout.sector_offsets(sector)
    assert twin - first == TABLE_SIZE + SLOTS_BEFORE_TWIN * block_size
    for offset, start in zip((first, twin), layout.table_offsets(group), strict=True):
        assert start <= offset <= start + TABLE_SIZE - SECTOR_SIZE
        assert (offset - start) % SECTOR_SIZE == 0
        assert offset % SECTOR_SIZE == 0, "or a power failure could tear it"
