"""The mounted tree without a mount: names, inode numbers, attributes, the live files."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

import pyfuse3
import pytest
import trio
from fake_volume import NOON, FakeVolume

from vsnapfs.fuse import VolumeOperations, live, mount_options, tree


def run(awaitable: Awaitable[Any]) -> Any:
    async def main() -> Any:
        return await awaitable

    return trio.run(main)


@pytest.fixture
def volume(tmp_path: Path) -> FakeVolume:
    return FakeVolume(tmp_path)


@pytest.fixture
def handlers(volume: FakeVolume) -> VolumeOperations:
    return VolumeOperations(volume)  # type: ignore[arg-type]


def names(handlers: VolumeOperations, inode: int, after: int = 0) -> list[str]:
    return [name.decode() for name, _, _ in handlers.entries(inode, after)]


def lookup(handlers: VolumeOperations, parent: int, name: str) -> pyfuse3.EntryAttributes:
    return run(handlers.lookup(parent, name.encode(), None))


def missing(handlers: VolumeOperations, parent: int, name: str) -> bool:
    with pytest.raises(pyfuse3.FUSEError) as caught:
        lookup(handlers, parent, name)
    return caught.value.errno == errno.ENOENT


def test_an_empty_volume_shows_its_fixed_names_and_no_latest(handlers: VolumeOperations) -> None:
    """Without a point there are replica, live files and empty directories, and no `latest`."""
    assert names(handlers, tree.ROOT) == [
        "replica.img", "status.json", "events.log", "recovery-points",
    ]  # fmt: skip
    assert names(handlers, tree.POINTS) == ["by-time"]
    assert names(handlers, tree.BY_TIME) == []
    assert missing(handlers, tree.POINTS, "latest")
    with pytest.raises(pyfuse3.FUSEError):
        run(handlers.readlink(tree.LATEST, None))


def test_points_are_listed_by_number_with_at_least_four_digits(
    volume: FakeVolume, handlers: VolumeOperations
) -> None:
    """Names grow beyond four digits with the number, and `latest` is the highest number."""
    for number in (1, 9999, 10000, 123456):
        volume.add_point(number, NOON + number * 10**9)
    assert names(handlers, tree.POINTS) == [
        "by-time", "latest", "0001.img", "9999.img", "10000.img", "123456.img",
    ]  # fmt: skip
    assert run(handlers.readlink(tree.LATEST, None)) == b"123456.img"


@pytest.mark.parametrize(
    "name", ["1.img", "00001.img", "0001.IMG", "0002.img", "0001.img.", "٠٠٠١.img"]
)
def test_a_point_has_one_name_only(
    volume: FakeVolume, handlers: VolumeOperations, name: str
) -> None:
    """Other spellings of a number are no names."""
    volume.add_point(1)
    assert lookup(handlers, tree.POINTS, "0001.img").st_ino == tree.POINT_BASE + 1
    assert missing(handlers, tree.POINTS, name)


def test_new_and_deleted_points_show_at_once(
    volume: FakeVolume, handlers: VolumeOperations
) -> None:
    """A point appears and disappears without any notice, and the kernel may cache no such name."""
    assert missing(handlers, tree.POINTS, "0001.img")
    volume.add_point(1)
    entry = lookup(handlers, tree.POINTS, "0001.img")
    assert entry.entry_timeout == 0
    assert lookup(handlers, tree.POINTS, "latest").entry_timeout == 0
    run(volume.delete_point(1))
    assert missing(handlers, tree.POINTS, "0001.img")
    assert missing(handlers, tree.POINTS, "latest")
    with pytest.raises(pyfuse3.FUSEError) as caught:
        run(handlers.getattr(entry.st_ino, None))
    assert caught.value.errno == errno.ESTALE


def test_inode_numbers_are_never_shared(volume: FakeVolume, handlers: VolumeOperations) -> None:
    """Every inode of a full tree, and of points long deleted, is different."""
    seen: dict[int, bytes] = {}
    for number in range(1, 200):
        volume.add_point(number, NOON + number)
        if number % 3 == 0:
            run(volume.delete_point(number - 1))
        for directory in (tree.ROOT, tree.POINTS, tree.BY_TIME):
            for name, attr, _ in handlers.entries(directory, 0):
                assert seen.setdefault(attr.st_ino, name) == name or attr.st_ino == tree.LATEST
    assert len(set(seen.values())) == len(seen)


def test_by_time_links_to_the_image_in_utc(volume: FakeVolume, handlers: VolumeOperations) -> None:
    """A point of 07:20:00 UTC is found under that name, whatever the local time zone."""
    volume.add_point(1)
    link = lookup(handlers, tree.BY_TIME, "2026-11-22T07-20-00Z")
    assert stat.S_ISLNK(link.st_mode)
    assert run(handlers.readlink(link.st_ino, None)) == b"../0001.img"
    assert link.st_size == len("../0001.img")


def test_points_of_one_second_get_a_suffix_that_stays(
    volume: FakeVolume, handlers: VolumeOperations
) -> None:
    """Deleting the first of three points of a second renames neither of the others."""
    for number in (1, 2, 3):
        volume.add_point(number, NOON + number)
    plain = "2026-11-22T07-20-00Z"
    assert names(handlers, tree.BY_TIME) == [plain, f"{plain}-2", f"{plain}-3"]
    run(volume.delete_point(1))
    volume.add_point(4, NOON + 4)
    assert names(handlers, tree.BY_TIME) == [f"{plain}-2", f"{plain}-3", f"{plain}-4"]
    assert run(handlers.readlink(lookup(handlers, tree.BY_TIME, f"{plain}-3").st_ino, None)) == (
        b"../0003.img"
    )
    assert missing(handlers, tree.BY_TIME, plain)


def test_reading_a_directory_goes_on_after_a_deletion(
    volume: FakeVolume, handlers: VolumeOperations
) -> None:
    """A listing continued from any entry misses and repeats nothing, also if that one is gone."""
    for number in range(1, 6):
        volume.add_point(number, NOON + number)
    cookies = {name: cookie for name, _, cookie in handlers.entries(tree.POINTS, 0)}
    run(volume.delete_point(3))
    assert names(handlers, tree.POINTS, cookies[b"0003.img"]) == ["0004.img", "0005.img"]
    assert names(handlers, tree.POINTS, cookies[b"0001.img"]) == [
        "0002.img",
        "0004.img",
        "0005.img",
    ]


def test_readdir_stops_when_the_buffer_is_full(
    volume: FakeVolume, handlers: VolumeOperations, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Readdir hands out entries until the kernel's buffer takes no more."""
    given: list[tuple[bytes, int]] = []

    def reply(token: Any, name: bytes, attr: Any, cookie: int) -> bool:
        if len(given) == 2:
            return False
        given.append((name, cookie))
        return True

    monkeypatch.setattr(pyfuse3, "readdir_reply", reply)
    fh = run(handlers.opendir(tree.ROOT, None))
    run(handlers.readdir(fh, 0, None))
    assert [name for name, _ in given] == [b"replica.img", b"status.json"]
    last = given[-1][1]
    given.clear()
    run(handlers.readdir(fh, last, None))
    assert [name for name, _ in given] == [b"events.log", b"recovery-points"]
    run(handlers.releasedir(fh))


