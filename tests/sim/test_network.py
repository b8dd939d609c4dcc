import asyncio
import random
from collections.abc import Awaitable, Callable

import pytest

from dht.errors import Conflict, DhtError, Indeterminate, Unavailable
from dht.model import NodeId, Struct
from dht.sim import loop as virtual
from dht.sim.loop import Process
from dht.sim.network import Fabric, SimNetwork
from tests.sim.toy import Echo

A, B = b"a" * 20, b"b" * 20


async def echo(sender: NodeId, message: Struct) -> Struct:
    return message


def run(body: Callable[[Fabric, SimNetwork, SimNetwork], Awaitable[None]], seed: int = 1) -> None:
    async def main() -> None:
        fabric = Fabric(random.Random(seed))
        a, b = fabric.attach(A, "a", Process("a")), fabric.attach(B, "b", Process("b"))
        a.serve(echo)
        b.serve(echo)
        await body(fabric, a, b)

    virtual.run(main(), time_limit_s=1000)


def test_call_brings_the_reply_as_another_object() -> None:
    async def body(fabric: Fabric, a: SimNetwork, b: SimNetwork) -> None:
        message = Echo("x")
        reply = await a.call(B, message, 1.0)
        assert reply == message
        assert reply is not message
        assert asyncio.get_running_loop().time() > 0

    run(body)


def test_peers_error_arrives_as_its_own_class_with_its_detail() -> None:
    async def refuse(sender: NodeId, message: Struct) -> Struct:
        raise Conflict("no", part=3)

    async def body(fabric: Fabric, a: SimNetwork, b: SimNetwork) -> None:
        b.serve(refuse)
        with pytest.raises(Conflict) as caught:
            await a.call(B, Echo("x"), 1.0)
        assert caught.value.detail == {"part": 3}

    run(body)


def test_cut_link_is_unsent_or_indeterminate() -> None:
    outcomes: set[object] = set()

    async def body(fabric: Fabric, a: SimNetwork, b: SimNetwork) -> None:
        fabric.cut([A], [B])
        try:
            await a.call(B, Echo("x"), 1.0)
        except DhtError as error:
            outcomes.add((type(error), error.detail.get("sent")))

    for seed in range(10):
        run(body, seed)
    assert outcomes == {(Unavailable, False), (Indeterminate, None)}


def test_one_way_cut_serves_the_request_and_loses_the_reply() -> None:
    served: list[Struct] = []

    async def note(sender: NodeId, message: Struct) -> Struct:
        served.append(message)
        return message

    async def body(fabric: Fabric, a: SimNetwork, b: SimNetwork) -> None:
        b.serve(note)
        fabric.cut([B], [A])
        with pytest.raises(Indeterminate):
            await a.call(B, Echo("x"), 1.0)
        fabric.heal()
        assert await a.call(B, Echo("z"), 1.0) == Echo("z")

    run(body)
    assert served == [Echo("x"), Echo("z")]


def test_loss_duplication_and_stragglers_show() -> None:
    served: list[str] = []

    async def note(sender: NodeId, message: Struct) -> Struct:
        assert isinstance(message, Echo)
        served.append(message.text)
        return message

    async def body(fabric: Fabric, a: SimNetwork, b: SimNetwork) -> None:
        b.serve(note)
        weather = fabric.weather
        weather.loss, weather.duplication, weather.straggler = 0.2, 0.2, 0.3
        results = await asyncio.gather(*(a.call(B, Echo(str(i)), 2.0) for i in range(100)), return_exceptions=True)
        lost = sum(isinstance(r, Indeterminate) for r in results)
        assert 10 < lost < 60

    run(body)
    assert 50 < len(set(served)) < 100
    assert len(served) > len(set(served))
    assert served != sorted(served, key=int)


def test_stopped_peer_answers_nobody_and_old_boot_hears_nothing() -> None:
    async def slow(sender: NodeId, message: Struct) -> Struct:
        await asyncio.sleep(0.5)
        return message

    async def body(fabric: Fabric, a: SimNetwork, b: SimNetwork) -> None:
        b.serve(slow)
        call = asyncio.create_task(a.call(B, Echo("x"), 5.0))
        await asyncio.sleep(0.1)
        fabric.detach(A)
        again = fabric.attach(A, "a", Process("a2"))
        await asyncio.sleep(1.0)
        assert not call.done()
        assert await again.call(B, Echo("y"), 5.0) == Echo("y")
        with pytest.raises(Unavailable):
            await a.call(B, Echo("z"), 1.0)
        call.cancel()

    run(body)
