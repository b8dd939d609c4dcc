"""`lucd pop recover`: a PoP lost all its disks, and a new node of it begins anew with what other PoPs have copied.

Order: the PoP's claim in `global` is read; the copies are found and fetched into this node's empty file; then the claim
goes over to this node, if it is still the one that was read; then the domain begins its next generation here, in one
batch. Whatever breaks off before is done again by the next order. At last the dead members' seats in `global` are
freed, which the PoP's new nodes would have to do without. What breaks off after the generation has begun, the freeing
of the seats too, an order of `lucd domain recover` on this node goes on with.

Of two orders at a time one is refused: each makes a claim that no other makes, with a generation above that of the one
before it, also where the same node gives it again. Whoever took the claim may serve the domain from then on, so who
comes later looks whether that node, or any of the PoP, is heard: first, after it has read the claim, and once more when
it has fetched. If none is, the human's word counts, and the later generation is the higher one: the earlier node stops
when it comes back. So do members that were only cut off; they keep their files (DESIGN section 8). Who comes back
during the fetch ends the order, and nothing of it is overwritten (`dht.domain.restore`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Sequence

from dht.domain.domain import Domain
from dht.domain.messages import AskLinks, DomainMessage, Links
from dht.domain.restore import Restoration, find_copies, floors_after
from dht.errors import Conflict, DhtError, Indeterminate, Invalid
from dht.limits import REQUEST_TIMEOUT_S
from dht.model import GLOBAL, NodeId, PopClaim, Struct
from dht.register.catalog import recovered_generation, recovering
from dht.register.homes import Registry
from dht.rows import split_group_key
from dht.world import Network
from lucd.domain_node import DomainNode
from lucd.messages import RecoverPop, RecoverReply
from lucd.recovery import Recoverer

log = logging.getLogger(__name__)
PAGE_TIMEOUT_S = 10.0
OPEN_SHOWN_MAX = 20
SILENT_SHOWN_MAX = 10


class PopRecoverer:
    """`wide`: `global`. `holders`: nodes of other PoPs that may have copies; `met`: this PoP's that are heard."""

    def __init__(
        self,
        own: DomainNode,
        wide: Domain,
        incarnation: bytes,
        network: Network,
        registry: Callable[[], Registry],
        holders: Callable[[], Sequence[NodeId]],
        met: Callable[[], Sequence[NodeId]],
    ) -> None:
        self._own = own
        self._wide = wide
        self._incarnation = incarnation
        self._network = network
        self._registry = registry
        self._holders = holders
        self._met = met
        self._ordered = asyncio.Lock()

    async def order(self, request: RecoverPop) -> RecoverReply:
        """Raises Invalid where it is not allowed, Conflict if another order has taken the PoP meanwhile.

        One at a time: a second one would put the copies into the file over what the first one serves from it.
        """
        async with self._ordered:
            return await self._recover(request)

    async def _recover(self, request: RecoverPop) -> RecoverReply:
        domain, node = self._own.domain, self._own.domain.local.node_id
        self._refuse_elsewhere(request)
        claim = await self._claim()
        await self._refuse_unless_lost(claim)
        found = await find_copies(domain.name, self._ask, self._holders())
        before = await found.links()
        if not request.accept_data_loss:
            raise Invalid(
                f"what PoP {domain.name} acknowledged after {_moment(min(found.covered_s))} may not be in the copies "
                f"and is lost then; {''.join(f'{line}; ' for line in _unheeded(found))}its old members stop if they "
                f"come back. {'Start those that did not answer, if they can be. ' if found.silent else ''}Be sure that "
                "the disks of the PoP are gone, then say --accept-data-loss"
            )
        await found.fetch(self._own.registers, self._own.disk, domain.check_unknown)
        await self._refuse_unless_lost(claim)
        generation = max(found.heard, recovered_generation(claim)) + 1
        await self._move(claim, recovering(claim, node, self._incarnation, generation))
        record = await domain.restore(before, floors_after(before[-1]), generation, _findings(found))
        log.warning("PoP %s begins anew in generation %d, data loss accepted", domain.name, record.generation)
        return await Recoverer(domain, self._own.store.salvage, self.free_seats).finish(record, request.timeout_s)

    def _refuse_elsewhere(self, request: RecoverPop) -> None:
        domain = self._own.domain
        if request.name != domain.name:
            raise Invalid(
                f"this node belongs to PoP {domain.name}; PoP {request.name} is recovered on a new node of its own "
                f"(pop = {request.name}, an empty data_dir, bootstrap at nodes of other PoPs)"
            )
        if domain.chain.newest is not None:
            raise Invalid(
                f"this node knows domain {domain.name} already; a PoP is recovered on a node with an empty data_dir. "
                "If some of its nodes are left, but no majority, `lucd domain recover` on one goes on with those"
            )

    async def _refuse_unless_lost(self, claim: PopClaim) -> None:
        """Raises Invalid where somebody of the PoP is heard that has its domain, or may be about to begin it."""
        domain = self._own.domain
        domain.check_unknown()
        for node in self._met():
            reply = None
            with contextlib.suppress(DhtError):
                reply = await self._network.call(node, AskLinks(domain.name, 0, 1), REQUEST_TIMEOUT_S / 5)
            if isinstance(reply, Links) and reply.newest:
                raise Invalid(f"node {node.hex()} of PoP {domain.name} answers: nothing is lost for good")
            if node == claim.node and recovered_generation(claim):
                raise Invalid(
                    f"PoP {domain.name} is being recovered on node {node.hex()}, which is heard: give the order there "
                    "again if it broke off, or stop that node first"
                )

    async def _claim(self) -> PopClaim:
        name = self._own.domain.name
        claim = (await self._registry().pops()).get(name)
        if claim is None:
            raise Invalid(f"there never was a PoP {name}; this node founds it by itself")
        return claim

    async def free_seats(self) -> list[str]:
        """Take the PoP's members before out of `global`, where nobody of the PoP was left to do it; says what was.

        Those of the PoP as it is now keep theirs: an order that comes again may find some that joined meanwhile.
        """
        domain, newest, own = self._own.domain, self._wide.chain.newest, self._own.domain.chain.newest
        lines = []
        for member in newest.members if newest is not None else ():
            node = member.node_id
            if member.pop != domain.name or node == domain.local.node_id:
                continue
            if own is not None and own.member(node) is not None:
                continue
            try:
                await self._wide.leave(node, drain=False)
                lines.append(f"node {node.hex()} was taken out of domain {GLOBAL}: a new one takes its seat")
            except DhtError as error:
                lines.append(
                    f"node {node.hex()} keeps its seat in domain {GLOBAL} ({error.message}); when it is gone for good, "
                    f"free it with `lucd node remove {node.hex()}`"
                )
        return lines

    async def _move(self, before: PopClaim, after: PopClaim) -> None:
        name = self._own.domain.name
        try:
            await self._registry().move_pop(name, before, after)
        except Indeterminate:
            now = await self._claim()
            if now != after:
                raise
        except Conflict:
            now = await self._claim()
            if now != after:
                raise Conflict(
                    f"PoP {name} is being recovered on node {now.node.hex()}: nothing was changed here; join that one"
                ) from None

    async def _ask(self, node: NodeId, message: DomainMessage) -> Struct:
        return await self._network.call(node, message, PAGE_TIMEOUT_S)


