"""Each command: what it asks of the layers below, what it prints, what it exits with."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import cli_backend
import pytest
from cli_backend import MIB, POINTS, Backend, fault, ok, refused, run, status_of, write_events

from vsnapfs.errors import BusyError, VsnapError

backend = cli_backend.backend
volume = cli_backend.volume


# --- create, mount, umount -----------------------------------------------------------------------


def fake_create(monkeypatch: pytest.MonkeyPatch, function: Callable[..., list[str]]) -> None:
    import vsnapfs.volume

    module = ModuleType("vsnapfs.volume.create")
    module.create_volume = function  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(vsnapfs.volume, "create", module, raising=False)


def test_create_passes_everything_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every option reaches create_volume, sizes in bytes, names relative to where the user is."""
    seen: dict[str, Any] = {}

    def create(directory: Path, **kwargs: Any) -> list[str]:
        seen.update(kwargs, directory=directory)
        kwargs["progress"]("copying", 5, 10)
        return ["the host is nearly full"]

    fake_create(monkeypatch, create)
    monkeypatch.chdir(tmp_path)
    result = ok(
        *("create", "v", "--size", "1GiB", "--diff-area-size", "64MiB", "--diff-area", "d"),
        *("--replica", "r", "--from", "i", "--block-size", "4KiB", "--on-full", "evict"),
        *("--durability", "process", "--zero-blocks", "copy", "--force", "--grow-timeout", "90"),
    )
    del seen["progress"]
    assert seen == {
        "directory": tmp_path / "v",
        "size": 1024 * MIB,
        "diff_area_size": 64 * MIB,
        "diff_area": tmp_path / "d",
        "replica": tmp_path / "r",
        "from_image": tmp_path / "i",
        "block_size": 4096,
        "on_full": "evict",
        "grow_timeout": 90.0,
        "durability": "process",
        "zero_blocks": "copy",
        "force": True,
    }
    assert "vsnapfs: warning: the host is nearly full" in result.stderr
    assert "vsnapfs mount v MOUNTPOINT" in result.stderr


