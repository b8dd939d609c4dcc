"""Fixtures: databases made by Nova's own migrations, workers in processes of their own, contexts."""

import json
import os
import shutil
import subprocess
import threading
import warnings
from pathlib import Path

import pytest

os.environ["OS_NOVA_DISABLE_EVENTLET_PATCHING"] = "true"
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import nova.conf
    import nova.context
    from nova import config, objects
    from nova.db import migration
    from nova.db.api import api as api_db
    from nova.db.main import api as main_db
    from oslo_db.sqlalchemy import enginefacade

    objects.register_all()
    from nova_bridge.rpc import worker
    from nova_bridge.rpc.methods import catalogue

from workers import ENVIRONMENT

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.is_relative_to(HERE):
            # Nova and its libraries warn about their own use of each other.
            item.add_marker(pytest.mark.filterwarnings("ignore"))


@pytest.fixture(scope="session")
def nova_conf(tmp_path_factory):
    """Nova's configuration; both databases are given by the tests. Notifications of its objects go nowhere."""
    conf = nova.conf.CONF
    file = tmp_path_factory.mktemp("conf") / "nova.conf"
    file.write_text("[DEFAULT]\ntransport_url = fake://\n")
    config.parse_args(["tests"], default_config_files=[str(file)], configure_db=False)
    return conf


def use_databases(conf, folder):
    """Point this process's Nova at the two SQLite files in `folder`."""
    for module, group, name in ((main_db, "database", "main"), (api_db, "api_database", "api")):
        conf.set_override("connection", url_of(folder, name), group)
        # The manager is configured once only, and decorates functions everywhere: its content is replaced, not itself.
        module.context_manager.patch_factory(enginefacade.transaction_context())
        module.configure(conf)


def url_of(folder, name):
    return f"sqlite:///{folder}/{name}.sqlite"


@pytest.fixture(scope="session")
def template(nova_conf, tmp_path_factory):
    """A folder with main.sqlite and api.sqlite, migrated and empty."""
    folder = tmp_path_factory.mktemp("template")
    use_databases(nova_conf, folder)
    for name in ("main", "api"):
        migration.db_sync(database=name)
    main_db.get_engine().dispose()
    api_db.get_engine().dispose()
    return folder


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


@pytest.fixture(scope="session")
def methods_of_nova():
    return catalogue()


@pytest.fixture
def admin():
    return nova.context.get_admin_context()
