"""A worker process beside the daemon: Nova's own database functions on the SQL door, served over oslo.messaging.

The daemon starts `command(...)` some times and reads the process's standard output: the line READY means that it
serves.
SIGTERM lets the running calls finish, then the process ends with status 0.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from collections.abc import Sequence
from typing import Any

READY = "lucd-nova-db-worker ready"


def command(
    *,
    transport_url: str,
    connection: str,
    api_connection: str | None = None,
    server: str | None = None,
    threads: int = 8,
    config_files: Sequence[str] = (),
    python: str | None = None,
) -> list[str]:
    """The argv of one worker. `connection` is the cell's database, `api_connection` Nova's API database; `server` is
    the name that clients ask for, by default the host's."""
    argv = [python or sys.executable, "-m", "nova_bridge.rpc.worker"]
    argv += ["--transport-url", transport_url, "--connection", connection, "--threads", str(threads)]
    if api_connection is not None:
        argv += ["--api-connection", api_connection]
    if server is not None:
        argv += ["--server", server]
    for path in config_files:
        argv += ["--config-file", path]
    return argv


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="lucd-nova-db-worker", description="Serves nova.db.main.api over oslo.messaging."
    )
    parser.add_argument("--transport-url", required=True, help="oslo.messaging transport to listen on")
    parser.add_argument("--connection", required=True, help="SQLAlchemy URL of Nova's cell database")
    parser.add_argument("--api-connection", help="SQLAlchemy URL of Nova's API database")
    parser.add_argument("--server", help="name to listen as; default: this host's name")
    parser.add_argument("--threads", type=int, default=8, help="calls at the same time")
    parser.add_argument("--config-file", action="append", default=[], help="nova.conf; may be repeated")
    return parser.parse_args(argv)


def configure(settings: argparse.Namespace) -> Any:
    """Set Nova up in this process (its configuration, both databases, all its objects) and return its CONF."""
    os.environ["OS_NOVA_DISABLE_EVENTLET_PATCHING"] = "true"
    from nova import monkey_patch

    monkey_patch.patch(backend="threading")
    import nova.conf
    from nova import config, objects
    from nova.db.api import api as api_db
    from nova.db.main import api as main_db
    from oslo_log import log

    from nova_bridge.rpc import options
    from nova_bridge.rpc.plugin import without_plugin
    from nova_bridge.sql import rerun

    conf = nova.conf.CONF
    config.parse_args(["lucd-nova-db-worker"], default_config_files=settings.config_file, configure_db=False)
    options.register_opts(conf)
    log.setup(conf, "nova")
    objects.register_all()
    conf.set_override("connection", _text(without_plugin(settings.connection)), "database")
    main_db.configure(conf)
    if settings.api_connection is not None:
        conf.set_override("connection", _text(without_plugin(settings.api_connection)), "api_database")
        api_db.configure(conf)
    # With the first engine would be too late: what is served is catalogued before, as it is then.
    rerun.install()
    return conf


class Cells:
    """Database managers of other cells, made once each.

    A caller names a cell by the URL in its cell mapping. The way to a lucd database is always this worker's own daemon,
    so of a lucd URL only the database's name counts; a URL of another kind of database than this worker's is refused.
    """

    def __init__(self, own_connection: str) -> None:
        from sqlalchemy.engine import make_url

        self._own = make_url(own_connection)
        self._managers: dict[str, Any] = {}
        self._lock = threading.Lock()

    def __call__(self, url: str) -> Any:
        from nova.db.main import api

        reachable = self.reachable(url)
        with self._lock:
            if reachable not in self._managers:
                self._managers[reachable] = api.create_context_manager(reachable)
            return self._managers[reachable]

    def reachable(self, url: str) -> str:
        from dht.errors import Invalid
        from nova_bridge.rpc.plugin import without_plugin

        wanted = without_plugin(url)
        kind, own_kind = wanted.get_backend_name(), self._own.get_backend_name()
        if kind != own_kind:
            raise Invalid(
                f"the cell's database is of kind {kind}, this worker serves {own_kind} only; "
                "correct the cell mapping with nova-manage cell_v2 update_cell"
            )
        if own_kind == "lucd":
            wanted = self._own.set(database=wanted.database)
        return _text(wanted)


def _text(url: Any) -> str:
    """The URL with its password, which str() would hide."""
    return str(url.render_as_string(hide_password=False))


def main(argv: Sequence[str] | None = None) -> int:
    settings = parse(sys.argv[1:] if argv is None else argv)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    conf = configure(settings)
    import oslo_messaging

    from nova_bridge.rpc import options
    from nova_bridge.rpc.methods import catalogue
    from nova_bridge.rpc.server import NovaDbEndpoint, Runner, make_server, retry_soon

    transport = oslo_messaging.get_rpc_transport(conf, url=settings.transport_url)
    found = catalogue()
    retry_soon(found)
    endpoint = NovaDbEndpoint(found, Runner(Cells(conf.database.connection)))
    server = make_server(transport, settings.server or options.server_name(conf), endpoint)
    # Registered by oslo.messaging when the first server is made, read when it starts.
    conf.set_override("executor_thread_pool_size", settings.threads)
    server.start()
    print(READY, flush=True)
    stop.wait()
    server.stop()
    server.wait()
    transport.cleanup()
    return 0


if __name__ == "__main__":
    sys.exit(main())
