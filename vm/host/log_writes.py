"""vm/log-writes: replay everything a disk was told, to every flush, and check the volume there."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from host import qemu

EPILOG = """\
dm-log-writes of the guest's stock kernel lies under the ext4 that holds replica and diff area. A
workload of STEPS writes, flushes, points created and deleted, and resizes is logged; the log is
then replayed to every flush, and the volume is opened and checked as after a power failure at just
that instant. States between two flushes are not part of it: see vm/power-fail. Needs vm/build.
"""


def parser() -> argparse.ArgumentParser:
    """What vm/log-writes understands."""
    found = argparse.ArgumentParser(
        prog="vm/log-writes",
        description="Check the volume at every flush that its disk was given.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    found.add_argument("--steps", type=int, default=60, help="of the workload (default: 60)")
    found.add_argument("--every", type=int, default=1, help="check every Nth flush (default: 1)")
    found.add_argument("--seed", type=int, default=int(time.time()) % 10**6)
    found.add_argument("--timeout", type=float, default=3600, help="seconds (default: 3600)")
    return found


def main() -> int:
    """Boot once and do it; 0 if every state was good."""
    options = parser().parse_args()
    began = time.monotonic()
    print(f"seed {options.seed}", flush=True)
    command = f"python3 vm/guest/log_writes.py {options.seed} {options.steps} {options.every}"
    with tempfile.TemporaryDirectory(prefix="vsnapfs-log-writes-") as name:
        sizes = {"data": 48 << 20, "log": 1 << 30, "replay": 48 << 20}
        disks = []
        for disk, size in sizes.items():
            qemu.make_disk(Path(name, disk), size)
            # Power does not fail here, so the host need not sync what the guest flushes.
            disks.append(qemu.Disk(disk, str(Path(name, disk)), "unsafe"))
        try:
            code = qemu.run(qemu.Boot(command, disks), options.timeout, qemu.forward)
        except qemu.VmError as error:
            print(f"vm/log-writes: {error}", file=sys.stderr)
            return 125
        except KeyboardInterrupt:
            return 130
    verdict = "every state is good" if code == 0 else "WRONG, see above"
    print(f"{verdict}; {(time.monotonic() - began) / 60:.1f} min, seed {options.seed}")
    return code
