"""A real process with a real limit, too little for the index of a diff area.

What can be done without the index is done, and with the memory all is as it was.
"""

from __future__ import annotations

import _thread
import importlib
import json
import os
import resource
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import trio
from trio._core._wakeup_socketpair import WakeupSocketpair

from vsnapfs import threads
from vsnapfs.daemon.process import run_trio

#: 4 Mi copies, of which the index alone takes 48 MiB; the process may take 24 more than it has.
BLOCK, COPIES, ROOM = 4096, 4 << 20, 24 << 20
SPAN = 64
LIMITS = {"RLIMIT_AS": 0, "RLIMIT_DATA": 5}  # and the column of /proc/self/statm
COMMANDS: dict[str, tuple[str, ...]] = {
    "status": ("status", "--json"),
    "list": ("recovery-point", "list", "--json"),
    "online": ("online",),
    "verify": ("verify",),
    "resize": ("resize", "--diff-area-size", "1GiB"),
    "create": ("recovery-point", "create"),
}


def make(directory: Path) -> None:
    """A closed volume with one point, for which every block was zeros and has been overwritten, so
    its descriptors say. (What the replica holds is not looked at.)
    """
    from vsnapfs.backing import FileBacking
    from vsnapfs.config import load
    from vsnapfs.diffarea.descriptors import Descriptor
    from vsnapfs.diffarea.recovery import open_area
    from vsnapfs.diffarea.superblock import RecoveryPoint
    from vsnapfs.volume.create import create_volume

    slots = COPIES // SPAN
    create_volume(
        directory, size=COPIES * BLOCK, diff_area_size=320 << 20, block_size=BLOCK, force=True
    )
    backing, replica = (FileBacking.open(directory / n) for n in ("diff-area", "replica.img"))
    volume_id = bytes.fromhex(load(directory).volume_id)
    area, _ = open_area(backing, replica, volume_id)
    area.prepare_growth(area.layout.valid_slots(slots))
    area.commit(allocated=area.layout.size_of(area.layout.valid_slots(slots)))
    area.commit(points=(RecoveryPoint(1, 1, ""),), epoch=1)
    for first in range(0, slots, 4096):
        batch = range(first, min(first + 4096, slots))
        area.barrier({s: Descriptor(2**SPAN - 1, s * SPAN, 1, zeros=True) for s in batch})
    area.commit(clean=True, replica=replica.identity())
    backing.close()
    replica.close()


def under_a_limit(directory: str, limit: str) -> dict[str, Any]:
    """In a process of its own: what each command says with too little memory, then with enough."""
    import contextlib
    import io

    from vsnapfs.cli.app import app

    def command(*words: str) -> tuple[int, str]:
        out, err = io.StringIO(), io.StringIO()
        code = 0
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                app.main([words[0], *words[1:]])
            except SystemExit as end:
                code = int(end.code or 0)
        return code, out.getvalue() + err.getvalue()

    def all_commands() -> dict[str, tuple[int, str]]:
        # The volume is the first argument after the words of the command.
        found = {}
        for name, words in COMMANDS.items():
            at = 2 if words[0] == "recovery-point" else 1
            found[name] = command(*words[:at], directory, *words[at:])
        target = str(Path(directory).parent / "point.img")
        found["export"] = command("recovery-point", "export", directory, "1", target, "--force")
        return found

    for name in ("volume", "daemon.client", "daemon.mounts", "cli.exporting"):
        importlib.import_module(f"vsnapfs.{name}")  # Programs are not counted.
    kind = getattr(resource, limit)
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[LIMITS[limit]])
    hard = resource.getrlimit(kind)[1]
    resource.setrlimit(kind, (pages * resource.getpagesize() + ROOM, hard))
    little = all_commands()
    resource.setrlimit(kind, (hard, hard))
    return {"little": little, "enough": [command("status", "--json", directory)]}


