"""scripts/bench: what it measures is what it says, on every system that is here; nothing is left.

The runs are tiny. No test looks at how fast anything was.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from benchmark import cells, figures, fio, machine, measure, run
from benchmark.__main__ import SYSTEMS
from benchmark.cells import KIB, MIB, NAMED, QUICK, REGION, Cell
from benchmark.machine import BenchError
from benchmark.systems import Served, System
from house import ROOT, loop_devices, mounts

from vsnapfs.config import load

BY_NAME = {system.name: system for system in SYSTEMS}
TINY = (
    Cell("copied", "randwrite", 4 * KIB, 1, warm=True, span=2 * MIB, seconds=0.3),
    Cell("copied", "randwrite", 4 * KIB, 1, warm=True, span=2 * MIB, seconds=0.3, sync=True),
    Cell("first", "randwrite", 16 * KIB, 8, warm=False, span=4 * MIB),
    Cell("first", "write", MIB, 4, warm=False, span=4 * MIB),
    Cell("once", "randwrite", 4 * KIB, 8, warm=False, span=MIB),
    Cell("point", "randread", 4 * KIB, 8, warm=True, span=4 * MIB),
    Cell("point100", "read", MIB, 4, warm=False, span=16 * MIB),
    Cell("cached", "read", MIB, 1, warm=True, span=4 * MIB, seconds=0.3),
)
TINY_EXT4 = Cell("ext4", "randrw", 16 * KIB, 8, warm=False, span=16 * MIB)
#: Systems that are another one's with one option changed.
VARIANTS = {"vsnapfs-64k", "vsnapfs-process", "qemu-16k"}


def silent(what: str, done: int, total: int) -> None:
    pass


def row(cell: str, system: str, number: int, rate: float, **more: Any) -> dict[str, Any]:
    return {
        "cell": cell,
        "system": system,
        "round": number,
        "iops": rate / 4096,
        "bytes_per_second": rate,
        "p50_us": 10.0,
        "p99_us": 20.0,
        "bytes_moved": 1 << 20,
        "seconds": 1.0,
        "covered": 1.0,
        "cpu_seconds_per_gib": 2.0,
        "peak_bytes": 30 << 20,
        "caches": "all",
    } | more


def failed(cell: str, system: str, number: int, why: str) -> dict[str, Any]:
    return {"cell": cell, "system": system, "round": number, "error": why}


# --- the lists ---------------------------------------------------------------------------------


def test_the_named_cells_are_at_most_24_and_cover_every_aim() -> None:
    """Each aim names cells of the ordinary run and systems that exist; names are unique."""
    names = [cell.name for cell in NAMED]
    assert len(names) == len(set(names)) <= 24
    assert {cell for aim in figures.AIMS for cell in aim.cells} <= set(names)
    assert {name for aim in figures.AIMS for name in (aim.system, aim.against)} <= set(BY_NAME)
    assert {cell.name for cell in QUICK} <= set(names)
    every = [cell.name for cell in cells.full_cross()]
    assert len(every) == len(set(every))
    assert set(names) < set(every)


def test_the_short_list_touches_every_row_of_the_aims() -> None:
    """--quick has at least one cell for each row of the table."""
    quick = {cell.name for cell in QUICK}
    assert [aim.row for aim in figures.AIMS if not quick & set(aim.cells)] == []


@pytest.mark.parametrize("block", [4 * KIB, 16 * KIB])
def test_scattered_requests_meet_each_region_once(block: int) -> None:
    """A first-touch pass has one aligned write in each 64 KiB, in an order the seed decides."""
    cell = Cell("first", "randwrite", block, 1, warm=False, span=8 * MIB)
    found = re.findall(r"^it write (\d+) (\d+)$", fio.scattered_requests(cell, 1), re.MULTILINE)
    offsets = [int(offset) for offset, _ in found]
    assert {int(length) for _, length in found} == {block}
    assert all(offset % block == 0 for offset in offsets)
    assert sorted(offset // REGION for offset in offsets) == list(range(8 * MIB // REGION))
    assert len(offsets) == cell.requests
    assert offsets != sorted(offsets)
    assert fio.scattered_requests(cell, 1) != fio.scattered_requests(cell, 2)


# --- the figures -------------------------------------------------------------------------------


def test_spread_is_median_least_and_greatest_of_what_is_there() -> None:
    """Failed rounds (None) count neither in the median nor in the number."""
    assert figures.spread([3.0, None, 1.0, 2.0]) == figures.Spread(2.0, 1.0, 3.0, 3)
    assert figures.spread([4.0, 1.0]) == figures.Spread(2.5, 1.0, 4.0, 2)
    assert figures.spread([None]) is None


def test_a_ratio_is_formed_within_each_round() -> None:
    """A machine that halves its speed after one round changes no ratio; a lone half counts not."""
    rows = [row("c", "a", 0, 200.0), row("c", "b", 0, 100.0)]
    rows += [row("c", "a", 1, 100.0), row("c", "b", 1, 50.0)]
    rows += [row("c", "a", 2, 90.0), failed("c", "b", 2, "gone")]
    rows += [row("c", "a", 3, 60.0), row("c", "b", 3, 20.0)]
    found = figures.Figures(rows)
    assert found.ratio("c", "a", "b") == figures.Spread(2.0, 2.0, 3.0, 3)
    assert found.ratio("c", "a", "b", share=0.5) == figures.Spread(4.0, 4.0, 6.0, 3)
    assert found.ratio("c", "a", "nobody") is None
    assert found.errors("c", "b") == ["gone"]


def test_an_aim_is_reached_by_its_median() -> None:
    """The verdict is the median's; what could not be measured is neither reached nor missed."""
    cell = "cached-read-1m-qd1"
    rows = [row(cell, "vsnapfs", number, rate) for number, rate in enumerate((95, 80, 90))]
    rows += [row(cell, "raw", number, 100.0) for number in range(3)]
    asked = ["vsnapfs", "raw"]
    (item,) = figures.reached(figures.Figures(rows), [cell], asked)
    assert (item.aim.least, item.verdict) == (0.9, "reached")
    (item,) = figures.reached(figures.Figures([*rows, row(cell, "raw", 2, 101.0)]), [cell], asked)
    assert item.verdict == "missed"
    (item,) = figures.reached(figures.Figures([]), [cell], asked)
    assert item.verdict == "not measured"
    assert figures.reached(figures.Figures(rows), [cell], ["vsnapfs"]) == []


