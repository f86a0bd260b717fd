"""W5 for real: two users, two /dev/shm, two copies of one volume; odd sizes of the ring."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from house import ROOT
from mounted_rig import MIB, Machine, Rig, alive, quiet, until, vsnapfs, write_all

from vsnapfs.backing import FileBacking
from vsnapfs.belonging import give_to_owner
from vsnapfs.config import load
from vsnapfs.daemon.listening import ControlSocket
from vsnapfs.daemon.process import open_log
from vsnapfs.volume.create import create_volume

pytestmark = pytest.mark.needs_fuse
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="takes root: a second uid, a namespace")

NOBODY = 65534
BLOCK = 16384
COUNT = 40
LEAVE = str(ROOT / "tests" / "leave_ring.py")


@pytest.fixture
def base() -> Iterator[Path]:
    """A directory that every user may enter, gone afterwards with the rings of what was in it."""
    with tempfile.TemporaryDirectory(prefix="vsnapfs-two-") as name:
        os.chmod(name, 0o755)
        yield Path(name)
        for found in Path(name).glob("*/volume.toml"):
            for ring in rings(found.parent):
                ring.unlink()


def rings(volume: Path) -> list[Path]:
    return sorted(Path("/dev/shm").glob(f"vsnapfs-{load(volume).volume_id}-*"))


def as_nobody(*command: str | Path, cwd: str | Path = "/") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        list(map(str, command)), user=NOBODY, group=NOBODY, extra_groups=(), cwd=cwd,
        stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip


def left_by(user: int, base: Path) -> Path:
    """A volume of `user`, whose server has died with COUNT acknowledged blocks in the ring."""
    volume = base / "vol"
    create_volume(volume, size=COUNT * 2 * BLOCK, diff_area_size=16 * MIB)
    for path in (volume, *volume.iterdir()):
        os.chown(path, user, user)
    command = [sys.executable, LEAVE, volume, COUNT]
    done = as_nobody(*map(str, command)) if user else quiet(*map(str, command))
    assert done.returncode == -signal.SIGKILL, done.stderr
    (ring,) = rings(volume)
    assert ring.stat().st_uid == user
    return volume


def blocks_of(letter: bytes, image: bytes) -> int:
    return sum(image[at : at + BLOCK] == letter * BLOCK for at in range(0, len(image), BLOCK))


def carried_out(volume: Path) -> None:
    image = (volume / "replica.img").read_bytes()
    assert (blocks_of(b"x", image), blocks_of(b"o", image)) == (COUNT, COUNT)
    log = (volume / "events.jsonl").read_text()
    assert '"event_id":1043' not in log.replace(" ", "")
    assert not rings(volume)


def stays_closed(volume: Path, base: Path, reason: str) -> None:
    """Every command says so; points can be listed and exported; nothing changes."""
    before = {path.name: path.read_bytes() for path in volume.iterdir() if path.is_file()}
    text = vsnapfs("status", volume, code=1)
    assert "closed" in text
    assert "no write buffer" not in text
    assert "nothing in the write buffer" not in text
    assert reason in text
    (found,) = json.loads(quiet(sys.executable, "-m", "vsnapfs", "status", volume, "--json").stdout)
    assert found["state"] == "closed"
    assert reason in found["trouble"]
    assert "before" in vsnapfs("recovery-point", "list", volume)
    vsnapfs("recovery-point", "export", volume, "before", base / "out.img")
    assert blocks_of(b"o", (base / "out.img").read_bytes()) == 2 * COUNT
    vsnapfs("verify", volume)
    (base / "mnt").mkdir(exist_ok=True)
    for command in (
        ("mount", volume, base / "mnt"),
        ("recovery-point", "create", volume),
        ("recovery-point", "delete", volume, "before"),
        ("recovery-point", "restore", volume, "before"),
        ("online", volume),
        ("offline", volume),
        ("repair", volume),
    ):
        assert reason in vsnapfs(*command, code=1), command
    after = {path.name: path.read_bytes() for path in volume.iterdir() if path.is_file()}
    after.pop("server.log", None)
    assert after == before


# -- two users ------------------------------------------------------------------------------------


@needs_root
def test_root_carries_out_what_a_users_server_left(base: Path) -> None:
    """`status` as root, after a SIGKILL of the owner's server: nothing is lost."""
    volume = left_by(NOBODY, base)
    vsnapfs("status", volume)
    carried_out(volume)


