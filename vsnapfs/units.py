"""Sizes as people write and read them.

Owns the grammar of a size ("10GiB", "1.5 TiB", "10GB", "4096") and the three ways one is shown:
rounded for tables, exact for commands, and both at once for events. Promises that whatever
`format_exact` prints, `parse_size` reads back as the same number, and that nothing unparsable,
negative or absurd gets through. Leaves to callers whether zero is a useful size.
"""

from __future__ import annotations

import re
from fractions import Fraction

from vsnapfs.errors import UsageError

MAX_SIZE = 2**63 - 1
"""The largest size there can be: the largest offset the kernel knows (bytes)."""

_PREFIXES = "KMGTPE"
_BINARY = {prefix: 1024**power for power, prefix in enumerate(_PREFIXES, 1)}
_DECIMAL = {prefix: 1000**power for power, prefix in enumerate(_PREFIXES, 1)}

# A bare K, M, G means the binary unit, as in dd, fallocate and truncate.
_UNITS: dict[str, int] = (
    {"": 1, "B": 1}
    | _BINARY
    | {f"{prefix}I": factor for prefix, factor in _BINARY.items()}
    | {f"{prefix}IB": factor for prefix, factor in _BINARY.items()}
    | {f"{prefix}B": factor for prefix, factor in _DECIMAL.items()}
)

# [0-9], not \d: the latter also matches digits of other scripts.
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?|\.[0-9]+)[ \t]*([A-Za-z]*)")
_EXAMPLE = "Write it like 10GiB, 1.5 TiB, 512M or 10737418240."
_LONGEST = 64  # characters; far more than any sensible size needs, far less than int() minds


def parse_size(text: str) -> int:
    """The number of bytes that `text` names, 0 to 2^63-1.

    KiB, MiB, … (also K, M, … alone, and Ki, Mi, …) are powers of 1024; KB, MB, … are powers of
    1000. Upper and lower case are the same, spaces may stand before the unit. A fraction of a
    unit is rounded down to whole bytes; a fraction of a byte is not a size.

    Raises UsageError, with an example, when `text` is no size, negative or 2^63 and more.
    """
    shown = _quote(text)
    stripped = text.strip()
    if not stripped:
        raise UsageError("The size is empty.", hint=_EXAMPLE, code="bad-size")
    if len(stripped) > _LONGEST:
        raise UsageError(f"{shown} is too long for a size.", hint=_EXAMPLE, code="bad-size")
    if stripped.startswith("-"):
        raise UsageError(f"The size {shown} is negative.", hint=_EXAMPLE, code="bad-size")
    if stripped.startswith("+"):
        raise UsageError(
            f"The size {shown} starts with a plus sign.",
            hint=f"Give the total size, not what is to be added. {_EXAMPLE}",
            code="bad-size",
        )
    match = _SIZE.fullmatch(stripped)
    if match is None:
        raise UsageError(f"{shown} is not a size.", hint=_why_not(stripped), code="bad-size")
    number, unit = match.groups()
    factor = _UNITS.get(unit.upper())
    if factor is None:
        raise UsageError(
            f"{shown} has an unknown unit, {_quote(unit)}.",
            hint=f"Units are B, KiB, MiB, GiB, TiB, PiB, EiB and KB, MB, GB, …. {_EXAMPLE}",
            code="bad-size",
        )
    exact = Fraction(number) * factor
    size = int(exact)
    if exact != size and (factor == 1 or size == 0):
        raise UsageError(
            f"The size {shown} is not a whole number of bytes.", hint=_EXAMPLE, code="bad-size"
        )
    if size > MAX_SIZE:
        raise UsageError(
            f"The size {shown} is too large.",
            hint=f"The largest size is {MAX_SIZE} bytes, one byte less than 8 EiB.",
            code="bad-size",
        )
    return size


def format_size(size: int) -> str:
    """Rounded to one decimal, for tables: "512 B", "10.0 GiB". Any integer, negative too."""
    if size < 0:
        return f"-{format_size(-size)}"
    if size < 1024:
        return f"{size} B"
    # Integers all the way: a float would round 2^63-1 before the division does.
    for prefix, factor in _BINARY.items():
        tenths = (size * 10 + factor // 2) // factor
        if tenths < 10240 or prefix == _PREFIXES[-1]:
            break
    return f"{tenths // 10}.{tenths % 10} {prefix}iB"


def format_exact(size: int) -> str:
    """Without loss, for commands and files: "10GiB" if it is a multiple, else "10737418241"."""
    for prefix, factor in reversed(_BINARY.items()):
        if size and size % factor == 0:
            return f"{size // factor}{prefix}iB"
    return str(size)


def format_both(size: int, bytes_word: str = "bytes") -> str:
    """Rounded and exact, for sentences: "9.5 GiB (10,200,547,328 bytes)", "512 bytes"."""
    exact = f"{size:,} {bytes_word}"
    return exact if abs(size) < 1024 else f"{format_size(size)} ({exact})"


def _quote(text: str) -> str:
    """`text` in quotes, harmless on a terminal and not endless."""
    shown = text if len(text) <= _LONGEST else text[:_LONGEST] + "…"
    return repr(shown)


def _why_not(text: str) -> str:
    """A hint for the usual slips."""
    if not text.isascii() and any(char.isdigit() for char in text):
        return f"Use the digits 0 to 9. {_EXAMPLE}"
    if "," in text or "_" in text:
        return f"Write digits without separators, and a point for fractions. {_EXAMPLE}"
    return _EXAMPLE
