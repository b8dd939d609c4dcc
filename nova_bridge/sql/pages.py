"""Rows in pages: of answers that do not fit a frame, and of lists that SQLite leaves before their end.

Of the former a page that does not fit either is asked for smaller. Behind some that fit the next is larger again: the
large rows may have been few, and each page is a question to the store.

The latter: SQLite tells a virtual table of a LIMIT only where it reads nothing else, and knows each condition. Beside a
join or an OR it just stops reading; so what is read next is asked for when it is, not before.

The rows are gone through in one order that no two of them share a place in: that of the question, then the primary key.
What comes behind a row there is no single range but some: as it in all columns but the last and beyond it in that one,
then as it in all but the last two and beyond it in the last but one, and so on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from dht.errors import Invalid
from dht.model import Comparison, Constraint, Order, Value
from nova_bridge.sql.schema import Record, Table

PAGE_ROWS = 1000
SLACK_ROWS = 16
"""Asked for beyond what a statement wants: some may not fit a condition that only SQLite knows."""
PAGE_GROWTH = 8
PAGE_READ_ROWS_MAX = 4 * PAGE_ROWS
"""Where few rows fit, which only SQLite knows, each page is so many times the last: few questions read all of them."""
GROW_AFTER = 4
"""So many pages that fitted are followed by larger ones: where all rows are large, one question in five is too many."""

Ask = Callable[[tuple[Constraint, ...], Order, int], list[Record]]
"""The first rows, at most so many, that fit the constraints. Raises Invalid where they do not fit a frame."""


class Range(NamedTuple):
    """Rows that are the same in `pinned` leading columns of the order. `no_null`: in the next column none has NULL."""

    pinned: int
    constraints: tuple[Constraint, ...] = ()
    no_null: bool = False


class Walk:
    """The rows that fit the constraints, page by page in this order, and of equal ones by the primary key."""

    def __init__(self, ask: Ask, table: Table, constraints: tuple[Constraint, ...], order: Order) -> None:
        primary = [table.number_of(position) for position in table.primary]
        self._ask, self._table, self._constraints = ask, table, constraints
        self._order = Order(_up_to_key(order.columns, primary), order.descending)
        self._filled = frozenset(primary)
        self._ranges = [Range(0)]

    @property
    def ended(self) -> bool:
        """Nothing is left."""
        return not self._ranges

    def page(self, rows: int) -> list[Record]:
        """The next rows, `rows` at most; perhaps none though there are more behind them.

        Raises Invalid where they do not fit a frame: fewer can be asked for then.
        """
        nearest = self._ranges[-1]
        page = self._ask((*self._constraints, *nearest.constraints), self._order, rows)
        self._ranges.pop()
        if len(page) == rows:
            values = [page[-1].values[self._table.position[column]] for column in self._order.columns]
            self._ranges += behind(self._order, values, nearest, self._filled)
        return page


def _up_to_key(columns: tuple[int, ...], primary: list[int]) -> tuple[int, ...]:
    """As many columns as tell any two rows apart."""
    taken: list[int] = []
    for column in dict.fromkeys((*columns, *primary)):
        if primary and set(primary) <= set(taken):
            break
        taken.append(column)
    return tuple(taken)


def in_pages(
    ask: Ask, table: Table, constraints: tuple[Constraint, ...], order: Order, limit: int | None
) -> list[Record]:
    """The first `limit` rows in this order, all if None. Raises Invalid if a row does not fit a frame by itself.

    A row that moves on behind the next page is there as it was, and once more as it is.
    """
    walk = Walk(ask, table, constraints, order)
    found: list[Record] = []
    size, fitted = PAGE_ROWS, 0
    while not walk.ended and (limit is None or len(found) < limit):
        rows = size if limit is None else min(size, limit - len(found))
        try:
            page = walk.page(rows)
        except Invalid:
            if rows == 1:
                raise
            size, fitted = rows // 2, 0
            continue
        found += page
        fitted += 1
        if fitted == GROW_AFTER:
            size, fitted = min(2 * size, PAGE_ROWS), 0
    return found


def as_they_are_read(walk: Walk, first: int) -> Iterator[list[Record]]:
    """The walk's pages. `first`: how many rows are likely to be read at all."""
    rows = min(max(first + min(first, SLACK_ROWS), 1), PAGE_READ_ROWS_MAX)
    while not walk.ended:
        page = walk.page(rows)
        if len(page) == rows:
            rows = min(PAGE_GROWTH * rows, PAGE_READ_ROWS_MAX)
        if page:
            yield page


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