def test_fio_is_read_by_its_requests() -> None:
    """Rates come from requests and time, so the last ones of a replayed log are not lost."""
    cell = Cell("first", "randwrite", 4 * KIB, 1, warm=False, span=64 * MIB)
    job = {
        "mixed": {
            "runtime": 500,
            "total_ios": 512,
            "io_bytes": 1,
            "lat_ns": {"percentile": {"50.000000": 2000, "99.000000": 9000}},
        }
    }
    found = fio.parse(job, cell)
    assert (found.iops, found.bytes_per_second) == (1024, 1024 * 4096)
    assert (found.p50_us, found.p99_us, found.covered) == (2.0, 9.0, 0.5)
    assert fio.parse(job, replace(cell, seconds=3.0)).covered == 1.0
    with pytest.raises(BenchError, match="did nothing"):
        fio.parse({"mixed": job["mixed"] | {"total_ios": 0}}, cell)


# --- what people read --------------------------------------------------------------------------


def some_data() -> dict[str, Any]:
    names = ["copied-randwrite-4k-qd1-warm", "first-write-1m-qd4-cold"]
    rows = []
    for number in range(3):
        rows += [
            row(names[0], "vsnapfs", number, 4096e3 * (20 + number)),
            row(names[0], "passthrough", number, 4096e3 * 10),
            row(names[1], "vsnapfs", number, 300.0 * MIB, covered=0.5),
            row(names[1], "disk", number, 1000.0 * MIB, cpu_seconds_per_gib=None, peak_bytes=None),
            failed(names[1], "passthrough", number, "it broke"),
        ]
    return {
        "environment": {
            "when": "2026-01-02T03:04:05+00:00",
            "commit": "abc",
            "kernel": "6.1",
            "processors": 2,
            "processor": "a processor",
            "memory_bytes": 8 << 30,
            "file_system": "ext4 (rw)",
            "load": 0.1,
            "python": "3.11",
            "modules": {"pyfuse3": "3.4"},
            "programs": {"fio": "fio-3.33"},
        },
        "cells": {name: {} for name in names},
        "systems": {name: BY_NAME[name].says for name in ("vsnapfs", "qemu", "passthrough")}
        | {"disk": "the ceiling"},
        "rounds": 3,
        "rounds_wanted": 5,
        "seconds": 120.0,
        "missing": {"qemu": "not installed: qemu-img"},
        "not_for": [],
        "results": rows,
    }


