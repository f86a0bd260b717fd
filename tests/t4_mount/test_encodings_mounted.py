"""Names that are no text, and a terminal that is not UTF-8, with a real server and real mounts."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from mounted_rig import MIB, Machine
from namespace import Namespace

pytestmark = [pytest.mark.needs_fuse, pytest.mark.needs_loop]

LABEL = "ラベル é “x” 😀"


def test_a_volume_served_beside_names_that_are_no_text(machine: Machine) -> None:
    """A mountpoint of anybody's on this machine, a volume and its mountpoint are called in bytes
    that are no UTF-8, and the server begins on a terminal that is not UTF-8 either: it is served as
    ever, and what it says in the mount is UTF-8.
    """
    here = Namespace(machine)
    for name in (b"\xff", b"mnt-vol-\xfe"):
        Path(os.fsdecode(os.fsencode(machine.base) + b"/" + name)).mkdir()
    here.mount("-t", "tmpfs", "vsnapfs-test", machine.base / os.fsdecode(b"\xff"))
    directory = machine.base / os.fsdecode(b"vol-\xfe")
    place = machine.base / os.fsdecode(b"mnt-vol-\xfe")
    latin = {"PYTHONIOENCODING": "iso8859-1"}
    here.vsnapfs("create", directory, "--size", str(MIB), "--diff-area-size", str(2 * MIB), **latin)
    here.serve(directory, place, **latin)
    here.vsnapfs("recovery-point", "create", directory, "--label", LABEL, **latin)
    here.vsnapfs("status", directory, **latin)
    events = here.read(place / "events.log").decode("utf-8")
    assert LABEL in events
    status = json.loads(here.read(place / "status.json").decode("utf-8"))
    assert status["volume"] == str(directory)
    here.vsnapfs("umount", directory, **latin)
    assert (directory / "server.log").read_text(encoding="utf-8") == ""
