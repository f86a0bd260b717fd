"""A server under strace(1): which system calls it makes, in which order, and failing ones.

Owns attaching, the end of it, and the reading of what strace writes. A `Call` has its place in the
order of ends, which is the order of things: what a call brought about is so when it has ended.
"""

from __future__ import annotations

import ast
import re
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from house import is_traced
from mounted_rig import until

FUSE_WRITE = 16
_LINE = re.compile(r"^(?P<thread>\d+) +(?P<rest>.*)$")
_BEGIN = re.compile(r"^(?P<name>\w+)\(\d+<(?P<file>[^>]*)>")
_RESUMED = re.compile(r"^<\.\.\. (?P<name>\w+) resumed>")
_RESULT = re.compile(r" = (?P<result>-?\d+)(?: [A-Z].*)?$")
_BYTES = re.compile(r'"((?:[^"\\]|\\.)*)"')


@dataclass(frozen=True)
class Call:
    """A system call that has ended. file: of its descriptor. head: the first bytes moved."""

    name: str
    file: str
    result: int
    head: bytes

    @property
    def _ids(self) -> tuple[int, int]:
        return int.from_bytes(self.head[4:8], "little"), int.from_bytes(self.head[8:16], "little")

    @property
    def asked(self) -> tuple[int, int] | None:
        """(opcode, number) of the request that a read of /dev/fuse brought."""
        found = self.name == "read" and self.file == "/dev/fuse" and self.result >= 16
        return self._ids if found else None

    @property
    def answered(self) -> int | None:
        """Number of the request that a write to /dev/fuse answered."""
        found = self.name in ("write", "writev") and self.file == "/dev/fuse" and self.result > 0
        return self._ids[1] if found else None


@dataclass
class Trace:
    """What was recorded; there once the context of `traced` has ended."""

    calls: list[Call] = field(default_factory=list)

    def writes(self) -> list[list[Call]]:
        """For each FUSE_WRITE, in order: the calls from its arrival to its answer."""
        found = []
        for start, call in enumerate(self.calls):
            if call.asked is not None and call.asked[0] == FUSE_WRITE:
                end = next(
                    place
                    for place in range(start, len(self.calls))
                    if self.calls[place].answered == call.asked[1]
                )
                found.append(self.calls[start : end + 1])
        return found


@contextmanager
def traced(pid: int, output: Path, *options: str) -> Iterator[Trace]:
    """Trace all threads of a process meanwhile. options: for strace, besides."""
    trace = Trace()
    command = ["strace", "-f", "-y", "-s", "16", "-o", str(output), *options, "-p", str(pid)]
    tracer = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    try:
        until(lambda: tracer.poll() is not None or is_traced(pid))
        assert tracer.poll() is None, tracer.communicate()[1].decode(errors="replace")
        yield trace
    finally:
        with suppress(ProcessLookupError):
            tracer.send_signal(signal.SIGTERM)  # It lets go of the process, which goes on.
        tracer.communicate()
    trace.calls = list(_calls(output.read_text(errors="replace").splitlines()))


def _calls(lines: list[str]) -> Iterator[Call]:
    unfinished: dict[str, str] = {}
    for line in lines:
        found = _LINE.match(line)
        if found is None:
            continue
        thread, rest = found["thread"], found["rest"]
        if rest.endswith("<unfinished ...>"):
            unfinished[thread] = rest.removesuffix("<unfinished ...>")
            continue
        if resumed := _RESUMED.match(rest):
            rest = unfinished.pop(thread, "") + rest[resumed.end() :]
        begin, result = _BEGIN.match(rest), _RESULT.search(rest)
        if begin is None or result is None:
            continue  # A signal, a thread that begins or ends.
        head = _BYTES.search(rest, begin.end())
        moved = ast.literal_eval(f'b"{head[1]}"') if head else b""
        yield Call(begin["name"], begin["file"], int(result["result"]), moved)
