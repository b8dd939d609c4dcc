"""Rows by their columns, in whatever group they are (DESIGN section 6, find).

Each replica answers from its own indexes, and its indexes may be behind. The answer counts under the coverage rule:

* for each tablet a majority of its replicas answered, at one tablet epoch, with indexes of the asked catalog version;
* one of them, the sender, gave the rows; the others gave (group, ballot) of what matches at theirs. All name, matching
  or not, the groups that are unsettled there (an accepted value that may not be chosen, or an intent), with the ballot.
  A group whose ballot is the same at a majority, the sender among them, stands at a chosen state, and the sender's rows
  of it, or that it has none that match, are the answer; a ballot of an earlier tablet epoch also has to be marked at
  one of them, or to be that of all replicas (`roster.proven`);
* every other group that anybody named, and every group in which anybody met an intent, is read by itself and matched
  again.

Why nothing is missed: a chosen state that matches was accepted by a majority, so a covering majority contains a replica
that holds it or something newer. If it is newest there and settled, that replica names the group; if not settled, it
names it as unsettled.

A limit cuts at each replica. Behind the last row that a replica gave nothing is known of it, so the merged rows count
only up to the nearest such place; if they are too few, all are asked again for more. Rows of one replica that do not
fit a frame would not fit the asker's answer to his client either: Invalid, so that he asks for less.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import msgspec

from dht.domain.roster import TabletReplicas, proven, quorums
from dht.errors import DhtError, Invalid, NotServing, Unavailable
from dht.limits import FIND_ROWS_MAX, PEER_TIMEOUT_S, READ_GROUPS_MAX
from dht.model import ZERO, Ballot, FindQuery, FindResult, FoundRow, GroupKey, GroupRead, NodeId
from dht.register.acceptor import Acceptor
from dht.register.admission import check_query
from dht.register.context import Context
from dht.register.messages import FindReplica, FindReplicaReply, Wanted
from dht.register.reach import Reach
from dht.register.reader import Reader
from dht.register.rounds import Rounds, expect
from dht.rows import table_prefix
from dht.storage.search import row_order, row_test

FIND_AGAIN_MIN_S = 0.002
FIND_AGAIN_MAX_S = 0.020
MAJORITY_WAIT_S = 0.05
"""How long the replicas asked first have, before the others are asked too; how often it is looked who is silent."""
LIMIT_SLACK_ROWS = 16
"""Asked for beyond the limit, so that rows that turn out not to match rarely cost another round; not more than are
wanted, or a page of one large row would not fit a frame for the sake of those behind it."""
WHOLE_GROUPS_BYTES_MAX = 12 * 1024 * 1024

Learn = Callable[[str, int], Awaitable[int]]
"""(database, wanted catalog version) -> the version that this node's indexes follow now."""


