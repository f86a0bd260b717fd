"""What stands on the volume, and how it is written to.

Two stages for one story: `FullStage` is an ext4 on a loop device over the live replica (root);
`FileStage` writes to the replica's file in the mounted tree, for everybody else. Each owns the
command lines that differ. The chapters, and all proofs, belong to `story`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from vsnapfs.demo.narrator import Narrator
from vsnapfs.demo.shell import Done, Shell

_FIO = "fio --output=fio.json --output-format=json --refill_buffers"
# It asks for its data to be on the disk now and then, as a backup does.
_BACKUP = "--bs=64k --rw=randwrite --direct=1 --fdatasync=4 --randseed=99"


@dataclass(frozen=True)
class Sizes:
    """In MiB. resized: the diff area's later total; data: what a backup overwrites."""

    replica: int
    diff_area: int
    resized: int
    data: int
    change: int


FAST = Sizes(replica=64, diff_area=12, resized=80, data=24, change=2)
WHOLE = Sizes(replica=256, diff_area=32, resized=192, data=64, change=6)


class Stage:
    """What both have in common: the replica as a file, and fio."""

    #: Where fio writes.
    target = ""
    #: What fio needs besides, to play the backup.
    backup_options = ""

    def __init__(self, shell: Shell, narrator: Narrator, sizes: Sizes) -> None:
        self._shell = shell
        self._narrator = narrator
        self._sizes = sizes

    def prepare(self) -> None:
        """Build what stands on the volume, with the first data in it."""
        raise NotImplementedError

    def change(self, number: int) -> None:
        """A day's changes; `number` counts days from 1."""
        raise NotImplementedError

    def freeze(self) -> None:
        """Nothing may change from here on, until `thaw`."""

    def thaw(self) -> None:
        """See `freeze`."""

    def backup(self, *, codes: tuple[int, ...] | None) -> Done:
        """The nightly job that overwrites all data in place. codes: see Shell.run."""
        return self._fio("backup", f"{_BACKUP}{self.backup_options}", codes=codes)

    def look_into(self, number: int, name: str) -> None:
        """Show what is inside a recovery point."""
        raise NotImplementedError

    def leave(self) -> None:
        """Let go of the replica."""

    def come_back(self, *, unclean: bool) -> None:
        """Use the replica again. unclean: it was cut off, as by a power failure."""

    def show_live(self) -> None:
        """Show what the live volume holds."""

    def _fio(
        self, name: str, options: str, *, codes: tuple[int, ...] | None = (0,), size: str = ""
    ) -> Done:
        size = size or f"--size={self._sizes.data}m"
        return self._shell.run(
            f"{_FIO} --name={name} --filename={self.target} {size} {options}", codes=codes
        )

    def written(self) -> int:
        """Bytes that the last fio could write, by its own report."""
        # With errors, fio puts lines of text before the JSON.
        report = (self._shell.directory / "fio.json").read_text(encoding="utf-8")
        jobs: list[Mapping[str, Mapping[str, int]]]
        jobs = json.loads(report[report.index("{") :])["jobs"]
        return sum(job["write"]["io_bytes"] for job in jobs)


class FullStage(Stage):
    """ext4 on a loop device."""

    target = "files/database"
    # fio would stop at the first refused write. So it goes on to its next flush, which ext4 passes
    # on to the device and gets EIO for: that is what NTFS's event 140 is about.
    backup_options = " --ignore_error=,ENODEV --error_dump=1"

    def prepare(self) -> None:
        """Attach, mkfs, mount, and the data."""
        say, run = self._narrator.say, self._shell.run
        say("full.attach")
        self._device = run("vsnapfs attach vol1").output.split()[-1]
        # Everything at once, so that no kernel thread writes later what the story does not show.
        run(f"mkfs.ext4 -q -E lazy_itable_init=0,lazy_journal_init=0,nodiscard {self._device}")
        self._mount()
        say("full.files")
        run(f"echo '{self._report(1)}' > files/report.txt")
        self._fio("database", "--rw=write --bs=1m --end_fsync=1 --randseed=1")
        run("ls -l files")

    def change(self, number: int) -> None:
        """Another report, and some of the database's blocks."""
        self._shell.run(f"echo '{self._report(number)}' > files/report.txt")
        self._fio(
            "changes",
            f"--rw=randwrite --bs=16k --io_size={self._sizes.change}m --end_fsync=1 "
            f"--randseed={number}",
        )

    def freeze(self) -> None:
        """Let ext4 write everything, and hold it there."""
        self._shell.run("fsfreeze --freeze files")

    def thaw(self) -> None:
        """Let ext4 go on."""
        self._shell.run("fsfreeze --unfreeze files")

    def look_into(self, number: int, name: str) -> None:
        """Mount the point read-only and show its report."""
        self._narrator.say("full.look_into", name=name)
        self._shell.run(
            f"mkdir -p point && mount -o loop,ro,noload mnt/recovery-points/{number:04}.img point"
        )
        self._shell.run("cat point/report.txt")
        self._shell.run("umount point")

    def leave(self) -> None:
        """Unmount and detach."""
        self._shell.run("umount files")
        self._shell.run("vsnapfs detach vol1")

    def come_back(self, *, unclean: bool) -> None:
        """Attach afresh, check, mount."""
        self._device = self._shell.run("vsnapfs attach vol1").output.split()[-1]
        if unclean:
            # 1: it had to repair something, which after a fault is the journal's business.
            self._shell.run(f"e2fsck -p {self._device}", codes=(0, 1))
        self._shell.run(f"e2fsck -f -n {self._device}")
        self._mount()

    def show_live(self) -> None:
        """The report."""
        self._shell.run("cat files/report.txt")

    def _mount(self) -> None:
        # commit=60: ext4 writes its log every 5 s else. If that fell between the refused write and
        # fio's next flush, ext4 would give up first, and no flush would reach the device.
        self._shell.run(f"mkdir -p files && mount -o commit=60 {self._device} files")

    def _report(self, number: int) -> str:
        return self._narrator.text("report", day=self._narrator.text(f"day{number}"), n=number * 7)


class FileStage(Stage):
    """The replica as a file in the mounted tree: nothing but fio needed."""

    target = "mnt/replica.img"

    def prepare(self) -> None:
        """The data."""
        self._narrator.say("file.prepare")
        self._fio("database", "--rw=write --bs=1m --end_fsync=1 --randseed=1")

    def change(self, number: int) -> None:
        """Some of the data's blocks."""
        self._fio(
            "changes",
            f"--rw=randwrite --bs=16k --io_size={self._sizes.change}m --end_fsync=1 "
            f"--randseed={number}",
        )

    def look_into(self, number: int, name: str) -> None:
        """Only root can mount it; its first bytes are there for everybody."""
        self._narrator.say("file.look_into", name=name)
        self._shell.run(f"od -A d -t x1 -N 32 mnt/recovery-points/{number:04}.img")
