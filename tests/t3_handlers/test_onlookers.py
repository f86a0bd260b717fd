"""Somebody else opens the files of an open volume: noticed, named, told; we ourselves never are.

The volume is a real one in this process, without a mount. Whoever opens its files from here is "us"
for a look into /proc, and is noticed by the end of his opening; by name, processes of their own
are looked for at the end of this module, and on real mounts in t4_mount/test_others.
"""

from __future__ import annotations

import ctypes
import errno
import json
import math
import mmap
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from house import run
from served import BLOCK, Served, make

from vsnapfs import inotify, openers
from vsnapfs.backing import FileBacking, Removed
from vsnapfs.daemon import client
from vsnapfs.errors import BusyError
from vsnapfs.events import Event, EventLog
from vsnapfs.volume import Volume
from vsnapfs.volume import onlookers as module

SECONDS = 60.0


@pytest.fixture
def vol(tmp_path: Path) -> Path:
    return make(tmp_path / "vol")


@contextmanager
def serving(directory: Path) -> Iterator[Served]:
    served = Served(directory)
    try:
        yield served
    finally:
        served.stop()


def until(condition: Callable[[], Any]) -> None:
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def told(directory: Path) -> list[Event]:
    """The events about others, oldest first."""
    log = EventLog(directory / "events.jsonl")
    try:
        return [event for event in log.events() if event.event_id == 1052]
    finally:
        log.close()


def others(directory: Path, what: str = "replica") -> dict[str, Any] | None:
    found: dict[str, Any] | None = client.call(directory, "status")[what]["others"]
    return found


def count(directory: Path, what: str = "replica") -> int:
    found = others(directory, what)
    return found["count"] if found else 0


def write(path: Path, data: bytes = b"x", offset: int = 0) -> None:
    """As somebody else would: open, write, close."""
    fd = os.open(path, os.O_WRONLY)
    try:
        os.pwrite(fd, data, offset)
    finally:
        os.close(fd)


def looked(served: Served) -> None:
    """Have a look taken, and wait for its end."""
    trio.from_thread.run(served.volume.onlookers._look, trio_token=served._token)


def only_the_marker(served: Served, *, what: str = "replica") -> None:
    """Nobody has been noticed before; a writer now is, and nobody else with him."""
    directory = served.directory
    looked(served)  # What has happened until now is not taken for the marker's.
    assert told(directory) == []
    name = {"replica": "replica.img", "diff_area": "diff-area"}[what]
    write(directory / name, b"")
    until(lambda: count(directory, what))
    assert count(directory, what) == 1
    (event,) = told(directory)
    assert event.params[{"replica": "device", "diff_area": "diff_area"}[what]] == str(
        directory / name
    )
    assert "repeats" not in event.params


# --- noticed ------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["replica", "diff_area"])
def test_a_writer_who_came_and_went_is_noticed(vol: Path, what: str) -> None:
    """One event, which names the file; `status` says since when."""
    with serving(vol) as served:
        assert others(vol, what) is None
        only_the_marker(served, what=what)
        found = others(vol, what)
        assert found is not None
        assert found["since"].endswith("Z")
        assert found["writers"] == []


def test_another_name_of_the_same_file_makes_no_difference(vol: Path, tmp_path: Path) -> None:
    """Writing through a hard link is noticed like writing to replica.img."""
    with serving(vol):
        os.link(vol / "replica.img", tmp_path / "other-name")
        write(tmp_path / "other-name")
        until(lambda: count(vol))
        assert told(vol)[0].params["device"] == str(vol / "replica.img")


def test_many_writers_in_a_minute_are_one_event_and_a_count(vol: Path) -> None:
    """The first is told at once, the others together, at the latest when the volume is closed."""
    with serving(vol):
        for number in (1, 2, 3, 4):
            write(vol / "replica.img")
            until(lambda number=number: count(vol) >= number)
        assert len(told(vol)) == 1
    first, last = told(vol)
    assert "repeats" not in first.params
    assert last.params["repeats"] == 2  # of three that were untold


