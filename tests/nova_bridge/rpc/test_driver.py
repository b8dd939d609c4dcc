"""oslo.messaging over `lucd://`: real transports, servers and clients, a bus behind a local door."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import oslo_messaging
import pytest
from bus_doors import BusDoor
from futurist._thread import ThreadWorker
from oslo_config import cfg
from oslo_messaging import Target

from nova_bridge.rpc.driver import DEFAULT_SOCKET, LucdDriver, TooLarge, bus_of, socket_of


@pytest.fixture(autouse=True)
def _quick_worker_threads(monkeypatch):
    """A server's wait() lasts until its idle worker threads look up, by default after a second."""
    monkeypatch.setattr(ThreadWorker, "MAX_IDLE_FOR", 0.05)


@pytest.fixture
def daemon():
    with tempfile.TemporaryDirectory(prefix="lucd") as directory:
        door = BusDoor(str(Path(directory) / "s"))
        door.start()
        yield door
        door.close()


@pytest.fixture
def url(daemon):
    return f"lucd://{daemon.path}"


@pytest.fixture
def transport(url):
    transport = oslo_messaging.get_rpc_transport(cfg.CONF, url, allowed_remote_exmods=["nova_test_errors"])
    yield transport
    transport.cleanup()


class Endpoint:
    target = Target(namespace="n", version="1.4")

    def __init__(self, name="one"):
        self.name = name
        self.got = []
        self.go_on = threading.Event()

    def echo(self, ctxt, **args):
        self.got.append(args)
        return {"args": args, "ctxt": ctxt, "by": self.name}

    def fail(self, ctxt):
        raise ValueError("what a pity")

    def slow(self, ctxt, seconds):
        self.got.append(seconds)
        self.go_on.wait(seconds)
        return self.name


@contextlib.contextmanager
def serving(transport, server="host1", topic="conductor", name="one", endpoint=None):
    endpoint = endpoint or Endpoint(name)
    rpc = oslo_messaging.get_rpc_server(transport, Target(topic=topic, server=server), [endpoint], executor="threading")
    rpc.start()
    try:
        yield endpoint
    finally:
        endpoint.go_on.set()
        rpc.stop()
        rpc.wait()


def client(transport, topic="conductor", **more):
    return oslo_messaging.get_rpc_client(
        transport, Target(topic=topic, namespace="n", version="1.0", **more), timeout=10
    )


def until(condition, timeout_s=10.0):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.01)


def test_call_brings_arguments_context_and_result(transport):
    with serving(transport):
        result = client(transport).call({"user": "u"}, "echo", a=1, b=["x", None])
        assert result == {"args": {"a": 1, "b": ["x", None]}, "ctxt": {"user": "u"}, "by": "one"}


def test_servers_exception_comes_back(transport):
    with serving(transport), pytest.raises(ValueError, match="what a pity"):
        client(transport).call({}, "fail")


def test_call_to_one_server_reaches_that_server(transport):
    with serving(transport, "host1", name="one"), serving(transport, "host2", name="two"):
        asked = client(transport)
        for server, name in (("host1", "one"), ("host2", "two")) * 3:
            assert asked.prepare(server=server).call({}, "echo")["by"] == name


def test_calls_to_a_topic_are_shared_out(transport):
    with serving(transport, "host1", name="one"), serving(transport, "host2", name="two"):
        asked = client(transport)
        by = [asked.call({}, "echo")["by"] for _ in range(20)]
        assert 5 <= by.count("one") <= 15


def test_cast_returns_at_once_and_arrives_once(transport):
    with serving(transport, name="one") as one, serving(transport, "host2", name="two") as two:
        client(transport).cast({}, "echo", n=1)
        until(lambda: one.got or two.got)
        time.sleep(0.1)
        assert one.got + two.got == [{"n": 1}]


def test_fanout_reaches_every_server_once(transport):
    with serving(transport) as one, serving(transport, "host2") as two, serving(transport, "h", topic="other") as other:
        client(transport).prepare(fanout=True).cast({}, "echo", n=1)
        until(lambda: one.got and two.got)
        time.sleep(0.1)
        assert one.got == two.got == [{"n": 1}]
        assert not other.got


