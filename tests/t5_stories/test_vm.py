"""The virtual machine of vm/: its judges and its forgetful disk always, the machine when asked for.

VSNAPFS_VM_TESTS=1 makes the machine if need be and loses power for real, which takes minutes;
otherwise one short boot is tried where the machine is there already.
"""

from __future__ import annotations

import os
import random
import socket
import struct
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
VM = ROOT / "vm"
ASKED = os.environ.get("VSNAPFS_VM_TESTS") == "1"
SECTOR = 512


def module(monkeypatch: pytest.MonkeyPatch, folder: Path, name: str) -> ModuleType:
    """Import one of vm/'s modules as its scripts do, and forget it afterwards."""
    import importlib

    monkeypatch.syspath_prepend(folder)
    for known in [key for key in sys.modules if key.split(".")[0] in {"host", "report", name}]:
        monkeypatch.delitem(sys.modules, known)
    return importlib.import_module(name)


def script(*command: str, limit: float) -> subprocess.CompletedProcess[str]:
    """Run one of vm/'s scripts."""
    return subprocess.run(
        [str(VM / command[0]), *command[1:]],
        capture_output=True,
        text=True,
        check=False,
        timeout=limit,
    )


def machine_or_skip() -> None:
    """Skip, with the reason, where there is no machine to boot."""
    place = Path(os.environ.get("VSNAPFS_VM") or VM / ".build")
    if not (place / "stamp").exists() and not ASKED:
        pytest.skip("no virtual machine here: vm/build makes it, VSNAPFS_VM_TESTS=1 asks for it")
    if ASKED:  # otherwise what is there will do: a stale one is not made anew unasked
        made = script("build", limit=1800)
        assert made.returncode == 0, made.stderr


def asked_or_skip() -> None:
    if not ASKED:
        pytest.skip("takes minutes: VSNAPFS_VM_TESTS=1 asks for it")
    machine_or_skip()


# --- the disk with a volatile cache ------------------------------------------------------------


class Client:
    """Speaks just enough NBD."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(10)
        self._socket.connect(str(path))
        self._socket.recv(18, socket.MSG_WAITALL)
        self._socket.sendall(struct.pack(">I", 3))
        self._socket.sendall(struct.pack(">QII", 0x49484156454F5054, 1, 0))
        size, _flags = struct.unpack(">QH", self._socket.recv(10, socket.MSG_WAITALL))
        self.size = size

    def request(
        self, kind: int, offset: int, length: int, data: bytes = b"", flags: int = 0
    ) -> None:
        header = struct.pack(">IHHQQI", 0x25609513, flags, kind, 7, offset, length)
        self._socket.sendall(header + data)
        magic, error, handle = struct.unpack(">IIQ", self._socket.recv(16, socket.MSG_WAITALL))
        assert (magic, error, handle) == (0x67446698, 0, 7)

    def write(self, offset: int, data: bytes, *, fua: bool = False) -> None:
        self.request(1, offset, len(data), data, int(fua))

    def read(self, offset: int, length: int) -> bytes:
        self.request(0, offset, length)
        return self._socket.recv(length, socket.MSG_WAITALL)

    def flush(self) -> None:
        self.request(3, 0, 0)

    def close(self) -> None:
        self._socket.close()


def one_cut(nbd: Any, place: Path, seed: int) -> tuple[list[bytes], Any]:
    """Four pieces of 4 sectors: flushed; flushed and overwritten; FUA; written. Then a cut."""
    image = place / f"{seed}.img"
    image.write_bytes(b"-" * 16 * SECTOR)
    disk = nbd.VolatileDisk(image, place / f"{seed}.socket")
    client = Client(place / f"{seed}.socket")
    assert client.size == 16 * SECTOR
    client.write(0, b"a" * 8 * SECTOR)
    client.flush()
    client.write(4 * SECTOR, b"b" * 4 * SECTOR)
    client.write(8 * SECTOR, b"c" * 4 * SECTOR, fua=True)
    client.write(12 * SECTOR, b"d" * 4 * SECTOR)
    assert client.read(4 * SECTOR, 4 * SECTOR) == b"b" * 4 * SECTOR
    client.close()
    cut = disk.cut(random.Random(seed))
    content = image.read_bytes()
    return [content[at : at + 4 * SECTOR] for at in range(0, 16 * SECTOR, 4 * SECTOR)], cut


def test_the_disk_loses_and_tears_only_what_was_not_flushed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A flushed or FUA write is always there; of the others any part, and each way does occur."""
    nbd = module(monkeypatch, VM, "host.nbd")
    seen = set()
    for seed in range(60):
        (flushed, over, fua, written), cut = one_cut(nbd, tmp_path, seed)
        assert flushed == b"a" * 4 * SECTOR
        assert fua == b"c" * 4 * SECTOR
        assert cut.unflushed == 3
        for content, old, new in ((over, b"a", b"b"), (written, b"-", b"d")):
            sectors = [content[at : at + SECTOR] for at in range(0, len(content), SECTOR)]
            assert all(sector in {old * SECTOR, new * SECTOR} for sector in sectors)
            kinds = {sector[:1] for sector in sectors}
            seen.add("torn" if len(kinds) == 2 else "new" if kinds == {new} else "old")
    assert seen == {"old", "new", "torn"}


