"""Hostile neighbours: who shares machine, directory or socket with a volume and means ill."""

from __future__ import annotations

import errno
import json
import os
import stat
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import trio
from served import Served, make

from vsnapfs import config
from vsnapfs.daemon import client, process
from vsnapfs.daemon.control import ControlServer
from vsnapfs.daemon.operations import OPERATIONS
from vsnapfs.errors import VsnapError
from vsnapfs.volume import Volume

NAMES = ("state", "events.jsonl", "replica.img", "diff-area", "control.sock", "server.log")
VICTIM = b"somebody else's precious file\n" * 500
AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")


@pytest.fixture
def vol(tmp_path: Path) -> Path:
    return make(tmp_path / "vol")


# --- links in the volume directory ---------------------------------------------------------------


def everything(directory: Path) -> list[Exception]:
    """Use the volume in each way that opens its files; the errors."""
    errors: list[Exception] = []

    def serve() -> None:
        log = process.open_log(directory)
        os.write(log, b"a line of the server's log\n")
        os.close(log)

        async def open_and_listen() -> None:
            volume = await Volume.open(directory, mountpoint="/nowhere")
            try:
                server = ControlServer(directory, volume, OPERATIONS)
                server.listen()
                server.unlink()
                server._place.take().close()
                async with trio.open_nursery() as nursery:
                    await nursery.start(volume.run)
                    with suppress(VsnapError, OSError):
                        await volume.create_point("x")
                    with suppress(VsnapError, OSError):
                        handle = volume.open_replica()
                        await handle.write(0, b"overwritten" * 100)
                        await handle.flush()
                        handle.close()
                    nursery.cancel_scope.cancel()
            finally:
                await volume.close()

        trio.run(open_and_listen)

    steps: list[Callable[[], Any]] = [
        lambda: client.call(directory, "status"),
        lambda: client.call(directory, "verify"),
        lambda: client.call(directory, "repair"),
        lambda: client.call(directory, "repair", dry_run=True),
        serve,
        lambda: client.call(directory, "online", give_up_recovery_points=True),
        lambda: config.save(directory, config.load(directory)),
    ]
    for step in steps:
        try:
            step()
        except (VsnapError, OSError) as error:
            errors.append(error)
    return errors


@pytest.mark.expects_log
@pytest.mark.parametrize("kind", ["file", "nothing", "other volume", "fifo", "directory"])
@pytest.mark.parametrize("name", [*NAMES, "volume.toml"])
def test_links_do_not_lead_out(vol: Path, tmp_path: Path, name: str, kind: str) -> None:
    """A link in each file's place: its target is neither changed nor made nor waited for."""
    outside = tmp_path / "outside"
    outside.mkdir(mode=0o700)
    victim = outside / "victim"
    if kind == "file":
        victim.write_bytes(VICTIM)
    elif kind == "other volume":
        # What would be accepted if only it were not outside: the volume's own file.
        if (vol / name).exists():
            victim.write_bytes((vol / name).read_bytes())
        else:
            victim.write_bytes(b"")
    elif kind == "fifo":
        os.mkfifo(victim)
    elif kind == "directory":
        victim.mkdir()
    before = victim.read_bytes() if victim.is_file() else b""
    info = victim.stat() if victim.exists() else None
    with suppress(FileNotFoundError):
        (vol / name).unlink()
    (vol / name).symlink_to(victim)
    errors = everything(vol)
    if info is None:
        assert not victim.exists()
    else:
        after = victim.stat()
        assert (after.st_mtime_ns, after.st_size, after.st_mode) == (
            *(info.st_mtime_ns, info.st_size, info.st_mode),
        )
        assert (victim.read_bytes() if victim.is_file() else b"") == before
    assert list(outside.iterdir()) == ([victim] if info else [])
    if name in ("state", "replica.img", "volume.toml"):
        assert any("symbolic link" in str(error) for error in errors)
    assert not [error for error in errors if "unexpected" in str(error)]


@pytest.mark.parametrize("kind", [os.mkfifo, Path.mkdir], ids=["fifo", "directory"])
@pytest.mark.parametrize("name", ["state", "replica.img", "diff-area", "server.log"])
def test_other_things_in_their_place_are_not_waited_for(
    vol: Path, name: str, kind: Callable[[Path], None]
) -> None:
    """A pipe or a directory in a file's place is an error at once."""
    with suppress(FileNotFoundError):
        (vol / name).unlink()
    kind(vol / name)
    started = time.monotonic()
    assert everything(vol)
    assert time.monotonic() - started < 20


def test_what_is_made_is_private(tmp_path: Path) -> None:
    """Every file is 0600 and the directory 0700, whatever the umask allows."""
    umask = os.umask(0)
    try:
        directory = make(tmp_path / "vol")
        (directory / "state").unlink()  # made anew at opening
        (directory / "events.jsonl").unlink()
        assert everything(directory)[:0] == []
        seen: dict[str, int] = {}
        served = Served(directory)
        try:
            for path in directory.iterdir():
                seen[path.name] = stat.S_IMODE(path.lstat().st_mode)
        finally:
            served.stop()
    finally:
        os.umask(umask)
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert set(seen) == {*NAMES, "volume.toml"}
    assert set(seen.values()) == {0o600}, seen