def test_create_refuses_an_empty_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`vsnapfs create "$unset"` does not make a volume of the current directory."""
    monkeypatch.chdir(tmp_path)
    refused(run("create", "", "--size", "1G", "--diff-area-size", "1G"), "empty", code=2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("seconds", ["-1", "3601", "nan", "soon", ""])
def test_create_refuses_a_grow_timeout_that_is_none(tmp_path: Path, seconds: str) -> None:
    """Seconds from 0 to 3600; nothing else, and nothing is made."""
    command = ("create", tmp_path / "v", "--size", "1MiB", "--diff-area-size", "2MiB")
    refused(run(*command, "--grow-timeout", seconds), "grow-timeout", code=2)
    assert list(tmp_path.iterdir()) == []


def test_create_insists_on_the_policies_there_are(tmp_path: Path) -> None:
    """An unknown on-full policy is refused with the known ones."""
    result = run("create", tmp_path / "v", "--diff-area-size", "1G", "--on-full", "hold")
    refused(result, "offline", "evict", code=2)


def test_mount_starts_a_server(backend: Backend, volume: Path, tmp_path: Path) -> None:
    """The command mount hands the volume, the mountpoint and the options to the daemon."""
    backend.answers["status"] = {"state": "online", "fault": None}
    result = ok("mount", volume, tmp_path / "m", "-o", "allow_other,noatime", "-o", "noexec")
    kind, args, kwargs = backend.done[-1]
    assert kind == "spawn"
    assert args == (volume, tmp_path / "m")
    assert kwargs["options"] == ("allow_other,noatime", "noexec")
    assert kwargs["accept_changed_replica"] is False
    assert "4711" in result.stderr
    assert "warning" not in result.stderr
    assert result.stdout == ""


def test_mount_says_that_the_volume_is_offline(
    backend: Backend, volume: Path, tmp_path: Path
) -> None:
    """Mounting an offline volume succeeds with a warning; that status fails spoils nothing."""
    fault = {"code": 8, "name": "DIFF_AREA_FULL"}
    backend.answers["status"] = {"state": "offline", "fault": fault}
    assert "offline by fault 8 DIFF_AREA_FULL" in ok("mount", volume, tmp_path / "m").stderr
    backend.answers["status"] = {"state": "offline", "fault": None}
    assert "is offline: recovery points" in ok("mount", volume, tmp_path / "m").stderr
    backend.answers["status"] = VsnapError("gone again")
    assert "4711" in ok("mount", volume, tmp_path / "m").stderr


def test_mount_in_the_foreground_serves_here(
    backend: Backend, volume: Path, tmp_path: Path
) -> None:
    """--foreground serves in this process."""
    result = ok(
        *("mount", volume, tmp_path / "m", "--foreground"),
        "--accept-changed-replica",
        "--lang",
        "ja",
    )
    assert "Ctrl-C" in result.stderr
    assert backend.done[-1][2]["lang"] == "ja"
    assert backend.done[-1][0] == "serve"
    assert backend.done[-1][2]["accept_changed_replica"] is True


def test_umount_takes_either_name(backend: Backend, volume: Path, tmp_path: Path) -> None:
    """The command umount finds the mount by the volume and by the mountpoint."""
    backend.mount(volume, tmp_path / "m")
    ok("umount", volume)
    ok("umount", f"{tmp_path}/m/")
    assert backend.done == [("unmount", tmp_path / "m")] * 2


def test_umount_names_the_loop_device_that_holds_it(
    backend: Backend, volume: Path, tmp_path: Path
) -> None:
    """An attached volume is not unmounted; the error says which device and how to go on."""
    backend.mount(volume, tmp_path / "m")
    backend.loops[tmp_path / "m"] = ["/dev/loop3"]
    refused(run("umount", volume), "/dev/loop3", "vsnapfs detach")
    assert backend.done == []


def test_umount_of_what_is_not_mounted(backend: Backend, volume: Path, tmp_path: Path) -> None:
    """A volume that is not mounted, and a path that is nothing, are told apart."""
    refused(run("umount", volume), "is not mounted")
    refused(run("umount", tmp_path / "x"), "is not a volume")
    refused(run("umount", ""), "empty", code=2)
    assert backend.done == []


def test_umount_works_although_volume_and_server_are_gone(backend: Backend, tmp_path: Path) -> None:
    """A dead mount of a deleted volume can still be taken away."""
    backend.mount(tmp_path / "deleted", tmp_path / "m", stale=True)
    ok("umount", tmp_path / "m")
    assert backend.done == [("unmount", tmp_path / "m")]


# --- attach, detach ------------------------------------------------------------------------------


def test_attach_prints_the_device_alone(backend: Backend, volume: Path, tmp_path: Path) -> None:
    """On stdout is the device and nothing else, for $(vsnapfs attach …)."""
    backend.mount(volume, tmp_path / "m")
    backend.answers["status"] = status_of(volume)
    assert ok("attach", volume).stdout == "/dev/loop7\n"
    assert backend.done == [("attach", tmp_path / "m" / "replica.img")]


def test_attach_refuses_what_is_not_there_to_attach(
    backend: Backend, volume: Path, tmp_path: Path
) -> None:
    """Unmounted, dead and offline volumes are refused with what to do first."""
    refused(run("attach", volume), "not mounted", "vsnapfs mount")
    backend.mount(volume, tmp_path / "m", stale=True)
    refused(run("attach", volume), "not mounted")
    backend.mounts.clear()
    backend.mount(volume, tmp_path / "m")
    backend.answers["status"] = status_of(volume, state="offline", fault=fault())
    refused(run("attach", volume), "offline by fault 8 DIFF_AREA_FULL", "vsnapfs online", code=3)
    assert backend.done == []


def test_detach_takes_all_devices_of_the_volume(
    backend: Backend, volume: Path, tmp_path: Path
) -> None:
    """The command detach lets go of each device, and says so when there is none."""
    backend.mount(volume, tmp_path / "m")
    refused(run("detach", volume), "no loop device")
    backend.loops[tmp_path / "m"] = ["/dev/loop3", "/dev/loop4"]
    ok("detach", volume)
    assert backend.done == [("detach", "/dev/loop3"), ("detach", "/dev/loop4")]


# --- recovery points -----------------------------------------------------------------------------


def test_rp_create_prints_the_number_alone(backend: Backend, volume: Path) -> None:
    """On stdout is the number and nothing else; the label is passed on."""
    backend.answers["rp_create"] = POINTS[1]
    result = ok("recovery-point", "create", volume, "--label", "夜")
    assert result.stdout == "12\n"
    assert backend.calls == [(volume, "rp_create", {"label": "夜"})]


def test_rp_list_shows_table_and_json(backend: Backend, volume: Path) -> None:
    """The table and --json name number, creation in UTC, and label."""
    backend.answers["rp_list"] = POINTS
    lines = ok("rp", "list", volume).stdout.splitlines()
    assert [line.split() for line in lines] == [
        ["NUMBER", "CREATED", "LABEL"],
        ["3", "2026-11-22", "07:20:00Z", "before"],
        ["12", "2026-11-22", "07:21:00Z", "-"],
    ]
    assert json.loads(ok("rp", "list", volume, "--json").stdout) == POINTS
    backend.answers["rp_list"] = []
    assert ok("rp", "list", volume).stdout == ""
    assert json.loads(ok("rp", "list", volume, "--json").stdout) == []


def test_rp_delete_and_restore_pass_the_point_as_typed(backend: Backend, volume: Path) -> None:
    """A point is passed on as it was typed, with --force; blank names are refused."""
    backend.answers |= {"rp_delete": POINTS[0], "rp_restore": POINTS[0]}
    ok("rp", "delete", volume, "oldest", "--force")
    ok("rp", "restore", volume, "before")
    refused(run("rp", "delete", volume, " "), "empty", code=2)
    assert backend.calls == [
        (volume, "rp_delete", {"point": "oldest", "force": True}),
        (volume, "rp_restore", {"point": "before", "force": False}),
    ]


def test_rp_restore_says_what_it_does_and_what_came_of_it(backend: Backend, volume: Path) -> None:
    """Before and after, on stderr; a refusal shows no success."""
    backend.answers["rp_restore"] = POINTS[0]
    result = ok("rp", "restore", volume, "before")
    assert "Restoring" in result.stderr
    assert "now equals recovery point 3" in result.stderr
    backend.answers["rp_restore"] = BusyError("replica.img is open")
    result = run("rp", "restore", volume, "before")
    assert result.exit_code == 1
    assert "now equals" not in result.stderr


# --- protection ----------------------------------------------------------------------------------


def test_resize_passes_the_total_and_shows_the_new_sizes(backend: Backend, volume: Path) -> None:
    """The total arrives in bytes, the sizes afterwards are shown, and what to do if offline."""
    backend.answers |= {"resize": None, "status": status_of(volume, state="offline", fault=fault())}
    result = ok("resize", volume, "--diff-area-size", "100M")
    assert backend.calls[0] == (volume, "resize", {"total": 100 * MIB})
    assert "maximum 100.0 MiB" in result.stdout
    assert "still offline" in result.stderr


def test_online_shows_the_warnings(backend: Backend, volume: Path) -> None:
    """What would still not fit is shown as a warning, and the command succeeds."""
    backend.answers["online"] = ["the write that faulted would still not fit"]
    result = ok("online", volume)
    assert "vsnapfs: warning: the write that faulted would still not fit\n" in result.stderr
    assert backend.calls == [(volume, "online", {"give_up_recovery_points": False})]


@pytest.mark.parametrize("answer", ["n\n", "\n", ""])
def test_giving_up_points_needs_a_yes(backend: Backend, volume: Path, answer: str) -> None:
    """No, just Enter, and nobody there to answer all change nothing."""
    result = run("online", volume, "--give-up-recovery-points", typed=answer)
    assert result.exit_code == 1
    assert "nothing was changed" in result.stderr
    assert "--yes" in result.stderr
    assert result.stdout == ""
    assert backend.calls == []


def test_giving_up_points_with_a_yes(backend: Backend, volume: Path) -> None:
    """A typed yes and --yes both go ahead; the question names the volume."""
    backend.answers["online"] = []
    result = ok("online", volume, "--give-up-recovery-points", typed="y\n")
    assert str(volume) in result.stderr
    ok("online", volume, "--give-up-recovery-points", "--yes", typed="")
    assert backend.calls == [(volume, "online", {"give_up_recovery_points": True})] * 2


def test_verify_reports_and_exits_with_5_on_problems(backend: Backend, volume: Path) -> None:
    """All well is 0; problems are 5, with place, points and bytes; --json is the report."""
    backend.answers["verify"] = {"ok": True, "checked": {"blocks": 5}, "problems": []}
    assert ok("verify", volume).stdout == f"{volume}: all well\n  blocks  5\n"
    bad = {
        "ok": False,
        "checked": {"blocks": 5},
        "problems": [
            {
                "what": "preserved block",
                "message": "fails its checksum",
                "block": 9,
                "offset": 1048576,
                "points": [1, 2],
                "ranges": [[147456, 16384]],
            }
        ],
    }
    backend.answers["verify"] = bad
    result = run("verify", volume)
    assert result.exit_code == 5
    for word in (
        ": 1 problem\n",
        "preserved block: fails its checksum",
        "block 9, offset 1048576",
        "1, 2",
        "147456 to 163839",
    ):
        assert word in result.stdout
    result = run("verify", volume, "--json")
    assert result.exit_code == 5
    assert json.loads(result.stdout) == bad


def test_demo_runs_the_demo_and_exits_as_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Language, from the option or VSNAPFS_LANG, and speed are passed on; so is the exit code."""
    import vsnapfs

    seen: list[Any] = []
    module = ModuleType("vsnapfs.demo")
    module.run_demo = lambda *args: seen.append(args) or 7  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vsnapfs.demo", module)
    monkeypatch.setattr(vsnapfs, "demo", module, raising=False)
    assert run("demo", "--fast").exit_code == 7
    run("demo", env={"VSNAPFS_LANG": "ja"})
    assert seen == [("en", True), ("ja", False)]