def test_the_report_tells_ratios_failures_and_what_is_missing(tmp_path: Path) -> None:
    """Nothing is hidden: missing peers, failed cells and runs that were stopped are marked."""
    pytest.importorskip("matplotlib")
    from benchmark import report

    data = some_data()
    report.write(data, tmp_path)
    assert json.loads((tmp_path / "results.json").read_text()) == data
    text = (tmp_path / "results.md").read_text()
    assert "| vsnapfs | passthrough | ≥ 1 | **2.10** | 2.00–2.20 | reached |" in text
    assert "| vsnapfs | half of disk | ≥ 0.8 | **0.60** | 0.60–0.60 | missed |" in text
    assert "| vsnapfs | qemu | ≥ 1 | – |  | not measured |" in text
    assert "qemu is missing: not installed: qemu-img" in text
    assert "first-write-1m-qd4-cold on passthrough: it broke" in text
    assert "| `copied-randwrite-4k-qd1-warm` | 21.0 (20.0–22.0) | 10.0 (10.0–10.0) | – |" in text
    assert "| `first-write-1m-qd4-cold` | 300 (300–300)† | ✗ | 1000 (1000–1000) |" in text
    assert "3 rounds of 5, for which the time did not suffice" in text
    drawn = set(re.findall(r"\]\((.*?\.svg)\)", text))
    assert drawn == {path.name for path in tmp_path.glob("*.svg")}
    assert "rates-first.svg" in drawn


def test_plots_are_the_same_for_the_same_figures(tmp_path: Path) -> None:
    """The SVG files are well-formed, name the systems as text, and are equal byte for byte."""
    pytest.importorskip("matplotlib")
    from xml.etree import ElementTree as ET

    from benchmark import report

    for name in ("one", "two"):
        report.write(some_data(), tmp_path / name)
    drawn = sorted(path.name for path in (tmp_path / "one").glob("*.svg"))
    assert drawn
    for name in drawn:
        content = (tmp_path / "one" / name).read_bytes()
        assert content == (tmp_path / "two" / name).read_bytes()
        assert ET.fromstring(content).tag.endswith("svg")
        assert b"vsnapfs" in content


# --- measuring ---------------------------------------------------------------------------------


def carried_out(
    work: Path, cells: list[Cell], systems: list[System], rounds: int = 1
) -> dict[str, Any]:
    return run.carry_out(run.Plan(cells, systems, rounds, 10), work, silent)


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A run's directory. The rest of the machine keeps its page cache."""
    monkeypatch.setattr(machine, "may_drop_all", lambda: False)
    with machine.work_directory(tmp_path) as directory:
        yield directory
    assert not directory.exists()


@pytest.mark.needs_fuse
@pytest.mark.needs_fio
@pytest.mark.slow
@pytest.mark.parametrize("name", list(BY_NAME))
def test_every_kind_of_cell_can_be_measured(name: str, work: Path) -> None:
    """Each state of a volume on each system: a rate, latencies in order, the server's cost."""
    system = BY_NAME[name]
    if (why := system.missing()) is not None:
        pytest.skip(f"{name}: {why}")
    wanted = [*TINY, *([TINY_EXT4] if os.geteuid() == 0 else [])]
    if name in VARIANTS:
        wanted = [cell for cell in wanted if cell.state in {"first", "point"}]
    outcome = carried_out(work, wanted, [system])
    skipped = {entry["cell"] for entry in outcome["not_for"]}
    assert [row["cell"] for row in outcome["results"]] == [
        cell.name for cell in wanted if cell.name not in skipped
    ]
    spans = {cell.name: cell for cell in wanted}
    for row in outcome["results"]:
        assert "error" not in row, row
        assert row["iops"] > 0
        assert 0 <= row["p50_us"] <= row["p99_us"]
        cell = spans[row["cell"]]
        if cell.seconds is None:
            assert (row["covered"], row["bytes_moved"]) == (1.0, cell.requests * cell.block)
        if name in {"raw", "disk"}:
            assert row["cpu_seconds_per_gib"] is row["peak_bytes"] is None
        else:
            assert row["cpu_seconds_per_gib"] >= 0
            assert row["peak_bytes"] > MIB


