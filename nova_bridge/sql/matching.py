"""Constraints and orders of the store evaluated on rows that exist only in a transaction so far."""

from __future__ import annotations

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
    if value is None:
        return False
    left = sort_key(value)  # type: ignore[arg-type]
    if constraint.comparison is Comparison.IN:
        return any(v is not None and sort_key(v) == left for v in constraint.values)
    if constraint.values[0] is None:
        return False
    right = sort_key(constraint.values[0])
    match constraint.comparison:
        case Comparison.EQ:
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
