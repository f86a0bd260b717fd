"""How things look: errors, JSON, tables, progress, questions. Nothing here knows what a volume is.

Promises: human output and JSON go to stdout, everything else (errors, warnings, progress,
questions) to stderr; nothing is coloured or wrapped unless a terminal shows it; text from disk
(labels, paths) never reaches the terminal with control characters or as markup; JSON and XML are
valid whatever the encoding.
"""

from __future__ import annotations

import io
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import click

from vsnapfs.cli import streams
from vsnapfs.errors import VsnapError
from vsnapfs.units import format_size

ProgressFn = Callable[[str, int, int], None]
"""(phase, done, total), both in bytes."""

_PLAIN_EVERY = 10.0  # seconds between two lines of progress where there is no terminal


def echo(text: str = "", *, err: bool = False, nl: bool = True) -> None:
    """Write text, with a line feed, and flush it. The only way in which commands write."""
    # Named: click would wrap a stream that is ASCII in one of its own, which is UTF-8.
    click.echo(text, file=sys.stderr if err else sys.stdout, nl=nl)


def complain(message: str, hint: str = "") -> None:
    """An error: what happened, and what to do next."""
    text = clean(message)
    if text.endswith(".") and not text.endswith(".."):
        text = text[:-1]  # one form for all, whichever layer wrote it
    echo(f"vsnapfs: error: {text}", err=True)
    if hint:
        echo(f"  hint: {clean(hint)}", err=True)


def warn(message: str) -> None:
    """Something the user should know although the command goes on."""
    echo(f"vsnapfs: warning: {clean(message)}", err=True)


def note(message: str) -> None:
    """What is being done, for people: stderr, so that scripts can read stdout."""
    echo(clean(message), err=True)


def clean(text: str) -> str:
    """`text` without control characters (line breaks stay), bidirectional tricks and surrogates."""
    return "".join(c if c.isprintable() or c == "\n" else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    return " " if character == "\t" else character.encode("unicode_escape").decode()


def json_text(data: object, *, indent: int | None = 2) -> str:
    """JSON as stdout can carry it: JSON is UTF-8, so any other encoding gets nothing but ASCII."""
    streams.for_programs()
    text = json.dumps(data, ensure_ascii=False, indent=indent)
    if streams.is_utf8() and streams.can_show(text):
        return text
    return json.dumps(data, ensure_ascii=True, indent=indent)


def json_line(text: str) -> str:
    """The same for JSON on one line that is text already."""
    streams.for_programs()
    if streams.is_utf8() and streams.can_show(text):
        return text
    return json.dumps(json.loads(text), ensure_ascii=True)


def xml_text(text: str) -> str:
    """XML as stdout can carry it: without a declaration XML is UTF-8, as JSON is."""
    streams.for_programs()
    if streams.is_utf8():
        return text
    return text.encode("ascii", "xmlcharrefreplace").decode("ascii")


def readable(lang: str) -> str:
    """`lang`, or "en" with a warning where stdout's encoding has no characters for it."""
    if lang != "ja" or streams.can_show("日本語"):
        return lang
    warn(f"the output's encoding ({sys.stdout.encoding}) has no Japanese: told in English")
    return "en"


def print_json(data: object) -> None:
    """One JSON document on stdout."""
    echo(json_text(data))


def when(nanoseconds: int) -> str:
    """Nanoseconds since the epoch as `2026-11-22 07:20:00Z`: UTC, like the names under by-time."""
    moment = datetime.fromtimestamp(nanoseconds // 10**9, UTC)
    return moment.strftime("%Y-%m-%d %H:%M:%SZ")


def print_table(headers: Sequence[str], rows: Iterable[Sequence[str]], *, right: str = "") -> None:
    """A table. `right`: the headers of the columns that hold numbers, separated by spaces."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    terminal = sys.stdout.isatty()
    # Without a terminal it is plain, and so wide that nothing is ever wrapped.
    out = Console(
        file=sys.stdout if terminal else io.StringIO(),
        width=None if terminal else 10_000,
        highlight=False,
        markup=False,
        emoji=False,
    )
    table = Table(box=SIMPLE_HEAD if terminal else None, pad_edge=False, show_edge=False)
    numbers = right.split()
    for header in headers:
        table.add_column(
            header.upper(), justify="right" if header in numbers else "left", overflow="fold"
        )
    for row in rows:
        table.add_row(*(Text(streams.carried(clean(cell))) for cell in row))
    out.print(table)
    if isinstance(out.file, io.StringIO):
        for line in out.file.getvalue().splitlines():
            echo(line.rstrip())


def print_facts(facts: Iterable[tuple[str, str]], *, indent: int = 2) -> None:
    """Lines of `name  value`; a value of several lines stays in its column."""
    listed = list(facts)
    width = max((len(name) for name, _ in listed), default=0)
    for name, value in listed:
        first, *more = clean(value).split("\n")
        echo(f"{'':{indent}}{name:<{width}}  {first}".rstrip())
        for line in more:
            echo(f"{'':{indent}}{'':{width}}  {line}".rstrip())


def confirm(question: str, *, option: str) -> None:
    """Ask on stderr and go on only after a yes. `option`: what a script passes instead."""
    # Not click.confirm: before click 8.2 it writes a part of the question to stdout.
    echo(f"{clean(question)} [y/N]: ", nl=False, err=True)
    agreed = sys.stdin.readline().strip().lower() in ("y", "yes")  # "" when nobody is there
    if not agreed:
        raise VsnapError(
            "not confirmed: nothing was changed", hint=f"{option} confirms without asking."
        )


@contextmanager
def progress(title: str) -> Iterator[ProgressFn]:
    """A function for progress reports: a bar with rate and time left on a terminal, else lines.

    Nothing is drawn until the first report, so commands that finish at once stay silent.
    """
    if not sys.stderr.isatty():
        yield _PlainProgress(title)
        return
    bars = _Bars(title)
    try:
        yield bars
    finally:
        bars.close()


class _PlainProgress:
    """For logs and pipes: a line every ten seconds, so that short work leaves no trace."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._phase = ""
        self._started = self._shown = time.monotonic()

    def __call__(self, phase: str, done: int, total: int) -> None:
        now = time.monotonic()
        if phase != self._phase:
            self._phase, self._started = phase, now
        if now - self._shown < _PLAIN_EVERY:
            return
        self._shown = now
        elapsed = now - self._started
        rate = done / elapsed if elapsed > 0 else 0.0
        left = f", {(total - done) / rate:.0f} s left" if rate > 0 and total > done else ""
        share = f" ({100 * done // total} %)" if total > 0 else ""
        note(
            f"{self._title}: {phase}: {format_size(done)} of {format_size(total)}{share}, "
            f"{format_size(int(rate))}/s{left}"
        )


class _Bars:
    """A rich progress bar per phase. It vanishes at the end: the command's own result remains."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._progress: Any = None
        self._task: Any = None
        self._phase = ""

    def __call__(self, phase: str, done: int, total: int) -> None:
        if self._progress is None:
            self._start()
        if phase != self._phase:
            if self._task is not None:
                self._progress.remove_task(self._task)
            self._phase = phase
            label = clean(f"{self._title}: {phase}")
            self._task = self._progress.add_task(label, total=total)
        self._progress.update(self._task, completed=done, total=total)

    def _start(self) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        self._progress.start()

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
