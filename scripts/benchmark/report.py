"""What people read of a run: results.json, results.md with all tables, the plots, the terminal."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmark.figures import Figures, Reached, Spread, reached

MIB = 1 << 20
LIMITS = """\
* **Only the ratios carry over to another machine**, and they less than one would like: a faster
  disk favours who waits for it, more processors favour who has threads. fio, the kernel and the
  server shared the same processors here.
* **The systems promise different things.** vsnapfs by default overwrites a block only after its
  copy is durable; QEMU's filter and `--durability process` hand both to the page cache, and a power
  failure can cost the recovery point. nbdkit's cow filter keeps nothing at all: its overlay is gone
  with the process. vsnapfs also checks and writes a checksum for every block it preserves; no other
  system here does.
* **QEMU was not made for this.** Its FUSE export is one thread and a convenience; inside a virtual
  machine the same filter has no FUSE in the way.
* **The unit of copying decides.** QEMU copies 64 KiB at a time whatever the cluster size of its
  target, nbdkit too, vsnapfs 16 KiB. In the `first` cells each write meets a place that nobody has
  copied yet, which suits small units; in the `once` cells, which go over the whole image in small
  pieces, most find that a neighbour has had their place copied: three of four for 4 KiB on vsnapfs,
  fifteen of sixteen on QEMU. Real writers are between the two.
* **Minutes are not days.** Images are 64 to 512 MiB and fit into memory, the diff area is new,
  nothing is fragmented. Cold means that the page cache was dropped, not that the disk's own was.
* **A rate without a sync is a promise.** `raw` shows how fast memory is. Only the cells with
  `fsync` and the sequential writes end with everything on the disk; the `disk` column does so in
  every write cell.
* **fio at depth 1 measures latency**, its own and the kernel's included; at depth 32 it measures
  throughput with all requests ready to be had. Applications do neither.
* **CPU seconds are the server's own processes'** (user and system, in steps of 10 ms), not fio's
  and not those of the kernel's writeback."""


def write(data: dict[str, Any], directory: Path) -> None:
    """results.json, results.md and the plots, in this directory."""
    from benchmark import plots  # noqa: PLC0415 - slow to import; only needed here

    directory.mkdir(parents=True, exist_ok=True)
    figures = Figures(data["results"])
    found = reached(figures, data["cells"], data["systems"])
    drawn = plots.draw(data, figures, found, directory)
    (directory / "results.json").write_text(json.dumps(data, indent=1) + "\n")
    (directory / "results.md").write_text(markdown(data, figures, found, drawn))


def show(data: dict[str, Any], console: Console) -> None:
    """The ratios on the terminal, and what failed."""
    figures = Figures(data["results"])
    table = Table(box=None)
    for heading in ("cell", "system", "against", "aim", "ratio", "min–max", ""):
        table.add_column(heading, no_wrap=True)
    for item in reached(figures, data["cells"], data["systems"]):
        aim, ratio = item.aim, item.ratio
        table.add_row(
            item.cell,
            aim.system,
            aim.against_what,
            f"≥ {aim.least:g}",
            f"{ratio.median:.2f}" if ratio else "–",
            f"{ratio.least:.2f}–{ratio.greatest:.2f}" if ratio else "",
            item.verdict,
        )
    console.print(table)
    console.print(f"{data['rounds']} rounds in {data['seconds'] / 60:.1f} minutes", highlight=False)
    for line in _failures(data, figures):
        console.print(line, highlight=False, markup=False)


def markdown(
    data: dict[str, Any], figures: Figures, found: Sequence[Reached], plots: Sequence[str]
) -> str:
    """results.md."""
    parts = ["# Measured\n", _intro(data), "## Against the aims\n", _aims(found)]
    parts.append(_plot("aims", plots))
    parts += ["## What these numbers do not mean\n", LIMITS + "\n", "## The systems\n"]
    parts += [
        "\n".join(
            f"* **{name}**: {says}"
            + (f" – *missing: {data['missing'][name]}*" if name in data["missing"] else "")
            for name, says in data["systems"].items()
        )
        + "\n"
    ]
    failures = _failures(data, figures)
    if failures:
        parts += ["## What failed\n", "\n".join(f"* {line}" for line in failures) + "\n"]
    systems = [name for name in data["systems"] if name not in data["missing"]]
    parts += ["## Rates\n", _RATES, _rates(data, figures, systems), _plot("rates", plots)]
    parts += ["## Latency\n", _LATENCIES, _latencies(data, figures, systems)]
    parts += [_plot("latency", plots), "## Cost\n", _COSTS, _costs(data, figures, systems)]
    parts += [_plot("cost", plots)]
    return "\n".join(part for part in parts if part)


_RATES = """\
Median (least–greatest) over the rounds. Random access in thousands of requests a second, sequential
(`read`, `write`) in MiB/s. † stopped after 30 s before each block had its turn; – means nothing
there; ✗ failed. `disk` is the ceiling: the same pattern with O_DIRECT on the plain file, in write
cells with a final sync within its time.
"""
_LATENCIES = "Medians over the rounds of p50 / p99, in µs, submission included.\n"
_COSTS = "CPU seconds of the server per GiB moved · its peak memory in MiB. Medians.\n"


