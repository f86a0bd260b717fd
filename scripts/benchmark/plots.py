"""The SVG files: aims reached, rates, latencies, cost.

Promises the same bytes for the same figures (no dates, no random ids), so that a run whose figures
did not change does not change the repository.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from benchmark.figures import Figures, Reached, Spread

MIB = 1 << 20
COLOURS = {
    "vsnapfs": "#0b5fa5",
    "vsnapfs-process": "#4d97d1",
    "vsnapfs-64k": "#9cc7ea",
    "qemu": "#c8501e",
    "qemu-16k": "#e9a178",
    "nbdkit": "#8d6cab",
    "passthrough": "#3d8b57",
    "raw": "#9a9a9a",
    "disk": "#4f4f4f",
}
_STYLE: dict[Any, Any] = {
    "svg.hashsalt": "vsnapfs",
    "svg.fonttype": "none",  # text stays text
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
_COLUMNS = 3


def draw(
    data: dict[str, Any], figures: Figures, found: Sequence[Reached], directory: Path
) -> list[str]:
    """Draw all; the names of the files, in the order of reading."""
    systems = [name for name in data["systems"] if name not in data["missing"]]
    states: dict[str, list[str]] = {}
    for cell in data["cells"]:
        states.setdefault(cell.split("-")[0], []).append(cell)
    drawn: dict[str, Figure] = {}
    with plt.rc_context(_STYLE):
        if any(item.ratio for item in found):
            drawn["aims.svg"] = _aims([item for item in found if item.ratio])
        for kind, one in (("rates", _rates), ("latency", _latency), ("cost", _cost)):
            for state, cells in states.items():
                figure = _small_multiples(cells, figures, systems, one)
                if figure is not None:
                    drawn[f"{kind}-{state}.svg"] = figure
        for name, figure in drawn.items():
            figure.savefig(directory / name, format="svg", metadata={"Date": None})
            plt.close(figure)
    return list(drawn)


def _aims(found: Sequence[Reached]) -> Figure:
    """Ratio over aim on a logarithmic scale; right of the line is reached."""
    figure, axes = plt.subplots(figsize=(9, 0.6 + 0.26 * len(found)), layout="constrained")
    for height, item in enumerate(reversed(found)):
        ratio = item.ratio
        if ratio is None:
            continue
        colour = "#3d8b57" if item.verdict == "reached" else "#c8501e"
        aim = item.aim.least
        axes.plot([ratio.least / aim, ratio.greatest / aim], [height] * 2, color=colour, lw=2)
        axes.plot([ratio.median / aim], [height], "o", color=colour)
    axes.axvline(1, color="#4f4f4f", lw=1)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_yticks(
        range(len(found)),
        [
            f"{item.cell}: {item.aim.system} / {item.aim.against_what} ≥ {item.aim.least:g}"
            for item in reversed(found)
        ],
    )
    axes.set_ylim(-0.7, len(found) - 0.3)
    axes.set_xlabel("ratio ÷ aim (right of the line: reached; line: least to greatest)")
    axes.grid(axis="x", alpha=0.3)
    return figure


One = Callable[[Axes, str, Sequence[str], Figures], bool]


def _small_multiples(
    cells: Sequence[str], figures: Figures, systems: Sequence[str], one: One
) -> Figure | None:
    """One panel a cell. None when no panel has anything to show."""
    rows = -(-len(cells) // _COLUMNS)
    height = 0.7 + 0.2 * len(systems)
    figure, grid = plt.subplots(
        rows, _COLUMNS, figsize=(12, height * rows + 0.3), squeeze=False, layout="constrained"
    )
    shown = 0
    for axes, cell in zip(grid.flat, cells, strict=False):
        shown += one(axes, cell, list(reversed(systems)), figures)
        axes.set_title(cell, loc="left", fontsize=9)
    for axes in list(grid.flat)[len(cells) :]:
        axes.set_visible(False)
    if shown:
        return figure
    plt.close(figure)
    return None


def _bars(axes: Axes, systems: Sequence[str], values: Sequence[Spread | None], unit: float) -> bool:
    for height, (system, value) in enumerate(zip(systems, values, strict=True)):
        if value is None:
            continue
        median = value.median / unit
        axes.barh(height, median, color=COLOURS.get(system, "#777777"))
        axes.plot([value.least / unit, value.greatest / unit], [height] * 2, color="black", lw=1)
        axes.annotate(
            f"{median:.3g}" if median < 1000 else f"{median:.0f}",
            (max(median, value.greatest / unit), height),
            xytext=(3, 0),
            textcoords="offset points",
            va="center",
            fontsize=7,
        )
    axes.set_yticks(range(len(systems)), systems)
    axes.margins(x=0.12)
    return any(values)


def _rates(axes: Axes, cell: str, systems: Sequence[str], figures: Figures) -> bool:
    sequential = cell.split("-")[1] in {"read", "write"}
    key, unit = ("bytes_per_second", MIB) if sequential else ("iops", 1000)
    # The page cache's own speed would leave no room for the others.
    others = [name for name in systems if name != "raw"]
    axes.set_xlabel("MiB/s" if sequential else "thousand requests/s", fontsize=8)
    return _bars(axes, others, [figures.of(cell, name, key) for name in others], unit)


def _latency(axes: Axes, cell: str, systems: Sequence[str], figures: Figures) -> bool:
    """p50 to p99 of each system, logarithmic."""
    shown = False
    for height, system in enumerate(systems):
        half, most = figures.of(cell, system, "p50_us"), figures.of(cell, system, "p99_us")
        if half is None or most is None or half.median <= 0:
            continue
        colour = COLOURS.get(system, "#777777")
        axes.plot([half.median, most.median], [height] * 2, color=colour, lw=2)
        axes.plot([half.median], [height], "o", color=colour)
        axes.plot([most.median], [height], "|", color=colour, markersize=9)
        shown = True
    axes.set_xscale("log")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_yticks(range(len(systems)), systems)
    axes.set_xlabel("µs: p50 (dot) to p99 (bar)", fontsize=8)
    axes.grid(axis="x", alpha=0.3)
    return shown


def _cost(axes: Axes, cell: str, systems: Sequence[str], figures: Figures) -> bool:
    servers = [name for name in systems if name not in {"raw", "disk"}]
    axes.set_xlabel("CPU seconds of the server per GiB", fontsize=8)
    values = [figures.of(cell, name, "cpu_seconds_per_gib") for name in servers]
    return _bars(axes, servers, values, 1)
