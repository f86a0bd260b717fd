"""One boot of the virtual machine: what it is made of, how it is started, watched and ended.

Owns: the QEMU command line, the choice between KVM and emulation, the tar that brings the checkout
and the command into the guest, and the process. Promises: QEMU is gone when a `Guest` is closed,
however that comes about (it is ended by its pid, and asks the kernel to be killed when its parent
dies); the root image is never written; nothing is left but the data disks that the caller named.
Leaves to others: what is run inside (vm/guest/), what is expected of it (vm/host/ besides this).
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import re
import selectors
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

ROOT = Path(__file__).resolve().parents[2]
QEMU = "qemu-system-x86_64"
MEMORY_MIB = 1024
# With KVM a stock kernel is up within a few seconds, or it does not boot here at all.
KVM_TRIAL = 25.0
BOOT_LIMIT = 180.0
KERNEL_OPTIONS = (
    "root=/dev/vda rw rootfstype=ext4 init=/usr/local/sbin/boot console=ttyS0 quiet panic=-1 "
    "random.trust_cpu=on mitigations=off"
)
# The lines of the serial console that are worth showing when something went wrong.
TAIL = 25


class VmError(Exception):
    """The machine could not be started, or did not end as it should."""


def cache_directory() -> Path:
    """Where vm/build puts the machine: $VSNAPFS_VM, or vm/.build."""
    return Path(os.environ.get("VSNAPFS_VM") or ROOT / "vm" / ".build")


def missing() -> str | None:
    """Why no machine can be started here, or None."""
    if not (cache_directory() / "stamp").exists():
        return f"there is no machine in {cache_directory()}: run vm/build first"
    if shutil.which(QEMU) is None:
        return f"{QEMU} is not installed: run vm/build first"
    return None


@dataclass(frozen=True)
class Disk:
    """A disk of the guest's, found there as /dev/vm/NAME.

    source: a raw file, or nbd+unix:///?socket=PATH. cache: QEMU's word for what it does with the
    host's page cache; "writeback" honours flushes, "unsafe" ignores them.
    """

    name: str
    source: str
    cache: str = "writeback"

    def arguments(self) -> list[str]:
        """What QEMU is told about it."""
        source = self.source.replace(",", ",,")
        return [
            "-drive",
            f"if=none,id={self.name},format=raw,cache={self.cache},file={source}",
            "-device",
            f"virtio-blk-pci,drive={self.name},serial={self.name}",
        ]


@dataclass
class Boot:
    """What to boot with."""

    command: str
    disks: list[Disk] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)  # name in /src → content
    cpus: int = 2
    memory: int = MEMORY_MIB  # MiB


def checkout_files() -> list[str]:
    """Names of what the guest gets to see of the checkout: all that git would, committed or not."""
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        found = subprocess.run(
            ["git", "-C", ROOT, "ls-files", "-z", "-co", "--exclude-standard"],
            capture_output=True,
            check=True,
            timeout=60,
        ).stdout.decode()
        return sorted({name for name in found.split("\0") if name and (ROOT / name).is_file()})
    names = []
    for directory, folders, files in os.walk(ROOT):
        folders[:] = [
            name for name in folders if not name.startswith(".") and name != "__pycache__"
        ]
        names += [str((Path(directory) / name).relative_to(ROOT)) for name in files]
    return sorted(names)


@functools.cache
def checkout() -> list[tuple[tarfile.TarInfo, bytes]]:
    """The checkout's files, read once: all boots of a script run the same code."""
    found = []
    with tarfile.open(os.devnull, "w") as tar:
        for name in checkout_files():
            info = tar.gettarinfo(ROOT / name, name)
            if info.isreg():
                found.append((info, (ROOT / name).read_bytes()))
                info.size = len(found[-1][1])
    return found


def pack(boot: Boot, target: Path) -> None:
    """Write the tar that the guest unpacks into /src. It ends on a sector, as a disk must."""
    files = {**boot.files, ".vm-command": boot.command.encode() + b"\n"}
    with tarfile.open(target, "w", format=tarfile.GNU_FORMAT) as tar:
        for info, content in checkout():
            tar.addfile(info, io.BytesIO(content))
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            info.mtime = int(time.time())
            tar.addfile(info, io.BytesIO(content))


