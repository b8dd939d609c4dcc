"""Sequences: each node takes blocks of ids from the sequence's group and gives them out from memory (DESIGN section 7).

Ids are unique, not dense: what is left of a block is lost when the node stops or a caller needs ids above it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from dht.errors import Conflict, Unavailable
from dht.model import Transaction, Value
from dht.register import catalog
from dht.register.context import Context
from dht.register.reader import Reader
from dht.register.transaction import Transactions

_BLOCKS_MAX = 10_000


class _Block:
    """Ids from `next` up to but not including `end` are this node's."""

    __slots__ = ("end", "lock", "next")

    def __init__(self) -> None:
        self.next = 0
        self.end = 0
        self.lock = asyncio.Lock()


class Sequences:
    """The blocks that this node holds."""

    def __init__(
        self, context: Context, reader: Reader, transactions: Transactions, mark: Callable[[str], Value]
    ) -> None:
        self._context = context
        self._reader = reader
        self._transactions = transactions
        self._mark = mark
        self._blocks: dict[tuple[str, str, Value], _Block] = {}

    async def reserve(self, database: str, name: str, count: int, above: int, deadline: float) -> int:
        """The first of `count` consecutive ids, all greater than `above`."""
        catalog.check_count(count)
        block = self._block(database, name)
        first = _take(block, count, above)
        while first is None:
            async with block.lock:
                first = _take(block, count, above)
                if first is None:
                    await self._fetch(block, database, name, count, above, deadline)
                    first = _take(block, count, above)
        return first

    async def raise_to(self, database: str, name: str, above: int, deadline: float) -> None:
        """Give out only ids greater than `above` from now on."""
        block = self._block(database, name)
        async with block.lock:
            block.next = max(block.next, above + 1)
            current, key = await self._current(database, name, deadline)
            while above >= (current or 1):
                if await self._move(database, key, current, above + 1, deadline):
                    return
                current, key = await self._current(database, name, deadline)

    def forget(self, database: str) -> None:
        """Drop the blocks of a database that is gone."""
        self._blocks = {key: block for key, block in self._blocks.items() if key[0] != database}

    def _block(self, database: str, name: str) -> _Block:
        # A database that was dropped and made again counts from the beginning: its ids are not those of the old block.
        place = (database, name, self._mark(database))
        block = self._blocks.get(place)
        if block is None:
            if len(self._blocks) >= _BLOCKS_MAX:
                self._blocks.clear()
            block = self._blocks[place] = _Block()
        return block

    async def _fetch(self, block: _Block, database: str, name: str, count: int, above: int, deadline: float) -> None:
        while True:
            current, key = await self._current(database, name, deadline)
            first = max(current or 1, above + 1)
            following = first + catalog.block_of(count)
            if await self._move(database, key, current, following, deadline):
                block.next, block.end = first, following
                self._context.count("sequence_blocks")
                return

    async def _current(self, database: str, name: str, deadline: float) -> tuple[int | None, bytes]:
        key = catalog.sequence_group(database, name)
        (group,) = await self._reader.read([key], None, deadline)
        return catalog.sequence_next(group.rows or {}), key

    async def _move(self, database: str, key: bytes, current: int | None, following: int, deadline: float) -> bool:
        """Compare-and-set; False when another node was faster. An unknown outcome costs at most a block."""
        part = catalog.sequence_moved(key, current, following)
        transaction = Transaction(self._context.chance.randbytes(16), database, 0, (part,))
        try:
            await self._transactions.commit(transaction, 0, deadline)
        except Conflict:
            if self._context.remaining(deadline) <= 0:
                raise Unavailable("the sequence is contended and no time is left; try again") from None
            await self._context.back_off()
            return False
        return True


def _take(block: _Block, count: int, above: int) -> int | None:
    first = max(block.next, above + 1)
    if first + count > block.end:
        return None
    block.next = first + count
    return first
