"""`vsnapfs status`: one volume or many, well or not, and the way out of every fault."""

from __future__ import annotations

import errno
import json
import re
from pathlib import Path

import cli_backend
import pytest
from cli_backend import Backend, fault, ok, run, status_of

from vsnapfs import config
from vsnapfs.cli import status_text
from vsnapfs.errors import FaultCode

backend = cli_backend.backend
volume = cli_backend.volume


def test_status_json_is_a_list_of_what_the_volumes_say(backend: Backend, volume: Path) -> None:
    """--json is an array with the report of each volume unchanged."""
    backend.answers["status"] = status_of(volume)
    assert json.loads(ok("status", volume, "--json").stdout) == [status_of(volume)]
    assert json.loads(ok("status", "--json").stdout) == []


def test_status_without_volume_shows_all_mounted_ones(
    backend: Backend, volume: Path, tmp_path: Path
) -> None:
    """Each mounted volume once, or a line that says how to ask for another."""
    result = ok("status")
    assert result.stdout == ""
    assert "No volume is mounted" in result.stderr
    other = tmp_path / "vol2"
    other.mkdir()
    config.save(other, config.VolumeConfig("1" * 32))
    backend.mount(volume, tmp_path / "m1")
    backend.mount(other, tmp_path / "m2")
    backend.mount(volume, tmp_path / "m3")
    backend.answers["status"] = lambda directory, _: status_of(directory)
    lines = ok("status").stdout.splitlines()
    assert " ".join(lines[0].split()) == "VOLUME STATE MOUNTED ON USED ALLOCATED MAXIMUM POINTS"
    assert [line.split()[0] for line in lines[1:]] == [str(volume), str(other)]
    assert " ".join(lines[1].split()[2:]) == "- 10.0 MiB 64.0 MiB 100.0 MiB 3"


def test_status_of_one_volume_is_readable(backend: Backend, volume: Path) -> None:
    """One volume is shown in full: state, where it is mounted, all sizes, points."""
    backend.answers["status"] = status_of(volume, mountpoint="/mnt/v", pid=12)
    text = ok("status", volume).stdout
    assert text.startswith(f"{volume}: online; mounted on /mnt/v (process 12)\n")
    assert "used 10.0 MiB, allocated 64.0 MiB, maximum 100.0 MiB (10 % used)" in text
    assert re.search(r"recovery points +3\n", text)


@pytest.mark.parametrize("code", list(FaultCode))
def test_status_shows_every_fault_with_a_way_out(
    backend: Backend, volume: Path, code: FaultCode
) -> None:
    """A fault exits with 3 and shows number, name, event, sizes and what to type."""
    backend.answers["status"] = status_of(volume, state="offline", fault=fault(code))
    result = run("status", volume)
    assert result.exit_code == 3
    text = result.stdout
    head = f"OFFLINE by fault {int(code)} {code.name}, volsnap event {code.event_id}"
    assert head in text.splitlines()[0]
    assert "the diff area has reached its maximum" in text
    assert "2026-11-22" in text
    assert "block 77, a write of 4.0 KiB at byte 1261568" in text
    assert "used 100.0 MiB, allocated 100.0 MiB, maximum 100.0 MiB (100 % used)" in text
    by_itself = code is FaultCode.DIFF_AREA_MISSING
    assert ("comes online by itself" if by_itself else f"Then: vsnapfs online {volume}") in text
    assert len(text.split("way out", 1)[1].strip().splitlines()) >= 3


def test_status_of_a_full_diff_area_says_resize_and_delete(volume: Path) -> None:
    """The way out of fault 8 names both ways of making room, with the present maximum."""
    steps = "\n".join(status_text.way_out(status_of(volume, fault=fault())))
    assert "resize" in steps
    assert "100.0 MiB" in steps
    assert "delete" in steps
    assert "--give-up" not in steps


def test_giving_up_is_only_offered_where_the_area_may_be_lost(volume: Path) -> None:
    """--give-up-recovery-points is named for faults 1, 3, 14 and 15, never for the others."""
    offered = {
        int(code)
        for code in FaultCode
        if "--give-up" in "\n".join(status_text.way_out(status_of(volume, fault=fault(code))))
    }
    assert offered == {1, 3, 14, 15}


@pytest.mark.parametrize("code", [7, 13])
def test_a_host_without_room_is_no_broken_disk(volume: Path, code: int) -> None:
    """A copy or commit that is refused for lack of space says so; any other says: look at dmesg."""
    for number, said in ((errno.EDQUOT, "quota"), (errno.ENOSPC, "Free space"), (5, "dmesg")):
        status = status_of(volume, fault=fault(FaultCode(code), errno=number))
        assert said in "\n".join(status_text.way_out(status))


@pytest.mark.parametrize("code", [1, 12])
def test_no_point_is_called_readable_while_the_area_is_not_open(volume: Path, code: int) -> None:
    """Faults 1 and 12 at an opening: nothing is readable there, and the way leads over a mount."""
    status = status_of(volume, fault=fault(FaultCode(code)))
    assert "stays readable" in "\n".join(status_text.way_out(status))
    status["diff_area"] |= {"used": None, "allocated": None}
    steps = "\n".join(status_text.way_out(status))
    assert "stays readable" not in steps
    assert "mount again" in steps
    assert code == 1 or "move it away" in steps


