"""`vsnapfs status`: how the volumes are, and what to do about those that are not well."""

from __future__ import annotations

from typing import Any

import click

from vsnapfs.cli import status_text
from vsnapfs.cli.base import Command
from vsnapfs.cli.output import complain, echo, note, print_facts, print_json, print_table
from vsnapfs.cli.params import VolumeNameType, json_option
from vsnapfs.cli.volumes import find_mount, find_volume, mounted
from vsnapfs.errors import VsnapError

EXIT_ERROR = 1
EXIT_FAULT = 3


@click.command(
    cls=Command,
    examples="$ vsnapfs status vol1\n$ vsnapfs status --json | jq '.[] | select(.fault) | .volume'",
)
@click.argument("volumes", metavar="[VOLUME]...", nargs=-1, type=VolumeNameType())
@json_option("The report")
@click.pass_context
def status(ctx: click.Context, volumes: tuple[str, ...], as_json: bool) -> None:
    """Show state, sizes and faults. Without VOLUME: of every volume mounted on this machine.

    Exits with 3 when a volume is offline by a fault, otherwise with 1 when a volume must stay
    closed or could not be looked at, otherwise with 0.
    """
    names = volumes or tuple(dict.fromkeys(str(mount.volume) for mount in mounted()))
    reports = [_report(name) for name in names]
    if as_json:
        print_json(reports)
    elif not reports:
        note("No volume is mounted on this machine.")
        note("  hint: `vsnapfs status VOLUME` shows one that is not mounted.")
    else:
        _show(reports)
    if any(report.get("fault") for report in reports):
        ctx.exit(EXIT_FAULT)
    if any(report.get("error") or report.get("state") == "closed" for report in reports):
        ctx.exit(EXIT_ERROR)


def _report(name: str) -> dict[str, Any]:
    """The status of one volume, or what keeps it from being told: one bad volume hides no other."""
    from vsnapfs.daemon import client

    try:
        volume = find_volume(name)
        report: dict[str, Any] = client.call(volume, "status")
        mount = find_mount(volume) if report.get("mountpoint") is None else None
        if mount is not None and mount.stale:
            report["dead_mount"] = str(mount.mountpoint)
        return report
    except VsnapError as error:
        return {"volume": name, "state": None, "fault": None, "error": error.to_json()}
    except OSError as error:
        failure = VsnapError(f"{name}: {error.strerror or error}", errno=error.errno or 5)
        return {"volume": name, "state": None, "fault": None, "error": failure.to_json()}
    except MemoryError:
        failure = VsnapError(f"{name}: there is not enough memory to look at it", errno=12)
        return {"volume": name, "state": None, "fault": None, "error": failure.to_json()}


def _show(reports: list[dict[str, Any]]) -> None:
    good = [report for report in reports if not report.get("error")]
    if len(good) > 1:
        _table(good)
    for report in good:
        if len(good) == 1:
            echo(status_text.headline(report))
            print_facts(status_text.facts(report))
        elif report.get("fault"):
            echo()
            echo(status_text.headline(report))
        if report.get("fault"):
            print_facts(status_text.fault_facts(report))
    for report in reports:
        if report.get("error"):
            complain(report["error"]["message"], report["error"].get("hint", ""))


def _table(reports: list[dict[str, Any]]) -> None:
    rows = []
    for report in reports:
        area = report.get("diff_area") or {}
        rows.append(
            (
                str(report["volume"]),
                status_text.state_word(report),
                str(report.get("mountpoint") or "-"),
                *(status_text.size(area.get(k)) for k in ("used", "allocated", "maximum")),
                "?" if (points := report.get("recovery_points")) is None else str(points),
            )
        )
    headers = ("volume", "state", "mounted on", "used", "allocated", "maximum", "points")
    print_table(headers, rows, right="used allocated maximum points")
