"""Hosts of several PoPs with a bus each, on simulated links in virtual time, and clients that listen and send there."""

from __future__ import annotations

import asyncio
import hashlib
import random

from dht.sim import loop as virtual
from dht.sim.clock import SimClock
from dht.sim.loop import Process
from dht.sim.network import Fabric
from dht.wire import frames
from dht.wire.handshake import PeerIdentity
from nova_bridge.rpc.bus import Bus
from nova_bridge.rpc.bus_messages import Acknowledge, Address, Call, Cast, Heartbeat, Reply, Subscribe, Take
from nova_bridge.rpc.reach import Reach


class FakeConnection:
    def __init__(self):
        self.on_close = []

    def close(self):
        for callback in self.on_close:
            callback()
        self.on_close = []


class Client:
    """One listener: notes what it gets in `got`, and answers calls with its own name unless `mute`."""

    def __init__(self, host, name, addresses, fanout, acknowledges, mute):
        self.host, self.name, self.mute = host, name, mute
        self.addresses, self.fanout, self.acknowledges = addresses, fanout, acknowledges
        self.got = []
        self.connection = FakeConnection()
        self.task = None

    async def listen(self):
        answer = self.host.bus.answer
        number = (await answer(self.connection, Subscribe(self.addresses, self.fanout, self.acknowledges))).listener
        self.task = self.host.spawn(self._take(number))
        return self

    async def _take(self, number):
        answer = self.host.bus.answer
        while True:
            for delivery in (await answer(self.connection, Take(number, 10, 5000))).deliveries:
                self.got.append(delivery.body)
                self.host.lab.deliveries.append((self.name, delivery.body))
                if self.acknowledges:
                    await answer(self.connection, Acknowledge(number, delivery.id))
                if delivery.call and not self.mute:
                    await answer(self.connection, Reply(delivery.call, self.name.encode()))
                elif delivery.call and delivery.monitor_ms:
                    self.host.spawn(self._signs(delivery))

    async def _signs(self, delivery):
        heard = True
        while heard:
            heard = (await self.host.bus.answer(self.connection, Heartbeat(delivery.call))).changed
            await asyncio.sleep(delivery.monitor_ms / 2000)

    def die(self):
        self.task.cancel()
        self.connection.close()


class Host:
    """`Links` and `Ways` of its own: who runs and is not cut off has a link and is heard."""

    def __init__(self, lab, pop, number):
        self.lab, self.pop = lab, pop
        self.name = f"{pop}{number}"
        self.node = hashlib.sha1(self.name.encode()).digest()
        self.boot = 0
        self.up = False

    def start(self):
        self.boot += 1
        self.up = True
        self.process = Process(f"{self.name}.{self.boot}")
        self.network = self.lab.fabric.attach(self.node, self.name, self.process)
        self.bus = Bus(self.boot << 32)
        self.reach = Reach(self.node, self.boot, self.pop, SimClock(), self, self, self.bus)
        self.network.serve(self.reach.answer)
        self.spawn(self.reach.start())
        for other in self.lab.hosts:
            if self.alive(other.node) and other is not self:
                self.reach.met(other.identity())
                other.reach.met(self.identity())

    def kill(self):
        self.up = False
        self.process.frozen = True
        self.lab.fabric.detach(self.node)

    def spawn(self, work):
        return asyncio.get_running_loop().create_task(work, context=self.process.fresh_context())

    def identity(self):
        return PeerIdentity(self.node, self.pop, "", b"i" * 16, self.boot, b"start%03d" % self.boot, 2)

    def alive(self, node):
        other = self.lab.by_node.get(node)
        cut = self.lab.fabric.is_cut(self.node, node) or self.lab.fabric.is_cut(node, self.node)
        return other is not None and other.up and not cut

    def silent_s(self, node):
        return 0.0 if self.alive(node) else 1.0

    def peers(self):
        return [other.identity() for other in self.lab.hosts if other is not self and self.alive(other.node)]

    async def call(self, to, message, timeout_s):
        return await self.network.call(to, message, timeout_s)

    def others(self):
        return {other.pop for other in self.lab.hosts} - {self.pop}

    async def gateways(self, pop):
        nodes = [other.node for other in self.lab.hosts if other.pop == pop]
        return sorted(nodes, key=lambda node: not self.alive(node))[:3]

    # ---- clients

    async def listener(self, topic="t", server="", *, pool="", bus="", fanout=True, acknowledges=False, mute=False):
        plain = Address("ex", topic, bus=bus, pool=pool)
        addresses = (Address("ex", topic, server, bus=bus), plain) if server else (plain,)
        client = Client(self, server or f"{self.name}:{topic}{pool}", addresses, fanout, acknowledges, mute)
        return await self.spawn(client.listen())

    async def cast(self, body, topic="t", server="", bus="", **more):
        message = Cast(Address("ex", topic, server, bus=bus), body, **more)
        return (await self._result(self.bus.answer(FakeConnection(), message), 60.0)).changed

    async def call_to(self, body, topic="t", server="", *, timeout_s=10.0, monitor_ms=0):
        message = Call(Address("ex", topic, server), body, monitor_ms)

        async def asked():
            frames.set_time_left(timeout_s)
            return await self.bus.answer(FakeConnection(), message)

        return (await self._result(asked(), timeout_s)).body

    async def _result(self, work, timeout_s):
        """What the host's task gives; it stands still for ever if the host dies."""
        task = self.spawn(work)
        try:
            done, _ = await asyncio.wait([task], timeout=timeout_s)
        finally:
            if not task.done():
                task.cancel()
        if not done:
            raise TimeoutError
        return task.result()


class Lab:
    """`pops`: how many hosts each has. `deliveries`: who got what, in order."""

    def __init__(self, seed, pops):
        self.fabric = Fabric(random.Random(seed))
        self.deliveries: list[tuple[str, bytes]] = []
        self.hosts = [Host(self, pop, number) for pop, count in pops.items() for number in range(count)]
        self.by_node = {host.node: host for host in self.hosts}
        for host in self.hosts:
            host.start()

    def __getitem__(self, name):
        return next(host for host in self.hosts if host.name == name)

    def cut(self, pop):
        mine = [host.node for host in self.hosts if host.pop == pop]
        self.fabric.partition(mine, [host.node for host in self.hosts if host.pop != pop])

    def cut_host(self, host):
        self.fabric.partition([host.node], [other.node for other in self.hosts if other is not host])

    def heal(self):
        self.fabric.heal()
        for host in self.hosts:
            for other in self.hosts:
                if host.up and other.up and host is not other:
                    host.reach.met(other.identity())

    def got(self, body):
        return [name for name, got in self.deliveries if got == body]

    async def stop(self):
        for host in self.hosts:
            if host.up:
                await host.spawn(host.reach.stop())


def play(scenario, pops, seed=1):
    """Run `scenario(lab)`."""

    async def main():
        lab = Lab(seed, pops)
        await asyncio.sleep(0.1)
        try:
            await scenario(lab)
        finally:
            await lab.stop()

    virtual.run(main(), time_limit_s=1e6, steps_max=1_500_000)


async def until(condition, timeout_s=30.0):
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)
