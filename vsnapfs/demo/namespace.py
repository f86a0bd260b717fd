"""A mount namespace of one's own, so that nobody else's copy of the mounts holds what we mount.

Whoever makes a mount namespace (a container, a service, `unshare --mount`) copies every mount that
it sees, and a mounted file system lives until its last copy is gone: a loop device cannot be
detached, a server does not end. A copy of what lies in a namespace of ours can only be made from
inside it. Promises that we hold nobody up either (what is unmounted outside is unmounted here as
far as mounts are shared; root lets go of volumes that were mounted before), and that a process that
cannot have one is left as it was. Loop devices and /dev/shm are everybody's as before.

For ordinary users it takes a user namespace, in which they stay who they are: it only lets their
mount(2) through, fusermount3's too, which has no root's rights there. They get no others.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
from contextlib import suppress
from pathlib import Path

from vsnapfs.daemon import mounts
from vsnapfs.errors import VsnapError

_CLONE_NEWNS = 0x00020000
_CLONE_NEWUSER = 0x10000000
_MS_REC = 0x4000
_MS_SLAVE = 1 << 19
_PR_CAP_AMBIENT = 47
_PR_CAP_AMBIENT_RAISE = 2
_CAP_SYS_ADMIN = 21
_CAPABILITY_VERSION = 0x20080522


def own_namespace(*keep: Path) -> str:
    """Give this process, and what it starts from now on, its own. "", or why that cannot be.

    keep: places that must stay reachable, whatever they lie on. To be called before there are
    threads: others stay where they are, and with any an ordinary user gets none.
    """
    try:
        _enter()
    except OSError as error:
        return os.strerror(error.errno or errno.EPERM)
    if os.geteuid() == 0:  # Users cannot: root's mounts in their namespace are locked.
        _let_go(keep)
    return ""


def _enter() -> None:
    try:
        _libc("unshare", _CLONE_NEWNS)
    except OSError as error:
        if os.geteuid() == 0 or error.errno != errno.EPERM:
            raise
        # Some systems give a user namespace and then no rights in it, and there is no way back.
        _try_out()
        _enter_as_user()
    # Slaves: unmounting reaches us from outside; nothing that we do reaches the outside.
    _libc("mount", None, b"/", None, ctypes.c_ulong(_MS_REC | _MS_SLAVE), None)


def _try_out() -> None:
    """`_enter_as_user` in a child. OSError as it had it."""
    child = os.fork()
    if child == 0:
        code = errno.EPERM
        try:
            _enter_as_user()
            _libc("mount", None, b"/", None, ctypes.c_ulong(_MS_REC | _MS_SLAVE), None)
            code = 0
        except OSError as error:
            code = error.errno or code
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code:
        raise OSError(code if code > 0 else errno.EPERM, "no user namespace")


def _enter_as_user() -> None:
    user, group = os.geteuid(), os.getegid()
    _libc("unshare", _CLONE_NEWUSER | _CLONE_NEWNS)
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{user} {user} 1"),
        ("gid_map", f"{group} {group} 1"),
    ):
        Path("/proc/self", name).write_text(text, encoding="ascii")
    # Programs that we start lose all rights in the namespace but those made ambient.
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION, 0)
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; twice 32 capabilities
    _libc("capget", ctypes.byref(header), ctypes.byref(sets))
    only = 1 << _CAP_SYS_ADMIN
    sets[0] = sets[1] = sets[2] = only
    sets[3] = sets[4] = sets[5] = 0
    _libc("capset", ctypes.byref(header), ctypes.byref(sets))
    words = (_PR_CAP_AMBIENT_RAISE, _CAP_SYS_ADMIN, 0, 0)
    _libc("prctl", _PR_CAP_AMBIENT, *map(ctypes.c_ulong, words))


def _let_go(keep: tuple[Path, ...]) -> None:
    """Unmount, here only, our copies of volumes and of what stands on their loop devices."""
    with suppress(OSError):
        keep += (Path.cwd(),)
    needed = [place.resolve() for place in keep]
    for mount in mounts.all_mounts()[::-1]:
        inside = any(mount.mountpoint in (place, *place.parents) for place in needed)
        if not inside and (mount.fstype == mounts.FSTYPE or _is_on_volume(mount.source)):
            with suppress(VsnapError):
                mounts.unmount_now(mount.mountpoint, lazy=True)


def _is_on_volume(source: str) -> bool:
    found = re.fullmatch(r"/dev/(loop\d+)(p\d+)?", source)
    if found is None:
        return False
    volumes = [mount.mountpoint for mount in mounts.find_mounts()]
    return any(f"/dev/{found[1]}" in mounts.loop_devices(place) for place in volumes)


def _libc(name: str, *arguments: object) -> None:
    """Call a function of the C library that answers -1 for an error. OSError."""
    if getattr(ctypes.CDLL(None, use_errno=True), name)(*arguments) == -1:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
