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
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import cli_backend
import click
import pytest
from cli_backend import MIB, POINTS, Backend, ok, refused, run, write_events
from hypothesis import given
from hypothesis import strategies as st

from vsnapfs import config
from vsnapfs.cli import output, params
from vsnapfs.cli.app import app
from vsnapfs.errors import BusyError, VsnapError

backend = cli_backend.backend
volume = cli_backend.volume

COMMANDS = [
    *("create", "mount", "umount", "attach", "detach", "status", "recovery-point", "resize"),
    *("offline", "online", "events", "verify", "repair", "inspect", "demo", "completion"),
]
RP_COMMANDS = ["create", "list", "delete", "export", "restore"]


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
    backend.answers["offline"] = VsnapError("This is odd.", exit_code=9)
    result = run("offline", volume)
    assert result.stderr == "vsnapfs: error: This is odd\n"
    assert result.exit_code == 9


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
        (" a", "space"),
        ("a\u202eb", "control"),
        ("a\u2028b", "control"),
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


def test_what_is_no_volume_is_told_apart(
    backend: Backend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing, an empty directory, a file, an empty name, a locked one: each has its own words."""
    (tmp_path / "file").write_text("x")
    (tmp_path / "dir").mkdir()
    refused(run("offline", tmp_path / "none"), "none", "No such file", "vsnapfs status")
    refused(run("offline", tmp_path / "dir"), "holds no volume.toml", "hint")
    refused(run("offline", tmp_path / "file"), "Not a directory", "vsnapfs inspect")
    refused(run("offline", ""), "empty", code=2)

    def locked(directory: str) -> None:
        raise VsnapError(f"{directory} is not a volume: Permission denied", errno=errno.EACCES)

    monkeypatch.setattr(config, "load", locked)
    refused(run("offline", tmp_path / "dir"), "Permission denied", "Try as root")
    assert backend.calls == []


INTERRUPTED_WHILE_IT_BEGINS = """
import os, signal, sys, time
class Finder:
    def find_spec(self, name, *rest):
        if name == "vsnapfs.cli.app":
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(20)
sys.meta_path.insert(0, Finder())
from vsnapfs.cli import main
main()
"""


@pytest.mark.parametrize("ignored", [False, True])
def test_ctrl_c_while_a_command_begins_says_nothing(ignored: bool) -> None:
    """It ends as a C program does (130 in a shell), without a traceback of imports; where it is
    ignored, as in a shell's background, the command goes on.
    """
    code = INTERRUPTED_WHILE_IT_BEGINS
    if ignored:
        ignore = "signal.signal(signal.SIGINT, signal.SIG_IGN)\nclass Finder"
        code = code.replace("class Finder", ignore).replace("time.sleep(20)", "")
    result = subprocess.run(
        [sys.executable, "-c", code, "--version"], capture_output=True, text=True, check=False
    )
    assert result.returncode == (0 if ignored else -signal.SIGINT)
    assert result.stderr == ""


def test_ctrl_c_beside_click_s_own_watch_says_nothing_either(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the moment before click's `main` looks after it, or a second one while it answers."""

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(click.Group, "main", interrupted)
    with pytest.raises((SystemExit, KeyboardInterrupt)) as caught:
        app.main(["status"], prog_name="vsnapfs")
    assert caught.value.args == (130,)
    assert capsys.readouterr() == ("", "")


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
