"""What the events say in English, in our own words.

Owns the English sentences and the phrases that go into them. The notation is `template`'s, the
names are those of `catalog` and the phrases that `wording` makes of them.
"""

from __future__ import annotations

CULTURE = "en-US"
LEVELS = {"Error": "Error", "Warning": "Warning", "Information": "Information"}
BYTES = "bytes"

SEPARATOR = ", "
SIZES = {"used": "used {n}", "allocated": "allocated {n}", "maximum": "maximum {n}"}

# A phrase for a count of one, and one for any other; `{n}` is the count.
COUNTED = {
    "points_phrase": ("1 recovery point", "{n} recovery points"),
    "gone": ("1 recovery point", "{n} recovery points"),
    "blocks_left": ("1 block was still to be preserved", "{n} blocks were still to be preserved"),
    "blocks": ("1 block", "{n} blocks"),
    "copies": ("1 copy is damaged", "{n} copies are damaged"),
    "writes_waited": ("1 write waited for it", "{n} writes waited for it"),
    "more_times": ("once more", "{n} more times"),
    "more_flushes": ("1 more flush failed", "{n} more flushes failed"),
}
# The same for a list of numbers; `{n}` is the list.
LISTED = {
    "points_phrase": ("recovery point {n}", "recovery points {n}"),
    "gone": ("recovery point {n}", "recovery points {n}"),
}

# Made in this order; a phrase may use those before it.
PHRASES = {
    "the_volume": "[volume {volume}|the volume]",
    "The_volume": "[Volume {volume}|The volume]",
    "the_area": "[the diff area {diff_area}|the diff area]",
    "The_area": "[The diff area {diff_area}|The diff area]",
    "the_point": "[recovery point {point}|a recovery point][ “{label}”]",
    "The_point": "[Recovery point {point}|A recovery point][ “{label}”]",
    "given_up": "[{gone}|[recovery point {point}[ “{label}”]|recovery points]]",
    "range": "[{length} at byte {offset}|[byte {offset}|[{length}]]]",
    "target": "[block {block}[, hit by a write of {range}]|[a write of {range}]]",
    "request": "[{target}[; {blocks_left}]|[{blocks_left}]]",
    "cause": "[{reason}[ ({error})]|[{error}]]",
    "place": "[block {block}[, {range}]|[{range}]]",
}
ERRORS: dict[str, str] = {}  # the C library has them in English

_WHY = "[ Request: {request}.][ Cause: {cause}.]"
_SIZES = "[ Sizes: {sizes}.]" + _WHY  # after a sentence that names the diff area
_FACTS = "[ Diff area[ {diff_area}]: {sizes}.|[ Diff area: {diff_area}.]]" + _WHY
_KEPT = " All recovery points are kept and can still be read and exported."
_OFFLINE = "{The_volume} went offline to protect its recovery points: "
_ONLINE = " then run `vsnapfs online {VOLUME}`."
_GROW = " Give it a larger total with `vsnapfs resize {VOLUME} --diff-area-size TOTAL`"
_AGAIN = " Find out what is wrong with the disk," + _ONLINE
_LOST = "{The_volume} gave up {given_up}"

GENERIC = "Event {event_id} of source {source}[ on volume {volume}][: {cause}]."