def test_dot_names(handlers: VolumeOperations) -> None:
    """`.` and `..` are found in every directory, since the kernel may ask for them."""
    for directory, parent in ((1, 1), (tree.POINTS, 1), (tree.BY_TIME, tree.POINTS)):
        assert lookup(handlers, directory, ".").st_ino == directory
        assert lookup(handlers, directory, "..").st_ino == parent


def test_attributes(volume: FakeVolume, handlers: VolumeOperations) -> None:
    """Modes, sizes, owners, links, blocks and times are what the mounted tree promises."""
    volume.add_point(7, NOON + 123_456_789)
    root = run(handlers.getattr(tree.ROOT, None))
    assert stat.filemode(root.st_mode) == "drwx------"
    assert root.st_nlink == 3
    replica = lookup(handlers, tree.ROOT, "replica.img")
    assert stat.filemode(replica.st_mode) == "-rw-------"
    point = lookup(handlers, tree.POINTS, "0007.img")
    assert stat.filemode(point.st_mode) == "-r--r--r--"
    assert point.st_mtime_ns == NOON + 123_456_789
    assert point.attr_timeout > 3600
    for attr in (replica, point):
        assert attr.st_size == 100_001
        assert attr.st_blocks == 196
        assert attr.st_blksize == 16384
        assert attr.st_nlink == 1
        assert (attr.st_uid, attr.st_gid) == (os.geteuid(), os.getegid())


def test_a_shared_mount_lets_others_in(volume: FakeVolume) -> None:
    """With allow_other the root directory is 0755; the replica stays 0600."""
    handlers = VolumeOperations(volume, shared=True)  # type: ignore[arg-type]
    assert stat.S_IMODE(run(handlers.getattr(tree.ROOT, None)).st_mode) == 0o755
    assert stat.S_IMODE(lookup(handlers, tree.ROOT, "replica.img").st_mode) == 0o600


def test_every_handler_answers_or_is_left_to_the_kernel() -> None:
    """No handler of pyfuse3 is forgotten: each is ours, or one the kernel does without."""
    left_to_the_kernel = {"getxattr", "setxattr", "listxattr", "removexattr", "poll", "forget"}
    for name, handler in vars(pyfuse3.Operations).items():
        if name.startswith("_") or not callable(handler) or name in ("init", "stacktrace"):
            continue
        ours = getattr(VolumeOperations, name) is not handler
        assert ours != (name in left_to_the_kernel), name