def test_a_writer_at_the_last_moment_is_told_of(vol: Path) -> None:
    """Who writes just before the volume is closed is in the log when it is."""
    served = Served(vol)
    client.call(vol, "status")
    write(vol / "replica.img")
    served.stop()
    assert len(told(vol)) == 1


def test_a_writer_beside_a_command_is_told_of(vol: Path) -> None:
    """The same without a server: a command that has the volume open notices others, too."""

    async def main() -> None:
        volume = await Volume.open(vol)
        write(vol / "replica.img")
        await volume.close()

    trio.run(main)
    assert len(told(vol)) == 1


# --- remembered ---------------------------------------------------------------------------------


def test_points_that_may_miss_something_are_remembered(vol: Path) -> None:
    """As long as a point from before the writer exists, `status` and the next mount say so."""
    with serving(vol):
        client.call(vol, "rp_create")
        write(vol / "replica.img", b"overwritten", 3 * BLOCK)
        until(lambda: (others(vol) or {}).get("suspect_points"))
        since = (others(vol) or {})["since"]
        client.call(vol, "rp_create")
    for _ in range(2):  # in a command, and where it is served
        assert others(vol) == {"since": since, "count": 0, "writers": [], "suspect_points": 1}
        with serving(vol) as served:
            assert others(vol) == {"since": since, "count": 0, "writers": [], "suspect_points": 1}
            (warning,) = served.volume.onlookers.warnings()
            assert "1 recovery point" in warning
    client.call(vol, "rp_delete", point=1)
    assert others(vol) is None
    with serving(vol) as served:
        assert served.volume.onlookers.warnings() == []


def test_points_after_the_writer_are_well(vol: Path) -> None:
    """Who wrote before the first point has taken nothing from it."""
    with serving(vol):
        write(vol / "replica.img")
        until(lambda: count(vol))
        client.call(vol, "rp_create")
    assert others(vol) is None


@pytest.mark.parametrize("until_when", ["he is still there", "he goes", "it is closed"])
def test_points_made_while_the_writer_is_there_are_remembered(
    vol: Path, monkeypatch: pytest.MonkeyPatch, until_when: str
) -> None:
    """Who was there before a point and is there after it may have taken something from it."""
    there = {openers.Writer(1, 1, "somebody"): 1}

    def writers(files: list[openers.File]) -> list[dict[openers.Writer, int]]:
        return [dict(there) if file.is_at(str(vol / "replica.img")) else {} for file in files]

    monkeypatch.setattr(openers, "writers", writers)
    if until_when != "he is still there":
        monkeypatch.setattr(module, "_PAUSE", math.inf)  # No other look than those below.
    with serving(vol) as served:
        until(lambda: count(vol) == 1)
        client.call(vol, "rp_create")
        if until_when == "he is still there":
            until(lambda: (others(vol) or {})["suspect_points"] == 1)
        if until_when == "he goes":
            there.clear()
            looked(served)
            client.call(vol, "rp_create")  # This one is well.
    assert (others(vol) or {})["suspect_points"] == 1


# --- not us -------------------------------------------------------------------------------------


def test_looking_is_not_writing(vol: Path, tmp_path: Path) -> None:
    """Readers, however they open it, and what changes no content, are not told of."""
    with serving(vol) as served:
        for name in ("replica.img", "diff-area"):
            run("sh", "-c", 'cat "$1" | wc -c', "sh", str(vol / name))
            run("cp", str(vol / name), str(tmp_path / name))
            run("sha256sum", str(vol / name))
            os.close(os.open(vol / name, os.O_RDONLY))
            os.close(os.open(vol / name, os.O_PATH))
            os.stat(vol / name)
            os.utime(vol / name)
        only_the_marker(served)


def test_an_attempt_at_a_locked_volume_is_not_writing(vol: Path) -> None:
    """Openings that find it locked (a command beside a starting server) are not told of."""
    with serving(vol) as served:
        for name in ("replica.img", "diff-area", "state"):
            with pytest.raises(BusyError):
                FileBacking.open(vol / name)

        async def main() -> None:
            for dry_run in (False, True):
                with pytest.raises(BusyError):
                    await Volume.open(vol, dry_run=dry_run)

        trio.run(main)
        only_the_marker(served)


