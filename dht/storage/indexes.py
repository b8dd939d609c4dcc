"""Index entries of the rows that a node keeps, and the table specs that say which indexes there are.

An entry lies in Space.INDEX under

    encoded (database, table, index id) + encoded column values + encoded primary key + group key

so that entries sort by the index's columns, then by primary key, then by group, and never collide. Its value says
where the tail's parts begin (`ENTRY`), so an entry is read without decoding it. Index 0 has the primary key itself for
columns (not twice) and is kept for each row of each application table, with or without a spec.

A new index of a table with many rows is filled in pieces (`fill`), between which others write. From before its first
piece a change of a row enters the row there too, and a piece enters the rows as they are by then; so behind the last
one the index is whole, and only then do the specs say so. A start forgets what was begun: it begins again, and what was
left of the time before is cleared first, as nobody kept it meanwhile.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

import msgspec

from dht.errors import StorageError
from dht.model import GroupKey, Row, RowKey, Struct, TableSpec
from dht.rows import decode_row, encode_value, table_prefix
from dht.world import Batch, Disk, Space

ENTRY: Final = struct.Struct(">HII")
"""An entry's value: tablet, bytes of the primary key, bytes of the group key."""
PREFIX_END: Final = b"\xff"
"""Sorts behind whatever may follow a complete encoded value, as every value's first byte is lower."""
TABLE_PREFIX_BYTES: Final = len(table_prefix(0))
FILL_ROWS_MAX: Final = 500
"""In one piece: some milliseconds in which the loop does nothing else."""
_SCAN_PAIRS_FIRST: Final = 64
_SCAN_PAIRS_MAX: Final = 4096
_MISSING: Final = encode_value(None)
_PRIMARY: Final = encode_value(0)


class StoredSpecs(Struct, frozen=True):
    """What Space.SPEC holds of a database. `told`: a version that other replicas named, if it is newer."""

    version: int
    tables: tuple[TableSpec, ...]
    told: int = 0


_decode_specs = msgspec.msgpack.Decoder(StoredSpecs).decode


@dataclass(frozen=True, slots=True)
class Index:
    """`prefix`: what all its entries begin with."""

    id: int
    columns: tuple[int, ...]
    prefix: bytes


@dataclass(frozen=True, slots=True)
class TableIndexes:
    """`primary.columns` is empty while no spec has told the primary key's columns. `written`: what a change of a row is
    entered in besides the primary one: `others`, which searches read, and those that are being filled."""

    primary: Index
    others: tuple[Index, ...]
    written: tuple[Index, ...]


@dataclass(slots=True)
class Filling:
    """The new indexes of a table, entered up to `cursor` in the primary one. `leftover`: to be cleared before."""

    added: tuple[Index, ...]
    leftover: list[Index]
    cursor: bytes
    whole: bool = False


@dataclass(slots=True)
class DatabaseIndexes:
    """`specs` and `tables`: by the table's encoded number, the latter of those that were asked for since the start.

    `told`: the newest version known, followed by the indexes or not. `fillings`: by table, of specs yet to come.
    """

    version: int
    specs: dict[bytes, TableSpec]
    told: int = 0
    tables: dict[bytes, TableIndexes] = field(default_factory=dict)
    fillings: dict[bytes, Filling] = field(default_factory=dict)


def database_prefix(group: GroupKey) -> bytes:
    """The encoded database name that a group's key begins with."""
    end = group.find(b"\x00", 1)
    while end >= 0 and group[end + 1 : end + 2] == b"\xff":
        end = group.find(b"\x00", end + 2)
    return group[: end + 1]


def scan(disk: Disk, space: int, low: bytes, high: bytes, *, reverse: bool = False) -> Iterator[tuple[bytes, bytes]]:
    """The pairs of a range, fetched in growing pieces, so that who stops early has not paid for all."""
    size = _SCAN_PAIRS_FIRST
    while True:
        pairs = disk.range(space, low, high, reverse=reverse, limit=size)
        yield from pairs
        if len(pairs) < size:
            return
        if reverse:
            high = pairs[-1][0]
        else:
            low = pairs[-1][0] + b"\x00"
        size = min(size * 4, _SCAN_PAIRS_MAX)


def row_place(group: GroupKey) -> bytes:
    """What the keys of all of a group's rows in Space.ROW begin with."""
    return len(group).to_bytes(4, "big") + group


