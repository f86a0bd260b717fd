"""`vsnapfs recovery-point export`: the file it makes, and the files it must never touch.

The recovery point is played by a file where a mounted volume would show it, or by a fake volume;
what is written, linked, synced and read back is real.
"""

from __future__ import annotations

import errno
import os
import random
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cli_backend
import pytest
import trio
from cli_backend import MIB, Backend, ok, refused, run

from vsnapfs import config
from vsnapfs.cli import exporting
from vsnapfs.daemon.mounts import FSTYPE, Mount

backend = cli_backend.backend
volume = cli_backend.volume


@pytest.fixture
def point(backend: Backend, volume: Path, tmp_path: Path) -> Path:
    """Recovery point 3 of the mounted volume: data, holes, zeros, an end that is not aligned."""
    generator = random.Random(7)
    image = bytearray(5 * MIB + 777)
    image[:100] = generator.randbytes(100)
    image[MIB - 1 : MIB + 1] = b"ab"  # across the pieces it is handled in
    image[3 * MIB : 3 * MIB + 300_000] = generator.randbytes(300_000)
    image[-1:] = b"z"
    file = tmp_path / "mnt" / "recovery-points" / "0003.img"
    file.parent.mkdir(parents=True)
    file.write_bytes(image)
    backend.mount(volume, tmp_path / "mnt")
    backend.answers["rp_resolve"] = {"number": 3}
    return file


@pytest.mark.usefixtures("no_direct_io")
def test_file_systems_without_direct_io(volume: Path, point: Path, out: Path) -> None:
    """A kernel that refuses O_DIRECT on the mount (before 6.6 on tmpfs) is read the plain way."""
    ok("rp", "export", volume, "3", out / "copy.img")
    assert (out / "copy.img").read_bytes() == point.read_bytes()


def only(folder: Path, *names: str) -> None:
    """Assert that a directory holds these files and no other, hidden ones included."""
    assert sorted(os.listdir(folder)) == sorted(names)


