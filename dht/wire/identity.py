"""Who a node is: its key, its PoP, its incarnation and boot counter; and the secret that its cluster shares.

node_id = SHA-1(PoP name)[:4] + SHA-1(public key)[:16]: a node cannot choose its id without finding a key for it, and
the nodes of one PoP are neighbours in the overlay. Files are the daemon's business; here are bytes.
"""

from __future__ import annotations

import hashlib
import secrets
import uuid
from dataclasses import dataclass, field, replace

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from dht.errors import Invalid
from dht.model import NodeId

KEY_BYTES = 32
INCARNATION_BYTES = 16
NODE_ID_BYTES = 20
SIGNATURE_BYTES = 64
POP_CHARS_MAX = 64


def pop_prefix(pop: str) -> bytes:
    """The first 4 bytes of the id of every node of the PoP."""
    return hashlib.sha1(pop.encode(), usedforsecurity=False).digest()[:4]


def node_id_of(pop: str, public_key: bytes) -> NodeId:
    """The id of the node with this PoP and raw public key."""
    return pop_prefix(pop) + hashlib.sha1(public_key, usedforsecurity=False).digest()[:16]


def signed_by(public_key: bytes, signature: bytes, data: bytes) -> bool:
    """Whether the holder of the raw public key signed the data."""
    try:
        Ed25519PublicKey.from_public_bytes(public_key).verify(signature, data)
    except (InvalidSignature, ValueError):
        return False
    return True


@dataclass(frozen=True, slots=True)
class Cluster:
    """A cluster's id (public) and key (32 bytes; whoever holds it is a member)."""

    cluster_id: str
    key: bytes = field(repr=False)

    def __post_init__(self) -> None:
        if len(self.key) != KEY_BYTES:
            raise Invalid(f"a cluster key has {KEY_BYTES} bytes, this one {len(self.key)}")

    @classmethod
    def found(cls) -> Cluster:
        """A new cluster."""
        return cls(str(uuid.uuid4()), secrets.token_bytes(KEY_BYTES))


@dataclass(frozen=True, slots=True)
class NodeIdentity:
    """A node at one start. `incarnation`: the data directory's UUID as 16 bytes; `boot`: raised durably at each start.

    `start_id` is drawn at each start: two processes with one data directory's copy have the same boot but not this.
    """

    pop: str
    incarnation: bytes
    boot: int
    private_key: Ed25519PrivateKey = field(repr=False)
    public_key: bytes = field(repr=False)
    node_id: NodeId
    start_id: bytes

    @classmethod
    def load(cls, pop: str, private_key: bytes, incarnation: bytes, boot: int) -> NodeIdentity:
        """From what rests in the data directory (the raw private key: 32 bytes). Raises Invalid for unfit values."""
        if not pop or len(pop) > POP_CHARS_MAX:
            raise Invalid(f"a PoP's name has 1 to {POP_CHARS_MAX} characters, not {len(pop)}")
        if len(private_key) != KEY_BYTES or len(incarnation) != INCARNATION_BYTES or boot < 1:
            raise Invalid(
                "a node has a private key of 32 bytes, an incarnation of 16 bytes and a boot counter from 1 on"
            )
        private = Ed25519PrivateKey.from_private_bytes(private_key)
        public = private.public_key().public_bytes_raw()
        return cls(pop, incarnation, boot, private, public, node_id_of(pop, public), secrets.token_bytes(8))

    @classmethod
    def create(cls, pop: str) -> NodeIdentity:
        """A new node at its first start."""
        return cls.load(pop, secrets.token_bytes(KEY_BYTES), uuid.uuid4().bytes, 1)

    def next_boot(self) -> NodeIdentity:
        """The same node at its next start."""
        return replace(self, boot=self.boot + 1, start_id=secrets.token_bytes(8))

    def private_bytes(self) -> bytes:
        """The raw private key, for a file of mode 0600."""
        return self.private_key.private_bytes_raw()

    def sign(self, data: bytes) -> bytes:
        """An Ed25519 signature (64 bytes)."""
        return self.private_key.sign(data)
