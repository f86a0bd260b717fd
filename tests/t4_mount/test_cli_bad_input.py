"""Bad input on the real command line: a clear error, an exit code, and nothing changed."""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from mounted_rig import MIB, Machine, Rig, quiet

from vsnapfs.daemon import mounts

pytestmark = pytest.mark.needs_fuse


def snapshot(base: Path) -> dict[str, str]:
    """Name, type, mode, size and content of everything below a directory, mounts left out."""
    found = {}
    for folder, names, files in os.walk(base):
        names[:] = [name for name in names if not os.path.ismount(f"{folder}/{name}")]
        for name in (*names, *files):
            path = Path(folder, name)
            info = path.lstat()
            content = ""
            if stat.S_ISREG(info.st_mode):
                content = hashlib.sha256(path.read_bytes()).hexdigest()
            found[str(path)] = f"{stat.filemode(info.st_mode)} {info.st_size} {content}"
    return found


def refused(base: Path, *args: object, says: str, code: int | None = None) -> None:
    """The command fails with one clear error that holds `says`; nothing below `base` changes."""
    before = snapshot(base)
    done = quiet(sys.executable, "-m", "vsnapfs", *map(str, args))
    said = f"exit code {done.returncode}\n{done.stdout}{done.stderr}"
    assert done.returncode not in (0, -11), said
    assert code is None or done.returncode == code, said
    assert "vsnapfs: error: " in done.stderr, said
    assert "Traceback" not in done.stderr, said
    assert "unexpected" not in done.stderr, said
    assert says in done.stderr, said
    assert done.stdout == "", said
    after = snapshot(base)
    # An attempt to start a server opens its log, which is made for that; nothing is said in it.
    for name in set(after) - set(before):
        if name.endswith("/server.log") and Path(name).stat().st_size == 0:
            del after[name]
    assert after == before


@pytest.fixture
def rig(machine: Machine) -> Rig:
    """An unmounted volume with one point."""
    rig = machine.rig(size=4 * MIB, area=8 * MIB)
    rig.create_point("kept")
    return rig


# ---- sizes --------------------------------------------------------------------------------------

BAD_SIZES = {
    "0": "zero",
    "0GiB": "zero",
    "-1": "negative",
    "-1GiB": "negative",
    "9223372036854775808": "",
    "8EiB": "",
    "99999999999999999999999999": "",
    "1e400": "",
    "nan": "",
    "inf": "",
    "10 potatoes": "potatoes",
    "GiB": "GiB",
    "": "",
    "0x10": "0x10",
    "1,5GiB": "1,5GiB",
}


@pytest.mark.parametrize(
    "size",
    [
        pytest.param(size, marks=() if size in ("0", "-1GiB", "nan", "GiB") else pytest.mark.slow)
        for size in BAD_SIZES
    ],
)
def test_sizes_that_are_none(rig: Rig, machine: Machine, size: str) -> None:
    """Zero, negative, absurd or unparsable: refused for every option that takes a size."""
    new = machine.base / "new"
    good = "8MiB"
    says = BAD_SIZES[size]
    create = ("create", new)
    refused(machine.base, *create, f"--size={size}", f"--diff-area-size={good}", says=says, code=2)
    refused(machine.base, *create, f"--size={good}", f"--diff-area-size={size}", says=says, code=2)
    refused(machine.base, "resize", rig.directory, f"--diff-area-size={size}", says=says, code=2)
    blocks = (*create, f"--size={good}", f"--diff-area-size={good}", f"--block-size={size}")
    refused(machine.base, *blocks, says=says, code=2)