SENTENCES: dict[tuple[str, int], str] = {
    ("volsnap", 8): (
        "No recovery point was created on {the_volume}: the writes under way did not finish in"
        " time.[ Cause: {cause}.] Nothing was changed. Try again when the load is lower."
    ),
    ("volsnap", 14): (
        _LOST + ": reading or writing {the_area} failed. The volume itself goes on."
        "[ Cause: {cause}.] Find out what is wrong with the disk before relying on new ones."
    ),
    ("volsnap", 24): (
        "The disk under {the_area} of {the_volume} has too little free space for the area to"
        " grow; the recovery points are at risk.[ Sizes: {sizes}.][ Cause: {cause}.]"
        " Free space on that disk, or delete recovery points that are no longer needed."
    ),
    ("volsnap", 25): (
        _LOST + ": {the_area} could not provide room in time for the blocks being overwritten."
        "[ Sizes: {sizes}.][ Cause: {cause}.]" + _GROW + "."
    ),
    ("volsnap", 33): (
        "{The_point}, the oldest of {the_volume}, was deleted so that {the_area} stays within its"
        " maximum.[ Sizes: {sizes}.]"
    ),
    ("volsnap", 35): (
        _LOST + ": {the_area} could not grow.[ Sizes: {sizes}.][ Cause: {cause}.]"
        " Free space on the disk that holds it."
    ),
    ("volsnap", 36): (
        _LOST + ": {the_area} may not grow beyond the maximum that was set for it."
        "[ Sizes: {sizes}.]" + _GROW + "."
    ),
    ("volsnap", 38): (
        "{The_area} of {the_volume} cannot grow any further, its maximum is reached; the recovery"
        " points are at risk.[ Sizes: {sizes}.]" + _GROW + "."
    ),
    ("volsnap", 58): (
        "{The_point}, the oldest of {the_volume}, was deleted to stay within the number of"
        " recovery points a volume can have."
    ),
    ("volsnap", 61): (
        "Restoring {the_point} on {the_volume} met a part that cannot be read"
        "[: {place}].[ Cause: {cause}.]"
        " Run `vsnapfs verify {VOLUME}` to see what else is affected."
    ),
    ("volsnap", 64): (
        "Restoring {the_point} onto {the_volume} has started[: {blocks} to write]; the replica"
        " cannot be opened until it is done."
    ),
    ("volsnap", 65): (
        "Restoring {the_point} onto {the_volume} was interrupted and has been resumed."
    ),
    ("volsnap", 66): (
        "Restoring {the_point} onto {the_volume} is complete[, {blocks} written]; the replica"
        " can be opened again."
    ),
    ("volsnap", 80): (
        "{The_volume} was opened offline: {the_area} is not where it should be." + _SIZES + " The"
        " recovery points can be read again once it is back; opening the volume then puts it"
        " online by itself."
    ),
    ("volsnap", 81): (
        "{The_volume} was opened offline: reading the catalog of {the_area} failed."
        + _SIZES
        + _AGAIN
    ),
    ("volsnap", 82): (
        "{The_volume} went offline: a structure of {the_area} fails its checksum, and so does its"
        " second copy." + _SIZES + " `vsnapfs verify {VOLUME}` lists what is affected. If nothing"
        " brings the area back, `vsnapfs online {VOLUME} --give-up-recovery-points` starts an"
        " empty one."
    ),
    ("volsnap", 83): (
        _OFFLINE + "there was no memory to preserve a block." + _FACTS + _KEPT + " Free memory or"
        " raise the limit of the process," + _ONLINE
    ),
    ("volsnap", 84): (
        _OFFLINE + "memory could not be mapped for the write buffer." + _FACTS + _KEPT + " Free"
        " memory or raise the limit of the process," + _ONLINE
    ),
    ("volsnap", 85): (
        _OFFLINE
        + "the old content of a block could not be read from the replica."
        + _FACTS
        + _KEPT
        + _AGAIN
    ),
    ("volsnap", 86): (
        _OFFLINE
        + "a block could not be preserved in {the_area}, which failed to take it."
        + _SIZES
        + _KEPT
        + _AGAIN
    ),
    ("volsnap", 87): (
        _OFFLINE + "{the_area} is full, so a block about to be overwritten could not be"
        " preserved." + _SIZES + _KEPT + _GROW + " (the new total, not what is added) or delete a"
        " recovery point," + _ONLINE
    ),
    ("volsnap", 88): (
        _OFFLINE
        + "{the_area} did not grow in time, and a write needed room before it had."
        + _SIZES
        + _KEPT
        + " Lower the load or use a faster disk,"
        + _ONLINE
    ),
    ("volsnap", 89): (
        _OFFLINE
        + "{the_area} has not reached its maximum but could not grow."
        + _SIZES
        + _KEPT
        + " Free space on the disk that holds it, or look for a quota,"
        + _ONLINE
    ),
    ("volsnap", 90): (
        _OFFLINE
        + "an unexpected error in vsnapfs stopped a block from being preserved."
        + _FACTS
        + _KEPT
        + " Please report this. Run `vsnapfs verify {VOLUME}`,"
        + _ONLINE
    ),
    ("volsnap", 91): (
        "{The_volume} went offline: the file of {the_area} could not be opened, locked or sized."
        + _SIZES
        + " Check its permissions and attributes and whether its file system is read-only,"
        + _ONLINE
    ),
    ("volsnap", 92): (
        _OFFLINE + "reading or writing outside the copying of blocks failed." + _FACTS + _AGAIN
    ),
    ("volsnap", 93): (
        _OFFLINE
        + "{the_area} was there and is gone; it was deleted, unmounted or removed."
        + _SIZES
        + " As long as the volume stays mounted the recovery points can still be read: export"
        " what must not be lost. Bring the area back," + _ONLINE
    ),
    ("volsnap", 94): (
        "{The_volume} went offline: something other than vsnapfs wrote to {the_area}."
        + _SIZES
        + " Make sure that nothing else uses it and run `vsnapfs verify {VOLUME}`,"
        + _ONLINE
    ),
    ("Microsoft-Windows-Ntfs", 140): (
        "A flush to {the_volume}[ through {device}] failed: the log of the file system above was"
        " not written, and its latest changes may be lost.[ Cause: {cause}.][ It failed"
        " {more_times}.] Once the volume is online, mount that file system afresh."
    ),
    ("Microsoft-Windows-Ntfs", 98): (
        "The file system on {the_volume}[ ({device})] was mounted[; its health: {cause}]."
    ),
    ("Ntfs", 57): (
        "A flush to {the_volume}[ through {device}] failed; the log of the file system above may"
        " be damaged.[ Cause: {cause}.]"
    ),
    ("Ntfs", 50): (
        "A write that was already acknowledged to a program could not be delivered to"
        " {the_volume}[ through {device}]; its data is lost.[ Range: {range}.][ Cause: {cause}.]"
    ),
    ("Ntfs", 137): (
        "The transaction manager of the file system on {the_volume}[ ({device})] met an error and"
        " cannot continue.[ Cause: {cause}.] Mount the file system afresh."
    ),
    ("vsnapfs", 1000): (
        "{The_volume} was created[; replica {size}|[; replica {length}]]"
        "[; diff area[ {diff_area}]: {sizes}]."
    ),
    ("vsnapfs", 1001): (
        "{The_volume} was opened[ and mounted at {mountpoint}|[ and mounted at {what}]]"
        "[, with {points_phrase}]."
    ),
    ("vsnapfs", 1002): "{The_volume} was closed cleanly.",
    ("vsnapfs", 1010): "{The_point} of {the_volume} was created.",
    ("vsnapfs", 1011): "{The_point} of {the_volume} was deleted[: {cause}].",
    ("vsnapfs", 1020): (
        "{The_volume} was taken offline by an administrator; its recovery points stay readable."
        " `vsnapfs online {VOLUME}` ends this."
    ),
    ("vsnapfs", 1021): (
        "{The_volume} is online.[ {more_flushes} while it was not.] Loop devices"
        " and file systems that were in use when it went offline must be attached and mounted"
        " afresh."
    ),
    ("vsnapfs", 1022): (
        "At an administrator's request, {the_volume} gave up [{gone}|its recovery points] and"
        " started with an empty diff area[, {diff_area}].[ Sizes: {sizes}.][ Cause: {cause}.]"
    ),
    ("vsnapfs", 1023): (
        "While {the_volume} was offline, [{more_flushes}|more flushes failed] after the one"
        " reported as Ntfs 140."
    ),
    ("vsnapfs", 1030): (
        "The maximum of {the_area} of {the_volume} was changed[ from {old}][ to {new}]."
        "[ Sizes now: {sizes}.]"
    ),
    ("vsnapfs", 1040): (
        "A preserved block in {the_area} of {the_volume} fails its checksum[: {place}]."
        "[ Affected: {points_phrase}.|[ Affected: recovery point {point}.]][ Cause: {cause}.]"
        " Reading this range of a recovery point gives an error, never wrong data."
        " `vsnapfs verify {VOLUME}` lists everything affected."
    ),
    ("vsnapfs", 1041): (
        "A damaged structure[ ({what})] of {the_area} of {the_volume} was rewritten from its"
        " second copy.[ Cause: {cause}.] Nothing was lost; should it happen again, check the"
        " disk."
    ),
    ("vsnapfs", 1042): (
        "{The_volume} was not closed cleanly and has been recovered.[ Blocks preserved by the last"
        " barrier: {kept} kept, {dropped} dropped that were not complete and whose originals were"
        " not overwritten yet.|[ Incomplete copies dropped: {dropped}.]][ Of the others {copies};"
        " `vsnapfs verify {VOLUME}` lists what that affects.]"
    ),
    ("vsnapfs", 1043): (
        "The write buffer[ {what}] of {the_volume} is lost[: {cause}]. Writes that were"
        " acknowledged and not flushed since may be lost. Recovery points are not affected."
    ),
    ("vsnapfs", 1044): (
        "{The_volume} was closed while [{count} acknowledged writes|acknowledged writes] could not"
        " be carried out[: {cause}]. They wait in memory for the next opening; a restart of the"
        " machine loses them."
    ),
    ("vsnapfs", 1045): (
        "[A sync of the diff area failed ({cause})|The power failed] while {the_volume} was used"
        ' with durability "process"[. All {count} recovery points|. All recovery points] of that'
        " time may be wrong."
    ),
    ("vsnapfs", 1047): (
        "{The_area} of {the_volume} is slow to grow[: from {old} to {new} took {seconds} s|"
        "[: {seconds} s have passed and it has not ended]][; {writes_waited}]. Writes that need the"
        " room wait for it, with policy offline for grow-timeout at most (volume.toml). Look for"
        " what keeps the disk that holds it busy."
    ),
    ("vsnapfs", 1048): (
        "An operation on {the_volume}[, {what},] has ended whose client had left after it had"
        " begun.[ It could not be carried out: {cause}.| It was carried out.]"
    ),
    ("vsnapfs", 1050): (
        "The replica of {the_volume} failed[ to carry out {what}][ at {range}].[ Cause: {cause}.]"
        " The request was refused; the volume stays online."
    ),
    ("vsnapfs", 1049): (
        "{The_volume} is a copy of another one, whose write buffer[ {what}] is left alone. It opens"
        " as after a power failure: writes that the original had acknowledged and not flushed when"
        " it was copied may be missing."
    ),
    ("vsnapfs", 1053): (
        "Somebody has removed the write buffer[ {what}] of {the_volume} from shared memory. What it"
        " holds is carried out, and a new one is made. Had the server been killed in between,"
        " acknowledged writes would have been lost: see RemoveIPC= of systemd-logind, and whatever"
        " else cleans /dev/shm."
    ),
    ("vsnapfs", 1054): (
        "Acknowledged writes in the write buffer[ {what}] of {the_volume} were given up on request"
        "[: {cause}]. Recovery points are not affected."
    ),
    ("vsnapfs", 1055): (
        "The write buffer of {the_volume} may not outlive its server[: {cause}]. Without a write"
        " buffer (--write-buffer 0) nothing is acknowledged ahead."
    ),
    ("vsnapfs", 1051): (
        "The replica of {the_volume}[, {device},] was changed while vsnapfs did not serve it"
        "[: {cause}]. Its"
        " recovery points may show the changed bytes."
    ),
    ("vsnapfs", 1052): (
        "[The diff area {diff_area} of {the_volume}|The replica of {the_volume}[, {device},]] was"
        " opened for writing by somebody else[: {what}][, and {more_times} since the last such"
        " event]. [What was written may have spoilt copies in {diff_area}: `vsnapfs verify"
        " {VOLUME}` tells.|Whatever was overwritten is missing from the recovery points.]"
    ),
    ("vsnapfs", 1060): (
        "The replica of {the_volume}[, {device},] could not be synced.[ Cause: {cause}.] What was"
        " written since the last good sync may be lost, and every flush fails until the"
        " volume is opened anew."
    ),
    ("vsnapfs", 1090): (
        "An unexpected error in vsnapfs[ on {volume}][ during {what}][: {cause}]. The request was"
        " refused.[ It happened {more_times} since the last report.] Please report this."
    ),
    ("vsnapfs", 1091): "[{The_volume}: {remark}|{The_volume} needs attention].",
}
