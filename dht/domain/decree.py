"""Single-decree Paxos: the voters of link e decide link e+1, once (DESIGN section 5).

Acceptor state is durable before an answer (Space.DECREE, domain name, 0x00, epoch of the link to be decided) and kept
while the incarnation lives. A proposer that finds an accepted link carries that one on, so it may see another link
decided than it asked for. Nobody gets a promise that was given before: a node whose disk was wiped counts its starts
and its ballots from the first again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

import msgspec

from dht.domain.asking import Ask, ask_each
from dht.domain.chain import Chain
from dht.domain.messages import DecreeAccept, DecreeAccepted, DecreePrepare, DecreePromise
from dht.domain.roster import Roster, check_step
from dht.domain.rules import DomainRules
from dht.errors import NotServing, RemoteProtocolError, StorageError, Unavailable
from dht.limits import BACKOFF_MAX_S, BACKOFF_MIN_S
from dht.model import ZERO, Ballot, NodeId, Struct
from dht.world import Batch, Chance, Clock, Disk, Space

DECREE_ROUNDS_MAX: Final = 20


class DecreeState(Struct, frozen=True):
    promised: Ballot = ZERO
    accepted: Ballot = ZERO
    link: Roster | None = None


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(DecreeState).decode


def voters_for(chain: Chain, epoch: int, rules: DomainRules) -> tuple[NodeId, ...]:
    """Who decides link `epoch`."""
    return chain.link(epoch - 1 if rules.decided_by_previous_voters else max(1, epoch - 2)).voters


class DecreeAcceptor:
    """This node's votes. Only a voter that holds link e, with the incarnation that e lists, votes on e+1."""

    def __init__(self, chain: Chain, disk: Disk, node: NodeId, incarnation: bytes, rules: DomainRules) -> None:
        self._chain = chain
        self._disk = disk
        self._node = node
        self._incarnation = incarnation
        self._rules = rules

    async def prepare(self, request: DecreePrepare) -> DecreePromise:
        if (decided := self._decided(request.epoch)) is not None:
            return DecreePromise(ZERO, ZERO, None, decided)
        state = self._state(request.epoch)
        if request.ballot == state.promised and self._rules.ballot_promised_once:
            # Of the node that its proposer was before it lost its disk, whose accept may be on its way.
            raise Unavailable(f"ballot {tuple(request.ballot)} for link {request.epoch} is promised already; ask anew")
        if request.ballot > state.promised:
            state = DecreeState(request.ballot, state.accepted, state.link)
        await self._keep(request.epoch, state)
        return DecreePromise(state.promised, state.accepted, state.link)

    async def accept(self, request: DecreeAccept) -> DecreeAccepted:
        if (decided := self._decided(request.epoch)) is not None:
            return DecreeAccepted(ZERO, decided)
        state = self._state(request.epoch)
        if request.ballot >= state.promised:
            before = self._chain.link(request.epoch - 1)
            if request.link.generation != before.generation:
                raise RemoteProtocolError(
                    f"link {request.epoch} of domain {before.domain} begins a generation, which voters do not decide"
                )
            check_step(before, request.link)
            state = DecreeState(request.ballot, request.ballot, request.link)
        await self._keep(request.epoch, state)
        return DecreeAccepted(state.promised)

    def _decided(self, epoch: int) -> Roster | None:
        """The link if it is held; else raise unless this node may vote on it."""
        if epoch <= self._chain.epoch:
            return self._chain.link(epoch)
        if epoch > self._chain.epoch + 1:
            raise NotServing(
                f"link {epoch} of domain {self._chain.domain} cannot be voted on here: link {epoch - 1} is missing",
                domain=self._chain.domain,
                roster_epoch=self._chain.epoch,
            )
        before = self._chain.link(epoch - 1)
        listed = before.lists(self._node, self._incarnation) or not self._rules.incarnation_checked
        if self._node not in voters_for(self._chain, epoch, self._rules) or not listed:
            raise NotServing(
                f"this node (incarnation {self._incarnation.hex()[:8]}) is no voter of link {epoch - 1} of domain "
                f"{self._chain.domain}",
                domain=self._chain.domain,
                roster_epoch=self._chain.epoch,
            )
        return None

    def _key(self, epoch: int) -> bytes:
        return self._chain.domain.encode() + b"\x00" + epoch.to_bytes(8, "big")

    def _state(self, epoch: int) -> DecreeState:
        value = self._disk.get(Space.DECREE, self._key(epoch))
        try:
            return DecreeState() if value is None else _decode(value)
        except msgspec.MsgspecError as error:
            raise StorageError(f"the vote on link {epoch} cannot be read ({error}); this node votes no more") from None

    async def _keep(self, epoch: int, state: DecreeState) -> None:
        batch = Batch()
        batch.put(Space.DECREE, self._key(epoch), _encode(state))
        number = self._disk.submit(batch)
        await self._chain.durable()
        await self._disk.durable(number)


