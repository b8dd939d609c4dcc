"""The RPC door's worker processes: started beside the daemon, started again when they end, stopped with it."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import os
import signal
from collections.abc import Sequence

log = logging.getLogger(__name__)

BACKOFF_MIN_S = 0.5
BACKOFF_MAX_S = 30.0
STEADY_S = 60.0
"""A worker that ran that long starts again without delay."""
TERM_WAIT_S = 5.0
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)


def _die_with_parent() -> None:
    """Run in the child: a daemon that is killed takes its workers along; they would answer for its successor."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


class WorkerSupervisor:
    """Keeps `count` processes of one command running. `counters`: running_now, starts, failures."""

    def __init__(self, command: Sequence[str], count: int, environment: dict[str, str] | None = None) -> None:
        self.command = tuple(command)
        self.count = count
        self.counters = {"running_now": 0, "starts": 0, "failures": 0}
        self._environment = {**os.environ, **(environment or {})}
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        self._tasks = [asyncio.create_task(self._keep(number)) for number in range(self.count)]

    async def stop(self) -> None:
        """End all processes: SIGTERM, and SIGKILL after TERM_WAIT_S."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []

    async def _keep(self, number: int) -> None:
        loop = asyncio.get_running_loop()
        pause_s = BACKOFF_MIN_S
        while True:
            began = loop.time()
            code = await self._run_once()
            self.counters["failures"] += 1
            pause_s = BACKOFF_MIN_S if loop.time() - began > STEADY_S else min(2 * pause_s, BACKOFF_MAX_S)
            log.warning("worker %s of the RPC door ended (exit code %s); starts again in %.1f s", number, code, pause_s)
            await asyncio.sleep(pause_s)

    async def _run_once(self) -> int:
        try:
            process = await asyncio.create_subprocess_exec(
                *self.command, stdin=asyncio.subprocess.DEVNULL, env=self._environment, preexec_fn=_die_with_parent
            )
        except OSError as error:
            log.error("a worker of the RPC door cannot be started: %s", error)
            return -1
        self.counters["starts"] += 1
        self.counters["running_now"] += 1
        try:
            return await process.wait()
        finally:
            self.counters["running_now"] -= 1
            if process.returncode is None:
                await _end(process)


async def _end(process: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.terminate()
        try:
            async with asyncio.timeout(TERM_WAIT_S):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()
