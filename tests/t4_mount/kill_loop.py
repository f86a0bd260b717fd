"""The command `scripts/kill-loop`: runs rounds of `killing`, counts, and tells of a loss."""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

from house import limit_memory
from killing import Ext4Rounds, FileRounds, Rounds, Tally
from mounted_rig import Machine, quiet

#: A round takes a few seconds. One that takes this long hangs.
ROUND_SECONDS = 240
EXT4_EVERY = 4


def arguments(text: str | None, given: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="scripts/kill-loop", description=text, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("rounds", type=int, metavar="N", help="how many kills")
    parser.add_argument("--seed", type=int, help="repeats the choices (not the instants)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.add_argument("--work", type=Path, metavar="DIR", help="where the volumes lie")
    parser.add_argument("--no-ext4", action="store_true", help="no rounds on a loop device")
    options = parser.parse_args(given)
    if options.rounds < 1:
        parser.error("N must be at least 1")
    if shutil.which("fio") is None:
        parser.error("fio is not installed")
    return options


def can_use_loop_devices() -> bool:
    """Root, with tools and a kernel that gives loop devices (containers often do not)."""
    if os.geteuid() != 0 or not all(map(shutil.which, ("losetup", "mkfs.ext4", "mount"))):
        return False
    return quiet("losetup", "--find").returncode == 0


def _on_alarm(_signum: int, _frame: FrameType | None) -> None:
    raise TimeoutError(f"the round takes longer than {ROUND_SECONDS} s")


def _on_term(_signum: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main(text: str | None = None, given: list[str] | None = None) -> int:
    """Run it; the exit code."""
    options = arguments(text, given)
    limit_memory()
    seed = random.randrange(10**6) if options.seed is None else options.seed
    os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
    work = Path(tempfile.mkdtemp(prefix="vsnapfs-kill-loop-", dir=options.work))
    signal.signal(signal.SIGALRM, _on_alarm)
    signal.signal(signal.SIGTERM, _on_term)
    with_ext4 = not options.no_ext4 and can_use_loop_devices()
    if not with_ext4 and not options.no_ext4:
        print("no rounds on ext4: loop devices need root", file=sys.stderr)
    print(f"seed {seed}, in {work}", file=sys.stderr)
    tally, lost, started = Tally(), 0, time.monotonic()
    machine = Machine(work)
    try:
        try:
            _rounds(options.rounds, seed, machine, tally, with_ext4=with_ext4)
        finally:
            signal.alarm(0)
            machine.close()
    except Exception:  # noqa: BLE001 - whatever it was, what was promised is not there
        traceback.print_exc()
        lost = 1
    minutes = (time.monotonic() - started) / 60
    print(
        f"{tally.rounds} rounds, {lost} lost, {tally.text()}, seed {seed}, {minutes:.1f} minutes",
        flush=True,
    )
    if lost:
        print(
            f"lost in round {tally.rounds + 1}; the volumes are kept in {work}\n"
            f"to try again: scripts/kill-loop {options.rounds} --seed {seed} "
            "(the same choices, other instants)",
            flush=True,
        )
    else:
        shutil.rmtree(work, ignore_errors=True)
    if options.json is not None:
        figures: dict[str, Any] = asdict(tally)
        figures |= {"lost": lost, "seed": seed, "minutes": round(minutes, 2), "ext4": with_ext4}
        options.json.write_text(json.dumps(figures, indent=2) + "\n")
    return min(lost, 1)


def _rounds(count: int, seed: int, machine: Machine, tally: Tally, *, with_ext4: bool) -> None:
    on_file: Rounds = FileRounds(machine, seed, tally)
    on_ext4: Rounds | None = None
    for turn in range(1, count + 1):
        signal.alarm(ROUND_SECONDS)
        started = time.monotonic()
        rounds = on_file
        if with_ext4 and turn % EXT4_EVERY == 0:
            on_ext4 = on_ext4 or Ext4Rounds(machine, seed, tally)
            rounds = on_ext4
        told = rounds.run()
        tally.rounds += 1
        print(
            f"round {turn}/{count}: {told}; {len(rounds.checksums)} points exact; "
            f"{time.monotonic() - started:.1f} s",
            file=sys.stderr,
            flush=True,
        )
