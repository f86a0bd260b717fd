"""A real volume behind a real control socket, without a mount."""

from __future__ import annotations

import json
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import trio

from vsnapfs.daemon import client
from vsnapfs.daemon.control import ControlServer
from vsnapfs.daemon.operations import OPERATIONS
from vsnapfs.volume import Volume
from vsnapfs.volume.create import create_volume

BLOCK = 4096
SIZE = 40_000


def make(directory: Path, **options: Any) -> Path:
    create_volume(directory, size=SIZE, diff_area_size=384 << 10, block_size=BLOCK, **options)
    return directory


class Served:
    """A real volume behind a real control socket, in a thread of its own."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._ready = threading.Event()
        self._thread = threading.Thread(target=trio.run, args=(self._main,))
        self._thread.start()
        assert self._ready.wait(10)

    async def _main(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        self._stop = trio.Event()
        self.volume = await Volume.open(self.directory, mountpoint="/nowhere")
        server = ControlServer(self.directory, self.volume, OPERATIONS)
        server.listen()
        async with trio.open_nursery() as nursery:
            await nursery.start(self.volume.run)
            await nursery.start(server.serve)
            self._ready.set()
            await self._stop.wait()
            server.unlink()
            await self.volume.close()
            nursery.cancel_scope.cancel()

    def stop(self) -> None:
        self._token.run_sync_soon(self._stop.set)
        self._thread.join(20)
        assert not self._thread.is_alive()

    def connect(self) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.settimeout(20)
        connection.connect(str(self.directory / "control.sock"))
        return connection

    def send(self, raw: bytes, *, half_close: bool = True) -> list[dict[str, Any]]:
        """What is answered to these bytes until the server closes."""
        with self.connect() as connection:
            with suppress(BrokenPipeError, ConnectionResetError):
                connection.sendall(raw)
            if half_close:
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_WR)
            answers = []
            with suppress(ConnectionResetError):
                for line in connection.makefile("rb"):
                    answers.append(json.loads(line))  # noqa: PERF401 - keeps those before a reset
            return answers

    def use(self) -> float:
        """Write and read through the engine and ask for the status; the seconds it took."""

        async def work() -> None:
            handle = self.volume.open_replica()
            try:
                await handle.write(100, b"still here")
                assert bytes(await handle.read(100, 10)) == b"still here"
            finally:
                handle.close()

        started = time.monotonic()
        trio.from_thread.run(work, trio_token=self._token)
        assert client.call(self.directory, "status")["state"] == "online"
        return time.monotonic() - started
