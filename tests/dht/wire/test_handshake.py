"""The handshake: every refusal, and that replay, reflection and tampering do not pass."""

from __future__ import annotations

import msgspec
import pytest

from dht.errors import Conflict, RemoteProtocolError
from dht.wire.handshake import HANDSHAKE_BYTES_MAX, Handshake, Hello, Proof, Refused, Role
from dht.wire.identity import Cluster, NodeIdentity, node_id_of, pop_prefix

CLUSTER = Cluster.found()
A = NodeIdentity.create("lyon")
B = NodeIdentity.create("nantes")
decode = msgspec.msgpack.Decoder(Hello | Proof | Refused).decode
decode_any = msgspec.msgpack.decode
encode = msgspec.msgpack.encode


class Book:
    """Remembers boot counters as a peer's disk would."""

    def __init__(self):
        self.met = {}

    def accept(self, node_id, incarnation, boot, start_id):
        if boot < self.met.get((node_id, incarnation), 0):
            raise Conflict(f"boot {boot} is older than what was met")
        self.met[node_id, incarnation] = boot


def side(role, identity, cluster=CLUSTER, book=None, **more):
    return Handshake(role, identity, cluster, "127.0.0.1:4000", (book or Book()).accept, **more)


def shake(dialer, listener):
    """Carry messages until both are done; raises what the first refusing side raises."""
    to_listener = dialer.start()
    while to_listener:
        to_dialer = [reply for data in to_listener for reply in listener.receive(data)]
        to_listener = [reply for data in to_dialer for reply in dialer.receive(data)]


def refusal_of(dialer, listener):
    with pytest.raises(RemoteProtocolError) as caught:
        shake(dialer, listener)
    return caught.value.detail["reason"]


def test_two_nodes_of_a_cluster_prove_themselves():
    dialer, listener = side(Role.DIALER, A), side(Role.LISTENER, B)
    shake(dialer, listener)
    assert (dialer.peer.node_id, dialer.peer.pop, dialer.peer.incarnation) == (B.node_id, "nantes", B.incarnation)
    assert (listener.peer.node_id, listener.peer.boot, listener.peer.start_id) == (A.node_id, 1, A.start_id)
    assert listener.peer.address == "127.0.0.1:4000"


def test_node_id_begins_with_its_pops_prefix():
    assert A.node_id[:4] == pop_prefix("lyon")
    assert node_id_of("lyon", A.public_key) == A.node_id
    assert NodeIdentity.load("lyon", A.private_bytes(), A.incarnation, 1).node_id == A.node_id


@pytest.mark.parametrize("end", [Role.DIALER, Role.LISTENER])
def test_other_cluster_is_refused(end):
    assert refusal_of(side(Role.DIALER, A), side(Role.LISTENER, B, Cluster.found())) == "other_cluster"


@pytest.mark.parametrize("wrong", [Role.DIALER, Role.LISTENER])
def test_wrong_cluster_key_is_refused(wrong):
    forged = Cluster(CLUSTER.cluster_id, bytes(32))
    dialer = side(Role.DIALER, A, forged if wrong is Role.DIALER else CLUSTER)
    assert refusal_of(dialer, side(Role.LISTENER, B, forged if wrong is Role.LISTENER else CLUSTER)) == "wrong_key"
    assert dialer.peer is None


def test_own_id_is_refused():
    assert refusal_of(side(Role.DIALER, A), side(Role.LISTENER, A)) == "own_id"


def test_another_node_than_the_dialled_is_refused():
    assert refusal_of(side(Role.DIALER, A, expected=A.node_id), side(Role.LISTENER, B)) == "unexpected_node"


def test_boot_counter_that_fell_is_refused():
    book = Book()
    second = A.next_boot()
    shake(side(Role.DIALER, second), side(Role.LISTENER, B, book=book))
    shake(side(Role.DIALER, second), side(Role.LISTENER, B, book=book))
    assert refusal_of(side(Role.DIALER, A), side(Role.LISTENER, B, book=book)) == "boot"


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("version", 2, "version"),
        ("node_id", bytes(20), "node_id"),
        ("pop", "paris", "node_id"),
        ("public_key", bytes(32), "node_id"),
        ("boot", 0, "garbage"),
        ("nonce", b"short", "garbage"),
        ("channel", b"c" * 32, "channel"),
        ("channel", b"c" * 33, "garbage"),
    ],
)
def test_hello_that_does_not_fit_is_refused(field, value, reason):
    hello = msgspec.structs.replace(decode(side(Role.DIALER, A).start()[0]), **{field: value})
    with pytest.raises(RemoteProtocolError) as caught:
        side(Role.LISTENER, B).receive(encode(hello))
    assert caught.value.detail["reason"] == reason


@pytest.mark.parametrize("field", ["boot", "address", "incarnation", "start_id"])
def test_hello_changed_on_the_way_is_refused(field):
    dialer, listener = side(Role.DIALER, A), side(Role.LISTENER, B)
    hello = decode(dialer.start()[0])
    other = {"boot": 7, "address": "10.0.0.1:1", "incarnation": bytes(16), "start_id": bytes(8)}[field]
    (answer,) = listener.receive(encode(msgspec.structs.replace(hello, **{field: other})))
    (proof,) = dialer.receive(answer)
    with pytest.raises(RemoteProtocolError) as caught:
        listener.receive(proof)
    assert caught.value.detail["reason"] == "wrong_key"


