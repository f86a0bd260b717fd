"""`scripts/kill-loop` is no formality: it finds a lost write and a point that changed."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.needs_fuse, pytest.mark.needs_fio, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]

LOOP = """
import sys
sys.path[:0] = sys.argv[1:3]
import kill_loop, killing
from vsnapfs.diffarea.layout import Layout
real = killing.mount_again

def mount_again(rig, **options):
    if damage is preserved_blocks:
        damage(rig)
    real(rig, **options)
    if damage is not preserved_blocks:
        damage(rig)  # Now: before, the write buffer might have mended it.

def flip(path, offset):
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes((byte[0] ^ 1,)))

def nothing(rig):
    pass

def a_stamp(rig):
    flip(rig.image, 5)

def what_fio_wrote(rig):
    place = rig.image.read_bytes().find(b"turn", killing.FileRounds.half)
    if place >= 0:  # else it was killed before its first write: the next round will do
        flip(rig.image, place + 3)

def preserved_blocks(rig):
    # One of them alone might belong to no point any more, or to a write that never came about.
    layout = Layout(16384)
    for slot in range(layout.slots_in(rig.area.stat().st_size)):
        flip(rig.area, layout.slot_offset(slot))

damage = globals()[sys.argv[3]]
if damage in (a_stamp, what_fio_wrote):
    # What was not written since the newest point is that point's, too, which might tell first.
    killing.all_points_exact = lambda rig, checksums: None
killing.mount_again = mount_again
sys.exit(kill_loop.main("", sys.argv[4:]))
"""


def loop(work: Path, damage: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Run the loop in a process of its own, with something damaged after each kill."""
    paths = str(ROOT / "tests"), str(ROOT / "tests" / "t4_mount")
    return subprocess.run(
        [sys.executable, "-c", LOOP, *paths, damage, *options, "--no-ext4", "--work", str(work)],
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )


def test_two_rounds_are_counted_and_leave_nothing(tmp_path: Path) -> None:
    """Nothing lost: exit code 0, the figures as text and JSON, the work directory is empty."""
    work = tmp_path / "work"
    work.mkdir()
    figures = tmp_path / "figures.json"
    done = loop(work, "nothing", "2", "--seed", "7", "--json", str(figures))
    assert done.returncode == 0, done.stdout + done.stderr
    last = done.stdout.splitlines()[-1]
    assert last.startswith("2 rounds, 0 lost, ")
    assert "seed 7" in last
    told = json.loads(figures.read_text())
    assert (told["rounds"], told["lost"], told["seed"]) == (2, 0, 7)
    assert told["acknowledged"] > 0
    assert told["point_reads"] >= 2
    assert not list(work.iterdir())


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ("a_stamp", "of thread"),
        ("what_fio_wrote", "fio"),
        ("preserved_blocks", "Input/output error"),
    ],
)
def test_a_loss_is_found(tmp_path: Path, damage: str, said: str) -> None:
    """One flipped bit after a kill: exit code 1, what was lost, and how to try again."""
    done = loop(tmp_path, damage, "3", "--seed", "11")
    assert done.returncode == 1, done.stdout + done.stderr
    assert re.search(rf"^\w*Error: .*{said}", done.stderr, re.MULTILINE), done.stderr
    assert ", 1 lost, " in done.stdout
    assert "scripts/kill-loop 3 --seed 11" in done.stdout
    kept = done.stdout.partition("kept in ")[2].splitlines()[0]
    assert (Path(kept) / "vol" / "replica.img").exists()
