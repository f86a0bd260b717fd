"""fio drives everything: the command line for a cell, and what its JSON says.

One libaio job, the same for all systems of one round. Its blocks are chosen by fio's random map
(each once before any comes again); where a pass is only one block in each region of the file, which
fio cannot be told, the list of requests is made here and replayed as fast as it goes. Reads and
writes of a mixed job are reported as one (unified_rw_reporting), so that every cell has one rate
and one pair of latencies.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmark.cells import MIXED_READS, REGION, Cell
from benchmark.machine import BenchError, run

# A cell that touches each block once ends by itself; a system that is very slow is stopped here.
LONGEST_SECONDS = 30


@dataclass(frozen=True)
class Result:
    """What fio saw. Latencies in µs, submission included (fio's lat).

    iops includes the final fsync of a job that ends with one. covered: the part of the cell's pass
    that was done before LONGEST_SECONDS, 1.0 when all.
    """

    iops: float
    bytes_per_second: float
    p50_us: float
    p99_us: float
    bytes_moved: int
    seconds: float
    covered: float


def measure(
    cell: Cell,
    file: Path,
    *,
    direct: bool,
    seed: int,
    end_fsync: bool,
    work: Path,
    servers: Sequence[int] = (),
) -> Result:
    """Run the cell on this file. BenchError when fio fails or reports an error.

    servers: the processes behind the file, killed if fio hangs.
    """
    arguments = [
        *_common(file, cell.block, cell.depth, cell.span, direct=direct, seed=seed),
        f"--end_fsync={int(end_fsync)}",
        f"--fsync={int(cell.sync)}",
    ]
    if cell.scattered:
        log = work / "requests"
        log.write_text(scattered_requests(cell, seed))
        arguments += [f"--read_iolog={log}", "--replay_no_stall=1", f"--replay_redirect={file}"]
    else:
        arguments += [f"--rw={cell.pattern}", f"--rwmixread={MIXED_READS}"]
    if cell.seconds is None:
        arguments.append(f"--runtime={LONGEST_SECONDS}")
    else:
        arguments += ["--time_based=1", f"--runtime={cell.seconds:g}"]
    if not cell.writes:
        arguments.append("--readonly")
    job = _run(arguments, work, servers)
    return parse(job, cell)


def scattered_requests(cell: Cell, seed: int) -> str:
    """A log for fio (version 2): one write at a random block of each region, in random order."""
    choice = random.Random(seed)  # noqa: S311 - repeatable, not secret
    regions = list(range(cell.span // REGION))
    choice.shuffle(regions)
    offsets = [
        region * REGION + choice.randrange(REGION // cell.block) * cell.block for region in regions
    ]
    # The name is only a label here: the job redirects all of it to the file that is measured.
    lines = ["fio version 2 iolog", "it add", "it open"]
    lines += [f"it write {offset} {cell.block}" for offset in offsets]
    return "\n".join([*lines, "it close", ""])


def touch_all(
    file: Path,
    *,
    pattern: str,
    block: int,
    span: int,
    direct: bool,
    work: Path,
    servers: Sequence[int] = (),
) -> None:
    """Read or write each block of the span once, not timed: to warm caches, to preserve all."""
    arguments = [
        *_common(file, block, 32 if block < 1 << 20 else 4, span, direct=direct, seed=0),
        f"--rw={pattern}",
        "--end_fsync=1",
    ]
    if "read" in pattern:
        arguments.append("--readonly")
    _run(arguments, work, servers)


def _common(file: Path, block: int, depth: int, span: int, *, direct: bool, seed: int) -> list[str]:
    return [
        "--name=cell",
        "--thread",  # one process, so that ending it ends the job
        # fio takes a colon in a file name as a separator.
        f"--filename={str(file).replace(':', chr(92) + ':')}",
        "--ioengine=libaio",
        f"--iodepth={depth}",
        f"--bs={block}",
        f"--size={span}",
        f"--direct={int(direct)}",
        f"--randseed={seed}",
        "--allrandrepeat=1",
        "--allow_file_create=0",
        # What is in the page cache is decided by us, before fio starts.
        "--invalidate=0",
        "--unified_rw_reporting=mixed",
        # With buffered I/O all of the time is in the submission, which clat leaves out.
        "--lat_percentiles=1",
        "--clat_percentiles=0",
        "--percentile_list=50:99",
    ]


def _run(arguments: list[str], work: Path, servers: Sequence[int]) -> dict[str, Any]:
    output = work / "fio.json"
    run(
        *("fio", "--output-format=json", f"--output={output}", *arguments),
        seconds=LONGEST_SECONDS * 4,
        servers=servers,
        work=work,
    )
    text = output.read_text()
    try:
        # Warnings come before the JSON in the same file.
        job: dict[str, Any] = json.loads(text[text.index("{\n") :])["jobs"][0]
    except (ValueError, LookupError):
        raise BenchError(f"fio's output could not be read: {text[:200]}") from None
    if job["error"]:
        raise BenchError(f"fio reports error {job['error']}")
    return job


def parse(job: dict[str, Any], cell: Cell) -> Result:
    """One job of fio's JSON. BenchError when nothing was done."""
    io = job["mixed"]
    seconds = io["runtime"] / 1000
    requests = io["total_ios"]
    if not requests or not seconds:
        raise BenchError("fio did nothing")
    # Counted by requests: io_bytes lacks the last ones in flight of a replayed log.
    moved = requests * cell.block
    percentiles = io["lat_ns"]["percentile"]
    return Result(
        iops=requests / seconds,
        bytes_per_second=moved / seconds,
        p50_us=percentiles["50.000000"] / 1000,
        p99_us=percentiles["99.000000"] / 1000,
        bytes_moved=moved,
        seconds=seconds,
        covered=1.0 if cell.seconds is not None else min(1.0, requests / cell.requests),
    )
