"""What the daemon says of itself: status, nodes, domain, where a group lives."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from dht.codec import Message
from dht.domain.domain import Domain
from dht.domain.roster import Member, Roster, TabletReplicas
from dht.errors import DhtError, Invalid, NotFound
from dht.model import GroupKey, NodeId, Struct
from dht.requests import Done, Store
from dht.rows import split_group_key
from dht.wire.identity import NodeIdentity
from lucd import messages, version
from lucd.messages import NodeLine, TabletLine
from lucd.recovery import Recoverer, Salvage

Counters = Mapping[str, int | float]


@dataclass(frozen=True, slots=True)
class Parts:
    """Where a report reads.

    `state`: one phrase for a human while the daemon starts or stops, empty while it serves. `home`: the PoP of a
    database; raises NotFound. `contacts`: the overlay's nodes with PoP and address. `counters`: part -> its counters
    now. `warnings`: of the daemon's own parts.
    """

    identity: NodeIdentity
    cluster_id: str
    address: str
    failure_domain: str
    state: Callable[[], str]
    domain: Domain
    tablet_of: Callable[[GroupKey], int]
    store: Store
    home: Callable[[str], Awaitable[str]]
    alive: Callable[[NodeId], bool]
    disk_failed: Callable[[], str | None]
    contacts: Callable[[], dict[NodeId, tuple[str, str]]]
    counters: Callable[[], dict[str, Counters]]
    warnings: Callable[[], list[str]]
    salvage: Salvage


class Report:
    """Answers the daemon's own messages; `status` asks no peer and never waits."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._started_s = time.monotonic()
        self._recovery = Recoverer(parts.domain, parts.salvage)

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
                return await self._recovery.order(message)
            case messages.DrainNode():
                return await self.drain(message.node_id, lost=message.lost)
            case _:
                raise Invalid(f"{type(message).__name__} is not a question to the daemon")

    def status(self) -> messages.StatusReply:
        parts = self._parts
        health: dict[str, Any] = parts.domain.health()
        members = health.get("members", [])
        tablets = health.get("tablets", {})
        state = self._state(tablets)
        silent = [f"node {m['node_id']} at {m['address']} does not answer" for m in members if not m["reachable"]]
        warnings = [*health.get("warnings", ()), *silent, *parts.warnings()]
        failed = parts.disk_failed()
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
        )

    def _state(self, tablets: dict[str, int]) -> str:
        """Why this node does not serve; empty when it does."""
        parts = self._parts
        if (failed := parts.disk_failed()) is not None:
            return failed
        if state := parts.state():
            return state
        if stopped := parts.domain.generations.stopped:
            return stopped
        if parts.domain.removed:
            return f"removed from domain {parts.domain.name}: wipe the data directory, then join again"
        if not parts.domain.joined:
            return f"joining domain {parts.domain.name}"
        if tablets.get("unavailable", 0):
            return f"{tablets['unavailable']} tablets have no majority: waiting for other members"
        return ""

    def nodes(self) -> messages.NodesReply:
        parts = self._parts
        roster = parts.domain.chain.newest
        lines = {m.node_id: self._member_line(roster, m) for m in roster.members} if roster is not None else {}
        for node_id, (pop, address) in parts.contacts().items():
            if node_id not in lines:
                lines[node_id] = self._line(node_id, pop, "?", address, "contact")
        own = parts.identity
        if own.node_id not in lines:
            lines[own.node_id] = self._line(own.node_id, own.pop, parts.failure_domain, parts.address, "contact")
        return messages.NodesReply(tuple(lines[node_id] for node_id in sorted(lines)))

    def domain(self, name: str) -> messages.DomainReply:
        roster = self._roster(name)
        health: dict[str, Any] = self._parts.domain.health()
        return messages.DomainReply(
            roster.domain,
            roster.generation,
            roster.epoch,
            tuple(self._copying(self._member_line(roster, m), health) for m in roster.members),
            tuple(self._tablet_line(tablet, roster.replicas(tablet)) for tablet in range(len(roster.tablets))),
            tuple(health.get("survivable", ())),
            self._recovery.all(),
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

    async def where(self, key: GroupKey) -> messages.WhereReply:
        """Raises Invalid for a group of another PoP: its roster is known there."""
        roster = self._roster("")
        tablet = self._parts.tablet_of(key)
        database = split_group_key(key)[0]
        with contextlib.suppress(NotFound):
            home = await self._parts.home(database) if database else roster.domain
            if home != roster.domain:
                raise Invalid(f"database {database} lives in PoP {home}; ask a node there where its groups are")
        replicas = roster.replicas(tablet)
        (found,) = await self._parts.store.read([key])
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
        await self._parts.domain.leave(node, drain=not lost)
        return Done()

    def _roster(self, name: str) -> Roster:
        domain = self._parts.domain
        if name not in ("", domain.name):
            raise NotFound(f"this node knows no domain {name}; it belongs to {domain.name}")
        return domain.roster

    def _reachable(self, node: NodeId) -> bool:
        return node == self._parts.identity.node_id or self._parts.alive(node)

    def _member_line(self, roster: Roster | None, member: Member) -> NodeLine:
        role = "voter" if roster is not None and member.node_id in roster.voters else "member"
        role = f"{role}, leaving" if member.leaving else role
        return self._line(member.node_id, member.pop, member.failure_domain, member.address, role)

    def _line(self, node: NodeId, pop: str, failure_domain: str, address: str, role: str) -> NodeLine:
        own = node == self._parts.identity.node_id
        return NodeLine(node.hex(), pop, failure_domain, address, role, self._reachable(node), own)

    def _tablet_line(self, tablet: int, replicas: TabletReplicas) -> TabletLine:
        try:
            self._parts.domain.admit(tablet, replicas.epoch)
        except DhtError:
            serving = False
        else:
            serving = True
        return TabletLine(tablet, replicas.epoch, tuple(n.hex() for n in replicas.nodes), serving)


def counters_of(part: Any) -> Counters:
    """The counters of a part, whether it keeps them in a dict or a dataclass."""
    found = part.counters
    if dataclasses.is_dataclass(found) and not isinstance(found, type):
        return dataclasses.asdict(found)
    result: Counters = dict(found)
    return result