@pytest.fixture
def no_direct_io(monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def without(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", without)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


@pytest.fixture(params=["unnamed", "hidden name"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a test with O_TMPFILE and on a file system that does not have it."""
    if request.param == "hidden name":
        real = os.open

        def without(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
            if flags & os.O_TMPFILE == os.O_TMPFILE:
                raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
            return real(path, flags, *args, **kwargs)

        monkeypatch.setattr(os, "open", without)


@pytest.mark.usefixtures("way")
def test_export_is_an_exact_sparse_private_copy(
    backend: Backend, volume: Path, point: Path, out: Path
) -> None:
    """FILE equals the point byte for byte, takes room only for data, and is its owner's alone."""
    result = ok("rp", "export", volume, "before", out / "copy.img")
    copy = out / "copy.img"
    assert copy.read_bytes() == point.read_bytes()
    status = copy.stat()
    assert stat.S_IMODE(status.st_mode) == 0o600
    assert status.st_nlink == 1
    assert status.st_blocks * 512 <= 400_000
    assert backend.calls == [(volume, "rp_resolve", {"point": "before"})]
    assert "Recovery point 3" in result.stderr
    assert "Verified" in result.stderr
    only(out, "copy.img")


@pytest.mark.usefixtures("way")
def test_an_existing_file_is_kept_without_force(volume: Path, point: Path, out: Path) -> None:
    """Without --force the file stays as it was; with it, it is replaced in one step."""
    copy = out / "copy.img"
    copy.write_text("precious")
    refused(run("rp", "export", volume, "3", copy), "exists", "--force")
    assert copy.read_text() == "precious"
    only(out, "copy.img")
    with copy.open("rb") as before:
        ok("rp", "export", volume, "3", copy, "--force")
        assert before.read() == b"precious"  # whoever had it open keeps the old one
    assert copy.read_bytes() == point.read_bytes()
    only(out, "copy.img")


@pytest.mark.usefixtures("way", "point")
def test_a_file_that_appears_meanwhile_is_kept(
    volume: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody else's file of that name, made during the export, is not replaced."""
    copy = out / "copy.img"
    check = exporting._check

    async def meanwhile(*args: Any) -> None:
        await check(*args)
        copy.write_text("faster")

    monkeypatch.setattr(exporting, "_check", meanwhile)
    refused(run("rp", "export", volume, "3", copy), "exists")
    assert copy.read_text() == "faster"
    only(out, "copy.img")


@pytest.mark.usefixtures("way", "point")
def test_a_full_target_leaves_nothing(
    volume: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ENOSPC while writing is a clear error; neither a part nor the old file is lost or left."""
    copy = out / "copy.img"
    copy.write_text("precious")
    real = os.pwrite
    room = [2]

    def pwrite(fd: int, data: Any, offset: int) -> int:
        if room[0] == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        room[0] -= 1
        return real(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    result = run("rp", "export", volume, "3", copy, "--force")
    refused(result, "No space left", "nothing was left behind", "another file system")
    assert copy.read_text() == "precious"
    only(out, "copy.img")


@pytest.mark.usefixtures("way", "point")
@pytest.mark.parametrize("step", ["fsync", "link", "rename"])
def test_whatever_fails_nothing_is_left(
    volume: Path, out: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """Sync, link or rename may fail: an error, and no file under any name."""

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, step, fail)
    force = ["--force"] if step == "rename" else []
    refused(run("rp", "export", volume, "3", out / "copy.img", *force), "cannot write")
    only(out)


@pytest.mark.usefixtures("way")
def test_file_systems_without_hard_links(
    volume: Path, point: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a second name is refused (FAT), the file is renamed, still replacing nothing."""
    real = os.link

    def link(source: Any, target: Any, **kwargs: Any) -> None:
        if not kwargs:
            raise PermissionError(errno.EPERM, "no hard links here")
        real(source, target, **kwargs)

    monkeypatch.setattr(os, "link", link)
    ok("rp", "export", volume, "3", out / "copy.img")
    assert (out / "copy.img").read_bytes() == point.read_bytes()
    refused(run("rp", "export", volume, "3", out / "copy.img"), "exists")
    only(out, "copy.img")


@pytest.mark.usefixtures("point")
def test_a_disk_that_lies_is_noticed(
    volume: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the target reads back differently from what was written, it never gets its name."""
    real = os.pwrite
    monkeypatch.setattr(
        os, "pwrite", lambda fd, data, at: real(fd, b"\1" * len(data), at) if at else 100
    )
    refused(run("rp", "export", volume, "3", out / "copy.img"), "reads back differently")
    only(out)


@pytest.mark.usefixtures("point")
def test_the_point_is_looked_up_where_a_trio_can_be_begun(
    volume: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whose server does not answer is opened by the client, in a trio that it begins."""
    from vsnapfs.daemon import client  # the fake one

    answered = client.call

    def looks_itself(*args: Any, **kwargs: Any) -> Any:
        async def nothing() -> None: ...

        trio.run(nothing)
        return answered(*args, **kwargs)

    monkeypatch.setattr(client, "call", looks_itself)
    ok("rp", "export", volume, "3", out / "copy.img")
    only(out, "copy.img")


@pytest.mark.usefixtures("point")
@pytest.mark.parametrize("call", ["open", "fstat", "preadv"])
def test_a_server_that_dies_during_an_export_is_named(
    volume: Path, out: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """Wherever it dies: which point, why, and that the export works without it; nothing is left."""
    real = getattr(os, call)

    def dead(what: Any, *args: Any, **kwargs: Any) -> Any:
        of = what if call == "open" else os.readlink(f"/proc/self/fd/{what}")
        if str(of).endswith("0003.img"):
            raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN))
        return real(what, *args, **kwargs)

    monkeypatch.setattr(os, call, dead)
    result = run("rp", "export", volume, "3", out / "copy.img")
    monkeypatch.undo()
    assert result.exit_code == 1
    assert "recovery point 3" in result.stderr
    assert "has died. Export again" in result.stderr
    only(out)


def test_a_server_that_ends_as_an_export_begins_is_not_needed(
    tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gone between two looks at the mount: the point is resolved and read in this process."""
    image = tmp_path / "image"
    image.write_bytes(b"before" * 1000)
    ok("create", tmp_path / "real", "--from", image, "--diff-area-size", "8MiB")
    ok("rp", "create", tmp_path / "real")
    looks = iter([Mount(tmp_path, FSTYPE, str(tmp_path / "real"), "0:1"), None])
    monkeypatch.setattr(exporting, "live_mount", lambda _: next(looks))
    ok("rp", "export", tmp_path / "real", "latest", out / "copy.img")
    assert (out / "copy.img").read_bytes() == image.read_bytes()


def test_a_damaged_point_says_where(
    volume: Path, point: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """EIO of the point ends the export with the place, and leaves nothing."""
    real = os.preadv

    def preadv(fd: int, buffers: Any, offset: int) -> int:
        if offset >= 3 * MIB:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    result = run("rp", "export", volume, "3", out / "copy.img")
    refused(result, "recovery point 3", f"byte {3 * MIB}", "vsnapfs verify")
    only(out)
    assert point.exists()


@pytest.mark.usefixtures("point")
def test_the_volumes_own_files_are_never_replaced(
    volume: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--force or not: replica, diff area, state and log are refused under every name they have."""
    for name in ("replica.img", "diff-area", "state", "events.jsonl", "volume.toml"):
        if name != "volume.toml":
            (volume / name).write_text(name)
        os.link(volume / name, tmp_path / f"hard-{name}")
        (tmp_path / f"soft-{name}").symlink_to(volume / name)
        before = (volume / name).read_bytes()
        for alias in (volume / name, tmp_path / f"hard-{name}", tmp_path / f"soft-{name}"):
            refused(run("rp", "export", volume, "3", alias, "--force"), "belongs to", code=2)
        assert (volume / name).read_bytes() == before
    monkeypatch.chdir(volume)
    (volume / "control.sock").unlink(missing_ok=True)
    refused(run("rp", "export", ".", "3", "control.sock"), "belongs to", code=2)


@pytest.mark.usefixtures("point")
def test_files_of_other_volumes_are_never_replaced(
    backend: Backend, volume: Path, tmp_path: Path
) -> None:
    """Neither those of the volume in the target's directory nor those of a mounted volume."""
    other = tmp_path / "other"
    other.mkdir()
    elsewhere = tmp_path / "elsewhere.diff"
    elsewhere.write_text("x")
    config.save(other, config.VolumeConfig("1" * 32, diff_area=str(elsewhere)))
    refused(run("rp", "export", volume, "3", other / "replica.img", "--force"), "other", code=2)
    backend.mount(other, tmp_path / "mnt2")
    refused(run("rp", "export", volume, "3", elsewhere, "--force"), "belongs to", code=2)
    assert elsewhere.read_text() == "x"


@pytest.mark.usefixtures("point")
def test_targets_that_are_no_place_for_a_file(volume: Path, tmp_path: Path, out: Path) -> None:
    """A directory, a device, the mounted tree and a missing directory each get their own words."""
    refused(run("rp", "export", volume, "3", out), "is a directory", code=2)
    refused(run("rp", "export", volume, "3", "/dev/null", "--force"), "regular file", "dd", code=2)
    refused(run("rp", "export", volume, "3", tmp_path / "mnt" / "x"), "inside the mounted", code=2)
    refused(run("rp", "export", volume, "3", out / "none" / "x"), "there is no directory")
    refused(run("rp", "export", volume, "3", ""), "empty", code=2)
    only(out)


def test_a_link_to_a_file_is_followed(volume: Path, point: Path, out: Path) -> None:
    """Exporting onto a symbolic link replaces what it points to, not the link."""
    (out / "link").symlink_to("real.img")
    ok("rp", "export", volume, "3", out / "link")
    assert (out / "link").is_symlink()
    assert (out / "real.img").read_bytes() == point.read_bytes()
    only(out, "link", "real.img")


class FakeVolume:
    """A volume that nobody serves, with one point whose reads come in odd pieces."""

    def __init__(self, image: bytes, fail: Callable[[int], None] = lambda offset: None) -> None:
        self.size = len(image)
        self.closed = 0
        self._image = image
        self._fail = fail

    async def open(self, directory: Path, *, look_only: bool) -> FakeVolume:
        return self

    def resolve(self, spec: str) -> Any:
        return SimpleNamespace(number=9)

    def open_point(self, number: int) -> Any:
        assert number == 9
        return SimpleNamespace(read=self._read, close=self._close)

    async def _read(self, offset: int, length: int) -> memoryview:
        self._fail(offset)
        return memoryview(self._image)[offset : offset + max(1, length // 3)]

    def _close(self) -> None:
        self.closed += 1

    async def close(self) -> None:
        self.closed += 10


@pytest.fixture
def unmounted(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> FakeVolume:
    import vsnapfs.volume

    fake = FakeVolume(random.Random(1).randbytes(2 * MIB + 5))
    monkeypatch.setattr(vsnapfs.volume, "Volume", fake, raising=False)
    assert backend.mounts == []
    return fake


def test_an_unmounted_volume_is_read_here(unmounted: FakeVolume, volume: Path, out: Path) -> None:
    """Without a server the volume is opened in this process, read in full, and closed again."""
    ok("rp", "export", volume, "latest", out / "copy.img")
    assert (out / "copy.img").read_bytes() == unmounted._image
    assert unmounted.closed == 11


def test_an_unmounted_volume_is_closed_after_an_error(
    unmounted: FakeVolume, volume: Path, out: Path
) -> None:
    """A read that fails closes point and volume too, and leaves no file."""

    def fail(offset: int) -> None:
        if offset > MIB:
            raise OSError(errno.EIO, "checksum")

    unmounted._fail = fail
    refused(run("rp", "export", volume, "9", out / "copy.img"), "recovery point 9")
    assert unmounted.closed == 11
    only(out)


def test_a_point_that_ends_too_early_is_an_error(
    unmounted: FakeVolume, volume: Path, out: Path
) -> None:
    """A short point is never exported as if it were whole."""
    unmounted.size += 4096
    refused(run("rp", "export", volume, "9", out / "copy.img"), "ends at byte")
    only(out)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_export_that_is_ended_leaves_nothing(
    tmp_path: Path, out: Path, number: signal.Signals
) -> None:
    """Ctrl-C and SIGTERM in the middle remove the part, on every kind of file system."""
    code = f"""
import errno, os, sys, trio
from types import SimpleNamespace
import vsnapfs.volume
from vsnapfs.cli import exporting
from vsnapfs.daemon.mounts import FSTYPE, Mount
real = os.open
def without(path, flags, *args, **kwargs):
    if flags & os.O_TMPFILE == os.O_TMPFILE:
        raise OSError(errno.EOPNOTSUPP, "no")
    return real(path, flags, *args, **kwargs)
os.open = without
class Volume:
    size = 1 << 30
    async def open(directory, *, look_only): return Volume
    def resolve(spec): return SimpleNamespace(number=1)
    def open_point(number): return SimpleNamespace(read=read, close=lambda: None)
    async def close(): pass
async def read(offset, length):
    if offset == 0: print("running", flush=True)
    await trio.sleep(0.01)
    return b"x" * length
vsnapfs.volume.Volume = Volume
sys.argv = ["vsnapfs", "rp", "export", {str(tmp_path)!r}, "1", {str(out / "copy.img")!r}]
from vsnapfs.cli import main
main()
"""
    config.save(tmp_path, config.VolumeConfig("0" * 32))
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "running\n"
    time.sleep(0.1)
    assert len(os.listdir(out)) == 1
    process.send_signal(number)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 128 + number, errors
    assert "Traceback" not in errors
    only(out)
