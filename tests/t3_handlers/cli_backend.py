"""What the tests of the command line share: running it, and a daemon that is played."""

from __future__ import annotations

import errno
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner, Result

from vsnapfs import config, daemon
from vsnapfs.cli.app import app
from vsnapfs.daemon import process
from vsnapfs.errors import FaultCode

MIB = 1 << 20
POINTS = [
    {
        "number": 3,
        "created": "2026-11-22T07:20:00.123456Z",
        "created_ns": 1_795_332_000_123_456_789,
        "label": "before",
    },
    {
        "number": 12,
        "created": "2026-11-22T07:21:00.000000Z",
        "created_ns": 1_795_332_060_000_000_000,
        "label": None,
    },
]


def run(*args: str | Path, typed: str | None = None, env: dict[str, str] | None = None) -> Result:
    """Run one command line; stdout and stderr are kept apart with every version of click."""
    try:
        runner = CliRunner(mix_stderr=False)  # type: ignore[call-arg,unused-ignore]
    except TypeError:
        runner = CliRunner()
    return runner.invoke(app, [str(arg) for arg in args], input=typed, env=env)


def ok(*args: str | Path, **options: Any) -> Result:
    """As run, for a command that must succeed."""
    result = run(*args, **options)
    assert result.exit_code == 0, f"{result.stdout}{result.stderr}{result.exception!r}"
    return result


def refused(result: Result, *words: str, code: int = 1) -> str:
    """Assert the form of a refusal, that it says `words`, and that nothing went to stdout."""
    assert result.exit_code == code, f"{result.stdout}{result.stderr}{result.exception!r}"
    assert result.stderr.startswith("vsnapfs: error: "), result.stderr
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in result.stderr, result.stderr
    assert result.stdout == ""
    return result.stderr


@dataclass
class Backend:
    """The layers below the command line. `answers`: operation → result, exception or function."""

    answers: dict[str, Any] = field(default_factory=dict)
    calls: list[tuple[Path, str, dict[str, Any]]] = field(default_factory=list)
    mounts: list[Any] = field(default_factory=list)
    loops: dict[Path, list[str]] = field(default_factory=dict)
    done: list[Any] = field(default_factory=list)

    def call(
        self, directory: Path, op: str, *, progress: Any = None, say: Any = None, **params: Any
    ) -> Any:
        self.calls.append((directory, op, params))
        answer = self.answers[op]
        if isinstance(answer, BaseException):
            raise answer
        return answer(directory, progress) if callable(answer) else answer

    def mount(self, volume: Path, mountpoint: Path, *, stale: bool = False) -> Any:
        """Pretend that the volume is mounted."""
        mount = SimpleNamespace(volume=volume, mountpoint=mountpoint, stale=stale)
        self.mounts.append(mount)
        return mount

    @property
    def ops(self) -> list[str]:
        return [op for _, op, _ in self.calls]


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Backend:
    """A Backend in the place of vsnapfs.daemon."""
    made = Backend()
    modules = {
        "client": {"call": made.call, "server_pid": lambda _volume: None},
        "mounts": {
            "find_mounts": lambda: list(made.mounts),
            "loop_devices": lambda mountpoint: made.loops.get(mountpoint, []),
            "attach_loop": lambda file: made.done.append(("attach", file)) or "/dev/loop7",
            "detach_loop": lambda device: made.done.append(("detach", device)),
            "unmount": lambda mount, say=None, directory=None: made.done.append(
                ("unmount", mount.mountpoint)
            ),
        },
        "server": {
            "spawn": lambda *a, **k: made.done.append(("spawn", a, k)) or 4711,
            "serve": lambda *a, **k: (made.done.append(("serve", a, k)), k["ready"]()),
        },
    }
    monkeypatch.setattr(process, "log_to_stderr", lambda: None)
    for name, contents in modules.items():
        module = ModuleType(f"vsnapfs.daemon.{name}")
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr(daemon, name, module, raising=False)
    return made


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    """A directory that is a volume as far as the command line can tell."""
    directory = tmp_path / "vol1"
    directory.mkdir()
    config.save(directory, config.VolumeConfig("0" * 32))
    return directory


def status_of(volume: Path, **changes: Any) -> dict[str, Any]:
    return {
        "volume": str(volume),
        "state": "online",
        "mountpoint": None,
        "on_full": "offline",
        "fault": None,
        "consistent": None,
        "pid": None,
        "diff_area": {
            "path": str(volume / "diff-area"),
            "used": 10 * MIB,
            "allocated": 64 * MIB,
            "maximum": 100 * MIB,
        },
        "replica": {"path": str(volume / "replica.img"), "size": 1024 * MIB},
        "recovery_points": 3,
    } | changes


def fault(code: FaultCode = FaultCode.DIFF_AREA_FULL, **changes: Any) -> dict[str, Any]:
    return {
        "code": int(code),
        "name": code.name,
        "event_id": code.event_id,
        "errno": errno.ENOSPC,
        "message": "the diff area has reached its maximum",
        "time": "2026-11-22T07:20:00.000000Z",
        "block": 77,
        "offset": 77 * 16384,
        "length": 4096,
        "used": 100 * MIB,
        "allocated": 100 * MIB,
        "maximum": 100 * MIB,
    } | changes


def write_events(volume: Path, count: int = 1) -> None:
    from vsnapfs.events import EventLog

    log = EventLog(volume / "events.jsonl")
    for number in range(count):
        log.log("vsnapfs", 1010, volume=str(volume), point=number + 1)
    log.log("volsnap", 87, volume=str(volume), used=5, allocated=6, maximum=7)
    log.close()
