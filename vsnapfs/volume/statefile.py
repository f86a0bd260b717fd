"""The `state` file: on- or offline and why, kept where a full or lost diff area cannot hurt it.

Owns its 8 KiB: two checksummed copies of 4 KiB, preallocated when the volume is created and
overwritten in place, one after the other, each synced. Promise: what `save` returned from is
found by the next `load`, whatever happens; a torn copy leaves the other one. What is durable in
one copy is saved, even if the other cannot be written: `load` would find it. The only good copy is
not overwritten, so the next `save` fails if that is still so.
"""

from __future__ import annotations

import json
import struct
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from ..backing import Backing
from ..diffarea.layout import (
    MAX_AREA_SIZE,
    MAX_BLOCK_SIZE,
    MAX_COUNTER,
    MAX_FOUND_COUNTER,
    is_block_size,
)
from ..diffarea.superblock import MAX_POINT_NUMBER, NO_RING, RingName
from ..errors import Fault, FormatError

COPY_SIZE = 4096
STATE_SIZE = 2 * COPY_SIZE
_MAGIC = b"VSNAPST\x00"
_HEAD = struct.Struct("<8sII16sQ")  # magic, version, text length, volume id, sequence
_VERSION = 1
_CHECK_OFFSET = COPY_SIZE - 8
_MAX_TEXT = _CHECK_OFFSET - _HEAD.size


@dataclass(frozen=True)
class SavedState:
    """What must be known even without the diff area.

    given_up: recovery points up to this number no longer count (policy `evict` lost them, or an
    administrator gave them up), even if a superblock still names them. maximum (bytes),
    block_size (bytes) and epoch are the diff area's, as last seen: a new area can be made with
    them and no number is used twice. generation, ring, boot: the superblock's at that time.
    others_at, others_point: somebody else had the replica open for writing while we had it, first
    at this time (nanoseconds since the epoch); of the points up to this number something may be
    missing. spoilt: points up to this number may have lost copies with a failed sync, and the
    superblock does not say so yet. Written only once that has happened, so that earlier versions
    read all other states.
    """

    offline: bool = False
    fault: Fault | None = None
    given_up: int = 0
    maximum: int = 0
    block_size: int = 0
    epoch: int = 0
    generation: int = 0
    ring: RingName = NO_RING
    boot: bytes = bytes(16)
    others_at: int = 0
    others_point: int = 0
    spoilt: int = 0


class StateFile:
    """Reads and writes the state in an open `backing` of at least 8 KiB."""

    def __init__(self, backing: Backing, volume_id: bytes) -> None:
        self.backing = backing
        self._volume_id = volume_id
        self._sequence = 0
        #: The copy to write first: never the only good one, or a power failure could leave none.
        self._first = 0
        #: Why the last `save` could write one copy only, None if it wrote both.
        self.incomplete: OSError | MemoryError | None = None

    def load(self) -> SavedState:
        """The newest valid copy. FormatError if there is none; OSError if it cannot be read."""
        copies, problem = self._read()
        found = [copy for copy in copies if copy is not None]
        if not found and problem is not None:
            raise problem
        if not found:
            raise FormatError(f"{self.backing.path} holds no valid state of this volume")
        self._sequence, state = max(found, key=lambda pair: pair[0])
        self._first = int(copies[0] is not None and copies[0][0] == self._sequence)
        return state

    def check(self) -> list[tuple[int, str]]:
        """(offset, what is wrong with it) of each copy that is not valid or not the newest."""
        copies, problem = self._read()
        newest = max((copy[0] for copy in copies if copy is not None), default=0)
        wrong: list[tuple[int, str]] = []
        for number, copy in enumerate(copies):
            if copy is None:
                reason = f" ({problem.strerror or problem})" if problem else ""
                wrong.append((number * COPY_SIZE, f"is not valid{reason}"))
            elif copy[0] != newest:
                wrong.append((number * COPY_SIZE, "is older than the other one"))
        return wrong

    def _read(self) -> tuple[list[tuple[int, SavedState] | None], OSError | None]:
        """Both copies (None: not valid), and why one could not be read, if so."""
        copies: list[tuple[int, SavedState] | None] = []
        problem: OSError | None = None
        for copy in (0, 1):
            decoded = None
            try:
                if self.backing.size() >= (copy + 1) * COPY_SIZE:
                    data = bytes(self.backing.read(copy * COPY_SIZE, COPY_SIZE))
                    decoded = _decode(data, self._volume_id)
            except OSError as error:
                problem = error
            copies.append(decoded)
        return copies, problem

    def save(self, state: SavedState) -> None:
        """Write both copies, each synced. OSError if not even the first could be, see `incomplete`
        for the second.
        """
        self._sequence += 1
        data = _encode(state, self._volume_id, self._sequence)
        second = 1 - self._first
        self._write(self._first, data)
        self.incomplete = None
        try:
            self._write(second, data)
        except (OSError, MemoryError) as error:
            self.incomplete = error  # It counts all the same: nobody may be told that it does not.

    def _write(self, copy: int, data: bytes) -> None:
        self._first = copy  # Until it is durable it is the doubtful one.
        # One that the disk has refused may look written already (`AreaStore.rollback`).
        self.backing.forget_cache()
        self.backing.write(copy * COPY_SIZE, data)
        self.backing.sync()
        # What is in a file without a name the next opening does not find: it is not recorded.
        self.backing.check_linked()


