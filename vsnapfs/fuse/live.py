"""The contents of status.json and events.log, as they are at this moment.

Promises: status.json is one whole, valid JSON object for each opening, however it is read;
events.log only grows while mounted, and rendering costs only the events that are new. Of a long
history it starts with the newest events and says so: a mount must not wait for years of log.

Leaves the status' keys to those who make it, and an event's sentence to `events`.
"""

from __future__ import annotations

import json
import logging
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vsnapfs.config import shown
from vsnapfs.errors import VsnapError
from vsnapfs.events import Event, render_text

if TYPE_CHECKING:
    from vsnapfs.volume import Volume

_logger = logging.getLogger("vsnapfs.fuse")

KEPT_EVENTS = 5000
"""How many events from before the mount events.log shows; about 50 µs and 600 bytes each."""


class Snapshot:
    """An open status.json: the bytes as they were when it was opened."""

    def __init__(self, content: bytes) -> None:
        self.content = content

    async def read(self, offset: int, length: int) -> bytes:
        """The bytes from `offset`; fewer or none at the end."""
        return self.content[offset : offset + length]

    async def flush(self) -> None:
        """Nothing to flush."""

    def close(self) -> None:
        """Nothing to close."""


class StatusFile:
    """status.json. status: called for each opening; a dict for JSON."""

    def __init__(self, status: Callable[[], dict[str, Any]]) -> None:
        self._status = status

    def open(self) -> Snapshot:
        """The status of this moment, to be read at leisure."""
        return Snapshot(self.render())

    def render(self) -> bytes:
        """The status as UTF-8 JSON with a final newline."""
        text = json.dumps(self._status(), indent=2, ensure_ascii=True)
        return text.encode("ascii") + b"\n"


class EventsFile:
    """events.log of a volume: one line of text an event, rendered once."""

    def __init__(self, volume: Volume, lang: str) -> None:
        self._lang = lang
        self._text = bytearray()
        self.changed_ns = time.time_ns()
        # Filled by whoever logs, which may be a worker thread (append is atomic), and emptied
        # by the handlers, so that rendering is never done under the hands of the writer.
        self._pending: deque[Event] = deque()
        try:
            earlier = volume.log.events()
            if len(earlier) > KEPT_EVENTS:
                left_out = len(earlier) - KEPT_EVENTS
                line = f"# {left_out} earlier events: vsnapfs events {shown(volume.directory)}\n"
                self._text += line.encode("utf-8", "backslashreplace")
            self._pending.extend(earlier[-KEPT_EVENTS:])
        except VsnapError as error:  # a log that cannot be read must not keep a volume down
            _logger.warning("events.log shows no earlier events: %s", error)
        volume.log.subscribe(self._pending.append)
        self._catch_up()

    def _catch_up(self) -> None:
        if not self._pending:
            return
        while self._pending:
            line = render_text(self._pending.popleft(), self._lang)
            self._text += line.rstrip("\n").encode("utf-8", "backslashreplace") + b"\n"
        self.changed_ns = time.time_ns()

    def size(self) -> int:
        """Length in bytes."""
        self._catch_up()
        return len(self._text)

    async def read(self, offset: int, length: int) -> bytes:
        """The bytes from `offset` as of now; fewer or none at the end."""
        self._catch_up()
        return bytes(self._text[offset : offset + length])

    async def flush(self) -> None:
        """Nothing to flush."""

    def close(self) -> None:
        """Nothing to close: every opening shares this object."""
