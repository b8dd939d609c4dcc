"""The shadow schema: empty real tables in SQLite on which DDL runs and from which table definitions are read.

It also answers everything that asks for the schema itself: sqlite_master and the reflecting PRAGMAs.
"""

from __future__ import annotations

import functools
import re
import sqlite3
from collections.abc import Callable, Iterable
from typing import Any

import apsw

from dht.model import LOCAL
from nova_bridge.sql.descent import TABLES_SQL, Descent
from nova_bridge.sql.families import Rule, rule_of
from nova_bridge.sql.schema import DELETED, ColumnDef, ForeignDef, IndexDef, TableDef
from nova_bridge.sql.values import affinity_of

INDEXES_SQL = "SELECT tbl_name, name, sql FROM sqlite_master WHERE type = 'index' AND sql IS NOT NULL ORDER BY rowid"

BINARY = "BINARY"

_QUOTED = re.compile(r"'(?:[^']|'')*'|\"(?:[^\"]|\"\")*\"|`[^`]*`|\[[^\]]*\]|--[^\n]*|/\*.*?\*/", re.S)
_REFUSED = re.compile(r"\bWITHOUT\s+ROWID\b|\bGENERATED\s+ALWAYS\b|\bCHECK\b(?=\s*\()", re.I)


def build(definitions: Iterable[TableDef]) -> apsw.Connection:
    """A shadow of these tables."""
    shadow = apsw.Connection(":memory:")
    ordered = sorted(definitions, key=lambda d: d.number)
    with shadow:
        for definition in ordered:
            shadow.execute(definition.sql)
        for definition in ordered:
            for _, sql in definition.index_sql:
                shadow.execute(sql)
    return shadow


def clone(shadow: apsw.Connection) -> apsw.Connection:
    """A copy on which DDL may fail without harm."""
    copy = apsw.Connection(":memory:")
    with copy.backup("main", shadow, "main") as backup:
        backup.step()
    return copy


def rows(shadow: apsw.Connection, sql: str, *arguments: Any) -> list[Any]:
    """All rows of a query on the schema."""
    return list(shadow.execute(sql, arguments))


