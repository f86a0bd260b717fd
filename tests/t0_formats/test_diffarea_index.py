"""The memory of the engine against models that are too simple to be wrong."""

from __future__ import annotations

from collections.abc import Sequence
from unittest import mock

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from vsnapfs.diffarea.bitmap import BlockSet
from vsnapfs.diffarea.index import EPOCH_BITS, Index, Run, RunBuilder, live_copies
from vsnapfs.diffarea.slots import SlotMap

BLOCKS = [0, 1, 2, 3, 4095, 4096, 2**34 - 1]


def _read(copies: dict[tuple[int, int], int], point: int, block: int) -> tuple[int, int] | None:
    """The read rule, word by word: the copy in the first epoch ≥ point that has one."""
    epochs = sorted(epoch for where, epoch in copies if where == block and epoch >= point)
    return (epochs[0], copies[block, epochs[0]]) if epochs else None


class IndexMachine(RuleBasedStateMachine):
    """Copies are made, points come and go; every live point reads what the read rule says."""

    def __init__(self) -> None:
        super().__init__()
        self.index = Index()
        self.copies: dict[tuple[int, int], int] = {}
        self.points: list[int] = [1]
        self.epoch = 1
        self.slot = 0

    @rule(block=st.sampled_from(BLOCKS))
    def add(self, block: int) -> None:
        if (block, self.epoch) not in self.copies:
            self.index.add(block, self.epoch, self.slot)
            self.copies[block, self.epoch] = self.slot
            self.slot += 1

    @rule(by=st.sampled_from([1, 1, 1, 2**20]))
    def create(self, by: int) -> None:
        self.epoch = min(self.epoch + by, 2**30 - 1)
        if self.epoch not in self.points:
            self.points.append(self.epoch)

    @rule()
    def fold(self) -> None:
        before = len(self.index)
        self.index.fold()
        assert len(self.index) == before
        assert len(self.index._state[1]) == 0

    @rule()
    def compact(self) -> None:
        self.index.compact(self.points)
        self.copies = {
            (block, epoch): slot
            for (block, epoch), slot in self.copies.items()
            if any(_read(self.copies, point, block) == (epoch, slot) for point in self.points)
        }
        assert len(self.index) == len(self.copies)

    @precondition(lambda self: self.points)
    @rule(which=st.integers(0, 99))
    def delete(self, which: int) -> None:
        """As the engine does it: without the point, what nobody reads is forgotten."""
        self.points.pop(which % len(self.points))
        self.compact()

    @precondition(lambda self: self.copies)
    @rule(data=st.data())
    def move(self, data: st.DataObject) -> None:
        chosen = data.draw(st.lists(st.sampled_from(sorted(self.copies)), unique=True, min_size=1))
        moves = []
        for block, epoch in chosen:
            moves.append((block, epoch, self.slot))
            self.copies[block, epoch] = self.slot
            self.slot += 1
        self.index.move(moves)

    @invariant()
    def every_point_reads_by_the_rule(self) -> None:
        assert len(self.index) == len(self.copies)
        for point in self.points:
            wanted = [_read(self.copies, point, block) for block in BLOCKS]
            assert [self.index.lookup(point, block) for block in BLOCKS] == wanted
            assert self.index.lookup_range(point, 0, 4) == wanted[:4]
            assert self.index.lookup_range(point, 4095, 2) == wanted[4:6]
            assert self.index.lookup_range(point, BLOCKS[-1], 1) == wanted[-1:]

    @invariant()
    def the_views_agree(self) -> None:
        rows = [
            tuple(int(value) for value in row) for row in zip(*self.index.everything(), strict=True)
        ]
        assert rows == sorted((b, e, s) for (b, e), s in self.copies.items())
        for epoch in (0, *self.points, self.epoch + 1):
            blocks = sorted({block for block, copied in self.copies if copied >= epoch})
            assert self.index.blocks_since(epoch).tolist() == blocks
        live = sorted(
            slot
            for (block, epoch), slot in self.copies.items()
            if any(_read(self.copies, point, block) == (epoch, slot) for point in self.points)
        )
        assert sorted(self.index.live_slots(self.points).tolist()) == live


def test_the_index_reads_by_the_rule_whatever_happens() -> None:
    """add, fold, merge, move, compact, delete: every live point finds its copy, in any order."""
    with (
        mock.patch("vsnapfs.diffarea.index._MERGE_RATIO", 2),
        mock.patch("vsnapfs.diffarea.index._PIECE", 3),
    ):
        run_state_machine_as_test(IndexMachine, settings=settings(stateful_step_count=30))