class FindServer:
    """A replica's share of a find."""

    def __init__(self, context: Context, acceptor: Acceptor, learn: Learn) -> None:
        self._context = context
        self._acceptor = acceptor
        self._learn = learn

    async def serve(self, request: FindReplica) -> FindReplicaReply:
        """Matches of the tablets that this replica serves at the asked epochs; awaits what it tells."""
        query = request.query
        if not len(request.tablets) == len(request.epochs) == len(request.rows):
            raise Invalid(f"{len(request.tablets)} tablets do not go with their epochs and what is asked of them")
        if not 1 <= request.limit <= FIND_ROWS_MAX:
            raise Invalid(f"{request.limit} rows were asked for; it is between 1 and {FIND_ROWS_MAX}")
        check_query(query)
        link = self._context.domain.roster.epoch
        if await self._learn(query.database, query.catalog_version) < query.catalog_version:
            return FindReplicaReply((), (), (), (), (), False, (), link)
        reply, number = self._search(request, link)
        await self._acceptor.durable(number)
        return reply

    def _search(self, request: FindReplica, link: int) -> tuple[FindReplicaReply, int]:
        """Synchronous, so that matches, ballots and unsettled groups are of one moment."""
        context, file = self._context, self._context.file
        query = msgspec.structs.replace(request.query, limit=request.limit)
        sends: dict[int, bool] = dict(zip(request.tablets, request.rows, strict=True))
        if not context.domain.admits(request.tablets, request.epochs):
            for tablet, epoch in zip(request.tablets, request.epochs, strict=True):
                try:
                    context.domain.admit(tablet, epoch)
                except NotServing:
                    if context.rules.serving_only:
                        sends.pop(tablet, None)
        matches, truncated = file.find_local(query, sends, request.limit)
        unsettled = file.unsettled(query.database, query.table, sends) if context.rules.find_lists_unsettled else []
        if not context.rules.find_intents:
            unsettled = [key for key in unsettled if not file.header(key).intents]
        ballots: dict[GroupKey, Ballot] = {}
        unmarked: dict[GroupKey, Ballot] = {}
        found: list[FoundRow] = []
        number = 0
        for key, rowkey, row in matches:
            ballot = ballots.get(key)
            if ballot is None:
                header = file.header(key)
                ballot = ballots[key] = header.accepted
                if header.chosen != ballot:
                    unmarked[key] = ballot
                number = max(number, self._acceptor.pending(key))
            if sends[file.tablet(key)]:
                found.append(FoundRow(key, ballot, rowkey, row))
        horizon = b""
        if truncated:
            horizon = row_order(query, file.pk_columns(query.database, query.table))(matches[-1])
        standing: dict[GroupKey, Ballot] = {}
        for key in unsettled:
            header = file.header(key)
            standing[key] = ZERO if header.intents else header.accepted
            number = max(number, self._acceptor.pending(key))
        if context.rules.find_lists_unsettled:
            # As far as this table goes they may be settled, and the ballot, which another table's row brought, not.
            standing |= {key: ballot for key, ballot in unmarked.items() if key not in standing}
        others = {key: ballot for key, ballot in ballots.items() if not sends[file.tablet(key)]}
        groups = self._whole(found, ballots) if query.whole_groups else ()
        reply = FindReplicaReply(
            tuple(sends),
            tuple(found),
            tuple(others),
            tuple(others.values()),
            tuple(standing),
            truncated,
            groups,
            link,
            horizon,
            tuple(standing.values()),
        )
        return reply, number

    def _whole(self, found: list[FoundRow], ballots: dict[GroupKey, Ballot]) -> tuple[GroupRead, ...]:
        """The rows' groups, as far as they fit a frame; the asker reads the others."""
        out = []
        room = WHOLE_GROUPS_BYTES_MAX
        for key in dict.fromkeys(row.group for row in found):
            room -= self._context.file.header(key).size_bytes
            if room < 0:
                break
            out.append(GroupRead(key, ballots[key], self._acceptor.rows(key, Wanted.DATA)))
        return tuple(out)


@dataclass(frozen=True, slots=True)
class _Share:
    """Tablets that the same nodes keep: what each of them is asked of these, with their rows or without."""

    nodes: frozenset[NodeId]
    quorum: int
    tablets: tuple[int, ...]
    epochs: tuple[int, ...]


class _Asked:
    """What one node is asked."""

    __slots__ = ("epochs", "rows", "shares", "tablets")

    def __init__(self) -> None:
        self.shares: list[int] = []
        self.tablets: tuple[int, ...] = ()
        self.epochs: tuple[int, ...] = ()
        self.rows: tuple[bool, ...] = ()

    def add(self, number: int, share: _Share, rows: bool) -> None:
        self.shares.append(number)
        self.tablets += share.tablets
        self.epochs += share.epochs
        self.rows += (rows,) * len(share.tablets)

    @property
    def sends(self) -> bool:
        """Whether it is asked for any rows."""
        return True in self.rows


def _shares_of(views: tuple[TabletReplicas, ...]) -> tuple[_Share, ...]:
    """The tablets by who keeps them. In a PoP of three nodes these are the same for all."""
    kept: dict[frozenset[NodeId], list[int]] = {}
    for tablet, replicas in enumerate(views):
        kept.setdefault(frozenset(replicas.nodes), []).append(tablet)
    return tuple(
        _Share(nodes, quorums(len(nodes))[0], tuple(tablets), tuple([views[tablet].epoch for tablet in tablets]))
        for nodes, tablets in kept.items()
    )


