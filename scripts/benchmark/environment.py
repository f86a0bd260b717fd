"""What a result depends on besides the programs measured: machine, kernel, disk, versions."""

from __future__ import annotations

import os
import platform
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmark.machine import BenchError, run
from benchmark.systems import ROOT

_PROGRAMS = {
    "fio": ("fio", "--version"),
    "qemu-storage-daemon": ("qemu-storage-daemon", "--version"),
    "nbdkit": ("nbdkit", "--version"),
    "nbdfuse": ("nbdfuse", "--version"),
    "libfuse": ("fusermount3", "--version"),
}
_MODULES = ("pyfuse3", "trio", "numpy", "xxhash")


def describe(directory: Path) -> dict[str, Any]:
    """Facts for the report, all strings and numbers. Nothing that names the machine or its user."""
    memory = next(
        line for line in Path("/proc/meminfo").read_text().splitlines() if "MemTotal" in line
    )
    return {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _first_line("git", "-C", str(ROOT), "describe", "--always", "--dirty"),
        "kernel": platform.release(),
        "processors": len(os.sched_getaffinity(0)),
        "processor": _processor(),
        "memory_bytes": int(memory.split()[1]) << 10,
        "file_system": _file_system(directory),
        "load": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "modules": {name: _module(name) for name in _MODULES},
        "programs": {name: _first_line(*command) for name, command in _PROGRAMS.items()},
    }


def _first_line(*command: str) -> str:
    try:
        return run(*command).partition("\n")[0].strip()
    except BenchError as error:
        return str(error)


def _module(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _file_system(directory: Path) -> str:
    """Kind and mount options of the file system that holds the images."""
    device = os.stat(directory).st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        left, _, right = line.partition(" - ")
        if left.split()[2] == wanted:
            return f"{right.split()[0]} ({left.split()[5]})"
    return "unknown"
