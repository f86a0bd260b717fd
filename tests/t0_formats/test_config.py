"""volume.toml: what was saved is loaded, and nothing hostile or half-right gets through."""

from __future__ import annotations

import errno
import os
import socket
import stat
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vsnapfs import config as config_module
from vsnapfs.config import POLICIES, VolumeConfig, VolumePaths, load, save, shown
from vsnapfs.errors import FormatError, UsageError, VsnapError

ID = "0123456789abcdef0123456789abcdef"
GOOD = f"""\
format = 1
volume-id = "{ID}"
replica = "replica.img"
diff-area = "diff-area"
on-full = "offline"
"""


def write(directory: Path, text: str | bytes) -> None:
    data = text.encode() if isinstance(text, str) else text
    (directory / "volume.toml").write_bytes(data)


def refusal(directory: Path) -> FormatError:
    """The error of a load that must fail because of the file's content."""
    with pytest.raises(FormatError) as caught:
        load(directory)
    error = caught.value
    assert error.code == "config"
    assert str(directory / "volume.toml") in error.message
    assert "\n" not in error.message
    return error


# A path that names nothing of the volume's own: any text but NUL and surrogates.
path_texts = st.text(
    st.characters(blacklist_characters="\0", blacklist_categories=("Cs",)), min_size=1, max_size=200
)
seconds = st.floats(0, 3600, allow_nan=False)


@given(
    volume_id=st.uuids().map(lambda u: u.hex),
    replica=path_texts,
    diff_area=path_texts,
    on_full=st.sampled_from(POLICIES),
    grow=seconds,
    hold=seconds.filter(lambda value: value > 0),
)
def test_what_was_saved_is_loaded(
    tmp_path_factory: pytest.TempPathFactory,
    volume_id: str,
    replica: str,
    diff_area: str,
    on_full: config_module.OnFull,
    grow: float,
    hold: float,
) -> None:
    """Any configuration that can be made is saved and loaded unchanged, or refused unsaved."""
    directory = tmp_path_factory.mktemp("volume")
    config = VolumeConfig(volume_id, replica, diff_area, on_full, grow, hold)
    apart = {os.path.normpath(path) for path in (replica, diff_area)}
    if len(apart) < 2 or apart & {".", "volume.toml", "state", "events.jsonl", "control.sock"}:
        with pytest.raises(UsageError, match="is the same as"):
            save(directory, config)
        assert os.listdir(directory) == []
        return
    save(directory, config)
    assert load(directory) == config
    assert os.listdir(directory) == ["volume.toml"]


