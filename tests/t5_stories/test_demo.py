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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from house import ROOT, loop_devices, missing_for_loop, mounts

from vsnapfs.demo import text_en, text_ja
from vsnapfs.demo.clearing import remove_all
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


class Stage:
    """Runs demos in a directory of their own."""

    def __init__(self, base: Path) -> None:
        self.tools = base / "tools"
        self.work = base / "work"
        self._record = base / "checksums"
        self.tools.mkdir()
        self.work.mkdir()

    def tool(self, name: str, text: str) -> None:
        """Put a program before the system's own."""
        path = self.tools / name
        path.write_text(text)
        path.chmod(0o755)

    def start(self, *options: str, lie_at: int = 0, path: str | None = None) -> subprocess.Popen:
        """lie_at: the number of the checksum that is shown wrong."""
        self.tool(
            "sha256sum",
            WITNESS.format(python=sys.executable, record=str(self._record), lie_at=lie_at),
        )
        path = os.environ["PATH"] if path is None else path
        return subprocess.Popen(
            [sys.executable, "-m", "vsnapfs", "demo", "--fast", *options],
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
