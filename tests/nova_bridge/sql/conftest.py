"""Doors on one in-process store: each `Database` stands for a process of its own, with its own caches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from sqlalchemy.dialects import registry

from dht.errors import Invalid
from dht.model import FindQuery, FindResult
from dht.register.memory import MemoryStore
from nova_bridge.sql.connection import Connection
from nova_bridge.sql.database import Database

NAME = "cell"


class CountingStore(MemoryStore):
    """Counts the calls, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []
        self.questions: list[FindQuery] = []

    def find(self, query: FindQuery, timeout_s: float | None = None) -> FindResult:
        self.questions.append(query)
        return super().find(query, timeout_s)

    def __getattribute__(self, name: str) -> object:
        if name in {"read", "find", "commit", "reserve_ids", "raise_sequence"}:
            object.__getattribute__(self, "calls").append(name)
        return super().__getattribute__(name)


@pytest.fixture
def store() -> CountingStore:
    return CountingStore()


@pytest.fixture
def connect(store: CountingStore) -> Iterator[Callable[..., Connection]]:
    opened: list[Connection] = []

    def make(foreign_keys: bool = True, isolation_level: str | None = "") -> Connection:
        connection = Connection(Database(store, NAME), isolation_level, foreign_keys)
        opened.append(connection)
        return connection

    yield make
    for connection in opened:
        connection.close()


registry.register("lucd", "nova_bridge.sql.dialect", "LucdDialect")
registry.register("lucd.memory", "nova_bridge.sql.dialect", "LucdMemoryDialect")


def small_frames(store: Any, rows_max: int) -> None:
    """From now on an answer of more rows is larger than a frame."""
    find = store.find

    def small_find(query: FindQuery, timeout_s: float | None = None) -> FindResult:
        result: FindResult = find(query, timeout_s)
        if len(result.rows) > rows_max:
            raise Invalid("larger than a frame may be")
        return result

    store.find = small_find
