"""Replicas that a chosen write has passed by are told to catch up.

A write is answered at its quorum. A replica that refused it (another proposer has its promise, as after a cut when two
nodes disagreed for a moment on who coordinates) or whose reply was lost stays behind until the next write of the group,
and there may be none for long. So who proposed the write looks again a little later: if nothing newer came, it has that
replica finish the group itself (`Kind.SETTLE`), which leaves it at the newest value and is safe at any time. A replica
that is silent then is left to the comparison at its return (`dht.domain.repair`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from dht.errors import DhtError
from dht.model import Ballot, GroupKey, NodeId
from dht.register.context import Context

DELAY_MIN_S = 0.25
DELAY_MAX_S = 0.5
NOTED_MAX = 4096
"""Of one replica; what is more is found by a comparison."""
AT_ONCE = 16

Settle = Callable[[NodeId, GroupKey], Awaitable[None]]
"""Have that replica finish the group. Raises DhtError when it did not."""


class Laggards:
    """`settle` is set where the node is composed."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._noted: dict[NodeId, dict[GroupKey, Ballot]] = {}
        self.settle: Settle

    def note(self, node: NodeId, key: GroupKey, ballot: Ballot) -> None:
        """The replica did not accept this ballot, and a quorum may have."""
        noted = self._noted.get(node)
        if noted is None:
            noted = self._noted[node] = {}
            self._context.spawn(self._look(node))
        if key in noted or len(noted) < NOTED_MAX:
            noted[key] = ballot

    async def _look(self, node: NodeId) -> None:
        """One for each replica, until nothing is noted of it."""
        context = self._context
        try:
            while self._noted[node]:
                await context.clock.sleep(context.chance.uniform(DELAY_MIN_S, DELAY_MAX_S))
                if not context.network.alive(node):
                    return
                noted, self._noted[node] = self._noted[node], {}
                due = list(noted.items())
                for at in range(0, len(due), AT_ONCE):
                    keys = [key for key, ballot in due[at : at + AT_ONCE] if self._still(node, key, ballot)]
                    await asyncio.gather(*(self._settle(node, key) for key in keys))
        finally:
            del self._noted[node]

    def _still(self, node: NodeId, key: GroupKey, ballot: Ballot) -> bool:
        """Whether the replica can be asked, and this node knows of nothing newer that has brought it along."""
        if node not in self._context.replicas(key).nodes or not self._context.network.alive(node):
            return False
        return node == self._context.node or self._context.file.header(key).accepted <= ballot

    async def _settle(self, node: NodeId, key: GroupKey) -> None:
        self._context.count("laggards_settled")
        try:
            await self.settle(node, key)
        except DhtError:
            self._context.count("settles_failed")
