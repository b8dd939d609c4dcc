"""Server and client over oslo.messaging: conflicts, timeouts, what may be called."""

import threading
from types import SimpleNamespace

import oslo_messaging
import pytest
from oslo_db import exception as db_exception

from dht.errors import Invalid
from nova_bridge.rpc import options
from nova_bridge.rpc.client import NovaDbClient, OsloChannel
from nova_bridge.rpc.driver import TooLarge
from nova_bridge.rpc.failures import RemoteFailure
from nova_bridge.rpc.methods import Catalogue
from nova_bridge.rpc.server import (
    ATTEMPTS,
    LONGEST_PAUSE_S,
    NovaDbEndpoint,
    Runner,
    make_server,
    retries_of,
    retry_soon,
)
from nova_bridge.rpc.worker import Cells, command, parse


class Functions:
    """Stand-ins for database functions that note how they were called."""

    def __init__(self):
        self.calls = []
        self.conflicts = 0
        self.release = threading.Event()

    def record(self, values):
        self.calls.append(dict(values))
        values["mutated"] = True
        values.pop("once")  # a second run with the same dict would fail
        if len(self.calls) <= self.conflicts:
            raise db_exception.DBDeadlock()
        return len(self.calls)

    def wait(self):
        self.release.wait(20)

    def fail_oddly(self):
        raise RuntimeError("unexpected")

    def return_object(self):
        return object()

    def report(self, status_fn):
        status_fn("one", more=1)
        status_fn("two")
        return "done"


@pytest.fixture
def functions():
    return Functions()


@pytest.fixture
def pauses():
    return []


@pytest.fixture
def door(nova_conf, functions, pauses, request):
    """A server on the in-process transport and a client of it."""
    names = ("record", "wait", "fail_oddly", "return_object", "report")
    catalogue = Catalogue({name: getattr(functions, name) for name in names}, {})
    runner = Runner(lambda url: None, pause=pauses.append)
    transport = oslo_messaging.get_rpc_transport(nova_conf, url="fake://")
    server = make_server(transport, request.node.name, NovaDbEndpoint(catalogue, runner))
    server.start()
    channel = OsloChannel(nova_conf, url="fake://", server=request.node.name, timeout_s=5)
    yield NovaDbClient(channel)
    functions.release.set()
    channel.close()
    server.stop()
    server.wait()


def test_conflict_runs_function_again_with_fresh_arguments(door, functions, pauses):
    functions.conflicts = 3
    assert door.call("record", ({"once": 1},), {}) == 4
    assert functions.calls == [{"once": 1}] * 4
    assert len(pauses) == 3
    assert all(0 <= pause <= LONGEST_PAUSE_S for pause in pauses)


def test_call_through_rabbitmqs_driver(nova_conf, functions):
    """With kombu's in-memory broker: the driver that sites with RabbitMQ use, and what it does to a message."""
    url = "kombu+memory://"
    transport = oslo_messaging.get_rpc_transport(nova_conf, url=url)
    endpoint = NovaDbEndpoint(Catalogue({"record": functions.record}, {}), Runner(lambda url: None))
    server = make_server(transport, "rabbit", endpoint)
    server.start()
    channel = OsloChannel(nova_conf, url=url, server="rabbit", timeout_s=10)
    try:
        assert NovaDbClient(channel).call("record", ({"once": 1, 2: b"\x00"},), {}) == 1
    finally:
        channel.close()
        server.stop()
        server.wait()
    assert functions.calls == [{"once": 1, 2: b"\x00"}]


def test_conflict_in_every_attempt_raises_deadlock_after_the_limit(door, functions):
    functions.conflicts = 1000
    with pytest.raises(db_exception.DBDeadlock):
        door.call("record", ({"once": 1},), {})
    assert len(functions.calls) == ATTEMPTS


def test_answer_too_late_raises_connection_error(nova_conf, door, request):
    channel = OsloChannel(nova_conf, url="fake://", server=request.node.name, timeout_s=1)
    with pytest.raises(db_exception.DBConnectionError, match="may have run or not"):
        NovaDbClient(channel).call("wait", (), {})


def test_no_daemon_raises_connection_error(nova_conf, tmp_path):
    channel = OsloChannel(nova_conf, url=f"lucd://{tmp_path}/none.sock", server="nobody", timeout_s=1)
    with pytest.raises(db_exception.DBConnectionError, match="Check that the lucd daemon"):
        NovaDbClient(channel).call("record", (), {})


