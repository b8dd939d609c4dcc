"""The groups of a database that is dropped are emptied, and nothing that a later one of its name writes there.

The registry first says that the database is being dropped (`dht.register.databases`): nobody serves it any more, nobody
creates another one of its name. Then, pass by pass, its groups are listed and each is emptied, until a pass finds all
of them empty; then the name becomes free. A dropper may pause anywhere, for any time, while another one finishes the
drop and a third creates the database again and writes to it. That does no harm:

* A node that has not heard of the drop goes on to write. What it writes before a listing is in that, or in the next.
  Behind the last one there is nothing: who answers it follows the catalog that the drop has emptied, so that his
  promises refuse what was made under an older one (`dht.register.fence`). An order leaves no promise behind, and a
  listing tells of those that were made since: such a group is ordered again.
* A listing tells where each group stands, the highest ballot that any replica of a majority has accepted, all of whom
  serve its tablet at one epoch. After it the dropper reads the registry again. If that still has the same creation of
  the database, being dropped, no later one had begun when the groups were listed. What a later one writes is above the
  listed ballot: to have that accepted anywhere a majority had promised it before, and one of them accepts the later
  write.
* The order to empty a group names the listed ballot. The group's coordinator obeys it only on a state that is chosen,
  and no higher: a later write may be accepted somewhere at an older promise, but is not chosen there. Whenever the
  order comes, it takes nothing that was written after the listing. A write that lies between, by a
  node that did not know of the drop yet, is in the next listing.

What was accepted by a minority before the drop, and told as unknown, must not come to light in a later database. It is
of a ballot that a majority had promised, so one of those who list the group's tablet knows of the group, and of a
promise as high. So every group of which anything is known is accepted anew by its order, were it empty or only
promised: no proposal of before is above that. Only a tombstone that is chosen, above which none of them has promised
anything, is left alone. The accept of an order brings no promise along, so the next drop leaves alone what this one has
emptied.

The passes come to an end: what an order finds above its ballot is chosen by then, or is chosen by the accept that this
order leads to, and so is seen by the next listing; a group that was found empty is not ordered again while it stands
where it was left and nobody has promised anything above that.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Final

from dht.errors import DhtError, NotServing, RemoteProtocolError, Unavailable
from dht.limits import PEER_TIMEOUT_S
from dht.model import ZERO, Ballot, GroupKey, NodeId, Part, Struct
from dht.register import catalog
from dht.register.context import Context
from dht.register.group import APPLIED
from dht.register.messages import Kind, ListGroups, ListGroupsReply, Operation
from dht.register.rounds import expect
from dht.register.routing import Router

_LIST_GROUPS_MAX: Final = 1_000
_TABLETS_LISTED_AT_ONCE: Final = 16
"""Their groups' keys are held in memory."""
_EMPTIED_AT_ONCE: Final = 64
GROUPS_HELD_MAX: Final = 10_000
"""So many groups that are not empty, and the tablets listed last, wait for one look at the registry."""
ANSWERS_KEPT_MAX: Final = 20_000
"""Groups known to be empty before their marks have come; one that is forgotten, and not marked, is asked once more."""

ListHere = Callable[[ListGroups], Awaitable[ListGroupsReply]]
Version = Callable[[str, float], Awaitable[int]]


class _Listed(Struct, frozen=True):
    """Where a group stands at most, and the highest promise. `gone`: to all who know of it as a chosen tombstone, with
    no promise above it.
    """

    ballot: Ballot
    gone: bool
    promise: Ballot