def test_exchanges_are_apart(transport):
    with serving(transport) as one:
        client(transport).prepare(exchange="elsewhere").cast({}, "echo")
        client(transport).call({}, "echo", mine=True)
        assert one.got == [{"mine": True}]


def test_call_made_before_its_server_starts_is_served(transport):
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(client(transport).call, {}, "echo", early=True)
        time.sleep(0.2)
        with serving(transport):
            assert call.result(5)["args"] == {"early": True}


def test_call_that_nobody_serves_times_out(transport):
    begin = time.monotonic()
    with pytest.raises(oslo_messaging.MessagingTimeout):
        client(transport).prepare(timeout=0.3).call({}, "echo")
    assert 0.2 < time.monotonic() - begin < 8.0, "of the client's 10"
    # It is not served late either: its caller has gone.
    with serving(transport) as one:
        client(transport).call({}, "echo", next=True)
        assert one.got == [{"next": True}]


def test_slow_call_times_out_and_its_late_reply_is_dropped(transport):
    with serving(transport) as one:
        with pytest.raises(oslo_messaging.MessagingTimeout):
            client(transport).prepare(timeout=0.3).call({}, "slow", seconds=30)
        one.go_on.set()
        assert client(transport).call({}, "echo", a=2)["args"] == {"a": 2}


def test_heartbeats_keep_a_long_call_alive(transport):
    with serving(transport) as one:
        threading.Timer(5.6, one.go_on.set).start()
        assert client(transport).prepare(timeout=40, call_monitor_timeout=5).call({}, "slow", seconds=30) == "one"


def test_monitored_call_without_heartbeat_fails_early(transport):
    begin = time.monotonic()
    with pytest.raises(oslo_messaging.MessagingTimeout):
        client(transport).prepare(timeout=40, call_monitor_timeout=1).call({}, "echo")
    assert time.monotonic() - begin < 30


def test_server_that_dies_in_a_call_is_noticed_at_once(transport, daemon):
    code = f"""
import os, oslo_messaging
from oslo_config import cfg
class Endpoint:
    target = oslo_messaging.Target(namespace="n", version="1.4")
    def die(self, ctxt):
        os._exit(9)
oslo_messaging.set_transport_defaults({cfg.CONF.control_exchange!r})
transport = oslo_messaging.get_rpc_transport(cfg.CONF, "lucd://{daemon.path}")
target = oslo_messaging.Target(topic="conductor", server="mortal")
server = oslo_messaging.get_rpc_server(transport, target, [Endpoint()], executor="threading")
server.start()
server.wait()
"""
    child = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", code], env={**os.environ, "PYTHONPATH": os.getcwd()}
    )
    try:
        until(lambda: daemon.bus.counters["listeners"] == 1, 60)
        with pytest.raises(oslo_messaging.MessagingTimeout, match="died before it replied"):
            client(transport).call({}, "die")
    finally:
        child.kill()
        child.wait()
    with serving(transport):
        assert client(transport).call({}, "echo")["by"] == "one", "others take over"


def test_restarted_daemon_finds_its_listeners_again(transport, daemon):
    with serving(transport) as one:
        client(transport).call({}, "echo", n=1)
        daemon.restart(pause_s=0.5)
        assert client(transport).call({}, "echo", n=2)["by"] == "one"
        client(transport).prepare(fanout=True).cast({}, "echo", n=3)
        until(lambda: len(one.got) == 3)


def test_daemon_that_dies_in_a_call_ends_it(transport, daemon):
    with serving(transport) as one, ThreadPoolExecutor(1) as pool:
        call = pool.submit(client(transport).call, {}, "slow", seconds=30)
        until(lambda: one.got)
        daemon.restart(pause_s=0.0)
        with pytest.raises(oslo_messaging.MessagingTimeout):
            call.result(5)
        one.go_on.set()
        assert client(transport).call({}, "echo", n=2)["by"] == "one"


