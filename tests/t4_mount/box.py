"""A volume with its mountpoint, as the tests of mounting use it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from vsnapfs.daemon import client, mounts, server
from vsnapfs.errors import VsnapError
from vsnapfs.volume.create import create_volume

MIB = 1 << 20
SIZE = 8 * MIB + 12345  # no multiple of anything


def wait_for(condition: Callable[[], Any], seconds: float = 60) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


class Box:
    """One volume and its mountpoint."""

    def __init__(self, base: Path, name: str = "vol", size: int = SIZE) -> None:
        self.volume = base / name
        self.place = base / f"mnt {name}"
        self.place.mkdir()
        create_volume(self.volume, size=size, diff_area_size=64 * MIB)
        self.pid = 0

    def mount(self, **options: Any) -> int:
        self.pid = server.spawn(self.volume, self.place, **options)
        return self.pid

    def call(self, op: str, **params: Any) -> Any:
        return client.call(self.volume, op, **params)

    def unmount(self) -> None:
        mount = mounts.mount_of(self.volume)
        assert mount is not None
        mounts.unmount(mount)

    @property
    def replica(self) -> Path:
        return self.place / "replica.img"

    @property
    def points(self) -> Path:
        return self.place / "recovery-points"

    def write(self, offset: int, data: bytes) -> None:
        fd = os.open(self.replica, os.O_RDWR)
        try:
            assert os.pwrite(fd, data, offset) == len(data)
        finally:
            os.close(fd)

    def log(self) -> str:
        return (self.volume / "server.log").read_text()

    def events(self) -> list[int]:
        lines = (self.volume / "events.jsonl").read_text().splitlines()
        return [json.loads(line)["event_id"] for line in lines]

    def clean_up(self) -> None:
        mount = mounts.mount_of(self.volume)
        if mount is not None:
            with suppress(VsnapError):
                mounts.unmount(mount)
            mount = mounts.mount_of(self.volume)
            if mount is not None:
                mounts.unmount_now(mount.mountpoint, lazy=True)


def refused(code: int, call: Callable[..., Any], *args: Any) -> None:
    with pytest.raises(OSError) as caught:
        call(*args)
    assert caught.value.errno == code, caught.value
