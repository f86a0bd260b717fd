"""Commands as they are typed: run by sh, in the demo's directory, shown with their real output.

Owns processes: each command is a group of its own, so that Ctrl-C reaches only the demo, which then
ends the group and waits for it. Promises that no command runs longer than its time limit and that
none is left behind. Knows nothing of the story.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vsnapfs.demo.clearing import PLACE_VARIABLE, WITH_SBIN
from vsnapfs.demo.narrator import Narrator

_PACKAGE_ROOT = str(Path(__file__).resolve().parents[2])
# `vsnapfs` means the very program that tells the story, installed or not.
_PRELUDE = 'vsnapfs() { "$VSNAPFS_DEMO_PYTHON" -m vsnapfs "$@"; }\n'
_TIMEOUT = 180.0


class CommandError(Exception):
    """A command did not end as the story needs it. `done` is what it did."""

    def __init__(self, command: str, code: int, output: str) -> None:
        super().__init__(f"{command}: exit code {code}\n{output}")
        self.command = command
        self.code = code
        self.output = output


@dataclass(frozen=True)
class Done:
    """How a command ended. output: stdout and stderr in the order they were written."""

    command: str
    code: int
    output: str


class Shell:
    """Runs commands in `directory`. lang: what vsnapfs's own events speak."""

    def __init__(self, directory: Path, narrator: Narrator, lang: str) -> None:
        self.directory = directory
        self._narrator = narrator
        self._prompt = "#" if os.geteuid() == 0 else "$"
        paths = [_PACKAGE_ROOT, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        self._environment = os.environ | {
            "VSNAPFS_DEMO_PYTHON": sys.executable,
            PLACE_VARIABLE: str(directory),
            "VSNAPFS_LANG": lang,
            "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths)),
            "PYTHONSAFEPATH": "1",
            # Tools speak as they do everywhere, so that their numbers can be read.
            "LC_ALL": "C.UTF-8",
            "PYTHONIOENCODING": "utf-8",
            # mkfs, losetup and fsfreeze live in sbin.
            "PATH": WITH_SBIN,
        }

    def run(self, command: str, *, codes: tuple[int, ...] | None = (0,)) -> Done:
        """Show and run a command line, show its output. CommandError unless it ends as in `codes`.

        codes: None accepts everything.
        """
        self._narrator.command(self._prompt, command)
        code, output, _ = self._execute(command, subprocess.STDOUT)
        self._narrator.output(output)
        if code:
            self._narrator.exit_code(code)
        if codes is not None and code not in codes:
            raise CommandError(command, code, "")
        return Done(command, code, output)

    def ask(self, command: str) -> str:
        """Run a command unseen; its stdout. 3 is what `status` says of an offline volume."""
        code, output, errors = self._execute(command, subprocess.PIPE)
        if code not in (0, 3):
            raise CommandError(command, code, errors)
        return output

    def status(self) -> dict[str, Any]:
        """The volume's status, from `status --json`."""
        found: dict[str, Any] = json.loads(self.ask("vsnapfs status vol1 --json"))[0]
        return found

    def events(self) -> list[dict[str, Any]]:
        """All events so far, from `events --json`."""
        lines = self.ask("vsnapfs events vol1 --json").splitlines()
        return [json.loads(line) for line in lines if line]

    def _execute(self, command: str, errors: int) -> tuple[int, str, str]:
        process = subprocess.Popen(
            ["sh", "-c", _PRELUDE + command],
            cwd=self.directory,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
        )
        try:
            out, err = process.communicate(timeout=_TIMEOUT)
        except subprocess.TimeoutExpired:
            _end(process)
            raise CommandError(command, -1, f"no end after {_TIMEOUT:.0f} s") from None
        except BaseException:
            _end(process)
            raise
        return process.returncode, out, err or ""


def _end(process: subprocess.Popen[str]) -> None:
    """End a command with all it has started, politely first."""
    for sent, patience in ((signal.SIGTERM, 10), (signal.SIGKILL, 10)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, sent)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)
            break
    for pipe in (process.stdout, process.stderr):
        if pipe is not None:
            pipe.close()
