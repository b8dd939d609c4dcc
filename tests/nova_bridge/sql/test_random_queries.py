"""Random SELECTs as SQLAlchemy writes them, with what the dialect rewrites in them, beside stock SQLite.

Conditions of Nova's lists (`!= x OR IS NULL`, a marker's ORs) on tables and on aliases of one table, nested outer
joins, LIMIT and OFFSET beside joins, DISTINCT, groups, unions and subselects, in answers of one page and of many, also
in a transaction that has changed the tables. Then the same again, whose text SQLAlchemy and SQLite have kept, with
other values, lists and limits, NULL and values of other types among them. Rows, and the order where one was asked for,
have to be the same.
Longer: `make sql-random SEEDS=5000`.
"""

from __future__ import annotations

import datetime
import os
import random
from collections.abc import Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import orm
from sqlalchemy.sql import visitors
from sqlalchemy.sql.selectable import _OffsetLimitParam

from nova_bridge.sql import dbapi, pages
from tests.nova_bridge.sql.conftest import small_frames

SEEDS = int(os.environ.get("LUCD_SQL_SEEDS", "12"))
QUERIES = 60
RUNS_AGAIN = 2
ROWS = 24

Base = orm.declarative_base()


class Instance(Base):
    __tablename__ = "instances"
    __table_args__ = (sa.Index("instances_host", "host", "made"), sa.Index("instances_made", "made", "id"))
    id = sa.Column(sa.Integer, primary_key=True)
    uuid = sa.Column(sa.String(36), nullable=False, unique=True)
    host = sa.Column(sa.String(255))
    size = sa.Column(sa.Integer)
    load = sa.Column(sa.Float)
    hidden = sa.Column(sa.Boolean)
    made = sa.Column(sa.DateTime)


class Metadata(Base):
    """Of its instance's group."""

    __tablename__ = "instance_metadata"
    id = sa.Column(sa.Integer, primary_key=True)
    instance_uuid = sa.Column(sa.String(36), sa.ForeignKey("instances.uuid"))
    host = sa.Column(sa.String(255))
    size = sa.Column(sa.Integer)
    hidden = sa.Column(sa.Boolean)


class Migration(Base):
    """Of a group of its own."""

    __tablename__ = "migrations"
    id = sa.Column(sa.Integer, primary_key=True)
    instance_uuid = sa.Column(sa.String(36), sa.ForeignKey("instances.uuid"))
    host = sa.Column(sa.String(255), index=True)
    size = sa.Column(sa.Integer)
    made = sa.Column(sa.DateTime)


TABLES = (Instance, Metadata, Migration)
LINKS = {Instance: "uuid", Metadata: "instance_uuid", Migration: "instance_uuid"}
MADE = datetime.datetime.fromisoformat("2026-01-01")
COLUMNS = ("id", "host", "size", "load", "hidden", "made")


