"""What one transaction has read and what it will write (DESIGN section 11).

It reads each group once and at one ballot. Changes are buffered as `Pending` rows laid over what was read, with a
journal, so that savepoints and failed statements are marks to go back to. `commit.py` makes a store transaction of it.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import Any, NamedTuple

from dht.errors import Conflict, Invalid
from dht.model import (
    Ballot,
    Comparison,
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
from nova_bridge.sql.groups import GroupView, table_part
from nova_bridge.sql.matching import matches, order_records
from nova_bridge.sql.schema import Foreign, Record, Schema, Table, Unique

SIBLINGS_PER_READ_MAX = 500
FINDS_KEPT_MAX = 512
PAGE_ROWS = 1000
MARKS_MAX = 4096
WHOLE_ANYWAY_MAX = 2
_MISSING: Any = object()

Place = tuple[GroupKey, RowKey]
ParentRow = tuple[GroupKey, int, tuple[Value, ...], tuple[tuple[int, Value], ...]]
"""Group, table's number, primary key, columns by number with their values."""


class Moved(Exception):
    """A group is at another ballot than the running statement may have shown of it: run it again."""


class Pending(NamedTuple):
    """A row that this transaction changed. `base`: as the store has it; `current`: as the transaction has it.

    `columns`: the positions that were set; `guards`: position -> value that the stored row must still have.
    """

    base: Record | None
    current: Record | None
    columns: frozenset[int]
    guards: dict[int, Any]


