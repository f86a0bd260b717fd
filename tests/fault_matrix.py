"""The fault matrix: what each cause does, what is left, how to get out, and which test says so.

Owns the one table behind docs/faults.md. `tests/t2_failures/test_fault_matrix.py` checks that every
fault has its rows, that the tests named exist and speak of that fault, and that the page is what
is rendered here. `python tests/fault_matrix.py` writes the page anew.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "faults.md"
BEGIN, END = "<!-- the tables: begin -->", "<!-- the tables: end -->"

REAL = "tests/t4_mount/test_faults_real.py::"
OPEN = "tests/t4_mount/test_faults_at_open.py::"
HOST = "tests/t4_mount/test_faults_dead_host.py::"
HERE = "tests/t2_failures/test_fault_matrix.py::"
STALLS = "tests/t2_failures/test_stalls.py::"
MEMORY = "tests/t4_mount/test_memory.py::"

ENODEV = "`ENODEV`"
AT_OPEN = "`ENODEV` at open"
ALL = "all points"
REMOUNT = "unmount the volume, mend the host, mount, `online`"
UNMOUNTED = "all points, by `list`, `verify` and `export`, while it is not mounted"
NOT_ON_DISK = "nothing of the diff area until it is back"


@dataclass(frozen=True)
class Row:
    """One cause. fault, event: 0 and the id that is logged instead, where it is no fault."""

    fault: int
    cause: str
    seen: str
    event: int
    works: str
    out: str
    test: str
    #: The kernel does not give this cause on demand: it is injected below the engine.
    injected: bool = False
    #: Where it is no fault: what becomes of the volume.
    state: str = "offline"


FAULTS = (
    Row(1, "the file was moved away before mounting", AT_OPEN, 80, NOT_ON_DISK,
        "bring it back and mount: online by itself", OPEN + "test_a_missing_diff_area"),
    Row(2, "its host file system has shut down (EIO) when the volume is opened", AT_OPEN, 81,
        NOT_ON_DISK, REMOUNT, HOST + "test_a_dead_host_found_at_mount"),
    Row(3, "a flipped byte in both superblocks", AT_OPEN, 82, "the replica's file on the host",
        "put a good copy of the same state back, else give up the points",
        OPEN + "test_both_superblocks_rotted"),
    Row(3, "the file was cut off inside its blocks", AT_OPEN, 82,
        "points, but for what was cut off (EIO)", "`repair` (reserves the space again), `online`",
        OPEN + "test_a_truncated_diff_area"),
    Row(3, "both copies of a descriptor sector are bad", AT_OPEN, 82,
        "what surely does not depend on the sector; the rest is EIO",
        "mount it again if its disk did not answer; else export what is left, give up the points",
        HERE + "test_both_copies_of_a_descriptor_sector_are_bad"),
    Row(4, "no memory while a copy is made", ENODEV, 83, ALL, "`online`",
        HERE + "test_an_exception_in_the_copy_path[no memory]", injected=True),
    Row(4, "no memory for the index when the volume is opened", AT_OPEN, 83,
        "the list of points, deleting one; reading them is `ENOMEM`",
        "mount with more memory, `online`", HERE + "test_no_memory_for_the_index",
        injected=True),
    Row(5, "`RLIMIT_AS`: the copy buffer cannot be mapped", ENODEV, 84, ALL,
        "lift the limit, `online`", HOST + "test_the_copy_buffer_cannot_be_mapped"),
    Row(6, "the replica's host file system has shut down (EIO): the old content cannot be read",
        ENODEV, 85, "points, as far as they have copies", REMOUNT,
        HOST + "test_the_old_content_cannot_be_read"),
    Row(7, "its host file system has shut down (EIO)", ENODEV, 86,
        "points, as far as they need no copy; the rest is EIO until it is mended", REMOUNT,
        HOST + "test_copies_cannot_be_written"),
    Row(7, "the barrier's sync fails", ENODEV, 86, ALL, "`online`",
        HERE + "test_the_barrier_s_sync_fails", injected=True),
    Row(8, "more is overwritten than the maximum holds", ENODEV, 87, ALL,
        "`resize` or delete points, `online`", REAL + "test_a_full_diff_area"),
    Row(8, "the same on a block device", ENODEV, 87, ALL, "delete points, `online`",
        OPEN + "test_block_devices_as_replica_and_diff_area"),
    Row(9, "the host stalls (`fsfreeze`) while the area must grow", ENODEV, 88, ALL, "`online`",
        REAL + "test_growing_that_takes_too_long"),
    Row(10, "its host file system is full", ENODEV, 89, ALL, "free space there, `online`",
        REAL + "test_a_host_without_space_for_the_diff_area"),
    Row(10, "its tmpfs is full", ENODEV, 89, ALL, "enlarge the tmpfs, `online`",
        HOST + "test_a_tmpfs_without_space"),
    Row(10, "`RLIMIT_FSIZE`: the file may not grow", ENODEV, 89, ALL, "lift the limit, `online`",
        HOST + "test_a_limit_on_the_size_of_files"),
    Row(11, "an error nobody planned for in the copy path", ENODEV, 90, ALL, "`online`",
        HERE + "test_an_exception_in_the_copy_path[unplanned]", injected=True),
    Row(12, "`chattr +i`: it cannot be opened for writing", AT_OPEN, 91, UNMOUNTED,
        "`chattr -i`, mount, `online`", OPEN + "test_an_immutable_diff_area"),
    Row(12, "its host file system is read-only", AT_OPEN, 91, UNMOUNTED,
        "remount it read-write, mount, `online`", OPEN + "test_a_read_only_host_of_the_diff_area"),
    Row(12, "its host file system has no fallocate(2)", ENODEV, 91, ALL,
        "move the area to one that has", OPEN + "test_a_host_without_fallocate"),
    Row(12, "a pipe lies at its path", AT_OPEN, 91, NOT_ON_DISK,
        "put it back in its place, mount, `online`",
        OPEN + "test_what_is_not_this_volume_s_diff_area[pipe]"),
    Row(13, "a point is created when its host file system has shut down (EIO)",
        "all later I/O `ENODEV`", 92, "points, as far as they need no copy; the rest is EIO",
        REMOUNT, HOST + "test_the_superblock_cannot_be_written"),
    Row(13, "a sync of the replica fails", "`EIO` from that fsync, then `ENODEV`", 92,
        "points, as far as they have copies", REMOUNT, HOST + "test_a_flush_of_the_replica_fails"),
    Row(13, "the replica's file has been deleted (found by a flush, a new point)",
        "`EIO` from that fsync, then `ENODEV`", 92, ALL,
        "copy it back from `/proc/PID/fd` as `status` says, mount, `online`",
        HOST + "test_a_replica_that_was_deleted"),
    Row(13, "an in-place restore is interrupted by an I/O error", ENODEV, 92, ALL,
        "`online` goes on with the restore", HERE + "test_a_restore_is_interrupted",
        injected=True),
    Row(14, "the file was unlinked", ENODEV, 93, "all points, from the open file",
        "give up the points", REAL + "test_a_diff_area_that_is_taken_away[unlinked]"),
    Row(14, "the file was renamed", ENODEV, 93, "all points, from the open file",
        "put it back, `online`", REAL + "test_a_diff_area_that_is_taken_away[renamed]"),
    Row(14, "another file was put in its place", ENODEV, 93, "all points, from the open file",
        "put it back, `online`", REAL + "test_a_diff_area_that_is_taken_away[replaced]"),
    Row(14, "`umount -l` of its host file system", ENODEV, 93, "all points, from the open file",
        "mount the host again, `online`",
        REAL + "test_the_diff_area_s_file_system_is_unmounted[mounted again]"),
    Row(15, "somebody else wrote a superblock while we serve", "all later I/O `ENODEV`", 94,
        "points", "unmount, mount (it is read anew), verify, `online`",
        OPEN + "test_a_diff_area_changed_behind_our_back"),
    Row(15, "an old copy of it was put back", AT_OPEN, 94,
        "what surely was not changed since; the rest is EIO",
        "put the right one back, else give up the points",
        OPEN + "test_an_old_copy_of_the_diff_area_put_back"),
)  # fmt: skip

OTHERS = (
    Row(0, "the replica's host is full, a hole is written", "`ENOSPC`, nothing has moved", 1050,
        "everything", "free space there", REAL +
        "test_a_full_host_under_the_replica_is_no_protection_fault", state="online"),
    Row(0, "I/O error of the replica, no copy is needed", "`EIO`", 1050, "everything else",
        "mend the disk", HOST + "test_an_io_error_of_the_replica_is_no_protection_fault",
        state="online"),
    Row(0, "a preserved block fails its checksum", "nothing; its readers get `EIO`", 1040,
        "everything else, in all points", "`verify` lists it, export the rest",
        OPEN + "test_rot_in_one_preserved_block_harms_only_that", state="online"),
    Row(0, "one of two superblocks has rotted", "nothing", 1041, "everything",
        "nothing to do: healed", OPEN + "test_one_rotted_superblock_is_healed", state="online"),
    Row(0, "the server was killed (SIGKILL)", "`ENOTCONN` until it is mounted again", 1042,
        "everything", "`mount`", "tests/t4_mount/test_kill.py::"
        "test_ten_kills_under_fio_and_a_stamping_writer", state="as before"),
    Row(0, "policy `evict`, the area is full", "nothing", 33, "the points that are left",
        "`resize`", REAL + "test_policy_evict_gives_up_the_oldest_points", state="online"),
    Row(0, "policy `evict`, the area cannot grow", "nothing", 35, "the points that are left",
        "free space there", STALLS + "test_a_growth_that_fails_after_all_costs_the_oldest_point",
        state="online"),
    Row(0, "the host takes long to reserve space (`evict`: however long; `offline`: up to "
        "grow-timeout)", "waits", 1047, "everything", "look at the load of that disk",
        "tests/t4_mount/test_stalls_real.py::"
        "test_many_writes_wait_and_everything_else_is_answered", state="online"),
    Row(0, "policy `evict`, the area is taken away or fails", "nothing", 14,
        "the replica; no points, new ones are refused",
        "mend it; if it is lost: `offline`, give up the points",
        REAL + "test_policy_evict_goes_on_without_its_diff_area", state="online"),
    Row(0, "the administrator's `offline`", ENODEV, 1020, "as after a fault", "`online`",
        HERE + "test_taken_offline_by_hand", state="offline, no fault"),
    Row(0, "somebody else opens the replica's file for writing (dd, mkfs, losetup)", "nothing",
        1052, "everything; whatever was overwritten is missing from the points before it",
        "end it; use MOUNTPOINT/replica.img; take a new point",
        "tests/t4_mount/test_others.py::test_dd_is_told_of_and_remembered", state="online"),
)  # fmt: skip


def render() -> str:
    """Both tables, in Markdown."""
    lines = [
        "| fault | cause | the writer sees | event | what still works | way out | tested by |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in FAULTS:
        cause = row.cause + (" (injected)" if row.injected else "")
        lines.append(
            f"| {row.fault} {name_of(row.fault)} | {cause} | {row.seen} | {row.event} "
            f"| {row.works} | {row.out} | {_link(row.test)} |"
        )
    lines += [
        "",
        "No protection faults, though something went wrong:",
        "",
        "| cause | the writer sees | event | state | what still works | way out | tested by |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row.cause} | {row.seen} | {row.event} | {row.state} | {row.works} | {row.out} "
        f"| {_link(row.test)} |"
        for row in OTHERS
    ]
    return "\n".join(lines)


def name_of(fault: int) -> str:
    """The name of a fault, as `status` shows it."""
    from vsnapfs.errors import FaultCode

    return FaultCode(fault).name


def _link(test: str) -> str:
    path, _, name = test.partition("::")
    return f"[{name.removeprefix('test_').replace('[', ': ').rstrip(']')}](../{path})"


def source_of(test: str) -> str:
    """The source of the test that a node id names, its parameters included. KeyError if none."""
    path, _, name = test.partition("::")
    function, _, parameter = name.partition("[")
    text = (ROOT / path).read_text(encoding="utf-8")
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name == function:
            first = min([node.lineno, *(line.lineno for line in node.decorator_list)])
            source = "\n".join(text.splitlines()[first - 1 : node.end_lineno])
            if parameter and f'"{parameter.rstrip("]")}"' not in source:
                break
            return source
    raise KeyError(test)


def with_tables(page: str) -> str:
    """The page with the tables as they are now."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{render()}\n\n{END}{after}"


if __name__ == "__main__":
    import sys

    sys.path.insert(0, str(ROOT))
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