def _moment(wall_s: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(wall_s))


def _findings(found: Restoration) -> tuple[str, ...]:
    """What the copies cover, in sentences."""
    sources = ", ".join(sorted({node.hex() for node in found.sources}))
    first, last = min(found.covered_s), max(found.covered_s)
    lines = [
        f"{found.registers} groups were taken from the copies at {sources}",
        f"every write acknowledged before {_moment(first)} is covered (the furthest tablet: {_moment(last)})",
    ]
    lines += _unheeded(found)
    behind = sorted(found.open.items(), key=lambda item: item[1])
    for key, wall_s in behind[:OPEN_SHOWN_MAX]:
        name = "/".join(str(value) for value in _flat(key))
        lines.append(f"group {name} is covered before {_moment(wall_s)} only: it was being written")
    if len(behind) > OPEN_SHOWN_MAX:
        lines.append(f"and so are {len(behind) - OPEN_SHOWN_MAX} other groups")
    return tuple(lines)


def _unheeded(found: Restoration) -> list[str]:
    """What may be had of later writes elsewhere, or is not to be had at all."""
    lines = []
    if found.heard != found.generation:
        # That one went on from somewhere else, so no moment can be told up to which it is covered.
        lines.append(
            f"the copies are of generation {found.generation}, and no copy of generation {found.heard} is complete: "
            "nothing that was acknowledged in that one is covered, whenever it was"
        )
    if found.silent:
        named = ", ".join(node.hex() for node in found.silent[:SILENT_SHOWN_MAX])
        more = len(found.silent) - SILENT_SHOWN_MAX
        lines.append(
            f"{len(found.silent)} members of domain {GLOBAL} did not answer, and if one of them has a copy, that may "
            f"cover more: {named}{f' and {more} more' if more > 0 else ''}"
        )
    return lines


def _flat(key: bytes) -> tuple[object, ...]:
    database, family, values = split_group_key(key)
    return database, family, *values
