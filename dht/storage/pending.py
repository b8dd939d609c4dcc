"""What was submitted to a disk and may not be in its file yet, of one key space; reads look here first.

Nearly all of it is in the file before anybody asks for a range. So keys are put in order only when one is asked for: to
keep them in order at each write would cost more than all the rest that a write does here.
"""

from __future__ import annotations

from typing import Final

from sortedcontainers import SortedDict

_SLACK_KEYS: Final = 1024


class Pending:
    """Key -> (number of the batch, value); None deletes."""

    __slots__ = ("_entries", "_fresh", "_ordered")

    def __init__(self) -> None:
        self._entries: dict[bytes, tuple[int, bytes | None]] = {}
        # Keys that `_ordered` may lack, some of them twice, or gone since; and those in order, some of them gone since.
        self._fresh: list[bytes] = []
        self._ordered = SortedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def put(self, key: bytes, number: int, value: bytes | None) -> None:
        if key not in self._entries:
            self._fresh.append(key)
            if len(self._fresh) > 2 * len(self._entries) + _SLACK_KEYS:
                self._fresh = [*(old for old in dict.fromkeys(self._fresh) if old in self._entries), key]
        self._entries[key] = number, value

    def get(self, key: bytes) -> tuple[int, bytes | None] | None:
        return self._entries.get(key)

    def forget(self, key: bytes, number: int) -> None:
        """The batch is in the file: what a later one wrote stays."""
        entry = self._entries.get(key)
        if entry is None or entry[0] != number:
            return
        del self._entries[key]
        if not self._entries:
            self._fresh.clear()
            if self._ordered:
                self._ordered.clear()

    def range(self, low: bytes, high: bytes | None, reverse: bool) -> list[tuple[bytes, bytes | None]]:
        """Keys and values with low <= key < high (None: to the end), in key order."""
        entries = self._entries
        if not entries:
            return []
        if self._fresh:
            self._ordered.update(dict.fromkeys([key for key in self._fresh if key in entries]))
            self._fresh.clear()
            if len(self._ordered) > 2 * len(entries) + _SLACK_KEYS:
                self._ordered = SortedDict.fromkeys(entries)
        keys = self._ordered.irange(low, high, inclusive=(True, False), reverse=reverse)
        return [(key, entries[key][1]) for key in keys if key in entries]
