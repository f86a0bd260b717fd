"""The command line: parse, call, render. One thin module per group of commands.

Owns what a person or a script sees: options, tables, JSON, progress bars, exit codes, hints.
Promises that `--json` output is never coloured or wrapped, that progress and errors go to stderr
only, and that every refusal is "vsnapfs: error: …" with a hint where one is known (`app`).

Leaves the work to `daemon.client.call` (mounted or not, the same operation), `volume.create`, and
`diffarea.inspect`. Modules import these inside their commands: `vsnapfs --help` and tab completion
must not wait for trio, pyfuse3 and rich.
"""

from __future__ import annotations


def main() -> None:
    """The entry point of the `vsnapfs` program. Exits the process."""
    from vsnapfs.cli.app import app

    app.main(prog_name="vsnapfs")
