"""Groups as a process holds them: rows decoded once per table, kept across transactions, revalidated by ballot."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable

from dht.model import Ballot, GroupKey, GroupRead, RowKey, Value
from dht.rows import decode_row, table_prefix
from nova_bridge.sql.schema import Record, Table

CACHE_BYTES_MAX = 32 * 1024 * 1024
HINTS_MAX = 50_000
FOLLOWS_MAX = 4_000
FOLLOW_TIMES_MIN, FOLLOW_TIMES_MAX = 4, 256
_PREFIX_BYTES = 11
"""A row key begins with its table's number, whose encoding always has this length."""

_NONE: dict[RowKey, Record] = {}


def table_part(key: RowKey) -> bytes:
    """The part of a row key that says which table it is of."""
    return key[:_PREFIX_BYTES]


class GroupView:
    """One group at one ballot. Shared by transactions, so never changed after it is made but for lazy decoding."""

    __slots__ = ("_raw", "_records", "ballot", "key", "size_bytes", "version")

    def __init__(
        self, key: GroupKey, ballot: Ballot, rows: dict[RowKey, bytes], version: int, before: GroupView | None = None
    ) -> None:
        """`before`: the group at another ballot, of the same version; what is equal in both is not decoded again."""
        self.key, self.ballot, self.version = key, ballot, version
        raw: dict[bytes, dict[RowKey, bytes]] = {}
        self._raw = raw
        self._records: dict[int, dict[RowKey, Record]] = {}
        size_bytes = 0
        for row_key, data in rows.items():
            size_bytes += len(row_key) + len(data)
            part = row_key[:_PREFIX_BYTES]
            if part in raw:
                raw[part][row_key] = data
            else:
                raw[part] = {row_key: data}
        self.size_bytes = size_bytes
        if before is not None:
            # Other threads may be decoding more of it.
            for number, records in tuple(before._records.items()):
                prefix = table_prefix(number)
                if raw.get(prefix) == before._raw[prefix]:
                    self._records[number] = records

    def records(self, table: Table) -> dict[RowKey, Record]:
        """The table's rows in this group, by row key and in its order."""
        records = self._records.get(table.number)
        if records is None:
            raw = self._raw.get(table.prefix)
            if raw is None:
                return _NONE
            decode, key = table.decode, self.key
            records = {k: decode(key, k, decode_row(raw[k])) for k in sorted(raw)}
            self._records[table.number] = records
        return records

    def raw(self, prefix: bytes) -> dict[RowKey, bytes]:
        """Undecoded rows of one table."""
        return self._raw.get(prefix, {})


class GroupCache:
    """The groups read last, least recently used evicted first. Content counts only with the ballot confirmed."""

    def __init__(self, bytes_max: int = CACHE_BYTES_MAX) -> None:
        self._views: OrderedDict[GroupKey, GroupView] = OrderedDict()
        self._bytes, self._bytes_max = 0, bytes_max
        self._lock = threading.Lock()

    def get(self, key: GroupKey, version: int) -> GroupView | None:
        """The view decoded at this catalog version, if any."""
        view = self._views.get(key)
        return view if view is not None and view.version == version else None

    def take(self, read: GroupRead, known: GroupView | None, version: int) -> GroupView:
        """The view of what was read; `known` is the one at hand, whose ballot may have been named in the request."""
        if known is not None and (read.rows is None or read.ballot == known.ballot):
            with self._lock:
                if read.key in self._views:
                    self._views.move_to_end(read.key)
            return known
        view = GroupView(read.key, read.ballot, read.rows or {}, version, known)
        with self._lock:
            old = self._views.pop(read.key, None)
            self._bytes += view.size_bytes - (old.size_bytes if old else 0)
            self._views[read.key] = view
            while self._bytes > self._bytes_max and len(self._views) > 1:
                self._bytes -= self._views.popitem(last=False)[1].size_bytes
        return view

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._views.clear()
            self._bytes = 0


class Hints:
    """Where rows were seen: (table number, integer key) or an entry's group -> group key. Verified by every reader.

    `by_id`: numbers of the tables of which rows had to be found by their integer keys.
    """

    def __init__(self, entries_max: int = HINTS_MAX) -> None:
        self._groups: dict[tuple[int, Value] | GroupKey, GroupKey] = {}
        self._entries_max = entries_max
        self.by_id: set[int] = set()

    def get(self, key: tuple[int, Value] | GroupKey) -> GroupKey | None:
        """The group that held it last."""
        return self._groups.get(key)

    def put(self, key: tuple[int, Value] | GroupKey, group: GroupKey) -> None:
        """Remember; everything is forgotten at once when there is too much, it costs one find each to learn again."""
        if len(self._groups) >= self._entries_max:
            self._groups = {}
        self._groups[key] = group

    def clear(self) -> None:
        """Forget everything."""
        self._groups = {}


class Follows:
    """Which look-ups are followed by reads of the groups that they found, learned as they happen.

    Such a look-up asks for the groups in the same round. It is believed for some times, then asked once without, which
    shows whether the reads still come: more often each time that they do, less often when not.
    """

    def __init__(self, entries_max: int = FOLLOWS_MAX) -> None:
        self._entries: dict[Hashable, tuple[int, int]] = {}
        self._entries_max = entries_max

    def expected(self, look_up: Hashable) -> bool:
        """Whether to ask for the groups now."""
        times, grant = self._entries.get(look_up, (0, 0))
        if times:
            self._entries[look_up] = (times - 1, grant)
            return True
        if grant:
            self._entries[look_up] = (0, grant // 2)
        return False

    def confirm(self, look_up: Hashable) -> None:
        """Groups that it found, without asking for them, are read."""
        times, grant = self._entries.get(look_up, (0, 0))
        if times:
            return
        if len(self._entries) >= self._entries_max:
            self._entries = {}
        grant = min(max(FOLLOW_TIMES_MIN, grant * 4), FOLLOW_TIMES_MAX)
        self._entries[look_up] = (grant, grant)
