"""What stands on a volume, found in made-up /sys and /proc, and the order in which it is synced."""

from __future__ import annotations

import ctypes
import os
import threading
from pathlib import Path

import pytest

from vsnapfs.daemon import above
from vsnapfs.daemon.above import FileSystem, Layer, Syncing, layers

OURS = "0:77"


class Host:
    """A /sys and a /proc in a directory. Nodes below /dev are nobody's: only paths tell."""

    def __init__(self, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sys, self.proc = base / "sys", base / "proc"
        self.place = base / "mnt"
        for directory in ("block", "class/block", "dev/block", "fs/btrfs"):
            (self.sys / directory).mkdir(parents=True)
        monkeypatch.setattr(above, "_SYS", self.sys)
        monkeypatch.setattr(above, "_PROC", self.proc)
        monkeypatch.setattr(above, "_source", self._source)
        monkeypatch.setattr(above, "_node", self._no_node)
        self.numbers: dict[str, str] = {}
        self.process("self", "mnt:[1]")

    @staticmethod
    def _no_node(_number: str, _name: str) -> None:
        raise OSError

    def _source(self, source: str) -> str:
        return self.numbers.get(source.removeprefix("/dev/"), "")

    def block(self, name: str, number: str, *, under: str = "", file: object = "") -> None:
        """A block device. under: a partition's whole disk. file: what a loop device is over."""
        directory = self.sys / "block" / under / name
        (directory / "holders").mkdir(parents=True)
        (directory / "dev").write_text(f"{number}\n")
        (directory / "uevent").write_text(f"MAJOR=0\nDEVNAME={name}\n")
        if under:
            (directory / "partition").write_text("1\n")
        if file:
            (directory / "loop").mkdir()
            (directory / "loop/backing_file").write_text(f"{file}\n")
        for link in (self.sys / "class/block" / name, self.sys / "dev/block" / number):
            link.symlink_to(directory)
        self.numbers[name] = number

    def holds(self, holder: str, name: str) -> None:
        """A device (dm, md) is made of another."""
        (self.sys / "class/block" / name / "holders" / holder).symlink_to("anywhere")

    def process(self, pid: str, namespace: str, *mounts: str, root: str = "/") -> None:
        """A process with its mount table: "MAJOR:MINOR PLACE TYPE SOURCE" each."""
        directory = self.proc / pid
        (directory / "ns").mkdir(parents=True, exist_ok=True)
        for link, target in ((directory / "ns/mnt", namespace), (directory / "root", root)):
            link.unlink(missing_ok=True)
            link.symlink_to(target)
        lines = []
        for number, mount in enumerate(mounts):
            device, place, kind, source = mount.split(" ")
            lines.append(f"{number} 1 {device} / {place} rw - {kind} {source} rw\n")
        (directory / "mountinfo").write_text("".join(lines))

    def found(self) -> list[tuple[set[str], set[str]]]:
        """(devices, first places of the file systems) of each layer, the lowest first."""
        return [
            (set(layer.devices.values()), {fs.places[0] for fs in layer.file_systems})
            for layer in layers(self.place, OURS)
        ]


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    return Host(tmp_path, monkeypatch)


def test_nothing_stands_on_a_volume_that_is_not_attached(host: Host) -> None:
    """Loop devices and mounts of others are none of ours."""
    host.block("loop3", "7:3", file="/somewhere/else.img")
    host.process("self", "mnt:[1]", "7:3 /other ext4 /dev/loop3")
    assert host.found() == []


def test_partitions_mapped_devices_and_what_is_on_them(host: Host) -> None:
    """Through partitions and holders, by number: what the mount table calls the source is a name
    that anybody may give.
    """
    host.block("loop3", "7:3", file=host.place / "replica.img")
    host.block("loop3p1", "259:1", under="loop3")
    host.block("loop3p2", "259:2", under="loop3")
    host.block("dm-0", "253:0")
    host.block("md127", "9:127")
    host.holds("dm-0", "loop3p1")
    host.holds("md127", "dm-0")
    host.process(
        "self",
        "mnt:[1]",
        "253:0 /never ext4 /dev/loop9",
        "9:127 /raid xfs /dev/md/by-name",
        "259:2 /second ext4 UUID=1234",
        "8:1 / ext4 /dev/sda1",
    )
    assert host.found() == [
        ({"loop3"}, set()),
        ({"loop3p1", "loop3p2"}, {"/second"}),
        ({"dm-0"}, {"/never"}),
        ({"md127"}, {"/raid"}),
    ]


def test_loop_devices_over_devices_and_files(host: Host) -> None:
    """A loop device over one of ours, and one over a file in a file system on one of ours."""
    host.block("loop3", "7:3", file=host.place / "replica.img")
    host.block("loop4", "7:4", file="/dev/loop3")
    host.block("loop5", "7:5", file="/files/deep/image")
    host.block("loop6", "7:6", file="/filesystem-of-another/image")
    host.process(
        "self", "mnt:[1]", "7:4 /files ext4 /dev/loop4", "7:5 /inner ext4 x", "7:6 /no ext4 x"
    )
    assert host.found() == [
        ({"loop3"}, set()),
        ({"loop4"}, {"/files"}),
        ({"loop5"}, {"/inner"}),
    ]


def test_a_device_that_is_reached_in_two_ways_is_above_both(host: Host) -> None:
    """A mirror of a partition and of something further up is synced before either."""
    host.block("loop3", "7:3", file=host.place / "replica.img")
    host.block("loop4", "7:4", file="/dev/loop3")
    host.block("dm-0", "253:0")
    host.holds("dm-0", "loop3")
    host.holds("dm-0", "loop4")
    host.process("self", "mnt:[1]", "253:0 /mirror ext4 x")
    assert host.found() == [({"loop3"}, set()), ({"loop4"}, set()), ({"dm-0"}, {"/mirror"})]


def test_devices_that_hold_each_other_end_the_search(host: Host) -> None:
    """Whatever /sys says, there is an end."""
    host.block("loop3", "7:3", file=host.place / "replica.img")
    host.block("dm-0", "253:0")
    host.block("dm-1", "253:1")
    for holder, held in (("dm-0", "loop3"), ("dm-1", "dm-0"), ("dm-0", "dm-1")):
        host.holds(holder, held)
    assert {name for devices, _ in host.found() for name in devices} >= {"loop3", "dm-0", "dm-1"}


def test_a_file_system_of_several_devices(host: Host) -> None:
    """One as btrfs: no device's number, and the mount table names one device of several."""
    host.block("loop3", "7:3", file=host.place / "replica.img")
    host.block("sdb", "8:16")
    members = host.sys / "fs/btrfs/uuid/devices"
    members.mkdir(parents=True)
    for name in ("sdb", "loop3"):
        (members / name).symlink_to("anywhere")
    host.process("self", "mnt:[1]", "0:99 /pool btrfs /dev/sdb", "0:98 /other btrfs /dev/sdc")
    assert host.found() == [({"loop3"}, {"/pool"})]


def test_mounts_of_other_namespaces_are_found_once(host: Host) -> None:
    """Each view of each mount namespace is read once, and reached through a process that has it;
    our own comes first.
    """
    host.block("loop3", "7:3", file=host.place / "replica.img")
    host.process("self", "mnt:[1]", "7:3 /here ext4 x")
    host.process("100", "mnt:[1]", "7:3 /here ext4 x")
    host.process("200", "mnt:[2]", "7:3 /data ext4 x", "8:1 / ext4 x")
    host.process("300", "mnt:[2]", "7:3 /data ext4 x", "8:1 / ext4 x")
    host.process("400", "mnt:[2]", "7:3 /inside ext4 x", root="/jail")
    (layer,) = layers(host.place, OURS)
    (file_system,) = layer.file_systems
    assert file_system.places == (
        "/here",
        f"{host.proc}/200/root/data",
        f"{host.proc}/400/root/inside",
    )


def test_it_is_synced_from_the_top_and_a_device_after_its_file_system(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What the uppermost file system writes goes through all that is below, so they come later."""
    done: list[str] = []
    stack = [
        Layer({"7:3": "loop3"}, [FileSystem("7:3", "ext4", ("/low",))]),
        Layer({"7:4": "loop4"}, []),
        Layer({"7:5": "loop5"}, [FileSystem("7:5", "ext4", ("/high",))]),
    ]
    monkeypatch.setattr(above, "layers", lambda *_: stack)
    monkeypatch.setattr(above, "sync_file_system", lambda fs: done.append(fs.places[0]))
    monkeypatch.setattr(above, "flush_device", lambda _number, name: done.append(name))
    syncing = Syncing(Path("/mnt"), OURS, 60)
    syncing._thread.join()
    assert done == ["/high", "loop5", "loop4", "/low", "loop3"]
    assert syncing.is_over
    assert syncing.late == []


def test_one_that_hangs_keeps_nothing_else_from_being_synced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The others are done, also what is below it; it alone is named as late; the time is kept."""
    done: list[str] = []
    hanging = threading.Event()
    stack = [
        Layer({"7:3": "loop3"}, [FileSystem("7:3", "ext4", ("/low",))]),
        Layer({"7:5": "loop5"}, [FileSystem(f"7:{n}", "ext4", (n,)) for n in ("hangs", "beside")]),
    ]

    def sync(file_system: FileSystem) -> None:
        if file_system.places[0] == "hangs":
            hanging.wait()
        done.append(file_system.places[0])

    monkeypatch.setattr(above, "layers", lambda *_: stack)
    monkeypatch.setattr(above, "sync_file_system", sync)
    monkeypatch.setattr(above, "flush_device", lambda _number, name: done.append(name))
    syncing = Syncing(Path("/mnt"), OURS, 1.0)
    syncing._thread.join()
    try:
        assert syncing.is_over
        assert syncing.late == ["hangs"]
        assert done == ["beside", "loop5", "/low", "loop3"]
    finally:
        hanging.set()


def test_one_that_was_only_slow_has_what_is_below_it_synced_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What came down from it after the flush below is not left there."""
    done: list[str] = []
    stack = [
        Layer({"7:3": "loop3"}, []),
        Layer({}, [FileSystem("7:5", "ext4", ("slow",))]),
    ]
    flushed = threading.Event()

    def sync(_file_system: FileSystem) -> None:
        flushed.wait()  # Later than half of the time: when it has been passed over.
        done.append("slow")

    def flush(_number: str, name: str) -> None:
        done.append(name)
        flushed.set()

    monkeypatch.setattr(above, "layers", lambda *_: stack)
    monkeypatch.setattr(above, "sync_file_system", sync)
    monkeypatch.setattr(above, "flush_device", flush)
    syncing = Syncing(Path("/mnt"), OURS, 4.0)
    syncing._thread.join()
    assert syncing.late == []
    assert done == ["loop3", "slow", "slow", "loop3"]


def test_a_search_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever waits is told that nothing could be synced."""
    hanging = threading.Event()
    monkeypatch.setattr(above, "layers", lambda *_: [hanging.wait()][:0])
    monkeypatch.setattr(above, "_PATIENCE", 0.0)
    syncing = Syncing(Path("/mnt"), OURS, 0.0)
    try:
        while not syncing.is_over:
            pass
        assert syncing.late == ["what lies on its loop devices"]
    finally:
        hanging.set()


def test_what_is_mounted_over_a_file_system_is_not_synced_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A place counts only if it leads to the device; then the next place is tried."""
    synced: list[str] = []

    class Libc:
        @staticmethod
        def syncfs(fd: int) -> int:
            synced.append(os.readlink(f"/proc/self/fd/{fd}"))
            return 0

    monkeypatch.setattr(above.ctypes, "CDLL", lambda _name: Libc)
    found = os.stat(tmp_path).st_dev
    here = f"{os.major(found)}:{os.minor(found)}"
    places = ("/proc", "/does/not/exist", "/dev/null", str(tmp_path), "/")
    above.sync_file_system(FileSystem(here, "ext4", places))
    assert synced == [str(tmp_path)]


def test_a_node_of_another_device_is_not_touched() -> None:
    """A name below /dev may mean something else by now."""
    with pytest.raises(OSError, match="is not 1:99"), above._node("1:99", "null"):
        pass


@pytest.mark.skipif(
    not os.path.exists("/dev/fuse") or not hasattr(ctypes.CDLL(None), "close_range"),
    reason="needs FUSE and a glibc from 2.34 on",
)
def test_no_thread_that_may_hang_keeps_the_mount(tmp_path: Path) -> None:
    """What waits for our own mount, and cannot be killed, holds no /dev/fuse, so that the mount of
    a server that is killed meanwhile ends; it opens and closes what it needs all the same.
    """
    fuse = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    others = os.open(tmp_path, os.O_RDONLY | os.O_CLOEXEC)
    found: list[bool] = []

    def look() -> None:
        place = above._opened(str(tmp_path))
        same = os.fstat(place).st_ino == tmp_path.stat().st_ino
        os.close(place)
        here = Path("/proc/thread-self/fd")
        held = [os.readlink(entry) for entry in here.iterdir() if entry.is_symlink()]
        found.extend((same, "/dev/fuse" in held, str(tmp_path) in held))

    try:
        above._started(look).join()
        assert found == [True, False, False]
        assert os.readlink(f"/proc/self/fd/{fuse}") == "/dev/fuse"  # everybody else has it still
        assert os.readlink(f"/proc/self/fd/{others}") == str(tmp_path)
    finally:
        os.close(fuse)
        os.close(others)