def is_state(path: Path) -> bool:
    """True if the file begins (or its second copy does) like a state file. False if unreadable."""
    try:
        with path.open("rb") as file:
            data = file.read(STATE_SIZE)
    except OSError:
        return False
    return any(data[at : at + len(_MAGIC)] == _MAGIC for at in (0, COPY_SIZE))


def inspect_state(path: Path) -> dict[str, Any]:
    """Both copies of a state file, JSON-ready, for `vsnapfs inspect`. OSError."""
    with path.open("rb") as file:
        data = file.read(STATE_SIZE)
    copies: list[dict[str, Any]] = []
    for at in (0, COPY_SIZE):
        copy = data[at : at + COPY_SIZE].ljust(COPY_SIZE, b"\0")
        owner = _HEAD.unpack_from(copy)[3]
        decoded = _decode(copy, owner)
        if decoded is None:
            copies.append({"offset": at, "valid": False})
            continue
        sequence, state = decoded
        fields = _fields(state)
        volume_id = str(uuid.UUID(bytes=owner))
        copies.append(
            {"offset": at, "valid": True, "volume_id": volume_id, "sequence": sequence} | fields
        )
    return {"path": str(path), "kind": "state", "format_version": _VERSION, "copies": copies}


def _fields(state: SavedState) -> dict[str, Any]:
    """The state as JSON has it."""
    ring_id, *place = state.ring
    return vars(state) | {
        "fault": state.fault.to_json() if state.fault else None,
        "ring": [ring_id.hex(), *place],
        "boot": state.boot.hex(),
    }


def _encode(state: SavedState, volume_id: bytes, sequence: int) -> bytes:
    fields = _fields(state)
    if not state.others_point:
        del fields["others_at"], fields["others_point"]
    if not state.spoilt:
        del fields["spoilt"]
    text = json.dumps(fields, ensure_ascii=False).encode("utf-8", "backslashreplace")
    if len(text) > _MAX_TEXT and state.fault:
        # Only the free text and the path can be long; the numbers must survive.
        fields["fault"] |= {
            "message": state.fault.message[:100],
            "diff_area": (state.fault.diff_area or "")[:200],
        }
        text = json.dumps(fields, ensure_ascii=False).encode("utf-8", "backslashreplace")
    buffer = bytearray(COPY_SIZE)
    _HEAD.pack_into(buffer, 0, _MAGIC, _VERSION, len(text), volume_id, sequence)
    buffer[_HEAD.size : _HEAD.size + len(text)] = text
    check = xxhash.xxh3_64_intdigest(memoryview(buffer)[:_CHECK_OFFSET])
    struct.pack_into("<Q", buffer, _CHECK_OFFSET, check)
    return bytes(buffer)


def _decode(data: bytes, volume_id: bytes) -> tuple[int, SavedState] | None:
    magic, version, length, owner, sequence = _HEAD.unpack_from(data)
    (check,) = struct.unpack_from("<Q", data, _CHECK_OFFSET)
    if (
        magic != _MAGIC
        or version != _VERSION
        or owner != volume_id
        or length > _MAX_TEXT
        or check != xxhash.xxh3_64_intdigest(data[:_CHECK_OFFSET])
    ):
        return None
    try:
        fields = json.loads(data[_HEAD.size : _HEAD.size + length])
        fields["fault"] = Fault.from_json(fields["fault"]) if fields["fault"] else None
        if "ring" in fields:
            ring_id, *place = fields["ring"]
            fields["ring"] = RingName(bytes.fromhex(ring_id), *place)
            fields["boot"] = bytes.fromhex(fields["boot"])
        state = SavedState(**fields)
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return (sequence, state) if sequence <= MAX_FOUND_COUNTER and _is_possible(state) else None


def _is_possible(state: SavedState) -> bool:
    """Whether the engine can work with these numbers: a right checksum does not make them right."""
    limits = {
        "given_up": MAX_POINT_NUMBER,
        "maximum": MAX_AREA_SIZE,
        "block_size": MAX_BLOCK_SIZE,
        "epoch": MAX_POINT_NUMBER,
        "generation": MAX_COUNTER,
        "others_at": MAX_COUNTER,
        "others_point": MAX_POINT_NUMBER,
        "spoilt": MAX_POINT_NUMBER,
    }
    values: dict[str, Any] = vars(state)
    numbers = {name: values[name] for name in limits}
    return (
        type(values["offline"]) is bool
        and all(type(value) is int and 0 <= value <= limits[n] for n, value in numbers.items())
        and (state.block_size == 0 or is_block_size(state.block_size))
        and len(state.boot) == len(state.ring.ring_id) == 16
        and all(type(part) is int and 0 <= part < 2**64 for part in state.ring[1:])
    )
