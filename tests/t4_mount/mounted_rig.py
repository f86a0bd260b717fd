"""What the tests on real mounts share: a volume and a machine around it, and fio.

`Machine` (fixture `machine`) makes volumes, loop devices and small host file systems, and takes
all of them away again whatever happens, newest first. A `Rig` is one volume with its mountpoint.
When a test ends, the log of each server must be empty unless the test says what it expects in it.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from vsnapfs import config
from vsnapfs.daemon import client, mounts, server
from vsnapfs.errors import VsnapError
from vsnapfs.volume.create import create_volume

KIB, MIB = 1 << 10, 1 << 20


def sh(*command: str | Path, timeout: float = 60) -> str:
    """Run a command that must succeed; its stdout."""
    done = quiet(*command, timeout=timeout)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def quiet(*command: str | Path, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    """Run a command that may fail."""
    return subprocess.run(
        list(map(str, command)),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
        timeout=timeout,
    )


def vsnapfs(*args: str | Path, code: int = 0, timeout: float = 60) -> str:
    """Run a vsnapfs command as a process of its own; it must exit with `code`. stdout + stderr."""
    done = quiet(sys.executable, "-m", "vsnapfs", *args, timeout=timeout)
    assert done.returncode == code, f"{args}: {done.returncode}\n{done.stdout}{done.stderr}"
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout + done.stderr


def until(condition: Callable[[], Any], seconds: float = 60, *, pause: float = 0.02) -> None:
    """Wait until something is so; fail when it never is. Looks every `pause` seconds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds:g} s in vain"
        time.sleep(pause)


def alive(pid: int) -> bool:
    """Whether a process still runs; one that only waits to be collected does not.

    Its first thread may be through before the last one has closed the process's files.
    """
    try:
        threads = list(Path(f"/proc/{pid}/task").iterdir())
    except OSError:
        return False
    for thread in threads:
        with suppress(OSError):
            if (thread / "stat").read_text().rpartition(")")[2].split()[0] not in "ZX":
                return True
    return False


def errno_of(call: Callable[..., Any], *args: Any) -> int:
    """The errno with which a call fails, 0 if it does not."""
    try:
        call(*args)
    except OSError as error:
        return error.errno or -1
    return 0


def write_all(fd: int, data: bytes, offset: int = 0) -> None:
    """Write, also what the kernel divides into several requests. OSError from the first refused."""
    view = memoryview(data)
    while view:
        count = os.pwrite(fd, view, offset)
        view, offset = view[count:], offset + count