class Guest:
    """A running machine; use it in a `with`.

    `out`, `err` and `code` receive what the guest sends as it comes (bytes, any cut).
    """

    def __init__(self, boot: Boot, accelerator: str) -> None:
        self.boot = boot
        self.started = time.monotonic()
        self._work = tempfile.TemporaryDirectory(prefix="vsnapfs-vm-")
        place = Path(self._work.name)
        pack(boot, place / "src.tar")
        self._console = place / "console"
        self._selector = selectors.DefaultSelector()
        self.code = b""
        writers = {}
        for port in ("out", "err", "code"):
            reader, writers[port] = os.pipe()
            self._selector.register(reader, selectors.EVENT_READ, port)
        try:
            self.process = subprocess.Popen(
                self._arguments(accelerator, place, writers),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                pass_fds=tuple(writers.values()),
            )
        except BaseException:
            self._close_files()
            raise
        finally:
            for writer in writers.values():
                os.close(writer)

    def _arguments(self, accelerator: str, place: Path, writers: dict[str, int]) -> list[str]:
        cache = cache_directory()
        processor = ["-cpu", "host"] if accelerator == "kvm" else ["-cpu", "max"]
        if accelerator == "tcg":
            accelerator = "tcg,thread=multi,tb-size=256"
        # setpriv becomes QEMU, which then dies with this script, however that ends.
        arguments = [
            "setpriv",
            "--pdeathsig",
            "KILL",
            QEMU,
            "-machine",
            "pc,graphics=off",
            "-accel",
            accelerator,
            *processor,
        ]
        arguments += ["-smp", str(self.boot.cpus), "-m", f"{self.boot.memory}M"]
        arguments += ["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
        arguments += ["-kernel", str(cache / "vmlinuz"), "-initrd", str(cache / "initrd")]
        arguments += ["-append", KERNEL_OPTIONS]
        arguments += ["-serial", f"file:{self._console}", "-device", "virtio-rng-pci"]
        arguments += ["-device", "virtio-serial-pci"]
        for port, fd in writers.items():
            arguments += ["-chardev", f"file,id={port},path=/dev/fd/{fd}"]
            arguments += ["-device", f"virtserialport,chardev={port},name={port}"]
        # What is written to the root goes to a temporary file that has no name.
        root = [
            *("-drive", f"if=none,id=root,format=raw,snapshot=on,file={cache / 'root.img'}"),
            *("-device", "virtio-blk-pci,drive=root,serial=root"),
        ]
        source = [
            *("-drive", f"if=none,id=src,format=raw,readonly=on,file={place / 'src.tar'}"),
            *("-device", "virtio-blk-pci,drive=src,serial=src"),
        ]
        arguments += root + source
        for disk in self.boot.disks:
            arguments += disk.arguments()
        return arguments

    def watch(self, until: float, received: Callable[[str, bytes], object]) -> bool:
        """Hand on what the guest sends, to the monotonic moment `until` or its end.

        `received` takes the port ("out" or "err") and the bytes; when it returns True, this
        returns False at once. Returns True when the guest has ended, False when the moment came.
        """
        while self._selector.get_map():
            left = until - time.monotonic()
            if left <= 0:
                return False
            for key, _ in self._selector.select(left):
                data = os.read(key.fd, 1 << 16)
                if not data:
                    self._selector.unregister(key.fd)
                    os.close(key.fd)
                elif key.data == "code":
                    self.code += data
                elif received(key.data, data) is True:
                    return False
        return True

    def kill(self) -> None:
        """The power fails: SIGKILL, and what was sent before it can still be watched."""
        self.process.kill()
        self.process.wait(30)

    def exit_code(self) -> int | None:
        """What the command ended with, or None while or if it never did."""
        text = self.code.decode(errors="replace").strip()
        return int(text) if text.isdigit() else None

    def console(self) -> str:
        """The end of the kernel's console and of what QEMU itself said."""
        text = self._console.read_text(errors="replace") if self._console.exists() else ""
        if self.process.poll() is not None and self.process.stderr is not None:
            with contextlib.suppress(ValueError):
                text += self.process.stderr.read().decode(errors="replace")
        # The BIOS clears the screen, which is not what the reader of a message wants.
        lines = re.sub(r"\x1b(\[[?0-9;]*[a-zA-Z]|c)|\r", "", text).splitlines()
        return "\n".join(lines[-TAIL:])

    def _close_files(self) -> None:
        for key in list(self._selector.get_map().values()):
            self._selector.unregister(key.fd)
            os.close(key.fd)
        self._selector.close()
        self._work.cleanup()

    def close(self) -> None:
        """End it if it still runs."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(30)
        if self.process.stderr is not None:
            self.process.stderr.close()
        self._close_files()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def accelerator() -> str:
    """Say kvm if it really boots the machine's kernel, else tcg: tried once, then remembered.

    /dev/kvm may be there and not do: a guest inside a guest often cannot run a stock kernel.
    $VSNAPFS_VM_ACCELERATOR (kvm or tcg) decides instead.
    """
    wanted = os.environ.get("VSNAPFS_VM_ACCELERATOR")
    if wanted:
        if wanted not in {"kvm", "tcg"}:
            raise VmError(f"VSNAPFS_VM_ACCELERATOR is {wanted!r}, not kvm or tcg")
        return wanted
    note = cache_directory() / "accelerator"
    with contextlib.suppress(OSError):
        known = note.read_text().split()
        # Another kernel on the host, another answer.
        if len(known) == 2 and known[0] in {"kvm", "tcg"} and known[1] == os.uname().release:
            return known[0]
    answer = "kvm" if os.access("/dev/kvm", os.R_OK | os.W_OK) and _boots_with_kvm() else "tcg"
    with contextlib.suppress(OSError):
        note.write_text(f"{answer} {os.uname().release}\n")
    return answer


def _boots_with_kvm() -> bool:
    print("== trying KVM, once", file=sys.stderr, flush=True)
    with Guest(Boot("exit 42"), "kvm") as guest:
        ended = guest.watch(time.monotonic() + KVM_TRIAL, lambda _port, _data: None)
        return ended and guest.exit_code() == 42


def start(boot: Boot) -> Guest:
    """Start the machine; VmError says what is missing."""
    reason = missing()
    if reason is not None:
        raise VmError(reason)
    return Guest(boot, accelerator())


def run(boot: Boot, limit: float, received: Callable[[str, bytes], object]) -> int:
    """Boot, run the command, return its exit code. VmError if the guest fails or takes too long."""
    with start(boot) as guest:
        if not guest.watch(time.monotonic() + limit, received):
            raise VmError(
                f"the guest took longer than {limit:g} s; its console:\n{guest.console()}"
            )
        guest.process.wait(30)
        code = guest.exit_code()
        if code is None:
            raise VmError(f"the guest ended without an exit code; its console:\n{guest.console()}")
        return code


def forward(port: str, data: bytes) -> None:
    """Pass on what the guest's command prints."""
    stream = sys.stdout if port == "out" else sys.stderr
    stream.buffer.write(data)
    stream.buffer.flush()


def make_disk(path: Path, size: int) -> None:
    """An empty sparse raw image of `size` bytes, unless one of that size is there."""
    if not path.exists():
        with path.open("xb") as file:
            file.truncate(size)
    elif path.stat().st_size != size:
        raise VmError(f"{path} is there and has {path.stat().st_size} bytes, not {size}")


def disks_from(paths: Iterable[tuple[str, int]], cache: str) -> list[Disk]:
    """Disks data, data2, … of (file, size in bytes), made if they are not there."""
    disks = []
    for number, (path, size) in enumerate(paths, start=1):
        make_disk(Path(path), size)
        disks.append(Disk("data" if number == 1 else f"data{number}", path, cache))
    return disks