@given(
    data=st.binary(max_size=300) | st.text(max_size=300).map(lambda t: t.encode("utf-8", "replace"))
)
def test_noise_is_refused_with_one_clear_error(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    """Whatever the file holds, load either gives a configuration or a FormatError of one line."""
    directory = tmp_path_factory.mktemp("volume")
    write(directory, data)
    refusal(directory)  # no 300 random bytes hold the four required keys


@given(
    key=st.sampled_from(
        ["format", "volume-id", "replica", "diff-area", "on-full", "grow-timeout", "hold-timeout"]
    ),
    value=st.sampled_from(
        [
            "true",
            "[]",
            "{}",
            "nan",
            "inf",
            "-1",
            "2026-11-22",
            '""',
            '"\\u0000"',
            "9" * 400,
            "99999.0",
        ]
    ),
)
def test_a_wrong_value_is_refused(
    tmp_path_factory: pytest.TempPathFactory, key: str, value: str
) -> None:
    """Each key refuses each value of a wrong type or out of its range, and names itself."""
    directory = tmp_path_factory.mktemp("volume")
    lines = [line for line in GOOD.splitlines() if not line.startswith(f"{key} =")]
    write(directory, "\n".join([*lines, f"{key} = {value}", ""]))
    assert key in refusal(directory).message


def test_defaults_fill_only_the_timeouts(tmp_path: Path) -> None:
    """A file without timeouts loads with the defaults; integers are accepted as seconds."""
    write(tmp_path, GOOD)
    assert load(tmp_path) == VolumeConfig(ID)
    assert load(tmp_path).grow_timeout == 30.0
    write(tmp_path, GOOD + "grow-timeout = 5\n")
    loaded = load(tmp_path)
    assert loaded.grow_timeout == 5.0
    assert isinstance(loaded.grow_timeout, float)


@pytest.mark.parametrize("key", ["format", "volume-id", "replica", "diff-area", "on-full"])
def test_a_missing_key_is_refused(tmp_path: Path, key: str) -> None:
    """No choice that matters has a silent default: without its key the file is refused."""
    write(
        tmp_path, "".join(x for x in GOOD.splitlines(keepends=True) if not x.startswith(f"{key} "))
    )
    assert key in refusal(tmp_path).message


def test_an_unknown_key_is_refused_and_known_ones_are_told(tmp_path: Path) -> None:
    """A misspelt key is an error, not the default policy."""
    write(tmp_path, GOOD.replace("on-full", "on_full"))
    error = refusal(tmp_path)
    assert "'on_full'" in error.message
    assert "on-full" in error.hint


def test_a_key_cannot_smuggle_terminal_escapes(tmp_path: Path) -> None:
    """Text from the file appears in messages escaped and shortened."""
    write(tmp_path, GOOD + '"\\u001b[2Jboo\\n" = 1\n"' + "x" * 5000 + '" = 2\n')
    message = refusal(tmp_path).message
    assert message.isprintable()
    assert len(message) < len(str(tmp_path)) + 1000


@pytest.mark.parametrize("version", ["0", "2", "1.0", "true", '"1"'])
def test_another_format_is_refused(tmp_path: Path, version: str) -> None:
    """A volume.toml of another version is not half understood."""
    write(tmp_path, GOOD.replace("format = 1", f"format = {version}"))
    assert "format" in refusal(tmp_path).message


@pytest.mark.parametrize(
    "text",
    [
        b"\xff\xfe" + GOOD.encode(),
        GOOD.encode("utf-16"),
        GOOD + "x = " + "[" * 20000,
        GOOD + "x = " + "9" * 20000,
        GOOD + f'replica = "{"a" * 10}"\n',  # a key twice
        GOOD + "#" * 70_000,
        GOOD.replace("replica.img", "a" * 5000),
        GOOD.replace(ID, ID.upper()),
        GOOD.replace(ID, "0" * 31),
        GOOD.replace(ID, "٣" * 32),  # digits, but not hexadecimal ones
        GOOD.replace("offline", "Offline"),
        "",
    ],
    ids=range(12),
)
def test_hostile_files_are_refused(tmp_path: Path, text: str | bytes) -> None:
    """Wrong encodings, deep nesting, huge numbers, huge files and near misses are all refused."""
    write(tmp_path, text)
    refusal(tmp_path)


@pytest.mark.parametrize(
    ("replica", "diff_area"),
    [
        ("same", "same"),
        ("same", "./x/../same"),
        ("volume.toml", "diff-area"),
        ("replica.img", "state"),
        ("replica.img", "./events.jsonl"),
        ("control.sock", "diff-area"),
        (".", "diff-area"),
        ("replica.img", "x/.."),
    ],
)
def test_parts_must_not_share_a_name(tmp_path: Path, replica: str, diff_area: str) -> None:
    """Replica, diff area and the volume's own files are kept apart when saving and loading."""
    config = VolumeConfig(ID, replica, diff_area)
    with pytest.raises(UsageError, match="is the same as"):
        save(tmp_path, config)
    assert os.listdir(tmp_path) == []
    text = GOOD.replace('"replica.img"', f'"{replica}"').replace('"diff-area"', f'"{diff_area}"')
    write(tmp_path, text)
    assert "is the same as" in refusal(tmp_path).message


def test_an_absolute_path_is_compared_with_the_relative_one(tmp_path: Path) -> None:
    """The same file named absolutely and relatively is the same file."""
    with pytest.raises(UsageError):
        save(tmp_path, VolumeConfig(ID, "r", str(tmp_path / "r")))


def test_values_are_checked_when_made() -> None:
    """No invalid VolumeConfig can exist, so nobody needs to check one again."""
    for wrong in (
        {"volume_id": "x"},
        {"replica": ""},
        {"diff_area": "a\0b"},
        {"replica": "\udcff"},
        {"on_full": "hold"},
        {"grow_timeout": -0.1},
        {"grow_timeout": float("nan")},
        {"hold_timeout": 0},
        {"hold_timeout": True},
        {"hold_timeout": 10**400},
    ):
        with pytest.raises(UsageError) as caught:
            VolumeConfig(**({"volume_id": ID} | wrong))  # type: ignore[arg-type]
        assert caught.value.exit_code == 2


def test_what_is_no_volume_says_so(tmp_path: Path) -> None:
    """A missing directory, a file and an empty directory are no volume, each with its errno."""
    (tmp_path / "file").write_bytes(b"")
    for name, number in (
        ("missing", errno.ENOENT),
        ("file", errno.ENOTDIR),
        (".", errno.ENOENT),
    ):
        with pytest.raises(VsnapError, match="is not a volume") as caught:
            load(tmp_path / name)
        assert caught.value.code == "no-volume"
        assert caught.value.errno == number
        assert caught.value.exit_code == 1


def test_a_symbolic_link_is_not_followed(tmp_path: Path) -> None:
    """volume.toml as a link is refused by load, and replaced, not written through, by save."""
    target = tmp_path / "elsewhere"
    target.write_text(GOOD)
    volume = tmp_path / "volume"
    volume.mkdir()
    (volume / "volume.toml").symlink_to(target)
    assert "symbolic link" in refusal(volume).message
    save(volume, VolumeConfig(ID, on_full="evict"))
    assert target.read_text() == GOOD
    assert load(volume).on_full == "evict"
    assert not (volume / "volume.toml").is_symlink()


def test_pipes_sockets_and_directories_are_refused_at_once(tmp_path: Path) -> None:
    """Nothing but a regular file is read, and a pipe without a writer does not block."""
    name = tmp_path / "volume.toml"
    os.mkfifo(name)
    assert "not a regular file" in refusal(tmp_path).message
    name.unlink()
    name.mkdir()
    assert "not a regular file" in refusal(tmp_path).message
    with pytest.raises(VsnapError, match="cannot write"):
        save(tmp_path, VolumeConfig(ID))
    assert os.listdir(tmp_path) == ["volume.toml"]
    name.rmdir()
    with socket.socket(socket.AF_UNIX) as listener:
        # A socket's name may be at most 107 bytes long, a test's directory is often longer.
        old = os.getcwd()
        os.chdir(tmp_path)
        try:
            listener.bind("volume.toml")
        finally:
            os.chdir(old)
        error = refusal(tmp_path)
    assert error.errno == errno.ENXIO
    assert "cannot be opened" in error.message


def test_the_file_is_private_whatever_the_umask(tmp_path: Path) -> None:
    """volume.toml has mode 0600 under any umask, and after replacing a more open one."""
    for mask in (0o000, 0o777):
        old = os.umask(mask)
        try:
            save(tmp_path, VolumeConfig(ID))
        finally:
            os.umask(old)
        assert stat.S_IMODE((tmp_path / "volume.toml").stat().st_mode) == 0o600
        (tmp_path / "volume.toml").chmod(0o666)


@pytest.mark.parametrize("call", ["write", "fsync", "rename", "fchmod"])
def test_a_failed_save_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """When the host refuses any step, the old file is whole, no scrap is left, and it is said."""
    save(tmp_path, VolumeConfig(ID))
    before = (tmp_path / "volume.toml").read_bytes()

    def refuse(*args: object, **named: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if call == "write":
        monkeypatch.setattr(config_module, "_write_new", refuse)
    else:
        monkeypatch.setattr(os, call, refuse)
    with pytest.raises(VsnapError, match=r"cannot write .*No space left") as caught:
        save(tmp_path, VolumeConfig(ID, on_full="evict"))
    monkeypatch.undo()
    assert caught.value.errno == errno.ENOSPC
    assert (tmp_path / "volume.toml").read_bytes() == before
    assert os.listdir(tmp_path) == ["volume.toml"]


def test_a_save_is_durable_before_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The content is synced before the rename and the directory after it."""
    steps: list[str] = []
    fsync, rename = os.fsync, os.rename

    def noting_fsync(fd: int) -> None:
        steps.append("sync directory" if stat.S_ISDIR(os.fstat(fd).st_mode) else "sync file")
        fsync(fd)

    def noting_rename(*args: str, **named: int) -> None:
        steps.append("rename")
        rename(*args, **named)

    monkeypatch.setattr(os, "fsync", noting_fsync)
    monkeypatch.setattr(os, "rename", noting_rename)
    save(tmp_path, VolumeConfig(ID))
    assert steps == ["sync file", "rename", "sync directory"]


def test_the_file_reads_well(tmp_path: Path) -> None:
    """Every key of the saved file follows a comment that explains it, and it is plain TOML."""
    save(tmp_path, VolumeConfig(ID))
    text = (tmp_path / "volume.toml").read_text()
    assert set(tomllib.loads(text)) == {"format", *config_module._KEYS}
    paragraphs = [part for part in text.split("\n\n") if part.strip()]
    assert all(part.startswith("# ") for part in paragraphs)
    assert max(map(len, text.splitlines())) <= 100


def test_names_of_a_volumes_files(tmp_path: Path) -> None:
    """Paths are absolute, the directory is resolved, replica and diff area come from the file."""
    volume = tmp_path / "real"
    volume.mkdir()
    (tmp_path / "alias").symlink_to(volume)
    save(volume, VolumeConfig(ID, "images/r.img", "/dev/disk/by-id/area"))
    paths = VolumePaths(tmp_path / "alias")
    assert paths.directory == volume
    assert paths.config == volume / "volume.toml"
    assert paths.state == volume / "state"
    assert paths.events == volume / "events.jsonl"
    assert paths.socket == volume / "control.sock"
    assert paths.replica == volume / "images/r.img"
    assert paths.diff_area == Path("/dev/disk/by-id/area")


def test_names_need_no_file_until_they_do(tmp_path: Path) -> None:
    """The socket of a directory that is no volume can be named; its replica cannot."""
    paths = VolumePaths(tmp_path)
    assert paths.socket.parent == tmp_path
    with pytest.raises(VsnapError, match="is not a volume"):
        _ = paths.replica
    given_config = VolumePaths(tmp_path, VolumeConfig(ID, replica="r"))
    assert given_config.replica == tmp_path / "r"


def test_a_link_to_the_diff_area_stays_a_link(tmp_path: Path) -> None:
    """Replica and diff area are not resolved, so that a link is looked up at each opening."""
    (tmp_path / "link").symlink_to(tmp_path / "somewhere")
    paths = VolumePaths(tmp_path, VolumeConfig(ID, diff_area="link"))
    assert paths.diff_area == tmp_path / "link"


def test_any_path_can_be_shown() -> None:
    """A path of any bytes becomes one printable line that can be encoded as UTF-8."""
    assert shown("/srv/バックアップ") == "/srv/バックアップ"
    odd = os.fsdecode(b"/a\n\x1b[31m\xff")
    assert shown(odd) == "/a\\n\\x1b[31m\\xff"
    assert shown(odd).encode()
