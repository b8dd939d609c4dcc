"""Nova's functions that open their transaction in their body lose races as on MySQL."""

import threading

import pytest
import sqlalchemy as sa
from nova import exception
from nova.db.api import models
from nova.objects import aggregate
from nova_databases import api_db
from oslo_db.sqlalchemy import enginefacade

from nova_bridge.sql import dbapi


@pytest.fixture
def engine(nova_conf, request):
    """Of an API database on lucd with an aggregate that has a host and metadata."""
    name = request.node.name
    put_back = api_db.context_manager.patch_factory(enginefacade.transaction_context())
    nova_conf.set_override("connection", f"lucd+memory:///{name}", "api_database")
    api_db.configure(nova_conf)
    engine = api_db.get_engine()
    models.BASE.metadata.create_all(engine)
    with engine.begin() as connection:
        connection.execute(sa.insert(models.Aggregate).values(id=1, uuid="u", name="one"))
        connection.execute(sa.insert(models.AggregateHost).values(aggregate_id=1, host="h"))
        connection.execute(sa.insert(models.AggregateMetadata).values(aggregate_id=1, key="k", value="old"))
    yield engine
    put_back()
    nova_conf.clear_override("connection", "api_database")
    engine.dispose()
    dbapi.forget_memory(name)


def meddle(engine, statement):
    """Another process commits this while the next transaction is about to."""

    def run():
        with engine.begin() as connection:
            connection.execute(statement)

    to_do = [run]

    def before(connection):
        if not to_do:
            return
        thread = threading.Thread(target=to_do.pop())
        thread.start()
        thread.join()

    sa.event.listen(engine, "commit", before)


def test_host_that_another_took_out_meanwhile_is_not_found(engine, admin):
    meddle(engine, sa.delete(models.AggregateHost))
    with pytest.raises(exception.AggregateHostNotFound):
        aggregate._host_delete_from_db(admin, 1, "h")


def test_metadata_that_another_changed_meanwhile_is_changed_after(engine, admin):
    meddle(engine, sa.update(models.AggregateMetadata).values(value="other"))
    aggregate._metadata_add_to_db(admin, 1, {"k": "mine"})
    with engine.connect() as connection:
        assert connection.execute(sa.select(models.AggregateMetadata.value)).scalars().all() == ["mine"]


def test_host_that_another_put_in_meanwhile_exists(engine, admin):
    meddle(engine, sa.insert(models.AggregateHost).values(aggregate_id=1, host="new"))
    with pytest.raises(exception.AggregateHostExists):
        aggregate._host_add_to_db(admin, 1, "new")
