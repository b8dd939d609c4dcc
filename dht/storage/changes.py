"""Which registers of a node changed, in order, as far back as there is room: what its followers ask for.

A register that changes again moves to the end, so one that is written all the time takes one place. Nothing of this
rests on the disk: a node that starts begins to count anew, and its followers compare everything once.
"""

from __future__ import annotations

from typing import Final

from dht.model import GroupKey

CHANGES_KEPT_MAX: Final = 20_000


class ChangeLog:
    """`count`: of all changes since the start. `forgotten`: the newest one whose register is not known any more."""

    def __init__(self, kept_max: int = CHANGES_KEPT_MAX) -> None:
        self.count = 0
        self.forgotten = 0
        self._kept_max = kept_max
        self._at: dict[GroupKey, int] = {}

    def note(self, key: GroupKey) -> None:
        """The register is written, erased, or known to be chosen, from now on."""
        self.count += 1
        self._at.pop(key, None)
        self._at[key] = self.count
        if len(self._at) > self._kept_max:
            oldest = next(iter(self._at))
            self.forgotten = self._at.pop(oldest)

    def after(self, count: int, limit: int) -> tuple[list[GroupKey], int, bool]:
        """(registers that changed behind `count`, where to go on, whether there are more); `count` >= `forgotten`."""
        keys: list[GroupKey] = []
        for key in reversed(self._at):
            if self._at[key] <= count:
                break
            keys.append(key)
        keys.reverse()
        if len(keys) <= limit:
            return keys, self.count, False
        keys = keys[:limit]
        return keys, self._at[keys[-1]], True
