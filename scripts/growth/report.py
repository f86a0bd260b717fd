"""From the record of a measurement to docs/performance/growth.md and its charts. Pure functions."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from .charts import Axis, Series, line_chart

Record = dict[str, Any]
_AIM = 6_500_000
_OPEN_AIM, _MEMORY_AIM, _CREATE_AIM = 2.0, 16.0, 10.0
_PRESERVED = Axis("preserved blocks")


def charts(record: Record) -> dict[str, str]:
    """File name → SVG, for what the record holds."""
    found = {}
    rows = record.get("preserved", [])
    if rows:
        hows = ("cold", "warm", "unclean")
        found["growth-open.svg"] = line_chart(
            "Opening a volume",
            _PRESERVED,
            Axis("seconds"),
            [
                Series(f"{how}, {kind}", [(row["preserved"], row[how][field]) for row in rows])
                for how, kind, field in (
                    *((how, "elapsed", "wall") for how in hows),
                    ("cold", "CPU", "cpu"),
                )
            ],
            ("aim at 6.5 million: 2 s", _OPEN_AIM),
        )
        found["growth-memory.svg"] = line_chart(
            "Memory per preserved block after opening",
            _PRESERVED,
            Axis("bytes"),
            [
                Series(name, [(row["preserved"], _per(row, field)) for row in rows])
                for name, field in (
                    ("index, slot map, block set", "structures"),
                    ("process (RSS)", "rss"),
                    ("peak of the process", "peak"),
                )
            ],
            ("aim: 16 bytes", _MEMORY_AIM),
        )
        found["growth-point.svg"] = line_chart(
            "Creating and deleting a recovery point",
            _PRESERVED,
            Axis("milliseconds"),
            [
                Series(name, [(row["preserved"], row[what][field] * 1e3) for row in rows])
                for name, what, field in (
                    ("create", "create", "total"),
                    ("writes held by creating", "create_busy", "longest_write"),
                    ("delete", "delete_busy", "total"),
                    ("writes held by deleting", "delete_busy", "longest_write"),
                )
            ],
        )
    rows = record.get("volume_size", [])
    if rows:
        found["growth-size.svg"] = line_chart(
            "Opening a volume of different sizes",
            Axis("size of the volume", binary=True),
            Axis("seconds"),
            [
                Series(
                    f"{count:,} blocks, {how}",
                    [
                        (row["replica"], row[how]["wall"])
                        for row in rows
                        if row["preserved"] == count
                    ],
                )
                for count in sorted({row["preserved"] for row in rows})
                for how in ("cold", "unclean")
            ],
        )
    for run in record.get("points", []):
        steps = run["steps"]
        found["growth-points.svg"] = line_chart(
            "Against the number of recovery points",
            Axis("recovery points", binary=True),
            Axis("milliseconds"),
            [
                Series("create", [(s["points"], s["create"]["total"] * 1e3) for s in steps]),
                Series("delete", [(s["points"], s["delete"]["total"] * 1e3) for s in steps]),
                Series("4 KiB read of the oldest", [(s["points"], s["read"] * 1e3) for s in steps]),
                Series("lookup alone", [(s["points"], s["lookup"] * 1e3) for s in steps]),
            ],
        )
    for run in record.get("writes", []):
        found["growth-writes.svg"] = line_chart(
            "First write of a block while the diff area grows",
            Axis("preserved blocks", log=False),
            Axis("milliseconds"),
            [
                Series(
                    f"depth {depth}, {name}",
                    [(p["copies"], p[field] * 1e3) for p in run["parts"] if p["depth"] == depth],
                )
                for depth in sorted({part["depth"] for part in run["parts"]})
                for name, field in (("median", "p50"), ("p99", "p99"))
            ],
        )
    return found


def _per(row: Record, field: str) -> float:
    return float(row["cold"][field]) / float(row["cold"]["copies"])


def _table(head: Iterable[str], rows: Iterable[Iterable[Any]]) -> list[str]:
    names = list(head)
    lines = ["| " + " | ".join(names) + " |", "|" + " --: |" * len(names)]
    return [*lines, *("| " + " | ".join(str(cell) for cell in row) + " |" for row in rows), ""]


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f}" if seconds < 0.01 else f"{seconds * 1e3:.0f}"


def markdown(record: Record, drawn: Iterable[str]) -> str:
    """growth.md."""
    names = set(drawn)
    lines = [
        "# Growth of cost",
        "",
        "Made by `scripts/bench-growth`; the figures are in [growth.json](growth.json).",
        "",
        _measured_on(record["machine"]),
        "",
        _TEXT,
        *_aims(record),
    ]
    sections: list[tuple[str, str, Callable[[Record], list[str]]]] = [
        ("Opening", "preserved", _opening),
        ("Recovery points and preserved blocks", "preserved", _points_and_blocks),
        ("The size of the volume", "volume_size", _volume_size),
        ("The number of recovery points", "points", _points),
        ("Writing while the diff area grows", "writes", _writes),
        ("Folding the index", "fold", _fold),
    ]
    for title, key, section in sections:
        if record.get(key):
            lines += [f"## {title}", "", *section(record)]
            lines += [f"![{name}]({name})\n" for name in _CHARTS[title] if name in names]
    if record["left_out"]:
        lines += ["## Left out", "", *(f"* {reason}" for reason in record["left_out"]), ""]
    return "\n".join(lines).rstrip() + "\n"


def _measured_on(machine: Record) -> str:
    return (
        f"Measured {machine['date']} with {machine['extent']} on {machine['cpus']} CPUs "
        f"({machine['model']}), Linux {machine['kernel']}, {machine['file_system']}, "
        f"Python {machine['python']}, numpy {machine['numpy']}. "
        f"Load average before: {machine['load_before']}, after: {machine['load_after']}."
    )


_CHARTS = {
    "Opening": ["growth-open.svg", "growth-memory.svg"],
    "Recovery points and preserved blocks": ["growth-point.svg"],
    "The size of the volume": ["growth-size.svg"],
    "The number of recovery points": ["growth-points.svg"],
    "Writing while the diff area grows": ["growth-writes.svg"],
    "Folding the index": [],
}

_TEXT = """\
**What is real.** Each volume is opened by `Volume.open` in a process of its own, from files on disk
in the real format: superblocks, both copies of every descriptor table, all checksums, 16 KiB
blocks. The blocks lie in the volume in scattered order, the worst case for sorting. *Cold*: the
volume's files were dropped from the page cache first. *Unclean*: as a killed server leaves it, cold
as well; opening then also syncs, checks the newest barrier and commits. *Structures*: index, slot
map and block set. Each volume has 20,000 free slots as well, at one byte each.

