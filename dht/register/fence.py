"""Behind a fence nothing that was made under an older catalog changes the groups that it is for (DESIGN section 11).

A new unique index is built in this order: publish it, so that writers keep it ("maintained"); raise a fence; give the
rows that are there their entries; publish that look-ups may rely on it ("used"). The fence is what the third step
needs: a row that some writer adds without an entry, knowing nothing of the index, must be seen by it or never be.

Every promise tells the catalog version that its acceptor knows of, and nothing that was made under an older one is
proposed on it (`dht.register.operations`). A fence of a tablet takes, at one tablet epoch,

    confirm   an accept quorum of replicas follows the version durably. Any later promise has one of them in its quorum;
    list      each of them tells all groups of which it knows anything, were it only a promise. A proposal on an earlier
              promise had one of them in that promise's quorum, so its group is listed;
    settle    each listed group is prepared and accepted anew, as it is, by an accept quorum of them, a group without
              rows as a tombstone. Whoever accepts stands above all that he promised before: what was proposed on such a
              promise, at whichever minority it lies, is in the settled state, or too low ever to be found again;
    intents   those in the settled state are ended, by their transaction's outcome. Later ones are of later promises.

So it needs a majority, not everybody. A replica that was away learns the version from the next find or commit that
names it; one that joins gets it with the tablet's content, before it promises anything (`dht.domain.transfer`), and the
bare promises with it, as the list relies on them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from dht.domain.roster import TabletReplicas, quorums
from dht.errors import DhtError, Invalid, NotServing, Unavailable
from dht.model import GroupKey, NodeId
from dht.register import group
from dht.register.context import Context
from dht.register.group import Delta
from dht.register.messages import Accept, AskFence, Fenced, Verdict
from dht.register.operations import decode_intent
from dht.register.resolver import Resolver
from dht.register.rounds import Rounds, Standing, expect
from dht.rows import encode_value

LISTED_GROUPS_MAX = 5_000
SETTLED_AT_ONCE = 32
SLICE_S = 2.0
"""A call does what it can in this time and tells where to go on."""
_LEARN_S = 5.0
"""How long a replica has to fill the indexes of a new version."""

Confirm = Callable[[str, int], Awaitable[int]]
"""(database, version) -> the version that this node follows durably now."""


class Fence:
    """Raises fences for whoever asks at this node, and confirms those of others."""

    def __init__(self, context: Context, rounds: Rounds, resolver: Resolver, confirm: Confirm) -> None:
        self._context = context
        self._rounds = rounds
        self._resolver = resolver
        self._confirm = confirm

    async def serve(self, request: AskFence) -> Fenced:
        """A peer's question. What is listed is of one moment, after the version was durable."""
        context = self._context
        if len(request.tablets) != len(request.epochs):
            raise Invalid(f"{len(request.tablets)} tablets and {len(request.epochs)} epochs were given")
        version = await self._confirm(request.database, request.version)
        tablets: list[int] = []
        keys: list[tuple[GroupKey, ...]] = []
        room = LISTED_GROUPS_MAX
        for tablet, epoch in zip(request.tablets, request.epochs, strict=True):
            if room <= 0:
                break
            try:
                context.domain.admit(tablet, epoch)
            except NotServing:
                continue
            found = [key for prefix in request.prefixes for key in context.file.keys_with(tablet, prefix)]
            tablets.append(tablet)
            keys.append(tuple(dict.fromkeys(found)))
            room -= len(found)
        return Fenced(version, tuple(tablets), tuple(keys))

    async def raise_to(
        self, database: str, version: int, prefixes: Sequence[bytes], first: int, deadline: float
    ) -> int:
        """Raise the fence in the tablets from `first` on; where to go on, or -1 when it is raised in all of them.

        Raises Unavailable when a tablet has no majority of replicas that can confirm the version in time.
        """
        context = self._context
        name = encode_value(database)
        if version < 1:
            raise Invalid(f"a fence of {database!r} needs a version of its catalog, not {version}")
        if any(not prefix.startswith(name) for prefix in prefixes):
            raise Invalid(f"a fence of {database!r} is asked for groups that are not of this database")
        began = context.clock.monotonic()
        count = len(context.domain.roster.tablets)
        while first < count:
            at = first
            tablets = list(range(first, count))
            for tablet, (replicas, confirmed, keys) in (await self._list(database, version, prefixes, tablets)).items():
                if tablet != first or not await self._settle_all(replicas, confirmed, keys, version, deadline):
                    break
                first += 1
                if context.clock.monotonic() - began > SLICE_S and first < count:
                    return first
            if first == at:
                if context.remaining(deadline) <= 0:
                    raise Unavailable(
                        f"tablet {first} has no majority of replicas that confirm version {version} of the catalog of "
                        f"{database!r} and settle what was begun before; run the statement again when more nodes are "
                        "reachable"
                    )
                await context.back_off()
        context.count("fences")
        return -1

    # Confirm and list.

    async def _list(
        self, database: str, version: int, prefixes: Sequence[bytes], tablets: list[int]
    ) -> dict[int, tuple[TabletReplicas, dict[NodeId, None], dict[GroupKey, None]]]:
        """By tablet, ascending, where an accept quorum confirmed: its replicas, who confirmed, and the groups."""
        context = self._context
        replicas = {tablet: context.domain.replicas(tablet) for tablet in tablets}
        asked: dict[NodeId, list[int]] = {}
        for tablet, listed in replicas.items():
            alive = [node for node in listed.nodes if node == context.node or context.network.alive(node)]
            enough = len(alive) >= quorums(len(listed.nodes))[0]
            for node in alive if enough else listed.nodes:
                asked.setdefault(node, []).append(tablet)
        waiting: dict[asyncio.Task[Fenced | None], NodeId] = {}
        for node, of in asked.items():
            epochs = tuple(replicas[tablet].epoch for tablet in of)
            request = AskFence(database, version, tuple(prefixes), tuple(of), epochs)
            waiting[context.spawn(self._ask(node, request))] = node
        confirmed: dict[int, dict[NodeId, None]] = {}
        keys: dict[int, dict[GroupKey, None]] = {}
        covered: dict[int, TabletReplicas] = {}
        while waiting and len(covered) < len(replicas):
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in [task for task in waiting if task in done]:
                node = waiting.pop(task)
                reply = task.result()
                if reply is None or reply.version < version:
                    continue
                for tablet, found in zip(reply.tablets, reply.keys, strict=False):
                    confirmed.setdefault(tablet, {})[node] = None
                    keys.setdefault(tablet, {}).update(dict.fromkeys(found))
            covered = {
                tablet: listed
                for tablet, listed in replicas.items()
                if len(confirmed.get(tablet, ())) >= quorums(len(listed.nodes))[0]
            }
        return {tablet: (listed, confirmed[tablet], keys[tablet]) for tablet, listed in covered.items()}

    async def _ask(self, node: NodeId, request: AskFence) -> Fenced | None:
        try:
            if node == self._context.node:
                return await self.serve(request)
            return expect(await self._context.network.call(node, request, _LEARN_S), Fenced)
        except DhtError:
            self._context.count("fences_not_confirmed")
            return None

    # Settle.

    async def _settle_all(
        self,
        replicas: TabletReplicas,
        confirmed: dict[NodeId, None],
        keys: dict[GroupKey, None],
        version: int,
        deadline: float,
    ) -> bool:
        """Settle the groups and end what is open in them. False: not all, or the tablet's replicas changed."""
        if not self._context.rules.fence_settles_groups:
            return True
        waiting = list(keys)
        for at in range(0, len(waiting), SETTLED_AT_ONCE):
            chunk = waiting[at : at + SETTLED_AT_ONCE]
            done = await asyncio.gather(
                *(self._settle_soon(key, replicas, confirmed, version, deadline) for key in chunk)
            )
            if not all(done):
                return False
        return True

    async def _settle_soon(
        self, key: GroupKey, replicas: TabletReplicas, confirmed: dict[NodeId, None], version: int, deadline: float
    ) -> bool:
        """Settle one group and end its intents, in time."""
        context = self._context
        standing = Standing(key)
        while not await self._settle(standing, replicas, confirmed):
            if context.remaining(deadline) <= 0 or context.replicas(key).epoch != replicas.epoch:
                return False
            await context.back_off()
        context.count("groups_settled")
        state = standing.state
        assert state is not None
        if context.rules.fence_ends_intents:
            for row in list(state.intents.values()):
                intent = decode_intent(row)
                if intent.version < version and not await self._end(key, intent.id, deadline):
                    return False
        return True

    async def _settle(self, standing: Standing, replicas: TabletReplicas, confirmed: dict[NodeId, None]) -> bool:
        """Have a quorum among those who confirmed accept the group as it is, at a new ballot. False: try again."""
        context = self._context
        standing.drop()
        if not await self._rounds.prepare(standing, replicas):
            return False
        state, ballot = standing.state, standing.promised
        assert state is not None
        assert ballot is not None
        delta: Delta = {}
        base = state.ballot
        group.pin_floor(state, delta)
        state.apply(delta)
        state.ballot = ballot
        digest = group.digest_bytes(state.digest)
        request = Accept(standing.key, ballot, None, base, False, delta, digest, state.deleted)
        whole = Accept(standing.key, ballot, None, base, True, dict(state.rows), digest, state.deleted)
        work = [(node, context.spawn(self._accept_at(standing, node, request, whole))) for node in replicas.nodes]
        missing = quorums(len(replicas.nodes))[0]
        for node, task in work:
            # One who is silent is not waited for, unless it takes him.
            if node in confirmed and missing > 0:
                missing -= await task
        if missing > 0:
            return False
        self._rounds.mark(replicas, standing.key, ballot)
        return True

    async def _accept_at(self, standing: Standing, node: NodeId, request: Accept, whole: Accept) -> bool:
        try:
            reply = await self._rounds.send_accept(node, request)
            if reply.verdict == Verdict.NEED_WHOLE:
                reply = await self._rounds.send_accept(node, whole)
        except DhtError:
            self._context.count("settlements_lost")
            return False
        standing.hear(reply.promise)
        return reply.verdict == Verdict.ACCEPTED

    async def _end(self, key: GroupKey, id: bytes, deadline: float) -> bool:
        """Wait until the intent is gone, or end it. Whether it is."""
        context = self._context
        while context.remaining(deadline) > 0:
            try:
                intent = await self._resolver.open_intent(key, id, deadline)
                if intent is None:
                    return True
                await self._resolver.unblock(key, intent, deadline)
            except DhtError:
                context.count("intents_not_ended")
                await context.back_off()
        return False
