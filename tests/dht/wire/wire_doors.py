"""A local door with a test's own answers, in a thread with a loop of its own, so that blocking clients can be used."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

from dht.wire.local import LocalAnswer, LocalDoor


class LoopThread:
    """An event loop that runs in a thread until the test ends."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, Any], timeout_s: float = 10.0) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(timeout_s)

    def soon(self, call: Callable[[], object]) -> None:
        self.loop.call_soon_threadsafe(call)

    def close(self) -> None:
        self.soon(self.loop.stop)
        self._thread.join(5)
        self.loop.close()


@contextlib.contextmanager
def door_in_thread(path: str, answer: LocalAnswer) -> Iterator[tuple[LocalDoor, LoopThread]]:
    thread = LoopThread()
    door = LocalDoor(path, answer)
    thread.run(door.start())
    try:
        yield door, thread
    finally:
        thread.run(door.stop())
        thread.close()
