"""The contacts of a node, in buckets.

The stock routing table takes a bucket's depth from the prefix that its nodes happen to share. Ids here share 32 bits
by design (the PoP), which made 301 buckets of 300 nodes. This one takes the depth from the bucket's range and looks
neighbours up in exact XOR order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from kademlia.node import Node
from kademlia.routing import KBucket, RoutingTable

from dht.model import NodeId
from dht.overlay.messages import Contact

ID_BITS = 160
_SPLIT_LEVELS = 5


class Peer(Node):  # type: ignore[misc]
    """A contact in the table. `heard`: loop time of its last fresh reply; `misses`: unanswered in succession."""

    def __init__(self, contact: Contact, heard: float) -> None:
        super().__init__(contact.id, contact.host, contact.port)
        self.contact = contact
        self.heard = heard
        self.misses = 0


class Bucket(KBucket):  # type: ignore[misc]
    """A bucket over [range[0], range[1]], both included."""

    def depth(self) -> int:
        span: int = self.range[1] - self.range[0] + 1
        return ID_BITS - (span.bit_length() - 1)

    def distance(self, aim: int) -> int:
        """Of the nearest id that can be in it."""
        low, high = int(self.range[0]), int(self.range[1])
        return (low ^ aim) & ~(high - low)

    def split(self) -> tuple[Bucket, Bucket]:
        middle = (self.range[0] + self.range[1]) // 2
        halves = Bucket(self.range[0], middle, self.ksize), Bucket(middle + 1, self.range[1], self.ksize)
        for peer in (*self.nodes.values(), *self.replacement_nodes.values()):
            halves[peer.long_id > middle].add_node(peer)
        return halves


class Table(RoutingTable):  # type: ignore[misc]
    """Verified contacts. `per_host_max`: contacts that one host may have: a host with many ids fills nothing."""

    def __init__(self, protocol: Any, ksize: int, node: Node, per_host_max: int) -> None:
        super().__init__(protocol, ksize, node)
        self._per_host_max = per_host_max
        self._hosts: Counter[str] = Counter()
        self._peers: dict[NodeId, Peer] = {}

    def flush(self) -> None:
        self.buckets = [Bucket(0, 2**ID_BITS - 1, self.ksize)]

    def __len__(self) -> int:
        return len(self._peers)

    def __iter__(self) -> Iterator[Peer]:
        return iter(list(self._peers.values()))

    def get(self, node_id: NodeId) -> Peer | None:
        return self._peers.get(node_id)

    def get_bucket_for(self, node: Node) -> int:
        for index, bucket in enumerate(self.buckets):
            if node.long_id <= bucket.range[1]:
                return index
        raise ValueError("an id has 160 bits")

    def learn(self, contact: Contact, now: float) -> bool:
        """Take a contact that has just answered from its address. False: not taken, one of the limits is reached."""
        known = self._peers.get(contact.id)
        if known is None:
            return self._hosts[contact.host] < self._per_host_max and self.add_contact(Peer(contact, now))
        if known.contact != contact:
            self._leave_host(known)
            known.contact, known.ip, known.port = contact, contact.host, contact.port
            self._hosts[contact.host] += 1
        known.heard, known.misses = now, 0
        self.buckets[self.get_bucket_for(known)].add_node(known)
        return True

    def add_contact(self, node: Peer) -> bool:
        while True:
            index = self.get_bucket_for(node)
            bucket = self.buckets[index]
            if bucket.add_node(node):
                self._enter(node)
                return True
            # Split where this node itself lives, and elsewhere down to the next multiple of 5 bits.
            splits = bucket.has_in_range(self.node) or bucket.depth() % _SPLIT_LEVELS != 0
            if not splits or bucket.depth() >= ID_BITS:
                return False
            bucket.replacement_nodes.pop(node.id, None)
            self.split_bucket(index)
            for half in self.buckets[index : index + 2]:
                for spare in [peer for peer in half.nodes.values() if peer.id not in self._peers]:
                    if self._hosts[spare.contact.host] < self._per_host_max:
                        self._enter(spare)
                    else:
                        del half.nodes[spare.id]

    def forget(self, node_id: NodeId) -> Peer | None:
        """Drop the contact. A spare one of its bucket is to be asked whether it lives: it is returned."""
        peer = self._peers.pop(node_id, None)
        if peer is None:
            return None
        self._leave_host(peer)
        bucket = self.buckets[self.get_bucket_for(peer)]
        bucket.nodes.pop(node_id, None)
        spare: Peer | None = None
        if bucket.replacement_nodes:
            _, spare = bucket.replacement_nodes.popitem()
        return spare

    def nearest(self, target: NodeId, count: int, exclude: NodeId | None = None) -> list[Contact]:
        """Contacts nearest to the target, in exact XOR order.

        Buckets are the leaves of a binary tree: all of one are nearer than all of another. So only the nearest ones are
        looked into, however many contacts there are.
        """
        aim = int.from_bytes(target, "big")
        found: list[Peer] = []
        for bucket in sorted(self.buckets, key=lambda bucket: bucket.distance(aim)):
            inside = [peer for peer in bucket.nodes.values() if peer.id != exclude]
            found += sorted(inside, key=lambda peer: peer.long_id ^ aim)
            if len(found) >= count:
                break
        return [peer.contact for peer in found[:count]]

    def _enter(self, peer: Peer) -> None:
        if peer.id not in self._peers:
            self._peers[peer.id] = peer
            self._hosts[peer.contact.host] += 1

    def _leave_host(self, peer: Peer) -> None:
        self._hosts[peer.contact.host] -= 1
        if not self._hosts[peer.contact.host]:
            del self._hosts[peer.contact.host]
