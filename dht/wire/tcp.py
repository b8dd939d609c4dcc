"""What the kernel knows of a connection (Linux, `struct tcp_info`): kernels acknowledge what processes leave unread."""

from __future__ import annotations

import socket
import struct
from typing import Any, NamedTuple

_BYTES = 104
_LEAVING = (7, 8)
"""TCP_CLOSE and TCP_CLOSE_WAIT, of the byte that `struct tcp_info` begins with."""
_UNACKED_AT = 24
_LAST_ACK_AT = 56
_RTT_AT = 68
_RTT_DEVIATION_AT = 72
_RECEIVED_AT = 128


class Tcp(NamedTuple):
    """`round_trip_s`: smoothed; `deviation_s`: its mean deviation. `unacknowledged`: segments on their way.

    `last_ack_s`: since anything came back. `received_bytes`: so far; 0 where the kernel does not tell.
    """

    round_trip_s: float
    unacknowledged: int
    last_ack_s: float
    deviation_s: float
    received_bytes: int = 0

    @property
    def echo_max_s(self) -> float:
        """Within what an acknowledgement that the other kernel does not put off is to be expected, jitter included."""
        return self.round_trip_s + 2 * self.deviation_s


NOTHING_KNOWN = Tcp(0.0, 0, 0.0, 0.0)


def socket_of(transport: Any) -> Any:
    """The socket below a transport, or below a WebSocket; None once it is gone, which asyncio's TLS does not say."""
    try:
        return transport.get_extra_info("socket")
    except AttributeError:
        return None


def read(connection: Any) -> Tcp:
    """Of the socket, as asyncio hands it out; NOTHING_KNOWN of what is no TCP connection any more."""
    if connection is None:
        return NOTHING_KNOWN
    try:
        info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _RECEIVED_AT + 8)
    except OSError:
        return NOTHING_KNOWN
    if len(info) < _BYTES:
        return NOTHING_KNOWN
    places = (_UNACKED_AT, _LAST_ACK_AT, _RTT_AT, _RTT_DEVIATION_AT)
    unacked, last_ack_ms, rtt_us, deviation_us = (struct.unpack_from("I", info, at)[0] for at in places)
    return Tcp(rtt_us / 1e6, unacked, last_ack_ms / 1e3, deviation_us / 1e6, _received_bytes(info))


def received_bytes(connection: Any) -> int:
    """How many have come on it so far; 0 where that is not known."""
    if connection is None:
        return 0
    try:
        info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _RECEIVED_AT + 8)
    except OSError:
        return 0
    return _received_bytes(info)


def _received_bytes(info: bytes) -> int:
    return int(struct.unpack_from("Q", info, _RECEIVED_AT)[0]) if len(info) >= _RECEIVED_AT + 8 else 0


def is_leaving(connection: socket.socket) -> bool:
    """Whether the other end has closed the connection, or is gone, also where what it sent before is not read yet."""
    try:
        return connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] in _LEAVING
    except OSError:
        return True
