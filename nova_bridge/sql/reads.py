"""What one transaction has read of the store: each group once and at one ballot (DESIGN section 11).

Groups are read by key, together with those that a statement will ask for next, and rows are found in whatever group.
Both are kept for the transaction, so that a question is asked once. The transaction's own changes are laid over this by
`nova_bridge.sql.transaction`.
"""

from __future__ import annotations

import abc
from collections.abc import Hashable, Iterable
from typing import Any

from dht.errors import Conflict, Invalid
from dht.model import (
    Ballot,
    Constraint,
    FindQuery,
    FoundRow,
    GroupKey,
    Order,
    RowKey,
    Scope,
    Value,
)
from dht.rows import decode_row
from nova_bridge.sql.database import Database
from nova_bridge.sql.groups import GroupView
from nova_bridge.sql.marks import Marks
from nova_bridge.sql.matching import matches, order_records
from nova_bridge.sql.pages import in_pages
from nova_bridge.sql.schema import Record, Schema, Table

SIBLINGS_PER_READ_MAX = 500
FINDS_KEPT_MAX = 512
WALKS_MAX = 12
"""Through a list with a limit that needs several pages, whose rows change meanwhile."""
WHOLE_ANYWAY_MAX = 2
WHOLE_ENOUGH = 50
"""So many groups of a family brought along by finds: further ones of the transaction most likely find the same again,
and what they find beside them is read by itself. Placement looks all its providers up four times for one answer."""


class Moved(Exception):
    """A group is at another ballot than the running statement may have shown of it: run it again."""


