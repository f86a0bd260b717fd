"""Rounds of SIGKILL under load, and what must be there after each of them: `scripts/kill-loop`.

Owns two kinds of rounds. A `FileRounds` round kills the server while stamping writers and fio write
to the mounted file; an `Ext4Rounds` round while fio and a thread that syncs each record write to
files of an ext4 on a loop device. In both, recovery points are created and deleted meanwhile, and
the kill may come in the middle of that. After each round the volume is mounted again, and

* every write that was acknowledged is there (on ext4: every record that was synced);
* every point has the sha256 that it had when it was created, and what it held at that time agrees
  with the writers' own account of when they wrote what;
* points are there, or gone, as was answered; what was not answered is there whole or not at all;
* `verify` finds nothing, and the server logged nothing.

AssertionError: something is lost. The choices follow from the seed; the instants cannot.
"""

from __future__ import annotations

import hashlib
import os
import random
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mounted_rig import MIB, Fio, Machine, Rig, quiet, read_direct, sh, sha256, until
from stamps import Stamper, nasty_extents

from vsnapfs.config import DEFAULT_WRITE_BUFFER, LEAST_WRITE_BUFFER
from vsnapfs.daemon import mounts
from vsnapfs.errors import VsnapError

#: Errors that only say that the server was killed before it answered.
KILLED = ("server-gone", "no-answer", "busy")
SECTOR = 512
#: Write buffers, in bytes: the usual one, the smallest, sizes that no unit divides, none.
BUFFERS = (DEFAULT_WRITE_BUFFER, LEAST_WRITE_BUFFER, 4_500_001, 5_500_000, 0)


def mount_again(rig: Rig, **options: Any) -> None:
    """Mount over the dead mount, which the mount itself cleans up."""
    dead = mounts.mount_of(rig.directory)
    assert dead is not None
    assert dead.stale
    rig.mount(**options)
    (now,) = (mount for mount in mounts.find_mounts() if mount.volume == rig.directory)
    assert not now.stale


def all_points_exact(rig: Rig, checksums: dict[int, str]) -> None:
    """The volume has exactly these points, each with the sha256 it had, and verifies."""
    assert rig.points() == sorted(checksums)
    for number, checksum in checksums.items():
        assert sha256(rig.point(number), direct=True) == checksum, f"point {number} has changed"
    result = rig.call("verify")
    assert result["ok"], result["problems"]


@dataclass
class Tally:
    """What has been checked."""

    rounds: int = 0
    acknowledged: int = 0
    synced: int = 0
    points: int = 0
    point_reads: int = 0
    deleted: int = 0
    interrupted: int = 0

    def text(self) -> str:
        """All of it in one line."""
        return (
            f"{self.acknowledged} acknowledged writes and {self.synced} synced records checked, "
            f"{self.points} points created and read {self.point_reads} times, {self.deleted} "
            f"deleted, {self.interrupted} commands killed before their answer"
        )


class Asked:
    """An operation under way in a thread, whose server may be killed before it answers."""

    def __init__(self, rig: Rig, op: str, **params: Any) -> None:
        self.result: Any = None
        self.error: VsnapError | None = None
        self._thread = threading.Thread(target=self._ask, args=(rig, op, params), daemon=True)
        self._thread.start()

    def _ask(self, rig: Rig, op: str, params: dict[str, Any]) -> None:
        try:
            self.result = rig.call(op, **params) or True
        except VsnapError as error:
            self.error = error

    def end(self) -> bool:
        """Wait for the end. Whether it was answered; AssertionError if it was refused."""
        self._thread.join(60)
        assert not self._thread.is_alive(), "a command never ends"
        if self.error is not None:
            assert self.error.code in KILLED, f"{self.error.code}: {self.error}"
        return self.error is None


