"""Puts the SQL door in SQLite's place, so that Nova's own suites, unedited, run on it."""

from __future__ import annotations

import sys

from sqlalchemy.dialects import registry, sqlite

from nova_bridge.sql.dialect import LucdMemoryDialect


class SqliteByLucd(LucdMemoryDialect):
    """Answers `sqlite://`; the driver's name stays, Nova's fixtures ask for it."""

    driver = "pysqlite"
    supports_statement_cache = True


def install() -> None:
    """Every `sqlite` URL of this process opens a database of the door from now on."""
    module = sys.modules[__name__]
    sys.modules["lucd_suite_door"] = module
    registry.register("sqlite", "lucd_suite_door", "SqliteByLucd")
    registry.register("sqlite.pysqlite", "lucd_suite_door", "SqliteByLucd")
    sqlite.dialect = SqliteByLucd
