"""Who has connected to this node's port and is not proven yet: how many, for how long, how much they may send.

Nothing that a stranger says is believed, so none of it may cost much. The limit of a WebSocket's messages is fixed when
it opens, and has to let the frames of a link through; what a stranger sends is therefore counted where the kernel has
counted it, at every tick. Handshakes at a time are few. Where there is no room for one more, the host that has the most
under way loses its oldest, so that a host that floods the port keeps no other one out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from typing import Final

from aiohttp.web_protocol import RequestHandler

from dht.wire import tcp

HANDSHAKES_MAX: Final = 64
STRANGER_S: Final = 3.0
"""How long a connection to the port may last without a proven peer."""
STRANGER_BYTES_MAX: Final = 64 * 1024
"""How much may come on it: the head of an HTTP request and two messages of a handshake, with room to spare."""

Connection = RequestHandler


class Strangers:
    """The connections that this node has accepted, as far as they are, or were, without a proven peer."""

    def __init__(self) -> None:
        self._since_s: dict[Connection, float] = {}
        self._shaking: dict[Connection, str] = {}
        self._proven: dict[Connection, bool] = {}
        """Connections that carry a link, and those that did."""

    def begin(self, connection: Connection, host: str) -> bool:
        """A handshake begins; False: there is no room for it."""
        if len(self._shaking) >= HANDSHAKES_MAX and not self._make_room(host):
            return False
        self._shaking[connection] = host
        return True

    def end(self, connection: Connection) -> None:
        """Its handshake is over, whatever came of it."""
        self._shaking.pop(connection, None)

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
            connection.force_close()
        return sum(c not in self._shaking for c in out)

    def _sent_too_much(self, connection: Connection) -> bool:
        transport = connection.transport
        if transport is None or connection in self._proven:
            return False
        return tcp.received_bytes(transport.get_extra_info("socket")) > STRANGER_BYTES_MAX

    def _make_room(self, host: str) -> bool:
        """End the oldest handshake of the host that has the most; False if that is no other host, or has no more."""
        count = Counter(self._shaking.values())
        busiest, most = count.most_common(1)[0]
        if most <= count[host] + 1:
            return False
        oldest = next(c for c, of in self._shaking.items() if of == busiest)
        del self._shaking[oldest]
        oldest.force_close()
        return True