def read_direct(path: Path, offset: int = 0, length: int | None = None) -> bytes:
    """The bytes of a file past the page cache, so that what comes is what the server says."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    parts = []
    try:
        left = os.fstat(fd).st_size - offset if length is None else length
        with mmap.mmap(-1, MIB) as buffer:
            while left > 0:
                with memoryview(buffer)[: min(left + -left % 512, MIB)] as view:
                    count = os.preadv(fd, [view], offset)
                assert count > 0, f"{path} ends at {offset}"
                parts.append(buffer[: min(count, left)])
                offset += count
                left -= count
    finally:
        os.close(fd)
    return b"".join(parts)


def sha256(path: Path, *, direct: bool = False) -> str:
    """sha256 of a file. direct: past the page cache (recovery points are cached otherwise)."""
    if direct:
        return hashlib.sha256(read_direct(path)).hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---- one volume -------------------------------------------------------------------------------


class Rig:
    """A volume `directory`, its mountpoint `place`, and everything a test does to them."""

    def __init__(
        self, base: Path, name: str = "vol", *, size: int | None = 16 * MIB, area: int, **how: Any
    ) -> None:
        self.directory = base / name
        self.place = base / f"mnt-{name}"
        self.place.mkdir()
        self.pid = 0
        self.expected_log: tuple[str, ...] = ()
        self.warnings = create_volume(self.directory, size=size, diff_area_size=area, **how)
        # A busy machine is no bug: growing and holding get more time here than by default.
        self.configure(grow_timeout=30.0, hold_timeout=60.0)

    def configure(self, **changes: Any) -> None:
        """Change volume.toml, which counts from the next opening on."""
        config.save(self.directory, replace(config.load(self.directory), **changes))

    # -- its parts

    @property
    def replica(self) -> Path:
        """The live volume, through the mount."""
        return self.place / "replica.img"

    @property
    def image(self) -> Path:
        """The replica's file on the host."""
        return self.directory / "replica.img"

    @property
    def area(self) -> Path:
        """The diff area's file, wherever it is."""
        return config.VolumePaths(self.directory).diff_area

    def point(self, number: int) -> Path:
        """The image of a recovery point, through the mount."""
        return self.place / "recovery-points" / f"{number:04d}.img"

    # -- what is done to it

    def mount(self, **options: Any) -> int:
        """Mount it in a background process; its pid."""
        self.pid = server.spawn(self.directory, self.place, **options)
        return self.pid

    def unmount(self) -> None:
        """Unmount it cleanly."""
        mount = mounts.mount_of(self.directory)
        assert mount is not None
        mounts.unmount(mount)

    def kill(self) -> None:
        """SIGKILL the serving process and wait until it is gone. The dead mount stays."""
        os.kill(self.pid, signal.SIGKILL)
        until(lambda: not alive(self.pid))

    def call(self, op: str, **params: Any) -> Any:
        """An operation, as commands ask for it."""
        return client.call(self.directory, op, **params)

    def create_point(self, label: str | None = None) -> int:
        """Create a recovery point; its number."""
        number = self.call("rp_create", label=label)["number"]
        assert isinstance(number, int)
        return number

    def points(self) -> list[int]:
        """The numbers of the recovery points."""
        return [point["number"] for point in self.call("rp_list")]

    def status(self) -> dict[str, Any]:
        """What `vsnapfs status --json` tells."""
        report = self.call("status")
        assert isinstance(report, dict)
        return report

    def fault(self) -> int | None:
        """The number of the fault, None when there is none."""
        fault = self.status()["fault"]
        return None if fault is None else int(fault["code"])

    def write(self, offset: int, data: bytes) -> None:
        """Write to the live volume through a handle of its own."""
        with self.opened() as fd:
            write_all(fd, data, offset)

    def carried_out(self) -> None:
        """Wait until nothing acknowledged is left in the write buffer."""
        end = time.monotonic() + 60
        while self.status()["write_buffer"]["writes"]:
            assert time.monotonic() < end, self.status()["write_buffer"]
            time.sleep(0.05)

    @contextmanager
    def opened(self, flags: int = os.O_RDWR) -> Iterator[int]:
        """A file descriptor of the live volume."""
        fd = os.open(self.replica, flags)
        try:
            yield fd
        finally:
            with suppress(OSError):
                os.close(fd)

    def events(self) -> list[dict[str, Any]]:
        """The event log's entries, as JSON objects, oldest first."""
        lines = (self.directory / "events.jsonl").read_text(errors="replace").splitlines()
        return [json.loads(line) for line in lines if line.strip("\0")]

    def event_ids(self) -> list[int]:
        """The ids of the events, oldest first."""
        return [event["event_id"] for event in self.events()]

    def event(self, event_id: int) -> dict[str, Any]:
        """The parameters of the only event with this id."""
        (found,) = [event for event in self.events() if event["event_id"] == event_id]
        return found.get("params", found)

    def log(self) -> str:
        """What the server wrote to its log."""
        try:
            return (self.directory / "server.log").read_text(errors="replace")
        except FileNotFoundError:
            return ""

    # -- the loop device

    def attach(self) -> str:
        """Attach a loop device; its name."""
        return mounts.attach_loop(self.replica)

    def detach(self) -> None:
        """Detach its loop devices, and wait until they are gone."""
        for device in mounts.loop_devices(self.place):
            mounts.detach_loop(device)

    # -- the end

    def clean_up(self) -> None:
        """Take away everything that stands on the volume, and its server."""
        for device in mounts.loop_devices(self.place):
            for mount in mounts.all_mounts():
                if mount.source == device:
                    quiet("umount", "-l", mount.mountpoint)
            quiet("losetup", "--detach", device)
        mount = mounts.mount_of(self.directory)
        if mount is not None:
            with suppress(VsnapError):
                mounts.unmount(mount)
            mount = mounts.mount_of(self.directory)
            if mount is not None:
                with suppress(VsnapError):
                    mounts.unmount_now(mount.mountpoint, lazy=True)
        if self.pid and alive(self.pid):
            with suppress(OSError):
                os.kill(self.pid, signal.SIGTERM)
            with suppress(AssertionError):
                until(lambda: not alive(self.pid), 5)

    def check_log(self) -> None:
        """Fail on any line of the server's log that is not expected."""
        stray = [
            line
            for line in self.log().splitlines()
            if not any(expected in line for expected in self.expected_log)
        ]
        assert not stray, "in server.log:\n" + "\n".join(stray)


# ---- what is around it --------------------------------------------------------------------------