def test_member_without_the_node_key_is_refused():
    thief = NodeIdentity.create("lyon")
    stolen = NodeIdentity("lyon", A.incarnation, 1, thief.private_key, A.public_key, A.node_id, A.start_id)
    assert refusal_of(side(Role.DIALER, stolen), side(Role.LISTENER, B)) == "signature"


def test_replayed_handshake_is_refused():
    dialer, listener = side(Role.DIALER, A), side(Role.LISTENER, B)
    hello = dialer.start()[0]
    (proof,) = dialer.receive(listener.receive(hello)[0])
    listener.receive(proof)
    fresh = side(Role.LISTENER, B)
    fresh.receive(hello)
    with pytest.raises(RemoteProtocolError) as caught:
        fresh.receive(proof)
    assert caught.value.detail["reason"] == "wrong_key"


def test_reflected_messages_are_refused():
    dialer = side(Role.DIALER, A)
    with pytest.raises(RemoteProtocolError) as caught:
        dialer.receive(dialer.start()[0])
    assert caught.value.detail["reason"] == "own_id"


def test_proof_of_the_other_role_is_refused():
    # Two victims' listeners are played against each other: a listener's proof must not pass for a dialer's.
    one, other = side(Role.LISTENER, A), side(Role.LISTENER, B)
    hello_a = side(Role.DIALER, A).start()[0]
    other.receive(hello_a)
    with pytest.raises(RemoteProtocolError):
        other.receive(one._own_proof())


def test_other_channel_binding_is_refused_by_both_ends():
    """Somebody ends TLS between the two, and passes on what they say."""
    dialer = side(Role.DIALER, A, channel_binding=b"tls-1")
    listener = side(Role.LISTENER, B, channel_binding=b"tls-2")
    assert refusal_of(dialer, listener) == "channel"
    with pytest.raises(RemoteProtocolError) as caught:
        side(Role.DIALER, A, channel_binding=b"tls-1").receive(listener._own_hello)
    assert caught.value.detail["reason"] == "channel"


def test_man_in_the_middle_who_changes_what_hellos_say_of_the_channel_gets_no_proof_from_or_past_either_end():
    dialer = side(Role.DIALER, A, channel_binding=b"tls-1")
    listener = side(Role.LISTENER, B, channel_binding=b"tls-2")

    def changed(hello, channel):
        return encode(msgspec.structs.replace(decode(hello), channel=channel))

    (answer,) = listener.receive(changed(dialer.start()[0], b"tls-2"))
    (proof,) = dialer.receive(changed(answer, b"tls-1"))
    with pytest.raises(RemoteProtocolError) as caught:
        listener.receive(proof)
    assert caught.value.detail["reason"] == "wrong_key"
    # Nor would the dialer have the listener's proof, could it be had.
    with pytest.raises(RemoteProtocolError) as caught:
        dialer.receive(listener._own_proof())
    assert caught.value.detail["reason"] == "wrong_key"
    assert dialer.peer is listener.peer is None


def test_binding_is_in_the_proofs_themselves_and_not_only_in_what_hellos_say():
    dialer = side(Role.DIALER, A, channel_binding=b"tls-1")
    listener = side(Role.LISTENER, B, channel_binding=b"tls-1")
    (proof,) = dialer.receive(listener.receive(dialer.start()[0])[0])
    listener._channel_binding = b"tls-2"
    with pytest.raises(RemoteProtocolError) as caught:
        listener.receive(proof)
    assert caught.value.detail["reason"] == "wrong_key"


def test_messages_out_of_turn_are_refused():
    dialer, listener = side(Role.DIALER, A), side(Role.LISTENER, B)
    with pytest.raises(RemoteProtocolError):
        listener.receive(encode(Proof(bytes(32), bytes(64))))
    with pytest.raises(RemoteProtocolError):
        listener.receive(dialer.start()[0])
    assert listener.peer is None


def test_refusal_is_told_to_the_other_side():
    dialer, listener = side(Role.DIALER, A), side(Role.LISTENER, B, Cluster.found())
    with pytest.raises(RemoteProtocolError) as caught:
        listener.receive(dialer.start()[0])
    with pytest.raises(RemoteProtocolError) as told:
        dialer.receive(listener.farewell(caught.value))
    assert told.value.detail == {"reason": "refused", "their_reason": "other_cluster"}


def test_garbage_is_refused_whatever_it_is(chance):
    for size in [0, 1, 10, 100, HANDSHAKE_BYTES_MAX, HANDSHAKE_BYTES_MAX + 1]:
        for _ in range(200):
            with pytest.raises(RemoteProtocolError) as caught:
                side(Role.LISTENER, B).receive(chance.randbytes(size))
            assert caught.value.detail["reason"] == "garbage"


def of_older_version(handshake):
    """Its Hello as it was before links had TLS."""
    handshake._own_hello = encode(decode_any(handshake._own_hello)[:-1])
    return handshake


@pytest.mark.parametrize("older", [Role.DIALER, Role.LISTENER])
def test_node_of_a_version_without_tls_gets_a_link_where_links_have_none_and_is_told_why_where_they_have(older):
    def sides(**more):
        dialer, listener = side(Role.DIALER, A, **more), side(Role.LISTENER, B, **more)
        of_older_version(dialer if older is Role.DIALER else listener)
        return dialer, listener

    dialer, listener = sides()
    shake(dialer, listener)
    assert (dialer.peer.node_id, listener.peer.node_id) == (B.node_id, A.node_id)
    assert refusal_of(*sides(channel_binding=b"c" * 32)) == "channel"
