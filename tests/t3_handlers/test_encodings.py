"""What every command says can be written, and read, in any encoding: by people and by programs."""

from __future__ import annotations

import io
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree as ET

import click
import pytest

from vsnapfs import cli
from vsnapfs.cli import output, streams
from vsnapfs.cli.app import app
from vsnapfs.daemon import process
from vsnapfs.demo import text_en, text_ja
from vsnapfs.demo.narrator import Narrator

ENCODINGS = ("utf-8", "ascii", "iso8859-1", "cp437", "euc-jp", "utf-16")
NAME = os.fsdecode(b"vol-\xff-") + "é-語"  # No text in any encoding, and what only some have.
LABEL = "ラベル é “x” 😀"
SAID_BY_US = "‘’“”…–✔✘"


class Stream(io.TextIOWrapper):
    """A standard stream as Python makes it, strict; what was written stays when it is closed."""

    def __init__(self, encoding: str, *, terminal: bool, content: bytes = b"") -> None:
        self.bytes = io.BytesIO(content)
        super().__init__(self.bytes, encoding=encoding, errors="strict", newline="")
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal

    def written(self) -> bytes:
        self.flush()
        return self.bytes.getvalue()


class Said:
    """What a command line wrote, and its exit code."""

    def __init__(self, code: object, out: Stream, err: Stream) -> None:
        self.code = code
        self.out, self.err = out.written(), err.written()
        # As whoever reads it does: strictly.
        self.text = self.out.decode(out.encoding) + self.err.decode(err.encoding)
        assert "Traceback" not in self.text, self.text


