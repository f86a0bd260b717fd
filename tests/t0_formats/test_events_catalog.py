"""Which events there are, and that they read well in both languages whatever is unknown."""

from __future__ import annotations

import json
import re
from typing import Any
from xml.etree import ElementTree as ET

import pytest
from event_samples import FULL, WHEN, entries, event, languages

from vsnapfs.errors import FaultCode, UsageError
from vsnapfs.events import (
    CATALOG,
    LANGUAGES,
    Entry,
    Event,
    Level,
    channel,
    lookup,
    render_json,
    render_message,
    render_text,
    render_xml,
    sentences_en,
    sentences_ja,
)
from vsnapfs.events.template import Group, Hole, Template, fill, parse
from vsnapfs.events.wording import _values

# --- the catalog -------------------------------------------------------------------------------


def test_the_catalog_has_every_event_with_its_real_level() -> None:
    """Ids and levels are those of Windows, and as the catalog says for our own source."""
    found: dict[tuple[str, str], set[int]] = {}
    for entry in CATALOG.values():
        found.setdefault((str(entry.source), str(entry.level)), set()).add(entry.event_id)
    assert found == {
        ("volsnap", "Error"): {8, 14, 25, 35, 36, *range(80, 95)},
        ("volsnap", "Warning"): {24, 38, 61},
        ("volsnap", "Information"): {33, 58, 64, 65, 66},
        ("Microsoft-Windows-Ntfs", "Warning"): {140},
        ("Microsoft-Windows-Ntfs", "Information"): {98},
        ("Ntfs", "Warning"): {50, 57},
        ("Ntfs", "Error"): {137},
        ("vsnapfs", "Error"): {1040, 1043, 1044, 1045, 1050, 1060, 1090},
        ("vsnapfs", "Warning"): {
            1022,
            1041,
            1042,
            1047,
            1048,
            1049,
            1051,
            1052,
            1053,
            1054,
            1055,
            1091,
        },
        ("vsnapfs", "Information"): {1000, 1001, 1002, 1010, 1011, 1020, 1021, 1023, 1030},
    }


def test_every_fault_has_its_event() -> None:
    """Each of the fifteen faults is reported by an Error of volsnap."""
    for code in FaultCode:
        entry = lookup("volsnap", code.event_id)
        assert entry is not None
        assert entry.level is Level.ERROR


def test_the_languages_cover_the_same_events_with_the_same_phrases() -> None:
    """No entry and no phrase exists in one language only."""
    en, ja = sentences_en, sentences_ja
    assert list(en.SENTENCES) == list(ja.SENTENCES)
    assert set(en.SENTENCES) == set(CATALOG)
    assert set(en.COUNTED) == set(ja.COUNTED)
    assert set(en.LISTED) == set(ja.LISTED)
    assert set(en.SIZES) == set(ja.SIZES)
    assert set(en.PHRASES) - set(ja.PHRASES) == {"The_volume", "The_area", "The_point"}
    assert set(en.LEVELS) == set(ja.LEVELS) == {str(level) for level in Level}


def test_sources_write_to_the_channels_windows_has_for_them() -> None:
    """The drivers of Windows, volsnap and Ntfs, write to System, what is ours to Application."""
    assert channel("volsnap") == channel("Ntfs") == channel("Microsoft-Windows-Ntfs") == "System"
    assert channel("vsnapfs") == "Application"


@entries
def test_both_languages_use_the_same_params(entry: Entry) -> None:
    """Neither language keeps a fact from its readers that the other one tells."""
    used = {}
    for lang, module in (("en", sentences_en), ("ja", sentences_ja)):
        names = all_names(parse(module.SENTENCES[entry.key]))
        used[lang] = {name.lower() for name in names} - {"volume"}
    # {the_volume} and a bare {volume} tell the same.
    assert used["en"] - {"the_volume"} == used["ja"] - {"the_volume"}


# --- sentences ---------------------------------------------------------------------------------


