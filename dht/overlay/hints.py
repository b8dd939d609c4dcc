"""Location hints: signed, limited, forgotten unless published again. Never trusted for content."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from typing import Final

import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from dht.model import GroupKey, NodeId
from dht.overlay.messages import HINTS_PER_KEY_MAX, Hint, pop_prefix

HINT_KEYS_MAX: Final = 100_000
HINT_LIFE_S: Final = 3600.0
_DOMAIN: Final = b"lucd location hint\x00"


def hint_key(group: GroupKey) -> bytes:
    """Where the hints of a group lie in the overlay."""
    return hashlib.sha1(group, usedforsecurity=False).digest()


def signed_hint(key: bytes, pop: str, made_ms: int, node_id: NodeId, private_key: Ed25519PrivateKey) -> Hint:
    """This node's hint that the group lives in its PoP."""
    public_key = private_key.public_key().public_bytes_raw()
    unsigned = Hint(key, pop, made_ms, node_id, public_key, b"")
    return msgspec.structs.replace(unsigned, signature=private_key.sign(_signed_part(unsigned)))


def genuine(hint: Hint) -> bool:
    """Whether the node that the hint names signed it, and its id follows from the PoP and key that it states."""
    expected = pop_prefix(hint.pop) + hashlib.sha1(hint.public_key, usedforsecurity=False).digest()[:16]
    if hint.node_id != expected:
        return False
    try:
        Ed25519PublicKey.from_public_bytes(hint.public_key).verify(hint.signature, _signed_part(hint))
    except (InvalidSignature, ValueError):
        return False
    return True


def _signed_part(hint: Hint) -> bytes:
    return _DOMAIN + msgspec.msgpack.encode([hint.key, hint.pop, hint.made_ms, hint.node_id, hint.public_key])


class HintStore:
    """The hints that this node keeps for the overlay: the newest of each publisher, a few per key, oldest keys go."""

    def __init__(self, keys_max: int = HINT_KEYS_MAX) -> None:
        self._keys_max = keys_max
        self._hints: OrderedDict[bytes, dict[NodeId, tuple[float, Hint]]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._hints)

    def put(self, hint: Hint, now: float) -> bool:
        """Keep a genuine hint. False: not genuine, or this publisher's newer one is here already."""
        held = self._hints.get(hint.key, {})
        known = held.get(hint.node_id)
        if known is not None and known[1].made_ms > hint.made_ms:
            return False
        if (known is None or known[1] != hint) and not genuine(hint):
            return False
        held.pop(hint.node_id, None)
        while len(held) >= HINTS_PER_KEY_MAX:
            held.pop(next(iter(held)))
        held[hint.node_id] = (now, hint)
        self._hints[hint.key] = held
        self._hints.move_to_end(hint.key)
        while len(self._hints) > self._keys_max:
            self._hints.popitem(last=False)
        return True

    def get(self, key: bytes, now: float) -> list[Hint]:
        """Hints of the key that are still alive, newest first."""
        held = self._hints.get(key)
        if held is None:
            return []
        for publisher in [node for node, (taken, _) in held.items() if now - taken > HINT_LIFE_S]:
            del held[publisher]
        if not held:
            del self._hints[key]
        return sorted((hint for _, hint in held.values()), key=lambda hint: hint.made_ms, reverse=True)