def _granted(ballot: Ballot, need: int) -> Callable[[Mapping[NodeId, DecreePromise | DecreeAccepted]], bool]:
    """Enough: so many granted the ballot, or one knows the decision."""

    def enough(replies: Mapping[NodeId, DecreePromise | DecreeAccepted]) -> bool:
        granted = sum(r.promised == ballot for r in replies.values())
        return granted >= need or any(r.decided is not None for r in replies.values())

    return enough


class DecreeProposer:
    """Gets a link decided. An error of `ask` counts as no vote."""

    def __init__(
        self, chain: Chain, node: NodeId, boot: int, clock: Clock, chance: Chance, ask: Ask, rules: DomainRules
    ) -> None:
        self._chain = chain
        self._node = node
        self._boot = boot
        self._clock = clock
        self._chance = chance
        self._ask = ask
        self._rules = rules
        self._op = 0
        self._round = 0

    async def propose(self, link: Roster) -> Roster:
        """The link decided at `link.epoch`, which may be another one. The caller stores and tells it.

        Raises Unavailable when no majority of the voters answered; the proposal may still be decided later.
        """
        voters = voters_for(self._chain, link.epoch, self._rules)
        need = len(voters) // 2 + 1
        answered = 0
        for _ in range(DECREE_ROUNDS_MAX):
            self._op += 1
            self._round += 1
            ballot = Ballot(link.generation, link.epoch, self._round, self._node, self._boot, self._op)
            prepare = DecreePrepare(link.domain, link.epoch, ballot)
            promises = list(
                (await ask_each(self._ask, voters, prepare, DecreePromise, _granted(ballot, need))).values()
            )
            answered = len(promises)
            if decided := next((p.decided for p in promises if p.decided), None):
                return decided
            granted = [p for p in promises if p.promised == ballot]
            if len(granted) >= need:
                best = max(granted, key=lambda p: p.accepted)
                value = best.link if best.link is not None else link
                accept = DecreeAccept(link.domain, link.epoch, ballot, value)
                accepts = list(
                    (await ask_each(self._ask, voters, accept, DecreeAccepted, _granted(ballot, need))).values()
                )
                if decided := next((a.decided for a in accepts if a.decided), None):
                    return decided
                if sum(a.promised == ballot for a in accepts) >= need:
                    return value
                self._round = max([self._round, *(a.promised.round for a in accepts)])
            self._round = max([self._round, *(p.promised.round for p in promises)])
            await self._clock.sleep(self._chance.uniform(BACKOFF_MIN_S, BACKOFF_MAX_S))
        raise Unavailable(
            f"link {link.epoch} of domain {link.domain} was not decided: {answered} of {len(voters)} voters answered "
            f"the last of {DECREE_ROUNDS_MAX} rounds; it is tried again when a majority is reachable"
        )
