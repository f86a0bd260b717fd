"""What the guest tells the host, a line each, at once: a word and its JSON."""

from __future__ import annotations

import json
import os
import threading
from typing import Any

_LOCK = threading.Lock()


def report(word: str, **what: Any) -> None:
    """Tell the host. It has the line when this returns, even if the power fails next."""
    line = f"{word} {json.dumps(what)}\n".encode()
    with _LOCK:
        while line:
            line = line[os.write(1, line) :]
