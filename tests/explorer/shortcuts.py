"""The engine, made fast for many openings without being made different.

Owns the shortcuts, all of them for functions whose answer depends on their arguments alone:
decoding a superblock or a state, choosing between the two copies of a descriptor table (where
neither is damaged), and the way into a worker thread. They are put around whatever is installed,
so that an engine broken on purpose stays broken.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any, TypeVar
from unittest import mock

import trio
import xxhash

from vsnapfs.diffarea import recovery, store
from vsnapfs.diffarea.descriptors import SectorImage
from vsnapfs.errors import FormatError
from vsnapfs.volume import statefile

T = TypeVar("T")
_REMEMBERED = 4000
steps = {"others run": False}


async def _inline(function: Callable[..., T], *args: Any, **_options: Any) -> T:
    """Stands in for `in_thread`: in this thread. Others run before and after, if there are any."""
    if not steps["others run"]:
        return function(*args)
    with trio.CancelScope(shield=True):
        await trio.lowlevel.checkpoint()
        result = function(*args)
        await trio.lowlevel.checkpoint()
    return result


def _remembering_decode(decode: Callable[[Any], Any]) -> Callable[[Any], Any]:
    known: dict[int, Any] = {}

    def remembered(data: Any) -> Any:
        key = xxhash.xxh3_128_intdigest(data)
        found = known.get(key)
        if found is None:
            if len(known) > _REMEMBERED:
                known.clear()
            try:
                found = decode(data)
            except FormatError as error:
                found = error
            known[key] = found
        if isinstance(found, FormatError):
            raise found.with_traceback(None)
        return found

    return remembered


def _remembering_state(decode: Callable[[bytes, bytes], Any]) -> Callable[[bytes, bytes], Any]:
    known: dict[tuple[bytes, bytes], Any] = {}

    def remembered(data: bytes, volume_id: bytes) -> Any:
        if (data, volume_id) not in known:
            if len(known) > _REMEMBERED:
                known.clear()
            known[data, volume_id] = decode(data, volume_id)
        return known[data, volume_id]

    return remembered


def _remembering_choose(choose: Callable[..., bytearray]) -> Callable[..., bytearray]:
    known: dict[tuple[int, int, int, int], tuple[bytes, dict[int, bytes]]] = {}

    def remembered(self: Any, group: int, first: bytearray, twin: bytearray) -> bytearray:
        key = (
            group,
            len(self.area.slots),
            xxhash.xxh3_128_intdigest(first),
            xxhash.xxh3_128_intdigest(twin),
        )
        found = known.get(key)
        if found is not None:
            table, healed = found
            self.heal.update({s: SectorImage(bytearray(data)) for s, data in healed.items()})
            return bytearray(table)
        before = set(self.heal), len(self.damaged), len(self.report.rot)
        chosen = choose(self, group, first, twin)
        if (len(self.damaged), len(self.report.rot)) == before[1:]:
            if len(known) > _REMEMBERED // 4:
                known.clear()
            healed = {s: bytes(i.data) for s, i in self.heal.items() if s not in before[0]}
            known[key] = bytes(chosen), healed
        return chosen

    return remembered


@contextlib.contextmanager
def installed() -> Iterator[None]:
    """Put them around the engine as it is now."""
    with contextlib.ExitStack() as stack:
        decode = _remembering_decode(recovery.decode)
        choose = _remembering_choose(recovery._Scan._choose)
        for module in (recovery, store):
            stack.enter_context(mock.patch.object(module, "decode", decode))
        state = _remembering_state(statefile._decode)
        stack.enter_context(mock.patch.object(statefile, "_decode", state))
        stack.enter_context(mock.patch.object(recovery._Scan, "_choose", choose))
        for name, part in list(sys.modules.items()):
            if name.startswith("vsnapfs.volume") and hasattr(part, "in_thread"):
                stack.enter_context(mock.patch.object(part, "in_thread", _inline))
        yield
