"""From an event to its sentence.

Owns how each param is shown (sizes rounded and exact, errors by name, paths harmless on any
terminal) and the languages there are. Promises a sentence for any event, known or not, with any
params missing or of the wrong type. Leaves the sentences to `sentences_*`, the form to `render`.
"""

from __future__ import annotations

import errno
import os
import re
import shlex
from collections.abc import Mapping
from typing import Any, Protocol

from vsnapfs.errors import UsageError
from vsnapfs.events import sentences_en, sentences_ja
from vsnapfs.events.event import UNSAFE, Event, dump_json, plain_params
from vsnapfs.events.template import fill
from vsnapfs.units import format_both


class Sentences(Protocol):
    """What a language module holds; `sentences_en` says what each is for."""

    CULTURE: str
    LEVELS: dict[str, str]
    BYTES: str
    SEPARATOR: str
    SIZES: dict[str, str]
    COUNTED: dict[str, tuple[str, str]]
    LISTED: dict[str, tuple[str, str]]
    PHRASES: dict[str, str]
    ERRORS: dict[str, str]
    GENERIC: str
    SENTENCES: dict[tuple[str, int], str]


_LANGUAGES: dict[str, Sentences] = {"en": sentences_en, "ja": sentences_ja}
LANGUAGES = tuple(_LANGUAGES)
"""The languages there are sentences in, by ISO 639 code."""

_BYTE_PARAMS = ("used", "allocated", "maximum", "size", "old", "new", "length")
_POINTS_FROM = {"points_phrase": ("points",), "gone": ("dropped", "points", "count")}
_COUNTS_FROM = {
    "blocks_left": "needed",
    "blocks": "count",
    "copies": "count",
    "writes_waited": "count",
    "more_times": "repeats",
    "more_flushes": "repeats",
}

_UNSAFE = re.compile(f"[\x00-\x1f{UNSAFE}]")


def sentences(lang: str) -> Sentences:
    """The words of a language. UsageError when there are none."""
    found = _LANGUAGES.get(lang)
    if found is None:
        raise UsageError(
            f"There are no messages in the language {lang!r}.",
            hint=f"Choose one of: {', '.join(LANGUAGES)}.",
            code="unknown-language",
        )
    return found


def render_message(event: Event, lang: str = "en") -> str:
    """The event's sentences in `lang`, on one line, without a control character."""
    words = sentences(lang)
    sentence = words.SENTENCES.get((event.source, event.event_id), words.GENERIC)
    return fill(sentence, _values(event, words))


def clean(value: Any) -> str:
    """Any param as text that is safe to show: what is invisible or controls is spelled out."""
    if isinstance(value, str):
        text = value
    elif isinstance(value, (list, dict, bool)):
        text = dump_json(value)
    else:
        text = str(value)
    return _UNSAFE.sub(_spell_out, text)


def _spell_out(match: re.Match[str]) -> str:
    char = match[0]
    named = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}.get(char)
    if named:
        return named
    return f"\\x{ord(char):02x}" if char < "\x80" else f"\\u{ord(char):04x}"


def _values(event: Event, words: Sentences) -> dict[str, str]:
    """What the sentences' names stand for; a name that is missing has no value."""
    params = plain_params(event.params)
    values = {name: clean(value) for name, value in params.items()}
    for name in _BYTE_PARAMS:
        if _is_int(params.get(name)):
            values[name] = format_both(params[name], words.BYTES)
    if _is_int(params.get("offset")):
        values["offset"] = f"{params['offset']:,}"
    for name in ("reason", "text", "what"):
        if name in values:
            values[name] = values[name].strip().rstrip(".。")
    values["source"] = clean(event.source)
    values["event_id"] = str(event.event_id)
    values["VOLUME"] = shlex.quote(values["volume"]) if values.get("volume") else "VOLUME"
    values["error"] = _error(params.get("errno"), values.get("reason", ""), words)
    values["remark"] = next(
        (values[name] for name in ("text", "reason", "what") if values.get(name)), ""
    )
    values["sizes"] = words.SEPARATOR.join(
        phrase.replace("{n}", values[name])
        for name, phrase in words.SIZES.items()
        if values.get(name)
    )
    for phrase, name in _COUNTS_FROM.items():
        values[phrase] = _counted(words.COUNTED[phrase], params.get(name))
    for phrase, names in _POINTS_FROM.items():
        values[phrase] = _points(phrase, params, names, words)
    for name, template in words.PHRASES.items():
        values[name] = fill(template, values)
    return values


def _points(
    phrase: str, params: Mapping[str, Any], names: tuple[str, ...], words: Sentences
) -> str:
    """Recovery points, given as a count or as a list of numbers, whichever name has them."""
    for name in names:
        value = params.get(name)
        if _is_int(value):
            return _counted(words.COUNTED[phrase], value)
        if isinstance(value, list) and value:
            one, many = words.LISTED[phrase]
            listed = words.SEPARATOR.join(_runs(value))
            return (one if len(value) == 1 else many).replace("{n}", listed)
    return ""


def _runs(numbers: list[Any]) -> list[str]:
    """A list with its runs of neighbours drawn together, for a volume has up to 512 points."""
    runs: list[tuple[Any, Any]] = []
    for item in numbers:
        if runs and _is_int(item) and _is_int(runs[-1][1]) and item == runs[-1][1] + 1:
            runs[-1] = runs[-1][0], item
        else:
            runs.append((item, item))
    return [
        clean(text)
        for first, last in runs
        for text in ([first] if first == last else [f"{first}-{last}"])
    ]


def _counted(forms: tuple[str, str], value: Any) -> str:
    """`value` with its noun, "" unless it is a number."""
    if not _is_int(value):
        return ""
    return forms[0 if value == 1 else 1].replace("{n}", f"{value:,}")


def _error(number: Any, reason: str, words: Sentences) -> str:
    """An errno as "ENOSPC, No space left on device"; only its name if the reason has the rest."""
    if not _is_int(number) or number <= 0:
        return ""
    name = errno.errorcode.get(number)
    if name is None:
        return f"errno {number}"
    meaning = os.strerror(number)
    if meaning in reason:
        return name
    return words.SEPARATOR.join((name, words.ERRORS.get(name, meaning)))


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
