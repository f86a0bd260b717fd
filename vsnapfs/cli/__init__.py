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

import signal


def main() -> None:
    """The entry point of the `vsnapfs` program. Exits the process."""
    # Nothing has begun yet: Ctrl-C ends it as it ends a C program, not with a traceback of imports.
    # Where it is ignored (`nohup`, a shell's background) it stays so.
    is_asked = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if is_asked:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from vsnapfs.cli import streams
    from vsnapfs.cli.app import app

    streams.prepare()
    if is_asked:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    app.main(prog_name="vsnapfs")
