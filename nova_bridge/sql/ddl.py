"""CREATE, ALTER and DROP: run on a copy of the shadow schema, committed to the catalog, then data follows.

Whatever touches rows comes after the catalog, so that a process that dies in between leaves a catalog that is true:

* a table that is dropped is kept in the catalog as a dropped one; its rows are deleted then, and whatever a writer with
  an older catalog still added is found and deleted by the next schema statement, which forgets the table;
* a unique index over rows that exist is published first, so that writers keep it; then comes the fence
  (`dht.register.fence`), then the rows, then "used", from when look-ups rely on it. The statement that died in between
  goes on where it was when it is run again. Duplicates take the index out of the catalog again;
* a column that no row may be without is published, then comes the fence, then the rows are looked at once more, and one
  that came without it takes the column out of the catalog again.
"""

from __future__ import annotations

import functools
import re
import sqlite3
from collections.abc import Callable

import apsw

from nova_bridge.sql import column_rows, rows_left, statements, unique_rows
from nova_bridge.sql import shadow as shadows
from nova_bridge.sql.database import Database
from nova_bridge.sql.schema import IndexDef, Schema, Table, Unique

_NAME = r'(?:(?:"main"|main)\s*\.\s*)?(?:"((?:[^"]|"")+)"|`([^`]+)`|\[([^\]]+)\]|(\w+))'
_CREATE_UNIQUE = re.compile(rf"\s*CREATE\s+UNIQUE\s+INDEX\s+(?:IF\s+NOT\s+EXISTS\s+)?{_NAME}", re.I)
_REFUSED = re.compile(
    r"\s*CREATE\s+(?:(TEMP|TEMPORARY|VIRTUAL|TRIGGER|VIEW)\b|TABLE\s+.*?\bAS\s+(?:SELECT|WITH|VALUES)\b"
    r'|TABLE\s+(?:IF\s+NOT\s+EXISTS\s+)?(?:temp|"temp"|`temp`|\[temp\])\s*\.)',
    re.I | re.S,
)