class Emptying:
    """One drop of one database by one node. `had_catalog`: whether it was more than a name in the registry."""

    def __init__(self, context: Context, list_here: ListHere, version: Version, router: Router, database: str) -> None:
        self.had_catalog = False
        self._context = context
        self._list_here = list_here
        self._version_of = version
        self._router = router
        self._database = database
        self._version = 0
        self._empty: dict[GroupKey, Ballot] = {}

    async def run(self, still: Callable[[], Awaitable[bool]], deadline: float) -> bool:
        """Until a pass finds all groups empty; False as soon as `still`, asked after a listing, denies that it goes on.

        Raises Unavailable or Indeterminate when that cannot be done in time; some groups are empty then.
        """
        passes = 0
        while (left := await self._pass(still, deadline)) is not None:
            # Who has told what is empty refuses from then on what was made under the dropped catalog.
            told = self._version
            if self._context.rules.drop_confirms_version:
                self._version = await self._version_of(self._database, deadline)
            if not left and told >= self._version:
                return True
            passes += 1
            if self._context.remaining(deadline) <= 0:
                raise Unavailable(f"{left} groups were not empty when they were listed last, and the time is over")
            if left and passes > 1:
                await self._context.back_off()
        return False

    async def _pass(self, still: Callable[[], Awaitable[bool]], deadline: float) -> int | None:
        """How many groups were not known to be empty; None: it does not go on."""
        count = len(self._context.domain.roster.tablets)
        left: dict[GroupKey, Ballot] = {}
        found = 0
        for first in range(0, count, _TABLETS_LISTED_AT_ONCE):
            tablets = range(first, min(first + _TABLETS_LISTED_AT_ONCE, count))
            left |= self._not_empty(await self._groups(tablets, deadline))
            if not left or (len(left) < GROUPS_HELD_MAX and tablets.stop < count):
                continue
            if not await still():
                return None
            found += len(left)
            keys = list(left)
            for at in range(0, len(keys), _EMPTIED_AT_ONCE):
                at_once = keys[at : at + _EMPTIED_AT_ONCE]
                await asyncio.gather(*(self._empty_one(key, left[key], deadline) for key in at_once))
            left = {}
        return found

    def _not_empty(self, listed: Mapping[GroupKey, _Listed]) -> dict[GroupKey, Ballot]:
        self.had_catalog = self.had_catalog or catalog.catalog_group(self._database) in listed
        return {key: one.ballot for key, one in listed.items() if not self._is_empty(key, one)}

    def _is_empty(self, key: GroupKey, one: _Listed) -> bool:
        rules = self._context.rules
        if not rules.drop_accepts_anew:
            return one.gone or one.ballot <= self._empty.get(key, ZERO)
        highest = max(one.ballot, one.promise) if rules.drop_sees_promises else one.ballot
        return one.gone or (key in self._empty and highest <= self._empty[key])

    async def _empty_one(self, key: GroupKey, ballot: Ballot, deadline: float) -> None:
        operation = Operation(Kind.EMPTY, self._context.chance.randbytes(16), Part(key, ballot))
        answer = await self._router.submit(operation, 0, deadline)
        if answer.outcome == APPLIED:
            self._empty[key] = answer.ballot
            if len(self._empty) > ANSWERS_KEPT_MAX:
                del self._empty[next(iter(self._empty))]

    async def _groups(self, tablets: Sequence[int], deadline: float) -> dict[GroupKey, _Listed]:
        """Groups of the database in the tablets, as any of their replicas knows them; of each, a majority answers."""
        found: dict[GroupKey, _Listed] = {}
        waiting = list(tablets)
        while True:
            heard: dict[int, int] = dict.fromkeys(waiting, 0)
            replicas = {tablet: self._context.domain.replicas(tablet) for tablet in waiting}
            asked: dict[NodeId, dict[int, int]] = {}
            for tablet, listed in replicas.items():
                for node in listed.nodes:
                    asked.setdefault(node, {})[tablet] = listed.epoch
            await asyncio.gather(*(self._list_at(node, of, found, heard) for node, of in asked.items()))
            waiting = [tablet for tablet in waiting if heard[tablet] * 2 <= len(replicas[tablet].nodes)]
            if not waiting:
                return found
            if self._context.remaining(deadline) <= 0:
                raise Unavailable(
                    f"the groups of tablet {waiting[0]} cannot be listed: {heard[waiting[0]]} of "
                    f"{len(replicas[waiting[0]].nodes)} answered"
                )
            await self._context.back_off()

    async def _list_at(
        self, node: NodeId, epochs: Mapping[int, int], found: dict[GroupKey, _Listed], heard: dict[int, int]
    ) -> None:
        """Add the groups that one node has in its tablets, and count those of the tablets that it told all of.

        At these epochs only: what a majority has is known of replicas that serve a tablet at one epoch.
        """
        tablets, after = list(epochs), b""
        refused: NotServing | None = None
        while tablets:
            of = tuple(epochs[tablet] for tablet in tablets)
            rest = tuple(tablets[1:])
            request = ListGroups(self._database, tablets[0], after, _LIST_GROUPS_MAX, rest, of, self._version)
            try:
                reply = await self._ask_groups(node, request)
            except DhtError as error:
                self._context.count("lists_failed")
                if not isinstance(error, NotServing):
                    return
                refused = error
                tablets, after = tablets[1:], b""
                continue
            listed = zip(reply.keys, reply.ballots, reply.gone, reply.promises, strict=True)
            for key, ballot, gone, promise in listed:
                before = found.get(key, _Listed(ballot, gone, promise))
                found[key] = _Listed(max(ballot, before.ballot), gone and before.gone, max(promise, before.promise))
            ended, after = reply.tablets - bool(reply.last), reply.last
            for tablet in tablets[:ended]:
                heard[tablet] += 1
            tablets = tablets[ended:]
        if refused is not None:
            await self._catch_up(refused)

    async def _catch_up(self, refused: NotServing) -> None:
        try:
            await self._context.catch_up(refused)
        except DhtError:
            self._context.count("refreshes_failed")

    async def _ask_groups(self, node: NodeId, request: ListGroups) -> ListGroupsReply:
        if node == self._context.node:
            return await self._list_here(request)
        reply = expect(await self._context.network.call(node, request, PEER_TIMEOUT_S), ListGroupsReply)
        if not 1 <= reply.tablets <= 1 + len(request.others):
            raise RemoteProtocolError(f"{reply.tablets} tablets were told of, {1 + len(request.others)} were asked for")
        if not len(reply.keys) == len(reply.ballots) == len(reply.gone) == len(reply.promises):
            raise RemoteProtocolError("it is not told where each of the groups stands")
        return reply
