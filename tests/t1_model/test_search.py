"""`scripts/search` is no formality: it finds a broken rule, and the find can be repeated."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import searching
from explorer.mutants import broken_engine, flush_without_sync

TESTS = Path(__file__).resolve().parents[1]


def search(*options: str) -> subprocess.CompletedProcess[str]:
    """The program, in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "searching", *options],
        env=os.environ | {"PYTHONPATH": f"{TESTS}:{TESTS.parent}"},
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )


def test_a_search_that_finds_nothing_says_what_it_did(tmp_path: Path) -> None:
    """Exit code 0; the sum as the last line and as JSON."""
    figures = tmp_path / "figures.json"
    done = search("--count", "9", "--seed", "7", "--only", "trial", "--json", str(figures))
    assert done.returncode == 0, done.stdout + done.stderr
    last = done.stdout.splitlines()[-1]
    assert "; 0 found, seed 7, " in last
    told = json.loads(figures.read_text())
    assert (told["trials"], told["found"], told["seed"]) == (9, [], 7)
    assert "9 trials" in last


def test_a_find_names_the_command_that_repeats_it(capsys: pytest.CaptureFixture[str]) -> None:
    """With a rule broken: exit code 1, what was lost, what had happened; without it, nothing."""
    plan = searching.plan(7, 0, "storm")
    with broken_engine(flush_without_sync):
        found = next((seed, text) for _, seed in plan if (text := searching.run("storm", seed)[1]))
        command = searching.again("storm", found[0]).split()
        assert searching.main(command[1:]) == 1
    assert found[1].splitlines()[-1] in capsys.readouterr().out
    assert f"Storm({found[0]}" in found[1]
    assert searching.main(command[1:]) == 0
    assert "nothing found: {'storms': 1, 'lives': 8" in capsys.readouterr().out


def test_the_same_seed_is_the_same_search() -> None:
    """Each process has a plan of its own, and all kinds take turns in it."""

    def first(share: int) -> list[tuple[str, int]]:
        plan = searching.plan(5, share, None)
        return [next(plan) for _ in range(searching.STORMS + searching.TRIALS + 2)]

    assert first(0) == first(0)
    assert not {seed for _, seed in first(0)} & {seed for _, seed in first(1)}
    assert {kind for kind, _ in first(0)} == set(searching.KINDS)


@pytest.mark.parametrize(
    "options", [["--jobs", "0"], ["--minutes", "0"], ["--again", "storm"], ["--again", "rain:3"]]
)
def test_a_wrong_command_line_is_refused(options: list[str]) -> None:
    """Exit code 2, and nothing is searched."""
    with pytest.raises(SystemExit) as caught:
        searching.main(options)
    assert caught.value.code == 2
