"""What is done to the machine: processes, mounts, loop devices, page cache; and undoing it.

Promises: a process started by `started` and a mount awaited by `mounted` are gone when the block
ends, however it ends; only processes started here are ever signalled. What a killed run has left is
found again by `remove_stale`: each run keeps its directory locked and notes there, with their start
times, which processes it started.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from vsnapfs.demo.clearing import remove_write_buffers

PREFIX = "vsnapfs-bench-"
_PIDS = "processes"
_START_SECONDS = 20.0
_STOP_SECONDS = 30.0
_TICKS = os.sysconf("SC_CLK_TCK")


class BenchError(Exception):
    """A measurement could not be made; the message is what its row says."""


def run(
    *command: str | os.PathLike[str],
    seconds: float = 60,
    servers: Sequence[int] = (),
    work: Path | None = None,
) -> str:
    """What a command that has to succeed writes to stdout. BenchError with its stderr otherwise.

    work: given for a command that would go on for long if this process were killed; it is noted
    there as `started` does, and the kernel ends it with us, should that come before it is noted.
    servers: processes (started here) that the command waits on in the kernel, where no signal
    reaches it. If it does not end in time, they are killed, which frees it.
    """
    name = os.fspath(command[0])
    if shutil.which(name) is None:
        raise BenchError(f"{name} is not installed")
    with_us = ("setpriv", "--pdeathsig", "KILL") if work is not None else ()
    process = subprocess.Popen(
        [*with_us, *map(os.fspath, command)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    if work is not None:
        _note(work, process.pid)
    try:
        out, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        raise BenchError(f"{name} did not end within {seconds:g} s") from None
    finally:
        if process.poll() is None:
            _free(process, servers)
    if process.returncode != 0:
        reason = " ".join((errors or out).split())[-300:]
        raise BenchError(f"{name} ended with code {process.returncode}: {reason}")
    return out


def _free(process: subprocess.Popen[str], servers: Sequence[int]) -> None:
    """End a command that is not wanted any more; if it hangs in the kernel, by its servers' end."""
    process.kill()
    try:
        process.communicate(timeout=5)
    except subprocess.TimeoutExpired:
        for pid in servers:
            _kill(pid)
        with suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=10)


# --- the directory of one run ------------------------------------------------------------------


@contextmanager
def work_directory(parent: Path) -> Iterator[Path]:
    """A new directory for one run, locked while it lasts and removed with all in it after."""
    directory = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
    lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield directory
    finally:
        try:
            _remove(directory)
        finally:
            os.close(lock)


def remove_stale(parent: Path) -> list[Path]:
    """End and remove what runs that were killed have left in `parent`; their directories."""
    removed = []
    for directory in sorted(parent.glob(f"{PREFIX}*")):
        try:
            lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(lock).st_uid == os.geteuid():
                _remove(directory)
                removed.append(directory)
        except BlockingIOError:
            pass  # a run that lives
        finally:
            os.close(lock)
    return removed


def _remove(directory: Path) -> None:
    """Unmount what is mounted below, detach its loop devices, end its processes, delete it.

    From the top down: file systems on loop devices, the devices (whose files could not be told any
    more once the mounts below are detached), the mounts that the servers hold.
    """
    devices = loop_devices_below(directory)
    for source, mountpoint in _mounts_below(directory):
        if source in devices:
            _unmount_lazily(mountpoint)
    for device in devices:
        with suppress(BenchError):
            run("losetup", "--detach", device)
    for _, mountpoint in _mounts_below(directory):
        _unmount_lazily(mountpoint)
    with suppress(OSError):
        for line in (directory / _PIDS).read_text().splitlines():
            pid, _, start = line.partition(" ")
            if start and _start_time(int(pid)) == start:
                _kill(int(pid))
    remove_write_buffers(directory.rglob("volume.toml"))
    # A process that is just ending may still write there.
    wait_for(lambda: _is_deleted(directory), 60)


def _is_deleted(directory: Path) -> bool:
    shutil.rmtree(directory, ignore_errors=True)
    return not directory.exists()


def _mounts_below(directory: Path) -> list[tuple[str, str]]:
    """(source, mountpoint) of the mounts in a directory, the newest first. proc(5), mountinfo."""
    found = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        left, _, right = line.partition(" - ")
        place = left.split()[4].encode().decode("unicode_escape")
        if place.startswith(f"{directory}/"):
            found.append((right.split()[1], place))
    return found[::-1]


def loop_devices_below(directory: Path) -> list[str]:
    """/dev/loopN of every loop device over a file in this directory."""
    found = []
    for entry in Path("/sys/block").glob("loop*/loop/backing_file"):
        with suppress(OSError):
            if entry.read_text().startswith(f"{directory}/"):
                found.append(f"/dev/{entry.parent.parent.name}")
    return found


# --- processes ---------------------------------------------------------------------------------


def _start_time(pid: int) -> str:
    """When a process was started, in ticks since boot; "" if there is none. proc(5), stat."""
    try:
        return _stat(pid)[19]
    except OSError:
        return ""


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the third (state) on."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def cpu_seconds(pids: Sequence[int]) -> float:
    """User and system time so far of processes with all their threads, in seconds (10 ms steps)."""
    total = 0
    for pid in pids:
        fields = _stat(pid)
        total += int(fields[11]) + int(fields[12])
    return total / _TICKS


def peak_memory(pids: Sequence[int]) -> int:
    """The sum of the processes' largest resident sets so far (VmHWM), in bytes."""
    total = 0
    for pid in pids:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                total += int(line.split()[1]) << 10
    return total


