"""stdin, stdout and stderr, whatever their encoding: set once, before anything is written.

Promises that no text that we show, from whatever disk or in whatever language, can fail to be
written: a character that the encoding lacks is spelled out, the usual typographic ones in ASCII and
all others in hexadecimal; that nothing typed can fail to be read; and that the descriptors 0, 1 and
2 are what they are everywhere: were one of them closed, the next file to be opened would get its
number, and be it the replica, what somebody prints would go into it.

Leaves it to `output` to keep JSON and XML what they are, which escape in ways of their own.
"""

from __future__ import annotations

import codecs
import io
import os
import string
import sys

_HANDLER = "vsnapfs"
# What our own sentences and rich use. The rest of the world is spelled out.
_IN_ASCII = str.maketrans(
    {
        "‘": "'", "’": "'", "“": '"', "”": '"', "…": "...", "–": "-", "—": "-", "·": "-",
        "→": "->", "←": "<-", "≤": "<=", "≥": ">=", "×": "x", "µ": "u", "✔": "OK:", "✘": "NO:",
        "─": "-", "━": "-", "•": "*", "\u00a0": " ",
    }
)  # fmt: skip


def prepare() -> None:
    """Make the three streams of this process fit for any text."""
    _fill_gaps()
    codecs.register_error(_HANDLER, _spelled_out)
    for stream in (sys.stdout, sys.stderr):
        # Something else where a test has put it.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=_HANDLER)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")


def _fill_gaps() -> None:
    """Open what is closed (`>&-`) on /dev/null, for children, too. Lowest first, as open does."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    # Python has none of its own then.
    sys.stdin = sys.stdin or open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stdout = sys.stdout or open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115


def carried(text: str) -> str:
    """`text` as stdout will show it: to be measured before it is put into columns."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return "".join(
        character if _has(encoding, character) else _in_ascii(character) for character in text
    )


def for_programs() -> None:
    """JSON or XML comes next: both are UTF-8 unless they say otherwise, so stdout must at least
    have ASCII as it is (UTF-16 has not).
    """
    if isinstance(sys.stdout, io.TextIOWrapper) and not _keeps_ascii(sys.stdout.encoding):
        sys.stdout.reconfigure(encoding="utf-8")


def _keeps_ascii(encoding: str) -> bool:
    text = string.printable
    return _has(encoding, text) and text.encode(encoding) == text.encode("ascii")


def is_utf8() -> bool:
    """Whether what is written to stdout comes out as UTF-8."""
    name = getattr(sys.stdout, "encoding", None) or "utf-8"
    return codecs.lookup(name).name == "utf-8"


def can_show(text: str) -> bool:
    """Whether stdout's encoding has all characters of `text`."""
    return _has(getattr(sys.stdout, "encoding", None) or "utf-8", text)


def _has(encoding: str, text: str) -> bool:
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return False
    return True


def _in_ascii(text: str) -> str:
    return text.translate(_IN_ASCII).encode("ascii", "backslashreplace").decode("ascii")


def _spelled_out(error: UnicodeError) -> tuple[str | bytes, int]:
    assert isinstance(error, UnicodeEncodeError)
    return _in_ascii(error.object[error.start : error.end]), error.end


def write_names(text: str) -> None:
    """Write names for a program: the very bytes that they are on the disk, not something readable.

    What no name on this system can have (a label, in another encoding) is spelled out.
    """
    encoding = sys.getfilesystemencoding()
    parts = (
        os.fsencode(character) if _is_a_name(character) else _in_ascii(character).encode(encoding)
        for character in text
    )
    sys.stdout.flush()
    sys.stdout.buffer.write(b"".join(parts))
    sys.stdout.buffer.flush()


def _is_a_name(text: str) -> bool:
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        return False
    return True
