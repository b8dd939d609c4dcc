"""What SQLite's planner asks, as a way to the rows: group read, key, unique entry, find or scan (DESIGN section 11).

SQLite checks every row again, so a plan may bring too many rows but never too few.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import apsw

from dht.model import Comparison, Constraint, Order, Scope
from nova_bridge.sql import access
from nova_bridge.sql.schema import Record, Table, Unique
from nova_bridge.sql.transaction import Transaction
from nova_bridge.sql.values import BLOB, INTEGER, NUMERIC, REAL, TEXT, coerce, sort_key

LOG = logging.getLogger(__name__)
EQ, IS, IS_NULL = (
    apsw.SQLITE_INDEX_CONSTRAINT_EQ,
    apsw.SQLITE_INDEX_CONSTRAINT_IS,
    apsw.SQLITE_INDEX_CONSTRAINT_ISNULL,
)
COMPARISONS = {
    apsw.SQLITE_INDEX_CONSTRAINT_EQ: Comparison.EQ,
    apsw.SQLITE_INDEX_CONSTRAINT_IS: Comparison.EQ,
    apsw.SQLITE_INDEX_CONSTRAINT_NE: Comparison.NE,
    apsw.SQLITE_INDEX_CONSTRAINT_LT: Comparison.LT,
    apsw.SQLITE_INDEX_CONSTRAINT_LE: Comparison.LE,
    apsw.SQLITE_INDEX_CONSTRAINT_GT: Comparison.GT,
    apsw.SQLITE_INDEX_CONSTRAINT_GE: Comparison.GE,
    apsw.SQLITE_INDEX_CONSTRAINT_ISNULL: Comparison.IS_NULL,
    apsw.SQLITE_INDEX_CONSTRAINT_ISNOTNULL: Comparison.NOT_NULL,
    apsw.SQLITE_INDEX_CONSTRAINT_ISNOT: Comparison.IS_NOT,
    apsw.SQLITE_INDEX_CONSTRAINT_FUNCTION: Comparison.EQ_OR_NULL,
}
MAYBE_OF_ROW_VALUES = (Comparison.LE, Comparison.GE)
"""Of `(a, b) < (1, 2)` a virtual table is told `a <= 1`, which more rows fit."""
OF_UNKNOWN_COLLATION = (Comparison.NE, Comparison.IS_NOT)
"""Of `a != 'x' COLLATE NOCASE` it is told `a != 'x'`, which more rows fit; with other comparisons, of the collation."""
LIMITS = (apsw.SQLITE_INDEX_CONSTRAINT_LIMIT, apsw.SQLITE_INDEX_CONSTRAINT_OFFSET)
ROWS_GUESSED = 1000
SCAN_COST = 300.0
"""Of a row, in look-ups of a row whose group a find has brought along. A scan goes through all nodes' rows, which may
be far more than the guess; any way from another table's find is better, however many rows that one may have."""
BY_KEY = frozenset({"key", "family", "entry"})
AS_IT_IS = {TEXT: str, INTEGER: int, REAL: int, NUMERIC: int, BLOB: bytes}
"""By affinity: values of this type are compared with the column as they are."""
PRODUCT_MAX = 10_000
"""Combinations of IN lists looked up one by one; beyond that a find takes the lists as they are."""


class Term(NamedTuple):
    """One condition given to a plan: column position, comparison, index among the plan's arguments."""

    position: int
    comparison: Comparison
    is_operator: bool


class Plan(NamedTuple):
    """`terms` in the order of the arguments. `mask`: the columns that the statement uses of this table.

    `cut`: the arguments that hold LIMIT and OFFSET, where the store may cut because it judges all conditions.
    `sort`: column positions to sort the rows of a group by, which is in the order of the primary key.
    """

    kind: str
    terms: tuple[Term, ...]
    key: tuple[int, ...]
    unique: Unique | None
    mask: int
    order: Order | None
    cut: tuple[int, ...] = ()
    sort: tuple[int, ...] = ()


