"""The rules of tests/conftest.py hold: what is left behind, hangs, warns or is missing is found.

Each test runs pytest in a process of its own over one small test file next to a copy of conftest.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

#: The house, not the packages: once is enough.
pytestmark = pytest.mark.slow

TESTS = Path(__file__).resolve().parent.parent
Inner = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def inner(tmp_path: Path) -> Inner:
    """Run pytest over the given test code, as if `fuse` were the machine's /dev/fuse."""

    def run(code: str, *options: str, ci: bool = False, fuse: str = "/dev/fuse") -> object:
        work = tmp_path / "inner"
        (work / "tests").mkdir(parents=True, exist_ok=True)
        for name in ("conftest.py", "chance.py"):
            shutil.copy(TESTS / name, work / "tests")
        house = (TESTS / "house.py").read_text()
        assert '"/dev/fuse"' in house
        (work / "tests" / "house.py").write_text(house.replace('"/dev/fuse"', repr(fuse)))
        shutil.copy(TESTS.parent / "pyproject.toml", work)
        (work / "tests" / "test_inner.py").write_text(code)
        environment = dict(os.environ)
        environment.pop("CI", None)
        environment.pop("VSNAPFS_TEST_COUNTS", None)
        if ci:
            environment["CI"] = "true"
        return subprocess.run(
            [
                *(sys.executable, "-m", "pytest", "-p", "no:cacheprovider"),
                f"--basetemp={tmp_path / 'base'}",
                *options,
            ],
            cwd=work,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )

    return run


def test_a_clean_run_passes(inner: Inner) -> None:
    """The rules alone disturb nothing: a test that leaves nothing behind passes."""
    result = inner("def test_it(tmp_path): (tmp_path / 'file').write_text('x')")
    assert result.returncode == 0, result.stdout
    assert "1 passed" in result.stdout


def test_a_process_left_behind_fails_the_run_and_is_ended(inner: Inner, tmp_path: Path) -> None:
    """A process that detached itself from the tests is found, named and ended."""
    result = inner(
        f"""
import pathlib, subprocess
def test_it():
    process = subprocess.Popen(["sleep", "1234"], start_new_session=True)
    process.returncode = 0  # so that Python does not warn: it is to be found by itself
    pathlib.Path({str(tmp_path / "pid")!r}).write_text(str(process.pid))
    # Popen returns before the kernel has put the new program's environment in its place.
    while not pathlib.Path(f"/proc/{{process.pid}}/environ").read_bytes():
        pass
"""
    )
    assert result.returncode == 1, result.stdout
    assert "sleep 1234" in result.stdout
    assert "1 passed, 1 error" in result.stdout
    process = Path("/proc", (tmp_path / "pid").read_text())
    # An init that is slow to reap leaves a zombie, which has no command line any more.
    assert not process.exists() or (process / "cmdline").read_bytes() == b""


def test_an_outer_run_finds_what_a_killed_inner_one_left(tmp_path: Path, inner: Inner) -> None:
    """A run that is killed cannot clean up; its processes still carry the outer run's token."""
    result = inner(
        f"""
import os, pathlib, signal, subprocess
def test_it():
    process = subprocess.Popen(["sleep", "1235"], start_new_session=True)
    pathlib.Path({str(tmp_path / "pid")!r}).write_text(str(process.pid))
    os.kill(os.getpid(), signal.SIGKILL)
"""
    )
    assert result.returncode == -signal.SIGKILL
    pid = int((tmp_path / "pid").read_text())
    try:
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        ours = f"VSNAPFS_TEST_RUN={os.environ['VSNAPFS_TEST_RUN']}"
        assert any(variable.startswith(ours.encode()) for variable in variables)
    finally:
        os.kill(pid, signal.SIGKILL)


