"""vm/power-fail [ROUNDS]: lose power at random instants, and see whether anything was lost.

Owns: when the power fails, what the disk then forgets, and the memory of what the guest was
promised. What is checked inside is in guest/power_fail.py. Each round is one life of the machine:
it checks what the last failure left, works, and is killed.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from host import qemu
from host.nbd import Cut, VolatileDisk

DISK_SIZE = 192 << 20
THREADS = 2
SLOTS = 64
# How long to wait for the writes that are counted (seconds).
PATIENCE = 10.0
# A guest that says nothing for so long hangs; the slowest single step is a boot.
SILENCE = 180.0
EPILOG = """\
In each round the guest mounts an ext4 on a disk with a volatile write cache, and on it a volume;
two writers stamp sectors and flush now and then, fio writes beside them, recovery points are made,
hashed and deleted, the diff area is resized and in some rounds runs full. At a random instant (in
one round of five: while the volume is still being opened) QEMU gets SIGKILL, and of what the disk
had not been told to flush an arbitrary part is lost or torn. The next round boots and checks: the
recovery points that must be there are, each with the sha256 that was reported before; of each slot
no sector is older than its newest flushed write; a volume that refused a write is still offline;
`verify` finds nothing. Needs vm/build. About 40 s a round with emulation.

The seed repeats every choice, but not the guest's timing.
"""


class Lost(Exception):
    """The guest found a broken promise, or failed in a way that may hide one."""


@dataclass
class Memory:
    """What the guest has told, so what it must find again."""

    seed: int
    round: int = 0
    points: dict[int, str | None] = field(default_factory=dict)
    deleting: set[int] = field(default_factory=set)
    highest: int = 0
    refused: bool = False
    history: list[tuple[int, list[int]]] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)

    def next_round(self) -> None:
        """Begin a round."""
        self.round += 1
        self.history.append((self.round, [0] * THREADS))

    def for_guest(self, *, create: bool, last: bool) -> bytes:
        """The file that the guest reads. Its own round is not part of the history yet."""
        known = {
            "create": create,
            "last": last,
            "round": self.round,
            "seed": self.seed,
            "points": self.points,
            "deleting": sorted(self.deleting),
            "highest": self.highest,
            "offline": True if self.refused else None,
            "history": self.history[:-1],
        }
        return json.dumps(known).encode()

    def hear(self, word: str, what: dict[str, Any]) -> None:
        """One line of the guest's."""
        self.counts[word] += 1
        heard = getattr(self, f"_on_{word.lower()}", None)
        if heard is not None:
            heard(**what)

    def _on_created(self, number: int) -> None:
        self.points[number] = None
        self.highest = max(self.highest, number)

    def _on_hashed(self, number: int, sha256: str) -> None:
        self.points[number] = sha256

    def _on_deleting(self, number: int) -> None:
        self.deleting.add(number)

    def _on_deleted(self, number: int) -> None:
        self.points.pop(number, None)
        self.deleting.discard(number)

    def _on_refused(self, fault: dict[str, Any] | None) -> None:
        self.refused = True
        self.faults[str(fault and fault.get("name"))] += 1

    def _on_leaving(self) -> None:
        self.refused = False

    def _on_flushed(self, thread: int, count: int) -> None:
        self.history[-1][1][thread] = count

    def _on_points(self, points: dict[str, str], offline: bool) -> None:
        # What was half deleted or half made is now decided.
        self.points = {int(number): digest for number, digest in points.items()}
        self.deleting.clear()
        self.highest = max([self.highest, *self.points])
        self.counts["points checked"] += len(points)
        self.counts["found offline"] += offline

    def _on_checked(self, slots: int) -> None:
        self.counts["slots checked"] += slots
        # Rounds before the last one that wrote and flushed every slot decide nothing any more.
        complete = [at for at, (_, counts) in enumerate(self.history) if min(counts) >= SLOTS]
        if complete:
            del self.history[: complete[-1]]

    def _on_bad(self, what: str) -> None:
        raise Lost(what)