class Machine:
    """Makes things that must be taken away again. `base` is the test's own directory."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.rigs: list[Rig] = []
        self._stack = ExitStack()

    def rig(self, name: str = "vol", *, area: int = 64 * MIB, **how: Any) -> Rig:
        """A new volume, not mounted."""
        rig = Rig(self.base, name, area=area, **how)
        self.rigs.append(rig)
        self.later(rig.clean_up)
        return rig

    def later(self, step: Callable[..., Any], *args: Any) -> None:
        """Do this at the end, before everything that was made earlier is taken away."""
        self._stack.callback(step, *args)

    def device(self, size: int, name: str = "device") -> str:
        """A loop device of `size` bytes over a new file (a block device like any other)."""
        file = self.base / f"{name}.file"
        with file.open("wb") as handle:
            handle.truncate(size)
        device = sh("losetup", "--find", "--show", file).strip()
        self.later(quiet, "losetup", "--detach", device)
        return device

    def host(self, size: int, name: str = "host", *options: str) -> Path:
        """A small ext4 of its own, mounted: a host file system that can run full or go away."""
        place = self.base / name
        place.mkdir()
        device = self.device(size, name)
        # No lazy initialisation: it would write behind the test's back.
        lazy = "lazy_itable_init=0,lazy_journal_init=0"
        sh("mkfs.ext4", "-q", "-m", "0", "-E", lazy, *options, device)
        sh("mount", device, place)
        self.later(quiet, "umount", "-l", place)
        return place

    def close(self) -> None:
        """Take everything away; then look at what the servers said."""
        self._stack.close()
        for rig in self.rigs:
            rig.check_log()


def fill(path: Path) -> int:
    """Fill the file system that holds `path` to its last block with a new file; its size."""
    with path.open("xb", buffering=0) as file:
        for step in (MIB, 64 * KIB, 4 * KIB):
            data, full = os.urandom(step), False
            while not full:
                try:
                    full = file.write(data) < step
                except OSError:
                    full = True
        with suppress(OSError):
            os.fsync(file.fileno())
    return path.stat().st_size


# ---- fio ----------------------------------------------------------------------------------------


class Fio:
    """One run of fio with JSON output. Options in fio's own words, _ for -.

    within: a cgroup to run in.
    """

    def __init__(
        self, work: Path, name: str = "job", *, within: Path | None = None, **options: object
    ) -> None:
        self._work = work
        self._output = work / f"{name}.json"
        self._output.unlink(missing_ok=True)
        self._errors = work / f"{name}.err"
        words = [f"--{key.rstrip('_')}={value}" for key, value in options.items()]
        # The shell goes there itself, then becomes fio.
        enter = f'echo $$ > "{within}/cgroup.procs" && ' if within else ""
        start = ["sh", "-c", f'{enter}exec fio "$@"', "fio"]
        with self._errors.open("wb") as errors:
            # --thread: one process, so that one SIGSTOP stops all of it.
            self.process = subprocess.Popen(
                [*start, "--thread", f"--name={name}", *words, "--output-format=json",
                 f"--output={self._output}"],
                cwd=work, stdin=subprocess.DEVNULL, stdout=errors, stderr=errors,
            )  # fmt: skip

    @property
    def running(self) -> bool:
        """Whether it has not ended yet."""
        return self.process.poll() is None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stopped, with nothing of it under way any more."""
        pid = self.process.pid
        os.kill(pid, signal.SIGSTOP)
        try:
            tasks = Path(f"/proc/{pid}/task")
            until(
                lambda: all(
                    (task / "stat").read_text().rpartition(")")[2].split()[0] == "T"
                    for task in tasks.iterdir()
                )
            )
            time.sleep(0.3)  # what it had submitted is answered without it
            assert self.running, "fio ended before it was paused"
            yield
        finally:
            os.kill(pid, signal.SIGCONT)

    def end(self, seconds: float = 90) -> dict[str, Any]:
        """Wait for the end; the first job's results, "error" and "complaints" included."""
        try:
            self.process.wait(seconds)
        finally:
            self.kill()
        text = self._output.read_text() if self._output.exists() else ""
        start = text.find("{")
        jobs = json.loads(text[start:])["jobs"] if start >= 0 else [{"error": -1}]
        complaints = self._errors.read_text(errors="replace") + text[: max(start, 0)]
        result: dict[str, Any] = jobs[0] | {
            "exit": self.process.returncode,
            "complaints": complaints,
        }
        return result

    def kill(self) -> None:
        """End it at once."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(30)


def fio_must_succeed(result: dict[str, Any], verified_at_least: int) -> int:
    """Nothing failed and at least so many bytes were verified. Returns how many were."""
    assert result["error"] == 0, result["complaints"]
    assert result["exit"] == 0, result["complaints"]
    # Said of every direct=1; a FUSE file takes any size.
    complaints = result["complaints"].replace("fio: bs_unaligned may not work with raw io\n", "")
    assert complaints == "", complaints
    verified = int(result["read"]["io_bytes"])
    assert verified >= verified_at_least, f"verified only {verified} bytes"
    return verified


def report(record: Callable[[str, object], None], name: str, value: object) -> None:
    """Note a measured figure: in the JUnit report, and on stdout (pytest -rP shows it)."""
    record(name, value)
    print(f"{name}: {value}")
