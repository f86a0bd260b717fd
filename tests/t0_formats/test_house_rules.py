"""The rules of tests/conftest.py hold: what is left behind, hangs, warns or is missing is found.

Each test runs pytest in a process of its own over one small test file next to a copy of conftest.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent.parent
Inner = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def inner(tmp_path: Path) -> Inner:
    """Run pytest over the given test code, as if `fuse` were the machine's /dev/fuse."""

    def run(code: str, *, ci: bool = False, fuse: str = "/dev/fuse") -> object:
        work = tmp_path / "inner"
        (work / "tests").mkdir(parents=True)
        (work / "tests" / "conftest.py").write_text((TESTS / "conftest.py").read_text())
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
