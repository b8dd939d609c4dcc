"""The RPC door over RabbitMQ, which production sites run today: the whole scenario through a real broker.

Not part of `make test`, because it installs a server: `make rabbitmq` runs it. The broker is private: own node name,
ports, directories; ended by its process.
"""

import os
import shutil
import socket
import subprocess
import time

import object_scenario
import pytest
import scenario
from lockstep import Lockstep
from nova_databases import copy_of, url_of, use_databases
from test_every_function import run
from workers import ENVIRONMENT

from nova_bridge.rpc import worker
from nova_bridge.rpc.client import NovaDbClient, OsloChannel
from nova_bridge.rpc.methods import LOCAL, public_functions

BROKER = "/usr/lib/rabbitmq/bin/rabbitmq-server"
START_WAIT_S = 90


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def install():
    """Debian's package, without starting the system's own broker."""
    if shutil.which("rabbitmq-server"):
        return
    if os.getuid() != 0:
        raise SystemExit("rabbitmq-server is missing; install Debian's package and run again")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    subprocess.run(["apt-get", "update", "-qq"], check=True, env=environment)
    subprocess.run(["apt-get", "install", "-y", "-qq", "rabbitmq-server"], check=True, env=environment)


@pytest.fixture(scope="module")
def broker(tmp_path_factory):
    """The transport_url of a private broker."""
    install()
    home = tmp_path_factory.mktemp("rabbit")
    port = free_port()
    (home / "plugins").write_text("[].")
    environment = {
        **os.environ,
        "HOME": str(home),
        "RABBITMQ_NODENAME": f"lucd-test-{port}@localhost",
        "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
        "RABBITMQ_NODE_PORT": str(port),
        "RABBITMQ_DIST_PORT": str(free_port()),
        "ERL_EPMD_PORT": str(free_port()),
        "RABBITMQ_MNESIA_BASE": str(home / "mnesia"),
        "RABBITMQ_LOG_BASE": str(home / "log"),
        "RABBITMQ_PID_FILE": str(home / "pid"),
        "RABBITMQ_ENABLED_PLUGINS_FILE": str(home / "plugins"),
    }
    with (home / "out").open("wb") as out:
        process = subprocess.Popen([BROKER], stdout=out, stderr=out, env=environment, start_new_session=True)
    deadline = time.monotonic() + START_WAIT_S
    while True:
        with socket.socket() as sock:
            if sock.connect_ex(("127.0.0.1", port)) == 0:
                break
        assert process.poll() is None, (home / "out").read_text()
        assert time.monotonic() < deadline, (home / "out").read_text()
        time.sleep(0.2)
    yield f"rabbit://guest:guest@127.0.0.1:{port}/"
    process.terminate()
    process.wait(60)
    subprocess.run(["epmd", "-kill"], env=environment, check=False, capture_output=True)


@pytest.fixture(scope="module", params=[scenario, object_scenario], ids=lambda module: module.__name__)
def finished(request, broker, template, tmp_path_factory, nova_conf):
    """One of the two scenarios, run once: its parts, the Lockstep and what each part raised."""
    root = tmp_path_factory.mktemp("databases")
    use_databases(nova_conf, copy_of(template, root / "here"))
    there = copy_of(template, root / "there")
    server = request.param.__name__
    argv = worker.command(
        transport_url=broker, connection=url_of(there, "main"), api_connection=url_of(there, "api"), server=server
    )
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT) as process:
        assert process.stdout.readline().strip() == worker.READY
        channel = OsloChannel(nova_conf, url=broker, server=server)
        call = Lockstep(NovaDbClient(channel))
        yield request.param, call, run(call, request.param.PARTS)
        channel.close()
        process.kill()


def test_scenario_over_rabbitmq_equals_stock_sqlite(finished):
    _, _, raised = finished
    assert not raised


def test_scenario_over_rabbitmq_called_everything(finished, methods_of_nova):
    module, call, _ = finished
    if module is scenario:
        assert call.called == set(public_functions()) - LOCAL
    else:
        assert call.methods_called == set(methods_of_nova.object_methods)
