"""How two nodes prove to each other that they belong to one cluster and are who they say: a state machine without I/O.

    dialer                          listener
    Hello            ------------>
                     <------------  Hello
    Proof            ------------>  verifies
          verifies   <------------  Proof

A Hello states everything about its sender and a fresh nonce. A Proof is an HMAC with the cluster key and a signature
with the node key, both over the transcript: the protocol's name, the prover's role, both Hellos as sent (dialer's
first) and the channel binding (`dht.wire.tls`; empty where links have no TLS). Fresh nonces on both sides defeat
replay; the role in the transcript and the refusal of one's own id defeat reflection; the binding defeats who ends TLS
between the two. Nothing that a Hello says is believed, and `accept_boot` is not asked, before its sender's Proof holds.
A Hello names its sender's binding too, so that who ends TLS and changes nothing is told from a wrong key; one who
changes that breaks both Proofs.

Refusals raise RemoteProtocolError with detail `reason`: garbage, version, other_cluster, channel, wrong_key, node_id,
own_id, unexpected_node, signature, boot, or refused (the other side refused us; its text says why).
"""

from __future__ import annotations

import enum
import hashlib
import hmac
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import msgspec

from dht.errors import DhtError, RemoteProtocolError
from dht.model import NodeId, Struct
from dht.wire.identity import (
    INCARNATION_BYTES,
    KEY_BYTES,
    NODE_ID_BYTES,
    POP_CHARS_MAX,
    SIGNATURE_BYTES,
    Cluster,
    NodeIdentity,
    node_id_of,
    signed_by,
)

PROTOCOL_VERSION = 1
FEATURE_LEVEL = 3
HANDSHAKE_BYTES_MAX = 4096
NONCE_BYTES = 32
CHANNEL_BYTES_MAX = 32
ADDRESS_CHARS_MAX = 300
REASON_CHARS_MAX = 500

AcceptBoot = Callable[[NodeId, bytes, int, bytes], None]
"""(node_id, incarnation, boot, start_id): note what a proven peer says of itself; raises a DhtError to refuse it,
because that incarnation was already met with a higher boot counter, or with this one by another start. The same counter
and start are a new link of the same run."""

_Id = Annotated[bytes, msgspec.Meta(min_length=NODE_ID_BYTES, max_length=NODE_ID_BYTES)]
_Key = Annotated[bytes, msgspec.Meta(min_length=KEY_BYTES, max_length=KEY_BYTES)]
_Nonce = Annotated[bytes, msgspec.Meta(min_length=NONCE_BYTES, max_length=NONCE_BYTES)]
_Count = Annotated[int, msgspec.Meta(ge=1)]


class Hello(Struct, frozen=True, tag=1, forbid_unknown_fields=False):
    """What a node says of itself. `address`: host:port where it listens. Unproven until its Proof.

    `channel`: the channel's binding, as it is at its end; versions whose links had no TLS do not say it.
    """

    version: int
    cluster_id: Annotated[str, msgspec.Meta(max_length=64)]
    node_id: _Id
    public_key: _Key
    pop: Annotated[str, msgspec.Meta(min_length=1, max_length=POP_CHARS_MAX)]
    address: Annotated[str, msgspec.Meta(max_length=ADDRESS_CHARS_MAX)]
    incarnation: Annotated[bytes, msgspec.Meta(min_length=INCARNATION_BYTES, max_length=INCARNATION_BYTES)]
    boot: _Count
    start_id: Annotated[bytes, msgspec.Meta(min_length=8, max_length=8)]
    feature_level: _Count
    nonce: _Nonce
    channel: Annotated[bytes, msgspec.Meta(max_length=CHANNEL_BYTES_MAX)] = b""


class Proof(Struct, frozen=True, tag=2):
    """`mac` proves the cluster key, `signature` the node key."""

    mac: Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
    signature: Annotated[bytes, msgspec.Meta(min_length=SIGNATURE_BYTES, max_length=SIGNATURE_BYTES)]


class Refused(Struct, frozen=True, tag=3):
    """The last thing that a side says when it refuses the other, so that both logs tell why."""

    reason: Annotated[str, msgspec.Meta(max_length=32)]
    text: Annotated[str, msgspec.Meta(max_length=REASON_CHARS_MAX)]


@dataclass(frozen=True, slots=True)
class PeerIdentity:
    """A proven peer."""

    node_id: NodeId
    pop: str
    address: str
    incarnation: bytes
    boot: int
    start_id: bytes
    feature_level: int


class Role(enum.Enum):
    DIALER = b"dialer"
    LISTENER = b"listener"


class _State(enum.Enum):
    HELLO = 1
    PROOF = 2
    DONE = 3
    FAILED = 4


_decoder = msgspec.msgpack.Decoder(Hello | Proof | Refused)
_encoder = msgspec.msgpack.Encoder()


