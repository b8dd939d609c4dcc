"""Nova's own programs behind the RPC door, as processes."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time

import nova.context
import nova.rpc
import oslo_messaging
import pytest
from nova import objects
from nova.objects import base
from nova_databases import copy_of, url_of
from oslo_versionedobjects import base as versioned
from workers import ENVIRONMENT, HERE, bus, running_worker

SERVER = "the-host"
START_WAIT_S = 240


@pytest.fixture(scope="module")
def databases_there(template, tmp_path_factory):
    return copy_of(template, tmp_path_factory.mktemp("processes") / "there")


@pytest.fixture(scope="module")
def socket(databases_there):
    with (
        bus() as path,
        running_worker(path, SERVER, url_of(databases_there, "main"), url_of(databases_there, "api")),
    ):
        yield path


def written_conf(file, socket, connection, api_connection):
    file.write_text(
        f"[DEFAULT]\nhost = {SERVER}\ntransport_url = lucd://{socket}\nstate_path = {file.parent}\n"
        f"rpc_response_timeout = 20\n[lucd]\nsocket = {socket}\nserver = {SERVER}\n[conductor]\nworkers = 1\n"
        f"[database]\nconnection = {connection}\n[api_database]\nconnection = {api_connection}\n"
        # Nobody is asked there; the conductor wants to know where it would be.
        "[placement]\nauth_type = none\nendpoint_override = http://127.0.0.1:9/placement\n"
    )
    return str(file)


def told_by(script, *arguments, timeout_s):
    """What a script of this folder prints, if it ends well."""
    done = subprocess.run(
        [sys.executable, str(HERE / script), *arguments],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def conductor(socket, tmp_path):
    """A lucd-nova-conductor that knows no database."""
    nowhere = "sqlite:////no/such/folder/nova.sqlite"
    file = written_conf(tmp_path / "nova.conf", socket, nowhere, nowhere)
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "nova_bridge.rpc.conductor", "--config-file", file],
            stdout=log,
            stderr=log,
            env=ENVIRONMENT,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        # How it stops is Nova's matter, and takes one release longer than another.
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(20)
        print((tmp_path / "log").read_text()[-4000:])


def ready(client, context):
    deadline = time.monotonic() + START_WAIT_S
    ping = client.prepare(namespace="baseapi", version="1.0", timeout=2)
    while True:
        try:
            return ping.call(context, "ping", arg="hello")
        except (oslo_messaging.MessagingTimeout, oslo_messaging.MessageDeliveryFailure):
            if time.monotonic() > deadline:
                raise


def test_conductor_behind_door_serves_objects_to_compute(nova_conf, conductor, socket, databases_there):
    transport = oslo_messaging.get_rpc_transport(nova_conf, url=f"lucd://{socket}")
    serializer = nova.rpc.RequestContextSerializer(base.NovaObjectSerializer())
    target = oslo_messaging.Target(exchange="nova", topic="conductor", version="3.0")
    client = oslo_messaging.get_rpc_client(transport, target, serializer=serializer, timeout=20)
    context = nova.context.get_admin_context()
    try:
        assert ready(client, context) == {"service": "conductor", "arg": "hello"}
        service = objects.Service(context, host="compute-1", binary="nova-compute", topic="compute", report_count=0)
        changes, _ = client.call(context, "object_action", objinst=service, objmethod="create", args=(), kwargs={})
        assert changes["id"] > 0
        versions = versioned.obj_tree_get_versions("ServiceList")
        found = client.call(
            context,
            "object_class_action_versions",
            objname="ServiceList",
            objmethod="get_all",
            object_versions=versions,
            args=(),
            kwargs={},
        )
        hosts = {(service.host, service.binary) for service in found}
        assert hosts >= {("compute-1", "nova-compute"), (SERVER, "nova-conductor")}
        with pytest.raises(oslo_messaging.RemoteError, match="ServiceBinaryExists"):
            client.call(context, "object_action", objinst=service, objmethod="create", args=(), kwargs={})
    finally:
        transport.cleanup()
    assert conductor.poll() is None


def test_door_opened_by_url_alone_works_from_the_first_call_on(socket, template, databases_there, tmp_path):
    here = copy_of(template, tmp_path / "here")
    for folder, name in ((here, "seen by the first call"), (databases_there, "seen by the others")):
        with sqlite3.connect(folder / "api.sqlite") as database:
            database.execute(
                "INSERT INTO cell_mappings (uuid, name, transport_url, database_connection, disabled)"
                " VALUES (?, ?, 'none:///', 'none:///', 0)",
                (name, name),
            )
        database.close()
    urls = [url_of(here, name) + "?plugin=lucd_rpc" for name in ("main", "api")]
    file = written_conf(tmp_path / "nova.conf", socket, *urls)
    answer = json.loads(told_by("behind_plugin.py", "--config-file", file, timeout_s=240).splitlines()[-1])
    assert answer["first"] == ["seen by the first call"]
    assert answer["replaced"] is True
    assert answer["second"] == ["seen by the others"]
    assert "h" in answer["hosts"]
    with sqlite3.connect(here / "main.sqlite") as database:
        assert database.execute("SELECT count(*) FROM services").fetchone() == (0,)
    database.close()


def test_worker_whose_first_call_loses_many_races_runs_it_until_it_wins_one():
    """Of a function that opens its transaction in its body, and that was catalogued before any engine was made."""
    urls = ["--connection", "lucd+memory:///racing_main", "--api-connection", "lucd+memory:///racing_api"]
    told = told_by("racing_worker.py", "--transport-url", "none", *urls, timeout_s=300)
    assert told.split() == ["done", "mine"]