@contextmanager
def started(
    work: Path, *command: str | os.PathLike[str], environment: dict[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """A server that runs during the block. It should end when its mount goes; if not, it is ended.

    What it says goes to a file in `work`; `said` returns that.
    """
    with open(work / f"log-{time.monotonic_ns()}", "w+b") as log:
        process = subprocess.Popen(
            [os.fspath(word) for word in command],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**os.environ, **(environment or {})},
            start_new_session=True,  # Ctrl-C is for us; we end it in order
        )
        process.log = Path(log.name)  # type: ignore[attr-defined]
        try:
            _note(work, process.pid)
            yield process
        finally:
            _end(process)


def _note(work: Path, pid: int) -> None:
    """So that `remove_stale` finds it: in the run's directory, which `work` lies in."""
    with open(work.parent / _PIDS, "a") as pids:
        pids.write(f"{pid} {_start_time(pid)}\n")


def said(process: subprocess.Popen[bytes]) -> str:
    """The end of what a server wrote."""
    text = process.log.read_text(errors="replace")  # type: ignore[attr-defined]
    return " ".join(text.split())[-300:]


def _end(process: subprocess.Popen[bytes]) -> None:
    """Wait for a process that has no reason to stay; then SIGTERM, then SIGKILL."""
    for sent, patience in (
        (None, 0.0 if process.poll() is not None else 3.0),
        (signal.SIGTERM, _STOP_SECONDS),
        (signal.SIGKILL, _STOP_SECONDS),
    ):
        if sent is not None:
            with suppress(ProcessLookupError):
                process.send_signal(sent)
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            continue
        return


# --- mounts ------------------------------------------------------------------------------------


@contextmanager
def mounted(process: subprocess.Popen[bytes], *places: Path, clean: bool = True) -> Iterator[None]:
    """Waits until something is mounted on all the places; unmounts them after the block.

    clean: then waits for the process, whose last work (a clean close) is part of its job. That
    wait is `started`'s otherwise.
    """
    try:
        deadline = time.monotonic() + _START_SECONDS
        while not all(_is_mounted(place) for place in places):
            if process.poll() is not None:
                raise BenchError(f"the server ended with {process.returncode}: {said(process)}")
            if time.monotonic() > deadline:
                raise BenchError(f"nothing was mounted in {_START_SECONDS:g} s: {said(process)}")
            time.sleep(0.02)
        yield
    finally:
        for place in reversed(places):
            if _is_mounted(place):
                _unmount(place)
        if clean:
            with suppress(subprocess.TimeoutExpired):
                process.wait(_STOP_SECONDS)


def _is_mounted(place: Path) -> bool:
    """Whether a directory or file is a mountpoint. One whose server has died is one too."""
    try:
        return os.lstat(place).st_dev != os.lstat(place.parent).st_dev
    except FileNotFoundError:
        return False
    except OSError:
        return True


def _unmount(place: Path | str) -> None:
    """Busy for a moment (a loop device that is just going) is waited for, then it goes lazily."""
    deadline = time.monotonic() + 5
    tool = ["umount"] if os.geteuid() == 0 else ["fusermount3", "-u"]
    while True:
        try:
            run(*tool, str(place))
            return
        except BenchError:
            if time.monotonic() > deadline:
                break
            time.sleep(0.1)
    _unmount_lazily(place)


def _unmount_lazily(place: Path | str) -> None:
    tool = ["umount", "-l"] if os.geteuid() == 0 else ["fusermount3", "-uz"]
    with suppress(BenchError):
        run(*tool, str(place))


@contextmanager
def loop_device(file: Path) -> Iterator[str]:
    """A loop device with direct I/O on a file. Needs root."""
    device = run("losetup", "--find", "--show", "--direct-io=on", file).strip()
    try:
        yield device
    finally:
        # Raising here would hide why the block ended, an interrupt perhaps.
        wait_for(lambda: _is_detached(device), 5)


def _is_detached(device: str) -> bool:
    with suppress(BenchError):
        run("losetup", "--detach", device)
    return not Path(f"/sys/block/{device[5:]}/loop/backing_file").exists()


@contextmanager
def ext4_mounted(device: str, place: Path) -> Iterator[None]:
    """The ext4 on this device, mounted here."""
    place.mkdir(exist_ok=True)
    run("mount", "-o", "noatime", device, place)
    try:
        yield
    finally:
        _unmount(place)


def wait_for(condition: Callable[[], bool], seconds: float) -> bool:
    """Whether the condition came true in this time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


# --- the page cache ----------------------------------------------------------------------------


def settle(directory: Path) -> None:
    """Write back everything of the directory's file system (syncfs)."""
    run("sync", "--file-system", directory, seconds=300)


def may_drop_all() -> bool:
    """Whether the page cache of the whole machine can be dropped."""
    return os.geteuid() == 0


def drop_caches(directory: Path, files: Sequence[Path]) -> str:
    """Write back and forget: the page cache of the machine, or without root that of `files`.

    Returns which of the two it was, for the report.
    """
    settle(directory)
    if may_drop_all():
        Path("/proc/sys/vm/drop_caches").write_text("3\n")
        return "all"
    for file in files:
        with suppress(OSError):
            descriptor = os.open(file, os.O_RDONLY)
            try:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)
    return "files"


@contextmanager
def connections_mounted() -> Iterator[None]:
    """Where servers set their limits (max_background). systemd mounts it; it may be missing."""
    place = Path("/sys/fs/fuse/connections")
    ours = False
    if os.geteuid() == 0 and place.is_dir() and not place.is_mount():
        command = ["mount", "-t", "fusectl", "fusectl", str(place)]
        ours = subprocess.run(command, check=False, capture_output=True).returncode == 0
    try:
        yield
    finally:
        if ours:
            subprocess.run(["umount", str(place)], check=False, capture_output=True)
