"""Sizes: what people write is what they get, or a clear refusal."""

from __future__ import annotations

import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from vsnapfs.errors import UsageError
from vsnapfs.units import MAX_SIZE, format_both, format_exact, format_size, parse_size

KIB, MIB, GIB, TIB, PIB, EIB = (1024**power for power in range(1, 7))
sizes = st.integers(0, MAX_SIZE) | st.sampled_from(
    [unit * n + delta for unit in (1, KIB, MIB, GIB, EIB) for n in (1, 7) for delta in (-1, 0, 1)]
)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("0GiB", 0),
        ("4096", 4096),
        ("4096B", 4096),
        ("4096 b", 4096),
        ("1K", KIB),
        ("64k", 64 * KIB),
        ("64Ki", 64 * KIB),
        ("64kib", 64 * KIB),
        ("64KB", 64_000),
        ("3M", 3 * MIB),
        ("3mb", 3_000_000),
        ("10GiB", 10 * GIB),
        ("10 GiB", 10 * GIB),
        ("  10\tgIb \n", 10 * GIB),
        ("\u300010GiB\u00a0", 10 * GIB),  # pasted from a Japanese page
        ("10GB", 10**10),
        ("10G", 10 * GIB),
        ("15TiB", 15 * TIB),
        ("2P", 2 * PIB),
        ("7EiB", 7 * EIB),
        ("9EB", 9 * 10**18),
        ("007K", 7 * KIB),
        ("1.5 GiB", 3 * GIB // 2),
        (".5KiB", 512),
        ("1.000", 1),
        ("0.1GiB", 107_374_182),  # 107374182.4: down, never more than was asked for
        ("0.3KB", 300),  # 0.3 is no float here
        ("1.1KB", 1100),
        (str(MAX_SIZE), MAX_SIZE),
        ("8388607TiB", 8388607 * TIB),
    ],
)
def test_sizes_are_read_as_people_mean_them(text: str, size: int) -> None:
    """Binary and decimal units, any case, fractions and spaces give the exact number of bytes."""
    assert parse_size(text) == size


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty"),
        (" \t\n", "empty"),
        ("-1", "negative"),
        ("-5GiB", "negative"),
        (" -0 ", "negative"),
        ("+5GiB", "plus sign"),
        ("9223372036854775808", "too large"),
        ("8EiB", "too large"),
        ("9999999T", "too large"),
        ("9.9e99", "not a size"),
        ("1e9", "not a size"),
        ("10 GiBs", "unknown unit"),
        ("10X", "unknown unit"),
        ("1BK", "unknown unit"),
        ("9" * 5000, "too long"),
        ("1." + "0" * 5000 + "1G", "too long"),
        ("inf", "not a size"),
        ("nan", "not a size"),
        ("Infinity", "not a size"),
        ("GiB", "not a size"),
        (".", "not a size"),
        ("1.", "not a size"),
        ("1.GiB", "not a size"),
        ("1.5.5G", "not a size"),
        ("1,5GiB", "not a size"),
        ("1,000,000", "not a size"),
        ("1_000", "not a size"),
        ("0x1000", "not a size"),
        ("10 0", "not a size"),
        ("１０GiB", "not a size"),  # full-width digits
        ("٣GiB", "not a size"),  # Arabic-Indic three
        ("²G", "not a size"),
        ("10ＧｉＢ", "not a size"),
        ("10\u212aiB", "not a size"),  # the Kelvin sign lower-cases to k
        ("10G\0", "not a size"),
        ("\x1b[31m10G", "not a size"),
        ("\udcff", "not a size"),
        ("1.5", "whole number of bytes"),
        ("0.5B", "whole number of bytes"),
        ("0.0001K", "whole number of bytes"),  # rounded down it would be nothing
    ],
)
def test_what_is_no_size_is_refused_with_an_example(text: str, message: str) -> None:
    """Exit code 2, a sentence that says what is wrong, a hint, and nothing unsafe to print."""
    with pytest.raises(UsageError) as caught:
        parse_size(text)
    error = caught.value
    assert message in error.message
    assert error.exit_code == 2
    assert error.code == "bad-size"
    assert re.search(r"10GiB|8 EiB", error.hint)
    assert (error.message + error.hint).isprintable()
    assert len(error.message) < 200


