"""Functions that lost a race run again: from the arguments that they were given, and only if that is certain."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from oslo_db import api, exception
from oslo_db.sqlalchemy import enginefacade
from sqlalchemy import orm

from nova_bridge.sql import dbapi, rerun

Base = orm.declarative_base()


class Provider(Base):
    __tablename__ = "providers"
    id = sa.Column(sa.Integer, primary_key=True)
    name = sa.Column(sa.String(20), unique=True, nullable=False)
    generation = sa.Column(sa.Integer, default=0)


class Instance(Base):
    """Of one group with what refers to it, which a commit guards (`nova_bridge/sql/families.yaml`)."""

    __tablename__ = "instances"
    id = sa.Column(sa.Integer, primary_key=True)
    uuid = sa.Column(sa.String(36), unique=True, nullable=False)


class InfoCache(Base):
    __tablename__ = "instance_info_caches"
    id = sa.Column(sa.Integer, primary_key=True)
    instance_uuid = sa.Column(sa.String(36), sa.ForeignKey("instances.uuid"))


@enginefacade.transaction_context_provider
class Context:
    """What oslo.db keeps its transaction on."""


manager = enginefacade.transaction_context()


class Meddler:
    """Does something in a transaction of its own, in the middle of the first `times` runs of another.

    The functions get its method, not itself: what they are given is put back as it was before each run.
    """

    def __init__(self, times: int = 1) -> None:
        self.times = times
        self.statement: Any = None

    def act(self) -> None:
        if self.times:
            self.times -= 1
            # Another's: a commit of this thread's own would keep the function from being run again.
            other = threading.Thread(target=self._commit)
            other.start()
            other.join()

    def _commit(self) -> None:
        with manager.writer.get_engine().begin() as connection:
            connection.execute(self.statement)


@pytest.fixture
def meddler(request: pytest.FixtureRequest) -> Iterator[Meddler]:
    name = request.node.name
    manager._factory._started = False
    manager.configure(connection=f"lucd+memory:///{name}")
    engine = manager.writer.get_engine()
    Base.metadata.create_all(engine)
    with engine.begin() as connection:
        connection.execute(sa.insert(Provider).values(id=1, name="one", generation=0))
    rerun.counters.update(rerun=0, given_up=0)
    yield Meddler()
    engine.dispose()
    dbapi.forget_memory(name)


class GoneError(Exception):
    """What an application raises for a row that is not there."""


class TakenError(Exception):
    """What an application raises for a name that is taken."""


@manager.writer
def destroy(context: Any, meddle: Callable[[], None], number: int) -> None:
    found = context.session.query(Provider).filter_by(id=number).delete()
    meddle()
    if not found:
        raise GoneError


@manager.writer
def advance(context: Any, meddle: Callable[[], None], number: int, runs: list[int]) -> None:
    provider = context.session.get(Provider, number)
    runs.append(provider.generation)
    meddle()
    provider.generation = provider.generation + 1


@manager.writer
def create(context: Any, meddle: Callable[[], None], name: str) -> None:
    context.session.add(Provider(name=name))
    try:
        context.session.flush()
    except exception.DBDuplicateEntry:
        raise TakenError from None
    meddle()


@manager.writer
def outer(context: Any, meddle: Callable[[], None], number: int, runs: list[int]) -> None:
    advance(context, meddle, number, runs)


@api.wrap_db_retry(max_retries=1, retry_on_deadlock=True)
@manager.writer
def already_retried(context: Any, meddle: Callable[[], None], number: int, runs: list[int]) -> None:
    advance(context, meddle, number, runs)


def test_delete_that_lost_a_race_meets_the_missing_row(meddler: Meddler) -> None:
    meddler.statement = sa.delete(Provider).where(Provider.id == 1)
    with pytest.raises(GoneError):
        destroy(Context(), meddler.act, 1)
    assert rerun.counters == {"rerun": 1, "given_up": 0}


def test_update_that_lost_a_race_is_made_upon_the_winners(meddler: Meddler) -> None:
    meddler.statement = sa.update(Provider).values(generation=7)
    runs: list[int] = []
    advance(Context(), meddler.act, 1, runs)
    with manager.writer.get_engine().connect() as connection:
        assert connection.execute(sa.select(Provider.generation)).scalar_one() == 8
    assert runs == [7], "the list is as it was given, with what the run that counts added"


def test_insert_that_lost_a_race_meets_the_duplicate_at_its_statement(meddler: Meddler) -> None:
    meddler.statement = sa.insert(Provider).values(id=99, name="two")
    with pytest.raises(TakenError):
        create(Context(), meddler.act, "two")


@manager.writer
def cache(context: Any, meddle: Callable[[], None], uuid: str) -> None:
    context.session.add(InfoCache(instance_uuid=uuid))
    try:
        context.session.flush()
    except exception.DBReferenceError:
        raise GoneError from None
    meddle()


def test_row_whose_parent_is_taken_away_meets_that_at_its_statement(meddler: Meddler) -> None:
    engine = manager.writer.get_engine()
    engine.dispose()
    sa.event.listen(engine, "connect", lambda connection, _: connection.execute("PRAGMA foreign_keys=ON"))
    with engine.begin() as connection:
        connection.execute(sa.insert(Instance).values(id=1, uuid="u1"))
    meddler.statement = sa.delete(Instance)
    with pytest.raises(GoneError):
        cache(Context(), meddler.act, "u1")
    assert rerun.counters == {"rerun": 1, "given_up": 0}


def test_inner_function_of_a_transaction_leaves_the_run_to_the_outermost(meddler: Meddler) -> None:
    meddler.statement = sa.update(Provider).values(generation=7)
    outer(Context(), meddler.act, 1, [])
    assert rerun.counters["rerun"] == 1


def test_function_with_a_retry_decorator_outside_does_not_need_it(meddler: Meddler) -> None:
    meddler.statement = sa.update(Provider).values(generation=Provider.generation + 10)
    meddler.times = 3
    already_retried(Context(), meddler.act, 1, [])
    assert rerun.counters == {"rerun": 3, "given_up": 0}


def test_race_lost_again_and_again_reaches_the_caller(meddler: Meddler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rerun, "RUNS_MAX", 3)
    meddler.statement = sa.update(Provider).values(generation=Provider.generation + 10)
    meddler.times = 100
    with pytest.raises(exception.DBDeadlock):
        advance(Context(), meddler.act, 1, [])
    assert rerun.counters == {"rerun": 2, "given_up": 1}


def test_transaction_with_using_has_no_function_to_run_again(meddler: Meddler) -> None:
    meddler.statement = sa.update(Provider).values(generation=7)
    with pytest.raises(exception.DBDeadlock):
        _advance_in_a_block(Context(), meddler.act)


def _advance_in_a_block(context: Any, meddle: Callable[[], None]) -> None:
    with manager.writer.using(context) as session:
        session.get(Provider, 1).generation = 5
        meddle()


def test_duplicate_of_the_statement_is_not_run_again(meddler: Meddler) -> None:
    with pytest.raises(exception.DBDuplicateEntry):
        _create_unwatched(Context(), "one")
    assert rerun.counters["rerun"] == 0


@manager.writer
def _create_unwatched(context: Any, name: str) -> None:
    context.session.add(Provider(name=name))


def test_deadlock_of_another_database_is_not_run_again() -> None:
    calls = []

    def fails() -> None:
        calls.append(1)
        raise exception.DBDeadlock(RuntimeError("of MySQL's"))

    with pytest.raises(exception.DBDeadlock):
        rerun.again(fails, rerun.Before([]))
    assert calls == [1]


def test_arguments_are_put_back_in_place() -> None:
    class Thing:
        def __init__(self) -> None:
            self.generation = 1
            self.changed = {"a"}

    thing, key = Thing(), Thing()
    arguments: list[Any] = [[thing], {"values": {"x": 1}, key: []}]
    before = rerun.Before(arguments)
    assert before.complete
    thing.generation, thing.new, key.generation = 2, 3, 4  # type: ignore[attr-defined]
    thing.changed.clear()
    del arguments[1]["values"]["x"]
    arguments[0].append(1)
    before.put_back()
    assert vars(thing) == {"generation": 1, "changed": {"a"}}
    assert key.generation == 1
    assert arguments == [[thing], {"values": {"x": 1}, key: []}]


def test_contexts_and_sessions_among_the_arguments_are_left_alone() -> None:
    context, session = Context(), orm.Session()
    context.seen = session.info["seen"] = 1  # type: ignore[attr-defined]
    before = rerun.Before([context, session])
    context.seen = session.info["seen"] = 2  # type: ignore[attr-defined]
    before.put_back()
    assert (context.seen, session.info["seen"]) == (2, 2)  # type: ignore[attr-defined]


def test_variables_of_the_function_around_are_put_back(meddler: Meddler) -> None:
    meddler.statement = sa.update(Provider).values(generation=7)
    consumer = {"generation": 0}
    runs = 0

    @manager.writer
    def update(context: Any) -> None:
        nonlocal runs
        runs += 1
        consumer["generation"] += 1
        context.session.get(Provider, 1).generation = consumer["generation"]
        meddler.act()

    update(Context())
    assert (runs, consumer) == (1, {"generation": 1}), "as if there had been one run"
    assert rerun.counters["rerun"] == 1


def test_function_that_was_given_an_iterator_is_not_run_again(meddler: Meddler) -> None:
    meddler.statement = sa.update(Provider).values(generation=7)
    with pytest.raises(exception.DBDeadlock):
        _advance_each(Context(), meddler.act, iter([1]))


@manager.writer
def _advance_each(context: Any, meddle: Callable[[], None], numbers: Iterator[int]) -> None:
    for number in numbers:
        context.session.get(Provider, number).generation += 1
        meddle()


def test_function_that_committed_something_else_meanwhile_is_not_run_again(meddler: Meddler) -> None:
    meddler.statement = sa.update(Provider).values(generation=7)
    with pytest.raises(exception.DBDeadlock):
        _create_apart_and_advance(Context(), meddler.act)
    assert rerun.counters["rerun"] == 0


@manager.writer
def _create_apart_and_advance(context: Any, meddle: Callable[[], None]) -> None:
    provider = context.session.get(Provider, 1)
    with manager.writer.independent.using(context) as session:
        session.add(Provider(name="apart"))
    provider.generation = provider.generation + 1
    meddle()


FROZEN = """
import gc
from oslo_db.sqlalchemy import enginefacade
from nova_bridge.sql import rerun

@enginefacade.transaction_context().writer
def change(context):
    pass

gc.freeze()
before, frozen = change.__code__, gc.get_freeze_count()
rerun.install()
assert before is rerun._codes["oslo_db"], "the decorator's own function"
assert change.__code__ is not before, "a function made before stays as it was"
assert gc.get_freeze_count() >= frozen
"""


def test_functions_of_a_process_that_has_frozen_its_objects_are_run_again_too() -> None:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", FROZEN], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def test_install_again_changes_nothing() -> None:
    rerun.install()
    code = destroy.__code__  # type: ignore[attr-defined]
    assert code is not rerun._codes["oslo_db"]
    rerun.install()
    assert destroy.__code__ is code  # type: ignore[attr-defined]
