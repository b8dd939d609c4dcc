"""Nova's own db API on several daemons at once: one admin context per daemon, each with an engine of its own."""

from __future__ import annotations

import uuid
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")


def open_cells(urls: Sequence[str]) -> list[Any]:
    """Contexts whose `db_connection` is an engine on each URL; the schema is synced through the first."""
    warnings.simplefilter("ignore")
    from nova import conf, context
    from nova.db import migration
    from nova.db.main import api as db

    if not conf.CONF.args and not conf.CONF._namespace:
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

    other = context.get_admin_context()
    other.db_connection = admin.db_connection
    return other


def new_instance(admin: Any, **values: Any) -> str:
    """The uuid of a small instance."""
    from nova.db.main import api as db

    base = {"uuid": str(uuid.uuid4()), "project_id": "p", "user_id": "u", "host": "h", "vm_state": "building"}
    return str(db.instance_create(fresh(admin), base | values)["uuid"])


def together(*calls: Callable[[], T]) -> list[T | Exception]:
    """Run the calls at the same time; each one's result or the exception it raised."""

    def run(call: Callable[[], T]) -> T | Exception:
        try:
            return call()
        except Exception as error:
            return error

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(run, calls))
