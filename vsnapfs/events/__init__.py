"""Events: what happened to a volume, kept for good and told in English or Japanese.

Owns the catalog, the log file and the three forms an event is shown in. A leaf: imports nothing
of ours but `units` and `errors`. See `event` (one event), `catalog` (which there are), `log`
(writing), `reader` (reading), `wording` and `sentences_*` (what they say), `render` (how).
"""

from vsnapfs.events.catalog import CATALOG, Entry, Source, channel, lookup
from vsnapfs.events.event import Event, Level
from vsnapfs.events.log import EventLog
from vsnapfs.events.reader import follow_events, read_events
from vsnapfs.events.render import XML_NAMESPACE, render_json, render_text, render_xml
from vsnapfs.events.wording import LANGUAGES, render_message

__all__ = [
    "CATALOG",
    "LANGUAGES",
    "XML_NAMESPACE",
    "Entry",
    "Event",
    "EventLog",
    "Level",
    "Source",
    "channel",
    "follow_events",
    "lookup",
    "read_events",
    "render_json",
    "render_message",
    "render_text",
    "render_xml",
]
