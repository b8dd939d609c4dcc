"""One daemon as a process: event loop, signals, log, readiness."""

from __future__ import annotations

import asyncio
import gc
import io
import logging
import signal
import sys
from collections.abc import Coroutine
from typing import Any

import uvloop

from lucd import directory
from lucd.conf.settings import Settings
from lucd.daemon import Daemon
from lucd.notify import notify

log = logging.getLogger(__name__)


def run_daemon(settings: Settings) -> None:
    """Run until SIGTERM or SIGINT. What keeps it from starting is raised as a DhtError before it is ready."""
    logging.basicConfig(
        stream=sys.stderr,
        level=settings.log_level.upper(),
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        force=True,
    )
    opened = directory.start(settings.data_dir, settings.pop)
    try:
        uvloop.run(_run(settings, opened))
    finally:
        opened.close()


async def _run(settings: Settings, opened: directory.OpenDirectory) -> None:
    asked_to_stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, asked_to_stop.set)
    loop.add_signal_handler(signal.SIGUSR1, _log_tasks)
    daemon = Daemon(settings, opened)
    try:
        await daemon.start()
        if not await _first_of(daemon.ready(), asked_to_stop.wait()):
            return
        # What the start left behind lives as long as the process: looking at it in every collection is wasted time.
        gc.collect()
        gc.freeze()
        notify("READY=1")
        log.info("node %s of PoP %s serves on %s", daemon.node_id.hex(), settings.pop, settings.socket)
        await asked_to_stop.wait()
        notify("STOPPING=1")
        log.info("stopping")
    finally:
        await daemon.stop()
    log.info("stopped")


def _log_tasks() -> None:
    """On SIGUSR1: where every running task waits, for whoever looks for one that hangs."""
    for task in asyncio.all_tasks():
        text = io.StringIO()
        task.print_stack(limit=12, file=text)
        log.info("%s", text.getvalue().rstrip())


async def _first_of(ready: Coroutine[Any, Any, None], asked_to_stop: Coroutine[Any, Any, Any]) -> bool:
    """Whether the node became ready before it was asked to stop. Raises what it cannot become ready for."""
    waiting = asyncio.ensure_future(ready)
    stopping = asyncio.ensure_future(asked_to_stop)
    try:
        await asyncio.wait((waiting, stopping), return_when=asyncio.FIRST_COMPLETED)
        if waiting.done():
            waiting.result()
        return waiting.done()
    finally:
        waiting.cancel()
        stopping.cancel()
