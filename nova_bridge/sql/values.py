"""Values as SQLite would store them: affinity of declared types, coercion, adaptation of Python parameters.

SQLite applies affinity neither to the arguments of a virtual table's constraints nor to the values inserted into it,
so the door does (FACTS, "SQL door").
"""

from __future__ import annotations

import datetime
import re
import sqlite3
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import apsw

from dht.model import Value

TEXT, INTEGER, REAL, NUMERIC, BLOB = "T", "I", "R", "N", "B"
DECLARED = {TEXT: "TEXT", INTEGER: "INTEGER", REAL: "REAL", NUMERIC: "NUMERIC", BLOB: ""}
EQ_OR_NULL = "lucd_eq_or_null"
"""What `c = x OR c IS NULL` is rewritten to. SQLite tells a virtual table of no OR, and of no LIMIT beside one."""
_engines = threading.local()
_NATIVE = frozenset({str, int, float, bytes, type(None)})
_NUMBER = re.compile(r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")


def affinity_of(declared: str) -> str:
    """The five rules of SQLite's documentation, in their order."""
    upper = declared.upper()
    if "INT" in upper:
        return INTEGER
    if "CHAR" in upper or "CLOB" in upper or "TEXT" in upper:
        return TEXT
    if "BLOB" in upper or not upper:
        return BLOB
    if "REAL" in upper or "FLOA" in upper or "DOUB" in upper:
        return REAL
    return NUMERIC


def eq_or_null(value: Any, other: Any) -> bool:
    """See `EQ_OR_NULL`; of numbers, for neither side gets the other's affinity here."""
    return value is None or (other is not None and bool(value == other))


def coerce(affinity: str, value: Any) -> Any:
    """The value as a column of this affinity would store it."""
    kind = type(value)
    if value is None or kind is bytes:
        return value
    if affinity == TEXT:
        if kind is str:
            return value
        return str(value) if kind is int else _text(value) if kind is float else value
    if affinity in (INTEGER, NUMERIC):
        if kind is int:
            return value
        if kind is str:
            return _number(value)
        return int(value) if kind is float and value.is_integer() and abs(value) < 2**63 else value
    if affinity == REAL:
        number = _number(value) if kind is str else value
        return float(number) if type(number) is int else number
    return value


def _text(number: float) -> str:
    """As the engine writes a real, which differs from one version of SQLite to the next: it compares with that text."""
    engine = getattr(_engines, "engine", None)
    if engine is None:
        engine = _engines.engine = apsw.Connection(":memory:")
    text: str = engine.execute("SELECT CAST(? AS TEXT)", (number,)).get
    return text


def _number(text: str) -> Value:
    """The text as a number if SQLite would read it as one, else the text itself."""
    stripped = text.strip(" \t\n\r\f\v")
    if _NUMBER.fullmatch(stripped) is None:
        return text
    try:
        number = int(stripped)
    except ValueError:
        try:
            real = float(stripped)
        except ValueError:
            return text
        return int(real) if real.is_integer() and abs(real) < 2**63 else real
    return number if -(2**63) <= number < 2**63 else float(number)


def adapt(value: Any) -> Value:
    """A parameter as SQLite takes it; what the sqlite3 module's default adapters do."""
    if type(value) in _NATIVE:
        result: Value = value
        return result
    match value:
        case bool() | int():
            return int(value)
        case datetime.datetime():
            return value.isoformat(" ")
        case datetime.date():
            return value.isoformat()
        case str():
            # The text that it is, as sqlite3 and PyMySQL take it: str() of a member of an Enum is the member's name.
            return str.__str__(value)
        case float():
            return float(value)
        case bytearray() | memoryview():
            return bytes(value)
    raise sqlite3.ProgrammingError(f"Error binding parameter: type '{type(value).__name__}' is not supported")


class Named(Mapping[str, Value]):
    """Parameters by name, adapted as they are asked for."""

    def __init__(self, given: Mapping[str, Any]) -> None:
        self._given = given

    def __getitem__(self, name: str) -> Value:
        if name not in self._given:
            raise sqlite3.ProgrammingError(f"You did not supply a value for binding parameter :{name}.")
        return adapt(self._given[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._given)

    def __len__(self) -> int:
        return len(self._given)


def adapt_all(parameters: Sequence[Any] | Mapping[str, Any]) -> Any:
    """All parameters of a statement, positional or named."""
    if isinstance(parameters, (tuple, list)):
        return parameters if _NATIVE.issuperset(map(type, parameters)) else [adapt(value) for value in parameters]
    if isinstance(parameters, Mapping):
        return Named(parameters)
    return [adapt(value) for value in parameters]


def sort_key(value: Value) -> tuple[int, Any]:
    """SQLite's order of values: NULL, numbers, text, blobs."""
    if value is None:
        return (0, 0)
    if isinstance(value, (int, float)):
        return (1, value)
    return (2, value.encode("utf-8", "surrogatepass")) if isinstance(value, str) else (3, value)
