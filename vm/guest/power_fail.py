"""In the guest of vm/power-fail: judge what the last power failure left, then work until the next.

The first argument names a JSON file with what the host knows (see host/power_fail.py): `create`,
`round`, `seed`, `points` (number → sha256 or null), `history` ([[round, [flushed count of each
thread]], …], newest last), `offline` (the state that must be found, or null).

The replica: 0 to 8 MiB is for stamps, written by THREADS threads; 8 to 16 MiB is fio's. Each
thread owns SLOTS slots of SLOT bytes; write number n of a thread in a round goes to slot n for the
first SLOTS of them and then to slots drawn by lot, and each of its 512-byte sectors says round,
thread, slot and n. So of every sector can be told which write it is from, and it must be no older
than the newest flushed write to its slot.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from report import report

from vsnapfs.daemon.client import call
from vsnapfs.errors import VsnapError

THREADS = 2
SLOTS = 64
SLOT = 24 << 10  # one and a half blocks: half of the slots begin in the middle of one
REGION = 4 << 20  # bytes of a thread
SECTOR = 512
REPLICA_SIZE = 16 << 20
AREA_SIZES = (10 << 20, 14 << 20)
MOST_POINTS = 4
STAMP = struct.Struct("<8sIIII")
MAGIC = b"stamped\0"

DATA = Path("/data")
VOLUME = DATA / "vol"
TREE = DATA.parent / "mnt"
REPLICA = TREE / "replica.img"
POINTS = TREE / "recovery-points"


class Wrong(Exception):
    """A promise does not hold."""


def sh(*command: str | Path) -> str:
    """Run a command; Wrong if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    if done.returncode != 0:
        raise Wrong(f"{command[0]} {command[1]}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def sha256(number: int) -> str:
    """The sha256 of a recovery point, read through the mounted tree."""
    with (POINTS / f"{number:04d}.img").open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def stamp(turn: int, thread: int, slot: int, count: int) -> bytes:
    """The content of one write."""
    head = STAMP.pack(MAGIC, turn, thread, slot, count)
    unit = head + hashlib.blake2b(head).digest()
    return (unit * (SECTOR // len(unit) + 1))[:SECTOR] * (SLOT // SECTOR)


def lots(*words: object) -> random.Random:
    """Choices that the same words repeat."""
    return random.Random("/".join(map(str, words)))  # noqa: S311 - nothing secret


def slots(seed: int, turn: int, thread: int) -> Any:
    """Yield the slots of a thread's writes in order, without end."""
    yield from range(SLOTS)
    rng = lots(seed, turn, thread)
    while True:
        yield rng.randrange(SLOTS)


def place(thread: int, slot: int) -> int:
    """Offset of a slot."""
    return thread * REGION + slot * SLOT


# --- judging -----------------------------------------------------------------------------------


def check_stamps(known: dict[str, Any]) -> int:
    """Every flushed write is there, or a later one; returns how many slots were held to one."""
    held = 0
    with REPLICA.open("rb", buffering=0) as file:
        for thread in range(THREADS):
            least = [(0, 0)] * SLOTS
            for turn, counts in known["history"]:
                order = slots(known["seed"], turn, thread)
                for count in range(1, counts[thread] + 1):
                    least[next(order)] = (turn, count)
            for slot in range(SLOTS):
                held += least[slot] != (0, 0)
                content = os.pread(file.fileno(), SLOT, place(thread, slot))
                check_slot(known["round"], thread, slot, least[slot], content)
    return held


def check_slot(now: int, thread: int, slot: int, least: tuple[int, int], content: bytes) -> None:
    """Each sector is a whole stamp of this slot, and none older than `least`."""
    if len(content) != SLOT:
        raise Wrong(f"slot {slot} of thread {thread} reads short: {len(content)} bytes")
    for at in range(0, SLOT, SECTOR):
        sector = content[at : at + SECTOR]
        where = f"sector {at // SECTOR} of slot {slot} of thread {thread}"
        if not any(sector):
            if least != (0, 0):
                raise Wrong(f"{where} is empty; write {least} was flushed")
            continue
        magic, turn, who, which, count = STAMP.unpack_from(sector)
        if (magic, who, which) != (MAGIC, thread, slot) or turn >= now:
            raise Wrong(f"{where} holds what was never written there: {sector[:32].hex()}")
        if sector != stamp(turn, thread, slot, count)[:SECTOR]:
            raise Wrong(f"{where} is torn within its 512 bytes")
        if (turn, count) < least:
            raise Wrong(f"{where} holds write {(turn, count)}; {least} was flushed")


def check_points(known: dict[str, Any]) -> dict[int, str]:
    """Every point that must be there is, exactly; returns the sha256 of all that are."""
    there = {point["number"] for point in call(VOLUME, "rp_list")}
    named = {int(path.stem) for path in POINTS.glob("[0-9]*.img")}
    if there != named:
        raise Wrong(f"listed are {sorted(there)}, in the tree are {sorted(named)}")
    wanted = {int(number): digest for number, digest in known["points"].items()}
    maybe_gone = {int(number) for number in known["deleting"]}
    if missing := set(wanted) - there - maybe_gone:
        raise Wrong(f"points are lost: {sorted(missing)} of {sorted(wanted)}")
    unknown = there - set(wanted)
    # One may have been created without its answer having arrived; a deleted one may not come back.
    if len(unknown) > 1 or any(number <= known["highest"] for number in unknown):
        raise Wrong(f"points are there that should not be: {sorted(unknown)}")
    found = {}
    for number in sorted(there):
        found[number] = sha256(number)
        if wanted.get(number) not in {None, found[number]}:
            raise Wrong(f"point {number} has changed: {found[number]}, was {wanted[number]}")
    return found


def check(known: dict[str, Any]) -> None:
    """All of it, in the order in which damage would spread; reports what was found."""
    status = call(VOLUME, "status")
    # None: a fault or the way out of one was on its way when the power failed.
    if known["offline"] is not None and (status["state"] == "offline") != known["offline"]:
        raise Wrong(f"the volume is {status['state']}, should be offline: {known['offline']}")
    points = check_points(known)
    area = status["diff_area"]
    if not area["used"] <= area["allocated"] <= area["maximum"]:
        raise Wrong(f"the sizes of the diff area: {area}")
    verified = call(VOLUME, "verify")
    if not verified["ok"]:
        raise Wrong(f"verify: {verified['problems']}")
    report("POINTS", points=points, offline=status["state"] == "offline")
    if status["state"] == "offline":
        come_online()
    report("CHECKED", slots=check_stamps(known))


def come_online() -> None:
    """Make room by giving up the oldest point, and go on."""
    report("LEAVING")
    points = call(VOLUME, "rp_list")
    if points:
        delete(points[0]["number"])
    call(VOLUME, "online")
    report("ONLINE")


def delete(number: int) -> None:
    """Delete a point; the host knows before and after."""
    report("DELETING", number=number)
    call(VOLUME, "rp_delete", point=number, force=True)
    report("DELETED", number=number)


# --- working -----------------------------------------------------------------------------------


class Work:
    """Writers that flush, fio, and somebody who makes and deletes recovery points."""

    def __init__(self, known: dict[str, Any]) -> None:
        self._known = known
        self._turn = known["round"]
        self._rng = lots(known["seed"], self._turn, "points")
        self._lock = threading.Lock()
        self._prologues = THREADS  # writers that have not yet flushed every slot
        # In the other rounds the diff area fills up, protection acts, and power fails around it.
        self._spare = self._rng.random() < 0.6

    def run(self) -> None:
        """Until the power fails."""
        for thread in range(THREADS):
            threading.Thread(target=self._guard, args=(self._write, thread), daemon=True).start()
        self._guard(self._points)

    def _prologue_done(self) -> None:
        with self._lock:
            self._prologues -= 1
            if self._prologues == 0:
                report("READY")
                threading.Thread(target=self._guard, args=(self._fio,), daemon=True).start()

    def _guard(self, function: Any, *arguments: Any) -> None:
        try:
            function(*arguments)
        except BaseException as error:  # noqa: BLE001 - the host is told of anything
            report("BAD", what=f"{type(error).__name__}: {error}")

    def _is_offline(self) -> bool:
        return bool(call(VOLUME, "status")["state"] == "offline")

    def _write(self, thread: int) -> None:
        rng = lots(self._known["seed"], self._turn, thread, "flushes")
        order = enumerate(slots(self._known["seed"], self._turn, thread), start=1)
        fd = os.open(REPLICA, os.O_RDWR)
        for count, slot in order:
            data = stamp(self._turn, thread, slot, count)
            while True:
                try:
                    if os.pwrite(fd, data, place(thread, slot)) != SLOT:
                        raise Wrong("a short write")
                    if count == SLOTS or (count > SLOTS and rng.random() < 0.15):
                        os.fsync(fd)
                        report("FLUSHED", thread=thread, count=count)
                    break
                except OSError as error:
                    os.close(fd)
                    fd = self._wait_for_online(error)
            if count == SLOTS:
                self._prologue_done()

    def _wait_for_online(self, error: OSError) -> int:
        """The replica's new handle after a fault; any other failure is none that may be."""
        if error.errno != 19:  # ENODEV
            raise error
        report("REFUSED", fault=call(VOLUME, "status")["fault"])
        while True:
            time.sleep(0.2)
            try:
                return os.open(REPLICA, os.O_RDWR)
            except OSError as again:
                if again.errno != 19:
                    raise

    def _fio(self) -> None:
        while True:
            done = subprocess.run(
                ["fio", "/src/vm/fio/power-fail.fio"],
                env={**os.environ, "REPLICA": str(REPLICA)},
                capture_output=True,
                text=True,
                check=False,
            )
            if "No such device" not in done.stdout + done.stderr:
                raise Wrong(f"fio ended: {(done.stdout + done.stderr)[-500:]}")
            while self._is_offline():
                time.sleep(0.2)

    def _points(self) -> None:
        while True:
            time.sleep(self._rng.uniform(0, 0.7))
            if self._is_offline():
                report("OFFLINE")
                time.sleep(self._rng.uniform(0.5, 2))
                come_online()
            try:
                self._one_step()
            except VsnapError as error:
                # Between the question and the operation a fault may have come.
                if not self._is_offline():
                    raise Wrong(f"{error.code}: {error.message}") from error

    def _one_step(self) -> None:
        points = [point["number"] for point in call(VOLUME, "rp_list")]
        area = call(VOLUME, "status")["diff_area"]
        if (
            points
            and self._spare
            and (len(points) >= MOST_POINTS or area["used"] > area["maximum"] * 0.7)
        ):
            delete(points[0] if self._rng.random() < 0.7 else self._rng.choice(points))
        elif self._rng.random() < 0.15:
            total = max(self._rng.choice(AREA_SIZES), area["minimum"])
            report("RESIZING", total=total)
            call(VOLUME, "resize", total=total)
        else:
            number = call(VOLUME, "rp_create", label=None)["number"]
            report("CREATED", number=number)
            report("HASHED", number=number, sha256=sha256(number))


def unmount_data() -> None:
    """The server may take a moment longer to end than `vsnapfs umount`."""
    for _ in range(50):
        if subprocess.run(["umount", DATA], capture_output=True, check=False).returncode == 0:
            return
        time.sleep(0.2)
    sh("umount", DATA)


# --- one life of the machine -------------------------------------------------------------------


def main() -> int:
    """Check, and work until the power fails; returns only if something is wrong."""
    known = json.loads(Path(sys.argv[1]).read_text())
    report("BOOTED", uptime=float(Path("/proc/uptime").read_text().split()[0]))
    try:
        if known["create"]:
            sh("mkfs.ext4", "-q", "-F", "-E", "nodiscard,lazy_itable_init=0", "/dev/vm/data")
        sh("mount", "-t", "ext4", "/dev/vm/data", DATA)
        if known["create"]:
            sizes = ("--size", str(REPLICA_SIZE), "--diff-area-size", str(AREA_SIZES[-1]))
            sh("vsnapfs", "create", VOLUME, *sizes)
            sh("sync")
        report("MOUNTING")
        sh("vsnapfs", "mount", VOLUME, TREE)
        report("MOUNTED", uptime=float(Path("/proc/uptime").read_text().split()[0]))
        check(known)
        if known["last"]:
            sh("vsnapfs", "umount", TREE)
            unmount_data()
            report("DONE")
            return 0
        Work(known).run()
    except BaseException as error:  # noqa: BLE001 - the host is told of anything
        report("BAD", what=f"{type(error).__name__}: {error}")
    return 1


if __name__ == "__main__":
    raise SystemExit(main())