class Introspection:
    """Reads the definitions of the tables whose DDL text changed since `before`. `home` tells the database's."""

    def __init__(
        self, shadow: apsw.Connection, before: dict[str, TableDef], next_table: int, home: Callable[[], str]
    ) -> None:
        self.shadow, self.before, self.next_table = shadow, before, next_table
        self._home = functools.cache(home)
        self._index_sql: dict[str, list[tuple[str, str]]] = {}
        for table, name, sql in rows(shadow, INDEXES_SQL):
            self._index_sql.setdefault(table.lower(), []).append((name, sql))

    def definitions(self, descent: Descent) -> dict[str, TableDef]:
        """All tables now."""
        result: dict[str, TableDef] = {}
        for name, sql in rows(self.shadow, TABLES_SQL):
            lower = name.lower()
            origin, columns = descent.tables[lower], descent.columns(lower)
            old = None if origin is None else self.before[origin]
            index_sql = tuple(self._index_sql.get(lower, ()))
            same = columns is None and old is not None and (old.name, old.sql, old.index_sql) == (name, sql, index_sql)
            if old is not None and same:
                result[lower] = old
            else:
                result[lower] = self._read(name, sql, index_sql, old, columns or {})
        return result

    def _read(
        self,
        name: str,
        sql: str,
        index_sql: tuple[tuple[str, str], ...],
        old: TableDef | None,
        origins: dict[str, str | None],
    ) -> TableDef:
        if refused := _REFUSED.search(_QUOTED.sub("", sql)):
            raise sqlite3.NotSupportedError(
                f"table {name}: {' '.join(refused.group().split()).upper()} is not supported by this database"
            )
        info = rows(self.shadow, 'SELECT cid, name, type, "notnull", dflt_value, pk FROM pragma_table_info(?)', name)
        columns, next_column = self._columns(name, info, old, origins)
        number_of = {c.name.lower(): c.number for c in columns}
        primary = tuple(number_of[r[1].lower()] for r in sorted((r for r in info if r[5]), key=lambda r: r[5]))
        integer = len(primary) == 1 and any(r[5] and r[2].upper() == "INTEGER" for r in info)
        if old is None:
            number, self.next_table = self.next_table, self.next_table + 1
            rule = rule_of(name, set(number_of), self._home())
        else:
            number, rule = old.number, _kept_rule(name, old, columns)
        foreign = self._foreign(name, number_of)
        family_columns = tuple(number_of[c] for c in rule.key)
        deleted = _deleted(columns)
        indexes, next_index = self._indexes(name, number_of, primary, rule, family_columns, foreign, old, deleted)
        return TableDef(
            number=number,
            name=name,
            sql=sql,
            columns=columns,
            next_column=next_column,
            primary=primary,
            integer_key=integer,
            indexes=indexes,
            next_index=next_index,
            foreign=foreign,
            family=rule.family,
            family_columns=family_columns,
            whole=rule.whole,
            merge=tuple(number_of[c] for c in rule.merge_last),
            trusted=rule.trusted,
            index_sql=index_sql,
            home=rule.home,
            root=rule.root,
            read=rule.read,
        )

    def _columns(
        self, table: str, info: list[Any], old: TableDef | None, origins: dict[str, str | None]
    ) -> tuple[tuple[ColumnDef, ...], int]:
        known = {c.name.lower(): c for c in old.columns} if old else {}
        following = old.next_column if old else 1
        columns = []
        for _, name, declared, not_null, default_sql, _ in info:
            collation = self.shadow.column_metadata(None, table, name)[1]
            if collation.upper() != BINARY:
                raise _collation(f"column {name} of table {table}", collation)
            origin = origins.get(name.lower(), name.lower())
            before = None if origin is None else known.get(origin)
            default, expression = self._default(default_sql)
            number, following = (before.number, following) if before else (following, following + 1)
            added = before.added_default if before else old is not None and default is not None
            columns.append(ColumnDef(number, name, affinity_of(declared), bool(not_null), default, added, expression))
        return tuple(columns), following

    def _default(self, sql: str | None) -> tuple[Any, str | None]:
        """(value, None) of a constant, (None, expression) of what each INSERT works out anew."""
        if sql is None:
            return None, None
        if "(" in sql.split("'", 1)[0] or sql.upper().startswith("CURRENT_"):
            return None, sql
        return rows(self.shadow, f"SELECT {sql}")[0][0], None

    def _foreign(self, name: str, number_of: dict[str, int]) -> tuple[ForeignDef, ...]:
        keys: dict[int, list[Any]] = {}
        for row in rows(self.shadow, "SELECT * FROM pragma_foreign_key_list(?)", name):
            keys.setdefault(row[0], []).append(row)
        result = []
        for parts in keys.values():
            parts.sort(key=lambda r: r[1])
            parents = () if parts[0][4] is None else tuple(r[4].lower() for r in parts)
            children = tuple(number_of[r[3].lower()] for r in parts)
            result.append(ForeignDef(children, parts[0][2], parents, parts[0][6], parts[0][5]))
        return tuple(result)

    def _indexes(
        self,
        name: str,
        number_of: dict[str, int],
        primary: tuple[int, ...],
        rule: Rule,
        family_columns: tuple[int, ...],
        foreign: tuple[ForeignDef, ...],
        old: TableDef | None,
        deleted: set[int],
    ) -> tuple[tuple[IndexDef, ...], int]:
        trusted = {tuple(number_of[c] for c in key if c in number_of) for key in rule.trusted}
        wanted: dict[tuple[tuple[int, ...], str], bool] = {}
        listed = rows(self.shadow, 'SELECT name, "unique", origin, partial FROM pragma_index_list(?)', name)
        for index, unique, _, partial in listed:
            keys = rows(self.shadow, "SELECT name, coll FROM pragma_index_xinfo(?) WHERE key", index)
            names = [name for name, _ in keys]
            if unique and (collations := {coll for _, coll in keys if coll.upper() != BINARY}):
                raise _collation(f"unique index {index}", collations.pop())
            if None in names:
                if unique:
                    raise sqlite3.NotSupportedError(f"unique index {index} is on an expression; name plain columns")
                continue
            columns = tuple(number_of[c.lower()] for c in names)
            if unique and partial:
                raise sqlite3.NotSupportedError(f"unique index {index} is partial; leave out its WHERE")
            kind = "plain"
            if unique and (rule.key or rule.whole or not set(primary) <= set(columns)):
                kind = self._kind(columns, primary, rule, family_columns, trusted)
                if kind == "entry" and rule.home == LOCAL:
                    raise _spans_pops(name, [c.lower() for c in names])
            wanted.setdefault((columns, kind), bool(partial))
        for key in foreign:
            if not any(columns[: len(key.columns)] == key.columns for columns, _ in wanted):
                wanted[(key.columns, "plain")] = False
        known = {(i.columns, i.kind): i for i in old.indexes if _same_entries(i, old, deleted)} if old else {}
        following = old.next_index if old else 1
        result = []
        for (columns, kind), partial in wanted.items():
            before = known.get((columns, kind))
            if before is None:
                before = IndexDef(following, columns, kind, used=old is None, partial=partial)
                following += 1
            result.append(before)
        return tuple(result), following

    @staticmethod
    def _kind(
        columns: tuple[int, ...],
        primary: tuple[int, ...],
        rule: Rule,
        family_columns: tuple[int, ...],
        trusted: set[tuple[int, ...]],
    ) -> str:
        if rule.whole or (family_columns and set(family_columns) <= set(columns)):
            return "plain" if columns == primary else "group"
        return "trusted" if columns in trusted else "entry"


def _kept_rule(name: str, old: TableDef, columns: tuple[ColumnDef, ...]) -> Rule:
    """The rule that the table was created with. Raises where a column of it is gone."""
    by_number = {c.number: c.name.lower() for c in columns}
    for column in old.columns:
        if column.number in old.family_columns and column.number not in by_number:
            raise sqlite3.NotSupportedError(
                f"table {name}: column {column.name} says in which group a row is, and cannot be dropped; copy the "
                "rows to a table without it, and rename that"
            )
    return Rule(
        old.family,
        tuple(by_number[n] for n in old.family_columns),
        old.whole,
        tuple(by_number[n] for n in old.merge if n in by_number),
        old.trusted,
        old.home,
        old.root,
        old.read,
    )


def _deleted(columns: Iterable[ColumnDef]) -> set[int]:
    return {column.number for column in columns if column.name == DELETED}


def _same_entries(index: IndexDef, old: TableDef, deleted: set[int]) -> bool:
    """Whether the same rows have entries as before: which do is told by a column's name (`Table.binds`)."""
    return index.kind != "entry" or not (_deleted(old.columns) ^ deleted).intersection(index.columns)


def _collation(where: str, collation: str) -> sqlite3.NotSupportedError:
    return sqlite3.NotSupportedError(
        f"{where} has the collation {collation}; text is compared byte by byte here: leave out its COLLATE"
    )


def _spans_pops(table: str, columns: list[str]) -> sqlite3.NotSupportedError:
    return sqlite3.NotSupportedError(
        f"the rows of {table} live in the PoPs that made them, and no PoP that is cut off could keep a unique key over "
        f"all of them ({', '.join(columns)}): name it under `local` in families.yaml if its values are random, make it "
        "contain the family's key, or give the table's family the home `global`"
    )
