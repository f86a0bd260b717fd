"""`scripts/kill-loop` is no formality: it finds a lost write and a point that changed."""

from __future__ import annotations

import json
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
    damage(rig)
    real(rig, **options)

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
    size = rig.image.stat().st_size
    content = rig.image.read_bytes()
    flip(rig.image, content.index(b"turn", killing.FileRounds.half) + 3)

def preserved_blocks(rig):
    # One of them alone might belong to no point any more, or to a write that never came about.
    layout = Layout(16384)
    for slot in range(layout.slots_in(rig.area.stat().st_size)):
        flip(rig.area, layout.slot_offset(slot))

damage = globals()[sys.argv[3]]
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
        ("a_stamp", "should hold write"),
        ("what_fio_wrote", "fio"),
        ("preserved_blocks", "Input/output error"),
    ],
)
def test_a_loss_is_found(tmp_path: Path, damage: str, said: str) -> None:
    """One flipped bit after a kill: exit code 1, what was lost, and how to try again."""
    done = loop(tmp_path, damage, "3", "--seed", "11")
    assert done.returncode == 1, done.stdout + done.stderr
    assert said in done.stderr.partition("Traceback")[2]
    assert ", 1 lost, " in done.stdout
    assert "scripts/kill-loop 3 --seed 11" in done.stdout
    kept = done.stdout.partition("kept in ")[2].splitlines()[0]
    assert (Path(kept) / "vol" / "replica.img").exists()
