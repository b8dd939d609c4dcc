"""What the comparison of Nova's suites rests on."""

from __future__ import annotations

import pytest

pytest.importorskip("oslo_db")

from oslo_db.sqlalchemy import engines
from sqlalchemy import inspect
from sqlalchemy.dialects import registry

from dht.register.memory import MemoryStore
from nova_bridge.sql.dbapi import memory_database
from tests.nova_suites import door, run

pytestmark = pytest.mark.nova
PASSED, FAILED = {"outcome": "passed", "text": ""}, {"outcome": "failed", "text": "Traceback\n  at\nOops: no\n"}


def test_engine_on_a_server_keeps_its_connections_and_is_empty_after_dispose(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door, "SOCKET", "a daemon's")
    monkeypatch.setattr(door, "_make", lambda name: memory_database(MemoryStore()))
    registry.register("sqlite.suite", door.__name__, "SqliteByLucd")
    engine = engines.create_engine("sqlite+suite://")
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE hosts (id INTEGER PRIMARY KEY)")
    with engine.connect() as connection:
        driver = connection.connection.driver_connection
    with engine.connect() as connection:
        assert connection.connection.driver_connection is driver
    assert inspect(engine).get_table_names() == ["hosts"]
    engine.dispose()
    assert inspect(engine).get_table_names() == []
    engine.dispose()


def test_differences_of_a_whole_run_test_that_did_not_run_is_one() -> None:
    assert run.differences({"a": PASSED, "b": PASSED}, {"a": PASSED}) == [
        "b: passed on stock SQLite, not run on the door: "
    ]


def test_differences_of_a_run_that_was_cut_off_only_what_both_ran_counts() -> None:
    assert run.differences({"a": PASSED, "b": PASSED, "c": PASSED}, {"a": FAILED, "b": PASSED}, cut_off=True) == [
        "a: passed on stock SQLite, failed on the door: Traceback; Oops: no"
    ]
