"""Tables as the catalog keeps them and as statements use them.

`TableDef` and what it holds are stored: columns and indexes by stable numbers, so that renaming touches nothing but the
catalog. `Table` is made from it once per catalog version: the same by position in a row, ready for the hot path.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import msgspec

from dht.limits import IDS_APART
from dht.model import LOCAL, GroupKey, IndexSpec, Reading, Row, RowKey, Scope, TableSpec, Value
from dht.rows import LOCAL_MARK, encode_values, group_key, row_key, table_prefix
from nova_bridge.sql.families import LOCAL_ROW_FAMILY, ROW_FAMILY
from nova_bridge.sql.values import INTEGER, coerce

UNIQUE_FAMILY = "unique"
ENTRY_TABLE = 1
"""The table number of the rows in unique groups: 0 is the catalog, application tables begin at 16."""
FIRST_TABLE = 16
Place = tuple[GroupKey, RowKey]
"""Where a row is, or would be."""
DELETED = "deleted"
"""The column that holds a row's own id when it is deleted, as oslo.db's soft delete has it."""
HIDDEN_ROWID = 0
"""Column number of the rowid that stands in for the primary key of a table without one."""


class ColumnDef(msgspec.Struct, frozen=True):
    """`added_default`: the column came by ALTER TABLE with a default, so older rows lack it in the store's indexes.

    `expression`: SQL of a default that is worked out at each INSERT.
    """

    number: int
    name: str
    affinity: str
    not_null: bool = False
    default: Value = None
    added_default: bool = False
    expression: str | None = None


class IndexDef(msgspec.Struct, frozen=True):
    """`kind`: "plain"; unique ones are "group" (the family key is part: checked in the group), "entry" (reserved in a
    group of its own) or "trusted" (checked by find). `used`: look-ups may rely on its entries."""

    id: int
    columns: tuple[int, ...]
    kind: str = "plain"
    used: bool = True
    partial: bool = False


class ForeignDef(msgspec.Struct, frozen=True):
    """`parent_columns` empty: the parent's primary key."""

    columns: tuple[int, ...]
    parent: str
    parent_columns: tuple[str, ...] = ()
    on_delete: str = "NO ACTION"
    on_update: str = "NO ACTION"


class TableDef(msgspec.Struct, frozen=True):
    """One table of the catalog. `index_sql`: the CREATE INDEX statements by index name, in order of creation.

    `dropped`: there is no such table any more, but rows of it may be left; the next schema statement looks again.
    `home`, `root`, `read`: see `nova_bridge.sql.families.Rule`.
    """

    number: int
    name: str
    sql: str
    columns: tuple[ColumnDef, ...]
    next_column: int
    primary: tuple[int, ...]
    integer_key: bool
    indexes: tuple[IndexDef, ...] = ()
    next_index: int = 1
    foreign: tuple[ForeignDef, ...] = ()
    family: str = ROW_FAMILY
    family_columns: tuple[int, ...] = ()
    whole: bool = False
    merge: tuple[int, ...] = ()
    trusted: tuple[tuple[str, ...], ...] = ()
    index_sql: tuple[tuple[str, str], ...] = ()
    dropped: bool = False
    home: str = ""
    root: bool = False
    read: int = 0

    def spec(self) -> TableSpec:
        """What the replicas must know."""
        hidden = {c.number for c in self.columns if c.added_default}
        specs = [IndexSpec(i.id, i.columns) for i in self.indexes if not hidden.intersection(i.columns)]
        alone = self.family in (ROW_FAMILY, LOCAL_ROW_FAMILY)
        family = (self.family, self.number) if alone else (self.family,)
        groups = (encode_values(family), encode_values((UNIQUE_FAMILY, self.number)))
        return TableSpec(self.number, self.primary or (HIDDEN_ROWID,), tuple(specs), self.home, self.read, groups)


class Unique(msgspec.Struct, frozen=True):
    """A unique rule by position. `deleted`: position of a `deleted` column in it that may hold the row's id, or -1."""

    id: int
    columns: tuple[int, ...]
    kind: str
    deleted: int
    used: bool


class Foreign(msgspec.Struct, frozen=True):
    """A foreign key by position; parent columns are resolved by name when it is checked."""

    columns: tuple[int, ...]
    parent: str
    parent_columns: tuple[str, ...]
    on_delete: str
    on_update: str
    child: str


def mask_of(positions: Iterable[int]) -> int:
    """Columns as bits."""
    mask = 0
    for position in positions:
        mask |= 1 << position
    return mask


