"""Fixtures: databases made by Nova's own migrations, workers in processes of their own, contexts."""

from pathlib import Path

import pytest
from nova_databases import api_db, conf_of_nova, config, context_of_nova, main_db, migration, use_databases

from nova_bridge.rpc.methods import catalogue

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.is_relative_to(HERE):
            # See nova_databases.
            item.add_marker(pytest.mark.filterwarnings("ignore"))


@pytest.fixture(scope="session")
def nova_conf(tmp_path_factory):
    """Nova's configuration; both databases are given by the tests. Notifications of its objects go nowhere."""
    conf = conf_of_nova.CONF
    file = tmp_path_factory.mktemp("conf") / "nova.conf"
    file.write_text("[DEFAULT]\ntransport_url = fake://\n")
    config.parse_args(["tests"], default_config_files=[str(file)], configure_db=False)
    return conf


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


@pytest.fixture(scope="session")
def methods_of_nova():
    return catalogue()


@pytest.fixture
def admin():
    return context_of_nova.get_admin_context()
