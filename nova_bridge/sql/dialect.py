"""SQLAlchemy dialects: `lucd:///NAME?socket=/path&timeout=10` and `lucd+memory:///NAME` (DESIGN section 11).

Both are SQLAlchemy's SQLite dialect under its own name, so that the SQLite branches of oslo.db, alembic and Nova run.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple

from sqlalchemy import pool
from sqlalchemy.dialects.sqlite.base import SQLiteCompiler, SQLiteExecutionContext
from sqlalchemy.dialects.sqlite.pysqlite import SQLiteDialect_pysqlite
from sqlalchemy.engine import URL
from sqlalchemy.sql import elements, functions, operators, selectable, sqltypes
from sqlalchemy.sql.compiler import InsertmanyvaluesSentinelOpts

from nova_bridge.sql import dbapi, filters, regexp, rerun
from nova_bridge.sql.errors import UnavailableError
from nova_bridge.sql.values import EQ_OR_NULL

_OPTIONS = {"socket": str, "timeout": float}
_NUMBERS = (sqltypes.Boolean, sqltypes.Integer, sqltypes.Numeric)


class Assumption(NamedTuple):
    """What a rewriting takes for granted of values: none is NULL, and all are of these kinds, if any is named."""

    values: tuple[elements.BindParameter[Any], ...]
    kinds: tuple[type, ...] = ()

    def holds(self, values: Sequence[Any]) -> bool:
        """Whether it does of what is bound for `values`."""
        return not any(_is_null(value) or (self.kinds and not isinstance(value, self.kinds)) for value in values)


class LucdCompiler(SQLiteCompiler):
    """Rewrites what SQLite would answer by reading all rows.

    `x LEFT JOIN (a JOIN b ON ab) ON xa` would be materialised with nothing pushed down. `x LEFT JOIN a ON xa AND
    EXISTS (SELECT 1 FROM b WHERE ab) LEFT JOIN b ON ab` is equivalent, if xa does not speak of b, and ab holds of no b
    where a is missing.

    Of `c != x OR c IS NULL` and `c = x OR c IS NULL` a virtual table is told nothing, nor of a LIMIT beside them; Nova
    says both in every list of servers. `c IS NOT x` is the first, a function that the planner knows the second.

    `a < x OR a = y AND b < z OR ...` is what oslo.db asks for behind a marker, x and y being the same. It implies that
    `a <= max(x, y, ...)`, which is added: an index may begin there.

    SQLAlchemy keeps the text and runs it with other values, NULL among them. So what is rewritten depends on nothing
    but what the text is kept by, and what it takes for granted of the values is looked at each time (`LucdContext`).
    """

    rewrites = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.assumptions: list[Assumption] = []
        super().__init__(*args, **kwargs)

    def visit_expression_clauselist(self, clauselist: Any, **kwargs: Any) -> Any:
        """See the class. Values that become part of the text are not looked at any more: nothing is rewritten then."""
        plain = super().visit_expression_clauselist
        if not self.rewrites or kwargs.get("literal_binds"):
            return plain(clauselist, **kwargs)
        rewritten, assumption = _with_null(clauselist)
        if rewritten is not None:
            self._assume(assumption)
            return rewritten._compiler_dispatch(self, **kwargs)
        implied, assumption = _implied_range(clauselist)
        if implied is None:
            return plain(clauselist, **kwargs)
        self._assume(assumption)
        return f"{implied._compiler_dispatch(self, **kwargs)} AND ({plain(clauselist, **kwargs)})"

    def _assume(self, assumption: Assumption | None) -> None:
        if assumption is not None:
            self.assumptions.append(assumption)

    def fits(
        self, parameters: Sequence[Mapping[str, Any]], extracted: Sequence[elements.BindParameter[Any]] | None
    ) -> bool:
        """Whether the assumptions hold of what is bound now."""
        if not self.assumptions:
            return True
        runs = [
            self.construct_params(one, extracted_parameters=extracted, escape_names=False, _check=False)
            for one in parameters or [{}]
        ]
        return all(a.holds([self._bound(v, run) for v in a.values]) for run in runs for a in self.assumptions)

    def _bound(self, value: elements.BindParameter[Any], run: Mapping[str, Any]) -> Any:
        """The value as the driver gets it; None for one that is not there."""
        name = self.bind_names.get(value, "")
        processor, given = self._bind_processors.get(name), run.get(name)
        return processor(given) if callable(processor) else given

    @functools.cached_property
    def unrewritten(self) -> LucdCompiler:
        """The same statement for values of which the assumptions do not hold."""
        return PlainCompiler(
            self.dialect,
            self.statement,
            cache_key=self.cache_key,
            column_keys=self.column_keys,
            for_executemany=self.for_executemany,
            schema_translate_map=self.schema_translate_map,
        )

    def visit_join(self, join: Any, asfrom: bool = False, from_linter: Any = None, **kwargs: Any) -> Any:
        """See the class."""
        right = join.right.element if isinstance(join.right, selectable.FromGrouping) else join.right
        nested = (selectable.Join, selectable.FromGrouping)
        if (
            not join.isouter
            or join.full
            or not isinstance(right, selectable.Join)
            or right.isouter
            or isinstance(right.left, nested)
            or isinstance(right.right, nested)
            or right.right in join.onclause._from_objects
            or not _needs_both(right.onclause, right.left, right.right)
        ):
            return super().visit_join(join, asfrom=asfrom, from_linter=from_linter, **kwargs)

        def table(element: Any) -> Any:
            return element._compiler_dispatch(self, asfrom=True, from_linter=None, **kwargs)

        def condition(element: Any) -> Any:
            return element._compiler_dispatch(self, from_linter=None, **kwargs)

        return (
            f"{table(join.left)} LEFT OUTER JOIN {table(right.left)} ON {condition(join.onclause)}"
            f" AND EXISTS (SELECT 1 FROM {table(right.right)} WHERE {condition(right.onclause)})"
            f" LEFT OUTER JOIN {table(right.right)} ON {condition(right.onclause)}"
        )


class PlainCompiler(LucdCompiler):
    """Without what depends on values."""

    rewrites = False


class LucdContext(SQLiteExecutionContext):
    """One execution: of the text as it was rewritten, if its assumptions hold of the values."""

    @classmethod
    def _init_compiled(
        cls,
        dialect: Any,
        connection: Any,
        dbapi_connection: Any,
        execution_options: Any,
        compiled: Any,
        parameters: Any,
        invoked_statement: Any,
        extracted_parameters: Any,
        **kwargs: Any,
    ) -> Any:
        if isinstance(compiled, LucdCompiler) and not compiled.fits(parameters, extracted_parameters):
            compiled = compiled.unrewritten
        return super()._init_compiled(
            dialect,
            connection,
            dbapi_connection,
            execution_options,
            compiled,
            parameters,
            invoked_statement,
            extracted_parameters,
            **kwargs,
        )


_Rewriting = tuple[Any, Assumption | None]


def _with_null(disjunction: Any) -> _Rewriting:
    """`c != x OR c IS NULL` or `c = x OR c IS NULL` as one comparison; None for anything else.

    x is a value, which is assumed not to be NULL, and of an equation a truth value, and c a number: a function's
    arguments get no column's affinity.
    """
    nothing: _Rewriting = None, None
    if disjunction.operator is not operators.or_ or len(disjunction.clauses) != 2:
        return nothing
    compared, null = sorted(disjunction.clauses, key=lambda clause: getattr(clause, "operator", None) is operators.is_)
    if not (isinstance(compared, elements.BinaryExpression) and isinstance(null, elements.BinaryExpression)):
        return nothing
    column, value = compared.left, compared.right
    if (
        null.operator is not operators.is_
        or not isinstance(null.right, elements.Null)
        or not isinstance(column, elements.ColumnClause)
        or not _is_same(column, null.left)
    ):
        return nothing
    truth = isinstance(value, (elements.True_, elements.False_))
    if compared.operator is operators.eq and truth and issubclass(column.type._type_affinity, _NUMBERS):
        return functions.Function(EQ_OR_NULL, column, value), None
    if compared.operator is operators.ne and (truth or _is_value(value)):
        return column.is_distinct_from(value), None if truth else Assumption((value,))
    return nothing


def _is_same(column: elements.ColumnClause[Any], other: Any) -> bool:
    """Whether it is the same column of the same table: to `compare`, two unnamed aliases of a table are the same."""
    return column.compare(other) and hash(column.table) == hash(other.table)


def _is_null(value: Any) -> bool:
    """SQLite binds NaN as NULL."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def _is_value(value: Any) -> bool:
    return isinstance(value, elements.BindParameter) and not value.expanding