def test_the_usual_slips_get_their_own_hint() -> None:
    """A comma, foreign digits and an increment are explained, not just refused."""
    hints = {}
    for text in ("1,5G", "１０G", "+5G", "x"):
        with pytest.raises(UsageError) as caught:
            parse_size(text)
        hints[text] = caught.value.hint
    assert "separators" in hints["1,5G"]
    assert "0 to 9" in hints["１０G"]
    assert "total" in hints["+5G"]
    assert len(set(hints.values())) == 4


@given(st.text(max_size=80))
@example("1" * 64)
def test_no_text_crashes_the_parser(text: str) -> None:
    """Any text is either a size within bounds or a UsageError."""
    try:
        size = parse_size(text)
    except UsageError:
        return
    assert 0 <= size <= MAX_SIZE


@given(sizes)
def test_the_exact_form_is_read_back_as_the_same_number(size: int) -> None:
    """format_exact and parse_size are inverse, with and without a space, in any case."""
    shown = format_exact(size)
    assert parse_size(shown) == size
    assert parse_size(shown.lower()) == size
    assert parse_size(re.sub(r"(\d)([A-Z])", r"\1 \2", shown)) == size


@given(st.integers(0, 10**6), st.integers(0, 999), st.sampled_from("KMGT"))
def test_fractions_are_rounded_down_by_less_than_a_byte(whole: int, part: int, unit: str) -> None:
    """The size never exceeds what was written, and falls short by less than one byte."""
    text = f"{whole}.{part:03}{unit}"
    factor = 1024 ** ("KMGT".index(unit) + 1)
    exact_thousandths = (whole * 1000 + part) * factor
    assert 0 <= exact_thousandths - parse_size(text) * 1000 < 1000


@pytest.mark.parametrize(
    ("size", "rounded", "exact", "both"),
    [
        (0, "0 B", "0", "0 bytes"),
        (1023, "1023 B", "1023", "1,023 bytes"),
        (1024, "1.0 KiB", "1KiB", "1.0 KiB (1,024 bytes)"),
        (1536, "1.5 KiB", "1536", "1.5 KiB (1,536 bytes)"),
        (MIB - 1, "1.0 MiB", "1048575", "1.0 MiB (1,048,575 bytes)"),  # not "1024.0 KiB"
        (10 * GIB, "10.0 GiB", "10GiB", "10.0 GiB (10,737,418,240 bytes)"),
        (10 * GIB + 1, "10.0 GiB", "10737418241", "10.0 GiB (10,737,418,241 bytes)"),
        (1536 * KIB, "1.5 MiB", "1536KiB", "1.5 MiB (1,572,864 bytes)"),
        (MAX_SIZE, "8.0 EiB", str(MAX_SIZE), f"8.0 EiB ({MAX_SIZE:,} bytes)"),
        (-2048, "-2.0 KiB", "-2KiB", "-2.0 KiB (-2,048 bytes)"),
    ],
)
def test_sizes_are_shown_rounded_exact_or_both(
    size: int, rounded: str, exact: str, both: str
) -> None:
    """The table form rounds, the command form never does, the sentence form has both."""
    assert (format_size(size), format_exact(size), format_both(size)) == (rounded, exact, both)


def test_the_word_for_bytes_can_be_another_language() -> None:
    """Events in Japanese say バイト."""
    assert format_both(2048, "バイト") == "2.0 KiB (2,048 バイト)"
    assert format_both(5, "バイト") == "5 バイト"


@given(sizes)
def test_the_rounded_form_is_within_half_a_tenth(size: int) -> None:
    """What a table shows is off by at most 0.05 of the unit it names, below 1024 of it."""
    number, unit = format_size(size).split()
    factor = 1 if unit == "B" else 1024 ** ("KMGTPE".index(unit[0]) + 1)
    tenths = int(number.replace(".", "")) if "." in number else int(number) * 10
    assert abs(tenths * factor - size * 10) * 2 <= factor
    assert tenths < 10240


@given(sizes, sizes)
def test_the_rounded_form_keeps_the_order(first: int, second: int) -> None:
    """A smaller size is never shown as a larger one."""
    low, high = sorted((first, second))
    assert parse_or_bytes(format_size(low)) <= parse_or_bytes(format_size(high))


def parse_or_bytes(shown: str) -> int:
    """A rounded size as bytes; "8.0 EiB" is the one that parse_size rightly refuses."""
    return 2**63 if shown == "8.0 EiB" else parse_size(shown)
