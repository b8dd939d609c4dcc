"""Messages of a domain beside the PoP's own, on the same links: in an envelope that names the domain (number 86).

The registers' messages name no domain; what comes without an envelope is for the PoP's. Replies need none.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from dht import codec
from dht.codec import Message, message
from dht.errors import NotFound, Unavailable
from dht.model import NodeId, Struct
from dht.world import Answer, Network


@message
class InDomain(Message, frozen=True, tag=86):
    """`content`: the encoded message, for this domain of the receiver."""

    domain: str
    content: bytes


class DomainNetwork:
    """`dht.world.Network` of one domain over the node's own. The node's answer gives `open` what came for it.

    `begin`: begin a link to that member, for who has to do with it now and then has none.
    """

    def __init__(self, domain: str, network: Network, begin: Callable[[NodeId], None]) -> None:
        self._domain = domain
        self._network = network
        self._begin = begin
        self._answer: Answer | None = None

    def call(self, to: NodeId, message: Struct, timeout_s: float) -> Awaitable[Struct]:
        if not self._network.alive(to):
            self._begin(to)
        return self._network.call(to, InDomain(self._domain, codec.encode(message)), timeout_s)

    def alive(self, node: NodeId) -> bool:
        return self._network.alive(node)

    def silent_s(self, node: NodeId) -> float:
        """From when on the link was begun: who asks is about to need it."""
        self._begin(node)
        return self._network.silent_s(node)

    def parted(self, node: NodeId) -> bool:
        return self._network.parted(node)

    def serve(self, answer: Answer) -> None:
        self._answer = answer

    def open(self, sender: NodeId, envelope: InDomain) -> Awaitable[Struct]:
        """Serve what is in the envelope. Raises NotFound for another domain's, RemoteProtocolError for garbage."""
        if envelope.domain != self._domain:
            raise NotFound(f"domain {envelope.domain} is not kept on this node")
        if self._answer is None:
            raise Unavailable("this node has just started and does not answer yet: try again")
        return self._answer(sender, codec.decode(envelope.content))
