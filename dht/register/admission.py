"""What may enter the store at all: well-formed transactions and queries, checked once, where they come in."""

from __future__ import annotations

from collections.abc import Iterable

from dht.errors import Invalid
from dht.limits import TRANSACTION_BYTES_MAX
from dht.model import Columns, Comparison, FindQuery, Op, Part, Transaction
from dht.register.messages import Operation
from dht.rows import check_value, encode_value


def check_transaction(transaction: Transaction) -> None:
    """Raise Invalid if the transaction is not well formed: types, sizes, names. Done once, where it enters."""
    if len(transaction.id) != 16:
        raise Invalid(f"a transaction's id has 16 bytes, not {len(transaction.id)}")
    if not transaction.database:
        raise Invalid("a transaction names its database")
    if not transaction.parts:
        raise Invalid("a transaction has at least one part")
    prefix = encode_value(transaction.database)
    keys = {part.key for part in transaction.parts}
    if len(keys) != len(transaction.parts):
        raise Invalid("a transaction names each group once; merge the parts of the same group")
    size = 0
    for part in transaction.parts:
        if not part.key.startswith(prefix):
            raise Invalid(f"group {part.key.hex()} is not of database {transaction.database!r}")
        size += len(part.key) + _check_part(part)
    if size > TRANSACTION_BYTES_MAX:
        raise Invalid(
            f"the transaction has {size} bytes, at most {TRANSACTION_BYTES_MAX} are allowed; commit it in pieces"
        )


def check_operation(operation: Operation) -> None:
    """Raise Invalid for a step that no transaction has: a peer hands it over, and what it is told it does."""
    if len(operation.id) != 16:
        raise Invalid(f"a transaction's id has 16 bytes, not {len(operation.id)}")
    _check_part(operation.part)


_FAILURES = ("conflict", "duplicate", "foreign_key")


def _check_part(part: Part) -> int:
    size = 0
    for change in part.changes:
        if change.table < 0:
            raise Invalid(f"table {change.table} is the store's own")
        if change.op == Op.INSERT and change.guards:
            raise Invalid("an INSERT has no column guards, its row is absent")
        size += _check_values(change.pk) + _check_columns(change.columns) + _check_columns(change.guards)
    for guard in part.guards:
        if guard.table < 0:
            raise Invalid(f"table {guard.table} is the store's own")
        if guard.fails_as not in _FAILURES:
            raise Invalid(f"a guard fails as one of {', '.join(_FAILURES)}, not as {guard.fails_as!r}")
        size += _check_values(guard.pk) + _check_columns(guard.columns)
    return size


def _check_columns(columns: Columns) -> int:
    return 3 * len(columns) + _check_values(columns.values())


def _check_values(values: Iterable[object]) -> int:
    """Bytes of the values, about; raises Invalid for what is not a value."""
    size = 0
    for value in values:
        if type(value) is str:
            # ASCII is the common case and free to recognise; other text needs its encoded length.
            size += len(value) if value.isascii() else len(value.encode("utf-8", "surrogatepass"))
        elif type(value) is bytes:
            size += len(value)
        elif value is None:
            size += 9
        else:
            check_value(value)
            size += 9
    return size


_NO_VALUE = (Comparison.IS_NULL, Comparison.NOT_NULL)


def check_query(query: FindQuery) -> None:
    """Raise Invalid if the query is not well formed."""
    if query.table < 1:
        raise Invalid(f"table {query.table} is the store's own and is not searched")
    if query.limit is not None and query.limit < 0:
        raise Invalid(f"a limit of {query.limit} rows makes no sense")
    for constraint in query.constraints:
        count = len(constraint.values)
        wanted = 0 if constraint.comparison in _NO_VALUE else 1
        if constraint.comparison != Comparison.IN and count != wanted:
            raise Invalid(
                f"{constraint.comparison.name} of column {constraint.column} takes {wanted} values, not {count}"
            )
        for value in constraint.values:
            check_value(value)
