"""Rings as files on tmpfs: private, whole, locked, and removed only by those they belong to."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from vsnapfs.backing import FileBacking, FileId, file_system_type
from vsnapfs.diffarea.superblock import RingName
from vsnapfs.errors import FormatError, VsnapError
from vsnapfs.volume.ring import CURSORS, RECORDS, Ring
from vsnapfs.volume.shm import SharedMemory, Unusable

SHM = Path("/dev/shm")
REPLICA = FileId(0x801, 1234, os.geteuid())
OTHER = FileId(0x801, 4321, os.geteuid())
SIZE = 4 << 20


@pytest.fixture
def volume_id() -> Iterator[bytes]:
    """Of a volume of which nothing is left afterwards."""
    if file_system_type(SHM) != "tmpfs":
        pytest.skip("/dev/shm is no tmpfs")
    made = os.urandom(16)
    yield made
    for path in SHM.glob(f"vsnapfs-{made.hex()}-*"):
        path.unlink()


def paths(volume_id: bytes) -> list[Path]:
    return sorted(SHM.glob(f"vsnapfs-{volume_id.hex()}-*"))


def held(ring: Ring, *data: bytes) -> None:
    for part in data:
        assert ring.append(5, part) is not None


# -- one ring -------------------------------------------------------------------------------------


def test_a_ring_is_private_whole_and_found_again(tmp_path: Path, volume_id: bytes) -> None:
    """On tmpfs: 0600, all of it allocated, found by its name once nobody holds it."""
    store = SharedMemory((tmp_path, SHM))
    ring = store.make(SIZE, volume_id, REPLICA)
    (path,) = paths(volume_id)
    info = path.stat()
    assert info.st_mode & 0o777 == 0o600
    assert info.st_blocks * 512 >= SIZE
    assert ring.name[1:] == (REPLICA.device, REPLICA.inode, SHM.stat().st_dev)
    held(ring, b"hello")
    assert store.is_there(ring)
    with pytest.raises(Unusable, match="in use"):
        store.find(ring.name, volume_id, REPLICA)
    ring.close()
    found = store.find(ring.name, volume_id, REPLICA)
    assert [bytes(found.data(r)) for r in found.records()] == [b"hello"]
    store.remove(found)
    assert not store.is_there(found)
    found.close()
    with pytest.raises(FileNotFoundError):
        store.find(ring.name, volume_id, REPLICA)


@pytest.mark.parametrize("spoil", ["mode", "second name", "fifo", "link"])
def test_a_ring_that_is_not_private_is_not_used(
    tmp_path: Path, volume_id: bytes, spoil: str
) -> None:
    """Nor is it lost: it is as it was when that is mended. No link is followed, no pipe awaited."""
    store = SharedMemory((SHM,))
    ring = store.make(SIZE, volume_id, REPLICA)
    held(ring, b"hello")
    ring.close()
    (path,) = paths(volume_id)
    aside = path.with_name(f"{path.name}-aside")
    if spoil == "mode":
        path.chmod(0o644)
    elif spoil == "second name":
        os.link(path, aside)
    else:
        path.rename(aside)
        if spoil == "fifo":
            os.mkfifo(path, 0o600)
        else:
            path.symlink_to(aside)
    with pytest.raises((Unusable, OSError)) as caught:
        store.find(ring.name, volume_id, REPLICA)
    assert not isinstance(caught.value, FileNotFoundError)
    store.tidy(volume_id, REPLICA)
    if spoil == "mode":
        path.chmod(0o600)
    elif spoil == "second name":
        aside.unlink()
    else:
        aside.rename(path)
    found = store.find(ring.name, volume_id, REPLICA)
    assert [bytes(found.data(r)) for r in found.records()] == [b"hello"]
    found.close()


def test_gone_is_said_only_of_the_tmpfs_that_is_looked_at(volume_id: bytes) -> None:
    """A ring that lies in another one, by its device number, may be there still."""
    store = SharedMemory((SHM,))
    here = RingName(b"r" * 16, REPLICA.device, REPLICA.inode, SHM.stat().st_dev)
    with pytest.raises(FileNotFoundError):
        store.find(here, volume_id, REPLICA)
    with pytest.raises(Unusable, match="another tmpfs"):
        store.find(here._replace(memory=0xFFFF0001), volume_id, REPLICA)


def test_a_ring_that_was_written_over_is_none(volume_id: bytes) -> None:
    """A head that rotted, or is another volume's, is FormatError: surely bad, so it is lost."""
    store = SharedMemory((SHM,))
    ring = store.make(SIZE, volume_id, REPLICA)
    ring.close()
    (path,) = paths(volume_id)
    whole = path.read_bytes()
    for spoilt in (b"\0" * 100, whole[:20] + b"\xff" + whole[21:]):
        path.write_bytes(spoilt.ljust(SIZE, b"\0"))
        with pytest.raises(FormatError) as caught:
            store.find(ring.name, volume_id, REPLICA)
        assert caught.value.code != "foreign-version"
    path.write_bytes(b"")
    with pytest.raises(FormatError):
        store.find(ring.name, volume_id, REPLICA)


