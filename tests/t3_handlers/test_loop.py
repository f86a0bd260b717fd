"""The loop that polls: no request lost, none twice, everybody's turn, and the end noticed.

`Workers` does what pyfuse3's tasks do, in its order: count in, take the lock, look whether the
session has ended, wait for the descriptor, read; then start one more if nobody waits, carry out
the request, and end if too many wait. Eight bytes on a socket are a request.
"""

from __future__ import annotations

import os
import random
import socket
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pyfuse3
import pytest
import trio
import trio.testing

from vsnapfs.fuse import kernel, loop

Handler = Callable[[int], Awaitable[None]]


class Workers:
    """pyfuse3's loop over `ours`, which stands for the module trio."""

    def __init__(self, ours: loop._Trio, handler: Handler, most: int = 99, idle: int = 32) -> None:
        self._trio, self._handler, self._most, self._idle = ours, handler, most, idle
        self.kernel, self._end = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self._end.setblocking(False)  # where pyfuse3 would hang, BlockingIOError
        self._lock = ours.Lock()
        self._readers = self._count = self._inside = 0
        self.exited = False

    async def run(self) -> None:
        with self.kernel, self._end:
            async with self._trio.open_nursery() as nursery:
                self._count = 1
                nursery.start_soon(self._loop, nursery)

    def terminate(self) -> None:
        self.exited = True
        self._trio.lowlevel.notify_closing(self._end.fileno())

    async def _readable(self) -> bool:
        self._readers += 1
        try:
            async with self._lock:
                assert self._inside == 0, "two tasks at the descriptor"
                self._inside += 1
                try:
                    if self.exited:
                        return False
                    await self._trio.lowlevel.wait_readable(self._end.fileno())
                finally:
                    self._inside -= 1
        except self._trio.ClosedResourceError:
            return False
        finally:
            self._readers -= 1
        return True

    async def _loop(self, nursery: trio.Nursery) -> None:
        while not self.exited and self._readers <= self._idle and await self._readable():
            request = int.from_bytes(self._end.recv(8), "little")
            if not self._readers and self._count < self._most:
                self._count += 1
                nursery.start_soon(self._loop, nursery)
            await self._handler(request)
        self._count -= 1


def send(workers: Workers, request: int) -> None:
    workers.kernel.send(request.to_bytes(8, "little"))


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("most", [1, 2, 7, 99])
def test_every_request_is_carried_out_once(seed: int, most: int) -> None:
    """Whatever handlers wait for, and however requests come, each is carried out once, then the
    end is noticed by all tasks.
    """
    dice = random.Random(seed)
    total = 600
    done: Counter[int] = Counter()
    all_done = trio.Event()

    async def handler(request: int) -> None:
        kind = dice.random()
        if kind < 0.1:
            await trio.sleep(dice.random() / 500)
        elif kind < 0.2:
            await trio.to_thread.run_sync(int)
        elif kind < 0.4:
            await trio.lowlevel.checkpoint()
        done[request] += 1
        if done.total() == total:
            all_done.set()

    async def main() -> None:
        workers = Workers(loop._Trio(), handler, most, dice.choice([1, 32]))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(workers.run)
            sent = 0
            while sent < total:
                burst = min(dice.choice([1, 1, 2, 5, 40]), total - sent)
                for request in range(sent, sent + burst):
                    send(workers, request)
                sent += burst
                await trio.sleep(dice.choice([0, 0, 0, 0.0004, 0.002]))
                # The socket's buffer is full at about 270.
                while sent - done.total() > 100:  # noqa: ASYNC110
                    await trio.sleep(0.0005)
            await all_done.wait()
            workers.terminate()

    trio.run(main)
    assert done == Counter(range(total))


@pytest.mark.parametrize("seed", range(20))
def test_the_end_is_noticed_at_any_moment(seed: int) -> None:
    """Terminated at any moment, with requests coming, every task ends; so does a cancelled loop."""
    dice = random.Random(seed)

    async def handler(request: int) -> None:
        if request % 3 == 0:
            await trio.sleep(0.0002)
        elif request % 3 == 1:
            await trio.lowlevel.checkpoint()

    async def main() -> None:
        workers = Workers(loop._Trio(), handler, idle=dice.choice([1, 32]))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(workers.run)
            for request in range(dice.randrange(60)):
                send(workers, request)
                if dice.random() < 0.3:
                    await trio.sleep(dice.random() / 1000)
            for _ in range(dice.randrange(4)):
                await trio.lowlevel.checkpoint()
            if seed % 2:
                workers.terminate()
            else:
                nursery.cancel_scope.cancel()

    trio.run(main)


