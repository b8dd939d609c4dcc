"""The decided links that this node holds, all from the first on, durable before anybody is told (DESIGN section 5).

Key in Space.ROSTER: domain name, 0x00, epoch (8 bytes). The chain is walked without skipping: a link is taken only if
it names the digest of the newest one held here, so all members hold prefixes of one chain.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from dht.domain.roster import (
    FIRST_EPOCH,
    Roster,
    TabletReplicas,
    check_shape,
    check_step,
    decode_link,
    digest,
    encode_link,
)
from dht.errors import NotFound, RemoteProtocolError
from dht.model import NodeId
from dht.world import Batch, Disk, Space


class Chain:
    """Reads the file at construction. Links are kept in memory too: some KiB each, one per change of the roster."""

    def __init__(self, domain: str, disk: Disk) -> None:
        self.domain = domain
        self._disk = disk
        self._prefix = domain.encode() + b"\x00"
        pairs = disk.range(Space.ROSTER, self._prefix, self._prefix + b"\xff" * 9)
        self._links = [decode_link(value) for _, value in pairs]
        self._submitted = 0
        self._listed = {m.node_id: None for link in self._links for m in link.members}
        self._incarnations = {(m.node_id, m.incarnation): None for link in self._links for m in link.members}
        self._recoveries = [b for a, b in itertools.pairwise(self._links) if b.generation > a.generation]

    @property
    def newest(self) -> Roster | None:
        return self._links[-1] if self._links else None

    @property
    def epoch(self) -> int:
        """Of the newest link; 0 with none."""
        return self._links[-1].epoch if self._links else 0

    @property
    def generation(self) -> int:
        """Of the newest link; 0 with none."""
        return self._links[-1].generation if self._links else 0

    def link(self, epoch: int) -> Roster:
        """Raises NotFound for a link not held here."""
        if not self._links or not FIRST_EPOCH <= epoch <= self.epoch:
            raise NotFound(f"link {epoch} of domain {self.domain} is not here; the newest is {self.epoch}")
        return self._links[epoch - FIRST_EPOCH]

    def after(self, epoch: int, limit: int) -> tuple[Roster, ...]:
        start = max(0, epoch + 1 - FIRST_EPOCH)
        return tuple(self._links[start : start + limit])

    def append(self, link: Roster) -> bool:
        """Take the link if it is the next; False if it is held already. The caller awaits `durable`.

        Raises RemoteProtocolError if it contradicts what is held, or skips.
        """
        if link.domain != self.domain:
            raise RemoteProtocolError(f"link of domain {link.domain} was sent to domain {self.domain}")
        if link.epoch <= self.epoch:
            if self.link(link.epoch) != link:
                raise RemoteProtocolError(
                    f"two different links {link.epoch} of domain {self.domain}: the peer belongs to another chain",
                    epoch=link.epoch,
                    generation=link.generation,
                )
            return False
        self._check_next(self.newest, link)
        batch = Batch()
        self._put(batch, link)
        self._submitted = self._disk.submit(batch)
        self._hold(link)
        return True

    def begin_with(self, links: Sequence[Roster], batch: Batch, submit: Callable[[Batch], int]) -> None:
        """Take a whole chain where none is held, in one batch with what `submit` keeps. The caller awaits `durable`.

        Raises RemoteProtocolError if the links do not follow one another from the first on.
        """
        for before, link in zip((None, *links), links, strict=False):
            self._check_next(before, link)
            self._put(batch, link)
        self._submitted = submit(batch)
        for link in links:
            self._hold(link)

    def _check_next(self, before: Roster | None, link: Roster) -> None:
        if before is not None:
            check_step(before, link)
        elif link.epoch != FIRST_EPOCH or link.previous:
            raise RemoteProtocolError(f"link {link.epoch} of domain {self.domain} came first; links are not skipped")
        else:
            check_shape(link)

    def _put(self, batch: Batch, link: Roster) -> None:
        batch.put(Space.ROSTER, self._prefix + link.epoch.to_bytes(8, "big"), encode_link(link))

    def _hold(self, link: Roster) -> None:
        if self._links and link.generation > self._links[-1].generation:
            self._recoveries.append(link)
        self._links.append(link)
        self._listed.update((m.node_id, None) for m in link.members)
        self._incarnations.update(((m.node_id, m.incarnation), None) for m in link.members)

    async def durable(self) -> None:
        """Return when all links held are on the disk."""
        await self._disk.durable(self._submitted)

    def history(self, tablet: int, epoch: int) -> Sequence[TabletReplicas]:
        """The tablet's replica sets before tablet epoch `epoch`, newest first."""
        out: list[TabletReplicas] = []
        while epoch > FIRST_EPOCH:
            before = self.link(epoch - 1).replicas(tablet)
            out.append(before)
            epoch = before.epoch
        return out

    def recoveries(self) -> tuple[Roster, ...]:
        """The links that began a generation without the voters of the one before, oldest first (rule 8)."""
        return tuple(self._recoveries)

    @property
    def generation_epoch(self) -> int:
        """Epoch of the newest of them, 0 if there is none: no earlier epoch is answered for."""
        return self._recoveries[-1].epoch if self._recoveries else 0

    @property
    def branch(self) -> bytes:
        """Digest of the link that began the present generation, empty in the first: tells two recoveries apart."""
        return digest(self._recoveries[-1]) if self._recoveries else b""

    @property
    def left_out(self) -> tuple[NodeId, ...]:
        """Members before the newest recovery that it did not list: they may have begun a generation of their own."""
        if not self._recoveries:
            return ()
        link = self._recoveries[-1]
        return tuple(m.node_id for m in self.link(link.epoch - 1).members if link.member(m.node_id) is None)

    def survivors(self, old: int, new: int) -> Roster | None:
        """The newest link that began a generation after link `old`, up to link `new`."""
        return next((link for link in reversed(self._recoveries) if old < link.epoch <= new), None)

    def was_member(self, node: NodeId, incarnation: bytes) -> bool:
        """Whether any link lists this incarnation of the node."""
        return (node, incarnation) in self._incarnations

    def knows(self, node: NodeId) -> bool:
        """Whether any link lists the node."""
        return node in self._listed
