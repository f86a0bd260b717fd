"""The operations commands can ask for: checked parameters in, JSON out.

The same functions run in the serving process and in a command that opened the volume itself, so a
command behaves the same mounted or not. Parameters come over a socket: every one is checked for
name and type before the volume sees it. Leaves locking among operations to the volume.
"""

from __future__ import annotations

# ruff: noqa: ARG001 - all operations are called alike, whether they report progress or not.
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from vsnapfs.errors import UsageError

if TYPE_CHECKING:
    from vsnapfs.volume import RecoveryPoint, Volume

Progress = Callable[[str, int, int], None]
"""progress(phase, done, total), in bytes. May be called from any thread."""

_REQUIRED = object()
_LARGEST = (1 << 63) - 1


@dataclass(frozen=True)
class Param:
    """One parameter. kinds: the JSON types it may have; default: its value when it is missing."""

    kinds: tuple[type, ...]
    default: Any = _REQUIRED

    def check(self, op: str, name: str, given: Mapping[str, Any]) -> Any:
        """The value of parameter `name` of `op` among those given. UsageError if it will not do."""
        value = given.get(name, self.default)
        if value is _REQUIRED:
            raise UsageError(f"{op} needs the parameter {name}")
        # bool is an int to Python, but never a size or a number of a point.
        if value is self.default or type(value) in self.kinds:
            return value
        wanted = " or ".join(kind.__name__ for kind in self.kinds)
        raise UsageError(f"{op}: {name} must be {wanted}, not {type(value).__name__}")


@dataclass(frozen=True)
class Operation:
    """One entry of the table; call it with the volume, raw parameters and a progress callback.

    interruptible: it changes nothing, so it may be ended when nobody waits for it any more. All
    others call `beginning.begin` before their first change.
    """

    name: str
    function: Callable[..., Awaitable[Any]]
    params: Mapping[str, Param] = field(default_factory=dict)
    interruptible: bool = False
    gerund: str = ""  # what it does, for people: "restoring the recovery point"

    async def __call__(
        self, volume: Volume, params: Mapping[str, Any], progress: Progress | None = None
    ) -> Any:
        """Check the parameters, carry it out, return its result as plain JSON."""
        unknown = sorted(set(params) - set(self.params))
        if unknown:
            raise UsageError(f"{self.name} has no parameter {unknown[0]!r}")
        checked = {name: p.check(self.name, name, params) for name, p in self.params.items()}
        return await self.function(volume, progress or _silent, **checked)


def _silent(phase: str, done: int, total: int) -> None:
    """Nobody wants to know."""


def point_json(point: RecoveryPoint) -> dict[str, Any]:
    """A recovery point as commands get it."""
    seconds, rest = divmod(point.created_ns, 1_000_000_000)
    moment = datetime.fromtimestamp(seconds, tz=UTC).replace(microsecond=rest // 1000, tzinfo=None)
    return {
        "number": point.number,
        "created": moment.isoformat(timespec="microseconds") + "Z",
        "created_ns": point.created_ns,
        "label": point.label or None,
    }


async def _status(volume: Volume, progress: Progress) -> dict[str, Any]:
    await volume.news()
    return dict(volume.status())


async def _rp_create(volume: Volume, progress: Progress, *, label: str | None) -> dict[str, Any]:
    return point_json(await volume.create_point(label))


async def _rp_list(volume: Volume, progress: Progress) -> list[dict[str, Any]]:
    suspect = volume.suspect
    return [
        point_json(point) | {"suspect": point.number <= suspect} for point in volume.list_points()
    ]


async def _rp_resolve(volume: Volume, progress: Progress, *, point: str | int) -> dict[str, Any]:
    return point_json(volume.resolve(point))


async def _rp_delete(
    volume: Volume, progress: Progress, *, point: str | int, force: bool
) -> dict[str, Any]:
    found = volume.resolve(point)
    await volume.delete_point(found.number, force=force)
    return point_json(found)


async def _rp_restore(
    volume: Volume, progress: Progress, *, point: str | int, force: bool
) -> dict[str, Any]:
    found = volume.resolve(point)
    written = await volume.restore(found.number, force=force, progress=progress)
    return point_json(found) | {"written": written}


async def _resize(volume: Volume, progress: Progress, *, total: int) -> dict[str, Any]:
    if not 0 < total <= _LARGEST:
        raise UsageError(f"a diff area cannot have a size of {total} bytes")
    await volume.resize(total, progress=progress)
    return {"diff_area": volume.status()["diff_area"]}


async def _offline(volume: Volume, progress: Progress) -> None:
    await volume.go_offline()


async def _online(
    volume: Volume, progress: Progress, *, give_up_recovery_points: bool
) -> list[str]:
    return await volume.online(give_up_recovery_points=give_up_recovery_points)


async def _verify(volume: Volume, progress: Progress) -> dict[str, Any]:
    return await volume.verify(progress=progress)


async def _repair(volume: Volume, progress: Progress, *, dry_run: bool) -> dict[str, Any]:
    return await volume.repair(dry_run=dry_run, progress=progress)


_POINT = Param((str, int))
_FORCE = Param((bool,), default=False)

OPERATIONS: dict[str, Operation] = {
    operation.name: operation
    for operation in (
        Operation("status", _status, interruptible=True),
        Operation(
            "rp_create",
            _rp_create,
            {"label": Param((str,), default=None)},
            gerund="creating the recovery point",
        ),
        Operation("rp_list", _rp_list, interruptible=True),
        Operation("rp_resolve", _rp_resolve, {"point": _POINT}, interruptible=True),
        Operation(
            "rp_delete",
            _rp_delete,
            {"point": _POINT, "force": _FORCE},
            gerund="deleting the recovery point",
        ),
        Operation(
            "rp_restore",
            _rp_restore,
            {"point": _POINT, "force": _FORCE},
            gerund="restoring the recovery point",
        ),
        Operation("resize", _resize, {"total": Param((int,))}, gerund="resizing the diff area"),
        Operation("offline", _offline, gerund="taking the volume offline"),
        Operation(
            "online",
            _online,
            {"give_up_recovery_points": Param((bool,), default=False)},
            gerund="bringing the volume online",
        ),
        Operation("verify", _verify, interruptible=True),
        Operation(
            "repair",
            _repair,
            {"dry_run": Param((bool,), default=False)},
            gerund="repairing the volume",
        ),
    )
}
"""All that can be asked of a volume. `stop` exists besides, for a serving process only."""
