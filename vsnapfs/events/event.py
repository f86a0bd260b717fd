"""One event, and the one line of JSON that it is in the log file.

Owns `Level`, `Event` and the line format. Promises that every line that was written whole is read
back as an equal event, that a line holds no raw line break or terminal control whatever a label
contains, and that reading never raises on rubbish. Leaves meaning to `catalog`, files to `log`.
"""

from __future__ import annotations

import json
import math
import operator
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

# Bounds on what one event may hold, so that no label or list eats the space kept for the log.
_MAX_TEXT = 2048  # characters of one string
_MAX_ITEMS = 1024  # entries of one list or mapping; a volume has up to 512 points
_MAX_NESTED = 8192  # characters of a list or mapping as JSON
_MAX_DEPTH = 3  # lists within lists

_END_OF_TIME = 253_402_300_800_000_000_000  # ns; the first instant of the year 10000

# What a terminal, or the reader of one line, could be misled by: DEL and C1 controls, lone
# surrogates (file names that are not UTF-8), line separators, marks that turn the direction of
# writing around, invisible marks, non-characters. All legal within JSON strings.
UNSAFE = (
    "\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\uffff\ud800-\udfff"
)
_UNSAFE_IN_JSON = re.compile(f"[{UNSAFE}]")


class Level(StrEnum):
    """How bad it is, in Windows' words."""

    ERROR = "Error"
    WARNING = "Warning"
    INFORMATION = "Information"

    @property
    def number(self) -> int:
        """The number that Windows event XML has for it."""
        return {Level.ERROR: 2, Level.WARNING: 3, Level.INFORMATION: 4}[self]


@dataclass(frozen=True)
class Event:
    """Something that happened to a volume.

    time_ns: nanoseconds since the epoch, UTC. params: what the sentence is made from, plain JSON
    values by name; which there are depends on source and id, and each may be missing.
    """

    time_ns: int
    source: str
    event_id: int
    level: Level
    params: Mapping[str, Any] = field(default_factory=dict)

    @property
    def time(self) -> str:
        """UTC, ISO 8601 with microseconds: 2026-11-22T07:20:00.000000Z."""
        seconds, rest = divmod(self.time_ns, 1_000_000_000)
        moment = datetime.fromtimestamp(seconds, tz=UTC).replace(microsecond=rest // 1000)
        return moment.replace(tzinfo=None).isoformat(timespec="microseconds") + "Z"

    def to_line(self) -> bytes:
        """The event as one line of UTF-8 JSON, line feed included."""
        record = {
            "time": self.time,
            "time_ns": self.time_ns,
            "source": self.source,
            "event_id": self.event_id,
            "level": self.level.value,
            "params": dict(self.params),
        }
        return dump_json(record).encode() + b"\n"

    @classmethod
    def from_line(cls, line: bytes) -> Event | None:
        """The inverse of `to_line`; None when the line is torn, rotted or foreign."""
        try:
            data = json.loads(line)
        except (ValueError, RecursionError):
            return None
        if not isinstance(data, dict):
            return None
        time_ns, source, event_id = data.get("time_ns"), data.get("source"), data.get("event_id")
        level, params = data.get("level"), data.get("params", {})
        if (
            type(time_ns) is not int
            or not 0 <= time_ns < _END_OF_TIME
            or type(event_id) is not int
            or not isinstance(source, str)
            or not isinstance(params, dict)
            or level not in list(Level)
        ):
            return None
        return cls(time_ns, source, event_id, Level(level), plain_params(params))


def dump_json(value: Any) -> str:
    """`value` as JSON on one line; other scripts stay readable, nothing in it is a control."""
    text = json.dumps(value, ensure_ascii=False, separators=(", ", ": "))
    # Outside strings JSON is ASCII, so whatever matches stands in a string and may be escaped.
    return _UNSAFE_IN_JSON.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def plain_params(params: Mapping[str, Any]) -> dict[str, Any]:
    """`params` as JSON can hold them; None means missing and is left out."""
    kept = {}
    for name, given in list(params.items())[:_MAX_ITEMS]:
        value = _plain(given, 0)
        if isinstance(value, (list, dict)) and len(text := dump_json(value)) > _MAX_NESTED:
            value = _cut(text)
        if value is not None:
            kept[_cut(str(name))] = value
    return kept


def _plain(value: Any, depth: int) -> Any:
    """A JSON value for anything the engine may pass: numpy numbers, paths, errors, enums, …"""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return int(value) if value.bit_length() <= 128 else _cut(hex(value))
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(value)
    if isinstance(value, str):
        return _cut(str.__str__(value))
    if isinstance(value, (bytes, bytearray, os.PathLike)):
        raw = bytes(value) if isinstance(value, bytearray) else value
        return _cut(os.fsdecode(raw))
    if depth < _MAX_DEPTH:
        if isinstance(value, Mapping):
            pairs = list(value.items())[:_MAX_ITEMS]
            return {_cut(str(key)): _plain(item, depth + 1) for key, item in pairs}
        if isinstance(value, (list, tuple, set, frozenset)):
            return [_plain(item, depth + 1) for item in list(value)[:_MAX_ITEMS]]
    try:
        return operator.index(value)
    except TypeError:
        pass
    try:
        return _cut(str(value) or type(value).__name__)
    except Exception:  # noqa: BLE001 - one odd value must not cost the event
        return type(value).__name__


def _cut(text: str) -> str:
    return text if len(text) <= _MAX_TEXT else text[: _MAX_TEXT - 1] + "…"