@needs_root
def test_root_mounts_what_a_users_server_left(base: Path) -> None:
    """And what is acknowledged after that lies in a ring of root's own."""
    volume = left_by(NOBODY, base)
    (base / "mnt").mkdir()
    vsnapfs("mount", volume, base / "mnt")
    try:
        with (base / "mnt" / "replica.img").open("r+b", buffering=0) as file:
            file.seek(COUNT * BLOCK)
            file.write(b"y" * BLOCK)
        assert all(ring.stat().st_uid == 0 for ring in rings(volume))
    finally:
        vsnapfs("umount", volume)
    image = (volume / "replica.img").read_bytes()
    assert (blocks_of(b"x", image), blocks_of(b"y", image)) == (COUNT, 1)


@needs_root
def test_what_root_makes_in_a_users_volume_is_the_users(base: Path) -> None:
    """A diff area after giving up, a state file, the logs: the owner opens the volume with them."""
    os.chown(base, NOBODY, NOBODY)
    volume = base / "vol"
    sizes = ("--size", "1MiB", "--diff-area-size", "16MiB")
    done = as_nobody(sys.executable, "-m", "vsnapfs", "create", volume, *sizes, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    for name in ("state", "events.jsonl"):
        (volume / name).unlink()
    vsnapfs("offline", volume)
    (volume / "diff-area").unlink()
    vsnapfs("online", volume, "--give-up-recovery-points", "--yes")
    os.close(open_log(volume))
    made = {path.name: path.stat() for path in volume.iterdir()}
    assert {"diff-area", "state", "events.jsonl", "server.log"} < made.keys()
    assert {name: (at.st_uid, at.st_gid) for name, at in made.items()} == dict.fromkeys(
        made, (NOBODY, NOBODY)
    )
    done = as_nobody(sys.executable, "-m", "vsnapfs", "status", volume, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "vol: online" in done.stdout


@needs_root
@pytest.mark.parametrize("why", ["another link", "another file"])
def test_root_gives_away_only_what_lies_in_the_owners_directory(base: Path, why: str) -> None:
    """Nothing that has another name, or is not what the name names by now."""
    folder = base / "folder"
    folder.mkdir()
    os.chown(folder, NOBODY, NOBODY)
    with (base / "elsewhere" if why == "another file" else folder / "file").open("w") as file:
        if why == "another link":
            os.link(folder / "file", base / "link")
        elif why == "another file":
            (folder / "file").touch()
        give_to_owner(file.fileno(), folder / "file")
        assert os.fstat(file.fileno()).st_uid == 0


@needs_root
def test_a_user_is_told_who_can_carry_out_what_roots_server_left(base: Path) -> None:
    """The volume stays closed for him, and root loses nothing by his looking.

    He may not even ask the socket that root's server left whether anybody listens.
    """
    volume = left_by(0, base)
    for path in (volume, *volume.iterdir()):
        os.chown(path, NOBODY, NOBODY)
    left = ControlSocket(volume)
    left.listen()
    left.take().close()
    done = as_nobody(sys.executable, "-m", "vsnapfs", "status", volume, cwd=ROOT)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "uid 0" in done.stdout
    assert len(rings(volume)) == 1
    vsnapfs("status", volume)
    carried_out(volume)


@needs_root
def test_a_user_is_told_that_somebody_serves_his_volume(base: Path) -> None:
    """A server of root's does not listen to him: that is no reason to say that there is none."""
    volume = base / "vol"
    create_volume(volume, size=MIB, diff_area_size=16 * MIB)
    os.chown(volume, NOBODY, NOBODY)
    for path in volume.iterdir():
        os.chown(path, NOBODY, NOBODY)
    (base / "mnt").mkdir()
    vsnapfs("mount", "--accept-changed-replica", volume, base / "mnt")
    try:
        for command in (("status",), ("umount",), ("rp", "list")):
            done = as_nobody(sys.executable, "-m", "vsnapfs", *command, volume, cwd=ROOT)
            assert done.returncode == 1, (command, done.stdout)
            assert "Permission denied" in done.stderr, command
    finally:
        vsnapfs("umount", volume)


@pytest.mark.slow
@needs_root
def test_root_stays_out_of_a_strangers_ring(base: Path) -> None:
    """The replica has been given to somebody else: closed, whoever could do it is named."""
    volume = left_by(NOBODY, base)
    for path in (volume, *volume.iterdir()):
        os.chown(path, 0, 0)
    stays_closed(volume, base, f"uid {NOBODY}")
    os.chown(volume / "replica.img", NOBODY, NOBODY)
    vsnapfs("status", volume)
    carried_out(volume)


@needs_root
def test_an_inode_number_given_out_again_is_another_replica(base: Path) -> None:
    """Where the file system counts the lives of an inode, each has a number of its own."""
    kernel = base / "a"
    seen = []
    for _ in range(2):
        backing = FileBacking.create(kernel)
        seen.append(backing.file_id())
        backing.close()
        kernel.unlink()
    first, second = seen
    if not first.born:
        pytest.skip("this file system does not tell")
    assert first.inode != second.inode or first.born != second.born


# -- two /dev/shm ---------------------------------------------------------------------------------


class OwnShm:
    """A mount namespace with a /dev/shm of its own, as a container or a service has it."""

    def __init__(self) -> None:
        script = "mount -t tmpfs -o size=64m own-shm /dev/shm && echo ready && exec sleep 600"
        self.process = subprocess.Popen(
            ["unshare", "--mount", "--propagation", "private", "sh", "-c", script],
            stdout=subprocess.PIPE,
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == b"ready\n"

    def run(self, *command: str | Path) -> subprocess.CompletedProcess[str]:
        return quiet("nsenter", f"--mount=/proc/{self.process.pid}/ns/mnt", *command)

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


@pytest.fixture
def own_shm() -> Iterator[OwnShm]:
    made = OwnShm()
    yield made
    made.end()


@pytest.mark.slow
@needs_root
def test_what_a_container_acknowledged_is_not_lost_outside(base: Path, own_shm: OwnShm) -> None:
    """Seen from outside the volume stays closed and says where; inside nothing has been lost."""
    volume = base / "vol"
    create_volume(volume, size=COUNT * 2 * BLOCK, diff_area_size=16 * MIB)
    own_shm.run(sys.executable, LEAVE, volume, str(COUNT))
    assert not rings(volume)
    stays_closed(volume, base, "another tmpfs")
    done = own_shm.run(sys.executable, "-m", "vsnapfs", "status", volume)
    assert done.returncode == 0, done.stdout + done.stderr
    carried_out(volume)


@needs_root
def test_a_part_of_the_tmpfs_in_its_place_is_no_proof_that_a_ring_is_gone(base: Path) -> None:
    """A sandbox sees a subdirectory of the machine's /dev/shm as its own, under the same device
    number: closed there; outside nothing has been lost.
    """
    volume = base / "vol"
    create_volume(volume, size=COUNT * 2 * BLOCK, diff_area_size=16 * MIB)
    quiet(sys.executable, LEAVE, volume, str(COUNT))
    assert rings(volume)
    part = Path(tempfile.mkdtemp(prefix="vsnapfs-test-", dir="/dev/shm"))
    try:
        seen = quiet(
            *("unshare", "--mount", "--propagation", "private", "sh", "-c"),
            'mount --bind "$0" /dev/shm && exec "$@"',
            *(part, sys.executable, "-m", "vsnapfs", "recovery-point", "create", volume),
        )
    finally:
        part.rmdir()
    assert seen.returncode == 1, seen.stdout + seen.stderr
    assert "cannot be seen from here" in seen.stderr
    assert rings(volume)
    vsnapfs("status", volume)
    carried_out(volume)


_HIDE = """
import subprocess, sys
from pathlib import Path
from vsnapfs.backing import FileId
from vsnapfs.volume.shm import SharedMemory, Unusable
top, replica = Path(sys.argv[1]), FileId(1, 2, 0)
inside, beside = top / "inside", top / "beside"
inside.mkdir()
beside.mkdir()
ring = SharedMemory((inside,)).make(1 << 20, b"v" * 16, replica)
ring.close()
def look(directory):
    try:
        SharedMemory((directory,)).find(ring.name, b"v" * 16, replica)
    except FileNotFoundError:
        return "gone"
    except Unusable as error:
        return error.reason
print(look(beside))
subprocess.run(["mount", "--bind", beside, inside], check=True)
print(look(top))
subprocess.run(["umount", inside], check=True)
next(inside.iterdir()).unlink()
print(look(top), look(beside))
"""


@needs_root
def test_what_a_mount_hides_or_lies_beside_is_not_gone(tmp_path: Path) -> None:
    """A ring that a sandbox made in a directory of a tmpfs is not gone where something is mounted
    over that directory, nor where another directory of that tmpfs is /dev/shm.
    """
    done = quiet(
        *("unshare", "--mount", "--propagation", "private", "sh", "-c"),
        'mount -t tmpfs own "$2" && exec "$0" -c "$1" "$2"',
        *(sys.executable, _HIDE, tmp_path),
    )
    assert done.returncode == 0, done.stderr
    beside, hidden, gone = done.stdout.splitlines()
    assert f"it lies in {tmp_path}/inside" in beside
    assert "cannot be seen from here" in hidden
    assert gone == "gone gone"


@pytest.mark.slow
@needs_root
def test_a_write_buffer_that_ended_with_its_container_can_be_given_up(
    base: Path, own_shm: OwnShm
) -> None:
    """Only on request, which is logged; then the volume is what a power failure would leave."""
    volume = base / "vol"
    create_volume(volume, size=COUNT * 2 * BLOCK, diff_area_size=16 * MIB)
    own_shm.run(sys.executable, LEAVE, volume, str(COUNT))
    own_shm.end()
    stays_closed(volume, base, "another tmpfs")
    refused = quiet(
        sys.executable, "-m", "vsnapfs", "mount", volume, base / "mnt", "--give-up-write-buffer"
    )
    assert refused.returncode == 1, "without a terminal it must be told --yes"
    vsnapfs("mount", volume, base / "mnt", "--give-up-write-buffer", "--yes")
    try:
        text = vsnapfs("status", volume)
        assert "online" in text
        image = (base / "mnt" / "replica.img").read_bytes()
        assert blocks_of(b"o", image) == 2 * COUNT
        assert "given up on request" in vsnapfs("events", volume)
    finally:
        vsnapfs("umount", volume)
    vsnapfs("status", volume)


@needs_root
def test_a_mount_in_a_container_warns(base: Path, own_shm: OwnShm) -> None:
    """Its /dev/shm is not the machine's: said at the mount, in the status and in the log."""
    volume, place = base / "vol", base / "mnt"
    place.mkdir()
    create_volume(volume, size=MIB, diff_area_size=16 * MIB)
    done = own_shm.run(sys.executable, "-m", "vsnapfs", "mount", volume, place)
    assert done.returncode == 0, done.stderr
    try:
        assert "/dev/shm" in done.stderr
        assert "/dev/shm" in vsnapfs("status", volume)
        assert '"event_id":1055' in (volume / "events.jsonl").read_text().replace(" ", "")
    finally:
        done = own_shm.run(sys.executable, "-m", "vsnapfs", "umount", volume)
        assert done.returncode == 0, done.stderr


# -- two copies -----------------------------------------------------------------------------------


def copy_of(rig: Rig, machine: Machine, name: str) -> Rig:
    """`cp -a` of the volume's directory, as a rig that is not mounted."""
    other = object.__new__(Rig)
    other.__dict__.update(rig.__dict__)
    other.directory, other.place = rig.directory.parent / name, rig.directory.parent / f"m-{name}"
    other.pid = 0
    other.place.mkdir()
    shutil.copytree(rig.directory, other.directory, ignore=shutil.ignore_patterns("control.sock"))
    machine.rigs.append(other)
    machine.later(other.clean_up)
    return other


def fill(rig: Rig, letter: bytes) -> None:
    """Each block of the replica once, each in a write of its own."""
    with rig.opened() as fd:
        for at in range(BLOCK, 16 * MIB, BLOCK):
            os.pwrite(fd, letter * BLOCK, at)


@pytest.mark.slow
def test_a_copy_served_beside_the_original_shares_nothing(machine: Machine) -> None:
    """Copied while it is served, mounted beside it, both written at once: each has its own."""
    rig = machine.rig(area=128 * MIB)
    rig.mount()
    rig.write(0, os.urandom(16 * MIB))
    rig.create_point()
    rig.write(0, b"x" * BLOCK)
    rig.carried_out()
    copy = copy_of(rig, machine, "copy")
    copy.mount()
    both = [
        threading.Thread(target=fill, args=(one, letter))
        for one, letter in ((rig, b"A"), (copy, b"B"))
    ]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    for one, letter in ((rig, b"A"), (copy, b"B")):
        assert blocks_of(letter, one.replica.read_bytes()) == 1023
        one.unmount()
        assert one.call("verify")["ok"]
        assert blocks_of(letter, one.image.read_bytes()) == 1023
        assert not [e for e in one.events() if e["level"] == "Error"]
        assert one.event_ids().count(1049) == (one is copy)


@pytest.mark.slow
def test_looking_at_a_copy_costs_the_original_nothing(machine: Machine) -> None:
    """`status` of an unclean copy, then a kill of the original under load: nothing is lost."""
    rig = machine.rig(area=128 * MIB)
    rig.mount()
    rig.write(0, os.urandom(16 * MIB))
    rig.create_point()
    rig.write(0, b"x" * BLOCK)
    rig.carried_out()
    copy = copy_of(rig, machine, "copy")
    acknowledged = threading.Event()
    count = 0

    def write() -> None:
        nonlocal count
        with rig.opened() as fd:
            try:
                for at in range(BLOCK, 16 * MIB, BLOCK):
                    os.pwrite(fd, b"A" * BLOCK, at)
                    count += 1
                    if count == 100:
                        acknowledged.set()
            except OSError:
                return

    writer = threading.Thread(target=write)
    writer.start()
    acknowledged.wait()
    copy.call("status")
    rig.kill()
    writer.join()
    rig.mount()
    assert blocks_of(b"A", rig.replica.read_bytes()[BLOCK : (count + 1) * BLOCK]) == count
    assert 1043 not in rig.event_ids()
    assert copy.event_ids().count(1049) == 1
    rig.unmount()


# -- sizes, and being removed ---------------------------------------------------------------------


@pytest.mark.parametrize("size", ["5500000", "4.5MB", "4MiB"])
def test_a_write_buffer_of_any_size_survives_a_kill(machine: Machine, size: str) -> None:
    """Killed after 40 writes; each of them is there after the next mount."""
    rig = machine.rig(area=128 * MIB)
    vsnapfs("mount", rig.directory, rig.place, "--write-buffer", size)
    rig.pid = rig.status()["pid"]
    rig.write(0, os.urandom(16 * MIB))
    rig.create_point()
    with rig.opened() as fd:
        for number in range(COUNT):
            write_all(fd, b"x" * BLOCK, number * BLOCK)
        os.kill(rig.pid, signal.SIGKILL)
    until(lambda: not alive(rig.pid))
    rig.mount()
    assert blocks_of(b"x", rig.replica.read_bytes()) == COUNT
    assert 1043 not in rig.event_ids()
    rig.unmount()


@pytest.mark.parametrize("size", ["1", "64KiB", "4194303", "2TiB"])
def test_a_write_buffer_too_small_or_too_large_is_a_wrong_command_line(
    machine: Machine, size: str
) -> None:
    """Exit code 2, with the limits; nothing is mounted."""
    rig = machine.rig()
    text = vsnapfs("mount", rig.directory, rig.place, "--write-buffer", size, code=2)
    assert "4.0 MiB" in text
    assert not os.path.ismount(rig.place)


def test_a_ring_that_a_cleaner_removed_is_replaced(machine: Machine) -> None:
    """What is acknowledged after that survives a kill again; the log says what happened."""
    rig = machine.rig(area=128 * MIB)
    rig.mount()
    rig.write(0, os.urandom(16 * MIB))
    rig.create_point()
    rig.write(0, b"x" * BLOCK)
    rig.carried_out()
    (ring,) = rings(rig.directory)
    ring.unlink()
    with rig.opened() as fd:
        for number in range(1, COUNT):
            write_all(fd, b"x" * BLOCK, number * BLOCK)
        assert rings(rig.directory) != [ring]
        os.kill(rig.pid, signal.SIGKILL)
    until(lambda: not alive(rig.pid))
    rig.mount()
    assert blocks_of(b"x", rig.replica.read_bytes()) == COUNT
    assert rig.event_ids().count(1053) == 1
    assert 1043 not in rig.event_ids()
    rig.unmount()
