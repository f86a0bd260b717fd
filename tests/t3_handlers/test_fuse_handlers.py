"""Files through the handlers: what reaches the volume, and which errno comes back."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyfuse3
import pytest
import trio
from fake_volume import FakeVolume, oserror
from test_fuse_tree import run

from vsnapfs.errors import BusyError, VsnapError
from vsnapfs.fuse import VolumeOperations, tree
from vsnapfs.fuse.translate import Translator

POINT = tree.POINT_BASE + 1


@pytest.fixture
def volume(tmp_path: Path) -> FakeVolume:
    volume = FakeVolume(tmp_path)
    volume.data[:] = bytes(range(256)) * 390 + bytes(volume.size - 256 * 390)
    volume.add_point(1)
    return volume


@pytest.fixture
def handlers(volume: FakeVolume) -> VolumeOperations:
    return VolumeOperations(volume)  # type: ignore[arg-type]


def refusal(awaitable: Any) -> int:
    """The errno a handler answers with."""
    with pytest.raises(pyfuse3.FUSEError) as caught:
        run(awaitable)
    return int(caught.value.errno)


def open_file(handlers: VolumeOperations, inode: int, flags: int = os.O_RDONLY) -> int:
    return int(run(handlers.open(inode, flags, None)).fh)


def unexpected(volume: FakeVolume) -> list[dict[str, Any]]:
    return [dict(e.params) for e in volume.log.events() if e.event_id == 1090]


def test_reads_and_writes_reach_the_volume(volume: FakeVolume, handlers: VolumeOperations) -> None:
    """What is written through one handle is read through another, at any offset and length."""
    writer = open_file(handlers, tree.REPLICA, os.O_RDWR)
    reader = open_file(handlers, tree.REPLICA)
    assert run(handlers.write(writer, 16383, b"across")) == 6
    assert bytes(run(handlers.read(reader, 16382, 8)))[1:7] == b"across"
    assert volume.data[16383:16389] == b"across"


def test_the_replica_is_direct_and_points_are_cached(handlers: VolumeOperations) -> None:
    """The kernel caches pages of points, for ever, and never those of the replica."""
    replica = run(handlers.open(tree.REPLICA, os.O_RDWR, None))
    assert (replica.direct_io, replica.keep_cache) == (True, False)
    point = run(handlers.open(POINT, os.O_RDONLY, None))
    assert (point.direct_io, point.keep_cache) == (False, True)


@pytest.mark.parametrize(
    ("flags", "synchronous"),
    [
        (os.O_RDWR, False),
        (os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK | os.O_DIRECT, False),
        (os.O_RDWR | os.O_DSYNC, True),
        (os.O_WRONLY | os.O_SYNC, True),
        (os.O_RDWR | os.O_APPEND | os.O_DSYNC, True),
    ],
)
def test_the_volume_is_told_that_writes_are_to_be_synchronous(
    volume: FakeVolume, handlers: VolumeOperations, flags: int, synchronous: bool
) -> None:
    """O_SYNC and O_DSYNC belong to the handle they were opened with; no other flag means them."""
    open_file(handlers, tree.REPLICA, flags)
    assert [handle.synchronous for handle in volume.handles] == [synchronous]


def test_file_handles_are_never_used_twice(handlers: VolumeOperations) -> None:
    """A number that has been released stands for no other file later."""
    seen = set()
    for _ in range(20):
        fh = open_file(handlers, POINT)
        assert fh not in seen
        seen.add(fh)
        run(handlers.release(fh))
    assert handlers.open_files() == 0


def test_release_closes_the_volume_s_handle_once(
    volume: FakeVolume, handlers: VolumeOperations
) -> None:
    """Closing a file closes its handle; a release that comes twice does no harm."""
    fh = open_file(handlers, tree.REPLICA, os.O_RDWR)
    run(handlers.flush(fh))
    assert volume.handles[0].closed == 0
    run(handlers.release(fh))
    run(handlers.release(fh))
    assert volume.handles[0].closed == 1


@pytest.mark.parametrize("inode", [tree.REPLICA, POINT])
def test_reads_at_the_end_are_as_long_as_there_is_data(
    volume: FakeVolume, handlers: VolumeOperations, inode: int
) -> None:
    """A read across the end gives what there is, one after it nothing."""
    fh = open_file(handlers, inode)
    assert len(run(handlers.read(fh, volume.size - 3, 4096))) == 3
    assert len(run(handlers.read(fh, volume.size, 4096))) == 0
    assert len(run(handlers.read(fh, volume.size + 10**12, 4096))) == 0
    assert bytes(run(handlers.read(fh, 0, volume.size))) == volume.data


@pytest.mark.expects_log
@pytest.mark.parametrize("inode", [tree.REPLICA, POINT])
@pytest.mark.parametrize("offset", [0, 100_001 - 4096, 100_001 - 10])
def test_a_short_read_is_an_error_never_zeros(
    volume: FakeVolume, handlers: VolumeOperations, inode: int, offset: int
) -> None:
    """If the engine returns less than it must, the reader gets EIO (the kernel would pad zeros)."""
    fh = open_file(handlers, inode)
    volume.short_by = 4095
    assert refusal(handlers.read(fh, offset, 4096)) == errno.EIO


@pytest.mark.parametrize(
    "code", [errno.ENODEV, errno.ENOSPC, errno.EIO, errno.ESTALE, errno.EFBIG, errno.EDQUOT]
)
def test_errnos_of_the_design_pass_unchanged(
    volume: FakeVolume, handlers: VolumeOperations, code: int
) -> None:
    """A refusal of the engine reaches the process with its errno, and is no defect."""
    fh = open_file(handlers, tree.REPLICA, os.O_RDWR)
    volume.fails = {"read": oserror(code), "write": oserror(code)}
    assert refusal(handlers.read(fh, 0, 10)) == code
    assert refusal(handlers.write(fh, 0, b"x")) == code
    assert unexpected(volume) == []


@pytest.mark.expects_log
@pytest.mark.parametrize(
    "failure",
    [
        oserror(errno.ENOTCONN), oserror(errno.ENOSYS), oserror(errno.EINVAL), oserror(errno.EBADF),
        oserror(errno.EINTR), oserror(errno.EAGAIN), OSError("no errno"), ValueError("a defect"),
        KeyError(1), MemoryError(), AssertionError(), RecursionError(),
    ],
    ids=repr,
)  # fmt: skip
def test_anything_else_is_eio_and_an_event(
    volume: FakeVolume, handlers: VolumeOperations, failure: Exception
) -> None:
    """What nobody planned for is EIO to the process and event 1090 to the administrator."""
    fh = open_file(handlers, tree.REPLICA, os.O_RDWR)
    for call, make in (
        ("read", lambda: handlers.read(fh, 0, 10)),
        ("write", lambda: handlers.write(fh, 0, b"x")),
        ("fsync", lambda: handlers.fsync(fh, datasync=False)),
    ):
        volume.fails = {"flush" if call == "fsync" else call: failure}
        assert refusal(make()) == errno.EIO
        assert unexpected(volume)[-1]["what"] == call
    volume.fails = {"status": failure}
    assert refusal(handlers.statfs(None)) == errno.EIO


@pytest.mark.parametrize(
    ("failure", "answer"),
    [
        (errno.ENODEV, errno.ENODEV),
        (errno.EIO, errno.EIO),
        (errno.ENOSPC, errno.EIO),
        (errno.ESTALE, errno.EIO),
        (errno.EDQUOT, errno.EIO),
    ],
)
def test_fsync_answers_enodev_or_eio(
    volume: FakeVolume, handlers: VolumeOperations, failure: int, answer: int
) -> None:
    """An fsync that fails says "no such device" or "I/O error"; loop turns others into success."""
    fh = open_file(handlers, tree.REPLICA, os.O_RDWR)
    volume.fails = {"flush": oserror(failure)}
    assert refusal(handlers.fsync(fh, datasync=True)) == answer


def test_fsync_flushes_the_replica_and_closing_does_not_fail(
    volume: FakeVolume, handlers: VolumeOperations
) -> None:
    """Fsync reaches the volume; close succeeds even on a volume that has gone offline."""
    fh = open_file(handlers, tree.REPLICA, os.O_RDWR)
    run(handlers.fsync(fh, datasync=False))
    assert volume.handles[0].flushed == 1
    volume.fails = {"flush": oserror(errno.ENODEV)}
    run(handlers.flush(fh))
    run(handlers.release(fh))


def test_fsync_of_anything_else_succeeds(handlers: VolumeOperations) -> None:
    """Fsync of a point, a live file or a directory has nothing to do and says so with success."""
    for inode in (POINT, tree.STATUS, tree.EVENTS):
        run(handlers.fsync(open_file(handlers, inode), datasync=False))
    run(handlers.fsyncdir(tree.ROOT, datasync=False))


def test_a_defect_in_a_loop_is_logged_once(volume: FakeVolume) -> None:
    """A defect that hits every request does not fill the log: one event, later the repeats."""
    logged: list[dict[str, Any]] = []
    log = SimpleNamespace(log=lambda _source, _id, **params: logged.append(params))
    translate = Translator(log)  # type: ignore[arg-type]
    import logging

    logging.disable(logging.CRITICAL)
    try:
        for _ in range(1000):
            assert translate(ValueError("again"), "write").errno == errno.EIO
        assert translate(ValueError("other"), "write").errno == errno.EIO
    finally:
        logging.disable(logging.NOTSET)
    assert [entry["reason"] for entry in logged] == ["ValueError: again", "ValueError: other"]


@pytest.mark.expects_log
def test_a_log_that_fails_does_not_keep_a_request_waiting() -> None:
    """If even event 1090 cannot be written, the process still gets its EIO."""

    def fail(*_args: Any, **_params: Any) -> None:
        raise RuntimeError("the log is broken")

    translate = Translator(SimpleNamespace(log=fail))  # type: ignore[arg-type]
    assert translate(ValueError("defect"), "read").errno == errno.EIO


def test_errors_inside_groups_keep_their_errno(
    volume: FakeVolume, handlers: VolumeOperations
) -> None:
    """An OSError that a nursery wrapped into groups is answered like a plain one."""
    fh = open_file(handlers, tree.REPLICA, os.O_RDWR)
    inner = ExceptionGroup("inner", [RuntimeError("aside"), oserror(errno.ENOSPC)])
    volume.fails = {"write": ExceptionGroup("outer", [inner])}
    assert refusal(handlers.write(fh, 0, b"x")) == errno.ENOSPC


def test_a_vsnaperror_is_answered_with_its_errno(
    volume: FakeVolume, handlers: VolumeOperations
) -> None:
    """An error meant for people has an errno for processes."""
    fh = open_file(handlers, tree.REPLICA, os.O_RDWR)
    volume.fails = {"read": BusyError("restoring")}
    assert refusal(handlers.read(fh, 0, 1)) == errno.EBUSY
    volume.fails = {"read": VsnapError("gone", errno=errno.ENODEV)}
    assert refusal(handlers.read(fh, 0, 1)) == errno.ENODEV


def test_cancellation_passes_untouched(volume: FakeVolume, handlers: VolumeOperations) -> None:
    """A cancelled handler is cancelled, not answered with an error."""

    async def main() -> None:
        for awaitable in (
            handlers.read(fh, 0, 1),
            handlers.write(fh, 0, b"x"),
            handlers.fsync(fh, datasync=False),
        ):
            with trio.CancelScope() as scope:
                scope.cancel()
                await awaitable
            assert scope.cancelled_caught

    fh = open_file(handlers, tree.REPLICA, os.O_RDWR)
    trio.run(main)
    assert unexpected(volume) == []


def test_an_offline_replica_cannot_be_opened(
    volume: FakeVolume, handlers: VolumeOperations
) -> None:
    """Opening the replica of an offline volume is ENODEV; the points still open."""
    volume.online_state = False
    assert refusal(handlers.open(tree.REPLICA, os.O_RDWR, None)) == errno.ENODEV
    assert len(run(handlers.read(open_file(handlers, POINT), 0, 10))) == 10


def test_a_deleted_point_cannot_be_opened_and_its_handles_are_stale(
    volume: FakeVolume, handlers: VolumeOperations
) -> None:
    """ESTALE for whoever has, or had, a name of a point that is gone."""
    fh = open_file(handlers, POINT)
    run(volume.delete_point(1, force=True))
    assert refusal(handlers.read(fh, 0, 10)) == errno.ESTALE
    assert refusal(handlers.open(POINT, os.O_RDONLY, None)) == errno.ESTALE
    run(handlers.release(fh))


def fields(**changed: bool) -> Any:
    names = ("atime", "mtime", "ctime", "mode", "uid", "gid", "size")
    return SimpleNamespace(**{f"update_{name}": changed.get(name, False) for name in names})


@pytest.mark.parametrize("size", [0, 1, 100_000, 100_002, 2**63 - 1])
@pytest.mark.parametrize("inode", [tree.REPLICA, POINT])
def test_truncating_is_refused(handlers: VolumeOperations, inode: int, size: int) -> None:
    """No size but its own can be set, and O_TRUNC is refused before anything is opened."""
    wanted = SimpleNamespace(st_size=size)
    assert refusal(handlers.setattr(inode, wanted, fields(size=True), None, None)) == errno.EPERM
    flags = os.O_WRONLY | os.O_TRUNC
    answer = errno.EPERM if inode == tree.REPLICA else errno.EROFS
    assert refusal(handlers.open(inode, flags, None)) == answer


def test_setting_the_size_it_has_is_accepted(
    volume: FakeVolume, handlers: VolumeOperations
) -> None:
    """truncate(2) to the present size changes nothing and succeeds, as tools expect."""
    wanted = SimpleNamespace(st_size=volume.size)
    attr = run(handlers.setattr(tree.REPLICA, wanted, fields(size=True), None, None))
    assert attr.st_size == volume.size


@pytest.mark.parametrize("field", ["mode", "uid", "gid"])
@pytest.mark.parametrize("inode", [tree.ROOT, tree.REPLICA, POINT, tree.STATUS])
def test_modes_and_owners_are_fixed(handlers: VolumeOperations, inode: int, field: str) -> None:
    """Chmod and chown are refused everywhere."""
    answer = refusal(
        handlers.setattr(inode, SimpleNamespace(st_size=0), fields(**{field: True}), None, None)
    )
    assert answer == errno.EPERM


def test_touching_the_replica_succeeds(handlers: VolumeOperations) -> None:
    """Utimens on the replica is accepted (tools do it in passing); a point's time is its own."""
    wanted = SimpleNamespace(st_size=0)
    touch = fields(mtime=True, atime=True)
    run(handlers.setattr(tree.REPLICA, wanted, touch, None, None))
    assert refusal(handlers.setattr(POINT, wanted, touch, None, None)) == errno.EPERM


