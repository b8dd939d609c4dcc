"""URLs, oslo.db's exceptions, the rewritten join and conditions, calls per statement."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import sqlalchemy as sa
from oslo_db import api, exception
from oslo_db.sqlalchemy import engines
from sqlalchemy import orm

from nova_bridge.sql import dbapi
from nova_bridge.sql.errors import ConflictError, IndeterminateError, UnavailableError

Base = orm.declarative_base()


class Group(Base):
    __tablename__ = "groups"
    id = sa.Column(sa.Integer, primary_key=True)
    name = sa.Column(sa.String(20), unique=True, nullable=False)


class Member(Base):
    __tablename__ = "members"
    id = sa.Column(sa.Integer, primary_key=True)
    owner = sa.Column(sa.String(20))
    group_id = sa.Column(sa.Integer, sa.ForeignKey("groups.id"))


class Server(Base):
    __tablename__ = "servers"
    id = sa.Column(sa.Integer, primary_key=True)
    state = sa.Column(sa.String(20))
    hidden = sa.Column(sa.Boolean)
    made = sa.Column(sa.DateTime)


MADE = datetime.datetime.fromisoformat("2026-01-02")


@pytest.fixture
def engine(request: pytest.FixtureRequest) -> Iterator[sa.Engine]:
    name = request.node.name
    engine = engines.create_engine(f"lucd+memory:///{name}")
    Base.metadata.create_all(engine)
    yield engine
    engine.dispose()
    dbapi.forget_memory(name)


def test_oslo_duplicate_has_columns(engine: sa.Engine) -> None:
    with orm.Session(engine) as session, session.begin():
        session.add(Group(name="a"))
    with orm.Session(engine) as session:
        session.add(Group(name="a"))
        with pytest.raises(exception.DBDuplicateEntry) as caught:
            session.flush()
    assert caught.value.columns == ["name"]


def test_oslo_reference_error_has_names(engine: sa.Engine) -> None:
    with engine.connect() as connection:
        connection.execute(sa.text("PRAGMA foreign_keys=ON"))
        connection.connection.dbapi_connection.writer.foreign_keys = True
        with pytest.raises(exception.DBReferenceError) as caught:
            connection.execute(sa.insert(Member).values(group_id=77))
    assert (caught.value.table, caught.value.key, caught.value.key_table) == ("members", "group_id", "groups")
    assert caught.value.constraint


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (ConflictError("transaction conflict: lost"), exception.DBDeadlock),
        (UnavailableError("store unavailable: no quorum"), exception.DBConnectionError),
        (IndeterminateError("outcome unknown: no reply"), exception.DBError),
    ],
)
def test_oslo_exception_of_a_failed_commit(
    engine: sa.Engine, monkeypatch: pytest.MonkeyPatch, raised: Exception, expected: type[Exception]
) -> None:
    def fail(self: object) -> None:
        raise raised

    session = orm.Session(engine)
    session.add(Group(name="x"))
    session.flush()
    monkeypatch.setattr(dbapi.Connection, "commit", fail)
    with pytest.raises(exception.DBError) as caught:
        session.commit()
    assert type(caught.value) is expected
    monkeypatch.undo()
    session.close()


def test_oslo_duplicate_met_by_the_commit_is_a_duplicate_and_runs_again(engine: sa.Engine) -> None:
    attempts: list[None] = []

    @api.wrap_db_retry(retry_interval=0, max_retries=3, retry_on_deadlock=True)
    def ensure() -> str:
        attempts.append(None)
        with orm.Session(engine) as session, session.begin():
            if session.query(Group).filter_by(name="default").count():
                return "found"
            session.add(Group(name="default"))
            session.flush()
            if len(attempts) == 1:
                with orm.Session(engine) as other, other.begin():
                    other.add(Group(name="default"))
        return "made"

    assert ensure() == "found"
    assert len(attempts) == 2
    late, early = orm.Session(engine), orm.Session(engine)
    for session in (late, early):
        session.add(Group(name="x"))
        session.flush()
    early.commit()
    with pytest.raises(exception.DBDuplicateEntry) as caught:
        late.commit()
    assert caught.value.columns == ["name"]
    assert isinstance(caught.value, exception.DBDeadlock)
    for session in (late, early):
        session.close()


def test_nested_outer_join_same_rows_as_without(engine: sa.Engine) -> None:
    with orm.Session(engine) as session, session.begin():
        session.add_all([Group(id=1, name="a"), Member(owner="o", group_id=1), Member(owner="p", group_id=None)])
        session.flush()
        right = sa.join(Member, Group, Member.group_id == Group.id)
        anchor = sa.select(sa.literal("o").label("owner")).union_all(sa.select(sa.literal("p"))).subquery()
        query = sa.select(anchor.c.owner, Group.name).select_from(
            sa.outerjoin(anchor, right, Member.owner == anchor.c.owner)
        )
        assert "EXISTS" in str(query.compile(engine))
        assert sorted(session.execute(query).fetchall(), key=str) == [("o", "a"), ("p", None)]


@pytest.mark.parametrize("case", ["outer condition of the second table", "inner condition of one table", "no column"])
def test_nested_outer_join_that_cannot_be_taken_apart_same_rows_as_stock_sqlite(engine: sa.Engine, case: str) -> None:
    anchor = sa.table("anchor", sa.column("id"), sa.column("group_id"))
    matched, tied = anchor.c.group_id == Member.group_id, Member.group_id == Group.id
    match case:
        case "outer condition of the second table":
            matched = anchor.c.group_id == Group.id
        case "inner condition of one table":
            tied = Group.name == "a"
        case _:
            tied = sa.func.coalesce(Member.group_id, Group.id) == Group.id
    query = sa.select(anchor.c.id, Member.owner, Group.name).select_from(
        sa.outerjoin(anchor, sa.join(Member, Group, tied), matched)
    )
    stock = sa.create_engine("sqlite://")
    answers = []
    for each in (stock, engine):
        Base.metadata.create_all(each)
        with each.begin() as connection:
            connection.execute(sa.text("CREATE TABLE anchor (id INTEGER PRIMARY KEY, group_id INTEGER)"))
            connection.execute(sa.text("INSERT INTO anchor VALUES (1, 1), (2, 2), (3, NULL)"))
            connection.execute(sa.insert(Group).values([{"id": 1, "name": "a"}, {"id": 2, "name": "b"}]))
            connection.execute(sa.insert(Member).values([{"owner": "o", "group_id": 1}]))
            answers.append(sorted(connection.execute(query).fetchall(), key=str))
    stock.dispose()
    assert answers[0] == answers[1]


@pytest.mark.parametrize(
    ("condition", "written"),
    [
        (sa.or_(Server.state != "gone", Server.state == sa.null()), "servers.state IS NOT ?"),
        (sa.or_(Server.state.is_(None), Server.state != "gone"), "servers.state IS NOT ?"),
        (sa.or_(Server.hidden == sa.false(), Server.hidden == sa.null()), "lucd_eq_or_null(servers.hidden, 0)"),
        (sa.or_(Server.hidden != sa.true(), Server.hidden == sa.null()), "servers.hidden IS NOT 1"),
        (
            sa.or_(Server.made < MADE, sa.and_(Server.made == MADE, Server.id < 4)),
            "servers.made <= max(?, ?) AND (servers.made < ? OR servers.made = ? AND servers.id < ?)",
        ),
        (
            sa.or_(Server.id > 6, sa.and_(Server.id == 2, Server.state == "gone"), Server.id == 4),
            "servers.id >= min(?, ?, ?) AND (servers.id > ?",
        ),
        (sa.not_(sa.or_(Server.made < MADE, sa.and_(Server.made == MADE, Server.id < 4))), "NOT (servers.made <= max("),
        (sa.or_(Server.state != "gone", Server.made == sa.null()), "servers.state != ? OR servers.made IS NULL"),
        (sa.or_(Server.state == "gone", Server.state == sa.null()), "servers.state = ? OR servers.state IS NULL"),
        (sa.or_(Server.id < 4, Server.made == MADE), "servers.id < ? OR servers.made = ?"),
        (sa.or_(Server.id < 4, sa.and_(Server.state == "gone", Server.id == 7)), "servers.id < ? OR servers.state = ?"),
        (sa.or_(Server.id < 4, Server.id > 6), "servers.id < ? OR servers.id > ?"),
    ],
)
def test_condition_that_is_rewritten_or_not_same_rows_as_stock_sqlite(
    engine: sa.Engine, condition: sa.ColumnElement[bool], written: str
) -> None:
    stock = sa.create_engine("sqlite://")
    answers = []
    for each in (stock, engine):
        Base.metadata.create_all(each)
        with orm.Session(each) as session, session.begin():
            for number in range(27):
                state, hidden, days = (
                    ("gone", "here", None)[number % 3],
                    (True, False, None)[number // 3 % 3],
                    number // 9,
                )
                made = None if days == 2 else MADE - datetime.timedelta(days)
                session.add(Server(id=number, state=state, hidden=hidden, made=made))
        with each.connect() as connection:
            query = sa.select(Server.id).where(condition, Server.id < 25).order_by(Server.made, Server.id)
            answers.append(
                [connection.execute(q).fetchall() for q in (query, query.limit(3), query.limit(5).offset(4))]
            )
    stock.dispose()
    assert answers[0] == answers[1]
    assert written in str(query.compile(engine))


ONE, OTHER = orm.aliased(Server), orm.aliased(Server)


@pytest.mark.parametrize(
    ("condition", "written"),
    [
        (sa.or_(ONE.state != "gone", OTHER.state == sa.null()), "servers_1.state != ? OR servers_2.state IS NULL"),
        (sa.or_(ONE.hidden == sa.false(), OTHER.hidden == sa.null()), "servers_1.hidden = 0 OR servers_2.hidden IS"),
        (sa.or_(ONE.id < 2, sa.and_(OTHER.id == 2, ONE.id > 3)), "servers_1.id < ? OR servers_2.id = ?"),
        (sa.or_(ONE.state != "gone", ONE.state == sa.null()), "servers_1.state IS NOT ?"),
    ],
)
def test_condition_on_two_aliases_of_a_table_is_not_written_as_one_on_one(
    engine: sa.Engine, condition: sa.ColumnElement[bool], written: str
) -> None:
    pairs = orm.join(ONE, OTHER, ONE.id != OTHER.id)
    query = sa.select(ONE.id, OTHER.id).select_from(pairs).where(condition).order_by(ONE.id, OTHER.id)
    stock = sa.create_engine("sqlite://")
    answers = []
    for each in (stock, engine):
        Base.metadata.create_all(each)
        with orm.Session(each) as session, session.begin():
            for number in range(1, 6):
                state, hidden = ("gone", "here", None)[number % 3], (True, False, None)[number // 2 % 3]
                session.add(Server(id=number, state=state, hidden=hidden))
        with each.connect() as connection:
            answers.append(connection.execute(query).fetchall())
    stock.dispose()
    assert answers[0] == answers[1]
    assert written in str(query.compile(engine))


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        (sa.or_(Server.state == sa.true(), Server.state == sa.null()), [1, 4]),
        (sa.or_(Server.state < sa.literal(9), sa.and_(Server.state == "10", Server.id == 3)), [1, 3, 10]),
        (sa.or_(Server.id < 10, sa.and_(Server.id == sa.literal("2"), Server.state == "5")), [1, 3, 4]),
    ],
)
def test_condition_with_a_value_of_another_type_than_the_column_same_rows_as_stock_sqlite(
    engine: sa.Engine, condition: sa.ColumnElement[bool], expected: list[int]
) -> None:
    stock = sa.create_engine("sqlite://")
    for each in (stock, engine):
        Base.metadata.create_all(each)
        with orm.Session(each) as session, session.begin():
            session.add_all([Server(id=n, state=state) for n, state in ((1, "1"), (3, "10"), (4, None), (10, "5"))])
        with each.connect() as connection:
            query = sa.select(Server.id).where(condition).order_by(Server.id)
            assert connection.execute(query).scalars().all() == expected, each
    stock.dispose()


State, Number, Moment = Server.state.type, Server.id.type, Server.made.type


def _not(x: Any) -> sa.ColumnElement[bool]:
    return sa.or_(Server.state != sa.literal(x, State), Server.state == sa.null())


def _not_named(x: Any) -> sa.ColumnElement[bool]:
    return sa.or_(Server.state == sa.null(), Server.state != sa.bindparam("named", x, State))


def _below(x: Any, y: Any) -> sa.ColumnElement[bool]:
    return sa.or_(
        Server.id < sa.literal(x, Number), sa.and_(Server.id == sa.literal(y, Number), Server.state == "gone")
    )


def _not_below(x: Any, y: Any) -> sa.ColumnElement[bool]:
    return sa.not_(_below(x, y))


def _above(x: Any, y: Any) -> sa.ColumnElement[bool]:
    return sa.or_(Server.state > sa.literal(x, State), sa.and_(Server.state == sa.literal(y, State), Server.id > 2))


def _before(x: Any, y: Any) -> sa.ColumnElement[bool]:
    return sa.or_(Server.made < sa.literal(x, Moment), sa.and_(Server.made == sa.literal(y, Moment), Server.id > 2))


@pytest.mark.parametrize(
    ("condition", "written", "runs"),
    [
        (_not, "servers.state IS NOT ?", [["gone"], [None], [7], ["7"], [None], ["gone"]]),
        (_not, "servers.state IS NOT ?", [[None], ["gone"], [float("nan")]]),
        (_not_named, "servers.state IS NOT ?", [["gone"], [None], ["here"]]),
        (
            _below,
            "servers.id <= max(?, ?)",
            [[3, 12], [None, 12], [3, None], [None, None], [12, "3"], ["3", 9], [5, 6]],
        ),
        (_below, "servers.id <= max(?, ?)", [[None, 12], [12.5, 15], ["9", "12"], [float("nan"), 12], [2**62, 3]]),
        (_not_below, "NOT (servers.id <= max(?, ?)", [[3, 12], [None, 12], [12, "3"], [3, None]]),
        (_above, "servers.state >= min(?, ?)", [["here", "gone"], [None, "gone"], [8, "gone"], ["8", 7], ["8", b"8"]]),
        (_before, "servers.made <= max(?, ?)", [[MADE, MADE], [None, MADE], [MADE, None], [MADE, MADE.max]]),
    ],
    ids=["not", "not null", "named", "below", "below kinds", "not below", "above", "before"],
)
def test_rewritten_condition_run_again_with_values_of_other_kinds_same_rows_as_stock_sqlite(
    engine: sa.Engine, condition: Callable[..., sa.ColumnElement[bool]], written: str, runs: list[Sequence[Any]]
) -> None:
    stock = sa.create_engine("sqlite://")
    for each in (stock, engine):
        Base.metadata.create_all(each)
        with orm.Session(each) as session, session.begin():
            for number in range(1, 16):
                state = ("gone", "here", None, "7", "8")[number % 5]
                made = (MADE, None, MADE - datetime.timedelta(1))[number % 3]
                session.add(Server(id=number, state=state, made=made))
    with stock.connect() as one, engine.connect() as other:
        for values in runs:
            query = sa.select(Server.id).where(condition(*values)).order_by(Server.id)
            for asked in (query, query.limit(2), sa.select(Server).where(condition(*values)).order_by(Server.id)):
                assert other.execute(asked).fetchall() == one.execute(asked).fetchall(), values
    assert written in str(query.compile(engine))
    stock.dispose()


def test_rewritten_condition_of_many_runs_at_once_of_which_one_is_of_null_same_rows_as_stock_sqlite(
    engine: sa.Engine,
) -> None:
    stock = sa.create_engine("sqlite://")
    changed = sa.update(Server).where(sa.or_(Server.state != sa.bindparam("x"), Server.state == sa.null()))
    runs: list[dict[str, Any]] = [{"x": "gone"}, {"x": None}, {"x": "here"}]
    left = []
    for each in (stock, engine):
        Base.metadata.create_all(each)
        with each.begin() as connection:
            states = ["gone", "here", None, "gone"]
            connection.execute(sa.insert(Server), [{"id": n, "state": state} for n, state in enumerate(states)])
            for some in (runs[:1], runs, runs[1:2], runs):
                connection.execute(changed.values(state=sa.func.coalesce(Server.state, "") + "."), some)
                left.append(connection.execute(sa.select(Server.id, Server.state).order_by(Server.id)).fetchall())
    stock.dispose()
    assert left[:4] == left[4:]


def test_savepoints_of_the_orm(engine: sa.Engine) -> None:
    with orm.Session(engine) as session, session.begin():
        session.add(Group(name="kept"))
        savepoint = session.begin_nested()
        session.add(Group(name="kept"))
        with pytest.raises(exception.DBDuplicateEntry):
            session.flush()
        savepoint.rollback()
        session.add(Group(name="other"))
    with orm.Session(engine) as session:
        assert sorted(g.name for g in session.query(Group)) == ["kept", "other"]


def test_autocommit_keeps_what_nobody_commits(engine: sa.Engine) -> None:
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(sa.insert(Group).values(name="kept"))
    with engine.connect() as connection:
        connection.execute(sa.insert(Group).values(name="not kept"))
    with engine.connect() as connection:
        assert connection.execute(sa.select(Group.name)).fetchall() == [("kept",)]


def test_regexp_works(engine: sa.Engine) -> None:
    with engine.begin() as connection:
        connection.execute(sa.insert(Group).values([{"name": "node-1"}, {"name": "edge"}]))
        found = connection.execute(sa.select(Group.name).where(Group.name.op("REGEXP")("^node-[0-9]"))).fetchall()
    assert found == [("node-1",)]


@pytest.mark.parametrize("url", ["lucd:///?socket=/x", "lucd:///cell?port=5", "lucd:///cell?timeout=soon"])
def test_wrong_url_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match=r"names no database|unknown option|could not convert"):
        sa.create_engine(url).connect()


def test_no_daemon_is_a_connection_error() -> None:
    engine = sa.create_engine("lucd:///cell?socket=/nonexistent/s&timeout=0.2")
    with pytest.raises(sa.exc.OperationalError, match="store unavailable"):
        engine.connect()