def test_another_task_reads_while_handlers_wait() -> None:
    """Ten requests, each of which waits for the next one's, are all answered."""
    events = [trio.Event() for _ in range(11)]
    answered: list[int] = []

    async def main() -> None:
        async def handler(request: int) -> None:
            events[request].set()
            if request < 10:
                await events[request + 1].wait()
            answered.append(request)
            if len(answered) == 11:
                workers.terminate()

        workers = Workers(loop._Trio(), handler)
        for request in range(11):
            send(workers, request)
        await workers.run()

    trio.run(main)
    assert sorted(answered) == list(range(11))


def test_one_idle_task_at_a_time_is_woken() -> None:
    """However many requests one task carries out without waiting, the idle ones stay asleep."""
    idle, looked = 20, []

    async def main() -> None:
        turn = loop._Trio().Lock()

        async def wait(number: int) -> None:
            async with turn:
                looked.append(number)
                await trio.sleep_forever()

        async with trio.open_nursery() as nursery:
            async with turn:
                for number in range(idle):
                    nursery.start_soon(wait, number)
                await trio.testing.wait_all_tasks_blocked()
            for _ in range(50):
                async with turn:
                    assert len(turn._waiting) >= idle - 1
            await trio.testing.wait_all_tasks_blocked()
            assert len(looked) == 1
            nursery.cancel_scope.cancel()

    trio.run(main)


class Endless:
    """A loop over a descriptor that is always readable, with handlers that never wait."""

    MOST = 400_000

    def __init__(self) -> None:
        self.requests = 0
        self.stop = False

    async def run(self) -> None:
        reading, writing = os.pipe()
        os.write(writing, b"x")
        ours = loop._Trio()
        lock = ours.Lock()
        try:
            while not self.stop and self.requests < self.MOST:
                async with lock:
                    await ours.lowlevel.wait_readable(reading)
                self.requests += 1
        finally:
            os.close(reading)
            os.close(writing)


def test_others_get_their_turn_however_many_requests_there_are() -> None:
    """Tasks, timers and threads go on while there is never a moment without a request."""
    endless = Endless()
    steps = 0

    async def other() -> None:
        nonlocal steps
        for _ in range(5):
            await trio.lowlevel.checkpoint()
            await trio.sleep(0.0001)
            await trio.to_thread.run_sync(int)
            steps += 1
        endless.stop = True

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(endless.run)
            nursery.start_soon(other)

    trio.run(main)
    assert steps == 5
    assert 0 < endless.requests < Endless.MOST, "the others came only once the requests had ended"


def test_a_cancellation_is_noticed_however_many_requests_there_are() -> None:
    """A loop that never parks ends when its scope is cancelled."""
    endless = Endless()

    async def main() -> None:
        with trio.move_on_after(0.01):
            await endless.run()

    trio.run(main)
    assert 0 < endless.requests < Endless.MOST


def test_a_cancelled_pause_leaves_the_lock_free() -> None:
    """Cancelled while the others have their turn, a task does not keep what it had just taken."""

    async def main() -> None:
        lock = loop._Trio().Lock()
        with trio.CancelScope() as scope:
            scope.cancel()
            async with lock:
                pytest.fail("not cancelled")
        with trio.fail_after(60):
            async with lock:
                pass

    trio.run(main)


