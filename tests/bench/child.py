"""One client process of the benchmark: Nova's own db API on one database, driven by lines of JSON on stdin.

Started as `python -m tests.bench.child KIND URL`. KIND: `sql` opens the URL by SQLAlchemy; `rpc` installs lucd's RPC
client: URL is SOCKET#SERVER. Answers one line of JSON per line.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from typing import Any


def open_nova(kind: str, url: str, sync: bool) -> tuple[Any, Any]:
    """Nova's db module and a context, on the database that the URL names."""
    warnings.simplefilter("ignore")
    from nova import conf, config, context, objects
    from nova.db import migration
    from nova.db.main import api as db

    config.parse_args(["bench"], default_config_files=[], configure_db=False, init_rpc=False)
    objects.register_all()
    if kind == "sql":
        conf.CONF.set_override("connection", url, "database")
        db.configure(conf.CONF)
        if sync:
            migration.db_sync(database="main")
    else:
        from nova_bridge.rpc import client, options

        options.register_opts(conf.CONF)
        path, _, server = url.partition("#")
        conf.CONF.set_override("socket", path, "lucd")
        conf.CONF.set_override("server", server, "lucd")
        client.install()
    return db, context.get_admin_context()


def sync_other(db: Any, url: str) -> None:
    """Make Nova's schema in another database."""
    from nova import context
    from nova.db import migration

    other = context.get_admin_context()
    other.db_connection = db.create_context_manager(connection=url)
    migration.db_sync(database="main", context=other)


def main() -> None:
    """Serve `{"sync": url}`, `{"fill": instances}` (in all) and `{"call": name, "times": n}` until stdin ends."""
    from tests.bench import calls

    kind, url = sys.argv[1:3]
    db, context = open_nova(kind, url, sync=kind == "sql")
    world: calls.World | None = None
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        if "sync" in order:
            sync_other(db, order["sync"])
            print(json.dumps({"synced": True}), flush=True)
            continue
        if "fill" in order:
            if world is None:
                world = calls.fill(db, context, order["fill"])
            calls.grow(world, order["fill"])
            print(json.dumps({"filled": len(world.instances)}), flush=True)
            continue
        assert world is not None
        operation = calls.LISTS.get(order["call"]) or calls.CALLS[order["call"]][1]
        calls.prepare(order["call"], world)
        walls = []
        cpu = time.process_time()
        for _ in range(order["times"]):
            begin = time.perf_counter()
            operation(world)
            walls.append((time.perf_counter() - begin) * 1000)
        print(json.dumps({"wall_ms": walls, "cpu_ms": (time.process_time() - cpu) * 1000}), flush=True)


if __name__ == "__main__":
    main()
