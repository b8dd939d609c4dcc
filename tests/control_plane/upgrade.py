"""Nova is upgraded with its instances in place: the rows are the same before and after, and the control plane is up.

    python -m tests.control_plane.upgrade --before PYTHON --instances 1000

PYTHON: the interpreter of an environment with the release before (make nova-33 makes one). Exit code 0 when nothing
was lost.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import sqlalchemy

from lucd.demo.plane.neighbours import IMAGE
from lucd.demo.plane.site import DATABASES
from tests.control_plane.stacks import LucdStack

BOOTED = 5
WAIT_S = 120.0

Rows = dict[str, list[dict[str, Any]]]


def rows_of(url: str) -> Rows:
    """All rows of all tables, by table, sorted; read by SQL, not by Nova."""
    engine = sqlalchemy.create_engine(url)
    try:
        found: Rows = {}
        with engine.connect() as connection:
            for table in sqlalchemy.inspect(connection).get_table_names():
                rows = [dict(row._mapping) for row in connection.execute(sqlalchemy.text(f"SELECT * FROM {table}"))]
                found[table] = sorted(rows, key=lambda row: json.dumps(row, default=str, sort_keys=True))
        return found
    finally:
        engine.dispose()


def lost(before: Rows, after: Rows) -> list[str]:
    """What was there and is not, or not the same. New tables and columns are what an upgrade is for."""
    problems = []
    for table, rows in before.items():
        if table.startswith("alembic_version"):
            continue
        if table not in after:
            problems.append(f"table {table} with {len(rows)} rows is gone")
            continue
        gone = set(rows[0]) - set(after[table][0]) if rows and after[table] else set()
        if gone:
            problems.append(f"table {table}: columns {sorted(gone)} are gone")
        columns = set(rows[0]) - gone if rows else set()
        was = [{name: row[name] for name in columns} for row in rows]
        left = [{name: row[name] for name in columns} for row in after[table]]
        missing = [row for row in was if row not in left] if was != left else []
        if missing or len(left) < len(was):
            problems.append(f"table {table}: {len(was)} rows before, {len(left)} after; not there: {missing[:2]}")
    return problems


def gone(before: Rows, after: Rows) -> list[str]:
    """Rows that are not there by their ids; what Nova's data migrations change in rows, and add, is its own affair."""
    return [
        f"table {table}: rows {sorted(missing)[:5]} went away with the data migrations"
        for table, rows in before.items()
        if rows and "id" in rows[0] and (missing := {row["id"] for row in rows} - {row["id"] for row in after[table]})
    ]


def fill(python: str, url: str, instances: int) -> None:
    """Instances by the older release's own nova.db.api."""
    worker = subprocess.Popen(
        [python, "-W", "ignore", "-m", "tests.bench.child", "sql", url],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    out, _ = worker.communicate(json.dumps({"fill": instances}) + "\n", timeout=1200)
    if f'"filled": {instances}' not in out:
        raise RuntimeError(f"filling broke off: {out}")


def run(python: str, instances: int) -> list[str]:
    """Returns what went wrong."""
    path = Path(tempfile.mkdtemp(prefix="cp-upgrade-"))
    stack = LucdStack(path, computes=2)
    plane, api = stack.plane, stack.plane.api()
    problems: list[str] = []
    try:
        stack.start()
        plane.use(python)
        plane.install()
        plane.start()
        flavor = api.make_flavor("small", 1, 64, 0)
        servers = [api.boot(f"vm-{number}", flavor, IMAGE) for number in range(BOOTED)]
        for server in servers:
            api.wait(server, "ACTIVE", WAIT_S)
        plane.stop()
        fill(python, stack.daemons.url("nova_cell1"), instances)
        (cell,) = [
            row["uuid"]
            for row in rows_of(stack.daemons.url("nova_api"))["cell_mappings"]
            if "nova_cell1" in row["database_connection"]
        ]
        plane.manage("cell_v2", "map_instances", "--cell_uuid", cell)
        before = {name: rows_of(stack.daemons.url(name)) for name in DATABASES}
        print(f"{len(before['nova_cell1']['instances'])} instances before the upgrade", flush=True)

        plane.use(sys.executable)
        began_s = time.monotonic()
        plane.migrate()
        print(f"schemas migrated in {time.monotonic() - began_s:.1f} s", flush=True)
        for number, (name, rows) in enumerate(before.items()):
            # Each through another daemon.
            found = lost(rows, rows_of(stack.daemons.url(name, number % 3)))
            problems += [f"{name}: {text}" for text in found]
        plane.migrate_data()
        for name, rows in before.items():
            problems += [f"{name}: {text}" for text in gone(rows, rows_of(stack.daemons.url(name)))]

        plane.start()
        listed = api.servers()
        if set(servers) - set(listed):
            problems.append(f"{len(set(servers) - set(listed))} servers are not listed after the upgrade")
        another = api.boot("after", flavor, IMAGE)
        api.wait(another, "ACTIVE", WAIT_S)
        api.act(another, "os-stop")
        api.wait(another, "SHUTOFF", WAIT_S)
        # The fake driver forgets its guests when nova-compute ends, so of the old ones only the records can be asked.
        api.act(servers[0], "lock")
        for server in servers:
            api.delete(server)
        print(f"the control plane is up again and lists {len(listed)} servers", flush=True)
        return problems + plane.problems()
    finally:
        stack.stop()
        if problems:
            print(f"logs are in {path}", flush=True)


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", required=True, metavar="PYTHON")
    parser.add_argument("--instances", type=int, default=1000)
    options = parser.parse_args()
    problems = run(options.before, options.instances)
    for problem in problems:
        print(f"FAILED: {problem}", flush=True)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
