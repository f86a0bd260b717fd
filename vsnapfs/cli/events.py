"""`vsnapfs events`: what happened to a volume, as text, JSON lines or Windows event XML."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from vsnapfs.cli.base import Command
from vsnapfs.cli.output import echo, json_line, note, readable, xml_text
from vsnapfs.cli.params import lang_option, volume_argument
from vsnapfs.config import VolumePaths, shown
from vsnapfs.errors import UsageError

if TYPE_CHECKING:
    from vsnapfs.events import Event


@click.command(
    cls=Command,
    examples=(
        "$ vsnapfs events vol1 --follow\n"
        """$ vsnapfs events vol1 --json | jq 'select(.source == "volsnap" and .level == "Error")'"""
    ),
)
@volume_argument
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line, for programs.")
@click.option("--xml", "as_xml", is_flag=True, help="Windows event XML.")
@click.option("--follow", "-f", is_flag=True, help="Go on with new events until Ctrl-C.")
@lang_option("the sentences; ids, levels and names never change")
def events(volume: Path, as_json: bool, as_xml: bool, follow: bool, lang: str) -> None:
    """Show the event log of a volume, oldest first.

    It survives restarts, and can be read while the volume is offline or not mounted. Sources and
    ids are those of Windows: volsnap 87 means that the diff area was full.
    """
    if as_json and as_xml:
        raise UsageError("--json and --xml exclude each other", hint="Choose one of them.")
    log = VolumePaths(volume).events
    lang = lang if as_json or as_xml else readable(lang)
    seen = False
    if as_xml:
        echo(xml_text("<Events>"))
    try:
        for event in _events(log, follow):
            seen = True
            echo(_rendered(event, as_json, as_xml, lang))
    finally:
        # Also after Ctrl-C, so that what --follow wrote into a file is a whole document.
        if as_xml:
            echo("</Events>")
    if not seen and not as_json and not as_xml:
        note(f"The event log of {shown(volume)} is empty.")


def _events(log: Path, follow: bool) -> Iterator[Event]:
    from vsnapfs.events import follow_events, read_events

    return iter(follow_events(log) if follow else read_events(log))


def _rendered(event: Event, as_json: bool, as_xml: bool, lang: str) -> str:
    from vsnapfs.events import render_json, render_text, render_xml

    if as_json:
        return json_line(render_json(event, lang))
    return xml_text(render_xml(event, lang)) if as_xml else render_text(event, lang)