@pytest.mark.needs_fio
def test_systems_alternate_and_what_fails_is_told(work: Path) -> None:
    """Each round begins with another system; a broken or missing one costs only its own rows."""

    @contextmanager
    def broken(image: Path, place: Path) -> Iterator[Served]:
        words = ("sh", "-c", "echo no such luck; exit 3")
        with machine.started(place, *words) as process, machine.mounted(process, place / "mnt"):
            yield Served(image)

    systems = [
        BY_NAME["raw"],
        System("broken", "", broken),
        System("absent", "", broken, missing=lambda: "not installed: it"),
        System("unfit", "", broken, not_for=lambda cell: "makes no sense"),
    ]
    cell = Cell("once", "write", 64 * KIB, 1, warm=False, span=MIB)
    outcome = carried_out(work, [cell], systems, rounds=2)
    told = [(row["round"], row["system"], row.get("error")) for row in outcome["results"]]
    error = "the server ended with 3: no such luck"
    assert told == [(0, "raw", None), (0, "broken", error), (1, "broken", error), (1, "raw", None)]
    assert outcome["missing"] == {"absent": "not installed: it"}
    assert [entry["system"] for entry in outcome["not_for"]] == ["unfit"]
    assert [path.name for path in work.iterdir() if path.is_dir()] == ["images"]


@pytest.mark.needs_fio
def test_a_point_with_other_content_is_no_result(work: Path) -> None:
    """Whoever does not keep the recovery point is not measured: the live file is no point."""

    @contextmanager
    def forgetful(image: Path, _work: Path) -> Iterator[Served]:
        yield Served(image, point=image)

    system = System("forgetful", "", forgetful)
    cell = Cell("once", "write", 64 * KIB, 1, warm=False, span=MIB)
    images = measure.Images(work / "images")
    place = work / "place"
    place.mkdir()
    with pytest.raises(BenchError, match="recovery point has other content than before, at 0"):
        measure.measure(cell, system, images, place, 1)


