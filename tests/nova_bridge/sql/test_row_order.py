"""The order of rows that no ORDER BY asks for: that of the index by which a real table would be read."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable

import pytest

from nova_bridge.sql.connection import Connection

SCHEMA = [
    "CREATE TABLE flavors (id INTEGER NOT NULL PRIMARY KEY, name VARCHAR(255))",
    "CREATE TABLE flavor_projects (id INTEGER NOT NULL PRIMARY KEY, flavor_id INTEGER NOT NULL,"
    " project_id VARCHAR(255) NOT NULL, UNIQUE (flavor_id, project_id))",
    "CREATE TABLE instance_metadata (id INTEGER NOT NULL PRIMARY KEY, instance_uuid VARCHAR(36), key VARCHAR(255))",
    "CREATE INDEX metadata_by_key ON instance_metadata (instance_uuid, key)",
]
ROWS = [
    "INSERT INTO flavors VALUES (1, 'small'), (2, 'large')",
    "INSERT INTO flavor_projects VALUES (1, 1, 'zoe'), (2, 2, 'max'), (3, 1, 'ann'), (4, 1, 'max')",
    "INSERT INTO instance_metadata VALUES (1, 'u', 'z'), (2, 'u', 'a'), (3, 'v', 'b'), (4, 'u', 'a')",
]


@pytest.mark.parametrize(
    "question",
    [
        "SELECT project_id FROM flavors AS f LEFT JOIN flavor_projects AS p ON p.flavor_id = f.id WHERE f.id = 1",
        "SELECT id, key FROM instance_metadata WHERE instance_uuid = 'u'",
    ],
)
def test_rows_of_a_group_without_order_by_come_in_index_order(
    question: str, connect: Callable[..., Connection]
) -> None:
    door, stock = connect(), sqlite3.connect(":memory:")
    for sql in SCHEMA + ROWS:
        door.execute(sql)
        stock.execute(sql)
    assert door.execute(question).fetchall() == stock.execute(question).fetchall()
    stock.close()
