"""Who of the local clients is served now: a bounded number of requests at once, the connections by turns.

Requests beyond that wait, each connection in a queue of its own, and the queues are served one request each in turn: a
client that sends hundreds at once waits for itself, not the others for it. Who would wait too long, or finds too many
waiting, is refused at once as Unavailable: work that nobody waits for any more would slow down all the rest.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Hashable

from dht.errors import Unavailable

AT_ONCE_REQUESTS_MAX = 64
OF_ONE_CLIENT_REQUESTS_MAX = 16
"""Of one connection. Who is inside shares the processor with all that are, so one client is never most of them."""
WAITING_REQUESTS_MAX = 4_000
WAIT_S_MAX = 2.0
HELD_S_MAX = 1.0
"""A request that takes longer than this waits for something itself and no longer counts as being served."""
CHECK_S = 0.1


class Turnstile:
    """`counters`: waiting (now), waited, refused, since the start."""

    def __init__(
        self,
        at_once: int = AT_ONCE_REQUESTS_MAX,
        waiting: int = WAITING_REQUESTS_MAX,
        of_one: int = OF_ONE_CLIENT_REQUESTS_MAX,
    ) -> None:
        self.counters = {"waiting": 0, "waited": 0, "refused": 0}
        self._at_once = at_once
        self._of_one = of_one
        self._waiting_max = waiting
        self._inside: dict[int, tuple[Hashable, float]] = {}
        self._count: dict[Hashable, int] = {}
        self._queues: OrderedDict[Hashable, deque[asyncio.Future[int]]] = OrderedDict()
        """Of clients that may send one more in."""
        self._parked: dict[Hashable, deque[asyncio.Future[int]]] = {}
        """Of clients that have as many inside as one may."""
        self._next = 0
        self._checking: asyncio.TimerHandle | None = None

    async def enter(self, client: Hashable) -> int:
        """A ticket, to be given back to `leave`. Raises Unavailable when the daemon has too much to do."""
        if len(self._inside) < self._at_once and not self._queues and self._count.get(client, 0) < self._of_one:
            return self._admit(client)
        if self.counters["waiting"] >= self._waiting_max:
            self.counters["refused"] += 1
            raise Unavailable(
                f"this daemon is overloaded: {self.counters['waiting']} requests wait already; nothing was done, try "
                "again later",
                sent=False,
            )
        return await self._wait(client)

    def leave(self, ticket: int) -> None:
        if ticket in self._inside:
            self._go(ticket)
            self._let_in()

    async def _wait(self, client: Hashable) -> int:
        turn: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._queue(client).append(turn)
        self.counters["waiting"] += 1
        self.counters["waited"] += 1
        self._check_later()
        try:
            await asyncio.wait((turn,), timeout=WAIT_S_MAX)
            if turn.done():
                return turn.result()
        except asyncio.CancelledError:
            if turn.done():
                self.leave(turn.result())
            raise
        finally:
            if not turn.done():
                self._forget(client, turn)
        self.counters["refused"] += 1
        raise Unavailable(
            f"this daemon is overloaded: the request waited {WAIT_S_MAX:.0f} s for its turn; nothing was done, try "
            "again later",
            sent=False,
        )

    def _queue(self, client: Hashable) -> deque[asyncio.Future[int]]:
        where = self._queues if self._count.get(client, 0) < self._of_one else self._parked
        return where.setdefault(client, deque())

    def _forget(self, client: Hashable, turn: asyncio.Future[int]) -> None:
        turn.cancel()
        self.counters["waiting"] -= 1
        where = self._queues if client in self._queues else self._parked
        where[client].remove(turn)
        if not where[client]:
            del where[client]

    def _admit(self, client: Hashable) -> int:
        self._next += 1
        self._inside[self._next] = client, asyncio.get_running_loop().time()
        self._count[client] = self._count.get(client, 0) + 1
        return self._next

    def _go(self, ticket: int) -> None:
        client, _ = self._inside.pop(ticket)
        self._count[client] -= 1
        if not self._count[client]:
            del self._count[client]
        if client in self._parked:
            self._queues[client] = self._parked.pop(client)

    def _let_in(self) -> None:
        while self._queues and len(self._inside) < self._at_once:
            client, queue = self._queues.popitem(last=False)
            queue.popleft().set_result(self._admit(client))
            self.counters["waiting"] -= 1
            if queue:
                where = self._queues if self._count[client] < self._of_one else self._parked
                where[client] = queue

    def _check_later(self) -> None:
        if self._checking is None:
            self._checking = asyncio.get_running_loop().call_later(CHECK_S, self._check)

    def _check(self) -> None:
        """Let in who waits behind those that only wait themselves."""
        self._checking = None
        late_s = asyncio.get_running_loop().time() - HELD_S_MAX
        for ticket in [ticket for ticket, (_, since_s) in self._inside.items() if since_s < late_s]:
            self._go(ticket)
        self._let_in()
        if self.counters["waiting"]:
            self._check_later()
