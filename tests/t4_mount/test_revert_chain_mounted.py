"""Revert chains on real mounts: restored in place in every order, all points exact after each."""

from __future__ import annotations

import itertools
import os
import random
import threading
from contextlib import suppress

import pytest
from killing import mount_again
from mounted_rig import MIB, Machine, Rig, read_direct, sh, until

from vsnapfs.errors import VsnapError

pytestmark = pytest.mark.needs_fuse

SIZE = 3 * MIB + 777


def with_points(rig: Rig, count: int, rng: random.Random) -> dict[int, bytes]:
    """Points that differ in parts, in the short last block, and wholly; number → content."""
    size = rig.image.stat().st_size
    rig.write(0, rng.randbytes(size))
    images = {}
    for turn in range(count):
        number = rig.create_point()
        images[number] = read_direct(rig.replica)
        offset, length = ((MIB, MIB), (size - 5, 5), (0, size), (100, 1))[turn % 4]
        rig.write(offset, rng.randbytes(length))
    return images


def exact(rig: Rig, images: dict[int, bytes], content: bytes) -> None:
    """The replica and each point, past the page cache and through it."""
    assert read_direct(rig.replica) == content
    assert rig.replica.read_bytes() == content
    assert rig.points() == sorted(images)
    for number, image in images.items():
        assert read_direct(rig.point(number)) == image, f"point {number} has changed"
        assert rig.point(number).read_bytes() == image, f"point {number} is stale in the cache"


def test_every_order_of_three_points(machine: Machine) -> None:
    """Restore, write, restore an older one, a newer one: 18 restores on one volume, all exact."""
    rig = machine.rig(size=SIZE, area=128 * MIB)
    rig.mount()
    rng = random.Random(1)
    images = with_points(rig, 3, rng)
    for order in itertools.permutations(list(images)):
        for number in order:
            rig.call("rp_restore", point=number)
            exact(rig, images, images[number])
            data, offset = rng.randbytes(100_000), rng.randrange(SIZE - 100_000)
            rig.write(offset, data)
            content = images[number][:offset] + data + images[number][offset + len(data) :]
            exact(rig, images, content)
    assert rig.call("verify")["ok"]
    assert rig.event_ids().count(66) == 18
    rig.unmount()
    rig.mount()
    exact(rig, images, content)


def test_a_chain_with_kills_in_the_middle(machine: Machine) -> None:
    """Each restore is killed when its writing has begun, and goes on at the next mount."""
    rig = machine.rig(size=5 * SIZE, area=256 * MIB)  # so that a restore takes its time
    rig.mount()
    rng = random.Random(2)
    images = with_points(rig, 4, rng)
    continued = 0
    # Some turns more, should every restore have been done before its kill.
    for turn, number in enumerate((4, 2, 3, 1, 4) * 5):
        if turn >= 5 and continued:
            break
        rig.write(rng.randrange(MIB), rng.randbytes(13 * MIB))
        before = len(rig.events())
        killed = threading.Event()

        def kill(before: int = before, killed: threading.Event = killed) -> None:
            until(lambda: {64, 65} & set(rig.event_ids()[before:]), pause=0.001)
            rig.kill()
            killed.set()

        killer = threading.Thread(target=kill, daemon=True)
        killer.start()
        with suppress(VsnapError):  # answered just before the kill, or not
            rig.call("rp_restore", point=number)
        killer.join(30)
        assert killed.is_set()
        mount_again(rig)
        ids = [event for event in rig.event_ids()[before:] if event in (64, 65, 66)]
        assert ids[0] == 64
        assert ids[-1] == 66
        continued += 65 in ids
        exact(rig, images, images[number])
        assert rig.call("verify")["ok"]
    assert continued > 0
    print(f"restores continued after a kill: {continued} of {turn}")


@pytest.mark.needs_loop
def test_a_chain_of_file_systems(machine: Machine) -> None:
    """ext4 on the loop device: each restored state has its own files, whole, and no others."""
    rig = machine.rig(size=48 * MIB, area=256 * MIB)
    rig.mount()
    place = machine.base / "files"
    place.mkdir()
    device = rig.attach()
    sh("mkfs.ext4", "-q", device)
    states: dict[int, dict[str, bytes]] = {}
    files: dict[str, bytes] = {}
    for turn in range(3):
        sh("mount", device, place)
        files[f"only since {turn}"] = os.urandom(300_000 + turn)
        files["the same name"] = os.urandom(2 * MIB)
        for name, content in files.items():
            (place / name).write_bytes(content)
        sh("umount", place)
        states[rig.create_point()] = dict(files)
    for number in (3, 1, 2, 1, 3, 2):
        rig.detach()
        rig.call("rp_restore", point=number)
        device = rig.attach()
        sh("fsck.ext4", "-f", "-n", device)
        sh("mount", device, place)
        try:
            found = {file.name for file in place.iterdir()} - {"lost+found"}
            assert found == set(states[number])
            for name, content in states[number].items():
                assert (place / name).read_bytes() == content
            (place / "written after the restore").write_bytes(os.urandom(MIB))
        finally:
            sh("umount", place)
    rig.detach()
    assert rig.call("verify")["ok"]
