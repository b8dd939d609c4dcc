"""Starts a daemon whose clocks go slowly for a while: `slow_clock.py FILE python -m MODULE ARGUMENTS...`.

Where the WAN is slowed, what a daemon does by the clock has to be slowed as well: signs of life, timeouts, what it
looks at now and then. FILE says from when until when (of this machine's monotonic clock), and how many times; it is
shared by all daemons of a cluster, whose clocks therefore go on agreeing. Only the benchmark starts daemons so.
"""

from __future__ import annotations

import mmap
import runpy
import struct
import sys
import time
from functools import partial
from pathlib import Path

import uvloop

_FORM = struct.Struct("=ddd")
NEVER_S = float("inf")
_monotonic, _wall = time.monotonic, time.time


class Pace:
    """What FILE says, for whoever writes it."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._since_s, self._times = NEVER_S, 1.0
        self._write(NEVER_S)

    def _write(self, until_s: float) -> None:
        # In place: the daemons have the file mapped.
        with self.file.open("r+b" if self.file.exists() else "wb") as out:
            out.write(_FORM.pack(self._since_s, until_s, self._times))

    def slow(self, times: float) -> None:
        """From now on; once."""
        self._since_s, self._times = _monotonic(), times
        self._write(NEVER_S)

    def end(self) -> None:
        """The clocks go on as fast as others, late by what they lost."""
        self._write(_monotonic())


class SlowClock:
    """The daemon's clocks, by FILE."""

    def __init__(self, file: Path) -> None:
        with file.open("rb") as source:
            self._said = mmap.mmap(source.fileno(), _FORM.size, prot=mmap.PROT_READ)

    def times(self) -> float:
        """As a second takes now."""
        since_s, until_s, times = _FORM.unpack(self._said)
        return float(times) if since_s <= _monotonic() < until_s else 1.0

    def _late_s(self, now_s: float) -> float:
        since_s, until_s, times = _FORM.unpack(self._said)
        return max(0.0, min(now_s, until_s) - since_s) * (1 - 1 / times)

    def monotonic(self) -> float:
        now_s = _monotonic()
        return now_s - self._late_s(now_s)

    def wall(self) -> float:
        return _wall() - self._late_s(_monotonic())


def loop_on(clock: SlowClock) -> type[uvloop.Loop]:
    """An event loop that lives by the clock."""

    class SlowLoop(uvloop.Loop):
        def time(self):
            return clock.monotonic()

        def call_later(self, delay, callback, *args, context=None):
            return super().call_later(delay * clock.times(), callback, *args, context=context)

        def call_at(self, when, callback, *args, context=None):
            return self.call_later(when - clock.monotonic(), callback, *args, context=context)

    return SlowLoop


def main() -> None:
    clock = SlowClock(Path(sys.argv[1]))
    time.monotonic, time.time = clock.monotonic, clock.wall
    uvloop.run = partial(uvloop.run, loop_factory=loop_on(clock))
    _, _, _, _, module, *arguments = sys.argv
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