@pytest.mark.needs_loop
def test_mounts_and_loop_devices_left_behind_fail_the_run_and_are_removed(inner: Inner) -> None:
    """A forgotten mount and a forgotten loop device are found, named and removed."""
    result = inner(
        """
import subprocess
def test_it(tmp_path):
    place = tmp_path / "a mount"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", place], check=True)
    image = tmp_path / "image"
    image.write_bytes(bytes(1 << 20))
    subprocess.run(["losetup", "--find", image], check=True)
    print(f"<{place}|{image}>")
    assert False, "shows the output above"
"""
    )
    assert result.returncode == 1, result.stdout
    place, image = result.stdout.split("<", 1)[1].split(">", 1)[0].split("|")
    assert f"mount {place} (tmpfs, none)" in result.stdout
    assert f" on {image}" in result.stdout
    assert not os.path.ismount(place)
    assert image not in subprocess.check_output(["losetup"], text=True)


def test_a_test_that_hangs_is_ended(inner: Inner) -> None:
    """A test that outlasts its limit fails with it, and the next one runs."""
    result = inner(
        """
import pytest, time
@pytest.mark.time_limit(0.2)
def test_hangs(): time.sleep(50)
def test_next(): pass
"""
    )
    assert result.returncode == 1
    assert "took longer than 0.2 seconds" in result.stdout
    assert "1 failed, 1 passed" in result.stdout


def test_a_stray_warning_fails_the_test(inner: Inner) -> None:
    """A logged warning and a Python warning fail a test, unless it expects the log."""
    result = inner(
        """
import logging, pytest, warnings
def test_logs(): logging.getLogger("x").warning("odd %s", "thing")
def test_warns(): warnings.warn("odd")
@pytest.mark.expects_log
def test_expects(): logging.getLogger("x").error("odd")
def test_informs(): logging.getLogger("x").info("fine")
"""
    )
    assert "WARNING x: odd thing" in result.stdout
    assert "UserWarning: odd" in result.stdout
    assert "1 failed, 3 passed, 1 error" in result.stdout


NEEDY = """
import pytest
@pytest.mark.needs_fuse
def test_it(): pass
"""


@pytest.mark.parametrize("ci", [False, True], ids=["laptop", "CI"])
@pytest.mark.parametrize(
    ("device", "reason"),
    [("/nowhere/fuse", "No such file"), ("/dev/null", "is not the FUSE device")],
)
def test_without_dev_fuse_a_laptop_skips_and_ci_fails(
    inner: Inner, device: str, reason: str, *, ci: bool
) -> None:
    """Where /dev/fuse is missing or fake, the reason is given; in CI that is a failure."""
    result = inner(NEEDY, ci=ci, fuse=device)
    assert reason in result.stdout
    assert ("1 error" if ci else "1 skipped") in result.stdout
    assert result.returncode == (1 if ci else 0)


@pytest.mark.needs_fuse
def test_with_dev_fuse_the_test_runs(inner: Inner) -> None:
    """The probe is no excuse: where /dev/fuse works, the marked test runs."""
    result = inner(NEEDY)
    assert "1 passed" in result.stdout


def test_an_unknown_mark_is_an_error(inner: Inner) -> None:
    """A misspelt mark does not silently run a test where it cannot run."""
    result = inner("import pytest\n@pytest.mark.need_fuse\ndef test_it(): pass\n")
    assert result.returncode != 0
    assert "need_fuse" in result.stdout


# --- chance ------------------------------------------------------------------------------------


CHOOSING = """
import random, trio._core._run as trio_run
from hypothesis import given, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule
def test_first(): print("<", random.random(), trio_run._r.random(), ">")
@given(st.integers())
def test_second(number): print("<", number, ">")
class Machine(RuleBasedStateMachine):
    @rule(number=st.integers(), other=st.binary())
    def step(self, number, other): print("<", number, other, ">")
TestThird = Machine.TestCase
"""


def test_choices_are_the_same_in_every_run_unless_a_search_is_asked_for(inner: Inner) -> None:
    """Two runs draw the same; a seed draws others, and the same once more; the seed is said."""

    def drawn(*options: str) -> list[str]:
        result = inner(CHOOSING, "-s", *options)
        assert result.returncode == 0, result.stdout
        again = f"again with scripts/test --random={options[0][-1]}" if options else "every run"
        assert again in next(line for line in result.stdout.splitlines() if "choices:" in line)
        return re.findall("<.*?>", result.stdout)

    usual, seven = drawn(), drawn("--hypothesis-seed=7")
    assert len(usual) > 200
    assert drawn() == usual
    assert drawn("--hypothesis-seed=7") == seven
    # Some numbers are liked by every search; the two shared generators come first.
    assert usual[0] != seven[0]
    assert len(set(seven) - set(usual)) > 100