# -- more than one --------------------------------------------------------------------------------


def test_a_ring_of_which_both_cursors_rotted_is_none(volume_id: bytes) -> None:
    """As for any other that is surely bad: FormatError, and tidying leaves it where it is."""
    store = SharedMemory((SHM,))
    ring = store.make(SIZE, volume_id, REPLICA)
    for at in (place for pair in CURSORS for place in pair):
        ring.memory[at : at + 24] = b"x" * 24
    ring.close()
    with pytest.raises(FormatError):
        store.find(ring.name, volume_id, REPLICA)
    store.tidy(volume_id, REPLICA)
    assert len(paths(volume_id)) == 1


def test_tidying_removes_only_what_is_ours_empty_and_unlocked(volume_id: bytes) -> None:
    """Not a copy's ring, not one that somebody serves with, not one that nobody has read."""
    store = SharedMemory((SHM,))
    empty, full, copys = (
        store.make(SIZE, volume_id, replica) for replica in (REPLICA, REPLICA, OTHER)
    )
    held(full, b"hello")
    served = store.make(SIZE, volume_id, REPLICA)
    for ring in (empty, full, copys):
        ring.close()
    store.tidy(volume_id, REPLICA)
    left = {path.name.rpartition("-")[2] for path in paths(volume_id)}
    assert left == {ring.name.ring_id.hex() for ring in (full, copys, served)}
    served.close()
    store.tidy(volume_id, REPLICA)
    left = {path.name.rpartition("-")[2] for path in paths(volume_id)}
    assert left == {ring.name.ring_id.hex() for ring in (full, copys)}


