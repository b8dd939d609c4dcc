"""The other PoPs as this node sees them: who to ask there, whom to ask for `global`, and founding one's own.

A PoP is founded by its first node, once: the node claims the PoP in `global`, and only the claim that came first may
found the domain; later ones are told who that was. So two nodes that start at the same time in a new PoP, or in one
whose members are all away, cannot make two domains of one name. The claim also gives the PoP its index.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Final, Protocol

from dht.domain.roster import Member
from dht.errors import DhtError, Unavailable
from dht.limits import PEER_TIMEOUT_S, REQUEST_TIMEOUT_S
from dht.model import GLOBAL, NodeId, PopClaim
from dht.overlay.messages import Contact
from dht.register.catalog import recovered_generation
from dht.register.homes import HEARD_CHECK_S, FarStore, Registry
from dht.requests import ListPops, ListPopsReply
from dht.wire.handshake import PeerIdentity
from dht.wire.links import parse_address
from dht.world import Batch, Chance, Clock, Disk, Network, Space

log = logging.getLogger(__name__)
GATEWAYS_MAX: Final = 3
"""Nodes of another PoP that this node keeps links to, once it had cause to ask that PoP; and members of `global`."""
LOOK_AGAIN_S: Final = 30.0
LOOK_SOON_S: Final = 1.0
"""How often a PoP's nodes are looked up at most, while one of its gateways is of use, and while none is."""
REFUSED_S: Final = 30.0
"""For how long a gateway that does not serve its domain stands back behind others."""
_INDEX_KEY: Final = b"pop_index"


class Lookups(Protocol):
    """The part of `dht.overlay.overlay.Overlay` that is needed here."""

    def contacts(self) -> list[Contact]: ...

    async def nodes_of_pop(self, pop: str) -> list[Contact]: ...


class Links(Network, Protocol):
    """The part of `dht.wire.links.LinkNetwork` that is needed here."""

    def peers(self) -> list[PeerIdentity]: ...

    def set_address(self, node_id: NodeId, host: str, port: int) -> None: ...

    def forget(self, node_id: NodeId) -> None: ...


