"""What one transaction has read and what it will write (DESIGN section 11).

Changes are buffered as `Pending` rows laid over what was read (`nova_bridge.sql.reads`), with a journal, so that
savepoints and failed statements are marks to go back to. `commit.py` makes a store transaction of it.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from dht.model import Comparison, Constraint, GroupKey, Order, RowKey, Scope, Value
from nova_bridge.sql.matching import matches, order_records
from nova_bridge.sql.pages import Walk, as_they_are_read
from nova_bridge.sql.reads import Reads
from nova_bridge.sql.schema import Foreign, Place, Record, Schema, Table, Unique

_MISSING: Any = object()

ParentRow = tuple[GroupKey, int, tuple[Value, ...], tuple[tuple[int, Value], ...]]
"""Group, table's number, primary key, columns by number with their values."""


class Pending(NamedTuple):
    """A row that this transaction changed. `base`: as the store has it; `current`: as the transaction has it.

    `columns`: the positions that were set; `guards`: position -> value that the stored row must still have.
    """

    base: Record | None
    current: Record | None
    columns: frozenset[int]
    guards: dict[int, Any]


class Transaction(Reads):
    """One connection's transaction; reused after `reset`."""

    def reset(self) -> None:
        """Forget everything read and written."""
        super().reset()
        self.overlay: dict[int, dict[Place, Pending]] = {}
        self.own_entries: dict[Any, Place | None] = {}
        self._values: dict[tuple[int, int, GroupKey], dict[tuple[Any, ...], Place]] = {}
        self._newest: dict[tuple[int, GroupKey], int] = {}
        self.journal: list[tuple[dict[Any, Any], Any, Any]] = []
        self.foreign_guards: dict[ParentRow, tuple[Table, Foreign]] = {}
        self._own_pk: dict[tuple[int, tuple[Value, ...]], Place] = {}

    def adopt(self, schema: Schema, *, to_commit: bool = False) -> bool:
        """Go on with a newer schema, if the tables that were read and changed are still the same.

        Returns whether they are. Before a commit, what was only read does not matter any more, and a new index is kept
        by what is sent then.
        """
        old = self.schema
        touched = set(self.overlay)
        if not to_commit:
            met = self.marks.tables()
            touched.update(number for number, table in old.by_number.items() if table.prefix in met)
        same = schema.same_rows if to_commit else schema.same_table
        if schema is old or not all(same(old, number) for number in touched):
            return False
        if not to_commit:
            self._keep_reads(None)
        self._schema = schema
        return True

    @property
    def written(self) -> bool:
        """Whether there is anything to commit."""
        return bool(self.journal)

    def _keep_reads(self, key: GroupKey | None) -> None:
        self._values.clear()
        self._newest.clear()
        super()._keep_reads(key)

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
        return self._stored(group, table, key)

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
        record = self._stored_by_pk(table, pk)
        return (True, self.current(table, record)) if record is not None else (False, None)

    def _find_by_pk(self, table: Table, keys: list[tuple[Value, ...]], scope: Scope | None = None) -> list[Record]:
        """Of a local table what this PoP has is asked of no other: there is one row of a key."""
        if not keys:
            return []
        if table.local and scope is None:
            near = self._find_by_pk(table, keys, Scope.NEAR)
            met = {record.pk for record in near}
            return near + self._find_by_pk(table, [pk for pk in keys if pk not in met], Scope.POPS)
        self.database.hints.by_id.add(table.number)
        column = table.number_of(table.primary[0])
        values = tuple(dict.fromkeys(pk[0] for pk in keys))
        comparison = Comparison.EQ if len(values) == 1 else Comparison.IN
        constraints = [Constraint(column, comparison, values)]
        wanted = set(keys)
        found = self.find(table, tuple(constraints), whole=len(values) == 1, scope=scope)
        return [record for record in found if record.pk in wanted]

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
        base = self._answer(table, constraints, order, limit, whole, plan, scope)
        if not own:
            return base
        result = [r for r in base if (r.group, r.key) not in own]
        mine = [p.current for p in own.values() if p.current is not None and matches(table, p.current, constraints)]
        if mine:
            result += mine
            order_records(table, result, order)
        return result

    def find_as_read(
        self,
        table: Table,
        constraints: tuple[Constraint, ...],
        order: Order,
        whole: bool,
        plan: Hashable,
        scope: Scope,
        wanted: int,
    ) -> Iterator[list[Record]]:
        """The same in pages, for a statement that will not read all of them, but `wanted` at the least.

        Of a table without own changes.
        """

        def ask(narrowed: tuple[Constraint, ...], walk: Order, rows: int) -> list[Record]:
            return self._answer(table, narrowed, walk, rows, whole, plan, scope)

        return as_they_are_read(Walk(ask, table, constraints, order), wanted)

    # Writes.

    def mark_looked_at(self, sights: Iterable[tuple[int, Record, int]]) -> None:
        """What a statement that changes rows saw: (table's number, row, columns), those that it changed included."""
        for number, record, mask in sights:
            self.marks.look(record, mask)
            own = self.overlay.get(number)
            pending = own.get((record.group, record.key)) if own else None
            if pending is not None and pending.current is not None:
                self.marks.look(pending.current, mask)

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
        read = self.marks.of((*self._met_as(table, base), before.current))
        stale = self.marks.stale(place)
        for position in stale:
            read |= 1 << position
        for position in set_columns:
            mask |= read & 1 << position
        guards = dict(before.guards)
        mask &= (1 << len(base.values)) - 1
        while mask:
            position = (mask & -mask).bit_length() - 1
            mask &= mask - 1
            if position not in before.columns and position not in guards:
                guards[position] = stale[position] if position in stale else base.stored(position)
        return guards

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
            self.marks.carry(before, pending.current)
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
        while len(journal) > mark:
            target, key, old = journal.pop()
            undone = target.get(key)
            if isinstance(undone, Pending) and undone.current is not None:
                self.marks.hand_back(undone.current, undone.base, undone.columns)
            if old is _MISSING:
                target.pop(key, None)
            else:
                target[key] = old
        self._forget_near()

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