class Indexes:
    """The indexes of one node's file."""

    def __init__(self, disk: Disk) -> None:
        self._disk = disk
        self._databases: dict[bytes, DatabaseIndexes] = {}
        for name, value in scan(disk, Space.SPEC, b"", PREFIX_END):
            try:
                stored = _decode_specs(value)
            except msgspec.MsgspecError as error:
                raise StorageError(f"the table specs of a database cannot be read ({error}); wipe the node") from None
            told = max(stored.version, stored.told)
            self._databases[name] = DatabaseIndexes(stored.version, _by_table(stored.tables), told)

    def version(self, database: str) -> int:
        """The catalog version whose indexes are complete here; 0 before the first."""
        known = self._databases.get(encode_value(database))
        return 0 if known is None else known.version

    def of(self, database: bytes, table: bytes) -> TableIndexes:
        """The indexes of a table; both arguments encoded."""
        known = self._databases.get(database)
        if known is None:
            known = self._databases[database] = DatabaseIndexes(0, {})
        indexes = known.tables.get(table)
        if indexes is None:
            indexes = known.tables[table] = _indexes_of(database, table, known.specs.get(table))
        return indexes

    def change(
        self,
        batch: Batch,
        tablet: int,
        database: bytes,
        group: GroupKey,
        key: RowKey,
        old: bytes | None,
        new: bytes | None,
    ) -> None:
        """Into the batch: the entries that a row gains and loses when `old` becomes `new`."""
        indexes = self.of(database, key[:TABLE_PREFIX_BYTES])
        pk = key[TABLE_PREFIX_BYTES:]
        tail = pk + group
        value = ENTRY.pack(tablet, len(pk), len(group))
        if old is None and new is not None:
            batch.put(Space.INDEX, indexes.primary.prefix + tail, value)
        elif new is None and old is not None:
            batch.delete(Space.INDEX, indexes.primary.prefix + tail)
        if not indexes.written:
            return
        before = None if old is None else decode_row(old)
        after = None if new is None else decode_row(new)
        for index in indexes.written:
            if before is not None and after is not None and _surely_same(before, after, index.columns):
                continue
            was = None if before is None else _encoded_columns(before, index.columns)
            now = None if after is None else _encoded_columns(after, index.columns)
            if was == now:
                continue
            if was is not None:
                batch.delete(Space.INDEX, index.prefix + was + tail)
            if now is not None:
                batch.put(Space.INDEX, index.prefix + now + tail, value)

    def set_specs(
        self, batch: Batch, database: str, version: int, specs: Sequence[TableSpec], fill: bool = True
    ) -> None:
        """Into the batch: the specs, the entries of new indexes, and the removal of those that no spec names.

        `fill` False: a planted bug of the simulator, indexes without the rows that are there already.
        """
        name = encode_value(database)
        known = self._databases.get(name, DatabaseIndexes(0, {}))
        new = _by_table(specs)
        if self._has_rows(name):
            self._change_entries(batch, name, known, new, fill)
        if version or specs:
            value = msgspec.msgpack.encode(StoredSpecs(version, tuple(specs)))
            batch.put(Space.SPEC, name, value)
        else:
            batch.delete(Space.SPEC, name)
        # A catalog changes in a table or two: what was made of the others stays.
        kept = {
            table: made
            for table, made in known.tables.items()
            if known.specs.get(table) == new.get(table) and table not in known.fillings
        }
        self._databases[name] = DatabaseIndexes(version, new, version, kept)

    def _has_rows(self, database: bytes) -> bool:
        return bool(self._disk.range(Space.INDEX, database, database + PREFIX_END, limit=1))

    def _change_entries(
        self, batch: Batch, database: bytes, known: DatabaseIndexes, new: dict[bytes, TableSpec], fill: bool
    ) -> None:
        """Into the batch: what becomes of the entries of rows that are there when these specs follow on those."""
        old = known.specs
        for table in dict.fromkeys([*old, *new, *known.fillings]):
            before, after, filling = old.get(table), new.get(table), known.fillings.get(table)
            if before == after and filling is None:
                continue
            had, has = _indexes_of(database, table, before), _indexes_of(database, table, after)
            begun = () if filling is None else (*filling.added, *filling.leftover)
            for index in dict.fromkeys([*had.others, *begun]):
                if index not in has.others:
                    for key, _ in scan(self._disk, Space.INDEX, index.prefix, index.prefix + PREFIX_END):
                        batch.delete(Space.INDEX, key)
            whole = filling.added if filling is not None and filling.whole else ()
            if fill:
                self._fill(batch, table, has, [i for i in has.others if i not in had.others and i not in whole])

    def fill(self, batch: Batch, database: str, specs: Sequence[TableSpec]) -> bool:
        """Into the batch: one piece of the entries that these specs will need. Whether they are all there then.

        The batch has to be submitted before the next piece, or before `set_specs` of the same specs, or with it.
        """
        name = encode_value(database)
        if not self._has_rows(name):
            return True
        known = self._databases.setdefault(name, DatabaseIndexes(0, {}))
        new = _by_table(specs)
        left = FILL_ROWS_MAX
        for table in [table for table in new if known.specs.get(table) != new[table]]:
            filling = self._filling(known, name, table, new[table])
            while not filling.whole and left > 0:
                left -= self._step(batch, table, filling, _indexes_of(name, table, None).primary.prefix, left)
            if not filling.whole:
                return False
        return True

    def _filling(self, known: DatabaseIndexes, database: bytes, table: bytes, spec: TableSpec) -> Filling:
        """Goes on with the one that was begun, if it is of the same indexes. From now on changes are entered there."""
        had = _indexes_of(database, table, known.specs.get(table))
        added = tuple([i for i in _indexes_of(database, table, spec).others if i not in had.others])
        filling = known.fillings.get(table)
        if filling is None or filling.added != added:
            begun = () if filling is None else (*filling.added, *filling.leftover)
            leftover = list(dict.fromkeys([*added, *begun]))
            filling = known.fillings[table] = Filling(added, leftover, had.primary.prefix, not added and not leftover)
            known.tables[table] = TableIndexes(had.primary, had.others, had.others + added)
        return filling

    def _step(self, batch: Batch, table: bytes, filling: Filling, start: bytes, rows_max: int) -> int:
        """One piece, of up to so many rows or entries; how many it took, at least 1."""
        if filling.leftover:
            low = filling.leftover[-1].prefix
            pairs = self._disk.range(Space.INDEX, low, low + PREFIX_END, limit=rows_max)
            for key, _ in pairs:
                batch.delete(Space.INDEX, key)
            if len(pairs) < rows_max:
                filling.leftover.pop()
            return max(1, len(pairs))
        pairs = self._disk.range(Space.INDEX, filling.cursor, start + PREFIX_END, limit=rows_max)
        self._enter(batch, table, start, filling.added, pairs)
        if pairs:
            filling.cursor = pairs[-1][0] + b"\x00"
        filling.whole = len(pairs) < rows_max
        return max(1, len(pairs))

    def told(self, database: bytes) -> int:
        """The newest catalog version that this node knows of; the argument encoded. 0 before the first."""
        known = self._databases.get(database)
        return 0 if known is None else known.told

    def all_told(self) -> dict[bytes, int]:
        """`told` of every database, by its encoded name."""
        return {name: known.told for name, known in self._databases.items() if known.told}

    def tell(self, batch: Batch, database: bytes, version: int) -> None:
        """Into the batch: that there is this version, which the indexes need not follow yet."""
        known = self._databases.setdefault(database, DatabaseIndexes(0, {}))
        if version > known.told:
            known.told = version
            value = msgspec.msgpack.encode(StoredSpecs(known.version, tuple(known.specs.values()), version))
            batch.put(Space.SPEC, database, value)

    def _fill(self, batch: Batch, table: bytes, indexes: TableIndexes, added: list[Index]) -> None:
        if added:
            start = indexes.primary.prefix
            self._enter(batch, table, start, added, scan(self._disk, Space.INDEX, start, start + PREFIX_END))

    def _enter(
        self, batch: Batch, table: bytes, start: bytes, added: Sequence[Index], pairs: Iterable[tuple[bytes, bytes]]
    ) -> None:
        """Into the batch: the entries of these rows, which are told by their entries in the primary index."""
        for entry, value in pairs:
            tail = entry[len(start) :]
            pk, group = split_tail(tail, value)
            row = decode_row(self.row_of_entry(group, table + pk))
            for index in added:
                batch.put(Space.INDEX, index.prefix + _encoded_columns(row, index.columns) + tail, value)

    def row_of_entry(self, group: GroupKey, key: RowKey) -> bytes:
        """The row that an entry points to. Raises StorageError when there is none: the file contradicts itself."""
        row = self._disk.get(Space.ROW, row_place(group) + key)
        if row is None:
            raise StorageError(
                f"an index entry points to row {key.hex()} of group {group.hex()}, which is not there: the file "
                "contradicts itself; wipe this node's data directory, it is rebuilt from the other replicas"
            )
        return row