def test_late_reply_to_a_call_of_the_daemon_before_answers_no_other_call(transport, daemon):
    with serving(transport) as one, serving(transport, "host2", "other", "two") as two, ThreadPoolExecutor(10) as pool:
        lost = pool.submit(client(transport).call, {}, "slow", seconds=30)
        until(lambda: one.got)
        daemon.restart(pause_s=0.0)
        with pytest.raises(oslo_messaging.MessagingTimeout):
            lost.result(5)
        until(lambda: daemon.bus.counters["listeners"] == 2)
        # As many as it takes for one of them to have the number of the lost one, if numbers began again.
        asked = [pool.submit(client(transport, "other").call, {}, "slow", seconds=30) for _ in range(8)]
        until(lambda: len(two.got) == 8)
        one.go_on.set()
        time.sleep(0.3)
        two.go_on.set()
        assert [call.result(10) for call in asked] == ["two"] * 8


def test_no_daemon_is_a_delivery_failure(transport, daemon):
    daemon.stop()
    for retry, timeout in ((0, 20), (None, 0.5)):
        begin = time.monotonic()
        with pytest.raises(oslo_messaging.MessageDeliveryFailure, match="is lucd running"):
            client(transport).prepare(retry=retry, timeout=timeout).call({}, "echo")
        assert time.monotonic() - begin < 8
    with pytest.raises(oslo_messaging.MessageDeliveryFailure):
        client(transport).prepare(retry=0).cast({}, "echo")
    daemon.start()


def test_reply_that_is_too_large_is_told_to_the_caller(transport):
    class Large(Endpoint):
        def echo(self, ctxt, **args):
            return "x" * (25 * 1024 * 1024)

    why = r"the call has run, and its answer cannot be sent: Reply of \d+ bytes is larger than a frame .*with a limit"
    with serving(transport, endpoint=Large()), pytest.raises(oslo_messaging.RemoteError, match=why):
        client(transport).call({}, "echo")


def test_call_that_is_too_large_is_sent_to_nobody_and_told_as_such(transport):
    with serving(transport) as one:
        with pytest.raises(TooLarge, match=r"topic conductor: Call of \d+ bytes is larger than a frame may be"):
            client(transport).call({}, "echo", text="x" * (25 * 1024 * 1024))
        assert one.got == []


def test_thousand_calls_from_twenty_threads(transport):
    with serving(transport, name="one") as one, serving(transport, "host2", name="two") as two:
        asked = client(transport)
        with ThreadPoolExecutor(20) as pool:
            results = list(pool.map(lambda n: asked.call({}, "echo", n=n)["args"]["n"], range(1000)))
        assert results == list(range(1000))
        assert len(one.got) + len(two.got) == 1000


class Notified:
    def __init__(self, answers=()):
        self.got = []
        self.answers = list(answers)

    def info(self, ctxt, publisher_id, event_type, payload, metadata):
        self.got.append((publisher_id, event_type, payload))
        return self.answers.pop(0) if self.answers else None


@contextlib.contextmanager
def notified(url, pool=None, answers=(), allow_requeue=False):
    transport = oslo_messaging.get_notification_transport(cfg.CONF, url)
    endpoint = Notified(answers)
    listener = oslo_messaging.get_notification_listener(
        transport,
        [Target(topic="notifications")],
        [endpoint],
        executor="threading",
        pool=pool,
        allow_requeue=allow_requeue,
    )
    listener.start()
    try:
        yield endpoint
    finally:
        listener.stop()
        listener.wait()
        transport.cleanup()


def notifier(url):
    transport = oslo_messaging.get_notification_transport(cfg.CONF, url)
    return oslo_messaging.Notifier(transport, "compute.host1", driver="messaging", topics=["notifications"])


def test_notifications_arrive_also_those_from_before(url):
    notifier(url).info({}, "instance.create", {"n": 0})
    with notified(url) as endpoint:
        notifier(url).info({}, "instance.create", {"n": 1})
        until(lambda: len(endpoint.got) == 2)
        assert endpoint.got == [("compute.host1", "instance.create", {"n": n}) for n in (0, 1)]


