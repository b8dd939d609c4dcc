"""One thread of a process at a time asks the store for what all of them share: the catalog, ids.

While the store is out of reach each question lasts as long as its timeout. Those who come meanwhile would ask one after
the other, and the last would wait that long times their number. So who has waited for a whole question that failed does
not ask again: nobody waits for more than the one that was under way and the one after it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

from dht.errors import Unavailable

R = TypeVar("R")


class Turns:
    """`lock` is held while one asks; whoever must not meet that holds it too."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._begun = 0
        self._failed: tuple[int, Unavailable] | None = None

    def take(self, ask: Callable[[], R]) -> R:
        """What `ask` returns or raises; Unavailable too if another's question, begun while this one waited, was."""
        came = self._begun
        with self.lock:
            if self._failed is not None and self._failed[0] > came:
                error = self._failed[1]
                raise type(error)(error.message, **error.detail)
            self._begun += 1
            try:
                result = ask()
            except Unavailable as error:
                self._failed = self._begun, error
                raise
            self._failed = None
            return result