class Rounds:
    """What both kinds share: one volume, its points, and the instants of a round."""

    def __init__(self, machine: Machine, name: str, size: int, seed: str, tally: Tally) -> None:
        self.machine = machine
        self.tally = tally
        self.rng = random.Random(seed)
        self.rig = machine.rig(name, size=size, area=512 * MIB)
        self.checksums: dict[int, str] = {}
        self.newest = 0
        #: A point of this round that may have been taken after the kill.
        self.in_doubt = 0

    def points_meanwhile(self, note: Callable[[int, int, int], None]) -> Asked | None:
        """Create and delete points under load, then kill at a random instant.

        note(number, called, answered) is told of each point as soon as it is there, with the ticks
        before and after. Returns the command that was under way when the kill came, if one was.
        """
        rng, rig = self.rng, self.rig
        for _ in range(rng.choice((1, 1, 2))):
            time.sleep(rng.uniform(0.02, 0.3))
            self._create(note)
        keep = rng.randrange(2, 7)
        while len(self.checksums) > keep:
            self._delete(rng.choice(sorted(self.checksums)))
        asked = None
        what = rng.choice(("rp_create", "rp_delete", None))
        if what == "rp_create":
            self.called = self.tick()
            asked = Asked(rig, what)
        elif what == "rp_delete":
            self.victim = rng.choice(sorted(self.checksums))
            asked = Asked(rig, what, point=self.victim)
        if asked is None:
            time.sleep(rng.uniform(0, 0.5))
        else:
            time.sleep(rng.uniform(0, 0.03))
        self.asked = what
        rig.kill()
        return asked

    def tick(self) -> int:
        """A moment on the writers' clock."""
        raise NotImplementedError

    def run(self) -> str:
        """One round; what happened, in words."""
        raise NotImplementedError

    def _create(self, note: Callable[[int, int, int], None]) -> None:
        called = self.tick()
        number = self.rig.create_point()
        answered = self.tick()
        assert number > self.newest, "a number was used twice"
        self.newest = number
        self.checksums[number] = sha256(self.rig.point(number), direct=True)
        self.tally.points += 1
        note(number, called, answered)

    def _delete(self, number: int) -> None:
        self.rig.call("rp_delete", point=number)
        del self.checksums[number]
        self.tally.deleted += 1

    def settle(self, asked: Asked | None, note: Callable[[int, int, int], None]) -> None:
        """Mount again, and see what became of the command that was under way."""
        killed = self.tick()
        before = self.rig.event_ids()
        mount_again(self.rig, write_buffer=self.rng.choice(BUFFERS))
        # A command that found nobody to ask has opened the volume itself, perhaps before us.
        last = len(before) - before[::-1].index(1001)
        assert 1042 in self.rig.event_ids()[last:], "the kill went unnoticed"
        if asked is not None:
            answered = asked.end()
            self.tally.interrupted += not answered
            there = self.rig.points()
            if self.asked == "rp_delete" and self.victim not in there:
                del self.checksums[self.victim]
                self.tally.deleted += 1
            elif self.asked == "rp_delete":
                assert not answered, f"point {self.victim} was deleted and is back"
            new = set(there) - set(self.checksums)
            assert len(new) <= (self.asked == "rp_create"), f"points {new} from nowhere"
            if self.asked == "rp_create" and answered and asked.result["number"] not in new:
                raise AssertionError(f"point {asked.result['number']} was created and is gone")
            for number in new:
                assert number > self.newest, "a number was used twice"
                self.newest = number
                self.checksums[number] = sha256(self.rig.point(number), direct=True)
                self.tally.points += 1
                # The next server may have been asked, or the command has opened the volume itself.
                note(number, self.called, max(killed, self.tick() if answered else killed))
                self.in_doubt = number

        all_points_exact(self.rig, self.checksums)
        self.tally.point_reads += len(self.checksums)
        assert self.rig.status()["state"] == "online"
        sizes = self.rig.status()["diff_area"]
        assert sizes["used"] <= sizes["allocated"] <= sizes["maximum"]


