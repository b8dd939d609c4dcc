"""Nova's own db API on several daemons at once: one admin context per daemon, each with an engine of its own."""

from __future__ import annotations

import threading
import uuid
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")
PROJECT = "project"


def open_cells(urls: Sequence[str]) -> list[Any]:
    """Contexts whose `db_connection` is an engine on each URL; the schema is synced through the first."""
    warnings.simplefilter("ignore")
    from nova import conf, context
    from nova.db import migration
    from nova.db.main import api as db

    conf.CONF([], project="nova", default_config_files=[])
    contexts = []
    for url in urls:
        admin = context.get_admin_context()
        admin.db_connection = db.create_context_manager(connection=url)
        contexts.append(admin)
    migration.db_sync(database="main", context=contexts[0])
    return contexts


def fresh(admin: Any) -> Any:
    """A context of its own for one thread: enginefacade keeps its transaction on the context."""
    from nova import context

    # With a project: NULL is never equal in a unique key, so "default" security groups of no project would multiply.
    other = context.RequestContext("user", PROJECT, is_admin=True)
    other.db_connection = admin.db_connection
    return other


def new_instance(admin: Any, **values: Any) -> str:
    """The uuid of a small instance."""
    from nova.db.main import api as db

    base = {"uuid": str(uuid.uuid4()), "project_id": PROJECT, "user_id": "user", "host": "h", "vm_state": "building"}
    return str(db.instance_create(fresh(admin), base | values)["uuid"])


def together(*calls: Callable[[], T]) -> list[T | Exception]:
    """Run the calls at the same time; each one's result or the exception it raised."""
    start = threading.Barrier(len(calls))

    def run(call: Callable[[], T]) -> T | Exception:
        start.wait()
        try:
            return call()
        except Exception as error:
            return error

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(run, calls))


def in_lanes(lanes: int, rounds: int, lane: Callable[[range], None]) -> None:
    """Divide the rounds' numbers among that many threads; raises what the first failing lane raised."""
    with ThreadPoolExecutor(lanes) as pool:
        for done in [pool.submit(lane, range(number, rounds, lanes)) for number in range(lanes)]:
            done.result()
