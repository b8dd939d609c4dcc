"""What a replica tells those that follow its domain without voting (DESIGN section 8, followers).

Everything told is durable here, for a follower takes a value for chosen when a quorum names its ballot: one that was
told and then forgotten in a crash would not be.
"""

from __future__ import annotations

from collections.abc import Callable

from dht.domain.context import Context
from dht.domain.messages import AskChanges, AskMarks, Changes, Marks, RegisterMark, Served
from dht.domain.source import PAGE_KEYS_MAX
from dht.errors import RemoteProtocolError
from dht.model import GroupKey
from dht.world import Batch

Admit = Callable[[int, int], None]
"""`Domain.admit`: (tablet, epoch), raises NotServing."""


class Followed:
    """`admit`: raises NotServing where this node is no replica of a tablet at that epoch."""

    def __init__(self, context: Context, admit: Admit) -> None:
        # Differs at each start of the node, as the count of changes does.
        self._instance = context.local.incarnation + context.local.boot.to_bytes(8, "big")
        self._chain = context.chain
        self._tablets = context.tablets
        self._registers = context.registers
        self._disk = context.disk
        self._admit = admit
        self._rules = context.rules

    async def changes(self, request: AskChanges) -> Changes:
        """Read at one moment; told when that is durable."""
        log = self._registers.changes
        kept = request.instance == self._instance and log.forgotten <= request.after <= log.count
        keys, upto, more = log.after(request.after if kept else log.count, max(1, min(request.limit, PAGE_KEYS_MAX)))
        marks = tuple(self._mark(key) for key in keys)
        served = () if more else self._served()
        newest = self._chain.newest
        generation = 0 if newest is None else newest.generation
        await self._durable()
        return Changes(self._instance, kept, upto, more, marks, served, self._chain.epoch, generation)

    async def marks(self, request: AskMarks) -> Marks:
        """Raises NotServing where the tablet is not served at that epoch."""
        self._admit(request.tablet, request.epoch)
        if len(request.keys) > PAGE_KEYS_MAX or any(self._registers.tablet(k) != request.tablet for k in request.keys):
            raise RemoteProtocolError(f"{len(request.keys)} marks were asked for that cannot be told of one tablet")
        marks = tuple(self._mark(key) for key in request.keys)
        floor = self._tablets.state(request.tablet).agreed
        await self._durable()
        return Marks(marks, floor)

    def _mark(self, key: GroupKey) -> RegisterMark:
        header = self._registers.header(key)
        return RegisterMark(key, header.promise, header.accepted, header.chosen, header.size_bytes)

    def _served(self) -> tuple[Served, ...]:
        """What this node votes on now: neither sealed nor uninitialised, nor of a generation that is over."""
        out = []
        for tablet in self._tablets.known():
            epoch = self._tablets.serves(tablet) if self._rules.followed_served_only else self._claimed(tablet)
            if epoch and epoch >= self._chain.generation_epoch:
                out.append(Served(tablet, epoch, self._tablets.state(tablet).agreed))
        return tuple(out)

    def _claimed(self, tablet: int) -> int:
        """A planted bug: the epoch of the newest content, sealed or not."""
        return self._tablets.state(tablet).current

    async def _durable(self) -> None:
        if self._rules.followed_durable:
            # An empty batch: whatever was submitted before it is durable when it is.
            await self._disk.durable(self._disk.submit(Batch()))