class Record:
    """A row as a transaction met it, decoded; never changed. `values` by position, the hidden rowid last if any."""

    __slots__ = ("group", "key", "pk", "values")

    def __init__(self, group: GroupKey, key: RowKey, pk: tuple[Value, ...], values: tuple[Any, ...]) -> None:
        self.group, self.key, self.pk, self.values = group, key, pk, values

    def stored(self, position: int) -> Value:
        """The column as the store has it, which is what a guard compares."""
        value: Value = self.values[position]
        return value


class AgedRecord(Record):
    """A row from before columns were added with a default: the store has nothing of them, `values` the default."""

    __slots__ = ("lacks",)

    def __init__(
        self, group: GroupKey, key: RowKey, pk: tuple[Value, ...], values: tuple[Any, ...], lacks: frozenset[int]
    ) -> None:
        super().__init__(group, key, pk, values)
        self.lacks = lacks

    def stored(self, position: int) -> Value:
        """None for what the row lacks."""
        return None if position in self.lacks else super().stored(position)


class Table:
    """A table ready for use. Everything is by position in the row unless its name says number."""

    def __init__(self, database: str, definition: TableDef) -> None:
        self.database, self.definition = database, definition
        self.number, self.name = definition.number, definition.name
        self.columns = definition.columns
        self.position = {c.number: i for i, c in enumerate(self.columns)}
        self.by_name = {c.name.lower(): i for i, c in enumerate(self.columns)}
        self.affinities = [c.affinity for c in self.columns]
        self.width = len(self.columns)
        self.rowid_key = not definition.primary
        self._numbers = [c.number for c in self.columns]
        self._absent = [coerce(c.affinity, c.default) if c.added_default else None for c in self.columns]
        if self.rowid_key:
            self.position[HIDDEN_ROWID] = self.width
            self._numbers.append(HIDDEN_ROWID)
            self._absent.append(None)
        self.primary = tuple(self.position[n] for n in definition.primary) or (self.width,)
        self.integer_key = self.primary[0] if definition.integer_key else None
        self.required = [i for i, c in enumerate(self.columns) if c.not_null and i != self.integer_key]
        self.defaults = [(i, c) for i, c in enumerate(self.columns) if c.default is not None or c.expression]
        self.unindexed = frozenset(i for i, c in enumerate(self.columns) if c.added_default)
        self.family, self.whole = definition.family, definition.whole
        self.family_key = tuple(self.position[n] for n in definition.family_columns)
        self.placing = frozenset((*self.primary, *self.family_key))
        self.merge = frozenset(self.position[n] for n in definition.merge if n in self.position)
        self.merge_mask = mask_of(self.merge)
        self.indexes = [tuple(self.position[n] for n in i.columns) for i in definition.indexes]
        self.uniques = [self._unique(i) for i in definition.indexes if i.kind != "plain"]
        self.unique_columns = frozenset(position for unique in self.uniques for position in unique.columns)
        self.foreign = [
            Foreign(
                tuple(self.position[n] for n in f.columns),
                f.parent.lower(),
                f.parent_columns,
                f.on_delete.upper(),
                f.on_update.upper(),
                self.name,
            )
            for f in definition.foreign
        ]
        self.prefix = table_prefix(self.number)
        self.local, self.root = definition.home == LOCAL, definition.root
        self.row_family = LOCAL_ROW_FAMILY if self.local else ROW_FAMILY
        self.sequence = (LOCAL_MARK if self.local else "") + str(self.number)
        self.id_step = IDS_APART if self.local else 1
        self.scope = Scope.POPS if self.local else Scope.HOME
        self.scan_scope = Scope.REACHABLE if self.local and definition.read & Reading.PARTIAL_OK else self.scope
        self._whole_key = group_key(database, self.family, ()) if self.whole else b""

    def _unique(self, index: IndexDef) -> Unique:
        positions = tuple(self.position[n] for n in index.columns)
        deleted = next((p for p in positions if self.columns[p].name == DELETED), -1)
        if self.integer_key is None or deleted == self.integer_key or self.affinities[deleted] != INTEGER:
            deleted = -1
        return Unique(index.id, positions, index.kind, deleted, index.used)

    def decode(self, group: GroupKey, key: RowKey, row: Row) -> Record:
        """The record of a stored row."""
        values = tuple(map(row.get, self._numbers, self._absent))
        pk = tuple([values[p] for p in self.primary])
        if self.unindexed and (lacks := [p for p in self.unindexed if self._numbers[p] not in row]):
            return AgedRecord(group, key, pk, values, frozenset(lacks))
        return Record(group, key, pk, values)

    def record(self, values: tuple[Any, ...]) -> Record:
        """The record of a row that this process made."""
        pk = tuple([values[p] for p in self.primary])
        return Record(self.group_of(values, pk), row_key(self.number, pk), pk, values)

    def changed(self, record: Record, values: tuple[Any, ...], positions: Collection[int]) -> Record:
        """The record of a row that this process changed at these positions."""
        if not self.placing.isdisjoint(positions):
            return self.record(values)
        return Record(record.group, record.key, record.pk, values)

    def encode(self, values: tuple[Any, ...]) -> Row:
        """All columns of a new row; a NULL is left out where absence means NULL."""
        columns = zip(self._numbers, values, self._absent, strict=True)
        return {number: value for number, value, absent in columns if value is not None or absent is not None}

    def number_of(self, position: int) -> int:
        """The stable number of the column at the position."""
        return self._numbers[position]

    def group_of(self, values: tuple[Any, ...], pk: tuple[Value, ...]) -> GroupKey:
        """The group that a row belongs to."""
        if self.whole:
            return self._whole_key
        key = tuple([values[p] for p in self.family_key])
        return self.row_group(pk) if not key or None in key else group_key(self.database, self.family, key)

    def family_group(self, key: tuple[Value, ...]) -> GroupKey:
        """The group of the family key (no NULL in it); of a whole family, its one group."""
        return self._whole_key if self.whole else group_key(self.database, self.family, key)

    def row_group(self, pk: tuple[Value, ...]) -> GroupKey:
        """The group of a row that has one of its own."""
        return group_key(self.database, self.row_family, (self.number, *pk))

    def entry_key(self, unique: Unique, values: tuple[Any, ...]) -> GroupKey | None:
        """The group that reserves the row's values, or None if the rule does not bind this row."""
        if not self.binds(unique, values):
            return None
        key = [values[p] for p in unique.columns]
        return group_key(self.database, UNIQUE_FAMILY, (self.number, unique.id, *key))

    def binds(self, unique: Unique, values: tuple[Any, ...]) -> bool:
        """Whether another row might have these values: none if one is NULL, or is the id of the row that it deletes."""
        if None in [values[p] for p in unique.columns]:
            return False
        own = values[unique.deleted] if unique.deleted >= 0 else 0
        return own == 0 or own != values[self.primary[0]]

    def column_names(self, positions: tuple[int, ...]) -> tuple[str, ...]:
        """Names for an error message."""
        return tuple(self.columns[p].name if p < self.width else "rowid" for p in positions)

    def pk_key(self, pk: tuple[Value, ...]) -> RowKey:
        """The row's key inside its group."""
        return self.prefix + encode_values(pk)


