"""The catalog: tables of a database as rows of the group (database, "catalog"), changed by compare-and-set.

Row (0,): column 0 the version, column 1 the next table number. Row (n,): column 0 table n's `TableSpec` for the
replicas, column 1 its `TableDef`, both in msgpack. A commit that changes the version makes the replicas learn
the specs.
"""

from __future__ import annotations

import functools
import os

import msgspec

from dht.errors import Conflict, Invalid, SchemaChanged
from dht.model import (
    CATALOG_FAMILY,
    CATALOG_TABLE,
    Ballot,
    Change,
    Columns,
    GroupKey,
    GroupRead,
    Op,
    Part,
    Row,
    Transaction,
)
from dht.requests import BlockingStore
from dht.rows import decode_row, group_key, split_row_key
from nova_bridge.sql.schema import FIRST_TABLE, Schema, TableDef

_encode = msgspec.msgpack.Encoder().encode
_HEAD = (0,)


@functools.lru_cache(maxsize=4096)
def _definition(data: bytes) -> TableDef:
    return msgspec.msgpack.decode(data, type=TableDef)


def catalog_key(database: str) -> GroupKey:
    """The catalog's group."""
    return group_key(database, CATALOG_FAMILY, ())


class Catalog:
    """Loads and changes one database's catalog. Not thread-safe; `Database` guards it."""

    def __init__(self, store: BlockingStore, database: str) -> None:
        self._store, self._database = store, database
        self._key = catalog_key(database)
        self._ballot: Ballot | None = None
        self._loaded: Schema | None = None

    def on(self, store: BlockingStore) -> Catalog:
        """The same knowledge about another store with the same content."""
        catalog = Catalog(store, self._database)
        catalog._ballot, catalog._loaded = self._ballot, self._loaded
        return catalog

    def load(self, timeout_s: float | None = None) -> Schema:
        """The catalog as it stands; the same object while it did not change."""
        known = self._ballot if self._loaded is not None else None
        group = self._store.read([self._key], [known], timeout_s)[0]
        if group.rows is not None or self._loaded is None:
            self._loaded = self._read(group)
        self._ballot = group.ballot
        return self._loaded

    def _read(self, group: GroupRead) -> Schema:
        head: Row = {}
        definitions = {}
        dropped = {}
        for key, data in (group.rows or {}).items():
            table, pk = split_row_key(key)
            if table != CATALOG_TABLE:
                continue
            row = decode_row(data)
            if pk == _HEAD:
                head = row
            else:
                definition = _definition(bytes(row[1]))  # type: ignore[arg-type]
                if definition.dropped:
                    dropped[definition.number] = definition
                else:
                    definitions[definition.name.lower()] = definition
        version, following = head.get(0, 0), head.get(1, FIRST_TABLE)
        if not isinstance(version, int) or not isinstance(following, int):
            raise Invalid(f"the catalog of {self._database} has no version number")
        ordered = dict(sorted(definitions.items(), key=lambda d: d[1].number))
        return Schema(self._database, version, ordered, following, self._loaded, dropped)

    def replace(
        self, before: Schema, after: dict[str, TableDef], next_table: int, dropped: dict[int, TableDef]
    ) -> Schema:
        """Commit the new definitions on top of `before`. Raises SchemaChanged when somebody else was first."""
        version = before.version + 1
        columns: Columns = {0: version, 1: next_table}
        if before.version:
            head = Change(Op.UPDATE, CATALOG_TABLE, _HEAD, columns, {0: before.version})
        else:
            head = Change(Op.INSERT, CATALOG_TABLE, _HEAD, columns)
        part = Part(
            self._key,
            self._ballot,
            (head, *_changes(_by_number(before.definitions, before.dropped), _by_number(after, dropped))),
        )
        try:
            applied = self._store.commit(Transaction(os.urandom(16), self._database, 0, (part,)))
        except Conflict as error:
            raise SchemaChanged(f"schema of {self._database} changed meanwhile: {error.message}") from None
        self._ballot = applied.ballots[0]
        self._loaded = Schema(self._database, version, after, next_table, before, dropped)
        return self._loaded


def _by_number(definitions: dict[str, TableDef], dropped: dict[int, TableDef]) -> dict[int, TableDef]:
    return {d.number: d for d in definitions.values()} | dropped


def _changes(old: dict[int, TableDef], new: dict[int, TableDef]) -> list[Change]:
    changes = [Change(Op.DELETE, CATALOG_TABLE, (n,)) for n in old if n not in new]
    for number, definition in new.items():
        previous = old.get(number)
        if previous == definition:
            continue
        columns: Columns = {0: _encode(definition.spec()), 1: _encode(definition)}
        changes.append(Change(Op.INSERT if previous is None else Op.UPDATE, CATALOG_TABLE, (number,), columns))
    return changes
