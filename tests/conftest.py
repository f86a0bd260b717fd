"""What all tests share: which of them can run here, how long they may take, what they leave behind.

* `@pytest.mark.needs_fuse`, `needs_loop`, `needs_fio`, `needs_qemu`, `needs_strace`,
  `needs_gcc`: without it the test is skipped with the reason; when CI=true it fails instead, so
  that a green CI means that it ran.
* choices are the same in every run, unless a random search is asked for (see tests/chance.py);
* no process may take more than 4 GiB, so that one that runs away fails instead of the machine;
* the run has a mount namespace of its own, as root or where users can have one: what is mounted in
  it cannot be held by somebody else's copy of the mounts (and not be seen from outside: `nsenter
  --mount --target PID` goes in);
* every test has a time limit (`@pytest.mark.time_limit(seconds)` for another than 300 s), because
  a file system that does not answer would otherwise hang the whole run;
* every test fails on Python log messages of WARNING and above (`@pytest.mark.expects_log`);
* after the last test nothing may be left: no mount, no loop device, no process of ours. What is
  left is cleaned up and fails the run.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import chance
import pytest
from house import (
    ROOT,
    limit_memory,
    loop_devices,
    missing_for_fio,
    missing_for_fuse,
    missing_for_gcc,
    missing_for_loop,
    missing_for_qemu,
    missing_for_strace,
    mounts,
    run,
)

from vsnapfs.demo.namespace import own_namespace

IN_CI = os.environ.get("CI") == "true"
#: In CI nobody else is on the machine, unless another run of these tests is.
ALONE = IN_CI and not os.environ.get("VSNAPFS_TEST_BESIDE")
TIME_LIMIT = 300.0
TOKEN_NAME = "VSNAPFS_TEST_RUN"
# A run inside a run (tests/t0_formats/test_house_rules.py) adds to the outer one's token.
TOKEN = f"{os.environ.get(TOKEN_NAME, '')}{os.getpid()}-{time.monotonic_ns()}/"

# mkfs, losetup and mount live in sbin, which is not on everybody's PATH. Servers and commands that
# tests start find the package by PYTHONPATH, since Debian's Python has it not installed. The token
# is inherited by every process that a test starts, however it detaches itself. PYTHONUNBUFFERED,
# which containers like to set, would hide what is lost in buffers on an ordinary machine.
os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
)
os.environ[TOKEN_NAME] = TOKEN
os.environ.pop("PYTHONUNBUFFERED", None)
# Where it sees these, pytest explains a failed comparison of two images byte by byte: half a minute
# each time, also where the failure is what a test is after.
for _name in ("CI", "BUILD_NUMBER"):
    os.environ.pop(_name, None)

limit_memory()
# Now, before anything starts threads, which would keep an ordinary user from having one.
WHY_SHARED = own_namespace(ROOT, Path(tempfile.gettempdir()))


def pytest_configure(config: pytest.Config) -> None:
    """Before the test modules are imported."""
    chance.configure(config)


# --- what this machine can do ------------------------------------------------------------------


NEEDS: dict[str, Callable[[], str | None]] = {
    "needs_fuse": missing_for_fuse,
    "needs_loop": missing_for_loop,
    "needs_fio": missing_for_fio,
    "needs_qemu": missing_for_qemu,
    "needs_strace": missing_for_strace,
    "needs_gcc": missing_for_gcc,
}


@pytest.fixture(scope="session", autouse=True)
def _no_rings_left(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A volume that is killed and never opened again leaves its write buffer in shared memory."""
    from vsnapfs.volume.shm import discard  # brings numpy, which starts threads

    yield
    for config in tmp_path_factory.getbasetemp().rglob("volume.toml"):
        if config.is_symlink() or not config.is_file():
            continue  # Some are made to be no good.
        text = config.read_bytes().decode(errors="replace")
        found = re.search(r'^volume-id = "([0-9a-f]{32})"$', text, re.MULTILINE)
        if found:
            discard(bytes.fromhex(found[1]))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip or, in CI, fail a test that needs what is not here."""
    for mark, missing in NEEDS.items():
        if item.get_closest_marker(mark) is not None and (reason := missing()) is not None:
            if IN_CI:
                pytest.fail(f"{mark}, and CI must run every test: {reason}", pytrace=False)
            pytest.skip(reason)


# --- each test ---------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _the_same_choices(request: pytest.FixtureRequest) -> None:
    chance.begin(request.node.nodeid)


@pytest.fixture(autouse=True)
def _within_its_time(request: pytest.FixtureRequest) -> Iterator[None]:
    """Interrupt a test that takes too long; the main thread raises wherever it is."""
    mark = request.node.get_closest_marker("time_limit")
    limit = float(mark.args[0]) if mark is not None else TIME_LIMIT

    def on_alarm(signum: int, frame: FrameType | None) -> None:
        pytest.fail(f"took longer than {limit:g} seconds")

    before = signal.signal(signal.SIGALRM, on_alarm)
    # Again after 30 s: an exception raised inside a callback of C code may get lost.
    signal.setitimer(signal.ITIMER_REAL, limit, 30)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class _Collected(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(f"{record.levelname} {record.name}: {record.getMessage()}")


@pytest.fixture(autouse=True)
def _no_stray_log(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test that made something log a warning, unless it expects that."""
    if request.node.get_closest_marker("expects_log") is not None:
        yield
        return
    collected = _Collected()
    logging.getLogger().addHandler(collected)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(collected)
    if collected.messages:
        pytest.fail("logged by the way:\n" + "\n".join(collected.messages), pytrace=False)