def test_status_json_is_one_valid_object_with_its_size(
    volume: FakeVolume, handlers: VolumeOperations
) -> None:
    """status.json parses, has the size it claims, and an open one does not change underfoot."""
    info = run(handlers.open(tree.STATUS, os.O_RDONLY, None))
    assert info.direct_io
    size = lookup(handlers, tree.ROOT, "status.json").st_size
    head = bytes(run(handlers.read(info.fh, 0, 10)))
    for number in range(1, 12):
        volume.add_point(number)
    content = head + bytes(run(handlers.read(info.fh, 10, 1 << 20)))
    assert len(content) == size
    assert json.loads(content)["recovery_points"] == 0
    fresh = run(handlers.open(tree.STATUS, os.O_RDONLY, None))
    assert json.loads(bytes(run(handlers.read(fresh.fh, 0, 1 << 20))))["recovery_points"] == 11
    assert run(handlers.read(fresh.fh, 1 << 20, 4096)) == b""


def test_events_log_grows_like_a_file(volume: FakeVolume) -> None:
    """events.log holds earlier events, grows by each new one, and reads like a plain file."""
    volume.log.log("vsnapfs", 1010, point=1)
    handlers = VolumeOperations(volume)  # type: ignore[arg-type]
    info = run(handlers.open(tree.EVENTS, os.O_RDONLY, None))
    first = lookup(handlers, tree.ROOT, "events.log").st_size
    before = bytes(run(handlers.read(info.fh, 0, 1 << 20)))
    assert len(before) == first > 0
    assert before.count(b"\n") == 1
    volume.log.log("vsnapfs", 1011, point=1)
    grown = run(handlers.getattr(tree.EVENTS, None))
    assert grown.st_size > first
    assert grown.attr_timeout == 0
    after = bytes(run(handlers.read(info.fh, first, 1 << 20)))
    assert len(before + after) == grown.st_size
    assert after.count(b"\n") == 1
    assert run(handlers.read(info.fh, grown.st_size, 100)) == b""


def test_events_log_of_a_long_history(volume: FakeVolume, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the newest of many earlier events are rendered, and the first line says so."""
    monkeypatch.setattr(live, "KEPT_EVENTS", 3)
    for point in range(1, 6):
        volume.log.log("vsnapfs", 1010, point=point)
    handlers = VolumeOperations(volume)  # type: ignore[arg-type]
    volume.log.log("vsnapfs", 1011, point=1)
    info = run(handlers.open(tree.EVENTS, os.O_RDONLY, None))
    first, *rest = bytes(run(handlers.read(info.fh, 0, 1 << 20))).decode().splitlines()
    assert first == f"# 2 earlier events: vsnapfs events {volume.directory}"
    assert len(rest) == 4


def test_events_log_in_japanese(volume: FakeVolume) -> None:
    """The language of events.log is chosen at mount time, and sizes count bytes."""
    volume.log.log("vsnapfs", 1002)
    handlers = VolumeOperations(volume, lang="ja")  # type: ignore[arg-type]
    info = run(handlers.open(tree.EVENTS, os.O_RDONLY, None))
    content = bytes(run(handlers.read(info.fh, 0, 1 << 20)))
    assert len(content) == run(handlers.getattr(tree.EVENTS, None)).st_size
    assert not content.decode().isascii()


@pytest.mark.expects_log
def test_an_unreadable_log_does_not_keep_the_volume_down(volume: FakeVolume) -> None:
    """If events.jsonl cannot be read, events.log starts empty and grows by what comes."""
    volume.log.close()
    volume.log.path.unlink()
    volume.log.path.mkdir()
    handlers = VolumeOperations(volume)  # type: ignore[arg-type]
    assert run(handlers.getattr(tree.EVENTS, None)).st_size == 0
    volume.log.log("vsnapfs", 1002)
    assert run(handlers.getattr(tree.EVENTS, None)).st_size > 0


def test_statfs_adds_up(volume: FakeVolume, handlers: VolumeOperations) -> None:
    """What df shows as free is what is left in the diff area; used + free = total."""
    data = run(handlers.statfs(None))
    assert data.f_frsize == data.f_bsize == volume.block_size
    assert data.f_bavail == (volume.maximum - volume.used) // volume.block_size
    assert data.f_blocks == 7 + volume.maximum // volume.block_size
    volume.used, volume.maximum = 0, 0
    assert run(handlers.statfs(None)).f_bavail == 0


@pytest.mark.parametrize(
    ("directory", "wanted"),
    [
        ("/srv/vol1", "fsname=/srv/vol1"),
        ("/a,b", r"fsname=/a\054b"),
        ("/a\\b", r"fsname=/a\134b"),
        ("/a b\n", r"fsname=/a\040b\012"),
        ("/機", r"fsname=/\346\251\237"),
        (os.fsdecode(b"/\xff"), r"fsname=/\377"),
    ],
)
def test_any_directory_name_survives_libfuse(directory: str, wanted: str) -> None:
    """Commas, backslashes and bytes outside ASCII are escaped for libfuse's option parser."""
    options = mount_options(Path(directory), {"allow_other"})
    assert wanted in options
    assert {"subtype=vsnapfs", "default_permissions", "allow_other"} < options
    assert all(option.isascii() for option in options)
