"""Hundreds of overlay nodes in one process that come and go: are look-ups right, how soon are the dead forgotten?

    python -m tests.dht.overlay.churn --nodes 300 --minutes 10 --seed 1

The nodes are the production class over datagrams of a loop in virtual time, with the production intervals. Half of the
nodes is replaced, one after the other, some by themselves on another port. A look-up is right when it gives exactly
the nearest living nodes in order, as computed from all ids, but for newcomers, and a node, newcomer or not, when it is
found where it listens.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import random
import sys
import time
from dataclasses import dataclass, field
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from dht.overlay.messages import distance, pop_prefix
from dht.overlay.overlay import Overlay, OverlaySettings
from dht.sim.loop import VirtualLoop, run

KEY = b"k" * 32
POPS = 8
DELAY_S = 0.002
FORGET_S_MAX = 30.0
YOUNG_S = 15.0
"""A node that came so lately may be missing from a list of nearest nodes, if it is found itself."""
SETTINGS = OverlaySettings(contacts_per_host_max=100_000)
"""Production's, but all nodes have one host here."""


class _Transport(asyncio.DatagramTransport):
    def __init__(self, loop: UdpLoop, protocol: Any, sock: Any) -> None:
        super().__init__({"sockname": sock.getsockname()})
        self._loop, self._protocol, self._socket = loop, protocol, sock

    def sendto(self, data: Any, addr: Any = None) -> None:
        self._loop.carry(bytes(data), self.get_extra_info("sockname"), (addr[0], addr[1]))

    def is_closing(self) -> bool:
        return self.get_extra_info("sockname") not in self._loop.open

    def close(self) -> None:
        self._loop.open.pop(self.get_extra_info("sockname"), None)
        self._socket.close()

    def receive(self, data: bytes, source: Any) -> None:
        self._protocol.datagram_received(data, source)


class UdpLoop(VirtualLoop):
    """Datagrams between the sockets of one loop; a port that is closed swallows what comes."""

    def __init__(self) -> None:
        super().__init__()
        self.open: dict[Any, _Transport] = {}
        self.sent = 0

    async def create_datagram_endpoint(self, factory: Any, *, sock: Any) -> Any:  # type: ignore[override]
        protocol = factory()
        transport = _Transport(self, protocol, sock)
        self.open[sock.getsockname()] = transport
        protocol.connection_made(transport)
        return transport, protocol

    async def getaddrinfo(self, host: Any, port: Any, **_: Any) -> Any:  # type: ignore[override]
        return [(0, 0, 0, "", (host, port))]

    def carry(self, data: bytes, source: Any, target: Any) -> None:
        self.sent += 1
        self.call_later(DELAY_S, self.deliver, data, source, target)

    def deliver(self, data: bytes, source: Any, target: Any) -> None:
        if (transport := self.open.get(target)) is not None:
            transport.receive(data, source)


class Member:
    def __init__(self, number: int) -> None:
        self.pop = f"pop-{number % POPS}"
        self.key = Ed25519PrivateKey.from_private_bytes(number.to_bytes(32, "big"))
        public = self.key.public_key().public_bytes_raw()
        self.id = pop_prefix(self.pop) + hashlib.sha1(public, usedforsecurity=False).digest()[:16]
        self.boot = 0
        self.since_s = 0.0
        self.overlay: Overlay | None = None

    async def start(self, peers: list[Overlay]) -> Overlay:
        self.boot += 1
        self.since_s = asyncio.get_running_loop().time()
        self.overlay = Overlay(self.id, self.key, self.pop, KEY, ("127.0.0.1", 0), boot=self.boot, settings=SETTINGS)
        await self.overlay.start("127.0.0.1", 0, [("127.0.0.1", peer.port) for peer in peers])
        return self.overlay


@dataclass
class Outcome:
    lookups: int = 0
    wrong: list[str] = field(default_factory=list)
    young: int = 0
    replaced: int = 0
    moved: int = 0
    forget_s: float = 0.0
    datagrams: int = 0

    def __str__(self) -> str:
        return (
            f"{self.lookups} look-ups, {len(self.wrong)} wrong, {self.young} without a newcomer; {self.replaced} nodes "
            f"replaced, {self.moved} moved to another port; a dead node was in some table for at most "
            f"{self.forget_s:.1f} s; {self.datagrams} datagrams"
        )


