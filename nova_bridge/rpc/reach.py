"""The bus beyond this host: who listens where, handing messages over, and what nobody listens to yet.

Every daemon tells all nodes of its PoP where somebody listens on its host, whole, at each change and at each new link,
so a PoP's nodes agree about it as soon as they hear each other. Of other PoPs nothing is known beforehand: one node of
each is asked when it matters (`nova_bridge.rpc.finder`).

A message that is not for this host goes to one daemon, which puts it into its own queue, and counts as handed over when
that one has said so. It has a number that stays the same at each attempt, and an addressee that stays the same once an
attempt may have reached it; whoever gets a number twice takes it once. So nothing is handled twice; what became of a
message whose addressee is lost meanwhile, nobody knows, and the caller is told that.

A message to which nobody listens anywhere waits in the queue of the host where it was sent, as it would in a queue of
RabbitMQ's whose consumers are away, and is handed over when somebody does; the bus bounds how many.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec

from dht.codec import Message
from dht.errors import DhtError, Indeterminate, Invalid, NotFound, Unavailable
from dht.model import NodeId, Struct
from dht.requests import Done
from dht.wire.frames import timeout_ms
from dht.wire.handshake import PeerIdentity
from dht.world import Clock
from nova_bridge.rpc.bus_messages import Address
from nova_bridge.rpc.far_calls import FarCalls, Here
from nova_bridge.rpc.finder import Finder
from nova_bridge.rpc.listeners import Once, PopTable, Seen, Turns
from nova_bridge.rpc.peer_messages import (
    ADDRESSES_TOLD_MAX,
    LISTENERS_NAMED_MAX,
    POOLS_NAMED_MAX,
    AskCalls,
    AskListeners,
    Carried,
    Carry,
    FarReply,
    FarSign,
    Heard,
    ListenersReply,
    Listening,
    Listens,
    Origin,
    Outcome,
    Relay,
)
from nova_bridge.rpc.post import Links, Post, Ways, Where, relayed
from nova_bridge.rpc.queues import Envelope

TELL_TIMEOUT_S = 1.0
TELL_PAUSE_MAX_S = 5.0
TOLD_WAIT_S = 1.0
"""How long a new listener waits at most until the nodes of its PoP know of it."""
SETTLING_S = 3.0
"""For so long after its start a node that was not told by all of its PoP does not speak for it."""
CARRY_TIMEOUT_S = 3.0
CARRY_KEEP_S = 10.0
HELD_KEEP_S = 600.0
"""For how long the same addressee is tried when an attempt may have reached it: while the sender waits to hear of it,
and afterwards, when nobody could be told."""
FANOUT_KEEP_S = 30.0
"""For how long a copy is tried to be brought to a host, or a PoP, that cannot be reached."""
RETRY_PAUSE_S = 0.2
ADDRESSEES_TRIED_MAX = 8
CARRYING_BYTES_MAX = 256 * 1024 * 1024
COPIES_KEPT_MAX = 1_000
"""Copies on their way; while there are more, each is tried once."""
HELD_TICK_S = 0.25
HELD_PAUSE_MIN_S = 1.0
HELD_PAUSE_MAX_S = 5.0
"""How often other PoPs are asked for a listener of what waits here."""
HANDED_OVER_AT_ONCE = 32
FORGET_S = 600.0
BUS_REQUESTS = frozenset((Carry, Relay, FarReply, FarSign, AskCalls, AskListeners, Listens))
"""What `Reach.answer` serves."""


class LocalBus(Here, Protocol):
    """The part of `nova_bridge.rpc.bus.Bus` that is needed here."""

    elsewhere: Any

    def listening(self) -> dict[Address, bool]: ...

    def copy(self, address: Address, body: bytes) -> bool: ...

    def unheard(self, address: Address, count: int) -> list[Envelope]: ...

    def give_back(self, address: Address, envelopes: list[Envelope]) -> None: ...


@dataclass(slots=True)
class _Hold:
    """When other PoPs are asked next for a listener of an address whose messages wait here."""

    pause_s: float
    next_s: float
    drain_s: float = 0.0
    """Not handed over again before."""
    draining: bool = False


class Reach:
    """`nova_bridge.rpc.bus.Elsewhere`, and what answers the other daemons.

    `counters` since the start: carried (handed over to other hosts), taken (from them), repeated (came before),
    uncertain (nobody knows), undelivered (copies), relayed, asked; and now: held_addresses, known_addresses, far_calls.
    """

    def __init__(
        self, node: NodeId, boot: int, pop: str, clock: Clock, links: Links, ways: Ways, bus: LocalBus
    ) -> None:
        self._counters = dict.fromkeys(("carried", "taken", "repeated", "uncertain", "undelivered"), 0)
        self._origin = Origin(node, boot, pop)
        self._clock = clock
        self._links = links
        self._bus = bus
        self._post = Post(pop, links, ways)
        self._finder = Finder(pop, clock, self._post, ways)
        self._calls = FarCalls(self._origin, clock, self._post, bus)
        self._table = PopTable()
        self._turns = Turns()
        self._once = Once()
        self._numbers = itertools.count(1)
        self._version = 0
        self._told: dict[NodeId, tuple[bytes, int]] = {}
        """By node, the start of it that was told, and which version."""
        self._telling: dict[NodeId, asyncio.Task[None]] = {}
        self._held: dict[Address, _Hold] = {}
        self._wake = asyncio.Event()
        self._carrying_bytes = 0
        self._copies = 0
        self._started_s = clock.monotonic()
        self._tasks: set[asyncio.Task[Any]] = set()
        bus.elsewhere = self

    @property
    def counters(self) -> dict[str, int]:
        more = {"relayed": self._post.relayed, "asked": self._finder.asked, "held_addresses": len(self._held)}
        return {
            **self._counters,
            **more,
            "known_addresses": self._table.addresses,
            "far_calls": self._calls.open,
        }

    async def start(self) -> None:
        """Begin to hand over what waits."""
        self._started_s = self._clock.monotonic()
        self._spawn(self._look_after_held())

    async def stop(self) -> None:
        """Let go of everything; messages that wait are lost, as with the daemon."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._calls.stop()
        await self._finder.stop()

    # ---- telling this PoP's nodes who listens here

    def changed(self) -> None:
        """As `Elsewhere.changed`."""
        self._version += 1
        for peer in self._post.near():
            self._see_told(peer.node_id)

    def met(self, peer: PeerIdentity) -> None:
        """There is a new link to the node: see that it knows who listens here."""
        if peer.pop == self._origin.pop:
            self._told.pop(peer.node_id, None)
            self._see_told(peer.node_id)

    def _see_told(self, node: NodeId) -> None:
        telling = self._telling.get(node)
        # One that has just ended is still there, and will not look at what is new.
        if telling is None or telling.done():
            self._telling[node] = self._spawn(self._tell(node))
            self._telling[node].add_done_callback(lambda task: self._told_once(node, task))

    def _told_once(self, node: NodeId, task: asyncio.Task[None]) -> None:
        if self._telling.get(node) is task:
            del self._telling[node]

    async def told(self) -> None:
        """As `Elsewhere.told`."""
        tasks = [task for node, task in self._telling.items() if self._links.alive(node)]
        if tasks:
            await asyncio.wait(tasks, timeout=TOLD_WAIT_S)

    async def _tell(self, node: NodeId) -> None:
        """Until the node has the newest, or there is no link to it."""
        pause_s = RETRY_PAUSE_S
        while True:
            peer = next((peer for peer in self._post.near() if peer.node_id == node), None)
            if peer is None or self._told.get(node) == (peer.start_id, self._version):
                return
            version = self._version
            heard = tuple(Heard(address, fanout) for address, fanout in self._bus.listening().items())
            message = Listens(version, heard[:ADDRESSES_TOLD_MAX], tuple(self._finder.pops()))
            try:
                await self._links.call(node, message, TELL_TIMEOUT_S)
                self._told[node] = peer.start_id, version
            except DhtError:
                await self._clock.sleep(pause_s)
                pause_s = min(TELL_PAUSE_MAX_S, pause_s * 2)

    def _was_told(self, sender: NodeId, message: Listens) -> Done:
        peer = next((peer for peer in self._post.near() if peer.node_id == sender), None)
        if peer is None:
            raise Unavailable("who tells its listeners has no link here: tell again", sent=False)
        for node in self._table.known():
            if self._links.silent_s(node) > FORGET_S:
                self._table.forget(node)
        self._finder.told_pops(message.pops)
        changed = self._table.told(sender, peer.boot, message.version, message.heard)
        self._wake.set()
        return Done(changed)

    # ---- handing a message over

    async def deliver(self, address: Address, envelope: Envelope, keep_s: float = CARRY_KEEP_S) -> bool:
        """As `Elsewhere.deliver`."""
        tried: set[NodeId] = set()
        full = ""
        while len(tried) < ADDRESSEES_TRIED_MAX and not envelope.stale:
            where = await self._choose(address, tried)
            if where is None:
                break
            carried = await self._hand_over(where, address, envelope, keep_s)
            if carried.outcome is Outcome.TAKEN:
                return True
            tried.add(where.node)
            if carried.outcome is Outcome.FULL:
                full = carried.why
            self._finder.lost(address, where.node)
        if full:
            raise Unavailable(full, sent=False)
        return False

    def _near(self, address: Address, without: set[NodeId]) -> list[NodeId]:
        return sorted(n for n in self._table.nodes(address) if n not in without and self._links.alive(n))

    async def _choose(self, address: Address, without: set[NodeId]) -> Where | None:
        near = self._near(address, without)
        if near:
            node = self._turns.choose(address, near)
            return Where(node, self._origin.pop, self._table.boot(node))
        far = await self._finder.find(address, without)
        return self._turns.choose(address, far) if far else None

    async def _hand_over(self, where: Where, address: Address, envelope: Envelope, keep_s: float) -> Carried:
        """What the addressee made of it; NOBODY also if it certainly was not reached. Raises Indeterminate."""
        size = len(envelope.body)
        if self._carrying_bytes and self._carrying_bytes + size > CARRYING_BYTES_MAX:
            text = f"{self._carrying_bytes} bytes are on their way to other hosts already: try later"
            raise Unavailable(text, sent=False)
        call = envelope.call
        message = Carry(self._origin, next(self._numbers), False, where.boot, address, envelope.body)
        if call is not None:
            left_ms = timeout_ms(max(0.001, call.until_s - asyncio.get_running_loop().time()))
            monitor_ms = int(call.monitor_s * 1000)
            message = msgspec.structs.replace(message, call=call.id, monitor_ms=monitor_ms, left_ms=left_ms)
        self._carrying_bytes += size
        try:
            carried = await self._carry(where, message, keep_s)
        except Indeterminate:
            self._counters["uncertain"] += 1
            raise
        except Unavailable as error:
            return Carried(Outcome.NOBODY, error.message)
        finally:
            self._carrying_bytes -= size
        if carried.outcome is Outcome.TAKEN:
            self._counters["carried"] += 1
            if call is not None:
                self._calls.taken(call, where)
        return carried

    async def _carry(self, where: Where, message: Carry, keep_s: float) -> Carried:
        """Try until the addressee says what it made of it, or was certainly not reached. Raises Indeterminate."""
        until_s = self._clock.monotonic() + keep_s
        why = ""
        while True:
            try:
                reply = await self._post.ask(where, message, CARRY_TIMEOUT_S)
                if isinstance(reply, Carried):
                    break
                why = f"it replied {type(reply).__name__}"
            except Unavailable:
                if not why:
                    raise
            except Invalid:
                raise
            except DhtError as error:
                why = error.message
            if self._clock.monotonic() > until_s:
                raise Indeterminate(f"the message may have reached its listener's host: {why}")
            message = msgspec.structs.replace(message, again=True)
            await self._clock.sleep(RETRY_PAUSE_S)
        if reply.outcome is Outcome.UNKNOWN:
            raise Indeterminate(f"the message may have reached its listener's host: {reply.why}")
        return reply

    async def pools(self, address: Address, far: bool) -> set[Address]:
        """As `Elsewhere.pools`."""
        found = set(self._table.pools(address))
        return found | await self._finder.pools(address) if far else found

    # ---- copies for all

    def fan_out(self, address: Address, body: bytes) -> None:
        """As `Elsewhere.fan_out`."""
        message = Carry(self._origin, next(self._numbers), False, 0, address, body, fanout=True)
        self._copy_near(message)
        for pop in self._finder.pops():
            self._spawn(self._copy_far(pop, msgspec.structs.replace(message, spread=True)))

    def _copy_near(self, message: Carry) -> None:
        """Also to those that have not told yet what they take."""
        for peer in self._post.near():
            node = peer.node_id
            if self._table.takes_fanouts(message.address, node) or node not in self._table:
                where = Where(node, self._origin.pop, peer.boot)
                self._spawn(self._copy_to_one_of(lambda where=where: _at_once([where]), message))  # type: ignore[misc]

    async def _copy_far(self, pop: str, message: Carry) -> None:
        await self._copy_to_one_of(lambda: self._post.gateways(pop), message)

    async def _copy_to_one_of(self, addressees: Callable[[], Awaitable[list[Where]]], message: Carry) -> None:
        """Try until one has taken it; one that may have is the only one that is tried again."""
        until_s = self._clock.monotonic() + FANOUT_KEEP_S
        self._copies += 1
        try:
            while True:
                for where in await addressees():
                    with contextlib.suppress(Unavailable):
                        meant = msgspec.structs.replace(message, to_boot=where.boot)
                        carried = await self._carry(where, meant, FANOUT_KEEP_S)
                        self._counters["undelivered"] += carried.outcome is not Outcome.TAKEN
                        return
                if self._clock.monotonic() > until_s or self._copies > COPIES_KEPT_MAX:
                    self._counters["undelivered"] += 1
                    return
                await self._clock.sleep(RETRY_PAUSE_S)
        except DhtError:
            self._counters["undelivered"] += 1
        finally:
            self._copies -= 1

    # ---- what waits for a listener

    def hold(self, address: Address) -> None:
        """As `Elsewhere.hold`."""
        if address not in self._held:
            self._held[address] = _Hold(HELD_PAUSE_MIN_S, self._clock.monotonic() + HELD_PAUSE_MIN_S)
            self._wake.set()

    async def _look_after_held(self) -> None:
        while True:
            if not self._held:
                await self._wake.wait()
            self._wake.clear()
            now_s = self._clock.monotonic()
            due = [a for a, hold in self._held.items() if hold.next_s <= now_s and not self._near(a, set())]
            for address in due:
                hold = self._held[address]
                hold.pause_s = min(HELD_PAUSE_MAX_S, hold.pause_s * 2)
                hold.next_s = now_s + hold.pause_s
            if due:
                self._spawn(self._finder.find_many(due))
            for address, hold in list(self._held.items()):
                if hold.draining or hold.drain_s > now_s:
                    continue
                if self._near(address, set()) or self._finder.remembered(address):
                    hold.draining = True
                    self._spawn(self._drain(address, hold))
                elif address in due and not self._waits(address):
                    del self._held[address]
            await self._wait_for(HELD_TICK_S)

    async def _wait_for(self, pause_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(pause_s):
                await self._wake.wait()

    def _waits(self, address: Address) -> bool:
        """Whether messages still wait here with nobody to listen."""
        envelopes = self._bus.unheard(address, HANDED_OVER_AT_ONCE)
        if envelopes:
            self._bus.give_back(address, envelopes)
        return bool(envelopes)

    async def _drain(self, address: Address, hold: _Hold) -> None:
        try:
            while envelopes := self._bus.unheard(address, HANDED_OVER_AT_ONCE):
                tasks = [self._spawn(self._hand_held(address, envelope, hold)) for envelope in envelopes]
                # One whose addressee may have it is tried on beside the others.
                await asyncio.wait(tasks, timeout=CARRY_TIMEOUT_S)
                if hold.drain_s > self._clock.monotonic():
                    return
            self._held.pop(address, None)
        finally:
            hold.draining = False

    async def _hand_held(self, address: Address, envelope: Envelope, hold: _Hold) -> None:
        try:
            handed = await self.deliver(address, envelope, HELD_KEEP_S)
        except Unavailable:
            handed = False
        except DhtError as error:
            handed = True
            if envelope.call is not None:
                self._bus.fail(envelope.call.id, error.message)
        if not handed:
            hold.drain_s = self._clock.monotonic() + HELD_PAUSE_MIN_S
            self._bus.give_back(address, [envelope])
            self.hold(address)

    # ---- serving the other daemons

    async def answer(self, sender: NodeId, message: Struct) -> Message:
        """The reply to one of BUS_REQUESTS. Raises a DhtError."""
        match message:
            case Carry():
                return self._accept(sender, message)
            case Relay():
                here = message.to == self._origin.node
                return await (self.answer(sender, relayed(message)) if here else self._post.relay(message))
            case FarReply():
                return self._calls.replied(message)
            case FarSign():
                return self._calls.signed(message)
            case AskCalls():
                return self._calls.asked(message)
            case AskListeners():
                return self._listeners(message)
            case Listens():
                return self._was_told(sender, message)
            case _:
                raise Invalid(f"{type(message).__name__} is not a request to the bus")

    def _accept(self, sender: NodeId, message: Carry) -> Carried:
        if message.spread and not message.fanout:
            raise Invalid("only copies for all are spread over a PoP's hosts")
        origin = message.origin
        seen = self._once.seen(origin.node, origin.boot, message.number, message.again)
        if seen in (Seen.TAKEN, Seen.REFUSED):
            self._counters["repeated"] += 1
            return Carried(Outcome.TAKEN if seen is Seen.TAKEN else Outcome.NOBODY, "it was refused before")
        if message.again and message.to_boot not in (0, self._origin.boot):
            return Carried(Outcome.UNKNOWN, "the listener's daemon has started again since the first attempt")
        if seen is Seen.FORGOTTEN:
            return Carried(Outcome.UNKNOWN, "the listener's daemon has forgotten whether it got the message")
        carried = self._accept_new(sender, message)
        self._once.note(origin.node, origin.boot, message.number, carried.outcome is Outcome.TAKEN)
        return carried

    def _accept_new(self, sender: NodeId, message: Carry) -> Carried:
        try:
            if message.fanout:
                self._bus.copy(message.address, message.body)
            elif message.call:
                self._calls.accept(sender, message)
            else:
                self._bus.accept(message.address, Envelope(message.body))
        except NotFound as error:
            return Carried(Outcome.NOBODY, error.message)
        except Unavailable as error:
            return Carried(Outcome.FULL, error.message)
        self._counters["taken"] += 1
        if message.spread:
            self._copy_near(msgspec.structs.replace(message, spread=False, again=False))
        return Carried(Outcome.TAKEN)

    def _listeners(self, message: AskListeners) -> ListenersReply:
        since_s = self._clock.monotonic() - self._started_s
        untold = [p for p in self._post.near() if p.node_id not in self._table and self._links.alive(p.node_id)]
        if untold and since_s < SETTLING_S:
            raise Unavailable("this node has just started and does not know yet who listens in its PoP", sent=False)
        here = self._bus.listening()
        own = Listening(self._origin.node, self._origin.boot)
        nodes = []
        pools: dict[Address, None] = {}
        for address in message.addresses:
            found = [own] if address in here else []
            found += [Listening(node, self._table.boot(node)) for node in self._near(address, set())]
            nodes.append(tuple(found[:LISTENERS_NAMED_MAX]))
            topic = address.topic_key
            pools |= dict.fromkeys(one for one in here if one.pool and one.topic_key == topic)
            pools |= dict.fromkeys(self._table.pools(address))
        return ListenersReply(tuple(nodes), tuple(pools)[:POOLS_NAMED_MAX], tuple(self._finder.pops()))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


async def _at_once(nodes: list[Where]) -> list[Where]:
    return nodes
