"""The command line on real volumes that nobody serves: nothing is played, nothing is mounted."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import re
from pathlib import Path
from typing import Any

import click
import pytest
import trio
from cli_backend import MIB, ok, refused, run

from vsnapfs import locks
from vsnapfs.cli.app import app
from vsnapfs.diffarea.layout import SUPERBLOCK_OFFSETS, Layout
from vsnapfs.errors import VsnapError
from vsnapfs.volume import Volume
from vsnapfs.volume.adoption import CLOSED
from vsnapfs.volume.buffer import WriteBuffer

SIZE = 8 * MIB + 12345
PAGES = Path(__file__).resolve().parents[2] / "docs" / "commands"


@pytest.fixture
def vol(tmp_path: Path) -> Path:
    """A volume of odd size with 2 MiB of diff area, made by the command itself."""
    directory = tmp_path / "vol"
    ok("create", directory, "--size", str(SIZE), "--diff-area-size", "2MiB")
    return directory


def write(directory: Path, *writes: tuple[int, bytes]) -> None:
    """Write to the replica as a server would. OSError when it is refused."""

    async def main() -> None:
        volume = await Volume.open(directory)
        try:
            async with trio.open_nursery() as nursery:
                await nursery.start(volume.run)
                handle = volume.open_replica()
                try:
                    for offset, data in writes:
                        await handle.write(offset, data)
                    await handle.flush()
                finally:
                    handle.close()
                    nursery.cancel_scope.cancel()
        finally:
            with trio.CancelScope(shield=True):
                await volume.close()

    trio.run(main)


def fill(directory: Path) -> None:
    """Overwrite more than the diff area can preserve: fault 8."""
    with pytest.raises((OSError, BaseExceptionGroup)):
        write(directory, *((at, b"f" * 65536) for at in range(0, 8 * MIB, 65536)))


def noise(seed: int, length: int) -> bytes:
    return random.Random(seed).randbytes(length)


def status(directory: Path) -> dict[str, Any]:
    (report,) = json.loads(run("status", directory, "--json").stdout)
    assert isinstance(report, dict)
    return report


def snapshot_of(folder: Path) -> dict[str, tuple[int, int, str]]:
    """Name → size, mtime and content of everything below.

    Not the mtime of an event log: opening it keeps space allocated ahead, which touches it.
    """
    return {
        str(path.relative_to(folder)): (
            path.stat().st_size,
            0 if path.name == "events.jsonl" else path.stat().st_mtime_ns,
            hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "",
        )
        for path in sorted(folder.rglob("*"))
    }


def test_status_has_the_promised_keys(vol: Path) -> None:
    """Everything that scripts were promised is there, with its type."""
    report = status(vol)
    assert report["volume"] == str(vol)
    assert report["state"] == "online"
    assert report["mountpoint"] is None
    assert report["on_full"] == "offline"
    assert report["fault"] is None
    assert report["consistent"] is None
    assert report["pid"] is None
    nobody = {"others": None, "loop_devices": []}
    assert report["replica"] == {"path": str(vol / "replica.img"), "size": SIZE} | nobody
    assert report["diff_area"].items() >= nobody.items()
    assert report["unwatched"] is None
    assert report["recovery_points"] == 0
    area = report["diff_area"]
    assert area["path"] == str(vol / "diff-area")
    assert 0 < area["used"] <= area["allocated"] <= area["maximum"] == 2 * MIB
    assert area["growth"] == {"seconds": None, "waiting": 0, "last_seconds": None}


def test_looking_at_a_volume_changes_nothing(vol: Path) -> None:
    """Status, list, events, verify and inspect leave every file of a closed volume as it was."""
    ok("rp", "create", vol)
    before = snapshot_of(vol)
    for command in (
        ("status", vol),
        ("status", vol, "--json"),
        ("rp", "list", vol),
        ("events", vol),
        ("verify", vol),
        ("inspect", vol / "diff-area"),
    ):
        ok(*command)
    assert snapshot_of(vol) == before


def test_points_are_created_listed_exported_and_deleted(vol: Path, tmp_path: Path) -> None:
    """Two points, each exported exactly; a deleted one is gone, the other one stays exact."""
    first, second = noise(1, 300_000), noise(2, 300_000)
    write(vol, (100_000, first))
    assert ok("rp", "create", vol, "--label", "夜").stdout == "1\n"
    write(vol, (200_000, second))
    assert ok("rp", "create", vol).stdout == "2\n"
    write(vol, (0, b"x" * 600_000))
    listed = json.loads(ok("rp", "list", vol, "--json").stdout)
    assert [(point["number"], point["label"]) for point in listed] == [(1, "夜"), (2, None)]
    image = bytearray(SIZE)
    image[100_000:400_000] = first
    ok("rp", "export", vol, "夜", tmp_path / "1.img")
    assert (tmp_path / "1.img").read_bytes() == image
    image[200_000:500_000] = second
    ok("rp", "delete", vol, "oldest")
    ok("rp", "export", vol, "latest", tmp_path / "2.img")
    assert (tmp_path / "2.img").read_bytes() == image
    refused(run("rp", "export", vol, "1", tmp_path / "3.img"), "no recovery point")
    assert not (tmp_path / "3.img").exists()


def test_restore_brings_the_point_back_and_keeps_the_others(vol: Path, tmp_path: Path) -> None:
    """After restoring point 1 the replica equals it, and both points read as before."""
    write(vol, (50_000, noise(3, 100_000)))
    ok("rp", "create", vol)
    write(vol, (60_000, noise(4, 100_000)))
    ok("rp", "create", vol)
    for number in ("1", "2"):
        ok("rp", "export", vol, number, tmp_path / f"{number}.img")
    write(vol, (0, noise(5, 200_000)))
    ok("rp", "restore", vol, "1")
    assert (vol / "replica.img").read_bytes() == (tmp_path / "1.img").read_bytes()
    for number in ("1", "2"):
        ok("rp", "export", vol, number, tmp_path / "again.img", "--force")
        assert (tmp_path / "again.img").read_bytes() == (tmp_path / f"{number}.img").read_bytes()


def test_a_full_diff_area_and_every_way_out(vol: Path, tmp_path: Path) -> None:
    """Fault 8: status says so with 3, points export, resize and online bring it back."""
    write(vol, *((at, noise(at, 65536)) for at in range(0, 8 * MIB, 65536)))
    ok("rp", "create", vol)
    ok("rp", "export", vol, "1", tmp_path / "before.img")
    fill(vol)
    result = run("status", vol)
    assert result.exit_code == 3
    assert "fault 8 DIFF_AREA_FULL, volsnap event 87" in result.stdout
    report = status(vol)
    assert report["fault"]["code"] == 8
    assert report["fault"]["event_id"] == 87
    assert {"name", "errno", "message", "time", "block"} <= set(report["fault"])
    refused(run("rp", "create", vol), "offline", code=3)
    ok("rp", "export", vol, "1", tmp_path / "offline.img")
    assert (tmp_path / "offline.img").read_bytes() == (tmp_path / "before.img").read_bytes()
    assert "87" in ok("events", vol).stdout

    result = ok("online", vol)
    assert "would still not fit" in result.stderr
    fill(vol)
    ok("resize", vol, "--diff-area-size", "16MiB")
    assert status(vol)["state"] == "offline"
    assert "would still not fit" not in ok("online", vol).stderr
    write(vol, *((at, b"f" * 65536) for at in range(0, 8 * MIB, 65536)))
    assert status(vol)["state"] == "online"
    ok("verify", vol)


def test_offline_and_online_survive_commands(vol: Path) -> None:
    """Offline on purpose lasts across commands, is no fault, and ends with online."""
    ok("offline", vol)
    assert status(vol)["state"] == "offline"
    assert status(vol)["fault"] is None
    assert run("status", vol).exit_code == 0
    with pytest.raises((OSError, BaseExceptionGroup)):
        write(vol, (0, b"x"))
    ok("online", vol)
    write(vol, (0, b"x"))


def test_verify_finds_rot_and_export_refuses_it(vol: Path, tmp_path: Path) -> None:
    """A flipped byte in a preserved block: verify exits with 5 and names the range, export 1."""
    write(vol, (0, noise(7, 65536)))
    ok("rp", "create", vol)
    write(vol, (0, noise(8, 65536)))
    area = vol / "diff-area"
    raw = bytearray(area.read_bytes())
    at = raw.find(noise(7, 65536)[16384 : 16384 + 512])
    assert at > 0
    raw[at + 7] ^= 1
    area.write_bytes(raw)
    result = run("verify", vol)
    assert result.exit_code == 5
    assert "1 problem\n" in result.stdout
    assert "16384 to 32767" in result.stdout
    report = json.loads(run("verify", vol, "--json").stdout)
    assert report["ok"] is False
    assert report["problems"][0]["ranges"] == [[16384, 16384]]
    failed = run("rp", "export", vol, "1", tmp_path / "x.img")
    refused(failed, "recovery point 1", "vsnapfs verify")
    assert not (tmp_path / "x.img").exists()


def test_inspect_shows_the_diff_area(vol: Path) -> None:
    """Text and JSON say the same about the superblock and the points."""
    ok("rp", "create", vol, "--label", "here")
    told = json.loads(ok("inspect", vol / "diff-area", "--json").stdout)
    assert told["recovery_points"][0]["label"] == "here"
    assert told["block_size"] == 16384
    text = ok("inspect", vol / "diff-area").stdout
    assert "block_size: 16384\n" in text
    assert "label: here\n" in text


def test_create_from_an_image(tmp_path: Path) -> None:
    """--from copies an image, whose size is the size; the image stays as it is."""
    content = noise(9, 100_000) + bytes(3 * MIB) + b"end"
    (tmp_path / "image").write_bytes(content)
    result = ok("create", tmp_path / "v", "--from", tmp_path / "image", "--diff-area-size", "1M")
    assert "vsnapfs mount" in result.stderr
    assert (tmp_path / "v" / "replica.img").read_bytes() == content
    assert (tmp_path / "image").read_bytes() == content


def bad_creations() -> list[Any]:
    new, area = "{t}/new", ("--diff-area-size", "1M")
    return [
        pytest.param((new, *area), "--size", id="no size"),
        pytest.param((new, "--size", "1M", "--diff-area-size", "64K"), "at least", id="area small"),
        pytest.param(("{t}/vol", "--size", "1M", *area), "already holds a volume", id="volume"),
        pytest.param(("{t}/file", "--size", "1M", *area), "no directory", id="file"),
        pytest.param(("{t}/a/b/c", "--size", "1M", *area), "No such file", id="no parent"),
        pytest.param((new, "--from", "{t}/none", *area), "No such file", id="no image"),
        pytest.param((new, "--size", "1M", *area, "--block-size", "5000"), "power of two", id="b"),
        pytest.param((new, "--size", "1M", *area, "--block-size", "2M"), "power of two", id="big"),
        pytest.param(
            (new, "--size", "1M", *area, "--replica", "{t}/x", "--diff-area", "{t}/x"),
            "must differ",
            id="one file for both",
        ),
        pytest.param(
            (new, "--size", "1M", *area, "--diff-area", "{t}/vol/diff-area"),
            "already exists",
            id="existing area",
        ),
        pytest.param(
            (new, "--from", "{t}/file", *area, "--replica", "{t}/vol/replica.img"),
            "--force",
            id="image onto a replica",
        ),
        pytest.param((new, "--replica", "{t}/empty", *area), "at least one byte", id="empty"),
        pytest.param(
            (new, "--size", "1M", "--replica", "{t}/empty", *area), "Remove it", id="killed at once"
        ),
        pytest.param(
            ("{t}/killed", "--size", "1M", *area, "--diff-area", "{t}/vol/diff-area", "--force"),
            "remove it",
            id="killed at the end",
        ),
    ]


@pytest.mark.parametrize(("args", "word"), bad_creations())
def test_bad_creations_change_nothing(
    tmp_path: Path, vol: Path, args: tuple[str, ...], word: str
) -> None:
    """Each is refused with its own words, and every file is as it was before."""
    (tmp_path / "file").write_text("precious")
    (tmp_path / "empty").touch()
    (tmp_path / "killed").mkdir(mode=0o700)
    (tmp_path / "killed" / "state").write_bytes(bytes(8192))  # Of a `create` that was killed.
    before = snapshot_of(tmp_path)
    result = run("create", *(arg.format(t=tmp_path) for arg in args))
    assert result.exit_code in (1, 2)
    refused(result, word, code=result.exit_code)
    assert snapshot_of(tmp_path) == before


def bad_commands() -> list[Any]:
    return [
        pytest.param(("rp", "delete", "{v}", "7"), "no recovery point", id="delete"),
        pytest.param(("rp", "restore", "{v}", "latest"), "no recovery point", id="restore"),
        pytest.param(("rp", "export", "{v}", "x", "{t}/x.img"), "no recovery point", id="export"),
        pytest.param(("resize", "{v}", "--diff-area-size", "1K"), "at least", id="resize"),
        pytest.param(("mount", "{v}", "{t}/none"), "No such file", id="mountpoint"),
        pytest.param(("mount", "{v}", "{v}"), "not empty", id="mountpoint not empty"),
        pytest.param(("mount", "{t}/none", "{t}"), "No such file", id="no volume"),
        pytest.param(("umount", "{v}"), "not mounted", id="umount"),
        pytest.param(("attach", "{v}"), "not mounted", id="attach"),
        pytest.param(("detach", "{v}"), "no loop device", id="detach"),
        pytest.param(("inspect", "{v}/replica.img"), "diff area", id="foreign file"),
        pytest.param(("inspect", "{v}/none"), "No such file", id="no file"),
    ]


@pytest.mark.parametrize(("args", "word"), bad_commands())
def test_bad_commands_change_nothing(
    tmp_path: Path, vol: Path, args: tuple[str, ...], word: str
) -> None:
    """What cannot be done on a volume is refused with its own words and leaves it as it was."""
    before = snapshot_of(tmp_path)
    result = run(*(arg.format(t=tmp_path, v=vol) for arg in args))
    if args[0] == "mount" and "/dev/fuse" in result.stderr:
        pytest.skip("this machine cannot mount at all, and says so first")
    assert result.exit_code in (1, 2)
    assert result.stdout == ""
    assert re.search(rf"^vsnapfs: error: .*{re.escape(word)}", result.stderr, re.MULTILINE)
    assert snapshot_of(tmp_path) == before


def test_the_diff_area_of_another_volume_is_an_error(tmp_path: Path, vol: Path) -> None:
    """A diff area that belongs elsewhere is refused, and both volumes stay as they were."""
    ok("create", tmp_path / "other", "--size", str(SIZE), "--diff-area-size", "2MiB")
    mine, theirs = vol / "diff-area", tmp_path / "other" / "diff-area"
    os.rename(mine, tmp_path / "kept")
    mine.write_bytes(theirs.read_bytes())
    before = snapshot_of(vol)
    result = run("status", vol)
    assert result.exit_code == 1
    assert "vsnapfs: error: " in result.stderr
    assert result.stdout == ""
    assert snapshot_of(vol) == before
    mine.unlink()
    os.rename(tmp_path / "kept", mine)
    ok("status", vol)


def test_a_missing_diff_area_is_fault_1_until_it_is_back(tmp_path: Path, vol: Path) -> None:
    """Status shows fault 1 and its way out; with the file back the volume is online by itself."""
    ok("rp", "create", vol)
    os.rename(vol / "diff-area", tmp_path / "away")
    result = run("status", vol)
    assert result.exit_code == 3
    assert "fault 1 DIFF_AREA_MISSING, volsnap event 80" in result.stdout
    assert "--give-up-recovery-points" in result.stdout
    os.rename(tmp_path / "away", vol / "diff-area")
    assert status(vol)["state"] == "online"
    assert status(vol)["recovery_points"] == 1


def test_a_link_in_the_place_of_a_lost_diff_area_is_moved_away_first(vol: Path) -> None:
    """Giving up says so, touches neither link nor target, and works once the link is gone."""
    area = vol / "diff-area"
    os.rename(area, vol / "elsewhere")
    area.symlink_to("elsewhere")
    assert "move it away" in run("status", vol).stdout
    result = run("online", vol, "--give-up-recovery-points", "--yes")
    assert result.exit_code == 1
    assert "is a symbolic link" in result.stderr
    assert "Move it away" in result.stderr
    area.unlink()
    ok("online", vol, "--give-up-recovery-points", "--yes")
    assert status(vol)["state"] == "online"


def test_giving_up_a_lost_diff_area(vol: Path) -> None:
    """With a yes the volume comes online without its points; without one nothing happens."""
    ok("rp", "create", vol)
    (vol / "diff-area").unlink()
    assert run("status", vol).exit_code == 3
    assert run("online", vol).exit_code != 0
    assert run("online", vol, "--give-up-recovery-points", typed="n\n").exit_code == 1
    assert run("status", vol).exit_code == 3
    ok("online", vol, "--give-up-recovery-points", typed="y\n")
    assert status(vol)["state"] == "online"
    assert status(vol)["recovery_points"] == 0
    write(vol, (0, b"x"))
    assert "1022" in ok("events", vol).stdout


# --- the manual ----------------------------------------------------------------------------------


def manual_pages() -> list[tuple[str, str, click.Command]]:
    """(page, how the command is typed, command) for every command."""
    pages = []
    for name, command in app.commands.items():
        if isinstance(command, click.Group):
            pages += [(f"{name}-{sub}", f"{name} {sub}", c) for sub, c in command.commands.items()]
        else:
            pages.append((name, name, command))
    return pages


@pytest.mark.parametrize(("page", "typed", "command"), manual_pages(), ids=lambda v: str(v)[:30])
def test_every_command_has_a_manual_page(page: str, typed: str, command: click.Command) -> None:
    """The page has all sections, names each option, shows the command, and its links lead on."""
    text = (PAGES / f"{page}.md").read_text()
    assert text.startswith(f"# vsnapfs {typed}\n")
    sections = re.findall(r"^## (.*)$", text, re.MULTILINE)
    options = [param for param in command.params if isinstance(param, click.Option)]
    expected = ["Synopsis", "What it does", "Options", "Example", "Exit codes", "See also"]
    assert sections == [name for name in expected if options or name != "Options"]
    for option in options:
        assert any(f"`{name}" in text for name in option.opts), option.opts
        if option.name != "lang":
            synopsis = text.split("## What it does")[0]
            assert any(name in synopsis for name in option.opts), option.opts
    assert f"$ vsnapfs {typed}" in text or f"# vsnapfs {typed} vol1" in text or "eval" in text
    for target in re.findall(r"\]\(([^)#]+)", text):
        if not target.startswith("../"):
            assert (PAGES / target).exists(), target


def test_the_index_lists_every_page() -> None:
    """Each page is in the index and belongs to a command, and all exit codes are explained."""
    index = (PAGES / "index.md").read_text()
    listed = set(re.findall(r"^\| \[[^]]*\]\(([^)]*)\.md\)", index, re.MULTILINE))
    assert listed == {page for page, _, _ in manual_pages()}
    assert {path.stem for path in PAGES.glob("*.md")} == listed | {"index"}
    for code in ("0", "1", "2", "3", "5", "130", "141"):
        assert f"\n| {code} |" in index


@pytest.mark.parametrize("ring", ["none", "held by somebody"])
def test_points_behind_another_fault_can_be_looked_at(
    vol: Path, monkeypatch: pytest.MonkeyPatch, ring: str
) -> None:
    """A diff area that takes no writes shows its points whatever else keeps the volume offline."""
    write(vol, (0, noise(1, SIZE)))
    ok("recovery-point", "create", vol)
    before = status(vol)
    fill(vol)
    assert status(vol)["fault"]["code"] == 8
    opened = locks.open_file

    def read_only(path: Path, access: int, **options: Any) -> int:
        if path.name == "diff-area" and access & os.O_RDWR:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return opened(path, access, **options)

    monkeypatch.setattr(locks, "open_file", read_only)
    if ring != "none":
        closed = VsnapError("a ring is held", hint="Wait.", errno=errno.EBUSY, code=CLOSED)

        async def held(*_: Any, **__: Any) -> None:
            raise closed

        monkeypatch.setattr(WriteBuffer, "_adopt", held)
    assert "no recovery points" not in ok("recovery-point", "list", vol).stdout
    ok("verify", vol)
    out = vol.parent / "out.img"
    ok("recovery-point", "export", vol, "1", out)
    assert out.read_bytes() == noise(1, SIZE)
    after = status(vol)
    assert after["recovery_points"] == before["recovery_points"]
    assert ("held" if ring != "none" else "Read-only") in after["trouble"]
    assert after["fault"]["code"] == 8


def test_verify_heals_nothing_where_nothing_can_be_written(
    vol: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It finds the same each time, and does not say that it was healed."""
    write(vol, (0, noise(1, 8 * MIB)))
    ok("recovery-point", "create", vol)
    write(vol, (0, noise(2, MIB)))
    for name, offset in (("diff-area", SUPERBLOCK_OFFSETS[1]), ("state", 100)):
        with (vol / name).open("r+b") as file:
            file.seek(offset)
            file.write(b"rot" * 100)
    with (vol / "diff-area").open("r+b") as file:
        file.seek(Layout(16384).sector_offsets(0)[1])
        file.write(b"rot" * 100)
    opened = locks.open_file

    def read_only(path: Path, access: int, **options: Any) -> int:
        if access & os.O_RDWR:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return opened(path, access, **options)

    before = snapshot_of(vol)
    with monkeypatch.context() as host:
        host.setattr(locks, "open_file", read_only)
        first, second = (run("verify", vol) for _ in range(2))
    assert snapshot_of(vol) == before
    assert first.exit_code == second.exit_code == 5
    assert first.stdout == second.stdout
    for what in ("superblock", "descriptor sector", "state file"):
        assert what in first.stdout
    assert "healed" not in first.stdout + first.stderr
    assert run("verify", vol).stdout.count("healed") == 3
