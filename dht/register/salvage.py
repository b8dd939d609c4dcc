"""What a recovered domain's registers need before they are used again (DESIGN section 5, rule 8).

The survivors may stand where acknowledged writes had not reached them yet. So sequences jump by more than anybody can
have taken from them unseen, and intents are ended: by the decision that their primary still records, else by an abort.

A sequence notes the generation in which it jumped last: an order that broke off and is given again jumps no further,
and whoever took ids before its turn came has had it jump by then (`dht.register.sequence`).
"""

from __future__ import annotations

from dht.errors import Conflict, DhtError, Unavailable
from dht.limits import PEER_TIMEOUT_S
from dht.model import SYSTEM_INTENT, GroupKey, Transaction
from dht.register import catalog
from dht.register.acceptor import Acceptor
from dht.register.context import Context
from dht.register.group import APPLIED
from dht.register.local_ids import LOCAL_IDS_MAX, following_in, left_ids
from dht.register.messages import ListDoubtful, ListDoubtfulReply
from dht.register.operations import decode_intent
from dht.register.reader import Reader
from dht.register.resolver import Resolver
from dht.register.rounds import expect
from dht.register.transaction import Transactions
from dht.rows import is_local, split_group_key, table_prefix

_INTENT_PREFIX = table_prefix(SYSTEM_INTENT)


class Salvage:
    """Runs at the node where the recovery was ordered, once every tablet is served again."""

    def __init__(
        self, context: Context, acceptor: Acceptor, reader: Reader, resolver: Resolver, transactions: Transactions
    ) -> None:
        self._context = context
        self._acceptor = acceptor
        self._reader = reader
        self._resolver = resolver
        self._transactions = transactions

    async def run(self, deadline: float) -> tuple[str, ...]:
        """One sentence for each intent and sequence. Raises Unavailable when a tablet is not served in time."""
        findings: list[str] = []
        for tablet in range(len(self._context.domain.roster.tablets)):
            after = b""
            while True:
                page = await self._list(tablet, after, deadline)
                for key in page.intents:
                    findings += await self._end_intents(key, deadline)
                for key in page.sequences:
                    findings.append(await self._jump(key, deadline))
                after = page.last
                if not after:
                    break
        return tuple(findings)

    async def _list(self, tablet: int, after: GroupKey, deadline: float) -> ListDoubtfulReply:
        """A page, from any replica: all of them began with the same content."""
        context = self._context
        request = ListDoubtful(tablet, after)
        while True:
            nodes = context.domain.replicas(tablet).nodes
            for node in sorted(nodes, key=lambda n: n != context.node):
                try:
                    if node == context.node:
                        return self._acceptor.list_doubtful(request)
                    return expect(await context.network.call(node, request, PEER_TIMEOUT_S), ListDoubtfulReply)
                except DhtError:
                    context.count("lists_failed")
            if context.remaining(deadline) <= 0:
                raise Unavailable(f"no replica of tablet {tablet} answers; recover again when they do")
            await context.back_off()

    async def _end_intents(self, key: GroupKey, deadline: float) -> list[str]:
        findings = []
        _, rows = await self._reader.system_rows(key, deadline)
        for row_key, row in rows.items():
            if not row_key.startswith(_INTENT_PREFIX):
                continue
            intent = decode_intent(row)
            outcome = await self._resolver.outcome(intent, deadline)
            if outcome is None:
                outcome = await self._resolver.abort(intent, deadline)
            await self._resolver.end(key, intent.id, outcome == APPLIED, deadline)
            done = "finished, as its decision says" if outcome == APPLIED else "dropped: no decision of it survived"
            findings.append(f"transaction {intent.id.hex()}: its part in group {_named(key)} was {done}")
        return findings

    async def _jump(self, key: GroupKey, deadline: float) -> str:
        database, generation = split_group_key(key)[0], self._context.domain.generation
        while True:
            (group,) = await self._reader.read([key], None, deadline)
            rows = group.rows or {}
            current, following = catalog.sequence_next(rows), following_in(generation, key, rows)
            if current is None or following is None:
                return f"sequence {_named(key)} has no value"
            if catalog.sequence_jumped(rows) == generation:
                return f"sequence {_named(key)} jumped in this generation already; it stands at {current}"
            part = catalog.sequence_moved(key, current, following, generation)
            try:
                await self._transactions.commit(
                    Transaction(self._context.chance.randbytes(16), database, 0, (part,)), 0, deadline
                )
            except Conflict:
                if self._context.remaining(deadline) <= 0:
                    raise
                await self._context.back_off()
            else:
                text = f"sequence {_named(key)} jumped from {current} to {following}"
                left = f"; {left_ids(following):,} of this PoP's {LOCAL_IDS_MAX:,} ids are left"
                return text + left if is_local(key) else text


def _named(key: GroupKey) -> str:
    database, family, values = split_group_key(key)
    return "/".join([database, family, *(str(value) for value in values)])
