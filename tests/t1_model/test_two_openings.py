"""S1: two openings of one volume, or of two directories that name one diff area, at one time.

The first stops between two steps of its opening, the second runs as far as it gets; one of them
wins, whichever locks first. With the locks taken away both get in, which the test must notice.
"""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import trio
from schedules import Doing

from vsnapfs.errors import BusyError
from vsnapfs.volume import Volume, opening
from vsnapfs.volume.create import create_volume

SIZE = 300_000


class Two:
    """Two openings at one time, of real files; the first stops before `step` of `opening`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
        self.reached = threading.Event()
        self.go = threading.Event()
        real = getattr(opening, step)

        def paused(*args: Any, **options: Any) -> Any:
            if not self.reached.is_set():
                self.reached.set()
                assert self.go.wait(20), "never told to go on"
            return real(*args, **options)

        monkeypatch.setattr(opening, step, paused)

    async def race(self, first: Path, second: Path) -> list[Volume | BusyError]:
        """What becomes of both."""

        async def open_it(directory: Path) -> Volume | BusyError:
            try:
                return await Volume.open(directory, accept_changed_replica=True)
            except BusyError as error:
                return error

        async with trio.open_nursery() as nursery:
            try:
                early = Doing(nursery, open_it(first))
                while not self.reached.is_set():  # noqa: ASYNC110 - set by another thread
                    await trio.sleep(0.001)
                late = await open_it(second)
            finally:
                self.go.set()
            return [await early.ended(), late]


def _two_directories(base: Path) -> tuple[Path, Path]:
    """Two volume directories with a replica each, and one diff area that both name."""
    one, other = base / "one", base / "other"
    create_volume(one, size=SIZE, diff_area_size=4 << 20)
    shutil.copytree(one, other)
    (other / "diff-area").unlink()
    toml = (other / "volume.toml").read_text()
    assert '"diff-area"' in toml
    (other / "volume.toml").write_text(toml.replace('"diff-area"', f'"{one / "diff-area"}"'))
    return one, other


@pytest.mark.parametrize("step", ["_open_state", "open_core"])
@pytest.mark.parametrize("names", ["one directory", "two directories"])
@pytest.mark.parametrize("locked", [True, False], ids=["locked", "not locked"])
def test_two_openings_at_one_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, names: str, *, locked: bool
) -> None:
    """S1: one of them is told "busy", and holds nothing after that; without the locks both get in.

    `_open_state` lies between the locks of replica and diff area, `open_core` after both.
    """
    first, second = _two_directories(tmp_path)
    if names == "one directory":
        second = first
    if not locked:
        monkeypatch.setattr("vsnapfs.locks.take", lambda *_args: None)

    async def main() -> None:
        both = await Two(monkeypatch, step).race(first, second)
        opened = [volume for volume in both if isinstance(volume, Volume)]
        try:
            if not locked:
                assert len(opened) == 2, "that the lock is what keeps the other out"
                return
            assert len(opened) == 1, both
            # Two directories: whoever locks the diff area first has it.
            late_one_wins = names == "two directories" and step == "_open_state"
            assert isinstance(both[1], Volume) == late_one_wins
        finally:
            for volume in opened:
                await volume.close()
        loser = first if late_one_wins else second
        await (await Volume.open(loser, accept_changed_replica=True)).close()

    trio.run(main)
