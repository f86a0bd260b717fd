"""What `vsnapfs status` says about one volume, and the way out of each fault.

Owns the wording; works on the dict of `Volume.status()` alone, so it reads the same for mounted and
unmounted volumes. A missing key is shown as "?", never an error: the dict may come from another
version's server.
"""

from __future__ import annotations

import errno
import os
import shlex
from typing import Any

from vsnapfs.config import SLOW_GROWTH_SECONDS, shown
from vsnapfs.errors import FaultCode
from vsnapfs.units import format_size

# As many operations in the queue as are named; seconds from which a wait is worth a line.
_NAMED = 5
_LONG = 2.0

_MAKE_ROOM = (
    "Make room: vsnapfs resize {v} --diff-area-size TOTAL   (a total above {maximum})",
    "       or: vsnapfs recovery-point delete {v} oldest",
)
_FREE_HOST = (
    "Free space on the file system that holds {area}, so that it can grow,",
    "       or: vsnapfs recovery-point delete {v} oldest",
)
_CHECK_DISK = ("Look for disk errors in the log of this machine (dmesg); repair what it names.",)
# A host that cannot reserve refuses what it had promised: no disk is broken.
_NO_SPACE = ("Free space on the file system that holds the volume, or raise its quota.",)
_GIVE_UP = ("If it is lost for good: vsnapfs online {v} --give-up-recovery-points",)
_SAVE = ("Save what can be read: vsnapfs recovery-point export {v} POINT FILE",)
_BRING_BACK = ("Bring {area} back: mount its disk, or move the file to where it was.",)
_IN_THE_WAY = "If something else lies there: move it away, and bring back what was there."
_FREE_MEMORY = (
    "Free some memory, or raise the limit the process runs under.",
    "If it was offline from the mount on, unmount it and mount it again.",
)
_WAYS_OUT: dict[int, tuple[str, ...]] = {
    FaultCode.DIFF_AREA_MISSING: (*_BRING_BACK, *_GIVE_UP),
    FaultCode.IO_FAILURE_DURING_ONLINE: _CHECK_DISK,
    FaultCode.META_DATA_CORRUPTION: (
        "See what is damaged, and mend what can be mended: vsnapfs repair {v}",
        *_SAVE,
        *_GIVE_UP,
    ),
    FaultCode.MEMORY_ALLOCATION_FAILURE: _FREE_MEMORY,
    FaultCode.MAPPED_MEMORY_FAILURE: _FREE_MEMORY,
    FaultCode.COW_READ_FAILURE: _CHECK_DISK,
    FaultCode.COW_WRITE_FAILURE: _CHECK_DISK,
    FaultCode.DIFF_AREA_FULL: _MAKE_ROOM,
    FaultCode.GROW_TOO_SLOW: (
        "The diff area may still grow: try `online` again when the disk is less busy.",
        "If its host is always that slow: raise grow-timeout in volume.toml, mount anew.",
    ),
    FaultCode.GROW_FAILED: _FREE_HOST,
    FaultCode.DESTROY_ALL_SNAPSHOTS: (
        "This is a defect of vsnapfs: please report the event. No recovery point was destroyed.",
    ),
    FaultCode.FILE_SYSTEM_FAILURE: (
        "Make {area} writable again (permissions, chattr -i, a read-only mount).",
    ),
    FaultCode.IO_FAILURE: _CHECK_DISK,
    FaultCode.DIFF_AREA_REMOVED: (*_BRING_BACK, *_GIVE_UP),
    FaultCode.EXTERNAL_WRITER_TO_DIFF_AREA: (
        "Stop whoever else writes to {area}; unmount, so that it is read anew.",
        "See what is damaged: vsnapfs verify {v}",
        *_SAVE,
        *_GIVE_UP,
    ),
}

_DISK = (FaultCode.COW_WRITE_FAILURE, FaultCode.IO_FAILURE)


def sizes(area: dict[str, Any]) -> str:
    """The three sizes of a diff area, in words."""
    used, allocated, maximum = (area.get(k) for k in ("used", "allocated", "maximum"))
    share = f" ({100 * used // maximum} % used)" if used is not None and maximum else ""
    return f"used {size(used)}, allocated {size(allocated)}, maximum {size(maximum)}{share}"


def growth(area: dict[str, Any]) -> list[tuple[str, str]]:
    """A line about a growth that is under way, or about the last one if it took long."""
    told = area.get("growth") or {}
    seconds, last = told.get("seconds"), told.get("last_seconds")
    if seconds is not None:
        waiting = int(told.get("waiting") or 0)
        writes = "1 write waits" if waiting == 1 else f"{waiting} writes wait"
        return [("growing", f"for {seconds:.1f} s now" + (f"; {writes} for it" if waiting else ""))]
    if last is not None and last >= SLOW_GROWTH_SECONDS:
        return [("last growth", f"took {last:.1f} s: the disk that holds the diff area is slow")]
    return []