def test_requeued_notification_comes_again(url, daemon):
    again = oslo_messaging.NotificationResult.REQUEUE
    with notified(url, answers=[again, again], allow_requeue=True) as endpoint:
        notifier(url).info({}, "instance.create", {"n": 1})
        until(lambda: len(endpoint.got) == 3)
        time.sleep(0.1)
        assert len(endpoint.got) == 3
        assert daemon.bus.counters["queued_bytes"] == 0


def test_each_pool_gets_each_notification_once(url):
    with (
        notified(url) as alone,
        notified(url, "foo") as foo1,
        notified(url, "foo") as foo2,
        notified(url, "bar") as bar,
    ):
        for n in range(10):
            notifier(url).info({}, "e", {"n": n})
        until(lambda: len(alone.got) == len(bar.got) == len(foo1.got) + len(foo2.got) == 10)
        time.sleep(0.1)
        assert len(alone.got) == len(bar.got) == len(foo1.got) + len(foo2.got) == 10


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("lucd://", DEFAULT_SOCKET),
        ("lucd:///", DEFAULT_SOCKET),
        ("lucd:///var/run/lucd/lucd.sock", "/var/run/lucd/lucd.sock"),
        ("lucd://?socket=/tmp/s", "/tmp/s"),
    ],
)
def test_transport_url_names_the_socket(text, path):
    assert socket_of(oslo_messaging.TransportURL.parse(cfg.CONF, text)) == path


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("lucd://", ""),
        ("lucd:///run/s?bus=cell1", "cell1"),
        ("lucd://?socket=/run/s&bus=nova_cell.1-a", "nova_cell.1-a"),
    ],
)
def test_transport_url_names_the_bus(text, name):
    assert bus_of(oslo_messaging.TransportURL.parse(cfg.CONF, text)) == name


def test_what_is_of_two_buses_never_meets(daemon):
    clients = {}
    with contextlib.ExitStack() as stack:
        for name in ("cell1", "cell2"):
            transport = oslo_messaging.get_rpc_transport(cfg.CONF, f"lucd://{daemon.path}?bus={name}")
            stack.callback(transport.cleanup)
            clients[name] = client(transport), stack.enter_context(serving(transport, name=name))
        for name, (asked, _) in clients.items():
            assert [asked.prepare(**more).call({}, "echo")["by"] for more in ({}, {"server": "host1"})] == [name, name]
        clients["cell1"][0].prepare(fanout=True).cast({}, "echo", n=1)
        until(lambda: {"n": 1} in clients["cell1"][1].got)
        time.sleep(0.1)
        assert {"n": 1} not in clients["cell2"][1].got


@pytest.mark.parametrize(
    "text",
    ["lucd://host:1/x", "lucd://?socket=relative", "lucd://?sokket=/x", "lucd:///x?bus=a/b", "lucd:///x?bus=a%20b"],
)
def test_wrong_transport_url_is_refused(text):
    with pytest.raises(oslo_messaging.InvalidTransportURL):
        LucdDriver(cfg.CONF, oslo_messaging.TransportURL.parse(cfg.CONF, text))


def test_driver_works_under_eventlet(daemon):
    code = f"""
import eventlet
eventlet.monkey_patch()
import oslo_messaging
from oslo_config import cfg
come = []
class Endpoint:
    target = oslo_messaging.Target(namespace="n", version="1.4")
    def echo(self, ctxt, n):
        come.append(n)
        while len(come) < 20:
            eventlet.sleep(0.01)
        return n
transport = oslo_messaging.get_rpc_transport(cfg.CONF, "lucd://{daemon.path}")
target = oslo_messaging.Target(topic="t", server="s")
server = oslo_messaging.get_rpc_server(transport, target, [Endpoint()], executor="eventlet")
server.start()
client = oslo_messaging.get_rpc_client(transport, oslo_messaging.Target(topic="t", namespace="n", version="1.0"))
assert list(eventlet.GreenPool(20).imap(lambda n: client.call({{}}, "echo", n=n), range(20))) == list(range(20))
server.stop()
server.wait()
print("all well")
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env={**os.environ, "PYTHONPATH": os.getcwd()},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout == "all well\n", done.stderr
