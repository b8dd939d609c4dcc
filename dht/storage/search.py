"""Matching rows of one table from a node's own indexes (`find` of DESIGN section 6, one member's share).

A plan takes the index with the longest run of columns bound by equality (=, IN, IS NULL), then a range on the next
column, then one whose order is the asked order. The plan's stretches of the index are scanned, each entry's row is
fetched, and all constraints are checked on the row, with SQLite's comparison of values: numbers by value, text by code
point, blobs; numbers below text below blobs; NULL matches what `Comparison` says.

That index may hold far more rows than the limit, and give them in another order: a project's ten thousand servers, of
which the newest thousand are asked for. Then an index of the asked order is read first, as long as it has given enough
rows before a few times as many entries were looked at. So the rows looked at are at most a few times the limit more
than by the better of both ways.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from dht.limits import FIND_ROWS_MAX
from dht.model import Comparison, Constraint, FindQuery, GroupKey, Row, RowKey, Value
from dht.rows import decode_row, decode_values, encode_value, table_prefix
from dht.storage.indexes import ENTRY, PREFIX_END, Index, Indexes, TableIndexes, scan, split_tail
from dht.world import Disk, Space

Match = tuple[GroupKey, RowKey, bytes]
Test = tuple[int, Callable[[Value], bool]]

_PROBES_MAX: Final = 10_000
_LOOKED_AT_PER_ROW: Final = 4
"""Entries of an index in the asked order that are looked at for each row of the limit, before it is given up."""
_ABOVE_NULL: Final = b"\x06"
_EQUALITIES: Final = (Comparison.EQ, Comparison.IN, Comparison.IS_NULL)
_TAKES_NULL: Final = (Comparison.IS_NULL, Comparison.IS_NOT, Comparison.EQ_OR_NULL)
_UPPER: Final = (Comparison.LT, Comparison.LE)
_LOWER: Final = (Comparison.GT, Comparison.GE, Comparison.NOT_NULL)


@dataclass(frozen=True, slots=True)
class Plan:
    """Stretches [low, high) of one index, in index order, each with the length of the bytes its keys share.

    `ordered`: read one after the other they give query order. `merged`: each gives query order, so they are merged.
    """

    stretches: list[tuple[bytes, bytes, int]]
    ordered: bool
    merged: bool

    @property
    def sorted(self) -> bool:
        """Whether the rows come in query order, one way or the other."""
        return self.ordered or self.merged


@dataclass(frozen=True, slots=True)
class _Way:
    """An index, and what it is good for. `run`: so many of its columns are bound by equality; `ranged`: the next is."""

    index: Index
    run: int
    ranged: bool
    ordered: bool
    merged: bool

    def score(self) -> tuple[int, bool, bool, bool]:
        """The higher, the fewer entries are to be expected, or the better ordered they are."""
        return self.run, self.ranged, self.ordered, self.merged


def search(
    disk: Disk, indexes: Indexes, query: FindQuery, tablets: frozenset[int] | None, limit: int | None
) -> tuple[list[Match], bool]:
    """See `RegisterFile.find_local`."""
    limit = FIND_ROWS_MAX if limit is None else limit
    if query.order is not None and query.limit is not None:
        limit = min(limit, query.limit)
    if any(_never(constraint) for constraint in query.constraints):
        return [], False
    table = table_prefix(query.table)
    known = indexes.of(encode_value(query.database), table)
    pk = known.primary.columns
    plan, sorted_plan = _best_plans(known, query)
    descending = query.order is not None and query.order.descending

    def matches(plan: Plan, entries_max: int | None = None) -> Iterator[Match]:
        entries = _entries(disk, plan, descending)
        entries = entries if entries_max is None else _first_entries(entries, entries_max)
        return _matches(entries, indexes, known, query, tablets)

    rows: list[Match] = []
    if plan.sorted:
        rows = list(itertools.islice(_in_order(matches(plan), query, pk), limit + 1))
        return rows[:limit], len(rows) > limit
    enough = _LOOKED_AT_PER_ROW * (limit + 1)
    few = sorted_plan is not None and len(sorted_plan.stretches) <= enough
    if sorted_plan is not None and few and _is_longer(_entries(disk, plan, descending), enough):
        rows = list(itertools.islice(_in_order(matches(sorted_plan, enough), query, pk), limit + 1))
    if len(rows) <= limit:
        rows = _first_rows(matches(plan), limit + 1, pk, query)
    return rows[:limit], len(rows) > limit


def _is_longer(entries: Iterator[tuple[bytes, bytes]], count: int) -> bool:
    return next(itertools.islice(entries, count, None), None) is not None


def _never(constraint: Constraint) -> bool:
    """Whether the constraint compares with NULL only, which nothing satisfies."""
    if constraint.comparison in _TAKES_NULL or constraint.comparison is Comparison.NOT_NULL:
        return False
    return all(value is None for value in constraint.values)


def _best_plans(table: TableIndexes, query: FindQuery) -> tuple[Plan, Plan | None]:
    """The plan with the fewest entries, and the best of those that give query order, if any does."""
    bound: dict[int, list[bytes]] = {}
    for constraint in query.constraints:
        if constraint.comparison in _EQUALITIES:
            values = _equal_values(constraint)
            if constraint.column not in bound or len(values) < len(bound[constraint.column]):
                bound[constraint.column] = values
    ranges: dict[int, list[Constraint]] = {}
    for constraint in query.constraints:
        if constraint.comparison in _LOWER or constraint.comparison in _UPPER:
            ranges.setdefault(constraint.column, []).append(constraint)
    ways = []
    for index in (table.primary, *table.others):
        run = _equality_run(index, bound)
        ranged = run < len(index.columns) and index.columns[run] in ranges
        ways.append(_Way(index, run, ranged, *_order_given(index, run, bound, table.primary.columns, query)))

    def plan(way: _Way) -> Plan:
        return Plan(_stretches(way.index, way.run, bound, ranges), way.ordered, way.merged)

    best = max(ways, key=_Way.score)
    in_order = max((way for way in ways if way.ordered or way.merged), key=_Way.score, default=best)
    return plan(best), None if in_order is best else plan(in_order)


def _equal_values(constraint: Constraint) -> list[bytes]:
    """The encoded values, each once, in order."""
    if constraint.comparison is Comparison.IS_NULL:
        return [encode_value(None)]
    return sorted({encode_value(value): None for value in constraint.values if value is not None})


def _equality_run(index: Index, bound: dict[int, list[bytes]]) -> int:
    probes = 1
    for at, column in enumerate(index.columns):
        if column not in bound:
            return at
        probes *= len(bound[column])
        if probes > _PROBES_MAX:
            return at
    return len(index.columns)


def _stretches(
    index: Index, run: int, bound: dict[int, list[bytes]], ranges: dict[int, list[Constraint]]
) -> list[tuple[bytes, bytes, int]]:
    low_end, high_end = b"", PREFIX_END
    if run < len(index.columns):
        for constraint in ranges.get(index.columns[run], ()):
            low, high = _range_ends(constraint)
            low_end, high_end = max(low_end, low), min(high_end, high)
    out = []
    for values in itertools.product(*[bound[column] for column in index.columns[:run]]):
        probe = index.prefix + b"".join(values)
        out.append((probe + low_end, probe + high_end, len(probe)))
    return out


def _range_ends(constraint: Constraint) -> tuple[bytes, bytes]:
    """[low, high) of the bytes that follow the probe. A complete value is followed by a byte below PREFIX_END."""
    if constraint.comparison is Comparison.NOT_NULL:
        return _ABOVE_NULL, PREFIX_END
    value = encode_value(constraint.values[0])
    match constraint.comparison:
        case Comparison.LT:
            return _ABOVE_NULL, value
        case Comparison.LE:
            return _ABOVE_NULL, value + PREFIX_END
        case Comparison.GT:
            return value + PREFIX_END, PREFIX_END
        case _:
            return value, PREFIX_END


def _order_given(
    index: Index, run: int, bound: dict[int, list[bytes]], pk: tuple[int, ...], query: FindQuery
) -> tuple[bool, bool]:
    """(whether the stretches one after the other give query order, whether each of them does)."""
    wanted = query.order.columns if query.order is not None else ()
    if not pk:
        # Without a spec there is index 0 alone, and it gives the primary key's order by itself.
        return not wanted, not wanted
    fixed = [column for column, values in bound.items() if len(values) == 1]
    sequence = _without((*_before_key(wanted, pk), *pk), fixed)
    given = _without((*index.columns, *pk), fixed)
    inside = _without(given, index.columns[:run])
    return given[: len(sequence)] == sequence, inside[: len(sequence)] == sequence


def _before_key(wanted: tuple[int, ...], pk: tuple[int, ...]) -> tuple[int, ...]:
    """The order's columns up to where it has the whole primary key: what comes behind is left to `_in_order`."""
    counts = range(len(wanted) + 1)
    return wanted[: next((count for count in counts if set(pk) <= set(wanted[:count])), len(wanted))]


