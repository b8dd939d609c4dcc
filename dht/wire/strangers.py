"""Who has connected to this node's port and is not proven yet: how many, for how long, how much they may send.

Nothing that a stranger says is believed, so none of it may cost much. The limit of a WebSocket's messages is fixed when
it opens, and has to let the frames of a link through; what a stranger sends is therefore counted where the kernel has
counted it, at every tick. Handshakes at a time are few, and so are those that have not even come so far. Where there
is no room for one more, the host that has the most under way loses its oldest, so that a host that floods the port
keeps no other one out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from typing import Final, Protocol

from aiohttp.web_protocol import RequestHandler

from dht.wire import tcp

HANDSHAKES_MAX: Final = 64
ENTERING_MAX: Final = 512
"""Connections within TLS's handshake, or before it; as many daemons may come at once when a network has healed."""
STRANGER_S: Final = 3.0
"""How long a connection to the port may last without a proven peer, from when it was accepted."""
STRANGER_BYTES_MAX: Final = 64 * 1024
"""How much may come on it: TLS's handshake, the head of an HTTP request and two messages of a handshake, with room to
spare."""

Connection = RequestHandler


class Guest(Protocol):
    """Something that is under way at the port."""

    def force_close(self) -> None:
        """End it now."""


class Room:
    """Guests of hosts, so many at a time."""

    def __init__(self, guests_max: int) -> None:
        self._guests_max = guests_max
        self._guests: dict[Guest, str] = {}

    def __contains__(self, guest: Guest) -> bool:
        return guest in self._guests

    def begin(self, guest: Guest, host: str) -> bool:
        """It has come; False: there is no room for it."""
        if len(self._guests) >= self._guests_max and not self._make_room(host):
            return False
        self._guests[guest] = host
        return True

    def end(self, guest: Guest) -> None:
        """It is gone, or has gone on."""
        self._guests.pop(guest, None)

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
        self._since_s: dict[Connection, float] = {}
        self._shaking = Room(HANDSHAKES_MAX)
        self._proven: dict[Connection, bool] = {}
        """Connections that carry a link, and those that did."""

    def came(self, connection: Connection, since_s: float) -> None:
        """It was accepted then, before anything served it."""
        self._since_s[connection] = since_s

    def begin(self, connection: Connection, host: str) -> bool:
        """A handshake begins; False: there is no room for it."""
        return self._shaking.begin(connection, host)

    def end(self, connection: Connection) -> None:
        """Its handshake is over, whatever came of it."""
        self._shaking.end(connection)

    def proven(self, connection: Connection) -> None:
        """It carries a link from now on, until `ended`."""
        self._proven[connection] = True

    def ended(self, connection: Connection) -> None:
        self._proven[connection] = False

    def turn_out(self, accepted: Collection[Connection], now_s: float) -> int:
        """Close those that did not prove themselves in time, or sent too much meanwhile.

        How many, without those within a handshake, which ends by that, and counts itself.
        """
        accepted = dict.fromkeys(accepted)
        self._proven = {c: carries for c, carries in self._proven.items() if c in accepted}
        strangers = [c for c in accepted if not self._proven.get(c)]
        self._since_s = {c: self._since_s.get(c, now_s) for c in strangers}
        out = [c for c in strangers if now_s - self._since_s[c] > STRANGER_S or self._sent_too_much(c)]
        for connection in out:
            _close_now(connection)
        return sum(c not in self._shaking for c in out)

    def _sent_too_much(self, connection: Connection) -> bool:
        transport = connection.transport
        if transport is None or connection in self._proven:
            return False
        return tcp.received_bytes(tcp.socket_of(transport)) > STRANGER_BYTES_MAX


def _close_now(connection: Connection) -> None:
    """TLS would take leave first, and wait for the other end to do so."""
    transport = connection.transport
    connection.force_close()
    if transport is not None:
        transport.abort()