# --- nothing is left behind --------------------------------------------------------------------


def processes_of_this_run() -> dict[int, str]:
    """Pid → command line of every living process, but this one, that carries our token."""
    found = {}
    mark = f"{TOKEN_NAME}={TOKEN}".encode()
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):  # gone at this moment, or somebody else's
            environment = Path(entry.path, "environ").read_bytes().split(b"\0")
            if any(variable.startswith(mark) for variable in environment):
                command = Path(entry.path, "cmdline").read_bytes().replace(b"\0", b" ")
                found[int(entry.name)] = command.decode(errors="replace").strip()
    return found


class _Leftovers:
    """Compares the machine after the tests with the machine before them.

    Ours is what lies under pytest's temporary directory and each process with our token. A mount
    of vsnapfs elsewhere that is new may be another run's on the same machine; in CI, where nobody
    else is, it counts too (but is not touched). So does a loop device, unless another run of these
    tests goes on meanwhile (scripts/test looks when both have ended).
    """

    def __init__(self, base: Path) -> None:
        self._base = base
        self._mounts = mounts()
        self._loops = loop_devices()

    def _is_ours(self, path: str) -> bool:
        return path == str(self._base) or path.startswith(f"{self._base}/")

    def _new_mounts(self) -> list[tuple[str, str, bool]]:
        """Newest first: (mountpoint, description, ours)."""
        new = []
        for number, (mountpoint, kind, source) in mounts().items():
            if self._mounts.get(number) == (mountpoint, kind, source):
                continue
            ours = self._is_ours(mountpoint) or self._is_ours(source)
            if ours or (IN_CI and kind == "fuse.vsnapfs"):
                new.append((mountpoint, f"mount {mountpoint} ({kind}, {source})", ours))
        return new[::-1]

    def _new_loops(self) -> list[tuple[str, str, bool]]:
        new = []
        for device, backing in loop_devices().items():
            if self._loops.get(device) == backing:
                continue
            ours = self._is_ours(backing)
            if ours or ALONE:
                new.append((device, f"loop device {device} on {backing}", ours))
        return new

    def found(self) -> list[str]:
        """Everything left behind, one line each."""
        return [
            *(text for _, text, _ in self._new_mounts()),
            *(text for _, text, _ in self._new_loops()),
            *(f"process {pid}: {command}" for pid, command in processes_of_this_run().items()),
        ]

    def clean_up(self) -> None:
        """Remove what is ours: mounts first (their servers end by that), then loops, processes."""
        for mountpoint, _, ours in self._new_mounts():
            if ours:
                tool = ("umount", "-l") if os.geteuid() == 0 else ("fusermount3", "-uz")
                run(*tool, mountpoint)
        for device, _, ours in self._new_loops():
            if ours:
                run("losetup", "--detach", device)
        for sent in (signal.SIGTERM, signal.SIGKILL):
            for pid in processes_of_this_run():
                with contextlib.suppress(OSError):
                    os.kill(pid, sent)
            _wait_until(lambda: not processes_of_this_run(), 3)


def _wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


@pytest.fixture(scope="session", autouse=True)
def _nothing_is_left(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The first fixture of the run, so the last to end: see the module's docstring."""
    leftovers = _Leftovers(tmp_path_factory.getbasetemp())
    yield
    # A server told to end a moment ago, or a lazily detached loop device, may be on its way.
    if _wait_until(lambda: not leftovers.found(), 3):
        return
    found = leftovers.found()
    leftovers.clean_up()
    if found:
        text = "left behind by the tests (cleaned up now):\n  " + "\n  ".join(found)
        pytest.fail(text, pytrace=False)


# --- what a run reports ------------------------------------------------------------------------


def pytest_report_header() -> list[str]:
    """Which set of packages this run uses, and what it cannot do."""
    from importlib import metadata

    names = ("pyfuse3", "trio", "click", "xxhash", "numpy", "rich", "hypothesis")
    versions = []
    for name in names:
        try:
            versions.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            versions.append(f"{name} missing")
    lacking = [reason for missing in NEEDS.values() if (reason := missing()) is not None]
    return [
        f"python: {sys.executable}; {', '.join(versions)}",
        *(f"not possible here: {reason}" for reason in lacking),
        f"mounts: {'not ' if WHY_SHARED else ''}in a namespace of their own {WHY_SHARED}".rstrip(),
        chance.words(),
    ]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Leave the counts for scripts/test, which adds up several runs."""
    name = os.environ.get("VSNAPFS_TEST_COUNTS")
    if name is not None:
        stats = terminalreporter.stats
        Path(name).write_text(
            json.dumps(
                {
                    "passed": len(stats.get("passed", [])),
                    "failed": len(stats.get("failed", [])) + len(stats.get("error", [])),
                    "skipped": len(stats.get("skipped", [])),
                }
            )
        )