# --- paths out of the volume directory -----------------------------------------------------------


@pytest.fixture
def led_out(tmp_path: Path) -> Path:
    """A volume whose diff area lies elsewhere."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    return make(tmp_path / "vol", diff_area=elsewhere / "area")


@pytest.mark.parametrize(
    ("what", "mode"),
    [(".", 0o770), (".", 0o702), (".", 0o1777), ("volume.toml", 0o620), ("volume.toml", 0o602)],
)
def test_a_path_that_others_could_have_written_is_not_followed(
    led_out: Path, what: str, mode: int
) -> None:
    """Group or others may write the directory or volume.toml: refused, with the way out."""
    assert client.call(led_out, "status")["state"] == "online"
    (led_out / what).chmod(mode)
    with pytest.raises(VsnapError) as raised:
        client.call(led_out, "status")
    assert raised.value.code == "not-private"
    assert raised.value.errno == errno.EPERM
    assert f"{mode:04o}" in raised.value.message
    assert "chmod go-w" in raised.value.hint
    (led_out / what).chmod(mode & ~0o022)
    assert client.call(led_out, "status")["state"] == "online"


def test_without_such_a_path_nobody_is_asked(vol: Path) -> None:
    """A volume that keeps to itself opens in whatever directory it is."""
    vol.chmod(0o777)
    (vol / "volume.toml").chmod(0o666)
    assert client.call(vol, "status")["state"] == "online"


@pytest.mark.parametrize("path", ["./replica.img", "sub/replica.img", "../x", "/dev/null"])
def test_every_path_that_is_no_plain_name_counts(vol: Path, path: str) -> None:
    """A directory on the way may be a link: all but plain names need trust."""
    text = (vol / "volume.toml").read_text().replace('"replica.img"', json.dumps(path))
    (vol / "volume.toml").write_text(text)
    vol.chmod(0o770)
    with pytest.raises(VsnapError) as raised:
        config.load(vol)
    assert raised.value.code == "not-private"


@AS_ROOT
@pytest.mark.parametrize("what", [".", "volume.toml"])
def test_a_path_that_another_user_wrote_is_not_followed(led_out: Path, what: str) -> None:
    """Root opens a user's volume: its plain names yes, the paths in it no."""
    os.chown(led_out / what, 1000, 1000)
    with pytest.raises(VsnapError) as raised:
        client.call(led_out, "status")
    assert raised.value.code == "not-private"
    assert "uid 1000" in raised.value.message
    with mock.patch.object(os, "geteuid", return_value=1000):
        assert config.load(led_out).diff_area.endswith("elsewhere/area")


def test_create_refuses_what_could_not_be_opened(tmp_path: Path) -> None:
    """`create` into a directory that others can write, with a path out of it: nothing is made."""
    directory, elsewhere = tmp_path / "shared", tmp_path / "elsewhere"
    directory.mkdir()
    directory.chmod(0o777)
    elsewhere.mkdir()
    with pytest.raises(VsnapError) as raised:
        make(directory, diff_area=elsewhere / "area")
    assert raised.value.code == "not-private"
    assert not list(directory.iterdir())
    assert not list(elsewhere.iterdir())
    assert make(directory).exists()


@pytest.mark.expects_log
def test_create_follows_no_link_either(tmp_path: Path) -> None:
    """Links that wait in the directory for `create`: what they point to is not touched."""
    for name in ("replica.img", "diff-area", "state", "events.jsonl", "volume.toml"):
        directory = tmp_path / f"for-{name}"
        directory.mkdir()
        victim = tmp_path / f"victim-{name}"
        victim.write_bytes(b"")
        (directory / name).symlink_to(victim)
        with suppress(VsnapError, OSError):
            make(directory, force=True)
        assert victim.read_bytes() == b"", name
        assert stat.S_IMODE(victim.stat().st_mode) & 0o600 == 0o600


def test_a_device_node_is_not_even_opened(vol: Path) -> None:
    """Opening a tape or a watchdog does something: what is no file and no disk is not opened."""
    text = (vol / "volume.toml").read_text().replace('"replica.img"', '"/dev/null"')
    (vol / "volume.toml").write_text(text)
    opened: list[str] = []
    real = os.open

    def watch(path: Any, *args: Any, **options: Any) -> int:
        opened.append(str(path))
        return real(path, *args, **options)

    with mock.patch.object(os, "open", watch), pytest.raises(VsnapError) as raised:
        client.call(vol, "status")
    assert "neither a file nor a block device" in raised.value.message
    assert "/dev/null" not in opened