def _without(columns: Sequence[int], removed: Sequence[int]) -> list[int]:
    return [column for column in dict.fromkeys(columns) if column not in removed]


def _entries(disk: Disk, plan: Plan, descending: bool) -> Iterator[tuple[bytes, bytes]]:
    stretches = plan.stretches[::-1] if descending else plan.stretches
    if plan.ordered or not plan.merged or len(stretches) == 1:
        for low, high, _ in stretches:
            if low < high:
                yield from scan(disk, Space.INDEX, low, high, reverse=descending)
        return
    streams = [_stream(disk, stretch, descending) for stretch in stretches]
    for _, entry, value in heapq.merge(*streams, reverse=descending):
        yield entry, value


def _first_entries(entries: Iterator[tuple[bytes, bytes]], count: int) -> Iterator[tuple[bytes, bytes]]:
    """So many, and those behind them of the last one's primary key, which `_in_order` sorts together."""
    last = None
    for number, (entry, value) in enumerate(entries, 1):
        if number > count and split_tail(entry, value)[0] != last:
            return
        if number == count:
            last, _ = split_tail(entry, value)
        yield entry, value


def _stream(disk: Disk, stretch: tuple[bytes, bytes, int], descending: bool) -> Iterator[tuple[bytes, bytes, bytes]]:
    low, high, cut = stretch
    if low < high:
        for entry, value in scan(disk, Space.INDEX, low, high, reverse=descending):
            yield entry[cut:], entry, value


