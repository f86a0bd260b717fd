"""The command line of `scripts/bench-growth`: options, progress, files. See there."""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from vsnapfs.backing import file_system_type

from .plan import FULL, QUICK, TINY, Measurement, Step
from .report import Record, charts, markdown

_DOCS = Path(__file__).resolve().parent.parent.parent / "docs" / "performance"
_EXTENTS = {"full": FULL, "quick": QUICK, "tiny": TINY}


def main() -> int:
    """Measure, then write growth.json, growth.md and growth-*.svg. The exit code."""
    parser = argparse.ArgumentParser(
        prog="scripts/bench-growth", description="How the cost of a volume grows, measured."
    )
    extent = parser.add_mutually_exclusive_group()
    extent.add_argument(
        "--quick", dest="extent", action="store_const", const="quick", help="a couple of minutes"
    )
    extent.add_argument(
        "--tiny", dest="extent", action="store_const", const="tiny", help=argparse.SUPPRESS
    )
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("/var/tmp"),  # noqa: S108 - on a disk, and mkdtemp is safe there
        help="where the volumes are made, on a real disk with 1 GiB free (default: /var/tmp)",
    )
    parser.add_argument(
        "--output", type=Path, default=_DOCS, help="where the results go (default: %(default)s)"
    )
    parser.add_argument(
        "--report-only", action="store_true", help="write growth.md and the charts anew"
    )
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    file = options.output / "growth.json"
    if options.report_only:
        record = json.loads(file.read_text())
    else:
        record = _measure(options.work, options.extent or "full")
        file.write_text(json.dumps(record, indent=1) + "\n")
    drawn = charts(record)
    for name, drawing in drawn.items():
        (options.output / name).write_text(drawing)
    page = options.output / "growth.md"
    page.write_text(markdown(record, drawn))
    sys.stdout.write(f"{page}\n")
    return 0


def _measure(work: Path, extent: str) -> Record:
    directory = Path(tempfile.mkdtemp(prefix="vsnapfs-growth-", dir=work))
    before = os.getloadavg()[0]
    try:
        machine = _machine(directory) | {"extent": f"`{extent}`"}
        measurement = Measurement(directory, _EXTENTS[extent])
        _run(measurement.steps())
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    machine |= {"load_before": f"{before:.1f}", "load_after": f"{os.getloadavg()[0]:.1f}"}
    return {"machine": machine, **measurement.record, "left_out": measurement.left_out}


def _run(steps: list[Step]) -> None:
    """All steps, each announced with the time that is still to go, guessed from those done."""
    started, done, total = time.monotonic(), 0.0, sum(step.weight for step in steps)
    for number, step in enumerate(steps, 1):
        passed = time.monotonic() - started
        left = (total - done) * (passed / done if done else 1.0)
        sys.stderr.write(
            f"[{number:2}/{len(steps)}] {step.what} "
            f"({passed / 60:.1f} min, about {left / 60:.1f} to go)\n"
        )
        step.work()
        done += step.weight
    sys.stderr.write(f"done in {(time.monotonic() - started) / 60:.1f} min\n")


def _machine(directory: Path) -> dict[str, object]:
    model = "unknown"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
            break
    return {
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "cpus": os.cpu_count(),
        "model": model,
        "kernel": platform.release(),
        "file_system": file_system_type(directory),
        "python": platform.python_version(),
        "numpy": np.__version__,
    }


if __name__ == "__main__":
    raise SystemExit(main())
