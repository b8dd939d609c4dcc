"""Whether this node hears enough replicas to be of use: if not for a while, it refuses at once instead of trying on.

A hint, and used as one: it decides when to give up, never what is true. A lack of quorum is forgiven for `GRACE_S`, in
which links come up after a start, a restarted peer returns, and a loaded one finds time to answer. Who is parted from
this node by the network is not waited for: nothing that he does could bring him back.
"""

from __future__ import annotations

from collections.abc import Sequence

from dht.domain.roster import quorums
from dht.errors import Unavailable
from dht.model import NodeId
from dht.register.context import Context

GRACE_S = 0.6


class Reach:
    """What this node can reach now."""

    def __init__(self, context: Context) -> None:
        self._context = context

    def check(self, nodes: Sequence[NodeId], what: str) -> None:
        """Raise Unavailable if this node hears no majority of the replicas, grace included. `what`: was asked."""
        quorum = quorums(len(nodes))[0]
        unheard = self._unheard(nodes)
        if len(nodes) - len(unheard) < quorum:
            self._refuse(nodes, unheard, f"it takes {quorum}", what)

    def check_any(self, nodes: Sequence[NodeId], what: str) -> None:
        """The same for who can ask any replica to do it: at least one has to be heard, or this node to suffice."""
        if self._context.node in nodes and quorums(len(nodes))[0] == 1:
            return
        unheard = self._unheard(nodes)
        if len(unheard) == len(nodes) - (self._context.node in nodes):
            self._refuse(nodes, unheard, "it takes one that hears a majority", what)

    def heard(self, nodes: Sequence[NodeId]) -> int:
        """How many of the replicas this node hears, itself among them, grace included."""
        return len(nodes) - len(self._unheard(nodes))

    def _unheard(self, nodes: Sequence[NodeId]) -> list[NodeId]:
        network, own = self._context.network, self._context.node
        silent = [node for node in nodes if node != own and not network.alive(node)]
        return [node for node in silent if network.parted(node) or network.silent_s(node) > GRACE_S]

    def _refuse(self, nodes: Sequence[NodeId], unheard: list[NodeId], need: str, what: str) -> None:
        roster = self._context.domain.roster
        names = []
        for node in unheard:
            member = roster.member(node)
            where = "" if member is None else f" at {member.address}"
            names.append(f"node {node.hex()[:12]}{where} for {self._context.network.silent_s(node):.1f} s")
        raise Unavailable(
            f"{what}: of its {len(nodes)} replicas this node hears {len(nodes) - len(unheard)}, {need}; not heard: "
            f"{', '.join(names)}. If these run, this host is cut off: mend its network; if not, start them",
            cut_off=True,
        )
