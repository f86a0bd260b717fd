"""`vsnapfs verify`: every checksum, every structure; reports, repairs nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from vsnapfs.cli.base import Command
from vsnapfs.cli.output import echo, note, print_facts, print_json, progress
from vsnapfs.cli.params import json_option, volume_argument
from vsnapfs.config import shown

EXIT_PROBLEMS = 5


@click.command(
    cls=Command,
    examples="$ vsnapfs verify vol1 || vsnapfs events vol1",
)
@volume_argument
@json_option("The report")
@click.pass_context
def verify(ctx: click.Context, volume: Path, as_json: bool) -> None:
    """Check every structure and every preserved block.

    Repairs nothing. Exits with 5 when there are problems, 1 when the check could not be made. Bytes
    of the replica that were never copied carry no checksum, so their rot is not seen.
    """
    from vsnapfs.daemon import client

    with progress("verify") as report:
        result: dict[str, Any] = client.call(volume, "verify", progress=report, say=note)
    if as_json:
        print_json(result)
    else:
        _show(shown(volume), result)
    if not result["ok"]:
        ctx.exit(EXIT_PROBLEMS)


def _show(name: str, result: dict[str, Any]) -> None:
    problems = result.get("problems", [])
    number = f"{len(problems)} problem{'s' if len(problems) != 1 else ''}"
    echo(f"{name}: {'all well' if result['ok'] else number}")
    checked = result.get("checked", {})
    print_facts((key.replace("_", " "), str(value)) for key, value in checked.items())
    for problem in problems:
        echo()
        print_facts(problem_facts(problem))


def problem_facts(problem: dict[str, Any]) -> list[tuple[str, str]]:
    """A problem of the diff area, in lines for people."""
    known = ("what", "message", "points", "ranges")
    place = ", ".join(f"{key} {value}" for key, value in problem.items() if key not in known)
    facts = [("problem", f"{problem.get('what', '?')}: {problem.get('message', '?')}")]
    facts.append(("where", place or "?"))
    if problem.get("points"):
        facts.append(("points", ", ".join(str(number) for number in problem["points"])))
    if problem.get("ranges"):
        spans = (f"{start} to {start + length - 1}" for start, length in problem["ranges"])
        facts.append(("bytes", "\n".join(spans)))
    return facts
