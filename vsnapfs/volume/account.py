"""The account of an opening: what it found, what it healed, and the words for it.

Owns what `verify` and `repair` tell of the time before they were asked; event log and answers
are made from it. Leaves the healing itself to `diffarea.recovery` and `volume`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ..diffarea.verify import Problem
from .opening import Opened


def state_problem(offset: int, message: str) -> Problem:
    """A copy in the state file, as `verify` describes problems."""
    where = {"what": "state file", "copy": int(offset > 0), "offset": offset}
    return where | {"message": message, "points": [], "ranges": []}


@dataclass
class Account:
    """What opening a volume found and brought back."""

    opened: Opened
    superblock_healed: bool = False
    state: list[Problem] = field(default_factory=list)
    restoring: int = 0
    restored: bool = False
    beyond_end: int = 0

    def __post_init__(self) -> None:
        area = self.opened.core.area
        if area is not None:
            self.restoring = area.superblock.restoring
            if not area.backing.is_device:
                self.beyond_end = max(0, area.backing.size() - area.allocated)

    def superblock_is_healed(self) -> None:
        """Both copies of the superblock have been written."""
        self.superblock_healed = True

    def restore_is_finished(self) -> None:
        """The in-place restore that had been interrupted has been continued to its end."""
        self.restored = True

    def state_is_healed(self, wrong: list[tuple[int, str]]) -> list[str]:
        """The state file has been written anew. Returns what was really bad, for the log."""
        lost = self.opened.state_problem
        if lost:
            self.state.append(state_problem(0, lost))
        else:
            self.state += [state_problem(offset, f"this copy {text}") for offset, text in wrong]
        return [f"{problem['what']}: {problem['message']}" for problem in self._state_rot()]

    def _state_rot(self) -> list[Problem]:
        return [problem for problem in self.state if "older" not in problem["message"]]

    def rot(self) -> list[Problem]:
        """What was bad (not merely older) and has been healed, as `verify` describes problems. Of a
        volume that is only looked at it still is as it was.
        """
        found = self._state_rot()
        for where in self.opened.report.rot if self.opened.report else ():
            if where["what"] != "superblock" or self.superblock_healed:
                found.append(where | {"points": [], "ranges": []})
        if self.opened.core.dry_run:
            return found  # Not on the disk.
        return [
            problem | {"message": f"{problem['message']} (healed when the volume was opened)"}
            for problem in found
        ]

    def findings(self) -> list[Problem]:
        """Everything that opening did, for `repair`."""
        listed = [problem | {"action": "written anew"} for problem in self.state]
        report, area = self.opened.report, self.opened.core.area
        if report is None or area is None:
            return listed
        if self.beyond_end and area.backing.size() <= area.allocated:
            message = f"the file had {self.beyond_end} bytes more than are allocated"
            listed.append({"what": "diff area", "message": message, "action": "cut off"})
        listed += [
            where | {"action": "written anew from the other copy"}
            for where in report.rot
            if where["what"] != "superblock" or self.superblock_healed
        ]
        listed += [
            {"what": "superblock", "message": text, "action": "written anew"}
            for text in report.healed
            if text.endswith("behind") and self.superblock_healed
        ]
        differing = report.differing
        if differing:
            message = f"{differing} descriptor sectors whose two copies differed"
            action = "the newer one counts"
            listed.append({"what": "descriptor sectors", "message": message, "action": action})
        if report.unclean:
            message = "the volume was not closed cleanly"
            action = (
                f"the copies of the last barrier were checked: {report.kept} kept, "
                f"{report.dropped} dropped (their blocks had not been overwritten), "
                f"{report.damaged} damaged"
            )
            listed.append({"what": "recovery", "message": message, "action": action})
        return listed
