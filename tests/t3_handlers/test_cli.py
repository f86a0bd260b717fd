"""The command line by itself: what is parsed, asked of the layers below, printed, and exited with.

The daemon is played by `Backend`, which answers each operation from a table and remembers what it
was asked; the event log, the configuration and the exported files are real.
"""

from __future__ import annotations

import errno
import io
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from vsnapfs import config, daemon
from vsnapfs.cli import output, params, status_text
from vsnapfs.cli.app import app
from vsnapfs.errors import BusyError, FaultCode, VsnapError

COMMANDS = [
    *("create", "mount", "umount", "attach", "detach", "status", "recovery-point", "resize"),
    *("offline", "online", "events", "verify", "inspect", "demo", "completion"),
]
RP_COMMANDS = ["create", "list", "delete", "export", "restore"]
MIB = 1 << 20


def run(*args: str | Path, typed: str | None = None, env: dict[str, str] | None = None) -> Result:
    """Run one command line; stdout and stderr are kept apart with every version of click."""
    try:
        runner = CliRunner(mix_stderr=False)  # type: ignore[call-arg,unused-ignore]
    except TypeError:
        runner = CliRunner()
    return runner.invoke(app, [str(arg) for arg in args], input=typed, env=env)


def ok(*args: str | Path, **options: Any) -> Result:
    """As run, for a command that must succeed."""
    result = run(*args, **options)
    assert result.exit_code == 0, f"{result.stdout}{result.stderr}{result.exception!r}"
    return result


def refused(result: Result, *words: str, code: int = 1) -> str:
    """Assert the form of a refusal, that it says `words`, and that nothing went to stdout."""
    assert result.exit_code == code, f"{result.stdout}{result.stderr}{result.exception!r}"
    assert result.stderr.startswith("vsnapfs: error: "), result.stderr
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in result.stderr, result.stderr
    assert result.stdout == ""
    return result.stderr


@dataclass
class Backend:
    """The layers below the command line. `answers`: operation → result, exception or function."""

    answers: dict[str, Any] = field(default_factory=dict)
    calls: list[tuple[Path, str, dict[str, Any]]] = field(default_factory=list)
    mounts: list[Any] = field(default_factory=list)
    loops: dict[Path, list[str]] = field(default_factory=dict)
    done: list[Any] = field(default_factory=list)

    def call(self, directory: Path, op: str, *, progress: Any = None, **params: Any) -> Any:
        self.calls.append((directory, op, params))
        answer = self.answers[op]
        if isinstance(answer, BaseException):
            raise answer
        return answer(directory, progress) if callable(answer) else answer

    def mount(self, volume: Path, mountpoint: Path, *, stale: bool = False) -> Any:
        """Pretend that the volume is mounted."""
        mount = SimpleNamespace(volume=volume, mountpoint=mountpoint, stale=stale)
        self.mounts.append(mount)
        return mount

    @property
    def ops(self) -> list[str]:
        return [op for _, op, _ in self.calls]


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Backend:
    """A Backend in the place of vsnapfs.daemon."""
    made = Backend()
    modules = {
        "client": {"call": made.call},
        "mounts": {
            "find_mounts": lambda: list(made.mounts),
            "loop_devices": lambda mountpoint: made.loops.get(mountpoint, []),
            "attach_loop": lambda file: made.done.append(("attach", file)) or "/dev/loop7",
            "detach_loop": lambda device: made.done.append(("detach", device)),
            "unmount": lambda mount: made.done.append(("unmount", mount.mountpoint)),
        },
        "server": {
            "spawn": lambda *a, **k: made.done.append(("spawn", a, k)) or 4711,
            "serve": lambda *a, **k: made.done.append(("serve", a, k)),
        },
    }
    for name, contents in modules.items():
        module = ModuleType(f"vsnapfs.daemon.{name}")
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr(daemon, name, module, raising=False)
    return made


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    """A directory that is a volume as far as the command line can tell."""
    directory = tmp_path / "vol1"
    directory.mkdir()
    config.save(directory, config.VolumeConfig("0" * 32))
    return directory


