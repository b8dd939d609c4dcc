"""The bus by itself: limits, order, what happens to messages whose listener goes away."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from pathlib import Path

import pytest

from dht.errors import Indeterminate, Invalid, NotFound, Unavailable
from dht.requests import Done, ListDatabases
from dht.wire.local import AsyncClient, LocalDoor
from nova_bridge.rpc import bus as bus_module
from nova_bridge.rpc.bus import Bus
from nova_bridge.rpc.bus_messages import (
    Acknowledge,
    Address,
    Answered,
    Call,
    Cast,
    Heartbeat,
    Reply,
    Requeue,
    StopTaking,
    Subscribe,
    Take,
)

TOPIC = Address("ex", "topic")


class Host:
    """A bus behind a door, and clients that each have one connection."""

    def __init__(self, path):
        self.bus = Bus(1)
        self.door = LocalDoor(path, self.bus.answer)
        self.clients = []

    def client(self):
        self.clients.append(AsyncClient(self.door.path))
        return self.clients[-1]

    async def listener(self, *addresses, fanout=False, acknowledges=False):
        client = self.client()
        subscribed = await client.call(Subscribe(addresses or (TOPIC,), fanout, acknowledges))
        return client, subscribed.listener


@contextlib.asynccontextmanager
async def host():
    with tempfile.TemporaryDirectory(prefix="lucd") as directory:
        made = Host(str(Path(directory) / "s"))
        await made.door.start()
        try:
            yield made
        finally:
            for client in made.clients:
                await client.close()
            await made.door.stop()


async def bodies(client, listener, count=10, wait_ms=5000):
    return [delivery.body for delivery in (await client.call(Take(listener, count, wait_ms))).deliveries]


async def until(condition):
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def all_wait(here, *listeners):
    """Return when each of them waits for a message."""
    await until(lambda: all(here.bus._listeners[number].waits for number in listeners))


async def test_messages_of_a_queue_come_in_order():
    async with host() as here:
        client, listener = await here.listener()
        for n in range(5):
            assert await here.client().call(Cast(TOPIC, b"%d" % n)) == Done(True)
        assert await bodies(client, listener, 3) == [b"0", b"1", b"2"]
        assert await bodies(client, listener, 3) == [b"3", b"4"]
        assert await bodies(client, listener, 3, 50) == []


async def test_cast_tells_whether_somebody_listens():
    async with host() as here:
        assert await here.client().call(Cast(TOPIC, b"x")) == Done(False)
        assert await here.client().call(Cast(TOPIC, b"x", fanout=True)) == Done(False)


async def test_waiting_listeners_take_turns():
    async with host() as here:
        listeners = [await here.listener() for _ in range(3)]
        takes = [asyncio.ensure_future(bodies(client, number)) for client, number in listeners]
        await all_wait(here, *(number for _, number in listeners))
        sender = here.client()
        for n in range(3):
            await sender.call(Cast(TOPIC, b"%d" % n))
        assert sorted(await asyncio.gather(*takes)) == [[b"0"], [b"1"], [b"2"]]


async def test_unacknowledged_deliveries_go_to_another_listener_in_order():
    async with host() as here:
        first, one = await here.listener(acknowledges=True)
        second, two = await here.listener(acknowledges=True)
        for n in range(4):
            await second.call(Cast(TOPIC, b"%d" % n))
        taken = (await first.call(Take(one, 3, 100))).deliveries
        assert await first.call(Acknowledge(one, taken[0].id)) == Done(True)
        assert await first.call(Acknowledge(one, taken[0].id)) == Done(False)
        wait = asyncio.ensure_future(bodies(second, two))
        assert await wait == [b"3"]
        await first.close()
        await until(lambda: one not in here.bus._listeners)
        assert await bodies(second, two) == [b"1", b"2"]


@pytest.mark.parametrize("limit", ["MESSAGES", "BYTES"])
async def test_listener_that_acknowledges_nothing_gets_no_more_and_others_do(monkeypatch, limit):
    monkeypatch.setattr(bus_module, f"OUTSTANDING_{limit}_MAX", 2)
    async with host() as here:
        slow, one = await here.listener(acknowledges=True)
        for n in range(4):
            await slow.call(Cast(TOPIC, b"%d" % n))
        (first,) = (await slow.call(Take(one, 1, 100))).deliveries
        assert await bodies(slow, one, count=1) == [b"1"]
        assert await bodies(slow, one, wait_ms=50) == []
        waiting = asyncio.ensure_future(bodies(slow, one, count=1, wait_ms=5000))
        quick, two = await here.listener(acknowledges=True)
        assert await bodies(quick, two, count=1) == [b"2"]
        await slow.call(Acknowledge(one, first.id))
        async with asyncio.timeout(4):
            assert await waiting == [b"3"]


async def test_full_listener_is_not_woken_in_the_place_of_another(monkeypatch):
    monkeypatch.setattr(bus_module, "OUTSTANDING_MESSAGES_MAX", 1)
    async with host() as here:
        full, one = await here.listener(acknowledges=True)
        free, two = await here.listener(acknowledges=True)
        await full.call(Cast(TOPIC, b"0"))
        assert await bodies(full, one) == [b"0"]
        waiting = [asyncio.ensure_future(bodies(*who, wait_ms=5000)) for who in ((full, one), (free, two))]
        await all_wait(here, one, two)
        await here.client().call(Cast(TOPIC, b"1"))
        async with asyncio.timeout(4):
            assert await waiting[1] == [b"1"]
        waiting[0].cancel()


async def test_message_for_a_listener_that_dies_before_taking_it_wakes_another():
    async with host() as here:
        first, one = await here.listener()
        second, two = await here.listener()
        dying = asyncio.ensure_future(bodies(first, one, wait_ms=5000))
        await all_wait(here, one)
        living = asyncio.ensure_future(bodies(second, two, wait_ms=5000))
        await all_wait(here, two)
        # Both in one turn of the loop: the message is meant for the first, whose connection is closing.
        here.bus._listeners[one].connection.close()
        await here.bus.answer(here.bus._listeners[two].connection, Cast(TOPIC, b"x"))
        with pytest.raises(Indeterminate):
            await dying
        async with asyncio.timeout(4):
            assert await living == [b"x"]


async def test_requeued_delivery_goes_to_the_end():
    async with host() as here:
        client, listener = await here.listener(acknowledges=True)
        for n in range(2):
            await client.call(Cast(TOPIC, b"%d" % n))
        (delivery,) = (await client.call(Take(listener, 1, 100))).deliveries
        assert await client.call(Requeue(listener, delivery.id)) == Done(True)
        assert await bodies(client, listener) == [b"1", b"0"]


async def test_stop_ends_the_wait():
    async with host() as here:
        client, listener = await here.listener()
        wait = asyncio.ensure_future(bodies(client, listener, wait_ms=9000))
        await all_wait(here, listener)
        await here.client().call(StopTaking(listener))
        async with asyncio.timeout(6):
            assert await wait == []
            # A Take that was on its way when the stop came does not wait either.
            assert await bodies(client, listener, wait_ms=9000) == []


class OtherHosts:
    """Where somebody else listens to everything."""

    def __init__(self):
        self.delivered, self.held = [], []

    def changed(self):
        pass

    async def told(self):
        pass

    async def deliver(self, address, envelope):
        self.delivered.append(envelope.body)
        return True

    async def pools(self, address, far):
        return set()

    def hold(self, address):
        self.held.append(address)


async def test_message_for_a_topic_whose_only_listener_here_has_stopped_goes_to_another_host():
    """Its process may work on what it has taken for hours yet, with its connection open."""
    async with host() as here:
        client, listener = await here.listener(fanout=True)
        elsewhere = here.bus.elsewhere = OtherHosts()
        await client.call(Cast(TOPIC, b"before"))
        await client.call(Cast(TOPIC, b"copy"))
        here.bus.copy(TOPIC, b"copy")
        await client.call(StopTaking(listener))
        assert here.bus.listening() == {}
        assert elsewhere.held == [TOPIC], "what waits here is fetched"
        assert [envelope.body for envelope in here.bus.unheard(TOPIC, 10)] == [b"before", b"copy"]
        await client.call(Cast(TOPIC, b"after"))
        assert elsewhere.delivered == [b"after"]
        assert not here.bus.copy(TOPIC, b"copy")
        assert here.bus.counters["queued_messages"] == here.bus.counters["queued_bytes"] == 0
        assert await bodies(client, listener, wait_ms=9000) == []


@pytest.mark.parametrize("gives_up", ["requeues", "dies", "acknowledges"])
async def test_stopped_listener_may_acknowledge_what_it_has_and_what_it_gives_up_is_not_lost(gives_up):
    async with host() as here:
        client, listener = await here.listener(acknowledges=True)
        await client.call(Cast(TOPIC, b"x"))
        (delivery,) = (await client.call(Take(listener, 1, 100))).deliveries
        await client.call(StopTaking(listener))
        match gives_up:
            case "requeues":
                assert await client.call(Requeue(listener, delivery.id)) == Done(True)
            case "acknowledges":
                assert await client.call(Acknowledge(listener, delivery.id)) == Done(True)
        await client.close()
        await until(lambda: listener not in here.bus._listeners)
        other, second = await here.listener()
        assert await bodies(other, second, wait_ms=100) == [b"x"] * (gives_up != "acknowledges")
        assert here.bus.counters["queued_messages"] == here.bus.counters["queued_bytes"] == 0


async def test_call_is_answered_once():
    async with host() as here:
        client, listener = await here.listener()
        call = asyncio.ensure_future(here.client().call(Call(TOPIC, b"ask")))
        (delivery,) = (await client.call(Take(listener, 1, 1000))).deliveries
        assert delivery.body == b"ask"
        assert await client.call(Heartbeat(delivery.call)) == Done(True)
        assert await client.call(Reply(delivery.call, b"told")) == Done(True)
        assert await call == Answered(b"told")
        assert await client.call(Reply(delivery.call, b"again")) == Done(False)
        assert await client.call(Heartbeat(delivery.call)) == Done(False)


async def test_call_whose_caller_left_is_not_delivered():
    async with host() as here:
        caller = here.client()
        call = asyncio.ensure_future(caller.call(Call(TOPIC, b"ask")))
        await until(lambda: here.bus.counters["queued_messages"] == 1)
        await caller.close()
        with pytest.raises(Indeterminate):
            await call
        client, listener = await here.listener()
        assert await bodies(client, listener, wait_ms=50) == []
        assert here.bus.counters["queued_messages"] == here.bus.counters["queued_bytes"] == 0


async def test_queue_with_slow_listeners_refuses_more(monkeypatch):
    monkeypatch.setattr(bus_module, "QUEUE_MESSAGES_MAX", 3)
    async with host() as here:
        client, _ = await here.listener()
        for _ in range(3):
            await client.call(Cast(TOPIC, b"x"))
        with pytest.raises(Unavailable, match="too slow"):
            await client.call(Cast(TOPIC, b"x"))


async def test_queue_without_listeners_keeps_the_newest(monkeypatch):
    monkeypatch.setattr(bus_module, "UNHEARD_MESSAGES_MAX", 3)
    async with host() as here:
        sender = here.client()
        for n in range(5):
            await sender.call(Cast(TOPIC, b"%d" % n))
        client, listener = await here.listener()
        assert await bodies(client, listener) == [b"2", b"3", b"4"]
        assert here.bus.counters["dropped"] == 2


async def test_bytes_that_wait_are_bounded(monkeypatch):
    monkeypatch.setattr(bus_module, "QUEUED_BYTES_MAX", 100)
    async with host() as here:
        client, listener = await here.listener()
        await client.call(Cast(TOPIC, b"x" * 60))
        with pytest.raises(Unavailable):
            await client.call(Cast(TOPIC, b"x" * 60))
        await bodies(client, listener)
        await client.call(Cast(TOPIC, b"x" * 60))


async def test_topics_that_nobody_listens_to_are_bounded(monkeypatch):
    monkeypatch.setattr(bus_module, "QUEUES_MAX", 10)
    async with host() as here:
        client, listener = await here.listener()
        for n in range(50):
            await client.call(Cast(Address("ex", f"t{n}"), b"x"))
        assert here.bus.counters["queued_messages"] == 9
        await client.call(Cast(TOPIC, b"mine"))
        assert await bodies(client, listener) == [b"mine"]


async def test_subscription_that_is_refused_at_its_second_topic_listens_at_none(monkeypatch):
    monkeypatch.setattr(bus_module, "QUEUES_MAX", 1)
    async with host() as here:
        client, _ = await here.listener()
        with pytest.raises(Unavailable, match="1 topics with listeners"):
            await here.listener(TOPIC, Address("ex", "other"), fanout=True)
        await client.close()
        await until(lambda: not here.bus._listeners)
        assert here.bus.listening() == {}
        assert await here.client().call(Cast(TOPIC, b"x")) == Done(False)


async def test_listener_without_messages_leaves_nothing_behind():
    async with host() as here:
        pooled = Address("ex", "topic", pool="p")
        for _ in range(3):
            client, _ = await here.listener(TOPIC, pooled, Address("ex", "topic", "server"), fanout=True)
            await client.close()
        await until(lambda: not here.bus._listeners)
        assert not here.bus._queues
        assert not here.bus._pools
        assert not here.bus._fanouts
        assert here.bus.counters["listeners"] == 0


async def test_wrong_requests_are_refused():
    async with host() as here:
        client, listener = await here.listener()
        for other, request, error in (
            (client, Take(99, 1, 0), NotFound),
            (here.client(), Take(listener, 1, 0), Invalid),
            (client, Subscribe((), False, False), Invalid),
            (client, StopTaking(99), NotFound),
            (client, ListDatabases(), Invalid),
        ):
            with pytest.raises(error):
                await other.call(request)
