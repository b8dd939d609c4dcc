"""The bus over several hosts and PoPs, in virtual time: who gets a message, how often, and what its sender is told."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import Counter

import msgspec
import pytest
from bus_hosts import play, until

from dht.errors import Indeterminate, Invalid, Unavailable
from nova_bridge.rpc import bus as bus_module
from nova_bridge.rpc.bus_messages import Address
from nova_bridge.rpc.peer_messages import Carried, Carry, FarReply, FarSign, Listens, Origin, Outcome, Relay

PLANE = {"a": 3, "b": 3, "c": 1}


def test_call_to_a_server_reaches_it_on_whichever_host_and_its_reply_comes_back():
    async def scenario(lab):
        for host in lab.hosts:
            await host.listener(server=f"server-{host.name}")
        for asker in ("a0", "b2", "c0"):
            for host in lab.hosts:
                assert await lab[asker].call_to(b"x", server=f"server-{host.name}") == f"server-{host.name}".encode()
        assert lab["a0"].bus.counters["queued_bytes"] == 0
        await asyncio.sleep(1)
        assert all(host.reach.counters["far_calls"] == 0 for host in lab.hosts)

    play(scenario, PLANE)


def test_topic_is_served_on_the_host_then_in_the_pop_then_elsewhere_in_turn():
    async def scenario(lab):
        asker = lab["a0"]
        for name in ("b0", "b1", "c0"):
            await lab[name].listener()
        far = Counter([await asker.call_to(b"x") for _ in range(30)])
        assert sum(far.values()) == 30
        near = [await lab[name].listener() for name in ("a1", "a2")]
        assert Counter([await asker.call_to(b"x") for _ in range(10)]) == {b"a1:t": 5, b"a2:t": 5}
        here = await asker.listener()
        assert [await asker.call_to(b"x") for _ in range(4)] == [b"a0:t"] * 4
        here.die()
        near[0].die()
        assert [await asker.call_to(b"x") for _ in range(4)] == [b"a2:t"] * 4
        near[1].die()
        again = Counter([await asker.call_to(b"x") for _ in range(30)])
        assert again == {b"b0:t": 10, b"b1:t": 10, b"c0:t": 10}

    play(scenario, PLANE)


def test_listener_of_its_pop_is_known_to_all_its_nodes_when_it_is_subscribed():
    async def scenario(lab):
        for n in range(20):
            await lab["a1"].listener(topic=f"t{n}")
            asked = lab["a0"].reach.counters["asked"]
            assert await lab["a0"].call_to(b"x", topic=f"t{n}") == f"a1:t{n}".encode()
            assert lab["a0"].reach.counters["asked"] == asked

    play(scenario, PLANE)


def test_cast_reaches_exactly_one_and_fanout_each_once():
    async def scenario(lab):
        for host in lab.hosts:
            await host.listener(server=f"1-{host.name}")
            await host.listener(server=f"2-{host.name}")
        for n in range(20):
            assert await lab["c0"].cast(b"cast%d" % n) is True
            await lab["b1"].cast(b"fan%d" % n, fanout=True)
        await asyncio.sleep(2)
        for n in range(20):
            assert len(lab.got(b"cast%d" % n)) == 1
            assert sorted(lab.got(b"fan%d" % n)) == sorted(f"{i}-{host.name}" for i in "12" for host in lab.hosts)

    play(scenario, PLANE)


def test_what_is_of_two_buses_never_meets():
    async def scenario(lab):
        await lab["a1"].listener(server="one", bus="cell1")
        await lab["b1"].listener(server="two", bus="cell2")
        for _ in range(5):
            await lab["a0"].cast(b"1", bus="cell1")
            await lab["a0"].cast(b"2", bus="cell2")
            await lab["a0"].cast(b"fan", bus="cell2", fanout=True)
            await lab["a0"].cast(b"0")
        await asyncio.sleep(2)
        assert Counter(lab.deliveries) == {("one", b"1"): 5, ("two", b"2"): 5, ("two", b"fan"): 5}

    play(scenario, PLANE)


def test_notification_reaches_one_listener_of_each_pool_wherever_it_is():
    async def scenario(lab):
        for name, pool in (("a1", ""), ("b0", ""), ("b1", "p"), ("c0", "p"), ("a2", "q"), ("a2", "q")):
            await lab[name].listener(pool=pool, fanout=False, acknowledges=True)
        for n in range(10):
            await lab["a0"].cast(b"%d" % n, notification=True)
        await asyncio.sleep(1)
        for n in range(10):
            got = [name.partition(":")[2] for name in lab.got(b"%d" % n)]
            assert sorted(got) == ["t", "tp", "tq"]

    play(scenario, PLANE)


def test_message_that_nobody_listens_to_waits_for_a_listener_of_any_host():
    async def scenario(lab):
        for n in range(5):
            assert await lab["a0"].cast(b"near%d" % n, topic="near") is False
            assert await lab["a0"].cast(b"far%d" % n, topic="far") is False
        late = asyncio.ensure_future(lab["a0"].call_to(b"ask", topic="late"))
        await asyncio.sleep(5)
        near = await lab["a1"].listener(topic="near")
        far = await lab["c0"].listener(topic="far")
        await lab["b0"].listener(topic="late")
        await until(lambda: len(near.got) == len(far.got) == 5, 10)
        # These links do not keep the order, real ones do.
        assert sorted(near.got) == [b"near%d" % n for n in range(5)]
        assert sorted(far.got) == [b"far%d" % n for n in range(5)]
        assert await late == b"b0:late"
        await asyncio.sleep(10)
        assert lab["a0"].reach.counters["held_addresses"] == lab["a0"].bus.counters["queued_messages"] == 0

    play(scenario, PLANE)


def test_what_waits_is_bounded_and_the_oldest_goes(monkeypatch):
    monkeypatch.setattr(bus_module, "UNHEARD_MESSAGES_MAX", 3)

    async def scenario(lab):
        for n in range(10):
            await lab["a0"].cast(b"%d" % n)
        assert lab["a0"].bus.counters["queued_messages"] == 3
        far = await lab["b0"].listener()
        await until(lambda: len(far.got) == 3)
        assert sorted(far.got) == [b"7", b"8", b"9"]

    play(scenario, PLANE)


def test_call_that_nobody_waits_for_any_more_is_not_delivered():
    async def scenario(lab):
        with pytest.raises(TimeoutError):
            await lab["a0"].call_to(b"given up", topic="far", timeout_s=1)
        lab["a0"].bus._queues[next(iter(lab["a0"].bus._queues))].messages[0].call.answer.cancel()
        far = await lab["b0"].listener(topic="far")
        await asyncio.sleep(20)
        assert far.got == []
        assert lab["a0"].reach.counters["held_addresses"] == 0

    play(scenario, PLANE)


@pytest.mark.parametrize("server", ["a1", "b1"])
def test_call_whose_server_dies_fails_at_once(server):
    async def scenario(lab):
        dying = await lab[server].listener(server="s", mute=True)
        call = asyncio.ensure_future(lab["a0"].call_to(b"x", server="s", timeout_s=60))
        await until(lambda: dying.got)
        dying.die()
        with pytest.raises(Indeterminate, match="died before it replied"):
            async with asyncio.timeout(2):
                await call

    play(scenario, PLANE)


@pytest.mark.parametrize("server", ["a1", "b1"])
def test_call_whose_servers_daemon_starts_again_fails_soon(server):
    async def scenario(lab):
        dying = await lab[server].listener(server="s", mute=True)
        call = asyncio.ensure_future(lab["a0"].call_to(b"x", server="s", timeout_s=60))
        await until(lambda: dying.got)
        lab[server].kill()
        await asyncio.sleep(0.5)
        lab[server].start()
        with pytest.raises(Indeterminate, match="started again"):
            async with asyncio.timeout(10):
                await call

    play(scenario, PLANE)


@pytest.mark.parametrize("server", ["a1", "b1"])
def test_call_whose_servers_host_is_lost_fails_within_seconds(server):
    async def scenario(lab):
        dying = await lab[server].listener(server="s", mute=True)
        call = asyncio.ensure_future(lab["a0"].call_to(b"x", server="s", timeout_s=90))
        await until(lambda: dying.got)
        lab[server].kill()
        with pytest.raises(Indeterminate, match="out of reach"):
            async with asyncio.timeout(30):
                await call

    play(scenario, PLANE)


@pytest.mark.parametrize("pop", ["b", "c"])
def test_short_cut_costs_a_call_nothing_but_time(pop):
    async def scenario(lab):
        server = await lab[f"{pop}0"].listener(server="s", mute=True)
        call = asyncio.ensure_future(lab["a0"].call_to(b"x", server="s", timeout_s=60))
        await until(lambda: server.got)
        lab.cut(pop)
        (number,) = (call.id for listener in server.host.bus._listeners.values() for call in listener.calls.values())
        server.host.bus.reply(number, b"done meanwhile")
        await asyncio.sleep(5)
        assert not call.done()
        lab.heal()
        assert await call == b"done meanwhile"

    play(scenario, PLANE)


def test_call_is_watched_by_the_signs_of_life_of_a_far_server():
    async def scenario(lab):
        working = await lab["b1"].listener(server="s", mute=True)
        call = asyncio.ensure_future(lab["a0"].call_to(b"x", server="s", monitor_ms=1000, timeout_s=100))
        await until(lambda: working.got)
        await asyncio.sleep(20)
        assert not call.done()
        working.host.bus.sign = lambda number: False
        with pytest.raises(Indeterminate, match="no sign of life"):
            async with asyncio.timeout(5):
                await call

    play(scenario, PLANE)


def test_caller_that_starts_again_does_not_get_the_answers_of_its_former_life():
    async def scenario(lab):
        server = await lab["b1"].listener(server="s", mute=True)
        lab["a0"].spawn(lab["a0"].call_to(b"old", server="s"))
        await until(lambda: server.got)
        lab["a0"].kill()
        lab["a0"].start()
        await asyncio.sleep(1)
        call = asyncio.ensure_future(lab["a0"].call_to(b"new", server="s"))
        await until(lambda: len(server.got) == 2)
        old, new = (call.id for listener in server.host.bus._listeners.values() for call in listener.calls.values())
        server.host.bus.reply(old, b"of old")
        await asyncio.sleep(1)
        assert not call.done()
        server.host.bus.reply(new, b"of new")
        assert await call == b"of new"

    play(scenario, PLANE)


def test_too_slow_listeners_of_another_host_refuse(monkeypatch):
    monkeypatch.setattr(bus_module, "QUEUE_MESSAGES_MAX", 3)

    async def scenario(lab):
        slow = await lab["a1"].listener(server="s")
        slow.task.cancel()
        for _ in range(3):
            assert await lab["a0"].cast(b"x", server="s") is True
        with pytest.raises(Unavailable, match="too slow"):
            await lab["a0"].cast(b"x", server="s")

    play(scenario, PLANE)


def test_pop_that_is_cut_off_goes_on_by_itself_and_gets_the_rest_after_the_heal():
    async def scenario(lab):
        for host in lab.hosts:
            await host.listener(server=f"s-{host.name}")
        assert await lab["a0"].call_to(b"x", server="s-b2") == b"s-b2"
        lab.cut("b")
        kept = []
        for n in range(10):
            assert await lab["b0"].call_to(b"x", server="s-b2", timeout_s=1) == b"s-b2"
            assert await lab["a0"].call_to(b"x", server="s-c0", timeout_s=5) == b"s-c0"
            assert await lab["b0"].call_to(b"x", timeout_s=1) == b"s-b0"
            with contextlib.suppress(Indeterminate):
                async with asyncio.timeout(15):
                    assert await lab["a0"].cast(b"later%d" % n, server="s-b2") is False
                    kept.append(b"later%d" % n)
        assert len(kept) > 1
        lab.heal()
        await until(lambda: all(lab.got(body) == ["s-b2"] for body in kept), 20)
        await asyncio.sleep(20)
        assert max(Counter(body for _, body in lab.deliveries if body.startswith(b"later")).values()) == 1
        assert all(lab.got(body) == ["s-b2"] for body in kept)

    play(scenario, PLANE)


def test_fanout_comes_to_hosts_that_were_out_of_reach_for_a_moment():
    async def scenario(lab):
        for host in lab.hosts:
            await host.listener(server=f"s-{host.name}")
        lab.cut("b")
        await lab["a0"].cast(b"x", fanout=True)
        await asyncio.sleep(5)
        assert len(lab.got(b"x")) == 4
        lab.heal()
        await until(lambda: len(lab.got(b"x")) == 7)
        await asyncio.sleep(40)
        assert sorted(lab.got(b"x")) == sorted(f"s-{host.name}" for host in lab.hosts)

    play(scenario, PLANE)


def test_host_that_starts_again_learns_and_is_learned():
    async def scenario(lab):
        await lab["a1"].listener(server="one")
        lab["a0"].kill()
        await lab["a1"].listener(server="two")
        lab["a0"].start()
        await asyncio.sleep(0.1)
        assert await lab["a0"].call_to(b"x", server="two") == b"two"
        lab["a1"].kill()
        lab["a1"].start()
        await lab["a1"].listener(server="three")
        assert await lab["a0"].call_to(b"x", server="three") == b"three"
        assert await lab["a0"].cast(b"x", server="one") is False

    play(scenario, PLANE)


def test_message_that_one_may_have_is_not_given_to_another():
    async def scenario(lab):
        for name in ("a1", "a2"):
            await lab[name].listener()
        lab.fabric.lost_to = lambda sender, to, message: isinstance(message, Carried)
        casts = [asyncio.ensure_future(lab["a0"].cast(b"%d" % n)) for n in range(4)]
        await asyncio.sleep(1)
        for name in ("a1", "a2"):
            lab.cut_host(lab[name])
        for cast in casts:
            with pytest.raises(Indeterminate, match="may have reached"):
                await cast
        lab.fabric.lost_to = None
        lab.heal()
        await asyncio.sleep(20)
        assert [len(lab.got(b"%d" % n)) for n in range(4)] == [1] * 4

    play(scenario, PLANE)


@pytest.mark.parametrize("seed", range(8))
def test_nothing_is_handled_twice_and_nothing_is_lost_that_was_not_said_to_be(seed):
    """Loss, duplication, stragglers, cuts; listeners come and go; daemons start again in every other run."""

    async def scenario(lab):
        chance = random.Random(seed)
        weather = lab.fabric.weather
        weather.loss, weather.duplication, weather.straggler = 0.05, 0.05, 0.1
        clients, sure, fanned, errors = [], set(), set(), Counter()

        async def listens(host):
            clients.append(await host.listener(server=f"s-{host.name}"))

        async def sends(n):
            host = chance.choice([one for one in lab.hosts if one.up])
            body, server = b"m%d" % n, chance.choice(["", f"s-{chance.choice(lab.hosts).name}"])
            kind = chance.random()
            try:
                if kind < 0.2:
                    await host.cast(body, fanout=True)
                    fanned.add(body)
                elif kind < 0.6:
                    await host.cast(body, server=server)
                    sure.add(body)
                else:
                    await host.call_to(body, server=server, timeout_s=40)
                    sure.add(body)
            except (Indeterminate, Unavailable, TimeoutError) as error:
                errors[type(error).__name__] += 1

        async def troubles():
            for _ in range(12):
                await asyncio.sleep(chance.uniform(0.5, 4))
                what = chance.random()
                if what < 0.4:
                    lab.cut(chance.choice("abc"))
                elif what < 0.7:
                    lab.cut_host(chance.choice(lab.hosts))
                elif seed % 2:
                    host = chance.choice(lab.hosts)
                    host.kill()
                    await asyncio.sleep(chance.uniform(0.1, 5))
                    host.start()
                    await listens(host)
                await asyncio.sleep(chance.uniform(0.1, 5))
                lab.heal()

        for host in lab.hosts:
            await listens(host)
        trouble = asyncio.ensure_future(troubles())
        sending = []
        for n in range(300):
            sending.append(asyncio.ensure_future(sends(n)))
            await asyncio.sleep(chance.uniform(0, 0.3))
        await trouble
        weather.loss = weather.duplication = weather.straggler = 0.0
        await asyncio.sleep(60)
        for task in sending:
            task.cancel()
        await asyncio.gather(*sending, return_exceptions=True)
        times = Counter(lab.deliveries)
        assert [key for key, count in times.items() if count > 1] == []
        by_body = Counter(body for _, body in lab.deliveries if body not in fanned)
        assert [body for body, count in by_body.items() if count > 1] == []
        if not seed % 2:
            # Only what waits in a daemon that dies is lost.
            assert [body for body in sure if not by_body[body]] == []
        assert len(sure) > 150

    play(scenario, PLANE, seed)


def test_messages_that_make_no_sense_are_refused():
    async def scenario(lab):
        asker, other = lab["a0"], lab["b0"]
        for message, error in (
            (Relay(lab["b1"].node, b"\xc1"), Invalid),
            (Relay(lab["b1"].node, b"\x92\x70\x90"), Invalid),
            (Listens(1, (), ()), Unavailable),
        ):
            with pytest.raises(error):
                await asker.call(other.node, message, 1.0)
        assert (await asker.call(other.node, FarReply(77, 1, b"x"), 1.0)).changed is False
        assert (await asker.call(other.node, FarSign(77, 1), 1.0)).changed is False
        with pytest.raises(Invalid, match="cannot be read"):
            await asker.call(other.node, Relay(other.node, b""), 1.0)
        cast = Carry(Origin(asker.node, 1, "a"), 1000, False, 0, Address("ex", "t"), b"x", spread=True)
        with pytest.raises(Invalid, match="only copies for all are spread"):
            await asker.call(other.node, cast, 1.0)

    play(scenario, PLANE)


def test_call_that_is_open_on_a_host_is_not_taken_there_a_second_time():
    async def scenario(lab):
        asker, other = lab["a0"], lab["b0"]
        client = await other.listener(mute=True)
        call = Carry(Origin(asker.node, 1, "a"), 1000, False, 0, Address("ex", "t"), b"x", call=7, left_ms=2000)
        assert (await asker.call(other.node, call, 1.0)).outcome is Outcome.TAKEN
        with pytest.raises(Invalid, match=r"call 7 of node .* was handed over here before"):
            await asker.call(other.node, msgspec.structs.replace(call, number=1001), 1.0)
        assert other.reach.counters["far_calls"] == 1
        await asyncio.sleep(3.0)
        assert (client.got, other.reach.counters["far_calls"], other.bus._calls) == ([b"x"], 0, {})

    play(scenario, PLANE)


def test_domain_global_is_no_pop_to_be_asked_for_listeners():
    async def scenario(lab):
        asker, near = lab["a0"], lab["a1"]
        await near.call(asker.node, Listens(1 << 40, (), ("global", "nice", "a")), 1.0)
        assert asker.reach._finder.pops() == ["b", "c", "nice"]

    play(scenario, PLANE)