@given(
    st.dictionaries(
        st.tuples(st.integers(0, 5), st.integers(1, 9)), st.integers(0, 99), max_size=30
    ),
    st.sets(st.integers(1, 9)).map(sorted),
)
def test_a_copy_lives_if_some_point_reads_it(
    copies: dict[tuple[int, int], int], points: list[int]
) -> None:
    """live_copies, the rule by which slots are freed, equals asking every point for every block."""
    keys = sorted((block << EPOCH_BITS) | epoch for block, epoch in copies)
    with mock.patch("vsnapfs.diffarea.index._PIECE", 4):
        found = live_copies(np.array(keys, dtype=np.uint64), points).tolist()
    wanted = []
    for key in keys:
        block, epoch = key >> EPOCH_BITS, key & (2**EPOCH_BITS - 1)
        reads = [_read(copies, point, block) for point in points]
        wanted.append(any(read is not None and read[0] == epoch for read in reads))
    assert found == wanted


def _scanned(
    blocks: int, descriptors: list[tuple[int, int] | None], groups: int, slots: int = 0
) -> Run:
    """What a scan makes of (block, epoch) by slot, fed in so many groups."""
    builder = RunBuilder(blocks, slots or len(descriptors))
    for part in np.array_split(np.arange(len(descriptors)), groups):
        rows = [descriptors[slot] for slot in part]
        builder.add(
            np.flatnonzero([row is not None for row in rows]),
            np.array([row[0] for row in rows if row], dtype=np.uint64),
            np.array([row[1] if row else 2**32 - 1 for row in rows], dtype=np.uint32),
        )
    return builder.finish()


@given(
    st.lists(
        st.none() | st.tuples(st.integers(0, 5) | st.just(2**34 - 1), st.integers(1, 2**30 - 1))
    ),
    st.integers(1, 4),
    st.sampled_from([0, 2**30, 2**31 - 1]),
)
def test_a_run_is_sorted_whatever_the_order_of_the_scan(
    descriptors: list[tuple[int, int] | None], groups: int, slots: int
) -> None:
    """Sorted by block and epoch, the lower slot first; also where numbers need all their bits."""
    with mock.patch("vsnapfs.diffarea.index._PIECE", 3):
        run = _scanned(2**34, descriptors, groups, slots)
    wanted = sorted(
        ((row[0] << EPOCH_BITS) | row[1], slot) for slot, row in enumerate(descriptors) if row
    )
    assert list(zip(run.keys.tolist(), run.slots.tolist(), strict=True)) == wanted
    for key, slot in wanted:
        block, epoch = key >> EPOCH_BITS, key & (2**EPOCH_BITS - 1)
        assert wanted[run.position(block, epoch, slot)] == (key, slot)
        assert run.epochs_of(block).tolist() == [
            k & (2**EPOCH_BITS - 1) for k, _ in wanted if k >> EPOCH_BITS == block
        ]
    assert run.epochs_of(6).tolist() == []


def test_of_two_copies_of_one_block_and_epoch_the_lower_slot_is_found() -> None:
    """An interrupted shrink leaves both; the first of the scan serves and the other is stale."""
    index = Index(_scanned(8, [None] * 10 + [(7, 1), (3, 2), (7, 1), (3, 1)], 2))
    assert index.lookup(1, 7) == (1, 10)
    assert index.lookup(1, 3) == (1, 13)
    assert index.lookup(2, 3) == (2, 11)
    index.compact([1, 2])
    assert len(index) == 3
    assert index.lookup(1, 7) == (1, 10)