def all_names(template: Template) -> set[str]:
    names: set[str] = set()
    for part in template:
        if isinstance(part, Hole):
            names.add(part.name)
        elif isinstance(part, Group):
            names |= all_names(part.text) | all_names(part.otherwise)
    return names


def bare_names(template: Template) -> set[str]:
    """The names that are not optional: those outside brackets and directly in an `else`."""
    names: set[str] = set()
    for part in template:
        if isinstance(part, Hole):
            names.add(part.name)
        elif isinstance(part, Group):
            names |= bare_names(tuple(p for p in part.text if isinstance(p, Group)))
            names |= bare_names(part.otherwise)
    return names


@entries
@languages
def test_a_sentence_needs_nothing_that_can_be_missing(entry: Entry, lang: str) -> None:
    """Whatever stands outside brackets has a value even when no param is known."""
    module = {"en": sentences_en, "ja": sentences_ja}[lang]
    known = _values(event(entry, FULL), module)
    always = {name for name, value in _values(event(entry, {}), module).items() if value}
    template = parse(module.SENTENCES[entry.key])
    assert bare_names(template) <= always
    assert all_names(template) <= set(known), "a name that nothing gives a value"


def check_reads_well(text: str, lang: str) -> None:
    assert text == text.strip()
    assert text.isprintable()
    for mistake in ("  ", " .", " ,", " :", "..", "None", "{", "}", "()", "[]", "``", "“”", "「」"):
        assert mistake not in text, (mistake, text)
    for mistake in (" 。", " 、", "。。", "、。", "。、", ": 。", ":。", ". .", ": ."):
        assert mistake not in text, (mistake, text)
    assert text.count("(") == text.count(")")
    if lang == "en":
        assert text.endswith(".")
        assert text[0].isupper() or text.startswith("vsnapfs")
        assert text.isascii() or "夜間" in text
        for start in re.findall(r"\. (\w)", text):
            assert not start.islower(), text
    else:
        assert text.endswith("。")


@entries
@languages
def test_sentences_read_well_whatever_is_missing(entry: Entry, lang: str) -> None:
    """With all params, with none, with any one only, with any one missing: whole sentences."""
    cases = [FULL, {}]
    cases += [{name: value} for name, value in FULL.items()]
    cases += [{k: v for k, v in FULL.items() if k != name} for name in FULL]
    cases += [{**FULL, "points": 3}, {**FULL, "points": 1, "dropped": 1, "needed": 1}]
    cases += [{**FULL, "points": [4], "dropped": [4]}, {**FULL, "repeats": 1}]
    for params in cases:
        text = render_message(event(entry, params), lang)
        check_reads_well(text, lang)
        if lang == "ja" and entry.event_id != 1091:  # whose words are the program's own
            assert re.search("[ぁ-ん]", text)


@languages
def test_many_points_are_listed_by_runs(lang: str) -> None:
    """All 512 points of a volume take a few characters, and none is left out."""
    given_up = event(CATALOG["vsnapfs", 1022], {"points": [1, *range(3, 515), 600, 601]})
    separator = {"en": ", ", "ja": "、"}[lang]
    assert separator.join(["1", "3-514", "600-601"]) in render_message(given_up, lang)
    one = event(CATALOG["volsnap", 35], {"point": 7, "label": "夜間"})
    words = {"en": "gave up recovery point 7 “夜間”:", "ja": "回復ポイント 7「夜間」を破棄"}
    assert words[lang] in render_message(one, lang)


@entries
@languages
def test_none_is_the_same_as_missing(entry: Entry, lang: str) -> None:
    """A param that is None leaves no trace in the sentence."""
    nothing = dict.fromkeys(FULL)
    assert render_message(event(entry, nothing), lang) == render_message(event(entry, {}), lang)