def test_a_request_that_the_kernel_took_back_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Woken with nothing there (its caller was killed), the task parks again; reading would hang
    the process. If the session has ended meanwhile, it ends.
    """
    reading, writing = os.pipe()
    real = trio.lowlevel.wait_readable
    wakings = []

    async def wait_readable(fd: int) -> None:
        wakings.append(fd)
        if len(wakings) == 2:
            os.write(writing, b"x")
        if len(wakings) == 5:
            ours.lowlevel.notify_closing(fd)
        if len(wakings) in (2, 6):
            await real(fd)
        else:
            await trio.lowlevel.checkpoint()

    monkeypatch.setattr(trio.lowlevel, "wait_readable", wait_readable)
    ours = loop._Trio()

    async def main() -> None:
        await ours.lowlevel.wait_readable(reading)
        assert len(wakings) == 2, "it took a waking for a request"
        assert os.read(reading, 1) == b"x"
        with pytest.raises(trio.ClosedResourceError):
            await ours.lowlevel.wait_readable(reading)
        assert len(wakings) == 5

    trio.run(main)
    os.close(reading)
    os.close(writing)


# ---- whether it is used --------------------------------------------------------------------------


@pytest.fixture
def the_loop(monkeypatch: pytest.MonkeyPatch) -> Iterator[loop.Loop]:
    monkeypatch.delenv("VSNAPFS_PLAIN_LOOP", raising=False)
    the_loop = loop.Loop()
    yield the_loop
    the_loop.remove()
    assert pyfuse3.trio is trio  # type: ignore[attr-defined]


def test_pyfuse3_is_given_its_trio_back(the_loop: loop.Loop) -> None:
    """The name is replaced from `install` to `remove`; unused, the loop does not claim to poll."""
    the_loop.install()
    assert pyfuse3.trio is not trio  # type: ignore[attr-defined]
    assert not the_loop.polling
    assert "does not use" in the_loop.note


@pytest.mark.parametrize("version", ["3.1.1", "3.6.0", "4.0", "", "unknown"])
def test_an_unknown_pyfuse3_keeps_its_own_loop(
    the_loop: loop.Loop, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    """With a version that nobody has tried nothing is replaced, and the note says why."""
    monkeypatch.setattr(pyfuse3, "__version__", version)
    the_loop.install()
    assert pyfuse3.trio is trio  # type: ignore[attr-defined]
    assert not the_loop.polling
    assert the_loop.note == f"pyfuse3 {version} has not been tried"


def test_a_pyfuse3_with_other_parts_keeps_its_own_loop(
    the_loop: loop.Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A right version number is not enough."""
    monkeypatch.delattr(pyfuse3, "_wait_fuse_readable")
    the_loop.install()
    assert pyfuse3.trio is trio  # type: ignore[attr-defined]
    assert "not built as expected" in the_loop.note


def test_the_plain_loop_can_be_asked_for(
    the_loop: loop.Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """VSNAPFS_PLAIN_LOOP leaves pyfuse3 alone."""
    monkeypatch.setenv("VSNAPFS_PLAIN_LOOP", "1")
    the_loop.install()
    assert pyfuse3.trio is trio  # type: ignore[attr-defined]
    assert the_loop.note == "VSNAPFS_PLAIN_LOOP is set"


# ---- the kernel's limits -------------------------------------------------------------------------


@pytest.fixture
def sys_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """/sys as it is after a mount on 0:53."""
    (tmp_path / "53").mkdir()
    (tmp_path / "0:53").mkdir()
    (tmp_path / "53" / "max_background").write_text("12\n")
    (tmp_path / "53" / "congestion_threshold").write_text("9\n")
    (tmp_path / "0:53" / "read_ahead_kb").write_text("128\n")
    monkeypatch.setattr(kernel, "_CONNECTIONS", tmp_path)
    monkeypatch.setattr(kernel, "_BDI", tmp_path)
    return tmp_path


def test_limits_are_raised_and_shown(sys_files: Path) -> None:
    """Requests in the background and read-ahead grow; read_ahead is told in bytes."""
    limits = kernel.KernelLimits("0:53")
    assert limits.as_they_are() == {
        "max_background": 12,
        "congestion_threshold": 9,
        "read_ahead": 131072,
    }
    limits.raise_them()
    assert limits.as_they_are() == {
        "max_background": 64,
        "congestion_threshold": 48,
        "read_ahead": 1048576,
    }


def test_limits_that_are_higher_stay(sys_files: Path) -> None:
    """What an administrator has set higher is not lowered."""
    (sys_files / "53" / "max_background").write_text("500\n")
    (sys_files / "0:53" / "read_ahead_kb").write_text("4096\n")
    limits = kernel.KernelLimits("0:53")
    limits.raise_them()
    shown = limits.as_they_are()
    assert (shown["max_background"], shown["read_ahead"]) == (500, 4096 << 10)


def test_limits_that_may_not_be_raised_are_shown_as_they_are(
    sys_files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the right to, nothing fails."""

    def refuse(self: Path, text: str) -> int:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "write_text", refuse)
    limits = kernel.KernelLimits("0:53")
    limits.raise_them()
    assert limits.as_they_are()["max_background"] == 12


@pytest.mark.parametrize("device", ["", "0:54", "nonsense"])
def test_limits_that_cannot_be_found_are_unknown(sys_files: Path, device: str) -> None:
    """Where /sys/fs/fuse/connections is not mounted (many containers) status says null."""
    (sys_files / "none").mkdir()
    limits = kernel.KernelLimits(device)
    limits.raise_them()
    assert set(limits.as_they_are().values()) == {None}