class Churn:
    def __init__(self, nodes: int, seed: int) -> None:
        self.chance = random.Random(seed)
        self.made = nodes
        self.living = {member.id: member for member in map(Member, range(1, nodes + 1))}
        self.outcome = Outcome()

    async def run(self, minutes: float) -> Outcome:
        loop = asyncio.get_running_loop()
        first: list[Overlay] = []
        for member in self.living.values():
            first.append(await member.start(first[:2]))
            await asyncio.sleep(0.05)
        await asyncio.sleep(90)
        await self._look(20)
        rounds = len(self.living) // 2
        for number in range(rounds):
            at = loop.time()
            await self._replace(moves=number % 5 == 4)
            await self._look(2)
            await asyncio.sleep(max(0.0, minutes * 60 / rounds - (loop.time() - at)))
        last = self.chance.choice(list(self.living.values()))
        await self._forgotten(last)
        await self._look(20)
        self.outcome.datagrams = getattr(loop, "sent", 0)
        for member in self.living.values():
            assert member.overlay is not None
            await member.overlay.stop()
        return self.outcome

    def _some(self) -> Overlay:
        overlay = self.chance.choice(list(self.living.values())).overlay
        assert overlay is not None
        return overlay

    async def _replace(self, moves: bool) -> None:
        gone = self.living.pop(self.chance.choice(list(self.living)))
        assert gone.overlay is not None
        await gone.overlay.stop()
        if moves:
            came, self.outcome.moved = gone, self.outcome.moved + 1
        else:
            self.made += 1
            came, self.outcome.replaced = Member(self.made), self.outcome.replaced + 1
        peers = [self._some(), self._some()]
        self.living[came.id] = came
        await came.start(peers)
        await asyncio.sleep(1.0)

    async def _forgotten(self, member: Member) -> None:
        """Stop one more and wait until it is in nobody's table."""
        loop = asyncio.get_running_loop()
        del self.living[member.id]
        assert member.overlay is not None
        await member.overlay.stop()
        began = loop.time()
        while any(member.id in [c.id for c in m.overlay.contacts()] for m in self.living.values() if m.overlay):
            await asyncio.sleep(0.5)
            assert loop.time() - began < 10 * FORGET_S_MAX, "never forgotten"
        self.outcome.forget_s = max(self.outcome.forget_s, loop.time() - began)

    async def _look(self, count: int) -> None:
        for _ in range(count):
            asker, wanted = self._some(), self._some()
            target = self.chance.randbytes(20) if self.chance.random() < 0.5 else wanted.node_id
            found = [contact.id for contact in await asker._crawl(target)]
            right = sorted((i for i in self.living if i != asker.node_id), key=lambda i: distance(i, target))
            self.outcome.lookups += 2
            if found != right[: SETTINGS.ksize]:
                now_s = asyncio.get_running_loop().time()
                missing = [now_s - self.living[i].since_s for i in right[: SETTINGS.ksize] if i not in found]
                if missing and max(missing) < YOUNG_S:
                    self.outcome.young += 1
                else:
                    ages = ", ".join(f"{age:.1f} s" for age in missing)
                    self.outcome.wrong.append(f"nearest to {target.hex()}: missing nodes that are there for {ages}")
            if asker is not wanted:
                contact = await asker.lookup(wanted.node_id)
                if contact is None or contact.port != wanted.port:
                    self.outcome.wrong.append(f"node {wanted.node_id.hex()} is not found")


def churn(nodes: int, minutes: float, seed: int) -> Outcome:
    random.seed(seed)
    loop = UdpLoop()
    return run(Churn(nodes, seed).run(minutes), time_limit_s=1e6, steps_max=10**10, loop=loop)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nodes", type=int, default=300)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    began = time.monotonic()
    outcome = churn(given.nodes, given.minutes, given.seed)
    print(f"{given.nodes} nodes, {given.minutes:g} minutes, seed {given.seed}: {outcome}")
    print(f"{time.monotonic() - began:.0f} s", *outcome.wrong[:10], sep="\n")
    return 1 if outcome.wrong or outcome.forget_s > FORGET_S_MAX else 0


if __name__ == "__main__":
    sys.exit(main())