def test_sizes_that_are_too_small_or_too_large(rig: Rig, machine: Machine) -> None:
    """A diff area below its smallest size, a block that is none, more than there can be."""
    base, new = machine.base, machine.base / "new"
    for size in ("1", "512KiB", "786431"):
        create = ("create", new, "--size", "1MiB", "--diff-area-size", size)
        refused(base, *create, says="needs at least", code=2)
        refused(base, "resize", rig.directory, "--diff-area-size", size, says="at least", code=2)
    for block in ("1", "2KiB", "3000", "12KiB", "2MiB"):
        create = ("create", new, "--size", "1MiB", "--diff-area-size", "64MiB")
        refused(base, *create, "--block-size", block, says="power of two", code=2)
    largest = ("create", new, "--size", "9223372036854775807", "--diff-area-size", "8MiB")
    refused(base, *largest, says="at most 64.0 TiB", code=2)
    largest = ("create", new, "--size", "1MiB", "--diff-area-size", "9223372036854775807")
    refused(base, *largest, says="at most 64.0 TiB", code=2)
    huge = ("create", new, "--size", "1MiB", "--diff-area-size", "60TiB")
    done = quiet(sys.executable, "-m", "vsnapfs", *map(str, huge))
    # Only a sixteenth, at most 1 GiB, is reserved at once: this one is allowed to be created.
    assert done.returncode in (0, 1), done.stderr


def test_shrinking_below_what_is_used(rig: Rig, machine: Machine) -> None:
    """A total below what is used is refused and says which would do; then that one is taken."""
    rig.mount()
    for _ in range(2):  # What was there before the first was zeros, and cost next to nothing.
        rig.write(0, os.urandom(4 * MIB))
        rig.create_point()
    rig.unmount()
    least = rig.status()["diff_area"]["minimum"]
    shrink = ("resize", rig.directory, "--diff-area-size")
    refused(machine.base, *shrink, least - 1, says="holds more than", code=2)
    assert quiet(sys.executable, "-m", "vsnapfs", *shrink, str(least)).returncode == 0


# ---- files --------------------------------------------------------------------------------------


def test_files_that_are_there_or_the_same(rig: Rig, machine: Machine) -> None:
    """One path for two things, a directory with a volume, files that would be overwritten."""
    base, new = machine.base, machine.base / "new"
    create = ("create", new, "--size", "1MiB", "--diff-area-size", "8MiB")
    same = base / "same"
    refused(base, *create, "--replica", same, "--diff-area", same, says="must differ", code=2)
    (base / "link").symlink_to(same)
    refused(
        base, *create, "--replica", same, "--diff-area", base / "link", says="must differ", code=2
    )
    again = ("create", rig.directory, "--size", "1MiB", "--diff-area-size", "8MiB")
    refused(base, *again, says="already holds a volume", code=2)
    refused(base, *again, "--force", says="already holds a volume", code=2)
    taken = base / "taken"
    taken.write_bytes(b"precious")
    refused(base, *create, "--diff-area", taken, says="already exists", code=2)
    refused(base, *create, "--diff-area", rig.area, says="already exists", code=2)
    image = base / "image"
    image.write_bytes(bytes(MIB))
    copy = ("create", new, "--from", image, "--diff-area-size", "8MiB")
    refused(base, *copy, "--replica", taken, says="already exists", code=2)
    refused(base, *copy, "--size", "512KiB", says="--size is", code=2)
    refused(base, *create, "--from", base / "nowhere", says="cannot be opened", code=2)
    refused(base, *create, "--replica", taken, says="--size is", code=2)
    refused(base, "create", new, "--diff-area-size", "8MiB", says="Give --size", code=2)
    refused(base, *create, "--diff-area", "", says="empty", code=2)
    refused(base, *create, "--replica", new / "state", says="needs for itself", code=2)
    refused(base, "create", taken, "--size", "1MiB", "--diff-area-size", "8MiB", says="directory")
    refused(base, *create, "--on-full", "pray", says="pray", code=2)
    refused(base, *create, "--diff-area", base / "no" / "such", says="could not be created")
    os.mkfifo(base / "pipe")
    refused(base, *create, "--replica", base / "pipe", says="neither a file nor", code=2)
    refused(base, *create, "--diff-area", base / "pipe", says="neither a file nor")


