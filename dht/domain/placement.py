"""Which nodes keep which tablets: computed once, by whoever proposes a link, never re-derived (DESIGN section 5). Pure.

Rendezvous hashing chooses among candidates, so that two proposers mostly agree and a tablet's next node is stable; a
count of each node's tablets keeps the load within one replica of even, which hashing alone does not with 64 tablets.
One call changes at most one replica of a tablet (1 -> 3 and 2 -> 3 excepted); what remains is done by later links.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence

from dht.domain.roster import REPLICAS
from dht.model import NodeId

Tablets = Sequence[Sequence[NodeId]]


def score(tablet: int, node: NodeId) -> int:
    """How much the tablet likes the node; the highest wins."""
    return int.from_bytes(hashlib.blake2b(tablet.to_bytes(2, "big") + node, digest_size=8).digest(), "big")


def place(
    current: Tablets,
    failure_domains: Mapping[NodeId, str],
    receivers: Collection[NodeId],
    givers: Collection[NodeId] = (),
    frozen: Collection[int] = (),
) -> tuple[tuple[NodeId, ...], ...]:
    """The tablet map one step nearer to three replicas each, on distinct failure domains, evenly spread.

    `failure_domains`: of all members. `receivers` may get tablets; `givers` have to lose theirs; `frozen` tablets keep
    their replicas. Coordinators (first of each) are evened out too; a giver is one only where nothing else is left.
    """
    step = _Step(current, failure_domains, receivers, givers, frozen)
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
        failure_domains: Mapping[NodeId, str],
        receivers: Collection[NodeId],
        givers: Collection[NodeId],
        frozen: Collection[int],
    ) -> None:
        self.tablets = [list(nodes) for nodes in current]
        self.domains = failure_domains
        self.givers = frozenset(givers)
        self.receivers = sorted(n for n in receivers if n not in self.givers)
        self.frozen = set(frozen)
        self.load = dict.fromkeys([*sorted(failure_domains), *self.receivers], 0)
        for nodes in self.tablets:
            for node in nodes:
                self.load[node] = self.load.get(node, 0) + 1

    def mend(self, tablet: int) -> None:
        """Fill up, or replace one replica that has to go or that shares its failure domain with another."""
        nodes = self.tablets[tablet]
        unwanted = [n for n in nodes if n in self.givers or n not in self.domains]
        if unwanted:
            gone = min(unwanted, key=lambda n: (n in self.domains, score(tablet, n)))
            rest = [n for n in nodes if n != gone]
            new = self._choose(tablet, rest)
            if new is not None:
                self._swap(tablet, gone, new)
            elif rest:
                self._swap(tablet, gone, None)
        elif len(nodes) < REPLICAS:
            while len(self.tablets[tablet]) < REPLICAS and (new := self._choose(tablet, self.tablets[tablet])):
                self._swap(tablet, None, new)
        else:
            self._separate(tablet)

    def _separate(self, tablet: int) -> None:
        nodes = self.tablets[tablet]
        domains = [self._domain(n) for n in nodes]
        for node in reversed(nodes):
            if domains.count(self._domain(node)) > 1:
                rest = [n for n in nodes if n != node]
                new = self._choose(tablet, rest)
                if new is not None and not self._collides(rest, new):
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
        return not self._collides(rest, low) or self._collides(rest, high)

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
        cap = -(-len(self.tablets) * REPLICAS // max(1, len(self.receivers)))
        candidates = [n for n in self.receivers if n not in rest and n not in self.tablets[tablet]]
        return min(
            candidates,
            key=lambda n: (self._collides(rest, n), self.load[n] >= cap, -score(tablet, n)),
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

    def _domain(self, node: NodeId) -> str:
        return self.domains.get(node, "")

    def _collides(self, rest: Sequence[NodeId], node: NodeId) -> bool:
        return self._domain(node) in [self._domain(n) for n in rest]
