"""The event log: what is logged is in the file, each process and thread, whatever the params."""

from __future__ import annotations

import json
import logging
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vsnapfs.events import Event, EventLog, Level, read_events
from vsnapfs.events.event import plain_params


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


# --- writing -----------------------------------------------------------------------------------


def test_an_event_has_time_source_id_level_and_params(log: EventLog) -> None:
    """What log returns is what the file gives back."""
    before = time.time_ns()
    event = log.log("volsnap", 87, volume="/srv/vol1", used=7, block=None, label="夜間")
    assert before <= event.time_ns <= time.time_ns()
    assert (event.source, event.event_id, event.level) == ("volsnap", 87, Level.ERROR)
    assert event.params == {"volume": "/srv/vol1", "used": 7, "label": "夜間"}
    assert log.events() == [event] == read_events(log.path)
    assert log.failed is None


def test_the_file_is_private_json_lines_that_jq_can_read(log: EventLog) -> None:
    """0600 whatever the umask; one object a line, with the time readable and exact."""
    log.log("vsnapfs", 1000, label="夜間\n")
    log.log("vsnapfs", 1001)
    assert stat.S_IMODE(log.path.stat().st_mode) == 0o600
    lines = log.path.read_bytes().splitlines(keepends=True)
    assert len(lines) == 2
    assert all(line.endswith(b"\n") for line in lines)
    assert "夜間".encode() in lines[0]
    data = json.loads(lines[0])
    event = log.events()[0]
    assert data["time"] == event.time
    assert data["time_ns"] == event.time_ns
    assert (data["source"], data["event_id"], data["level"]) == ("vsnapfs", 1000, "Information")


