"""The demo as its audience gets it: a process of its own, all of it real.

A stand-in for sha256sum on its PATH computes every checksum with hashlib and keeps a record, so
that what the demo prints can be held against what was computed, from which file, and when.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import string
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from house import (
    BECOME_A_USER,
    ROOT,
    loop_devices,
    missing_for_loop,
    mounts,
    python_for_users,
)

from vsnapfs.config import load
from vsnapfs.daemon import client
from vsnapfs.demo import clearing, text_en, text_ja
from vsnapfs.demo.clearing import PLACE_VARIABLE, remove_all
from vsnapfs.demo.narrator import folded

DIGEST = re.compile(r"\b[0-9a-f]{64}\b")
WITNESS = """#!{python}
import hashlib, json, pathlib, sys
lie_at = {lie_at}
record = pathlib.Path({record!r})
for name in sys.argv[1:]:
    digest = hashlib.sha256()
    with open(name, "rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    shown = digest.hexdigest()
    with record.open("a") as out:
        out.write(json.dumps([name, shown]) + "\\n")
    if len(record.read_text().splitlines()) == lie_at:
        shown = shown[::-1]
    print(f"{{shown}}  {{name}}")
"""


@dataclass
class Played:
    """A demo that has ended. computed: (file, SHA-256) in the order of computing."""

    code: int
    out: str
    errors: str
    computed: list[tuple[str, str]]


GATE = """#!/bin/sh
case " $* " in
*"{when}"*)
  if mkdir {gate}/here 2>/dev/null; then
    while [ ! -e {gate}/go ]; do sleep 0.05; done
  fi
  ;;