class Pops:
    """`registry`: the store of domain `global` as it is reached from here now; `members`: of that domain.

    `needed`: whether this node wants a link to that one anyway, whatever is done here.
    """

    def __init__(
        self,
        pop: str,
        clock: Clock,
        chance: Chance,
        disk: Disk,
        network: Links,
        overlay: Lookups,
        registry: Callable[[], Registry],
        members: Callable[[], Sequence[Member]],
        needed: Callable[[NodeId], bool],
    ) -> None:
        self.name = pop
        self._clock = clock
        self._chance = chance
        self._disk = disk
        self._network = network
        self._overlay = overlay
        self._registry = registry
        self._members = members
        self._needed = needed
        self._stores: dict[str, FarStore] = {}
        self._gateways: dict[str, list[NodeId]] = {}
        self._looked_s: dict[str, float] = {}
        self._looking: dict[str, asyncio.Task[None]] = {}
        self._refused_s: dict[tuple[str, NodeId], float] = {}
        self._chosen_s = float("-inf")
        self._doubt = ""

    async def stop(self) -> None:
        """End the look-ups that are under way."""
        for looking in self._looking.values():
            looking.cancel()
        await asyncio.gather(*self._looking.values(), return_exceptions=True)

    # ---- this PoP's index

    def index(self) -> int:
        """This PoP's index, as it was given once. Raises Unavailable while it is not known here, or in doubt."""
        if self._doubt:
            raise Unavailable(self._doubt)
        noted = self.noted_index()
        if noted is None:
            raise Unavailable(
                f"the index of PoP {self.name} is not known here yet, which domain global gives; see whether a "
                "majority of its members is reachable (`lucd domain show global`), or another node of this PoP"
            )
        return noted

    def noted_index(self) -> int | None:
        """As the node's file has it."""
        noted = self._disk.get(Space.META, _INDEX_KEY)
        return None if noted is None else int.from_bytes(noted, "big")

    def note_index(self, index: int) -> None:
        """Keep it in the node's file, for the time when `global` is out of reach."""
        batch = Batch()
        batch.put(Space.META, _INDEX_KEY, index.to_bytes(2, "big"))
        self._disk.submit(batch)

    def doubt_index(self, why: str) -> None:
        """Why the index may not be this PoP's alone: it is given to nobody until the doubt is empty again."""
        self._doubt = why

    def told(self) -> dict[str, PopClaim]:
        """What this PoP's nodes are told of it that cannot ask `global`: the index, unless it is in doubt; no claim."""
        noted = self.noted_index()
        return {} if noted is None or self._doubt else {self.name: PopClaim(b"", b"", noted)}

    async def ask_index(self, mates: Iterable[NodeId]) -> None:
        """Learn the index from a node of this PoP that knows it, if one of these does. Those of older versions do not.

        Only where the list is out of reach: they may not have heard yet that it is in doubt.
        """
        for node in mates:
            with contextlib.suppress(DhtError):
                reply = await self._network.call(node, ListPops(), PEER_TIMEOUT_S)
                claim = reply.pops.get(self.name) if isinstance(reply, ListPopsReply) else None
                if claim is not None:
                    self.note_index(claim.index)
                    return

    # ---- asking other PoPs

    def store(self, pop: str) -> FarStore:
        """The store of another PoP."""
        found = self._stores.get(pop)
        if found is None:
            found = self._stores[pop] = FarStore(pop, self._clock, self._network, self.gateways, self.refused)
        return found

    def others(self) -> set[str]:
        """The other PoPs, as far as the nodes tell that are known here."""
        known = {contact.pop for contact in self._overlay.contacts()} | {peer.pop for peer in self._network.peers()}
        return (known | self._gateways.keys()) - {self.name, GLOBAL}

    async def gateways(self, pop: str) -> Sequence[NodeId]:
        """Nodes of the PoP to ask, those that are of use first. Looks for some where none is."""
        if pop == GLOBAL:
            return self.global_gateways()
        nodes = self._gateways.get(pop, [])
        useful = any(self._is_of_use(pop, node) for node in nodes)
        if not useful or len(nodes) < GATEWAYS_MAX:
            pause_s = LOOK_AGAIN_S if useful else LOOK_SOON_S
            if self._clock.monotonic() - self._looked_s.get(pop, float("-inf")) > pause_s:
                self._looked_s[pop] = self._clock.monotonic()
                self._looking[pop] = asyncio.ensure_future(self._look(pop))
            if not useful:
                await self._looked(pop)
        return self._best_first(pop, self._gateways.get(pop, []))

    async def _looked(self, pop: str) -> None:
        """All who ask meanwhile wait for the one that looks, unless a link comes up before: the overlay may be slow."""
        looking = self._looking[pop]
        while not (await asyncio.wait((looking,), timeout=HEARD_CHECK_S))[0]:
            if any(self._is_of_use(pop, node) for node in self._gateways.get(pop, [])):
                return
        looking.result()

    async def _look(self, pop: str) -> None:
        """Find nodes of the PoP in the overlay; gateways that are of no use make room for those that answered now."""
        known = [c for c in self._overlay.contacts() if c.pop == pop]
        if all(self._has_refused(pop, contact.id) for contact in known):
            known = await self._overlay.nodes_of_pop(pop)
        found = sorted(known, key=lambda contact: self._has_refused(pop, contact.id))
        before = self._gateways.get(pop, [])
        useful = [node for node in before if self._is_of_use(pop, node)]
        nodes = list(dict.fromkeys([*useful, *(contact.id for contact in found), *before]))[:GATEWAYS_MAX]
        for contact in found:
            if contact.id in nodes:
                self._network.set_address(contact.id, contact.host, contact.port)
        self._gateways[pop] = nodes
        for node in before:
            # Who serves this domain no more may be the gateway of another one.
            if not self._needed(node) and not self.passes_on_to(node):
                self._network.forget(node)

    def refused(self, domain: str, node: NodeId) -> None:
        """It was asked and does not serve the domain: a recovery left it out, it was removed, or is yet to join."""
        now_s = self._clock.monotonic()
        lately = {key: since_s for key, since_s in self._refused_s.items() if now_s - since_s < REFUSED_S}
        self._refused_s = {**lately, (domain, node): now_s}

    def _has_refused(self, domain: str, node: NodeId) -> bool:
        return self._clock.monotonic() - self._refused_s.get((domain, node), float("-inf")) < REFUSED_S

    def _is_of_use(self, domain: str, node: NodeId) -> bool:
        return self._network.alive(node) and not self._has_refused(domain, node)

    def _best_first(self, domain: str, nodes: Iterable[NodeId]) -> list[NodeId]:
        """A refusal comes sooner than the end of a silence."""
        unparted = [node for node in nodes if not self._network.parted(node)]
        return sorted(unparted, key=lambda node: (not self._is_of_use(domain, node), not self._network.alive(node)))

    def passes_on_to(self, node: NodeId) -> bool:
        """Whether it is a gateway."""
        return any(node in nodes for nodes in self._gateways.values())

    def heard_of(self, contact: Contact) -> None:
        """A node answered in the overlay: a gateway may have another address now."""
        if contact.id in self._gateways.get(contact.pop, []) and not self._network.alive(contact.id):
            self._network.set_address(contact.id, contact.host, contact.port)

    # ---- asking domain `global`

    def global_gateways(self) -> Sequence[NodeId]:
        """Members of `global` to ask, those of this PoP and those of use first; links to them are begun."""
        members = {m.node_id: m for m in self._members()}
        near = [n for n, m in members.items() if m.pop == self.name]
        chosen = [n for n in self._gateways.get(GLOBAL, []) if n in members and not self._network.parted(n)]
        if not any(self._is_of_use(GLOBAL, n) for n in (*near, *chosen)) and self._may_choose_again(chosen):
            rest = [n for n in members if n not in near and n not in chosen]
            heard = [n for n in rest if self._is_of_use(GLOBAL, n)]
            others = sorted((n for n in rest if n not in heard), key=lambda n: self._chance.random())
            before = self._gateways.get(GLOBAL, [])
            chosen = [*chosen[-1:], *heard, *others][:GATEWAYS_MAX]
            self._gateways[GLOBAL] = chosen
            for node in before:
                # Else all members would be dialled in the end, again and again, while this PoP is cut off.
                if not (self._network.alive(node) or self._needed(node) or self.passes_on_to(node)):
                    self._network.forget(node)
        for node in (*near, *chosen):
            if not self._network.alive(node):
                self._network.set_address(node, *parse_address(members[node].address))
        return self._best_first(GLOBAL, (*near, *chosen))

    def _may_choose_again(self, chosen: Sequence[NodeId]) -> bool:
        """Those who were chosen have the time of a link to come up, unless they are known to be cut off."""
        now_s = self._clock.monotonic()
        if chosen and now_s - self._chosen_s < LOOK_SOON_S:
            return False
        self._chosen_s = now_s
        return True

    # ---- founding a PoP

    async def may_found(self, node: NodeId, incarnation: bytes) -> str:
        """Claim this node's PoP: empty if this node may found it now, else why not."""
        try:
            first = await self._registry().claim_pop(self.name, node, incarnation, REQUEST_TIMEOUT_S)
        except DhtError as error:
            return error.message
        if recovered_generation(first):
            return (
                f"PoP {self.name} was recovered on node {first.node.hex()}, and no node of it is known here: start "
                "one, or join with an empty data_dir and the right pop. If that broke off, give the order there "
                f"again: `lucd pop recover {self.name} --accept-data-loss`"
            )
        if (first.node, first.incarnation) != (node, incarnation):
            return (
                f"PoP {self.name} was founded by node {first.node.hex()}, and no node of it is known here: start one, "
                "or join with an empty data_dir and the right pop"
            )
        return ""
