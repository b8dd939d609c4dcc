"""PoPs in one process, each a store in memory, with the places and shards of the real ones over them."""

from __future__ import annotations

import asyncio
import random

from dht.errors import Indeterminate, Unavailable
from dht.model import ZERO, Ballot
from dht.overlay.messages import pop_prefix
from dht.register.memory import MemoryStore
from dht.register.places import Places
from dht.register.shards import Shard

DATABASE = "d"


class Clock:
    now_s = 0.0

    def monotonic(self):
        return self.now_s


class NamedMemory(MemoryStore):
    """Ballots of two PoPs are never the same."""

    def __init__(self, pop: str) -> None:
        self.node = pop_prefix(pop) + pop.encode()
        super().__init__()

    def _next_ballot(self) -> Ballot:
        return super()._next_ballot()._replace(node=self.node)


class Pop:
    """A PoP's domain. `away`: what to raise instead of answering; `lost`: after having served."""

    def __init__(self, name: str) -> None:
        self.memory = NamedMemory(name)
        self.away: Exception | None = None
        self.lost = False
        self.asked: list[str] = []

    def __getattr__(self, name: str):
        serve = getattr(self.memory, name)

        async def ask(*arguments, **named):
            self.asked.append(name)
            await asyncio.sleep(0)
            if self.away is not None:
                raise self.away
            reply = serve(*arguments, **named)
            if self.lost:
                raise Indeterminate("lost on the way back")
            return reply

        return ask


class Spanning:
    """`home`: domain `global`, with the database's catalog; `known`: the PoPs that the list named last."""

    def __init__(self, *names: str) -> None:
        self.clock = Clock()
        self.home = Pop("home")
        self.pops = {name: Pop(name) for name in names}
        self.known = list(names)
        self.hints: dict[bytes, str] = {}
        self.made: list[bytes] = []
        self.shards = {
            name: Shard(name, pop, self.registry, self.clock, random.Random(name)) for name, pop in self.pops.items()
        }
        self.home.memory.create_database(DATABASE)

    def registry(self) -> Pop:
        return self.home

    def places(self, pop: str, made_once: bool = False) -> Places:
        async def hint(key: bytes) -> str | None:
            return self.hints.get(key)

        index = list(self.pops).index(pop)
        made = Places(
            pop,
            self.clock,
            self.shards[pop],
            self.shards.__getitem__,
            self.registry,
            lambda: index,
            hint,
            self.made.append,
            lambda key: made_once,
        )
        made._shards[DATABASE] = (ZERO._replace(round=1), tuple(self.known))
        return made

    def cut(self, *names: str) -> None:
        for name in names:
            self.pops[name].away = Unavailable(f"{name} is cut off")

    def heal(self) -> None:
        for pop in self.pops.values():
            pop.away = None

    def asked(self) -> dict[str, list[str]]:
        """What each PoP was asked since the last time."""
        out = {name: pop.asked for name, pop in self.pops.items() if pop.asked}
        for pop in self.pops.values():
            pop.asked = []
        return out