class FileRounds(Rounds):
    """Stamping writers and fio on the mounted file."""

    half = 10 * MIB

    def __init__(self, machine: Machine, seed: int, tally: Tally) -> None:
        super().__init__(machine, "vol", 2 * self.half + 99, f"{seed}/file", tally)
        self.rig.mount()
        extents = nasty_extents(0, self.half, self.rng, 200_000)
        self.stamper = Stamper(self.rig.replica, extents, 3, seed=seed)
        machine.later(self.stamper.stop)
        self.turn = 0
        self.by_fio = bytes(self.half)

    def tick(self) -> int:
        """A moment on the stamping writers' clock."""
        return self.stamper.tick()

    def run(self) -> str:
        """One round; what happened, in words."""
        self.turn += 1
        rig, stamper = self.rig, self.stamper
        images: dict[int, tuple[bytes, int, int]] = {}

        def note(number: int, called: int, answered: int) -> None:
            images[number] = read_direct(rig.point(number), 0, self.half), called, answered

        # Opened by name: the server is another one each time.
        stamper.start(read_direct(rig.replica, 0, self.half))
        block = self.rng.choice((512, 4096, 8192, 65536))
        load = self._fio(block)
        asked = self.points_meanwhile(note)
        stamper.stop()
        result = load.end(30)
        assert result["error"] != 0, "fio did not meet the kill"
        self.settle(asked, note)
        now = stamper.tick()
        for number, (image, called, answered) in images.items():
            try:
                stamper.check(image, called, answered)
            except AssertionError:
                # Taken after the kill it has all that was acknowledged, and parts of what was not.
                if number != self.in_doubt:
                    raise
                stamper.check(image, now, now, torn=True)
        stamper.check(read_direct(rig.replica, 0, self.half), now, now, torn=True)
        by_fio = self._check_fio(block)
        self.tally.acknowledged += stamper.acknowledged + by_fio
        return f"file: {stamper.acknowledged} + {by_fio} writes acknowledged"

    def _pattern(self, offset: int) -> bytes:
        return b"turn" + self.turn.to_bytes(4, "big") + offset.to_bytes(8, "little")

    def _fio(self, block: int) -> Fio:
        self._log = self.machine.base / f"{self.rig.directory.name}_clat.1.log"
        begun = self.machine.base / "begun"
        for file in (self._log, begun):
            file.unlink(missing_ok=True)
        load = Fio(
            self.machine.base,
            "load",
            filename=self.rig.replica,
            offset=self.half,
            size=self.half - self.half % block,
            rw="randwrite",
            bs=block,
            ioengine="libaio",
            direct=1,
            iodepth=self.rng.choice((1, 8, 32)),
            randseed=self.rng.randrange(1 << 30),
            time_based=1,
            runtime=60,
            verify="pattern",
            # Says in which turn and where: 8 bytes of the one, 8 of the other, and so on.
            verify_pattern=f'"turn"0x{self.turn:08x}%o',
            do_verify=0,
            write_lat_log=self.rig.directory.name,
            log_offset=1,
            exec_prerun=f"touch {begun}",
        )
        self.machine.later(load.kill)
        until(begun.exists)
        return load

    def _check_fio(self, block: int) -> int:
        """How many writes fio was told of. AssertionError if one of them is not there."""
        lines = self._log.read_text().splitlines() if self._log.exists() else []
        told = [int(line.split(",")[4]) for line in lines]
        acknowledged = set(told)
        after = read_direct(self.rig.replica, self.half, self.half)
        for start in range(0, self.half - self.half % block, block):
            offset = self.half + start
            content, before = after[start : start + block], self.by_fio[start : start + block]
            new = self._pattern(offset) * (block // 16)
            if offset in acknowledged:
                assert content == new, f"fio's write at {offset} was acknowledged and is not there"
            elif content not in (before, new):
                # It was under way: any of its bytes may have come.
                assert all(
                    byte in pair for byte, *pair in zip(content, before, new, strict=True)
                ), f"at {offset} is neither what was there nor what fio wrote"
        self.by_fio = after
        return len(told)


class Records:
    """A thread that appends records to a file and syncs each; whoever reads it knows them all."""

    def __init__(self, path: Path, seed: str) -> None:
        self.path = path
        self._seed = seed
        self._stop = threading.Event()
        self.synced = 0
        self._thread = threading.Thread(target=self._write, daemon=True)
        self._thread.start()

    def _record(self, count: int) -> bytes:
        rng = random.Random(f"{self._seed}/{count}")
        return rng.randbytes(rng.choice((1, 100, 4096, 30_000)))

    def _write(self) -> None:
        with suppress(OSError):
            fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            try:
                folder = os.open(self.path.parent, os.O_RDONLY)
                os.fsync(folder)
                os.close(folder)
                while not self._stop.is_set():
                    data = self._record(self.synced)
                    if os.write(fd, data) != len(data):
                        return
                    os.fdatasync(fd)
                    self.synced += 1
            finally:
                os.close(fd)

    def end(self) -> None:
        """Stop it; returns when its last write was answered."""
        self._stop.set()
        self._thread.join(60)
        assert not self._thread.is_alive(), "a write is never answered"

    def check(self, path: Path, count: int) -> None:
        """AssertionError unless the first `count` records are in `path`."""
        wanted = b"".join(map(self._record, range(count)))
        found = path.read_bytes() if path.exists() else b""
        assert len(found) >= len(wanted), f"{path} ends before record {count}"
        assert found[: len(wanted)] == wanted, f"a synced record of {path} is not what it was"


class Ext4Rounds(Rounds):
    """fio and records that are synced on an ext4 over a loop device. Needs root."""

    def __init__(self, machine: Machine, seed: int, tally: Tally) -> None:
        super().__init__(machine, "disk", 96 * MIB, f"{seed}/ext4", tally)
        self.files = machine.base / "files"
        self.files.mkdir()
        self.seed = seed
        self.turn = 0
        self.records: Records
        self.rig.mount()
        self.device = self.rig.attach()
        sh("mkfs.ext4", "-q", self.device)

    def tick(self) -> int:
        """How many records have been synced by now."""
        return self.records.synced

    def run(self) -> str:
        """One round; what happened, in words."""
        self.turn += 1
        base, rig, files = self.machine.base, self.rig, self.files
        sh("mount", self.device, files)
        self.machine.later(quiet, "umount", "-l", files)
        self.records = Records(files / f"records{self.turn}", f"{self.seed}/{self.turn}")
        load = Fio(
            base,
            "ext4",
            directory=files,
            size="16M",
            numjobs=2,
            rw="randwrite",
            bsrange="1k-64k",
            ioengine="psync",
            fsync=16,
            time_based=1,
            runtime=60,
        )
        self.machine.later(load.kill)
        held: dict[int, int] = {}

        def note(number: int, called: int, _answered: int) -> None:
            held[number] = called

        until(lambda: self.records.synced > 0)
        asked = self.points_meanwhile(note)
        load.end(60)
        self.records.end()
        sh("umount", "-l", files)
        sh("losetup", "--detach", self.device)
        until(lambda: not Path(f"/sys/block/{self.device[5:]}/loop").exists())
        self.settle(asked, note)
        self.device = rig.attach()
        if self.turn % 2:
            # By fsck instead of by mounting: it replays the journal too, and says if all is well.
            fsck(Path(self.device))
        sh("mount", self.device, files)
        self.records.check(self.records.path, self.records.synced)
        sh("umount", files)
        fsck(Path(self.device), "-n")
        self._look_into_a_point(held)
        sh("mount", self.device, files)
        self.records.path.unlink()
        sh("umount", files)
        self.tally.synced += self.records.synced
        return f"ext4: {self.records.synced} records synced"

    def _look_into_a_point(self, held: dict[int, int]) -> None:
        """A point is a file system cut off in mid-flight: whole, with what was synced by then."""
        number = max(held)
        if number not in self.checksums:
            return  # It has been deleted since.
        copy, place = self.machine.base / "point.img", self.machine.base / "inside"
        copy.write_bytes(read_direct(self.rig.point(number)))
        assert hashlib.sha256(copy.read_bytes()).hexdigest() == self.checksums[number]
        fsck(copy)
        place.mkdir(exist_ok=True)
        sh("mount", "-o", "loop", copy, place)
        try:
            self.records.check(place / self.records.path.name, held[number])
        finally:
            sh("umount", place)
            copy.unlink()


def fsck(device: Path, how: str = "-y") -> None:
    """AssertionError if the file system is not whole (after replaying its journal, with -y)."""
    done = quiet("fsck.ext4", "-f", how, device)
    allowed = (0, 1) if how == "-y" else (0,)
    assert done.returncode in allowed, f"fsck of {device}: {done.stdout}{done.stderr}"
