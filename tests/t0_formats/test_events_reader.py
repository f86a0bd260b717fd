"""Reading the event log: torn and rotten files, and files that are being written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vsnapfs.errors import VsnapError
from vsnapfs.events import Event, EventLog, Level, follow_events, read_events


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "events.jsonl"


@pytest.fixture
def log(path: Path) -> Iterator[EventLog]:
    log = EventLog(path)
    yield log
    log.close()


def ids(events: list[Event]) -> list[int]:
    return [event.event_id for event in events]


def counts(events: list[Event]) -> list[Any]:
    return [event.params["count"] for event in events]


def stopped() -> threading.Event:
    stop = threading.Event()
    stop.set()
    return stop


# --- torn and rotten files ---------------------------------------------------------------------


def test_a_torn_last_line_harms_only_itself(path: Path) -> None:
    """Cut at any byte: the events before it stay, and the next one starts on a fresh line."""
    log = EventLog(path)
    for n in range(3):
        log.log("vsnapfs", 1091, count=n, text="夜間")
    log.close()
    whole = path.read_bytes()
    start = whole.rindex(b"\n", 0, -1) + 1
    for cut in range(start, len(whole) + 1):
        path.write_bytes(whole[:cut])
        kept = [0, 1, 2] if cut >= len(whole) - 1 else [0, 1]
        assert counts(read_events(path)) == kept
        again = EventLog(path)
        again.log("vsnapfs", 1091, count=9)
        assert counts(again.events()) == [*kept, 9]
        assert counts(list(again.follow(stopped()))) == [*kept, 9]
        again.close()


@given(st.lists(st.binary(max_size=40) | st.sampled_from([b"", b"\0" * 9, b"[]", b"{", b"\xff"])))
def test_rubbish_between_events_is_skipped(
    tmp_path_factory: pytest.TempPathFactory, pieces: list[bytes]
) -> None:
    """Whatever lines are no events, the events around them are read, by both readers."""
    path = tmp_path_factory.mktemp("rubbish") / "events.jsonl"
    expected = []
    with path.open("wb") as file:
        for n, piece in enumerate(pieces):
            event = Event(n, "vsnapfs", 1091, Level.WARNING, {"count": n})
            expected.append(event)
            file.write(piece + b"\n" + event.to_line())
        file.write(b'{"time_ns": 5, "source": "vols')
    assert read_events(path) == expected
    assert list(follow_events(path, stopped())) == expected


@pytest.mark.parametrize(
    "change",
    [
        {"time_ns": "1"},
        {"time_ns": True},
        {"time_ns": -1},
        {"time_ns": 10**30},
        {"time_ns": None},
        {"source": 5},
        {"event_id": "87"},
        {"event_id": 8.7},
        {"level": "Bad"},
        {"level": ["Error"]},
        {"params": []},
    ],
)
def test_a_line_of_the_wrong_types_is_no_event(change: dict[str, Any]) -> None:
    """A rotted line never becomes an event that breaks its readers."""
    line = Event(1, "volsnap", 87, Level.ERROR, {}).to_line()
    assert Event.from_line(line) is not None
    assert Event.from_line(json.dumps(json.loads(line) | change).encode()) is None


@pytest.mark.parametrize(
    "line", [b"", b"null", b"[" * 10**5, b"1" * 10**5, b"\xff\xfe", b'{"a":' * 5000]
)
def test_what_is_no_event_is_none(line: bytes) -> None:
    """Reading never raises."""
    assert Event.from_line(line) is None


def test_a_line_without_end_does_not_fill_the_memory(path: Path) -> None:
    """A foreign file of one huge line is skipped in bounded memory; what follows is read."""
    event = Event(1, "volsnap", 87, Level.ERROR, {})
    with path.open("wb") as file:
        file.write(event.to_line())
        file.seek(200 * 1024 * 1024)
        file.write(b"\n" + event.to_line())
    tracemalloc.start()
    try:
        assert read_events(path) == [event, event]
        assert tracemalloc.get_traced_memory()[1] < 32 * 1024 * 1024
    finally:
        tracemalloc.stop()


# --- reading while it is written ---------------------------------------------------------------


def test_no_file_is_no_events(path: Path) -> None:
    """Neither is a directory that does not exist, or is a file."""
    assert read_events(path) == []
    assert read_events(path / "x") == []
    path.touch()
    assert read_events(path / "x") == []
    assert read_events(path) == []


@pytest.mark.parametrize("kind", ["link", "directory", "fifo"])
def test_what_is_no_log_file_is_refused(path: Path, kind: str) -> None:
    """A clear error instead of waiting for a pipe or following a link."""
    if kind == "link":
        path.symlink_to("/etc/passwd")
    elif kind == "directory":
        path.mkdir()
    else:
        os.mkfifo(path)
    for read in (lambda: read_events(path), lambda: list(follow_events(path, stopped()))):
        with pytest.raises(VsnapError) as caught:
            read()
        assert caught.value.code == "events-unreadable"
        assert str(path) in caught.value.message
        assert caught.value.exit_code == 1


WRITER = """
import sys, time
from pathlib import Path
from vsnapfs.events import EventLog
log = EventLog(Path(sys.argv[1]))
for n in range(int(sys.argv[2])):
    log.log("vsnapfs", 1091, count=n, text="x" * 500)