@languages
@pytest.mark.parametrize("code", FaultCode)
def test_a_fault_names_everything_windows_leaves_out(code: FaultCode, lang: str) -> None:
    """Volume, diff area, the three sizes rounded and exact, block, write, cause, what to do."""
    entry = CATALOG["volsnap", code.event_id]
    text = render_message(event(entry, FULL | {"maximum": 10 * 1024**3}), lang)
    unit = {"en": "bytes", "ja": "バイト"}[lang]
    for fact in (
        "/srv/vol1",
        "/disk2/diff-area",
        f"63.9 MiB (67,000,000 {unit})",
        f"64.0 MiB (67,108,864 {unit})",
        f"10.0 GiB (10,737,418,240 {unit})",
        "196,608",
        f"4.0 KiB (4,096 {unit})",
        "ENOSPC",
        "the copy could not be made",
    ):
        assert fact in text, fact
    assert re.search(r"(block|ブロック) 12\b", text)
    if code is not FaultCode.DIFF_AREA_MISSING:  # that one clears itself
        assert "`vsnapfs online /srv/vol1" in text


COMMANDS = {
    "vsnapfs online",
    "vsnapfs online --give-up-recovery-points",
    "vsnapfs resize --diff-area-size",
    "vsnapfs verify",
}


@entries
def test_advice_names_commands_that_exist_and_quotes_the_volume(entry: Entry) -> None:
    """A command in a sentence can be pasted into a shell, in every language the same."""
    params = FULL | {"volume": "/srv/my vol; rm"}
    found = {}
    for lang in LANGUAGES:
        commands = re.findall(r"`([^`]*)`", render_message(event(entry, params), lang))
        plain = []
        for command in commands:
            assert "'/srv/my vol; rm'" in command
            words = command.replace("'/srv/my vol; rm'", "").split()
            plain.append(" ".join(word for word in words if re.match(r"[a-z-]", word)))
        found[lang] = plain
    assert found["en"] == found["ja"]
    assert set(found["en"]) <= COMMANDS


def test_the_event_for_a_full_diff_area_word_for_word() -> None:
    """The event people will meet most, as they meet it."""
    params = {name: FULL[name] for name in ("volume", "diff_area", "used", "allocated", "maximum")}
    params |= {"block": 12, "offset": 196_608, "length": 4096, "needed": 1, "errno": 28}
    full = event(CATALOG["volsnap", 87], params)
    assert render_message(full, "en") == (
        "Volume /srv/vol1 went offline to protect its recovery points: the diff area"
        " /disk2/diff-area is full, so a block about to be overwritten could not be preserved."
        " Sizes: used 63.9 MiB (67,000,000 bytes), allocated 64.0 MiB (67,108,864 bytes), maximum"
        " 64.0 MiB (67,108,864 bytes). Request: block 12, hit by a write of 4.0 KiB (4,096 bytes)"
        " at byte 196,608; 1 block was still to be preserved. Cause: ENOSPC, No space left on"
        " device. All recovery points are kept and can still be read and exported. Give it a"
        " larger total with `vsnapfs resize /srv/vol1 --diff-area-size TOTAL` (the new total, not"
        " what is added) or delete a recovery point, then run `vsnapfs online /srv/vol1`."
    )
    assert render_message(full, "ja") == (
        "回復ポイントを守るため、ボリューム /srv/vol1 はオフラインになりました。差分領域"
        " /disk2/diff-area が一杯で、上書きされるブロックを退避できませんでした。容量: 使用 63.9"
        " MiB (67,000,000 バイト)、割り当て済み 64.0 MiB (67,108,864 バイト)、最大 64.0 MiB"
        " (67,108,864 バイト)。対象: ブロック 12 (書き込み: バイト位置 196,608 から 4.0 KiB"
        " (4,096 バイト))。退避が必要なブロックはあと 1 個ありました。原因: ENOSPC、デバイスに空き"
        "領域がありません。回復ポイントはすべて保たれており、引き続き読み取りとエクスポートができ"
        "ます。`vsnapfs resize /srv/vol1 --diff-area-size 合計サイズ` で拡張する (追加分ではなく"
        "拡張後の合計を指定) か、回復ポイントを削除してから、`vsnapfs online /srv/vol1` を実行して"
        "ください。"
    )


