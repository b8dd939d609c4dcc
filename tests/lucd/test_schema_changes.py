"""Schema statements over three real daemons, one of which is away or hears nothing."""

from __future__ import annotations

import sqlite3
import threading
from pathlib import Path

import pytest

from nova_bridge.sql.connection import Connection
from nova_bridge.sql.database import Database
from nova_bridge.sql.errors import ConflictError, UnavailableError
from tests.cluster import Cluster
from tests.laboratory import wait_until


def test_rows_that_come_while_a_unique_index_is_built_have_their_entries(tmp_path: Path) -> None:
    """Writers at each daemon, one daemon dies and comes back; then every row is found by the index, each value once."""
    with Cluster(tmp_path) as cluster:
        doors = [Connection(Database(node.store(), "cell", 20.0), None, True) for node in cluster.nodes]
        doors[0].execute("CREATE TABLE t (id INTEGER PRIMARY KEY, a TEXT, b INTEGER)")
        stop = threading.Event()
        written: list[set[str]] = [set(), set()]

        def write(number: int) -> None:
            door = Connection(Database(cluster.nodes[number].store(), "cell", 20.0), None, True)
            i = 0
            while not stop.is_set():
                i += 1
                try:
                    door.execute("INSERT INTO t (a, b) VALUES (?, ?)", (f"{number}-{i}", number))
                    written[number].add(f"{number}-{i}")
                except (ConflictError, UnavailableError):
                    continue

        threads = [threading.Thread(target=write, args=(n,)) for n in range(2)]
        for thread in threads:
            thread.start()
        wait_until(lambda: all(written), 60.0, "a writer writes nothing")
        cluster.nodes[2].kill()
        doors[0].execute("CREATE UNIQUE INDEX ua ON t (a)")
        doors[1].execute("ALTER TABLE t ADD COLUMN c TEXT DEFAULT 'c'")
        cluster.nodes[2].start()
        stop.set()
        for thread in threads:
            thread.join()
        reader = Connection(Database(cluster.nodes[2].store(), "cell", 20.0), None, True)
        for number, values in enumerate(written):
            assert values
            found = reader.execute("SELECT a FROM t WHERE b = ?", (number,)).fetchall()
            assert values <= {a for (a,) in found}
            for value in sorted(values)[:: max(1, len(values) // 20)]:
                assert reader.execute("SELECT c FROM t WHERE a = ?", (value,)).fetchall() == [("c",)]
        with pytest.raises(sqlite3.IntegrityError, match=r"UNIQUE constraint failed: t\.a"):
            reader.execute("INSERT INTO t (a) VALUES ('0-1')")
