"""The tests' own account of what a power failure may leave: exact, and of a bounded size."""

from __future__ import annotations

import itertools
import random

from hypothesis import given
from hypothesis import strategies as st
from rig import pattern
from unsynced import SECTOR, Sector, overwritten, sectors_of
from volume_model import Model

LENGTH = 5
contents = st.binary(min_size=LENGTH, max_size=LENGTH).map(lambda b: bytes(x % 3 for x in b))
ranges = st.tuples(st.integers(0, LENGTH - 1), st.integers(1, LENGTH)).map(
    lambda r: (r[0], min(r[0] + r[1], LENGTH))
)
writes = st.lists(st.tuples(ranges, contents, st.integers(0, 3)), max_size=8)


@given(synced=contents, writes=writes)
def test_a_sector_accepts_what_subsets_of_its_writes_leave_and_nothing_else(
    synced: bytes, writes: list[tuple[tuple[int, int], bytes, int]]
) -> None:
    """Of each content that there can be, it says what a list of all subsets would say; of those
    subsets only that hold each write which was made durable by itself. (Where that has an equal
    one, it may accept more.)
    """
    sector, listed = Sector.exactly(synced), {synced}
    durable = []
    for (start, end), content, dice in writes:
        sector = sector.overwritten(start, content[start:end])
        over = {old[:start] + content[start:end] + old[end:] for old in listed}
        listed = over if dice == 0 else listed | over
        if dice == 0:
            durable.append((start, content[start:end]))
    for start, part in durable:  # When later ones were under way already.
        sector = sector.kept(start, part)
    parts = [(start, content[start:end]) for (start, end), content, _ in writes]
    is_exact = not durable or len(set(parts)) == len(parts)
    for values in itertools.product(range(3), repeat=LENGTH):
        is_in = bytes(values) in sector
        assert is_in == (bytes(values) in listed) or (is_in and not is_exact), values
    assert synced[1:] not in sector


def test_of_two_equal_writes_the_older_one_is_durable_as_well() -> None:
    """A write that is made durable stays so, whatever was written after it."""
    sector = Sector.exactly(b"old").overwritten(0, b"a").kept(0, b"a").overwritten(1, b"b")
    assert b"abd" in sector
    assert b"ald" in sector
    assert b"old" not in sector
    assert b"obd" not in sector


def test_what_is_issued_again_may_lie_over_what_came_later() -> None:
    """An older write over a newer one, but never over one that was made durable by itself."""
    once = Sector.exactly(b"old").overwritten(0, b"aa").overwritten(1, b"bb")
    assert b"aab" not in once
    assert b"aab" in once.issued_again()
    assert b"old" in once.issued_again()
    assert b"bab" not in once.issued_again()
    assert b"aab" not in once.kept(1, b"bb").issued_again()


def entries(model: Model) -> int:
    return sum(1 for sector in model.unsynced.values() for _ in sector.entries())


def test_ten_thousand_partial_writes_of_one_sector_are_ten_thousand_entries() -> None:
    """The account grows by one entry a write, and still refuses what no order of them leaves."""
    model, dice, old = Model(3 * SECTOR), random.Random(7), []
    for number in range(10_000):
        offset = SECTOR + dice.randrange(SECTOR - 1)
        data = pattern(number, dice.randrange(1, 2 * SECTOR - offset + 1))
        model.about_to_write(offset, data)
        model.written(offset, data)
        old.append((offset, data))
    assert entries(model) == 10_001
    assert model.unsynced.keys() == {1}
    # Any subset of them: here every other one. Then one byte of it that is of none.
    kept = bytearray(SECTOR)
    for offset, data in old[::2]:
        kept[offset - SECTOR : offset - SECTOR + len(data)] = data
    assert bytes(kept) in model.unsynced[1]
    for place in range(0, SECTOR, 37):
        wrong = bytearray(kept)
        wrong[place] ^= 0x80
        assert bytes(wrong) not in model.unsynced[1], place
    model.accept(bytes(SECTOR) + bytes(kept) + bytes(SECTOR))
    assert entries(model) == 0


def test_refused_writes_add_two_entries_at_most() -> None:
    """A write that was refused may have left its bytes or not, and so may each after it."""
    model = Model(SECTOR)
    for number in range(1000):
        model.about_to_write(number % 100, pattern(number, 50))
    assert entries(model) <= 2001
    assert bytes(SECTOR) in model.unsynced[0]


def test_half_of_a_write_within_a_sector_is_refused() -> None:
    """A sector is written whole: old and new bytes of one write in it are a mixture."""
    old, new = pattern(1, SECTOR), pattern(2, SECTOR)
    (sector,) = overwritten(sectors_of(old), 0, new)
    assert old in sector
    assert new in sector
    assert new[: SECTOR // 2] + old[SECTOR // 2 :] not in sector


def test_the_account_of_one_write_leaves_that_of_the_time_before_alone() -> None:
    """States of the disk seen earlier go on being held against what was expected then."""
    before = sectors_of(bytes(2 * SECTOR))
    after = overwritten(before, SECTOR - 3, b"abcdef")
    assert bytes(SECTOR - 3) + b"abc" in after[0]
    assert b"def" + bytes(SECTOR - 3) in after[1]
    assert bytes(SECTOR - 3) + b"abc" not in before[0]
    assert bytes(SECTOR) in after[0]