def test_opening_the_replica_anew_is_not_somebody_else(vol: Path) -> None:
    """After a failed sync the server opens the replica anew, and closes the old descriptor."""
    with serving(vol) as served:
        for _ in range(3):
            served.volume.reopen_replica()
        only_the_marker(served)


def test_opening_anew_that_fails_hides_nobody(vol: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An opening that did not come about is not waited for: the next writer is told of."""
    with serving(vol) as served:

        def fail(_self: FileBacking) -> None:
            raise OSError(errno.EIO, "no")

        monkeypatch.setattr(FileBacking, "_open_data", fail)
        with pytest.raises(OSError, match="no"):
            served.volume.reopen_replica()
        only_the_marker(served)


def test_a_child_with_our_descriptors_is_not_somebody_else(vol: Path) -> None:
    """What a child inherits it may write to and close: it is ours."""
    with serving(vol) as served:
        fd = served.volume.core.replica._fd  # type: ignore[attr-defined]
        code = f"import os; os.pwrite({fd}, b'x', 0); input()"
        child = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, pass_fds=(fd,)
        )
        os.close(os.open(vol / "replica.img", os.O_RDONLY))  # so that there is a look while it runs
        looked(served)
        child.communicate(b"\n")
        only_the_marker(served)


def test_work_of_every_kind_is_not_somebody_else(vol: Path) -> None:
    """Writes, points, resizing, verifying, repairing and a restore are our own."""
    with serving(vol) as served:
        client.call(vol, "rp_create")
        served.use()
        client.call(vol, "rp_create")
        client.call(vol, "resize", total=512 << 10)
        client.call(vol, "verify")
        client.call(vol, "repair", dry_run=True)
        client.call(vol, "repair", dry_run=False)
        client.call(vol, "rp_restore", point=1)
        client.call(vol, "offline")
        client.call(vol, "online")
        only_the_marker(served)


def test_a_new_diff_area_is_watched_and_the_old_one_s_end_is_ours(vol: Path) -> None:
    """Points given up: the lost file is closed by us, and writers of the new one are noticed."""
    with serving(vol) as served:
        client.call(vol, "rp_create")
        (vol / "diff-area").rename(vol / "lost")
        client.call(vol, "offline")
        client.call(vol, "online", give_up_recovery_points=True)
        assert others(vol, "diff_area") is None
        only_the_marker(served, what="diff_area")


def test_a_file_that_we_have_closed_has_no_writers(vol: Path) -> None:
    """The end of our own descriptor is nobody else's, even before another file takes its place."""
    with serving(vol) as served:
        core = served.volume.core
        core.area_is_stale = True  # so that the volume is closed without it
        core.need_area().backing.close()
        looked(served)
        assert told(vol) == []


# --- what cannot be had -------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["__init__", "add"])
def test_without_inotify_it_is_served_and_said(
    vol: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """No watch to be had (a limit of the machine): `status` says that others are not seen."""

    def refuse(*_args: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(inotify.Inotify, call, refuse)
    with serving(vol) as served:
        served.use()
        report = client.call(vol, "status")
        assert "max_user_watches" in report["unwatched"]
        assert report["replica"]["others"] is None


def test_a_look_that_fails_ends_nothing(vol: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever goes wrong in looking, the volume is served, and `status` says that it did."""

    def break_(*_args: Any) -> None:
        raise ValueError("rubbish in /proc")

    monkeypatch.setattr(module.openers, "writers", break_)
    with serving(vol) as served:
        write(vol / "replica.img")
        until(lambda: client.call(vol, "status")["unwatched"])
        served.use()


@pytest.mark.parametrize("error", [OSError(errno.EIO, "no more"), MemoryError()])
def test_inotify_that_fails_later_ends_nothing(
    vol: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """The volume is served and closed as ever, and `status` says that nobody is noticed."""

    def fails(_self: inotify.Inotify) -> None:
        raise error

    with serving(vol) as served:
        monkeypatch.setattr(inotify.Inotify, "read", fails)
        write(vol / "replica.img")
        until(lambda: client.call(vol, "status")["unwatched"])
        assert type(error).__name__ in client.call(vol, "status")["unwatched"]
        served.use()
    assert client.call(vol, "rp_list") == []


def test_more_openings_than_the_kernel_keeps(vol: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A queue that ran over had writers in it: that much is told."""
    monkeypatch.setattr(inotify.Inotify, "read", lambda _self: [(-1, inotify.OVERFLOW)])
    with serving(vol) as served:
        looked(served)
        assert {event.params.get("device") for event in told(vol)} >= {str(vol / "replica.img")}
        assert {event.params.get("diff_area") for event in told(vol)} >= {str(vol / "diff-area")}


def test_a_closing_of_our_own_that_was_never_told_hides_nobody(
    vol: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The queue ran over and took the end of our own opening along: the next writer is told of."""
    with serving(vol) as served:
        read = inotify.Inotify.read
        overrun = [[(-1, inotify.OVERFLOW)]]

        def runs_over(source: inotify.Inotify) -> list[tuple[int, int]]:
            told_now = read(source)
            lost = any(mask & inotify.WRITTEN for _, mask in told_now)
            return overrun.pop() if lost and overrun else told_now

        def reopened() -> bool:
            # Again, if it was told to a reading that had begun before.
            served.volume.reopen_replica()
            time.sleep(0.05)
            return not overrun

        monkeypatch.setattr(inotify.Inotify, "read", runs_over)
        until(reopened)
        looked(served)
        before = count(vol)
        write(vol / "replica.img")
        until(lambda: count(vol) == before + 1)


def test_a_device_that_has_gone_hides_nobody(vol: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was not even closed to be opened anew: no end of an opening of ours is waited for."""
    with serving(vol) as served:
        replica = served.volume.core.replica

        def gone(_self: FileBacking) -> None:
            raise Removed(errno.ENXIO, "it is gone")

        monkeypatch.setattr(replica, "is_device", True)
        monkeypatch.setattr(FileBacking, "check_present", gone)
        with pytest.raises(Removed):
            served.volume.reopen_replica()
        monkeypatch.undo()
        only_the_marker(served)


# --- who it is ----------------------------------------------------------------------------------

_ASK = """
import json, os, sys
from pathlib import Path
from vsnapfs import openers
files = [openers.File(os.open(path, os.O_RDONLY), Path(path)) for path in sys.argv[1:]]
found = [[[*writer, many] for writer, many in those.items()] for those in openers.writers(files)]
print(json.dumps(found))
"""


def ask(*paths: Path) -> list[list[list[Any]]]:
    """Whom another process finds: [[pid, started, command, descriptors], …] for each path."""
    done = run(sys.executable, "-c", _ASK, *map(str, paths))
    assert done.returncode == 0, done.stderr
    found: list[list[list[Any]]] = json.loads(done.stdout)
    return found


def test_who_has_it_open_for_writing(tmp_path: Path) -> None:
    """Only writers of that very file, with their command and how many descriptors they have."""
    one, other = tmp_path / "one", tmp_path / "other"
    one.touch()
    other.touch()
    os.link(one, tmp_path / "link")
    command = Path("/proc/self/comm").read_text().strip()
    fds = [os.open(one, os.O_RDONLY), os.open(other, os.O_RDONLY), os.open(one, os.O_PATH)]
    try:
        assert ask(one, other) == [[], []]
        fds += [os.open(tmp_path / "link", os.O_WRONLY), os.open(one, os.O_RDWR)]
        ((found,), nobody) = ask(one, other)
        assert found[0] == os.getpid()
        assert found[2:] == [command, 2]
        assert nobody == []
    finally:
        for fd in fds:
            os.close(fd)
    assert ask(one, other) == [[], []]


def test_a_mapping_needs_no_descriptor(tmp_path: Path) -> None:
    """Who has mapped it shared and writable is found, though he has closed it; no other mapping."""
    path = tmp_path / "a\nb"
    path.write_bytes(bytes(mmap.PAGESIZE))
    map_it = ctypes.CDLL(None, use_errno=True).mmap
    map_it.restype = ctypes.c_void_p
    map_it.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]

    @contextmanager
    def mapped(protection: int, flags: int) -> Iterator[None]:
        fd = os.open(path, os.O_RDWR)
        address = map_it(None, mmap.PAGESIZE, protection, flags, fd, 0)
        os.close(fd)
        assert address not in (None, ctypes.c_void_p(-1).value)
        yield
        ctypes.CDLL(None).munmap(ctypes.c_void_p(address), mmap.PAGESIZE)

    with mapped(mmap.PROT_READ, mmap.MAP_SHARED), mapped(mmap.PROT_WRITE, mmap.MAP_PRIVATE):
        assert ask(path) == [[]]
        with mapped(mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED):
            ((found,),) = ask(path)
            assert (found[0], found[3]) == (os.getpid(), 1)
        assert ask(path) == [[]]


def test_a_process_whose_memory_cannot_be_looked_at_holds_up_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is passed over, and not asked again as long as it is stuck; all others are asked."""
    asked: list[int] = []
    free = threading.Event()

    def mappings(pid: int, _inodes: set[int]) -> Iterator[tuple[int, str, int, str, str]]:
        asked.append(pid)
        if pid == 2:
            free.wait(SECONDS)
        yield pid, "8:1", 7, "", ""

    monkeypatch.setattr(openers, "_PATIENCE", 0.1)
    monkeypatch.setattr(openers, "_pids", lambda: [1, 2, 3])
    monkeypatch.setattr(openers, "_mappings", mappings)
    try:
        openers._mapped_for_writing({7})
        until(lambda: 2 in asked)
        until(lambda: [pid for pid, *_ in openers._mapped_for_writing({7})] == [1, 3])
        assert asked.count(2) == 1
    finally:
        free.set()
    until(lambda: not openers._reading)


def test_the_asking_process_and_its_children_are_not_found(tmp_path: Path) -> None:
    """What they have open is the asker's own."""
    path = tmp_path / "file"
    path.touch()
    child = "import os, sys; os.open(sys.argv[1], os.O_RDWR); print(flush=True); input()"
    code = f"""
import subprocess, sys
with subprocess.Popen([sys.executable, "-c", {child!r}, sys.argv[1]],
                      stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
    child.stdout.readline()
    mine = open(sys.argv[1], "r+")
    {_ASK.replace(chr(10), chr(10) + "    ")}
    child.communicate(b"\\n")
"""
    done = run(sys.executable, "-c", code, str(path))
    assert json.loads(done.stdout) == [[]], done.stderr


def test_the_mount_table_is_read_once_for_all_loop_devices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both may be thousands, and a look must not cost one times the other."""
    path = tmp_path / "file"
    path.touch()
    file = openers.File.at(path)
    devices = [(f"/dev/loop{number}", f"/elsewhere/{number}.img") for number in range(1000)]
    monkeypatch.setattr(openers, "attached", lambda: devices)
    reads = []
    read = openers._mountinfo
    monkeypatch.setattr(openers, "_mountinfo", lambda pid: reads.append(pid) or read(pid))
    assert openers.loops(file) == []
    assert len(reads) == 1


def test_what_a_path_lies_on() -> None:
    """The mount of its nearest directory that has one; what is no path lies on nothing."""
    mounts = {"/": ("8:1", "ext4"), "/a": ("0:5", "tmpfs"), "/a/b c": ("0:6", "fuse.x")}
    assert openers._mount_of("/a/b c", mounts) == ("0:6", "fuse.x")
    assert openers._mount_of("/a/b c/d/e", mounts) == ("0:6", "fuse.x")
    assert openers._mount_of("/a/b", mounts) == ("0:5", "tmpfs")
    assert openers._mount_of("/ab", mounts) == ("8:1", "ext4")
    assert openers._mount_of("/x", {}) == ("", "")
    assert openers._mount_of("(unreachable)/x", mounts) == ("", "")
