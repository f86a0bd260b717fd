"""The state file under power failures: what was saved is found, or what was saved before."""

from __future__ import annotations

import errno
from contextlib import nullcontext

import pytest
from powercuts import cuts
from rig import VOLUME_ID
from simdisk import Host, Snapshot

from vsnapfs.volume.statefile import STATE_SIZE, SavedState, StateFile

Recorded = list[tuple[Snapshot, tuple[str, int] | None]]


def _state(number: int) -> SavedState:
    return SavedState(offline=bool(number % 2), maximum=1 << 20, block_size=4096, epoch=number)


def _new() -> Host:
    host = Host()
    host.create("state")
    backing = host.open("state")
    backing.allocate(0, STATE_SIZE)
    StateFile(backing, VOLUME_ID).save(_state(0))
    backing.close()
    return host


def _save(host: Host, number: int) -> Recorded:
    """Load, save state `number`, and every state of the disk meanwhile."""
    states: Recorded = []
    file = StateFile(host.open("state"), VOLUME_ID)
    file.load()
    host.observer = lambda last: states.append((host.snapshot(), last))
    file.save(_state(number))
    return states


def _load(host: Host) -> int:
    return StateFile(host.open("state"), VOLUME_ID).load().epoch


def test_one_power_failure_after_the_other_leaves_a_state() -> None:
    """Three saves in a row, the power failing in each of them in every way: old or new."""
    tried = 0

    def fail(make: list[tuple[Snapshot, object]], number: int, known: set[int]) -> None:
        nonlocal tried
        for snapshot, choose in make:
            found = _load(snapshot.power_failure(choose))
            tried += 1
            assert found in known
            if number < 4:
                after = [
                    (state, how)
                    for state, last in _save(snapshot.power_failure(choose), number)
                    for how, _ in cuts(state, last)
                ]
                fail(after, number + 1, {found, number})

    fail([(_new().snapshot(), None)], 1, {0})
    assert tried > 300


@pytest.mark.parametrize("operation", ["write", "sync"])
@pytest.mark.parametrize("nth", [1, 2])
def test_a_save_that_failed_is_followed_by_one_that_begins_where_it_ended(
    operation: str, nth: int
) -> None:
    """What the failed one left in doubt is written first, so the good copy stays good meanwhile."""
    host = _new()
    file = StateFile(host.open("state"), VOLUME_ID)
    file.load()
    host.fail("state", operation, errno.EIO, nth=nth, partly=True)
    with pytest.raises(OSError) if nth == 1 else nullcontext():
        file.save(_state(1))
    assert (file.incomplete is None) == (nth == 1)
    if nth == 2:  # Nobody was told that it failed: it counts, in every process that comes.
        assert _load(host.snapshot().power_failure()) == 1
    states: Recorded = []
    host.observer = lambda last: states.append((host.snapshot(), last))
    file.save(_state(2))
    for snapshot, last in states:
        for how, words in cuts(snapshot, last):
            assert _load(snapshot.power_failure(how)) in ((0, 1, 2), (1, 2))[nth - 1], words
    assert file.incomplete is None
    assert _load(host.power_failure()) == 2


@pytest.mark.parametrize("refused", [1, 2, 3])
def test_a_new_file_whose_first_writes_were_refused_holds_later_states(refused: int) -> None:
    """ext4 takes a page of reserved space that could not be written for written as long as it stays
    in the cache: what is saved there later must be on the disk all the same.
    """
    host = Host()
    host.create("state")
    backing = host.open("state")
    backing.allocate(0, STATE_SIZE)
    backing.write(0, bytes(STATE_SIZE))
    file = StateFile(backing, VOLUME_ID)
    host.fail("state", "sync", errno.EIO, times=refused)
    for _ in range(refused):
        with pytest.raises(OSError):
            file.save(_state(1))
    file.save(_state(2))
    found = StateFile(host.power_failure().open("state"), VOLUME_ID)
    assert found.load() == _state(2)
    assert found.check() == []
