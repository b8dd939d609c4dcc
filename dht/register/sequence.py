"""Sequences: each node takes blocks of ids from the sequence's group and gives them out from memory (DESIGN section 7).

Ids are unique, not dense: what is left of a block is lost when the node stops or a caller needs ids above it.

A recovery may have lost that ids were taken. So the first block that is taken in a generation lies beyond a jump
(`dht.register.local_ids.following_in`), which the sequence notes: nobody waits for those who see to the data then, and
none of their ids was given out before.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from dht.errors import Conflict, Unavailable
from dht.model import GroupRead, Transaction, Value
from dht.register import catalog
from dht.register.context import Context
from dht.register.local_ids import FIRST_GENERATION, following_in
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
            while True:
                group, generation = await self._read(database, name, deadline)
                current = catalog.sequence_next(group.rows or {})
                if above < (current or 1):
                    return
                # One that is there jumps when the next block is taken, from wherever it stands.
                jumped = generation if current is None else None
                if await self._move(database, group.key, current, above + 1, jumped, deadline) is not None:
                    return

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
            group, generation = await self._read(database, name, deadline)
            current = catalog.sequence_next(group.rows or {})
            stands = current
            if self._context.rules.sequence_jumps:
                stands = following_in(generation, group.key, group.rows or {})
            first = max(stands or 1, above + 1)
            following = first + catalog.block_of(count)
            moved_in = await self._move(database, group.key, current, following, generation, deadline)
            if moved_in is None or moved_in > generation:
                # Another node was faster; or a generation has begun meanwhile, in which the sequence has yet to jump.
                continue
            block.next, block.end = first, following
            self._context.count("sequence_blocks")
            return

    async def _read(self, database: str, name: str, deadline: float) -> tuple[GroupRead, int]:
        """The sequence's group, and the generation that it was read in or an earlier one."""
        generation = self._context.domain.generation
        (group,) = await self._reader.read([catalog.sequence_group(database, name)], None, deadline)
        return group, generation

    async def _move(
        self, database: str, key: bytes, current: int | None, following: int, jumped: int | None, deadline: float
    ) -> int | None:
        """Compare-and-set; the generation in which it was done, None when another node was faster.

        `jumped`: see `catalog.sequence_jumped`. An unknown outcome costs at most a block.
        """
        part = catalog.sequence_moved(key, current, following, jumped if jumped != FIRST_GENERATION else None)
        transaction = Transaction(self._context.chance.randbytes(16), database, 0, (part,))
        try:
            applied = await self._transactions.commit(transaction, 0, deadline)
        except Conflict:
            if self._context.remaining(deadline) <= 0:
                raise Unavailable("the sequence is contended and no time is left; try again") from None
            await self._context.back_off()
            return None
        return applied.ballots[0].generation


def _take(block: _Block, count: int, above: int) -> int | None:
    first = max(block.next, above + 1)
    if first + count > block.end:
        return None
    block.next = first + count
    return first