class Lines:
    """Cuts the guest's output into reports; anything else it prints is passed on."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._rest = b""
        self.words: set[str] = set()
        self.last = time.monotonic()

    def __call__(self, port: str, data: bytes) -> None:
        """For `Guest.watch`."""
        self.last = time.monotonic()
        if port != "out":
            sys.stderr.buffer.write(data)
            return
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            word, _, what = line.decode().partition(" ")
            self._memory.hear(word, json.loads(what))
            self.words.add(word)


class Rounds:
    """Lives of one machine with one disk."""

    def __init__(self, options: argparse.Namespace, work: Path) -> None:
        self._options = options
        self._rng = random.Random(options.seed)  # noqa: S311 - nothing secret
        self._image = work / "disk.img"
        self._work = work
        self.memory = Memory(options.seed)
        self.cuts = Cut()
        qemu.make_disk(self._image, DISK_SIZE)

    def live(self, *, last: bool) -> str:
        """One life; says how it ended."""
        memory, rng = self.memory, self._rng
        memory.next_round()
        known = memory.for_guest(create=memory.round == 1, last=last)
        boot = qemu.Boot("python3 vm/guest/power_fail.py .vm-known.json", cpus=self._options.cpus)
        boot.files[".vm-known.json"] = known
        lines = Lines(memory)
        early = memory.round > 1 and rng.random() < 0.2
        begin = "MOUNTING" if early else "READY"
        delay = rng.uniform(0, 5 if early else self._options.seconds)
        # By the clock, most instants find the disk idle; so two of three are counted in writes.
        writes = rng.randint(1, 40) if rng.random() < 0.67 else 0
        disk = None
        try:
            if self._options.disk == "volatile":
                disk = VolatileDisk(self._image, self._work / "disk.socket")
                boot.disks.append(qemu.Disk("data", disk.url))
            else:
                boot.disks.append(qemu.Disk("data", str(self._image)))
            with qemu.start(boot) as guest:
                ended = self._watch(
                    guest, lines, "" if last else begin, delay, disk if writes else None, writes
                )
                guest.kill()
                guest.watch(time.monotonic() + 10, lines)  # what it said before it died
                if last and not (ended and "DONE" in lines.words):
                    raise Lost(f"the last check did not end:\n{guest.console()}")
                if not last and ended:
                    raise Lost(f"the guest ended by itself:\n{guest.console()}")
            if last:
                return "checked, unmounted and ended cleanly"
            return self._describe(disk, early, delay)
        finally:
            if disk is not None:
                disk.close()

    def _watch(
        self,
        guest: qemu.Guest,
        lines: Lines,
        begin: str,
        delay: float,
        disk: VolatileDisk | None,
        writes: int,
    ) -> bool:
        """Until the power is to fail; True if the guest ended before.

        That is `delay` seconds after the report `begin`, or if there is a `disk`, when it has got
        so many more `writes` and some number is not flushed; an idle guest is not waited for.
        """
        cut_at, tripping = None, False
        while True:
            if cut_at is None and begin in lines.words:
                cut_at = time.monotonic() + delay
            now = time.monotonic()
            if cut_at is not None and now >= cut_at:
                if disk is None or disk.tripped.is_set() or now >= cut_at + PATIENCE:
                    return False
                if not tripping:
                    disk.trip(writes, self._rng.choice((1, 1, 2, 4, 8, 16)))
                    tripping = True
            if guest.watch(now + 0.02, lines):
                return True
            if now - lines.last > SILENCE:
                raise Lost(f"the guest says nothing any more; its console:\n{guest.console()}")

    def _describe(self, disk: VolatileDisk | None, early: bool, delay: float) -> str:
        when = f"{delay:.1f} s into {'opening the volume' if early else 'the work'}"
        if disk is None:
            return f"power failed {when}"
        cut, traffic = disk.cut(self._rng), disk.traffic
        for name in vars(cut):
            setattr(self.cuts, name, getattr(self.cuts, name) + getattr(cut, name))
        return (
            f"power failed {when}; {traffic.writes} writes, {traffic.flushes} flushes,"
            f" {cut.unflushed} unflushed:"
            f" {cut.kept} kept, {cut.torn} torn, {cut.lost} lost"
        )

    def summary(self, failures: int, minutes: float) -> str:
        """The one line that is left of it all."""
        counts = self.memory.counts
        return (
            f"{failures} power failures, {counts['points checked']} recovery points and"
            f" {counts['slots checked']} flushed slots checked ({counts['FLUSHED']} flushes,"
            f" {counts['CREATED']} points created, {counts['DELETED']} deleted,"
            f" {sum(self.memory.faults.values())} writes refused by"
            f" {dict(self.memory.faults) or 'no fault'}, {counts['found offline']} times found"
            f" offline); the disk had {self.cuts.unflushed} unflushed writes, lost"
            f" {self.cuts.lost} and tore {self.cuts.torn}; {minutes:.1f} min, seed"
            f" {self._options.seed}"
        )


def parser() -> argparse.ArgumentParser:
    """What vm/power-fail understands."""
    found = argparse.ArgumentParser(
        prog="vm/power-fail",
        description="Lose power at random instants and check that nothing promised is lost.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    found.add_argument(
        "rounds", nargs="?", type=int, default=20, help="power failures (default: 20)"
    )
    found.add_argument(
        "--seed", type=int, default=int(time.time()) % 10**6, help="default: another one"
    )
    found.add_argument(
        "--seconds", type=float, default=10, help="most seconds of work (default: 10)"
    )
    found.add_argument("--cpus", type=int, default=2, help="virtual processors (default: 2)")
    found.add_argument(
        "--disk",
        choices=("volatile", "file"),
        default="volatile",
        help="volatile: unflushed writes may be lost or torn (default); file: a raw file with "
        "cache=writeback, where only the guest's memory is lost",
    )
    found.add_argument("--keep", type=Path, help="where the disk goes when something is wrong")
    return found


def main() -> int:
    """All rounds and a last check; 0 if nothing was lost."""
    options = parser().parse_args()
    began = time.monotonic()
    print(f"seed {options.seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="vsnapfs-power-") as name:
        rounds = Rounds(options, Path(name))
        try:
            for number in range(1, options.rounds + 2):
                start = time.monotonic()
                text = rounds.live(last=number > options.rounds)
                label = f"round {number}" if number <= options.rounds else "afterwards"
                print(f"{label}: {text} ({time.monotonic() - start:.0f} s)", flush=True)
        except (Lost, qemu.VmError) as error:
            print(f"\nWRONG in round {rounds.memory.round}, seed {options.seed}: {error}")
            keep = options.keep or Path(tempfile.gettempdir()) / f"power-fail-{options.seed}"
            keep.mkdir(parents=True, exist_ok=True)
            shutil.copy(Path(name) / "disk.img", keep)
            known = rounds.memory.for_guest(create=False, last=True)
            (keep / "known.json").write_bytes(known)
            print(f"The disk as it was left and what was known of it are in {keep}.")
            return 1
        except KeyboardInterrupt:
            return 130
        minutes = (time.monotonic() - began) / 60
        print(f"nothing lost: {rounds.summary(options.rounds, minutes)}")
    return 0