class Transaction:
    """One connection's transaction; reused after `reset`."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.reset()

    def reset(self) -> None:
        """Forget everything read and written."""
        self._schema: Schema | None = None
        self.seen: dict[GroupKey, Ballot] = {}
        self.overlay: dict[int, dict[Place, Pending]] = {}
        self.own_entries: dict[Any, Place | None] = {}
        self._values: dict[tuple[int, int, GroupKey], dict[tuple[Any, ...], Place]] = {}
        self._newest: dict[tuple[int, GroupKey], int] = {}
        self.journal: list[tuple[dict[Any, Any], Any, Any]] = []
        self.foreign_guards: dict[ParentRow, tuple[Table, Foreign]] = {}
        self._own_pk: dict[tuple[int, tuple[Value, ...]], Place] = {}
        self._views: dict[GroupKey, GroupView] = {}
        self._ballots: dict[GroupKey, Ballot] = {}
        self._found: dict[GroupKey, dict[RowKey, Record]] = {}
        self._by_pk: dict[int, dict[tuple[Value, ...], Record]] = {}
        self._indexed: set[tuple[int, GroupKey]] = set()
        self._reads: dict[Record, int] = {}
        self._marks: list[tuple[Iterable[Record], int]] = []
        self._stale: dict[Place, dict[int, Any]] = {}
        self._finds: dict[Any, list[Record]] = {}
        self._asked: dict[GroupKey, tuple[Hashable, int]] = {}
        self._siblings: dict[GroupKey, tuple[int, list[GroupKey]]] = {}
        self._missed = 0
        self._near: set[GroupKey] = set()
        self.copied: dict[Place, int] = {}
        self._moved = False
        self.tells_moves = self.again = False
        self.statement = 0
        self.reading = False

    @property
    def schema(self) -> Schema:
        """The schema that the whole transaction uses."""
        if self._schema is None:
            self._schema = self.database.schema
        return self._schema

    def adopt(self, schema: Schema, *, to_commit: bool = False) -> bool:
        """Go on with a newer schema, if the tables that were read and changed are still the same.

        Returns whether they are. Before a commit, what was only read does not matter any more, and a new index is kept
        by what is sent then.
        """
        old = self.schema
        touched = set(self.overlay)
        if not to_commit:
            self._fold_reads()
            met = {table_part(record.key) for record in self._reads} | {table_part(key) for _, key in self._stale}
            touched.update(number for number, table in old.by_number.items() if table.prefix in met)
        same = schema.same_rows if to_commit else schema.same_table
        if schema is old or not all(same(old, number) for number in touched):
            return False
        if not to_commit:
            self._keep_reads(None)
        self._schema = schema
        return True

    def is_empty(self, key: GroupKey) -> bool:
        """Whether the group was read, and had no rows."""
        view = self._views.get(key)
        return view is not None and not view.size_bytes

    @property
    def written(self) -> bool:
        """Whether there is anything to commit."""
        return bool(self.journal)

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
            for view in self.database.read_groups(missing, self.schema.version, near):
                self._admit(view)
            if near:
                self._near.update(missing)
            self._tell_moves()

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
            if self.journal:
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
        self._fold_reads()
        for record, mask in self._reads.items():
            if key is None or record.group == key:
                kept = self._stale.setdefault((record.group, record.key), {})
                for position in range(len(record.values)):
                    if mask >> position & 1:
                        kept.setdefault(position, record.stored(position))
        if key is None:
            self._views, self._found, self._finds, self._values = {}, {}, {}, {}
            self._newest, self._by_pk, self._indexed = {}, {}, set()
            return
        self._views.pop(key, None)
        self._found.pop(key, None)
        self._finds.clear()
        self._values.clear()
        self._newest.clear()
        self._indexed = {(t, g) for t, g in self._indexed if g != key}
        for records in self._by_pk.values():
            for pk in [pk for pk, record in records.items() if record.group == key]:
                del records[pk]

    # Rows.

    def rows(self, table: Table, group: GroupKey) -> list[Record]:
        """The table's rows of a group as the transaction sees them, by primary key."""
        base = self.view(group).records(table)
        own = self.overlay.get(table.number)
        if not own:
            return list(base.values())
        result = [record for record in base.values() if (group, record.key) not in own]
        mine = [p.current for (g, _), p in own.items() if g == group and p.current is not None]
        if mine:
            result += mine
            result.sort(key=_row_key)
        return result

    def row(self, table: Table, group: GroupKey, key: RowKey) -> Record | None:
        """One row by its place."""
        own = self.overlay.get(table.number)
        pending = own.get((group, key)) if own else None
        if pending is not None:
            return pending.current
        found = self._found.get(group)
        record = found.get(key) if found else None
        return record if record is not None else self.view(group).records(table).get(key)

    def holder(self, table: Table, unique: Unique, record: Record) -> Place | None:
        """Who has these values of a unique key that is checked inside the row's group."""
        key = _reserved(table, unique, record)
        if key is None:
            return None
        own = self.own_entries.get(key, _MISSING)
        if own is not _MISSING:
            return own
        which = (table.number, unique.id, record.group)
        held = self._values.get(which)
        if held is None:
            held = self._values[which] = {
                tuple([row.values[p] for p in unique.columns]): (row.group, row.key)
                for row in self.view(record.group).records(table).values()
            }
        return held.get(key[3])

    def newest(self, table: Table, group: GroupKey) -> int:
        """The greatest integer key of the table that the group has or, in this transaction, had."""
        key = (table.number, group)
        known = self._newest.get(key)
        if known is None:
            known = self._newest[key] = max(
                [r.pk[0] for r in self.rows(table, group) if isinstance(r.pk[0], int)], default=0
            )
        return known

    def current(self, table: Table, record: Record) -> Record | None:
        """The row of the record as it is after this transaction's own changes."""
        own = self.overlay.get(table.number)
        pending = own.get((record.group, record.key)) if own else None
        return record if pending is None else pending.current

    def by_pk(self, table: Table, keys: Sequence[tuple[Value, ...]]) -> list[Record]:
        """Rows by primary key: own ones, then those met already, then where they were seen last, then by find."""
        if table.whole or not table.family_key or set(table.family_key) <= set(table.primary):
            return self._by_direct_pk(table, keys)
        found: list[Record] = []
        hinted: dict[tuple[Value, ...], GroupKey] = {}
        unknown: list[tuple[Value, ...]] = []
        for pk in keys:
            met, record = self._met_by_pk(table, pk)
            if met:
                found += [record] if record is not None else []
            elif (group := self.database.hints.get((table.number, pk[0]))) is not None:
                hinted[pk] = group
            else:
                unknown.append(pk)
        self.ensure(hinted.values())
        for pk, group in hinted.items():
            record = self.row(table, group, table.pk_key(pk))
            if record is None:
                unknown.append(pk)
            else:
                found.append(record)
        return found + self._find_by_pk(table, unknown)

    def _by_direct_pk(self, table: Table, keys: Sequence[tuple[Value, ...]]) -> list[Record]:
        def group_of(pk: tuple[Value, ...]) -> GroupKey:
            if not table.family_key:
                return table.family_group(()) if table.whole else table.row_group(pk)
            return table.family_group(tuple([pk[table.primary.index(p)] for p in table.family_key]))

        places = [(group_of(pk), table.pk_key(pk)) for pk in keys]
        own = self.overlay.get(table.number, {})
        self.ensure([g for g, k in places if (g, k) not in own and k not in self._found.get(g, ())])
        records = [self.row(table, group, key) for group, key in places]
        return [record for record in records if record is not None]

    def _met_by_pk(self, table: Table, pk: tuple[Value, ...]) -> tuple[bool, Record | None]:
        place = self._own_pk.get((table.number, pk))
        if place is not None:
            pending = self.overlay[table.number].get(place)
            if pending is not None and pending.current is not None:
                return True, pending.current
        records = self._by_pk.setdefault(table.number, {})
        record = records.get(pk)
        if record is None:
            for group, view in self._views.items():
                if (table.number, group) not in self._indexed:
                    self._indexed.add((table.number, group))
                    for met in view.records(table).values():
                        records[met.pk] = met
            record = records.get(pk)
        return (True, self.current(table, record)) if record is not None else (False, None)

    def _find_by_pk(self, table: Table, keys: list[tuple[Value, ...]], scope: Scope | None = None) -> list[Record]:
        """Of a local table what this PoP has is asked of no other: there is one row of a key."""
        if not keys:
            return []
        if table.local and scope is None:
            near = self._find_by_pk(table, keys, Scope.NEAR)
            met = {record.pk for record in near}
            return near + self._find_by_pk(table, [pk for pk in keys if pk not in met], Scope.POPS)
        column = table.number_of(table.primary[0])
        values = tuple(dict.fromkeys(pk[0] for pk in keys))
        comparison = Comparison.EQ if len(values) == 1 else Comparison.IN
        constraints = [Constraint(column, comparison, values)]
        wanted = set(keys)
        found = self.find(table, tuple(constraints), whole=len(values) == 1, scope=scope)
        return [record for record in found if record.pk in wanted]

    # Find.

    def find(
        self,
        table: Table,
        constraints: tuple[Constraint, ...],
        order: Order | None = None,
        limit: int | None = None,
        whole: bool = False,
        plan: Hashable = None,
        scope: Scope | None = None,
    ) -> list[Record]:
        """Rows of the table in whatever group that fit the constraints, own changes included.

        `whole`: bring their groups too; so does a `plan` of which this process learned that their groups are read next.
        `scope`: of a local table, if not all PoPs.
        """
        own = self.overlay.get(table.number)
        if own:
            limit = None
        scope = table.scope if scope is None else scope
        question = (table.number, constraints, order, limit, scope)
        base = self._finds.get(question)
        if base is None:
            follows = self.database.follows if plan is not None and table.family_key and not whole else None
            whole = whole or (follows is not None and follows.expected((table.number, plan)))
            whole = whole or (self.again and bool(table.family_key))
            base = self._ask(table, constraints, order, limit, whole, scope)
            if follows is not None and not whole:
                self._asked.update(dict.fromkeys([r.group for r in base], ((table.number, plan), len(base))))
            if len(self._finds) < FINDS_KEPT_MAX:
                self._finds[question] = base
            self._tell_moves()
        if not own:
            return base
        result = [r for r in base if (r.group, r.key) not in own]
        mine = [p.current for p in own.values() if p.current is not None and matches(table, p.current, constraints)]
        if mine:
            result += mine
            order_records(table, result, order)
        return result

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
            if table.integer_key is None or limit is not None:
                raise
            records = self._ask_pages(table, constraints, order, scope)
        if len(records) > 1 and table.family_key:
            groups = list(dict.fromkeys([r.group for r in records]))
            self._siblings.update(dict.fromkeys(groups, (self.statement, groups)))
            self._missed = 0
        return records

    def _ask_pages(
        self, table: Table, constraints: tuple[Constraint, ...], order: Order | None, scope: Scope
    ) -> list[Record]:
        column = table.number_of(table.primary[0])
        found: list[Record] = []
        page: list[Record] = []
        while not found or len(page) == PAGE_ROWS:
            after = (Constraint(column, Comparison.GT, (found[-1].pk[0],)),) if found else ()
            page = self._ask_once(table, (*constraints, *after), Order((column,)), PAGE_ROWS, False, scope)
            found += page
            if not page:
                break
        if order is not None:
            order_records(table, found, order)
        return found

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

    # Writes.

    def mark_read(self, records: Iterable[Record], mask: int) -> None:
        """The statement saw these columns of these rows. Noted only: most transactions change nothing they read."""
        self._marks.append((records, mask))
        if len(self._marks) >= MARKS_MAX:
            self._fold_reads()

    def mark_copied(self, records: Iterable[Record], mask: int) -> None:
        """An INSERT took these columns of these rows, which guards a DELETE of them."""
        for record in records:
            place = (record.group, record.key)
            self.copied[place] = self.copied.get(place, 0) | mask

    def mark_looked_at(self, sights: Iterable[tuple[int, Record, int]]) -> None:
        """What a statement that changes rows saw: (table's number, row, columns), those that it changed included."""
        reads = self._reads
        for number, record, mask in sights:
            reads[record] = reads.get(record, 0) | mask
            own = self.overlay.get(number)
            pending = own.get((record.group, record.key)) if own else None
            if pending is not None and pending.current is not None:
                reads[pending.current] = reads.get(pending.current, 0) | mask

    def _fold_reads(self) -> None:
        reads, marks = self._reads, self._marks
        self._marks = []
        for records, mask in marks:
            for record in records:
                reads[record] = reads.get(record, 0) | mask

    def pending(self, table: Table, record: Record) -> Pending:
        """The row's state before the next change."""
        own = self.overlay.get(table.number)
        found = own.get((record.group, record.key)) if own else None
        return found if found is not None else Pending(record, record, frozenset(), {})

    def guards(
        self, table: Table, before: Pending, place: Place, mask: int, set_columns: Iterable[int]
    ) -> dict[int, Any]:
        """What must still hold of the stored row: columns the statement used, and set columns that were read before."""
        base = before.base
        if base is None:
            return before.guards
        self._fold_reads()
        read = self._columns_read(table, base)
        if before.current is not None:
            read |= self._reads.get(before.current, 0)
        stale = self._stale.get(place, {})
        for position in stale:
            read |= 1 << position
        for position in set_columns:
            mask |= read & 1 << position
        guards = dict(before.guards)
        for position in range(len(base.values)):
            if mask >> position & 1 and position not in before.columns and position not in guards:
                guards[position] = stale[position] if position in stale else base.stored(position)
        return guards

    def _columns_read(self, table: Table, record: Record) -> int:
        """A row may have been met twice, by a find and in its group."""
        found = self._found.get(record.group)
        view = self._views.get(record.group)
        met = (
            record,
            found.get(record.key) if found is not None else None,
            view.records(table).get(record.key) if view is not None else None,
        )
        mask = 0
        for each in met:
            if each is not None:
                mask |= self._reads.get(each, 0)
        return mask

    def put(self, table: Table, place: Place, pending: Pending) -> None:
        """Lay a changed row over what was read."""
        own = self.overlay.setdefault(table.number, {})
        old = own.get(place)
        before = old.current if old is not None else pending.base
        for unique in table.uniques:
            freed = _reserved(table, unique, before)
            taken = _reserved(table, unique, pending.current)
            if freed is not None and freed != taken and self.own_entries.get(freed) in {None, place}:
                self._set(self.own_entries, freed, None)
            if taken is not None:
                self._set(self.own_entries, taken, place)
        if pending.current is not None and before is not None:
            self._fold_reads()
            self._reads[pending.current] = self._reads.get(before, 0)
        self._set(own, place, pending)
        if pending.current is not None and table.integer_key is not None:
            self._set(self._own_pk, (table.number, pending.current.pk), place)
            known = self._newest.get((table.number, place[0]))
            if known is not None and isinstance(number := pending.current.pk[0], int):
                self._newest[table.number, place[0]] = max(known, number)

    def guard_parent(self, parent: ParentRow, child: Table, foreign: Foreign) -> None:
        """The row must exist, and have these columns, when the transaction commits: a row of `child` refers to it."""
        self._set(self.foreign_guards, parent, (child, foreign))

    def _set(self, target: dict[Any, Any], key: Any, value: Any) -> None:
        self.journal.append((target, key, target.get(key, _MISSING)))
        target[key] = value

    def rollback_to(self, mark: int) -> None:
        """Undo what was written after the journal had this length."""
        journal = self.journal
        self._fold_reads()
        while len(journal) > mark:
            target, key, old = journal.pop()
            undone = target.get(key)
            if isinstance(undone, Pending):
                self._hand_marks_back(undone)
            if old is _MISSING:
                target.pop(key, None)
            else:
                target[key] = old
        self._forget_near()

    def _hand_marks_back(self, undone: Pending) -> None:
        """What was read of the row as a change had left it, and the change had not set, was read of the stored row."""
        if undone.current is None:
            return
        mask = self._reads.pop(undone.current, 0)
        for position in undone.columns:
            mask &= ~(1 << position)
        if mask and undone.base is not None:
            self._reads[undone.base] = self._reads.get(undone.base, 0) | mask

    def _forget_near(self) -> None:
        """Where nothing is made any more of a group that the own PoP does not have, the others have not been asked."""
        made = {group for own in self.overlay.values() for group, _ in own}
        for key in [key for key in self._near if key not in made and self.is_empty(key)]:
            self._keep_reads(key)
            self._near.discard(key)
            self._ballots.pop(key, None)
            self.seen.pop(key, None)


def _row_key(record: Record) -> RowKey:
    return record.key


def _reserved(table: Table, unique: Unique, record: Record | None) -> Any:
    """What a row takes under a unique rule: the entry's group, or the values inside its own group; None if nothing."""
    if record is None or unique.kind == "trusted":
        return None
    if unique.kind == "entry":
        return table.entry_key(unique, record.values)
    values = tuple([record.values[p] for p in unique.columns])
    return None if None in values else (table.number, unique.id, record.group, values)
