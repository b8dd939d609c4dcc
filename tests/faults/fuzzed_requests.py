"""Whole messages with senseless values at a node's peers' door: an answer or an error of ours, and the node serves on.

    python -m tests.faults.fuzzed_requests --messages 20000 --seed 1

They come from a proven member, as from one with a defect. What such a member may do to its own groups is not judged:
that the node does not fail unexpectedly, hang or forget what others wrote is.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, Protocol

import msgspec
from msgspec import inspect

import dht.domain.messages
import dht.register.messages
from dht import codec
from dht.errors import DhtError
from dht.model import Change, Op, Part, Transaction
from dht.register.node import StoreNode
from dht.rows import decode_row, group_key
from dht.sim import loop as virtual
from dht.sim.cluster import Cluster
from dht.sim.production import ProductionNode, builder
from tests.faults.fuzzed_frames import made

MODULES = (dht.domain.messages, dht.register.messages)
KEY = group_key("db", "f", ("kept",))
ANSWER_S_MAX = 40.0
LOOK_EVERY = 250


class Fuzzed(Protocol):
    """Who gets the messages; `seed` makes them. `totals`: what each came to."""

    totals: Counter[str]

    async def begin(self) -> None: ...

    async def send(self, number: int) -> None:
        """Make that message up and send it. Raises what nobody may meet."""

    async def look(self) -> None:
        """Raises AssertionError where it no longer serves, lost or kept something."""

    async def end(self) -> None: ...


class Target:
    """Three production nodes in virtual time; the first gets the messages."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.cluster = Cluster(1, builder((), (), 4, 1e6, 1e6, boots_checked=False))
        kinds = [kind for kind in codec._types.values() if kind.__module__ in {module.__name__ for module in MODULES}]
        self.kinds = {kind: inspect.type_info(kind) for kind in kinds}
        self.totals: Counter[str] = Counter()
        self.written = 0

    def store(self, number: int) -> StoreNode:
        node = self.cluster.machines[number].node
        assert isinstance(node, ProductionNode)
        return node._store

    async def begin(self) -> None:
        while len(self.cluster.machines) < 3:
            await self.cluster.start(self.cluster.add(founds=not self.cluster.machines))
            await asyncio.sleep(20.0)
        await self.store(0).create_database("db")

    async def end(self) -> None:
        pass

    async def look(self) -> None:
        """The node still writes, and whoever is asked reads what was written."""
        self.written += 1
        op = Op.INSERT if self.written == 1 else Op.UPDATE
        change = Change(op, 1, (1,), {0: self.written}, {} if op is Op.INSERT else {0: self.written - 1})
        id = random.Random(f"{self.seed}/{self.written}").randbytes(16)
        await self.store(0).commit(Transaction(id, "db", 0, (Part(KEY, None, (change,)),)))
        for number in range(3):
            (read,) = await self.store(number).read([KEY])
            assert [decode_row(row) for row in (read.rows or {}).values()] == [{0: self.written}], f"read at {number}"
        errors = sum(self.store(number).counters.get("background_errors", 0) for number in range(3))
        assert not errors, "a background step failed"

    async def send(self, number: int) -> None:
        chance = random.Random(f"{self.seed}/{number}")
        kind = chance.choice(list(self.kinds))
        made_up = made(chance, self.kinds[kind])
        tag, *fields = made_up if isinstance(made_up, list) and made_up else [None]
        store, sender = self.store(0), self.cluster.machines[chance.choice([1, 2])].node_id
        try:
            message = msgspec.convert([tag, *_sane(chance, store, fields)], kind, builtin_types=(bytes,), strict=True)
        except msgspec.ValidationError:
            self.totals["no message"] += 1
            return
        try:
            async with asyncio.timeout(ANSWER_S_MAX):
                reply = await store.answer(sender, message)
            self.totals[f"{kind.__name__}: {type(reply).__name__}"] += 1
        except DhtError as error:
            self.totals[f"{kind.__name__}: {type(error).__name__}"] += 1


def _sane(chance: random.Random, store: StoreNode, value: Any) -> Any:
    """Some values as they could be: keys of groups, ballots of today; never the group that is looked at."""
    if isinstance(value, bytes) and chance.random() < 0.3:
        return group_key("db", "f", (chance.randrange(5),))
    if isinstance(value, int) and not isinstance(value, bool) and chance.random() < 0.7:
        roster = store._context.domain.roster
        return chance.choice([0, 1, 2, roster.generation, roster.epoch, *roster.tablet_epochs])
    if isinstance(value, str) and chance.random() < 0.8:
        return chance.choice(["db", store._context.domain.roster.domain])
    if isinstance(value, list):
        return [_sane(chance, store, item) for item in value]
    if isinstance(value, dict):
        return {key: _sane(chance, store, item) for key, item in value.items()}
    return value


async def run_messages(target: Fuzzed, seed: int, first: int, count: int) -> Counter[str]:
    await target.begin()
    for number in range(first, first + count):
        try:
            await target.send(number)
            if number % LOOK_EVERY == 0 or count == 1:
                await target.look()
        except Exception as error:
            raise AssertionError(f"seed {seed} message {number}: {type(error).__name__}: {error}") from error
    await target.look()
    await target.end()
    return target.totals


def play(fuzzed: Callable[[int], Fuzzed], seed: int, first: int, count: int) -> Counter[str]:
    """Send messages `first` to `first + count - 1` of the seed in virtual time; how often each came to what."""
    found: list[Counter[str]] = []

    async def told() -> None:
        found.append(await run_messages(fuzzed(seed), seed, first, count))

    virtual.run(told(), time_limit_s=1e9, steps_max=10**10)
    return found[0]


def main(fuzzed: Callable[[int], Fuzzed], about: str | None) -> int:
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--messages", type=int, default=20_000)
    given = parser.parse_args()
    logging.disable(logging.CRITICAL)
    print(f"{given.messages} messages, seed {given.seed}", flush=True)
    began = time.monotonic()
    for kind, times in sorted(play(fuzzed, given.seed, 0, given.messages).items()):
        print(f"{times:7d}  {kind}")
    print(f"an answer or an error to each, and nothing lost or kept, in {time.monotonic() - began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main(Target, __doc__))
