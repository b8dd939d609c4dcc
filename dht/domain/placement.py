"""Which nodes keep which tablets: computed once, by whoever proposes a link, never re-derived (DESIGN section 5). Pure.

Rendezvous hashing chooses among candidates, so that two proposers mostly agree and a tablet's next node is stable; a
count of each node's tablets keeps the load within one replica of even, which hashing alone does not with 64 tablets.
Replicas of a tablet are spread over PoPs first, then over failure domains. One call changes at most one replica of a
tablet (growth that keeps all, and 5 -> 3, excepted); what remains is done by later links.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence

from dht.domain.roster import REPLICAS, REPLICAS_WIDE
from dht.model import NodeId

Tablets = Sequence[Sequence[NodeId]]
Places = Mapping[NodeId, tuple[str, str]]
"""PoP and failure domain of each member."""


def score(tablet: int, node: NodeId) -> int:
    """How much the tablet likes the node; the highest wins."""
    return int.from_bytes(hashlib.blake2b(tablet.to_bytes(2, "big") + node, digest_size=8).digest(), "big")


def place(
    current: Tablets,
    places: Places,
    receivers: Collection[NodeId],
    givers: Collection[NodeId] = (),
    frozen: Collection[int] = (),
    size: int = REPLICAS,
) -> tuple[tuple[NodeId, ...], ...]:
    """The tablet map one step nearer to `size` (3 or 5) replicas each, far from each other, evenly spread.

    `places`: of all members. `receivers` may get tablets; `givers` have to lose theirs; `frozen` tablets keep
    their replicas. Coordinators (first of each) are evened out too; a giver is one only where nothing else is left.
    """
    step = _Step(current, places, receivers, givers, frozen, size)
    for tablet in range(len(current)):
        if tablet not in step.frozen:
            step.mend(tablet)
    while step.move_one():
        pass
    return tuple(step.coordinators())


class _Step:
    def __init__(
        self,
        current: Tablets,
        places: Places,
        receivers: Collection[NodeId],
        givers: Collection[NodeId],
        frozen: Collection[int],
        size: int,
    ) -> None:
        self.tablets = [list(nodes) for nodes in current]
        self.places = places
        self.pops = len({pop for pop, _ in places.values()})
        self.size = size
        self.givers = frozenset(givers)
        self.receivers = sorted(n for n in receivers if n not in self.givers)
        self.frozen = set(frozen)
        self.load = dict.fromkeys([*sorted(places), *self.receivers], 0)
        for nodes in self.tablets:
            for node in nodes:
                self.load[node] = self.load.get(node, 0) + 1

    def mend(self, tablet: int) -> None:
        """Fill up, replace one replica that has to go or that is needlessly near another, or go back from 5 to 3."""
        nodes = self.tablets[tablet]
        unwanted = [n for n in nodes if n in self.givers or n not in self.places]
        if len(nodes) > self.size:
            self._shrink(tablet)
        elif unwanted:
            gone = min(unwanted, key=lambda n: (n in self.places, score(tablet, n)))
            rest = [n for n in nodes if n != gone]
            new = self._choose(tablet, rest)
            if new is not None:
                self._swap(tablet, gone, new)
            elif len(nodes) == REPLICAS_WIDE:
                self._shrink(tablet)
            elif rest:
                self._swap(tablet, gone, None)
        elif len(nodes) < self.size:
            self._grow(tablet)
        else:
            self._separate(tablet)

    def _grow(self, tablet: int) -> None:
        """To 3 as far as there are nodes; from 3 to 5 only by two at once."""
        nodes = self.tablets[tablet]
        size = REPLICAS if len(nodes) < REPLICAS else self.size
        added: list[NodeId] = []
        while len(nodes) + len(added) < size and (new := self._choose(tablet, [*nodes, *added])):
            added.append(new)
        if len(nodes) < REPLICAS or len(nodes) + len(added) == size:
            for new in added:
                self._swap(tablet, None, new)

    def _shrink(self, tablet: int) -> None:
        """From 5 to 3: without those that have to go, then without those that add least distance, or have most."""
        for _ in range(REPLICAS_WIDE - REPLICAS):
            nodes = self.tablets[tablet]
            gone = max(
                nodes,
                key=lambda n: (
                    n not in self.places,
                    n in self.givers,
                    self._nearness([x for x in nodes if x != n], n),
                    self.load[n],
                    -score(tablet, n),
                ),
            )
            self._swap(tablet, gone, None)

    def _separate(self, tablet: int) -> None:
        nodes = self.tablets[tablet]
        for node in reversed(nodes):
            rest = [n for n in nodes if n != node]
            near = self._nearness(rest, node)
            if not near[1] and (not near[0] or self.pops == 1):
                continue
            new = self._choose(tablet, rest)
            if new is not None and self._nearness(rest, new) < near:
                self._swap(tablet, node, new)
                return

    def move_one(self) -> bool:
        """One replica from a node with more tablets to one with at least two fewer; False when there is no such move.

        Every move lowers the sum of the squared loads, so this ends.
        """
        by_load = sorted(self.load, key=lambda n: (-self.load[n], n))
        for low in sorted(self.receivers, key=lambda n: (self.load[n], n)):
            for high in by_load:
                if self.load[high] - self.load[low] < 2:
                    break
                best = max(
                    (t for t in range(len(self.tablets)) if self._movable(t, high, low)),
                    key=lambda t: (score(t, low), -t),
                    default=None,
                )
                if best is not None:
                    self._swap(best, high, low)
                    return True
        return False

    def _movable(self, tablet: int, high: NodeId, low: NodeId) -> bool:
        nodes = self.tablets[tablet]
        if tablet in self.frozen or high not in nodes or low in nodes:
            return False
        rest = [n for n in nodes if n != high]
        return self._nearness(rest, low) <= self._nearness(rest, high)

    def coordinators(self) -> list[tuple[NodeId, ...]]:
        """The tablets with their first replicas evened out; a tablet keeps its coordinator where that is as good."""
        count = dict.fromkeys(self.load, 0)
        for nodes in self.tablets:
            count[nodes[0]] += 1
        changed = True
        while changed:
            changed = False
            for nodes in self.tablets:
                rank = {n: (n in self.givers, count[n] - (n == nodes[0])) for n in nodes}
                best = min(nodes, key=lambda n: (*rank[n], n))
                if rank[best] < rank[nodes[0]]:
                    count[nodes[0]] -= 1
                    count[best] += 1
                    nodes.remove(best)
                    nodes.insert(0, best)
                    changed = True
        return [tuple(nodes) for nodes in self.tablets]

    def _choose(self, tablet: int, rest: Sequence[NodeId]) -> NodeId | None:
        cap = -(-len(self.tablets) * self.size // max(1, len(self.receivers)))
        candidates = [n for n in self.receivers if n not in rest and n not in self.tablets[tablet]]
        return min(
            candidates,
            key=lambda n: (self._nearness(rest, n), self.load[n] >= cap, -score(tablet, n)),
            default=None,
        )

    def _swap(self, tablet: int, gone: NodeId | None, new: NodeId | None) -> None:
        """Does it; no later move of this step touches the tablet."""
        nodes = self.tablets[tablet]
        if gone is not None:
            nodes.remove(gone)
            self.load[gone] -= 1
        if new is not None:
            nodes.append(new)
            self.load[new] += 1
        self.frozen.add(tablet)

    def _nearness(self, rest: Sequence[NodeId], node: NodeId) -> tuple[int, int]:
        """How many of the rest share the node's PoP, and how many its failure domain there; less is better."""
        pop, domain = self.places.get(node, ("", ""))
        others = [self.places.get(n, ("", "")) for n in rest]
        return sum(p == pop for p, _ in others), others.count((pop, domain))
