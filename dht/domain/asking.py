"""Asking several nodes at once and stopping as soon as enough is known."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from dht.domain.messages import DomainMessage
from dht.errors import DhtError
from dht.model import NodeId, Struct

Ask = Callable[[NodeId, DomainMessage], Awaitable[Struct]]
"""Reaches any node, this one too; raises what `Network.call` raises."""
R = TypeVar("R", bound=Struct)


async def ask_each(
    ask: Ask,
    nodes: Sequence[NodeId],
    request: DomainMessage,
    kind: type[R],
    enough: Callable[[dict[NodeId, R]], bool] | None = None,
) -> dict[NodeId, R]:
    """Replies by node, in the order of `nodes`; who failed is left out. Returns early once `enough` says so."""

    async def one(node: NodeId) -> R | None:
        try:
            reply = await ask(node, request)
        except DhtError:
            return None  # a failed disk, the peer's or this node's, casts no vote either
        return reply if isinstance(reply, kind) else None

    tasks = {node: asyncio.create_task(one(node)) for node in nodes}
    pending = list(tasks.values())
    try:
        while pending:
            await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            pending = [t for t in pending if not t.done()]
            replies = _replies(tasks)
            if enough is not None and enough(replies):
                return replies
        return _replies(tasks)
    finally:
        for task in pending:
            task.cancel()


def _replies(tasks: dict[NodeId, asyncio.Task[R | None]]) -> dict[NodeId, R]:
    replies: dict[NodeId, R] = {}
    for node, task in tasks.items():
        if task.done():
            reply = task.result()
            if reply is not None:
                replies[node] = reply
    return replies