def _implied_range(disjunction: Any) -> _Rewriting:
    """See the compiler's last rewriting; None for any other condition. The values differ from one run to the next.

    They are assumed to be of the column's kind: of values of several SQLite's max takes the text, whatever it would be
    as a number, and of NULL and others NULL.
    """
    nothing: _Rewriting = None, None
    if disjunction.operator is not operators.or_ or len(disjunction.clauses) < 2:
        return nothing
    bounds = [_first_of_conjunction(clause) for clause in disjunction.clauses]
    outer = bounds[0]
    if not all(
        isinstance(bound, elements.BinaryExpression)
        and isinstance(bound.left, elements.ColumnClause)
        and _is_value(bound.right)
        and bound.right.type._type_affinity is bound.left.type._type_affinity
        and (bound is outer or bound.operator is operators.eq)
        and _is_same(bound.left, outer.left)
        for bound in bounds
    ):
        return nothing
    values = tuple([bound.right for bound in bounds])
    number = issubclass(outer.left.type._type_affinity, _NUMBERS)
    assumption = Assumption(values, (int, float) if number else (str,))
    if outer.operator is operators.lt:
        return outer.left <= functions.Function("max", *values, type_=outer.left.type), assumption
    if outer.operator is operators.gt:
        return outer.left >= functions.Function("min", *values, type_=outer.left.type), assumption
    return nothing