def test_many_copies_fold_into_few_runs() -> None:
    """A lookup is a handful of binary searches, whatever the number of points."""
    index = Index()
    with mock.patch("vsnapfs.diffarea.index._FOLD_AT", 16):
        for number in range(3000):
            index.add(number * 7919 % 1000, number // 1000 + 1, number)
            if index.wants_folding():
                index.fold()
    assert len(index) == 3000
    assert len(index._state[0]) <= 8
    assert all(index.lookup(1, number * 7919 % 1000) == (1, number) for number in range(1000))


# --- slots ---------------------------------------------------------------------------------------


class SlotMachine(RuleBasedStateMachine):
    """Reserving and releasing against a set of numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 40
        self.map = SlotMap(self.count)
        self.taken: set[int] = set()

    def _usable(self) -> int:
        end = self.count if self.map.limit is None else self.map.limit
        return sum(slot not in self.taken for slot in range(end))

    @rule(count=st.integers(0, 20))
    def reserve(self, count: int) -> None:
        free = self._usable()
        slots = self.map.reserve(count)
        if count > free:
            assert slots is None, "all or none"
            return
        assert slots is not None
        assert len(set(slots)) == count
        assert not set(slots) & self.taken
        end = self.count if self.map.limit is None else self.map.limit
        assert all(0 <= slot < end for slot in slots)
        self.taken |= set(slots)

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        chosen = data.draw(st.sets(st.integers(0, self.count - 1), max_size=15))
        self.map.release(sorted(chosen))
        self.taken -= chosen

    @rule(data=st.data())
    def take(self, data: st.DataObject) -> None:
        chosen = data.draw(st.sets(st.integers(0, self.count - 1), max_size=15))
        self.map.take(np.array(sorted(chosen), dtype=np.uint32))
        self.taken |= chosen

    @rule(data=st.data())
    def keep_only(self, data: st.DataObject) -> None:
        kept = data.draw(st.sets(st.sampled_from(range(self.count))))
        also = data.draw(st.sets(st.sampled_from(range(self.count)), max_size=3))
        before = len(self.taken)
        self.taken = kept | also
        freed = self.map.keep_only(np.array(sorted(kept), dtype=np.uint32), also=sorted(also))
        assert freed == before - len(self.taken)

    @rule(limit=st.one_of(st.none(), st.integers(0, 40)))
    def limit(self, limit: int | None) -> None:
        self.map.limit = None if limit is None else min(limit, self.count)

    @rule(count=st.integers(1, 80))
    def resize(self, count: int) -> None:
        self.map.limit = None
        if count < self.count and any(slot >= count for slot in self.taken):
            try:
                self.map.resize(count)
            except AssertionError:
                return
            raise AssertionError("a slot in use was cut off")
        self.map.resize(count)
        self.count = count

    @invariant()
    def the_counts_agree(self) -> None:
        assert len(self.map) == self.count
        assert self.map.in_use == len(self.taken)
        assert self.map.free == self._usable()
        assert self.map.taken_from(0) == sorted(self.taken)
        assert self.map.taken_from(17) == sorted(slot for slot in self.taken if slot >= 17)
        assert [self.map.is_taken(slot) for slot in range(self.count)] == [
            slot in self.taken for slot in range(self.count)
        ]


def test_the_slot_map_counts_like_a_set() -> None:
    """All or none is reserved, below the limit, never twice; what is counted is what is taken."""
    run_state_machine_as_test(SlotMachine, settings=settings(stateful_step_count=30))


class _CannotCount(int):
    """A number that there is no memory to add to."""

    def __add__(self, other: int) -> int:
        raise MemoryError


def test_a_reservation_without_memory_takes_nothing() -> None:
    """Were more slots taken than counted, writes would look for a free one for ever."""
    slots = SlotMap(4)
    slots.reserve(2)
    slots.in_use = _CannotCount(2)
    with pytest.raises(MemoryError):
        slots.reserve(2)
    slots.in_use = 2
    assert slots.taken_from(0) == [0, 1]
    assert slots.reserve(slots.free) == [2, 3]


def test_slots_come_in_ascending_runs() -> None:
    """So that the copies of one batch are few long writes."""
    slots = SlotMap(100)
    assert slots.reserve(10) == list(range(10))
    assert slots.reserve(5) == list(range(10, 15))
    slots.release([3, 4])
    assert slots.reserve(3) == [3, 4, 15]


# --- blocks --------------------------------------------------------------------------------------

block_numbers = st.one_of(
    st.integers(0, 20), st.integers(65530, 65540), st.integers(0, 2**34), st.just(2**34 - 1)
)


@given(
    st.lists(block_numbers, max_size=50),
    st.lists(block_numbers, max_size=50),
    st.sampled_from([1, 5, 4096]),
)
def test_a_block_set_is_a_set(single: Sequence[int], many: list[int], sparse: int) -> None:
    """One by one or many at once, in any order, twice or not, few in a page or a bitmap's worth."""
    blocks, model = BlockSet(), set(single) | set(many)
    with mock.patch("vsnapfs.diffarea.bitmap._SPARSE", sparse):
        for block in single[::2]:
            blocks.add(block)
        blocks.update(np.array(many, dtype=np.uint64))
        for block in single[1::2]:
            blocks.add(block)
        blocks.update(np.array(many[::-1], dtype=np.uint64))
    assert len(blocks) == len(model)
    for block in model:
        assert block in blocks
        assert (block + 1 in blocks) == (block + 1 in model)
    for first in (0, 65525, 2**34 - 5):
        wanted = [block for block in range(first, first + 20) if block not in model]
        assert blocks.missing(first, first + 19) == wanted
    blocks.clear()
    assert len(blocks) == 0
    assert not any(block in blocks for block in model)
