"""Text, JSON and Windows event XML: one line each, which nothing in an event can break."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterator
from typing import Any
from xml.etree import ElementTree as ET

import pytest
from event_samples import FULL, HOSTILE, NASTY, WHEN, event, languages
from hypothesis import given
from hypothesis import strategies as st

from vsnapfs.events import (
    CATALOG,
    LANGUAGES,
    XML_NAMESPACE,
    Entry,
    Event,
    Level,
    channel,
    render_json,
    render_message,
    render_text,
    render_xml,
)
from vsnapfs.events.wording import clean


def tag(name: str) -> str:
    return f"{{{XML_NAMESPACE}}}{name}"


def every_event() -> Iterator[Event]:
    for entry in CATALOG.values():
        for params in (FULL, {}, *HOSTILE):
            yield event(entry, params)
    yield Event(WHEN, NASTY, -1, Level.WARNING, {"text": NASTY})


def check_one_safe_line(text: str) -> None:
    text.encode()  # a lone surrogate cannot be printed
    assert len(text.splitlines()) == 1
    # Cn: non-characters; Cf: marks that turn text around or hide. (😀 and 夜間 are none of these.)
    odd = [char for char in text if unicodedata.category(char) in {"Cc", "Cf", "Cs", "Cn", "Zl"}]
    assert not odd


@languages
def test_text_is_one_safe_line(lang: str) -> None:
    """Nothing in an event can break the line, or reach a terminal as more than text."""
    for some in every_event():
        line = render_text(some, lang)
        check_one_safe_line(line)
        assert line.startswith("2026-11-22T07:20:00.123456Z  ")
        assert line.endswith("  " + render_message(some, lang))


def test_english_sentences_are_apart() -> None:
    """Whichever params are there, after a sentence comes a space and never the next letter."""
    for entry in CATALOG.values():
        for without in (*((name,) for name in FULL), *((name, "reason") for name in FULL)):
            params = {name: value for name, value in FULL.items() if name not in without}
            message = render_message(event(entry, params), "en")
            assert not re.search(r"[a-z)}][.;:][A-Z]", message), message


def test_text_has_columns() -> None:
    """Time, level, source and id, message: aligned, also with Japanese characters."""
    en = [render_text(event(CATALOG["volsnap", n], {}), "en") for n in (87, 24, 33)]
    assert [line[29:42] for line in en] == ["Error        ", "Warning      ", "Information  "]
    assert len({line.index("volsnap") for line in en}) == 1
    ja = [render_text(event(CATALOG["volsnap", n], {}), "ja") for n in (87, 24, 33)]
    assert [line[29:36].split("v")[0] for line in ja] == ["エラー  ", "警告    ", "情報    "]


@languages
def test_json_is_one_safe_object_with_the_promised_keys(lang: str) -> None:
    """Whatever the params: a parsable line, other scripts unescaped, the params unharmed."""
    for some in every_event():
        line = render_json(some, lang)
        check_one_safe_line(line)
        data = json.loads(line, parse_constant=pytest.fail)
        assert data["time"] == "2026-11-22T07:20:00.123456Z"
        assert data["source"] == some.source
        assert data["event_id"] == some.event_id
        assert data["level"] == some.level.value
        assert data["message"] == render_message(some, lang)
        if some.params.get("label") == NASTY:
            assert data["params"]["label"] == NASTY
            assert "夜間" in line
    full = json.loads(render_json(event(CATALOG["volsnap", 87], FULL), lang))
    assert full["params"] == FULL


@languages
def test_xml_is_a_windows_event(lang: str) -> None:
    """Whatever the params: well-formed, with the schema's elements in the schema's order."""
    for some in every_event():
        line = render_xml(some, lang)
        check_one_safe_line(line)
        root = ET.fromstring(line)
        assert root.tag == tag("Event")
        assert [child.tag for child in root] == [
            tag("System"),
            tag("EventData"),
            tag("RenderingInfo"),
        ]
        order = ["Provider", "EventID", "Version", "Level", "Task", "Opcode", "Keywords"]
        order += ["TimeCreated", "Channel", "Computer", "Security"]
        assert [child.tag for child in root[0]] == [tag(name) for name in order]
        assert root[0][0].get("Name") == clean(some.source)
        assert root.findtext(f"{tag('System')}/{tag('EventID')}") == str(some.event_id)
        assert root[0][3].text == {"Error": "2", "Warning": "3", "Information": "4"}[some.level]
        assert root[0][7].get("SystemTime") == some.time
        assert root[0][8].text == channel(some.source)
        assert root[0][9].text
        assert root[2].get("Culture") == {"en": "en-US", "ja": "ja-JP"}[lang]
        assert root[2].findtext(tag("Message")) == render_message(some, lang)
        named = {data.get("Name"): data.text or "" for data in root[1]}
        for name in set(some.params) - {""}:
            assert clean(name) in named


def test_xml_carries_the_params_windows_has_where_windows_has_them() -> None:
    """volsnap: first, unnamed, the original volume, even unknown. Ntfs 140: its two names."""
    volsnap = ET.fromstring(render_xml(event(CATALOG["volsnap", 87], FULL)))
    data = volsnap.findall(f".//{tag('Data')}")
    assert data[0].attrib == {}
    assert data[0].text == "/srv/vol1"
    assert {d.get("Name"): d.text for d in data[1:]} == {
        name: json.dumps(value) if isinstance(value, list) else str(value)
        for name, value in FULL.items()
    }
    assert volsnap[0][1].get("Qualifiers") == "49158"  # 0xC006, as on every Windows

    nameless = ET.fromstring(render_xml(event(CATALOG["volsnap", 87], {"used": 1})))
    data = nameless.findall(f".//{tag('Data')}")
    assert [(d.get("Name"), d.text) for d in data] == [(None, None), ("used", "1")]

    ntfs = ET.fromstring(render_xml(event(CATALOG["Microsoft-Windows-Ntfs", 140], FULL)))
    data = ntfs.findall(f".//{tag('Data')}")
    assert [(d.get("Name"), d.text) for d in data[:3]] == [
        ("VolumeId", "/srv/vol1"),
        ("DeviceName", "/dev/loop0"),
        ("volume", "/srv/vol1"),
    ]
    assert ntfs[0][0].attrib == {
        "Name": "Microsoft-Windows-Ntfs",
        "Guid": "{3ff37a1c-a68d-4d6e-8c9b-f79e8b16c482}",
    }
    assert ntfs[0][1].attrib == {}


texts = st.text(st.characters(), max_size=30)  # surrogates and controls included


@given(
    st.sampled_from(list(CATALOG.values())),
    st.dictionaries(
        st.sampled_from(list(FULL)) | texts,
        st.none() | st.booleans() | st.integers() | st.floats() | texts | st.lists(texts),
        max_size=8,
    ),
    st.sampled_from(LANGUAGES),
)
def test_no_params_break_any_form(entry: Entry, params: dict[str, Any], lang: str) -> None:
    """Text, JSON and XML stay one safe, parsable line for any params at all."""
    some = event(entry, params)
    for render in (render_text, render_json, render_xml):
        line = render(some, lang)
        line.encode()
        assert len(line.splitlines()) == 1
        assert not re.search("[\x00-\x1f\x7f-\x9f]", line)
    json.loads(render_json(some, lang), parse_constant=pytest.fail)
    ET.fromstring(render_xml(some, lang))
