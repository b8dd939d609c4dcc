"""Answers that do not fit a frame, asked for in pages; a page that does not fit either is asked for smaller.

Behind some that fit the next is larger again: the large rows may have been few, and each page is a question to the
store.

The rows are gone through in one order that no two of them share a place in: that of the question, then the primary key.
What comes behind a row there is no single range but some: as it in all columns but the last and beyond it in that one,
then as it in all but the last two and beyond it in the last but one, and so on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from dht.errors import Invalid
from dht.model import Comparison, Constraint, Order, Value
from nova_bridge.sql.schema import Place, Record, Table

PAGE_ROWS = 1000
GROW_AFTER = 4
"""So many pages that fitted are followed by larger ones: where all rows are large, one question in five is too many."""

Ask = Callable[[tuple[Constraint, ...], Order, int], list[Record]]
"""The first rows, at most so many, that fit the constraints. Raises Invalid where they do not fit a frame."""


class Range(NamedTuple):
    """Rows that are the same in `pinned` leading columns of the order. `no_null`: in the next column none has NULL."""

    pinned: int
    constraints: tuple[Constraint, ...] = ()
    no_null: bool = False


def in_pages(
    ask: Ask, table: Table, constraints: tuple[Constraint, ...], order: Order, limit: int | None
) -> list[Record]:
    """The first `limit` rows in this order, all if None. Raises Invalid if a row does not fit a frame by itself."""
    order = Order(tuple(dict.fromkeys([*order.columns, *map(table.number_of, table.primary)])), order.descending)
    filled = frozenset(table.number_of(position) for position in table.primary)
    found: dict[Place, Record] = {}
    ranges = [Range(0)]
    size, fitted = PAGE_ROWS, 0
    while ranges and (limit is None or len(found) < limit):
        nearest = ranges.pop()
        rows = size if limit is None else min(size, limit - len(found))
        try:
            page = ask((*constraints, *nearest.constraints), order, rows)
        except Invalid:
            if rows == 1:
                raise
            size, fitted = rows // 2, 0
            ranges.append(nearest)
            continue
        for record in page:
            found.pop((record.group, record.key), None)
            found[record.group, record.key] = record
        fitted += 1
        if len(page) == rows:
            values = [page[-1].values[table.position[column]] for column in order.columns]
            ranges += behind(order, values, nearest, filled)
        if fitted == GROW_AFTER:
            size, fitted = min(2 * size, PAGE_ROWS), 0
    return list(found.values())


def behind(order: Order, values: Sequence[Value], within: Range, filled: frozenset[int]) -> list[Range]:
    """What of the range comes behind its row with these values; the nearest comes last. `filled`: never NULL."""
    ranges = []
    for count in range(within.pinned, len(order.columns)):
        same = tuple([_same(c, v) for c, v in zip(order.columns[:count], values, strict=False)])
        column, value = order.columns[count], values[count]
        if not order.descending:
            beyond = Constraint(column, Comparison.NOT_NULL) if value is None else _of(column, Comparison.GT, value)
            ranges.append(Range(count, (*same, beyond), True))
        elif value is not None:
            # NULL is less than all, but no comparison says so.
            if column not in filled and (count > within.pinned or not within.no_null):
                ranges.append(Range(count + 1, (*same, Constraint(column, Comparison.IS_NULL))))
            ranges.append(Range(count, (*same, _of(column, Comparison.LT, value)), True))
    return ranges


def _same(column: int, value: Value) -> Constraint:
    return Constraint(column, Comparison.IS_NULL) if value is None else _of(column, Comparison.EQ, value)


def _of(column: int, comparison: Comparison, value: Value) -> Constraint:
    return Constraint(column, comparison, (value,))
