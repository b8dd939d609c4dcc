"""Simulated links: every message travels as bytes, late, out of order, twice or not at all, as the seed decides.

Semantics of a call are those of `dht.world.Network`: `Unavailable` with sent=False only when the request certainly did
not leave; `Indeterminate` when nobody knows. A peer that is not running refuses the connection at once or stays silent;
a cut link may be noticed or not; a reply may be lost after the request was served.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Collection

from dht.codec import Failure, decode, encode
from dht.errors import Conflict, DhtError, Indeterminate, Unavailable, rebuild
from dht.model import NodeId, Struct
from dht.sim.loop import NOWHERE, Process
from dht.world import Answer

ALIVE_WINDOW_S = 3.0
BROKEN_LINK_NOTICED_S = 0.05

Trace = Callable[[str], None]
Meet = Callable[[NodeId, bytes, int, bytes], None]


class Weather:
    """What the links do to messages now. Probabilities are per message, each way."""

    def __init__(self) -> None:
        self.delay_min_s, self.delay_max_s = 0.0002, 0.003
        self.loss = 0.0
        self.duplication = 0.0
        self.straggler = 0.0
        """Probability that a message takes `straggler_s` longer: it is overtaken by later ones."""
        self.straggler_s = 0.5


class Fabric:
    """All links between the nodes of one simulated cluster."""

    def __init__(self, chance: random.Random, trace: Trace = lambda line: None) -> None:
        self.chance = chance
        self.trace = trace
        self.weather = Weather()
        self.duplicable: tuple[type[Struct], ...] | None = None
        """Message classes that may arrive twice; None: all."""
        self.once: tuple[type[Struct], ...] = ()
        """Those that never do: what rests on the links' own promise of at most once (`dht.world.Network`)."""
        self.lost_to: Callable[[NodeId, NodeId, Struct], bool] | None = None
        """A scenario's own rule: (from, to, message) -> drop it."""
        self.names: dict[NodeId, str] = {}
        self._endpoints: dict[NodeId, SimNetwork] = {}
        self._cuts: dict[tuple[NodeId, NodeId], None] = {}
        self._link_delay: dict[tuple[NodeId, NodeId], float] = {}
        self.messages = 0

    def attach(self, node: NodeId, name: str, process: Process) -> SimNetwork:
        """The endpoint of a new boot of the node; replies to the boot before it are dropped from now on."""
        self.names[node] = name
        endpoint = self._endpoints[node] = SimNetwork(self, node, process)
        return endpoint

    def detach(self, node: NodeId) -> None:
        """The node stopped: peers that wait for it may notice that the link broke."""
        gone = self._endpoints.pop(node, None)
        if gone is None:
            return
        gone.closed = True
        for endpoint in self._endpoints.values():
            endpoint.lose_link(node)

    def endpoint(self, node: NodeId) -> SimNetwork | None:
        return self._endpoints.get(node)

    def cut(self, senders: Collection[NodeId], receivers: Collection[NodeId]) -> None:
        """Drop everything that the senders send to the receivers (one way)."""
        for a in senders:
            for b in receivers:
                if a != b:
                    self._cuts[a, b] = None

    def partition(self, side: Collection[NodeId], other: Collection[NodeId]) -> None:
        """Cut both ways."""
        self.cut(side, other)
        self.cut(other, side)

    def heal(self) -> None:
        """Remove every cut."""
        self._cuts.clear()

    def is_cut(self, a: NodeId, b: NodeId) -> bool:
        return (a, b) in self._cuts

    def delay_s(self, a: NodeId, b: NodeId) -> float:
        """Of one message: a fixed part for each link, drawn once, and a part of its own."""
        weather = self.weather
        base = self._link_delay.get((a, b))
        if base is None:
            base = self._link_delay[a, b] = self.chance.random()
        delay = weather.delay_min_s + (weather.delay_max_s - weather.delay_min_s) * base * self.chance.random()
        if weather.straggler and self.chance.random() < weather.straggler:
            delay += self.chance.random() * weather.straggler_s
        return delay

    def carry(self, a: NodeId, b: NodeId, message: Struct, arrive: Callable[[], None]) -> None:
        """Let `arrive` happen on the other side: later, never, or twice."""
        weather = self.weather
        self.messages += 1
        lost = (
            self.is_cut(a, b)
            or (weather.loss > 0 and self.chance.random() < weather.loss)
            or (self.lost_to is not None and self.lost_to(a, b, message))
        )
        if lost:
            self.trace(f"lost {self.names.get(a)}->{self.names.get(b)} {type(message).__name__}")
            return
        self._later(self.delay_s(a, b), arrive)
        twice = self.duplicable is None or isinstance(message, self.duplicable)
        if (
            weather.duplication
            and twice
            and not isinstance(message, self.once)
            and self.chance.random() < weather.duplication
        ):
            self._later(self.delay_s(a, b) + self.chance.random() * weather.straggler_s, arrive)

    def _later(self, delay_s: float, action: Callable[[], None]) -> None:
        asyncio.get_running_loop().call_later(delay_s, action, context=NOWHERE)


