"""What this node knows of the other members: who answered when, and where their tablets stand. No I/O.

Everything here is a hint for planning and for choosing whom to ask; no rule of safety rests on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from dht.domain.messages import Status, TabletMark
from dht.domain.roster import Roster, TabletReplicas
from dht.domain.wide import Word
from dht.model import NodeId

REACHABLE_S: Final = 5.0
VOTER_SILENT_S: Final = 30.0


class Watch:
    def __init__(self, node: NodeId, now_s: float) -> None:
        self._node = node
        self.started_s = now_s
        self.patience_s = 0.0
        """How much longer than usual it may take until a member is asked again."""
        self._heard_s: dict[NodeId, float] = {}
        self._since_s: dict[NodeId, float] = {}
        self.marks: dict[NodeId, dict[int, TabletMark]] = {}
        self.reported_silence: dict[NodeId, dict[NodeId, float]] = {}
        self.words: dict[NodeId, Word] = {}
        self._sealed: dict[int, int] = {}
        self._initialised: dict[int, int] = {}

    def follow(self, roster: Roster, now_s: float) -> None:
        """Count the silence of new members from now, and forget those that went."""
        for member in roster.members:
            self._since_s.setdefault(member.node_id, now_s)
        for node in [n for n in self._since_s if roster.member(n) is None]:
            del self._since_s[node]
            self._heard_s.pop(node, None)
            self.marks.pop(node, None)
            self.reported_silence.pop(node, None)
            self.words.pop(node, None)

    def heard(self, node: NodeId, status: Status, now_s: float) -> None:
        self._heard_s[node] = now_s
        self.marks[node] = {m.tablet: m for m in status.tablets}
        self.reported_silence[node] = dict(status.silent)
        self.words[node] = status.word
        for mark in status.tablets:
            self.saw(mark)

    def told(self, node: NodeId, marks: Sequence[TabletMark]) -> None:
        """Some tablets of the node changed just now."""
        known = self.marks.setdefault(node, {})
        for mark in marks:
            known[mark.tablet] = mark
            self.saw(mark)

    def saw(self, mark: TabletMark) -> None:
        """Some replica is sealed or initialised so far."""
        self._sealed[mark.tablet] = max(mark.sealed, self._sealed.get(mark.tablet, 0))
        self._initialised[mark.tablet] = max(mark.initialised, self._initialised.get(mark.tablet, 0))

    def silent_s(self, now_s: float) -> dict[NodeId, float]:
        """How long each other member has not answered, since it is a member and this node runs."""
        return {n: now_s - self._heard_s.get(n, since) for n, since in sorted(self._since_s.items()) if n != self._node}

    def reachable(self, now_s: float, within_s: float = REACHABLE_S) -> frozenset[NodeId]:
        """This node, and who answered within that time."""
        near = [n for n, heard in self._heard_s.items() if now_s - heard <= within_s + self.patience_s]
        return frozenset([self._node, *near])

    def in_use(self, tablet: int, newest: TabletReplicas, before: TabletReplicas | None) -> TabletReplicas:
        """The replicas to talk to: those before the newest until one of them is known to be sealed.

        So a tablet is served by its old replicas while the new one copies ahead.
        """
        if before is None or self._initialised.get(tablet, 0) >= newest.epoch:
            return newest
        return newest if self._sealed.get(tablet, 0) >= before.epoch else before
