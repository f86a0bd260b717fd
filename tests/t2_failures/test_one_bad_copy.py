"""One of the state file's two copies cannot be written, for good: what is said is what counts."""

from __future__ import annotations

import errno
import itertools

import pytest
from rig import BLOCK, attempt
from scene import Scene
from simdisk import FOREVER, SimBacking

from vsnapfs.volume import Volume
from vsnapfs.volume.statefile import COPY_SIZE


def _bad(scene: Scene, copy: int) -> None:
    """No write to this copy succeeds from now on, neither in this process nor in the next."""

    def hook(backing: SimBacking, operation: str, offset: int, _length: int) -> None:
        if backing.name == "state" and operation == "write" and offset == copy * COPY_SIZE:
            raise OSError(errno.EIO, "bad sector")

    scene.rig.host.hooks.append(hook)


def _killed(scene: Scene) -> None:
    hooks = scene.rig.host.hooks
    scene.rig.killed()
    scene.rig.host.hooks += hooks
    scene.rig.host.failures.clear()


def _scene(copy: int, saves: int, on_full: str) -> Scene:
    """saves: so many before, so that either copy is the one that is written first."""
    scene = Scene(on_full=on_full)

    async def save(volume: Volume) -> None:
        for _ in range(saves):
            volume.protection.save()

    scene.run(save)
    _bad(scene, copy)
    return scene


cases = pytest.mark.parametrize(("copy", "saves"), list(itertools.product((0, 1), (0, 1))))


@cases
def test_points_that_evict_gives_up_are_gone_for_all_or_kept_by_all(copy: int, saves: int) -> None:
    """The write goes through without them, or is refused and they are there in the next process."""
    scene = _scene(copy, saves, "evict")
    before = scene.replica()
    scene.rig.host.fail("area", "write", errno.EIO, times=FOREVER)
    error = scene.write(6 * BLOCK, 10)
    kept = error is not None
    if kept:
        assert error.errno == errno.ENODEV
        assert scene.replica() == before
    told = [params["reason"] for _, number, params in scene.rig.log.events if number == 1091]
    assert any("state file" in reason for reason in told)
    for _ in range(2):
        scene.exact(only=None if kept else set())
        _killed(scene)


@cases
def test_a_fault_is_kept_or_was_told_to_be_in_memory_only(copy: int, saves: int) -> None:
    """P1, where not even the superblock can be written. `offline` does not say that all is well."""
    scene = _scene(copy, saves, "offline")
    scene.rig.host.fail("area", "write", errno.EIO, times=FOREVER)
    assert scene.write(6 * BLOCK, 10) is not None
    assert scene.fault is not None
    told = any(
        number == 1091 and "the state file could not be written" in params["reason"]
        for _, number, params in scene.rig.log.events
    )

    async def down(volume: Volume) -> bool:
        return await attempt(volume.go_offline()) is None

    assert scene.run(down) == (not told)
    _killed(scene)
    assert (scene.fault is None) == told
    scene.exact()


@cases
def test_other_commands_count_or_are_refused_whatever_copy_is_bad(copy: int, saves: int) -> None:
    """A new point, offline, online: as they were answered in this process and in the next."""
    scene = _scene(copy, saves, "offline")

    async def create(volume: Volume) -> bool:
        error = await attempt(scene.create(volume))
        return error is None

    live = set(scene.points)
    for _ in range(2):
        if scene.run(create):
            live = set(scene.points)
        scene.exact(only=live)

    async def down(volume: Volume) -> bool:
        error = await attempt(volume.go_offline())
        return error is None

    async def is_online(volume: Volume) -> bool:
        return volume.protection.is_online

    recorded = scene.run(down)
    assert not scene.run(is_online)
    _killed(scene)
    assert scene.run(is_online) == (not recorded)
    scene.exact(only=live)
    if scene.run(create):
        live = set(scene.points)
    if scene.online() is None:
        assert scene.run(is_online)
        _killed(scene)
        assert scene.run(is_online)
    scene.exact(only=live)