def _matches(
    entries: Iterable[tuple[bytes, bytes]],
    indexes: Indexes,
    known: TableIndexes,
    query: FindQuery,
    tablets: frozenset[int] | None,
) -> Iterator[Match]:
    table = table_prefix(query.table)
    tests = [_test(constraint) for constraint in query.constraints]
    keyed = any(constraint.column in known.primary.columns for constraint in query.constraints)
    for entry, value in entries:
        if tablets is not None and ENTRY.unpack(value)[0] not in tablets:
            continue
        pk, group = split_tail(entry, value)
        data = indexes.row_of_entry(group, table + pk)
        if tests:
            row = decode_row(data)
            if keyed:
                row = with_key(row, known.primary.columns, pk)
            if not all(accepts(row.get(column)) for column, accepts in tests):
                continue
        yield group, table + pk, data


def _in_order(rows: Iterator[Match], query: FindQuery, pk: tuple[int, ...]) -> Iterator[Match]:
    """Rows that come in the order of the columns up to the primary key, in the whole query order.

    Only rows of one primary key, in several groups, may change places.
    """
    wanted = query.order.columns if query.order is not None else ()
    if len(_before_key(wanted, pk)) == len(wanted):
        yield from rows
        return
    place, descending = row_order(query, pk), query.order is not None and query.order.descending
    for _, same in itertools.groupby(rows, key=lambda match: match[1]):
        yield from sorted(same, key=place, reverse=descending)