def _intro(data: dict[str, Any]) -> str:
    facts = data["environment"]
    caches = {row["caches"] for row in data["results"] if "caches" in row}
    dropped = (
        "the page cache of the whole machine"
        if caches <= {"all"}
        else "only the images' own pages (not root)"
    )
    programs = ", ".join(
        f"{name} {text.removeprefix(name).strip()}" for name, text in facts["programs"].items()
    )
    modules = ", ".join(f"{name} {text}" for name, text in facts["modules"].items())
    wanted = data["rounds_wanted"]
    fewer = f" of {wanted}, for which the time did not suffice" if data["rounds"] < wanted else ""
    return f"""\
Made by `scripts/bench{" --quick" if data.get("quick") else ""}`; do not edit.
[results.json](results.json) has every single measurement.
{data["rounds"]} rounds{fewer}, {data["seconds"] / 60:.0f} minutes, {facts["when"][:10]},
vsnapfs {facts["commit"]}.

All systems serve the same image files on the same file system, one after the other within each
cell, each round beginning with another one. Before each measurement {dropped}
was dropped; a *warm* cell then read its span once with its own block size. Ratios are formed within
a round, and their median is told. After each measurement the recovery point was compared with
samples of what it has to contain.

* {facts["processors"]} × {facts["processor"]}, {facts["memory_bytes"] / (1 << 30):.0f} GiB,
  Linux {facts["kernel"]}
* images on {facts["file_system"]}; load {facts["load"]} at the start
* Python {facts["python"]}, {modules}
* {programs}
"""


def _aims(found: Sequence[Reached]) -> str:
    lines = ["| | cell | system | against | aim | ratio | min–max | |", "|" + "---|" * 8]
    row = None
    for item in found:
        aim, ratio = item.aim, item.ratio
        shown = f"**{ratio.median:.2f}**" if ratio else "–"
        between = f"{ratio.least:.2f}–{ratio.greatest:.2f}" if ratio else ""
        lines.append(
            f"| {aim.row if aim.row != row else ''} | `{item.cell}` | {aim.system} | "
            f"{aim.against_what} | ≥ {aim.least:g} | {shown} | {between} | {item.verdict} |"
        )
        row = aim.row
    return "\n".join(lines) + "\n"


def _plot(prefix: str, plots: Sequence[str]) -> str:
    return "\n".join(f"![{name[:-4]}]({name})\n" for name in plots if name.startswith(prefix))


def _table(data: dict[str, Any], systems: Sequence[str], text: Any, *, corner: str = "cell") -> str:
    lines = [f"| {corner} | {' | '.join(systems)} |", "|---|" + "---:|" * len(systems)]
    lines += [
        f"| `{cell}` | {' | '.join(text(cell, system) for system in systems)} |"
        for cell in data["cells"]
    ]
    return "\n".join(lines) + "\n"


def is_sequential(cell: str) -> bool:
    """Whether MiB/s is the unit to tell (by the cell's name)."""
    return cell.split("-")[1] in {"read", "write"}


def _rates(data: dict[str, Any], figures: Figures, systems: Sequence[str]) -> str:
    def text(cell: str, system: str) -> str:
        if is_sequential(cell):
            found = figures.of(cell, system, "bytes_per_second")
            unit, digits = MIB, 0
        else:
            found = figures.of(cell, system, "iops")
            unit, digits = 1000, 1
        if found is None:
            return "✗" if figures.errors(cell, system) else "–"
        mark = "†" if figures.stopped_early(cell, system) else ""
        failed = " ✗" if figures.errors(cell, system) else ""
        return f"{_in_unit(found, unit, digits)}{mark}{failed}"

    return _table(data, systems, text)


def _in_unit(value: Spread, unit: float, digits: int) -> str:
    median, least, greatest = (
        f"{number / unit:.{digits}f}" for number in (value.median, value.least, value.greatest)
    )
    return median if value.count == 1 else f"{median} ({least}–{greatest})"


def _latencies(data: dict[str, Any], figures: Figures, systems: Sequence[str]) -> str:
    def text(cell: str, system: str) -> str:
        half, most = figures.of(cell, system, "p50_us"), figures.of(cell, system, "p99_us")
        return f"{half.median:.0f} / {most.median:.0f}" if half and most else "–"

    return _table(data, systems, text)


def _costs(data: dict[str, Any], figures: Figures, systems: Sequence[str]) -> str:
    def text(cell: str, system: str) -> str:
        time = figures.of(cell, system, "cpu_seconds_per_gib")
        peak = figures.of(cell, system, "peak_bytes")
        return f"{time.median:.1f} · {peak.median / MIB:.0f}" if time and peak else "–"

    return _table(data, [name for name in systems if name not in {"raw", "disk"}], text)


def _failures(data: dict[str, Any], figures: Figures) -> list[str]:
    """A line for each system that is missing and each cell that failed on a system."""
    missing = [f"{name} is missing: {why}" for name, why in data["missing"].items()]
    return missing + [
        f"{cell} on {system}: {error}"
        for cell in data["cells"]
        for system in data["systems"]
        for error in figures.errors(cell, system)
    ]