class Ddl:
    """Schema statements collected until `run`; a script's statements are published together."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._steps: list[Callable[[apsw.Connection], None]] = []
        # By step: the name of the index that it creates, and all behind its name.
        self._creates: dict[int, tuple[str, str]] = {}

    def add(self, sql: str) -> None:
        """One more statement. Raises for what virtual tables cannot be."""
        text = statements.bare(sql)
        if _REFUSED.match(text):
            raise sqlite3.NotSupportedError(
                f"not supported by this database: {' '.join(sql.split())[:80]}; only tables and indexes can be created"
            )
        if match := _CREATE_UNIQUE.match(text):
            self._creates[len(self._steps)] = (_name(match), text[match.end() :])
        self._steps.append(lambda shadow: _execute(shadow, sql))

    def __bool__(self) -> bool:
        return bool(self._steps)

    def run(self) -> None:
        """Publish. Raises what SQLite raises, IntegrityError for a unique index over duplicates."""
        database = self._database
        before = database.reload()
        cleared = [number for number, old in before.dropped.items() if rows_left.clear(database, old)]
        begun = [self._unfinished(before, *created) for created in self._creates.values()]
        steps = [self._going_on(before, i) for i in range(len(self._steps))]
        after = database.preview(before, steps)
        for definition in after.values():
            known = before.by_number.get(definition.number)
            if known is not None and known.definition is not definition:
                table = Table(database.name, definition)
                column_rows.check(database, known.definition, table)
                for unique in _to_build(before, table):
                    unique_rows.check(database, table, unique)
        before, schema = database.change(before, steps, cleared)
        for number, table in before.by_number.items():
            if number not in schema.by_number:
                rows_left.clear(database, table.definition)
        column_rows.check_again(database, before, schema)
        built = {table.number: _to_build(before, table) for table in schema.tables.values()}
        for found in begun:
            if found is not None and found[0] in schema.by_number:
                built.setdefault(found[0], []).append(found[1])
        for number, uniques in built.items():
            if uniques:
                self._build(schema, number, uniques)

    def _build(self, schema: Schema, number: int, uniques: list[Unique]) -> None:
        """Make the rows that are there keep the new rules, then let look-ups rely on them."""
        database = self._database
        table = schema.by_number[number]
        database.fence(schema.version, [table])
        try:
            for unique in uniques:
                unique_rows.build(database, number, unique)
        except sqlite3.IntegrityError:
            self._withdraw(number, uniques)
            raise
        database.mark_used(number, {unique.id for unique in uniques})

    def _withdraw(self, number: int, uniques: list[Unique]) -> None:
        """Take the indexes out of the catalog again. Their ids are not used a second time, nor are their entries."""
        database = self._database
        before = database.reload()
        table = before.by_number.get(number)
        if table is None:
            return
        ids = {unique.id for unique in uniques}
        columns = {i.columns for i in table.definition.indexes if i.id in ids and i.kind != "plain"}
        names = [name for name, of in _unique_indexes(table) if of in columns]
        if names:
            database.change(before, [functools.partial(_drop_indexes, names=names)])
        for unique in uniques:
            unique_rows.forget(database, table, unique)

    def _going_on(self, before: Schema, number: int) -> Callable[[apsw.Connection], None]:
        """The step; one that creates an index which was never finished leaves it alone, if it still is there then."""
        step, created = self._steps[number], self._creates.get(number)
        if created is None or self._unfinished(before, *created) is None:
            return step
        return functools.partial(_unless_there, index=created[0], step=step)

    def _unfinished(self, before: Schema, index: str, rest: str) -> tuple[int, Unique] | None:
        """(table number, rule) of an index that the catalog has by the same statement, and that was never finished."""
        for table in before.tables.values():
            for name, sql in table.definition.index_sql:
                text = statements.bare(sql)
                match = _CREATE_UNIQUE.match(text)
                if name.lower() != index or match is None or _words(text[match.end() :]) != _words(rest):
                    continue
                columns = dict(_unique_indexes(table)).get(name)
                for definition, unique in _rules(table):
                    if definition.columns == columns and not definition.used:
                        return table.number, unique
        return None


def _unless_there(shadow: apsw.Connection, index: str, step: Callable[[apsw.Connection], None]) -> None:
    listed = shadow.execute("SELECT name FROM sqlite_master WHERE type = 'index'").fetchall()
    if index not in [name.lower() for (name,) in listed]:
        step(shadow)


def _drop_indexes(shadow: apsw.Connection, names: list[str]) -> None:
    for name in names:
        quoted = name.replace('"', '""')
        shadow.execute(f'DROP INDEX "{quoted}"')


def _rules(table: Table) -> list[tuple[IndexDef, Unique]]:
    definitions = [i for i in table.definition.indexes if i.kind != "plain"]
    return list(zip(definitions, table.uniques, strict=True))


def _unique_indexes(table: Table) -> list[tuple[str, tuple[int, ...]]]:
    """Names and column numbers of the table's unique indexes that have a statement of their own.

    As its definition says: the shadow that the process has by now may be of a newer schema.
    """
    shadow = shadows.build([table.definition])
    listed = shadow.execute(
        "SELECT name FROM pragma_index_list(?) WHERE \"unique\" AND origin = 'c'", (table.name,)
    ).fetchall()
    found: list[tuple[str, tuple[int, ...]]] = []
    for (name,) in listed:
        names = [r[0] for r in shadow.execute("SELECT name FROM pragma_index_info(?)", (name,))]
        found.append((name, tuple(table.number_of(table.by_name[n.lower()]) for n in names)))
    shadow.close()
    return found


def _words(sql: str) -> str:
    return " ".join(sql.split()).rstrip("; ").lower()


def _name(match: re.Match[str]) -> str:
    return next(group for group in match.groups() if group is not None).replace('""', '"').lower()


def _execute(shadow: apsw.Connection, sql: str) -> None:
    shadow.execute(sql)


def _to_build(before: Schema, table: Table) -> list[Unique]:
    """Unique rules that are new on a table that was there before."""
    old = before.by_number.get(table.number)
    if old is None:
        return []
    known = {u.id for u in old.uniques}
    return [u for u in table.uniques if u.id not in known]