**What is synthetic.** In the volumes with many preserved blocks (all but those of the sections on
the number of points and on writing) the preserved blocks themselves are holes of a sparse file, and
so is the replica. Opening never reads them; their checksums are right.

**What it does not mean.** Absolute times are this machine's and this disk's, and other work may
have run beside: look at the shapes, at CPU time, and at memory, which does not depend on that. A
hard disk pays a seek for each group of 2560 blocks when opened cold. The memory of the process
counts all that opening brings in: below 100,000 blocks that is mostly a constant few megabytes.
*Writes held* is the longest write seen by a writer that does nothing but one 4 KiB write after the
other, over a few blocks; what it sees at quiet times is given beside it. Up to 64 points, the
lookup in the section on their number is one in a dictionary: the copies have not been folded yet.
"""


def _aims(record: Record) -> list[str]:
    rows = [row for row in record.get("preserved", []) if row["preserved"] == _AIM]
    if not rows:
        return []
    row = rows[-1]
    creations = [
        other["create"]["beyond"]
        for key in ("preserved", "volume_size")
        for other in record.get(key, [])
    ]
    return _table(
        ("at 6.5 million preserved blocks (100 GiB)", "aim", "measured"),
        [
            (
                "open, cold",
                "≤ 2 s",
                f"{row['cold']['wall']:.2f} s ({row['cold']['cpu']:.2f} s CPU)",
            ),
            (
                "open, warm",
                "≤ 2 s",
                f"{row['warm']['wall']:.2f} s ({row['warm']['cpu']:.2f} s CPU)",
            ),
            (
                "open after an unclean stop, cold",
                "≤ 2 s",
                f"{row['unclean']['wall']:.2f} s ({row['unclean']['cpu']:.2f} s CPU)",
            ),
            (
                "memory of index, slot map and block set",
                "≤ 16 bytes a block",
                f"{_per(row, 'structures'):.1f} bytes",
            ),
            (
                "memory of the process, and its peak while opening",
                "",
                f"{_per(row, 'rss'):.1f} and {_per(row, 'peak'):.1f} bytes a block",
            ),
            (
                "creating a point, beyond the replica's sync, at any size (4 more syncs)",
                f"≤ {_CREATE_AIM:g} ms",
                f"{_ms(min(creations))} to {_ms(max(creations))} ms",
            ),
        ],
    )


def _opening(record: Record) -> list[str]:
    return _table(
        (
            *("preserved", "cold s", "(CPU)", "warm s", "(CPU)", "unclean s", "(CPU)"),
            *("structures B/block", "RSS B/block", "peak B/block"),
        ),
        (
            (
                f"{row['preserved']:,}",
                *(
                    f"{row[how][field]:.3f}"
                    for how in ("cold", "warm", "unclean")
                    for field in ("wall", "cpu")
                ),
                *(f"{_per(row, field):.1f}" for field in ("structures", "rss", "peak")),
            )
            for row in record["preserved"]
        ),
    )


_POINT_HEAD = (
    *("create ms", "replica's sync", "commit", "state file", "the rest", "beyond replica's sync"),
    *("writes held ms", "(quiet)", "delete ms", "writes held ms", "lookup µs", "4 KiB read µs"),
)


def _point_cells(row: Record) -> list[str]:
    create, busy, delete = row["create"], row["create_busy"], row["delete_busy"]
    return [
        *(_ms(create[part]) for part in ("total", "replica", "commit", "state")),
        _ms(max(0.0, create["beyond"] - create["commit"] - create["state"])),
        _ms(create["beyond"]),
        *(_ms(busy[part]) for part in ("longest_write", "longest_write_before")),
        *(_ms(delete[part]) for part in ("total", "longest_write")),
        *(f"{row[part] * 1e6:.1f}" for part in ("lookup", "read")),
    ]


def _points_and_blocks(record: Record) -> list[str]:
    return _table(
        ("preserved", *_POINT_HEAD),
        ((f"{row['preserved']:,}", *_point_cells(row)) for row in record["preserved"]),
    )


def _volume_size(record: Record) -> list[str]:
    return _table(
        ("GiB", "preserved", "cold s", "warm s", "unclean s", "structures B/block", *_POINT_HEAD),
        (
            (
                row["replica"] >> 30,
                f"{row['preserved']:,}",
                *(f"{row[how]['wall']:.3f}" for how in ("cold", "warm", "unclean")),
                f"{_per(row, 'structures'):.1f}",
                *_point_cells(row),
            )
            for row in record["volume_size"]
        ),
    )


def _points(record: Record) -> list[str]:
    return _table(
        (
            "points",
            "create ms",
            "beyond the replica sync",
            "delete ms",
            "lookup µs",
            "4 KiB read µs",
        ),
        (
            (
                step["points"],
                _ms(step["create"]["total"]),
                _ms(step["create"]["beyond"]),
                _ms(step["delete"]["total"]),
                f"{step['lookup'] * 1e6:.1f}",
                f"{step['read'] * 1e6:.1f}",
            )
            for step in record["points"][0]["steps"]
        ),
    )


def _writes(record: Record) -> list[str]:
    return [
        "First writes of 4 KiB blocks in random order, by one writer, then by 16 at once, until",
        "they are acknowledged; and the flush after each tenth, which waits for all copies.",
        "",
        *_table(
            ("depth", "preserved", "median ms", "p99 ms", "longest ms", "flush ms", "grown by MiB"),
            (
                (
                    part["depth"],
                    f"{part['copies']:,}",
                    *(_ms(part[field]) for field in ("p50", "p99", "longest", "flush")),
                    part["grown"] >> 20,
                )
                for part in record["writes"][0]["parts"]
            ),
        ),
    ]


def _fold(record: Record) -> list[str]:
    return [
        "Recent copies are folded into the index 8192 at a time; copies that come meanwhile wait.",
        "Most folds are small, one now and then merges all there is:",
        "",
        *_table(
            ("entries", "median fold ms", "longest fold ms"),
            (
                (f"{row['copies']:,}", _ms(row["median"]), _ms(row["longest"]))
                for row in record["fold"]
            ),
        ),
    ]