def _first_of_conjunction(clause: Any) -> Any:
    """What must hold for the clause to hold; the clause itself if it is no conjunction."""
    inner = clause.element if isinstance(clause, elements.Grouping) else clause
    conjunction = isinstance(inner, elements.BooleanClauseList) and inner.operator is operators.and_
    return next(iter(inner.clauses)) if conjunction else inner


def _needs_both(condition: Any, left: Any, right: Any) -> bool:
    """Whether the condition has an equation of a column of each, which a missing row never fulfils."""
    conjunction = isinstance(condition, elements.BooleanClauseList) and condition.operator is operators.and_
    return any(
        isinstance(part, elements.BinaryExpression)
        and part.operator is operators.eq
        and all(isinstance(side, elements.ColumnClause) for side in (part.left, part.right))
        and {*part.left._from_objects, *part.right._from_objects} == {left, right}
        for part in (condition.clauses if conjunction else [condition])
    )


class _Dialect(SQLiteDialect_pysqlite):
    """What both have in common. Virtual tables refuse UPSERT, and RETURNING but for the columns of an INSERT.

    With that the rows of one table that a session inserts are one statement.
    """

    statement_compiler = LucdCompiler
    execution_ctx_cls = LucdContext
    supports_statement_cache = True
    insert_returning = True
    update_returning = False
    delete_returning = False
    use_insertmanyvalues = True
    use_insertmanyvalues_wo_returning = False
    insertmanyvalues_implicit_sentinel = InsertmanyvaluesSentinelOpts.ANY_AUTOINCREMENT
    supports_multivalues_insert = True

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._returning_of_inserts()
        filters.install()

    @classmethod
    def engine_created(cls, engine: Any) -> None:
        """SQLAlchemy calls it for each new engine: by then the application's functions are defined."""
        rerun.install()
        regexp.install()

    def _returning_of_inserts(self) -> None:
        self.insert_returning, self.update_returning, self.delete_returning = True, False, False

    def initialize(self, connection: Any) -> None:
        """The base class turns RETURNING on by SQLite's version."""
        super().initialize(connection)
        self._returning_of_inserts()

    @classmethod
    def import_dbapi(cls) -> ModuleType:
        """Our own driver."""
        return dbapi

    def is_disconnect(self, e: Any, connection: Any, cursor: Any) -> bool:
        """The daemon is away; the next connection may find it."""
        return isinstance(e, UnavailableError)

    def do_ping(self, dbapi_connection: Any) -> bool:
        """A connection is of this process and holds none to the daemon, so there is nobody to ask for it."""
        return True

    def do_begin(self, dbapi_connection: Any) -> None:
        """Reads are part of the transaction too, from the first on; oslo.db does that for `sqlite` URLs only.

        AUTOCOMMIT, for which the isolation level is None, has no transaction that somebody would commit.
        """
        if not dbapi_connection.in_transaction and dbapi_connection.isolation_level is not None:
            dbapi_connection.begin()

    def on_connect(self) -> Any:
        """REGEXP, as oslo.db and SQLAlchemy give it to SQLite."""

        def add_regexp(connection: Any) -> None:
            connection.create_function("regexp", 2, regexp.regexp, deterministic=True)

        return add_regexp


class LucdDialect(_Dialect):
    """A database in the cluster, through the daemon of this host."""

    driver = "lucd"
    supports_statement_cache = True

    @classmethod
    def get_pool_class(cls, url: URL) -> type[pool.Pool]:
        """Connections are cheap, but each has a prepared-statement cache worth keeping."""
        return pool.QueuePool

    def connect(self, *args: Any, **kwargs: Any) -> Any:
        """Through the daemon's socket."""
        kwargs.pop("check_same_thread", None)
        return dbapi.connect(*args, **kwargs)

    def create_connect_args(self, url: URL) -> tuple[list[Any], dict[str, Any]]:
        """Raises ValueError for a URL without a database name or with an option that does not exist."""
        if not url.database:
            raise ValueError(f"{url!r} names no database; write lucd:///nova_cell1")
        options = {}
        for name, value in url.query.items():
            kind = _OPTIONS.get(name)
            if kind is None or not isinstance(value, str):
                known = ", ".join(_OPTIONS)
                raise ValueError(f"unknown option {name!r} in {url!r}; there are: {known}")
            options[name] = kind(value)
        return [url.database.strip("/")], options


class LucdMemoryDialect(_Dialect):
    """A database in this process; without a name, one per connection, as SQLite's :memory:."""

    driver = "memory"
    supports_statement_cache = True

    @classmethod
    def get_pool_class(cls, url: URL) -> type[pool.Pool]:
        """One connection per thread for a private database, as SQLAlchemy does for SQLite's :memory:."""
        return pool.QueuePool if cls._is_url_file_db(url) else pool.SingletonThreadPool

    def connect(self, *args: Any, **kwargs: Any) -> Any:
        """In this process."""
        return dbapi.connect_memory(*args, **kwargs)
