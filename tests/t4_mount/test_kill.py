"""SIGKILL of the serving process at any instant: nothing acknowledged is lost, no point changes."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import chance
import pytest
from killing import all_points_exact, mount_again
from mounted_rig import MIB, Fio, Machine, Rig, quiet, read_direct, report, sh, sha256, until
from stamps import Stamper, nasty_extents

from vsnapfs.diffarea.layout import SUPERBLOCK_SIZE
from vsnapfs.diffarea.superblock import decode
from vsnapfs.errors import VsnapError

pytestmark = [pytest.mark.needs_fuse, pytest.mark.slow]

SEED = chance.seed(20261122)


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> random.Random:
    """What is done, and how long it is waited. Where the server is by then, nobody knows."""
    return random.Random(f"{SEED}/{request.node.name}")


def forget_oldest(rig: Rig, checksums: dict[int, str], keep: int) -> None:
    """Delete points until `keep` are left."""
    while len(checksums) > keep:
        oldest = min(checksums)
        rig.call("rp_delete", point=oldest)
        del checksums[oldest]


# ---- under load ---------------------------------------------------------------------------------


@pytest.mark.needs_fio
def test_ten_kills_under_fio_and_a_stamping_writer(
    machine: Machine, rng: random.Random, record_property: Callable[[str, object], None]
) -> None:
    """Ten times: all that was acknowledged before the kill is there, all points are exact."""
    half = 16 * MIB
    rig = machine.rig(size=2 * half + 99, area=1024 * MIB)
    stamper = Stamper(rig.replica, nasty_extents(0, half, rng, 200_000), 3, seed=SEED)
    machine.later(stamper.stop)
    rig.mount()
    checksums: dict[int, str] = {}
    acknowledged = 0
    for turn in range(10):
        stamper.start(read_direct(rig.replica, 0, half))
        load = Fio(
            machine.base,
            f"load{turn}",
            filename=rig.replica,
            offset=half,
            size=half,
            rw="randwrite",
            bsrange="512-256k",
            bs_unaligned=1,
            ioengine="libaio",
            direct=1,
            iodepth=16,
            time_based=1,
            runtime=60,
        )
        machine.later(load.kill)
        for _ in range(rng.choice((1, 2))):
            time.sleep(rng.uniform(0.05, 0.4))
            called = stamper.tick()
            number = rig.create_point()
            answered = stamper.tick()
            image = read_direct(rig.point(number))
            checksums[number] = sha256(rig.point(number), direct=True)
        time.sleep(rng.uniform(0, 0.5))
        rig.kill()
        stamper.stop()
        load.end(60)
        stamper.check(image, called, answered)
        mount_again(rig)
        assert rig.event_ids()[-2:] == [1042, 1001]
        now = stamper.tick()
        stamper.check(read_direct(rig.replica, 0, half), now, now, torn=True)
        acknowledged += stamper.acknowledged
        all_points_exact(rig, checksums)
        forget_oldest(rig, checksums, keep=4)
    assert rig.status()["state"] == "online"
    report(record_property, "kill rounds", 10)
    report(record_property, "acknowledged writes over all kills", acknowledged)


@pytest.mark.needs_fio
def test_what_was_acknowledged_to_fio_at_depth_32_survives_a_kill(
    machine: Machine, rng: random.Random, record_property: Callable[[str, object], None]
) -> None:
    """Each block that fio's log lists as completed holds its own pattern after the remount."""
    size, block = 64 * MIB, 8192
    rig = machine.rig(size=size, area=512 * MIB, zero_blocks="copy")  # "used" tells how far it is
    rig.mount()
    rig.create_point()
    writing = Fio(
        machine.base,
        filename=rig.replica,
        size=size,
        rw="randwrite",
        bs=block,
        ioengine="libaio",
        direct=1,
        iodepth=32,
        randseed=SEED,
        verify="pattern",
        verify_pattern="%o",  # each 8 bytes of a block say where the block is
        do_verify=0,
        write_lat_log="acknowledged",
        log_offset=1,
        time_based=1,  # should all be written before the kill, it writes the same once more
        runtime=100,
    )
    machine.later(writing.kill)
    # Somewhere in the middle.
    begun = rng.uniform(4, 32) * MIB
    until(lambda: rig.status()["diff_area"]["used"] > begun, pause=0.01)
    rig.kill()
    assert writing.end(60)["error"] != 0
    lines = (machine.base / "acknowledged_clat.1.log").read_text().splitlines()
    offsets = [int(line.split(",")[4]) for line in lines]
    assert len(offsets) > 10
    mount_again(rig)
    image = read_direct(rig.replica)
    lost = [
        offset
        for offset in offsets
        if image[offset : offset + block] != offset.to_bytes(8, "little") * (block // 8)
    ]
    assert not lost, f"{len(lost)} of {len(offsets)} acknowledged writes are lost"
    report(record_property, "writes acknowledged to fio before a kill", len(offsets))
    assert rig.call("verify")["ok"]
    assert read_direct(rig.point(1)) == bytes(size)


@pytest.mark.needs_loop
@pytest.mark.needs_fio
def test_a_kill_under_a_busy_ext4_on_the_loop_device(machine: Machine, rng: random.Random) -> None:
    """ext4 recovers by itself and by fsck, files that were fsynced are there, points are exact."""
    rig = machine.rig(size=128 * MIB, area=1024 * MIB)
    files = machine.base / "files"
    files.mkdir()
    rig.mount()
    device = rig.attach()
    sh("mkfs.ext4", "-q", device)
    checksums: dict[int, str] = {}
    kept: dict[str, bytes] = {}
    for turn in range(3):
        sh("mount", device, files)
        for name, content in kept.items():
            assert (files / name).read_bytes() == content
        load = Fio(
            machine.base,
            "ext4",
            directory=files,
            size="24M",
            numjobs=2,
            rw="randwrite",
            bsrange="1k-64k",
            ioengine="psync",
            fsync=16,
            time_based=1,
            runtime=60,
        )
        machine.later(load.kill)
        time.sleep(rng.uniform(0.3, 0.8))
        number = rig.create_point()
        checksums[number] = sha256(rig.point(number), direct=True)
        name, content = f"kept{turn}", rng.randbytes(rng.randrange(1, MIB))
        with open(files / name, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        kept[name] = content
        time.sleep(rng.uniform(0, 0.5))
        rig.kill()
        load.end(40)
        sh("umount", "-l", files)
        sh("losetup", "--detach", device)
        until(lambda gone=device: not Path(f"/sys/block/{gone[5:]}/loop").exists())
        mount_again(rig)
        all_points_exact(rig, checksums)
        device = rig.attach()
        if turn == 1:
            # By fsck instead of by mounting: it replays the journal too, and says if all is well.
            done = quiet("fsck.ext4", "-f", "-y", device)
            assert done.returncode in (0, 1), done.stdout + done.stderr
    sh("mount", device, files)
    for name, content in kept.items():
        assert (files / name).read_bytes() == content
    sh("umount", files)
    sh("fsck.ext4", "-f", "-n", device)
    # A point, too, is a file system that was cut off in mid-flight, and whole.
    copy = machine.base / "point.img"
    copy.write_bytes(read_direct(rig.point(max(checksums))))
    done = quiet("fsck.ext4", "-f", "-y", copy)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    rig.detach()


# ---- in the middle of a command -----------------------------------------------------------------


class Interrupted:
    """Runs an operation in a thread and kills the server at a random instant of it."""

    def __init__(self, rig: Rig, rng: random.Random) -> None:
        self._rig = rig
        self._rng = rng
        self.typical = 0.02  # seconds the operation takes, as far as is known

    def run(self, op: str, **params: Any) -> Any:
        """The result of the operation, or None when the kill came first. Mounts again."""
        outcome: list[Any] = []
        took: list[float] = []

        def ask() -> None:
            started = time.monotonic()
            try:
                outcome.append(self._rig.call(op, **params) or True)
                took.append(time.monotonic() - started)
            except VsnapError as error:
                if error.code not in ("server-gone", "no-answer", "busy"):
                    outcome.append(error)

        # Killed before it was even asked, the next server may be asked; that is right, too.
        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        time.sleep(self._rng.uniform(0, 1.3 * self.typical))
        if took:
            self.typical = (self.typical + took[0]) / 2
        self._rig.kill()
        mount_again(self._rig)
        asking.join(30)
        assert not asking.is_alive()
        if outcome and isinstance(outcome[0], VsnapError):
            raise outcome[0]
        return outcome[0] if outcome else None


@pytest.fixture
def changing(machine: Machine) -> Rig:
    """A mounted volume whose three points differ from each other and from the replica."""
    rig = machine.rig(size=8 * MIB + 5, area=128 * MIB)
    rig.mount()
    rng = random.Random(8)
    for _ in range(3):
        for _ in range(20):
            length = rng.randrange(1, 200_000)
            rig.write(
                rng.randrange(rig.status()["replica"]["size"] - length), rng.randbytes(length)
            )
        rig.create_point()
    rig.write(0, rng.randbytes(4 * MIB))
    return rig


def test_kills_while_a_point_is_created(changing: Rig, rng: random.Random) -> None:
    """The new point is there whole or not at all, surely if it was answered; numbers go on."""
    rig = changing
    checksums = {number: sha256(rig.point(number), direct=True) for number in rig.points()}
    interrupted = Interrupted(rig, rng)
    for turn in range(8):
        now = sha256(rig.replica)
        answer = interrupted.run("rp_create", label=f"turn {turn}")
        new = set(rig.points()) - set(checksums)
        assert len(new) <= 1
        if answer is not None:
            assert new == {answer["number"]}
        for number in new:
            assert number > max(checksums)
            checksums[number] = now
        all_points_exact(rig, checksums)
        assert sha256(rig.replica) == now
        rig.write(rng.randrange(4 * MIB), rng.randbytes(300_000))


def test_kills_while_a_point_is_deleted(changing: Rig, rng: random.Random) -> None:
    """The point is gone or whole, surely gone if that was answered; the others are exact."""
    rig = changing
    checksums = {number: sha256(rig.point(number), direct=True) for number in rig.points()}
    interrupted = Interrupted(rig, rng)
    interrupted.typical = 0.01
    for _ in range(8):
        while len(checksums) < 4:
            rig.write(rng.randrange(4 * MIB), rng.randbytes(300_000))
            number = rig.create_point()
            checksums[number] = sha256(rig.point(number), direct=True)
        victim = rng.choice(sorted(checksums))
        answer = interrupted.run("rp_delete", point=victim)
        if victim not in rig.points():
            del checksums[victim]
        else:
            assert answer is None
        all_points_exact(rig, checksums)


def test_kills_while_the_diff_area_is_resized(changing: Rig, rng: random.Random) -> None:
    """The maximum is the old or the new one, surely the new if answered; used ≤ allocated ≤ it."""
    rig = changing
    checksums = {number: sha256(rig.point(number), direct=True) for number in rig.points()}
    rig.write(0, rng.randbytes(8 * MIB))
    rig.call("rp_delete", point=1)
    del checksums[1]  # its slots lie low: shrinking has something to move
    least = rig.status()["diff_area"]["minimum"]
    interrupted = Interrupted(rig, rng)
    for turn in range(8):
        before = rig.status()["diff_area"]["maximum"]
        wanted = least if turn % 2 == 0 else 128 * MIB + turn
        answer = interrupted.run("resize", total=wanted)
        sizes = rig.status()["diff_area"]
        assert sizes["maximum"] == wanted or (answer is None and sizes["maximum"] == before)
        assert sizes["used"] <= sizes["allocated"] <= sizes["maximum"]
        assert rig.area.stat().st_size == sizes["allocated"]
        all_points_exact(rig, checksums)


def test_a_stop_between_the_two_copies_of_a_commit(changing: Rig) -> None:
    """One superblock copy a generation ahead is healed at the next mount, and no fault 15."""
    rig = changing
    checksums = {number: sha256(rig.point(number), direct=True) for number in rig.points()}
    rig.kill()
    with rig.area.open("r+b") as area:
        now = decode(area.read(SUPERBLOCK_SIZE))
        area.seek(0)
        area.write(replace(now, generation=now.generation + 1).encode())
    mount_again(rig)
    assert rig.event_ids()[-3:] == [1041, 1042, 1001]
    assert rig.status()["state"] == "online"
    all_points_exact(rig, checksums)


def test_kills_while_a_point_is_restored(
    machine: Machine, rng: random.Random, record_property: Callable[[str, object], None]
) -> None:
    """The restore goes on at the next mount (events 64, 65, 66); then replica and point agree."""
    size = 24 * MIB + 5
    rig = machine.rig(size=size, area=512 * MIB)
    rig.mount()
    checksums: dict[int, str] = {}
    for _ in range(3):
        rig.write(rng.randrange(5 * MIB), rng.randbytes(18 * MIB))
        number = rig.create_point()
        checksums[number] = sha256(rig.point(number), direct=True)
    interrupted = Interrupted(rig, rng)
    interrupted.typical = 0.5
    continued = 0
    for turn in range(6):
        number = (1, 3, 2)[turn % 3]
        before = len(rig.events())
        image = sha256(rig.replica)
        answer = interrupted.run("rp_restore", point=number)
        ids = [event for event in rig.event_ids()[before:] if event in (64, 65, 66)]
        # Killed between 66 and the end of the mark that asks for it, it is said to be done twice.
        assert ids in ([], [64, 66], [64, 65, 66], [65, 66], [64, 66, 65, 66]), ids
        continued += 65 in ids
        restored = sha256(rig.replica)
        if ids or answer is not None:
            assert restored == checksums[number]
        else:
            assert restored == image
        assert not rig.status()["restoring"]
        all_points_exact(rig, checksums)
    report(record_property, "restores continued after a kill", f"{continued} of 6")
    # Once for certain: killed as soon as the log says that writing has begun. A fast machine may
    # be done before; then again, with a point that differs.
    ids: list[int] = []
    for number in (1, 2, 3) * 10:
        if ids == [64, 65, 66] or sha256(rig.replica) == checksums[number]:
            continue
        ids = killed_once_begun(rig, number)
        assert sha256(rig.replica) == checksums[number]
        all_points_exact(rig, checksums)
    assert ids == [64, 65, 66]


def killed_once_begun(rig: Rig, number: int) -> list[int]:
    """Restore a point, with a SIGKILL after event 64. Mounts again; the events of the restore."""
    before = len(rig.events())

    def kill() -> None:
        until(lambda: 64 in rig.event_ids()[before:], pause=0.001)
        rig.kill()

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    with suppress(VsnapError):
        rig.call("rp_restore", point=number)
    killer.join(30)
    mount_again(rig)
    return [event for event in rig.event_ids()[before:] if event in (64, 65, 66)]