# --- events --------------------------------------------------------------------------------------


def test_events_as_text_json_and_xml(volume: Path) -> None:
    """The three forms are complete documents: lines, JSON lines, one XML tree."""
    write_events(volume)
    lines = ok("events", volume).stdout.splitlines()
    assert len(lines) >= 2
    assert any("87" in line for line in lines)
    objects = [json.loads(line) for line in ok("events", volume, "--json").stdout.splitlines()]
    assert [entry["event_id"] for entry in objects] == [1010, 87]
    assert {"time", "source", "event_id", "level", "message"} <= set(objects[1])
    tree = ET.fromstring(ok("events", volume, "--xml").stdout)
    assert tree.tag == "Events"
    assert [child.findtext(".//{*}EventID") for child in tree] == ["1010", "87"]


def test_events_speak_japanese_on_request(volume: Path) -> None:
    """--lang and VSNAPFS_LANG choose the sentences; the ids stay."""
    write_events(volume)
    by_option = ok("events", volume, "--lang", "ja", "--json").stdout
    by_variable = ok("events", volume, "--json", env={"VSNAPFS_LANG": "ja"}).stdout
    assert by_option == by_variable
    entry = json.loads(by_option.splitlines()[-1])
    assert entry["event_id"] == 87
    assert re.search("[\u3040-\u30ff\u4e00-\u9fff]", entry["message"])
    assert (
        entry["message"]
        != json.loads(ok("events", volume, "--json").stdout.splitlines()[-1])["message"]
    )