def status_of(volume: Path, **changes: Any) -> dict[str, Any]:
    return {
        "volume": str(volume),
        "state": "online",
        "mountpoint": None,
        "on_full": "offline",
        "fault": None,
        "consistent": None,
        "pid": None,
        "diff_area": {
            "path": str(volume / "diff-area"),
            "used": 10 * MIB,
            "allocated": 64 * MIB,
            "maximum": 100 * MIB,
        },
        "replica": {"path": str(volume / "replica.img"), "size": 1024 * MIB},
        "recovery_points": 3,
    } | changes


def fault(code: FaultCode = FaultCode.DIFF_AREA_FULL, **changes: Any) -> dict[str, Any]:
    return {
        "code": int(code),
        "name": code.name,
        "event_id": code.event_id,
        "errno": errno.ENOSPC,
        "message": "the diff area has reached its maximum",
        "time": 1_795_332_000_000_000_000,
        "block": 77,
        "offset": 77 * 16384,
        "length": 4096,
        "used": 100 * MIB,
        "allocated": 100 * MIB,
        "maximum": 100 * MIB,
    } | changes


# --- the whole -----------------------------------------------------------------------------------


def all_commands() -> Iterator[tuple[list[str], click.Command]]:
    for name, command in app.commands.items():
        yield [name], command
        if isinstance(command, click.Group):
            for sub, inner in command.commands.items():
                yield [name, sub], inner


def test_the_commands_are_exactly_those_promised() -> None:
    """Every documented command exists, in the order of a volume's life, and no other."""
    assert list(app.commands) == COMMANDS
    assert list(app.commands["recovery-point"].commands) == RP_COMMANDS  # type: ignore[attr-defined]


@pytest.mark.parametrize("path", [p for p, _ in all_commands()], ids=" ".join)
def test_every_command_has_help_with_an_example(path: list[str]) -> None:
    """--help of each command ends in examples that are command lines of vsnapfs, never wrapped."""
    result = ok(*path, "--help")
    examples = result.stdout.split("Examples:\n", 1)[1]
    assert "vsnapfs " in examples
    assert max(len(line) for line in result.stdout.splitlines()) <= 100


def test_the_summaries_in_the_list_of_commands_are_whole() -> None:
    """No one-line summary is cut off with dots on a terminal of 80 columns."""
    for args in (["--help"], ["rp", "--help"]):
        result = subprocess.run(
            [sys.executable, "-m", "vsnapfs", *args],
            env=os.environ | {"COLUMNS": "80"},
            capture_output=True,
            text=True,
            check=True,
        )
        assert "..." not in result.stdout.replace("ARGS]...", "")