class Handshake:
    """One side of one handshake. Send what `start` and `receive` return; `peer` is set when the other side is proven.

    `expected`: the node that was dialled, None if any will do. After RemoteProtocolError send `farewell` and close.
    """

    def __init__(
        self,
        role: Role,
        identity: NodeIdentity,
        cluster: Cluster,
        address: str,
        accept_boot: AcceptBoot,
        *,
        expected: NodeId | None = None,
        channel_binding: bytes = b"",
    ) -> None:
        self.peer: PeerIdentity | None = None
        self._role = role
        self._identity = identity
        self._cluster = cluster
        self._accept_boot = accept_boot
        self._expected = expected
        self._channel_binding = channel_binding
        self._state = _State.HELLO
        self._own_hello = _encoder.encode(
            Hello(
                PROTOCOL_VERSION,
                cluster.cluster_id,
                identity.node_id,
                identity.public_key,
                identity.pop,
                address,
                identity.incarnation,
                identity.boot,
                identity.start_id,
                FEATURE_LEVEL,
                secrets.token_bytes(NONCE_BYTES),
                channel_binding,
            )
        )
        self._peer_hello = b""
        self._claim: Hello | None = None

    def start(self) -> list[bytes]:
        """What to send before anything was received."""
        return [self._own_hello] if self._role is Role.DIALER else []

    def receive(self, data: bytes) -> list[bytes]:
        """Take one message of the other side in; returns the messages to send. Raises RemoteProtocolError: refused."""
        try:
            return self._receive(data)
        except RemoteProtocolError:
            self._state = _State.FAILED
            raise

    def farewell(self, error: RemoteProtocolError) -> bytes:
        """What tells the other side why it is refused."""
        reason = str(error.detail.get("reason", "garbage"))
        return _encoder.encode(Refused(reason[:32], error.message[:REASON_CHARS_MAX]))

    def _receive(self, data: bytes) -> list[bytes]:
        if len(data) > HANDSHAKE_BYTES_MAX:
            raise _refusal("garbage", f"{len(data)} bytes are too many for a handshake")
        try:
            message = _decoder.decode(data)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise _refusal("garbage", f"not a handshake: {error}") from None
        match message, self._state:
            case Refused(reason, text), _State.HELLO | _State.PROOF:
                raise RemoteProtocolError(f"refused by the other side: {text}", reason="refused", their_reason=reason)
            case Hello(), _State.HELLO:
                self._hello(message, data)
                self._state = _State.PROOF
                return [self._own_proof() if self._role is Role.DIALER else self._own_hello]
            case Proof(), _State.PROOF:
                self._proof(message)
                self._state = _State.DONE
                return [] if self._role is Role.DIALER else [self._own_proof()]
            case _:
                raise _refusal("garbage", f"{type(message).__name__} is out of turn")

    def _hello(self, hello: Hello, data: bytes) -> None:
        if hello.version != PROTOCOL_VERSION:
            raise _refusal("version", f"it speaks protocol {hello.version}, this node {PROTOCOL_VERSION}: upgrade one")
        if hello.cluster_id != self._cluster.cluster_id:
            text = f"it belongs to cluster {hello.cluster_id}, this node to {self._cluster.cluster_id}"
            raise _refusal("other_cluster", f"{text}: correct `bootstrap`, or join that cluster with an empty data_dir")
        if hello.channel != self._channel_binding:
            text = (
                "it has another TLS at its end than this node at its own: a proxy on the way, or somebody who listens"
            )
            raise _refusal("channel", f"{text} there, ends it; let the nodes reach each other without that")
        if hello.node_id == self._identity.node_id:
            raise _refusal("own_id", "it has this node's own id: a node dialled itself, or a data directory was copied")
        if hello.node_id != node_id_of(hello.pop, hello.public_key):
            raise _refusal("node_id", "its node id does not belong to its public key and PoP")
        if self._expected is not None and hello.node_id != self._expected:
            text = f"node {hello.node_id.hex()} answers where {self._expected.hex()} was expected"
            raise _refusal("unexpected_node", f"{text}: the address is out of date")
        self._claim, self._peer_hello = hello, data

    def _proof(self, proof: Proof) -> None:
        claim = self._claim
        if claim is None:
            raise _refusal("garbage", "Proof is out of turn")
        transcript = self._transcript(Role.LISTENER if self._role is Role.DIALER else Role.DIALER)
        if not hmac.compare_digest(proof.mac, hmac.digest(self._cluster.key, transcript, "sha256")):
            text = "it does not hold the cluster's key: copy the key again (`lucd key show`)"
            raise _refusal("wrong_key", f"{text}; or somebody on the way changes what the two say")
        if not signed_by(claim.public_key, proof.signature, transcript):
            raise _refusal("signature", "it does not hold the private key of its node id")
        try:
            self._accept_boot(claim.node_id, claim.incarnation, claim.boot, claim.start_id)
        except DhtError as error:
            raise _refusal("boot", error.message) from error
        self.peer = PeerIdentity(
            claim.node_id,
            claim.pop,
            claim.address,
            claim.incarnation,
            claim.boot,
            claim.start_id,
            min(claim.feature_level, FEATURE_LEVEL),
        )

    def _own_proof(self) -> bytes:
        transcript = self._transcript(self._role)
        mac = hmac.digest(self._cluster.key, transcript, "sha256")
        return _encoder.encode(Proof(mac, self._identity.sign(transcript)))

    def _transcript(self, prover: Role) -> bytes:
        ours_first = self._role is Role.DIALER
        dialer, listener = (self._own_hello, self._peer_hello) if ours_first else (self._peer_hello, self._own_hello)
        digest = hashlib.sha256()
        for part in (b"lucd link 1", prover.value, dialer, listener, self._channel_binding):
            digest.update(len(part).to_bytes(4, "big") + part)
        return digest.digest()


def _refusal(reason: str, text: str) -> RemoteProtocolError:
    return RemoteProtocolError(text, reason=reason)