def size(value: Any) -> str:
    """A size for people, "?" when it is not known."""
    return format_size(value) if isinstance(value, int) else "?"


def state_word(status: dict[str, Any]) -> str:
    """The state in one cell of a table."""
    if status.get("error"):
        return "ERROR"
    fault = status.get("fault")
    if fault:
        return f"OFFLINE: {fault.get('name', '?')}"
    return str(status.get("state", "?"))


def headline(status: dict[str, Any]) -> str:
    """The volume and its state in one line."""
    name = shown(status["volume"])
    fault = status.get("fault")
    if fault:
        event = f"volsnap event {fault.get('event_id', '?')}"
        state = f"OFFLINE by fault {fault.get('code', '?')} {fault.get('name', '?')}, {event}"
    else:
        state = str(status.get("state", "?"))
    mountpoint = status.get("mountpoint")
    pid = status.get("pid")
    where = f"mounted on {shown(mountpoint)}" if mountpoint else "not mounted"
    return f"{name}: {state}; {where}{f' (process {pid})' if pid else ''}"


def facts(status: dict[str, Any]) -> list[tuple[str, str]]:
    """Everything worth knowing of a volume, without its fault."""
    replica = status.get("replica") or {}
    area = status.get("diff_area") or {}
    listed = [
        ("replica", f"{size(replica.get('size'))}, {shown(replica.get('path', '?'))}"),
        ("diff area", f"{sizes(area)}, {shown(area.get('path', '?'))}"),
        *growth(area),
        ("recovery points", _points(status)),
        ("on full", str(status.get("on_full", "?"))),
        ("durability", f"{status.get('durability', '?')}{_buffer(status)}"),
    ]
    if status.get("suspect_points"):
        listed.append(("SUSPECT", _suspect(int(status["suspect_points"]))))
    listed += _others("replica", replica) + _others("diff area", area)
    if status.get("unwatched"):
        listed.append(
            ("not watched", f"who else opens the files is not seen: {status['unwatched']}")
        )
    if status.get("fuse"):
        listed.append(("requests", _requests(status["fuse"])))
    if status.get("restoring"):
        listed.append(("restoring", "yes: the replica cannot be opened until it is done"))
    listed += _operations(status.get("operations") or {})
    if status.get("dead_mount"):
        place = status["dead_mount"]
        remedy = f"to clean up: vsnapfs umount {typed(place)}"
        listed.append(("dead mount", f"{shown(place)}: its process has died; {remedy}"))
    listed += [("trouble", str(status["trouble"]))] if status.get("trouble") else []
    listed += [("warning", str(text)) for text in status.get("warnings") or []]
    if status.get("consistent") is not None:
        listed.append(("consistent", "yes" if status["consistent"] else "NO"))
    if status.get("state") == "offline" and not status.get("fault"):
        listed.append(("next", f"vsnapfs online {typed(status['volume'])}"))
    return listed


def _operations(operations: dict[str, Any]) -> list[tuple[str, str]]:
    """What is under way, who waits for it, and what the volume waits for on its host."""
    running, waiting = operations.get("running"), operations.get("waiting") or []
    listed = []
    if running:
        begun = "" if running.get("begun") else ", not begun yet"
        listed.append(("under way", f"{_timed(running)}{begun}"))
    if waiting:
        more = [f"and {len(waiting) - _NAMED} more"] if len(waiting) > _NAMED else []
        listed.append(("in the queue", "\n".join([*map(_timed, waiting[:_NAMED]), *more])))
    # What has only just begun to be waited for is everyday work.
    waits = [w for w in operations.get("waits_for") or [] if w.get("seconds", 0) >= _LONG]
    if waits:
        listed.append(("WAITS FOR", "\n".join(dict.fromkeys(map(_timed, waits)))))
    return listed


def _timed(entry: dict[str, Any]) -> str:
    seconds = entry.get("seconds")
    lasting = f", for {seconds:.0f} s" if isinstance(seconds, int | float) else ""
    return f"{entry.get('what', '?')}, since {str(entry.get('since', '?'))[:19]}Z{lasting}"


def _buffer(status: dict[str, Any]) -> str:
    buffer = status.get("write_buffer") or {}
    if status.get("state") == "closed":
        return ""  # `trouble` says what became of it.
    if buffer.get("state") == "off":
        return f"; no write buffer: {buffer.get('reason', '?')}"
    if not buffer.get("writes"):
        return "; nothing in the write buffer"
    stuck = "; they wait for `online`" if buffer.get("state") == "stuck" else ""
    return f"; {buffer['writes']} writes ({size(buffer.get('used'))}) in the write buffer{stuck}"