# --- the judges --------------------------------------------------------------------------------


def test_a_lost_flushed_write_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sector from before the flushed write fails the round; a later one, or torn ones, do not."""
    guest = module(monkeypatch, VM / "guest", "power_fail")
    old, flushed, later = (guest.stamp(3, 1, 5, count) for count in (7, 8, 9))
    guest.check_slot(4, 1, 5, (3, 8), flushed)
    guest.check_slot(4, 1, 5, (3, 8), later[:SECTOR] + flushed[SECTOR:])
    guest.check_slot(4, 1, 5, (2, 64), old)
    for bad, least in (
        (flushed[:-SECTOR] + old[-SECTOR:], (3, 8)),  # one sector is lost
        (bytes(guest.SLOT), (3, 8)),  # all is
        (guest.stamp(2, 1, 5, 99), (3, 1)),  # a round too old
        (guest.stamp(3, 1, 6, 8), (3, 8)),  # another slot's
        (guest.stamp(4, 1, 5, 1), (3, 8)),  # from the future
        (flushed[:100] + b"?" + flushed[101:], (3, 8)),  # damaged
        (flushed[:-1], (3, 8)),  # short
    ):
        with pytest.raises(guest.Wrong):
            guest.check_slot(4, 1, 5, least, bad)


def test_the_host_remembers_what_was_promised(monkeypatch: pytest.MonkeyPatch) -> None:
    """Points answered for must be there, half-deleted ones may; flushes count from their report."""
    import json

    host = module(monkeypatch, VM, "host.power_fail")
    memory = host.Memory(1)
    memory.next_round()
    for word, what in (
        ("CREATED", {"number": 1}),
        ("HASHED", {"number": 1, "sha256": "x"}),
        ("CREATED", {"number": 2}),
        ("CREATED", {"number": 3}),
        ("DELETING", {"number": 2}),
        ("DELETED", {"number": 2}),
        ("DELETING", {"number": 3}),
        ("FLUSHED", {"thread": 1, "count": 5}),
        ("REFUSED", {"fault": {"name": "n"}}),
    ):
        memory.hear(word, what)
    memory.next_round()
    known = json.loads(memory.for_guest(create=False, last=False))
    assert known["points"] == {"1": "x", "3": None}
    assert known["deleting"] == [3]
    assert known["highest"] == 3
    assert known["offline"] is True
    assert known["history"] == [[1, [0, 5]]]
    memory.hear("LEAVING", {})
    assert json.loads(memory.for_guest(create=False, last=False))["offline"] is None
    with pytest.raises(host.Lost, match="it broke"):
        memory.hear("BAD", {"what": "it broke"})


# --- the machine -------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.time_limit(2400)
def test_a_command_runs_in_the_machine() -> None:
    """The stock kernel boots, the checkout is there; output and exit code come back."""
    machine_or_skip()
    ran = script("run", "uname -r; vsnapfs --version; echo oh >&2; exit 7", limit=400)
    assert ran.returncode == 7, ran.stderr
    assert "-cloud-amd64\nvsnapfs, version " in ran.stdout
    assert "oh\n" in ran.stderr


@pytest.mark.slow
@pytest.mark.time_limit(4000)
@pytest.mark.parametrize(
    "command",
    [("power-fail", "3"), ("log-writes", "--steps", "25"), ("flakey",)],
    ids=lambda command: command[0],
)
def test_nothing_is_lost_in_the_machine(command: tuple[str, ...]) -> None:
    """Power fails, every flush is replayed, and a bad disk is noticed."""
    asked_or_skip()
    ran = script(*command, limit=3600)
    assert ran.returncode == 0, ran.stdout + ran.stderr
