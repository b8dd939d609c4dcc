"""What a local client's request is passed on to: the store, the bus of the RPC door, or the daemon itself."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Protocol

from dht import requests
from dht.codec import Message
from dht.errors import Invalid, NotFound
from dht.model import Struct
from dht.requests import Store
from dht.wire.frames import time_left_s
from dht.wire.local import Connection
from lucd.turnstile import Turnstile

BUS_NUMBERS = range(150, 200)
DAEMON_NUMBERS = range(200, 250)


class Bus(Protocol):
    """The part of `nova_bridge.rpc.bus.Bus` that the door needs."""

    async def answer(self, connection: Connection, message: Message) -> Struct: ...


class Door:
    """`dht.wire.local.LocalAnswer` of a daemon. `home`: of a database; raises NotFound.

    `counters`: requests by kind, since the start.
    """

    def __init__(
        self,
        store: Store,
        bus: Bus | None,
        daemon: Callable[[Message], Awaitable[Struct]],
        home: Callable[[str], Awaitable[str]],
    ) -> None:
        self.counters: dict[str, int] = {}
        self.turnstile = Turnstile()
        self._store = store
        self._bus = bus
        self._daemon = daemon
        self._home = home

    async def answer(self, connection: Connection, message: Message) -> Struct:
        """Raises what the part raises; Invalid for a message that is not for a daemon's door."""
        kind = type(message).__name__.lower()
        self.counters[kind] = self.counters.get(kind, 0) + 1
        number = type(message).__struct_config__.tag
        if number in BUS_NUMBERS and self._bus is not None:
            return await self._bus.answer(connection, message)
        if number in DAEMON_NUMBERS:
            return await self._daemon(message)
        ticket = await self.turnstile.enter(connection)
        try:
            if isinstance(message, requests.AskHome):
                return await self._answer_home(message)
            return await ask_store(self._store, message, time_left_s())
        finally:
            self.turnstile.leave(ticket)

    async def _answer_home(self, message: requests.AskHome) -> requests.AskHomeReply:
        try:
            return requests.AskHomeReply(await self._home(message.database))
        except NotFound:
            return requests.AskHomeReply("")


async def ask_store(store: Store, message: Message, timeout_s: float) -> Message:
    """The store's reply to one of `dht.requests`."""
    match message:
        case requests.ReadGroups():
            if len(message.known) != len(message.keys):
                raise Invalid(f"{len(message.keys)} keys came with {len(message.known)} ballots; send one for each key")
            return requests.ReadGroupsReply(await store.read(message.keys, message.known, timeout_s, message.near))
        case requests.Find():
            return requests.FindReply(await store.find(message.query, timeout_s))
        case requests.Commit():
            return requests.CommitReply(await store.commit(message.transaction, message.attempt, timeout_s))
        case requests.ReserveIds():
            first = await store.reserve_ids(message.database, message.name, message.count, message.above, timeout_s)
            return requests.ReserveIdsReply(first)
        case requests.RaiseSequence():
            await store.raise_sequence(message.database, message.name, message.above, timeout_s)
            return requests.Done()
        case requests.AskOutcome():
            return requests.AskOutcomeReply(await store.outcome(message.id, message.key, message.seen, timeout_s))
        case requests.RaiseFence():
            following = await store.fence(message.database, message.version, message.prefixes, message.first, timeout_s)
            return requests.RaiseFenceReply(following)
        case _:
            return await ask_registry(store, message, timeout_s)


async def ask_registry(store: Store, message: Message, timeout_s: float) -> Message:
    """The same of requests about databases as such."""
    match message:
        case requests.ListDatabases():
            return requests.ListDatabasesReply(await store.list_databases(timeout_s))
        case requests.ListHomes():
            return requests.ListHomesReply(await store.homes(timeout_s))
        case requests.ListPops():
            return requests.ListPopsReply(await store.pops(timeout_s))
        case requests.CreateDatabase():
            return requests.Done(await store.create_database(message.name, timeout_s, message.home))
        case requests.DropDatabase():
            return requests.Done(await store.drop_database(message.name, timeout_s, message.home))
        case _:
            raise Invalid(f"{type(message).__name__} is not a request that a daemon's door serves")