class _Collected:
    """What a round of replies says, tablet by tablet and group by group.

    `sent`: where the senders stand with the groups that they named. `unsettled`: groups to read in any case. `marked`:
    what a replica named as known to be chosen.
    """

    def __init__(
        self,
        tablet_of: Callable[[GroupKey], int],
        views: tuple[TabletReplicas, ...],
        shares: tuple[_Share, ...],
    ) -> None:
        self._tablet_of = tablet_of
        self._shares = shares
        self._whole = [0] * len(shares)
        """By how many each share is covered whole."""
        self._parts: dict[int, int] = {}
        """By how many a tablet is covered besides, who do not cover all that they were asked for."""
        self.replicas = views
        self.marked: dict[GroupKey, Ballot] = {}
        self.rows: dict[GroupKey, list[FoundRow]] = {}
        self.votes: dict[GroupKey, dict[Ballot, int]] = {}
        self.sent: dict[GroupKey, Ballot] = {}
        self.unsettled: dict[GroupKey, None] = {}
        self.groups: dict[GroupKey, GroupRead] = {}
        self.horizons: list[bytes] = []
        self.link = 0

    def missing(self) -> list[int]:
        """The tablets that no majority has covered."""
        missing: list[int] = []
        for share, whole in zip(self._shares, self._whole, strict=True):
            if (need := share.quorum - whole) > 0:
                missing += [tablet for tablet in share.tablets if self._parts.get(tablet, 0) < need]
        return missing

    def add(self, reply: FindReplicaReply, asked: _Asked) -> None:
        """`asked`: what this replica was asked for."""
        self.link = max(self.link, reply.link)
        if reply.covered == asked.tablets:
            for number in asked.shares:
                self._whole[number] += 1
        else:
            for tablet in reply.covered:
                self._parts[tablet] = self._parts.get(tablet, 0) + 1
        sends = frozenset([tablet for tablet, rows in zip(asked.tablets, asked.rows, strict=True) if rows])
        mine: dict[GroupKey, Ballot] = dict(zip(reply.keys, reply.ballots, strict=False))
        for row in reply.rows:
            self.rows.setdefault(row.group, []).append(row)
            self.sent[row.group] = mine[row.group] = row.ballot
        unsettled = dict.fromkeys(reply.unsettled)
        self.marked.update((key, ballot) for key, ballot in mine.items() if key not in unsettled)
        for i, key in enumerate(reply.unsettled):
            ballot = reply.unsettled_ballots[i] if reply.unsettled_ballots else ZERO
            if ballot == ZERO:
                self.unsettled[key] = None
                continue
            mine[key] = ballot
            if self._tablet_of(key) in sends:
                self.sent[key] = ballot
        for key, ballot in mine.items():
            votes = self.votes.setdefault(key, {})
            votes[ballot] = votes.get(ballot, 0) + 1
        self.groups.update({group.key: group for group in reply.groups})
        if reply.truncated:
            self.horizons.append(reply.horizon)