log.close()
"""


def test_another_process_can_read_and_follow_while_it_is_written(path: Path) -> None:
    """A reader sees whole events in order at any moment; a follower sees each exactly once."""
    number = 2000
    stop = threading.Event()
    followed: list[Event] = []

    def follow() -> None:
        followed.extend(follow_events(path, stop, poll=0.001))

    follower = threading.Thread(target=follow)
    follower.start()  # the file does not exist yet
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path), str(number)])
    try:
        seen = 0
        while writer.poll() is None:
            found = counts(read_events(path))
            assert found == list(range(len(found)))
            assert len(found) >= seen
            seen = len(found)
        assert writer.returncode == 0
    finally:
        writer.kill()
        writer.wait()
        stop.set()
        follower.join()
    assert counts(followed) == list(range(number))


def test_follow_delivers_what_was_written_before_the_stop(log: EventLog) -> None:
    """Set before the first look: everything there, then the end."""
    log.log("vsnapfs", 1000)
    log.log("vsnapfs", 1001)
    assert ids(list(log.follow(stopped()))) == [1000, 1001]


def test_follow_can_leave_out_what_is_there_already(log: EventLog) -> None:
    """From the moment of the call on, not of the first look."""
    log.log("vsnapfs", 1000)
    later = follow_events(log.path, stopped(), existing=False)
    log.log("vsnapfs", 1001)
    assert ids(list(later)) == [1001]


def test_follow_goes_on_in_the_file_that_replaces_the_old_one(log: EventLog) -> None:
    """Rotated, deleted or emptied: nothing of either file is missed or told twice."""
    events = log.follow(poll=0.001)
    log.log("vsnapfs", 1000)
    assert next(events).event_id == 1000
    log.log("vsnapfs", 1001)
    log.path.rename(log.path.with_suffix(".1"))
    log.log("vsnapfs", 1002, text="x" * 500)
    assert next(events).event_id == 1001
    assert next(events).event_id == 1002
    log.path.write_bytes(b"")
    log.log("vsnapfs", 1010)
    assert next(events).event_id == 1010
    log.path.unlink()
    log.log("vsnapfs", 1011)
    assert next(events).event_id == 1011
    events.close()  # type: ignore[attr-defined]


def test_follow_waits_for_the_rest_of_a_line(path: Path) -> None:
    """A line on its way, cut anywhere, is told once and when it is whole."""
    event = Event(1, "volsnap", 87, Level.ERROR, {"label": "夜間"})
    line = event.to_line()
    for cut in range(1, len(line)):
        path.write_bytes(line[:cut])
        stop = threading.Event()
        events = follow_events(path, stop, poll=0)
        timer = threading.Thread(target=append_and_stop, args=(path, line[cut:] + line, stop))
        timer.start()
        assert list(events) == [event, event]
        timer.join()


def append_and_stop(path: Path, data: bytes, stop: threading.Event) -> None:
    with path.open("ab") as file:
        file.write(data)
    stop.set()
