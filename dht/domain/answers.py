"""What a node answers to the others of its domain, and what it tells them of itself.

Each request names its domain, and goes to the part of this package that keeps what it is about. Three things hold for
all of them. A node that met a higher generation has stopped: it says where it stands, and nothing else. Before it votes
on a link it has those before that one, fetched from who proposes. And who asks shows by its question how far it is: one
that is ahead, in this generation or in a later one, is asked in turn.

The status is what the others are told without asking for a thing in particular: the newest link, the tablets, whom this
node does not hear, and in a domain over all PoPs the word of its own PoP (`dht.domain.wide`).
"""

from __future__ import annotations

from collections.abc import Callable

from dht.codec import Message
from dht.domain.collection import Collection
from dht.domain.context import Context
from dht.domain.decree import DecreeAcceptor
from dht.domain.followed import Followed
from dht.domain.generations import Generations
from dht.domain.joining import Standing
from dht.domain.lookout import RETURN_AFTER_S, Lookout
from dht.domain.membership import Membership
from dht.domain.messages import (
    LINKS_PER_PAGE,
    AskChanges,
    AskHeaders,
    AskJoin,
    AskLeave,
    AskLinks,
    AskMarks,
    AskRecovery,
    AskRegisters,
    AskSeal,
    AskStatus,
    AskTombstones,
    Collect,
    DecreeAccept,
    DecreePrepare,
    DomainMessage,
    Links,
    Newest,
    Status,
    TabletMark,
    TellLink,
    TellTablets,
)
from dht.domain.repair import Repair
from dht.domain.source import Source
from dht.domain.transfer import Transfer
from dht.domain.wide import Word
from dht.errors import NotFound, NotServing, RemoteProtocolError
from dht.model import NodeId, Struct


class Answers:
    """`changed`: views of the tablets are to be made anew."""

    def __init__(
        self,
        context: Context,
        standing: Standing,
        acceptor: DecreeAcceptor,
        source: Source,
        followed: Followed,
        membership: Membership,
        generations: Generations,
        collection: Collection,
        transfer: Transfer,
        repair: Repair,
        lookout: Lookout,
        changed: Callable[[], None],
    ) -> None:
        self._local = context.local.member()
        self._standing = standing
        self._chain = context.chain
        self._tablets = context.tablets
        self._watch = context.watch
        self._peers = context.peers
        self._acceptor = acceptor
        self._source = source
        self._followed = followed
        self._membership = membership
        self._generations = generations
        self._collection = collection
        self._transfer = transfer
        self._repair = repair
        self._lookout = lookout
        self._clock = context.clock
        self._changed = changed
        self._wide = context.wide

    async def answer(self, sender: NodeId, message: Struct) -> Message:
        """Serve a peer. Raises NotFound for another domain, RemoteProtocolError for what is no domain message."""
        if not isinstance(message, DomainMessage):
            raise RemoteProtocolError(f"{type(message).__name__} is no message of a domain")
        if message.domain != self._chain.domain:
            raise NotFound(f"domain {message.domain} is not kept on this node; it keeps {self._chain.domain}")
        if self._generations.superseded and not isinstance(message, AskStatus):
            # Its links neither: who joins must not begin with a chain that is over.
            raise NotServing(self._generations.stopped, domain=self._chain.domain, roster_epoch=self._chain.epoch)
        match message:
            case AskLinks():
                await self._chain.durable()
                limit = max(1, min(message.limit, LINKS_PER_PAGE))
                return Links(self._chain.after(message.after, limit), self._chain.epoch)
            case TellLink():
                await self._peers.learn(message.link, sender)
                return Newest(self._chain.epoch)
            case DecreePrepare():
                await self._peers.catch_up(message.epoch - 1, sender)
                return await self._acceptor.prepare(message)
            case DecreeAccept():
                await self._peers.catch_up(message.epoch - 1, sender)
                return await self._acceptor.accept(message)
            case AskStatus():
                self._compare(sender, message)
                return self.status()
            case TellTablets():
                return self._told(sender, message)
            case AskJoin():
                return await self._membership.join(sender, message)
            case AskLeave():
                return await self._membership.leave(message)
            case _:
                return await self._hand_over(sender, message)

    async def _hand_over(self, sender: NodeId, message: DomainMessage) -> Message:
        match message:
            case AskSeal():
                return await self._source.seal(sender, message)
            case AskHeaders():
                return self._source.headers(message)
            case AskRegisters():
                return self._source.registers(message)
            case AskChanges():
                return await self._followed.changes(message)
            case AskMarks():
                return await self._followed.marks(message)
            case AskRecovery():
                return await self._generations.grant(sender, message)
            case AskTombstones():
                return await self._collection.acknowledge(message)
            case Collect():
                return await self._collection.collect(message)
            case _:
                raise RemoteProtocolError(f"{type(message).__name__} is not served by a domain")

    def _compare(self, sender: NodeId, message: AskStatus) -> None:
        """Who asks may hold newer links, or those of a generation that began without this node."""
        if self._generations.is_higher(message.generation, message.branch):
            self._generations.meet_soon(sender, message.generation)
        elif (message.generation, message.branch) == (
            self._chain.generation,
            self._chain.branch,
        ) and message.epoch > self._chain.epoch:
            self._lookout.refresh()

    def _told(self, sender: NodeId, message: TellTablets) -> Newest:
        newest = self._chain.newest
        if newest is not None and newest.member(sender) is not None and message.generation == newest.generation:
            self._watch.told(sender, message.tablets)
            if message.epoch > self._chain.epoch:
                self._lookout.refresh()
            self._changed()
        return Newest(self._chain.epoch)

    def status(self) -> Status:
        """What the other members are told about this one."""
        marks = []
        for tablet in sorted({*self._tablets.known(), *self._transfer.remaining}):
            state = self._tablets.state(tablet)
            current = state.current if self._tablets.confirmed(tablet) else 0
            groups, size_bytes = self._transfer.remaining.get(tablet) or self._repair.remaining.get(tablet, (0, 0))
            marks.append(TabletMark(tablet, current, state.sealed, groups, state.agreed, size_bytes))
        silences = self._watch.silent_s(self._clock.monotonic())
        silent = tuple((n, s) for n, s in silences.items() if s > RETURN_AFTER_S)
        return Status(
            self._chain.epoch,
            self._local.incarnation,
            tuple(marks),
            silent,
            self._chain.generation,
            self._chain.branch,
            self._word(),
        )

    def _word(self) -> Word:
        newest = self._chain.newest
        if self._wide is None or newest is None or not self._standing.joined:
            return Word()
        return self._wide.word([m.node_id for m in newest.members if m.pop == self._local.pop])
