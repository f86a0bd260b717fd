"""vm/flakey: a diff area on a disk that drops, damages or refuses writes."""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
import time
from pathlib import Path

from host import qemu

CASES = ("rot", "corrupt-writes", "drop-copies", "drop-all", "error-writes")
EPILOG = """\
dm-flakey of the guest's stock kernel lies under the diff area. Every block of every recovery point
must then read back exactly or as EIO, and verify must notice:

  rot             bits flip on the disk; all is well again once they have flipped back
  corrupt-writes  one byte of each write is changed; also after opening the volume anew
  drop-copies     writes to some slots are dropped, but reported as done; also after opening anew
  drop-all        all writes are dropped; in the running volume only (see vm/README.md)
  error-writes    writes fail: the volume goes offline, the replica is untouched, the points exact

Needs vm/build.
"""


def main() -> int:
    """Boot once and do all cases or those named."""
    parser = argparse.ArgumentParser(
        prog="vm/flakey",
        description="Check that a bad disk under the diff area is noticed.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("cases", nargs="*", metavar="CASE", help="default: all")
    parser.add_argument("--timeout", type=float, default=1200, help="seconds (default: 1200)")
    options = parser.parse_args()
    if unknown := set(options.cases) - set(CASES):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; known are {', '.join(CASES)}")
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="vsnapfs-flakey-") as name:
        path = Path(name, "data")
        qemu.make_disk(path, 16 << 20)
        command = shlex.join(["python3", "vm/guest/flakey.py", *options.cases])
        boot = qemu.Boot(command, [qemu.Disk("data", str(path), "unsafe")])
        try:
            code = qemu.run(boot, options.timeout, qemu.forward)
        except qemu.VmError as error:
            print(f"vm/flakey: {error}", file=sys.stderr)
            return 125
        except KeyboardInterrupt:
            return 130
    verdict = "nothing read back wrong" if code == 0 else "WRONG, see above"
    print(f"{verdict}; {time.monotonic() - began:.0f} s")
    return code
