"""`vsnapfs repair`: bring back what can be brought back, and say what cannot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from vsnapfs.cli.base import Command
from vsnapfs.cli.output import echo, note, print_facts, print_json, progress
from vsnapfs.cli.params import json_option, volume_argument
from vsnapfs.cli.verify import EXIT_PROBLEMS, problem_facts
from vsnapfs.config import shown


@click.command(
    cls=Command,
    examples="$ vsnapfs repair --dry-run vol1\n$ vsnapfs repair vol1",
)
@volume_argument
@click.option("--dry-run", is_flag=True, help="Only say what would be done; write nothing.")
@json_option("The account")
@click.pass_context
def repair(ctx: click.Context, volume: Path, dry_run: bool, as_json: bool) -> None:
    """Bring back what a second copy still has.

    Mends superblocks, descriptors, preserved blocks and the state file wherever a copy with the
    right checksum exists, and says of each thing what was done. Exits with 5 when something is
    beyond repair, and says which recovery points and bytes that hits.
    """
    from vsnapfs.daemon import client

    with progress("repair") as report:
        result: dict[str, Any] = client.call(
            volume, "repair", progress=report, say=note, dry_run=dry_run
        )
    if as_json:
        print_json(result)
    else:
        _show(shown(volume), result)
    if not result["ok"]:
        ctx.exit(EXIT_PROBLEMS)


def _show(name: str, result: dict[str, Any]) -> None:
    found, beyond = result.get("found", []), result.get("beyond_repair", [])
    echo(f"{name}: {_summary(len(found), len(beyond), dry=result.get('dry_run', False))}")
    for finding in found:
        echo()
        print_facts(_finding_facts(finding, dry=result.get("dry_run", False)))
    for problem in beyond:
        echo()
        print_facts([("beyond repair", ""), *problem_facts(problem)])
    if result.get("state") == "offline":
        note(f"{name} is offline. `vsnapfs status {name}` says why, and what is next.")


def _summary(found: int, beyond: int, *, dry: bool) -> str:
    if not found and not beyond:
        return "nothing to repair"
    parts = []
    if found:
        parts.append(f"{found} thing{'s' if found != 1 else ''} {'to repair' if dry else 'found'}")
    if beyond:
        parts.append(f"{beyond} beyond repair")
    return ", ".join(parts) + (" (nothing was written)" if dry else "")


def _finding_facts(finding: dict[str, Any], *, dry: bool) -> list[tuple[str, str]]:
    known = ("what", "message", "action", "when", "done")
    place = ", ".join(f"{key} {value}" for key, value in finding.items() if key not in known)
    facts = [("found", f"{finding.get('what', '?')}: {finding.get('message', '?')}")]
    if place:
        facts.append(("where", place))
    done = "repaired" if finding.get("done") else "would be" if dry else "to do"
    when = " (when the volume was opened)" if finding.get("when") == "opening" and not dry else ""
    facts.append((done, f"{finding.get('action', '?')}{when}"))
    return facts