def split_tail(entry: bytes, value: bytes) -> tuple[bytes, GroupKey]:
    """(encoded primary key, group key) of an entry."""
    _, pk_bytes, group_bytes = ENTRY.unpack(value)
    at = len(entry) - group_bytes
    return entry[at - pk_bytes : at], entry[at:]


def _surely_same(before: Row, after: Row, columns: tuple[int, ...]) -> bool:
    """Whether the columns certainly give the same entry; cheaper than encoding them twice to see it."""
    for column in columns:
        was, now = before.get(column), after.get(column)
        if was is not now and (type(was) is not type(now) or isinstance(was, float) or was != now):
            return False
    return True


def _encoded_columns(row: Row, columns: tuple[int, ...]) -> bytes:
    return b"".join([_MISSING if (value := row.get(column)) is None else encode_value(value) for column in columns])


def _by_table(specs: Sequence[TableSpec]) -> dict[bytes, TableSpec]:
    return {table_prefix(spec.table): spec for spec in specs}


def _indexes_of(database: bytes, table: bytes, spec: TableSpec | None) -> TableIndexes:
    """The indexes that the spec says; without one, index 0 alone."""
    place = database + table
    if spec is None:
        return TableIndexes(Index(0, (), place + _PRIMARY), (), ())
    others = tuple([Index(i.id, i.columns, place + encode_value(i.id)) for i in spec.indexes])
    return TableIndexes(Index(0, spec.pk_columns, place + _PRIMARY), others, others)