def test_what_cannot_be_tidied_away_keeps_nobody_from_a_ring(
    volume_id: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody else was faster, or the directory is not to be written: that is no lack of room."""
    store = SharedMemory((SHM,))
    store.make(SIZE, volume_id, REPLICA).close()
    (path,) = paths(volume_id)

    def gone(self: Path, *_: object, **__: object) -> None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", gone)
        store.tidy(volume_id, REPLICA)
    assert path.exists()
    store.tidy(volume_id, REPLICA)
    assert not path.exists()


@pytest.mark.parametrize("size", [88, RECORDS, RECORDS * 2])
def test_a_ring_that_was_never_finished_is_tidied_away(volume_id: bytes, size: int) -> None:
    """Whoever made it died between its head and its memory; no superblock can name it.

    What a kill leaves while the memory is allocated is the head alone.
    """
    store = SharedMemory((SHM,))
    ring = store.make(SIZE, volume_id, REPLICA)
    ring.close()
    (path,) = paths(volume_id)
    head = path.read_bytes()[:88]
    path.write_bytes(head.ljust(size, b"\0"))
    store.tidy(volume_id, OTHER)
    assert paths(volume_id)
    store.tidy(volume_id, REPLICA)
    assert not paths(volume_id)


# -- two users ------------------------------------------------------------------------------------


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="takes root and a second uid")
NOBODY = 65534

_MAKE = """
import os, sys
from vsnapfs.backing import FileId
from vsnapfs.volume.shm import SharedMemory
store, volume_id, owner = SharedMemory(), bytes.fromhex(sys.argv[1]), int(sys.argv[2])
ring = store.make(4 << 20, volume_id, FileId(0x801, 1234, owner))
ring.append(5, b"hello")
print(ring.name.ring_id.hex())
"""


def made_by_nobody(volume_id: bytes) -> RingName:
    done = subprocess.run(
        [sys.executable, "-c", _MAKE, volume_id.hex(), str(NOBODY)],
        user=NOBODY, group=NOBODY, extra_groups=(), capture_output=True, text=True, check=True,
    )  # fmt: skip
    return RingName(bytes.fromhex(done.stdout), 0x801, 1234, SHM.stat().st_dev)


_FIND = """
import sys
from vsnapfs.backing import FileId
from vsnapfs.diffarea.superblock import RingName
from vsnapfs.volume.shm import SharedMemory
whose = FileId(*map(int, sys.argv[1:4]))
name = RingName(bytes.fromhex(sys.argv[5]), whose.device, whose.inode, int(sys.argv[6]))
print(len(list(SharedMemory().find(name, bytes.fromhex(sys.argv[4]), whose).records())))
"""


@needs_root
def test_where_proc_is_another_pid_namespaces_a_ring_is_found(volume_id: bytes) -> None:
    """As after `nsenter -m` into a container: /proc/self leads nowhere, which is not "gone"."""
    ring = SharedMemory((SHM,)).make(SIZE, volume_id, REPLICA)
    held(ring, b"hello")
    ring.close()
    ring_id, memory = ring.name.ring_id.hex(), str(ring.name.memory)
    mounted = 'unshare --pid --fork mount -t proc proc /proc && exec "$@"'
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", mounted, "sh", sys.executable, "-c", _FIND,
         *map(str, REPLICA[:3]), volume_id.hex(), ring_id, memory],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout == "1\n", done.stderr


@needs_root
def test_root_uses_the_ring_of_the_replicas_owner_as_a_copy(volume_id: bytes) -> None:
    """It is carried out and released in the file, never mapped, and nothing is added to it."""
    name = made_by_nobody(volume_id)
    store = SharedMemory()
    ring = store.find(name, volume_id, FileId(0x801, 1234, NOBODY))
    assert ring.is_copy
    assert not isinstance(ring.memory, mmap.mmap)
    (record,) = ring.records()
    assert bytes(ring.data(record)) == b"hello"
    ring.release(record)
    ring.close()
    again = store.find(name, volume_id, FileId(0x801, 1234, NOBODY))
    assert not list(again.records())
    again.close()


@needs_root
def test_root_uses_no_ring_of_a_stranger(volume_id: bytes) -> None:
    """The replica is root's and the ring is not: closed, saying whose it is."""
    name = made_by_nobody(volume_id)
    with pytest.raises(Unusable, match=str(NOBODY)):
        SharedMemory().find(name, volume_id, FileId(0x801, 1234, 0))


@needs_root
def test_a_user_does_not_lose_the_ring_that_root_made(volume_id: bytes) -> None:
    """It cannot be opened: not usable now, which is not gone; tidying does not end."""
    store = SharedMemory()
    ring = store.make(SIZE, volume_id, FileId(0x801, 1234, NOBODY))
    ring.close()
    code = """
import sys
from vsnapfs.backing import FileId
from vsnapfs.diffarea.superblock import RingName
from vsnapfs.volume.shm import SharedMemory, Unusable
store, volume_id, replica = SharedMemory(), bytes.fromhex(sys.argv[1]), FileId(0x801, 1234, 65534)
name = RingName(bytes.fromhex(sys.argv[2]), 0x801, 1234, int(sys.argv[3]))
store.tidy(volume_id, replica)
try:
    store.find(name, volume_id, replica)
except Unusable as error:
    print(error.reason)
"""
    arguments = [volume_id.hex(), ring.name.ring_id.hex(), str(ring.name.memory)]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        user=NOBODY, group=NOBODY, extra_groups=(), capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "uid 0" in done.stdout
    assert paths(volume_id)


@needs_root
def test_a_ring_cut_short_by_its_owner_does_not_end_root(volume_id: bytes) -> None:
    """Before it is read it is no ring; after that there is a copy. Mapped it would be SIGBUS."""
    name = made_by_nobody(volume_id)
    owner = FileId(0x801, 1234, NOBODY)
    (path,) = paths(volume_id)
    ring = SharedMemory().find(name, volume_id, owner)
    os.truncate(path, 0)
    (record,) = ring.records()
    assert bytes(ring.data(record)) == b"hello"
    ring.release(record)
    ring.close()
    os.truncate(path, 1 << 40)  # All holes: nothing is read of it.
    with pytest.raises(Unusable, match="impossible"):
        SharedMemory().find(name, volume_id, owner)


# -- room -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "size", [4_500_000, 5_500_000, 6_300_000, (64 << 20) + 104_858, SIZE, SIZE + 1]
)
def test_every_size_serves(volume_id: bytes, size: int) -> None:
    """Also those that no page divides: round and round, and found again."""
    store = SharedMemory((SHM,))
    ring = store.make(size, volume_id, REPLICA)
    assert len(ring.memory) >= size
    data = os.urandom(700_000)
    for number in range(2 * size // len(data) + 2):
        record = ring.append(number, data)
        if record is None:
            ring.release(last)  # noqa: F821 - there was one before
            record = ring.append(number, data)
        assert record is not None
        last = record  # noqa: F841
    ring.close()
    found = store.find(ring.name, volume_id, REPLICA)
    assert [bytes(found.data(r)) == data for r in found.records()]
    found.close()


@pytest.mark.parametrize("length", range(RECORDS + 4096, RECORDS + 4096 + 130))
def test_a_ring_may_have_any_length(length: int) -> None:
    """What the size leaves beyond a multiple of 64 is not used, and nothing runs into it."""
    name = RingName(b"r" * 16, 1, 2, 3)
    memory = bytearray(length)
    ring = Ring.make(memory, name, b"v" * 16)
    for number in range(1, 40):
        content = bytes([number]) * (number * 97 % 1900)
        record = ring.append(number, content)
        assert record is not None
        again = Ring.found(memory, name, b"v" * 16)
        assert [(r.offset, bytes(again.data(r))) for r in again.records()] == [(number, content)]
        ring.release(record)


def test_a_small_tmpfs_gets_a_smaller_ring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Down to 4 MiB; what did not fit has left nothing behind."""
    there = 20 << 20

    def fallocate(fd: int, offset: int, length: int) -> None:
        if length > there:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.truncate(fd, length)

    monkeypatch.setattr("vsnapfs.volume.shm.fallocate", fallocate)
    monkeypatch.setattr("vsnapfs.volume.shm.file_system_type", lambda _path: "tmpfs")
    store = SharedMemory((tmp_path,))
    ring = store.make(64 << 20, b"v" * 16, REPLICA)
    assert len(ring.memory) == 16 << 20
    ring.close()
    there = 3 << 20
    with pytest.raises(OSError) as caught:
        store.make(64 << 20, b"w" * 16, REPLICA)
    assert caught.value.errno == errno.ENOSPC
    assert len(list(tmp_path.iterdir())) == 1


def test_a_disk_is_no_place_for_a_ring(tmp_path: Path) -> None:
    """Only memory: on a disk each acknowledged write would be written twice."""
    if file_system_type(tmp_path) in ("tmpfs", "ramfs"):
        pytest.skip("the test's own directory is in memory")
    with pytest.raises(OSError) as caught:
        SharedMemory((tmp_path,)).make(mmap.PAGESIZE * 16, b"v" * 16, REPLICA)
    assert caught.value.errno == errno.ENOENT


def test_a_ring_that_was_made_longer_is_all_there(volume_id: bytes) -> None:
    """Somebody's truncate, which can be undone; one cut short has lost something."""
    store = SharedMemory((SHM,))
    ring = store.make(SIZE, volume_id, REPLICA)
    held(ring, b"hello")
    ring.close()
    (path,) = paths(volume_id)
    os.truncate(path, SIZE * 2)
    with pytest.raises(Unusable, match="longer") as caught:
        store.find(ring.name, volume_id, REPLICA)
    assert f"truncate -s {SIZE} " in caught.value.hint
    os.truncate(path, SIZE)
    store.find(ring.name, volume_id, REPLICA).close()
    os.truncate(path, SIZE // 2)
    with pytest.raises(FormatError):
        store.find(ring.name, volume_id, REPLICA)


def test_a_ring_in_a_subdirectory_is_not_gone(volume_id: bytes) -> None:
    """A sandbox had that subdirectory over its /dev/shm: from outside, the ring lies deeper."""
    with tempfile.TemporaryDirectory(dir=SHM) as name:
        inside = SharedMemory((Path(name),))
        ring = inside.make(SIZE, volume_id, REPLICA)
        held(ring, b"hello")
        ring.close()
        with pytest.raises(Unusable, match=name):
            SharedMemory((SHM,)).find(ring.name, volume_id, REPLICA)
        inside.find(ring.name, volume_id, REPLICA).close()
    with pytest.raises(FileNotFoundError):
        SharedMemory((SHM,)).find(ring.name, volume_id, REPLICA)


def test_a_directory_of_the_tmpfs_that_cannot_be_looked_into_may_hold_it(
    volume_id: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What cannot be seen is not gone."""
    ring = SharedMemory((SHM,)).make(SIZE, volume_id, REPLICA)
    ring.close()
    paths(volume_id)[0].unlink()
    real = os.scandir

    def scandir(path: str) -> Iterator[os.DirEntry[str]]:
        if path == closed:
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return real(path)

    with tempfile.TemporaryDirectory(dir=SHM) as closed:
        monkeypatch.setattr("os.scandir", scandir)
        with pytest.raises(Unusable, match=closed):
            SharedMemory((SHM,)).find(ring.name, volume_id, REPLICA)
        monkeypatch.undo()


def test_a_ring_knows_the_file_system_of_its_replica(tmp_path: Path, volume_id: bytes) -> None:
    """As the host tells it: on btrfs a snapshot of it can get its device number and inode."""
    backing = FileBacking.create(tmp_path / "replica")
    here = backing.file_id()
    backing.close()
    told = os.statvfs(tmp_path).f_fsid
    assert (here.system == 0) == (told == 0)
    ring = SharedMemory((SHM,)).make(SIZE, volume_id, here)
    assert (ring.born, ring.system) == (here.born, here.system)
    ring.close()


def test_a_copy_of_a_ring_in_another_tmpfs_is_not_it(tmp_path: Path, volume_id: bytes) -> None:
    """As where an overlay lies over /dev/shm: what went on there the ring itself would not know."""
    ring = SharedMemory((SHM,)).make(SIZE, volume_id, REPLICA)
    held(ring, b"hello")
    ring.close()
    (path,) = paths(volume_id)
    shutil.copy2(path, tmp_path)
    assert tmp_path.stat().st_dev != ring.name.memory
    with pytest.raises(Unusable, match="another tmpfs"):
        SharedMemory((tmp_path,)).find(ring.name, volume_id, REPLICA)
    SharedMemory((tmp_path, SHM)).find(ring.name, volume_id, REPLICA).close()


def test_a_lock_is_held_from_before_the_head_is_there(
    volume_id: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody who tidies meanwhile can take a ring that is being made for one left behind."""
    real, seen = fcntl.flock, []

    def flock(fd: int, how: int) -> None:
        seen.append(os.fstat(fd).st_size)
        real(fd, how)

    monkeypatch.setattr("vsnapfs.volume.shm.fcntl.flock", flock)
    SharedMemory((SHM,)).make(SIZE, volume_id, REPLICA).close()
    assert seen == [0]


def test_without_the_machine_s_boot_id_it_is_said_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where /proc shows only processes, a volume is refused for that, not as if it were missing."""
    monkeypatch.setattr("vsnapfs.volume.shm._BOOT_ID", tmp_path / "boot_id")
    with pytest.raises(VsnapError, match="boot_id: No such file or directory") as caught:
        SharedMemory((tmp_path,))
    assert "/proc" in caught.value.hint


@pytest.mark.parametrize("text", ["", "\n", "none\n", "6e2f1a5c\n", "\N{BULLET}"])
def test_what_is_no_boot_id_is_not_another_life_of_the_machine(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sandbox hides files under /dev/null: refused, or the ring would be lost."""
    own = tmp_path / "boot_id"
    own.write_text(text, encoding="utf-8")
    monkeypatch.setattr("vsnapfs.volume.shm._BOOT_ID", own)
    with pytest.raises(VsnapError, match="no boot id"):
        SharedMemory((SHM,))


def test_a_random_number_in_the_place_of_the_boot_id_is_noticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Another file of the kernel's laid over it has no size either, but is another each time."""
    uuid = Path("/proc/sys/kernel/random/uuid")
    monkeypatch.setattr("vsnapfs.volume.shm._BOOT_ID", uuid)
    assert SharedMemory((SHM,)).masked


def test_a_boot_id_that_lies_over_the_kernel_s_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, volume_id: bytes
) -> None:
    """As systemd-nspawn has it: no ring is made, for nobody could tell its life of the machine."""
    assert not SharedMemory((SHM,)).masked
    own = tmp_path / "boot_id"
    own.write_text("6e2f1a5c-0a1d-4f0e-9a59-0d7a2f1c3b4d\n")
    monkeypatch.setattr("vsnapfs.volume.shm._BOOT_ID", own)
    store = SharedMemory((SHM,))
    assert store.masked
    assert not store.doubt()
    with pytest.raises(OSError, match="not the machine's own"):
        store.make(SIZE, volume_id, REPLICA)
