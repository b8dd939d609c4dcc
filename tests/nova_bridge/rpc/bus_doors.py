"""A daemon that is nothing but a bus behind a local door, in a thread with a loop of its own."""

from __future__ import annotations

import asyncio
import secrets
import threading
import time

from dht.wire.local import LocalDoor
from nova_bridge.rpc.bus import Bus


class BusDoor:
    def __init__(self, path):
        self.path = path
        self.bus = None
        self._door = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def start(self):
        self.bus = Bus(secrets.randbits(61))
        self._door = LocalDoor(self.path, self.bus.answer)
        self._run(self._door.start())

    def stop(self):
        if self._door is not None:
            self._run(self._door.stop())
            self._door = None

    def restart(self, pause_s):
        """Come back as a new process would: with an empty bus."""
        self.stop()
        time.sleep(pause_s)
        self.start()

    def close(self):
        self.stop()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)
        self._loop.close()

    def _run(self, work):
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(10)
