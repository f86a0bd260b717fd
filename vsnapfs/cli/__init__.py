"""The command line: parse, call, render. One thin module per group of commands.

Owns what a person or a script sees: options, tables, JSON, progress bars, exit codes, hints.
Promises that `--json` output is never coloured or wrapped, that progress and errors go to stderr
only, that every refusal is "vsnapfs: error: …" with a hint where one is known (`app`), and that all
of it can be written in any locale (`streams`).

Leaves the work to `daemon.client.call` (mounted or not, the same operation), `volume.create`, and
`diffarea.inspect`. Modules import these inside their commands: `vsnapfs --help` and tab completion
must not wait for trio, pyfuse3 and rich.
"""

from __future__ import annotations


def main() -> None:
    """The entry point of the `vsnapfs` program. Exits the process."""
    from vsnapfs.cli import streams
    from vsnapfs.cli.app import app

    streams.prepare()
    app.main(prog_name="vsnapfs")