class Schema:
    """The catalog at one version, by lower-case table name. `dropped`: tables that are gone, by number.

    `roots`: numbers of the local tables whose rows make their groups. `referred`: positions of the columns that foreign
    keys refer to, by the number of their table.
    """

    def __init__(
        self,
        database: str,
        version: int,
        definitions: dict[str, TableDef],
        next_table: int,
        before: Schema | None = None,
        dropped: dict[int, TableDef] | None = None,
    ) -> None:
        self.version, self.definitions, self.next_table = version, definitions, next_table
        self.dropped = dropped or {}
        kept = before.by_number if before is not None else {}
        self.tables: dict[str, Table] = {}
        for name, definition in definitions.items():
            old = kept.get(definition.number)
            same = old is not None and old.definition is definition
            self.tables[name] = old if same and old is not None else Table(database, definition)
        self.by_number: dict[int, Table] = {table.number: table for table in self.tables.values()}
        self.roots = frozenset(number for number, t in self.by_number.items() if t.local and t.root)
        self.children: dict[str, list[tuple[Table, Foreign]]] = {}
        self.families: dict[str, list[Table]] = {}
        for table in self.tables.values():
            self.families.setdefault(table.family, []).append(table)
            for foreign in table.foreign:
                self.children.setdefault(foreign.parent, []).append((table, foreign))
        self.referred = {table.number: self._referred(table) for table in self.tables.values()}

    def _referred(self, table: Table) -> frozenset[int]:
        keys = [foreign.parent_columns for _, foreign in self.children.get(table.name.lower(), ())]
        named = {table.by_name[name] for names in keys for name in names if name in table.by_name}
        return frozenset(named if () not in keys else {*named, *table.primary})

    def same_rows(self, other: Schema, number: int) -> bool:
        """Whether a table is the same in both but for its indexes: changes of its rows mean the same."""
        here, there = self.by_number.get(number), other.by_number.get(number)
        return here is not None and there is not None and _of_rows(here.definition) == _of_rows(there.definition)

    def same_table(self, other: Schema, number: int) -> bool:
        """Whether a table is the same in both."""
        here, there = self.by_number.get(number), other.by_number.get(number)
        return here is not None and there is not None and here.definition == there.definition


def _of_rows(definition: TableDef) -> TableDef:
    return msgspec.structs.replace(definition, indexes=(), next_index=0, index_sql=())