@pytest.mark.parametrize(
    ("params", "cause"),
    [
        ({"errno": 5}, "Cause: EIO, Input/output error."),
        ({"errno": 5, "reason": "bad sector."}, "Cause: bad sector (EIO, Input/output error)."),
        ({"errno": 5, "reason": "[Errno 5] Input/output error"}, "error (EIO)."),
        ({"errno": 9999}, "Cause: errno 9999."),
        ({"reason": "bad sector"}, "Cause: bad sector."),
    ],
)
def test_causes_are_told_once_and_by_name(params: dict[str, Any], cause: str) -> None:
    """An errno has its name and meaning, which a reason that says the same does not repeat."""
    assert cause in render_message(event(CATALOG["volsnap", 86], params), "en")


def test_an_errno_that_is_none_is_left_out() -> None:
    """Zero is no error and an odd type no errno."""
    for number in (0, -1, "x", True, [5]):
        text = render_message(event(CATALOG["volsnap", 86], {"errno": number}), "en")
        assert "Cause" not in text


@languages
def test_paths_are_shown_as_they_are(lang: str) -> None:
    """Spaces, brackets and braces of a path stay; only what misleads a terminal is spelled out."""
    path = "/srv/a  b/[x|y]/{volume}/。 、\\n"
    for entry in CATALOG.values():
        text = render_message(event(entry, {"volume": path, "device": path}), lang)
        assert path in text


@languages
def test_an_event_nobody_knows_still_has_a_sentence(lang: str) -> None:
    """A log of a later version can be read."""
    unknown = Event(WHEN, "volsnap", 4711, Level.ERROR, FULL)
    text = render_message(unknown, lang)
    assert "4711" in text
    assert "/srv/vol1" in text
    check_reads_well(text, lang)
    check_reads_well(render_message(Event(WHEN, "other", 1, Level.ERROR, {}), lang), lang)
    ET.fromstring(render_xml(unknown, lang))
    assert json.loads(render_json(unknown, lang))["level"] == "Error"


def test_a_language_nobody_wrote_is_bad_input() -> None:
    """The error names the languages there are."""
    some = event(CATALOG["volsnap", 87], {})
    for render in (render_text, render_json, render_xml, render_message):
        with pytest.raises(UsageError) as caught:
            render(some, "de")
        assert "en, ja" in caught.value.hint


# --- templates ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "values", "text"),
    [
        ("plain", {}, "plain"),
        ("", {}, ""),
        ("{a}{b}", {"a": "1"}, "1"),
        ("x[ {a}]y", {}, "xy"),
        ("x[ {a}]y", {"a": ""}, "xy"),
        ("x[ {a}]y", {"a": "1"}, "x 1y"),
        ("[{a}|none]", {}, "none"),
        ("[{a}|none]", {"a": "1"}, "1"),
        ("[{a}[-{b}]|[{b}]]", {"a": "1", "b": "2"}, "1-2"),
        ("[{a}[-{b}]|[{b}]]", {"a": "1"}, "1"),
        ("[{a}[-{b}]|[{b}]]", {"b": "2"}, "2"),
        ("[{a}[-{b}]|[{b}]]", {}, ""),
        ("[{a}]", {"a": "{b}[|]", "b": "2"}, "{b}[|]"),
    ],
)
def test_templates_leave_out_what_is_unknown(
    template: str, values: dict[str, str], text: str
) -> None:
    """Groups stand or fall with the names directly in them; values are never parsed."""
    assert fill(template, values) == text


@pytest.mark.parametrize("template", ["[", "]", "|", "[a|b|c]", "[[a]", "a]b["])
def test_a_template_with_odd_brackets_is_found(template: str) -> None:
    """A slip in a sentence is an error, not odd output."""
    with pytest.raises(ValueError, match=r"stray|open"):
        parse(template)