class SimNetwork:
    """`dht.world.Network` of one boot of one node."""

    def __init__(self, fabric: Fabric, node: NodeId, process: Process) -> None:
        self._fabric = fabric
        self._node = node
        self._process = process
        self._answer: Answer | None = None
        self._pending: dict[int, tuple[NodeId, asyncio.Future[bytes]]] = {}
        self._next = 0
        self._heard_s: dict[NodeId, float] = {}
        self._lost_s: dict[NodeId, float] = {}
        self._met: dict[SimNetwork, bool] = {}
        self.identity: tuple[NodeId, bytes, int, bytes] | None = None
        """What it proves at a handshake: node, incarnation, boot, start."""
        self.meet: Meet | None = None
        """Raises Conflict for a peer that is not to be trusted; see `dht.wire.boots`."""
        self.closed = False

    @property
    def fabric(self) -> Fabric:
        return self._fabric

    def serve(self, answer: Answer) -> None:
        self._answer = answer

    def set_address(self, node: NodeId, host: str, port: int) -> None:
        """Addresses are of no use here: links are named by node."""

    def alive(self, node: NodeId) -> bool:
        if node == self._node:
            return True
        heard_s = self._heard_s.get(node)
        return heard_s is None or asyncio.get_running_loop().time() - heard_s < ALIVE_WINDOW_S

    def silent_s(self, node: NodeId) -> float:
        if self.alive(node):
            return 0.0
        lost_s = max(self._lost_s.get(node, 0.0), self._heard_s[node] + ALIVE_WINDOW_S)
        return asyncio.get_running_loop().time() - lost_s

    def parted(self, node: NodeId) -> bool:
        cut = self._fabric.is_cut(self._node, node) or self._fabric.is_cut(node, self._node)
        return cut and not self.alive(node)

    async def call(self, to: NodeId, message: Struct, timeout_s: float) -> Struct:
        fabric, chance = self._fabric, self._fabric.chance
        loop = asyncio.get_running_loop()
        data = encode(message)
        if self.closed:
            raise Unavailable("this node has stopped", sent=False)
        peer = fabric.endpoint(to)
        if peer is not None and not (to == self._node or self.meets(peer)):
            await asyncio.sleep(min(timeout_s, fabric.delay_s(self._node, to)))
            self._silent(to)
            raise Unavailable(f"{fabric.names.get(to)} and this node refuse each other", sent=False)
        noticed = chance.random() < 0.5
        if noticed and to != self._node and (peer is None or fabric.is_cut(self._node, to)):
            await asyncio.sleep(min(timeout_s, fabric.delay_s(self._node, to)))
            self._silent(to)
            raise Unavailable(f"no link to {fabric.names.get(to)}", sent=False)
        self._next += 1
        number = self._next
        reply: asyncio.Future[bytes] = loop.create_future()
        self._pending[number] = (to, reply)
        fabric.carry(self._node, to, message, lambda: _request_arrives(fabric, self._node, to, data, number, self))
        late = loop.call_later(timeout_s, _late, reply)
        try:
            raw = await reply
        except TimeoutError:
            self._silent(to)
            raise Indeterminate(f"no reply from {fabric.names.get(to)} within {timeout_s} s") from None
        finally:
            late.cancel()
            self._pending.pop(number, None)
        self._heard_s[to] = loop.time()
        answer = decode(raw)
        if isinstance(answer, Failure):
            raise rebuild(answer.code, answer.message, answer.detail)
        return answer

    def meets(self, peer: SimNetwork) -> bool:
        """Whether both ends take the other for what it says it is: the handshake of a link, the first time."""
        fabric = self._fabric
        known = self._met.get(peer)
        if known is None:
            if fabric.is_cut(self._node, peer._node) or fabric.is_cut(peer._node, self._node):
                return True
            known = _introduced(self, peer) and _introduced(peer, self)
            self._met[peer] = peer._met[self] = known
            if not known:
                fabric.trace(f"{fabric.names.get(self._node)} and {fabric.names.get(peer._node)} refuse each other")
        return known

    def _silent(self, node: NodeId) -> None:
        if self.alive(node):
            self._lost_s[node] = asyncio.get_running_loop().time()
        self._heard_s[node] = -ALIVE_WINDOW_S

    def lose_link(self, node: NodeId) -> None:
        """The peer went away: some waiting calls notice at once, the others run into their time."""
        for to, reply in list(self._pending.values()):
            if to == node and self._fabric.chance.random() < 0.5:
                asyncio.get_running_loop().call_later(
                    self._fabric.chance.random() * BROKEN_LINK_NOTICED_S, _break, reply, context=NOWHERE
                )

    def request_arrives(self, sender: NodeId, data: bytes, number: int, caller: SimNetwork) -> None:
        """Serve it in a task of this node's process."""
        self._heard_s[sender] = asyncio.get_running_loop().time()
        asyncio.get_running_loop().create_task(
            self._serve(sender, data, number, caller), context=self._process.fresh_context()
        )

    def reply_arrives(self, number: int, data: bytes) -> None:
        """Wake the caller, unless it has given up, stopped, or heard this reply already."""
        pending = self._pending.get(number)
        if pending is not None and not self.closed and not pending[1].done():
            pending[1].set_result(data)

    async def _serve(self, sender: NodeId, data: bytes, number: int, caller: SimNetwork) -> None:
        answer: Struct
        try:
            if self._answer is None:
                raise Unavailable("the node is starting")
            answer = await self._answer(sender, decode(data))
        except DhtError as error:
            answer = Failure(error.code, error.message, dict(error.detail))
        raw = encode(answer)
        if not self.closed:
            self._fabric.carry(self._node, sender, answer, lambda: caller.reply_arrives(number, raw))


def _request_arrives(fabric: Fabric, sender: NodeId, to: NodeId, data: bytes, number: int, caller: SimNetwork) -> None:
    """A request reaches whatever boot of the peer runs now; nobody is told if none does.

    What a boot that is gone had sent still arrives: its link was good when it left.
    """
    peer = fabric.endpoint(to)
    if peer is not None and (caller.closed or peer is caller or caller.meets(peer)):
        peer.request_arrives(sender, data, number, caller)


def _introduced(one: SimNetwork, to: SimNetwork) -> bool:
    if one.identity is None or to.meet is None:
        return True
    try:
        to.meet(*one.identity)
    except Conflict:
        return False
    return True


def _late(reply: asyncio.Future[bytes]) -> None:
    if not reply.done():
        reply.set_exception(TimeoutError())


def _break(reply: asyncio.Future[bytes]) -> None:
    if not reply.done():
        reply.set_exception(Indeterminate("the link broke while the request was on its way"))