def test_the_replica_or_diff_area_of_a_volume_in_use(rig: Rig, machine: Machine) -> None:
    """Files of a volume that is being served cannot be given to a new one, not even by force."""
    base, new = machine.base, machine.base / "new"
    rig.mount()
    create = ("create", new, "--diff-area-size", "8MiB", "--force")
    refused(base, *create, "--replica", rig.image, says="in use")
    refused(base, *create, "--size", "1MiB", "--diff-area", rig.area, says="in use")
    assert rig.status()["state"] == "online"
    rig.unmount()


def test_files_that_are_no_diff_area(rig: Rig, machine: Machine) -> None:
    """`inspect` and every command on the volume refuse what is foreign, truncated or newer."""
    base = machine.base
    own = rig.area.read_bytes()
    other = machine.rig("other", size=4 * MIB, area=8 * MIB)
    newer = bytearray(own)
    newer[8] = newer[65536 + 8] = 7
    cases = {
        "no vsnapfs diff area": os.urandom(MIB),
        "only 1000 bytes": own[:1000],
        "format version 7": bytes(newer),
        "of another volume": other.area.read_bytes(),
    }
    place = base / "place"
    place.mkdir()
    for says, content in cases.items():
        rig.area.write_bytes(content)
        commands: list[tuple[object, ...]] = [
            ("mount", rig.directory, place),
            ("online", rig.directory, "--give-up-recovery-points", "--yes"),
        ]
        if "another" in says:
            commands += [
                ("status", rig.directory),
                ("rp", "create", rig.directory),
                ("rp", "delete", rig.directory, "1"),
                ("rp", "export", rig.directory, "1", base / "out"),
            ]
        for command in commands:
            refused(base, *command, says=says, code=1)
        if "another" not in says:
            refused(base, "inspect", rig.area, says="")
    rig.area.write_bytes(own)
    refused(base, "inspect", base / "nowhere", says="nowhere")
    refused(base, "inspect", base, says="")
    assert rig.points() == [1]


# ---- volumes, points, export --------------------------------------------------------------------


def test_what_is_no_volume(machine: Machine) -> None:
    """A directory that is none, is empty or holds a spoilt volume.toml, for every command."""
    base = machine.base
    empty = base / "empty"
    empty.mkdir()
    for what in (empty, base / "nowhere", ""):
        for command in (
            ("mount", what, empty),
            ("umount", what),
            ("attach", what),
            ("detach", what),
            ("status", what),
            ("rp", "create", what),
            ("rp", "list", what),
            ("resize", what, "--diff-area-size", "8MiB"),
            ("offline", what),
            ("online", what),
            ("events", what),
            ("verify", what),
        ):
            done = quiet(sys.executable, "-m", "vsnapfs", *map(str, command))
            assert done.returncode in (1, 2), (command, done)
            assert "vsnapfs: error: " in done.stderr, command
            assert "Traceback" not in done.stderr, command
    assert os.listdir(empty) == []
    assert os.listdir(base) == ["empty"]


def test_points_that_do_not_exist(rig: Rig, machine: Machine) -> None:
    """A number, word or label that names no point: refused, and says which there are."""
    base = machine.base
    for mounted in (False, True):
        if mounted:
            rig.mount()
        every = ("0", "2", "-1", "99999999999999999999", "nobody", "1.0", "٣", "../1")
        for point in every[4:6] if mounted else every:
            refused(base, "rp", "delete", rig.directory, "--", point, says="no recovery point")
        refused(base, "rp", "restore", rig.directory, "2", says="no recovery point")
        refused(base, "rp", "export", rig.directory, "2", base / "out", says="no recovery point")
        refused(base, "rp", "delete", rig.directory, "", says="empty", code=2)
        assert rig.points() == [1]
    rig.unmount()
    rig.call("rp_delete", point=1)
    for word in ("latest", "oldest"):
        refused(base, "rp", "restore", rig.directory, word, says="It has none")


@pytest.mark.parametrize(
    "label",
    ["", " ", "12", "latest", "oldest", "a/b", "new\nline", "x" * 97, " a", "kept", "\x1b[1m"],
)
def test_labels_that_cannot_be(rig: Rig, machine: Machine, label: str) -> None:
    """All digits, reserved words, a slash, control characters, too long, or taken."""
    refused(
        machine.base, "rp", "create", rig.directory, "--label", label, says="label", code=2
    ) if (label != "kept") else refused(
        machine.base, "rp", "create", rig.directory, "--label", label, says="already"
    )


