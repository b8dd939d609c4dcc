"""An asyncio event loop in virtual time: no I/O, no threads, and time that jumps to the next timer.

Everything that runs is decided by the seed: callbacks run first in, first out (or shuffled by a seeded generator), and
timers by their time, then by the order in which they were set. `asyncio.timeout`, `wait_for` and `sleep` work, because
they ask the loop for the time.

A `Process` is what a node's callbacks belong to: every task and timer that a node's code makes inherits it through
its context. While it is frozen (paused, or dead) its callbacks are kept aside, so a crash is exact: not one more
instruction of the node runs, no `finally` and no handler of CancelledError. At the end of a run the kept callbacks are
let go once, with their tasks cancelled, so that nothing is left to the garbage collector.
"""

from __future__ import annotations

import asyncio
import collections
import contextvars
import gc
import heapq
import random
from collections.abc import Coroutine, Iterator
from typing import Any, TypeVar

T = TypeVar("T")

STEPS_MAX = 5_000_000
FAREWELL_STEPS_MAX = 200_000


class Stuck(AssertionError):
    """Nothing is scheduled, or a limit of the run was passed, while the run's coroutine has not ended."""


class BackgroundFailure(AssertionError):
    """A task or callback ended with an exception that nobody looked at."""


class Process:
    """One boot of one node, as the loop sees it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.frozen = False
        self.kept: list[asyncio.Handle] = []
        self.context = contextvars.copy_context()
        self.context.run(_process.set, self)

    def fresh_context(self) -> contextvars.Context:
        """A context for a task that begins in this process."""
        return self.context.copy()


_process: contextvars.ContextVar[Process | None] = contextvars.ContextVar("process", default=None)


class VirtualLoop(asyncio.BaseEventLoop):
    """`shuffle`: callbacks that are ready at the same moment run in this generator's order, not first in, first out."""

    _ready: collections.deque[asyncio.Handle]

    def __init__(self, shuffle: random.Random | None = None) -> None:
        super().__init__()
        self._now_s = 0.0
        self._shuffle = shuffle
        self._timers: list[tuple[float, int, asyncio.TimerHandle]] = []
        self._timers_set = 0
        self._tasks: dict[asyncio.Task[Any], Process | None] = {}
        self.steps = 0
        self.steps_max = STEPS_MAX
        self.time_limit_s: float | None = None
        self.failures: list[str] = []
        self.set_exception_handler(self._note_failure)

    def time(self) -> float:
        return self._now_s

    def call_at(  # type: ignore[override]
        self, when: float, callback: Any, *args: Any, context: Any = None
    ) -> asyncio.TimerHandle:
        self._check_closed()  # type: ignore[attr-defined]
        timer = asyncio.TimerHandle(when, callback, args, self, context)
        self._timers_set += 1
        heapq.heappush(self._timers, (when, self._timers_set, timer))
        return timer

    def create_task(self, coro: Any, *, name: Any = None, context: Any = None) -> Any:
        task = super().create_task(coro, name=name, context=context)
        self._tasks[task] = (context or contextvars.copy_context()).get(_process)
        task.add_done_callback(self._forget_task, context=contextvars.Context())
        return task

    def run_in_executor(self, executor: Any, func: Any, *args: Any) -> Any:  # type: ignore[override]
        raise RuntimeError(f"the simulator has no threads: {func!r} would leave virtual time")

    def resume(self, process: Process) -> None:
        """Let a frozen process run on: its kept callbacks come in the order in which they became due."""
        process.frozen = False
        self._ready.extend(process.kept)
        process.kept.clear()

    def _forget_task(self, task: asyncio.Task[Any]) -> None:
        self._tasks.pop(task, None)

    def _note_failure(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        where = context.get("task") or context.get("future") or context.get("handle")
        self.failures.append(f"{context.get('message')}: {error!r} in {where}")

    def _process_events(self, event_list: Any) -> None:
        """No selector, no events."""

    def _write_to_self(self) -> None:
        """Nobody waits outside: there is nobody to wake."""

    def _run_once(self) -> None:
        timers, ready = self._timers, self._ready
        while timers and timers[0][2]._cancelled:
            heapq.heappop(timers)
        if not ready:
            if not timers:
                raise Stuck("nothing is scheduled and the run has not ended\n" + self.dump())
            self._now_s = max(self._now_s, timers[0][0])
            if self.time_limit_s is not None and self._now_s > self.time_limit_s:
                raise Stuck(f"virtual time passed {self.time_limit_s:.1f} s\n" + self.dump())
        while timers and timers[0][0] <= self._now_s:
            ready.append(heapq.heappop(timers)[2])
        if self._shuffle is not None and len(ready) > 1:
            batch = list(ready)
            ready.clear()
            self._shuffle.shuffle(batch)
            ready.extend(batch)
        for _ in range(len(ready)):
            handle = ready.popleft()
            if handle._cancelled:
                continue
            process: Process | None = handle._context.get(_process)  # type: ignore[attr-defined]
            if process is not None and process.frozen:
                process.kept.append(handle)
                continue
            self.steps += 1
            handle._run()
        if self.steps > self.steps_max:
            raise Stuck(f"more than {self.steps_max} steps\n" + self.dump())

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """Cancelled timers stay in the heap until they come up; a run is too short for them to matter."""

    def dump(self) -> str:
        """The unfinished tasks, one a line: process, name, where it waits."""
        lines = [f"virtual time {self._now_s:.6f} s, step {self.steps}, {len(self._tasks)} unfinished tasks"]
        for task, process in self._tasks.items():
            state = "" if process is None else f"[{process.name}{' frozen' if process.frozen else ''}] "
            lines.append(f"  {state}{task.get_name()}: {' < '.join(_waits_at(task))}")
        return "\n".join(lines)

    def farewell(self) -> None:
        """Cancel every task, frozen ones too, and run until they have ended."""
        self.time_limit_s, self._shuffle = None, None
        for process in _distinct(self._tasks.values()):
            self.resume(process)
        limit = self.steps + FAREWELL_STEPS_MAX
        while self._tasks and self.steps < limit:
            for task in list(self._tasks):
                task.cancel()
            self.run_until_complete(asyncio.sleep(0))


def _distinct(processes: Any) -> Iterator[Process]:
    seen: dict[int, Process] = {id(p): p for p in processes if p is not None}
    yield from seen.values()


def _waits_at(task: asyncio.Task[Any]) -> Iterator[str]:
    awaited: Any = task.get_coro()
    while awaited is not None:
        frame = getattr(awaited, "cr_frame", None)
        if frame is not None:
            yield f"{awaited.__qualname__}:{frame.f_lineno}"
        awaited = getattr(awaited, "cr_await", None)


def run(
    main: Coroutine[Any, Any, T],
    *,
    time_limit_s: float,
    shuffle: random.Random | None = None,
    steps_max: int = STEPS_MAX,
) -> T:
    """Run the coroutine to its end in a virtual loop of its own.

    Raises Stuck when nothing can happen any more or a limit is passed, BackgroundFailure when any task failed unseen.
    """
    loop = VirtualLoop(shuffle)
    loop.time_limit_s, loop.steps_max = time_limit_s, steps_max
    collecting = gc.isenabled()
    gc.disable()  # finalizers run when the interpreter likes; the seed decides here
    try:
        try:
            result = loop.run_until_complete(main)
        finally:
            loop.farewell()
        if loop.failures:
            raise BackgroundFailure("\n".join(loop.failures))
        return result
    finally:
        if collecting:
            gc.enable()
        loop.close()