def test_call_that_is_too_large_is_no_lost_connection(nova_conf, monkeypatch):
    """It would be sent again for nothing, and nothing is the matter with the daemon."""

    def refuse(*args, **kwargs):
        raise TooLarge("topic lucd.nova_db: Call of 26214531 bytes is larger than a frame may be: ask for less")

    channel = OsloChannel(nova_conf, url="fake://", server="nobody", timeout_s=1)
    monkeypatch.setattr(channel, "_client", SimpleNamespace(call=refuse))
    with pytest.raises(RemoteFailure, match=r"TooLarge: record through the RPC door: .*larger than a frame"):
        NovaDbClient(channel).call("record", (), {})


def test_novas_own_retries_wait_no_longer_than_the_doors(methods_of_nova):
    retry_soon(methods_of_nova)
    retries = [retry for function in methods_of_nova.functions.values() for retry in retries_of(function)]
    assert len(retries) >= 10
    assert {retry.max_retry_interval for retry in retries} == {LONGEST_PAUSE_S}
    assert all(retry.retry_interval < LONGEST_PAUSE_S for retry in retries)


def test_no_server_raises_connection_error(nova_conf):
    channel = OsloChannel(nova_conf, url="fake://", server="nobody", timeout_s=1)
    with pytest.raises(db_exception.DBConnectionError, match="Check that the lucd daemon"):
        NovaDbClient(channel).call("record", (), {})


@pytest.mark.parametrize("name", ["no_such_function", "__init__", "_method", "get_engine", "target"])
def test_function_outside_catalogue_refused(door, name):
    with pytest.raises(RemoteFailure):
        door.call(name, (), {})


@pytest.mark.parametrize("module", ["os", "nova.objects.flavor"])
def test_object_method_outside_catalogue_refused(door, module):
    with pytest.raises(Invalid, match="may not be called"):
        door.call_object_method(module, "system", ("true",), {})


def test_unexpected_exception_arrives_as_itself_with_the_workers_trace(door):
    with pytest.raises(RuntimeError, match="unexpected") as caught:
        door.call("fail_oddly", (), {})
    assert "In the lucd worker" in caught.value.__notes__[0]
    assert "fail_oddly" in caught.value.__notes__[0]


def test_result_that_cannot_cross_is_named(door):
    with pytest.raises(Invalid, match=r"builtins\.object"):
        door.call("return_object", (), {})


def test_calls_of_a_function_argument_are_made_at_the_caller(door):
    seen = []
    assert door.call("report", (), {"status_fn": lambda *a, **k: seen.append((a, k))}) == "done"
    assert seen == [(("one",), {"more": 1}), (("two",), {})]


def test_command_round_trip_gives_the_workers_settings():
    argv = command(
        transport_url="lucd:///run/lucd.sock",
        connection="lucd:///nova_cell1",
        api_connection="lucd:///nova_api",
        server="host-1",
        threads=3,
        config_files=["/etc/nova/nova.conf"],
    )
    settings = parse(argv[3:])
    assert argv[1:3] == ["-m", "nova_bridge.rpc.worker"]
    assert (settings.transport_url, settings.connection) == ("lucd:///run/lucd.sock", "lucd:///nova_cell1")
    assert (settings.api_connection, settings.server, settings.threads) == ("lucd:///nova_api", "host-1", 3)
    assert settings.config_file == ["/etc/nova/nova.conf"]


def test_cell_of_lucd_reached_through_the_workers_own_daemon():
    cells = Cells("lucd:///nova_cell1?socket=here.sock")
    named = "lucd:///nova_cell0?socket=there.sock&plugin=lucd_rpc"
    assert cells.reachable(named) == "lucd:///nova_cell0?socket=here.sock"


def test_cell_of_other_kind_of_database_refused():
    with pytest.raises(Invalid, match="cell mapping"):
        Cells("lucd:///nova_cell1").reachable("mysql+pymysql://root:secret@db/nova")


def test_options_registered_twice_keep_their_defaults(nova_conf):
    options.register_opts(nova_conf)
    options.register_opts(nova_conf)
    assert nova_conf.lucd.rpc_timeout == 60
    assert options.transport_url(nova_conf).startswith("lucd://")
    assert options.list_opts()[0][1] is options.OPTIONS