def test_exports_that_would_overwrite(rig: Rig, machine: Machine) -> None:
    """An existing file without --force, a directory, the volume's own files even with it."""
    base = machine.base
    taken = base / "taken"
    taken.write_bytes(b"precious")
    export = ("rp", "export", rig.directory, "1")
    refused(base, *export, taken, says="exists")
    refused(base, *export, base, says="")
    refused(base, *export, base / "no" / "such", says="")
    refused(base, *export, "", says="empty", code=2)
    for own in (rig.image, rig.area, rig.directory / "state", rig.directory / "volume.toml"):
        refused(base, *export, own, "--force", says="")
    (base / "dangling").symlink_to(base / "no" / "where")
    refused(base, *export, base / "dangling", says="no directory")
    done = quiet(sys.executable, "-m", "vsnapfs", *map(str, export), str(taken), "--force")
    assert done.returncode == 0, done.stderr
    assert taken.read_bytes() == bytes(4 * MIB)


# ---- mounting -----------------------------------------------------------------------------------


def test_mountpoints_that_will_not_do(rig: Rig, machine: Machine) -> None:
    """Missing, a file, not empty, inside the volume's own mount, taken; and mounting twice."""
    base = machine.base
    full, place = base / "full", base / "place"
    full.mkdir()
    place.mkdir()
    (full / "precious").write_text("x")
    refused(base, "mount", rig.directory, full, says="is not empty", code=2)
    refused(base, "mount", rig.directory, full / "precious", says="cannot be a mountpoint", code=2)
    refused(base, "mount", rig.directory, base / "nowhere", says="cannot be a mountpoint", code=2)
    refused(base, "mount", rig.directory, rig.directory, says="is not empty", code=2)
    refused(base, "mount", rig.directory, "", says="empty", code=2)
    refused(base, "mount", rig.directory, place, "-o", "ro", says="not supported", code=2)
    refused(base, "mount", rig.directory, place, "-o", "sparkle", says="sparkle", code=2)
    rig.mount()
    refused(base, "mount", rig.directory, place, says="mounted already", code=1)
    refused(base, "mount", rig.directory, rig.place, says="mounted already", code=1)
    other = machine.rig("other", size=MIB, area=8 * MIB)
    refused(base, "mount", other.directory, rig.place, says="mountpoint already", code=1)
    refused(base, "mount", other.directory, rig.place / "recovery-points", says="", code=2)
    refused(base, "umount", other.directory, says="is not mounted", code=1)
    refused(base, "attach", other.directory, says="not mounted", code=1)
    refused(base, "detach", rig.directory, says="no loop device", code=1)
    assert rig.status()["state"] == "online"
    rig.unmount()
    assert os.listdir(place) == []


