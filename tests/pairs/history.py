"""The model: an order of what was asked, no answer before its question, that explains what is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from vsnapfs.errors import FaultCode

from .world import Asked, Content, Points, World


def applied(asked: Asked, content: Content, points: Points, ever: Points) -> tuple[Content, Points]:
    """What an operation does. ever: all points there have been."""
    kind, *what = asked.effect
    if kind in ("write", "write durably") and content is not None:
        offset, data = what
        content = content[:offset] + data + content[offset + len(data) :]
    elif kind == "create":
        number = what[0] if what else 1 + max(ever, default=0)
        ever[number] = content
        points = points | {number: content}
    elif kind == "delete":
        points = {number: kept for number, kept in points.items() if number != what[0]}
    elif kind == "restore" or (kind == "finish" and what[0] in points):
        # One that was interrupted ends with `online`, or never: the point can be deleted by force.
        content = None if asked.ok is False else ever.get(what[0])
    elif kind == "give up":
        points = {}
    return content, points


_EITHER = ("write durably", "restore", "delete", "give up")


def _chosen(asked: Asked) -> tuple[bool, ...]:
    if asked.ok is not None and asked.kind not in _EITHER:
        return (asked.ok,)
    return (True,) if asked.ok else (True, False)


#: How many states of one moment the model goes into: each may be a whole replica.
_MOST = 2000


class UndecidedError(Exception):
    """Too many writes overlap in time to try all their orders."""


def _ends(base: tuple[Content, Points], history: list[Asked]) -> Iterator[tuple[Any, ...]]:
    """What all orders of it lead to: the replica's content, the points, all points there were.

    Where two orders meet they go on as one, or a handful of writes at a time would be too many.
    """
    content, points = base[0], frozenset(base[1].items())
    states = {(frozenset(history), content, points, points)}
    for _ in history:
        after = set()
        for left, content, points, ever in states:
            for asked in left:
                if any(one.end is not None and one.end < asked.start for one in left):
                    continue  # That one was answered before this one was asked for.
                for done in _chosen(asked):
                    known, then = dict(ever), (content, dict(points))
                    if done:
                        then = applied(asked, content, dict(points), known)
                    kept = frozenset(then[1].items()), frozenset(known.items())
                    after.add((left - {asked}, then[0], *kept))
        if len(after) > _MOST:
            raise UndecidedError
        states = after
    return ((content, dict(points), dict(ever)) for _, content, points, ever in states)


@dataclass
class Seen:
    """What a volume shows. content: None if it need not be what was acknowledged."""

    content: Content
    points: dict[int, bytes]
    online: bool
    fault: FaultCode | None

    def differs(self, points: Points, ever: Points, quietly: Callable[[int], bool]) -> str:
        for number, found in self.points.items():
            wanted = ever.get(number)
            if wanted is not None and wanted != found:
                return f"point {number} differs"
        for number in points:
            if number not in self.points and not quietly(number):
                return f"point {number} is lost without a word"
        return ""


def explained(w: World, base: tuple[Content, Points], seen: Seen, *, killed: bool = False) -> None:
    """AssertionError unless some order of all that was asked leads to what is seen."""
    effective = [one for one in w.history if one.kind in ("write", "create", "finish", *_EITHER)]
    lost, unknown = w.lost(), 1 + max([*w.created, *base[1], 0])
    given_up = w.failing and any(one.kind == "give up" for one in effective)

    def quietly(number: int) -> bool:
        return number in lost or given_up or (killed and number == unknown)

    wrong: Counter[str] = Counter()
    for content, points, ever in _ends(base, effective):
        differs = seen.differs(points, ever, quietly)
        if seen.content is not None and content is not None and seen.content != content:
            differs = "the replica differs"
        for number, found in w.read:
            if ever.get(number, found) not in (None, found):
                differs = f"point {number} was read wrong"
        if not differs:
            return
        wrong[differs] += 1
    raise AssertionError(f"{dict(wrong)} in {w.history}, lost: {lost}")