class Queries:
    """Queries over few values, so that they meet."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def value(self, name: str) -> Any:
        chance = self.random
        match name:
            case "id":
                return chance.randint(1, ROWS)
            case "size":
                return chance.choice([0, 1, 1, 2, 3])
            case "load":
                return chance.choice([0.0, 0.5, 1.0, 2.5])
            case "hidden":
                return chance.choice([0, 1])
            case "made":
                return MADE + datetime.timedelta(chance.randint(1, 4))
            case "host":
                return chance.choice(["a", "b", "A", "", "1", "01"])
        return f"u{chance.randint(1, ROWS)}"

    def row(self, table: Any, number: int) -> dict[str, Any]:
        """A new row of the table."""
        chance = self.random
        values = {
            name: None if chance.random() < 0.25 else self.value(name) for name in COLUMNS if hasattr(table, name)
        }
        return {**values, "id": number, LINKS[table]: f"u{number}" if table is Instance else self.value("uuid")}

    def change(self) -> sa.Executable:
        """A statement that changes some row."""
        chance, table = self.random, self.random.choice(TABLES)
        match chance.randint(0, 2):
            case 0:
                return sa.insert(table).values(self.row(table, chance.randint(ROWS + 1, 10_000)))
            case 1:
                name = self.name(table)
                value = None if chance.random() < 0.2 else self.value(name)
                # Of a key no second row gets the value.
                column = name if name != "id" else "host"
                return sa.update(table).where(self.condition([table])).values({column: value if name != "id" else "c"})
        return sa.delete(table).where(table.id == self.value("id"))

    def name(self, table: Any) -> str:
        return self.random.choice([name for name in COLUMNS if hasattr(table, name)])

    def literal(self, name: str) -> Any:
        """Now and then of another type than the column."""
        return self.random.choice([1, "1", 2.0, "b"]) if self.random.random() < 0.1 else self.value(name)

    def with_null(self, tables: list[Any]) -> Any:
        """What the dialect writes as one comparison, or what only looks like it."""
        chance, table = self.random, self.random.choice(tables)
        name = self.name(table)
        column = getattr(table, name)
        if name == "hidden":
            value = chance.choice([sa.true(), sa.false(), True, False])
        else:
            value = True if chance.random() < 0.1 else self.literal(name)
        other, same = chance.choice(tables), name
        if chance.random() < 0.2:
            same = self.name(other)
        null = getattr(other if hasattr(other, same) and chance.random() < 0.5 else table, same, column).is_(None)
        compared = column != value if chance.random() < 0.6 else column == value
        return sa.or_(*chance.sample([compared, null], 2))

    def behind(self, tables: list[Any]) -> Any:
        """What oslo.db asks for behind a marker, or nearly so."""
        chance, table = self.random, self.random.choice(tables)
        name, second, third = self.name(table), self.name(table), self.name(table)
        first, above = self.literal(name), chance.random() < 0.5
        again = first if chance.random() < 0.8 else self.literal(name)
        other = chance.choice(tables)
        same = getattr(other if hasattr(other, name) and chance.random() < 0.3 else table, name)

        def beyond(column: str) -> Any:
            value, of = self.literal(column), getattr(table, column)
            return of > value if above else of < value

        outer = getattr(table, name)
        parts = [outer > first if above else outer < first, sa.and_(same == again, beyond(second))]
        if chance.random() < 0.4:
            parts.append(sa.and_(same == again, getattr(table, second) == self.literal(second), beyond(third)))
        return sa.or_(*parts)

    def condition(self, tables: list[Any], depth: int = 0) -> Any:
        chance, table = self.random, self.random.choice(tables)
        name = self.name(table)
        column = getattr(table, name)
        match chance.randint(0, 11 if depth < 2 else 7):
            case 0 | 1:
                return self.with_null(tables)
            case 2:
                return self.behind(tables)
            case 3:
                return column.in_([self.value(name) for _ in range(chance.randint(0, 3))])
            case 4:
                return column.is_distinct_from(self.literal(name))
            case 5:
                other = chance.choice(tables)
                wanted = getattr(other, name, column)
                return chance.choice([column == wanted, column != wanted, column.is_distinct_from(wanted)])
            case 6:
                return column.is_(None) if chance.random() < 0.5 else column.is_not(None)
            case 7:
                value = self.literal(name)
                return chance.choice([column == value, column != value, column < value, column >= value])
            case 8:
                inner = orm.aliased(chance.choice(TABLES))
                link = getattr(inner, LINKS[inner.__mapper__.class_] if hasattr(inner, "__mapper__") else "id")
                found = sa.exists().where(link == self.link(table), self.condition([inner], depth + 1))
                return found if chance.random() < 0.6 else sa.not_(found)
            case 9:
                return sa.not_(self.condition(tables, depth + 1))
        parts = [self.condition(tables, depth + 1) for _ in range(chance.randint(2, 3))]
        return sa.and_(*parts) if chance.random() < 0.5 else sa.or_(*parts)

    @staticmethod
    def link(table: Any) -> Any:
        return getattr(table, "uuid" if hasattr(table, "uuid") else "instance_uuid")

    def joined(self) -> tuple[list[Any], Any]:
        """Tables, and these joined."""
        chance = self.random
        first = Instance if chance.random() < 0.7 else orm.aliased(chance.choice(TABLES))
        tables, source = [first], first
        for _ in range(chance.choice([0, 0, 1, 1, 2])):
            table = orm.aliased(chance.choice(TABLES))
            on = self.link(chance.choice(tables)) == self.link(table)
            outer = chance.random() < 0.6
            if chance.random() < 0.25:
                inner = orm.aliased(chance.choice(TABLES))
                right = orm.join(table, inner, self.link(inner) == self.link(table))
                source, tables = orm.join(source, right, on, isouter=outer), [*tables, table, inner]
                continue
            if chance.random() < 0.4:
                on = sa.and_(on, self.condition([*tables, table] if chance.random() < 0.5 else [table], 1))
            source, tables = orm.join(source, table, on, isouter=outer), [*tables, table]
        return tables, source

    def query(self) -> tuple[Any, bool]:
        """A query, and whether it asks for an order."""
        chance = self.random
        tables, source = self.joined()
        ids = [table.id for table in tables]
        condition = self.condition(tables)
        match chance.randint(0, 9):
            case 0:
                column = getattr(tables[0], self.name(tables[0]))
                grouped = sa.select(column, sa.func.count(), sa.func.sum(ids[-1])).select_from(source)
                return grouped.where(condition).group_by(column).having(sa.func.count() > chance.randint(0, 1)), False
            case 1:
                column = getattr(tables[-1], self.name(tables[-1]))
                distinct = sa.select(column).select_from(source).where(condition).distinct().order_by(column)
                return distinct.limit(chance.randint(1, 4)).offset(chance.randint(0, 2)), True
            case 2:
                both = [sa.select(t.id).where(self.condition([t])) for t in (Instance, chance.choice(TABLES))]
                union = chance.choice([sa.union, sa.union_all, sa.except_, sa.intersect])(*both)
                return union.order_by("id").limit(chance.randint(1, 8)), True
            case 3:
                inner = sa.select(Instance.uuid).where(self.condition([Instance])).order_by(Instance.made, Instance.id)
                picked = inner.limit(chance.randint(0, 6)).subquery()
                source = orm.join(source, picked, self.link(tables[0]) == picked.c.uuid, isouter=chance.random() < 0.5)
                return sa.select(*ids, picked.c.uuid).select_from(source).where(condition), False
        query = sa.select(*ids).select_from(source).where(condition)
        if chance.random() < 0.2:
            return query, False
        return self.ordered(query, tables), True

    def with_other_values(self, query: Any) -> Any:
        """The same query to whoever keeps its text. Values that were the same mostly still are."""
        chance = self.random
        now: dict[str, Any] = {}
        values: dict[str, Any] = {}
        for bind in visitors.iterate(query):
            if not isinstance(bind, sa.BindParameter):
                continue
            if isinstance(bind, _OffsetLimitParam):
                values[bind.key] = chance.randint(-1, 9)
            elif bind.expanding:
                values[bind.key] = [self.of_type(bind.type) for _ in range(chance.randint(0, 3))]
            else:
                other = now.setdefault(f"{bind.type!r} {bind.value!r}", self.of_type(bind.type))
                values[bind.key] = other if chance.random() < 0.7 else self.of_type(bind.type)
        return query.params(values)

    def of_type(self, kind: Any) -> Any:
        """A value that SQLAlchemy takes for one of this type, or NULL."""
        chance = self.random
        if chance.random() < 0.25:
            return None
        match kind:
            case sa.Boolean():
                return self.value("hidden")
            case sa.DateTime():
                return self.value("made")
            case sa.Float():
                return self.value("load") if chance.random() < 0.9 else float("nan")
            case sa.Integer():
                return chance.choice(
                    [self.value("id"), self.value("size"), self.value("size"), "1", "10", 2.5, "b", b"1"]
                )
        return chance.choice([self.value("host"), self.value("host"), self.value("uuid"), 1, 10, 2.5, b"a"])

    def ordered(self, query: Any, tables: list[Any]) -> Any:
        chance = self.random
        order = []
        for _ in range(chance.choice([0, 1, 1, 2])):
            table = tables[0] if chance.random() < 0.8 else chance.choice(tables)
            order.append(getattr(table, self.name(table)))
        order += [table.id for table in tables]
        down = chance.random() < 0.5
        mixed = chance.random() < 0.15
        order = [c.desc() if (chance.random() < 0.5 if mixed else down) else c for c in order]
        query = query.order_by(*order)
        if chance.random() < 0.8:
            query = query.limit(chance.randint(0, 9))
            if chance.random() < 0.4:
                query = query.offset(chance.randint(0, 6))
        return query


@pytest.fixture
def engines(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[sa.Engine]]:
    name = request.node.name
    made = [sa.create_engine("sqlite://"), sa.create_engine(f"lucd+memory:///{name}")]
    yield made
    for engine in made:
        engine.dispose()
    dbapi.forget_memory(name)


@pytest.mark.parametrize("seed", range(SEEDS))
def test_random_queries_same_as_stock_sqlite(
    seed: int, engines: list[sa.Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    queries = Queries(seed)
    chance = queries.random
    rows = [(table, [queries.row(table, n) for n in range(1, ROWS + 1)]) for table in TABLES]
    for engine in engines:
        Base.metadata.create_all(engine)
        with engine.begin() as connection:
            for table, values in rows:
                connection.execute(sa.insert(table), values)
    monkeypatch.setattr(pages, "SLACK_ROWS", chance.choice([0, 1, 16]))
    monkeypatch.setattr(pages, "PAGE_GROWTH", chance.choice([1, 2, 8]))
    stock, door = (engine.connect() for engine in engines)
    if seed % 3 == 0:
        small_frames(door.connection.dbapi_connection.database.store, chance.choice([3, 7]))
    for step in range(QUERIES):
        if chance.random() < 0.1:
            changed = queries.change()
            assert door.execute(changed).rowcount == stock.execute(changed).rowcount
        if chance.random() < 0.1:
            end = chance.choice([sa.Connection.commit, sa.Connection.rollback])
            end(stock), end(door)
        query, ordered = queries.query()
        for run in range(1 + RUNS_AGAIN):
            expected, got = stock.execute(query).all(), door.execute(query).all()
            if not ordered:
                expected, got = sorted(expected, key=repr), sorted(got, key=repr)
            assert got == expected, f"step {step}, run {run}: {query.compile(door)} {query.compile(door).params}"
            query = queries.with_other_values(query)
    stock.close()
    door.close()
