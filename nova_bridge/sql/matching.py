"""Constraints and orders of the store evaluated on rows that exist only in a transaction so far."""

from __future__ import annotations

from typing import Any

from dht.model import Comparison, Constraint, Order
from nova_bridge.sql.schema import Record, Table
from nova_bridge.sql.values import sort_key


def matches(table: Table, record: Record, constraints: tuple[Constraint, ...]) -> bool:
    """Whether the row fits all constraints, by SQL's rules for NULL."""
    return all(_fits(record.values[table.position[c.column]], c) for c in constraints)


def _fits(value: object, constraint: Constraint) -> bool:
    match constraint.comparison:
        case Comparison.IS_NULL:
            return value is None
        case Comparison.NOT_NULL:
            return value is not None
        case Comparison.IS_NOT:
            return sort_key(value) != sort_key(constraint.values[0])  # type: ignore[arg-type]
        case Comparison.EQ_OR_NULL if value is None:
            return True
    if value is None:
        return False
    left = sort_key(value)  # type: ignore[arg-type]
    if constraint.comparison is Comparison.IN:
        return any(v is not None and sort_key(v) == left for v in constraint.values)
    if constraint.values[0] is None:
        return False
    return _compares(left, constraint.comparison, sort_key(constraint.values[0]))


def _compares(left: Any, comparison: Comparison, right: Any) -> bool:
    match comparison:
        case Comparison.EQ | Comparison.EQ_OR_NULL:
            return left == right
        case Comparison.NE:
            return left != right
        case Comparison.LT:
            return left < right
        case Comparison.LE:
            return left <= right
        case Comparison.GT:
            return left > right
        case _:
            return left >= right


def order_records(table: Table, records: list[Record], order: Order | None) -> None:
    """Sort in place as the store would answer: by the order's columns, else by primary key."""
    if order is None:
        records.sort(key=lambda r: [sort_key(v) for v in r.pk])
        return
    positions = [table.position[c] for c in order.columns]
    records.sort(
        key=lambda r: [*[sort_key(r.values[p]) for p in positions], *[sort_key(v) for v in r.pk]],
        reverse=order.descending,
    )
