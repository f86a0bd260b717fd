"""What the demo looks like: headings, prose, commands, proofs; and how long each may be read.

Promises that on anything but a terminal the same words come without colour and without waiting,
and that text from commands is shown as it is, never as markup or control sequences.
"""

from __future__ import annotations

import os
import re
import select
import sys
import time
from collections.abc import Mapping

from rich.cells import cell_len
from rich.console import Console
from rich.padding import Padding
from rich.rule import Rule
from rich.text import Text

from vsnapfs.cli.output import clean

_WIDTH = 100  # of prose, unless the terminal is narrower
# Characters a second that people read comfortably, and the longest wait for one piece.
_SPEED = {"en": 34.0, "ja": 15.0}
_LONGEST = 8.0
_MOST_LINES = 24  # of one command's output
# Japanese breaks between any two characters, but not within a word of ASCII, and no line begins
# with one of these.
_PIECES = re.compile(r"[!-~]+|.", re.DOTALL)
_NOT_FIRST = "、。，．」』）)ーっゃゅょッャュョ…"


class Narrator:
    """Tells. text: the sentences by key; pauses: leave time for reading; lang: how fast."""

    def __init__(self, text: Mapping[str, str], *, pauses: bool, lang: str) -> None:
        self._text = text
        self._pauses = pauses
        self._lang = lang
        self._chapter = 0
        self._terminal = sys.stdout.isatty()
        self._out = Console(
            width=None if self._terminal else _WIDTH, highlight=False, markup=False, emoji=False
        )

    def text(self, key: str, **values: object) -> str:
        """One of the story's sentences, with its values in place."""
        return self._text[key].format(**values)

    # -- telling --------------------------------------------------------------------------------

    def title(self, key: str) -> None:
        """The first line of all."""
        self._out.print(Rule(Text(self.text(key), style="bold cyan"), style="cyan"))

    def chapter(self, key: str) -> None:
        """Begin a chapter."""
        self._chapter += 1
        self._out.print()
        self._out.print(
            Rule(
                Text(f"{self._chapter}  {self.text(key)}", style="bold cyan"),
                style="cyan",
                align="left",
            )
        )
        self._wait(0.7)

    def say(self, key: str, **values: object) -> None:
        """Tell something, and leave time to read it."""
        told = self.text(key, **values)
        self._out.print()
        if self._lang == "ja":
            told = folded(told, min(self._out.width, _WIDTH))
        self._out.print(Text(told), width=min(self._out.width, _WIDTH))
        self._wait(min(_LONGEST, 0.5 + len(told) / _SPEED[self._lang]))

    def command(self, prompt: str, command: str) -> None:
        """A command line as it is typed, before it runs."""
        self._out.print()
        self._out.print(Text.assemble((f"{prompt} ", "green"), (command, "bold")), soft_wrap=True)
        self._out.file.flush()  # on a pipe too: what is being waited for is on the screen
        self._wait(0.5)

    def output(self, output: str) -> None:
        """What a command printed."""
        lines = clean(output.rstrip("\n")).split("\n")
        if len(lines) > _MOST_LINES:
            more = self.text("more_lines", count=len(lines) - _MOST_LINES + 1)
            lines[_MOST_LINES // 2 : -(_MOST_LINES // 2) + 1] = [f"[{more}]"]
        shown = "\n".join(lines)
        if not shown:
            return
        if self._terminal:
            self._out.print(Padding(Text(shown), (0, 0, 0, 2), expand=False))
        else:
            for line in lines:
                self._out.print(Text(f"  {line}"), soft_wrap=True)
        self._wait(min(_LONGEST / 2, 0.3 + len(shown) / 220))

    def exit_code(self, code: int) -> None:
        """A command did not end with 0, which may be just what was wanted."""
        self._out.print(Text(f"  [{self.text('exit_code', code=code)}]", style="yellow"))

    def proof(self, told: str) -> None:
        """Something that was claimed and has been proved."""
        self._out.print(Text(f"  ✔ {told}", style="bold green"))
        self._wait(0.5)

    def note(self, told: str) -> None:
        """A remark beside the story."""
        self._out.print(Text(f"  {told}", style="yellow"))

    def alarm(self, told: str) -> None:
        """Something was not as it had to be."""
        self._out.print()
        self._out.print(Rule(style="bold red", characters="!"))
        self._out.print(Text(f"✘ {clean(told)}", style="bold red"))
        self._out.print(Rule(style="bold red", characters="!"))

    def ending(self, *, proofs: int, seconds: float) -> None:
        """All went well."""
        self._out.print()
        self._out.print(Rule(style="green"))
        told = self.text("ending", proofs=proofs, seconds=f"{seconds:.0f}")
        self._out.print(Text(told, style="bold green"))

    # -- time -----------------------------------------------------------------------------------

    def _wait(self, seconds: float) -> None:
        """Leave time for reading; Enter goes on at once."""
        if not self._pauses:
            return
        self._out.file.flush()
        if _at_the_keyboard():
            if select.select([sys.stdin], [], [], seconds)[0]:
                sys.stdin.readline()
        else:
            time.sleep(seconds)


def _at_the_keyboard() -> bool:
    """Whether Enter can reach us. From the background, reading would stop the whole process."""
    try:
        return sys.stdin.isatty() and os.tcgetpgrp(sys.stdin.fileno()) == os.getpgrp()
    except (AttributeError, ValueError, OSError):
        return False  # no stdin at all, a closed one, or another session's terminal


def folded(text: str, width: int) -> str:
    """Japanese `text` in lines of at most `width` cells."""
    lines: list[str] = []
    line = ""
    for piece in _PIECES.findall(text):
        if piece == "\n" or (
            line and cell_len(line + piece) > width - 2 and piece[0] not in _NOT_FIRST
        ):
            lines.append(line.rstrip())
            line = ""
        line += piece if line else piece.lstrip()
    return "\n".join([*lines, line])
