"""What the demo says in English. The keys and placeholders are those of `text_ja`."""

from __future__ import annotations

TEXT = {
    "title": "vsnapfs: the day the recovery points were not lost",
    "opening": (
        "A backup server keeps a replica of somebody's data, and recovery points of earlier "
        "days. Each night's backup overwrites the replica; what it overwrites is first copied "
        "into a separate, limited place, the diff area. One night that place is full. Then there "
        "are two possibilities: lose the history, or stop the backup. Nearly everything loses "
        "the history. Windows has a mode that stops, made for Data Protection Manager (DPM): the "
        "ShadowCopy Protection mode. This is that mode on Linux, and here is such a night."
    ),
    "place": (
        "Everything you will see is real: every command runs on this machine just as it is "
        "shown, in {place}, which is removed afterwards, also after Ctrl-C. Enter skips a pause."
    ),
    "own_mounts": (
        "Its mounts are in a mount namespace of their own: other programs neither see nor hold "
        "them. (Else a container or service that starts meanwhile would copy all mounts, and keep "
        "a loop device busy until it ends.)"
    ),
    "shared_mounts": (
        "This system gives no mount namespace of its own here ({reason}). So a container or a "
        "service that starts meanwhile copies the demo's mounts and can hold them: then a step "
        "fails with “in use”."
    ),
    "left_out": (
        "Left out here: the loop device with an ext4 file system on it, and looking at the files "
        "inside recovery points, because {reason}. The same story is told on the volume's file, "
        "with fio writing to it directly."
    ),
    "why_no_root": "that takes root",
    "why_no_loop": "this machine gives no loop device ({reason})",
    # -- the volume
    "volume.title": "A volume",
    "volume.why": (
        "A volume is a replica, the live image, and a diff area of its own, limited in size. In "
        "DPM's words these are the replica volume and the recovery point volume. The diff area "
        "is small on purpose: tonight it shall run out."
    ),
    "volume.tree": (
        "replica.img is the live image. Recovery points will appear beside it, each as a "
        "read-only image of its own."
    ),
    # -- the data
    "data.title": "Data on it",
    "full.attach": (
        "To Linux the replica is a disk: a loop device over it, and an ordinary ext4 on that."
    ),
    "full.files": (
        "Two files: a report of a line, and a database that fio fills. From here on, think of "
        "this as the copy of a server that is backed up every night."
    ),
    "file.prepare": (
        "fio fills a part of the replica. From here on, think of this as the copy of a server "
        "that is backed up every night."
    ),
    "report": "{day}: {n} orders",
    "day1": "Monday",
    "day2": "Tuesday",
    "day3": "Wednesday",
    "day4": "Thursday",
    # -- points
    "points.title": "Three days, three recovery points",
    "points.why_full": (
        "Before a recovery point, the file system is frozen for a moment, so that everything is "
        "on the disk and nothing changes. While it is, the plain file below is read past "
        "vsnapfs, and its checksum noted: this is what an ordinary copy of that moment holds. "
        "All later proofs are against it."
    ),
    "points.why_file": (
        "Right after each recovery point, while nobody writes, the plain file below is read past "
        "vsnapfs, and its checksum noted: this is what an ordinary copy of that moment holds. "
        "All later proofs are against it."
    ),
    "points.cow": (
        "That took no copy of anything. Only now, when a block is overwritten for the first time "
        "since the point, its old content is saved first (copy-on-write). Tuesday and Wednesday "
        "each change about {change} MiB:"
    ),
    "points.copied": (
        "The diff area has grown by {size}: the old content, in whole blocks of 16 KiB."
    ),
    # -- full
    "full.title": "The night the diff area is too small",
    "full.why": (
        "Now a backup that overwrites all {data} of the data in place, as after a reorganised "
        "database. To keep the past, as much would have to be copied, and there is room for "
        "{room}. fio plays the backup; every fourth write it asks for a flush, as anybody who "
        "wants the data on the disk does."
    ),
    "full.what": (
        "The job has failed, after {written}. The write at byte {offset} hit block {block}, "
        "whose old content no longer fitted into the diff area. So the write was refused, before "
        "a single byte of it had moved, and the volume went offline: all that came after was "
        "refused as well."
    ),
    "full.events": (
        "Windows reports this as event 87 of volsnap, without a size, a place or a way out. The "
        "ids here are the real ones; the rest an administrator need not go looking for:"
    ),
    "full.event_140": (
        "Event 140 is what NTFS says next: it could not flush its log. Here, too, it stands for "
        "a flush that really arrived at the volume and failed, as fio has just told."
    ),
    "full.no_event_140": (
        "NTFS would add its event 140: a flush of its log failed. Here none is shown, because no "
        "flush has reached the volume since it went offline; nothing is logged that did not "
        "happen."
    ),
    "full.others": (
        "A snapshot of dm-snapshot or LVM would have been dropped at this point, and the write "
        "would have gone through: the backup in order, Monday to Wednesday gone."
    ),
    # -- intact
    "intact.title": "Offline, and nothing lost",
    "intact.why": (
        "The live replica is closed to everybody. The recovery points are not. Are they still "
        "what they were, bit for bit? Compare with the checksums of the plain copies:"
    ),
    "exact": "recovery point {number} “{name}” is exactly the copy of that moment",
    "full.look_into": (
        "And a checksum is a checksum; here are the files of {name}, mounted read-only while the "
        "volume is offline:"
    ),
    "file.look_into": "The first bytes of {name}, readable while the volume is offline:",
    # -- the way out
    "out.title": "The way out",
    "out.leave": (
        "The file system has missed a write and cannot be trusted further: it is unmounted, the "
        "loop device detached. Whatever was open during the fault stays dead, on purpose."
    ),
    "out.online": (
        "DPM now brings the volume online again by itself, at once (here that will come with the "
        "backup jobs, later; so: by hand). It works, but it enlarges nothing:"
    ),
    "out.try_it": "Is the warning right? The same write once more, at the same place:",
    "out.refused": "refused again, and the replica is byte for byte what it was before",
    "out.resize": (
        "So make room. As in DPM, one enters the new total, not the increment: {total} MiB, "
        "where there were {old}. ({more} MiB would be the classic mistake.) It works while the "
        "volume is offline, and while the diff area is full."
    ),
    "out.later": (
        "No warning this time. One step of the original is only told here, since it comes later: "
        "after such a night DPM holds the replica for inconsistent until a consistency check has "
        "compared it with the source. The backup that now runs again overwrites everything, "
        "which comes to the same."
    ),
    # -- again
    "again.title": "The backup, once more",
    "again.full": (
        "A fresh loop device, and ext4 finds itself as after a power failure: its journal is "
        "replayed, then everything is checked."
    ),
    "again.file": "The replica's file can be opened again.",
    "again.backup": "The same job as before:",
    "again.written": "{size} written, no error.",
    # -- restore
    "restore.title": "Back to an earlier day",
    "restore.why": (
        "Restoring in place makes the live replica what it was on {name}. What it overwrites is "
        "preserved as well, so the newer points stay: one can go back and forth."
    ),
    "restore.equal": "the live replica is exactly “{name}”",
    "restore.others": "And the recovery points, older and newer ones?",
    # -- export
    "export.title": "Export, delete, verify",
    "export.why": (
        "A recovery point becomes a plain image file that needs no vsnapfs, checked on the way:"
    ),
    "export.equal": "the exported file is exactly “{name}”",
    "export.delete": (
        "Deleting a point in the middle, {name}, frees what only that one needs. The others do "
        "not notice:"
    ),
    "export.freed": "{size} of the diff area are free again.",
    "export.verify": (
        "Every preserved block carries a checksum, every structure its own. verify reads them all:"
    ),
    "export.verified": "every structure and every preserved block is in order",
    # -- the end
    "end.title": "Putting away",
    "end.said": (
        "Still to come, and therefore only told: bringing the volume online automatically after "
        "a failed job, and the consistency check. All the rest you have seen happen."
    ),
    "ending": "{proofs} proofs, every one of them right, in {seconds} seconds. Nothing is left.",
    "cleaning": "Removing everything the demo has made …",
    "left": (
        "The demo could not remove everything it had made. What is left, and what removes it:\n"
        "{what}"
    ),
    # -- trouble
    "exit_code": "exit code {code}",
    "more_lines": "{count} lines more",
    "missing_tools": "the demo needs programs that are not installed: {tools}",
    "no_space": "{place} has {free} free, and the demo needs {needed}",
    "no_space_hint": "TMPDIR=/another/place chooses another place.",
    "disproved": "THIS IS NOT TRUE: {claim}. See what the commands above have printed.",
    "command_failed": "“{command}” should not have ended with exit code {code}.\n{output}",
    "no_copies": "Data was overwritten, but the diff area holds no more than before.",
    "no_change": "Nothing has changed since an earlier recovery point, so nothing can be proved.",
    "no_checksum": "sha256sum printed no checksum.",
    "no_event": "The event {event} is not in the log.",
    "not_online": "The volume is not online.",
    "other_fault": "The fault should have been 8 DIFF_AREA_FULL, and is {fault}.",
    "still_online": "The volume should be offline by a fault, and is not.",
    "would_fit": "status does not say that the refused write would still not fit.",
    "wrong_number": "The recovery point should have got number {number}.",
}