IN_A_NAMESPACE = ["unshare", "--mount", "sh", "-c"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can hide /dev/fuse")
def test_a_missing_dev_fuse(rig: Rig, machine: Machine) -> None:
    """No /dev/fuse, or something else in its place: said so, with what to do."""
    probe = subprocess.run([*IN_A_NAMESPACE, "true"], capture_output=True, text=True, check=False)
    if probe.returncode != 0:  # a chroot whose root is no mount
        pytest.skip(f"no mount namespace here: {probe.stderr.strip()}")
    command = [sys.executable, "-m", "vsnapfs", "mount", str(rig.directory), str(rig.place)]
    before = snapshot(machine.base)
    hidden = "mount -t tmpfs none /dev && mknod /dev/null c 1 3"
    for script, says in (
        (hidden, "/dev/fuse is missing"),
        (f"{hidden} && touch /dev/fuse && chmod 0 /dev/fuse", ""),
        ("mount --bind /dev/null /dev/fuse", ""),
    ):
        done = subprocess.run(
            [*IN_A_NAMESPACE, f'{script} && exec "$@"', "-", *command],
            capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip
        assert done.returncode == 1, done
        assert "vsnapfs: error: " in done.stderr
        assert says in done.stderr
        assert "Traceback" not in done.stderr, done.stderr
        assert mounts.mount_of(rig.directory) is None
    after = {
        name: what for name, what in snapshot(machine.base).items() if "server.log" not in name
    }
    changed = {name for name in after if before.get(name) != after[name]}
    assert changed <= {str(rig.directory / name) for name in ("events.jsonl", "state", "diff-area")}
    rig.mount()
    assert rig.points() == [1]


AS_NOBODY = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--"]


@pytest.fixture
def python_for_nobody() -> str:
    """A Python that an ordinary user can run with our packages."""
    if os.geteuid() != 0:
        pytest.skip("only root can become somebody else")
    probe = "import numpy, pyfuse3, trio, xxhash, click, rich, vsnapfs.cli"
    for python in (sys.executable, "/usr/bin/python3"):
        # By a shell in between, for the first program still has root's way through directories.
        words = [*AS_NOBODY, "/bin/sh", "-c", f"{python} -c '{probe}'"]
        done = subprocess.run(words, capture_output=True, check=False)
        if done.returncode == 0:
            return python
    pytest.skip("ordinary users cannot reach this Python or this checkout")


def test_an_ordinary_user(python_for_nobody: str) -> None:
    """Without fusermount3 no mount, without root no loop device; each error says what is needed."""
    base = Path("/tmp") / f"vsnapfs-nobody-{os.getpid()}"
    tools = base / "bin"
    tools.mkdir(parents=True)
    base.chmod(0o777)
    fusermount = shutil.which("fusermount3")
    open_fuse = f"mknod {base}/fuse c 10 229 && chmod 666 {base}/fuse"
    script = f'{open_fuse} && mount --bind {base}/fuse /dev/fuse && exec "$@"'

    def nobody(words: str, path: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*IN_A_NAMESPACE, script, "-", *AS_NOBODY, "/bin/sh", "-c", words],
            capture_output=True, text=True, check=False, timeout=60,
            env={**os.environ, "V": f"{python_for_nobody} -m vsnapfs", "PATH": path},
        )  # fmt: skip

    try:
        made = nobody(
            f"$V create {base}/vol --size 1MiB --diff-area-size 8MiB && mkdir {base}/mnt",
            os.environ["PATH"],
        )
        assert made.returncode == 0, made.stderr
        (base / "fuse").unlink()
        for tool in ("mknod", "chmod", "mount", "setpriv", "unshare", "sh"):
            (tools / tool).symlink_to(str(shutil.which(tool)))
        without = nobody(f"$V mount {base}/vol {base}/mnt", str(tools))
        assert without.returncode == 1, without
        assert "fusermount3 is missing" in without.stderr
        assert "Install the package fuse3" in without.stderr
        (base / "fuse").unlink()
        if fusermount is None:
            return
        attached = nobody(
            f"$V mount {base}/vol {base}/mnt && {{ $V attach {base}/vol; a=$?;"
            f" $V umount {base}/vol; exit $((10 + a)); }}",
            os.environ["PATH"],
        )
        assert attached.returncode == 11, attached
        assert "only root can attach loop devices" in attached.stderr
        assert "Traceback" not in attached.stderr
    finally:
        shutil.rmtree(base)


def test_commands_that_are_none(machine: Machine) -> None:
    """Unknown commands, options and missing arguments: exit code 2 and the way to the help."""
    base = machine.base
    for command in (
        ("sing",),
        ("create",),
        ("create", base / "v", "--size", "1MiB"),
        ("create", base / "v", "--diff-area-size", "8MiB", "--sparkle"),
        ("mount", base / "v"),
        ("rp", "delete"),
        ("rp", "sing"),
        ("resize", base / "v"),
    ):
        done = quiet(sys.executable, "-m", "vsnapfs", *map(str, command))
        assert done.returncode in (1, 2), (command, done)
        assert "Traceback" not in done.stderr
        assert done.stderr
    assert os.listdir(base) == []
