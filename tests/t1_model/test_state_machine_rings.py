"""The state machine once more, with two of everything: tmpfs, copies of the volume, diff areas.

What it adds to `test_state_machine`: rings of odd sizes, openings from another tmpfs, a device that
got another number, copies that are made while the volume is served and used beside it, diff areas
that are given up with what lies in the ring, and put back when they are out of date.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace

import hypothesis.strategies as st
import pytest
from hypothesis.stateful import precondition, rule
from rig import Rig, acknowledged, attempt, read_points, write
from test_state_machine import BufferedMachine, _run

from vsnapfs.errors import VsnapError
from vsnapfs.volume import Volume
from vsnapfs.volume.adoption import CLOSED


async def nothing(_volume: Volume) -> None:
    """Open it."""


def everything(rig: Rig) -> list[bytes]:
    """All bytes of all files and rings, as a process sees them."""
    files = [file.cache.read(0, file.cache.size) for file in rig.host.files.values()]
    return files + [bytes(memory) for memory in rig.host.memory.values()]


class TwoOfEverythingMachine(BufferedMachine):
    """See the module's note."""

    @rule(size=st.sampled_from([64 * 1024 + 1, 64 * 1024 + 63, 70_001, 99_999]))
    def odd_size(self, size: int) -> None:
        """From the next ring on."""
        self.rig.buffer = size

    @precondition(lambda self: self.rig.volume is None and self.planned is None)
    @rule(what=st.sampled_from(["tmpfs", "device"]))
    def seen_from_elsewhere(self, what: str) -> None:
        """Where the ring, or the replica's device, has another number: nothing, or closed."""
        host = self.rig.host
        setattr(host, what, getattr(host, what) + 1)
        before = everything(self.rig)
        error = None
        try:
            self.rig.run(nothing, accept_changed_replica=True)
        except VsnapError as refusal:
            error = refusal
        if error is not None:
            assert error.code == CLOSED
            assert everything(self.rig) == before
            setattr(host, what, getattr(host, what) - 1)

    @precondition(lambda self: self.planned is None)
    @rule(at=st.integers(0, 1 << 16), then=st.sampled_from(["close", "leave"]))
    def a_copy_beside_it(self, at: int, then: str) -> None:
        """Opened, read and written beside the original: its points are exact, and no ring of the
        original's has changed.
        """
        copy, rings = self.rig.on(self.rig.host.copied()), everything(self.rig)
        offset = at * max(1, len(self.model.content) - 100) >> 16
        data = b"another replica"[: len(self.model.content) - offset]

        async def use(volume: Volume) -> None:
            found = await read_points(volume)
            assert sorted(found) == sorted(self.model.points)
            for number, content in self.model.points.items():
                assert found[number] == content
            if volume.protection.is_online:
                await attempt(write(volume, offset, data))
                if volume.protection.is_online:
                    seen = acknowledged(copy, volume)
                    assert seen[offset : offset + len(data)] == data
            for number, content in (await read_points(volume)).items():
                assert content == self.model.points[number]

        copy.run(use, accept_changed_replica=True)
        if then == "close":
            copy.close()
        assert everything(self.rig)[: len(rings)] == rings
        assert 1043 not in copy.log.ids("vsnapfs")

    @precondition(lambda self: self.model.offline and self.planned is None)
    @rule(put_back=st.booleans())
    def give_up_recovery_points(self, put_back: bool) -> None:
        """An empty area takes the place of the old one; that one, put back, is an old one."""
        self.rig.run(nothing)
        host = self.rig.host
        old = host.files["area"]
        kept = replace(old, cache=old.cache.copy(), disk=old.cache.copy(), journal=[], locked=False)

        async def give_up(volume: Volume) -> None:
            await volume.online(give_up_recovery_points=True)

        self.rig.run(give_up)
        self.model.points, self.model.offline, self.model.fault = {}, False, None
        if not put_back:
            return
        self.rig.run(nothing)
        self.rig.close()
        right = host.files["area"]
        host.files["area"] = replace(kept, inode=kept.inode + 5000)
        other = self.rig.on(host)

        async def look(volume: Volume) -> None:
            assert volume.core.area is not None
            assert volume.core.area.is_old

        # In the very volume: what a look at it writes down, it would have written down.
        state = host.files["state"]
        before = replace(
            state,
            cache=state.cache.copy(),
            disk=state.disk.copy(),
            journal=list(state.journal),
            locked=False,
        )
        other.run(look, accept_changed_replica=True)
        assert other.volume is not None
        with contextlib.suppress(Exception):
            other.close()
        host.files["area"], host.files["state"] = right, before
        self.model.synced()


@pytest.mark.slow
@pytest.mark.time_limit(900)
def test_any_sequence_agrees_with_the_model_beside_another_of_everything() -> None:
    """W5: whatever else is there, nothing acknowledged is lost, nothing of another touched."""
    _run(TwoOfEverythingMachine, 40)


class EvictingTwoOfEverythingMachine(TwoOfEverythingMachine):
    policy = "evict"


@pytest.mark.slow
@pytest.mark.time_limit(900)
def test_any_sequence_agrees_with_the_model_beside_another_of_everything_when_evicting() -> None:
    """The same where points are given up for writes: a copy loses its own, never the original's."""
    _run(EvictingTwoOfEverythingMachine, 40)
