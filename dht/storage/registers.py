"""The registers of a node as they rest on its disk: header, rows, index entries, in one batch per change.

Keys: Space.REGISTER tablet (2 bytes) + group key; Space.ROW length of the group key (4 bytes) + group key + row key;
Space.INDEX and Space.SPEC as `dht.storage.indexes` says. Everything here is synchronous: reading a header, deciding,
writing and submitting the batch without an await in between is atomic in the loop. What is read is what was submitted,
so a batch holds at most one change of a register.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping, Sequence
from typing import Final, NamedTuple

import msgspec

from dht.errors import StorageError
from dht.model import SYSTEM_INTENT, ZERO, Ballot, FindQuery, GroupKey, RowKey, Struct, TableSpec
from dht.rows import encode_value, table_prefix, tablet_of
from dht.storage.changes import ChangeLog
from dht.storage.indexes import PREFIX_END, TABLE_PREFIX_BYTES, Indexes, database_prefix, row_place, scan
from dht.storage.search import Match, search
from dht.world import Batch, Disk, Space

_TABLET_BYTES: Final = 2
_FIRST_APPLICATION_TABLE: Final = table_prefix(1)
_INTENT_TABLE: Final = table_prefix(SYSTEM_INTENT)
_SYSTEM_END: Final = table_prefix(0)
"""Behind the keys of the store's own rows, whose tables are negative, and before those of all others."""
_ALL_TABLES: Final = None
_PLACES_KEPT: Final = 16_384
_HEADERS_KEPT: Final = 8_192


class Place(NamedTuple):
    """Where a group lies: its tablet, the key of its header, what the keys of its rows begin with, its database."""

    tablet: int
    header: bytes
    rows: bytes
    database: bytes


@functools.lru_cache(maxsize=_PLACES_KEPT)
def _place_of(key: GroupKey, tablets: int) -> Place:
    tablet = tablet_of(key, tablets)
    return Place(tablet, tablet.to_bytes(_TABLET_BYTES, "big") + key, row_place(key), database_prefix(key))


class Header(Struct, frozen=True):
    """What an acceptor keeps of a register besides the rows.

    `digest`: of all rows, system rows too (16 bytes; empty before the first write). `deleted`: a tombstone.
    `size_bytes` (of row keys and rows) and `intents` (rows of SYSTEM_INTENT) are kept by `RegisterFile`.
    """

    promise: Ballot = ZERO
    accepted: Ballot = ZERO
    chosen: Ballot = ZERO
    digest: bytes = b""
    deleted: bool = False
    size_bytes: int = 0
    intents: int = 0

    @property
    def settled(self) -> bool:
        """Whether readers may take the rows for decided: the accepted value is chosen and no intent is open."""
        return self.accepted == self.chosen and not self.intents


ABSENT: Final = Header()
_encode_header = msgspec.msgpack.Encoder().encode
_decode_header = msgspec.msgpack.Decoder(Header).decode


def _marked(header: Header) -> Header:
    return Header(
        header.promise,
        header.accepted,
        header.accepted,
        header.digest,
        header.deleted,
        header.size_bytes,
        header.intents,
    )


def _header_of(value: bytes) -> Header:
    try:
        return _decode_header(value)
    except msgspec.MsgspecError as error:
        raise StorageError(
            f"a register's header cannot be read ({error}): the file is damaged or of another version; wipe this "
            "node's data directory, it is rebuilt from the other replicas"
        ) from None


