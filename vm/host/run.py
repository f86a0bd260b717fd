"""vm/run COMMAND…: run a command as root in the virtual machine."""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
import time

from host import qemu

EPILOG = """\
The command is run by bash in /src, a copy of the checkout as it is now (committed or not, without
what git ignores). `vsnapfs` and Debian's python3 are on its PATH. The root file system forgets
everything at the end; what is to stay goes to a data disk, /dev/vm/data, data2, ... in the guest.
Its output is streamed; its exit code is that of vm/run, 124 when it took too long, and 125 when
the machine itself failed.

examples:
  vm/run uname -a
  vm/run --data /tmp/disk.img:256MiB 'mkfs.ext4 -q /dev/vm/data && lsblk'
  vm/run python3 -m pytest -q tests/t0_formats
"""
UNITS = {"": 1, "K": 10, "M": 20, "G": 30}


def size_of(text: str) -> int:
    """Bytes of "512MiB", "64K", "1G", "4096"."""
    number = text.rstrip("iBKMG")
    unit = text[len(number) :].removesuffix("B").removesuffix("i")
    if not number.isdigit() or unit not in UNITS or int(number) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; one looks like 256MiB")
    return int(number) << UNITS[unit] if unit else int(number)


def data_disk(text: str) -> tuple[str, int]:
    """FILE:SIZE, or FILE alone if it exists."""
    path, colon, size = text.rpartition(":")
    if not colon:
        path = text
        if not os.path.exists(path):
            raise argparse.ArgumentTypeError(f"{path} does not exist; give its size: {path}:256MiB")
        return os.path.abspath(path), os.stat(path).st_size
    return os.path.abspath(path), size_of(size)


def parser() -> argparse.ArgumentParser:
    """What vm/run understands."""
    found = argparse.ArgumentParser(
        prog="vm/run",
        description="Run a command as root in the virtual machine that vm/build made.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    found.add_argument("command", nargs=argparse.REMAINDER, metavar="COMMAND", help="for bash")
    found.add_argument(
        "--data",
        action="append",
        default=[],
        type=data_disk,
        metavar="FILE[:SIZE]",
        help="attach FILE as a disk; it is made, sparse, if it is not there",
    )
    found.add_argument(
        "--cache",
        default="writeback",
        choices=("writeback", "writethrough", "none", "directsync", "unsafe"),
        help="QEMU's cache mode of the data disks (default: writeback, which honours flushes)",
    )
    found.add_argument("--cpus", type=int, default=2, help="virtual processors (default: 2)")
    found.add_argument("--memory", type=size_of, default=1 << 30, help="default: 1GiB")
    found.add_argument("--timeout", type=float, default=1800, help="seconds in all (default: 1800)")
    found.add_argument("--time", action="store_true", help="say at the end how long it took")
    return found


def main() -> int:
    """Run it; the exit code is the command's."""
    options = parser().parse_args()
    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    if not command:
        parser().error("what should be run?")
    # A command ended by a signal ends the machine as well.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    text = command[0] if len(command) == 1 else shlex.join(command)
    began = time.monotonic()
    try:
        boot = qemu.Boot(
            text,
            qemu.disks_from(options.data, options.cache),
            cpus=options.cpus,
            memory=options.memory >> 20,
        )
        with qemu.start(boot) as guest:
            started = time.monotonic()
            ended = guest.watch(started + options.timeout, qemu.forward)
            if not ended:
                print(f"vm/run: not done after {options.timeout:g} s", file=sys.stderr)
                print(guest.console(), file=sys.stderr)
                return 124
            guest.process.wait(30)
            code = guest.exit_code()
            if code is None:
                raise qemu.VmError(f"the guest ended on its own; its console:\n{guest.console()}")
    except (qemu.VmError, OSError) as error:
        print(f"vm/run: {error}", file=sys.stderr)
        return 125
    except KeyboardInterrupt:
        return 130
    if options.time:
        spent = time.monotonic() - began
        print(f"vm/run: {spent:.1f} s with {qemu.accelerator()}", file=sys.stderr)
    return code