@pytest.fixture(scope="module")
def volume(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("little") / "vol"
    make(directory)
    return directory


@pytest.mark.time_limit(120)
@pytest.mark.parametrize("limit", LIMITS)
def test_too_little_memory_for_the_index(volume: Path, limit: str) -> None:
    """Status and list work, everything else says what it lacks, nothing ends in a traceback, and
    the volume is not offline for the next process.
    """
    command = [sys.executable, __file__, str(volume), limit]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    little = found["little"]
    for name, (_, text) in little.items():
        assert "Traceback" not in text, f"{name}: {text}"
    code, text = little["status"]
    (report,) = json.loads(text)
    assert code == 3
    assert report["fault"]["name"] == "MEMORY_ALLOCATION_FAILURE"
    assert report["recovery_points"] == 1
    code, text = little["list"]
    assert code == 0
    assert [point["number"] for point in json.loads(text)] == [1]
    for name in ("online", "verify", "resize", "create", "export"):
        assert little[name][0] != 0
        assert "memory" in little[name][1], little[name]
    ((code, text),) = found["enough"]
    (report,) = json.loads(text)
    assert (code, report["state"], report["fault"]) == (0, "online", None)


def test_threads_are_made_where_there_is_memory_for_all_of_them() -> None:
    """With room for some of them only, none is begun: its maker would wait for it for ever."""
    pool = threads.started(3, "some")
    assert pool is not None
    assert len(pool._threads) == 3
    pool.shutdown()
    before = threading.active_count()
    with mock.patch.object(threads.mmap, "mmap", side_effect=OSError(12, "no memory")) as asked:
        assert threads.started(3, "none") is None
    assert asked.call_args.args[1] >= 3 * (8 << 20)
    assert threading.active_count() == before


def test_no_memory_for_trio_itself_is_no_memory() -> None:
    """A MemoryError that hits a task of trio's own leaves `run_trio` as a MemoryError."""

    async def starved() -> None:
        raise MemoryError

    async def main() -> None:
        trio.lowlevel.spawn_system_task(starved)
        await trio.sleep_forever()

    with pytest.raises(MemoryError):
        run_trio(main)


@pytest.mark.expects_log
def test_a_process_that_hears_of_no_thread_any_more_ends() -> None:
    """Without memory trio cannot take what a thread says: nobody waits for that for ever."""
    codes = []

    async def main() -> None:
        ended = trio.Event()

        def end(code: int) -> None:
            codes.append(code)
            ended.set()

        with (
            mock.patch.object(WakeupSocketpair, "drain", side_effect=MemoryError),
            mock.patch.object(os, "_exit", end),
            trio.CancelScope(deadline=trio.current_time() + 30, shield=True),  # as for a thread
        ):
            trio.lowlevel.current_trio_token().run_sync_soon(lambda: None)
            await ended.wait()

    with pytest.raises(MemoryError):
        run_trio(main)
    assert codes == [1]


def test_a_thread_that_cannot_begin_ends_the_process(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Nobody waits for ever for what a thread was to do that had no memory to begin."""
    codes: list[int] = []

    def begin() -> None:
        raise MemoryError  # as `threading` does, whose first function is called in the same way

    async def main() -> None:
        _thread.start_new_thread(begin, ())
        with trio.move_on_after(30):
            while not codes:  # noqa: ASYNC110 - no thread can set an event of trio's
                await trio.sleep(0.001)

    monkeypatch.setattr(sys, "unraisablehook", sys.__unraisablehook__)
    monkeypatch.setattr(os, "_exit", codes.append)
    run_trio(main)
    assert codes == [1]
    assert "in thread started by" in capfd.readouterr().err


def test_a_defect_of_trio_stays_one() -> None:
    """Another exception in a task of trio's own is not taken for a lack of memory."""

    async def broken() -> None:
        raise KeyError

    async def main() -> None:
        trio.lowlevel.spawn_system_task(broken)
        await trio.sleep_forever()

    with pytest.raises(trio.TrioInternalError):
        run_trio(main)


if __name__ == "__main__":
    print(json.dumps(under_a_limit(*sys.argv[1:])))