class Planner:
    """The plans of one table; SQLite keeps their numbers in its prepared statements."""

    def __init__(self, table: Table, in_lists: Callable[[], bool]) -> None:
        self.table = table
        self.plans: list[Plan] = []
        self._numbers: dict[Plan, int] = {}
        self._as_it_is = [AS_IT_IS[affinity] for affinity in table.affinities]
        self._in_lists = in_lists

    def best_index(self, info: apsw.IndexInfo) -> bool:
        """Answer xBestIndex."""
        usable: dict[int, list[tuple[int, int]]] = {}
        limits = []
        for i in range(info.nConstraint):
            op = info.get_aConstraint_op(i)
            if op in LIMITS:
                limits.append((op, i))
                continue
            if op not in COMPARISONS or not info.get_aConstraint_usable(i):
                continue
            column = info.get_aConstraint_iColumn(i)
            if column == -1:
                column = self._rowid_column()
            if column >= 0 and self._binary(info, i):
                usable.setdefault(column, []).append((i, op))
        equal = {c: found for c, terms in usable.items() if (found := _equality(terms)) is not None}
        kind, key, unique = self._way(equal)
        chosen = self._chosen(kind, key, equal, usable)
        lists = 0
        terms = []
        for argument, (i, op, column) in enumerate(chosen):
            info.set_aConstraintUsage_argvIndex(i, argument + 1)
            comparison = COMPARISONS[op]
            if op == EQ and info.get_aConstraintUsage_in(i):
                lists += 1
                if self._in_lists():
                    info.set_aConstraintUsage_in(i, True)
            terms.append(Term(column, comparison, op == IS))
        order = self._order(info) if kind in {"find", "scan"} and (not lists or self._in_lists()) else None
        consumed = order is not None
        cut: tuple[int, ...] = ()
        judged = len(terms) + len(limits) == info.nConstraint and all(info.get_aConstraint_usable(i) for _, i in limits)
        if limits and judged and kind in {"find", "scan"} and (consumed or not info.nOrderBy):
            cut = tuple(range(len(terms), len(terms) + len(limits)))
            for argument, (_, i) in zip(cut, sorted(limits), strict=True):
                info.set_aConstraintUsage_argvIndex(i, argument + 1)
            order = order or Order(tuple(self.table.number_of(p) for p in self.table.primary))
        sort = self._index_order(equal) if kind in {"family", "whole"} else ()
        plan = Plan(kind, tuple(terms), key, unique, self._mask(info), order, cut, sort)
        number = self._numbers.get(plan)
        if number is None:
            number = self._numbers[plan] = len(self.plans)
            self.plans.append(plan)
        info.idxNum = number
        info.orderByConsumed = consumed
        self._estimate(info, kind, key, equal, lists)
        return True

    def _rowid_column(self) -> int:
        return self.table.integer_key if self.table.integer_key is not None else -1

    @staticmethod
    def _binary(info: apsw.IndexInfo, i: int) -> bool:
        """Whether text is compared byte by byte, which a column of numbers may hold as well."""
        return bool(info.get_aConstraint_collation(i) == "BINARY")

    def _way(self, equal: dict[int, tuple[int, int]]) -> tuple[str, tuple[int, ...], Unique | None]:
        table = self.table
        strict = {c for c, (_, op) in equal.items() if op == EQ}
        if table.whole:
            return "whole", (), None
        if table.integer_key is not None and table.integer_key in strict:
            return "key", (table.integer_key,), None
        if table.family_key and strict.issuperset(table.family_key):
            return "family", table.family_key, None
        if not table.family_key and strict.issuperset(table.primary):
            return "key", table.primary, None
        for unique in table.uniques:
            if unique.kind == "entry" and unique.used and strict.issuperset(unique.columns):
                return "entry", unique.columns, unique
        return ("find" if equal else "scan"), (), None

    def _chosen(
        self,
        kind: str,
        key: tuple[int, ...],
        equal: dict[int, tuple[int, int]],
        usable: dict[int, list[tuple[int, int]]],
    ) -> list[tuple[int, int, int]]:
        """(constraint, op, column) of what the plan gets, the key's columns first."""
        if kind == "whole":
            return []
        chosen = [(*equal[c], c) for c in key]
        if kind in {"key", "family"}:
            return chosen
        taken = set(key)
        for column, terms in usable.items():
            if column in self.table.unindexed or column in taken:
                continue
            if column in equal:
                chosen.append((*equal[column], column))
            else:
                chosen += [(i, op, column) for i, op in terms]
        return chosen

    def _mask(self, info: apsw.IndexInfo) -> int:
        mask = 0
        for column in info.colUsed:
            mask |= 1 << column if column < 63 else (1 << self.table.width) - (1 << 63)
        return mask

    def _order(self, info: apsw.IndexInfo) -> Order | None:
        """The asked order, where the store gives it: ascending or descending throughout, by plain columns."""
        if not info.nOrderBy:
            return None
        columns = [info.get_aOrderBy_iColumn(i) for i in range(info.nOrderBy)]
        columns = [self._rowid_column() if c == -1 else c for c in columns]
        descending = {bool(info.get_aOrderBy_desc(i)) for i in range(info.nOrderBy)}
        if len(descending) != 1 or any(c < 0 or c in self.table.unindexed for c in columns):
            return None
        return Order(tuple(self.table.number_of(c) for c in columns), descending.pop())

    def _index_order(self, equal: dict[int, tuple[int, int]]) -> tuple[int, ...]:
        """The columns behind the equalities in the index that a real table would be read by.

        A statement without ORDER BY may expect nothing, but gets that index's order from SQLite and InnoDB, and some
        of Nova's statements live by it.
        """
        run, columns = max(
            ((self._equality_run(columns, equal), columns) for columns in self.table.indexes),
            key=lambda choice: choice[0],
            default=(0, ()),
        )
        return columns[run:] if run else ()

    def _estimate(
        self, info: apsw.IndexInfo, kind: str, key: tuple[int, ...], equal: dict[int, tuple[int, int]], lists: int
    ) -> None:
        match kind:
            case "key" | "entry":
                rows, cost = 20**lists, (1.0 if kind == "key" else 3.0) * 20**lists
                # One text is many a number ('1', '01'), and what it will be compared with is not known yet.
                if not lists and not any(self.table.affinities[p] in (TEXT, BLOB) for p in key):
                    info.idxFlags = apsw.SQLITE_INDEX_SCAN_UNIQUE
            case "family":
                rows, cost = 5 * 20**lists, 2.0 + 5 * 20**lists
            case "whole":
                rows, cost = 50, 60.0
            case "find":
                indexed = self._indexed_columns(equal)
                rows = max(2, ROWS_GUESSED // 10 ** max(indexed, 1)) * (5 if lists else 1)
                cost = 20.0 + rows * 1.5 if indexed else ROWS_GUESSED * SCAN_COST * 0.8
            case _:
                rows, cost = ROWS_GUESSED, ROWS_GUESSED * SCAN_COST
        info.estimatedRows, info.estimatedCost = rows, cost

    def _indexed_columns(self, equal: dict[int, tuple[int, int]]) -> int:
        return max((self._equality_run(columns, equal) for columns in self.table.indexes), default=0)

    @staticmethod
    def _equality_run(columns: Sequence[int], equal: dict[int, tuple[int, int]]) -> int:
        return sum(1 for _ in itertools.takewhile(equal.__contains__, columns))

    def pages(
        self, tx: Transaction, plan: Plan, arguments: Sequence[Any], whole_groups: Callable[[], bool]
    ) -> Iterator[list[Record]] | None:
        """Answer xFilter page by page, where the statement probably stops reading before the end; else None."""
        table = self.table
        if plan.order is None or plan.kind not in {"find", "scan"} or not tx.reading or tx.overlay.get(table.number):
            return None
        wanted = tx.rows_wanted
        if plan.cut:
            wanted = None if self._tells_all(plan, arguments) else _limit(plan, arguments)
        constraints = None if wanted is None else self._constraints(plan, arguments)
        if wanted is None or constraints is None:
            return None
        scope = self._scope(tx, constraints)
        return tx.find_as_read(table, constraints, plan.order, whole_groups(), plan, scope, wanted)

    def run(
        self, tx: Transaction, plan: Plan, arguments: Sequence[Any], whole_groups: Callable[[], bool]
    ) -> list[Record]:
        """Answer xFilter."""
        records = self._run(tx, plan, arguments, whole_groups)
        if plan.sort and len(records) > 1:
            records = _sorted(records, plan.sort)
        return records

    def _run(
        self, tx: Transaction, plan: Plan, arguments: Sequence[Any], whole_groups: Callable[[], bool]
    ) -> list[Record]:
        table = self.table
        if plan.kind == "whole":
            return tx.rows(table, table.family_group(()))
        if plan.kind in BY_KEY:
            key = self._key(plan, arguments)
            keys = [key] if key is not None else self._keys(plan, arguments)
            if keys is not None:
                return self._by_keys(tx, plan, keys)
        constraints = self._constraints(plan, arguments)
        if constraints is None:
            return []
        if LOG.isEnabledFor(logging.DEBUG):
            self._tell_scan(constraints)
        limit = _limit(plan, arguments) if plan.cut and self._tells_all(plan, arguments) else None
        return tx.find(table, constraints, plan.order, limit, whole_groups(), plan, self._scope(tx, constraints))

    def _scope(self, tx: Transaction, constraints: Sequence[Constraint]) -> Scope:
        table = self.table
        if tx.reading and table.scan_scope is not table.scope and not self._pins(constraints):
            return table.scan_scope
        return table.scope

    def _pins(self, constraints: Sequence[Constraint]) -> bool:
        """Whether at most some named rows can fit: such a look-up is answered for all PoPs or not at all."""
        table = self.table
        named = {c.column for c in constraints if c.comparison in (Comparison.EQ, Comparison.IN)}
        keys = [table.family_key, table.primary, *(unique.columns for unique in table.uniques)]
        return any(key and all(table.number_of(p) in named for p in key) for key in keys)

    def _tell_scan(self, constraints: Sequence[Constraint]) -> None:
        """Log it when no index begins with a column that the statement has a condition on: every row is looked at."""
        table = self.table
        judged = {c.column for c in constraints if c.comparison not in (Comparison.NE, Comparison.IS_NOT)}
        if not any(columns and table.number_of(columns[0]) in judged for columns in table.indexes):
            rooted = "rooted table" if table.family_key else "table"
            LOG.debug("scan of %s %s, conditions on columns %s", rooted, table.name, sorted(judged))

    def _by_keys(self, tx: Transaction, plan: Plan, keys: list[tuple[Any, ...]]) -> list[Record]:
        table = self.table
        if plan.kind == "family":
            return access.by_family(tx, table, keys)
        if plan.unique is not None:
            return access.by_entry(tx, table, plan.unique, keys)
        keys = [k for k in keys if None not in k]
        if len(keys) > 1:
            keys = sorted(dict.fromkeys(keys), key=lambda k: [sort_key(v) for v in k])
        return tx.by_pk(table, keys)

    def _key(self, plan: Plan, arguments: Sequence[Any]) -> tuple[Any, ...] | None:
        """The one key to look up, where its values are compared as they are; None: see `_keys`."""
        types, unique = self._as_it_is, plan.unique
        for position, value in zip(plan.key, arguments, strict=False):
            if type(value) is not types[position]:
                return None
            if unique is not None and position == unique.deleted and value != 0:
                return None
        return tuple(arguments[: len(plan.key)])

    def _keys(self, plan: Plan, arguments: Sequence[Any]) -> list[tuple[Any, ...]] | None:
        """The keys to look up; None where the plan's way does not hold for these values, so that a find must do."""
        lists = []
        product = 1
        for position, value in zip(plan.key, arguments, strict=False):
            if self._sqlite_judges(position, value):
                return None
            values = self._values(position, value)
            if plan.unique is not None and position == plan.unique.deleted and values != [0]:
                return None
            lists.append(values)
            product *= len(values)
        if product > PRODUCT_MAX:
            return None
        return list(itertools.product(*lists))

    def _tells_all(self, plan: Plan, arguments: Sequence[Any]) -> bool:
        """Whether what fits the constraints fits the statement's conditions, so that the store may cut.

        Else the rows are read in pages, as SQLite asks for them.
        """
        return not any(
            term.comparison in MAYBE_OF_ROW_VALUES
            or (term.comparison in OF_UNKNOWN_COLLATION and isinstance(value, str))
            or self._sqlite_judges(term.position, value)
            for term, value in zip(plan.terms, arguments, strict=False)
        )

    def _values(self, position: int, value: Any) -> list[Any]:
        if isinstance(value, (set, frozenset)):
            found = {self._compared(position, v) for v in value if v is not None}
            return sorted(found, key=sort_key)
        return [self._compared(position, value)]

    def _compared(self, position: int, value: Any) -> Any:
        """The value as SQLite compares the column with it: an integer is not rounded to a real for that."""
        affinity = self.table.affinities[position]
        return coerce(NUMERIC if affinity == REAL else affinity, value)

    def _sqlite_judges(self, position: int, value: Any) -> bool:
        """Whether it depends on where the value comes from which of the column's are equal to it.

        A text column compared with a column of numbers is compared as numbers, as which '1' and '01' are the same. A
        column of no type is compared as text or as numbers where the other side is a column of such.
        """
        kinds = {TEXT: (int, float), BLOB: (int, float, str)}.get(self.table.affinities[position])
        if kinds is None:
            return False
        return any(type(v) in kinds for v in (value if isinstance(value, (set, frozenset)) else (value,)))

    def _constraints(self, plan: Plan, arguments: Sequence[Any]) -> tuple[Constraint, ...] | None:
        """None where a NULL makes a condition that no row can meet."""
        result = []
        for term, value in zip(plan.terms, arguments, strict=False):
            number = self.table.number_of(term.position)
            if term.comparison in (Comparison.IS_NULL, Comparison.NOT_NULL):
                result.append(Constraint(number, term.comparison))
            elif self._sqlite_judges(term.position, value):
                continue
            elif isinstance(value, (set, frozenset)):
                result.append(Constraint(number, Comparison.IN, tuple(self._values(term.position, value))))
            elif value is None:
                if term.comparison is Comparison.IS_NOT:
                    result.append(Constraint(number, Comparison.NOT_NULL))
                elif term.is_operator or term.comparison is Comparison.EQ_OR_NULL:
                    result.append(Constraint(number, Comparison.IS_NULL))
                else:
                    return None
            else:
                # A function's arguments get no affinity.
                plain = term.comparison is Comparison.EQ_OR_NULL
                given = value if plain else self._compared(term.position, value)
                result.append(Constraint(number, term.comparison, (given,)))
        return tuple(result)


def _sorted(records: list[Record], positions: tuple[int, ...]) -> list[Record]:
    try:
        # Values of one kind are in SQLite's order by themselves.
        return sorted(records, key=lambda record: [record.values[p] for p in positions])
    except TypeError:
        return sorted(records, key=lambda record: [sort_key(record.values[p]) for p in positions])


def _limit(plan: Plan, arguments: Sequence[Any]) -> int | None:
    """How many rows suffice: SQLite itself skips and counts among them."""
    numbers = [n for i in plan.cut if isinstance(n := arguments[i], int)]
    if not numbers or len(numbers) < len(plan.cut) or numbers[0] < 0:
        return None
    return sum(max(0, n) for n in numbers)


def _equality(terms: list[tuple[int, int]]) -> tuple[int, int] | None:
    """The strongest equality among a column's conditions."""
    found = None
    for i, op in terms:
        if op == EQ:
            return i, op
        if op in (IS, IS_NULL) and found is None:
            found = (i, op)
    return found
