"""Serve a volume: here (`serve`) or in a process of its own (`spawn`).

Promises that whoever calls learns the real error, word for word, whichever way was chosen: the
child checks and mounts, and passes the outcome back through a pipe as one line of JSON. The child
is cut loose from the terminal: own session, `/` as its directory, stdio to the volume's server.log.

Leaves what happens while serving to `lifecycle`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from vsnapfs.config import DEFAULT_WRITE_BUFFER, Durability, check_write_buffer, shown
from vsnapfs.daemon import preflight, process
from vsnapfs.daemon.control import no_memory
from vsnapfs.daemon.lifecycle import Server
from vsnapfs.errors import VsnapError

_logger = logging.getLogger("vsnapfs.daemon")
_PACKAGE_ROOT = str(Path(__file__).resolve().parents[2])


def serve(
    directory: Path,
    mountpoint: Path,
    *,
    options: Iterable[str] = (),
    accept_changed_replica: bool = False,
    durability: Durability | None = None,
    write_buffer: int = DEFAULT_WRITE_BUFFER,
    give_up_write_buffer: bool = False,
    lang: str = "en",
    ready: Callable[[], None] | None = None,
    warn: Callable[[str], None] | None = None,
) -> None:
    """Mount the volume and serve it in this process until it is unmounted or a signal comes.

    options: as of -o. durability: other than volume.toml says. write_buffer: bytes, 0 for none.
    give_up_write_buffer: go on without a write buffer that cannot be used and keeps it closed.
    lang: language of events.log in the mount ("en", "ja"). ready: called once
    the mount can be used; warn, before that, with each thing the administrator should know.
    Returns after a clean close. VsnapError if it cannot be mounted, or if closing fails. Uses the
    main thread's signals; one mount a process.
    """
    check_write_buffer(write_buffer)
    plan = preflight.check(directory, mountpoint, options)
    process.prepare()

    def on_ready(warnings: list[str]) -> None:
        for warning in warnings:
            (warn or _logger.warning)(warning)
        if ready is not None:
            ready()

    server = Server(
        plan,
        accept_changed_replica=accept_changed_replica,
        durability=durability,
        write_buffer=write_buffer,
        give_up_write_buffer=give_up_write_buffer,
        lang=lang,
        ready=on_ready,
    )
    process.run_trio(server.run)


def spawn(
    directory: Path,
    mountpoint: Path,
    *,
    options: Iterable[str] = (),
    accept_changed_replica: bool = False,
    durability: Durability | None = None,
    write_buffer: int = DEFAULT_WRITE_BUFFER,
    give_up_write_buffer: bool = False,
    lang: str = "en",
    warn: Callable[[str], None] | None = None,
) -> int:
    """Mount the volume in a new background process; return its pid once the mount can be used.

    The same errors as `serve`. If the process ends without a word (killed), a VsnapError quotes
    what it left in server.log.
    """
    # Checked here already, so that nothing is even started for a misspelt name.
    check_write_buffer(write_buffer)
    plan = preflight.check(directory, mountpoint, options)
    settings = {
        "directory": str(plan.directory),
        "mountpoint": str(plan.mountpoint),
        "options": sorted(plan.options),
        "accept_changed_replica": accept_changed_replica,
        "durability": durability,
        "write_buffer": write_buffer,
        "give_up_write_buffer": give_up_write_buffer,
        "lang": lang,
    }
    log = process.open_log(plan.directory)
    try:
        log_start = os.fstat(log).st_size
        reading, writing = os.pipe()
        with open(reading, "rb") as answers:
            try:
                child = _start(settings, writing, log)
            finally:
                os.close(writing)
            try:
                answer = answers.read()
            except BaseException:  # Ctrl-C while it opens a large volume
                child.terminate()
                child.wait()
                raise
        outcome = _parsed(answer)
        for warning in outcome.get("warnings", ()):
            (warn or _logger.warning)(warning)
        if outcome.get("ready"):
            # Collected when it ends, for callers that live that long.
            threading.Thread(target=child.wait, daemon=True).start()
            return child.pid
        status = child.wait()
        if "error" in outcome:
            raise VsnapError.from_json(outcome["error"])
        last_words = _tail(log, log_start)
        raise VsnapError(
            f"the process that was to serve {shown(plan.directory)} ended"
            f" {'by signal' if status < 0 else 'with status'} {abs(status)}",
            hint=f"server.log says: {last_words}" if last_words else "",
            code="server-died",
        )
    finally:
        os.close(log)


def _start(settings: dict[str, Any], pipe: int, log: int) -> subprocess.Popen[bytes]:
    environment = dict(os.environ)
    # The child starts in /, so a package found through the current directory must be named.
    paths = [_PACKAGE_ROOT, *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]
    environment["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))
    environment["PYTHONSAFEPATH"] = "1"
    return subprocess.Popen(
        [sys.executable, "-m", "vsnapfs.daemon", str(pipe), json.dumps(settings)],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        pass_fds=(pipe,),
        cwd="/",
        env=environment,
        start_new_session=True,
    )


def _parsed(answer: bytes) -> dict[str, Any]:
    with contextlib.suppress(ValueError):
        outcome = json.loads(answer)
        if isinstance(outcome, dict):
            return outcome
    return {}


def _tail(log: int, start: int) -> str:
    """The last line written to server.log since `start`."""
    try:
        with open(f"/proc/self/fd/{log}", "rb") as file:
            file.seek(start)
            lines = file.read(65536).decode("utf-8", "replace").strip().splitlines()
    except OSError:
        return ""
    return shown(lines[-1]) if lines else ""


def child_main(arguments: list[str]) -> int:
    """What `python -m vsnapfs.daemon PIPE SETTINGS` does. Returns the exit code."""
    pipe = int(arguments[0])
    os.set_inheritable(pipe, False)
    settings: dict[str, Any] = json.loads(arguments[1])
    process.log_to_stderr()
    told = False
    warnings: list[str] = []

    def tell(outcome: dict[str, Any]) -> None:
        nonlocal told
        told = True
        with contextlib.suppress(OSError):  # whoever started us may be gone; we serve all the same
            os.write(pipe, json.dumps(outcome).encode("ascii"))
        os.close(pipe)

    try:
        serve(
            Path(settings.pop("directory")),
            Path(settings.pop("mountpoint")),
            ready=lambda: tell({"ready": True, "warnings": warnings}),
            warn=warnings.append,
            **settings,
        )
    except VsnapError as error:
        if told:
            _logger.error("%s", error)  # noqa: TRY400 - an error with a message needs no traceback
        else:
            tell({"error": error.to_json()})
        return error.exit_code or 1
    except Exception as error:
        _logger.exception("the server ended by an unexpected error")
        if not told:
            text = f"unexpected error: {type(error).__name__}: {error}"
            failure = VsnapError(text, code="unexpected")
            if isinstance(error, MemoryError):
                failure = no_memory("mounting the volume")
            tell({"error": failure.to_json()})
        return 1
    return 0
