"""Nova's databases for tests: stock SQLite files, and a worker that serves a database over a pipe."""

import json
import os
import shutil
import subprocess
import threading
import warnings

from workers import ENVIRONMENT, HERE

os.environ["OS_NOVA_DISABLE_EVENTLET_PATCHING"] = "true"
with warnings.catch_warnings():
    # Nova and its libraries warn about their own use of each other.
    warnings.simplefilter("ignore")
    from nova import conf as conf_of_nova
    from nova import config, objects
    from nova import context as context_of_nova
    from nova.db import migration
    from nova.db.api import api as api_db
    from nova.db.main import api as main_db
    from oslo_db.sqlalchemy import enginefacade

    objects.register_all()
    from nova_bridge.rpc import worker

__all__ = [
    "PipeChannel",
    "api_db",
    "conf_of_nova",
    "config",
    "context_of_nova",
    "copy_of",
    "main_db",
    "migration",
    "url_of",
    "use_databases",
]


def url_of(folder, name):
    return f"sqlite:///{folder}/{name}.sqlite"


def use_databases(conf, folder):
    """Point this process's Nova at the two SQLite files in `folder`."""
    for module, group, name in ((main_db, "database", "main"), (api_db, "api_database", "api")):
        conf.set_override("connection", url_of(folder, name), group)
        # The manager is configured once only, and decorates functions everywhere: its content is replaced, not itself.
        module.context_manager.patch_factory(enginefacade.transaction_context())
        module.configure(conf)


def copy_of(template, folder):
    folder.mkdir()
    for name in ("main", "api"):
        shutil.copy(template / f"{name}.sqlite", folder / f"{name}.sqlite")
    return folder


class PipeChannel:
    """A channel to a worker process over its standard input and output."""

    def __init__(self, connection, api_connection):
        argv = worker.command(transport_url="none", connection=connection, api_connection=api_connection, threads=1)
        argv[1:3] = [str(HERE / "pipe_worker.py")]
        self.process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)
        self.lock = threading.Lock()
        self.methods = []
        assert self.process.stdout.readline().strip() == worker.READY

    def request(self, method, content):
        with self.lock:
            self.methods.append(method)
            self.process.stdin.write(json.dumps({"method": method, "content": content}) + "\n")
            self.process.stdin.flush()
            return json.loads(self.process.stdout.readline())

    def close(self):
        self.process.stdin.close()
        self.process.wait(timeout=20)
        self.process.stdout.close()
