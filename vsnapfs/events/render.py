"""An event as people and programs want it: text, JSON, Windows event XML.

Owns the three forms. Each gives exactly one line, whatever a label or path contains, so that
`tail -f`, `grep` and `--follow` work alike on all of them. Leaves the sentences to `wording`.
"""

from __future__ import annotations

import socket
from typing import Any
from xml.sax.saxutils import escape, quoteattr

from vsnapfs.events.catalog import Source, channel
from vsnapfs.events.event import Event, Level, dump_json, plain_params
from vsnapfs.events.wording import clean, render_message, sentences

XML_NAMESPACE = "http://schemas.microsoft.com/win/2004/08/events/event"

_NTFS_GUID = "{3ff37a1c-a68d-4d6e-8c9b-f79e8b16c482}"  # Microsoft-Windows-Ntfs on every Windows
_CLASSIC = "0x80000000000000"  # the keyword of events of the classic log
# The upper half of volsnap's and Ntfs' 32-bit message ids: severity, and 6 (volsnap), 4 (Ntfs).
_SEVERITY = {Level.ERROR: 0xC000, Level.WARNING: 0x8000, Level.INFORMATION: 0x4000}
_FACILITY = {Source.VOLSNAP: 6, Source.NTFS: 4}


def render_text(event: Event, lang: str = "en") -> str:
    """One line for people: time, level, source and id in columns, then the message."""
    levels = sentences(lang).LEVELS
    level = _pad(levels[event.level], max(map(_columns, levels.values())))
    who = f"{clean(event.source)} {event.event_id}"
    return f"{event.time}  {level}  {who:<26}  {render_message(event, lang)}"


def render_json(event: Event, lang: str = "en") -> str:
    """One JSON object on one line; `level`, `source` and params are the same in any language."""
    return dump_json(
        {
            "time": event.time,
            "source": event.source,
            "event_id": event.event_id,
            "level": event.level.value,
            "channel": channel(event.source),
            "message": render_message(event, lang),
            "params": plain_params(event.params),
        }
    )


def render_xml(event: Event, lang: str = "en") -> str:
    """One `Event` element of Windows' event schema, on one line, with the rendered message.

    EventData has first what Windows itself has there, as Windows has it (volsnap: the original
    volume, unnamed; Microsoft-Windows-Ntfs 140: VolumeId, DeviceName), then every param of ours
    by name. Several events make a document inside one root element, `<Events>`.
    """
    words = sentences(lang)
    source, level = clean(event.source), event.level
    where = channel(event.source)
    system = [
        _provider(event.source),
        _event_id(event),
        "<Version>0</Version>",
        f"<Level>{level.number}</Level>",
        "<Task>0</Task>",
        "<Opcode>0</Opcode>",
        f"<Keywords>{_CLASSIC}</Keywords>",
        f'<TimeCreated SystemTime="{event.time}"/>',
        f"<Channel>{where}</Channel>",
        f"<Computer>{_text(socket.gethostname())}</Computer>",
        "<Security/>",
    ]
    rendering = [
        f"<Message>{_text(render_message(event, lang))}</Message>",
        f"<Level>{_text(words.LEVELS[level])}</Level>",
        f"<Channel>{where}</Channel>",
        f"<Provider>{_text(source)}</Provider>",
    ]
    return (
        f'<Event xmlns="{XML_NAMESPACE}">'
        f"<System>{''.join(system)}</System>"
        f"<EventData>{''.join(_event_data(event))}</EventData>"
        f'<RenderingInfo Culture="{words.CULTURE}">{"".join(rendering)}</RenderingInfo>'
        "</Event>"
    )


def _provider(source: str) -> str:
    guid = f' Guid="{_NTFS_GUID}"' if source == Source.WINDOWS_NTFS else ""
    return f"<Provider Name={quoteattr(clean(source))}{guid}/>"


def _event_id(event: Event) -> str:
    facility = next((n for source, n in _FACILITY.items() if source == event.source), None)
    if facility is None:
        return f"<EventID>{event.event_id}</EventID>"
    qualifiers = _SEVERITY[event.level] | facility
    return f'<EventID Qualifiers="{qualifiers}">{event.event_id}</EventID>'


def _event_data(event: Event) -> list[str]:
    params = plain_params(event.params)
    data = []
    if event.source == Source.VOLSNAP:
        data.append(f"<Data>{_text(params.get('volume', ''))}</Data>")
    elif (event.source, event.event_id) == (Source.WINDOWS_NTFS, 140):
        data.append(f'<Data Name="VolumeId">{_text(params.get("volume", ""))}</Data>')
        data.append(f'<Data Name="DeviceName">{_text(params.get("device", ""))}</Data>')
    for name, value in params.items():
        data.append(f"<Data Name={quoteattr(clean(name))}>{_text(value)}</Data>")
    return data


def _text(value: Any) -> str:
    """Text of an element; what XML cannot hold at all, `clean` has spelled out."""
    return escape(clean(value))


def _pad(text: str, width: int) -> str:
    return text + " " * (width - _columns(text))


def _columns(text: str) -> int:
    """How wide `text` is on a terminal: a Japanese character takes two columns."""
    return sum(2 if ord(char) > 0x2E80 else 1 for char in text)
