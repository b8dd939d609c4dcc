"""Which table, and which of its columns, each table of a changed schema was before: it keeps number and rows.

Names do not tell: a script may drop a table and create another of its name, or rename one and give its name to the
next. So the shadow is looked at behind each statement, of which one creates, drops or renames one table, or adds, drops
or renames one column.
"""

from __future__ import annotations

import apsw

from nova_bridge.sql.schema import TableDef

TABLES_SQL = (
    "SELECT name, sql FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite~_%' ESCAPE '~' ORDER BY rowid"
)


class Descent:
    """All names are in lower case. `tables`: a table's name now -> its name before, None for a new one."""

    def __init__(self, shadow: apsw.Connection, before: dict[str, TableDef]) -> None:
        self._shadow = shadow
        self._before = before
        self._sql = self._listed()
        self._columns: dict[str, list[tuple[str, str | None]]] = {}
        self.tables: dict[str, str | None] = {name: name for name in self._sql}

    def columns(self, table: str) -> dict[str, str | None] | None:
        """A column's name now -> its name before, None for a new one. None where all are as they were."""
        found = self._columns.get(table)
        before = self.tables[table]
        if found is None or before is None or found == self._as_before(before):
            return None
        return dict(found)

    def follow(self) -> None:
        """One statement was run on the shadow."""
        was, self._sql = self._sql, self._listed()
        came = [name for name in self._sql if name not in was]
        went = [name for name in was if name not in self._sql]
        if came and went:
            self._rename(went[0], came[0])
        else:
            for name in went:
                del self.tables[name]
                self._columns.pop(name, None)
            self.tables.update(dict.fromkeys(came))
        for name, sql in self._sql.items():
            before = self.tables[name]
            if before is not None and sql != was.get(name):
                known = self._columns.get(name) or self._as_before(before)
                self._columns[name] = _followed(known, self._names(name))

    def _rename(self, old: str, new: str) -> None:
        self.tables[new] = self.tables.pop(old)
        if old in self._columns:
            self._columns[new] = self._columns.pop(old)

    def _as_before(self, table: str) -> list[tuple[str, str | None]]:
        return [(column.name.lower(), column.name.lower()) for column in self._before[table].columns]

    def _listed(self) -> dict[str, str]:
        return {name.lower(): sql for name, sql in self._shadow.execute(TABLES_SQL)}

    def _names(self, table: str) -> list[str]:
        return [row[0].lower() for row in self._shadow.execute("SELECT name FROM pragma_table_info(?)", (table,))]


def _followed(known: list[tuple[str, str | None]], names: list[str]) -> list[tuple[str, str | None]]:
    """The columns, which now have these names. One that is added comes last."""
    if len(names) < len(known):
        return [(name, before) for name, before in known if name in names]
    added: list[str | None] = [None] * (len(names) - len(known))
    return list(zip(names, [before for _, before in known] + added, strict=True))
