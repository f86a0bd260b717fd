"""The root command: which commands exist, and how every failure reaches the user.

Owns the exit codes and the form of an error. Promises: no traceback for anything foreseen;
stdout is flushed before success is reported, so that a full disk or a closed pipe is noticed.

Exit codes: 0 done · 1 could not be done · 2 the command line is wrong, nothing was changed · 3 the
volume is offline by a fault (`status` saw one, or it is why a command was refused) · 5 `verify`
found problems, or `repair` something beyond it · 130 Ctrl-C · 141 the reader of a pipe went away ·
128 + number for other signals.
"""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

import click

from vsnapfs import __version__
from vsnapfs.cli import (
    completion,
    create,
    demo,
    events,
    inspect,
    loop,
    mount,
    points,
    protection,
    repair,
    status,
    verify,
)
from vsnapfs.cli.base import Group
from vsnapfs.cli.output import complain
from vsnapfs.errors import VsnapError

EXIT_FAILED = 1
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141


class Root(Group):
    """The root of all commands; ends every failure cleanly."""

    def invoke(self, ctx: click.Context) -> Any:
        """As click's, but a closed pipe ends quietly and a full disk under stdout is noticed."""
        # Here, inside click's own main, which would turn a closed pipe into exit code 1.
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
            return result
        except BrokenPipeError:
            _forget_stdout()
            raise click.exceptions.Exit(EXIT_BROKEN_PIPE) from None

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        """As click's, but failures look like ours and exit as the table above says."""
        if not standalone_mode:
            return super().main(args, prog_name, complete_var, False, **extra)
        asked = os.environ.get(completion.VARIABLE)
        if asked:
            sys.exit(completion.answer(self, asked))
        sys.exit(self._run(args, prog_name, complete_var, extra))

    def _run(
        self,
        args: Sequence[str] | None,
        prog_name: str | None,
        complete_var: str | None,
        extra: dict[str, Any],
    ) -> int:
        """Run one command line; the exit code."""
        try:
            code = super().main(args, prog_name, complete_var, False, **extra)
            return code if isinstance(code, int) else 0
        except (click.Abort, KeyboardInterrupt):
            # The latter: right before click's own watch begins, or while it answers the first one.
            return EXIT_INTERRUPTED
        except click.ClickException as error:
            complain(*_click_words(error))
            return error.exit_code
        except VsnapError as error:
            complain(error.message, error.hint)
            return error.exit_code
        except ModuleNotFoundError as error:
            if error.name is None or error.name.split(".")[0] == "vsnapfs":
                _defect()
            complain(
                f"the Python package {error.name} is not installed",
                "Install what vsnapfs needs (its README says how), into the Python that runs it: "
                + sys.executable,
            )
        except OSError as error:
            complain(*_os_words(error))
            _give_up_on_stdout_if_broken()
        except MemoryError:
            _no_memory()
        except ImportError as error:
            if "failed to map" not in str(error) and "allocate memory" not in str(error):
                _defect()
            _no_memory()
        except Exception:  # noqa: BLE001 (the last resort: report the defect)
            _defect()
        return EXIT_FAILED


def _click_words(error: click.ClickException) -> tuple[str, str]:
    """Message and hint for what click refused."""
    message = error.format_message()
    message = message[:1].lower() + message[1:] if message[:2].istitle() else message
    ctx = error.ctx if isinstance(error, click.UsageError) else None
    hint = f"See `{ctx.command_path} --help`." if ctx is not None else ""
    return message, hint


def _os_words(error: OSError) -> tuple[str, str]:
    """Message and hint for an error of the host that no layer below has explained."""
    where = f"{error.filename}: " if error.filename is not None else ""
    what = error.strerror or str(error) or type(error).__name__
    hint = "Try as root." if error.errno in (errno.EACCES, errno.EPERM) and os.geteuid() else ""
    return f"{where}{what}", hint


def _no_memory() -> None:
    complain(
        "there is not enough memory for this command",
        "Free some memory, or raise the limit it runs under (ulimit -v, MemoryMax).",
    )


def _defect() -> NoReturn:
    """Nobody planned for this exception: show where it happened, and say whose fault it is."""
    traceback.print_exc()
    error = sys.exc_info()[1]
    complain(
        f"unexpected {type(error).__name__}: {error}",
        "This is a defect of vsnapfs. Please report it with the lines above.",
    )
    raise SystemExit(EXIT_FAILED)


def _give_up_on_stdout_if_broken() -> None:
    """What could not be written has been reported; Python must not report it again at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        _forget_stdout()


def _forget_stdout() -> None:
    """Point stdout at nothing, so that Python's flush at exit does not complain about the pipe."""
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
    except (OSError, ValueError):
        pass  # stdout is no file (a test's buffer), or already closed: nothing will be flushed


@click.group(
    cls=Root,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    aliases={"rp": "recovery-point"},
    examples=(
        "$ vsnapfs create vol1 --size 1GiB --diff-area-size 256MiB\n"
        "$ vsnapfs mount vol1 /mnt/vol1\n"
        "$ vsnapfs recovery-point create vol1 --label before-upgrade\n"
        "$ vsnapfs status"
    ),
)
@click.version_option(__version__, "-V", "--version", prog_name="vsnapfs")
def app() -> None:
    """A virtual block device that goes offline rather than lose a recovery point.

    A VOLUME is the directory that `create` made; the place where it is mounted is understood too.
    Every command has --help with an example.
    """


for command in (
    create.create,
    mount.mount,
    mount.umount,
    loop.attach,
    loop.detach,
    status.status,
    points.recovery_point,
    protection.resize,
    protection.offline,
    protection.online,
    events.events,
    verify.verify,
    repair.repair,
    inspect.inspect,
    demo.demo,
    completion.completion,
):
    app.add_command(command)