class Finder:
    """Finds for whoever asks at this node."""

    def __init__(self, context: Context, server: FindServer, reader: Reader, rounds: Rounds, reach: Reach) -> None:
        self._context = context
        self._reach = reach
        self._server = server
        self._rounds = rounds
        self._reader = reader
        self._views: tuple[TabletReplicas, ...] = ()
        self._shares: tuple[_Share, ...] = ()

    async def find(self, query: FindQuery, deadline: float) -> FindResult:
        """Raises Unavailable when some tablet has no majority in time, Invalid when there are too many rows."""
        context = self._context
        context.count("finds")
        limit = FIND_ROWS_MAX
        if query.order is not None and query.limit is not None:
            limit = min(query.limit + max(1, min(query.limit, LIMIT_SLACK_ROWS)), FIND_ROWS_MAX)
        while True:
            collected = await self._covering(query, limit, deadline)
            result = await self._merge(query, collected, limit, deadline)
            if result is not None:
                return result
            context.count("finds_again")
            limit = min(limit * 8, FIND_ROWS_MAX)

    async def _covering(self, query: FindQuery, limit: int, deadline: float) -> _Collected:
        """Replies that cover every tablet."""
        context = self._context
        while True:
            views = context.domain.views()
            if views is not self._views:
                self._views, self._shares = views, _shares_of(views)
            for share in self._shares:
                self._reach.check(sorted(share.nodes), f"table {query.table} cannot be searched")
            collected = await self._ask_all(query, limit, deadline)
            missing = collected.missing()
            if not missing or not context.rules.find_majority:
                return collected
            if context.remaining(deadline) <= 0:
                raise Unavailable(
                    f"{len(missing)} of {len(views)} tablets have no majority of replicas that "
                    f"can search table {query.table} now; try again when more nodes are reachable"
                )
            if collected.link:
                # Somebody answered and still a tablet is not covered: our view of it may be old.
                try:
                    await context.domain.refresh(collected.link)
                except DhtError:
                    context.count("refreshes_failed")
            await context.clock.sleep(context.chance.uniform(FIND_AGAIN_MIN_S, FIND_AGAIN_MAX_S))

    async def _ask_all(self, query: FindQuery, limit: int, deadline: float) -> _Collected:
        """One request to each of as few nodes as cover all tablets, and soon to the others if those do not.

        Raises Invalid where a reply does not fit a frame.
        """
        context = self._context
        collected = _Collected(context.file.tablet, self._views, self._shares)
        asked: dict[NodeId, _Asked] = {}
        rest: dict[NodeId, _Asked] = {}
        order = self._order(self._shares)
        for number, share in enumerate(self._shares):
            for i, node in enumerate(sorted(share.nodes, key=order.__getitem__)):
                whom = asked if i < share.quorum else rest
                if node not in whom:
                    whom[node] = _Asked()
                whom[node].add(number, share, i == 0)
        waiting: dict[asyncio.Task[FindReplicaReply | Invalid | None], tuple[NodeId, _Asked]] = {}

        def ask(frames: dict[NodeId, _Asked]) -> None:
            for node, what in frames.items():
                waiting[context.spawn(self._ask(node, query, what, limit, deadline))] = node, what

        ask(asked)
        while waiting and (collected.missing() or any(what.sends for _, what in waiting.values())):
            done, _ = await asyncio.wait(waiting, timeout=MAJORITY_WAIT_S, return_when=asyncio.FIRST_COMPLETED)
            for task in [task for task in waiting if task in done]:
                _, what = waiting.pop(task)
                reply = task.result()
                if isinstance(reply, Invalid):
                    raise reply
                if reply is not None:
                    collected.add(reply, what)
            if rest and (not done or not waiting) and collected.missing():
                ask(rest)
                rest = {}
            elif not done and not any(context.network.alive(node) for node, _ in waiting.values()):
                context.count("finds_given_up")
                break
        return collected

    def _order(self, shares: tuple[_Share, ...]) -> dict[NodeId, int]:
        """In what order nodes are asked: this one, then those that live, the same few for all tablets of a find."""
        context = self._context
        everybody = sorted({node for share in shares for node in share.nodes})
        place = {
            node: (node != context.node, not context.network.alive(node), context.chance.random()) for node in everybody
        }
        return {node: i for i, node in enumerate(sorted(everybody, key=place.__getitem__))}

    async def _ask(
        self, node: NodeId, query: FindQuery, what: _Asked, limit: int, deadline: float
    ) -> FindReplicaReply | Invalid | None:
        """None: no answer. Invalid: it does not fit a frame."""
        request = FindReplica(query, what.tablets, what.epochs, what.rows, limit)
        timeout_s = min(PEER_TIMEOUT_S, self._context.remaining(deadline))
        try:
            if node == self._context.node:
                return await self._server.serve(request)
            return expect(await self._context.network.call(node, request, timeout_s), FindReplicaReply)
        except Invalid as error:
            return error
        except DhtError:
            self._context.count("find_replies_lost")
            return None

    async def _merge(self, query: FindQuery, collected: _Collected, limit: int, deadline: float) -> FindResult | None:
        """The result, or None when the limit cut so early that more rows must be asked for."""
        context = self._context
        pk = context.file.pk_columns(query.database, query.table)
        place = row_order(query, pk)
        clean, dirty = self._sort_out(collected)
        read = await self._read(dirty, deadline)
        rows = [row for key in clean for row in collected.rows.get(key, ())]
        rows += self._matching(query, pk, read)
        descending = query.order is not None and query.order.descending
        placed = sorted(((place((row.group, row.key, row.row)), row) for row in rows), key=_place, reverse=descending)
        if collected.horizons:
            if limit >= FIND_ROWS_MAX:
                raise Invalid(f"more than {FIND_ROWS_MAX} rows match; ask with narrower conditions or in pieces")
            nearest = max(collected.horizons) if descending else min(collected.horizons)
            placed = [one for one in placed if (one[0] >= nearest if descending else one[0] <= nearest)]
            if query.limit is None or len(placed) < query.limit:
                return None
        cut = query.limit if query.order is not None else None
        result = tuple(row for _, row in placed[:cut])
        groups: tuple[GroupRead, ...] = ()
        if query.whole_groups:
            groups = await self._groups(result, collected, read, deadline)
            at = {group.key: group.ballot for group in groups}
            if any(at[row.group] != row.ballot for row in result):
                return await self._merge(query, collected, limit, deadline)
        return FindResult(result, groups)

    def _sort_out(self, collected: _Collected) -> tuple[list[GroupKey], list[GroupKey]]:
        """(groups whose sent rows are a chosen state, groups to read by themselves)"""
        clean: list[GroupKey] = []
        dirty: list[GroupKey] = []
        for key, votes in collected.votes.items():
            ballot = collected.sent.get(key)
            tablet = self._context.file.tablet(key)
            replicas = collected.replicas[tablet]
            needed = quorums(len(replicas.nodes))[0]
            if ballot is None or votes[ballot] < needed or key in collected.unsettled:
                dirty.append(key)
                continue
            chosen = (
                collected.marked.get(key) == ballot
                or proven(ballot, replicas.epoch, votes[ballot], len(replicas.nodes))
                or not self._context.rules.inherited_marked
            )
            (clean if chosen else dirty).append(key)
        dirty += [key for key in collected.unsettled if key not in collected.votes]
        if dirty:
            self._context.count("find_groups_read", len(dirty))
        return clean, dirty

    async def _read(self, keys: list[GroupKey], deadline: float) -> dict[GroupKey, GroupRead]:
        out: dict[GroupKey, GroupRead] = {}
        for at in range(0, len(keys), READ_GROUPS_MAX):
            for group in await self._reader.read(keys[at : at + READ_GROUPS_MAX], None, deadline):
                out[group.key] = group
                # Marks may have been lost; the next find need not read this group by itself again.
                self._rounds.mark(self._context.replicas(group.key), group.key, group.ballot)
        return out

    @staticmethod
    def _matching(query: FindQuery, pk: tuple[int, ...], read: dict[GroupKey, GroupRead]) -> list[FoundRow]:
        matches = row_test(query, pk)
        prefix = table_prefix(query.table)
        return [
            FoundRow(group.key, group.ballot, rowkey, row)
            for group in read.values()
            for rowkey, row in (group.rows or {}).items()
            if rowkey.startswith(prefix) and matches(rowkey, row)
        ]

    async def _groups(
        self,
        rows: tuple[FoundRow, ...],
        collected: _Collected,
        read: dict[GroupKey, GroupRead],
        deadline: float,
    ) -> tuple[GroupRead, ...]:
        """The rows' groups: from the same round, or read by themselves."""
        keys = list(dict.fromkeys(row.group for row in rows))
        at = {row.group: row.ballot for row in rows}
        have = {key: group for key, group in {**collected.groups, **read}.items() if at.get(key) == group.ballot}
        absent = [key for key in keys if key not in have]
        fetched = await self._read(absent, deadline)
        for key, group in fetched.items():
            if group.ballot != at[key]:
                # It moved since the round: whoever merges again reads it as it is now.
                collected.unsettled[key] = None
            have[key] = group
        return tuple(have[key] for key in keys)


def _place(placed: tuple[bytes, FoundRow]) -> bytes:
    return placed[0]