def test_help_and_completion_load_none_of_the_heavy_packages() -> None:
    """`vsnapfs --help` stays fast because trio, pyfuse3, numpy and rich are imported by need."""
    code = (
        "import sys; from vsnapfs.cli.app import app\n"
        "try: app.main(['create', '--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted({'trio', 'pyfuse3', 'numpy', 'rich', 'xxhash'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.splitlines()[-1] == "[]"


def test_rp_is_an_alias_that_is_not_listed() -> None:
    """`rp` is `recovery-point`, and the list of commands shows it once."""
    assert "list" in ok("rp", "--help").stdout
    listed = [line.split()[0] for line in ok("--help").stdout.splitlines() if line[:2] == "  "]
    assert "rp" not in listed
    assert "recovery-point" in listed


def test_an_unknown_option_is_a_usage_error_in_our_form(volume: Path) -> None:
    """Complaints of click itself look like ours and exit with 2."""
    text = refused(run("events", volume, "--xlm"), "--xlm", code=2)
    assert (
        "  hint: See `vsnapfs events --help`." in text or "hint: See `app events --help`." in text
    )
    refused(run("frobnicate"), "frobnicate", code=2)
    refused(run("rp", "delete", volume), "POINT", code=2)


def test_an_error_shows_message_and_hint_and_its_exit_code(backend: Backend, volume: Path) -> None:
    """A VsnapError from below ends as error and hint on stderr, with the error's exit code."""
    backend.answers["offline"] = BusyError("vol1 is busy", hint="Wait for it.")
    result = run("offline", volume)
    assert result.stderr == "vsnapfs: error: vol1 is busy\n  hint: Wait for it.\n"
    assert result.exit_code == 1
    backend.answers["offline"] = VsnapError("odd", exit_code=9)
    assert run("offline", volume).exit_code == 9


def test_a_host_error_is_no_traceback(backend: Backend, volume: Path) -> None:
    """An OSError that no layer explained names the file and the reason."""
    backend.answers["offline"] = PermissionError(errno.EACCES, "Permission denied", "/some/file")
    refused(run("offline", volume), "/some/file: Permission denied")


def test_a_defect_is_shown_with_its_traceback(backend: Backend, volume: Path) -> None:
    """An exception that nobody planned for is reported as our fault, traceback included."""
    backend.answers["offline"] = ZeroDivisionError("oops")
    result = run("offline", volume)
    assert result.exit_code == 1
    assert "Traceback" in result.stderr
    assert "vsnapfs: error: unexpected ZeroDivisionError: oops\n" in result.stderr


def test_a_missing_package_is_named(backend: Backend, volume: Path) -> None:
    """Without pyfuse3 the error says that it is not installed, and for which Python."""
    backend.answers["offline"] = ModuleNotFoundError("No module named 'pyfuse3'", name="pyfuse3")
    refused(run("offline", volume), "pyfuse3 is not installed", sys.executable)


def test_ctrl_c_exits_with_130(backend: Backend, volume: Path) -> None:
    """Ctrl-C in the middle of an operation is no error message and no traceback."""
    backend.answers["verify"] = KeyboardInterrupt()
    result = run("verify", volume)
    assert result.exit_code == 130
    assert result.stderr.strip() == ""


def test_a_reader_that_went_away_ends_it_quietly(volume: Path) -> None:
    """`vsnapfs events | head -1` prints no complaint about the closed pipe."""
    write_events(volume, 5000)
    process = subprocess.Popen(
        [sys.executable, "-m", "vsnapfs", "events", str(volume)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    errors = process.stderr.read()
    process.stderr.close()
    assert process.wait(20) == 141
    assert errors == b""


def test_a_full_disk_under_stdout_is_an_error() -> None:
    """Output that could not be written is not reported as success."""
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            [sys.executable, "-m", "vsnapfs", "completion", "fish"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert result.returncode == 1
    assert "No space left" in result.stderr
    assert "Traceback" not in result.stderr


# --- what is typed -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "size", ["0", "0KiB", "-1", "-5G", "9223372036854775808", "8EiB", "ten", "", "1.5.2G", "1e9"]
)
@pytest.mark.parametrize("option", ["--size", "--diff-area-size", "--block-size"])
def test_bad_sizes_are_usage_errors_that_name_the_option(
    tmp_path: Path, option: str, size: str
) -> None:
    """Zero, negative, absurd and unparsable sizes are refused before anything exists."""
    sizes = {"--size": "1GiB", "--diff-area-size": "1GiB"} | {option: size}
    result = run("create", tmp_path / "v", *(word for pair in sizes.items() for word in pair))
    refused(result, option, code=2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", ["0", "-1", "+1GiB", "lots"])
def test_a_bad_total_never_reaches_resize(backend: Backend, volume: Path, size: str) -> None:
    """The command resize refuses what is no size, an increment included."""
    refused(run("resize", volume, "--diff-area-size", size), code=2)
    assert backend.calls == []


@pytest.mark.parametrize(
    ("label", "word"),
    [
        ("", "empty"),
        ("  ", "empty"),
        ("123", "digits"),
        ("１２", "digits"),
        ("latest", "latest"),
        ("Oldest", "oldest"),
        ("a/b", "'/'"),
        ("a\nb", "control"),
        ("a\x1b[31m", "control"),
        ("あ" * 33, "99 bytes"),
    ],
)
def test_bad_labels_are_refused(backend: Backend, volume: Path, label: str, word: str) -> None:
    """A label that could be taken for a number, a word, a path or a terminal escape is refused."""
    refused(run("rp", "create", volume, "--label", label), "--label", word, code=2)
    assert backend.calls == []


@given(st.text(max_size=100))
def test_accepted_labels_keep_their_rules(label: str) -> None:
    """Whatever is accepted is one line of at most 96 bytes that is no number and no word."""
    if params.label_problem(label):
        return
    assert len(label.encode()) <= 96
    assert not label.isdigit()
    assert label not in ("latest", "oldest")
    assert "/" not in label
    assert len(label.splitlines()) == 1
    assert "\0" not in label


def test_good_labels_are_accepted() -> None:
    """Ordinary names in any script pass, digits among them too."""
    for label in ("before-upgrade", "v1.2", "2026-11-22 夜", "x" * 96, "あ" * 32, "7th", "latest2"):
        assert params.label_problem(label) == ""


@pytest.mark.parametrize("form", ["{}", "{}/", "{}//", "{}/.", "{}/../vol1"])
def test_a_volume_may_be_named_in_any_way(backend: Backend, volume: Path, form: str) -> None:
    """Trailing slashes and dots name the same directory."""
    backend.answers["offline"] = None
    ok("offline", form.format(volume))
    assert backend.calls[-1][0] == volume


def test_relative_names_and_links_lead_to_the_volume(
    backend: Backend, volume: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A relative path, "." and a symbolic link resolve to the volume's real directory."""
    backend.answers["offline"] = None
    (tmp_path / "link").symlink_to(volume)
    monkeypatch.chdir(tmp_path)
    for name in ("vol1", "./vol1/", "link"):
        ok("offline", name)
    monkeypatch.chdir(volume)
    ok("offline", ".")
    assert {directory for directory, _, _ in backend.calls} == {volume}


def test_a_mountpoint_names_its_volume(backend: Backend, volume: Path, tmp_path: Path) -> None:
    """Where a volume is mounted, the mountpoint is understood as well."""
    backend.answers["offline"] = None
    backend.mount(volume, tmp_path / "mnt")
    ok("offline", tmp_path / "mnt")
    assert backend.calls[-1][0] == volume


def test_what_is_no_volume_is_told_apart(backend: Backend, tmp_path: Path) -> None:
    """Nothing, an empty directory, a file and an empty name each get their own words."""
    (tmp_path / "file").write_text("x")
    (tmp_path / "dir").mkdir()
    refused(run("offline", tmp_path / "none"), "none", "No such file", "vsnapfs status")
    refused(run("offline", tmp_path / "dir"), "holds no volume.toml", "hint")
    refused(run("offline", tmp_path / "file"), "Not a directory", "vsnapfs inspect")
    refused(run("offline", ""), "empty", code=2)
    assert backend.calls == []


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
        *[
            "create",
            "v",
            "--size",
            "1GiB",
            "--diff-area-size",
            "64MiB",
            "--diff-area",
            "d",
            "--replica",
            "r",
            "--from",
            "i",
        ],
        *["--block-size", "4KiB", "--on-full", "evict", "--force"],
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
        "force": True,
    }
    assert "vsnapfs: warning: the host is nearly full" in result.stderr
    assert "vsnapfs mount v MOUNTPOINT" in result.stderr


def test_create_refuses_an_empty_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`vsnapfs create "$unset"` does not make a volume of the current directory."""
    monkeypatch.chdir(tmp_path)
    refused(run("create", "", "--size", "1G", "--diff-area-size", "1G"), "empty", code=2)
    assert list(tmp_path.iterdir()) == []


def test_create_insists_on_the_policies_there_are(tmp_path: Path) -> None:
    """An unknown on-full policy is refused with the known ones."""
    result = run("create", tmp_path / "v", "--diff-area-size", "1G", "--on-full", "hold")
    refused(result, "offline", "evict", code=2)


def test_mount_starts_a_server(backend: Backend, volume: Path, tmp_path: Path) -> None:
    """The command mount hands the volume, the mountpoint and the split options to the daemon."""
    result = ok("mount", volume, tmp_path / "m", "-o", "allow_other,noatime", "-o", "debug")
    kind, args, kwargs = backend.done[-1]
    assert kind == "spawn"
    assert args == (volume, tmp_path / "m")
    assert kwargs["options"] == ["allow_other", "noatime", "debug"]
    assert kwargs["accept_changed_replica"] is False
    assert "4711" in result.stderr
    assert result.stdout == ""


def test_mount_in_the_foreground_serves_here(
    backend: Backend, volume: Path, tmp_path: Path
) -> None:
    """--foreground serves in this process."""
    ok("mount", volume, tmp_path / "m", "--foreground", "--accept-changed-replica")
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
    refused(run("attach", volume), "offline by fault 8 DIFF_AREA_FULL", "vsnapfs online")
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


# --- status --------------------------------------------------------------------------------------


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
    assert f"vsnapfs online {volume}" in text
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


# --- recovery points -----------------------------------------------------------------------------

POINTS = [
    {"number": 3, "created_ns": 1_795_332_000_123_456_789, "label": "before"},
    {"number": 12, "created_ns": 1_795_332_060_000_000_000, "label": None},
]


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
    listed = json.loads(ok("rp", "list", volume, "--json").stdout)
    assert listed[0] == {
        "number": 3,
        "created": "2026-11-22T07:20:00.123456Z",
        "created_ns": 1_795_332_000_123_456_789,
        "label": "before",
    }
    backend.answers["rp_list"] = []
    assert ok("rp", "list", volume).stdout == ""
    assert json.loads(ok("rp", "list", volume, "--json").stdout) == []


def test_rp_delete_and_restore_pass_the_point_as_typed(backend: Backend, volume: Path) -> None:
    """A point is passed on as it was typed, with --force; blank names are refused."""
    backend.answers |= {"rp_delete": None, "rp_restore": None}
    ok("rp", "delete", volume, "oldest", "--force")
    ok("rp", "restore", volume, "before")
    refused(run("rp", "delete", volume, " "), "empty", code=2)
    assert backend.calls == [
        (volume, "rp_delete", {"point": "oldest", "force": True}),
        (volume, "rp_restore", {"point": "before", "force": False}),
    ]


def test_rp_restore_says_what_it_does_and_what_came_of_it(backend: Backend, volume: Path) -> None:
    """Before and after, on stderr; a refusal shows no success."""
    backend.answers["rp_restore"] = None
    result = ok("rp", "restore", volume, "3")
    assert "Restoring" in result.stderr
    assert "now equals recovery point 3" in result.stderr
    backend.answers["rp_restore"] = BusyError("replica.img is open")
    result = run("rp", "restore", volume, "3")
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
            {"what": "bad checksum", "where": "slot 9", "points": [1, 2], "ranges": [[0, 16384]]}
        ],
    }
    backend.answers["verify"] = bad
    result = run("verify", volume)
    assert result.exit_code == 5
    for word in ("1 problem\n", "bad checksum", "slot 9", "1, 2", "0 to 16383"):
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


def write_events(volume: Path, count: int = 1) -> None:
    from vsnapfs.events import EventLog

    log = EventLog(volume / "events.jsonl")
    for number in range(count):
        log.log("vsnapfs", 1010, volume=str(volume), point=number + 1)
    log.log("volsnap", 87, volume=str(volume), used=5, allocated=6, maximum=7)
    log.close()


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


# --- completion ----------------------------------------------------------------------------------


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(shell: str) -> None:
    """Each shell gets a script that calls vsnapfs back."""
    text = ok("completion", shell).stdout
    assert "_VSNAPFS_COMPLETE" in text


def complete(words: str, cword: int, cwd: Path) -> list[str]:
    """What bash would be offered for a command line."""
    result = subprocess.run(
        [sys.executable, "-c", "from vsnapfs.cli import main; main()"],
        cwd=cwd,
        env=os.environ
        | {
            "_VSNAPFS_COMPLETE": "bash_complete",
            "COMP_WORDS": words,
            "COMP_CWORD": str(cword),
        },
        capture_output=True,
        text=True,
        check=True,
    )
    return result.stdout.split()


def test_tab_completes_commands_and_volumes(volume: Path, tmp_path: Path) -> None:
    """Tab offers commands, then directories that are volumes; if none match, the shell's own."""
    (tmp_path / "other").mkdir()
    assert "plain,recovery-point" in complete("vsnapfs rec", 1, tmp_path)
    assert complete("vsnapfs status v", 2, tmp_path) == ["plain,vol1"]
    assert complete(f"vsnapfs status {tmp_path}/v", 2, tmp_path) == [f"plain,{volume}"]
    assert complete("vsnapfs status oth", 2, tmp_path) == ["dir,oth"]
    assert complete("vsnapfs rp delete vol1 l", 4, tmp_path) == ["plain,latest"]


def test_points_of_a_mounted_volume_are_completed(
    backend: Backend, volume: Path, tmp_path: Path
) -> None:
    """Numbers and labels are offered for a served volume only; Tab opens no other."""
    backend.answers["rp_list"] = POINTS

    def offered(incomplete: str) -> list[str]:
        command = app.commands["recovery-point"].commands["delete"]  # type: ignore[attr-defined]
        context = click.Context(command)
        context.params["volume"] = volume
        items = params.PointType().shell_complete(context, command.params[1], incomplete)
        return [item.value for item in items]

    assert offered("") == ["latest", "oldest"]
    assert backend.calls == []
    backend.mount(volume, tmp_path / "m")
    assert offered("") == ["latest", "oldest", "3", "12", "before"]
    assert offered("be") == ["before"]
    backend.answers["rp_list"] = BusyError("busy")
    assert offered("") == ["latest", "oldest"]


# --- how it looks --------------------------------------------------------------------------------


def test_json_survives_a_terminal_that_cannot_show_it(
    backend: Backend, volume: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In an ASCII terminal JSON is escaped; elsewhere it is readable; never wrapped or coloured."""
    backend.answers["rp_list"] = [{"number": 1, "created_ns": 0, "label": "夜😀"}]
    readable = ok("rp", "list", volume, "--json", env={"FORCE_COLOR": "1", "COLUMNS": "20"}).stdout
    assert "夜😀" in readable
    assert "\x1b" not in readable
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    text = output.json_text({"label": "夜😀"})
    assert text.isascii()
    assert json.loads(text) == {"label": "夜😀"}


def test_long_work_without_a_terminal_reports_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Into a log goes a line every ten seconds, with share, rate and time left."""
    clock = iter([0.0, 0.0, 5.0, 11.0, 12.0, 22.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    with output.progress("create") as report:
        for done in (0, 10 * MIB, 22 * MIB, 23 * MIB, 44 * MIB):
            report("copying", done, 88 * MIB)
    lines = capfd.readouterr().err.splitlines()
    assert lines == [
        "create: copying: 22.0 MiB of 88.0 MiB (25 %), 2.0 MiB/s, 33 s left",
        "create: copying: 44.0 MiB of 88.0 MiB (50 %), 2.0 MiB/s, 22 s left",
    ]


def test_a_terminal_gets_a_bar_on_stderr_only(tmp_path: Path) -> None:
    """On a terminal the bar goes to stderr while stdout, into a file, stays clean."""
    code = (
        "from vsnapfs.cli.output import progress\n"
        "with progress('create') as report:\n"
        "    report('copying', 1 << 20, 4 << 20); report('checking', 2 << 20, 4 << 20)\n"
        "print('done')"
    )
    master, slave = pty.openpty()
    try:
        with open(tmp_path / "out", "w") as out:
            subprocess.run(
                [sys.executable, "-c", code],
                stdout=out,
                stderr=slave,
                env=os.environ | {"TERM": "xterm", "COLUMNS": "120"},
                check=True,
            )
        shown = os.read(master, 65536).decode()
    finally:
        os.close(slave)
        os.close(master)
    assert "create: checking" in shown
    assert "2.0/4.0 MiB" in shown
    assert (tmp_path / "out").read_text() == "done\n"
