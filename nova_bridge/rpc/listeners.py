"""What a bus knows of the other hosts: who listens where, whose turn it is, and which messages came already.

Pure bookkeeping: no clock, no network.
"""

from __future__ import annotations

import enum
from collections import OrderedDict
from collections.abc import Sequence
from typing import TypeVar

from dht.errors import Unavailable
from dht.model import NodeId
from nova_bridge.rpc.bus_messages import Address
from nova_bridge.rpc.peer_messages import Heard

TABLE_ADDRESSES_MAX = 200_000
TURNS_MAX = 10_000
WINDOW_MESSAGES = 4_096
"""Messages of one origin that are remembered; its unfinished ones are fewer."""
WINDOWS_MAX = 4_096

TopicKey = tuple[str, str, str]
T = TypeVar("T")


class PopTable:
    """Where somebody listens on the other hosts of the PoP, as each told last."""

    def __init__(self) -> None:
        self.addresses = 0
        self._told: dict[NodeId, tuple[int, int, tuple[Heard, ...]]] = {}
        self._nodes: dict[Address, dict[NodeId, None]] = {}
        self._fanouts: dict[TopicKey, dict[NodeId, None]] = {}
        self._pools: dict[TopicKey, dict[Address, None]] = {}

    def __contains__(self, node: NodeId) -> bool:
        return node in self._told

    def told(self, node: NodeId, boot: int, version: int, heard: tuple[Heard, ...]) -> bool:
        """Replace what the node told before, unless that was newer. Raises Unavailable when the table is full."""
        known = self._told.get(node)
        if known is not None and known[:2] >= (boot, version):
            return False
        if self.addresses - (len(known[2]) if known else 0) + len(heard) > TABLE_ADDRESSES_MAX:
            raise Unavailable(f"more than {TABLE_ADDRESSES_MAX} addresses are listened at in this PoP", sent=False)
        self.forget(node)
        self._told[node] = boot, version, heard
        self.addresses += len(heard)
        for one in heard:
            self._nodes.setdefault(one.address, {})[node] = None
            if one.fanout:
                self._fanouts.setdefault(one.address.topic_key, {})[node] = None
            if one.address.pool:
                self._pools.setdefault(one.address.topic_key, {})[one.address] = None
        return True

    def forget(self, node: NodeId) -> None:
        _, _, heard = self._told.pop(node, (0, 0, ()))
        self.addresses -= len(heard)
        for one in heard:
            _take_out(self._nodes, one.address, node)
            _take_out(self._fanouts, one.address.topic_key, node)
            if one.address.pool and one.address not in self._nodes:
                _take_out(self._pools, one.address.topic_key, one.address)

    def boot(self, node: NodeId) -> int:
        """At which start the node told; 0 if it never did."""
        return self._told[node][0] if node in self._told else 0

    def known(self) -> list[NodeId]:
        """The nodes that told."""
        return list(self._told)

    def nodes(self, address: Address) -> list[NodeId]:
        return list(self._nodes.get(address, ()))

    def takes_fanouts(self, address: Address, node: NodeId) -> bool:
        return node in self._fanouts.get(address.topic_key, ())

    def pools(self, address: Address) -> list[Address]:
        """The pools of the address's topic."""
        return list(self._pools.get(address.topic_key, ()))


def _take_out(index: dict[T, dict[bytes, None]] | dict[T, dict[Address, None]], key: T, member: object) -> None:
    members = index.get(key)
    if members is not None:
        members.pop(member, None)  # type: ignore[call-overload]
        if not members:
            del index[key]


class Turns:
    """Round robin among the nodes of each address."""

    def __init__(self) -> None:
        self._next: OrderedDict[Address, int] = OrderedDict()

    def choose(self, address: Address, nodes: Sequence[T]) -> T:
        """One of `nodes`, which come in the same order each time."""
        turn = self._next.pop(address, 0)
        self._next[address] = turn + 1
        if len(self._next) > TURNS_MAX:
            self._next.popitem(last=False)
        return nodes[turn % len(nodes)]


class Seen(enum.Enum):
    """What was made of a message when it came before. FORGOTTEN: it is too old to tell."""

    NEW = 1
    TAKEN = 2
    REFUSED = 3
    FORGOTTEN = 4


class _Window:
    def __init__(self, boot: int) -> None:
        self.boot = boot
        self.floor = -1
        """The highest number that was forgotten."""
        self.numbers: OrderedDict[int, Seen] = OrderedDict()


class Once:
    """What was made of messages, by origin, so that a second attempt is not handled twice.

    A refusal is kept too: who was refused goes elsewhere, and an attempt that was delayed must not be taken then.
    """

    def __init__(self) -> None:
        self._windows: OrderedDict[NodeId, _Window] = OrderedDict()
        self._forgot = False

    def seen(self, origin: NodeId, boot: int, number: int, again: bool) -> Seen:
        """`again`: this is not the first attempt of the sender."""
        window = self._windows.get(origin)
        if window is not None and boot < window.boot:
            return Seen.FORGOTTEN
        if window is None or boot > window.boot:
            return Seen.FORGOTTEN if again and window is None and self._forgot else Seen.NEW
        if number in window.numbers:
            return window.numbers[number]
        return Seen.FORGOTTEN if number <= window.floor else Seen.NEW

    def note(self, origin: NodeId, boot: int, number: int, taken: bool) -> None:
        """The message was taken, or refused."""
        window = self._windows.get(origin)
        if window is None or window.boot < boot:
            window = self._windows[origin] = _Window(boot)
        self._windows.move_to_end(origin)
        window.numbers[number] = Seen.TAKEN if taken else Seen.REFUSED
        if len(window.numbers) > WINDOW_MESSAGES:
            oldest, _ = window.numbers.popitem(last=False)
            window.floor = max(window.floor, oldest)
        if len(self._windows) > WINDOWS_MAX:
            self._windows.popitem(last=False)
            self._forgot = True
