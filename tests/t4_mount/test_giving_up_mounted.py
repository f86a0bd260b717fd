"""A host that stands still (`fsfreeze`) under a mounted volume, and people who lose patience."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from mounted_rig import MIB, Machine, Rig, quiet, read_direct, sh, until, vsnapfs

pytestmark = [pytest.mark.needs_fuse, pytest.mark.needs_loop]


class Command:
    """A command under way; what it says goes to a file."""

    def __init__(self, machine: Machine, *words: str | Path) -> None:
        self._output = machine.base / f"output-{len(list(machine.base.glob('output-*')))}"
        with self._output.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "vsnapfs", *map(str, words)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        machine.later(self._end)

    def _end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(60)

    @property
    def said(self) -> str:
        """What it has said until now."""
        return self._output.read_text()

    def give_up(self, how: signal.Signals = signal.SIGINT) -> int:
        """Ctrl-C, or worse; its exit code."""
        self.process.send_signal(how)
        return self.process.wait(60)


@pytest.fixture
def on_ice(machine: Machine) -> tuple[Rig, Callable[[], None], Callable[[], None]]:
    """A mounted volume with three points on a host that can be frozen and thawed."""
    host = machine.host(160 * MIB)
    (host / "in").mkdir()
    rig = Rig(host / "in", area=32 * MIB)
    machine.rigs.append(rig)
    machine.later(rig.clean_up)
    rig.mount()
    for number in range(3):
        rig.create_point()
        rig.write(0, bytes([number + 1]) * 2 * MIB)
    # So that the frozen host has nothing left to do but what the test asks for.
    rig.carried_out()
    machine.later(quiet, "fsfreeze", "--unfreeze", host)

    def freeze() -> None:
        sh("fsfreeze", "--freeze", host)

    def thaw() -> None:
        sh("fsfreeze", "--unfreeze", host)

    return rig, freeze, thaw


def operations(rig: Rig) -> dict[str, Any]:
    found = rig.status()["operations"]
    assert isinstance(found, dict)
    return found


def test_what_is_given_up_on_a_frozen_host(
    machine: Machine, on_ice: tuple[Rig, Callable[[], None], Callable[[], None]]
) -> None:
    """The host is frozen: a restore has begun, a deletion, a point and more are queued, and all are
    given up. Each says truly what becomes of it; 70 held connections keep status and umount from
    nobody; and after the thaw only what had begun has been carried out.
    """
    rig, freeze, thaw = on_ice
    wanted = read_direct(rig.point(2))
    freeze()
    restore = Command(machine, "rp", "restore", rig.directory, "2")
    until(lambda: (operations(rig)["running"] or {}).get("begun"))
    queued = [
        Command(machine, *words)
        for words in (
            ("rp", "delete", rig.directory, "1"),
            ("rp", "create", rig.directory),
            ("resize", rig.directory, "--diff-area-size", "64MiB"),
            ("offline", rig.directory),
            ("repair", rig.directory),
        )
    ]
    until(lambda: len(operations(rig)["waiting"]) == len(queued))
    killed = Command(machine, "rp", "delete", rig.directory, "3")
    until(lambda: len(operations(rig)["waiting"]) == len(queued) + 1)
    with ExitStack() as stack:
        folder = os.open(rig.directory, os.O_PATH)
        stack.callback(os.close, folder)
        for _ in range(70):
            held = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            held.connect(f"/proc/self/fd/{folder}/control.sock")
        told = vsnapfs("status", rig.directory)
        assert "restoring recovery point 2" in told
        assert "deleting recovery point 1" in told
        assert killed.give_up(signal.SIGKILL) == -signal.SIGKILL
        for command in queued:
            assert command.give_up() == 130, command.said
            assert "had not begun, nothing was done" in command.said
        until(lambda: not operations(rig)["waiting"])
        assert restore.give_up() == 130
        assert f"has begun and goes on in the server (process {rig.pid})" in restore.said
        assert operations(rig)["running"]["what"] == "restoring recovery point 2"
        umount = Command(machine, "umount", rig.directory)
        until(lambda: "Waiting for: restoring recovery point 2" in umount.said)
        # Still answered, while the server waits for its host in order to close the volume.
        assert "restoring recovery point 2" in vsnapfs("status", rig.directory)
    thaw()
    assert umount.process.wait(60) == 0, umount.said
    assert rig.image.read_bytes() == wanted
    rig.mount()
    status = rig.status()
    assert status["state"] == "online"
    assert status["diff_area"]["maximum"] == 32 * MIB
    assert rig.points() == [1, 2, 3]
    # The restore ended without its client: that is told.
    assert rig.event(1048)["what"] == "rp_restore"
    rig.unmount()


def test_a_write_that_stands_still_with_the_server(
    machine: Machine, on_ice: tuple[Rig, Callable[[], None], Callable[[], None]]
) -> None:
    """A write to a block that has its copy stops the whole server on a frozen host: status is
    answered all the same and says so; what is given up meanwhile is never carried out.
    """
    rig, freeze, thaw = on_ice
    freeze()
    # Not from here: whoever has the file open and starts another process waits for the server.
    with subprocess.Popen(
        ["dd", "if=/dev/zero", f"of={rig.replica}", "bs=4k", "count=1", "conv=notrunc"],
        stderr=subprocess.DEVNULL,
    ) as writer:
        try:
            until(lambda: "server's own thread hangs" in vsnapfs("status", rig.directory))
            delete = Command(machine, "rp", "delete", rig.directory, "1")
            until(lambda: "Waiting for: the host" in delete.said)
            assert delete.give_up() == 130
            assert "had not begun, nothing was done" in delete.said
        finally:
            thaw()
        assert writer.wait(60) == 0
    assert rig.points() == [1, 2, 3]
    assert "hangs" not in vsnapfs("status", rig.directory)
    rig.unmount()
