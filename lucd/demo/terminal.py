"""What the demo says: one line per step with the time, and a table at the end."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar

R = TypeVar("R")


class Terminal:
    """Prints the story. Progress within a step overwrites its line on a terminal and is left out elsewhere."""

    def __init__(self) -> None:
        self._began_s = time.monotonic()
        self._live = sys.stdout.isatty()

    def elapsed_s(self) -> float:
        return time.monotonic() - self._began_s

    def say(self, text: str = "") -> None:
        """One line with the time since the start; an empty one without."""
        print(f"[{self.elapsed_s():6.1f} s] {text}" if text else "", flush=True)

    def detail(self, text: str) -> None:
        """A line below the last one."""
        print(f"           {text}", flush=True)

    def progress(self, text: str) -> None:
        """Replace the current line, on a terminal only."""
        if self._live:
            print(f"\r\033[K           {text}", end="", flush=True)

    def progress_end(self) -> None:
        if self._live:
            print("\r\033[K", end="", flush=True)

    @contextmanager
    def step(self, text: str) -> Iterator[None]:
        """Say the text, then how long the block took."""
        self.say(text)
        began_s = time.monotonic()
        yield
        self.detail(f"done in {time.monotonic() - began_s:.1f} s")


class Calls:
    """Times calls by name. A call that raises is counted as failed and raises."""

    def __init__(self) -> None:
        self._took_s: dict[str, list[float]] = {}
        self.failed: list[str] = []

    def timed(self, name: str, call: Callable[[], R]) -> R:
        began_s = time.perf_counter()
        try:
            return call()
        except Exception as error:
            self.failed.append(f"{name}: {type(error).__name__}: {' '.join(str(error).split())}"[:300])
            raise
        finally:
            self._took_s.setdefault(name, []).append(time.perf_counter() - began_s)

    def took_s(self) -> dict[str, list[float]]:
        """Seconds of each call, by name, in the order of first use."""
        return self._took_s

    def add(self, took_s: Mapping[str, Sequence[float]], failed: Sequence[str] = ()) -> None:
        """Calls that were timed in another process."""
        for name, more in took_s.items():
            self._took_s.setdefault(name, []).extend(more)
        self.failed += failed

    @property
    def count(self) -> int:
        return sum(len(took) for took in self._took_s.values())

    def longest_s(self) -> float:
        return max((max(took) for took in self._took_s.values()), default=0.0)

    def rows(self) -> list[tuple[str, str, str, str, str]]:
        """(name, count, p50 ms, p95 ms, longest ms), in the order of first use."""
        return [
            (name, str(len(took)), quantile_ms(took, 0.5), quantile_ms(took, 0.95), quantile_ms(took, 1.0))
            for name, took in self._took_s.items()
        ]


def quantile_ms(took_s: Sequence[float], part: float) -> str:
    """Milliseconds below which this part of the calls stayed."""
    ordered = sorted(took_s)
    return f"{ordered[min(len(ordered) - 1, int(part * len(ordered)))] * 1000:.1f}"
