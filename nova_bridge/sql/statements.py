"""What kind of statement a text is; SQLite's own parser does all the rest."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from typing import NamedTuple

import apsw

READS = frozenset({"SELECT", "VALUES", "EXPLAIN"})
WRITES = frozenset({"INSERT", "UPDATE", "DELETE", "REPLACE"})

_WORDS = re.compile(r"\s*(?:--[^\n]*(?:\n|$)\s*|/\*.*?\*/\s*)*([A-Za-z]+)", re.S)
_SCHEMA_QUERY = re.compile(r"\bsqlite_(?:temp_)?(?:master|schema)\b|\bpragma_\w+", re.I)
_SAVEPOINT_NAME = re.compile(
    r"\s*(?:SAVEPOINT|RELEASE(?:\s+SAVEPOINT)?|ROLLBACK(?:\s+TRANSACTION)?\s+TO(?:\s+SAVEPOINT)?)\s+"
    r'(?:"([^"]+)"|`([^`]+)`|\[([^\]]+)\]|(\w+))\s*;?\s*$',
    re.I,
)
_PLAIN_END = re.compile(r"\s*[A-Z]+(?:\s+TRANSACTION)?[\s;]*$", re.I)
_PRAGMA = re.compile(r"\s*PRAGMA\s+(?:[\"\w]+\s*\.\s*)?(\w+)\s*(?:[=(]\s*['\"]?([\w.-]+))?", re.I)

_NAME = r"(?:\"(?:[^\"]|\"\")+\"|`[^`]+`|\[[^\]]+\]|\w+)"
_LISTED = rf"(?:{_NAME}|'(?:[^']|'')+')"
_INSERT = re.compile(
    rf"\s*(?:INSERT(?:\s+OR\s+\w+)?|REPLACE)\s+INTO\s+(?:{_LISTED}\s*\.\s*)?{_LISTED}\s*(?:\bAS\s+{_NAME}\s*)?"
    rf"(?:(DEFAULT\s+VALUES)|\(\s*({_LISTED}(?:\s*,\s*{_LISTED})*)\s*\))?",
    re.I | re.S,
)


_CONFLICT_CLAUSE = re.compile(
    r"\s*(?:--[^\n]*(?:\n|$)\s*|/\*.*?\*/\s*)*(?:REPLACE|(?:INSERT|UPDATE)\s+OR\s+(?!ABORT\b)\w+)\b", re.I | re.S
)


_QUOTED = r"'(?:[^']|'')*'|\"(?:[^\"]|\"\")*\"|`[^`]*`|\[[^\]]*\]|--[^\n]*|/\*.*?(?:\*/|\Z)"
_QUOTES = re.compile(_QUOTED, re.S)
_TRIGGER = re.compile(r"\s*CREATE\s+(?:TEMP(?:ORARY)?\s+)?TRIGGER\b", re.I)
_TOKENS = re.compile(
    _QUOTED + r"|[()]|\b(?:SELECT|VALUES|INSERT|UPDATE|DELETE|REPLACE)\b",
    re.I | re.S,
)
_RETURNING = re.compile(_QUOTED + r"|\bRETURNING\b", re.I | re.S)
_RETURNED = re.compile(rf"\s*(?:{_NAME}\s*\.\s*)?({_NAME})(?:\s+AS\s+({_NAME}))?\s*(,|;?\s*$)", re.I)


_LIMIT = re.compile(r"\bLIMIT\s+(\?|\d+)(?:\s+OFFSET\s+(\?|\d+))?\s*;?\s*$", re.I)
_ALL_ROWS = re.compile(r"\b(?:GROUP\s+BY|DISTINCT|UNION|INTERSECT|EXCEPT|OVER)\b", re.I)


@functools.lru_cache(maxsize=2048)
def _limit(sql: str) -> tuple[str, str] | None:
    """LIMIT and OFFSET at the end of a SELECT that may leave its rows when it has enough."""
    match = _LIMIT.search(sql)
    return None if match is None or _ALL_ROWS.search(sql) else (match.group(1), match.group(2) or "0")


def rows_wanted(sql: str, parameters: object) -> int | None:
    """How many rows the statement goes through at the least if there are so many; None if that is not known."""
    found = _limit(sql)
    if found is None or not isinstance(parameters, (tuple, list)):
        return None
    given = list(parameters)
    numbers = [given.pop() if given and word == "?" else word for word in reversed(found)]
    try:
        wanted = sum(map(int, numbers))
    except (TypeError, ValueError):
        return None
    return wanted if wanted >= 0 else None


def bare(sql: str) -> str:
    """The text without comments, in place of which there are spaces."""
    if "--" not in sql and "/*" not in sql:
        return sql
    return _QUOTES.sub(lambda match: " " if match.group().startswith(("--", "/*")) else match.group(), sql)


def is_empty(sql: str) -> bool:
    """Whether there is nothing to run but comments."""
    return not bare(sql).strip("; \t\r\n")


def is_several(sql: str) -> bool:
    """Whether it is more than one statement. A trigger, which is refused by itself, has some in its body."""
    if ";" not in sql or _TRIGGER.match(bare(sql)):
        return False
    return sum(not is_empty(statement) for statement in split(sql)) > 1


class Returned(NamedTuple):
    """A column in a RETURNING clause, lower case, and what the answer calls it."""

    column: str
    called: str


def cut_returning(sql: str) -> tuple[str, tuple[Returned, ...] | None]:
    """A change without its RETURNING clause, for which a virtual table would give NULLs, and the clause's columns.

    None: it has no such clause. Empty: it asks for something else than columns.
    """
    at = next((match.start() for match in _RETURNING.finditer(sql) if match.group()[0] in "Rr"), None)
    if at is None:
        return sql, None
    found: list[Returned] = []
    end, following = at + len("RETURNING"), ","
    while following == ",":
        match = _RETURNED.match(sql, end)
        if match is None:
            return sql, ()
        column, called, following = match.groups()
        found.append(Returned(_unquoted(column).lower(), _unquoted(called or column)))
        end = match.end()
    return sql[:at], tuple(found)


def _unquoted(name: str) -> str:
    quote = name[0]
    if quote == "[":
        return name[1:-1]
    return name[1:-1].replace(2 * quote, quote) if quote in "\"'`" else name


def after_with(sql: str) -> str:
    """A statement that begins with WITH, from the verb on that its common table expressions are for."""
    depth = 0
    for match in _TOKENS.finditer(sql):
        token = match.group()
        if token in "()":
            depth += 1 if token == "(" else -1
        elif not depth and token[0].isalpha():
            return sql[match.start() :]
    return sql


def has_conflict_clause(sql: str) -> bool:
    """Whether the statement asks for another end of a conflict than ABORT: REPLACE, OR IGNORE, OR ROLLBACK, OR FAIL."""
    return _CONFLICT_CLAUSE.match(sql) is not None


def inserted_columns(sql: str) -> frozenset[str] | None:
    """The columns that an INSERT names, lower case; None: all. The others get their defaults.

    A virtual table sees NULL for both, an omitted column and a given NULL.
    """
    match = _INSERT.match(bare(sql))
    if match is None:
        return None
    if match.group(1):
        return frozenset()
    if match.group(2) is None:
        return None
    return frozenset(_unquoted(name).lower() for name in re.findall(_LISTED, match.group(2)))


def first_word(sql: str) -> str:
    """The verb, in upper case; empty if there is none."""
    match = _WORDS.match(sql)
    return match.group(1).upper() if match else ""


class Shape(NamedTuple):
    """What the door must know of a statement's text. `word`: its verb, the one after WITH if it begins so.

    `text`: what SQLite is to run of it. `inserted`: see `inserted_columns`. `returned`: which columns of the inserted
    rows are the answer. `refused`: what to do in place of a clause that virtual tables cannot serve.
    `several`: there is a second statement behind it.
    """

    word: str
    text: str
    asks_for_schema: bool = False
    inserted: frozenset[str] | None = None
    returned: tuple[Returned, ...] = ()
    refused: str = ""
    several: bool = False


@functools.lru_cache(maxsize=2048)
def shape(sql: str) -> Shape:
    """Read once for each text: long SELECTs come again and again."""
    word, body = first_word(sql), sql
    if word == "WITH":
        body = after_with(sql)
        word = first_word(body)
    several = is_several(sql)
    if word not in WRITES:
        return Shape(word, sql, word in READS and asks_for_schema(sql), several=several)
    text, returned = cut_returning(sql)
    refused = ""
    if has_conflict_clause(body):
        refused = (
            "a conflict ends a statement with an error here, catch it in place of OR IGNORE, OR REPLACE or REPLACE INTO"
        )
    elif returned == () or (returned and word != "INSERT"):
        refused = "read the rows by a SELECT in place of RETURNING; only an INSERT may name columns there"
    return Shape(word, text, False, inserted_columns(body), returned or (), refused, several)


def asks_for_schema(sql: str) -> bool:
    """Whether a SELECT is about the schema, which the shadow answers; a text or a comment may only speak of it."""
    if _SCHEMA_QUERY.search(sql) is None:
        return False
    code = _QUOTES.sub(lambda match: " " if match.group().startswith(("'", "--", "/*")) else match.group(), sql)
    return _SCHEMA_QUERY.search(code) is not None


def savepoint_name(sql: str) -> str | None:
    """The name in SAVEPOINT, RELEASE or ROLLBACK TO, lower case; None for any other form."""
    match = _SAVEPOINT_NAME.match(bare(sql))
    return next(g for g in match.groups() if g is not None).lower() if match else None


def is_plain_end(sql: str) -> bool:
    """Whether COMMIT, END or ROLLBACK is about the transaction as a whole."""
    return _PLAIN_END.match(bare(sql)) is not None


def pragma(sql: str) -> tuple[str, str | None]:
    """The name of a PRAGMA and its value, both lower case."""
    match = _PRAGMA.match(bare(sql))
    if match is None:
        return "", None
    name, value = match.groups()
    return name.lower(), value.lower() if value is not None else None


def split(script: str) -> Iterator[str]:
    """The statements of a script, each without its semicolon; quotes and comments are respected."""
    start = at = 0
    for match in re.finditer(_QUOTED + "|;", script, re.S):
        if match.group() == ";":
            at = match.start()
            if statement := script[start:at].strip():
                yield statement
            start = match.end()
    if statement := script[start:].strip():
        yield statement


def format_value(value: object) -> str:
    """A value as SQL text."""
    return apsw.format_sql_value(value)
