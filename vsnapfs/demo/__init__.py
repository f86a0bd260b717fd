"""`vsnapfs demo`: the story of protection mode, told by doing it.

Owns the telling, nothing of the volume: every step is a command line of this program or of the
system, run through a shell exactly as it is shown, in a temporary directory that is removed
afterwards. Promises that nothing shown is made up: outputs are those of the commands, numbers are
read from `status --json`, `events --json` and fio's own report, and each claim that can be proved
is proved by a checksum, or the demo ends with an error.

    story.py      the chapters, and the proofs
    stage.py      what stands on the volume: ext4 on a loop device, or the bare FUSE file
    shell.py      running commands as typed, ending them as a group
    narrator.py   what it looks like; pauses
    machine.py    what this machine can do, the temporary directory
    namespace.py  mounts that nobody else's mount namespace holds
    clearing.py   removing everything, and naming what is left
    text_en.py, text_ja.py   all sentences
"""

from __future__ import annotations

import sys
import time

from vsnapfs.cli.signals import unwinding
from vsnapfs.demo import text_en, text_ja
from vsnapfs.demo.machine import Workplace, look_around
from vsnapfs.demo.narrator import Narrator
from vsnapfs.demo.shell import Shell
from vsnapfs.demo.story import Story, StoryError

__all__ = ["run_demo"]

EXIT_FAILED = 1
_TEXTS = {"en": text_en.TEXT, "ja": text_ja.TEXT}


def run_demo(lang: str, fast: bool) -> int:
    """Tell the whole story. Returns the exit code: 0, or 1 if something was not as told.

    lang: "en" or "ja". fast: smaller sizes, no pauses. VsnapError if this machine lacks something
    without which there is no story. Whatever ends it, what it made is removed, and what cannot be
    is named on stderr.
    """
    text = _TEXTS[lang]
    narrator = Narrator(text, pauses=not fast and sys.stdout.isatty(), lang=lang)
    with unwinding():
        machine = look_around(text)
        started = time.monotonic()
        proofs: int | None = None
        workplace = Workplace(narrator, fast=fast, own_mounts=not machine.why_shared)
        with workplace as place:
            shell = Shell(place.directory, narrator, lang)
            story = Story(shell, narrator, machine, lang=lang, fast=fast)
            try:
                story.tell()
                proofs = story.proofs
            except StoryError as error:
                narrator.alarm(str(error))
                _show_server_log(shell, narrator)
        if proofs is None or place.left:
            return EXIT_FAILED
        narrator.ending(proofs=proofs, seconds=time.monotonic() - started)
    return 0


def _show_server_log(shell: Shell, narrator: Narrator) -> None:
    """What the serving process had to say, which would be removed with the directory."""
    try:
        log = (shell.directory / "vol1" / "server.log").read_text(errors="replace").strip()
    except OSError:
        return
    if log:
        narrator.output(log[-4000:])