def test_events_of_a_volume_without_any(volume: Path) -> None:
    """An empty log is said to be empty for people, and is empty for programs."""
    result = ok("events", volume)
    assert result.stdout == ""
    assert "empty" in result.stderr
    assert ok("events", volume, "--json").stdout == ""
    assert len(ET.fromstring(ok("events", volume, "--xml").stdout)) == 0


def test_events_refuses_two_forms(volume: Path) -> None:
    """--json and --xml together are a usage error."""
    refused(run("events", volume, "--json", "--xml"), "--json", "--xml", code=2)


def test_events_follow_shows_what_comes_and_ends_on_ctrl_c(volume: Path) -> None:
    """--follow prints a new event at once, also into a pipe; Ctrl-C ends it with 130."""
    from vsnapfs.events import EventLog

    write_events(volume)
    process = subprocess.Popen(
        [sys.executable, "-m", "vsnapfs", "events", str(volume), "--follow", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    seen = [json.loads(process.stdout.readline())["event_id"] for _ in range(2)]
    log = EventLog(volume / "events.jsonl")
    log.log("vsnapfs", 1020, volume=str(volume))
    log.close()
    seen.append(json.loads(process.stdout.readline())["event_id"])
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert seen == [1010, 87, 1020]
    assert process.returncode == 130
    assert "Traceback" not in errors


# --- inspect -------------------------------------------------------------------------------------


def test_inspect_renders_what_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nested structures become indented lines; --json is the description itself."""
    import vsnapfs.diffarea

    told = {"kind": "diff area", "copies": [{"ok": True, "generation": 7}, {"ok": False}], "x": []}
    module = ModuleType("vsnapfs.diffarea.inspect")
    module.inspect_file = lambda path: told  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(vsnapfs.diffarea, "inspect", module, raising=False)
    assert ok("inspect", tmp_path / "f").stdout == (
        "kind: diff area\ncopies:\n  - ok: yes\n    generation: 7\n  - ok: no\nx: none\n"
    )
    assert json.loads(ok("inspect", tmp_path / "f", "--json").stdout) == told


def test_inspect_of_a_directory_names_the_file(volume: Path, tmp_path: Path) -> None:
    """A volume's directory is not a file; the hint is the command that was meant."""
    refused(run("inspect", volume), "is a directory", f"vsnapfs inspect {volume}/diff-area", code=2)
    refused(run("inspect", tmp_path), "is a directory", code=2)
