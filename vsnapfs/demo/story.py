"""The story, chapter by chapter, and its proofs.

Owns the order of events and every check. Promises that each claim of the text is looked at before
it is made: a command that ends otherwise than told, a checksum that differs or a state that is not
what it should be ends the story with a `StoryError`.
"""

from __future__ import annotations

import re
from typing import Any

from vsnapfs.demo.machine import Machine
from vsnapfs.demo.narrator import Narrator
from vsnapfs.demo.shell import CommandError, Shell
from vsnapfs.demo.stage import FAST, WHOLE, FileStage, FullStage, Stage
from vsnapfs.units import format_size

_SHA256 = re.compile(r"^\\?([0-9a-f]{64}) [ *](.+)$", re.MULTILINE)
_FULL = 8  # the fault DIFF_AREA_FULL


class StoryError(Exception):
    """Something did not happen as told."""


class Story:
    """Tells it once. `proofs` counts what has been proved so far."""

    def __init__(
        self, shell: Shell, narrator: Narrator, machine: Machine, *, lang: str, fast: bool
    ) -> None:
        self._shell = shell
        self._narrator = narrator
        self._machine = machine
        self._sizes = FAST if fast else WHOLE
        kind = FullStage if machine.full else FileStage
        self._stage: Stage = kind(shell, narrator, self._sizes)
        self._lang = lang
        #: Recovery points that exist → the SHA-256 of a plain read of the replica at that moment.
        self._points: dict[int, str] = {}
        self.proofs = 0

    def tell(self) -> None:
        """All chapters. StoryError."""
        try:
            self._opening()
            self._make_a_volume()
            self._fill_it()
            self._days_pass()
            self._run_out_of_room()
            self._look_at_the_points()
            self._find_the_way_out()
            self._work_again()
            self._restore()
            self._export_and_delete()
            self._put_away()
        except CommandError as error:
            raise StoryError(
                self._text(
                    "command_failed",
                    command=error.command,
                    code=error.code,
                    output=error.output.strip(),
                ).rstrip()
            ) from error

    # -- chapters -------------------------------------------------------------------------------

    def _opening(self) -> None:
        self._narrator.title("title")
        self._say("opening")
        if not self._machine.full:
            self._say("left_out", reason=self._machine.why_not)
        self._say("place", place=self._shell.directory)
        why_shared = self._machine.why_shared
        self._say("shared_mounts" if why_shared else "own_mounts", reason=why_shared)

    def _make_a_volume(self) -> None:
        self._narrator.chapter("volume.title")
        self._say("volume.why")
        self._run(
            f"vsnapfs create vol1 --size {self._sizes.replica}MiB "
            f"--diff-area-size {self._sizes.diff_area}MiB"
        )
        self._run("mkdir mnt && vsnapfs mount vol1 mnt")
        self._run("ls -l mnt")
        self._say("volume.tree")

    def _fill_it(self) -> None:
        self._narrator.chapter("data.title")
        self._stage.prepare()

    def _days_pass(self) -> None:
        self._narrator.chapter("points.title")
        self._say("points.why_full" if self._machine.full else "points.why_file")
        self._take_point(1)
        self._say("points.cow", change=self._sizes.change)
        for number in (2, 3):
            before = self._shell.status()["diff_area"]["used"]
            self._stage.change(number)
            used = self._shell.status()["diff_area"]["used"]
            self._insist(used > before, "no_copies")
            self._note("points.copied", size=format_size(used - before))
            self._take_point(number)
        self._run("vsnapfs recovery-point list vol1")
        self._run("vsnapfs status vol1")

    def _run_out_of_room(self) -> None:
        area = self._shell.status()["diff_area"]
        self._narrator.chapter("full.title")
        self._say(
            "full.why",
            data=f"{self._sizes.data} MiB",
            room=format_size(area["maximum"] - area["used"]),
        )
        # However fio takes it: whether the write was refused is for the volume to say.
        self._stage.backup(codes=None)
        fault = self._expect_fault()
        self._say(
            "full.what",
            written=format_size(self._stage.written()),
            offset=f"{fault['offset']:,}",
            block=fault["block"],
        )
        self._run("vsnapfs status vol1", codes=(3,))
        self._say("full.events")
        seen = [event["event_id"] for event in self._shell.events()]
        self._insist(87 in seen, "no_event", event="volsnap 87")
        self._run(f"vsnapfs events vol1 | tail -n {3 if 140 in seen else 2}")
        self._say("full.event_140" if 140 in seen else "full.no_event_140")
        self._say("full.others")

    def _look_at_the_points(self) -> None:
        self._narrator.chapter("intact.title")
        self._run("head -c 1 mnt/replica.img", codes=(1,))
        self._say("intact.why")
        self._prove_points()
        self._stage.look_into(2, self._text("day2"))

    def _find_the_way_out(self) -> None:
        self._narrator.chapter("out.title")
        if self._machine.full:
            self._say("out.leave")
        self._stage.leave()
        self._say("out.online")
        self._insist(self._shell.status().get("would_fit") is False, "would_fit")
        fault = self._shell.status()["fault"]
        self._run("vsnapfs online vol1")
        self._say("out.try_it")
        before = self._checksum("vol1/replica.img")
        self._run(
            f"dd if=/dev/urandom of=mnt/replica.img bs={fault['length']} count=1 "
            f"seek={fault['offset']} oflag=seek_bytes conv=notrunc status=none",
            codes=(1,),
        )
        self._expect_fault()
        self._prove(self._checksum("vol1/replica.img") == before, "out.refused")
        total, old = self._sizes.resized, self._sizes.diff_area
        self._say("out.resize", total=total, old=old, more=total - old)
        self._run(f"vsnapfs resize vol1 --diff-area-size {total}MiB")
        self._run("vsnapfs online vol1")
        self._insist(self._shell.status()["state"] == "online", "not_online")
        self._say("out.later")

    def _work_again(self) -> None:
        self._narrator.chapter("again.title")
        self._say("again.full" if self._machine.full else "again.file")
        self._stage.come_back(unclean=True)
        self._say("again.backup")
        self._stage.backup(codes=(0,))
        self._note("again.written", size=format_size(self._stage.written()))
        self._take_point(4)
        self._run("vsnapfs status vol1")
        self._prove_points()

    def _restore(self) -> None:
        name = self._text("day2")
        self._narrator.chapter("restore.title")
        self._say("restore.why", name=name)
        self._stage.leave()
        self._run(f"vsnapfs recovery-point restore vol1 {name}")
        live = self._checksum("vol1/replica.img")
        self._prove(live == self._points[2], "restore.equal", name=name)
        self._say("restore.others")
        self._prove_points()
        if self._machine.full:
            self._stage.come_back(unclean=False)
            self._stage.show_live()

    def _export_and_delete(self) -> None:
        first, third = self._text("day1"), self._text("day3")
        self._narrator.chapter("export.title")
        self._say("export.why")
        self._run(f"vsnapfs recovery-point export vol1 {first} {first}.img")
        exported = self._checksum(f"{first}.img")
        self._prove(exported == self._points[1], "export.equal", name=first)
        self._say("export.delete", name=third)
        before = self._shell.status()["diff_area"]["used"]
        self._run(f"vsnapfs recovery-point delete vol1 {third}")
        del self._points[3]
        freed = before - self._shell.status()["diff_area"]["used"]
        self._note("export.freed", size=format_size(freed))
        self._prove_points()
        self._say("export.verify")
        done = self._shell.run("vsnapfs verify vol1", codes=(0, 5))
        self._prove(done.code == 0, "export.verified")

    def _put_away(self) -> None:
        self._narrator.chapter("end.title")
        self._stage.leave()
        self._run("vsnapfs umount vol1")
        self._say("end.said")
        if not self._machine.full:
            self._say("left_out", reason=self._machine.why_not)

    # -- steps ----------------------------------------------------------------------------------

    def _take_point(self, number: int) -> None:
        """Create a point while nothing writes, and note what a plain copy would have held."""
        label = self._text(f"day{number}")
        self._stage.freeze()
        told = self._run(f"vsnapfs recovery-point create vol1 --label {label}")
        self._insist(told.split() == [str(number)], "wrong_number", number=number)
        copied = self._checksum("vol1/replica.img")
        self._stage.thaw()
        # Else the proofs to come would prove nothing.
        self._insist(copied not in self._points.values(), "no_change")
        self._points[number] = copied

    def _prove_points(self) -> None:
        """Every point is, bit for bit, what the replica was when it was created."""
        names = [f"mnt/recovery-points/{number:04}.img" for number in self._points]
        found = self._checksums(f"sha256sum {' '.join(names)}")
        for (number, copied), name in zip(self._points.items(), names, strict=True):
            label = self._text(f"day{number}")
            self._prove(found.get(name) == copied, "exact", number=number, name=label)

    def _expect_fault(self) -> dict[str, Any]:
        status = self._shell.status()
        fault: dict[str, Any] | None = status["fault"]
        self._insist(status["state"] == "offline" and fault is not None, "still_online")
        assert fault is not None
        self._insist(
            fault["code"] == _FULL and fault["offset"] is not None,
            "other_fault",
            fault=f"{fault['code']} {fault['name']}",
        )
        return fault

    def _checksum(self, name: str) -> str:
        return self._checksums(f"sha256sum {name}")[name]

    def _checksums(self, command: str) -> dict[str, str]:
        """File name → SHA-256, read from the command's output."""
        found = {name: digest for digest, name in _SHA256.findall(self._run(command))}
        self._insist(bool(found), "no_checksum")
        return found

    # -- words ----------------------------------------------------------------------------------

    def _run(self, command: str, *, codes: tuple[int, ...] | None = (0,)) -> str:
        return self._shell.run(command, codes=codes).output

    def _say(self, key: str, **values: object) -> None:
        self._narrator.say(key, **values)

    def _note(self, key: str, **values: object) -> None:
        self._narrator.note(self._text(key, **values))

    def _text(self, key: str, **values: object) -> str:
        return self._narrator.text(key, **values)

    def _prove(self, is_true: bool, key: str, **values: object) -> None:
        """A claim that was made: shown as proved, or the end of the story."""
        told = self._text(key, **values)
        if not is_true:
            raise StoryError(self._text("disproved", claim=told))
        self.proofs += 1
        self._narrator.proof(told)

    def _insist(self, is_true: bool, key: str, **values: object) -> None:
        """Something the story rests on."""
        if not is_true:
            raise StoryError(self._text(key, **values))
