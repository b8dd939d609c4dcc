"""What an old replica answers to those that take a tablet over: seals, and pages of its registers (rules 1 and 2)."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final

from dht.domain.context import Context
from dht.domain.messages import (
    AskHeaders,
    AskRegisters,
    AskSeal,
    Headers,
    RegisterCopy,
    RegisterMark,
    Registers,
    Sealed,
)
from dht.domain.roster import Roster
from dht.errors import NotServing, RemoteProtocolError
from dht.model import NodeId

PAGE_KEYS_MAX: Final = 2_000
REPLY_BYTES_MAX: Final = 1024 * 1024

Learn = Callable[[Roster, NodeId], Awaitable[None]]
"""Take a decided link, fetching those before it from the node."""


class Source:
    def __init__(self, context: Context, on_seal: Callable[[int], None]) -> None:
        self._node = context.node
        self._incarnation = context.local.incarnation
        self._chain = context.chain
        self._tablets = context.tablets
        self._registers = context.registers
        self._learn = context.peers.learn
        self._on_seal = on_seal
        self._durable = context.disk.durable
        self._rules = context.rules

    async def seal(self, sender: NodeId, request: AskSeal) -> Sealed:
        """Rule 1. The link is taken first, so that this node can point to it; the seal is durable before the answer."""
        await self._learn(request.link, sender)
        if self._chain.link(request.link.epoch) != request.link:
            raise RemoteProtocolError(f"seal asked for with another link {request.link.epoch} than the decided one")
        if request.link.replicas(request.tablet).epoch <= request.epoch:
            raise RemoteProtocolError(
                f"link {request.link.epoch} does not replace epoch {request.epoch} of tablet {request.tablet}"
            )
        if self._nothing_left(request):
            floor = self._tablets.state(request.tablet).floor
            return Sealed(self._incarnation, False, floor, self._registers.told_versions())
        self._refuse_stranger(request.tablet, request.epoch)
        number = self._tablets.seal(request.tablet, request.epoch)
        self._on_seal(request.tablet)
        await self._durable(number)
        # Read after the wait: an erasure in between has to be noticed.
        self._refuse_stranger(request.tablet, request.epoch)
        state = self._tablets.state(request.tablet)
        contributes = request.epoch in state.initialised or not self._rules.only_initialised_contribute
        return Sealed(self._incarnation, contributes, state.floor, self._registers.told_versions())

    def _nothing_left(self, request: AskSeal) -> bool:
        """Rule 8: a survivor that let the tablet go before the recovery has nothing to add, and must not stop it."""
        erased = request.epoch <= self._tablets.state(request.tablet).dropped
        return erased and self._chain.survivors(request.epoch, request.link.epoch) is not None

    def headers(self, request: AskHeaders) -> Headers:
        """One page; each register as it is now, which is as good as at the seal: no rule spans registers."""
        self._refuse_uninitialised(request.tablet, request.epoch, request.sealed)
        limit = max(1, min(request.limit, PAGE_KEYS_MAX))
        held = self._registers.headers(request.tablet, request.after, limit=limit + 1)
        marks = [RegisterMark(key, h.promise, h.accepted, h.chosen, h.size_bytes) for key, h in held[:limit]]
        return Headers(tuple(marks), len(held) > limit, self._tablets.state(request.tablet).floor)

    def registers(self, request: AskRegisters) -> Registers:
        self._refuse_uninitialised(request.tablet, request.epoch, request.sealed)
        copies: list[RegisterCopy] = []
        size_bytes = 0
        for key in request.keys[:PAGE_KEYS_MAX]:
            header = self._registers.header(key)
            if copies and size_bytes + header.size_bytes > REPLY_BYTES_MAX:
                break
            if self._registers.tablet(key) != request.tablet:
                raise RemoteProtocolError(f"a register of another tablet was asked for under tablet {request.tablet}")
            copies.append(RegisterCopy(key, header, self._registers.rows(key)))
            size_bytes += header.size_bytes
        return Registers(tuple(copies))

    def _refuse_stranger(self, tablet: int, epoch: int) -> None:
        """Only a replica of that epoch, with the incarnation that it had there, counts to its seal quorum."""
        link = self._chain.link(epoch)
        replicas = link.replicas(tablet)
        state = self._tablets.state(tablet)
        listed = link.lists(self._node, self._incarnation) or not self._rules.incarnation_checked
        if replicas.epoch != epoch or self._node not in replicas.nodes or not listed:
            raise self._not_serving(tablet, epoch, "this node, with this incarnation, was no replica")
        if epoch <= state.dropped:
            raise self._not_serving(tablet, epoch, "the content was erased")

    def _refuse_uninitialised(self, tablet: int, epoch: int, sealed: bool) -> None:
        state = self._tablets.state(tablet)
        if self._rules.only_initialised_contribute and epoch not in state.initialised:
            raise self._not_serving(tablet, epoch, "this replica was not initialised")
        if sealed and self._rules.seal and state.sealed < epoch:
            raise self._not_serving(tablet, epoch, "this replica is not sealed")

    def _not_serving(self, tablet: int, epoch: int, why: str) -> NotServing:
        return NotServing(
            f"tablet {tablet} cannot be handed over at epoch {epoch}: {why}",
            domain=self._chain.domain,
            tablet=tablet,
            roster_epoch=self._chain.epoch,
        )
