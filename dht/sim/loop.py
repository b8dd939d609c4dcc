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
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, TypeVar

T = TypeVar("T")

STEPS_MAX = 5_000_000
FAREWELL_STEPS_MAX = 200_000
TASKS_SWEPT_AT_LEAST = 256


class Stuck(AssertionError):
    """Nothing is scheduled, or a limit of the run was passed, while the run's coroutine has not ended."""


class BackgroundFailure(AssertionError):
    """A task or callback ended with an exception that nobody looked at."""


class Process:
    """One boot of one node, as the loop sees it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.frozen = False
        self.kept: list[_Handle] = []
        self.context = contextvars.copy_context()
        self.context.run(_process.set, self)

    def fresh_context(self) -> contextvars.Context:
        """A context for a task that begins in this process."""
        return self.context.copy()


_process: contextvars.ContextVar[Process | None] = contextvars.ContextVar("process", default=None)
NOWHERE = contextvars.Context()
"""The context of callbacks that belong to no process: the network's and the disks'. They run one at a time."""


class _Handle:
    """What asyncio.Handle is, without its debugging: most of a run's time goes through here."""

    __slots__ = ("args", "callback", "cancelled_", "context", "when_s")

    def __init__(
        self, callback: Any, args: tuple[Any, ...], context: contextvars.Context | None, when_s: float
    ) -> None:
        self.callback: Callable[..., Any] | None = callback
        self.args = args
        self.context = contextvars.copy_context() if context is None else context
        self.when_s = when_s
        self.cancelled_ = False

    def cancel(self) -> None:
        self.cancelled_ = True
        self.callback, self.args = None, ()

    def cancelled(self) -> bool:
        return self.cancelled_

    def when(self) -> float:
        return self.when_s

    def __repr__(self) -> str:
        return f"callback {self.callback!r} due at {self.when_s:.6f} s"


class VirtualLoop(asyncio.BaseEventLoop):
    """`shuffle`: callbacks that are ready at the same moment run in this generator's order, not first in, first out."""

    _ready: collections.deque[_Handle]

    def __init__(self, shuffle: random.Random | None = None) -> None:
        super().__init__()
        self._now_s = 0.0
        self._shuffle = shuffle
        self._timers: list[tuple[float, int, _Handle]] = []
        self._timers_set = 0
        self._tasks: dict[asyncio.Task[Any], Process | None] = {}
        self._tasks_swept_at = TASKS_SWEPT_AT_LEAST
        self.steps = 0
        self.steps_max = STEPS_MAX
        self.time_limit_s: float | None = None
        self.failures: list[str] = []
        self.set_exception_handler(self._note_failure)

    def time(self) -> float:
        return self._now_s

    def call_soon(  # type: ignore[override]
        self, callback: Any, *args: Any, context: Any = None
    ) -> Any:
        handle = _Handle(callback, args, context, self._now_s)
        self._ready.append(handle)
        return handle

    def call_at(  # type: ignore[override]
        self, when: float, callback: Any, *args: Any, context: Any = None
    ) -> Any:
        timer = _Handle(callback, args, context, when)
        self._timers_set += 1
        heapq.heappush(self._timers, (when, self._timers_set, timer))
        return timer

    def call_later(  # type: ignore[override]
        self, delay: float, callback: Any, *args: Any, context: Any = None
    ) -> Any:
        return self.call_at(self._now_s + delay, callback, *args, context=context)

    def create_task(self, coro: Any, *, name: Any = None, context: Any = None) -> Any:
        if len(self._tasks) >= self._tasks_swept_at:
            self._sweep()
        if context is None:
            context = contextvars.copy_context()
        task = asyncio.Task(coro, loop=self, name=name, context=context)
        self._tasks[task] = context.get(_process)
        return task

    def _sweep(self) -> None:
        """Forget the tasks that have ended."""
        self._tasks = {task: process for task, process in self._tasks.items() if not task.done()}
        self._tasks_swept_at = max(TASKS_SWEPT_AT_LEAST, 2 * len(self._tasks))

    def run_in_executor(self, executor: Any, func: Any, *args: Any) -> Any:  # type: ignore[override]
        raise RuntimeError(f"the simulator has no threads: {func!r} would leave virtual time")

    def resume(self, process: Process) -> None:
        """Let a frozen process run on: its kept callbacks come in the order in which they became due."""
        process.frozen = False
        self._ready.extend(process.kept)
        process.kept.clear()

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
        while timers and timers[0][2].cancelled_:
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
            if handle.cancelled_:
                continue
            context = handle.context
            process = context.get(_process)
            if process is not None and process.frozen:
                process.kept.append(handle)
                continue
            self.steps += 1
            try:
                context.run(handle.callback, *handle.args)  # type: ignore[arg-type]
            except (SystemExit, KeyboardInterrupt):
                raise
            except BaseException as error:
                self.call_exception_handler({"message": "a callback failed", "exception": error, "handle": handle})
        if self.steps > self.steps_max:
            raise Stuck(f"more than {self.steps_max} steps\n" + self.dump())

    def dump(self) -> str:
        """The unfinished tasks, one a line: process, name, where it waits."""
        self._sweep()
        lines = [f"virtual time {self._now_s:.6f} s, step {self.steps}, {len(self._tasks)} unfinished tasks"]
        for task, process in self._tasks.items():
            state = "" if process is None else f"[{process.name}{' frozen' if process.frozen else ''}] "
            lines.append(f"  {state}{task.get_name()}: {' < '.join(_waits_at(task))}")
        return "\n".join(lines)

    def farewell(self) -> None:
        """Cancel every task, frozen ones too, and run until they have ended."""
        self.time_limit_s, self._shuffle = None, None
        self._sweep()
        for process in _distinct(self._tasks.values()):
            self.resume(process)
        limit = self.steps + FAREWELL_STEPS_MAX
        while self._tasks and self.steps < limit:
            for task in list(self._tasks):
                task.cancel()
            self.run_until_complete(asyncio.sleep(0))
            self._sweep()


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
    loop: VirtualLoop | None = None,
) -> T:
    """Run the coroutine to its end in a virtual loop of its own.

    Raises Stuck when nothing can happen any more or a limit is passed, BackgroundFailure when any task failed unseen.
    """
    loop = VirtualLoop(shuffle) if loop is None else loop
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
