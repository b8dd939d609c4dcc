"""`lucd domain recover`: the order, the wait, the repair of the data, the record of it (DESIGN section 5, rule 8)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

from dht.domain.domain import Domain
from dht.domain.recovery import Recovery
from dht.domain.roster import Roster
from dht.errors import DhtError, Invalid, Unavailable
from dht.model import NodeId
from lucd.messages import RecoverDomain, RecoverReply, RecoveryLine

POLL_S = 0.1
REPAIRED = "sequences and intents were seen to"

Salvage = Callable[[float], Awaitable[tuple[str, ...]]]
"""`StoreNode.salvage`."""


FreeSeats = Callable[[], Awaitable[list[str]]]
"""`PopRecoverer.free_seats`."""


class Recoverer:
    """Of one of the daemon's domains. `free_seats`: due where that is a PoP's, and began out of copies."""

    def __init__(self, domain: Domain, salvage: Salvage, free_seats: FreeSeats | None = None) -> None:
        self._domain = domain
        self._salvage = salvage
        self._free_seats = free_seats

    async def order(self, request: RecoverDomain) -> RecoverReply:
        """Raises Invalid where it is not allowed, Unavailable when it was begun and the data is not repaired yet."""
        try:
            named = [bytes.fromhex(text) for text in request.survivors]
        except ValueError:
            raise Invalid("a survivor is named by its node id in hex; `lucd domain show` lists the members") from None
        generations = self._domain.generations
        record = self._unfinished() if request.accept_data_loss else None
        if record is None:
            record = await generations.recover(named, accept_data_loss=request.accept_data_loss)
        return await self.finish(record, request.timeout_s)

    async def finish(self, record: Recovery, timeout_s: float) -> RecoverReply:
        """See to the data once its tablets are served. Raises Unavailable when that does not end in time.

        Whatever breaks off is done by the next order, which finds the record.
        """
        generations = self._domain.generations
        if record.from_copies and self._free_seats is not None:
            freed = await self._free_seats()
            record = await generations.note(record, [text for text in freed if text not in record.findings])
        try:
            await self._served(time.monotonic() + timeout_s)
            findings = await self._salvage(timeout_s)
        except DhtError as error:
            await generations.note(record, [f"not repaired yet: {error.message}"])
            raise Unavailable(
                f"generation {record.generation} of domain {self._domain.name} has begun, but sequences and intents "
                f"were not seen to: {error.message}; give the order again here to go on"
            ) from None
        return RecoverReply(self._line(await generations.note(record, [*findings, REPAIRED])))

    def _unfinished(self) -> Recovery | None:
        """The recovery that began the present generation, if it was ordered here and its repair did not end."""
        for record in self._domain.generations.records():
            if record.generation == self._domain.generation and REPAIRED not in record.findings:
                return record
        return None

    async def _served(self, end_s: float) -> None:
        while time.monotonic() < end_s:
            tablets = self._domain.health().get("tablets")
            if isinstance(tablets, dict) and not tablets["unavailable"]:
                return
            await asyncio.sleep(POLL_S)
        raise Unavailable("not all tablets are served again; `lucd domain show` tells which")

    def all(self) -> tuple[RecoveryLine, ...]:
        """Every recovery in the chain; with its findings where it was ordered here."""
        records = {record.generation: record for record in self._domain.generations.records()}
        chain = self._domain.chain
        return tuple(
            self._line(records[link.generation])
            if link.generation in records
            else _from_chain(chain.link(link.epoch - 1), link)
            for link in chain.recoveries()
        )

    @staticmethod
    def _line(record: Recovery) -> RecoveryLine:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(record.wall_s))
        return RecoveryLine(
            record.generation,
            record.epoch,
            _names(record.survivors),
            _names(record.lost),
            f"{when} UTC",
            record.empty,
            record.findings,
        )


def _names(nodes: tuple[NodeId, ...]) -> tuple[str, ...]:
    return tuple(node.hex() for node in nodes)


def _from_chain(before: Roster, link: Roster) -> RecoveryLine:
    survivors = tuple(m.node_id for m in link.members)
    lost = tuple(m.node_id for m in before.members if m.node_id not in survivors)
    return RecoveryLine(link.generation, link.epoch, _names(survivors), _names(lost))