def with_key(row: Row, columns: tuple[int, ...], pk: bytes) -> Row:
    """The row with its primary key's columns, should it not carry them itself."""
    if all(column in row for column in columns):
        return row
    return dict(zip(columns, decode_values(pk), strict=False)) | row


def _first_rows(rows: Iterator[Match], count: int, pk: tuple[int, ...], query: FindQuery) -> list[Match]:
    """The first so many in query order; of all others, a table's worth perhaps, none is kept."""
    order = query.order.columns if query.order is not None else ()
    cut = len(table_prefix(query.table))

    def place(match: Match) -> tuple[bytes, bytes, bytes]:
        group, rowkey, data = match
        if not order:
            return b"", rowkey, group
        row = with_key(decode_row(data), pk, rowkey[cut:])
        return b"".join([encode_value(row.get(column)) for column in order]), rowkey, group

    first = heapq.nlargest if query.order is not None and query.order.descending else heapq.nsmallest
    return first(count, rows, key=place)


def _rank(value: Value) -> int:
    if isinstance(value, str):
        return 1
    return 2 if isinstance(value, bytes) else 0


def _test(constraint: Constraint) -> Test:
    """The constraint as a predicate on its column's value."""
    column = constraint.column
    match constraint.comparison:
        case Comparison.IS_NULL:
            return column, lambda value: value is None
        case Comparison.NOT_NULL:
            return column, lambda value: value is not None
        case Comparison.EQ | Comparison.IN:
            wanted = frozenset(value for value in constraint.values if value is not None)
            return column, lambda value: value in wanted
        case Comparison.NE:
            other = constraint.values[0]
            return column, lambda value: value is not None and value != other
        case Comparison.IS_NOT:
            other = constraint.values[0]
            return column, lambda value: value != other
        case Comparison.EQ_OR_NULL:
            other = constraint.values[0]
            return column, lambda value: value is None or value == other
        case _:
            return column, _range_test(constraint)


def _range_test(constraint: Constraint) -> Callable[[Value], bool]:
    bound = constraint.values[0]
    rank = _rank(bound)
    sign = {
        Comparison.LT: (-1, -1),
        Comparison.LE: (-1, 0),
        Comparison.GT: (1, 1),
        Comparison.GE: (1, 0),
    }[constraint.comparison]

    def accepts(value: Value) -> bool:
        if value is None:
            return False
        own = _rank(value)
        if own != rank:
            return (own > rank) == (sign[0] > 0)
        if value == bound:
            return sign[1] == 0
        return (value > bound) == (sign[0] > 0)  # type: ignore[operator]

    return accepts


def row_test(query: FindQuery, pk: tuple[int, ...]) -> Callable[[RowKey, bytes], bool]:
    """Whether a row of the query's table, from wherever it was read, matches the query's constraints."""
    tests = [_test(constraint) for constraint in query.constraints]
    cut = len(table_prefix(query.table))

    def matches(key: RowKey, data: bytes) -> bool:
        row = with_key(decode_row(data), pk, key[cut:])
        return all(accepts(row.get(column)) for column, accepts in tests)

    return matches


def row_order(query: FindQuery, pk: tuple[int, ...]) -> Callable[[Match], bytes]:
    """A row's place in query order, as bytes that sort (descending queries reverse it)."""
    columns = query.order.columns if query.order is not None else ()
    cut = len(table_prefix(query.table))

    def place(match: Match) -> bytes:
        group, rowkey, data = match
        row = with_key(decode_row(data), pk, rowkey[cut:]) if columns else {}
        return b"".join([encode_value(row.get(column)) for column in columns]) + rowkey + group

    return place