@pytest.mark.parametrize("flags", [os.O_WRONLY, os.O_RDWR, os.O_RDONLY | os.O_TRUNC, os.O_APPEND])
@pytest.mark.parametrize("inode", [POINT, tree.STATUS, tree.EVENTS])
def test_only_the_replica_opens_for_writing(
    handlers: VolumeOperations, inode: int, flags: int
) -> None:
    """Points and live files are read-only even for root, whom no mode stops."""
    assert refusal(handlers.open(inode, flags, None)) == errno.EROFS


def test_the_tree_itself_cannot_be_changed(handlers: VolumeOperations) -> None:
    """Nothing can be created, renamed, linked or removed through the mount."""
    one = b"x"
    for call in (
        handlers.mknod(1, one, 0o600, 0, None),
        handlers.mkdir(1, one, 0o700, None),
        handlers.create(1, one, 0o600, os.O_RDWR, None),
        handlers.symlink(1, one, b"y", None),
        handlers.link(tree.REPLICA, 1, one, None),
        handlers.rename(1, b"replica.img", 1, one, 0, None),
        handlers.unlink(1, b"replica.img", None),
        handlers.rmdir(1, b"recovery-points", None),
    ):
        assert refusal(call) == errno.EPERM


@pytest.mark.expects_log
def test_a_request_on_an_unknown_handle_is_answered(handlers: VolumeOperations) -> None:
    """A handle that does not exist is an error of the request, not the end of the loop."""
    assert refusal(handlers.read(999, 0, 1)) == errno.EIO
    assert refusal(handlers.write(999, 0, b"x")) == errno.EIO
    assert refusal(handlers.fsync(999, datasync=False)) == errno.EIO
    run(handlers.release(999))


def test_times_follow_writes(handlers: VolumeOperations) -> None:
    """The replica's mtime moves when it is written, so backup tools see the change."""
    before = run(handlers.getattr(tree.REPLICA, None)).st_mtime_ns
    run(handlers.write(open_file(handlers, tree.REPLICA, os.O_RDWR), 0, b"x"))
    assert run(handlers.getattr(tree.REPLICA, None)).st_mtime_ns > before