def said(encoding: str, *arguments: str, terminal: bool = False, typed: bytes = b"") -> Said:
    """Run a command line in this process, from its entry on, with streams of that encoding."""
    out, err = (Stream(encoding, terminal=terminal) for _ in range(2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", Stream(encoding, terminal=False, content=typed))
        patch.setattr(sys, "stdout", out)
        patch.setattr(sys, "stderr", err)
        patch.setattr(sys, "argv", ["vsnapfs", *arguments])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        return Said(caught.value.code, out, err)


@pytest.fixture
def volume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A volume with such a name, and a recovery point with such a label; we stand beside it."""
    monkeypatch.chdir(tmp_path)
    made = said("utf-8", "create", NAME, "--size", "1MiB", "--diff-area-size", "2MiB")
    assert made.code == 0, made.text
    assert said("utf-8", "recovery-point", "create", NAME, "--label", LABEL).code == 0
    return NAME


#: What follows the volume, and the exit code, for every command there is.
SAY: dict[tuple[str, ...], tuple[tuple[str, ...], int]] = {
    ("create",): (("--size", "1MiB", "--diff-area-size", "2MiB"), 7),
    ("mount",): ((os.fsdecode(b"nowhere-\xfe"),), 2),
    ("umount",): ((), 1),
    ("attach",): ((), 1),
    ("detach",): ((), 1),
    ("status",): ((), 0),
    ("resize",): (("--diff-area-size", "3MiB"), 0),
    ("offline",): ((), 0),
    ("online",): ((), 0),
    ("events",): ((), 0),
    ("verify",): ((), 0),
    ("repair",): ((), 0),
    ("inspect",): ((), 2),
    ("recovery-point", "create"): (("--label", LABEL), 2),
    ("recovery-point", "list"): ((), 0),
    ("recovery-point", "export"): ((LABEL, os.fsdecode(b"out-\xfd")), 0),
    ("recovery-point", "restore"): ((LABEL, "--force"), 0),
    ("recovery-point", "delete"): ((os.fsdecode(b"\xfc") + "語",), 1),
}
NOT_ON_A_VOLUME = {("demo",), ("completion",)}


def commands(group: click.Group, before: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found = []
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            found += commands(command, (*before, name))
        else:
            found.append((*before, name))
    return found


def test_every_command_is_here() -> None:
    """A command that is added is tried in all encodings, too."""
    assert set(commands(app)) == set(SAY) | NOT_ON_A_VOLUME


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_every_command_in_any_encoding(volume: str, encoding: str, terminal: bool) -> None:
    """No command ends by a character that the encoding lacks; its exit code is what it is in
    UTF-8, and where it names the volume or the label, something can be read.
    """
    for command, (arguments, code) in SAY.items():
        result = said(encoding, *command, volume, *arguments, terminal=terminal)
        Path(os.fsdecode(b"out-\xfd")).unlink(missing_ok=True)
        known = (code, 1, 2, 7) if code else (0,)
        assert result.code in known, (command, result.text)
    listed = said(encoding, "recovery-point", "list", volume, terminal=terminal).text
    assert "x" in listed
    assert ("ラベル" in listed) == (encoding in ("utf-8", "euc-jp", "utf-16"))
    if encoding == "ascii":
        assert "\\u30e9\\u30d9\\u30eb" in listed


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_help_is_ascii(encoding: str) -> None:
    """Help is the same everywhere. (click itself writes it, past what we see to.)"""
    for command in [(), *commands(app), ("recovery-point",)]:
        result = said(encoding, *command, "--help")
        assert result.code == 0
        assert result.text.isascii(), command
    for shell in ("bash", "zsh", "fish"):
        assert said(encoding, "completion", shell).text.isascii()


JSON = (
    ("status", "--json"),
    ("verify", "--json"),
    ("repair", "--json", "--dry-run"),
    ("recovery-point", "list", "--json"),
    ("inspect", "--json"),
)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("command", JSON, ids=" ".join)
def test_json_is_json_in_any_encoding(volume: str, command: tuple[str, ...], encoding: str) -> None:
    """It is UTF-8, as JSON must be, and says the same whatever the terminal has."""
    words = [word for word in command if not word.startswith("-")]
    options = [word for word in command if word.startswith("-")]
    what = f"{volume}/diff-area" if words == ["inspect"] else volume
    result = said(encoding, *words, what, *options)
    assert result.code == 0, result.text
    found = json.loads(result.out.decode("utf-8"))
    if words[-1] == "inspect":
        assert LABEL in str(found)
    if words[-1] == "list":
        assert found[0]["label"] == LABEL
    if words[-1] == "status":
        assert found[0]["volume"].endswith(NAME)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("lang", ["en", "ja"])
def test_events_as_json_and_xml_in_any_encoding(volume: str, encoding: str, lang: str) -> None:
    """Both are what they say they are (UTF-8), with each character of labels and sentences."""
    events = said(encoding, "events", volume, "--json", "--lang", lang)
    found = [json.loads(line) for line in events.out.decode("utf-8").splitlines()]
    assert LABEL in [event["params"].get("label") for event in found]
    document = ET.fromstring(said(encoding, "events", volume, "--xml", "--lang", lang).out)
    messages = [
        element.text or "" for element in document.iter() if element.tag.endswith("Message")
    ]
    assert messages == [event["message"] for event in found]
    assert any(LABEL in message for message in messages)
    assert any("作成" in message for message in messages) == (lang == "ja")


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_japanese_is_told_in_english_where_it_cannot_be_read(volume: str, encoding: str) -> None:
    """Whole sentences of escapes are of no use; said once, on stderr."""
    result = said(encoding, "events", volume, "--lang", "ja")
    assert result.code == 0
    out, err = result.out.decode(encoding), result.err.decode(encoding)
    if encoding in ("utf-8", "euc-jp", "utf-16"):
        assert "作成しました" in out
        assert err == ""
    else:
        assert "was created" in out
        assert err.count("has no Japanese") == 1


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_what_is_typed_need_not_be_text(
    volume: str, encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An answer that is not in the terminal's encoding is no yes, and no defect."""
    result = said(
        encoding, "online", volume, "--give-up-recovery-points", typed=b"\xff\xfe\xfdja\n"
    )
    assert result.code == 1
    assert "not confirmed" in result.text


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("word", ["vol", "vol-"])
def test_completion_gives_names_as_they_are_on_the_disk(
    volume: str, encoding: str, word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shell gets the very bytes of a name, whatever the terminal's encoding."""
    monkeypatch.setenv("_VSNAPFS_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_WORDS", f"vsnapfs status {word}")
    monkeypatch.setenv("COMP_CWORD", "2")
    out = Stream(encoding, terminal=False)
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "argv", ["vsnapfs"])
    with pytest.raises(SystemExit):
        cli.main()
    assert out.written() == b"plain," + os.fsencode(NAME) + b"\n"


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("text", [text_en.TEXT, text_ja.TEXT], ids=["en", "ja"])
def test_the_demo_can_be_told_in_any_encoding(
    text: dict[str, str], encoding: str, terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its sentences, marks and rules, and whatever the commands in it print."""
    out = Stream(encoding, terminal=terminal)
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setenv("TERM", "dumb")
    streams.prepare()
    narrator = Narrator(text, pauses=False, lang="ja" if text is text_ja.TEXT else "en")
    narrator.title("title")
    for key, sentence in text.items():
        if "{" not in sentence:
            narrator.say(key)
    narrator.output(LABEL + NAME)
    narrator.proof(LABEL)
    narrator.alarm(LABEL + NAME)
    narrator.ending(proofs=1, seconds=1)
    assert "😀" in out.written().decode(encoding) or encoding not in ("utf-8", "utf-16")


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("terminal", [False, True])
def test_progress_can_be_shown_in_any_encoding(
    encoding: str, terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bar, its numbers, and a title with any name in it."""
    err = Stream(encoding, terminal=terminal)
    monkeypatch.setattr(sys, "stderr", err)
    monkeypatch.setattr(output, "_PLAIN_EVERY", 0.0)
    monkeypatch.setenv("TERM", "xterm")
    streams.prepare()
    with output.progress(f"export {NAME} {LABEL}") as report:
        for done in range(3):
            report("copying", done, 3)
    assert "copying" in err.written().decode(encoding)


@pytest.mark.expects_log
def test_server_log_is_utf8_in_any_locale(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is read back as that, and a name in it that is no text is spelled out."""
    err = Stream("iso8859-1", terminal=False)
    monkeypatch.setattr(sys, "stderr", err)
    root = logging.getLogger()
    before = list(root.handlers), root.level
    try:
        process.log_to_stderr()
        root.warning("about %s %s", LABEL, NAME)
    finally:
        root.handlers[:], root.level = before[0], before[1]
    assert f"about {LABEL} vol-\\udcff-é-語\n" in err.written().decode("utf-8")


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_the_marks_of_our_own_sentences_have_ascii_forms(
    encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What we write ourselves is never shown as a number."""
    out = Stream(encoding, terminal=False)
    monkeypatch.setattr(sys, "stdout", out)
    streams.prepare()
    output.echo(SAID_BY_US)
    assert "\\" not in out.written().decode(encoding)


def in_a_process(*command: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        command, env=os.environ | environment, capture_output=True, check=False, timeout=60
    )


@pytest.mark.parametrize(
    "environment",
    [{"PYTHONIOENCODING": "iso8859-1"}, {"LC_ALL": "C"}, {"LC_ALL": "C", "PYTHONUTF8": "0"}],
    ids=str,
)
def test_the_program_itself_sees_to_its_streams(volume: str, environment: dict[str, str]) -> None:
    """The same in a process of its own, in which Python has made them."""
    done = in_a_process(sys.executable, "-m", "vsnapfs", "events", volume, **environment)
    assert done.returncode == 0, done
    assert b"Traceback" not in done.stderr
    assert b"created" in done.stdout


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_no_file_of_a_volume_gets_the_number_of_a_closed_stream(volume: str, closed: str) -> None:
    """With stdin, stdout or stderr closed, what is written to them goes nowhere; least of all into
    the replica, which would be the next file to be opened.
    """
    program = f'exec "$0" -m vsnapfs recovery-point create "$1" --label again {closed}'
    done = in_a_process("sh", "-c", program, sys.executable, volume)
    assert done.returncode == 0, done
    assert b"Traceback" not in done.stderr
    content = Path(volume, "replica.img").read_bytes()
    assert not content.strip(b"\0")


def test_streams_that_tests_put_there_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream that has no encoding needs none."""
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.StringIO())
    streams.prepare()
    streams.for_programs()
    output.echo(LABEL)
    assert isinstance(sys.stdout, io.StringIO)
    assert sys.stdout.getvalue() == LABEL + "\n"
