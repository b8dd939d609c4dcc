"""Which columns of which rows a transaction has read, and what of it guards what it will write (DESIGN section 6).

A stored row, and each state of it that the transaction made, is a `Record` of its own; what was read of one is a mask
of its columns, by position.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from dht.model import GroupKey
from nova_bridge.sql.groups import table_part
from nova_bridge.sql.schema import Place, Record

NOTES_MAX = 4096


class Marks:
    """Noted at once and added up only when it is asked for: most transactions change nothing they read.

    `copied`: columns that an INSERT took of a row, which guard a DELETE of it.
    """

    def __init__(self) -> None:
        self.copied: dict[Place, int] = {}
        self._notes: list[tuple[Iterable[Record], int]] = []
        self._read: dict[Record, int] = {}
        self._stale: dict[Place, dict[int, Any]] = {}

    def read(self, records: Iterable[Record], mask: int) -> None:
        """The statement saw these columns of these rows."""
        self._notes.append((records, mask))
        if len(self._notes) >= NOTES_MAX:
            self._fold()

    def copy(self, records: Iterable[Record], mask: int) -> None:
        """An INSERT took these columns of these rows."""
        for record in records:
            place = (record.group, record.key)
            self.copied[place] = self.copied.get(place, 0) | mask

    def look(self, record: Record, mask: int) -> None:
        """A statement that changes rows saw these columns of the row."""
        self._read[record] = self._read.get(record, 0) | mask

    def _fold(self) -> None:
        read, notes = self._read, self._notes
        self._notes = []
        for records, mask in notes:
            for record in records:
                read[record] = read.get(record, 0) | mask

    def of(self, records: Iterable[Record | None]) -> int:
        """The columns that were read of a row, which may have been met as any of these."""
        self._fold()
        mask = 0
        for record in records:
            if record is not None:
                mask |= self._read.get(record, 0)
        return mask

    def stale(self, place: Place) -> dict[int, Any]:
        """What was read of the row's columns, by position, when its group was at an older ballot than it is at now."""
        return self._stale.get(place, {})

    def tables(self) -> set[bytes]:
        """Of which tables rows were read, by `table_part`."""
        self._fold()
        return {table_part(record.key) for record in self._read} | {table_part(key) for _, key in self._stale}

    def outdate(self, key: GroupKey | None) -> None:
        """What was read of a group, which is met at another ballot now, still guards. None: of all groups."""
        self._fold()
        for record, mask in self._read.items():
            if key is None or record.group == key:
                kept = self._stale.setdefault((record.group, record.key), {})
                for position in range(len(record.values)):
                    if mask >> position & 1:
                        kept.setdefault(position, record.stored(position))

    def carry(self, before: Record, after: Record) -> None:
        """What was read of the row as it was is as if read of what a change made of it."""
        self._fold()
        self._read[after] = self._read.get(before, 0)

    def hand_back(self, undone: Record, base: Record | None, own: Collection[int]) -> None:
        """A change is undone. What was read of what it made of the row, and is not its own, was read of the stored row.

        `own`: positions of the columns that this transaction has set.
        """
        self._fold()
        mask = self._read.pop(undone, 0)
        for position in own:
            mask &= ~(1 << position)
        if mask and base is not None:
            self._read[base] = self._read.get(base, 0) | mask
