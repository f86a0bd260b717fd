"""What is looked at before a mount, and what the mount table and /sys say; nothing is mounted."""

from __future__ import annotations

import errno
import os
import re
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vsnapfs import config, openers
from vsnapfs.daemon import loops, mounts, preflight, process, server
from vsnapfs.errors import BusyError, UsageError, VsnapError

TABLE = (
    rb"""22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
30 22 0:39 / /mnt/a\040b rw,nosuid shared:5 - fuse.vsnapfs /srv/vol\0541\134x rw,user_id=0
31 22 0:40 / /mnt/x rw - fuse.sshfs host:/ rw
32 31 0:41 / /mnt/x rw master:1 propagate_from:2 - fuse.vsnapfs /srv/\346\251\237 rw
33 22 7:0 / /mnt/files rw - ext4 /dev/loop0 rw
torn line
"""
    b"34 22 0:42 / /mnt/raw\xff rw - fuse.vsnapfs /srv/\xff rw\n"
)


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "mountinfo"
    path.write_bytes(TABLE)
    monkeypatch.setattr(mounts, "_MOUNTINFO", str(path))
    return path


def test_the_mount_table_is_read_with_all_its_escapes(table: Path) -> None:
    """Blanks, commas, backslashes and bytes outside UTF-8 come out as they are."""
    found = mounts.find_mounts()
    assert [(str(m.mountpoint), str(m.volume)) for m in found] == [
        ("/mnt/a b", r"/srv/vol,1\x"),
        ("/mnt/x", "/srv/機"),
        (os.fsdecode(b"/mnt/raw\xff"), os.fsdecode(b"/srv/\xff")),
    ]
    assert [m.device for m in found] == ["0:39", "0:41", "0:42"]
    assert len(mounts.all_mounts()) == 6


def test_the_top_mount_hides_what_is_below(table: Path) -> None:
    """Of two mounts on one directory the later is the one that is seen."""
    top = mounts.top_mount(Path("/mnt/x"))
    assert top is not None
    assert top.device == "0:41"
    assert mounts.top_mount(Path("/mnt/nothing")) is None


def test_a_mount_is_dead_only_if_the_kernel_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """ENOTCONN is a dead server; a refusal or a server that takes its time is not."""
    for code, dead in (
        (errno.ENOTCONN, True), (errno.ECONNABORTED, True), (errno.EACCES, False), (0, False),
        (errno.ETIMEDOUT, False),
    ):  # fmt: skip
        monkeypatch.setattr(mounts, "_errno_of_asking", lambda _path, code=code: code)
        assert mounts.Mount(Path("/m"), mounts.FSTYPE, "/v", "0:9").stale is dead


def test_looking_at_a_stuck_mount_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that does not answer is given up, not waited for."""
    import threading

    release = threading.Event()
    monkeypatch.setattr(mounts, "_PATIENCE", 0.1)
    monkeypatch.setattr(os, "statvfs", lambda _path: release.wait(10))
    assert mounts._errno_of_asking(Path("/stuck")) == errno.ETIMEDOUT
    release.set()


@pytest.mark.parametrize(
    ("given", "passed_on"),
    [
        ((), set()),
        (("",), set()),
        (("rw,nodev",), set()),
        (("allow_other,noatime", "nosuid"), {"allow_other", "noatime"}),
        ((" allow_other , noexec ",), {"allow_other", "noexec"}),
        ("allow_other,rw", {"allow_other"}),
    ],
)
def test_options(given: Any, passed_on: set[str]) -> None:
    """Known options are taken, alone or in lists; those every mount has are dropped."""
    assert preflight.parse_options(given) == passed_on


@pytest.mark.parametrize("option", ["ro", "max_read=9", "fsname=x", "Allow_Other", "-o", "x" * 9])
def test_other_options_are_refused(option: str) -> None:
    """An unknown option is an error that lists the known ones; `ro` says why not."""
    with pytest.raises(UsageError) as caught:
        preflight.parse_options(["allow_other", option])
    assert option in caught.value.message
    assert ("read-only" if option == "ro" else "allow_other") in caught.value.hint


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    """A directory that is a volume as far as volume.toml goes."""
    directory = tmp_path / "vol"
    directory.mkdir()
    config.save(directory, config.VolumeConfig(volume_id="0" * 32))
    return directory


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty directory, and a machine that can mount."""
    monkeypatch.setattr(preflight, "DEVICE", "/dev/null")
    place = tmp_path / "mnt"
    place.mkdir()
    return place