class RegisterFile:
    """All registers of one node, over its disk. `tablets`: the domain's number of tablets, fixed for its life."""

    def __init__(self, disk: Disk, tablets: int = 64) -> None:
        self._disk = disk
        self._tablets = tablets
        self._indexes = Indexes(disk)
        self.changes = ChangeLog()
        # database -> group -> the tables that were written since the group was last settled; None: any table.
        self._unsettled: dict[bytes, dict[GroupKey, set[bytes] | None]] = {}
        # What is chosen and not yet written down as such: it costs nothing with the register's next change.
        self._marks: dict[GroupKey, Ballot] = {}
        # Headers that were read or written lately, each with the bytes that it stands for.
        self._headers: dict[GroupKey, tuple[bytes, Header]] = {}
        for key, value in scan(disk, Space.REGISTER, b"", PREFIX_END * 3):
            if not _header_of(value).settled:
                group = key[_TABLET_BYTES:]
                self._unsettled.setdefault(database_prefix(group), {})[group] = _ALL_TABLES

    def header(self, key: GroupKey) -> Header:
        """The register's header; `ABSENT` when this node has none."""
        stored = self._stored_header(key, self._place(key))
        if self._marks and self._marks.get(key) == stored.accepted:
            return _marked(stored)
        return stored

    def _stored_header(self, key: GroupKey, place: Place) -> Header:
        """Without a mark that is not on the disk."""
        value = self._disk.get(Space.REGISTER, place.header)
        if value is None:
            return ABSENT
        known = self._headers.get(key)
        if known is not None and known[0] == value:
            return known[1]
        header = _header_of(value)
        self._keep(key, value, header)
        return header

    def _keep(self, key: GroupKey, value: bytes, header: Header) -> None:
        if len(self._headers) >= _HEADERS_KEPT:
            self._headers.clear()
        self._headers[key] = value, header

    def mark(self, key: GroupKey, ballot: Ballot) -> bool:
        """Note that the ballot is chosen; whether that is news of the state held here.

        In force at once, on the disk with the register's next change or with `keep_marks`: it is only a hint.
        """
        header = self.header(key)
        if header.accepted != ballot or header.chosen == ballot:
            return False
        self._marks[key] = ballot
        self.changes.note(key)
        if not header.intents:
            self._settle(self._place(key).database, key)
        return True

    def keep_marks(self, batch: Batch) -> None:
        """Into the batch, which is to hold nothing else: the marks that are not on the disk."""
        for key in list(self._marks):
            self.write(batch, key, self.header(key), {})

    def rows(self, key: GroupKey, *, system: bool | None = None) -> dict[RowKey, bytes]:
        """Rows of the group by row key, in key order: the store's own (True), those of the others (False), or all.

        The window alone may have many more rows than the application, and each that is read costs the same.
        """
        place = self._place(key).rows
        cut = len(place)
        low = place + _SYSTEM_END if system is False else place
        high = place + (_SYSTEM_END if system else PREFIX_END)
        return {pair[0][cut:]: pair[1] for pair in self._disk.range(Space.ROW, low, high)}

    def row(self, key: GroupKey, rowkey: RowKey) -> bytes | None:
        return self._disk.get(Space.ROW, self._place(key).rows + rowkey)

    def holds(self, key: GroupKey, prefix: bytes, count: int) -> bool:
        """Whether the group has so many rows whose keys begin so."""
        low = self._place(key).rows + prefix
        return len(list(self._disk.range(Space.ROW, low, low + PREFIX_END, limit=count))) == count

    def write(
        self,
        batch: Batch,
        key: GroupKey,
        header: Header,
        delta: Mapping[RowKey, bytes | None],
        was: Mapping[RowKey, bytes | None] | None = None,
    ) -> Header:
        """Into the batch: the header, and the rows that changed (None deletes). Returns the header as stored.

        `size_bytes` and `intents` of the given header are ignored: they follow from what is stored and the delta.
        `was`: the delta's rows as they are here, from who has looked already.
        """
        place = self._place(key)
        before = self._stored_header(key, place)
        size_bytes, intents = before.size_bytes, before.intents
        rows_at = place.rows
        for rowkey, new in delta.items():
            old = self._disk.get(Space.ROW, rows_at + rowkey) if was is None else was[rowkey]
            if old == new:
                continue
            if old is not None:
                size_bytes -= len(rowkey) + len(old)
            if new is not None:
                size_bytes += len(rowkey) + len(new)
            table = rowkey[:TABLE_PREFIX_BYTES]
            if table == _INTENT_TABLE:
                intents += (new is not None) - (old is not None)
            batch.writes.append((Space.ROW, rows_at + rowkey, new))
            if table >= _FIRST_APPLICATION_TABLE:
                self._indexes.change(batch, place.tablet, place.database, key, rowkey, old, new)
        header = Header(
            header.promise, header.accepted, header.chosen, header.digest, header.deleted, size_bytes, intents
        )
        value = _encode_header(header)
        batch.put(Space.REGISTER, place.header, value)
        self._keep(key, value, header)
        self._marks.pop(key, None)
        self.changes.note(key)
        self._note(place.database, key, header, delta)
        return header

    def replace(self, batch: Batch, key: GroupKey, header: Header, rows: Mapping[RowKey, bytes]) -> Header:
        """Into the batch: the register with exactly these rows, whatever it held. Returns the header as stored."""
        delta: dict[RowKey, bytes | None] = dict.fromkeys(self.rows(key))
        delta.update(rows)
        stored = self.write(batch, key, header, delta)
        if not stored.settled:
            self._unsettled[self._place(key).database][key] = _ALL_TABLES
        return stored

    def erase(self, batch: Batch, key: GroupKey) -> None:
        """Into the batch: the register gone without a trace (collection of a tombstone, wipe of a tablet)."""
        self.write(batch, key, ABSENT, dict.fromkeys(self.rows(key)))
        place = self._place(key)
        batch.delete(Space.REGISTER, place.header)
        self._settle(place.database, key)

    def keys(self, tablet: int, after: GroupKey = b"", limit: int | None = None) -> list[GroupKey]:
        """Groups of the tablet that have a header (tombstones too), in key order, those behind `after` only."""
        prefix = tablet.to_bytes(_TABLET_BYTES, "big")
        low = prefix + after + b"\x00" if after else prefix
        pairs = self._disk.range(Space.REGISTER, low, prefix + PREFIX_END, limit=limit)
        return [pair[0][_TABLET_BYTES:] for pair in pairs]

    def headers(
        self, tablet: int, after: GroupKey = b"", until: GroupKey | None = None, limit: int | None = None
    ) -> list[tuple[GroupKey, Header]]:
        """The same groups with their headers, those up to `until` only: one look at the disk for all of them."""
        prefix = tablet.to_bytes(_TABLET_BYTES, "big")
        low = prefix + after + b"\x00" if after else prefix
        high = prefix + (PREFIX_END if until is None else until + b"\x00")
        pairs = self._disk.range(Space.REGISTER, low, high, limit=limit)
        return [(place[_TABLET_BYTES:], self._marked_header(place[_TABLET_BYTES:], value)) for place, value in pairs]

    def keys_with(self, tablet: int, prefix: bytes, after: GroupKey = b"", limit: int | None = None) -> list[GroupKey]:
        """Groups of the tablet that have a header and whose key begins so, in key order, those behind `after` only."""
        place = tablet.to_bytes(_TABLET_BYTES, "big")
        low = max(place + prefix, place + after + b"\x00")
        pairs = self._disk.range(Space.REGISTER, low, place + prefix + PREFIX_END, limit=limit)
        return [pair[0][_TABLET_BYTES:] for pair in pairs]

    def tablet(self, key: GroupKey) -> int:
        return _place_of(key, self._tablets).tablet

    def spec_version(self, database: str) -> int:
        """The catalog version that the indexes of the database follow; 0 before the first."""
        return self._indexes.version(database)

    def told_version(self, key: GroupKey) -> int:
        """The newest catalog version of the group's database that this node knows of, followed or not."""
        return self._indexes.told(self._place(key).database)

    def told_versions(self) -> dict[bytes, int]:
        """The same of every database, by its encoded name."""
        return self._indexes.all_told()

    def tell_versions(self, batch: Batch, versions: Mapping[bytes, int]) -> None:
        """Into the batch: versions that other replicas told. In force at once."""
        for database, version in versions.items():
            self._indexes.tell(batch, database, version)

    def set_specs(
        self, batch: Batch, database: str, version: int, specs: Sequence[TableSpec], *, fill: bool = True
    ) -> None:
        """Into the batch: the table specs, new indexes filled from the rows, and old ones dropped.

        The batch must not hold changes of the database's application rows. In force at once. Version 0 without specs
        forgets the database. Where there may be many rows, `fill` comes before: what it has filled is not filled again.
        """
        self._indexes.set_specs(batch, database, version, specs, fill)

    def fill(self, batch: Batch, database: str, specs: Sequence[TableSpec]) -> bool:
        """Into the batch: one piece of what `set_specs` would fill, and whether it was the last. See `Indexes.fill`."""
        return self._indexes.fill(batch, database, specs)

    def find_local(
        self, query: FindQuery, tablets: Collection[int] | None = None, limit: int | None = None
    ) -> tuple[list[Match], bool]:
        """Matching rows of the tablets (None: all) in query order, and whether there are more than were given.

        Without `query.order`, rows come by primary key and only `limit` cuts; with it, the lower of `query.limit` and
        `limit` does.
        """
        return search(self._disk, self._indexes, query, None if tablets is None else frozenset(tablets), limit)

    def pk_columns(self, database: str, table: int) -> tuple[int, ...]:
        """The table's primary-key columns; empty while no spec has told them."""
        return self._indexes.of(encode_value(database), table_prefix(table)).primary.columns

    def unsettled(self, database: str, table: int, tablets: Collection[int] | None) -> list[GroupKey]:
        """Groups of the tablets whose rows of the table may not be decided yet; possibly some more, never fewer."""
        groups = self._unsettled.get(encode_value(database))
        if not groups:
            return []
        wanted = table_prefix(table)
        asked = None if tablets is None else frozenset(tablets)
        return sorted(
            group
            for group, touched in groups.items()
            if (touched is None or wanted in touched) and (asked is None or tablet_of(group, self._tablets) in asked)
        )

    def all_unsettled(self) -> list[GroupKey]:
        """The same of all databases, tables and tablets."""
        return sorted(group for groups in self._unsettled.values() for group in groups)

    def _place(self, key: GroupKey) -> Place:
        return _place_of(key, self._tablets)

    def _marked_header(self, key: GroupKey, value: bytes) -> Header:
        header = _header_of(value)
        return _marked(header) if self._marks and self._marks.get(key) == header.accepted else header

    def _note(self, database: bytes, key: GroupKey, header: Header, delta: Mapping[RowKey, bytes | None]) -> None:
        if header.settled:
            self._settle(database, key)
            return
        groups = self._unsettled.setdefault(database, {})
        if header.intents or (key not in groups and not delta):
            # An intent's changes are opaque here, and without a delta nothing says what is in doubt.
            groups[key] = _ALL_TABLES
            return
        touched = groups.setdefault(key, set())
        if touched is not None:
            touched.update([rowkey[:TABLE_PREFIX_BYTES] for rowkey in delta])

    def _settle(self, database: bytes, key: GroupKey) -> None:
        groups = self._unsettled.get(database)
        if groups is not None and key in groups:
            del groups[key]
            if not groups:
                del self._unsettled[database]
