"""Many claims of one group at once, as Placement makes them, while daemons stand still for a moment (virtual time).

Who reaches for the group reads it, thinks, and commits a transaction over it and a group of his own, guarded by its
generation. A daemon that stands still is taken for silent by the others, so that what was forwarded to it is tried
again elsewhere, and wakes up with all that it had in its hands. Nearly every attempt loses, and every loss leaves its
mark in the group: far more of them between an attempt and its retry than the group's window keeps.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
from collections import Counter

import pytest

from dht.errors import Conflict, Indeterminate
from dht.limits import WINDOW_TRANSACTIONS
from dht.model import Change, Columns, NodeId, Op, Part, Struct
from dht.register.group import FLOOR_KEY, WINDOW_SLACK_TRANSACTIONS
from dht.register.messages import Accept, Coordinate, Prepare
from dht.register.rules import RULES
from dht.rows import decode_row, group_key, row_key
from tests.sim.bench import Bench, insert, play, update

CLAIMS, ROOM = 64, 10
SILENT_S = 0.2
"""After which those around a daemon that stands still pass it by."""
THINK_S_MAX = 0.6
STILL_S = 0.3, 0.8
BETWEEN_S = 0.1, 0.5
COUNTER = row_key(1, (1,))


class _Stalls:
    """Daemons that stand still: nothing reaches or leaves them until they go on."""

    def __init__(self, bench: Bench, chance: random.Random) -> None:
        self._bench = bench
        self._chance = chance
        self._since: dict[NodeId, float] = {}
        self._awake = {node: asyncio.Event() for node in bench.ids}
        for event in self._awake.values():
            event.set()
        bench.gate = self._arrives
        bench.silent = self._silent

    async def run(self) -> None:
        """By turns the first, which coordinates the group, and the second, which does while the first is silent."""
        for turn in itertools.count():
            await asyncio.sleep(self._chance.uniform(*BETWEEN_S))
            node = self._bench.ids[turn % 2]
            self._since[node] = asyncio.get_running_loop().time()
            self._awake[node].clear()
            await asyncio.sleep(self._chance.uniform(*STILL_S))
            self._awake[node].set()
            del self._since[node]

    def _silent(self, me: NodeId, node: NodeId) -> bool:
        since_s = self._since.get(node)
        return since_s is not None and me not in self._since and asyncio.get_running_loop().time() > since_s + SILENT_S

    async def _arrives(self, sender: int, to: int, message: Struct) -> bool:
        await self._awake[self._bench.ids[sender]].wait()
        await asyncio.sleep(self._chance.uniform(0.0005, 0.003))
        await self._awake[self._bench.ids[to]].wait()
        return True


async def _claim(bench: Bench, number: int, chance: random.Random) -> str:
    """One claimant's life: "claimed", "full", or "unknown" if nobody could tell him what became of his claim."""
    store, provider = bench[number % 3], bench.key(0)
    consumer = group_key("db", "consumer", (number,))
    await store.commit(bench.transaction(insert(consumer, {0: 0})))
    while True:
        held, own = await store.read([provider, consumer])
        row = decode_row((held.rows or {})[COUNTER])
        if row[1] == ROOM:
            return "full"
        await asyncio.sleep(chance.uniform(0.02, THINK_S_MAX))
        changes = (
            Change(Op.UPDATE, 1, (1,), {0: row[0] + 1, 1: row[1] + 1}, {0: row[0]}),
            Change(Op.INSERT, 2, (number,), {0: number}),
        )
        claim = bench.transaction(
            Part(provider, held.ballot, changes), Part(consumer, own.ballot, update(consumer, {0: 1}).changes)
        )
        try:
            await store.commit(claim)
            return "claimed"
        except Conflict:
            continue
        except Indeterminate:
            told = await store.outcome(claim.id, provider, held.ballot)
        if told != "not_applied":
            return "claimed" if told == "applied" else "unknown"


def test_claim_that_only_waited_in_a_coordinators_queue_is_tried_elsewhere_as_the_first_attempt() -> None:
    """0 coordinates and is heard, but its proposals reach nobody; 2 asks it, and then 1, which asks it as well."""

    async def story(bench: Bench) -> list[int]:
        key, attempts = bench.key(0), []
        await bench.define()
        await bench[0].commit(bench.transaction(insert(key, {0: 0})))

        async def gate(sender: int, to: int, message: Struct) -> bool:
            if isinstance(message, Coordinate):
                attempts.append(message.attempt)
            await asyncio.sleep(0.001)
            return sender != 0 or not isinstance(message, Prepare | Accept)

        bench.gate = gate
        bench[0]._coordinator.forget(key)
        await bench[2].commit(bench.transaction(update(key, {0: 1})))
        return attempts

    assert play(story, RULES) == [0, 0, 0]


@pytest.mark.parametrize("blind_at", [1, 2])
def test_blind_write_whose_coordinator_hangs_is_applied_though_its_group_begins_to_forget_meanwhile(
    blind_at: int,
) -> None:
    """0 coordinates, never gets the forward, writes on until the window evicts, and falls silent for the asker."""

    async def story(bench: Bench) -> tuple[Columns | None, int]:
        key, hung = bench.key(0), asyncio.Event()
        await bench.define()
        await bench[0].commit(bench.transaction(insert(key, {0: 0, 2: 0})))
        for number in range(WINDOW_TRANSACTIONS + WINDOW_SLACK_TRANSACTIONS - 1):
            await bench[0].commit(bench.transaction(update(key, {0: number})))
        assert bench.files[0].row(key, FLOOR_KEY) is None

        async def gate(sender: int, to: int, message: Struct) -> bool:
            if isinstance(message, Coordinate) and to == 0:
                hung.set()
                return False
            return True

        bench.gate = gate
        write = asyncio.create_task(bench[blind_at].commit(bench.transaction(update(key, {2: 1}))))
        await hung.wait()
        await bench[0].commit(bench.transaction(update(key, {0: -1})))
        assert bench.files[0].row(key, FLOOR_KEY) is not None
        bench.silent = lambda me, node: (me, node) == (bench.ids[blind_at], bench.ids[0])
        await write
        return await bench.row(0, key), bench[blind_at].counters["forwards_given_up"]

    assert play(story, RULES) == ({0: -1, 2: 1}, 1)


@pytest.mark.parametrize("seed", [2, 5, 6])
def test_claims_of_three_daemons_that_stand_still_now_and_then_everybody_learns_what_became_of_his(seed: int) -> None:
    async def story(bench: Bench) -> None:
        chance = random.Random(seed)
        await bench.define()
        provider = bench.key(0)
        await bench[0].commit(bench.transaction(insert(provider, {0: 0, 1: 0})))
        stalls = asyncio.create_task(_Stalls(bench, chance).run())
        told = Counter(await asyncio.gather(*(_claim(bench, number, chance) for number in range(CLAIMS))))
        stalls.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await stalls
        (read,) = await bench[1].read([provider])
        rows = read.rows or {}
        assert (told, decode_row(rows[COUNTER]), len(rows)) == (
            {"claimed": ROOM, "full": CLAIMS - ROOM},
            {0: ROOM, 1: ROOM},
            1 + ROOM,
        )
        assert sum(node.counters.get("forwards_given_up", 0) for node in bench.running.values()) > 0

    play(story, RULES)
