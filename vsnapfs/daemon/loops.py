"""Loop devices on the live replica.

Owns the calls of losetup(8). Promises that `attach_loop` never
makes a second device over one replica (two page caches over one image destroy file systems), and
that after `detach_loop` the device is really gone, not only marked to go.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from pathlib import Path

from vsnapfs.config import shown
from vsnapfs.errors import BusyError, VsnapError
from vsnapfs.openers import attached, backing_file

_SYS_BLOCK = Path("/sys/block")
# udev and its helpers open a new device for a moment; the kernel detaches when the last has left.
_DETACH_PATIENCE = 10.0


def loop_devices(mountpoint: Path) -> list[str]:
    """Loop devices whose backing file lies under `mountpoint`, e.g. ["/dev/loop0"].

    Asks only the kernel, never the file system: safe on a dead mount.
    """
    inside = f"{mountpoint}/"
    return [device for device, backing in attached() if backing.startswith(inside)]


def attach_loop(image: Path) -> str:
    """Attach MOUNTPOINT/replica.img with direct I/O; return the device, e.g. "/dev/loop0".

    VsnapError "not-root", "no-losetup", "offline"; BusyError if a device has it already.
    """
    _needs_root("attach")
    existing = [device for device, backing in attached() if backing == str(image)]
    if existing:
        raise BusyError(
            f"{shown(image)} is attached already, as {', '.join(existing)}",
            hint="One loop device over a replica is enough: two would not see each other's writes.",
        )
    device = _losetup("--find", "--show", "--direct-io=on", str(image)).strip()
    if not re.fullmatch(r"/dev/loop[0-9]+", device):
        raise VsnapError(f"losetup said {device!r} instead of a device")
    return device


def detach_loop(device: str) -> None:
    """Detach a loop device and wait until it is gone.

    BusyError while a file system or another device is on it.
    """
    _needs_root("detach")
    name = Path(device).name
    users = _users(name)
    if users:
        raise BusyError(
            f"{shown(device)} is in use by {', '.join(users)}",
            hint="Unmount it first; whatever is not yet written goes through on the way.",
        )
    before = backing_file(name)
    if before is None:
        raise VsnapError(f"{shown(device)} is not attached", code="not-attached")
    _losetup("--detach", device)
    give_up = time.monotonic() + _DETACH_PATIENCE
    while backing_file(name) == before:
        if time.monotonic() > give_up:
            raise BusyError(
                f"{shown(device)} is still in use by somebody",
                hint="It is detached as soon as its last user closes it. A mount in another "
                "mount namespace (a container) cannot be seen from here.",
            )
        time.sleep(0.02)


def _users(name: str) -> list[str]:
    """Mounts, swap and stacked devices on a loop device, in words."""
    try:
        number = (_SYS_BLOCK / name / "dev").read_text().strip()
        stacked = sorted(os.listdir(_SYS_BLOCK / name / "holders"))
    except OSError:
        return []
    parts = [entry.name for entry in (_SYS_BLOCK / name).glob(f"{name}p*")]
    from vsnapfs.daemon.mounts import all_mounts  # that module offers this one's functions too

    users = [
        f"the file system on {shown(mount.mountpoint)}"
        for mount in all_mounts()
        if mount.device == number
        or mount.source in (f"/dev/{name}", *(f"/dev/{part}" for part in parts))
    ]
    users += [f"/dev/{holder}" for holder in stacked]
    swap = re.compile(rf"^/dev/{name}(p[0-9]+)?[ \t]", re.MULTILINE)
    users += ["swap" for _ in swap.findall(_text(Path("/proc/swaps")))]
    return users


def _text(path: Path) -> str:
    try:
        return os.fsdecode(path.read_bytes())
    except OSError:
        return ""


def _needs_root(what: str) -> None:
    if os.geteuid() != 0:
        raise VsnapError(
            f"only root can {what} loop devices",
            hint="Try as root. Without root, use MOUNTPOINT/replica.img as a file.",
            code="not-root",
        )


def _losetup(*arguments: str) -> str:
    """Run losetup; its stdout. Root often has no /sbin in its PATH, so look there as well."""
    program = shutil.which("losetup") or shutil.which("losetup", path="/usr/sbin:/sbin")
    if program is None:
        raise VsnapError(
            "losetup is not installed", hint="It belongs to the package mount.", code="no-losetup"
        )
    done = subprocess.run(
        [program, *arguments], stdin=subprocess.DEVNULL, capture_output=True, text=True,
        errors="replace", env={**os.environ, "LC_ALL": "C"}, check=False,
    )  # fmt: skip
    if done.returncode == 0:
        return done.stdout
    reason = " ".join(done.stderr.split()).removeprefix("losetup: ")
    if "No such device" in reason and "--detach" not in arguments:
        raise VsnapError(
            f"cannot attach: the volume is offline ({reason})",
            hint="`vsnapfs status` shows why; `vsnapfs online` brings it back.",
            code="offline",
        )
    raise VsnapError(f"losetup failed: {reason or done.returncode}", code="losetup-failed")