def _suspect(count: int) -> str:
    points = "1 recovery point" if count == 1 else f"{count} recovery points"
    what = "a power failure, or a failed sync of the diff area, with durability process"
    return f"{points} lived through {what} and may be wrong"


def _others(what: str, file: dict[str, Any]) -> list[tuple[str, str]]:
    """Who uses a file of the volume beside vsnapfs: what was noticed, and loop devices."""
    listed = []
    others = file.get("others")
    if others:
        words = f"the {what} has been open for writing to others since {others.get('since', '?')}"
        if others.get("writers"):
            words += f", and is now to {', '.join(map(shown, others['writers']))}"
        missing = others.get("suspect_points")
        if missing:
            points = "1 recovery point" if missing == 1 else f"{missing} recovery points"
            words += f"; whatever they overwrote is missing from {points}"
        listed.append(("OTHERS", words))
    for loop in file.get("loop_devices") or []:
        words = f"{shown(loop.get('device', '?'))} is on {shown(file.get('path', '?'))} itself"
        words += ", read-only" if loop.get("read_only") else ""
        if loop.get("mounts"):
            words += f", mounted on {', '.join(map(shown, loop['mounts']))}"
        listed.append(("LOOP DEVICE", words))
    return listed


def _points(status: dict[str, Any]) -> str:
    number = status.get("recovery_points")
    if number is None:  # The diff area is not open.
        return "?"
    oldest, latest = status.get("oldest"), status.get("latest")
    if not number or not oldest or not latest:
        return str(number)
    return f"{number}, from {oldest[:19]}Z" + (f" to {latest[:19]}Z" if number != 1 else "")


def _requests(fuse: dict[str, Any]) -> str:
    """How requests come in, and how many the kernel keeps under way."""
    loop = f"{fuse.get('loop', '?')} loop" + (f" ({fuse['note']})" if fuse.get("note") else "")
    background = fuse.get("max_background")
    many = "?" if background is None else background
    return f"{loop}, {many} in the background, read-ahead {size(fuse.get('read_ahead'))}"


def fault_facts(status: dict[str, Any]) -> list[tuple[str, str]]:
    """What happened, to what, and how to get out of it."""
    fault = status["fault"]
    listed = [("what happened", str(fault.get("message", "?")))]
    listed.append(("when", str(fault.get("time", "?"))))
    if fault.get("block") is not None:
        block = f"block {fault['block']}"
        if fault.get("offset") is not None and fault.get("length") is not None:
            block += f", a write of {size(fault['length'])} at byte {fault['offset']}"
        listed.append(("the write", block))
    if fault.get("errno"):
        listed.append(("error", os.strerror(int(fault["errno"]))))
    if fault.get("maximum") is not None:
        listed.append(("sizes then", sizes(fault)))
    if status.get("would_fit") is False:
        listed.append(("now", "the write that tripped the fault would still not fit"))
    listed.append(("way out", "\n".join(way_out(status))))
    return listed


def way_out(status: dict[str, Any]) -> list[str]:
    """The steps that end a fault, one line each, with commands that can be pasted."""
    area = status.get("diff_area") or {}
    names = {
        "v": typed(status["volume"]),
        "area": shown(area.get("path") or "the diff area"),
        "maximum": size(area.get("maximum")),
    }
    steps = [line.format(**names) for line in _WAYS_OUT.get(status["fault"].get("code"), ())]
    code = status["fault"].get("code")
    if code in _DISK and status["fault"].get("errno") in (errno.ENOSPC, errno.EDQUOT):
        steps = list(_NO_SPACE)
    readable = "Until then every recovery point stays readable."
    closed = area.get("allocated") is None  # The area is not open: nothing can be read from it.
    if code == FaultCode.DIFF_AREA_MISSING:
        after = "Then unmount, if mounted, and mount again: the volume comes online by itself."
        readable = "Until then no recovery point can be read." if closed else readable
    elif code == FaultCode.FILE_SYSTEM_FAILURE and closed:
        steps.append(_IN_THE_WAY)
        after = "Then unmount, if mounted, mount again, and: vsnapfs online {v}"
        readable = "While it is not mounted, points can be exported, if the area is there."
    else:
        after = "Then: vsnapfs online {v}"
    return [*steps, after.format(**names), readable]


def typed(path: str) -> str:
    """A path as it must be typed into a shell."""
    return shlex.quote(shown(path))