#: Programs of their own that say which seed they have taken.
SEARCHES = {"fuzzing.py", "kill_loop.py", "processes.py", "searching.py"}
SHARED_DICE = {
    "random", "randrange", "randint", "choice", "choices", "shuffle", "sample", "uniform",
    "randbytes", "getrandbits", "SystemRandom",
}  # fmt: skip


def test_no_test_chooses_by_a_chance_that_nobody_can_repeat() -> None:
    """Every generator has a seed, and nothing is drawn from the one that all share."""
    found = []
    for path in sorted(TESTS.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            of_all = called.startswith("random.") and called[7:] in SHARED_DICE
            unseeded = called in ("random.Random", "Random") and not node.args
            if of_all or unseeded or called.startswith(("secrets.", "uuid.uuid")):
                found.append((path.name, f"{path.name}:{node.lineno}: {called}"))
    assert [text for name, text in found if name not in SEARCHES] == []
    assert {name for name, _ in found} == SEARCHES, "the list of programs is out of date"


# --- the machine -------------------------------------------------------------------------------


def test_a_process_that_grows_and_grows_gets_an_error_not_the_machine(inner: Inner) -> None:
    """4 GiB are too much for the run, and for what it starts; large files are no matter."""
    result = inner(
        """
import mmap, pytest, subprocess, sys
def test_here():
    with pytest.raises(MemoryError): bytearray(4 << 30)
def test_there():
    command = [sys.executable, "-c", "bytearray(4 << 30)"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert "MemoryError" in done.stderr
def test_files(tmp_path):
    with (tmp_path / "sparse").open("wb+") as file:
        file.truncate(64 << 30)
        mmap.mmap(file.fileno(), 64 << 30).close()
"""
    )
    assert result.returncode == 0, result.stdout


@pytest.mark.needs_fuse
@pytest.mark.skipif(os.geteuid() != 0, reason="ordinary users cannot everywhere")
def test_the_run_has_its_mounts_for_itself(inner: Inner, tmp_path: Path) -> None:
    """What it mounts is not seen outside, so nobody's copy of all mounts can hold it; and volumes
    that were mounted before it are not held by it.
    """
    for name in ("ours", "theirs"):
        (tmp_path / name).mkdir()
    # What looks like a volume is enough: the name of its file system's type decides.
    fd = os.open("/dev/fuse", os.O_RDWR)
    options = f"fd={fd},rootmode=40000,user_id=0,group_id=0"
    theirs = tmp_path / "theirs"
    command = ["mount", "-i", "-t", "fuse.vsnapfs", "-o", options, "a volume", theirs]
    try:
        made = subprocess.run(command, pass_fds=[fd], capture_output=True, text=True, check=False)
        assert made.returncode == 0, made.stderr
        result = inner(
            f"""
import os, pathlib, subprocess
def test_it():
    assert os.readlink("/proc/self/ns/mnt") != {os.readlink("/proc/self/ns/mnt")!r}
    subprocess.run(["mount", "-t", "tmpfs", "none", {str(tmp_path / "ours")!r}], check=True)
    (pathlib.Path({str(tmp_path / "ours")!r}) / "inside").touch()
    text = pathlib.Path("/proc/self/mountinfo").read_text()
    assert {str(theirs)!r} not in text
"""
        )
        assert result.returncode == 0, result.stdout
        assert "mounts: in a namespace of their own" in result.stdout
        assert list((tmp_path / "ours").iterdir()) == []
        assert str(theirs) in Path("/proc/self/mountinfo").read_text(), "theirs is still mounted"
    finally:
        os.close(fd)
        subprocess.run(["umount", "--lazy", theirs], capture_output=True, check=False)