@pytest.mark.parametrize(
    ("time_ns", "text"),
    [
        (0, "1970-01-01T00:00:00.000000Z"),
        (1_795_332_000_999_999_999, "2026-11-22T07:20:00.999999Z"),
        (253_402_300_799_999_999_999, "9999-12-31T23:59:59.999999Z"),
    ],
)
def test_times_are_utc_with_microseconds(
    time_ns: int, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In any time zone, and never rounded up into the next second."""
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    try:
        assert Event(time_ns, "volsnap", 87, Level.ERROR).time == text
    finally:
        monkeypatch.undo()
        time.tzset()


def test_the_log_survives_a_restart_and_only_grows(path: Path) -> None:
    """A second opening appends; what was there stays byte for byte."""
    first = EventLog(path)
    first.log("vsnapfs", 1000)
    first.close()
    written = path.read_bytes()
    second = EventLog(path)
    second.log("vsnapfs", 1001)
    assert path.read_bytes().startswith(written)
    assert ids(second.events()) == [1000, 1001]
    second.close()


def test_the_file_is_opened_as_promised(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Append-only, close-on-exec, no symbolic link followed, created for the owner alone."""
    flags = []
    real = os.open

    def spy(name: Any, how: int, mode: int = 0o777, **more: Any) -> int:
        if name == path:
            flags.append((how, mode))
        return real(name, how, mode, **more)

    monkeypatch.setattr(os, "open", spy)
    EventLog(path).close()
    how, mode = flags[0]
    for flag in (os.O_APPEND, os.O_CREAT, os.O_NOFOLLOW, os.O_CLOEXEC):
        assert how & flag
    assert mode == 0o600


def test_errors_are_synced_and_nothing_else(log: EventLog, monkeypatch: pytest.MonkeyPatch) -> None:
    """An Error is on the disk when log returns; an Information costs no sync."""
    synced = []
    monkeypatch.setattr(os, "fdatasync", lambda fd: synced.append(os.fstat(fd).st_size))
    log.log("vsnapfs", 1001)
    log.log("volsnap", 24)
    assert synced == []
    log.log("volsnap", 87)
    assert synced == [log.path.stat().st_size]


def test_an_event_outlives_a_killed_process(path: Path) -> None:
    """What log returned from is there after SIGKILL."""
    code = f"""
import os, signal
from pathlib import Path
from vsnapfs.events import EventLog
log = EventLog(Path({str(path)!r}))
for n in range(20): log.log("vsnapfs", 1001, count=n)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code], check=False, timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert counts(read_events(path)) == list(range(20))


def test_threads_lose_and_mix_nothing(log: EventLog) -> None:
    """Events of several threads all arrive, whole, each thread's in its order."""
    seen: list[Event] = []
    log.subscribe(seen.append)

    def work(thread: int) -> None:
        for n in range(100):
            log.log("vsnapfs", 1001, what=thread, count=n)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    events = log.events()
    assert len(events) == len(seen) == 400
    for thread_number in range(4):
        mine = [event for event in events if event.params["what"] == thread_number]
        assert counts(mine) == list(range(100))


def test_a_deleted_or_rotated_file_is_started_anew(log: EventLog) -> None:
    """As logrotate moves the file away: the next event is in a new file of the old name."""
    log.log("vsnapfs", 1000)
    aside = log.path.with_suffix(".1")
    log.path.rename(aside)
    log.log("vsnapfs", 1001)
    assert ids(read_events(aside)) == [1000]
    assert ids(read_events(log.path)) == [1001]


def test_a_file_whose_directory_is_out_of_sight_takes_events(tmp_path: Path) -> None:
    """A volume's directory may be moved, or its file system unmounted lazily, while it is open."""
    (tmp_path / "vol").mkdir()
    log = EventLog(tmp_path / "vol" / "events.jsonl")
    log.log("vsnapfs", 1000)
    (tmp_path / "vol").rename(tmp_path / "elsewhere")
    log.log("volsnap", 93)
    log.close()
    assert ids(read_events(tmp_path / "elsewhere" / "events.jsonl")) == [1000, 93]
    assert log.failed is None


def test_a_relative_path_survives_a_change_of_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A daemon goes to /, and its log stays where it is, also for a reader that follows it."""
    monkeypatch.chdir(tmp_path)
    log = EventLog(Path("events.jsonl"))
    stop = threading.Event()
    stop.set()
    later = log.follow(stop)
    monkeypatch.chdir("/")
    log.log("vsnapfs", 1001)
    log.close()
    assert ids(read_events(tmp_path / "events.jsonl")) == [1001]
    assert ids(list(later)) == [1001]
    assert not Path("/events.jsonl").exists()


def test_an_event_after_close_still_gets_into_the_file(log: EventLog) -> None:
    """Late threads lose nothing, and close may be called again."""
    descriptors = len(os.listdir("/proc/self/fd"))
    log.close()
    log.log("vsnapfs", 1002)
    log.close()
    assert ids(read_events(log.path)) == [1002]
    assert len(os.listdir("/proc/self/fd")) == descriptors - 1


@pytest.mark.expects_log
def test_an_id_the_catalog_lacks_is_logged_as_a_warning(
    log: EventLog, caplog: pytest.LogCaptureFixture
) -> None:
    """A mistake in the program costs no event, and is said."""
    assert log.log("volsnap", 4711, volume="x").level is Level.WARNING
    assert ids(log.events()) == [4711]
    assert "not in the catalog" in caplog.text


# --- params ------------------------------------------------------------------------------------


class Colour(IntEnum):
    RED = 3


class Odd:
    def __str__(self) -> str:
        raise RuntimeError("no")


def test_params_may_be_any_type_the_engine_has(log: EventLog) -> None:
    """Numbers of numpy, enums, paths, errors: stored as the plain value they stand for."""
    event = log.log(
        "volsnap",
        87,
        block=np.int64(5),
        used=np.uint64(2**64 - 1),
        fault=Colour.RED,
        volume=Path("/srv/vol1"),
        diff_area=os.fsencode("/srv/夜間"),
        reason=OSError(28, "No space left on device"),
        what=Odd(),
        points=(np.int32(1), 2),
        offset=2**63 - 1,
        kept=float("inf"),
        text=Path(os.fsdecode(b"/bad-\xff")),
    )
    assert event.params == {
        "block": 5,
        "used": 2**64 - 1,
        "fault": 3,
        "volume": "/srv/vol1",
        "diff_area": "/srv/夜間",
        "reason": "[Errno 28] No space left on device",
        "what": "Odd",
        "points": [1, 2],
        "offset": 2**63 - 1,
        "kept": "inf",
        "text": "/bad-\udcff",
    }
    assert log.events() == [event]
    assert log.path.read_bytes().decode()  # UTF-8 in spite of the last one


def test_no_param_can_make_an_event_endless(log: EventLog) -> None:
    """What is far too long is cut: the space kept for the log is for many events."""
    deep: list[Any] = []
    for _ in range(5000):
        deep = [deep]
    log.log("vsnapfs", 1091, text="x" * 10**7, points=list(range(10**5)), what=2**99999, label=deep)
    event = log.events()[0]
    assert event.params["text"].endswith("xxx…")
    assert event.params["points"][:1024] == list(range(1024)), "512 points are not too many"
    assert log.path.stat().st_size < 16 * 1024


values = st.recursive(
    st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@given(
    st.integers(0, 253_402_300_800_000_000_000 - 1),
    st.text(),
    st.integers(-(2**31), 2**31),
    st.sampled_from(Level),
    st.dictionaries(st.text(), values, max_size=5),
)
def test_a_line_gives_back_the_event(
    time_ns: int, source: str, event_id: int, level: Level, params: dict[str, Any]
) -> None:
    """For any text and value: one line, and the same event when read."""
    event = Event(time_ns, source, event_id, level, plain_params(params))
    line = event.to_line()
    assert line.endswith(b"\n")
    assert len(line.decode().splitlines()) == 1
    assert Event.from_line(line) == event


# --- subscribers -------------------------------------------------------------------------------


def test_subscribers_get_each_later_event_until_they_leave(log: EventLog) -> None:
    """The event is in the file by then; a second subscription is independent."""
    log.log("vsnapfs", 1000)
    seen: list[tuple[Event, list[Event]]] = []
    other: list[Event] = []
    unsubscribe = log.subscribe(lambda event: seen.append((event, read_events(log.path))))
    log.subscribe(other.append)
    event = log.log("vsnapfs", 1001)
    unsubscribe()
    unsubscribe()
    log.log("vsnapfs", 1002)
    assert [got for got, _ in seen] == [event]
    assert seen[0][1][-1] == event
    assert ids(other) == [1001, 1002]


@pytest.mark.expects_log
def test_a_subscriber_can_neither_fail_nor_lock_the_log(
    log: EventLog, caplog: pytest.LogCaptureFixture
) -> None:
    """One that raises is logged; one that logs an event itself does not wait for itself."""

    def fail(event: Event) -> None:
        raise RuntimeError("broken subscriber")

    def logs_too(event: Event) -> None:
        if event.event_id == 1001:
            log.log("vsnapfs", 1002)

    seen: list[Event] = []
    for callback in (fail, logs_too, seen.append):
        log.subscribe(callback)
    log.log("vsnapfs", 1001)
    assert sorted(ids(seen)) == [1001, 1002]
    assert ids(log.events()) == [1001, 1002]
    assert caplog.text.count("RuntimeError: broken subscriber") == 2


@pytest.mark.expects_log
def test_a_handler_of_logging_may_log_an_event(tmp_path: Path) -> None:
    """The warning about a broken log comes back as an event: no deadlock, no endless loop."""
    log = EventLog(tmp_path / "missing" / "events.jsonl")
    log.failed = None

    class Bridge(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            log.log("vsnapfs", 1091, text=record.getMessage())

    bridge = Bridge()
    logging.getLogger().addHandler(bridge)
    try:
        log.log("volsnap", 87)
    finally:
        logging.getLogger().removeHandler(bridge)
    assert ids(log.events()) == [87, 1091]


# --- Ntfs 140 ----------------------------------------------------------------------------------


def test_one_140_per_fault_and_the_repeats_are_counted(log: EventLog) -> None:
    """The first failing flush is logged, later ones counted; online tells how many and resets."""
    assert log.flush_failures == 0
    first = log.log_flush_failure(volume="/v", device="/dev/loop0", reason="offline")
    assert first is not None
    assert (first.source, first.event_id) == ("Microsoft-Windows-Ntfs", 140)
    assert first.level is Level.WARNING
    assert first.params == {"volume": "/v", "device": "/dev/loop0", "reason": "offline"}
    for _ in range(4):
        assert log.log_flush_failure(volume="/v") is None
    assert log.flush_failures == 5
    assert ids(log.events()) == [140]

    assert log.reset_flush_failures() == 4
    assert log.flush_failures == 0
    assert ids(log.events()) == [140, 1023]
    assert log.events()[1].params == {"volume": "/v", "repeats": 4}

    assert log.log_flush_failure(volume="/v") is not None, "the next fault is news"
    assert log.reset_flush_failures() == 0
    assert ids(log.events()) == [140, 1023, 140], "no repeats, nothing to tell"


def test_repeats_are_not_lost_when_the_process_ends_offline(log: EventLog) -> None:
    """Closing the log tells them too, once."""
    log.log_flush_failure()
    log.log_flush_failure()
    log.close()
    log.close()
    assert ids(read_events(log.path)) == [140, 1023]


def test_flush_failures_of_threads_give_one_140(log: EventLog) -> None:
    """However many flushes fail at once."""
    threads = [
        threading.Thread(target=lambda: [log.log_flush_failure() for _ in range(50)])
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ids(log.events()) == [140]
    assert log.flush_failures == 200
