"""What the daemon says of itself: status, nodes, domain, where a group lives."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from dht.codec import Message
from dht.domain.roster import Member, Roster, TabletReplicas
from dht.errors import DhtError, Invalid, NotFound
from dht.model import GLOBAL, SPANNING, GroupKey, NodeId, Struct
from dht.register.homes import FarStore
from dht.requests import Done, Store
from dht.rows import LOCAL_MARK, group_key, is_local, split_group_key, tablet_of
from dht.wire.identity import NodeIdentity
from lucd import messages, version
from lucd.counters import Counters
from lucd.domain_node import DomainNode
from lucd.messages import CopyLine, NodeLine, TabletLine
from lucd.recovery import FreeSeats, Recoverer

COPIES_TIMEOUT_S = 2.0


@dataclass(frozen=True, slots=True)
class Parts:
    """Where a report reads.

    `state`: one phrase for a human while the daemon starts or stops, empty while it serves. `own`, `wide`: the domain
    of the PoP, and `global`. `store`: any group, wherever it lives; `home`: of a database, a PoP, "global" or "local";
    raises NotFound. `locate`: the PoP of a group of a local family; `hint`: what the overlay says of it. `far`: the
    nodes of another PoP. `recover_pop`, `free_seats`: of `PopRecoverer`. `copies`: what this node keeps; `holders`:
    whom to `ask` what others keep. `contacts`: the overlay's nodes with PoP and address. `counters`: part -> its
    counters now. `warnings`: of the daemon's own parts.
    """

    identity: NodeIdentity
    cluster_id: str
    address: str
    failure_domain: str
    state: Callable[[], str]
    own: DomainNode
    wide: DomainNode
    store: Store
    home: Callable[[str], Awaitable[str]]
    locate: Callable[[GroupKey], Awaitable[str]]
    hint: Callable[[GroupKey], Awaitable[str | None]]
    far: Callable[[str], FarStore]
    recover_pop: Callable[[messages.RecoverPop], Awaitable[messages.RecoverReply]]
    free_seats: FreeSeats
    copies: Callable[[], tuple[CopyLine, ...]]
    ask: Callable[[NodeId, Message, float], Awaitable[Struct]]
    holders: Callable[[], Sequence[NodeId]]
    alive: Callable[[NodeId], bool]
    contacts: Callable[[], dict[NodeId, tuple[str, str]]]
    counters: Callable[[], dict[str, Counters]]
    warnings: Callable[[], list[str]]


class Report:
    """Answers the daemon's own messages; `status` asks no peer and never waits."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._started_s = time.monotonic()
        self._nodes = {node.name: node for node in (parts.own, parts.wide)}
        self._recoveries = {
            parts.own.name: Recoverer(parts.own.domain, parts.own.store.salvage, parts.free_seats),
            parts.wide.name: Recoverer(parts.wide.domain, parts.wide.store.salvage),
        }

    async def answer(self, message: Message) -> Struct:
        """Serve one of `lucd.messages`."""
        match message:
            case messages.AskStatus():
                return self.status()
            case messages.AskNodes():
                return self.nodes()
            case messages.AskDomain():
                return self.domain(message.name)
            case messages.AskWhere():
                return await self.where(message.key)
            case messages.RecoverDomain():
                return await self._recoveries[self._node(message.name).name].order(message)
            case messages.RecoverPop():
                return await self._parts.recover_pop(message)
            case messages.AskPops():
                return await self.pops()
            case messages.DrainNode():
                return await self.drain(message.node_id, lost=message.lost)
            case _:
                raise Invalid(f"{type(message).__name__} is not a question to the daemon")

    def status(self) -> messages.StatusReply:
        parts = self._parts
        health: dict[str, Any] = parts.own.domain.health()
        members = health.get("members", [])
        tablets = health.get("tablets", {})
        state = self._state(tablets)
        silent = [f"node {m['node_id']} at {m['address']} does not answer" for m in members if not m["reachable"]]
        shared = self._figures(parts.wide)
        warnings = [*health.get("warnings", ()), *silent, *self._warnings(shared), *parts.warnings()]
        failed = parts.own.disk.failed
        return messages.StatusReply(
            version=version(),
            node_id=parts.identity.node_id.hex(),
            pop=parts.identity.pop,
            cluster_id=parts.cluster_id,
            incarnation=parts.identity.incarnation.hex(),
            boot=parts.identity.boot,
            address=parts.address,
            uptime_s=round(time.monotonic() - self._started_s, 3),
            ready=not state,
            state=state or "ready",
            members=len(members),
            reachable=sum(m["reachable"] for m in members),
            roster_epoch=health.get("epoch", 0),
            generation=health.get("generation", 0),
            tablets=dict(tablets),
            to_copy=health.get("to_copy", 0),
            survivable=tuple(health.get("survivable", ())),
            warnings=tuple([failed, *warnings] if failed else warnings),
            counters={name: dict(values) for name, values in parts.counters().items()},
            global_domain=shared,
        )

    @staticmethod
    def _figures(node: DomainNode) -> messages.DomainFigures:
        health: dict[str, Any] = node.domain.health()
        members = health.get("members", [])
        return messages.DomainFigures(
            node.domain.joined,
            len(members),
            sum(m["reachable"] for m in members),
            health.get("epoch", 0),
            health.get("generation", 0),
            dict(health.get("tablets", {})),
            health.get("to_copy", 0),
        )

    def _warnings(self, shared: messages.DomainFigures) -> list[str]:
        """Of domain `global`, where this node is a member; that of the PoP tells what is the matter with its nodes."""
        wide = self._parts.wide
        found = [why for why in (wide.disk.failed, wide.domain.generations.stopped) if why]
        if shared.joined:
            found += shared_warnings(wide.name, wide.domain.health())
        if wide.domain.removed and not wide.domain.generations.stopped:
            found.append(
                f"this node was removed from domain {wide.name} and asks its members instead; to be one again, it has "
                "to be drained, its data directory wiped, and joined again"
            )
        return found

    def _state(self, tablets: dict[str, int]) -> str:
        """Why this node does not serve; empty when it does."""
        parts = self._parts
        domain = parts.own.domain
        if (failed := parts.own.disk.failed) is not None:
            return failed
        if state := parts.state():
            return state
        if stopped := domain.generations.stopped:
            return stopped
        if domain.removed:
            return f"removed from domain {domain.name}: wipe the data directory, then join again"
        if not domain.joined:
            return f"joining domain {domain.name}"
        if tablets.get("unavailable", 0):
            return f"{tablets['unavailable']} tablets have no majority: waiting for other members"
        return ""

    def nodes(self) -> messages.NodesReply:
        parts = self._parts
        roster = parts.own.domain.chain.newest
        lines = {m.node_id: self._member_line(roster, m) for m in roster.members} if roster is not None else {}
        for node_id, (pop, address) in parts.contacts().items():
            if node_id not in lines:
                lines[node_id] = self._line(node_id, pop, "?", address, "contact")
        own = parts.identity
        if own.node_id not in lines:
            lines[own.node_id] = self._line(own.node_id, own.pop, parts.failure_domain, parts.address, "contact")
        return messages.NodesReply(tuple(lines[node_id] for node_id in sorted(lines)))

    def domain(self, name: str) -> messages.DomainReply:
        node = self._node(name)
        roster = node.domain.roster
        health: dict[str, Any] = node.domain.health()
        return messages.DomainReply(
            roster.domain,
            roster.generation,
            roster.epoch,
            tuple(self._copying(self._member_line(roster, m), health) for m in roster.members),
            tuple(_tablet_line(node, tablet, roster.replicas(tablet)) for tablet in range(len(roster.tablets))),
            tuple(health.get("survivable", ())),
            self._recoveries[node.name].all(),
            health.get("state", ""),
            dict(health.get("tablets", {})),
            health.get("unchecked", 0),
        )

    @staticmethod
    def _copying(line: NodeLine, health: dict[str, Any]) -> NodeLine:
        """The line with what the member still has to copy."""
        for m in health.get("members", ()):
            if m["node_id"] == line.node_id:
                figures = {name: m[name] for name in ("to_copy", "to_copy_bytes", "to_take_over")}
                return msgspec.structs.replace(line, **figures)
        return line

    async def pops(self) -> messages.PopsReply:
        """All PoPs, with the copies that the members of `global` say they keep. Raises Unavailable without the list."""
        parts = self._parts
        claims = await parts.store.pops()
        others = [node for node in parts.holders() if node != parts.identity.node_id]
        found = [*parts.copies()]
        silent = []
        answers = await asyncio.gather(*(self._copies_at(node) for node in others))
        for node, lines in zip(others, answers, strict=True):
            if lines is None:
                silent.append(node.hex())
            else:
                found += lines
        roster = parts.wide.domain.chain.newest
        members = [self._member_line(roster, m) for m in roster.members] if roster is not None else []
        return messages.PopsReply(
            tuple(
                messages.PopLine(
                    name,
                    claim.index,
                    claim.node.hex(),
                    tuple(m for m in members if m.pop == name),
                    tuple(line for line in found if line.domain == name),
                    tuple(line for line in found if line.domain == GLOBAL and line.pop == name),
                )
                for name, claim in claims.items()
            ),
            tuple(silent),
        )

    async def _copies_at(self, node: NodeId) -> tuple[CopyLine, ...] | None:
        try:
            reply = await self._parts.ask(node, messages.AskCopies(), COPIES_TIMEOUT_S)
        except DhtError:
            return None
        return reply.copies if isinstance(reply, messages.CopiesReply) else None

    async def where(self, key: GroupKey) -> messages.WhereReply:
        """Asked of the PoP that the group lives in, if it is another. Raises Unavailable if that cannot be learned."""
        parts, hint = self._parts, ""
        database, family, values = split_group_key(key)
        home = await self._home(database)
        pop = home
        if home in SPANNING:
            pop = GLOBAL
            local = key if is_local(key) else group_key(database, LOCAL_MARK + family, values)
            (found,) = await parts.store.read([local]) if local != key else (None,)
            if local == key or (found is not None and found.rows):
                key, pop, hint = local, await parts.locate(local), await parts.hint(local) or "none"
        if pop in self._nodes:
            reply = await self.where_here(key)
        else:
            reply = await parts.far(pop).ask(messages.AskWhere(key), messages.WhereReply, None)
        return msgspec.structs.replace(reply, home=home, hint=hint)

    async def _home(self, database: str) -> str:
        with contextlib.suppress(NotFound):
            return await self._parts.home(database) if database else self._parts.own.name
        return self._parts.own.name

    async def where_here(self, key: GroupKey) -> messages.WhereReply:
        """Of a group that lives in one of this node's domains."""
        home = self._parts.own.name if is_local(key) else await self._home(split_group_key(key)[0])
        node = self._nodes.get(GLOBAL if home in SPANNING else home)
        if node is None:
            raise Invalid(f"group {key.hex()} does not live in PoP {self._parts.own.name}")
        roster, tablet = node.domain.roster, tablet_of(key, node.tablets)
        replicas = roster.replicas(tablet)
        (found,) = await self._parts.store.read([key], near=True)
        lines = [self._member_line(roster, m) for n in replicas.nodes if (m := roster.member(n)) is not None]
        coordinator = next((n for n in replicas.nodes if self._reachable(n)), replicas.nodes[0])
        ballot = found.ballot
        return messages.WhereReply(
            roster.domain,
            tablet,
            replicas.epoch,
            coordinator.hex(),
            tuple(lines),
            bool(found.rows),
            len(found.rows or {}),
            f"{ballot.generation}.{ballot.epoch}.{ballot.round} by {ballot.node.hex()[8:16] or 'nobody'}",
        )

    async def drain(self, node_id: str, *, lost: bool = False) -> Done:
        try:
            node = bytes.fromhex(node_id)
        except ValueError:
            raise Invalid(f"{node_id!r} is no node id; `lucd node list` shows them") from None
        own, wide = self._parts.own.domain, self._parts.wide.domain
        newest = own.chain.newest
        if (newest is None or newest.member(node) is None) and wide.chain.knows(node):
            # Of another PoP, or of this one before it lost all its disks. A PoP's members see to their own while they
            # are there; for those that are gone a human says so.
            await wide.leave(node, drain=not lost)
        else:
            await own.leave(node, drain=not lost)
        return Done()

    def _node(self, name: str) -> DomainNode:
        own = self._parts.own
        found = self._nodes.get(name or own.name)
        if found is None:
            raise NotFound(f"this node knows no domain {name}; it belongs to {own.name}, and knows {GLOBAL}")
        return found

    def _reachable(self, node: NodeId) -> bool:
        return node == self._parts.identity.node_id or self._parts.alive(node)

    def _member_line(self, roster: Roster | None, member: Member) -> NodeLine:
        role = "voter" if roster is not None and member.node_id in roster.voters else "member"
        role = f"{role}, leaving" if member.leaving else role
        return self._line(member.node_id, member.pop, member.failure_domain, member.address, role)

    def _line(self, node: NodeId, pop: str, failure_domain: str, address: str, role: str) -> NodeLine:
        own = node == self._parts.identity.node_id
        return NodeLine(node.hex(), pop, failure_domain, address, role, self._reachable(node), own)


def shared_warnings(name: str, health: Mapping[str, Any]) -> list[str]:
    """Why domain `global` may be of no use now. A member of many does not see all of its tablets, but its voters."""
    voters, heard = len(health["voters"]), health["voters_reachable"]
    if lost := health["tablets"]["unavailable"]:
        what = f"{lost} of its tablets have no working majority within reach:"
    elif 2 * heard <= voters:
        what = f"{heard} of its {voters} voters are within reach; if it is this PoP that is cut off,"
    else:
        return []
    return [
        f"domain {name}: {what} no database or PoP can be added, and what lives there can neither be read nor written"
    ]


def _tablet_line(node: DomainNode, tablet: int, replicas: TabletReplicas) -> TabletLine:
    try:
        node.domain.admit(tablet, replicas.epoch)
    except DhtError:
        serving = False
    else:
        serving = True
    return TabletLine(tablet, replicas.epoch, tuple(n.hex() for n in replicas.nodes), serving)