def test_no_round_is_begun_that_would_end_too_late(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first round is always whole; the time it took decides about the next."""
    now = [0.0]
    monkeypatch.setattr(run.time, "monotonic", lambda: now[0])

    def one(cell: Cell, system: System, *_rest: object) -> dict[str, Any]:
        now[0] += 60
        return row(cell.name, system.name, 0, 1.0)

    monkeypatch.setattr(run, "_one", one)
    plan = run.Plan(TINY[:2], [BY_NAME["raw"], BY_NAME["passthrough"]], 5, 12.5)
    outcome = run.carry_out(plan, work, silent)
    assert (outcome["rounds"], outcome["rounds_wanted"], len(outcome["results"])) == (3, 5, 12)


# --- the command -------------------------------------------------------------------------------


def command(*words: str | Path) -> list[str]:
    return [sys.executable, "-m", "benchmark", *map(str, words)]


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": f"{ROOT / 'scripts'}:{ROOT}"}


def test_the_command_lists_and_refuses() -> None:
    """--list names cells and systems; a name that does not exist is an error that says so."""

    def asked(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command(*words), env=environment(), capture_output=True, text=True, check=False
        )

    listed = asked("--list").stdout
    assert all(re.search(rf"^{re.escape(cell.name)} ", listed, re.MULTILINE) for cell in NAMED)
    assert all(re.search(rf"^{name} ", listed, re.MULTILINE) for name in BY_NAME)
    refused = asked("--cells", "nonsense")
    assert (refused.returncode, "no cell is called 'nonsense'" in refused.stderr) == (2, True)
    refused = asked("--systems", "raw,nonsense")
    assert (refused.returncode, "no system is called 'nonsense'" in refused.stderr) == (2, True)


@pytest.mark.needs_fio
@pytest.mark.needs_fuse
@pytest.mark.slow
def test_a_small_run_from_start_to_end(tmp_path: Path) -> None:
    """The command measures, prints the ratio, writes all files and removes what it made."""
    pytest.importorskip("matplotlib")
    place, output = tmp_path / "place", tmp_path / "output"
    place.mkdir()
    done = subprocess.run(
        command(
            *("--quick", "--cells", "first-randwrite-16k", "--systems", "vsnapfs,raw,disk"),
            *("--rounds", "1", "--directory", place, "--output", output),
        ),
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr + done.stdout
    assert list(place.iterdir()) == []
    data = json.loads((output / "results.json").read_text())
    assert Counter(row["system"] for row in data["results"]) == {"vsnapfs": 1, "raw": 1, "disk": 1}
    assert (output / "results.md").stat().st_size > 1000
    assert "0 of 3; round 1: first-randwrite-16k-qd32-cold on vsnapfs" in done.stderr


@contextmanager
def running(place: Path) -> Iterator[subprocess.Popen[str]]:
    """A run that is at an ext4 on a loop device on a file of vsnapfs, and stands still there."""
    words = ("--quick", "--rounds", "9", "--cells", "ext4", "--systems", "vsnapfs")
    process = subprocess.Popen(
        command(*words, "--directory", place),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        stands_still = False
        while not stands_still:  # or it was through with it just then
            process.send_signal(signal.SIGCONT)
            assert machine.wait_for(lambda: len(mounted_below(place)) == 2, 60)
            time.sleep(0.3)  # somewhere in the middle
            process.send_signal(signal.SIGSTOP)
            assert machine.wait_for(lambda: state_of(process.pid) == "T", 60)
            stands_still = len(mounted_below(place)) == 2 and bool(loops_below(place))
        yield process
    finally:
        process.kill()
        process.communicate()


def mounted_below(place: Path) -> list[str]:
    return [where for where, _, _ in mounts().values() if where.startswith(f"{place}/")]


def rings_of(ids: list[str]) -> list[Path]:
    """The write buffers in shared memory of the volumes with these ids."""
    return [ring for each in ids for ring in Path("/dev/shm").glob(f"vsnapfs-{each}-*")]


def loops_below(place: Path) -> dict[str, str]:
    """Loop device → its file, as it is called while its mount is there and once it is detached."""
    return {device: file for device, file in loop_devices().items() if str(place) in file}


def is_attached(loops: dict[str, str]) -> bool:
    now = loop_devices()
    return any(now.get(device) in {file, "/replica.img"} for device, file in loops.items())


def servers_of(process: subprocess.Popen[str]) -> list[int]:
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    return [int(pid) for pid in children.split()]


def state_of(pid: int) -> str:
    """As ps shows it; Z if the process is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


def is_running(pid: int) -> bool:
    return state_of(pid) != "Z"


@pytest.mark.needs_fio
@pytest.mark.needs_fuse
@pytest.mark.needs_loop
@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_leaves_nothing_behind(tmp_path: Path, how: signal.Signals) -> None:
    """Ctrl-C in the middle, with an ext4 on a loop device on a FUSE file: all of it is undone."""
    with running(tmp_path) as process:
        servers, loops = servers_of(process), loops_below(tmp_path)
        process.send_signal(how)
        process.send_signal(signal.SIGCONT)
        said, _ = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "Interrupted" in said
    assert servers
    assert not any(map(is_running, servers))
    assert mounted_below(tmp_path) == []
    assert not is_attached(loops)
    assert sorted(tmp_path.rglob("*")) == []


@pytest.mark.needs_fio
@pytest.mark.needs_fuse
@pytest.mark.needs_loop
@pytest.mark.slow
def test_the_next_run_removes_what_a_killed_one_has_left(tmp_path: Path) -> None:
    """SIGKILL leaves mounts, a loop device, processes, memory; a run that lives is not touched."""
    with running(tmp_path) as process:
        assert machine.remove_stale(tmp_path) == []
        assert mounted_below(tmp_path)
        servers, loops = servers_of(process), loops_below(tmp_path)
        ids = [load(config.parent).volume_id for config in tmp_path.rglob("volume.toml")]
        process.kill()
        process.wait()
    assert mounted_below(tmp_path)
    assert rings_of(ids)
    (left,) = tmp_path.iterdir()
    assert machine.remove_stale(tmp_path) == [left]
    assert rings_of(ids) == []
    assert machine.wait_for(lambda: not any(map(is_running, servers)), 60)
    assert mounted_below(tmp_path) == []
    assert not is_attached(loops)
    assert list(tmp_path.rglob("*")) == []