esac
{then}
"""


class Gate:
    """Where a demo waits, in the middle of a step, until the test has done its part."""

    def __init__(self, place: Path) -> None:
        self.place = place
        place.mkdir()
        place.chmod(0o777)

    def reached(self, process: subprocess.Popen) -> None:
        """Return when the demo stands there."""
        while not (self.place / "here").exists():
            if process.poll() is not None:
                out, errors = process.communicate()
                pytest.fail(f"the demo ended before: {out[-2000:]}{errors}")
            time.sleep(0.02)

    def go(self) -> None:
        (self.place / "go").touch()


@contextmanager
def another_namespace(*inside: str, setup: str = "true") -> Iterator[int]:
    """A process that stands in a copy of all mounts, as a container does that starts just now.

    inside: a command to begin with, which goes into the namespace that is to be copied.
    """
    command = [*inside, "unshare", "--mount", "sh", "-c", f"{setup} && echo made && exec sleep 999"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "made\n"
        yield process.pid
    finally:
        process.kill()
        process.communicate()


def into_namespace(pid: int) -> list[str]:
    return ["nsenter", f"--target={pid}", "--mount"]


class Stage:
    """Runs demos in a directory of their own. before: how a command of the demo's user begins."""

    def __init__(
        self, base: Path, *, python: str = sys.executable, before: tuple[str, ...] = ()
    ) -> None:
        self._python = python
        self._before = before
        self._gate = base / "gate"
        self.tools = base / "tools"
        self.work = base / "work"
        self._record = base / "checksums"
        self.tools.mkdir()
        self.work.mkdir()
        self.work.chmod(0o777)

    def tool(self, name: str, text: str) -> None:
        """Put a program before the system's own."""
        path = self.tools / name
        path.write_text(text)
        path.chmod(0o755)

    def gate(self, tool: str, *, when: str = "", then: str | None = None) -> Gate:
        """The demo waits at its first use of a tool, with a certain argument if `when` says so.

        then: what the tool does instead of its own work, in shell.
        """
        then = then or f'exec {shutil.which(tool)} "$@"'
        self.tool(tool, GATE.format(gate=self._gate, when=when, then=then))
        return Gate(self._gate)

    def start(self, *options: str, lie_at: int = 0, path: str | None = None) -> subprocess.Popen:
        """lie_at: the number of the checksum that is shown wrong."""
        self.tool(
            "sha256sum",
            WITNESS.format(python=self._python, record=str(self._record), lie_at=lie_at),
        )
        path = os.environ["PATH"] if path is None else path
        return subprocess.Popen(
            [*self._before, self._python, "-m", "vsnapfs", "demo", "--fast", *options],
            env=os.environ | {"TMPDIR": str(self.work), "PATH": f"{self.tools}:{path}"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def end(self, process: subprocess.Popen) -> Played:
        try:
            out, errors = process.communicate(timeout=280)
        except BaseException:
            process.terminate()
            process.communicate(timeout=60)
            raise
        lines = self._record.read_text().splitlines() if self._record.exists() else []
        return Played(process.returncode, out, errors, [tuple(json.loads(line)) for line in lines])

    def play(self, *options: str, lie_at: int = 0) -> Played:
        return self.end(self.start(*options, lie_at=lie_at))

    def assert_nothing_left(self) -> None:
        inside = f"{self.work}/"
        assert os.listdir(self.work) == []
        assert not [place for place, _, _ in mounts().values() if place.startswith(inside)]
        assert not [backing for backing in loop_devices().values() if backing.startswith(inside)]
        mark = f"{PLACE_VARIABLE}={inside}".encode()
        for entry in Path("/proc").glob("[0-9]*/environ"):
            with suppress(OSError):  # ended at this moment
                assert mark not in entry.read_bytes(), entry


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    made = Stage(tmp_path)
    yield made
    made.assert_nothing_left()


def assert_all_is_real(played: Played) -> None:
    """Each checksum shown was computed, and each proof rests on a plain copy's checksum."""
    shown = DIGEST.findall(played.out)
    assert shown == [digest for _, digest in played.computed]
    copies = [digest for name, digest in played.computed if name == "vol1/replica.img"]
    points: dict[str, set[str]] = {}
    for name, digest in played.computed:
        if "/recovery-points/" in name:
            points.setdefault(name, set()).add(digest)
    # Four points; the fourth is taken after the refused write was tried again (two checksums).
    taken = [*copies[:3], copies[5]]
    assert len(set(taken)) == 4
    assert points == {
        f"mnt/recovery-points/{number:04}.img": {digest}
        for number, digest in enumerate(taken, start=1)
    }
    # Restored to the second, exported the first.
    assert copies[6] == taken[1]
    exported = [digest for name, digest in played.computed if "/" not in name]
    assert exported == [taken[0]]
    assert played.out.count("✔") == 18


@pytest.mark.slow
@pytest.mark.needs_fuse
@pytest.mark.needs_loop
@pytest.mark.needs_fio
@pytest.mark.parametrize(
    ("lang", "exit_code", "ending"),
    [("en", "[exit code 3]", "18 proofs"), ("ja", "[終了コード 3]", "18 件の証明")],
)
def test_the_whole_story_is_real(stage: Stage, lang: str, exit_code: str, ending: str) -> None:
    """As root, in either language: ext4 on a loop device, fault 8, 87 and 140, all points exact."""
    played = stage.play("--lang", lang)
    assert played.code == 0, played.out[-2000:] + played.errors
    assert_all_is_real(played)
    assert ending in played.out.splitlines()[-1]
    assert exit_code in played.out  # status saw the fault
    # The refused write, and the flush after it, as fio met them; then the events they became.
    refused = re.search(r"No such device: write .*\n(.*\n)*?.*: datasync", played.out)
    faulted = re.search(r"volsnap 87 .*\n.*Microsoft-Windows-Ntfs 140 ", played.out)
    assert refused
    assert faulted
    assert refused.end() < faulted.start()
    text = {"en": text_en.TEXT, "ja": text_ja.TEXT}[lang]
    assert text["full.event_140"][:12] in played.out
    # What is inside: Tuesday's report, from the offline volume and once more after the restore.
    report = text["report"].format(day=text["day2"], n=14)
    assert played.out.count(f"\n  {report}\n") == 2
    assert played.errors == ""


@pytest.mark.slow
@pytest.mark.needs_fuse
@pytest.mark.needs_fio
def test_without_loop_devices_the_same_story_is_told_on_the_file(stage: Stage) -> None:
    """Where no loop device can be had, fio writes to the FUSE file; what is left out is said."""
    if missing_for_loop() is None:
        stage.tool("losetup", "#!/bin/sh\necho 'cannot find an unused loop device' >&2\nexit 1\n")
    played = stage.play()
    assert played.code == 0, played.out[-2000:] + played.errors
    assert_all_is_real(played)
    assert "Left out here" in played.out
    assert "vsnapfs attach" not in played.out
    assert "mkfs" not in played.out
    assert "volsnap 87 " in played.out
    # No file system above: no flush, so none is made up.
    assert "Microsoft-Windows-Ntfs 140" not in played.out


@pytest.mark.slow
@pytest.mark.needs_fuse
@pytest.mark.needs_fio
def test_a_proof_that_fails_ends_the_demo_with_an_error(stage: Stage) -> None:
    """A checksum that differs is said aloud, and the exit code is not 0."""
    # Three plain copies, then the second of three points.
    played = stage.play(lie_at=5)
    assert played.code == 1
    assert "THIS IS NOT TRUE: recovery point 2 “Tuesday”" in played.out
    assert played.out.count("✔") == 1
    assert "every one of them right" not in played.out


@pytest.mark.slow
@pytest.mark.needs_fuse
@pytest.mark.needs_fio
@pytest.mark.parametrize(
    ("sent", "code", "at"),
    [
        (signal.SIGINT, 130, "--label Tuesday"),  # ext4 is frozen at this moment
        (signal.SIGTERM, 143, "--name=backup"),
        (signal.SIGHUP, 129, "vsnapfs mount vol1 mnt"),
    ],
)
def test_whoever_interrupts_it_finds_nothing_left(
    stage: Stage, sent: signal.Signals, code: int, at: str
) -> None:
    """Ctrl-C and polite kills end it at once, and everything it made is removed."""
    process = stage.start()
    assert process.stdout is not None
    guard = threading.Timer(250, process.kill)
    guard.start()
    try:
        for line in process.stdout:
            if at in line:
                process.send_signal(sent)
                break
        played = stage.end(process)
    finally:
        guard.cancel()
    assert played.code == code
    assert "Removing everything" in played.out
    assert "Traceback" not in played.errors


# --- beside others, and when something goes wrong ------------------------------------------------


@pytest.mark.slow
@pytest.mark.needs_fuse
@pytest.mark.needs_loop
@pytest.mark.needs_fio
def test_somebody_who_copies_all_mounts_holds_none_of_the_demos(stage: Stage) -> None:
    """A container that starts while the demo is mounted, and stays, keeps no device busy."""
    # ext4 on the loop device is mounted, and about to be unmounted for good.
    gate = stage.gate("umount", when=" files ")
    process = stage.start()
    gate.reached(process)
    with another_namespace():
        gate.go()
        played = stage.end(process)
    assert played.code == 0, played.out[-2000:] + played.errors
    assert "18 proofs" in played.out
    assert "mount namespace of their own" in played.out


@pytest.mark.slow
@pytest.mark.needs_fuse
@pytest.mark.needs_loop
@pytest.mark.needs_fio
def test_nor_those_of_an_ordinary_users_demo() -> None:
    """The same without root: the server that was unmounted ends, whoever has copied its mount."""
    python = python_for_users()
    if python is None:
        pytest.skip("ordinary users cannot reach this Python or this checkout")
    base = Path("/tmp") / f"vsnapfs-user-{os.getpid()}"
    base.mkdir()
    base.chmod(0o777)
    # Where /dev/fuse is open to users, as on a usual machine.
    opened = (
        f"mknod {base}/fuse c 10 229 && chmod 666 {base}/fuse && mount --bind {base}/fuse /dev/fuse"
    )
    try:
        with another_namespace(setup=opened) as usual:
            before = (*into_namespace(usual), *BECOME_A_USER)
            stage = Stage(base, python=python, before=before)
            gate = stage.gate("od")
            process = stage.start()
            gate.reached(process)
            with another_namespace(*into_namespace(usual)):
                gate.go()
                played = stage.end(process)
        assert played.code == 0, played.out[-2000:] + played.errors
        assert "18 proofs" in played.out
        assert "mount namespace of their own" in played.out
        stage.assert_nothing_left()
    finally:
        shutil.rmtree(base)


@pytest.mark.slow
@pytest.mark.needs_fuse
@pytest.mark.needs_loop
@pytest.mark.needs_fio
def test_a_step_that_fails_leaves_nothing(stage: Stage) -> None:
    """A command that fails and leaves ext4 frozen: which one it was, exit code 1, all removed."""
    stage.tool("fsfreeze", f'#!/bin/sh\n{shutil.which("fsfreeze")} "$@"\n[ "$1" != --freeze ]\n')
    played = stage.play()
    assert played.code == 1
    assert "fsfreeze --freeze files" in played.out.split("✘")[1]
    assert played.errors == ""


@pytest.mark.slow
@pytest.mark.needs_fuse
@pytest.mark.needs_loop
@pytest.mark.needs_fio
def test_a_killed_server_ends_the_demo_and_leaves_nothing(stage: Stage) -> None:
    """SIGKILL of a process of the demo's: exit code 1, and not even shared memory is left."""
    gate = stage.gate("fio", when=" --randseed=3 ")
    process = stage.start()
    gate.reached(process)
    (volume,) = stage.work.glob("*/vol1")
    volume_id = load(volume).volume_id
    server = client.server_pid(volume)
    assert server is not None
    assert list(Path("/dev/shm").glob(f"vsnapfs-{volume_id}-*"))
    os.kill(server, signal.SIGKILL)
    gate.go()
    played = stage.end(process)
    assert played.code == 1
    assert played.errors == ""
    assert not list(Path("/dev/shm").glob(f"vsnapfs-{volume_id}-*"))


@pytest.mark.slow
@pytest.mark.needs_fuse
@pytest.mark.needs_loop
@pytest.mark.needs_fio
def test_what_cannot_be_removed_is_named_with_what_removes_it(stage: Stage) -> None:
    """A loop device that somebody has open, and a file that cannot be deleted: a line for each,
    with who holds it, exit code 1; the commands shown remove them.
    """
    gate = stage.gate("fsfreeze", then="exit 1")
    process = stage.start()
    gate.reached(process)
    (directory,) = stage.work.iterdir()
    (device,) = [
        device for device, backing in loop_devices().items() if backing.startswith(f"{directory}/")
    ]
    (directory / "stays").touch()
    fixed = subprocess.run(["chattr", "+i", directory / "stays"], capture_output=True, check=False)
    try:
        with Path(device).open("rb"):
            gate.go()
            played = stage.end(process)
    finally:
        subprocess.run(["chattr", "-i", directory / "stays"], capture_output=True, check=False)
    assert played.code == 1
    lines = [line.strip() for line in played.errors.splitlines()]
    assert lines[0] == text_en.TEXT["left"].partition("\n")[0]
    assert f"loop device {device} (open in process {os.getpid()})" in lines
    assert f"losetup --detach {device}" in lines
    if fixed.returncode == 0:  # not every file system can do that
        assert f"directory {directory}" in lines
        removing = lines[lines.index(f"directory {directory}") + 1]
        subprocess.run(["sh", "-c", removing], check=True)
    # Its holder is gone, and so it goes by itself.
    while loop_devices().get(device, "").startswith(f"{directory}/"):
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.needs_fuse
@pytest.mark.needs_loop
@pytest.mark.needs_fio
def test_a_copy_made_inside_holds_nothing_when_a_step_fails(stage: Stage) -> None:
    """Who has copied the demo's own mounts loses them when it cleans up."""
    gate = stage.gate("fsfreeze", then="exit 1")
    process = stage.start()
    gate.reached(process)
    with another_namespace(*into_namespace(process.pid)):
        gate.go()
        played = stage.end(process)
        stage.assert_nothing_left()
    assert played.code == 1
    assert played.errors == ""


@pytest.mark.needs_loop
def test_mounts_and_processes_that_stay_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What resists is named, with its command; nothing is deleted through a mount that stays."""
    monkeypatch.setattr(clearing, "_unmount_all", lambda _directory: None)
    monkeypatch.setattr(clearing, "_end_processes", lambda _directory: None)
    directory = tmp_path / "a demo"
    place = directory / "mnt"
    place.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "none", place], check=True)
    environment = os.environ | {PLACE_VARIABLE: str(directory)}
    process = subprocess.Popen(["sleep", "999"], env=environment)
    try:
        (place / "kept").touch()
        killing = f"kill -KILL {process.pid}"
        removing = f"rm -rf --one-file-system '{directory}'"
        named = [
            (f"process {process.pid}", killing),
            (f"mount {place}", f"umount --lazy '{place}'"),
            (f"directory {directory}", removing),
        ]
        assert [(left.what, left.command) for left in remove_all(directory)] == named
        # In a namespace of its own, a mount goes with the last process in it.
        named[1] = (f"mount {place}", killing)
        found = remove_all(directory, own_mounts=True)
        assert [(left.what, left.command) for left in found] == named
        assert (place / "kept").exists()
    finally:
        process.kill()
        process.wait()
        subprocess.run(["umount", place], check=True)


def test_a_missing_program_is_named(stage: Stage) -> None:
    """Without fio there is no story: which program, and what to install; nothing is begun."""
    for name in ("sh", "dd", "mkfs.ext4", "e2fsck", "losetup", "mount", "umount", "fsfreeze"):
        found = shutil.which(name)
        if found is not None:
            (stage.tools / name).symlink_to(found)
    played = stage.end(stage.start(path=str(stage.tools)))
    assert played.code == 1
    assert "fio" in played.errors.splitlines()[0]
    assert re.search(r"hint: apt-get install (\S+ )*fio", played.errors)
    assert played.out == ""


@pytest.mark.needs_fuse
@pytest.mark.needs_loop
def test_the_tour_in_the_readme_works_as_typed(stage: Stage) -> None:
    """Line by line in one shell, as a reader would paste it; only the one that must fail fails."""
    readme = (ROOT / "README.md").read_text()
    lines = readme.split("```sh\n", 1)[1].split("```", 1)[0].splitlines()
    stage.tool("vsnapfs", f'#!/bin/sh\nexec {sys.executable} -m vsnapfs "$@"\n')
    script = "".join(f'{line}\necho "line {n}: exit $?"\n' for n, line in enumerate(lines))
    place = stage.work / "tour"
    place.mkdir()
    try:
        done = subprocess.run(
            ["bash", "-c", script],
            cwd=place,
            env=os.environ | {"PATH": f"{stage.tools}:{os.environ['PATH']}"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=280,
        )
        codes = re.findall(r"^line \d+: exit (\d+)$", done.stdout, re.MULTILINE)
        refused = next(n for n, line in enumerate(lines) if line.startswith("dd "))
        assert codes == ["1" if n == refused else "0" for n in range(len(lines))], done.stdout
        assert "OFFLINE by fault 8 DIFF_AREA_FULL" in done.stdout
        assert "volsnap 87 " in done.stdout
    finally:
        assert remove_all(stage.work) == []
    stage.work.mkdir()


def _placeholders(text: str) -> set[str | None]:
    return {field for _, field, _, _ in string.Formatter().parse(text) if field is not None}


def test_both_languages_say_the_same_things() -> None:
    """Every sentence exists in both languages, with the same values in it."""
    assert text_en.TEXT.keys() == text_ja.TEXT.keys()
    for key, text in text_en.TEXT.items():
        assert _placeholders(text) == _placeholders(text_ja.TEXT[key]), key


def test_japanese_is_folded_between_characters() -> None:
    """Lines of Japanese keep their width; words of ASCII and closing marks stay with theirs."""
    width: Callable[[str], int] = lambda line: sum(1 + (ord(c) > 0x2FFF) for c in line)  # noqa: E731
    text = "回復ポイントは recovery-points の下に現れます。" * 5
    lines = folded(text, 40).split("\n")
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    assert all(width(line) <= 40 for line in lines)
    assert sum("recovery-points" in line for line in lines) == 5
    assert not any(line.startswith(("。", "ー")) for line in lines)