def test_status_tells_of_a_growth_that_takes_long(backend: Backend, volume: Path) -> None:
    """While it lasts, with the writes that wait; afterwards if it took long; else not a word."""
    area = status_of(volume)["diff_area"]
    for growth, said in (
        ({"seconds": 12.34, "waiting": 2, "last_seconds": None}, "for 12.3 s now; 2 writes wait"),
        ({"seconds": 0.1, "waiting": 1, "last_seconds": 9.0}, "for 0.1 s now; 1 write waits"),
        ({"seconds": 4.0, "waiting": 0, "last_seconds": None}, "for 4.0 s now\n"),
        ({"seconds": None, "waiting": 0, "last_seconds": 7.25}, "took 7.2 s"),
        ({"seconds": None, "waiting": 0, "last_seconds": 0.5}, ""),
        ({"seconds": None, "waiting": 0, "last_seconds": None}, ""),
        ({}, ""),
    ):
        backend.answers["status"] = status_of(volume, diff_area=area | {"growth": growth})
        text = ok("status", volume).stdout
        assert said in text
        assert said or not re.search(r"^ +(growing|last growth) ", text, re.MULTILINE)


def test_status_of_a_fault_that_no_write_tripped(backend: Backend, volume: Path) -> None:
    """Block, write and sizes may be unknown (a fault found at open): the rest is shown."""
    bare = fault(FaultCode.DIFF_AREA_MISSING, block=None, offset=None, length=None, maximum=None)
    unknown = {"path": "/a/b", "used": None, "allocated": None, "maximum": None}
    backend.answers["status"] = status_of(volume, state="offline", fault=bare, diff_area=unknown)
    result = run("status", volume)
    assert result.exit_code == 3
    assert "DIFF_AREA_MISSING" in result.stdout
    assert "used ?, allocated ?, maximum ?, /a/b" in result.stdout
    assert "Bring /a/b back" in result.stdout


def test_status_offline_by_the_administrator_is_no_failure(backend: Backend, volume: Path) -> None:
    """Taken offline on purpose: exit code 0, and how to bring it back."""
    backend.answers["status"] = status_of(volume, state="offline")
    assert f"vsnapfs online {volume}" in ok("status", volume).stdout


def test_one_bad_volume_hides_no_other(backend: Backend, volume: Path, tmp_path: Path) -> None:
    """What cannot be looked at is an error of its own; the others are shown; exit code 1."""
    backend.answers["status"] = status_of(volume)
    result = run("status", tmp_path / "none", volume)
    assert result.exit_code == 1
    assert f"{volume}: online" in result.stdout
    assert f"vsnapfs: error: {tmp_path / 'none'} is not a volume" in result.stderr
    result = run("status", tmp_path / "none", volume, "--json")
    assert result.exit_code == 1
    first, second = json.loads(result.stdout)
    assert first["volume"] == str(tmp_path / "none")
    assert first["error"]["code"] == "no-volume"
    assert second == status_of(volume)


def test_status_tells_of_a_dead_mount(backend: Backend, volume: Path, tmp_path: Path) -> None:
    """A volume whose server has died is shown with the mountpoint that is left over."""
    backend.answers["status"] = status_of(volume)
    backend.mount(volume, tmp_path / "m", stale=True)
    assert f"vsnapfs umount {tmp_path / 'm'}" in ok("status").stdout
    (report,) = json.loads(ok("status", "--json").stdout)
    assert report["dead_mount"] == str(tmp_path / "m")


def test_a_fault_weighs_more_than_an_error(backend: Backend, volume: Path, tmp_path: Path) -> None:
    """With a faulted volume and one that cannot be looked at, the exit code is 3."""
    backend.answers["status"] = status_of(volume, state="offline", fault=fault())
    assert run("status", tmp_path / "none", volume).exit_code == 3


def test_names_with_markup_and_escapes_are_shown_as_text(backend: Backend, volume: Path) -> None:
    """Labels and paths are neither rich markup nor terminal escapes when printed."""
    evil = [{"number": 1, "created_ns": 0, "label": "[red]x[/red] \x1b[31m :smile: \u202e"}]
    backend.answers["rp_list"] = evil
    text = ok("rp", "list", volume).stdout
    assert "[red]x[/red] \\x1b[31m :smile: \\u202e" in text
    assert "\x1b" not in text


def test_status_says_what_is_under_way_and_what_it_waits_for(
    backend: Backend, volume: Path
) -> None:
    """The running operation, the queue (its first five), and waits that last; nothing otherwise."""

    def entry(what: str, seconds: float = 7.2) -> dict[str, object]:
        return {"what": what, "since": "2026-11-22T07:20:00.000000Z", "seconds": seconds}

    report = status_of(volume)
    backend.answers["status"] = report
    quiet = ok("status", volume).stdout
    report["operations"] = {"running": None, "waiting": [], "waits_for": [entry("a sync", 0.1)]}
    assert ok("status", volume).stdout == quiet
    report["operations"] = {
        "running": entry("restoring recovery point 3") | {"begun": False},
        "waiting": [entry(f"deleting recovery point {number}") for number in range(1, 8)],
        "waits_for": [entry("a sync"), entry("another"), entry("a sync"), entry("brief", 0.5)],
    }
    lines = [line.strip() for line in ok("status", volume).stdout.splitlines()]
    since = "since 2026-11-22T07:20:00Z, for 7 s"
    where = next(n for n, line in enumerate(lines) if line.startswith("under way"))
    assert lines[where : where + 9] == [
        f"under way        restoring recovery point 3, {since}, not begun yet",
        f"in the queue     deleting recovery point 1, {since}",
        *(f"deleting recovery point {number}, {since}" for number in range(2, 6)),
        "and 2 more",
        f"WAITS FOR        a sync, {since}",
        f"another, {since}",
    ]
    report["operations"] = {"running": entry("x"), "news": 1}  # of another version
    assert "x, since" in ok("status", volume).stdout
