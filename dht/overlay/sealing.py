"""Datagrams that only members can make and read, each once.

    version (1), sender's node id (20), boot counter (8), session (16), counter (8); AES-256-GCM(message), tag (16)

The clear part is authenticated too. The key comes by HKDF from the cluster's key for one sender, boot and session
(random at each start, so that two processes with one copied directory never share a key); the nonce is the counter. A
receiver keeps a window of counters per sender and refuses a boot older than the newest it has seen.
"""

from __future__ import annotations

import os
import struct
from collections import OrderedDict
from dataclasses import dataclass
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from dht.model import NodeId

NODE_ID_BYTES: Final = 20
DATAGRAM_BYTES_MAX: Final = 1400
"""Fits an Ethernet frame and the tunnels that take some of it: a fragment lost is a datagram lost."""
WINDOW_COUNTERS: Final = 1024
SESSIONS_MAX: Final = 4096
_VERSION: Final = 1
_HEADER: Final = struct.Struct(">B20sQ16sQ")
_TAG_BYTES: Final = 16
MESSAGE_BYTES_MAX: Final = DATAGRAM_BYTES_MAX - _HEADER.size - _TAG_BYTES


@dataclass(slots=True)
class OverlayCounters:
    """What came, what went, and what was dropped and why. Nothing that is dropped has any other effect."""

    sent: int = 0
    received: int = 0
    timeouts: int = 0
    send_errors: int = 0
    dropped_garbage: int = 0
    dropped_oversized: int = 0
    dropped_reflected: int = 0
    dropped_unopened: int = 0
    dropped_stale: int = 0
    dropped_replayed: int = 0
    dropped_malformed: int = 0
    dropped_unexpected: int = 0
    refused_contacts: int = 0
    refused_hints: int = 0


@dataclass(slots=True)
class _Session:
    """What is known of a sender's newest start. `seen`: bit i stands for counter `highest` - i."""

    boot: int
    session: bytes
    cipher: AESGCM
    highest: int = -1
    seen: int = 0

    def is_replay(self, counter: int) -> bool:
        behind = self.highest - counter
        return behind >= WINDOW_COUNTERS or (behind >= 0 and bool(self.seen >> behind & 1))

    def note(self, counter: int) -> None:
        ahead = counter - self.highest
        if ahead > 0:
            self.seen = 1 if ahead >= WINDOW_COUNTERS else (self.seen << ahead | 1) & ((1 << WINDOW_COUNTERS) - 1)
            self.highest = counter
        else:
            self.seen |= 1 << -ahead


class Sealing:
    """Seals what this node sends and opens what it gets. `boot`: raised durably at each start of the node."""

    def __init__(self, node_id: NodeId, cluster_key: bytes, boot: int, counters: OverlayCounters) -> None:
        self._node_id = node_id
        self._cluster_key = cluster_key
        self._boot = boot
        self._session = os.urandom(16)
        self._cipher = self._derive(node_id, boot, self._session)
        self._counter = 0
        self._counters = counters
        self._sessions: OrderedDict[NodeId, _Session] = OrderedDict()

    def seal(self, message: bytes) -> bytes:
        """The datagram; the caller keeps messages within MESSAGE_BYTES_MAX."""
        counter = self._counter
        self._counter += 1
        header = _HEADER.pack(_VERSION, self._node_id, self._boot, self._session, counter)
        return header + self._cipher.encrypt(_nonce(counter), message, header)

    def open(self, datagram: bytes) -> tuple[NodeId, bytes] | None:
        """(sender, message); None, and one counter raised, for whatever is not a member's fresh datagram."""
        counters = self._counters
        if len(datagram) < _HEADER.size + _TAG_BYTES or datagram[0] != _VERSION:
            counters.dropped_garbage += 1
            return None
        if len(datagram) > DATAGRAM_BYTES_MAX:
            counters.dropped_oversized += 1
            return None
        _, sender, boot, session_id, counter = _HEADER.unpack_from(datagram)
        if sender == self._node_id:
            counters.dropped_reflected += 1
            return None
        session = self._sessions.get(sender)
        if session is None or session.boot != boot or session.session != session_id:
            # A start not seen yet. It becomes the sender's session only once a datagram of it has opened.
            if session is not None and boot <= session.boot:
                counters.dropped_stale += 1
                return None
            session = _Session(boot, session_id, self._derive(sender, boot, session_id))
        if session.is_replay(counter):
            counters.dropped_replayed += 1
            return None
        try:
            message = session.cipher.decrypt(_nonce(counter), datagram[_HEADER.size :], datagram[: _HEADER.size])
        except InvalidTag:
            counters.dropped_unopened += 1
            return None
        session.note(counter)
        self._sessions[sender] = session
        self._sessions.move_to_end(sender)
        if len(self._sessions) > SESSIONS_MAX:
            self._sessions.popitem(last=False)
        return sender, message

    def _derive(self, node_id: NodeId, boot: int, session: bytes) -> AESGCM:
        info = b"lucd overlay" + node_id + boot.to_bytes(8, "big") + session
        return AESGCM(HKDF(algorithm=SHA256(), length=32, salt=None, info=info).derive(self._cluster_key))


def _nonce(counter: int) -> bytes:
    return counter.to_bytes(12, "big")