class Reads(abc.ABC):
    """One connection's; reused after `reset`.

    `statement`: the number of the running one. `reading`: it changes nothing. `rows_wanted`: it probably stops reading
    when it has so many. `tells_moves`: it can be run again, and `again`: it is being so.
    """

    def __init__(self, database: Database) -> None:
        self.database = database
        self.reset()

    def reset(self) -> None:
        """Forget everything read."""
        self._schema: Schema | None = None
        self.seen: dict[GroupKey, Ballot] = {}
        self.marks = Marks()
        self._views: dict[GroupKey, GroupView] = {}
        self._ballots: dict[GroupKey, Ballot] = {}
        self._found: dict[GroupKey, dict[RowKey, Record]] = {}
        self._by_pk: dict[int, dict[tuple[Value, ...], Record]] = {}
        self._indexed: set[tuple[int, GroupKey]] = set()
        self._finds: dict[Any, list[Record]] = {}
        self._asked: dict[GroupKey, tuple[Hashable, int]] = {}
        self._siblings: dict[GroupKey, tuple[int, list[GroupKey]]] = {}
        self._missed = 0
        self._near: set[GroupKey] = set()
        self._brought: dict[str, int] = {}
        self._moved = False
        self.tells_moves = self.again = False
        self.statement = 0
        self.reading = False
        self.rows_wanted: int | None = None

    @property
    def touched(self) -> bool:
        """Whether anything was asked since the last `reset`; all of it goes by the schema."""
        return self._schema is not None

    @property
    def schema(self) -> Schema:
        """The schema that the whole transaction uses."""
        if self._schema is None:
            self._schema = self.database.schema
        return self._schema

    @property
    @abc.abstractmethod
    def written(self) -> bool:
        """Whether there is anything to commit, which then stands on what was read."""

    def is_empty(self, key: GroupKey) -> bool:
        """Whether the group was read, and had no rows."""
        view = self._views.get(key)
        return view is not None and not view.size_bytes

    # Groups.

    def view(self, key: GroupKey) -> GroupView:
        """The group, read on first use, together with the groups of rows that were found beside it.

        A statement that goes on from found rows to their groups gets all of them at once; otherwise one is read first.
        """
        view = self._views.get(key)
        if view is None:
            self.ensure(self._wanted_with(key))
            view = self._views[key]
        return view

    def _wanted_with(self, key: GroupKey) -> list[GroupKey]:
        statement, siblings = self._siblings.get(key, (0, None))
        if siblings is None:
            return [key]
        self._missed += 1
        if self._missed == 1 and statement != self.statement:
            return [key]
        missing = [k for k in siblings if k not in self._views and k != key]
        return [key, *missing[: SIBLINGS_PER_READ_MAX - 1]]

    def ensure(self, keys: Iterable[GroupKey], near: bool = False) -> None:
        """Read those of the groups that were not read yet, in one call. `near`: see `dht.requests.ReadGroups`."""
        missing = [k for k in dict.fromkeys(keys) if k not in self._views]
        if missing:
            if self._asked:
                self._learn(missing)
            self._fetch(missing, near)
            if near:
                self._near.update(missing)
            self._tell_moves()

    def _fetch(self, keys: list[GroupKey], near: bool = False) -> None:
        for view in self.database.read_groups(keys, self.schema.version, near):
            self._admit(view)

    def begins(self, table: Table, group: GroupKey) -> bool:
        """Whether a new row of the table makes its group, which nobody has as far as this process ever saw.

        Only the own PoP is asked of it then: its key is new, or the transaction met it and knows. So a PoP that is cut
        off makes new groups.
        """
        if not (table.local and table.root):
            return False
        if group in self._ballots:
            return group in self._near and self.is_empty(group)
        known = self.database.groups.get(group, self.schema.version)
        return known is None or not known.size_bytes

    def _learn(self, missing: list[GroupKey]) -> None:
        """These groups were found and are read now. Many that are at hand already are better read by their ballots."""
        database, version = self.database, self.schema.version
        for key in missing:
            look_up, count = self._asked.get(key, (None, 0))
            if look_up is not None and (count <= WHOLE_ANYWAY_MAX or database.groups.get(key, version) is None):
                database.follows.confirm(look_up)

    def _admit(self, view: GroupView) -> None:
        self._meet(view.key, view.ballot)
        self._views[view.key] = view

    def _meet(self, key: GroupKey, ballot: Ballot) -> None:
        """Hold the rule of one ballot per group."""
        known = self._ballots.get(key)
        if known == ballot:
            return
        if known is not None:
            if self.written:
                raise Conflict("a group changed after this transaction read it; run the transaction again")
            self._keep_reads(key)
            self._moved = True
        self._ballots[key] = ballot
        self.seen.setdefault(key, ballot)

    def _tell_moves(self) -> None:
        """A statement whose cursors stand on rows of an older ballot must not join them with newer ones.

        Told after the answer is kept, so that the statement, when it is run again, has it at hand.
        """
        moved, self._moved = self._moved, False
        if moved and self.tells_moves:
            raise Moved

    def _keep_reads(self, key: GroupKey | None) -> None:
        """What was read of an older ballot, or schema, still guards what will be written. `key` None: all groups."""
        self.marks.outdate(key)
        if key is None:
            self._views, self._found, self._finds, self._by_pk, self._indexed = {}, {}, {}, {}, set()
            self._brought = {}
            return
        self._views.pop(key, None)
        self._found.pop(key, None)
        self._finds.clear()
        self._indexed = {(t, g) for t, g in self._indexed if g != key}
        for records in self._by_pk.values():
            for pk in [pk for pk, record in records.items() if record.group == key]:
                del records[pk]

    # Rows.

    def _stored(self, group: GroupKey, table: Table, key: RowKey) -> Record | None:
        """The row as it was met: found, else in its group, which is read if need be."""
        found = self._found.get(group)
        record = found.get(key) if found else None
        return record if record is not None else self.view(group).records(table).get(key)

    def _met_as(self, table: Table, record: Record) -> tuple[Record | None, ...]:
        """A row may have been met twice, by a find and in its group."""
        found = self._found.get(record.group)
        view = self._views.get(record.group)
        return (
            record,
            found.get(record.key) if found is not None else None,
            view.records(table).get(record.key) if view is not None else None,
        )

    def _stored_by_pk(self, table: Table, pk: tuple[Value, ...]) -> Record | None:
        """The row among those that were met."""
        records = self._by_pk.setdefault(table.number, {})
        record = records.get(pk)
        if record is None:
            for group, view in self._views.items():
                if (table.number, group) not in self._indexed:
                    self._indexed.add((table.number, group))
                    for met in view.records(table).values():
                        records[met.pk] = met
            record = records.get(pk)
        return record

    # Find.

    def _answer(
        self,
        table: Table,
        constraints: tuple[Constraint, ...],
        order: Order | None,
        limit: int | None,
        whole: bool,
        plan: Hashable,
        scope: Scope,
    ) -> list[Record]:
        """The stored rows that fit; the store is asked once. The list is the caller's to read, not to change."""
        question = (table.number, constraints, order, limit, scope)
        base = self._finds.get(question)
        if base is None:
            follows = self.database.follows if plan is not None and table.family_key and not whole else None
            whole = whole or (follows is not None and follows.expected((table.number, plan)))
            whole = whole and self._brought.get(table.family, 0) < WHOLE_ENOUGH
            whole = whole or (self.again and bool(table.family_key))
            base = self._ask(table, constraints, order, limit, whole, scope)
            if follows is not None and not whole:
                self._asked.update(dict.fromkeys([r.group for r in base], ((table.number, plan), len(base))))
            if len(self._finds) < FINDS_KEPT_MAX:
                self._finds[question] = base
            self._tell_moves()
        return base

    def _ask(
        self,
        table: Table,
        constraints: tuple[Constraint, ...],
        order: Order | None,
        limit: int | None,
        whole: bool,
        scope: Scope,
    ) -> list[Record]:
        """The store's answer; one that is too large for a frame is asked for with less, then in pages."""
        try:
            records = self._ask_once(table, constraints, order, limit, whole, scope)
        except Invalid:
            if whole:
                return self._ask(table, constraints, order, limit, False, scope)
            records = self._ask_pages(table, constraints, order, limit, scope)
        if len(records) > 1 and table.family_key:
            groups = list(dict.fromkeys([r.group for r in records]))
            self._siblings.update(dict.fromkeys(groups, (self.statement, groups)))
            self._missed = 0
        return records

    def _ask_pages(
        self, table: Table, constraints: tuple[Constraint, ...], order: Order | None, limit: int | None, scope: Scope
    ) -> list[Record]:
        """Each page is of a moment of its own; of each group all is of one ballot."""
        known, told = dict(self._ballots), self._moved
        if order is None or limit is None:
            found = self._all_in_pages(table, constraints, scope)
            if order is not None:
                order_records(table, found, order)
        else:
            found = self._first_in_pages(table, constraints, order, limit, scope)
        # What the pages alone have met, nothing was shown of at another ballot.
        self._moved = told or any(self._ballots[key] != ballot for key, ballot in known.items())
        return found

    def _all_in_pages(self, table: Table, constraints: tuple[Constraint, ...], scope: Scope) -> list[Record]:
        # Of all rows it does not matter in which order they come, and that of the primary key is at hand.
        found, moved = self._walk(table, constraints, Order(()), None, scope)
        if moved:
            # While so many rows are read there may always be one that changes, so it is not begun anew.
            self._fetch([key for key in moved if key not in self._views])
            found = [record for record in found if record.group not in moved]
            for key in moved:
                found += [r for r in self._views[key].records(table).values() if matches(table, r, constraints)]
            order_records(table, found, None)
        return found

    def _first_in_pages(
        self, table: Table, constraints: tuple[Constraint, ...], order: Order, limit: int, scope: Scope
    ) -> list[Record]:
        for _ in range(WALKS_MAX):
            found, moved = self._walk(table, constraints, order, limit, scope)
            if not moved:
                return found
        raise Conflict("groups kept changing while a list of their rows was read; run the transaction again")

    def _walk(
        self, table: Table, constraints: tuple[Constraint, ...], order: Order, limit: int | None, scope: Scope
    ) -> tuple[list[Record], list[GroupKey]]:
        """The rows, and the groups that two pages have met at different ballots."""
        met: dict[GroupKey, Ballot] = {}
        moved: dict[GroupKey, None] = {}

        def ask(narrowed: tuple[Constraint, ...], walk: Order, rows: int) -> list[Record]:
            page = self._ask_once(table, narrowed, walk, rows, False, scope)
            for record in page:
                ballot = self._ballots[record.group]
                if met.setdefault(record.group, ballot) != ballot:
                    moved[record.group] = None
            return page

        return in_pages(ask, table, constraints, order, limit), list(moved)

    def _ask_once(
        self,
        table: Table,
        constraints: tuple[Constraint, ...],
        order: Order | None,
        limit: int | None,
        whole: bool,
        scope: Scope,
    ) -> list[Record]:
        database, schema = self.database, self.schema
        query = FindQuery(database.name, table.number, schema.version, constraints, order, limit, whole, scope)
        result = database.store.find(query, database.timeout_s)
        self._brought[table.family] = self._brought.get(table.family, 0) + len(result.groups)
        for read in result.groups:
            if read.key not in self._views:
                known = database.groups.get(read.key, schema.version)
                self._admit(database.groups.take(read, known, schema.version))
        return [self._take(table, row) for row in result.rows]

    def _take(self, table: Table, row: FoundRow) -> Record:
        self._meet(row.group, row.ballot)
        view = self._views.get(row.group)
        record = view.records(table).get(row.key) if view is not None else None
        if record is None:
            kept = self._found.setdefault(row.group, {})
            record = kept.get(row.key)
            if record is None:
                record = kept[row.key] = table.decode(row.group, row.key, decode_row(row.row))
        if table.integer_key is not None and table.family_key:
            self._by_pk.setdefault(table.number, {})[record.pk] = record
            self.database.hints.put((table.number, record.pk[0]), row.group)
        return record
