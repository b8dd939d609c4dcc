"""Who has connected to this node's port and is not proven yet: how many, for how long, how much they may send.

Nothing that a stranger says is believed, so none of it may cost much. The limit of a WebSocket's messages is fixed when
it opens, and has to let the frames of a link through; what a stranger sends is therefore counted where the kernel has
counted it, at every tick.

Strangers are so many at most, and of those who have said something few are at work at a time, with TLS and the
handshake; the others wait, first come, first served. Were all at work at once, as when a network has healed and
hundreds dial, all would be late together where the processor is slow; and who is sent away pays for TLS again. Where
there is no room, or no turn, for one more, the host that has the most loses its oldest, so that a host that floods the
port keeps no other one out.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Collection
from typing import Final, Protocol

from aiohttp.web_protocol import RequestHandler

from dht.wire import tcp

STRANGERS_MAX: Final = 512
HANDSHAKES_MAX: Final = 64
"""At work at a time."""
STRANGER_S: Final = 3.0
"""How long a connection to the port may last without a proven peer, from when it was accepted."""
STRANGER_BYTES_MAX: Final = 64 * 1024
"""How much may come on it: TLS's handshake, the head of an HTTP request and two messages of a handshake, with room to
spare."""

Connection = RequestHandler


class Guest(Protocol):
    """A connection that is not proven."""

    def force_close(self) -> None:
        """End it now."""


class Room:
    """Guests of hosts, so many at a time."""

    def __init__(self, guests_max: int) -> None:
        self._guests_max = guests_max
        self._guests: dict[Guest, str] = {}
        self._waiting: dict[Guest, tuple[str, asyncio.Future[None]]] = {}

    def __contains__(self, guest: Guest) -> bool:
        return guest in self._guests

    def begin(self, guest: Guest, host: str) -> bool:
        """It has come; False: there is no room for it."""
        if len(self._guests) >= self._guests_max and not self._make_room(host):
            return False
        self._guests[guest] = host
        return True

    async def wait(self, guest: Guest, host: str) -> None:
        """Come in as soon as there is room, behind all who wait already."""
        if self.begin(guest, host):
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting[guest] = host, turn
        try:
            await turn
        except asyncio.CancelledError:
            self.end(guest)
            raise

    def end(self, guest: Guest) -> None:
        """It is gone, or has gone on, or waits no more."""
        self._waiting.pop(guest, None)
        if self._guests.pop(guest, None) is None:
            return
        for following, (host, turn) in list(self._waiting.items()):
            del self._waiting[following]
            if not turn.done():  # else it is being cancelled
                self._guests[following] = host
                turn.set_result(None)
                return

    def _make_room(self, host: str) -> bool:
        """End the oldest guest of the host that has the most; False if that is no other host, or has no more."""
        count = Counter(self._guests.values())
        busiest, most = count.most_common(1)[0]
        if most <= count[host] + 1:
            return False
        oldest = next(guest for guest, of in self._guests.items() if of == busiest)
        del self._guests[oldest]
        oldest.force_close()
        return True


class Strangers:
    """The connections that this node has accepted, as far as they are, or were, without a proven peer."""

    def __init__(self) -> None:
        self._all = Room(STRANGERS_MAX)
        self._at_work = Room(HANDSHAKES_MAX)
        self._guests: dict[Connection, Guest] = {}
        """Those that are on their way to HTTP, or with it, and not proven."""
        self._coming: dict[Connection, None] = {}
        self._since_s: dict[Connection, float] = {}
        self._shaking: dict[Connection, None] = {}
        self._proven: dict[Connection, bool] = {}
        """Connections that carry a link, and those that did."""

    # ---- before HTTP

    def enter(self, guest: Guest, host: str) -> bool:
        """It was accepted; False: there is no room for it."""
        return self._all.begin(guest, host)

    async def turn(self, guest: Guest, host: str) -> None:
        """Wait for its turn to be served. Ends with `leave`, or when its handshake is over."""
        await self._at_work.wait(guest, host)

    def leave(self, guest: Guest) -> None:
        """It is gone."""
        self._all.end(guest)
        self._at_work.end(guest)

    # ---- with HTTP

    def comes(self, connection: Connection, guest: Guest, since_s: float) -> None:
        """It is led to HTTP now; it was accepted then."""
        self._guests[connection] = guest
        self._since_s[connection] = since_s
        self._coming[connection] = None

    def came(self, connection: Connection) -> None:
        """HTTP serves it."""
        self._coming.pop(connection, None)

    def lost(self, connection: Connection) -> None:
        """It did not come so far, or is gone."""
        self._coming.pop(connection, None)
        guest = self._guests.pop(connection, None)
        if guest is not None:
            self.leave(guest)

    def begin(self, connection: Connection) -> bool:
        """A handshake begins; False: it had its turn already."""
        guest = self._guests.get(connection)
        if guest is None or guest not in self._at_work:
            return False
        self._shaking[connection] = None
        return True

    def end(self, connection: Connection) -> None:
        """Its handshake is over, whatever came of it."""
        self._shaking.pop(connection, None)
        guest = self._guests.get(connection)
        if guest is not None:
            self._at_work.end(guest)

    def proven(self, connection: Connection) -> None:
        """It carries a link from now on, until `ended`."""
        self._proven[connection] = True
        self.lost(connection)

    def ended(self, connection: Connection) -> None:
        self._proven[connection] = False

    def turn_out(self, accepted: Collection[Connection], now_s: float) -> int:
        """Close those that did not prove themselves in time, or sent too much meanwhile.

        How many, without those within a handshake, which ends by that, and counts itself.
        """
        accepted = dict.fromkeys(accepted)
        for connection in [c for c in self._guests if c not in accepted and c not in self._coming]:
            self.lost(connection)
        self._proven = {c: carries for c, carries in self._proven.items() if c in accepted}
        strangers = [c for c in accepted if not self._proven.get(c)]
        self._since_s = {c: self._since_s.get(c, now_s) for c in (*strangers, *self._coming)}
        out = [c for c in strangers if now_s - self._since_s[c] > STRANGER_S or self._sent_too_much(c)]
        for connection in out:
            close_now(connection)
        return sum(c not in self._shaking for c in out)

    def _sent_too_much(self, connection: Connection) -> bool:
        transport = connection.transport
        if transport is None or connection in self._proven:
            return False
        return tcp.received_bytes(tcp.socket_of(transport)) > STRANGER_BYTES_MAX


def close_now(connection: Connection) -> None:
    """TLS would take leave first, and wait for the other end to do so."""
    transport = connection.transport
    connection.force_close()
    if transport is not None:
        transport.abort()