def test_a_plan_is_resolved(volume: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative names and links become absolute paths, since the server works in /."""
    link = place.parent / "link"
    link.symlink_to(place)
    monkeypatch.chdir(place.parent)
    plan = preflight.check(Path("vol"), Path("link"), ["allow_other"] if os.geteuid() == 0 else [])
    assert (plan.directory, plan.mountpoint) == (volume, place)
    assert plan.shared == (os.geteuid() == 0)


def test_what_is_no_volume_is_refused(tmp_path: Path, place: Path) -> None:
    """A directory without volume.toml is not mounted, and nothing is written into it."""
    with pytest.raises(VsnapError) as caught:
        server.spawn(tmp_path / "mnt", place)
    assert caught.value.code == "no-volume"
    assert list(place.iterdir()) == []


@pytest.mark.parametrize("kind", ["missing", "file", "not empty", "hidden file"])
def test_a_mountpoint_must_be_an_empty_directory(volume: Path, place: Path, kind: str) -> None:
    """Anything else is refused with the reason, and nothing is started."""
    if kind == "missing":
        place.rmdir()
    elif kind == "file":
        place.rmdir()
        place.write_text("x")
    else:
        (place / (".x" if kind == "hidden file" else "x")).touch()
    with pytest.raises(UsageError) as caught:
        server.spawn(volume, place)
    words = {"missing": "No such file", "file": "Not a directory"}
    assert words.get(kind, "is not empty") in caught.value.message
    assert not (volume / "server.log").exists()


def test_a_machine_without_fuse(
    volume: Path, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A missing /dev/fuse is named before anything is started."""
    monkeypatch.setattr(preflight, "DEVICE", str(tmp_path / "no-fuse"))
    with pytest.raises(VsnapError, match="no-fuse is missing") as caught:
        server.spawn(volume, place)
    assert caught.value.code == "no-fuse"
    monkeypatch.setattr(preflight, "DEVICE", str(tmp_path))
    with pytest.raises(VsnapError, match="cannot be opened"):
        server.serve(volume, place)


def test_a_user_needs_fusermount3(
    volume: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without root and without fusermount3 nothing can be mounted; the package is named."""
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(VsnapError, match="fusermount3 is missing") as caught:
        preflight.check(volume, place)
    assert "fuse3" in caught.value.hint


def test_allow_other_needs_permission(
    volume: Path, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user may share a mount only if fuse.conf says so; a commented line does not."""
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(preflight.shutil, "which", lambda _name: "/bin/true")
    conf = tmp_path / "fuse.conf"
    monkeypatch.setattr(preflight, "FUSE_CONF", str(conf))
    for text in (None, "#user_allow_other\n", "user_allow_other_not\n"):
        if text is not None:
            conf.write_text(text)
        with pytest.raises(VsnapError, match="allow_other"):
            preflight.check(volume, place, ["allow_other"])
    conf.write_text("# x\nuser_allow_other\n")
    assert preflight.check(volume, place, ["allow_other"]).shared


class FakeMount(SimpleNamespace):
    mountpoint: Path
    volume: Path
    stale: bool


def test_a_volume_that_is_mounted_is_not_mounted_again(
    volume: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error says where it is mounted."""
    mount = FakeMount(mountpoint=Path("/mnt/there"), volume=volume, stale=False)
    monkeypatch.setattr(mounts, "find_mounts", lambda: [mount])
    with pytest.raises(BusyError, match="mounted already, on /mnt/there"):
        preflight.check(volume, place)


def test_dead_mounts_of_the_volume_are_cleaned(
    volume: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dead mount of this volume is taken away wherever it is; one of another volume is not."""
    cleaned: list[Path] = []
    dead = FakeMount(mountpoint=Path("/mnt/dead"), volume=volume, stale=True)
    other = FakeMount(mountpoint=Path("/mnt/other"), volume=Path("/other"), stale=True)
    monkeypatch.setattr(mounts, "find_mounts", lambda: [dead, other])
    monkeypatch.setattr(mounts, "clean_stale", lambda mount: cleaned.append(mount.mountpoint))
    preflight.check(volume, place)
    assert cleaned == [Path("/mnt/dead")]


@pytest.mark.parametrize(
    ("fstype", "stale", "words"),
    [("ext4", False, "mountpoint already"), ("fuse.sshfs", True, "dead mount of fuse.sshfs")],
)
def test_a_mountpoint_in_use_is_refused(
    volume: Path,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    fstype: str,
    stale: bool,
    words: str,
) -> None:
    """Nothing is mounted over another file system, and other programs' wrecks are left alone."""
    there = SimpleNamespace(fstype=fstype, stale=stale, source="host:/", mountpoint=place)
    monkeypatch.setattr(mounts, "top_mount", lambda _path: there)
    with pytest.raises(BusyError, match=words):
        preflight.check(volume, place)


def test_users_of_a_mount_are_named(tmp_path: Path) -> None:
    """A process with an open file, or standing in the directory, is found by pid and name."""
    (tmp_path / "file").touch()
    with (
        open(tmp_path / "file") as file,
        subprocess.Popen(["sleep", "30"], stdin=file) as opener,
        subprocess.Popen(["sleep", "30"], cwd=tmp_path) as stander,
    ):
        try:
            users = mounts.users_of(tmp_path)
        finally:
            opener.terminate()
            stander.terminate()
    assert f"process {opener.pid} (sleep)" in users
    assert f"process {stander.pid} (sleep)" in users
    assert mounts.users_of(tmp_path / "nothing") == []


@pytest.fixture
def sys_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A /sys/block with loop0 and loop10 on our replica, loop1 elsewhere, loop2 free."""
    for name, backing in (
        ("loop0", "/mnt/a b/replica.img"),
        ("loop10", "/mnt/a b/replica.img (deleted)"),
        ("loop1", "/mnt/a bc/replica.img"),
        ("loop2", None),
    ):
        (tmp_path / name / "holders").mkdir(parents=True)
        (tmp_path / name / "dev").write_text(f"7:{name[4:]}\n")
        if backing is not None:
            (tmp_path / name / "loop").mkdir()
            (tmp_path / name / "loop" / "backing_file").write_text(backing + "\n")
    monkeypatch.setattr(loops, "_SYS_BLOCK", tmp_path)
    monkeypatch.setattr(openers, "_SYS_BLOCK", tmp_path)
    return tmp_path


def test_loop_devices_of_a_mount_are_found(sys_block: Path) -> None:
    """Devices are found by what lies under the mountpoint, not by how its name begins."""
    assert mounts.loop_devices(Path("/mnt/a b")) == ["/dev/loop0", "/dev/loop10"]
    assert mounts.loop_devices(Path("/mnt/a")) == []


def test_only_root_attaches_and_detaches(sys_block: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without root the error says what to do instead."""
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    for call in (
        lambda: loops.attach_loop(Path("/mnt/a b/replica.img")),
        lambda: loops.detach_loop("/dev/loop0"),
    ):
        with pytest.raises(VsnapError, match="only root") as caught:
            call()
        assert caught.value.code == "not-root"


@pytest.fixture
def as_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)


def played_losetup(monkeypatch: pytest.MonkeyPatch, code: int, out: str, err: str) -> None:
    def run(*_args: Any, **_kwargs: Any) -> Any:
        return SimpleNamespace(returncode=code, stdout=out, stderr=err)

    monkeypatch.setattr(loops.shutil, "which", lambda *_args, **_kwargs: "/sbin/losetup")
    monkeypatch.setattr(loops.subprocess, "run", run)


@pytest.mark.usefixtures("as_root")
def test_a_replica_is_attached_once(sys_block: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second loop device over one replica is refused: its cache would not know of the first."""
    played_losetup(monkeypatch, 0, "/dev/loop7\n", "")
    with pytest.raises(BusyError, match="/dev/loop0"):
        loops.attach_loop(Path("/mnt/a b/replica.img"))
    assert loops.attach_loop(Path("/mnt/new/replica.img")) == "/dev/loop7"


@pytest.mark.usefixtures("as_root", "sys_block")
@pytest.mark.parametrize(
    ("said", "code"),
    [
        ("losetup: /m/replica.img: failed to set up loop device: No such device", "offline"),
        ("losetup: cannot find an unused loop device: Permission denied", "losetup-failed"),
        ("", "losetup-failed"),
    ],
)
def test_losetup_s_refusals(monkeypatch: pytest.MonkeyPatch, said: str, code: str) -> None:
    """An offline volume is recognised; anything else is told in losetup's words."""
    played_losetup(monkeypatch, 1, "", said)
    with pytest.raises(VsnapError) as caught:
        loops.attach_loop(Path("/m/replica.img"))
    assert caught.value.code == code


@pytest.mark.usefixtures("as_root", "sys_block")
def test_a_missing_losetup_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without losetup the error says which package it belongs to."""
    monkeypatch.setattr(loops.shutil, "which", lambda *_args, **_kwargs: None)
    with pytest.raises(VsnapError, match="losetup is not installed"):
        loops.attach_loop(Path("/m/replica.img"))


@pytest.mark.usefixtures("as_root")
def test_a_device_in_use_is_not_detached(
    sys_block: Path, table: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mounted file system or a stacked device on it is named; nothing is called."""
    played_losetup(monkeypatch, 99, "", "must not be called")
    with pytest.raises(BusyError, match="/mnt/files"):
        loops.detach_loop("/dev/loop0")
    (sys_block / "loop10" / "holders" / "dm-3").touch()
    with pytest.raises(BusyError, match="/dev/dm-3"):
        loops.detach_loop("/dev/loop10")
    with pytest.raises(VsnapError, match="not attached"):
        loops.detach_loop("/dev/loop2")


@pytest.mark.usefixtures("as_root")
def test_detaching_waits_until_the_device_is_gone(
    sys_block: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losetup may only mark a device to go; that is not taken for gone."""
    played_losetup(monkeypatch, 0, "", "")
    monkeypatch.setattr(loops, "_DETACH_PATIENCE", 0.1)
    with pytest.raises(BusyError, match="still in use"):
        loops.detach_loop("/dev/loop1")


def test_the_server_s_log_is_private_and_no_link(volume: Path, tmp_path: Path) -> None:
    """server.log is made 0600, appended to, and not opened through a symbolic link."""
    for _ in range(2):
        fd = process.open_log(volume)
        os.write(fd, b"line\n")
        os.close(fd)
    log = volume / "server.log"
    assert log.read_text() == "line\nline\n"
    assert stat.S_IMODE(log.stat().st_mode) == 0o600
    log.unlink()
    log.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(VsnapError, match=r"server\.log"):
        process.open_log(volume)
    assert not (tmp_path / "elsewhere").exists()


def test_preparing_never_fails() -> None:
    """Limits and privileges are taken as far as they go, in a process of its own."""
    code = (
        "import resource; from vsnapfs.daemon import process; process.prepare();"
        "soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE); assert soft == hard;"
        "import os; assert os.umask(0) == 0o077;"
        "print(open('/proc/self/oom_score_adj').read())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    capabilities = int(re.search(r"CapEff:\s*(\w+)", Path("/proc/self/status").read_text())[1], 16)
    if capabilities & 1 << 24:  # CAP_SYS_RESOURCE
        assert int(done.stdout) == -500


def test_the_leading_exception_of_a_group() -> None:
    """Of nested groups an interruption wins, then an error for people, then the first."""
    error, other = VsnapError("x"), ValueError("y")
    group = BaseExceptionGroup("g", [other, ExceptionGroup("h", [error])])
    assert process.leading(group) is error
    stop = KeyboardInterrupt()
    assert process.leading(BaseExceptionGroup("g", [group, stop])) is stop
    assert process.leading(ExceptionGroup("g", [other, TypeError()])) is other
    assert process.leading(other) is other
